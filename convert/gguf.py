"""GGUF files (llama.cpp's), versions 2 and 3: metadata, and tensors that become float32 when read.

A header of counts, strings and numbers, then blocks of weights. Every count and length is compared
with the bytes that are left before anything is made from it. Names and rows stay as they are in the
file: llama's q and k have permuted rows there.
"""
import pathlib
import struct
from typing import IO, Any

import torch
from torch import Tensor

from convert.families import Config
from convert.stored import AGAIN, PLAIN, Layout, Stored, Tensors, opened
from runtime.options import UserError
from runtime.storage import Damaged

VERSIONS = (2, 3)
SCALARS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}  # types of metadata, as struct writes them
STRING, ARRAY = 8, 9
LONGEST = 2**24  # elements of an array of metadata; vocabularies and their merges have less than 2**20
DEEPEST = 4  # arrays inside arrays
MOST_DIMENSIONS = 4


# ---- blocks of 32 numbers ------------------------------------------------------------------------
# Each begins with one or two float16: the scale, and the lowest value. The order of the operations
# is that of llama.cpp, so the results are equal bit for bit.

def _halves(raw: Tensor) -> Tensor:
    """Bytes (N, 2 k) -> float32 (N, k): float16 numbers."""
    return raw.contiguous().view(torch.float16).float()


def _nibbles(raw: Tensor) -> Tensor:
    """Bytes (N, 16) -> (N, 32): the low halves of all 16, then their high halves."""
    return torch.cat((raw & 15, raw >> 4), 1)


def _q8_0(raw: Tensor) -> Tensor:
    """Blocks (N, 34) -> (N, 32)."""
    return _halves(raw[:, :2]) * raw[:, 2:].view(torch.int8)


def _q4_0(raw: Tensor) -> Tensor:
    """Blocks (N, 18) -> (N, 32)."""
    return _halves(raw[:, :2]) * (_nibbles(raw[:, 2:]).view(torch.int8) - 8)


def _q4_1(raw: Tensor) -> Tensor:
    """Blocks (N, 20) -> (N, 32)."""
    scale, low = _halves(raw[:, :4]).split(1, 1)
    return scale * _nibbles(raw[:, 4:]) + low


LAYOUTS = {0: PLAIN["F32"], 1: PLAIN["F16"], 30: PLAIN["BF16"],
           2: Layout("Q4_0", torch.float32, 18, 32, _q4_0), 3: Layout("Q4_1", torch.float32, 20, 32, _q4_1),
           8: Layout("Q8_0", torch.float32, 34, 32, _q8_0)}
# the other types, so that a refusal can name them
OTHERS = {6: "Q5_0", 7: "Q5_1", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K",
          16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S",
          23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0",
          39: "MXFP4", 40: "NVFP4", 41: "Q1_0"}


# ---- the header ----------------------------------------------------------------------------------

class Header:
    """Reads a header from its start. `at`: bytes read so far. Damaged where it does not fit its file."""

    def __init__(self, path: pathlib.Path, file: IO[bytes], size: int):
        self.path, self.file, self.size, self.at = path, file, size, 0

    def damaged(self, what: str) -> Damaged:
        return Damaged(f"{self.path}: {what}: {AGAIN}")

    def take(self, n: int, what: str) -> bytes:
        """The next n bytes."""
        if n > self.size - self.at:
            raise self.damaged(f"{what} of {n:,} bytes goes beyond the end of the file")
        self.at += n
        return self.file.read(n)

    def numbers(self, form: str, what: str = "a number") -> tuple[Any, ...]:
        """The next numbers, as struct's letters say."""
        return struct.unpack("<" + form, self.take(struct.calcsize("<" + form), what))

    def require_count(self, n: int, least: int, what: str) -> None:
        """n things of at least so many bytes must fit into what is left of the file."""
        if n > (self.size - self.at) // least:
            raise self.damaged(f"claims {n:,} {what}, more than the file can hold")

    def string(self, what: str) -> str:
        """A length and so many bytes of UTF-8."""
        raw = self.take(*self.numbers("Q"), what)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            raise self.damaged(f"{what}, {raw[:40]!r}, is not UTF-8") from None

    def value(self, kind: int, name: str, depth: int = 0) -> Any:
        """A value of a metadata field: a number, a bool, a string, or a list of such."""
        what = f"field {name[:80]!r}"
        if kind in SCALARS:
            return self.numbers(SCALARS[kind], what)[0]
        if kind == STRING:
            return self.string(what)
        if kind != ARRAY or depth == DEEPEST:
            raise self.damaged(f"{what} has the unknown type {kind}" if kind != ARRAY else
                               f"{what} has arrays in arrays, {DEEPEST} deep")
        inner, n = self.numbers("IQ", what)
        form = SCALARS.get(inner)
        self.require_count(n, struct.calcsize("<" + form) if form else 8, f"elements of {what}")
        if n > LONGEST:
            raise self.damaged(f"claims {n:,} elements of {what}, more than {LONGEST:,}")
        return list(self.numbers(f"{n}{form}", what)) if form else [self.value(inner, name, depth + 1)
                                                                    for _ in range(n)]

    def tensor(self) -> Stored:
        """A tensor's name, shape, type and offset, which counts from the end of the header here."""
        name = self.string("a tensor's name")
        what = f"tensor {name[:80]!r}"
        n_dimensions, = self.numbers("I", what)
        if n_dimensions > MOST_DIMENSIONS:
            raise self.damaged(f"{what} claims {n_dimensions:,} dimensions, more than {MOST_DIMENSIONS}")
        *shape, kind, offset = self.numbers(f"{n_dimensions}QIQ", what)
        if kind not in LAYOUTS:
            raise UserError(f"{self.path}: {what} is stored as {OTHERS.get(kind, f'type {kind}')}, which is not read: "
                            f"take the file with {', '.join(x.name for x in LAYOUTS.values())}")
        row = shape[0] if shape else 1
        if row % LAYOUTS[kind].numbers:
            raise self.damaged(f"{what} has rows of {row:,} numbers, which are no whole blocks of "
                               f"{LAYOUTS[kind].numbers}")
        return Stored(self.path, name, offset, tuple(reversed(shape)), LAYOUTS[kind])


def _require_version(header: Header) -> None:
    """UserError unless this is GGUF of a version and byte order that is read."""
    if header.size < 24 or header.take(4, "the start") != b"GGUF":
        raise Damaged(f"{header.path}: is no GGUF file: it does not begin with those letters; check which file it "
                      "is, or fetch it again")
    version, = header.numbers("I")
    if version and version % 2**16 == 0:  # a small number in the other order
        raise UserError(f"{header.path}: is big-endian, which is not read: take the little-endian file, or turn it "
                        "with gguf-convert-endian of the package gguf")
    if version not in VERSIONS:
        raise UserError(f"{header.path}: is GGUF of version {version}, but only {' and '.join(map(str, VERSIONS))} are "
                        "read: make it anew with a current llama.cpp")


def _alignment(header: Header, fields: dict[str, Any]) -> int:
    """What the tensors' offsets are multiples of."""
    alignment = fields.get("general.alignment", 32)
    if type(alignment) is not int or not 0 < alignment <= 2**20 or alignment & (alignment - 1):
        raise header.damaged(f"general.alignment is {str(alignment)[:40]!r}, not a power of two")
    return alignment


def read_gguf(path: str | pathlib.Path) -> tuple[dict[str, Any], Tensors]:
    """(metadata fields, tensors) of a GGUF file; fields hold numbers, bools, strings and lists.

    Shapes are in torch's order, (out, in) for a matrix. UserError for a file that is damaged, or of
    a kind that is not read; it names the tensor and what to do.
    """
    path = pathlib.Path(path)
    with opened(path) as (file, size):
        header = Header(path, file, size)
        _require_version(header)
        n_tensors, n_fields = header.numbers("QQ")
        header.require_count(n_tensors, 24, "tensors")
        header.require_count(n_fields, 13, "fields")
        fields: dict[str, Any] = {}
        for _ in range(n_fields):
            name = header.string("a field's name")
            if name in fields:
                raise header.damaged(f"the field {name[:80]!r} occurs twice")
            fields[name] = header.value(*header.numbers("I"), name)
        infos = [header.tensor() for _ in range(n_tensors)]
        alignment = _alignment(header, fields)
    return fields, _placed(header, infos, fields, alignment)


def _placed(header: Header, infos: list[Stored], fields: dict[str, Any], alignment: int) -> Tensors:
    """The tensors with offsets from the start of the file; Damaged if one lies where it cannot."""
    start = end = -(-header.at // alignment) * alignment
    entries: dict[str, Stored] = {}
    for info in sorted(infos, key=lambda info: (info.offset, info.n_bytes)):
        entry = Stored(info.path, info.name, start + info.offset, info.shape, info.layout)
        entry.require_inside(start, header.size)
        if info.offset % alignment:
            raise header.damaged(f"tensor {info.name[:80]!r} is not aligned to {alignment} bytes")
        if entry.offset < end:
            raise header.damaged(f"tensor {info.name[:80]!r} overlaps the one before it")
        if info.name in entries:
            raise header.damaged(f"the tensor {info.name[:80]!r} occurs twice")
        entries[info.name], end = entry, entry.offset + entry.n_bytes
    return Tensors(header.path, {info.name: entries[info.name] for info in infos}, fields)


# ---- as a model ----------------------------------------------------------------------------------

NAMES = {  # of our modules, as in convert/families.py
    "embedding": ("token_embd",), "norm": ("output_norm",), "output": ("output",),
    "attention_norm": ("attn_norm",), "mlp_norm": ("ffn_norm",),
    "attention.qkv": ("attn_q", "attn_k", "attn_v"), "attention.out": ("attn_output",),
    "attention.q_norm": ("attn_q_norm",), "attention.k_norm": ("attn_k_norm",),
    "mlp.gate_up": ("ffn_gate", "ffn_up"), "mlp.down": ("ffn_down",)}
# fields of GGUF files that llama.cpp multiplies by, or builds other layers for: the values that change nothing
UNSCALED = {name: (0, 1) for name in (
    "rope.scale_linear", "rope.scaling.factor", "rope.scaling.attn_factor", "logit_scale", "residual_scale",
    "embedding_scale")} | {name: (0,) for name in (
        "expert_count", "attention.scale", "attention.clamp_kqv", "attention.max_alibi_bias",
        "attn_logit_softcapping", "final_logit_softcapping")}


def gguf_config(fields: dict[str, Any], tensors: Tensors, path: pathlib.Path) -> Config:
    """What config.json would say, from the metadata of a GGUF file."""
    kind = fields.get("general.architecture")
    if kind not in ("llama", "qwen2", "qwen3"):
        raise UserError(f"{path}: general.architecture {str(kind)[:40]!r} is not known in GGUF files; Mosslet reads "
                        "llama, qwen2 and qwen3, and more families from folders")
    if "rope_freqs.weight" in tensors or fields.get(f"{kind}.rope.scaling.type", "none") != "none":
        raise UserError(f"{path}: scaled rotary positions are not read from GGUF files: take the model's folder")
    for name, neutral in UNSCALED.items():
        if (value := fields.get(f"{kind}.{name}", 0)) not in neutral:
            raise UserError(f"{path}: {kind}.{name} is {str(value)[:40]!r}: the model computes with it what Mosslet "
                            "does not know")
    names = {"hidden_size": "embedding_length", "num_hidden_layers": "block_count",
             "intermediate_size": "feed_forward_length", "num_attention_heads": "attention.head_count",
             "num_key_value_heads": "attention.head_count_kv", "head_dim": "attention.key_length",
             "rms_norm_eps": "attention.layer_norm_rms_epsilon", "rope_theta": "rope.freq_base",
             "max_position_embeddings": "context_length"}
    values = {ours: fields.get(f"{kind}.{theirs}") for ours, theirs in names.items()}
    rows = tensors["token_embd.weight"].shape[:1] if "token_embd.weight" in tensors else ()
    values |= {"model_type": kind, "vocab_size": (*rows, 0)[0], "tie_word_embeddings": "output.weight" not in tensors}
    if "blk.0.attn_output.bias" in tensors:
        values["attention_bias"] = True
    config = Config({name: x for name, x in values.items() if x is not None}, path)
    # as llama.cpp has them where a file does not say: not as the classes of transformers do
    heads = config.number("num_attention_heads")
    config.setdefault("num_key_value_heads", heads)
    config.setdefault("head_dim", max(1, config.number("hidden_size") // heads))
    wide = config.number("head_dim")
    if (rotated := fields.get(f"{kind}.rope.dimension_count", wide)) != wide:
        raise UserError(f"{path}: {kind}.rope.dimension_count is {str(rotated)[:40]!r}, but a head has {wide} "
                        f"dimensions: Mosslet does not know a {kind} whose heads are partly rotated")
    return config
