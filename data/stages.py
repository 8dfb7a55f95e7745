"""Texts with people's feedback become the records of all stages: feedback, dialogues and prompts.
"""
from collections.abc import Iterable
from typing import Any, NamedTuple

from data.dataset import SPLITS, DataWriter
from data.hashing import text_hash
from data.openings import cut_opening

Records = dict[tuple[str, str], list[dict]]  # (stage, split) -> records


class Placed(NamedTuple):
    """A text with people's feedback, and where it belongs."""

    text: str
    feedback: dict[str, Any]  # such as {"label": 1}
    split: str
    half: str  # whose feedback it is if it is in the train split: reward or judge


def half_of(group: str) -> str:
    """Whose feedback a group of texts is, by a hash: the reward model's, or the judges'."""
    return "reward" if text_hash("half " + group) % 2 else "judge"


def no_records() -> Records:
    """Where each stage's records will be."""
    return {(stage, split): [] for stage in ("sft", "reward", "ppo") for split in SPLITS} | {
        ("judge", "train"): []}


def records_of(out: DataWriter, texts: Iterable[Placed], reply_len: int) -> Records:
    """Feedback, dialogues and prompts. A text whose continuation has more than `reply_len` tokens is
    no dialogue, since no reply could be so long; one that cannot be cut has feedback only."""
    records = no_records()
    for text, feedback, split, half in texts:
        opening, continuation = cut_opening(text)
        record = {"prompt": opening, "response": continuation}
        records[half if split == "train" else "reward", split].append(record | feedback)
        if opening:
            records["ppo", split].append({"prompt": opening})
            if len(out.tokenizer.reply_ids(continuation)) <= reply_len:
                records["sft", split].append(record)
    return records


def write_stages(out: DataWriter, records: Records) -> None:
    """Write the records, in an order that follows from their texts: raw files hold one label, then
    the other. Openings that training has too leave PPO's held-out ones: short ones repeat a lot."""
    seen = {r["prompt"] for r in records["ppo", "train"]}
    for split in SPLITS[1:]:
        held_out = dict.fromkeys(r["prompt"] for r in records["ppo", split])
        records["ppo", split] = [{"prompt": p} for p in held_out if p not in seen]
    for (stage, split), of_stage in records.items():
        of_stage.sort(key=lambda r: text_hash("order " + r["prompt"] + r.get("response", "")))
        out.records(stage, split, of_stage)
