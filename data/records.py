"""Records that users bring, and how each stage reads them.

    {"text"}                                          pretrain
    {"prompt", "response"} or {"messages": [...]}     sft
    {"prompt", "chosen", "rejected"}                  reward, pairwise; optional "margin", or "tie": true
    {"prompt", "response", "label": 0 or 1}           reward, classification
    {"prompt", "response", "score"}                   reward, regression; "scores": what each person gave
    {"prompt"}                                        ppo; other fields are kept under "extra"

A prompt is a text or a list of messages {"role", "content"}. "part" names the head of a reward model
that learns from a record. runtime/rows.py reads the kinds of files, data/forms.py the forms of other
tools. Every line is checked before anything is trained.
"""
import collections
import contextlib
import json
import math
import os
import pathlib
import statistics
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from data.answers import log_fates, standing_record
from data.dialogues import NO_ANSWER, NO_TURNS, Useless, transcript
from data.forms import TIES, as_flag, form_of, renamed
from runtime.options import UserError
from runtime.rows import read_rows
from runtime.terminal import remedy

FIELDS = {"pretrain": "text", "sft": "prompt and response, or messages",
          "reward": "prompt with response and label, score or scores, or chosen and rejected",
          "ppo": "prompt"}
LEFT_OUT = "left out: "  # begins what is counted beside the forms of a file, before its reason
KEPT = ("margin", "tie", "part")  # of a record of feedback in any form
MOST = 1e15  # size of a score
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
    turn, each with a text. The last one must be the user's if `reply`, else the assistant's. Useless
    if it is their order alone that is wrong."""
    if not messages:
        raise ValueError("a dialogue without messages: give at least one from the user")
    if any(not isinstance(m, dict) or not isinstance(m.get("content"), str) for m in messages):
        raise ValueError('each message needs a "role" and a text as "content"')
    if any(m.get(name) for m in messages for name in ("tool_calls", "function_call")):
        raise ValueError("a message calls a tool, which is no text: leave such dialogues out")
    roles = [m.get("role") for m in messages]
    turns = roles[roles[0] == "system":]
    if not turns or turns != (["user", "assistant"] * len(turns))[:len(turns)]:
        raise Useless(NO_TURNS, f"roles {str(roles)[:60]}: a dialogue is one optional system message, then "
                                "user and assistant in turn")
    if (turns[-1] == "user") != reply:
        raise (Useless("no question before the answer", "to be continued, a dialogue must end with the user's message")
               if reply else Useless(NO_ANSWER, "a finished dialogue must end with the assistant's message"))


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


def _feedback(record: dict) -> dict[str, Any]:
    """The fields of a reward record's feedback: ValueError unless it has a pair of replies, or one
    with label, score or scores, and nothing else of these: it would be lost in silence."""
    given = [name for name in ("chosen", "label", "score", "scores") if name in record]
    if len(given) > 1 and given != ["score", "scores"]:
        raise ValueError(f'has "{given[0]}" and "{given[1]}", two kinds of feedback: keep one')
    if "chosen" in record:
        return _pair(record)
    _require(record, "response", (str,), "a text")
    if "scores" in record:
        return {"response": record["response"], "score": _mean_score(record), "scores": record["scores"]}
    if "score" in record:
        _require_number(record, "score", MOST)
        return {"response": record["response"], "score": record["score"]}
    return {"response": record["response"], "label": _label(record)}


def _pair(record: dict) -> dict[str, Any]:
    """The fields of a comparison, its "tie" only if it is one."""
    for name in ("chosen", "rejected"):
        _require(record, name, (str,), "a text")
    if record["chosen"] == record["rejected"]:
        raise ValueError('"chosen" and "rejected" are equal: nothing is preferred')
    found = {"chosen": record["chosen"], "rejected": record["rejected"]}
    tie = as_flag(record.get("tie", record.get("winner") in TIES))
    if tie not in (0, 1):
        raise ValueError(f'"tie" must be true or false, is {json.dumps(tie)[:40]}')
    if tie and "margin" in record:
        raise ValueError('a tie has no "margin": leave one of the two out')
    if "margin" in record:  # a distance of raw scores, which are of the size of 1
        _require_number(record, "margin", 1e3)
        found["margin"] = record["margin"]
    return found | ({"tie": True} if tie else {})


def _mean_score(record: dict) -> float:
    """The mean of the scores that several people gave; ValueError if a "score" beside them is not it."""
    scores = record["scores"]
    if not isinstance(scores, list) or not scores:
        raise ValueError('"scores" must be a list of numbers, what each person gave')
    for i, score in enumerate(scores):
        _require_number({f"scores[{i}]": score}, f"scores[{i}]", MOST)
    mean = statistics.fmean(scores)
    if "score" in record:
        _require_number(record, "score", MOST)
        if not math.isclose(record["score"], mean, rel_tol=.01, abs_tol=.01):
            raise ValueError(f'"score" is {record["score"]:g}, the mean of "scores" {mean:g}: leave "score" out')
    return mean


def _label(record: dict) -> int:
    """A label as 0 or 1; ValueError says how to mend other classes: which of them is liked is not
    guessed."""
    if "label" not in record:
        raise ValueError('needs "label" (0 or 1), "score" (a number), or "chosen" and "rejected"')
    label = as_flag(record["label"])
    if isinstance(label, int | float) and label in (0, 1):
        return int(label)
    mend = "write 1 for what is liked and 0 for what is not"
    with contextlib.suppress(TypeError, ValueError):
        if abs(float(label)) != 1:
            mend = "ratings are read as scores: " + remedy("fields", "--fields score=label", 'call the field "score"')
    raise ValueError(f'"label" must be 0 or 1 (true or false), is {json.dumps(label)[:40]}: {mend}')


def records_in(record: Any, kind: str, fields: dict[str, str] | None = None) -> tuple[str, list[dict]]:
    """(the name of a line's form, its records in the form of this file's head); ValueError says what
    is wrong with it, and Useless that it teaches nothing: in our own form that is a fault. A ranked list holds
    several records. fields: `parse_fields`."""
    record = renamed(record, fields)
    form = form_of(record, kind)
    kept = {name: record[name] for name in KEPT if kind == "reward" and name in record}
    if kind == "ppo":  # a reward in Python may read them
        kept = {"extra": {name: value for name, value in record.items() if name not in form.fields}}
    try:
        try:
            found = form.read(record)
        except KeyError as error:
            raise ValueError(f"has the fields of {form}, but {error} is missing in one of them"[:300]) from None
        except (LookupError, TypeError, AttributeError, json.JSONDecodeError):
            raise ValueError(f"has the fields of {form}, but a value of another kind than that form: "
                             "docs/data.md shows it") from None
        return form.name, [checked(one | kept, kind) for one in found]
    except Useless as reason:
        if form.ours and not transcript(record.get("prompt")):
            raise ValueError(str(reason)) from None
        raise


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
    feedback = {}
    if kind == "reward":
        feedback = _feedback(record)
        if "part" in record:
            _require(record, "part", (str,), "a text, the name of a part")
            feedback["part"] = record["part"]
    more = {"extra": record["extra"]} if kind == "ppo" and record.get("extra") else feedback
    record = {name: _bare(record[name]) for name in names} | more
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
    """The records of a file, for a stage (`kind`: pretrain, sft, reward or ppo), in our own form;
    data/forms.py has the others that are read. fields: `parse_fields`. say: print which form it was.

    UserError names the bad lines and what is wrong with them; with skip_bad they are left out, and
    named in a printed line. Lines that teach nothing are left out in any case, and counted in a
    printed line. UserError, too, for a file without records, and for one that mixes pairs, labels and
    scores.
    """
    bad: list[str] = []
    forms: collections.Counter[str] = collections.Counter()
    records = [record for _, record in read_records(path, kind, bad, forms, fields)]
    report_bad(path, kind, bad, len(records), skip_bad, forms)
    if say:
        say_forms(path, forms)
    if kind == "reward" and len({frozenset(r) & {"chosen", "label", "score"} for r in records}) > 1:
        raise UserError(f"{path}: pairs, labels and scores are mixed; " + (
            "keep one kind of feedback in a file" if log_fates(path) is None else
            f"`python -m serve export {path} --out FOLDER` makes a folder in which each kind has a file"))
    return records


def read_records(path: str | os.PathLike, kind: str, bad: list[str],
                 forms: collections.Counter[str],
                 fields: dict[str, str] | None = None) -> Iterator[tuple[int, dict]]:
    """(number of its row, record) of the good records of a file, one after another. Bad lines are added
    to `bad`, the first SHOWN in words; each good line is counted in `forms`, and each that teaches
    nothing, too, by LEFT_OUT and its reason: of a log of answers those that do not hold."""
    known = log_fates(path)
    for row in read_rows(path, progress=True):
        try:
            name, records = records_in(standing_record(row.value(), kind, known), kind, fields)
        except Useless as useless:
            forms[LEFT_OUT + useless.reason] += 1
        except ValueError as error:
            bad.append(f"{row.place}: {error}" if len(bad) < SHOWN else "")
        else:
            forms[name] += 1
            yield from ((row.number, record) for record in records)


def say_forms(path: str | os.PathLike, forms: Mapping[str, int]) -> None:
    """Print how the lines of a file were read."""
    read = {name: n for name, n in forms.items() if not name.startswith(LEFT_OUT)}
    print(f"{path}: read as {', '.join(f'{name} ({n:,})' for name, n in read.items())}", flush=True)


def report_bad(path: str | os.PathLike, kind: str, bad: list[str], n_good: int,
               skip_bad: bool, forms: Mapping[str, int]) -> None:
    """UserError for bad lines, or, with skip_bad, a printed line; UserError for no good ones. A printed
    line for those that teach nothing."""
    more = f"; … {len(bad)} bad lines in all" if len(bad) > SHOWN else ""
    first = "; ".join(bad[:SHOWN]) + more
    if bad and not (skip_bad and n_good):
        raise UserError(f"{path}, {first}; a {kind} record has {FIELDS[kind]}; mend the file"
                        + remedy("skip_bad", ", or leave such lines out with --skip_bad"))
    useless = {name.removeprefix(LEFT_OUT): n for name, n in forms.items() if name.startswith(LEFT_OUT)}
    reasons = ", ".join(f"{reason} ({n:,})" for reason, n in useless.items())
    if useless and not n_good:
        raise UserError(f"{path}: holds no record that teaches anything: {reasons}")
    if not n_good:
        raise UserError(f"{path}: holds no records; a {kind} record has {FIELDS[kind]}")
    if bad:
        print(f"{path}: {len(bad)} of {len(bad) + n_good} records left out (--skip_bad): {first}")
    if useless:
        print(f"{path}: {sum(useless.values()):,} of {sum(forms.values()) + len(bad):,} lines left out, which "
              f"teach nothing: {reasons}", flush=True)


def write_records(path: pathlib.Path, records: Iterable[dict]) -> None:
    """Write a JSON Lines file."""
    lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    path.write_text("".join(lines), encoding="utf-8")
