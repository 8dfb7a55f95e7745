"""The reward stage on ties, parts of a reward, ensembles and doubtful pairs."""
import json

import numpy as np
import pytest
import torch

import train
from data.feedback import tie_odds_of
from model import load_checkpoint, open_run, save_checkpoint
from reward import RewardModel, RewardTask, reward_model_from, train_reward
from runtime.machine import Interrupt, Interrupted
from runtime.options import UserError
from tests.conftest import equal


def with_records(monkeypatch, world, train_records, val_records):
    """The small world with these reward records."""
    monkeypatch.setattr(type(world.data), "records",
                        lambda _, stage, split: train_records if split == "train" else val_records)


def made_up(n, tied=0, parts=()):
    """n pairs in which the reply with 好 is preferred, and as many ties as are asked for."""
    found = [{"prompt": f"书{i}", "chosen": f"好{i}", "rejected": f"差{i}"} for i in range(n)]
    found += [{"prompt": f"房{i}", "chosen": f"可{i}", "rejected": f"也{i}", "tie": True} for i in range(tied)]
    return [{**pair, "part": parts[i % len(parts)]} if parts else pair for i, pair in enumerate(found)]


def logged(path):
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def test_ties_are_learned_and_measured_apart(command, world, monkeypatch):
    records = made_up(30, tied=10)
    with_records(monkeypatch, world, records, records)
    run = train_reward(command("reward", "--epochs=8", "--eval_every=5"))
    state = load_checkpoint(run.folder.path, cls=RewardModel)[2]
    assert state["tie_odds"] == tie_odds_of(records) == pytest.approx(2 / 3)
    measured = [line for line in logged(run.folder.path) if "val_accuracy" in line]
    assert measured[-1]["val_accuracy"] > 0.9  # of the decided ones alone: else at most .875
    assert -1.5 < measured[-1]["val_tie_log_likelihood"] < 0
    assert not state["warnings"]


def test_ties_alone_are_refused_also_once_equal_pairs_are_left_out(command, world, monkeypatch):
    late = [{"prompt": "书", "chosen": "，" * 90 + "好", "rejected": "，" * 90 + "差"}]
    for records in (made_up(0, tied=9), made_up(0, tied=9) + late):
        with_records(monkeypatch, world, records, made_up(9))
        with pytest.raises(UserError, match="all pairs to learn from are ties"):
            train_reward(command("reward", "--max_len=64"))


def test_pairs_without_ties_are_learned_by_bradley_and_terrys_loss(command, world, monkeypatch):
    with_records(monkeypatch, world, made_up(30), made_up(10))
    run = train_reward(command("reward", "--epochs=1"))
    assert load_checkpoint(run.folder.path, cls=RewardModel)[2]["tie_odds"] == 0
    assert "val_tie_log_likelihood" not in logged(run.folder.path)[-1]


def test_each_part_of_the_reward_has_its_head_and_its_figures(command, world, monkeypatch):
    """Two parts that contradict each other: one likes 好, the other 差."""
    records = made_up(40, parts=("good", "bad"))
    records = [r if r["part"] == "good" else r | {"chosen": r["rejected"], "rejected": r["chosen"]} for r in records]
    with_records(monkeypatch, world, records, records)
    run = train_reward(command("reward", "--epochs=12", "--eval_every=50"))
    model = load_checkpoint(run.folder.path, cls=RewardModel)[0]
    assert model.config.parts == ("bad", "good")
    last = logged(run.folder.path)[-1]
    assert min(last["val_accuracy"], last["val_accuracy_good"], last["val_accuracy_bad"]) > 0.9


def test_a_record_teaches_the_head_of_its_part_alone(command, world, monkeypatch):
    records = made_up(16, parts=("a",)) + made_up(16, parts=("b",))
    with_records(monkeypatch, world, records, records)
    o = command("reward", "--lm_coef=0", "--dropout=0", "--batch=4")
    trunk = load_checkpoint(world.root / "sft")[0]
    run = open_run("reward", o, world.data, {}, reward_model_from(trunk, o, parts=("a", "b")), world.data.tokenizer)
    task = RewardTask(run, world.data)
    task.records = [r for r in records if r["part"] == "b"]
    next(task.losses(0))[0].backward()
    gradient = run.model.score_head.weight.grad
    assert gradient[0].abs().max() == 0 < gradient[1].abs().max()


def test_a_part_that_training_never_named_is_refused(command, world, monkeypatch):
    with_records(monkeypatch, world, made_up(8, parts=("a", "b")), made_up(8, parts=("a", "c")))
    with pytest.raises(UserError, match="validation has records of the part 'c'"):
        train_reward(command("reward"))


def test_members_learn_from_records_of_their_own_and_resume_bit_for_bit(command, world):
    words = ("--members=3", "--ensemble=lower", "--epochs=.3")
    through = train_reward(command("reward", *words)).folder.path
    whole, _, state = load_checkpoint(through, cls=RewardModel)
    heads = whole.score_head.weight
    assert heads.shape[0] == 3
    assert (whole.config.members, whole.config.ensemble) == (3, "lower")
    Interrupt.number = 15
    with pytest.raises(Interrupted):
        train_reward(command("reward", *words, "--fresh"))
    Interrupt.number = 0
    assert load_checkpoint(through, cls=RewardModel)[2]["step"] < state["step"]
    train_reward(command("reward", *words, "--resume"))
    assert equal(load_checkpoint(through, cls=RewardModel)[0].state_dict(), whole.state_dict())


def test_an_ensembles_bootstrap_follows_from_the_seed_and_differs_by_member(command, world):
    def weights(*words):
        o = command("reward", "--members=4", "--fresh", *words)
        trunk = load_checkpoint(world.root / "sft")[0]
        run = open_run("reward", o, world.data, {}, reward_model_from(trunk, o), world.data.tokenizer)
        return RewardTask(run, world.data).weights

    first = weights()
    assert torch.equal(first, weights())
    assert not torch.equal(first, weights("--seed=1"))
    assert not torch.equal(first[0], first[1])
    assert abs(float(first.mean()) - 1) < 0.1


# ---- doubtful pairs ------------------------------------------------------------------------------

def test_doubtful_pairs_are_found_by_another_reward_model(command, world, monkeypatch, capsys, tmp_path):
    """A model that learned clean pairs turns round exactly those that were labelled wrongly."""
    clean = made_up(40)
    with_records(monkeypatch, world, clean, clean)
    teacher = train_reward(command("reward", "--epochs=8", "--out", tmp_path / "teacher")).folder.path
    wrong = [pair | {"chosen": pair["rejected"], "rejected": pair["chosen"]} if i % 5 == 0 else pair
             for i, pair in enumerate(clean)]
    with_records(monkeypatch, world, wrong, clean)
    o = command("reward", f"--strength_from={teacher}", "--flip_share=.2", "--adaptive_margin")
    run = train_reward(o)
    assert "strength of 40 pairs" in capsys.readouterr().out
    assert run.folder.parents["strength"] == load_checkpoint(teacher, cls=RewardModel)[2]["hash"]
    run.folder.begin(-1)
    mended = RewardTask(run, world.data).records
    assert [{k: pair[k] for k in ("prompt", "chosen", "rejected")} for pair in mended] == clean
    assert np.min([pair["margin"] for pair in mended]) > 0


def test_strength_is_for_pairs_without_margins(command, world, monkeypatch):
    strong = f"--strength_from={world.root / 'reward'}"
    with pytest.raises(UserError, match="strength_from has no effect on records for label"):
        train_reward(command("reward", strong, "--flip_share=.1"))
    own = [pair | {"margin": 0.5} for pair in made_up(8)]
    with_records(monkeypatch, world, own, own)
    with pytest.raises(UserError, match="would replace the margins"):
        train_reward(command("reward", strong, "--adaptive_margin"))


def test_the_judge_neither_gives_strength_nor_takes_it(command, world, tmp_path):
    """A policy would be trained against the judge by way of the pairs that it turned round."""
    model, tokenizer, _ = load_checkpoint(world.root / "reward", cls=RewardModel)
    save_checkpoint(tmp_path / "x", model, tokenizer, stage="judge", step=1, feedback="label")
    with pytest.raises(UserError, match="this is the judge"):
        train.reward(command("reward", f"--strength_from={tmp_path / 'x'}", "--flip_share=.1"))
    with pytest.raises(UserError, match="owes nothing to a reward model"):
        train.judge(command("judge", f"--strength_from={world.root / 'reward'}", "--flip_share=.1"))


# ---- train.py reward --evaluate FILE -------------------------------------------------------------

def on_file(world, tmp_path, records, *words):
    """`train.py reward --evaluate FILE` on a file with these records; its exit code."""
    file = tmp_path / "feedback.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return train.main(["reward", f"--evaluate={file}", f"--init_from={world.root / 'reward'}", *words])


@pytest.mark.parametrize("kind,figures", [("pairs", "accuracy"), ("labels", "AUC"), ("scores", "correlation")])
def test_a_finished_reward_model_is_measured_on_any_file(world, tmp_path, capsys, kind, figures):
    records = {"pairs": made_up(20, tied=4), "labels": [
        {"prompt": f"书{i}", "response": f"{'好差'[i % 2]}{i}", "label": i % 2} for i in range(20)], "scores": [
        {"prompt": f"书{i}", "response": f"{'好差'[i % 2]}{i}", "score": i / 3} for i in range(20)]}[kind]
    before = (world.root / "reward" / "checkpoint.pt").read_bytes()
    assert on_file(world, tmp_path, records) == 0
    said = capsys.readouterr().out
    assert figures in said
    for line in ("reward model", "the longer", "the shorter", "constant"):
        assert line in said
    assert ("4 ties" in said) == (kind == "pairs")
    assert (world.root / "reward" / "checkpoint.pt").read_bytes() == before


def test_an_evaluation_refuses_options_of_training(command, world, tmp_path):
    o = command("reward", f"--evaluate={tmp_path / 'x.jsonl'}", "--epochs=3")
    with pytest.raises(UserError, match="has no effect with --evaluate"):
        train.reward(o)
    with pytest.raises(UserError, match="evaluate has no effect in a run of all stages"):
        train.main(["all", "--reward.evaluate=x.jsonl"])


# ---- PPO on such a reward model ------------------------------------------------------------------

def test_ppo_optimises_parts_and_an_ensemble_and_logs_them(command, world, tmp_path):
    """The critic has one head; the parts and the members' spread are in the log; a resumed run equals
    an uninterrupted one."""
    trunk, tokenizer, _ = load_checkpoint(world.root / "sft")
    o = command("reward", "--members=3", "--ensemble=lower")
    model = reward_model_from(trunk, o, parts=("length", "relevance"))
    save_checkpoint(tmp_path / "parts", model, tokenizer, stage="reward", step=1, feedback="pairwise",
                    template=world.data.template)
    words = (f"--reward_from={tmp_path / 'parts'}", "--updates=3", "--critic_warmup=1", "--kl_control=fixed")
    path = train.ppo(command("ppo", *words)).folder.path
    last = logged(path)[-1]
    assert {"part_length", "part_relevance", "part_spread"} <= set(last)
    assert last["part_spread"] > 0
    state = load_checkpoint(path, resumes=True)[2]
    assert state["critic"]["score_head.weight"].shape[0] == 1
    Interrupt.number = 15
    with pytest.raises(Interrupted):
        train.ppo(command("ppo", *words, "--fresh"))
    Interrupt.number = 0
    train.ppo(command("ppo", *words, "--resume"))
    assert equal(load_checkpoint(path, resumes=True)[2]["critic"], state["critic"])
