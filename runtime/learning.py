"""Which of a model's weights learn: all of them, those of its last blocks, or adapters; and how networks
that have the other weights in common keep them once, and compute what lies below once.

A trunk is whatever has `embedding`, `blocks`, `norm` and `frozen`, the number of its lowest blocks that do
not learn; a model is a trunk, or has one as `backbone`.
"""
import contextlib
import copy
import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from runtime.draws import torch_seed
from runtime.lora import add_adapters
from runtime.options import Common, UserError
from runtime.products import Linear

T = TypeVar("T", bound=nn.Module)


def trunk_of(model: nn.Module) -> Any:
    """The model's trunk, or the model if it is one."""
    return getattr(model, "backbone", model)


# ---- what learns ---------------------------------------------------------------------------------

def learns(name: str, frozen: int, lora: bool = False) -> bool:
    """Whether the parameter of this name learns if the `frozen` lowest blocks do not: those of the other
    blocks, of the final norm, and of heads; with lora, adapters of the other blocks, and heads. The embedding
    does not, and neither does the output layer.

    >>> [learns(name, 2) for name in ("blocks.1.mlp.down.weight", "blocks.2.mlp.down.weight", "score_head.bias")]
    [False, True, True]
    """
    part, *rest = name.removeprefix("backbone.").split(".")
    if part == "blocks":
        return int(rest[0]) >= frozen and ("adapter" in rest or not lora)
    return part not in ("embedding", "position_embedding", "output", *["norm"] * lora)


def frozen_blocks(model: nn.Module, o: Common) -> int:
    """How many of its lowest blocks --train_layers freezes; UserError if it has not so many that learn."""
    n = len(trunk_of(model).blocks)
    if o.train_layers > n:
        raise UserError(f"--train_layers {o.train_layers}: this model has {n} blocks: give at most {n}, or 0 "
                        "to train all weights")
    return n - (o.train_layers or n)


def learn_part(model: nn.Module, o: Common, stage: str) -> None:
    """Let the part learn that --train_layers and --lora_rank name, with adapters where they are missing; 0
    and 0: all. What does not learn needs no gradient, and none is computed below it. stage: whose draws new
    adapters begin with."""
    if not (o.train_layers or o.lora_rank):
        return
    trunk, frozen = trunk_of(model), frozen_blocks(model, o)
    if o.lora_rank:
        add_adapters(trunk.blocks[frozen:], trunk.config.d_model, o, torch_seed(o.seed, stage, "adapters"))
    trunk.frozen = frozen
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(learns(name, frozen, bool(o.lora_rank)))


def halve_frozen(model: T, dtype: str) -> T:
    """With --dtype bfloat16 the blocks' matrices that do not learn are kept in it: each product would round
    them to the same numbers. All else stays float32: what learns, so that small steps add up; norms and
    embedding, of which the residual stream is made; and the output layer, whose product is float32."""
    for layer in trunk_of(model).blocks.modules() if dtype == "bfloat16" else ():
        if isinstance(layer, Linear) and not layer.weight.requires_grad:
            layer.weight.data = layer.weight.data.bfloat16()
    return model


def measured_in(model: T, dtype: str) -> T:
    """The model for measures in this precision. Nothing in it learns, so that its blocks' matrices are kept in
    the precision, too."""
    if trunk_of(model) is not model:  # a reward model scores by itself
        model.dtype = dtype
    return halve_frozen(model.requires_grad_(False), dtype)


def learning(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that learn, for an optimizer."""
    return [p for p in model.parameters() if p.requires_grad]


def learned(model: nn.Module) -> dict[str, Tensor]:
    """The weights that learn, by name: what tells a network from the one that it started as."""
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def load_learned(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Take what `learned` gave; UserError if one of the weights that learn now is not there."""
    own = learned(model)
    if any(name not in weights or weights[name].shape != own[name].shape for name in own):
        raise UserError("the checkpoint has not the weights that learn: start anew with --fresh")
    model.load_state_dict({name: weights[name] for name in own}, strict=False)


# ---- what networks have in common ----------------------------------------------------------------

def learning_copy(model: nn.Module, o: Common | None = None, stage: str = "") -> nn.Module:
    """A copy in which the part that the options name learns, without options all of it; what does not
    learn are the model's own tensors, so it takes no memory. stage: as `learn_part` has it."""
    if o is None or not (o.train_layers or o.lora_rank):
        return copy.deepcopy(model).requires_grad_(True)
    frozen = frozen_blocks(model, o)
    kept = [p for name, p in model.named_parameters() if not learns(name, frozen, bool(o.lora_rank))]
    copied = copy.deepcopy(model, {id(p): p for p in kept})
    learn_part(copied, o, stage)
    return copied


def share_frozen(model: nn.Module, other: nn.Module) -> None:
    """Let the trunk of `other` have the tensors of the model's where neither learns and both are equal: one
    copy in memory."""
    own = {name: p for name, p in trunk_of(model).named_parameters() if not p.requires_grad}
    for prefix, module in [*trunk_of(other).named_modules()]:
        for name, p in [*module.named_parameters(recurse=False)]:
            mine = own.get(f"{prefix}.{name}" if prefix else name)
            if mine is not None and not p.requires_grad and p.shape == mine.shape and (
                    torch.equal(mine, p.to(mine))):
                setattr(module, name, mine)


def shared_depth(trunk: Any, other: Any) -> int:
    """How many of the lowest blocks of two trunks are the same tensors, the embedding too: the frozen ones
    of the first, or none."""
    if not trunk.frozen:
        return 0

    def below(trunk: Any, n: int) -> dict[str, Tensor]:
        return {name: p for name, p in trunk.named_parameters()
                if not name.startswith(("norm.", "output.")) and not (name.startswith("blocks.") and learns(name, n))}

    ours, theirs = (below(x, trunk.frozen) for x in (trunk, other))
    same = ours.keys() == theirs.keys() and all(ours[name] is theirs[name] for name in ours)
    return trunk.frozen if same else 0


def equal_depth(trunk: Any, other: Any) -> int:
    """How many of the lowest blocks of two trunks, embedding included, have equal weights, the last block aside."""
    def equal(part: nn.Module | None, its: nn.Module | None) -> bool:
        ours, theirs = ({} if x is None else x.state_dict() for x in (part, its))
        return ours.keys() == theirs.keys() and all(
            p.data_ptr() == theirs[name].data_ptr() or p.dtype == theirs[name].dtype and torch.equal(p, theirs[name])
            for name, p in ours.items())

    below = (trunk.embedding, other.embedding), (trunk.position_embedding, other.position_embedding)
    if trunk.config != other.config or not all(equal(*pair) for pair in below):
        return 0
    blocks = zip(trunk.blocks[:-1], other.blocks[:-1], strict=True)
    return sum(1 for _ in itertools.takewhile(lambda pair: equal(*pair), blocks))


@contextlib.contextmanager
def sharing(trunk: Any, other: Any) -> Iterator[None]:
    """In this block what two trunks have in common counts as frozen, so that `trunk.below` serves both. Where the
    first one learns, what is frozen stays as it is: a compiled trunk would be compiled anew."""
    if learning(trunk):
        yield
        return
    before = trunk.frozen, other.frozen
    trunk.frozen = other.frozen = equal_depth(trunk, other)
    try:
        yield
    finally:
        trunk.frozen, other.frozen = before


class Below(NamedTuple):
    """Hidden states after the frozen blocks of rows padded to the right, (B, T, D) each; None: to be computed.
    """

    policy: Tensor | None = None
    critic: Tensor | None = None  # the very tensor of the policy where they have these blocks in common

    def at(self, index: Tensor, length: int) -> "Below":
        """Of these rows, as far as the longest of them goes."""
        policy = None if self.policy is None else self.policy[index, :length]
        if self.critic is self.policy:
            return Below(policy, policy)
        return Below(policy, None if self.critic is None else self.critic[index, :length])

    def put(self, index: Tensor, part: "Below", rows: int, length: int) -> "Below":
        """With those of some rows, out of `rows` of at most `length` tokens, written into it."""
        def written(whole: Tensor | None, new: Tensor | None) -> Tensor | None:
            if new is not None:
                whole = new.new_zeros(rows, length, new.shape[2]) if whole is None else whole
                whole[index, :new.shape[1]] = new
            return whole

        policy = written(self.policy, part.policy)
        return Below(policy, policy if part.critic is part.policy else written(self.critic, part.critic))


@contextlib.contextmanager
def knowing(model: Any, below: Tensor | None) -> Iterator[None]:
    """In this block a reward model reads these hidden states (n, T, D) for the n rows that it is asked about;
    a model of None reads nothing."""
    if model is None or not trunk_of(model).frozen:
        yield
        return
    model.known = below
    try:
        yield
    finally:
        model.known = None
