"""Byte-pair encoding (Sennrich 2016): the merges of a vocabulary, learned from texts."""
import heapq
from collections import Counter
from collections.abc import Iterable

import numpy as np
import regex  # a dependency of tiktoken: has the character classes of its encoder
from tqdm import tqdm

AT_ONCE = 2**20  # positions that are counted at once, to bound the memory that takes


def learn_tokens(texts: Iterable[str], n_tokens: int, pattern: str,
                 progress: bool = False) -> list[bytes]:
    """The bytes of up to n_tokens tokens in order of their ids: 256 bytes, then merges.

    Each round merges the most frequent pair of neighbouring tokens inside a piece (`pattern`) into a new
    token. Ties go to the smaller ids, so the texts determine the result. If no pair occurs twice any
    more, there are fewer tokens.

    Counts are kept up to date: a merge changes only those of the pairs around it. The most frequent
    pair is on top of a heap, whose outdated entries are skipped when they come up, and swept when
    they are most of it. A pair (a, b) is the number a · 2³² + b, which takes a third of the memory
    of a tuple and has the same order.
    """
    pieces: Counter[str] = Counter()
    split = regex.compile(pattern)
    for text in texts:
        pieces.update(split.findall(text))
    corpus = _Corpus(pieces)
    del pieces  # it is as large as the texts if most pieces are different
    heap = corpus.heap()
    ranks = [bytes([b]) for b in range(256)]
    ids = {token: i for i, token in enumerate(ranks)}
    with tqdm(total=n_tokens - 256, desc="vocabulary", unit="merge",
              disable=None if progress else True, dynamic_ncols=True) as bar:
        while len(ranks) < n_tokens and heap:
            count, pair = heapq.heappop(heap)
            if -count != corpus.pair_counts.get(pair):
                continue  # outdated: another entry of the heap has the present count
            left, right = pair >> 32, pair & 0xFFFFFFFF
            token = ranks[left] + ranks[right]
            if token not in ids:  # tiktoken finds tokens by their bytes, so each has to be unique
                ids[token] = len(ranks)
                ranks.append(token)
                bar.update()
            for changed in corpus.merge(left, right, ids[token]):
                if corpus.pair_counts.get(changed, 0) > 1:
                    heapq.heappush(heap, (-corpus.pair_counts[changed], changed))
            if len(heap) > 2 * len(corpus.pair_counts) + 1000:
                heap = corpus.heap()
    return ranks


class _Corpus:
    """The distinct pieces of the texts as one array of ids, −1 between them.

    weights: how often the piece at each position occurs. pair_counts: how often each pair of
    neighbouring ids occurs, by its number; pairs that occur nowhere are not in it.
    """

    def __init__(self, pieces: Counter[str]):
        # 255 is no byte of UTF-8, so it can stand between the pieces.
        content = b"\xff".join([b"", *(piece.encode() for piece in pieces), b""])
        self.ids = np.frombuffer(content, np.uint8).astype(np.int32)
        self.ids[self.ids == 255] = -1
        occurrences = np.array(list(pieces.values()), np.int64)
        if occurrences.max(initial=0) < 2**31:
            occurrences = occurrences.astype(np.int32)
        lengths = np.diff(np.flatnonzero(self.ids < 0))
        self.weights = np.concatenate((np.zeros(1, occurrences.dtype), np.repeat(occurrences, lengths)))
        self.pair_counts: dict[int, int] = {}
        self._count(np.arange(len(self.ids) - 1), 1)

    def heap(self) -> list[tuple[int, int]]:
        """(−count, pair) of every pair that occurs twice or more; one that occurs once is no
        pattern."""
        heap = [(-count, pair) for pair, count in self.pair_counts.items() if count > 1]
        heapq.heapify(heap)
        return heap

    def _count(self, positions: np.ndarray, sign: int) -> set[int]:
        """Add (sign 1) or subtract (−1) the pairs that begin at these positions; returns them."""
        changed: set[int] = set()
        for start in range(0, len(positions), AT_ONCE):
            some = positions[start:start + AT_ONCE]
            left, right = self.ids[some].astype(np.int64), self.ids[some + 1]
            inside = (left >= 0) & (right >= 0)
            codes, inverse = np.unique((left << 32 | right)[inside], return_inverse=True)
            counts = np.bincount(inverse, self.weights[some[inside]], len(codes))
            pairs = codes.tolist()
            for pair, count in zip(pairs, counts.astype(np.int64).tolist(), strict=True):
                self.pair_counts[pair] = self.pair_counts.get(pair, 0) + sign * count
                if not self.pair_counts[pair]:
                    del self.pair_counts[pair]
            changed.update(pairs)
        return changed

    def merge(self, left: int, right: int, new: int) -> set[int]:
        """Replace the pair (left, right) by the token `new` everywhere; returns the pairs whose
        counts changed."""
        at = np.flatnonzero((self.ids[:-1] == left) & (self.ids[1:] == right))
        if left == right:  # in a run of equal ids, take every second position: aaa is (aa)a
            n = np.arange(len(at))
            run_start = np.maximum.accumulate(np.where(np.diff(at, prepend=-2) != 1, n, 0))
            at = at[(n - run_start) % 2 == 0]
        # Subtract all pairs that touch a match, merge, and add those that touch the new token.
        changed = self._count(np.unique(np.concatenate((at - 1, at, at + 1))), -1)
        self.ids[at] = new
        keep = np.ones(len(self.ids), bool)
        keep[at + 1] = False
        self.ids, self.weights = self.ids[keep], self.weights[keep]
        at = at - np.arange(len(at))  # each match moves left by the tokens removed before it
        return changed | self._count(np.unique(np.concatenate((at - 1, at))), 1)
