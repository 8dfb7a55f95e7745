"""A prepared data set, as the stages read it: records by stage and split, and memory-mapped tokens to pretrain on."""
import dataclasses
import pathlib
from typing import Any

import numpy as np

from data.records import FIELDS, load_records
from data.tokenizer import CHARACTER_PATTERN, Tokenizer
from runtime.options import UserError

NEWS, REVIEW, DIALOGUE = 0, 1, 2  # parts of `reviews`: newspaper; plain reviews; reviews in the form of dialogues


@dataclasses.dataclass
class Documents:
    """Tokens of one split for pretraining: `tokens[starts[i]:starts[i + 1]]` is document i, of part `part[i]`. In
    `reviews` and in your own texts every document begins with <|endoftext|>."""

    tokens: np.ndarray
    starts: np.ndarray
    part: np.ndarray
    n_bytes: int  # of the text: the denominator of bits per byte

    @property
    def single(self) -> bool:
        """One long text, without borders that attention would have to respect."""
        return len(self.starts) == 2

    @property
    def parts(self) -> int:
        return int(self.part.max()) + 1


@dataclasses.dataclass
class Prepared:
    """What the stages read of a data set."""

    folder: pathlib.Path
    meta: dict[str, Any]
    tokenizer: Tokenizer | None

    @property
    def template(self) -> str:
        return self.meta["template"]

    @property
    def fingerprint(self) -> str:
        return self.meta["fingerprint"]

    @property
    def trains_vocabulary(self) -> bool:
        """Was a BPE vocabulary of --vocab_size tokens trained on it, rather than characters taken, or none?"""
        return self.tokenizer is not None and self.tokenizer.pattern != CHARACTER_PATTERN

    def has(self, stage: str) -> bool:
        return (self.folder / f"{stage}_train.jsonl").exists()

    def has_labels(self, stage: str, split: str = "test") -> bool:
        """Does this stage's feedback say of each text: liked, or not? And are there both in this split?"""
        return self.has(stage) and {r.get("label") for r in self.records(stage, split)} == {0, 1}

    def records(self, stage: str, split: str) -> list[dict]:
        """A stage's records of a split (train, val, test); UserError where the data set has none for it."""
        path = self.folder / f"{stage}_{split}.jsonl"
        if not path.exists():
            raise UserError(f"data set {self.meta['data']} has nothing for the stage {stage}: it holds "
                            f"{', '.join(self.meta['stages'])}; a {stage} record has "
                            f"{FIELDS.get(stage, FIELDS['reward'])}")
        return load_records(path, "reward" if stage == "judge" else stage)

    def require_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise UserError(f"data set {self.meta['data']} has no text to pretrain on: add records {{\"text\"}} "
                            f"(pretrain.jsonl), or give the later stages a pretrained --init_from")
        return self.tokenizer

    def documents(self, split: str) -> Documents:
        """The memory-mapped tokens of a split."""
        self.require_tokenizer()
        arrays = np.load(self.folder / f"pretrain_{split}.npz")
        tokens = np.memmap(self.folder / f"pretrain_{split}.bin", dtype=self.meta["dtype"], mode="r")
        return Documents(tokens, arrays["starts"], arrays["part"], int(arrays["n_bytes"]))
