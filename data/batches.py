"""From texts in files to batches of tensors: packing, padding, and the order in which everything is seen.

The order, like every other draw of a run, follows from (seed, stage, purpose, step or epoch …) alone, through
`numpy.random.default_rng(key(…))`. So a resumed run needs no random state: it asks for the batch of its next step and
gets the one the uninterrupted run would have had.
"""
import functools
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from data.records import apply_template, as_messages
from data.tokenizer import Tokenizer
from options import UserError

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


# ---- order -----------------------------------------------------------------------------------------------------------

@functools.lru_cache(maxsize=4)
def epoch_order(n: int, seed: int, stage: str, epoch: int) -> np.ndarray:
    """A permutation of 0…n−1, anew for each epoch."""
    return np.random.default_rng(key(seed, stage, "order", epoch)).permutation(n)


def rows_at(n: int, batch: int, step: int, seed: int, stage: str) -> np.ndarray:
    """Which rows step `step` takes, (batch,): the epochs' permutations one after another, cut into batches. A batch at
    the border of two epochs takes from both, so every row is seen equally often and no batch is short."""
    at = np.arange(step * batch, (step + 1) * batch)
    return np.array([epoch_order(n, seed, stage, int(i // n))[i % n] for i in at])


# ---- padding ---------------------------------------------------------------------------------------------------------

def pad_right(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """(tokens, mask), each (B, longest): int64, and bool that is True at real tokens.

    >>> [t.tolist() for t in pad_right([[5, 6], [7]], 0)]
    [[[5, 6], [7, 0]], [[True, True], [True, False]]]
    """
    width = max(map(len, rows))
    tokens = torch.tensor([[*row, *[pad_id] * (width - len(row))] for row in rows], dtype=torch.int64)
    return tokens, torch.arange(width) < torch.tensor([[len(row)] for row in rows])


def pad_left(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """As pad_right, with the padding before the row: prompts end together, where their replies begin."""
    tokens, mask = pad_right([row[::-1] for row in rows], pad_id)
    return tokens.flip(1), mask.flip(1)


# ---- dialogues -------------------------------------------------------------------------------------------------------

def dialogue_rows(records: Sequence[dict], tokenizer: Tokenizer, template: str,
                  max_len: int) -> tuple[list[tuple[list[int], list[bool]]], int]:
    """(ids, loss mask) of each sft record that fits max_len, and how many did not: a dialogue is left out, never cut,
    because a cut one would teach to stop anywhere."""
    rows = [tokenizer.render_chat(as_messages(record, template)) for record in records]
    kept = [row for row in rows if len(row[0]) <= max_len]
    return kept, len(rows) - len(kept)


def prompt_ids(tokenizer: Tokenizer, prompt, template: str = "{prompt}", bare: bool = False) -> list[int]:
    """Ids to continue: a dialogue up to where the reply starts, or (`bare`: a pretrained model) a document's beginning.

    prompt: a string, to which the checkpoint's template is applied, or a list of messages, taken as it is.
    """
    if bare and isinstance(prompt, list):
        raise UserError("a pretrained model continues a text, it has not learned to answer messages: use an sft "
                        "checkpoint, or give prompts as texts")
    if bare:
        return [tokenizer.eot_id, *tokenizer.encode(prompt)]
    messages = prompt if isinstance(prompt, list) else [{"role": "user", "content": apply_template(template, prompt)}]
    return tokenizer.render_chat(messages, reply=True)[0]


def fitting(records: Sequence[dict], tokenizer: Tokenizer, template: str, room: int) -> list[dict]:
    """The records whose prompt takes at most `room` tokens; how many are left out is said, before any training."""
    kept = [r for r in records if len(prompt_ids(tokenizer, r["prompt"], template)) <= room]
    if not kept:
        raise UserError(f"none of {len(records)} prompts fits: each has over {max(room, 0)} tokens, which is what the "
                        "model's max_len leaves beside a reply (--reply_len): allow shorter replies, bring shorter "
                        "prompts, or pretrain with a larger --max_len")
    if len(kept) < len(records):
        print(f"{len(records) - len(kept)} of {len(records)} records left out: their prompts have over {room} tokens")
    return kept


def judged_rows(records: list[dict], tokenizer: Tokenizer, template: str, max_len: int, *, field: str = "response",
                half: bool = False, prefix_share: float = 0.0,
                rng: np.random.Generator | None = None) -> list[tuple[list[int], list[bool]]]:
    """(ids, reply flags) of each record, as the reward model reads them: exactly the ids of a rollout.

    A finished reply ends in <eom>. One cut at max_len, to its first half, or (a share of them, drawn by rng) to a
    random prefix carries none, like a rollout that ran out of room; its label stays. Two calls with equal rngs cut the
    two replies of a pair alike: a finished one against an unfinished one would teach another lesson.
    """
    rows = []
    draws = rng.random((len(records), 2)) if rng is not None else np.ones((len(records), 2))
    for record, (cut, where) in zip(records, draws, strict=True):
        prompt = prompt_ids(tokenizer, record["prompt"], template)
        reply = tokenizer.encode(record[field]) + [tokenizer.eom_id]
        if half:
            reply = reply[:max(1, (len(reply) - 1) // 2)]
        elif cut < prefix_share and len(reply) > 2:
            reply = reply[:1 + int(where * (len(reply) - 2))]
        reply = reply[:max(1, max_len - len(prompt))]
        rows.append((prompt + reply, [False] * len(prompt) + [True] * len(reply)))
    return rows


def judged_batch(rows: list[tuple[list[int], list[bool]]], device: str) -> tuple[Tensor, Tensor, Tensor]:
    """(tokens, real, reply), each (B, L), padded to the right."""
    tokens, real = pad_right([ids for ids, _ in rows], 0)
    reply = pad_right([flags for _, flags in rows], 0)[0].bool()
    return tokens.to(device), real.to(device), reply.to(device)


def pack_rows(rows: Sequence[tuple[list[int], list[bool]]], window: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Lay short rows (ids, flags) behind one another into windows, longest first, each where it fits: little padding.

    Returns (tokens, flags, docs), each (W, window), and (n, longest) positions in the flattened windows: row i's token
    j stands at `where[i, j]` (0 beyond its end). docs numbers the rows, so attention with them sees each row as if it
    were alone; padding has the number −1. The window grows to the longest row.
    """
    lengths = [len(ids) for ids, _ in rows]
    window, room, starts = max(window, *lengths), [], [0] * len(rows)
    for i in sorted(range(len(rows)), key=lambda i: -lengths[i]):
        w = next((w for w, free in enumerate(room) if free >= lengths[i]), len(room))
        if w == len(room):
            room.append(window)
        starts[i] = w * window + window - room[w]
        room[w] -= lengths[i]
    tokens, flags, docs = (np.full(len(room) * window, fill) for fill in (0, False, -1))
    where = np.zeros((len(rows), max(lengths)), np.int64)
    for i, (ids, learn) in enumerate(rows):
        at = slice(starts[i], starts[i] + lengths[i])
        tokens[at], flags[at], docs[at] = ids, learn, i
        where[i, :lengths[i]] = np.arange(at.start, at.stop)
    return *(torch.from_numpy(x).view(-1, window) for x in (tokens, flags, docs)), torch.from_numpy(where)


# ---- plain text ------------------------------------------------------------------------------------------------------

class PackedDocuments:
    """Windows of a stream of documents, for pretraining; `batch(step)` is computed from the step alone.

    The whole run is planned at the start: each part of the data (newspaper, reviews …) gets its share of
    `total_tokens`, passing over its documents in fresh permutations as often as that takes. A document's place in the
    run is (pass + u) / passes; a part named in `early` is squeezed into the run's first share of that size. Documents
    in order of place form one stream, cut into windows. A single long text is not cut into a stream but into random
    windows (nanoGPT).
    """

    def __init__(self, tokens: np.ndarray, starts: np.ndarray, part: np.ndarray, *, window: int, batch: int,
                 total_tokens: int, seed: int, shares: dict[int, float] | None = None,
                 early: dict[int, float] | None = None):
        self.tokens, self.starts, self.window, self.batch_size, self.seed = tokens, starts, window, batch, seed
        self.n_steps = max(1, total_tokens // (window * batch))
        self.single = len(starts) == 2
        self.passes = 1 + self.n_steps * window * batch // len(tokens)  # over the part that is seen most often
        if self.single:
            return
        lengths, rng = np.diff(starts), np.random.default_rng(key(seed, "pretrain", "plan"))
        present = [int(p) for p in np.unique(part)]
        shares = {p: (shares or {}).get(p, lengths[part == p].sum()) for p in present}
        chosen, places = [], []
        needed = self.n_steps * batch * window + 1
        for p in present:
            mine = np.flatnonzero(part == p)
            want = needed * shares[p] / sum(shares.values()) + lengths[mine].max()  # a document more: it must suffice
            passes = int(np.ceil(want / lengths[mine].sum()))
            self.passes = max(self.passes, passes)
            order = np.concatenate([rng.permutation(mine) for _ in range(passes)])
            order = order[:int(np.searchsorted(lengths[order].cumsum(), want)) + 1]
            place = (np.arange(len(order)) + rng.random(len(order))) / len(order)
            chosen.append(order)
            places.append(place * (early or {}).get(p, 1.0))
        order = np.concatenate(chosen)[np.concatenate(places).argsort(kind="stable")]
        self.order, self.ends = order, lengths[order].cumsum()

    def batch(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """(inputs, targets, docs), each (B, window) int64. docs numbers the documents: attention stays inside one."""
        B, W = self.batch_size, self.window
        if self.single:
            rng = np.random.default_rng(key(self.seed, "pretrain", "window", step))
            first = rng.integers(len(self.tokens) - W, size=B)
            rows = torch.from_numpy(np.stack([self.tokens[i:i + W + 1] for i in first]).astype(np.int64))
            return rows[:, :-1], rows[:, 1:], torch.zeros(B, W, dtype=torch.int64)
        begin = step * B * W
        a, b = np.searchsorted(self.ends, [begin, begin + B * W], side="right")
        documents = self.order[a:b + 1]
        stream = np.concatenate([self.tokens[self.starts[d]:self.starts[d + 1]] for d in documents])
        number = np.repeat(np.arange(len(documents)), np.diff(self.starts)[documents])
        skip = begin - (self.ends[a - 1] if a else 0)
        stream, number = (torch.from_numpy(x[skip:skip + B * W + 1].astype(np.int64)) for x in (stream, number))
        return stream[:-1].view(B, W), stream[1:].view(B, W), number[:-1].view(B, W)


def eval_windows(tokens: np.ndarray, starts: np.ndarray, window: int,
                 batch: int) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """One fixed full pass: every token but the first is a target exactly once. Yields (inputs, targets, docs, real),
    each (B, window); real is False where the last window is padded."""
    n = len(tokens) - 1
    number = np.searchsorted(starts, np.arange(n), side="right")
    for begin in range(0, n, window * batch):
        end = min(n, begin + window * batch)
        rows = -(-(end - begin) // window)
        padding = (0, rows * window - (end - begin))
        inputs, targets, docs = (torch.from_numpy(np.pad(x.astype(np.int64), padding).reshape(rows, window))
                                 for x in (tokens[begin:end], tokens[begin + 1:end + 1], number[begin:end]))
        yield inputs, targets, docs, torch.arange(rows * window).view(rows, window) < end - begin
