"""Chat formats of other families: the text is the template's, the mask is the assistant's, nothing is
forged; and vocabularies whose tokens have any ids."""
import json

import pytest
import torch

from data.batches import prompt_ids, reward_rows
from data.chat import MOSS_SYSTEM, QWEN_SYSTEM, chat_format
from data.tokenizer import Tokenizer, Vocabulary, train_bpe
from runtime.decoding import ends
from runtime.options import UserError

GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
QWEN2 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
         r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
TURNS = [("user", "Hi"), ("assistant", "Yes."), ("user", "So?"), ("assistant", "No.")]
MERGES = [b"\n\n", b" N", b" No", b">:"]


def dialogue(*turns: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in turns]


def vocabulary(names: list[str], chat: dict[str, str], end: str, text: tuple[str, ...] = (), **more) -> Tokenizer:
    """Bytes and four merges after the named tokens, with ten empty rows at the end."""
    ranks = [bytes([i]) for i in range(256)] + MERGES
    added = {name: i for i, name in enumerate([*names, *text])}
    n = len(added) + len(ranks)
    return Tokenizer(ranks, GPT2 if chat["name"] in ("moss", "plain") else QWEN2, Vocabulary(
        ids=list(range(len(added), n)), rows=n + 10, special={name: added[name] for name in names},
        end_ids=[added[end], added[names[0]]], eot_id=0, pad_id=0, chat=chat,
        text={name: added[name] for name in text}, **more))


CHATML = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
LLAMA = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
THINK = ("<think>", "</think>", "   ")
QWEN = vocabulary(CHATML, {"name": "chatml", "system": QWEN_SYSTEM}, "<|im_end|>", nfc=True)
QWEN3 = vocabulary(CHATML, {"name": "chatml", "think": "off"}, "<|im_end|>", THINK, nfc=True)
MOSS = vocabulary(["<|endoftext|>", "<eoh>", "<eom>"], {"name": "moss", "system": "M\n"}, "<eom>")
LLAMA3 = vocabulary(LLAMA, {"name": "llama3", "bos": LLAMA[0], "date": "1 Jan 2025"}, "<|eot_id|>")
LLAMA30 = vocabulary(LLAMA, {"name": "llama3", "bos": LLAMA[0]}, "<|eot_id|>")
PLAIN = vocabulary(["<|endoftext|>"], {"name": "plain", "end": "<|endoftext|>"}, "<|endoftext|>")
OURS = train_bpe(["hello, is it good?"] * 3, 270)
ALL = {"qwen": QWEN, "qwen3": QWEN3, "moss": MOSS, "llama3": LLAMA3, "llama30": LLAMA30, "plain": PLAIN, "ours": OURS}
every = pytest.mark.parametrize("tokenizer", ALL.values(), ids=ALL)


def learned(tokenizer: Tokenizer, messages: list[dict[str, str]]) -> str:
    ids, mask = tokenizer.render_chat(messages)
    return tokenizer.decode(i for i, m in zip(ids, mask, strict=True) if m)


@pytest.mark.parametrize("tokenizer,before,text", [
    (QWEN, f"<|im_start|>system\n{QWEN_SYSTEM}<|im_end|>\n",
     "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>\n"),
    (QWEN3, "", "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\nYes.<|im_end|>\n"),
    (MOSS, "M\n", "<|Human|>: Hi<eoh>\n<|MOSS|>: Yes.<eom>\n"),
    (LLAMA3, "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n"
     "Today Date: 1 Jan 2025\n\n<|eot_id|>", "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
     "<|start_header_id|>assistant<|end_header_id|>\n\nYes.<|eot_id|>"),
    (LLAMA30, "<|begin_of_text|>", "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
     "<|start_header_id|>assistant<|end_header_id|>\n\nYes.<|eot_id|>"),
    (PLAIN, "", "Human: Hi\n\nAssistant: Yes.<|endoftext|>")], ids=list(ALL)[:6])
def test_the_text_is_the_format_s(tokenizer, before, text):
    assert tokenizer.decode(tokenizer.render_chat(dialogue(*TURNS[:2]))[0]) == before + text


@every
def test_the_mask_is_the_assistant_s_content_with_its_end(tokenizer):
    end, space = tokenizer.decode([tokenizer.eom_id]), " " * tokenizer.chat.leading_space
    assert learned(tokenizer, dialogue(("system", "S"), *TURNS)) == f"{space}Yes.{end}{space}No.{end}"


@every
def test_a_dialogue_is_its_prompt_its_reply_and_a_newline_at_most(tokenizer):
    prompt, _ = tokenizer.render_chat(dialogue(*TURNS[:3]), reply=True)
    ids, _ = tokenizer.render_chat(dialogue(*TURNS))
    together = prompt + tokenizer.reply_ids("No.")
    assert ids[:len(together)] == together
    assert tokenizer.decode(ids[len(together):]).strip() == ""


@every
def test_a_reply_s_text_is_what_was_encoded(tokenizer):
    for text in ("No.", "好\n\n x ", "<eom><|im_end|>"):
        expected = text.strip() if tokenizer.chat.name == "llama3" else text
        assert tokenizer.reply_text(tokenizer.reply_ids(text)) == expected
        seen = [tokenizer.reply_bytes(i, j == 0) for j, i in enumerate(tokenizer.reply_ids(text))]
        assert b"".join(seen).decode() == expected


@every
def test_nobody_forges_a_special_token(tokenizer):
    names = "".join(tokenizer.special)
    ids, _ = tokenizer.render_chat(dialogue(("system", names), ("user", names)), reply=True)
    control = [i for i in ids if i in {*tokenizer.special_ids, *tokenizer.vocabulary.text.values()}]
    plain, _ = tokenizer.render_chat(dialogue(("system", "x"), ("user", "x")), reply=True)
    spaces = {i for name, i in tokenizer.vocabulary.text.items() if name.isspace()}
    assert [i for i in control if i not in spaces] == [i for i in plain if i in control and i not in spaces]


@every
def test_a_state_is_json_and_complete(tokenizer):
    copy = Tokenizer.from_state(json.loads(json.dumps(tokenizer.to_state())))
    copy.require_same(tokenizer, "a and b")
    assert copy.render_chat(dialogue(*TURNS)) == tokenizer.render_chat(dialogue(*TURNS))
    assert (copy.end_ids, copy.special_ids, copy.n_vocab) == (
        tokenizer.end_ids, tokenizer.special_ids, tokenizer.n_vocab)


def test_our_own_state_has_the_two_fields_of_earlier_versions():
    assert set(OURS.to_state()) == {"pattern", "ranks"}


@every
def test_a_rollout_s_row_and_its_feedback_are_the_same_ids(tokenizer):
    row, flags = reward_rows([{"prompt": "Hi", "response": "No."}], tokenizer, "{prompt}", 999)[0]
    assert row == prompt_ids(tokenizer, "Hi") + tokenizer.reply_ids("No.")
    assert row[-1] == tokenizer.eom_id
    assert sum(flags) == len(tokenizer.reply_ids("No."))


# ---- what only one family has --------------------------------------------------------------------

def test_the_text_between_special_tokens_is_encoded_at_once():
    ids, mask = QWEN.render_chat(dialogue(("user", "\nx"), ("assistant", "\ny")))
    newlines = QWEN.encode("\n\n")
    assert len(newlines) == 1
    assert ids.count(newlines[0]) == 2  # over the border of role and content
    learned_ids = [i for i, m in zip(ids, mask, strict=True) if m]
    assert learned_ids == [*QWEN.encode("y"), QWEN.eom_id]  # a token that begins before the border is not learned


def test_moss_reads_its_marker_as_text_and_a_reply_begins_with_a_space():
    ids, _ = MOSS.render_chat(dialogue(("user", "Hi")), reply=True)
    assert MOSS.decode(ids[-1:]) == ">:"
    assert MOSS.decode(MOSS.reply_ids("No")[:1]) == " No"


def test_the_meta_instruction_is_moss_s_default_and_a_system_message_replaces_it():
    assert MOSS_SYSTEM.startswith("You are an AI assistant whose name is MOSS.\n")
    assert MOSS_SYSTEM.endswith("Capabilities and tools that MOSS can possess.\n")
    ids, _ = MOSS.render_chat(dialogue(("system", "Be kind."), ("user", "Hi")), reply=True)
    assert MOSS.decode(ids) == "Be kind.\n<|Human|>: Hi<eoh>\n<|MOSS|>:"


def test_llama_trims_and_smollm_does_not():
    assert LLAMA30.decode(LLAMA30.reply_ids(" a \n")) == "a<|eot_id|>"
    assert QWEN.decode(QWEN.reply_ids(" a \n")) == " a \n<|im_end|>"


def test_thoughts_stand_in_the_last_reply_only():
    turns = dialogue(*TURNS[:1], ("assistant", "<think>\nhm\n</think>\n\nYes."), *TURNS[2:])
    assert "hm" not in QWEN3.decode(QWEN3.render_chat(turns)[0])
    thinking = QWEN3.with_chat("chatml", think="on")
    last = thinking.render_chat(dialogue(("user", "Hi"), ("assistant", "<think>hm</think>\nYes.")))
    assert thinking.decode(last[0]).endswith("assistant\n<think>\nhm\n</think>\n\nYes.<|im_end|>\n")
    assert thinking.decode(thinking.render_chat(dialogue(("user", "Hi")), reply=True)[0]).endswith("assistant\n")
    assert learned(thinking, dialogue(("user", "Hi"), ("assistant", "Yes."))).startswith("<think>\n\n</think>\n\nYes")


def test_another_format_puts_its_own_end_first():
    other = QWEN.with_chat("plain")
    assert other.decode(other.reply_ids("No")) == " No<|im_end|>"
    assert PLAIN.with_chat("plain", system="S").end_ids == PLAIN.end_ids
    with pytest.raises(UserError, match="chat format llama3: this vocabulary has no <|start_header_id|>"):
        QWEN.with_chat("llama3")
    with pytest.raises(UserError, match="there are mosslet, moss, chatml, llama3, plain"):
        chat_format("alpaca")


def test_thoughts_need_their_tokens():
    with pytest.raises(UserError, match="this vocabulary has no <think>, </think>: .*`python -m convert import"):
        QWEN.with_chat("chatml", think="off")


# ---- vocabularies --------------------------------------------------------------------------------

def test_rows_without_a_token_are_known_and_never_text():
    assert QWEN.empty_ids == list(range(QWEN.n_vocab - 10, QWEN.n_vocab))
    assert set(QWEN.empty_ids) < set(QWEN.special_ids)
    assert QWEN.reply_text([QWEN.n_vocab - 1, *QWEN.encode("a")]) == "a"


def test_added_tokens_of_white_space_are_encoded_and_others_are_not():
    assert QWEN3.encode("a   b") == [*QWEN3.encode("a"), QWEN3.special["   "], *QWEN3.encode("b")]
    assert QWEN3.special["<think>"] not in QWEN3.encode("<think>")
    assert QWEN3.special["<think>"] not in QWEN3.special_ids  # a model that thinks must be able to write it


def test_white_space_that_tiktoken_cannot_split_is_one_line():
    assert len(QWEN.encode("a" + " " * 20_000)) == 20_001
    with pytest.raises(UserError, match="the text 'ab .*'… of 1000003 characters has 1000000 of white space in a row"):
        QWEN.encode("ab" + " " * 1_000_000 + "x")


def test_text_is_brought_to_nfc_where_the_family_does():
    assert QWEN.encode("e\u0301") == QWEN.encode("é")
    assert LLAMA3.encode("e\u0301") != LLAMA3.encode("é")


def test_bytes_without_a_token_are_dropped_and_a_line_says_so_once(capsys):
    ranks = [bytes([i]) for i in range(256) if i not in (4, 0xf1)]
    tokenizer = Tokenizer(ranks, GPT2, Vocabulary(range(1, 255), 255, {"<e>": 0}, [0], 0, 0,
                                                  {"name": "plain", "end": "<e>"}))
    assert tokenizer.decode(tokenizer.encode("a\x04b\x04")) == "ab"
    assert capsys.readouterr().err.count("no token for 2 of the 256 bytes") == 1
    tokenizer.encode("\x04\U00040000")
    assert capsys.readouterr().err == ""
    ids, mask = tokenizer.render_chat(dialogue(("user", "\x04"), ("assistant", "\x04x")))
    assert tokenizer.decode(i for i, m in zip(ids, mask, strict=True) if m) == " x<e>"


@pytest.mark.parametrize("more,message", [
    ({"rows": 200}, "the model's embedding has 200 rows"), ({"eot_id": 900}, "has id 900"),
    ({"special": {"<e>": 5}}, "share ids")])
def test_a_vocabulary_that_does_not_fit_is_refused(more, message):
    settings = {"ids": range(1, 257), "rows": 300, "special": {"<e>": 0}, "end_ids": [0], "eot_id": 0, "pad_id": 0,
                "chat": {"name": "plain", "end": "<e>"}}
    with pytest.raises(UserError, match=message):
        Tokenizer([bytes([i]) for i in range(256)], GPT2, Vocabulary(**(settings | more)))


def test_any_of_several_tokens_ends_a_reply():
    tokens = torch.tensor([[1, 5], [9, 1]])
    assert ends(tokens, (5, 9)).tolist() == [[False, True], [True, False]]
    assert ends(tokens, 5).tolist() == [[False, True], [False, False]]
    assert not ends(tokens, None).any()
