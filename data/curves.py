"""A run's curves: which metrics make a panel, and how metrics.jsonl is read. tools/plot.py draws them
with matplotlib, data/html.py as SVG in the report."""
import contextlib
import dataclasses
import math
import pathlib
from typing import Any

import numpy as np

from runtime.lines import parse_line, read_lines
from runtime.options import UserError

Run = dict[str, dict[str, dict[int, float]]]  # stage → metric → step → value


@dataclasses.dataclass(frozen=True)
class Panel:
    """One small plot: metrics of one stage that share a scale."""

    stage: str
    title: str
    unit: str
    keys: tuple[str, ...]
    labels: tuple[str, ...] = ()  # a legend, only where two training curves share the panel
    floor: float = -math.inf  # the axis ends here, if curves begin far below
    text: bool = False  # drawn without matplotlib, too
    report: bool = False  # in the report, too
    pattern: str = ""  # the title with a star that this one was made from

    def named(self, runs: list[Run]) -> "list[Panel]":
        """This panel; one whose first key ends with a star once for every name that the runs logged in
        its place."""
        if not self.keys[0].endswith("*"):
            return [self]
        head = self.keys[0][:-1]
        names = dict.fromkeys(key[len(head):] for run in runs for key in run.get(self.stage, {})
                              if key.startswith(head))
        return [dataclasses.replace(self, title=self.title.replace("*", name), pattern=self.title,
                                    keys=tuple(key.replace("*", name) for key in self.keys))
                for name in names]


# A star stands for a name: one panel for each part of the reward, the spread of an ensemble's members
# among them.
PANELS = (
    Panel("pretrain", "Loss", "nats per token", ("loss", "val_loss"), text=True, report=True),
    Panel("pretrain", "Bits per byte", "bits", ("val_bpb",)),
    Panel("pretrain", "Learning rate", "", ("lr",)),
    Panel("pretrain", "Speed", "tokens/s", ("tokens_per_s",)),
    Panel("sft", "Loss on replies", "nats per token", ("loss", "val_loss"), text=True, report=True),
    Panel("best", "Loss on the best replies", "nats per token", ("loss", "val_loss"), report=True),
    Panel("best", "Raw score", "reward model's score", ("eval_raw_score",)),
    Panel("reward", "Loss", "LM loss included", ("loss",), text=True, report=True),
    Panel("reward", "AUC", "area under ROC curve", ("val_auc",), report=True),
    Panel("reward", "Accuracy", "share of pairs or texts", ("val_accuracy",), report=True),
    Panel("reward", "Correlation", "with people's ratings", ("val_correlation",), report=True),
    Panel("reward", "Accuracy: *", "share of pairs or texts", ("val_accuracy_*",), report=True),
    Panel("reward", "AUC: *", "area under ROC curve", ("val_auc_*",), report=True),
    Panel("reward", "Correlation: *", "with people's ratings", ("val_correlation_*",), report=True),
    Panel("judge", "Loss", "LM loss included", ("loss",)),
    Panel("judge", "AUC", "area under ROC curve", ("val_auc",)),
    Panel("judge", "Accuracy", "share of pairs or texts", ("val_accuracy",)),
    Panel("judge", "Correlation", "with people's ratings", ("val_correlation",)),
    Panel("ppo", "Score", "reward per reply", ("score",), text=True, report=True),
    Panel("ppo", "Objective", "score − β · KL, per reply", ("objective",)),
    # eval_raw_score is logged raw, without normalisation, clip and end penalty: its partner is
    # raw_score, not score.
    Panel("ppo", "Raw score", "reward model's score", ("raw_score", "eval_raw_score")),
    Panel("ppo", "Judge", "mean, 0.5 is neutral", ("judge", "eval_judge"), report=True),
    Panel("ppo", "Judged positive", "share of replies",
          ("judged_positive", "eval_judged_positive"), report=True),
    Panel("ppo", "KL", "nats per reply", ("kl", "eval_kl"), text=True, report=True),
    Panel("ppo", "KL coefficient", "reward per nat", ("kl_coef",)),
    Panel("ppo", "Reference perplexity", "per token", ("ref_perplexity", "eval_ref_perplexity")),
    Panel("ppo", "Reward: *", "mean over replies", ("part_*", "eval_part_*"), report=True),
    Panel("ppo", "Entropy", "nats per token", ("entropy",)),
    Panel("ppo", "Length", "tokens per reply", ("length", "eval_length"), report=True),
    Panel("ppo", "Replies that end", "share of replies", ("end_rate", "eval_end_rate"), report=True),
    Panel("ppo", "Distinct-2", "share of bigrams", ("eval_distinct2",), report=True),
    Panel("ppo", "Explained variance", "1 is perfect", ("explained_variance",), floor=-1.0),
    Panel("ppo", "Value bias", "mean V − mean return", ("value_bias",)),
    Panel("ppo", "Value loss", "squared reward", ("value_loss",)),
    Panel("ppo", "Approximate KL of an update", "nats per token", ("approx_kl",)),
    Panel("ppo", "Clipped ratios", "share of tokens", ("clip_frac",)),
    Panel("ppo", "Gradient norm", "before clipping", ("policy_grad_norm", "critic_grad_norm"),
          ("policy", "critic")),
)
COLORS = {"pretrain": "#33689e", "sft": "#2b8a78", "reward": "#c46f1f", "ppo": "#7650a4",
          "judge": "#8a6d3b", "best": "#b0413e"}
HELD_OUT_PREFIXES = ("val_", "eval_")
STAGES = tuple(dict.fromkeys(panel.stage for panel in PANELS))


# ---- reading -------------------------------------------------------------------------------------

def read_log(path: pathlib.Path) -> list[dict[str, Any]]:
    """The records of a log that a killed process may have left, up to the first line that is none; []
    without a file that can be read."""
    records = []
    with contextlib.suppress(ValueError, UserError):
        for _, line in read_lines(path) if path.is_file() else ():
            if not isinstance(record := parse_line(line), dict):
                break
            records.append(record)
    return records


def curves_of(folder: pathlib.Path) -> Run:
    """The curves of a run's stages, as far as its logs can be read: no log is worth a report."""
    run: Run = {}
    for stage in STAGES:
        for record in read_log(folder / stage / "metrics.jsonl"):
            for key, value in record.items() if isinstance(record.get("step"), int) else ():
                if key != "step" and isinstance(value, int | float) and math.isfinite(value):
                    run.setdefault(stage, {}).setdefault(key, {})[record["step"]] = value
    return run


def read_stage(path: pathlib.Path) -> dict[str, dict[int, float]]:
    """metrics.jsonl as metric → step → value. What is no finite number is left out, and so is a
    last line cut short: the run is still writing it. Another line that is no record raises
    UserError with file and line."""
    curves: dict[str, dict[int, float]] = {}
    for number, line in read_lines(path):
        try:
            record = parse_line(line)
            step = record.pop("step")
        except (ValueError, KeyError, TypeError, AttributeError):
            if not line.endswith(b"\n"):
                break
            raise UserError(f'{path}:{number}: not a record of metrics ({{"step": …}}): '
                            "delete the line, or run the stage again") from None
        for key, value in record.items():
            if isinstance(value, int | float) and math.isfinite(value):
                curves.setdefault(key, {})[step] = value
    return curves


def read_metrics(folder: pathlib.Path) -> Run:
    """The curves of a run's stages; a folder with nothing that a panel shows raises UserError."""
    paths = {stage: folder / stage / "metrics.jsonl" for stage in STAGES}
    run = {stage: read_stage(path) for stage, path in paths.items() if path.is_file()}
    panels = [panel for pattern in PANELS for panel in pattern.named([run])]
    if not any(key in run.get(panel.stage, {}) for panel in panels for key in panel.keys):
        inner = sorted(str(path.parent.parent) for path in folder.glob("*/*/metrics.jsonl"))
        raise UserError(f"{folder}: nothing to draw: no metrics in "
                        f"{', '.join(f'{stage}/' for stage in STAGES)}; "
                        + (f"did you mean {inner[0]}?" if inner
                           else "give the folder of a run, such as out/reviews"))
    return run


def series(runs: list[Run], stage: str, key: str) -> tuple[np.ndarray, np.ndarray]:
    """(steps (S,), values (R, S)) of the R runs that logged this metric, at the steps that all of
    these share.

    >>> a, b = {"ppo": {"kl": {1: 0.0, 2: 1.0}}}, {"ppo": {"kl": {2: 3.0, 3: 9.0}}}
    >>> series([a, b, {}], "ppo", "kl")
    (array([2]), array([[1.],
           [3.]]))
    """
    curves = [run[stage][key] for run in runs if run.get(stage, {}).get(key)]
    steps = sorted(set.intersection(*(set(curve) for curve in curves))) if curves else []
    return np.array(steps, int), np.array([[curve[step] for step in steps] for curve in curves],
                                          float)


def to_draw(runs: list[Run],
            titles: str = "") -> list[tuple[Panel, dict[str, tuple[np.ndarray, np.ndarray]]]]:
    """The panels that have something to show, each with its curves; UserError if there are none.

    titles: those to draw, separated by commas; empty: all.
    """
    wanted = [title.strip().lower() for title in titles.split(",") if title.strip()]
    if unknown := set(wanted) - {panel.title.lower() for panel in PANELS}:
        raise UserError(f"--panels: there is no {', '.join(sorted(unknown))}; the panels are "
                        f"{', '.join(dict.fromkeys(panel.title for panel in PANELS))}")
    panels = []
    for panel in (p for pattern in PANELS for p in pattern.named(runs)):
        if wanted and not wanted & {panel.title.lower(), panel.pattern.lower()}:
            continue
        curves = {key: series(runs, panel.stage, key) for key in panel.keys}
        curves = {key: (steps, values) for key, (steps, values) in curves.items() if len(steps)}
        if curves:
            panels.append((panel, curves))
    if not panels:
        raise UserError("nothing to draw: these runs share no step of any metric; draw them one by "
                        "one")
    return panels
