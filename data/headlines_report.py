"""What can be counted of a headline without any model: the columns of headlines in the report.

    rouge_l     how much of the true headline's words it has in their order (Lin 2004, F1)
    stated      names and numbers in it
    grounded    the share of them that stand in the article
    retrieved   whether it fits its own article better than 19 others

None of them is trained against. A name is a word that data/headlines.py knows as one from the
training text: what it does not know is not counted.
"""
import collections
import json
import math
import pathlib
from collections.abc import Sequence

from data.dataset import text_hash
from data.headlines_language import LANGUAGES, Language
from data.records import prompt_text

NAMES = "names.json"  # in the prepared folder: the language, and its names with their kinds
AMONG = 20  # articles that a headline has to find its own among


def save_names(folder: pathlib.Path, language: Language) -> None:
    """Keep a language's names beside the prepared records."""
    text = json.dumps({"language": language.code, "names": dict(language.names)}, ensure_ascii=False)
    (folder / NAMES).write_text(text, encoding="utf-8")


def load_language(folder: pathlib.Path) -> Language:
    """The language of a prepared folder."""
    state = json.loads((folder / NAMES).read_text(encoding="utf-8"))
    return LANGUAGES[state["language"]](state["names"])


def longest_common(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest sequence that both hold, in order, not necessarily side by side.

    >>> longest_common("police killed the gunman".split(), "police kill the gunman".split())
    3
    """
    row = [0] * (len(b) + 1)  # row[j]: of the words of a so far and the first j of b
    for x in a:
        diagonal = 0
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], diagonal + 1 if x == y else max(row[j], row[j - 1])
    return row[-1]


def rouge_l(reply: Sequence[str], reference: Sequence[str]) -> float:
    """F1 of precision and recall of the longest common subsequence; 0 for an empty one.

    >>> rouge_l("police kill the gunman".split(), "police killed the gunman".split())
    0.75
    """
    common = longest_common(reply, reference)
    return 2 * common / (len(reply) + len(reference)) if common else 0.0


def retrieved(queries: Sequence[Sequence[str]], texts: Sequence[Sequence[str]]) -> list[float]:
    """Whether query i finds text i among AMONG texts, by tf-idf: 1, or 0; of several best ones with
    it among them its share. Both are lists of units; the other texts are drawn by a hash of text i,
    so all policies are asked alike. Repeated texts count once. UserError is not needed: with fewer
    texts, there are fewer to choose from."""
    units = [collections.Counter(grams(text)) for text in texts]
    keys = [" ".join(text) for text in texts]
    distinct = dict(zip(keys, units, strict=True))
    spread = collections.Counter(gram for of_text in distinct.values() for gram in of_text)
    weight = {gram: math.log(1 + len(distinct) / n) for gram, n in spread.items()}
    length = {key: math.sqrt(sum((n * weight[g]) ** 2 for g, n in of_text.items())) or 1.0
              for key, of_text in distinct.items()}
    found = []
    for query, key in zip(queries, keys, strict=True):
        others = sorted((k for k in distinct if k != key), key=lambda k: text_hash(f"among {key} {k}"))
        asked = collections.Counter(grams(query))
        fit = {k: sum(n * weight.get(g, 0.0) ** 2 * distinct[k][g] for g, n in asked.items()) / length[k]
               for k in [key, *others[:AMONG - 1]]}
        best = max(fit.values())
        ties = sum(value == best for value in fit.values())
        found.append(1 / ties if fit[key] == best else 0.0)
    return found


def grams(words: Sequence[str]) -> list[tuple[str, ...]]:
    """The words, and each two side by side."""
    return [*((word,) for word in words), *zip(words, words[1:], strict=False)]


def measures(folder: pathlib.Path, prompts: Sequence, replies: Sequence[str],
             references: Sequence[str] | None = None) -> dict[str, list[float | None]]:
    """Figures of each reply by name, as the head of this file lists them; None where there is
    nothing to take a share of. folder: the prepared data. references: the true headlines, if they
    are known. Without them there is no rouge_l."""
    language = load_language(folder)
    articles = [prompt_text(prompt) for prompt in prompts]
    words = [language.words(reply) for reply in replies]
    stated = [language.stated(reply) for reply in replies]
    figures: dict[str, list[float | None]] = {}
    if references is not None:
        figures["rouge_l"] = [rouge_l(reply, language.words(reference))
                              for reply, reference in zip(words, references, strict=True)]
    figures["stated"] = [float(len(names)) for names in stated]
    figures["grounded"] = [sum(name in article for name in names) / len(names) if names else None
                           for names, article in zip(stated, articles, strict=True)]
    figures["retrieved"] = retrieved(words, [language.words(article) for article in articles])
    return figures
