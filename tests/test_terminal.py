"""Commands end in one line, their output takes every character, and a model's text has no power
over the terminal."""
import errno
import io
import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

from runtime import terminal
from runtime.terminal import (UserError, for_terminal, is_out_of_memory, memory_advice, reading,
                              run_main, take_all_characters)
from tests.conftest import ROOT


def raising(error: BaseException):
    """A main that raises an error."""
    def main(argv):
        raise error
    return main


# ---- how a command ends --------------------------------------------------------------------------

def test_a_command_that_ends_well_has_exit_code_0():
    assert run_main(lambda argv: None, []) == 0
    assert run_main(lambda argv: 143, []) == 143


def test_words_that_are_no_text_are_refused_whatever_the_command(capsys):
    assert run_main(lambda argv: 0, ["😀\udcff"]) == 2
    assert "not valid UTF-8" in capsys.readouterr().err


def test_errors_of_the_user_are_one_line_and_exit_code_2(capsys):
    assert run_main(raising(UserError("no such\nstage")), []) == 2
    assert capsys.readouterr().err == "error: no such stage\n"


@pytest.mark.parametrize("words,shown", [
    (["--traceback"], True), (["--traceback=true"], True), (["--traceback", "--seed=1"], True),
    (["--traceback=off"], False), (["--traceback", "0"], False), ([], False)])
def test_a_traceback_is_shown_on_request(words, shown, capsys):
    assert run_main(raising(UserError("no such stage")), words) == 2
    text = capsys.readouterr().err
    assert text.startswith("Traceback") == shown
    assert text.endswith("error: no such stage\n")


@pytest.mark.parametrize("number,remedy", [
    (errno.ENOSPC, "free some space"), (errno.EACCES, "check the rights"),
    (errno.EISDIR, "a folder is where a file belongs"), (errno.EIO, "the drive fails"),
    (errno.ENOENT, "check the path")])
def test_an_error_of_the_system_is_one_line_that_names_file_cause_and_remedy(number, remedy, capsys):
    assert run_main(raising(OSError(number, os.strerror(number), "out/metrics.jsonl")), []) == 2
    line, = capsys.readouterr().err.splitlines()
    assert "out/metrics.jsonl" in line
    assert os.strerror(number) in line
    assert remedy in line


def test_an_error_in_the_midst_of_a_read_names_the_file():
    with pytest.raises(UserError, match="^mine.jsonl: cannot be read: Input/output error; the drive"):
        with reading("mine.jsonl"):
            raise OSError(errno.EIO, "Input/output error")  # as `read` raises it: without a name


def test_ctrl_c_has_exit_code_130(capsys):
    assert run_main(raising(KeyboardInterrupt()), []) == 130
    assert capsys.readouterr().err == "\ninterrupted\n"


@pytest.mark.parametrize("error", [ZeroDivisionError(), RuntimeError("shapes do not fit")])
def test_our_own_errors_are_not_dressed_up_as_the_users(error):
    with pytest.raises(type(error)):
        run_main(raising(error), [])


@pytest.mark.parametrize("code", ["print('x' * 10)", "print('x' * 10**6)", "raise SystemExit(0)",
                                  "raise UserError('x')"])
def test_a_reader_that_has_seen_enough_ends_a_command_quietly(code):
    script = ("from runtime.terminal import run_main, UserError; import sys\n"
              f"def main(argv):\n    print('first')\n    {code}\nsys.exit(run_main(main, []))")
    reader, writer = os.pipe()
    os.close(reader)  # before anything is written
    running = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=writer,
                               stderr=subprocess.PIPE, text=True)
    os.close(writer)
    printed = running.communicate(timeout=60)[1]
    assert running.returncode == 128 + signal.SIGPIPE
    assert printed in ("", "error: x\n")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux only")
def test_a_full_disk_under_the_output_is_one_line():
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", "from runtime.terminal import run_main; import "
                               "sys; sys.exit(run_main(lambda argv: print('x'), []))"], cwd=ROOT,
                              stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2
    line, = done.stderr.splitlines()
    assert "No space left" in line


# ---- memory --------------------------------------------------------------------------------------

def huge_tensor() -> None:
    torch.empty(2**55)


def huge_array() -> None:
    np.empty(2**57)


@pytest.mark.parametrize("ask", [huge_tensor, huge_array, lambda: [0] * 2**59])
def test_memory_that_is_used_up_is_known_whoever_reports_it(ask, capsys):
    with pytest.raises((MemoryError, RuntimeError)) as caught:
        ask()
    assert is_out_of_memory(caught.value)
    assert run_main(lambda argv: ask(), []) == 2
    line, = capsys.readouterr().err.splitlines()
    assert line.startswith("error: out of memory")


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory. Tried"),
                                   RuntimeError("std::bad_alloc"), MemoryError(),
                                   RuntimeError("DefaultCPUAllocator: not enough memory: you"),
                                   OSError(errno.ENOMEM, "Cannot allocate memory")])
def test_the_advice_is_that_of_the_stage(error, capsys):
    assert run_main(memory_advice("lower --batch")(raising(error)), []) == 2
    assert capsys.readouterr().err == "error: out of memory (what was saved is kept): lower --batch\n"


def test_every_stage_and_command_names_options_that_it_has(monkeypatch):
    import data.prepare
    import evaluate
    import sample
    import train
    remedies = {}
    monkeypatch.setattr(terminal, "is_out_of_memory", lambda error: True)
    functions = {cls: function for cls, function in train.commands().values()} | {
        sample.SampleOptions: sample.main, evaluate.EvaluateOptions: evaluate.main,
        data.prepare.PrepareOptions: data.prepare.main}
    for cls, function in functions.items():
        with pytest.raises(UserError) as caught:
            function(raising(MemoryError)) if cls in remedies else function(Exploding())
        names = {word.strip(",()") for word in str(caught.value).split() if word.startswith("--")}
        assert names
        assert {name[2:].strip(",()") for name in names} <= set(cls.__dataclass_fields__)


class Exploding:
    """Options or words that cannot even be looked at."""

    def __getattr__(self, name):
        raise MemoryError

    def __iter__(self):
        raise MemoryError

    def __len__(self):
        raise MemoryError


# ---- output --------------------------------------------------------------------------------------

def stream(encoding: str, **more) -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BytesIO(), encoding=encoding, **more)


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "gbk", "latin-1", "utf-8"])
def test_an_output_takes_every_character_whatever_its_encoding(encoding):
    out = stream(encoding)
    take_all_characters(out, windows=False)
    out.write("这本书 ± − … \udcff 😀\n")
    out.flush()
    assert out.buffer.getvalue()
    assert out.encoding == encoding


def test_files_and_pipes_are_utf8_on_windows_unless_asked_otherwise(monkeypatch):
    monkeypatch.delenv("PYTHONIOENCODING", raising=False)
    out = stream("cp1252")
    take_all_characters(out, windows=True)
    assert out.encoding == "utf-8"
    monkeypatch.setenv("PYTHONIOENCODING", "cp1252")
    out = stream("cp1252")
    take_all_characters(out, windows=True)
    assert out.encoding == "cp1252"


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "gbk"])
@pytest.mark.parametrize("words", [["train.py", "ppo", "--help"], ["train.py", "--kl_coéff=1"],
                                   ["sample.py", "--help"]], ids=" ".join)
def test_help_and_errors_are_printed_in_any_encoding(encoding, words):
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True,
                          env={**os.environ, "PYTHONIOENCODING": encoding, "OMP_NUM_THREADS": "1"})
    assert done.returncode == (0 if "--help" in words else 2)
    assert b"Traceback" not in done.stderr


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


CONTROL = "\x1b]0;title\x07 \x1b[2J a\rb \x08 \x00 \x7f \x9b31m \u202e"


def test_a_terminal_gets_control_characters_as_escapes(monkeypatch):
    shown = for_terminal(CONTROL + "\n\t好", Terminal())
    assert "\x1b" not in shown
    assert all(c.isprintable() or c in "\n\t" for c in shown)
    assert shown.endswith("\n\t好")
    assert json.loads(f'"{for_terminal(CONTROL, Terminal())}"') == CONTROL


def test_a_file_gets_the_text_as_it_is():
    assert for_terminal(CONTROL, io.StringIO()) == CONTROL


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
@pytest.mark.parametrize("before", [signal.SIG_DFL, signal.SIG_IGN])
@pytest.mark.parametrize("script", ["train.py", "evaluate.py", "sample.py"])
def test_ctrl_c_while_torch_is_loaded_ends_a_command_at_once(tmp_path, script, before):
    (tmp_path / "torch.py").write_text("import os, time\nos.kill(os.getpid(), 2)\ntime.sleep(9)\n")
    done = subprocess.run([sys.executable, ROOT / script, "--help"], capture_output=True, timeout=60,
                          env=os.environ | {"PYTHONPATH": str(tmp_path)},
                          preexec_fn=lambda: signal.signal(signal.SIGINT, before))
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, b"", b"")
