"""Muon equals torch's own and trains the blocks' matrices; learning rates follow their schedule."""
import pytest
import torch
from torch import nn

from reward import RewardConfig, RewardModel, RewardOptions
from runtime.optim import Muon, learning_rate, make_optimizers, orthogonal, restore
from runtime.options import UserError, parse
from tests.conftest import TINY, noise


def test_muon_in_batches_equals_torchs_own():
    shapes = [(12, 8), (12, 8), (8, 12), (8, 8)]
    ours, theirs = ([nn.Parameter(noise(*s, seed=i)) for i, s in enumerate(shapes)]
                    for _ in range(2))
    a = Muon([(p, (len(p),)) for p in ours], lr=0.02, weight_decay=0.1, iterations=3)
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


def test_stacked_matrices_learn_as_if_each_stood_alone():
    rows, scales = (8, 4, 4), (1, 1, 0.02)  # v, whose gradients are small, would hardly move
    gradients = [s * noise(r, 8, seed=i) for i, (r, s) in enumerate(zip(rows, scales, strict=True))]
    stacked = nn.Parameter(torch.zeros(16, 8))
    alone = [nn.Parameter(torch.zeros(r, 8)) for r in rows]
    a, b = Muon([(stacked, rows)], lr=0.02), Muon([(p, (len(p),)) for p in alone], lr=0.02)
    for p, gradient in zip([stacked, *alone], [torch.cat(gradients), *gradients], strict=True):
        p.grad = gradient
    a.step()
    b.step()
    assert torch.allclose(stacked, torch.cat(list(alone)), atol=1e-4)  # batched in bfloat16
    assert all(0.7 < part.norm() / (0.02 * r ** 0.5) < 1.2
               for part, r in zip(stacked.split(rows), rows, strict=True))


@pytest.mark.parametrize(("capability", "dtype"), [("AVX512", torch.bfloat16), ("AVX2", torch.float32),
                                                   ("DEFAULT", torch.float32)])
def test_a_processor_without_bfloat16_iterates_in_float32(monkeypatch, capability, dtype):
    """Or pretraining takes hours there."""
    x, exact = noise(3, 6, 10, seed=5), orthogonal(noise(3, 6, 10, seed=5).double(), 5)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    y = orthogonal(x, 5)
    assert y.dtype == dtype
    assert (y - exact).abs().max() < 0.05


def test_the_model_names_all_that_is_stacked():
    model = RewardModel(RewardConfig(**TINY))
    for p, rows in model.matrix_parameters():
        assert sum(rows) == len(p)
    c, rows = model.config, dict.fromkeys(rows for _, rows in model.matrix_parameters())
    heads = tuple(n * c.head_dim for n in (c.n_head, c.n_kv_head, c.n_kv_head))
    assert list(rows) == [heads, (c.d_model,), (c.d_ff, c.d_ff)]


def test_orthogonal_keeps_directions_and_evens_out_their_lengths():
    x = noise(3, 6, 10, seed=5)
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    y = orthogonal(x, 5).float()
    values = torch.linalg.svdvals(y)
    assert values.min() > 0.5
    assert values.max() < 1.4
    inner = u.mT @ y @ vh.mT  # diagonal, if the singular vectors are kept
    assert (inner - torch.diag_embed(inner.diagonal(dim1=1, dim2=2))).abs().max() < 0.05


def test_learning_rates_rise_stay_and_fall():
    rates = [learning_rate(step, 10, warmup=.2, decay=.5) for step in range(10)]
    assert rates == pytest.approx([.5, 1, 1, 1, 1, 1, .8, .6, .4, .2])
    assert learning_rate(9, 10, 0, 1.0, final=.1) == pytest.approx(.1 + .9 * .1)


def test_muon_trains_the_blocks_matrices_and_adamw_the_others():
    model = RewardModel(RewardConfig(**TINY))
    muon, adamw = make_optimizers(model, parse(RewardOptions, [], "x"))
    name = {id(p): n for n, p in model.named_parameters()}
    of = lambda x: {name[id(p)] for group in x.param_groups for p in group["params"]}  # noqa: E731
    matrices = ("qkv.weight", "out.weight", "gate_up.weight", "down.weight")
    assert of(muon) == {n for n in name.values() if ".blocks." in n and n.endswith(matrices)}
    assert of(adamw) == set(name.values()) - of(muon)


@pytest.mark.parametrize("change", [
    lambda saved: saved["state"][0].update(exp_avg=torch.ones(7)),
    lambda saved: saved["param_groups"][0]["params"].append(9), lambda saved: saved.clear()])
def test_the_state_of_other_weights_is_refused(change):
    def adam() -> torch.optim.Optimizer:
        weight = torch.nn.Parameter(torch.ones(3))
        weight.grad = torch.ones(3)
        return torch.optim.Adam([weight])

    first, second = adam(), adam()
    first.step()
    saved = first.state_dict()
    restore([second], {"optimizers": [saved]})
    assert torch.equal(second.state_dict()["state"][0]["exp_avg"], saved["state"][0]["exp_avg"])
    change(saved)
    with pytest.raises(UserError, match="optimizer state"):
        restore([adam()], {"optimizers": [saved]})
