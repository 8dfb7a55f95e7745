"""Preparation: done once, nothing half-written, options without effect refused; files that users
bring."""
import dataclasses
import functools
import gzip
import json
import os
import pathlib
import zipfile

import pytest

import data.dataset
from data.own import find_files
from data.sets import DATA_SETS
from data.prepare import PrepareOptions, main, open_data, open_for, prepare
from data.prepared import Prepared
from runtime.options import UserError, parse, run_main


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def reviews(reviews_source, cache):
    return open_data("reviews", source=str(reviews_source), vocab_size=400, cache=cache)


def write(path, *records):
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records),
                    encoding="utf-8")
    return path


@pytest.fixture
def prompts(tmp_path):
    """A user's file of 200 prompts."""
    return write(tmp_path / "d.jsonl", *({"prompt": str(i)} for i in range(200)))


@pytest.fixture
def shakespeare(tmp_path):
    """A stand-in for Shakespeare's text."""
    (tmp_path / "s.txt").write_text("".join(chr(97 + i % 26) for i in range(5000)))
    return tmp_path / "s.txt"


# ---- once, or not at all -------------------------------------------------------------------------

def test_preparing_again_changes_nothing(reviews, reviews_source, cache):
    before = {p.name: p.stat().st_mtime_ns for p in reviews.folder.iterdir()}
    assert prepare("reviews", source=str(reviews_source), vocab_size=400,
                   cache=cache) == reviews.folder
    assert {p.name: p.stat().st_mtime_ns for p in reviews.folder.iterdir()} == before


def test_the_same_source_gives_the_same_files(reviews, reviews_source, tmp_path):
    folder = prepare("reviews", source=str(reviews_source), vocab_size=400, cache=tmp_path)
    for file in reviews.folder.iterdir():
        if file.suffix in (".jsonl", ".bin", ".json"):
            assert (folder / file.name).read_bytes() == file.read_bytes(), file.name


def test_options_and_raw_files_each_have_a_folder_of_their_own(prompts, tmp_path):
    first = prepare(str(prompts), cache=tmp_path / "c")
    # without text it has no effect
    assert prepare(str(prompts), vocab_size=300, cache=tmp_path / "c") == first
    write(prompts, *({"prompt": f"{i}?"} for i in range(200)))
    assert prepare(str(prompts), cache=tmp_path / "c") != first


@pytest.mark.parametrize("change", [{"template": "x{prompt}"}, {"version": 2}, {"mixture": {}}])
def test_a_changed_record_prepares_anew(reviews, reviews_source, cache, monkeypatch, change):
    monkeypatch.setitem(DATA_SETS, "reviews", dataclasses.replace(DATA_SETS["reviews"], **change))
    assert prepare("reviews", source=str(reviews_source), vocab_size=400,
                   cache=cache) != reviews.folder


def test_an_interrupted_preparation_leaves_nothing(reviews_source, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt
    monkeypatch.setattr(data.dataset.DataWriter, "records", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare("reviews", source=str(reviews_source), vocab_size=400, cache=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_stops_the_preparation_with_one_line(prompts, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(data.dataset, "write_records", full)
    with pytest.raises(UserError, match="No space left"):
        prepare(str(prompts), cache=tmp_path / "c")
    assert list((tmp_path / "c").iterdir()) == []


def test_a_prepared_folder_that_lost_its_description_is_made_again(prompts, tmp_path):
    folder = prepare(str(prompts), cache=tmp_path / "c")
    (folder / "meta.json").unlink()
    assert open_data(str(prompts), cache=tmp_path / "c").records("ppo", "train")


def test_a_damaged_description_is_refused(prompts, tmp_path):
    (prepare(str(prompts), cache=tmp_path / "c") / "meta.json").write_text("{")
    with pytest.raises(UserError, match="is damaged"):
        open_data(str(prompts), cache=tmp_path / "c")


# ---- what cannot be read twice, or at all ----------------------------------------------------------

def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for words in ({"data": str(tmp_path / "pipe")},
                  {"data": "shakespeare", "source": str(tmp_path / "pipe")},
                  {"data": "reviews", "source": str(tmp_path / "pipe")}):
        with pytest.raises(UserError, match="a pipe or a device: write its content into a file"):
            prepare(**words, cache=tmp_path / "c")


@pytest.mark.parametrize("make,message", [(os.mkfifo, "a pipe"), (os.mkdir, "is a folder")])
def test_a_users_folder_with_something_else_than_a_file_is_refused(tmp_path, make, message):
    make(tmp_path / "sft.jsonl")
    with pytest.raises(UserError, match=f"sft.jsonl: .*{message}"):
        prepare(str(tmp_path), cache=tmp_path / "c")


def test_a_zip_of_the_users_own_is_told_to_be_unpacked(prompts, tmp_path):
    with zipfile.ZipFile(tmp_path / "d.zip", "w") as file:
        file.write(prompts)
    with pytest.raises(UserError, match="zip archive is not read: unpack it"):
        prepare(str(tmp_path / "d.zip"), cache=tmp_path / "c")


@pytest.mark.skipif(not pathlib.Path("/proc/self/mem").exists(), reason="needs Linux")
@pytest.mark.parametrize("words", [{"data": "/proc/self/mem"},
                                   {"data": "reviews", "source": "/proc/self/mem"}])
def test_a_drive_that_cannot_be_read_is_named_with_its_file(words, tmp_path):
    """Reading address 0 of a process's memory is an input/output error."""
    with pytest.raises(UserError, match="/proc/self/mem: cannot be read: .*the drive fails"):
        prepare(**words, cache=tmp_path)


def test_a_prepared_folder_can_be_opened_by_its_path(reviews):
    loaded = Prepared.load(reviews.folder)
    assert loaded.template == reviews.template
    assert loaded.fingerprint == reviews.fingerprint
    assert loaded.tokenizer.to_state() == reviews.tokenizer.to_state()


# ---- names, and options without effect -----------------------------------------------------------

def test_unknown_data_sets_offer_the_nearest():
    with pytest.raises(UserError, match="did you mean reviews"):
        prepare("review")


def refused(data, *words):
    o = parse(PrepareOptions, list(words), "x")
    with pytest.raises(UserError) as error:
        open_for(o, str(data))
    return str(error.value)


def test_limit_is_refused_where_it_has_no_effect():
    names = ", ".join(name for name, data_set in DATA_SETS.items() if "limit" in data_set.options)
    assert refused("shakespeare", "--limit=9") == f"--limit has no effect on shakespeare: it is for {names}"
    assert "reviews" in names and "shakespeare" not in names


def test_vocab_size_is_refused_where_no_vocabulary_is_trained(prompts):
    for name in ("shakespeare", prompts):
        assert "--vocab_size has no effect" in refused(name, "--vocab_size=300")


def test_source_is_refused_on_files_of_the_users_own(prompts):
    assert refused(prompts, "--source=x").endswith(f"it names the raw files of {', '.join(DATA_SETS)}")


def test_options_with_an_effect_are_not_refused(reviews_source, tmp_path, monkeypatch):
    opened = []
    monkeypatch.setattr("data.prepare.open_data", lambda data,
                        **options: opened.append((data, options)))
    open_for(parse(PrepareOptions, ["--source=s", "--limit=9", "--vocab_size=300"], "x"), "reviews")
    assert opened == [("reviews", {"source": "s", "vocab_size": 300, "limit": 9,
                                   "skip_bad": False, "fields": "",
                                    "template": "", "judge_share": -1.0})]


def test_the_command_prints_what_was_made(shakespeare, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("data.prepare.open_data", functools.partial(open_data, cache=tmp_path))
    assert run_main(main, ["shakespeare", f"--source={shakespeare}"]) == 0
    assert "pretrain_train[text]: {'documents': 1, 'tokens': 4500}" in capsys.readouterr().out


@pytest.mark.parametrize("words,message", [(["nonsense"], "unknown data set"), ([], "usage"),
                                           (["--limit=3"], "usage")])
def test_the_command_refuses_in_one_line(words, message, capsys):
    assert run_main(main, words) == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")


# ---- shakespeare ---------------------------------------------------------------------------------

def test_shakespeare_is_split_as_in_nanogpt(shakespeare, tmp_path):
    prepared = open_data("shakespeare", source=str(shakespeare), cache=tmp_path)
    assert len(prepared.documents("train").tokens) == 4500
    assert len(prepared.documents("val").tokens) == 500
    assert prepared.documents("train").single
    assert prepared.tokenizer.n_vocab == 26 + 6


def test_shakespeare_may_be_a_folder(shakespeare, tmp_path):
    shakespeare.rename(tmp_path / "tinyshakespeare.txt")
    assert open_data("shakespeare", source=str(tmp_path), cache=tmp_path).documents("train").single


def test_a_folder_without_the_text_names_it(tmp_path):
    with pytest.raises(UserError, match="tinyshakespeare.txt is missing; .*--source"):
        prepare("shakespeare", source=str(tmp_path), cache=tmp_path)


def test_a_text_that_is_too_short_is_refused(tmp_path):
    (tmp_path / "s.txt").write_text("x" * 999)
    with pytest.raises(UserError, match="only 999 characters"):
        prepare("shakespeare", source=str(tmp_path / "s.txt"), cache=tmp_path)


# ---- what users bring ----------------------------------------------------------------------------

@pytest.fixture
def dialogues(tmp_path):
    """A user's prepared file of 200 dialogues."""
    path = write(tmp_path / "mine.jsonl", *({"prompt": f"问题{i}", "response": f"回答{i}"}
                                            for i in range(200)))
    return open_data(str(path), cache=tmp_path / "c")


def test_a_users_file_is_divided(dialogues):
    counts = {split: len(dialogues.records("sft", split)) for split in ("train", "val", "test")}
    assert sum(counts.values()) == 200
    assert counts["train"] > 150
    assert min(counts.values()) > 0


def test_equal_prompts_are_on_one_side(tmp_path):
    path = write(tmp_path / "d.jsonl", *({"prompt": f"{i % 60}", "response": f"{i}"}
                                         for i in range(600)))
    prepared = open_data(str(path), cache=tmp_path / "c")
    train, val, test = ({r["prompt"] for r in prepared.records("sft", s)}
                        for s in ("train", "val", "test"))
    assert not train & val
    assert not train & test


def test_prompts_of_dialogues_serve_ppo(dialogues):
    prompts = [{r["prompt"] for r in dialogues.records(stage, "val")} for stage in ("ppo", "sft")]
    assert prompts[0] == prompts[1]
    assert dialogues.template == "{prompt}"


def test_what_a_users_data_lacks_is_said(dialogues):
    with pytest.raises(UserError, match="nothing for the stage reward"):
        dialogues.records("reward", "train")


def test_a_folder_of_files_with_its_own_validation(tmp_path):
    write(tmp_path / "pretrain.jsonl", *({"text": f"第{i}个文件里的文字，一二三四五。"} for i in range(100)))
    write(tmp_path / "pretrain_val.jsonl", {"text": "只在验证里"})
    prepared = open_data(str(tmp_path), vocab_size=300, cache=tmp_path / "c")
    assert prepared.tokenizer.decode(prepared.documents("val").tokens[1:]) == "只在验证里"


def test_the_names_of_files_count(tmp_path):
    """The same bytes for another stage are other data."""
    write(tmp_path / "sft.jsonl", *({"prompt": f"{i}", "response": f"{i}"} for i in range(200)))
    assert open_data(str(tmp_path), cache=tmp_path / "c").has("sft")
    (tmp_path / "sft.jsonl").rename(tmp_path / "ppo.jsonl")
    assert not open_data(str(tmp_path), cache=tmp_path / "c").has("sft")


def test_a_byte_order_mark_does_not_hide_the_stage(tmp_path):
    (tmp_path / "d.jsonl").write_bytes(b'\xef\xbb\xbf{"prompt": "x"}\n')
    assert list(find_files(tmp_path / "d.jsonl")) == [("ppo", "train")]


@pytest.fixture
def flawed(tmp_path):
    """A user's file of 200 prompts, its first line and its last no records."""
    return write(tmp_path / "f.jsonl", "{", *({"prompt": f"{i}"} for i in range(200)), "[")


def test_bad_lines_are_left_out_on_demand(flawed, tmp_path, capsys):
    with pytest.raises(UserError, match="line 1: not a JSON object; line 202: "):
        open_data(str(flawed), cache=tmp_path / "c")
    data = open_data(str(flawed), skip_bad=True, cache=tmp_path / "c")
    assert sum(len(data.records("ppo", split)) for split in ("train", "val", "test")) == 200
    assert "2 of 202 records left out" in capsys.readouterr().out
    with pytest.raises(UserError, match="line 1"):  # also after it was prepared without them
        open_data(str(flawed), cache=tmp_path / "c")


def test_leaving_lines_out_is_for_files_of_ones_own():
    with pytest.raises(UserError, match="--skip_bad has no effect on reviews"):
        open_for(parse(PrepareOptions, ["--skip_bad"], "x"), "reviews")


def test_files_may_be_gzipped(flawed, tmp_path):
    records = open_data(str(flawed), skip_bad=True, cache=tmp_path / "c").records("ppo", "train")
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "f.jsonl.gz", tmp_path / "folder/ppo.jsonl.gz"):
        path.write_bytes(gzip.compress(b"\xef\xbb\xbf" + flawed.read_bytes()))
        place = path.parent if path.parent.name == "folder" else path
        data = open_data(str(place), skip_bad=True, cache=tmp_path / "c")
        assert data.records("ppo", "train") == records
    write(tmp_path / "folder/ppo.jsonl", {"prompt": "x"})
    with pytest.raises(UserError, match="ppo.jsonl is there, and so is ppo.jsonl.gz"):
        find_files(tmp_path / "folder")


@pytest.mark.parametrize("content,message", [
    (b"{bad\n", "line 1: not JSON"), (b"", "no records"),
    (b'{"prompt": "\xff"}\n', "line 1: not UTF-8"),
    (b'{"prompt": "x"}\n', "d.jsonl: too few records.*ppo_val.jsonl")])
def test_a_users_bad_file_is_refused(tmp_path, content, message):
    (tmp_path / "d.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=message):
        open_data(str(tmp_path / "d.jsonl"), cache=tmp_path / "c")


def test_a_folder_without_training_files_is_refused(tmp_path):
    write(tmp_path / "sft_val.jsonl", {"prompt": "a", "response": "b"})
    with pytest.raises(UserError, match="none of pretrain.jsonl, sft.jsonl, reward.jsonl, "
                                        "ppo.jsonl is there"):
        open_data(str(tmp_path), cache=tmp_path / "c")
