"""Atomic files, signals, memory, and the names of code and processor for a run's record."""
import contextlib
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

try:
    import resource
except ImportError:  # Windows
    resource = None


def replace_text(path: pathlib.Path, text: str) -> None:
    """Write a file atomically: under a temporary name, then renamed."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def save_whole(path: pathlib.Path, payload: Any) -> None:
    """torch.save, atomically; UserError if the file cannot be written.

    The payload is written under a temporary name, synced to the disk and then renamed, so that a
    kill or a full disk at any moment leaves the previous file as it was.
    """
    temporary = path.with_suffix(".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            torch.save(payload, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
        with contextlib.suppress(OSError):  # it may not exist, nor its folder
            temporary.unlink()
        previous = " (the previous one is kept)" if path.exists() else ""
        raise UserError(f"{path}: cannot be written: {error}{previous}; check the path, the rights "
                        "and the free space, or choose another --out") from error


class Interrupted(Exception):
    """Raised after an interrupted run was saved; its argument is the signal's number."""


class Interrupt:
    """Ctrl-C and SIGTERM ask for a stop after the present step; a second Ctrl-C stops at once.

    number: the signal that asked for it; 0 if none has.
    """

    number = 0

    @classmethod
    def install(cls) -> None:
        """Handle both signals from now on."""
        def handle(number: int, _) -> None:
            if cls.number and number == signal.SIGINT:
                raise KeyboardInterrupt
            cls.number = number
            print("\nfinishing this step, then saving …", file=sys.stderr)

        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, handle)


def keep_freed_memory() -> None:
    """Let glibc keep freed blocks of less than 32 MiB; with another C library this does nothing.

    Otherwise glibc returns freed pages to the OS and every step page-faults them in again: a third
    of the time of a step whose shapes vary, on CPU (measured). Larger blocks are returned: kept,
    they leave holes in the heap that the next ones, a little larger, do not fit into.
    """
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-3, 2**25)  # M_MMAP_THRESHOLD, at its maximum: larger blocks are mapped
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: the heap's top is never returned
    except (OSError, AttributeError):
        return


def git_commit() -> str:
    """Commit of the code (10 digits or more), with a + if files differ from it; empty outside a
    clone."""
    words = ["git", "describe", "--always", "--dirty=+", "--abbrev=10", "--exclude=*"]
    try:
        commit = subprocess.run(words, cwd=pathlib.Path(__file__).parent, capture_output=True,
                                text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return commit.stdout.strip()


def processor() -> str:
    """The CPU's name as the system gives it (on Linux), else its kind."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines
                    if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def peak_memory_mb() -> int | None:
    """The most memory that this process has held so far, in MB; None where the system does not say.
    """
    if resource is None:
        return None
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, kibibytes elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit // 10**6


# Numbers that `row_chunks` lets a function hold at once: in float32 ¼ GiB, on CUDA 1 GiB. Without
# gradients a chunk costs nothing, so there it holds a sixteenth of them.
NUMBERS_AT_ONCE = {"cpu": 2**26, "mps": 2**26, "cuda": 2**28}


def row_chunks(function: Callable[..., tuple[Tensor, ...]], numbers: int,
               *rows: Tensor) -> tuple[Tensor, ...]:
    """function(*rows), a tuple of tensors, in chunks of rows if memory asks for it.

    function: row-wise, with `numbers` intermediate values per row. Above NUMBERS_AT_ONCE of them in
    all, one chunk is computed after another, and backward recomputes each chunk: peak memory stays
    bounded at the price of one more forward.
    """
    at_once = NUMBERS_AT_ONCE[rows[0].device.type] // (1 if torch.is_grad_enabled() else 16)
    size = max(1, at_once // numbers)
    if len(rows[0]) <= size:
        return function(*rows)
    parts = [checkpoint(function, *piece, use_reentrant=False, preserve_rng_state=False)
             for piece in zip(*(x.split(size) for x in rows), strict=True)]
    return tuple(torch.cat(part) for part in zip(*parts, strict=True))
