"""Tokenizers of other projects: their files give the ids that their own packages give, what cannot be expressed
is refused by name, and what we write is read back to the same."""
import io
import itertools
import json
import os
import pathlib
import random
import re
import sys

import pytest
import regex
import tiktoken

from convert import splits, tokenizers
from convert.tokenizer_files import template_of, text_of, tokenizer_config, tokenizer_json, write_tokenizer
from data.chat import MOSS_SYSTEM, chat_format
from data.tokenizer import PATTERN, Tokenizer, train_bpe, train_chars
from runtime.options import UserError

WORDS = """the quick Brown fox's don't I'LL HELLO hello_world 你好 世界 今天天气真好 テスト ひらがな カタカナー
한국어 привет Ünïcödé e\u0301a\u0300 ça 😀 👩\u200d👩\u200d👧 🇨🇳 ½ ² ٣ ４ 3.14159 12345 1,000 2024-01-01 def(x):
return #include <stdio.h> https://a.b/c?d=1
{"a":[1,2]} %s $$ -- ... !!! ’s “q” — \u200b \ufeff ゛ ・ ㎏ ﬁ \u212b \u1e9b\u0323 𝟘 𠀀""".split()
SPACES = [" ", "  ", "   ", "\n", "\n\n", "\r\n", "\t", " \n ", "\t\t", "\u3000", "\u00a0", "\x85", " " * 9, "\n\n\n ",
          "\x1c", "\x1f", "\u2028"]
RANGES = [(0, 0x1f), (0x20, 0x7e), (0x7f, 0xff), (0x100, 0x24f), (0x300, 0x36f), (0x370, 0x5ff), (0x900, 0x97f),
          (0x2000, 0x206f), (0x2100, 0x27bf), (0x3000, 0x30ff), (0x4e00, 0x9fff), (0xac00, 0xd7a3), (0xe000, 0xe0ff),
          (0xff00, 0xffef), (0x1f300, 0x1faff), (0x20000, 0x2a6df), (0x40000, 0x10ffff)]


def mixed_strings(n: int, seed: int = 0) -> list[str]:
    """Words, white space, characters of many scripts and planes, control characters, numbers."""
    rng, texts = random.Random(seed), []

    def characters(ranges: list[tuple[int, int]], most: int) -> str:
        return "".join(chr(rng.randint(*rng.choice(ranges))) for _ in range(rng.randint(1, most)))

    for _ in range(n):
        kinds = rng.choices(range(5), (40, 25, 20, 8, 7), k=rng.randint(1, 14))
        texts.append("".join((rng.choice(WORDS), rng.choice(SPACES), characters(RANGES, 6), characters(RANGES[:1], 3),
                              str(rng.randint(0, 10**rng.randint(1, 9))))[kind] for kind in kinds))
    return texts


BPE = train_bpe([*mixed_strings(300, 1), "hello world, the world is good"] * 2, 700)
TEMPLATE = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
THINKS = "{% if add_generation_prompt and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"


def a_file(first: int = 0, names: tuple[str, ...] = ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
           text: tuple[str, ...] = (), pairs: bool = True, **more) -> dict:
    """A tokenizer.json of BPE's merges with its own pattern: tokens' ids begin at `first`, names follow."""
    file = tokenizer_json(BPE)
    ranks = [splits.from_bytes(token) for token in BPE.ranks]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = [{"id": first + len(ranks) + i, "content": name, "special": name not in text, **flags}
             for i, name in enumerate((*names, *text))]
    merges = file["model"]["merges"]
    model = {"type": "BPE", "vocab": {token: first + i for i, token in enumerate(ranks)},
             "merges": merges if pairs else [" ".join(m) for m in merges]} | more.pop("model", {})
    return file | {"added_tokens": added, "model": model} | more


def saved(folder: pathlib.Path, file: dict | str, **settings) -> pathlib.Path:
    """The folder of a checkpoint that holds this file."""
    (folder / "tokenizer.json").write_text(file if isinstance(file, str) else json.dumps(file), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"} | settings))
    return folder


# ---- what is read --------------------------------------------------------------------------------

@pytest.mark.parametrize("pairs", [True, False])
@pytest.mark.parametrize("first", [0, 17])
def test_ids_are_the_file_s_and_pieces_the_pattern_s(tmp_path, first, pairs):
    tokenizer = tokenizers.read_tokenizer(saved(tmp_path, a_file(first, pairs=pairs)), rows=800)
    for text in mixed_strings(200):
        assert tokenizer.encode(text) == [first + i for i in BPE.encode(text)]
    assert tokenizer.n_vocab == 800
    assert set(range(first)) < set(tokenizer.special_ids)  # rows without a token
    assert tokenizer.decode(tokenizer.end_ids) == "<|endoftext|>"


def merged(piece: bytes, merges: dict[tuple[bytes, bytes], int]) -> list[bytes]:
    """Byte-level BPE by its definition: the first merge in order, leftmost, until none applies."""
    parts = [bytes([i]) for i in piece]
    while best := min((pair for pair in itertools.pairwise(parts) if pair in merges), key=merges.get, default=None):
        i = list(itertools.pairwise(parts)).index(best)
        parts[i:i + 2] = [b"".join(best)]
    return parts


def test_merges_are_in_their_own_order_whatever_the_ids(tmp_path):
    """Ids shuffled: were ranks taken from them, other merges would come first."""
    file, rng = a_file(), random.Random(0)
    ids = list(file["model"]["vocab"].values())
    rng.shuffle(ids)
    file["model"]["vocab"] = dict(zip(file["model"]["vocab"], ids, strict=True))
    tokenizer = tokenizers.read_tokenizer(saved(tmp_path, file))
    merges = {tuple(splits.to_bytes(name, "") for name in pair): i
              for i, pair in enumerate(file["model"]["merges"])}
    for text in mixed_strings(100):
        pieces = regex.findall(PATTERN, text)
        expected = [part for piece in pieces for part in merged(piece.encode(), merges)]
        assert [tokenizer.token_bytes(i) for i in tokenizer.encode(text)] == expected


def test_a_token_that_no_merge_leads_to_is_written_only_where_the_file_says_so(tmp_path):
    file = a_file(model={"merges": [m for m in a_file()["model"]["merges"] if "".join(m) != "Ġworld"]})
    assert "Ġworld" in file["model"]["vocab"]
    without = tokenizers.read_tokenizer(saved(tmp_path, file))
    token = file["model"]["vocab"]["Ġworld"]
    assert token not in without.encode("hello world")
    assert without.decode([token]) == " world"


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


def small(tokens: str, *merges: str, **more) -> dict:
    """Changes of a_file: a vocabulary of the 256 bytes, these tokens and merges, and GPT-2's pattern."""
    names = [*map(splits.from_bytes, (bytes([i]) for i in range(256))), *tokens.split()]
    return {"first": 300, "pre_tokenizer": BYTE_LEVEL,
            "model": {"vocab": {name: i for i, name in enumerate(names)}, "merges": list(merges)} | more}


@pytest.mark.parametrize("change,texts", [
    (small("ab bc abc", "b c", "a b", "ab c"), ["abc", "xabc", "ab", "abcd"]),
    (small("ab cd bc abc", "a bc", "a b", "c d", "ab c", "b c"), ["abcd", "abc", "bcd"]),  # one merge is never reached
    (small("ab", "a b", "a b"), ["ab"]), (small("abc"), ["abc", "xabc"]),
    (small("abc", ignore_merges=True), ["abc", "xabc", "abcd"])])
def test_tokens_are_written_where_their_own_merges_make_them(tmp_path, change, texts):
    """tiktoken takes a piece that is a token, and merges any pair that makes one: "abc" was one token although the
    file's merges gave a, bc."""
    package = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.read_tokenizer(saved(tmp_path, a_file(**change)))
    for file in ((tmp_path / "tokenizer.json").read_text(), json.dumps(tokenizer_json(tokenizer))):
        theirs = package.Tokenizer.from_str(file)
        assert [tokenizer.encode(text) for text in texts] == [theirs.encode(text).ids for text in texts]


def write_pair(folder: pathlib.Path, names: tuple[str, str] = ("vocab.json", "merges.txt"), **settings) -> pathlib.Path:
    file = a_file()
    vocab = file["model"]["vocab"] | {"<|endoftext|>": len(file["model"]["vocab"])}
    (folder / names[0]).write_text(json.dumps(vocab), encoding="utf-8")
    (folder / names[1]).write_text("\n".join(["#version: 0.2", *map(" ".join, file["model"]["merges"]), ""]),
                                   encoding="utf-8")
    if settings:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize("names", [("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe")])
def test_two_files_of_gpt2_s_kind_are_read(tmp_path, names):
    tokenizer = tokenizers.read_tokenizer(write_pair(tmp_path, names))
    assert tokenizer.pattern == splits.GPT2
    assert tokenizer.end_ids == (len(BPE.ranks),)
    text = "hello  world\n\n1234"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.eom_id not in tokenizer.encode("<|endoftext|>")


def test_codegen_s_white_space_and_moss_s_ends_are_read(tmp_path):
    n = len(BPE.ranks)
    write_pair(tmp_path, tokenizer_class="MossTokenizer", eos_token="<|endoftext|>")
    added = {"   ": n + 1, "\t\t": n + 2, "<eoh>": n + 3, "<eom>": n + 4}
    (tmp_path / "added_tokens.json").write_text(json.dumps(added))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": n + 4}))
    tokenizer = tokenizers.read_tokenizer(tmp_path, rows=n + 20)
    assert tokenizer.encode("a   b") == [*tokenizer.encode("a"), n + 1, *tokenizer.encode("b")]
    assert (tokenizer.chat.name, tokenizer.chat.system) == ("moss", MOSS_SYSTEM)
    assert tokenizer.end_ids == (n + 4, n)
    assert len(tokenizer.empty_ids) == 15
    ids, _ = tokenizer.render_chat([{"role": "user", "content": "Hi"}], reply=True)
    assert tokenizer.decode(ids) == MOSS_SYSTEM + "<|Human|>: Hi<eoh>\n<|MOSS|>:"


def gguf_fields(**more) -> dict:
    file = a_file(3)
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *file["model"]["vocab"], "<x>", "[PAD]"]
    merges = [" ".join(merge) for merge in file["model"]["merges"]]
    fields = {"model": "gpt2", "pre": "smollm", "tokens": tokens, "merges": merges,
              "token_type": [3] * 3 + [1] * len(BPE.ranks) + [4, 5], "bos_token_id": 1, "eos_token_id": 2,
              "padding_token_id": 2, "add_bos_token": False} | more
    return {f"tokenizer.ggml.{key}": value for key, value in fields.items()} | {"tokenizer.chat_template": TEMPLATE}


def test_gguf_s_fields_are_read():
    tokenizer = tokenizers.from_gguf(gguf_fields())
    assert (tokenizer.pattern, tokenizer.chat.name) == (splits.SMOLLM, "chatml")
    assert (tokenizer.end_ids, tokenizer.eot_id, tokenizer.pad_id) == ((2,), 0, 2)
    assert tokenizer.empty_ids == [tokenizer.n_vocab - 1]
    assert tokenizer.special["<x>"] not in tokenizer.special_ids
    assert min(tokenizer.encode("hello world")) >= 3


def test_an_encoding_of_tiktoken_is_read(monkeypatch):
    ranks = {token: i for i, token in enumerate(BPE.ranks)}
    encoding = tiktoken.Encoding("mine", pat_str=PATTERN, mergeable_ranks=ranks,
                                 special_tokens={"<|endoftext|>": 900})
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: encoding)
    tokenizer = tokenizers.from_tiktoken("mine")
    assert (tokenizer.n_vocab, tokenizer.end_ids, tokenizer.chat.name) == (901, (900,), "plain")
    assert tokenizer.encode("hello world 你好") == encoding.encode("hello world 你好")


def test_without_the_network_tiktoken_s_encodings_are_one_line(monkeypatch):
    def offline(name):
        raise OSError("no route\nto host")

    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    with pytest.raises(UserError, match=r"'gpt2' cannot be had \(no route to host\)"):
        tokenizers.from_tiktoken("gpt2")


@pytest.mark.parametrize("template,expected", [
    (TEMPLATE, {"name": "chatml"}),
    (TEMPLATE + THINKS, {"name": "chatml", "think": "off"}),
    ([{"name": "tools", "template": "x"}, {"name": "default", "template": TEMPLATE}], {"name": "chatml"}),
    ("", {"name": "plain", "end": "<|endoftext|>"})])
def test_the_chat_format_is_the_template_s(tmp_path, template, expected):
    file = a_file(names=("<|endoftext|>", "<|im_start|>", "<|im_end|>"), text=("<think>", "</think>"))
    tokenizer = tokenizers.read_tokenizer(saved(tmp_path, file, chat_template=template))
    state = tokenizer.to_state()["vocabulary"]["chat"]
    assert {key: value for key, value in state.items() if key != "template"} == expected
    if expected["name"] == "chatml":
        assert tokenizer.decode(tokenizer.end_ids) == "<|im_end|><|endoftext|>"
        assert state["template"] in (template, TEMPLATE)


def rendered(template, messages):
    """What `transformers` would make of a dialogue before a reply."""
    sandbox = pytest.importorskip("jinja2.sandbox")
    environment = sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(template).render(messages=messages, add_generation_prompt=True)


@pytest.mark.parametrize("template", ["\n<|im_start|>system\n" * 20_000, "'<|im_start|>system\n" * 20_000])
def test_a_long_template_is_read_at_once(template):
    assert tokenizers.system_line(template) == ""  # in the square of its length it would take minutes


def test_what_takes_the_square_of_its_length_or_nests_too_deep_is_one_line():
    file = a_file()
    file["model"]["vocab"]["Q" * 20_000] = 5000
    with pytest.raises(UserError, match="the token .* has 20000 bytes"):
        tokenizers.make(tokenizers.parts_of_json(file, "here"), None)
    with pytest.raises(UserError, match="cannot read its regular expression"):
        splits.pattern_of(("(" * 400 + "a" + ")" * 400,), "here")


@pytest.mark.parametrize("line,system", [
    (r"{{ '<|im_start|>system\nYou are kind.<|im_end|>\n' }}", "You are kind."),
    ("{{ '<|im_start|>system\nYou are kind.<|im_end|>\n' }}", "You are kind."),
    ("\n<|im_start|>system\nIt's {} \\n.<|im_end|>\n", "It's {} \\n."),  # text, in which nothing is an escape
    (r"{{ '<|im_start|>system\nStep by step, within \\boxed{}.<|im_end|>\n' }}", r"Step by step, within \boxed{}."),
    (r"""{{ "<|im_start|>system\nYou're a helpful assistant.<|im_end|>\n" }}""", "You're a helpful assistant."),
    (r"""{{ '<|im_start|>system\nYou\'re \u00e9 🐱.<|im_end|>\n' }}""", "You're é 🐱."),
    (r"""{{ "<|im_start|>system\nSay \"hi\", <b>.\nLine {{ 2 }}.<|im_end|>\n" }}""", 'Say "hi", <b>.\nLine {{ 2 }}.')])
def test_a_system_line_is_what_the_template_inserts(tmp_path, capsys, line, system):
    template = "{% if messages[0].role != 'system' %}" + line + "{% endif %}" + TEMPLATE
    tokenizer = tokenizers.read_tokenizer(saved(tmp_path, a_file(), chat_template=template))
    assert tokenizer.chat.system == system
    assert capsys.readouterr().err == ""  # Jinja renders the same
    assert rendered(template, [{"role": "user", "content": "Hi"}]) == tokenizer.decode(
        tokenizer.render_chat([{"role": "user", "content": "Hi"}], reply=True)[0])


@pytest.mark.parametrize("template,name,said", [
    (TEMPLATE + "{% if add_generation_prompt %}<think>\n{% endif %}", "chatml", "writes thoughts"),
    (TEMPLATE + THINKS, "chatml", "writes thoughts"),  # of a vocabulary without such tokens
    (TEMPLATE.replace("m.content", "m.content|trim"), "chatml", "trims what is said"),
    (TEMPLATE.replace("m.content", "m['content'] | trim"), "chatml", "trims what is said"),
    ("{% for m in messages %}### Human: {{ m.content }}\n### Assistant:{% endfor %}", "plain", "of no format")])
def test_a_template_that_is_seen_to_differ_from_our_format_is_said(tmp_path, capsys, template, name, said):
    tokenizer = tokenizers.read_tokenizer(saved(tmp_path, a_file(), chat_template=template))
    line = capsys.readouterr().err
    assert line.count("\n") == line.count(f"Mosslet speaks {name}") == 1 and said in line
    assert tokenizer.chat.name == name
    tokenizer.render_chat([{"role": "user", "content": "Hi"}], reply=True)
    assert tokenizers.read_tokenizer(tmp_path, chat_format="chatml").chat.name == "chatml"
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("ends,chat_format,expected", [
    (["<|im_end|>", "<|endoftext|>"], "", "<|im_end|><|endoftext|>"), (["<|im_end|>"], "chatml", "<|im_end|>"),
    (["a", "<|endoftext|>"], "", "<|endoftext|>a")])  # no chat format ends in text
def test_where_the_files_name_no_end_it_is_generation_config_s_first_token(tmp_path, ends, chat_format, expected):
    file = a_file()
    ids = file["model"]["vocab"] | {token["content"]: token["id"] for token in file["added_tokens"]}
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [ids[name] for name in ends]}))
    tokenizer = tokenizers.read_tokenizer(saved(tmp_path, file, eos_token=None), chat_format=chat_format)
    assert tokenizer.decode(tokenizer.end_ids) == expected
    _, mask = tokenizer.render_chat([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
    assert tokenizer.reply_ids("b")[-1] == tokenizer.eom_id
    assert any(mask)


def test_an_end_that_is_no_special_token_is_refused(tmp_path):
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": 65}))
    with pytest.raises(UserError, match="names no token that ends a text"):
        tokenizers.read_tokenizer(saved(tmp_path, a_file(), eos_token=None))


def test_a_plain_reply_s_end_comes_first(tmp_path):
    """generation_config.json of Llama 3.2 names another first."""
    file = a_file()
    ends = [token["id"] for token in file["added_tokens"]]
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    tokenizer = tokenizers.read_tokenizer(saved(tmp_path, file, eos_token="<|im_end|>"), chat_format="plain")
    assert tokenizer.decode(tokenizer.end_ids) == "<|im_end|><|endoftext|><|im_start|>"
    assert tokenizer.reply_ids("x")[-1] == tokenizer.eom_id
    assert tokenizer_config(tokenizer)["eos_token"] == "<|im_end|>"


def test_an_unknown_template_is_said_and_another_format_can_be_asked_for(tmp_path, capsys):
    saved(tmp_path, a_file(), chat_template="{{ '[INST]' }}")
    assert tokenizers.read_tokenizer(tmp_path).chat.name == "plain"
    assert capsys.readouterr().err.count("is of no format that Mosslet knows") == 1
    assert tokenizers.read_tokenizer(tmp_path, chat_format="chatml").chat.name == "chatml"
    assert capsys.readouterr().err == ""


def test_a_template_in_a_file_of_its_own_and_a_first_token_are_read(tmp_path):
    names = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|end_of_text|>")
    first = {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": names[0]}}, {"Sequence": {"id": "A"}}]}
    saved(tmp_path, a_file(names=names, post_processor=first), eos_token={"content": names[4]}, bos_token=names[0])
    assert tokenizers.read_tokenizer(tmp_path).chat.bos == names[0]
    (tmp_path / "chat_template.jinja").write_text("<|start_header_id|> Today Date: {{ date_string }}")
    tokenizer = tokenizers.read_tokenizer(tmp_path)
    assert (tokenizer.chat.name, tokenizer.chat.date, tokenizer.chat.bos) == ("llama3", "26 Jul 2024", names[0])
    assert tokenizer.decode([tokenizer.eot_id]) == names[0]


def test_added_tokens_that_texts_never_get_are_said(tmp_path, capsys):
    tokenizer = tokenizers.read_tokenizer(saved(tmp_path, a_file(text=("今天", "foo", "  ", "bar", "<x>"))))
    assert tokenizer.special["今天"] not in tokenizer.encode("今天")
    assert "tokenizer.json: 4 added tokens that are not special, '今天', 'foo', 'bar', …, are not used" in (
        capsys.readouterr().err)
    tokenizers.read_tokenizer(saved(tmp_path, a_file(text=("  ",))))
    assert capsys.readouterr().err == ""


def test_the_last_row_may_be_a_token_without_merges(tmp_path):
    change = small("abc")
    change["model"]["vocab"]["abc"] = 5000
    assert tokenizers.read_tokenizer(saved(tmp_path, a_file(**change))).n_vocab == 5001


# ---- SentencePiece -------------------------------------------------------------------------------

def sentencepiece_model(**more) -> bytes:
    package, model = pytest.importorskip("sentencepiece"), io.BytesIO()
    package.SentencePieceTrainer.train(**{
        "sentence_iterator": iter(["hello world, the quick brown fox", "你好世界", "x = 1;  y = 2"] * 50),
        "model_writer": model, "vocab_size": 330, "model_type": "bpe", "byte_fallback": True,
        "normalization_rule_name": "identity", "remove_extra_whitespaces": False, "hard_vocab_limit": False,
        "minloglevel": 2} | more)
    return model.getvalue()


def test_sentencepiece_s_vocabulary_encodes_by_its_own_package(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model())
    tokenizer = tokenizers.read_tokenizer(tmp_path, rows=400)
    assert (tokenizer.chat.name, tokenizer.chat.bos, tokenizer.decode(tokenizer.end_ids)) == ("plain", "<s>", "</s>")
    for text in mixed_strings(200):
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert tokenizer.reply_text(tokenizer.reply_ids(text)) == text
        assert not set(tokenizer.encode(text + "</s>")) & set(tokenizer.special_ids)
    ids, _ = tokenizer.render_chat([{"role": "user", "content": "hello"}], reply=True)
    assert tokenizer.decode(ids) == "<s>Human: hello\n\nAssistant:"
    (tmp_path / "out").mkdir()
    write_tokenizer(tokenizer, tmp_path / "out")
    copy = Tokenizer.from_state(json.loads(json.dumps(
        tokenizers.read_tokenizer(tmp_path / "out", rows=400).to_state())))
    copy.require_same(tokenizer, "a and b")


def test_sentencepiece_s_pieces_are_its_package_s(tmp_path):
    model = sentencepiece_model()
    package = pytest.importorskip("sentencepiece").SentencePieceProcessor(model_proto=model)
    (tmp_path / "tokenizer.model").write_bytes(model)
    tokenizer = tokenizers.read_tokenizer(tmp_path)
    for text in filter(str.strip, mixed_strings(200)):  # after a space: theirs is the one that it puts first
        assert tokenizer.encode(" " + text.lstrip(" ")) == package.encode(text.lstrip(" "))


@pytest.mark.parametrize("more", [{"normalization_rule_name": "nmt_nfkc"}, {"byte_fallback": False},
                                  {"remove_extra_whitespaces": True}])
def test_a_sentencepiece_model_that_changes_texts_is_refused(tmp_path, more):
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model(**more))
    with pytest.raises(UserError, match="it changes texts"):
        tokenizers.read_tokenizer(tmp_path)


def test_without_the_package_or_with_a_damaged_file_one_line_says_so(tmp_path, monkeypatch):
    (tmp_path / "tokenizer.model").write_bytes(b"no model")
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(UserError, match="pip install sentencepiece"):
        tokenizers.read_tokenizer(tmp_path)
    monkeypatch.undo()
    pytest.importorskip("sentencepiece")
    with pytest.raises(UserError, match="tokenizer.model is damaged"):
        tokenizers.read_tokenizer(tmp_path)


# ---- what is refused -----------------------------------------------------------------------------

def pre(*rules: dict) -> dict:
    return {"pre_tokenizer": {"type": "Sequence", "pretokenizers": list(rules)}}


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}


def rule(pattern: str) -> dict:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


@pytest.mark.parametrize("change,message", [
    ({"model": {"type": "WordPiece"}}, "a WordPiece model, BERT's algorithm"),
    ({"model": {"type": "Unigram"}}, "a Unigram model, SentencePiece's algorithm"),
    ({"model": {"byte_fallback": True}}, "byte_fallback is True"),
    ({"model": {"end_of_word_suffix": "</w>"}}, "end_of_word_suffix is '</w>'"),
    ({"normalizer": {"type": "Lowercase"}}, "normaliser Lowercase"),
    ({"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Prepend"}]}}, "NFC, Prepend"),
    ({"pre_tokenizer": {"type": "Metaspace"}}, '"Metaspace"'), ({"pre_tokenizer": None}, "null is none"),
    ({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True}}, "add_prefix_space"),
    (pre(rule("a+")), "does not end in ByteLevel"), (pre(rule("a"), rule("b"), BYTES), "by 2 rules in a row"),
    (pre(rule("(a"), BYTES), "tiktoken cannot read its regular expression"),
    *((pre(rule(pattern), BYTES), f"has, at {at!r}") for pattern, at in (
        (r"\w+|\s", r"\w+|\s"), ("a|[[:alpha:]]+", "[[:alpha:]]+"), (r"\R|a", r"\R|a"), ("^a|b", "^a|b"),
        ("b$|.", "$|."), (r"a\b", r"\b"), (r"\Aa|\z", r"\Aa|\z"), (r"\p{N}{1,3}+", r"\p{N}{1,3}+"),
        ("(?i:ss)", "(?i:ss)"), (r"(a)\1", r"\1"), (r"\p{Punct}", r"\p{Punct}"), ("[a&&b]", "[a&&b]"))),
    *((pre(rule(pattern), BYTES), "may match nothing") for pattern in (
        "a*|b", r"\p{L}*", "a|", r"(?=\p{N})\d?|a+", r"\n?(?<=a)|[^a-z]+")),
    (pre(rule(r"\p{L}+|\d") | {"behavior": "Removed", "invert": True}, BYTES), "removes from texts what"),
    ({"model": {"merges": ["Q Qq"]}}, "merge 0, 'Q Qq', is not of two tokens"),
    ({"model": {"merges": ["Q"]}}, "merge 0"), ({"model": {"vocab": {"好": 5}, "merges": []}}, "stands for no byte"),
    ({"model": {"vocab": {"a": 0, "b": 0}, "merges": []}}, "share ids"), ({"model": {"vocab": [1]}}, "damaged"),
    (small("ab bc abc", "b c", "a b", "ab c", ignore_merges=True), "'abc' as a whole piece only"),
    (small("", unk_token="<|endoftext|>", vocab={"a": 0}), "no token for 255 of the 256 bytes, for which unk_token"),
    (small("", ignore_merges=True, vocab={"a": 0, "bcd": 1}), "no token for 255 of the 256 bytes, for which ignore_me"),
    *(({"added_tokens": [{"id": 900, "content": " \t", flag: True}]}, f"added token ' \\t' has {flag}")
      for flag in ("lstrip", "rstrip", "single_word")),
    *(({"post_processor": p}, "post_processor RobertaProcessing says how a text begins") for p in (
        {"type": "RobertaProcessing"}, {"type": "Sequence", "processors": [{"type": "RobertaProcessing"}]})),
    ({"model": {"vocab": {"a": 0.5}, "merges": []}}, "ids that are no whole numbers"),
    ({"model": {"vocab": {}, "merges": []}}, "holds no tokens for text"),
    ({"added_tokens": [{"id": 1}]}, "damaged"), ({"added_tokens": []}, "names no token")])
def test_what_cannot_be_expressed_is_refused_by_name(tmp_path, change, message):
    with pytest.raises(UserError, match=re.escape(message)) as error:
        tokenizers.read_tokenizer(saved(tmp_path, a_file(**change)))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text,message", [
    ("", "cannot be read"), ('{"model": ', "cannot be read"), ("[" * 100_000, "cannot be read"),
    ("[1]", "holds a list"), ("{}", "damaged"), ('{"model": 3}', "damaged")])
def test_damaged_files_are_one_line(tmp_path, text, message):
    with pytest.raises(UserError, match=message) as error:
        tokenizers.read_tokenizer(saved(tmp_path, text))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("ends", [1.5, "1", [1, None], {"a": 1}, True])
@pytest.mark.parametrize("name", ["generation_config.json", "config.json"])
def test_an_end_that_is_no_number_is_one_line(tmp_path, name, ends):
    (saved(tmp_path, a_file()) / name).write_text(json.dumps({"eos_token_id": ends}))
    with pytest.raises(UserError, match=rf"{name}: eos_token_id is .* not a token's number"):
        tokenizers.read_tokenizer(tmp_path)


NAMES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.json", "config.json",
         "chat_template.jinja", "generation_config.json")


def latin(path: pathlib.Path) -> None:
    path.write_bytes(b"\xff\xfe{")


@pytest.mark.parametrize("name,others", [*((name, ()) for name in NAMES), *((name, ("tokenizer.json",)) for name in (
    "vocab.json", "merges.txt", "added_tokens.json", "tokenizer.model"))])
@pytest.mark.parametrize("make,message", [(os.mkfifo, "no plain file"), (latin, "cannot be read|damaged|pip install"),
                                          (lambda path: path.symlink_to("nowhere"), "cannot be read")])
def test_a_pipe_a_link_into_nothing_and_bytes_that_are_no_text_are_one_line(tmp_path, name, others, make, message):
    """An unfinished fetch leaves links into nothing: they were passed over, and with them the chat template."""
    write_pair(saved(tmp_path, a_file()))
    for other in (name, *others):
        (tmp_path / other).unlink(missing_ok=True)
    make(tmp_path / name)
    with pytest.raises(UserError, match=message) as error:
        tokenizers.read_tokenizer(tmp_path)
    assert "\n" not in str(error.value)
    assert str(tmp_path) in str(error.value) or name == "tokenizer.model"


def test_an_empty_tokenizer_model_is_one_line_that_names_it(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"")
    with pytest.raises(UserError, match="tokenizer.model: holds no tokens for text: the file is empty or damaged"):
        tokenizers.read_tokenizer(tmp_path)


def test_missing_files_and_unknown_classes_are_one_line(tmp_path):
    with pytest.raises(UserError, match="no tokenizer.json, no vocab.json with merges.txt, no tokenizer.model"):
        tokenizers.read_tokenizer(tmp_path)
    write_pair(tmp_path, tokenizer_class="BertTokenizer")
    with pytest.raises(UserError, match="class BertTokenizer"):
        tokenizers.read_tokenizer(tmp_path)
    (tmp_path / "merges.txt").unlink()
    with pytest.raises(UserError, match="merges.txt: is missing"):
        tokenizers.read_tokenizer(tmp_path)


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    with pytest.raises(UserError, match="the model's embedding has 400 rows"):
        tokenizers.read_tokenizer(saved(tmp_path, a_file()), rows=400)


@pytest.mark.parametrize("change,message", [({"model": "llama"}, "is 'llama'"), ({"pre": "viking"}, "is 'viking'"),
                                            ({"pre": None}, "is None"), ({"tokens": []}, "merge 0")])
def test_gguf_s_other_tokenizers_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        tokenizers.from_gguf(gguf_fields(token_type=[], **change) if "tokens" in change else gguf_fields(**change))


@pytest.mark.parametrize("change", [
    {"tokens": 7}, {"tokens": "abc"}, {"tokens": [["a"], ["b"]]}, {"merges": 7}, {"merges": [1, 2]}, {"pre": ["gpt-2"]},
    {"token_type": [1, 1]}, {"token_type": [1] * 9999}, {"token_type": "text"}, {"token_type": 7}, {"model": ["gpt2"]},
    {"eos_token_id": 2.0}, {"token_type": [float("inf")]}])
def test_gguf_s_fields_of_a_wrong_kind_are_one_line(change):
    with pytest.raises(UserError, match=r"^GGUF: ") as error:
        tokenizers.from_gguf(gguf_fields(**change))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("template", [7, [7], {"a": 1}])
def test_a_chat_template_of_a_wrong_kind_is_one_line(tmp_path, template):
    with pytest.raises(UserError, match="damaged"):
        tokenizers.read_tokenizer(saved(tmp_path, a_file(), chat_template=template))
    with pytest.raises(UserError, match="damaged"):
        tokenizers.from_gguf(gguf_fields() | {"tokenizer.chat_template": template})


# ---- what is written -----------------------------------------------------------------------------

def imported(tmp_path: pathlib.Path, **more) -> Tokenizer:
    file = a_file(5, text=("<think>", "</think>", "   "), **more)
    return tokenizers.read_tokenizer(saved(tmp_path, file, chat_template=TEMPLATE), rows=900)


ALL = {"ours": lambda _: BPE, "characters": lambda _: train_chars("".join(mixed_strings(500))), "imported": imported,
       "nfc": lambda folder: imported(folder, normalizer={"type": "NFC"}),
       "gguf": lambda _: tokenizers.from_gguf(gguf_fields()),
       "plain": lambda _: tokenizers.from_gguf(gguf_fields(), chat_format="plain")}
every = pytest.mark.parametrize("make", ALL.values(), ids=ALL)


@every
def test_what_is_written_is_read_back(tmp_path, make):
    tokenizer = make(tmp_path)
    write_tokenizer(tokenizer, tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": list(tokenizer.end_ids)}))
    copy = tokenizers.read_tokenizer(tmp_path, rows=tokenizer.n_vocab)
    for text in mixed_strings(100):
        assert copy.encode(text) == tokenizer.encode(text)
    copy.require_same(tokenizer, "what was written and what was read")


@every
def test_the_tokenizers_package_reads_the_same_ids(tmp_path, make):
    package = pytest.importorskip("tokenizers")
    tokenizer = make(tmp_path)
    theirs = package.Tokenizer.from_str(json.dumps(tokenizer_json(tokenizer)))
    for text in mixed_strings(500):
        assert theirs.encode(text, add_special_tokens=False).ids == tokenizer.encode(text)
    for name, i in tokenizer.special.items():
        assert theirs.token_to_id(name) == i


DIALOGUES = [[("user", "Hi there")], [("user", " \n x  "), ("assistant", "\n yes \n\n"), ("user", "好的？")],
             [("system", " Be kind.\n"), ("user", "Hi"), ("assistant", "Ünï"), ("user", "and?\n")],
             [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"), ("user", "12345")]]


def same_as_template(tokenizer: Tokenizer, theirs, **more) -> None:
    """Are the ids of dialogues those of apply_chat_template, with and without a reply to come?"""
    for turns in DIALOGUES:
        messages = [{"role": role, "content": content} for role, content in turns]
        for reply, dialogue in ((True, messages), (False, [*messages, {"role": "assistant", "content": "\nNo."}])):
            ids = theirs.apply_chat_template(dialogue, add_generation_prompt=reply, return_dict=False, **more)
            assert tokenizer.render_chat(dialogue, reply)[0] == ids


@pytest.mark.parametrize("chat", [{"name": "plain"}, {"name": "plain", "system": "S"}, {"name": "chatml"},
                                  {"name": "chatml", "system": "Q", "bos": "<|endoftext|>"}])
def test_a_template_of_ours_gives_the_ids_of_render_chat(tmp_path, chat):
    transformers = pytest.importorskip("transformers")
    tokenizer = imported(tmp_path).with_chat(**chat)
    (tmp_path / "out").mkdir()
    write_tokenizer(tokenizer, tmp_path / "out")
    same_as_template(tokenizer, transformers.AutoTokenizer.from_pretrained(tmp_path / "out"))


@pytest.mark.parametrize("name", ["mosslet", "moss", "chatml", "llama3", "plain"])
@pytest.mark.parametrize("system", ["", "S", "S\n", MOSS_SYSTEM, "It's \\ \"x\" {{ y }} 🐱 \x1c\x85\u2028\r\n\t."])
def test_a_template_of_ours_renders_any_system_line(name, system):
    chat, user = chat_format(name, system=system, end="<e>"), {"role": "user", "content": "Hi"}
    for messages in ([user], [{"role": "system", "content": system}, user]):
        assert rendered(template_of(chat), messages) == text_of(chat.pieces(messages, True))


def test_our_own_template_renders_our_text():
    jinja2 = pytest.importorskip("jinja2")
    template = jinja2.Template(tokenizer_config(BPE)["chat_template"])
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "{{ x }}"}]
    assert template.render(messages=messages, add_generation_prompt=True) == BPE.decode(
        BPE.render_chat(messages, reply=True)[0])


@pytest.mark.parametrize("pattern", [
    r"\p{L}+|\d", r".+|\n", r"(?<=a)b|\p{L}+", r"[a-z_/\-]+?[^\S\n]*|\s{2,}|(?:\p{Lu}|\p{Han}){1,3}",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{M}]*[\p{Ll}\p{M}]+(?i:'s|'re|'[sdmt])?| ?[^\s\p{L}]+[\r\n/]*|\s+(?!\S)"])
def test_another_pattern_cuts_as_the_package_does_and_comes_back_as_itself(tmp_path, pattern):
    package = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.read_tokenizer(saved(tmp_path, a_file(**pre(rule(pattern), BYTES))))
    theirs = package.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in mixed_strings(300):
        assert tokenizer.encode(text) == theirs.encode(text, add_special_tokens=False).ids
    assert splits.pre_tokenizer_of(tokenizer.pattern)["pretokenizers"][0]["pattern"]["Regex"] == pattern


@pytest.mark.parametrize("tail,other", [(r"\s++$|\s+(?!\S)|\s", False), (r"[\w\s]", True)])
def test_an_encoding_s_pattern_is_written_for_the_other_engine_or_refused(tail, other):
    """cl100k_base has `{1,3}+` and `$`, which there mean any number, and the end of a line."""
    package = pytest.importorskip("tokenizers")
    pattern = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|" + tail
    encoding = tiktoken.Encoding("mine", pat_str=pattern, special_tokens={"<|endoftext|>": 900},
                                 mergeable_ranks={token: i for i, token in enumerate(BPE.ranks)})
    tokenizer = tokenizers.of_encoding(encoding)
    if other:
        with pytest.raises(UserError, match="tokenizer.json: its regular expression"):
            tokenizer_json(tokenizer)
        return
    theirs = package.Tokenizer.from_str(json.dumps(tokenizer_json(tokenizer)))
    for text in mixed_strings(300):
        assert encoding.encode(text) == tokenizer.encode(text) == theirs.encode(text, add_special_tokens=False).ids


# ---- the real ones -------------------------------------------------------------------------------

REAL = pathlib.Path(os.environ.get("MOSSLET_TOKENIZERS", "-"))
real = pytest.mark.skipif(not REAL.is_dir(), reason="MOSSLET_TOKENIZERS names no folder of real tokenizers: gpt2, "
                                                    "qwen2_5, qwen3, llama3, llama3_2, deepseek, smollm2.gguf")


def real_pair(name: str) -> tuple[Tokenizer, object]:
    """(ours, the `tokenizers` package's) of one family."""
    package = pytest.importorskip("tokenizers")
    bpe, before = package.models.BPE, package.pre_tokenizers
    if name == "smollm2":
        reader = pytest.importorskip("gguf").GGUFReader(REAL / "smollm2.gguf")
        fields = {key: field.contents() for key, field in reader.fields.items()}
        vocab = tokenizers.from_gguf(fields)
        tokens, merges = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.merges"]
        theirs = package.Tokenizer(bpe({t: i for i, t in enumerate(tokens)}, [tuple(m.split(" ")) for m in merges]))
        theirs.pre_tokenizer = before.Sequence([before.Digits(True), before.ByteLevel(False)])
        return vocab, theirs
    if name == "gpt2":
        vocab = json.loads((REAL / name / "encoder.json").read_text(encoding="utf-8"))
        lines = (REAL / name / "vocab.bpe").read_text(encoding="utf-8").split("\n")[1:]
        theirs = package.Tokenizer(bpe(vocab, [tuple(line.split(" ")) for line in lines if line]))
        theirs.pre_tokenizer = before.ByteLevel(False)
    else:
        theirs = package.Tokenizer.from_file(str(REAL / name / "tokenizer.json"))
    return tokenizers.read_tokenizer(REAL / name), theirs


@real
@pytest.mark.parametrize("name", ["smollm2", "gpt2", "qwen2_5", "qwen3", "llama3", "llama3_2", "deepseek"])
def test_a_real_family_s_ids_are_its_package_s(name):
    package = pytest.importorskip("tokenizers")
    ours, theirs = real_pair(name)
    written = package.Tokenizer.from_str(json.dumps(tokenizer_json(ours)))
    for text in mixed_strings(10_000):
        ids = ours.encode(text)
        assert ids == theirs.encode(text, add_special_tokens=False).ids
        assert ids == written.encode(text, add_special_tokens=False).ids


@real
@pytest.mark.parametrize("name,more", [("qwen2_5", {}), ("qwen3", {"enable_thinking": False}),
                                       ("llama3_2", {"date_string": "26 Jul 2024"})])
def test_a_real_family_s_dialogues_are_its_template_s(name, more):
    transformers = pytest.importorskip("transformers")
    same_as_template(tokenizers.read_tokenizer(REAL / name), transformers.AutoTokenizer.from_pretrained(REAL / name),
                     **more)


@real
def test_smollm2_s_dialogues_are_its_template_s(tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer, _ = real_pair("smollm2")
    write_tokenizer(tokenizer, tmp_path)  # with the GGUF file's own template
    same_as_template(tokenizer, transformers.AutoTokenizer.from_pretrained(tmp_path))
