"""From texts in files to batches of tensors: packing, padding, and the order in which everything is seen.

The order, like every other draw of a run, follows from (seed, stage, purpose, step or epoch …) alone, through
`numpy.random.default_rng(key(…))`. So a resumed run needs no random state: it asks for the batch of its next step and
gets the one the uninterrupted run would have had.
"""
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from data.records import apply_template, as_messages
from data.tokenizer import Tokenizer
from runtime.draws import key
from runtime.options import UserError

# ---- order -----------------------------------------------------------------------------------------------------------


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


# ---- rows as the networks read them ----


class Rows(NamedTuple):
    """Some rows of a rollout, their padding moved to the right and cut at the longest.

    tokens (M, L), and bools of the same shape: `real` tokens, and those of the `reply`. To the right, pads need no
    attention mask: causality hides them.
    """

    tokens: Tensor
    real: Tensor
    reply: Tensor

    @property
    def before(self) -> Tensor:
        """(N,): the position just before each reply token, as numbered in a flattened (M, L), row by row."""
        return self.reply.flatten().nonzero()[:, 0] - 1

    @property
    def targets(self) -> Tensor:
        """(N,): the reply tokens in the same order."""
        return self.tokens[self.reply]


def make_rows(tokens: Tensor, real: Tensor, reply: Tensor) -> Rows:
    """Move each row's real tokens to its beginning, their order kept; all (M, T)."""
    order = (~real).to(torch.uint8).argsort(dim=1, stable=True)[:, :int(real.sum(1).max())]
    return Rows(tokens.gather(1, order), real.gather(1, order), reply.gather(1, order))


def spread(flat: Tensor, response_mask: Tensor) -> Tensor:
    """(N,) back to (M, R): each value to its reply token's column, 0 elsewhere."""
    return flat.new_zeros(response_mask.shape).masked_scatter(response_mask, flat)
