"""The log of answers: feedback.jsonl, one event a line, appended, synced, and only then confirmed.

    log = FeedbackLog("feedback.jsonl")
    log.append({"annotator": "me", "kind": "pair", "prompt": "Hi", "chosen": "Hello", "rejected": "?"})

Nothing in it is ever rewritten: an undo is an event of its own. A kill at any moment loses at most the
event that was being written, which nobody was told is saved. One process at a time holds the file.
data/answers.py says which events hold, serve/exports.py what they teach.
"""
import contextlib
import datetime
import json
import os
import pathlib
import re
import secrets
import sys
import threading
from collections.abc import Iterable
from typing import Any, BinaryIO

from data.answers import GONE, KINDS, fates, is_event, value_of
from data.folders import sync
from data.records import checked
from runtime.lines import parse_line
from runtime.options import UserError
from runtime.storage import open_plain
from runtime.terminal import advice
from serve.exports import (OWN, training_records as training_records, write_data as write_data,  # for importers
                           write_exported)

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

ID = re.compile("[0-9a-f]{16}")
CHOICES = ("left", "right", "tie", "both_bad")
LOCKED = 2**40  # the byte that is locked on Windows, where nobody can read a locked one
NEEDED = {"pair": ("chosen", "rejected"), "rating": ("response", "score"), "label": ("response", "label"),
          "edit": ("response", "original"), "skip": ("card",), "undo": ("of",)}
START = b'{"id": "'  # of every line


class NotSaved(UserError, OSError):
    """An event could not be written: the log is as it was before. reason: why, without any path."""

    def __init__(self, path: pathlib.Path, reason: str):
        super().__init__(f"{path}: not saved: {reason}")
        self.reason = reason

    __str__ = Exception.__str__


class FeedbackLog:
    """A log that this process alone appends to; several threads may."""

    def __init__(self, path: str | os.PathLike):
        """Open the log, or begin it. UserError if another process has it, if it holds other lines than
        events, or if it cannot be written."""
        self.path = pathlib.Path(path)
        self.lock = threading.RLock()
        self.found: list[dict] = []
        self.by_id: dict[str, dict] = {}
        self.broken = ""  # why nothing more is appended
        self.known: tuple[int, dict[str, str]] = (0, {})  # the fates of so many events
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.file = open_plain(self.path, "a+b", follow=True)
            try:
                hold(self.file, self.path)
                self.end = self._load()
                sync(self.path.resolve().parent)  # so that its name is there after a power cut, too
            except BaseException:
                self.file.close()
                raise
        except OSError as error:
            raise UserError(f"{self.path}: cannot be opened for answers: {error.strerror or error}; "
                            f"{advice(error)}") from error

    def __enter__(self) -> "FeedbackLog":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let another process have the file."""
        with self.lock:
            self.broken = "the log is closed"
            self.file.close()

    # ---- reading ---------------------------------------------------------------------------------

    @property
    def events(self) -> list[dict]:
        """All events, in their order."""
        with self.lock:
            return list(self.found)

    def get(self, id: str) -> dict | None:
        """The event with this id."""
        return self.by_id.get(id)

    def standing(self) -> list[dict]:
        """The events that hold: without undos, what these took back, and what was answered anew."""
        with self.lock:
            if self.known[0] != len(self.found):
                self.known = len(self.found), fates(self.found)
            known = self.known[1]
            return [event for event in self.found if known.get(event["id"]) not in GONE]

    def last(self, annotator: str) -> dict | None:
        """The last answer or skip of a card by this annotator that holds: what an undo takes back."""
        return next((event for event in reversed(self.standing()) if event["annotator"] == annotator
                     and event["kind"] not in ("edit", "undo") and "card" in event), None)

    def undo(self, annotator: str, id: str | None = None) -> dict | None:
        """Take back the annotator's last answer, and return it; None without any. id: of the undo itself, so
        that a request that comes twice takes back one answer."""
        with self.lock:
            if (stored := self.by_id.get(str(id))) is not None:
                return self.by_id[stored["of"]] if stored["kind"] == "undo" else None
            if (event := self.last(annotator)) is not None:
                self.append({"id": id or secrets.token_hex(8), "annotator": annotator, "kind": "undo",
                             "of": event["id"]})
            return event

    def _load(self) -> int:
        """Read what is there and set aside what was not written whole; the length of what stays."""
        self.file.seek(0)
        events, end, torn = parsed(self.file.read(), self.path)
        for event in events:
            self._remember(event)
        if torn:
            if is_event(event := value_of(torn)) and not torn.endswith(b"\n"):  # an editor took its line break
                self._remember(event)
                self._write(b"\n", end + len(torn))
                return end + len(torn) + 1
            self._set_aside(torn, end)
        return end

    def _set_aside(self, torn: bytes, end: int) -> None:
        """Move the torn end of the log into the file beside it."""
        beside = self.path.with_name(self.path.name + ".torn")
        with open_plain(beside, "ab") as file:
            file.write(torn.rstrip(b"\n") + b"\n")
            file.flush()
            os.fsync(file.fileno())
        os.ftruncate(self.file.fileno(), end)
        os.fsync(self.file.fileno())
        print(f"{self.path}: its last line was not written whole, so nobody was told that it is saved; it is kept "
              f"in {beside.name}", file=sys.stderr)

    def _remember(self, event: dict) -> None:
        if self.by_id.setdefault(event["id"], event) is event:  # a file joined from two may have it twice
            self.found.append(event)

    # ---- writing ---------------------------------------------------------------------------------

    def append(self, record: dict[str, Any]) -> dict[str, Any]:
        """Add an event and return it, with id and time, once it is on the disk. Of an id that is in the log
        already the stored event is returned, and nothing is written: a request may come twice.

        ValueError says what is wrong with the record; NotSaved that it could not be written. The log is
        as it was after both.
        """
        with self.lock:
            if (stored := self.by_id.get(str(record.get("id")))) is not None:
                return stored
            now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="milliseconds")
            event = {"id": secrets.token_hex(8), "time": now, **record}
            event = {name: value for name, value in event.items() if value is not None}
            check_event(event)
            if event["kind"] == "undo" and self.by_id.get(event["of"], event)["kind"] == "undo":
                raise ValueError('"of" must be the id of an answer in this log')
            line = json.dumps(event, ensure_ascii=False, allow_nan=False).encode()
            self._write(line + b"\n", self.end)
            self.end += len(line) + 1
            event = json.loads(line)
            self._remember(event)
            return event

    def _write(self, line: bytes, end: int) -> None:
        """Put these bytes behind the `end` bytes that are there, and wait until they are on the disk; the
        file is cut back if that fails, or is interrupted. NotSaved says why."""
        if self.broken:
            raise NotSaved(self.path, self.broken)
        handle = self.file.fileno()
        require_same(self.path, handle, end)
        try:
            left = memoryview(line)
            while left:
                left = left[os.write(handle, left):]
            os.fsync(handle)
        except BaseException as error:
            self._cut_back(end)
            if isinstance(error, OSError):
                raise NotSaved(self.path, f"{error.strerror or error}; {advice(error)}") from error
            raise

    def _cut_back(self, end: int) -> None:
        """Leave `end` bytes; where that fails nothing more is appended, or it would join half a line."""
        try:
            os.ftruncate(self.file.fileno(), end)
        except OSError as error:
            self.broken = f"an earlier answer could not be taken out again ({error.strerror}): start anew"
        with contextlib.suppress(OSError):  # the next append tells
            os.fsync(self.file.fileno())


# ---- events ----------------------------------------------------------------------------------------

def check_event(event: Any) -> None:
    """ValueError unless this is an event whose fields fit each other."""
    if not is_event(event):
        raise ValueError(f'an answer needs "id", "annotator" and "kind", one of {", ".join(KINDS)}')
    kind = event["kind"]
    if not ID.fullmatch(event["id"]):
        raise ValueError('"id" must have 16 digits of 0-9 and a-f')
    if not event["annotator"].strip():
        raise ValueError('"annotator" must be a name')
    datetime.datetime.fromisoformat(str(event.get("time", "2000-01-01")))
    for name in NEEDED[kind]:
        if name not in event:
            raise ValueError(f'an event of the kind {kind} needs "{name}"')
    if kind in ("pair", "rating", "label", "edit"):
        checked(event, "sft" if kind == "edit" else "reward")
    if kind == "pair":
        check_choice(event)
    if kind == "edit" and not isinstance(event["original"], str):
        raise ValueError('"original" must be a text')
    if event.get("strength", 0) not in (0, 1, 2, 3):
        raise ValueError('"strength" must be 0, 1, 2 or 3')


def check_choice(event: dict) -> None:
    """ValueError unless what was pressed is what is stored as chosen."""
    choice, tie = event.get("choice"), bool(event.get("tie"))
    if choice is None:  # imported
        return
    if choice not in CHOICES:
        raise ValueError(f'"choice" must be one of {", ".join(CHOICES)}')
    if tie != (choice in CHOICES[2:]) or bool(event.get("both_bad")) != (choice == "both_bad"):
        raise ValueError(f'"choice" is {choice}, but "tie" or "both_bad" says something else')
    if not tie and event.get(choice, event["chosen"]) != event["chosen"]:
        raise ValueError(f'"choice" is {choice}, but "chosen" is another reply')


# ---- files -----------------------------------------------------------------------------------------

def hold(file: BinaryIO, path: pathlib.Path) -> None:
    """Lock an open file until it is closed, or its process ends in any way; UserError if another has it."""
    try:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            import msvcrt
            file.seek(LOCKED)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    except OSError as error:
        if isinstance(error, BlockingIOError | PermissionError):
            raise UserError(f"{path}: another server or terminal appends to it: stop that one, or give another "
                            "--to") from None
        raise


def require_same(path: pathlib.Path, handle: int, end: int) -> None:
    """NotSaved unless the open file is the one of this name, `end` bytes long."""
    here = os.fstat(handle)
    with contextlib.suppress(FileNotFoundError):
        if os.path.samestat(here, os.stat(path)) and here.st_size == end:
            return
    raise NotSaved(path, "another program changed, moved or removed the log while it was open here: look at it, "
                         "then start anew")


def parsed(content: bytes, path: pathlib.Path) -> tuple[list[dict], int, bytes]:
    """(events, their bytes, the bytes behind them) of a log: what follows the last line break, or, where
    that is nothing, a last line that is none. UserError for any other line that is no event."""
    lines, events, end = content.split(b"\n"), [], 0
    torn = lines.pop()
    for number, line in enumerate(lines, 1):
        try:
            event = parse_line(line) if line.strip() else None
            if event is not None:
                check_event(event)
        except ValueError as error:
            if number == len(lines) and events and not torn:
                return events, end, line + b"\n"
            raise UserError(f"{path}, line {number}: {error}; it is no log of answers: give another file, or mend "
                            "or remove this line") from None
        events += [event] * (event is not None)
        end += len(line) + 1
    if torn.strip(b"\0") and not events and not torn.startswith(START[:len(torn)]):
        raise UserError(f"{path}: its only line is no answer: it is no log of answers: give another file")
    return events, end, torn


def read_events(path: str | os.PathLike) -> list[dict]:
    """The events of a log that is not opened for writing; another process may append to it. UserError if
    it cannot be read, or is no log."""
    path = pathlib.Path(path)
    try:
        with open_plain(path, "rb", follow=True) as file:
            events, _, torn = parsed(file.read(), path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}; {advice(error)}") from None
    events += [event for event in [value_of(torn)] if is_event(event)]
    return list({event["id"]: event for event in events}.values())


def export_log(path: str | os.PathLike, folder: str | os.PathLike, to: str = OWN, template: str = "{prompt}") -> None:
    """Write a log's answers into a folder: for `train.py --data FOLDER` ("mosslet"), or for a tool of
    data/export.py. What is written and left out is printed. UserError if a file is there already."""
    write_exported(read_events(path), folder, to, template)


def append_all(log: FeedbackLog, records: Iterable[dict]) -> int:
    """Append events and return how many of them are new."""
    before = len(log.events)
    for record in records:
        log.append(record)
    return len(log.events) - before
