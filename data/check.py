"""Your own files as training would read them: counts, forms, lengths, balance, leaks and examples.

    python -m data.prepare check FILE|FOLDER [--fields …] [--skip_bad] [--from CHECKPOINT]

Nothing is trained, and nothing is written. Each file is read once, line by line, and some numbers are
kept of each record; then the files are divided as training divides them.
"""
import collections
import contextlib
import dataclasses
import heapq
import io
import json
import pathlib
from array import array
from collections.abc import Iterator, Mapping

import numpy as np

from data.dataset import SPLITS, feedback_of, text_hash
from data.feedback import settle_beside
from data.forms import parse_fields
from data.own import KINDS, Files, OwnOptions, divide, find_files
from data.records import LEFT_OUT, SHOWN, as_messages, prompt_text, read_records
from data.render import Look, byte_tokenizer, can_colour, tokenizer_at
from data.road import dialogues_of, keep_for_judges
from data.splits import split_key
from runtime.options import UserError, option
from runtime.tables import table

COUNTED = 100_000  # records of a file whose tokens are counted
LENGTHS = {"name": "", "low": "5 %", "half": "half", "high": "95 %", "most": "longest"}


@dataclasses.dataclass
class CheckOptions(OwnOptions):
    """`python -m data.prepare check FILE|FOLDER`"""

    tokenizer: str = option("", "checkpoint or prepared folder whose tokenizer and template show the "
                                "examples token by token, and count lengths in tokens", flag="from")
    examples: int = option(10, "records shown of each training file, drawn by a hash", low=0,
                           high=1000)


def check(path: pathlib.Path, o: CheckOptions) -> int:
    """Print all that there is to say about the user's file or folder; 0 if all is well, 1 if lines are
    bad or the files cannot be divided. UserError for what cannot be read."""
    files = find_files(path, parse_fields(o.fields))
    tokenizer, template = tokenizer_at(pathlib.Path(o.tokenizer)) if o.tokenizer else (byte_tokenizer(), "")
    look = Look(tokenizer, o.template or template or "{prompt}", can_colour(), dots=bool(o.tokenizer))
    if o.examples:
        print(f"examples: {look.legend()}")
    surveys = {}
    for (stage, split), file in files.items():
        surveys[stage, split] = survey = Survey(file, KINDS.get(stage, stage), look,
                                                o.examples if split == "train" else 0)
        survey.read(parse_fields(o.fields))
        survey.report(o.skip_bad)
    if o.template and not any(survey.templates for survey in surveys.values()):
        raise UserError(f"--template has no effect on {path}: every prompt is a list of messages")
    for line in leaks(surveys):
        print(line)
    n_bad = sum(len(survey.bad) for survey in surveys.values()) * (not o.skip_bad)
    fault = report_splits(files, o)
    if n_bad:
        fault = f"{path}: {n_bad:,} bad lines: mend them, or leave them out with --skip_bad"
    print(fault or f"{path}: all is well")
    return int(bool(fault))


# ---- one file ------------------------------------------------------------------------------------

class Survey:
    """What one file holds: a few numbers of each record, and the records that are shown.

    look: shows records, and counts their tokens if it shows such. examples: how many records to draw.
    """

    def __init__(self, path: pathlib.Path, stage: str, look: Look, examples: int):
        self.path, self.stage, self.look, self.examples = path, stage, look, examples
        self.unit = "record" if path.name.removesuffix(".gz").endswith(".json") else "line"
        self.bad: list[str] = []
        self.forms: collections.Counter[str] = collections.Counter()
        self.lines, self.keys, self.hashes = array("q"), array("Q"), array("Q")
        self.characters: dict[str, array] = collections.defaultdict(lambda: array("q"))
        self.tokens: dict[str, array] = collections.defaultdict(lambda: array("q"))
        self.values: dict[str, array] = collections.defaultdict(lambda: array("d"))
        self.kinds: collections.Counter[str] = collections.Counter()
        self.templates = 0  # prompts that are texts, which stand in a template
        self.empty = array("q")  # lines
        self.heap: list[tuple[int, int, dict]] = []  # (-hash, line, record): a max-heap of the smallest hashes

    def read(self, fields: dict[str, str]) -> None:
        """Go through the file, line by line."""
        for number, record in read_records(self.path, self.stage, self.bad, self.forms, fields):
            self.add(number, record)

    def add(self, number: int, record: dict) -> None:
        """Take note of a record of this line."""
        identity = text_hash(json.dumps(record, sort_keys=True))
        self.lines.append(number)
        self.keys.append(split_key(record, self.stage))
        self.hashes.append(identity)
        self.templates += isinstance(record.get("prompt"), str)
        texts = texts_of(record, self.stage)
        for name, text in texts.items():
            self.characters[name].append(len(text))
        if any(not text.strip() for name, text in texts.items() if name != "prompt"):
            self.empty.append(number)
        if self.look.dots and len(self.lines) <= COUNTED:
            for name, n in self.look.lengths(record, self.stage).items():
                self.tokens[name].append(n)
        if self.stage == "reward":
            self._note_feedback(record)
        if self.examples:
            self._draw(identity, number, record)

    def _draw(self, identity: int, number: int, record: dict) -> None:
        """Keep the record as an example if its hash is one of the smallest so far; of equal ones the
        first."""
        full = len(self.heap) == self.examples
        if full and identity >= -self.heap[0][0] or any(-other == identity for other, *_ in self.heap):
            return
        (heapq.heappushpop if full else heapq.heappush)(self.heap, (-identity, number, record))

    def _note_feedback(self, record: dict) -> None:
        """Take note of what people said."""
        kind = "ties" if record.get("tie") else feedback_of(record)
        self.kinds[kind] += 1
        for name in ("label", "score", "margin"):
            if name in record:
                self.values[name].append(record[name])
        if "scores" in record:
            self.values["people"].append(len(record["scores"]))
            self.values["disagreement"].append(np.std(record["scores"]))
        if kind == "pairs":
            self.values["longer"].append(np.sign(len(record["chosen"]) - len(record["rejected"])))

    def report(self, skip_bad: bool) -> None:
        """Print what was counted, and the examples in the order of the file."""
        print(f"{self.path}: {len(self.lines):,} records for the stage {self.stage}")
        useless = {name: n for name, n in self.forms.items() if name.startswith(LEFT_OUT)}
        print(f"  read as: {listed({k: n for k, n in self.forms.items() if k not in useless}) or 'nothing'}")
        if useless:
            print(f"  left out, because they teach nothing: {listed(useless).replace(LEFT_OUT, '')}")
        if self.bad:
            print(f"  bad lines: {len(self.bad):,}{', left out (--skip_bad)' * skip_bad}")
            print("\n".join(f"    {line}" for line in self.bad[:SHOWN]))
        for line in self.lines and [*self.balance(), *self.sameness()]:
            print(f"  {line}")
        for unit, lengths in (("characters", self.characters), ("tokens", self.tokens)):
            if any(map(len, lengths.values())):
                print("\n" + table([quantiles(name, n) for name, n in lengths.items()],
                                   LENGTHS | {"name": unit}))
        if self.tokens and len(self.lines) > COUNTED:
            print(f"  tokens are those of the first {COUNTED:,} records")
        for _, number, record in sorted(self.heap, key=lambda drawn: drawn[1]):
            print(f"\n-- {self.unit} {number}\n{self.look.show(record, self.stage)}")
        print()

    def balance(self) -> Iterator[str]:
        """Lines about the feedback: how it is distributed, and whether length tells it."""
        kinds = listed(self.kinds)
        if len({kind for kind in self.kinds if kind != "ties"}) > 1:
            yield f"feedback: {kinds}: a file has one kind: divide it"
        elif self.kinds:
            yield f"feedback: {kinds}"
        if label := self.values["label"]:
            yield f"labels: {np.mean(label):.1%} are liked"
        if score := self.values["score"]:
            low, quarter, half, high, most = np.quantile(score, (0, .25, .5, .75, 1))
            yield (f"ratings: mean {np.mean(score):.3g}, spread {np.std(score):.3g}; lowest {low:g}, quarters at "
                   f"{quarter:g}, {half:g} and {high:g}, highest {most:g}")
        if people := self.values["people"]:
            yield (f"people: {min(people):g} to {max(people):g} scores a text, {np.mean(people):.3g} on average; "
                   f"within a text they spread by {np.mean(self.values['disagreement']):.3g}")
        if self.values["longer"]:
            longer = np.array(self.values["longer"])
            yield (f"length: the longer reply is chosen in {np.mean(longer > 0):.1%} of the pairs, the shorter in "
                   f"{np.mean(longer < 0):.1%}")
        if margin := self.values["margin"]:
            yield (f"margins: {len(margin):,}, from {min(margin):g} to {max(margin):g}, mean {np.mean(margin):.3g}")

    def sameness(self) -> Iterator[str]:
        """Lines about records that are there twice, and replies of nothing but white space."""
        n, what = len(self.lines), "texts" if self.stage == "pretrain" else "first user messages"
        yield f"different {what}: {len(np.unique(self.keys)):,}"
        if repeats := n - len(np.unique(self.hashes)):
            yield f"repeats: {repeats:,} records are equal to an earlier one"
        if self.empty:
            yield (f"empty: {len(self.empty):,} records have a text or reply of nothing but white space, such as "
                   f"that of {self.unit} {self.empty[0]}")


def listed(counts: Mapping[str, int]) -> str:
    """Names with their counts: pairs (3), labels (2)."""
    return ", ".join(f"{name} ({n:,})" for name, n in counts.items())


def texts_of(record: dict, stage: str) -> dict[str, str]:
    """The texts of a record whose lengths count, by name."""
    if stage == "pretrain":
        return {"text": record["text"]}
    if stage == "sft":
        *before, last = as_messages(record, "{prompt}")
        return {"prompt": prompt_text(before), "reply": last["content"]}
    names = ("chosen", "rejected", "response")
    return {"prompt": prompt_text(record["prompt"])} | {name: record[name] for name in names if name in record}


def quantiles(name: str, lengths: array) -> dict[str, object]:
    """A row of the table of lengths."""
    low, half, high = np.quantile(lengths, (.05, .5, .95)).round().astype(int)
    return {"name": name, "low": f"{low:,}", "half": f"{half:,}", "high": f"{high:,}",
            "most": f"{max(lengths):,}"}


# ---- all files -----------------------------------------------------------------------------------

def leaks(surveys: dict[tuple[str, str], Survey]) -> Iterator[str]:
    """A line for each two files of different splits that share first user messages or texts."""
    places = sorted(surveys, key=lambda place: SPLITS.index(place[1]), reverse=True)
    for i, (stage, split) in enumerate(places):
        for other in places[i + 1:]:
            if other[1] == split:
                continue
            held, survey = surveys[stage, split], surveys[other]
            shared = np.isin(held.keys, survey.keys)
            if shared.any():
                first = shared.argmax()
                line = survey.lines[np.flatnonzero(np.array(survey.keys) == held.keys[first])[0]]
                fate = ("training leaves them out" if other[1] == "train" else
                        "what is chosen by validation is then measured on them")
                yield (f"leak: {shared.sum():,} of {len(shared):,} records of {held.path.name} begin as records "
                       f"of {survey.path.name} do ({held.unit} {held.lines[first]} and {survey.unit} {line}): {fate}")


def report_splits(files: Files, o: CheckOptions) -> str:
    """Print how many records training would have in each split. Returns why it would refuse the
    files, or ""."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # what it says stands above already
            records, left_out = divide(files, True, parse_fields(o.fields))
        dialogues = {split: dialogues_of(records, split, "{prompt}") for split in SPLITS}
        reason = keep_for_judges(records, o.judge_share)
        several = settle_beside(records)
    except UserError as error:
        return str(error)
    for line in filter(None, (reason and f"judges: {reason}", several)):
        print(line)
    rows = [{"stage": stage, "left": left_out[stage],
             **{split: len(records.get((stage, split), ())) for split in SPLITS}}
            for stage in dict.fromkeys(stage for stage, _ in records)]
    if any(dialogues.values()):
        rows.append({"stage": "dialogues that pretraining reads",
                     **{split: len(dialogues[split]) for split in SPLITS}})
    print(table(rows, {"stage": "split into", **{split: split for split in SPLITS},
                       "left": "left out of training"}))
    return ""
