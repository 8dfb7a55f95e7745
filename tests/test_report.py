"""What is said of replies: figures and intervals, and a report that fits a terminal."""
import numpy as np
import pytest

from data.report import (by_judge, describe, judged_by, opinions_on_labels, people_wrote,
                         render_report, report_name, show_policies, table_row, win_rates)
from data.tokenizer import train_bpe

TOKENIZER = train_bpe(["好书好看的书"] * 3, 270)


class Fixed:
    """A judge that says these probabilities."""

    def __init__(self, *probs):
        self.given = probs

    def probs(self, prompts, texts):
        return np.array(self.given)


def described(judges, n=2):
    rows = [[1, 2, TOKENIZER.eom_id], [3, TOKENIZER.pad_id, 4], [5, 6, 7], [8, 9]][:n]
    texts = [TOKENIZER.reply_text(row) for row in rows]
    return describe(["a", "b", "c", "d"][:n], texts, rows, TOKENIZER, judges, {})


def test_every_judge_has_figures_of_its_own():
    judges = {"n-grams": Fixed(.2, .9), "transformer": Fixed(.6, .8)}
    metrics, records = described(judges)
    assert metrics["judged_positive"] == .5
    assert metrics["judged_positive_transformer"] == 1
    assert metrics["judge"] == pytest.approx(.55)
    assert [r["judge_transformer"] for r in records] == [.6, .8]
    assert judged_by({}, ["a"], ["b"]) == ({}, {})
    assert [by_judge("judge", name) for name in judges] == ["judge", "judge_transformer"]


def test_control_tokens_other_than_the_end_are_counted_and_not_shown():
    metrics, records = described({})
    assert metrics["control"] == .5
    assert [r["ended"] for r in records] == [True, False]
    assert records[1]["reply"] == TOKENIZER.decode([3, 4])
    assert records[1]["tokens"] == 3


def test_intervals_are_over_openings():
    _, records = described({"n-grams": Fixed(.2, .9, .2, .9)}, n=4)
    once = table_row("x", {}, records)["intervals"]["judged_positive"]
    pairs = table_row("x", {}, records, samples=2)["intervals"]["judged_positive"]
    assert once[0] < .5 < once[1]
    assert pairs == [.5, .5]  # each opening has one liked reply and one that is not


def test_the_last_policy_is_compared_with_every_other():
    replies = {"A": [.1, .4], "SFT, best of 16": [.4], "C": [.9, .3]}
    replies = {name: [{"judge": p} for p in probs] for name, probs in replies.items()}
    wins = win_rates(replies, ["A", "C"], ["n-grams"])
    assert [(w["over"], w["win_rate"][0]) for w in wins] == [("A", .5), ("SFT, best of 16", 1)]
    wins = win_rates(replies, ["A", "C"], ["n-grams"], samples=2)  # two replies to one opening
    assert [(w["over"], w["win_rate"][0]) for w in wins] == [("A", .75), ("SFT, best of 16", .5)]


def test_a_judge_is_measured_on_labels():
    records = [{"prompt": "a", "response": "b", "label": i % 2} for i in range(20)]
    found = opinions_on_labels({"n-grams": Fixed(*[.2, .7] * 10)}, records)
    assert found["n-grams"]["auc"].startswith("1.000 [")


def test_people_who_answer_messages_are_found():
    """Prompts may be lists of messages."""
    prompt = [{"role": "user", "content": "书"}]

    class Data:
        def records(self, stage, split):
            return [{"prompt": prompt, "response": "好看", "label": 1}]

    assert people_wrote(Data(), TOKENIZER, 10)[0][0] == "people, liked"


def test_a_report_of_test_texts_has_a_name_of_its_own():
    assert [report_name("report.json", split) for split in ("val", "test")] \
        == ["report.json", "report_test.json"]


# ---- in words ------------------------------------------------------------------------------------

def line(name, **others):
    figures = {"judged_positive": .916, "judged_positive_transformer": .882, "raw_score": 3.851,
               "kl": 4.365, "distinct2": .736, "length": 19.8, "end_rate": .998, "identical": 0.0,
               "short": .072, "ref_perplexity": 108.2, "control": 0.0} | others
    return {"name": name, "replies": "2000", "bigrams": 5000, **figures,
            "intervals": {key: [figures[key] * .97, figures[key] * 1.03] for key in (
                "judged_positive", "judged_positive_transformer", "raw_score", "kl", "distinct2",
                "length")}}


def test_the_table_with_all_columns_and_intervals_fits_a_terminal():
    lines = [line(name) for name in ("SFT", "PPO", "SFT, best of 16", "people, disliked")]
    shown = show_policies(lines, ["n-grams", "transformer"]).splitlines()
    assert max(map(len, shown)) <= 160
    assert len({len(row) for row in shown}) == 1  # columns stand below each other
    assert "0.916 ±.027" in shown[2]


def report(**others):
    return {"split": "val", "seed": 3, "openings": 500, "judges": ["n-grams", "transformer"],
            "samples": 1, "settings": {"reply_len": 64, "temperature": 1.0}, "first": "SFT",
            "last": "PPO", "policies": [line("SFT"), line("PPO", control=.02)], "pairs": [],
            "win_rates": [{"judge": "transformer", "policy": "PPO", "over": "SFT, best of 16",
                           "win_rate": [.6, .5, .7]}], **others}


def test_the_report_says_split_judges_and_who_is_preferred():
    text = render_report(report(), "reviews", {})
    assert text.startswith("# reviews, seed 3, validation")
    assert "openings of the validation split" in text
    assert "Judged by n-grams, then by transformer" in text
    assert "PPO to that of SFT, best of 16 on 60.0% of the openings [50.0%, 70.0%]" in text
    assert "2.0% of the replies of PPO hold control tokens" in text


def test_a_report_without_judges_and_labels_is_one_too():
    plain = [{key: x for key, x in row.items() if "judge" not in key} | {"intervals": {}}
             for row in report()["policies"]]
    text = render_report(report(judges=[], policies=plain, win_rates=[]), "mine", {})
    assert "Judged by nobody" in text
