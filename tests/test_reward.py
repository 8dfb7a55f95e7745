"""The reward model: a score belongs to the text alone, and its losses are the textbook's."""
import math

import pytest
import torch

from model import ModelConfig
from reward import (PythonReward, RewardConfig, RewardModel, critic_from, feedback_kind,
                    feedback_loss, label_loss, pairwise_loss, regression_loss)
from runtime.options import UserError
from tests.conftest import equal, loud

CONFIG = dict(vocab_size=60, n_layer=2, n_head=2, n_kv_head=2, d_model=16, d_ff=32, max_len=32)


def reward_model(pool: str) -> RewardModel:
    model = RewardModel(RewardConfig(**CONFIG, pool=pool))
    loud(model.backbone)
    return model.eval()


def rows(lengths, width, side):
    tokens = torch.full((len(lengths), width), 59)
    mask = torch.zeros(len(lengths), width, dtype=torch.bool)
    for i, n in enumerate(lengths):
        at = slice(width - n, width) if side == "left" else slice(0, n)
        tokens[i, at] = torch.randint(0, 50, (n,), generator=torch.Generator().manual_seed(n))
        mask[i, at] = True
    return tokens, mask


@pytest.mark.parametrize("pool", ["last", "mean"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_score_does_not_depend_on_padding_or_batch(pool, side):
    model, lengths = reward_model(pool), [5, 11, 8]
    tokens, mask = rows(lengths, 14, side)
    reply = mask & (mask.cumsum(1) > 3)
    together = model(tokens, mask, reply)
    for i in range(3):
        ids, ones = tokens[i, mask[i]][None], torch.ones(1, lengths[i], dtype=torch.bool)
        alone, = model(ids, ones, reply[i, mask[i]][None])
        assert torch.allclose(together[i], alone, atol=1e-5)
    tokens[~mask] = 3
    assert torch.equal(model(tokens, mask, reply), together)


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_scores_that_are_not_finite_are_refused(number):
    model = reward_model("mean")
    with torch.no_grad():
        model.score_head.bias.fill_(number)
    with pytest.raises(UserError, match="scores of the reward model are not finite"):
        model.scores([[1, 2]], [[3, 4]])


@pytest.mark.parametrize("number", [math.nan, math.inf, 1e39])
def test_a_reward_function_must_give_finite_scores(number):
    class Letters:
        eom_id, decode = -1, staticmethod(lambda ids: "".join(map(chr, ids)))
        reply_text = staticmethod(lambda ids: "h")

    scorer = PythonReward(lambda prompts, replies: [number] * len(replies), Letters)
    with pytest.raises(UserError, match="the reward function gives scores.*not finite"):
        scorer.scores([[72]], [[104, -1]])


VALUES = torch.tensor([[1.0, 2, 4, 9], [5, 6, 7, 8]])
REAL = torch.tensor([[1, 1, 1, 0], [0, 0, 1, 1]]).bool()


@pytest.mark.parametrize("pool,expected", [("last", [4, 8]), ("mean", [7 / 3, 7.5])])
def test_last_reads_the_last_real_token_and_mean_all(pool, expected):
    assert reward_model(pool).pool(VALUES, REAL).tolist() == pytest.approx(expected)


@pytest.mark.parametrize("pool,expected", [("last", [2, 7]), ("mean", [2, 7])])
def test_of_a_reply_only_its_tokens_count(pool, expected):
    reply = torch.tensor([[0, 1, 0, 1], [1, 0, 1, 0]]).bool()
    assert reward_model(pool).pool(VALUES, REAL, reply).tolist() == expected


def test_a_row_without_tokens_cannot_be_scored():
    with pytest.raises(ValueError, match="without any token"):
        reward_model("mean").pool(VALUES, REAL, torch.zeros_like(REAL))


def test_nan_in_a_pad_changes_no_score():
    values, mask = torch.tensor([[1.0, 2, math.nan]]), torch.tensor([[1, 1, 0]]).bool()
    assert reward_model("mean").pool(values, mask).tolist() == [1.5]


def test_scores_of_rows_keep_their_order_and_do_not_depend_on_the_batch():
    model, rng = reward_model("mean"), torch.Generator().manual_seed(0)
    texts = [torch.randint(0, 50, (n,), generator=rng).tolist() for n in (9, 4, 12, 7, 5)]
    model.rows_at_once = 2
    scored = model.score_rows([(ids, [False] * 2 + [True] * (len(ids) - 2)) for ids in texts])
    for ids, score in zip(texts, scored, strict=True):
        real = torch.ones(1, len(ids), dtype=torch.bool)
        alone, = model(torch.tensor([ids]), real, torch.arange(len(ids))[None] > 1)
        assert float(score) == pytest.approx(float(alone), abs=1e-5)


def test_a_score_is_that_of_the_replys_tokens_after_the_prompt():
    model = reward_model("mean")
    prompt, reply = [1, 2, 3], [4, 5]
    score, = model.scores([prompt], [reply])
    expected, = model.score_rows([(prompt + reply, [False] * 3 + [True] * 2)])
    assert torch.equal(score, expected)


def test_prompts_and_replies_come_in_equal_numbers():
    with pytest.raises(ValueError):
        reward_model("mean").scores([[1, 2]], [[3], [4]])


@pytest.mark.parametrize("record", [{"label": 1}, {"score": 2.5},
                                    {"chosen": "a", "rejected": "b", "margin": .5}])
def test_each_kind_of_feedback_has_its_loss(record):
    scores, kind = torch.tensor([.3, -.2]), feedback_kind(record)
    expected = {"label": label_loss(scores, torch.tensor([1, 1])),
                "regression": regression_loss(scores, torch.tensor([2.5, 2.5])),
                "pairwise": pairwise_loss(scores[:1], scores[1:], margin=.5, label_smoothing=.1)}
    records = [record] if kind == "pairwise" else [record] * 2
    assert torch.allclose(feedback_loss(kind, scores, records, .1), expected[kind])


def test_the_end_token_is_read():
    model = reward_model("last")
    tokens, mask = rows([6], 6, "right")
    ended = tokens.clone()
    ended[0, -1] = 58
    assert not torch.allclose(model(tokens, mask), model(ended, mask))


def test_a_critics_values_are_scores_on_the_scale_it_is_given():
    model = reward_model("mean")
    critic = critic_from(model, mean=2.0, std=0.5)
    tokens, ones = torch.arange(12).view(2, 6), torch.ones(2, 6, dtype=torch.bool)
    assert torch.allclose(critic(tokens, ones), (model(tokens, ones) - 2.0) / 0.5, atol=1e-5)


def test_a_critic_learns_and_the_reward_model_it_comes_from_does_not():
    model = reward_model("mean").requires_grad_(False)
    critic = critic_from(model)
    assert all(parameter.requires_grad for parameter in critic.parameters())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    with torch.no_grad():
        critic.score_head.weight.zero_()
    assert model.score_head.weight.abs().min() > 0  # a copy


def test_an_older_reward_models_weights_load_without_their_mean_and_spread():
    model = reward_model("mean")
    old = model.state_dict() | {"mean": torch.tensor(3.0), "std": torch.tensor(2.0)}
    fresh = RewardModel(model.config)
    fresh.load_state_dict(old)
    assert equal(fresh.state_dict(), model.state_dict())


def test_a_python_reward_reads_texts_without_their_end_token():
    read = []

    class Letters:
        eom_id = -1
        decode = staticmethod(lambda ids: "".join(map(chr, ids)))
        reply_text = staticmethod(lambda ids: "".join(chr(i) for i in ids if i >= 0))

    def count(prompts, replies):
        read.extend(zip(prompts, replies, strict=True))
        return [reply.count("a") for reply in replies]

    scores = PythonReward(count, Letters).scores([[104, 105]], [[97, 98, 97, -1]])
    assert read == [("hi", "aba")]
    assert scores.tolist() == [2.0]


def test_the_head_starts_with_the_stated_spread():
    wide = RewardModel(ModelConfig(**{**CONFIG, "d_model": 1024, "n_head": 2, "n_kv_head": 2}))
    assert abs(float(wide.score_head.weight.std()) * math.sqrt(1025) - 1) < 0.1
    assert float(wide.score_head.bias) == 0


@pytest.mark.parametrize("delta,expected", [(0.0, math.log(2)), (-20.0, 20.000000002061154),
                                            (20.0, 2.0611536e-09)])
def test_bradley_terry_at_known_values(delta, expected):
    loss = pairwise_loss(torch.tensor([delta]).double(), torch.zeros(1).double())
    assert float(loss) == pytest.approx(expected, rel=1e-7)


def test_the_worst_pairs_keep_their_gradient():
    delta = torch.tensor([-30.0], requires_grad=True)
    pairwise_loss(delta, torch.zeros(1)).backward()
    assert float(delta.grad) == pytest.approx(-1, abs=1e-6)


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


def test_a_margin_asks_for_more_than_the_right_order():
    loss = pairwise_loss(torch.tensor([1.0]), torch.tensor([0.25]), margin=0.5)
    assert float(loss) == pytest.approx(-log_sigmoid(0.25), rel=1e-6)


def test_label_smoothing_takes_a_share_of_pairs_to_be_the_wrong_way_round():
    loss = pairwise_loss(torch.tensor([1.0]), torch.tensor([0.25]), label_smoothing=0.1)
    expected = -(0.9 * log_sigmoid(0.75) + 0.1 * log_sigmoid(-0.75))
    assert float(loss) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("score,label,expected", [(0.0, 1, math.log(2)), (0.0, 0, math.log(2)),
                                                  (3.0, 0, math.log1p(math.exp(3))),
                                                  (3.0, 1, math.log1p(math.exp(-3)))])
def test_the_label_loss_is_the_cross_entropy_of_log_odds(score, label, expected):
    loss = label_loss(torch.tensor([score]), torch.tensor([label]))
    assert float(loss) == pytest.approx(expected, rel=1e-6)


def test_the_regression_loss_is_the_mean_squared_error():
    assert float(regression_loss(torch.tensor([1.0, 3.0]), torch.tensor([0, 0]))) == 5


def test_an_unknown_pooling_is_refused():
    with pytest.raises(UserError, match="first"):
        RewardModel(RewardConfig(**CONFIG, pool="first"))
