"""Records: each form that users bring is read, and a bad line is refused with file, line and
reason."""
import json
import math

import pytest

from data.records import as_messages, load_records, prompt_text, write_records
from runtime.options import UserError
from runtime.terminal import lacking
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
    ("sft", [{"prompt": "x"}, {"prompt": "y"}], "each record of the list on a line of its own"),
    ("sft", {"prompt": "x"}, r"fields found: prompt; forms.*dialogues \(prompt, response\)"),
    ("sft", {"messages": [], "response": "y"}, "keep one"),
    ("sft", {"messages": [{"role": "user", "content": "x"},
                          {"role": "assistant", "content": "", "tool_calls": [{}]}]}, "calls a tool"),
    ("sft", {"prompt": 3, "response": "y"}, '"prompt"'),
    ("sft", {"messages": []}, "without messages"),
    ("sft", {"messages": "x"}, "a list of messages"),
    ("sft", {"messages": ["x"]}, 'a "role"'),
    ("sft", {"messages": [{"role": "tool", "content": "x"}]}, "role"),
    ("sft", {"messages": [{"role": "user", "content": "x"}]}, "end with the assistant's"),
    ("sft", "[" * 100_000, "nested"),
    ("sft", '{"prompt": ' + "[" * 900 + "]" * 900 + ', "response": "y"}', 'a "role"'),
    ("pretrain", {"txt": "x"}, "fields found: txt; forms that come near: none"),
    ("pretrain", {"text": ""}, '"text" is empty'),
    ("pretrain", '{"text": Infinity}', '"text"'),
    ("reward", {"prompt": "x", "response": "y", "score": 10**400}, "finite"),
    ("reward", {"prompt": "x", "response": "y", "score": -1e30}, "from -1e.15 to 1e.15"),
    ("reward", '{"prompt": "x", "response": "y", "score": -Infinity}', "finite"),
    ("reward", '{"prompt": "x", "response": "y", "score": ' + "9" * 9000 + "}", "finite"),
    ("reward", {"prompt": "x", "response": "y", "label": math.nan}, "label"),
    ("reward", {"prompt": "x", "chosen": "y", "rejected": "y"}, "equal"),
    ("reward", {"prompt": "x", "chosen": "y", "rejected": "y", "tie": True}, "equal"),
    ("reward", {"prompt": "x", "chosen": "y", "rejected": "z", "tie": True, "margin": 1}, "a tie has no .margin"),
    ("reward", {"prompt": "x", "chosen": "y", "rejected": "z", "tie": "maybe"}, '"tie" must be true or false'),
    ("reward", {"prompt": "x", "chosen": "y", "rejected": "z", "part": 3}, '"part" must be a text'),
    ("reward", {"prompt": [{"role": "user", "content": "x"}, {"role": "user", "content": "y"}],
                "chosen": "y", "rejected": "z"}, "roles"),
    ("reward", {"prompt": "x", "response": "y", "scores": []}, '"scores" must be a list of numbers'),
    ("reward", {"prompt": "x", "response": "y", "scores": [1, "2"]}, r'"scores\[1\]" must be a number, is "2"'),
    ("reward", {"prompt": "x", "response": "y", "scores": [1, math.nan]}, "finite"),
    ("reward", {"prompt": "x", "response": "y", "scores": [1, 2], "score": 9}, 'the mean of "scores" 1.5'),
    ("reward", {"prompt": "x", "response": "y", "scores": [1, 2], "label": 1}, "two kinds of feedback"),
    ("reward", {"text": "", "label": 1}, '"text" is empty'),
    ("reward", {"text": "x", "label": -1}, "is -1: write 1 for what is liked"),
    ("reward", {"text": "x", "label": "pos"}, 'is "pos": write 1 for what is liked'),
    ("reward", {"text": "x", "label": 5}, "is 5: ratings are read as scores: --fields score=label"),
    ("reward", {"text": "x", "label": "-0.9"}, "ratings are read as scores"),
    ("reward", {"text": "x", "label": 10**400}, "must be 0 or 1"),
    ("reward", {"text": "x", "label": [1]}, "must be 0 or 1"),
    ("reward", {"text": "x", "label": None}, "is null: write 1"),
    ("reward", {"prompt": "x", "chosen": "y", "rejected": "z", "margin": 1e30}, "from -1000 to 1000"),
    ("reward", {"prompt": "x", "response": "y"}, "label"),
    ("reward", {"prompt": "x", "response": "y", "label": 2}, "label"),
    ("reward", {"prompt": "x", "response": "y", "score": "9"}, '"score"'),
    ("reward", {"prompt": "x", "response": "y", "score": True}, '"score"'),
    ("reward", {"prompt": "x", "response": "y", "score": math.nan}, "finite"),
    ("reward", {"prompt": "x", "chosen": "y"}, r"pairs \(prompt, chosen, rejected\)"),
    ("reward", {"prompt": "x", "chosen": "y", "rejected": "z", "margin": "big"}, '"margin"'),
    ("reward", {"prompt": "x", "chosen": "y", "rejected": "z", "margin": math.nan}, "finite"),
    ("reward", {"prompt": "x", "response": "y", "label": 1, "score": 2}, "two kinds of feedback"),
    ("reward", {"prompt": "x", "chosen": "y", "rejected": "z", "label": 1}, "two kinds of feedback"),
    ("reward", {"prompt": "x", "chosen": "y", "rejected": "z", "score": None}, "two kinds of feedback"),
    ("reward", {"chosen": "no transcript", "rejected": "x"}, "transcripts"),
    ("reward", {"chosen": 3, "rejected": "x"}, "fields found: chosen, rejected"),
    ("ppo", {"response": "x"}, "fields found: response; forms that come near: none"),
    ("ppo", {"prompt": [{"role": "assistant", "content": "x"}]}, "role"),
    ("ppo", '{"prompt": "\\ud800"}', "surrogate")])
def test_a_bad_line_is_refused_with_file_line_and_reason(tmp_path, kind, line, message):
    with pytest.raises(UserError, match=f"d.jsonl, line 3: .*{message}"):
        load_records(write(tmp_path / "d.jsonl", GOOD[kind], "", line), kind)


def test_all_bad_lines_are_named_at_once(tmp_path):
    lines = [{"prompt": str(i)} if i % 2 else {"prompt": i} for i in range(50)]
    with pytest.raises(UserError) as caught:
        load_records(write(tmp_path / "d.jsonl", *lines), "ppo")
    assert [f"line {n}:" in str(caught.value) for n in range(1, 22)] == [True, False] * 10 + [False]
    assert "25 bad lines" in str(caught.value) and "--skip_bad" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_bad_lines_are_left_out_on_demand_and_counted(tmp_path, capsys):
    path = write(tmp_path / "d.jsonl", {"prompt": "a"}, "{", {"prompt": 3}, {"prompt": "b"})
    assert load_records(path, "ppo", skip_bad=True) == [{"prompt": "a"}, {"prompt": "b"}]
    assert "2 of 4 records left out" in capsys.readouterr().out
    with pytest.raises(UserError, match="line 1: not JSON"):
        load_records(write(tmp_path / "d.jsonl", "{"), "ppo", skip_bad=True)


@pytest.mark.parametrize("extra", ["NaN", "1" * 9000, "[" * 500 + "]" * 500, "1e999", '"\\ud800"'])
def test_other_fields_are_ignored_whatever_they_hold(tmp_path, extra):
    message = f'{{"role": "user", "content": "q", "id": {extra}}}'
    path = write(tmp_path / "d.jsonl", f'{{"prompt": [{message}], "response": "b", "id": {extra}}}')
    record, = load_records(path, "sft")
    assert record == {"prompt": [{"role": "user", "content": "q"}], "response": "b"}


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



# ---- transcripts of HH ---------------------------------------------------------------------------

START = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Why?\n\nAssistant: "


def test_hh_transcripts_become_prompt_and_answers(tmp_path):
    line = {"chosen": START + "Because.", "rejected": START + "No.", "margin": 2}
    record, = load_records(write(tmp_path / "h.jsonl", line), "reward")
    assert [m["role"] for m in record["prompt"]] == ["user", "assistant", "user"]
    assert (record["chosen"], record["rejected"]) == ("Because.", "No.")
    assert record["margin"] == 2


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


def test_an_error_offers_no_option_that_the_command_lacks(tmp_path):
    """sample.py, evaluate.py and tools.show have no --skip_bad, no --fields and no --template."""
    bad = write(tmp_path / "d.jsonl", {"prompt": "a"}, "{", {"question": "b"})
    rated = write(tmp_path / "e.jsonl", {"prompt": "a", "response": "b", "label": 4})
    mapped = write(tmp_path / "f.jsonl", {"prompt": "a"})

    def errors():
        for path, kind, fields in ((bad, "ppo", {}), (rated, "reward", {}), (mapped, "ppo", {"prompt": "question"})):
            with pytest.raises(UserError) as caught:
                load_records(path, kind, fields=fields)
            yield str(caught.value)

    offered, lacked = list(errors()), []
    with lacking("skip_bad", "fields", "template"):
        lacked = list(errors())
    assert ["--skip_bad" in text and "--fields" in text for text in offered] == [True] * 3
    assert ["--" in text for text in lacked] == [False] * 3
    assert ["mend the file" in text for text in lacked] == [True] * 3
