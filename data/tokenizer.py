"""Text becomes numbers: a byte-level BPE vocabulary trained by ourselves, and the one place that renders dialogues.

    python -m data.tokenizer show FILE.jsonl --from out/reviews/sft       dialogues with their loss mask in colour

Byte-pair encoding (Sennrich 2016): start from the 256 bytes and, again and again, make the most frequent neighbouring
pair a token of its own. Encoding is done by `tiktoken` with the ranks learned here. Six special tokens of MOSS's
dialogue format stand after the ordinary ones; text never produces them, so no user can forge a turn by writing `<eom>`.
"""
from collections.abc import Iterable
from typing import Any

import tiktoken

from data.records import check_dialogue
from runtime.options import UserError

SPECIAL_TOKENS = ("<|Human|>", "<eoh>", "<|MOSS|>", "<eom>", "<|endoftext|>", "<|pad|>")

# Where merges may never reach across. Runs of Chinese characters; words with their leading space; numbers by three
# digits; punctuation; white space. Every character belongs to one class (tiktoken silently drops what does not match),
# and no run is longer than 32 (merging inside a piece takes time quadratic in its length). [^\P{L}\p{Han}] is a letter
# that is not Chinese.
PATTERN = r"\p{Han}{1,32}| ?[^\P{L}\p{Han}]{1,32}|\p{N}{1,3}| ?[^\s\p{L}\p{N}]{1,32}|\s{1,32}"
CHARACTER_PATTERN = r"(?s:.)"


class Tokenizer:
    """text <-> ids, and dialogues -> (ids, loss mask). `ranks` are the ordinary tokens' bytes in order of their ids."""

    def __init__(self, ranks: list[bytes], pattern: str = PATTERN):
        self.ranks, self.pattern = ranks, pattern
        special = {token: len(ranks) + i for i, token in enumerate(SPECIAL_TOKENS)}
        self.human_id, self.eoh_id, self.moss_id, self.eom_id, self.eot_id, self.pad_id = special.values()
        self.special_ids = list(special.values())
        self._encoding = tiktoken.Encoding("mosslet", pat_str=pattern, special_tokens=special,
                                           mergeable_ranks={token: i for i, token in enumerate(ranks)})
        self._characters = {t.decode() for t in ranks} if pattern == CHARACTER_PATTERN else None

    @property
    def n_vocab(self) -> int:
        return len(self.ranks) + len(SPECIAL_TOKENS)

    def encode(self, text: str) -> list[int]:
        """Ordinary tokens only, whatever the text looks like. A lone surrogate, or at character level an unknown
        character, is a UserError."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"not valid Unicode: a lone surrogate {text[error.start]!a} at character {error.start} of "
                            f"{text[:20]!a}; repair the text") from None
        if self._characters is not None and (unknown := set(text) - self._characters):
            raise UserError(f"this character-level vocabulary does not know {sorted(unknown)[:5]}: it knows only the "
                            f"{len(self.ranks)} characters of its training text")
        return self._encoding.encode(text, disallowed_special=())

    def token_bytes(self, token: int) -> bytes:
        """A token's bytes; a special one's name."""
        return self.ranks[token] if token < len(self.ranks) else SPECIAL_TOKENS[token - len(self.ranks)].encode()

    def decode(self, ids: Iterable[int]) -> str:
        """Back to text; bytes that are no whole character become �."""
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", "replace")

    def render_chat(self, messages: list[dict[str, str]], reply: bool = False) -> tuple[list[int], list[bool]]:
        """(ids, loss mask) of a dialogue in MOSS's format:

            system text \\n <|Human|>: … <eoh> \\n <|MOSS|>: … <eom> \\n <|Human|>: …

        Pieces (special tokens, `: `, `\\n`, contents) are encoded by themselves, so no token spans a border. The mask
        is True on what the assistant writes: its content and <eom>. With reply=True the ids end where the next answer
        begins.
        """
        try:
            check_dialogue(messages, reply)
        except ValueError as error:
            raise UserError(str(error)) from None
        ids, mask = [], []
        colon, newline = self.encode(": "), self.encode("\n")

        def add(piece: list[int], learn: bool = False) -> None:
            ids.extend(piece)
            mask.extend([learn] * len(piece))

        for i, message in enumerate(messages):
            if i:
                add(newline)
            content = self.encode(message["content"])
            if message["role"] == "system":
                add(content)
            elif message["role"] == "user":
                add([self.human_id, *colon, *content, self.eoh_id])
            else:
                add([self.moss_id, *colon])
                add([*content, self.eom_id], learn=True)
        if reply:
            add([*newline, self.moss_id, *colon])
        return ids, mask

    def require_same(self, other: "Tokenizer", names: str) -> None:
        """Two networks that read the same ids must mean the same by them; `names` says whose tokenizers these are."""
        if self.to_state() != other.to_state():
            raise UserError(f"{names} were made with different tokenizers, so their token ids mean different things: "
                            "train both from the same pretrained model")

    def to_state(self) -> dict[str, Any]:
        """Plain strings for a checkpoint or JSON file: bytes as latin-1, which is one character a byte."""
        return {"pattern": self.pattern, "ranks": [token.decode("latin-1") for token in self.ranks]}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> "Tokenizer":
        return cls([token.encode("latin-1") for token in state["ranks"]], state["pattern"])
