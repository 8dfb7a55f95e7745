"""People's feedback before a model learns it, and what to think of a model's agreement with it.

Which kind it is, and which is the main one where there are several; whether it tells anything apart;
its parts, ties and ratings as numbers that the losses in reward.py need; which pairs are doubtful; how far
a model agrees with it while it trains, and which agreement chance alone would reach.
"""
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from data.dataset import SPLITS, feedback_of, require_one_feedback
from data.prepared import Prepared
from data.splits import split_key
from runtime.options import UserError
from runtime.statistics import accuracy, auc, correlation, share_above

# Files of feedback beside the main kind, and what each must hold. The reward model learns it, too; it
# is in no other stage, and nothing is measured on it.
BESIDE = {"reward_pairs": "pairs", "reward_scores": "scores", "reward_labels": "labels"}
MAIN = ("reward", "train")


# ---- kinds and parts -----------------------------------------------------------------------------

def feedback_kind(record: dict) -> str:
    """Which of the three losses a record is for."""
    return "pairwise" if "chosen" in record else "regression" if "score" in record else "label"


def by_kind(records: Sequence[dict]) -> dict[str, list[int]]:
    """The places of the records of each kind, kinds in the order in which they come.

    >>> by_kind([{"chosen": "a"}, {"label": 1}, {"chosen": "b"}])
    {'pairwise': [0, 2], 'label': [1]}
    """
    found: dict[str, list[int]] = {}
    for i, record in enumerate(records):
        found.setdefault(feedback_kind(record), []).append(i)
    return found


def parts_of(records: Sequence[dict]) -> tuple[str, ...]:
    """The parts of the reward that records name, sorted; UserError if only some name one."""
    parts = {record.get("part", "") for record in records}
    if "" in parts and len(parts) > 1:
        raise UserError(f'reward: some records name a "part" of the reward ({max(parts)!r}), others '
                        "none: let all name one, or none")
    return tuple(sorted(parts - {""}))


def require_varied(split: str, records: Sequence[dict], name: str = "reward") -> None:
    """UserError if the labels or scores of a split's records are all the same, or all pairs ties. name:
    that of the file to train on, without its ending."""
    kind = feedback_kind(records[0])
    field = {"pairwise": "tie", "regression": "score", "label": "label"}[kind]
    if len({r.get(field) for r in records}) == 1 and field in records[0]:
        where, verb, file = {"train": ("to learn from", "learned", f"{name}.jsonl"),
                             "val": ("set aside for validation", "measured", "reward_val.jsonl"),
                             "test": ("set aside for test", "measured", "reward_test.jsonl")}[split]
        same = (f"pairs {where} are ties" if field == "tie" else
                f"{field}s {where} are the same ({records[0][field]})")
        raise UserError(f"reward: all {same}, so that nothing can be {verb}: bring more records, or a "
                        f"file {file} in which they differ")


def require_records(data: Prepared, stages: Sequence[str]) -> None:
    """Fail before hours of work: UserError if a stage has no data, or the reward model's feedback is of
    several kinds or tells nothing apart."""
    for stage in stages:
        if stage == "pretrain":
            data.require_tokenizer()
        else:
            data.records(stage, "train")
    if "reward" in stages:
        require_telling({split: data.records("reward", split) for split in SPLITS})


def require_telling(feedback: Mapping[str, Sequence[dict]]) -> None:
    """UserError if the splits' feedback is of several kinds, or tells nothing apart where it is needed:
    pairs and scores are not measured on test."""
    require_one_feedback({f"reward_{split}.jsonl": of_split for split, of_split in feedback.items()})
    for split, of_split in feedback.items():
        if split != "test" or feedback_of(of_split[0]) == "labels":
            require_varied(split, of_split)


# ---- several kinds in a folder -------------------------------------------------------------------

def with_main_kind(files: Mapping[tuple[str, str], Any],
                   records: Mapping[tuple[str, str], Any]) -> tuple[dict, dict]:
    """(files, their records), by (stage, split), with a main kind of feedback: that of reward.jsonl, and
    without it the file of BESIDE with the most records takes its place. UserError for a file whose name
    says another kind than it holds, or whose kind is the main one."""
    beside = [place for place in records if place[0] in BESIDE]
    for place in beside:
        if (kind := feedback_of(records[place][0])) != (said := BESIDE[place[0]]):
            raise UserError(f"{files[place]}: its name says {said}, but it holds {kind}: name it reward_{kind}")
    if beside and MAIN not in records:
        most = max(beside, key=lambda place: len(records[place]))
        beside.remove(most)
        files, records = ({MAIN if place == most else place: x for place, x in of.items()}
                          for of in (files, records))
    for place in beside:
        if BESIDE[place[0]] == (kind := feedback_of(records[MAIN][0])):
            raise UserError(f"{files[MAIN]} has {kind}, and so has {files[place]}: join the two in one file")
    return dict(files), dict(records)


def settle_beside(records: dict[tuple[str, str], Any]) -> str:
    """Leave out of the kinds beside the main one what begins as a record of the judges does. Returns a
    line that says what is learned beside what, "" for one kind. UserError if nothing is left of a kind,
    if it tells nothing apart, or if only some records name a part."""
    judged = {split_key(record, "reward") for record in records.get(("judge", "train"), [])}
    said = []
    for name, kind in BESIDE.items():
        if not (own := records.get((name, "train"))):
            continue
        kept = [record for record in own if split_key(record, "reward") not in judged]
        if not kept:
            raise UserError(f"{name}.jsonl: nothing is left to train on: its prompts are those of the judges; "
                            "bring others, or keep none for judges (--judge_share 0)")
        require_varied("train", kept, name)
        records[name, "train"] = kept
        left = f" ({len(own) - len(kept):,} left out, whose prompts are the judges')" * (len(kept) < len(own))
        said.append(f"{len(kept):,} {kind}{left}")
    if not said:
        return ""
    main = records[MAIN]
    parts_of([*main, *(record for name in BESIDE for record in records.get((name, "train"), []))])
    return (f"feedback: the reward model learns {len(main):,} {feedback_of(main[0])} and {' and '.join(said)}; "
            f"validation, test, judges and PPO go by the {feedback_of(main[0])} alone")


def feedback_beside(data: Prepared, stage: str) -> list[dict]:
    """The training records of the other kinds that a stage learns beside its own, which reward has."""
    return [record for name in BESIDE if stage == "reward" and data.has(name)
            for record in data.records(name, "train")]


# ---- numbers -------------------------------------------------------------------------------------

def tie_odds_of(pairs: Sequence[dict]) -> float:
    """Davidson's ν: replies of equal score tie as often, t, as these pairs do: t = ν / (2 + ν). 0
    without ties, where Davidson's model is Bradley and Terry's."""
    t = sum(bool(pair.get("tie")) for pair in pairs) / len(pairs)
    return 2 * t / (1 - t)


def rating_scale(records: Sequence[dict]) -> dict[str, float]:
    """Mean and spread of the ratings, which are not all the same."""
    ratings = np.array([r["score"] for r in records], float)
    size = float(np.ptp(ratings))  # divided out first: squares of 1e-200 are 0
    return {"mean": float((ratings / size).mean()) * size, "spread": float((ratings / size).std()) * size}


def standardised(records: Sequence[dict], scale: Mapping[str, float]) -> list[dict]:
    """The records with ratings on the scale on which those of `rating_scale` have mean 0 and spread 1:
    what the heads and their learning rate are made for."""
    return [r | {"score": (r["score"] - scale["mean"]) / scale["spread"]} for r in records]


# ---- doubtful pairs ------------------------------------------------------------------------------

def denoised(pairs: Sequence[dict], strength: np.ndarray, flip_share: float = 0.0,
             smooth_share: float = 1.0, adaptive_margin: bool = False) -> list[dict]:
    """The pairs with what their strength (n,) says of them; ties stay as they are.

    flip_share: of the decided pairs, the weakest are turned round. smooth_share: the weakest of the
    pairs as they then stand keep their label smoothing, the others get "smoothing" 0.
    adaptive_margin: each pair's "margin" is its strength, so that sure pairs are asked for more
    distance, and doubtful ones for less than none.

    >>> pairs = [{"chosen": "a", "rejected": "b"}, {"chosen": "c", "rejected": "d"}]
    >>> denoised(pairs, np.array([1.5, -2.0]), flip_share=0.5, adaptive_margin=True)
    [{'chosen': 'a', 'rejected': 'b', 'margin': 1.5}, {'chosen': 'd', 'rejected': 'c', 'margin': 2.0}]
    """
    pairs, strength = [dict(pair) for pair in pairs], np.array(strength, float)
    decided = np.array([i for i, pair in enumerate(pairs) if not pair.get("tie")])

    def weakest_first() -> np.ndarray:
        return decided[strength[decided].argsort(kind="stable")]

    for i in weakest_first()[:round(flip_share * len(decided))]:
        pairs[i] |= {"chosen": pairs[i]["rejected"], "rejected": pairs[i]["chosen"]}
        strength[i] *= -1
    for i in weakest_first()[round(smooth_share * len(decided)):]:
        pairs[i]["smoothing"] = 0.0
    for i in decided if adaptive_margin else ():
        pairs[i]["margin"] = float(strength[i])
    return pairs


# ---- agreement while training --------------------------------------------------------------------

def quick_agreement(kind: str, records: Sequence[dict], scores: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Accuracy on decided pairs; correlation with ratings; AUC and accuracy on labels. A measure that these
    records do not have is left out. kind: that of the loss. scores: of each reply, by its field."""
    if kind == "pairwise":
        decided = np.array([not r.get("tie") for r in records], bool)
        delta = (scores["chosen"] - scores["rejected"])[decided]
        return {"val_accuracy": share_above(delta, 0 * delta)} if decided.any() else {}
    if not records:
        return {}
    raw = scores["response"]
    if kind == "regression":
        return {"val_correlation": correlation(raw, [r["score"] for r in records])}
    labels = np.array([r["label"] for r in records])
    right = {"val_accuracy": accuracy(1 / (1 + np.exp(-raw)), labels)}
    return right if labels.min() == labels.max() else {"val_auc": auc(raw, labels), **right}


# ---- chance --------------------------------------------------------------------------------------

def chance_warnings(kind: str, records: Sequence[dict], measured: dict[str, float]) -> list[str]:
    """A warning if the agreement is what a model that learned nothing reaches once in twenty
    runs: 1.645 standard errors above chance."""
    n = max(1, sum(not record.get("tie") for record in records))
    name, chance, error = {"pairwise": ("val_accuracy", 0.5, 0.5 / math.sqrt(n)),
                           "regression": ("val_correlation", 0.0, 1 / math.sqrt(max(1, n - 1))),
                           "label": ("val_auc", 0.5, 0.0)}[kind]
    if kind == "label":  # Mann and Whitney 1947
        liked = sum(r["label"] for r in records)
        error = math.sqrt((n + 1) / (12 * max(1, liked * (n - liked))))
    value, limit = measured.get(name, chance), min(1.0, chance + 1.645 * error)
    if value > limit:
        return []
    return [f"{name} {value:.3f} over {n} records is no better than chance ({chance:g}, by "
            f"luck up to {limit:.3f}): who trusts it follows noise; bring more feedback, for "
            "validation, too, train longer (--epochs), or look for mistakes in the feedback"]
