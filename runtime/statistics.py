"""Agreement of scores with people, comparison of systems, intervals by bootstrap, what replies look
like, running means."""
import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from runtime.options import UserError


def _as_arrays(*sequences: Sequence) -> list[np.ndarray]:
    """The sequences as arrays; UserError if they are empty or differ in length."""
    arrays = [np.asarray(sequence) for sequence in sequences]
    lengths = [len(array) for array in arrays]
    if min(lengths) == 0 or len(set(lengths)) > 1:
        raise UserError(f"nothing to measure: got {', '.join(map(str, lengths))} values; an "
                        "evaluation set must not be empty, nor scores and labels differ in number")
    return arrays


# ---- scores against what people said -------------------------------------------------------------

def ranks(x: Sequence[float]) -> np.ndarray:
    """(n,): the place of each number in ascending order, from 1; equal ones share their mean.

    >>> ranks([3, 1, 3]).tolist()
    [2.5, 1.0, 2.5]
    """
    _, rank, count = np.unique(x, return_inverse=True, return_counts=True)
    return (count.cumsum() - (count - 1) / 2)[rank]


def auc(scores: Sequence[float], labels: Sequence[int]) -> float:
    """Area under the ROC curve: the probability that a text with label 1 scores above one with
    label 0; ties count one half. UserError if all labels are the same.

    >>> auc([1, 2, 3, 2], [0, 0, 1, 1])
    0.875
    """
    scores, labels = _as_arrays(scores, labels)
    mean_rank = ranks(scores)
    n = int(labels.sum())
    if n in (0, len(labels)):
        raise UserError("AUC needs liked and disliked texts; all labels are the same")
    return float((mean_rank[labels == 1].sum() - n * (n + 1) / 2) / (n * (len(labels) - n)))


def accuracy(probs: Sequence[float], labels: Sequence[int]) -> float:
    """Share of texts whose probability is on their label's side of one half; those at one half
    count one half."""
    probs, labels = _as_arrays(probs, labels)
    return float(np.where(probs == 0.5, 0.5, (probs > 0.5) == labels).mean())


def share_above(a: Sequence[float], b: Sequence[float]) -> float:
    """How often a is above b; ties count one half.

    >>> share_above([1, 2, 3, 3], [0, 2, 4, 1])
    0.625
    """
    a, b = _as_arrays(a, b)
    return float((a > b).mean() + (a == b).mean() / 2)


def correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Pearson's; 0 where all of a, or all of b, are equal: then neither tells of the other."""
    a, b = _as_arrays(a, b)
    if min(np.ptp(a), np.ptp(b)) == 0:
        return 0.0
    return float(np.corrcoef(a / np.ptp(a), b / np.ptp(b))[0, 1])


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's: Pearson's correlation of the ranks."""
    return correlation(ranks(a), ranks(b))


def relative_error(predicted: Sequence[float], observed: Sequence[float]) -> float:
    """Root of the mean squared distance, over the spread of what was observed: 1 is what predicting
    the mean each time reaches. UserError if all that was observed is the same."""
    predicted, observed = _as_arrays(predicted, observed)
    return float(np.sqrt(np.mean((predicted - observed) ** 2)) / _spread(observed))


def _spread(x: np.ndarray) -> float:
    """Standard deviation; UserError if it is 0."""
    if np.ptp(x) == 0:
        raise UserError("all ratings are the same: nothing can be measured by them")
    return float(x.std())


def pair_accuracy(deltas: Sequence[float], outcomes: Sequence[float]) -> float:
    """Share of the decided pairs whose first reply scores higher; equal scores count one half.

    deltas: score of the first reply, which people preferred, less that of the second. outcomes: 1,
    or 0.5 for a tie, which has no right side. UserError if all pairs are ties.
    """
    deltas, outcomes = _as_arrays(deltas, outcomes)
    decided = deltas[outcomes != 0.5]
    return share_above(decided, np.zeros(len(decided)))


def confidence(deltas: Sequence[float], outcomes: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """(σ(|Δ|), whether the reply that scores higher is the preferred one) of decided pairs: their
    order in the record tells nothing then. Arguments as in `pair_accuracy`."""
    deltas, outcomes = _as_arrays(deltas, outcomes)
    deltas = deltas[outcomes != 0.5]
    return 1 / (1 + np.exp(-np.abs(deltas))), np.where(deltas == 0, 0.5, deltas > 0)


def calibration_curve(predicted: Sequence[float], observed: Sequence[float],
                      edges: Sequence[float] | None = None, bins: int = 10) -> list[dict[str, float]]:
    """n, mean prediction and mean observation of each bin that is not empty.

    edges: the inner borders of the bins; None: as many predictions in each of them.

    >>> calibration_curve([.2, .9, .4, .7], [0, 1, 1, 1], edges=[.5])
    [{'n': 2, 'predicted': 0.3, 'observed': 0.5}, {'n': 2, 'predicted': 0.8, 'observed': 1.0}]
    """
    predicted, observed = _as_arrays(predicted, observed)
    order = np.argsort(predicted, kind="stable")
    cuts = (np.searchsorted(predicted[order], edges) if edges is not None else
            [len(order) * i // bins for i in range(1, bins)])
    return [{"n": len(i), "predicted": round(float(predicted[i].mean()), 6),
             "observed": round(float(observed[i].mean()), 6)} for i in np.split(order, cuts) if len(i)]


def rating_calibration(predicted: Sequence[float], observed: Sequence[float]) -> float:
    """How far mean prediction and mean rating are apart in ten bins of equal size, averaged over
    texts, in spreads of the ratings."""
    curve = calibration_curve(predicted, observed)
    gaps = sum(b["n"] * abs(b["predicted"] - b["observed"]) for b in curve)
    return float(gaps / len(np.asarray(observed)) / _spread(np.asarray(observed)))


def rater_halves(raters: Sequence[Sequence[float]], draws: int = 20,
                 seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Two (texts, draws): the mean rating by a random half of a text's raters, and by the others.

    raters: each text's ratings, at least two.
    """
    rng, halves = np.random.default_rng(seed), []
    for ratings in raters:
        drawn = rng.permuted(np.tile(np.array(ratings, float), (draws, 1)), axis=1)
        n = len(ratings) // 2
        halves.append((drawn[:, :n].mean(1), drawn[:, n:].mean(1)))
    return tuple(np.stack(half) for half in zip(*halves, strict=True))


def mean_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """The mean, over columns, of the correlation of a (n, draws) with b (n, draws)."""
    return float(np.mean([correlation(x, y) for x, y in zip(a.T, b.T, strict=True)]))


def ceiling(halves: float) -> float:
    """The highest correlation that a model can be expected to reach with the mean of all raters,
    from the correlation of two halves of them: the root of the mean's reliability, 2r / (1 + r)
    (Spearman 1910, Brown 1910).

    >>> ceiling(0.6)
    0.8660254037844386
    """
    return math.sqrt(max(0.0, 2 * halves / (1 + max(0.0, halves))))


def calibration_error(probs: Sequence[float], labels: Sequence[int], bins: int = 10) -> float:
    """Expected calibration error (Naeini 2015): the difference between the mean probability and the
    share of label 1 in each bin, averaged over texts.

    >>> round(calibration_error([.9, .9, .1, .1], [1, 0, 0, 0]), 6)
    0.25
    """
    probs, labels = _as_arrays(probs, labels)
    bin_of = np.minimum((probs * bins).astype(int), bins - 1)
    gaps = np.bincount(bin_of, probs, bins) - np.bincount(bin_of, labels, bins)
    return float(np.abs(gaps).sum() / len(probs))


def positive_share(probs: Sequence[float]) -> float:
    """Share of texts that a classifier calls liked."""
    return float((np.asarray(probs) > 0.5).mean())


# ---- intervals -----------------------------------------------------------------------------------

FEW_GROUPS = 10


def bootstrap(measure: Callable[..., float], *arrays: Sequence, n: int = 1000, seed: int = 0,
              basic: bool = False, runs: bool = False,
              groups: Sequence | None = None) -> tuple[float, float, float]:
    """(value, low, high): the measure on all texts, and its 95 % interval over n resamples.

    All arrays are resampled together, so a difference between two systems on the same texts is
    paired. A resample on which the measure raises UserError (all labels the same) is skipped; if
    none is left, low and high are NaN.
    basic: reflect the interval about the value. This suits measures with a bias under resampling,
    such as a calibration error, which resampling raises and which is never below 0.
    runs: the first array is (texts, runs), and each resample draws as many of the runs, too.
    groups: what each text belongs to, such as its prompt; texts of a group are drawn together, for
    they are alike. Fewer than FEW_GROUPS of them are no sample of groups: the interval is then that
    over texts of these very groups.
    """
    arrays = _as_arrays(*arrays)
    grouped = groups is not None and FEW_GROUPS <= len(set(groups)) < len(groups)
    members = members_of(groups) if grouped else None
    rng, resampled = np.random.default_rng(seed), []
    for _ in range(n):
        index = rng.integers(len(members or arrays[0]), size=len(members or arrays[0]))
        if members:
            index = np.concatenate([members[i] for i in index])
        drawn = [a[index] for a in arrays]
        if runs and (n_runs := arrays[0].shape[1]) > 1:
            drawn[0] = drawn[0][:, rng.integers(n_runs, size=n_runs)]
        try:
            resampled.append(measure(*drawn))
        except UserError:
            continue
    low, high = np.quantile(resampled, [0.025, 0.975]) if resampled else (math.nan, math.nan)
    value = float(measure(*arrays))
    if basic:
        low, high = max(0.0, 2 * value - high), 2 * value - low
    return value, float(low), float(high)


def members_of(groups: Sequence) -> list[np.ndarray]:
    """The places of each group's members.

    >>> [m.tolist() for m in members_of(["a", "b", "a"])]
    [[0, 2], [1]]
    """
    _, number = np.unique(np.asarray(groups), return_inverse=True)
    order = np.argsort(number, kind="stable")
    return np.split(order, np.cumsum(np.bincount(number))[:-1])


def interval(measure: Callable[..., float], *arrays: Sequence, **settings: Any) -> str:
    """`bootstrap` as the tables show it: "value [low, high]"."""
    return "{:.3f} [{:.3f}, {:.3f}]".format(*bootstrap(measure, *arrays, **settings))


def paired_difference(measure: Callable[..., float], scores: Sequence[Sequence[float]],
                      baseline: Sequence[float], truth: Sequence[float],
                      **settings: Any) -> tuple[float, float, float]:
    """(value, low, high): the mean measure of several systems (seeds) minus the baseline's, all on
    the same texts. The interval is over seeds and texts. settings: those of `bootstrap`."""
    def difference(columns: np.ndarray, base: np.ndarray, truth: np.ndarray) -> float:
        return float(np.mean([measure(s, truth) for s in columns.T])) - measure(base, truth)

    return bootstrap(difference, np.stack(scores, 1), baseline, truth, runs=True, **settings)


def mean_interval(values: Sequence[float], per_prompt: int = 1,
                  **settings: Any) -> tuple[float, float, float]:
    """(value, low, high): the mean of values (n · per_prompt,), those of one prompt side by side.

    Prompts are resampled, not replies: several replies to one prompt are alike. settings: those of
    `bootstrap`.
    """
    means = np.asarray(values, float).reshape(-1, per_prompt).mean(1)
    return bootstrap(lambda x: float(x.mean()), means, **settings)


def meetings(a: Sequence, b: Sequence) -> tuple[np.ndarray, np.ndarray]:
    """a and b, each (n,) or (n, samples), so that of several replies to a prompt every one of a meets
    every one of b: (n, samples of a, 1) and (n, 1, samples of b)."""
    a, b = (x.reshape(len(x), -1) for x in _as_arrays(a, b))
    return a[:, :, None], b[:, None, :]


def win_rate(a: Sequence, b: Sequence, **settings: Any) -> tuple[float, float, float]:
    """(value, low, high): share of prompts on which a's reply scores above b's; ties count one
    half.

    a (n,) or (n, samples): of several replies to a prompt every one of a meets every one of b.
    settings: those of `bootstrap`.
    """
    a, b = meetings(a, b)
    return mean_interval(((a > b) + (a == b) / 2).mean((1, 2)), **settings)


def win_rate_of_alike(a: Sequence, b: Sequence, lengths: tuple[Sequence, Sequence],
                      share: float = 0.2) -> tuple[int, tuple[float, float, float] | None]:
    """(prompts with such a pair, `win_rate`; None without any), among the pairs of replies whose lengths
    differ by at most that share of the longer one. lengths: of a's and b's replies.

    >>> win_rate_of_alike([1, 1, 1], [0, 2, 0], ([10, 10, 30], [8, 12, 10]))[0]
    2
    """
    (a, b), (long, short) = meetings(a, b), meetings(*lengths)
    alike = np.abs(long - short) <= share * np.maximum(long, short)
    wins = np.ma.masked_array((a > b) + (a == b) / 2, ~alike).mean((1, 2)).compressed()
    return len(wins), mean_interval(wins) if len(wins) else None


# ---- what replies look like ----------------------------------------------------------------------

def distinct_n(rows: Sequence[Sequence[int]], n: int = 2, budget: int | None = None) -> float:
    """Distinct n-grams over all n-grams, of the first `budget` ones (Li 2016). More text repeats
    more, so two systems are compared over equal numbers: `cut_alike`.

    >>> distinct_n([[1, 2, 1, 2], [1, 2]], 2)
    0.5
    """
    grams = [tuple(row[i:i + n]) for row in rows for i in range(len(row) - n + 1)][:budget]
    return len(set(grams)) / max(1, len(grams))


def cut_alike(answers: Sequence[Sequence[list[int]]],
              others: Sequence[Sequence[list[int]]] = ()) -> list[list[list[int]]]:
    """The rows of every system, cut to the same number of bigrams.

    answers: one row per prompt of each system; each is cut to the length of the shortest answer to
    its prompt, so that all systems are read over the same prompts. others: texts that answer other
    prompts; they are cut to these lengths in turn. What is still too much is cut at the end.

    >>> cut_alike([[[1, 2, 3], [4, 5]], [[6, 7], [8, 9, 10, 11]]], [[[1, 2, 3, 4], [5, 6]]])
    [[[1, 2], [4, 5]], [[6, 7], [8, 9]], [[1, 2], [5, 6]]]
    """
    lengths = [min(map(len, rows)) for rows in zip(*answers, strict=True)]
    systems = [[row[:n] for row, n in zip(rows, itertools.cycle(lengths))]
               for rows in (*answers, *others)]
    budget = min(sum(max(0, len(row) - 1) for row in rows) for rows in systems)
    cut = []
    for rows in systems:
        before = np.cumsum([0, *(max(0, len(row) - 1) for row in rows)])
        cut.append([row[:budget - n + 1] for row, n in zip(rows, before.tolist(), strict=False) if n < budget])
    return cut


def distinct_interval(rows: Sequence[Sequence[int]], draws: int = 400,
                      seed: int = 0) -> tuple[float, float, float]:
    """(value, low, high): distinct-2 of the rows, one per prompt, and its 95 % interval.

    The spread is that over random halves of the rows: a half varies by twice the variance, of which
    the rows that all halves share take one half away. The bootstrap would draw rows twice, and
    count them as repetition. Without two rows low and high are NaN.
    """
    value, rng, shares = distinct_n(rows), np.random.default_rng(seed), []
    number: dict[tuple[int, int], int] = {}
    grams = [[number.setdefault(pair, len(number)) for pair in itertools.pairwise(row)]
             for row in rows]
    row_of = np.repeat(np.arange(len(rows)), [len(row) for row in grams])
    grams = np.array([gram for row in grams for gram in row], np.int64)
    for _ in range(draws if len(rows) > 1 else 0):
        half = rng.permutation(len(rows)) < len(rows) // 2
        drawn = np.bincount(grams[half[row_of]])
        shares.append((drawn > 0).sum() / max(1, drawn.sum()))
    low, high = (np.quantile(shares, [0.025, 0.975]) - np.mean(shares) if shares
                 else (math.nan, math.nan))
    return value, float(value + low), float(value + high)


def reply_statistics(rows: Sequence[Sequence[int]], ended: Sequence[bool],
                     short: int = 8) -> dict[str, float]:
    """Mean length in tokens, share with end token, share that occur more than once, share under 8
    tokens."""
    if not len(rows):
        raise UserError("nothing to measure: there are no replies")
    rows = [tuple(row) for row in rows]
    count = Counter(rows)
    return {"length": float(np.mean([len(row) for row in rows])), "end_rate": float(np.mean(ended)),
            "identical": float(np.mean([count[row] > 1 for row in rows])),
            "short": float(np.mean([len(row) < short for row in rows]))}


# ---- over a run ----------------------------------------------------------------------------------

class RunningMoments:
    """Count, mean and spread of all numbers so far, one batch at a time (Chan et al.'s parallel
    variance).

    Starts as one observation's worth of mean 0 and spread 1, so the first batch is never divided by
    0.
    """

    def __init__(self, count: float = 1.0, mean: float = 0.0, var: float = 1.0):
        self.count, self.mean, self.var = count, mean, var

    def update(self, x: Tensor) -> None:
        x = x.cpu().double()  # MPS has no float64
        n, mean, var = x.numel(), float(x.mean()), float(x.var(correction=0))
        total, delta = self.count + n, mean - self.mean
        self.var = (self.var * self.count + var * n + delta * delta * self.count * n / total) / total
        self.mean += delta * n / total
        self.count = total

    @property
    def std(self) -> float:
        return self.var ** 0.5

    def state(self) -> dict[str, float]:
        return {"count": self.count, "mean": self.mean, "var": self.var}


class Means:
    """Means by name, over optimizer steps, each weighted by its tokens."""

    def __init__(self):
        self.sums: dict[str, Tensor | float] = defaultdict(float)
        self.weights: dict[str, Tensor | float] = defaultdict(float)

    def add(self, name: str, mean: Tensor, weight: Tensor) -> None:
        self.sums[name] = self.sums[name] + torch.where(weight > 0, mean.detach() * weight, 0)
        self.weights[name] = self.weights[name] + weight

    def result(self) -> dict[str, float]:
        """Names without any weight are left out."""
        return {name: float(x) / float(self.weights[name]) for name,
                x in self.sums.items() if self.weights[name] > 0}


# ---- means over what is real ---------------------------------------------------------------------

def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean over True entries, float32; 0 if there is none. Values under False, NaN included, change
    nothing.

    >>> x, mask = torch.tensor([[1., 2, 0], [3, 4, 5]]), torch.tensor([[1, 1, 0], [1, 1, 1]]).bool()
    >>> round(float(masked_mean(x, mask)), 4)  # 15 / 5
    3.0
    """
    return torch.where(mask, x.float(), 0).sum() / mask.sum().clamp(min=1)


def masked_variance(x: Tensor, mask: Tensor) -> Tensor:
    """Variance over True entries, divided by their number."""
    return masked_mean((x.float() - masked_mean(x, mask)) ** 2, mask)


def whiten(x: Tensor, mask: Tensor) -> Tensor:
    """Mean 0 and spread 1 over the mask; 0 elsewhere. The variance is divided by n."""
    scale = torch.rsqrt(masked_variance(x, mask) + 1e-8)
    return torch.where(mask, (x.float() - masked_mean(x, mask)) * scale, 0)
