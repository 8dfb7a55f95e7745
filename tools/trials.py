"""Trials of the whole road, too long for a test.

    python -m tools.trials kill --runs 30

kills `python train.py` at random moments, by SIGKILL, SIGTERM and SIGINT in turn, runs the same
command again, and compares what it leaves, bit by bit, with an uninterrupted run: weights, optimizer
state, metrics (without seconds and rates) and samples. Everything is small and made here: no network.
"""
import runtime  # noqa: F401 (before torch: it sets how threads wait)
import dataclasses
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from typing import Any

import torch

from runtime.options import Options, UserError, option, parse, run_main
from runtime.storage import load_whole
from train import STAGES

ROOT = pathlib.Path(__file__).resolve().parent.parent
SIGNALS = ("SIGKILL", "SIGTERM", "SIGINT")
CLOCK = ("seconds", "_per_s")  # what has this in its name is never twice the same
SHORT = ["--preset=smoke", "--dtype=float32", "--compile=off", "--vocab_size=300", "--save_every=3",
         "--pretrain.tokens=12000", "--pretrain.log_every=1", "--pretrain.eval_every=10",
         "--sft.log_every=1", "--sft.eval_every=4", "--reward.log_every=1", "--reward.eval_every=4",
         "--ppo.updates=8", "--ppo.eval_every=2", "--ppo.report_prompts=8"]


@dataclasses.dataclass
class TrialOptions(Options):
    """`python -m tools.trials kill`"""

    runs: int = option(30, "runs to kill and resume", low=1)
    seed: int = option(0, "the moments of the kills follow from it", low=0)
    traceback: bool = option(False, "show where in the code an error arose")


# ---- a small world -------------------------------------------------------------------------------

def write_texts(folder: pathlib.Path, seed: int = 0) -> None:
    """Made-up reviews in the four files that a user's folder may hold."""
    rng = random.Random(seed)
    nouns = "room book screen bed story keyboard lobby price service breakfast".split()
    good, bad = "good clean warm new fine".split(), "bad slow loud old cold".split()

    def review(words: list[str]) -> str:
        return (f"The {rng.choice(nouns)} was {rng.choice(words)} and the {rng.choice(nouns)} was "
                f"{rng.choice(words)}.")

    prompts = [f"Review {i} of the {rng.choice(nouns)}" for i in range(200)]
    records = {"pretrain": [{"text": f"{review(good)} {review(bad)} No {i}."} for i in range(300)],
               "sft": [{"prompt": p, "response": review(good + bad)} for p in prompts],
               "reward": [{"prompt": p, "chosen": review(good), "rejected": review(bad)}
                          for p in prompts],
               "ppo": [{"prompt": p} for p in prompts]}
    folder.mkdir(parents=True)
    for name, rows in records.items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


def start(texts: pathlib.Path, out: pathlib.Path) -> subprocess.Popen:
    """`python train.py` in a process of its own, which prepares its own data; it prints to log.txt.
    """
    out.mkdir(parents=True, exist_ok=True)
    words = [sys.executable, "train.py", *SHORT, f"--data={texts}", f"--out={out / 'out'}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MOSSLET_CACHE": str(out / "cache")}
    with open(out / "log.txt", "a", encoding="utf-8") as log:
        return subprocess.Popen(words, cwd=ROOT, env=environment, stdout=log, stderr=log)


def finish(texts: pathlib.Path, out: pathlib.Path) -> float:
    """Run to the end; the seconds it took. UserError, with what was printed last, if it fails."""
    began, running = time.monotonic(), start(texts, out)
    try:
        code = running.wait()
    finally:
        running.kill()  # if we are stopped, it is too
    if code:
        last = (out / "log.txt").read_text(encoding="utf-8", errors="replace").splitlines()[-1:]
        raise UserError(f"train.py ended with {code}: {' '.join(last)[:300]}")
    return time.monotonic() - began


# ---- kill ----------------------------------------------------------------------------------------

def kill(texts: pathlib.Path, out: pathlib.Path, moment: float, name: str) -> str:
    """Start, and send the signal after so many seconds; where that was. "" if the run was done."""
    running = start(texts, out)
    try:
        time.sleep(moment)
        if running.poll() is not None:
            return ""
        folders = [stage for stage in STAGES if (out / "out" / texts.name / stage).exists()]
        running.send_signal(getattr(signal, name))
        running.wait()
    finally:
        running.kill()
    return folders[-1] if folders else "preparation"


def same(a: Any, b: Any) -> bool:
    """Are two nests the same, tensors bit by bit?"""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def left_by(folder: pathlib.Path) -> dict[str, Any]:
    """What a stage leaves, without what depends on the clock."""
    payload = load_whole(folder / "checkpoint.pt")
    payload["state"].pop("seconds")
    options = payload["state"].pop("options")
    payload["state"]["options"] = {k: v for k, v in options.items() if k != "out"}
    lines = {name: [json.loads(line) for line
                    in (folder / name).read_text(encoding="utf-8").split("\n")[:-1]]
             for name in ("metrics.jsonl", "samples.jsonl")}
    timeless = [{k: v for k, v in line.items() if not any(word in k for word in CLOCK)}
                for line in lines["metrics.jsonl"]]
    return {"weights": payload.pop("model"), "state": payload, "metrics.jsonl": timeless,
            "samples.jsonl": lines["samples.jsonl"]}


def differences(expected: pathlib.Path, found: pathlib.Path) -> list[str]:
    """Which parts of which stages differ between two runs' folders."""
    differing = []
    for stage in [name for name in STAGES if (expected / name).exists()]:  # no judge here
        a, b = left_by(expected / stage), left_by(found / stage)
        differing += [f"{stage}/{part}" for part in a if not same(a[part], b[part])]
    return differing


def trial(texts: pathlib.Path, whole: pathlib.Path, out: pathlib.Path, moment: float,
          name: str) -> tuple[str, list[str]]:
    """(what was done, what differs afterwards) of one run, killed after so many seconds."""
    while not (where := kill(texts, out, moment, name)):
        shutil.rmtree(out)  # it was done before the signal came
        moment *= 0.9
    done = f"{name} after {moment:.2f} s, in {where}"
    try:
        finish(texts, out)
        return done, differences(whole / "out" / texts.name, out / "out" / texts.name)
    except (UserError, OSError, ValueError) as error:
        return done, [str(error)]


def kill_trials(o: TrialOptions) -> int:
    """The number of runs that differ from the uninterrupted one."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job would pass on "ignore"
    rng, failed = random.Random(o.seed), 0
    with tempfile.TemporaryDirectory() as folder:
        texts, whole = pathlib.Path(folder) / "texts", pathlib.Path(folder) / "whole"
        write_texts(texts)
        seconds = finish(texts, whole)
        print(f"uninterrupted: {seconds:.1f} s", flush=True)
        for i in range(o.runs):
            out = pathlib.Path(folder) / str(i)
            done, differing = trial(texts, whole, out, rng.uniform(0, seconds),
                                    SIGNALS[i % len(SIGNALS)])
            failed += bool(differing)
            print(f"{i + 1}: {done}: {'differs: ' + ', '.join(differing) if differing else 'identical'}",
                  flush=True)
            shutil.rmtree(out)
    print(f"{o.runs - failed} of {o.runs} are bit for bit the uninterrupted run")
    return failed


def main(argv: list[str]) -> int:
    if argv[:1] != ["kill"]:
        raise UserError("usage: python -m tools.trials kill [--runs N] [--seed N]")
    return int(kill_trials(parse(TrialOptions, argv[1:], "-m tools.trials kill")) > 0)


if __name__ == "__main__":
    sys.exit(run_main(main, sys.argv[1:]))
