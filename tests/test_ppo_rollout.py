"""A rollout: every array equals a row computed alone, and what is scored is what was sampled."""
import dataclasses
import math

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from data.batches import make_rows, scatter_tokens
from model import ModelConfig, Transformer, token_logprobs
from ppo import (Networks, Rollout, ScoreScale, collect_rollout, gae, rollout_metrics, token_rewards,
                 whiten)
from reward import critic_from
from runtime import machine
from runtime.device import precision
from runtime.options import UserError
from runtime.statistics import masked_mean
from tests.conftest import logprobs_of, noise
from tests.ppo_world import END, SHAPE, bools, nets_of, options, prompts, rollout_of


def reply_rows(length: int = 8, prompt: int = 3):
    """One row of so many tokens, its first ones the prompt, as the networks read it."""
    tokens, ones = torch.arange(6, 6 + length)[None], torch.ones(1, length).bool()
    return make_rows(tokens, ones, torch.arange(length)[None] >= prompt)


# ---- what is scored ------------------------------------------------------------------------------

@pytest.mark.parametrize("temperature", [1.0, .7])
def test_what_is_scored_is_what_was_sampled(temperature):
    rollout = rollout_of(nets_of(), options(temperature=temperature))
    assert rollout_metrics(rollout)["sampler_gap"] < 1e-4
    assert rollout.ended.any()  # the case is not trivial
    assert not rollout.ended.all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("temperature", [1.0, .7])
def test_the_kl_of_the_first_update_is_exactly_0(dtype, temperature):
    rollout = rollout_of(nets_of(), options(temperature=temperature), dtype=dtype)
    assert torch.equal(rollout.logprobs, rollout.ref_logprobs)
    assert rollout_metrics(rollout)["kl"] == 0


def row_of(rollout: Rollout, b: int) -> tuple[torch.Tensor, int]:
    """(the ids (1, T) of a row without its padding, where its reply starts)."""
    ids = rollout.tokens[b, rollout.mask[b]][None]
    return ids, ids.shape[1] - int(rollout.response_mask[b].sum())


@pytest.mark.parametrize("b", range(8))
def test_a_row_of_a_rollout_equals_that_row_computed_alone(b):
    nets, o = nets_of(), options()
    rollout = rollout_of(nets, o)
    ids, start = row_of(rollout, b)
    n, critic = ids.shape[1] - start, nets.actor_critic.critic
    logits = nets.actor_critic.policy(ids)[0, start - 1:-1]
    logps = logits.log_softmax(-1)
    values = critic.head_values(critic.backbone.hidden(ids))[0, start - 1:-1]  # before each token
    reply = torch.arange(ids.shape[1])[None] >= start
    score, = nets.reward_model(ids, torch.ones_like(reply), reply)
    assert torch.allclose(rollout.logprobs[b, :n], logprobs_of(logits, ids[0, start:]), atol=1e-5)
    assert torch.allclose(rollout.entropy[b, :n], -(logps.exp() * logps).sum(1), atol=1e-4)
    assert torch.allclose(rollout.values[b, :n], values, atol=1e-5)
    assert torch.allclose(rollout.raw_scores[b], score, atol=1e-5)
    assert bool(rollout.ended[b]) == (int(ids[0, -1]) == END)
    assert ids[0, :start].tolist() == prompts()[b]


def test_padding_is_0_in_every_array():
    rollout = rollout_of(nets_of(), options())
    for name in ("sampled_logprobs", "logprobs", "ref_logprobs", "entropy", "values", "rewards",
                 "advantages", "returns"):
        assert (getattr(rollout, name)[~rollout.response_mask] == 0).all(), name


def test_prompt_and_reply_lie_side_by_side():
    o = options()
    rollout = rollout_of(nets_of(), o)
    P = rollout.tokens.shape[1] - o.reply_len
    assert P == max(map(len, prompts()))
    assert torch.equal(rollout.mask[:, P:], rollout.response_mask)
    assert torch.equal(rollout.generation.tokens, rollout.tokens[:, P:])


def moved_policy(nets):
    """A policy that has left its reference."""
    with torch.no_grad():
        for parameter in nets.actor_critic.policy.parameters():
            parameter.add_(.1 * noise(*parameter.shape, seed=1))
    return nets


def test_the_reference_is_scored_as_it_is():
    nets = moved_policy(nets_of())
    rollout = rollout_of(nets, options())
    for b in range(8):
        ids, start = row_of(rollout, b)
        expected = logprobs_of(nets.reference(ids)[0, start - 1:-1], ids[0, start:])
        n = len(expected)
        assert torch.allclose(rollout.ref_logprobs[b, :n], expected, atol=1e-5)
    assert rollout_metrics(rollout)["kl"] > .1


@pytest.mark.parametrize("kl_in,price", [("reward", .1), ("loss", 0.0)])
def test_kl_is_priced_once(kl_in, price):
    rollout = rollout_of(moved_policy(nets_of()), options(kl_in=kl_in), kl_coef=.1)
    arrays = (rollout.scores, rollout.logprobs, rollout.ref_logprobs, rollout.response_mask)
    assert torch.equal(rollout.rewards, token_rewards(*arrays, price))
    assert (token_rewards(*arrays, .1) - token_rewards(*arrays, 0.0)).abs().max() > .01
    assert rollout.kl_coef == .1


def test_the_objective_is_the_sum_of_rewards():
    rollout = rollout_of(moved_policy(nets_of()), options(), kl_coef=.1)
    objective = rollout_metrics(rollout)["objective"]
    assert objective == pytest.approx(float(rollout.rewards.sum(1).mean()), abs=1e-5)


def test_the_value_bias_is_how_much_the_critic_promises_too_much():
    nets = nets_of(critic="shared")
    torch.nn.init.constant_(nets.actor_critic.value_head.bias, 2.0)
    rollout = rollout_of(nets, options(lam=1.0, gamma=1.0), kl_coef=0.0)
    mask = rollout.response_mask
    expected = 2 - float((rollout.scores[:, None] * mask).sum() / mask.sum())
    assert rollout_metrics(rollout)["value_bias"] == pytest.approx(expected, abs=1e-4)


def test_the_critic_does_not_see_the_token_whose_value_it_gives():
    actor_critic = nets_of().actor_critic
    tokens = torch.arange(6, 14)[None]
    other = tokens.clone()
    other[0, 5] = 30
    ones, reply = torch.ones(1, 8).bool(), torch.arange(8)[None] >= 3
    a, b = (actor_critic(make_rows(x, ones, reply), 1.0).values for x in (tokens, other))
    assert torch.equal(a[:3], b[:3])  # the third value is the one before token 5
    assert not torch.equal(a[3:], b[3:])


@pytest.mark.parametrize("critic", ["separate", "shared"])
def test_values_do_not_depend_on_the_temperature(critic):
    actor_critic = nets_of(critic=critic).actor_critic
    if critic == "shared":
        torch.nn.init.ones_(actor_critic.value_head.weight)
    cold, warm = (actor_critic(reply_rows(), temperature) for temperature in (.5, 1.0))
    assert torch.equal(cold.values, warm.values)
    assert not torch.allclose(cold.logprobs, warm.logprobs)


def test_the_critic_starts_on_the_scale_it_is_given_and_without_dropout():
    nets = nets_of()
    critic = critic_from(nets.reward_model, mean=1.5, std=.25)
    tokens, ones = torch.arange(21).view(3, 7), torch.ones(3, 7).bool()
    expected = (nets.reward_model(tokens, ones) - 1.5) / .25
    assert torch.allclose(critic(tokens, ones), expected, atol=1e-5)
    nets.actor_critic.train()
    assert torch.equal(*(nets.actor_critic(reply_rows(), 1.0).values for _ in range(2)))


# ---- groups --------------------------------------------------------------------------------------

def test_without_groups_every_reply_has_a_prompt_of_its_own():
    assert rollout_of(nets_of(), options()).group.tolist() == list(range(8))


def test_a_group_answers_one_prompt_in_ways_of_its_own():
    rollout = rollout_of(nets_of(), options(samples_per_prompt=4))
    assert rollout.group.tolist() == [0] * 4 + [1] * 4
    for b, group in enumerate(rollout.group.tolist()):
        ids, start = row_of(rollout, b)
        assert ids[0, :start].tolist() == prompts()[group]
    assert len({tuple(row.tolist()) for row in rollout.generation.tokens[:4]}) > 1


def test_groups_are_nothing_but_prompts_asked_several_times():
    nets, o = nets_of(), options(samples_per_prompt=4)
    grouped = rollout_of(nets, o)
    repeated = [ids for ids in prompts(2) for _ in range(4)]
    single = collect_rollout(Networks(nets.actor_critic, nets.reference, END), repeated,
                             options(), step=0, scorer=nets.reward_model, scale=ScoreScale(),
                             kl_coef=.1)
    for name in ("tokens", "logprobs", "raw_scores", "rewards", "advantages", "returns"):
        assert torch.equal(getattr(grouped, name), getattr(single, name)), name


@pytest.mark.parametrize("name", ["samples_per_prompt", "minibatches"])
def test_a_batch_that_does_not_divide_is_refused(name):
    with pytest.raises(UserError, match=f"--batch 8 does not divide into --{name} 3"):
        options(**{name: 3}).check()


# ---- scorer and estimator ------------------------------------------------------------------------

class Recorder:
    """A scorer that keeps what it is asked."""

    def scores(self, prompts, replies):
        self.prompts, self.replies = prompts, replies
        return torch.arange(float(len(replies)))


@pytest.mark.parametrize("samples", [1, 4])
def test_the_scorer_reads_the_very_ids_that_were_sampled(samples):
    scorer = Recorder()
    rollout = rollout_of(nets_of(), options(samples_per_prompt=samples), scorer=scorer)
    for b in range(8):
        ids, start = row_of(rollout, b)
        assert scorer.prompts[b] + scorer.replies[b] == ids[0].tolist()
        assert len(scorer.prompts[b]) == start


def test_its_scores_are_paid_on_the_given_scale():
    o, scale = options(reward_norm="fixed"), ScoreScale(mean=2.0, std=4.0)
    rollout = rollout_of(nets_of(), o, scorer=Recorder(), scale=scale)
    assert rollout.raw_scores.tolist() == list(range(8))
    assert torch.equal(rollout.scores, scale.paid(rollout.raw_scores, rollout.ended, o))


def test_the_estimators_advantages_and_returns_are_those_of_the_rollout():
    def estimator(scored, o):
        return scored.values + o.gamma, scored.rewards - scored.values

    rollout = rollout_of(nets_of(), options(gamma=.5, whiten=False), estimator=estimator)
    assert torch.equal(rollout.advantages, rollout.values + .5)
    assert torch.equal(rollout.returns, rollout.rewards - rollout.values)
    white = rollout_of(nets_of(), options(gamma=.5), estimator=estimator)
    assert torch.equal(white.advantages, whiten(rollout.advantages, rollout.response_mask))


def test_discounts_reach_the_advantages():
    rollout = rollout_of(nets_of(), options(gamma=.9, lam=.5, whiten=False))
    advantages, returns = gae(rollout.rewards, rollout.values, rollout.response_mask, .9, .5)
    assert torch.equal(rollout.advantages, advantages)
    assert torch.equal(rollout.returns, returns)


def test_advantages_are_whitened_but_returns_are_not():
    plain, white = (rollout_of(nets_of(), options(whiten=whiten)) for whiten in (False, True))
    mask = plain.response_mask
    expected = torch.where(mask, plain.advantages + plain.values, 0)
    assert torch.equal(plain.returns, white.returns)
    assert torch.allclose(plain.returns, expected, atol=1e-6)
    assert abs(float(masked_mean(white.advantages, mask))) < 1e-6
    assert float(masked_mean(white.advantages ** 2, mask)) == pytest.approx(1, abs=1e-4)
    mean = masked_mean(plain.advantages, mask)
    unwhitened = torch.where(mask, white.spread * white.advantages + mean, 0)
    assert torch.allclose(unwhitened, plain.advantages, atol=1e-5)
    assert plain.spread == 1


# ---- draws ---------------------------------------------------------------------------------------

def test_rollouts_follow_from_seed_and_step_alone():
    nets, o = nets_of(), options()
    first = rollout_of(nets, o, step=3)
    torch.rand(7)
    again = rollout_of(nets, o, step=3)
    assert torch.equal(first.tokens, again.tokens)
    assert torch.equal(first.advantages, again.advantages)
    for other in (rollout_of(nets, o, step=4), rollout_of(nets, options(seed=1), step=3)):
        assert not torch.equal(first.tokens, other.tokens)


@pytest.mark.parametrize("change", [{"rollout_rows": 1}, {"micro_batch": 8}])
def test_replies_do_not_depend_on_how_many_are_written_or_scored_at_a_time(change):
    a, b = rollout_of(nets_of(), options()), rollout_of(nets_of(), options(**change))
    assert torch.equal(a.tokens, b.tokens)
    assert torch.allclose(a.advantages, b.advantages, atol=1e-3)


def test_a_rollout_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        rollout_of(nets_of(), options()).scores = torch.zeros(8)


# ---- metrics -------------------------------------------------------------------------------------

def test_metrics_are_means_over_real_tokens():
    mask = bools([[1, 1, 1, 0], [1, 0, 0, 0]])
    names = ("sampled_logprobs", "logprobs", "ref_logprobs", "entropy", "values", "rewards",
             "advantages", "returns")
    x = {name: noise(2, 4, seed=i).masked_fill(~mask, math.nan) for i, name in enumerate(names)}
    rollout = Rollout(tokens=torch.zeros(2, 5), mask=torch.cat((bools([[1], [1]]), mask), 1),
                      response_mask=mask, ended=bools([1, 0]), group=torch.arange(2),
                      raw_scores=torch.tensor([3.0, 1.0]), scores=torch.tensor([.5, .1]),
                      kl_coef=.07, spread=1.0, seconds={}, **x)
    real = {name: array[mask].double().numpy() for name, array in x.items()}
    kl, returns = real["logprobs"] - real["ref_logprobs"], real["returns"]
    assert rollout_metrics(rollout) == pytest.approx({
        "score": .3, "raw_score": 2, "kl": kl.sum() / 2,
        "kl_k3": (np.expm1(-kl) + kl).sum() / 2, "objective": .3 - .07 * kl.sum() / 2, "kl_per_token": kl.mean(),
        "entropy": real["entropy"].mean(), "length": 2, "end_rate": .5, "kl_coef": .07,
        "reply_tokens": 4, "ref_perplexity": np.exp(-real["ref_logprobs"].mean()),
        "sampler_gap": np.abs(real["sampled_logprobs"] - real["logprobs"]).mean(),
        "sampler_gap_max": np.abs(real["sampled_logprobs"] - real["logprobs"]).max(),
        "value_bias": (real["values"] - returns).mean(),
        "explained_variance": 1 - (returns - real["values"]).var() / returns.var()}, rel=1e-5)


# ---- rows, precision, memory ---------------------------------------------------------------------

def test_rows_lose_their_padding_and_find_their_columns_again():
    tokens = torch.tensor([[0, 0, 1, 2, 3, 0], [4, 5, 6, 7, 8, 9]])
    mask = bools([[0, 0, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]])
    reply = bools([[0, 0, 0, 1, 1, 0], [0, 0, 0, 1, 1, 1]])
    rows = make_rows(tokens, mask, reply)
    assert rows.tokens[0, :3].tolist() == [1, 2, 3]
    assert rows.real.sum(1).tolist() == [3, 6]
    assert rows.targets.tolist() == [2, 3, 7, 8, 9]
    assert rows.tokens.flatten()[rows.before].tolist() == [1, 2, 6, 7, 8]  # the token before each
    assert scatter_tokens(rows.targets, reply[:, 3:]).tolist() == [[2, 3, 0], [7, 8, 9]]


@pytest.mark.parametrize("critic", ["separate", "shared"])
def test_what_is_computed_from_a_bfloat16_trunk_is_float32(critic):
    nets = nets_of(critic=critic)
    rollout = rollout_of(nets, options())
    if critic == "shared":
        torch.nn.init.normal_(nets.actor_critic.value_head.weight)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        prediction = nets.actor_critic(rollout.rows(torch.arange(8)), 1.0)
    for x in prediction:
        assert x.dtype == torch.float32
        assert not torch.equal(x, x.bfloat16().float())  # nor was it rounded on the way


def test_logits_and_values_are_float32_under_autocast():
    nets, rows = nets_of(), reply_rows()
    policy, critic = nets.actor_critic.policy, nets.actor_critic.critic
    with precision("bfloat16", "cpu"):
        prediction = nets.actor_critic(rows, 1.0)
        hidden, critic_hidden = (trunk.hidden(rows.tokens).flatten(0, 1)[rows.before].float()
                                 for trunk in (policy, critic.backbone))
    expected = logprobs_of(hidden @ policy.embedding.weight.T, rows.targets)
    head = critic.score_head
    assert torch.allclose(prediction.logprobs, expected, atol=1e-5)
    values = (critic_hidden @ head.weight.T + head.bias)[:, 0]
    assert torch.allclose(prediction.values, values, atol=1e-5)


class Sizes(TorchDispatchMode):
    """The largest tensor, in numbers, that is made while this is on."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple) else (out,):
            if isinstance(x, torch.Tensor):
                self.largest = max(self.largest, x.numel())
        return out


@pytest.mark.parametrize("train_entropy", [False, True])
def test_a_large_vocabularys_logits_are_never_there_at_once(monkeypatch, train_entropy):
    model, n = Transformer(ModelConfig(**SHAPE)), 21
    hidden, targets = noise(n, 16), torch.arange(n)

    def score() -> tuple[list[torch.Tensor], int]:
        x = hidden.clone().requires_grad_()
        with Sizes() as sizes:
            logprobs, entropy = token_logprobs(model, x, targets, 0.7, train_entropy)
            loss = (logprobs * logprobs).sum() + (entropy.sum() if train_entropy else 0)
            grads = torch.autograd.grad(loss, [x, model.output_weight])
        return [logprobs, entropy, *grads], sizes.largest

    at_once, largest = score()
    assert largest == n * 40  # the watch sees what it is for
    monkeypatch.setitem(machine.NUMBERS_AT_ONCE, "cpu", 5 * 40)  # 4 pieces of 5, and a last one
    in_pieces, largest = score()
    assert largest <= 40 * 16  # the weight and its gradient; a piece's logits are fewer
    for a, b in zip(at_once, in_pieces, strict=True):
        assert torch.allclose(a, b, atol=1e-5)
