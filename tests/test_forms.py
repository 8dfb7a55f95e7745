"""Records of other tools are read as they are meant, a record of each form; what has no form is an
error that names the nearest."""
import pytest

from data.forms import FORMS, form_of, parse_fields
from data.openings import cut_opening
from data.own import own_data_set
from data.prepare import open_data
from data.records import load_records, records_in
from runtime.options import UserError
from tests.test_records import HH, write


def user(text):
    return {"role": "user", "content": text}


def bot(text):
    return {"role": "assistant", "content": text}


def human(text):
    return {"from": "human", "value": text}


def gpt(text):
    return {"from": "gpt", "value": text}


SYSTEM = {"role": "system", "content": "Be kind."}
Q, GOOD, BAD = "What is the sky?", "Blue.", "Green."
PAIR = {"prompt": Q, "chosen": GOOD, "rejected": BAD}
TALK_PAIR = {**PAIR, "prompt": [user(Q)]}
SYSTEM_PAIR = {**PAIR, "prompt": [SYSTEM, user(Q)]}
LIKED = {"prompt": Q, "response": GOOD, "label": 1}
DIALOGUE = {"messages": [user(Q), bot(GOOD)]}
TIE = {**TALK_PAIR, "chosen": BAD, "rejected": GOOD, "tie": True}
RATED = "It is a fine film that one can see again and again."
OPENING = dict(zip(("prompt", "response"), cut_opening(RATED), strict=True))
ALPACA = {"prompt": "Answer.\nWhat is the sky?", "response": GOOD}
# The number in shared/reference/formats.md, the stage, the record, what it means.
CASES = [
    ("1 plain text", "pretrain", {"text": "a"}, [{"text": "a"}]),
    ("2 TRL prompt-completion", "sft", {"prompt": Q, "completion": " Blue."},
     [{"prompt": Q, "response": GOOD}]),
    ("3 TRL conversational", "sft", {"prompt": [user(Q)], "completion": [bot(GOOD)]}, [DIALOGUE]),
    ("4 messages", "sft", {**DIALOGUE, "tools": []}, [DIALOGUE]),
    ("5 Alpaca", "sft", {"instruction": "Answer.", "input": Q, "output": GOOD}, [ALPACA]),
    ("5 without input", "sft", {"instruction": Q, "input": "", "output": GOOD},
     [{"prompt": Q, "response": GOOD}]),
    ("5 with system and history", "sft", {"instruction": Q, "output": GOOD, "system": "Be kind.",
                                          "history": [["Hi", "Hello"]]},
     [{"messages": [SYSTEM, user("Hi"), bot("Hello"), user(Q), bot(GOOD)]}]),
    ("6 ShareGPT", "sft", {"conversations": [human(Q), gpt(GOOD)], "system": "Be kind."},
     [{"messages": [SYSTEM, user(Q), bot(GOOD)]}]),
    ("7 minimind", "sft", {"conversations": [user(Q), bot(GOOD)]}, [DIALOGUE]),
    ("8 OpenRLHF", "sft", {"input": Q, "output": GOOD}, [{"prompt": Q, "response": GOOD}]),
    ("9 MOSS", "sft", {"conversation_id": "1", "meta_instruction": "Be kind.\n", "num_turns": 1,
                       "chat": {"turn_1": {"Human": f"<|Human|>: {Q}<eoh>\n",
                                           "Inner Thoughts": "<|Inner Thoughts|>: None<eot>\n",
                                           "Commands": "<|Commands|>: None<eoc>\n",
                                           "Tool Responses": "<|Results|>: None<eor>\n",
                                           "MOSS": f"<|MOSS|>: {GOOD}<eom>\n"}}, "category": "x"},
     [{"messages": [SYSTEM, user(Q), bot(GOOD)]}]),
    ("ours", "sft", {"prompt": Q, "response": GOOD, "id": 7}, [{"prompt": Q, "response": GOOD}]),
    ("10 TRL pairs", "reward", {**PAIR, "margin": 2.0}, [{**PAIR, "margin": 2.0}]),
    ("11 TRL conversational pairs", "reward",
     {"prompt": [user(Q)], "chosen": [bot(GOOD)], "rejected": [bot(BAD)]}, [TALK_PAIR]),
    ("12 TRL implicit", "reward", {"chosen": [user(Q), bot(GOOD)], "rejected": [user(Q), bot(BAD)]},
     [TALK_PAIR]),
    ("13 UltraFeedback", "reward", {"prompt": Q, "chosen": [user(Q), bot(GOOD)], "score_chosen": 9.0,
                                    "rejected": [user(Q), bot(BAD)], "score_rejected": 3.0},
     [TALK_PAIR]),
    ("14 texts that begin alike", "reward", {"chosen": "The sky is blue.", "rejected": "The sky is red."},
     [{"prompt": "The sky is", "chosen": "blue.", "rejected": "red."}]),
    ("15 HH", "reward", {"chosen": f"\n\nHuman: {Q}\n\nAssistant: {GOOD}",
                         "rejected": f"\n\nHuman: {Q}\n\nAssistant: {BAD}"}, [TALK_PAIR]),
    ("15 HH, text before the first turn", "reward",
     {"chosen": f"Be kind.\n\nHuman: {Q}\n\nAssistant: {GOOD}",
      "rejected": f"Be kind.\n\nHuman: {Q}\n\nAssistant: {BAD}"}, [SYSTEM_PAIR]),
    ("15 HH, a prompt column", "reward", {**PAIR, "prompt": f"\n\nHuman: {Q}\n\nAssistant:"}, [TALK_PAIR]),
    ("16 LLaMA-Factory, Alpaca", "reward",
     {"instruction": "Answer.", "input": Q, "chosen": GOOD, "rejected": BAD},
     [{**PAIR, "prompt": ALPACA["prompt"]}]),
    ("17 LLaMA-Factory, ShareGPT", "reward",
     {"conversations": [human(Q)], "chosen": gpt(GOOD), "rejected": gpt(BAD)}, [TALK_PAIR]),
    ("18 axolotl", "reward", {"messages": [user(Q)], "chosen": bot(GOOD), "rejected": bot(BAD)},
     [TALK_PAIR]),
    ("19 axolotl icr", "reward", {"system": "Be kind.", "input": Q, "chosen": GOOD, "rejected": BAD},
     [SYSTEM_PAIR]),
    ("20 axolotl intel", "reward", {"system": "", "question": Q, "chosen": GOOD, "rejected": BAD}, [PAIR]),
    ("21 axolotl argilla", "reward", {"instruction": Q, "chosen_response": GOOD, "rejected_response": BAD},
     [PAIR]),
    ("22 ms-swift", "reward", {**DIALOGUE, "rejected_response": BAD}, [TALK_PAIR]),
    ("22 ms-swift, KTO", "reward", {**DIALOGUE, "label": True}, [{**LIKED, "prompt": [user(Q)]}]),
    ("23 Nectar", "reward", {"prompt": f"\n\nHuman: {Q}\n\nAssistant: ", "answers": [
        {"answer": BAD, "rank": 2.0, "model": "b"}, {"answer": GOOD, "rank": 1.0, "model": "a"},
        {"answer": "Red.", "rank": 3.0, "model": "c"}]},
     [TALK_PAIR, {**TALK_PAIR, "rejected": "Red."}, {**TALK_PAIR, "chosen": BAD, "rejected": "Red."}]),
    ("24 NeMo-RL", "reward", {"context": [user(Q)], "completions": [
        {"rank": 1, "completion": [bot(BAD)]}, {"rank": 0, "completion": [bot(GOOD)]}]}, [TALK_PAIR]),
    ("25 TRL KTO", "reward", {"prompt": Q, "completion": " Blue.", "label": True}, [LIKED]),
    ("26 TRL KTO, conversational", "reward",
     {"prompt": [user(Q)], "completion": [bot(GOOD)], "label": False},
     [{**LIKED, "prompt": [user(Q)], "label": 0}]),
    ("27 LLaMA-Factory KTO", "reward", {"instruction": Q, "output": GOOD, "kto_tag": True}, [LIKED]),
    ("27 ShareGPT", "reward", {"conversations": [human(Q), gpt(GOOD)], "kto_tag": "true"},
     [{**LIKED, "prompt": [user(Q)]}]),
    ("28 axolotl KTO", "reward", {"question": Q, "completion": GOOD, "label": "false", "system": "Be kind."},
     [{**LIKED, "prompt": [SYSTEM, user(Q)], "label": 0}]),
    ("28 instruction", "reward", {"instruction": Q, "completion": GOOD, "label": True}, [LIKED]),
    ("29 ours, label", "reward", LIKED, [LIKED]),
    ("29 ours, score", "reward", {"prompt": Q, "response": GOOD, "score": 4},
     [{"prompt": Q, "response": GOOD, "score": 4}]),
    ("31 LMArena", "reward", {"conversation_a": [user(Q), bot(BAD)], "winner": "model_b",
                              "conversation_b": [user(Q), bot(GOOD)]}, [TALK_PAIR]),
    ("31 LMArena, tie", "reward", {"conversation_a": [user(Q), bot(BAD)], "winner": "tie (bothbad)",
                                   "conversation_b": [user(Q), bot(GOOD)]}, [TIE]),
    ("31 LMArena, both bad", "reward", {"conversation_a": [user(Q), bot(BAD)], "winner": "both_bad",
                                        "conversation_b": [user(Q), bot(GOOD)]}, [TIE]),
    ("31 LMArena 55k, tie", "reward", {"prompt": f'["{Q}"]', "response_a": f'["{BAD}"]',
                                       "response_b": f'["{GOOD}"]', "winner_model_a": 0,
                                       "winner_model_b": 0, "winner_tie": 1}, [TIE]),
    ("31 LMArena 55k", "reward", {"prompt": f'["{Q}"]', "response_a": f'["{GOOD}"]',
                                  "response_b": f'["{BAD}"]', "winner_model_a": 1, "winner_model_b": 0,
                                  "winner_tie": 0}, [TALK_PAIR]),
    ("32 AlpacaFarm", "reward", {"instruction": "Answer.", "input": Q, "output_1": BAD, "output_2": GOOD,
                                 "preference": 2}, [{**PAIR, "prompt": ALPACA["prompt"]}]),
    ("32 AlpacaEval, weighed", "reward", {"instruction": Q, "output_1": BAD, "output_2": GOOD,
                                          "preference": 1.9}, [PAIR]),
    ("32 AlpacaEval, the first", "reward", {"instruction": Q, "output_1": GOOD, "output_2": BAD,
                                            "preference": 1.2}, [PAIR]),
    *[(f"32 AlpacaEval, tie {x}", "reward", {"instruction": Q, "output_1": GOOD, "output_2": BAD,
                                             "preference": x}, [{**PAIR, "tie": True}]) for x in (0, 1.5)],
    ("10 ours, tie", "reward", {**PAIR, "tie": True}, [{**PAIR, "tie": True}]),
    ("10 ours, winner", "reward", {**PAIR, "winner": "tie"}, [{**PAIR, "tie": True}]),
    ("10 ours, no tie", "reward", {**PAIR, "tie": False, "winner": "a"}, [PAIR]),
    ("10 ours, part", "reward", {**PAIR, "part": "relevance"}, [{**PAIR, "part": "relevance"}]),
    ("16 with part and margin", "reward", {"instruction": Q, "chosen": GOOD, "rejected": BAD, "part": "length",
                                           "margin": 1}, [{**PAIR, "margin": 1, "part": "length"}]),
    ("23 Nectar, equal ranks", "reward", {"prompt": Q, "answers": [
        {"answer": GOOD, "rank": 1}, {"answer": BAD, "rank": 1}, {"answer": GOOD, "rank": 2}]},
     [{**PAIR, "tie": True}, {**PAIR, "chosen": BAD, "rejected": GOOD}]),
    ("29 ours, scores", "reward", {"prompt": Q, "response": GOOD, "scores": [1, 2, 6]},
     [{"prompt": Q, "response": GOOD, "score": 3.0, "scores": [1, 2, 6]}]),
    ("29 ours, both", "reward", {"prompt": Q, "response": GOOD, "scores": [1, 2], "score": 1.5, "part": "x"},
     [{"prompt": Q, "response": GOOD, "score": 1.5, "scores": [1, 2], "part": "x"}]),
    ("labelled text", "reward", {"text": RATED, "label": True}, [{**OPENING, "label": 1}]),
    ("rated text", "reward", {"text": RATED, "score": -2}, [{**OPENING, "score": -2}]),
    ("text rated by several", "reward", {"text": RATED, "scores": [0, 1]},
     [{**OPENING, "score": 0.5, "scores": [0, 1]}]),
    ("text with a part", "reward", {"text": RATED, "label": 0, "part": "p"}, [{**OPENING, "label": 0, "part": "p"}]),
    ("33 TRL prompts", "ppo", {"prompt": Q, "solution": "4"}, [{"prompt": Q, "extra": {"solution": "4"}}]),
    ("34 OpenRLHF prompts", "ppo", {"input": Q, "datasource": "x"},
     [{"prompt": Q, "extra": {"datasource": "x"}}]),
    ("34 messages", "ppo", {"input": [user(Q)]}, [{"prompt": [user(Q)]}]),
    ("35 Alpaca", "ppo", {"instruction": Q, "output": GOOD}, [{"prompt": Q, "extra": {"output": GOOD}}]),
    ("36 minimind", "ppo", {"conversations": [user(Q), bot("")]}, [{"prompt": [user(Q)]}]),
    ("37 verl", "ppo", {"data_source": "x", "prompt": [user(Q)], "ability": "maths",
                        "reward_model": {"style": "rule", "ground_truth": "4"}},
     [{"prompt": [user(Q)], "extra": {"data_source": "x", "ability": "maths",
                                      "reward_model": {"style": "rule", "ground_truth": "4"}}}]),
]


@pytest.mark.parametrize("kind,record,meant", [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_a_record_is_read_as_it_is_meant(kind, record, meant):
    assert records_in(record, kind)[1] == meant


@pytest.mark.parametrize("kind,record", [case[1:3] for case in CASES if case[0][:2] not in ("35", "36")],
                         ids=[case[0] for case in CASES if case[0][:2] not in ("35", "36")])
def test_a_single_file_needs_no_stage(kind, record):
    assert form_of(record).stage == kind


def test_every_form_has_a_case():
    read = {form_of(record, kind).name for _, kind, record, _ in CASES}
    assert {form.name for form in FORMS} - read == set()


@pytest.mark.parametrize("record,near", [
    ({"text": "a", "rating": 1}, "texts (text)"),
    ({"prompt": Q, "response": GOOD, "helpfulness": 3}, "ratings (prompt, response, score)"),
    ({"article": "a", "title": "b"}, "none")])
def test_what_has_no_form_is_an_error_that_names_the_nearest(record, near):
    with pytest.raises(ValueError) as caught:
        form_of(record)
    assert f"fields found: {', '.join(record)}" in str(caught.value) and near in str(caught.value)


@pytest.mark.parametrize("odd", [None, 5, "", [], {}, [5], [{}], [[]], {"role": []}, [{"role": [], "content": 1}],
                                 [{"from": "human", "value": [5]}], [["a", "b", "c"]], True, -1.5, "\\ud800"],
                         ids=repr)
@pytest.mark.parametrize("kind,record", [case[1:3] for case in CASES], ids=[case[0] for case in CASES])
def test_odd_values_are_a_bad_line_with_a_reason(kind, record, odd):
    for name in record:
        for stage in (kind, "sft", "ppo"):
            try:
                assert isinstance(records_in({**record, name: odd}, stage)[1], list)
            except ValueError as error:
                assert str(error)


def test_no_form_drops_feedback():
    for name in ("label", "score", "kto_tag", "winner"):
        for record in ({"text": "a"}, {"instruction": Q, "output": GOOD, "input": ""}):
            try:
                assert form_of({**record, name: 1}).stage == "reward"
            except ValueError as error:
                assert name in str(error)


@pytest.mark.parametrize("record,reason", [
    ({"conversations": [human(Q), {"from": "function_call", "value": "{}"}, gpt(GOOD)]}, "function_call"),
    ({"messages": [user(Q), {**bot(""), "tool_calls": [{"id": 1}]}]}, "tool"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}, bot(GOOD)]}, "more than text"),
    ({"chat": {"turn_1": {"Human": "a", "Commands": "<|Commands|>: Search(1)<eoc>", "MOSS": "b"}}}, "tool")])
def test_dialogues_with_more_than_text_are_refused(record, reason):
    with pytest.raises(ValueError, match=reason):
        records_in(record, "sft")


def test_what_a_file_was_read_as_is_said_once(tmp_path, capsys):
    rows = [case[2] for case in CASES if case[0] in ("31 LMArena", "31 LMArena, tie")]
    path = write(tmp_path / "d.jsonl", *rows, {**rows[0], "winner": "nobody"})
    assert len(load_records(path, "reward", say=True)) == 2
    assert capsys.readouterr().out == (f"{path}: 1 of 3 lines left out, which teach nothing: no choice (1)\n"
                                       f"{path}: read as LMArena (2)\n")


def test_fields_of_other_names_are_mapped(tmp_path):
    rows = [{"q": f"{Q} {i}", "good": GOOD, "bad": BAD, "id": 7} for i in range(30)]
    path = write(tmp_path / "d.jsonl", *rows)
    with pytest.raises(UserError, match="line 1: fields found: q, good, bad, id; .*--fields"):
        own_data_set(path)
    data = open_data(str(path), fields="prompt=q,chosen=good,rejected=bad", cache=tmp_path / "c")
    assert data.records("reward", "train")[0].keys() == PAIR.keys()
    with pytest.raises(UserError, match="--fields names p"):
        open_data(str(path), fields="prompt=p", cache=tmp_path / "c")


@pytest.mark.parametrize("text", ["prompt", "prompt=", "title=a", "prompt=a,prompt=b"])
def test_a_mapping_that_is_none_is_refused(text):
    with pytest.raises(UserError, match="--fields .* is not OUR_NAME=YOUR_NAME"):
        parse_fields(text)


def test_an_empty_reply_of_a_transcript_is_a_reply():
    chosen, rejected = f"\n\nHuman: {Q}\n\nAssistant: {GOOD}", f"\n\nHuman: {Q}\n\nAssistant:"
    assert records_in({"chosen": chosen, "rejected": rejected}, "reward")[1] == [{**TALK_PAIR, "rejected": ""}]


@pytest.mark.skipif(not HH.exists(), reason="no HH file here")
def test_published_transcripts_are_read_without_a_flag_but_for_those_that_teach_nothing(capsys):
    assert len(load_records(HH, "reward")) == 1496
    assert capsys.readouterr().out == (
        f"{HH}: 4 of 1,500 lines left out, which teach nothing: roles that do not alternate (3), dialogues that "
        "differ before their last answer (1)\n")
