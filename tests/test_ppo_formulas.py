"""The formulas of PPO: values published elsewhere or derived by hand, and no pad counts."""
import math
import types

import numpy as np
import pytest
import torch

from ppo import KLController, ScoreScale, gae, group_estimator, kl_estimate, token_rewards, whiten
from runtime.options import UserError
from runtime.statistics import RunningMoments, masked_mean
from tests.conftest import noise
from tests.ppo_world import bools, options


# ---- means and moments ---------------------------------------------------------------------------

def test_a_masked_mean_is_over_tokens_and_not_over_rows():
    x = torch.tensor([[1., 2, 0], [3, 4, 5], [7, 0, 0]])
    mask = bools([[1, 1, 0], [1, 1, 1], [1, 0, 0]])
    assert float(masked_mean(x, mask)) == pytest.approx(22 / 6)
    row_means = [float(masked_mean(row, real)) for row, real in zip(x, mask, strict=True)]
    assert row_means == [1.5, 4, 7]


def test_the_mean_of_nothing_is_0():
    assert float(masked_mean(torch.ones(2, 3), torch.zeros(2, 3).bool())) == 0


@pytest.mark.parametrize("poison", [99.0, math.nan, math.inf])
def test_whitening_is_over_the_mask_and_divides_by_the_count(poison):
    x, mask = torch.tensor([[1., 2, poison], [6, poison, poison]]), bools([[1, 1, 0], [1, 0, 0]])
    real = np.array([1, 2, 6])
    expected = torch.tensor((real - real.mean()) / real.std()).float()
    assert torch.allclose(whiten(x, mask)[mask], expected, atol=1e-5)
    assert (whiten(x, mask)[~mask] == 0).all()


def test_running_moments_equal_those_of_everything_at_once():
    x, moments = noise(100) * 3 + 2, RunningMoments(count=0., mean=0., var=0.)
    for part in x.split([7, 50, 43]):
        moments.update(part)
    assert moments.mean == pytest.approx(float(x.mean()), abs=1e-5)
    assert moments.std == pytest.approx(float(x.std(correction=0)), abs=1e-5)


def test_running_moments_start_with_spread_1():
    assert RunningMoments().std == 1


# ---- KL ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("d,k1,k2,k3", [(.5, .5, .125, .106531), (-1, -1, .5, .718282)])
def test_kl_estimators_at_known_values(d, k1, k2, k3):
    estimates = [float(kl_estimate(torch.tensor([d]), torch.tensor([0.0]), kind))
                 for kind in ("k1", "k2", "k3")]
    assert estimates == pytest.approx([k1, k2, k3], abs=1e-6)


@pytest.mark.parametrize("kind", ["k1", "k3"])
def test_k1_and_k3_are_unbiased(kind):
    p, q = noise(2, 6).log_softmax(-1)
    exact = (p.exp() * (p - q)).sum()
    assert torch.allclose((p.exp() * kl_estimate(p, q, kind)).sum(), exact, atol=1e-6)


@pytest.mark.parametrize("kind", ["k2", "k3"])
def test_k2_and_k3_are_never_negative(kind):
    assert (kl_estimate(noise(500), noise(500, seed=1), kind) >= 0).all()


def test_an_unknown_estimator_is_refused():
    with pytest.raises(UserError, match="'k4': use k1, k2 or k3"):
        kl_estimate(torch.zeros(1), torch.zeros(1), "k4")


@pytest.mark.parametrize("kl,factor", [(9, 1 + .2 * 256 / 1e4), (0, 1 - .2 * 256 / 1e4),
                                       (6.6, 1 + .1 * 256 / 1e4), (6, 1)])
def test_adaptive_kl_is_proportional_to_the_error_and_clipped_on_both_sides(kl, factor):
    control = KLController(.2, target=6, horizon=1e4)
    control.update(kl, 256)
    assert control.coef == pytest.approx(.2 * factor, abs=1e-9)
    assert control.price == pytest.approx(control.coef * math.exp(min(max(kl / 6 - 1, -1), 1)))


def test_steered_kl_comes_to_its_target_and_stays():
    """A policy that moves at a bounded speed: one update shifts it towards the optimum of its price."""
    def steered(control: KLController, speed: float) -> list[float]:
        shift, seen = 0.0, []
        for _ in range(40):
            seen.append(shift * shift / 2)  # KL of a normal score shifted by that many spreads
            control.update(seen[-1], 144)
            shift += speed * math.tanh(2 * (1 - control.price * shift))
        return seen

    for start, speed in ((.3, .4), (.5, .3), (.4, .25)):
        seen = steered(KLController(start, target=5), speed)
        assert max(seen) < 1.25 * 5
        assert all(abs(kl / 5 - 1) < .1 for kl in seen[-8:])
    slow = KLController(.3, target=5, horizon=144)
    slow.GAIN = 0.0  # Ziegler's rule alone, as fast as it would have to be
    assert max(steered(slow, .4)) > 2 * 5


def test_a_fixed_price_of_kl_stays():
    control = KLController(.2)
    control.update(9, 256)
    assert control.coef == control.price == .2


# ---- advantages without a critic -------------------------------------------------------------------

@pytest.mark.parametrize("advantage,expected", [
    # the rewards of two groups' replies, summed: 1, 2, 6 and 0, 0, 3
    ("rloo", [1 - 4, 2 - 3.5, 6 - 1.5, -1.5, -1.5, 3]),
    ("grpo", [-2 / math.sqrt(14 / 3), -1 / math.sqrt(14 / 3), 3 / math.sqrt(14 / 3),
              -1 / math.sqrt(2), -1 / math.sqrt(2), 2 / math.sqrt(2)]),
    ("reinforce", [-1, 0, 4, -2, -2, 1])])
def test_group_advantages_by_hand(advantage, expected):
    mask = bools([[1, 1, 0], [1, 1, 1], [1, 0, 0], [1, 0, 0], [1, 1, 0], [1, 1, 1]])
    rewards = torch.tensor([[-1., 2, 0], [0, 1, 1], [6, 0, 0], [0, 0, 0], [-2, 2, 0], [1, 1, 1]])
    scored = types.SimpleNamespace(rewards=rewards, response_mask=mask)
    o = options(batch=6, samples_per_prompt=3, minibatches=2, advantage=advantage)
    advantages, returns = group_estimator(scored, o)
    assert torch.allclose(advantages, torch.tensor(expected).float()[:, None] * mask, atol=1e-3)
    assert torch.equal(returns, torch.tensor([1., 2, 6, 0, 0, 3])[:, None] * mask)


def test_equal_replies_of_a_group_have_no_advantage():
    scored = types.SimpleNamespace(rewards=torch.ones(4, 2), response_mask=torch.ones(4, 2).bool())
    for advantage in ("rloo", "grpo", "reinforce"):
        o = options(batch=4, samples_per_prompt=2, advantage=advantage)
        assert not group_estimator(scored, o)[0].any()


# ---- scores and rewards --------------------------------------------------------------------------

def test_the_score_stands_on_the_last_real_token():
    mask = bools([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]])
    logprobs, ref = torch.zeros(3, 4), torch.full((3, 4), -.5)
    rewards = token_rewards(torch.tensor([2., 3, 4]), logprobs, ref, mask, kl_coef=.2)
    expected = torch.tensor([[-.1, -.1, 1.9, 0], [2.9, 0, 0, 0], [-.1, -.1, -.1, 3.9]])
    assert torch.allclose(rewards, expected)


def test_rewards_leave_the_logged_arrays_as_they_were():
    logprobs, ref = torch.zeros(1, 2), torch.full((1, 2), -.5)
    token_rewards(torch.ones(1), logprobs, ref, bools([[1, 0]]), kl_coef=.2)
    assert (logprobs == 0).all()
    assert (ref == -.5).all()


def test_an_empty_reply_receives_nothing():
    zeros = torch.zeros(2, 3)
    rewards = token_rewards(torch.ones(2), zeros, zeros, bools([[0, 0, 0], [1, 0, 0]]), .1)
    assert rewards.tolist() == [[0, 0, 0], [1, 0, 0]]


def test_rewards_carry_no_gradient():
    logprobs = torch.zeros(1, 2, requires_grad=True)
    rewards = token_rewards(logprobs[:, 0], logprobs, -logprobs, bools([[1, 1]]), .1)
    assert not rewards.requires_grad


RAW, ENDED = torch.tensor([0., 4, 100]), bools([1, 0, 0])


@pytest.mark.parametrize("norm,clip,penalty,expected", [
    ("fixed", 5.0, 1.0, [-1, 1 - 1, 5 - 1]),  # (raw − 2) / 2, at most 5, and only then less 1
    ("sigmoid", 10.0, .5, [0, 2 / (1 + math.exp(-4)) - 1 - .5, 1 - .5]),
    ("logsigmoid", 10.0, .5, [-math.log(2), -math.log1p(math.exp(-4)) - .5, -.5]),
    ("fixed", 5.0, 0.0, [-1, 1, 5]), ("fixed", 0.0, 1.0, [-1, 1 - 1, 49 - 1])])  # clip 0: none
def test_scores_are_normalised_then_clipped_then_penalised(norm, clip, penalty, expected):
    scale = ScoreScale(mean=2, std=2)
    o = options(reward_norm=norm, reward_clip=clip, end_penalty=penalty)
    assert scale.paid(RAW, ENDED, o).tolist() == pytest.approx(expected)
    assert scale.moments.count == 1  # only `running` follows the scores


def test_running_scores_are_divided_by_a_spread_that_counts_them():
    scale, everyone = ScoreScale(mean=2, std=2), bools([1, 1, 1])
    scores = scale.paid(RAW, everyone, options(reward_norm="running", reward_clip=50))
    assert scale.moments.count == 4
    assert torch.allclose(scores, torch.tensor([-1, 1, 49]) / scale.moments.std)


def test_the_scale_of_scores_is_their_mean_and_spread():
    raw = noise(600) * 3 + 1
    scale = ScoreScale.of(raw)
    assert scale.mean == pytest.approx(float(raw.mean()), abs=1e-6)
    assert scale.std == pytest.approx(float(raw.std(correction=0)), abs=1e-6)


def test_the_scale_survives_a_checkpoint():
    scale = ScoreScale.of(noise(600))
    scale.moments.update(noise(7))
    assert ScoreScale(**scale.state()).state() == scale.state()


@pytest.mark.parametrize("value", [3.0, math.nan, math.inf])
def test_scores_that_are_all_the_same_are_an_error(value):
    with pytest.raises(UserError, match="same score .* over 600 replies"):
        ScoreScale.of(torch.full((600,), value))


# ---- advantages ----------------------------------------------------------------------------------

@pytest.mark.parametrize("rewards,gamma,lam,expected", [
    ([-.1, .2, 1], 1, .95, [.52675, .765, .7]), ([0, 0, 1], 1, 1, [.5, .6, .7]),
    ([0, 0, 1], .9, 0, [-.14, -.13, .7])])
def test_gae_at_known_values(rewards, gamma, lam, expected):
    values, ones = torch.tensor([[.5, .4, .3]]), bools([[1, 1, 1]])
    advantages, returns = gae(torch.tensor([rewards]).float(), values, ones, gamma, lam)
    assert torch.allclose(advantages, torch.tensor([expected]), atol=1e-6)
    assert torch.allclose(returns, torch.tensor([expected]) + values, atol=1e-6)


def gae_loop(rewards, values, mask, gamma, lam):
    """The definition, backwards in time, in float64."""
    advantages = torch.zeros(rewards.shape, dtype=torch.float64)
    rewards, values = rewards.tolist(), values.tolist()
    for b, length in enumerate(mask.sum(1).tolist()):
        advantage, next_value = 0.0, 0.0
        for t in reversed(range(length)):
            delta = rewards[b][t] + gamma * next_value - values[b][t]
            advantage = delta + gamma * lam * advantage
            advantages[b, t], next_value = advantage, values[b][t]
    return advantages


@pytest.mark.parametrize("R", [1, 63, 64, 65, 200])
@pytest.mark.parametrize("gamma,lam", [(1, .95), (.99, .9), (1, 1), (.9, 0)])
def test_gae_equals_the_loop_on_ragged_rows(R, gamma, lam):
    rewards, values = noise(2, 5, R, seed=R)
    mask = torch.arange(R) < torch.tensor([[R], [max(1, R // 2)], [1], [0], [max(1, R - 1)]])
    advantages, returns = gae(rewards, values, mask, gamma, lam)
    expected = gae_loop(rewards, values, mask, gamma, lam)
    assert torch.allclose(advantages.double(), expected, atol=1e-4)
    assert torch.allclose(returns.double(), torch.where(mask, expected + values, 0), atol=1e-4)


def test_gae_takes_tensors_whatever_their_strides():
    rewards, values, mask = noise(64, 4).t(), noise(64, 4, seed=1).t(), torch.ones(4, 64).bool()
    strided, contiguous = (gae(f(rewards), f(values), mask)
                           for f in (lambda x: x, torch.Tensor.contiguous))
    assert torch.equal(strided[0], contiguous[0])
    assert torch.equal(strided[1], contiguous[1])


# ---- precision -----------------------------------------------------------------------------------

@pytest.mark.parametrize("function", [
    lambda x, mask: masked_mean(x, mask),
    lambda x, mask: whiten(x, mask),
    lambda x, mask: token_rewards(torch.zeros(4), x, -x, mask, .1),
    lambda x, mask: torch.stack(gae(x, x, mask))], ids=["mean", "whiten", "rewards", "gae"])
def test_half_precision_inputs_give_float32_as_exact_as_float32(function):
    x, mask = noise(4, 300).bfloat16(), torch.ones(4, 300).bool()
    assert function(x, mask).dtype == torch.float32
    assert torch.equal(function(x, mask), function(x.float(), mask))


@pytest.mark.parametrize("kl", [0.0, 3.0, 100.0])
@pytest.mark.parametrize("horizon", [1, 10, 1e6])
def test_the_price_of_kl_stays_above_0_and_goes_on_moving(kl, horizon):
    control = KLController(0.2, target=6, horizon=horizon)
    for _ in range(3):
        before = control.coef
        control.update(kl, 96)
        assert control.coef > 0
        assert (control.coef > before) == (kl > 6)
