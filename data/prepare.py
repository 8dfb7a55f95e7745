"""Prepare a data set: raw files in, the files that the stages read out.

    python -m data.prepare reviews [--source FOLDER] [--vocab_size N] [--limit N]
    python -m data.prepare shakespeare
    python -m data.prepare FILE.jsonl

Data sets known by name are in data/sets/; data/own.py reads the files that users bring. A prepared
folder is in data/cache/, under a name that depends on its data set, options and raw files, so the
next call with the same ones finds it. It is built under a temporary name and renamed when complete.
"""
import dataclasses
import difflib
import hashlib
import json
import os
import pathlib
import shutil
import sys

from data.dataset import DataSet, DataWriter, Part
from data.own import own_data_set
from data.prepared import Prepared
from data.sets import DATA_SETS
from runtime.options import Options, UserError, option, parse, run_main
from runtime.terminal import memory_advice

VERSION = 3  # of the stored form; raise it to make folders prepared earlier unused
CACHE = pathlib.Path(os.environ.get("MOSSLET_CACHE") or pathlib.Path(__file__).parent / "cache")
NO_EFFECT = {"source": "it names the raw files of {names}", "limit": "it is for {names}",
             "vocab_size": "no vocabulary of tokens is trained on it"}  # why an option is refused


def find_data_set(data: str) -> DataSet:
    """The data set with this name, or the user's files at this path; UserError if neither is."""
    if data in DATA_SETS:
        return DATA_SETS[data]
    if data and pathlib.Path(data).exists():
        return own_data_set(pathlib.Path(data))
    near = difflib.get_close_matches(data, DATA_SETS, 1)
    raise UserError(f"unknown data set {data!r}{f'; did you mean {near[0]}?' if near else ''}: use "
                    f"{' or '.join(DATA_SETS)}, or the path of a .jsonl file or a folder of them")


def prepare(data: str, *, source: str | None = None, vocab_size: int = 4096, limit: int = 0,
            cache: str | os.PathLike | None = None) -> pathlib.Path:
    """The prepared folder of a data set, given by name, or of the user's files, given by path.

    It is built if it is not in `cache` yet (None: data/cache/, or the folder that the variable
    MOSSLET_CACHE names). Options that the data set does not read are ignored.
    """
    cache, data_set = pathlib.Path(cache or CACHE), find_data_set(data)
    options = {name: value for name, value in (("vocab_size", vocab_size), ("limit", limit))
               if name in data_set.options}
    path = pathlib.Path(source) if source and "source" in data_set.options else None
    if path is not None and not path.exists():
        raise UserError(f"--source {source}: no such file or folder")
    files = data_set.source(path, cache / "downloads") if data_set.source else []
    for file in files:
        if file is None or not file.exists():
            raise UserError(f"data set {data}: {file or 'its raw data'} is missing; give the path "
                            "of its raw files as --source")
    fingerprint = fingerprint_of(data_set, options, files)
    folder = cache / f"{pathlib.Path(data).stem}-{fingerprint}"
    if (folder / "meta.json").exists():
        return folder
    temporary = cache / f".{folder.name}.{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        out = data_set.build(temporary, files, **options)
        write_description(out, data_set, {"data": data, "fingerprint": fingerprint,
                                          "options": options})
        if not (folder / "meta.json").exists():  # else another process was faster
            shutil.rmtree(folder, ignore_errors=True)
            temporary.rename(folder)
    except OSError as error:
        raise UserError(f"{folder}: cannot be prepared: {error}; check the path, the rights and "
                        "the free space") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def fingerprint_of(data_set: DataSet, options: dict[str, int], files: list[pathlib.Path]) -> str:
    """A hash of all that the prepared files depend on: record, options and raw files."""
    mixture = {name: dataclasses.astuple(part) for name, part in data_set.mixture.items()}
    try:
        digests = [(file.name, hashlib.sha256(file.read_bytes()).hexdigest()) for file in files]
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read: {error.strerror}; check --source") from None
    state = [VERSION, data_set.name, data_set.version, data_set.template, mixture, options, digests]
    return hashlib.sha256(json.dumps(state).encode()).hexdigest()[:12]


def write_description(out: DataWriter, data_set: DataSet, meta: dict) -> None:
    """Write tokenizer.json and, last of all files, meta.json."""
    if unknown := set(data_set.mixture) - set(out.parts):
        raise ValueError(f"data set {data_set.name}: its mixture names {', '.join(unknown)}, but "
                         f"its parts are {', '.join(out.parts)}")
    if out.tokenizer is not None:
        state = json.dumps(out.tokenizer.to_state())
        (out.folder / "tokenizer.json").write_text(state, encoding="utf-8")
    parts = {name: dataclasses.asdict(data_set.mixture.get(name, Part())) for name in out.parts}
    meta |= {"dtype": out.dtype, "stages": sorted({name.split("_")[0] for name in out.counts}),
             "counts": out.counts, "template": data_set.template, "parts": parts}
    text = json.dumps(meta, indent=1, ensure_ascii=False)
    (out.folder / "meta.json").write_text(text, encoding="utf-8")


def open_data(data: str, **options) -> Prepared:
    """A data set, prepared first if need be; options are those of `prepare`."""
    return Prepared.load(prepare(data, **options))


def open_for(o: Options, data: str) -> Prepared:
    """`open_data` with a command's --source, --vocab_size and --limit; one that has no effect on
    this data set must not be given."""
    data_set = find_data_set(data)
    for name, why in NO_EFFECT.items():
        if name not in data_set.options:
            names = [known.name for known in DATA_SETS.values() if name in known.options]
            o.refuse(name, why=f"on {data}: {why.format(names=' and '.join(names))}")
    return open_data(data, source=o.source or None, vocab_size=o.vocab_size, limit=o.limit)


# ---- command line --------------------------------------------------------------------------------

@dataclasses.dataclass
class PrepareOptions(Options):
    """`python -m data.prepare NAME`"""

    source: str = option("", "folder or archive with the raw files; empty: download them")
    vocab_size: int = option(4096, "tokens of the vocabulary, six special ones included", low=262,
                             high=1_000_000)
    limit: int = option(0, "use only this many distinct texts; 0: all", low=0)
    traceback: bool = option(False, "show where in the code an error arose")


@memory_advice("lower --limit, or prepare fewer texts")
def main(argv: list[str]) -> None:
    if not argv or argv[0].startswith("-") and not {"--help", "-h"} & set(argv):
        raise UserError(f"usage: python -m data.prepare {'|'.join(DATA_SETS)}|FILE.jsonl|FOLDER "
                        "[--source …] [--vocab_size …] [--limit …]")
    o = parse(PrepareOptions, argv[not argv[0].startswith("-"):], "-m data.prepare NAME")
    data = open_for(o, argv[0])
    print(data.folder)
    for name, count in data.meta["counts"].items():
        print(f"  {name}: {count}")


if __name__ == "__main__":
    sys.exit(run_main(main, sys.argv[1:]))
