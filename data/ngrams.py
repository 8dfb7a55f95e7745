"""Regression on n-grams: what the reward model is compared with, and one of the judges.

Three losses on the same features, one for each kind of feedback: logistic for labels, squared for
ratings (ridge), Bradley–Terry for pairs. It shares no tokenizer and no pretraining with the policy,
and it has one minimum, so no seed is involved.
"""
import re
import zlib
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def unit_numbers(text: str, unit: str) -> np.ndarray:
    """(units,) uint64: the Unicode number of each of a text's characters; or a checksum of each of its
    words, whatever their case, and of each sign that is no space."""
    if unit == "characters":
        return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.uint64)
    words = re.findall(r"\w+|[^\w\s]", text.lower())
    return np.array([zlib.crc32(word.encode("utf-8", "surrogatepass")) for word in words], np.uint64)


Entries = tuple[Tensor, Tensor, Tensor]  # (row, feature number, value) of all that is not zero


class NgramRegression:
    """A score for each text, from hashed n-grams, by default of 1 to 3 characters.

    The feature of an n-gram is (1 + ln count) · idf, with each text scaled to length 1. The weights
    minimise the mean loss plus l2/2 · |w|². What a score means, and the loss, follow from `kind`:

    labels  log-odds of liked; cross-entropy.
    scores  the rating, standardised by mean and spread of those learned from; half the squared
            distance.
    pairs   P(a is preferred to b) = σ(score of a − score of b); cross-entropy. No bias: it cancels.

    unit: n-grams of characters or of words. naive_bayes (labels only): the idf is multiplied by
    |ln of the n-gram's share of liked texts' n-grams over its share of the others'| (Wang & Manning
    2012).
    """

    def __init__(self, n_features: int = 2**18, l2: float = 1e-5,
                 orders: Sequence[int] = (1, 2, 3), unit: str = "characters",
                 naive_bayes: bool = False, kind: str = "labels"):
        self.n_features, self.l2, self.orders = n_features, l2, tuple(orders)
        self.unit, self.naive_bayes, self.kind = unit, naive_bayes, kind
        self.idf, self.weight = torch.zeros(n_features), torch.zeros(n_features)
        self.bias = torch.zeros(1)
        self.mean, self.spread = 0.0, 1.0  # of the ratings learned from

    # ---- features --------------------------------------------------------------------------------

    def ngrams(self, text: str) -> Counter[int]:
        """Feature number -> count of the text's n-grams. The number is a hash of the code points
        (of words: of their checksums) and is the same on every machine; different n-grams may share
        one."""
        points = unit_numbers(text, self.unit)
        counts: Counter[int] = Counter()
        for n in self.orders:
            h = np.full(max(0, len(points) - n + 1), n, np.uint64)
            for k in range(n):
                h = h * np.uint64(0x9E3779B97F4A7C15) + points[k:k + len(h)]
                h = h * np.uint64(0xBF58476D1CE4E5B9)
                h ^= h >> np.uint64(29)
            counts.update((h % np.uint64(self.n_features)).tolist())
        return counts

    def features(self, texts: Sequence[str]) -> Entries:
        """(row, feature number, value) of all non-zero entries, with the idf as fitted."""
        return self._scaled(*self.log_counts(texts), len(texts))

    def log_counts(self, texts: Sequence[str]) -> Entries:
        """(row, feature number, 1 + ln count) of all non-zero entries."""
        counts = [self.ngrams(text) for text in texts]
        rows = np.repeat(np.arange(len(texts)), [len(c) for c in counts])
        numbers = np.fromiter((f for c in counts for f in c), np.int64, len(rows))
        values = np.fromiter((v for c in counts for v in c.values()), np.float32, len(rows))
        values = (1 + np.log(values)).astype(np.float32)
        return torch.from_numpy(rows), torch.from_numpy(numbers), torch.from_numpy(values)

    def _scaled(self, rows: Tensor, numbers: Tensor, values: Tensor, n: int) -> Entries:
        """The entries of n texts times idf, each text scaled to length 1."""
        values = values * self.idf[numbers]
        length = torch.zeros(n).index_add_(0, rows, values * values).sqrt().clamp(min=1e-12)
        return rows, numbers, values / length[rows]

    # ---- training and prediction -----------------------------------------------------------------

    def fit(self, texts: Sequence[str], target: Sequence[float]) -> "NgramRegression":
        """Learn by L-BFGS; returns self.

        target: of each text its label (1 liked, 0 not) or rating. Of pairs `texts` are all the
        first replies and then all the second ones, and the target of each pair is 1 if the first is
        preferred, 0.5 if both are equally good.
        """
        return self.fit_counts(self.log_counts(texts), target)

    def fit_counts(self, counts: Entries, target: Sequence[float],
                   tolerance: float = 1e-7) -> "NgramRegression":
        """`fit` on the texts' `log_counts`, which depend on unit and orders alone, until the
        gradient's largest number is below the tolerance."""
        target = torch.tensor(target, dtype=torch.float64)
        if self.kind == "scores":
            self.mean, self.spread = float(target.mean()), float(target.std(correction=0)) or 1.0
            target = (target - self.mean) / self.spread
        n = len(target) * (2 if self.kind == "pairs" else 1)  # texts
        rows, numbers, values = counts
        occurrences = torch.bincount(numbers, minlength=self.n_features)
        self.idf = torch.log((1 + n) / (1 + occurrences)) + 1
        if self.naive_bayes:
            self.idf *= self._log_ratio(numbers, target[rows])
        _, _, values = self._scaled(rows, numbers, values, n)
        used, numbers = numbers.unique(return_inverse=True)  # train only what occurs
        rows, numbers, values = rows.numpy(), numbers.numpy(), values.double().numpy()
        w = torch.zeros(len(used) + 1, dtype=torch.float64)  # the bias last
        optimizer = torch.optim.LBFGS([w], max_iter=100, history_size=10,
                                      tolerance_grad=tolerance, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            """The loss; its gradient, in closed form, into w.grad: Σ slope · x + l2 · w."""
            weight, bias = w[:-1], w[-1:]
            sums = np.bincount(rows, weight.numpy()[numbers] * values, n)
            loss, slope = self._loss(torch.from_numpy(sums) + bias, target)
            sums = np.bincount(numbers, slope.numpy()[rows] * values, len(used))
            w.grad = torch.cat((torch.from_numpy(sums) + self.l2 * weight, slope.sum()[None]))
            return loss + self.l2 / 2 * (weight * weight).sum()

        # On one thread: several would add numbers in varying order, with varying last digits.
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            optimizer.step(closure)
        finally:
            torch.set_num_threads(threads)
        self.weight = torch.zeros(self.n_features)
        self.weight[used] = w[:-1].float()
        self.bias = w[-1:].float()
        return self

    def _loss(self, scores: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """(mean loss, its derivative by the score of each text); both float64."""
        if self.kind == "scores":
            error = scores - target
            return (error * error).mean() / 2, error / len(target)
        if self.kind == "pairs":
            first, second = scores.chunk(2)
            scores = first - second
        error = (torch.sigmoid(scores) - target) / len(target)
        loss = F.binary_cross_entropy_with_logits(scores, target)
        return loss, torch.cat((error, -error)) if self.kind == "pairs" else error

    def _log_ratio(self, numbers: Tensor, labels: Tensor) -> Tensor:
        """(n_features,): |ln of a feature's share in liked texts over its share in the others|,
        each counted once more. numbers, labels (entries,): those of all entries."""
        liked, other = (torch.bincount(numbers, weight, self.n_features) + 1
                        for weight in (labels, 1 - labels))
        return torch.log(liked / liked.sum() * other.sum() / other).abs().float()

    def scores(self, texts: Sequence[str]) -> np.ndarray:
        """(n,) float32: the score of each text."""
        return self.scores_of(self.log_counts(texts), len(texts))

    def scores_of(self, counts: Entries, n: int) -> np.ndarray:
        """`scores` of n texts by their `log_counts`."""
        rows, numbers, values = self._scaled(*counts, n)
        sums = torch.zeros(n).index_add(0, rows, self.weight[numbers] * values)
        return (sums + self.bias).numpy()

    def probs(self, texts: Sequence[str]) -> np.ndarray:
        """(n,): σ(score); of labels P(liked)."""
        return 1 / (1 + np.exp(-self.scores(texts)))

    # ---- files -----------------------------------------------------------------------------------

    def settings(self) -> tuple:
        """The constructor's arguments."""
        return self.n_features, self.l2, self.orders, self.unit, self.naive_bayes, self.kind

    def __str__(self) -> str:
        """Such as "1 to 2 characters, naive-Bayes weights, l2 3e-05"."""
        weights = "naive-Bayes" if self.naive_bayes else "idf"
        return f"{min(self.orders)} to {max(self.orders)} {self.unit}, {weights} weights, l2 {self.l2:g}"

    def state_dict(self) -> dict[str, Any]:
        """Settings and weights, for torch.save; `from_state` reads it."""
        return {"settings": list(self.settings()), "idf": self.idf, "weight": self.weight,
                "bias": self.bias, "mean": self.mean, "spread": self.spread}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> "NgramRegression":
        """A fitted regression from its `state_dict`."""
        regression = cls(*state["settings"])
        for name in ("idf", "weight", "bias", "mean", "spread"):
            setattr(regression, name, state[name])
        return regression
