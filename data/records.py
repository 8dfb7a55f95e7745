"""Records that users bring, one JSON object a line, and how each stage reads them.

    {"text"}                                          pretrain
    {"prompt", "response"} or {"messages": [...]}     sft
    {"prompt", "chosen", "rejected"}                  reward, pairwise (optional "margin")
    {"prompt", "response", "label": 0 or 1}           reward, classification
    {"prompt", "response", "score"}                   reward, regression
    {"prompt"}                                        ppo

A prompt is a text or a list of messages {"role", "content"}. data/forms.py reads the forms of other
tools as these, HH's transcripts among them. Every line is checked before anything is trained.
"""
import collections
import json
import os
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any

from data.forms import form_of, renamed
from runtime.lines import parse_line, read_lines
from runtime.options import UserError

FIELDS = {"pretrain": "text", "sft": "prompt and response, or messages",
          "reward": "prompt with response and label or score, or chosen and rejected",
          "ppo": "prompt"}
TIES = "ties, left out"
SHOWN = 10  # bad lines of a file that are named


# ---- prompts and dialogues -----------------------------------------------------------------------

def apply_template(template: str, prompt: str) -> str:
    """The prompt in its instruction. Braces in the prompt itself stay as they are."""
    return template.replace("{prompt}", prompt)


def as_messages(record: dict, template: str) -> list[dict[str, str]]:
    """An sft record as messages: its own, or its prompt (a text goes into the template) and its
    response."""
    if "messages" in record:
        return record["messages"]
    prompt = record["prompt"]
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": apply_template(template, prompt)}]
    return [*prompt, {"role": "assistant", "content": record["response"]}]


def prompt_text(prompt: str | list[dict[str, str]]) -> str:
    """A prompt as one text; the contents of messages are joined by line breaks."""
    return prompt if isinstance(prompt, str) else "\n".join(m["content"] for m in prompt)


def check_dialogue(messages: list, reply: bool) -> None:
    """ValueError unless the messages are one optional system message, then user and assistant in
    turn, each with a text. The last one must be the user's if `reply`, else the assistant's."""
    if not messages:
        raise ValueError("a dialogue without messages: give at least one from the user")
    if any(not isinstance(m, dict) or not isinstance(m.get("content"), str) for m in messages):
        raise ValueError('each message needs a "role" and a text as "content"')
    if any(m.get(name) for m in messages for name in ("tool_calls", "function_call")):
        raise ValueError("a message calls a tool, which is no text: leave such dialogues out")
    roles = [m.get("role") for m in messages]
    turns = roles[roles[0] == "system":]
    if not turns or turns != (["user", "assistant"] * len(turns))[:len(turns)]:
        raise ValueError(f"roles {str(roles)[:60]}: a dialogue is one optional system message, then user and "
                         "assistant in turn")
    if (turns[-1] == "user") != reply:
        raise ValueError("to be continued, a dialogue must end with the user's message" if reply
                         else "a finished dialogue must end with the assistant's message")


# ---- checks --------------------------------------------------------------------------------------

def _require(record: dict, name: str, types: tuple, description: str) -> None:
    """ValueError unless record[name] has one of the types; a bool counts as no number."""
    value = record.get(name)
    if not isinstance(value, types) or isinstance(value, bool):
        shown = {dict: "an object", list: "a list"}.get(type(value)) or json.dumps(value)[:40]
        raise ValueError(f'"{name}" must be {description}, is {shown if name in record else "missing"}')


def _require_number(record: dict, name: str, most: float) -> None:
    """ValueError unless record[name] is a number of at most that size."""
    _require(record, name, (int, float), "a number")
    if not -most <= record[name] <= most:  # NaN, too
        raise ValueError(f'"{name}" must be finite, and from {-most:g} to {most:g}')


def _check_feedback(record: dict) -> list[str]:
    """The fields of a reward record's feedback: ValueError unless it has a pair of replies, or one
    with label or score, and nothing else of these: it would be lost in silence."""
    given = [name for name in ("chosen", "label", "score") if name in record]
    if len(given) > 1:
        raise ValueError(f'has "{given[0]}" and "{given[1]}", two kinds of feedback: keep one')
    if "chosen" in record:
        _require(record, "chosen", (str,), "a text")
        _require(record, "rejected", (str,), "a text")
        if record["chosen"] == record["rejected"]:
            raise ValueError('"chosen" and "rejected" are equal: nothing is preferred')
        if "margin" in record:  # a distance of raw scores, which are of the size of 1
            _require_number(record, "margin", 1e3)
            return ["chosen", "rejected", "margin"]
        return ["chosen", "rejected"]
    _require(record, "response", (str,), "a text")
    if "score" in record:
        _require_number(record, "score", 1e15)
        return ["response", "score"]
    if record.get("label") not in (0, 1):
        raise ValueError('needs "label" (0 or 1), "score" (a number), or "chosen" and "rejected"')
    return ["response", "label"]


def records_in(record: Any, kind: str, fields: dict[str, str] | None = None) -> tuple[str, list[dict]]:
    """(the name of a line's form, its records in the form of this file's head); ValueError says what
    is wrong with it. A tie holds no record, a ranked list several. fields: `parse_fields`."""
    record = renamed(record, fields)
    form = form_of(record, kind)
    try:
        found = form.read(record)
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"has the fields of {form}, but not their values: {error!r}"[:300]) from None
    return form.name, [checked(one, kind) for one in found]


def checked(record: dict, kind: str) -> dict:
    """A record of our own form without any other field; ValueError says what is wrong with it."""
    names = ["prompt"]
    if kind == "pretrain":
        names = ["text"]
        _require(record, "text", (str,), "a text")
        if not record["text"]:
            raise ValueError('"text" is empty')
    elif kind == "sft" and "messages" in record:
        names = ["messages"]
        _require(record, "messages", (list,), "a list of messages")
        if "response" in record:
            raise ValueError('has "messages" and "response": keep one of them')
        check_dialogue(record["messages"], reply=False)
    else:
        _require(record, "prompt", (str, list), "a text or a list of messages")
        if isinstance(record["prompt"], list):
            check_dialogue(record["prompt"], reply=True)
        if kind == "sft":
            names.append("response")
            _require(record, "response", (str,), "a text")
        elif kind == "reward":
            names += _check_feedback(record)
    record = {name: _bare(record[name]) for name in names}
    try:
        json.dumps(record, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError("a lone surrogate, which is half a character: write it whole") from None
    return record


def _bare(value: Any) -> Any:
    """Messages with nothing but role and content; any other value as it is."""
    if not isinstance(value, list):
        return value
    return [{"role": message["role"], "content": message["content"]} for message in value]


# ---- files ---------------------------------------------------------------------------------------

def load_records(path: str | os.PathLike, kind: str, skip_bad: bool = False,
                 fields: dict[str, str] | None = None, say: bool = False) -> list[dict]:
    """The records of a JSON Lines file, for a stage (`kind`: pretrain, sft, reward or ppo), in our own
    form; data/forms.py has the others that are read. fields: `parse_fields`. say: print which form it was.

    UserError names the bad lines and what is wrong with them; with skip_bad they are left out, and
    named in a printed line. It is also raised for a file without records, and for one that mixes
    pairs, labels and scores.
    """
    bad: list[str] = []
    forms: collections.Counter[str] = collections.Counter()
    records = [record for _, record in read_records(path, kind, bad, forms, fields)]
    report_bad(path, kind, bad, len(records), skip_bad)
    if say:
        say_forms(path, forms)
    if kind == "reward" and len({frozenset(r) & {"chosen", "label", "score"} for r in records}) > 1:
        raise UserError(f"{path}: pairs, labels and scores are mixed; keep one kind of feedback in "
                        "a file")
    return records


def read_records(path: str | os.PathLike, kind: str, bad: list[str],
                 forms: collections.Counter[str],
                 fields: dict[str, str] | None = None) -> Iterator[tuple[int, dict]]:
    """(line number, record) of the good records of a file, one after another. Bad lines are added to
    `bad`, the first SHOWN in words, and each good line is counted in `forms`."""
    for number, line in read_lines(path):
        if line.strip(b"\xef\xbb\xbf \t\r\n"):
            try:
                name, records = records_in(parse_line(line), kind, fields)
            except ValueError as error:
                bad.append(f"line {number}: {error}" if len(bad) < SHOWN else "")
            else:
                forms[name if records else TIES] += 1
                yield from ((number, record) for record in records)


def say_forms(path: str | os.PathLike, forms: collections.Counter[str]) -> None:
    """Print how the lines of a file were read."""
    print(f"{path}: read as {', '.join(f'{name} ({n:,})' for name, n in forms.items())}", flush=True)


def report_bad(path: str | os.PathLike, kind: str, bad: list[str], n_good: int,
               skip_bad: bool) -> None:
    """UserError for bad lines, or, with skip_bad, a printed line; UserError for no good ones."""
    more = f"; … {len(bad)} bad lines in all" if len(bad) > SHOWN else ""
    first = "; ".join(bad[:SHOWN]) + more
    if bad and not (skip_bad and n_good):
        raise UserError(f"{path}, {first}; a {kind} record has {FIELDS[kind]}; mend the "
                        "file, or let train.py leave such lines out (--skip_bad)")
    if bad:
        print(f"{path}: {len(bad)} of {len(bad) + n_good} records left out (--skip_bad): {first}")
    if not n_good:
        raise UserError(f"{path}: holds no records; a {kind} file has one JSON object a line, with "
                        f"{FIELDS[kind]}")


def write_records(path: pathlib.Path, records: Iterable[dict]) -> None:
    """Write a JSON Lines file."""
    lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    path.write_text("".join(lines), encoding="utf-8")
