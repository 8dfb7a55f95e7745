"""Measures: textbook values, paired intervals, and a judge that learns what is there to learn."""
import copy
import dataclasses
import json
import types

import numpy as np
import pytest
import torch

import evaluate
from data.batches import prompt_ids
from data.bpe import train_bpe
from data.judge import NgramClassifier, ngram_classifier, plain_text
from data.prepare import open_data
from evaluate import ReplySettings, best_of_n_kl, distinct_n, measure_policy, reply_statistics, table, text_plot
from model import ModelConfig, Transformer, load_checkpoint, save_checkpoint
from ppo import train_ppo
from reward import RewardModel
from runtime.options import UserError, run_main
from runtime.statistics import accuracy, auc, bootstrap, calibration_error, paired_auc_difference, win_rate
from tests.conftest import logprobs_of, made_up_reviews


def test_auc_is_the_share_of_pairs_in_the_right_order():
    rng = np.random.default_rng(0)
    scores, labels = rng.integers(0, 8, 60), rng.integers(0, 2, 60)
    pairs = [(a > b) + (a == b) / 2 for a in scores[labels == 1] for b in scores[labels == 0]]
    assert auc(scores, labels) == pytest.approx(np.mean(pairs))
    assert auc([1, 2, 3], [0, 0, 1]) == 1 and auc([3, 2, 1], [0, 0, 1]) == 0 and auc([5, 5], [0, 1]) == .5


def test_accuracy_and_calibration():
    assert accuracy([.9, .2, .6], [1, 0, 0]) == pytest.approx(2 / 3)
    rng = np.random.default_rng(1)
    p = rng.random(40_000)
    assert calibration_error(p, rng.random(40_000) < p) < .02
    assert calibration_error(np.full(100, .95), np.tile([1, 0], 50)) == pytest.approx(.45)


@pytest.mark.parametrize("measure", [auc, accuracy, calibration_error])
def test_empty_and_unequal_sets_are_errors(measure):
    for a, b in (([], []), ([1, 2], [1])):
        with pytest.raises(UserError, match="nothing to measure"):
            measure(a, b)
    with pytest.raises(UserError, match="all labels are the same"):
        auc([1, 2], [1, 1])


def test_the_bootstrap_covers_a_mean_as_theory_says():
    x = np.random.default_rng(2).normal(3, 2, 400)
    value, low, high = bootstrap(lambda a: float(a.mean()), x)
    assert value == pytest.approx(x.mean())
    assert (high - low) / 2 == pytest.approx(1.96 * x.std() / 20, rel=.1)
    assert bootstrap(lambda a: float(a.mean()), x) == (value, low, high)  # the same seed, the same interval


def test_a_paired_interval_is_narrower_than_an_unpaired_one():
    rng = np.random.default_rng(3)
    labels = rng.integers(0, 2, 500)
    shared = labels + rng.normal(0, 1, 500)
    a, b = shared + rng.normal(0, .1, 500) + .1 * labels, shared + rng.normal(0, .1, 500)
    value, low, high = paired_auc_difference([a, a], b, labels, n=300)
    assert value == pytest.approx(auc(a, labels) - auc(b, labels)) and low < value < high
    alone = bootstrap(auc, a, labels, n=300)
    assert high - low < .5 * (alone[2] - alone[1])


def test_distinct_n_counts_over_equal_numbers():
    rows = [[1, 2, 3], [1, 2], [4]]
    assert distinct_n(rows, 2) == 2 / 3 and distinct_n(rows, 1) == 4 / 6
    assert distinct_n(rows, 2, budget=2) == 1
    assert distinct_n([[1, 1, 1, 1]], 2) == 1 / 3


def test_statistics_of_replies():
    found = reply_statistics([[1, 2], [1, 2], [3] * 10, [4] * 10], [True, True, False, True])
    assert found == {"length": 6, "end_rate": .75, "identical": .5, "short": .5}


def test_win_rates_count_ties_half():
    assert win_rate([1, 1, 1, 0], [0, 0, 1, 1])[0] == pytest.approx(.625)


def test_best_of_n_bound_at_known_values():
    assert [round(best_of_n_kl(n), 3) for n in (1, 4, 16, 64, 256)] == [0, .636, 1.835, 3.175, 4.549]


# ---- the n-gram classifier -------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def reviews():
    texts = made_up_reviews(True) + made_up_reviews(False)
    labels = [1] * 400 + [0] * 400
    order = np.random.default_rng(0).permutation(800)
    return [texts[i] for i in order], [labels[i] for i in order]


def test_it_learns_and_saves(reviews, tmp_path):
    texts, labels = reviews
    classifier = NgramClassifier(n_features=2**14).fit(texts[:600], labels[:600])
    assert auc(classifier.logits(texts[600:]), labels[600:]) > .99
    torch.save(classifier.state_dict(), tmp_path / "c.pt")
    again = NgramClassifier.from_state(torch.load(tmp_path / "c.pt", weights_only=True))
    assert np.array_equal(again.logits(texts[600:]), classifier.logits(texts[600:]))


def test_its_hash_is_the_same_everywhere():
    found = NgramClassifier()._hashes("好书好")
    assert sorted(found.values()) == [1, 1, 1, 1, 2]  # 书, 好书, 书好, 好书好, and 好 twice

    def by_definition(gram: str) -> int:
        h = len(gram)
        for c in gram:
            h = (h * 0x9E3779B97F4A7C15 + ord(c)) * 0xBF58476D1CE4E5B9 % 2**64
            h ^= h >> 29
        return h % 2**18

    assert set(found) == {by_definition(g) for g in ("好", "书", "好书", "书好", "好书好")}


def test_order_matters_to_it_through_longer_grams_only():
    a, b = NgramClassifier(orders=(1,)), NgramClassifier(orders=(1, 2))
    assert a._hashes("好不") == a._hashes("不好") and b._hashes("好不") != b._hashes("不好")


def test_noise_teaches_it_nothing_that_generalises(reviews):
    texts, _ = reviews
    labels = np.random.default_rng(5).integers(0, 2, 800)
    classifier = NgramClassifier(n_features=2**14).fit(texts[:600], labels[:600])
    assert abs(auc(classifier.logits(texts[600:]), labels[600:]) - .5) < .12


def test_its_optimum_has_no_gradient(reviews):
    texts, labels = reviews
    classifier = NgramClassifier(n_features=2**14, l2=1e-3).fit(texts[:200], labels[:200])
    rows, features, values = classifier._features(texts[:200])
    values = classifier._scaled(rows, features, values, 200)
    error = torch.from_numpy(classifier.probs(texts[:200])).float() - torch.tensor(labels[:200]).float()
    grad = torch.zeros(2**14).index_add(0, features, error[rows] * values / 200) + 1e-3 * classifier.weight
    assert grad.abs().max() < 1e-4 and abs(error.mean()) < 1e-4


def test_baseline_and_judge_learn_from_different_halves(reviews_source, tmp_path):
    data = open_data("reviews", source=str(reviews_source), vocab_size=400, cache=tmp_path)
    for half in ("reward", "judge"):
        records, test = data.records(half, "train"), [plain_text(r) for r in data.records("reward", "test")]
        expected = NgramClassifier().fit([plain_text(r) for r in records], [r["label"] for r in records])
        for _ in range(2):  # fitted, then found again
            assert np.allclose(ngram_classifier(data, half).logits(test), expected.logits(test), atol=1e-4)
    mine, others = ({plain_text(r) for r in data.records(half, "train")} for half in ("reward", "judge"))
    assert not mine & others


# ---- policies --------------------------------------------------------------------------------------------------------

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
    assert [r["kl"] for r in records] == pytest.approx(kl, abs=.01) and found["kl"] == pytest.approx(np.mean(kl), 1e-4)
    assert found["ref_perplexity"] == pytest.approx(np.exp(nats / sum(map(len, rows))), rel=1e-4)
    assert found["length"] == np.mean([len(r) for r in rows])
    again, _, _ = measure_policy(policy, reference, tokenizer, prompts, "{prompt}",
                                 settings=ReplySettings(reply_len=12, seed=3, rows_at_once=1))
    assert again == pytest.approx(found, rel=1e-4)


def test_a_calibration_error_has_an_interval_that_covers_it():
    """Where it is small its resamples are biased upwards, and the plain interval misses it mostly."""
    rng, covered = np.random.default_rng(0), {True: 0, False: 0}
    truth = rng.random(400_000)
    drawn = lambda p: (rng.random(len(p)) < .05 + .9 * p).astype(int)
    exact = calibration_error(truth, drawn(truth))
    for _ in range(100):
        probs = rng.random(1600)
        labels = drawn(probs)
        for basic in covered:
            _, low, high = bootstrap(calibration_error, probs, labels, n=200, basic=basic)
            covered[basic] += low <= exact <= high
    assert covered[True] >= 82 and covered[False] <= 35  # measured over 400: 91 % and 20 %


def test_opening_and_reply_are_read_as_one_text():
    assert plain_text({"prompt": "这本", "response": "书"}) == "这本书"
    assert plain_text({"prompt": [{"role": "user", "content": "a"}], "response": "b"}) == "ab"


def test_tables_and_plots_of_text():
    rows = [{"a": 1.23456, "b": "x"}, {"a": None}]
    assert table(rows, {"a": "A", "b": "B"}) == "| A | B |\n| --- | --- |\n| 1.235 | x |\n| – | – |"
    plot = text_plot([0, 1, 2, 3], "rise").splitlines()
    assert plot[0] == "rise" and plot[1].endswith("•") and plot[-1].split("|")[1].startswith("•")
    assert "no values" in text_plot([], "empty")


def test_an_empty_list_of_prompts_is_an_error(world):
    lm = Transformer(ModelConfig(vocab_size=270, n_layer=1, n_head=2, n_kv_head=2, d_model=16, d_ff=32, max_len=64))
    with pytest.raises(UserError, match="nothing to evaluate"):
        measure_policy(lm, lm, world.data.tokenizer, [], "{prompt}")


@pytest.mark.parametrize("temperature", [1.0, .6])
def test_a_policys_scores_and_kl_are_those_of_its_ids_at_the_sampling_temperature(world, temperature):
    (sft, tokenizer, _), data = load_checkpoint(world.root / "sft"), world.data
    judge, other = load_checkpoint(world.root / "reward", cls=RewardModel)[0], copy.deepcopy(sft)
    with torch.no_grad():
        other.embedding.weight.mul_(1.1)
    asked = [r["prompt"] for r in data.records("ppo", "val")[:6]]
    found, records, rows = measure_policy(sft, other, tokenizer, asked, data.template, reward_model=judge,
                                          settings=ReplySettings(reply_len=10, temperature=temperature))
    ids = [prompt_ids(tokenizer, p, data.template) for p in asked]
    for p, row, record in zip(ids, rows, records, strict=True):
        a, b = (logprobs_of(m(torch.tensor([p + row]))[0, len(p) - 1:-1] / temperature, torch.tensor(row)).sum()
                for m in (sft, other))
        assert record["kl"] == pytest.approx(float(a - b), abs=.01)
        assert record["raw_score"] == pytest.approx(float(judge.scores([p], [row])), abs=2e-3)
    assert found["raw_score"] == pytest.approx(np.mean([r["raw_score"] for r in records]), abs=2e-3)


def test_the_tables_lines_are_measured_alike_and_by_the_judge(world):
    (sft, tokenizer, _), data = load_checkpoint(world.root / "sft"), world.data
    table_rows, replies = evaluate.policy_table({"A": sft, "B": sft}, sft, tokenizer, data, reward_model=None,
                                                n_prompts=20, settings=ReplySettings(reply_len=10), split="val")
    assert replies["A"] == replies["B"] and table_rows[0]["kl"] == 0  # the same openings and random numbers
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
    assert np.allclose(found["baseline"], baseline.logits([r["prompt"] + r["response"] for r in records]), atol=1e-5)
    assert np.allclose(found["half_baseline"], baseline.logits(halves), atol=1e-5)


def test_the_report_says_which_reply_the_judge_prefers(command, world, tmp_path):
    train_ppo(command("ppo", "--updates=4", "--policy_lr=.1", "--report_prompts=20"))
    root, sizes = tmp_path / "reviews", dict(n_prompts=20, settings=ReplySettings(reply_len=16))
    save_checkpoint(root / "reward", load_checkpoint(world.root / "reward", cls=RewardModel)[0], world.data.tokenizer,
                    options={"max_len": 128})
    config = json.loads((root / "ppo/config.json").read_text())
    config["options"]["reward_from"] = ""
    (root / "ppo/config.json").write_text(json.dumps(config))
    evaluate.write_report(world.data, root, seed=0, **sizes)
    report = json.loads((root / "report.json").read_text())
    sft, ppo = (load_checkpoint(f)[0] for f in (world.root / "sft", root / "ppo"))
    _, replies = evaluate.policy_table({"SFT": sft, "PPO": ppo}, sft, world.data.tokenizer, world.data,
                                       reward_model=None, **sizes)
    after, before = (np.array([r["judge"] for r in replies[k]]) for k in ("PPO", "SFT"))
    share = float((after > before).mean() + (after == before).mean() / 2)
    assert report["win_rate"][0] == pytest.approx(share) and share != .5
    assert {p["after"]["reply"] for p in report["pairs"]} <= {r["reply"] for r in replies["PPO"]}


def test_a_full_disk_while_the_judge_is_kept_is_one_clear_line(world, tmp_path):
    (tmp_path / "ngrams_judge.tmp").symlink_to("/dev/full")
    data = types.SimpleNamespace(folder=tmp_path, records=world.data.records)
    assert run_main(lambda argv: ngram_classifier(data, "judge") and 0, []) == 2


def test_real_lines_answer_held_out_openings(world):
    held = {r["prompt"] for r in world.data.records("ppo", "val")}
    assert any(r["prompt"] not in held for r in world.data.records("reward", "val"))
    lines = evaluate.people_wrote(world.data, world.data.tokenizer, 64, "val")
    assert lines and all(r["prompt"] in held for _, records, _ in lines for r in records)


def test_the_judge_is_the_same_whenever_it_is_fitted():
    rng, threads = np.random.default_rng(0), torch.get_num_threads()
    texts = ["".join(map(chr, row)) for row in rng.integers(0x4E00, 0x4E80, (800, 50))]  # enough for several threads
    labels = rng.integers(0, 2, 800)
    torch.set_num_threads(4)
    try:
        a, b = (NgramClassifier().fit(texts, labels) for _ in range(2))
        assert torch.equal(a.weight, b.weight) and torch.equal(a.bias, b.bias) and torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(threads)


def test_openings_leave_room_in_the_reward_model_too(world):
    (sft, tokenizer, _), data = load_checkpoint(world.root / "sft"), world.data
    longest = max(len(prompt_ids(tokenizer, r["prompt"], data.template)) for r in data.records("ppo", "val"))
    short = RewardModel(dataclasses.replace(sft.config, max_len=longest + 9))
    rows, _ = evaluate.policy_table({"A": sft}, sft, tokenizer, data, reward_model=short, n_prompts=500, split="val",
                                    settings=ReplySettings(reply_len=10))
    assert 0 < rows[0]["replies"] < len(data.records("ppo", "val"))
