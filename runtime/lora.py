"""Adapters of low rank (LoRA, Hu 2021): a layer's weight stays as it is, and a product of two thin matrices
that is added to it learns.

    y = W x + scale · up (down x)        down (R, n_in), up (n_out, R), scale = α / R

`up` starts at 0, so a model with fresh adapters is the model without them. A checkpoint holds weights and
adapters side by side, so a run goes on bit by bit; whoever loads it for anything else gets the sum, W + scale ·
up down (`merge_adapters`), which needs no adapters any more.
"""
import math

import torch
from torch import Tensor, nn

from runtime.options import Common, UserError
from runtime.products import Linear, linear


class Adapter(nn.Module):
    """What is added to a layer's output: scale · up (down x)."""

    products = "aten"  # see runtime.products.use_products

    def __init__(self, layer: Linear, rank: int, scale: float = 1.0):
        super().__init__()
        n_out, n_in = layer.weight.shape
        self.down = nn.Parameter(torch.zeros(rank, n_in, device=layer.weight.device))
        self.up = nn.Parameter(torch.zeros(n_out, rank, device=layer.weight.device))
        self.register_buffer("scale", torch.tensor(scale, device=layer.weight.device))

    def forward(self, x: Tensor) -> Tensor:
        """x (…, n_in) -> (…, n_out)."""
        return self.scale * linear(linear(x, self.down, self.products), self.up, self.products)

    def delta(self) -> Tensor:
        """(n_out, n_in): what this adds to the layer's weight."""
        return self.scale * (self.up @ self.down)


def adapted(model: nn.Module) -> list[Linear]:
    """The layers with an adapter."""
    return [layer for layer in model.modules() if isinstance(layer, Linear) and layer.adapter is not None]


def add_adapters(blocks: nn.Module, width: int, o: Common, seed: int) -> None:
    """Give an adapter to every layer of these blocks that has none. UserError if --lora_rank is above the
    model's width: such a matrix is no longer thin.

    down: N(0, 1/√n_in), so that its outputs are as large as its inputs. scale: --lora_alpha / --lora_rank, 2
    if no alpha is given.
    """
    if o.lora_rank > width:
        raise UserError(f"--lora_rank {o.lora_rank} is above the model's width, {width}: give less; 8 to 64 are usual")
    generator = torch.Generator().manual_seed(seed)
    for layer in [x for x in blocks.modules() if isinstance(x, Linear) and x.adapter is None]:
        layer.adapter = Adapter(layer, o.lora_rank, (o.lora_alpha or 2 * o.lora_rank) / o.lora_rank)
        layer.adapter.products = layer.products
        with torch.no_grad():
            noise = torch.randn(layer.adapter.down.shape, generator=generator)
            layer.adapter.down.copy_(noise / math.sqrt(noise.shape[1]))


def add_stored_adapters(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Adapters of the shapes that a checkpoint's weights have, still to be loaded; ValueError if they do
    not fit their layers."""
    for name, layer in [(name, x) for name, x in model.named_modules() if isinstance(x, Linear)]:
        if (down := weights.get(f"{name}.adapter.down")) is None:
            continue
        (n_out, n_in), rank = layer.weight.shape, len(down)
        if down.shape != (rank, n_in) or weights[f"{name}.adapter.up"].shape != (n_out, rank):
            raise ValueError(f"{name} has an adapter of another shape")
        layer.adapter = Adapter(layer, rank)


@torch.no_grad()
def merge_adapters(model: nn.Module) -> None:
    """Add each adapter to its layer's weight, and take it away: the same function."""
    for layer in adapted(model):
        layer.weight += layer.adapter.delta()
    drop_adapters(model)


def drop_adapters(model: nn.Module) -> nn.Module:
    """Take the adapters away: the model that it was without them."""
    for layer in adapted(model):
        layer.adapter = None
    return model


def without_adapters(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of the layers themselves."""
    return {name: x for name, x in weights.items() if ".adapter." not in name}
