"""What requests say, checked: texts, numbers, ids, dialogues; and what answers may say.

Whatever is wrong raises ValueError, which serve/app.py answers with 400.
"""
import json
import math
import re
import secrets
from collections.abc import Mapping
from typing import Any

from runtime.lines import each_name_once, whole_number
from serve.log import ID
from serve.pairs import Card

LONGEST_NAME, LONGEST_COMMENT, LONGEST_TEXT = 60, 10_000, 100_000
MOST_MESSAGES = 200
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")
ABSOLUTE = re.compile(r"(?:\b[A-Za-z]:(?=\\)|(?<![\w.:/\\]))[/\\](?:[^\s'\":;,/\\]+[/\\])+(?=[^\s'\":;,/\\])")


class Wrong(Exception):
    """A request that cannot be met: its HTTP status, and why."""

    def __init__(self, status: int, text: str):
        super().__init__(text)
        self.status = status


def without_paths(text: str) -> str:
    """A message with the last part of each absolute path alone.

    >>> without_paths("/home/me/out/a.pt: cannot be read")
    'a.pt: cannot be read'
    """
    return ABSOLUTE.sub("", text)


# ---- what a request says -------------------------------------------------------------------------

def no_number(name: str) -> None:
    raise ValueError(f"{name} is no number")


def read_json(text: bytes) -> Any:
    """A JSON value; ValueError for what is none, NaN and infinities included."""
    try:
        return json.loads(text, parse_constant=no_number, parse_int=whole_number, object_pairs_hook=each_name_once)
    except RecursionError:
        raise ValueError("brackets nested too deeply") from None


def text_of(body: Mapping[str, Any], name: str, most: int, default: str | None = None) -> str:
    """A text of a request; ValueError if it is none, too long, or no Unicode."""
    value = body.get(name)
    if value is None and default is not None:
        return default
    if not isinstance(value, str) or len(value) > most or default is None and not value.strip():
        raise ValueError(f'"{name}" must be a text of up to {most:,} characters')
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f'"{name}" holds half a character') from None
    return value


def number_of(body: Mapping[str, Any], name: str, low: float, high: float, whole: bool = False) -> Any:
    """A number of a request, None if it is not given; ValueError if it is none, or out of range."""
    value = body.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int if whole else int | float) or not low <= value <= high:
        raise ValueError(f'"{name}" must be a {"whole " * whole}number from {low:g} to {high:g}')
    return value


def annotator_of(body: Mapping[str, Any]) -> str:
    """The annotator's name. ValueError for one that would look like another in a table or a terminal: with line
    breaks, control characters, or marks that turn the direction of writing."""
    name = text_of(body, "annotator", LONGEST_NAME).strip()
    if CONTROL.search(name):
        raise ValueError('"annotator" must be a name on one line')
    return name


def id_of(body: Mapping[str, Any]) -> str:
    """The id that a page made for its request, so that it may come twice."""
    id = body.get("id")
    if id is None:
        return secrets.token_hex(8)
    if not isinstance(id, str) or not ID.fullmatch(id):
        raise ValueError('"id" must have 16 digits of 0-9 and a-f')
    return id


def edit_of(body: Mapping[str, Any], card: Card) -> tuple[str, str]:
    """(side, text) of the edited reply; ("", "") without one."""
    edited = body.get("edited")
    if edited is None:
        return "", ""
    sides = ("left", "right")[:len(card.replies)]
    if not isinstance(edited, dict) or edited.get("side", "left") not in sides:
        raise ValueError(f'"edited" must be an object of "side", {" or ".join(sides)}, and "text"')
    side, text = edited.get("side", "left"), text_of(edited, "text", LONGEST_TEXT)
    return (side, text) if text != card.shown[sides.index(side)] else ("", "")


def dialogue_of(body: Mapping[str, Any]) -> tuple[list[dict[str, str]], str]:
    """(the turns before it, the reply) of a chat's messages, the last of which is the reply."""
    messages, turns = body.get("messages"), []
    if not isinstance(messages, list) or not 2 <= len(messages) <= MOST_MESSAGES:
        raise ValueError('"messages" must be a list of messages that ends with the reply')
    for message in messages:
        if not isinstance(message, dict) or message.get("role") not in ("system", "user", "assistant"):
            raise ValueError('each of "messages" must have a role: system, user or assistant')
        turns.append({"role": message["role"], "content": text_of(message, "content", LONGEST_TEXT, "")})
    reply = turns.pop()
    if reply["role"] != "assistant":
        raise ValueError('the last of "messages" must be the reply, of the role assistant')
    return turns, reply["content"]


def finite(value: Any) -> Any:
    """A JSON value in which numbers that are not finite are None: JSON has none of them."""
    if isinstance(value, dict):
        return {name: finite(x) for name, x in value.items()}
    if isinstance(value, list | tuple):
        return [finite(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
