"""The data set ratings: each text with people's own scores, the sentences of a document together."""
import io
import pathlib
import shutil
import tarfile

import pytest

from data.groups import word_key
from data.prepare import open_data, prepare
from data.sets import ratings
from data.sets.ratings import INNER, PACKAGE, SOURCES, clean, groups_of, rated_texts
from runtime.options import UserError

PLACES = [("reward", "train"), ("judge", "train"), ("reward", "val"), ("reward", "test")]
DOWNLOADED = pathlib.Path("/tmp/dl") / PACKAGE.archive
QUOTE = "the one and only sentence of many words that two of the newspapers printed that day"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A folder with the eight files: single tweets and film texts, documents of five sentences."""
    folder = tmp_path_factory.mktemp("ratings")
    for s, name in enumerate(SOURCES):
        truth, scores = [], []
        for i in range(200):
            number = f"{i // 5}_{i % 5}" if s > 1 else str(i)
            words = f"text {i} of {name} number{i} says that the {'good' if i % 3 else 'bad'} thing is it{i}"
            text = f"{QUOTE} {i}" if s == 3 and i in (7, 70) else words
            truth.append(f"{number}\t0.5\t{text}\r\n")
            scores.append(f"{number}\t0.5\t0.1\t[{i % 5 - 2}, 1, 1]\n")
        (folder / f"{name}_GroundTruth.txt").write_text("".join(truth), encoding="utf-8-sig", newline="")
        (folder / f"{name}_anonDataRatings.txt").write_text("".join(reversed(scores)), encoding="utf-8-sig")
    return folder


def files_of(folder):
    return [folder / name for name in PACKAGE.files]


@pytest.fixture(scope="module")
def data(source, tmp_path_factory):
    return open_data("ratings", source=str(source), vocab_size=500, cache=tmp_path_factory.mktemp("c"))


def texts(data, *place):
    return [r["prompt"] + r["response"] for r in data.records(*place)]


def test_every_text_is_there_with_its_own_scores(data):
    records = [r for place in PLACES for r in data.records(*place)]
    assert len(records) == 800
    for r in records:
        text = r["prompt"] + r["response"]
        if QUOTE not in text:
            assert r["scores"] == [int(text.split()[1]) % 5 - 2, 1, 1]
        assert r["score"] == sum(r["scores"]) / 3


def test_a_documents_sentences_are_in_one_place(data):
    places = {}
    for place in PLACES:
        for text in texts(data, *place):
            if "Snippets" in text and "movie" not in text:
                places.setdefault((text.split()[3], int(text.split()[1]) // 5), set()).add(place)
    assert len(places) == 80
    assert all(len(of_document) == 1 for of_document in places.values())
    assert set.union(*places.values()) == set(PLACES)


def test_documents_that_quote_each_other_are_in_one_place(source):
    rated = rated_texts(files_of(source))
    groups = dict(zip((r.document for r in rated), groups_of(rated), strict=True))
    news = SOURCES[3]
    assert groups[f"{news} 1"] == groups[f"{news} 14"]
    assert groups[f"{news} 1"] != groups[f"{news} 2"]


def test_no_held_out_text_is_read_in_training(data):
    read = word_key(data.tokenizer.decode(data.documents("train").tokens))
    held_out = [t for split in ("val", "test") for t in texts(data, "reward", split)]
    assert len(held_out) > 60
    assert not [t for t in held_out if word_key(t) in read]


def test_repeats_are_there_once(source, tmp_path):
    shutil.copytree(source, tmp_path / "s")
    with open(tmp_path / "s/tweets_GroundTruth.txt", "a", encoding="utf-8") as file:
        file.write("200\t0\tTEXT 3 of tweets number3 says that the bad thing is it3!\n")
    with open(tmp_path / "s/tweets_anonDataRatings.txt", "a", encoding="utf-8") as file:
        file.write("200\t0\t0\t[4, 4]\n")
    data = open_data("ratings", source=str(tmp_path / "s"), vocab_size=400, cache=tmp_path / "c")
    assert sum(len(data.records(*place)) for place in PLACES) == 800


def test_a_limit_takes_some_of_each_source(source, tmp_path):
    data = open_data("ratings", source=str(source), vocab_size=300, limit=200, cache=tmp_path)
    found = [t for place in PLACES for t in texts(data, *place)]
    assert len(found) == 200
    assert all(any(name in t for t in found) for name in SOURCES)


def test_marks_of_web_pages_become_signs():
    assert clean("S&amp;M, A &amp;amp; B: ''so''  it\tis") == 'S&M, A & B: "so" it is'


# ---- raw files -----------------------------------------------------------------------------------

def package(source, path, inner=True):
    """An archive as published, with the archive of the files in it, or that archive alone."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        archive.add(source, "hutto_ICWSM_2014")
    if not inner:
        path.write_bytes(buffer.getvalue())
        return path
    with tarfile.open(path, "w:gz") as archive:
        member = tarfile.TarInfo(f"vaderSentiment-3.3.2/additional_resources/{INNER}")
        member.size = len(buffer.getvalue())
        archive.addfile(member, io.BytesIO(buffer.getvalue()))
    return path


@pytest.mark.parametrize("inner", [True, False])
def test_the_package_or_the_archive_in_it_serves_as_source(source, tmp_path, inner):
    path = package(source, tmp_path / "p.tar.gz", inner)
    assert rated_texts([path]) == rated_texts(files_of(source))


def test_a_damaged_inner_archive_is_refused(tmp_path):
    with tarfile.open(tmp_path / "p.tar.gz", "w:gz") as archive:
        member = tarfile.TarInfo(f"vaderSentiment-3.3.2/additional_resources/{INNER}")
        member.size = 8
        archive.addfile(member, io.BytesIO(b"nonsense"))
    with pytest.raises(UserError, match="p.tar.gz: not a readable archive.*--source"):
        rated_texts([tmp_path / "p.tar.gz"])


@pytest.mark.parametrize("name,content,message", [
    ("tweets_GroundTruth.txt", "1\t0.5\n", "tweets_GroundTruth.txt, line 1: has 2 columns"),
    ("tweets_GroundTruth.txt", "999\t0.5\thello\n", "no ratings of text 999"),
    ("tweets_anonDataRatings.txt", "".join(f"{i}\t0\t0\t[5]\n" for i in range(200)), "text 0: ratings.*from -4 to 4"),
    ("tweets_anonDataRatings.txt", "".join(f"{i}\t0\t0\t[1,\n" for i in range(200)), "text 0: ratings are"),
    ("tweets_anonDataRatings.txt", "\n", "anonDataRatings.txt is empty"),
    ("nytEditorialSnippets_GroundTruth.txt", None, "GroundTruth.txt is missing")])
def test_a_bad_file_is_named(source, tmp_path, name, content, message):
    shutil.copytree(source, tmp_path / "s")
    (tmp_path / "s" / name).unlink()
    if content is not None:
        (tmp_path / "s" / name).write_text(content)
    with pytest.raises(UserError, match=message):
        prepare("ratings", source=str(tmp_path / "s"), cache=tmp_path / "c")


@pytest.mark.skipif(not DOWNLOADED.exists(), reason="the real file is not here")
def test_the_counts_of_the_real_file():
    rated = rated_texts([DOWNLOADED])
    assert len(rated) == 23703
    assert len(ratings.distinct(rated)) == 23445
    counts = {len(r.scores) for r in rated}
    assert (min(counts), max(counts)) == (15, 99)
    assert {s for r in rated for s in r.scores} == set(range(-4, 5))
    assert len({r.document for r in rated if r.document.startswith("nyt")}) == 498
