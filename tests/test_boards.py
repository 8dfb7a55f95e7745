"""--tensorboard: the event files say what metrics.jsonl says, each step once, also after a resume."""
import sys
import types

import pytest

import train
from data.curves import read_log
from runtime.boards import Board
from runtime.machine import Interrupted
from runtime.options import run_main

WRITTEN: dict[str, list] = {}  # event file -> (name, value, step)


class Writer:
    """Stands in for torch's SummaryWriter."""

    def __init__(self, folder):
        import pathlib
        folder = pathlib.Path(folder)
        folder.mkdir(exist_ok=True)
        self.path = folder / f"events.out.tfevents.{len(WRITTEN)}"
        self.path.touch()
        WRITTEN[str(self.path)] = []

    def add_scalar(self, *words):
        WRITTEN[str(self.path)].append(words)

    def flush(self):
        pass


@pytest.fixture
def tensorboard(monkeypatch):
    WRITTEN.clear()
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=Writer))


def test_a_resumed_run_shows_every_step_once(command, tensorboard, monkeypatch, tmp_path):
    o = command("sft", "--tensorboard", "--log_every=1", "--save_every=2")
    real = train.Run.stop_if_asked

    def stopped(self, step, save):
        if step == 3:  # behind the checkpoint: step 3 is done again
            raise Interrupted(15)
        return real(self, step, save)

    with monkeypatch.context() as m:
        m.setattr(train.Run, "stop_if_asked", stopped)
        with pytest.raises(Interrupted):
            train.sft(o)
    run = train.sft(o.replace(resume=True))
    left, = run.folder.path.glob("tensorboard/*")
    shown = WRITTEN[str(left)]
    logged = [(name, value, record["step"]) for record in read_log(run.folder.path / "metrics.jsonl")
              for name, value in record.items() if name != "step"]
    assert shown == logged
    assert len(logged) > 10


def test_without_the_flag_nothing_is_written(command, tensorboard):
    run = train.sft(command("sft", "--epochs=.05"))
    assert WRITTEN == {}
    assert not (run.folder.path / "tensorboard").exists()


def test_what_is_no_number_is_left_out(tensorboard, tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    Board(tmp_path).add({"step": 2, "loss": None, "kl": 1.0})
    assert [*WRITTEN.values()] == [[("loss", 2.0, 1), ("kl", 1.0, 2)]]


def test_without_the_package_one_line_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert run_main(train.main, ["pretrain", "--tensorboard", "--preset", "smoke"]) == 2
    assert "python -m pip install tensorboard" in capsys.readouterr().err
