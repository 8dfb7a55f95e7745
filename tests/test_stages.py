"""The stages: what each step learns from, what is measured, and what is refused before any
training."""
import json
import math

import numpy as np
import pytest
import torch

import train
from data.batches import dialogue_rows, eval_windows, reward_batch, reward_rows
from model import limit_length, load_checkpoint, open_run, save_checkpoint
from reward import RewardModel, RewardTask, label_loss, pairwise_loss, reward_model_from, train_reward
from runtime.draws import batch_indices, key
from runtime.options import UserError, run_main
from tests.conftest import logprobs_of, loud


@pytest.fixture
def task_of(command, world):
    """task_of(stage, *words): the stage's task, its run open and nothing trained yet."""
    def made(stage, *words):
        o, data, tokenizer = command(stage, "--fresh", *words), world.data, world.data.tokenizer
        if stage == "pretrain":
            model = train.new_model(o, tokenizer.n_vocab)
        else:
            model = load_checkpoint(world.root / {"sft": "pretrain", "reward": "sft"}[stage])[0]
            o = limit_length(o, model.config)
            model = reward_model_from(model, o) if stage == "reward" else model
        run = open_run(stage, o, data, {}, model, tokenizer)
        run.folder.begin(-1)
        return {"pretrain": train.PretrainTask, "sft": train.SFTTask,
                "reward": RewardTask}[stage](run, data)
    return made


# ---- losses --------------------------------------------------------------------------------------

def test_pretraining_means_over_every_target_and_stays_inside_documents(task_of):
    ends = []
    for words in (["--batch=8"], ["--batch=4", "--accumulate=2"]):
        task = task_of("pretrain", *words)
        model = loud(task.run.model)
        total = sum(loss for loss, _ in task.losses(0))
        total.backward()
        ends.append(torch.cat([total.detach()[None], *(p.grad.flatten()
                                                       for p in model.parameters())]))
    nats, batch = 0.0, task.batches.batch(0)
    for tokens, targets, docs in zip(*batch, strict=True):
        for d in docs.unique():  # each document alone
            nats -= float(logprobs_of(model(tokens[docs == d][None])[0],
                                      targets[docs == d]).sum().detach())
    assert float(ends[0][0]) == pytest.approx(nats / batch[0].numel(), rel=1e-4)
    assert torch.allclose(*ends, atol=1e-5)
    assert model.config.dropout == 0


@torch.no_grad()
def test_sft_learns_replies_alone_by_their_tokens(task_of, world):
    task = task_of("sft")
    rows, _ = dialogue_rows(world.data.records("sft", "train"), world.data.tokenizer,
                            world.data.template, 64)
    nats = n = 0
    for i in batch_indices(len(rows), 16, 0, 0, "sft"):
        ids, learned = (torch.tensor(x) for x in rows[i])
        nats -= float(logprobs_of(task.run.model(ids[None])[0, :-1], ids[1:])[learned[1:]].sum())
        n += int(learned.sum())
    (loss, tokens), = task.losses(0)
    assert tokens == n
    assert float(loss) == pytest.approx(nats / n, rel=1e-4)
    assert task.run.model.config.dropout == 0


def reward_batch_of(records, world, field="response"):
    rows = reward_rows(records, world.data.tokenizer, world.data.template, 128, field=field,
                       prefix_share=.3, rng=np.random.default_rng(key(0, "reward", "prefix", 0)))
    return rows, reward_batch(rows, "cpu")


@torch.no_grad()
def test_the_reward_loss_is_that_of_rows_alone_plus_the_language_models(task_of, world):
    task = task_of("reward", "--max_len=128")  # so that several rows share a window
    model = task.run.model.eval()
    model.score_head.weight.mul_(20)
    records = world.data.records("reward", "train")
    batch = [records[i] for i in batch_indices(len(records), 16, 0, 0, "reward")]
    _, (tokens, real, reply) = reward_batch_of(batch, world)
    nats = -logprobs_of(model.backbone(tokens, real)[:, :-1], tokens[:, 1:])[reply[:, 1:]]
    labels = torch.tensor([r["label"] for r in batch])
    expected = label_loss(model(tokens, real, reply), labels) + .1 * nats.mean()
    assert float(next(task.losses(0))[0]) == pytest.approx(float(expected), rel=1e-4)


@torch.no_grad()
def test_dropout_is_on_where_the_reward_model_learns(task_of):
    task = task_of("reward")
    task.run.model.train()
    first, second = (float(next(task.losses(0))[0]) for _ in range(2))
    assert first != second
    assert task.run.model.config.dropout == .1


@torch.no_grad()
def test_pairs_are_cut_alike_and_only_the_chosen_reply_is_imitated(task_of, world, monkeypatch):
    texts = [r["response"] for r in world.data.records("reward", "train")[:40]]
    pairs = [{"prompt": "书", "chosen": a, "rejected": b} for a,
             b in zip(texts, texts[1:], strict=False)]
    monkeypatch.setattr(type(world.data), "records", lambda *_: pairs)
    task = task_of("reward", "--max_len=128", "--dropout=0", "--label_smoothing=.2")
    model = task.run.model
    model.score_head.weight.mul_(20)
    batch = [pairs[i] for i in batch_indices(len(pairs), 16, 0, 0, "reward")]
    (chosen_rows, chosen), (rejected_rows, rejected) = (reward_batch_of(batch, world, field)
                                                        for field in ("chosen", "rejected"))
    finished = [[ids[-1] == world.data.tokenizer.eom_id for ids, _ in rows]
                for rows in (chosen_rows, rejected_rows)]
    assert finished[0] == finished[1]
    assert 0 < sum(finished[0]) < 16
    tokens, real, reply = chosen
    nats = -logprobs_of(model.backbone(tokens, real)[:, :-1], tokens[:, 1:])[reply[:, 1:]]
    expected = pairwise_loss(model(*chosen), model(*rejected),
                             label_smoothing=.2) + .1 * nats.mean()
    assert float(next(task.losses(0))[0]) == pytest.approx(float(expected), rel=1e-4)


# ---- measures ------------------------------------------------------------------------------------

@torch.no_grad()
def test_sft_validation_is_a_mean_over_reply_tokens(task_of, world):
    task = task_of("sft")
    rows, _ = dialogue_rows(world.data.records("sft", "val"), world.data.tokenizer,
                            world.data.template, 64)
    nats = sum(-float(logprobs_of(task.run.model(torch.tensor([ids]))[0, :-1],
                                  torch.tensor(ids[1:]))
                      [torch.tensor(learned[1:])].sum()) for ids, learned in rows)
    assert task.measure(1)["val_loss"] == pytest.approx(nats / sum(sum(learned) for _,
                                                                   learned in rows), rel=1e-4)


@torch.no_grad()
def test_pretraining_validation_counts_real_targets_and_bits(task_of, world):
    task = task_of("pretrain")
    val, nats, n = world.data.documents("val"), 0.0, 0
    for batch in eval_windows(val.tokens, val.starts, 64, 32):
        for x, y, docs, real in zip(*batch, strict=True):
            for d in docs[real].unique():
                at = real & (docs == d)
                nats -= float(logprobs_of(task.run.model(x[at][None])[0], y[at]).sum())
                n += int(at.sum())
    measured = task.measure(1)
    assert measured["val_loss"] == pytest.approx(nats / n, rel=1e-4)
    assert measured["val_bpb"] == pytest.approx(nats / math.log(2) / val.n_bytes, rel=1e-4)


def test_agreement_reads_probabilities_and_the_order_of_pairs(task_of):
    task = task_of("reward")
    rated = [{"prompt": "a", "response": "b", "label": y} for y in (1, 0)]
    scores = {"response": np.array([.2, -.1])}
    assert task.agreement(rated, scores)["val_accuracy"] == 1  # though no score is above one half
    # nothing to rank
    assert task.agreement([{**r, "label": 1} for r in rated], scores) == {"val_accuracy": .5}
    task.kind = "pairwise"
    scores = {"chosen": np.array([2., 1, 0]), "rejected": np.array([1., 0, 3])}
    assert task.agreement([{}] * 3, scores)["val_accuracy"] == pytest.approx(2 / 3)


def test_the_reward_model_is_measured_on_records_drawn_from_all(task_of):
    """A file of one's own may be sorted, and only 600 of its records are scored."""
    task, scored = task_of("reward"), []
    task.val = [{**task.val[0], "label": int(i >= 700), "number": i} for i in range(1400)]
    task.raw_scores = lambda records, field: scored.append([r["number"]
                                                            for r in records]) or np.zeros(len(records))
    task.measure(1)
    (numbers,) = scored
    assert len({*numbers}) == 600
    assert 240 < sum(i >= 700 for i in numbers) < 360


@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_no_stage_trains_on_the_judges_half_or_on_test(command, world, monkeypatch, stage):
    asked, real = set(), type(world.data).records
    monkeypatch.setattr(type(world.data), "records",
                        lambda self, *names: asked.add(names) or real(self, *names))
    run = {"sft": train.sft, "reward": train_reward}[stage]
    run(command(stage, "--epochs=.2"))
    assert (stage, "train") in asked
    assert [names for names in asked if "judge" in names or "test" in names] == []


def test_the_judge_learns_its_own_half_alone_from_the_pretrained_trunk(command, world, monkeypatch):
    asked, real = set(), type(world.data).records
    monkeypatch.setattr(type(world.data), "records",
                        lambda self, *names: asked.add(names) or real(self, *names))
    run = train.judge(command("judge", "--epochs=.2", "--prefix_share=0"))
    assert asked == {("judge", "train"), ("reward", "val")}
    assert run.folder.path.name == "judge"
    parent = load_checkpoint(world.root / "pretrain")[2]["hash"]
    assert run.folder.parents["init"] == parent
    draws = [batch_indices(100, 16, 0, 0, stage).tolist() for stage in ("reward", "judge")]
    assert draws[0] != draws[1]


def test_the_judge_is_refused_as_a_reward_model(command, world, tmp_path):
    model, tokenizer, _ = load_checkpoint(world.root / "reward", cls=RewardModel)
    save_checkpoint(tmp_path / "x", model, tokenizer, stage="judge", step=1, feedback="label")
    o = command("ppo", "--reward_from", tmp_path / "x")
    with pytest.raises(UserError, match="this is the judge"):
        train.ppo(o)
    with pytest.raises(UserError, match="this is the judge"):
        train.require_inputs(world.data, ["ppo"], str(tmp_path / "x"))


# ---- what is refused, and what is left as it was -------------------------------------------------

def test_labels_that_are_all_the_same_are_refused_before_training(command, world, monkeypatch):
    real = type(world.data).records
    monkeypatch.setattr(type(world.data), "records", lambda self, stage, split: [
        r | {"label": 1} if split == "val" and "label" in r else r
        for r in real(self, stage, split)])
    with pytest.raises(UserError, match="set aside for validation are the same"):
        train_reward(command("reward"))


def test_rows_are_capped_at_what_the_parent_was_made_for(command, world):
    config = load_checkpoint(world.root / "pretrain")[0].config
    assert limit_length(command("sft").replace(max_len=500), config).max_len == 128
    with pytest.raises(UserError, match="contradicts the parent model"):
        limit_length(command("sft", "--max_len=500"), config)


@pytest.mark.parametrize("stage,words", [
    ("ppo", "--minibatches=0"), ("sft", "--batch=0"), ("sft", "--epochs=0"),
    ("sft", "--eval_every=0"),
    ("sft", "--seed=-1"), ("pretrain", "--n_head=0"), ("ppo",
                                                       "--kl_control=adaptive --kl_target=0"),
    ("pretrain", "--accumulate=0"), ("ppo", "--samples_per_prompt=3"), ("ppo", "--temperature=0"),
    ("pretrain", "--mixture=poems=.5"), ("ppo", "--top_k=5")])
def test_numbers_out_of_range_are_one_clear_line(command, stage, words, capsys):
    assert run_main(lambda argv: train.STAGES[stage][1](command(stage, *argv)) and 0,
                    words.split()) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_run_that_never_began_stands_in_nobodys_way(command):
    with pytest.raises(UserError, match="fits"):
        train.sft(command("sft", "--max_len=16"))
    assert train.sft(command("sft", "--epochs=1")) is not None


def test_fresh_with_something_wrong_keeps_the_old_run(command, monkeypatch):
    path = train.sft(command("sft", "--epochs=1")).folder.path
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UserError, match="sees no such device"):
        train.sft(command("sft", "--epochs=1", "--fresh", "--device=cuda"))
    with pytest.raises(UserError, match="no dialogue fits"):
        train.sft(command("sft", "--max_len=16", "--fresh"))
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before


def test_all_says_before_the_first_stage_what_a_later_one_lacks(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/pretrain.jsonl").write_text("".join(json.dumps({"text": f"text {i}"}) + "\n"
                                                          for i in range(90)))
    words = ["--preset=smoke", f"--data={tmp_path / 'mine'}", f"--out={tmp_path}",
             "--vocab_size=270"]
    with pytest.raises(UserError, match="nothing for the stage sft"):
        train.main(words)
    assert not (tmp_path / "mine/pretrain").exists()


def test_a_kill_between_the_last_save_and_the_end_writes_no_sample_twice(command):
    path = train_reward(command("reward", "--epochs=.2")).folder.path
    before = (path / "samples.jsonl").read_text()
    assert before
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"finished": False}))
    train_reward(command("reward", "--epochs=.2", "--resume"))
    assert (path / "samples.jsonl").read_text() == before
