"""People's feedback before a model learns it, and what to think of a model's agreement with it.

Which kind it is; whether it tells anything apart; its parts, ties and ratings as numbers that the
losses in reward.py need; which pairs are doubtful; which agreement chance alone would reach.
"""
import math
from collections.abc import Mapping, Sequence

import numpy as np

from data.dataset import feedback_of, require_one_feedback
from runtime.options import UserError


# ---- kinds and parts -----------------------------------------------------------------------------

def feedback_kind(record: dict) -> str:
    """Which of the three losses a record is for."""
    return "pairwise" if "chosen" in record else "regression" if "score" in record else "label"


def parts_of(records: Sequence[dict]) -> tuple[str, ...]:
    """The parts of the reward that records name, sorted; UserError if only some name one."""
    parts = {record.get("part", "") for record in records}
    if "" in parts and len(parts) > 1:
        raise UserError(f'reward: some records name a "part" of the reward ({max(parts)!r}), others '
                        "none: let all name one, or none")
    return tuple(sorted(parts - {""}))


def require_varied(split: str, records: Sequence[dict]) -> None:
    """UserError if the labels or scores of a split's records are all the same, or all pairs ties."""
    kind = feedback_kind(records[0])
    name = {"pairwise": "tie", "regression": "score", "label": "label"}[kind]
    if len({r.get(name) for r in records}) == 1 and name in records[0]:
        where, verb, file = {"train": ("to learn from", "learned", "reward.jsonl"),
                             "val": ("set aside for validation", "measured", "reward_val.jsonl"),
                             "test": ("set aside for test", "measured", "reward_test.jsonl")}[split]
        same = (f"pairs {where} are ties" if name == "tie" else
                f"{name}s {where} are the same ({records[0][name]})")
        raise UserError(f"reward: all {same}, so that nothing can be {verb}: bring more records, or a "
                        f"file {file} in which they differ")


def require_telling(feedback: Mapping[str, Sequence[dict]]) -> None:
    """UserError if the splits' feedback is of several kinds, or tells nothing apart where it is needed:
    pairs and scores are not measured on test."""
    require_one_feedback({f"reward_{split}.jsonl": of_split for split, of_split in feedback.items()})
    for split, of_split in feedback.items():
        if split != "test" or feedback_of(of_split[0]) == "labels":
            require_varied(split, of_split)


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
