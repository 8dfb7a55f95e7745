"""Discounted sums along rows, in blocks instead of a loop over columns."""
import functools

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 32  # columns


@functools.lru_cache(maxsize=32)
def power_tables(c: float, n_blocks: int, device: str) -> tuple[Tensor, Tensor]:
    """Powers of c, computed in float64, where the exponent is not negative; else 0:

    within[t, k] = c^(k − t) (BLOCK, BLOCK); across[i, j] = c · (c^BLOCK)^(i − j − 1) (n_blocks,
    n_blocks).
    """
    k, b = torch.arange(BLOCK, dtype=torch.float64), torch.arange(n_blocks, dtype=torch.float64)

    def powers(base: float, exponent: Tensor) -> Tensor:
        return torch.where(exponent >= 0, base ** exponent.clamp(min=0), 0).float().to(device)

    return powers(c, k[None, :] - k[:, None]), c * powers(c ** BLOCK, b[:, None] - b[None, :] - 1)


def discounted_sums(x: Tensor, c: float) -> Tensor:
    """y_t = x_t + c · y_{t+1} along the last dimension, y = 0 beyond its end: x (B, R) float32 ->
    (B, R).

    Most codes walk from right to left. Here a matrix product with powers of c sums inside each
    block of 32 columns, after the sum of all later blocks has been added to the block's last
    column.

    >>> discounted_sums(torch.tensor([[1., 1., 1.]]), 0.5)
    tensor([[1.7500, 1.5000, 1.0000]])
    """
    B, R = x.shape
    n = -(-R // BLOCK)
    within, across = power_tables(c, n, str(x.device))
    blocks = x.new_zeros(B, n * BLOCK)
    blocks[:, :R] = x
    blocks = blocks.view(B * n, BLOCK)
    if n > 1:  # add c times y at the column after each block
        blocks[:, -1] += ((blocks @ within[0]).view(B, n) @ across).flatten()
    return F.linear(blocks, within).view(B, n * BLOCK)[:, :R]
