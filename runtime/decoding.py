"""Decoding: the cache of keys and values, and weights packed for steps of a few rows.

A decoding step multiplies a few rows with every weight once, so it is bound by reading weights.
Packed weights are laid out for that. A compiled step refers to a packed weight by its layer's
number, outside the graph, so repacking after an update recompiles nothing.
"""
import copy
import functools
import itertools
import types
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from runtime.device import half_is_fast
from runtime.products import Linear, _library, _onednn, _reorder


def ends(tokens: Tensor, end_id: int | Sequence[int] | None) -> Tensor:
    """Which tokens, of any shape, end a text: those of one id, of any of several, or none.

    >>> ends(torch.tensor([3, 7, 9]), (7, 9)).tolist()
    [False, True, True]
    """
    several = [end_id] if isinstance(end_id, int) else end_id or [-1]  # −1 is no token
    return functools.reduce(torch.logical_or, [tokens.eq(i) for i in several])


# ---- keys and values -----------------------------------------------------------------------------

class KVCache:
    """Keys and values of all tokens so far: kv (2 × layers, n, B, G, S, K), written in place.

    n blocks of S positions; layer i's keys are kv[2 i], its values kv[2 i + 1]. An eager decoder
    has one block for all positions. A compiled step reads as many blocks of 16 as the present
    length needs: these are contiguous for a layer, which processors read a third faster (measured),
    and all lengths share one graph. Keys and values of all layers are one tensor because each input
    of a compiled step, and each dynamic size, costs about 1 µs.
    """

    BLOCK = 16

    def __init__(self, config: Any, batch: int, length: int, device: Any = "cpu",
                 dtype: Any = torch.float32, blocks: bool = False):
        # Dynamo specialises sizes that are 1 or equal to another size, so a compiled step reads
        # at least two blocks and the cache has one more than any step reads.
        self.size = self.BLOCK if blocks else length
        n = max(2, -(-length // self.size)) + 1 if blocks else 1
        self.positions = torch.arange(n * self.size, device=device).view(n, self.size)
        shape = (2 * config.n_layer, n, batch, config.n_kv_head, self.size, config.head_dim)
        self.kv = self._dynamic(torch.zeros(shape, device=device, dtype=dtype), 1)
        self.spans: dict[int, Tensor] = {}  # by number of blocks
        self.views: list[KVCache] = []  # see groups

    def _dynamic(self, tensor: Tensor, dim: int) -> Tensor:
        """Mark this dimension as dynamic, so that one graph serves all lengths."""
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
        """Put one token per row, k and v (B, G, K), at position `slot` (B,). Every index is a
        tensor: a Python int would make Inductor copy the whole cache."""
        keys_values = torch.arange(2 * layer, 2 * layer + 2, device=slot.device)[:, None]
        block, row = slot // self.size, torch.arange(len(slot), device=slot.device)
        new = torch.stack((k.to(self.kv.dtype), v.to(self.kv.dtype)))
        self.kv[keys_values, block, row, :, slot % self.size] = new

    def write_prompt(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Put k and v (B, G, T, K) at the first T positions."""
        full, partial = divmod(k.shape[2], self.size)  # full blocks, positions in the last one
        for cache, new in zip(self.kv[2 * layer:2 * layer + 2], (k, v), strict=True):
            blocks = new[:, :, :full * self.size].unflatten(2, (full, self.size))
            cache[:full] = blocks.movedim(2, 0)
            if partial:
                cache[full, :, :, :partial] = new[:, :, full * self.size:]

    def groups(self, size: int) -> "list[KVCache]":
        """A cache of each group of `size` layers: views of this one."""
        if not self.views:
            self.views = [self._with(kv) for kv in self.kv.split(2 * size)]
        return self.views

    def _with(self, kv: Tensor) -> "KVCache":
        """This cache with other keys and values. It has views of its own: a cache in a list that it holds itself
        is a reference cycle, whose memory comes free only when the garbage collector runs."""
        cache = copy.copy(self)
        cache.kv, cache.views = self._dynamic(kv, 1), []
        return cache

    def first(self, rows: int) -> "KVCache":
        """So many of the first rows alone, as a view."""
        return self._with(self.kv[:, :, :rows])

    def shrink(self, rows: Tensor) -> "KVCache":
        """These rows (indices) alone, moved together in this cache's own memory, so that its old contents are
        lost: ended replies need no further steps."""
        like = self.kv[:, :, :len(rows)]
        small = self.kv.view(-1)[:like.numel()].view_as(like)
        for new, old in zip(small, self.kv, strict=True):  # new ends before the next old begins
            new.copy_(old[:, rows])
        return self._with(small)

    def put(self, rows: Tensor, other: "KVCache", source: Tensor, length: int, at: int = 0) -> None:
        """Copy the first `length` positions of another cache's rows `source` into the rows `rows` (indices,
        both), to position `at` and those behind it; `at` is a multiple of BLOCK."""
        n, (block, at) = -(-length // other.size), divmod(at, self.size)
        for own, new in zip(self.kv, other.kv, strict=True):  # a copy of all layers' rows would take gigabytes
            own[block:block + n, rows, :, at:at + length] = new[:n, source, :, :length]


# ---- packed weights ------------------------------------------------------------------------------

# Each layer's product on its packed weight, by the layer's number, which is never used again.
_packed: dict[int, Callable[[Tensor], Tensor]] = {}
_numbers = itertools.count()

_library.define("packed_linear(Tensor x, int number, int n_out) -> Tensor")
_library.impl("packed_linear", lambda x, number, n_out: _packed[number](x), "CPU")
# The number as an input of the graph, not a constant in it: one graph then serves several layers.
_library.define("packed_linear.shared(Tensor x, Tensor number, int n_out) -> Tensor")
_library.impl("packed_linear.shared", lambda x, number, n_out: _packed[int(number)](x), "CPU")


@torch.library.register_fake("mosslet::packed_linear.shared")
@torch.library.register_fake("mosslet::packed_linear")
def _(x: Tensor, number: int | Tensor, n_out: int) -> Tensor:
    dtype = torch.bfloat16 if x.dtype == torch.uint8 else x.dtype
    return x.new_empty(*x.shape[:-1], n_out, dtype=dtype)


def packed_product(weight: Tensor, rows: int,
                   products: str = "aten") -> Callable[[Tensor], Tensor] | None:
    """A function x (rows, K) -> (rows, N) on a packed copy of weight (N, K); None where nothing is
    faster than F.linear."""
    weight = weight.detach()
    if weight.device.type != "cpu":
        return None
    half = weight.dtype == torch.bfloat16  # without 512-bit vectors oneDNN refuses to pack it
    if _reorder is not None and (half_is_fast("cpu") if half else products == "onednn"):
        packed = _reorder(weight, rows)
        return lambda x: _onednn(x, packed, None, "none", [], "")
    if torch.backends.mkl.is_available() and weight.dtype == torch.float32 and rows >= 8:
        packed = torch.ops.mkl._mkl_reorder_linear_weight(weight, rows)
        return lambda x: torch.ops.mkl._mkl_linear(x, packed, weight, None, rows)
    return None


class PackedLinear(nn.Module):
    """A decoder's stand-in for a Linear layer: the same product in `dtype`, for steps of `rows`
    rows, and its bias, if it has one."""

    def __init__(self, weight: Tensor, dtype: torch.dtype, rows: int, products: str = "aten",
                 bias: Tensor | None = None, adapter: nn.Module | None = None):
        super().__init__()
        self.adapter = [adapter]  # in a list, as weight and bias are: they belong to the model
        self.source, self.dtype, self.rows, self.n_out = [weight, bias], dtype, rows, len(weight)
        self.products, self.number = products, next(_numbers)
        self.index: int | Tensor = self.number  # a tensor where layers share a graph
        weakref.finalize(self, _packed.pop, self.number, None)
        self.refresh()

    def present(self) -> Tensor:
        """(n_out, n_in): the weight as it is now, with its adapter in it."""
        weight, adapter = self.source[0].detach(), self.adapter[0]
        return weight if adapter is None else weight + adapter.delta().detach()

    def refresh(self) -> None:
        """Pack the weight as it is now."""
        bias = self.source[1]
        self.weight = self.present().to(self.dtype)
        self.bias = None if bias is None else bias.detach().to(self.dtype)
        self.product = _packed[self.number] = packed_product(self.weight, self.rows, self.products)
        self.is_packed = self.product is not None
        # One compiled row is memory-bound: a fused multiply-and-sum reads the weight once.
        self.fuses = self.rows == 1 and self.weight.device.type == "cpu"

    def forward(self, x: Tensor) -> Tensor:
        y = self.multiply(x)
        return y if self.bias is None else y + self.bias

    def multiply(self, x: Tensor) -> Tensor:
        """x (…, K) -> (…, N), without the bias."""
        x = x.to(self.dtype)
        if self.fuses and torch.compiler.is_dynamo_compiling():
            return (x[..., None, :].float() * self.weight.float()).sum(-1).to(self.dtype)
        if self.is_packed:  # flattened here, which costs less than oneDNN's own reshape
            y = torch.ops.mosslet.packed_linear(x.flatten(0, -2), self.index, self.n_out)
            return y.unflatten(0, x.shape[:-1])
        return F.linear(x, self.weight)


def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (M, K) -> (q (M, K) uint8, scale (M, 1) float32): x ≈ scale · (q − 128), |q − 128| ≤ 127
    (Dettmers 2022)."""
    scale = x.float().abs().amax(1, keepdim=True).clamp(min=1e-30) / 127
    return ((x / scale).round() + 128).to(torch.uint8), scale


def int8_product(weight: Tensor, scale: Tensor, few_rows: bool) -> Callable[[Tensor], Tensor]:
    """A function that multiplies by the weight scale (N,) · weight (N, K) int8, -> (M, N) bfloat16.

    few_rows: it takes x (M, K) bfloat16, because such steps are bound by reading weights; otherwise
    q (M, K) uint8, which represents q − 128.
    """
    if few_rows:
        half_scale = scale.bfloat16()
        return lambda x: torch.ops.aten._weight_int8pack_mm(x, weight, half_scale)
    onednn = getattr(torch.ops.onednn, "qlinear_pointwise", None) if _reorder is not None else None
    # Without AVX512-VNNI, oneDNN's 16-bit sums overflow.
    if onednn is None or not torch.cpu._is_vnni_supported():
        dequantised = weight.float() * scale[:, None]
        return lambda q: F.linear(q.float() - 128, dequantised).bfloat16()
    packed = torch.ops.onednn.qlinear_prepack(weight, None)
    zero = torch.zeros(len(weight), dtype=torch.int32)
    return lambda q: onednn(q, 1.0, 128, packed, scale, zero, None, 1.0, 0, torch.bfloat16,
                            "none", [], "")


class Int8Linear(PackedLinear):
    """A PackedLinear with 8-bit weights, one scale per output. From 8 rows on, inputs are rounded
    to 8 bits, too. More than `rows` rows at once (most prompts) are multiplied in bfloat16, or in
    float32 where that is faster."""

    def refresh(self) -> None:
        super().refresh()
        self.many_rows = self.product or self.plain_product
        # _weight_int8pack_mm reads 16 numbers at a time.
        self.few_rows = self.rows < 8 and self.weight.shape[1] % 16 == 0
        q, scale = quantise_rows(self.present())
        self.signed, self.half_scale = (q.short() - 128).to(torch.int8), scale[:, 0].bfloat16()
        self.product = _packed[self.number] = int8_product(self.signed, scale[:, 0], self.few_rows)

    def plain_product(self, x: Tensor) -> Tensor:
        if half_is_fast(x.device.type):
            return F.linear(x, self.weight)
        return F.linear(x.float(), self.source[0].float()).bfloat16()

    def multiply(self, x: Tensor) -> Tensor:
        shape, x = x.shape[:-1], x.flatten(0, -2)
        if len(x) > self.rows:
            y = self.many_rows(x.bfloat16())
        elif self.few_rows and torch.compiler.is_dynamo_compiling():  # called from the graph, not from Python
            y = torch.ops.aten._weight_int8pack_mm(x.bfloat16(), self.signed, self.half_scale)
        elif self.few_rows:
            y = torch.ops.mosslet.packed_linear(x.bfloat16(), self.index, self.n_out)
        else:
            q, scale = quantise_rows(x)
            y = (torch.ops.mosslet.packed_linear(q, self.index, self.n_out) * scale).bfloat16()
        return y.unflatten(0, shape)


def decoding_copy(model: nn.Module, dtype: torch.dtype, rows: int,
                  layered: bool = False) -> nn.Module:
    """A copy that shares the model's tensors, each Linear replaced by a PackedLinear for steps of
    `rows` rows. layered: groups of its blocks will share one compiled graph."""
    pack, dtype = (Int8Linear, torch.bfloat16) if dtype == torch.int8 else (PackedLinear, dtype)
    shared = {id(t): t for t in (*model.parameters(), *model.buffers())}
    packed = copy.deepcopy(model, shared)
    vars(packed).pop("trunk", None)  # a compiled trunk would run the original's layers
    for parent in list(packed.modules()):
        for name, child in parent.named_children():
            if isinstance(child, Linear):
                setattr(parent, name, pack(child.weight, dtype, rows, child.products, child.bias, child.adapter))
    if packed.output is None:
        packed.output = pack(model.output_weight, dtype, rows, model.products)
    for layer in packed_layers(packed.blocks) if layered else ():
        layer.index = torch.tensor(layer.number)
    return packed


def packed_layers(model: nn.Module) -> list[PackedLinear]:
    """The packed layers of a decoding copy; none of any other model."""
    return [module for module in model.modules() if isinstance(module, PackedLinear)]


@torch.no_grad()
def refresh(model: nn.Module) -> None:
    """Repack a decoding copy from its model's present weights."""
    for layer in packed_layers(model):
        layer.refresh()


# ---- compiled steps ------------------------------------------------------------------------------

_step_numbers = itertools.count()  # each compiled function has a name of its own


def compiled(function: Callable, device: torch.device) -> Callable:
    """A step's function, or a part of one, compiled for one number of rows and all lengths.

    It has its own code object, so on a CPU no guard is checked at every token: a decoder and its
    key for a step fix all that they would check. (On a GPU guards also ensure that 32-bit indices
    suffice.) On a CPU kernels are called from C++, not Python.
    """
    options = {}
    if device.type == "cpu":
        options = {"cpp_wrapper": True, "memory_planning": True, "size_asserts": False}
        if skip := getattr(torch.compiler, "skip_all_guards_unsafe", None):
            options["guard_filter_fn"] = skip
    # Dynamo remembers dynamic sizes by a function's name, across models.
    code = function.__code__.replace(co_name=f"{function.__name__}_{next(_step_numbers)}")
    return torch.compile(types.FunctionType(code, function.__globals__), options=options)


def first_part(model: nn.Module, token: Tensor, slot: Tensor, start: Tensor,
               span: Tensor) -> tuple[Tensor, ...]:
    return model.step_inputs(token, slot, start, span)


def group_part(blocks: Sequence[nn.Module], x: Tensor, cos: Tensor, sin: Tensor, slot: Tensor,
               allowed: Tensor, cache: KVCache) -> Tensor:
    for i, block in enumerate(blocks):
        x = block.step(x, cos, sin, slot, allowed, cache, i)
    return x


class LayeredStep:
    """A deep model's step as three graphs: what comes before the blocks, a group of `size` blocks
    (see `runtime.device.layers_compiled`), and what comes after them.

    The group's graph is compiled for the first group and called for each: its weights, the numbers
    of its packed layers and its keys and values are inputs, and no guard is checked.
    """

    def __init__(self, last_part: Callable, size: int, device: torch.device):
        """last_part: (model, what the last block gives, *more) -> the step's result."""
        self.size = size
        self.first, self.group, self.last = (compiled(part, device) for part in (
            first_part, group_part, last_part))
        self.is_compiled = False

    def __call__(self, model: nn.Module, token: Tensor, slot: Tensor, start: Tensor,
                 cache: KVCache, span: Tensor, *more: Any) -> Any:
        x, *inputs = self.first(model, token, slot, start, span)
        if not self.is_compiled:
            torch._dynamo.mark_dynamic(inputs[-1], 0)  # `allowed`, whose blocks grow in number
            self.is_compiled = True
        blocks = list(model.blocks)
        for i, layers in enumerate(cache.groups(self.size)):
            x = self.group(blocks[i * self.size:(i + 1) * self.size], x, *inputs, layers)
        return self.last(model, x, *more)
