"""Whether to compile, that a compiled trunk learns the same, and that machines can compute alike."""
import os
import pathlib
import shutil
import subprocess
import sys

import pytest
import torch

from model import ModelConfig, Transformer, load_checkpoint, weights_hash
from runtime import device
from tests.conftest import TINY, noise

ROOT = pathlib.Path(__file__).parent.parent
CONFIG = ModelConfig(**TINY)
needs_compiler = pytest.mark.skipif(bool(device.compiler_fault()), reason=device.compiler_fault())


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


def test_compiling_is_for_long_work():
    compiles, why = device.compile_pays("auto", "cpu", 60)
    assert not compiles
    assert why == "about 60 s lie ahead; compiling pays from 300 on"
    assert not device.compile_pays("auto", "mps", 1e9)[0]


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
