"""Random draws: each one is a function of (seed, stage, purpose, step or epoch, row) and nothing
else.

Batch composition, device, threads and earlier draws have no influence, so there is no random state
to save: a resumed run asks for the draws of its next step and gets those of the uninterrupted run.
"""
import functools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

STAGES = {"pretrain": 1, "sft": 2, "reward": 3, "ppo": 4, "judge": 5, "best": 6, "loop": 7}

PURPOSES = {
    "order": 1,  # order of the records in an epoch
    "plan": 2,  # order of the documents in pretraining, choice of the prompts of best
    "window": 3,  # windows of a single long text
    "weights": 4,  # initial weights
    "dropout": 5,
    "prefix": 6,  # which replies the reward model sees cut, and where
    "reply": 7,  # tokens of sampled replies
    "minibatch": 8,  # order of a rollout's rows in an epoch of PPO
    "bootstrap": 9,  # how often a record counts for a member of an ensemble
    "adapters": 10,  # initial adapters (LoRA)
    "ask": 11,  # which prompts people are asked about, and the replies to them
    "answer": 12,  # what simulated people answer
}


def key(seed: int, stage: str, purpose: str, *index: int) -> list[int]:
    """Seed sequence of one random stream; (stage, purpose) sit at fixed positions, so streams never
    overlap.

    No number of STAGES or PURPOSES is 0: numpy pads short keys with zeros, so [7] and [7, 0] would be
    one stream.

    >>> key(0, "ppo", "reply", 12)
    [0, 4, 7, 12]
    """
    return [seed, STAGES[stage], PURPOSES[purpose], *index]


def torch_seed(seed: int, stage: str, purpose: str, *index: int) -> int:
    """A seed for torch's generators, derived from `key` of the same arguments."""
    return int(np.random.SeedSequence(key(seed, stage, purpose, *index)).generate_state(1)[0])


def uniform_numbers(seed: int | Sequence[int], rows: Sequence[int], n: int) -> Tensor:
    """(len(rows), n) float32 in [0, 1). Row b depends on (seed, rows[b]) only, not on its batch."""
    seed = [seed] if isinstance(seed, int) else list(seed)
    numbers = [np.random.default_rng([*seed, int(row)]).random(n, np.float32) for row in rows]
    return torch.from_numpy(np.stack(numbers))


@functools.lru_cache(maxsize=4)
def epoch_order(n: int, seed: int, stage: str, epoch: int) -> np.ndarray:
    """(n,): a permutation of 0…n−1, another one in each epoch."""
    return np.random.default_rng(key(seed, stage, "order", epoch)).permutation(n)


def batch_indices(n: int, batch: int, step: int, seed: int, stage: str) -> np.ndarray:
    """(batch,): the indices, out of n records, that make up the batch of this step.

    The permutations of all epochs form one sequence, which is cut into batches. So a batch may
    span two epochs, no batch is short, and all records are used equally often.
    """
    positions = range(step * batch, (step + 1) * batch)
    return np.array([epoch_order(n, seed, stage, i // n)[i % n] for i in positions])


def drawn_evenly(records: Sequence, most: int) -> list:
    """At most so many of the records, in their order; the same ones whatever the run's seed."""
    index = np.random.default_rng(0).permutation(len(records))[:most]
    return [records[i] for i in np.sort(index)]
