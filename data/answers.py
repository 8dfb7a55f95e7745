"""The log of answers that people gave on the feedback page, as the stages read it.

    {"id", "time", "annotator", "kind": "pair", "prompt", "chosen", "rejected", …}

serve/log.py appends one event a line and never changes any. Which of them still hold follows from those
behind them: an undo names the answer that it takes back. So a log is gone through twice, first for the
`fates` of its events.
"""
import os
from collections.abc import Iterable, Iterator
from typing import Any

from data.dialogues import EQUAL, Useless
from runtime.lines import parse_line, read_lines
from runtime.rows import BLANK

KINDS = ("pair", "rating", "label", "edit", "skip", "undo")
# Why an event teaches nothing. Those in GONE do not hold; the others do, and are no training data.
UNDONE, UNDO, CHANGED, SKIPPED, REPEATED = ("undone", "undo", "answered anew", "skipped",
                                            "repeated with sides swapped")
GONE = (UNDONE, UNDO, CHANGED)
LONGEST = 2**24  # bytes of a first line that is looked into


def is_event(value: Any) -> bool:
    """Is this a line of a log of answers, with such fields as say which of them hold?"""
    return (isinstance(value, dict) and value.get("kind") in KINDS
            and all(isinstance(value.get(name), str) for name in ("id", "annotator"))
            and all(isinstance(value.get(name, ""), str) for name in ("of", "card", "again")))


def fates(events: Iterable[dict]) -> dict[str, str]:
    """{id of an event that teaches nothing: why}.

    Undone is what an undo names, with its edit. Of several answers by one annotator to one card the
    last holds, and a skip holds only where no answer does.

    >>> fates([{"id": "a", "kind": "pair"}, {"id": "b", "kind": "undo", "of": "a"}])
    {'a': 'undone', 'b': 'undo'}
    """
    events = list(events)
    taken_back = {event.get("of") for event in events if event["kind"] == "undo"}
    found: dict[str, str] = {}
    last: dict[tuple, dict] = {}  # the answer that holds, by annotator and card
    for event in events:
        if event["kind"] == "undo":
            found[event["id"]] = UNDO
        elif event["id"] in taken_back or event["kind"] == "edit" and event.get("of") in taken_back:
            found[event["id"]] = UNDONE
        elif event.get("again"):
            found[event["id"]] = REPEATED
        elif event["kind"] == "skip":
            found[event["id"]] = SKIPPED
        if found.get(event["id"]) in GONE or event["kind"] == "edit" or not event.get("card"):
            continue
        place = (event.get("annotator"), event["card"])
        earlier = last.get(place)
        if earlier is None or event["kind"] != "skip":
            last[place] = event
        if earlier is not None:
            found[(event if event["kind"] == "skip" else earlier)["id"]] = CHANGED
    return found


def record_of(event: dict, stage: str) -> dict:
    """The record of an event for a stage: an edit is a dialogue to learn, and for the reward model a pair
    in which the edited reply is better. Useless if it is no different from the original one."""
    if event["kind"] != "edit" or stage != "reward":
        return event
    if event["response"] == event["original"]:
        raise Useless(EQUAL)
    return {"prompt": event["prompt"], "chosen": event["response"], "rejected": event["original"]}


# ---- files ---------------------------------------------------------------------------------------

def log_fates(path: str | os.PathLike) -> dict[str, str] | None:
    """The `fates` of the events of a file; None if the file is no log: its first line is no event."""
    first = next((line for _, line in read_lines(path) if line.strip(BLANK)), b"")
    return fates(events_in(path)) if len(first) < LONGEST and is_event(value_of(first)) else None


def events_in(path: str | os.PathLike) -> Iterator[dict]:
    """The events of a file. Other lines are passed over: whoever reads the records reports them."""
    return filter(is_event, (value_of(line) for _, line in read_lines(path)))


def value_of(line: bytes) -> Any:
    """The JSON value of a line; None if it holds no object."""
    try:
        return parse_line(line) if line.lstrip(BLANK)[:1] == b"{" else None
    except ValueError:
        return None


def standing_record(value: Any, stage: str, known: dict[str, str] | None) -> Any:
    """A record of a file as its stage reads it: of a log, whose `fates` are known, that of the event.
    Useless if the event teaches nothing. Any other value as it is."""
    if known is None or not is_event(value):
        return value
    if value["id"] in known:
        raise Useless(known[value["id"]])
    return record_of(value, stage)
