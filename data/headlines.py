"""Headlines: what an article is, and the comparisons that an editor's choice gives.

An editor gave each article one headline. Every other line that could have stood there was not
chosen, and four kinds of such lines are made here, one for each part of a good headline:

    relevance       another article's headline, of about the same length
    length          the article's own first sentence: right, but too long
    accuracy        the headline with a name or number exchanged for another of its kind
    attractiveness  the headline made vague: general words for its names and numbers, or, if it has
                    none, a phrase around one of its words

The headline is always preferred. Other headlines and other names come from the same split, in equal
numbers, so that for relevance each line is preferred as often as it is not: nothing can be learned
there without reading the article. data/sets/headlines.py reads the articles, in two languages.
"""
import collections
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from data.dataset import text_hash
from data.headlines_language import Language

PARTS = ("relevance", "length", "accuracy", "attractiveness")
OTHERS = 4  # articles whose headlines a headline of the training split is compared with
LONGER = 1.5  # a first sentence of so many headlines is too long


class Article(NamedTuple):
    """An article: its headline, how it begins, and what else of it may be read in pretraining."""

    headline: str
    beginning: str  # whole sentences, what the policy is shown
    first: str  # the first sentence, without its full stop
    paragraphs: tuple[str, ...] = ()
    topic: str = ""  # a word of the headline that a vague phrase is put around
    split: str = "train"
    half: str = "reward"  # whose comparisons it adds to if it is in the train split: reward or judge


# ---- comparisons ---------------------------------------------------------------------------------

def comparisons(articles: Sequence[Article], language: Language, others: int = 1) -> list[dict]:
    """Reward records of the articles of one split, each with its "part". others: headlines of other
    articles that each headline is compared with."""
    lines = {"relevance": list(other_headlines(articles, others)),
             "length": [(a, a.first) for a in articles
                        if len(a.first) >= LONGER * len(a.headline)],
             "accuracy": list(exchanged_names(articles, language)),
             "attractiveness": [(a, vague(a, language)) for a in articles]}
    return [{"prompt": article.beginning, "chosen": article.headline, "rejected": line, "part": part}
            for part in PARTS for article, line in lines[part]
            if line and line != article.headline]


def other_headlines(articles: Sequence[Article], others: int) -> Iterator[tuple[Article, str]]:
    """(article, the headline of another). Articles are put in the order of their headlines' lengths,
    in a ring; each is compared with the next `others`, so that each headline is preferred as often
    as it is not."""
    ring = sorted(articles, key=lambda a: (len(a.headline), text_hash("ring " + a.headline)))
    for step in range(1, min(others, len(ring) - 1) + 1):
        for i, article in enumerate(ring):
            yield article, ring[(i + step) % len(ring)].headline


def exchanged_names(articles: Sequence[Article], language: Language) -> Iterator[tuple[Article, str]]:
    """(article, its headline with one name or number exchanged). The name stands in the beginning
    of the article, so that the error can be seen; the new one is of the same kind, comes from
    another headline, and stands in neither."""
    slots = [(article, begin, end, kind) for article in articles
             for begin, end, kind in language.found(article.headline)]
    by_kind: dict[str, list[str]] = collections.defaultdict(list)
    for article, begin, end, kind in slots:
        by_kind[kind].append(article.headline[begin:end])
    used: set[str] = set()
    for article, begin, end, kind in sorted(slots, key=lambda s: text_hash(f"slot {s[1]} {s[0].headline}")):
        name = article.headline[begin:end]
        if name not in article.beginning or article.headline in used:
            continue
        fitting = [other for other in by_kind[kind]
                   if abs(len(other) - len(name)) <= max(1, len(name) // 3)
                   and other[0].isdigit() == name[0].isdigit()
                   and other not in article.beginning + article.headline]
        if fitting:
            used.add(article.headline)
            other = fitting[text_hash(f"other {article.headline}") % len(fitting)]
            yield article, article.headline[:begin] + other + article.headline[end:]


def vague(article: Article, language: Language) -> str:
    """The headline with general words for its names and numbers; without any, or for half of those
    that have some, a phrase around a word of it. Which words follows from the headline."""
    headline, draw = article.headline, text_hash("vague " + article.headline)
    places = language.found(headline)
    if article.topic and (not places or draw % 2):
        phrase = language.phrases[draw // 2 % len(language.phrases)]
        return phrase.replace("{topic}", article.topic)
    for begin, end, kind in reversed(places):
        general = language.general[kind]
        headline = headline[:begin] + general[draw // 2 % len(general)] + headline[end:]
    return headline[:1].upper() + headline[1:]
