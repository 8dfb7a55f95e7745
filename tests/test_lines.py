"""JSON Lines: a line ends at a line feed and nowhere else, in plain files and in gzipped ones."""
import gzip
import json

import pytest

from runtime.lines import parse_line, read_lines
from runtime.options import UserError

TEXTS = ["a\u2028b", "c\u2029d\x85e", "\x0b\x0c\x1c", ""]


def written(path, content: bytes):
    """A file of these bytes, gzipped if its name says so."""
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


@pytest.mark.parametrize("name", ["d.jsonl", "d.jsonl.gz"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_every_value_is_one_line(tmp_path, name, end, mark):
    text = mark + end.join(json.dumps(t, ensure_ascii=False) for t in TEXTS)
    lines = [*read_lines(written(tmp_path / name, text.encode()))]
    assert [number for number, _ in lines] == [1, 2, 3, 4]
    assert [parse_line(line) for _, line in lines] == TEXTS
    assert [line.endswith(b"\n") for _, line in lines] == [True, True, True, False]


def test_an_archive_is_known_by_its_content(tmp_path):
    (tmp_path / "d.jsonl").write_bytes(gzip.compress(b"{}\n"))
    assert list(read_lines(tmp_path / "d.jsonl")) == [(1, b"{}\n")]


@pytest.mark.parametrize("content", [gzip.compress(b"{}\n" * 999)[:-9], b"no archive", b"\x1f\x8b"])
def test_a_damaged_archive_is_refused(tmp_path, content):
    (tmp_path / "d.gz").write_bytes(content)
    with pytest.raises(UserError, match="d.gz: cannot be read"):
        list(read_lines(tmp_path / "d.gz"))


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(UserError, match="none: cannot be read"):
        list(read_lines(tmp_path / "none"))


@pytest.mark.parametrize("line,reason", [
    (b"[" * 100_000, "nested"), (b'{"a": 1', "not JSON: .* column"), (b"\xff", "UTF-8"),
    (b"\x00\x00\n", "not JSON")])
def test_what_is_no_value_has_a_reason(line, reason):
    with pytest.raises(ValueError, match=reason):
        parse_line(line)


def test_numbers_of_any_length_are_numbers():
    assert parse_line(b"1" * 18) == int("1" * 18)
    assert parse_line(b"-" + b"1" * 9000) == -float("inf")
