"""What decoding keeps: the cache of keys and values, and weights packed for steps of a few rows.

One decoding step multiplies a few rows with every weight once, so its time is that of reading
weights. Packed weights are laid out for that. A compiled step refers to a packed weight by its
layer's number, outside the graph, so packing anew after an update compiles nothing.
"""
import copy
import functools
import itertools
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from runtime.products import Linear, _library, _onednn, _reorder


# ---- keys and values -----------------------------------------------------------------------------

class KVCache:
    """Keys and values of all tokens so far, in one tensor that is written in place: kv (2 × layers,
    n, B, G, S, K) of n blocks of S positions; layer i's keys are kv[2 i], its values kv[2 i + 1].

    An eager decoder has one block for all positions. A compiled step reads blocks of 16, as many as
    the present length needs: what it reads of a layer is contiguous, which processors fetch a third
    faster (measured), and all lengths in a block share one graph. Keys and values of all layers are
    one tensor because each input of a compiled step, and each dynamic size, costs about 1 µs.
    """

    BLOCK = 16

    def __init__(self, config: Any, batch: int, length: int, device: Any = "cpu",
                 dtype: Any = torch.float32, blocks: bool = False):
        # A step reads at least two blocks, and there is one that it never reads: the compiler
        # specialises on a dimension of 1, and on two dimensions that are equal.
        self.size = self.BLOCK if blocks else length
        n = max(2, -(-length // self.size)) + 1 if blocks else 1
        self.positions = torch.arange(n * self.size, device=device).view(n, self.size)
        self.kv = self._dynamic(torch.zeros(2 * config.n_layer, n, batch, config.n_kv_head,
                                            self.size, config.head_dim,
                                            device=device, dtype=dtype), 1)
        self.spans: dict[int, Tensor] = {}  # by number of blocks

    def _dynamic(self, tensor: Tensor, dim: int) -> Tensor:
        """Tell the compiler that this dimension changes, so that one graph serves all lengths."""
        if len(self.positions) > 1:
            torch._dynamo.mark_dynamic(tensor, dim)
        return tensor

    def span(self, length: int) -> Tensor:
        """(n, S) int64: the positions to read when the longest row has `length` tokens."""
        if len(self.positions) == 1:
            return self.positions[:, :length]
        n = max(2, -(-length // self.size))
        if n not in self.spans:
            self.spans[n] = self._dynamic(self.positions[:n], 0)
        return self.spans[n]

    def write(self, layer: int, slot: Tensor, k: Tensor, v: Tensor) -> None:
        """Put one token per row, k and v (B, G, K), at position `slot` (B,). All indices are
        tensors: with a number among them the compiler would copy the whole cache."""
        kv, device = self.kv, slot.device
        keys_values = torch.arange(2 * layer, 2 * layer + 2, device=device)[:, None]
        row = torch.arange(len(slot), device=device)
        kv[keys_values, slot // self.size, row, :, slot % self.size] = torch.stack((k.to(kv.dtype),
                                                                                    v.to(kv.dtype)))

    def write_prompt(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Put k and v (B, G, T, K) at the first T positions."""
        full, rest = divmod(k.shape[2], self.size)
        for cache, new in zip(self.kv[2 * layer:2 * layer + 2], (k, v), strict=True):
            cache[:full] = new[:, :, :full * self.size].unflatten(2, (full, self.size)).movedim(2,
                                                                                                0)
            if rest:
                cache[full, :, :, :rest] = new[:, :, full * self.size:]

    def keep(self, rows: Tensor) -> "KVCache":
        """A cache of these rows (indices) alone: ended replies need no further steps."""
        cache = copy.copy(self)
        cache.kv = self._dynamic(self.kv[:, :, rows], 1)
        return cache

    def put(self, rows: Tensor, other: "KVCache", length: int) -> None:
        """Copy the first `length` positions of another cache's rows into these rows (indices)."""
        n = -(-length // self.size)
        self.kv[:, :n, rows, :, :length] = other.kv[:, :n, :, :, :length]


# ---- packed weights ------------------------------------------------------------------------------

# products by a layer's number, which no other layer ever gets
_packed: dict[int, Callable[[Tensor], Tensor]] = {}
_numbers = itertools.count()

_library.define("packed_linear(Tensor x, int number, int n_out) -> Tensor")
_library.impl("packed_linear", lambda x, number, n_out: _packed[number](x), "CPU")


@torch.library.register_fake("mosslet::packed_linear")
def _(x: Tensor, number: int, n_out: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], n_out, dtype=torch.bfloat16 if x.dtype == torch.uint8
                       else x.dtype)


def packed_product(weight: Tensor, rows: int, products: str = "aten") -> Callable[[Tensor],
                                                                                  Tensor] | None:
    """A function x (rows, K) -> (rows, N) on a packed copy of weight (N, K); None if nothing beats
    F.linear here."""
    weight = weight.detach()
    if weight.device.type != "cpu":
        return None
    if _reorder is not None and (weight.dtype == torch.bfloat16 or products == "onednn"):
        packed = _reorder(weight, rows)
        return lambda x: _onednn(x, packed, None, "none", [], "")
    if torch.backends.mkl.is_available() and weight.dtype == torch.float32 and rows >= 8:
        packed = torch.ops.mkl._mkl_reorder_linear_weight(weight, rows)
        return lambda x: torch.ops.mkl._mkl_linear(x, packed, weight, None, rows)
    return None


class PackedLinear(nn.Module):
    """A decoder's stand-in for a Linear layer: the same product in `dtype`, for steps of `rows`
    rows."""

    def __init__(self, weight: Tensor, dtype: torch.dtype, rows: int, products: str = "aten"):
        super().__init__()
        self.source, self.dtype, self.rows, self.n_out = [weight], dtype, rows, weight.shape[0]
        self.products, self.number = products, next(_numbers)
        weakref.finalize(self, _packed.pop, self.number, None)
        self.refresh()

    def refresh(self) -> None:
        """Pack the weight as it is now."""
        self.weight = self.source[0].detach().to(self.dtype)
        self.product = _packed[self.number] = packed_product(self.weight, self.rows, self.products)
        self.is_packed = self.product is not None
        # One compiled row is memory-bound: a product and a sum, fused, read the weight once.
        self.fuses = self.rows == 1 and self.weight.device.type == "cpu"

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.dtype)
        if self.fuses and torch.compiler.is_compiling():
            return (x[..., None, :].float() * self.weight.float()).sum(-1).to(self.dtype)
        if self.is_packed:  # as a matrix: oneDNN would reshape it at a higher price
            return torch.ops.mosslet.packed_linear(x.flatten(0, -2), self.number,
                                                   self.n_out).unflatten(0, x.shape[:-1])
        return F.linear(x, self.weight)


def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (M, K) -> (q (M, K) uint8, scale (M, 1) float32) with x ≈ scale · (q − 128); q − 128 is
    within ± 127 (Dettmers 2022)."""
    scale = x.float().abs().amax(1, keepdim=True).clamp(min=1e-30) / 127
    return ((x / scale).round() + 128).to(torch.uint8), scale


def int8_product(weight: Tensor, scale: Tensor, few_rows: bool) -> Callable[[Tensor], Tensor]:
    """A function on a copy of weight (N, K) int8 times scale (N,), which returns (M, N) bfloat16.

    With few rows, when time goes into reading weights, it takes x (M, K) bfloat16; else q (M, K)
    uint8, which stands for q − 128.
    """
    if few_rows:
        half_scale = scale.bfloat16()
        return lambda x: torch.ops.aten._weight_int8pack_mm(x, weight, half_scale)
    onednn = getattr(torch.ops.onednn, "qlinear_pointwise", None) if _reorder is not None else None
    # without AVX512-VNNI sums overflow 16 bits
    if onednn is None or not torch.cpu._is_vnni_supported():
        dequantised = weight.float() * scale[:, None]
        return lambda q: F.linear(q.float() - 128, dequantised).bfloat16()
    packed, zero = torch.ops.onednn.qlinear_prepack(weight, None), torch.zeros(len(weight),
                                                                               dtype=torch.int32)
    return lambda q: onednn(q, 1.0, 128, packed, scale, zero, None, 1.0, 0, torch.bfloat16, "none",
                            [], "")


class Int8Linear(PackedLinear):
    """A PackedLinear whose weight is rounded to 8 bits, each output by its own scale; from 8 rows
    on its input is rounded, too. More than `rows` rows at once, as most prompts have, are read in
    bfloat16."""

    def refresh(self) -> None:
        super().refresh()
        self.many_rows = self.product or functools.partial(F.linear, weight=self.weight)
        # that product reads 16 numbers at a time
        self.few_rows = self.rows < 8 and self.weight.shape[1] % 16 == 0
        q, scale = quantise_rows(self.source[0].detach())
        self.product = _packed[self.number] = int8_product((q.short() - 128).to(torch.int8),
                                                           scale[:, 0], self.few_rows)

    def forward(self, x: Tensor) -> Tensor:
        shape, x = x.shape[:-1], x.flatten(0, -2)
        if len(x) > self.rows:
            y = self.many_rows(x.bfloat16())
        elif self.few_rows:
            y = torch.ops.mosslet.packed_linear(x.bfloat16(), self.number, self.n_out)
        else:
            q, scale = quantise_rows(x)
            y = (torch.ops.mosslet.packed_linear(q, self.number, self.n_out) * scale).bfloat16()
        return y.unflatten(0, shape)


def decoding_copy(model: nn.Module, dtype: torch.dtype, rows: int) -> nn.Module:
    """The model with its tensors shared, but each Linear replaced by a PackedLinear for steps of
    `rows` rows."""
    pack, dtype = (Int8Linear, torch.bfloat16) if dtype == torch.int8 else (PackedLinear, dtype)
    shared = {id(t): t for t in (*model.parameters(), *model.buffers())}
    packed = copy.deepcopy(model, shared)
    vars(packed).pop("trunk", None)  # a compiled one would be the model's own
    for parent in list(packed.modules()):
        for name, child in parent.named_children():
            if isinstance(child, Linear):
                setattr(parent, name, pack(child.weight, dtype, rows, child.products))
    if packed.output is None:
        packed.output = pack(model.output_weight, dtype, rows, model.products)
    return packed


def packed_layers(model: nn.Module) -> list[PackedLinear]:
    return [module for module in model.modules() if isinstance(module, PackedLinear)]


@torch.no_grad()
def refresh(model: nn.Module) -> None:
    """Let a decoding copy take its model's weights as they are now."""
    for layer in packed_layers(model):
        layer.refresh()
