"""Texts to pretrain on from a file that may be larger than memory: read in passes, one at a time."""
import pathlib
import random
from array import array
from collections.abc import Iterable, Iterator

import numpy as np

from data.records import read_records, report_bad
from runtime.options import UserError

SAMPLE = 2**24  # bytes of text that a vocabulary is learned from: 0.5 GB of memory, minutes
PIECE = 4096  # characters of a text that are drawn together


class Texts:
    """Some of the texts of a JSON Lines file, in its order; each iteration reads the file anew.

    sizes (records,): bytes of each text of the file. chosen (records,): which of them are meant.
    """

    def __init__(self, path: pathlib.Path, skip_bad: bool = False):
        """Check every line, and choose all texts; UserError as in `load_records`."""
        self.path, bad = path, []
        self.sizes = np.array(array("q", (len(record["text"].encode())
                                          for record in read_records(path, "pretrain", bad))))
        report_bad(path, "pretrain", bad, len(self.sizes), skip_bad)
        self.chosen = np.ones(len(self.sizes), bool)

    def where(self, keep: Iterable[bool]) -> "Texts":
        """Those of the chosen texts for which `keep`, which goes through them, has True."""
        some = object.__new__(Texts)
        some.path, some.sizes, some.chosen = self.path, self.sizes, self.chosen.copy()
        some.chosen[self.chosen] = np.fromiter(keep, bool, len(self))
        return some

    def __iter__(self) -> Iterator[str]:
        try:
            for record, chosen in zip(read_records(self.path, "pretrain", []), self.chosen,
                                      strict=True):
                if chosen:
                    yield record["text"]
        except ValueError:
            raise UserError(f"{self.path}: has changed while it was read; run this again") from None

    def __len__(self) -> int:
        return int(self.chosen.sum())

    @property
    def n_bytes(self) -> int:
        """Length of the texts in UTF-8."""
        return int(self.sizes[self.chosen].sum())


def sample(texts: Texts) -> Iterator[str]:
    """All of the texts, or, if they are longer than SAMPLE, pieces of about that size, drawn evenly
    from all of them; a printed line says so."""
    if texts.n_bytes <= SAMPLE:
        yield from texts
        return
    share, draw = SAMPLE / texts.n_bytes, random.Random(0)
    print(f"vocabulary: learned from {SAMPLE / 1e6:.0f} of {texts.n_bytes / 1e6:,.0f} MB of text, "
          "drawn evenly")
    for text in texts:
        for start in range(0, len(text), PIECE):
            if draw.random() < share:
                yield text[start:start + PIECE]
