"""A stage's run: its folder, what it computes with, its log, and the checkpoint that it resumes
from.

`OUT/<data>/<stage>/` holds checkpoint.pt, config.json (options, versions, machine, seconds),
metrics.jsonl (one JSON object a logged step) and samples.jsonl (texts to read). Four classes, from
small to large: `Compute`, `RunFolder`, `Progress`, and `Run`, which a stage opens with
`model.open_run`, logs into and saves with. Nothing here knows which stages there are.
"""
import json
import math
import os
import pathlib
import platform
import shlex
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from runtime.device import ALIKE, compile_pays, pick_device, pick_dtype
from runtime.machine import (Interrupt, Interrupted, git_commit, peak_memory_mb, processor,
                             replace_text)
from runtime.options import Common, UserError, as_dict, show
from runtime.products import pick_products, use_products

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

    def __init__(self, o: Common, stage: str, width: int, state: dict[str, Any]):
        """width: the model's, at which products are timed. state: the checkpoint's; {}: a new run.
        """
        self.stage, self.device = stage, pick_device(o.device)
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
        pays, why = compile_pays(self.compile, self.device, seconds_ahead)
        self.compile = "on" if pays else "off"
        tqdm.write(f"{self.stage}: compile {self.compile} ({why})", file=sys.stdout)
        return pays


# ---- the folder ----------------------------------------------------------------------------------

def run_folder(o: Common, stage: str) -> pathlib.Path:
    """OUT/<data>/<stage>; of stage "" the folder that holds all stages of a data set."""
    return pathlib.Path(o.out) / pathlib.Path(o.data).stem / stage


def read_config(folder: str | os.PathLike) -> dict | None:
    """config.json of a run's folder, or None if there is none; UserError if it is damaged."""
    path = pathlib.Path(folder) / "config.json"
    try:
        record = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
        if record is None or {"finished", "options", "parents"} <= set(record):
            return record
        raise ValueError
    except (ValueError, TypeError):
        raise UserError(f"{path}: damaged; train this stage anew with --fresh, or choose another "
                        "--out") from None


def resume_command(o: Common) -> str:
    """The command that resumes what this process began. `train.py all` resumes without a flag."""
    words = [word for word in sys.argv[1:] if not word.startswith(("--resume", "--fresh"))]
    resumes_anyway = o.resume and len(words) == len(sys.argv[1:])
    return " ".join(["python train.py", *map(shlex.quote,
                                             words)]) + " --resume" * (not resumes_anyway)


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
        self.path.mkdir(parents=True, exist_ok=True)
        self.lock = self._lock()
        begun = (self.path / "checkpoint.pt").exists()  # else nothing could be lost or resumed
        record = read_config(self.path) if begun and not o.fresh else None
        if record is not None:
            self._require_same(record)
        self.resumes = record is not None
        self.finished = record is not None and record["finished"]

    def _lock(self) -> Any:
        """Keep a second process out; the system releases the lock when this one ends."""
        if fcntl is None:
            return None
        file = open(self.path / ".lock", "w")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise UserError(f"{self.path}: another process is at work there: wait for it, or "
                            "choose another --out") from None
        except OSError:  # some network drives have no locks
            pass
        return file

    def _require_same(self, record: dict) -> None:
        """UserError, naming the differences, unless the run that is there is this one, to be
        resumed."""
        if not self.o.resume:
            raise UserError(f"{self.path}: a run is there already: resume it with "
                            f"`{resume_command(self.o)}`, start anew with --fresh, or choose "
                            "another --out")
        now = {**self.options, **self.parents}
        skipped = self.o.not_compared()
        before = {name: value for name, value in {**record["options"], **record["parents"]}.items()
                  if name not in skipped}
        differing = [f"{name} was {before.get(name)!r}, is {now.get(name)!r}"
                     for name in sorted({*now, *before}) if now.get(name) != before.get(name)]
        if differing:
            raise UserError(f"{self.path}: the run there differs ({'; '.join(differing[:4])}"
                            f"{' …' if differing[4:] else ''}): start anew with --fresh, or choose "
                            "another --out")

    def begin(self, step: int) -> None:
        """Make the folder this run's, from `step` on. Not before training begins: had anything been
        wrong until then, an earlier run would still be there."""
        if self.o.fresh:
            for name in ("config.json", "checkpoint.pt", "metrics.jsonl", "samples.jsonl"):
                (self.path / name).unlink(missing_ok=True)  # config.json first: it says "finished"
        for name in ("metrics.jsonl", "samples.jsonl"):
            self._drop_lines_after(self.path / name, step)

    def _drop_lines_after(self, path: pathlib.Path, step: int) -> None:
        """Drop lines past the checkpoint's step; a resumed run writes them again."""
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        lines = [line for line in text.splitlines(keepends=True) if line.endswith("\n")]
        replace_text(path, "".join(line for line in lines if json.loads(line)["step"] <= step))

    def append(self, name: str, records: list[dict]) -> None:
        """Add JSON Lines to metrics.jsonl or samples.jsonl."""
        with open(self.path / name, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


# ---- progress ------------------------------------------------------------------------------------

class Progress:
    """A bar with rate and remaining time on a terminal; elsewhere a line of the same every 30 s."""

    SECONDS = 30.0

    def __init__(self, name: str, start: int, total: int):
        self.name, self.first, self.step, self.total = name, start, start, total
        self.began = self.printed = time.perf_counter()
        self.bar = tqdm(total=total, initial=start, desc=name, unit="step", dynamic_ncols=True,
                        mininterval=0.5, disable=None, smoothing=0.05)

    def update(self, **figures: float) -> None:
        """One step is done; figures: what to show of it."""
        self.step += 1
        self.bar.set_postfix({name: f"{value:.3g}" for name, value in figures.items()},
                             refresh=False)
        self.bar.update()
        now = time.perf_counter()
        if self.bar.disable and now - self.printed >= self.SECONDS:
            self.printed = now
            rate = (self.step - self.first) / (now - self.began)
            left = tqdm.format_interval((self.total - self.step) / rate)
            shown = "".join(f", {name} {value:.3g}" for name, value in figures.items())
            print(f"{self.name}: step {self.step} of {self.total}, {rate:.2f} steps/s, {left} "
                  f"left{shown}", flush=True)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: Any) -> None:
        self.bar.close()


# ---- the run -------------------------------------------------------------------------------------

class Run:
    """A stage under way. `model` is what it trains, on its device; `state` is the checkpoint's that
    it resumes from, {} for a new run; `step` counts the steps done before."""

    def __init__(self, folder: RunFolder, model: nn.Module, tokenizer: Any, template: str,
                 state: dict[str, Any], write: Callable[..., None]):
        """write(path, model, tokenizer, **state) saves a checkpoint."""
        self.folder, self.o, self.stage = folder, folder.o, folder.stage
        self.tokenizer, self.template, self.state, self.write = tokenizer, template, state, write
        self.step = state.get("step", 0)
        self.started = time.perf_counter() - state.get("seconds", 0.0)
        if not state:
            show(self.o, f"{self.stage}: options")
        self.compute = Compute(self.o, self.stage, model.config.d_model, state)
        self.device, self.dtype = self.compute.device, self.compute.dtype
        self.model = model.to(self.device)
        use_products(self.model, self.compute.products)

    def seconds(self) -> float:
        """Seconds of work since the run began, those before a resume included."""
        return time.perf_counter() - self.started

    def progress(self, total: int) -> Progress:
        """Training begins: the folder becomes this run's."""
        self.folder.begin(self.step if self.state else -1)
        self.write_config(finished=False)
        return Progress(self.stage, self.step, total)

    def log(self, step: int, **metrics: Any) -> None:
        """One line of metrics.jsonl after `step` finished steps; NaN is left out."""
        numbers = {name: float(f"{x:.6g}") if isinstance(x, float) else x
                   for name, x in metrics.items() if x == x}
        self.folder.append("metrics.jsonl", [{"step": step, **numbers}])

    def samples(self, step: int, records: list[dict]) -> None:
        """Texts to read, with their scores, into samples.jsonl."""
        self.folder.append("samples.jsonl", [{**record, "step": step} for record in records])

    def save(self, step: int, **state: Any) -> None:
        """Write the checkpoint after `step` finished steps; state: what the stage needs to
        continue."""
        self.write(self.folder.path, self.model, self.tokenizer, stage=self.stage, step=step,
                   **self.compute.settings(), seconds=self.seconds(), options=self.folder.options,
                   parents=self.folder.parents, template=self.template, **state)

    def stop_if_asked(self, step: int, save: Callable[[int], None]) -> None:
        """After Ctrl-C or SIGTERM: save, print the command that resumes, raise Interrupted."""
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
        """config.json: what ran, where, and for how long."""
        versions = {"python": platform.python_version(), "torch": torch.__version__,
                    "numpy": np.__version__}
        record = {"stage": self.stage, "finished": finished, "options": self.folder.options,
                  "parents": self.folder.parents, **self.compute.settings(), "commit": git_commit(),
                  "processor": processor(), "threads": torch.get_num_threads(),
                  "seconds": round(self.seconds(), 1),
                  "peak_memory_mb": peak_memory_mb(), "versions": versions}
        replace_text(self.folder.path / "config.json", json.dumps(record, indent=1,
                                                                  ensure_ascii=False))
