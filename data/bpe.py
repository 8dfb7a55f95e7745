"""Byte-pair encoding, trained by ourselves (Sennrich 2016)."""
import heapq
import sys
from collections import Counter
from collections.abc import Iterable

import numpy as np
import regex  # tiktoken's own dependency: the same classes of characters as in its encoder
from tqdm import tqdm

from data.tokenizer import CHARACTER_PATTERN, PATTERN, SPECIAL_TOKENS, Tokenizer
from runtime.options import UserError


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
