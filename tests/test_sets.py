"""A data set is one record: registered from a test, it is prepared and trained on like any other;
and mixtures."""
import functools
import json
import math

import pytest

import train
from data.batches import PackedDocuments
from data.tokenizer import train_bpe
from data.dataset import DataSet, DataWriter, Part, split_of
from data.prepare import PrepareOptions, open_data, open_for
from data.prepared import Prepared
from data.sets import DATA_SETS, register
from runtime.options import UserError, parse


@pytest.fixture
def registry():
    """Forget what a test registers."""
    before = dict(DATA_SETS)
    yield DATA_SETS
    DATA_SETS.clear()
    DATA_SETS.update(before)


# ---- a data set of one's own ---------------------------------------------------------------------

def build_counting(folder, files, vocab_size) -> DataWriter:
    """Counting in words, to pretrain on and as dialogues."""
    words = "zero one two three four five six seven eight nine".split()
    texts = {split: [] for split in ("train", "val", "test")}
    for n in range(1000):
        text = " ".join(words[int(digit)] for digit in str(n))
        texts[split_of(text)].append(text)
    out = DataWriter(folder, train_bpe(texts["train"], vocab_size))
    for split, of_split in texts.items():
        ids = [[out.tokenizer.eot_id, *out.tokenizer.encode(t)] for t in of_split]
        out.documents(split, [("text", i) for i in ids], sum(map(len, of_split)))
        out.records("sft", split, [{"prompt": t.split()[0], "response": t} for t in of_split])
    return out


def test_a_data_set_can_be_registered_from_a_test(registry, tmp_path):
    register(DataSet("counting", None, build_counting, "Count from {prompt}",
                     options=("vocab_size",)))
    data = open_data("counting", vocab_size=300, cache=tmp_path)
    train = data.documents("train")
    shares, early = data.mixture()
    inputs, _, _ = PackedDocuments(train, window=16, batch=4, total_tokens=1000, seed=0,
                                   shares=shares, early=early).batch(0)
    assert set(data.tokenizer.decode(inputs[0].tolist()).replace("<|endoftext|>",
                                                                 " ").split()) & {"one", "two"}
    assert {r["response"].split()[0] for r in data.records("sft", "train")} >= {"one", "two"}
    assert data.template == "Count from {prompt}"


def test_a_registered_data_set_is_trained_on_like_any_other(registry, tmp_path, monkeypatch):
    register(DataSet("counting", None, build_counting, options=("vocab_size",)))
    monkeypatch.setattr("data.prepare.open_data", functools.partial(open_data, cache=tmp_path))
    words = ["--data=counting", "--preset=smoke", "--vocab_size=300", "--tokens=10000",
             "--compile=off",
             "--log_every=1", f"--out={tmp_path}"]
    train.pretrain(parse(train.PretrainOptions, words, "x"))
    lines = (tmp_path / "counting/pretrain/metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines if "loss" in json.loads(line)]
    assert losses[-1] < .8 * losses[0]


def test_options_that_its_record_does_not_name_are_refused(registry):
    register(DataSet("counting", None, build_counting, options=("vocab_size",)))
    for word in ("--source=x", "--limit=3"):
        with pytest.raises(UserError, match="has no effect on counting"):
            open_for(parse(PrepareOptions, [word], "x"), "counting")


def test_its_source_gets_the_path_and_the_folder_for_downloads(registry, tmp_path):
    asked = []

    def source(path, downloads):
        asked.append((path, downloads))
        (tmp_path / "raw.txt").write_text("x")
        return [tmp_path / "raw.txt"]

    def build(folder, files):
        asked.append(files)
        return build_counting(folder, files, vocab_size=300)

    register(DataSet("counting", source, build, options=("source",)))
    open_data("counting", cache=tmp_path / "c")
    open_data("counting", source=str(tmp_path), cache=tmp_path / "c")
    assert asked == [(None, tmp_path / "c/downloads"), [tmp_path / "raw.txt"],
                     (tmp_path, tmp_path / "c/downloads")]


def test_without_a_download_the_source_has_to_be_given(registry, tmp_path):
    register(DataSet("counting", lambda path, downloads: [path], build_counting,
                     options=("source", "vocab_size")))
    with pytest.raises(UserError, match="counting: its raw data is missing; .*--source"):
        open_data("counting", vocab_size=300, cache=tmp_path)
    (tmp_path / "raw.txt").write_text("x")
    data = open_data("counting", source=str(tmp_path / "raw.txt"), vocab_size=300, cache=tmp_path)
    assert data.has("sft")


def test_a_name_is_taken_once(registry):
    with pytest.raises(ValueError, match="'reviews' already"):
        register(DataSet("reviews", None, build_counting))


@pytest.mark.parametrize("contradiction,message", [
    ({"options": ("source",)}, "without a source"), ({"options": ("seed",)}, "options are"),
    ({"mixture": {"a": Part(.7), "b": Part(.5)}}, "more than 1")])
def test_a_record_that_contradicts_itself_is_an_error(contradiction, message):
    with pytest.raises(ValueError, match=message):
        DataSet("x", None, build_counting, **contradiction)


def test_a_mixture_of_parts_that_are_not_written_is_an_error(registry, tmp_path):
    register(DataSet("counting", None, build_counting, mixture={"poem": Part(.5)},
                     options=("vocab_size",)))
    with pytest.raises(ValueError, match="names poem, but its parts are text"):
        open_data("counting", vocab_size=300, cache=tmp_path)


def test_every_file_of_the_folder_is_a_data_set():
    assert list(DATA_SETS) == ["headlines", "headlines-en", "hh", "imdb", "ratings", "reviews", "shakespeare"]
    assert all(name == data_set.name for name, data_set in DATA_SETS.items())


# ---- mixtures ------------------------------------------------------------------------------------

def with_parts(**parts) -> Prepared:
    """A data set with these parts: name=(share, tokens)."""
    meta = {"data": "toy", "parts": {n: {"share": share, "until": 1.0} for n,
                                     (share, _) in parts.items()},
            "counts": {f"pretrain_train[{n}]": {"documents": 1, "tokens": tokens} for n,
                       (_, tokens) in parts.items()
                       if tokens}}
    return Prepared(None, meta, None)


REVIEWS = {"news": (.15, 500), "review": (None, 100), "dialogue": (.3, 300)}


@pytest.fixture(scope="module")
def reviews(reviews_source, tmp_path_factory):
    return open_data("reviews", source=str(reviews_source), vocab_size=400,
                     cache=tmp_path_factory.mktemp("cache"))


@pytest.mark.parametrize("text", ["", "news=.15,dialogue=.3", " dialogue = 0.3 , news = 15e-2 "])
def test_the_mixture_of_reviews_is_the_usual_one(reviews, text):
    assert reviews.mixture(text) == ({0: .15, 1: 1 - .15 - .3, 2: .3}, {0: .5})


def test_parts_not_named_divide_what_is_left_in_the_proportions_of_the_default():
    shares, _ = with_parts(**REVIEWS).mixture("news=.32")
    assert shares[0] == .32
    assert shares[1] == pytest.approx(.68 * .55 / .85)
    assert shares[2] == pytest.approx(.68 * .30 / .85)


@pytest.mark.parametrize("text,expected", [("news=1", [1, 0, 0]), ("news=0,dialogue=0", [0, 1, 0]),
                                           ("news=.2,review=.3,dialogue=.5", [.2, .3, .5])])
def test_all_of_the_tokens_can_be_given_away(text, expected):
    shares, _ = with_parts(**REVIEWS).mixture(text)
    assert list(shares.values()) == pytest.approx(expected)


@pytest.mark.parametrize("text", ["", "a=.5", "b=.1,c=.2", "c=0"])
def test_shares_sum_to_one(text):
    shares, _ = with_parts(a=(.2, 10), b=(None, 30), c=(None, 60)).mixture(text)
    assert math.fsum(shares.values()) == pytest.approx(1)


def test_parts_without_a_share_count_with_their_tokens():
    shares, _ = with_parts(a=(.2, 10), b=(None, 30), c=(None, 90)).mixture()
    assert list(shares.values()) == pytest.approx([.2, .2, .6])


@pytest.mark.parametrize("text,message", [
    ("newspaper=.3", "no part 'newspaper'; its parts are news, review, dialogue"),
    ("news", "'news' is not NAME=SHARE"), ("news=.1,", "'' is not NAME=SHARE"),
    ("=.1", "no part ''"),
    ("news=much", "'much' is not a number"), ("news=", "'' is not a number"),
    ("news=nan", "news must be from 0 to 1"),
    ("news=-.1", "news must be from 0 to 1"), ("news=15", "news must be from 0 to 1"),
    ("news=.9,dialogue=.3", "1.2 together, more than 1"), ("news=.1,news=.2", "two shares"),
    ("news=.2,review=.2,dialogue=.3", "0.7 together, and no part is left")])
def test_a_mixture_that_cannot_be_is_refused(text, message):
    with pytest.raises(UserError, match=message):
        with_parts(**REVIEWS).mixture(text)


def test_a_mixture_of_one_part_has_no_effect():
    with pytest.raises(UserError, match="--mixture has no effect on toy"):
        with_parts(text=(None, 10)).mixture("text=1")
    assert with_parts(text=(None, 10)).mixture() == (None, {})


def test_a_part_without_documents_is_not_there():
    shares, _ = with_parts(a=(.2, 10), b=(None, 30), c=(.3, 0)).mixture()
    assert set(shares) == {0, 1}
    with pytest.raises(UserError, match="no part 'c'"):
        with_parts(a=(.2, 10), b=(None, 30), c=(.3, 0)).mixture("c=.5")
