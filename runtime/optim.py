"""Optimizers and learning rates: Muon and AdamW, and the schedule over a run."""
import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from runtime.device import half_is_fast
from runtime.learning import learning
from runtime.options import MaximumLikelihoodOptions, UserError
from runtime.run import NotFinite


class Muon(torch.optim.Optimizer):
    """Momentum made orthogonal, so that all directions of a matrix are learned at one speed (Jordan
    2024).

    matrices: (parameter, the rows of each matrix stacked in it). Each matrix is made orthogonal by
    itself: in one piece, the part with small gradients, such as v below q and k, would hardly move.
    The step is lr · sqrt(max(1, rows / columns)) times that matrix; weight decay is decoupled. As
    torch.optim.Muon, but matrices of one shape form one batch, which saves kernel launches.
    """

    def __init__(self, matrices: Sequence[tuple[Tensor, tuple[int, ...]]], lr: float,
                 momentum: float = 0.95, weight_decay: float = 0.0, iterations: int = 5):
        super().__init__([p for p, _ in matrices], dict(
            lr=lr, momentum=momentum, weight_decay=weight_decay, iterations=iterations))
        self.rows = dict(matrices)

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            momentum, shapes = group["momentum"], defaultdict(list)
            for p in group["params"]:
                if p.grad is None:
                    continue
                average = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                average.lerp_(p.grad, 1 - momentum)
                update = p.grad.lerp(average, momentum)  # Nesterov's look ahead
                for matrix, part in zip(p.split(self.rows[p]), update.split(self.rows[p]),
                                        strict=True):
                    shapes[matrix.shape].append((matrix, part))
            for shape, stacked in shapes.items():
                matrices, updates = zip(*stacked, strict=True)
                size = group["lr"] * max(1, shape[0] / shape[1]) ** 0.5
                for matrix, direction in zip(
                        matrices, orthogonal(torch.stack(updates), group["iterations"]), strict=True):
                    matrix.mul_(1 - group["lr"] * group["weight_decay"])
                    matrix.add_(direction, alpha=-size)


def orthogonal(x: Tensor, iterations: int) -> Tensor:
    """Matrices (n, rows, columns) with the singular vectors of x and all singular values near 1.

    A Newton–Schulz iteration with Jordan's (2024) quintic, whose coefficients are steep at 0;
    bfloat16 suffices, where the device computes in it.
    """
    wide = x.shape[1] <= x.shape[2]
    x = x if wide else x.mT
    x = x.bfloat16() if half_is_fast(x.device.type) else x.float()
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(iterations):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x,
                          beta=3.4445)
    return x if wide else x.mT


def make_optimizers(model: Any, o: MaximumLikelihoodOptions) -> list[torch.optim.Optimizer]:
    """Muon for model.matrix_parameters(), AdamW for embeddings, norms and heads; or AdamW for all; of those
    that learn.

    Adapters (LoRA) are AdamW's, at --adam_lr: Muon makes the step of a whole matrix orthogonal, and
    orthogonal steps of two factors are not that of their product.
    """
    matrices = [(p, rows) for p, rows in model.matrix_parameters() if p.requires_grad]
    chosen = {id(p) for p, _ in matrices}
    others = [p for p in learning(model) if id(p) not in chosen]
    if o.optimizer == "adamw" or not matrices:
        lr = o.lr if o.optimizer == "adamw" else o.adam_lr
        groups = [{"params": [p for p, _ in matrices], "weight_decay": o.weight_decay},
                  {"params": others, "weight_decay": 0.0}]
        return [torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)]
    return [Muon(matrices, lr=o.lr, weight_decay=o.weight_decay,
                 iterations=o.newton_schulz_iterations),
            torch.optim.AdamW(others, lr=o.adam_lr, betas=(0.9, 0.95), weight_decay=0.0,
                              fused=True)]


def learning_rate(step: int, n_steps: int, warmup: float, decay: float,
                  final: float = 0.0) -> float:
    """Factor on the learning rate of step 0, 1, …: a linear rise over the first share `warmup` of
    the steps, and a linear fall to `final` over the last share `decay`."""
    rise = (step + 1) / max(1, round(warmup * n_steps))
    fall = (n_steps - step) / max(1, decay * n_steps)
    return min(1.0, rise, final + (1 - final) * min(1.0, fall))


def set_learning_rate(optimizers: list[torch.optim.Optimizer], factor: float) -> None:
    """Each group's rate becomes `factor` times the one it was made with."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = factor * group.setdefault("initial_lr", group["lr"])


def restore(optimizers: list[torch.optim.Optimizer], state: dict) -> None:
    """Load the optimizers' state from a checkpoint's, if it is there; UserError if it is that of
    other weights."""
    for optimizer, saved in zip(optimizers, state.get("optimizers", []), strict=False):
        try:
            optimizer.load_state_dict(saved)
            fits = all(x.shape in ((), p.shape) for p, own in optimizer.state.items()
                       for x in own.values() if isinstance(x, Tensor))
        except (ValueError, LookupError, TypeError, AttributeError):
            fits = False
        if not fits:
            raise UserError("the checkpoint's optimizer state is not that of its weights: start anew "
                            "with --fresh")


def clip_gradients(modules: dict[str, nn.Module], max_norm: float) -> dict[str, Tensor]:
    """Clip each module's gradients to this norm (0: not at all); the norms before, by
    `<name>_grad_norm`."""
    return {f"{name}_grad_norm": nn.utils.clip_grad_norm_(module.parameters(), max_norm or math.inf)
            for name, module in modules.items()}


def stop_unless_finite(numbers: dict[str, Tensor], where: str, remedy: str) -> None:
    """NotFinite, with the numbers, if one of these losses and gradient norms is not finite."""
    if not torch.stack([*numbers.values()]).isfinite().all():  # one wait for a GPU
        shown = ", ".join(f"{name} {float(x):.4g}" for name, x in numbers.items())
        raise NotFinite(f"{where}: not finite: {shown}: {remedy}")
