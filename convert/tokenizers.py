"""Tokenizers of other projects into ours: `tokenizer.json`, `vocab.json` with `merges.txt`, GGUF's fields,
tiktoken's encodings. convert/tokenizer_files.py writes them.

Byte-level BPE is what they share, so `tiktoken` encodes for all of them; a family differs in its pattern of
pieces, in the form NFC, and in where its special tokens are. What a file asks for beyond that is refused by
name: another algorithm, another normaliser, another way to split.

A special token's name in a text stays text (see Tokenizer.encode), unlike in Hugging Face's tokenizers.
"""
import contextlib
import json
import os
import pathlib
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import tiktoken

from convert.splits import GGUF_PATTERNS, GPT2, QWEN2, Parts, pattern_of, ranked, splits_of
from convert.templates import OURS, say_difference, system_line
from data.chat import FORMATS, LLAMA_DATE, MOSS_SYSTEM, chat_format
from data.pieces import SentencePieces
from data.tokenizer import CHARACTER_PATTERN, PATTERN, SPECIAL_TOKENS, Tokenizer, Vocabulary
from runtime.options import UserError
from runtime.storage import open_plain

# ---- from a file's parts to a Tokenizer ----------------------------------------------------------

DOCUMENT_STARTS = ("<|endoftext|>", "<|begin_of_text|>", "<s>", "<｜begin▁of▁sentence｜>")


def make(parts: Parts, rows: int | None, chat_name: str = "") -> Tokenizer:
    """The Tokenizer of these parts. rows: of the model's embedding, by default as many as it has ids."""
    settings, vocab = parts.settings, parts.vocab
    names = {role: name_of(settings.get(f"{role}_token")) for role in ("bos", "eos", "pad", "unk")}
    added = dict(parts.added) | {name: vocab[name] for name in names.values() if name in vocab}
    parts.vocab = {token: i for token, i in vocab.items() if token not in added}
    if parts.sentencepiece:
        pieces, special = SentencePieces(parts.sentencepiece).tokens()
        ranks, ids, unmerged, added = list(pieces.values()), list(pieces), {}, special | added
    else:
        ranks, ids, unmerged = ranked(parts)
    if not ids or any(type(i) is not int for i in (*ids, *added.values(), *unmerged.values())):
        raise UserError(f"{parts.where}: {'has ids that are no whole numbers' if ids else 'holds no tokens for text'}: "
                        "the file is empty or damaged: fetch it again")
    if not names["eos"]:  # GPT-2's page names its end in generation_config.json alone
        names["eos"] = next((name for i in parts.ends for name, j in added.items() if j == i), "")
    control = {name: i for name, i in added.items() if name not in parts.text or name in names.values()}
    if idle := [name for name in added if name not in control and not name.isspace()]:
        print(f"{parts.where}: {len(idle)} added tokens that are not special, {', '.join(map(repr, idle[:3]))}"
              f"{', …' * (len(idle) > 3)}, are not used for texts, where their names are split like other words",
              file=sys.stderr)
    chat = chat_of(settings, names, control, chat_name)
    # A reply's end in the chat format first, then the ends of generation_config.json, then the tokenizer's own.
    format_end = chat.get("end") or "".join(FORMATS[chat["name"]].tokens[-1:])
    named = [[added[name]] if name in added else [] for name in (format_end, names["eos"])]
    ends = [*dict.fromkeys([*named[0], *parts.ends, *named[1]])]
    if not ends or not format_end:
        raise UserError(f"{parts.where}: names no token that ends a text (eos_token): take the file "
                        "tokenizer_config.json or generation_config.json from the model's page, too")
    starts = [added[name] for name in (*DOCUMENT_STARTS, names["bos"]) if name in control]
    pad = added.get(names["pad"], (starts or ends)[0])
    rows = rows or 1 + max([*added.values(), *ids, *unmerged.values()])
    if not {"<think>", "</think>"} <= set(added):
        chat.pop("think", None)  # the template's thoughts need tokens that are not there
    if (template := template_of(settings)) and not chat_name:
        say_difference(chat_format(**chat), template, parts.where)
    if chat == {"name": "mosslet"} and ids == [*range(len(ids))] and parts.pattern in (PATTERN, CHARACTER_PATTERN):
        own = Tokenizer(ranks, parts.pattern)
        if (own.special, own.n_vocab) == (added, rows):
            return own
    return Tokenizer(ranks, parts.pattern, Vocabulary(
        ids, rows, control, ends, (starts or ends)[0], pad, chat, parts.nfc,
        {name: i for name, i in added.items() if name not in control}, unmerged, parts.sentencepiece.decode("latin-1")))


def name_of(token: Any) -> str:
    """A token's name, which newer files hold in an object."""
    return (token.get("content") if isinstance(token, dict) else token) or ""


def chat_of(settings: dict[str, Any], names: dict[str, str], control: dict[str, int], asked: str) -> dict[str, str]:
    """A chat format's name and settings: the one asked for, else that of the checkpoint's template, else
    MOSS's if its tokens are there, else "plain"."""
    template, bos = template_of(settings), names["bos"] if settings.get("add_bos_token") else ""
    marks = {"<|im_start|>": "chatml", "<|start_header_id|>": "llama3", OURS: "plain"}
    family = chat_format(asked).name if asked else next((marks[m] for m in marks if m in template), "")
    if not family and set(SPECIAL_TOKENS) <= set(control):
        return {"name": "mosslet"}
    family = family or ("moss" if {"<eoh>", "<eom>"} <= set(control) else "plain")
    if family == "plain":
        return {"name": family, "end": names["eos"]} | ({"bos": bos} if bos else {})
    chat = {"name": family} | ({"template": template} if template and not asked else {})
    if family == "moss":
        return chat | {"system": MOSS_SYSTEM}
    if family == "llama3":
        return chat | {"bos": "<|begin_of_text|>"} | ({"date": LLAMA_DATE} if "Today Date" in template else {})
    if family == "chatml":
        return (chat | ({"system": line} if (line := system_line(template)) else {})
                | ({"bos": names["bos"]} if "bos_token" in template and names["bos"] else {})
                | ({"think": "off"} if "enable_thinking" in template else {}))
    return chat


def template_of(settings: dict[str, Any]) -> str:
    """The chat template; of several the default."""
    template = settings.get("chat_template") or ""
    if isinstance(template, list):
        several = {entry["name"]: entry["template"] for entry in template}
        template = several.get("default") or next(iter(several.values()), "")
    if not isinstance(template, str):
        raise TypeError("chat_template is no text")
    return template


# ---- files ---------------------------------------------------------------------------------------

@contextlib.contextmanager
def damaged(what: str) -> Iterator[None]:
    """What a damaged file makes of the block, as one line."""
    try:
        yield
    except (LookupError, TypeError, AttributeError, ValueError, OverflowError) as error:
        raise UserError(f"{what} are damaged ({type(error).__name__}: {' '.join(str(error).split())[:80]}): fetch them "
                        "again") from error


def read_file(path: pathlib.Path, mode: str = "r") -> Any:
    """The content of a plain file, or of a link to one: text, or bytes with mode "rb". UserError for a damaged one."""
    try:
        with open_plain(path, mode, follow=True) as file:
            return file.read()
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({' '.join(str(error).split())[:80]}): fetch it again") from None


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """A JSON object; UserError for a damaged file."""
    try:
        value = json.loads(read_file(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({' '.join(str(error).split())[:80]}): fetch it again") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds a {type(value).__name__}, not an object: fetch it again")
    return value


def json_if_there(path: pathlib.Path) -> dict[str, Any]:
    """A JSON object, empty if there is no file. A link into nothing, of a fetch that broke off, is reported."""
    return read_json(path) if os.path.lexists(path) else {}


def settings_of(folder: pathlib.Path) -> tuple[dict[str, Any], list[int]]:
    """(tokenizer_config.json with what other files add to it, the ends of generation_config.json)."""
    files = {name: json_if_there(folder / f"{name}.json") for name in (
        "special_tokens_map", "tokenizer_config", "chat_template", "generation_config", "config")}
    settings = {key: value for name in ("special_tokens_map", "chat_template", "tokenizer_config")
                for key, value in files[name].items() if value is not None}
    if os.path.lexists(path := folder / "chat_template.jinja"):
        settings["chat_template"] = read_file(path)
    settings.setdefault("model_type", files["config"].get("model_type"))
    name = "generation_config" if "eos_token_id" in files["generation_config"] else "config"
    ends = files[name].get("eos_token_id")
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    if any(type(i) is not int for i in ends):
        raise UserError(f"{folder / name}.json: eos_token_id is {str(ends)[:60]}, not a token's number or a list of "
                        "such: correct it")
    return settings, ends


def read_tokenizer(folder: str | pathlib.Path, rows: int | None = None, chat_format: str = "") -> Tokenizer:
    """The tokenizer of a checkpoint's folder. rows: of the model's embedding. chat_format: a name of
    data/chat.py, instead of the checkpoint's own. UserError, one line, for what cannot be read."""
    folder = pathlib.Path(folder)
    with damaged(f"{folder}: its tokenizer's files"):
        settings, ends = settings_of(folder)
        path, model = folder / "tokenizer.json", folder / "tokenizer.model"
        file = read_json(path) if os.path.lexists(path) else None
        if os.path.lexists(model) and (file is None or file["model"].get("byte_fallback")):
            parts = Parts(str(model), {}, [], {}, set(), "", sentencepiece=read_file(model, "rb"))
            settings = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True} | settings
        elif file is not None:
            parts = parts_of_json(file, str(path))
        else:
            parts = parts_of_pair(folder, settings)
        if parts.settings.get("add_bos_token"):  # what the file itself does, where the settings are silent
            settings.setdefault("add_bos_token", True)
            settings.setdefault("bos_token", parts.settings["bos_token"])
        parts.settings, parts.ends = settings, ends
        return make(parts, rows, chat_format)


def parts_of_json(file: dict[str, Any], where: str) -> Parts:
    """What a tokenizer.json says; UserError for what it asks beyond byte-level BPE."""
    model, normalizer = file["model"], file.get("normalizer") or {}
    kind = model.get("type", "BPE" if "merges" in model else "WordLevel")
    why = {"Unigram": "SentencePiece's algorithm", "WordPiece": "BERT's algorithm"}.get(kind, "another algorithm")
    if kind != "BPE":
        raise UserError(f"{where}: a {kind} model, {why}; Mosslet reads byte-level BPE only")
    for name in ("byte_fallback", "continuing_subword_prefix", "end_of_word_suffix", "dropout", "fuse_unk"):
        if model.get(name):
            raise UserError(f"{where}: {name} is {model[name]!r}, which byte-level BPE does not have"
                            + "; it is SentencePiece's: put its tokenizer.model there" * (name == "byte_fallback"))
    steps = [step["type"] for step in normalizer.get("normalizers", [normalizer] if normalizer else [])]
    if steps not in ([], ["NFC"]):
        raise UserError(f"{where}: normaliser {', '.join(steps)}: Mosslet knows NFC only")
    added = {token["content"]: token["id"] for token in file.get("added_tokens") or []}
    processor = file.get("post_processor") or {"type": "ByteLevel"}
    processors = processor.get("processors", [processor])
    if others := [p["type"] for p in processors if p["type"] not in ("ByteLevel", "TemplateProcessing")]:
        raise UserError(f"{where}: post_processor {others[0]} says how a text begins in a way that Mosslet does not "
                        "read: it reads ByteLevel and TemplateProcessing")
    first = [step for p in processors for step in (p.get("single") or [])[:1]]
    bos = [step["SpecialToken"]["id"] for step in first if "SpecialToken" in step]
    return Parts(where, model["vocab"], model["merges"], added, texts_of(file.get("added_tokens") or [], where),
                 pattern_of(splits_of(file.get("pre_tokenizer"), where), where), steps == ["NFC"],
                 bool(model.get("ignore_merges")), model.get("unk_token") or "",
                 {"add_bos_token": True, "bos_token": bos[0]} if bos else {})


def texts_of(tokens: Iterable[dict[str, Any]], where: str) -> set[str]:
    """Names of those added tokens that are text, not control tokens. UserError for white space with flags."""
    text = [token for token in tokens if not token.get("special")]
    for token in text:
        flags = [flag for flag in ("lstrip", "rstrip", "single_word") if token.get(flag)]
        if flags and token["content"].isspace():  # others are never used
            raise UserError(f"{where}: the added token {token['content']!r} has {flags[0]}, by which what stands "
                            "beside it counts; Mosslet takes white space as it stands: set it to false")
    return {token["content"] for token in text}


def parts_of_pair(folder: pathlib.Path, settings: dict[str, Any]) -> Parts:
    """vocab.json and merges.txt, or as OpenAI named them; the class of the tokenizer fixes its pattern."""
    pairs = [(folder / a, folder / b) for a, b in (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))]
    vocab_path, merges_path = next((pair for pair in pairs if os.path.lexists(pair[0])), (None, None))
    if vocab_path is None:
        raise UserError(f"{folder}: no tokenizer.json, no vocab.json with merges.txt, no tokenizer.model")
    if not os.path.lexists(merges_path):
        raise UserError(f"{merges_path}: is missing beside {vocab_path.name}")
    kind = str(settings.get("tokenizer_class") or settings.get("model_type") or "gpt2")
    family = kind.lower().removesuffix("fast").removesuffix("tokenizer")
    patterns = {"gpt2": GPT2, "codegen": GPT2, "moss": GPT2, "qwen2": QWEN2, "qwen3": QWEN2}
    if family not in patterns:
        raise UserError(f"{vocab_path}: a tokenizer of class {kind}, whose pattern Mosslet does not know without a "
                        "tokenizer.json: save one with `transformers`")
    lines, vocab = read_file(merges_path).split("\n"), read_json(vocab_path)
    added: dict[str, int] = json_if_there(folder / "added_tokens.json")
    details = settings.get("added_tokens_decoder") or {}
    added |= {token["content"]: int(i) for i, token in details.items()}
    text = texts_of(details.values(), str(folder / "tokenizer_config.json"))
    if not settings.get("eos_token") and "<|endoftext|>" in {**vocab, **added}:
        settings["eos_token"] = "<|endoftext|>"
    merges = [line for line in lines[lines[0].startswith("#version"):] if line]
    return Parts(str(vocab_path), vocab, merges, added, text | {name for name in added if name.isspace()},
                 patterns[family], patterns[family] == QWEN2)


def from_gguf(fields: dict[str, Any], rows: int | None = None, chat_format: str = "",
              where: str = "GGUF") -> Tokenizer:
    """The tokenizer of a GGUF file's metadata, `tokenizer.ggml.…`. Its kinds of tokens: 1 ordinary, 3
    control, 4 added text, 5 unused."""
    field = {key.removeprefix("tokenizer.ggml."): value for key, value in fields.items()}
    if (kind := field.get("model")) != "gpt2":
        raise UserError(f"{where}: tokenizer.ggml.model is {kind!r}: Mosslet reads \"gpt2\", which is byte-level BPE")
    if (pre := field.get("pre")) not in [*GGUF_PATTERNS]:
        raise UserError(f"{where}: tokenizer.ggml.pre is {pre!r}: Mosslet knows {', '.join(GGUF_PATTERNS)}")
    missing = [name for name in ("tokens", "merges") if not isinstance(field.get(name), list)]
    if missing:
        raise UserError(f"{where}: no list tokenizer.ggml.{missing[0]}: the file holds no whole tokenizer")
    with damaged(f"{where}: its tokenizer's fields"):
        tokens = field["tokens"]
        kinds = [int(kind) for kind in field.get("token_type", [1] * len(tokens))]
        of = {kind: {name: i for i, (name, k) in enumerate(zip(tokens, kinds, strict=True)) if k == kind}
              for kind in (1, 3, 4)}
        settings = {f"{role}_token": tokens[field[f"{key}_token_id"]] for role, key in (
            ("bos", "bos"), ("eos", "eos"), ("pad", "padding")) if field.get(f"{key}_token_id") in range(len(tokens))}
        settings |= {"add_bos_token": field.get("add_bos_token"),
                     "chat_template": fields.get("tokenizer.chat_template")}
        return make(Parts(where, of[1], field["merges"], of[3] | of[4], set(of[4]), GGUF_PATTERNS[pre], pre == "qwen2",
                          pre == "llama-bpe", settings=settings), rows or len(tokens), chat_format)


def from_tiktoken(name: str, rows: int | None = None, chat_format: str = "") -> Tokenizer:
    """One of tiktoken's named encodings, such as "gpt2" or "cl100k_base"; it fetches their files once."""
    try:
        encoding = tiktoken.get_encoding(name)
    except Exception as error:  # tiktoken's own, or of the network's libraries: many kinds
        names = ", ".join(tiktoken.list_encoding_names())
        raise UserError(f"tiktoken's encoding {name!r} cannot be had ({' '.join(str(error).split())[:60]}): it is "
                        f"fetched once from the network; there are {names}") from None
    return of_encoding(encoding, rows, chat_format)


def of_encoding(encoding: tiktoken.Encoding, rows: int | None = None, chat_format: str = "") -> Tokenizer:
    """The same vocabulary as an encoding of tiktoken; its end is `<|endoftext|>`."""
    ranks, special = encoding._mergeable_ranks, encoding._special_tokens
    end = "<|endoftext|>" if "<|endoftext|>" in special else min(special, key=special.get, default="")
    if not end:
        raise UserError(f"tiktoken's encoding {encoding.name!r} has no special token that could end a text")
    chat = chat_of({}, {"bos": "", "eos": end}, special, chat_format)
    order = sorted(ranks, key=ranks.get)
    # As Hugging Face's engine reads it, too: there $ ends a line, and {1,3}+ has no limit.
    pattern = encoding._pat_str.replace("{1,3}+|", "{1,3}|").replace(r"\s++$", r"\s++(?![\s\S])")
    return Tokenizer(order, pattern, Vocabulary(
        [ranks[token] for token in order], rows or encoding.n_vocab, dict(special), [special[end]], special[end],
        special[end], chat))
