"""JSON Lines: a line ends at a line feed and nowhere else, in plain files and in gzipped ones."""
import bz2
import gzip
import io
import json
import lzma
import tarfile

import pytest

from runtime import lines
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
    found = [*read_lines(written(tmp_path / name, text.encode()))]
    assert [number for number, _ in found] == [1, 2, 3, 4]
    assert [parse_line(line) for _, line in found] == TEXTS
    assert [line.endswith(b"\n") for _, line in found] == [True, True, True, False]


def test_an_archive_is_known_by_its_content(tmp_path):
    (tmp_path / "d.jsonl").write_bytes(gzip.compress(b"{}\n"))
    assert list(read_lines(tmp_path / "d.jsonl")) == [(1, b"{}\n")]


@pytest.mark.parametrize("content", [gzip.compress(b"{}\n" * 999, mtime=0)[:-9], b"no archive", b"\x1f\x8b"])
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


@pytest.mark.parametrize("line,hint", [
    (b'{"a": 1}\r{"a": 2}', "more than one record"), (b"[\n", "several lines"),
    ('{"a": 1}'.encode("utf-16-le"), "UTF-16"), (b"\0" * 9, "damaged")])
def test_what_a_whole_file_was_written_like_is_said(line, hint):
    with pytest.raises(ValueError, match=f"not JSON: .*{hint}"):
        parse_line(line)


@pytest.mark.parametrize("line", [b'{"a": 1, "a": 2}', b'{"b": [{"a": 1, "c": 3, "a": 1}]}'])
def test_a_name_with_two_values_is_refused(line):
    with pytest.raises(ValueError, match='"a" is there twice'):
        parse_line(line)


def tar_of(content: bytes) -> bytes:
    file, member = io.BytesIO(), tarfile.TarInfo("d.jsonl")
    member.size = len(content)
    with tarfile.open(fileobj=file, mode="w") as archive:
        archive.addfile(member, io.BytesIO(content))
    return file.getvalue()


@pytest.mark.parametrize("content,what", [
    (tar_of(b"{}\n"), "tar"), (gzip.compress(tar_of(b"{}\n"), mtime=0), "tar"), (bz2.compress(b"{}\n"), "bz2"),
    (lzma.compress(b"{}\n"), "xz"), (b"PAR1" + bytes(99), "Parquet"), ("{}\n".encode("utf-16"), "UTF-16")])
def test_other_archives_and_forms_are_named(tmp_path, content, what):
    (tmp_path / "d.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=f"d.jsonl: is .*{what}"):
        list(read_lines(tmp_path / "d.jsonl"))


@pytest.mark.parametrize("name", ["d.jsonl", "d.jsonl.gz"])
def test_a_line_that_would_fill_the_memory_is_refused(tmp_path, monkeypatch, name):
    monkeypatch.setattr(lines, "LONGEST", 1000)
    path = written(tmp_path / name, b"1" * 999 + b"\n" + b"0" * 10**6)
    with pytest.raises(UserError, match="line 2: is longer"):
        list(read_lines(path))


def test_an_archive_that_unpacks_without_end_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(lines, "UNPACKED", 10**6)
    text = b"".join(b'{"prompt": "%d"}\n' % i for i in range(10**5))
    assert len(list(read_lines(written(tmp_path / "d.gz", text)))) == 10**5
    with pytest.raises(UserError, match="200 times its size"):
        list(read_lines(written(tmp_path / "d.gz", b'{"prompt": ""}\n' * 10**5)))


def test_numbers_of_any_length_are_numbers():
    assert parse_line(b"1" * 18) == int("1" * 18)
    assert parse_line(b"-" + b"1" * 9000) == -float("inf")
