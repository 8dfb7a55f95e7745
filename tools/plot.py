"""Draw a run's curves on one page: did every stage learn, and what did PPO pay for its reward?

    python -m tools.plot out/reviews
    python -m tools.plot seed0/reviews seed1/reviews seed2/reviews

One run's page is out/reviews/curves.png; several runs become the mean and a min–max band over the
steps in common. Reads metrics.jsonl of each stage (pretrain, sft, reward, ppo) and draws the
metrics that are there. Solid lines are training batches, dots are held-out texts or prompts. Needs
matplotlib (an extra); without it the terminal shows the main curves.
"""
import dataclasses
import math
import pathlib
import sys
from typing import TYPE_CHECKING

import numpy as np

from runtime.lines import parse_line, read_lines
from runtime.options import UserError, option, parse, run_main
from runtime.tables import text_plot

if TYPE_CHECKING:  # matplotlib is an extra: imported where it is used
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

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


PANELS = (
    Panel("pretrain", "Loss", "nats per token", ("loss", "val_loss"), text=True),
    Panel("pretrain", "Bits per byte", "bits", ("val_bpb",)),
    Panel("pretrain", "Learning rate", "", ("lr",)),
    Panel("pretrain", "Speed", "tokens/s", ("tokens_per_s",)),
    Panel("sft", "Loss on replies", "nats per token", ("loss", "val_loss"), text=True),
    Panel("reward", "Loss", "nats, LM loss included", ("loss",), text=True),
    Panel("reward", "AUC", "area under ROC curve", ("val_auc",)),
    Panel("reward", "Accuracy", "share of texts", ("val_accuracy",)),
    Panel("ppo", "Score", "reward per reply", ("score",), text=True),
    Panel("ppo", "Objective", "score − β · KL, per reply", ("objective",)),
    # eval_raw_score is logged raw, without normalisation, clip and end penalty: its partner is
    # raw_score, not score.
    Panel("ppo", "Raw score", "reward model's logit", ("raw_score", "eval_raw_score")),
    Panel("ppo", "Reward parts", "mean per reply, before weights", ("part_*",)),
    Panel("ppo", "Judge", "mean P(liked)", ("judge", "eval_judge")),
    Panel("ppo", "Judged positive", "share of replies",
          ("judged_positive", "eval_judged_positive")),
    Panel("ppo", "KL", "nats per reply", ("kl", "eval_kl"), text=True),
    Panel("ppo", "KL coefficient", "reward per nat", ("kl_coef",)),
    Panel("ppo", "Reference perplexity", "per token", ("ref_perplexity", "eval_ref_perplexity")),
    Panel("ppo", "Entropy", "nats per token", ("entropy",)),
    Panel("ppo", "Length", "tokens per reply", ("length", "eval_length")),
    Panel("ppo", "Replies that end", "share of replies", ("end_rate", "eval_end_rate")),
    Panel("ppo", "Distinct-2", "share of bigrams", ("eval_distinct2",)),
    Panel("ppo", "Explained variance", "1 is perfect", ("explained_variance",), floor=-1.0),
    Panel("ppo", "Value bias", "mean V − mean return", ("value_bias",)),
    Panel("ppo", "Value loss", "squared reward", ("value_loss",)),
    Panel("ppo", "Approximate KL of an update", "nats per token", ("approx_kl",)),
    Panel("ppo", "Clipped ratios", "share of tokens", ("clip_frac",)),
    Panel("ppo", "Gradient norm", "before clipping", ("policy_grad_norm", "critic_grad_norm"),
          ("policy", "critic")),
)
STAGES = tuple(dict.fromkeys(panel.stage for panel in PANELS))
COLORS = {"pretrain": "#33689e", "sft": "#2b8a78", "reward": "#c46f1f", "ppo": "#7650a4"}
SECOND, HELD_OUT, FAINT = "#c2528b", "#222222", "#7a7a7a"
COLUMNS = 4


# ---- reading -------------------------------------------------------------------------------------

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
    if not any(key in run.get(panel.stage, {}) for panel in PANELS for key in panel.keys):
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


def named_keys(panel: Panel, runs: list[Run]) -> Panel:
    """The panel with every metric that its key `…*` begins, as many as the runs have."""
    if not panel.keys[0].endswith("*"):
        return panel
    keys = dict.fromkeys(key for run in runs for key in run.get(panel.stage, {}) if key.startswith(panel.keys[0][:-1]))
    return dataclasses.replace(panel, keys=tuple(keys), labels=tuple(key.partition("_")[2] for key in keys))


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
    for panel in PANELS:
        if wanted and panel.title.lower() not in wanted:
            continue
        panel = named_keys(panel, runs)
        curves = {key: series(runs, panel.stage, key) for key in panel.keys}
        curves = {key: (steps, values) for key, (steps, values) in curves.items() if len(steps)}
        if curves:
            panels.append((panel, curves))
    if not panels:
        raise UserError("nothing to draw: these runs share no step of any metric; draw them one by "
                        "one")
    return panels


# ---- drawing -------------------------------------------------------------------------------------

def draw_panel(ax: "Axes", panel: Panel, curves: dict[str, tuple[np.ndarray, np.ndarray]],
               n_runs: int) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    for key, (steps, values) in curves.items():
        held_out, mean = key.startswith(("val_", "eval_")), values.mean(0)
        second = panel.labels and key != panel.keys[0]
        color = HELD_OUT if held_out else SECOND if second else COLORS[panel.stage]
        if len(panel.labels) > 2:
            color = f"C{panel.keys.index(key)}"
        style = {"linewidth": 1.6}
        if held_out:
            style = {"marker": "o", "markersize": 4, "linewidth": 0.8}
        if len(steps) == 1:
            style["marker"] = "o"  # a line through one point is invisible
        label = panel.labels[panel.keys.index(key)] if panel.labels else None
        ax.plot(steps, mean, color=color, label=label, zorder=3 if held_out else 2, **style)
        if len(values) > 1:
            ax.fill_between(steps, values.min(0), values.max(0), color=color, alpha=0.18,
                            linewidth=0)
    everything = np.concatenate([values.ravel() for _, values in curves.values()])
    if everything.min() < panel.floor < everything.max():
        ax.set_ylim(bottom=panel.floor)
    last = max(1, *(steps[-1] for steps, _ in curves.values()))
    ax.set_xlim(-0.04 * last, 1.04 * last)  # every axis begins at 0, so panels of a stage compare
    used = min(len(values) for _, values in curves.values())
    ax.set_title(panel.title, loc="left", fontsize=11, fontweight="bold")
    ax.set_title(panel.stage + (f", {used} of {n_runs} runs" if used < n_runs else ""), loc="right",
                 fontsize=9, color=COLORS[panel.stage])
    ax.set_xlabel("update" if panel.stage == "ppo" else "step", fontsize=8, color=FAINT)
    ax.set_ylabel(panel.unit, fontsize=8, color=FAINT)
    ax.tick_params(labelsize=8, colors=FAINT, length=2)
    ax.grid(color="#e4e4e4", linewidth=0.7)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color("#bbbbbb")
    ax.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10], integer=True))
    ax.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    if panel.labels and len(curves) > 1:
        ax.legend(fontsize=8, frameon=False)


def draw(runs: list[Run], title: str, titles: str = "") -> "Figure":
    """One page of all panels that have something to show. Raises ImportError without matplotlib."""
    from matplotlib.figure import Figure  # not pyplot: no window, no global state

    panels = to_draw(runs, titles)
    columns = min(COLUMNS, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(3.6 * columns, 2.6 * rows + 0.8), layout="constrained",
                    facecolor="white")
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08, wspace=0.02, hspace=0.03)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for ax, (panel, curves) in zip(axes, panels, strict=False):
        draw_panel(ax, panel, curves, len(runs))
    for ax in axes[len(panels):]:
        ax.remove()
    # The fonts that come with matplotlib know no Chinese: another name than ASCII would be a row of
    # boxes.
    figure.suptitle(title if title.isascii() else "curves", x=0.01, ha="left", fontsize=16,
                    fontweight="bold", parse_math=False)
    legend = ["lines: training batches", "dots: held-out"]
    if len(runs) > 1:
        legend += [f"mean of {len(runs)} runs, band from lowest to highest"]
    figure.supxlabel("   ·   ".join(legend), x=0.01, ha="left", fontsize=9, color=FAINT)
    return figure


def draw_as_text(runs: list[Run]) -> str:
    """The main curves (mean over the runs) in characters; held-out ones where a panel has nothing
    else."""
    plots, panels = [], to_draw(runs)
    for panel, curves in [p for p in panels if p[0].text] or panels:
        steps, values = next(iter(curves.values()))
        unit = f" in {panel.unit}" if panel.unit else ""
        plots.append(text_plot(values.mean(0), f"{panel.stage}: {panel.title}{unit}, steps "
                                               f"{steps[0]} to {steps[-1]}"))
    return "\n\n".join(plots)


# ---- command line --------------------------------------------------------------------------------

@dataclasses.dataclass
class PlotOptions:
    """`python -m tools.plot DIR [DIR…]`"""

    out: str = option("", "picture to write (.png, .pdf, .svg); empty: curves.png in DIR, of "
                          "several runs curves-<n>-runs.png in the first DIR")
    panels: str = option("", "titles of the panels to draw, separated by commas; empty: all")
    traceback: bool = option(False, "show where in the code an error arose")


def main(argv: list[str]) -> None:
    n = next((i for i, word in enumerate(argv) if word.startswith("-")), len(argv))
    folders = [pathlib.Path(word) for word in argv[:n]]
    o = parse(PlotOptions, argv[n:], "-m tools.plot DIR [DIR…]")
    if not folders:
        raise UserError("no folder given: which runs? python -m tools.plot out/reviews")
    runs = [read_metrics(folder) for folder in folders]
    out = pathlib.Path(o.out or folders[0] / ("curves.png" if len(runs) == 1
                                              else f"curves-{len(runs)}-runs.png"))
    name = folders[0].resolve().name
    try:
        figure = draw(runs, name if len(runs) == 1 else f"{name}, {len(runs)} runs",
                      o.panels)
    except ImportError:
        print(draw_as_text(runs))
        print("\nfor all curves as a picture, install the extra: python -m pip install matplotlib")
        return
    try:
        figure.savefig(out, dpi=120)
    except (OSError, ValueError) as error:  # no such folder, disk full, unknown kind of picture
        raise UserError(f"{out}: the picture cannot be written: {error}; "
                        "choose another --out") from None
    print(f"written: {out}")


if __name__ == "__main__":
    sys.exit(run_main(main, sys.argv[1:]))
