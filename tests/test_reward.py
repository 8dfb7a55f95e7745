"""The reward model: a score belongs to the text alone, and its losses are the textbook's."""
import math

import pytest
import torch

from data import batches
from data.feedback import feedback_kind
from model import ModelConfig
from reward import (PythonReward, RewardConfig, RewardModel, RewardOptions, critic_from,
                    davidson_log_probs, feedback_loss, label_loss, pairwise_loss, regression_loss,
                    room_for_prompt)
from runtime.options import UserError, parse
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
        end_ids, decode = (-1,), staticmethod(lambda ids: "".join(map(chr, ids)))
        reply_text = staticmethod(lambda ids: "h")

    scorer = PythonReward(lambda prompts, replies: [number] * len(replies), Letters)
    with pytest.raises(UserError, match="no finite number"):
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


def test_scores_of_rows_keep_their_order_and_do_not_depend_on_the_batch(monkeypatch):
    model, rng = reward_model("mean"), torch.Generator().manual_seed(0)
    texts = [torch.randint(0, 50, (n,), generator=rng).tolist() for n in (9, 4, 12, 7, 5)]
    monkeypatch.setitem(batches.TOKENS_AT_ONCE, "cpu", 18)
    scored = model.score_rows([(ids, [False] * 2 + [True] * (len(ids) - 2)) for ids in texts])
    for ids, score in zip(texts, scored, strict=True):
        real = torch.ones(1, len(ids), dtype=torch.bool)
        alone, = model(torch.tensor([ids]), real, torch.arange(len(ids))[None] > 1)
        assert float(score) == pytest.approx(float(alone), abs=1e-5)


@pytest.mark.parametrize("learned,reply_len,room", [(None, 16, 16), (32, 16, 16), (20, 4, 12), (20, 30, 2)])
def test_replies_are_learned_to_prompts_as_long_as_the_reward_models(learned, reply_len, room):
    """The model reads 32 tokens; rows of 20 were made of prompts of up to 12."""
    state = {"options": {"max_len": learned}} if learned else {}
    assert room_for_prompt(reply_len, reward_model("mean"), state) == room


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
        end_ids = (-1,)
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


# ---- ties ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("delta", [-3.0, 0.0, 0.7, 40.0])
@pytest.mark.parametrize("tie_odds", [1e-6, 0.5, 4.0])
def test_davidsons_three_outcomes(delta, tie_odds):
    won, tied, lost = davidson_log_probs(torch.tensor([delta], dtype=torch.float64), tie_odds).exp()
    assert float(won + tied + lost) == pytest.approx(1)
    assert float(won / lost) == pytest.approx(math.exp(delta))  # as in Bradley and Terry's model
    assert float(tied / (won * lost).sqrt()) == pytest.approx(tie_odds)


def test_with_ever_fewer_ties_davidsons_loss_is_bradley_and_terrys():
    chosen, rejected = torch.tensor([1.0, -2.0]).double(), torch.tensor([0.5, 0.5]).double()
    settings = dict(margin=torch.tensor([0.3, 0.0]), label_smoothing=0.1)
    loss = pairwise_loss(chosen, rejected, **settings, ties=torch.tensor([False, False]), tie_odds=1e-9)
    assert float(loss) == pytest.approx(float(pairwise_loss(chosen, rejected, **settings)), rel=1e-6)


def test_a_tie_pulls_scores_together_whatever_their_order():
    tie = torch.tensor([True])
    for first, second in ((2.0, -1.0), (-1.0, 2.0)):
        scores = torch.tensor([first, second], requires_grad=True)
        loss = pairwise_loss(scores[:1], scores[1:], label_smoothing=0.2, ties=tie, tie_odds=1.0)
        loss.backward()
        assert float(loss) == pytest.approx(math.log(math.exp(1.5) + 1 + math.exp(-1.5)) - 0.0, rel=1e-6)
        assert scores.grad[scores.argmax()] > 0 > scores.grad[scores.argmin()]
    level = pairwise_loss(torch.zeros(1), torch.zeros(1), ties=tie, tie_odds=1.0)
    assert float(level) == pytest.approx(math.log(3))


def test_records_say_which_pairs_are_ties_and_which_are_not_smoothed():
    scores = torch.tensor([1.0, 2.0, 3.0, 0.5, 0.0, -1.0])
    records = [{"chosen": "", "rejected": "", **more} for more in ({}, {"tie": True}, {"smoothing": 0.0})]
    loss = feedback_loss("pairwise", scores, records, label_smoothing=0.2, tie_odds=0.5)
    won, tied, lost = davidson_log_probs(scores[:3] - scores[3:], 0.5)
    assert float(loss) == pytest.approx(float(-(.8 * won[0] + .2 * lost[0] + tied[1] + won[2]) / 3), rel=1e-6)


# ---- parts and members ---------------------------------------------------------------------------

def headed(parts=(), members=1, ensemble="mean", pool="mean") -> RewardModel:
    model = RewardModel(RewardConfig(**CONFIG, pool=pool, parts=parts, members=members, ensemble=ensemble))
    loud(model.backbone)
    return model.eval()


PROMPTS, REPLIES = [[1, 2, 3], [4, 5], [6]], [[7, 8], [9, 10, 11, 12], [13]]


def test_a_score_is_the_mean_of_its_parts():
    model = headed(parts=("length", "relevance"))
    parts = model.part_scores(PROMPTS, REPLIES)
    assert list(parts) == ["length", "relevance"]
    assert torch.allclose(model.scores(PROMPTS, REPLIES), (parts["length"] + parts["relevance"]) / 2, atol=1e-6)
    assert (parts["length"] - parts["relevance"]).abs().min() > 1e-3
    assert reward_model("mean").part_scores(PROMPTS, REPLIES) == {}


def test_each_row_has_the_score_of_the_part_that_is_asked_for():
    model = headed(parts=("length", "relevance"))
    rows = [(p + r, [False] * len(p) + [True] * len(r)) for p, r in zip(PROMPTS, REPLIES, strict=True)]
    parts, whole = model.part_scores(PROMPTS, REPLIES), model.scores(PROMPTS, REPLIES)
    asked = model.score_rows(rows, ["relevance", "length", "beauty"])
    assert torch.equal(asked, torch.stack((parts["relevance"][0], parts["length"][1], whole[2])))
    plain = reward_model("mean")
    assert torch.equal(plain.score_rows(rows, ["relevance"] * 3), plain.score_rows(rows))


@pytest.mark.parametrize("parts", [(), ("a", "b")])
def test_an_ensembles_score_is_its_members_mean_minimum_or_mean_less_spread(parts):
    scored = {}
    for ensemble in ("mean", "min", "lower"):
        model = headed(parts, 5, ensemble)  # equal weights: the seed alone draws them
        scored[ensemble] = model.scores(PROMPTS, REPLIES)
        spread = model.part_scores(PROMPTS, REPLIES)["spread"]
    rows = [(p + r, [False] * len(p) + [True] * len(r)) for p, r in zip(PROMPTS, REPLIES, strict=True)]
    heads = model.score_heads(rows)
    assert torch.allclose(scored["mean"], heads.mean((0, 1)), atol=1e-6)
    assert torch.allclose(scored["min"], heads.amin(1).mean(0), atol=1e-6)
    assert torch.allclose(scored["lower"], scored["mean"] - spread, atol=1e-6)
    assert spread.min() > 1e-3
    with torch.no_grad():
        for parameter in model.score_head.parameters():  # members that agree
            parameter.copy_(parameter[:1].expand_as(parameter))
    assert float(model.part_scores(PROMPTS, REPLIES)["spread"].max()) < 1e-6


def test_the_critic_of_parts_and_members_is_their_mean():
    model = headed(("a", "b"), 3)
    critic = critic_from(model, mean=2.0, std=0.5)
    tokens, ones = torch.arange(12).view(2, 6), torch.ones(2, 6, dtype=torch.bool)
    assert critic.score_head.weight.shape == (1, 16)
    assert torch.allclose(critic(tokens, ones), (model(tokens, ones) - 2.0) / 0.5, atol=1e-5)
    assert critic.head_values(critic.backbone.hidden(tokens)).shape == (2, 6)
    fresh = RewardModel(critic.config)
    fresh.load_state_dict(critic.state_dict())  # its config is that of its weights


def test_a_record_that_does_not_count_for_a_member_teaches_it_nothing():
    scores = torch.zeros(2, 3, requires_grad=True)  # two members, three records
    weights = torch.tensor([[1.0, 0.0, 2.0], [1.0, 1.0, 1.0]])
    for kind, record in (("label", {"label": 1}), ("regression", {"score": 1.0})):
        gradient, = torch.autograd.grad(feedback_loss(kind, scores, [record] * 3, weights=weights), scores)
        assert gradient[0, 1] == 0
        assert float(gradient[0, 2]) == pytest.approx(2 * float(gradient[1, 2]))
    both = torch.zeros(2, 6, requires_grad=True)
    loss = feedback_loss("pairwise", both, [{"chosen": "", "rejected": ""}] * 3, weights=weights)
    gradient, = torch.autograd.grad(loss, both)
    assert gradient[0, 1] == gradient[0, 4] == 0
    assert (gradient[1] != 0).all()


@pytest.mark.parametrize("words,said", [
    (["--ensemble=min"], "--ensemble has no effect without --members"),
    (["--flip_share=.1"], "--flip_share has no effect without --strength_from"),
    (["--adaptive_margin"], "--adaptive_margin has no effect without --strength_from"),
    (["--strength_from=x"], "--strength_from has no effect alone"),
    (["--strength_from=x", "--smooth_share=.1"], "--smooth_share has no effect without --label_smoothing")])
def test_options_without_effect_are_refused(words, said):
    with pytest.raises(UserError, match=said):
        parse(RewardOptions, words, "x")
