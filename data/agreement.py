"""How well scores agree with people's feedback: tables by its kind, beside plain baselines.

`score_feedback` lets a reward model and an n-gram regression read the same tokens of the same
records; its result is JSON, from which the tables of a run (`agreement_rows`) and of several
(tools/seeds.py) are made. Each kind of feedback has measures of its own, the first of which is the
one that systems are compared by.

labels  AUC; accuracy and calibration of P(liked) = σ(score).
pairs   accuracy: how often the preferred reply scores higher; calibration of σ(Δ), Δ = score of the
        preferred reply − that of the other. Ties are left out of both.
scores  correlation with the ratings, of values and of ranks; error and calibration in spreads of the
        ratings. Where records have each person's rating, the ceiling that their disagreement sets.
"""
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from data.batches import IN_A_ROW, LEAST_REPLY, Row, drop_equal_pairs, drop_long_prompts, reward_rows
from data.dataset import feedback_of
from data.judge import ngram_regressions, plain_text
from data.ngrams import NgramRegression
from data.prepared import Prepared
from data.records import prompt_text
from data.tokenizer import Tokenizer
from runtime.draws import drawn_evenly
from runtime.statistics import (accuracy, auc, bootstrap, calibration_curve, calibration_error, ceiling,
                                confidence, correlation, interval, mean_correlation, pair_accuracy,
                                paired_difference, rank_correlation, rater_halves, rating_calibration,
                                relative_error)
from runtime.tables import table

Measure = Callable[[np.ndarray, np.ndarray], float]  # (scores, what people said) -> agreement


def sigmoid(x: Sequence[float]) -> np.ndarray:
    return 1 / (1 + np.exp(-np.asarray(x)))


MEASURES: dict[str, dict[str, Measure]] = {
    "labels": {"auc": auc, "accuracy": lambda scores, labels: accuracy(sigmoid(scores), labels),
               "calibration": lambda scores, labels: calibration_error(sigmoid(scores), labels)},
    # σ(|Δ|) is above one half: 20 bins are ten that are used
    "pairs": {"accuracy": pair_accuracy,
              "calibration": lambda deltas, outcomes: calibration_error(*confidence(deltas, outcomes), 20)},
    "scores": {"correlation": correlation, "rank_correlation": rank_correlation,
               "error": relative_error, "calibration": rating_calibration},
}
TITLES = {"auc": "AUC", "accuracy": "accuracy", "correlation": "correlation",
          "rank_correlation": "of ranks", "error": "error / spread", "calibration": "calibration error"}
FEEDBACK = {"labels": "labels", "pairs": "pairs", "scores": "ratings"}  # as people call it


def main_measure(kind: str) -> str:
    """The column by which systems are compared."""
    return next(iter(MEASURES[kind]))


def measured(scored: dict[str, Any]) -> dict[str, Measure]:
    """The measures of a kind of feedback; of scores that are no ratings those that need no unit."""
    measures = MEASURES[scored["kind"]]
    unit = scored["kind"] != "scores" or scored["scaled"]
    return measures if unit else {key: measures[key] for key in ("correlation", "rank_correlation")}


def columns(kind: str) -> dict[str, str]:
    """Keys and titles of a table of this kind."""
    main = TITLES[main_measure(kind)]
    return {"name": "", "texts": "pairs" if kind == "pairs" else "texts",
            **{key: TITLES[key] for key in MEASURES[kind]},
            "half": f"{main} on first halves", "length": "correlation with length"}


# ---- scores of people's texts --------------------------------------------------------------------

def score_feedback(model: Any, records: Sequence[dict], tokenizer: Tokenizer, template: str,
                   max_len: int, *, baselines: dict[str, NgramRegression] | None = None,
                   scale: dict[str, float] | None = None) -> dict[str, Any]:
    """What people said of records of one kind, and the scores of model and baseline, for whole texts
    and for replies' first halves. Both read the same text: what the model reads, max_len tokens at
    most, decoded. Of a pair all numbers are differences, preferred reply − other.

    model: whatever has score_rows, such as a RewardModel. Of records that name a part of the reward
    it is that part's score. baselines: the regression of each part. scale: mean and spread of the
    ratings that the model learned in standardised form; None: its scores are no ratings.
    UserError if no prompt fits max_len.
    """
    kind = feedback_of(records[0])
    records = drop_long_prompts(records, tokenizer, template, max_len - LEAST_REPLY, IN_A_ROW)
    if kind == "pairs":  # those that are equal within max_len would tell nothing
        records = drop_equal_pairs(records, tokenizer, template, max_len)[0] or records
    parts = [record.get("part", "") for record in records]
    if not set(parts) <= set(baselines or {}):
        baselines = None
    scored: dict[str, Any] = {"kind": kind, "truth": truth_of(records), "scaled": scale is not None}
    if any(parts):
        scored["parts"] = parts
    prompts = [prompt_text(record["prompt"]) for record in records]
    if len(number := {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}) < len(prompts):
        scored["groups"] = [number[prompt] for prompt in prompts]
    unit = {"mean": 0.0, "spread": 1.0} | (scale or {})
    for begin, half in (("", False), ("half_", True)):
        found: dict[str, list[np.ndarray]] = {"scores": [], "baseline": [], "lengths": []}
        for field in ("chosen", "rejected") if kind == "pairs" else ("response",):
            rows = reward_rows(records, tokenizer, template, max_len, field=field, half=half)
            found["lengths"].append(np.array([sum(flags) for _, flags in rows], float))
            found["scores"].append(model_scores(model, rows, parts) * unit["spread"] + unit["mean"])
            if baselines:
                found["baseline"].append(baseline_scores(baselines, records, rows, tokenizer, parts))
        for name, values in found.items():
            if values and not (half and name == "lengths"):
                difference = values[0] - values[1] if kind == "pairs" else values[0]
                scored[begin + name] = difference.tolist()
    if baselines:
        scored["form"] = "; ".join(f"{part}: {x}" if part else str(x) for part, x in baselines.items())
    if ceilings := people_alike(records):
        scored["ceiling"] = ceilings
    return scored


def truth_of(records: Sequence[dict]) -> list[float]:
    """Labels, ratings, or of each pair 1, and 0.5 for a tie."""
    if feedback_of(records[0]) == "pairs":
        return [0.5 if record.get("tie") else 1.0 for record in records]
    return [record["score" if "score" in record else "label"] for record in records]


def model_scores(model: Any, rows: Sequence[Row], parts: Sequence[str]) -> np.ndarray:
    """(n,): the model's score of each row; of a part's record, by a model with parts, that part's."""
    scores = model.score_rows(rows, parts) if any(parts) else model.score_rows(rows)
    return scores.double().cpu().numpy()


def baseline_scores(baselines: dict[str, NgramRegression], records: Sequence[dict],
                    rows: Sequence[Row], tokenizer: Tokenizer, parts: Sequence[str]) -> np.ndarray:
    """(n,): the n-gram regression's score of the text that each row holds, ratings in their own
    unit."""
    texts = [tokenizer.reply_text(i for i, of_reply in zip(*row, strict=True) if of_reply) for row in rows]
    scores = np.zeros(len(texts))
    for part, regression in baselines.items():
        of_part = [i for i, name in enumerate(parts) if name == part]
        read = [texts[i] if regression.kind == "pairs" else plain_text(records[i] | {"response": texts[i]})
                for i in of_part]
        if read:
            scores[of_part] = regression.scores(read) * regression.spread + regression.mean
    return scores


def people_alike(records: Sequence[dict]) -> dict[str, Any]:
    """How far people agree on ratings: the correlation of two random halves of each text's raters,
    and the ceiling that follows for any model; {} unless most records have several raters."""
    several = [r for r in records if len(r.get("scores", ())) > 1]
    if len(several) < max(3, len(records) / 2):
        return {}
    raters = [r["scores"] for r in several]
    groups = [prompt_text(r["prompt"]) for r in several]
    value, low, high = bootstrap(mean_correlation, *rater_halves(raters), n=200, groups=groups)
    return {"texts": len(raters), "raters": float(np.mean([len(r) for r in raters])),
            "halves": [value, low, high], "ceiling": [ceiling(x) for x in (value, low, high)]}


# Networks of more parameters take many times as long to write and to read: of them less is measured.
REAL_SIZE = 50_000_000


def most_measured(model: Any) -> tuple[int, int]:
    """How much is measured at most of networks of this one's size: openings with best-of-n, which costs n
    replies each, and records of feedback of a split, or people's replies of one opinion."""
    return (200, 10**9) if model.n_parameters() <= REAL_SIZE else (64, 400)


# ---- tables --------------------------------------------------------------------------------------

def feedback_table(model: Any, records: Sequence[dict], tokenizer: Tokenizer, template: str,
                   max_len: int, *, baselines: dict[str, NgramRegression] | None = None,
                   scale: dict[str, float] | None = None,
                   name: str = "") -> tuple[list[dict], dict[str, Any]]:
    """(the table's rows, the scores) of a reward model on records of one kind of feedback: what
    `agreement_rows` makes of `score_feedback`, whose arguments these are. name: of the records, such
    as their split."""
    scored = score_feedback(model, records, tokenizer, template, max_len, baselines=baselines,
                            scale=scale)
    return agreement_rows(scored, name), scored


def reward_tables(model: Any, data: Prepared, split: str, tokenizer: Tokenizer, max_len: int,
                  scale: dict[str, float] | None = None,
                  most: int = 10**9) -> tuple[list[dict], dict[str, dict[str, Any]]]:
    """(rows of a reward model's table, its scores by split): of validation and, where that is the
    split, of test beside it, of each at most so many records. A split whose feedback tells nothing
    apart is left out."""
    rows: list[dict] = []
    scores: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(("val", split)):
        if data.feedback(name):
            of_split, scores[name] = feedback_table(
                model, drawn_evenly(data.records("reward", name), most), tokenizer, data.template, max_len,
                baselines=ngram_regressions(data, "reward"), scale=scale, name=name)
            rows += of_split
    order = [row["name"] for row in rows]
    return sorted(rows, key=lambda row: order.index(row["name"])), scores


def agreement_rows(scored: dict[str, Any], name: str = "") -> list[dict[str, str]]:
    """The table's rows, each figure with its 95 % interval: the reward model, the regression that
    learned the same feedback, their difference, and what length alone and a constant reach; then
    those of each part of the reward. name: of the texts, such as their split."""
    rows = part_rows(scored, name)
    parts = scored.get("parts", [])
    for part in dict.fromkeys(parts):
        of_part = those(scored, [i for i, other in enumerate(parts) if other == part])
        if len({*of_part["truth"]} - {0.5} if scored["kind"] == "pairs" else {*of_part["truth"]}):
            rows += [row | {"name": f"{row['name']}, {part}"} for row in part_rows(of_part, name)]
    return rows


def those(scored: dict[str, Any], index: Sequence[int]) -> dict[str, Any]:
    """The scores of some of the records."""
    n = len(scored["truth"])
    return {key: [x[i] for i in index] if isinstance(x, list) and len(x) == n else x
            for key, x in scored.items() if key not in ("parts", "ceiling")}


def part_rows(scored: dict[str, Any], name: str) -> list[dict[str, str]]:
    """`agreement_rows` of all these records together."""
    kind, truth, groups = scored["kind"], scored["truth"], scored.get("groups")
    ties = sum(x == 0.5 for x in truth) if kind == "pairs" else 0
    base = {"texts": f"{name} {len(truth) - ties}".strip() + (f", {ties} ties" if ties else "")}
    main, measures = main_measure(kind), measured(scored)

    def system(title: str, key: str) -> dict[str, str]:
        row = {column: interval(measure, scored[key], truth, groups=groups, basic=column == "calibration")
               for column, measure in measures.items()}
        return {"name": title, **base, **row,
                "half": interval(measures[main], scored[f"half_{key}"], truth, groups=groups),
                "length": interval(correlation, scored[key], scored["lengths"], groups=groups)}

    rows = [system("reward model", "scores")]
    if "baseline" in scored:
        rows.append(system(f"n-gram regression, same {FEEDBACK[kind]}", "baseline"))
        value, low, high = paired_difference(measures[main], [scored["scores"]], scored["baseline"],
                                             truth, groups=groups)
        rows.append({"name": "difference (paired)", **base,
                     main: f"{value:+.3f} [{low:+.3f}, {high:+.3f}]"})
    for title, sign in (("the longer", 1), ("the shorter", -1)):
        lengths = sign * np.array(scored["lengths"])
        rows.append({"name": title, **base} | {
            column: interval(measures[column], lengths, truth, groups=groups)
            for column in list(measures)[:2 if kind == "scores" else 1]})
    return [*rows, {"name": "constant", **base, **constant(kind, truth)}]


def constant(kind: str, truth: Sequence[float]) -> dict[str, str]:
    """What one answer for all texts reaches: the more frequent label, the mean rating, none."""
    if kind == "labels":
        share = float(np.mean(truth))
        return {"auc": "0.500", "accuracy": f"{max(share, 1 - share):.3f}"}
    return {"accuracy": "0.500"} if kind == "pairs" else {"correlation": "0.000", "error": "1.000"}


def curve(scored: dict[str, Any]) -> list[dict[str, float]]:
    """The reward model's calibration: n, mean prediction and what people said on average, in ten
    bins. Of pairs: the probability that it gives to the reply it prefers, and how often people
    preferred that one. [] where scores are no ratings."""
    truth = scored["truth"]
    if scored["kind"] == "labels":
        return calibration_curve(sigmoid(scored["scores"]), truth, np.arange(1, 10) / 10)
    if scored["kind"] == "pairs":
        return calibration_curve(*confidence(scored["scores"], truth), np.arange(11, 20) / 20)
    return calibration_curve(scored["scores"], truth) if scored["scaled"] else []


def summary(scored: dict[str, Any]) -> dict[str, Any]:
    """What stands below the table: the kind of feedback, the baseline's form, how far people agree,
    and the calibration curve."""
    kept = {key: scored[key] for key in ("kind", "form", "ceiling") if key in scored}
    return kept | {"calibration": curve(scored)}


def show_agreement(rows: Sequence[dict[str, str]], below: dict[str, Any]) -> str:
    """`agreement_rows` and their `summary` as Markdown."""
    kind, parts = below["kind"], [table(rows, columns(below["kind"]))]
    if "form" in below:
        parts.append(f"The n-gram regression, chosen on validation: {below['form']}.")
    if people := below.get("ceiling"):
        parts.append("People: two halves of the raters ({raters:.0f} a text, {texts} texts) correlate "
                     "with {halves[0]:.3f} [{halves[1]:.3f}, {halves[2]:.3f}]; so no model is expected "
                     "above {ceiling[0]:.3f} [{ceiling[1]:.3f}, {ceiling[2]:.3f}].".format(**people))
    if bins := below["calibration"]:
        said = {"labels": "liked", "pairs": "preferred", "scores": "rated"}[kind]
        titles = {"predicted": "predicted", "observed": said, "n": "n"}
        parts.append("Calibration of the reward model:\n\n" + table(bins, titles))
    return "\n\n".join(parts)
