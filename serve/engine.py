"""One decoder for many conversations at once: continuous batching.

    engine = Engine("out/reviews/sft")
    reply = engine.submit(ids, max_tokens=64, sampling=engine.sampling, seed=1)
    for piece in reply:
        print(piece, end="", flush=True)

One thread computes. In each round it lets waiting requests take the free rows (their prompts are read, and
their first tokens chosen) and then writes one token in every row. So a request joins and leaves
between two steps of the others, each row has its own sampling and random numbers, and a reply equals
the one that `sample.generate` writes alone, up to the logits' rounding.
"""
import collections
import dataclasses
import math
import pathlib
import sys
import threading
import traceback
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from data.batches import pad_left
from model import Transformer
from runtime.decoding import KVCache, LayeredStep, compiled
from runtime.draws import uniform_numbers
from runtime.options import UserError
from runtime.storage import checkpoint_path
from sample import ChatSession, Decoder, SampleOptions, Sampling, decode_step, prefill, require_room
from serve.replies import Busy, Failed, Reply, ReplyText


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

    @property
    def positions(self) -> int:
        """The most positions of the cache that this row will need."""
        return self.start + len(self.prompt) + self.max_tokens

    def __post_init__(self) -> None:
        # Rows with an equal `alike` choose their tokens in one call: all that draw from the
        # unfiltered softmax, whatever their temperatures.
        one = dataclasses.replace(self.sampling, temperature=1.0)
        unfiltered = self.sampling.temperature > 0 and one == Sampling(suppress=one.suppress)
        self.alike = one if unfiltered else self.sampling


# ---- the engine ----------------------------------------------------------------------------------

def name_of(path: str) -> str:
    """A short name of a checkpoint: the last two folders of its path."""
    place = pathlib.Path(path)
    if not checkpoint_path(place).exists():
        return place.name or path
    return "/".join(checkpoint_path(place).resolve().parent.parts[-2:])


class Engine:
    """A checkpoint that writes replies to many at once.

    rows: the most replies in progress. most_waiting: the most requests that wait for a row. memory:
    bytes that keys and values of all rows may take; requests wait for room. Rows of the cache stand side
    by side, so its size is rows times the longest of them. One that writes alone always has room. compile: compiles
    the step for a few numbers of rows, before the constructor returns.
    """

    PADDING, PREFILL = 1.5, 8192  # prompts are read together up to so much padding, and so many tokens
    GROWTH = 64  # positions; the cache grows by doubling, in multiples of this
    MOST_TOKENS = 2048  # of one reply

    def __init__(self, path: str, *, rows: int = 16, device: str = "auto", dtype: str = "auto",
                 compile: bool = False, most_waiting: int = 64, memory: int = 2 << 30):
        session = ChatSession(path, SampleOptions(device=device, dtype=dtype))
        self.name, self.hash = name_of(path), session.state["hash"] or ""
        self.tokenizer, self.template, self.bare = session.tokenizer, session.template, session.bare
        self.model, self.state, o = session.model, session.state, session.o
        self.max_len = self.model.config.max_len
        # Control tokens are never written, except the end.
        self.suppress = tuple(i for i in self.tokenizer.special_ids if i not in self.tokenizer.end_ids)
        self.sampling = Sampling(o.temperature, o.top_k, o.top_p, o.repetition_penalty, self.suppress)
        self.decoder = Decoder(self.model, session.dtype, compile)
        self.device, self.rows, self.most_waiting = self.decoder.device, rows, most_waiting
        # Numbers of rows that the cache may have. A compiled step is specialised on it.
        factor = 4 if compile else 2
        self.sizes = [*(n for n in (factor**i for i in range(12)) if n < rows), rows]
        self.cache: KVCache | None = None  # of the rows in progress, which stand first in it
        self.length = 0  # positions that the cache has
        self.steps: dict[int, Callable[..., Tensor]] = {}  # compiled, by rows
        one = self.decoder.new_cache(1, 1).kv
        self.room = memory // (one[:, 0, :, :, :1].numel() * one.element_size())  # positions of all rows
        self.running, self.joining = list[Row](), list[Row]()
        self.waiting = collections.deque[Row]()
        self._work, self._closing, self._dead = threading.Condition(), False, ""
        self.decoder.in_use.acquire()  # it is this thread's alone
        if compile:
            self._compile_all()
        self._thread = threading.Thread(target=self._run, name=f"engine {self.name}", daemon=True)
        self._thread.start()

    def submit(self, ids: Sequence[int], *, max_tokens: int, sampling: Sampling | None = None,
               seed: int = 0, row: int = 0, stop: Sequence[str] = ()) -> Reply:
        """Ask for one reply to a prompt's ids. It is the function of (seed, row) and the sampling
        that `generate` computes; control tokens other than ends are suppressed.

        stop: texts before which the reply is cut. UserError if the prompt is empty or too long,
        `Busy` if too many wait, `Failed` if the engine writes no more.
        """
        if not ids:
            raise UserError("an empty prompt: give at least one token to continue")
        if not 1 <= max_tokens <= self.MOST_TOKENS:
            raise UserError(f"a reply of up to {max_tokens} tokens: ask for 1 to {self.MOST_TOKENS}")
        if "" in stop:
            raise UserError("an empty stop string: leave it out")
        require_room(self.model, len(ids), max_tokens)
        sampling = sampling or self.sampling
        sampling = dataclasses.replace(
            sampling, suppress=tuple(sorted({*sampling.suppress, *self.suppress})))
        u = uniform_numbers(seed, [row], max_tokens)[0].tolist() if sampling.temperature > 0 else []
        new = Row(Reply(len(ids)), tuple(ids), max_tokens, sampling, u, ReplyText(self.tokenizer, stop))
        with self._work:
            if self._closing or self._dead:
                raise Failed(self._dead or "the engine was closed")
            if len(self.waiting) >= self.most_waiting:
                raise Busy(f"{len(self.waiting)} requests wait already: ask again later")
            self.waiting.append(new)
            self._work.notify()
        return new.reply

    def close(self) -> None:
        """End the thread at the next step. Replies in progress end with `Failed`."""
        with self._work:
            self._closing = True
            self._work.notify()
        self._thread.join()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- the thread

    def _run(self) -> None:
        """Write until the engine is closed. An error ends the replies that it may have damaged."""
        try:
            with torch.no_grad():
                while self._has_work():
                    try:
                        self._leave()
                        self._admit()
                        if self.running:
                            self._step()
                    except Exception as error:
                        traceback.print_exc(file=sys.stderr)
                        self._fail(f"the decoder failed ({type(error).__name__}): ask again", error)
        except BaseException as error:  # such as MemoryError's kin: nothing more can be computed
            self._dead = f"the decoder ended ({type(error).__name__}): start the server again"
            raise
        finally:
            with self._work:
                self._dead = self._dead or "the engine was closed"
                self.joining += self.waiting
                self.waiting.clear()
            self._fail(self._dead)

    def _has_work(self) -> bool:
        """Wait for something to do; False if the engine is to close."""
        with self._work:
            if not self.running and not self.waiting:
                self.cache = None  # of an idle engine: the next request may need another size
            self._work.wait_for(lambda: self._closing or self.waiting or self.running)
            return not self._closing

    def _fail(self, message: str, cause: Exception | None = None) -> None:
        """End the replies in progress by an error."""
        rows, self.running, self.joining, self.cache = [*self.running, *self.joining], [], [], None
        for row in rows:
            if not row.reply.done:
                error = Failed(message)
                error.__cause__ = cause
                row.reply.put("", "error", error)

    def _leave(self) -> None:
        """Free the rows of cancelled and ended replies: the last row moves to each free place, so that
        rows in progress stand first."""
        with self._work:
            gone = [row for row in self.waiting if row.reply.cancelled]
            for row in gone:
                self.waiting.remove(row)
        for row in gone + [row for row in self.running if row.reply.cancelled and not row.reply.done]:
            row.reply.put(row.text.rest(), "cancelled")
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

    # ---- joining

    def _admit(self) -> None:
        """Read the prompts of some waiting requests and choose their first tokens. Equal prompts are
        read once."""
        with self._work:
            self.joining = self._next()
        if not self.joining:
            return
        prompts = list(dict.fromkeys(row.prompt for row in self.joining))
        tokens, mask = (t.to(self.device) for t in pad_left(prompts, self.tokenizer.pad_id))
        P, n = tokens.shape[1], len(self.running) + len(self.joining)
        self._make_room(n, P + 1)
        cache = self.decoder.new_cache(len(prompts), P)
        logits = prefill(self._model(self.cache.kv.shape[2]), tokens, mask, cache)
        index = torch.tensor([prompts.index(row.prompt) for row in self.joining], device=self.device)
        self.cache.put(torch.arange(len(self.running), n, device=self.device), cache.keep(index), P)
        for row in self.joining:
            row.start, row.slot = P - len(row.prompt), P - 1
            if row.sampling.repetition_penalty != 1:
                row.seen = torch.zeros(self.model.config.vocab_size, dtype=torch.bool, device=self.device)
                row.seen[list(row.prompt)] = True
        new, self.joining = self.joining, []
        self.running += new
        self._choose(new, logits[index])
        self._leave()

    def _next(self) -> list[Row]:
        """Take from the queue, in its order, what fits into the free rows and the memory, and has prompts of like
        length: the others' padding would have to be computed, too."""
        group, longest = list[Row](), max((row.positions for row in self.running), default=0)
        while self.waiting and len(self.running) + len(group) < self.rows:
            prompts = {row.prompt for row in (*group, self.waiting[0])}
            lengths = [len(prompt) for prompt in prompts]
            padded = max(lengths) * len(lengths)
            if group and padded > min(self.PREFILL, self.PADDING * sum(lengths)):
                break
            together = [*group, self.waiting[0]]
            positions = max(longest, *(max(lengths) + row.max_tokens for row in together))
            n = len(self.running) + len(together)
            if n > 1 and self._size(n) * positions > self.room:
                break
            group.append(self.waiting.popleft())
        return group

    def _size(self, rows: int) -> int:
        """The number of rows of a cache for so many."""
        return next(size for size in self.sizes if size >= rows)

    def _make_room(self, rows: int, length: int) -> None:
        """Give the cache at least so many rows and positions: where it has fewer, twice the positions, as
        far as its rows may come to need them."""
        size, old = self._size(rows), self.cache
        if old is not None and self.length >= length:
            has = old.kv.shape[2]
            if has == size or has > size and not self.decoder.compile:
                return
        reserved = max(row.positions for row in (*self.running, *self.joining))
        self.length = -(-min(2 * length, reserved) // self.GROWTH) * self.GROWTH
        self.cache = self.decoder.new_cache(size, self.length)
        if n := len(self.running):
            at = torch.arange(n, device=self.device)
            self.cache.put(at, old.keep(slice(n)), max(row.slot for row in self.running))

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
            zero = torch.zeros(size, dtype=torch.int64, device=self.device)
            self._step_of(size)(self._model(size), zero, zero, zero, cache, cache.span(1))

    def _step(self) -> None:
        """One more token in every row."""
        n, longest = len(self.running), max(row.slot for row in self.running) + 1
        self._make_room(n, longest)
        # An eager step computes n rows, a compiled one all of the cache.
        size = self.cache.kv.shape[2] if self.decoder.compile else n
        cache = self.cache if size == self.cache.kv.shape[2] else self.cache.keep(slice(n))
        idle = [0] * (size - n)
        token, slot, start = torch.tensor(
            [[getattr(row, name) for row in self.running] + idle for name in ("token", "slot", "start")],
            device=self.device)
        logits = self._step_of(size)(self._model(size), token, slot, start, cache, cache.span(longest))
        self._choose(self.running, logits[:n])

    def _choose(self, rows: Sequence[Row], logits: Tensor) -> None:
        """Choose each row's next token from its logits (len(rows), V), as its sampling says."""
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
                self._write(row, int(token), logprob)

    def _write(self, row: Row, token: int, logprob: float) -> None:
        """Give a row its next token, and the reader what text that makes certain."""
        reply = row.reply
        if not math.isfinite(logprob):
            self.cache.kv.nan_to_num_(0, 0, 0)  # masked positions still contribute 0 · NaN
            reply.put("", "error", UserError("probabilities of the next token are not finite numbers: the weights "
                                             "are damaged, or the temperature is too near 0"))
            return
        reply.ids.append(token)
        row.token, row.slot = token, row.slot + 1
        if row.seen is not None:
            row.seen[token] = True
        text, stopped = row.text.add(token)
        finish = "length" if len(reply.ids) == row.max_tokens else ""
        if stopped or token in self.tokenizer.end_ids:
            finish = "stop"
        if finish and not stopped:
            text += row.text.rest()
        if text or finish:
            reply.put(text, finish)


def last_part(model: Transformer, x: Tensor) -> Tensor:
    """The end of `decode_step`, from what the last block gives, x (B, 1, D) -> logits (B, V)."""
    return model.head(model.norm(x)[:, 0])
