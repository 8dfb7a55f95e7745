"""How byte-level tokenizers cut a text into pieces, by a tokenizer.json's rules or one pattern that does the same,
and in which order they merge the bytes of a piece.

tiktoken cuts by a single regular expression. Hugging Face's files may name several rules that work one after
another, each on what the one before left; SPLITS has the families whose sequence is expressed as one.
"""
import dataclasses
import itertools
import json
import math
import re
from collections.abc import Sequence
from typing import Any

import regex  # comes with tiktoken
import tiktoken

from data.tokenizer import CHARACTER_PATTERN, PATTERN
from runtime.options import UserError

# ---- patterns ------------------------------------------------------------------------------------

_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = _LETTERS + r"\p{N}{1,3}|" + _TAIL
QWEN2 = _LETTERS + r"\p{N}|" + _TAIL
# Digits are split off first, so white space before a digit stands at the end of its part.
SMOLLM = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?=\p{N})|\s+(?!\S)|\s+"
_KANA = "一-龥぀-ゟ゠-ヿ"
_DEEPSEEK = (r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+"
             r"[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+").replace('\\"', '"')
# As one pattern: no class holds what the two splits before take away, white space before such a character is
# the end of a part, and control characters, which the last split does not match, stay together.
_CONTROL = rf"[^\s\p{{L}}\p{{M}}\p{{P}}\p{{S}}\p{{N}}{_KANA}]+"
_WORD = rf"[\p{{L}}\p{{M}}--[{_KANA}]]"
DEEPSEEK = (r"\p{N}{1,3}|" + rf"[{_KANA}]+|" + _DEEPSEEK.split("|[^")[0]
            + rf"|[^\r\n\p{{L}}\p{{P}}\p{{S}}\p{{N}}{_KANA}]?{_WORD}+| ?[\p{{P}}\p{{S}}--[{_KANA}]]+[\r\n]*|\s*[\r\n]+"
            + rf"|\s+(?=[\p{{N}}{_KANA}])|\s+(?!\S)|\s+|{_CONTROL}(?={_CONTROL[:-1]}{_WORD})|{_CONTROL}")

# What a file's pre_tokenizer does, in order, and the one pattern that does the same. "gpt2" is ByteLevel with
# its own regular expression, "digits" splits single digits; everything else is a regular expression.
SPLITS: dict[tuple[str, ...], str] = {
    ("gpt2",): GPT2, ("digits", "gpt2"): SMOLLM, (r"\p{N}{1,3}", f"[{_KANA}]+", _DEEPSEEK): DEEPSEEK,
    (r"[\s\S]",): CHARACTER_PATTERN}
GGUF_PATTERNS = {"gpt-2": GPT2, "llama-bpe": LLAMA3, "qwen2": QWEN2, "smollm": SMOLLM, "starcoder": SMOLLM,
                 "refact": SMOLLM, "command-r": SMOLLM, "deepseek-v3": DEEPSEEK}
LONGEST_TOKEN = 1024  # bytes; merging one takes the square of its length
WHOLE = (LLAMA3, QWEN2, PATTERN)  # they leave out nothing

# The parts of a regular expression that tiktoken's engine and Hugging Face's (Onig) read alike. Of the others
# `\w`, `\b`, `[[:alpha:]]`, `^`, `$`, `{1,3}+` and more differ, and ignoring case does for "ss", which Onig finds in ß.
_PROPERTY = r"\\[pP]\{(?:[A-Z][a-z]?|Han|Hiragana|Katakana|Hangul|Latin|Cyrillic|Greek|Arabic|Hebrew|Thai)\}"
_ONE = _PROPERTY + r"|\\[sSdDrnt]|\\[^\w\s]"
_CLASS = rf"\[\^?(?:(?:{_ONE}|[^\\\[\]&~^-])(?:-(?:\\[^\w\s]|[^\\\[\]&~^-]))?)+\]"
_SHORT = r"'?(?:\[sdmt\]|re|ve|ll|[stmd])"
_ALIKE = re.compile(rf"(?:(?:{_ONE}|{_CLASS}|\(\?i:{_SHORT}(?:\|{_SHORT})*\)|[^\\\[\](){{}}^$|?*+]|\))"
                    r"(?:[?*+][?+]?|\{\d+(?:,\d*)?\}(?:\?|(?!\+)))?(?![?*+{])|\((?:\?(?::|<?[=!])|(?!\?))|\|)*")


def splits_of(pre_tokenizer: dict | None, where: str) -> tuple[str, ...]:
    """A key of SPLITS, or of one regular expression, from a file's pre_tokenizer."""
    parts = (pre_tokenizer or {}).get("pretokenizers", [pre_tokenizer])
    found: list[str] = []
    for part in parts:
        kind = (part or {}).get("type")
        if kind == "Split" and "Regex" in part["pattern"] and (part.get("behavior"), part.get("invert")) in (
                ("Isolated", False), ("Removed", True)):
            found.append(part["pattern"]["Regex"].replace("\r", r"\r").replace("\n", r"\n"))
            if part["invert"] and found[-1] not in WHOLE:
                raise UserError(f"{where}: its pre_tokenizer removes from texts what {found[-1][:60]!r} does not "
                                "match, and Mosslet drops nothing: if it matches all, write Isolated, invert false")
        elif kind == "Digits" and part.get("individual_digits"):
            found.append("digits")
        elif kind == "ByteLevel" and not part.get("add_prefix_space"):
            found += ["gpt2"] * part.get("use_regex", True)
        else:
            raise UserError(f"{where}: pre_tokenizer {json.dumps(part)[:120]} is none that Mosslet can express: it "
                            "reads ByteLevel, Digits and Split with a regular expression")
    if not parts or (parts[-1] or {}).get("type") != "ByteLevel":
        raise UserError(f"{where}: its pre_tokenizer does not end in ByteLevel, so its tokens are no bytes; Mosslet "
                        "reads byte-level BPE only")
    return tuple(found)


def pattern_of(splits: tuple[str, ...], where: str) -> str:
    """The pattern that does the same; UserError if there is none."""
    if splits not in SPLITS and len(splits) != 1:
        raise UserError(f"{where}: its pre_tokenizer splits by {len(splits)} rules in a row, {str(splits)[:120]}, and "
                        "Mosslet knows this sequence of no family")
    if splits in SPLITS:
        return SPLITS[splits]
    pattern = splits[0]
    require_alike(pattern, where)
    try:
        # tiktoken panics where nothing is matched; of the look-around no more is asked than that it may hold
        if regex.fullmatch(re.sub(r"(?<!\\)\(\?<?[=!]", "(?:|", pattern), ""):
            raise UserError(f"{where}: its regular expression {pattern[:60]!r} may match nothing at all, which makes "
                            "no piece of a text: write + for * where it does")
        tiktoken.Encoding("try", pat_str=pattern, mergeable_ranks={b"a": 0}, special_tokens={}).encode("")
    except (ValueError, RecursionError, regex.error) as error:
        raise UserError(f"{where}: tiktoken cannot read its regular expression {pattern[:60]!r}: "
                        f"{' '.join(str(error).split())[:100]}") from None
    return pattern if pattern in WHOLE else with_rest(pattern)


def require_alike(pattern: str, where: str) -> None:
    """UserError unless tiktoken and the package `tokenizers` surely find the same by this pattern."""
    if rest := pattern[_ALIKE.match(pattern).end():]:
        raise UserError(f"{where}: its regular expression {pattern[:60]!r} has, at {rest[:12]!r}, what tiktoken may "
                        "read otherwise than the package tokenizers; write it with \\p{L} and its like, \\s, \\d, "
                        "plain classes and groups, and (?=…)")


def with_rest(pattern: str) -> str:
    """The pattern, and as a piece what it leaves out between two matches."""
    return rf"{pattern}|(?:(?!{pattern})[\s\S])+"


def pre_tokenizer_of(pattern: str) -> dict[str, Any]:
    """A tokenizer.json's pre_tokenizer that cuts as this pattern does."""
    half = pattern[:(len(pattern) - len(with_rest(""))) // 2]
    pattern = half if with_rest(half) == pattern else pattern  # what is left out is a piece there, too
    splits = next((names for names, known in SPLITS.items() if known == pattern), (pattern,))
    rules: list[dict[str, Any]] = []
    for split in splits:
        if split == "digits":
            rules.append({"type": "Digits", "individual_digits": True})
        elif split != "gpt2":
            if splits not in SPLITS:
                require_alike(split, "tokenizer.json")
            rules.append({"type": "Split", "pattern": {"Regex": split}, "behavior": "Isolated", "invert": False})
    rules.append({"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                  "use_regex": "gpt2" in splits})
    return {"type": "Sequence", "pretokenizers": rules}


# ---- bytes ---------------------------------------------------------------------------------------

def byte_characters() -> list[str]:
    """The character that stands for each of the 256 bytes in a byte-level vocabulary: itself if it is
    printable, else the next one from 256 on."""
    printable, others = {*range(33, 127), *range(161, 173), *range(174, 256)}, iter(range(256, 512))
    return [chr(i if i in printable else next(others)) for i in range(256)]


_CHARACTERS = byte_characters()
_BYTE = {character: i for i, character in enumerate(_CHARACTERS)}


def to_bytes(token: str, where: str) -> bytes:
    """The bytes of a token's name; UserError if it is none of a byte-level vocabulary."""
    try:
        return bytes(_BYTE[c] for c in token)
    except KeyError as error:
        raise UserError(f"{where}: the token {token[:40]!r} holds {error.args[0]!r}, which stands for no byte: this is "
                        "no byte-level vocabulary") from None


def from_bytes(token: bytes) -> str:
    """The name of a token in a byte-level vocabulary.

    >>> from_bytes(b" a\\n")
    'ĠaĊ'
    """
    return "".join(_CHARACTERS[i] for i in token)


# ---- merges --------------------------------------------------------------------------------------

@dataclasses.dataclass
class Parts:
    """What all kinds of files say."""

    where: str  # for errors
    vocab: dict[str, int]  # byte-level names to ids
    merges: Sequence[Any]  # "a b" or [a, b], in order
    added: dict[str, int]  # names to ids
    text: set[str]  # those of them that are text, not control tokens
    pattern: str = GPT2
    nfc: bool = False
    ignore_merges: bool = False  # may a token without merges be a whole piece?
    unk: str = ""  # the token for a byte that has none
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)  # as in tokenizer_config.json
    ends: Sequence[int] = ()  # generation_config.json's
    sentencepiece: bytes = b""  # SentencePiece's model, which has neither vocab nor merges


def merged(token: str, merges: dict[tuple[str, ...], int]) -> tuple[list[str], int]:
    """(what a token's characters are merged to, the last merge's number): of all pairs the first in the order of
    merges, leftmost, until none is left.

    >>> merged("abc", {("b", "c"): 0, ("a", "b"): 1, ("ab", "c"): 2})
    (['a', 'bc'], 0)
    """
    parts, last = list(token), -1
    while len(parts) > 1:
        numbers = [merges.get(pair, math.inf) for pair in itertools.pairwise(parts)]
        if (best := min(numbers)) == math.inf:
            break
        i, last = numbers.index(best), int(best)
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
    return parts, last


def ranked(parts: Parts) -> tuple[list[bytes], list[int], dict[str, int]]:
    """(tokens in the order of their merges, their ids, tokens that no merge leads to).

    tiktoken merges the pair whose result has the lowest rank. So ranks must be in the order of merges;
    ids are where training ran once, but they need not be, and need not begin at 0. A token that its own
    merges do not make (those of its parts come first, or there are none) is never written, unless
    ignore_merges takes it where it is a whole piece: then it has a rank that no merge reaches.
    """
    merges: dict[tuple[str, ...], int] = {}
    for i, merge in enumerate(parts.merges):
        pair = tuple(merge.split(" ") if isinstance(merge, str) else merge)
        if len(pair) != 2 or any(name not in parts.vocab for name in (*pair, "".join(pair))):
            raise UserError(f"{parts.where}: merge {i}, {str(merge)[:60]!r}, is not of two tokens of its vocabulary "
                            "that make a third: the file is damaged, or vocabulary and merges are of two models")
        merges[pair] = i
    order, unmerged = dict[str, int](), dict[str, int]()
    whole_only = parts.ignore_merges and parts.pattern != CHARACTER_PATTERN  # there all pieces are whole
    for token, i in parts.vocab.items():
        if len(token) > LONGEST_TOKEN:
            raise UserError(f"{parts.where}: the token {token[:40]!r}… has {len(token)} bytes: the file is damaged")
        left, last = merged(token, merges)
        if len(left) == 1:
            order[token] = last
        elif len(left) == 2 and whole_only:  # tiktoken would merge them inside a piece, too
            raise UserError(f"{parts.where}: ignore_merges takes the token {token[:40]!r} as a whole piece only, for "
                            f"its parts {left[0][:40]!r} and {left[1][:40]!r} have no merge; Mosslet cannot express "
                            "that: add the merge, or remove the token")
        else:
            unmerged[token] = i
    missing = [c for c in byte_characters() if c not in parts.vocab]
    if missing and (parts.unk or whole_only and unmerged):
        raise UserError(f"{parts.where}: has no token for {len(missing)} of the 256 bytes, for which "
                        f"{f'unk_token, {parts.unk!r},' if parts.unk else 'ignore_merges'} asks; Mosslet leaves such "
                        "bytes out: take a tokenizer that has all bytes")
    if parts.ignore_merges:
        order |= {token: len(parts.merges) + i for token, i in unmerged.items()}
        unmerged = {}
    tokens = sorted(order, key=lambda token: (order[token], parts.vocab[token]))
    return ([to_bytes(token, parts.where) for token in tokens], [parts.vocab[token] for token in tokens],
            {to_bytes(token, parts.where).decode("latin-1"): i for token, i in unmerged.items()})
