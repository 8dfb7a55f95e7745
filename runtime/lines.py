"""Lines of files as every reader here takes them, plain or gzipped, and the JSON value of a line.
runtime/rows.py reads records from them, of tables and JSON arrays, too.

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

from runtime.file_progress import FileProgress
from runtime.terminal import UserError, advice

GZIP = b"\x1f\x8b"  # how such a file begins
OTHERS = {b"BZh": "a .bz2 file", b"\xfd7zXZ": "an .xz file", b"(\xb5/\xfd": "a .zst file",
          b"7z\xbc\xaf": "a .7z archive", b"Rar!": "a .rar archive", b"PAR1": "a Parquet file",
          b"PK\x03\x04": "a .zip archive, or a spreadsheet: save that as CSV UTF-8",
          b"\xd0\xcf\x11\xe0": "a spreadsheet: save it as CSV UTF-8",
          b"\xff\xfe": "text in UTF-16", b"\xfe\xff": "text in UTF-16"}
LONGEST = 2**28  # bytes of a line
UNPACKED = 2**30  # bytes that any archive may unpack to; a larger one holds at most
TIMES = 200  # times its own size: JSON Lines come to 20, and a bomb to 1000
STEP = 2**20  # bytes between two looks at the progress


def read_lines(path: str | os.PathLike, progress: bool = False) -> Iterator[tuple[int, bytes]]:
    """(number from 1, line) of each line, its line feed included; gzip is unpacked on the way.
    progress: show how much of the file is read. UserError if it cannot be read."""
    try:
        with (open(path, "rb") as file,
              FileProgress(path, file) if progress else contextlib.nullcontext() as bar):
            gzipped = str(path).endswith(".gz") or file.peek(2)[:2] == GZIP
            size = os.fstat(file.fileno()).st_size
            lines, total, number = gzip.GzipFile(fileobj=file) if gzipped else file, 0, 0
            shown = 0
            _refuse_others(path, lines.peek(512)[:512])
            while line := lines.readline(LONGEST + 1):
                number, total = number + 1, total + len(line)
                if bar and total >= shown + STEP:
                    shown = total
                    bar.update()
                if len(line) > LONGEST:
                    raise UserError(f"{path}, line {number}: is longer than {LONGEST / 1e6:.0f} MB: "
                                    "divide it into several records")
                if gzipped and total > max(UNPACKED, TIMES * size):
                    raise UserError(f"{path}: unpacks to more than {TIMES} times its size, as no text "
                                    "does: unpack it yourself if it is what you mean")
                yield number, line
    except (OSError, EOFError, zlib.error) as error:  # the last two: a damaged archive
        hint = advice(error) if getattr(error, "errno", None) else "restore the file"
        raise UserError(f"{path}: cannot be read: {error}; {hint}") from None


def _refuse_others(path: str | os.PathLike, head: bytes) -> None:
    """UserError for what is no text in UTF-8, by how it begins: its lines would be called bad ones,
    and --skip_bad would read on behind a tar archive's first record."""
    what = next((what for mark, what in OTHERS.items() if head.startswith(mark)), "")
    if head[257:262] == b"ustar":
        what = "a .tar archive"
    if what:
        raise UserError(f"{path}: is {what}, which is not read: give JSON Lines, .json, .csv or "
                        ".tsv in UTF-8, plain or as .gz")


def parse_line(line: bytes) -> Any:
    """The JSON value of a line; ValueError, with a reason for the user, if it holds none. A byte
    order mark is no part of it."""
    try:
        return json.loads(line.decode("utf-8-sig"), parse_int=whole_number,
                          object_pairs_hook=each_name_once)
    except UnicodeDecodeError:
        raise ValueError("not UTF-8: convert the file, or save it as that") from None
    except json.JSONDecodeError as error:
        hint = ("; its NUL bytes are those of a damaged file, or of UTF-16" if b"\0" in line else
                "; one record goes over several lines: write each on one" if line.strip() in b"[{" else
                "; there is more than one record on the line" if error.msg == "Extra data" else "")
        raise ValueError(f"not JSON: {error.msg} at column {error.colno}{hint}") from None
    except RecursionError:
        raise ValueError("brackets nested too deeply") from None


def whole_number(digits: str) -> int | float:
    """An int; of hundreds of digits a float, perhaps an infinite one: int() refuses thousands."""
    return int(digits) if len(digits) < 300 else float(digits)


def each_name_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A dict; ValueError if a name has two values: one of them would be lost in silence."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{json.dumps(twice)[:40]} is there twice: keep one")
    return found


def logged(path: pathlib.Path, key: str) -> list[float]:
    """A metric's values in a run's metrics.jsonl. No log is worth a report: without one there are
    none, and lines that are no record are left out."""
    values = []
    with contextlib.suppress(UserError):  # it cannot be read
        for _, line in read_lines(path) if path.is_file() else ():
            with contextlib.suppress(ValueError):
                record = parse_line(line)
                if isinstance(record, dict) and isinstance(record.get(key), int | float):
                    values.append(record[key])
    return values
