"""Files are written atomically, never through a link, and a payload that is not the one written, or
that claims to be larger than its file, is refused before anything is built."""
import errno
import os
import pickle
import random
import resource
import zipfile

import pytest
import torch

from runtime import storage
from runtime.options import UserError
from runtime.storage import (Damaged, is_whole, keep, load_whole, open_plain, previous_of,
                             replace_text, save_whole)
from tests.conftest import equal

# ---- written at once -----------------------------------------------------------------------------


def killed(*_) -> None:
    raise KeyboardInterrupt


def test_text_replaces_the_file_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "config.json"
    path.write_text("old, and longer", encoding="utf-8")
    replace_text(path, "新")
    assert path.read_text(encoding="utf-8") == "新"
    assert list(tmp_path.iterdir()) == [path]


def test_a_stop_before_the_renaming_keeps_the_old_text(tmp_path, monkeypatch):
    path = tmp_path / "config.json"
    path.write_text("old", encoding="utf-8")
    monkeypatch.setattr(storage.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        replace_text(path, "new")
    assert path.read_text(encoding="utf-8") == "old"


def test_a_payload_is_saved_and_its_folder_is_made(tmp_path):
    path = tmp_path / "new" / "checkpoint.pt"
    save_whole(path, {"step": 3})
    assert torch.load(path, weights_only=True) == {"step": 3}
    assert list(path.parent.iterdir()) == [path]


def test_a_payload_is_synced_before_it_is_renamed(tmp_path, monkeypatch):
    order, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(storage.os, "fsync", lambda f: order.append("synced") or fsync(f))
    monkeypatch.setattr(storage.os, "replace", lambda *a: order.append("renamed") or replace(*a))
    save_whole(tmp_path / "checkpoint.pt", {"step": 1})
    assert order == ["synced", "renamed"]


def test_a_stop_before_the_renaming_keeps_the_old_payload(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pt"
    save_whole(path, {"step": 1})
    monkeypatch.setattr(storage.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        save_whole(path, {"step": 2})
    assert torch.load(path, weights_only=True) == {"step": 1}


@pytest.fixture
def full_disk(monkeypatch):
    """Writing a file works until it is synced."""
    def fsync(_):
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(storage.os, "fsync", fsync)


def test_a_full_disk_keeps_the_old_payload_and_is_reported(tmp_path, request):
    path = tmp_path / "checkpoint.pt"
    save_whole(path, {"step": 1})
    request.getfixturevalue("full_disk")
    with pytest.raises(UserError, match="checkpoint.pt.*No space left.*previous one is kept"):
        save_whole(path, {"step": 2}, previous_of(path))
    assert load_whole(path) == {"step": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_first_save_claims_no_previous_file(tmp_path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(UserError, match="cannot be written") as error:
        save_whole(tmp_path / "file" / "checkpoint.pt", {"step": 1})
    assert "kept" not in str(error.value)


# ---- links and pipes -----------------------------------------------------------------------------

@pytest.fixture
def victim(tmp_path):
    """A file of the user's outside of the run's folder, which no link may reach."""
    path = tmp_path / "victim"
    path.write_text("mine", encoding="utf-8")
    return path


def test_what_is_written_does_not_follow_a_planted_link(tmp_path, victim):
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("config.json", "config.tmp", "checkpoint.pt", "checkpoint.tmp",
                 "checkpoint.previous.pt", "checkpoint.previous.tmp"):
        (folder / name).symlink_to(victim)
    replace_text(folder / "config.json", "new")
    for step in range(3):
        save_whole(folder / "checkpoint.pt", {"step": step},
                   previous_of(folder / "checkpoint.pt"))
    assert victim.read_text(encoding="utf-8") == "mine"
    assert load_whole(folder / "checkpoint.pt") == {"step": 2}
    assert load_whole(folder / "checkpoint.previous.pt") == {"step": 1}


@pytest.mark.parametrize("mode", ["r", "a"])
def test_a_link_in_a_runs_folder_is_refused(tmp_path, victim, mode):
    (tmp_path / "link").symlink_to(victim)
    with pytest.raises(UserError, match="link: is a link.*remove it"):
        open_plain(tmp_path / "link", mode)
    assert victim.read_text(encoding="utf-8") == "mine"


def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="no plain file"):
        open_plain(tmp_path / "pipe", "r")
    with pytest.raises(UserError, match="no plain file"):
        open_plain(tmp_path / "pipe", "a")
    with pytest.raises(UserError, match="no plain file"):
        open_plain(tmp_path, "a")
    with pytest.raises(Damaged, match="no plain file"):
        load_whole(tmp_path / "pipe")


def test_a_link_to_a_checkpoint_elsewhere_may_be_read(tmp_path):
    save_whole(tmp_path / "a.pt", {"step": 1})
    (tmp_path / "b.pt").symlink_to(tmp_path / "a.pt")
    assert load_whole(tmp_path / "b.pt") == {"step": 1}


# ---- the newest and the one before ---------------------------------------------------------------

@pytest.mark.parametrize("calls", range(6))
def test_a_stop_at_any_call_leaves_a_good_newest_and_the_next_save_works(tmp_path, monkeypatch,
                                                                         calls):
    path, left = tmp_path / "checkpoint.pt", [calls]
    for step in (1, 2):
        save_whole(path, {"step": step}, previous_of(path))

    def stopping(name):
        real = getattr(os, name)

        def call(*arguments):
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
            return real(*arguments)
        monkeypatch.setattr(storage.os, name, call)

    with monkeypatch.context():
        for name in ("fsync", "link", "replace"):
            stopping(name)
        try:
            save_whole(path, {"step": 3}, previous_of(path))
        except KeyboardInterrupt:
            pass
        monkeypatch.undo()
    assert load_whole(path)["step"] in (2, 3)
    assert load_whole(previous_of(path))["step"] in (1, 2)
    save_whole(path, {"step": 4}, previous_of(path))
    assert load_whole(path) == {"step": 4}
    assert load_whole(previous_of(path))["step"] in (2, 3)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint.previous.pt", "checkpoint.pt"]


def test_a_file_system_without_hard_links_keeps_the_one_before_too(tmp_path, monkeypatch):
    def link(*_):
        raise PermissionError(1, "Operation not permitted")

    path = tmp_path / "checkpoint.pt"
    monkeypatch.setattr(storage.os, "link", link)
    for step in (1, 2):
        save_whole(path, {"step": step}, previous_of(path))
    assert (load_whole(path), load_whole(previous_of(path))) == ({"step": 2}, {"step": 1})


def test_a_second_name_for_a_file_that_has_both_changes_nothing(tmp_path):
    path = tmp_path / "checkpoint.pt"
    save_whole(path, {"step": 1})
    for _ in range(2):
        keep(path, previous_of(path))
    assert len(list(tmp_path.iterdir())) == 2


# ---- the digest ----------------------------------------------------------------------------------

PAYLOAD = {"model": {"a": torch.arange(600.0)}, "text": "文" * 50, "state": {"x": [1, 2.5, None]}}


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "checkpoint.pt"
    save_whole(path, PAYLOAD)
    return path


def test_a_payload_comes_back_and_any_torch_load_reads_it(saved):
    assert equal(load_whole(saved), PAYLOAD)
    assert equal(torch.load(saved, weights_only=True), PAYLOAD)


def test_each_flipped_bit_is_refused(saved):
    raw, rng = saved.read_bytes(), random.Random(0)
    for place in [*range(8 * (len(raw) - 120), 8 * len(raw)),  # every bit of end record and digest
                  *(rng.randrange(8 * len(raw)) for _ in range(500))]:
        damaged = bytearray(raw)
        damaged[place // 8] ^= 1 << place % 8
        saved.write_bytes(damaged)
        assert not is_whole(saved), place
        with pytest.raises(Damaged):
            load_whole(saved)


def test_a_file_cut_or_lengthened_anywhere_is_refused(saved):
    raw = saved.read_bytes()
    for damaged in (*(raw[:n] for n in (*range(0, len(raw), 97), *range(len(raw) - 100, len(raw)))),
                    raw + b"\0", raw + raw, b"\0" * len(raw)):
        saved.write_bytes(damaged)
        with pytest.raises(Damaged):
            load_whole(saved)


def test_a_file_without_a_digest_as_earlier_versions_wrote_it_is_read(tmp_path):
    torch.save(PAYLOAD, tmp_path / "old.pt")
    assert equal(load_whole(tmp_path / "old.pt"), PAYLOAD)
    assert is_whole(tmp_path / "old.pt")


# ---- files that claim more than they hold --------------------------------------------------------

def rewritten(path, change, compression=zipfile.ZIP_STORED, more=()) -> None:
    """The archive anew, each entry as change(name, content); without a digest."""
    with zipfile.ZipFile(path) as archive:
        entries = [(name, archive.read(name)) for name in archive.namelist()]
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in (*entries, *more):
            archive.writestr(name, change(name, content))


def pickled(content):
    return lambda name, old: content if name.endswith("data.pkl") else old


class Call:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


CLAIMS = {
    "compressed": lambda path: rewritten(path, lambda _, content: content, zipfile.ZIP_DEFLATED),
    "bytearray": lambda path: rewritten(path, pickled(pickle.dumps(Call(bytearray, 10**9), 2))),
    "tensor": lambda path: rewritten(path, pickled(pickle.dumps(Call(torch.Tensor, 10**5, 10**4),
                                                                2))),
    "one number for all": lambda path: torch.save({"a": torch.zeros(1).expand(10**9)}, path),
    "one storage for many": lambda path: torch.save([x := torch.zeros(9999), *(x[:] for _ in range(9))],
                                                    path),
    "sparse": lambda path: torch.save(torch.sparse_coo_tensor(size=(10**5, 10**5)), path),
    "meta": lambda path: torch.save(torch.zeros(10**9, device="meta"), path)}


@pytest.mark.parametrize("claim", CLAIMS)
def test_a_file_that_claims_more_than_it_holds_is_refused_without_the_memory(saved, claim):
    CLAIMS[claim](saved)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(Damaged):
        load_whole(saved)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # kilobytes


def test_lists_that_hold_themselves_end(tmp_path):
    nest = [1]
    nest.append(nest)
    for _ in range(60):
        nest = [nest, nest]
    torch.save(nest, tmp_path / "nest.pt")
    assert len(load_whole(tmp_path / "nest.pt")) == 2
