"""Chinese and English as headlines need them: words, sentences, names and numbers.

Chinese names come from a newspaper whose words people tagged; English ones are words that stand
capitalised inside sentences. Both lists are rough: they serve to make wrong headlines
(data/headlines.py) and to count what a headline states (data/headlines_report.py).
"""
import collections
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from data.dataset import text_hash

NUMERALS = "〇零一二三四五六七八九十百千万亿两"
NUMBER = re.compile(rf"[0-9]+(?:[.,·][0-9]+)*%?|[{NUMERALS}]{{2,}}")
LONGEST_NAME = 12  # characters of a Chinese name
WORD = re.compile(r"[^\W\d_]+(?:['’.-][^\W\d_]+)*|[0-9]+(?:[.,][0-9]+)*%?")
DATES = frozenset("Monday Tuesday Wednesday Thursday Friday Saturday Sunday January February March April May June July "
                  "August September October November December".split())
PLACE = frozenset(["in", "at", "from", "near", "across"])  # what stands before the name of a place
NATION = re.compile("(?:ian|ean|can|ese|ish|German|Iraqi|Israeli)s?$")
NO_BREAK = re.compile(r"(?:\b[A-Z]|\b(?:Mr|Mrs|Ms|Dr|St|Gen|Sen|Rep|Gov|Lt|Col|Jr|Sr|No|vs|Inc|Ltd|Co|Corp|"
                      r"Jan|Feb|Aug|Sept|Oct|Nov|Dec))\.$")  # a full stop that ends no sentence


class Language(NamedTuple):
    """What is known of a language.

    code: zh or en. words: a text as the units of ROUGE-L and of retrieval, in lower case. sentences:
    a text cut into sentences, which `joint` joins. size: the length of a text, of which a passage
    has `shown` at most. clauses: what stands between clauses. names: every known name and its kind.
    find: (begin, end, kind) of the names and numbers in a text. general: by kind, the words that
    make a name vague. phrases: around one word, for headlines without names.
    """

    code: str
    words: Callable[[str], list[str]]
    sentences: Callable[[str], list[str]]
    joint: str
    size: Callable[[str], int]
    shown: int
    clauses: str
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

    def passages(self, text: str) -> list[str]:
        """The text as pieces of whole sentences, each as long as is shown to the policy."""
        return list(passages(self.sentences(text), self.joint, self.size, self.shown))

    def beginning(self, text: str) -> str:
        """The first piece, or "" if the first sentence is longer than a piece."""
        first = self.sentences(text)[:1]
        return self.passages(text)[0] if first and self.size(first[0]) <= self.shown else ""

    def lead(self, passage: str) -> str:
        """The clause that shares most with the others, as long as a headline is; "" without one."""
        return key_clause(self.cut(passage), self.words, 6, 24)

    def cut(self, passage: str) -> list[str]:
        """The clauses of a passage."""
        clauses = [clause.strip() for clause in re.split(self.clauses, passage)]
        return [clause for clause in clauses if clause]

    def exercise(self, passage: str) -> tuple[str, str]:
        """(three clauses of the passage, the same ones in another order), drawn by a hash; ("", "")
        if it has fewer. Half of such a dialogue can be copied, which a model has to learn before it
        can put an article's words into a headline."""
        clauses, draw = self.cut(passage), text_hash("exercise " + passage)
        if len(clauses) < 3:
            return "", ""
        first = draw % (len(clauses) - 2)
        three = clauses[first:first + 3]
        order = ((1, 2, 0), (2, 0, 1), (2, 1, 0), (0, 2, 1), (1, 0, 2))[draw // 64 % 5]
        joint = ("," if self.code == "zh" else ", ")
        return joint.join(three), joint.join(three[i] for i in order)


def passages(sentences: Iterable[str], joint: str, size: Callable[[str], int],
             limit: int) -> Iterator[str]:
    """A text's sentences, joined to pieces as long as `limit` allows, measured by `size`. Sentences
    that are longer than that are left out.

    >>> list(passages(["One two.", "Three.", "Four five six."], " ", lambda s: len(s.split()), 4))
    ['One two. Three.', 'Four five six.']
    """
    text = ""
    for sentence in sentences:
        longer = text + joint + sentence if text else sentence
        if size(longer) > limit:
            if text:
                yield text
            longer = sentence if size(sentence) <= limit else ""
        text = longer
    if text:
        yield text


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


# ---- Chinese -------------------------------------------------------------------------------------

def characters(text: str) -> list[str]:
    """Letters and digits of a Chinese text, one by one."""
    return [c for c in text.lower() if c.isalnum()]


def chinese_sentences(text: str) -> list[str]:
    """A Chinese text cut behind 。 ! and ?, but not where a quotation ends with it."""
    return [s for s in re.split(r"(?<=[。!?])(?![”』])", text) if s]


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


# ---- English -------------------------------------------------------------------------------------

def lower_words(text: str) -> list[str]:
    """Words and numbers of an English text in lower case, without 's."""
    return [bare(word.group().lower()) for word in WORD.finditer(text)]


def english_sentences(text: str) -> list[str]:
    """An English text cut behind . ! and ? that end a sentence, not an abbreviation."""
    sentences, begin = [], 0
    for match in re.finditer(r"[.!?][\"'”’]?\s+(?=[A-Z\"'“‘])", text):
        if not NO_BREAK.search(text[:match.start() + 1]):
            sentences.append(text[begin:match.end()].strip())
            begin = match.end()
    return [s for s in [*sentences, text[begin:].strip()] if s]


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


# ---- both ----------------------------------------------------------------------------------------

def chinese(names: Mapping[str, str]) -> Language:
    """Chinese, with these names."""
    return Language("zh", characters, chinese_sentences, "", len, 110, "[,。;:!?、]", names, find_chinese,
                    {"person": ("有关领导", "有关人士"), "place": ("某地", "有关地区"),
                     "body": ("有关部门", "有关单位"), "number": ("若干", "一些")},
                    ("{topic}有关情况", "关于{topic}的消息", "{topic}工作取得新进展"))


def english(names: Mapping[str, str]) -> Language:
    """English, with these names."""
    return Language("en", lower_words, english_sentences, " ", lambda text: len(text.split()), 60,
                    "[,;:.!?] |[.!?]$", names, find_english,
                    {"person": ("an official", "someone"), "place": ("a country", "one place"),
                     "nation": ("foreign", "one country's"), "date": ("one day", "a while ago"),
                     "number": ("several", "some")},
                    ("Latest news on {topic}", "What we know about {topic}", "Something new about {topic}"))


LANGUAGES: dict[str, Callable[[Mapping[str, str]], Language]] = {"zh": chinese, "en": english}
