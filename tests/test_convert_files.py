"""Weights are read from every kind of file that people have, and written so that others read them;
a damaged or hostile file is refused in one line, before anything is made from its numbers."""
import errno
import json
import os
import pathlib
import pickle
import resource
import struct
import zipfile

import pytest
import torch

from convert import stored
from convert.files import open_tensors, write_tensors
from runtime.options import UserError
from tests.conftest import equal, noise

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16,
          torch.int8, torch.uint8, torch.bool]


def example(dtype=torch.float32) -> dict[str, torch.Tensor]:
    """A matrix, a vector, a number and an empty tensor of a type."""
    numbers = {"matrix.weight": noise(5, 3) * 9, "词": noise(7, seed=1) * 9, "number": noise(1, seed=2)[0],
               "empty": torch.zeros(0, 2)}
    return {name: (tensor > 0 if dtype == torch.bool else tensor.abs() if dtype == torch.uint8 else tensor).to(dtype)
            for name, tensor in numbers.items()}


def all_types() -> dict[str, torch.Tensor]:
    return {f"{dtype}.{name}": tensor for dtype in DTYPES for name, tensor in example(dtype).items()}


def read_all(path) -> dict[str, torch.Tensor]:
    """Every tensor; what is said of it before it is read is true."""
    tensors = {name: (entry, entry.read()) for name, entry in open_tensors(path).items()}
    for entry, tensor in tensors.values():
        assert (entry.shape, entry.dtype) == (tuple(tensor.shape), tensor.dtype)
    return {name: tensor for name, (_, tensor) in tensors.items()}


# ---- there and back ------------------------------------------------------------------------------

def test_what_is_written_is_read_bit_for_bit_in_every_type(tmp_path):
    assert write_tensors(tmp_path, all_types().items()) == [tmp_path / "model.safetensors"]
    assert equal(read_all(tmp_path), all_types())
    assert equal(read_all(tmp_path / "model.safetensors"), all_types())


def test_metadata_says_pt_unless_told_otherwise(tmp_path):
    write_tensors(tmp_path / "a", example().items())
    write_tensors(tmp_path / "b", example().items(), metadata={"format": "pt", "who": "我"})
    assert open_tensors(tmp_path / "a").metadata == {"format": "pt"}
    assert open_tensors(tmp_path / "b").metadata == {"format": "pt", "who": "我"}


def test_each_tensor_is_aligned_to_its_type(tmp_path):
    write_tensors(tmp_path, all_types().items())
    for entry in open_tensors(tmp_path).values():
        assert entry.offset % entry.dtype.itemsize == 0


def test_views_are_written_as_they_look(tmp_path):
    base = noise(4, 6)
    views = {"transposed": base.T, "columns": base[:, 1:3], "row": base[2], "repeated": base[:1].expand(3, 6)}
    write_tensors(tmp_path, views.items())
    assert equal(read_all(tmp_path), {name: view.contiguous() for name, view in views.items()})


def test_a_tensor_is_read_as_another_type_on_demand(tmp_path):
    write_tensors(tmp_path, example(torch.bfloat16).items())
    entry = open_tensors(tmp_path)["matrix.weight"]
    assert torch.equal(entry.read(torch.float32), example(torch.bfloat16)["matrix.weight"].float())


@pytest.mark.parametrize("piece", [1, 8, 24, 10**6])
def test_the_size_of_the_pieces_changes_nothing(tmp_path, monkeypatch, piece):
    write_tensors(tmp_path, example(torch.float64).items())
    monkeypatch.setattr(stored, "PIECE", max(piece, 8))
    assert equal(read_all(tmp_path), example(torch.float64))


def test_what_is_opened_can_be_written_without_being_read_whole(tmp_path):
    torch.save(example(), tmp_path / "pytorch_model.bin")
    write_tensors(tmp_path / "out", open_tensors(tmp_path).items(), max_shard_bytes=64)
    assert equal(read_all(tmp_path / "out"), example())


# ---- shards --------------------------------------------------------------------------------------

def test_shards_are_named_and_indexed_as_elsewhere(tmp_path):
    tensors = {f"layer.{i}": noise(10, seed=i) for i in range(5)}  # 40 bytes each
    paths = write_tensors(tmp_path, tensors.items(), max_shard_bytes=80)
    assert [path.name for path in paths] == [*(f"model-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)),
                                             "model.safetensors.index.json"]
    index = json.loads(paths[-1].read_text(encoding="utf-8"))
    assert index["metadata"] == {"total_size": 200, "total_parameters": 50}
    assert index["weight_map"] == {f"layer.{i}": paths[i // 2].name for i in range(5)}
    assert sorted(tmp_path.iterdir()) == paths
    assert equal(read_all(tmp_path), tensors)
    assert open_tensors(tmp_path).files == paths[:-1]


def test_a_tensor_larger_than_a_shard_has_one_of_its_own(tmp_path):
    tensors = {"small": noise(2), "large": noise(100), "other": noise(2)}
    assert len(write_tensors(tmp_path, tensors.items(), max_shard_bytes=100)) == 4
    assert equal(read_all(tmp_path), tensors)


def test_a_tensor_that_only_its_shard_knows_is_not_lost(tmp_path):
    indexed(tmp_path, {"a": "a.safetensors"})
    (tmp_path / "a.safetensors").write_bytes(file_of({"a": tensor(), "new": tensor(place=(16, 32))}, 32))
    assert set(open_tensors(tmp_path)) == {"a", "new"}


# ---- .bin files ----------------------------------------------------------------------------------

def test_a_bin_file_is_read_bit_for_bit_whatever_the_tensors_share(tmp_path):
    base = noise(4, 6)
    state = {**all_types(), "tied": base, "same": base, "part": base[1:3], "transposed": base.T,
             "columns": base[:, ::2], "parameter": torch.nn.Parameter(base)}
    torch.save(state, tmp_path / "pytorch_model.bin")
    assert equal(read_all(tmp_path), {name: tensor.detach() for name, tensor in state.items()})


def test_a_modules_state_dict_is_read(tmp_path):
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    torch.save(module.state_dict(), tmp_path / "pytorch_model.bin")
    assert equal(read_all(tmp_path), dict(module.state_dict()))


def test_bin_files_in_shards_are_read(tmp_path):
    state = example()
    weight_map = {name: f"pytorch_model-{i}.bin" for i, name in enumerate(state)}
    for name, shard in weight_map.items():
        torch.save({name: state[name]}, tmp_path / shard)
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")
    assert equal(read_all(tmp_path), state)


# ---- which file is taken -------------------------------------------------------------------------

def test_safetensors_is_preferred(tmp_path):
    torch.save({"a": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    (tmp_path / "other.gguf").write_bytes(b"GGUF")
    assert open_tensors(tmp_path).path.name == "pytorch_model.bin"
    (tmp_path / "model.safetensors").write_bytes(GOOD)
    assert open_tensors(tmp_path).path.name == "model.safetensors"


def test_links_are_followed(tmp_path):
    write_tensors(tmp_path / "blobs", example().items(), max_shard_bytes=64)
    (tmp_path / "snapshot").mkdir()
    for path in (tmp_path / "blobs").iterdir():
        (tmp_path / "snapshot" / path.name).symlink_to(path)
    assert equal(read_all(tmp_path / "snapshot"), example())


# ---- writing that fails --------------------------------------------------------------------------

@pytest.mark.parametrize("shard_bytes", [10**9, 64])
@pytest.mark.parametrize("fails", ["fsync", "replace"])
def test_a_full_disk_is_one_line_and_leaves_no_half_files(tmp_path, monkeypatch, shard_bytes, fails):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, fails, full)
    with pytest.raises(UserError, match="cannot be written.*free some space"):
        write_tensors(tmp_path, example().items(), max_shard_bytes=shard_bytes)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_the_old_weights(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    write_tensors(tmp_path, example().items())
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="cannot be written"):
        write_tensors(tmp_path, {"other": noise(3)}.items())
    assert equal(read_all(tmp_path), example())


def test_a_stop_between_two_renamings_leaves_no_mixture_that_opens(tmp_path, monkeypatch):
    write_tensors(tmp_path, {"a": noise(3), "b": noise(3)}.items(), max_shard_bytes=12)
    replace, renamed = os.replace, []

    def stop(source, target):
        if renamed:
            raise KeyboardInterrupt
        renamed.append(target)
        replace(source, target)

    monkeypatch.setattr(os, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        write_tensors(tmp_path, {"a": noise(3, seed=1), "b": noise(3, seed=1)}.items(), max_shard_bytes=12)
    with pytest.raises(UserError, match="holds no weights"):
        open_tensors(tmp_path)


@pytest.mark.parametrize("first, second", [(10**9, 64), (64, 10**9), (64, 1)])
def test_other_weights_in_the_folder_are_neither_mixed_with_nor_deleted(tmp_path, first, second):
    write_tensors(tmp_path, example().items(), max_shard_bytes=first)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError, match="other weights are there.*empty folder"):
        write_tensors(tmp_path, example().items(), max_shard_bytes=second)
    assert sorted(tmp_path.iterdir()) == before


def test_a_type_that_is_not_written_is_named(tmp_path):
    with pytest.raises(UserError, match="'z' of torch.complex64"):
        write_tensors(tmp_path, [("z", torch.zeros(2, dtype=torch.complex64))])


def test_a_name_twice_is_a_mistake_of_the_caller(tmp_path):
    with pytest.raises(ValueError, match="twice"):
        write_tensors(tmp_path, [("a", noise(1)), ("a", noise(1))])


# ---- damaged and hostile files -------------------------------------------------------------------

def tensor(shape=(2, 2), place=(0, 16), dtype="F32", **more) -> dict:
    """A header's entry."""
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(place), **more}


def file_of(header, numbers=16, length=None) -> bytes:
    """A safetensors file with this header, a number of zero bytes, and a length that may be wrong."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + bytes(numbers)


GOOD = file_of({"a": tensor()})
POINTER = b"version https://git-lfs.example/spec/v1\noid sha256:00\nsize 5\n"
# (what is wrong, the file, words of the message)
BAD_SAFETENSORS = [
    ("an empty file", b"", "is empty"),
    ("a pointer of Git LFS", POINTER, "git lfs pull"),
    ("a few bytes", b"\1\2\3", "does not begin as a safetensors file"),
    ("a web page", b"<!DOCTYPE html><html>Not found</html>", "does not begin as a safetensors file"),
    ("cut inside the header", GOOD[:30], "claims a header of .* in a file of 30"),
    ("cut inside the numbers", GOOD[:-1], "lies beyond the end"),
    ("more bytes than the tensors have", GOOD + b"\0", "1 bytes more than its tensors"),
    ("a header larger than any", file_of(b"{", length=2**63), "more than 100,000,000"),
    ("a header larger than the file", file_of(b"{", length=10**7), "in a file of"),
    ("no JSON", file_of(b"{nothing"), "is not read as JSON"),
    ("no UTF-8", file_of(b'{"\xff": 1}'), "is not read as JSON"),
    ("JSON too deep", file_of(b'{"a":' * 100_000), "is not read as JSON"),
    ("a name twice", file_of(b'{"a": 1, "b": 2, "a": 3}'), "the name 'a' occurs twice"),
    ("an entry that is none", file_of({"a": 5}), "'a' has no dtype, shape"),
    ("no shape", file_of({"a": {"dtype": "F32", "data_offsets": [0, 16]}}), "'a' has no dtype, shape"),
    ("a negative shape", file_of({"a": tensor((-2, -2))}), "whole numbers from 0 on"),
    ("a shape of fractions", file_of({"a": tensor((2.0, 2))}), "whole numbers from 0 on"),
    ("a shape of bools", file_of({"a": tensor((True, 4))}), "whole numbers from 0 on"),
    ("a negative offset", file_of({"a": tensor(place=(-16, 0))}), "whole numbers from 0 on"),
    ("three offsets", file_of({"a": tensor(place=(0, 8, 16))}), "whole numbers from 0 on"),
    ("offsets in the wrong order", file_of({"a": tensor(place=(16, 0))}), "lies beyond the end"),
    ("an offset outside", file_of({"a": tensor(place=(2**40, 2**40 + 16))}), "lies beyond the end"),
    ("an offset of a thousand digits", file_of({"a": tensor(place=(0, 10**1000))}), "whole numbers from 0 on"),
    ("an absurd shape", file_of({"a": tensor((2**60,))}), "claims more numbers than the file has"),
    ("a shape whose product wraps round", file_of({"a": tensor((2**32, 2**32, 4))}), "claims more numbers"),
    ("an absurd shape of no numbers", file_of({"a": tensor((0, 2**62), (0, 0))}), "claims more numbers"),
    ("too many dimensions", file_of({"a": tensor((1,) * 1000 + (4,))}), "claims more numbers"),
    ("fewer bytes than the shape", file_of({"a": tensor((2, 1))}), "takes 8 bytes, but has 16"),
    ("overlapping tensors", file_of({"a": tensor(), "b": tensor(place=(8, 24))}, 24), "'b' overlaps"),
    ("two tensors in one place", file_of({"a": tensor(), "b": tensor()}), "'b' overlaps"),
    ("a gap", file_of({"a": tensor(), "b": tensor(place=(20, 36))}, 36), "'b' leaves a gap"),
    ("eight bits of floats", file_of({"a": tensor((16,), dtype="F8_E4M3")}), "stored as 'F8_E4M3', which is not read"),
    ("a type with a line break", file_of({"a": tensor(dtype="F\n32")}), r"stored as 'F\\n32'"),
    ("a name with a line break", file_of({"a\nb": 5}), r"'a\\nb' has no dtype"),
    ("a name that is no Unicode", file_of(b'{"\\ud800": 5}'), r"'\\ud800' has no dtype"),
    ("metadata that is no object", file_of({"__metadata__": [1], "a": tensor()}), "__metadata__"),
    ("metadata of numbers", file_of({"__metadata__": {"format": 1}, "a": tensor()}), "__metadata__"),
    ("no tensors", file_of({}, 0), "holds no tensors"),
]


def refused(path, words: str, where: str = "", most: int = 700) -> None:
    """Opening and reading ends in one line with these words and the name of the file, without much memory."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match=words) as caught:
        for entry in open_tensors(path).values():
            entry.read()
    message = str(caught.value)
    assert message.isprintable() and len(message) < most
    assert (where or path.name) in message
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kilobytes


def test_the_good_file_of_the_table_is_read(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(GOOD)
    assert equal(read_all(tmp_path), {"a": torch.zeros(2, 2)})


@pytest.mark.parametrize("what, raw, words", BAD_SAFETENSORS, ids=[what for what, _, _ in BAD_SAFETENSORS])
def test_a_bad_safetensors_file_is_refused(tmp_path, what, raw, words):
    path = tmp_path / "model.safetensors"
    path.write_bytes(raw)
    refused(path, words)


class Runs:
    """Pickled, it makes a folder when it is loaded."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def archive_of(folder: pathlib.Path, value) -> bytes:
    torch.save(value, folder / "x")
    return (folder / "x").read_bytes()


def with_pickle(folder: pathlib.Path, change) -> bytes:
    """A saved matrix whose pickle was changed."""
    torch.save({"a": noise(3, 4)}, folder / "x")
    with zipfile.ZipFile(folder / "x") as old, zipfile.ZipFile(folder / "y", "w") as new:
        for name in old.namelist():
            raw = old.read(name)
            new.writestr(name, change(raw) if name.endswith("data.pkl") else raw)
    return (folder / "y").read_bytes()


SHAPE, STRIDES = b"K\x03K\x04\x86", b"K\x04K\x01\x86"  # (3, 4) and (4, 1) in a pickle
BAD_BIN = {
    "an empty file": (lambda at: b"", "is empty"),
    "a pointer of Git LFS": (lambda at: POINTER, "git lfs pull"),
    "no pickle": (lambda at: b"weights, honestly", "is no file of torch.save"),
    "a bare pickle": (lambda at: pickle.dumps({"a": 1}), "bare pickle"),
    "a file of old torch": (lambda at: (torch.save({"a": noise(2)}, at / "x", _use_new_zipfile_serialization=False),
                                        (at / "x").read_bytes())[1], "before torch 1.6"),
    "code in the pickle": (lambda at: archive_of(at, {"a": Runs(at / "made")}), "asks for .*mkdir.*no code"),
    "a whole module": (lambda at: archive_of(at, torch.nn.Linear(2, 2)), "no code of a file is run here"),
    "cut in the middle": (lambda at: archive_of(at, {"a": noise(99)})[:-300], "is not read as weights"),
    "no pickle in the archive": (lambda at: with_pickle(at, lambda raw: b"nothing"), "is not read as weights"),
    "a list": (lambda at: archive_of(at, [noise(2)]), "holds a list"),
    "things besides tensors": (lambda at: archive_of(at, {"a": noise(2), "epoch": 3}), "'epoch' is a int"),
    "numbers as names": (lambda at: archive_of(at, {3: noise(2)}), "'3' is a"),
    "complex numbers": (lambda at: archive_of(at, {"a": torch.zeros(2, dtype=torch.complex64)}), "complex64"),
    "a sparse tensor": (lambda at: archive_of(at, {"a": torch.eye(3).to_sparse()}), "is not read as weights"),
    "a tensor repeated": (lambda at: archive_of(at, {"a": torch.zeros(1).expand(10**9)}), "claims more numbers"),
    "a shape larger than the file": (lambda at: with_pickle(at, lambda raw: raw.replace(
        SHAPE, b"\x8a\x05\0\0\0\0\x01K\x04\x86")), "is not read as weights|claims more numbers"),
    "strides beyond the file": (lambda at: with_pickle(at, lambda raw: raw.replace(
        STRIDES, b"\x8a\x05\0\0\0\0\x01K\x01\x86")), "is not read as weights|beyond the end|claims more"),
    "no tensors": (lambda at: archive_of(at, {}), "holds no tensors"),
}


@pytest.mark.parametrize("what", BAD_BIN)
def test_a_bad_bin_file_is_refused_and_no_code_of_it_is_run(tmp_path, what):
    build, words = BAD_BIN[what]
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(build(tmp_path))
    refused(path, words)
    assert not (tmp_path / "made").exists()


INDEX = "model.safetensors.index.json"


def indexed(folder: pathlib.Path, weight_map) -> None:
    """A shard that holds the tensor "a", another with "b", and an index."""
    for name in "ab":
        (folder / f"{name}.safetensors").write_bytes(file_of({name: tensor()}))
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")


A, B = {"a": "a.safetensors"}, {"b": "b.safetensors"}
BAD_FOLDERS = {
    "nothing in it": (lambda at: None, "holds no weights .*model.safetensors.*index.json.*pytorch_model.bin.*gguf", ""),
    "a config alone": (lambda at: (at / "config.json").write_text("{}"), "holds no weights", ""),
    "two GGUF files": (lambda at: [(at / f"{x}.gguf").write_bytes(b"GGUF") for x in "ab"], "2 GGUF files", "a.gguf"),
    "a folder with the file's name": (lambda at: (at / "model.safetensors").mkdir(), "no plain file",
                                      "model.safetensors"),
    "a link into nothing": (lambda at: (at / "model.safetensors").symlink_to(at / "gone"), "is not there",
                            "model.safetensors"),
    "a pipe": (lambda at: os.mkfifo(at / "model.safetensors"), "no plain file", "model.safetensors"),
    "an index that is no JSON": (lambda at: (at / INDEX).write_text("weights"), "index is not read as JSON", INDEX),
    "an index that is a list": (lambda at: (at / INDEX).write_text("[]"), "it is no object", INDEX),
    "an index without a map": (lambda at: (at / INDEX).write_text('{"metadata": {}}'), "no weight_map", INDEX),
    "an index with an empty map": (lambda at: indexed(at, {}), "no weight_map", INDEX),
    "a missing shard": (lambda at: indexed(at, A | {"c": "c.safetensors"}),
                        "1 of 2 shards are missing, the first is 'c.safetensors'", INDEX),
    "a tensor that its shard does not hold": (lambda at: indexed(at, A | {"c": "b.safetensors"}),
                                              "'c' is in 'b.safetensors', which does not hold it", INDEX),
    "a tensor in another shard than said": (lambda at: indexed(at, {"a": "b.safetensors", **B}),
                                            "'a' is in 'b.safetensors'", INDEX),
    "a shard above the folder": (lambda at: indexed(at, {"a": "../a.safetensors"}), "no .safetensors file of", INDEX),
    "a shard by its whole path": (lambda at: indexed(at, {"a": "/etc/a.safetensors"}), "no .safetensors file of",
                                  INDEX),
    "a shard in another system's words": (lambda at: indexed(at, {"a": "..\\a.safetensors"}), "of the same folder",
                                          INDEX),
    "a shard of another kind": (lambda at: indexed(at, {"a": "passwords"}), "no .safetensors file", INDEX),
    "a shard that is a number": (lambda at: indexed(at, {"a": 5}), "names '5' as a shard", INDEX),
    "a shard that is no Unicode": (lambda at: indexed(at, {"a": "\ud800.safetensors"}), "shards are missing", INDEX),
    "a shard with an endless name": (lambda at: indexed(at, {"a": "a" * 5000 + ".safetensors"}), "cannot be read",
                                     INDEX),
    "a damaged shard": (lambda at: (indexed(at, A | B), (at / "b.safetensors").write_bytes(GOOD[:-1])),
                        "lies beyond the end", "b.safetensors"),
}


@pytest.mark.parametrize("what", BAD_FOLDERS)
def test_a_bad_folder_is_refused(tmp_path, what):
    build, words, where = BAD_FOLDERS[what]
    build(tmp_path)
    refused(tmp_path, words, where)


@pytest.mark.parametrize("name, words", [("gone.safetensors", "is not there"), ("weights.onnx", "no file of weights"),
                                         ("gone.gguf", "is not there"), ("gone.bin", "is not there"),
                                         ("gone", "no file of weights")])
def test_a_path_that_leads_to_no_weights_is_refused(tmp_path, name, words):
    refused(tmp_path / name, words)


def test_a_file_that_is_cut_after_it_was_opened_is_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(GOOD)
    entry = open_tensors(path)["a"]
    path.write_bytes(GOOD[:-1])
    with pytest.raises(UserError, match="has become shorter"):
        entry.read()


# ---- memory --------------------------------------------------------------------------------------

def own_memory() -> int:
    """Bytes of this process that lie in memory now."""
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not pathlib.Path("/proc/self/statm").exists(), reason="only Linux says it there")
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_memory_holds_what_was_read_and_no_copy_of_the_file(tmp_path, kind):
    size, parts = 120_000_000, 6
    tensors = {str(i): torch.full((size // parts // 4,), float(i)) for i in range(parts)}
    if kind == "bin":
        torch.save({}, tmp_path / "x.bin")
        pytest.raises(UserError, open_tensors, tmp_path / "x.bin")  # loads what torch needs for it
        torch.save(tensors, tmp_path / "pytorch_model.bin")
    else:
        write_tensors(tmp_path, tensors.items())
    del tensors
    before, kept = own_memory(), {}
    for name, entry in open_tensors(tmp_path).items():
        kept[name] = entry.read()
        assert own_memory() - before < 1.2 * (int(name) + 1) / parts * size + 5e6
    assert all(torch.equal(kept[str(i)], torch.full((size // parts // 4,), float(i))) for i in range(parts))


# ---- against the package -------------------------------------------------------------------------

def test_the_package_reads_ours(tmp_path):
    safe = pytest.importorskip("safetensors.torch")
    tensors = all_types()
    write_tensors(tmp_path / "one", tensors.items())
    assert equal(safe.load_file(tmp_path / "one" / "model.safetensors"), tensors)
    paths = write_tensors(tmp_path / "shards", tensors.items(), max_shard_bytes=200)
    assert len(paths) > 3
    assert equal({k: v for path in paths[:-1] for k, v in safe.load_file(path).items()}, tensors)


def test_ours_reads_the_packages(tmp_path):
    safe = pytest.importorskip("safetensors.torch")
    safe.save_file(all_types(), tmp_path / "model.safetensors", metadata={"format": "pt", "a": "新"})
    assert equal(read_all(tmp_path), all_types())
    assert open_tensors(tmp_path).metadata == {"format": "pt", "a": "新"}


def test_ours_reads_shards_of_transformers_and_it_reads_ours(tmp_path):
    pytest.importorskip("safetensors")
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                                      num_attention_heads=2)
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1
    assert equal(read_all(tmp_path / "theirs"), dict(model.state_dict()))
    write_tensors(tmp_path / "ours", model.state_dict().items(), max_shard_bytes=20_000)
    config.save_pretrained(tmp_path / "ours")
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "ours")
    assert equal(dict(again.state_dict()), dict(model.state_dict()))


@pytest.mark.parametrize("what, raw, words", BAD_SAFETENSORS, ids=[what for what, _, _ in BAD_SAFETENSORS])
def test_the_package_refuses_what_ours_does(tmp_path, what, raw, words):
    safe = pytest.importorskip("safetensors")
    if what in ("eight bits of floats", "too many dimensions", "no tensors"):
        pytest.skip("valid, but of no use here")
    (tmp_path / "x").write_bytes(raw)
    with pytest.raises(Exception), safe.safe_open(tmp_path / "x", "pt") as file:  # noqa: B017
        for name in file.keys():
            file.get_tensor(name)
