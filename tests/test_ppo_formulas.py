"""The formulas of PPO: values published elsewhere or derived by hand, and no pad counts."""
import math

import numpy as np
import pytest
import torch

from ppo import KLController, ScoreScale, gae, kl_estimate, masked_mean, token_rewards, whiten
from runtime.options import UserError
from runtime.statistics import RunningMoments
from tests.ppo_world import bools, options


@pytest.mark.parametrize("rewards,gamma,lam,expected", [
    ([-.1, .2, 1], 1, .95, [.52675, .765, .7]), ([0, 0, 1], 1, 1, [.5, .6, .7]),
    ([0, 0, 1], .9, 0, [-.14, -.13, .7])])
def test_gae_at_known_values(rewards, gamma, lam, expected):
    values = torch.tensor([[.5, .4, .3]])
    advantages, returns = gae(torch.tensor([rewards], dtype=torch.float32), values,
                              bools([[1, 1, 1]]), gamma, lam)
    assert torch.allclose(advantages, torch.tensor([expected]), atol=1e-6)
    assert torch.allclose(returns, torch.tensor([expected]) + values, atol=1e-6)


def gae_loop(rewards, values, mask, gamma, lam):
    """The definition, backwards in time, in float64."""
    B, R = rewards.shape
    advantages = torch.zeros(B, R, dtype=torch.float64)
    for b in range(B):
        after, next_value = 0.0, 0.0
        for t in reversed(range(R)):
            if mask[b, t]:
                after = float(rewards[b, t]) + gamma * next_value - float(values[b,
                                                                                 t]) + gamma * lam * after
                advantages[b, t], next_value = after, float(values[b, t])
    return advantages


@pytest.mark.parametrize("R", [1, 63, 64, 65, 200])
@pytest.mark.parametrize("gamma,lam", [(1, .95), (.99, .9), (1, 1), (.9, 0)])
def test_blocked_gae_equals_the_loop_on_ragged_rows(R, gamma, lam):
    g = torch.Generator().manual_seed(R)
    rewards, values = torch.randn(5, R, generator=g), torch.randn(5, R, generator=g)
    mask = torch.arange(R) < torch.tensor([[R], [max(1, R // 2)], [1], [0], [max(1, R - 1)]])
    advantages, returns = gae(rewards, values, mask, gamma, lam)
    expected = gae_loop(rewards, values, mask, gamma, lam)
    assert torch.allclose(advantages.double(), expected, atol=1e-4)
    assert torch.allclose(returns.double(), torch.where(mask, expected + values, 0), atol=1e-4)


def test_gae_takes_tensors_however_they_lie():
    rewards, values, mask = torch.randn(64, 4).t(), torch.randn(64, 4).t(), torch.ones(4, 64).bool()
    for a, b in zip(gae(rewards, values, mask), gae(rewards.contiguous(), values.contiguous(),
                                                    mask), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("d,k1,k2,k3", [(.5, .5, .125, .106531), (-1, -1, .5, .718282)])
def test_kl_estimators_at_known_values(d, k1, k2, k3):
    found = [float(kl_estimate(torch.tensor([d]), torch.tensor([0.0]), kind))
             for kind in ("k1", "k2", "k3")]
    assert found == pytest.approx([k1, k2, k3], abs=1e-6)


def test_k1_and_k3_are_unbiased():
    p, q = torch.randn(2, 6, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    exact = (p.exp() * (p - q)).sum()
    for kind in ("k1", "k3"):
        assert torch.allclose((p.exp() * kl_estimate(p, q, kind)).sum(), exact, atol=1e-6)


def test_adaptive_kl_at_the_known_value_and_fixed_stays():
    control = KLController(.2, target=6)
    control.update(9, 256)
    assert control.coef == pytest.approx(.201024, abs=1e-9)
    fixed = KLController(.2)
    fixed.update(9, 256)
    assert fixed.coef == .2


@pytest.mark.parametrize("kl,factor", [(9, 1 + .2 * 256 / 1e4), (0, 1 - .2 * 256 / 1e4),
                                       (6.6, 1 + .1 * 256 / 1e4)])
def test_adaptive_kl_is_clipped_on_both_sides(kl, factor):
    control = KLController(.2, target=6)
    control.update(kl, 256)
    assert control.coef == pytest.approx(.2 * factor, abs=1e-9)


def test_masked_means_at_known_values():
    x, mask = torch.tensor([[1., 2, 0], [3, 4, 5], [7, 0, 0]]), bools([[1, 1, 0], [1, 1, 1],
                                                                       [1, 0, 0]])
    assert float(masked_mean(x, mask)) == pytest.approx(22 / 6)
    y = torch.tensor([[1., 3, 9], [2, 4, 0], [8, 0, 0]])
    row_means = [float(masked_mean(row, torch.arange(3) < n)) for row,
                 n in zip(y, (2, 2, 1), strict=True)]
    assert np.mean(row_means) == pytest.approx(13 / 3)
    assert float(masked_mean(x, torch.zeros_like(mask))) == 0


def test_whitening_is_over_the_mask_and_divides_by_the_count():
    x, mask = torch.tensor([[1., 2, 99], [6, math.nan, math.inf]]), bools([[1, 1, 0], [1, 0, 0]])
    real = np.array([1, 2, 6])
    assert torch.allclose(whiten(x, mask)[mask], torch.tensor((real - real.mean()) / real.std()).float(), atol=1e-5)
    assert (whiten(x, mask)[~mask] == 0).all()


def test_the_score_stands_on_the_last_real_token():
    mask = bools([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]])
    logprobs, ref = torch.zeros(3, 4), torch.full((3, 4), -.5)
    rewards = token_rewards(torch.tensor([2., 3, 4]), logprobs, ref, mask, kl_coef=.2)
    expected = torch.tensor([[-.1, -.1, 1.9, 0], [2.9, 0, 0, 0], [-.1, -.1, -.1, 3.9]])
    assert torch.allclose(rewards, expected)
    assert (logprobs == 0).all() and (ref == -.5).all()  # the logged arrays are left as they were


def test_scores_are_normalised_then_clipped_then_fined():
    raw, ended, scale = torch.tensor([0., 4, 100]), bools([1, 0, 0]), ScoreScale(mean=2, std=2)
    fixed = scale.paid(raw, ended, options(reward_norm="fixed", reward_clip=5, end_penalty=1))
    assert fixed.tolist() == [-1, 0, 4]
    sigmoid = scale.paid(raw, ended, options(reward_norm="sigmoid", end_penalty=.5))
    assert torch.allclose(sigmoid, torch.tensor([0, 2 / (1 + math.exp(-4)) - 1.5, .5]))
    log_p = scale.paid(raw, ended, options(reward_norm="logsigmoid", end_penalty=.5))
    assert torch.allclose(log_p, torch.tensor([-math.log(2), -math.log1p(math.exp(-4)) - .5, -.5]))
    assert scale.moments.count == 1  # nothing but `running` follows them


def test_running_scores_are_divided_by_a_spread_that_counts_them():
    raw, scale = torch.tensor([0., 4, 100]), ScoreScale(mean=2, std=2)
    running = scale.paid(raw, bools([1, 1, 1]), options(reward_norm="running", reward_clip=50))
    assert scale.moments.count == 4
    assert torch.allclose(running, torch.tensor([-1, 1, 49]) / scale.moments.std)


def test_the_scale_of_scores_is_their_mean_and_spread_and_survives_a_checkpoint():
    raw = torch.randn(600, generator=torch.Generator().manual_seed(0)) * 3 + 1
    scale = ScoreScale.of(raw)
    assert scale.mean == pytest.approx(float(raw.mean()), abs=1e-6)
    assert scale.std == pytest.approx(float(raw.std(correction=0)), abs=1e-6)
    scale.moments.update(raw)
    again = ScoreScale(**scale.state())
    assert again.state() == scale.state()


@pytest.mark.parametrize("value", [3.0, math.nan])
def test_a_reward_model_that_gives_every_reply_the_same_score_is_told(value):
    with pytest.raises(UserError, match="same score .* over 600 replies"):
        ScoreScale.of(torch.full((600,), value))


def test_running_moments_equal_those_of_everything_at_once():
    x = torch.randn(100, generator=torch.Generator().manual_seed(0)) * 3 + 2
    moments = RunningMoments(count=0., mean=0., var=0.)
    for part in x.split([7, 50, 43]):
        moments.update(part)
    assert (moments.mean, moments.std) == (pytest.approx(float(x.mean()), abs=1e-5),
                                           pytest.approx(float(x.std(correction=0)), abs=1e-5))
    assert RunningMoments().std == 1


def test_half_precision_inputs_give_float32_as_exact_as_float32():
    x, mask = torch.randn(4, 300, generator=torch.Generator().manual_seed(0)).bfloat16(), torch.ones(4, 300).bool()
    zero = torch.zeros(4)
    for f in (lambda x: masked_mean(x, mask), lambda x: whiten(x, mask),
              lambda x: token_rewards(zero, x, -x, mask, .1),
              lambda x: torch.stack(gae(x, x, mask))):
        assert f(x).dtype == torch.float32 and torch.equal(f(x), f(x.float()))
