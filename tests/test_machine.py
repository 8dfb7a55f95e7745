"""Signals ask for a stop, and row-wise work fits into memory."""
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import pytest
import torch

from runtime import machine
from runtime.machine import (Interrupt, Interrupted, git_commit, keep_freed_memory, peak_memory_mb,
                             processor, require_finite, row_chunks, shell_word)
from runtime.options import UserError
from tests.conftest import ROOT

# ---- signals -------------------------------------------------------------------------------------

SIGNALS = [signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]


@pytest.mark.parametrize("number", SIGNALS)
def test_while_steps_are_under_way_a_signal_asks_for_a_stop(number, capsys):
    Interrupt.install()
    Interrupt.stepping = True
    assert Interrupt.number == 0
    signal.raise_signal(number)
    assert Interrupt.number == number
    assert "finishing this step" in capsys.readouterr().err


@pytest.mark.parametrize("number", SIGNALS)
def test_while_no_step_is_under_way_a_signal_stops_at_once(number):
    Interrupt.install()
    with pytest.raises(Interrupted) as stop:
        signal.raise_signal(number)
    assert stop.value.args == (number,)


def test_no_handler_of_faults_takes_an_interruption_for_one():
    assert not issubclass(Interrupted, Exception)


@pytest.mark.parametrize("first", SIGNALS)
def test_ctrl_c_after_a_signal_stops_at_once(first):
    Interrupt.install()
    Interrupt.stepping = True
    signal.raise_signal(first)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_a_second_sigterm_still_waits_for_the_step():
    Interrupt.install()
    Interrupt.stepping = True
    signal.raise_signal(signal.SIGTERM)
    signal.raise_signal(signal.SIGTERM)
    assert Interrupt.number == signal.SIGTERM


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has no SIGHUP")
def test_nohup_still_works():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    Interrupt.install()
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), RuntimeError("reentrant call")])
def test_a_terminal_that_is_gone_or_busy_does_not_break_the_stop(error, monkeypatch):
    def broken(*_, **__):
        raise error

    Interrupt.install()
    Interrupt.stepping = True
    monkeypatch.setattr(sys.stderr, "write", broken)
    signal.raise_signal(signal.SIGTERM)
    assert Interrupt.number == signal.SIGTERM


# ---- the machine ---------------------------------------------------------------------------------

def test_freed_memory_is_left_alone_where_there_is_no_glibc(monkeypatch):
    def missing(name):
        raise OSError(name)

    monkeypatch.setattr(machine.ctypes, "CDLL", missing)
    keep_freed_memory()  # raises nothing


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc, and /proc")
def test_small_freed_blocks_are_kept_until_they_are_asked_for_and_large_ones_returned():
    code = """
import torch
from runtime.machine import keep_freed_memory, return_freed_memory
torch.set_num_threads(1)

def held():  # MiB
    return int(open("/proc/self/statm").read().split()[1]) * 4096 >> 20

keep_freed_memory()
before = held()
blocks = [torch.ones(2**20) for _ in range(20)]  # of 4 MiB
del blocks
kept = held() - before
for n in range(20):
    torch.ones(2**24 + n * 2**20)  # of 64 MiB and more, each a little larger
after = held() - before
return_freed_memory()
print(kept, after, held() - before)
"""
    kept, after, returned = map(int, subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True,
                                          capture_output=True, text=True).stdout.split())
    assert kept >= 75
    assert after < kept + 16
    assert returned < 25


@pytest.mark.skipif(machine.resource is None, reason="this system does not say")
def test_the_peak_of_memory_counts_what_was_held_and_freed():
    before = peak_memory_mb()
    held = torch.ones(before * 300_000)  # 1.2 times as much
    del held
    assert 1.2 * before < peak_memory_mb() < 4 * before


def repository(folder: pathlib.Path) -> None:
    """A clone with one commit, whose runtime/machine.py it is."""
    (folder / "runtime").mkdir()
    (folder / "runtime" / "machine.py").write_text("", encoding="utf-8")
    for words in (["init", "-q"], ["add", "."],
                  ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "first"]):
        subprocess.run(["git", *words], cwd=folder, check=True)


def test_the_commit_is_that_of_the_code_and_says_if_files_differ(tmp_path, monkeypatch):
    repository(tmp_path)
    monkeypatch.setattr(machine, "__file__", str(tmp_path / "runtime" / "machine.py"))
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=tmp_path, capture_output=True,
                          text=True, check=True).stdout
    assert git_commit() == head[:10]
    (tmp_path / "runtime" / "machine.py").write_text("changed", encoding="utf-8")
    assert git_commit() == head[:10] + "+"


def test_outside_a_clone_the_commit_is_empty(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "__file__", str(tmp_path / "machine.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert git_commit() == ""


def test_a_processor_that_the_system_does_not_name_is_named_by_its_kind(monkeypatch):
    monkeypatch.setattr(machine.pathlib.Path, "read_text", lambda self: "flags : fpu\n")
    monkeypatch.setattr(machine.platform, "processor", lambda: "")
    monkeypatch.setattr(machine.platform, "machine", lambda: "riscv64")
    assert processor() == "riscv64"


def test_a_processor_has_the_name_that_the_system_gives(monkeypatch):
    monkeypatch.setattr(machine.pathlib.Path, "read_text",
                        lambda self: "flags : fpu\nmodel name : A CPU: fast\n")
    assert processor() == "A CPU: fast"


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_not_finite_are_refused_by_name(number):
    fine = torch.ones(2, 3)
    assert require_finite(fine, "scores") is fine
    fine[1, 2] = number
    with pytest.raises(UserError, match="^scores are not finite"):
        require_finite(fine, "scores")


# ---- row-wise work in chunks ---------------------------------------------------------------------

class Recorded:
    """A row-wise function of rows and weights that records how many rows each call is given."""

    def __init__(self):
        self.weight = torch.randn(4, 3, generator=torch.Generator().manual_seed(1)).requires_grad_()
        self.calls = []

    def __call__(self, x: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.calls.append(len(x))
        y = (x @ self.weight).tanh() * scale[:, None]
        return y, y.sum(1)


def outputs_and_gradients(function: Recorded) -> list[torch.Tensor]:
    """What a chunked call returns, and its gradients with respect to rows and weight."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(11, 4, generator=generator).requires_grad_()
    scale = torch.rand(11, generator=generator)
    y, sums = row_chunks(function, 3, x, scale)
    return [y, sums, *torch.autograd.grad((y * y).sum() + sums.sum(), [x, function.weight])]


def test_few_rows_are_one_call():
    function = Recorded()
    outputs_and_gradients(function)
    assert function.calls == [11]


def test_chunks_give_the_outputs_and_gradients_of_one_call(monkeypatch):
    at_once = outputs_and_gradients(Recorded())
    monkeypatch.setitem(machine.NUMBERS_AT_ONCE, "cpu", 4 * 3)
    in_chunks = outputs_and_gradients(Recorded())
    for a, b in zip(at_once, in_chunks, strict=True):
        torch.testing.assert_close(a, b)


def test_backward_recomputes_every_chunk_and_none_exceeds_the_limit(monkeypatch):
    monkeypatch.setitem(machine.NUMBERS_AT_ONCE, "cpu", 4 * 3)
    function = Recorded()
    outputs_and_gradients(function)
    assert function.calls[:3] == [4, 4, 3]
    assert sorted(function.calls[3:]) == [3, 4, 4]


def test_without_gradients_chunks_are_a_sixteenth(monkeypatch):
    monkeypatch.setitem(machine.NUMBERS_AT_ONCE, "cpu", 16 * 2 * 3)
    function = Recorded()
    with torch.no_grad():
        row_chunks(function, 3, torch.ones(5, 4), torch.ones(5))
    assert function.calls == [2, 2, 1]


def test_a_row_above_the_limit_is_a_chunk_of_its_own(monkeypatch):
    monkeypatch.setitem(machine.NUMBERS_AT_ONCE, "cpu", 2)
    function = Recorded()
    outputs_and_gradients(function)
    assert max(function.calls) == 1


@pytest.mark.skipif(not shutil.which("bash"), reason="no bash")
@pytest.mark.parametrize("word", ["a b", "it's\n", "x\ty\\z", "酒店\n好", "\x1b[0m", "\x85\u2028", "$HOME\n`x`"])
def test_a_shell_reads_back_each_word_of_a_printed_command(word):
    shown = shell_word(word)
    read = subprocess.run(["bash", "-c", f"printf %s {shown}"], capture_output=True, check=True,
                          env=os.environ | {"LC_ALL": "C.UTF-8"})
    assert read.stdout.decode() == word and shown.isprintable()
