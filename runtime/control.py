"""What is set anew for each update: the price of an unwanted quantity, steered so that the quantity comes
near a target, and the learning rates of an actor and its critic."""
import math
import sys
from typing import Any

from tqdm import tqdm

from runtime.optim import learning_rate


class KLController:
    """The price of KL, fixed or steered so that a reply's KL comes near a target.

    Steered, it is coef · exp(clip(KL / target − 1, ± 1)): cheaper below the target, dearer above it, at
    once; and coef follows slowly (`update`). Ziegler's rule alone, fast enough for 40 updates, swings
    around the target, for the policy takes a dozen updates to follow a price; and so does a price that
    answers three times as hard (on `ratings`, between 1.9 and 5.4 nats for a target of 4).
    """

    GAIN = 1.0

    def __init__(self, coef: float, target: float | None = None, horizon: float = 1_000, kl: float = 0.0):
        """kl: of a reply, in the update before."""
        self.coef, self.target, self.horizon, self.kl = coef, target, horizon, kl

    @property
    def price(self) -> float:
        """What the next update pays for a nat.

        >>> [round(KLController(0.2, target=6, kl=kl).price, 3) for kl in (0, 6, 7, 99)]
        [0.074, 0.2, 0.236, 0.544]
        """
        if self.target is None:
            return self.coef
        return self.coef * math.exp(self.GAIN * min(max(self.kl / self.target - 1, -1), 1))

    def update(self, kl_per_reply: float, n_replies: int) -> None:
        """coef *= max(0.1, 1 + clip(KL / target − 1, ± 0.2) · replies / horizon) (Ziegler 2019): it stays
        above 0, from where it would never move.

        >>> control = KLController(0.2, target=6, horizon=10_000)
        >>> control.update(9.0, 256)
        >>> round(control.coef, 6)
        0.201024
        """
        self.kl = kl_per_reply
        if self.target is not None:
            error = min(max(kl_per_reply / self.target - 1, -0.2), 0.2)
            self.coef *= max(0.1, 1 + error * n_replies / self.horizon)

    @classmethod
    def starting(cls, o: Any, spread: float, state: dict[str, float] | None = None) -> "KLController":
        """As a run begins, or goes on from the `state()` of a checkpoint. o: PPO's options, with
        kl_control resolved; spread: of what the starting policy's replies are paid.

        Were scores of that spread normal, their optimum π_ref · exp(score / β) would be spread² / 2β²
        nats away. Without a --kl_coef, adaptive control starts at the β for which that is the target.
        A fixed price at which a sum of parts would go more than 50 nats away is said, with that β.
        """
        fitting = spread / math.sqrt(2 * o.kl_target)
        if o.kl_control != "adaptive":
            if not state and o.reward and spread > 10 * o.kl_coef > 0:
                tqdm.write(f"warning: the spread of what the starting policy is paid is {spread:.3g}, "
                           f"{spread / o.kl_coef:.0f} times --kl_coef {o.kl_coef:g}: the policy will go far; try "
                           f"--kl_coef {fitting:.2g}, for some {o.kl_target:g} nats", file=sys.stderr)
            return cls(o.kl_coef)
        start = o.kl_coef if "kl_coef" in o.explicit or o.kl_coef != type(o).kl_coef or spread <= 0 else fitting
        return cls(**{"coef": start, "target": o.kl_target, "horizon": o.kl_horizon, **(state or {})})

    def state(self) -> dict[str, float]:
        """What a checkpoint keeps."""
        return {"coef": self.coef, "kl": self.kl}


def actor_critic_rates(o: Any, step: int) -> tuple[float, float]:
    """Learning rates of (policy, critic) in an update: each rises from its own first update on, and then
    falls to the last. o: PPO's options."""
    first = o.critic_warmup
    policy, rise = 0.0, first / o.updates
    if step >= first:
        policy = learning_rate(step - first, o.updates - first, o.warmup, 1 - o.warmup, o.final_lr)
    critic = learning_rate(step, o.updates, rise, 1 - rise, o.final_lr)
    return o.policy_lr * policy, o.critic_lr * critic
