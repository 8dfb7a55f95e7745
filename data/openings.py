"""Texts without a prompt, cut into opening words and a continuation: how a plain text becomes a task,
and texts with feedback the records of all stages.
"""
import re
import unicodedata
from collections.abc import Iterable
from typing import Any, NamedTuple

from data.dataset import SPLITS, DataWriter, text_hash

# Scripts that put no spaces between words: Thai, Lao, Burmese, Khmer, kana, Han.
UNSPACED = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf"
                      "\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")
WORDS, CHARACTERS = (2, 8), (2, 12)  # of an opening
JOINER = "\u200d"  # makes one picture of the two beside it
EXTENDS = re.compile("[\u200c\u200d\u1160-\u11ff\U0001f3fb-\U0001f3ff\U000e0020-\U000e007f]")
FLAG = re.compile("[\U0001f1e6-\U0001f1ff]")  # two of them are a flag


def cut_opening(text: str) -> tuple[str, str]:
    """(opening, continuation) of a text; together they are the text. ("", text) if it is too short.

    The opening has 2 to 8 words (2 to 12 characters of a script without spaces), a number that
    follows from the text, but at most a third of it. The continuation keeps the space that it begins
    with. The cut is never inside a word or inside what is read as one character.

    >>> cut_opening("One two three four five six.")
    ('One two', ' three four five six.')
    """
    letters = sum(map(str.isalpha, text))
    unspaced = 2 * len(UNSPACED.findall(text)) > letters
    shortest, longest = CHARACTERS if unspaced else WORDS
    borders = [i for i in range(1, len(text))
               if text[i].isspace() and not text[i - 1].isspace() and text[i:].strip()
               or unspaced and ends_character(text, i)] if letters else []
    n = shortest + text_hash("opening " + text) % (longest - shortest + 1)
    n = min(n, (len(borders) + 1) // 3)
    return (text[:borders[n - 1]], text[borders[n - 1]:]) if n >= shortest else ("", text)


def ends_character(text: str, i: int) -> bool:
    """Whether text[:i] ends with a complete character, no space, and not inside a word of a script
    that has spaces."""
    before, after = text[i - 1], text[i]
    if before.isspace() or before == JOINER or EXTENDS.match(after):
        return False
    if unicodedata.category(after)[0] == "M":  # an accent, a vowel sign
        return False
    if FLAG.match(before) and FLAG.match(after):
        run = len(re.search(f"{FLAG.pattern}+$", text[:i])[0])
        return run % 2 == 0
    both = before.isalnum() and after.isalnum()
    return not (both and not UNSPACED.match(before) and not UNSPACED.match(after))


# ---- records of all stages -----------------------------------------------------------------------

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
            if len(out.tokenizer.encode(continuation)) < reply_len:  # one more is its end
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
