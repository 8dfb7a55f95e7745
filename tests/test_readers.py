"""Records in files as people have them: transcripts of every oddity, tables, lines that teach nothing
and lines that are wrong. Each is read, left out with its reason, or refused with what mends it."""
import json
import pathlib
import zlib

import pytest

from data.dialogues import Useless, transcript
from data.openings import cut_opening
from data.own import find_files, own_data_set, stage_of
from data.prepare import open_data
from data.records import load_records, records_in
from runtime.options import UserError
from tests.test_forms import BAD, DIALOGUE, GOOD, LIKED, PAIR, TALK_PAIR, Q, bot, gpt, human, user
from tests.test_records import write

# ---- transcripts ---------------------------------------------------------------------------------

H, A = "\n\nHuman: ", "\n\nAssistant: "
NO_QUESTION = "no question before the answer"
NO_TURNS, DIFFER = "roles that do not alternate", "dialogues that differ before their last answer"
NO_ANSWER, EQUAL, ONE = "no answer at the end", "equal replies", "only one of the two is a dialogue"
ASKED, SYSTEM = [user("Hi")], {"role": "system", "content": "Be kind."}


def talk(text):
    """What stands before the last answer, and the answer."""
    found = transcript(text)
    return found[:-1], found[-1]["content"]


# (what is odd, chosen, rejected, the messages of the prompt with both replies, or why it is left out)
PAIRS = [
    ("as published", f"{H}Hi{A}Yes", f"{H}Hi{A}No", (ASKED, "Yes", "No")),
    ("no line breaks at the start", f"Human: Hi{A}Yes", f"Human: Hi{A}No", (ASKED, "Yes", "No")),
    ("one line break at the start", f"\nHuman: Hi{A}Yes", f"\nHuman: Hi{A}No", (ASKED, "Yes", "No")),
    ("no space behind the marks", "\n\nHuman:Hi\n\nAssistant:Yes", f"{H}Hi{A}No", (ASKED, "Yes", "No")),
    ("two spaces behind a mark", f"{H}Hi{A} Yes", f"{H}Hi{A}No", (ASKED, "Yes", "No")),
    ("spaces at the end", f"{H}Hi {A}Yes ", f"{H}Hi{A}No\n", (ASKED, "Yes", "No")),
    ("lower case", "\n\nhuman: Hi\n\nassistant: Yes", "\n\nhuman: Hi\n\nassistant: No", (ASKED, "Yes", "No")),
    ("upper case", "\n\nHUMAN: Hi\n\nASSISTANT: Yes", "\n\nHUMAN: Hi\n\nASSISTANT: No", (ASKED, "Yes", "No")),
    ("mixed case", f"{H}Hi\n\nassistant: Yes", f"{H}Hi{A}No", (ASKED, "Yes", "No")),
    ("CRLF", f"{H}Hi{A}Yes".replace("\n", "\r\n"), f"{H}Hi{A}No", (ASKED, "Yes", "No")),
    ("CRLF inside", f"{H}Hi\r\nyou{A}Yes", f"{H}Hi\nyou{A}No", ([user("Hi\nyou")], "Yes", "No")),
    ("three line breaks", f"\n{H}Hi\n{A}Yes", f"{H}Hi{A}No", (ASKED, "Yes", "No")),
    ("a blank line of spaces", "\n \nHuman: Hi\n\t\nAssistant: Yes", f"{H}Hi{A}No", (ASKED, "Yes", "No")),
    ("text before the first turn", f"Be kind.{H}Hi{A}Yes", f"Be kind.{H}Hi{A}No", ([SYSTEM, *ASKED], "Yes", "No")),
    ("blank lines before it", f"\n\nBe kind.\n{H}Hi{A}Yes", f"Be kind.{H}Hi{A}No", ([SYSTEM, *ASKED], "Yes", "No")),
    ("other text before it", f"Be kind.{H}Hi{A}Yes", f"Be good.{H}Hi{A}No", DIFFER),
    ("text before one of them", f"Be kind.{H}Hi{A}Yes", f"{H}Hi{A}No", DIFFER),
    ("system text that goes on", f"Be\n\nkind.{H}Hi{A}Yes", f"Be\n\nkind.{H}Hi{A}No",
     ([{**SYSTEM, "content": "Be\n\nkind."}, *ASKED], "Yes", "No")),
    ("several turns", f"{H}Hi{A}Ho{H}So{A}Yes", f"{H}Hi{A}Ho{H}So{A}No",
     ([*ASKED, bot("Ho"), user("So")], "Yes", "No")),
    ("one goes on for longer", f"{H}Hi{A}Ho{H}So{A}Yes", f"{H}Hi{A}No", DIFFER),
    ("an earlier answer differs", f"{H}Hi{A}Ho{H}So{A}Yes", f"{H}Hi{A}Ha{H}So{A}No", DIFFER),
    ("the question differs", f"{H}Hi{A}Yes", f"{H}Ho{A}No", DIFFER),
    ("equal replies", f"{H}Hi{A}Yes", f"{H}Hi{A}Yes", EQUAL),
    ("equal but for spaces", f"{H}Hi{A}Yes", f"{H}Hi{A}Yes \n", EQUAL),
    ("both replies empty", f"{H}Hi{A}", f"{H}Hi\n\nAssistant:", EQUAL),
    ("one reply empty", f"{H}Hi{A}Yes", f"{H}Hi\n\nAssistant:", (ASKED, "Yes", "")),
    ("an empty reply without a space", f"{H}Hi{A}", f"{H}Hi{A}No", (ASKED, "", "No")),
    ("an empty turn in between", f"{H}Hi{A}{H}So{A}Yes", f"{H}Hi{A}{H}So{A}No",
     ([*ASKED, bot(""), user("So")], "Yes", "No")),
    ("an empty question", f"{H}{A}Yes", f"{H}{A}No", ([user("")], "Yes", "No")),
    ("two answers", f"{H}Hi{A}Ho{A}Yes", f"{H}Hi{A}Ho{A}No", NO_QUESTION),
    ("two answers, one empty", f"{H}Hi{A}{A}Yes", f"{H}Hi{A}{A}No", NO_QUESTION),
    ("two questions", f"{H}Hi{H}Ho{A}Yes", f"{H}Hi{H}Ho{A}No", NO_TURNS),
    ("the assistant begins", f"{A}Ho{H}Hi{A}Yes", f"{A}Ho{H}Hi{A}No", NO_TURNS),
    ("the last turn is the human's", f"{H}Hi{A}Yes{H}Thanks", f"{H}Hi{A}No{H}Thanks", NO_ANSWER),
    ("one ends with the human", f"{H}Hi{A}Yes", f"{H}Hi{A}No{H}Why?", NO_ANSWER),
    ("a question alone", f"{H}Hi", f"{H}Ho", NO_ANSWER),
    ("one is empty", f"{H}Hi{A}Yes", "", ONE),
    ("one is a text", f"{H}Hi{A}Yes", "No, never.", ONE),
    ("a mark inside a line", f"{H}Hi{A}Yes.  Human: and more", f"{H}Hi{A}No", (ASKED, "Yes.  Human: and more", "No")),
    ("a mark behind one line break", f"{H}Hi{A}A play:\nHuman: to be\nAssistant: or", f"{H}Hi{A}No",
     (ASKED, "A play:\nHuman: to be\nAssistant: or", "No")),
    ("a mark inside a word", f"{H}Hi{A}Yes\n\nSuperhuman: a film", f"{H}Hi{A}No",
     (ASKED, "Yes\n\nSuperhuman: a film", "No")),
    ("a word like a mark", f"{H}Hi{A}Yes\n\nHumans: many", f"{H}Hi{A}No", (ASKED, "Yes\n\nHumans: many", "No")),
    ("paragraphs in an answer", f"{H}Hi{A}Yes\n\nand no", f"{H}Hi{A}No", (ASKED, "Yes\n\nand no", "No")),
    ("control tokens in a text", f"{H}Hi{A}<eom>\n<|Human|>: x", f"{H}Hi{A}No", (ASKED, "<eom>\n<|Human|>: x", "No")),
    ("U+2028 is no line end", f"{H}Hi{A}Yes\u2028\u2028Human: x", f"{H}Hi{A}No",
     (ASKED, "Yes\u2028\u2028Human: x", "No")),
    ("Chinese", f"{H}你好{A}好", f"{H}你好{A}不好", ([user("你好")], "好", "不好")),
    ("one answer begins like the other", f"{H}Hi{A}Yes", f"{H}Hi{A}Yes, I do", (ASKED, "Yes", "Yes, I do")),
]


def read(record, kind="reward"):
    """The one record that a line holds, or why it teaches nothing."""
    try:
        return records_in(record, kind)[1]
    except Useless as useless:
        return useless.reason


@pytest.mark.parametrize("chosen,rejected,meant", [case[1:] for case in PAIRS], ids=[case[0] for case in PAIRS])
def test_an_odd_transcript_is_read_or_left_out_with_its_reason(chosen, rejected, meant):
    if not isinstance(meant, str):
        meant = [dict(zip(("prompt", "chosen", "rejected"), meant, strict=True))]
    assert read({"chosen": chosen, "rejected": rejected}) == meant
    other = read({"chosen": rejected, "rejected": chosen})  # what is odd does not depend on the side
    assert other == (meant if isinstance(meant, str) else
                     [{**meant[0], "chosen": meant[0]["rejected"], "rejected": meant[0]["chosen"]}])


@pytest.mark.parametrize("text,meant", [
    (f"{H}Hi\n\nAssistant:", ASKED), (f"{H}Hi{A}", ASKED), (f"{H}Hi", ASKED),
    ("\r\n\r\nHuman: Hi\r\n\r\nAssistant:", ASKED),
    (f"Be kind.{H}Hi{A}", [SYSTEM, *ASKED]), (f"{H}Hi{A}Ho{H}So{A}", [*ASKED, bot("Ho"), user("So")]),
    ("Hi", "Hi"), ("Assistant: Hi", "Assistant: Hi"), ("A human: Hi", "A human: Hi"), ("", "")])
@pytest.mark.parametrize("kind,rest", [("ppo", {}), ("reward", {"chosen": "Yes", "rejected": "No"}),
                                       ("reward", {"response": "Yes", "score": 1}), ("sft", {"completion": "Yes"})])
def test_a_prompt_may_be_a_transcript(text, meant, kind, rest):
    found, = read({"prompt": text, **rest}, kind)
    assert found.get("prompt", found.get("messages", [])[:-1]) == meant


@pytest.mark.parametrize("text,reason", [(f"{H}Hi{H}Ho{A}", NO_TURNS), (f"{H}Hi{A}Ho{A}", NO_QUESTION)])
def test_a_transcript_as_prompt_whose_turns_do_not_alternate_is_left_out(text, reason):
    assert read({"prompt": text, "chosen": "Yes", "rejected": "No"}) == reason


# ---- what teaches nothing ------------------------------------------------------------------------

USELESS = [
    ("pairs of dialogues", {"chosen": [user(Q), bot(GOOD)], "rejected": [user(Q), bot(GOOD)]}, EQUAL),
    ("UltraFeedback", {"prompt": Q, "chosen": [user(Q), bot(GOOD)], "rejected": [user(Q), bot(GOOD)]}, EQUAL),
    ("turns differ", {"chosen": [user(Q), bot(GOOD)], "rejected": [user("?"), bot(BAD)]}, DIFFER),
    ("no answer", {"chosen": [user(Q)], "rejected": [user("?")]}, NO_ANSWER),
    ("two users", {"chosen": [user(Q), user(Q), bot(GOOD)], "rejected": [user(Q), user(Q), bot(BAD)]}, NO_TURNS),
    ("Alpaca pairs", {"instruction": Q, "chosen": GOOD, "rejected": GOOD}, EQUAL),
    ("ShareGPT pairs", {"conversations": [human(Q), human(Q)], "chosen": gpt(GOOD), "rejected": gpt(BAD)}, NO_TURNS),
    ("one ranked answer", {"prompt": Q, "answers": [{"answer": GOOD, "rank": 1}]}, "fewer than two different replies"),
    ("equal ranked answers", {"prompt": Q, "answers": [{"answer": GOOD, "rank": 1}, {"answer": GOOD, "rank": 2}]},
     "fewer than two different replies"),
    ("LMArena, nobody", {"conversation_a": [user(Q), bot(GOOD)], "conversation_b": [user(Q), bot(BAD)], "winner": None},
     "no choice"),
    ("LMArena, other turns", {"conversation_a": [user(Q), bot(GOOD)], "conversation_b": [user("?"), bot(BAD)],
                              "winner": "model_a"}, DIFFER),
    ("LMArena 55k, nobody", {"prompt": f'["{Q}"]', "response_a": '["a"]', "response_b": '["b"]', "winner_model_a": 0,
                             "winner_model_b": 0, "winner_tie": 0}, "no choice"),
    ("AlpacaFarm, nobody", {"instruction": Q, "output_1": GOOD, "output_2": BAD, "preference": -1}, "no choice"),
    ("ShareGPT that ends with a question", {"conversations": [human(Q), gpt(GOOD), human(Q)]}, NO_ANSWER),
    ("ShareGPT that begins with gpt", {"conversations": [gpt(Q), human(GOOD), gpt(Q)]}, NO_TURNS),
]


@pytest.mark.parametrize("record,reason", [case[1:] for case in USELESS], ids=[case[0] for case in USELESS])
def test_what_teaches_nothing_is_left_out_counted_and_said(tmp_path, capsys, record, reason):
    kind = "sft" if "conversations" in record and "chosen" not in record else "reward"
    good = DIALOGUE if kind == "sft" else PAIR
    assert read(record, kind) == reason
    path = write(tmp_path / "d.jsonl", record, good, record)
    assert len(load_records(path, kind)) == 1
    assert capsys.readouterr().out == f"{path}: 2 of 3 lines left out, which teach nothing: {reason} (2)\n"
    with pytest.raises(UserError, match=f"d.jsonl: holds no record that teaches anything: {reason}"):
        load_records(write(tmp_path / "d.jsonl", record), kind)


@pytest.mark.parametrize("kind,record", [
    ("reward", {**PAIR, "rejected": GOOD}), ("reward", {**TALK_PAIR, "prompt": [user(Q), user(Q)]}),
    ("reward", {**TALK_PAIR, "prompt": [user(Q), bot(Q)]}), ("sft", {"messages": [user(Q)]}),
    ("ppo", {"prompt": [bot(Q)]})])
def test_in_our_own_form_the_same_is_a_bad_line(kind, record):
    with pytest.raises(ValueError) as caught:
        records_in(record, kind)
    assert not isinstance(caught.value, Useless)


# ---- tables --------------------------------------------------------------------------------------

# (header and row of a .csv file, the stage, the record)
TABLES = [
    (("prompt,chosen,rejected,margin,tie,part", "a,b,c,1.5,false,x"), "reward",
     {"prompt": "a", "chosen": "b", "rejected": "c", "margin": 1.5, "part": "x"}),
    (("prompt,chosen,rejected,margin,tie", "a,b,c,,TRUE"), "reward",
     {"prompt": "a", "chosen": "b", "rejected": "c", "tie": True}),
    (("prompt,chosen,rejected,winner", "a,b,c,tie"), "reward",
     {"prompt": "a", "chosen": "b", "rejected": "c", "tie": True}),
    (("prompt,response,score", "a,b,-4"), "reward", {"prompt": "a", "response": "b", "score": -4}),
    (("prompt,response,scores", 'a,b,"[1, 2.5]"'), "reward",
     {"prompt": "a", "response": "b", "score": 1.75, "scores": [1, 2.5]}),
    (("prompt,response,label", "a,b, True "), "reward", {"prompt": "a", "response": "b", "label": 1}),
    (("prompt,response,label", "1,2,0"), "reward", {"prompt": "1", "response": "2", "label": 0}),
    (("messages,id", '"[{""role"": ""user"", ""content"": ""a""}, {""role"": ""assistant"", ""content"": ""b""}]",1'),
     "sft",
     {"messages": [user("a"), bot("b")]}),
    (("prompt,chosen,rejected", '"[{""role"": ""user"", ""content"": ""a""}]",'
      '"[{""role"": ""assistant"", ""content"": ""b""}]","[{""role"": ""assistant"", ""content"": ""c""}]"'), "reward",
     {"prompt": [user("a")], "chosen": "b", "rejected": "c"}),
    (("messages,chosen,rejected", '"[{""role"": ""user"", ""content"": ""a""}]",'
      '"{""role"": ""assistant"", ""content"": ""b""}","{""from"": ""gpt"", ""value"": ""c""}"'), "reward",
     {"prompt": [user("a")], "chosen": "b", "rejected": "c"}),
    (("prompt,response", '"[1, 2]","{""a"": 1}"'), "sft", {"prompt": "[1, 2]", "response": '{"a": 1}'}),
    (("prompt", '"[Scene: a wood]"'), "ppo", {"prompt": "[Scene: a wood]"}),
    (("text", '"12"'), "pretrain", {"text": "12"}),
    (("instruction,input,output", "a,,b"), "sft", {"prompt": "a", "response": "b"}),
    (("instruction,output_1,output_2,preference", "a,b,c,2"), "reward",
     {"prompt": "a", "chosen": "c", "rejected": "b"}),
    (("instruction,output,kto_tag", "a,b,false"), "reward", {"prompt": "a", "response": "b", "label": 0}),
    (("prompt,answers", 'a,"[{""answer"": ""b"", ""rank"": 2}, {""answer"": ""c"", ""rank"": 1}]"'), "reward",
     {"prompt": "a", "chosen": "c", "rejected": "b"}),
]


@pytest.mark.parametrize("rows,kind,meant", TABLES, ids=[case[0][0] for case in TABLES])
def test_cells_become_what_they_stand_for(tmp_path, rows, kind, meant):
    path = write(tmp_path / "d.csv", *rows)
    assert stage_of(path, {}) == kind
    assert load_records(path, kind) == [meant]


def test_columns_are_mapped_before_their_cells_are_read(tmp_path):
    path = write(tmp_path / "d.csv", "review,stars,helpfulness", "A fine film that I saw again and again.,4.5,x")
    record, = load_records(path, "reward", fields={"text": "review", "score": "stars"})
    assert record["score"] == 4.5
    assert record["prompt"] + record["response"] == "A fine film that I saw again and again."


# ---- rated texts ---------------------------------------------------------------------------------

@pytest.mark.parametrize("text", ["A fine film that I saw again and again.", "这本书非常好看，我看了一遍又一遍。",
                                  "short", "x", "  two  spaces \n and lines of it, here and there "])
def test_a_rated_text_is_cut_and_nothing_of_it_is_lost(text):
    record, = read({"text": text, "scores": [1, 2], "part": "p"})
    assert record["prompt"] + record["response"] == text
    assert (record["prompt"], record["response"]) == cut_opening(text)
    assert (record["score"], record["scores"], record["part"]) == (1.5, [1, 2], "p")


def test_rated_texts_are_divided_with_all_that_they_carry(tmp_path):
    lines = [{"text": f"Film number {i % 60} is one that I saw {i} times, and again.", "scores": [i % 5, 2],
              "part": f"p{i % 2}"}
             for i in range(120)]
    data = open_data(str(write(tmp_path / "d.jsonl", *lines)), cache=tmp_path / "c", vocab_size=300)
    records = [r for split in ("train", "val", "test") for r in data.records("reward", split)]
    records += data.records("judge", "train") if data.has("judge") else []
    assert len(records) == 120
    assert all(set(r) == {"prompt", "response", "score", "scores", "part"} for r in records)
    assert sum(r["score"] for r in records) == sum((i % 5 + 2) / 2 for i in range(120))


def test_repeats_are_equal_in_all_that_is_read(tmp_path):
    """A held-out tie beside the same replies compared is no repeat of it."""
    pairs = [{"prompt": f"Question {i}", "chosen": "a", "rejected": "b"} for i in range(60)]
    held = [PAIR, PAIR, {**PAIR, "tie": True}, {**PAIR, "part": "x"}]
    write(tmp_path / "reward.jsonl", *pairs)
    write(tmp_path / "reward_val.jsonl", *held)
    data = open_data(str(tmp_path), cache=tmp_path / "c", vocab_size=300)
    assert data.records("reward", "val") == [held[0], *held[2:]]


# ---- folders -------------------------------------------------------------------------------------

def test_a_folder_may_hold_any_kind_of_file(tmp_path):
    (tmp_path / "sft.json").write_text(json.dumps([{"prompt": f"Question {i}", "response": "a"} for i in range(30)]))
    (tmp_path / "ppo.tsv").write_text("prompt\n" + "".join(f"Question {i}\n" for i in range(30)))
    (tmp_path / "reward.csv").write_text("prompt,chosen,rejected\n" + "".join(f"Question {i},a,b\n" for i in range(30)))
    files = find_files(tmp_path, {})
    assert {place: path.name for place, path in files.items()} == {
        ("sft", "train"): "sft.json", ("reward", "train"): "reward.csv", ("ppo", "train"): "ppo.tsv"}
    data = open_data(str(tmp_path), cache=tmp_path / "c", vocab_size=300)
    assert data.records("reward", "train")[0].keys() == PAIR.keys()
    (tmp_path / "sft.jsonl.gz").write_bytes(zlib.compress(b""))
    with pytest.raises(UserError, match="sft.jsonl.gz is there, and so is sft.json: keep one"):
        find_files(tmp_path, {})


def test_a_table_whose_name_says_nothing_is_said(tmp_path, capsys):
    write(tmp_path / "ppo.jsonl", *[{"prompt": str(i)} for i in range(20)])
    write(tmp_path / "rewards.csv", "a,b", "1,2")
    own_data_set(tmp_path)
    assert "not read: rewards.csv" in capsys.readouterr().err


# ---- what is wrong, and what is said -------------------------------------------------------------

# (name of the file, the stage, its content, what is said)
WRONG = [
    ("d.csv", "reward", "prompt,response,score\na,b,\"4,5\"\n",
     'line 2: "score" is "4,5", not a number: write it like 4.5'),
    ("d.csv", "reward", "prompt,response,score\na,b,4/5\n", '"score" is "4/5", not a number'),
    ("d.csv", "reward", "prompt,response,score\na,b,nan\n", '"score" is "nan", not a number'),
    ("d.csv", "reward", "prompt,response,score\na,b,1_000\n", '"score" is "1_000", not a number'),
    ("d.csv", "reward", "prompt,response,score\na,b,1e400\n", '"score" must be finite'),
    ("d.csv", "reward", "prompt,response,score\na,b,\n",
     "line 2: fields found: prompt, response; forms that come near: labels"),
    ("d.csv", "reward", "prompt,response,label\na,b,pos\n",
     '"label" must be 0 or 1 (true or false), is "pos": write 1'),
    ("d.csv", "reward", "prompt,response,label\na,b,4\n", 'is "4": ratings are read as scores: --fields score=label'),
    ("d.csv", "reward", "prompt,response,label\na,b,-1\n", 'is "-1": write 1 for what is liked and 0 for what is not'),
    ("d.csv", "reward", "text,label\na,neutral\n", 'is "neutral": write 1'),
    ("d.csv", "reward", "prompt,response,scores\na,b,1;2\n", '"scores" must hold JSON'),
    ("d.csv", "reward", "prompt,response,scores\na,b,3\n", '"scores" must be a list of numbers'),
    ("d.csv", "reward", "prompt,chosen,rejected,tie\na,b,c,maybe\n", '"tie" must be true or false, is "maybe"'),
    ("d.csv", "reward", "prompt,chosen,rejected,tie,margin\na,b,c,1,2\n", 'a tie has no "margin"'),
    ("d.csv", "reward", "prompt,chosen,rejected\na,b,\n", "fields found: prompt, chosen; forms"),
    ("d.csv", "reward", "prompt,chosen,rejected\na,b\n", "line 2: number of cells 2, in the header 3: put a cell"),
    ("d.csv", "sft", "messages\n\"[{'role': 'user', 'content': 'a'}]\"\n",
     '"messages" must hold JSON, such as [{"role"'),
    ("d.csv", "ppo", "prompt\n\"[{'role': 'user', 'content': 'a'}]\"\n", '"prompt" must hold JSON'),
    ("d.csv", "ppo", "prompt;id\na;1\n", "its header is one cell, 'prompt;id': cells are divided by commas"),
    ("d.csv", "ppo", "prompt,prompt\na,b\n", "two columns are called 'prompt': keep one"),
    ("d.csv", "ppo", "prompt\n", "d.csv: holds no records; a ppo record has prompt"),
    ("d.csv", "ppo", "", "d.csv: holds no records"),
    ("d.csv", "ppo", 'prompt\n"a\nb\n', "d.csv, line 2: a quotation mark is opened in this row and never closed"),
    ("d.tsv", "ppo", "id\tprompt\n1\ta\tb\n", "line 2: number of cells 3, in the header 2"),
    ("d.json", "ppo", '[{"prompt": "a"}, {"prompt": 3}]',
     'record 2 (line 1): "prompt" must be a text or a list of messages, is 3'),
    ("d.json", "ppo", '[{"prompt": "a"},\n {"prompt": "a", "prompt": "b"}]',
     'record 2 (line 2): "prompt" is there twice'),
    ("d.json", "ppo", '["a"]', "record 1 (line 1): not a JSON object"),
    ("d.json", "ppo", '[{"prompt": "a"}', "d.json, line 1: not JSON: the list does not end here"),
    ("d.json", "ppo", "[]", "d.json: holds no records"),
    ("d.jsonl", "ppo", '[\n{"prompt": "a"}\n]\n', "one record goes over several lines"),
    ("d.jsonl", "reward", '{"text": "a", "label": "good"}\n',
     'line 1: "label" must be 0 or 1 (true or false), is "good"'),
    ("d.jsonl", "reward", '{"text": "", "score": 1}\n', '"text" is empty'),
    ("d.jsonl", "reward", '{"text": "a", "score": 1, "label": 1}\n', '"label" and "score", two kinds of feedback'),
    ("d.jsonl", "reward", '{"instruction": "a", "output_1": "b", "output_2": "c", "preference": "x"}\n',
     "a value of another kind"),
    ("d.jsonl", "reward", '{"chosen": "a", "rejected": "b"}\n', "must be transcripts"),
]


@pytest.mark.parametrize("name,kind,content,said", WRONG, ids=[f"{case[0]}: {case[3][:60]}" for case in WRONG])
def test_what_is_wrong_is_said_with_its_place(tmp_path, name, kind, content, said):
    path = tmp_path / name
    pathlib.Path(path).write_text(content, encoding="utf-8")
    with pytest.raises(UserError) as caught:
        load_records(path, kind)
    assert said in str(caught.value)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("label", [True, False, 0, 1, 0.0, 1.0, "0", "1", "true", "False", " TRUE "])
def test_labels_are_0_or_1_however_they_are_written(label):
    found, = read({**LIKED, "label": label})
    assert found["label"] in (0, 1)
    assert type(found["label"]) is int
    assert found["label"] == (str(label).strip().lower() in ("true", "1", "1.0"))
