"""Prepare a data set: raw files in, the files that the stages read out.

    python -m data.prepare reviews [--source FOLDER] [--vocab_size N] [--limit N]
    python -m data.prepare shakespeare
    python -m data.prepare FILE          .jsonl, .json, .csv or .tsv, or a folder of them; - is standard input
    python -m data.prepare check FILE    what is in your file or folder; nothing is written
    python -m data.prepare export FILE --to trl --out FOLDER       your records for other tools
    python -m data.prepare --list        what is prepared, and whether it is whole
    python -m data.prepare --clean       remove what no run can use

Data sets known by name are in data/sets/; data/own.py reads the files that users bring. A prepared
folder is in data/cache/, under a name that depends on its data set, options and raw files, so the
next call with the same ones finds it. data/folders.py says how it is written and checked.
"""
import dataclasses
import difflib
import hashlib
import json
import os
import pathlib
import shutil
import sys
import tempfile
from typing import Any, TypeVar

from data.downloads import url_name, web_download
from data.dataset import OPTIONS, DataSet, DataWriter, Part, refuse_zip
from data.feedback import BESIDE
from data.folders import clean, file_digest, list_folders, seal, sync, temporary_folder
from data.own import OwnOptions, own_data_set
from data.prepared import Prepared
from data.road import lengths, proposals
from data.sets import DATA_SETS
from data.tokenizer import Tokenizer
from runtime.options import Options, UserError, option, parse, presets_of, run_main
from runtime.tables import table
from runtime.rows import keep_input
from runtime.terminal import advice, memory_advice, reading

TOOLS = ("trl", "trl-standard", "kto", "llama-factory")  # that data/export.py writes for
T = TypeVar("T", bound=Options)
VERSION = 4  # of the stored form; raise it to make folders prepared earlier unused
CACHE = pathlib.Path(os.environ.get("MOSSLET_CACHE") or pathlib.Path(__file__).parent / "cache")
SETTINGS = {"vocab_size": 4096, "limit": 0, "skip_bad": False, "fields": "", "template": "",
            "judge_share": -1.0}  # with which data is prepared; see PrepareOptions
NO_EFFECT = {  # why an option is refused
    "source": "it names the raw files of {names}", "limit": "it is for {names}",
    "vocab_size": "no vocabulary of tokens is trained on it",
    "judge_share": "it is for feedback of your own",
    **dict.fromkeys(("skip_bad", "fields", "template"), "it is for files of your own")}


def find_data_set(data: str, fields: str = "", template: str = "") -> DataSet:
    """The data set with this name, or the user's files at this path, with --fields and --template;
    UserError if neither is."""
    if data in DATA_SETS:
        return DATA_SETS[data]
    if data and os.path.lexists(path := pathlib.Path(data)):
        require_readable(path, folder=True)
        with reading(path):
            refuse_zip(path)
            return own_data_set(path, fields, template)
    near = difflib.get_close_matches(data, DATA_SETS, 1)
    raise UserError(f"unknown data set {data!r}, and no file or folder is called so"
                    f"{f'; did you mean {near[0]}?' if near else ''}: use {' or '.join(DATA_SETS)}, "
                    "the path of a .jsonl, .json, .csv or .tsv file or of a folder of them, or - for "
                    "standard input")


def kept_input(data: str) -> str:
    """What --data names; of -, the file in the cache that standard input is kept as, so that later stages
    and --resume can read it, too."""
    return str(keep_input(sys.stdin.buffer, CACHE / "downloads")) if data == "-" else data


def prepare(data: str, *, source: str | None = None, cache: str | os.PathLike | None = None,
            **settings: Any) -> pathlib.Path:
    """The prepared folder of a data set, given by name, or of the user's files, given by path.

    It is built if it is not in `cache` yet (None: data/cache/, or the folder that the variable
    MOSSLET_CACHE names). settings: some of SETTINGS, which has the others' values; those that the
    data set does not read are ignored.
    """
    if unknown := set(settings) - set(SETTINGS):
        raise TypeError(f"prepare: unknown {', '.join(unknown)}")
    settings = SETTINGS | settings
    cache, data_set = pathlib.Path(cache or CACHE), find_data_set(data, settings["fields"], settings["template"])
    options = {name: value for name, value in settings.items()
               if name in data_set.options and name != "template"}  # that is in the data set's record
    path = pathlib.Path(source) if source and "source" in data_set.options else None
    if path is not None and source.startswith(("https://", "http://")):
        path = web_download(source, cache / "downloads" / url_name(source), "bring the file and give its path")
    if path is not None:
        if not path.exists():
            raise UserError(f"--source {source}: no such file or folder")
        require_readable(path, folder=True)
    files = data_set.source(path, cache / "downloads") if data_set.source else []
    for file in files:
        if file is None or not os.path.lexists(file):
            raise UserError(f"data set {data}: {file or 'its raw data'} is missing; give the path "
                            "of its raw files as --source")
        require_readable(file)
        if file.suffix != ".whl":  # the data set reads it in place
            refuse_zip(file)
    fingerprint = fingerprint_of(data_set, options, files)
    folder = cache / f"{pathlib.Path(data).stem[:60]}-{fingerprint}"  # a name has 255 bytes at most
    if (folder / "meta.json").exists():
        return folder
    try:
        with temporary_folder(folder) as temporary:
            out = data_set.build(temporary, files, **options)
            write_description(out, data_set, {"data": data, "fingerprint": fingerprint,
                                              "options": options})
            if not (folder / "meta.json").exists():  # else another process was faster
                shutil.rmtree(folder, ignore_errors=True)
                temporary.rename(folder)
                sync(cache)
    except OSError as error:
        raise UserError(f"{folder}: cannot be prepared: {error}; {advice(error)}") from error
    return folder


def require_readable(path: pathlib.Path, folder: bool = False) -> None:
    """UserError unless this is a file that can be read twice, or a folder if that is allowed.

    A named pipe would be waited for without end, and what `<(command)` gives is empty when it is
    read again.
    """
    if path.is_symlink() and not path.exists():
        raise UserError(f"{path}: a link to nothing: restore what it names, or remove it")
    if path.is_dir() and not folder:
        raise UserError(f"{path}: is a folder where a file is needed; move it away")
    if not path.is_dir() and not path.is_file():
        raise UserError(f"{path}: neither a file nor a folder, but a pipe or a device: write its "
                        "content into a file, and give that")


def fingerprint_of(data_set: DataSet, options: dict[str, int], files: list[pathlib.Path]) -> str:
    """A hash of all that the prepared files depend on: record, options and raw files."""
    mixture = {name: dataclasses.astuple(part) for name, part in data_set.mixture.items()}
    digests = []
    for file in files:
        with reading(file):
            digests.append((file.name, file_digest(file)))
    state = [VERSION, data_set.name, data_set.version, data_set.template, mixture, options, digests]
    state += [data_set.defaults] * bool(data_set.defaults)
    return hashlib.sha256(json.dumps(state).encode()).hexdigest()[:12]


def write_description(out: DataWriter, data_set: DataSet, meta: dict) -> None:
    """Write tokenizer.json and, last of all files, meta.json; all of them are on the disk then."""
    if unknown := set(data_set.mixture) - set(out.parts):
        raise ValueError(f"data set {data_set.name}: its mixture names {', '.join(unknown)}, but "
                         f"its parts are {', '.join(out.parts)}")
    if out.tokenizer is not None:
        state = json.dumps(out.tokenizer.to_state())
        (out.folder / "tokenizer.json").write_text(state, encoding="utf-8")
    mixture = out.mixture | data_set.mixture
    parts = {name: dataclasses.asdict(mixture.get(name, Part())) for name in out.parts}
    defaults = {stage: out.defaults.get(stage, {}) | data_set.defaults.get(stage, {})
                for stage in {**out.defaults, **data_set.defaults}}
    meta |= {"dtype": out.dtype, "stages": sorted({name.split("_")[0] for name in out.counts}),
             "counts": out.counts, "template": data_set.template, "parts": parts, "defaults": defaults,
             "lengths": out.lengths}
    seal(out.folder, meta)


def open_data(data: str, **options) -> Prepared:
    """A data set, prepared first if need be; options are those of `prepare`."""
    return Prepared.load(prepare(data, **options))


def open_for(o: Options, data: str) -> Prepared:
    """`open_data` with a command's options for the data; one that has no effect on this data set
    must not be given."""
    data_set = find_data_set(data, o.fields, o.template)
    for name, why in NO_EFFECT.items():
        if name not in data_set.options:
            names = [known.name for known in DATA_SETS.values() if name in known.options]
            o.refuse(name, why=f"on {data}: {why.format(names=', '.join(names))}")
    return open_data(data, source=o.source or None, **{name: getattr(o, name) for name in SETTINGS})


def suited(o: T, stage: str, data: Prepared) -> T:
    """A stage's options with the values that suit the data, where neither a flag nor a preset says
    otherwise. What changes is printed. A preset's --max_len gives way: longer rows would not fit."""
    asked = o.explicit | set(presets_of(type(o)).get(o.preset, {})) - {"max_len"}
    values = {name: value for name, value in data.meta.get("defaults", {}).get(stage, {}).items()
              if name not in asked and getattr(o, name) != value}
    if values:
        print(f"{stage}: by the data: {'  '.join(f'{name}={x}' for name, x in values.items())}", flush=True)
    return o.replace(**values)


def known_max_len(o: Options, data: Prepared | None = None) -> int | None:
    """Pretraining's --max_len as `suited` will have it; None while only the data could tell."""
    if "max_len" in o.explicit:
        return o.max_len
    if data is None and o.data not in DATA_SETS:
        return None
    defaults = DATA_SETS[o.data].defaults if data is None else data.meta.get("defaults", {})
    return defaults.get("pretrain", {}).get("max_len", o.max_len)


def open_stage(o: T, stage: str) -> tuple[Prepared, T]:
    """(the data set of a stage's options, the options that suit it)."""
    data = open_for(o, o.data)
    return data, suited(o, stage, data) if data.meta.get("defaults") else o


def recounted(o: T, stage: str, data: Prepared, tokenizer: Tokenizer) -> T:
    """The options with --max_len, or PPO's --reply_len, counted anew in tokens of this vocabulary, if the length
    that suits the data was counted with another one, and not fixed by a data set. What changes is printed."""
    name = "reply_len" if stage == "ppo" else "max_len"
    own, of_set = data.tokenizer, DATA_SETS[o.data].defaults if o.data in DATA_SETS else {}
    fixed = o.explicit | of_set.get(stage, {}).keys() | (presets_of(type(o)).get(o.preset, {}).keys() - {"max_len"})
    if name in fixed or not data.meta.get("lengths") or own.to_state() == tokenizer.to_state():
        return o
    records = {(file, "train"): data.records(file, "train") for file in ("sft", "reward", "judge", *BESIDE)
               if data.has(file)}
    found = proposals(lengths(records, tokenizer, data.template), data.meta["counts"]).get(stage, {})
    found = found.get(name, getattr(o, name))  # texts alone have no replies
    if found != getattr(o, name):
        print(f"{stage}: {name}={found} in the parent's vocabulary", flush=True)
    return o.replace(**{name: found})


# ---- command line --------------------------------------------------------------------------------

@dataclasses.dataclass
class ReadingOptions(OwnOptions):
    """What is read, and how."""

    source: str = option("", "file, folder, archive or URL of the raw data; empty: download it")
    vocab_size: int = option(4096, "tokens of the vocabulary, six special ones included", low=262,
                             high=1_000_000)
    limit: int = option(0, "use only this many distinct texts; 0: all", low=0)


@dataclasses.dataclass
class PrepareOptions(ReadingOptions):
    """`python -m data.prepare NAME`"""

    list: bool = option(False, "list the prepared folders, and whether each is whole")
    clean: bool = option(False, "remove prepared folders that are damaged, left by a stopped "
                                "process or of an earlier version; the others stay")


@dataclasses.dataclass
class ExportOptions(ReadingOptions):
    """`python -m data.prepare export NAME|FILE|FOLDER --to TOOL --out FOLDER`"""

    to: str = option("trl", "the tool that is to read the files", choices=TOOLS)
    out: str = option("", "folder to write to, one file a split; none of them may be there yet")


@memory_advice("check a smaller part of the file")
def check_command(name: str, argv: list[str]) -> int:
    """`check`: 0 if all is well with the user's files, 1 if not."""
    from data.check import CheckOptions, check  # here: it imports torch, which preparing does without
    o = parse(CheckOptions, argv, "-m data.prepare check FILE|FOLDER")
    if not name:
        raise UserError("usage: python -m data.prepare check FILE|FOLDER|- [--fields …] [--skip_bad] "
                        "[--from CHECKPOINT] [--examples N]")
    with tempfile.TemporaryDirectory() as folder:
        path = keep_input(sys.stdin.buffer, pathlib.Path(folder)) if name == "-" else pathlib.Path(name)
        if name in DATA_SETS or (path / "meta.json").exists():
            raise UserError(f"check is for files of your own, and {name} is made by Mosslet: `python -m "
                            "tools.show FILE.jsonl` shows the records of a prepared folder")
        data_set = find_data_set(str(path), o.fields, o.template)
        if "judge_share" not in data_set.options:
            o.refuse("judge_share", why=f"on {name}: {NO_EFFECT['judge_share']}")
        for file in data_set.source(None, CACHE / "downloads"):
            require_readable(file)
        return check(path, o)


def export_command(name: str, argv: list[str]) -> None:
    """`export`: a prepared folder, a data set by name or the user's files, for another tool."""
    from data.export import export  # as above
    o = parse(ExportOptions, argv, "-m data.prepare export NAME|FILE|FOLDER")
    if not (name and o.out):
        raise UserError(f"usage: python -m data.prepare export {'|'.join(DATA_SETS)}|FILE|FOLDER --out "
                        f"FOLDER [--to {'|'.join(TOOLS)}]")
    if name not in DATA_SETS and (pathlib.Path(name) / "meta.json").exists():
        o.refuse(*OPTIONS, why="on a prepared folder")
        data = Prepared.load(pathlib.Path(name))
    else:
        data = open_for(o, kept_input(name))
    export(data, o.to, pathlib.Path(o.out))


@memory_advice("lower --limit, or prepare fewer texts")
def main(argv: list[str]) -> int | None:
    command = {"check": check_command, "export": export_command}.get(argv[0] if argv else "")
    if command:
        argv = argv[1:]
    name = argv[0] if argv and (argv[0] == "-" or not argv[0].startswith("-")) else ""
    if command:
        return command(name, argv[bool(name):])
    o = parse(PrepareOptions, argv[bool(name):], "-m data.prepare NAME")
    if o.list or o.clean:
        command = "clean" if o.clean else "list"
        o.refuse(*OPTIONS, why=f"with --{command}")
        if name:
            raise UserError(f"--{command} is about all prepared folders: leave out {name}")
        return (clean if o.clean else list_folders)(CACHE)
    if not name:
        raise UserError(f"usage: python -m data.prepare {'|'.join(DATA_SETS)}|FILE|FOLDER|- "
                        "[--name=value …], or check FILE|FOLDER, or export NAME|FILE|FOLDER, or --list, "
                        "or --clean; --help lists the options")
    data = open_for(o, kept_input(name))
    print(data.folder)
    for name, count in data.meta["counts"].items():
        print(f"  {name}: {count}")
    if lengths := data.meta.get("lengths"):
        rows = [{"name": name, **x, "fits": f"{x['fits']:.0%}"} for name, x in lengths.items()]
        print(table(rows, {"name": "tokens of", "half": "half have", "95": "95 %", "most": "at most",
                           "option": "option", "value": "is", "fits": "so many fit"}))


if __name__ == "__main__":
    sys.exit(run_main(main, sys.argv[1:]))
