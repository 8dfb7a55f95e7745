"""Text to token ids and back, and the only place that encodes dialogues.

Vocabularies are byte-level BPE (data/bpe.py learns their merges), or the characters of one text; `tiktoken`
encodes. In ours the six special tokens of MOSS's dialogue format have the ids after the ordinary tokens; those
that convert/tokenizers.py reads have their tokens anywhere. Text is never encoded to special tokens, so no user
can forge a turn by writing `<eom>`.

`python -m tools.show FILE.jsonl` prints dialogues with their loss mask.
"""
import dataclasses
import itertools
import re
import sys
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any

import tiktoken

from data.bpe import learn_tokens
from data.chat import Piece, chat_format, to_state
from data.pieces import SentencePieces
from data.records import check_dialogue
from runtime.options import UserError

SPECIAL_TOKENS = ("<|Human|>", "<eoh>", "<|MOSS|>", "<eom>", "<|endoftext|>", "<|pad|>")

# Pieces of text that merges never cross: runs of Chinese characters; words with the space before
# them; up to three digits; punctuation; white space. Each character belongs to one class, because
# tiktoken drops what does not match. Pieces are at most 33 characters long, because merging inside
# a piece takes quadratic time. [^\P{L}\p{Han}] is a letter that is not Chinese.
PATTERN = (r"\p{Han}{1,32}| ?[^\P{L}\p{Han}]{1,32}|\p{N}{1,3}| ?[^\s\p{L}\p{N}]{1,32}|\s{1,32}")
CHARACTER_PATTERN = r"(?s:.)"


@dataclasses.dataclass
class Vocabulary:
    """What a vocabulary has beside its ordinary tokens: ids in any place, and what they are for."""

    ids: Sequence[int]  # of the ordinary tokens
    rows: int  # of the model's embedding
    special: dict[str, int]  # control tokens: no text is encoded to them
    end_ids: Sequence[int]  # the tokens that end a reply, the usual one first
    eot_id: int  # stands before a document
    pad_id: int
    chat: dict[str, str]  # the chat format's name and settings (data/chat.py)
    nfc: bool = False  # is text brought to Unicode's form NFC before it is encoded?
    # Added tokens that are text, such as `<think>`. Those of white space alone are encoded, too: a run
    # of spaces forges nothing.
    text: dict[str, int] = dataclasses.field(default_factory=dict)
    # Tokens that no merge leads to, bytes as latin-1: they are decoded only.
    unmerged: dict[str, int] = dataclasses.field(default_factory=dict)
    sentencepiece: str = ""  # SentencePiece's model file, bytes as latin-1, which encodes instead of tiktoken

    @classmethod
    def own(cls, n: int) -> "Vocabulary":
        """Ours: n ordinary tokens, then the special ones."""
        special = {token: n + i for i, token in enumerate(SPECIAL_TOKENS)}
        return cls(range(n), n + len(special), special, [special["<eom>"]], special["<|endoftext|>"],
                   special["<|pad|>"], {"name": "mosslet"})

    def check(self, n: int) -> None:
        """UserError unless n ordinary tokens and all others have rows of their own."""
        ids = [*self.ids, *self.special.values(), *self.text.values(), *self.unmerged.values()]
        if len(self.ids) != n or len(set(ids)) != len(ids):
            raise UserError(f"tokenizer: {n} ordinary tokens and {len(ids) - len(self.ids)} others share ids "
                            f"({len(set(ids))} different ones): fetch its files again")
        used = [*ids, *self.end_ids, self.eot_id, self.pad_id]
        if min(used) < 0 or max(used) >= self.rows:
            raise UserError(f"tokenizer: a token has id {max(used)}, but the model's embedding has {self.rows} rows: "
                            "take the tokenizer that came with these weights")


class Tokenizer:
    """Encodes, decodes, and renders dialogues.

    ranks: the ordinary tokens' bytes in the order of their merges. pattern: the regular expression of
    pieces that are encoded on their own. vocabulary: ids and special tokens of another project's; without
    it a token's id is its rank, and ours follow.

    n_vocab counts the rows of the model's embedding. special_ids are all that are never text: control
    tokens, and empty_ids, rows without a token. end_ids are the tokens that end a reply; eom_id, the
    first, is the one that we write.
    """

    def __init__(self, ranks: list[bytes], pattern: str = PATTERN, vocabulary: Vocabulary | None = None):
        self.ranks, self.pattern, self.is_own = ranks, pattern, vocabulary is None
        self.vocabulary = v = vocabulary or Vocabulary.own(len(ranks))
        v.check(len(ranks))
        self.chat = chat_format(**v.chat)
        self.special, self.n_vocab = v.special | v.text, v.rows
        if missing := [name for name in (*self.chat.tokens, self.chat.bos, self.chat.end, *(
                       ("<think>", "</think>") if self.chat.think else ())) if name and name not in self.special]:
            raise UserError(f"chat format {self.chat.name}: this vocabulary has no {', '.join(missing)}: choose "
                            "another by `python -m convert import … --chat_format`")
        self.end_ids, self.eot_id, self.pad_id = tuple(v.end_ids), v.eot_id, v.pad_id
        self.eom_id = self.end_ids[0]
        self._bytes = dict(zip(v.ids, ranks, strict=True))
        self._bytes |= {i: name.encode() for name, i in self.special.items()}
        self._bytes |= {i: name.encode("latin-1") for name, i in v.unmerged.items()}
        self.empty_ids = [i for i in range(v.rows) if i not in self._bytes]
        self._control = {*v.special.values(), *self.empty_ids, *self.end_ids}
        self.special_ids = sorted(self._control)
        self._characters = {token.decode() for token in ranks} if pattern == CHARACTER_PATTERN else None
        self._prepare_encoding()

    def _prepare_encoding(self) -> None:
        """tiktoken panics at a byte without a token, with an error that `except Exception` lets through, so
        such a byte gets a rank after all others, by which `encode` knows it."""
        ranks = {token: i for i, token in enumerate(self.ranks)}
        self._warned, self._short = False, dict[str, list[int]]()
        self._spaces = self._id_of_rank = None
        if self.vocabulary.sentencepiece:
            self._encoding, self._without_token = SentencePieces(self.vocabulary.sentencepiece.encode("latin-1")), []
            return
        missing = [bytes([i]) for i in range(256) if bytes([i]) not in ranks]
        self._without_token = missing if self._characters is None else []
        ranks |= {byte: len(self.ranks) + i for i, byte in enumerate(self._without_token)}
        self._encoding = tiktoken.Encoding("mosslet", pat_str=self.pattern, special_tokens={},
                                           mergeable_ranks=ranks)
        spaces = sorted((name for name in self.vocabulary.text if name.isspace()), key=len, reverse=True)
        self._spaces = re.compile("(" + "|".join(map(re.escape, spaces)) + ")") if spaces else None
        in_order = self.vocabulary.ids == range(len(self.ranks)) and not self._without_token
        self._id_of_rank = None if in_order else self.vocabulary.ids

    def encode(self, text: str) -> list[int]:
        """Ids of ordinary tokens, whatever the text looks like: a special token's name in a text stays
        text, unlike in Hugging Face's tokenizers, or a user could write a turn of the assistant. UserError
        for a lone surrogate or, with a vocabulary of characters, for an unknown one."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"not valid Unicode: a lone surrogate {text[error.start]!a} at "
                            f"character {error.start} of {text[:20]!a}; repair the text") from None
        if self._characters is not None and (unknown := set(text) - self._characters):
            raise UserError(f"this character-level vocabulary does not know "
                            f"{sorted(unknown)[:5]}: it knows only the {len(self.ranks)} "
                            "characters of its training text")
        if self.vocabulary.nfc:
            text = unicodedata.normalize("NFC", text)
        if self._spaces is None:
            return self._ordinary(text)
        return [i for part in self._spaces.split(text) if part for i in (
            [self.vocabulary.text[part]] if part in self.vocabulary.text and part.isspace() else self._ordinary(part))]

    def _ordinary(self, text: str) -> list[int]:
        """Ids of merged tokens."""
        try:
            ranks = self._encoding.encode(text, disallowed_special=())
        except ValueError:
            raise UserError(too_long(text)) from None
        if self._id_of_rank is None:
            return ranks
        if self._without_token and max(ranks, default=0) >= len(self.ranks):
            ranks = self._without_missing(text)
        return [self._id_of_rank[rank] for rank in ranks]

    def _without_missing(self, text: str) -> list[int]:
        """Ranks of a text whose bytes without a token are dropped after it is cut into pieces, as Hugging
        Face's tokenizers do: what stood around one may then merge. The first time a line says so."""
        import regex  # comes with tiktoken, which keeps its pieces to itself

        if not self._warned:
            self._warned = True
            print(f"warning: this vocabulary has no token for {len(self._without_token)} of the 256 bytes; they are "
                  f"left out of texts, the first time of {text[:20]!a}", file=sys.stderr)
        missing = b"".join(self._without_token)
        pieces = [piece.encode().translate(None, missing) for piece in regex.findall(self.pattern, text)]
        return [rank for piece in pieces if piece for rank in self._encoding._encode_single_piece(piece)]

    def token_bytes(self, token: int) -> bytes:
        """The bytes of a token; for a special one, its name."""
        return self._bytes[token] if token in self._bytes else f"<row {token}>".encode()

    def reply_bytes(self, token: int, first: bool = False) -> bytes:
        """What a reader of a reply sees of one token. first: the reply's first."""
        seen = b"" if token in self._control else self.token_bytes(token)
        return seen.removeprefix(b" ") if first and self.chat.leading_space else seen

    def decode(self, ids: Iterable[int]) -> str:
        """The text of these ids; bytes that are no complete character become �."""
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", "replace")

    def reply_ids(self, text: str) -> list[int]:
        """The ids of a reply as it follows a prompt, with its end."""
        return self._encode_pieces(self.chat.answer(text))[0]

    def reply_text(self, ids: Iterable[int]) -> str:
        """The text of a reply. Control tokens, the end among them, are no text: whoever reads
        texts (a judge, a reward in Python, a person) sees none of them, whoever reads ids all."""
        text = self.decode(i for i in ids if i not in self._control)
        return text.removeprefix(" ") if self.chat.leading_space else text

    def render_chat(self, messages: list[dict[str, str]],
                    reply: bool = False) -> tuple[list[int], list[bool]]:
        """(ids, loss mask) of a dialogue in the checkpoint's chat format; ours is MOSS's:

            system text \\n <|Human|>: … <eoh> \\n <|MOSS|>: … <eom> \\n <|Human|>: …

        In ours special tokens, `: `, `\\n` and contents are encoded one by one, so no token spans a border
        between them; in all others the whole text between two special tokens is. The mask is True on
        content and end of the assistant. With reply=True the ids end where the assistant's next content
        begins. UserError if the roles do not alternate.
        """
        try:
            check_dialogue(messages, reply)
        except ValueError as error:
            raise UserError(str(error)) from None
        return self._encode_pieces(self.chat.pieces(messages, reply))

    def _encode_pieces(self, pieces: Iterable[Piece]) -> tuple[list[int], list[bool]]:
        """(ids, loss mask) of a dialogue's pieces."""
        ids, mask = [], []
        for special, group in itertools.groupby(pieces, key=lambda piece: piece.special or not self.chat.whole):
            together = list(group)
            if not special:
                new = self.encode("".join(piece.text for piece in together))
                ids += new
                mask += self._learned(together, new)
                continue
            for piece in together:
                new = [self.special[piece.text]] if piece.special else self._encode_short(piece.text)
                ids += new
                mask += [piece.learn] * len(new)
        return ids, mask

    def _encode_short(self, text: str) -> list[int]:
        """`encode`, remembering what stands in every dialogue, `: ` and newlines."""
        if (ids := self._short.get(text)) is None:
            ids = self.encode(text)
            if len(text) <= 2 and len(self._short) < 100:
                self._short[text] = ids
        return ids

    def _learned(self, pieces: list[Piece], ids: list[int]) -> list[bool]:
        """Which tokens of the pieces' joined text are learned: those that begin in a piece that is."""
        if len({piece.learn for piece in pieces}) == 1:
            return [pieces[0].learn] * len(ids)
        flags, text, length = [], "", 0
        for piece in pieces:
            text += piece.text  # from the beginning: NFC may join a piece's first character to the one before
            flags += [piece.learn] * (self._length(text) - len(flags))
        learned = []
        for i in ids:
            learned.append(flags[min(length, len(flags) - 1)])
            length += len(self._bytes[i])
        return learned

    def _length(self, text: str) -> int:
        """Number of bytes of a text that are encoded."""
        encoded = (unicodedata.normalize("NFC", text) if self.vocabulary.nfc else text).encode()
        return len(encoded) - sum(map(encoded.count, self._without_token))

    def with_chat(self, name: str, **settings: str) -> "Tokenizer":
        """The same vocabulary with another chat format (data/chat.py); its reply's end comes first among
        end_ids. UserError if it needs tokens that are not there."""
        v, end = self.vocabulary, chat_format(name, **settings).tokens[-1:]
        ends = [v.special[token] for token in end if token in v.special]
        if not end:  # the format names no end of its own
            settings.setdefault("end", next(token for token, i in v.special.items() if i == self.eom_id))
        return Tokenizer(self.ranks, self.pattern, dataclasses.replace(
            v, chat={"name": name, **settings}, end_ids=[*ends, *(i for i in v.end_ids if i not in ends)]))

    def require_same(self, other: "Tokenizer", names: str) -> None:
        """UserError if the other tokenizer gives ids another meaning; `names` says whose they are,
        such as "the policy and the reward model"."""
        if self.to_state() != other.to_state():
            raise UserError(f"{names} were made with different tokenizers, so their token ids mean "
                            "different things: train both from the same pretrained model")

    def to_state(self) -> dict[str, Any]:
        """Strings, numbers, lists and dicts for a checkpoint or JSON; bytes as latin-1, which has one
        character a byte. Our own vocabularies are two fields."""
        state = {"pattern": self.pattern, "ranks": [token.decode("latin-1") for token in self.ranks]}
        if not self.is_own:
            v = self.vocabulary
            state["vocabulary"] = {**dataclasses.asdict(v), "ids": list(v.ids), "end_ids": list(v.end_ids),
                                   "chat": to_state(self.chat)}
        return state

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> "Tokenizer":
        """The tokenizer that `to_state` described."""
        vocabulary = Vocabulary(**state["vocabulary"]) if "vocabulary" in state else None
        return cls([token.encode("latin-1") for token in state["ranks"]], state["pattern"], vocabulary)


def too_long(text: str) -> str:
    """What is wrong with a text that tiktoken's regular expressions, with their limited stack, cannot split."""
    longest = max(re.findall(r"\s+", text), key=len, default="")
    what = f"{len(longest)} of white space in a row: " if len(longest) > 10_000 else "a run that one rule takes whole: "
    return (f"the text {text[:20]!a}… of {len(text)} characters has {what}more than tiktoken can split: shorten it")


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
