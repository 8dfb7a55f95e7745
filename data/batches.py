"""From records and documents to batches of tensors: rendering, padding, packing.

Which records are in a batch follows from the step alone (runtime/draws.py), so a resumed run sees
the batches of the uninterrupted one.
"""
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from data.dataset import text_hash
from data.prepared import Documents, Prepared
from data.records import apply_template, as_messages, prompt_text
from data.tokenizer import Tokenizer
from runtime.draws import key
from runtime.learning import Below
from runtime.options import UserError

Row = tuple[list[int], list[bool]]  # token ids, and which of them are learned (or are the reply)


# ---- padding -------------------------------------------------------------------------------------

def pad_right(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """(tokens, mask), each (B, longest): int64, and bool that is True at real tokens.

    >>> [t.tolist() for t in pad_right([[5, 6], [7]], 0)]
    [[[5, 6], [7, 0]], [[True, True], [True, False]]]
    """
    width = max(map(len, rows))
    tokens = torch.tensor([[*row, *[pad_id] * (width - len(row))] for row in rows],
                          dtype=torch.int64)
    return tokens, torch.arange(width) < torch.tensor([[len(row)] for row in rows])


def pad_left(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """As pad_right, with the padding first: prompts end in the same column, where replies begin."""
    tokens, mask = pad_right([row[::-1] for row in rows], pad_id)
    return tokens.flip(1), mask.flip(1)


# ---- dialogues -----------------------------------------------------------------------------------

def dialogue_rows(records: Sequence[dict], tokenizer: Tokenizer, template: str,
                  max_len: int) -> tuple[list[Row], int]:
    """(rows of the sft records that fit max_len, number of records that do not). A long dialogue is
    dropped, never truncated: that would teach the model to stop anywhere."""
    rows = [tokenizer.render_chat(as_messages(record, template)) for record in records]
    short = [row for row in rows if len(row[0]) <= max_len]
    return short, len(rows) - len(short)


def prompt_ids(tokenizer: Tokenizer, prompt: str | list[dict[str, str]],
               template: str = "{prompt}", bare: bool = False) -> list[int]:
    """Ids to continue: a dialogue up to where the reply starts.

    prompt: a text, to which the checkpoint's template is applied, or a list of messages, used as
    they are. bare: the beginning of a document instead, for a pretrained model; UserError for
    messages.
    """
    if bare and isinstance(prompt, list):
        raise UserError("a pretrained model continues a text, it has not learned to answer "
                        "messages: use an sft checkpoint, or give prompts as texts")
    if bare:
        return [tokenizer.eot_id, *tokenizer.encode(prompt)]
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": apply_template(template, prompt)}]
    return tokenizer.render_chat(prompt, reply=True)[0]


LEAST_REPLY = 8  # tokens of a reply that a reward model's rows have room for, beside any prompt
BESIDE_A_REPLY = ("--prompt_len of ppo, or else max_len of the models and of the reward model's training leaves for a "
                  "prompt: allow shorter replies (--reply_len of ppo, best and evaluate.py), bring shorter prompts, or "
                  "train with a larger --max_len, in pretraining, too")
IN_A_ROW = "the reward model's max_len leaves: bring shorter prompts, or train it with a larger --max_len"


def drop_long_prompts(records: Sequence[dict], tokenizer: Tokenizer, template: str, limit: int,
                      room: str = BESIDE_A_REPLY) -> list[dict]:
    """The records whose prompt has at most `limit` tokens; prints how many are dropped. UserError
    if all are: room says what leaves so few, and what to do."""
    short = [r for r in records if len(prompt_ids(tokenizer, r["prompt"], template)) <= limit]
    if not short:
        raise UserError(f"none of {len(records)} prompts fits: each has over {max(limit, 0)} tokens, which is what "
                        + room)
    if len(short) < len(records):
        print(f"{len(records) - len(short)} of {len(records)} records left out: their prompts "
              f"have over {limit} tokens")
    return short


def held_out_prompts(data: Prepared, split: str, tokenizer: Tokenizer, limit: int, n: int) -> list:
    """Up to n of the held-out prompts that have at most `limit` tokens, each once.

    They are drawn by a hash of the prompt: neither the order of the file, which may be sorted, nor
    the run's seed has a part in it, so all runs on this data are measured on the same prompts.
    """
    fitting = drop_long_prompts(data.records("ppo", split), tokenizer, data.template, limit)
    prompts = {prompt_text(record["prompt"]): record["prompt"] for record in reversed(fitting)}
    return [prompts[text] for text in sorted(prompts, key=lambda t: text_hash("order " + t))[:n]]


def reward_rows(records: Sequence[dict], tokenizer: Tokenizer, template: str, max_len: int, *,
                field: str = "response", half: bool = False, prefix_share: float = 0.0,
                rng: np.random.Generator | None = None) -> list[Row]:
    """(ids, reply flags) of each record, as the reward model reads it: the ids of a rollout.

    A finished reply ends in <eom>. A truncated one has none, like a rollout that was cut off; its
    label stays. Truncated are replies that do not fit max_len, all of them if `half` (to their
    first half), and a share of them, drawn by rng, to a random prefix. Two calls with equal rngs
    truncate the two replies of a pair alike: if only one were finished, that would be learned.
    """
    rows = []
    draws = rng.random((len(records), 2)) if rng is not None else np.ones((len(records), 2))
    for record, (draw, cut) in zip(records, draws, strict=True):
        prompt = prompt_ids(tokenizer, record["prompt"], template)
        reply = tokenizer.reply_ids(record[field])
        if half:
            reply = reply[:max(1, (len(reply) - 1) // 2)]
        elif draw < prefix_share and len(reply) > 2:
            reply = reply[:1 + int(cut * (len(reply) - 2))]
        reply = reply[:max(1, max_len - len(prompt))]
        rows.append((prompt + reply, [False] * len(prompt) + [True] * len(reply)))
    return rows


def drop_equal_pairs(records: Sequence[dict], tokenizer: Tokenizer, template: str,
                     max_len: int) -> tuple[list[dict], int]:
    """(the pairs whose two rows still differ within max_len, the max_len at which all do)."""
    kept, needed = [], 0
    for record in records:
        (a, _), (b, _) = (row for field in ("chosen", "rejected") for row in
                          reward_rows([record], tokenizer, template, sys.maxsize, field=field))
        shared = len(os.path.commonprefix([a, b]))  # it takes lists, too
        needed = max(needed, shared + 1)
        if shared < max_len:
            kept.append(record)
    return kept, needed


def different_pairs(pairs: Sequence[dict], stage: str, split: str, longest: int, **render: Any) -> list[dict]:
    """The pairs whose replies differ within max_len; the others would teach nothing. Prints how many are
    left out and which option keeps them; UserError if all are. longest: tokens of a row that the model can
    read. render: the other arguments of `drop_equal_pairs`."""
    kept, needed = drop_equal_pairs(pairs, **render)
    if len(kept) < len(pairs):
        where = "" if needed <= longest else "in pretraining and here "
        text = (f"{stage}: {len(pairs) - len(kept)} of {len(pairs)} {split} pairs left out: chosen and rejected "
                f"are equal in their first {render['max_len']} tokens; --max_len {needed} {where}would keep all")
        if not kept:
            raise UserError(text)
        print(text, flush=True)
    return kept


def reward_batch(rows: Sequence[Row], device: str) -> tuple[Tensor, Tensor, Tensor]:
    """(tokens, real, reply) of `reward_rows`, each (B, L), padded to the right."""
    tokens, real = pad_right([ids for ids, _ in rows], 0)
    reply = pad_right([flags for _, flags in rows], 0)[0].bool()
    return tokens.to(device), real.to(device), reply.to(device)


def pack_rows(rows: Sequence[Row], window: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Put several short rows into each window, the longest rows first, so that little is padding.

    Returns (tokens, flags, docs), each (W, window), and `where` (rows, longest): token j of row i
    is at position where[i, j] of the flattened windows (0 past the row's end). docs numbers the
    rows, so that attention stays inside one; it is −1 at padding. The window grows to the longest
    row.
    """
    lengths = [len(ids) for ids, _ in rows]
    window = max(window, *lengths)
    free: list[int] = []  # tokens of each window that are still unused, at its end
    starts = [0] * len(rows)
    # First fit: each row goes into the first window with enough free tokens.
    for i in sorted(range(len(rows)), key=lambda i: -lengths[i]):
        w = next((w for w, n in enumerate(free) if n >= lengths[i]), len(free))
        if w == len(free):
            free.append(window)
        starts[i] = w * window + window - free[w]
        free[w] -= lengths[i]
    tokens, flags, docs = (np.full(len(free) * window, fill) for fill in (0, False, -1))
    where = np.zeros((len(rows), max(lengths)), np.int64)
    for i, (ids, row_flags) in enumerate(rows):
        place = slice(starts[i], starts[i] + lengths[i])
        tokens[place], flags[place], docs[place] = ids, row_flags, i
        where[i, :lengths[i]] = np.arange(place.start, place.stop)
    windows = (torch.from_numpy(x).view(-1, window) for x in (tokens, flags, docs))
    return *windows, torch.from_numpy(where)


# ---- plain text ----------------------------------------------------------------------------------

class PackedDocuments:
    """Windows of a stream of documents, for pretraining; `batch(step)` depends on the step alone.

    The stream is planned at the start. Each part of the data (newspaper, reviews …) gets its share
    of `total_tokens`, in as many passes over its documents as that takes, each in another order. A
    document's position in the run, from 0 to 1, is (pass + u) / passes; positions of a part in
    `early` are multiplied by its number there, so that it comes in that first share of the run.
    Documents sorted by position are the stream, which is cut into windows.

    A single long text has no documents to be ordered: its windows begin at random (nanoGPT).
    """

    def __init__(self, documents: Documents, *, window: int, batch: int, total_tokens: int,
                 seed: int, shares: dict[int, float] | None = None,
                 early: dict[int, float] | None = None):
        """window: tokens a row. batch: rows a step. shares: of the tokens, by part number; a part
        without one counts with its size. early: by part number."""
        self.tokens, self.starts = documents.tokens, documents.starts
        self.window, self.batch_size, self.seed = window, batch, seed
        self.n_steps = max(1, total_tokens // (window * batch))
        # A text that fills no window is repeated in it, as documents are.
        self.single = documents.single and len(self.tokens) > window
        needed = self.n_steps * window * batch + 1
        self.passes = 1 + (needed - 1) // len(self.tokens)  # over the part that is read most often
        if not self.single:
            self._plan(documents.part, needed, shares or {}, early or {})

    def _plan(self, part: np.ndarray, needed: int, shares: dict[int, float],
              early: dict[int, float]) -> None:
        """Choose the documents of the run, in order: at least `needed` tokens."""
        lengths = np.diff(self.starts)
        rng = np.random.default_rng(key(self.seed, "pretrain", "plan"))
        sizes = {int(p): lengths[part == p].sum() for p in np.unique(part)}
        weights = {p: shares.get(p, size) for p, size in sizes.items() if shares.get(p) != 0}
        chosen, positions = [], []
        for p, weight in weights.items():
            of_part = np.flatnonzero(part == p)
            # One document more than the share: the sum over all parts has to suffice.
            wanted = needed * weight / sum(weights.values()) + lengths[of_part].max()
            passes = int(np.ceil(wanted / sizes[p]))
            self.passes = max(self.passes, passes)
            order = np.concatenate([rng.permutation(of_part) for _ in range(passes)])
            order = order[:int(np.searchsorted(lengths[order].cumsum(), wanted)) + 1]
            position = (np.arange(len(order)) + rng.random(len(order))) / len(order)
            chosen.append(order)
            positions.append(position * early.get(p, 1.0))
        by_position = np.concatenate(positions).argsort(kind="stable")
        self.order = np.concatenate(chosen)[by_position]
        self.ends = lengths[self.order].cumsum()  # of each document in the stream

    def batch(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """(inputs, targets, docs), each (B, window) int64. docs numbers the documents, so that
        attention stays inside one."""
        B, W = self.batch_size, self.window
        if self.single:
            rng = np.random.default_rng(key(self.seed, "pretrain", "window", step))
            first = rng.integers(len(self.tokens) - W, size=B)
            windows = np.stack([self.tokens[i:i + W + 1] for i in first]).astype(np.int64)
            rows = torch.from_numpy(windows)
            return rows[:, :-1], rows[:, 1:], torch.zeros(B, W, dtype=torch.int64)
        begin = step * B * W
        a, b = np.searchsorted(self.ends, [begin, begin + B * W], side="right")
        documents = self.order[a:b + 1]
        stream = np.concatenate([self.tokens[self.starts[d]:self.starts[d + 1]] for d in documents])
        number = np.repeat(np.arange(len(documents)), np.diff(self.starts)[documents])
        skip = begin - (self.ends[a - 1] if a else 0)
        stream, number = (torch.from_numpy(x[skip:skip + B * W + 1].astype(np.int64))
                          for x in (stream, number))
        return stream[:-1].view(B, W), stream[1:].view(B, W), number[:-1].view(B, W)


def text_batches(data: Prepared, window: int, batch: int, total_tokens: int, seed: int,
                 mixture: str = "") -> PackedDocuments:
    """Batches of a data set's pretraining text for that many tokens, in the shares of its mixture;
    `mixture` changes them (`Prepared.mixture`)."""
    shares, early = data.mixture(mixture)
    return PackedDocuments(data.documents("train"), window=window, batch=batch,
                           total_tokens=total_tokens, seed=seed, shares=shares, early=early)


def warn_of_passes(batches: PackedDocuments, tokens: int) -> None:
    """Say so if this many tokens are many passes over a part of the text."""
    if batches.passes > 20:
        print(f"pretrain: warning: {tokens} tokens are up to {batches.passes} passes over a part of this data, which "
              "will be learned by heart: bring more text, or lower --tokens", file=sys.stderr)


TEXT_ROWS = 24  # of pretraining text beside PPO, in a step of the policy


def text_for(data: Prepared, tokenizer: Tokenizer, steps: int, longest: int, seed: int) -> PackedDocuments:
    """A batch of pretraining text for each step of a policy that reads rows of `longest` tokens at most;
    UserError unless the text is in its tokenizer's ids."""
    data.require_tokenizer().require_same(tokenizer, "pretraining text and policy")
    window = min(128, longest)
    return text_batches(data, window, TEXT_ROWS, steps * TEXT_ROWS * window, seed)


def eval_windows(tokens: np.ndarray, starts: np.ndarray, window: int,
                 batch: int) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """One fixed pass over a split: each token but the first is a target once. Yields (inputs,
    targets, docs, real), each (B, window); real is False where the last window is padded."""
    n = len(tokens) - 1
    number = np.searchsorted(starts, np.arange(n), side="right")
    for begin in range(0, n, window * batch):
        end = min(n, begin + window * batch)
        rows = -(-(end - begin) // window)
        padding = (0, rows * window - (end - begin))
        arrays = (tokens[begin:end], tokens[begin + 1:end + 1], number[begin:end])
        inputs, targets, docs = (
            torch.from_numpy(np.pad(x.astype(np.int64), padding).reshape(rows, window))
            for x in arrays)
        yield inputs, targets, docs, torch.arange(rows * window).view(rows, window) < end - begin


# ---- rollouts as the networks read them ----------------------------------------------------------

# Tokens that are read at once without gradients, padding included. More of them do not fit into a CPU's caches: a
# prompt's tokens then took 2.5 times as long (measured at 135 M, 2 cores).
TOKENS_AT_ONCE = {"cpu": 2**11, "mps": 2**11, "cuda": 2**13}


class Rows(NamedTuple):
    """Rows of a rollout with their padding moved to the right, as long as the longest of them.

    With right padding attention needs no mask: causality hides the pads.
    """

    tokens: Tensor  # (M, L) int64
    real: Tensor  # (M, L) bool: no padding
    reply: Tensor  # (M, L) bool: tokens of the reply
    before: Tensor  # (N,): the position before each reply token in the flattened (M, L), row by row
    targets: Tensor  # (N,): the reply tokens, in the same order
    below: Below = Below()  # hidden states (M, L, D) after the frozen blocks, where they are known


def make_rows(tokens: Tensor, real: Tensor, reply: Tensor) -> Rows:
    """Move each row's real tokens to its beginning, in the same order; all arguments (M, T)."""
    longest = int(real.sum(1).max())
    order = (~real).to(torch.uint8).argsort(dim=1, stable=True)[:, :longest]
    tokens, real, reply = (x.gather(1, order) for x in (tokens, real, reply))
    return Rows(tokens, real, reply, reply.flatten().nonzero()[:, 0] - 1, tokens[reply])


def similar_lengths(lengths: Tensor, most: int = 0) -> list[Tensor]:
    """Rows of these lengths (n,) in parts: indices of so many rows as have at most `most` tokens when padded to
    the longest of them (0: TOKENS_AT_ONCE), or of one row. All are one part, in their order, if they fit; else
    the shortest come first.

    >>> [part.tolist() for part in similar_lengths(torch.tensor([2, 9, 3, 4]), 12)]
    [[0, 2, 3], [1]]
    """
    most = most or TOKENS_AT_ONCE[lengths.device.type]
    order, parts, begin = lengths.argsort(stable=True), [], 0
    for i, length in enumerate(lengths[order].tolist()):
        if begin < i and (i + 1 - begin) * length > most:
            parts.append(order[begin:i])
            begin = i
    parts += [order[begin:]] if len(order) else []
    return parts if len(parts) != 1 else [parts[0].sort().values]


def prompts_to_read(tokens: Tensor, mask: Tensor,
                    block: int = 1) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor, int]]:
    """Left-padded prompts (B, P) in parts for one forward pass each. Equal prompts, side by side, are read once,
    and those of similar length together, without the columns that all of them leave empty.

    Yields (tokens and mask of a part (b, P − skip), the rows of the B that have its prompts (r,), which of the b
    each of these has (r,), skip); skip is a multiple of `block`.
    """
    other = (tokens[1:] != tokens[:-1]) | (mask[1:] != mask[:-1])
    first = functional.pad(other.any(1), (1, 0), value=True)
    source, tokens, mask = first.cumsum(0) - 1, tokens[first], mask[first]
    lengths = mask.sum(1)
    for part in similar_lengths(lengths):
        skip = tokens.shape[1] - int(lengths[part].max())
        skip -= skip % block
        yield tokens[part, skip:], mask[part, skip:], *(source[:, None] == part).nonzero(as_tuple=True), skip


def scatter_tokens(flat: Tensor, response_mask: Tensor) -> Tensor:
    """(N,) to (M, R): each value in its reply token's column, 0 elsewhere."""
    return flat.new_zeros(response_mask.shape).masked_scatter(response_mask, flat)
