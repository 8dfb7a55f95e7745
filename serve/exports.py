"""Answers as training data: our own records, a folder for `train.py --data`, and other tools' files.

    python -m serve export feedback.jsonl --out FOLDER              for train.py --data FOLDER
    python -m serve export feedback.jsonl --to trl --out FOLDER     for TRL; kto, llama-factory, …

Events are those of serve/log.py; which of them hold is said by data/answers.py, so that a log read in
place (`--data feedback.jsonl`) gives the same records.
"""
import collections
import contextlib
import hashlib
import io
import json
import os
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

from data.answers import GONE, fates, is_event, record_of
from data.dialogues import Useless
from data.export import INFO, TOOLS, converted, entry, prompt_messages
from data.feedback import settle_beside
from data.own import divide, find_files
from data.records import checked, records_in
from data.road import keep_for_judges, mean_score, preferred
from runtime.options import UserError
from runtime.storage import replacing

OWN = "mosslet"  # what `export_log` calls our own form
KINDS = {"chosen": "pairs", "label": "labels", "score": "scores"}  # by the field that tells


# ---- records -------------------------------------------------------------------------------------

def training_records(events: Iterable[dict]) -> dict[str, list[dict]]:
    """The records that answers teach, in the form of data/records.py, by kind: pairs, labels, scores, sft.

    Undone answers, skips and swapped repetitions are left out. A tie and "both bad" are pairs with
    "tie": true. An edit is an sft record, and a pair in which the edited reply is better.

    >>> training_records([{"id": "a", "kind": "label", "prompt": "Hi", "response": "Ho", "label": 1}])["labels"]
    [{'prompt': 'Hi', 'response': 'Ho', 'label': 1}]
    """
    events = list(events)
    known = fates(events)
    found: dict[str, list[dict]] = {"pairs": [], "labels": [], "scores": [], "sft": []}
    for event in events:
        if event["id"] in known:
            continue
        if event["kind"] == "edit":
            found["sft"].append(normal(event, "sft"))
        with contextlib.suppress(Useless):
            record = normal(record_of(event, "reward"), "reward")
            found[kind_of(record)].append(record)
    return found


def normal(record: dict, stage: str) -> dict:
    """A record of a stage without the fields of its event; ValueError says what is wrong with it."""
    if stage == "sft" and isinstance(record["prompt"], list):
        record = {"messages": [*record["prompt"], {"role": "assistant", "content": record["response"]}]}
    return checked(record, stage)


def events_of(value: Any, annotator: str) -> list[dict]:
    """The events of one line that is imported: an event as it is, or a record of feedback in any form of
    data/forms.py as answers of this annotator. An event's id follows from its content, so that a
    file imported twice is stored once. ValueError says what is wrong with the line."""
    if is_event(value):
        return [value]
    found = []
    for record in records_in(value, "reward")[1]:
        kind = {"pairs": "pair", "labels": "label", "scores": "rating"}[kind_of(record)]
        digest = hashlib.sha256(json.dumps([annotator, record], sort_keys=True).encode()).hexdigest()
        found.append({"id": digest[:16], "annotator": annotator, "kind": kind, **record, "imported": True})
    return found


def kind_of(record: dict) -> str:
    """pairs, labels or scores."""
    return next(kind for field, kind in KINDS.items() if field in record)


def saved(events: Iterable[dict], annotator: str | None = None) -> int:
    """How many answers hold, of one annotator or of all: pairs, ratings and labels, repetitions too."""
    events = list(events)
    known = fates(events)
    return sum(event["kind"] in ("pair", "rating", "label") and annotator in (None, event["annotator"])
               and known.get(event["id"]) not in GONE for event in events)


# ---- a folder that training reads ------------------------------------------------------------------

def data_files(events: Iterable[dict], template: str = "{prompt}", prompts: Sequence = ()) -> dict[str, list[dict]]:
    """{stage: records} of the files that training reads: `reward` has the most frequent kind of feedback,
    `reward_labels` and the like the others; `sft`, with edits or several kinds, what is `preferred` of all;
    `ppo` each prompt once. UserError without any feedback.

    template: the checkpoint's, if that is not "{prompt}": prompts that are texts then stand in it as
    messages, so that no stage needs --template. prompts: more of them, for PPO.
    """
    found = training_records(events)
    edits, kinds = found.pop("sft"), sorted(found, key=lambda kind: -len(found[kind]))
    if not found[kinds[0]]:
        raise UserError("no answers yet: give some before they are trained on or exported")
    files = {"reward": found[kinds[0]], **{f"reward_{kind}": found[kind] for kind in kinds[1:] if found[kind]}}
    if edits or len(files) > 1:
        answers = [record for kind in kinds for record in found[kind]]
        liked = [normal(record, "sft") for record in preferred(answers, mean_score(answers))]
        worse = {json.dumps(normal({"prompt": r["prompt"], "response": r["rejected"]}, "sft"))
                 for r in found["pairs"] if "tie" not in r}  # an edit may be edited, too
        better = [record for record in edits if json.dumps(record) not in worse]
        sft = list({json.dumps(record): record for record in [*better, *liked]}.values())
        files |= {"sft": sft} if sft else {}
    asked = [*(record["prompt"] for kind in kinds for record in found[kind]), *prompts]
    files["ppo"] = [{"prompt": prompt} for prompt in {json.dumps(x): x for x in asked}.values()]
    if template != "{prompt}":
        files = {stage: [in_template(record, template) for record in records] for stage, records in files.items()}
    return files


def in_template(record: dict, template: str) -> dict:
    """The record with a prompt that is a text as messages, in the template."""
    if not isinstance(record.get("prompt"), str):
        return record
    messages = prompt_messages(record, template)
    if "response" in record and not {"label", "score"} & set(record):
        return {"messages": [*messages, {"role": "assistant", "content": record["response"]}]}
    return record | {"prompt": messages}


def write_data(events: Iterable[dict], folder: str | os.PathLike, *, template: str = "{prompt}",
               prompts: Sequence = (), held_out: Sequence[dict] = ()) -> dict[str, int]:
    """Write the files of `data_files` into a folder, in place of those that were written there before, and
    return how many records each has. A kind beside the main one with too few records to be divided
    is left out, and printed. UserError without any feedback.

    held_out: other records, on which a reward model is measured. The folder then is for the reward stage
    alone, and no judge learns from it.
    """
    folder = pathlib.Path(folder)
    files = data_files(events, template, prompts)
    if held_out:
        files = {stage: records for stage, records in files.items() if stage.startswith("reward")}
    folder.mkdir(parents=True, exist_ok=True)
    for stage in ("reward", "sft", "ppo", *(f"reward_{kind}" for kind in KINDS.values())):
        if stage not in files:
            (folder / f"{stage}.jsonl").unlink(missing_ok=True)
    for stage, records in files.items():
        write_lines(folder / f"{stage}.jsonl", records)
    for split in ("val", "test") if held_out else ():  # nothing is chosen by the first, so it may be the second
        write_lines(folder / f"reward_{split}.jsonl", held_out)
    for stage, n in leave_out_unusable(folder, files, 0.0 if held_out else -1.0).items():
        print(f"{folder}: {stage.removeprefix('reward_')} ({n:,}) are left out: there are too few of them beside "
              "the others; more of them will count", flush=True)
        del files[stage]
    return {stage: len(records) for stage, records in files.items()}


def leave_out_unusable(folder: pathlib.Path, files: dict[str, list[dict]], judge_share: float) -> dict[str, int]:
    """Remove, from the smallest on, the files beside the main kind without which training takes the folder;
    none if it does not take the main kind alone. Returns how many records each had. judge_share: the option
    with which it will be prepared."""
    beside = sorted((stage for stage in files if stage not in ("reward", "ppo")), key=lambda stage: len(files[stage]))
    removed: list[str] = []
    while beside and refused(folder, judge_share):
        removed.append(beside.pop(0))
        (folder / f"{removed[-1]}.jsonl").unlink()
    if removed and refused(folder, judge_share):
        for stage in removed:
            write_lines(folder / f"{stage}.jsonl", files[stage])
        return {}
    return {stage: len(files[stage]) for stage in removed}


def refused(folder: pathlib.Path, judge_share: float) -> str:
    """Why training would not take the folder; "" if it would."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # it is said when the data is prepared
            records, _ = divide(find_files(folder))
            keep_for_judges(records, judge_share)
            settle_beside(records)
    except UserError as error:
        return str(error)
    return ""


def write_lines(path: pathlib.Path, records: Iterable[dict]) -> None:
    """Write JSON Lines in place of what was there; a kill leaves the old file or the new one."""
    with replacing(path) as file:
        file.writelines((json.dumps(record, ensure_ascii=False) + "\n").encode() for record in records)


# ---- other tools -----------------------------------------------------------------------------------

def exported(events: Iterable[dict], to: str, template: str = "{prompt}") -> tuple[dict[str, Any], dict[str, int]]:
    """({file name: its records}, {what is left out: how often}) for a tool of data/export.py, or "mosslet".
    dataset_info.json of LLaMA-Factory is no list but an object. UserError for another tool, and if
    nothing has a form there."""
    if to not in (OWN, *TOOLS):
        raise UserError(f"--to {to}: is none of {', '.join((OWN, *TOOLS))}")
    if to == OWN:
        return {f"{stage}.jsonl": records for stage, records in data_files(events, template).items()}, {}
    lost: collections.Counter[str] = collections.Counter()
    found: dict[str, Any] = {}
    for stage, records in data_files(events).items():
        if written := converted(records, stage.split("_")[0], to, template, lost):
            # As labels, which KTO makes of pairs, all feedback is of one kind.
            name = "reward" if to == "kto" and stage.startswith("reward") else stage
            found.setdefault(f"{name}.jsonl", []).extend(written)
    if not any(name.startswith("reward") for name in found):
        raise UserError(f"the answers hold no record that {to} has a form for: {', '.join(lost)}")
    if to == "llama-factory":
        found[INFO] = {f"feedback_{name.removesuffix('.jsonl')}": entry(name, records[0])
                       for name, records in found.items()}
    return found, dict(lost)


def write_exported(events: Iterable[dict], folder: str | os.PathLike, to: str, template: str = "{prompt}") -> None:
    """Write the files of `exported` into a folder, and print what is written and what is left out. UserError
    if one of them is there already."""
    folder = pathlib.Path(folder)
    if os.path.lexists(folder) and not folder.is_dir():
        raise UserError(f"--out {folder}: is a file, and a folder is needed: give another")
    files, lost = exported(events, to, template)
    for name in files:
        if os.path.lexists(folder / name):
            raise UserError(f"{folder / name} is there already, and nothing is overwritten: give another --out")
    if to == OWN:
        counts = write_data(events, folder, template=template)
    else:
        folder.mkdir(parents=True, exist_ok=True)
        for name, records in files.items():
            if isinstance(records, list):
                write_lines(folder / name, records)
            else:
                with replacing(folder / name) as file:
                    file.write(json.dumps(records, indent=2, ensure_ascii=False).encode())
        counts = {name.removesuffix(".jsonl"): len(x) for name, x in files.items() if isinstance(x, list)}
    for stage, n in counts.items():
        print(f"{folder / stage}.jsonl: {n:,} records")
    for reason, n in lost.items():
        print(f"{n:,} {reason}")
