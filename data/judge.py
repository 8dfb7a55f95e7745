"""A plain text classifier, to be measured against and to judge: logistic regression on hashed character n-grams.

Fitted on the reward model's half of the labels it is the baseline that a reward model has to beat; on the other half it
is the judge, which PPO never trains against. It shares nothing with the policy: no tokenizer, no pretraining.
"""
import pathlib
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data.prepared import Prepared
from data.records import prompt_text
from runtime.machine import save_whole


class NgramClassifier:
    """Logistic regression on hashed character 1- to 3-grams: no tokenizer, no pretraining, nothing of the policy's.

    Feature of an n-gram: (1 + ln count) · idf, rows scaled to length 1; the weights minimise mean cross-entropy plus
    l2/2 · |w|², which has one minimum, so the result does not depend on a seed.
    """

    def __init__(self, n_features: int = 2**18, l2: float = 1e-5, orders: Sequence[int] = (1, 2, 3)):
        self.n_features, self.l2, self.orders = n_features, l2, tuple(orders)
        self.idf, self.weight, self.bias = torch.zeros(n_features), torch.zeros(n_features), torch.zeros(1)

    def _hashes(self, text: str) -> Counter:
        """Feature numbers of a text's n-grams, with counts: a polynomial in the code points, the same everywhere."""
        points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.uint64)
        found: Counter = Counter()
        for n in self.orders:
            h = np.full(max(0, len(points) - n + 1), n, np.uint64)
            for k in range(n):
                h = (h * np.uint64(0x9E3779B97F4A7C15) + points[k:k + len(h)]) * np.uint64(0xBF58476D1CE4E5B9)
                h ^= h >> np.uint64(29)
            found.update((h % np.uint64(self.n_features)).tolist())
        return found

    def _features(self, texts: Sequence[str]) -> tuple[Tensor, Tensor, Tensor]:
        """(row, feature, 1 + ln count) of all non-zero entries."""
        counts = [self._hashes(t) for t in texts]
        rows = np.repeat(np.arange(len(texts)), [len(c) for c in counts])
        features = np.fromiter((f for c in counts for f in c), np.int64, len(rows))
        values = 1 + np.log(np.fromiter((v for c in counts for v in c.values()), np.float32, len(rows)))
        return torch.from_numpy(rows), torch.from_numpy(features), torch.from_numpy(values.astype(np.float32))

    def _scaled(self, rows: Tensor, features: Tensor, values: Tensor, n: int) -> Tensor:
        values = values * self.idf[features]
        length = torch.zeros(n).index_add_(0, rows, values * values).sqrt().clamp(min=1e-12)
        return values / length[rows]

    def fit(self, texts: Sequence[str], labels: Sequence[int]) -> "NgramClassifier":
        """Learn from (n) texts and their labels (1 liked, 0 not) by L-BFGS."""
        rows, features, values = self._features(texts)
        documents = torch.bincount(features, minlength=self.n_features)
        self.idf = torch.log((1 + len(texts)) / (1 + documents)) + 1
        values, target = self._scaled(rows, features, values, len(texts)), torch.tensor(labels, dtype=torch.float32)
        used, features = features.unique(return_inverse=True)
        w, b = torch.zeros(len(used), requires_grad=True), torch.zeros(1, requires_grad=True)
        optimizer = torch.optim.LBFGS([w, b], max_iter=100, history_size=10, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimizer.zero_grad()
            logits = torch.zeros(len(texts)).index_add(0, rows, w[features] * values) + b
            loss = F.binary_cross_entropy_with_logits(logits, target) + self.l2 / 2 * (w * w).sum()
            loss.backward()
            return loss

        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # several add up gradients in any order, and the last digits would differ every time
        try:
            optimizer.step(closure)
        finally:
            torch.set_num_threads(threads)
        self.weight = torch.zeros(self.n_features)
        self.weight[used] = w.detach()
        self.bias = b.detach()
        return self

    def logits(self, texts: Sequence[str]) -> np.ndarray:
        """(n,): above 0 is liked."""
        rows, features, values = self._features(texts)
        values = self._scaled(rows, features, values, len(texts))
        return (torch.zeros(len(texts)).index_add(0, rows, self.weight[features] * values) + self.bias).numpy()

    def probs(self, texts: Sequence[str]) -> np.ndarray:
        """(n,): P(liked)."""
        return 1 / (1 + np.exp(-self.logits(texts)))

    def settings(self) -> tuple:
        return self.n_features, self.l2, self.orders

    def state_dict(self) -> dict[str, Any]:
        return {"l2": self.l2, "orders": list(self.orders), "idf": self.idf, "weight": self.weight, "bias": self.bias}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> "NgramClassifier":
        classifier = cls(len(state["weight"]), state["l2"], state["orders"])
        classifier.idf, classifier.weight, classifier.bias = state["idf"], state["weight"], state["bias"]
        return classifier


# ---- baseline and judge ----------------------------------------------------------------------------------------------

def plain_text(record: dict) -> str:
    """Opening and reply as one text: what n-gram classifiers read. A list of messages is joined."""
    return prompt_text(record["prompt"]) + record["response"]


def ngram_classifier(data: Prepared, half: str) -> NgramClassifier:
    """The n-gram classifier of one half of the people's labels, fitted once and kept beside the data.

    `reward` is the reward model's baseline; `judge` learns from the other half, so that PPO is measured by labels it
    was never trained against.
    """
    path, classifier = pathlib.Path(data.folder) / f"ngrams_{half}.pt", NgramClassifier()
    if path.exists():
        kept = NgramClassifier.from_state(torch.load(path, weights_only=True))
        if kept.settings() == classifier.settings():
            return kept
    records = data.records(half, "train")
    classifier.fit([plain_text(r) for r in records], [r["label"] for r in records])
    save_whole(path, classifier.state_dict())
    return classifier
