"""Comparisons, labels and ratings in one run: one kind leads, the others add training records for the
reward model and nothing else."""
import itertools

import pytest
import torch

from data.batches import reward_rows
from data.feedback import feedback_beside, settle_beside, standardised, with_main_kind
from data.prepare import open_data
from model import load_checkpoint, open_run
from reward import (RewardModel, RewardTask, feedback_loss, mixed_loss, reward_model_from, train_reward)
from runtime.options import UserError
from tests.conftest import noise
from tests.test_own import SPLITS, questions, texts, write
from tests.test_reward_stage import with_records

PAIR, LABEL, RATING = {"chosen": "", "rejected": ""}, {"label": 1}, {"score": .5}
MIXED = [PAIR, PAIR | {"tie": True}, PAIR | {"margin": .3}, LABEL, RATING, LABEL | {"label": 0}]


def pairs(n, **fields):
    return [{"prompt": f"Question {i}?", "chosen": f"good answer {i}", "rejected": f"bad {i}", **fields}
            for i in range(n)]


def labels(n, start=0, **fields):
    return [{"prompt": f"Question {i}?", "response": f"labelled {i}", "label": i % 2, **fields}
            for i in range(start, start + n)]


def ratings(n, start=0):
    return [{"prompt": f"Question {i}?", "response": f"rated {i}", "score": i % 5} for i in range(start, start + n)]


# ---- the loss ------------------------------------------------------------------------------------

@pytest.mark.parametrize("members", [(), (3,)])
def test_a_mixed_batchs_loss_is_the_mean_over_its_records_of_their_own_losses(members):
    scores = noise(*members, 9)
    weights = noise(*members, 6, seed=1).abs() if members else None
    loss = mixed_loss(scores, MIXED, .1, .5, weights)

    def of(kind, places, columns):
        own = None if weights is None else weights[:, places]
        return feedback_loss(kind, scores[..., columns], [MIXED[i] for i in places], .1, .5, own) * len(places)

    expected = (of("pairwise", [0, 1, 2], [0, 1, 2, 6, 7, 8]) + of("label", [3, 5], [3, 5])
                + of("regression", [4], [4])) / 6
    assert torch.allclose(loss, expected)


@pytest.mark.parametrize("kind,records,n", [("pairwise", MIXED[:3], 6), ("label", [LABEL] * 3, 3),
                                            ("regression", [RATING] * 3, 3)])
def test_one_kind_alone_has_its_own_loss_bit_for_bit(kind, records, n):
    found = []
    for loss in (mixed_loss, lambda *args: feedback_loss(kind, *args)):
        scores = noise(n).requires_grad_()
        value = loss(scores, records, .1, .5)
        value.backward()
        found.append((value, scores.grad))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


# ---- the stage -----------------------------------------------------------------------------------

def quality(n, good="好", bad="差"):
    """Pairs in which the reply with 好 is preferred."""
    return [{"prompt": f"书{i}", "chosen": f"{good}{i}", "rejected": f"{bad}{i}"} for i in range(n)]


def speed(n, good="快", bad="慢"):
    """Replies of which those with 快 are liked."""
    return [{"prompt": f"书{i}", "response": f"{good if i % 2 else bad}{i}", "label": i % 2} for i in range(n)]


@pytest.fixture
def task_of(command, world, monkeypatch):
    """task_of(records, beside, *words): the stage's task on these records, validated on the first ones."""
    def made(records, beside, *words):
        with_records(monkeypatch, world, records, records)
        monkeypatch.setattr("reward.feedback_beside", lambda data, stage: beside)
        o = command("reward", "--fresh", *words)
        trunk = load_checkpoint(world.root / "sft")[0]
        run = open_run("reward", o, world.data, {}, reward_model_from(trunk, o), world.data.tokenizer)
        return RewardTask(run, world.data)
    return made


@pytest.mark.parametrize("main,beside", [(quality, speed), (speed, quality)])
@torch.no_grad()
def test_a_batch_of_pairs_and_labels_has_the_loss_of_their_scores(task_of, main, beside):
    task = task_of(main(8), beside(8), "--batch=16", "--dropout=0", "--lm_coef=0", "--prefix_share=0")
    scores = {name: torch.from_numpy(task.raw_scores(of, name)) for of, name in (
        (quality(8), "chosen"), (quality(8), "rejected"), (speed(8), "response"))}
    expected = (feedback_loss("pairwise", torch.cat((scores["chosen"], scores["rejected"])), quality(8))
                + feedback_loss("label", scores["response"], speed(8))) / 2
    assert float(next(task.losses(0))[0]) == pytest.approx(float(expected), rel=1e-4)
    assert set(task.measure(1)) == ({"val_accuracy"} if main is quality else {"val_accuracy", "val_auc"})


def test_the_two_replies_of_a_pair_are_cut_alike_also_beside_other_kinds(task_of, monkeypatch):
    """Rewards of unequal lengths would be learned by whether a reply is finished."""
    task = task_of([{"prompt": f"书{i}", "chosen": "好" * 9, "rejected": "差" * 9} for i in range(8)], speed(8),
                   "--prefix_share=1", "--batch=16")
    packed = []
    monkeypatch.setattr("reward.pack_rows", lambda rows, _: packed.extend(rows) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        next(task.losses(0))
    lengths = [len(ids) for ids, _ in packed]
    assert len(packed) == 24
    assert lengths[:8] == lengths[16:]
    assert len(set(lengths[:8])) > 1


def test_ratings_beside_pairs_are_standardised_by_their_own_mean_and_spread(task_of):
    task = task_of(quality(6), [{"prompt": "书", "response": "好" * i, "score": 100. * i} for i in range(1, 9)])
    scores = torch.tensor([r["score"] for r in task.records if "score" in r])
    assert float(scores.mean()) == pytest.approx(0, abs=1e-6)
    assert float(scores.std(correction=0)) == pytest.approx(1)
    assert "ratings" not in task.extra  # a model of pairs has no scale of ratings
    assert task.extra["feedback"] == "pairwise"


def test_options_for_pairs_are_for_pairs_beside_others_too(task_of):
    plain, smoothed = (float(next(task_of(speed(8), quality(8), "--dropout=0", *words).losses(0))[0])
                       for words in ((), ("--label_smoothing=.3",)))
    assert plain != smoothed
    with pytest.raises(UserError, match="label_smoothing has no effect on records for label"):
        task_of(speed(8), [], "--label_smoothing=.3")


def test_an_ensemble_resamples_the_records_of_all_kinds(task_of):
    task = task_of(quality(8), speed(8), "--members=4")
    assert task.weights.shape == (4, 16)
    next(task.losses(0))[0].backward()
    assert (task.run.model.score_head.weight.grad.abs().sum(1) > 0).all()


def test_ties_and_equal_replies_beside_labels_are_handled_as_alone(task_of, capsys):
    late = [{"prompt": "书", "chosen": "，" * 90 + "好", "rejected": "，" * 90 + "差"}]
    tied = [pair | {"tie": True} for pair in quality(2)]
    task = task_of(speed(8), quality(2) + tied + late, "--max_len=64")
    assert task.tie_odds == 2
    assert "1 of 5 training pairs left out" in capsys.readouterr().out
    assert "tie_odds" not in task.extra


@pytest.mark.parametrize("better,liked", [("好差", "快慢"), ("好差", "慢快"), ("差好", "快慢")])
def test_two_kinds_teach_what_neither_can_teach_alone(command, world, monkeypatch, better, liked):
    """Pairs are about 好 and 差, labels about 快 and 慢, whichever way round: one kind alone gives one answer
    to what the other turns round."""
    main = quality(40, *better)
    with_records(monkeypatch, world, main, main)
    monkeypatch.setattr("reward.feedback_beside", lambda data, stage: speed(40, *liked))
    run = train_reward(command("reward", "--epochs=8", "--eval_every=100"))
    model = load_checkpoint(run.folder.path, cls=RewardModel)[0].eval()
    for asked in (quality(20, *better), quality(20, *liked)):
        chosen, rejected = (model.score_rows(reward_rows(asked, world.data.tokenizer, world.data.template, 64,
                                                         field=field)) for field in ("chosen", "rejected"))
        assert float((chosen > rejected).double().mean()) > .9


# ---- a folder ------------------------------------------------------------------------------------

@pytest.fixture
def opened(tmp_path):
    """opened(name=records, …): a folder of these files, prepared."""
    def prepared(cache="c", judge_share=-1.0, **files):
        return open_data(str(write(tmp_path / f"d{cache}", **files)), cache=tmp_path / cache, vocab_size=300,
                         judge_share=judge_share)
    return prepared


def test_other_kinds_add_training_records_and_change_nothing_else(opened, capsys):
    alone = opened("alone", reward=pairs(300))
    capsys.readouterr()
    both = opened("both", reward=pairs(300), reward_labels=labels(200, 200), reward_scores=ratings(90, 400))
    said = capsys.readouterr().out
    beside = feedback_beside(both, "reward")
    n_labels, n_scores = (len(both.records(name, "train")) for name in ("reward_labels", "reward_scores"))
    assert len(beside) == n_labels + n_scores
    assert f"the reward model learns {len(both.records('reward', 'train'))} pairs and {n_scores} scores and " \
           f"{n_labels} labels" in said
    assert "validation, test, judges and PPO go by the pairs alone" in said
    assert feedback_beside(both, "judge") == feedback_beside(alone, "reward") == []
    for stage, split in itertools.product(("reward", "sft", "ppo"), SPLITS):
        assert both.records(stage, split) == alone.records(stage, split)
    assert both.records("judge", "train") == alone.records("judge", "train")
    assert texts(both, "train") == texts(alone, "train")


@pytest.mark.parametrize("files", [{}, {"reward_val": pairs(40)}, {"judge": pairs(30)}, {"ppo_test": pairs(25)}])
def test_what_the_main_kind_holds_out_is_not_learned_from_the_others(opened, files):
    given = {name: [{"prompt": r["prompt"]} for r in records] if "ppo" in name else records
             for name, records in files.items()}
    data = opened(reward=pairs(300), reward_labels=labels(600), **given)
    learned = questions(data, "reward_labels", "train")
    held_out = {q for stage, split in itertools.product(("reward", "sft", "ppo"), SPLITS[1:])
                for q in questions(data, stage, split)} | questions(data, "judge", "train")
    assert len(held_out) > 30
    assert learned == {f"Question {i}?" for i in range(600)} - held_out


def test_without_reward_jsonl_the_kind_with_most_records_leads(opened):
    data = opened(reward_pairs=pairs(60), reward_labels=labels(200, 100))
    assert data.feedback("val") == data.feedback("test") == "labels"
    assert {"chosen" in r for r in feedback_beside(data, "reward")} == {True}
    assert len(feedback_beside(data, "reward")) == 60
    one = opened("one", reward_pairs=pairs(60))
    assert one.feedback("test") == "pairs"
    assert feedback_beside(one, "reward") == []


@pytest.mark.parametrize("files,said", [
    ({"reward_pairs": labels(60)}, "reward_pairs.jsonl: its name says pairs, but it holds labels: name it reward_l"),
    ({"reward": pairs(60), "reward_pairs": pairs(60)}, "reward.jsonl has pairs, and so has .*reward_pairs.jsonl"),
    ({"reward": pairs(60), "reward_labels": labels(60, part="a")}, "others none: let all name one, or none"),
    ({"reward": pairs(60), "reward_labels": [r | {"label": 1} for r in labels(60)]},
     "all labels to learn from are the same .1.*reward_labels.jsonl in which they differ"),
    ({"reward": pairs(60), "judge": labels(60)}, "training, validation and test need the same kind"),
    ({"reward": pairs(60), "judge": pairs(60), "reward_labels": labels(60)}, "its prompts are those of the judges"),
    ({"reward": pairs(60), "reward_val": pairs(60)[:40], "reward_labels": labels(40)},
     "reward_labels.jsonl: nothing is left to train on")])
def test_files_that_do_not_go_together_are_refused(opened, files, said):
    with pytest.raises(UserError, match=said):
        opened(**files)


def test_no_file_is_changed_in_the_hands_of_the_caller():
    files, records = {("reward_labels", "train"): "x"}, {("reward_labels", "train"): labels(4)}
    assert list(with_main_kind(files, records)[0]) == [("reward", "train")]
    assert list(files) == list(records) == [("reward_labels", "train")]
    assert settle_beside({("reward", "train"): labels(4)}) == ""
    assert standardised([{"score": 3}], {"mean": 1, "spread": 2}) == [{"score": 1}]
