"""The loop of maximum likelihood, shared by pretraining, fine-tuning and the reward model.

    θ ← θ − α · step(∇ L(θ))        one optimizer step a batch, the gradient clipped

A stage describes itself as a `Task`; `fit` steps, measures, logs and saves. Every random draw
follows from the step alone, so a resumed run continues exactly.
"""
import math
import time
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from runtime.device import compile_trunks
from runtime.draws import torch_seed
from runtime.learning import learned, load_learned
from runtime.machine import return_freed_memory
from runtime.optim import learning_rate, make_optimizers, restore, set_learning_rate
from runtime.options import MaximumLikelihoodOptions
from runtime.run import NotFinite, Run


class Task(Protocol):
    """What `fit` needs to know of a stage."""

    n_steps: int
    extra: dict[str, Any]  # kept in the checkpoint beside the model
    best_by: tuple[str, int]  # the measure that --keep best goes by, and 1 or −1: higher or lower is better

    def losses(self, step: int) -> Iterator[tuple[Tensor, int]]:
        """(loss, tokens) of each part of one optimizer step. A loss is already divided by the count
        of the whole step, so that the parts' gradients add up."""

    def measure(self, step: int) -> dict[str, float]:
        """Figures on validation, with the model in evaluation mode."""


def steps_of(o: Any, n: int) -> int:
    """Optimizer steps of a stage with --epochs, --records and --batch that learns from n records."""
    records = o.epochs * n
    return math.ceil((min(records, o.records) if o.records else records) / o.batch)


def fit(run: Run, task: Task) -> dict[str, float]:
    """Train run.model to the task's last step, from where run.state stopped; the last measurements.
    """
    o, model, n_steps = run.o, run.model, task.n_steps
    optimizers = make_optimizers(model, o)
    restore(optimizers, run.state)
    trunk = getattr(model, "backbone", model)
    trunk.recompute = o.recompute
    if run.compute.compile == "on":
        compile_trunks(trunk)
    measured, tokens, since = run.state.get("measured", {}), 0, time.perf_counter()
    best = Best(*task.best_by, run, n_steps) if o.keep == "best" else None

    def save(step: int) -> None:
        kept = {"best": best.state} if best else {}
        run.save(step, optimizers=[x.state_dict() for x in optimizers], measured=measured,
                 **task.extra, **kept)

    with run.progress(n_steps) as bar:
        for step in range(run.step, n_steps):
            # Learn.
            factor = learning_rate(step, n_steps, o.warmup, o.decay)
            set_learning_rate(optimizers, factor)
            torch.manual_seed(torch_seed(o.seed, run.stage, "dropout", step))
            loss, norm, n = gradient_step(run, optimizers, task, step)
            tokens += n
            done, last = step + 1, step + 1 == n_steps
            if run.compute.starts_compiling(done, n_steps, decide_at=5):
                compile_trunks(trunk)
            # Measure, log, save.
            measuring = last or done % o.eval_every == 0
            if measuring or done % o.log_every == 0:
                metrics = {"loss": loss, "lr": optimizers[0].param_groups[0]["lr"], "grad_norm": norm,
                           "tokens_per_s": tokens / (time.perf_counter() - since),
                           "seconds": run.seconds()}
                if measuring:
                    return_freed_memory()  # rows of validation have other shapes than those that left it
                    model.eval()
                    measured = task.measure(done)
                run.log(done, **metrics, **(measured if measuring else {}))
                tokens, since = 0, time.perf_counter()
            bar.update(loss=loss, **{k: v for k, v in measured.items() if k.startswith("val_")})
            if measuring and not math.isfinite(measured.get("val_loss", 0)):
                raise NotFinite(f"the validation loss is {measured['val_loss']} after step {done}: "
                                f"{advice(o)}")
            if best and measuring:
                best.see(done, measured)
                measured = best.restore(measured) if last else measured
            if last or done % o.save_every == 0:
                save(done)
            run.stop_if_asked(done, save)
    model.eval()
    return measured


class Best:
    """The weights with the best validation so far, in the computer's memory, with their step and measures.

    At the end the model has them. Where they are not the last ones, the last ones are kept in their
    place: a finished run that is lengthened goes on from those, as if it had never ended.
    """

    def __init__(self, name: str, sign: int, run: Run, total: int):
        """name, sign: the measure, and 1 or −1: higher or lower is better. total: the run's steps."""
        self.name, self.sign, self.run, self.total = name, sign, run, total
        self.state: dict[str, Any] | None = run.state.get("best")
        if self.state and "weights" not in self.state and run.step < total:  # the run had ended
            self.state["weights"] = self._copy()
            if "last" in self.state:
                load_learned(run.model, self.state.pop("last"))

    def _copy(self) -> dict[str, Tensor]:
        return {name: x.cpu().clone() for name, x in learned(self.run.model).items()}

    def see(self, step: int, measured: dict[str, float]) -> None:
        """Keep a copy of the weights if they are the best until now."""
        value = measured.get(self.name)
        if value is not None and (self.state is None
                                  or self.sign * value >= self.sign * self.state["measured"][self.name]):
            self.state = {"step": step, "measured": measured, "weights": self._copy()}

    def restore(self, measured: dict[str, float]) -> dict[str, float]:
        """Give the model the best weights, and say so if they are not the last ones; their measures."""
        if self.state is None:
            return measured
        best = self.state.pop("weights")
        if self.state["step"] != self.total:
            self.state["last"] = self._copy()
            load_learned(self.run.model, best)
            print(f"{self.run.stage}: kept the weights of step {self.state['step']}: {self.name} "
                  f"{self.state['measured'][self.name]:.4g}, at the end {measured[self.name]:.4g}", flush=True)
        return self.state["measured"]


def gradient_step(run: Run, optimizers: list[torch.optim.Optimizer], task: Task,
                  step: int) -> tuple[float, float, int]:
    """One optimizer step: (loss, gradient norm before clipping, tokens). NotFinite, before the
    weights change, if a number is not finite."""
    o, total, tokens = run.o, 0.0, 0
    run.model.train()
    for loss, n in task.losses(step):
        loss.backward()
        total += float(loss.detach())
        tokens += n
    norm = float(nn.utils.clip_grad_norm_(run.model.parameters(), o.clip or math.inf))
    if not math.isfinite(total + norm):
        raise NotFinite(f"the loss is {total}, its gradient's norm {norm} at step {step + 1}: "
                        f"{advice(o)}")
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return total, norm, tokens


def advice(o: MaximumLikelihoodOptions) -> str:
    """What to do against numbers that are not finite."""
    return f"lower --lr ({o.lr:g}) or --adam_lr, or look for damaged records"
