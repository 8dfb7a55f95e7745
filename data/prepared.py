"""A prepared data set as the stages read it: records by stage and split, and tokens to pretrain on.

The folder holds meta.json (the data set, its options, counts, template and parts, size and digest
of each file), tokenizer.json,
<stage>_<split>.jsonl, and for each split the documents to pretrain on: pretrain_<split>.bin has the
tokens, pretrain_<split>.npz where each document starts and which part it belongs to.
"""
import dataclasses
import json
import pathlib
from typing import Any

import numpy as np

from data.dataset import tells
from data.folders import damage
from data.records import FIELDS
from data.tokenizer import Tokenizer
from runtime.options import UserError


@dataclasses.dataclass
class Documents:
    """Tokens of one split for pretraining: document i is `tokens[starts[i]:starts[i + 1]]`, of part
    number `part[i]`. Documents begin with <|endoftext|>, except a single long text."""

    tokens: np.ndarray  # (N,) uint16 or uint32
    starts: np.ndarray  # (documents + 1,)
    part: np.ndarray  # (documents,)
    n_bytes: int  # length of the text in UTF-8: the denominator of bits per byte

    @property
    def single(self) -> bool:
        """Whether this is one long text, without borders that attention would have to respect."""
        return len(self.starts) == 2


@dataclasses.dataclass
class Prepared:
    """A prepared data set. tokenizer: None without text to pretrain on."""

    folder: pathlib.Path
    meta: dict[str, Any]
    tokenizer: Tokenizer | None

    @classmethod
    def load(cls, folder: pathlib.Path) -> "Prepared":
        """Open a prepared folder; UserError unless each file is as it was written.

        All of it is read for that: 15 ms for the demo's 12 MB, a second for each GB.
        """
        if fault := damage(folder):
            raise UserError(f"{folder} is damaged: {fault}; delete it, or every such folder with "
                            "`python -m data.prepare --clean`; the next run prepares it anew")
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        path = folder / "tokenizer.json"
        state = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
        return cls(folder, meta, Tokenizer.from_state(state) if state else None)

    @property
    def template(self) -> str:
        """The instruction around a prompt, with `{prompt}` in it."""
        return self.meta["template"]

    @property
    def fingerprint(self) -> str:
        """A hash of all that the prepared files depend on."""
        return self.meta["fingerprint"]

    def has(self, stage: str) -> bool:
        """Whether there are training records for this stage."""
        return (self.folder / f"{stage}_train.jsonl").exists()

    def feedback(self, split: str) -> str:
        """The kind of this split's feedback: pairs, scores or labels; "" without any that tells
        something apart."""
        return tells(self.records("reward", split)) if self.has("reward") else ""

    def records(self, stage: str, split: str) -> list[dict]:
        """A stage's records of a split (train, val, test); UserError if there are none."""
        path = self.folder / f"{stage}_{split}.jsonl"
        if not path.exists():
            raise UserError(f"data set {self.meta['data']} has nothing for the stage {stage}: it "
                            f"holds {', '.join(self.meta['stages'])}; a {stage} record has "
                            f"{FIELDS.get(stage, FIELDS['reward'])}")
        with open(path, "rb") as file:  # lines were checked when they were prepared, the file by `load`
            return [json.loads(line) for line in file]

    def require_tokenizer(self) -> Tokenizer:
        """The tokenizer; UserError without text to pretrain on."""
        if self.tokenizer is None:
            raise UserError(f"data set {self.meta['data']} has no text to pretrain on: add records "
                            '{"text"} (pretrain.jsonl), or give the later stages a pretrained '
                            "--init_from")
        return self.tokenizer

    def documents(self, split: str) -> Documents:
        """The pretraining text of a split; its tokens are memory-mapped."""
        self.require_tokenizer()
        arrays = np.load(self.folder / f"pretrain_{split}.npz")
        tokens = np.memmap(self.folder / f"pretrain_{split}.bin", dtype=self.meta["dtype"],
                           mode="r")
        return Documents(tokens, arrays["starts"], arrays["part"], int(arrays["n_bytes"]))

    def mixture(self, text: str = "") -> tuple[dict[int, float] | None, dict[int, float]]:
        """(shares, early) for PackedDocuments, from an option such as "news=.15,dialogue=.3".

        shares: of the training tokens, by part number; None if there is one part only. Parts that
        the text does not name divide what it leaves in the proportions of the data set's own
        mixture, which holds if the text is empty. early: the first share of training that a
        part's documents are in, for parts that end before the training does.
        UserError if the text is malformed or has no effect on this data.
        """
        parts: dict[str, dict] = self.meta["parts"]
        number = {name: i for i, name in enumerate(parts)}
        early = {number[name]: part["until"] for name, part in parts.items() if part["until"] < 1}
        counts = {name: self.meta["counts"].get(f"pretrain_train[{name}]") for name in parts}
        tokens = {name: count["tokens"] for name, count in counts.items() if count}
        if len(tokens) < 2:
            if text:
                raise UserError(f"--mixture has no effect on {self.meta['data']}: its text has one "
                                "part only")
            return None, {}
        shares = default_shares(tokens, {name: part["share"] for name, part in parts.items()})
        if text:
            shares = override_shares(shares, parse_mixture(text, list(shares)), text)
        return {number[name]: share for name, share in shares.items()}, early


# ---- mixtures ------------------------------------------------------------------------------------

def default_shares(tokens: dict[str, int], shares: dict[str, float | None]) -> dict[str, float]:
    """The share of each part that has tokens: its own, or (None) a part of what the others leave,
    in proportion to its tokens."""
    left = 1.0
    for share in shares.values():
        left -= share or 0.0
    open_tokens = sum(n for name, n in tokens.items() if shares[name] is None)
    return {name: left * (n / open_tokens) if shares[name] is None else shares[name]
            for name, n in tokens.items()}


def parse_mixture(text: str, names: list[str]) -> dict[str, float]:
    """"news=.15,dialogue=.3" as a dict; UserError for a name that is unknown or repeated, or a
    share that is no number between 0 and 1."""
    shares: dict[str, float] = {}
    for word in text.split(","):
        name, equals, number = (piece.strip() for piece in word.partition("="))
        if not equals:
            raise UserError(f"--mixture {text}: {word.strip()!r} is not NAME=SHARE; write it like "
                            f"{names[0]}=.5")
        if name not in names:
            raise UserError(f"--mixture {text}: this data has no part {name!r}; its parts are "
                            f"{', '.join(names)}")
        if name in shares:
            raise UserError(f"--mixture {text}: {name} has two shares; give one")
        try:
            shares[name] = float(number)
        except ValueError:
            raise UserError(f"--mixture {text}: {number!r} is not a number; write a share of the "
                            f"tokens such as {name}=.5") from None
        if not 0 <= shares[name] <= 1:  # NaN, too, is refused
            raise UserError(f"--mixture {text}: the share of {name} must be from 0 to 1")
    return shares


def override_shares(default: dict[str, float], shares: dict[str, float],
                    text: str) -> dict[str, float]:
    """`default` with these shares in it; the other parts divide what they leave as in `default`.
    UserError if that is below 0, or if there is no part to take it."""
    left = 1.0
    for name in default:
        left -= shares.get(name, 0.0)
    others = sum(share for name, share in default.items() if name not in shares)
    if left < -1e-9:
        raise UserError(f"--mixture {text}: the shares are {1 - left:g} together, more than 1: "
                        "lower one")
    if left > 1e-9 and not others:
        raise UserError(f"--mixture {text}: the shares are {1 - left:g} together, and no part is "
                        "left for the others: raise one, or leave one part out")
    left = max(0.0, left)
    return {name: shares[name] if name in shares else left * (share / others if others else 0.0)
            for name, share in default.items()}
