"""How a step is taken, and how large it is: Muon and AdamW, and the course of the learning rate over a run."""
import torch
from torch import nn

from options import Learning


def make_optimizers(model: nn.Module, o: Learning) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices, AdamW for embeddings, norms and heads; or AdamW for all.

    Muon (Jordan 2024) orthogonalises each matrix's momentum, so that all its directions are learned at one speed.
    """
    blocks = [p for n, p in model.named_parameters() if p.dim() == 2 and ".blocks." in f".{n}"]
    chosen = {id(p) for p in blocks}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    if o.optimizer == "adamw":
        groups = [{"params": blocks, "weight_decay": o.weight_decay}, {"params": rest, "weight_decay": 0.0}]
        return [torch.optim.AdamW(groups, lr=o.lr, betas=(0.9, 0.95))]
    return [torch.optim.Muon(blocks, lr=o.lr, weight_decay=o.weight_decay, ns_steps=o.muon_steps),
            torch.optim.AdamW(rest, lr=o.adam_lr, betas=(0.9, 0.95), weight_decay=0.0)]


def learning_rate(step: int, n_steps: int, warmup: float, decay: float, final: float = 0.0) -> float:
    """Factor on the learning rate: a linear rise over the first share `warmup` of the steps, and a linear fall to
    `final` over the last share `decay`."""
    rise = (step + 1) / max(1, round(warmup * n_steps))
    fall = (n_steps - step) / max(1, decay * n_steps)
    return min(1.0, rise, final + (1 - final) * min(1.0, fall))


def set_learning_rate(optimizers: list[torch.optim.Optimizer], factor: float) -> None:
    """Each group's rate becomes `factor` times the one it was made with."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = factor * group.setdefault("initial_lr", group["lr"])


def restore(optimizers: list[torch.optim.Optimizer], state: dict) -> None:
    """Give the optimizers their momentum back, where a checkpoint's state has it."""
    for optimizer, saved in zip(optimizers, state.get("optimizers", []), strict=False):
        optimizer.load_state_dict(saved)
