"""Files, memory, signals, and what machine this is."""
import ctypes
import os
import pathlib
import platform
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from runtime.options import UserError


def replace_text(path: pathlib.Path, text: str) -> None:
    """Write a file atomically: under a temporary name, then renamed."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def save_whole(path: pathlib.Path, payload: Any) -> None:
    """torch.save, atomically: written under a temporary name, synced to the disk and then
    renamed, so that a kill or a full disk at any moment leaves the previous file as it was."""
    temporary = path.with_suffix(".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            torch.save(payload, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
        temporary.unlink(missing_ok=True)
        previous = " (the previous one is kept)" if path.exists() else ""
        raise UserError(f"{path}: cannot be written: {error}{previous}; free some space or choose "
                        "another --out") from error


class Interrupted(Exception):
    """Raised after an interrupted run was saved; holds the signal's number."""


class Interrupt:
    """Ctrl-C and SIGTERM ask for a stop after the present step; a second Ctrl-C stops at once."""

    number = 0

    @classmethod
    def install(cls) -> None:
        def handle(number: int, _) -> None:
            if cls.number and number == signal.SIGINT:
                raise KeyboardInterrupt
            cls.number = number
            print("\nfinishing this step, then saving …", file=sys.stderr)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, handle)


def keep_freed_memory() -> None:
    """Let glibc keep freed memory; with another C library this does nothing.

    Otherwise glibc returns freed pages to the OS and every step page-faults them in again: a third
    of the time of a step whose shapes vary, on CPU (measured).
    """
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no block is mapped by itself
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: the heap's top is never returned
    except (OSError, AttributeError):
        return


def git_commit() -> str:
    """Commit of the code, with a + where files differ from it; empty outside a clone."""
    here = pathlib.Path(__file__).parent
    try:
        commit = subprocess.run(["git", "describe", "--always", "--dirty=+", "--abbrev=10",
                                 "--exclude=*"], cwd=here,
                                capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return commit.stdout.strip()


def processor() -> str:
    """The CPU's own name where the system tells it."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines
                    if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()

# in float32 a quarter of a GiB, or one, for an array
NUMBERS_AT_ONCE = {"cpu": 2**26, "mps": 2**26, "cuda": 2**28}


def row_chunks(function: Callable[..., tuple[Tensor, ...]], numbers: int,
               *rows: Tensor) -> tuple[Tensor, ...]:
    """function(*rows), in chunks of rows if the function holds too many numbers in between.

    function: treats each row by itself and holds `numbers` numbers for each. Above NUMBERS_AT_ONCE
    in all, one chunk is computed after another, and the backward recomputes each chunk, which costs
    the time of one more forward.
    """
    size = max(1, NUMBERS_AT_ONCE[rows[0].device.type] // numbers)
    if len(rows[0]) <= size:
        return function(*rows)
    parts = [checkpoint(function, *piece, use_reentrant=False, preserve_rng_state=False)
             for piece in zip(*(x.split(size) for x in rows), strict=True)]
    return tuple(torch.cat(part) for part in zip(*parts, strict=True))
