"""An update: what moves, what stays, what is logged, and that PPO learns."""
import copy
import dataclasses
import math

import numpy as np
import pytest
import torch

from model import ModelConfig, Transformer
from ppo import ActorCritic, PPOOptions, ppo_loss, update
from reward import RewardConfig, RewardModel, critic_from
from runtime import device
from runtime.options import UserError, parse
from sample import Decoder
from tests.conftest import equal
from tests.ppo_world import SHAPE, Nets, nets_of, optimizer_of, options, rollout_of

POLICY_METRICS = {"policy_loss", "clip_frac", "approx_kl", "abs_log_ratio"}


def updated(o: PPOOptions, critic: str = "separate", optimizer=None, **settings):
    """(the networks after one update, what it logs)."""
    nets = nets_of(critic=critic)
    optimizer = (optimizer or optimizer_of)(nets.actor_critic)
    rollout = rollout_of(nets, o)
    return nets, update(nets.actor_critic, optimizer, rollout, o, 0, **settings)


def descent(lr: float):
    return lambda actor_critic: torch.optim.SGD(actor_critic.parameters(), lr=lr)


def weights(module: torch.nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])


def shifted(rollout, by):
    """The rollout as if the policy had given its tokens other log-probabilities."""
    logprobs = torch.where(rollout.response_mask, rollout.logprobs - by, 0)
    return dataclasses.replace(rollout, logprobs=logprobs)


# ---- the ratio -----------------------------------------------------------------------------------

@pytest.mark.parametrize("temperature", [1.0, .7])
def test_the_first_ratio_is_one(temperature):
    _, metrics = updated(options(temperature=temperature, epochs=1, minibatches=1))
    assert metrics["ratio_start"] < 1e-6
    assert metrics["clip_frac"] == 0
    assert metrics["approx_kl"] < 1e-9


def test_scoring_at_another_temperature_than_sampling_is_seen():
    nets = nets_of()
    rollout = rollout_of(nets, options(temperature=1.0))
    metrics = update(nets.actor_critic, optimizer_of(nets.actor_critic), rollout,
                     options(temperature=.5), 1)
    assert metrics["ratio_start"] > 1e-2


def test_clips_can_act_under_every_preset():
    for preset in ("smoke", "demo", "base"):
        o = parse(PPOOptions, [f"--preset={preset}"], "x")
        assert o.epochs * o.minibatches > 1  # with one step a rollout the ratio is always 1


# ---- what an optimizer step reads ----------------------------------------------------------------

@pytest.mark.parametrize("change", [
    {"clip_range": .001}, {"value_clip": .0}, {"value_clip": .001}, {"value_coef": .5},
    {"entropy_coef": .1}, {"max_grad_norm": .01}, {"epochs": 1}, {"minibatches": 4},
    {"temperature": .9}, {"seed": 1}, {"step": 1}])
def test_every_option_of_the_update_has_an_effect(change):
    ends, o = [], options(value_clip=.01, max_grad_norm=10.0)
    for changes in ({}, change):
        nets = nets_of(critic="shared")
        rollout = rollout_of(nets, o)
        settings = {name: value for name, value in changes.items() if name != "step"}
        update(nets.actor_critic, descent(.5)(nets.actor_critic), rollout,
               dataclasses.replace(o, **settings), changes.get("step", 0))
        ends.append(weights(nets.actor_critic))
    assert not torch.allclose(*ends, atol=1e-7)


@pytest.mark.parametrize("critic", ["separate", "shared"])
@pytest.mark.parametrize("size", [3, 1])
def test_micro_batches_change_nothing(critic, size):
    ends = [weights(updated(options(micro_batch=rows, entropy_coef=.01), critic,
                            descent(.5))[0].actor_critic) for rows in (8, size)]
    assert torch.allclose(*ends, atol=2e-5)


def test_each_epoch_has_its_own_minibatches_of_every_row(monkeypatch):
    minibatches, nets, o = [], nets_of(), options(epochs=3, minibatches=2)
    rollout = rollout_of(nets, o)
    by_length = type(rollout).by_length
    monkeypatch.setattr(type(rollout), "by_length",
                        lambda self, index, size: minibatches.append(tuple(sorted(index.tolist())))
                        or by_length(self, index, size))
    update(nets.actor_critic, optimizer_of(nets.actor_critic), rollout, o, 0)
    assert len(minibatches) == 6
    assert len(set(minibatches)) > 2
    for epoch in range(3):
        assert sorted(sum(minibatches[2 * epoch:2 * epoch + 2], ())) == list(range(8))


def test_a_shared_trunk_also_learns_from_values():
    nets = nets_of(critic="shared")
    torch.nn.init.ones_(nets.actor_critic.value_head.weight)
    rollout, before = rollout_of(nets, options()), weights(nets.actor_critic.policy)
    still = dataclasses.replace(rollout, advantages=torch.zeros_like(rollout.advantages))
    update(nets.actor_critic, descent(.5)(nets.actor_critic), still, options(), 0)
    assert not torch.equal(weights(nets.actor_critic.policy), before)


def test_a_separate_critic_leaves_the_policy_alone():
    nets, o = nets_of(), options()
    rollout, before = rollout_of(nets, o), weights(nets.actor_critic.policy)
    still = dataclasses.replace(rollout, advantages=torch.zeros_like(rollout.advantages))
    update(nets.actor_critic, descent(.5)(nets.actor_critic), still, o, 0)
    assert torch.equal(weights(nets.actor_critic.policy), before)


def test_policy_and_critic_are_clipped_to_the_norm_each():
    limit, o = 1e-3, options(epochs=1, minibatches=1, max_grad_norm=1e-3)
    nets, metrics = updated(o, optimizer=descent(0.0))
    for name in ("policy", "critic"):
        module = getattr(nets.actor_critic, name)
        norm = torch.cat([p.grad.flatten() for p in module.parameters()
                          if p.grad is not None]).norm()
        assert metrics[f"{name}_grad_norm"] > limit, name  # logged as it was before clipping
        assert float(norm) == pytest.approx(limit, rel=1e-2), name


def test_a_largest_gradient_norm_of_0_limits_nothing():
    unlimited, huge = (weights(updated(options(max_grad_norm=norm))[0].actor_critic)
                       for norm in (0.0, 1e9))
    assert torch.equal(unlimited, huge)
    assert not torch.equal(unlimited, weights(nets_of().actor_critic))


# ---- critic warm-up ------------------------------------------------------------------------------

@pytest.mark.parametrize("critic", ["separate", "shared"])
def test_critic_warm_up_leaves_the_policy_alone(critic):
    start = nets_of(critic=critic).actor_critic
    nets, _ = updated(options(), critic, train_policy=False)
    assert equal(nets.actor_critic.policy.state_dict(), start.policy.state_dict())
    assert not torch.equal(weights(nets.actor_critic.value_module), weights(start.value_module))


def test_critic_warm_up_logs_nothing_of_the_policy():
    _, metrics = updated(options(), train_policy=False)
    assert not metrics.keys() & {*POLICY_METRICS, "ratio_start", "policy_grad_norm"}
    assert metrics.keys() >= {"value_loss", "value_clip_frac", "critic_grad_norm"}
    assert metrics["skipped_minibatches"] == 0


# ---- --max_approx_kl -----------------------------------------------------------------------------

def test_too_large_a_kl_skips_the_step_and_adams_momentum():
    nets, o = nets_of(), options(max_approx_kl=1e-12, minibatches=1, epochs=3)
    optimizer = optimizer_of(nets.actor_critic)
    metrics = update(nets.actor_critic, optimizer, rollout_of(nets, o), o, 0)
    policy, critic = ({int(optimizer.state[p]["step"]) for p in module.parameters()
                       if p in optimizer.state}
                      for module in (nets.actor_critic.policy, nets.actor_critic.critic))
    assert metrics["skipped_minibatches"] == 2  # the first has ratio 1; its step is too large
    assert policy == {1}
    assert critic == {3}


def test_the_policy_stays_where_the_first_step_took_it():
    o = options(max_approx_kl=1e-12, minibatches=1, epochs=3)
    skipped, once = (updated(dataclasses.replace(o, epochs=epochs))[0] for epochs in (3, 1))
    assert torch.equal(weights(skipped.actor_critic.policy), weights(once.actor_critic.policy))


def test_metrics_of_the_policy_leave_out_the_minibatches_it_skipped():
    o = options(max_approx_kl=1e-12, minibatches=1, epochs=3)
    (_, skipped), (_, once) = (updated(dataclasses.replace(o, epochs=epochs)) for epochs in (3, 1))
    assert {name: skipped[name] for name in POLICY_METRICS} \
        == pytest.approx({name: once[name] for name in POLICY_METRICS})
    assert skipped["trained_tokens"] == 3 * once["trained_tokens"]


def test_a_first_ratio_that_is_not_one_is_told_even_where_it_ends_the_policys_part():
    nets, o = nets_of(), options(temperature=.5, max_approx_kl=1e-3)
    rollout = rollout_of(nets, options())
    metrics = update(nets.actor_critic, optimizer_of(nets.actor_critic), rollout, o, 1)
    assert metrics["skipped_minibatches"] == o.epochs * o.minibatches
    assert metrics["ratio_start"] > 1e-2


def test_a_limit_that_is_not_reached_changes_nothing():
    limited, unlimited = (weights(updated(options(max_approx_kl=limit))[0].actor_critic)
                          for limit in (1e9, 0.0))
    assert torch.equal(limited, unlimited)


# ---- numbers that are not finite -----------------------------------------------------------------

@pytest.mark.parametrize("shift,advantage", [
    (0.0, math.nan),
    (100.0, 1.0),  # a finite loss, but its gradient is 0 · ∞ behind the maximum
], ids=["loss", "gradient"])
def test_what_is_not_finite_stops_before_any_step(shift, advantage):
    nets, o = nets_of(), options()
    rollout, before = shifted(rollout_of(nets, o), shift), weights(nets.actor_critic)
    rollout.advantages[rollout.response_mask] = advantage
    with pytest.raises(UserError, match="update 5, epoch 1: not finite"):
        update(nets.actor_critic, optimizer_of(nets.actor_critic), rollout, o, 4)
    assert torch.equal(weights(nets.actor_critic), before)


# ---- metrics -------------------------------------------------------------------------------------

@pytest.mark.parametrize("critic", ["separate", "shared"])
@pytest.mark.parametrize("size", [3, 1])
def test_the_metrics_of_an_update_do_not_depend_on_micro_batches(critic, size):
    logged = []
    for rows in (8, size):
        nets, o = nets_of(critic=critic), options(micro_batch=rows, epochs=1, minibatches=1,
                                                  entropy_coef=.01)
        rollout = shifted(rollout_of(nets, o), .3)  # so that nothing is just 0
        logged.append(update(nets.actor_critic, descent(.1)(nets.actor_critic), rollout, o, 0))
    for metrics in logged:
        metrics.pop("seconds_train")
    assert logged[0] == pytest.approx(logged[1], rel=1e-3, abs=1e-6)
    assert logged[0]["approx_kl"] > 0
    assert logged[0]["ratio_start"] == pytest.approx(.3, abs=1e-3)


@pytest.mark.parametrize("name", ["policy_loss", "value_loss", "approx_kl", "clip_frac",
                                  "value_clip_frac"])
def test_the_metrics_of_an_update_are_means_over_all_its_tokens(name):
    nets, o = nets_of(), options(epochs=1, minibatches=4)
    rollout = shifted(rollout_of(nets, o), .1 * torch.arange(8.)[:, None])
    still = descent(0.0)(nets.actor_critic)
    four, one = (update(nets.actor_critic, still, rollout, options(epochs=1, minibatches=n), 0)
                 for n in (4, 1))
    assert four[name] == pytest.approx(one[name], rel=1e-4, abs=1e-7)
    assert one["approx_kl"] > .01  # the case is not trivial


def test_trained_tokens_are_the_reply_tokens_of_all_epochs():
    nets, o = nets_of(), options(epochs=3)
    rollout = rollout_of(nets, o)
    metrics = update(nets.actor_critic, optimizer_of(nets.actor_critic), rollout, o, 0)
    assert metrics["trained_tokens"] == 3 * int(rollout.response_mask.sum())


# ---- a loss of one's own -------------------------------------------------------------------------

def test_a_loss_is_given_parts_that_share_the_steps_token_count():
    batches, nets, o = [], nets_of(), options(epochs=1, minibatches=1)
    rollout = rollout_of(nets, o)

    def loss(batch, new, o):
        batches.append(batch)
        return ppo_loss(batch, new, o)

    update(nets.actor_critic, optimizer_of(nets.actor_critic), rollout, o, 0, loss=loss)
    assert [len(batch.mask) for batch in batches] == [3, 3, 2]
    assert {int(batch.n_tokens) for batch in batches} == {int(rollout.response_mask.sum())}
    assert sum(int(batch.mask.sum()) for batch in batches) == int(rollout.response_mask.sum())


@pytest.mark.parametrize("changes,train_policy,expected", [
    ({}, True, [True] * 4), ({}, False, [False] * 4),
    ({"max_approx_kl": 1e-12, "minibatches": 1}, True, [True, False])])
def test_a_loss_is_told_whether_the_policy_learns(changes, train_policy, expected):
    told, gradients = [], []

    def loss(batch, new, o):
        told.append(batch.train_policy)
        gradients.append(new.logprobs.requires_grad)
        return ppo_loss(batch, new, o)

    updated(options(micro_batch=8, **changes), loss=loss, train_policy=train_policy)
    assert told == expected
    assert gradients == expected


def policy_gradient(batch, new, o):
    """A loss without values, for estimators that need no critic."""
    loss = batch.mean(-batch.advantages * new.logprobs)
    return loss, {"policy_loss": (loss, batch.policy_tokens)}


def test_a_loss_without_values_rests_while_the_critic_would_learn_alone():
    start = weights(nets_of().actor_critic)
    nets, metrics = updated(options(), train_policy=False, loss=policy_gradient)
    assert torch.equal(weights(nets.actor_critic), start)
    assert metrics["critic_grad_norm"] == 0


def test_a_loss_without_values_rests_where_the_policy_has_moved_too_far():
    o = options(max_approx_kl=1e-12, minibatches=1, epochs=3)
    skipped, once = (updated(dataclasses.replace(o, epochs=epochs), loss=policy_gradient)
                     for epochs in (3, 1))
    assert skipped[1]["skipped_minibatches"] == 2
    assert torch.equal(weights(skipped[0].actor_critic), weights(once[0].actor_critic))


def test_a_loss_that_reaches_no_network_is_an_error():
    def detached(batch, new, o):
        loss = batch.mean(-batch.advantages * new.logprobs.detach())
        return loss, {"policy_loss": (loss, batch.policy_tokens)}

    with pytest.raises(RuntimeError, match="does not require grad"):
        updated(options(), loss=detached)


def test_the_entropy_has_a_gradient_only_if_it_has_a_weight():
    gradients = []

    def loss(batch, new, o):
        gradients.append(new.entropy.requires_grad)
        return ppo_loss(batch, new, o)

    for coef in (0.0, .1):
        updated(options(entropy_coef=coef, epochs=1, minibatches=1, micro_batch=8), loss=loss)
    assert gradients == [False, True]


# ---- precision and compiling ---------------------------------------------------------------------

def test_bfloat16_leaves_weights_scores_and_ratio_in_float32():
    nets, o = nets_of(), options()
    optimizer = optimizer_of(nets.actor_critic)
    rollout = rollout_of(nets, o, dtype="bfloat16")
    assert not torch.equal(rollout.logprobs, rollout_of(nets_of(), o).logprobs)  # it was bfloat16
    metrics = update(nets.actor_critic, optimizer, rollout, o, 0)
    arrays = [x for x in vars(rollout).values() if isinstance(x, torch.Tensor)]
    moments = [x for state in optimizer.state.values() for x in state.values()]
    assert metrics["ratio_start"] < 2e-2
    assert {x.dtype for x in arrays if x.is_floating_point()} == {torch.float32}
    assert {x.dtype for x in nets.actor_critic.parameters()} == {torch.float32}
    assert {x.dtype for x in moments} == {torch.float32}


@pytest.mark.skipif(bool(device.compiler_fault()), reason=device.compiler_fault())
def test_a_compiled_update_equals_the_eager_one_but_for_rounding():
    o, results = options(epochs=1, minibatches=1), []
    for compiled in (False, True):
        nets = nets_of()
        actor_critic = nets.actor_critic
        if compiled:
            device.compile_trunks(actor_critic.policy, actor_critic.critic.backbone,
                                  nets.reference, nets.reward_model.backbone)
        rollout = rollout_of(nets, o, decoder=Decoder(actor_critic.policy, compile=compiled))
        metrics = update(actor_critic, optimizer_of(actor_critic), rollout, o, 0)
        results.append((rollout, metrics, weights(actor_critic)))
    (eager, eager_metrics, eager_weights), (rollout, metrics, compiled_weights) = results
    assert torch.equal(rollout.tokens, eager.tokens)
    assert torch.equal(rollout.logprobs, rollout.ref_logprobs)
    assert metrics["ratio_start"] < 1e-5
    for name in ("logprobs", "values", "rewards", "advantages", "returns", "sampled_logprobs"):
        assert torch.allclose(getattr(rollout, name), getattr(eager, name), atol=1e-3), name
    assert metrics["policy_loss"] == pytest.approx(eager_metrics["policy_loss"], abs=1e-3)
    assert torch.allclose(compiled_weights, eager_weights, atol=2e-2)


# ---- learning ------------------------------------------------------------------------------------

def bandit(seed: int, critic: str) -> Nets:
    """A known best arm: the score is the share of token 9 in the reply."""
    policy = Transformer(ModelConfig(**SHAPE))
    policy.initialise(seed)
    reward_model = RewardModel(RewardConfig(**SHAPE, pool="mean")).requires_grad_(False)
    reward_model.backbone.embedding.weight.zero_()
    reward_model.backbone.embedding.weight[9, 0] = 1
    for block in reward_model.backbone.blocks:
        block.attention.out.weight.zero_()
        block.mlp.down.weight.zero_()
    reward_model.score_head.weight.zero_()
    reward_model.score_head.weight[0, 0] = 1
    actor_critic = ActorCritic(policy, critic_from(reward_model) if critic == "separate" else None)
    return Nets(actor_critic, copy.deepcopy(policy), reward_model)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("critic,reward_norm", [("separate", "sigmoid"), ("shared", "fixed")])
def test_ppo_learns_a_reward_it_can_reach(seed, critic, reward_norm):
    nets, shares = bandit(seed, critic), []
    o = options(reward_norm=reward_norm, batch=16, reply_len=6, end_penalty=0.0, seed=seed)
    optimizer = optimizer_of(nets.actor_critic, 6e-3)
    for step in range(25):
        rollout = rollout_of(nets, o, step)
        update(nets.actor_critic, optimizer, rollout, o, step)
        written = rollout.generation.tokens[rollout.response_mask]
        shares.append(float((written == 9).float().mean()))
    assert np.mean(shares[-3:]) > 4 * np.mean(shares[:3])
