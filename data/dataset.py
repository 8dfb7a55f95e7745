"""What a data set is: one `DataSet` record, and the writer that its `build` fills a folder with.

    def build(folder, files, vocab_size):
        texts = files[0].read_text(encoding="utf-8").splitlines()
        tokenizer = train_bpe(texts, vocab_size)
        out = DataWriter(folder, tokenizer)
        out.records("sft", "train", [{"prompt": "…", "response": "…"}])
        return out

    DATA_SET = DataSet("mine", source=…, build=build, options=("source", "vocab_size"))

Written to data/sets/mine.py, these lines make `--data=mine` a data set like any other. A script can
call `data.sets.register(DataSet(…))` instead.
"""
import dataclasses
import pathlib
import zipfile
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from data.folders import file_digest
from data.hashing import text_hash
from data.records import write_records
from data.tokenizer import Tokenizer
from runtime.options import UserError

SPLITS = ("train", "val", "test")
OPTIONS = ("source", "vocab_size", "limit", "skip_bad", "fields", "template", "judge_share")


@dataclasses.dataclass(frozen=True)
class Part:
    """One part of a data set's pretraining text: how much of it is read, and when."""

    share: float | None = None  # of the training tokens; None: what is left, by number of tokens
    until: float = 1.0  # its documents are in this first share of training


@dataclasses.dataclass(frozen=True)
class DataSet:
    """A data set: where its raw files come from, and how they become what the stages read.

    name: what --data calls it.
    source: source(path, downloads) returns the raw files, in a fixed order. They are found at
        `path` (--source) or, if that is None, downloaded into the folder `downloads`.
        None: the data set has no raw files. If nothing can be downloaded it may return [path];
        without --source that is refused.
    build: build(folder, files, **options) writes the prepared files into `folder` through the
        DataWriter that it returns. Its keyword arguments are those of `options` but for source.
    template: the instruction around a prompt, such as "Continue: {prompt}".
    mixture: shares of the pretraining text by the part's name. Parts without an entry take what is
        left.
    options: which of OPTIONS have an effect. The others are refused.
    version: to be raised when `build` writes something else from the same files; otherwise data
        prepared earlier is used again.
    defaults: {stage: {option: value}} that suit this data; a flag or a preset wins over them.
    summary: one line for `train.py --list`.
    measures: measures(folder, prompts, replies, references) returns more figures of replies for the
        report, by name: a number for each reply, or None where there is nothing to measure. folder:
        the prepared data. references: the replies to these prompts in sft records; None if some
        prompt has none.
    """

    name: str
    source: Callable[[pathlib.Path | None, pathlib.Path], list[pathlib.Path]] | None
    build: Callable[..., "DataWriter"]
    template: str = "{prompt}"
    mixture: dict[str, Part] = dataclasses.field(default_factory=dict)
    options: tuple[str, ...] = ()
    version: int = 1
    defaults: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    summary: str = ""
    measures: Callable[..., dict[str, list[float | None]]] | None = None

    def __post_init__(self) -> None:
        """ValueError for a record that contradicts itself."""
        if not set(self.options) <= set(OPTIONS):
            raise ValueError(f"data set {self.name}: options are {', '.join(OPTIONS)}, not "
                             f"{', '.join(self.options)}")
        if "source" in self.options and self.source is None:
            raise ValueError(f"data set {self.name}: without a source it has no option source")
        if sum(part.share or 0 for part in self.mixture.values()) > 1 + 1e-9:
            raise ValueError(f"data set {self.name}: the shares of its mixture are more than 1 "
                             "together")


class DataWriter:
    """Writes a data set into a folder: tokens to pretrain on, and records for each stage.

    tokenizer: None for data without pretraining text. parts: names of the kinds of that text; part
    number i is parts[i]. counts: what was written so far, by file. defaults and mixture: as in
    `DataSet`, where they follow from the data.
    """

    def __init__(self, folder: pathlib.Path, tokenizer: Tokenizer | None,
                 parts: Sequence[str] = ("text",)):
        self.folder, self.tokenizer, self.parts = folder, tokenizer, tuple(parts)
        self.counts: dict[str, int | dict[str, int]] = {}
        self.defaults: dict[str, dict[str, Any]] = {}
        self.mixture: dict[str, Part] = {}
        self.lengths: dict[str, dict[str, Any]] = {}  # by kind: quantiles in tokens, and what fits
        self.dtype = "uint16" if tokenizer is None or tokenizer.n_vocab <= 2**16 else "uint32"

    def documents(self, split: str, documents: Iterable[tuple[str, Sequence[int]]],
                  n_bytes: int) -> None:
        """Write the pretraining text of a split: (part, ids) of each document, one at a time.

        n_bytes: length of the text in UTF-8, without what we added; bits per byte divide by it.
        """
        lengths, numbers = array("q"), array("B")
        with open(self.folder / f"pretrain_{split}.bin", "wb") as file:
            for part, ids in documents:
                file.write(np.array(ids, self.dtype).tobytes())
                lengths.append(len(ids))
                numbers.append(self.parts.index(part))
        if not lengths:
            raise UserError(f"no text for the {split} split: there are too few texts to divide; "
                            "bring more")
        length, number = np.array(lengths, np.int64), np.array(numbers, np.uint8)
        np.savez(self.folder / f"pretrain_{split}.npz", n_bytes=n_bytes, part=number,
                 starts=np.concatenate(([0], length.cumsum())))
        for i in np.unique(number):
            of_part = length[number == i]
            self.counts[f"pretrain_{split}[{self.parts[i]}]"] = {
                "documents": len(of_part), "tokens": int(of_part.sum())}

    def records(self, stage: str, split: str, records: Sequence[dict]) -> None:
        """Write a stage's records of a split (see data/records.py); `judge` has those of reward."""
        self.counts[f"{stage}_{split}"] = len(records)
        write_records(self.folder / f"{stage}_{split}.jsonl", records)


def feedback_of(record: dict) -> str:
    """The kind of a reward record's feedback: pairs, scores or labels."""
    return "pairs" if "chosen" in record else "scores" if "score" in record else "labels"


def tells(records: Sequence[dict]) -> str:
    """The kind of this feedback: pairs, scores or labels; "" if it tells nothing apart, because all
    labels or scores are the same, all pairs are ties, or there is no record."""
    if not records:
        return ""
    kind = feedback_of(records[0])
    if kind == "pairs":
        return kind if any(not r.get("tie") for r in records) else ""
    return kind if len({r.get(kind.removesuffix("s")) for r in records}) > 1 else ""


def require_one_feedback(files: Mapping[str, Sequence[dict]]) -> None:
    """UserError unless the reward records of all files, by name, have the same kind of feedback."""
    kinds = {name: feedback_of(records[0]) for name, records in files.items()}
    if len(set(kinds.values())) > 1:
        raise UserError(f"{', '.join(f'{name} has {kind}' for name, kind in kinds.items())}: training, "
                        "validation and test need the same kind of feedback; bring one kind")


# ---- raw files -----------------------------------------------------------------------------------

def refuse_zip(path: pathlib.Path) -> None:
    """UserError for a .zip archive, whatever its name."""
    if path.is_file() and zipfile.is_zipfile(path):
        raise UserError(f"{path}: a .zip archive is not read: unpack it, and give the folder or "
                        "the file in it")


def require_published(path: pathlib.Path, sha256: str) -> None:
    """UserError unless a downloaded file is the one with this digest."""
    if file_digest(path) != sha256:
        raise UserError(f"{path}: damaged, or not the file that was published (its SHA-256 "
                        "differs); delete it and run again")


# ---- splits --------------------------------------------------------------------------------------

def split_of(text: str) -> str:
    """The split that a text belongs to, by a hash of it: 80 % train, 10 % val, 10 % test."""
    percentile = text_hash("split " + text) % 100
    return SPLITS[(percentile >= 80) + (percentile >= 90)]
