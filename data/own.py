"""Data that users bring: one .jsonl file, or a folder of <stage>.jsonl, <stage>_val.jsonl, ….

data/records.py lists the formats. Files without a validation or test file beside them are divided
90/5/5 by a hash of each record's prompt or text.
"""
import contextlib
import functools
import itertools
import json
import pathlib
from collections.abc import Sequence

from data.tokenizer import train_bpe
from data.dataset import SPLITS, DataSet, DataWriter, split_of
from data.records import FIELDS, as_messages, kind_of, load_records
from runtime.lines import parse_line, read_lines
from runtime.options import UserError

Files = dict[tuple[str, str], pathlib.Path]  # (stage, split) -> file
Records = dict[tuple[str, str], list[dict]]  # (stage, split) -> records


def own_data_set(path: pathlib.Path) -> DataSet:
    """The user's file or folder as a data set."""
    files = find_files(path)
    has_text = any(stage == "pretrain" for stage, _ in files)
    return DataSet("own", source=lambda path, downloads: list(files.values()),
                   build=functools.partial(build, list(files)),
                   options=("vocab_size", "skip_bad") if has_text else ("skip_bad",))


def find_files(path: pathlib.Path) -> Files:
    """The user's files by (stage, split), plain or gzipped. The stage of a single file is that of
    its first record. UserError if a folder has no training file, or one in both forms."""
    if path.is_file():
        return {(kind_of(first_object(path)), "train"): path}
    files: Files = {}
    for stage, split, suffix in itertools.product(FIELDS, SPLITS, ("", ".gz")):
        file = path / (file_name(stage, split) + suffix)
        if file.exists() and files.setdefault((stage, split), file) != file:
            raise UserError(f"{path}: {file_name(stage, split)} is there, and so is {file.name}: "
                            "keep one of them")
    if not any(split == "train" for _, split in files):
        raise UserError(f"{path}: none of {', '.join(f'{s}.jsonl' for s in FIELDS)} is there")
    return files


def first_object(path: pathlib.Path) -> dict:
    """The first JSON object of a file; {} if no line holds any."""
    for _, line in read_lines(path):
        with contextlib.suppress(ValueError):  # it is reported, or left out, with other bad lines
            if isinstance(record := parse_line(line), dict):
                return record
    return {}


def file_name(stage: str, split: str) -> str:
    """<stage>.jsonl for train, else <stage>_<split>.jsonl."""
    return f"{stage}.jsonl" if split == "train" else f"{stage}_{split}.jsonl"


def build(places: Sequence[tuple[str, str]], folder: pathlib.Path, files: Sequence[pathlib.Path],
          vocab_size: int = 0, skip_bad: bool = False) -> DataWriter:
    """Check and divide the user's records; train a vocabulary if there is pretraining text.

    places: (stage, split) of each file. skip_bad: leave out lines that are no record.
    """
    records = divide(dict(zip(places, files, strict=True)), skip_bad)
    texts = {split: [r["text"] for r in records["pretrain", split]] for split in SPLITS
             if ("pretrain", split) in records}
    tokenizer = train_bpe(texts["train"], vocab_size, progress=True) if texts else None
    out = DataWriter(folder, tokenizer)
    for split, of_split in texts.items():
        documents = [("text", [tokenizer.eot_id, *tokenizer.encode(text)]) for text in of_split]
        out.documents(split, documents, sum(len(text.encode()) for text in of_split))
    for (stage, split), of_stage in records.items():
        if stage != "pretrain":
            out.records(stage, split, of_stage)
    for split in SPLITS:  # without prompts for PPO, it takes those of the dialogues
        if ("ppo", split) not in records and ("sft", split) in records:
            prompts = [{"prompt": as_messages(r, "{prompt}")[:-1]} for r in records["sft", split]]
            out.records("ppo", split, prompts)
    return out


def divide(files: Files, skip_bad: bool = False) -> Records:
    """The records of all files; what would fall into a split with a file of its own stays in train.
    UserError if a split of a stage stays empty."""
    records: Records = {}
    for (stage, split), path in files.items():
        if split != "train":
            records[stage, split] = load_records(path, stage, skip_bad)
            continue
        for record in load_records(path, stage, skip_bad):
            drawn = split_of(json.dumps(record.get("prompt", record), sort_keys=True), (90, 95))
            place = (stage, "train") if (stage, drawn) in files else (stage, drawn)
            records.setdefault(place, []).append(record)
    for stage in {stage for stage, _ in records}:
        for split in SPLITS:
            if not records.get((stage, split)):
                raise UserError(
                    f"{files.get((stage, 'train'), stage)}: too few records, or too few different "
                    f"prompts, to have some for {split}; bring at least 50, or a folder with "
                    f"{file_name(stage, 'train')} and your own {file_name(stage, split)}")
    return records
