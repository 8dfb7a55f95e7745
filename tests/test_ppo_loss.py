"""ppo_loss: its formula, its clips, its gradient, and its parts that add up."""
import math

import pytest
import torch

from ppo import gae, masked_mean, ppo_loss, token_rewards
from tests.ppo_world import arrays, bools, loss_of


# ---- formula and gradient ------------------------------------------------------------------------

def test_the_loss_by_its_formula():
    x, mask = arrays(seed=2)
    loss, _ = loss_of(x, mask, clip_range=.2, value_clip=.3, value_coef=.7, entropy_coef=.4)
    r = {name: array[mask].double() for name, array in x.items()}
    ratio, A, G = (r["logprobs"] - r["old_logprobs"]).exp(), r["advantages"], r["returns"]
    clipped = r["old_values"] + (r["values"] - r["old_values"]).clamp(-.3, .3)
    policy = torch.maximum(-A * ratio, -A * ratio.clamp(.8, 1.2)).mean()
    value = .5 * torch.maximum((r["values"] - G) ** 2, (clipped - G) ** 2).mean()
    expected = policy + .7 * value - .4 * r["entropy"].mean()
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    k2 = torch.where(mask, x["logprobs"] - x["ref_logprobs"], 0).double().sum(1) ** 2 / 2
    in_loss, _ = loss_of(x, mask, clip_range=.2, value_clip=.3, value_coef=.7, entropy_coef=.4,
                         kl_in="loss")
    price = .3 / 1.5  # advantages were divided by 1.5 when they were whitened
    assert float(in_loss - loss) == pytest.approx(float(price * k2.sum() / mask.sum()), rel=1e-4)


def test_the_gradient_of_the_loss_is_the_policy_gradient():
    x, mask = arrays(seed=4)
    x["logprobs"] = x["old_logprobs"].clone().double().requires_grad_()
    loss_of(x, mask, value_coef=0)[0].backward()
    expected = torch.where(mask, -x["advantages"].double() / mask.sum(), 0)
    assert torch.allclose(x["logprobs"].grad, expected, atol=1e-9)


def test_the_loss_of_a_minibatch_is_the_sum_of_its_micro_batches():
    x, mask = arrays()
    loss, metrics = loss_of(x, mask, entropy_coef=.3)
    parts = [loss_of({name: array[i] for name, array in x.items()}, mask[i], n_tokens=mask.sum(),
                     entropy_coef=.3) for i in (slice(0, 2), slice(2, 6))]
    assert torch.allclose(loss, parts[0][0] + parts[1][0], atol=1e-6)
    for name, value in metrics.items():
        assert torch.allclose(value, parts[0][1][name] + parts[1][1][name], atol=1e-6), name


# ---- the clips -----------------------------------------------------------------------------------

@pytest.mark.parametrize("ratio,advantage,loss,moves", [
    (5, -2, 6, False),  # −A · ratio would be 10: at most −A · 3
    (2.5, -2, 5, True), (5, 2, -2.4, False), (.5, -2, 1.6, False), (.5, 2, -1, True)])
def test_dual_clip_by_hand(ratio, advantage, loss, moves):
    value, _, gradient, _ = one(math.log(ratio), advantage, value_coef=0, dual_clip=3.0)
    assert float(value) == pytest.approx(loss, rel=1e-5)
    assert bool(gradient) == moves


def one(logprob, advantage, value=0., old_value=0., ret=0., **changes):
    """(loss, metrics, the log-probability's gradient, the value's) of a single token whose old
    log-probability is 0."""
    def leaf(number):
        return torch.tensor([[float(number)]], requires_grad=True)

    x = {"logprobs": leaf(logprob), "values": leaf(value), "old_logprobs": torch.zeros(1, 1),
         "ref_logprobs": torch.zeros(1, 1), "advantages": torch.tensor([[float(advantage)]]),
         "old_values": torch.tensor([[float(old_value)]]),
         "returns": torch.tensor([[float(ret)]]), "entropy": torch.zeros(1, 1)}
    loss, metrics = loss_of(x, bools([[1]]), **changes)
    loss.backward()
    return (float(loss), {name: float(value) for name, value in metrics.items()},
            float(x["logprobs"].grad), float(x["values"].grad))


@pytest.mark.parametrize("ratio,advantage,expected,flows", [
    (1.5, 1, -1.2, False), (1.5, -1, 1.5, True), (.5, 1, -.5, True), (.5, -1, .8, False),
    (1.1, 1, -1.1, True)])
def test_the_clip_stops_the_gradient_only_where_it_went_too_far(ratio, advantage, expected, flows):
    loss, metrics, grad, _ = one(math.log(ratio), advantage, value_coef=0)
    assert loss == pytest.approx(expected, abs=1e-6)
    assert (abs(grad) > 1e-6) == flows
    assert metrics["clip_frac"] == float(not flows)
    assert metrics["approx_kl"] == pytest.approx(ratio - 1 - math.log(ratio), abs=1e-6)


@pytest.mark.parametrize("value,ret,clip,expected,flows", [
    (1., 1., .2, .5 * .8 ** 2, False),  # right already, but further from the rollout's than allowed
    (1., 0., .2, .5 * 1 ** 2, True),  # it left the return: it may come back
    (1., 1., 0., 0., False),  # without a clip
    (.1, 1., .2, .5 * .9 ** 2, True)])
def test_the_value_clip_takes_the_larger_error(value, ret, clip, expected, flows):
    loss, _, _, grad = one(0, 0, value=value, ret=ret, value_coef=1, value_clip=clip)
    assert loss == pytest.approx(expected, abs=1e-6)
    assert (abs(grad) > 1e-6) == flows


def test_clip_fractions_count_where_a_clip_was_active():
    clean, mask = arrays()
    _, metrics = loss_of(clean, mask, clip_range=.2, value_clip=.3)
    x = {name: array[mask].double() for name, array in clean.items()}
    ratio = (x["logprobs"] - x["old_logprobs"]).exp()
    too_far = torch.where(x["advantages"] > 0, ratio > 1.2, ratio < .8)
    clipped = x["old_values"] + (x["values"] - x["old_values"]).clamp(-.3, .3)
    further = (clipped - x["returns"]) ** 2 > (x["values"] - x["returns"]) ** 2
    assert float(metrics["clip_frac"]) == pytest.approx(float(too_far.double().mean()))
    assert float(metrics["value_clip_frac"]) == pytest.approx(float(further.double().mean()))
    for active in (too_far, further):
        assert 0 < active.sum() < len(active)  # the case is not trivial


# ---- padding -------------------------------------------------------------------------------------

def test_a_loss_reads_0_where_the_rollout_has_padding():
    x, mask = arrays()
    dirty = {name: torch.where(mask, array, math.nan) for name, array in x.items()}
    read = []
    loss_of(dirty, mask, loss=lambda batch, new, o: read.append(batch) or ppo_loss(batch, new, o))
    for name in ("old_logprobs", "ref_logprobs", "old_values", "advantages", "returns"):
        assert (getattr(read[0], name)[~mask] == 0).all(), name


def everything(x, mask):
    """All that is computed from these arrays on the way to a gradient."""
    x = {name: array.clone().requires_grad_() for name, array in x.items()}
    loss, metrics = loss_of(x, mask)
    loss.backward()
    rewards = token_rewards(torch.ones(len(mask)), x["logprobs"], x["old_logprobs"], mask, .1)
    advantages, returns = gae(rewards, x["values"].detach(), mask)
    return {"loss": loss.detach(), **metrics, "logprobs.grad": x["logprobs"].grad,
            "values.grad": x["values"].grad, "rewards": rewards, "advantages": advantages,
            "returns": returns, "entropy": masked_mean(x["entropy"].detach(), mask)}


@pytest.mark.parametrize("poison", [123.0, math.nan, math.inf])
def test_what_stands_under_a_false_mask_changes_nothing(poison):
    clean, mask = arrays()
    dirty = {name: torch.where(mask, array, poison) for name, array in clean.items()}
    expected, results = everything(clean, mask), everything(dirty, mask)
    for name, value in results.items():
        assert torch.equal(value, expected[name]), name
        assert torch.isfinite(value).all(), name
    for name in ("logprobs.grad", "values.grad", "rewards", "advantages", "returns"):
        assert (results[name][~mask] == 0).all(), name
