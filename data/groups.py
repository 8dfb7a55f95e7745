"""Texts that quote each other, found and kept on one side of a split."""
import unicodedata
from collections.abc import Sequence

import numpy as np


def text_key(text: str) -> str:
    """Equal for equal texts: NFKC, lower case, letters and digits only."""
    return "".join(c for c in unicodedata.normalize("NFKC", text).lower() if c.isalnum())


def word_key(text: str) -> str:
    """Equal for equal texts of a script with spaces: NFKC, lower case, words of letters and digits."""
    text = unicodedata.normalize("NFKC", text).lower()
    return " ".join("".join(c if c.isalnum() else " " for c in text if c not in "'’").split())


def group_by_shared_runs(keys: Sequence[Sequence[str]], run: int) -> list[int]:
    """A group number for each key, a text or a list of words. Keys that share a run of so many
    characters or words quote each other and are in one group, and so are those connected through
    others (union–find). A key that is shorter than a run is one by itself."""
    lengths = np.array([len(key) for key in keys], np.int64)
    first_with, owner = run_starts(keys, lengths, run)
    leader = list(range(len(keys)))

    def find(i: int) -> int:
        while leader[i] != i:
            leader[i] = leader[leader[i]]
            i = leader[i]
        return i

    shared = np.flatnonzero(owner != first_with)
    for i, other in zip(owner[shared].tolist(), first_with[shared].tolist(), strict=True):
        leader[find(i)] = find(other)
    return [find(i) for i in range(len(keys))]


def run_starts(keys: Sequence[Sequence[str]], lengths: np.ndarray,
               run: int) -> tuple[np.ndarray, np.ndarray]:
    """For each run of all keys in turn: (the first key that contains it, its own key). Runs are
    compared by 64-bit hashes."""
    numbers: dict[str, int] = {}
    units = np.fromiter((numbers.setdefault(unit, len(numbers)) for key in keys for unit in key),
                        np.int64, int(lengths.sum()))
    units = np.random.default_rng(0).integers(2**64, size=len(numbers), dtype=np.uint64)[units]
    owner = np.repeat(np.arange(len(keys)), lengths)
    left = np.repeat(lengths.cumsum(), lengths) - np.arange(len(units))  # units to the key's end
    hashes = np.zeros(len(units), np.uint64)
    for k in range(run):
        inside = left > k
        following = np.roll(units, -k)
        hashes[inside] = hashes[inside] * np.uint64(0x9E3779B97F4A7C15) + following[inside]
    is_run = (left >= run) | (left == np.repeat(lengths, lengths))
    hashes, owner = hashes[is_run], owner[is_run]
    _, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)
    return owner[first[inverse]], owner
