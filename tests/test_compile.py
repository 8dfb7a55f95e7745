"""Whether to compile, that a compiled trunk learns the same, and that machines can compute alike."""
import copy
import os
import pathlib
import shutil
import subprocess
import sys

import pytest
import torch

from model import ModelConfig, Transformer, load_checkpoint, weights_hash
from runtime import device
from sample import Decoder, generate
from tests.conftest import TINY, logprobs_of, loud, noise

ROOT = pathlib.Path(__file__).parent.parent
CONFIG = ModelConfig(**TINY)
needs_compiler = pytest.mark.skipif(bool(device.compiler_fault()), reason=device.compiler_fault())


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@needs_compiler
def test_a_compiled_trunk_learns_the_same_whatever_the_rows_and_lengths():
    plain, fast = Transformer(CONFIG), Transformer(CONFIG)
    device.compile_trunks(fast)
    for B, T, chosen in ((3, 12, 7), (5, 20, 30), (2, 31, 11)):
        tokens = torch.randint(1, 70, (B, T), generator=torch.Generator().manual_seed(T))
        order = torch.randperm(B * T, generator=torch.Generator().manual_seed(B))
        where = order[:chosen].sort().values
        found = []
        for model in (plain, fast):
            model.zero_grad()
            (model.hidden(tokens, where=where) * noise(chosen, 32)).sum().backward()
            found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        assert len(found[0]) == len(found[1])
        assert all(torch.allclose(a, b, atol=1e-3, rtol=1e-3) for a, b in zip(*found, strict=True))
    assert fast.trunk._torchdynamo_orig_callable.__func__ is Transformer.trunk


@needs_compiler
@pytest.mark.parametrize("n_layer,recompute", [(3, False), (5, False), (3, True)])
def test_blocks_that_share_graphs_learn_the_same_and_more_of_them_need_no_more(
        monkeypatch, n_layer, recompute):
    monkeypatch.setattr(device, "SHALLOW", 0)
    monkeypatch.setattr(device, "LAYERS_IN_A_GRAPH", 1)
    plain, fast = (Transformer(ModelConfig(**{**TINY, "n_layer": n_layer})) for _ in range(2))
    plain.recompute = fast.recompute = recompute
    torch._dynamo.reset()
    before = graphs()
    device.compile_trunks(fast, fast)
    for B, T in ((3, 12), (5, 20)):
        tokens = torch.randint(1, 70, (B, T), generator=torch.Generator().manual_seed(T))
        mask, where = torch.arange(T) >= torch.arange(B)[:, None], torch.arange(0, B * T, 2)
        found = []
        for model in (plain, fast):
            model.zero_grad()
            (model.hidden(tokens, mask, where=where) * noise(len(where), 32)).sum().backward()
            found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        assert len(found[0]) == len(found[1])
        for a, b in zip(*found, strict=True):
            assert torch.allclose(a, b, atol=1e-3, rtol=1e-3)
    assert graphs() - before == 2  # a layer, and the last one, at chosen positions
    assert list(fast.state_dict()) == list(plain.state_dict())
    assert all(block._compiled_call_impl is None for block in copy.deepcopy(fast).blocks)


# ---- decoding: a graph of a few layers for all -----------------------------------------------

@needs_compiler
@pytest.mark.parametrize("rows,dtype,n_layer,changes", [
    (1, None, 3, {}), (5, None, 4, {"tied": False, "qk_norm": False}), (4, "int8", 3, {})])
def test_layers_that_share_a_graph_write_what_eager_ones_do(monkeypatch, rows, dtype, n_layer,
                                                            changes):
    """Three graphs, whatever the number of layers, lengths and weights."""
    monkeypatch.setattr(device, "SHALLOW", 0)
    monkeypatch.setattr(device, "LAYERS_IN_A_GRAPH", 2)
    model = loud(Transformer(ModelConfig(**{**TINY, "n_layer": n_layer, **changes}))).eval()
    decoder, before = Decoder(model, dtype, compile=True), graphs()
    assert decoder.layered
    for length, seed in ((4, 1), (9, 2), (70, 3)):  # in 2 blocks of the cache, and in 3
        tokens = torch.randint(1, 70, (rows, length), generator=torch.Generator().manual_seed(seed))
        mask = torch.ones_like(tokens).bool()
        mask[-1, :length // 2] = rows == 1
        fast = generate(model, tokens, mask, 20, seed=seed, decoder=decoder)
        plain = generate(model, tokens, mask, 20, seed=seed, dtype=dtype)
        if dtype is None:
            assert torch.equal(fast.tokens, plain.tokens)
            assert torch.allclose(fast.logprobs, plain.logprobs, atol=1e-4)
        else:  # as far from the float32 model as eager int8 is, on whichever tokens each wrote
            gaps = [(x.logprobs - logprobs_of(model(torch.cat((tokens, x.tokens), 1))[:, length - 1:-1],
                                              x.tokens)).abs().mean() for x in (fast, plain)]
            assert gaps[0] < 2 * gaps[1] + 0.05
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.05 * noise(*p.shape, seed=seed))
        decoder.refresh()
    assert graphs() - before == 3


@needs_compiler
def test_layers_that_share_a_graph_go_on_with_fewer_rows(monkeypatch):
    monkeypatch.setattr(device, "SHALLOW", 0)
    monkeypatch.setattr(device, "LAYERS_IN_A_GRAPH", 1)
    model = loud(Transformer(CONFIG)).eval()
    tokens = torch.randint(1, 70, (44, 7), generator=torch.Generator().manual_seed(5))
    mask = torch.arange(7) >= torch.arange(44)[:, None] % 5
    settings = dict(end_id=3, seed=4, batch_size=32)  # 12 prompts wait; later 8 rows go on alone
    fast = generate(model, tokens, mask, 40, decoder=Decoder(model, compile=True), **settings)
    plain = generate(model, tokens, mask, 40, **settings)
    assert torch.equal(fast.tokens, plain.tokens)
    assert torch.allclose(fast.logprobs, plain.logprobs, atol=1e-4)


def test_a_shallow_model_is_one_graph_and_so_is_one_on_a_gpu():
    assert [device.layers_compiled(n, "cpu") for n in (4, 6, 12, 14, 30, 31)] == [4, 6, 12, 2, 5, 1]
    assert device.layers_compiled(30, "cuda") == 30


# ---- whether to compile --------------------------------------------------------------------------

def test_compiling_is_for_long_work():
    compiles, why = device.compile_pays("auto", "cpu", 60)
    assert not compiles
    assert why == "about 60 s lie ahead; compiling pays from 300 on"
    assert not device.compile_pays("auto", "mps", 1e9)[0]


def test_compiling_more_layers_in_a_graph_is_for_longer_work():
    def least(n_layer: int, kind: str) -> str:
        return device.compile_pays("auto", kind, 0, n_layer)[1].split()[-2]

    assert [least(n, "cpu") for n in (2, 4, 12, 30)] == ["300", "300", "900", "375"]
    assert [least(n, "cuda") for n in (4, 32)] == ["120", "960"]


@needs_compiler
def test_compiling_is_done_where_it_pays_or_is_asked_for():
    assert device.compile_pays("auto", "cpu", 3000)[0]
    assert device.compile_pays("on", "cpu", 0)[0]


@pytest.mark.parametrize("hidden", ["compiler", "headers"])
def test_without_a_compiler_one_line_says_so_and_everything_runs_eagerly(tmp_path, hidden):
    """The compiler is hidden by a PATH that has Python alone; the headers by another place to look
    for them."""
    (tmp_path / "bin").mkdir()
    for name in ("python3", "git") + (("g++", "gcc", "as", "ld") if hidden == "headers" else ()):
        if found := sys.executable if name == "python3" else shutil.which(name):
            (tmp_path / "bin" / name).symlink_to(found)
    hide = "import sysconfig, runpy, sys; paths = sysconfig.get_paths\n" \
           "sysconfig.get_paths = lambda *a, **k: paths(*a, **k) | {'include': '/nowhere'}\n"
    (tmp_path / "mine.jsonl").write_text("".join(f'{{"text": "第{i}句话很好，值得看。"}}\n'
                                                 for i in range(300)), encoding="utf-8")
    code = (hide if hidden == "headers" else "import runpy, sys\n") + (
        "sys.argv = ['train.py', 'pretrain', '--preset', 'smoke', '--data', "
        f"{str(tmp_path / 'mine.jsonl')!r}, '--out', {str(tmp_path / 'out')!r}, '--compile', "
        f"'on']\nsys.path.insert(0, {str(ROOT)!r}); runpy.run_path({str(ROOT / 'train.py')!r}, "
        "run_name='__main__')")
    environment = os.environ | {"PATH": str(tmp_path / "bin"),
                                "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"),
                                "OMP_NUM_THREADS": "1"}
    environment.pop("CXX", None)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    said = [line for line in done.stdout.splitlines() if "torch.compile does not work here" in line]
    assert len(said) == 1 and "compile off" in said[0]
    assert ("no C++ compiler" if hidden == "compiler" else "headers are not in /nowhere") in said[0]


def test_deterministic_runs_give_the_same_weights_whatever_the_machine_offers(tmp_path):
    (tmp_path / "mine.jsonl").write_text("".join(f'{{"text": "第{i}句话很好，值得看。"}}\n'
                                                 for i in range(300)), encoding="utf-8")
    hashes = set()
    for threads, vectors in (("1", "default"), ("4", "avx512")):
        out = tmp_path / threads
        words = ["pretrain", "--preset=smoke", "--d_model=128", "--tokens=2000", "--deterministic",
                 f"--data={tmp_path / 'mine.jsonl'}", f"--out={out}"]
        subprocess.run([sys.executable, "train.py", *words], check=True, capture_output=True,
                       cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": threads,
                                                   "ATEN_CPU_CAPABILITY": vectors,
                                                   "MOSSLET_CACHE": str(tmp_path / "cache")})
        hashes.add(weights_hash(load_checkpoint(out / "mine" / "pretrain")[0]))
    assert len(hashes) == 1
