"""A rollout: every array equals a row computed alone, and what is scored is what was sampled."""
import math

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from data.batches import make_rows, scatter_tokens
from model import ModelConfig, Transformer, log_softmax, token_logprobs
from ppo import Rollout, gae, masked_mean, rollout_metrics, token_rewards
from reward import critic_from
from runtime import machine
from runtime.device import precision
from tests.ppo_world import END, SHAPE, bools, nets_of, options, prompts, rollout_of


@pytest.mark.parametrize("temperature", [1.0, .7])
def test_what_is_scored_is_what_was_sampled(temperature):
    rollout = rollout_of(nets_of(), options(temperature=temperature))
    metrics = rollout_metrics(rollout)
    assert metrics["sampler_gap"] < 1e-4
    # the first update's, exactly
    assert metrics["kl"] == 0 and torch.equal(rollout.logprobs, rollout.ref_logprobs)
    assert rollout.ended.any() and not rollout.ended.all()  # the case is not trivial


def test_rollout_arrays_equal_a_row_computed_alone():
    nets, o = nets_of(), options()
    actor_critic, reference, reward_model = nets
    rollout = rollout_of(nets, o)
    P = rollout.tokens.shape[1] - o.reply_len
    for b in range(8):
        ids = rollout.tokens[b, rollout.mask[b]][None]
        n = int(rollout.response_mask[b].sum())
        start = ids.shape[1] - n
        logps = log_softmax(actor_critic.policy(ids)[0, start - 1:-1])
        assert torch.allclose(rollout.logprobs[b, :n], logps.gather(1, ids[0, start:, None])[:, 0],
                              atol=1e-5)
        assert torch.allclose(rollout.entropy[b, :n], -(logps.exp() * logps).sum(1), atol=1e-4)
        critic = actor_critic.critic
        # each before its token
        values = critic.head_values(critic.backbone.hidden(ids))[0, start - 1:-1]
        assert torch.allclose(rollout.values[b, :n], values, atol=1e-5)
        reply = torch.arange(ids.shape[1])[None] >= start
        assert torch.allclose(rollout.raw_scores[b], reward_model(ids, torch.ones_like(reply),
                                                                  reply)[0], atol=1e-5)
        assert bool(rollout.ended[b]) == (int(ids[0, -1]) == END)
        assert ids[0, :start].tolist() == prompts()[b]
    for name in ("logprobs", "ref_logprobs", "values", "rewards", "advantages", "returns"):
        assert (getattr(rollout, name)[~rollout.response_mask] == 0).all()
    assert rollout.tokens.shape[1] == P + o.reply_len


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_kl_is_measured_against_the_reference_and_priced(estimator):
    nets, o = nets_of(), options(kl_estimator=estimator)
    with torch.no_grad():  # a policy that has left its reference
        for p in nets[0].policy.parameters():
            p.add_(.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    rollout = rollout_of(nets, o)
    mask = rollout.response_mask
    for b in range(8):
        ids, n = rollout.tokens[b, rollout.mask[b]], int(mask[b].sum())
        logps = log_softmax(nets[1](ids[None])[0, -n - 1:-1])
        assert torch.allclose(rollout.ref_logprobs[b, :n], logps.gather(1, ids[-n:, None])[:, 0],
                              atol=1e-5)
    expected = token_rewards(rollout.scores, rollout.logprobs, rollout.ref_logprobs, mask, .1,
                             estimator)
    assert torch.equal(rollout.rewards, expected)
    free = token_rewards(rollout.scores, rollout.logprobs, rollout.ref_logprobs, mask, 0.0)
    assert (rollout.rewards - free).abs().max() > .01  # the price is felt
    assert rollout_metrics(rollout)["kl"] > .1


def test_metrics_are_means_over_real_tokens():
    mask = bools([[1, 1, 1, 0], [1, 0, 0, 0]])
    x = {name: torch.randn(2, 4, generator=torch.Generator().manual_seed(i)).masked_fill(~mask,
                                                                                         math.nan)
         for i, name in enumerate(("sampled_logprobs", "logprobs", "ref_logprobs", "entropy",
                                   "values", "rewards", "advantages", "returns"))}
    rollout = Rollout(tokens=torch.zeros(2, 5), mask=torch.cat((bools([[1], [1]]), mask), 1),
                      response_mask=mask, ended=bools([1, 0]), group=torch.arange(2),
                      raw_scores=torch.tensor([3.0, 1.0]), scores=torch.tensor([.5, .1]),
                      kl_coef=.07, seconds={}, **x)
    found, real = rollout_metrics(rollout), {k: v[mask].double().numpy() for k, v in x.items()}
    kl, returns = real["logprobs"] - real["ref_logprobs"], real["returns"]
    expected = {"score": .3, "raw_score": 2, "kl": kl.sum() / 2, "kl_per_token": kl.mean(),
                "entropy": real["entropy"].mean(), "length": 2, "end_rate": .5, "kl_coef": .07,
                "reply_tokens": 4,
                "ref_perplexity": np.exp(-real["ref_logprobs"].mean()),
                "sampler_gap": np.abs(real["sampled_logprobs"] - real["logprobs"]).mean(),
                "explained_variance": 1 - (returns - real["values"]).var() / returns.var()}
    assert found == pytest.approx(expected, rel=1e-5)


def test_discounts_reach_the_advantages():
    rollout = rollout_of(nets_of(), options(gamma=.9, lam=.5, whiten=False))
    expected = gae(rollout.rewards, rollout.values, rollout.response_mask, .9, .5)
    assert torch.equal(rollout.advantages, expected[0]) and torch.equal(rollout.returns,
                                                                        expected[1])


@pytest.mark.parametrize("critic", ["separate", "shared"])
def test_what_is_computed_from_a_bfloat16_trunk_is_float32(critic):
    nets = nets_of(critic=critic)
    rollout = rollout_of(nets, options())
    if critic == "shared":
        torch.nn.init.normal_(nets[0].value_head.weight)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for x in nets[0](rollout.rows(torch.arange(8)), 1.0):
            assert x.dtype == torch.float32 and not torch.equal(x, x.bfloat16().float())


def test_the_critic_does_not_see_the_token_whose_value_it_gives():
    actor_critic = nets_of()[0]
    tokens = torch.randint(6, 40, (1, 8), generator=torch.Generator().manual_seed(0))
    flags = bools([[0, 0, 0, 1, 1, 1, 1, 1]])
    other = tokens.clone()
    other[0, 5] = (other[0, 5] + 1) % 40
    a, b = (actor_critic(make_rows(t, torch.ones_like(flags), flags), 1.0)[2]
            for t in (tokens, other))
    # the third value is the one before token 5
    assert torch.equal(a[:3], b[:3]) and not torch.equal(a[3:], b[3:])


def test_advantages_are_whitened_but_returns_are_not():
    nets = nets_of()
    plain, white = (rollout_of(nets, options(whiten=w)) for w in (False, True))
    assert torch.equal(plain.returns, white.returns)
    mask = plain.response_mask
    assert torch.allclose(plain.returns, torch.where(mask, plain.advantages + plain.values, 0),
                          atol=1e-6)
    assert abs(float(masked_mean(white.advantages, mask))) < 1e-6
    assert float(masked_mean(white.advantages**2, mask)) == pytest.approx(1, abs=1e-4)


def test_the_critic_starts_on_the_scale_of_normalised_scores_and_without_dropout():
    actor_critic, _, reward_model = nets_of()
    critic = critic_from(reward_model, mean=1.5, std=.25)
    tokens = torch.randint(0, 40, (3, 7), generator=torch.Generator().manual_seed(0))
    ones = torch.ones(3, 7, dtype=torch.bool)
    assert torch.allclose(critic(tokens, ones), (reward_model(tokens, ones) - 1.5) / .25, atol=1e-5)
    actor_critic.train()
    rows = make_rows(tokens, ones, ones & (torch.arange(7) > 2))
    assert torch.equal(actor_critic(rows, 1.0)[2], actor_critic(rows, 1.0)[2])


def test_rollouts_follow_from_seed_and_step_alone():
    nets, o = nets_of(), options()
    a, _ = rollout_of(nets, o, step=3), torch.rand(7)
    b, c = rollout_of(nets, o, step=3), rollout_of(nets, o, step=4)
    assert torch.equal(a.tokens, b.tokens) and torch.equal(a.advantages, b.advantages)
    assert not torch.equal(a.tokens, c.tokens)


def test_rows_lose_their_padding_and_find_their_columns_again():
    tokens, mask = torch.tensor([[0, 0, 1, 2, 3, 0], [4, 5, 6, 7, 8, 9]]), bools([[0, 0, 1, 1, 1,
                                                                                   0],
                                                                                  [1, 1, 1, 1, 1,
                                                                                   1]])
    reply = bools([[0, 0, 0, 1, 1, 0], [0, 0, 0, 1, 1, 1]])
    rows = make_rows(tokens, mask, reply)
    assert rows.tokens[0, :3].tolist() == [1, 2, 3] and rows.real.sum(1).tolist() == [3, 6]
    assert rows.targets.tolist() == [2, 3, 7, 8, 9]
    assert rows.tokens.flatten()[rows.before].tolist() == [1, 2, 6, 7, 8]  # the token before each
    assert scatter_tokens(rows.targets, reply[:, 3:]).tolist() == [[2, 3, 0], [7, 8, 9]]


def test_logits_and_values_are_float32_under_autocast():
    nets = nets_of()
    rows = make_rows(torch.arange(6, 14)[None], torch.ones(1, 8).bool(), torch.arange(8)[None] > 2)
    with precision("bfloat16", "cpu"):
        logprobs, _, values = nets[0](rows, 1.0)
        hidden = nets[0].policy.hidden(rows.tokens).flatten(0, 1)[rows.before].float()
        critic = nets[0].critic.backbone.hidden(rows.tokens).flatten(0, 1)[rows.before].float()
    expected = log_softmax(hidden @ nets[0].policy.embedding.weight.T).gather(1, rows.targets[:,
                                                                                           None])[:,
                                                                                                  0]
    head = nets[0].critic.score_head
    assert torch.allclose(logprobs, expected, atol=1e-5)
    assert torch.allclose(values, (critic @ head.weight.T + head.bias)[:, 0], atol=1e-5)


@pytest.mark.parametrize("train_entropy", [False, True])
def test_a_large_vocabularys_logits_are_never_there_at_once(monkeypatch, train_entropy):
    model, n = Transformer(ModelConfig(**SHAPE)), 21
    hidden, targets = torch.randn(n, 16), torch.randint(40, (n,))
    sizes = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            sizes.extend(x.numel() for x in (out if isinstance(out, tuple) else (out,))
                         if isinstance(x, torch.Tensor))
            return out

    def scored():
        x = hidden.clone().requires_grad_()
        sizes.clear()
        with Watch():
            logprobs, entropy = token_logprobs(model, x, targets, 0.7, train_entropy)
            loss = (logprobs * logprobs).sum() + (entropy.sum() if train_entropy else 0)
            found = torch.autograd.grad(loss, [x, model.output_weight])
        return [logprobs, entropy, *found], max(sizes)

    whole, largest = scored()
    assert largest == n * 40  # the watch sees what it is for
    monkeypatch.setitem(machine.NUMBERS_AT_ONCE, "cpu", 5 * 40)  # 4 pieces of 5, and a last one
    in_parts, largest = scored()
    assert largest <= 40 * 16  # the weight and its gradient; a piece's logits are fewer
    for a, b in zip(whole, in_parts, strict=True):
        assert torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("critic", ["separate", "shared"])
def test_values_do_not_depend_on_the_temperature(critic):
    actor_critic = nets_of(critic=critic)[0]
    if critic == "shared":
        torch.nn.init.ones_(actor_critic.value_head.weight)
    rows = make_rows(torch.arange(6, 14)[None], torch.ones(1, 8).bool(), torch.arange(8)[None] > 2)
    cold, warm = (actor_critic(rows, t) for t in (.5, 1.0))
    assert torch.equal(cold[2], warm[2]) and not torch.allclose(cold[0], warm[0])
