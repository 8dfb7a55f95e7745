"""Records as a person reads them, with the tokens that are learned or judged in colour.

    look = Look(*tokenizer_at("out/reviews/sft"), colour=True, dots=True)
    look.show(record, "sft")              the record as text

Rows are those of training: `Tokenizer.render_chat` and data/batches.py make them. Where no colour can
be shown, marks stand in its place. Without a vocabulary, bytes stand for tokens.
"""
import dataclasses
import itertools
import os
import pathlib
import sys
from collections.abc import Sequence

from data.batches import Row, prompt_ids, reward_rows
from data.prepared import Prepared
from data.records import as_messages
from data.tokenizer import PATTERN, Tokenizer
from runtime.storage import load_whole
from runtime.terminal import UserError, for_terminal

RESET, DOT = "\033[0m", "\033[2m·"
READ, LEARNED, SHARED = "read", "learned", "shared"  # kinds of tokens
COLOURS = {READ: "\033[90m", LEARNED: "\033[32m", SHARED: "\033[2;32m"}  # grey, green, dark green
MARKS = {READ: ("", ""), LEARNED: ("⟦", "⟧"), SHARED: ("‹", "›")}
NO_LIMIT = 2**60  # tokens of a row


def tokenizer_at(place: pathlib.Path) -> tuple[Tokenizer, str]:
    """(tokenizer, prompt template) of a prepared folder, a run's folder or its checkpoint; UserError
    if it is none of them."""
    if (place / "meta.json").exists():
        data = Prepared.load(place)
        return data.require_tokenizer(), data.template
    path = place if place.suffix == ".pt" else place / "checkpoint.pt"
    if not path.exists():
        raise UserError(f"{place}: neither a prepared folder nor a checkpoint: name one that exists, by "
                        "--from")
    payload = load_whole(path)
    try:
        return (Tokenizer.from_state(payload["tokenizer"]),
                payload["state"].get("template", "{prompt}"))
    except (LookupError, TypeError, AttributeError):
        raise UserError(f"{path}: holds no tokenizer: name a checkpoint that train.py wrote") from None


def can_colour() -> bool:
    """Whether standard output is a terminal whose user did not refuse colours (no-color.org)."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")


def byte_tokenizer() -> Tokenizer:
    """A vocabulary of the 256 bytes, for rows of records without any other."""
    return Tokenizer([bytes([i]) for i in range(256)], PATTERN)


@dataclasses.dataclass
class Look:
    """How records are shown.

    template: around prompts that are texts. colour: else marks. dots: one after each token. most:
    characters of a stretch of one kind; the middle of a longer one is left out.
    """

    tokenizer: Tokenizer
    template: str = "{prompt}"
    colour: bool = True
    dots: bool = False
    most: int = 600

    def legend(self) -> str:
        """What the kinds look like."""
        words = {LEARNED: "learned or judged", SHARED: "the same in both replies",
                 READ: "only read"}
        return ", ".join(self._painted(word, kind) for kind, word in words.items())

    def rows(self, record: dict, stage: str) -> dict[str, Row]:
        """The rows that a stage (pretrain, sft, reward, ppo) reads of a record, by name: of a pair two.
        """
        tokenizer = self.tokenizer
        if stage == "pretrain":
            ids = tokenizer.encode(record["text"])
            return {"text": ([tokenizer.eot_id, *ids], [False, *[True] * len(ids)])}
        if stage == "sft":
            return {"reply": tokenizer.render_chat(as_messages(record, self.template))}
        if stage == "ppo":
            ids = prompt_ids(tokenizer, record["prompt"], self.template)
            return {"prompt": (ids, [False] * len(ids))}
        fields = ("chosen", "rejected") if "chosen" in record else ("response",)
        return {field: reward_rows([record], tokenizer, self.template, NO_LIMIT, field=field)[0]
                for field in fields}

    def lengths(self, record: dict, stage: str) -> dict[str, int]:
        """Tokens of a record's parts, by name: prompt, last reply with its <eom>, and the whole row."""
        rows = self.rows(record, stage)
        if stage in ("pretrain", "ppo"):
            return {name: len(ids) for name, (ids, _) in rows.items()}
        replies = {name: last_reply(row) for name, row in rows.items()}
        longest = max(len(ids) for ids, _ in rows.values())
        return {"prompt": longest - max(replies.values()), **replies, "row": longest}

    def show(self, record: dict, stage: str) -> str:
        """A record of a stage as text of one or several lines: a reply that people judged stands below
        its prompt, after what they said of it."""
        rows = self.rows(record, stage)
        if stage != "reward":
            (ids, mask), = rows.values()
            shown = self._tokens(ids, [LEARNED if flag else READ for flag in mask])
            return "\n".join(filter(None, (shown, self._size(ids, sum(mask)))))
        replies = [ids[-last_reply((ids, mask)):] for ids, mask in rows.values()]
        same = self._shared(*replies) if len(replies) == 2 else 0
        names = ["as good", "as good"] if record.get("tie") else [verdict(record), "rejected"]
        (ids, _), *_ = rows.values()
        prompt = ids[:len(ids) - len(replies[0])]
        lines = [self._tokens(prompt, [READ] * len(prompt))]
        for name, reply in zip(names, replies, strict=False):
            kinds = [SHARED] * same + [LEARNED] * (len(reply) - same)
            size = self._size(prompt + reply, len(reply), "judged")
            lines.append(f"{name}: {self._tokens(reply, kinds)}{size}")
        return "\n".join(lines)

    def _shared(self, first: Sequence[int], second: Sequence[int]) -> int:
        """How many tokens two replies begin with alike, up to the end of a whole character."""
        same = sum(1 for _ in itertools.takewhile(lambda two: two[0] == two[1],
                                                  zip(first, second, strict=False)))
        while same and "�" in self.tokenizer.decode(first[:same])[-1:]:
            same -= 1
        return same

    def _size(self, ids: Sequence[int], n: int, what: str = "learned") -> str:
        """The row's length, and how many tokens of it are learned, where tokens are real ones."""
        return f"   {len(ids)} tokens, {n} {what}" if self.dots else ""

    def _tokens(self, ids: Sequence[int], kinds: Sequence[str]) -> str:
        """Tokens as text, stretch by stretch of one kind."""
        shown, at = "", 0
        for kind, stretch in itertools.groupby(kinds):
            n = len(list(stretch))
            pieces = shortened(characters(self.tokenizer, ids[at:at + n]), self.most)
            at += n
            dot = f"{DOT}{RESET}{COLOURS[kind]}" if self.colour else "·"
            text = (dot * self.dots).join(for_terminal(piece) for piece in pieces)
            shown += self._painted(text + dot * self.dots, kind)
        return shown

    def _painted(self, text: str, kind: str) -> str:
        if self.colour:
            return f"{COLOURS[kind]}{text}{RESET}"
        return text.join(MARKS[kind])


def last_reply(row: Row) -> int:
    """Tokens of the reply at the end of a row."""
    return sum(1 for _ in itertools.takewhile(bool, reversed(row[1])))


def verdict(record: dict) -> str:
    """What people said of a reply, in words: its rating, its label, or that it was chosen."""
    if "score" in record:
        each = [f"{score:g}" for score in record.get("scores", ())]
        return f"rated {record['score']:g}" + f" ({', '.join(each[:8])}{', …' * (len(each) > 8)})" * bool(each)
    if "label" in record:
        return "liked" if record["label"] else "not liked"
    return "chosen" + (f" by {record['margin']:g}" if "margin" in record else "")


def characters(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """The tokens' texts; those that share a character stand together."""
    found, pending = [], b""
    for token in ids:
        pending += tokenizer.token_bytes(token)
        try:
            found.append(pending.decode())
            pending = b""
        except UnicodeDecodeError:
            continue
    return found + [pending.decode(errors="replace")] * bool(pending)


def shortened(pieces: list[str], most: int) -> list[str]:
    """The pieces, or of more than `most` characters the first two thirds and the last third of so
    many, with the number of those that are left out.

    >>> "".join(shortened(list("abcdefghijkl"), 6))
    'abcd […6 characters…] kl'
    """
    ends = list(itertools.accumulate(map(len, pieces)))
    if not ends or ends[-1] <= most:
        return pieces
    head = sum(end <= most * 2 // 3 for end in ends)
    tail = sum(ends[-1] - end <= most // 3 for end in ends[:-1])
    left_out = sum(map(len, pieces[head:len(pieces) - tail]))
    return [*pieces[:head], f" […{left_out:,} characters…] ", *pieces[len(pieces) - tail:]]
