"""What there is: the stages, the data sets, the presets, and the runs in a folder.

    python train.py --list
    python train.py --list --out seed1
"""
import dataclasses
import pathlib
import re
from typing import Any

from data.curves import read_log
from data.sets import DATA_SETS
from runtime.options import Common, Options, UserError, as_dict, option
from runtime.run import read_config
from runtime.storage import previous_of, stored_state
from runtime.tables import table
from runtime.terminal import for_terminal

# The figures that say most of a stage, in this order.
FIGURES = ("val_loss", "val_auc", "val_accuracy", "val_correlation", "eval_raw_score", "eval_judged_positive",
           "eval_kl", "eval_distinct2")


@dataclasses.dataclass
class ListOptions(Options):
    """`python train.py --list`"""

    list: bool = option(False, "show stages, data sets, presets and what exists under --out")
    out: str = option("out", "folder with the runs")
    traceback: bool = option(False, "show where in the code an error arose")


def overview(stages: dict[str, type], about: str, out: str) -> str:
    """Stages, data sets, presets and runs as text. stages: classes of options, by name. about: a text
    with a line `python train.py STAGE   meaning` for each."""
    meanings = dict(re.findall(r"^ *python train\.py (\w+) {2,}(.*)$", about, re.MULTILINE))
    presets = next(f for f in dataclasses.fields(Common) if f.name == "preset").metadata["help"].split("; ")
    own = {"FILE or FOLDER": "your own texts, dialogues and feedback (docs/data.md)"}
    parts = {"Stages": dict.fromkeys(stages, "") | meanings,
             "Data sets (--data)": {name: known.summary for name, known in DATA_SETS.items()} | own,
             "Presets (--preset)": dict(preset.split(": ", 1) for preset in presets)}
    lines = []
    for title, entries in parts.items():
        width = max(map(len, entries))
        lines += [title, *(f"  {name:{width}}  {text}".rstrip() for name, text in entries.items()), ""]
    return "\n".join([*lines, f"Runs in {out}/", show_runs(stages, pathlib.Path(out))])


def show_runs(stages: dict[str, type], out: pathlib.Path) -> str:
    """The runs in a folder as a table: how far they are, what they were told, and their last figures."""
    rows = [row for folder in (sorted(out.iterdir()) if out.is_dir() else ()) if folder.is_dir()
            for stage, cls in stages.items() if (row := run_row(folder / stage, cls))]
    if not rows:
        return "  none: python train.py begins one, and --out names another folder of runs"
    titles = {"run": "run", "state": "state", "seconds": "seconds", "figures": "last figures", "options": "options"}
    return for_terminal(table(rows, titles))


def run_row(folder: pathlib.Path, cls: type) -> dict[str, Any] | None:
    """A run's row; None where there is none. A damaged one is shown as that: this command mends nothing."""
    checkpoint = folder / "checkpoint.pt"
    record, row = read_config(folder), {"run": f"{folder.parent.name}/{folder.name}"}
    if record is None and not checkpoint.exists() and not previous_of(checkpoint).exists():
        return None
    try:
        record = record or stored_state(checkpoint)
        metrics = read_log(folder / "metrics.jsonl")
    except UserError as error:
        return row | {"state": f"damaged: {str(error).partition(':')[2].strip()[:60]}"}
    steps = [m["step"] for m in metrics if isinstance(m.get("step"), int)]
    last = {name: m[name] for m in metrics for name in FIGURES if isinstance(m.get(name), int | float)}
    usual, seconds = as_dict(cls()), record.get("seconds")
    told = {name: x for name, x in record.get("options", {}).items() if name in usual and usual[name] != x}
    return row | {
        "state": "finished" if record.get("finished") else f"step {max(steps, default=0)}",
        "seconds": None if seconds is None else f"{seconds:.0f}",
        "figures": ", ".join(f"{name} {last[name]:.3f}" for name in FIGURES if name in last) or None,
        "options": " ".join(f"{name}={x}" for name, x in told.items()) or "the defaults"}
