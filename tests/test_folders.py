"""Prepared folders: whole or not at all, refused when a file has changed, tidied by a command."""
import hashlib
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import pytest

import data.prepare as prepare_module
from data.folders import damage, file_digest, temporary_folder
from data.prepare import main, open_data, prepare
from runtime.options import UserError, run_main
from tests.conftest import ROOT


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_module, "CACHE", tmp_path / "c")
    return tmp_path / "c"


@pytest.fixture
def texts(tmp_path):
    """A user's file of 200 texts."""
    path = tmp_path / "d.jsonl"
    path.write_text("".join(json.dumps({"text": f"{i} says {i * i}"}) + "\n" for i in range(200)))
    return str(path)


@pytest.fixture
def folder(texts, cache):
    return prepare(texts, vocab_size=300)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# ---- damage --------------------------------------------------------------------------------------

def test_a_folder_as_it_was_written_is_whole(folder, texts):
    assert damage(folder) == ""
    assert open_data(texts, vocab_size=300).folder == folder


HARM = {"half": lambda raw: raw[:len(raw) // 2], "empty": lambda raw: b"",
        "zeros": lambda raw: raw[:len(raw) // 2] + bytes(len(raw) - len(raw) // 2),
        "a bit": lambda raw: raw[:len(raw) // 3] + bytes([raw[len(raw) // 3] ^ 1])
        + raw[len(raw) // 3 + 1:], "longer": lambda raw: raw + b" "}


@pytest.mark.parametrize("how", [*HARM, "gone"])
def test_damage_to_any_file_is_refused_with_its_name(folder, texts, how):
    for path in sorted(folder.iterdir()):
        raw = path.read_bytes()
        if how == "gone":
            path.unlink()
        else:
            path.write_bytes(HARM[how](raw))
        if (path.name, how) == ("meta.json", "gone"):  # then it is no prepared folder
            assert damage(open_data(texts, vocab_size=300).folder) == ""
        elif (path.name, how) != ("meta.json", "longer"):  # white space says the same
            with pytest.raises(UserError, match=f"damaged: {path.name}.*--clean"):
                open_data(texts, vocab_size=300)
        path.write_bytes(raw)


@pytest.mark.parametrize("state", ["[]", "{}", "null", '{"files": 3, "sha256": 1}'])
def test_a_description_of_another_kind_is_damage(folder, state):
    (folder / "meta.json").write_text(state)
    assert damage(folder)


def test_the_digest_of_a_long_file_is_that_of_its_content(tmp_path):
    (tmp_path / "x").write_bytes(b"a" * 3_000_001)
    assert file_digest(tmp_path / "x") == hashlib.sha256(b"a" * 3_000_001).hexdigest()


# ---- written whole -------------------------------------------------------------------------------

@pytest.mark.skipif(not pathlib.Path("/proc/self/fd").exists(), reason="needs Linux")
def test_every_file_is_on_the_disk_before_the_folder_has_its_name(texts, cache, monkeypatch):
    order, real_sync, real_rename = [], os.fsync, os.rename
    monkeypatch.setattr(os, "fsync", lambda handle: (
        order.append(os.readlink(f"/proc/self/fd/{handle}")), real_sync(handle)))
    monkeypatch.setattr(os, "rename", lambda a, b: (order.append("rename"), real_rename(a, b)))
    folder = prepare(texts, vocab_size=300)
    before = order[:order.index("rename")]
    temporary = before[-1]  # the folder itself, after all its files
    assert sorted(before[:-1]) == [f"{temporary}/{name}" for name in names(folder)]
    assert order[order.index("rename") + 1:] == [str(cache)]


def test_what_a_killed_process_left_goes_at_the_next_preparation(texts, cache, tmp_path):
    script = ("import os, signal, data.dataset, data.prepare as p\n"
              "data.dataset.DataWriter.documents = lambda *_: os.kill(os.getpid(), 9)\n"
              f"p.prepare({texts!r}, vocab_size=300, cache={str(cache)!r})\n")
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, stderr=subprocess.DEVNULL)
    assert done.returncode == -signal.SIGKILL
    assert names(cache)[0].startswith(".")
    folder = prepare(texts, vocab_size=300)
    assert names(cache) == [folder.name]


def test_what_a_living_process_builds_stays(cache, texts):
    with temporary_folder(cache / "d-0123456789ab") as building:
        folder = prepare(texts, vocab_size=300)
        run_main(main, ["--clean"])
        assert names(cache) == [building.name, folder.name]
    assert names(cache) == [folder.name]


# ---- the commands --------------------------------------------------------------------------------

def test_list_says_what_each_folder_is(folder, cache, capsys):
    other = cache / "e-0123456789ab"
    shutil.copytree(folder, other)
    next(other.glob("*.bin")).write_bytes(b"")
    (cache / ".d-0123456789ab.77").mkdir()
    (cache / "downloads").mkdir()
    assert run_main(main, ["--list"]) == 0
    left, whole, damaged = capsys.readouterr().out.splitlines()[1:]
    assert "left by a process that was stopped" in left
    assert folder.name in whole
    assert "d.jsonl --vocab_size=300" in whole
    assert "bytes: --clean removes it" in damaged


def test_clean_removes_what_no_run_can_use_and_nothing_else(folder, cache, capsys):
    for name in ("a-0123456789ab", "b-0123456789ab", "c-0123456789ab"):
        shutil.copytree(folder, cache / name)
    (cache / "a-0123456789ab" / "tokenizer.json").unlink()
    (cache / "b-0123456789ab" / "meta.json").unlink()
    meta = json.loads((folder / "meta.json").read_text())
    del meta["files"]
    (cache / "c-0123456789ab" / "meta.json").write_text(json.dumps(meta))
    (cache / ".d-0123456789ab.77").mkdir()
    for name in ("downloads", "mine", "my-0123456789ab"):  # the cache may be any folder
        (cache / name).mkdir()
        (cache / name / "letter.txt").write_text("x")
    assert run_main(main, ["--clean"]) == 0
    assert names(cache) == sorted([folder.name, "downloads", "mine", "my-0123456789ab"])
    assert capsys.readouterr().out.count("removed") == 4
    assert run_main(main, ["--clean"]) == 0
    assert "nothing to remove" in capsys.readouterr().out


def test_a_cache_that_is_not_there_is_empty(cache, capsys):
    for word in ("--list", "--clean"):
        assert run_main(main, [word]) == 0
    assert "nothing is prepared there" in capsys.readouterr().out
    assert not cache.exists()


@pytest.mark.parametrize("words,message", [
    (["reviews", "--list"], "leave out reviews"), (["--clean", "--limit=3"], "--limit has no effect")])
def test_list_and_clean_stand_alone(words, message, cache, capsys):
    assert run_main(main, words) == 2
    assert message in capsys.readouterr().err
