"""Linear layers and RMSNorm compute what PyTorch's own do, and a choice of products belongs to its
model."""
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from model import ModelConfig, Transformer, load_checkpoint, save_checkpoint
from runtime.products import RMSNorm, _onednn, _RMSNorm, linear, pick_products, use_products
from tests.conftest import TINY, noise

SHAPE = {**TINY, "vocab_size": 500}  # the world's tokenizer
CONFIG = ModelConfig(**SHAPE)
needs_onednn = pytest.mark.skipif(_onednn is None, reason="this PyTorch has no oneDNN products")


@needs_onednn
def test_products_and_their_gradients_equal_those_of_f_linear():
    weight, found = noise(9, 16, seed=1), []
    for multiply in (lambda x, w: linear(x, w, "onednn"), F.linear):
        x, w = noise(3, 5, 16).requires_grad_(), weight.clone().requires_grad_()
        y = multiply(x, w)
        (y * noise(3, 5, 9, seed=2)).sum().backward()
        found.append((y.detach(), x.grad, w.grad))
    assert type(linear(x, w, "onednn").grad_fn).__name__ == "_LinearBackward"
    for ours, plain in zip(*found, strict=True):
        assert torch.allclose(ours, plain, atol=1e-5)


@needs_onednn
def test_a_model_learns_the_same_by_either_products():
    found = []
    for name in ("aten", "onednn"):
        model, tokens = Transformer(CONFIG), torch.arange(20).view(2, 10)
        use_products(model, name)
        F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).backward()
        found.append([p.grad for p in model.parameters()])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("shape", [(5, 16), (3, 2, 7, 8)])
def test_rms_norm_and_its_gradients_equal_torchs(shape):
    ours, plain = RMSNorm(shape[-1], 1e-6), nn.RMSNorm(shape[-1], 1e-6)
    for norm in (ours, plain):
        norm.weight.data = 1 + noise(shape[-1], seed=1)
    x, g = 3 * noise(*shape), noise(*shape, seed=2)
    x[0, 0] = 0  # a row of zeros stays one
    found = []
    for norm in (ours, plain):
        leaf = x.clone().requires_grad_()
        y = norm(leaf)
        found.append((y.detach(), *torch.autograd.grad(y, (leaf, norm.weight), g)))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-6 * float(b.abs().max()))
    double = [t.double().requires_grad_() for t in (noise(2, 3, 8, seed=3), noise(8, seed=4))]
    assert torch.autograd.gradcheck(lambda x, w: _RMSNorm.apply(x, w, 1e-2), double)


def test_products_are_not_chosen_where_there_is_nothing_to_gain():
    assert pick_products("cpu", 64)[0] == "aten" and pick_products("cuda", 512)[0] == "aten"
    chosen, why = pick_products("cpu", 128, rows=64, repeats=2)
    assert chosen in ("aten", "onednn") and (_onednn is None or "by F.linear" in why)


@needs_onednn
def test_the_products_of_one_model_are_not_those_of_another(world, tmp_path):
    first, second = Transformer(CONFIG), Transformer(CONFIG)
    use_products(first, "onednn")
    assert second.blocks[0].mlp.down.products == "aten"
    save_checkpoint(tmp_path, second, world.data.tokenizer, products="aten")
    loaded, _, _ = load_checkpoint(tmp_path)
    assert {m.products for m in first.modules() if hasattr(m, "products")} == {"onednn"}
    assert {m.products for m in loaded.modules() if hasattr(m, "products")} == {"aten"}


@needs_onednn
@pytest.mark.parametrize("tied", [True, False])
def test_a_checkpoint_computes_by_the_products_it_was_made_with(world, tmp_path, tied):
    model = Transformer(ModelConfig(**SHAPE, tied=tied))
    save_checkpoint(tmp_path, model, world.data.tokenizer, products="onednn")
    loaded, _, _ = load_checkpoint(tmp_path)
    logits = loaded(torch.arange(12).view(2, 6))
    names, queue = set(), [logits.grad_fn]
    while queue:
        node = queue.pop()
        names.add(type(node).__name__)
        queue += [other for other, _ in node.next_functions if other is not None]
    assert "_LinearBackward" in names
    assert not names & {"MmBackward0", "AddmmBackward0"}
