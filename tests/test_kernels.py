"""Fast paths compute what the plain ones do, and say so where they cannot run."""
import copy
import dataclasses
import os
import pathlib
import shutil
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from model import ModelConfig, Transformer, token_logprobs
from runtime import decoding, device, products
from runtime.optim import Muon, orthogonal
from runtime.options import UserError
from sample import Decoder, generate

ROOT = pathlib.Path(__file__).parent.parent
CONFIG = ModelConfig(vocab_size=70, n_layer=2, n_head=4, n_kv_head=2, d_model=32, d_ff=48, max_len=96)
needs_onednn = pytest.mark.skipif(products._onednn is None, reason="this PyTorch has no oneDNN products")
needs_compiler = pytest.mark.skipif(bool(device.compiler_fault()), reason=device.compiler_fault())


@pytest.fixture
def onednn():
    products.use_products("onednn")
    yield
    products.use_products("aten")


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def loud_model(**changes) -> Transformer:
    model = Transformer(dataclasses.replace(CONFIG, **changes))
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2:
                p.mul_(8)
    return model.eval()


# ---- products --------------------------------------------------------------------------------------------------------

@needs_onednn
def test_products_and_their_gradients_equal_those_of_f_linear(onednn):
    weight, found = noise(9, 16, seed=1), []
    for multiply in (products.linear, F.linear):
        x, w = noise(3, 5, 16).requires_grad_(), weight.clone().requires_grad_()
        y = multiply(x, w)
        (y * noise(3, 5, 9, seed=2)).sum().backward()
        found.append((y.detach(), x.grad, w.grad))
    assert products.products() == "onednn" and type(products.linear(x, w).grad_fn).__name__ == "_LinearBackward"
    for ours, plain in zip(*found, strict=True):
        assert torch.allclose(ours, plain, atol=1e-5)


@needs_onednn
def test_a_model_learns_the_same_by_either_products():
    found = []
    for name in ("aten", "onednn"):
        products.use_products(name)
        model, tokens = Transformer(CONFIG), torch.arange(20).view(2, 10)
        F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).backward()
        found.append([p.grad for p in model.parameters()])
    products.use_products("aten")
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("shape", [(5, 16), (3, 2, 7, 8)])
def test_rms_norm_and_its_gradients_equal_torchs(shape):
    ours, plain = products.RMSNorm(shape[-1], 1e-6), nn.RMSNorm(shape[-1], 1e-6)
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
    assert torch.autograd.gradcheck(lambda x, w: products._RMSNorm.apply(x, w, 1e-2), double)


def test_products_are_not_chosen_where_there_is_nothing_to_gain():
    assert products.pick_products("cpu", 64)[0] == "aten" and products.pick_products("cuda", 512)[0] == "aten"
    chosen, why = products.pick_products("cpu", 128, rows=64, repeats=2)
    assert chosen in ("aten", "onednn") and (products._onednn is None or "by F.linear" in why)


@pytest.mark.parametrize("by", ["aten", "onednn"])
@pytest.mark.parametrize("rows", [1, 8, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_products_equal_plain_ones_and_follow_the_weights(by, rows, dtype):
    products.use_products(by)
    weight = nn.Parameter(noise(24, 16))
    layer, x = decoding.PackedLinear(weight, dtype, rows), noise(rows, 1, 16, seed=3)
    try:
        for _ in range(2):
            expected = F.linear(x.to(dtype), weight.detach().to(dtype))
            assert layer(x).dtype == dtype and layer(x).shape == (rows, 1, 24)
            assert torch.allclose(layer(x).float(), expected.float(), atol=1e-5 if dtype == torch.float32 else 0.07)
            with torch.no_grad():
                weight.mul_(-2)
            layer.refresh()
    finally:
        products.use_products("aten")


@pytest.mark.parametrize("vnni", [True, False])
@pytest.mark.parametrize("rows,width", [(1, 64), (1, 344), (8, 64), (40, 344)])
def test_products_in_int8_are_plain_ones_but_for_rounding_and_follow_the_weights(rows, width, vnni, monkeypatch):
    if not vnni:  # the plain fall-back
        monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    weight = nn.Parameter(noise(48, width))
    with torch.no_grad():
        weight[3] = 0
        weight[:, 5] *= 5  # an outlier sets the step of its row
    layer, x = decoding.Int8Linear(weight, torch.bfloat16, rows), noise(rows, 1, width, seed=3)
    for _ in range(2):
        for inputs, error in ((x, 0.02), (x.repeat(1, 5, 1), 0.006)):  # a step's rows, and a prompt's
            expected = F.linear(inputs, weight.detach())
            found = layer(inputs)
            assert found.dtype == torch.bfloat16 and found.shape == expected.shape
            off = (found.float() - expected).norm() / expected.norm()
            assert off < error and not found[..., 3].any()
            assert off > 0.005 or inputs is not x  # a step's really are rounded: bfloat16 alone is .003 off
        with torch.no_grad():
            weight.mul_(-2)
        layer.refresh()


def test_rows_are_rounded_to_their_own_255_steps():
    x = torch.cat((noise(6, 40) * torch.logspace(-6, 6, 6)[:, None], torch.zeros(1, 40)))
    q, scale = decoding.quantise_rows(x)
    assert q.dtype == torch.uint8 and int(q[:-1].int().sub(128).abs().amax(1).min()) == 127 and q.min() >= 1
    assert bool(((scale * (q.float() - 128) - x).abs() <= 0.501 * scale).all()) and bool((q[-1] == 128).all())


def test_int8_is_refused_where_it_would_not_be_used():
    with pytest.raises(UserError, match="int8 is for writing on a CPU"):
        Decoder(Transformer(CONFIG).to("meta"), "int8")


def test_a_decoding_copy_shares_the_tensors_and_leaves_the_model_as_it_was():
    model = loud_model()
    ready = decoding.decoding_copy(model, torch.float32, 4, compiled=True)
    assert ready.embedding.weight is model.embedding.weight and ready.blocks[0].mlp_norm is not model.blocks[0].mlp_norm
    assert len(decoding.packed_layers(ready)) == 4 * CONFIG.n_layer + 1 and not decoding.packed_layers(model)
    assert model.output is None


@pytest.mark.parametrize("by", ["aten", "onednn"])
@pytest.mark.parametrize("rows", [1, 9])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("tied", [True, False])
def test_each_layer_of_a_decoder_finds_its_own_weight(by, rows, dtype, tied):
    model = loud_model(tied=tied)
    tokens = torch.randint(1, 70, (rows, 6), generator=torch.Generator().manual_seed(0))
    products.use_products(by)
    try:
        out = generate(model, tokens, torch.ones_like(tokens).bool(), 12, dtype=dtype)
    finally:
        products.use_products("aten")
    expected = token_logprobs(model(torch.cat((tokens, out.tokens), 1))[:, 5:-1], out.tokens)
    assert (out.logprobs - expected).abs().mean() < {"float32": 1e-5, "bfloat16": 0.03, "int8": 0.06}[dtype]


# ---- writing: compiled equals eager ----------------------------------------------------------------------------------

def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@needs_compiler
@pytest.mark.parametrize("rows", [1, 5])
def test_a_compiled_decoder_writes_the_same_with_one_graph_for_all_lengths_and_weights(rows):
    model = loud_model()
    decoder, before = Decoder(model, compile=True), graphs()
    for length, seed in ((4, 1), (9, 2), (70, 3)):  # in 2 blocks of the cache, and in 3
        tokens = torch.randint(1, 70, (rows, length), generator=torch.Generator().manual_seed(seed))
        mask = torch.ones_like(tokens).bool()
        mask[-1, :length // 2] = rows == 1
        fast = generate(model, tokens, mask, 20, seed=seed, decoder=decoder)
        plain = generate(model, tokens, mask, 20, seed=seed)
        assert torch.equal(fast.tokens, plain.tokens) and torch.allclose(fast.logprobs, plain.logprobs, atol=1e-4)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.05 * noise(*p.shape, seed=seed))
        decoder.refresh()
    assert graphs() - before == 1


@needs_compiler
def test_weights_of_another_type_are_another_step():
    """On a CPU no guard would notice that the graph of float32 norms is given bfloat16 ones."""
    model, tokens = loud_model(), torch.randint(1, 70, (3, 5), generator=torch.Generator().manual_seed(0))
    settings = dict(seed=1, mask=torch.ones(3, 5, dtype=torch.bool), max_new_tokens=16)
    generate(model, tokens, decoder=Decoder(model, "bfloat16", compile=True), **settings)
    half = copy.deepcopy(model).bfloat16()
    fast = generate(half, tokens, decoder=Decoder(half, compile=True), **settings)
    gap = fast.logprobs - token_logprobs(half(torch.cat((tokens, fast.tokens), 1))[:, 4:-1], fast.tokens)
    assert gap.abs().mean() < 0.1


@needs_compiler
def test_compiled_rows_are_refilled_and_dropped_as_eager_ones_are():
    model, before = loud_model(), graphs()
    tokens = torch.randint(1, 70, (44, 7), generator=torch.Generator().manual_seed(5))
    mask = torch.arange(7) >= torch.arange(44)[:, None] % 5  # prompts of 3 to 7 tokens
    settings = dict(end_id=3, seed=4, batch_size=32)  # 12 prompts wait; below 9 rows, those go on alone
    fast = generate(model, tokens, mask, 40, decoder=Decoder(model, compile=True), **settings)
    plain = generate(model, tokens, mask, 40, **settings)
    assert torch.equal(fast.tokens, plain.tokens) and torch.allclose(fast.logprobs, plain.logprobs, atol=1e-4)
    assert plain.mask.sum(1).unique().numel() > 5 and graphs() - before == 2  # of 32 rows, and of 8


@needs_compiler
def test_a_compiled_trunk_learns_the_same_whatever_the_rows_and_lengths():
    plain, fast = Transformer(CONFIG), Transformer(CONFIG)
    device.compile_trunks(fast)
    for B, T, chosen in ((3, 12, 7), (5, 20, 30), (2, 31, 11)):
        tokens = torch.randint(1, 70, (B, T), generator=torch.Generator().manual_seed(T))
        where = torch.randperm(B * T, generator=torch.Generator().manual_seed(B))[:chosen].sort().values
        found = []
        for model in (plain, fast):
            model.zero_grad()
            (model.hidden(tokens, where=where) * noise(chosen, 32)).sum().backward()
            found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        assert len(found[0]) == len(found[1])
        assert all(torch.allclose(a, b, atol=1e-3, rtol=1e-3) for a, b in zip(*found, strict=True))
    assert fast.trunk._torchdynamo_orig_callable.__func__ is Transformer.trunk


# ---- whether to compile ----------------------------------------------------------------------------------------------

def test_compiling_is_for_long_work():
    assert device.compile_pays("auto", "cpu", 60) == (False, "about 60 s lie ahead; compiling pays from 300 on")
    assert not device.compile_pays("auto", "mps", 1e9)[0]
    if not device.compiler_fault():
        assert device.compile_pays("auto", "cpu", 3000)[0] and device.compile_pays("on", "cpu", 0)[0]


@pytest.mark.parametrize("hidden", ["compiler", "headers"])
def test_without_a_compiler_one_line_says_so_and_everything_runs_eagerly(tmp_path, hidden):
    """The compiler is hidden by a PATH that has Python alone; the headers by another place to look for them."""
    (tmp_path / "bin").mkdir()
    for name in ("python3", "git") + (("g++", "gcc", "as", "ld") if hidden == "headers" else ()):
        if found := sys.executable if name == "python3" else shutil.which(name):
            (tmp_path / "bin" / name).symlink_to(found)
    hide = "import sysconfig, runpy, sys; paths = sysconfig.get_paths\n" \
           "sysconfig.get_paths = lambda *a, **k: paths(*a, **k) | {'include': '/nowhere'}\n"
    (tmp_path / "mine.jsonl").write_text("".join(f'{{"text": "第{i}句话很好，值得看。"}}\n' for i in range(300)),
                                         encoding="utf-8")
    code = (hide if hidden == "headers" else "import runpy, sys\n") + (
        f"sys.argv = ['train.py', 'pretrain', '--preset', 'smoke', '--data', {str(tmp_path / 'mine.jsonl')!r}, "
        f"'--out', {str(tmp_path / 'out')!r}, '--compile', 'on']\n"
        f"sys.path.insert(0, {str(ROOT)!r}); runpy.run_path({str(ROOT / 'train.py')!r}, run_name='__main__')")
    environment = os.environ | {"PATH": str(tmp_path / "bin"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"),
                                "OMP_NUM_THREADS": "1"}
    environment.pop("CXX", None)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    said = [line for line in done.stdout.splitlines() if "torch.compile does not work here" in line]
    assert len(said) == 1 and "compile off" in said[0]
    assert ("no C++ compiler" if hidden == "compiler" else "headers are not in /nowhere") in said[0]


# ---- Muon ------------------------------------------------------------------------------------------------------------

def test_muon_in_batches_equals_torchs_own():
    shapes = [(12, 8), (12, 8), (8, 12), (8, 8)]
    ours, theirs = ([nn.Parameter(noise(*s, seed=i)) for i, s in enumerate(shapes)] for _ in range(2))
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
