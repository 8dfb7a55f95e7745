"""Records that users bring, one JSON object a line, and how each stage reads them.

    {"text"}                                          pretrain
    {"prompt", "response"} or {"messages": [...]}     sft
    {"prompt", "chosen", "rejected"} or HH's          reward, pairwise (optional "margin")
    {"prompt", "response", "label": 0 or 1}           reward, classification
    {"prompt", "response", "score"}                   reward, regression
    {"prompt"}                                        ppo

A prompt is a text or a list of messages {"role", "content"}. HH's form has no prompt; "chosen" and
"rejected" are then transcripts that differ in their last answer. Every line is checked before
anything is trained.
"""
import json
import math
import os
import pathlib
import re
from collections.abc import Iterable
from typing import Any

from runtime.options import UserError

FIELDS = {"pretrain": "text", "sft": "prompt and response, or messages",
          "reward": "prompt with response and label or score, or chosen and rejected",
          "ppo": "prompt"}


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
    roles = [m.get("role") for m in messages]
    turns = roles[roles[0] == "system":]
    if not turns or turns != (["user", "assistant"] * len(turns))[:len(turns)]:
        raise ValueError(f"roles {roles}: a dialogue is one optional system message, then user and "
                         "assistant in turn")
    if (turns[-1] == "user") != reply:
        raise ValueError("to be continued, a dialogue must end with the user's message" if reply
                         else "a finished dialogue must end with the assistant's message")


# ---- checks --------------------------------------------------------------------------------------

def _require(record: dict, name: str, types: tuple, description: str) -> None:
    """ValueError unless record[name] has one of the types; a bool counts as no number."""
    value = record.get(name)
    if not isinstance(value, types) or isinstance(value, bool):
        shown = json.dumps(value, ensure_ascii=False)[:40]
        raise ValueError(f'"{name}" must be {description}, is {shown}')


def _require_number(record: dict, name: str) -> None:
    """ValueError unless record[name] is a finite number."""
    _require(record, name, (int, float), "a number")
    if not math.isfinite(record[name]):
        raise ValueError(f'"{name}" must be finite')


def _transcript(text: Any) -> list[dict[str, str]]:
    """An HH transcript, `\\n\\nHuman: …\\n\\nAssistant: …`, as messages; [] if it is none."""
    parts = re.split(r"\n\n(Human|Assistant): ?", text)[1:] if isinstance(text, str) else []
    return [{"role": "user" if speaker == "Human" else "assistant", "content": content.strip()}
            for speaker, content in zip(parts[::2], parts[1::2], strict=True)]


def _pair_from_transcripts(record: dict) -> dict:
    """An HH record in the form {"prompt", "chosen", "rejected"}: the turns that both transcripts
    share are the prompt. ValueError if they differ in more than their last answer."""
    chosen, rejected = _transcript(record["chosen"]), _transcript(record["rejected"])
    for messages in (chosen, rejected):
        if not messages or messages[-1]["role"] != "assistant":
            raise ValueError('"chosen" and "rejected" without "prompt" must be transcripts '
                             '"\\n\\nHuman: …\\n\\nAssistant: …"')
    shared = 0
    while (shared < min(len(chosen), len(rejected)) - 1
           and chosen[shared] == rejected[shared]):
        shared += 1
    if len(chosen) - shared != 1 or len(rejected) - shared != 1:
        raise ValueError("the transcripts differ before their last answer")
    margin = {"margin": record["margin"]} if "margin" in record else {}
    return {"prompt": chosen[:shared], "chosen": chosen[-1]["content"],
            "rejected": rejected[-1]["content"], **margin}


def _check_feedback(record: dict) -> None:
    """ValueError unless a reward record has a pair of replies, or one with label or score."""
    if "chosen" in record:
        _require(record, "chosen", (str,), "a text")
        _require(record, "rejected", (str,), "a text")
        if "margin" in record:
            _require_number(record, "margin")
        return
    _require(record, "response", (str,), "a text")
    if "score" in record:
        _require_number(record, "score")
    elif record.get("label") not in (0, 1):
        raise ValueError('needs "label" (0 or 1), "score" (a number), or "chosen" and "rejected"')


def checked(record: Any, kind: str) -> dict:
    """The record in the form of this file's head; ValueError says what is wrong with it."""
    if not isinstance(record, dict):
        raise ValueError("not a JSON object")
    if kind == "reward" and {"chosen", "rejected"} <= set(record) and "prompt" not in record:
        record = _pair_from_transcripts(record)
    if kind == "pretrain":
        _require(record, "text", (str,), "a text")
    elif kind == "sft" and "messages" in record:
        _require(record, "messages", (list,), "a list of messages")
        check_dialogue(record["messages"], reply=False)
    else:
        _require(record, "prompt", (str, list), "a text or a list of messages")
        if isinstance(record["prompt"], list):
            check_dialogue(record["prompt"], reply=True)
        if kind == "sft":
            _require(record, "response", (str,), "a text")
        elif kind == "reward":
            _check_feedback(record)
    json.dumps(record, ensure_ascii=False).encode()  # UnicodeEncodeError for a lone surrogate
    return record


# ---- files ---------------------------------------------------------------------------------------

def load_records(path: str | os.PathLike, kind: str) -> list[dict]:
    """The records of a JSON Lines file, for a stage (`kind`: pretrain, sft, reward or ppo).

    UserError names file and line of a bad record. It is also raised for a file without records, and
    for one that mixes pairs, labels and scores.
    """
    path, records = pathlib.Path(path), []
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    if text := line.decode("utf-8-sig").strip():
                        records.append(checked(json.loads(text), kind))
                except ValueError as error:  # those of UTF-8, JSON and surrogates are ValueErrors
                    reason = {UnicodeDecodeError: "not UTF-8: convert the file, or save it as that",
                              UnicodeEncodeError: "a lone surrogate"}.get(type(error), str(error))
                    raise UserError(f"{path}, line {number}: {reason}; a {kind} record has "
                                    f"{FIELDS[kind]}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    if not records:
        raise UserError(f"{path}: holds no records; a {kind} file has one JSON object a line, with "
                        f"{FIELDS[kind]}")
    if kind == "reward" and len({frozenset(r) & {"chosen", "label", "score"} for r in records}) > 1:
        raise UserError(f"{path}: pairs, labels and scores are mixed; keep one kind of feedback in "
                        "a file")
    return records


def write_records(path: pathlib.Path, records: Iterable[dict]) -> None:
    """Write a JSON Lines file."""
    lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    path.write_text("".join(lines), encoding="utf-8")


def kind_of(record: Any) -> str:
    """The stage that a record is for, by its fields; ppo if it has none of the others."""
    keys = set(record) if isinstance(record, dict) else set()
    if "text" in keys:
        return "pretrain"
    if keys & {"chosen", "label", "score"}:
        return "reward"
    return "sft" if keys & {"messages", "response"} else "ppo"
