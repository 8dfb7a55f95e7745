"""A round of training started from the page, in a process of its own, and what there is to see of it.

    training = Training("feedback.jsonl", "out/reviews/sft", "feedback.training")
    training.start("smoke", updates=5)
    training.status()["curves"]["KL to SFT, nats"]          [[1, 0.0], [2, 0.01], …]

It is `python train.py loop --answers feedback.jsonl …`, which reads the log without holding it. Its output
goes to a file that it holds locked: so there are never two of them, even if the server that started the
first was killed meanwhile.
"""
import contextlib
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

from runtime.lines import read_lines
from runtime.options import UserError
from runtime.storage import checkpoint_path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

ROOT = pathlib.Path(__file__).resolve().parent.parent
LINES, TAIL = 20, 2**15  # lines of the output that are shown, in so many bytes at its end
MOST_POINTS = 400  # of a curve
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|[\x00-\x08\x0b\x0c\x0e-\x1f]")
ROUND = re.compile(r"^round \d+: (?:finished already )?in (.+)$", re.MULTILINE)
GRACE = 15.0  # seconds that a training has to save itself when the server ends
# Curves by the names that the page shows, from the metrics of a stage.
CURVES = {"reward": {"reward model: loss": "loss", "reward model: validation accuracy": "val_accuracy",
                     "reward model: validation correlation": "val_correlation"},
          "ppo": {"reward score": "raw_score", "KL to SFT, nats": "kl", "judged positive": "judged_positive",
                  "length, tokens": "length", "held out: reward score": "eval_raw_score",
                  "held out: KL to SFT, nats": "eval_kl", "held out: judged positive": "eval_judged_positive",
                  "held out: length, tokens": "eval_length"}}


class Running(Exception):
    """A training runs already."""


def loop_command(log: str, checkpoint: str, out: str, preset: str = "", updates: int | None = None) -> list[str]:
    """The command of a round on a log, from the SFT checkpoint beside `checkpoint`, or from that itself; without a
    preset the loop has the one that this was trained with."""
    start = pathlib.Path(checkpoint)
    if (place := checkpoint_path(start)).exists():
        beside = place.parent.parent / "sft"
        start = (beside if checkpoint_path(beside).exists() else start).resolve()
    command = [sys.executable, "train.py", "loop", "--answers", log, "--rounds", "1", "--init_from", str(start),
               "--out", out]
    command += ["--preset", preset] if preset else []
    return command + (["--ppo.updates", str(updates)] if updates else [])


class Training:
    """The one training of a log."""

    def __init__(self, log: str | os.PathLike, checkpoint: str, folder: str | os.PathLike,
                 command: Callable[..., list[str]] = loop_command):
        """folder: where the rounds are written, and the output. command(log, checkpoint, folder, preset,
        updates) -> the words to run."""
        self.log, self.checkpoint = str(pathlib.Path(log).resolve()), checkpoint
        self.folder, self.command = pathlib.Path(folder).resolve(), command
        self.output, self.pid_file = self.folder / "output.txt", self.folder / "pid"
        self.process: subprocess.Popen | None = None
        self.stopped = False
        self.lock = threading.RLock()

    # ---- start and stop

    def start(self, preset: str = "", updates: int | None = None) -> None:
        """Start a round. `Running` if one runs, UserError if its folder cannot be written."""
        with self.lock:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                with open(self.output, "ab") as file:
                    if not self._hold(file):
                        raise Running("a training runs already: stop it, or wait for its end")
                    file.truncate(0)
                    words = self.command(self.log, self.checkpoint, str(self.folder), preset, updates)
                    self.process, self.stopped = self._begin(words, file), False
                    self.pid_file.write_text(str(self.process.pid))
            except OSError as error:
                raise UserError(f"the training cannot be started: {error.strerror or error}") from error

    def _hold(self, file: Any) -> bool:
        """Lock an open file for as long as this process, or one that it hands the file to, has it open."""
        if fcntl is None:
            return self.process is None or self.process.poll() is not None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        return True

    def _begin(self, words: Sequence[str], output: Any) -> subprocess.Popen:
        """The process, in a group of its own: Ctrl-C at the server is passed on once."""
        environment = os.environ | {"PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"}
        group: dict[str, Any] = {"start_new_session": True} if os.name == "posix" else {
            "creationflags": getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0)}
        return subprocess.Popen(words, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
                                env=environment, **group)

    def running(self) -> bool:
        """Does a training of this log run, whoever started it?"""
        with self.lock:  # looking locks the file for a moment, which `start` must not meet
            if self.process is not None and self.process.poll() is None:
                return True
            with contextlib.suppress(OSError), open(self.output, "rb") as file:
                return fcntl is not None and not self._hold(file)
            return False

    def stop(self) -> bool:
        """Ask the training to save itself and end; False if none runs."""
        with self.lock:
            self.stopped = self.running()
            return self.stopped and self._signal(signal.SIGINT)

    def _signal(self, number: int) -> bool:
        """Send a signal to the training's process group; False if there is none."""
        pid = self.process.pid if self.process is not None and self.process.poll() is None else 0
        with contextlib.suppress(OSError, ValueError):
            pid = pid or int(self.pid_file.read_text())  # of a server before this one: the lock says that it lives
            if os.name == "posix":
                os.killpg(pid, number)
            elif self.process is not None:
                self.process.terminate()
            return True
        return False

    def close(self) -> None:
        """End the training with the server: it saves itself, and the next one goes on with it."""
        if self.process is None or not self.stop():
            return
        for number in (signal.SIGTERM, getattr(signal, "SIGKILL", signal.SIGTERM)):
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(GRACE)
                return
            self._signal(number)
        self.process.wait()

    # ---- looking at it

    def status(self) -> dict[str, Any]:
        """What the page shows: running, stage, lines, curves, before_after, changed, policy; error if it failed."""
        running, text = self.running(), self._text()
        folder = self._round(text)
        report = read_object(folder / "report.json") if folder else {}
        lines = [line for line in text.split("\n") if line.strip()][-LINES:]
        found = {"running": running, "stage": stage_of(folder, running, bool(text)), "lines": lines,
                 "curves": curves_in(folder) if folder else {}, "before_after": report.get("before_after", []),
                 "changed": report.get("changed"), "policy": beside_sft(report), "round": folder.name if folder else ""}
        code = self.process.poll() if self.process is not None else None
        if code and not self.stopped:
            found["error"] = lines[-1] if lines else f"the training ended with exit code {code}"
        return found

    def _text(self) -> str:
        """The end of the output; of a line that was written over, its last state."""
        try:
            with open(self.output, "rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL))
                text = file.read().decode("utf-8", "replace")
        except OSError:
            return ""
        text = ESCAPES.sub("", text.replace("\r\n", "\n"))
        return "\n".join(line.rstrip("\r").rpartition("\r")[2] for line in text.split("\n"))

    def _round(self, text: str) -> pathlib.Path | None:
        """The folder of the round that was started last."""
        if found := ROUND.findall(text):
            return ROOT / found[-1].strip()
        rounds = [path for path in self.folder.glob("*/loop/round-*") if path.name[6:].isdigit()]
        return max(rounds, key=lambda path: int(path.name[6:]), default=None)


def read_object(path: pathlib.Path) -> dict[str, Any]:
    """The JSON object in a file; {} without."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def beside_sft(report: dict[str, Any]) -> dict[str, Any] | None:
    """How the new policy does beside SFT on so many validation prompts: how often each judge prefers its reply, with
    the ends of the interval, and the mean lengths; None where the report does not say."""
    policies = report.get("policies") or []
    if len(policies) < 2 or "length" not in policies[-1]:
        return None
    new = policies[-1]["name"]
    return {"prompts": report.get("prompts"), "kl": policies[-1].get("kl"),
            "length": [policies[0]["length"], policies[-1]["length"]],
            "wins": [{"judge": wins["judge"], "rate": wins["win_rate"]} for wins in report.get("win_rates", ())
                     if (wins["policy"], wins["over"]) == (new, "SFT")]}


def stage_of(folder: pathlib.Path | None, running: bool, begun: bool) -> str:
    """Where a round is: starting, answers, reward, ppo or report while it runs; finished, or stopped."""
    if folder is not None and (folder / "report.json").exists():
        return "finished"
    if not running:
        return "stopped" if begun or folder is not None else ""
    if folder is None or not folder.exists():
        return "starting"
    if read_object(folder / "ppo" / "config.json").get("finished"):
        return "report"
    return next((stage for stage in ("ppo", "reward") if (folder / stage).exists()), "answers")


def curves_in(folder: pathlib.Path) -> dict[str, list[list[float]]]:
    """{name: [[step, value], …]} of a round's stages, as far as they are written, thinned to MOST_POINTS."""
    found: dict[str, list[list[float]]] = {}
    for stage, names in CURVES.items():
        for line in metrics_of(folder / stage / "metrics.jsonl"):
            for name, key in names.items():
                if isinstance(line.get(key), int | float) and isinstance(line.get("step"), int):
                    found.setdefault(name, []).append([line["step"], line[key]])
    return {name: points[::-(-len(points) // MOST_POINTS)] for name, points in found.items()}


def metrics_of(path: pathlib.Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; one that is being written is left out."""
    found = []
    with contextlib.suppress(OSError, UserError):
        for _, line in read_lines(path) if path.is_file() else ():
            with contextlib.suppress(ValueError):
                if isinstance(value := json.loads(line), dict):
                    found.append(value)
    return found
