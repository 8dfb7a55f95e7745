"""Draw a run's curves on one page: did every stage learn, and what did PPO pay for its reward?

    python -m tools.plot out/reviews
    python -m tools.plot seed0/reviews seed1/reviews seed2/reviews

One run's page is out/reviews/curves.png; several runs become the mean and a min–max band over the
steps in common. Reads metrics.jsonl of each stage (data/curves.py says which) and draws the
metrics that are there. Solid lines are training batches, dots are held-out texts or prompts. Needs
matplotlib (an extra); without it the terminal shows the main curves.
"""
import dataclasses
import math
import pathlib
import sys
from typing import TYPE_CHECKING

import numpy as np

from data.curves import COLORS, HELD_OUT_PREFIXES, Panel, Run, read_metrics, to_draw
from runtime.options import UserError, option, parse, run_main
from runtime.tables import text_plot

if TYPE_CHECKING:  # matplotlib is an extra: imported where it is used
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SECOND, HELD_OUT, FAINT = "#c2528b", "#222222", "#7a7a7a"
COLUMNS = 4


# ---- drawing -------------------------------------------------------------------------------------

def draw_panel(ax: "Axes", panel: Panel, curves: dict[str, tuple[np.ndarray, np.ndarray]],
               n_runs: int) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    for key, (steps, values) in curves.items():
        held_out, mean = key.startswith(HELD_OUT_PREFIXES), values.mean(0)
        second = panel.labels and key != panel.keys[0]
        color = HELD_OUT if held_out else SECOND if second else COLORS[panel.stage]
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
