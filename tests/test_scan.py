"""Discounted sums: the blocked form equals the loop it replaces."""
import pytest
import torch

from runtime.scan import BLOCK, discounted_sums
from tests.conftest import noise

SIZES = [1, 2, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, 2 * BLOCK + 1, 200]


def loop(x, c):
    """y_t = x_t + c · y_{t+1}, from right to left, in float64."""
    y, after = torch.zeros(x.shape, dtype=torch.float64), torch.zeros(len(x), dtype=torch.float64)
    for t in reversed(range(x.shape[1])):
        after = x[:, t].double() + c * after
        y[:, t] = after
    return y


@pytest.mark.parametrize("R", SIZES)
@pytest.mark.parametrize("c", [0.0, .3, .95, .9995, 1.0])
@pytest.mark.parametrize("B", [1, 5])
def test_they_equal_the_loop_in_float64(B, R, c):
    x, scale = noise(B, R, seed=R), 1 + loop(torch.ones(1, R), c).max()
    assert (discounted_sums(x, c) - loop(x, c)).abs().max() < 1e-6 * scale


@pytest.mark.parametrize("R", SIZES)
def test_without_a_discount_they_are_sums_to_the_end_of_the_row(R):
    x = torch.arange(3 * R).view(3, R).float()  # sums of integers are exact
    assert torch.equal(discounted_sums(x, 1.0), x.flip(1).cumsum(1).flip(1))


@pytest.mark.parametrize("R", SIZES)
def test_with_discount_0_nothing_later_counts(R):
    x = noise(3, R)
    assert torch.equal(discounted_sums(x, 0.0), x)


@pytest.mark.parametrize("n", [1, BLOCK - 1, BLOCK, BLOCK + 1])
def test_zeros_after_a_rows_end_change_nothing(n):
    x = noise(2, n)
    padded = torch.nn.functional.pad(x, (0, 3 * BLOCK))
    sums = discounted_sums(padded, .97)
    assert torch.allclose(sums[:, :n], discounted_sums(x, .97), atol=1e-5)
    assert (sums[:, n:] == 0).all()


def test_a_row_does_not_depend_on_the_others():
    x = noise(4, 70)
    alone = torch.cat([discounted_sums(row[None], .95) for row in x])
    assert torch.allclose(discounted_sums(x, .95), alone, atol=1e-5)


def test_tensors_may_be_strided_and_stay_as_they_were():
    x = noise(70, 4).t()
    before = x.clone()
    assert torch.equal(discounted_sums(x, .95), discounted_sums(x.contiguous(), .95))
    assert torch.equal(x, before)


def test_sums_are_float32():
    assert discounted_sums(noise(2, 40), .9).dtype == torch.float32
