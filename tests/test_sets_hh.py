"""The data set hh: transcripts from a file, a folder or a URL; pairs alone serve every stage."""
import functools
import gzip
import http.server
import json
import threading

import pytest

from data.downloads import git_blob, web_download
from data.prepare import main, open_data, prepare
from data.sets import hh
from data.splits import split_key
from runtime.options import UserError

STAGES = ("sft", "reward", "ppo")


def pair(i: int, reply: str = "Turn left") -> dict:
    """A transcript of two turns with two last replies; three pairs share a first message."""
    talk = f"\n\nHuman: Where is station {i // 3}?\n\nAssistant: Which one?\n\nHuman: Number {i}.\n\nAssistant:"
    return {"chosen": f"{talk} {reply} at {i}.", "rejected": f"{talk} No idea {i}."}


def write(path, pairs):
    text = "".join(json.dumps(p) + "\n" for p in pairs)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hh")
    write(folder / "train.jsonl.gz", map(pair, range(300)))
    return folder


@pytest.fixture(scope="module")
def data(folder, tmp_path_factory):
    return open_data("hh", source=str(folder / "train.jsonl.gz"), vocab_size=400,
                     cache=tmp_path_factory.mktemp("c"))


def firsts(data, split, stages=STAGES):
    return {split_key(r, stage) for stage in stages for r in data.records(stage, split)}


def test_pairs_alone_serve_every_stage(data):
    for stage in STAGES:
        for split in ("train", "val", "test"):
            assert data.records(stage, split)
    assert len(data.records("judge", "train")) > 20
    assert "<eom>" in data.tokenizer.decode(data.documents("train").tokens)


def test_talks_that_begin_alike_are_in_one_split(data):
    train, val, test = (firsts(data, split) for split in ("train", "val", "test"))
    assert len(train) + len(val) + len(test) == 100
    assert not train & val
    assert not (train | val) & test


def test_judges_and_reward_model_share_no_first_message(data):
    mine, theirs = ({split_key(r, "reward") for r in data.records(stage, "train")} for stage in ("reward", "judge"))
    assert mine
    assert not mine & theirs


def test_a_folders_test_file_is_the_test_split(folder, tmp_path):
    write(tmp_path / "train.jsonl", map(pair, range(300)))
    write(tmp_path / "test.jsonl.gz", map(pair, range(280, 340)))
    data = open_data("hh", source=str(tmp_path), vocab_size=400, cache=tmp_path / "c")
    assert len(data.records("reward", "test")) == 60
    assert not firsts(data, "train") & firsts(data, "test")


def test_bad_lines_are_left_out_and_named(tmp_path, capsys):
    bad = {"chosen": "\n\nHuman: a\n\nAssistant: b\n\nAssistant: c", "rejected": "\n\nHuman: a\n\nAssistant: d"}
    source = write(tmp_path / "some.jsonl", [*map(pair, range(150)), bad])
    open_data("hh", source=str(source), vocab_size=400, cache=tmp_path)
    assert "1 of 151 lines left out, which teach nothing" in capsys.readouterr().out


def test_a_limit_takes_that_many_pairs(folder, tmp_path):
    data = open_data("hh", source=str(folder), vocab_size=300, limit=120, cache=tmp_path)
    assert sum(len(data.records(*place)) for place in
               [("reward", "train"), ("judge", "train"), ("reward", "val"), ("reward", "test")]) == 120
    assert not (data.folder / "limited.jsonl").exists()


@pytest.mark.parametrize("names,message", [
    (["test.jsonl"], "train.jsonl or train.jsonl.gz is missing"), ([], "is missing"),
    (["train.jsonl", "train.jsonl.gz"], "plain and as .gz: keep one")])
def test_a_folder_that_cannot_serve_is_refused(tmp_path, names, message):
    for name in names:
        write(tmp_path / name, map(pair, range(30)))
    with pytest.raises(UserError, match=message):
        prepare("hh", source=str(tmp_path), cache=tmp_path / "c")


# ---- downloads -----------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def server(folder):
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    handler.log_message = lambda *_: None
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as served:
        threading.Thread(target=served.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{served.server_port}"
        served.shutdown()


def test_a_url_serves_as_source_and_is_asked_once(server, folder, data, tmp_path, monkeypatch):
    url = f"{server}/train.jsonl.gz?version=2"
    made = open_data("hh", source=url, vocab_size=400, cache=tmp_path)
    assert made.records("reward", "test") == data.records("reward", "test")
    monkeypatch.setattr("urllib.request.urlopen", None)
    open_data("hh", source=url, vocab_size=300, cache=tmp_path)


@pytest.mark.parametrize("source", ["/none.jsonl", "not a url"])
def test_a_url_that_gives_nothing_is_refused(server, tmp_path, source):
    url = server + source if source[0] == "/" else "https://" + source
    with pytest.raises(UserError, match="could not be downloaded .*; bring the file"):
        prepare("hh", source=url, cache=tmp_path)
    assert not [*tmp_path.rglob("*none*")]


def test_without_a_network_the_published_files_are_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(hh, "URL", "http://127.0.0.1:9/")
    with pytest.raises(UserError, match="train.jsonl.gz could not be downloaded.*as --source"):
        prepare("hh", cache=tmp_path)


def test_the_published_files_are_checked(server, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(hh, "URL", f"{server}/")
    with pytest.raises(UserError, match="not the file that was published; delete it"):
        prepare("hh", cache=tmp_path)
    content = (folder / "train.jsonl.gz").read_bytes()
    monkeypatch.setattr(hh, "PUBLISHED", {"train.jsonl.gz": git_blob(content)})
    assert prepare("hh", vocab_size=400, cache=tmp_path)


def test_git_names_a_file_so():
    assert git_blob(b"hello\n") == "ce013625030ba8dba906f756967f9e9ca394464a"  # as `git hash-object` says


def test_a_download_that_breaks_off_leaves_nothing(tmp_path, monkeypatch):
    class Broken:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def read(self, n):
            raise OSError("connection reset")

    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: Broken())
    with pytest.raises(UserError, match="connection reset"):
        web_download("http://x/y", tmp_path / "y", "bring it")
    assert list(tmp_path.iterdir()) == []


def test_the_command_prepares_it(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("data.prepare.CACHE", tmp_path)
    main(["hh", f"--source={folder}", "--vocab_size=400"])
    assert "judge_train" in capsys.readouterr().out
