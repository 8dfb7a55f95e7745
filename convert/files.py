"""Weights in the files that people have them in: safetensors, pytorch_model.bin, both in shards, GGUF.

safetensors is read and written here and not by its package: the format is a length in 8 bytes, a JSON
header with each tensor's type, shape and place, and the raw numbers. That takes some 30 lines, nothing
has to be installed, and every number of a stranger's file is checked before it is used.
"""
import collections
import contextlib
import json
import math
import os
import pathlib
import re
import struct
from collections.abc import Iterable
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from convert.gguf import read_gguf
from convert.stored import AGAIN, PLAIN, PLAIN_OF, Stored, Tensors, opened
from runtime.options import UserError
from runtime.storage import Damaged, replacing, require_modest
from runtime.terminal import advice

# in a folder the first that is there is read
NAMES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
MOST_HEADER = 100_000_000  # bytes; the same limit as in the safetensors package
INDEX = ".index.json"


# ---- what is opened ------------------------------------------------------------------------------

def open_tensors(path: str | pathlib.Path) -> Tensors:
    """The tensors of a checkpoint: of a folder, of an index of shards, or of one file of weights.

    Nothing but headers is read; `tensors[name].read()` reads one. UserError if there are no weights,
    or they are damaged, or of a kind that is not read: one line that says where and what to do.
    """
    path = pathlib.Path(path)
    if path.is_dir():
        path = find_weights(path)
    if path.name.endswith(INDEX):
        tensors = _open_index(path)
    elif path.suffix == ".safetensors":
        tensors = _open_safetensors(path)
    elif path.suffix in (".bin", ".pt", ".pth"):
        tensors = _open_bin(path)
    elif path.suffix == ".gguf":
        tensors = read_gguf(path)[1]
    else:
        raise UserError(f"{path}: is no file of weights by its name: give a folder, or a file that ends in "
                        f".safetensors, .bin, .gguf or {INDEX}")
    if not tensors:
        raise UserError(f"{path}: holds no tensors: check which file it is")
    return tensors


def find_weights(folder: pathlib.Path) -> pathlib.Path:
    """The file to open in a folder: safetensors before .bin before GGUF. UserError if there is none,
    or more than one GGUF file, which are the same model in several precisions."""
    for name in NAMES:
        if os.path.lexists(folder / name):  # a link into nothing is reported, not passed over
            return folder / name
    files = sorted(folder.glob("*.gguf"))
    if len(files) > 1:
        raise UserError(f"{folder}: holds {len(files)} GGUF files: name one of them, for example {files[0]}")
    if not files:
        raise UserError(f"{folder}: holds no weights (looked for {', '.join(NAMES)} and *.gguf): give the folder "
                        "that has config.json and the weights")
    return files[0]


def _open_index(path: pathlib.Path) -> Tensors:
    """The tensors of all shards that an index names, those too that only a shard knows."""
    with opened(path) as (file, size):
        index = _json(path, file.read(MOST_HEADER), "the index")
        weight_map = index.get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise Damaged(f"{path}: has no weight_map of names and files: {AGAIN}")
        ending = pathlib.Path(path.name.removesuffix(INDEX)).suffix
        for shard in weight_map.values():
            if not isinstance(shard, str) or re.search(r"[/\\:\0]", shard) or not shard.endswith(ending):
                raise Damaged(f"{path}: names {str(shard)[:80]!r} as a shard, which is no {ending} file of the same "
                              "folder: correct weight_map")
        shards = sorted(set(weight_map.values()))
        missing = [shard for shard in shards if not (path.parent / shard).exists()]
        if missing:
            raise UserError(f"{path}: {len(missing)} of {len(shards)} shards are missing, the first is "
                            f"{missing[0][:80]!r}: fetch them into the same folder")
    entries: dict[str, Stored] = {}
    for shard in shards:
        tensors = {".safetensors": _open_safetensors, ".bin": _open_bin}[ending](path.parent / shard)
        entries |= {name: entry for name, entry in tensors.items() if weight_map.get(name, shard) == shard}
    for name, shard in weight_map.items():
        if name not in entries:
            raise Damaged(f"{path}: says that {name[:80]!r} is in {shard[:80]!r}, which does not hold it: index and "
                          "shards are of different models, or one was changed: fetch them again")
    metadata = index.get("metadata")
    return Tensors(path, entries, metadata if isinstance(metadata, dict) else {})


def _json(path: pathlib.Path, raw: bytes, what: str) -> dict[str, Any]:
    """A JSON object; Damaged if it is anything else, or has a name twice."""
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            twice = collections.Counter(name for name, _ in pairs).most_common(1)[0][0]
            raise ValueError(f"the name {twice[:80]!r} occurs twice")
        return found

    try:
        found = json.loads(raw.decode(), object_pairs_hook=once)
        if not isinstance(found, dict):
            raise ValueError("it is no object")
    except (ValueError, RecursionError) as error:
        raise Damaged(f"{path}: {what} is not read as JSON ({str(error)[:200]}): {AGAIN}") from None
    return found


# ---- safetensors, read ---------------------------------------------------------------------------

def _open_safetensors(path: pathlib.Path) -> Tensors:
    with opened(path) as (file, size):
        start, header = _header(path, file, size)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise Damaged(f"{path}: its __metadata__ is no object of texts: {AGAIN}")
    entries = {name: _entry(path, name, about, start, size) for name, about in header.items()}
    end = start
    for entry in sorted(entries.values(), key=lambda entry: (entry.offset, entry.n_bytes)):
        if entry.offset != end:
            raise Damaged(f"{path}: tensor {entry.name[:80]!r} "
                          f"{'overlaps' if entry.offset < end else 'leaves a gap behind'} the one before it: {AGAIN}")
        end += entry.n_bytes
    if end != size:
        raise Damaged(f"{path}: has {size - end:,} bytes more than its tensors take: {AGAIN}")
    return Tensors(path, entries, metadata)


def _header(path: pathlib.Path, file: IO[bytes], size: int) -> tuple[int, dict[str, Any]]:
    """(where the numbers begin, the header)."""
    raw = file.read(9)
    if raw[8:] != b"{":
        raise Damaged(f"{path}: does not begin as a safetensors file does: check which file it is, or fetch it again")
    n, = struct.unpack("<Q", raw[:8])
    if n > MOST_HEADER:
        raise Damaged(f"{path}: claims a header of {n:,} bytes, more than {MOST_HEADER:,}: {AGAIN}")
    if n > size - 8:
        raise Damaged(f"{path}: claims a header of {n:,} bytes in a file of {size:,}: {AGAIN}")
    file.seek(8)
    return 8 + n, _json(path, file.read(n), "its header")


def _natural(numbers: Any) -> bool:
    """Is this a list of whole numbers from 0 on, of 8 bytes at most?"""
    return isinstance(numbers, list) and all(type(n) is int and 0 <= n < 2**63 for n in numbers)


def _entry(path: pathlib.Path, name: str, about: Any, start: int, size: int) -> Stored:
    """One tensor of a header; Damaged unless type, shape and place agree."""
    what = f"{path}: tensor {name[:80]!r}"
    kind, shape, place = ((about.get(key) for key in ("dtype", "shape", "data_offsets"))
                          if isinstance(about, dict) else (None, None, None))
    if not isinstance(kind, str) or not _natural(shape) or not _natural(place) or len(place) != 2:
        raise Damaged(f"{what} has no dtype, shape and data_offsets of whole numbers from 0 on: {AGAIN}")
    if kind not in PLAIN:
        raise UserError(f"{what} is stored as {kind[:40]!r}, which is not read: convert it to BF16 or F32, or take a "
                        f"file with {', '.join(PLAIN)}")
    entry = Stored(path, name, start + place[0], tuple(shape), PLAIN[kind])
    entry.require_inside(start, size)
    if entry.n_bytes != place[1] - place[0]:
        raise Damaged(f"{what} of {kind} and shape {shape} takes {entry.n_bytes:,} bytes, but has "
                      f"{place[1] - place[0]:,}: {AGAIN}")
    return entry


# ---- .bin files of torch.save --------------------------------------------------------------------

def _open_bin(path: pathlib.Path) -> Tensors:
    """Where the tensors of a .bin file lie. torch.load reads the pickle with weights_only=True, so no
    code of the file is run; under FakeTensorMode it reads no numbers, but says where they are."""
    from torch._subclasses.fake_tensor import FakeTensorMode  # seconds, and only here
    with opened(path) as (file, size):
        if (magic := file.read(2)) != b"PK":
            what = ("is a bare pickle, or was saved before torch 1.6" if magic[:1] == b"\x80"
                    else "is no file of torch.save")
            raise Damaged(f"{path}: {what}: take the model's safetensors file, or save its state dict anew with "
                          "torch.save")
        try:
            require_modest(file)
            file.seek(0)
            with FakeTensorMode():
                state = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # whatever a damaged or hostile file makes the unpickler raise
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise Damaged(f"{path}: is not read as weights ({reason}): no code of a file is run here; fetch it again, "
                          "take the model's safetensors file, or save the state dict alone") from None
    if not isinstance(state, dict):
        raise UserError(f"{path}: holds a {type(state).__name__}, not names and tensors: save model.state_dict()")
    return Tensors(path, {name: _entry_of(path, name, value, size) for name, value in state.items()}, {})


def _entry_of(path: pathlib.Path, name: Any, tensor: Any, size: int) -> Stored:
    """The place of a fake tensor's numbers; UserError if it is none that can be read there."""
    what = f"{path}: {str(name)[:80]!r}"
    if not isinstance(name, str) or not isinstance(tensor, Tensor):
        raise UserError(f"{what} is a {type(tensor).__name__}, not a named tensor: save model.state_dict() alone")
    if tensor.layout is not torch.strided or tensor.dtype not in PLAIN_OF:
        raise UserError(f"{what} is a tensor of {tensor.dtype}, {tensor.layout}, which is not read: convert it to "
                        "float32 or bfloat16")
    storage, layout = tensor.untyped_storage(), PLAIN_OF[tensor.dtype]
    at = storage._checkpoint_offset  # torch's documented way to learn it: the tutorial on GPUDirect Storage
    entry = Stored(path, name, at + tensor.storage_offset() * layout.size, tuple(tensor.shape), layout,
                   None if tensor.is_contiguous() else tensor.stride())
    entry.require_inside(at, min(size, at + storage.nbytes()))
    return entry


# ---- safetensors, written ------------------------------------------------------------------------

def write_tensors(folder: str | pathlib.Path, tensors: Iterable[tuple[str, Any]],
                  max_shard_bytes: int = 5_000_000_000, metadata: dict[str, str] | None = None) -> list[pathlib.Path]:
    """Write model.safetensors, or shards with an index if they are larger than one shard may be; the
    paths written.

    tensors: (name, tensor) pairs, or something lazy in a tensor's place: it has `shape`, `dtype` and
    `read()`, as what `open_tensors` gives; each is read when its turn comes, and kept no longer.
    Files take their names when all are written and synced; an error leaves what was there. UserError
    for a type that safetensors files here do not have, a full disk, or other weights in the folder.
    """
    folder, shards = pathlib.Path(folder), _shards(tensors, max_shard_bytes)
    names = ["model.safetensors"] if len(shards) == 1 else [
        f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    paths = [folder / name for name in names]
    index = folder / (NAMES[0] + INDEX)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _require_alone(folder, [*names, index.name] if len(shards) > 1 else names)
        with contextlib.ExitStack() as stack:  # renames in the reverse order: the index comes last
            if len(shards) > 1:
                stack.enter_context(replacing(index)).write(_index(shards, names))
            for path, shard in zip(paths, shards, strict=True):
                _write(stack.enter_context(replacing(path)), shard, metadata or {"format": "pt"})
            index.unlink(missing_ok=True)  # an old one would fit to half of the shards if this stopped in between
    except OSError as error:
        raise UserError(f"{error.filename or folder}: cannot be written: {error.strerror or error}; "
                        f"{advice(error)}") from error
    return paths + [index] * (len(shards) > 1)


def _bytes(value: Any) -> int:
    return math.prod(value.shape) * value.dtype.itemsize


def _shards(tensors: Iterable[tuple[str, Any]], most: int) -> list[dict[str, Any]]:
    """The tensors in shards of so many bytes at most, in their order; a larger tensor has its own."""
    shards: list[dict[str, Any]] = [{}]
    seen, filled = {"__metadata__"}, 0
    for name, value in tensors:
        if name in seen:
            raise ValueError(f"{name!r} occurs twice, or is a name of the format's own")
        if value.dtype not in PLAIN_OF:
            raise UserError(f"tensor {name[:80]!r} of {value.dtype} cannot be written: convert it to float32 or "
                            "bfloat16")
        if shards[-1] and filled + _bytes(value) > most:
            shards.append({})
            filled = 0
        seen.add(name)
        shards[-1][name] = value
        filled += _bytes(value)
    return shards


def _require_alone(folder: pathlib.Path, names: list[str]) -> None:
    """UserError if the folder would hold weights besides these, which a reader might take."""
    for path in sorted(folder.iterdir()):
        if path.name not in names and (path.name in NAMES
                                       or re.fullmatch(r"model-\d+-of-\d+\.safetensors", path.name)):
            raise UserError(f"{path}: other weights are there: name an empty folder, or remove them")


def _index(shards: list[dict[str, Any]], names: list[str]) -> bytes:
    values = [value for shard in shards for value in shard.values()]
    return json.dumps({"metadata": {"total_size": sum(map(_bytes, values)),
                                    "total_parameters": sum(math.prod(value.shape) for value in values)},
                       "weight_map": {name: path for shard, path in zip(shards, names, strict=True)
                                      for name in shard}}, indent=2, ensure_ascii=False).encode()


def _numbers(name: str, value: Any) -> np.ndarray:
    """The bytes of a tensor, which is read now if it is a lazy one."""
    tensor = value.read() if hasattr(value, "read") else value.detach().cpu()
    if (tensor.shape, tensor.dtype) != (tuple(value.shape), value.dtype):
        raise ValueError(f"{name!r} is not the tensor that its shape and type promised")
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy()


def _write(file: IO[bytes], shard: dict[str, Any], metadata: dict[str, str]) -> None:
    """One file of safetensors. Wide types come first and the header is padded to 8 bytes, so each
    tensor is aligned to its own type."""
    header: dict[str, Any] = {"__metadata__": metadata}
    names, end = sorted(shard, key=lambda name: (-shard[name].dtype.itemsize, name)), 0
    for name in names:
        value, start = shard[name], end
        end += _bytes(value)
        header[name] = {"dtype": PLAIN_OF[value.dtype].name, "shape": list(value.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    file.write(struct.pack("<Q", len(text)) + text)
    for name in names:
        file.write(_numbers(name, shard[name]))
    file.flush()
    os.fsync(file.fileno())  # a full disk is met before the first file takes its name
