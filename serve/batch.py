"""Replies that are written side by side: rows of one cache that join and leave between two steps.

A round of the engine's thread frees the rows of ended replies (`leave`), lets others take them
(`join`: prompts are read, first tokens chosen) and writes one token in every row (`step`). Rows have
their own sampling, random numbers and stop strings.
"""
import collections
import dataclasses
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from data.batches import pad_left
from data.tokenizer import Tokenizer
from model import Transformer
from runtime.decoding import KVCache, LayeredStep, compiled
from runtime.options import UserError
from sample import Decoder, Sampling, decode_step, prefill
from serve.replies import Reply, ReplyText

NOT_FINITE = ("probabilities of the next token are not finite numbers: the weights are damaged, or the "
              "temperature is too near 0 (0 itself takes the likeliest token)")


@dataclasses.dataclass(eq=False)
class Row:
    """A request, and its state while a row of the cache is its own."""

    reply: Reply
    prompt: tuple[int, ...]
    max_tokens: int
    sampling: Sampling
    u: list[float]  # a uniform number per token; empty for a greedy reply
    text: ReplyText
    token: int = 0  # the last one, which the next step reads
    start: int = 0  # the position in the cache of the prompt's first token
    slot: int = 0  # the position in the cache where `token` will stand
    seen: Tensor | None = None  # (V,) bool: tokens of the text so far, for the repetition penalty

    def __post_init__(self) -> None:
        # Rows with an equal `alike` choose their tokens in one call: all that draw from the
        # unfiltered softmax, whatever their temperatures.
        one = dataclasses.replace(self.sampling, temperature=1.0)
        unfiltered = self.sampling.temperature > 0 and one == Sampling(suppress=one.suppress)
        self.alike = one if unfiltered else self.sampling

    @property
    def positions(self) -> int:
        """The most positions of the cache that this row will need."""
        return self.start + len(self.prompt) + self.max_tokens

    def write(self, token: int) -> None:
        """Take the next token; its reader gets what text it makes certain."""
        reply, tokenizer = self.reply, self.text.tokenizer
        reply.ids.append(token)
        self.token, self.slot = token, self.slot + 1
        if self.seen is not None:
            self.seen[token] = True
        text, stopped = self.text.add(token)
        finish = "length" if len(reply.ids) == self.max_tokens else ""
        if stopped or token in tokenizer.end_ids:
            finish = "stop"
        if finish and not stopped:
            text += self.text.rest()
        if text or finish:
            reply.put(text, finish)


def last_part(model: Transformer, x: Tensor) -> Tensor:
    """The end of `decode_step`, from what the last block gives, x (B, 1, D) -> logits (B, V)."""
    return model.head(model.norm(x)[:, 0])


class Batch:
    """The rows in progress and their cache. One thread computes with it.

    rows: the most in progress. memory: bytes that keys and values may take. The cache is as long as its longest
    row needs for all of them, so that `fits` asks for rows times the longest. compile: see Decoder;
    a compiled step serves one number of rows, so the cache has one of a few.
    """

    PADDING, PREFILL = 1.5, 8192  # prompts are read together up to so much padding, and so many tokens
    GROWTH = 64  # the cache's length is a multiple

    def __init__(self, decoder: Decoder, tokenizer: Tokenizer, rows: int, memory: int):
        self.decoder, self.tokenizer, self.rows, self.device = decoder, tokenizer, rows, decoder.device
        factor = 4 if decoder.compile else 2
        self.sizes = [*(n for n in (factor**i for i in range(12)) if n < rows), rows]
        self.running: list[Row] = []  # they stand first in the cache, in this order
        self.cache: KVCache | None = None
        self.length = 0  # positions of the cache
        self.steps: dict[int, Callable[..., Tensor]] = {}  # compiled, by rows
        one = decoder.new_cache(1, 1).kv[:, 0, :, :, :1]
        self.room = memory // (one.numel() * one.element_size())  # positions of all rows
        if decoder.compile:
            self._compile_all()
        else:
            self._model(rows)  # packed now, not while somebody waits

    def clear(self) -> None:
        """Forget the rows, and give back the cache's memory."""
        self.running, self.cache, self.length = [], None, 0

    # ---- joining and leaving

    def fits(self, joining: Sequence[Row]) -> bool:
        """Whether these may join now, together: there are rows and memory for them, and they have prompts of
        like length, because padding is computed, too. One alone always may."""
        n = len(self.running) + len(joining)
        lengths = [len(prompt) for prompt in {row.prompt for row in joining}]
        padded, longest = max(lengths) * len(lengths), max(lengths)
        if n > self.rows or len(joining) > 1 and padded > min(self.PREFILL, self.PADDING * sum(lengths)):
            return False
        positions = max(*(row.positions for row in self.running), 0,
                        *(longest + row.max_tokens for row in joining))
        return n == 1 or self._size(n) * positions <= self.room

    def join(self, joining: Sequence[Row]) -> None:
        """Read the prompts of rows that fit, equal ones once, and choose their first tokens."""
        prompts = list(dict.fromkeys(row.prompt for row in joining))
        tokens, mask = (t.to(self.device) for t in pad_left(prompts, self.tokenizer.pad_id))
        P, n = tokens.shape[1], len(self.running) + len(joining)
        for row in joining:
            row.start, row.slot = P - len(row.prompt), P - 1
            if row.sampling.repetition_penalty != 1:
                row.seen = torch.zeros(self.tokenizer.n_vocab, dtype=torch.bool, device=self.device)
                row.seen[list(row.prompt)] = True
        self._make_room(n, P, max(row.positions for row in (*self.running, *joining)))
        cache = self.decoder.new_cache(len(prompts), P)
        logits = prefill(self._model(self.cache.kv.shape[2]), tokens, mask, cache)
        index = torch.tensor([prompts.index(row.prompt) for row in joining], device=self.device)
        self.cache.put(torch.arange(len(self.running), n, device=self.device), cache, index, P)
        self.running += joining
        self._choose(joining, logits[index])

    def leave(self) -> None:
        """Free the rows of ended replies: the last row moves to the free place."""
        i = 0
        while i < len(self.running):
            if not self.running[i].reply.done:
                i += 1
                continue
            last = self.running.pop()
            if i < len(self.running):
                self.running[i] = last
                if not last.reply.done:
                    n = -(-last.slot // self.cache.size)
                    kv = self.cache.kv[:, :n, :, :, :last.slot]
                    kv[:, :, i] = kv[:, :, len(self.running)]

    def _size(self, rows: int) -> int:
        """The number of rows of a cache for so many."""
        return next(size for size in self.sizes if size >= rows)

    def _make_room(self, rows: int, length: int, most: int) -> None:
        """Give the cache at least so many rows and positions: where it has fewer, twice the positions, up
        to the `most` that its rows may come to need."""
        size, old = self._size(rows), self.cache
        length = max(length, *(row.slot + 1 for row in self.running), 0)
        if old is not None and self.length >= length:
            has = old.kv.shape[2]
            if has == size or has > size and not self.decoder.compile:
                return
        self.length = -(-min(2 * length, most) // self.GROWTH) * self.GROWTH
        self.cache = self.decoder.new_cache(size, self.length)
        if n := len(self.running):
            at = torch.arange(n, device=self.device)
            self.cache.put(at, old, at, max(row.slot for row in self.running))

    # ---- writing

    def _model(self, rows: int) -> Transformer:
        """The weights packed for a step of so many rows."""
        return self.decoder.model_for(rows if self.decoder.compile else self.rows)

    def _step_of(self, rows: int) -> Callable[..., Tensor]:
        """The function of a step: (model, token, slot, start, cache, span) -> logits (rows, V)."""
        d = self.decoder
        if not d.compile:
            return decode_step
        if rows not in self.steps:
            self.steps[rows] = (LayeredStep(last_part, d.group, d.device) if d.layered
                                else compiled(decode_step, d.device))
        return self.steps[rows]

    @torch.no_grad()
    def _compile_all(self) -> None:
        """Compile the steps now, not while somebody waits."""
        for size in self.sizes:
            cache = self.decoder.new_cache(size, self.GROWTH)
            # Three tensors: Dynamo would take one tensor for all three, and no guard would see others.
            zeros = (torch.zeros(size, dtype=torch.int64, device=self.device) for _ in range(3))
            self._step_of(size)(self._model(size), *zeros, cache, cache.span(1))

    def step(self) -> None:
        """One more token in every row."""
        n, longest = len(self.running), max(row.slot for row in self.running) + 1
        self._make_room(n, longest, max(row.positions for row in self.running))
        # An eager step computes n rows, a compiled one all of the cache.
        size = self.cache.kv.shape[2] if self.decoder.compile else n
        cache = self.cache if size == self.cache.kv.shape[2] else self.cache.first(n)
        idle = [0] * (size - n)
        token, slot, start = torch.tensor(
            [[getattr(row, name) for row in self.running] + idle for name in ("token", "slot", "start")],
            device=self.device)
        logits = self._step_of(size)(self._model(size), token, slot, start, cache, cache.span(longest))
        self._choose(self.running, logits[:n])

    def _choose(self, rows: Sequence[Row], logits: Tensor) -> None:
        """Write each row's next token, chosen from its logits (len(rows), V) as its sampling says."""
        together = collections.defaultdict(list)
        for i, row in enumerate(rows):
            together[row.alike].append(i)
        for sampling, at in together.items():
            group = [rows[i] for i in at]
            chosen = (logits if len(at) == len(rows) else logits[at]).float()
            u = seen = None
            if sampling.temperature > 0:
                scale = [[row.sampling.temperature / sampling.temperature] for row in group]
                chosen = chosen / torch.tensor(scale, device=self.device)
                u = torch.tensor([row.u[len(row.reply.ids)] for row in group], device=self.device)
            if sampling.repetition_penalty != 1:
                seen = torch.stack([row.seen for row in group])
            pair = torch.stack([x.double() for x in sampling.choose(chosen, seen, u)])  # one copy from a GPU
            for row, token, logprob in zip(group, *pair.tolist(), strict=True):
                if math.isfinite(logprob):
                    row.write(int(token))
                else:
                    self.cache.kv.nan_to_num_(0, 0, 0)  # masked positions still contribute 0 · NaN
                    row.reply.put("", "error", UserError(NOT_FINITE))
