"""Random draws: every one follows from (seed, stage, purpose, step or epoch, row) alone."""
import functools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

STAGES = {"pretrain": 1, "sft": 2, "reward": 3, "ppo": 4}

PURPOSES = {"order": 1, "plan": 2, "window": 3, "weights": 4, "dropout": 5, "prefix": 6, "reply": 7, "minibatch": 8}


def key(seed: int, stage: str, purpose: str, *index: int) -> list[int]:
    """What a draw follows from. Purposes are told apart at a fixed place, so no two share a stream of numbers (numpy
    ignores zeros at a key's end: [7] and [7, 0] are one stream)."""
    return [seed, STAGES[stage], PURPOSES[purpose], *index]


def uniform_numbers(seed: int | Sequence[int], rows: Sequence[int], n: int) -> Tensor:
    """(len(rows), n) float32 in [0, 1): row b's numbers follow from (seed, rows[b]), whatever shares its batch."""
    seed = [seed] if isinstance(seed, int) else list(seed)
    return torch.from_numpy(np.stack([np.random.default_rng([*seed, int(row)]).random(n, np.float32) for row in rows]))


@functools.lru_cache(maxsize=4)
def epoch_order(n: int, seed: int, stage: str, epoch: int) -> np.ndarray:
    """A permutation of 0…n−1, anew for each epoch."""
    return np.random.default_rng(key(seed, stage, "order", epoch)).permutation(n)


def rows_at(n: int, batch: int, step: int, seed: int, stage: str) -> np.ndarray:
    """Which rows step `step` takes, (batch,): the epochs' permutations one after another, cut into batches. A batch at
    the border of two epochs takes from both, so every row is seen equally often and no batch is short."""
    at = np.arange(step * batch, (step + 1) * batch)
    return np.array([epoch_order(n, seed, stage, int(i // n))[i % n] for i in at])


def torch_seed(*words) -> int:
    """A seed for torch's own generators from what `key` takes."""
    return int(np.random.SeedSequence(key(*words)).generate_state(1)[0])
