"""Texts that quote each other, found and kept on one side of a split."""
import re
import unicodedata
from array import array
from collections.abc import Iterable, Sequence

import numpy as np


def text_key(text: str) -> str:
    """Equal for equal texts: NFKC, lower case, letters and digits only."""
    return "".join(c for c in unicodedata.normalize("NFKC", text).lower() if c.isalnum())


def word_key(text: str) -> str:
    """Equal for equal texts of a script with spaces: NFKC, lower case, words of letters and digits."""
    text = unicodedata.normalize("NFKC", text).lower()
    return " ".join(re.findall(r"[^\W_]+", re.sub("['’]", "", text)))


def group_by_shared_runs(keys: Iterable[Sequence[str]], run: int) -> list[int]:
    """A group number for each key, a text or a list of words. Keys that share a run of so many
    characters or words quote each other and are in one group, and so are those connected through
    others (union–find). A key that is shorter than a run is one by itself."""
    lengths, numbers = array("q"), array("q")
    number_of: dict[str, int] = {}  # of a character or word
    for key in keys:
        lengths.append(len(key))
        numbers.extend(number_of.setdefault(unit, len(number_of)) for unit in key)
    first_with, owner = run_owners(np.array(numbers), np.array(lengths), run)
    leader = list(range(len(lengths)))

    def find(i: int) -> int:
        while leader[i] != i:
            leader[i] = leader[leader[i]]
            i = leader[i]
        return i

    shared = np.flatnonzero(owner != first_with)
    for i, other in zip(owner[shared].tolist(), first_with[shared].tolist(), strict=True):
        leader[find(i)] = find(other)
    return [find(i) for i in range(len(lengths))]


def run_owners(numbers: np.ndarray, lengths: np.ndarray, run: int) -> tuple[np.ndarray, np.ndarray]:
    """For each run of all keys in turn: (the first key that contains it, its own key).

    numbers: of the characters or words of all keys, one key after another. lengths: (keys,). Runs are
    compared by 64-bit hashes.
    """
    draw = np.random.default_rng(0)
    units = draw.integers(2**64, size=numbers.max(initial=0) + 1, dtype=np.uint64)[numbers]
    owner = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
    left = np.repeat(lengths.cumsum(), lengths) - np.arange(len(units))  # units to the key's end
    hashes = np.zeros(len(units), np.uint64)
    for k in range(run):
        inside = np.flatnonzero(left > k)
        hashes[inside] = hashes[inside] * np.uint64(0x9E3779B97F4A7C15) + units[inside + k]
    is_run = (left >= run) | (left == np.repeat(lengths, lengths))
    hashes, owner = hashes[is_run], owner[is_run]
    _, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)
    return owner[first[inverse]], owner
