"""A run: its folder is locked and compared, its choices are kept, its log is cut at the
checkpoint's step."""
import json
import subprocess
import sys

import pytest
import torch

from model import ModelConfig, Transformer, open_run, save_checkpoint
from runtime.machine import Interrupt, Interrupted
from runtime.options import UserError
from runtime.run import Compute, Progress, Run, RunFolder, resume_command
from tests.conftest import TINY


@pytest.fixture
def open_sft(command, world):
    """open_sft(*words, init=…) opens a run of the stage sft with a tiny model."""
    def opened(*words, init="one") -> Run | None:
        return open_run("sft", command("sft", *words), world.data, {"init": init},
                        Transformer(ModelConfig(**TINY)), world.data.tokenizer)
    return opened


def begin(run: Run, step: int) -> None:
    """Train nothing, and leave a checkpoint after so many steps."""
    with run.progress(4):
        run.save(step)


def test_a_run_resumes_from_its_checkpoint(open_sft):
    begin(open_sft(), 3)
    run = open_sft("--resume")
    assert (run.step, run.state["step"]) == (3, 3)


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


def test_numbers_that_are_no_numbers_are_left_out_of_the_log(open_sft):
    run = open_sft()
    with run.progress(4):
        run.log(1, loss=float("nan"), kl=0.123456789)
    assert json.loads((run.folder.path / "metrics.jsonl").read_text()) == {"step": 1,
                                                                           "kl": 0.123457}


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


def test_a_damaged_config_is_one_clear_line(command, tmp_path):
    folder = tmp_path / "reviews" / "sft"
    folder.mkdir(parents=True)
    (folder / "checkpoint.pt").touch()
    for damaged in ("", "{}", "[1]"):
        (folder / "config.json").write_text(damaged)
        with pytest.raises(UserError, match="config.json: damaged"):
            RunFolder(command("sft", "--resume"), "sft", {})


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
    (["ppo", "--kl_coef=.1"], False, "python train.py ppo --kl_coef=.1 --resume"),
    (["ppo", "--resume"], True, "python train.py ppo --resume"),
    (["sft", "--fresh", "--data", "my texts"], False, "python train.py sft --data 'my texts' "
                                                      "--resume"),
    (["--seed=1"], True, "python train.py --seed=1"), ([], True, "python train.py"),
    (["all", "--fresh", "--seed=1"], False, "python train.py all --seed=1 --resume")])
def test_the_command_that_resumes_is_the_one_typed(command, monkeypatch, words, resume, expected):
    monkeypatch.setattr(sys, "argv", ["train.py", *words])
    assert resume_command(command("sft", *["--resume"] * resume)) == expected


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
    run = Run(folder, Transformer(ModelConfig(**TINY)), world.data.tokenizer, "{prompt}", {},
              save_checkpoint)
    attributes = set(vars(run))
    with run.progress(1):
        run.save(1)
        run.finish()
    assert set(vars(run)) == attributes
    assert isinstance(run.model, torch.nn.Module)
