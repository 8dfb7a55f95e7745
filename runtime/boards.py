"""TensorBoard: the numbers of metrics.jsonl, also as event files, with --tensorboard.

metrics.jsonl stays the record: the events are written from its lines, anew for every process, so that a
resumed run shows every step once.
"""
import contextlib
import pathlib
from typing import Any

from runtime.lines import parse_line, read_lines
from runtime.options import UserError

FOLDER = "tensorboard"  # in a run's folder; it holds one file


def require_tensorboard() -> Any:
    """torch's SummaryWriter; UserError with what to install without the package."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("--tensorboard needs the package tensorboard: python -m pip install tensorboard, or "
                        "leave the flag out and draw with python -m tools.plot") from None
    return SummaryWriter


class Board:
    """Event files of one run: first the lines of metrics.jsonl that are there, then every new one."""

    def __init__(self, folder: pathlib.Path):
        writer, events = require_tensorboard(), folder / FOLDER
        for old in events.glob("events.out.tfevents.*"):  # of the process before: its lines come again
            old.unlink()
        self.writer = writer(str(events))
        for _, line in read_lines(folder / "metrics.jsonl"):
            with contextlib.suppress(ValueError):
                self.add(parse_line(line))

    def add(self, record: dict[str, Any]) -> None:
        """One line of metrics.jsonl; what is no number is left out."""
        for name, value in record.items():
            if name != "step" and isinstance(value, int | float):
                self.writer.add_scalar(name, value, record["step"])
        self.writer.flush()
