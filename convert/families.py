"""Families of real models: what their configs say, what their tensors are called, how they are turned.

One record a family, read in both directions: `import` asks for each of our tensors which of theirs it
is made of, `export` for each of ours which of theirs it becomes. What a family has and `Transformer`
has not is refused by name. Facts: the configs and modelling files of `transformers` 5.24, and the
README of MOSS.
"""
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from model import ModelConfig
from runtime.options import UserError

Fields = dict[str, Any]
LONGEST = 4096  # rows that an imported model is made for, unless asked for more: its tables take memory


# ---- reading a config ----------------------------------------------------------------------------

class Config(dict):
    """A config.json, or what stands for it. path: for messages."""

    def __init__(self, values: Mapping[str, Any], path: Any):
        super().__init__(values)
        self.path = path

    def number(self, name: str, default: Any = None, kind: type = int) -> Any:
        """A positive number; UserError for anything else. default: where the name is missing or null."""
        value = self.get(name)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float) or (
                kind is int and value != int(value)) or not 0 < value < 2**40:
            raise UserError(f"{self.path}: {name} is {str(value)[:40]!r}, but must be a positive number")
        return kind(value)

    def refuse(self, name: str, *allowed: Any, why: str) -> None:
        """UserError if the value is none of those allowed; a missing name is allowed."""
        if self.get(name) is not None and self[name] not in allowed:
            raise UserError(f"{self.path}: {name} is {str(self[name])[:60]!r}: {why}; Mosslet cannot compute this "
                            "model")


def rope(c: Config) -> Fields:
    """The base of rotary positions and Llama 3's scaling, from the keys of either generation. Where they
    contradict each other the older ones count, as in transformers."""
    new = c.get("rope_parameters") or {}
    scaling = c.get("rope_scaling") or new
    if not isinstance(new, dict) or not isinstance(scaling, dict):
        raise UserError(f"{c.path}: rope_parameters and rope_scaling must be objects")
    base = Config({**new, **{k: c[k] for k in ("rope_theta",) if c.get(k) is not None}}, c.path)
    fields = {"rope_base": base.number("rope_theta", 10_000.0, float)}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "llama3":
        s = Config(scaling, c.path)
        original = s.number("original_max_position_embeddings", c.get("original_max_position_embeddings"))
        fields["rope_scaling"] = (s.number("factor", kind=float), s.number("low_freq_factor", 1.0, float),
                                  s.number("high_freq_factor", 4.0, float), float(original))
    elif kind != "default":
        raise UserError(f"{c.path}: rotary positions of type {kind!r}: only default and llama3 are known; Mosslet "
                        "cannot compute this model")
    if scaling.get("partial_rotary_factor", c.get("partial_rotary_factor")) not in (None, 1, 1.0):
        raise UserError(f"{c.path}: partial_rotary_factor is for families that Mosslet does not know")
    return fields


def llama_like(c: Config, **own: Any) -> Fields:
    """Fields of the families with RMSNorm, SwiGLU and rotary positions. own: those of the family."""
    c.refuse("hidden_act", "silu", "swish", why="another activation than SwiGLU's silu")
    c.refuse("pretraining_tp", 1, why="weights cut for tensor parallelism")
    if any(x == 0 for x in c.get("no_rope_layers") or ()):
        raise UserError(f"{c.path}: no_rope_layers: layers without positions are not known; Mosslet cannot compute "
                        "this model")
    windows = c.get("sliding_window") if own.pop("slides", False) else None
    heads, longest = c.number("num_attention_heads"), c.number("max_position_embeddings", 2048)
    if windows is not None:  # rows no longer than the window see all of themselves
        longest = min(longest, c.number("sliding_window"))
    elif any(kind != "full_attention" for kind in c.get("layer_types") or ()):
        raise UserError(f"{c.path}: layer_types has more than full_attention, which alone is known; Mosslet cannot "
                        "compute this model")
    width = c.number("hidden_size")
    return dict(
        n_layer=c.number("num_hidden_layers"), n_head=heads, d_model=width,
        n_kv_head=c.number("num_key_value_heads", heads), head_dim=c.number("head_dim", max(1, width // heads)),
        d_ff=c.number("intermediate_size"), norm_eps=c.number("rms_norm_eps", 1e-6, float),
        max_len=longest, qk_norm=False, **rope(c)) | own


def llama(c: Config) -> Fields:
    biased, mlp = bool(c.get("attention_bias")), bool(c.get("mlp_bias"))
    return llama_like(c, qkv_bias=biased, out_bias=biased, mlp_bias=mlp)


def mistral(c: Config) -> Fields:
    return llama_like(c, slides=c.get("sliding_window") is not None)


def qwen2(c: Config) -> Fields:
    return llama_like(c, qkv_bias=True, slides=bool(c.get("use_sliding_window")))


def qwen3(c: Config) -> Fields:
    biased = bool(c.get("attention_bias"))
    return llama_like(Config({"head_dim": 128, **c}, c.path), qk_norm=True, qkv_bias=biased, out_bias=biased,
                      slides=bool(c.get("use_sliding_window")))


def smollm3(c: Config) -> Fields:
    if not c.get("no_rope_layers"):
        raise UserError(f"{c.path}: SmolLM3's every fourth layer has no positions; Mosslet cannot compute this model")
    return llama_like(c)


def gpt_like(c: Config, **own: Any) -> Fields:
    """Fields of GPT-2 and CodeGen: LayerNorm, tanh GELU, all under the older names."""
    c.refuse("activation_function", "gelu_new", "gelu_pytorch_tanh", why="another activation than the tanh GELU")
    width, heads = c.number("n_embd"), c.number("n_head")
    return dict(n_layer=c.number("n_layer"), n_head=heads, n_kv_head=heads, d_model=width,
                head_dim=max(1, width // heads), d_ff=c.number("n_inner", 4 * width),
                norm_eps=c.number("layer_norm_epsilon", 1e-5, float), norm="layer", mlp="gelu", mlp_bias=True,
                max_len=c.number("n_positions", c.get("n_ctx")), qk_norm=False) | own


def gpt2(c: Config) -> Fields:
    for name, allowed in (("scale_attn_weights", True), ("scale_attn_by_inverse_layer_idx", False),
                          ("reorder_and_upcast_attn", False), ("add_cross_attention", False)):
        c.refuse(name, allowed, why="attention that is computed otherwise")
    return gpt_like(c, positions="learned", qkv_bias=True, out_bias=True)


def codegen(c: Config) -> Fields:
    rotary = c.number("rotary_dim", 64)
    if c.number("n_head") % 4:
        raise UserError(f"{c.path}: n_head is {c['n_head']}: CodeGen stores its heads in four parts")
    return gpt_like(c, parallel=True, rotary_dim=rotary, head_bias=True)


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
    tied: bool = False  # where the config does not say
    ignored: tuple[str, ...] = ()  # ends of names that hold no weights: masks of older files

    def theirs(self, ours: str) -> tuple[str, ...]:
        """The names of the tensors that our tensor is made of: `blocks.3.mlp.down.weight` -> …"""
        module, _, kind = ours.rpartition(".")
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
GGUF = {
    "embedding": ("token_embd",), "norm": ("output_norm",), "output": ("output",),
    "attention_norm": ("attn_norm",), "mlp_norm": ("ffn_norm",),
    "attention.qkv": ("attn_q", "attn_k", "attn_v"), "attention.out": ("attn_output",),
    "attention.q_norm": ("attn_q_norm",), "attention.k_norm": ("attn_k_norm",),
    "mlp.gate_up": ("ffn_gate", "ffn_up"), "mlp.down": ("ffn_down",)}


def _llama(model_type: str, name: str, read: Callable[[Config], Fields]) -> Family:
    return Family(model_type, f"{name}ForCausalLM", f"{name}ForSequenceClassification", read, llama_config,
                  "model.", "layers.{}.", LLAMA, ignored=("rotary_emb.inv_freq",))


FAMILIES = {family.model_type: family for family in (
    _llama("llama", "Llama", llama), _llama("mistral", "Mistral", mistral), _llama("qwen2", "Qwen2", qwen2),
    _llama("qwen3", "Qwen3", qwen3), _llama("smollm3", "SmolLM3", smollm3),
    Family("gpt2", "GPT2LMHeadModel", "GPT2ForSequenceClassification", gpt2, gpt2_config, "transformer.", "h.{}.",
           GPT2, turned=True, tied=True, ignored=("attn.bias", "attn.masked_bias")),
    *(Family(kind, name, "", codegen, lambda c: gpt2_config(c) | {"rotary_dim": c.rotary_dim or c.head_dim},
             "transformer.", "h.{}.", CODEGEN, qkv="codegen", ignored=("attn.causal_mask", "attn.bias"))
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
