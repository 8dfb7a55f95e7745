"""`python -m data.prepare check`: what it says of a user's files is true, and nothing is written."""
import io
import itertools
import json
import re
import sys
import tracemalloc

import pytest

from data.check import Survey
from data.prepare import main, open_data
from data.render import Look, byte_tokenizer
from data.tokenizer import train_bpe
from model import ModelConfig, Transformer, save_checkpoint
from runtime.options import UserError, run_main

PAIR = {"prompt": "Where is it?", "chosen": "In 北京, on the left", "rejected": "In 南京"}
RECORDS = {  # (stage, record) of each kind
    "text": ("pretrain", {"text": "A text that says <eom>, 你好."}),
    "dialogue": ("sft", {"prompt": "问", "response": "答 <eoh>"}),
    "turns": ("sft", {"messages": [{"role": "system", "content": "Be brief."},
                                   {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},
                                   {"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}]}),
    "pair": ("reward", PAIR),
    "rating": ("reward", {"prompt": "q", "response": "a b", "score": 2.5}),
    "label": ("reward", {"prompt": "q", "response": " a", "label": 1}),
    "prompt": ("ppo", {"prompt": "q"})}


def write(path, records):
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
    return path


def labels(n=60, **more):
    return [{"prompt": f"Question {i}?", "response": f"answer {i}", "label": int(i % 4 == 0)} | more
            for i in range(n)]


@pytest.fixture
def check(capsys, tmp_path, monkeypatch):
    """Run the command: (exit code, what it printed)."""
    monkeypatch.setattr("data.prepare.CACHE", tmp_path / "cache")

    def run(*words):
        code = main(["check", *map(str, words)])
        return code, capsys.readouterr().out

    return run


# ---- how it ends ---------------------------------------------------------------------------------

def test_a_good_file_ends_with_0_and_a_bad_line_with_1(check, tmp_path):
    good = write(tmp_path / "good.jsonl", labels())
    bad = write(tmp_path / "bad.jsonl", [*labels(), {"prompt": "q", "response": "a", "label": 7}])
    assert check(good)[0] == 0
    code, printed = check(bad)
    assert code == 1
    assert "bad lines: 1\n    line 61: " in printed
    assert check(bad, "--skip_bad")[0] == 0
    assert [run_main(main, ["check", str(path)]) for path in (good, bad, tmp_path / "none")] == [0, 1, 2]


def test_of_many_bad_lines_the_first_ten_are_shown_and_all_are_counted(check, tmp_path):
    code, printed = check(write(tmp_path / "d.jsonl", [*labels(), *[{"prompt": "q", "response": 1, "label": 0}] * 12]))
    assert "bad lines: 12\n" in printed
    assert len(re.findall("    line [0-9]+: ", printed)) == 10
    assert printed.endswith("12 bad lines: mend them, or leave them out with --skip_bad\n")


def test_files_that_training_would_refuse_end_with_1_and_its_reason(check, tmp_path):
    code, printed = check(write(tmp_path / "few.jsonl", labels(2)))
    assert code == 1
    assert "too few records" in printed
    code, printed = check(write(tmp_path / "mixed.jsonl", [*labels(), PAIR]))
    assert code == 1
    assert "labels (60), pairs (1): a file has one kind" in printed


def test_nothing_is_written(check, tmp_path):
    (tmp_path / "mine").mkdir()
    write(tmp_path / "mine" / "reward.jsonl", labels())
    write(tmp_path / "mine" / "pretrain.jsonl", [{"text": f"text {i}"} for i in range(60)])
    before = sorted(tmp_path.rglob("*"))
    check(tmp_path / "mine")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("words,message", [
    ([], "usage: python -m data.prepare check FILE"), (["--examples=3"], "usage"),
    (["reviews"], "check is for files of your own"), (["no.jsonl"], "unknown data set"),
    (["d.jsonl", "--limit=3"], "unknown option --limit"), (["d.jsonl", "--examples=-1"], "out of range"),
    (["d.jsonl", "--from=none"], "neither a prepared folder nor a checkpoint"),
    (["d.jsonl", "--template=x"], "must have {prompt} once"),
    (["d.jsonl", "--fields=x"], "not OUR_NAME=YOUR_NAME"),
    (["m.jsonl", "--template=x{prompt}"], "--template has no effect on m.jsonl"),
    (["p.jsonl", "--judge_share=.5"], "--judge_share has no effect on p.jsonl")])
def test_what_cannot_be_is_said(check, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "d.jsonl", labels())
    write(tmp_path / "p.jsonl", [{"prompt": f"{i}"} for i in range(60)])
    write(tmp_path / "m.jsonl", [{"prompt": [{"role": "user", "content": f"{i}"}]} for i in range(60)])
    with pytest.raises(UserError, match=re.escape(message)):
        check(*words)


def test_a_file_named_as_the_command_is_reached_by_its_path(check, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "check", labels())
    assert check("./check")[0] == 0
    main(["./check"])
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_a_prepared_folder_is_not_a_file_of_ones_own(check, tmp_path):
    folder = open_data(str(write(tmp_path / "d.jsonl", labels())), cache=tmp_path / "c").folder
    with pytest.raises(UserError, match="is made by Mosslet"):
        check(folder)


def test_a_template_stands_around_the_prompts_of_the_examples(check, tmp_path):
    printed = check(write(tmp_path / "d.jsonl", labels()), "--template=Say: {prompt}!")[1]
    assert printed.count("<|Human|>: Say: Question") == 10


def test_standard_input_is_checked_and_not_kept(check, tmp_path, monkeypatch):
    data = write(tmp_path / "d.jsonl", labels()).read_bytes()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    code, printed = check("-", "--examples=0")
    assert code == 0
    assert "60 records for the stage reward" in printed
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("name,text", [
    ("d.json", json.dumps(labels())), ("d.csv", "prompt,response,label\n" + "".join(
        f"Question {i}?,answer {i},{int(i % 4 == 0)}\n" for i in range(60)))])
def test_every_kind_of_file_is_checked(check, tmp_path, name, text):
    (tmp_path / name).write_text(text)
    code, printed = check(tmp_path / name)
    assert code == 0
    assert "labels: 25.0% are liked" in printed
    unit = "record" if name == "d.json" else "line"
    first = min(int(i) for i in re.findall(rf"-- {unit} (\d+)\n", printed))
    asked = min(int(i) for i in re.findall(r"Question (\d+)", printed))
    assert first == asked + {"d.json": 1, "d.csv": 2}[name]


# ---- what it says --------------------------------------------------------------------------------

@pytest.mark.parametrize("records,said", [
    (labels(), "labels: 25.0% are liked"),
    ([{"prompt": f"q{i}", "response": f"a{i}", "score": i} for i in range(61)],
     "ratings: mean 30, spread 17.6; lowest 0, quarters at 15, 30 and 45, highest 60"),
    ([{"prompt": f"q{i}", "chosen": "long" if i % 3 else "x", "rejected": "no"} for i in range(60)],
     "the longer reply is chosen in 66.7% of the pairs, the shorter in 33.3%"),
    ([{"prompt": f"q{i}", "response": "a", "scores": [i, i + 2][:1 + i % 2]} for i in range(60)],
     "people: 1 to 2 scores a text, 1.5 on average; within a text they spread by 0.5"),
    ([PAIR | {"prompt": f"q{i}"} | ({} if i % 3 else {"tie": True}) for i in range(60)],
     "feedback: ties (20), pairs (40)"),
    ([PAIR | {"prompt": f"q{i}", "margin": i} for i in range(60)], "margins: 60, from 0 to 59, mean 29.5"),
    ([*labels(), *labels(5)], "repeats: 5 records are equal to an earlier one"),
    (labels(), "different first user messages: 60"),
    ([*labels(), {"prompt": "x", "response": " \n", "label": 0}], "such as that of line 61"),
    ([{"instruction": f"q{i}", "output": "a"} for i in range(60)], "read as: Alpaca (60)")])
def test_balance_sameness_and_forms(check, tmp_path, records, said):
    assert said in check(write(tmp_path / "d.jsonl", records))[1]


def test_lengths_are_of_characters_and_with_a_tokenizer_of_the_rows_that_training_has(check, tmp_path):
    file = write(tmp_path / "d.jsonl", [{"prompt": "问" * 7, "response": "答" * 3}] * 60)
    printed = check(file)[1]
    assert re.search(r"\| prompt +\| 7 +\| 7 +\| 7 +\| 7 ", printed)
    assert "tokens" not in printed
    tokenizer = byte_tokenizer()
    save_checkpoint(tmp_path, Transformer(ModelConfig(vocab_size=tokenizer.n_vocab, d_model=16, n_head=2,
                                                      n_kv_head=2, d_ff=16, n_layer=1)), tokenizer,
                    template="<{prompt}>")
    row = len(tokenizer.render_chat([{"role": "user", "content": f"<{'问' * 7}>"},
                                     {"role": "assistant", "content": "答" * 3}])[0])
    printed = check(file, "--from", tmp_path)[1]
    assert re.search(rf"\| row +\| {row} +\| {row} ", printed)
    assert re.search(r"\| reply +\| 10 ", printed)


@pytest.mark.parametrize("records", [labels(), labels(300), [{"text": f"text {i % 50}"} for i in range(70)],
                                     [{"prompt": f"q{i}", "response": "a"} for i in range(60)],
                                     [PAIR | {"prompt": f"q{i}"} for i in range(300)]])
def test_the_splits_are_those_of_training(check, tmp_path, records):
    file = write(tmp_path / "d.jsonl", records)
    data = open_data(str(file), vocab_size=270, cache=tmp_path / "c")
    rows = {name.strip(): [int(x) for x in (train, val, test)] for name, train, val, test in re.findall(
        r"\| (.*?) +\| (\d+) +\| (\d+) +\| (\d+) ", check(file)[1].rpartition("| split into")[2])}
    for name, count in data.meta["counts"].items():
        stage, _, split = name.partition("_")
        if isinstance(count, int) and split != "left_out":
            assert rows[stage][("train", "val", "test").index(split)] == count
        elif name.endswith("[dialogue]"):
            read = rows["dialogues that pretraining reads"]
            assert read[("train", "val", "test").index(split.partition("[")[0])] == count["documents"]


def test_a_question_on_both_sides_is_a_leak_whatever_its_case(check, tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    write(folder / "reward.jsonl", labels())
    write(folder / "reward_test.jsonl", [{"prompt": "other"} | labels(1)[0], *labels(2)[1:],
                                         {"prompt": "QUESTION  9?", "response": "x", "label": 0}])
    printed = check(folder)[1]
    assert ("leak: 3 of 3 records of reward_test.jsonl begin as records of reward.jsonl do "
            "(line 1 and line 1): training leaves them out") in printed
    write(folder / "reward_test.jsonl", [{"prompt": f"new {i}", "response": "x", "label": i} for i in (0, 1)])
    assert "leak" not in check(folder)[1]


# ---- the examples --------------------------------------------------------------------------------

def test_equal_records_are_one_example(check, tmp_path):
    printed = check(write(tmp_path / "d.jsonl", [*labels(1) * 30, *labels()]), "--examples=100")[1]
    assert printed.count("Question 0?") == 1
    assert printed.count("Question") == 60


def test_examples_are_drawn_by_a_hash_and_not_by_their_place(check, tmp_path):
    def shown(records):
        return sorted(re.findall(r"Question \d+", check(write(tmp_path / "d.jsonl", records))[1]))

    assert len(shown(labels())) == 10
    assert shown(labels()) == shown(labels()[::-1])
    assert shown(labels()) != sorted(f"Question {i}" for i in range(10))


@pytest.mark.parametrize("kind", RECORDS)
def test_what_is_marked_is_what_is_learned_or_judged(kind):
    stage, record = RECORDS[kind]
    tokenizer = train_bpe(["A text that says 你好 in 北京 or 南京"] * 3, 290)
    for look in (Look(tokenizer, "say {prompt}", colour=False), Look(byte_tokenizer(), "{prompt}", colour=False)):
        shown = look.show(record, stage)
        marked = [text.replace("›⟦", "") for text in re.findall("[⟦‹](.*?)⟧", shown, re.S)]
        wanted = [look.tokenizer.decode(token for token, _ in run) for row in look.rows(record, stage).values()
                  for learned, run in itertools.groupby(zip(*row, strict=True), lambda two: two[1]) if learned]
        assert marked == wanted


def test_the_beginning_that_both_replies_share_is_told_apart():
    shown = Look(byte_tokenizer(), colour=False).show(PAIR, "reward")
    assert "chosen: ‹In ›⟦北京, on the left<eom>⟧" in shown  # 北 and 南 share a byte
    assert "rejected: ‹In ›⟦南京<eom>⟧" in shown
    assert "chosen: \033[2;32mIn \033[0m\033[32m北" in Look(byte_tokenizer()).show(PAIR, "reward")


def test_feedback_is_said_in_words():
    look = Look(byte_tokenizer(), colour=False)
    assert "\nnot liked: ⟦a" in look.show({"prompt": "q", "response": "a", "label": 0}, "reward")
    assert "\nrated 1.5 (1, 2): ⟦a" in look.show({"prompt": "q", "response": "a", "score": 1.5, "scores": [1, 2]},
                                                 "reward")
    assert "\nchosen by 0.5: " in look.show(PAIR | {"margin": .5}, "reward")
    assert look.show(PAIR | {"tie": True}, "reward").count("as good: ") == 2


def test_long_texts_are_shortened_in_the_middle():
    shown = Look(byte_tokenizer(), colour=False, most=60).show({"text": "a" * 100 + "z" * 100}, "pretrain")
    assert f"⟦{'a' * 40} […140 characters…] {'z' * 20}⟧" in shown


def test_colour_is_for_terminals_and_a_text_has_no_power_over_them(check, tmp_path, monkeypatch):
    file = write(tmp_path / "d.jsonl", labels(response="\033[2J!"))
    assert "⟦\033[2J!" in check(file)[1]  # to a file, the text as it is
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    printed = check(file)[1]
    assert "\033[32m\\u001b[2J!" in printed
    assert "⟦" not in printed
    monkeypatch.setenv("NO_COLOR", "1")
    assert "⟦\\u001b[2J!" in check(file)[1]


def test_a_file_is_not_held_in_memory(tmp_path):
    write(tmp_path / "d.jsonl", ({"text": f"{i} " * 500} for i in range(4000)))
    survey = Survey(tmp_path / "d.jsonl", "pretrain", Look(byte_tokenizer()), 10)
    tracemalloc.start()
    survey.read({})
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (tmp_path / "d.jsonl").stat().st_size > 9e6
    assert peak < 1.5e6
