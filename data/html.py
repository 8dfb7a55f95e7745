"""report.html: the report as one page that needs nothing else, with the curves in it; report.svg, the
curves alone, for report.md. `save_report` writes them beside report.md and report.json, and prints the
report.

Curves are SVG of our own: a line joins what was logged of training batches, dots are held-out prompts
or texts. Page and picture follow the reader's light or dark mode.
"""
import html
import json
import math
import pathlib
import re
import shlex
from typing import Any

import numpy as np

from data.curves import COLORS, HELD_OUT_PREFIXES, Panel, Run, curves_of, to_draw
from data.report import render_report, report_name
from runtime.lines import logged
from runtime.options import UserError
from runtime.run import record_of
from runtime.storage import replace_text
from runtime.tables import text_plot, to_json
from runtime.terminal import for_terminal

WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 300, 190, 46, 34, 40  # of a panel, in units of SVG
CURVE_STYLE = """
svg { font: 11px system-ui, sans-serif; --ink: #222; --faint: #767676; --line: #e2e2e2; }
svg text { fill: var(--faint); } svg .title { fill: var(--ink); font-size: 13px; font-weight: 600; }
svg .grid { stroke: var(--line); } svg .curve { stroke-width: 1.8; } svg .dot { fill: var(--ink); }
svg .held { stroke: var(--ink); stroke-width: 0.8; }
@media (prefers-color-scheme: dark) { svg { --ink: #e6e6e6; --faint: #9a9a9a; --line: #3a3a3a; } }
"""
PAGE_STYLE = """
:root { color-scheme: light dark; --text: #222; --paper: #fff; --soft: #f4f4f2; --rule: #ddd; --good: #7650a4; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e6e6e6; --paper: #17181a; --soft: #222427; --rule: #3a3c40; --good: #b79be0; } }
body { font: 16px/1.55 system-ui, sans-serif; color: var(--text); background: var(--paper);
  max-width: 72rem; margin: 0 auto; padding: 1rem; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; } p { max-width: 46rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: 0.9rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.3rem 0.7rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--rule); }
th:first-child, td:first-child { text-align: left; }
.curves { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(17rem, 100%), 1fr)); gap: 1rem; }
.curves svg { width: 100%; height: auto; }
.pair { background: var(--soft); border-radius: 0.5rem; padding: 0.7rem 1rem; margin: 0.8rem 0; white-space: pre-wrap; }
.pair p { margin: 0.3rem 0; max-width: none; } .who { color: var(--good); font-weight: 600; }
.warning { border-left: 4px solid #c46f1f; padding-left: 0.8rem; }
"""


# ---- curves --------------------------------------------------------------------------------------

def ticks(low: float, high: float, n: int = 3) -> list[float]:
    """Round numbers between low and high, some n of them.

    >>> ticks(0.0, 7.3), ticks(-0.2, 0.9), ticks(2.0, 2.0)
    ([0.0, 2.0, 4.0, 6.0], [0.0, 0.5], [2.0])
    """
    if not high > low:
        return [low]
    size = 10.0 ** math.floor(math.log10((high - low) / n))
    for step in (size, 2 * size, 5 * size, 10 * size):
        numbers = range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
        if len(numbers) <= n + 1:
            break
    return [round(k * step, 12) + 0.0 for k in numbers]


def panel_svg(panel: Panel, curves: dict[str, tuple[np.ndarray, np.ndarray]], where: str = "") -> str:
    """One panel as an <svg> element. curves: (steps (S,), values (1, S)) by metric, as `to_draw` gives
    them. where: further attributes of the element."""
    every = np.concatenate([values.ravel() for _, values in curves.values()])
    low, high = max(float(every.min()), min(panel.floor, float(every.max()))), float(every.max())
    if high - low < 1e-9 * max(1.0, abs(high)):
        low, high = low - (abs(low) or 1) / 10, high + (abs(high) or 1) / 10
    last = max(1, *(int(steps[-1]) for steps, _ in curves.values()))

    def x(step: float) -> float:
        return round(LEFT + step / last * (WIDTH - LEFT - 10), 1)

    def y(value: float) -> float:
        return round(HEIGHT - BOTTOM - (max(value, low) - low) / (high - low) * (HEIGHT - BOTTOM - TOP), 1)

    parts = [f'<text class="title" x="2" y="14">{html.escape(panel.title)}</text>',
             f'<text x="2" y="29">{html.escape(panel.unit)}</text>',
             f'<text x="{WIDTH - 4}" y="14" text-anchor="end" style="fill:{COLORS[panel.stage]}">{panel.stage}</text>']
    for tick in ticks(low, high):
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - 8}" y1="{y(tick)}" y2="{y(tick)}"/>'
                     f'<text x="{LEFT - 5}" y="{y(tick) + 4}" text-anchor="end">{tick:g}</text>')
    for tick in [t for t in ticks(0, last, 4) if t == int(t)]:
        parts.append(f'<text x="{x(tick)}" y="{HEIGHT - 18}" text-anchor="middle">{tick:g}</text>')
    parts.append(f'<text x="{WIDTH - 8}" y="{HEIGHT - 4}" text-anchor="end">'
                 f'{"update" if panel.stage == "ppo" else "step"}</text>')
    for key, (steps, values) in curves.items():
        points = [(x(step), y(value)) for step, value in zip(steps.tolist(), values[0].tolist(), strict=True)]
        line, held_out = " ".join(f"{a},{b}" for a, b in points), key.startswith(HELD_OUT_PREFIXES)
        if held_out or len(points) == 1:
            parts += [f'<circle class="dot" cx="{a}" cy="{b}" r="2.4"/>' for a, b in points]
        style = 'class="held"' if held_out else f'class="curve" style="stroke:{COLORS[panel.stage]}"'
        parts.append(f'<polyline fill="none" {style} points="{line}"/>')
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
            f'aria-label="{html.escape(panel.stage)}: {html.escape(panel.title)}"{where}>{"".join(parts)}</svg>')


def report_panels(run: Run) -> list[tuple[Panel, dict[str, tuple[np.ndarray, np.ndarray]]]]:
    """The panels of the report that have something to show: those of PPO first."""
    try:
        panels = [(panel, curves) for panel, curves in to_draw([run]) if panel.report]
    except UserError:  # nothing was logged
        return []
    return sorted(panels, key=lambda entry: entry[0].stage != "ppo")


def picture(run: Run, columns: int = 3) -> str:
    """The report's panels side by side, as an SVG file; "" if nothing was logged."""
    panels = report_panels(run)
    if not panels:
        return ""
    size = (columns * (WIDTH + 16), math.ceil(len(panels) / columns) * (HEIGHT + 16))
    inner = [panel_svg(panel, curves, f' x="{i % columns * (WIDTH + 16)}" y="{i // columns * (HEIGHT + 16)}" '
                                      f'width="{WIDTH}" height="{HEIGHT}"')
             for i, (panel, curves) in enumerate(panels)]
    return (f'<svg xmlns="http://www.w3.org/2000/svg" width="{size[0]}" height="{size[1]}" '
            f'viewBox="0 0 {size[0]} {size[1]}"><style>{CURVE_STYLE}</style>\n' + "\n".join(inner) + "\n</svg>\n")


# ---- the page ------------------------------------------------------------------------------------

def text_html(text: str, tag: str = "span") -> str:
    """A text of the data, escaped; Chinese is marked as that, so that a reader's fonts fit."""
    language = ' lang="zh"' if re.search("[\u4e00-\u9fff]", text) else ""
    return f"<{tag}{language}>{html.escape(text)}</{tag}>"


def block_html(block: str) -> str:
    """A block of the report's Markdown (a heading, a table, a paragraph) as HTML."""
    if heading := re.fullmatch(r"(#+) (.*)", block):
        level = len(heading[1])
        return f"<h{level}>{html.escape(heading[2])}</h{level}>"
    if block.startswith("| "):
        rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in block.splitlines()]
        lines = ["".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row)
                 for row, tag in [(rows[0], "th"), *((row, "td") for row in rows[2:])]]
        return '<div class="wide"><table>' + "".join(f"<tr>{line}</tr>" for line in lines) + "</table></div>"
    name = ' class="warning"' if block.startswith(("Warning", "Missing")) else ""
    return f"<p{name}>{html.escape(block)}</p>"


def pair_html(pair: dict[str, Any], report: dict[str, Any]) -> str:
    """A prompt, turn by turn, and the replies of both policies to it."""
    lines = [(f'<span class="who">{html.escape(who)}:</span> ' if who else "") + text_html(text, "b")
             for who, text in pair["turns"]]
    lines += [f'<span class="who">{html.escape(report[which])}:</span> ' + text_html(pair[when]["reply"])
              for which, when in (("first", "before"), ("last", "after"))]
    return '<div class="pair">' + "".join(f"<p>{line}</p>" for line in lines) + "</div>"


def page(report: dict[str, Any], name: str, run: Run) -> str:
    """The report of evaluate.py as a page: the words and tables of report.md, curves, and the pairs of
    replies."""
    blocks = [block_html(block) for block in render_report({**report, "pairs": []}, name).split("\n\n")]
    curves = [panel_svg(panel, curves) for panel, curves in report_panels(run)]
    if curves:
        at = next((i for i, block in enumerate(blocks) if block.startswith("<h2>")), len(blocks))
        blocks[at:at] = ["<h2>Curves</h2>", "<p>Lines: training batches. Dots: held-out prompts or texts.</p>",
                         '<div class="curves">' + "\n".join(curves) + "</div>"]
    pairs = [pair_html(pair, report) for pair in report["pairs"]]
    blocks += ["<h2>Before and after</h2>", *pairs] if pairs else []
    title = html.escape(f"{name}: report")
    return ('<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{title}</title>\n<style>{PAGE_STYLE}{CURVE_STYLE}</style>\n</head>\n<body>\n"
            + "\n".join(blocks) + "\n</body>\n</html>\n")


def write_page(report: dict[str, Any], root: pathlib.Path) -> str:
    """Write report.html and report.svg into a run's folder (of the test split report_test.html …).
    Returns what report.md says of the picture."""
    run, split = curves_of(root), report["split"]
    replace_text(root / report_name("report.html", split), page(report, root.name, run))
    if not (svg := picture(run)):
        return ""
    name = report_name("report.svg", split)
    replace_text(root / name, svg)
    return f"\n![curves]({name})\n"


# ---- what a report leaves in a run's folder -----------------------------------------------------

def save_report(report: dict[str, Any], scores: dict[str, dict[str, Any]], root: pathlib.Path,
                seconds: float = 0.0) -> None:
    """Write a run's report, with the seconds of each stage, and print it."""
    split, report["seconds"] = report["split"], {}
    for stage in ("pretrain", "sft", "reward", "ppo", "judge", "best"):
        if (root / stage / "checkpoint.pt").exists():
            report["seconds"][stage] = round(record_of(root / stage).get("seconds", 0), 1)
    # also after a resume
    report["seconds"]["all"] = round(max(seconds, sum(report["seconds"].values())), 1)
    text, path = render_report(report, root.name), root / report_name("report.md", split)
    for name, of_split in scores.items():
        replace_text(root / f"reward_{name}_scores.json", json.dumps(of_split))
    replace_text(root / report_name("report.json", split), to_json(report))
    replace_text(path, text + "\n" + write_page(report, root))
    print("\n" + for_terminal(text))
    for key, title in (("score", "reward per reply, by update"),
                       ("kl", "KL in nats per reply, by update")):
        print("\n" + text_plot(logged(root / "ppo" / "metrics.jsonl", key), title))
    plot, ppo = shlex.quote(str(root)), shlex.quote(str(root / "ppo"))
    print(f"\nwritten: {path} and {path.stem}.html; curves: python -m tools.plot {plot}; try it: python sample.py "
          f"--from {ppo} --prompt …")
