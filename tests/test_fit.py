"""The loop of maximum likelihood: what it steps on, logs, measures and saves, and how it resumes."""
import math
import types

import pytest
import torch

from model import ModelConfig, Transformer, load_checkpoint, save_checkpoint, weights_hash
from runtime.fit import fit, steps_of
from runtime.machine import Interrupt, Interrupted
from runtime.options import UserError, parse
from runtime.run import Run, RunFolder
from tests.conftest import TINY, equal
from train import SFTOptions


class Toy:
    """A task of six steps on one tiny batch; `scale` multiplies the loss of a step. It measures the
    step, and the last is best unless a test says otherwise."""

    best_by = ("val_loss", 1)

    def __init__(self, run: Run, n_steps: int = 6, scale=lambda step: 1.0):
        self.run, self.n_steps, self.scale, self.extra, self.measured = run, n_steps, scale, {"note": 7}, []

    def losses(self, step):
        yield self.run.model(torch.tensor([[7, 8]])).square().mean() * self.scale(step), 2

    def measure(self, step):
        self.measured.append((step, self.run.model.training))
        return {"val_loss": float(step)}


@pytest.fixture
def run_of(world, tmp_path):
    """run_of(*words): a run of a tiny model, which keeps what is logged and saved."""
    def made(*words):
        o = parse(SFTOptions, ["--dtype=float32", "--compile=off", f"--out={tmp_path}", *words],
                  "x")
        folder, state = RunFolder(o, "sft", {}), {}
        model = Transformer(ModelConfig(**{**TINY, "vocab_size": 500}))
        model.initialise(0)
        if folder.resumes:
            model, _, state = load_checkpoint(folder.path, resumes=True)
        run = Run(folder, model, world.data.tokenizer, "{prompt}", state, save_checkpoint)
        run.logged, run.saved = [], []
        run.log = lambda step, **metrics: run.logged.append({"step": step, **metrics})
        save = run.save
        run.save = lambda step, **state: (run.saved.append((step, weights_hash(run.model), state)),
                                          save(step, **state))
        return run
    return made


def test_a_loss_that_is_not_finite_names_the_step_and_is_never_stepped_on(run_of):
    run = run_of("--save_every=1")
    with pytest.raises(UserError, match="at step 4.*last good checkpoint is kept, of step 2"):
        fit(run, Toy(run, scale=lambda step: math.nan if step == 3 else 1.0))
    assert [step for step, _, _ in run.saved] == [1, 2, 3]
    assert run.saved[-1][1] == weights_hash(run.model)
    # The weights after step 3 are what gave that loss.
    kept, _, state = load_checkpoint(run.folder.path)
    assert (state["step"], weights_hash(kept)) == run.saved[1][:2]


def test_a_checkpoint_that_training_went_on_from_is_good_and_stays(run_of):
    run = run_of("--save_every=2")
    with pytest.raises(UserError, match="at step 4.*last good checkpoint is kept, of step 2"):
        fit(run, Toy(run, scale=lambda step: math.nan if step == 3 else 1.0))
    assert load_checkpoint(run.folder.path)[2]["step"] == 2


def test_the_only_checkpoint_is_not_called_good_when_its_weights_are_not(run_of):
    run = run_of("--save_every=1")
    with pytest.raises(UserError, match="the only checkpoint, of step 1, is what gave them"):
        fit(run, Toy(run, scale=lambda step: math.nan if step == 1 else 1.0))


@pytest.mark.parametrize("last", [1e30, math.inf])
def test_weights_that_overflow_in_the_last_step_are_an_error_and_not_saved(run_of, last):
    run = run_of("--save_every=1", "--optimizer=adamw", "--clip=0", "--warmup=0", "--decay=0")
    task = Toy(run)

    def measure(step):
        if step == task.n_steps:
            with torch.no_grad():
                run.model.norm.weight.fill_(last)
        return {"val_loss": 1.0}

    task.measure = measure
    with pytest.raises(UserError, match="norm.weight.*last good checkpoint is kept, of step "
                                        f"{task.n_steps - 1}"):
        fit(run, task)
    assert load_checkpoint(run.folder.path)[2]["step"] == task.n_steps - 1


def test_a_validation_loss_that_is_not_finite_is_an_error(run_of):
    run = run_of()
    task = Toy(run)
    task.measure = lambda step: {"val_loss": math.nan}
    with pytest.raises(UserError, match="validation loss is nan.*nothing was saved yet"):
        fit(run, task)


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


def test_parts_of_a_step_add_up_to_the_whole(run_of):
    weights, logged = [], []
    for parts in (1, 2):
        run = run_of("--log_every=1", "--fresh")
        task = Toy(run, 3)
        task.losses = lambda step, run=run, parts=parts: (
            (run.model(torch.tensor([[7, 8]])).square().mean() / parts, 2 // parts)
            for _ in range(parts))
        fit(run, task)
        weights.append(run.model.state_dict())
        logged.append([line["loss"] for line in run.logged])
    assert logged[0] == pytest.approx(logged[1], rel=1e-4)
    assert all(torch.allclose(weights[0][name], weights[1][name], atol=1e-4) for name in weights[0])


def test_an_interrupted_run_resumes_to_the_same_weights_and_optimizers(run_of, tmp_path):
    checkpoint = lambda: torch.load(tmp_path / "reviews/sft/checkpoint.pt", weights_only=True)  # noqa: E731
    fit(run := run_of(), Toy(run))
    uninterrupted = checkpoint()
    run = run_of("--fresh")
    Interrupt.number = 15  # as if SIGTERM had come during the first step
    with pytest.raises(Interrupted):
        fit(run, Toy(run))
    assert [step for step, _, _ in run.saved] == [1]
    Interrupt.number = 0
    fit(run := run_of("--resume"), Toy(run))
    resumed = checkpoint()
    for payload in (uninterrupted, resumed):
        payload["state"].pop("seconds")
    assert resumed["state"]["step"] == 6
    assert equal(resumed, uninterrupted)


def test_a_run_that_was_killed_after_its_last_save_learns_nothing_more(run_of):
    fit(run := run_of(), Toy(run))
    before = weights_hash(run.model)
    run = run_of("--resume")
    assert fit(run, Toy(run)) == {"val_loss": 6.0}  # the last measurements, from the checkpoint
    assert run.logged == []
    assert weights_hash(run.model) == before


def weights_after(run_of, *words, best_by=("val_loss", -1)):
    """(hash of the weights in the checkpoint, its state, what `fit` returned) of a run of Toy."""
    run = run_of(*words)
    task = Toy(run)
    task.best_by = best_by
    measured = fit(run, task)
    kept, _, state = load_checkpoint(run.folder.path, resumes=True)
    return weights_hash(kept), state, measured


def test_the_weights_with_the_best_validation_are_kept_and_said(run_of, capsys):
    kept, state, measured = weights_after(run_of, "--eval_every=2", "--save_every=1")
    assert measured == state["measured"] == {"val_loss": 2.0}  # of steps 2, 4 and 6 the lowest
    assert state["step"] == 6
    assert "kept the weights of step 2: val_loss 2, at the end 6" in capsys.readouterr().out
    run = run_of("--fresh", "--eval_every=2", "--save_every=1")
    fit(run, Toy(run))
    assert kept == next(digest for step, digest, _ in run.saved if step == 2)


def test_the_last_weights_are_kept_on_demand_and_where_they_are_best(run_of, capsys):
    kept, state, _ = weights_after(run_of, "--eval_every=2", "--keep=last")
    assert (kept, state["measured"]) == (weights_after(run_of, "--fresh", "--eval_every=2",
                                                       best_by=("val_loss", 1))[0], {"val_loss": 6.0})
    assert "kept the weights" not in capsys.readouterr().out


def test_the_best_weights_survive_an_interruption(run_of):
    kept = weights_after(run_of, "--eval_every=1")[0]
    run = run_of("--fresh", "--eval_every=1")
    Interrupt.number = 15
    task = Toy(run)
    task.best_by = ("val_loss", -1)
    with pytest.raises(Interrupted):
        fit(run, task)
    Interrupt.number = 0
    assert weights_after(run_of, "--resume", "--eval_every=1")[0] == kept


@pytest.mark.parametrize("best_by", [("val_loss", 1), ("val_loss", -1)])  # best at the end, or before
def test_a_finished_run_that_is_lengthened_is_the_run_of_that_length(run_of, best_by):
    words = ("--eval_every=2", "--decay=0", "--warmup=0")  # else its rates are those of another length
    kept, state, measured = weights_after(run_of, *words, best_by=best_by)
    run = run_of("--fresh", *words, "--epochs=1")
    task = Toy(run, 4)
    task.best_by = best_by
    fit(run, task)
    run.finish()
    lengthened, longer, same = weights_after(run_of, *words, "--epochs=2", "--resume", best_by=best_by)
    assert (lengthened, same) == (kept, measured)
    for name in ("best", "optimizers"):
        assert equal(longer[name], state[name]), name


def test_the_best_weights_of_a_run_that_had_ended_are_not_forgotten(run_of, capsys):
    run = run_of("--epochs=1", "--eval_every=2")
    task = Toy(run, 2)
    fit(run, task)
    run.finish()
    ended = weights_hash(run.model)
    kept, state, _ = weights_after(run_of, "--epochs=2", "--eval_every=2", "--resume", best_by=("val_loss", -1))
    assert (kept, state["best"]["step"]) == (ended, 2)
    assert "kept the weights of step 2" in capsys.readouterr().out


@pytest.mark.parametrize(("epochs", "records", "steps"), [(2.0, 0, 13), (2.0, 50, 4), (2.0, 10**6, 13), (0.1, 50, 1)])
def test_the_steps_of_a_stage_are_bounded_by_its_passes_and_by_its_records(epochs, records, steps):
    o = types.SimpleNamespace(epochs=epochs, records=records, batch=16)
    assert steps_of(o, 100) == steps
