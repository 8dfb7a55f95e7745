"""Byte-pair encoding (Sennrich 2016): the merges of a vocabulary, learned from texts."""
import heapq
from collections import Counter
from collections.abc import Iterable

import numpy as np
import regex  # a dependency of tiktoken: has the character classes of its encoder
from tqdm import tqdm


def learn_tokens(texts: Iterable[str], n_tokens: int, pattern: str,
                 progress: bool = False) -> list[bytes]:
    """The bytes of up to n_tokens tokens in order of their ids: 256 bytes, then merges.

    Each round merges the most frequent pair of neighbouring tokens inside a piece (`pattern`) into a new
    token. Ties go to the smaller ids, so the texts determine the result. If no pair occurs twice any
    more, there are fewer tokens.

    Counts are kept up to date: a merge changes only those of the pairs around it. The most frequent
    pair is on top of a heap, whose outdated entries are skipped when they come up.
    """
    pieces: Counter[str] = Counter()
    split = regex.compile(pattern)
    for text in texts:
        pieces.update(split.findall(text))
    corpus = _Corpus(pieces)
    heap = [(-count, pair) for pair, count in corpus.pair_counts.items()]
    heapq.heapify(heap)
    ranks = [bytes([b]) for b in range(256)]
    ids = {token: i for i, token in enumerate(ranks)}
    with tqdm(total=n_tokens - 256, desc="vocabulary", unit="merge",
              disable=None if progress else True, dynamic_ncols=True) as bar:
        while len(ranks) < n_tokens and heap:
            count, pair = heapq.heappop(heap)
            if -count != corpus.pair_counts[pair]:
                continue  # outdated: another entry of the heap has the present count
            if count >= -1:
                break  # a pair that occurs once is no pattern
            token = ranks[pair[0]] + ranks[pair[1]]
            if token not in ids:  # tiktoken finds tokens by their bytes, so each has to be unique
                ids[token] = len(ranks)
                ranks.append(token)
                bar.update()
            for changed in corpus.merge(pair, ids[token]):
                if corpus.pair_counts[changed] > 0:
                    heapq.heappush(heap, (-corpus.pair_counts[changed], changed))
    return ranks


class _Corpus:
    """The distinct pieces of the texts as one array of ids, −1 between them.

    weights: how often the piece at each position occurs. pair_counts: how often each pair of
    neighbouring ids occurs.
    """

    def __init__(self, pieces: Counter[str]):
        encoded = [piece.encode() for piece in pieces]
        lengths = np.array([len(e) + 1 for e in encoded], np.int64)
        self.ids = np.full(int(lengths.sum()) + 1, -1, np.int32)
        is_token = np.ones(len(self.ids), bool)
        is_token[np.concatenate(([0], lengths.cumsum()))] = False
        self.ids[is_token] = np.frombuffer(b"".join(encoded), np.uint8)
        occurrences = np.array(list(pieces.values()), np.int64)
        self.weights = np.concatenate(([0], np.repeat(occurrences, lengths)))
        self.pair_counts: Counter[tuple[int, int]] = Counter()
        self._count(np.arange(len(self.ids) - 1), 1)

    def _count(self, positions: np.ndarray, sign: int) -> set[tuple[int, int]]:
        """Add (sign 1) or subtract (−1) the pairs that begin at these positions; returns them."""
        left, right = self.ids[positions].astype(np.int64), self.ids[positions + 1]
        inside = (left >= 0) & (right >= 0)
        codes, inverse = np.unique((left << 32 | right)[inside], return_inverse=True)
        counts = np.bincount(inverse, self.weights[positions[inside]], len(codes))
        pairs = list(zip((codes >> 32).tolist(), (codes & 0xFFFFFFFF).tolist(), strict=True))
        for pair, count in zip(pairs, counts.astype(np.int64).tolist(), strict=True):
            self.pair_counts[pair] += sign * count
        return set(pairs)

    def merge(self, pair: tuple[int, int], new: int) -> set[tuple[int, int]]:
        """Replace a pair by the token `new` everywhere; returns the pairs whose counts changed."""
        at = np.flatnonzero((self.ids[:-1] == pair[0]) & (self.ids[1:] == pair[1]))
        if pair[0] == pair[1]:  # in a run of equal ids, take every second position: aaa is (aa)a
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
