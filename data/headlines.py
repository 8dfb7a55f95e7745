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
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from data.dataset import text_hash

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


class Language(NamedTuple):
    """What comparisons and measures need to know of a language.

    words: a text as the units of ROUGE-L and of retrieval, in lower case. names: every known name
    and its kind. find: (begin, end, kind) of the names and numbers in a text. general: by kind, the
    words that make a name vague. phrases: around one word, for headlines without names.
    """

    words: Callable[[str], list[str]]
    names: Mapping[str, str]
    find: Callable[[str, Mapping[str, str]], list[tuple[int, int, str]]]
    general: Mapping[str, Sequence[str]]
    phrases: Sequence[str]

    def found(self, text: str) -> list[tuple[int, int, str]]:
        """(begin, end, kind) of the names and numbers in a text."""
        return self.find(text, self.names)

    def stated(self, text: str) -> list[str]:
        """The names and numbers of a text, as they are written."""
        return [text[begin:end] for begin, end, _ in self.found(text)]


# ---- sentences -----------------------------------------------------------------------------------

def beginning_of(sentences: Sequence[str], joint: str, size: Callable[[str], int], limit: int) -> str:
    """As many whole sentences as `limit` allows, measured by `size`; "" if the first is too long.

    >>> beginning_of(["One two.", "Three.", "Four five six."], " ", lambda s: len(s.split()), 4)
    'One two. Three.'
    """
    text = ""
    for sentence in sentences:
        longer = text + joint + sentence if text else sentence
        if size(longer) > limit:
            break
        text = longer
    return text


def key_clause(clauses: Sequence[str], words: Callable[[str], list[str]], least: int,
               most: int) -> str:
    """The clause, of `least` to `most` words, that shares the largest part of its pairs of words
    with the other clauses; "" if none shares any. It says what the paragraph is about, as a headline
    does.

    >>> key_clause(["a cold day", "the rain fell on", "the rain went on"], str.split, 2, 9)
    'the rain fell on'
    """
    pairs = [set(itertools.pairwise(words(clause))) for clause in clauses]
    count = collections.Counter(pair for of_clause in pairs for pair in of_clause)
    best, highest = "", 0.0
    for clause, of_clause in zip(clauses, pairs, strict=True):
        share = sum(count[pair] > 1 for pair in of_clause) / max(1, len(of_clause))
        if least <= len(of_clause) + 1 <= most and share > highest:
            best, highest = clause, share
    return best


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


# ---- splits --------------------------------------------------------------------------------------

def groups(articles: Sequence[Article], key: Callable[[str], str], run: int) -> list[str]:
    """A key for each article, equal for near-repeats: those with one headline, or whose beginnings
    share `run` characters, and those connected through others (union–find)."""
    leader = list(range(len(articles)))

    def find(i: int) -> int:
        while leader[i] != i:
            leader[i] = leader[leader[i]]
            i = leader[i]
        return i

    first: dict[str, int] = {}
    for i, article in enumerate(articles):
        text = key(article.beginning)
        runs = [text[j:j + run] for j in range(max(1, len(text) - run + 1))]
        for piece in [f"headline {key(article.headline)}", *runs]:
            other = first.setdefault(piece, i)
            if other != i:
                leader[find(i)] = find(other)
    return [key(articles[find(i)].headline) for i in range(len(articles))]


# ---- languages -----------------------------------------------------------------------------------

NUMERALS = "〇零一二三四五六七八九十百千万亿两"
NUMBER = re.compile(rf"[0-9]+(?:[.,·][0-9]+)*%?|[{NUMERALS}]{{2,}}")
LONGEST_NAME = 12  # characters of a Chinese name
WORD = re.compile(r"[^\W\d_]+(?:['’.-][^\W\d_]+)*|[0-9]+(?:[.,][0-9]+)*%?")
DATES = frozenset("Monday Tuesday Wednesday Thursday Friday Saturday Sunday January February March April May June July "
                  "August September October November December".split())
NATION = re.compile("(?:ian|ean|can|ese|ish|German|Iraqi|Israeli)s?$")
PLACE = frozenset(["in", "at", "from", "near", "across"])  # what stands before the name of a place


def characters(text: str) -> list[str]:
    """Letters and digits of a Chinese text, one by one."""
    return [c for c in text.lower() if c.isalnum()]


def lower_words(text: str) -> list[str]:
    """Words and numbers of an English text in lower case, without 's."""
    return [bare(word.group().lower()) for word in WORD.finditer(text)]


def chinese_names(paragraphs: Sequence[Sequence[tuple[str, str]]]) -> dict[str, str]:
    """Names in paragraphs of (word, tag), with their kinds: person, place, body (an institution).

    A surname and a given name are tagged apart, and are joined. A word is a name if it is tagged as
    one, and if most places where its characters stand are it: others are parts of other words.
    """
    kinds = {"nr": "person", "ns": "place", "nt": "body", "nz": "body"}
    tags: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for paragraph in paragraphs:
        for (surname, before), (word, tag) in zip([("", ""), *paragraph], paragraph, strict=False):
            if tag == before == "nr" and len(surname) <= 2:
                tags[surname + word]["nr"] += 1
            elif tag in kinds and len(word) <= LONGEST_NAME:
                tags[word][tag] += 1
    tags = {word: of_word for word, of_word in tags.items() if len(word) > 1}
    standing: collections.Counter[str] = collections.Counter()
    for paragraph in paragraphs:
        text = "".join(word for word, tag in paragraph if tag)
        standing.update(piece for n in (2, 3) for i in range(len(text) - n + 1)
                        if (piece := text[i:i + n]) in tags)
    return {word: kinds[of_word.most_common(1)[0][0]] for word, of_word in tags.items()
            if of_word.total() > .7 * standing[word]}


def find_chinese(text: str, names: Mapping[str, str]) -> list[tuple[int, int, str]]:
    """(begin, end, kind) of names and numbers, the longest one first where several begin."""
    found, i = [], 0
    while i < len(text):
        number = NUMBER.match(text, i)
        end = next((j for j in range(min(len(text), i + LONGEST_NAME), i + 1, -1)
                    if text[i:j] in names), 0)
        if end or number:
            kind = names[text[i:end]] if end else "number"
            found.append((i, end or number.end(), kind))
        i = found[-1][1] if end or number else i + 1
    return found


def english_names(texts: Iterable[str]) -> dict[str, str]:
    """Words that are capitalised inside sentences, twice or more and nearly always, pairs of
    capitalised words, and abbreviations; with their kinds: date, place (often after "in" or
    "from"), nation (by its ending), or person, which may be an institution, too."""
    count, capital, placed, named = (collections.Counter() for _ in range(4))
    for text in texts:
        before = None
        for match in WORD.finditer(text):
            word = bare(match.group())
            inside = before is not None and text[before.end():match.start()] in (" ", ", ")
            if inside:
                count[word.lower()] += not word.isupper()
                capital[word] += word[0].isupper()
                placed[word] += before.group().lower() in PLACE
                if word[0].isupper() and before.group()[0].isupper() and text[before.end()] == " ":
                    pair = f"{bare(before.group())} {word}"
                    capital[pair] += 1
                    named[word] += 1
                    place_before = text[:before.start()].rstrip().rpartition(" ")[2].lower() in PLACE
                    placed[pair] += place_before
            before = match

    def kind(word: str) -> str:
        if word in DATES:
            return "date"
        if placed[word] > max(.1 * capital[word], .5 * named[word]):
            return "place"
        return "nation" if NATION.search(word) else "person"

    return {word: kind(word) for word, n in capital.items() if n > 1
            and (word.isupper() and len(word) > 1 or n > (2 if " " in word else .9 * count[word.lower()]))}


def bare(word: str) -> str:
    """A word without its 's."""
    return word.removesuffix("'s").removesuffix("’s")


def find_english(text: str, names: Mapping[str, str]) -> list[tuple[int, int, str]]:
    """(begin, end, kind) of names and numbers; words of a name side by side are one, of its last
    word's kind."""
    found: list[tuple[int, int, str]] = []
    words = [(match.start(), bare(match.group())) for match in WORD.finditer(text)]
    pairs = {i for i, ((a, first), (b, second)) in enumerate(zip(words, words[1:], strict=False))
             if text[a:b + len(second)] == f"{first} {second}" in names}
    for i, (begin, word) in enumerate(words):
        kind = "number" if word[0].isdigit() else names.get(word)
        if i - 1 in pairs:
            kind = names[f"{words[i - 1][1]} {word}"]
        if kind is None and i in pairs:
            kind = "person"
        if kind is None:
            continue
        apart = {"number", "date", "nation"}
        if found and text[found[-1][1]:begin] == " " and not {kind, found[-1][2]} & apart:
            begin = found.pop()[0]
        found.append((begin, words[i][0] + len(word), kind))
    return found


def chinese(names: Mapping[str, str]) -> Language:
    """Chinese, with these names."""
    return Language(characters, names, find_chinese,
                    {"person": ("有关领导", "有关人士"), "place": ("某地", "有关地区"),
                     "body": ("有关部门", "有关单位"), "number": ("若干", "一些")},
                    ("{topic}有关情况", "关于{topic}的消息", "{topic}工作取得新进展"))


def english(names: Mapping[str, str]) -> Language:
    """English, with these names."""
    return Language(lower_words, names, find_english,
                    {"person": ("an official", "someone"), "place": ("a country", "one place"),
                     "nation": ("foreign", "one country's"), "date": ("one day", "a while ago"), "number": ("several", "some")},
                    ("Latest news on {topic}", "What we know about {topic}", "Something new about {topic}"))
