"""23,703 English texts, each rated by 15 to 99 people from −4 (very negative) to +4 (very positive).

Tweets, sentences of film and product reviews, and of newspaper editorials, from the source package of
vaderSentiment (Hutto & Gilbert 2014). The task: an instruction gives the opening words of a text, and
the reply continues them. The reward is the mean of people's ratings; each person's own is kept.

The sentences of one article or product review are in one split, with all texts that quote them. In
the train split, one half of the ratings is for the reward model, the other for the judges.
"""
import collections
import functools
import html
import json
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

from data.dataset import SPLITS, DataSet, DataWriter, Part, split_of, text_hash
from data.downloads import Package, raw_files, read_archive, read_files, text_lines
from data.groups import group_by_shared_runs, word_key
from data.stages import Placed, half_of, records_of, write_stages
from data.records import as_messages
from data.tokenizer import train_bpe
from runtime.options import UserError

SOURCES = ("tweets", "movieReviewSnippets", "amazonReviewSnippets", "nytEditorialSnippets")
PACKAGE = Package(
    "vaderSentiment==3.3.2", "vaderSentiment-3.3.2.tar.gz",
    "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9", "2.5 MB",
    "hutto_ICWSM_2014", tuple(f"{source}_{kind}.txt" for source in SOURCES
                              for kind in ("GroundTruth", "anonDataRatings")))
INNER = "hutto_ICWSM_2014.tar.gz"  # holds the files, and is in the package itself
TEMPLATE = "Continue this text: {prompt}"
PARTS = ("text", "dialogue")
RUN = 12  # words: texts that share so many in a row quote each other
REPLY_LEN = 64  # tokens: texts whose replies have at most so many become dialogues


class Rated(NamedTuple):
    """A text, people's ratings of it, and what it was a sentence of."""

    text: str
    scores: list[int]
    document: str


# ---- raw files -----------------------------------------------------------------------------------

def read(files: Sequence[pathlib.Path]) -> list[bytes]:
    """Contents of the package's files: from a folder of them, the archive that holds them, or the
    package with that archive in it."""
    if len(files) == 1:
        outer = PACKAGE._replace(folder="additional_resources", files=(INNER,))
        inner = read_archive(outer, files[0]).get(INNER)
        if inner is not None:
            contents = read_archive(PACKAGE, files[0], inner)
            return [contents.get(name, b"") for name in PACKAGE.files]
    return read_files(PACKAGE, files)


def rated_texts(files: Sequence[pathlib.Path]) -> list[Rated]:
    """All texts with their ratings, one source after another."""
    contents, rated = read(files), []
    for i, source in enumerate(SOURCES):
        names = PACKAGE.files[2 * i:2 * i + 2]
        scores = {row[0]: row for row in table(contents[2 * i + 1], names[1], 4)}
        for number, _, text in table(contents[2 * i], names[0], 3):
            if number not in scores:
                raise UserError(f"{names[1]}: there are no ratings of text {number}; bring the two "
                                "files as they were published")
            rated.append(Rated(clean(text), parse_scores(scores[number][3], names[1], number),
                               f"{source} {number.partition('_')[0]}"))
    return rated


def table(content: bytes, name: str, n_columns: int) -> list[list[str]]:
    """The rows of a file with tabs between its columns; UserError names a row of another length."""
    if not content.strip():
        raise UserError(f"{name} is empty or missing; {PACKAGE.needs}")
    rows = []
    for i, line in enumerate(text_lines(content, name)):
        row = line.split("\t", n_columns - 1)
        if line and len(row) < n_columns:
            raise UserError(f"{name}, line {i + 1}: has {len(row)} columns with tabs between them, "
                            f"not {n_columns}; bring the file as it was published")
        rows += [row] * bool(line)
    return rows


def parse_scores(text: str, name: str, number: str) -> list[int]:
    """People's ratings, written as [1, 2, −1]; UserError says which text's are something else."""
    try:
        scores = json.loads(text)
    except ValueError:
        scores = None
    if not isinstance(scores, list) or not scores or any(type(s) is not int or abs(s) > 4 for s in scores):
        raise UserError(f"{name}, text {number}: ratings are a list of whole numbers from -4 to 4, "
                        f"not {text[:40]!r}")
    return scores


def clean(text: str) -> str:
    """Without the marks of web pages, which some texts carry twice; two single quotes are one double
    quote."""
    text = html.unescape(html.unescape(text)).replace("''", '"')
    return " ".join(text.split())


# ---- what the stages read ------------------------------------------------------------------------

def distinct(rated: Sequence[Rated]) -> list[Rated]:
    """Each text once. The ratings of its repeats are left out: they are of the same words, but were
    given beside others."""
    first: dict[str, Rated] = {}
    for r in rated:
        if key := word_key(r.text):
            first.setdefault(key, r)
    return list(first.values())


def groups_of(rated: Sequence[Rated]) -> list[str]:
    """The first words of each text's group: of the documents that quote each other."""
    words: dict[str, list[str]] = collections.defaultdict(list)
    for r in rated:
        words[r.document] += word_key(r.text).split()
    leaders = group_by_shared_runs(list(words.values()), RUN)
    names = [" ".join(of_document[:50]) for of_document in words.values()]
    group = {document: names[leader] for document, leader in zip(words, leaders, strict=True)}
    return [group[r.document] for r in rated]


def build(folder: pathlib.Path, files: Sequence[pathlib.Path], vocab_size: int,
          limit: int) -> DataWriter:
    """Divide, train the vocabulary, and write what each stage reads."""
    rated = distinct(rated_texts(files))
    if limit:  # of all four sources
        rated = sorted(rated, key=lambda r: text_hash("order " + r.text))[:limit]
    groups = groups_of(rated)
    splits = [split_of(group) for group in groups]
    tokenizer = train_bpe([r.text for r, split in zip(rated, splits, strict=True) if split == "train"],
                          vocab_size, progress=True)
    out = DataWriter(folder, tokenizer, PARTS)
    placed = [Placed(r.text, {"score": sum(r.scores) / len(r.scores), "scores": r.scores}, split,
                     half_of(group)) for r, group, split in zip(rated, groups, splits, strict=True)]
    records = records_of(out, placed, REPLY_LEN)
    for split in SPLITS:
        of_split = [r for r, s in zip(rated, splits, strict=True) if s == split]
        write_documents(out, split, of_split, records["sft", split])
    write_stages(out, records)
    return out


def write_documents(out: DataWriter, split: str, rated: Sequence[Rated], dialogues: list[dict]) -> None:
    """Whole documents, and half of the training texts as dialogues. A text that is its document's
    only one is read in one of the two forms."""
    tokenizer, documents = out.tokenizer, []
    chosen = {r["prompt"] + r["response"]: r for r in dialogues if split == "train"
              and text_hash("form " + r["prompt"] + r["response"]) % 2 == 0}
    for record in chosen.values():
        ids, _ = tokenizer.render_chat(as_messages(record, TEMPLATE))
        documents.append(("dialogue", [tokenizer.eot_id, *ids]))
    by_document: dict[str, list[str]] = collections.defaultdict(list)
    for r in rated:
        by_document[r.document].append(r.text)
    plain = [" ".join(texts) for texts in by_document.values() if len(texts) > 1 or texts[0] not in chosen]
    documents += [("text", [tokenizer.eot_id, *tokenizer.encode(text)]) for text in plain]
    out.documents(split, documents, len("".join(plain).encode()))


DATA_SET = DataSet(
    "ratings",
    source=functools.partial(raw_files, PACKAGE),
    build=build,
    template=TEMPLATE,
    mixture={"dialogue": Part(0.5)},
    options=("source", "vocab_size", "limit"),
    # SFT takes as many steps as the demo's. The ratings are read three times, with more dropout: correlation
    # on validation, seed 0, .641; half as often with dropout .1 .621, and n-grams .634.
    defaults={"sft": {"epochs": 0.6}, "reward": {"epochs": 3.0, "dropout": 0.2}, "judge": {"epochs": 0.75}},
    summary="English texts with the ratings of 15 to 99 people each",
)
