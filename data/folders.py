"""The prepared folders in data/cache/: written whole or not at all, checked when opened, and tidied.

A folder is built under a temporary name that begins with a dot, and locked by the process that
builds it. `seal` writes meta.json, last of all files, with size and SHA-256 of each file, and syncs
everything to the disk; only then is the folder renamed. `damage` compares the files with meta.json.
"""
import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import re
import secrets
import shutil
from collections.abc import Iterator

try:
    import fcntl
except ImportError:  # Windows: no locks, so what a killed process left there stays
    fcntl = None

NAME = re.compile(r"\.?.*-[0-9a-f]{12}(\.\w+)?")  # of a folder that we made
SUFFIXES = {".json", ".jsonl", ".bin", ".npz", ".pt", ".tmp"}  # of the files in it


# ---- files ---------------------------------------------------------------------------------------

def file_digest(path: pathlib.Path) -> str:
    """SHA-256 of a file of any size."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def sync(path: pathlib.Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    folder = path.is_dir()
    if folder and os.name == "nt":  # Windows cannot open a folder
        return
    handle = os.open(path, os.O_RDONLY if folder else os.O_RDWR)
    try:
        os.fsync(handle)
    except OSError:
        if not folder:  # some drives cannot sync a folder
            raise
    finally:
        os.close(handle)


def meta_digest(meta: dict) -> str:
    """SHA-256 of a description without its own digest."""
    state = {name: value for name, value in meta.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def seal(folder: pathlib.Path, meta: dict) -> None:
    """Write meta.json with sizes and digests of all other files, and sync the folder."""
    files = {}
    for path in sorted(folder.iterdir()):
        sync(path)
        files[path.name] = {"bytes": path.stat().st_size, "sha256": file_digest(path)}
    meta = meta | {"files": files}
    text = json.dumps(meta | {"sha256": meta_digest(meta)}, indent=1, ensure_ascii=False)
    (folder / "meta.json").write_text(text, encoding="utf-8")
    sync(folder / "meta.json")
    sync(folder)


def damage(folder: pathlib.Path) -> str:
    """What is wrong with a prepared folder; "" if each file is as `seal` found it."""
    name = "meta.json"
    try:
        meta = json.loads((folder / name).read_text(encoding="utf-8"))
        if "files" not in meta:
            return "it is of an earlier version"
        if meta["sha256"] != meta_digest(meta):
            return "meta.json has changed"
        for name, written in meta["files"].items():
            size = (folder / name).stat().st_size
            if size != written["bytes"]:
                return f"{name} has {size} of {written['bytes']} bytes"
            if file_digest(folder / name) != written["sha256"]:
                return f"{name} has changed"
    except FileNotFoundError:
        return f"{name} is missing"
    except OSError as error:
        return f"{name} cannot be read: {error.strerror}"
    except (ValueError, KeyError, TypeError, AttributeError):
        return "meta.json has changed"
    return ""


# ---- building ------------------------------------------------------------------------------------

def lock(folder: pathlib.Path, wait: bool = False) -> int | None:
    """A handle that locks a folder until it is closed or this process ends; None if another process
    has the lock, or if the system has no locks."""
    if fcntl is None:
        return None
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        return handle
    except OSError:  # another process has it, or the drive has no locks
        os.close(handle)
        return None


def unlock(handle: int | None) -> None:
    """Give a lock back."""
    if handle is not None:
        os.close(handle)


@contextlib.contextmanager
def temporary_folder(target: pathlib.Path) -> Iterator[pathlib.Path]:
    """A new folder beside `target`, locked; it goes at the end unless it was renamed. Folders that
    ended processes left there go, too."""
    cache = target.parent
    cache.mkdir(parents=True, exist_ok=True)
    beginning = lock(cache, wait=True)  # else another process could take ours for a left-over one
    try:
        for entry in entries(cache):
            if entry.left_over:
                shutil.rmtree(entry.path, ignore_errors=True)
        folder = cache / f".{target.name}.{secrets.token_hex(4)}"
        folder.mkdir()
        held = lock(folder)
    finally:
        unlock(beginning)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        unlock(held)


# ---- listing and tidying -------------------------------------------------------------------------

@dataclasses.dataclass
class Entry:
    """A folder in the cache that we made."""

    path: pathlib.Path
    left_over: bool  # of a process that ended before it was complete
    busy: bool  # a process is building it

    @property
    def fault(self) -> str:
        """Why no run can use it; "" if one can."""
        return ("left by a process that was stopped" if self.left_over else
                "" if self.busy else damage(self.path))

    def size(self) -> int:
        """Bytes of its files."""
        return sum(path.stat().st_size for path in self.path.iterdir())


def entries(cache: pathlib.Path) -> list[Entry]:
    """The folders that we made in the cache, and no others: it may be any folder of the user's."""
    found = []
    for path in sorted(cache.iterdir()) if cache.is_dir() else ():
        if path.is_symlink() or not path.is_dir() or not NAME.fullmatch(path.name):
            continue
        if not (path / "meta.json").exists() and any(file.suffix not in SUFFIXES
                                                     for file in path.iterdir()):
            continue
        temporary = path.name.startswith(".")
        handle = lock(path) if temporary else None
        found.append(Entry(path, handle is not None, temporary and handle is None))
        unlock(handle)
    return found


def list_folders(cache: pathlib.Path) -> None:
    """Print each prepared folder with its size, what it was made from, or what is wrong with it."""
    found = entries(cache)
    print("\n".join([f"{cache}:", *map(describe, found)]) if found else
          f"{cache}: nothing is prepared there")


def describe(entry: Entry) -> str:
    """One line about a folder."""
    if fault := entry.fault:
        state = f"{fault}: --clean removes it"
    elif entry.busy:
        state = "is being prepared"
    else:
        meta = json.loads((entry.path / "meta.json").read_text(encoding="utf-8"))
        state = " ".join([meta["data"], *(f"--{k}={v}" for k, v in meta["options"].items())])
    return f"  {entry.path.name}  {entry.size() / 1e6:.1f} MB  {state}"


def clean(cache: pathlib.Path) -> None:
    """Remove the folders that no run can use, and say which."""
    faults = [(entry, fault) for entry in entries(cache) if (fault := entry.fault)]
    for entry, fault in faults:
        size = entry.size() / 1e6
        shutil.rmtree(entry.path)
        print(f"removed {entry.path} ({size:.1f} MB): {fault}")
    if not faults:
        print(f"{cache}: nothing to remove; every folder there is whole, or is being prepared")
