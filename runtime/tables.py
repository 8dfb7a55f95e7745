"""Tables and curves in characters, for reports and terminals."""
from collections.abc import Sequence
from typing import Any

import numpy as np


def table(rows: Sequence[dict], columns: dict[str, str]) -> str:
    """A Markdown table: columns maps a key to its title; numbers to three digits, what is missing
    is a dash."""
    def cell(x: Any) -> str:
        if not isinstance(x, float):
            return "–" if x is None else str(x)
        return f"{x:.3f}" if abs(x) < 10 else f"{x:.1f}"

    lines = [list(columns.values()), ["---"] * len(columns),
             *([cell(r.get(k)) for k in columns] for r in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def text_plot(values: Sequence[float], title: str, width: int = 60, height: int = 6) -> str:
    """A curve in characters, for terminals."""
    values = np.asarray(values, float)
    if not len(values):
        return f"{title}: no values"
    columns = np.interp(np.linspace(0, len(values) - 1, min(width, max(2, len(values)))),
                        np.arange(len(values)), values)
    low, high = float(columns.min()), float(columns.max())
    level = np.round((columns - low) / ((high - low) or 1) * (height - 1)).astype(int)
    lines = ["".join("•" if at == row else " " for at in level) for row in reversed(range(height))]
    axis = {0: f"{high:8.3g}", height - 1: f"{low:8.3g}"}
    return "\n".join([title, *(f"{axis.get(i, ''):8} |{line}" for i, line in enumerate(lines))])
