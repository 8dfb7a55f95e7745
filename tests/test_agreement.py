"""Tables of a reward model's agreement with people: what each figure is, and that both systems read
the same."""
import numpy as np
import pytest
import torch

from data.agreement import (agreement_rows, columns, curve, people_alike, score_feedback, show_agreement,
                            summary)
from data.ngrams import NgramRegression
from data.tokenizer import train_bpe
from runtime.statistics import auc, bootstrap, correlation

TOKENIZER = train_bpe(["good words are read here, bad words as well"] * 3, 270)


class Model:
    """A reward model whose score is a function of the reply's text; it keeps what it has read."""

    def __init__(self, function, parts=None):
        self.function, self.read = function, []
        self.parts = parts or {}

    def score_rows(self, rows, parts=()):
        texts = [TOKENIZER.reply_text([i for i, of_reply in zip(*row, strict=True) if of_reply]) for row in rows]
        self.read += texts
        heads = [self.parts.get(part, self.function) for part in parts or [""] * len(texts)]
        return torch.tensor([float(head(text)) for head, text in zip(heads, texts, strict=True)])


def pairs(n=40, **more):
    """Pairs in which three of four chosen replies are the longer ones."""
    texts = [("a" * 5, "b" * 3) if i % 4 else ("a" * 3, "b" * 5) for i in range(n)]
    return [{"prompt": f"{i}", "chosen": a, "rejected": b} | more for i, (a, b) in enumerate(texts)]


def scored(model, records, max_len=64, **others):
    return score_feedback(model, records, TOKENIZER, "{prompt}", max_len, **others)


def row(rows, name):
    found, = (r for r in rows if r["name"] == name)
    return found


# ---- pairs ---------------------------------------------------------------------------------------

def test_of_pairs_the_accuracy_is_the_share_in_which_the_preferred_reply_scores_higher():
    rows = agreement_rows(scored(Model(len), pairs()), "val")
    assert row(rows, "reward model")["accuracy"].startswith("0.750 [")
    assert row(rows, "reward model")["texts"] == "val 40"
    assert row(rows, "the longer")["accuracy"] == row(rows, "reward model")["accuracy"]
    assert row(rows, "the shorter")["accuracy"].startswith("0.250 [")
    assert row(rows, "constant")["accuracy"] == "0.500"
    assert row(rows, "reward model")["length"].startswith("1.000 [")


def test_ties_are_counted_and_left_out():
    ties = pairs(8, tie=True)
    with_ties, without = (agreement_rows(scored(Model(len), records), "val")[0]
                          for records in (pairs() + ties, pairs()))
    assert with_ties["texts"] == "val 40, 8 ties"
    assert with_ties["accuracy"][:5] == without["accuracy"][:5]


def test_a_sure_model_that_is_right_as_often_as_it_says_is_calibrated():
    sure = np.log(3)  # σ = .75, and three of four are right
    found = scored(Model(lambda text: sure if len(text) > 3 else 0.0), pairs())
    assert agreement_rows(found)[0]["calibration"].startswith("0.000 [")
    assert curve(found) == [{"n": 40, "predicted": pytest.approx(.75), "observed": .75}]
    too_sure = scored(Model(lambda text: 9.0 if len(text) > 3 else 0.0), pairs())
    assert agreement_rows(too_sure)[0]["calibration"].startswith("0.250 [")


def test_the_order_of_a_pair_in_the_record_changes_no_calibration():
    """Whether the preferred reply comes first is a matter of form."""
    found = scored(Model(lambda text: -len(text) / 2), pairs())  # wrong in three of four
    bins = curve(found)
    assert sum(b["n"] for b in bins) == 40
    assert all(b["predicted"] >= .5 for b in bins)
    assert bins[0]["observed"] == pytest.approx(.25)


def test_pairs_that_are_equal_within_the_row_tell_nothing():
    alike = [{"prompt": "x", "chosen": "good" * 40 + "a", "rejected": "good" * 40 + "b"}]
    found = scored(Model(len), pairs() + alike)
    assert len(found["truth"]) == 40


# ---- ratings and labels --------------------------------------------------------------------------

def ratings(n=60, **more):
    return [{"prompt": f"p{i}", "response": "a" * (1 + i % 12), "score": 100.0 + 10 * (i % 12)} | more
            for i in range(n)]


def test_ratings_are_compared_in_their_own_unit():
    scale = {"mean": 100.0, "spread": 10.0}  # the model says (rating − mean) / spread
    found = scored(Model(lambda text: len(text) - 1), ratings(), scale=scale)
    first = agreement_rows(found, "val")[0]
    assert first["correlation"] == first["rank_correlation"] == "1.000 [1.000, 1.000]"
    assert first["error"] == first["calibration"] == "0.000 [0.000, 0.000]"
    assert row(agreement_rows(found), "constant") == {"name": "constant", "texts": "60",
                                                      "correlation": "0.000", "error": "1.000"}


def test_scores_that_are_no_ratings_have_correlations_only():
    found = scored(Model(lambda text: len(text) ** 3), ratings())
    first = agreement_rows(found)[0]
    assert first["rank_correlation"].startswith("1.000")
    assert "error" not in first
    assert "calibration" not in first
    assert curve(found) == []


def test_a_label_models_table_has_auc_and_the_more_frequent_label():
    labels = [{"prompt": f"{i}", "response": "a" * (1 + i % 7), "label": int(i % 7 > 4)} for i in range(70)]
    rows = agreement_rows(scored(Model(len), labels), "val")
    assert rows[0]["auc"].startswith("1.000")
    assert row(rows, "constant")["accuracy"] == "0.714"
    assert row(rows, "the shorter")["auc"].startswith("0.000")


# ---- the baseline --------------------------------------------------------------------------------

@pytest.mark.parametrize("records", [pairs(), ratings()])
def test_the_baseline_reads_exactly_what_the_model_reads(records, monkeypatch):
    kind = "pairs" if "chosen" in records[0] else "scores"
    long = [r | {f: r[f] * 30 for f in ("chosen", "rejected", "response") if f in r} for r in records]
    model, read = Model(len), []
    baseline = NgramRegression(n_features=64, kind=kind)
    monkeypatch.setattr(baseline, "scores", lambda texts: read.extend(texts) or np.zeros(len(texts)))
    scored(model, long, 40, baselines={"": baseline})
    prompts = [r["prompt"] for r in long] * (len(model.read) // len(long))
    expected = model.read if kind == "pairs" else [p + t for p, t in zip(prompts, model.read, strict=True)]
    assert read == expected
    assert max(map(len, read)) < 40 * 6


def test_the_difference_to_the_baseline_is_paired():
    found = scored(Model(len), pairs())
    found |= {"baseline": (-np.array(found["scores"])).tolist(), "half_baseline": found["half_scores"]}
    assert row(agreement_rows(found), "difference (paired)")["accuracy"].startswith("+0.500 [")
    same = found | {"baseline": found["scores"]}
    assert row(agreement_rows(same), "difference (paired)")["accuracy"] == "+0.000 [+0.000, +0.000]"


# ---- parts, groups, people -----------------------------------------------------------------------

def test_each_part_is_judged_by_its_own_head():
    records = pairs(20, part="long") + pairs(20, part="short")
    model = Model(lambda text: 0, parts={"long": len, "short": lambda text: -len(text)})
    rows = agreement_rows(scored(model, records), "val")
    assert row(rows, "reward model, long")["accuracy"].startswith("0.750 [")
    assert row(rows, "reward model, short")["accuracy"].startswith("0.250 [")
    assert row(rows, "reward model")["accuracy"].startswith("0.500 [")
    assert row(rows, "reward model, long")["texts"] == "val 20"


def test_records_of_one_prompt_are_resampled_together():
    once = pairs(20)
    often = [r for r in once for _ in range(5)]
    found = scored(Model(len), often)
    width = {name: np.ptp([float(x) for x in cell.split("[")[1][:-1].split(",")]) for name, cell in (
        ("once", agreement_rows(scored(Model(len), once))[0]["accuracy"]),
        ("often", agreement_rows(found)[0]["accuracy"]),
        ("apart", agreement_rows({k: v for k, v in found.items() if k != "groups"})[0]["accuracy"]))}
    assert width["often"] == pytest.approx(width["once"], abs=.06)
    assert width["apart"] < .6 * width["once"]


def test_the_ceiling_is_what_a_perfect_model_reaches():
    """A model that knows each text's true worth correlates with the mean of noisy raters just so."""
    rng = np.random.default_rng(0)
    worth = rng.normal(0, 1, 2000)
    raters = worth[:, None] + rng.normal(0, 2, (2000, 10))
    records = [{"prompt": "", "response": "a", "score": float(r.mean()), "scores": r.tolist()} for r in raters]
    people = people_alike(records)
    reached = correlation(worth, raters.mean(1))
    assert people["ceiling"][0] == pytest.approx(reached, abs=.02)
    assert people["halves"][1] < people["halves"][0] < people["halves"][2]
    assert people["raters"] == 10
    assert people_alike(ratings()) == {}  # nobody's own ratings are known
    assert people_alike([r | {"scores": [r["score"]]} for r in ratings()]) == {}  # one rater each


def test_the_text_below_the_table_names_form_ceiling_and_curve():
    rng = np.random.default_rng(0)
    records = [r | {"scores": (r["score"] + rng.normal(0, 5, 4)).tolist()} for r in ratings()]
    baseline = {"": NgramRegression(kind="scores", unit="words", l2=.5).fit(["a", "b"], [1, 2])}
    found = scored(Model(len), records, scale={"mean": 0.0, "spread": 1.0}, baselines=baseline)
    text = show_agreement(agreement_rows(found, "val"), summary(found))
    assert "chosen on validation: 1 to 3 words, idf weights, l2 0.5" in text
    assert "two halves of the raters (4 a text, 60 texts) correlate with 0.9" in text
    assert "| predicted | rated" in text
    assert all(title in text for title in columns("scores").values())


def test_a_bootstrap_over_groups_that_are_single_texts_is_the_plain_one():
    x, y = np.random.default_rng(0).normal(size=(2, 50))
    assert bootstrap(correlation, x, y, groups=range(50)) == bootstrap(correlation, x, y)
    labels = (y > 0).astype(int)
    assert bootstrap(auc, x, labels, groups=["a"] * 50) == bootstrap(auc, x, labels)  # one prompt for all
