"""Sampling: write tokens one after another, each drawn from what the model expects next.

    python sample.py --from out/reviews/ppo --prompt "这本书"      complete one prompt, printed as it is written
    python sample.py --from out/reviews/ppo --chat                 talk: Ctrl-C stops an answer, Ctrl-D leaves
    python sample.py --from out/reviews/ppo --file prompts.jsonl   one JSON line per prompt, for other programs
    python sample.py --from out/reviews/sft --prompt "这本书" --best_of 16      sixteen replies, the best one last
    python sample.py --compare out/reviews/sft out/reviews/ppo     same openings and random numbers, one below the other

`generate` is also the rollout engine of PPO: there it draws from the whole softmax at one
temperature, nothing else.
"""
import codecs
import dataclasses
import itertools
import json
import sys
import threading
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from data.batches import pad_left, prompt_ids
from data.records import apply_template, load_records, prompt_text
from data.tokenizer import Tokenizer
from model import Transformer, attention_allowed, checkpoint_path, load_checkpoint
from reward import RewardModel
from runtime.decoding import KVCache, decoding_copy, refresh
from runtime.device import pick_device, pick_dtype
from runtime.draws import uniform_numbers
from runtime.options import Options, UserError, option, parse, run_main

# ---- choosing one token --------------------------------------------------------------------------

def penalise_repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Make tokens that occur in the text already less likely (Keskar 2019): logits (B, V), seen (B,
    V) bool."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def filter_logits(logits: Tensor, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Keep the k likeliest tokens, then the smallest set of them that holds probability p (Holtzman
    2020); (B, V)."""
    if 0 < top_k < logits.shape[-1]:
        smallest = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    if top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True)
        probs = ordered.softmax(-1)
        # mass before this token already suffices; never true for the first
        beyond = probs.cumsum(-1) - probs >= top_p
        logits = logits.masked_fill(beyond.scatter(-1, order, beyond), -torch.inf)
    return logits


def draw(weights: Tensor, u: Tensor) -> Tensor:
    """Inverse transform sampling: the first token whose cumulated probability exceeds u.

    weights (B, V) ≥ 0, probabilities up to a factor, u (B,) in [0, 1) -> (B,).

    In two steps, which read the vocabulary once: sums of blocks of 64 tokens say in which block the
    token lies, and only that block is cumulated. A threshold is u times the last sum and kept below
    it, so that a token of weight 0 is never picked: not by u = 0, because its cumulated value does
    not exceed its predecessor's, nor by rounding.
    """
    def first_above(cumulated: Tensor, threshold: Tensor) -> Tensor:
        total = cumulated[:, -1:]
        threshold = torch.minimum(threshold, torch.nextafter(total, torch.zeros_like(total)))
        return (cumulated <= threshold).sum(1, keepdim=True)

    B, V = weights.shape
    blocks = F.pad(weights, (0, -V % 64)).view(B, -1, 64)
    sums = blocks.sum(2).cumsum(1)
    threshold = u[:, None] * sums[:, -1:]
    block = first_above(sums, threshold)
    before = torch.where(block > 0, sums.gather(1, (block - 1).clamp(min=0)), 0)
    inside = blocks.gather(1, block[:, :, None].expand(B, 1, 64))[:, 0].cumsum(1)
    return (64 * block + first_above(inside, threshold - before))[:, 0]


def choose(logits: Tensor, u: Tensor | None) -> tuple[Tensor, Tensor]:
    """(token, its log-probability), each (B,), from logits (B, V) at their temperature; u None: the
    likeliest."""
    logits = logits - logits.amax(1, keepdim=True)
    weights = logits.exp()
    token = logits.argmax(1) if u is None else draw(weights, u)
    return token, logits.gather(1, token[:, None])[:, 0] - weights.sum(1).log()


# ---- the two halves of decoding ------------------------------------------------------------------

def prefill(model: Transformer, tokens: Tensor, mask: Tensor, cache: KVCache) -> Tensor:
    """Read whole prompts (B, P), left-padded, into the cache; logits (B, V) of the token after
    each."""
    positions = (mask.long().cumsum(1) - 1).clamp(min=0)
    allowed = None if bool(mask.all()) else attention_allowed(mask, None)
    last = torch.arange(1, len(tokens) + 1, device=tokens.device) * tokens.shape[1] - 1
    return model.head(model.trunk(tokens, positions, allowed, cache, last))


def decode_step(model: Transformer, token: Tensor, slot: Tensor, start: Tensor, cache: KVCache,
                span: Tensor) -> Tensor:
    """One token per row (B,), at position `slot` (B,) of the cache, its text from position `start`
    (B,) on -> logits (B, V). span: the positions to read (KVCache.span)."""
    return model.head(model.step(token, slot, start, span, cache))


def sample_step(model: Transformer, token: Tensor, slot: Tensor, start: Tensor, cache: KVCache,
                span: Tensor, u: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """A step and the choice of its token, as one function to compile: (token, log-probability),
    each (B,)."""
    return choose(decode_step(model, token, slot, start, cache, span).float() / temperature, u)


_step_numbers = itertools.count()


class Decoder:
    """A model made ready to write: its weights packed, room for keys and values, its steps
    compiled.

    `generate` makes one if none is given. Whoever writes many times keeps one, and calls `refresh`
    after the weights have changed, which compiles nothing again. One thread writes with it at a
    time.
    """

    def __init__(self, model: Transformer, dtype: str | None = None, compile: bool = False):
        self.model, self.compile, self.device = model, compile, model.embedding.weight.device
        self.dtype = {"bfloat16": torch.bfloat16, "int8": torch.int8}.get(dtype,
                                                                          model.embedding.weight.dtype)
        if self.dtype == torch.int8 and self.device.type != "cpu":
            raise UserError("int8 is for writing on a CPU; on this device use bfloat16")
        self.copies: dict[int, Transformer] = {}  # with packed weights, by rows
        self.steps: dict[tuple[int, float], Callable] = {}  # compiled, by rows and temperature
        # that of the last call, by rows and length
        self.caches: dict[tuple[int, int], KVCache] = {}
        self.in_use = threading.Lock()

    def refresh(self) -> None:
        """Take the model's weights as they are now."""
        for model in self.copies.values():
            refresh(model)
        for cache in self.caches.values():
            cache.kv.zero_()  # had weights been NaN, what they left here would count for 0 · NaN

    def model_for(self, rows: int) -> Transformer:
        """The model with weights packed for steps of `rows` rows. An eager copy serves fewer rows,
        too."""
        rows = rows if self.compile else max((rows, *self.copies))
        if rows not in self.copies:
            if not self.compile:
                self.copies.clear()
            self.copies[rows] = decoding_copy(self.model, self.dtype, rows)
        return self.copies[rows]

    def cache(self, rows: int, length: int) -> KVCache:
        """Room for keys and values; that of the last call if it fits."""
        if (rows, length) not in self.caches:
            self.caches = {(rows, length): self.new_cache(rows, length)}
        return self.caches[rows, length]

    def new_cache(self, rows: int, length: int) -> KVCache:
        dtype = self.dtype if self.dtype.is_floating_point else torch.bfloat16
        return KVCache(self.model.config, rows, length, self.device, dtype, self.compile)

    def step(self, rows: int, temperature: float) -> Callable:
        """`sample_step`, compiled once for each number of rows, whatever the length.

        Each has a code object of its own, so on a CPU none of torch.compile's guards need be
        checked at every token: what they would guard is fixed by this decoder and the key. (On a
        GPU they also ensure that 32-bit indices suffice.) On a CPU calls go through C++, not
        Python.
        """
        if not self.compile:
            return sample_step
        if (rows, temperature) not in self.steps:
            options = {}
            if self.device.type == "cpu":  # allocate once, check no sizes: they follow from the key
                options = {"cpp_wrapper": True, "memory_planning": True, "size_asserts": False}
                if skip := getattr(torch.compiler, "skip_all_guards_unsafe", None):
                    options["guard_filter_fn"] = skip
            # dynamic sizes are remembered by name, even across models
            name = f"sample_step_{next(_step_numbers)}"
            code = sample_step.__code__.replace(co_name=name)
            self.steps[rows, temperature] = torch.compile(types.FunctionType(code,
                                                                             sample_step.__globals__),
                                                          options=options)
        return self.steps[rows, temperature]


# ---- writing replies -----------------------------------------------------------------------------

@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a token is chosen from logits. PPO uses the plain softmax at a temperature, nothing else.
    """

    temperature: float = 1.0  # 0: greedy
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    suppress: tuple[int, ...] = ()  # ids that are never written

    @property
    def plain(self) -> bool:
        """The whole softmax at a temperature: then step and choice are one compiled function."""
        return self.temperature > 0 and self == Sampling(self.temperature)

    def choose(self, logits: Tensor, seen: Tensor | None, u: Tensor | None) -> tuple[Tensor,
                                                                                     Tensor]:
        """(token, its log-probability), each (B,), from logits (B, V). seen (B, V): tokens of the
        text so far."""
        logits = logits.float()
        if self.suppress:
            logits[:, list(self.suppress)] = -torch.inf
        if seen is not None:
            logits = penalise_repetition(logits, seen, self.repetition_penalty)
        if self.temperature > 0:
            logits = filter_logits(logits / self.temperature, self.top_k, self.top_p)
        return choose(logits, u)


@dataclasses.dataclass
class Generation:
    """tokens (B, R) int64, mask (B, R) bool: True up to and including the end token, logprobs (B,
    R) float32. After the end: id 0, mask False, log-probability 0."""

    tokens: Tensor
    mask: Tensor
    logprobs: Tensor


class Writer:
    """Replies in progress. Each of B rows answers one prompt; when its reply ends, the next prompt
    takes the row (continuous batching)."""

    CHECK_EVERY = 8  # steps between checks for ended rows: each check makes a GPU wait

    def __init__(self, decoder: Decoder, prompts: tuple[Tensor, Tensor], reply_len: int,
                 sampling: Sampling, rows: int, u: Tensor | None, end_id: int | None,
                 on_token: Callable[[Tensor, Tensor], None] | None):
        """prompts: tokens and mask, each (n, P). u (n, reply_len): uniform numbers, None for greedy
        replies."""
        self.decoder, (self.tokens, self.mask), self.sampling, self.u = decoder, prompts, sampling, u
        self.end_id, self.on_token = -1 if end_id is None else end_id, on_token  # −1 is no token
        n, self.P, self.R, device = len(self.tokens), self.tokens.shape[1], reply_len, self.tokens.device
        self.out = Generation(torch.zeros(n, self.R, dtype=torch.int64, device=device),
                              torch.zeros(n, self.R, dtype=torch.bool, device=device),
                              torch.zeros(n, self.R, device=device))
        # Of each row: its prompt's number, the tokens written, the last of them, where its text
        # starts in the cache.
        self.rows, self.next_prompt = rows, 0
        self.prompt, self.length, self.token, self.start = torch.zeros(4, rows, dtype=torch.int64,
                                                                       device=device)
        self.running = torch.zeros(rows, dtype=torch.bool, device=device)
        self.seen = None
        if sampling.repetition_penalty != 1:
            self.seen = torch.zeros(rows, decoder.model.config.vocab_size, dtype=torch.bool,
                                    device=device)
        self.cache = decoder.cache(rows, self.P + self.R)
        self._prepare_steps()

    def _prepare_steps(self) -> None:
        """The packed model and the step function for the present number of rows."""
        self.model = self.decoder.model_for(self.rows)
        self.step = self.decoder.step(self.rows, self.sampling.temperature)

    def write(self) -> Generation:
        """Answer all prompts."""
        n = len(self.tokens)
        while True:
            self._admit()
            running = int(self.running.sum())
            if running == 0 and self.next_prompt == n:
                return self.out
            if running < self.rows and self.next_prompt < n:
                continue  # a reply ended with its first token: its row is free again
            self._shrink(running)
            self._advance()

    def _admit(self) -> None:
        """Let the next prompts take the free rows: prefill them and choose their first tokens."""
        free = (~self.running).nonzero()[:, 0].tolist()[:len(self.tokens) - self.next_prompt]
        if not free:
            return
        at = torch.tensor(free, device=self.tokens.device)
        prompt = torch.arange(self.next_prompt, self.next_prompt + len(free), device=at.device)
        self.next_prompt += len(free)
        tokens, mask = self.tokens[prompt], self.mask[prompt]
        # Prefill all rows in place, or some in a cache of their own that is then copied.
        cache = self.cache if len(free) == self.rows else self.decoder.new_cache(len(free), self.P)
        logits = prefill(self.model, tokens, mask, cache)
        if cache is not self.cache:
            self.cache.put(at, cache, self.P)
        self.prompt[at], self.length[at], self.start[at], self.running[at] = prompt, 0, self.P - mask.sum(1), True
        if self.seen is not None:
            read = torch.where(mask, tokens, tokens[:, -1:])
            self.seen[at] = torch.zeros_like(self.seen[at]).scatter_(1, read, True)
        self.token[at], logprob = self.sampling.choose(logits,
                                                       None if self.seen is None else self.seen[at],
                                                       None if self.u is None
                                                       else self.u[prompt, 0])
        self._record(at, self.token[at, None], logprob[:, None])

    def _record(self, at: Tensor, tokens: Tensor, logprobs: Tensor) -> None:
        """Store k new tokens (len(at), k) of rows `at`, each up to its end token or limit; ended
        rows stop running."""
        column = self.length[at, None] + torch.arange(tokens.shape[1], device=at.device)
        is_end = tokens.eq(self.end_id)
        real = self.running[at, None] & (column < self.R) & (is_end.cumsum(1) - is_end.long() == 0)
        where = (self.prompt[at, None].expand_as(column)[real], column[real])
        self.out.tokens[where], self.out.mask[where], self.out.logprobs[where] = tokens[real], True, logprobs[real]
        if self.on_token is not None:
            self.on_token(self.prompt[at][real[:, 0]], tokens[:, 0][real[:, 0]])
        self.length[at] += tokens.shape[1]
        self.running[at] &= ~(is_end & real).any(1) & (self.length[at] < self.R)

    def _shrink(self, running: int) -> None:
        """Drop ended rows where that pays. Copying the cache costs about one step's reading of it;
        a compiled step is made for its number of rows, so compiled rows shrink to a quarter at
        once, or not at all."""
        if self.decoder.compile:
            if self.rows < 32 or running > self.rows // 4:
                return
            keep = torch.cat((self.running.nonzero()[:, 0],
                              (~self.running).nonzero()[:, 0]))[:self.rows // 4]
        else:
            if self.rows - running <= 0.1 * self.rows:
                return
            keep = self.running.nonzero()[:, 0]
        self.cache, self.rows = self.cache.keep(keep), len(keep)
        self.prompt, self.length, self.token, self.start, self.running = (
            x[keep] for x in (self.prompt, self.length, self.token, self.start, self.running))
        self.seen = None if self.seen is None else self.seen[keep]
        self._prepare_steps()

    def _advance(self) -> None:
        """Write up to CHECK_EVERY tokens in every row."""
        longest = int(self.length[self.running].max())
        k = min(1 if self.on_token else self.CHECK_EVERY,
                self.R - int(self.length[self.running].min()))
        ahead = self.length + torch.arange(k, device=self.length.device)[:, None]  # (k, B)
        slot = self.P - 1 + ahead.clamp(max=self.R)  # full rows stay at R
        u = [None] * k if self.u is None else self.u[self.prompt, ahead.clamp(max=self.R - 1)]
        tokens, logprobs = [], []
        for j in range(k):
            span = self.cache.span(min(self.P + longest + j, self.P + self.R))
            if self.sampling.plain:
                self.token, logprob = self.step(self.model, self.token, slot[j], self.start,
                                                self.cache, span, u[j], self.sampling.temperature)
            else:
                if self.seen is not None:
                    self.seen.scatter_(1, self.token[:, None], True)
                logits = decode_step(self.model, self.token, slot[j], self.start, self.cache, span)
                self.token, logprob = self.sampling.choose(logits, self.seen, u[j])
            tokens.append(self.token)
            logprobs.append(logprob)
        self._record(torch.arange(self.rows, device=slot.device), torch.stack(tokens, 1),
                     torch.stack(logprobs, 1))


def require_room(model: Transformer, prompt: int, reply: int) -> None:
    """UserError if a prompt and a reply of so many tokens exceed the model's max_len."""
    if prompt + reply > model.config.max_len:
        raise UserError(f"a prompt of {prompt} tokens and a reply of up to {reply} exceed the "
                        f"model's {model.config.max_len} (max_len): shorten the prompt, or lower "
                        "--max_new_tokens")


@torch.no_grad()
def generate(model: Transformer, tokens: Tensor, mask: Tensor, max_new_tokens: int, *,
             end_id: int | None = None,
             seed: int | Sequence[int] = 0, decoder: Decoder | None = None,
             sampling: Sampling | None = None, **settings: Any) -> Generation:
    """Continue each prompt by up to max_new_tokens tokens.

    tokens (B, P) int64 and mask (B, P) bool: left-padded prompts. logprobs belong to the
    distribution drawn from (greedy: to that at temperature 1, after the repetition penalty and
    `suppress`). decoder: one kept from an earlier call for this model, which then decides the
    dtype. Settings are the fields of `Sampling`, in place of one, and

    - rows (B,): global row numbers, by default 0…B−1; reply b uses the uniform numbers of (seed, rows[b]) only
    - batch_size: the most replies written at a time; when one ends, the next prompt takes its row
    - dtype: "bfloat16": matrix products and the cache in bfloat16; "int8": weights rounded to 8 bits besides (on a
      CPU); None: as the weights are
    - on_token(rows, tokens): called after each step with the indices of the rows still being written

    UserError if prompt and reply exceed the model's max_len. ValueError if the decoder is writing
    already, in another thread or around this call.
    """
    rows, batch_size, dtype, on_token = (settings.pop(name, None) for name in
                                         ("rows", "batch_size", "dtype", "on_token"))
    if sampling is not None and settings:
        raise TypeError(f"generate: sampling is given, so {', '.join(settings)} must not be")
    sampling = sampling or Sampling(**{**settings, "suppress": tuple(settings.get("suppress", ()))})
    n, P = tokens.shape
    require_room(model, P, max_new_tokens)
    if not bool(mask.any(1).all()):
        raise UserError("an empty prompt: give at least one token to continue")
    if model.training and model.config.dropout:
        raise ValueError("generate: dropout is on; call model.eval() first")
    decoder = decoder or Decoder(model, dtype)
    if decoder.model is not model:
        raise ValueError("generate: this decoder was made for another model, and would write with "
                         "that")
    if not decoder.in_use.acquire(blocking=False):
        raise ValueError("generate: this decoder is writing already; give each thread, and each "
                         "call inside on_token, a decoder of its own")
    try:
        u = None
        if sampling.temperature > 0:
            u = uniform_numbers(seed, range(n) if rows is None else rows,
                                max_new_tokens).to(tokens.device)
        first = int(mask.any(0).int().argmax())  # columns before it are padding in every row
        return Writer(decoder, (tokens[:, first:], mask[:, first:]), max_new_tokens, sampling,
                      min(n, batch_size or n), u, end_id, on_token).write()
    finally:
        decoder.in_use.release()


# ---- from texts to texts -------------------------------------------------------------------------

def reply_ids(replies: Generation) -> list[list[int]]:
    """The ids of each reply, its end token included."""
    return [tokens[mask].tolist() for tokens, mask in zip(replies.tokens, replies.mask,
                                                          strict=True)]


def reply_texts(tokenizer: Tokenizer, replies: Generation) -> list[str]:
    """Each reply as text, without the end token."""
    return [tokenizer.decode([i for i in ids if i != tokenizer.eom_id])
            for ids in reply_ids(replies)]


def reply_to(model: Transformer, tokenizer: Tokenizer, prompts: Sequence[list[int]],
             max_new_tokens: int, **settings) -> Generation:
    """`generate` for prompts given as lists of ids; settings are those of `generate`."""
    tokens, mask = pad_left(prompts, tokenizer.pad_id)
    device = model.embedding.weight.device
    return generate(model, tokens.to(device), mask.to(device), max_new_tokens,
                    end_id=tokenizer.eom_id, **settings)


# ---- command line --------------------------------------------------------------------------------

@dataclasses.dataclass
class SampleOptions(Options):
    """`python sample.py`"""

    checkpoint: str = option("out/reviews/ppo", "checkpoint or folder of a run to sample from",
                             flag="from")
    prompt: str = option("", "text to reply to or to continue")
    chat: bool = option(False, "talk: each line is a turn; Ctrl-C stops the answer, Ctrl-D leaves")
    file: str = option("", 'JSON Lines with {"prompt"}: replies are printed as JSON Lines')
    compare: str = option("", "two run folders (as two words, or with a comma): same prompts, same "
                              "random numbers", words=2)
    best_of: int = option(1, "number of replies to draw and print from worst to best, by the "
                             "reward model", low=1)
    reward_from: str = option("", "reward model for --best_of; empty: the folder `reward` beside "
                                  "the checkpoint's")
    raw: bool = option(False, "do not put the checkpoint's prompt template around the prompt")
    max_new_tokens: int = option(64, "longest reply, in tokens", low=1)
    temperature: float = option(1.0, "below 1 sharper, above 1 flatter, 0 greedy", low=0)
    top_k: int = option(0, "draw among the k likeliest tokens; 0: all", source="Fan 2018", low=0)
    top_p: float = option(1.0, "draw among the likeliest tokens that hold this probability",
                          source="Holtzman 2020", low=0.001, high=1)
    repetition_penalty: float = option(1.0, "divide the logits of tokens already written",
                                       source="Keskar 2019", low=0.01)
    seed: int = option(0, "random numbers of the replies", low=0)
    device: str = option("auto", "where to run", choices=("auto", "cpu", "cuda", "mps"))
    dtype: str = option("float32", "of matrix products (int8: CPU)",
                        choices=("auto", "float32", "bfloat16", "int8"))
    traceback: bool = option(False, "show where in the code an error arose")


class ChatSession:
    """A loaded checkpoint with the settings of one command."""

    def __init__(self, path: str, o: SampleOptions):
        self.device = pick_device(o.device)
        self.model, self.tokenizer, self.state = load_checkpoint(path, self.device)
        self.dtype = pick_dtype(o.dtype, self.device, self.model.config.d_model)[0]
        self.o, self.bare = o, self.state.get("stage") == "pretrain"
        self.template = "{prompt}" if o.raw else self.state.get("template", "{prompt}")

    def ids(self, prompt) -> list[int]:
        ids = prompt_ids(self.tokenizer, prompt, self.template, self.bare)
        require_room(self.model, len(ids), self.o.max_new_tokens)
        return ids

    def replies(self, prompts: list[list[int]], rows=None, on_token=None) -> Generation:
        o, t = self.o, self.tokenizer
        return reply_to(self.model, t, prompts, o.max_new_tokens, temperature=o.temperature,
                        top_k=o.top_k,
                        top_p=o.top_p, repetition_penalty=o.repetition_penalty, seed=o.seed,
                        rows=rows, batch_size=None if on_token else 64, dtype=self.dtype,
                        suppress=[i for i in t.special_ids if i != t.eom_id], on_token=on_token)

    def texts(self, prompts: list[list[int]]) -> tuple[list[str], Generation]:
        """One reply to each prompt, as text and as it was generated."""
        replies = self.replies(prompts)
        return reply_texts(self.tokenizer, replies), replies

    def stream(self, prompt: list[int], rows=None, before: str = "") -> str:
        """Print `before`, then a reply while it is written; Ctrl-C keeps what was written.
        """
        decoder, written = codecs.getincrementaldecoder("utf-8")("replace"), []
        print(before, end="", flush=True)

        def show(_, token: Tensor) -> None:
            if int(token[0]) != self.tokenizer.eom_id:
                written.append(int(token[0]))
                print(decoder.decode(self.tokenizer.token_bytes(int(token[0]))), end="", flush=True)

        try:
            self.replies([prompt], rows, show)
        except KeyboardInterrupt:
            print(" …", end="")
        print(decoder.decode(b"", final=True))
        return self.tokenizer.decode(written)


def chat(session: ChatSession) -> None:
    """A conversation: the whole history is the prompt of every answer; the oldest turns go when it
    grows too long."""
    if session.bare:
        raise UserError(f"{session.o.checkpoint}: pretraining teaches no talk; use --prompt, or an "
                        "sft checkpoint")
    messages, turn = [], 0
    while True:
        try:
            line = input("You: ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if not line:
            continue
        asked = [*messages, {"role": "user", "content": line if messages
                             else apply_template(session.template, line)}]
        room = session.model.config.max_len - session.o.max_new_tokens
        while len(ids := session.tokenizer.render_chat(asked,
                                                       reply=True)[0]) > room and len(asked) > 2:
            asked = asked[2:]
        if len(ids) > room:
            print(f"(that is too long by {len(ids) - room} tokens: say it shorter)")
            continue
        messages = [*asked, {"role": "assistant", "content": session.stream(ids, rows=[turn],
                                                                            before="MOSS: ")}]
        turn += 1


def best_of(session: ChatSession, prompt: str, n: int) -> None:
    """Draw n replies, print them from worst to best by the reward model."""
    where = session.o.reward_from or str(checkpoint_path(session.o.checkpoint).parent.parent / "reward")
    reward_model, tokenizer, _ = load_checkpoint(where, session.device, RewardModel)
    tokenizer.require_same(session.tokenizer, f"{where} and {session.o.checkpoint}")
    ids = [session.ids(prompt)] * n
    texts, replies = session.texts(ids)
    scores = reward_model.scores(ids, reply_ids(replies))
    for i in scores.argsort().tolist():
        print(f"{scores[i]:+.2f}  {texts[i]}")


def compare(folders: list[str], prompts: list, o: SampleOptions) -> None:
    """The same prompts and random numbers through two checkpoints."""
    if len(folders) != 2:
        raise UserError(f"--compare needs two run folders, got {len(folders)}: --compare "
                        "out/mine/sft out/mine/ppo")
    sessions = [ChatSession(f, o) for f in folders]
    texts = [s.texts([s.ids(p) for p in prompts])[0] for s in sessions]
    for prompt, *replies in zip(prompts, *texts, strict=True):
        print(f"\n» {prompt_text(prompt)}")
        for folder, reply in zip(folders, replies, strict=True):
            print(f"  {folder}: {reply}")


def main(argv: list[str]) -> None:
    o = parse(SampleOptions, argv, "sample.py")
    if o.chat or o.file or o.compare:
        o.refuse("best_of", why="with --chat, --file or --compare: it is for one --prompt")
    if o.chat:
        o.refuse("prompt", "file", "compare", why="with --chat")
    if o.compare:
        o.refuse("checkpoint", why="(--from) with --compare, which names two")
    if o.temperature == 0:
        o.refuse("top_k", "top_p", why="with --temperature 0, which takes the likeliest token")
    if o.best_of == 1:
        o.refuse("reward_from", why="without --best_of: nothing is scored")
    if o.compare:
        prompts = [r["prompt"] for r in load_records(o.file,
                                                     "ppo")] if o.file else [o.prompt] if o.prompt else None
        folders = o.compare.split(",")
        compare(folders, prompts or load_checkpoint(folders[-1])[2].get("example_prompts", [""]), o)
        return
    session = ChatSession(o.checkpoint, o)
    if o.chat:
        sys.stdin.reconfigure(errors="replace")  # a byte that is not UTF-8 does not end the talk
        chat(session)
    elif o.file:
        prompts = [r["prompt"] for r in load_records(o.file, "ppo")]
        texts, replies = session.texts([session.ids(p) for p in prompts])
        for prompt, text, mask in zip(prompts, texts, replies.mask, strict=True):
            print(json.dumps({"prompt": prompt, "response": text, "tokens": int(mask.sum())},
                             ensure_ascii=False))
    elif o.prompt and o.best_of > 1:
        best_of(session, o.prompt, o.best_of)
    elif o.prompt:
        session.stream(session.ids(o.prompt), before=o.prompt)
    else:
        raise UserError("nothing to do: give --prompt TEXT, --chat, --file FILE or --compare DIR "
                        "DIR")


if __name__ == "__main__":
    sys.exit(run_main(main, sys.argv[1:]))
