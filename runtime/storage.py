"""Files that a kill, a full or failing disk, or a stranger's file cannot turn into wrong numbers.

What is written goes under a temporary name, is synced, and then renamed. A payload carries a digest
of its own bytes, which is compared before anything of it is read. Names inside a run's folder are
opened as plain files: a planted link is not followed, a pipe is not waited for.
"""
import contextlib
import hashlib
import io
import os
import pathlib
import pickletools
import stat
import struct
import zipfile
from collections.abc import Iterator
from typing import IO, Any

import torch
from torch import Tensor, nn

from runtime.options import UserError
from runtime.terminal import advice


class Damaged(UserError):
    """A file that is not what was written, or not what it claims to be."""


# ---- plain files and text ------------------------------------------------------------------------

def open_plain(path: pathlib.Path, mode: str, follow: bool = False) -> IO:
    """Open a plain file, text as UTF-8; UserError if the name is a link (unless `follow`), a pipe or
    a device."""
    flags = getattr(os, "O_NONBLOCK", 0) | (0 if follow else getattr(os, "O_NOFOLLOW", 0))
    try:
        file = open(path, mode, encoding=None if "b" in mode else "utf-8",
                    opener=lambda name, own: os.open(name, own | flags, 0o666))
    except OSError:
        if not follow and path.is_symlink():
            raise UserError(f"{path}: is a link, which is not followed here: remove it") from None
        if path.is_fifo() or path.is_dir():
            raise UserError(f"{path}: is no plain file: remove it") from None
        raise
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise UserError(f"{path}: is no plain file: remove it")
    return file


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[IO[bytes]]:
    """A new file that takes the place of `path` when the block ends; an error leaves the old one.
    """
    temporary = path.with_suffix(".tmp")
    temporary.unlink(missing_ok=True)  # a killed process left it
    try:
        with open(temporary, "x+b") as file:  # x: never through a link
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.filename is None:  # a write does not know its file
            error.filename = str(path)
        raise
    finally:  # gone after the renaming; after an error, which goes on to the caller, half a file
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def replace_text(path: pathlib.Path, text: str) -> None:
    """Write a file atomically: under a temporary name, synced, then renamed."""
    with replacing(path) as file:
        file.write(text.encode())


def require_place(name: str, flag: str) -> None:
    """UserError unless a file of this name can be written: asked before the work whose result it takes.
    "" and - name none."""
    path = pathlib.Path(name)
    if name in ("", "-"):
        return
    if path.is_dir():
        raise UserError(f"{flag} {path}: is a folder: name a file in it")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise UserError(f"{flag} {path}: {path.parent} is no folder that can be written to: make it, or name "
                        "another")


# ---- payloads with a digest ----------------------------------------------------------------------
# torch.save writes a zip archive, which ends with a record of 22 bytes whose last two are the length
# of a comment. The digest is that comment, so any version of torch.load reads the file. It covers
# every byte before that length.

END, MARK = b"PK\5\6", b"sha256:"
LENGTH = struct.pack("<H", len(MARK) + 64)
READ_AT_ONCE = 2**20
# all that we ever write, and the wrapper that some weights of others have
GLOBALS = {"collections OrderedDict", "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter"}


def seal(file: IO[bytes]) -> None:
    """Add the digest to an archive that was just written."""
    left, digest = file.seek(0, os.SEEK_END) - 2, hashlib.sha256()
    file.seek(0)
    while left:
        piece = file.read(min(left, READ_AT_ONCE))
        digest.update(piece)
        left -= len(piece)
    file.seek(-2, os.SEEK_END)
    file.write(LENGTH + MARK + digest.hexdigest().encode())


def require_digest(raw: bytes) -> None:
    """ValueError if these bytes are not those that were written. Earlier versions and torch.save
    alone write no digest: such a file passes."""
    body = memoryview(raw)[:-len(LENGTH + MARK) - 64]
    if raw[-22:-18] == END and raw[-2:] == b"\0\0":
        return
    if body[-20:-16] != END or bytes(raw[len(body):]) != (
            LENGTH + MARK + hashlib.sha256(body).hexdigest().encode()):
        raise ValueError("its bytes are not those that were written")


def require_modest(file: IO[bytes]) -> None:
    """ValueError unless unpacking the archive takes no more memory than its own size, and asks for
    nothing but tensors."""
    size = file.seek(0, os.SEEK_END)
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        names = {entry.filename for entry in entries}
        if (len(names) < len(entries) or any(entry.compress_type for entry in entries)
                or sum(entry.file_size for entry in entries) > size):
            raise ValueError("it claims to hold more than its own size")
        pickles = [archive.read(name) for name in names if name.endswith(".pkl")]
    for pickle in pickles:  # what torch.load would call may allocate, as bytearray(10**10) does
        for code, argument, _ in pickletools.genops(pickle):
            if "GLOBAL" in code.name and argument not in GLOBALS and not (
                    argument.startswith("torch ") and argument.endswith("Storage")):
                raise ValueError(f"it asks for {argument}")


def tensors_of(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of each tensor in a nest of dicts, lists and tuples; an object that occurs again
    comes once."""
    waiting, seen = [(name, value)], set()
    while waiting:
        name, value = waiting.pop()
        if isinstance(value, Tensor):
            yield name, value
        elif isinstance(value, dict | list | tuple) and id(value) not in seen:
            seen.add(id(value))
            items = value.items() if isinstance(value, dict) else enumerate(value)
            waiting += [(f"{name}.{key}" if name else str(key), x) for key, x in items]


def largest(tensor: Tensor) -> float:
    """The largest magnitude of a tensor's numbers; not finite if one is not; 0 if it has none."""
    if not tensor.is_floating_point() or not tensor.numel():
        return 0.0
    low, high = tensor.detach().aminmax()
    return float(torch.maximum(low.abs(), high.abs()))


def save_whole(path: pathlib.Path, payload: Any, previous: pathlib.Path | None = None) -> None:
    """torch.save with a digest, atomically; UserError if the file cannot be written.

    A kill or a full disk at any moment leaves the file that was there, or the new one. previous: the
    name under which the file that was there is kept.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            torch.save(payload, file)
            seal(file)
            if previous is not None and path.exists():
                file.flush()
                os.fsync(file.fileno())
                keep(path, previous)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
        kept = " (the previous one is kept)" if path.exists() else ""
        reason, remedy = "the drive took only a part of it", "check the free space, or choose another drive"
        if isinstance(error, OSError):
            reason, remedy = error.strerror or error, advice(error)
        raise UserError(f"{path}: cannot be written: {reason}{kept}; {remedy}") from error


def weights_hash(model: nn.Module) -> str:
    """Sixteen hex digits that name these weights: a child run records its parents by it."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def checkpoint_path(path: str | os.PathLike) -> pathlib.Path:
    """The checkpoint.pt of a run's folder, or the file itself."""
    path = pathlib.Path(path)
    return path if path.suffix == ".pt" else path / "checkpoint.pt"


def previous_of(path: pathlib.Path) -> pathlib.Path:
    """Where the checkpoint before this one is kept."""
    return path.with_suffix(".previous.pt")


def keep(path: pathlib.Path, other: pathlib.Path) -> None:
    """Give a file a second name, in place of what had it: at no moment is `path` gone, unless the
    file system has no hard links."""
    temporary = other.with_suffix(".tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(path, temporary)
        os.replace(temporary, other)
        temporary.unlink(missing_ok=True)  # both names were of one file already
    except OSError:
        os.replace(path, other)


def load_whole(path: pathlib.Path) -> Any:
    """What `save_whole` wrote, tensors on the CPU; `Damaged` if the file is anything else.

    Nothing is built before the digest is compared, and nothing larger than the file. With
    `weights_only=True`, so a file from a stranger cannot run code.
    """
    try:
        with open_plain(path, "rb", follow=True) as file:
            raw = file.read()
        require_digest(raw)
        require_modest(io.BytesIO(raw))
        payload = torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)
        tensors = [tensor for _, tensor in tensors_of(payload)]
        if (any(t.layout is not torch.strided or t.device.type != "cpu" for t in tensors)
                or sum(t.numel() * t.element_size() for t in tensors) > len(raw)):
            raise ValueError("it claims to hold more than its own size")
    except Exception as error:  # whatever a damaged file makes the unpickler raise
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise Damaged(f"{path}: not a readable Mosslet checkpoint ({reason})") from error
    return payload


def stored_state(checkpoint: pathlib.Path) -> dict[str, Any]:
    """The state in a checkpoint, or in the one before it if it is damaged; `Damaged` if there is none.
    """
    try:
        payload = load_whole(checkpoint)
    except Damaged:
        if not previous_of(checkpoint).exists():
            raise
        payload = load_whole(previous_of(checkpoint))
    if not isinstance(payload, dict) or not isinstance(payload.get("state"), dict):
        raise Damaged(f"{checkpoint}: not a Mosslet checkpoint: it has no state")
    return payload["state"]


def is_whole(path: pathlib.Path) -> bool:
    """Are the file's bytes those that were written, as far as its digest tells?"""
    try:
        with open_plain(path, "rb", follow=True) as file:
            require_digest(file.read())
    except (OSError, ValueError, UserError):
        return False
    return True
