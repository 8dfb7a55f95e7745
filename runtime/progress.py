"""How far a stage is, on a terminal or in a log file."""
import time
from typing import Any

from tqdm import tqdm

from runtime.machine import Interrupt


class Progress:
    """A bar with rate and remaining time on a terminal; elsewhere a line of the same every 30 s."""

    SECONDS = 30.0

    def __init__(self, name: str, start: int, total: int):
        self.name, self.first, self.step, self.total = name, start, start, total
        self.began = self.printed = time.perf_counter()
        self.bar = tqdm(total=total, initial=start, desc=name, unit="step", dynamic_ncols=True,
                        mininterval=0.5, disable=None, smoothing=0.05)

    def update(self, **figures: float) -> None:
        """One step is done; figures: what to show of it."""
        self.step += 1
        self.bar.set_postfix({name: f"{value:.3g}" for name, value in figures.items()},
                             refresh=False)
        self.bar.update()
        now = time.perf_counter()
        if self.bar.disable and now - self.printed >= self.SECONDS:
            self.printed = now
            rate = (self.step - self.first) / (now - self.began)
            left = tqdm.format_interval((self.total - self.step) / rate)
            shown = "".join(f", {name} {value:.3g}" for name, value in figures.items())
            print(f"{self.name}: step {self.step} of {self.total}, {rate:.2f} steps/s, {left} "
                  f"left{shown}", flush=True)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: Any) -> None:
        Interrupt.stepping = False
        self.bar.close()
