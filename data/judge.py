"""N-gram regressions of a data set beside the reward model: its baseline, and the judges of policies.

Fitted on the reward model's share of people's feedback, its form chosen on validation, an n-gram
regression (data/ngrams.py) is the baseline that a reward model has to beat. Fitted on the other
share it is a judge: PPO is measured by feedback that it was never trained against. The second judge
is a transformer that learned the same share; both are asked alike, by probs(prompts, texts).
"""
import abc
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from data.batches import LEAST_REPLY, prompt_ids, reward_rows
from data.dataset import feedback_of, tells
from data.ngrams import Entries, NgramRegression
from data.prepared import Prepared
from data.records import prompt_text
from data.tokenizer import Tokenizer
from runtime.draws import drawn_evenly
from runtime.statistics import auc, correlation, share_above
from runtime.storage import Damaged, load_whole, save_whole


# ---- people's feedback as texts and numbers ------------------------------------------------------

def plain_text(record: dict) -> str:
    """Prompt and response as one text, which is what a regression of labels or ratings reads;
    messages are joined."""
    return prompt_text(record["prompt"]) + record["response"]


def texts_and_target(records: Sequence[dict]) -> tuple[list[str], list[float]]:
    """What `NgramRegression.fit` learns from. Of pairs the replies alone are read: both have the
    same prompt."""
    if feedback_of(records[0]) == "pairs":
        return ([r[field] for field in ("chosen", "rejected") for r in records],
                [0.5 if r.get("tie") else 1.0 for r in records])
    name = "score" if "score" in records[0] else "label"
    return [plain_text(r) for r in records], [r[name] for r in records]


def agreement(kind: str, scores: np.ndarray, target: Sequence[float]) -> float:
    """AUC on labels, correlation with ratings, accuracy on pairs without ties (scores: all first
    replies, then all second ones)."""
    if kind == "pairs":
        first, second = (half[np.array(target) != 0.5] for half in np.split(scores, 2))
        return share_above(first, second)
    return auc(scores, target) if kind == "labels" else correlation(scores, target)


def by_part(records: Sequence[dict]) -> dict[str, list[dict]]:
    """The records of each part of the reward; of those that name none, under ""."""
    parts: dict[str, list[dict]] = {}
    for record in records:
        parts.setdefault(record.get("part", ""), []).append(record)
    return parts


# ---- judges: what no policy is trained against ---------------------------------------------------

class Judge(abc.ABC):
    """Its score of a text becomes a number from 0 to 1: σ(score − centre), 0.5 is neutral.

    labels: P(liked). ratings: the score is the predicted rating, standardised by mean and spread of
    people's ratings. pairs: the centre is the mean score of what people were shown, so that above
    0.5 means better than the average of people's replies.
    """

    centre = 0.0

    @abc.abstractmethod
    def scores(self, prompts: Sequence, texts: Sequence[str]) -> np.ndarray:
        """(n,) float32: the score of each prompt's reply."""

    def probs(self, prompts: Sequence, texts: Sequence[str]) -> np.ndarray:
        """(n,), from 0 to 1: how good each prompt's reply is."""
        return 1 / (1 + np.exp(self.centre - self.scores(prompts, texts)))

    def reads(self, prompt: Any) -> bool:
        """Whether it can read a prompt with a reply to it."""
        return True

    def centre_on(self, people: Sequence[tuple[Any, str]]) -> None:
        """Let the mean score of these (prompt, reply) be neutral, as far as they can be read."""
        if read := [pair for pair in people if self.reads(pair[0])]:
            self.centre = float(np.mean(self.scores(*zip(*read, strict=True)), dtype=np.float64))


class NgramJudge(Judge):
    """The n-gram regression of the judge's share of the feedback: of several, one for each part of
    the reward, their mean."""

    def __init__(self, regressions: dict[str, NgramRegression], people: Sequence[tuple[Any, str]] = ()):
        """people: (prompt, reply) pairs whose mean score is neutral; without any a score of 0 is."""
        self.regressions = regressions
        if people:
            self.centre_on(people)

    def scores(self, prompts: Sequence, texts: Sequence[str]) -> np.ndarray:
        found = []
        for regression in self.regressions.values():
            read = texts if regression.kind == "pairs" else [
                prompt_text(prompt) + text for prompt, text in zip(prompts, texts, strict=True)]
            found.append(regression.scores(read))
        return np.mean(found, axis=0)


class ModelJudge(Judge):
    """A transformer that learned the judge's share (`train.py judge`). It reads tokens, in order."""

    def __init__(self, model: Any, tokenizer: Tokenizer, template: str, max_len: int,
                 people: Sequence[tuple[Any, str]] = (), warnings: Sequence[str] = ()):
        """model: whatever has score_rows, such as a RewardModel. max_len: the longest row it was
        trained on. people: as of `NgramJudge`. warnings: of its training, for reports."""
        self.model, self.max_len, self.warnings = model, max_len, warnings
        self.tokenizer, self.template = tokenizer, template
        if people:
            self.centre_on(people)

    def scores(self, prompts: Sequence, texts: Sequence[str]) -> np.ndarray:
        """Each reply is read as a finished text, cut to max_len with its prompt."""
        records = [{"prompt": prompt, "response": text}
                   for prompt, text in zip(prompts, texts, strict=True)]
        rows = reward_rows(records, self.tokenizer, self.template, self.max_len)
        return self.model.score_rows(rows).cpu().numpy()

    def reads(self, prompt: Any) -> bool:
        """Whether the prompt leaves room for a reply in a row of its length."""
        return len(prompt_ids(self.tokenizer, prompt, self.template)) <= self.max_len - LEAST_REPLY


def shown_to_people(data: Prepared, most: int = 500) -> list[tuple[Any, str]]:
    """(prompt, reply) for both replies of pairs of validation, from at most that many of them: the
    neutral point of judges that learned pairs. [] for labels and ratings, which have one of their
    own."""
    records = data.records("reward", "val") if data.has("reward") else []
    if not records or feedback_of(records[0]) != "pairs":
        return []
    return [(r["prompt"], r[field]) for r in drawn_evenly(records, most) for field in ("chosen", "rejected")]


# ---- the regressions of a data set ---------------------------------------------------------------

# What a form is chosen from. First unit and orders, of labels with and without naive-Bayes weights,
# at the first l2; then the l2 of the best of these.
FORMS = (("characters", (1, 2)), ("characters", (1, 2, 3)), ("words", (1, 2)))
L2S = {"labels": (3e-5, 1e-4, 1e-5), "scores": (1e-4, 1e-3, 3e-5, 1e-5), "pairs": (1e-2, 1e-1, 1e-3)}


def fit_best(train: list[dict], val: list[dict], most: int = 20_000) -> NgramRegression:
    """The form of FORMS and L2S with the highest `agreement` on val (the first of equals), fitted on
    train.

    To be compared, each is fitted to three digits of its AUC, on at most `most` records.
    """
    kind = feedback_of(train[0])
    drawn = np.random.default_rng(0).permutation(len(train))[:most]
    (texts, target), (val_texts, val_target) = map(texts_and_target, ([train[i] for i in drawn], val))

    @functools.cache
    def counts(unit: str, orders: tuple[int, ...]) -> tuple[Entries, Entries]:
        reader = NgramRegression(unit=unit, orders=orders)
        return reader.log_counts(texts), reader.log_counts(val_texts)

    def reached(form: NgramRegression) -> float:
        seen, held_out = counts(form.unit, form.orders)
        form.fit_counts(seen, target, tolerance=5e-5)
        return agreement(kind, form.scores_of(held_out, len(val_texts)), val_target)

    best = max((NgramRegression(l2=L2S[kind][0], orders=orders, unit=unit, naive_bayes=naive_bayes,
                                kind=kind)
                for unit, orders in FORMS
                for naive_bayes in ((False, True) if kind == "labels" else (False,))), key=reached)
    best = max((NgramRegression(l2=l2, orders=best.orders, unit=best.unit, kind=kind,
                                naive_bayes=best.naive_bayes) for l2 in L2S[kind]), key=reached)
    return best.fit(*texts_and_target(train))


def ngram_regressions(data: Prepared, share: str) -> dict[str, NgramRegression]:
    """The regressions of one share of the feedback, by part of the reward ("" where records name
    none), fitted once and kept in the data set's folder; again if that file is damaged.

    share: "reward" for the reward model's baseline, "judge" for the judge. The form is the best on
    validation. A judge of labels has one fixed form, so that its figures stay comparable; and so has
    what validation cannot choose.
    """
    path, state = data.folder / f"ngrams_{share}.pt", {}
    try:
        state = load_whole(path) if path.exists() else {}
    except Damaged:
        print(f"{path}: damaged, fitted again")
    if state.get("choice") == repr((FORMS, L2S)):  # of others another is chosen
        return {part: NgramRegression.from_state(x) for part, x in state["parts"].items()}
    fitted, val = {}, by_part(data.records("reward", "val") if data.has("reward") else [])
    for part, train in by_part(data.records(share, "train")).items():
        kind, held_out = feedback_of(train[0]), val.get(part, [])
        fixed = NgramRegression(kind=kind, l2=1e-5 if kind == "labels" else L2S[kind][0])
        choose = tells(held_out) == kind and (share, kind) != ("judge", "labels")
        fitted[part] = fit_best(train, held_out) if choose else fixed.fit(*texts_and_target(train))
    save_whole(path, {"choice": repr((FORMS, L2S)),
                      "parts": {part: x.state_dict() for part, x in fitted.items()}})
    return fitted
