"""Records of a file, one after another, whatever its kind: JSON Lines, a JSON array, a table.

    d.jsonl              one JSON object a line; so is a file of any other name
    d.json               a list of objects, or {"data": [...]}; JSON Lines under this name are known, too
    d.csv, d.tsv         a header, then a row of cells a record, quoted as spreadsheet programs do
    d.csv.gz and so on   the same, gzipped

All but a JSON array are read in passes of constant memory. Standard input is kept as a file first.
"""
import contextlib
import csv
import functools
import hashlib
import itertools
import json
import os
import pathlib
import re
import zlib
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, NamedTuple

from runtime.lines import GZIP, each_name_once, parse_line, read_lines, whole_number
from runtime.terminal import UserError, advice

ENDINGS = (".jsonl", ".json", ".csv", ".tsv")  # of files in a folder; each may have .gz behind it
DELIMITERS = {".csv": ",", ".tsv": "\t"}
WHOLE = 2**28  # bytes of a JSON array, which is read whole
LONGEST_CELL = 2**24  # characters
BLANK = b"\xef\xbb\xbf \t\r\n"  # of which a line without a record consists
SPACE = re.compile(r"[ \t\r\n]*")
LIST_IN_OBJECT = re.compile(r'\s*\{\s*"[^"\\]*"\s*:\s*(?=\[\s*\{)')


class Row(NamedTuple):
    """A record of a file that is not parsed yet."""

    number: int  # rises within the file
    place: str  # for an error: "line 3"
    value: Callable[[], Any]  # ValueError says what is wrong with it


class Cells(dict):
    """A record of a table: name -> text. What is an empty cell there is missing here."""


def read_rows(path: str | os.PathLike, progress: bool = False) -> Iterator[Row]:
    """The records of a file; blank lines are none. progress: show how much of it is read. UserError
    if the file cannot be read."""
    ending = pathlib.Path(str(path).lower().removesuffix(".gz")).suffix
    if ending in DELIMITERS:
        return table_rows(path, DELIMITERS[ending], progress)
    if ending == ".json" and not holds_lines(path):
        return array_rows(path, progress)
    return (Row(number, f"line {number}", functools.partial(parse_line, line))
            for number, line in read_lines(path, progress) if line.strip(BLANK))


# ---- JSON arrays ---------------------------------------------------------------------------------

def holds_lines(path: str | os.PathLike) -> bool:
    """Whether a .json file has JSON Lines: its first line is an object, and no list of records."""
    lines = (line for _, line in read_lines(path) if line.strip(BLANK))
    first, second = [*itertools.islice(lines, 2), b"", b""][:2]
    with contextlib.suppress(ValueError):
        whole = isinstance(parse_line(first), dict)
        return whole and (bool(second) or not LIST_IN_OBJECT.match(first.decode("utf-8-sig")))
    return False


def array_rows(path: str | os.PathLike, progress: bool) -> Iterator[Row]:
    """The objects of a JSON array, or of the one list that an object holds."""
    text = whole_text(path, progress)
    inside = LIST_IN_OBJECT.match(text)
    start = inside.end() if inside else SPACE.match(text).end()
    ends = re.compile(r"\s*\}\s*" if inside else r"\s*")

    def damaged(at: int, what: str) -> UserError:
        return UserError(f"{path}, line {text.count(chr(10), 0, at) + 1}: {what}; a .json file is a list "
                         "of objects, or an object that holds one and nothing else")

    if text[start:start + 1] != "[":
        raise damaged(start, "not a JSON list")
    faults: list[ValueError] = []
    decoder = json.JSONDecoder(parse_int=whole_number,
                               object_pairs_hook=functools.partial(noting, faults))
    at, line, counted = SPACE.match(text, start + 1).end(), 1, 0
    for number in itertools.count(1):
        if number == 1 and text[at:at + 1] == "]":
            break
        line, counted = line + text.count("\n", counted, at), at
        try:
            value, end = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            raise damaged(error.pos, f"not JSON: {error.msg} at column {error.colno}") from None
        except RecursionError:
            raise damaged(at, "brackets nested too deeply") from None
        yield Row(number, f"record {number} (line {line})",
                  functools.partial(good, value, faults.pop() if faults else None))
        faults.clear()
        at = SPACE.match(text, end).end()
        if text[at:at + 1] != ",":
            break
        at = SPACE.match(text, at + 1).end()
    if text[at:at + 1] != "]" or not ends.fullmatch(text, at + 1):
        raise damaged(at, "not JSON: the list does not end here, and no other record follows"
                      if text[at:at + 1] != "]" else "there is more behind the list")


def whole_text(path: str | os.PathLike, progress: bool) -> str:
    """The text of a file; UserError if it is too long, or not UTF-8."""
    lines, size = [], 0
    for _, line in read_lines(path, progress):
        size += len(line)
        if size > WHOLE:
            raise UserError(f"{path}: a JSON list is read whole, so it has {WHOLE / 1e6:.0f} MB at most; "
                            "as JSON Lines it is read at any size: jq -c '.[]' FILE.json > FILE.jsonl")
        lines.append(line)
    content = b"".join(lines)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}, line {line}: not UTF-8: convert the file, or save it as that") from None


def noting(faults: list[ValueError], pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A dict; a name that has two values is noted among the faults, and the reading goes on."""
    try:
        return each_name_once(pairs)
    except ValueError as fault:
        faults.append(fault)
        return dict(pairs)


def good(value: Any, fault: ValueError | None) -> Any:
    """The value, unless there is something wrong with it."""
    if fault:
        raise fault
    return value


# ---- tables --------------------------------------------------------------------------------------

def table_rows(path: str | os.PathLike, delimiter: str, progress: bool) -> Iterator[Row]:
    """The rows below the header of a table."""
    csv.field_size_limit(LONGEST_CELL)
    # Bytes that are not UTF-8 become lone surrogates, so that a row with some can be a bad line.
    lines = (line.decode("utf-8-sig" if number == 1 else "utf-8", "surrogateescape")
             for number, line in read_lines(path, progress))
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    header: list[str] = []
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader, None)
            value = functools.partial(row, header, cells)
        except csv.Error as error:
            if not header:
                raise UserError(f"{path}, line {line}: no header: {error}") from None
            if "end of data" in str(error):  # all rows below are in that cell
                raise UserError(f"{path}, line {line}: a quotation mark is opened in this row and never "
                                "closed; one inside a quoted cell is written twice") from None
            cells, value = ["bad"], functools.partial(no_row, str(error))
        if cells is None:
            return
        if not any(cells):  # a blank line, or what a spreadsheet program makes of an empty row
            continue
        if header:
            yield Row(line, f"line {line}", value)
        else:
            header = header_of(path, cells)


def header_of(path: str | os.PathLike, cells: list[str]) -> list[str]:
    """The names of a table's columns. One without a name is not read; UserError if two have one."""
    names = [cell.strip() for cell in cells]
    twice = next((name for name in names if name and names.count(name) > 1), "")
    if twice:
        raise UserError(f"{path}: two columns are called {twice[:40]!r}: keep one")
    if len(names) == 1 and re.search("[,;\t|]", names[0]):
        raise UserError(f"{path}: its header is one cell, {names[0][:60]!r}: cells are divided by commas in "
                        "a .csv file, by tabs in a .tsv file")
    require_utf8(names, f"{path}, line 1: ")
    return names


def row(header: list[str], cells: list[str]) -> Cells:
    """A row by its header; ValueError if it has another number of cells."""
    if len(cells) != len(header):
        raise ValueError(f"number of cells {len(cells)}, in the header {len(header)}: put a cell that holds "
                         "the separator or a line break into quotation marks")
    require_utf8(cells)
    return Cells({name: cell for name, cell in zip(header, cells, strict=True) if name and cell})


def no_row(reason: str) -> None:
    """ValueError for lines that are no row."""
    raise ValueError(f"not a row of cells: {reason}; a quotation mark in a quoted cell is written twice")


def require_utf8(cells: list[str], place: str = "") -> None:
    """ValueError, or UserError for a place, if the cells were read from bytes that are not UTF-8."""
    try:
        "".join(cells).encode()
    except UnicodeEncodeError:
        raise (UserError if place else ValueError)(
            f"{place}not UTF-8: convert the file, or save it as that (in Excel: CSV UTF-8)") from None


# ---- standard input ------------------------------------------------------------------------------

def keep_input(stream: BinaryIO, folder: pathlib.Path) -> pathlib.Path:
    """A file in the folder with all that a stream has, named by its digest, so that it can be read
    again; a printed line says where. Its kind is told by how it begins. UserError if it is empty."""
    if stream.isatty():
        raise UserError("the data is standard input (-), and nothing is piped into it: end the command with "
                        "< FILE, or give the file's name in place of -")
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f"stdin-{os.getpid()}.part"
    digest, head, size = hashlib.sha256(), b"", 0
    try:
        with open(part, "wb") as file:
            while block := stream.read(2**20):
                head, size = head or block, size + len(block)
                digest.update(block)
                file.write(block)
        if not size:
            raise UserError("the data is standard input (-), which is empty: the command before the | "
                            "wrote nothing")
        path = folder / f"stdin-{digest.hexdigest()[:12]}{ending_of(head)}"
        os.replace(part, path)
    except OSError as error:
        raise UserError(f"standard input cannot be kept in {folder}: {error}; {advice(error)}") from None
    finally:
        part.unlink(missing_ok=True)
    print(f"standard input: {size:,} bytes, kept as {path}", flush=True)
    return path


def ending_of(head: bytes) -> str:
    """The ending of a file's name that tells its kind, by its first bytes."""
    zipped = head.startswith(GZIP)
    if zipped:
        with contextlib.suppress(zlib.error):  # a damaged archive is refused when it is read
            head = zlib.decompressobj(31).decompress(head, 2**20)
    first = head.lstrip(BLANK).split(b"\n")[0]
    kind = ".json" if first[:1] in (b"[", b"{") else ".tsv" if b"\t" in first else ".csv"
    return kind + ".gz" * zipped
