"""Tables, curves in characters and JSON, for reports and terminals."""
import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np


def cell(x: Any) -> str:
    """A number to three digits; (value, low, high) with half its interval's width; what is missing
    is a dash.

    >>> cell((0.9164, 0.888, 0.94))
    '0.916 ±.026'
    """
    value, low, high = x if isinstance(x, tuple) else (x, math.nan, math.nan)
    if not isinstance(value, float):
        return "–" if value is None else str(value)
    digits = 3 if abs(value) < 10 else 1
    half = f"{(high - low) / 2:.{digits}f}".removeprefix("0")
    return f"{value:.{digits}f}" + ("" if math.isnan(high - low) else f" ±{half}")


def table(rows: Sequence[dict], columns: dict[str, str]) -> str:
    """A Markdown table whose columns stand below each other in a terminal; columns maps a key to
    its title, and `cell` says how values look."""
    lines = [list(columns.values()), *([cell(row.get(key)) for key in columns] for row in rows)]
    widths = [max(3, *map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join("| " + " | ".join(x.ljust(width) for x, width in zip(line, widths, strict=True)) + " |"
                     for line in lines)


def finite(x: Any) -> Any:
    """A nest of dicts, lists and tuples with null for numbers that are not finite, which JSON does
    not have."""
    if isinstance(x, dict):
        return {key: finite(value) for key, value in x.items()}
    if isinstance(x, list | tuple):
        return [finite(value) for value in x]
    return None if isinstance(x, float) and not math.isfinite(x) else x


def to_json(x: Any) -> str:
    """JSON on several lines, `finite`."""
    return json.dumps(finite(x), indent=1, ensure_ascii=False, allow_nan=False)


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
