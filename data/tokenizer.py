"""Text becomes numbers: a byte-level BPE vocabulary trained by ourselves, and the one place that renders dialogues.

    python -m data.tokenizer show FILE.jsonl --from out/reviews/sft       dialogues with their loss mask in colour

Byte-pair encoding (Sennrich 2016): start from the 256 bytes and, again and again, make the most frequent neighbouring
pair a token of its own. Encoding is done by `tiktoken` with the ranks learned here. Six special tokens of MOSS's
dialogue format stand after the ordinary ones; text never produces them, so no user can forge a turn by writing `<eom>`.
"""
import heapq
import json
import pathlib
import sys
from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np
import regex  # tiktoken's own dependency: the same classes of characters as in its encoder
import tiktoken
from tqdm import tqdm

from data.records import as_messages, check_dialogue, load_records
from options import UserError

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


# ---- training --------------------------------------------------------------------------------------------------------

def train_bpe(texts: Iterable[str], vocab_size: int, progress: bool = False) -> Tokenizer:
    """Learn a vocabulary of vocab_size tokens: 256 bytes, merges, and our six special tokens.

    Pairs are counted once; a merge then changes only the counts of pairs at the places where it happens. The most
    frequent pair is found in a heap whose outdated entries are skipped when they come up. Ties go to the smaller ids,
    so the result is determined by the texts. Too little text gives a smaller vocabulary and says so.
    """
    if vocab_size < 256 + len(SPECIAL_TOKENS):
        raise UserError(f"vocab_size {vocab_size} is too small: the bytes and our special tokens alone are "
                        f"{256 + len(SPECIAL_TOKENS)}")
    pieces: Counter[str] = Counter()
    split = regex.compile(PATTERN)
    for text in texts:
        pieces.update(split.findall(text))
    corpus = _Corpus(pieces)
    heap = [(-count, pair) for pair, count in corpus.pair_counts.items()]
    heapq.heapify(heap)
    ranks = [bytes([b]) for b in range(256)]
    ids = {token: i for i, token in enumerate(ranks)}
    target = vocab_size - len(SPECIAL_TOKENS)
    with tqdm(total=target - 256, desc="vocabulary", unit="merge", disable=None if progress else True,
              dynamic_ncols=True) as bar:
        while len(ranks) < target and heap:
            count, pair = heapq.heappop(heap)
            if -count != corpus.pair_counts[pair]:
                continue  # outdated: the pair's present count stands elsewhere in the heap
            if count >= -1:
                break  # a pair seen once is no pattern
            merged = ranks[pair[0]] + ranks[pair[1]]
            if merged not in ids:  # other pairs can spell the same bytes; tiktoken knows a token by its bytes
                ids[merged] = len(ranks)
                ranks.append(merged)
                bar.update()
            for changed in corpus.merge(pair, ids[merged]):
                if corpus.pair_counts[changed] > 0:
                    heapq.heappush(heap, (-corpus.pair_counts[changed], changed))
    tokenizer = Tokenizer(ranks)
    if tokenizer.n_vocab < vocab_size:
        print(f"vocabulary: the text has patterns for {tokenizer.n_vocab} tokens only, not {vocab_size}",
              file=sys.stderr)
    return tokenizer


class _Corpus:
    """All distinct pieces in one array of ids, −1 between them; how often each occurs; and how often each pair does."""

    def __init__(self, pieces: Counter[str]):
        encoded = [piece.encode() for piece in pieces]
        lengths = np.array([len(e) + 1 for e in encoded], np.int64)
        self.ids = np.full(int(lengths.sum()) + 1, -1, np.int32)
        real = np.ones(len(self.ids), bool)
        real[np.concatenate(([0], lengths.cumsum()))] = False
        self.ids[real] = np.frombuffer(b"".join(encoded), np.uint8)
        self.weights = np.concatenate(([0], np.repeat(np.array(list(pieces.values()), np.int64), lengths)))
        self.pair_counts: Counter[tuple[int, int]] = Counter()
        self._count(np.arange(len(self.ids) - 1), 1)

    def _count(self, positions: np.ndarray, sign: int) -> set[tuple[int, int]]:
        """Add (or with −1 subtract) the pairs that begin at these positions; returns which pairs they are."""
        left, right = self.ids[positions].astype(np.int64), self.ids[positions + 1]
        inside = (left >= 0) & (right >= 0)
        codes, which = np.unique((left << 32 | right)[inside], return_inverse=True)
        counts = np.bincount(which, self.weights[positions[inside]], len(codes)).astype(np.int64)
        pairs = list(zip((codes >> 32).tolist(), (codes & 0xFFFFFFFF).tolist(), strict=True))
        for pair, count in zip(pairs, counts.tolist(), strict=True):
            self.pair_counts[pair] += sign * count
        return set(pairs)

    def merge(self, pair: tuple[int, int], new: int) -> set[tuple[int, int]]:
        """Replace a pair by its token everywhere; returns the pairs whose counts changed."""
        at = np.flatnonzero((self.ids[:-1] == pair[0]) & (self.ids[1:] == pair[1]))
        if pair[0] == pair[1]:  # in a run of equal ids take every second place: aaa is (aa)a
            n = np.arange(len(at))
            at = at[(n - np.maximum.accumulate(np.where(np.diff(at, prepend=-2) != 1, n, 0))) % 2 == 0]
        changed = self._count(np.unique(np.concatenate((at - 1, at, at + 1))), -1)  # pairs that touch a match go
        self.ids[at] = new
        keep = np.ones(len(self.ids), bool)
        keep[at + 1] = False  # its right half goes, and all that follows moves up
        self.ids, self.weights = self.ids[keep], self.weights[keep]
        at = at - np.arange(len(at))
        return changed | self._count(np.unique(np.concatenate((at - 1, at))), 1)


def train_chars(text: str) -> Tokenizer:
    """The text's own characters in code-point order, as nanoGPT takes for Shakespeare, and our special tokens."""
    return Tokenizer([c.encode() for c in sorted(set(text))], CHARACTER_PATTERN)


# ---- command line ----------------------------------------------------------------------------------------------------

def show(path: str, tokenizer: Tokenizer, template: str = "{prompt}", n: int = 5) -> None:
    """Print dialogues of a JSON Lines file: learned tokens green, the rest grey, token borders marked."""
    for record in load_records(path, "sft")[:n]:
        ids, mask = tokenizer.render_chat(as_messages(record, template))
        pending = b""  # a character may take several tokens
        for token, learn in zip(ids, mask, strict=True):
            pending += tokenizer.token_bytes(token)
            try:
                text, pending = pending.decode(), b""
            except UnicodeDecodeError:
                continue
            print(f"\033[{'32' if learn else '90'}m{text}\033[2m·\033[0m", end="")
        print(f"\n   {len(ids)} tokens, {sum(mask)} learned\n")


def main(argv: list[str]) -> None:
    if len(argv) not in (2, 4) or argv[0] != "show" or (len(argv) == 4 and argv[2] != "--from"):
        raise UserError("usage: python -m data.tokenizer show FILE.jsonl [--from CHECKPOINT-OR-PREPARED-FOLDER]")
    where = pathlib.Path(argv[3] if len(argv) == 4 else pathlib.Path(argv[1]).parent)
    if (where / "tokenizer.json").exists():
        state, meta = (json.loads((where / name).read_text(encoding="utf-8"))
                       for name in ("tokenizer.json", "meta.json"))
        show(argv[1], Tokenizer.from_state(state), meta.get("template", "{prompt}"))
    else:
        from model import load_checkpoint
        _, tokenizer, state = load_checkpoint(where)
        show(argv[1], tokenizer, state.get("template", "{prompt}"))


if __name__ == "__main__":
    from options import run_main
    sys.exit(run_main(main, sys.argv[1:]))
