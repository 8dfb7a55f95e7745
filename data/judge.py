"""Classifiers of texts beside the reward model: its baseline, and the judges of policies.

Logistic regression on n-grams shares no tokenizer and no pretraining with the policy. Fitted on the
reward model's half of the labels, its form chosen on validation, it is the baseline that a reward
model has to beat. Fitted on the other half, in one fixed form, it is a judge: PPO is measured by
labels that it was never trained against. The second judge is a transformer that learned the same
half; both are asked alike, by probs(prompts, texts).
"""
import functools
import pathlib
import re
import zlib
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
from runtime.statistics import auc
from runtime.storage import Damaged, load_whole, save_whole


def code_points(text: str) -> np.ndarray:
    """(characters,): the number of each character in Unicode."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)


def word_checksums(text: str) -> np.ndarray:
    """(words,): a number for each word, whatever its case, and for each sign that is no space."""
    words = re.findall(r"\w+|[^\w\s]", text.lower())
    return np.array([zlib.crc32(word.encode("utf-8", "surrogatepass")) for word in words], np.uint32)


Entries = tuple[Tensor, Tensor, Tensor]  # (row, feature number, value) of all that is not zero


class NgramClassifier:
    """Logistic regression on hashed n-grams, by default of 1 to 3 characters.

    The feature of an n-gram is (1 + ln count) · idf, with each text scaled to length 1. The weights
    minimise mean cross-entropy plus l2/2 · |w|². That has one minimum, so no seed is involved.
    unit: n-grams of characters or of words. naive_bayes: the idf is multiplied by |ln of the
    n-gram's share of liked texts' n-grams over its share of the others'| (Wang & Manning 2012).
    """

    def __init__(self, n_features: int = 2**18, l2: float = 1e-5,
                 orders: Sequence[int] = (1, 2, 3), unit: str = "characters",
                 naive_bayes: bool = False):
        self.n_features, self.l2, self.orders = n_features, l2, tuple(orders)
        self.unit, self.naive_bayes = unit, naive_bayes
        self.idf, self.weight = torch.zeros(n_features), torch.zeros(n_features)
        self.bias = torch.zeros(1)

    # ---- features --------------------------------------------------------------------------------

    def ngrams(self, text: str) -> Counter[int]:
        """Feature number -> count of the text's n-grams. The number is a hash of the code points
        (of words: of their checksums) and is the same on every machine; different n-grams may share
        one."""
        points = (word_checksums if self.unit == "words" else code_points)(text).astype(np.uint64)
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

    def fit(self, texts: Sequence[str], labels: Sequence[int]) -> "NgramClassifier":
        """Learn from texts and their labels (1 liked, 0 not) by L-BFGS; returns self."""
        return self.fit_counts(self.log_counts(texts), labels)

    def fit_counts(self, counts: Entries, labels: Sequence[int],
                   tolerance: float = 1e-7) -> "NgramClassifier":
        """`fit` on the texts' `log_counts`, which depend on unit and orders alone, until the
        gradient's largest number is below the tolerance."""
        target = torch.tensor(labels, dtype=torch.float64)
        rows, numbers, values = counts
        occurrences = torch.bincount(numbers, minlength=self.n_features)
        self.idf = torch.log((1 + len(target)) / (1 + occurrences)) + 1
        if self.naive_bayes:
            self.idf *= self._log_ratio(numbers, target[rows])
        _, _, values = self._scaled(rows, numbers, values, len(target))
        used, numbers = numbers.unique(return_inverse=True)  # train only what occurs
        rows, numbers, values = rows.numpy(), numbers.numpy(), values.double().numpy()
        w = torch.zeros(len(used) + 1, dtype=torch.float64)  # the bias last
        optimizer = torch.optim.LBFGS([w], max_iter=100, history_size=10,
                                      tolerance_grad=tolerance, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            """The loss; its gradient, in closed form, into w.grad: Σ (p − y) x / n + l2 · w."""
            weight, bias = w[:-1], w[-1:]
            sums = np.bincount(rows, weight.numpy()[numbers] * values, len(target))
            logits = torch.from_numpy(sums) + bias
            error = (torch.sigmoid(logits) - target) / len(target)
            slope = np.bincount(numbers, error.numpy()[rows] * values, len(used))
            w.grad = torch.cat((torch.from_numpy(slope) + self.l2 * weight, error.sum()[None]))
            loss = F.binary_cross_entropy_with_logits(logits, target)
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

    def _log_ratio(self, numbers: Tensor, labels: Tensor) -> Tensor:
        """(n_features,): |ln of a feature's share in liked texts over its share in the others|,
        each counted once more. numbers, labels (entries,): those of all entries."""
        liked, other = (torch.bincount(numbers, weight, self.n_features) + 1
                        for weight in (labels, 1 - labels))
        return torch.log(liked / liked.sum() * other.sum() / other).abs().float()

    def logits(self, texts: Sequence[str]) -> np.ndarray:
        """(n,) float32: log-odds of liked."""
        return self.logits_of(self.log_counts(texts), len(texts))

    def logits_of(self, counts: Entries, n: int) -> np.ndarray:
        """`logits` of n texts by their `log_counts`."""
        rows, numbers, values = self._scaled(*counts, n)
        sums = torch.zeros(n).index_add(0, rows, self.weight[numbers] * values)
        return (sums + self.bias).numpy()

    def probs(self, texts: Sequence[str]) -> np.ndarray:
        """(n,): P(liked)."""
        return 1 / (1 + np.exp(-self.logits(texts)))

    # ---- files -----------------------------------------------------------------------------------

    def settings(self) -> tuple:
        """The constructor's arguments."""
        return self.n_features, self.l2, self.orders, self.unit, self.naive_bayes

    def __str__(self) -> str:
        """Such as "1 to 2 characters, naive-Bayes weights, l2 3e-05"."""
        weights = "naive-Bayes" if self.naive_bayes else "idf"
        return f"{min(self.orders)} to {max(self.orders)} {self.unit}, {weights} weights, l2 {self.l2:g}"

    def state_dict(self) -> dict[str, Any]:
        """Settings and weights, for torch.save; `from_state` reads it."""
        return {"settings": list(self.settings()), "idf": self.idf, "weight": self.weight,
                "bias": self.bias}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> "NgramClassifier":
        """A fitted classifier from its `state_dict`."""
        classifier = cls(*state["settings"])
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


# What the reward model's baseline is chosen from. First unit and orders, with and without
# naive-Bayes weights, at the first l2; then the l2 of the best of these six.
FORMS = (("characters", (1, 2)), ("characters", (1, 2, 3)), ("words", (1, 2)))
L2S = (3e-5, 1e-4, 1e-5)


def fit_best(train: list[dict], val: list[dict], most: int = 20_000) -> NgramClassifier:
    """The form of FORMS and L2S with the highest AUC on val (the first of equals), fitted on train.

    To be compared, each is fitted to three digits of its AUC, on at most `most` texts.
    """
    drawn = np.random.default_rng(0).permutation(len(train))[:most]
    (texts, labels), (val_texts, val_labels) = (
        ([plain_text(r) for r in records], [r["label"] for r in records])
        for records in ([train[i] for i in drawn], val))

    @functools.cache
    def counts(unit: str, orders: tuple[int, ...]) -> tuple[Entries, Entries]:
        reader = NgramClassifier(unit=unit, orders=orders)
        return reader.log_counts(texts), reader.log_counts(val_texts)

    def reached(form: NgramClassifier) -> float:
        seen, held_out = counts(form.unit, form.orders)
        form.fit_counts(seen, labels, tolerance=5e-5)
        return auc(form.logits_of(held_out, len(val)), val_labels)

    best = max((NgramClassifier(l2=L2S[0], orders=orders, unit=unit, naive_bayes=naive_bayes)
                for unit, orders in FORMS for naive_bayes in (False, True)), key=reached)
    best = max((NgramClassifier(l2=l2, orders=best.orders, unit=best.unit,
                                naive_bayes=best.naive_bayes) for l2 in L2S), key=reached)
    return best.fit([plain_text(r) for r in train], [r["label"] for r in train])


def ngram_classifier(data: Prepared, half: str) -> NgramClassifier:
    """The classifier of one half of the labels, fitted once and kept in the data set's folder.

    half: "reward" for the reward model's baseline, the best of its forms on validation; "judge" for
    the judge, whose form is fixed, so that figures stay comparable.
    """
    path, fixed = data.folder / f"ngrams_{half}.pt", NgramClassifier()
    choose = half == "reward" and data.has_labels("reward", "val")
    choice = repr((FORMS, L2S) if choose else fixed.settings())
    state = stored_state(path)
    if state is not None and state.get("choice") == choice:  # of other forms another would be chosen
        return NgramClassifier.from_state(state)
    train = data.records(half, "train")
    classifier = fit_best(train, data.records("reward", "val")) if choose else (
        fixed.fit([plain_text(r) for r in train], [r["label"] for r in train]))
    save_whole(path, classifier.state_dict() | {"choice": choice})
    return classifier


def stored_state(path: pathlib.Path) -> dict[str, Any] | None:
    """A classifier's state as it was written; None if there is none. A damaged one is said, and
    counts as none: it can be fitted again."""
    if not path.exists():
        return None
    try:
        return load_whole(path)
    except Damaged:
        print(f"{path}: damaged, fitted again")
        return None
