"""Files are written atomically, signals ask for a stop, and row-wise work fits into memory."""
import os
import pathlib
import signal
import subprocess
import sys

import pytest
import torch

from runtime import machine
from runtime.machine import (Interrupt, git_commit, keep_freed_memory, peak_memory_mb, processor,
                             replace_text, row_chunks, save_whole)
from runtime.options import UserError
from tests.conftest import ROOT

# ---- files ---------------------------------------------------------------------------------------


def killed(*_) -> None:
    raise KeyboardInterrupt


def test_text_replaces_the_file_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "config.json"
    path.write_text("old, and longer", encoding="utf-8")
    replace_text(path, "新")
    assert path.read_text(encoding="utf-8") == "新"
    assert list(tmp_path.iterdir()) == [path]


def test_a_stop_before_the_renaming_keeps_the_old_text(tmp_path, monkeypatch):
    path = tmp_path / "config.json"
    path.write_text("old", encoding="utf-8")
    monkeypatch.setattr(machine.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        replace_text(path, "new")
    assert path.read_text(encoding="utf-8") == "old"


def test_a_payload_is_saved_and_its_folder_is_made(tmp_path):
    path = tmp_path / "new" / "checkpoint.pt"
    save_whole(path, {"step": 3})
    assert torch.load(path, weights_only=True) == {"step": 3}
    assert list(path.parent.iterdir()) == [path]


def test_a_payload_is_synced_before_it_is_renamed(tmp_path, monkeypatch):
    order, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(machine.os, "fsync", lambda f: order.append("synced") or fsync(f))
    monkeypatch.setattr(machine.os, "replace", lambda *a: order.append("renamed") or replace(*a))
    save_whole(tmp_path / "checkpoint.pt", {"step": 1})
    assert order == ["synced", "renamed"]


def test_a_stop_before_the_renaming_keeps_the_old_payload(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pt"
    save_whole(path, {"step": 1})
    monkeypatch.setattr(machine.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        save_whole(path, {"step": 2})
    assert torch.load(path, weights_only=True) == {"step": 1}


@pytest.mark.skipif(not pathlib.Path("/dev/full").exists(), reason="Linux only")
def test_a_full_disk_keeps_the_old_payload_and_is_reported(tmp_path):
    path = tmp_path / "checkpoint.pt"
    save_whole(path, {"step": 1})
    (tmp_path / "checkpoint.tmp").symlink_to("/dev/full")
    with pytest.raises(UserError, match="checkpoint.pt.*No space left.*previous one is kept"):
        save_whole(path, {"step": 2})
    assert torch.load(path, weights_only=True) == {"step": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_first_save_claims_no_previous_file(tmp_path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(UserError, match="cannot be written") as error:
        save_whole(tmp_path / "file" / "checkpoint.pt", {"step": 1})
    assert "kept" not in str(error.value)


# ---- signals -------------------------------------------------------------------------------------

@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_first_signal_asks_for_a_stop(number, capsys):
    Interrupt.install()
    assert Interrupt.number == 0
    signal.raise_signal(number)
    assert Interrupt.number == number
    assert "finishing this step" in capsys.readouterr().err


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_after_a_signal_stops_at_once(first):
    Interrupt.install()
    signal.raise_signal(first)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_a_second_sigterm_still_waits_for_the_step():
    Interrupt.install()
    signal.raise_signal(signal.SIGTERM)
    signal.raise_signal(signal.SIGTERM)
    assert Interrupt.number == signal.SIGTERM


# ---- the machine ---------------------------------------------------------------------------------

def test_freed_memory_is_left_alone_where_there_is_no_glibc(monkeypatch):
    def missing(name):
        raise OSError(name)

    monkeypatch.setattr(machine.ctypes, "CDLL", missing)
    keep_freed_memory()  # raises nothing


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc, and /proc")
def test_small_freed_blocks_are_kept_and_large_ones_returned():
    code = """
import torch
from runtime.machine import keep_freed_memory
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
print(kept, held() - before)
"""
    kept, after = map(int, subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True,
                                          capture_output=True, text=True).stdout.split())
    assert kept >= 75
    assert after < kept + 16


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
