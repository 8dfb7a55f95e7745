"""Text to token ids and back, and the only place that renders dialogues.

Vocabularies are byte-level BPE (data/bpe.py learns their merges), or the characters of one text; `tiktoken`
encodes. The six special tokens of MOSS's dialogue format have the ids after the ordinary tokens.
Text is never encoded to them, so no user can forge a turn by writing `<eom>`.

`python -m tools.show FILE.jsonl` prints dialogues with their loss mask.
"""
import sys
from collections.abc import Iterable
from typing import Any

import tiktoken

from data.bpe import learn_tokens
from data.records import check_dialogue
from runtime.options import UserError

SPECIAL_TOKENS = ("<|Human|>", "<eoh>", "<|MOSS|>", "<eom>", "<|endoftext|>", "<|pad|>")

# Pieces of text that merges never cross: runs of Chinese characters; words with the space before
# them; up to three digits; punctuation; white space. Each character belongs to one class, because
# tiktoken drops what does not match. Pieces are at most 33 characters long, because merging inside
# a piece takes quadratic time. [^\P{L}\p{Han}] is a letter that is not Chinese.
PATTERN = (r"\p{Han}{1,32}| ?[^\P{L}\p{Han}]{1,32}|\p{N}{1,3}| ?[^\s\p{L}\p{N}]{1,32}|\s{1,32}")
CHARACTER_PATTERN = r"(?s:.)"


class Tokenizer:
    """Encodes, decodes, and renders dialogues.

    ranks: the ordinary tokens' bytes; a token's id is its index. pattern: the regular expression of
    pieces that are encoded on their own.
    """

    def __init__(self, ranks: list[bytes], pattern: str = PATTERN):
        self.ranks, self.pattern = ranks, pattern
        special = {token: len(ranks) + i for i, token in enumerate(SPECIAL_TOKENS)}
        self.human_id, self.eoh_id, self.moss_id, self.eom_id, self.eot_id, self.pad_id = (
            special.values())
        self.special_ids = list(special.values())
        self._encoding = tiktoken.Encoding(
            "mosslet", pat_str=pattern, special_tokens=special,
            mergeable_ranks={token: i for i, token in enumerate(ranks)})
        self._characters = ({token.decode() for token in ranks} if pattern == CHARACTER_PATTERN
                            else None)

    @property
    def n_vocab(self) -> int:
        """Number of tokens, special ones included."""
        return len(self.ranks) + len(SPECIAL_TOKENS)

    def encode(self, text: str) -> list[int]:
        """Ids of ordinary tokens, whatever the text looks like. UserError for a lone surrogate or,
        with a vocabulary of characters, for an unknown one."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"not valid Unicode: a lone surrogate {text[error.start]!a} at "
                            f"character {error.start} of {text[:20]!a}; repair the text") from None
        if self._characters is not None and (unknown := set(text) - self._characters):
            raise UserError(f"this character-level vocabulary does not know "
                            f"{sorted(unknown)[:5]}: it knows only the {len(self.ranks)} "
                            "characters of its training text")
        return self._encoding.encode(text, disallowed_special=())

    def token_bytes(self, token: int) -> bytes:
        """The bytes of a token; for a special one, its name."""
        if token < len(self.ranks):
            return self.ranks[token]
        return SPECIAL_TOKENS[token - len(self.ranks)].encode()

    def decode(self, ids: Iterable[int]) -> str:
        """The text of these ids; bytes that are no complete character become �."""
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", "replace")

    def reply_text(self, ids: Iterable[int]) -> str:
        """The text of a reply. Control tokens, the end among them, are no text: whoever reads
        texts (a judge, a reward in Python, a person) sees none of them, whoever reads ids all."""
        return self.decode(i for i in ids if i < len(self.ranks))

    def render_chat(self, messages: list[dict[str, str]],
                    reply: bool = False) -> tuple[list[int], list[bool]]:
        """(ids, loss mask) of a dialogue in MOSS's format:

            system text \\n <|Human|>: … <eoh> \\n <|MOSS|>: … <eom> \\n <|Human|>: …

        Special tokens, `: `, `\\n` and contents are encoded one by one, so no token spans a border
        between them. The mask is True on content and <eom> of the assistant. With reply=True the
        ids end where the assistant's next content begins. UserError if the roles do not alternate.
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
        """UserError if the other tokenizer gives ids another meaning; `names` says whose they are,
        such as "the policy and the reward model"."""
        if self.to_state() != other.to_state():
            raise UserError(f"{names} were made with different tokenizers, so their token ids mean "
                            "different things: train both from the same pretrained model")

    def to_state(self) -> dict[str, Any]:
        """Strings for a checkpoint or JSON; bytes as latin-1, which has one character a byte."""
        return {"pattern": self.pattern, "ranks": [token.decode("latin-1") for token in self.ranks]}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> "Tokenizer":
        """The tokenizer that `to_state` described."""
        return cls([token.encode("latin-1") for token in state["ranks"]], state["pattern"])


# ---- vocabularies --------------------------------------------------------------------------------

def train_bpe(texts: Iterable[str], vocab_size: int, progress: bool = False) -> Tokenizer:
    """Learn a vocabulary of vocab_size tokens: 256 bytes, merges, and the six special tokens.

    Too little text gives a smaller vocabulary, and says so. UserError if vocab_size leaves no room for
    the bytes.
    """
    if vocab_size < 256 + len(SPECIAL_TOKENS):
        raise UserError(f"vocab_size {vocab_size} is too small: the bytes and our special tokens "
                        f"alone are {256 + len(SPECIAL_TOKENS)}")
    ranks = learn_tokens(texts, vocab_size - len(SPECIAL_TOKENS), PATTERN, progress)
    tokenizer = Tokenizer(ranks)
    if tokenizer.n_vocab < vocab_size:
        print(f"vocabulary: the text has patterns for {tokenizer.n_vocab} tokens only, not "
              f"{vocab_size}", file=sys.stderr)
    return tokenizer


def train_chars(text: str) -> Tokenizer:
    """A vocabulary of the text's characters, in code-point order, and the special tokens."""
    return Tokenizer([c.encode() for c in sorted(set(text))], CHARACTER_PATTERN)
