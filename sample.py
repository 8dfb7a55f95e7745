"""Sampling: write tokens one after another, each drawn from the model's distribution of the next.

    python sample.py --from out/reviews/ppo --prompt "这本书"       complete one prompt, streamed
    python sample.py --from out/reviews/ppo --chat                  talk; Ctrl-C stops an answer
    python sample.py --from out/reviews/ppo --file prompts.jsonl    one JSON line per prompt
    python sample.py --from out/reviews/sft --prompt "这本书" --best_of 16    best reply last
    python sample.py --compare out/reviews/sft out/reviews/ppo      same prompts and random numbers

`generate` is also the rollout engine of PPO, which draws from the plain softmax at one temperature.

Letters for shapes: B rows, P prompt length, R reply length, V vocabulary.
"""
import runtime  # noqa: F401 (before torch: it sets how threads wait)
import codecs
import dataclasses
import json
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from convert.importing import as_checkpoint, own_sampling
from data.batches import pad_left, prompt_ids, prompts_to_read
from data.records import apply_template, load_records, prompt_text
from data.tokenizer import Tokenizer
from model import Transformer, attention_allowed, checkpoint_path, load_checkpoint
from reward import RewardModel
from runtime.decoding import KVCache, LayeredStep, compiled, decoding_copy, ends, refresh
from runtime.device import layers_compiled, pick_device, pick_dtype
from runtime.draws import uniform_numbers
from runtime.machine import require_finite
from runtime.options import Options, UserError, option, parse, run_main
from runtime.terminal import for_terminal, lacking, memory_advice, writes_unicode

# ---- choosing one token --------------------------------------------------------------------------

def penalise_repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Logits (B, V) with tokens of the text so far, seen (B, V) bool, made less likely (Keskar
    2019)."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def filter_logits(logits: Tensor, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Logits (B, V) with −inf outside the k likeliest tokens, and outside the smallest set of them
    with probability top_p or more (Holtzman 2020)."""
    if 0 < top_k < logits.shape[-1]:
        smallest = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    if top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True)
        probs = ordered.softmax(-1)
        # The tokens before this one suffice; never true for the first.
        beyond = probs.cumsum(-1) - probs >= top_p
        logits = logits.masked_fill(beyond.scatter(-1, order, beyond), -torch.inf)
    return logits


def draw(weights: Tensor, u: Tensor) -> Tensor:
    """Inverse transform sampling: the first token whose cumulated probability exceeds u.

    weights (B, V) ≥ 0, probabilities up to a factor, u (B,) in [0, 1) -> (B,).

    In two steps, which read the vocabulary once: sums of blocks of 64 tokens give the token's
    block, and only that block is cumulated. The threshold u · total stays strictly below the total,
    so a token of weight 0 is never picked, even for u = 0 or after rounding.
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
    """(token, its log-probability), each (B,), from logits (B, V) already divided by the
    temperature. u (B,): uniform numbers; None: the likeliest token."""
    logits = logits - logits.amax(1, keepdim=True)
    weights = logits.exp()
    token = logits.argmax(1) if u is None else draw(weights, u)
    return token, logits.gather(1, token[:, None])[:, 0] - weights.sum(1).log()


# ---- the two halves of decoding ------------------------------------------------------------------

def prefill(model: Transformer, tokens: Tensor, mask: Tensor, cache: KVCache) -> Tensor:
    """Read left-padded prompts (B, P) into the cache -> logits (B, V) of the token after each."""
    positions = (mask.long().cumsum(1) - 1).clamp(min=0)
    allowed = None if bool(mask.all()) else attention_allowed(mask, None)
    last = torch.arange(1, len(tokens) + 1, device=tokens.device) * tokens.shape[1] - 1
    return model.head(model.trunk(tokens, positions, allowed, cache, last))


def decode_step(model: Transformer, token: Tensor, slot: Tensor, start: Tensor, cache: KVCache,
                span: Tensor) -> Tensor:
    """One token per row, token (B,) -> logits (B, V) of the next.

    slot (B,): the token's position in the cache; start (B,): that of its text's first token; span:
    the positions to read (KVCache.span).
    """
    return model.head(model.step(token, slot, start, span, cache))


def sample_step(model: Transformer, token: Tensor, slot: Tensor, start: Tensor, cache: KVCache,
                span: Tensor, u: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """A decoding step and the draw of the next token, as one function to compile -> (token,
    log-probability), each (B,)."""
    return choose(decode_step(model, token, slot, start, cache, span).float() / temperature, u)


def last_part(model: Transformer, x: Tensor, u: Tensor,
              temperature: float) -> tuple[Tensor, Tensor]:
    """The end of `sample_step`, from what the last block gives, x (B, 1, D)."""
    return choose(model.head(model.norm(x)[:, 0]).float() / temperature, u)


class Decoder:
    """A model prepared for decoding: packed weights, a cache of keys and values, compiled steps.

    `generate` makes one if none is given. Keep one decoder across calls and call `refresh` after
    the weights change; nothing is recompiled. One thread at a time may use it.
    """

    def __init__(self, model: Transformer, dtype: str | None = None, compile: bool = False):
        weight = model.embedding.weight
        self.model, self.compile, self.device = model, compile, weight.device
        self.dtype = {"bfloat16": torch.bfloat16, "int8": torch.int8}.get(dtype, weight.dtype)
        if self.dtype == torch.int8 and self.device.type != "cpu":
            raise UserError("int8 is for writing on a CPU; on this device use bfloat16")
        self.copies: dict[int, Transformer] = {}  # with packed weights, by rows
        self.steps: dict[tuple[int, float], Callable] = {}  # compiled, by rows and temperature
        self.caches: dict[tuple[int, int], KVCache] = {}  # the last call's, by rows and length
        self.in_use = threading.Lock()
        self.group = layers_compiled(len(model.blocks), self.device.type)  # blocks in a graph
        self.layered = compile and self.group < len(model.blocks)

    def refresh(self) -> None:
        """Repack the model's present weights."""
        for model in self.copies.values():
            refresh(model)
        # Clear NaNs left by diverged weights: masked positions still contribute 0 · NaN.
        for cache in self.caches.values():
            cache.kv.zero_()

    def model_for(self, rows: int) -> Transformer:
        """The copy with weights packed for steps of `rows` rows. An eager copy also serves fewer.
        """
        rows = rows if self.compile else max((rows, *self.copies))
        if rows not in self.copies:
            if not self.compile:
                self.copies.clear()
            self.copies[rows] = decoding_copy(self.model, self.dtype, rows, self.layered)
        return self.copies[rows]

    def cache(self, rows: int, length: int) -> KVCache:
        """A cache of this size: that of the last call, if its size was the same."""
        if (rows, length) not in self.caches:
            self.caches.clear()  # before the new one takes memory, too
            self.caches[rows, length] = self.new_cache(rows, length)
        return self.caches[rows, length]

    def new_cache(self, rows: int, length: int) -> KVCache:
        """An empty cache of the decoder's precision."""
        dtype = self.dtype if self.dtype.is_floating_point else torch.bfloat16
        return KVCache(self.model.config, rows, length, self.device, dtype, self.compile)

    def step(self, rows: int, temperature: float) -> Callable:
        """`sample_step`, compiled once per number of rows and temperature, for all lengths."""
        if not self.compile:
            return sample_step
        if (rows, temperature) not in self.steps:
            self.steps[rows, temperature] = (
                LayeredStep(last_part, self.group, self.device) if self.layered else
                compiled(sample_step, self.device))
        return self.steps[rows, temperature]


# ---- writing replies -----------------------------------------------------------------------------

@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a token is chosen from logits. PPO samples the plain softmax at a temperature."""

    temperature: float = 1.0  # 0: greedy
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    suppress: tuple[int, ...] = ()  # ids that are never written

    @property
    def plain(self) -> bool:
        """Whether this is the softmax at a temperature, unfiltered; `sample_step` draws from that.
        """
        return self.temperature > 0 and self == Sampling(self.temperature)

    def choose(self, logits: Tensor, seen: Tensor | None,
               u: Tensor | None) -> tuple[Tensor, Tensor]:
        """(token, its log-probability), each (B,), from logits (B, V).

        seen (B, V) bool: tokens of the text so far, None without a repetition penalty. u (B,):
        uniform numbers, None for greedy replies.
        """
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
    """Replies, one per prompt. After a reply's end: id 0, mask False, log-probability 0."""

    tokens: Tensor  # (B, R) int64
    mask: Tensor  # (B, R) bool: True up to and including the end token
    logprobs: Tensor  # (B, R) float32, of the distribution drawn from


class Writer:
    """Replies in progress. Each of B rows answers one prompt; when its reply ends, the next prompt
    takes the row (continuous batching)."""

    CHECK_EVERY = 8  # steps between checks for ended rows; each check synchronises a GPU
    MUST_BE_FINITE = ("probabilities of the next token",
                      ", or --temperature is too near 0 (0 itself takes the likeliest token)")

    def __init__(self, decoder: Decoder, prompts: tuple[Tensor, Tensor], reply_len: int,
                 sampling: Sampling, rows: int, u: Tensor | None, end_id: int | Sequence[int] | None,
                 on_token: Callable[[Tensor, Tensor], None] | None):
        """prompts: tokens and mask, each (n, P). u (n, reply_len): uniform numbers, None for greedy
        replies. rows: B, the most replies in progress."""
        self.decoder, self.sampling, self.u, self.on_token = decoder, sampling, u, on_token
        self.end_id = end_id
        self.tokens, self.mask = prompts
        (n, self.P), self.R, device = self.tokens.shape, reply_len, self.tokens.device
        self.out = Generation(torch.zeros(n, self.R, dtype=torch.int64, device=device),
                              torch.zeros(n, self.R, dtype=torch.bool, device=device),
                              torch.zeros(n, self.R, device=device))
        self.rows, self.next_prompt = rows, 0
        # The state of each row, all (B,): its prompt's number, its reply's length and last token,
        # the cache position where its text starts, and whether its reply is in progress.
        state = torch.zeros(4, rows, dtype=torch.int64, device=device)
        self.prompt, self.length, self.token, self.start = state
        self.running = torch.zeros(rows, dtype=torch.bool, device=device)
        self.seen = None  # (B, V) bool: tokens of the text so far
        if sampling.repetition_penalty != 1:
            self.seen = torch.zeros(rows, decoder.model.config.vocab_size, dtype=torch.bool,
                                    device=device)
        self.cache = decoder.cache(rows, self.P + self.R)
        self._prepare_steps()

    def _prepare_steps(self) -> None:
        """Take the packed model and the step function for the present number of rows."""
        self.model = self.decoder.model_for(self.rows)
        self.step = self.decoder.step(self.rows, self.sampling.temperature)

    def write(self) -> Generation:
        """Answer all prompts."""
        n = len(self.tokens)
        while True:
            self._admit()
            running = int(self.running.sum())
            if running == 0 and self.next_prompt == n:
                require_finite(self.out.logprobs, *self.MUST_BE_FINITE)
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
        # Prefill: all rows directly, some of them in a cache of their own that is then copied.
        logits = torch.zeros(len(at), self.model.config.vocab_size, device=at.device)
        for part, part_mask, row, index, skip in prompts_to_read(tokens, mask, KVCache.BLOCK):
            whole = len(part) == self.rows and not skip
            cache = self.cache if whole else self.decoder.new_cache(*part.shape)
            logits[row] = prefill(self.model, part, part_mask, cache)[index].float()
            if not whole:
                self.cache.put(at[row], cache, index, part.shape[1], skip)
        self.prompt[at], self.length[at], self.running[at] = prompt, 0, True
        self.start[at] = self.P - mask.sum(1)
        # The first token of each reply.
        seen = None
        if self.seen is not None:
            real = torch.where(mask, tokens, tokens[:, -1:])  # the last token is never a pad
            seen = self.seen[at] = torch.zeros_like(self.seen[at]).scatter_(1, real, True)
        u = None if self.u is None else self.u[prompt, 0]
        self.token[at], logprob = self.sampling.choose(logits, seen, u)
        self._record(at, self.token[at, None], logprob[:, None])

    def _record(self, at: Tensor, tokens: Tensor, logprobs: Tensor) -> None:
        """Store k new tokens (len(at), k) of rows `at`, each row's up to its end token or R; ended
        rows stop running."""
        column = self.length[at, None] + torch.arange(tokens.shape[1], device=at.device)
        is_end = ends(tokens, self.end_id)
        real = self.running[at, None] & (column < self.R) & (is_end.cumsum(1) - is_end.long() == 0)
        cells = (self.prompt[at, None].expand_as(column)[real], column[real])
        self.out.tokens[cells], self.out.mask[cells] = tokens[real], True
        self.out.logprobs[cells] = logprobs[real]
        if self.on_token is not None:  # then k is 1
            require_finite(logprobs[real], *self.MUST_BE_FINITE)  # before anybody reads the token
            self.on_token(self.prompt[at][real[:, 0]], tokens[:, 0][real[:, 0]])
        self.length[at] += tokens.shape[1]
        self.running[at] &= ~(is_end & real).any(1) & (self.length[at] < self.R)

    def _shrink(self, running: int) -> None:
        """Drop ended rows where that pays: copying the cache costs about one step's reading of it.

        A compiled step is specialised on its number of rows, so compiled rows shrink by a factor of
        4 or not at all.
        """
        size, pays = running, self.rows - running > 0.1 * self.rows
        if self.decoder.compile:
            size, pays = self.rows // 4, self.rows >= 32 and running <= self.rows // 4
        if not pays:
            return
        keep = (~self.running).to(torch.uint8).argsort(stable=True)[:size]  # those in progress first
        self.cache, self.rows = self.cache.shrink(keep), size
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
        slot = self.P - 1 + ahead.clamp(max=self.R)  # rows of length R stay there
        u = [None] * k if self.u is None else self.u[self.prompt, ahead.clamp(max=self.R - 1)]
        tokens, logprobs = [], []
        for j in range(k):
            span = self.cache.span(min(self.P + longest + j, self.P + self.R))
            if self.sampling.plain:
                self.token, logprob = self.step(self.model, self.token, slot[j], self.start,
                                                self.cache, span, u[j], self.sampling.temperature)
            else:
                # Filters and penalties are computed eagerly.
                if self.seen is not None:
                    self.seen.scatter_(1, self.token[:, None], True)
                logits = decode_step(self.model, self.token, slot[j], self.start, self.cache, span)
                self.token, logprob = self.sampling.choose(logits, self.seen, u[j])
            tokens.append(self.token)
            logprobs.append(logprob)
        self._record(torch.arange(self.rows, device=slot.device), torch.stack(tokens, 1),
                     torch.stack(logprobs, 1))


def require_room(model: Transformer, prompt: int, reply: int) -> None:
    """UserError if `prompt` and `reply` tokens together exceed the model's max_len."""
    if prompt + reply > model.config.max_len:
        raise UserError(f"a prompt of {prompt} tokens and a reply of up to {reply} exceed the "
                        f"model's {model.config.max_len} (max_len): shorten the prompt, or lower "
                        "--max_new_tokens")


@torch.no_grad()
def generate(model: Transformer, tokens: Tensor, mask: Tensor, max_new_tokens: int, *,
             end_id: int | Sequence[int] | None = None, seed: int | Sequence[int] = 0,
             decoder: Decoder | None = None, sampling: Sampling | None = None,
             **settings: Any) -> Generation:
    """Continue each prompt by up to max_new_tokens tokens; a reply ends with end_id, or
    with any of several.

    tokens (B, P) int64 and mask (B, P) bool: left-padded prompts. The log-probabilities are those
    of the distribution drawn from (greedy: of that at temperature 1, after the repetition penalty
    and `suppress`). decoder: one made for this model, whose dtype is used. settings: the fields of
    `Sampling`, unless `sampling` is given, and

    - rows (B,): global row numbers, by default 0…B−1; reply b uses the uniform numbers of
      (seed, rows[b]) only
    - batch_size: the most replies in progress; when one ends, the next prompt takes its row
    - dtype: "bfloat16": matrix products and the cache in bfloat16; "int8": also weights rounded to
      8 bits (on a CPU); None: the weights' own
    - on_token(rows, tokens): called after each step with the numbers of the replies that it
      continued, and their new tokens

    UserError if prompt and reply exceed the model's max_len. ValueError if the decoder is in use,
    by another thread or by a call whose on_token makes this one.
    """
    names = ("rows", "batch_size", "dtype", "on_token")
    rows, batch_size, dtype, on_token = (settings.pop(name, None) for name in names)
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
                         "that one")
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
    pairs = zip(replies.tokens.cpu(), replies.mask.cpu(), strict=True)
    return [tokens[mask].tolist() for tokens, mask in pairs]


def reply_texts(tokenizer: Tokenizer, replies: Generation) -> list[str]:
    """Each reply as text, without control tokens."""
    return [tokenizer.reply_text(ids) for ids in reply_ids(replies)]


def reply_to(model: Transformer, tokenizer: Tokenizer, prompts: Sequence[list[int]],
             max_new_tokens: int, **settings: Any) -> Generation:
    """`generate` for prompts given as lists of ids; settings are those of `generate`."""
    tokens, mask = pad_left(prompts, tokenizer.pad_id)
    device = model.embedding.weight.device
    return generate(model, tokens.to(device), mask.to(device), max_new_tokens,
                    end_id=tokenizer.end_ids, **settings)


# ---- command line --------------------------------------------------------------------------------

@dataclasses.dataclass
class SampleOptions(Options):
    """`python sample.py`"""

    # What to do.
    checkpoint: str = option("out/reviews/ppo", "checkpoint or folder of a run to sample from",
                             flag="from")
    prompt: str = option("", "text to reply to or to continue")
    chat: bool = option(False, "talk: each line is a turn; Ctrl-C stops the answer, Ctrl-D leaves")
    file: str = option("", 'JSON Lines with {"prompt"}: replies are printed as JSON Lines')
    compare: str = option("", "two run folders (as two words, or with a comma): same prompts, same "
                              "random numbers", words=2)
    best_of: int = option(1, "number of replies to draw and print from worst to best, by the "
                             "reward model", low=1, high=100_000)
    reward_from: str = option("", "reward model for --best_of; empty: the folder `reward` beside "
                                  "the checkpoint's")
    raw: bool = option(False, "do not put the checkpoint's prompt template around the prompt")
    # How to draw.
    max_new_tokens: int = option(64, "longest reply, in tokens", low=1, high=1_000_000)
    temperature: float = option(1.0, "below 1 sharper, above 1 flatter, 0 greedy", low=0)
    top_k: int = option(0, "draw among the k likeliest tokens; 0: all", source="Fan 2018", low=0)
    top_p: float = option(1.0, "draw among the fewest likeliest tokens whose probabilities reach "
                               "this sum", source="Holtzman 2020", low=0.001, high=1)
    repetition_penalty: float = option(1.0, "above 1 makes tokens already written less likely",
                                       source="Keskar 2019", low=0.01)
    seed: int = option(0, "seed of the random numbers", low=0)
    # The machine.
    device: str = option("auto", "device to compute on", choices=("auto", "cpu", "cuda", "mps"))
    dtype: str = option("float32", "precision of matrix products; int8: 8-bit weights, on a CPU",
                        choices=("auto", "float32", "bfloat16", "int8"))
    traceback: bool = option(False, "show where in the code an error arose")


class ChatSession:
    """A loaded checkpoint that replies by the options of one command."""

    def __init__(self, path: str, o: SampleOptions):
        self.device = pick_device(o.device)
        self.model, self.tokenizer, self.state = load_checkpoint(as_checkpoint(path), self.device)
        self.dtype = pick_dtype(o.dtype, self.device, self.model.config.d_model)[0]
        self.o = own_sampling(path, self.state, o)
        self.bare = self.state.get("stage") == "pretrain"  # it knows documents, no dialogues
        self.template = "{prompt}" if o.raw else self.state.get("template", "{prompt}")

    def ids(self, prompt: str | list[dict]) -> list[int]:
        """A prompt's ids, in the checkpoint's template; UserError if they leave no room."""
        ids = prompt_ids(self.tokenizer, prompt, self.template, self.bare)
        require_room(self.model, len(ids), self.o.max_new_tokens)
        return ids

    def replies(self, prompts: list[list[int]], rows: Sequence[int] | None = None,
                on_token: Callable[[Tensor, Tensor], None] | None = None) -> Generation:
        """One reply to each prompt, without control tokens other than the end."""
        o, t = self.o, self.tokenizer
        sampling = Sampling(o.temperature, o.top_k, o.top_p, o.repetition_penalty,
                            suppress=tuple(i for i in t.special_ids if i not in t.end_ids))
        return reply_to(self.model, t, prompts, o.max_new_tokens, sampling=sampling, seed=o.seed,
                        rows=rows, batch_size=None if on_token else 64, dtype=self.dtype,
                        on_token=on_token)

    def texts(self, prompts: list[list[int]]) -> tuple[list[str], Generation]:
        """One reply to each prompt, as text and as it was generated."""
        replies = self.replies(prompts)
        return reply_texts(self.tokenizer, replies), replies

    def stream(self, prompt: list[int], rows: Sequence[int] | None = None,
               before: str = "") -> str:
        """Print `before`, then a reply while it is written; Ctrl-C ends it. Returns the reply."""
        decoder, written = codecs.getincrementaldecoder("utf-8")("replace"), []
        print(for_terminal(before), end="", flush=True)

        def show(_, token: Tensor) -> None:
            written.append(int(token[0]))
            piece = decoder.decode(self.tokenizer.reply_bytes(written[-1], len(written) == 1))
            print(for_terminal(piece), end="", flush=True)

        try:
            self.replies([prompt], rows, show)
        except KeyboardInterrupt:
            print(" …", end="")
        except UserError:
            print(flush=True)  # the error begins a line
            raise
        print(for_terminal(decoder.decode(b"", final=True)))
        return self.tokenizer.reply_text(written)


def chat(session: ChatSession) -> None:
    """A conversation. The prompt of every answer is the whole history; when that grows too long,
    its oldest turns are dropped."""
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
        content = line if messages else apply_template(session.template, line)
        history = [*messages, {"role": "user", "content": content}]
        longest = session.model.config.max_len - session.o.max_new_tokens
        ids, _ = session.tokenizer.render_chat(history, reply=True)
        while len(ids) > longest and len(history) > 2:
            history = history[2:]
            ids, _ = session.tokenizer.render_chat(history, reply=True)
        if len(ids) > longest:
            print(f"(that is too long by {len(ids) - longest} tokens: say it shorter)")
            continue
        reply = session.stream(ids, rows=[turn], before="Model: ")
        messages = [*history, {"role": "assistant", "content": reply}]
        turn += 1


def best_of(session: ChatSession, prompt: str, n: int) -> None:
    """Draw n replies and print them from worst to best by the reward model."""
    beside = checkpoint_path(session.o.checkpoint).parent.parent / "reward"
    reward_from = session.o.reward_from or str(beside)
    reward_model, tokenizer, _ = load_checkpoint(as_checkpoint(reward_from), session.device, RewardModel)
    tokenizer.require_same(session.tokenizer, f"{reward_from} and {session.o.checkpoint}")
    ids = [session.ids(prompt)] * n
    texts, replies = session.texts(ids)
    scores = reward_model.scores(ids, reply_ids(replies))
    for i in scores.argsort().tolist():
        print(f"{scores[i]:+.2f}  {for_terminal(texts[i])}")


def compare(folders: list[str], prompts: list, o: SampleOptions) -> None:
    """Print two checkpoints' replies to the same prompts from the same random numbers."""
    if len(folders) != 2:
        raise UserError(f"--compare needs two run folders, got {len(folders)}: --compare "
                        "out/mine/sft out/mine/ppo")
    sessions = [ChatSession(f, o) for f in folders]
    texts = [s.texts([s.ids(p) for p in prompts])[0] for s in sessions]
    for prompt, *replies in zip(prompts, *texts, strict=True):
        print(for_terminal(f"\n» {prompt_text(prompt)}"))
        for folder, reply in zip(folders, replies, strict=True):
            print(for_terminal(f"  {folder}: {reply}"))


@lacking("skip_bad", "fields", "template")
@memory_advice("lower --max_new_tokens or --best_of, or try --dtype bfloat16")
def main(argv: list[str]) -> None:
    """`python sample.py`: check the options, then do what they ask for."""
    o = parse(SampleOptions, argv, "sample.py")
    if o.chat or o.file or o.compare:
        o.refuse("best_of", why="with --chat, --file or --compare: it is for one --prompt")
    if o.chat:
        o.refuse("prompt", "file", "compare", why="with --chat")
    if o.compare:
        o.refuse("checkpoint", why="with --compare, which names two")
    if o.temperature == 0:
        o.refuse("top_k", "top_p", why="with --temperature 0, which takes the likeliest token")
    if o.best_of == 1:
        o.refuse("reward_from", why="without --best_of: nothing is scored")
    if o.compare:
        folders = o.compare.split(",")
        if o.file:
            prompts = [r["prompt"] for r in load_records(o.file, "ppo")]
        elif o.prompt:
            prompts = [o.prompt]
        else:
            prompts = load_checkpoint(as_checkpoint(folders[-1]))[2].get("example_prompts", [""])
        compare(folders, prompts, o)
        return
    session = ChatSession(o.checkpoint, o)
    if o.chat:
        if sys.stdin is None:
            raise UserError("--chat reads what you type, but its input is closed: use --prompt or --file")
        sys.stdin.reconfigure(errors="replace")  # a byte that is not UTF-8 does not end the talk
        chat(session)
    elif o.file:
        prompts = [r["prompt"] for r in load_records(o.file, "ppo")]
        texts, replies = session.texts([session.ids(p) for p in prompts])
        for prompt, text, mask in zip(prompts, texts, replies.mask, strict=True):
            record = {"prompt": prompt, "response": text, "tokens": int(mask.sum())}
            # Escapes of JSON where the output cannot take the characters.
            print(for_terminal(json.dumps(record, ensure_ascii=not writes_unicode(sys.stdout))))
    elif o.prompt and o.best_of > 1:
        best_of(session, o.prompt, o.best_of)
    elif o.prompt:
        session.stream(session.ids(o.prompt), before=o.prompt)
    else:
        raise UserError("nothing to do: give --prompt TEXT, --chat, --file FILE or --compare DIR DIR")


if __name__ == "__main__":
    sys.exit(run_main(main, sys.argv[1:]))
