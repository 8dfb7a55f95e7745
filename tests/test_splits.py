"""Splits: every form of a dialogue has one key, keys are cut by rank, and texts that hold a held-out
prompt with its reply are found."""
import pytest

from data.splits import HeldOutReplies, assign, split_key

QUESTION, ANSWER = "Where is the station?", "Turn left, then straight on."
SYSTEM = {"role": "system", "content": "Be kind."}
USER = {"role": "user", "content": QUESTION}
REPLY = {"role": "assistant", "content": ANSWER}
TALK = f"\n\nHuman: {QUESTION}\n\nAssistant: {ANSWER}"


@pytest.mark.parametrize("stage,record", [
    ("sft", {"messages": [USER, REPLY]}),
    ("sft", {"messages": [SYSTEM, USER, REPLY, {"role": "user", "content": "And then?"}, REPLY]}),
    ("sft", {"prompt": QUESTION, "response": "No idea.", "id": 7}),
    ("sft", {"prompt": [SYSTEM, USER], "response": ANSWER, "text": "ignored"}),
    ("sft", {"prompt": f"\n\nHuman: {QUESTION}\n\nAssistant:", "response": ANSWER}),
    ("reward", {"prompt": [USER, REPLY, USER], "chosen": "a", "rejected": "b"}),
    ("reward", {"prompt": QUESTION, "response": ANSWER, "label": 1, "messages": "ignored"}),
    ("ppo", {"prompt": f"  {QUESTION.upper()}\r\n"}),
    *(("ppo", {"prompt": f"{c}Where is{c} the sta{c}tion?{c}"}) for c in "\xad\u200b\u200d\u2060\ufeff"),
    ("ppo", {"prompt": QUESTION.replace(" ", "  ")}),
    ("pretrain", {"text": TALK, "id": 3}), ("pretrain", {"text": f"Be kind.{TALK}{TALK}"}),
    ("pretrain", {"text": QUESTION})])
def test_every_form_of_a_dialogue_has_one_key(stage, record):
    assert split_key(record, stage) == split_key({"prompt": QUESTION}, "ppo")


def test_other_questions_have_other_keys():
    assert len({split_key({"prompt": f"Question {i}"}, "ppo") for i in range(100)}) == 100


@pytest.mark.parametrize("n", [3, 19, 20, 39, 60, 1000])
def test_keys_are_cut_by_rank(n):
    keys = {split_key({"prompt": str(i)}, "ppo") for i in range(n)}
    splits = list(assign({"ppo": keys}, {"ppo": {"val", "test"}}, {}).values())
    assert splits.count("val") == splits.count("test") == max(1, n // 20)


@pytest.mark.parametrize("start", range(0, 2000, 100))
def test_each_stage_has_some_of_every_split_and_they_agree(start):
    """Twenty prompts of PPO, the reward model's twenty others, and five hundred dialogues that hold
    them all."""
    keys = [split_key({"prompt": str(start + i)}, "ppo") for i in range(500)]
    groups = {"sft": set(keys), "reward": set(keys[:20]), "ppo": set(keys[20:40])}
    splits = assign(groups, dict.fromkeys(groups, {"val", "test"}), {})
    for of_stage in groups.values():
        assert {splits.get(key, "train") for key in of_stage} == {"train", "val", "test"}
    assert len(splits) <= 54  # 50, and at most two more for each small stage


def test_what_the_user_holds_out_stays_and_counts():
    keys = set(range(100))
    splits = assign({"sft": keys}, {"sft": {"val"}}, {1: "test", 50: "val", 51: "val"})
    assert splits == {1: "test", 50: "val", 51: "val", 99: "val", 98: "val", 97: "val"}


@pytest.mark.parametrize("text", [
    f"{QUESTION} {ANSWER}", f"{QUESTION}{ANSWER}", f"Some of the news.{TALK}\n\nHuman: Thanks.",
    f"q: {QUESTION.lower()}\n\n### a: {ANSWER}", f"<|Human|>: {QUESTION}<eoh>\n<|MOSS|>: {ANSWER}<eom>",
    f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n{ANSWER}<|im_end|>",
    f"<start_of_turn>user\n{QUESTION}<end_of_turn>\n<start_of_turn>model\n{ANSWER}",
    f"[INST] {QUESTION} [/INST] {ANSWER}", f"### Question\n{QUESTION}\n### Answer\n{ANSWER}"])
def test_a_prompt_followed_by_its_reply_is_found(text):
    assert HeldOutReplies([(QUESTION, ANSWER)]).are_in(text)


@pytest.mark.parametrize("text", [
    QUESTION, ANSWER, f"{ANSWER} {QUESTION}", f"{QUESTION} No idea.", "",
    f"{QUESTION} {'x ' * 100}{ANSWER}", f"Some{QUESTION} {ANSWER}", f"{QUESTION} {ANSWER[:-1]}"])
def test_a_prompt_or_a_reply_alone_is_not(text):
    assert not HeldOutReplies([(QUESTION, ANSWER), ("Who is it?", "Nobody.")]).are_in(text)


def test_short_prompts_and_replies_are_found_as_words_only():
    replies = HeldOutReplies([("q1", "a"), ("q1 and more of it", "b")])
    assert replies.are_in("Then q1: a.")
    assert replies.are_in("q1 and more of it b")
    assert not replies.are_in("Then q12: a.")
    assert not replies.are_in("Then q1: about.")


def test_nothing_follows_from_empty_prompts_and_replies():
    assert not HeldOutReplies([("", "a"), ("q", " ")]).are_in("q a")


def test_texts_without_spaces_are_searched_at_every_character():
    replies = HeldOutReplies([("这家酒店", "的服务很好，离地铁站也很近。")])
    assert replies.are_in("昨天住的这家酒店的服务很好，离地铁站也很近。下次再来")


def test_short_phrases_that_anybody_writes_are_no_leak():
    replies = HeldOutReplies([("很", "不错"), ("这本书", "很好")])
    assert replies.are_in("很不错。")
    assert replies.are_in("问：这本书 答：很好")
    assert not replies.are_in("房间很不错的")
    assert not replies.are_in("这本书的内容很好")
    assert not replies.are_in("这本书，他说，很好")
