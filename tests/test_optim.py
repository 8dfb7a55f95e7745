"""Muon equals torch's own, and learning rates follow their schedule."""
import torch
from torch import nn

from runtime.optim import Muon, orthogonal
from tests.conftest import noise


def test_muon_in_batches_equals_torchs_own():
    shapes = [(12, 8), (12, 8), (8, 12), (8, 8)]
    ours, theirs = ([nn.Parameter(noise(*s, seed=i)) for i, s in enumerate(shapes)]
                    for _ in range(2))
    a = Muon(ours, lr=0.02, weight_decay=0.1, steps=3)
    b = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, ns_steps=3)
    for step in range(4):
        for i, (p, q) in enumerate(zip(ours, theirs, strict=True)):
            p.grad = noise(*p.shape, seed=100 * step + i)
            q.grad = p.grad.clone()
        a.step()
        b.step()
    for p, q, s, i in zip(ours, theirs, shapes, range(4), strict=True):
        moved = (q - noise(*s, seed=i)).abs().max()
        assert (p - q).abs().max() < 0.03 * moved  # both iterate in bfloat16


def test_orthogonal_keeps_directions_and_evens_out_their_lengths():
    x = noise(3, 6, 10, seed=5)
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    y = orthogonal(x, 5).float()
    values = torch.linalg.svdvals(y)
    assert values.min() > 0.5 and values.max() < 1.4
    inner = u.mT @ y @ vh.mT  # diagonal, if the singular vectors are kept
    assert (inner - torch.diag_embed(inner.diagonal(dim1=1, dim2=2))).abs().max() < 0.05
