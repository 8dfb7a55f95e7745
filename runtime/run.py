"""A stage's folder: what was asked, what was measured, and the checkpoint that goes on exactly where it stopped.

`OUT/<data>/<stage>/` holds checkpoint.pt, config.json (options, versions, machine, seconds), metrics.jsonl (one JSON
object a logged step) and samples.jsonl (texts to read). train.py's stages open a `Run`, log into it, save with it.
"""
import json
import os
import pathlib
import platform
import shlex
import sys
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from data.prepared import Prepared
from model import Transformer, load_checkpoint, save_checkpoint
from reward import RewardModel
from runtime.device import compile_pays, pick_device, pick_dtype
from runtime.machine import Interrupt, Interrupted, git_commit, processor, replace_text
from runtime.options import Common, Learning, UserError, as_dict, show
from runtime.products import pick_products, use_products

try:
    import fcntl
except ImportError:  # Windows has none
    fcntl = None


def go_on() -> str:
    """The command that goes on with what this one began."""
    words = [w for w in sys.argv[1:] if not w.startswith(("--resume", "--fresh"))]
    all_stages = not words or words[0] == "all" or words[0].startswith("-")
    return " ".join(["python train.py", *map(shlex.quote, words)]) + ("" if all_stages else " --resume")


class Run:
    """One stage's folder, open for logging and saving."""

    # how a run is started and reported, not what it computes
    NOT_COMPARED = ("resume", "fresh", "traceback", "preset", "out", "report_prompts")

    def __init__(self, stage: str, o: Common, parents: dict[str, str], data: Prepared, width: int):
        self.stage, self.o, self.parents, self.data = stage, o, parents, data
        self.folder = run_folder(o, stage)
        self.started, self.seconds_before, self.state = time.perf_counter(), 0.0, {}
        self.last_step = self.started
        self.finished = False
        self.folder.mkdir(parents=True, exist_ok=True)
        self.hold()
        begun = (self.folder / "checkpoint.pt").exists()  # else there is nothing yet that could be lost or gone on with
        old = read_config(self.folder) if begun and not o.fresh else None
        self.settings = {k: v for k, v in as_dict(o).items() if k not in self.NOT_COMPARED}
        if old is not None:
            self._compare(old)
        if old is not None and old["finished"]:
            self.finished = True
            return
        if old is not None:
            cls = RewardModel if stage == "reward" else Transformer
            self.model, self.tokenizer, self.state = load_checkpoint(self.folder, "cpu", cls)
            self.seconds_before = self.state["seconds"]
        self.device = pick_device(o.device)
        if self.device != "cpu" and getattr(o, "rollout_dtype", "") == "int8":
            raise UserError(f"--rollout_dtype int8 is for a CPU: on {self.device} use bfloat16")
        self.dtype, why = self.state.get("dtype"), "as in the checkpoint"
        if self.dtype is None:
            self.dtype, why = pick_dtype(o.dtype, self.device, width)
        self.products, by = self.state.get("products"), "as in the checkpoint"
        if self.products is None:
            self.products, by = pick_products(self.device, width)
        use_products(self.products)
        if not self.state:
            show(o, f"{stage}: options")
        print(f"{stage}: {self.device}, {self.dtype} ({why}), float32 products by {self.products} ({by}), "
              f"{torch.get_num_threads()} threads", flush=True)
        self.compile = self.state.get("compile", o.compile)  # `auto` until the first steps tell how long it will take
        if self.compile == "on":
            self.decide_compile(0)

    def compile_now(self, step: int, n_steps: int, decide_at: int) -> bool:
        """Called when `step` steps are done: with --compile auto, does the last one before `decide_at` tell that enough
        work lies ahead? Always at the same step, so that a resumed run changes over where the uninterrupted one did."""
        now = time.perf_counter()
        took, self.last_step = now - self.last_step, now
        return self.compile == "auto" and step == decide_at and self.decide_compile(took * (n_steps - step))

    def decide_compile(self, seconds_ahead: float) -> bool:
        """Is what lies ahead worth compiling? Says what it chose."""
        pays, why = compile_pays(self.compile, self.device, seconds_ahead)
        self.compile = "on" if pays else "off"
        tqdm.write(f"{self.stage}: compile {self.compile} ({why})", file=sys.stdout)
        return pays

    def hold(self) -> None:
        """Two processes in one folder would write into each other's files; the system lets go when this one ends."""
        if fcntl is not None:
            self.held = open(self.folder / ".lock", "w")
            try:
                fcntl.lockf(self.held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                raise UserError(f"{self.folder}: another process is at work there: wait for it, or choose another "
                                "--out") from None
            except OSError:  # some network drives know no locks
                pass

    def _compare(self, old: dict) -> None:
        """Refuse to mix two different runs in one folder, and say what differs."""
        if not self.o.resume:
            raise UserError(f"{self.folder}: a run is there already: go on with `{go_on()}`, start anew with "
                            f"--fresh, or choose another --out")
        now = {**self.settings, **self.parents}
        before = {k: v for k, v in {**old["options"], **old["parents"]}.items() if k not in self.NOT_COMPARED}
        differing = [f"{k} was {before.get(k)!r}, is {now.get(k)!r}" for k in sorted({*now, *before})
                     if now.get(k) != before.get(k)]
        if differing:
            raise UserError(f"{self.folder}: the run there differs "
                            f"({'; '.join(differing[:4])}{' …' if differing[4:] else ''}): "
                            "start anew with --fresh, or choose another --out")

    def _trim(self, name: str) -> None:
        """Drop lines past the checkpoint's step: the resumed run writes them again."""
        path, step = self.folder / name, self.state.get("step", -1)
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
        replace_text(path, "".join(kept))

    def seconds(self) -> float:
        return self.seconds_before + time.perf_counter() - self.started

    def write_config(self, finished: bool = False) -> None:
        """What ran, where, and for how long."""
        record = {"stage": self.stage, "finished": finished, "options": self.settings, "parents": self.parents,
                  "dtype": self.dtype, "products": self.products, "compile": self.compile,
                  "commit": git_commit(), "processor": processor(),
                  "threads": torch.get_num_threads(), "seconds": round(self.seconds(), 1),
                  "versions": {"python": platform.python_version(), "torch": torch.__version__,
                               "numpy": np.__version__}}
        replace_text(self.folder / "config.json", json.dumps(record, indent=1, ensure_ascii=False))

    def log(self, step: int, **metrics) -> None:
        """One line of metrics.jsonl. `step` counts finished steps."""
        rounded = {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in metrics.items() if v == v}  # no NaN
        with open(self.folder / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **rounded}) + "\n")

    def samples(self, step: int, records: list[dict]) -> None:
        """Texts to read, with their scores."""
        with open(self.folder / "samples.jsonl", "a", encoding="utf-8") as file:
            file.writelines(json.dumps({"step": step, **r}, ensure_ascii=False) + "\n" for r in records)

    def save(self, step: int, model: nn.Module, **state) -> None:
        """Write the checkpoint after `step` finished steps, with all that the stage needs to go on."""
        save_checkpoint(self.folder, model, self.tokenizer, stage=self.stage, step=step, dtype=self.dtype,
                        products=self.products, compile=self.compile, seconds=self.seconds(), options=self.settings,
                        parents=self.parents, template=self.data.template, **state)

    def stop_if_asked(self, step: int, save: Callable[[], None]) -> None:
        """After Ctrl-C or SIGTERM: save, print the command that goes on, leave."""
        if Interrupt.number:
            save()
            print(f"\n{self.stage}: saved after step {step}; go on with `{go_on()}`", file=sys.stderr)
            raise Interrupted(Interrupt.number)

    def finish(self, **summary) -> None:
        """Mark the run as finished, so that `all` skips it and later stages build on it; print its last figures."""
        self.write_config(finished=True)
        self.finished = True
        text = ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in summary.items())
        print(f"{self.stage}: done in {self.seconds():.0f} s; {text}", flush=True)

    def progress(self, start: int, total: int) -> tqdm:
        """Training begins, and the folder becomes this run's. Not before: had anything been wrong, what an earlier run
        left would still be there."""
        if self.o.fresh:
            for name in ("config.json", "checkpoint.pt", "metrics.jsonl", "samples.jsonl"):  # config.json says finished
                (self.folder / name).unlink(missing_ok=True)
        self._trim("metrics.jsonl")
        self._trim("samples.jsonl")
        self.write_config()
        return tqdm(total=total, initial=start, desc=self.stage, unit="step", dynamic_ncols=True, mininterval=0.5,
                    disable=None, smoothing=0.05)


def read_config(folder: str | os.PathLike) -> dict | None:
    """config.json of a run's folder, or None where there is none; UserError where it is damaged."""
    path = pathlib.Path(folder) / "config.json"
    try:
        record = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
        if record is None or {"finished", "options", "parents"} <= set(record):
            return record
        raise ValueError
    except (ValueError, TypeError):
        raise UserError(f"{path}: damaged; train this stage anew with --fresh, or choose another --out") from None


def data_name(o: Common) -> str:
    return pathlib.Path(o.data).stem


def run_folder(o: Common, stage: str) -> pathlib.Path:
    """OUT/<data>/<stage>; of stage "" the folder that holds them all."""
    return pathlib.Path(o.out) / data_name(o) / stage


def parent(o: Common, data: Prepared, stage: str, given: str, cls: type = Transformer):
    """Load a parent checkpoint, the one given by flag or this run's own stage, and say what it fixes."""
    where = given or run_folder(o, stage)
    model, tokenizer, state = load_checkpoint(where, "cpu", cls)
    record, c = read_config(where), model.config
    if record is not None and not record["finished"]:
        raise UserError(f"{where}: its training is not finished (step {state['step']}): go on with `python train.py "
                        f"{state['stage']} --resume` and the options that it had, or take it as it is by the path of "
                        "its checkpoint.pt")
    print(f"from {where}: {c.n_layer} layers of width {c.d_model}, at most {c.max_len} tokens, vocabulary of "
          f"{c.vocab_size}")
    if "vocab_size" in o.explicit and data.tokenizer is not None and data.tokenizer.to_state() != tokenizer.to_state():
        raise UserError(f"--vocab_size {o.vocab_size} contradicts {where}, whose vocabulary of {c.vocab_size} tokens "
                        f"is used: leave it out, or pretrain anew")
    return model, tokenizer, state


def limit_length(o: Learning, model: Transformer) -> None:
    """No row is longer than the model was made for."""
    if o.max_len > model.config.max_len and "max_len" in o.explicit:
        raise UserError(f"--max_len {o.max_len} contradicts the parent model, which was made for rows of at most "
                        f"{model.config.max_len} tokens: lower it, or pretrain with a larger --max_len")
    o.max_len = min(o.max_len, model.config.max_len)


def check_inputs(data: Prepared, stages: Sequence[str], reward_from: str) -> None:
    """Before hours of work: is there something to learn from for each stage, and is the reward model one?"""
    for stage in stages:
        if stage == "pretrain":
            data.require_tokenizer()
        else:
            data.records(stage, "train")
    if reward_from:  # what the first stage starts from is soon looked at
        load_checkpoint(reward_from, "cpu", RewardModel)
