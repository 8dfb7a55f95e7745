"""One decoder for many conversations at once: continuous batching.

    engine = Engine("out/reviews/sft")
    reply = engine.submit(ids, max_tokens=64, seed=1)
    for piece in reply:
        print(piece, end="", flush=True)

One thread computes (serve/batch.py). A request joins and leaves between two steps of the others, each
has its own sampling and random numbers, and a reply equals the one that `sample.generate` writes
alone, up to the logits' rounding.
"""
import collections
import dataclasses
import pathlib
import sys
import threading
import traceback
from collections.abc import Sequence

import torch

from runtime.draws import uniform_numbers
from runtime.options import UserError
from runtime.storage import checkpoint_path
from sample import ChatSession, Decoder, SampleOptions, Sampling, require_room
from serve.batch import Batch, Row
from serve.replies import Busy as Busy, Failed as Failed, Reply as Reply, ReplyText


def name_of(path: str) -> str:
    """A short name of a checkpoint: the last two folders of its path."""
    place = pathlib.Path(path)
    if not checkpoint_path(place).exists():
        return place.name or path
    return "/".join(checkpoint_path(place).resolve().parent.parts[-2:])


class Engine:
    """A checkpoint that writes replies to many at once.

    rows: the most replies in progress. most_waiting: the most requests that wait for a row. memory:
    bytes that keys and values may take; requests wait for room. compile: compile the step for a few
    numbers of rows before the constructor returns.
    """

    MOST_TOKENS = 2048  # of one reply

    def __init__(self, path: str, *, rows: int = 16, device: str = "auto", dtype: str = "auto",
                 compile: bool = False, most_waiting: int = 64, memory: int = 2 << 30):
        session = ChatSession(path, SampleOptions(device=device, dtype=dtype))
        self.name, self.hash = name_of(path), session.state["hash"] or ""
        self.tokenizer, self.template, self.bare = session.tokenizer, session.template, session.bare
        self.model, self.state, o = session.model, session.state, session.o
        self.max_len, self.most_waiting = self.model.config.max_len, most_waiting
        # Control tokens are never written, except the end.
        self.suppress = tuple(i for i in self.tokenizer.special_ids if i not in self.tokenizer.end_ids)
        self.sampling = Sampling(o.temperature, o.top_k, o.top_p, o.repetition_penalty, self.suppress)
        self.decoder = Decoder(self.model, session.dtype, compile)
        self.decoder.in_use.acquire()  # it belongs to this engine's thread
        self.batch = Batch(self.decoder, self.tokenizer, rows, memory)
        self.waiting, self.joining = collections.deque[Row](), list[Row]()
        self._work, self._closing, self._dead = threading.Condition(), False, ""
        self._thread = threading.Thread(target=self._run, name=f"engine {self.name}", daemon=True)
        self._thread.start()

    def submit(self, ids: Sequence[int], *, max_tokens: int, sampling: Sampling | None = None,
               seed: int = 0, row: int = 0, stop: Sequence[str] = ()) -> Reply:
        """Ask for one reply to a prompt's ids, that which `generate` writes for (seed, row) with this
        sampling, by default the checkpoint's own; control tokens other than ends are suppressed.

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
        sampling = dataclasses.replace(sampling, suppress=tuple(sorted({*sampling.suppress, *self.suppress})))
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
        """Write until the engine is closed. An error ends the replies in progress, whose cache it may
        have damaged; those that wait go on."""
        try:
            with torch.no_grad():
                while self._has_work():
                    try:
                        self._round()
                    except Exception as error:
                        traceback.print_exc(file=sys.stderr)
                        self._fail(f"the decoder failed ({type(error).__name__}): ask again", error)
        except BaseException as error:  # nothing more can be computed
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
            if not self.batch.running and not self.waiting:
                self.batch.clear()  # the next request may need another size
            self._work.wait_for(lambda: self._closing or self.waiting or self.batch.running)
            return not self._closing

    def _round(self) -> None:
        """Free rows, let others join, write one token in every row."""
        batch = self.batch
        self._end_cancelled()
        batch.leave()
        with self._work:
            while self.waiting and batch.fits([*self.joining, self.waiting[0]]):
                self.joining.append(self.waiting.popleft())
        if self.joining:
            batch.join(self.joining)
            self.joining = []
            batch.leave()
        if batch.running:
            batch.step()

    def _end_cancelled(self) -> None:
        with self._work:
            gone = [row for row in self.waiting if row.reply.cancelled]
            for row in gone:
                self.waiting.remove(row)
        for row in [*gone, *self.batch.running]:
            if row.reply.cancelled and not row.reply.done:
                row.reply.put(row.text.rest(), "cancelled")

    def _fail(self, message: str, cause: Exception | None = None) -> None:
        """End the replies in progress by an error."""
        rows, self.joining = [*self.batch.running, *self.joining], []
        self.batch.clear()
        for row in rows:
            if not row.reply.done:
                error = Failed(message)
                error.__cause__ = cause
                row.reply.put("", "error", error)
