"""Cells of a table as the values that they stand for: all of them are texts in the file.

Fields that are numbers or lists are converted; in others, a list of messages in JSON is read as one.
"""
import re
from typing import Any

from data.dialogues import are_turns
from runtime.lines import parse_line

NUMBERS = ("score", "margin", "preference")
LISTS = ("scores", "messages", "conversations", "conversation_a", "conversation_b", "context", "completions",
         "answers", "history", "chat")
TALKS = ("prompt", "chosen", "rejected", "completion", "input")  # a text, a message, or a list of them
MESSAGE = re.compile(r"""\s*\[?\s*\{\s*["'](role|content|from|value)["']\s*:""")
NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")


def from_cells(cells: dict[str, str]) -> dict[str, Any]:
    """A record of a table, its numbers and lists as such. ValueError names the field whose text is
    none.

    >>> from_cells({"prompt": "a", "score": "4.5", "scores": "[4, 5]"})
    {'prompt': 'a', 'score': 4.5, 'scores': [4, 5]}
    """
    return {name: number(name, text) if name in NUMBERS else
            json_value(name, text) if name in LISTS or name in TALKS and MESSAGE.match(text) else text
            for name, text in cells.items()}


def number(name: str, text: str) -> int | float:
    """The number that a cell holds."""
    text = text.strip()
    if not NUMBER.fullmatch(text):
        raise ValueError(f'"{name}" is "{text[:40]}", not a number: write it like 4.5')
    return int(text) if text.lstrip("+-").isdecimal() and len(text) < 300 else float(text)


def json_value(name: str, text: str) -> Any:
    """The value of a cell that holds JSON. What only looks like messages stays a text."""
    try:
        value = parse_line(text.encode())
    except ValueError as error:
        raise ValueError(f'"{name}" must hold JSON, such as [{{"role": "user", "content": "Hi"}}], with '
                         f"double quotation marks: {error}") from None
    message = isinstance(value, dict) and are_turns([value])
    return value if name in LISTS or message or are_turns(value) else text
