"""What the benchmarks share: models and prompts to measure on, measuring in turns, the limits of
this machine."""
import dataclasses
import functools
import json
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from model import ModelConfig, Transformer
from runtime.device import half_is_fast
from runtime.machine import processor
from runtime.options import Options, option
from runtime.products import _onednn, _product, pick_products, use_products

# 12.2 and 109.5 million parameters.
SMALL = ModelConfig(vocab_size=4096, n_layer=6, n_head=6, n_kv_head=6, d_model=384, d_ff=1024,
                    max_len=256)
BASE = ModelConfig(vocab_size=32_000, n_layer=12, n_head=12, n_kv_head=12, d_model=768, d_ff=2048,
                   max_len=256)
TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclasses.dataclass
class BenchOptions(Options):
    """`python -m tools.bench [limits|decode|gae|train|ppo|growth|all]`"""

    repeats: int = option(5, "measurements of each figure, in turns", low=1)
    peers: bool = option(False, "measure the peers, too, in turns with ours")
    peer_python: str = option(sys.executable, "Python in whose environment the peers are installed")
    peers_folder: str = option("../shared/peers", "folder of the peers' scripts")
    traceback: bool = option(False, "show where in the code an error arose")


@functools.lru_cache(maxsize=1)
def best_products() -> str:
    """"aten" or "onednn", whichever multiplies float32 matrices faster here; measured once."""
    return pick_products("cpu", SMALL.d_model)[0]


def random_model(config: ModelConfig) -> Transformer:
    """An untrained model with the faster products."""
    model = Transformer(config)
    model.initialise(1)
    use_products(model, best_products())
    return model.eval()


def random_prompts(config: ModelConfig, n: int, length: int = 32) -> tuple[Tensor, Tensor]:
    """n prompts of one length: (tokens, mask), each (n, length)."""
    tokens = torch.randint(1, config.vocab_size, (n, length),
                           generator=torch.Generator().manual_seed(0))
    return tokens, torch.ones_like(tokens).bool()


# ---- measuring -----------------------------------------------------------------------------------

def seconds(work: Callable, *arguments, **settings) -> float:
    """How long one call takes."""
    start = time.perf_counter()
    work(*arguments, **settings)
    return time.perf_counter() - start


def several(work: Callable[[], object], n: int) -> None:
    """Call `work` n times."""
    for _ in range(n):
        work()


def in_turns(works: dict[str, Callable[[], object]], repeats: int,
             inner: int = 1) -> dict[str, list[float]]:
    """Seconds per call of each work, measured `repeats` times in turns, each time over `inner`
    calls; the first round is not counted."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for i in range(-1, repeats):
        for name, work in works.items():
            took = seconds(several, work, inner) / inner
            if i >= 0:
                times[name].append(took)
    return times


def fastest(works: Sequence[Callable[[], object]], repeats: int = 5, inner: int = 3) -> float:
    """The least seconds that any of these takes: a limit."""
    return min(min(times) for times in in_turns(dict(enumerate(works)), repeats, inner).values())


def median_range(values: Sequence[float], digits: int = 2) -> str:
    """Median, then least and greatest in brackets, as text."""
    middle, low, high = statistics.median(values), min(values), max(values)
    return f"{middle:.{digits}f} ({low:.{digits}f}–{high:.{digits}f})"


def ratio(above: Sequence[float], below: Sequence[float]) -> str:
    """Median and range of the ratios of measurements taken in turns."""
    return median_range([a / b for a, b in zip(above, below, strict=True)])


def say(title: str, rows: Sequence[Sequence[object]], columns: Sequence[str]) -> None:
    """Print a table in Markdown."""
    print(f"\n{title}\n\n| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
    for row in rows:
        print("| " + " | ".join(map(str, row)) + " |")
    sys.stdout.flush()


def peer(o: BenchOptions, script: str, *arguments: str) -> dict | None:
    """The JSON line that a peer's script ends with; None without --peers, and where the script
    cannot run, with a printed line that says why."""
    if not o.peers:
        return None
    path = pathlib.Path(o.peers_folder) / script
    if not path.exists():
        print(f"{path}: not there, so this peer is left out (--peers_folder says where to look)")
        return None
    done = subprocess.run([o.peer_python, str(path), *arguments], capture_output=True, text=True)
    if done.returncode:
        error = done.stderr.strip().splitlines()[-1][:150] if done.stderr else ""
        print(f"{path}: left out, it ends with: {error}")
        return None
    return json.loads(done.stdout.strip().splitlines()[-1])


# ---- limits --------------------------------------------------------------------------------------

def bandwidth() -> float:
    """Bytes read and written a second by copying 256 MB."""
    source = torch.randn(2**26)
    target = torch.empty_like(source)
    return 2 * 4 * 2**26 / fastest([lambda: target.copy_(source)])


def product_forms(rows: int, n_in: int, n_out: int,
                  dtype: torch.dtype) -> list[Callable[[], Tensor]]:
    """x (rows, n_in) @ w (n_out, n_in)ᵀ in each available form, F.linear first."""
    x, w = torch.randn(rows, n_in).to(dtype), torch.randn(n_out, n_in).to(dtype)
    forms = [lambda: F.linear(x, w)]
    if _onednn is not None and (dtype == torch.float32 or half_is_fast("cpu")):
        forms.append(lambda: _product(x, w))
    return forms


def limits(o: BenchOptions) -> dict:
    """The machine's memory bandwidth, and matrix products by type: fastest form and F.linear."""
    limit_of = {"copy_GB_s": round(bandwidth() / 1e9, 1)}
    for rows, n_in, n_out in ((2048, 2048, 2048), (2048, 384, 1024)):
        gflop = 2e-9 * rows * n_in * n_out
        for name, dtype in TYPES.items():
            forms, label = product_forms(rows, n_in, n_out, dtype), f"{name}_{rows}x{n_in}x{n_out}"
            limit_of[f"{label}_GFLOP_s"] = round(gflop / fastest(forms))
            limit_of[f"{label}_F.linear_GFLOP_s"] = round(gflop / fastest(forms[:1]))
    say(f"Limits of this machine ({processor()}, {torch.get_num_threads()} threads, torch "
        f"{torch.__version__})", limit_of.items(), ("limit", "value"))
    return limit_of


def step_products(config: ModelConfig) -> list[tuple[int, int]]:
    """(n_in, n_out) of every product of one decoding step."""
    heads = (config.n_head + 2 * config.n_kv_head) * config.head_dim
    layer = [(config.d_model, heads), (config.d_model, config.d_model),
             (config.d_model, 2 * config.d_ff), (config.d_ff, config.d_model)]
    return layer * config.n_layer + [(config.d_model, config.vocab_size)]
