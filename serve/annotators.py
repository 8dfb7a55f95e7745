"""Who answers in the loop, if it is not a person: a judge, a Python function, or one of two bundled persons.

    python train.py loop --annotator judge --error_rate .2     the data set's judge of n-grams
    python train.py loop --annotator my.py:better              function(prompt, first, second)
    python train.py loop --annotator short                     a person who likes short and plain replies
    python train.py loop --annotator warm                      one who likes long and warm ones

A function returns a number: above 0 if the first reply is better, below 0 if the second is, 0 for a tie.
An answer follows from (seed, round, card) alone, so that an interrupted round goes on as if it had not
stopped. The judge is asked on purpose here: who learns from it is trained against it, so its figures then say
how well the loop learned what it was told, and the transformer judge is the independent one.
"""
import contextlib
import math
import pathlib
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from data.functions import LARGEST, arguments_of, line_of, load_function, shown, told
from data.records import prompt_text
from runtime.draws import key
from runtime.options import UserError
from serve.pairs import Card

Preference = Callable[[str, str, str], float]  # of (prompt, first, second)
CHOICES = {1: "left", 0: "tie", -1: "right"}


class Annotator(Protocol):
    """Whoever compares two replies. name: in the records. said: in reports."""

    name: str
    said: str

    def deltas(self, cards: Sequence[Card]) -> np.ndarray:
        """(n,): how much better each card's first reply is than its second; 0: equally good."""


# ---- simulated answers -----------------------------------------------------------------------------

def preferred(deltas: np.ndarray, draws: np.ndarray, *, temperature: float = 0.0, error_rate: float = 0.0,
              tie_share: float = 0.0) -> np.ndarray:
    """(n,) of 1 where the first reply is chosen, -1 for the second, 0 for a tie.

    deltas (n,): log-odds that the first is better (Bradley and Terry 1952). draws (n, 2): from 0 to 1.
    temperature: deltas are divided by it; at 0 the better reply is always chosen, and only equals tie.
    tie_share: how often replies that are equally good tie (Davidson 1970). error_rate: share of the decided
    answers that is turned round.

    >>> preferred(np.array([3.0, -3.0, 0.0]), np.zeros((3, 2))).tolist()
    [1, -1, 0]
    """
    if temperature == 0:
        said = np.sign(deltas)
    else:
        odds = np.full(len(deltas), math.log(2 * tie_share / (1 - tie_share)) if tie_share else -math.inf)
        logits = np.stack((deltas / temperature / 2, odds, -deltas / temperature / 2))
        weights = np.exp(logits - logits.max(0))
        won, tied, _ = weights / weights.sum(0)
        said = np.where(draws[:, 0] < won, 1, np.where(draws[:, 0] < won + tied, 0, -1))
    return np.where(draws[:, 1] < error_rate, -said, said).astype(int)


class Simulated:
    """An annotator's answers to the cards of a round."""

    def __init__(self, annotator: Annotator, seed: int, temperature: float = 0.0, error_rate: float = 0.0,
                 tie_share: float = 0.0):
        """temperature, error_rate, tie_share: as `preferred` takes them."""
        self.annotator, self.seed = annotator, seed
        self.rates = dict(temperature=temperature, error_rate=error_rate, tie_share=tie_share)

    def events(self, cards: Sequence[Card], round: int) -> list[dict[str, Any]]:
        """The answers as events of a FeedbackLog, in the order of the cards. Their ids follow from seed, round
        and card, so that none is stored twice."""
        if not cards:
            return []
        draws = np.stack([np.random.default_rng(key(self.seed, "loop", "answer", round, int(card.id, 16))).random(4)
                          for card in cards])
        said = preferred(np.asarray(self.annotator.deltas(cards), float), draws[:, :2], **self.rates)
        events = []
        for card, better, draw in zip(cards, said.tolist(), draws, strict=True):
            swapped = draw[2] < 0.5  # the second reply stands left
            sides = Card(card.id, card.prompt, card.replies, card.names, card.hashes, card.sampling,
                         (1, 0) if swapped else (0, 1))
            events.append(sides.record(self.annotator.name, CHOICES[-better if swapped else better],
                                       id=f"{int(draw[3] * 2**48):016x}"))
        return events


# ---- who they are ----------------------------------------------------------------------------------

class JudgeAnnotator:
    """A judge (data/judge.py): the difference of its scores. These are log-odds, or, of a judge that learned
    ratings, spreads of people's ratings, which Bradley–Terry then takes as log-odds."""

    def __init__(self, judge: Any, name: str):
        self.judge, self.name = judge, f"judge {name}"
        self.said = (f"The judge of {name} gave the answers: what it says of the policy tells how well the loop "
                     "learned what it was told, and is no independent opinion")

    def deltas(self, cards: Sequence[Card]) -> np.ndarray:
        prompts = [card.prompt for card in cards]
        first, second = (self.judge.scores(prompts, [card.replies[i] for card in cards]) for i in (0, 1))
        return first - second


class FunctionAnnotator:
    """A function of (prompt, first, second), all texts; messages are joined by line breaks."""

    def __init__(self, function: Preference, name: str, path: pathlib.Path | None = None):
        """path: the function's file, for errors."""
        self.function, self.name, self.path = function, name, path
        self.said = f"{name} gave the answers, simulated"

    def deltas(self, cards: Sequence[Card]) -> np.ndarray:
        with contextlib.redirect_stdout(sys.stderr):
            return np.array([self.called(prompt_text(card.prompt), *card.replies) for card in cards])

    def called(self, prompt: str, first: str, second: str) -> float:
        """The function's number; UserError names what it did wrong."""
        try:
            value = self.function(prompt, first, second)
        except (Exception, SystemExit) as error:
            raise UserError(f"annotator {self.name}{line_of(error, self.path)}: {told(error)}, on the replies "
                            f"{shown(first)} and {shown(second)}: mend it") from error
        with contextlib.suppress(TypeError, ValueError, OverflowError, RuntimeError):
            if not isinstance(value, str | bytes) and abs(number := float(value)) < LARGEST:
                return number
        raise UserError(f"annotator {self.name}: {' '.join(repr(value).split())[:60]} is no finite number: it must "
                        "return one, above 0 if the first reply is better")


def function_named(text: str) -> FunctionAnnotator:
    """The annotator of FILE.py:FUNCTION, or the bundled person of this name; UserError if it is neither."""
    if text in PERSONS:
        return FunctionAnnotator(PERSONS[text], text)
    file, colon, name = text.rpartition(":")
    if not (colon and file.endswith(".py") and name):
        raise UserError(f"--annotator {text}: use person, judge, {', '.join(PERSONS)}, or FILE.py:FUNCTION")
    path = pathlib.Path(file)
    try:
        function = load_function(path, name)
        fits = arguments_of(function) == 3
    except UserError as error:  # it takes functions for rewards, too
        fits = "must take" not in str(error)
        if fits:
            raise UserError(str(error).replace("--reward", "--annotator", 1)) from error
    if not fits:
        raise UserError(f"--annotator {text}: must take (prompt, first, second)")
    return FunctionAnnotator(function, f"{path.name}:{name}", path)


# ---- two persons of opposite taste -------------------------------------------------------------------

PIECES = re.compile(r"[\u3400-\u9fff]|[A-Za-z0-9']+")
LOUD = re.compile("非常|特别|十分|超级|极其|太|真的|简直|[!！~～]+|[\U0001f300-\U0001faff]|"
                  r"\b(?:very|really|so|extremely|absolutely|totally|super)\b", re.IGNORECASE)
WARM = re.compile("喜欢|感谢|谢谢|感动|开心|高兴|幸福|温馨|温暖|亲切|热情|舒服|舒适|满意|推荐|可爱|美好|贴心|细心|放心|"
                  "祝|爱|棒|赞|"
                  r"\b(?:thanks?|thankful|love|loved|lovely|happy|glad|kind|friendly|warm|wonderful|beautiful|enjoy\w*|"
                  r"delight\w*|welcome|recommend\w*|dear|joy|sweet|great|hope|friends?)\b", re.IGNORECASE)
LEAST = 3  # a reply below so many pieces says nothing


def size(text: str) -> int:
    """Chinese characters and, counted twice, other words: about equal for equal contents."""
    return sum(2 if piece.isascii() else 1 for piece in PIECES.findall(text))


def short(prompt: str, first: str, second: str) -> float:
    """Prefers short and plain replies: each piece costs 1, each loud word or mark 5, saying nothing 100.

    >>> short("", "房间干净。", "房间真的非常非常干净！！") > 0
    True
    """
    def cost(text: str) -> int:
        return size(text) + 5 * len(LOUD.findall(text)) + 100 * (size(text) < LEAST)

    return float(cost(second) - cost(first))


def warm(prompt: str, first: str, second: str) -> float:
    """Prefers long and warm replies: each different pair of neighbouring characters is worth 1, each different
    warm word 10. Repeating oneself is worth nothing.

    >>> warm("", "服务员热情，我很喜欢，推荐！", "房间干净。") > 0
    True
    """
    def worth(text: str) -> int:
        said = "".join(PIECES.findall(text))
        return (len(set(zip(said, said[1:], strict=False)))
                + 10 * len({word.lower() for word in WARM.findall(text)}))

    return float(worth(first) - worth(second))


PERSONS: dict[str, Preference] = {"short": short, "warm": warm}
