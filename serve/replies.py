"""Replies in progress: what their readers hold, and how tokens become text that is certain.

Whoever writes replies (serve/engine.py) puts text and the end into a `Reply`, from a thread of its
own; its reader takes what is there whenever it likes.
"""
import codecs
import threading
from collections.abc import Callable, Iterator, Sequence

from data.tokenizer import Tokenizer


class Busy(Exception):
    """As many requests wait as may: ask again later."""


class Failed(Exception):
    """The decoder failed while this reply was written, or writes no more."""


class Reply:
    """A reply in progress: iterate over it for its text, piece by piece, each of whole characters.

    What is not read yet waits here, so a slow reader holds up nobody. `ids` has the tokens so far,
    the end token included. An error ends the iteration, and `result`, with that error.
    """

    def __init__(self, prompt_tokens: int):
        self.prompt_tokens, self.ids = prompt_tokens, list[int]()
        self.finish = ""  # why it ended: "stop", "length", "cancelled" or "error"
        self.cancelled, self.error = False, None
        self._pieces, self._taken = list[str](), 0
        self._changed = threading.Condition()
        self._listener: Callable[[], object] = lambda: None

    @property
    def done(self) -> bool:
        return bool(self.finish)

    @property
    def usage(self) -> tuple[int, int]:
        """(tokens of the prompt, tokens of the reply so far)."""
        return self.prompt_tokens, len(self.ids)

    def take(self) -> str:
        """All text that was not taken yet, without waiting; "" if there is none."""
        with self._changed:
            text = "".join(self._pieces[self._taken:])
            self._taken = len(self._pieces)
        return text

    def __iter__(self) -> Iterator[str]:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self.done or self._taken < len(self._pieces))
                done = self.done
            if text := self.take():
                yield text
            if done:
                break
        if self.error:
            raise self.error

    def result(self, timeout: float | None = None) -> tuple[str, list[int], str]:
        """(text, ids, finish) of the whole reply, once it has ended. TimeoutError after `timeout`
        seconds; the decoder's error, if there was one."""
        with self._changed:
            if not self._changed.wait_for(lambda: self.done, timeout):
                raise TimeoutError(f"this reply has not ended within {timeout:g} s")
        if self.error:
            raise self.error
        return "".join(self._pieces), self.ids, self.finish

    def cancel(self) -> None:
        """End it at the next step, if it has not ended by then; what was written stays."""
        self.cancelled = True

    def listen(self, listener: Callable[[], object]) -> None:
        """Call this now and after every change, from the decoder's thread: it must not wait."""
        self._listener = listener
        listener()

    def put(self, text: str, finish: str = "", error: Exception | None = None) -> None:
        """Add text, and say that this was all. For whoever writes the reply."""
        with self._changed:
            if text:
                self._pieces.append(text)
            self.error, self.finish = error, finish
            self._changed.notify_all()
        try:
            self._listener()
        except RuntimeError:  # the listener's event loop was closed: nobody reads on
            self.cancel()


class ReplyText:
    """From tokens to text that is certain: whole characters, and no beginning of a stop string.

    What it gives does not depend on where tokens begin and end: the text is cut as if it were read
    character by character until it ends in a stop string.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()):
        self.tokenizer, self.stop = tokenizer, tuple(stop)
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.held, self.is_first = "", True

    def add(self, token: int) -> tuple[str, bool]:
        """(the text that this token makes certain, whether a stop string has come)."""
        seen = self.tokenizer.reply_bytes(token, self.is_first)
        self.is_first = False
        return self._read(self.decoder.decode(seen))

    def rest(self) -> str:
        """What is left at the reply's end; bytes that are no complete character become �."""
        text, stopped = self._read(self.decoder.decode(b"", final=True))
        return text if stopped else text + self.held

    def _read(self, new: str) -> tuple[str, bool]:
        text = self.held + new
        if found := [(at + len(s), at) for s in self.stop if (at := text.find(s)) >= 0]:
            self.held = ""
            return text[:min(found)[1]], True
        held = max((n for s in self.stop for n in range(1, len(s)) if text.endswith(s[:n])), default=0)
        self.held = text[len(text) - held:]
        return text[:len(text) - held], False
