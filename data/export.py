"""Prepared records as other tools read them.

    python -m data.prepare export FOLDER|NAME|FILE.jsonl --to trl --out EXPORTED

    trl             messages; prompt, chosen and rejected; prompt, completion and label: lists of messages
    trl-standard    prompt and completion; prompt, chosen and rejected; prompt, completion and label: texts
    kto             the same, but each pair as a reply that is liked and one that is not
    llama-factory   ShareGPT's conversations, and the dataset_info.json that lists the files

There is one file a split, named as files of your own are, so `--data EXPORTED` reads them again.
Prompts that are texts stand in the data set's template, as in training. What a tool has no form for is
left out, counted and said.
"""
import collections
import json
import os
import pathlib

from data.dataset import SPLITS, feedback_of
from data.dialogues import Messages
from data.feedback import BESIDE
from data.own import file_name
from data.prepared import Prepared
from data.records import FIELDS, as_messages
from runtime.options import UserError
from runtime.storage import replace_text, replacing

STAGES = (*(stage for stage in FIELDS if stage != "pretrain"), "judge")
SPEAKERS = {"system": "system", "user": "human", "assistant": "gpt"}  # in ShareGPT's dialogues
INFO = "dataset_info.json"  # where LLaMA-Factory looks for a file's name and fields


def export(data: Prepared, to: str, out: pathlib.Path) -> None:
    """Write the records of a prepared data set for a tool of TOOLS, and print what is written and what
    is left out. UserError if a file of that name is there already, or if the tool has a form for none."""
    if os.path.lexists(out) and not out.is_dir():
        raise UserError(f"--out {out}: is a file, and a folder is needed: give another")
    places = {out / file_name(stage, split): (stage, split) for stage in STAGES for split in SPLITS
              if (data.folder / f"{stage}_{split}.jsonl").exists()}
    for path in (*places, *[out / INFO] * (to == "llama-factory")):
        if os.path.lexists(path):
            raise UserError(f"{path} is there already, and nothing is overwritten: give another --out")
    lost: collections.Counter[str] = collections.Counter()
    name, info = pathlib.Path(data.meta["data"]).name.split(".")[0], {}
    for path, (stage, split) in places.items():
        records = converted(data.records(stage, split), stage, to, data.template, lost)
        if records:
            out.mkdir(parents=True, exist_ok=True)
            with replacing(path) as file:
                file.writelines((json.dumps(record, ensure_ascii=False) + "\n").encode()
                                for record in records)
            print(f"{path}: {len(records):,} records")
            info[f"{name}_{path.stem}"] = entry(path.name, records[0])
    for kind in (kind for name, kind in BESIDE.items() if data.has(name)):
        lost[f"{kind} beside the main feedback are not written: your own file has them"] += len(
            data.records(f"reward_{kind}", "train"))
    for reason, n in lost.items():
        print(f"{n:,} {reason}")
    if data.tokenizer is not None:
        print("texts to pretrain on are not written: they are kept as tokens, and your own file has them")
    if not info:
        raise UserError(f"{data.folder}: holds no record that {to} has a form for")
    if to == "llama-factory":
        replace_text(out / INFO, json.dumps(info, indent=2, ensure_ascii=False))
        print(f"{out / INFO}: lists {', '.join(info)}")


def converted(records: list[dict], stage: str, to: str, template: str,
              lost: collections.Counter[str]) -> list[dict]:
    """The records in the tool's form; what cannot be expressed is counted in `lost`."""
    found: list[dict] = []
    margins = any("margin" in record for record in records)  # TRL needs one in each pair, or in none
    for record in records:
        if record.get("tie"):
            lost["ties are left out: no form says that two replies are equally good"] += 1
        elif stage in ("reward", "judge") and feedback_of(record) == "scores":
            lost["ratings are left out: the forms are for pairs and labels"] += 1
        elif to == "trl-standard" and len(dialogue_of(record, template)) > 2:
            lost["records of several turns, or with a system message, are left out: a plain text has one "
                 "prompt and one reply"] += 1
        else:
            if margins and to in ("trl", "trl-standard"):
                record = record | {"margin": float(record.get("margin", 0))}
            elif "margin" in record:
                lost["margins are left out: the form has none; their pairs are written"] += 1
            found += TOOLS[to](record, stage, template)
    return found


# ---- the forms -----------------------------------------------------------------------------------

def prompt_messages(record: dict, template: str) -> Messages:
    """A record's prompt as messages; a text stands in its template."""
    return as_messages({"prompt": record["prompt"], "response": ""}, template)[:-1]


def dialogue_of(record: dict, template: str) -> Messages:
    """A record of any stage as messages; where it has several replies, or none, the answer is empty."""
    return as_messages({"response": "", **record}, template)


def answer(text: str) -> Messages:
    """A reply as TRL's lists have it."""
    return [{"role": "assistant", "content": text}]


def trl(record: dict, stage: str, template: str) -> list[dict]:
    """TRL's conversational forms; other fields than ours stay, for its reward functions."""
    if stage == "sft":
        return [{"messages": as_messages(record, template)}]
    prompt = {"prompt": prompt_messages(record, template)}
    if "chosen" in record:
        return [record | prompt | {name: answer(record[name]) for name in ("chosen", "rejected")}]
    if "label" in record:
        return unpaired(prompt, record, [("response", record["label"])])
    return [record | prompt]


def unpaired(prompt: dict, record: dict, replies: list[tuple[str, int]]) -> list[dict]:
    """TRL's KTO form: one record for each (field of a reply, label)."""
    part = {"part": record["part"]} if "part" in record else {}
    return [prompt | {"completion": answer(record[field]), "label": bool(label)} | part
            for field, label in replies]


def trl_standard(record: dict, stage: str, template: str) -> list[dict]:
    """TRL's standard forms: prompt and replies as plain texts, which TRL joins as they are. The record has
    one turn."""
    prompt, reply = (message["content"] for message in dialogue_of(record, template))
    if stage == "sft":
        return [{"prompt": prompt, "completion": reply}]
    if "label" in record:
        part = {"part": record["part"]} if "part" in record else {}
        return [{"prompt": prompt, "completion": reply, "label": bool(record["label"])} | part]
    return [record | {"prompt": prompt}]


def kto(record: dict, stage: str, template: str) -> list[dict]:
    """As `trl`, but a pair becomes two records with labels."""
    if "chosen" not in record:
        return trl(record, stage, template)
    return unpaired({"prompt": prompt_messages(record, template)}, record,
                    [("chosen", 1), ("rejected", 0)])


def llama_factory(record: dict, stage: str, template: str) -> list[dict]:
    """ShareGPT's dialogues; a prompt for PPO ends with an empty answer, which it wants and ignores."""
    def spoken(messages: Messages) -> Messages:
        return [{"from": SPEAKERS[m["role"]], "value": m["content"]} for m in messages]

    if stage == "sft":
        return [{"conversations": spoken(as_messages(record, template))}]
    part = {"part": record["part"]} if "part" in record else {}
    prompt = prompt_messages(record, template)
    if "chosen" in record:
        replies = {name: spoken(answer(record[name]))[0] for name in ("chosen", "rejected")}
        return [{"conversations": spoken(prompt), **replies, **part}]
    dialogue = {"conversations": spoken(prompt + answer(record.get("response", "")))}
    return [dialogue | ({"kto_tag": bool(record["label"])} if "label" in record else {}) | part]


def entry(file: str, record: dict) -> dict:
    """What dataset_info.json says of a file with such records."""
    names = {"messages": "conversations",
             **{name: name for name in ("chosen", "rejected", "kto_tag") if name in record}}
    return {"file_name": file, "formatting": "sharegpt", "columns": names,
            **({"ranking": True} if "chosen" in record else {})}


TOOLS = {"trl": trl, "trl-standard": trl_standard, "kto": kto, "llama-factory": llama_factory}
