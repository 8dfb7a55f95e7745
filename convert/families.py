"""Families of real models: what their configs say, what their tensors are called, how they are turned.

One record a family, read in both directions: `import` asks for each of our tensors which of theirs it
is made of, `export` for each of ours which of theirs it becomes. What a family has and `Transformer`
has not is refused by name. Facts: the configs and modelling files of `transformers` 5.24, and the
README of MOSS.
"""
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from model import ModelConfig
from runtime.options import UserError

Fields = dict[str, Any]
T = TypeVar("T")
KINDS = {str: "a text", bool: "true or false", int: "a whole number", list: "a list", dict: "an object"}
LONGEST = 4096  # rows that an imported model is made for, unless asked for more: its tables take memory


# ---- reading a config ----------------------------------------------------------------------------

class Config(dict):
    """A config.json, or what stands for it. path: for messages."""

    def __init__(self, values: Mapping[str, Any], path: Any):
        super().__init__(values)
        self.path = path

    def number(self, name: str, default: Any = None, kind: type = int) -> Any:
        """A positive number; UserError for anything else. default: where the name is missing or null."""
        value = default if self.get(name) is None else self[name]
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 2**40 or (
                kind is int and value != int(value)):  # the range first: int(nan) and int(inf) are errors
            raise UserError(f"{self.path}: {name} is {str(value)[:40]!r}, but must be a positive number")
        return kind(value)

    def of_kind(self, name: str, kind: type[T], default: T) -> T:
        """A value that must be of a kind; UserError if it is not. default: where it is missing or null."""
        value = default if self.get(name) is None else self[name]
        if not isinstance(value, kind):
            raise UserError(f"{self.path}: {name} is {repr(value)[:40]}, but must be {KINDS[kind]}")
        return value

    def refuse(self, name: str, *allowed: Any, why: str) -> None:
        """UserError if the value is none of those allowed; a missing name is allowed."""
        if self.get(name) is not None and self[name] not in allowed:
            raise UserError(f"{self.path}: {name} is {str(self[name])[:60]!r}: {why}; Mosslet cannot compute this "
                            "model")


def rope(c: Config) -> Fields:
    """The base of rotary positions and Llama 3's scaling, from the keys of either generation. As in
    transformers 5: rope_scaling alone counts where both objects are there, the base in it before the one
    outside, and the original length outside before the one in it."""
    old, new = c.of_kind("rope_scaling", dict, {}), c.of_kind("rope_parameters", dict, {})
    name, s = ("rope_scaling", Config(old, c.path)) if old else ("rope_parameters", Config(new, c.path))
    if any(isinstance(value, dict) for value in s.values()):
        raise UserError(f"{c.path}: {name} differs between kinds of layers; Mosslet cannot compute this model")
    fields = {"rope_base": s.number("rope_theta", c.get("rope_theta"), float)}
    kind = s.get("rope_type", s.get("type", "default"))
    if kind == "llama3":
        length = "original_max_position_embeddings"
        original = (s if c.get(length) is None else c).number(length, c.get("max_position_embeddings"))
        fields["rope_scaling"] = (*(s.number(name, kind=float) for name in (
            "factor", "low_freq_factor", "high_freq_factor")), float(original))
    elif kind != "default":
        raise UserError(f"{c.path}: rotary positions of type {repr(kind)[:40]}: only default and llama3 are known; "
                        "Mosslet cannot compute this model")
    if s.get("partial_rotary_factor", c.get("partial_rotary_factor")) not in (None, 1, 1.0):
        raise UserError(f"{c.path}: partial_rotary_factor is for families that Mosslet does not know")
    return fields


def llama_like(c: Config, window: int | None = None, **own: Any) -> Fields:
    """Fields of the families with RMSNorm, SwiGLU and rotary positions. window: tokens that a token sees
    of its row, in some layers or all. own: fields of the family."""
    c.refuse("hidden_act", "silu", "swish", why="another activation than SwiGLU's silu")
    c.refuse("pretraining_tp", 1, why="weights cut for tensor parallelism")
    if not all(c.of_kind("no_rope_layers", list, [])):
        raise UserError(f"{c.path}: no_rope_layers: layers without positions are not known; Mosslet cannot compute "
                        "this model")
    known = ("full_attention", *["sliding_attention"] * (window is not None))
    if any(kind not in known for kind in c.of_kind("layer_types", list, [])):
        raise UserError(f"{c.path}: layer_types has more than {' and '.join(known)}; Mosslet cannot compute this "
                        "model")
    heads, longest, width = (c.number("num_attention_heads"), c.number("max_position_embeddings"),
                             c.number("hidden_size"))
    return dict(
        n_layer=c.number("num_hidden_layers"), n_head=heads, d_model=width,
        n_kv_head=c.number("num_key_value_heads", heads), head_dim=c.number("head_dim", max(1, width // heads)),
        d_ff=c.number("intermediate_size"), norm_eps=c.number("rms_norm_eps", kind=float), qk_norm=False,
        max_len=min(longest, window or longest),  # rows no longer than the window see all of themselves
        **rope(c)) | own


def llama(c: Config) -> Fields:
    biased, mlp = c.of_kind("attention_bias", bool, False), c.of_kind("mlp_bias", bool, False)
    return llama_like(c, qkv_bias=biased, out_bias=biased, mlp_bias=mlp)


def mistral(c: Config) -> Fields:
    return llama_like(c, None if c.get("sliding_window") is None else c.number("sliding_window"))


def qwen(c: Config, **own: Any) -> Fields:
    """Fields of Qwen2 and 3: a window, if there is one, is that of the layers from max_window_layers on."""
    window = None
    if c.of_kind("use_sliding_window", bool, False) and c.get("sliding_window") is not None:
        later = c.of_kind("max_window_layers", int, 0) < c.number("num_hidden_layers")
        if "sliding_attention" in c.of_kind("layer_types", list, ["sliding_attention"] * later):
            window = c.number("sliding_window")
    return llama_like(c, window, **own)


def qwen2(c: Config) -> Fields:
    return qwen(c, qkv_bias=True)


def qwen3(c: Config) -> Fields:
    biased = c.of_kind("attention_bias", bool, False)
    return qwen(c, qk_norm=True, qkv_bias=biased, out_bias=biased)


def smollm3(c: Config) -> Fields:
    if not c.get("no_rope_layers"):
        raise UserError(f"{c.path}: SmolLM3's every fourth layer has no positions; Mosslet cannot compute this model")
    return llama(c)


def gpt_like(c: Config, **own: Any) -> Fields:
    """Fields of GPT-2 and CodeGen: LayerNorm, tanh GELU, all under the older names."""
    c.refuse("activation_function", "gelu_new", "gelu_pytorch_tanh", why="another activation than the tanh GELU")
    width, heads = c.number("n_embd"), c.number("n_head")
    return dict(n_layer=c.number("n_layer"), n_head=heads, n_kv_head=heads, d_model=width,
                head_dim=max(1, width // heads), d_ff=c.number("n_inner", 4 * width),
                norm_eps=c.number("layer_norm_epsilon", kind=float), norm="layer", mlp="gelu", mlp_bias=True,
                max_len=c.number("n_positions"), qk_norm=False) | own


def gpt2(c: Config) -> Fields:
    for name, allowed in (("scale_attn_weights", True), ("scale_attn_by_inverse_layer_idx", False),
                          ("reorder_and_upcast_attn", False), ("add_cross_attention", False)):
        c.refuse(name, allowed, why="attention that is computed otherwise")
    return gpt_like(c, positions="learned", qkv_bias=True, out_bias=True)


def codegen(c: Config) -> Fields:
    c.refuse("tie_word_embeddings", False, why="CodeGen's head is its own")
    if c.number("n_head") % 4:
        raise UserError(f"{c.path}: n_head is {c['n_head']}: CodeGen stores its heads in four parts")
    return gpt_like(c, parallel=True, rotary_dim=c.number("rotary_dim"), head_bias=True)


# ---- writing one ---------------------------------------------------------------------------------

def llama_config(c: ModelConfig) -> Fields:
    """config.json's keys, rotary positions by the names of both generations."""
    names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    scaling = dict(zip(names, c.rope_scaling, strict=True)) if c.rope_scaling else {}
    if scaling:
        scaling = {"rope_type": "llama3", **scaling, names[3]: int(scaling[names[3]])}
    return dict(
        hidden_size=c.d_model, intermediate_size=c.d_ff, num_hidden_layers=c.n_layer, num_attention_heads=c.n_head,
        num_key_value_heads=c.n_kv_head, head_dim=c.head_dim, max_position_embeddings=c.max_len, hidden_act="silu",
        rms_norm_eps=c.norm_eps, attention_bias=c.out_bias, mlp_bias=c.mlp_bias, attention_dropout=0.0,
        rope_theta=c.rope_base,
        rope_scaling=scaling or None,
        rope_parameters={"rope_type": "default", "rope_theta": c.rope_base, **scaling})


def gpt2_config(c: ModelConfig) -> Fields:
    return dict(n_embd=c.d_model, n_layer=c.n_layer, n_head=c.n_head, n_inner=c.d_ff, n_positions=c.max_len,
                n_ctx=c.max_len, layer_norm_epsilon=c.norm_eps, activation_function="gelu_new",
                embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0)


# ---- tensors -------------------------------------------------------------------------------------

@dataclasses.dataclass(frozen=True)
class Family:
    """How one kind of model is stored. names: of each module of ours, theirs; several are stacked by rows."""

    model_type: str
    policy: str  # class in transformers
    reward: str  # the class with a score; "" where transformers has none
    read: Callable[[Config], Fields]
    write: Callable[[ModelConfig], Fields]
    trunk: str  # before the names of what a policy and a reward model share
    layer: str
    names: dict[str, tuple[str, ...]]
    turned: bool = False  # matrices of the blocks are stored (in, out)
    qkv: str = "rows"  # how queries, keys and values lie in theirs: rows, codegen, gguf
    defaults: Fields = dataclasses.field(default_factory=dict)  # of keys that a config may lack: the class's
    ignored: tuple[str, ...] = ()  # ends of names that hold no weights: masks of older files

    def fields(self, config: Config) -> Fields:
        """Fields of ModelConfig that a config says, or by its silence leaves as the class has them."""
        return self.read(Config(self.defaults | config, config.path))

    def theirs(self, ours: str) -> tuple[str, ...]:
        """The names of the tensors that our tensor is made of: `blocks.3.mlp.down.weight` -> …"""
        module, _, kind = ours.rpartition(".")
        if module == "score_head":
            return (f"score.{kind}",)
        if module == "output":
            return tuple(f"{name}.{kind}" for name in self.names["output"])
        if not module.startswith("blocks."):
            return tuple(f"{self.trunk}{name}.{kind}" for name in self.names[module])
        _, number, module = module.split(".", 2)
        return tuple(f"{self.trunk}{self.layer.format(number)}{name}.{kind}" for name in self.names[module])

    def rows(self, ours: str, config: ModelConfig) -> list[int]:
        """Rows of ours that each of theirs has."""
        module = ours.rpartition(".")[0].split(".")[-1]
        if len(self.theirs(ours)) == 1:
            return [-1]
        return [config.d_ff] * 2 if module == "gate_up" else [
            heads * config.head_dim for heads in (config.n_head, config.n_kv_head, config.n_kv_head)]

    def join(self, ours: str, parts: Sequence[Tensor], config: ModelConfig) -> Tensor:
        """Their tensors as ours."""
        if self.turned and ours.startswith("blocks.") and parts[0].dim() == 2:
            parts = [part.T for part in parts]
        if ours.rpartition(".")[0].endswith(".qkv"):
            if self.qkv == "codegen":
                parts = codegen_heads(parts[0], config)
            elif self.qkv == "gguf":
                parts = [*(unpermuted(x, n) for x, n in zip(parts, (config.n_head, config.n_kv_head), strict=False)),
                         parts[2]]
        return torch.cat(list(parts)) if len(parts) > 1 else parts[0]

    def split(self, ours: str, tensor: Tensor, config: ModelConfig) -> list[Tensor]:
        """Our tensor as theirs: the inverse of `join`."""
        if self.qkv == "codegen" and ours.rpartition(".")[0].endswith(".qkv"):
            return [codegen_stored(tensor, config)]
        parts = [tensor] if len(self.theirs(ours)) == 1 else tensor.split(self.rows(ours, config))
        if self.turned and ours.startswith("blocks.") and tensor.dim() == 2:
            parts = [part.T for part in parts]
        return [part.contiguous() for part in parts]

    def shapes(self, ours: str, shape: tuple[int, ...], config: ModelConfig) -> list[tuple[int, ...]]:
        """The shapes of theirs for ours of this shape."""
        rows = self.rows(ours, config)
        found = [shape] if rows == [-1] else [(n, *shape[1:]) for n in rows]
        if self.turned and ours.startswith("blocks."):
            found = [x[::-1] for x in found]
        return found


SHARDS = 4  # CodeGen was trained on four devices; each has the queries, values and keys of its heads


def rotary_order(config: ModelConfig) -> Tensor:
    """(K,): where each of a head's rows stands among CodeGen's, which rotates neighbours (2i, 2i + 1) and
    not halves."""
    n = config.rotary_dim or config.head_dim
    return torch.cat((torch.arange(0, n, 2), torch.arange(1, n, 2), torch.arange(n, config.head_dim)))


def codegen_heads(stored: Tensor, config: ModelConfig) -> list[Tensor]:
    """CodeGen's qkv_proj (3D, …) -> queries, keys and values (D, …) whose heads rotate by halves."""
    wide = (config.n_head, config.head_dim, *stored.shape[1:])
    q, v, k = stored.view(SHARDS, 3, -1, *stored.shape[1:]).unbind(1)
    order = rotary_order(config)
    q, k = (x.reshape(wide)[:, order].flatten(0, 1) for x in (q, k))
    return [q, k, v.reshape(-1, *stored.shape[1:])]


def codegen_stored(ours: Tensor, config: ModelConfig) -> Tensor:
    """The inverse of `codegen_heads`, of the three stacked by rows."""
    wide, back = (config.n_head, config.head_dim, *ours.shape[1:]), rotary_order(config).argsort()
    q, k, v = ours.chunk(3)
    q, k = (x.reshape(wide)[:, back].flatten(0, 1) for x in (q, k))
    parts = [x.reshape(SHARDS, -1, *ours.shape[1:]) for x in (q, v, k)]
    return torch.stack(parts, 1).reshape(ours.shape)


def unpermuted(x: Tensor, heads: int) -> Tensor:
    """llama.cpp's order of a Llama's queries or keys, which rotates neighbours, back to halves."""
    return x.view(heads, -1, 2, *x.shape[1:]).transpose(1, 2).reshape(x.shape)


LLAMA = {
    "embedding": ("embed_tokens",), "norm": ("norm",), "output": ("lm_head",),
    "attention_norm": ("input_layernorm",), "mlp_norm": ("post_attention_layernorm",),
    "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention.out": ("self_attn.o_proj",),
    "attention.q_norm": ("self_attn.q_norm",), "attention.k_norm": ("self_attn.k_norm",),
    "mlp.gate_up": ("mlp.gate_proj", "mlp.up_proj"), "mlp.down": ("mlp.down_proj",)}
GPT = {"embedding": ("wte",), "norm": ("ln_f",), "output": ("lm_head",), "attention_norm": ("ln_1",)}
GPT2 = GPT | {
    "position_embedding": ("wpe",), "mlp_norm": ("ln_2",), "attention.qkv": ("attn.c_attn",),
    "attention.out": ("attn.c_proj",), "mlp.up": ("mlp.c_fc",), "mlp.down": ("mlp.c_proj",)}
CODEGEN = GPT | {
    "attention.qkv": ("attn.qkv_proj",), "attention.out": ("attn.out_proj",),
    "mlp.up": ("mlp.fc_in",), "mlp.down": ("mlp.fc_out",)}

def _llama(model_type: str, name: str, read: Callable[[Config], Fields], **defaults: Any) -> Family:
    return Family(model_type, f"{name}ForCausalLM", f"{name}ForSequenceClassification", read, llama_config,
                  "model.", "layers.{}.", LLAMA, ignored=("rotary_emb.inv_freq",),
                  defaults={"rms_norm_eps": 1e-6, "rope_theta": 10_000.0, **defaults})


MISTRAL = dict(num_key_value_heads=8, max_position_embeddings=131072, sliding_window=4096)
QWEN = dict(num_key_value_heads=32, max_position_embeddings=32768, sliding_window=4096, max_window_layers=28)
FAMILIES = {family.model_type: family for family in (
    _llama("llama", "Llama", llama, max_position_embeddings=2048),
    dataclasses.replace(_llama("mistral", "Mistral", mistral, **MISTRAL),
                        write=lambda c: llama_config(c) | {"sliding_window": None}),
    _llama("qwen2", "Qwen2", qwen2, **QWEN), _llama("qwen3", "Qwen3", qwen3, **QWEN, head_dim=128),
    _llama("smollm3", "SmolLM3", smollm3, num_key_value_heads=4, max_position_embeddings=32768,
           rope_theta=2_000_000.0, tie_word_embeddings=True),
    Family("gpt2", "GPT2LMHeadModel", "GPT2ForSequenceClassification", gpt2, gpt2_config, "transformer.", "h.{}.",
           GPT2, turned=True, ignored=("attn.bias", "attn.masked_bias"),
           defaults=dict(n_positions=1024, layer_norm_epsilon=1e-5, tie_word_embeddings=True)),
    *(Family(kind, name, "", codegen, lambda c: gpt2_config(c) | {"rotary_dim": c.rotary_dim or c.head_dim},
             "transformer.", "h.{}.", CODEGEN, qkv="codegen", ignored=("attn.causal_mask", "attn.bias"),
             defaults=dict(n_positions=2048, layer_norm_epsilon=1e-5, rotary_dim=64, tie_word_embeddings=False))
      for kind, name in (("codegen", "CodeGenForCausalLM"), ("moss", "MossForCausalLM"))))}


def family_of(c: ModelConfig) -> Family:
    """The family that computes what a model of this shape computes; UserError if none does."""
    plain = not (c.qkv_bias or c.out_bias or c.mlp_bias or c.head_bias or c.rotary_dim or c.parallel
                 or c.positions != "rotary")
    found = ""
    if (c.norm, c.mlp) == ("layer", "gelu") and c.mlp_bias:
        if c.positions == "learned" and c.qkv_bias and c.out_bias and not (c.parallel or c.head_bias):
            found = "gpt2"
        elif c.parallel and c.head_bias and not (c.tied or c.qkv_bias or c.out_bias or c.n_head % SHARDS):
            found = "codegen"
    elif (c.norm, c.mlp) == ("rms", "swiglu"):
        if c.qk_norm and plain and not c.rope_scaling:
            found = "qwen3"  # our own models, too
        elif not c.qk_norm and plain:
            found = "llama"
        elif not c.qk_norm and c.qkv_bias and not (c.out_bias or c.mlp_bias):
            found = "qwen2"
        elif not c.qk_norm and c.qkv_bias == c.out_bias and not (c.rotary_dim or c.parallel or c.head_bias):
            found = "llama"
    if not found or math.isnan(c.rope_base):
        raise UserError(f"no family of real models computes what this shape does: {dataclasses.asdict(c)}")
    return FAMILIES[found]
