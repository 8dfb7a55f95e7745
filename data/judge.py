"""A text classifier that is independent of the language models: logistic regression on n-grams.

Fitted on the reward model's half of the labels, it is the baseline that a reward model has to beat.
Fitted on the other half, it is the judge of policies: PPO is measured by labels that it was never
trained against. It shares no tokenizer and no pretraining with the policy.
"""
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data.batches import reward_rows
from data.prepared import Prepared
from data.records import prompt_text
from data.tokenizer import Tokenizer
from runtime.machine import save_whole


class NgramClassifier:
    """Logistic regression on hashed character n-grams, by default of 1 to 3 characters.

    The feature of an n-gram is (1 + ln count) · idf, with each text scaled to length 1. The weights
    minimise mean cross-entropy plus l2/2 · |w|². That has one minimum, so no seed is involved.
    """

    def __init__(self, n_features: int = 2**18, l2: float = 1e-5,
                 orders: Sequence[int] = (1, 2, 3)):
        self.n_features, self.l2, self.orders = n_features, l2, tuple(orders)
        self.idf, self.weight = torch.zeros(n_features), torch.zeros(n_features)
        self.bias = torch.zeros(1)

    # ---- features --------------------------------------------------------------------------------

    def ngrams(self, text: str) -> Counter[int]:
        """Feature number -> count of the text's n-grams. The number is a hash of the code points
        and is the same on every machine; different n-grams may share one."""
        points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
        points = points.astype(np.uint64)
        counts: Counter[int] = Counter()
        for n in self.orders:
            h = np.full(max(0, len(points) - n + 1), n, np.uint64)
            for k in range(n):
                h = h * np.uint64(0x9E3779B97F4A7C15) + points[k:k + len(h)]
                h = h * np.uint64(0xBF58476D1CE4E5B9)
                h ^= h >> np.uint64(29)
            counts.update((h % np.uint64(self.n_features)).tolist())
        return counts

    def features(self, texts: Sequence[str]) -> tuple[Tensor, Tensor, Tensor]:
        """(row, feature number, value) of all non-zero entries, with the idf as fitted."""
        return self._scaled(*self._log_counts(texts), len(texts))

    def _log_counts(self, texts: Sequence[str]) -> tuple[Tensor, Tensor, Tensor]:
        """(row, feature number, 1 + ln count) of all non-zero entries."""
        counts = [self.ngrams(text) for text in texts]
        rows = np.repeat(np.arange(len(texts)), [len(c) for c in counts])
        numbers = np.fromiter((f for c in counts for f in c), np.int64, len(rows))
        values = np.fromiter((v for c in counts for v in c.values()), np.float32, len(rows))
        values = (1 + np.log(values)).astype(np.float32)
        return torch.from_numpy(rows), torch.from_numpy(numbers), torch.from_numpy(values)

    def _scaled(self, rows: Tensor, numbers: Tensor, values: Tensor,
                n: int) -> tuple[Tensor, Tensor, Tensor]:
        """The entries of n texts times idf, each text scaled to length 1."""
        values = values * self.idf[numbers]
        length = torch.zeros(n).index_add_(0, rows, values * values).sqrt().clamp(min=1e-12)
        return rows, numbers, values / length[rows]

    # ---- training and prediction -----------------------------------------------------------------

    def fit(self, texts: Sequence[str], labels: Sequence[int]) -> "NgramClassifier":
        """Learn from texts and their labels (1 liked, 0 not) by L-BFGS; returns self."""
        rows, numbers, values = self._log_counts(texts)
        occurrences = torch.bincount(numbers, minlength=self.n_features)
        self.idf = torch.log((1 + len(texts)) / (1 + occurrences)) + 1
        _, _, values = self._scaled(rows, numbers, values, len(texts))
        target = torch.tensor(labels, dtype=torch.float32)
        used, numbers = numbers.unique(return_inverse=True)  # train only what occurs
        w, b = torch.zeros(len(used), requires_grad=True), torch.zeros(1, requires_grad=True)
        optimizer = torch.optim.LBFGS([w, b], max_iter=100, history_size=10,
                                      line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimizer.zero_grad()
            logits = torch.zeros(len(texts)).index_add(0, rows, w[numbers] * values) + b
            loss = F.binary_cross_entropy_with_logits(logits, target)
            loss = loss + self.l2 / 2 * (w * w).sum()
            loss.backward()
            return loss

        # On one thread: several would add gradients in varying order, with varying last digits.
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            optimizer.step(closure)
        finally:
            torch.set_num_threads(threads)
        self.weight = torch.zeros(self.n_features)
        self.weight[used] = w.detach()
        self.bias = b.detach()
        return self

    def logits(self, texts: Sequence[str]) -> np.ndarray:
        """(n,) float32: log-odds of liked."""
        rows, numbers, values = self.features(texts)
        sums = torch.zeros(len(texts)).index_add(0, rows, self.weight[numbers] * values)
        return (sums + self.bias).numpy()

    def probs(self, texts: Sequence[str]) -> np.ndarray:
        """(n,): P(liked)."""
        return 1 / (1 + np.exp(-self.logits(texts)))

    # ---- files -----------------------------------------------------------------------------------

    def settings(self) -> tuple:
        """The constructor's arguments."""
        return self.n_features, self.l2, self.orders

    def state_dict(self) -> dict[str, Any]:
        """Settings and weights, for torch.save; `from_state` reads it."""
        return {"l2": self.l2, "orders": list(self.orders), "idf": self.idf,
                "weight": self.weight, "bias": self.bias}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> "NgramClassifier":
        """A fitted classifier from its `state_dict`."""
        classifier = cls(len(state["weight"]), state["l2"], state["orders"])
        classifier.idf, classifier.weight = state["idf"], state["weight"]
        classifier.bias = state["bias"]
        return classifier


# ---- judges: P(liked) of texts, by what no policy is trained against -----------------------------

class NgramJudge:
    """The n-gram classifier of the judge's half of the labels. It reads characters."""

    def __init__(self, classifier: NgramClassifier):
        self.classifier = classifier

    def probs(self, prompts: Sequence, texts: Sequence[str]) -> np.ndarray:
        """(n,): P(liked) of each prompt with its reply."""
        return self.classifier.probs([plain_text({"prompt": prompt, "response": text})
                                      for prompt, text in zip(prompts, texts, strict=True)])


class ModelJudge:
    """A transformer that learned the judge's half (`train.py judge`). It reads tokens, in order."""

    def __init__(self, model: Any, tokenizer: Tokenizer, template: str, max_len: int):
        """model: whatever has score_rows, such as a RewardModel. max_len: the longest row it was
        trained on."""
        self.model, self.max_len = model, max_len
        self.tokenizer, self.template = tokenizer, template

    def probs(self, prompts: Sequence, texts: Sequence[str]) -> np.ndarray:
        """(n,): P(liked) of each prompt with its reply, read as a finished text."""
        records = [{"prompt": prompt, "response": text}
                   for prompt, text in zip(prompts, texts, strict=True)]
        rows = reward_rows(records, self.tokenizer, self.template, self.max_len)
        return torch.sigmoid(self.model.score_rows(rows)).cpu().numpy()


# ---- the classifiers of a data set ---------------------------------------------------------------

def plain_text(record: dict) -> str:
    """Prompt and response as one text, which is what the classifier reads; messages are joined."""
    return prompt_text(record["prompt"]) + record["response"]


def ngram_classifier(data: Prepared, half: str) -> NgramClassifier:
    """The classifier of one half of the labels, fitted once and kept in the data set's folder.

    half: "reward" for the reward model's baseline, "judge" for the judge.
    """
    path, classifier = data.folder / f"ngrams_{half}.pt", NgramClassifier()
    if path.exists():
        stored = NgramClassifier.from_state(torch.load(path, weights_only=True))
        if stored.settings() == classifier.settings():
            return stored
    records = data.records(half, "train")
    classifier.fit([plain_text(r) for r in records], [r["label"] for r in records])
    save_whole(path, classifier.state_dict())
    return classifier
