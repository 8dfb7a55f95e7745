"""Time to a fixed loss on character-level Shakespeare, in turns with nanoGPT.

    python -m tools.race --nanogpt FOLDER --source FOLDER/data/shakespeare_char/input.txt

FOLDER is a clone of github.com/karpathy/nanoGPT. Both sides see the same text, split and window:
nanoGPT with the settings that its README gives for a CPU (4 layers, 128 wide, 64 characters, batch
12, 2,000 steps, no dropout), ours by `python train.py pretrain` with a model of that size. Counted
is the time of training steps until the loss on the whole validation split is first at most --loss;
evaluations are counted on neither side. Ours evaluates once, at the end of a run planned for so
many steps.
"""
import runtime  # noqa: F401 (before torch: it sets how threads wait)
import dataclasses
import json
import math
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

import torch

from data.prepare import CACHE
from data.sets import shakespeare
from runtime.machine import processor
from runtime.lines import parse_line, read_lines
from runtime.options import Options, UserError, as_dict, option, parse, run_main
from tools.measure import median_range, ratio, say

WINDOW, BATCH, STEPS = 64, 12, 2000


@dataclasses.dataclass
class RaceOptions(Options):
    """`python -m tools.race`"""

    nanogpt: str = option("", "folder of a clone of nanoGPT")
    source: str = option("", "the text; empty: that of --data shakespeare, downloaded where it is "
                             "missing")
    loss: float = option(1.886, "validation loss in nats per character that both must reach")
    seeds: int = option(3, "runs of each, in turns", low=1)
    steps: int = option(380, "steps that our run is planned for", low=1)
    traceback: bool = option(False, "show where in the code an error arose")


def their_run(o: RaceOptions, seed: int) -> Iterator[tuple[int, float, float]]:
    """(step, seconds of training so far, loss on all of validation), every 50 steps from the
    thousandth on."""
    from model import GPT, GPTConfig
    source = pathlib.Path(o.source) if o.source else None
    text = shakespeare.read(shakespeare.raw_files(source, CACHE / "downloads")[0])
    number = {c: i for i, c in enumerate(sorted(set(text)))}
    data = torch.tensor([number[c] for c in text])
    train, val = data[:int(0.9 * len(data))], data[int(0.9 * len(data)):]
    torch.manual_seed(seed)
    model = GPT(GPTConfig(n_layer=4, n_head=4, n_embd=128, block_size=WINDOW, bias=False,
                          vocab_size=len(number), dropout=0.0))
    optimizer = model.configure_optimizers(1e-1, 1e-3, (0.9, 0.99), "cpu")

    @torch.no_grad()
    def loss() -> float:
        inputs, targets = ((val[i:i + (len(val) - 1) // WINDOW * WINDOW]).view(-1, WINDOW)
                           for i in (0, 1))
        parts = [float(model(x, y)[1]) * y.numel()
                 for x, y in zip(inputs.split(256), targets.split(256), strict=True)]
        return sum(parts) / targets.numel()

    took = 0.0
    for step in range(1, STEPS + 1):
        start = time.perf_counter()
        rate = 1e-3 * step / 100 if step <= 100 else 1e-4 + 9e-4 * 0.5 * (
            1 + math.cos(math.pi * (step - 100) / (STEPS - 100)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        at = torch.randint(len(train) - WINDOW, (BATCH,))
        x, y = (torch.stack([train[i + k:i + k + WINDOW] for i in at]) for k in (0, 1))
        _, nats = model(x, y)
        nats.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        took += time.perf_counter() - start
        if step >= 1000 and step % 50 == 0:
            yield step, took, loss()


def our_run(o: RaceOptions, seed: int) -> tuple[float, float]:
    """(seconds, loss) of one run of train.py, from the start of its stage to its last step."""
    with tempfile.TemporaryDirectory() as out:
        settings = {"data": "shakespeare", "source": o.source, "out": out, "seed": seed,
                    "d_model": 128, "d_ff": 344, "max_len": WINDOW, "window": WINDOW,
                    "batch": BATCH, "tokens": o.steps * WINDOW * BATCH, "decay": 1,
                    "eval_every": 10 * o.steps}
        command = [sys.executable, "train.py", "pretrain",
                   *(f"--{name}={value}" for name, value in settings.items())]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise UserError(f"{' '.join(command)}: {done.stderr.strip()[-300:]}")
        *_, (_, line) = read_lines(pathlib.Path(out) / "shakespeare/pretrain/metrics.jsonl")
        last = parse_line(line)
    return last["seconds"], last["val_loss"]


def main(argv: list[str]) -> None:
    o = parse(RaceOptions, argv, "-m tools.race")
    if not o.nanogpt or not (pathlib.Path(o.nanogpt) / "model.py").exists():
        raise UserError(f"--nanogpt {o.nanogpt!r}: no model.py there; clone "
                        "github.com/karpathy/nanoGPT and name its folder")
    rows, theirs, ours = [], [], []
    for seed in range(o.seeds):
        code = ("import sys, tools.race as race; sys.modules.pop('model'); sys.path.insert(0, "
                f"{o.nanogpt!r}); race.print_their_run({as_dict(o)}, {seed})")
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        if done.returncode:
            raise UserError(f"nanoGPT: {done.stderr.strip()[-300:]}")
        step, took, loss = json.loads(done.stdout.strip().splitlines()[-1])
        seconds, reached = our_run(o, seed)
        theirs.append(took)
        ours.append(seconds)
        rows.append((seed, f"{took:.1f}", step, f"{loss:.3f}", f"{seconds:.1f}", o.steps,
                     f"{reached:.3f}", f"{took / seconds:.2f}"))
        print(rows[-1], flush=True)
    say(f"Seconds to a validation loss of {o.loss} ({processor()}, {torch.get_num_threads()} "
        f"threads, torch {torch.__version__}): {median_range(theirs, 1)} against "
        f"{median_range(ours, 1)}, ratio {ratio(theirs, ours)}", rows,
        ("seed", "nanoGPT s", "its step", "its loss", "ours s", "our steps", "our loss", "ratio"))


def print_their_run(options: dict, seed: int) -> None:
    """The first measurement of nanoGPT that reaches the loss, or its last one, as a JSON line."""
    o = RaceOptions(**options)
    for measurement in their_run(o, seed):
        if measurement[2] <= o.loss:
            break
    print(json.dumps(measurement))


if __name__ == "__main__":
    sys.exit(run_main(main, sys.argv[1:]))
