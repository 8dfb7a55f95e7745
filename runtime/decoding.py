"""Decoding's memory: packed weights for steps of a few rows, and the cache of keys and values."""
import copy
import functools
import itertools
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from runtime.products import Linear, _Choice, _library, _onednn, _reorder


class KVCache:
    """Keys and values of all tokens so far, in one tensor that is written in place: kv (2 × layers, n, B, G, S, K) of n
    blocks of S places, layer i's keys in kv[2 i], its values in kv[2 i + 1].

    A decoder that compiles nothing has one block for all places. A compiled step reads blocks of 16, as many as the
    present length needs: what it reads of a layer then lies in memory without gaps, which processors fetch a third
    faster (measured), and no two lengths in a block differ for it. One tensor and not two for each layer, because every
    tensor that a compiled step is given costs it a microsecond or more, and so does every length that may change.
    """

    BLOCK = 16

    def __init__(self, config: Any, batch: int, length: int, device: Any = "cpu", dtype: Any = torch.float32,
                 blocks: bool = False):
        # A step reads two blocks or more, and there is one that it never reads: the compiler takes a dimension of 1,
        # and one that equals another, for things that stay so.
        self.size = self.BLOCK if blocks else length
        n = max(2, -(-length // self.size)) + 1 if blocks else 1
        self.places = torch.arange(n * self.size, device=device).view(n, self.size)
        self.kv = self.of_any_length(torch.zeros(2 * config.n_layer, n, batch, config.n_kv_head, self.size,
                                                 config.head_dim, device=device, dtype=dtype), 1)
        self.spans: dict[int, Tensor] = {}  # those given so far, by number of blocks

    def of_any_length(self, tensor: Tensor, dim: int) -> Tensor:
        """Tell the compiler that this dimension may change, so that one graph serves all lengths."""
        if len(self.places) > 1:
            torch._dynamo.mark_dynamic(tensor, dim)
        return tensor

    def span(self, length: int) -> Tensor:
        """(n, S) int64: the places to read when the longest row has `length` tokens."""
        if len(self.places) == 1:
            return self.places[:, :length]
        n = max(2, -(-length // self.size))
        if n not in self.spans:
            self.spans[n] = self.of_any_length(self.places[:n], 0)
        return self.spans[n]

    def write(self, layer: int, slot: Tensor, k: Tensor, v: Tensor) -> None:
        """Put one token per row, k and v (B, G, K), at place `slot` (B,). All indices are tensors: were one a number,
        the compiler would see a write into a part, and copy the whole."""
        kv, device = self.kv, slot.device
        which = torch.arange(2 * layer, 2 * layer + 2, device=device)[:, None]  # keys, values
        row = torch.arange(len(slot), device=device)
        kv[which, slot // self.size, row, :, slot % self.size] = torch.stack((k.to(kv.dtype), v.to(kv.dtype)))

    def write_prompt(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Put k and v (B, G, T, K) at the first T places."""
        full, rest = divmod(k.shape[2], self.size)
        for cache, new in zip(self.kv[2 * layer:2 * layer + 2], (k, v), strict=True):
            cache[:full] = new[:, :, :full * self.size].unflatten(2, (full, self.size)).movedim(2, 0)
            if rest:
                cache[full, :, :, :rest] = new[:, :, full * self.size:]

    def keep(self, rows: Tensor) -> "KVCache":
        """A cache of these rows (indices) alone: finished replies need no further steps."""
        kept = copy.copy(self)
        kept.kv = self.of_any_length(self.kv[:, :, rows], 1)
        return kept

    def put(self, rows: Tensor, other: "KVCache", length: int) -> None:
        """Copy the first `length` places of another cache's rows into these rows (indices)."""
        n = -(-length // self.size)
        self.kv[:, :n, rows, :, :length] = other.kv[:, :n, :, :, :length]

_packed: dict[int, Callable[[Tensor], Tensor]] = {}  # by the layer's number, which no other layer ever gets

_numbers = itertools.count()


_library.define("packed_linear(Tensor x, int number, int n_out) -> Tensor")
_library.impl("packed_linear", lambda x, number, n_out: _packed[number](x), "CPU")


@torch.library.register_fake("mosslet::packed_linear")
def _(x: Tensor, number: int, n_out: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], n_out, dtype=torch.bfloat16 if x.dtype == torch.uint8 else x.dtype)


def _pack(weight: Tensor, rows: int) -> Callable[[Tensor], Tensor] | None:
    """A function x (rows, K) -> (rows, N) on a packed copy of weight (N, K); None: nothing beats F.linear here."""
    weight, onednn = weight.detach(), _reorder is not None
    if weight.device.type != "cpu":
        return None
    if onednn and (weight.dtype == torch.bfloat16 or _Choice.products == "onednn"):
        packed = _reorder(weight, rows)
        return lambda x: _onednn(x, packed, None, "none", [], "")
    if torch.backends.mkl.is_available() and weight.dtype == torch.float32 and rows >= 8:
        packed = torch.ops.mkl._mkl_reorder_linear_weight(weight, rows)
        return lambda x: torch.ops.mkl._mkl_linear(x, packed, weight, None, rows)
    return None


class PackedLinear(nn.Module):
    """What stands in a decoder for a Linear layer: the same product in `dtype`, for steps of `rows` rows."""

    def __init__(self, weight: Tensor, dtype: torch.dtype, rows: int):
        super().__init__()
        self.source, self.dtype, self.rows, self.n_out = [weight], dtype, rows, weight.shape[0]
        self.number = next(_numbers)
        weakref.finalize(self, _packed.pop, self.number, None)
        self.refresh()

    def refresh(self) -> None:
        """Take the weight as it is now."""
        weight = self.source[0].detach()
        self.weight = weight.to(self.dtype)
        self.packed = _packed[self.number] = _pack(self.weight, self.rows)
        self.opaque = self.packed is not None

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.dtype)
        if self.rows == 1 and torch.compiler.is_compiling():  # fused: reads weights once
            return (x[..., None, :].float() * self.weight.float()).sum(-1).to(self.dtype)
        if self.opaque:  # as a matrix: oneDNN would reshape it at a higher price
            return torch.ops.mosslet.packed_linear(x.flatten(0, -2), self.number, self.n_out).unflatten(0, x.shape[:-1])
        return F.linear(x, self.weight)


def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (M, K) -> (q (M, K) uint8, scale (M, 1) float32), where scale · (q − 128) is about x: ± 127 stands for the
    row's largest size (Dettmers 2022)."""
    scale = x.float().abs().amax(1, keepdim=True).clamp(min=1e-30) / 127
    return ((x / scale).round() + 128).to(torch.uint8), scale


def _pack_int8(weight: Tensor, scale: Tensor, few: bool) -> Callable[[Tensor], Tensor]:
    """A function on a copy of weight (N, K) int8 times scale (N,). With few rows, when time goes into reading weights,
    it takes x (M, K) bfloat16; else q (M, K) uint8, which stands for q − 128. Both give (M, N) bfloat16."""
    if few:
        half = scale.bfloat16()
        return lambda x: torch.ops.aten._weight_int8pack_mm(x, weight, half)
    onednn = getattr(torch.ops.onednn, "qlinear_pointwise", None) if _reorder is not None else None
    if onednn is None or not torch.cpu._is_vnni_supported():  # without AVX512-VNNI sums are kept in 16 bits
        whole = weight.float() * scale[:, None]
        return lambda q: F.linear(q.float() - 128, whole).bfloat16()
    packed, zero = torch.ops.onednn.qlinear_prepack(weight, None), torch.zeros(len(weight), dtype=torch.int32)
    return lambda q: onednn(q, 1.0, 128, packed, scale, zero, None, 1.0, 0, torch.bfloat16, "none", [], "")


class Int8Linear(PackedLinear):
    """A PackedLinear whose weight is rounded to 8 bits, each output's by its own scale; with 8 rows or more what it
    is multiplied with is rounded, too. More than `rows` rows at once, as most prompts have, are read in bfloat16."""

    def refresh(self) -> None:
        super().refresh()
        self.whole = self.packed or functools.partial(F.linear, weight=self.weight)
        self.few = self.rows < 8 and self.weight.shape[1] % 16 == 0  # that product reads 16 numbers at a time
        q, scale = quantise_rows(self.source[0].detach())
        self.packed = _packed[self.number] = _pack_int8((q.short() - 128).to(torch.int8), scale[:, 0], self.few)

    def forward(self, x: Tensor) -> Tensor:
        shape, x = x.shape[:-1], x.flatten(0, -2)
        if len(x) > self.rows:
            y = self.whole(x.bfloat16())
        elif self.few:
            y = torch.ops.mosslet.packed_linear(x.bfloat16(), self.number, self.n_out)
        else:
            q, scale = quantise_rows(x)
            y = (torch.ops.mosslet.packed_linear(q, self.number, self.n_out) * scale).bfloat16()
        return y.unflatten(0, shape)


def decoding_copy(model: nn.Module, dtype: torch.dtype, rows: int, compiled: bool = False) -> nn.Module:
    """The model with its tensors shared, but each Linear replaced by a PackedLinear for steps of `rows` rows. Where
    those are compiled, weights that the graph would be given one by one are shelved."""
    pack, dtype = (Int8Linear, torch.bfloat16) if dtype == torch.int8 else (PackedLinear, dtype)
    shared = {id(t): t for t in (*model.parameters(), *model.buffers())}
    with_linears = copy.deepcopy(model, shared)
    vars(with_linears).pop("trunk", None)  # a compiled one would be the model's own
    for parent in list(with_linears.modules()):
        for name, child in parent.named_children():
            if isinstance(child, Linear):
                setattr(parent, name, pack(child.weight, dtype, rows))
    if with_linears.output is None:
        with_linears.output = pack(model.output_weight, dtype, rows)
    return with_linears


def packed_layers(model: nn.Module) -> list[PackedLinear]:
    return [m for m in model.modules() if isinstance(m, PackedLinear)]


@torch.no_grad()
def refresh(model: nn.Module) -> None:
    """Let a decoding copy take the weights of its model as they are now."""
    for layer in model.modules():
        if isinstance(layer, PackedLinear):
            layer.refresh()
