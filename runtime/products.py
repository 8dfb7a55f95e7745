"""Linear layers and norms in the forms that are fast on this processor.

On some processors (AMD's, for example) the float32 products behind `F.linear` reach less than half
the speed of oneDNN's, which PyTorch also ships. A run therefore measures which is faster
(`pick_products`) and sets its models to it (`use_products`). Everything here has a plain fallback
that computes the same. The names of oneDNN's operators are private to PyTorch: if one is missing,
`F.linear` is used.
"""
import math
import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_onednn = _reorder = None
if torch.backends.mkldnn.is_available():
    _onednn = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
if _onednn is not None:
    _reorder = getattr(torch.ops.mkldnn, "_reorder_linear_weight", None)


# ---- float32 products of training ----------------------------------------------------------------

_library = torch.library.Library("mosslet", "FRAGMENT")
_library.define("product(Tensor a, Tensor b) -> Tensor")
_library.impl("product", lambda a, b: _onednn(a, b, None, "none", [], ""), "CPU")
# a (…, K) @ b (N, K)ᵀ by oneDNN, whatever their strides; opaque to the compiler
_product = torch.ops.mosslet.product


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
        g, grad_x, grad_w = g.contiguous(), None, None
        if ctx.needs_input_grad[0]:
            grad_x = _product(g, w.t())
        if ctx.needs_input_grad[1]:
            grad_w = _weight_gradient(g.flatten(0, -2), x.flatten(0, -2))
        return grad_x, grad_w


def _weight_gradient(g: Tensor, x: Tensor) -> Tensor:
    """gᵀ x of g (M, N), x (M, K) -> (N, K). oneDNN copies a transposed left operand, so the
    narrower matrix is put on the left."""
    if g.shape[1] <= x.shape[1]:
        return _product(g.t(), x.t())
    return _product(x.t(), g.t()).t().contiguous()


def use_products(model: nn.Module, name: str) -> None:
    """Set whose kernels this model's layers use for float32 products on a CPU: "aten" or "onednn".

    The choice belongs to the layers, so no other model changes. Without oneDNN it is "aten".
    """
    for module in model.modules():
        if hasattr(module, "products"):
            module.products = name if _onednn is not None else "aten"


def pick_products(device: str, width: int, rows: int = 1024, repeats: int = 7) -> tuple[str, str]:
    """("aten" or "onednn", why): whose float32 products are faster here, by measuring rows x width
    x 4·width."""
    if device != "cpu" or _onednn is None or width < 128:
        return "aten", "nothing to choose at this width or on this device"
    x, w = torch.randn(rows, width), torch.randn(4 * width, width)
    best = {F.linear: math.inf, _product: math.inf}
    # In turns, and the best of each, so that other load on the machine favours neither.
    for _ in range(repeats):
        for multiply in best:
            start = time.perf_counter()
            multiply(x, w)
            best[multiply] = min(best[multiply], time.perf_counter() - start)
    aten, onednn = best.values()
    why = (f"a {rows}x{width}x{4 * width} product takes {1e3 * aten:.2f} ms by F.linear, "
           f"{1e3 * onednn:.2f} by oneDNN")
    return ("onednn" if onednn < 0.9 * aten else "aten"), why


def linear(x: Tensor, weight: Tensor, products: str = "aten",
           bias: Tensor | None = None) -> Tensor:
    """F.linear: x (…, K), weight (N, K), bias (N,) or None -> (…, N). products: whose kernels
    compute it on a CPU in float32, "aten" or "onednn"."""
    if (products == "onednn" and x.dtype == weight.dtype == torch.float32
            and x.device.type == "cpu" and not torch.is_autocast_enabled("cpu")):
        learning = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
        y = _Linear.apply(x, weight) if learning else _product(x, weight)
        return y if bias is None else y + bias
    return F.linear(x, weight, bias)


class Linear(nn.Linear):
    """nn.Linear, by default without bias; `products` says whose kernels compute it. An adapter
    (runtime/lora.py) may be added to it."""

    products = "aten"  # see use_products

    def __init__(self, n_in: int, n_out: int, bias: bool = False):
        super().__init__(n_in, n_out, bias=bias)
        self.register_module("adapter", None)

    def forward(self, x: Tensor) -> Tensor:
        y = linear(x, self.weight, self.products, self.bias)
        return y if self.adapter is None else y + self.adapter(x)


class _RMSNorm(torch.autograd.Function):
    """y = n w with n = x / sqrt(mean x² + ε) over the last dimension: x (…, D), w (D,).

    With g the gradient of y,

        ∂x = (g w − n · mean(g w n)) / sqrt(mean x² + ε),        ∂w = Σ g n.
    """

    @staticmethod
    def forward(ctx, x: Tensor, w: Tensor, eps: float) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        inverse = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
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
    """nn.RMSNorm, on a CPU with fewer passes over memory: PyTorch's is composed of separate
    operations there."""

    def forward(self, x: Tensor) -> Tensor:
        # The compiler fuses it itself. (Not is_compiling(): that is True in every thread while one
        # of them compiles, so another thread would compute by the wrong form.)
        if torch.compiler.is_dynamo_compiling():
            return F.rms_norm(x, self.normalized_shape, self.weight, self.eps)
        if x.device.type != "cpu" or x.dtype != torch.float32:  # a GPU has one kernel for it
            return super().forward(x)
        return _RMSNorm.apply(x, self.weight, self.eps)


class LayerNorm(nn.LayerNorm):
    """nn.LayerNorm, computed in float32 whatever the precision of input and weights; the result has
    the input's."""

    def forward(self, x: Tensor) -> Tensor:
        y = F.layer_norm(x.float(), self.normalized_shape, self.weight.float(), self.bias.float(),
                         self.eps)
        return y.to(x.dtype)
