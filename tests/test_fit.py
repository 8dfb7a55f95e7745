"""The loop of maximum likelihood: rates, clipping, what is logged and saved, and what is never
stepped on."""
import math

import pytest
import torch

from model import ModelConfig, Transformer, save_checkpoint, weights_hash
from runtime.fit import fit
from runtime.optim import learning_rate, make_optimizers
from runtime.options import UserError, parse
from runtime.run import Run, RunFolder
from tests.conftest import TINY
from train import SFTOptions


class Toy:
    """A task of six steps on one tiny batch; `scale` multiplies the loss of a step."""

    def __init__(self, run: Run, n_steps: int = 6, scale=lambda step: 1.0):
        self.run, self.n_steps, self.scale, self.extra, self.measured = run, n_steps, scale, {"note": 7}, []

    def losses(self, step):
        yield self.run.model(torch.tensor([[7, 8]])).square().mean() * self.scale(step), 2

    def measure(self, step):
        self.measured.append((step, self.run.model.training))
        return {"val_loss": float(step)}


@pytest.fixture
def run_of(world, tmp_path):
    def made(*words):
        o = parse(SFTOptions, ["--dtype=float32", "--compile=off", f"--out={tmp_path}", *words],
                  "x")
        folder = RunFolder(o, "sft", {})
        run = Run(folder, Transformer(ModelConfig(**TINY)), world.data.tokenizer, "{prompt}", {},
                  save_checkpoint)
        run.logged, run.saved = [], []
        run.log = lambda step, **metrics: run.logged.append({"step": step, **metrics})
        save = run.save
        run.save = lambda step, **state: (run.saved.append((step, weights_hash(run.model), state)),
                                          save(step, **state))
        return run
    return made


def test_a_loss_that_is_not_finite_names_the_step_and_is_never_stepped_on(run_of):
    run = run_of("--save_every=1")
    with pytest.raises(UserError, match="at step 4.*last good checkpoint is kept"):
        fit(run, Toy(run, scale=lambda step: math.nan if step == 3 else 1.0))
    assert [step for step, _, _ in run.saved] == [1, 2, 3]
    assert run.saved[-1][1] == weights_hash(run.model)


def test_without_a_checkpoint_the_message_does_not_promise_one(run_of):
    run = run_of("--save_every=5")
    with pytest.raises(UserError, match="at step 2.*nothing was saved yet"):
        fit(run, Toy(run, scale=lambda step: math.inf if step == 1 else 1.0))


def test_the_loop_logs_the_rate_it_uses_and_clips_the_gradient(run_of, monkeypatch):
    run, used, real = run_of("--optimizer=adamw", "--lr=.1", "--log_every=1", "--warmup=.5",
                             "--decay=0", "--clip=.01"), [], torch.optim.AdamW.step

    def step(self, *arguments):
        norm = torch.cat([p.grad.flatten() for group in self.param_groups
                          for p in group["params"]]).norm()
        used.append((self.param_groups[0]["lr"], float(norm)))
        return real(self, *arguments)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    fit(run, Toy(run, 4, lambda step: 1e3))
    assert [rate for rate, _ in used] == pytest.approx([.05, .1, .1, .1])
    assert [rate for rate, _ in used] == [line["lr"] for line in run.logged]
    assert all(norm == pytest.approx(.01, rel=1e-3) for _, norm in used)
    assert run.logged[0]["grad_norm"] > .02


def test_it_measures_in_evaluation_mode_on_schedule_and_at_the_end(run_of):
    run = run_of("--eval_every=4", "--log_every=100")
    task = Toy(run)
    assert fit(run, task) == {"val_loss": 6.0}
    assert task.measured == [(4, False), (6, False)]
    assert [line["step"] for line in run.logged] == [4, 6]


def test_a_checkpoint_keeps_what_the_task_adds(run_of):
    run = run_of()
    fit(run, Toy(run, 2))
    (step, _, state), = run.saved
    assert step == 2
    assert state["note"] == 7
    assert state["measured"] == {"val_loss": 2.0}


def test_learning_rates_rise_stay_and_fall():
    rates = [learning_rate(step, 10, warmup=.2, decay=.5) for step in range(10)]
    assert rates == pytest.approx([.5, 1, 1, 1, 1, 1, .8, .6, .4, .2])
    assert learning_rate(9, 10, 0, 1.0, final=.1) == pytest.approx(.1 + .9 * .1)


def test_muon_trains_the_blocks_matrices_and_adamw_the_others():
    from reward import RewardConfig, RewardModel, RewardOptions
    model = RewardModel(RewardConfig(**TINY))
    muon, adamw = make_optimizers(model, parse(RewardOptions, [], "x"))
    name = {id(p): n for n, p in model.named_parameters()}
    of = lambda x: {name[id(p)] for group in x.param_groups for p in group["params"]}  # noqa: E731
    matrices = ("qkv.weight", "out.weight", "gate_up.weight", "down.weight")
    assert of(muon) == {n for n in name.values() if ".blocks." in n and n.endswith(matrices)}
    assert of(adamw) == set(name.values()) - of(muon)
