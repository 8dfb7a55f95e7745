"""Texts to pretrain on from a file that may be larger than memory: read in passes, one at a time."""
import collections
import copy
import pathlib
import random
from array import array
from collections.abc import Iterable, Iterator

import numpy as np

from data.records import read_records, records_in, report_bad, say_forms
from runtime.options import UserError
from runtime.rows import read_rows

SAMPLE = 2**24  # bytes of text that a vocabulary is learned from: 0.5 GB of memory, minutes
PIECE = 4096  # characters of a text that are drawn together


class Texts:
    """Some of the records {"text"} of a file, in its order; each iteration reads the file anew.

    rows, sizes (records,): the number of each record's row in the file, and the bytes of its text.
    chosen (records,): which of them are meant.
    """

    def __init__(self, path: pathlib.Path, skip_bad: bool = False, fields: dict[str, str] | None = None):
        """Check every line, and choose all texts; UserError as in `load_records`."""
        rows, sizes, bad, forms = array("q"), array("q"), [], collections.Counter()
        for number, record in read_records(path, "pretrain", bad, forms, fields):
            rows.append(number)
            sizes.append(len(record["text"].encode()))
        report_bad(path, "pretrain", bad, len(rows), skip_bad, forms)
        say_forms(path, forms)
        self.fields = fields
        self.path, self.rows, self.sizes = path, np.array(rows), np.array(sizes)
        self.chosen = np.ones(len(rows), bool)

    def where(self, keep: Iterable[bool]) -> "Texts":
        """Those of the chosen texts for which `keep`, which goes through them, has True."""
        some = copy.copy(self)
        some.chosen = self.chosen.copy()
        some.chosen[self.chosen] = np.fromiter(keep, bool, len(self))
        return some

    def __iter__(self) -> Iterator[dict]:
        wanted = np.zeros(self.rows[-1] + 1, bool)
        wanted[self.rows[self.chosen]] = True
        wanted, count = wanted.tobytes(), 0
        try:
            for row in read_rows(self.path, progress=True):
                if row.number < len(wanted) and wanted[row.number]:
                    count += 1
                    yield from records_in(row.value(), "pretrain", self.fields)[1]
            if count < len(self):
                raise ValueError
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
        yield from (record["text"] for record in texts)
        return
    share, draw = SAMPLE / texts.n_bytes, random.Random(0)
    print(f"vocabulary: learned from {SAMPLE / 1e6:.0f} of {texts.n_bytes / 1e6:,.0f} MB of text, "
          "drawn evenly")
    for record in texts:
        for start in range(0, len(record["text"]), PIECE):
            if draw.random() < share:
                yield record["text"][start:start + PIECE]
