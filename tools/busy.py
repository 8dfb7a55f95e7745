"""What waiting threads cost: training calm, and beside another busy process, for several settings.

    python -m tools.busy default 500 1000 2000 passive

A number is GOMP_SPINCOUNT, how often a waiting thread looks before it sleeps; `default` is what
libgomp itself takes, `passive` is OMP_WAIT_POLICY. Each run pretrains the demo's model for a few
steps; runs take turns, so that a machine that drifts is not a setting that wins.
"""
import runtime  # noqa: F401 (before torch: it sets how threads wait)
import dataclasses
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile

from runtime.options import Options, UserError, option, parse, run_main
from runtime.tables import table

ROOT = pathlib.Path(__file__).resolve().parent.parent
# What libgomp does when nothing is set. Said to it in full: we set a smaller count ourselves.
LIBGOMP = {"GOMP_SPINCOUNT": "300000"}
# It ends with us, even if we are killed.
COUNTS = "import os, sys\nwhile os.getppid() == int(sys.argv[1]): pass"


@dataclasses.dataclass
class BusyOptions(Options):
    """`python -m tools.busy [default|passive|NUMBER …]`"""

    rounds: int = option(3, "runs of each setting, calm and busy, in turns", low=1)
    steps: int = option(80, "steps of 2,048 tokens in each run", low=20)
    limit: float = option(40.0, "seconds after which a slow run is ended and counted as it stands",
                          low=5.0)
    traceback: bool = option(False, "show where in the code an error arose")


def variables(setting: str) -> dict[str, str]:
    """The environment that a setting stands for. Raises UserError if it stands for none."""
    if setting == "default":
        return LIBGOMP
    if setting == "passive":
        return {"OMP_WAIT_POLICY": "passive"}
    if setting.isascii() and setting.isdigit():
        return {"GOMP_SPINCOUNT": setting}
    raise UserError(f"{setting!r} is not a setting: default, passive, or a number of spins")


def tokens_per_second(setting: str, o: BusyOptions, busy: bool) -> float:
    """The median rate of a short pretraining, alone or beside a process that only counts."""
    environment = {name: value for name, value in os.environ.items()
                   if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")} | variables(setting)
    with tempfile.TemporaryDirectory() as out:
        beside = [subprocess.Popen([sys.executable, "-c", COUNTS, str(os.getpid())])] if busy else []
        try:
            words = ["train.py", "pretrain", f"--out={out}", f"--tokens={o.steps * 2048}",
                     "--log_every=5", "--dtype=bfloat16", "--compile=off"]
            subprocess.run([sys.executable, *words], cwd=ROOT, env=environment, check=True,
                           capture_output=True, timeout=o.limit)
        except subprocess.TimeoutExpired:
            pass
        except subprocess.CalledProcessError as error:
            raise UserError(f"train.py failed: {error.stderr.decode(errors='replace')[-300:]}") from None
        finally:
            for process in beside:
                process.kill()
                process.wait()
        lines = (pathlib.Path(out) / "reviews/pretrain/metrics.jsonl").read_text("utf-8").splitlines()
    rates = [record["tokens_per_s"] for record in map(json.loads, lines) if "tokens_per_s" in record]
    if not rates:
        raise UserError(f"no five steps in {o.limit:g} seconds: give more with --limit")
    return statistics.median(rates)


def main(argv: list[str]) -> int:
    n = next((i for i, word in enumerate(argv) if word.startswith("-")), len(argv))
    settings = argv[:n] or ["default", "1000", "passive"]
    o = parse(BusyOptions, argv[n:], "-m tools.busy [default|passive|NUMBER …]")
    for setting in settings:
        variables(setting)  # a mistake is said before anything is measured
    rates = {(setting, busy): [] for busy in (False, True) for setting in settings}
    for _ in range(o.rounds):
        for (setting, busy), seen in rates.items():
            seen.append(tokens_per_second(setting, o, busy))
            print(f"{setting}, {'busy' if busy else 'calm'}: {seen[-1]:,.0f} tokens/s",
                  file=sys.stderr, flush=True)

    def shown(setting: str, busy: bool) -> str:
        seen = rates[setting, busy]
        return f"{statistics.median(seen):,.0f} ({min(seen):,.0f}–{max(seen):,.0f})"

    print(f"median of {o.rounds} runs (least–greatest), tokens/s")
    print(table([{"setting": setting, "calm": shown(setting, False), "busy": shown(setting, True)}
                 for setting in settings],
                {"setting": "setting", "calm": "calm", "busy": "beside a busy process"}))
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main, sys.argv[1:]))
