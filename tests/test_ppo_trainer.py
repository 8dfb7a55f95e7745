"""PPOTrainer and its stage: what it starts from, what it carries from update to update, and what it
warns of."""
import json

import pytest
import torch

import ppo
from data.batches import prompt_ids
from data.judge import ngram_classifier
from model import load_checkpoint, open_run, save_checkpoint, weights_hash
from ppo import PPOTrainer, train_ppo
from reward import RewardModel
from runtime.draws import batch_indices, key
from runtime.machine import Interrupted
from runtime.options import UserError
from runtime.run import Run
from sample import reply_ids, reply_to
from tests.conftest import equal


@pytest.fixture
def trainer_of(command, world):
    """trainer_of(*words, **seams): a trainer of the small world, nothing trained yet."""
    def made(*words, **seams) -> PPOTrainer:
        o = command("ppo", "--fresh", *words).replace(**({} if any("reward_norm" in w for w in words) else
                                                         {"reward_norm": "logsigmoid"}))
        policy, tokenizer, _ = load_checkpoint(world.root / "sft")
        reward_model, _, _ = load_checkpoint(world.root / "reward", cls=RewardModel)
        run = open_run("ppo", o, world.data, {}, policy, tokenizer)
        return PPOTrainer(run, policy, reward_model, world.data, **seams)
    return made


def metrics(path) -> list[dict]:
    return [json.loads(line) for line in (path / "reviews/ppo/metrics.jsonl").read_text().splitlines()]


def checkpoint(path) -> dict:
    return torch.load(path / "reviews/ppo/checkpoint.pt", weights_only=True)


# ---- what it starts from -------------------------------------------------------------------------

def test_the_scale_of_scores_is_measured_at_ppos_own_temperature_and_length(trainer_of, world):
    trainer = trainer_of("--norm_replies=20", "--temperature=.7", "--reply_len=9")
    sft, tokenizer, _ = load_checkpoint(world.root / "sft")
    openings = [r["prompt"] for r in world.data.records("ppo", "train")]
    ids = [prompt_ids(tokenizer, openings[i], world.data.template)
           for i in batch_indices(len(openings), 20, 0, 0, "reward")]
    replies = reply_to(sft, tokenizer, ids, 9, temperature=.7, seed=key(0, "reward", "reply"))
    with torch.no_grad():
        raw = load_checkpoint(world.root / "reward", cls=RewardModel)[0].scores(ids,
                                                                                reply_ids(replies))
    assert trainer.scale.mean == pytest.approx(float(raw.mean()), rel=1e-4)
    assert trainer.scale.std == pytest.approx(float(raw.std(correction=0)), rel=1e-4)


def test_the_critic_starts_on_that_scale(trainer_of):
    trainer = trainer_of()
    tokens, ones = torch.arange(12).view(2, 6), torch.ones(2, 6, dtype=torch.bool)
    expected = (trainer.reward_model(tokens, ones) - trainer.scale.mean) / trainer.scale.std
    assert torch.allclose(trainer.networks.actor_critic.critic(tokens, ones), expected, atol=1e-4)


def test_the_scale_is_kept_in_the_checkpoint_and_not_measured_again(command, tmp_path, monkeypatch):
    with monkeypatch.context() as m:
        m.setattr(Run, "stop_if_asked", interrupt_after(1))
        with pytest.raises(Interrupted):
            train_ppo(command("ppo", "--updates=2"))
    scale = checkpoint(tmp_path)["state"]["scale"]
    monkeypatch.setattr(PPOTrainer, "measure_scales", lambda self: pytest.fail("measured again"))
    train_ppo(command("ppo", "--updates=2", "--resume"))
    resumed = checkpoint(tmp_path)["state"]["scale"]
    assert (resumed["mean"], resumed["std"]) == (scale["mean"], scale["std"])


def test_a_reward_checkpoint_of_an_older_version_still_serves(command, world, tmp_path):
    model, tokenizer, state = load_checkpoint(world.root / "reward", cls=RewardModel)
    save_checkpoint(tmp_path / "old", model, tokenizer, **state)
    payload = torch.load(tmp_path / "old/checkpoint.pt", weights_only=True)
    payload["model"] |= {"mean": torch.tensor(.3), "std": torch.tensor(.7)}
    payload["state"]["norm"] = {"temperature": 1.0, "reply_len": 16}
    torch.save(payload, tmp_path / "old/checkpoint.pt")
    assert train_ppo(command("ppo", "--updates=2", f"--reward_from={tmp_path / 'old'}")) is not None


def test_a_reward_model_that_learned_nothing_is_told_before_any_update(trainer_of, world,
                                                                       monkeypatch):
    monkeypatch.setattr(RewardModel, "scores", lambda self, prompts,
                        replies: torch.ones(len(prompts)))
    with pytest.raises(UserError, match="learned nothing"):
        trainer_of()


@pytest.mark.parametrize("asked,feedback,expected", [
    ("auto", "label", "logsigmoid"), ("auto", "pairwise", "fixed"),
    ("auto", "unknown scores", "fixed"),
    ("running", "pairwise", "running"), ("sigmoid", "label", "sigmoid")])
def test_the_reward_norm_follows_from_the_feedback(asked, feedback, expected):
    assert ppo.chosen_reward_norm(asked, feedback) == expected


def test_log_odds_are_not_read_from_a_model_of_pairs():
    with pytest.raises(UserError, match="feedback for pairwise"):
        ppo.chosen_reward_norm("sigmoid", "pairwise")


def test_the_networks_are_the_trained_ones_and_the_others_never_move(trainer_of, world):
    trainer = trainer_of("--critic_warmup=0", "--updates=2")
    for step in (0, 1):
        trainer.update(step)
    assert weights_hash(trainer.reward_model) == load_checkpoint(world.root / "reward",
                                                                 cls=RewardModel)[2]["hash"]
    assert weights_hash(trainer.networks.reference) == load_checkpoint(world.root / "sft")[2]["hash"]
    assert weights_hash(trainer.run.model) != load_checkpoint(world.root / "sft")[2]["hash"]
    assert not trainer.reward_model.training


def test_adam_steps_as_the_options_say(trainer_of):
    policy, critic = trainer_of("--adam_eps=.003", "--policy_lr=.001",
                                "--critic_lr=.002").optimizer.param_groups
    assert (policy["eps"], critic["eps"]) == (.003, .003)
    assert (policy["lr"], critic["lr"]) == (.001, .002)


# ---- from update to update -----------------------------------------------------------------------

def interrupt_after(done: int, saving: bool = True):
    """In place of Run.stop_if_asked: what Ctrl-C does after so many steps."""
    def stop(self, step, save):
        if step == done:
            if saving:
                save(step)
            raise Interrupted(15)
    return stop


def test_the_critic_warms_up_alone_and_held_out_measures_repeat(command, monkeypatch, tmp_path):
    trained, real = [], ppo.update
    monkeypatch.setattr(ppo, "update", lambda *a, **k: trained.append(k["train_policy"])
                        or real(*a, **k))
    train_ppo(command("ppo", "--updates=4", "--critic_warmup=2", "--policy_lr=0", "--eval_every=1"))
    assert trained == [False, False, True, True]
    measured = [{k: v for k, v in line.items() if k.startswith("eval_")}
                for line in metrics(tmp_path)]
    assert len(measured) == 5
    assert all(m == measured[0] for m in measured)  # a policy that stands still


def test_ppo_resumes_after_the_warm_up_as_if_nothing_had_happened(command, world, tmp_path,
                                                                  monkeypatch):
    more = ("--updates=5", "--kl_control=adaptive", "--kl_horizon=50", "--reward_norm=running",
            "--policy_lr=.01")
    train_ppo(command("ppo", *more))
    uninterrupted = checkpoint(tmp_path)
    with monkeypatch.context() as m:
        m.setattr(Run, "stop_if_asked", interrupt_after(3, saving=False))
        with pytest.raises(Interrupted):
            train_ppo(command("ppo", *more, "--fresh"))
    half = checkpoint(tmp_path)
    sft = torch.load(world.root / "sft/checkpoint.pt", weights_only=True)["model"]
    # Everything that could be forgotten has moved.
    assert half["state"]["step"] == 3
    assert half["state"]["kl_coef"] != ppo.PPOOptions.kl_coef
    assert any(not torch.equal(half["model"][name], sft[name]) for name in sft)
    assert half["state"]["scale"]["moments"]["count"] > 1
    train_ppo(command("ppo", *more, "--resume"))
    resumed = checkpoint(tmp_path)
    for payload in (uninterrupted, resumed):
        payload["state"].pop("seconds")
    assert equal(uninterrupted, resumed)


def test_an_independent_opinion_of_every_rollout_is_logged(trainer_of, world, monkeypatch):
    rollouts, real = [], ppo.collect_rollout
    monkeypatch.setattr(ppo, "collect_rollout", lambda *a,
                        **k: rollouts.append(real(*a, **k)) or rollouts[-1])
    logged, tokenizer = trainer_of("--samples_per_prompt=2").update(0), world.data.tokenizer
    asked = world.data.records("ppo", "train")
    openings = [asked[i]["prompt"] for i in batch_indices(len(asked), 4, 0, 0, "ppo")
                for _ in range(2)]
    replies = [tokenizer.decode(i for i in ids if i != tokenizer.eom_id)
               for ids in reply_ids(rollouts[0].generation)]
    probs = ngram_classifier(world.data, "judge").probs([a + b for a,
                                                         b in zip(openings, replies, strict=True)])
    assert logged["judge"] == pytest.approx(float(probs.mean()), abs=1e-6)


# ---- gaps ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["sampler_gap", "ratio_start"])
@pytest.mark.parametrize("dtype,limit", [("float32", 1e-4), ("bfloat16", 2e-2)])
def test_a_gap_between_what_is_scored_and_sampled_is_warned_of(trainer_of, capsys, name, dtype,
                                                               limit):
    trainer = trainer_of(f"--dtype={dtype}")
    trainer.check_gaps({"sampler_gap": 0.0, name: limit / 2}, 0)
    assert capsys.readouterr().err == ""
    trainer.check_gaps({"sampler_gap": 0.0, name: 2 * limit}, 1)
    assert f"warning: {name} is {2 * limit:.1e}" in capsys.readouterr().err


def test_replies_written_in_int8_are_scored_as_trained_and_given_up_where_too_far_off(command,
                                                                                      tmp_path,
                                                                                      monkeypatch):
    real, size = ppo.rollout_metrics, iter([None, 0.06, None])
    monkeypatch.setattr(ppo, "rollout_metrics", lambda r: real(r) | {
        k: v for k, v in {"sampler_gap": next(size)}.items() if v is not None})
    words = ("--updates=3", "--rollout_dtype=int8", "--dtype=float32")
    with monkeypatch.context() as m:
        m.setattr(Run, "stop_if_asked", interrupt_after(2))
        with pytest.raises(Interrupted):
            train_ppo(command("ppo", *words))
    train_ppo(command("ppo", *words, "--resume"))  # which knows that int8 was given up
    rounded, given_up, exact = (line for line in metrics(tmp_path) if "sampler_gap" in line)
    assert 1e-4 < rounded["sampler_gap"] < 5e-2
    assert exact["sampler_gap"] < 1e-4
    assert given_up["ratio_start"] < 1e-5  # training reads unrounded weights
    assert exact["ratio_start"] < 1e-5
    assert checkpoint(tmp_path)["state"]["decoder_dtype"] == "float32"


def test_with_a_scorer_of_ones_own_the_critic_still_starts_on_the_reward_models_scale(trainer_of):
    class Loud:
        def scores(self, prompts, replies):
            return torch.tensor([100.0 * len(reply) for reply in replies])

    own, other = trainer_of("--reward_norm=fixed"), trainer_of("--reward_norm=fixed", scorer=Loud())
    assert other.scale.std > 50
    assert own.scale.std < 50
    heads = [t.networks.actor_critic.critic.score_head.weight for t in (own, other)]
    assert torch.equal(*heads)


def test_a_reward_that_is_not_needed_on_a_scale_may_start_constant(trainer_of):
    class Never:
        def scores(self, prompts, replies):
            return torch.zeros(len(replies))

    assert trainer_of("--reward_norm=logsigmoid", scorer=Never()).scale.std == 1.0
    with pytest.raises(UserError, match="the scorer gives every reply the same score"):
        trainer_of("--reward_norm=fixed", scorer=Never())


def test_a_trainer_does_not_guess_how_scores_are_normalised(trainer_of):
    with pytest.raises(ValueError, match="chosen_reward_norm"):
        trainer_of("--reward_norm=auto")
