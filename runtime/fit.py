"""The loop of maximum likelihood, shared by pretraining, fine-tuning and the reward model."""
import math
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from runtime.device import compile_trunks
from runtime.draws import torch_seed
from runtime.optim import learning_rate, make_optimizers, restore, set_learning_rate
from runtime.options import UserError
from runtime.run import Run


def fit(run: Run, model: nn.Module, n_steps: int, losses: Callable[[int], Iterator[tuple[Tensor, int]]],
        measure: Callable[[int], dict[str, float]], **state) -> dict[str, float]:
    """Gradient descent: at each step add up the gradients of `losses(step)`, clip, step; now and then measure and save.

    losses(step) yields (loss, tokens): parts of one optimizer step, each already divided by the step's token count.
    Returns the last measurements. Resumes from run.state.
    """
    o = run.o
    optimizers = make_optimizers(model, o)
    restore(optimizers, run.state)
    done, tokens, since, last = run.state.get("step", 0), 0, time.perf_counter(), run.state.get("measured", {})
    trunk = getattr(model, "backbone", model)
    trunk.recompute = o.recompute
    if run.compile == "on":
        compile_trunks(trunk)

    def save() -> None:
        run.save(step + 1, model, optimizers=[x.state_dict() for x in optimizers], measured=last, **state)

    with run.progress(done, n_steps) as bar:
        for step in range(done, n_steps):
            factor = learning_rate(step, n_steps, o.warmup, o.decay)
            set_learning_rate(optimizers, factor)
            torch.manual_seed(torch_seed(o.seed, run.stage, "dropout", step))
            model.train()
            total = 0.0
            for loss, n in losses(step):
                loss.backward()
                total += float(loss.detach())
                tokens += n
            norm = float(nn.utils.clip_grad_norm_(model.parameters(), o.clip or math.inf))
            if not math.isfinite(total + norm):
                saved = step >= o.save_every or run.state
                kept = "the last good checkpoint is kept" if saved else "nothing was saved yet"
                raise UserError(f"{run.stage}: the loss is {total}, its gradient's norm {norm} at step {step + 1}; "
                                f"{kept}: lower --lr ({o.lr:g}) or --adam_lr, or look for damaged records")
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            if run.compile_now(step + 1, n_steps, decide_at=5):
                compile_trunks(trunk)
            bar.update()
            measuring = (step + 1) % o.eval_every == 0 or step + 1 == n_steps
            if measuring or (step + 1) % o.log_every == 0:
                now = time.perf_counter()
                metrics = {"loss": total, "lr": factor * o.lr, "grad_norm": norm,
                           "tokens_per_s": tokens / (now - since), "seconds": run.seconds()}
                if measuring:
                    model.eval()
                    last = measure(step + 1)
                    metrics |= last
                run.log(step + 1, **metrics)
                bar.set_postfix(loss=f"{total:.3f}", **{k: f"{v:.3f}" for k, v in last.items() if k.startswith("val_")})
                tokens, since = 0, time.perf_counter()
            if (step + 1) % o.save_every == 0 or step + 1 == n_steps:
                save()
            run.stop_if_asked(step + 1, save)
    model.eval()
    return last
