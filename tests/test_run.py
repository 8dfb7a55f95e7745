"""A run: its folder is locked and compared, its choices are kept, its log is cut at the
checkpoint's step."""
import json
import shlex
import subprocess
import sys

import pytest
import torch

from model import ModelConfig, Transformer, load_checkpoint, open_run, save_checkpoint
from runtime.machine import Interrupt, Interrupted
from runtime.options import UserError
from runtime.run import (Compute, Progress, Run, RunFolder, data_name, resume_command, run_folder,
                         stored_state)
from tests.conftest import TINY


@pytest.fixture
def open_sft(command, world):
    """open_sft(*words, init=…) opens a run of the stage sft with a tiny model."""
    def opened(*words, init="one") -> Run | None:
        return open_run("sft", command("sft", *words), world.data, {"init": init},
                        Transformer(ModelConfig(**{**TINY, "vocab_size": 500})), world.data.tokenizer)
    return opened


def begin(run: Run, step: int) -> None:
    """Train nothing, and leave a checkpoint after so many steps."""
    with run.progress(4):
        run.save(step)


def test_a_run_resumes_from_its_checkpoint(open_sft):
    begin(open_sft(), 3)
    run = open_sft("--resume")
    assert (run.step, run.state["step"]) == (3, 3)


def test_a_resumed_log_keeps_whole_lines_up_to_the_checkpoint(open_sft):
    """A text may hold what str.splitlines takes for the end of a line."""
    run = open_sft()
    begin(run, 3)
    text = "a\u2028b\u2029c\x85d"
    run.samples(3, [{"text": text}])
    kept = (run.folder.path / "samples.jsonl").read_bytes()
    run.samples(4, [{"text": text}])
    with open(run.folder.path / "samples.jsonl", "ab") as file:
        file.write(b'\0\0\n{"step": 3, "text": "a')
    with open_sft("--resume").progress(4):
        pass
    assert (run.folder.path / "samples.jsonl").read_bytes() == kept


def test_a_run_that_is_there_is_not_overwritten_without_a_word(open_sft):
    begin(open_sft(), 3)
    with pytest.raises(UserError, match="a run is there already.*--resume.*--fresh"):
        open_sft()


def test_another_parent_is_another_run(open_sft):
    begin(open_sft(), 1)
    with pytest.raises(UserError, match="init was 'one', is 'two'"):
        open_sft("--resume", init="two")


def test_other_options_are_another_run_but_for_those_that_compute_nothing(open_sft):
    begin(open_sft("--lr=.1"), 1)
    with pytest.raises(UserError, match="lr was 0.1, is 0.2"):
        open_sft("--resume", "--lr=.2")
    assert open_sft("--resume", "--lr=.1", "--traceback") is not None


def test_a_finished_run_is_not_opened_again(open_sft, capsys):
    run = open_sft()
    begin(run, 4)
    run.finish(val_loss=1.0)
    assert open_sft("--resume") is None
    assert "finished already" in capsys.readouterr().out


def test_a_finished_run_goes_on_to_a_larger_total_if_that_is_asked_for(open_sft, capsys):
    run = open_sft("--epochs=1")
    begin(run, 4)
    run.finish(val_loss=1.0)
    with pytest.raises(UserError, match="epochs was 1.0, is 0.5"):  # not back
        open_sft("--resume", "--epochs=.5")
    with pytest.raises(UserError, match="the run there differs .lr was 0.005, is 0.3."):
        open_sft("--resume", "--epochs=3", "--lr=.3")
    longer = open_sft("--resume", "--epochs=3")
    assert longer.step == 4
    assert "sft: goes on: epochs was 1.0, is 3.0; from here on learning rates are" in capsys.readouterr().out
    begin(longer, 9)
    longer.finish(val_loss=.9)
    assert open_sft("--resume", "--epochs=3") is None


def test_a_resumed_run_keeps_the_precision_that_auto_chose(open_sft):
    run = open_sft("--dtype=auto")
    run.compute.dtype = "bfloat16"
    begin(run, 3)
    assert open_sft("--dtype=auto", "--resume").dtype == "bfloat16"


def test_lines_past_the_checkpoint_and_half_lines_are_dropped(open_sft):
    run = open_sft()
    begin(run, 3)
    path = run.folder.path / "metrics.jsonl"
    path.write_text('{"step": 0}\n{"step": 3}\n{"step": 4}\n{"step": 3, "lo')
    with open_sft("--resume").progress(4):
        assert path.read_text() == '{"step": 0}\n{"step": 3}\n'


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x1e", "\x0b"])
def test_other_line_separators_do_not_divide_a_line_of_the_log(open_sft, separator):
    run = open_sft()
    begin(run, 3)
    with run.progress(4):
        run.samples(2, [{"text": f"a{separator}b"}])
    line = (run.folder.path / "samples.jsonl").read_text(encoding="utf-8")
    with open_sft("--resume").progress(4):
        assert (run.folder.path / "samples.jsonl").read_text(encoding="utf-8") == line


def test_signals_wait_for_the_step_only_while_steps_are_under_way(open_sft):
    run = open_sft("--fresh")
    assert not Interrupt.stepping
    with run.progress(4):
        assert Interrupt.stepping
    assert not Interrupt.stepping


def test_numbers_that_are_not_finite_are_written_as_null_and_said_once(open_sft, capsys):
    run = open_sft()
    with run.progress(4):
        for step in (1, 2):
            run.log(step, loss=float("nan"), kl=0.123456789, length=float("inf"))
            run.samples(step, [{"text": "a", "score": float("-inf"), "parts": [float("nan")]}])
    first, second = (run.folder.path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(first) == {"step": 1, "loss": None, "kl": 0.123457, "length": None}
    assert json.loads(second)["loss"] is None
    samples = (run.folder.path / "samples.jsonl").read_text().splitlines()
    assert json.loads(samples[0]) == {"text": "a", "score": None, "parts": [None], "step": 1}
    said = capsys.readouterr().err
    assert said.count("loss is nan at step 1") == said.count("length is inf at step 1") == 1
    assert "step 2" not in said


def test_a_users_own_field_named_step_does_not_move_a_sample(open_sft):
    run = open_sft()
    with run.progress(4):
        run.samples(2, [{"step": "mine", "text": "a"}])
    assert json.loads((run.folder.path / "samples.jsonl").read_text())["step"] == 2


def test_fresh_deletes_nothing_before_training_begins(open_sft):
    begin(open_sft(), 3)
    run = open_sft("--fresh")
    assert (run.folder.path / "checkpoint.pt").exists()
    with run.progress(4):
        assert not (run.folder.path / "checkpoint.pt").exists()


def test_fresh_killed_halfway_does_not_look_finished(open_sft, command):
    run = open_sft()
    begin(run, 4)
    run.finish(val_loss=1.0)
    (run.folder.path / "checkpoint.pt").unlink()
    assert not RunFolder(command("sft", "--resume"), "sft", run.folder.parents).finished


DAMAGED = ["", "{}", "[1]", "{\"finished\": tr", "\0" * 300, "[" * 100_000, None]


@pytest.mark.parametrize("text", DAMAGED, ids=range(len(DAMAGED)))
@pytest.mark.parametrize("last", [3, 4])
def test_a_damaged_or_missing_config_is_rebuilt_from_the_checkpoint(open_sft, capsys, text, last):
    run = open_sft("--lr=.1")
    begin(run, last)
    if last == 4:
        run.finish(val_loss=1.0)
    path = run.folder.path / "config.json"
    before = json.loads(path.read_text())
    path.write_text(text) if text is not None else path.unlink()
    with pytest.raises(UserError, match="a run is there already"):
        open_sft("--lr=.1")  # never overwritten
    record = json.loads(path.read_text())
    assert "rebuilt from the checkpoint" in capsys.readouterr().err
    for name in ("stage", "options", "parents", "finished", "dtype", "products"):
        assert record[name] == before[name]
    with pytest.raises(UserError, match="lr was 0.1, is 0.2"):
        open_sft("--lr=.2", "--resume")
    resumed = open_sft("--lr=.1", "--resume")
    assert resumed is None if last == 4 else resumed.step == 3


@pytest.mark.parametrize("changes", [
    dict(options=[1]), dict(options=None), dict(parents=3), dict(versions=[1]), dict(processes="x"),
    dict(finished="yes"), dict(stage=4), dict(seconds="long")])
def test_a_config_whose_values_are_of_another_kind_is_rebuilt(open_sft, capsys, changes):
    run = open_sft()
    begin(run, 3)
    path = run.folder.path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    assert open_sft("--resume").step == 3
    assert "rebuilt from the checkpoint" in capsys.readouterr().err


def test_a_checkpoint_that_does_not_tell_what_ran_is_not_overwritten(command, tmp_path):
    folder = tmp_path / "reviews" / "sft"
    folder.mkdir(parents=True)
    (folder / "checkpoint.pt").write_bytes(b"mine")
    for word in ("--resume", "--seed=0"):
        with pytest.raises(UserError, match="config.json is missing.*--fresh"):
            RunFolder(command("sft", word), "sft", {})
    assert (folder / "checkpoint.pt").read_bytes() == b"mine"


def flip(path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def test_a_damaged_newest_checkpoint_is_repeated_from_the_one_before(open_sft):
    run = open_sft()
    with run.progress(4):
        for step in (2, 4):
            run.log(step, loss=1.0)
            run.save(step)
    run.finish()
    flip(run.folder.checkpoint)
    resumed = open_sft("--resume")  # although config.json says "finished"
    assert resumed.step == 2
    with resumed.progress(4):
        assert [json.loads(line)["step"] for line
                in (run.folder.path / "metrics.jsonl").read_text().splitlines()] == [2]
        # The damaged file is not what the next save keeps.
        assert load_checkpoint(run.folder.path)[2]["step"] == 2
        resumed.save(4)
    assert stored_state(run.folder.checkpoint)["step"] == 4
    assert stored_state(run.folder.older)["step"] == 2
    resumed.finish()
    assert open_sft("--resume") is None


def test_a_recovered_run_that_is_stopped_at_once_is_not_finished(open_sft, monkeypatch):
    run = open_sft()
    with run.progress(4):
        for step in (2, 4):
            run.save(step)
    run.finish()
    flip(run.folder.checkpoint)
    resumed = open_sft("--resume")

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(RunFolder, "_drop_lines_after", killed)
    with pytest.raises(KeyboardInterrupt), resumed.progress(4):
        pass
    assert open_sft("--resume").step == 2  # the older checkpoint, whole, in the newest one's place


def test_a_run_of_which_only_the_older_checkpoint_is_left_is_not_overwritten(open_sft):
    run = open_sft()
    with run.progress(4):
        for step in (1, 2):
            run.save(step)
    run.folder.checkpoint.unlink()
    with pytest.raises(UserError, match="a run is there already"):
        open_sft()
    assert open_sft("--resume").step == 1


def test_config_json_keeps_a_line_for_every_process(open_sft, capsys):
    begin(open_sft(), 1)
    begin(open_sft("--resume"), 3)
    capsys.readouterr()
    path = open_sft("--resume").folder.path / "config.json"
    assert "resumed with" not in capsys.readouterr().err
    record = json.loads(path.read_text())
    assert [line["step"] for line in record["processes"]] == [0, 1]
    assert all(line["versions"]["torch"] == torch.__version__ for line in record["processes"])


@pytest.mark.parametrize("changes,said", [
    (dict(threads=7), "threads 1 (before: 7)"), (dict(processor="Z80"), "(before: Z80)"),
    (dict(versions={"torch": "0.1"}), "(before: 0.1)"), (dict(commit="abc"), "(before: abc)")])
def test_resuming_elsewhere_is_said_and_recorded(open_sft, capsys, changes, said):
    run = open_sft()
    begin(run, 1)
    path = run.folder.path / "config.json"
    record = json.loads(path.read_text())
    record.update(changes)
    record["processes"][-1].update(changes)
    path.write_text(json.dumps(record))
    begin(open_sft("--resume"), 2)
    assert said in capsys.readouterr().err
    first, second = json.loads(path.read_text())["processes"]
    assert first.items() >= changes.items()
    assert second["step"] == 1


def test_a_config_of_an_earlier_version_gets_its_first_line_from_what_it_says(open_sft):
    run = open_sft()
    begin(run, 1)
    path = run.folder.path / "config.json"
    record = json.loads(path.read_text())
    del record["processes"]
    path.write_text(json.dumps(record))
    begin(open_sft("--resume"), 2)
    assert [line["step"] for line in json.loads(path.read_text())["processes"]] == [0, 1]


@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.jsonl", ".lock"])
def test_a_planted_link_is_not_followed(open_sft, command, tmp_path, name):
    victim, folder = tmp_path / "victim", tmp_path / "reviews" / "sft"
    victim.write_text("mine")
    folder.mkdir(parents=True)
    (folder / name).symlink_to(victim)
    with pytest.raises(UserError, match=f"{name}: is a link"):
        begin(open_sft(), 1)
    assert victim.read_text() == "mine"


def test_a_line_of_the_log_is_cut_at_line_ends_only(open_sft):
    run = open_sft()
    with run.progress(4):
        run.samples(1, [{"text": "a\u2028b\u2029c\x85d\x1ce"}])
        run.save(1)
    written = (run.folder.path / "samples.jsonl").read_bytes()
    (run.folder.path / "metrics.jsonl").write_bytes(b'{"step": 0}\n' + b"\0" * 9 + b"\n\xff\n[]\n")
    with open_sft("--resume").progress(4):
        assert (run.folder.path / "samples.jsonl").read_bytes() == written
        assert (run.folder.path / "metrics.jsonl").read_bytes() == b'{"step": 0}\n'


LOCK = ("import fcntl, sys, time; f = open(sys.argv[1], 'w'); "
        "fcntl.lockf(f, fcntl.LOCK_EX | fcntl.LOCK_NB); ")


def test_two_processes_do_not_share_a_folder(command, tmp_path):
    pytest.importorskip("fcntl")
    folder = tmp_path / "reviews" / "sft"
    folder.mkdir(parents=True)
    with subprocess.Popen([sys.executable, "-c", LOCK + "print(1, flush=True); time.sleep(60)",
                           folder / ".lock"], stdout=subprocess.PIPE) as other:
        other.stdout.read(1)
        try:
            with pytest.raises(UserError, match="another process"):
                RunFolder(command("sft"), "sft", {})
        finally:
            other.kill()
    assert RunFolder(command("sft"), "sft", {}).path == folder  # the lock ends with its process


def test_a_run_holds_the_lock_as_long_as_it_lives(open_sft):
    pytest.importorskip("fcntl")
    run = open_sft()
    other = subprocess.run([sys.executable, "-c", LOCK, run.folder.path / ".lock"],
                           capture_output=True, text=True)
    assert "BlockingIOError" in other.stderr


@pytest.mark.parametrize("took,chosen", [(10.0, "on"), (0.5, "off")])
def test_auto_decides_to_compile_once_by_the_fastest_step_and_says_so(command, monkeypatch, capsys,
                                                                      took, chosen):
    monkeypatch.setattr("runtime.device.compiler_fault", lambda device="cpu": "")
    compute = Compute(command("sft", "--compile=auto"), "sft", 32, {})
    for step, seconds in ((1, 0.0), (2, took + 5), (3, took), (4, took + 50)):
        compute.last_step -= seconds
        assert not compute.starts_compiling(step, 100, decide_at=5, after=1)  # the first is another kind
    assert compute.compile == "auto"
    compute.last_step -= took + 20  # another process was busy
    assert compute.starts_compiling(5, 100, decide_at=5) == (chosen == "on")
    assert compute.compile == chosen
    assert f"sft: compile {chosen} (about " in capsys.readouterr().out
    assert not compute.starts_compiling(6, 100, decide_at=6)  # decided is decided


@pytest.mark.parametrize("stage", ["pretrain", "sft", "reward", "ppo"])
def test_deterministic_fixes_what_auto_would_choose_by_the_machine(command, monkeypatch, stage):
    def fail(*_, **__):
        raise AssertionError("the machine was measured")

    for name in ("pick_dtype", "pick_products"):
        monkeypatch.setattr(f"runtime.run.{name}", fail)
    compute = Compute(command(stage, "--deterministic", "--dtype=auto"), stage, 192, {})
    assert compute.settings() == {"dtype": "float32", "products": "aten", "compile": "off"}


@pytest.mark.parametrize("stage,word", [("sft", "--dtype=bfloat16"), ("sft", "--compile=on"),
                                        ("ppo", "--rollout_dtype=int8")])
def test_deterministic_refuses_what_contradicts_it(command, stage, word):
    with pytest.raises(UserError, match="contradict"):
        command(stage, "--deterministic", word)


def test_a_log_file_gets_a_line_with_rate_and_remaining_time_every_30_seconds(monkeypatch, capsys):
    clock = iter(range(0, 10_000, 10))  # ten seconds a step
    monkeypatch.setattr("runtime.run.time.perf_counter", lambda: float(next(clock)))
    with Progress("sft", 2, 12) as bar:
        for _ in range(6):
            bar.update(loss=1.25)
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["sft: step 5 of 12, 0.10 steps/s, 01:10 left, loss 1.25",
                     "sft: step 8 of 12, 0.10 steps/s, 00:40 left, loss 1.25"]


@pytest.mark.parametrize("words,resume,expected", [
    (["ppo", "--kl_coef=.1"], False, "ppo --kl_coef=.1 --resume"),
    (["ppo", "--resume"], True, "ppo --resume"),
    (["sft", "--fresh", "--data", "my texts"], False, "sft --data 'my texts' --resume"),
    (["sft", "--fresh", "true", "--lr=1"], False, "sft --lr=1 --resume"),
    (["sft", "--fresh=yes", "--resume", "off"], False, "sft --resume"),
    (["--seed=1"], True, "--seed=1"), ([], True, ""),
    (["all", "--fresh", "--seed=1"], False, "all --seed=1 --resume")])
@pytest.mark.parametrize("typed", [["python", "train.py"], ["/my envs/bin/python3", "-u", "train.py"],
                                   ["python", "-m", "train"]], ids=" ".join)
def test_the_command_that_resumes_is_the_one_typed(command, monkeypatch, typed, words, resume,
                                                   expected):
    monkeypatch.setattr(sys, "argv", ["/home/me/mosslet/train.py", *words])
    monkeypatch.setattr(sys, "orig_argv", [*typed, *words])
    printed = resume_command(command("sft", *["--resume"] * resume))
    assert printed == f"{shlex.join(typed)} {expected}".strip()
    assert shlex.split(printed)[:len(typed)] == typed


def test_of_a_run_that_other_code_began_the_command_is_that_of_a_shell(command, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "sft"])
    monkeypatch.setattr(sys, "orig_argv", ["python", "notebook.py"])
    assert resume_command(command("sft")) == "python train.py sft --resume"


def test_an_interrupted_run_saves_and_prints_the_command_that_resumes_it(open_sft, monkeypatch,
                                                                         capsys):
    monkeypatch.setattr(sys, "argv", ["train.py", "sft", "--lr=.1"])
    run = open_sft("--lr=.1")
    run.stop_if_asked(1, run.save)
    assert not (run.folder.path / "checkpoint.pt").exists()  # nobody has asked
    Interrupt.number = 15
    with pytest.raises(Interrupted) as stop, run.progress(4):
        run.stop_if_asked(2, run.save)
    assert stop.value.args == (15,)
    assert open_sft("--lr=.1", "--resume").step == 2
    assert ("sft: saved after step 2; go on with `python train.py sft --lr=.1 --resume`"
            in capsys.readouterr().err)


def test_seconds_go_on_from_the_checkpoint(open_sft):
    run = open_sft()
    run.started -= 100
    begin(run, 3)
    assert 100 <= open_sft("--resume").seconds() < 200


def test_config_json_tells_what_ran_and_with_what(open_sft):
    run = open_sft("--lr=.1")
    begin(run, 4)
    record = json.loads((run.folder.path / "config.json").read_text())
    assert record["options"]["lr"] == .1
    assert record["parents"]["init"] == "one"
    assert record["finished"] is False
    assert record["versions"]["torch"] == torch.__version__
    assert record["dtype"] == "float32"


def test_a_run_is_complete_when_its_constructor_returns(command, world):
    folder = RunFolder(command("sft"), "sft", {})
    run = Run(folder, Transformer(ModelConfig(**{**TINY, "vocab_size": 500})), world.data.tokenizer, "{prompt}", {},
              save_checkpoint)
    attributes = set(vars(run))
    with run.progress(1):
        run.save(1)
        run.finish()
    assert set(vars(run)) == attributes
    assert isinstance(run.model, torch.nn.Module)


# ---- names of folders ----------------------------------------------------------------------------

@pytest.mark.parametrize("data,name", [
    ("reviews", "reviews"), ("..", "texts"), (".", "v1.0"), ("../..", None), ("../v1.1/", "v1.1"),
    ("../my.v1.jsonl", "my.v1"), ("my.jsonl.gz", "my"), ("notes.txt", "notes.txt"), ("/", "root"),
    ("../../texts/v1.0", "v1.0"), ("sub/../..", "texts"), (".jsonl", ".jsonl")])
def test_a_runs_folder_has_the_whole_name_of_its_data_and_is_inside_out(tmp_path, monkeypatch, command,
                                                                        data, name):
    (tmp_path / "texts/v1.0/sub").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "texts/v1.0")
    o = command("sft", "--data", data)
    assert data_name(data) == (name or tmp_path.name)
    assert run_folder(o, "sft").resolve() == tmp_path / data_name(data) / "sft"
