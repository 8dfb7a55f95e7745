"""The questions in the terminal: by line and by key, in both languages; "saved" is said after it is true."""
import io
import os
import re

import pytest

from runtime.options import UserError
from serve import terminal
from serve.log import FeedbackLog, NotSaved, training_records
from serve.pairs import Card, Fixed, Pairs
from serve.terminal import WORDS, ask, language

CARDS = [Card(f"card {i}", f"prompt {i}", (f"first {i}", f"second {i}"), ("sft", "ppo")) for i in range(6)]


@pytest.fixture
def log(tmp_path, monkeypatch):
    monkeypatch.setenv("LC_ALL", "C.UTF-8")
    with FeedbackLog(tmp_path / "feedback.jsonl") as log:
        yield log


def told(log, lines, mode="compare", cards=CARDS, stdin=None):
    """(how many answers were saved, what was printed) where these lines are piped in."""
    out = io.StringIO()
    with Pairs(Fixed(cards), log) as pairs:
        n = ask(pairs, log, "me", mode, stdin=stdin or io.StringIO("\n".join(lines)), stdout=out)
    return n, out.getvalue()


def test_every_answer_can_be_given_by_line(log):
    n, out = told(log, ["l", "right 2", "t", "b", "s", "left3"])
    assert n == 5
    events = log.events
    assert [event.get("choice", event["kind"]) for event in events] == [
        "left", "right", "tie", "both_bad", "skip", "left"]
    assert [event.get("strength") for event in events] == [None, 2, None, None, None, 3]
    assert re.findall(r"✓ (\d) saved", out) == ["1", "2", "3", "4", "4", "5", "5"]
    assert all(0 <= event["seconds"] < 10 for event in events)
    assert "all is answered" in out


def test_arrows_answer_and_a_number_says_how_sure_and_answers_nothing(log):
    n, _ = told(log, ["\x1b[D", "2", "\x1b[C", "3", "t", "l"])
    assert n == 4
    assert [(event["choice"], event.get("strength")) for event in log.events] == [
        ("left", None), ("right", 2), ("tie", None), ("left", None)]


def test_a_name_that_both_replies_have_is_not_told(log):
    assert "sft" not in told(log, ["l"], cards=[Card("c", "p", ("a", "b"), ("sft", "sft"))])[1]


def test_prompt_and_replies_are_shown_whole_and_names_only_after_the_answer(log):
    long = [Card("c", [{"role": "system", "content": "Be kind"}, {"role": "user", "content": "x" * 3000}],
                 ("a" * 5000, "b" * 5000), ("sft", "ppo"))]
    _, out = told(log, ["l"], cards=long)
    for text in ("system: Be kind", "user: " + "x" * 3000, "a" * 5000, "b" * 5000):
        assert text in out
    assert out.index("b" * 5000) < out.index("sft")
    assert out.index("✓ 1 saved") < out.index("sft")


def test_quitting_and_the_end_of_input_keep_what_was_saved_and_the_next_time_goes_on(log):
    assert told(log, ["l", "r", "q", "l"])[0] == 2
    assert told(log, ["t"])[0] == 1
    assert told(log, [])[0] == 0
    assert [event["card"] for event in log.events] == ["card 0", "card 1", "card 2"]


def test_undo_brings_the_last_card_back(log):
    n, out = told(log, ["u", "l", "u", "r", "s", "undo", "l"])
    assert n == 3
    assert "nothing to take back" in out
    assert "taken back: left" in out
    assert "taken back: skip" in out
    assert [(event["card"], event["choice"]) for event in log.standing()] == [("card 0", "right"), ("card 1", "left")]
    assert len(log.events) == 6


def test_what_is_no_answer_is_said_and_asked_again(log):
    n, out = told(log, ["perhaps", "12", "", "?", "left"])
    assert n == 1
    assert "perhaps is no answer" in out and "12 is no answer" in out


def test_an_edit_and_a_comment_are_saved_with_the_answer(log):
    told(log, ["e", "right", "a better one", "c", "too long", "l", "e", "l", "", "r", "e", "what", "l"])
    answer, edit, second, third = log.events
    assert answer["comment"] == "too long"
    assert (edit["kind"], edit["of"], edit["original"], edit["response"]) == (
        "edit", answer["id"], answer["right"], "a better one")
    assert "comment" not in second and third["kind"] == "pair"
    assert training_records(log.events)["sft"] == [{"prompt": "prompt 0", "response": "a better one"}]


def test_an_undo_takes_the_edit_back_too(log):
    told(log, ["e", "l", "new", "l", "u", "r"])
    assert [event["kind"] for event in log.standing()] == ["pair"]


@pytest.mark.parametrize("mode,lines,field,values", [("rate", ["5", "0", "1"], "score", [5, 1]),
                                                     ("label", ["+", "n", "3", "bad"], "label", [1, 0, 0])])
def test_ratings_and_labels(log, mode, lines, field, values):
    single = [Card(f"card {i}", f"prompt {i}", (f"reply {i}",), ("sft",), ("",)) for i in range(5)]
    n, out = told(log, lines, mode, single)
    assert [event[field] for event in log.events] == values
    assert n == len(values)
    assert "[reply]\nreply 0" in out


def test_saved_is_never_said_of_what_is_not(log, monkeypatch):
    real = log.append

    def fails(record):
        monkeypatch.setattr(log, "append", real)
        raise NotSaved(log.path, "No space left on device")

    monkeypatch.setattr(log, "append", fails)
    n, out = told(log, ["l", "r"])
    assert n == 1
    assert out.index("not saved: No space left on device; the question stays") < out.index("✓ 1 saved")
    assert [(event["card"], event["choice"]) for event in log.events] == [("card 0", "right")]


def test_everything_is_said_in_both_languages(log, monkeypatch):
    values = {tongue: {name: sorted(re.findall(r"{(\w*)", text)) for name, text in words.items()}
              for tongue, words in WORDS.items()}
    assert values["en"] == values["zh"]
    monkeypatch.setenv("LC_ALL", "zh_CN.UTF-8")
    n, out = told(log, ["左", "跳过", "撤销", "平", "退出"])
    assert n == 2
    assert "✓ 已保存 2 条" in out and "\n[左]\n" in out and "已撤销：跳过" in out
    assert not re.search("saved|left|skip", out.replace("sft", ""))


@pytest.mark.parametrize("environment,expected", [
    ({"LANG": "zh_CN.UTF-8"}, "zh"), ({"LANG": "en_GB.UTF-8"}, "en"), ({}, "en"),
    ({"LANG": "zh_TW", "LC_ALL": "C"}, "en"), ({"LC_MESSAGES": "zh", "LANG": "de"}, "zh"),
    ({"LC_ALL": "", "LANG": "ZH"}, "zh")])
def test_the_language_is_the_locales(environment, expected):
    assert language(environment) == expected


def test_a_models_text_has_no_power_over_the_terminal(log):
    evil = [Card("c", "p", ("\x1b[2J gone", "plain"), ("sft", "ppo"))]
    out = type("Terminal", (io.StringIO,), {"isatty": lambda self: True})()
    with Pairs(Fixed(evil), log) as pairs:
        ask(pairs, log, "me", stdin=io.StringIO("l\n"), stdout=out)
    out = out.getvalue()
    assert "\x1b" not in out
    assert "\\u001b[2J gone" in out


def test_that_no_replies_can_be_made_ends_it_with_a_line(log):
    class Broken(Fixed):
        def make(self, numbers):
            raise UserError("the model is gone")

    with pytest.raises(UserError, match="the model is gone"), Pairs(Broken(CARDS), log) as pairs:
        ask(pairs, log, "me", stdin=io.StringIO("l\n"), stdout=io.StringIO())


@pytest.mark.skipif(terminal.termios is None, reason="needs a POSIX terminal")
def test_on_a_terminal_one_key_is_an_answer(log, monkeypatch, tmp_path):
    editor = tmp_path / "editor"
    editor.write_text('#!/bin/sh\nprintf "two\\nlines\\n" > "$1"\n')
    editor.chmod(0o755)
    monkeypatch.setenv("VISUAL", str(editor))
    main, side = os.openpty()
    try:
        with open(side, encoding="utf-8") as keys:
            before = terminal.termios.tcgetattr(side)
            with terminal.Keys(keys) as reader:
                os.write(main, b"\x1b[C")  # the right arrow
                assert reader.key() == "\x1b[C"
            assert terminal.termios.tcgetattr(side) == before
            terminal.tty.setcbreak(side)  # what is typed ahead is as keys, too
            os.write(main, "ltu\x7f左erlq".encode())
            n, _ = told(log, [], stdin=keys)
    finally:
        os.close(main)
    assert n == 4
    holds = log.standing()
    assert [event.get("choice") for event in holds] == ["left", "left", None]
    assert holds[-1]["response"] == "two\nlines"
