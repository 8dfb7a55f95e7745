"""The Transformer: the network that every stage of Mosslet trains, scores with or samples from.

Read from leaf to root: configuration, rotary positions, attention, MLP, block, the Transformer
itself, its losses, and the checkpoint file. The language model, the policy, the reference, the
reward model and the critic all have this trunk.

Letters for shapes: B rows, T positions, D width, H query heads, G key/value heads, K width of a
head and R its rotated part, V vocabulary, L cached positions, in n blocks of S (runtime/decoding.py),
N selected positions. The network knows nothing about text: a tokenizer is only stored beside the
weights. Last stands what a stage starts from.
"""
import dataclasses
import math
import os
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from data.prepared import Prepared
from data.tokenizer import Tokenizer
from runtime.decoding import KVCache
from runtime.draws import STAGES
from runtime.learning import learn_part, trunk_of
from runtime.lora import add_stored_adapters, merge_adapters
from runtime.machine import row_chunks
from runtime.options import Common, UserError
from runtime.products import LayerNorm, Linear, RMSNorm, linear, use_products
from runtime.run import NotFinite, Run, RunFolder, read_config, run_folder
from runtime.shapes import check_family, check_fields
from runtime.storage import (Damaged, checkpoint_path as checkpoint_path, largest, load_whole, previous_of,
                             save_whole, tensors_of, weights_hash as weights_hash)


NORMS = {"rms": RMSNorm, "layer": LayerNorm}


@dataclasses.dataclass
class ModelConfig:
    """Shape of a Transformer. The defaults are the demo's, except max_len: 2.6 million parameters,
    for two CPU cores.

    The fields from head_dim on are for checkpoints of other families: each names those that have
    it, and Mosslet trains none of them from the start. Skip them at first reading.
    """

    vocab_size: int = 4096
    n_layer: int = 4
    n_head: int = 4
    n_kv_head: int = 4  # fewer than n_head: query heads share keys and values (Ainslie 2023)
    d_model: int = 192
    d_ff: int = 512
    max_len: int = 512
    rope_base: float = 10_000.0
    norm_eps: float = 1e-6
    qk_norm: bool = True  # RMSNorm on queries and keys bounds attention logits at large rates
    tied: bool = True  # the output layer is the embedding matrix
    dropout: float = 0.0  # on each residual branch; only reward-model training uses it
    head_dim: int = 0  # width of a head: Qwen3; 0: d_model / n_head
    norm: str = "rms"  # "layer", LayerNorm with a bias: GPT-2, CodeGen
    mlp: str = "swiglu"  # "gelu", without a gate: GPT-2, CodeGen
    qkv_bias: bool = False  # Qwen2, GPT-2, some Llamas
    out_bias: bool = False  # GPT-2, some Llamas
    mlp_bias: bool = False  # GPT-2, CodeGen, some Llamas
    head_bias: bool = False  # of the output layer: CodeGen
    positions: str = "rotary"  # "learned", a table added to the embedding: GPT-2
    rotary_dim: int = 0  # only so many dimensions of a head are rotated: CodeGen; 0: all
    rope_scaling: tuple = ()  # (factor, low, high, original length) of longer rows: Llama 3
    parallel: bool = False  # attention and MLP read the same norm, side by side: CodeGen

    def __post_init__(self) -> None:
        check_fields(self)
        self.head_dim = self.head_dim or self.d_model // self.n_head
        check_family(self)


def rotary_tables(config: ModelConfig) -> tuple[Tensor, Tensor]:
    """cos and sin of position * frequency, each (max_len, R/2) for R rotated dimensions of a head
    (Su et al. 2021): all K, or rotary_dim, or none beside learned positions.

    Llama 3's scaling: a frequency that makes fewer than `low` turns within the original length is
    divided by `factor`, one that makes more than `high` stays, and between them both are mixed.
    """
    width = 0 if config.positions == "learned" else config.rotary_dim or config.head_dim
    exponents = torch.arange(0, width, 2, dtype=torch.float64) / width
    frequencies = config.rope_base ** -exponents
    if config.rope_scaling:
        factor, low, high, length = config.rope_scaling
        turns = length * frequencies / (2 * math.pi)
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        frequencies = frequencies * (kept + (1 - kept) / factor)
    angles = torch.arange(config.max_len, dtype=torch.float64)[:, None] * frequencies
    return angles.cos().float(), angles.sin().float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair (x_i, x_{i + R/2}) of a head's first R dimensions by its position's angle.

    x (B, H, T, K), cos and sin (B, 1, T, R/2) or (1, T, R/2) -> (B, H, T, K).
    """
    R = 2 * cos.shape[-1]
    if R < x.shape[-1]:  # the rest passes; all of it where positions are learned
        return torch.cat((rotate(x[..., :R], cos, sin), x[..., R:]), dim=-1) if R else x
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def attend(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None) -> Tensor:
    """softmax(q kᵀ / √K) v: q (B, H, T, K), k and v (B, G, T, K) -> (B, H, T, K).

    allowed: (B or 1, 1, T, T) bool, or None for plain causal attention. Uses SDPA, except for short
    bfloat16 rows (of at most 512 tokens) on a CPU, where its backward is 3 to 4 times slower than plain
    matrix products (measured). The plain products' softmax computes in float32 internally.
    """
    if v.dtype == torch.bfloat16 and v.device.type == "cpu" and v.shape[2] <= 512:
        repeats, T = q.shape[1] // k.shape[1], q.shape[2]
        if repeats > 1:
            k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
        if allowed is None:
            allowed = torch.ones(T, T, dtype=torch.bool, device=q.device).tril()
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
        zeros = torch.zeros(allowed.shape, dtype=q.dtype, device=q.device)
        scores += zeros.masked_fill(~allowed, -torch.inf)
        return scores.softmax(-1) @ v
    return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, is_causal=allowed is None,
                                          enable_gqa=q.shape[1] != k.shape[1])


class Attention(nn.Module):
    """Causal self-attention with rotary positions and grouped queries, head by head."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.n_head, self.n_kv_head = config.n_head, config.n_kv_head
        self.head_dim = config.head_dim
        self.qkv = Linear(config.d_model, (config.n_head + 2 * config.n_kv_head) * config.head_dim,
                          config.qkv_bias)
        self.out = Linear(config.n_head * config.head_dim, config.d_model, config.out_bias)
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()

    def heads(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, T, D) -> queries (B, H, T, K), keys (B, G, T, K), both normalised and rotated, and
        values (B, G, T, K)."""
        B, T, _ = x.shape
        q, k, v = self.qkv(x).view(B, T, -1, self.head_dim).transpose(1, 2).split(
            (self.n_head, self.n_kv_head, self.n_kv_head), dim=1)
        return rotate(self.q_norm(q.float()), cos, sin), rotate(self.k_norm(k.float()), cos, sin), v

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, allowed: Tensor | None,
                cache: KVCache | None = None, layer: int = 0,
                where: Tensor | None = None) -> Tensor:
        """x (B, T, D) -> (B, T, D), or (N, D) of the positions `where`.

        allowed: (B or 1, 1, T, T) bool, or None for plain causal attention. A cache receives this
        layer's keys and values at its first T positions.
        """
        q, k, v = self.heads(x, cos, sin)
        if cache is not None:
            cache.write_prompt(layer, k, v)
        y = attend(q.to(v.dtype), k.to(v.dtype), v, allowed).transpose(1, 2).flatten(2)
        return self.out(y if where is None else y.flatten(0, 1)[where])

    def step(self, x: Tensor, cos: Tensor, sin: Tensor, slot: Tensor, allowed: Tensor,
             cache: KVCache, layer: int) -> Tensor:
        """One token per row: x (B, 1, D) -> (B, 1, D). Its key and value are written at position
        `slot` (B,) of the cache; it attends to the positions where `allowed` (n, B, S) is True.

        Compiled: multiply-and-sum, which Inductor fuses into one pass over the cache. Eager: SDPA,
        because the products would be materialised.
        """
        q, k, v = self.heads(x, cos, sin)
        cache.write(layer, slot, k[:, :, 0], v[:, :, 0])
        n, B, S = allowed.shape
        keys = cache.kv[2 * layer][:n, :, :, :S]  # (n, B, G, S, K)
        values = cache.kv[2 * layer + 1][:n, :, :, :S]
        if not torch.compiler.is_dynamo_compiling():
            keys, values = (t.movedim(0, 2).flatten(2, 3) for t in (keys, values))  # (B, G, n S, K)
            allowed = allowed.transpose(0, 1).reshape(B, 1, 1, n * S)
            q = q.view(B, self.n_kv_head, -1, self.head_dim)  # a group's heads as queries: its keys are read once
            y = F.scaled_dot_product_attention(q.to(keys.dtype), keys, values, attn_mask=allowed)
        else:
            q = q.view(1, B, self.n_kv_head, -1, 1, self.head_dim)  # (1, B, G, H/G, 1, K)
            scores = self.head_dim ** -0.5 * (q * keys[:, :, :, None].float()).sum(-1)
            scores = torch.where(allowed[:, :, None, None], scores, -torch.inf)  # (n, B, G, H/G, S)
            weights = (scores - scores.amax((0, 4), keepdim=True)).exp()
            y = (weights[..., None] * values[:, :, :, None].float()).sum(4).sum(0)
            y = y / weights.sum((0, 4))[..., None]  # (B, G, H/G, K)
        return self.out(y.reshape(B, 1, -1).to(v.dtype))


class MLP(nn.Module):
    """SwiGLU: silu(gate) * up, then down (Shazeer 2020). Or "gelu": gelu(up), then down."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gated = config.mlp == "swiglu"
        if self.gated:
            self.gate_up = Linear(config.d_model, 2 * config.d_ff, config.mlp_bias)
        else:
            self.up = Linear(config.d_model, config.d_ff, config.mlp_bias)
        self.down = Linear(config.d_ff, config.d_model, config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        if not self.gated:
            return self.down(F.gelu(self.up(x), approximate="tanh"))
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)): pre-norm residual branches. Parallel: x +
    attention(n) + mlp(n), where n = norm(x)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        norm = NORMS[config.norm]
        self.attention_norm = norm(config.d_model, config.norm_eps)
        self.attention = Attention(config)
        self.mlp_norm = None if config.parallel else norm(config.d_model, config.norm_eps)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, allowed: Tensor | None,
                cache: KVCache | None = None, layer: int = 0,
                where: Tensor | None = None) -> Tensor:
        n = self.attention_norm(x)
        a = self.attention(n, cos, sin, allowed, cache, layer, where)
        if where is not None:
            x, n = x.flatten(0, 1)[where], n.flatten(0, 1)[where]
        x = x + self.dropout(a)
        return x + self.dropout(self.mlp(n if self.mlp_norm is None else self.mlp_norm(x)))

    def step(self, x: Tensor, cos: Tensor, sin: Tensor, slot: Tensor, allowed: Tensor,
             cache: KVCache, layer: int) -> Tensor:
        n = self.attention_norm(x)
        x = x + self.attention.step(n, cos, sin, slot, allowed, cache, layer)
        return x + self.mlp(n if self.mlp_norm is None else self.mlp_norm(x))


def attention_allowed(mask: Tensor | None, docs: Tensor | None) -> Tensor | None:
    """Which keys each query may attend to: (B, 1, T, T) bool, [query, key]; None: causal attention.

    A query sees itself and earlier keys that are real tokens of its own document. A pad sees at
    least itself: a softmax over no key is NaN, and 0 * NaN would reach every real row through the
    values of the next layer.
    """
    if mask is None and docs is None:
        return None
    shape = (docs if mask is None else mask).shape
    device = (docs if mask is None else mask).device
    allowed = torch.ones(shape[1], shape[1], dtype=torch.bool, device=device).tril()
    if docs is not None:
        allowed = allowed & (docs[:, :, None] == docs[:, None, :])
    if mask is not None:
        allowed = allowed & mask[:, None, :]
    allowed = allowed | torch.eye(shape[1], dtype=torch.bool, device=device)
    return allowed.expand(shape[0], -1, -1)[:, None]


class Transformer(nn.Module):
    """Decoder-only language model: tokens (B, T) -> logits (B, T, V) for the token that follows
    each position."""

    config_class = ModelConfig
    products = "aten"  # which kernels multiply: PyTorch's own, or "onednn" (runtime/products.py)

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.position_embedding = (nn.Embedding(config.max_len, config.d_model)
                                   if config.positions == "learned" else None)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = NORMS[config.norm](config.d_model, config.norm_eps)
        self.output = (None if config.tied
                       else Linear(config.d_model, config.vocab_size, config.head_bias))
        self.make_tables()
        # Ids of rows that no token has, as many real vocabularies leave some: they are never written.
        self.register_buffer("absent", None, persistent=False)
        # Gradient checkpointing: store only each block's input, recompute the block in backward.
        self.recompute = False
        self.frozen = 0  # how many of the lowest blocks do not learn; see runtime.learning
        self.initialise()

    def make_tables(self) -> None:
        """cos and sin of rotary positions. They are no weights, so whoever fills a model without numbers
        calls this, too."""
        for name, table in zip(("cos", "sin"), rotary_tables(self.config), strict=True):
            self.register_buffer(name, table, persistent=False)

    @torch.no_grad()
    def initialise(self, seed: int = 0) -> None:
        """N(0, .02), and each branch's last matrix smaller by sqrt(2 layers), so that depth does
        not add variance; biases 0."""
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                last = name.endswith(("attention.out.weight", "mlp.down.weight"))
                std = 0.02 / math.sqrt(2 * self.config.n_layer) if last else 0.02
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
            elif name.endswith("bias"):
                parameter.zero_()

    @property
    def output_weight(self) -> Tensor:
        """(V, D): the matrix of the output layer."""
        return self.embedding.weight if self.output is None else self.output.weight

    def embed(self, tokens: Tensor, at: Tensor | slice) -> Tensor:
        """Tokens -> (…, D): their embeddings, plus those of their positions where these are learned."""
        x = self.embedding(tokens)
        return x if self.position_embedding is None else x + self.position_embedding.weight[at]

    def trunk(self, tokens: Tensor, positions: Tensor | None, allowed: Tensor | None,
              cache: KVCache | None = None, where: Tensor | None = None, below: Tensor | None = None,
              top: bool = True) -> Tensor:
        """tokens (B, T) -> hidden states (B, T, D), or (N, D) of the positions `where` alone.

        positions: (B, T), or None for 0…T−1. where: (N,), indices into a flattened (B, T); the last
        layer, except its keys and values, is then computed only there. below (B, T, D): the states
        after the frozen blocks, if they are known. top=False: those are what is returned.
        """
        at = slice(0, tokens.shape[1]) if positions is None else positions
        cos, sin = (t[at].unsqueeze(-3) for t in (self.cos, self.sin))  # (1, T, R/2) or (B, 1, T, R/2)
        known, last = below is not None and self.frozen, len(self.blocks) - 1
        x = below if known else self.embed(tokens, at)
        for i, block in enumerate(self.blocks):
            if known and i < self.frozen or not top and i >= self.frozen:
                continue
            others = (cos, sin, allowed, cache, i, where if i == last else None)
            if self.recompute and i >= self.frozen and torch.is_grad_enabled():
                x = checkpoint(block, x, *others, use_reentrant=False)
            else:
                x = block(x, *others)
        return self.norm(x) if top else x

    def hidden(self, tokens: Tensor, mask: Tensor | None = None, docs: Tensor | None = None,
               where: Tensor | None = None, below: Tensor | None = None) -> Tensor:
        """Final hidden states (B, T, D), or (N, D) of the positions `where` (N,) alone.

        mask (B, T) bool: True at real tokens; padding may be left or right. Positions count real
        tokens, so a padded row equals the row alone. docs (B, T) int: attention only between equal
        numbers (packed documents). below: what `below` gave for these tokens.
        """
        if tokens.shape[1] > self.config.max_len:
            raise UserError(f"{tokens.shape[1]} tokens in a row, but this model was made for "
                            f"{self.config.max_len} (max_len): shorten the text, or train with a "
                            "larger --max_len")
        positions = None if mask is None else (mask.long().cumsum(1) - 1).clamp(min=0)
        if docs is not None and self.position_embedding is not None:
            # Learned positions count from a document's first token; rotary attention knows
            # differences only.
            count = torch.arange(docs.shape[1], device=docs.device) if positions is None else positions
            first = F.pad(docs.diff(dim=1) != 0, (1, 0))
            positions = count - (count * first).cummax(1).values
        return self.trunk(tokens, positions, attention_allowed(mask, docs), where=where, below=below)

    @torch.no_grad()
    def below(self, tokens: Tensor) -> Tensor | None:
        """tokens (B, T), padded to the right -> hidden states (B, T, D) after the frozen blocks, which are
        the same whatever is learned above them; None if no block is frozen."""
        return self.trunk(tokens, None, None, top=False) if self.frozen else None

    def step(self, token: Tensor, slot: Tensor, start: Tensor, span: Tensor,
             cache: KVCache) -> Tensor:
        """One token per row: token (B,) -> final hidden states (B, D).

        A row's text begins at position `start` (B,) of the cache, and this token is at `slot` (B,);
        span (n, S) is cache.span(L) with L > every slot: positions outside it are not read.
        """
        x, *where = self.step_inputs(token, slot, start, span)
        for i, block in enumerate(self.blocks):
            x = block.step(x, *where, cache, i)
        return self.norm(x)[:, 0]

    def step_inputs(self, token: Tensor, slot: Tensor, start: Tensor,
                    span: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """What a step gives its first block: x (B, 1, D), cos and sin (B, 1, 1, R/2), slot (B,), and
        which positions each row may attend to (n, B, S)."""
        position = slot - start
        cos, sin = (t[position][:, None, None] for t in (self.cos, self.sin))  # (B, 1, 1, R/2)
        span = span[:, None]
        allowed = (span >= start[:, None]) & (span <= slot[:, None])  # (n, B, S)
        return self.embed(token, position)[:, None], cos, sin, slot, allowed

    def head(self, hidden: Tensor) -> Tensor:
        """(…, D) -> logits (…, V)."""
        logits = (linear(hidden, self.embedding.weight, self.products) if self.output is None
                  else self.output(hidden))
        # Not −∞, which times a probability of 0 would be no number in an entropy.
        return logits if self.absent is None else logits.index_fill(-1, self.absent, -1e4)

    def forward(self, tokens: Tensor, mask: Tensor | None = None,
                docs: Tensor | None = None) -> Tensor:
        return self.head(self.hidden(tokens, mask, docs))

    def matrix_parameters(self) -> list[tuple[nn.Parameter, tuple[int, ...]]]:
        """The blocks' matrices: (parameter, rows of each matrix stacked in it). The optimizer Muon trains them
        (Jordan 2024, runtime/optim.py)."""
        c = self.config
        stacked = {"qkv": tuple(n * c.head_dim for n in (c.n_head, c.n_kv_head, c.n_kv_head)),
                   "gate_up": (c.d_ff, c.d_ff)}
        return [(p, stacked.get(name.split(".")[-2], (len(p),)))
                for name, p in self.blocks.named_parameters() if p.dim() == 2 and ".adapter." not in name]

    def n_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self, length: int) -> int:
        """Floating-point operations of forward and backward for one token in a row of `length`
        tokens (PaLM, appendix B).

        Six for each weight of a matrix product (the output layer and its bias included, the
        embedding look-up not), and 12 H K per layer and key; a causal row sees half of `length` on
        average.
        """
        output = self.embedding if self.output is None else self.output
        weights = [*(p for p, _ in self.matrix_parameters()), *output.parameters()]
        width = self.config.n_head * self.config.head_dim
        return 6 * sum(p.numel() for p in weights) + 12 * self.config.n_layer * width * length // 2


# ---- from logits to losses -----------------------------------------------------------------------

def log_softmax(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """log π(· | context) at a sampling temperature, in float32 whatever the logits' dtype. A
    decoder has its own, `sample.choose`."""
    return F.log_softmax(logits if temperature == 1 else logits.float() / temperature, dim=-1,
                         dtype=torch.float32)


def token_logprobs(model: Transformer, hidden: Tensor, targets: Tensor, temperature: float = 1.0,
                   train_entropy: bool = False) -> tuple[Tensor, Tensor]:
    """hidden (N, D), targets (N,) -> log-probability of each target and entropy of each
    distribution, (N,) in nats.

    The logits are computed in float32 whatever the trunk's precision: a bfloat16 logit of 10 is
    rounded by up to 0.03, as much as one update moves it. Logits of a large vocabulary never exist
    for all N tokens at once. train_entropy=False detaches the entropy.
    """
    def score(hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(hidden.device.type, enabled=False):
            logps = log_softmax(model.head(hidden.float()), temperature)  # (N, V)
        of_entropy = logps if train_entropy else logps.detach()
        return logps.gather(1, targets[:, None])[:, 0], -(of_entropy.exp() * of_entropy).sum(1)

    return row_chunks(score, len(model.output_weight), hidden, targets)


def compared_logprobs(models: Sequence[Transformer], hidden: Sequence[Tensor], targets: Tensor,
                      temperature: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """(log π, log π_ref, exact KL), each (N,), of the targets (N,) and of the distributions that
    they were drawn from: two models and their hidden states (N, D), by chunks of rows. Outside of
    autocast, so that logits are float32."""
    def score(targets: Tensor, *hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logps, ref_logps = (log_softmax(model.head(h.float()), temperature)
                            for model, h in zip(models, hidden, strict=True))
        kl = (logps.exp() * (logps - ref_logps)).sum(1)
        return *(x.gather(1, targets[:, None])[:, 0] for x in (logps, ref_logps)), kl

    return row_chunks(score, 3 * len(models[0].output_weight), targets, *hidden)


class ChunkedCrossEntropy(torch.autograd.Function):
    """Σ −log softmax(hidden @ weightᵀ + bias)[target], with gradients computed in the forward, by
    chunks.

    The logits of all positions never exist at once: each chunk's probabilities become the gradient
    p − onehot(target) in place, and are multiplied into the gradients of hidden and weight while
    they are still in the processor's cache.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor,
                chunk: int, dtype: torch.dtype, products: str) -> Tensor:
        """hidden (N, D), weight (V, D), bias (V,) or None, targets (N,) -> scalar float32.

        dtype and products: in which precision and by whose kernels matrices are multiplied.
        """
        training = any(ctx.needs_input_grad)
        total = torch.zeros((), device=hidden.device)
        grad_hidden = torch.empty_like(hidden, dtype=torch.float32)
        # A frozen output layer needs no gradient.
        grad_weight, grad_bias = (torch.zeros_like(x) if needed else None
                                  for x, needed in zip((weight, bias), ctx.needs_input_grad[1:3], strict=True))
        w, b = weight.to(dtype), None if bias is None else bias.to(dtype)
        for i in range(0, len(hidden), chunk):
            h, t = hidden[i:i + chunk].to(dtype), targets[i:i + chunk, None]
            logps = log_softmax(linear(h, w, products, b))
            total -= logps.gather(1, t).sum()
            if training:
                error = logps.exp_()
                error.scatter_add_(1, t, error.new_full(t.shape, -1.0))
                if grad_bias is not None:
                    grad_bias += error.sum(0)
                error = error.to(dtype)
                grad_hidden[i:i + chunk] = linear(error, w.T, products)
                if grad_weight is not None:
                    grad_weight += linear(error.T, h.T, products)
        ctx.save_for_backward(grad_hidden.to(hidden.dtype), grad_weight, grad_bias)
        return total

    @staticmethod
    def backward(ctx, grad: Tensor):
        grads = (None if saved is None else grad * saved for saved in ctx.saved_tensors)
        return *grads, None, None, None, None


def cross_entropy_sum(model: Transformer, hidden: Tensor, targets: Tensor,
                      chunk: int = 512) -> Tensor:
    """Maximum likelihood: Σ −log π(target | context), a scalar in nats.

    hidden (N, D): final hidden states at the positions before targets (N,).
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    weight, bias = model.output_weight, None if model.output is None else model.output.bias
    learned = [hidden, weight, bias]
    if not torch.is_grad_enabled():  # ctx.needs_input_grad would still be True
        learned = [None if t is None else t.detach() for t in learned]
    with torch.autocast(device, enabled=False):
        return ChunkedCrossEntropy.apply(*learned, targets, chunk, dtype, model.products)


def next_token_loss(model: Transformer, tokens: Tensor, targets: Tensor,
                    docs: Tensor | None) -> Tensor:
    """Mean −log π(target | tokens before it, of the same document), all (B, T); a scalar in nats."""
    hidden = model.hidden(tokens, docs=docs)
    return cross_entropy_sum(model, hidden.flatten(0, 1), targets.flatten()) / targets.numel()


# ---- checkpoints ---------------------------------------------------------------------------------

def save_checkpoint(path: str | os.PathLike, model: nn.Module, tokenizer: Tokenizer,
                    **state: Any) -> None:
    """Write everything needed to resume; the checkpoint that was there is kept beside it.

    `state` may hold tensors, numbers, strings, lists and dicts. `NotFinite`, before any file is
    touched, if a number is not finite, or a weight so large that its square is not.
    """
    path, weights = checkpoint_path(path), model.state_dict()
    for part, limit in ((weights, 2.0**63), ({"state": state}, math.inf)):
        for name, tensor in tensors_of(part):
            if not (size := largest(tensor)) < limit:
                raise NotFinite(f"{name} holds numbers of magnitude {size:g}: lower the learning rates")
    save_whole(path, {
        "kind": type(model).__name__, "config": dataclasses.asdict(model.config), "model": weights,
        "tokenizer": tokenizer.to_state(), "state": {**state, "hash": weights_hash(model)}},
        previous=previous_of(path))


def load_checkpoint(path: str | os.PathLike, device: str = "cpu", cls: type = Transformer, merged: bool = True,
                    resumes: bool = False) -> tuple[nn.Module, Tokenizer, dict[str, Any]]:
    """(model in evaluation mode, tokenizer, state) from a file or a run's folder; with its adapters (LoRA)
    merged into its weights, unless they are to learn further.

    The state is without what only a run that `resumes` needs: it would take more memory than the model.

    If the file is damaged, the one before is taken and a line says so; state["recovered"] is then
    True. A missing file, a damaged one without an older one, and one of another kind than `cls` are
    UserErrors.
    """
    path = checkpoint_path(path)
    older = previous_of(path)
    if not path.exists() and not older.exists():
        stage = path.parent.name if path.parent.name in STAGES else ""
        places = [(path.parent, "*/"), (path.parent, "*/*/"), *[(path.parent.parent, "*/")] * (not stage)]
        runs = sorted(str(p.parent) for folder, below in places for p in folder.glob(below + "checkpoint.pt"))[:6]
        make = f"make it with `python train.py {stage}` (--out and --data say where), or " * bool(stage)
        advice = f"did you mean {' or '.join(runs)}?" if runs else make + "name one of `python train.py --list`"
        raise UserError(f"{path}: no checkpoint there; {advice}")
    try:
        model, tokenizer, state = read_checkpoint(path, cls)
    except Damaged as error:
        if not older.exists():
            raise UserError(f"{error}; restore it or train it again") from error
        model, tokenizer, state = read_checkpoint(older, cls)
        state["recovered"] = True
        print(f"{error}; the one before, {older.name} of step {state.get('step')}, is used",
              file=sys.stderr)
    use_products(model, state.get("products", "aten"))  # those that its numbers were made with
    if merged:
        merge_adapters(model)
    for name in () if resumes else ("optimizers", "optimizer", "critic", "best"):
        state.pop(name, None)
    return model.to(device).eval(), tokenizer, state


def checked_state(state: Any) -> dict[str, Any]:
    """A checkpoint's state; ValueError if it has no hash, or if a part is not of its kind."""
    kinds = {"hash": str, "stage": str, "template": str, "products": str, "step": int,
             "options": dict, "parents": dict, "warnings": list, "example_prompts": list}
    state = {"hash": None, **state}
    for name, kind in kinds.items():
        if name in state and not isinstance(state[name], kind):
            raise ValueError(f"{name} is {str(state[name])[:40]!r}")
    return state


def read_checkpoint(path: pathlib.Path,
                    cls: type) -> tuple[nn.Module, Tokenizer, dict[str, Any]]:
    """(model, tokenizer, state) of one file; `Damaged` unless its parts fit each other and its numbers
    are finite. The model is built only when its weights are known to be there."""
    payload = load_whole(path)
    kind = payload.get("kind") if isinstance(payload, dict) else None
    if isinstance(kind, str) and kind != cls.__name__:
        raise UserError(f"{path}: holds a {kind}, but a {cls.__name__} is needed here; name a "
                        "stage that makes one")
    try:
        config, weights = cls.config_class(**payload["config"]), payload["model"]
        tokenizer, state = Tokenizer.from_state(payload["tokenizer"]), checked_state(payload["state"])
        if tokenizer.n_vocab != config.vocab_size:
            raise ValueError(f"a vocabulary of {tokenizer.n_vocab} tokens beside a model of "
                             f"{config.vocab_size}")
        if config.n_layer > len(weights):
            raise ValueError(f"{config.n_layer} layers, but {len(weights)} tensors")
        with torch.device("meta"):  # shapes alone: the tensors that were read become the weights
            model = cls(config)
        for name, own in model.state_dict().items():
            if weights[name].shape != own.shape:
                raise ValueError(f"{name} is of shape {(*weights[name].shape,)}, not {(*own.shape,)}")
        for name, tensor in tensors_of({"model": weights, "state": state}):
            if not largest(tensor) < math.inf:
                raise ValueError(f"{name} holds numbers that are not finite")
        add_stored_adapters(model, weights)
        model.load_state_dict({name: tensor.float() for name, tensor in weights.items()}, assign=True)
        trunk_of(model).make_tables()
        if isinstance(model, Transformer) and tokenizer.empty_ids:
            model.absent = torch.tensor(tokenizer.empty_ids)
    # load_state_dict is strict: a reward head that was not saved must not score as noise.
    except (RuntimeError, TypeError, LookupError, ValueError, AttributeError, UserError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise Damaged(f"{path}: its parts do not fit this version of Mosslet, or each other: "
                      f"{reason[:200]}") from error
    return model, tokenizer, state


# ---- what a stage starts from --------------------------------------------------------------------

def load_parent(o: Common, data: Prepared, stage: str, path: str,
                cls: type = Transformer, merged: bool = True) -> tuple[nn.Module, Tokenizer, dict[str, Any]]:
    """The checkpoint at `path`, or of this run's own `stage`; prints what it fixes for the child.

    UserError if its training is unfinished, or if --vocab_size contradicts it.
    """
    where = path or run_folder(o, stage)
    model, tokenizer, state = load_checkpoint(where, "cpu", cls, merged)
    record, c = read_config(where) or state, model.config
    if not record.get("finished", True):
        raise UserError(f"{where}: its training is not finished (step {state['step']}): go on with "
                        f"`python train.py {state['stage']} --resume` and the options that it had, "
                        "or take it as it is by the path of its checkpoint.pt")
    print(f"from {where}: {c.n_layer} layers of width {c.d_model}, at most {c.max_len} tokens, "
          f"vocabulary of {c.vocab_size}")
    for warning in state.get("warnings", ()):
        print(f"{where}: warning: {warning}", file=sys.stderr)
    differs = data.tokenizer is not None and data.tokenizer.to_state() != tokenizer.to_state()
    if "vocab_size" in o.explicit and differs:
        raise UserError(f"--vocab_size {o.vocab_size} contradicts {where}, whose own vocabulary, "
                        f"of {c.vocab_size} tokens, is used: leave it out, or pretrain again")
    return model, tokenizer, state


def open_run(stage: str, o: Common, data: Prepared, parents: dict[str, str], model: nn.Module,
             tokenizer: Tokenizer) -> Run | None:
    """A stage's run with the model to train: `model`, or the checkpoint's where the run is resumed.

    parents: hashes of the weights that the stage starts from. None if the run is finished already.
    """
    folder = RunFolder(o, stage, {"data": data.fingerprint, **parents})
    if folder.finished:
        print(f"{stage}: finished already in {folder.path}; --fresh trains it again")
        return None
    state: dict[str, Any] = {}
    if folder.resumes:
        model, tokenizer, state = load_checkpoint(folder.path, cls=type(model), merged=False, resumes=True)
    if stage != "pretrain":  # which starts from nothing: all of it learns
        learn_part(model, o, stage)
    return Run(folder, model, tokenizer, data.template, state, save_checkpoint)
