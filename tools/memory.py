"""How much memory a stage takes, from a model's shape: all weights trained, the last blocks, or adapters.

    python -m tools.memory
    python -m tools.memory --from out/reviews/sft --train_layers 2 --micro_batch 16
    python -m tools.memory --stage sft --device cuda --dtype bfloat16

Weights, gradients and an optimizer's averages are counted on the networks themselves, built without memory
and told what learns, as a run tells them. What a forward pass keeps for its backward pass is counted per
token and block (`kept_per_token`). Networks are as in a run whose reward model was trained with the same
options: what they have in common is in memory once.
"""
import runtime  # noqa: F401 (before torch: it sets how threads wait)
import dataclasses
import sys

import torch
from torch import nn

from model import ModelConfig, Transformer, load_checkpoint
from reward import RewardModel
from runtime.learning import learn_part
from runtime.machine import NUMBERS_AT_ONCE
from runtime.options import Common, Options, option, parse, run_main
from runtime.tables import table

# Shapes of .1, .5, 1.5, 7 and 16 billion parameters: SmolLM2-135M, Qwen2.5-0.5B and 1.5B, Llama 2 7B, MOSS-moon.
LLAMA = dict(max_len=2048, qk_norm=False)
SHAPES = {
    "0.1 B": ModelConfig(49_152, 30, 9, 3, 576, 1536, **LLAMA),
    "0.5 B": ModelConfig(151_936, 24, 14, 2, 896, 4864, qkv_bias=True, **LLAMA),
    "1.5 B": ModelConfig(151_936, 28, 12, 2, 1536, 8960, qkv_bias=True, **LLAMA),
    "7 B": ModelConfig(32_000, 32, 32, 32, 4096, 11_008, tied=False, **LLAMA),
    "16 B": ModelConfig(107_008, 34, 24, 24, 6144, 24_576, tied=False, norm="layer", mlp="gelu", mlp_bias=True,
                        head_bias=True, rotary_dim=64, parallel=True, **LLAMA),
}
PROCESS = 0.45e9  # Python, torch and their libraries, on a CPU (measured)
# What runtime/machine.py: keep_freed_memory keeps of freed blocks, at most (measured at 135 M).
KEPT = 0.45e9


@dataclasses.dataclass
class MemoryOptions(Options):
    """`python -m tools.memory`"""

    stage: str = option("ppo", "stage to count", choices=("ppo", "reward", "sft"))
    checkpoint: str = option("", "count for the shape of this run or checkpoint alone", flag="from")
    train_layers: int = option(8, "of the column of the last blocks", low=1)
    lora_rank: int = option(16, "of the column of adapters", low=1)
    dtype: str = option("float32", "precision of matrix products", choices=("float32", "bfloat16"))
    device: str = option("cpu", "cpu: with the process itself, and what is held while checkpoints are read",
                         choices=("cpu", "cuda"))
    batch: int = option(48, "ppo: replies per rollout", low=1)
    micro_batch: int = option(12, "rows per forward and backward; of sft and reward, which know no such thing, all "
                                  "rows of a batch", low=1)
    passes: int = option(1, "forward and backward passes of an optimizer step", low=1)
    rollout_rows: int = option(48, "ppo: replies written at a time", low=1)
    prompt_len: int = option(24, "tokens of a prompt", low=1)
    reply_len: int = option(48, "tokens of a reply", low=1)
    optimizer: str = option("muon", "of sft and reward; adapters and ppo learn by adamw", choices=("muon", "adamw"))
    recompute: bool = option(False, "gradient checkpointing")
    traceback: bool = option(False, "show where in the code an error arose")


def count(model: nn.Module, learning: bool = False) -> int:
    """Its parameters, or those of them that learn."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not learning)


def kept_per_token(config: ModelConfig, dtype: str) -> int:
    """Bytes that a block keeps of each token for its backward pass: inputs of norms and products, queries,
    keys and values before and after rotation, the attention's result, and the MLP's inner values."""
    d, q, kv = config.d_model, config.n_head * config.head_dim, 2 * config.n_kv_head * config.head_dim
    inner = config.d_ff * (4 if config.mlp == "swiglu" else 2)
    if dtype == "bfloat16":  # residual stream and norms stay float32
        return 12 * d + 2 * (q + kv) + 6 * (q + kv // 2) + 3 * q + 2 * inner
    return 4 * (4 * d + (q + kv) + (q + kv // 2) + 3 * q // 2 + inner)


def activations(model: Transformer, tokens: int, o: MemoryOptions) -> float:
    """Bytes that a forward and backward pass over so many tokens holds at most, logits apart."""
    config, blocks = model.config, model.config.n_layer - model.frozen
    block = tokens * kept_per_token(config, o.dtype)
    stream = 4 * tokens * config.d_model
    return block * 2 + blocks * stream if o.recompute else block * (blocks + 1) + stream


def optimizer_bytes(model: nn.Module, muon: bool) -> tuple[int, int]:
    """(averages of gradients: one for what Muon trains, two for AdamW; what a step of Muon holds besides: all
    updates, and three times those of the commonest shape)."""
    matrices = [p for p, _ in model.matrix_parameters() if p.requires_grad] if muon else []
    shapes: dict[torch.Size, int] = {}
    for p in matrices:
        shapes[p.shape] = shapes.get(p.shape, 0) + p.numel()
    numbers = sum(shapes.values())
    return 8 * count(model, True) - 4 * numbers, 4 * numbers + 12 * max(shapes.values(), default=0)


def memory_needed(config: ModelConfig, train_layers: int = 0, lora_rank: int = 0,
                  o: MemoryOptions | None = None) -> dict[str, float]:
    """Bytes by what they are for, `total` among them: the most that the stage holds at a time.

    train_layers and lora_rank: as the stages' options, 0 and 0: all learns. o: the stage and its sizes.
    """
    o, how = o or MemoryOptions(), Common(train_layers=train_layers, lora_rank=lora_rank)
    with torch.device("meta"):
        plain, policy, scorer = Transformer(config), Transformer(config), RewardModel(config)
    for model in (policy, scorer):
        learn_part(model, how, "sft")
    ppo, lora = o.stage == "ppo", bool(lora_rank)
    learning = [policy, scorer] if ppo else [scorer if o.stage == "reward" else policy]
    # Policy or trunk; what it learns again as adapters, or as it was (the reference); reward model and critic.
    weights = count(plain) + (count(learning[0], True) if ppo or lora else 0) + 2 * ppo * count(scorer, True)
    trained = sum(count(m, True) for m in learning)
    length, half = o.prompt_len + o.reply_len, 2 if o.dtype == "bfloat16" else 4
    tokens, vocabulary = o.micro_batch * length, config.vocab_size
    muon = o.optimizer == "muon" and not ppo and not lora
    averages, step = map(sum, zip(*(optimizer_bytes(m, muon) for m in learning), strict=True))
    forward = sum(activations(getattr(m, "backbone", m), tokens, o) for m in learning) + 12 * (
        min(o.micro_batch * o.reply_len * vocabulary, NUMBERS_AT_ONCE[o.device]) if ppo else 512 * vocabulary)
    frozen = sum(p.numel() for p, _ in learning[0].matrix_parameters() if not p.requires_grad) * (half == 2)
    parts = {
        "weights": 4 * weights - 2 * frozen, "optimizer": averages,
        "casts": 2 * trained if half == 2 else 0,  # autocast keeps those of weights that learn
        # In the first pass of a step gradients take the place of what is no longer needed.
        "forward and backward": max(forward + 4 * trained * (o.passes > 1), 4 * trained + step)}
    if ppo:
        packed = sum(p.numel() for p, _ in plain.matrix_parameters()) + plain.output_weight.numel()
        copies = (half == 2 or lora) + (o.device == "cpu")  # rounded or merged ones, and those in a CPU's layout
        parts |= {
            "decoder": half * packed * copies - 2 * frozen * (not lora),  # it reads those as they are
            "cache": 2 * half * config.n_layer * o.rollout_rows * length * config.n_kv_head * config.head_dim,
            "below": 4 * o.batch * length * config.d_model * bool(policy.frozen)}
        # Held-out prompts are measured between updates, with a decoder and a cache of their own.
        parts["measuring"] = max(
            0.0, parts["decoder"] + parts["cache"] - parts["casts"] - parts["forward and backward"])
    if o.device == "cpu":
        # While a checkpoint is read: its bytes and its tensors, then these and the network; beside PPO's policy.
        reading = 4 * count(plain) * (2 + ppo)
        parts["process"], parts["kept"] = PROCESS, min(KEPT, parts["forward and backward"])
        parts["reading"] = max(0.0, reading - sum(x for name, x in parts.items() if name != "process"))
    return parts | {"total": float(sum(parts.values()))}


def sizes(o: MemoryOptions) -> str:
    """A line for each shape: gigabytes where all learns, the last blocks, and adapters."""
    shapes = {o.checkpoint: load_checkpoint(o.checkpoint)[0].config} if o.checkpoint else SHAPES
    rows, titles = [], ("weights", "all", f"last {o.train_layers}", f"LoRA {o.lora_rank}", "both")
    for name, config in shapes.items():
        last = min(o.train_layers, config.n_layer)
        ways = ((0, 0), (last, 0), (0, o.lora_rank), (last, o.lora_rank))
        needed = [memory_needed(config, *way, o) for way in ways]
        with torch.device("meta"):
            weights = 4 * count(Transformer(config))
        rows.append({"shape": name, **{title: f"{x / 1e9:.1f}" for title, x in zip(
            titles, (weights, *(n["total"] for n in needed)), strict=True)}})
    return table(rows, {title: title for title in ("shape", *titles)})


def main(argv: list[str]) -> int:
    o = parse(MemoryOptions, argv, "tools.memory")
    print(f"{o.stage} on {o.device}, products in {o.dtype}, {o.micro_batch} rows of {o.prompt_len} + {o.reply_len} "
          f"tokens a pass: GB (10⁹ bytes), weights alone in float32 beside them\n\n{sizes(o)}")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main, sys.argv[1:]))
