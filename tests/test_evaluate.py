"""Measures of policies on held-out prompts, and of the reward model; their tables and the report."""
import copy
import dataclasses
import json

import numpy as np
import pytest
import torch

import evaluate
from data.batches import drop_long_prompts, prompt_ids, reward_rows
from data.judge import ngram_classifier
from data.tokenizer import train_bpe
from evaluate import ReplySettings, measure_policy
from model import ModelConfig, Transformer, load_checkpoint, save_checkpoint
from ppo import train_ppo
from reward import RewardModel
from runtime.options import UserError
from tests.conftest import logprobs_of


# ---- policies ------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def pair():
    """(a policy, a reference, their tokenizer), untrained."""
    tokenizer = train_bpe(["好书好看的书"] * 3, 270)
    shape = dict(vocab_size=270, n_layer=1, n_head=2, n_kv_head=2, d_model=16, d_ff=32, max_len=64)
    policy, reference = Transformer(ModelConfig(**shape)), Transformer(ModelConfig(**shape))
    for seed, model in enumerate((policy, reference)):
        model.initialise(seed)
        with torch.no_grad():
            model.embedding.weight.mul_(8)
    return policy, reference, tokenizer


PROMPTS = ["书", "好看", "的书好"]


def measured(pair, **settings):
    policy, reference, tokenizer = pair
    return measure_policy(policy, reference, tokenizer, PROMPTS, "{prompt}",
                          settings=ReplySettings(reply_len=12, seed=3, **settings))


def test_a_policys_measures_equal_those_of_its_replies_alone(pair):
    policy, reference, tokenizer = pair
    metrics, records, rows = measured(pair)
    kl, nats = [], 0.0
    for prompt, row in zip(PROMPTS, rows, strict=True):
        ids = prompt_ids(tokenizer, prompt)
        logprobs, ref_logprobs = (
            logprobs_of(model(torch.tensor([ids + row]))[0, len(ids) - 1:-1], torch.tensor(row))
            for model in (policy, reference))
        kl.append(float((logprobs - ref_logprobs).sum()))
        nats -= float(ref_logprobs.sum())
    assert [record["kl"] for record in records] == pytest.approx(kl, abs=.01)
    assert metrics["kl"] == pytest.approx(np.mean(kl), 1e-4)
    assert metrics["ref_perplexity"] == pytest.approx(np.exp(nats / sum(map(len, rows))), rel=1e-4)
    assert metrics["length"] == np.mean([len(row) for row in rows])


def test_they_do_not_depend_on_how_many_are_measured_at_a_time(pair):
    assert measured(pair, rows_at_once=1)[0] == pytest.approx(measured(pair)[0], rel=1e-4)


def test_a_policy_measured_twice_writes_the_same_replies(pair):
    assert measured(pair)[2] == measured(pair)[2]


def test_an_empty_list_of_prompts_is_an_error(pair):
    policy, reference, tokenizer = pair
    with pytest.raises(UserError, match="nothing to evaluate"):
        measure_policy(policy, reference, tokenizer, [], "{prompt}")


@pytest.mark.parametrize("temperature", [1.0, .6])
def test_scores_and_kl_are_those_of_the_ids_at_the_sampling_temperature(world, temperature):
    (sft, tokenizer, _), data = load_checkpoint(world.root / "sft"), world.data
    scorer, other = load_checkpoint(world.root / "reward", cls=RewardModel)[0], copy.deepcopy(sft)
    with torch.no_grad():
        other.embedding.weight.mul_(1.1)
    prompts = [record["prompt"] for record in data.records("ppo", "val")[:6]]
    settings = ReplySettings(reply_len=10, temperature=temperature)
    metrics, records, rows = measure_policy(sft, other, tokenizer, prompts, data.template,
                                            reward_model=scorer, settings=settings)
    for prompt, row, record in zip(prompts, rows, records, strict=True):
        ids = prompt_ids(tokenizer, prompt, data.template)
        logits, other_logits = (model(torch.tensor([ids + row]))[0, len(ids) - 1:-1] / temperature
                                for model in (sft, other))
        kl = (logprobs_of(logits, torch.tensor(row)) - logprobs_of(other_logits, torch.tensor(row)))
        assert record["kl"] == pytest.approx(float(kl.sum()), abs=.01)
        assert record["raw_score"] == pytest.approx(float(scorer.scores([ids], [row])), abs=2e-3)
    mean = np.mean([record["raw_score"] for record in records])
    assert metrics["raw_score"] == pytest.approx(mean, abs=2e-3)


# ---- the policies' table -------------------------------------------------------------------------

@pytest.fixture(scope="module")
def two_alike(world):
    """(the table of one policy under two names, its replies)."""
    sft, tokenizer, _ = load_checkpoint(world.root / "sft")
    return evaluate.policy_table({"A": sft, "B": sft}, sft, tokenizer, world.data, n_prompts=20,
                                 reward_model=None, settings=ReplySettings(reply_len=10),
                                 split="val")


def test_policies_are_measured_on_the_same_openings_and_random_numbers(two_alike):
    lines, replies = two_alike
    assert replies["A"] == replies["B"]
    assert lines[0]["kl"] == 0


def test_lines_of_people_follow_the_policies(two_alike, world):
    real = evaluate.people_wrote(world.data, world.data.tokenizer, 10, "val")
    assert [line["name"] for line in two_alike[0]] == ["A", "B", *(name for name, _, _ in real)]


def test_distinct_2_is_over_the_same_number_of_bigrams_in_every_line(two_alike, world):
    lines, replies = two_alike
    real = evaluate.people_wrote(world.data, world.data.tokenizer, 10, "val")
    counts = [sum(max(0, len(row) - 1) for row in rows) for _, _, rows in real]
    counts.append(sum(reply["tokens"] - 1 for reply in replies["A"]))
    assert {line["bigrams"] for line in lines} == {min(counts)}
    assert len(set(counts)) > 1  # the case is not trivial


def test_the_judge_reads_opening_and_reply(two_alike, world):
    lines, replies = two_alike
    texts = [reply["prompt"] + reply["reply"] for reply in replies["A"]]
    probs = ngram_classifier(world.data, "judge").probs(texts)
    assert [reply["judge"] for reply in replies["A"]] == pytest.approx(probs.tolist(), abs=1e-5)
    assert lines[0]["judged"].startswith(f"{(probs > .5).mean():.3f} [")


def test_real_lines_answer_held_out_openings(world):
    held_out = {record["prompt"] for record in world.data.records("ppo", "val")}
    judged = {record["prompt"] for record in world.data.records("reward", "val")}
    assert judged - held_out  # the case is not trivial
    lines = evaluate.people_wrote(world.data, world.data.tokenizer, 64, "val")
    assert [name for name, _, _ in lines] == ["real liked reviews", "real disliked reviews"]
    assert {record["prompt"] for _, records, _ in lines for record in records} <= held_out


def test_openings_leave_room_in_the_reward_model_too(world):
    (sft, tokenizer, _), data = load_checkpoint(world.root / "sft"), world.data
    records = data.records("ppo", "val")
    longest = max(len(prompt_ids(tokenizer, r["prompt"], data.template)) for r in records)
    short = RewardModel(dataclasses.replace(sft.config, max_len=longest + 9))
    lines, _ = evaluate.policy_table({"A": sft}, sft, tokenizer, data, reward_model=short,
                                     n_prompts=500, split="val",
                                     settings=ReplySettings(reply_len=10))
    assert 0 < lines[0]["replies"] < len(records)


# ---- the reward model ----------------------------------------------------------------------------

@pytest.fixture(scope="module")
def scored(world):
    """What reward model and baseline say of the validation records."""
    scorer, tokenizer, _ = load_checkpoint(world.root / "reward", cls=RewardModel)
    return evaluate.score_reward_model(scorer, world.data, "val", tokenizer, 128)


def test_the_labels_are_those_of_the_records(scored, world):
    assert scored["labels"] == [r["label"] for r in world.data.records("reward", "val")]


def test_the_baseline_reads_the_same_halves_as_the_reward_model(scored, world):
    tokenizer, halves = world.data.tokenizer, []
    for record in world.data.records("reward", "val"):
        ids = tokenizer.encode(record["response"])
        halves.append(record["prompt"] + tokenizer.decode(ids[:max(1, len(ids) // 2)]))
    expected = ngram_classifier(world.data, "reward").logits(halves)
    assert np.allclose(scored["half_baseline"], expected, atol=1e-5)


@pytest.mark.parametrize("max_len", [50, 128])
def test_of_a_long_text_the_baseline_reads_what_the_reward_model_reads(world, max_len):
    scorer, tokenizer, _ = load_checkpoint(world.root / "reward", cls=RewardModel)
    scored = evaluate.score_reward_model(scorer, world.data, "val", tokenizer, max_len)
    records = drop_long_prompts(world.data.records("reward", "val"), tokenizer,
                                world.data.template, max_len - 8)
    texts = []
    for r in records:
        room = max_len - len(prompt_ids(tokenizer, r["prompt"], world.data.template))
        texts.append(r["prompt"] + tokenizer.decode(tokenizer.encode(r["response"])[:room]))
    whole = [t == r["prompt"] + r["response"] for t, r in zip(texts, records, strict=True)]
    assert any(whole)
    assert not all(whole)
    expected = ngram_classifier(world.data, "reward").logits(texts)
    assert np.allclose(scored["baseline"], expected, atol=1e-5)


def test_validation_stands_beside_test_where_the_split_is_test(world):
    scorer, tokenizer, _ = load_checkpoint(world.root / "reward", cls=RewardModel)
    rows = {split: evaluate.reward_tables(scorer, world.data, split, tokenizer, 128)[0]
            for split in ("val", "test")}
    assert [row["texts"].split()[0] for row in rows["val"]] == ["val"] * 3
    assert [row["texts"].split()[0] for row in rows["test"]] == ["val", "test"] * 3
    assert [row["name"] for row in rows["test"][::2]] == [row["name"] for row in rows["val"]]


# ---- the judges ----------------------------------------------------------------------------------

def test_the_transformer_judge_is_there_where_it_was_trained(world, tmp_path):
    assert list(evaluate.judges(world.data, tmp_path, "cpu")) == ["n-grams"]
    model, tokenizer, _ = load_checkpoint(world.root / "reward", cls=RewardModel)
    save_checkpoint(tmp_path / "judge", model, tokenizer, template=world.data.template,
                    options={"max_len": 40})
    judges = evaluate.judges(world.data, tmp_path / "judge", "cpu")
    records = world.data.records("reward", "val")[:30]
    prompts, texts = ([r[key] for r in records] for key in ("prompt", "response"))
    rows = reward_rows(records, tokenizer, world.data.template, 40)
    expected = {"n-grams": ngram_classifier(world.data, "judge").probs([p + t for p, t in zip(
                    prompts, texts, strict=True)]),
                "transformer": torch.sigmoid(model.score_rows(rows)).numpy()}
    assert list(judges) == list(expected)
    for name, judge in judges.items():
        assert np.allclose(judge.probs(prompts, texts), expected[name], atol=1e-6)


# ---- the report ----------------------------------------------------------------------------------

def test_the_report_says_which_reply_the_judge_prefers(command, world, tmp_path):
    train_ppo(command("ppo", "--updates=4", "--policy_lr=.1", "--report_prompts=20"))
    root, sizes = tmp_path / "reviews", dict(n_prompts=20, settings=ReplySettings(reply_len=16))
    save_checkpoint(root / "reward", load_checkpoint(world.root / "reward", cls=RewardModel)[0],
                    world.data.tokenizer, options={"max_len": 128})
    config = json.loads((root / "ppo/config.json").read_text())
    config["options"]["reward_from"] = ""
    (root / "ppo/config.json").write_text(json.dumps(config))
    evaluate.write_report(world.data, root, seed=0, **sizes)
    report = json.loads((root / "report.json").read_text())
    sft, ppo = (load_checkpoint(f)[0] for f in (world.root / "sft", root / "ppo"))
    _, replies = evaluate.policy_table({"SFT": sft, "PPO": ppo}, sft, world.data.tokenizer,
                                       world.data, reward_model=None, **sizes)
    after, before = (np.array([r["judge"] for r in replies[k]]) for k in ("PPO", "SFT"))
    share = float((after > before).mean() + (after == before).mean() / 2)
    assert report["win_rate"][0] == pytest.approx(share)
    assert share != .5  # the case is not trivial
    assert {p["after"]["reply"] for p in report["pairs"]} <= {r["reply"] for r in replies["PPO"]}
