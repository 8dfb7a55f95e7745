"""Rewards that need no reward model: a Python function, a reply's length, and sums of parts.

    python train.py ppo --reward my.py:polite
    python train.py ppo --reward model:1,length:-.01,my.py:polite:.5

A part is NAME or NAME:WEIGHT, parts are separated by commas. Names: `model`, the reward model;
`model.HEAD`, one head of it; `length`, the tokens of a reply; FILE.py:FUNCTION, a function of yours.
`read_reward` makes parts of such a text, and loads the functions; `RewardSum` scores replies by them.
"""
import contextlib
import hashlib
import inspect
import math
import pathlib
import re
import sys
import time
import traceback
import types
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from data.records import prompt_text
from runtime.options import UserError

LARGEST = 3e38  # of float32
SLOW = 10.0  # seconds of a function's first call, above which they are said


class RewardError(UserError):
    """A reward function failed. The networks are as they were: the run can be saved."""


# ---- parts ---------------------------------------------------------------------------------------

class Part(NamedTuple):
    """One term of a reward."""

    name: str  # in metrics: part_<name>
    weight: float = 1.0
    head: str | None = None  # of the reward model: "" is its whole score; None: no part of it
    function: Callable | None = None
    path: pathlib.Path | None = None  # of the function's file


def read_reward(text: str) -> list[Part]:
    """The parts of `--reward`, functions loaded; UserError says which part is wrong, and how to mend
    it.

    >>> [(part.name, part.weight) for part in read_reward("model:2,length:-.01")]
    [('model', 2.0), ('length', -0.01)]
    """
    parts = [read_part(word.strip()) for word in text.split(",")] if text.strip() else []
    names = [part.name for part in parts]
    if twice := {name for name in names if names.count(name) > 1}:
        raise UserError(f"--reward {text}: {', '.join(sorted(twice))} stands twice: give each part once, under "
                        "a name of its own")
    heads = {part.head for part in parts} - {None}
    if "" in heads and len(heads) > 1:
        raise UserError(f"--reward {text}: `model` already holds its heads: name it, or its heads")
    return parts


def read_part(word: str) -> Part:
    """One part. A file's name ends at `.py:`, so that the colon of a drive is no separator."""
    file, is_file, rest = word.rpartition(".py:")
    name, _, weight = rest.partition(":")
    try:
        number = float(weight) if weight else 1.0
    except ValueError:
        number = math.nan
    if not math.isfinite(number) or word.endswith(":"):
        raise UserError(f"--reward: {weight!r} is no weight, in {word!r}: write NAME or NAME:NUMBER")
    if number == 0:
        raise UserError(f"--reward: {word!r} has no effect with the weight 0: leave it out")
    if is_file:
        path = pathlib.Path(file + ".py")
        return Part(name, number, function=load_function(path, name), path=path)
    if name == "length":
        return Part(name, number)
    if name == "model" or name.startswith("model."):
        return Part(name.removeprefix("model."), number, head=name.removeprefix("model").lstrip("."))
    raise UserError(f"--reward: unknown part {name!r}: use model, model.HEAD, length, or "
                    "FILE.py:FUNCTION, each with :WEIGHT if need be, separated by commas (so a "
                    "file's path must hold none)")


def digests(parts: Sequence[Part]) -> dict[str, str]:
    """{"file my.py": a hash} of the files that functions come from. What they import is not in it."""
    paths = dict.fromkeys(part.path for part in parts if part.path is not None)
    return {f"file {path}": hashlib.sha256(path.read_bytes()).hexdigest()[:12] for path in paths}


# ---- functions -----------------------------------------------------------------------------------

def load_function(path: pathlib.Path, name: str) -> Callable:
    """A function of a Python file; UserError if there is none, or if the file does not run.

    The file's folder is importable from then on, after all others. No __pycache__ is written.
    """
    if not path.is_file():
        raise UserError(f"--reward {path}: no such file")
    module = types.ModuleType("_reward_" + re.sub(r"\W", "_", str(path.resolve())))
    module.__file__ = str(path)
    sys.dont_write_bytecode = True
    if (folder := str(path.resolve().parent)) not in sys.path:
        sys.path.append(folder)
    sys.modules[module.__name__] = module
    try:
        with contextlib.redirect_stdout(sys.stderr):
            exec(compile(path.read_bytes(), str(path), "exec"), module.__dict__)
    except SyntaxError as error:
        raise UserError(f"--reward {error.filename}, line {error.lineno}: {error.msg}") from error
    except (Exception, SystemExit) as error:
        raise UserError(f"--reward {path}{line_of(error, path)}: {told(error)}") from error
    function = getattr(module, name, None)
    if not callable(function):
        own = [x for x, value in vars(module).items() if inspect.isfunction(value)]
        raise UserError(f"--reward {path}: has no function {name!r}; it has {', '.join(own) or 'none'}")
    if not 2 <= arguments_of(function) <= 3:
        raise UserError(f"--reward {path}: {name} must take (prompts, replies) or (prompts, replies, "
                        f"records), and takes {arguments_of(function)} arguments")
    return function


def arguments_of(function: Callable) -> int:
    """How many of (prompts, replies, records) a function takes; a number above 3: it needs more."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # of some built-in functions
        return 2
    places = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    needed = sum(p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
                 for p in parameters)
    if needed > 3 or any(p.kind == p.VAR_POSITIONAL for p in parameters):
        return max(3, needed)
    return min(3, len(places))


def line_of(error: BaseException, path: pathlib.Path | None) -> str:
    """", line N" of the user's file, or "" if the error arose elsewhere."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__)
             if path is not None and frame.filename == str(path)]
    return f", line {lines[-1]}" if lines else ""


def told(error: BaseException) -> str:
    """An error in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


class PythonReward:
    """A Python function as a scorer: function(prompts, replies) or function(prompts, replies,
    records) -> a number for each reply.

    prompts: texts; messages are joined by line breaks. replies: texts without control tokens.
    records: dicts, the prompt's record with its other fields; records[i]["prompt"] is as the record
    has it. Numbers may be Python's, numpy's or torch's; a generator will do.

    >>> class Letters:  # stands in for a tokenizer; -1 is its end token
    ...     eom_id, decode = -1, staticmethod(lambda ids: "".join(map(chr, ids)))
    ...     reply_text = staticmethod(lambda ids: "".join(chr(i) for i in ids if i >= 0))
    >>> short = PythonReward(lambda prompts, replies: [-len(reply) for reply in replies], Letters)
    >>> short.scores([[72, 105]], [[104, 101, -1]])
    tensor([-2.])
    """

    def __init__(self, function: Callable, tokenizer: Any, device: str = "cpu", *,
                 records: dict[tuple[int, ...], dict] | None = None, path: pathlib.Path | None = None):
        """records: of each prompt, by its ids; without them prompts are decoded, and records hold
        nothing else. path: the function's file, for errors."""
        self.function, self.tokenizer, self.device = function, tokenizer, device
        self.records, self.path = records or {}, path
        self.name = f"{path}:{function.__name__}" if path else getattr(function, "__name__", "the reward function")
        self.with_records, self.timed = arguments_of(function) > 2, False

    def record(self, ids: list[int]) -> dict:
        """A prompt's record."""
        decoded = self.tokenizer.decode([i for i in ids if i != self.tokenizer.eom_id])
        return self.records.get(tuple(ids)) or {"prompt": decoded}

    def scores(self, prompts: Sequence[list[int]], replies: Sequence[list[int]]) -> Tensor:
        """Score (B,) float32 of each reply; RewardError names what the function did wrong."""
        records = [self.record(ids) for ids in prompts]
        texts = [self.tokenizer.reply_text(ids) for ids in replies]
        begin = time.perf_counter()
        values = self.called(records, texts)
        seconds, first = time.perf_counter() - begin, not self.timed
        self.timed = True
        if first and seconds > SLOW:
            print(f"{self.name}: {seconds:.0f} s for {len(texts)} replies", file=sys.stderr)
        return torch.tensor(self.checked(values, texts), dtype=torch.float32).to(self.device)

    def call(self, records: list[dict], texts: list[str]) -> Any:
        """What the function returns. What it prints goes to stderr."""
        arguments = [[prompt_text(record["prompt"]) for record in records], texts]
        with contextlib.redirect_stdout(sys.stderr):
            values = self.function(*arguments, *[records] * self.with_records)
            return values if isinstance(values, str | bytes | dict | set) or not hasattr(
                values, "__iter__") else list(values)

    def called(self, records: list[dict], texts: list[str]) -> Any:
        """`call`; if it raises, the replies are tried one by one, to name the first that it fails
        on."""
        try:
            return self.call(records, list(texts))
        except (Exception, SystemExit) as error:
            cause, failed = error, f"{len(texts)} replies together"
            for record, text in zip(records, texts, strict=True):
                try:
                    self.call([record], [text])
                except (Exception, SystemExit) as one:
                    cause, failed = one, f"the reply {shown(text)}"
                    break
            raise RewardError(f"reward function {self.name}{line_of(cause, self.path)}: {told(cause)}, on "
                              f"{failed}: mend it") from cause

    def checked(self, values: Any, texts: list[str]) -> list[float]:
        """The values as numbers, one for each reply; RewardError if they are none."""
        if not isinstance(values, list):
            raise RewardError(f"reward function {self.name}: must return a list of numbers, one for each "
                              f"reply; it returned {type(values).__name__}")
        if len(values) != len(texts):
            raise RewardError(f"reward function {self.name}: returned {len(values)} numbers for "
                              f"{len(texts)} replies: it must return one for each")
        numbers = []
        for value, text in zip(values, texts, strict=True):
            try:
                number = math.nan if isinstance(value, str | bytes) else float(value)
            except (TypeError, ValueError, OverflowError, RuntimeError):
                number = math.nan
            if not abs(number) < LARGEST:
                raise RewardError(f"reward function {self.name}: {' '.join(repr(value).split())[:60]} is no "
                                  f"finite number, for the reply {shown(text)}: mend it")
            numbers.append(number)
        return numbers


def shown(text: str) -> str:
    """A reply's beginning, in quotes."""
    return repr(text[:60]) + "…" * (len(text) > 60)


# ---- sums ----------------------------------------------------------------------------------------

class Length:
    """The tokens of each reply, its end token among them."""

    def scores(self, prompts: Sequence[list[int]], replies: Sequence[list[int]]) -> Tensor:
        return torch.tensor([float(len(reply)) for reply in replies])


class RewardSum:
    """Σ weight · part, a scorer. `parts` holds each part's (B,) of the replies that were scored last.

    functions, `length`: as they are, so that the price of KL has their units. Parts of the reward
    model: what normalise(name, raw) makes of raw scores.
    """

    def __init__(self, terms: Sequence[Part], scorers: dict[str, Any],
                 normalise: Callable[[str, Tensor], Tensor] = lambda name, raw: raw):
        """scorers: by the names of parts; those of the reward model need only `model`."""
        self.terms, self.scorers, self.normalise = terms, scorers, normalise
        self.parts: dict[str, Tensor] = {}

    def model_scores(self, prompts: Sequence[list[int]],
                     replies: Sequence[list[int]]) -> dict[str, Tensor]:
        """Raw scores (B,) of the parts of the reward model, by name."""
        terms, model = [term for term in self.terms if term.head is not None], self.scorers.get("model")
        if not any(term.head for term in terms):
            return {term.name: model.scores(prompts, replies) for term in terms}
        heads = getattr(model, "part_scores", lambda *_: {})(prompts, replies)
        if missing := [term.head for term in terms if term.head not in heads]:
            raise UserError(f"--reward model.{missing[0]}: the reward model has no such head; it has "
                            f"{', '.join(heads) or 'none: write model'}")
        return {term.name: heads[term.head] for term in terms}

    def scores(self, prompts: Sequence[list[int]], replies: Sequence[list[int]]) -> Tensor:
        """The sum (B,) float32."""
        parts = {name: self.normalise(name, raw)
                 for name, raw in self.model_scores(prompts, replies).items()}
        for term in self.terms:
            if term.head is None:
                parts[term.name] = self.scorers[term.name].scores(prompts, replies)
        self.parts = {term.name: parts[term.name].float().cpu() for term in self.terms}
        return sum(term.weight * self.parts[term.name] for term in self.terms)

    def means(self, prefix: str = "part_") -> dict[str, float]:
        """Each part's mean, before its weight, over the replies that were scored last."""
        return {prefix + name: float(x.mean()) for name, x in self.parts.items()}


def make_scorers(terms: Sequence[Part], model: Any, tokenizer: Any,
                 records: dict[tuple[int, ...], dict]) -> dict[str, Any]:
    """What scores each part, by its name. records: of each prompt, by its ids."""
    scorers = {"length": Length(), "model": model}
    return scorers | {term.name: PythonReward(term.function, tokenizer, records=records, path=term.path)
                      for term in terms if term.function}
