"""Where and how to compute: the device, the precision of matrix products, and whether compiling
pays."""
import contextlib
import functools
import math
import os
import shutil
import sysconfig
import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from runtime.options import UserError


def pick_device(device: str) -> str:
    """`auto` is CUDA, then Apple's MPS, then the CPU; a device that is not there is an error."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(),
                 "cpu": True}
    if device == "auto":
        return next(name for name, there in available.items() if there)
    if not available[device]:
        raise UserError(f"--device {device}: this torch ({torch.__version__}) sees no such device; "
                        "use --device auto or cpu")
    return device


def half_is_fast(device: str) -> bool:
    """Whether products of bfloat16 may be faster than those of float32. A CPU without 512-bit vectors,
    as most laptops have it, has no kernel for them: there they took 280 times as long (measured). The
    answer follows from the instructions in use, so --deterministic has the same one on all machines."""
    return device != "cpu" or torch.backends.cpu.get_cpu_capability() == "AVX512"


def dtype_of(state: dict[str, Any], device: str) -> str:
    """The precision that a checkpoint's run computed in, to measure it alike; float32 where bfloat16 is slow."""
    return state.get("dtype", "float32") if half_is_fast(device) else "float32"


def pick_dtype(dtype: str, device: str, width: int, rows: int = 1024,
               repeats: int = 60) -> tuple[str, str]:
    """(dtype, reason). `auto` times one layer's matrix product in float32, and in bfloat16 with the
    conversions of autocast.

    A CPU's flags do not tell which is faster: of two with bfloat16 instructions, one gained 2.4x
    and one lost. At small widths the conversions of autocast cost the gain, so bfloat16 has to win
    by a clear margin.
    """
    if dtype != "auto":
        return dtype, "as asked"
    if device == "cuda":
        if torch.cuda.is_bf16_supported():
            return "bfloat16", "this GPU has bfloat16 units"
        return "float32", "this GPU has no bfloat16 units"
    if device == "mps" or width < 128:
        return "float32", "bfloat16 gains nothing at this width, or is not measured on this device"
    if not half_is_fast(device):
        return "float32", "this CPU has no fast products of bfloat16"
    x, w = torch.randn(rows, width), torch.randn(4 * width, width)
    best = {torch.float32: math.inf, torch.bfloat16: math.inf}
    # In turns, and the best of each, so that other load on the machine favours neither.
    for _ in range(repeats):
        for cast in best:
            start = time.perf_counter()
            F.linear(x.to(cast), w.to(cast)).float()
            best[cast] = min(best[cast], time.perf_counter() - start)
    full, half = best.values()
    chosen = "bfloat16" if half < 0.8 * full else "float32"
    return chosen, (f"a {rows}x{width}x{4 * width} product takes {1e3 * full:.2f} ms in float32, "
                    f"{1e3 * half:.2f} in bfloat16")


# What --deterministic fixes beside the number of threads: on each machine `auto` may choose others.
ALIKE = {"dtype": "float32", "products": "aten", "compile": "off"}
THREADS_ALIKE = 2


# Longer vectors would add in another order; torch and its libraries read these when they first
# compute. The last is asked for by cuBLAS.
INSTRUCTIONS_ALIKE = {"ATEN_CPU_CAPABILITY": "avx2", "MKL_CBWR": "AVX2",
                      "ONEDNN_MAX_CPU_ISA": "AVX2", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}


def compute_alike() -> None:
    """For --deterministic: fix the threads, the instructions and with them the order of every sum,
    so that processors with AVX2 give the same digits. Call it before anything is computed."""
    os.environ.update(INSTRUCTIONS_ALIKE)
    torch.set_num_threads(THREADS_ALIKE)
    torch.use_deterministic_algorithms(True, warn_only=True)


def precision(dtype: str, device: str) -> contextlib.AbstractContextManager:
    """Context for forwards: autocast lowers matrix products to bfloat16; weights, norms and losses
    stay float32."""
    if dtype == "bfloat16":
        return torch.autocast(device, torch.bfloat16)
    return contextlib.nullcontext()


# Compiling the demo's four layers takes 15 to 40 s and saves some 15 % on a CPU: it pays from this
# many seconds of work, and of more work where more layers are compiled.
COMPILE_FROM = {"cpu": 300.0, "cuda": 120.0}
COMPILE_FROM_LAYERS = 4

# One graph of all layers is the fastest, because a call costs up to 0.2 ms, but each layer adds two
# seconds of compiling. On a CPU a model that is deeper than SHALLOW has a graph of at most so many
# layers, compiled once and called for each such group of them.
SHALLOW, LAYERS_IN_A_GRAPH = 12, 5


def layers_compiled(n_layer: int, device: str) -> int:
    """How many of a model's layers one graph holds: all, or as many as divide them into equal groups.
    On a GPU all: there a call of a graph is not free beside what it computes."""
    if device != "cpu" or n_layer <= SHALLOW:
        return n_layer
    return max(n for n in range(1, LAYERS_IN_A_GRAPH + 1) if n_layer % n == 0)


@functools.lru_cache(maxsize=2)
def compiler_fault(device: str = "cpu") -> str:
    """Why torch.compile does not work here, in one line; empty if it works on a small function."""
    compiler, headers = os.environ.get("CXX", "g++"), sysconfig.get_paths()["include"]
    if shutil.which(compiler) is None:
        return (f"there is no C++ compiler ({compiler}): install g++, or name yours in the "
                "variable CXX")
    if not os.path.exists(os.path.join(headers, "Python.h")):
        return f"Python's headers are not in {headers}: install them (Debian: python3-dev)"
    try:
        x = torch.arange(4096.0, device=device)
        right = torch.equal(torch.compile(lambda x: 2 * x + 1)(x), 2 * x + 1)
        return "" if right else "torch.compile computes a wrong result"
    except Exception as error:  # the compiler, the linker and triton raise many kinds
        message = str(error)
        if "omp.h" in message or "gomp" in message or "fopenmp" in message:
            return "OpenMP is missing: install libgomp (with clang: libomp-dev)"
        lines = [line for line in message.splitlines() if line.strip()]
        return f"it fails with {type(error).__name__}: {lines[0][:150] if lines else ''}"


def compile_pays(asked: str, device: str, seconds_ahead: float,
                 n_layer: int = COMPILE_FROM_LAYERS) -> tuple[bool, str]:
    """(whether to compile, reason) for `--compile on` or `auto`, with about `seconds_ahead` seconds
    of work to do by a model of `n_layer` layers."""
    size = max(1, layers_compiled(n_layer, device) / COMPILE_FROM_LAYERS)
    least = size * COMPILE_FROM.get(device, math.inf)
    if asked == "auto" and seconds_ahead < least:
        return False, f"about {seconds_ahead:.0f} s lie ahead; compiling pays from {least:.0f} on"
    if fault := compiler_fault(device):
        return False, f"torch.compile does not work here, so everything runs eagerly: {fault}"
    return True, "as asked" if asked == "on" else f"about {seconds_ahead:.0f} s lie ahead"


def compile_trunks(*models: nn.Module) -> None:
    """Compile each model's trunk, the part that all stages share: in one graph, or of a deep one
    (see `layers_compiled`) a block, whose graph all blocks share. Models of one shape share graphs;
    numbers of rows, lengths and selected positions are dynamic."""
    torch._dynamo.config.cache_size_limit = max(64, torch._dynamo.config.cache_size_limit)
    for model in models:
        n_layer = len(model.blocks)
        if layers_compiled(n_layer, model.embedding.weight.device.type) < n_layer:
            for block in model.blocks:
                block.compile(dynamic=True)  # not part of a copy, nor of what is saved
        elif "trunk" not in vars(model):  # otherwise it is compiled already
            model.trunk = torch.compile(model.trunk, dynamic=True)
