"""Texts larger than memory: read in passes, none of them held, the same documents as in one read."""
import json
import tracemalloc

import pytest

import data.texts
from data.prepare import open_data
from data.texts import Texts, sample
from runtime.options import UserError


def write(path, texts):
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    return path


def texts_of(texts):
    return [record["text"] for record in texts]


def test_chosen_texts_come_in_order_and_again(tmp_path):
    texts = Texts(write(tmp_path / "d.jsonl", "abcdef"))
    some = texts.where(t["text"] in "bdf" for t in texts)
    assert texts_of(some) == texts_of(some) == ["b", "d", "f"]
    assert texts_of(some.where([True, False, True])) == ["b", "f"]
    assert texts_of(texts) == list("abcdef")
    assert (len(some), some.n_bytes) == (3, 3)


def test_bad_and_empty_lines_are_not_counted(tmp_path):
    (tmp_path / "d.jsonl").write_text('\n{"text": "a"}\n{bad\n\n{"text": "é"}\n')
    with pytest.raises(UserError, match="line 3"):
        Texts(tmp_path / "d.jsonl")
    texts = Texts(tmp_path / "d.jsonl", skip_bad=True)
    assert texts_of(texts) == ["a", "é"]
    assert texts.n_bytes == 3


@pytest.mark.parametrize("later", ["", '{"text": "a"}\n', '{"text": "a"}\n{bad\n'])
def test_a_file_that_changes_between_two_passes_is_refused(tmp_path, later):
    texts = Texts(write(tmp_path / "d.jsonl", "ab"))
    texts.path.write_text(later)
    with pytest.raises(UserError, match="has changed while it was read"):
        texts_of(texts)


def test_a_vocabulary_is_learned_from_a_bounded_part_of_all_texts(tmp_path, monkeypatch, capsys):
    path = write(tmp_path / "d.jsonl", [f"{i} " * 50 for i in range(2000)])
    whole = Texts(path)
    assert capsys.readouterr().out == f"{path}: read as texts (2,000)\n"
    assert list(sample(whole)) == texts_of(whole)
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(data.texts, "SAMPLE", 50_000)
    drawn = list(sample(whole))
    assert list(sample(whole)) == drawn
    assert 30_000 < sum(map(len, drawn)) < 70_000
    numbers = [int(text.split()[0]) for text in drawn]
    assert min(numbers) < 300
    assert max(numbers) > 1700
    assert "learned from 0 of 0 MB of text, drawn evenly" in capsys.readouterr().out


def test_memory_does_not_grow_with_the_file(tmp_path, monkeypatch):
    """Beyond a few numbers for each text."""
    monkeypatch.setattr(data.texts, "SAMPLE", 20_000)
    peaks = []
    for n in (200, 1600):
        path = write(tmp_path / f"{n}.jsonl", [f"{i} " * 1000 for i in range(n)])
        tracemalloc.start()
        open_data(str(path), vocab_size=280, cache=tmp_path / "c")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    grown = 1400 * 4500
    assert peaks[1] - peaks[0] < grown / 10
