"""Kinds of files: the same records from each, row by row, with the places of bad ones; standard input
is kept so that it can be read again."""
import csv
import gzip
import io
import json
import sys
import types

import pytest

import data.prepare
from runtime import file_progress, rows
from runtime.options import UserError
from runtime.rows import ENDINGS, Cells, keep_input, read_rows

RECORDS = [{"prompt": "好 \u2028 one, two\tthree", "response": ' "quoted"\nand\r\nbroken '},
           {"prompt": "<eom>", "response": "x"}]


def written(path, content: bytes):
    """A file of these bytes, gzipped if its name says so."""
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def table(records, delimiter=","):
    """A table of these records, as csv writes it."""
    file = io.StringIO()
    writer = csv.DictWriter(file, list(records[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(records)
    return file.getvalue()


def values(path):
    return [row.value() for row in read_rows(path)]


def content_of(ending, records):
    lines = [json.dumps(r, ensure_ascii=False) for r in records]
    return {".jsonl": "\n".join(lines), ".json": "[" + ",\n".join(lines) + "]",
            ".csv": table(records), ".tsv": table(records, "\t")}[ending]


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("zipped", ["", ".gz"])
@pytest.mark.parametrize("ending", [*ENDINGS, ".CSV", ".Json"])
def test_every_kind_of_file_has_the_same_records(tmp_path, ending, zipped, mark):
    content = mark + content_of(ending.lower(), RECORDS)
    path = written(tmp_path / f"d{ending}{zipped}", content.encode())
    assert values(path) == RECORDS
    numbers = [row.number for row in read_rows(path)]
    assert numbers == sorted(set(numbers))


@pytest.mark.parametrize("name", ["d.txt", "d", "d.ndjson", "v1.csv.old"])
def test_other_names_are_json_lines(tmp_path, name):
    assert values(written(tmp_path / name, b'\n{"a": 1}\n \n[2]\n')) == [{"a": 1}, [2]]


# ---- JSON arrays ---------------------------------------------------------------------------------

@pytest.mark.parametrize("text,found", [
    ("[]", []), ("[ \n]", []), ('[{"a": 1}]', [{"a": 1}]),
    (' [\n {"a": [{"b": 2}]} , 3\n]\n\n', [{"a": [{"b": 2}]}, 3]),
    ('{"data": [{"a": 1}, {"a": 2}]}', [{"a": 1}, {"a": 2}]), ('{"rows":\n [\n{"a": 1}\n]\n}\n', [{"a": 1}]),
    ('{"a": 1}\n{"a": 2}', [{"a": 1}, {"a": 2}]), ('{"a": 1}', [{"a": 1}]),
    ('{"m": [{"a": 1}]}\n{"m": [{"a": 2}]}', [{"m": [{"a": 1}]}, {"m": [{"a": 2}]}]), ('{"a": [1]}', [{"a": [1]}])])
def test_lists_and_lines_under_one_name(tmp_path, text, found):
    assert values(written(tmp_path / "d.json", text.encode())) == found


@pytest.mark.parametrize("text,said", [
    ('[{"a": 1},\n{"a": 2', "line 2: not JSON: Expecting ',' delimiter"),
    ('[{"a": 1}\n{"a": 2}]', "line 2: not JSON: the list"),
    ('[{"a": 1},\n]', "line 2: not JSON: Expecting value"), ('[{"a": 1}]\n[]', "line 1: there is more behind"),
    ('{"data": [{"a": 1}], "n": 1}', "line 1: there is more behind"), ('"a"', "line 1: not a JSON list"),
    ("[" * 10**5, "nested too deeply"), ('[{"a": "\xe9"}]', "line 1: not UTF-8"), ("[1", "line 1: not JSON: the list")])
def test_a_damaged_list_is_refused_with_its_line(tmp_path, text, said):
    with pytest.raises(UserError, match=f"d.json, {said}" if "nested" not in said else said):
        values(written(tmp_path / "d.json", text.encode("latin-1")))


def test_one_bad_record_of_a_list_leaves_the_others(tmp_path):
    path = written(tmp_path / "d.json", b'[{"a": 1},\n{"a": 2, "a": 3}, {"a": 4},\n\n{"a": 5}]')
    found = list(read_rows(path))
    assert [row.place for row in found] == ["record 1 (line 1)", "record 2 (line 2)", "record 3 (line 2)",
                                            "record 4 (line 4)"]
    with pytest.raises(ValueError, match='"a" is there twice'):
        found[1].value()
    assert [found[i].value() for i in (0, 2, 3)] == [{"a": 1}, {"a": 4}, {"a": 5}]


def test_a_list_that_would_fill_the_memory_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "WHOLE", 1000)
    with pytest.raises(UserError, match="read whole.*as JSON Lines it is read at any size"):
        values(written(tmp_path / "d.json", b"[" + b'{"a": 1},\n' * 200 + b"1]"))


# ---- tables --------------------------------------------------------------------------------------

def test_an_empty_cell_is_missing_and_an_empty_row_is_none(tmp_path):
    path = written(tmp_path / "d.csv", b'id,,a, b \r\n1,x,,y\r\n\r\n,,,\r\n2,,"",\r\n')
    assert values(path) == [{"id": "1", "b": "y"}, {"id": "2"}]
    assert all(isinstance(value, Cells) for value in values(path))


@pytest.mark.parametrize("rest,line,said", [
    ("x,y,z", 4, "number of cells 3, in the header 2: put"), ("x", 4, "number of cells 1, in the header 2"),
    ('"x"z,y', 4, "not a row of cells"), ("x,\udce9", 4, "not UTF-8.*CSV UTF-8"), ("\nx", 5, "number of cells 1")])
def test_a_bad_row_has_the_line_where_it_begins(tmp_path, rest, line, said):
    text = f'a,b\n"1\n2",3\n{rest}\n"5",6\n'
    found = list(read_rows(written(tmp_path / "d.csv", text.encode("utf-8", "surrogateescape"))))
    assert [row.place for row in found] == ["line 2", f"line {line}", f"line {line + 1}"]
    with pytest.raises(ValueError, match=said):
        found[1].value()
    assert found[2].value() == {"a": "5", "b": "6"}


@pytest.mark.parametrize("content,said", [
    (b"a,b,a\n1,2,3\n", "d.csv: two columns are called 'a'"), (b"a;b\n1;2\n", "d.csv: its header is one cell, 'a;b'"),
    (b"a\tb\n1\t2\n", "its header is one cell"), ("文本,b\n".encode("gbk"), "line 1: not UTF-8.*CSV UTF-8"),
    (b'"a,b\n', "line 1: no header"),
    (b'a,b\n1,2\n"3,4\n5,6\n', "line 3: a quotation mark is opened .* and never closed"),
    (b'a,b\n1,"' + b"x" * 2**25 + b'"\n', "field larger"), (b"PK\x03\x04" + bytes(99), "a spreadsheet: save"),
    (b"\xd0\xcf\x11\xe0" + bytes(99), "a spreadsheet: save"), ("a,b\n".encode("utf-16"), "UTF-16")])
def test_a_file_that_is_no_table_is_refused(tmp_path, content, said):
    path = written(tmp_path / "d.csv", content)
    with pytest.raises((UserError, ValueError), match=said):
        values(path)


def test_a_table_larger_than_a_cell_by_default_is_read(tmp_path):
    assert values(written(tmp_path / "d.csv", b"a\n" + b"x" * 10**6))[0]["a"] == "x" * 10**6


# ---- standard input ------------------------------------------------------------------------------

class Piped(io.BytesIO):
    """Bytes that come through a pipe, or from a terminal."""

    def __init__(self, content: bytes, terminal: bool = False):
        super().__init__(content)
        self.isatty = lambda: terminal


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("ending", ENDINGS)
def test_standard_input_is_kept_under_its_digest(tmp_path, capsys, ending, zipped):
    content = content_of(ending, RECORDS).encode()
    content = gzip.compress(content, mtime=0) if zipped else content
    path = keep_input(Piped(content), tmp_path / "downloads")
    assert values(path) == RECORDS
    assert keep_input(Piped(content), tmp_path / "downloads") == path
    assert keep_input(Piped(b"a\n1"), tmp_path / "downloads") != path
    assert len(list(path.parent.iterdir())) == 2
    assert f"kept as {path}" in capsys.readouterr().out


@pytest.mark.parametrize("stream,said", [(Piped(b""), "is empty"), (Piped(b"x", terminal=True), "nothing is piped")])
def test_no_input_is_an_error(tmp_path, stream, said):
    with pytest.raises(UserError, match=said):
        keep_input(stream, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_input_is_prepared_and_found_again(tmp_path, monkeypatch, capsys):
    """The second time nothing is built, and the file that it is kept as is the same data."""
    monkeypatch.setattr(data.prepare, "CACHE", tmp_path)
    lines = "".join(json.dumps({"prompt": f"Question {i}"}) + "\n" for i in range(20)).encode()

    def prepared(name):
        monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(buffer=Piped(lines)))
        data.prepare.main([name])
        return capsys.readouterr().out.splitlines()

    kept, how, *first = prepared("-")
    assert how.endswith("read as prompts (20)")
    assert prepared("-") == [kept, *first]
    assert prepared(kept.split("kept as ")[1]) == first


# ---- progress ------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["d.jsonl", "d.jsonl.gz", "d.csv"])
def test_without_a_terminal_the_reading_is_said_now_and_then(tmp_path, capsys, monkeypatch, name):
    monkeypatch.setattr(file_progress, "SECONDS", 0.0)
    path = written(tmp_path / name, (b'{"a": 1' + b"0" * 140 + b"}\n") * 20_000)
    assert len(list(read_rows(path, progress=True))) == 20_000 - name.endswith("csv")
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2
    assert said[0].startswith(f"reading {name}: ")
    assert "MB/s" in said[0]
    assert list(read_rows(path))
    assert capsys.readouterr().out == ""
