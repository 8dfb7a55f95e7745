"""Measures: textbook values, paired intervals, and a judge that learns what is there to learn."""
import copy
import dataclasses
import json

import numpy as np
import pytest
import torch

import evaluate
from data.batches import prompt_ids
from data.tokenizer import train_bpe
from data.judge import ngram_classifier
from evaluate import ReplySettings, distinct_n, measure_policy, reply_statistics, table, text_plot
from model import ModelConfig, Transformer, load_checkpoint, save_checkpoint
from ppo import train_ppo
from reward import RewardModel
from runtime.options import UserError
from tests.conftest import logprobs_of


def test_distinct_n_counts_over_equal_numbers():
    rows = [[1, 2, 3], [1, 2], [4]]
    assert distinct_n(rows, 2) == 2 / 3 and distinct_n(rows, 1) == 4 / 6
    assert distinct_n(rows, 2, budget=2) == 1
    assert distinct_n([[1, 1, 1, 1]], 2) == 1 / 3


def test_statistics_of_replies():
    found = reply_statistics([[1, 2], [1, 2], [3] * 10, [4] * 10], [True, True, False, True])
    assert found == {"length": 6, "end_rate": .75, "identical": .5, "short": .5}


# ---- policies ------------------------------------------------------------------------------------

def test_a_policys_measures_equal_those_of_its_replies_alone():
    tokenizer = train_bpe(["好书好看的书"] * 3, 270)
    shape = dict(vocab_size=270, n_layer=1, n_head=2, n_kv_head=2, d_model=16, d_ff=32, max_len=64)
    policy, reference = Transformer(ModelConfig(**shape)), Transformer(ModelConfig(**shape))
    for seed, model in enumerate((policy, reference)):
        model.initialise(seed)
        with torch.no_grad():
            model.embedding.weight.mul_(8)
    prompts = ["书", "好看", "的书好"]
    found, records, rows = measure_policy(policy, reference, tokenizer, prompts, "{prompt}",
                                          settings=ReplySettings(reply_len=12, seed=3))
    kl, nats = [], 0.0
    for prompt, row in zip(prompts, rows, strict=True):
        ids = prompt_ids(tokenizer, prompt)
        of = [logprobs_of(m(torch.tensor([ids + row]))[0, len(ids) - 1:-1], torch.tensor(row))
              for m in (policy, reference)]
        kl.append(float((of[0] - of[1]).sum()))
        nats -= float(of[1].sum())
    assert [r["kl"] for r in records] == pytest.approx(kl,
                                                       abs=.01) and found["kl"] == pytest.approx(np.mean(kl), 1e-4)
    assert found["ref_perplexity"] == pytest.approx(np.exp(nats / sum(map(len, rows))), rel=1e-4)
    assert found["length"] == np.mean([len(r) for r in rows])
    again, _, _ = measure_policy(policy, reference, tokenizer, prompts, "{prompt}",
                                 settings=ReplySettings(reply_len=12, seed=3, rows_at_once=1))
    assert again == pytest.approx(found, rel=1e-4)


def test_tables_and_plots_of_text():
    rows = [{"a": 1.23456, "b": "x"}, {"a": None}]
    assert table(rows, {"a": "A", "b": "B"}) == "| A | B |\n| --- | --- |\n| 1.235 | x |\n| – | – |"
    plot = text_plot([0, 1, 2, 3], "rise").splitlines()
    assert plot[0] == "rise" and plot[1].endswith("•") and plot[-1].split("|")[1].startswith("•")
    assert "no values" in text_plot([], "empty")


def test_an_empty_list_of_prompts_is_an_error(world):
    lm = Transformer(ModelConfig(vocab_size=270, n_layer=1, n_head=2, n_kv_head=2, d_model=16,
                                 d_ff=32, max_len=64))
    with pytest.raises(UserError, match="nothing to evaluate"):
        measure_policy(lm, lm, world.data.tokenizer, [], "{prompt}")


@pytest.mark.parametrize("temperature", [1.0, .6])
def test_a_policys_scores_and_kl_are_those_of_its_ids_at_the_sampling_temperature(world,
                                                                                  temperature):
    (sft, tokenizer, _), data = load_checkpoint(world.root / "sft"), world.data
    judge, other = load_checkpoint(world.root / "reward", cls=RewardModel)[0], copy.deepcopy(sft)
    with torch.no_grad():
        other.embedding.weight.mul_(1.1)
    asked = [r["prompt"] for r in data.records("ppo", "val")[:6]]
    found, records, rows = measure_policy(sft, other, tokenizer, asked, data.template,
                                          reward_model=judge, settings=ReplySettings(reply_len=10,
                                                                 temperature=temperature))
    ids = [prompt_ids(tokenizer, p, data.template) for p in asked]
    for p, row, record in zip(ids, rows, records, strict=True):
        a, b = (logprobs_of(m(torch.tensor([p + row]))[0, len(p) - 1:-1] / temperature,
                            torch.tensor(row)).sum()
                for m in (sft, other))
        assert record["kl"] == pytest.approx(float(a - b), abs=.01)
        assert record["raw_score"] == pytest.approx(float(judge.scores([p], [row])), abs=2e-3)
    assert found["raw_score"] == pytest.approx(np.mean([r["raw_score"] for r in records]), abs=2e-3)


def test_the_tables_lines_are_measured_alike_and_by_the_judge(world):
    (sft, tokenizer, _), data = load_checkpoint(world.root / "sft"), world.data
    table_rows, replies = evaluate.policy_table({"A": sft, "B": sft}, sft, tokenizer, data,
                                                reward_model=None,
                                                n_prompts=20, settings=ReplySettings(reply_len=10),
                                                split="val")
    # the same openings and random numbers
    assert replies["A"] == replies["B"] and table_rows[0]["kl"] == 0
    real = evaluate.people_wrote(data, tokenizer, 10, "val")
    counts = [sum(max(0, len(row) - 1) for row in rows) for _, _, rows in real]
    counts.append(sum(r["tokens"] - 1 for r in replies["A"]))
    assert [r["name"] for r in table_rows] == ["A", "B", *(name for name, _, _ in real)]
    assert {r["bigrams"] for r in table_rows} == {min(counts)} and len(set(counts)) > 1
    probs = ngram_classifier(data, "judge").probs([r["prompt"] + r["reply"] for r in replies["A"]])
    assert [r["judge"] for r in replies["A"]] == pytest.approx(probs.tolist(), abs=1e-5)
    assert table_rows[0]["judged"].startswith(f"{(probs > .5).mean():.3f} [")


def test_reward_model_and_baseline_read_the_same_halves_and_learned_from_the_same_labels(world):
    judge, tokenizer, _ = load_checkpoint(world.root / "reward", cls=RewardModel)
    found = evaluate.score_reward_model(judge, world.data, "val", tokenizer, 128)
    records, baseline = world.data.records("reward", "val"), ngram_classifier(world.data, "reward")
    halves = [r["prompt"] + tokenizer.decode(i[:max(1, len(i) // 2)])
              for r in records for i in [tokenizer.encode(r["response"])]]
    assert found["labels"] == [r["label"] for r in records]
    assert np.allclose(found["baseline"], baseline.logits([r["prompt"] + r["response"]
                                                           for r in records]), atol=1e-5)
    assert np.allclose(found["half_baseline"], baseline.logits(halves), atol=1e-5)


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
    assert report["win_rate"][0] == pytest.approx(share) and share != .5
    assert {p["after"]["reply"] for p in report["pairs"]} <= {r["reply"] for r in replies["PPO"]}


def test_real_lines_answer_held_out_openings(world):
    held = {r["prompt"] for r in world.data.records("ppo", "val")}
    assert any(r["prompt"] not in held for r in world.data.records("reward", "val"))
    lines = evaluate.people_wrote(world.data, world.data.tokenizer, 64, "val")
    assert lines and all(r["prompt"] in held for _, records, _ in lines for r in records)


def test_openings_leave_room_in_the_reward_model_too(world):
    (sft, tokenizer, _), data = load_checkpoint(world.root / "sft"), world.data
    longest = max(len(prompt_ids(tokenizer, r["prompt"], data.template))
                  for r in data.records("ppo", "val"))
    short = RewardModel(dataclasses.replace(sft.config, max_len=longest + 9))
    rows, _ = evaluate.policy_table({"A": sft}, sft, tokenizer, data, reward_model=short,
                                    n_prompts=500, split="val",
                                    settings=ReplySettings(reply_len=10))
    assert 0 < rows[0]["replies"] < len(data.records("ppo", "val"))
