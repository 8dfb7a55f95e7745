"""Records that users bring, one JSON object a line, and how each stage reads them.

    {"text"}                                          pretrain
    {"prompt", "response"} or {"messages": [...]}     sft
    {"prompt", "chosen", "rejected"} or HH's          reward, pairwise (optional "margin")
    {"prompt", "response", "label": 0 or 1}           reward, classification
    {"prompt", "response", "score"}                   reward, regression
    {"prompt"}                                        ppo

A prompt is a text or a list of messages {"role", "content"}. Every line is checked before anything is trained.
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
          "reward": "prompt with response and label or score, or chosen and rejected", "ppo": "prompt"}


def apply_template(template: str, prompt: str) -> str:
    """The instruction around a prompt. Only `{prompt}` is replaced: braces in the prompt stay what they are."""
    return template.replace("{prompt}", prompt)


def as_messages(record: dict, template: str) -> list[dict[str, str]]:
    """An sft record as messages: its own, or prompt (in the template) and response."""
    if "messages" in record:
        return record["messages"]
    prompt = record["prompt"]
    asked = prompt if isinstance(prompt, list) else [{"role": "user", "content": apply_template(template, prompt)}]
    return [*asked, {"role": "assistant", "content": record["response"]}]


def prompt_text(prompt: str | list[dict[str, str]]) -> str:
    """A prompt as one text; a list of messages is joined."""
    return prompt if isinstance(prompt, str) else "\n".join(m["content"] for m in prompt)


def check_dialogue(messages: list, reply: bool) -> None:
    """ValueError unless these are one optional system message, then user and assistant in turn, each with a text; with
    `reply` the user speaks last, without it the assistant."""
    if not messages:
        raise ValueError("a dialogue without messages: give at least one from the user")
    if any(not isinstance(m, dict) or not isinstance(m.get("content"), str) for m in messages):
        raise ValueError('each message needs a "role" and a text as "content"')
    roles = [m.get("role") for m in messages]
    turns = roles[roles[0] == "system":]
    if not turns or turns != (["user", "assistant"] * len(turns))[:len(turns)]:
        raise ValueError(f"roles {roles}: a dialogue is one optional system message, then user and assistant in turn")
    if (turns[-1] == "user") != reply:
        raise ValueError("to be continued, a dialogue must end with the user's message" if reply else
                         "a finished dialogue must end with the assistant's message")


def _transcript(text: str) -> list[dict[str, str]]:
    """An HH transcript, `\\n\\nHuman: …\\n\\nAssistant: …`, as messages."""
    parts = re.split(r"\n\n(Human|Assistant): ?", text)[1:]
    return [{"role": "user" if who == "Human" else "assistant", "content": what.strip()}
            for who, what in zip(parts[::2], parts[1::2], strict=True)]


def _check(record: Any, kind: str) -> dict:
    """The record in our form, or a ValueError that says what is wrong."""
    if not isinstance(record, dict):
        raise ValueError("not a JSON object")

    def need(name: str, types: tuple, what: str) -> None:
        if not isinstance(record.get(name), types) or (isinstance(record[name], bool) and bool not in types):
            raise ValueError(f'"{name}" must be {what}, is {json.dumps(record.get(name), ensure_ascii=False)[:40]}')

    if kind == "reward" and {"chosen", "rejected"} <= set(record) and "prompt" not in record:
        chosen, rejected = (_transcript(record[k]) if isinstance(record[k], str) else None
                            for k in ("chosen", "rejected"))
        if not chosen or not rejected or chosen[-1]["role"] != "assistant" or rejected[-1]["role"] != "assistant":
            raise ValueError('"chosen" and "rejected" without "prompt" must be transcripts '
                             '"\\n\\nHuman: …\\n\\nAssistant: …"')
        shared = 0  # the turns before the answers differ are the prompt
        while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
            shared += 1
        if len(chosen) - shared != 1 or len(rejected) - shared != 1:
            raise ValueError("the transcripts differ before their last answer")
        record = {"prompt": chosen[:shared], "chosen": chosen[-1]["content"], "rejected": rejected[-1]["content"],
                  **{k: record[k] for k in ("margin",) if k in record}}
    if kind == "pretrain":
        need("text", (str,), "a text")
    elif kind == "sft" and "messages" in record:
        need("messages", (list,), "a list of messages")
    else:
        need("prompt", (str, list), "a text or a list of messages")
        if kind == "reward" and "chosen" in record:
            need("chosen", (str,), "a text")
            need("rejected", (str,), "a text")
            if "margin" in record:
                need("margin", (int, float), "a number")
                if not math.isfinite(record["margin"]):
                    raise ValueError('"margin" must be finite')
        elif kind in ("sft", "reward"):
            need("response", (str,), "a text")
        if kind == "reward" and "chosen" not in record:
            if "score" in record:
                need("score", (int, float), "a number")
                if not math.isfinite(record["score"]):
                    raise ValueError('"score" must be finite')
            elif record.get("label") not in (0, 1):
                raise ValueError('needs "label" (0 or 1), "score" (a number), or "chosen" and "rejected"')
    for name in ("messages", "prompt"):
        if isinstance(record.get(name), list):
            check_dialogue(record[name], reply=name == "prompt")
    json.dumps(record, ensure_ascii=False).encode()  # a lone surrogate raises here, too
    return record


def load_records(path: str | os.PathLike, kind: str) -> list[dict]:
    """Read JSON Lines for a stage (`kind`: pretrain, sft, reward or ppo); every line is checked."""
    path, records = pathlib.Path(path), []
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    if text := line.decode("utf-8-sig").strip():
                        records.append(_check(json.loads(text), kind))
                except ValueError as error:  # of UTF-8, of JSON, of our checks, or of a lone surrogate
                    what = {UnicodeDecodeError: "not UTF-8: convert the file, or save it as that",
                            UnicodeEncodeError: "a lone surrogate"}.get(type(error), str(error))
                    raise UserError(f"{path}, line {number}: {what}; a {kind} record has {FIELDS[kind]}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    if not records:
        raise UserError(f"{path}: holds no records; a {kind} file has one JSON object a line, with {FIELDS[kind]}")
    if kind == "reward" and len({frozenset({"chosen", "label", "score"} & set(r)) for r in records}) > 1:
        raise UserError(f"{path}: pairs, labels and scores are mixed; keep one kind of feedback in a file")
    return records


def write_records(path: pathlib.Path, records: Iterable[dict]) -> None:
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")


def kind_of(record: Any) -> str:
    """Which stage a user's record is for."""
    keys = set(record) if isinstance(record, dict) else set()
    return ("pretrain" if "text" in keys else "reward" if keys & {"chosen", "label", "score"} else
            "sft" if keys & {"messages", "response"} else "ppo")
