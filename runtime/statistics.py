"""Agreement of scores and labels, and intervals by bootstrap."""
import math
from collections.abc import Callable, Sequence

import numpy as np

from runtime.options import UserError


def _not_empty(*arrays: Sequence) -> list[np.ndarray]:
    arrays = [np.asarray(a) for a in arrays]
    if not len(arrays[0]) or len({len(a) for a in arrays}) > 1:
        raise UserError(f"nothing to measure: got {', '.join(str(len(a)) for a in arrays)} values; an evaluation set "
                        f"must not be empty, nor scores and labels differ in number")
    return arrays


def auc(scores: Sequence[float], labels: Sequence[int]) -> float:
    """Area under the ROC curve: the chance that a liked text scores above a disliked one, ties counting half.

    >>> auc([1, 2, 3, 2], [0, 0, 1, 1])
    0.875
    """
    scores, labels = _not_empty(scores, labels)
    _, rank, count = np.unique(scores, return_inverse=True, return_counts=True)
    middle = (count.cumsum() - (count - 1) / 2)[rank]  # ranks from 1, ties at their mean
    n = int(labels.sum())
    if n in (0, len(labels)):
        raise UserError("AUC needs liked and disliked texts; all labels are the same")
    return float((middle[labels == 1].sum() - n * (n + 1) / 2) / (n * (len(labels) - n)))


def accuracy(probs: Sequence[float], labels: Sequence[int]) -> float:
    """Share of texts on the right side of one half."""
    probs, labels = _not_empty(probs, labels)
    return float(((probs > 0.5) == labels).mean())


def calibration_error(probs: Sequence[float], labels: Sequence[int], bins: int = 10) -> float:
    """Expected calibration error (Naeini 2015): mean distance, over texts, of their bin's predicted and observed share.

    >>> round(calibration_error([.9, .9, .1, .1], [1, 0, 0, 0]), 6)
    0.25
    """
    probs, labels = _not_empty(probs, labels)
    which = np.minimum((probs * bins).astype(int), bins - 1)
    gaps = np.bincount(which, probs, bins) - np.bincount(which, labels, bins)
    return float(np.abs(gaps).sum() / len(probs))


def bootstrap(measure: Callable[..., float], *arrays: Sequence, n: int = 1000, seed: int = 0, level: float = 0.95,
              basic: bool = False) -> tuple[float, float, float]:
    """(value, low, high): the measure on all texts, and the middle `level` of it over n resamples of the texts.

    All arrays are resampled together, so a measure of two systems on the same texts is paired. A resample without a
    value (all labels the same) is left out. basic: the interval is reflected about the value, for measures that
    resampling pushes to one side, as it does a calibration error (upwards, and never below 0).
    """
    arrays = _not_empty(*arrays)
    rng, found = np.random.default_rng(seed), []
    for _ in range(n):
        index = rng.integers(len(arrays[0]), size=len(arrays[0]))
        try:
            found.append(measure(*(a[index] for a in arrays)))
        except UserError:
            continue
    low, high = np.quantile(found, [(1 - level) / 2, (1 + level) / 2]) if found else (math.nan, math.nan)
    value = float(measure(*arrays))
    if basic:
        low, high = max(0.0, 2 * value - high), 2 * value - low
    return value, float(low), float(high)


def interval(measure: Callable[..., float], *arrays: Sequence, **settings) -> str:
    """value [low, high], as tables show it."""
    return "{:.3f} [{:.3f}, {:.3f}]".format(*bootstrap(measure, *arrays, **settings))


def positive_share(probs: Sequence[float]) -> float:
    """Share of texts that a classifier calls liked."""
    return float((np.asarray(probs) > 0.5).mean())


def paired_auc_difference(scores: Sequence[Sequence[float]], baseline: Sequence[float], labels: Sequence[int],
                          **settings) -> tuple[float, float, float]:
    """(value, low, high) of mean AUC over several systems (seeds) minus the baseline's, paired over texts."""
    columns = np.stack([*scores, baseline], 1)
    return bootstrap(lambda s, y: float(np.mean([auc(c, y) for c in s.T[:-1]])) - auc(s.T[-1], y), columns, labels,
                     **settings)


def win_rate(a: Sequence[float], b: Sequence[float], **settings) -> tuple[float, float, float]:
    """(value, low, high): on what share of the prompts a's reply is scored above b's, ties counting half."""
    return bootstrap(lambda x, y: float((x > y).mean() + (x == y).mean() / 2), a, b, **settings)
