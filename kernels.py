"""Matrix products as this processor does them best, and whether torch.compile pays: the one place for such knowledge.

Everything here has a plain fall-back that computes the same. On some processors (AMD's, for example) the float32
products behind `F.linear` reach less than half of what oneDNN's reach, which PyTorch ships, too; so training asks, by
measuring, which is faster (`pick_products`), and decoding packs its weights once per rollout (`PackedLinear`). Names of
oneDNN operators are private to PyTorch: where one is missing, `F.linear` is used.
"""
import copy
import functools
import math
import os
import shutil
import sysconfig
import time
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

_onednn = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None
_reorder = getattr(torch.ops.mkldnn, "_reorder_linear_weight", None) if _onednn is not None else None


# ---- float32 products of training ------------------------------------------------------------------------------------

_library = torch.library.Library("mosslet", "FRAGMENT")
_library.define("product(Tensor a, Tensor b) -> Tensor")
_library.impl("product", lambda a, b: _onednn(a, b, None, "none", [], ""), "CPU")
_product = torch.ops.mosslet.product  # a (…, K) @ b (N, K)ᵀ by oneDNN, whatever their strides; opaque to the compiler


@torch.library.register_fake("mosslet::product")
def _(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty(*a.shape[:-1], b.shape[0])


class _Linear(torch.autograd.Function):
    """x (…, K), w (N, K) -> x wᵀ (…, N), with both gradients by the same kernels."""

    @staticmethod
    def forward(ctx, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return _product(x, w)

    @staticmethod
    def backward(ctx, g: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, w = ctx.saved_tensors
        g = g.contiguous()
        grad_x = _product(g, w.t()) if ctx.needs_input_grad[0] else None
        return grad_x, _weight_gradient(g.flatten(0, -2), x.flatten(0, -2)) if ctx.needs_input_grad[1] else None


def _weight_gradient(g: Tensor, x: Tensor) -> Tensor:
    """gᵀ x of g (M, N), x (M, K) -> (N, K). What stands first in a product is copied when it is transposed, so that
    should be the narrower one."""
    return _product(g.t(), x.t()) if g.shape[1] <= x.shape[1] else _product(x.t(), g.t()).t().contiguous()


class _Choice:
    """What `linear` uses for float32 on CPU: "aten" (F.linear) or "onednn". Set once, before a run's first product."""

    products = "aten"


def use_products(name: str) -> None:
    _Choice.products = name if _onednn is not None else "aten"


def products() -> str:
    return _Choice.products


def pick_products(device: str, width: int, rows: int = 1024, repeats: int = 7) -> tuple[str, str]:
    """("aten" or "onednn", why): whose float32 products are faster here, by measuring rows x width x 4·width."""
    if device != "cpu" or _onednn is None or width < 128:
        return "aten", "nothing to choose at this width or on this device"
    x, w = torch.randn(rows, width), torch.randn(4 * width, width)
    best = {F.linear: math.inf, _product: math.inf}
    for _ in range(repeats):  # in turns, and the best of each, so that what else the machine does favours neither
        for multiply in best:
            start = time.perf_counter()
            multiply(x, w)
            best[multiply] = min(best[multiply], time.perf_counter() - start)
    aten, onednn = best.values()
    return ("onednn" if onednn < 0.9 * aten else "aten"), (f"a {rows}x{width}x{4 * width} product takes "
                                                           f"{1e3 * aten:.2f} ms by F.linear, {1e3 * onednn:.2f} by "
                                                           "oneDNN")


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x (…, K), weight (N, K) -> (…, N), as F.linear."""
    if (_Choice.products == "onednn" and x.dtype == weight.dtype == torch.float32 and x.device.type == "cpu"
            and not torch.is_autocast_enabled("cpu")):
        learning = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
        return _Linear.apply(x, weight) if learning else _product(x, weight)
    return F.linear(x, weight)


class Linear(nn.Linear):
    """nn.Linear without bias, by `linear`."""

    def __init__(self, n_in: int, n_out: int):
        super().__init__(n_in, n_out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight)


class _RMSNorm(torch.autograd.Function):
    """y = n w with n = x / sqrt(mean x² + ε), over the last dimension: x (…, D), w (D,). Where g is the gradient of y,

        ∂x = (g w − n · mean(g w n)) / sqrt(mean x² + ε),        ∂w = Σ g n.
    """

    @staticmethod
    def forward(ctx, x: Tensor, w: Tensor, eps: float) -> Tensor:
        inverse = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, w, inverse)
        return (x * inverse).mul_(w)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, w, inverse = ctx.saved_tensors
        n = x * inverse
        gn = g * n
        mean = (gn @ w).unsqueeze(-1).div_(x.shape[-1])
        grad_w = gn.flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        return torch.addcmul(g * w, n, mean, value=-1).mul_(inverse), grad_w, None


class RMSNorm(nn.RMSNorm):
    """nn.RMSNorm, on a CPU in fewer passes over memory: PyTorch composes its own there from separate operations."""

    shelf: Tensor | None = None  # see `shelve`

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():  # the compiler fuses it itself
            weight = self.weight if self.shelf is None else shelved(self)
            return F.rms_norm(x, self.normalized_shape, weight, self.eps)
        if x.device.type != "cpu" or x.dtype != torch.float32:  # a GPU has one kernel for it
            return super().forward(x)
        return _RMSNorm.apply(x, self.weight, self.eps)


# ---- products of decoding --------------------------------------------------------------------------------------------
# One step multiplies a few rows with every weight once, so what counts is how fast weights are read. Packed ones are
# blocked for that. They are found through a list and a number, outside the compiled graph: packing anew after an update
# therefore compiles nothing.

_packed: list[Callable[[Tensor], Tensor]] = []
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


def shelve(layers: Sequence[nn.Module]) -> None:
    """Lay these layers' weights one after another in one tensor. A compiled step then is given that instead of them,
    each of which costs it a microsecond or more at every token."""
    shelf, end = torch.cat([layer.weight.detach().flatten() for layer in layers]), 0
    for layer in layers:
        start, end = end, end + layer.weight.numel()
        layer.shelf, layer.place = shelf, (start, end, tuple(layer.weight.shape))


def shelved(layer: nn.Module) -> Tensor:
    """The layer's weight on the shelf."""
    start, end, shape = layer.place
    return layer.shelf[start:end].view(shape)


class PackedLinear(nn.Module):
    """What stands in a decoder for a Linear layer: the same product in `dtype`, for steps of `rows` rows."""

    shelf: Tensor | None = None  # see `shelve`; there is one on a CPU, where a compiled step is of one row

    number = 0  # of its packed weight, in the list above

    def __init__(self, weight: Tensor, dtype: torch.dtype, rows: int):
        super().__init__()
        self.source, self.dtype, self.rows, self.n_out = [weight], dtype, rows, weight.shape[0]
        self.refresh()

    def refresh(self) -> None:
        """Take the weight as it is now."""
        weight = self.source[0].detach()
        self.weight = weight.to(self.dtype) if self.shelf is None else shelved(self).copy_(weight)
        self.packed = _pack(self.weight, self.rows)
        self.opaque = self.packed is not None

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.dtype)
        if self.shelf is not None and torch.compiler.is_compiling():  # fused: reads weights once
            return (x[..., None, :].float() * shelved(self).float()).sum(-1).to(self.dtype)
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
        self.packed = _pack_int8((q.short() - 128).to(torch.int8), scale[:, 0], self.few)

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
    for number, layer in enumerate(packed_layers(with_linears)):  # in the order of `activate`
        layer.number = number
    if compiled:
        shelve([m for m in with_linears.modules() if isinstance(m, RMSNorm)])
        if rows == 1 and pack is PackedLinear and model.output_weight.device.type == "cpu":
            shelve(packed_layers(with_linears))
            refresh(with_linears)  # let go of the weights that were copied
    return with_linears


def packed_layers(model: nn.Module) -> list[PackedLinear]:
    return [m for m in model.modules() if isinstance(m, PackedLinear)]


@torch.no_grad()
def refresh(model: nn.Module) -> None:
    """Let a decoding copy take the weights of its model as they are now."""
    for layer in model.modules():
        if isinstance(layer, PackedLinear):
            layer.refresh()
        elif isinstance(layer, RMSNorm) and layer.shelf is not None:
            shelved(layer).copy_(layer.weight)


def activate(model: nn.Module) -> None:
    """From now on packed products are those of this decoding copy."""
    _packed[:] = [layer.packed for layer in packed_layers(model)]


# ---- memory ----------------------------------------------------------------------------------------------------------

NUMBERS_AT_ONCE = {"cpu": 2**26, "mps": 2**26, "cuda": 2**28}  # in float32 a quarter of a GiB, or one, for an array


def in_pieces(function: Callable[..., tuple[Tensor, ...]], numbers: int, *rows: Tensor) -> tuple[Tensor, ...]:
    """function(*rows), where the function treats each row by itself and holds so many numbers for each in between.
    Above NUMBERS_AT_ONCE in all, one piece of the rows is done after another, and a backward computes each piece anew,
    so that they are never all held at once: that costs the time of one more forward."""
    size = max(1, NUMBERS_AT_ONCE[rows[0].device.type] // numbers)
    if len(rows[0]) <= size:
        return function(*rows)
    parts = [checkpoint(function, *piece, use_reentrant=False, preserve_rng_state=False)
             for piece in zip(*(x.split(size) for x in rows), strict=True)]
    return tuple(torch.cat(part) for part in zip(*parts, strict=True))


# ---- whether to compile ----------------------------------------------------------------------------------------------

COMPILE_FROM = {"cpu": 300.0, "cuda": 120.0}  # seconds of work ahead; it saves some 15 % on a CPU and takes 15 to 40 s


@functools.lru_cache(maxsize=2)
def compiler_fault(device: str = "cpu") -> str:
    """What keeps torch.compile from working here, in one line; empty where it works. Tries it on a small function."""
    compiler, headers = os.environ.get("CXX", "g++"), sysconfig.get_paths()["include"]
    if shutil.which(compiler) is None:
        return f"there is no C++ compiler ({compiler}): install g++, or name yours in the variable CXX"
    if not os.path.exists(os.path.join(headers, "Python.h")):
        return f"Python's headers are not in {headers}: install them (Debian: python3-dev)"
    try:
        x = torch.arange(4096.0, device=device)
        fine = torch.equal(torch.compile(lambda x: 2 * x + 1)(x), 2 * x + 1)
        return "" if fine else "torch.compile computes something else than was asked for"
    except Exception as error:  # whatever the compiler, the linker or triton say
        said = str(error)
        if "omp.h" in said or "gomp" in said or "fopenmp" in said:
            return "OpenMP is missing: install libgomp (with clang: libomp-dev)"
        lines = [line for line in said.splitlines() if line.strip()]
        return f"it fails with {type(error).__name__}: {lines[0][:150] if lines else ''}"


def compile_pays(asked: str, device: str, seconds_ahead: float) -> tuple[bool, str]:
    """(compile?, why) for `--compile on` or `auto`, when about so many seconds of work lie ahead."""
    least = COMPILE_FROM.get(device, math.inf)
    if asked == "auto" and seconds_ahead < least:
        return False, f"about {seconds_ahead:.0f} s lie ahead; compiling pays from {least:.0f} on"
    if fault := compiler_fault(device):
        return False, f"torch.compile does not work here, so everything runs eagerly: {fault}"
    return True, "as asked" if asked == "on" else f"about {seconds_ahead:.0f} s lie ahead"


def compile_trunks(*models: nn.Module) -> None:
    """Compile the part that all stages share. Models of one shape share its graphs, whatever their weights; the number
    of rows, their length and the number of chosen positions may change freely."""
    torch._dynamo.config.cache_size_limit = max(64, torch._dynamo.config.cache_size_limit)
    for model in models:
        if "trunk" not in vars(model):  # else it is compiled already
            model.trunk = torch.compile(model.trunk, dynamic=True)
