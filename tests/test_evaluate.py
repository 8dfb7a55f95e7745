"""Measures of policies on held-out prompts, and of the reward model; their tables and the report."""
import copy
import dataclasses
import json
import shutil
import types

import numpy as np
import pytest
import torch

import evaluate
from data import batches
from data.batches import drop_long_prompts, prompt_ids, reward_rows
from data.judge import ngram_regressions
from data.agreement import most_measured, score_feedback
from data.report import people_wrote, policy_columns, show_policies
from data.tokenizer import SPECIAL_TOKENS, train_bpe
from evaluate import ReplySettings, measure_policy
from model import ModelConfig, Transformer, load_checkpoint, save_checkpoint
from ppo import train_ppo
from reward import PythonReward, RewardModel
from runtime.options import UserError, run_main
from sample import Generation, reply_ids, reply_to
from tests.conftest import loud


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
    k1, kl, nats = [], [], 0.0
    for prompt, row in zip(PROMPTS, rows, strict=True):
        ids = prompt_ids(tokenizer, prompt)
        logps, ref_logps = (model(torch.tensor([ids + row]))[0, len(ids) - 1:-1].log_softmax(-1)
                            for model in (policy, reference))
        logprobs, ref_logprobs = (x.gather(1, torch.tensor(row)[:, None]) for x in (logps, ref_logps))
        k1.append(float((logprobs - ref_logprobs).sum()))
        kl.append(float(torch.nn.functional.kl_div(ref_logps, logps, log_target=True,
                                                   reduction="sum")))
        nats -= float(ref_logprobs.sum())
    assert [record["kl"] for record in records] == pytest.approx(kl, abs=1e-3)
    assert metrics["kl"] == pytest.approx(np.mean(kl), 1e-4)
    assert metrics["kl_k1"] == pytest.approx(np.mean(k1), 1e-4)
    assert metrics["ref_perplexity"] == pytest.approx(np.exp(nats / sum(map(len, rows))), rel=1e-4)
    assert metrics["length"] == np.mean([len(row) for row in rows])


def test_they_do_not_depend_on_how_many_are_measured_at_a_time(pair, monkeypatch):
    together = measured(pair)[0]
    monkeypatch.setitem(batches.TOKENS_AT_ONCE, "cpu", 30)
    assert measured(pair, rows_at_once=1)[0] == pytest.approx(together, rel=1e-4)


def test_a_policy_measured_twice_writes_the_same_replies(pair):
    assert measured(pair)[2] == measured(pair)[2]


@pytest.fixture(scope="module")
def all_replies():
    """(log π, log π_ref, KL), each (B, R), of every reply of up to 2 tokens over 5 tokens, of which
    the last ends a reply."""
    shape = dict(vocab_size=5, n_layer=1, n_head=2, n_kv_head=2, d_model=16, d_ff=32, max_len=8)
    models = [Transformer(ModelConfig(**shape)) for _ in range(2)]
    for seed, model in enumerate(models):
        model.initialise(seed)
        loud(model)
        with torch.no_grad():
            model.embedding.weight.mul_(4)
    rows = [[4, 0]] + [[a, b] for a in range(4) for b in range(5)]
    tokens = torch.tensor(rows)
    replies = Generation(tokens, torch.tensor([[True, row[0] != 4] for row in rows]), tokens * 0.0)
    return evaluate.reply_logprobs(*models, [[0, 1]] * len(rows), replies, ReplySettings())


def test_both_estimates_of_the_kl_have_its_mean_and_the_exact_steps_less_variance(all_replies):
    logprobs, ref_logprobs, kl = (x.double() for x in all_replies)
    probs, ref_probs = logprobs.sum(1).exp(), ref_logprobs.sum(1).exp()
    assert float(probs.sum()) == pytest.approx(1)
    divergence = float((probs * (probs / ref_probs).log()).sum())
    k1, exact = (logprobs - ref_logprobs).sum(1), kl.sum(1)
    for estimate in (k1, exact):
        assert float((probs * estimate).sum()) == pytest.approx(divergence, abs=1e-5)
    variance = [float((probs * (x - divergence) ** 2).sum()) for x in (k1, exact)]
    assert variance[1] < .5 * variance[0]


def test_few_logits_at_a_time_give_the_same(pair, monkeypatch):
    expected = measured(pair)[0]
    monkeypatch.setattr("runtime.machine.NUMBERS_AT_ONCE", {"cpu": 4 * 3 * 270})
    assert measured(pair)[0] == pytest.approx(expected, rel=1e-5)


def test_control_tokens_are_in_the_ids_and_in_no_text(pair):
    """What reads ids sees all of them, what reads texts none."""
    policy, reference, tokenizer = pair
    seen = {}

    class Judge:
        def probs(self, prompts, texts):
            seen["judge"] = list(texts)
            return np.full(len(texts), .7)

    class Scorer:
        def scores(self, prompts, replies):
            seen["ids"] = replies
            return PythonReward(lambda _, texts: [float(texts_seen(texts))] * len(texts),
                                tokenizer).scores(prompts, replies)

    def texts_seen(texts):
        seen["reward"] = list(texts)
        return 0

    metrics, records, rows = measure_policy(policy, reference, tokenizer, PROMPTS * 8, "{prompt}",
                                            judges={"n-grams": Judge()}, reward_model=Scorer(),
                                            settings=ReplySettings(reply_len=30, seed=3))
    control = set(tokenizer.special_ids) - {tokenizer.eom_id}
    with_control = [not control.isdisjoint(row) for row in rows]
    assert any(with_control)  # the case is not trivial
    assert metrics["control"] == np.mean(with_control)
    assert seen["ids"] == rows
    texts = [record["reply"] for record in records]
    assert texts == seen["judge"] == seen["reward"]
    assert texts == [tokenizer.decode(i for i in row if i < 264) for row in rows]
    assert not any(name in text for text in texts for name in SPECIAL_TOKENS)


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
        logps, other_logps = logits.log_softmax(-1), other_logits.log_softmax(-1)
        kl = (logps.exp() * (logps - other_logps)).sum()
        assert record["kl"] == pytest.approx(float(kl), abs=1e-3)
        assert record["raw_score"] == pytest.approx(float(scorer.scores([ids], [row])), abs=2e-3)
    mean = np.mean([record["raw_score"] for record in records])
    assert metrics["raw_score"] == pytest.approx(mean, abs=2e-3)


# ---- the policies' table -------------------------------------------------------------------------

def compared(policies, reference, world, **others):
    """These policies beside the world's n-gram judge."""
    return evaluate.Compared(policies, reference, world.data.tokenizer,
                             judges=evaluate.load_judges(world.data), **others)


@pytest.fixture(scope="module")
def two_alike(world):
    """(the table of one policy under two names, its replies)."""
    sft, _, _ = load_checkpoint(world.root / "sft")
    return evaluate.policy_table(compared({"A": sft, "B": sft}, sft, world), world.data,
                                 n_prompts=20, settings=ReplySettings(reply_len=10))


def test_policies_are_measured_on_the_same_openings_and_random_numbers(two_alike):
    lines, replies = two_alike
    assert replies["A"] == replies["B"]
    assert lines[0]["kl"] == 0
    assert lines[0]["intervals"]["kl"] == [0, 0]


def test_lines_of_people_follow_the_policies(two_alike, world):
    real = people_wrote(world.data, world.data.tokenizer, 10, "val")
    assert [line["name"] for line in two_alike[0]] == ["A", "B", *(name for name, _, _ in real)]


def test_distinct_2_is_over_the_same_number_of_bigrams_in_every_line(two_alike, world):
    lines, replies = two_alike
    real = people_wrote(world.data, world.data.tokenizer, 10, "val")
    counts = [sum(max(0, len(row) - 1) for row in rows) for _, _, rows in real]
    counts.append(sum(reply["tokens"] - 1 for reply in replies["A"]))
    assert len({line["bigrams"] for line in lines}) == 1
    assert 0 < lines[0]["bigrams"] <= min(counts)
    assert len(set(counts)) > 1  # the case is not trivial
    for line in lines:
        low, high = line["intervals"]["distinct2"]
        assert low <= line["distinct2"] <= high


def test_the_judge_reads_opening_and_reply(two_alike, world):
    lines, replies = two_alike
    texts = [reply["prompt"] + reply["reply"] for reply in replies["A"]]
    probs = ngram_regressions(world.data, "judge")[""].probs(texts)
    assert [reply["judge"] for reply in replies["A"]] == pytest.approx(probs.tolist(), abs=1e-5)
    assert lines[0]["judged_positive"] == (probs > .5).mean()


def test_real_lines_answer_held_out_openings(world):
    held_out = {record["prompt"] for record in world.data.records("ppo", "val")}
    judged = {record["prompt"] for record in world.data.records("reward", "val")}
    assert judged - held_out  # the case is not trivial
    lines = people_wrote(world.data, world.data.tokenizer, 64, "val")
    assert [name for name, _, _ in lines] == ["people, liked", "people, disliked"]
    assert {record["prompt"] for _, records, _ in lines for record in records} <= held_out


def test_openings_leave_room_in_the_reward_model_too(world):
    (sft, tokenizer, _), data = load_checkpoint(world.root / "sft"), world.data
    records = data.records("ppo", "val")
    longest = max(len(prompt_ids(tokenizer, r["prompt"], data.template)) for r in records)
    short = RewardModel(dataclasses.replace(sft.config, max_len=longest + 9))
    lines, _ = evaluate.policy_table(compared({"A": sft}, sft, world, reward_model=short), data,
                                     n_prompts=500, settings=ReplySettings(reply_len=10))
    assert 0 < lines[0]["replies"] < len(records)


@pytest.fixture(scope="module")
def beside_best(world):
    """(the table of SFT, three replies each, with a reward model, its replies)."""
    sft, _, _ = load_checkpoint(world.root / "sft")
    scorer = load_checkpoint(world.root / "reward", cls=RewardModel)[0]
    return evaluate.policy_table(
        compared({"SFT": sft}, sft, world, reward_model=scorer), world.data, n_prompts=12,
        samples=3, settings=ReplySettings(reply_len=10))


def test_several_replies_to_an_opening_differ_and_stand_side_by_side(beside_best, world):
    (sft, *_), replies = beside_best
    records = replies["SFT"]
    assert sft["replies"] == len(records) == 36
    openings = [r["prompt"] for r in records]
    assert openings[::3] == openings[1::3] == openings[2::3]
    assert len(set(openings)) == 12
    assert len({r["reply"] for r in records}) > 12


def test_best_of_16_is_the_one_that_the_reward_model_scores_highest(beside_best):
    (sft, best, *_), replies = beside_best
    assert best["name"] == "SFT, best of 16"
    records = replies[best["name"]]
    assert len(records) == best["replies"] == 12
    assert best["raw_score"] == pytest.approx(np.mean([r["raw_score"] for r in records]), abs=1e-4)
    assert best["intervals"]["raw_score"][0] > sft["raw_score"]


def test_the_best_of_n_is_the_best(world):
    sft, tokenizer, _ = load_checkpoint(world.root / "sft")
    longest = types.SimpleNamespace(scores=lambda ids, rows: torch.tensor([len(r) * 1. for r in rows]))
    ids, settings = [[1, 2], [3]], ReplySettings(reply_len=40)
    rows, scores = evaluate.best_of(8, compared({}, sft, world, reward_model=longest), ids, settings)
    every = reply_ids(reply_to(sft, tokenizer, [x for x in ids for _ in range(8)], 40,
                               seed=settings.seed))
    lengths = [[len(r) for r in every[i:i + 8]] for i in (0, 8)]
    assert [len(r) for r in rows] == scores.tolist() == list(map(max, lengths))
    assert rows[0] in every[:8]
    assert rows[1] in every[8:]


def test_the_kl_of_best_of_16_is_given_by_its_bound(beside_best, world):
    lines, _ = beside_best
    assert "kl" not in lines[1]
    assert lines[1]["kl_bound"] == pytest.approx(1.835, abs=5e-4)
    report = {"policies": lines, "judges": ["n-grams"], "feedback": "labels"}
    shown = show_policies(report | {"columns": policy_columns(report)})
    assert "≤ 1.84" in shown.splitlines()[3]


def test_without_a_reward_model_there_is_no_best_of_16(two_alike):
    assert not any("best of" in line["name"] for line in two_alike[0])


# ---- the reward model ----------------------------------------------------------------------------

def scored_by(world, split="val", max_len=128):
    """What reward model and baseline say of the records of a split."""
    scorer, tokenizer, _ = load_checkpoint(world.root / "reward", cls=RewardModel)
    return score_feedback(scorer, world.data.records("reward", split), tokenizer, world.data.template,
                          max_len, baselines=ngram_regressions(world.data, "reward"))


@pytest.fixture(scope="module")
def scored(world):
    return scored_by(world)


def test_the_labels_are_those_of_the_records(scored, world):
    assert scored["truth"] == [r["label"] for r in world.data.records("reward", "val")]


def test_the_baseline_reads_the_same_halves_as_the_reward_model(scored, world):
    tokenizer, halves = world.data.tokenizer, []
    for record in world.data.records("reward", "val"):
        ids = tokenizer.encode(record["response"])
        halves.append(record["prompt"] + tokenizer.decode(ids[:max(1, len(ids) // 2)]))
    expected = ngram_regressions(world.data, "reward")[""].scores(halves)
    assert np.allclose(scored["half_baseline"], expected, atol=1e-5)


@pytest.mark.parametrize("max_len", [50, 128])
def test_of_a_long_text_the_baseline_reads_what_the_reward_model_reads(world, max_len):
    tokenizer, scored = world.data.tokenizer, scored_by(world, max_len=max_len)
    records = drop_long_prompts(world.data.records("reward", "val"), tokenizer,
                                world.data.template, max_len - 8)
    texts = []
    for r in records:
        room = max_len - len(prompt_ids(tokenizer, r["prompt"], world.data.template))
        texts.append(r["prompt"] + tokenizer.decode(tokenizer.encode(r["response"])[:room]))
    whole = [t == r["prompt"] + r["response"] for t, r in zip(texts, records, strict=True)]
    assert any(whole)
    assert not all(whole)
    expected = ngram_regressions(world.data, "reward")[""].scores(texts)
    assert np.allclose(scored["baseline"], expected, atol=1e-5)


def test_the_table_of_a_large_network_is_of_some_records_and_all_systems_read_the_same(world):
    scorer, tokenizer, _ = load_checkpoint(world.root / "reward", cls=RewardModel)
    rows, scores = evaluate.reward_tables(scorer, world.data, "test", tokenizer, 128, most=30)
    assert {row["texts"] for row in rows} == {"val 30", "test 30"}
    assert len(scores["test"]["scores"]) == len(scores["test"]["baseline"]) == 30


def test_of_a_network_of_real_size_less_is_measured(world, monkeypatch):
    sft, _, _ = load_checkpoint(world.root / "sft")
    assert most_measured(sft)[0] == 200
    monkeypatch.setattr("data.agreement.REAL_SIZE", sft.n_parameters() - 1)
    assert most_measured(sft) == (64, 400)


def test_validation_stands_beside_test_where_the_split_is_test(world):
    scorer, tokenizer, _ = load_checkpoint(world.root / "reward", cls=RewardModel)
    rows = {split: evaluate.reward_tables(scorer, world.data, split, tokenizer, 128)[0]
            for split in ("val", "test")}
    assert [row["texts"].split()[0] for row in rows["val"]] == ["val"] * 6
    assert [row["texts"].split()[0] for row in rows["test"]] == ["val", "test"] * 6
    assert [row["name"] for row in rows["test"][::2]] == [row["name"] for row in rows["val"]]


# ---- the judges ----------------------------------------------------------------------------------

def test_the_transformer_judge_is_there_where_it_was_trained(world, tmp_path):
    assert list(evaluate.load_judges(world.data, tmp_path)) == ["n-grams"]
    model, tokenizer, _ = load_checkpoint(world.root / "reward", cls=RewardModel)
    save_checkpoint(tmp_path / "judge", model, tokenizer, template=world.data.template,
                    options={"max_len": 40})
    judges = evaluate.load_judges(world.data, tmp_path / "judge")
    records = world.data.records("reward", "val")[:30]
    prompts, texts = ([r[key] for r in records] for key in ("prompt", "response"))
    rows = reward_rows(records, tokenizer, world.data.template, 40)
    expected = {"n-grams": ngram_regressions(world.data, "judge")[""].probs([p + t for p, t in zip(
                    prompts, texts, strict=True)]),
                "transformer": torch.sigmoid(model.score_rows(rows)).numpy()}
    assert list(judges) == list(expected)
    for name, judge in judges.items():
        assert np.allclose(judge.probs(prompts, texts), expected[name], atol=1e-6)


# ---- the report ----------------------------------------------------------------------------------

@pytest.fixture
def finished(command, world, tmp_path):
    """The folder of a run with all that a report needs, after a small PPO."""
    root = tmp_path / "reviews"
    options = {"data": "reviews", "source": "", "vocab_size": 500, "limit": 0, "max_len": 128}
    for stage, cls in (("sft", Transformer), ("reward", RewardModel)):
        save_checkpoint(root / stage, load_checkpoint(world.root / stage, cls=cls)[0],
                        world.data.tokenizer, options=options, template=world.data.template,
                        stage=stage, feedback="label")
    train_ppo(command("ppo", "--updates=4", "--policy_lr=.1", "--report_prompts=20",
                      f"--init_from={root / 'sft'}", f"--reward_from={root / 'reward'}"))
    return root


def asked(finished, *words):
    """The exit code of evaluate.py."""
    return run_main(evaluate.main, [str(finished), "--prompts=20", "--reply_len=16", *words])


def test_the_report_is_of_validation_and_says_which_reply_the_judge_prefers(finished, world, capsys):
    sizes = dict(n_prompts=25, settings=ReplySettings(reply_len=16))
    evaluate.write_report(world.data, finished, seed=0, **sizes)
    report = json.loads((finished / "report.json").read_text())
    assert report["split"] == "val"
    assert "openings of the validation split" in capsys.readouterr().out
    assert (finished / "reward_val_scores.json").exists()
    sft, ppo = (load_checkpoint(finished / stage)[0] for stage in ("sft", "ppo"))
    _, replies = evaluate.policy_table(compared({"SFT": sft, "PPO": ppo}, sft, world), world.data,
                                       **sizes)
    after, before = (np.array([r["judge"] for r in replies[k]]) for k in ("PPO", "SFT"))
    share = float((after > before).mean() + (after == before).mean() / 2)
    over = {wins["over"]: wins["win_rate"] for wins in report["win_rates"]}
    assert over["SFT"][0] == pytest.approx(share)
    assert set(over) == {"SFT", "SFT, best of 16"}
    assert share != .5  # the case is not trivial
    assert {p["after"]["reply"] for p in report["pairs"]} <= {r["reply"] for r in replies["PPO"]}


def test_what_the_stages_of_reward_model_and_judge_warned_of_stands_in_the_report(finished, world, tmp_path):
    """As their checkpoints have it; config.json may be lost."""
    for stage in ("reward", "judge"):
        model, tokenizer, _ = load_checkpoint(finished / "reward", cls=RewardModel)
        save_checkpoint(finished / stage, model, tokenizer, stage=stage, feedback="label", template=world.data.template,
                        options={"max_len": 128}, warnings=[f"val_auc of {stage} is no better than chance"])
    evaluate.write_report(world.data, finished, seed=0, n_prompts=20, settings=ReplySettings(reply_len=16))
    text = (finished / "report.md").read_text()
    for whose, stage in (("the reward model", "reward"), ("the judge transformer", "judge")):
        warning = f"{whose}: val_auc of {stage} is no better than chance"
        assert warning in json.loads((finished / "report.json").read_text())["warnings"]
        assert f"Warning: {warning}." in text
        assert f"Warning: {warning}." in (finished / "report.html").read_text()


@pytest.mark.parametrize("content", [None, b"", b'{"fini', b"[1]\n", b"{}\n", b"\xff\n", b"\xff\xfe\n"])
@pytest.mark.parametrize("name", ["ppo/config.json", "sft/config.json", "ppo/metrics.jsonl"])
def test_a_lost_or_damaged_record_of_a_run_costs_no_report(finished, world, monkeypatch, name, content):
    monkeypatch.setattr(evaluate, "open_data", lambda *_, **__: world.data)
    monkeypatch.setattr(evaluate, "build_report", lambda *_, **__: ({"split": "val", "pairs": []}, {}))
    for where in ("evaluate", "data.html"):
        monkeypatch.setattr(f"{where}.render_report", lambda *_, **__: "")
    (finished / name).unlink(missing_ok=True) if content is None else (finished / name).write_bytes(content)
    assert asked(finished) == 0
    seconds = json.loads((finished / "report.json").read_text())["seconds"]
    assert {"sft", "ppo"} <= set(seconds)


def test_a_checkpoint_that_does_not_name_its_data_needs_data(world, capsys):
    assert asked(world.root / "sft") == 2
    assert "give --data" in capsys.readouterr().err


def test_a_source_that_has_no_effect_is_refused(finished, capsys, tmp_path):
    (tmp_path / "mine.jsonl").write_text('{"prompt": "x"}\n')
    assert asked(finished / "ppo", f"--data={tmp_path / 'mine.jsonl'}", "--source=x") == 2
    assert "--source has no effect" in capsys.readouterr().err


@pytest.mark.usefixtures("finished")
def test_test_texts_are_read_by_a_command_of_their_own(finished, world, capsys, monkeypatch):
    monkeypatch.setattr(evaluate, "open_data", lambda *_, **__: world.data)
    assert asked(finished, "--split=test", f"--json={finished / 'own.json'}") == 0
    assert "openings of the test split" in capsys.readouterr().out
    report = json.loads((finished / "report_test.json").read_text())
    assert report["split"] == "test"
    assert not (finished / "report.json").exists()
    openings = {r["prompt"] for r in world.data.records("ppo", "test")}
    assert {pair["before"]["prompt"] for pair in report["pairs"]} <= openings
    own = json.loads((finished / "own.json").read_text())
    assert own["policies"] == report["policies"]


def test_all_figures_are_printed_as_json_alone(finished, world, capsys, monkeypatch):
    monkeypatch.setattr(evaluate, "open_data", lambda *_, **__: world.data)
    words = [str(finished / "sft"), str(finished / "ppo"), "--prompts=12", "--reply_len=12",
             "--samples=2", "--json=-"]
    assert run_main(evaluate.main, words) == 0
    report = json.loads(capsys.readouterr().out)
    assert [line["name"] for line in report["policies"]][:3] == ["sft", "ppo", "SFT, best of 16"]
    assert report["policies"][0]["replies"] == 24


# ---- whose figures they are ----------------------------------------------------------------------

def other_weights(finished, stage, cls=Transformer):
    """The run's checkpoint of a stage, trained anew: other weights in the same place."""
    model, tokenizer, state = load_checkpoint(finished / stage, cls=cls)
    with torch.no_grad():
        next(model.parameters()).add_(1e-3)
    save_checkpoint(finished / stage, model, tokenizer, **state)


@pytest.mark.parametrize("stage,cls,flag", [("sft", Transformer, "reference"),
                                            ("reward", RewardModel, "reward_from")])
def test_other_weights_than_those_that_ppo_started_from_are_refused(finished, stage, cls, flag):
    evaluate.load_compared({"PPO": finished / "ppo"}, "cpu")
    wanted = load_checkpoint(finished / stage, cls=cls)[2]["hash"]
    other_weights(finished, stage, cls)
    with pytest.raises(UserError, match=f"was trained from {wanted}: name their folder with --{flag}"):
        evaluate.load_compared({"PPO": finished / "ppo"}, "cpu")


def test_another_reference_that_is_asked_for_is_refused_too(finished, tmp_path):
    shutil.copytree(finished / "sft", tmp_path / "kept")
    other_weights(finished, "sft")
    where = {"PPO": finished / "ppo"}
    with pytest.raises(UserError, match="was trained from"):
        evaluate.load_compared(where, "cpu", reference=str(finished / "sft"))
    found, _, _ = evaluate.load_compared(where, "cpu", reference=str(tmp_path / "kept"))
    expected = load_checkpoint(tmp_path / "kept")[0].state_dict()
    assert all(torch.equal(x, expected[name]) for name, x in found.reference.state_dict().items())


def test_a_policy_that_is_the_reference_too_is_loaded_once(finished):
    found, _, _ = evaluate.load_compared({"SFT": finished / "sft", "PPO": finished / "ppo"}, "cpu")
    assert found.reference is found.policies["SFT"]
    assert found.reference is not found.policies["PPO"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_is_reported_in_the_precision_that_ppo_computed_in(finished, world, monkeypatch, dtype):
    monkeypatch.setattr("runtime.device.half_is_fast", lambda device: True)
    policy, tokenizer, state = load_checkpoint(finished / "ppo")
    save_checkpoint(finished / "ppo", policy, tokenizer, **state | {"dtype": dtype})
    found, _, ppo = evaluate.load_compared(evaluate.run_policies(finished), "cpu")
    evaluate.write_report(world.data, finished, seed=0, n_prompts=5, settings=ReplySettings(reply_len=8))
    report = json.loads((finished / "report.json").read_text())
    assert (ppo["dtype"], found.reward_model.dtype, report["settings"]["dtype"]) == (dtype,) * 3


def test_another_reward_model_can_be_asked_for(finished):
    other_weights(finished, "reward", RewardModel)
    found, _, _ = evaluate.load_compared({"PPO": finished / "ppo"}, "cpu",
                                         reward_from=str(finished / "reward"))
    assert found.reward_model is not None


# ---- a reward of several parts -------------------------------------------------------------------

def paid_by_parts(finished, tmp_path, spec="{}:shout,length:-.1"):
    """The run's PPO checkpoint, as if its policy had been paid by a function and length; the function's
    file."""
    path = tmp_path / "mine.py"
    path.write_text("def shout(prompts, replies):\n    return [float(len(r)) for r in replies]\n")
    model, tokenizer, state = load_checkpoint(finished / "ppo")
    options = state["options"] | {"reward": spec.format(path)}
    save_checkpoint(finished / "ppo", model, tokenizer, **state | {"options": options, "scales": {}})
    return path


def test_the_columns_are_those_of_the_reward_that_ppo_was_paid(finished, world, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "open_data", lambda *_, **__: world.data)
    paid_by_parts(finished, tmp_path)
    assert asked(finished, f"--json={tmp_path / 'r.json'}") == 0
    report = json.loads((tmp_path / "r.json").read_text())
    for row in report["policies"][:3]:
        assert row["raw_score"] == pytest.approx(row["part_shout"] - .1 * row["part_length"], abs=1e-4)
    assert report["columns"]["part_shout"] == "reward: shout"
    best, sft = (next(r for r in report["policies"] if r["name"] == name) for name in ("SFT, best of 16", "SFT"))
    assert best["part_shout"] > sft["part_shout"]  # the best by the reward that was paid


def test_a_reward_function_that_is_gone_costs_columns_and_not_the_report(finished, world, tmp_path,
                                                                        monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "open_data", lambda *_, **__: world.data)
    paid_by_parts(finished, tmp_path).unlink()
    assert asked(finished) == 0
    text = capsys.readouterr().out
    assert "Missing: no scores by --reward" in text
    assert "mine.py" in text
    assert "## Reward model" in text
