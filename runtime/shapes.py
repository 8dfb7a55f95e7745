"""Whether the numbers of a network's shape are ones that can be built, and fit each other. A shape is a
dataclass of plain fields, `model.ModelConfig`, which may come from a stranger's file."""
import dataclasses
from typing import Any

from runtime.options import UserError

CHOICES = {"norm": ("rms", "layer"), "mlp": ("swiglu", "gelu"), "positions": ("rotary", "learned")}


def check_fields(shape: Any) -> None:
    """UserError unless each field is of its kind and in range, and width and heads divide. A list where a
    tuple belongs, as JSON returns it, becomes one."""
    for field in dataclasses.fields(shape):
        value, kind = getattr(shape, field.name), field.type
        if kind is tuple and isinstance(value, list):
            setattr(shape, field.name, value := tuple(value))
        fits = isinstance(value, int | float if kind is float else kind)
        low = kind is int and field.default > 0  # 0 stands for "derived" where it is the default
        if not fits or isinstance(value, bool) != (kind is bool) or kind in (int, float) and not (
                low <= value < 2**31):
            raise UserError(f"model shape: {field.name} is {value!r}: give another one")
    if not shape.head_dim and shape.d_model % (2 * shape.n_head) or shape.n_head % shape.n_kv_head:
        raise UserError(
            f"model shape does not divide: d_model {shape.d_model} needs to be a multiple of 2 * n_head "
            f"({shape.n_head}) unless head_dim is given, and n_head a multiple of n_kv_head ({shape.n_kv_head}); "
            "change one of them")


def check_family(shape: Any) -> None:
    """UserError unless the fields that only some families have fit each other. head_dim is filled in."""
    for name, choices in CHOICES.items():
        if getattr(shape, name) not in choices:
            raise UserError(f"model shape: {name} is {getattr(shape, name)!r}: use {' or '.join(choices)}")
    if shape.head_dim % 2 or shape.rotary_dim % 2 or shape.rotary_dim > shape.head_dim:
        raise UserError(f"model shape: head_dim {shape.head_dim} and rotary_dim {shape.rotary_dim} must be even, and "
                        "the second at most the first")
    if shape.tied and shape.head_bias:
        raise UserError("model shape: a tied output layer has no bias: head_bias needs tied False")
    scaling = shape.rope_scaling
    numbers = all(type(x) in (int, float) and 0 < x < 2**31 for x in scaling)
    if scaling and not (numbers and len(scaling) == 4 and scaling[1] < scaling[2]):
        raise UserError(f"model shape: rope_scaling is {scaling}: give four positive numbers, (factor, low, high, "
                        "original length) with low below high, or ()")
    if shape.max_len * shape.head_dim > 2**24:  # its rotary tables: no weight tells their size
        raise UserError(f"max_len {shape.max_len} is too long for heads of width {shape.head_dim}: at most "
                        f"{2**24 // shape.head_dim}")
