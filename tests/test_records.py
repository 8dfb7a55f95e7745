"""Records: each form that users bring is read, and a bad line is refused with file, line and
reason."""
import gzip
import json
import math

import pytest

from data.records import as_messages, kind_of, load_records, prompt_text, write_records
from runtime.options import UserError
from tests.conftest import ROOT

GOOD = {"pretrain": {"text": "a"}, "sft": {"prompt": "a", "response": "b"},
        "reward": {"prompt": "a", "response": "b", "label": 1}, "ppo": {"prompt": "a"}}
HH = ROOT.parent / "shared/data/hh-harmless-1500.jsonl.gz"


def write(path, *lines):
    """A file of these lines: texts as they are, anything else as JSON."""
    path.write_text("\n".join(line if isinstance(line, str)
                              else json.dumps(line, ensure_ascii=False)
                              for line in lines) + "\n", encoding="utf-8")
    return path


@pytest.mark.parametrize("kind,line,message", [
    ("sft", "{not json", "Expecting"),
    ("sft", [1], "not a JSON object"),
    ("sft", {"prompt": "x"}, '"response"'),
    ("sft", {"prompt": 3, "response": "y"}, '"prompt"'),
    ("sft", {"messages": []}, "without messages"),
    ("sft", {"messages": "x"}, "a list of messages"),
    ("sft", {"messages": ["x"]}, 'a "role"'),
    ("sft", {"messages": [{"role": "tool", "content": "x"}]}, "role"),
    ("sft", {"messages": [{"role": "user", "content": "x"}]}, "end with the assistant's"),
    ("pretrain", {"txt": "x"}, '"text"'),
    ("reward", {"prompt": "x", "response": "y"}, "label"),
    ("reward", {"prompt": "x", "response": "y", "label": 2}, "label"),
    ("reward", {"prompt": "x", "response": "y", "score": "9"}, '"score"'),
    ("reward", {"prompt": "x", "response": "y", "score": True}, '"score"'),
    ("reward", {"prompt": "x", "response": "y", "score": math.nan}, "finite"),
    ("reward", {"prompt": "x", "chosen": "y"}, '"rejected"'),
    ("reward", {"prompt": "x", "chosen": "y", "rejected": "z", "margin": "big"}, '"margin"'),
    ("reward", {"prompt": "x", "chosen": "y", "rejected": "z", "margin": math.nan}, "finite"),
    ("reward", {"chosen": "no transcript", "rejected": "x"}, "transcripts"),
    ("reward", {"chosen": 3, "rejected": "x"}, "transcripts"),
    ("ppo", {"response": "x"}, '"prompt"'),
    ("ppo", {"prompt": [{"role": "assistant", "content": "x"}]}, "role"),
    ("ppo", '{"prompt": "\\ud800"}', "surrogate")])
def test_a_bad_line_is_refused_with_file_line_and_reason(tmp_path, kind, line, message):
    with pytest.raises(UserError, match=f"d.jsonl, line 3: .*{message}"):
        load_records(write(tmp_path / "d.jsonl", GOOD[kind], "", line), kind)


def test_bytes_that_are_not_utf8_are_refused_with_their_line(tmp_path):
    (tmp_path / "d.jsonl").write_bytes(b'{"prompt": "x"}\n{"prompt": "\xff"}\n')
    with pytest.raises(UserError, match="line 2: not UTF-8"):
        load_records(tmp_path / "d.jsonl", "ppo")


def test_an_empty_file_is_refused(tmp_path):
    with pytest.raises(UserError, match="no records"):
        load_records(write(tmp_path / "e.jsonl", ""), "sft")


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        load_records(tmp_path / "none.jsonl", "sft")


def test_mixed_feedback_is_refused(tmp_path):
    lines = {"prompt": "a", "response": "b", "label": 1}, {"prompt": "a", "response": "b",
                                                           "score": 2}
    with pytest.raises(UserError, match="mixed"):
        load_records(write(tmp_path / "m.jsonl", *lines), "reward")


def test_a_byte_order_mark_is_no_part_of_the_first_line(tmp_path):
    (tmp_path / "d.jsonl").write_bytes(b'\xef\xbb\xbf{"prompt": "x"}\n\n{"prompt": "y"}\n')
    assert [r["prompt"] for r in load_records(tmp_path / "d.jsonl", "ppo")] == ["x", "y"]


def test_records_are_read_as_they_were_written(tmp_path):
    records = [{"prompt": "书\n\u2028", "response": "“好”"}, {"prompt": "a", "response": ""}]
    write_records(tmp_path / "d.jsonl", records)
    assert load_records(tmp_path / "d.jsonl", "sft") == records


@pytest.mark.parametrize("kind", GOOD)
def test_the_stage_of_a_record_is_told_by_its_fields(kind):
    assert kind_of(GOOD[kind]) == kind


def test_other_forms_tell_their_stage_too():
    assert kind_of({"messages": []}) == "sft"
    assert kind_of({"chosen": "", "rejected": ""}) == "reward"


# ---- transcripts of HH ---------------------------------------------------------------------------

START = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Why?\n\nAssistant: "


def test_hh_transcripts_become_prompt_and_answers(tmp_path):
    line = {"chosen": START + "Because.", "rejected": START + "No.", "margin": 2}
    record, = load_records(write(tmp_path / "h.jsonl", line), "reward")
    assert [m["role"] for m in record["prompt"]] == ["user", "assistant", "user"]
    assert (record["chosen"], record["rejected"]) == ("Because.", "No.")
    assert record["margin"] == 2


def test_transcripts_that_differ_early_are_refused(tmp_path):
    line = {"chosen": START + "Because.", "rejected": "\n\nHuman: Ho" + START[11:] + "No."}
    with pytest.raises(UserError, match="differ before their last answer"):
        load_records(write(tmp_path / "h.jsonl", line), "reward")


@pytest.mark.skipif(not HH.exists(), reason="real HH pairs are not beside this checkout")
def test_real_hh_pairs_are_read(tmp_path):
    with gzip.open(HH, "rt", encoding="utf-8") as file:
        lines = file.read().splitlines()[:50]
    records = []
    for line in lines:
        try:
            records += load_records(write(tmp_path / "x.jsonl", line), "reward")
        except UserError:  # a few transcripts differ before the last answer
            continue
    assert len(records) > 40
    assert all(r["prompt"][-1]["role"] == "user" for r in records)


# ---- messages and templates ----------------------------------------------------------------------

def test_only_the_placeholder_of_a_template_is_replaced():
    assert as_messages({"prompt": "a{b}", "response": "c"}, "x{prompt}y")[0]["content"] == "xa{b}y"


def test_messages_are_used_as_they_are():
    assert as_messages({"messages": [1]}, "x{prompt}") == [1]
    asked = [{"role": "user", "content": "q"}]
    assert as_messages({"prompt": asked, "response": "a"}, "x{prompt}")[:-1] == asked


def test_a_prompt_of_messages_is_joined_to_a_text():
    assert prompt_text([{"role": "user", "content": "a"},
                        {"role": "assistant", "content": "b"}]) == "a\nb"
