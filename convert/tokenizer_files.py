"""Our tokenizers as the files that `tokenizers`, `transformers` and vLLM read: tokenizer.json, tokenizer_config.json.

What they encode is what Tokenizer.encode does, but for special tokens' names in a text, which they take for the
tokens. A chat template renders text, and text is encoded at once. Our own format encodes its parts one by one, so
there, and only there, `apply_chat_template` may give other ids at the borders of a content.
"""
import json
import pathlib
from typing import Any

from convert.splits import from_bytes, pre_tokenizer_of
from data.chat import ChatFormat, Piece
from data.tokenizer import CHARACTER_PATTERN, Tokenizer

MARK = "\0"  # stands for a content while a template is made


def merges_of(tokenizer: Tokenizer) -> list[list[str]]:
    """All pairs of tokens that make a third, by the third's rank: those that tiktoken merges."""
    if tokenizer.pattern == CHARACTER_PATTERN:
        return []
    rank = {token: i for i, token in enumerate(tokenizer.ranks)}
    pairs = [(i, rank[token[:k]], rank[token[k:]]) for token, i in rank.items() for k in range(1, len(token))
             if token[:k] in rank and token[k:] in rank]
    names = [from_bytes(token) for token in tokenizer.ranks]
    return [[names[a], names[b]] for _, a, b in sorted(pairs)]


def tokenizer_json(tokenizer: Tokenizer) -> dict[str, Any]:
    """The content of tokenizer.json."""
    v = tokenizer.vocabulary
    vocab = {from_bytes(token): i for token, i in zip(tokenizer.ranks, v.ids, strict=True)}
    vocab |= {from_bytes(name.encode("latin-1")): i for name, i in v.unmerged.items()} | tokenizer.special
    added = [{"id": i, "content": name, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
              "special": name in v.special} for name, i in sorted(tokenizer.special.items(), key=lambda item: item[1])]
    processor: dict[str, Any] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False,
                                 "use_regex": False}
    if bos := tokenizer.chat.bos:
        first = [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
        processor = {"type": "TemplateProcessing", "single": first,
                     "pair": [*first, {"Sequence": {"id": "B", "type_id": 1}}],
                     "special_tokens": {bos: {"id": bos, "ids": [tokenizer.special[bos]], "tokens": [bos]}}}
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added,
            "normalizer": {"type": "NFC"} if v.nfc else None, "pre_tokenizer": pre_tokenizer_of(tokenizer.pattern),
            "post_processor": processor, "decoder": {"type": "ByteLevel", "add_prefix_space": True,
                                                     "trim_offsets": True, "use_regex": True},
            # tiktoken takes a piece that is a token as it is; tokens that no merge leads to are not among its own
            "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                      "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
                      "ignore_merges": not v.unmerged, "vocab": vocab, "merges": merges_of(tokenizer)}}


# ---- chat templates ------------------------------------------------------------------------------

def text_of(pieces: list[Piece] | str) -> str:
    """The text that pieces stand for."""
    return pieces if isinstance(pieces, str) else "".join(piece.text for piece in pieces)


def jinja(text: str, content: str = "") -> str:
    """A Jinja expression of this text, in which MARK is `content`."""
    parts = [json.dumps(part, ensure_ascii=False) for part in text.split(MARK)]  # Jinja reads no pairs of surrogates
    return f" + {content} + ".join(parts)


def template_of(chat: ChatFormat) -> str:
    """The checkpoint's own template, or one that renders the same text as our format does."""
    if chat.template:
        return chat.template
    trim = "|trim" * (chat.name == "llama3")

    def either(last: str, other: str) -> str:
        return last if last == other else f"({last} if loop.last else {other})"

    opening = [jinja(text_of(chat.opening(last))) for last in (True, False)]
    answer = [jinja(text_of(chat.answer(MARK, last)), f"message.content{trim}") for last in (True, False)]
    after = [jinja(text_of(chat.after(last))) for last in (True, False)]
    bos, default = jinja(chat.bos), jinja(text_of(chat.start(None)))
    system = jinja(text_of(chat.start(MARK)), f"messages[0].content{trim}")
    if chat.name == "moss":  # Moss.start: a message brings its own line break, or none if it is empty
        system = "messages[0].content + ('' if messages[0].content[-1:] in ('', '\\n') else '\\n')"
    user = jinja(text_of(chat.user(MARK)), f"message.content{trim}")
    return ("{{- " + bos + " }}{%- if messages[0].role == 'system' %}{{- " + system + " }}{%- else %}{{- " + default
            + " }}{%- endif %}{%- for message in messages %}{%- if message.role == 'user' %}{{- " + user
            + " }}{%- elif message.role == 'assistant' %}{{- " + either(*opening) + " + " + either(*answer) + " + "
            + either(*after) + " }}{%- endif %}{%- endfor %}{%- if add_generation_prompt %}{{- " + opening[0]
            + " }}{%- endif %}")


def tokenizer_config(tokenizer: Tokenizer) -> dict[str, Any]:
    """The content of tokenizer_config.json: roles and chat template."""
    names = {i: name for name, i in tokenizer.special.items()}
    roles = {"bos_token": tokenizer.chat.bos or names.get(tokenizer.eot_id), "eos_token": names.get(tokenizer.eom_id),
             "pad_token": names.get(tokenizer.pad_id)}
    return {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False,
            "add_bos_token": bool(tokenizer.chat.bos), **roles, "chat_template": template_of(tokenizer.chat)}


def write_tokenizer(tokenizer: Tokenizer, folder: str | pathlib.Path) -> None:
    """Write tokenizer.json, or SentencePiece's tokenizer.model, and tokenizer_config.json into a folder.
    generation_config.json, which names all tokens that end a text (`tokenizer.end_ids`), is the model's."""
    files = {"tokenizer_config.json": tokenizer_config(tokenizer)}
    if model := tokenizer.vocabulary.sentencepiece:
        (pathlib.Path(folder) / "tokenizer.model").write_bytes(model.encode("latin-1"))
        files["tokenizer_config.json"]["tokenizer_class"] = "LlamaTokenizer"
    else:
        files["tokenizer.json"] = tokenizer_json(tokenizer)
    for name, content in files.items():
        text = json.dumps(content, ensure_ascii=False, indent=1 if name == "tokenizer_config.json" else None)
        (pathlib.Path(folder) / name).write_text(text + "\n", encoding="utf-8")
