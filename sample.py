"""Sampling: write tokens one after another, each drawn from what the model expects next.

    python sample.py --from out/reviews/ppo --prompt "这本书"      complete one prompt, printed as it is written
    python sample.py --from out/reviews/ppo --chat                 talk: Ctrl-C stops an answer, Ctrl-D leaves
    python sample.py --from out/reviews/ppo --file prompts.jsonl   one JSON line per prompt, for other programs
    python sample.py --from out/reviews/sft --prompt "这本书" --best_of 16      sixteen replies, the best one last
    python sample.py --compare out/reviews/sft out/reviews/ppo     same openings and random numbers, one below the other

`generate` is also the rollout engine of PPO: there it draws from the whole softmax at one temperature, nothing else.
"""
import codecs
import dataclasses
import json
import sys
import types
from collections.abc import Callable, Sequence

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

# ---- choosing one token ----------------------------------------------------------------------------------------------

def penalise_repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Make tokens that already stand in the text less likely (Keskar 2019): logits (B, V), seen (B, V) bool."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def filter_logits(logits: Tensor, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Keep the k likeliest tokens, then the smallest set of them that holds probability p (Holtzman 2020); (B, V)."""
    if 0 < top_k < logits.shape[-1]:
        smallest = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    if top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True)
        probs = ordered.softmax(-1)
        beyond = probs.cumsum(-1) - probs >= top_p  # mass before this token already suffices; never true for the first
        logits = logits.masked_fill(beyond.scatter(-1, order, beyond), -torch.inf)
    return logits


def draw(weights: Tensor, u: Tensor) -> Tensor:
    """Inverse transform sampling: the first token whose cumulated probability exceeds u.

    weights (B, V) ≥ 0, probabilities up to a factor, u (B,) in [0, 1) -> (B,).

    In two steps, which read the vocabulary once: sums of blocks of 64 tokens say in which block the token lies, and
    only that block is cumulated. A threshold is u times the last sum and kept below it, so that a token of weight 0 is
    never picked: not by u = 0, because its cumulated value does not exceed its predecessor's, nor by rounding.
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
    """(token, its log-probability), each (B,), from logits (B, V) at their temperature; u None: the likeliest."""
    logits = logits - logits.amax(1, keepdim=True)
    weights = logits.exp()
    token = logits.argmax(1) if u is None else draw(weights, u)
    return token, logits.gather(1, token[:, None])[:, 0] - weights.sum(1).log()


# ---- the two halves of decoding --------------------------------------------------------------------------------------

def prefill(model: Transformer, tokens: Tensor, mask: Tensor, cache: KVCache) -> Tensor:
    """Read whole prompts (B, P), left-padded, into the cache; logits (B, V) of the token after each."""
    hidden = model.trunk(tokens, (mask.long().cumsum(1) - 1).clamp(min=0),
                         None if bool(mask.all()) else attention_allowed(mask, None), cache,
                         torch.arange(1, len(tokens) + 1, device=tokens.device) * tokens.shape[1] - 1)
    return model.head(hidden)  # only the last position needs the vocabulary


def decode_step(model: Transformer, token: Tensor, slot: Tensor, start: Tensor, cache: KVCache, span: Tensor) -> Tensor:
    """One token per row (B,), at place `slot` (B,) of the cache, its text from place `start` (B,) on -> logits (B, V).
    span: the places to read (KVCache.span)."""
    return model.head(model.step(token, slot, start, span, cache))


def sample_step(model: Transformer, token: Tensor, slot: Tensor, start: Tensor, cache: KVCache, span: Tensor, u: Tensor,
                temperature: float) -> tuple[Tensor, Tensor]:
    """A step and the choice of its token, as one function to compile: (token, log-probability), each (B,)."""
    return choose(decode_step(model, token, slot, start, cache, span).float() / temperature, u)


class Decoder:
    """A model made ready to write: weights packed, room for keys and values, steps compiled.

    `generate` makes one where it is given none. Who writes many times keeps one, and calls `refresh` after the weights
    have changed; that compiles nothing anew.
    """

    def __init__(self, model: Transformer, dtype: str | None = None, compile: bool = False):
        self.model, self.compile = model, compile
        self.dtype = {"bfloat16": torch.bfloat16, "int8": torch.int8}.get(dtype, model.embedding.weight.dtype)
        if self.dtype == torch.int8 and model.embedding.weight.device.type != "cpu":
            raise UserError("int8 is for writing on a CPU; on this device use bfloat16")
        self.copies: dict[int, Transformer] = {}
        self.compiled: dict[tuple[int, float], Callable] = {}  # by rows and temperature
        self.room_for: tuple[int, int] | None = None  # rows and length that `room` was made for

    def refresh(self) -> None:
        """Take the model's weights as they are now."""
        for ready in self.copies.values():
            refresh(ready)
        if self.room_for is not None:
            self.room.kv.zero_()  # had weights been NaN, what they left here would count for 0 · NaN

    def model_for(self, rows: int) -> Transformer:
        """The model with its weights packed for steps of so many rows; run eagerly, one copy serves fewer rows, too."""
        rows = rows if self.compile else max((rows, *self.copies))
        if rows not in self.copies:
            if not self.compile:
                self.copies.clear()
            self.copies[rows] = decoding_copy(self.model, self.dtype, rows, self.compile)
        return self.copies[rows]

    def cache(self, rows: int, length: int) -> KVCache:
        """Room for keys and values; that of the last call where it fits."""
        if self.room_for != (rows, length):
            self.room_for, self.room = (rows, length), self.new_cache(rows, length)
        return self.room

    def new_cache(self, rows: int, length: int) -> KVCache:
        dtype = self.dtype if self.dtype.is_floating_point else torch.bfloat16
        return KVCache(self.model.config, rows, length, self.model.embedding.weight.device, dtype, self.compile)

    def step(self, rows: int, temperature: float) -> Callable:
        """`sample_step`, compiled once for each number of rows, whatever the length.

        Each has a code object of its own, so that on a CPU none of torch.compile's guards need be checked at every
        token: what they would guard is the key below. (On a GPU they also see to it that indices of 32 bits suffice.)
        Calls go through C++, not Python, where the processor is the CPU.
        """
        if not self.compile:
            return sample_step
        device, key = self.model.embedding.weight.device.type, (rows, temperature)
        if key not in self.compiled:
            code = sample_step.__code__.replace(co_name=f"sample_step_{id(self)}_{len(self.compiled)}")
            options = {}
            if device == "cpu":  # allocate once and not a hundred times; sizes and strides follow from the key, too
                options = {"cpp_wrapper": True, "memory_planning": True, "size_asserts": False}
                if skip := getattr(torch.compiler, "skip_all_guards_unsafe", None):
                    options["guard_filter_fn"] = skip
            self.compiled[key] = torch.compile(types.FunctionType(code, sample_step.__globals__), options=options)
        return self.compiled[key]


@dataclasses.dataclass
class Generation:
    """tokens (B, R) int64, mask (B, R) bool: True up to and including the end token, logprobs (B, R) float32.
    After the end: id 0, mask False, log-probability 0."""

    tokens: Tensor
    mask: Tensor
    logprobs: Tensor


def require_room(model: Transformer, prompt: int, reply: int) -> None:
    """UserError where so many tokens are more than a row of this model can have."""
    if prompt + reply > model.config.max_len:
        raise UserError(f"a prompt of {prompt} tokens and a reply of up to {reply} exceed the model's "
                        f"{model.config.max_len} (max_len): shorten the prompt, or lower --max_new_tokens")


@torch.no_grad()
def generate(model: Transformer, tokens: Tensor, mask: Tensor, max_new_tokens: int, *, temperature: float = 1.0,
             top_k: int = 0, top_p: float = 1.0, repetition_penalty: float = 1.0, end_id: int | None = None,
             seed: int | Sequence[int] = 0, rows: Sequence[int] | None = None, batch_size: int | None = None,
             dtype: str | None = None, suppress: Sequence[int] = (), decoder: Decoder | None = None,
             on_token: Callable[[Tensor, Tensor], None] | None = None) -> Generation:
    """Continue each prompt by up to max_new_tokens tokens.

    tokens (B, P) int64 and mask (B, P) bool: left-padded prompts. temperature 0 is greedy. logprobs belong to the
    distribution drawn from (greedy: to that at temperature 1, after the repetition penalty and `suppress`). rows (B,):
    global row numbers, by default 0…B−1; reply b uses the uniform numbers of (seed, rows[b]) only. batch_size: at most
    so many replies are written at a time; where one ends, the next prompt takes its place (continuous batching). dtype
    "bfloat16": matrix products and the cache in bfloat16; "int8": weights rounded to 8 bits besides
    (kernels.Int8Linear; on a CPU). suppress: ids never to be written. decoder: one kept from an earlier call for this
    model, which then decides the dtype. on_token(rows, tokens) is called after each step with the indices of the rows
    still being written. Raises UserError where prompt and reply exceed the model's max_len.
    """
    n, P = tokens.shape
    R, device = max_new_tokens, tokens.device
    require_room(model, P, R)
    if not bool(mask.any(1).all()):
        raise UserError("an empty prompt: give at least one token to go on from")
    if model.training and model.config.dropout:
        raise ValueError("generate: dropout is on; call model.eval() first")
    decoder = decoder or Decoder(model, dtype)
    if decoder.model is not model:
        raise ValueError("generate: this decoder was made for another model, and would write with that")
    first = int(mask.any(0).int().argmax())  # columns that are padding in every row
    tokens, mask, P = tokens[:, first:], mask[:, first:], P - first
    u = uniform_numbers(seed, range(n) if rows is None else rows, R).to(device) if temperature > 0 else None
    out = Generation(torch.zeros(n, R, dtype=torch.int64, device=device),
                     torch.zeros(n, R, dtype=torch.bool, device=device), torch.zeros(n, R, device=device))
    plain = temperature > 0 and top_k == 0 and top_p == 1 and repetition_penalty == 1 and not suppress
    look_every = 1 if on_token else 8  # tokens between looking which rows have ended; a GPU waits for each look
    # The rows being written: which prompt each answers, how many tokens it has, the last of them, what it has seen.
    B = min(n, batch_size or n)
    ready, cache, step = decoder.model_for(B), decoder.cache(B, P + R), decoder.step(B, temperature)
    index, written, token, start = torch.zeros(4, B, dtype=torch.int64, device=device)
    seen = torch.zeros(B, model.config.vocab_size, dtype=torch.bool, device=device) if repetition_penalty != 1 else None
    running, free, following = torch.zeros(B, dtype=torch.bool, device=device), list(range(B)), 0

    def pick(logits: Tensor, seen: Tensor | None, u: Tensor | None) -> tuple[Tensor, Tensor]:
        """Change the distribution as asked, and choose from it."""
        logits = logits.float()
        if suppress:
            logits[:, list(suppress)] = -torch.inf
        if seen is not None:
            logits = penalise_repetition(logits, seen, repetition_penalty)
        if temperature > 0:
            logits = filter_logits(logits / temperature, top_k, top_p)
        return choose(logits, u)

    def record(at: Tensor, columns: Tensor, logprobs: Tensor) -> None:
        """Write down what rows `at` have drawn, each (len(at), k), and find out which have ended."""
        k = columns.shape[1]
        place = written[at, None] + torch.arange(k, device=device)
        is_end = columns.eq(-1 if end_id is None else end_id)
        real = running[at, None] & (place < R) & (is_end.cumsum(1) - is_end.long() == 0)
        where = (index[at, None].expand(-1, k)[real], place[real])
        out.tokens[where], out.mask[where], out.logprobs[where] = columns[real], True, logprobs[real]
        if on_token is not None:
            on_token(index[at][real[:, 0]], columns[:, 0][real[:, 0]])
        written[at] += k
        running[at] &= ~(is_end & real).any(1) & (written[at] < R)

    while True:
        taken = free[:n - following]
        if taken:  # prompts take the free rows
            at = torch.tensor(taken, device=device)
            index[at] = torch.arange(following, following + len(taken), device=device)
            following += len(taken)
            prompts, prompt_mask = tokens[index[at]], mask[index[at]]
            fresh = cache if len(taken) == B else decoder.new_cache(len(taken), P)
            logits = prefill(ready, prompts, prompt_mask, fresh)
            if fresh is not cache:
                cache.put(at, fresh, P)
            running[at], written[at], start[at] = True, 0, P - prompt_mask.sum(1)
            if seen is not None:
                seen[at] = torch.zeros_like(seen[at]).scatter_(
                    1, torch.where(prompt_mask, prompts, prompts[:, -1:]), True)
            token[at], logprob = pick(logits, None if seen is None else seen[at],
                                      None if u is None else u[index[at], 0])
            record(at, token[at, None], logprob[:, None])
        if int(running.sum()) == 0 and following == n:
            return out
        free = (~running).nonzero()[:, 0].tolist()
        if following < n and free:
            continue
        keep = len(free) > 0.1 * B if not decoder.compile else B >= 32 and B - len(free) <= B // 4
        if keep:  # copying the cache costs about one step's reading of it, a new number of rows may have to be compiled
            rest = running.nonzero()[:, 0]
            if decoder.compile:
                rest = torch.cat((rest, (~running).nonzero()[:, 0]))[:B // 4]
            cache = cache.keep(rest)
            index, written, token, start, running = (x[rest] for x in (index, written, token, start, running))
            seen, B = None if seen is None else seen[rest], len(rest)
            ready, step = decoder.model_for(B), decoder.step(B, temperature)
        longest = int(written[running].max())
        k = min(look_every, R - int(written[running].min()))
        ahead = written + torch.arange(k, device=device)[:, None]  # (k, B); full rows stay at R
        slot, numbers = P - 1 + ahead.clamp(max=R), None if u is None else u[index, ahead.clamp(max=R - 1)]
        columns, logprobs = [], []
        for j in range(k):
            span = cache.span(min(P + longest + j, P + R))
            if plain:
                token, logprob = step(ready, token, slot[j], start, cache, span, numbers[j], temperature)
            else:
                if seen is not None:
                    seen.scatter_(1, token[:, None], True)
                logits = decode_step(ready, token, slot[j], start, cache, span)
                token, logprob = pick(logits, seen, None if numbers is None else numbers[j])
            columns.append(token)
            logprobs.append(logprob)
        record(torch.arange(B, device=device), torch.stack(columns, 1), torch.stack(logprobs, 1))
        free = (~running).nonzero()[:, 0].tolist()


# ---- from texts to texts ---------------------------------------------------------------------------------------------

def reply_ids(replies: Generation) -> list[list[int]]:
    """The ids of each reply, its end token included."""
    return [tokens[mask].tolist() for tokens, mask in zip(replies.tokens, replies.mask, strict=True)]


def reply_texts(tokenizer: Tokenizer, replies: Generation) -> list[str]:
    """Each reply as text, without the end token."""
    return [tokenizer.decode([i for i in ids if i != tokenizer.eom_id]) for ids in reply_ids(replies)]


def reply_to(model: Transformer, tokenizer: Tokenizer, prompts: Sequence[list[int]], max_new_tokens: int,
             **settings) -> Generation:
    """`generate` for prompts given as lists of ids; settings are those of `generate`."""
    tokens, mask = pad_left(prompts, tokenizer.pad_id)
    device = model.embedding.weight.device
    return generate(model, tokens.to(device), mask.to(device), max_new_tokens, end_id=tokenizer.eom_id, **settings)


# ---- command line ----------------------------------------------------------------------------------------------------

@dataclasses.dataclass
class SampleOptions(Options):
    """`python sample.py`"""

    checkpoint: str = option("out/reviews/ppo", "checkpoint or folder of a run to sample from (also written --from)")
    prompt: str = option("", "text to reply to or go on from")
    chat: bool = option(False, "talk: each line is a turn; Ctrl-C stops the answer, Ctrl-D leaves")
    file: str = option("", 'JSON Lines with {"prompt"}: replies are printed as JSON Lines')
    compare: str = option("", "two run folders (as two words, or with a comma): same prompts, same random numbers")
    best_of: int = option(1, "draw so many replies and print them from worst to best, by the reward model", low=1)
    reward_from: str = option("", "reward model for --best_of; empty: the folder `reward` beside the checkpoint's")
    raw: bool = option(False, "do not put the checkpoint's prompt template around the prompt")
    max_new_tokens: int = option(64, "longest reply, in tokens", low=1)
    temperature: float = option(1.0, "below 1 sharper, above 1 flatter, 0 greedy", low=0)
    top_k: int = option(0, "draw among the k likeliest tokens; 0: all", source="Fan 2018", low=0)
    top_p: float = option(1.0, "draw among the likeliest tokens that hold this probability", source="Holtzman 2020",
                          low=0.001, high=1)
    repetition_penalty: float = option(1.0, "divide the logits of tokens already written", source="Keskar 2019",
                                       low=0.01)
    seed: int = option(0, "random numbers of the replies", low=0)
    device: str = option("auto", "where to run", choices=("auto", "cpu", "cuda", "mps"))
    dtype: str = option("float32", "of matrix products (int8: CPU)", choices=("auto", "float32", "bfloat16", "int8"))
    traceback: bool = option(False, "show where in the code an error arose")


class Speaker:
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
        return reply_to(self.model, t, prompts, o.max_new_tokens, temperature=o.temperature, top_k=o.top_k,
                        top_p=o.top_p, repetition_penalty=o.repetition_penalty, seed=o.seed, rows=rows,
                        batch_size=None if on_token else 64, dtype=self.dtype,
                        suppress=[i for i in t.special_ids if i != t.eom_id], on_token=on_token)

    def texts(self, prompts: list[list[int]]) -> tuple[list[str], Generation]:
        """One reply to each prompt, as text and as it was generated."""
        replies = self.replies(prompts)
        return reply_texts(self.tokenizer, replies), replies

    def stream(self, prompt: list[int], rows=None, before: str = "") -> str:
        """Print `before`, then a reply while it is written; what was written until Ctrl-C is kept."""
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


def chat(speaker: Speaker) -> None:
    """A conversation: the whole history is the prompt of every answer; the oldest turns go when it grows too long."""
    if speaker.bare:
        raise UserError(f"{speaker.o.checkpoint}: pretraining teaches no talk; use --prompt, or an sft checkpoint")
    messages, turn = [], 0
    while True:
        try:
            line = input("You: ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if not line:
            continue
        asked = [*messages, {"role": "user", "content": line if messages else apply_template(speaker.template, line)}]
        room = speaker.model.config.max_len - speaker.o.max_new_tokens
        while len(ids := speaker.tokenizer.render_chat(asked, reply=True)[0]) > room and len(asked) > 2:
            asked = asked[2:]
        if len(ids) > room:
            print(f"(that is too long by {len(ids) - room} tokens: say it shorter)")
            continue
        messages = [*asked, {"role": "assistant", "content": speaker.stream(ids, rows=[turn], before="MOSS: ")}]
        turn += 1


def best_of(speaker: Speaker, prompt: str, n: int) -> None:
    """Draw n replies, print them from worst to best by the reward model."""
    where = speaker.o.reward_from or str(checkpoint_path(speaker.o.checkpoint).parent.parent / "reward")
    reward_model, tokenizer, _ = load_checkpoint(where, speaker.device, RewardModel)
    tokenizer.require_same(speaker.tokenizer, f"{where} and {speaker.o.checkpoint}")
    ids = [speaker.ids(prompt)] * n
    texts, replies = speaker.texts(ids)
    scores = reward_model.scores(ids, reply_ids(replies))
    for i in scores.argsort().tolist():
        print(f"{scores[i]:+.2f}  {texts[i]}")


def compare(folders: list[str], prompts: list, o: SampleOptions) -> None:
    """The same prompts and random numbers through two checkpoints."""
    if len(folders) != 2:
        raise UserError(f"--compare needs two run folders, got {len(folders)}: --compare out/mine/sft out/mine/ppo")
    speakers = [Speaker(f, o) for f in folders]
    texts = [s.texts([s.ids(p) for p in prompts])[0] for s in speakers]
    for prompt, *replies in zip(prompts, *texts, strict=True):
        print(f"\n» {prompt_text(prompt)}")
        for folder, reply in zip(folders, replies, strict=True):
            print(f"  {folder}: {reply}")


def main(argv: list[str]) -> None:
    for i, word in enumerate(argv):
        if word == "--from" or word.startswith("--from="):  # `from` is a reserved word and cannot be a field
            argv[i] = "--checkpoint" + word[6:]
        folders = argv[i + 1:i + 3]
        if word == "--compare" and len(folders) == 2 and not folders[1].startswith("--"):
            argv[i + 1:i + 3] = [",".join(folders)]
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
        prompts = [r["prompt"] for r in load_records(o.file, "ppo")] if o.file else [o.prompt] if o.prompt else None
        folders = o.compare.split(",")
        compare(folders, prompts or load_checkpoint(folders[-1])[2].get("example_prompts", [""]), o)
        return
    speaker = Speaker(o.checkpoint, o)
    if o.chat:
        sys.stdin.reconfigure(errors="replace")  # a byte that is not UTF-8 does not end the talk
        chat(speaker)
    elif o.file:
        prompts = [r["prompt"] for r in load_records(o.file, "ppo")]
        texts, replies = speaker.texts([speaker.ids(p) for p in prompts])
        for prompt, text, mask in zip(prompts, texts, replies.mask, strict=True):
            print(json.dumps({"prompt": prompt, "response": text, "tokens": int(mask.sum())}, ensure_ascii=False))
    elif o.prompt and o.best_of > 1:
        best_of(speaker, o.prompt, o.best_of)
    elif o.prompt:
        speaker.stream(speaker.ids(o.prompt), before=o.prompt)
    else:
        raise UserError("nothing to do: give --prompt TEXT, --chat, --file FILE or --compare DIR DIR")


if __name__ == "__main__":
    sys.exit(run_main(main, sys.argv[1:]))
