"""PPOTrainer and its stage: what it starts from, what it carries from update to update, and what it
warns of."""
import dataclasses
import json

import pytest
import torch

import ppo
from data.batches import prompt_ids
from data.judge import ngram_regressions
from data.rewards import chosen_reward_norm
from data.tokenizer import train_bpe
from model import load_checkpoint, save_checkpoint, weights_hash
from ppo import PPOTrainer, train_ppo
from reward import RewardModel, flagged_rows
from runtime.draws import batch_indices, key
from runtime.machine import Interrupted
from runtime.options import UserError
from runtime.run import Run
from runtime.statistics import RunningMoments
from sample import reply_ids, reply_to
from tests.conftest import equal
from tests.ppo_world import make_trainer


@pytest.fixture
def trainer_of(command, world):
    """trainer_of(*words, **seams): a trainer of the small world, nothing trained yet."""
    def made(*words, **seams) -> PPOTrainer:
        o = command("ppo", "--fresh", *words)
        if "reward_norm" not in o.explicit:
            o = o.replace(reward_norm="logsigmoid")
        return make_trainer(o, world, **seams)
    return made


def metrics(path) -> list[dict]:
    text = (path / "reviews/ppo/metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


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
    raw = load_checkpoint(world.root / "reward", cls=RewardModel)[0].scores(ids, reply_ids(replies))
    assert trainer.scale.mean == pytest.approx(float(raw.mean()), rel=1e-4)
    assert trainer.scale.std == pytest.approx(float(raw.std(correction=0)), rel=1e-4)


@pytest.mark.parametrize("critic", ["separate", "shared"])
@pytest.mark.parametrize("norm", ["logsigmoid", "sigmoid", "fixed", "running"])
def test_the_critic_starts_on_the_scale_that_is_paid(trainer_of, norm, critic):
    trainer = trainer_of(f"--reward_norm={norm}", f"--critic={critic}", "--norm_replies=32",
                         "--end_penalty=2")
    o, run = trainer.o, trainer.run
    ids = [prompt_ids(run.tokenizer, trainer.prompts[i], trainer.template)
           for i in batch_indices(len(trainer.prompts), 32, 0, 0, "reward")]
    replies = reply_ids(reply_to(run.model, run.tokenizer, ids, o.reply_len,
                                 seed=key(0, "reward", "reply")))
    ended = torch.tensor([reply[-1] == run.tokenizer.eom_id for reply in replies])
    scale = ppo.ScoreScale(trainer.scale.mean, trainer.scale.std)
    paid = scale.paid(trainer.reward_model.scores(ids, replies), ended, o)
    assert 0 < ended.sum() < 32  # penalties are part of what is paid
    start = trainer.networks.actor_critic
    if critic == "shared":
        assert float(start.value_head.bias) == pytest.approx(float(paid.mean()), abs=1e-4)
    else:
        values = start.critic.scores(ids, replies)
        assert float(values.mean()) == pytest.approx(float(paid.mean()), abs=1e-3)
        assert float(values.std(correction=0)) == pytest.approx(float(paid.std(correction=0)),
                                                                rel=1e-3)
    assert trainer.scale.moments.state() == RunningMoments().state()  # nothing was paid yet


@pytest.mark.parametrize("norm", ["fixed", "logsigmoid"])
@pytest.mark.parametrize("ensemble", ["mean", "min", "lower"])
def test_the_critic_of_an_ensemble_starts_on_the_scale_that_is_paid(trainer_of, world, ensemble, norm):
    """It copies the mean of the heads, while an ensemble may pay their lowest score, or less than their
    mean: mean and spread of its values are those of what is paid all the same."""
    trunk, _, _ = load_checkpoint(world.root / "reward", cls=RewardModel)
    model = RewardModel(dataclasses.replace(trunk.config, members=5, ensemble=ensemble))
    model.backbone.load_state_dict(trunk.backbone.state_dict())
    trainer = trainer_of(f"--reward_norm={norm}", "--norm_replies=32", "--end_penalty=2", reward_model=model)
    o, run = trainer.o, trainer.run
    ids = [prompt_ids(run.tokenizer, trainer.prompts[i], trainer.template)
           for i in batch_indices(len(trainer.prompts), 32, 0, 0, "reward")]
    replies = reply_ids(reply_to(run.model, run.tokenizer, ids, o.reply_len, seed=key(0, "reward", "reply")))
    ended = torch.tensor([reply[-1] == run.tokenizer.eom_id for reply in replies])
    raw, heads = model.scores(ids, replies), model.score_heads(flagged_rows(ids, replies))
    mean_of_heads = heads.mean((0, 1))
    assert (float((mean_of_heads - raw).mean()) > .1) == (ensemble != "mean")
    assert trainer.scale.mean == pytest.approx(float(raw.mean()), rel=1e-4)  # what is paid stays as it was
    paid = ppo.ScoreScale(trainer.scale.mean, trainer.scale.std).paid(raw, ended, o)
    values = trainer.networks.actor_critic.critic.scores(ids, replies)
    assert float(values.mean()) == pytest.approx(float(paid.mean()), abs=1e-3)
    assert float(values.std(correction=0)) == pytest.approx(float(paid.std(correction=0)), rel=1e-3)


def test_the_scale_is_kept_in_the_checkpoint_and_not_measured_again(command, tmp_path, monkeypatch):
    with monkeypatch.context() as m:
        m.setattr(Run, "stop_if_asked", interrupt_after(1))
        with pytest.raises(Interrupted):
            train_ppo(command("ppo", "--updates=2"))
    scale = checkpoint(tmp_path)["state"]["scale"]
    monkeypatch.setattr(PPOTrainer, "measure_start", lambda self: pytest.fail("measured again"))
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
    monkeypatch.setattr(RewardModel, "scores", lambda self, prompts, _: torch.ones(len(prompts)))
    with pytest.raises(UserError, match="learned nothing"):
        trainer_of()


@pytest.mark.parametrize("asked,feedback,expected", [
    ("auto", "label", "logsigmoid"), ("auto", "pairwise", "fixed"),
    ("auto", "unknown scores", "fixed"), ("running", "pairwise", "running"),
    ("sigmoid", "label", "sigmoid")])
def test_the_reward_norm_follows_from_the_feedback(asked, feedback, expected):
    assert chosen_reward_norm(asked, feedback) == expected


def test_log_odds_are_not_read_from_a_model_of_pairs():
    with pytest.raises(UserError, match="feedback for pairwise"):
        chosen_reward_norm("sigmoid", "pairwise")


def test_the_networks_are_the_trained_ones_and_the_others_never_move(trainer_of, world):
    trainer = trainer_of("--critic_warmup=0", "--updates=2")
    for step in (0, 1):
        trainer.update(step)
    sft = load_checkpoint(world.root / "sft")[2]["hash"]
    reward = load_checkpoint(world.root / "reward", cls=RewardModel)[2]["hash"]
    assert weights_hash(trainer.reward_model) == reward
    assert weights_hash(trainer.networks.reference) == sft
    assert weights_hash(trainer.run.model) != sft
    assert not trainer.reward_model.training


def test_adam_steps_as_the_options_say(trainer_of):
    policy, critic = trainer_of("--adam_eps=.003", "--policy_lr=.001",
                                "--critic_lr=.002").optimizer.param_groups
    assert (policy["eps"], critic["eps"]) == (.003, .003)
    assert (policy["lr"], critic["lr"]) == (.001, .002)


def test_with_a_scorer_of_ones_own_the_critic_starts_at_what_that_scorer_pays(trainer_of):
    class Loud:
        def scores(self, prompts, replies):
            return torch.tensor([100.0 * len(reply) for reply in replies])

    own, other = (trainer_of("--reward_norm=fixed", "--end_penalty=0", **seams)
                  for seams in ({}, {"scorer": Loud()}))
    assert other.scale.std > 50
    assert own.scale.std < 50
    critics = [trainer.networks.actor_critic.critic.score_head for trainer in (own, other)]
    assert torch.allclose(critics[0].weight, critics[1].weight)  # both are paid mean 0, spread 1
    assert torch.allclose(critics[0].bias, critics[1].bias, atol=1e-5)


def test_a_reward_that_is_not_needed_on_a_scale_may_start_constant(trainer_of):
    class Never:
        def scores(self, prompts, replies):
            return torch.zeros(len(replies))

    assert trainer_of("--reward_norm=logsigmoid", scorer=Never()).scale.std == 1.0
    with pytest.raises(UserError, match="the scorer gives every reply the same score"):
        trainer_of("--reward_norm=fixed", scorer=Never())


def test_a_trainer_does_not_guess_how_scores_are_normalised(trainer_of):
    with pytest.raises(ValueError, match="resolved"):
        trainer_of("--reward_norm=auto")


def test_held_out_prompts_are_answered_as_the_rollouts_are(trainer_of):
    settings = trainer_of("--temperature=.7", "--reply_len=9", "--dtype=bfloat16").held_out.settings
    assert (settings.temperature, settings.reply_len, settings.dtype) == (.7, 9, "bfloat16")


@pytest.mark.parametrize("shorter", ["policy", "reward model"])
def test_prompts_leave_room_for_a_reply_in_every_network(trainer_of, world, shorter):
    records = world.data.records("ppo", "train")
    ids = [prompt_ids(world.data.tokenizer, r["prompt"], world.data.template) for r in records]
    room = sorted(map(len, ids))[len(ids) // 2]  # the longer ones do not fit
    config = load_checkpoint(world.root / "reward", cls=RewardModel)[0].config
    reply_len, longest = (128 - room, 256) if shorter == "policy" else (16, room + 16)
    reward_model = RewardModel(dataclasses.replace(config, max_len=longest)).eval()
    trainer = trainer_of(f"--reply_len={reply_len}", reward_model=reward_model)
    assert trainer.prompts == [record["prompt"] for record, prompt in zip(records, ids, strict=True)
                               if len(prompt) <= room]
    assert len(trainer.prompts) < len(records)


def test_a_reply_length_that_leaves_no_room_is_told(trainer_of):
    with pytest.raises(UserError, match="--reply_len"):
        trainer_of("--reply_len=127")


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
    measured = [{name: x for name, x in line.items() if name.startswith("eval_")}
                for line in metrics(tmp_path)]
    assert trained == [False, False, True, True]
    assert measured == 5 * [measured[0]]  # a policy that stands still


def test_each_rate_rises_from_its_own_first_update_to_the_options_and_falls_to_the_last(trainer_of):
    rates = []

    def loss(batch, new, o):
        rates.append([group["lr"] for group in trainer.optimizer.param_groups])
        return ppo.ppo_loss(batch, new, o)

    trainer = trainer_of("--updates=6", "--critic_warmup=2", "--warmup=.5", "--final_lr=.1",
                         "--epochs=1", "--minibatches=1", "--micro_batch=8", "--policy_lr=.01",
                         "--critic_lr=.002", "--critic_epochs=1", loss=loss)
    logged = [trainer.update(step) for step in range(6)]
    policy, critic = [0, 0, .5, 1, 1, .55], [.5, 1, 1, .775, .55, .325]
    assert [rate for rate, _ in rates] == pytest.approx([.01 * x for x in policy])
    assert [rate for _, rate in rates] == pytest.approx([.002 * x for x in critic])
    assert [line["lr"] for line in logged] == pytest.approx([.01 * x for x in policy])
    assert [line["critic_lr"] for line in logged] == pytest.approx([.002 * x for x in critic])


def test_while_it_learns_alone_the_critic_takes_its_own_passes_without_clip(trainer_of):
    clips = []

    def loss(batch, new, o):
        clips.append(o.value_clip)
        return ppo.ppo_loss(batch, new, o)

    trainer = trainer_of("--updates=3", "--critic_warmup=1", "--critic_epochs=3", "--epochs=1",
                         "--minibatches=2", "--micro_batch=8", "--value_clip=.4", loss=loss)
    for step in range(2):
        trainer.update(step)
    assert clips == [0.0] * 6 + [.4] * 2


def test_pretraining_text_is_a_part_of_the_policys_steps(trainer_of):
    words = ("--updates=3", "--critic_warmup=1", "--policy_lr=.01", "--epochs=1",
             "--minibatches=2")
    plain, mixed = trainer_of(*words), trainer_of(*words, "--ptx_coef=5")
    start = weights_hash(mixed.run.model)
    assert "ptx_loss" not in mixed.update(0)  # the critic learns alone
    assert weights_hash(mixed.run.model) == start
    plain.update(0)
    assert "ptx_loss" not in plain.update(1)
    with torch.no_grad():
        expected = mixed.text_loss(2), mixed.text_loss(3)  # two minibatches of the second update
    logged = mixed.update(1)["ptx_loss"]
    assert float(min(expected)) - .3 < logged < float(max(expected)) + .3
    assert weights_hash(mixed.run.model) != weights_hash(plain.run.model)
    with torch.no_grad():
        assert mixed.text_loss(2) < expected[0]


def test_pretraining_text_does_not_depend_on_the_size_of_a_forward(trainer_of):
    batches = [trainer_of("--ptx_coef=1", f"--micro_batch={n}").text.batch(0)[0] for n in (2, 8)]
    assert torch.equal(*batches)


def test_pretraining_text_of_another_vocabulary_is_refused(trainer_of, world, monkeypatch):
    monkeypatch.setattr(world.data, "tokenizer", train_bpe(["other text"] * 9, 262))
    trainer_of()  # without that text nothing of it is read
    with pytest.raises(UserError, match="pretraining text and policy .*different tokenizers"):
        trainer_of("--ptx_coef=1")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rollout_and_update_compute_in_one_precision(trainer_of, dtype):
    assert trainer_of("--critic_warmup=0", f"--dtype={dtype}").update(0)["ratio_start"] < 1e-5


def test_adaptive_control_acts_once_an_update_of_the_policy(trainer_of):
    trainer = trainer_of("--updates=4", "--critic_warmup=1", "--kl_control=adaptive",
                         "--kl_target=60", "--kl_horizon=50", "--policy_lr=.01", "--kl_coef=.095")
    expected = ppo.KLController(ppo.PPOOptions.kl_coef, target=60, horizon=50)
    for step in range(4):
        logged = trainer.update(step)
        assert logged["kl_coef"] == expected.price, step  # as used, before it changes
        if step >= 1:
            expected.update(logged["kl"], 8)
    assert trainer.control.coef == expected.coef
    assert trainer.control.coef < .95 * ppo.PPOOptions.kl_coef  # the case is not trivial


def test_replies_are_written_with_the_weights_of_the_last_update(trainer_of):
    trainer = trainer_of("--updates=3", "--critic_warmup=0", "--policy_lr=.05")
    logged = [trainer.update(step) for step in range(3)]
    assert [line["sampler_gap"] < 1e-4 for line in logged] == [True] * 3
    assert logged[-1]["kl"] > .1  # the policy has moved


@pytest.mark.parametrize("critic", ["separate", "shared"])
def test_ppo_resumes_after_the_warm_up_as_if_nothing_had_happened(command, world, tmp_path,
                                                                  monkeypatch, critic):
    more = ("--updates=5", "--kl_control=adaptive", "--kl_horizon=50", "--reward_norm=running",
            "--policy_lr=.01", f"--critic={critic}")
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
    assert half["state"]["control"]["kl"] > 0
    assert any(not torch.equal(half["model"][name], sft[name]) for name in sft)
    assert half["state"]["scale"]["moments"]["count"] > 1
    train_ppo(command("ppo", *more, "--resume"))
    resumed = checkpoint(tmp_path)
    for payload in (uninterrupted, resumed):
        payload["state"].pop("seconds")
    assert equal(uninterrupted, resumed)


def test_an_independent_opinion_of_every_rollout_is_logged(trainer_of, world, monkeypatch):
    rollouts, real = [], ppo.collect_rollout
    monkeypatch.setattr(ppo, "collect_rollout",
                        lambda *a, **k: rollouts.append(real(*a, **k)) or rollouts[-1])
    logged, tokenizer = trainer_of("--samples_per_prompt=2").update(0), world.data.tokenizer
    asked = world.data.records("ppo", "train")
    openings = [asked[i]["prompt"] for i in batch_indices(len(asked), 4, 0, 0, "ppo")
                for _ in range(2)]
    replies = [tokenizer.decode(i for i in ids if i != tokenizer.eom_id)
               for ids in reply_ids(rollouts[0].generation)]
    texts = [opening + reply for opening, reply in zip(openings, replies, strict=True)]
    probs = ngram_regressions(world.data, "judge")[""].probs(texts)
    assert logged["judge"] == pytest.approx(float(probs.mean()), abs=1e-6)
    assert logged["judged_positive"] == pytest.approx(float((probs > .5).mean()), abs=1e-6)


def test_that_opinion_reaches_no_weight(trainer_of):
    ends = []
    for asked in (True, False):
        trainer = trainer_of("--critic_warmup=0")
        if not asked:
            trainer.held_out.judges = {}
        assert ("judge" in trainer.update(0)) == asked
        ends.append(weights_hash(trainer.networks.actor_critic))
    assert ends[0] == ends[1]


# ---- gaps ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("name,words,limit", [
    ("ratio_start", ["--dtype=float32"], 1e-4), ("ratio_start", ["--dtype=bfloat16"], 2e-2),
    ("ratio_start", ["--rollout_dtype=int8"], 1e-4),  # training reads unrounded weights
    ("sampler_gap", ["--dtype=float32"], 1e-4), ("sampler_gap", ["--dtype=bfloat16"], 2e-2),
    ("sampler_gap", ["--rollout_dtype=bfloat16"], 2e-2),
    ("sampler_gap", ["--dtype=bfloat16", "--rollout_dtype=float32"], 2e-2)])
def test_a_gap_between_what_is_scored_and_sampled_is_warned_of(trainer_of, capsys, name, words,
                                                               limit):
    trainer = trainer_of(*words)
    trainer.check_gaps({"sampler_gap": 0.0, name: limit / 2}, 0)
    assert capsys.readouterr().err == ""
    trainer.check_gaps({"sampler_gap": 0.0, name: 2 * limit}, 1)
    warning, = capsys.readouterr().err.splitlines()
    assert f"warning: {name} is {2 * limit:.1e}, above {limit:g}, at update 2" in warning


def test_deep_models_and_low_temperatures_may_differ_more(trainer_of, capsys):
    trainer = trainer_of("--dtype=bfloat16", "--temperature=0.5")
    trainer.run.model.config = dataclasses.replace(trainer.run.model.config, n_layer=36)
    trainer.check_gaps({"sampler_gap": 5e-2}, 0)  # six times the bound of four layers at temperature 1 is 0.12
    assert capsys.readouterr().err == ""
    trainer.check_gaps({"sampler_gap": .13}, 0)
    assert "above 0.12" in capsys.readouterr().err


@pytest.mark.parametrize("temperature,gap,expected", [
    (1, .04, torch.bfloat16), (1, .06, torch.float32), (.5, .09, torch.bfloat16), (.5, .11, torch.float32)])
def test_a_decoder_that_is_too_far_off_is_given_up(trainer_of, temperature, gap, expected):
    trainer = trainer_of("--rollout_dtype=bfloat16", f"--temperature={temperature}")
    trainer.check_gaps({"sampler_gap": gap}, 0)
    assert trainer.networks.decoder.dtype == expected


def test_replies_written_in_int8_are_scored_as_trained_and_given_up_where_too_far_off(
        command, tmp_path, monkeypatch):
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
