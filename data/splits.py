"""Which split a record of the user's own belongs to, and what must leave training because it is held
out.

One key for all stages and forms: the first user message, or the text. Records with one key are in
one split, whether they stand in sft.jsonl, reward.jsonl, ppo.jsonl or pretrain.jsonl, as messages, as
prompt and response, or as a transcript that goes on for several turns.
"""
import collections
import itertools
import re
import unicodedata
from collections.abc import Collection, Iterable, Iterator, Mapping

import numpy as np

from data.dialogues import transcript
from data.hashing import text_hash
from data.records import prompt_text

ONE_IN = 20  # keys: one of so many is for validation, one for test
GAP = 64  # characters that may stand between a prompt and its reply, such as "\n\nAssistant: "
MARK = re.compile(r"""[:>\])}|#*=\-"'] ?""")  # how these end
SPACE = re.compile(" ")
LONG = 16  # characters of prompt and reply together that nobody writes by chance
# Soft hyphen, byte order mark, and characters of width 0, such as web pages leave in what is copied.
INVISIBLE = re.compile("[\xad\u061c\u180e\u200b-\u200f\u202a-\u202e\u2060-\u206f\ufeff]")
START = 12  # characters of a prompt by which it is looked up


# ---- keys ----------------------------------------------------------------------------------------

def normalised(text: str) -> str:
    """Equal for texts that differ in white space, case, Unicode form or invisible characters only.
    """
    return " ".join(INVISIBLE.sub("", unicodedata.normalize("NFKC", text)).casefold().split())


def dialogue(prompt: str | list[dict[str, str]]) -> list[dict[str, str]]:
    """A prompt or text as messages; a text may be a transcript, `Human: …\\n\\nAssistant: …`."""
    if isinstance(prompt, list):
        return prompt
    messages = [message for message in transcript(prompt) if message["content"]]
    heard = any(message["role"] == "user" for message in messages)
    return messages if heard else [{"role": "user", "content": prompt}]


def messages_of(record: dict, stage: str) -> list[dict[str, str]]:
    """What a record of this stage says, up to the reply if that is a field of its own."""
    if stage == "sft" and "messages" in record:
        return record["messages"]
    return dialogue(record["text"] if stage == "pretrain" else record["prompt"])


def split_key(record: dict, stage: str) -> int:
    """A 64-bit number that follows from the record's first user message, or from its text. Of feedback on
    texts too short to have opening words, whose prompt is empty, it is that of the reply."""
    said = next(m["content"] for m in messages_of(record, stage) if m["role"] == "user")
    return text_hash("split " + (normalised(said) or normalised(record.get("chosen", record.get("response", "")))))


def prompt_key(prompt: str | list[dict[str, str]]) -> str:
    """Equal for equal prompts, whether they are texts or messages."""
    return normalised(prompt_text(prompt))


# ---- splits --------------------------------------------------------------------------------------

def assign(groups: Mapping[str, Collection[int]], wanted: Mapping[str, set[str]],
           fixed: Mapping[int, str]) -> dict[int, str]:
    """The split of every key that is held out; the others are trained on.

    groups: keys, by what needs some of them in each split, such as a stage. wanted: the
    splits that a group has no file for, by its name. fixed: what the user holds out already.

    Keys are cut by the rank of their hash: the lowest twentieth of a group is for test, the highest
    for validation, at least one key each (of fewer than three keys none). Hashes are spread evenly,
    so groups agree on nearly all keys that they share; for the rest, a key is held out for all
    groups if it is for one.
    """
    splits = dict(fixed)
    for name, of_group in groups.items():
        keys = np.unique(np.fromiter(of_group, np.uint64, len(of_group)))
        ranked = keys[~np.isin(keys, np.fromiter(fixed, np.uint64, len(fixed)))]
        for split, order in (("test", ranked), ("val", ranked[::-1])):
            if split in wanted[name] and len(ranked) > 2:
                held = np.array([key for key, s in fixed.items() if s == split], np.uint64)
                n = max(1, len(keys) // ONE_IN) - int(np.isin(held, keys).sum())
                for key in order[:max(0, n)].tolist():
                    splits.setdefault(key, split)
    return splits


# ---- what pretraining must not read --------------------------------------------------------------

def replies_in(record: dict, stage: str) -> Iterator[tuple[str, str]]:
    """(user message, reply) of an sft or reward record: the first and the last of its dialogue."""
    fields = () if "messages" in record else ("response",)
    if stage == "reward":
        fields = ("chosen", "rejected") if "chosen" in record else ("response",)
    for reply in [record[field] for field in fields] or [None]:
        messages = messages_of(record, stage)
        if reply is not None:
            messages = [*messages, {"role": "assistant", "content": reply}]
        pairs = [(a["content"], b["content"]) for a, b in itertools.pairwise(messages)
                 if (a["role"], b["role"]) == ("user", "assistant")]
        yield from pairs[:1]
        yield from pairs[-1:]


class HeldOutReplies:
    """Finds texts in which a held-out prompt is followed by its reply, in whatever format."""

    def __init__(self, pairs: Iterable[tuple[str, str]]):
        replies: dict[str, set[str]] = collections.defaultdict(set)  # by prompt
        self.lengths: dict[str, set[int]] = collections.defaultdict(set)  # of prompts, by their start
        for prompt, reply in pairs:
            prompt, reply = normalised(prompt), normalised(reply)
            if prompt and reply:
                replies[prompt].add(reply)
                self.lengths[prompt[:START]].add(len(prompt))
        self.replies = {prompt: tuple(of_prompt) for prompt, of_prompt in replies.items()}
        self.starts = sorted({len(start) for start in self.lengths})

    def are_in(self, text: str) -> bool:
        """Whether the text holds one of the prompts with one of its replies."""
        text = normalised(text) if self.replies else ""
        for match in re.finditer(r"(?<![a-z0-9])\S", text):  # prompts do not begin inside a word
            begin = match.start()
            for length in self.starts:
                for n in self.lengths.get(text[begin:begin + length], ()):
                    replies = self.replies.get(text[begin:begin + n])
                    if replies and follows(text, begin, begin + n, replies):
                        return True
        return False


def follows(text: str, begin: int, end: int, replies: tuple[str, ...]) -> bool:
    """Whether a reply stands behind the prompt text[begin:end]: at once, after a mark such as
    `assistant: `, or, if the reply is long, after any few words (ChatML: `<|im_start|>assistant`). If
    the two are short they must be no part of a longer phrase."""
    places = [(end + text.startswith(" ", end), 0)]  # and the least length of a reply there
    if is_border(text, end):
        places += [(mark.end(), 0) for mark in MARK.finditer(text, end, end + GAP)]
        places += [(space.end(), LONG) for space in SPACE.finditer(text, end, end + GAP)]
    for at, least in places:
        if not text.startswith(replies, at):  # fast, and nearly always so
            continue
        for reply in replies:
            last = at + len(reply)
            apart = not (text[max(0, begin - 1):begin].isalnum() or text[last:last + 1].isalnum())
            if (len(reply) >= least and text.startswith(reply, at) and is_border(text, last)
                    and (end - begin + len(reply) >= LONG or apart)):
                return True
    return False


def is_border(text: str, i: int) -> bool:
    """Whether no Latin word or number goes on from text[i - 1] to text[i]."""
    return not re.fullmatch("[a-z0-9]{2}", text[max(0, i - 1):i + 1])
