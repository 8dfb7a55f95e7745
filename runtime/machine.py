"""Signals, memory, and the names of code and processor for a run's record."""
import contextlib
import ctypes
import gc
import os
import pathlib
import platform
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from runtime.options import BOOLS, Common, UserError
from runtime.terminal import silence

try:
    import resource
except ImportError:  # Windows
    resource = None


class Interrupted(KeyboardInterrupt):
    """A signal stops the command; its argument is the signal's number. No Exception, so that nobody
    takes it for a fault of a file or a compiler."""


class Interrupt:
    """Ctrl-C, SIGTERM and SIGHUP: while steps are under way they ask for a stop after the present
    one, otherwise they stop at once. A second Ctrl-C always stops at once.

    number: the signal that asked for it, 0 if none has. stepping: whether steps are under way.
    """

    number, stepping = 0, False

    @classmethod
    def install(cls) -> None:
        """Handle these signals from now on."""
        hang_up = getattr(signal, "SIGHUP", None)  # Windows has none
        terminals = [x for x in (sys.stdout, sys.stderr) if x is not None and x.isatty()]

        def handle(number: int, _) -> None:
            if number == hang_up:
                silence(*terminals)  # they are gone
            at_once = not cls.stepping or cls.number and number == signal.SIGINT
            cls.number = number
            with contextlib.suppress(OSError, RuntimeError):  # a print may be under way
                print("\nstopped at once; what was saved before is kept" if at_once
                      else "\nfinishing this step, then saving …", file=sys.stderr)
            if at_once:
                raise Interrupted(number)

        signal.signal(signal.SIGINT, handle)
        signal.signal(signal.SIGTERM, handle)
        if hang_up and signal.getsignal(hang_up) is not signal.SIG_IGN:  # nohup ignores it
            signal.signal(hang_up, handle)


def resume_command(o: Common) -> str:
    """The command that resumes what this process began, as it was typed and quoted for the shell.
    `train.py all` resumes without a flag."""
    kept = {"-": o.data, "--data=-": f"--data={o.data}"}  # of standard input, the file that it became
    given, words = [kept.get(word, word) for word in sys.argv[1:]], []
    typed = sys.orig_argv[:len(sys.orig_argv) - len(given)]  # with the interpreter
    if not typed or pathlib.Path(typed[-1]).stem != pathlib.Path(sys.argv[0]).stem:
        typed = ["python", "train.py"]  # main was called by other code
    resumes_anyway = o.resume
    while given:
        word = given.pop(0)
        if word.partition("=")[0] not in ("--resume", "--fresh"):
            words.append(word)
            continue
        resumes_anyway = False
        if "=" not in word and given and given[0].lower() in BOOLS:
            given.pop(0)
    words = [*typed, *words, *["--resume"] * (not resumes_anyway)]
    return subprocess.list2cmdline(words) if os.name == "nt" else " ".join(map(shell_word, words))


def shell_word(word: str) -> str:
    """A word as a shell reads it, on one line: control characters in the $'…' of bash and zsh."""
    if word.isprintable():
        return shlex.quote(word)
    return "$'" + "".join(f"\\{x}" if x in "\\'" else x if x.isprintable() else f"\\U{ord(x):08x}"
                          for x in word) + "'"


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


def return_freed_memory() -> None:
    """Give back to the system what `keep_freed_memory` has kept; with another C library this does
    nothing. Within tens of steps the kept blocks come to as much again as what is in use."""
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):
        return


def release_memory() -> None:
    """Between two stages of one process: collect what only refers to itself, and give freed memory back."""
    gc.collect()
    return_freed_memory()


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


def this_machine() -> dict[str, Any]:
    """What the last digits of a result may depend on."""
    versions = {"python": platform.python_version(), "torch": str(torch.__version__),
                "numpy": np.__version__}
    return {"commit": git_commit(), "processor": processor(), "threads": torch.get_num_threads(),
            "versions": versions}


def require_finite(x: Tensor, what: str, or_else: str = "") -> Tensor:
    """x itself; UserError if a number in it is NaN or infinite. It waits for a GPU once.

    what: names x. or_else: a further cause, with its remedy.
    """
    if not bool(x.isfinite().all()):
        raise UserError(f"{what} are not finite numbers (NaN or infinite): the weights are damaged "
                        "or training diverged (take another checkpoint, or train again at a lower "
                        f"learning rate){or_else}")
    return x


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
