"""A Python function as a reward: loaded from a file, called with texts, and what it returns checked.

    python train.py ppo --reward my.py:polite

my.py has `def polite(prompts, replies)` or `def polite(prompts, replies, records)`, which returns a
number for each reply. Whatever goes wrong in it is one line that names the function, the line and
the reply.
"""
import contextlib
import inspect
import math
import pathlib
import re
import sys
import time
import traceback
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from data.records import prompt_text
from runtime.options import UserError

LARGEST = 3e38  # of float32
SLOW = 10.0  # seconds of a function's first call, above which they are said


class RewardError(UserError):
    """A reward function failed. The networks are as they were: the run can be saved."""


def load_function(path: pathlib.Path, name: str) -> Callable:
    """A function of a Python file; UserError if there is none, or if the file does not run.

    The file's folder is importable from then on, after all others. No __pycache__ is written.
    """
    if not path.is_file():
        raise UserError(f"--reward {path}: no such file: give the path of a .py file")
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
        line = f", line {error.lineno}" * bool(error.lineno)
        raise UserError(f"--reward {error.filename or path}{line}: {error.msg}") from error
    except (Exception, SystemExit) as error:
        raise UserError(f"--reward {path}{line_of(error, path)}: {told(error)}") from error
    function = getattr(module, name, None)
    if not callable(function):
        own = [x for x, value in vars(module).items() if inspect.isfunction(value)]
        raise UserError(f"--reward {path}: has no function {name!r}; it has {', '.join(own) or 'none'}")
    if not 2 <= arguments_of(function) <= 3:
        raise UserError(f"--reward {path}: {name}{inspect.signature(function)} must take (prompts, replies) "
                        "or (prompts, replies, records)")
    return function


def arguments_of(function: Callable) -> int:
    """How many of (prompts, replies, records) a function takes; a number above 3: it needs others."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # of some built-in functions
        return 2
    places = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    needed = sum(p.default is p.empty for p in places)
    if any(p.kind == p.KEYWORD_ONLY and p.default is p.empty for p in parameters):
        return 4
    return max(needed, 3 if any(p.kind == p.VAR_POSITIONAL for p in parameters) else min(3, len(places)))


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
    ...     end_ids, decode = (-1,), staticmethod(lambda ids: "".join(map(chr, ids)))
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
        decoded = self.tokenizer.decode([i for i in ids if i not in self.tokenizer.end_ids])
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
