"""Data that users bring: one file, or a folder of <stage>.jsonl, <stage>_val.jsonl, …; .json, .csv
and .tsv are read, too.

data/records.py lists the formats. Files without a validation or test file beside them are divided
90/5/5 by the keys of data/splits.py, and what is held out in one file leaves training in all.
"""
import collections
import dataclasses
import functools
import itertools
import json
import os
import pathlib
import sys
from array import array
from collections.abc import Iterable, Sequence

from data.answers import is_event
from data.tokenizer import train_bpe
from data.dataset import (SPLITS, DataSet, DataWriter, feedback_of, require_one_feedback,
                          text_hash)
from data.feedback import BESIDE, settle_beside, with_main_kind
from data.forms import OURS, form_of, parse_fields, renamed
from data.records import FIELDS, load_records
from data.road import (PARTS, Records, described, dialogues_of, fill, keep_for_judges, lengths, mixture,
                       proposals, strings, write_documents)
from data.splits import ONE_IN, HeldOutReplies, assign, prompt_key, replies_in, split_key
from data.texts import Texts
from runtime.options import Options, UserError, option
from runtime.rows import ENDINGS, read_rows
from runtime.terminal import remedy

READING = ("skip_bad", "fields")  # options that all files have
# the stage whose records a file has, where its name is another; they are for training alone
KINDS = dict.fromkeys(("judge", *BESIDE), "reward")
Files = dict[tuple[str, str], pathlib.Path]  # (stage, split) -> file


@dataclasses.dataclass
class OwnOptions(Options):
    """How files of one's own are read."""

    skip_bad: bool = option(False, "leave out bad lines of your own files, and say how many")
    fields: str = option("", "your files' names for ours: prompt=question,chosen=good")
    template: str = option("", "instruction around your prompts, with {prompt} in it")
    judge_share: float = option(-1.0, "share of your feedback kept for judges; -1: half of 2,000 records "
                                      "and more, a fifth of fewer", low=-1, high=0.9)
    traceback: bool = option(False, "show where in the code an error arose")


def own_data_set(path: pathlib.Path, fields: str = "", template: str = "") -> DataSet:
    """The user's file or folder as a data set. fields, template: what --fields and --template say."""
    if template and template.count("{prompt}") != 1:
        raise UserError(f"--template {template}: must have {{prompt}} once, where the prompt goes")
    files = find_files(path, parse_fields(fields))
    stages = {stage for stage, _ in files}
    words = {"vocab_size": stages != {"ppo"}, "template": True, "judge_share": bool(stages & {"reward", *BESIDE})}
    template = template or "{prompt}"
    return DataSet("own", source=lambda path, downloads: list(files.values()), template=template,
                   build=functools.partial(build, list(files), template), version=8,
                   options=(*READING, *(name for name, works in words.items() if works)))


def find_files(path: pathlib.Path, fields: dict[str, str] | None = None) -> Files:
    """The user's files by (stage, split), of any ENDINGS, plain or gzipped. The stage of a single file
    is that of its first record. UserError if a folder has no training file, or one in two forms."""
    if path.is_file():
        return {(stage_of(path, fields), "train"): path}
    files: Files = {}
    places = [*itertools.product(FIELDS, SPLITS), *((stage, "train") for stage in KINDS)]
    endings = [ending + zipped for ending in ENDINGS for zipped in ("", ".gz")]
    for (stage, split), ending in itertools.product(places, endings):
        file = path / file_name(stage, split).replace(".jsonl", ending)
        if os.path.lexists(file) and (other := files.setdefault((stage, split), file)) != file:
            raise UserError(f"{path}: {other.name} is there, and so is {file.name}: keep one of them")
    if not any((stage, "train") in files for stage in (*FIELDS, *BESIDE)):
        there = ", ".join(sorted(file.name for file in path.iterdir())[:4]) or "nothing"
        raise UserError(f"{path}: none of {', '.join(f'{s}.jsonl' for s in FIELDS)} is there, but {there}: name "
                        "a file to train on by its stage, or give the file itself")
    say_unread(path, tuple(sorted({file for ending in endings for file in path.glob("*" + ending)}
                                  - {*files.values()})))
    return files


@functools.cache  # each stage opens the folder
def say_unread(path: pathlib.Path, files: Sequence[pathlib.Path]) -> None:
    """A line if there are files whose names say nothing here, such as sft_valid.jsonl."""
    if files:
        print(f"{path}: warning: not read: {', '.join(file.name for file in files[:4])}"
              f"{' …' if files[4:] else ''}; names are those of stages, {', '.join(FIELDS)}, alone or "
              "with _val or _test", file=sys.stderr)


def stage_of(path: pathlib.Path, fields: dict[str, str]) -> str:
    """The stage of a file, by its first record that has a form; UserError if no line has one."""
    first = ""
    for row in read_rows(path):
        try:
            value = row.value()
            return "reward" if is_event(value) else form_of(renamed(value, fields)).stage
        except ValueError as error:  # it is reported, or left out, with other bad lines
            first = first or f", {row.place}: {error}"
    raise UserError(f"{path}{first or ': holds no records'}; docs/data.md has the forms that are read")


def file_name(stage: str, split: str) -> str:
    """<stage>.jsonl for train, else <stage>_<split>.jsonl."""
    return f"{stage}.jsonl" if split == "train" else f"{stage}_{split}.jsonl"


def build(places: Sequence[tuple[str, str]], template: str, folder: pathlib.Path,
          files: Sequence[pathlib.Path], vocab_size: int = 0, skip_bad: bool = False, fields: str = "",
          judge_share: float = -1.0) -> DataWriter:
    """Check and divide the user's records, let one kind serve other stages, train a vocabulary.

    places: (stage, split) of each file. template: around each prompt that is a text. skip_bad: leave
    out lines that are no record. fields, judge_share: what these options say.
    """
    records, left_out = divide(dict(zip(places, files, strict=True)), skip_bad, parse_fields(fields))
    given = remedy("template", template, "{prompt}")  # a checkpoint's, of other data, may be without effect
    if given != "{prompt}" and not any(isinstance(r.get("prompt"), str) for of_stage in records.values()
                                       if not isinstance(of_stage, Texts) for r in of_stage):
        raise UserError(f"--template has no effect on {files[0]}: every prompt is a list of messages")
    dialogues = {split: dialogues_of(records, split, template) for split in SPLITS}
    if reason := keep_for_judges(records, judge_share):
        print(f"judges: {reason}", flush=True)
    if several := settle_beside(records):
        print(several, flush=True)
    texts = {split: records.pop(("pretrain", split), []) for split in SPLITS}
    out = DataWriter(folder, None)
    if all(len(texts[split]) or dialogues[split] for split in SPLITS):
        read = strings(texts["train"], dialogues["train"])
        out = DataWriter(folder, train_bpe(read, vocab_size, progress=True), PARTS)
        for split in SPLITS:
            write_documents(out, split, texts[split], dialogues[split])
        out.mixture = mixture(out.counts)
    for (stage, split), of_stage in records.items():
        out.records(stage, split, of_stage)
    if out.tokenizer is not None:
        sizes = lengths(records, out.tokenizer, template)
        out.defaults = proposals(sizes, out.counts)
        out.lengths = described(sizes, out.defaults)
    out.counts |= {f"{stage}_left_out": n for stage, n in left_out.items()}
    return out


def divide(files: Files, skip_bad: bool = False,
           fields: dict[str, str] | None = None) -> tuple[Records, collections.Counter[str]]:
    """(the records of all files by stage and split, how many were left out of a stage's training).

    Files of held-out records stay as they are, but for repeats. Left out of training is what stands
    in one of them, if the stage brings a file of its own for that split; and texts that hold a
    held-out prompt with its reply. Both are said.
    """
    loaded = {(stage, split): Texts(path, skip_bad, fields) if stage == "pretrain" else
              load_records(path, KINDS.get(stage, stage), skip_bad, fields, say=True)
              for (stage, split), path in files.items()}
    files, loaded = with_main_kind(files, loaded)
    require_one_feedback({files[place]: of_file for place, of_file in loaded.items()
                          if place[0] in ("reward", "judge")})
    keys = {(stage, split): array("Q", (split_key(record, stage) for record in of_file))
            for (stage, split), of_file in loaded.items()}
    splits = held_out_keys(loaded, keys)
    records: Records = {place: of_file for place, of_file in loaded.items() if place[1] != "train"}
    left_out: collections.Counter[str] = collections.Counter()
    for stage in (stage for stage, split in loaded if split == "train"):
        drawn = [splits.get(key, "train") for key in keys[stage, "train"]]
        for split, count in collections.Counter(drawn).items():
            if split != "train" and (stage in KINDS or (stage, split) in files):
                left_out[stage] += count
            else:
                records[stage, split] = those(loaded[stage, "train"], (d == split for d in drawn))
    leave_out_replies(records, left_out)
    fill(records)
    for stage in dict.fromkeys(stage for stage, _ in files):
        require_splits(stage, records, files, left_out[stage])
        if left_out[stage]:
            print(f"{files[stage, 'train']}: {left_out[stage]} of {len(loaded[stage, 'train'])} records "
                  "are left out of training: they, or prompts with replies in them, are held out for "
                  "validation or test", flush=True)
    return {(stage, split): of_stage if split == "train" else without_repeats(of_stage, stage)
            for (stage, split), of_stage in records.items()}, left_out


def those(records: list[dict] | Texts, keep: Iterable[bool]) -> list[dict] | Texts:
    """The records for which `keep` has True."""
    return (records.where(keep) if isinstance(records, Texts) else
            list(itertools.compress(records, keep)))


def held_out_keys(loaded: Records, keys: dict[tuple[str, str], array]) -> dict[int, str]:
    """The split of each key that is held out, in a file of the user's or drawn from what is to be
    trained on."""
    fixed: dict[int, str] = {}
    groups: dict[str, Sequence[int]] = {}
    wanted: dict[str, set[str]] = {}
    for stage, split in sorted(loaded, key=lambda place: place[1] == "test"):
        if split != "train":  # of a key in both, it is test that nothing else may see
            fixed |= dict.fromkeys(keys[stage, split], split)
            continue
        by_group: dict[str, Sequence[int]] = {stage: keys[stage, split]}
        if stage == "reward":
            by_group = collections.defaultdict(list)
            for key, group in zip(keys[stage, split], groups_of(loaded[stage, split], stage),
                                  strict=True):
                by_group[group].append(key)
        groups |= by_group
        wanted |= dict.fromkeys(by_group, {split for split in SPLITS
                                           if (stage, split) not in loaded and stage not in KINDS})
    return assign(groups, wanted, fixed)


def groups_of(records: list[dict], stage: str) -> list[str]:
    """What each record is drawn from for validation and test: its stage, and of labels and scores
    those below or above their mean, so that they differ in every split."""
    field = {"labels": "label", "scores": "score"}.get(feedback_of(records[0]))
    if stage != "reward" or field is None:
        return [stage] * len(records)
    mean = sum(record[field] for record in records) / len(records)
    return [f"{stage}, high" if record[field] > mean else stage for record in records]


def leave_out_replies(records: Records, left_out: collections.Counter[str]) -> None:
    """Drop the training texts that hold a held-out prompt with its reply, and count them."""
    texts = records.get(("pretrain", "train"), [])
    replies = HeldOutReplies(pair for stage in ("sft", "reward") for split in SPLITS[1:]
                             for record in records.get((stage, split), [])
                             for pair in replies_in(record, stage))
    kept = those(texts, (not replies.are_in(r["text"]) for r in texts)) if replies.replies else texts
    if len(kept) < len(texts):
        records["pretrain", "train"] = kept
        left_out["pretrain"] += len(texts) - len(kept)


def require_splits(stage: str, records: Records, files: Files, left_out: int) -> None:
    """UserError if a split of the stage has no records."""
    path = files.get((stage, "train"))
    for split in (*SPLITS[1:], "train") if stage not in KINDS else ("train",):
        if records.get((stage, split)):
            continue
        if path is None:
            raise UserError(f"{next(f for (s, _), f in files.items() if s == stage)}: there is no "
                            f"{file_name(stage, 'train')} beside it to train on: bring one")
        if split == "train" and left_out:
            raise UserError(f"{path}: nothing is left to train on: all of its {left_out} records are "
                            "held out for validation or test, too; bring others")
        what = "texts" if stage == "pretrain" else "first user messages"
        raise UserError(f"{path}: too few records, or too few different {what}, to have some for "
                        f"{split}; bring at least {ONE_IN} different ones, or a folder with "
                        f"{file_name(stage, 'train')} and your own {file_name(stage, split)}")


def without_repeats(records: list[dict] | Texts, stage: str) -> list[dict] | Texts:
    """Each held-out record once: a prompt of ppo, and what else is equal in all that is read."""
    seen: set[int] = set()

    def is_new(record: dict) -> bool:
        identity = text_hash(prompt_key(record["prompt"]) if stage == "ppo" else
                             json.dumps([record.get(field) for field in OURS]))
        return not (identity in seen or seen.add(identity))

    return those(records, map(is_new, records))
