"""An update: what moves, what stays, what is logged, and that PPO learns."""
import copy
import dataclasses
import math

import numpy as np
import pytest
import torch

from model import ModelConfig, Transformer
from ppo import ActorCritic, PPOOptions, update
from reward import RewardConfig, RewardModel, critic_from
from runtime import device
from runtime.options import UserError, parse
from sample import Decoder
from tests.ppo_world import SHAPE, Nets, nets_of, optimizer_of, options, rollout_of


@pytest.mark.skipif(bool(device.compiler_fault()), reason=device.compiler_fault())
def test_a_compiled_update_equals_the_eager_one_but_for_rounding():
    found, o = [], options(epochs=1, minibatches=1)
    for compiled in (False, True):
        nets = nets_of()
        if compiled:
            device.compile_trunks(nets[0].policy, nets[0].critic.backbone, nets[1],
                                  nets[2].backbone)
        rollout = rollout_of(nets, o, decoder=Decoder(nets[0].policy, compile=compiled))
        learned = update(nets[0], optimizer_of(nets[0]), rollout, o, 0)
        found.append((rollout, learned, list(nets[0].parameters())))
    (a, x, p), (b, y, q) = found
    assert torch.equal(a.tokens, b.tokens) and torch.equal(b.logprobs,
                                                           b.ref_logprobs) and y["ratio_start"] < 1e-5
    for name in ("logprobs", "values", "rewards", "advantages", "returns", "sampled_logprobs"):
        assert torch.allclose(getattr(a, name), getattr(b, name), atol=1e-3), name
    assert y["policy_loss"] == pytest.approx(x["policy_loss"], abs=1e-3)
    assert all(torch.allclose(u, v, atol=2e-2) for u, v in zip(p, q, strict=True))


@pytest.mark.parametrize("temperature", [1.0, .7])
def test_the_first_ratio_is_one(temperature):
    nets, o = nets_of(), options(temperature=temperature, epochs=1, minibatches=1)
    found = update(nets[0], optimizer_of(nets[0]), rollout_of(nets, o), o, 0)
    assert found["ratio_start"] < 1e-6 and found["clip_frac"] == 0 and found["approx_kl"] < 1e-9
    again = update(nets[0], optimizer_of(nets[0]), rollout_of(nets, options(temperature=1.0)),
                   options(temperature=.5), 1)
    assert again["ratio_start"] > 1e-2  # scoring at another temperature is seen


@pytest.mark.parametrize("change", [
    {"clip_range": .001}, {"value_clip": .0}, {"value_clip": .001}, {"value_coef": .5},
    {"entropy_coef": .1},
    {"max_grad_norm": .01}, {"epochs": 1}, {"minibatches": 4}, {"temperature": .9}, {"seed": 1},
    {"step": 1}])
def test_every_option_of_the_update_has_an_effect(change):
    ends = []
    for changed in ({}, change):
        nets, o = nets_of(critic="shared"), options(epochs=2, minibatches=2, value_clip=.01,
                                                    max_grad_norm=10.0)
        rollout = rollout_of(nets, o)
        settings = {k: v for k, v in changed.items() if k != "step"}
        update(nets[0], torch.optim.SGD(nets[0].parameters(), lr=.5), rollout,
               dataclasses.replace(o, **settings), changed.get("step", 0))
        ends.append(torch.cat([p.detach().flatten() for p in nets[0].parameters()]))
    assert not torch.allclose(*ends, atol=1e-7)


@pytest.mark.parametrize("critic", ["separate", "shared"])
def test_micro_batches_change_nothing(critic):
    ends = []
    for size in (8, 3, 1):
        nets, o = nets_of(critic=critic), options(micro_batch=size, entropy_coef=.01)
        with torch.random.fork_rng():
            update(nets[0], torch.optim.SGD(nets[0].parameters(), lr=.5), rollout_of(nets, o), o, 0)
        ends.append(torch.cat([p.detach().flatten() for p in nets[0].parameters()]))
    assert torch.allclose(ends[0], ends[1], atol=2e-5) and torch.allclose(ends[0], ends[2],
                                                                          atol=2e-5)


@pytest.mark.parametrize("critic", ["separate", "shared"])
def test_critic_warm_up_leaves_the_policy_alone(critic):
    nets, o = nets_of(critic=critic), options()
    before = copy.deepcopy(nets[0].policy.state_dict())
    values = [p.detach().clone() for p in nets[0].value_module.parameters()]
    found = update(nets[0], optimizer_of(nets[0]), rollout_of(nets, o), o, 0, train_policy=False)
    assert all(torch.equal(v, nets[0].policy.state_dict()[k]) for k, v in before.items())
    assert any(not torch.equal(a, b) for a, b in zip(values, nets[0].value_module.parameters(),
                                                     strict=True))
    assert "ratio_start" not in found and "policy_grad_norm" not in found and found["skipped_minibatches"] == 0


def test_too_large_a_kl_skips_the_step_and_adams_momentum():
    nets, o = nets_of(), options(max_approx_kl=1e-12, minibatches=1, epochs=3)
    optimizer = optimizer_of(nets[0])
    found = update(nets[0], optimizer, rollout_of(nets, o), o, 0)
    # the first has ratio 1; after its step the rest are too far
    assert found["skipped_minibatches"] == 2
    steps = {int(optimizer.state[p]["step"]) for p in nets[0].policy.parameters()}
    assert steps == {1} and {int(optimizer.state[p]["step"])
                             for p in nets[0].value_module.parameters()
                             if p in optimizer.state} == {3}


def test_a_first_ratio_that_is_not_one_is_told_even_where_it_ends_the_policys_part():
    nets, o = nets_of(), options(temperature=.5, max_approx_kl=1e-3)
    found = update(nets[0], optimizer_of(nets[0]), rollout_of(nets, options()), o, 1)
    assert found["skipped_minibatches"] == o.epochs * o.minibatches and found["ratio_start"] > 1e-2


def test_a_largest_gradient_norm_of_0_limits_nothing():
    moved = []
    for norm in (0.0, 1e9):
        nets, o = nets_of(), options(max_grad_norm=norm)
        update(nets[0], optimizer_of(nets[0]), rollout_of(nets, o), o, 0)
        moved.append(nets[0].state_dict())
    assert all(torch.equal(moved[0][name], moved[1][name]) for name in moved[0])
    assert not torch.equal(moved[0]["policy.embedding.weight"],
                           nets_of()[0].policy.embedding.weight)


def test_a_loss_that_is_not_finite_stops_before_any_step():
    nets, o = nets_of(), options()
    rollout = rollout_of(nets, o)
    before = [p.detach().clone() for p in nets[0].parameters()]
    rollout.advantages[rollout.response_mask] = math.nan
    with pytest.raises(UserError, match="not finite at update 5"):
        update(nets[0], optimizer_of(nets[0]), rollout, o, 4)
    rollout = rollout_of(nets, o)  # a finite loss whose gradient is not: 0 · ∞ behind the maximum
    rollout.logprobs[rollout.response_mask] -= 100
    rollout.advantages[rollout.response_mask] = 1.0
    with pytest.raises(UserError, match="not finite at update 5"):
        update(nets[0], optimizer_of(nets[0]), rollout, o, 4)
    assert all(torch.equal(a, b) for a, b in zip(before, nets[0].parameters(), strict=True))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("critic,reward_norm", [("separate", "sigmoid"), ("shared", "fixed")])
def test_ppo_learns_a_reward_it_can_reach(seed, critic, reward_norm):
    """A bandit with a known best arm: the score is the share of one token. Its probability rises,
    whatever the seed."""
    policy, reward_model = Transformer(ModelConfig(**SHAPE)), RewardModel(RewardConfig(**SHAPE,
                                                                                       pool="mean"))
    policy.initialise(seed)
    with torch.no_grad():  # a reward model that reads token 9 and nothing else
        reward_model.backbone.embedding.weight.zero_()
        reward_model.backbone.embedding.weight[9, 0] = 1
        for block in reward_model.backbone.blocks:
            block.attention.out.weight.zero_()
            block.mlp.down.weight.zero_()
        reward_model.score_head.weight.zero_()
        reward_model.score_head.weight[0, 0] = 1
    nets = Nets(ActorCritic(policy, critic_from(reward_model) if critic == "separate" else None),
                copy.deepcopy(policy),
            reward_model.requires_grad_(False))
    o = options(reward_norm=reward_norm, batch=16, reply_len=6, epochs=2, end_penalty=0.0,
                seed=seed)
    optimizer, shares = optimizer_of(nets[0], 6e-3), []
    for step in range(25):
        rollout = rollout_of(nets, o, step)
        update(nets[0], optimizer, rollout, o, step)
        shares.append(float((rollout.tokens[:, -6:][rollout.response_mask] == 9).float().mean()))
    assert np.mean(shares[-3:]) > 4 * np.mean(shares[:3])


def test_bfloat16_leaves_weights_scores_and_ratio_in_float32():
    nets, o = nets_of(), options()
    optimizer = optimizer_of(nets[0])
    rollout = rollout_of(nets, o, dtype="bfloat16")
    plain = rollout_of(nets_of(), o)
    assert not torch.equal(rollout.logprobs, plain.logprobs)  # it was bfloat16
    floats = [v for v in vars(rollout).values() if isinstance(v, torch.Tensor)
              and v.is_floating_point()]
    assert {x.dtype for x in floats} == {torch.float32} and torch.equal(rollout.logprobs,
                                                                        rollout.ref_logprobs)
    found = update(nets[0], optimizer, rollout, o, 0, dtype="bfloat16")
    assert found["ratio_start"] < 2e-2
    assert {p.dtype for p in nets[0].parameters()} == {torch.float32}
    assert {v.dtype for s in optimizer.state.values() for v in s.values()} == {torch.float32}


@pytest.mark.parametrize("critic", ["separate", "shared"])
def test_the_metrics_of_an_update_do_not_depend_on_micro_batches(critic):
    found = []
    for size in (8, 3, 1):
        nets, o = nets_of(critic=critic), options(micro_batch=size, epochs=1, minibatches=1,
                                                  entropy_coef=.01)
        rollout = rollout_of(nets, o)
        # so that nothing is just 0
        shifted = torch.where(rollout.response_mask, rollout.logprobs - .3, 0)
        rollout = dataclasses.replace(rollout, logprobs=shifted)
        found.append(update(nets[0], torch.optim.SGD(nets[0].parameters(), lr=.1), rollout, o, 0))
    keys = ("policy_loss", "value_loss", "approx_kl", "clip_frac", "value_clip_frac", "ratio_start",
            "policy_grad_norm", "critic_grad_norm", "trained_tokens")
    for other in found[1:]:
        assert {k: other[k] for k in keys} == pytest.approx({k: found[0][k] for k in keys},
                                                            rel=1e-3, abs=1e-6)
    assert found[0]["approx_kl"] > 0 and found[0]["ratio_start"] == pytest.approx(.3, abs=1e-3)


def test_the_metrics_of_an_update_are_means_over_all_its_tokens():
    nets, o = nets_of(), options(epochs=1, minibatches=4)
    rollout = rollout_of(nets, o)
    shifted = torch.where(rollout.response_mask, rollout.logprobs - .1 * torch.arange(8.)[:, None],
                          0)
    rollout = dataclasses.replace(rollout, logprobs=shifted)
    still = torch.optim.SGD(nets[0].parameters(), lr=0.0)
    parts = update(nets[0], still, rollout, o, 0)
    whole = update(nets[0], still, rollout, options(epochs=1, minibatches=1), 0)
    for name in ("policy_loss", "value_loss", "approx_kl", "clip_frac", "value_clip_frac"):
        assert parts[name] == pytest.approx(whole[name], rel=1e-4, abs=1e-7), name
    assert whole["approx_kl"] > .01


def test_each_epoch_has_its_own_minibatches(monkeypatch):
    seen, nets, o = [], nets_of(), options(epochs=3, minibatches=2)
    rollout, real = rollout_of(nets, o), type(rollout_of(nets, o)).by_length
    monkeypatch.setattr(type(rollout), "by_length",
                        lambda self, i, n: seen.append(tuple(sorted(i.tolist())))
                        or real(self, i, n))
    update(nets[0], optimizer_of(nets[0]), rollout, o, 0)
    assert len(seen) == 6 and len(set(seen)) > 2
    # every row once an epoch
    assert all(sorted(seen[k] + seen[k + 1]) == list(range(8)) for k in (0, 2, 4))


def test_clips_can_act_under_every_preset():
    for preset in ("smoke", "demo", "base"):
        o = parse(PPOOptions, [f"--preset={preset}"], "x")
        assert o.epochs * o.minibatches > 1  # with one step a rollout the ratio is always 1
