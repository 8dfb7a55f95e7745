"""Figures of a run that have gone wrong: each is said once, with what to do about it."""
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from tqdm import tqdm


class Alarm(NamedTuple):
    """wrong(value, first) is asked of each logged value of a metric; first: its first one."""

    metric: str
    wrong: Callable[[float, float], bool]
    message: str


class Alarms:
    """Watches a run's metrics. What is said, and each metric's first value, is the `state` that a
    checkpoint keeps."""

    def __init__(self, stage: str, alarms: Sequence[Alarm], state: dict[str, Any] | None = None):
        self.stage, self.alarms = stage, alarms
        self.said: list[str] = list((state or {}).get("said", []))
        self.first: dict[str, float] = dict((state or {}).get("first", {}))

    def check(self, step: int, metrics: dict[str, float]) -> None:
        """Warn, on stderr, of what went wrong after `step` steps and was not said before."""
        for name, wrong, message in self.alarms:
            value = metrics.get(name, math.nan)
            if not math.isfinite(value):
                continue
            first = self.first.setdefault(name, value)
            if wrong(value, first) and message not in self.said:
                self.said.append(message)
                tqdm.write(f"{self.stage}: warning: {name} is {value:.3g} at step {step} (first "
                           f"{first:.3g}): {message}", file=sys.stderr)

    def state(self) -> dict[str, Any]:
        return {"said": self.said, "first": self.first}
