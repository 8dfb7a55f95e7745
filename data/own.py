"""Data that users bring: one .jsonl file, or a folder of <stage>.jsonl, <stage>_val.jsonl, ….

data/records.py lists the formats. Files without a validation or test file beside them are divided
90/5/5 by the keys of data/splits.py, and what is held out in one file leaves training in all.
"""
import collections
import contextlib
import functools
import itertools
import json
import pathlib
from collections.abc import Sequence

from data.tokenizer import train_bpe
from data.dataset import SPLITS, DataSet, DataWriter, require_one_feedback
from data.records import FIELDS, as_messages, kind_of, load_records
from data.splits import ONE_IN, HeldOutReplies, assign, prompt_key, replies_in, split_key
from runtime.lines import parse_line, read_lines
from runtime.options import UserError

Files = dict[tuple[str, str], pathlib.Path]  # (stage, split) -> file
Records = dict[tuple[str, str], list[dict]]  # (stage, split) -> records
READ = ("text", "messages", "prompt", "response", "chosen", "rejected", "label", "score", "margin")


def own_data_set(path: pathlib.Path) -> DataSet:
    """The user's file or folder as a data set."""
    files = find_files(path)
    has_text = any(stage == "pretrain" for stage, _ in files)
    return DataSet("own", source=lambda path, downloads: list(files.values()),
                   build=functools.partial(build, list(files)),
                   options=("vocab_size", "skip_bad") if has_text else ("skip_bad",), version=2)


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
    records, left_out = divide(dict(zip(places, files, strict=True)), skip_bad)
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
    out.counts |= {f"{stage}_left_out": n for stage, n in left_out.items()}
    return out


def divide(files: Files,
           skip_bad: bool = False) -> tuple[Records, collections.Counter[str]]:
    """(the records of all files by stage and split, how many were left out of a stage's training).

    Files of held-out records stay as they are, but for repeats. Left out of training is what stands
    in one of them, if the stage brings a file of its own for that split; and texts that hold a
    held-out prompt with its reply. Both are said.
    """
    loaded = {(stage, split): load_records(path, stage, skip_bad)
              for (stage, split), path in files.items()}
    require_one_feedback({files[place]: of_file for place, of_file in loaded.items()
                          if place[0] == "reward"})
    splits = held_out_keys(loaded)
    records: Records = {place: of_file for place, of_file in loaded.items() if place[1] != "train"}
    left_out: collections.Counter[str] = collections.Counter()
    for (stage, split), of_file in loaded.items():
        for record in of_file if split == "train" else ():
            drawn = splits.get(split_key(record, stage), "train")
            if drawn != "train" and (stage, drawn) in files:
                left_out[stage] += 1
            else:
                records.setdefault((stage, drawn), []).append(record)
    leave_out_replies(records, left_out)
    for split in SPLITS:  # without prompts for PPO, it takes those of the dialogues
        if ("ppo", split) not in records and ("sft", split) in records:
            records["ppo", split] = [{"prompt": as_messages(r, "{prompt}")[:-1]}
                                     for r in records["sft", split]]
    for stage in dict.fromkeys(stage for stage, _ in files):
        require_splits(stage, records, files, left_out[stage])
        if left_out[stage]:
            print(f"{files[stage, 'train']}: {left_out[stage]} of {len(loaded[stage, 'train'])} records "
                  "are left out of training, because they are held out for validation or test")
    return {(stage, split): of_stage if split == "train" else without_repeats(of_stage, stage)
            for (stage, split), of_stage in records.items()}, left_out


def held_out_keys(loaded: Records) -> dict[int, str]:
    """The split of each key that is held out, in a file of the user's or drawn from what is to be
    trained on. Labels are drawn from each by itself, so that a split has both."""
    fixed: dict[int, str] = {}
    groups: dict[str, set[int]] = collections.defaultdict(set)
    wanted: dict[str, set[str]] = {}
    for (stage, split), of_file in sorted(loaded.items(), key=lambda item: item[0][1] == "test"):
        for record in of_file:
            key = split_key(record, stage)
            if split != "train":  # of a key in both, it is test that nothing else may see
                fixed[key] = split
                continue
            name = f"{stage} {record.get('label')}" if stage == "reward" else stage
            groups[name].add(key)
            wanted[name] = {split for split in SPLITS if (stage, split) not in loaded}
    return assign(groups, wanted, fixed)


def leave_out_replies(records: Records, left_out: collections.Counter[str]) -> None:
    """Drop the training texts that hold a held-out prompt with its reply, and count them."""
    texts = records.get(("pretrain", "train"), [])
    replies = HeldOutReplies(pair for stage in ("sft", "reward") for split in SPLITS[1:]
                             for record in records.get((stage, split), [])
                             for pair in replies_in(record, stage))
    kept = [record for record in texts if not replies.are_in(record["text"])]
    if len(kept) < len(texts):
        records["pretrain", "train"] = kept
        left_out["pretrain"] += len(texts) - len(kept)


def require_splits(stage: str, records: Records, files: Files, left_out: int) -> None:
    """UserError if a split of the stage has no records."""
    path = files.get((stage, "train"), stage)
    for split in SPLITS:
        if records.get((stage, split)):
            continue
        if split == "train" and left_out:
            raise UserError(f"{path}: nothing is left to train on: all of its {left_out} records are "
                            "held out for validation or test, too; bring others")
        what = "texts" if stage == "pretrain" else "first user messages"
        raise UserError(f"{path}: too few records, or too few different {what}, to have some for "
                        f"{split}; bring at least {ONE_IN}, or a folder with "
                        f"{file_name(stage, 'train')} and your own {file_name(stage, split)}")


def without_repeats(records: list[dict], stage: str) -> list[dict]:
    """Each held-out record once: a prompt of ppo, and what else is equal in all that is read."""
    def identity(record: dict) -> str:
        if stage == "ppo":
            return prompt_key(record["prompt"])
        return json.dumps([record.get(field) for field in READ])

    return list({identity(record): record for record in reversed(records)}.values())[::-1]
