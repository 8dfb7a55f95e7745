"""JSON Lines as every reader here takes them: one JSON value a line, plain or gzipped, whatever the
name of the file.

A line ends at a line feed and nowhere else. `str.splitlines` would also end it at U+2028, U+2029
and U+0085, which JSON leaves in a text as they are.
"""
import contextlib
import gzip
import json
import os
import pathlib
import zlib
from collections.abc import Iterator
from typing import Any

from runtime.terminal import UserError, advice

GZIP = b"\x1f\x8b"  # how such a file begins


def read_lines(path: str | os.PathLike) -> Iterator[tuple[int, bytes]]:
    """(number from 1, line) of each line, its line feed included; gzip is unpacked on the way.
    UserError if the file cannot be read."""
    try:
        with open(path, "rb") as file:
            gzipped = str(path).endswith(".gz") or file.peek(2)[:2] == GZIP
            yield from enumerate(gzip.GzipFile(fileobj=file) if gzipped else file, 1)
    except (OSError, EOFError, zlib.error) as error:  # the last two: a damaged archive
        hint = advice(error) if getattr(error, "errno", None) else "restore the file"
        raise UserError(f"{path}: cannot be read: {error}; {hint}") from None


def parse_line(line: bytes) -> Any:
    """The JSON value of a line; ValueError, with a reason for the user, if it holds none. A byte
    order mark is no part of it."""
    try:
        return json.loads(line.decode("utf-8-sig"), parse_int=_whole_number)
    except UnicodeDecodeError:
        raise ValueError("not UTF-8: convert the file, or save it as that") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise ValueError("brackets nested too deeply") from None


def _whole_number(digits: str) -> int | float:
    """An int; of hundreds of digits a float, perhaps an infinite one: int() refuses thousands."""
    return int(digits) if len(digits) < 300 else float(digits)


def logged(path: pathlib.Path, key: str) -> list[float]:
    """A metric's values in a run's metrics.jsonl. No log is worth a report: without one there are
    none, and lines that are no record are left out."""
    values = []
    for _, line in read_lines(path) if path.is_file() else ():
        with contextlib.suppress(ValueError):
            record = parse_line(line)
            if isinstance(record, dict) and isinstance(record.get(key), int | float):
                values.append(record[key])
    return values
