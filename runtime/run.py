"""A stage's run: its folder, what it computes with, its log, and the checkpoint that it resumes
from.

`OUT/<data>/<stage>/` holds checkpoint.pt and checkpoint.previous.pt, config.json (options,
versions, machine, seconds), metrics.jsonl (one JSON object a logged step) and samples.jsonl (texts
to read). Three classes, from small to large: `Compute`, `RunFolder`, and `Run`, which a stage opens
with `model.open_run`, logs into and saves with. Nothing here knows which stages there are.
"""
import contextlib
import json
import math
import os
import pathlib
import re
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from runtime.boards import Board
from runtime.device import ALIKE, compile_pays, pick_device, pick_dtype
from runtime.learning import halve_frozen
from runtime.lines import parse_line
from runtime.machine import (Interrupt, Interrupted, peak_memory_mb, resume_command,
                             return_freed_memory, this_machine)
from runtime.options import Common, UserError, as_dict, show
from runtime.products import pick_products, use_products
from runtime.progress import Progress
from runtime.same import is_longer, require_same
from runtime.storage import is_whole, keep, open_plain, previous_of, replace_text, stored_state
from runtime.tables import finite
from runtime.terminal import advice

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None


# ---- what a run computes with --------------------------------------------------------------------

class Compute:
    """Device, precision of matrix products, whose float32 products, and whether to compile.

    What `auto` decided when a run began is kept in its checkpoint, so a resumed run computes the
    same way.
    """

    def __init__(self, o: Common, stage: str, width: int, state: dict[str, Any], n_layer: int = 1):
        """width: the model's, at which products are timed; n_layer: its layers, which compiling takes
        time for. state: the checkpoint's; {}: a new run.
        """
        self.stage, self.device, self.n_layer = stage, pick_device(o.device), n_layer
        kept = "--deterministic" if o.deterministic else "as in the checkpoint"
        state = {**(ALIKE if o.deterministic else {}), **state}
        self.dtype, why = state.get("dtype"), kept
        if self.dtype is None:
            self.dtype, why = pick_dtype(o.dtype, self.device, width)
        self.products, whose = state.get("products"), kept
        if self.products is None:
            self.products, whose = pick_products(self.device, width)
        print(f"{stage}: {self.device}, {self.dtype} ({why}), float32 products by {self.products} "
              f"({whose}), {torch.get_num_threads()} threads", flush=True)
        self.compile = state.get("compile", o.compile)  # `auto` until the first steps are timed
        self.last_step, self.fastest = time.perf_counter(), math.inf
        if self.compile == "on":
            self.decide_compile(0)

    def settings(self) -> dict[str, str]:
        """What checkpoint and config.json record."""
        return {"dtype": self.dtype, "products": self.products, "compile": self.compile}

    def starts_compiling(self, step: int, n_steps: int, decide_at: int, after: int = 0) -> bool:
        """Call after each step. With --compile auto, True once if compiling pays from now on.

        Decided at step `decide_at`, from the fastest step so far (after step `after`): other work
        on the machine makes steps slower, never faster. Always at the same step, so that a resumed
        run changes over where the uninterrupted one did.
        """
        now = time.perf_counter()
        if step > after:
            self.fastest = min(self.fastest, now - self.last_step)
        self.last_step = now
        return (self.compile == "auto" and step == decide_at
                and self.decide_compile(self.fastest * (n_steps - step)))

    def decide_compile(self, seconds_ahead: float) -> bool:
        """Whether to compile, with so many seconds of work ahead; prints the decision."""
        pays, why = compile_pays(self.compile, self.device, seconds_ahead, self.n_layer)
        self.compile = "on" if pays else "off"
        tqdm.write(f"{self.stage}: compile {self.compile} ({why})", file=sys.stdout)
        return pays


# ---- the folder ----------------------------------------------------------------------------------

def data_name(data: str) -> str:
    """What a data set's folder is called: its name, or the whole last name of the path that it is.

    >>> data_name("reviews"), data_name("texts/v1.0/"), data_name("v1.1.csv.gz"), data_name("/")
    ('reviews', 'v1.0', 'v1.1', 'root')
    """
    return re.sub(r"(?<=.)\.(jsonl?|csv|tsv)(\.gz)?$", "", pathlib.Path(data).resolve().name) or "root"


def run_folder(o: Common, stage: str) -> pathlib.Path:
    """OUT/<data>/<stage>, or the options' own place; of stage "" the folder that holds all stages of a data set."""
    return pathlib.Path(o.place or pathlib.Path(o.out) / data_name(o.data)) / stage


class NotFinite(UserError):
    """Training met numbers that are not finite. `Run.progress` adds which checkpoint is kept."""


CONFIG = {"finished": bool, "preset": str, "options": dict, "parents": dict, "versions": dict, "processes": list,
          "stage": str, "seconds": (int, float)}  # what is read of config.json, whoever edited it


def read_config(folder: str | os.PathLike) -> dict | None:
    """config.json of a run's folder; None if it is missing or damaged: the checkpoint then tells the
    same."""
    path = pathlib.Path(folder) / "config.json"
    try:
        with open_plain(path, "r") as file:
            record = json.load(file)
        fits = all(isinstance(record[name], kind) for name, kind in CONFIG.items() if name in record)
        return record if fits and {"finished", "options", "parents"} <= set(record) else None
    except (OSError, ValueError, TypeError, RecursionError):
        return None


def record_of(folder: str | os.PathLike) -> dict[str, Any]:
    """What is known of the run in a folder: its config.json, or else its checkpoint's state."""
    return read_config(folder) or stored_state(pathlib.Path(folder) / "checkpoint.pt")


class RunFolder:
    """OUT/<data>/<stage>/, locked by this process, and compared with the run that is there.

    `resumes`: there is a checkpoint of this very run to continue from. `finished`: and it is done.
    UserError if another process works there, or if a different run is there.
    """

    def __init__(self, o: Common, stage: str, parents: dict[str, str]):
        """parents: what the run starts from, by name: fingerprint of the data, hashes of weights.
        """
        self.o, self.stage, self.parents, self.path = o, stage, parents, run_folder(o, stage)
        self.options = {name: value for name, value in as_dict(o).items()
                        if name not in o.not_compared()}
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--out {o.out}: {self.path} cannot be made: {error.strerror}; "
                            f"{advice(error)}") from None
        self.lock = self._lock()
        self.checkpoint = self.path / "checkpoint.pt"
        self.older = previous_of(self.checkpoint)
        begun = self.checkpoint.exists() or self.older.exists()  # else nothing could be lost
        self.record = (read_config(self.path) or self._rebuilt()) if begun and not o.fresh else None
        if self.record is not None:
            require_same(o, stage, self.path, {**self.options, **parents}, self.record)
        self.resumes = self.record is not None
        # A finished run whose checkpoint is damaged repeats its last steps from the one before.
        self.finished = (self.resumes and self.record["finished"] and is_whole(self.checkpoint)
                         and not is_longer(o, self.record["options"]))

    def _rebuilt(self) -> dict[str, Any]:
        """config.json, written anew from the checkpoint; UserError if that does not tell what ran.
        """
        try:
            state = stored_state(self.checkpoint)
            record = {name: state[name] for name in ("stage", "options", "parents")}
        except (UserError, TypeError, KeyError) as error:
            raise UserError(f"{self.path}: config.json is missing or damaged, and the checkpoint does "
                            f"not tell what ran ({error}): restore one of them, start anew with "
                            "--fresh, or choose another --out") from None
        more = {name: state[name] for name in ("preset", "dtype", "products", "compile", "seconds")
                if name in state}
        record |= {"finished": state.get("finished", False), **more}
        self.write_config(record)
        print(f"{self.path / 'config.json'}: was missing or damaged, rebuilt from the checkpoint",
              file=sys.stderr)
        return record

    def write_config(self, record: dict[str, Any]) -> None:
        replace_text(self.path / "config.json", json.dumps(record, indent=1, ensure_ascii=False))

    def _lock(self) -> Any:
        """Keep a second process out; the system releases the lock when this one ends."""
        if fcntl is None:
            return None
        file = open_plain(self.path / ".lock", "a")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise UserError(f"{self.path}: another process is at work there: wait for it, or "
                            "choose another --out") from None
        except OSError:  # some network drives have no locks
            pass
        return file

    def begin(self, step: int, recovered: bool = False) -> None:
        """Make the folder this run's, from `step` on; −1: from the beginning. Not before training
        begins: had anything been wrong until then, an earlier run would still be there.

        recovered: it goes on from the older checkpoint, which takes the damaged one's place, so that
        the next save does not keep the damaged one instead.
        """
        if self.o.fresh:
            for name in (self.older.name, "config.json", self.checkpoint.name):
                (self.path / name).unlink(missing_ok=True)
        if recovered:  # first the record: a kill in between must not leave the older one as finished
            self.write_config({**self.record, "finished": False})
            keep(self.older, self.checkpoint)
        for path in (self.path / "metrics.jsonl", self.path / "samples.jsonl"):
            if step < 0:  # a new run: what is there is another's
                open_plain(path, "w").close()
            else:
                self._drop_lines_after(path, step)

    def _drop_lines_after(self, path: pathlib.Path, step: int) -> None:
        """Drop lines past the checkpoint's step, which a resumed run writes again, and lines cut
        short or damaged: no log is worth a run."""
        def stays(line: bytes) -> bool:
            try:
                return parse_line(line)["step"] <= step
            except (ValueError, TypeError, KeyError):
                return False

        lines = []
        if os.path.lexists(path):
            with open_plain(path, "rb") as file:
                lines = file.read().split(b"\n")[:-1]  # what follows the last line end is half a line
        replace_text(path, "".join(line.decode() + "\n" for line in lines if stays(line)))

    def append(self, name: str, records: list[dict]) -> None:
        """Add JSON Lines to metrics.jsonl or samples.jsonl."""
        with open_plain(self.path / name, "a") as file:
            file.writelines(json.dumps(finite(record), ensure_ascii=False) + "\n"
                            for record in records)

    def give_up_newest(self) -> int | None:
        """The checkpoint's own weights led to numbers that are not finite: put the one before it in
        its place. Returns that one's step; None if there is none."""
        if not is_whole(self.older):
            return None
        os.replace(self.older, self.checkpoint)
        return stored_state(self.checkpoint)["step"]


# ---- the run -------------------------------------------------------------------------------------

class Run:
    """A stage under way. `model` is what it trains, on its device; `state` is the checkpoint's that
    it resumes from, {} for a new run; `step` counts the steps done before."""

    def __init__(self, folder: RunFolder, model: nn.Module, tokenizer: Any, template: str,
                 state: dict[str, Any], write: Callable[..., None]):
        """write(path, model, tokenizer, **state) saves a checkpoint."""
        self.folder, self.o, self.stage = folder, folder.o, folder.stage
        self.tokenizer, self.template, self.state, self.write = tokenizer, template, state, write
        self.step, self.saved_step, self.total = state.get("step", 0), state.get("step"), None
        self.machine, self.warned, self.board = this_machine(), set(), None
        self.started = time.perf_counter() - state.get("seconds", 0.0)
        if not state:
            show(self.o, f"{self.stage}: options")
        elif folder.record is not None:
            self._say_what_changed(folder.record)
        self.compute = Compute(self.o, self.stage, model.config.d_model, state,
                               model.config.n_layer)
        self.device, self.dtype = self.compute.device, self.compute.dtype
        self.model = halve_frozen(model, self.dtype).to(self.device)
        use_products(self.model, self.compute.products)

    def seconds(self) -> float:
        """Seconds of work since the run began, those before a resume included."""
        return time.perf_counter() - self.started

    def _say_what_changed(self, before: dict[str, Any]) -> None:
        """A line if the process before ran elsewhere. before: its config.json."""
        def flat(record: dict[str, Any]) -> dict[str, Any]:
            return {**{name: record.get(name) for name in self.machine if name != "versions"},
                    **record.get("versions", {})}

        old, new = flat(before), flat(self.machine)
        changed = [f"{name} {new[name]} (before: {old[name]})" for name in new
                   if old.get(name) is not None and old[name] != new[name]]
        if changed:
            print(f"{self.stage}: resumed with {', '.join(changed)}: the last digits may differ from "
                  "those of an uninterrupted run", file=sys.stderr)

    @contextlib.contextmanager
    def progress(self, total: int) -> Iterator[Progress]:
        """Training begins: the folder becomes this run's. `NotFinite` becomes a UserError that says
        which checkpoint is kept. A signal now waits for the step."""
        Interrupt.stepping = True
        self.folder.begin(self.step if self.state else -1, self.state.get("recovered", False))
        self.total = total
        self.write_config(finished=False)
        self.board = Board(self.folder.path) if self.o.tensorboard else None
        with Progress(self.stage, self.step, total) as bar:
            try:
                yield bar
            except NotFinite as error:
                raise UserError(f"{self.stage}: {error}; {self._kept(bar.step)}") from error

    def _kept(self, step: int) -> str:
        """Which checkpoint is good when the weights after `step` steps gave numbers that are not
        finite."""
        if self.saved_step is None:
            return "nothing was saved yet"
        if self.saved_step == step:  # those weights are the checkpoint's
            self.saved_step = self.folder.give_up_newest()
            if self.saved_step is None:
                return f"the only checkpoint, of step {step}, is what gave them"
        return f"the last good checkpoint is kept, of step {self.saved_step}"

    def log(self, step: int, **metrics: Any) -> None:
        """One line of metrics.jsonl after `step` finished steps; a number that is not finite is
        written as null and said, once for each name. Freed memory goes back to the system, which
        spares a third of the peak and costs at most 3 % of the time (every ten steps, measured)."""
        for name, x in metrics.items():
            if isinstance(x, float) and not math.isfinite(x) and name not in self.warned:
                self.warned.add(name)
                tqdm.write(f"{self.stage}: warning: {name} is {x} at step {step}; metrics.jsonl says "
                           "null", file=sys.stderr)
        numbers = {name: float(f"{x:.6g}") if isinstance(x, float) else x for name, x in metrics.items()}
        self.folder.append("metrics.jsonl", [{"step": step, **numbers}])
        if self.board is not None:
            self.board.add({"step": step, **numbers})
        return_freed_memory()

    def samples(self, step: int, records: list[dict]) -> None:
        """Texts to read, with their scores, into samples.jsonl."""
        self.folder.append("samples.jsonl", [{**record, "step": step} for record in records])

    def save(self, step: int, **state: Any) -> None:
        """Write the checkpoint after `step` finished steps; state: what the stage needs to
        continue. `NotFinite`, and nothing is written, if a number is not finite."""
        self.write(self.folder.path, self.model, self.tokenizer, stage=self.stage, step=step,
                   finished=step == self.total, **self.compute.settings(), seconds=self.seconds(),
                   options=self.folder.options, parents=self.folder.parents, preset=self.folder.o.preset,
                   template=self.template, **state)
        self.saved_step = step

    def stop_if_asked(self, step: int, save: Callable[[int], None]) -> None:
        """After a signal: save, print the command that resumes, raise Interrupted."""
        if Interrupt.number:
            save(step)
            print(f"\n{self.stage}: saved after step {step}; go on with `{resume_command(self.o)}`",
                  file=sys.stderr)
            raise Interrupted(Interrupt.number)

    def finish(self, **summary: float) -> None:
        """Mark the run as finished, so that later stages build on it; print its last figures."""
        self.write_config(finished=True)
        text = ", ".join(f"{name} {value:.4g}" for name, value in summary.items())
        print(f"{self.stage}: done in {self.seconds():.0f} s; {text}", flush=True)

    def write_config(self, finished: bool) -> None:
        """config.json: what ran, where, and for how long; `processes` has a line for every process
        that worked on the run."""
        before = self.folder.record or {}
        earlier = before.get("processes") or [
            {"step": 0, **{name: before[name] for name in self.machine if name in before}}] * ("threads" in before)
        self.folder.write_config({
            "stage": self.stage, "finished": finished, "preset": self.folder.o.preset, "options": self.folder.options,
            "parents": self.folder.parents, **self.compute.settings(), **self.machine,
            "seconds": round(self.seconds(), 1), "peak_memory_mb": peak_memory_mb(),
            "processes": [*earlier, {"step": self.step, **self.machine}]})
