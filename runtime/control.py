"""The price of an unwanted quantity, steered so that the quantity comes near a target."""
import math
import sys
from typing import Any

from tqdm import tqdm


class KLController:
    """The price of KL, fixed or steered so that a reply's KL comes near a target (Ziegler 2019)."""

    def __init__(self, coef: float, target: float | None = None, horizon: float = 10_000):
        self.coef, self.target, self.horizon = coef, target, horizon

    def update(self, kl_per_reply: float, n_replies: int) -> None:
        """coefficient *= max(0.1, 1 + clip(KL / target − 1, ± 0.2) · replies / horizon): it stays above
        0, from where it would never move.

        >>> control = KLController(0.2, target=6)
        >>> control.update(9.0, 256)
        >>> round(control.coef, 6)
        0.201024
        """
        if self.target is not None:
            error = min(max(kl_per_reply / self.target - 1, -0.2), 0.2)
            self.coef *= max(0.1, 1 + error * n_replies / self.horizon)

    @classmethod
    def starting(cls, o: Any, spread: float, coef: float | None = None) -> "KLController":
        """The price with which a run begins, or goes on at `coef`. o: PPO's options, with kl_control
        resolved; spread: of what the starting policy's replies are paid.

        Were scores of that spread normal, their optimum π_ref · exp(score / β) would be spread² / 2β²
        nats away. Without a --kl_coef, adaptive control starts at the β for which that is the target.
        """
        if o.kl_control != "adaptive":
            if coef is None and o.reward and spread > 10 * o.kl_coef > 0:
                tqdm.write(f"warning: the spread of what the starting policy is paid is {spread:.3g}, "
                           f"{spread / o.kl_coef:.0f} times --kl_coef {o.kl_coef:g}: the policy will go far; try "
                           f"--kl_coef {spread / math.sqrt(12):.2g}", file=sys.stderr)
            return cls(o.kl_coef)
        start = o.kl_coef
        if "kl_coef" not in o.explicit and o.kl_coef == type(o).kl_coef and spread > 0:
            start = spread / math.sqrt(2 * o.kl_target)
        return cls(start if coef is None else coef, o.kl_target, o.kl_horizon)
