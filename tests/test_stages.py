"""The stages: what each step learns from, what is measured, and what is refused before any
training."""
import dataclasses
import json
import math

import numpy as np
import pytest
import torch

import train
from data.batches import dialogue_rows, eval_windows, reward_batch, reward_rows
from data.feedback import chance_warnings
from data.parents import limit_length, require_lengths
from data.prepare import known_max_len
from data.prepared import Documents
from model import load_checkpoint, load_parent, open_run, save_checkpoint
from reward import RewardModel, RewardTask, label_loss, pairwise_loss, reward_model_from, train_reward
from runtime.draws import batch_indices, key
from runtime.options import UserError, run_main
from runtime.storage import tensors_of
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

def test_fine_tuning_measures_no_more_dialogues_than_it_is_told(task_of):
    everything, some, again, others = (task_of("sft", *words).val_rows for words in (
        [], ["--eval_dialogues=5"], ["--eval_dialogues=5"], ["--eval_dialogues=5", "--seed=1"]))
    assert len(everything) > 5 == len(some)
    assert some == again != others
    assert all(row in everything for row in some)


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
def test_a_text_shorter_than_a_window_is_read_again_and_never_across_its_end(
        task_of, world, monkeypatch):
    ids = world.data.documents("train").tokens[:20]
    text = Documents(ids, np.array([0, 20]), np.zeros(1, np.uint8), 40)
    monkeypatch.setattr(type(world.data), "documents", lambda *_: text)
    monkeypatch.setattr(type(world.data), "mixture", lambda *_: (None, {}))
    task = task_of("pretrain")
    model = loud(task.run.model)
    nats = []
    for tokens, targets, docs in zip(*task.batches.batch(0), strict=True):
        nats += [-logprobs_of(model(tokens[docs == d][None])[0], targets[docs == d])
                 for d in docs.unique()]
    assert sum(torch.equal(part, nats[1]) for part in nats) > 1  # whole copies in a window
    assert float(next(task.losses(0))[0]) == pytest.approx(float(torch.cat(nats).mean()), rel=1e-4)


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


def test_ties_count_half_and_constant_scores_have_figures(task_of):
    task, rated = task_of("reward"), [{"label": y, "score": y} for y in (0, 1, 1)]
    flat = {"response": np.full(3, .1), "chosen": np.zeros(3), "rejected": np.zeros(3)}
    expected = {"label": {"val_auc": .5, "val_accuracy": 2 / 3}, "pairwise": {"val_accuracy": .5},
                "regression": {"val_correlation": 0}}
    for task.kind, figures in expected.items():
        measured = task.agreement(rated, flat)
        assert measured == pytest.approx(figures)
        assert len(chance_warnings(task.kind, rated, measured)) == 1


@pytest.mark.parametrize("kind,name,n,enough,too_little", [
    ("pairwise", "val_accuracy", 100, .59, .57), ("pairwise", "val_accuracy", 1, None, 1.0),
    ("regression", "val_correlation", 101, .17, .16), ("regression", "val_correlation", 2, None, 1.0),
    ("label", "val_auc", 100, .60, .59), ("label", "val_auc", 2, None, 1.0)])
def test_agreement_that_luck_reaches_is_warned_of(kind, name, n, enough, too_little):
    records = [{"label": i % 2} for i in range(n)]
    (warning,) = chance_warnings(kind, records, {name: too_little})
    assert name in warning and f"over {n} records" in warning
    assert enough is None or chance_warnings(kind, records, {name: enough}) == []
    assert len(chance_warnings(kind, records, {})) == 1  # what could not be measured


def test_a_reward_model_that_learned_nothing_is_said_by_it_and_by_what_builds_on_it(
        command, world, monkeypatch, capsys):
    run = train_reward(command("reward", "--epochs=.1", "--lr=0", "--adam_lr=0"))
    assert "reward: warning: val_auc" in capsys.readouterr().err
    load_parent(run.o, world.data, "reward", run.folder.path, RewardModel)
    assert "warning: val_auc" in capsys.readouterr().err
    monkeypatch.setattr(RewardTask, "agreement", lambda *_: {"val_auc": .99})
    train_reward(command("reward", "--epochs=.1", "--fresh"))
    load_parent(run.o, world.data, "reward", run.folder.path, RewardModel)
    assert "chance" not in capsys.readouterr().err


def test_only_a_run_that_goes_on_has_its_optimizer_in_memory(command, world):
    """What its own training needs would stay as long as a child trains, a report measures or a person chats."""
    run = train_reward(command("reward", "--epochs=.1"))
    assert "optimizers" in load_checkpoint(run.folder.path, cls=RewardModel, resumes=True)[2]
    assert not [*tensors_of(load_checkpoint(run.folder.path, cls=RewardModel)[2])]
    _, _, state = load_parent(run.o, world.data, "reward", run.folder.path, RewardModel)
    assert not [*tensors_of(state)]


def test_a_judge_that_learned_nothing_is_named_as_such(command, capsys):
    train.judge(command("judge", "--epochs=.1", "--lr=0", "--adam_lr=0"))
    assert "judge: warning: val_auc" in capsys.readouterr().err


def with_records(monkeypatch, world, train_records, val_records):
    """The small world with these reward records."""
    monkeypatch.setattr(type(world.data), "records",
                        lambda _, stage, split: train_records if split == "train" else val_records)


@torch.no_grad()
def test_ratings_of_any_scale_teach_the_same(task_of, world, monkeypatch):
    losses, measured = [], []
    for scale, shift in ((1, 0), (100, 7), (1e-200, 0), (1e12, 1e12)):
        records = [{"prompt": "书", "response": "好" * i, "score": scale * i + shift}
                   for i in range(20)]
        with_records(monkeypatch, world, records, records[3:9])
        task = task_of("reward", "--dropout=0", "--lm_coef=0")
        assert np.std([r["score"] for r in task.records]) == pytest.approx(1)
        assert task.extra["ratings"]["mean"] == pytest.approx(9.5 * scale + shift)
        losses.append(float(next(task.losses(0))[0]))
        measured.append(task.measure(1)["val_correlation"])
    assert losses == pytest.approx([losses[0]] * 4, rel=1e-4)
    assert measured == pytest.approx([measured[0]] * 4, abs=1e-4)


@pytest.mark.parametrize("part,where", [(0, "to learn from"), (1, "set aside for validation")])
@pytest.mark.parametrize("name", ["label", "score"])
def test_equal_feedback_is_refused(task_of, world, monkeypatch, name, part, where):
    parts = [[{"prompt": "书", "response": "好", name: int(i % 2 or part == p)} for i in range(9)]
             for p in (0, 1)]
    with_records(monkeypatch, world, *parts)
    with pytest.raises(UserError, match=f"all {name}s {where} are the same"):
        task_of("reward")


@torch.no_grad()
def test_pairs_equal_once_cut_are_left_out_and_counted(task_of, world, monkeypatch, capsys):
    good = [{"prompt": "书", "chosen": f"好{i}", "rejected": f"差{i}"} for i in range(6)]
    late = [{"prompt": "书", "chosen": "，" * n + "好", "rejected": "，" * n + "差"} for n in (70, 85)]
    with_records(monkeypatch, world, good + late, good + late[:1])
    task = task_of("reward", "--max_len=64")
    said = capsys.readouterr().out
    assert (task.records, task.val) == (good, good)
    assert "2 of 8 training pairs" in said and "1 of 7 validation pairs" in said
    needed = said.split("validation")[0].split("--max_len ")[-1].split()[0]
    assert len(task_of("reward", "--max_len", needed).records) == 8
    with_records(monkeypatch, world, late, good)
    with pytest.raises(UserError, match="2 of 2 training pairs .*--max_len"):
        task_of("reward", "--max_len=64")


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


def test_a_window_that_only_the_data_make_too_long_is_refused_before_a_run_is_opened(command, world, tmp_path):
    """A file of one's own may raise max_len, so that the options alone do not tell."""
    (tmp_path / "mine.jsonl").write_text('{"text": "a"}\n')
    o = command("pretrain", "--data", tmp_path / "mine.jsonl", "--window=500")
    with pytest.raises(UserError, match="--window 500 contradicts --max_len 128.*lower --window, or raise --max_len"):
        train.pretrain(o)
    assert not (tmp_path / "mine").exists()
    raised = dataclasses.replace(world.data, meta=world.data.meta | {"defaults": {"pretrain": {"max_len": 600}}})
    assert known_max_len(o) is None
    assert known_max_len(o, world.data) == 128
    assert known_max_len(o, raised) == 600
    assert known_max_len(command("pretrain", "--max_len=200"), raised) == 200


def test_writing_in_8_bits_is_refused_at_once_where_it_would_not_be_used(command, monkeypatch):
    monkeypatch.setattr("ppo.pick_device", lambda device: "cuda")
    with pytest.raises(UserError, match="--rollout_dtype int8 is for a CPU: on cuda use bfloat16"):
        command("ppo", "--rollout_dtype=int8")
    assert command("ppo", "--rollout_dtype=bfloat16").rollout_dtype == "bfloat16"


def test_lengths_are_compared_with_checkpoints_before_anything_is_done(command, world, tmp_path):
    require_lengths({"sft": command("sft", "--max_len=128")})
    require_lengths({"sft": command("sft").replace(max_len=129)})  # nobody asked for it: it is lowered
    require_lengths({"ppo": command("ppo", "--reply_len=127")})
    require_lengths({"sft": command("sft", "--max_len=500", "--init_from", tmp_path / "none")})  # who loads it says so
    for stage, word in (("sft", "--max_len=129"), ("reward", "--max_len=129"), ("judge", "--max_len=129"),
                        ("ppo", "--reply_len=128")):
        with pytest.raises(UserError, match=f"{word.replace('=', ' ')} contradicts the parent model .* at most 128"):
            require_lengths({stage: command(stage, word)})
    scorer, tokenizer, _ = load_checkpoint(world.root / "reward", cls=RewardModel)
    small = RewardModel(dataclasses.replace(scorer.config, max_len=32))
    save_checkpoint(tmp_path / "small", small, tokenizer, stage="reward", step=1)
    with pytest.raises(UserError, match="--reply_len 32 contradicts .*small.* at most 32 tokens, the prompt included"):
        require_lengths({"ppo": command("ppo", "--reply_len=32", "--reward_from", tmp_path / "small")})


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


def change(world, monkeypatch, **changes):
    """Let the reward records of some splits be others: each is changed by its split's function."""
    real = type(world.data).records

    def records(self, stage, split):
        of_split = real(self, stage, split)
        return [changes[split](r) for r in of_split] if stage == "reward" and split in changes else of_split

    monkeypatch.setattr(type(world.data), "records", records)


@pytest.mark.parametrize("stages", [["reward"], ["sft", "reward", "ppo"]])
@pytest.mark.parametrize("split", ["val", "test"])
def test_another_kind_of_feedback_in_a_held_out_split_is_refused(world, monkeypatch, stages, split):
    change(world, monkeypatch, **{split: lambda r: {"prompt": r["prompt"], "chosen": "a", "rejected": "b"}})
    with pytest.raises(UserError, match=f"reward_{split}.jsonl has pairs.*same kind of feedback"):
        train.require_inputs(world.data, stages, "")


def test_test_labels_that_are_all_the_same_are_refused_before_training(world, monkeypatch):
    train.require_inputs(world.data, list(train.ROAD), "")
    change(world, monkeypatch, test=lambda r: r | {"label": 1})
    train.require_inputs(world.data, ["sft", "ppo"], "")
    with pytest.raises(UserError, match="set aside for test are the same"):
        train.require_inputs(world.data, ["reward"], "")


@pytest.mark.parametrize("given,name", [({"label": 1}, "label"), ({"score": 3}, "score")])
def test_feedback_that_is_all_the_same_is_refused_before_training(world, monkeypatch, given, name):
    def alike(record):
        return {"prompt": record["prompt"], "response": record["response"], **given}

    change(world, monkeypatch, train=alike, val=alike, test=alike)
    with pytest.raises(UserError, match=f"all {name}s to learn from are the same"):
        train.require_inputs(world.data, list(train.ROAD), "")


@pytest.mark.parametrize("words", [[], ["reward"]])
def test_all_and_single_stages_check_the_test_split_before_training(tmp_path, words):
    pairs = [{"prompt": f"Question {i}", "chosen": "a", "rejected": "b"} for i in range(60)]
    label = {"prompt": "x", "response": "a", "label": 1}
    (tmp_path / "mine").mkdir()
    for name, records in (("pretrain", [{"text": f"text {i}"} for i in range(60)]),
                          ("sft", [{"prompt": f"Question {i}", "response": "a"} for i in range(60)]),
                          ("reward", pairs), ("reward_test", [label])):
        (tmp_path / f"mine/{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    with pytest.raises(UserError, match="reward_test.jsonl has labels"):
        train.main([*words, "--preset=smoke", f"--data={tmp_path / 'mine'}", f"--out={tmp_path}"])
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_kill_between_the_last_save_and_the_end_writes_no_sample_twice(command):
    path = train_reward(command("reward", "--epochs=.2")).folder.path
    before = (path / "samples.jsonl").read_text()
    assert before
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"finished": False}))
    train_reward(command("reward", "--epochs=.2", "--resume"))
    assert (path / "samples.jsonl").read_text() == before
