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
import pathlib
import sys
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from data.batches import pad_left, prompt_ids
from data.records import apply_template, load_records
from data.tokenizer import Tokenizer
from model import (KVCache, Transformer, attention_allowed, load_checkpoint, log_softmax, pick_device, pick_dtype,
                   precision)
from options import Options, UserError, option, parse, run_main
from reward import RewardModel

# ---- choosing one token ----------------------------------------------------------------------------------------------

def uniform_numbers(seed: int | Sequence[int], rows: Sequence[int], n: int) -> Tensor:
    """(len(rows), n) float32 in [0, 1): row b's numbers follow from (seed, rows[b]), whatever shares its batch."""
    seed = [seed] if isinstance(seed, int) else list(seed)
    return torch.from_numpy(np.stack([np.random.default_rng([*seed, int(row)]).random(n, np.float32) for row in rows]))


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


def draw(logprobs: Tensor, u: Tensor) -> Tensor:
    """Inverse transform sampling: the first token whose cumulated probability exceeds u.

    logprobs (B, V), u (B,) in [0, 1) -> (B,).

    The last cumulated value is only nearly 1, so u is scaled by it and kept below it; a token of probability 0 is never
    picked, not even by u = 0, because its cumulated value does not exceed its predecessor's.
    """
    cumulated = logprobs.exp().cumsum(-1)
    total = cumulated[:, -1:]
    threshold = torch.minimum(u[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    return (cumulated <= threshold).sum(-1)


# ---- the two halves of decoding --------------------------------------------------------------------------------------

def prefill(model: Transformer, tokens: Tensor, mask: Tensor | None, cache: KVCache) -> Tensor:
    """Read whole prompts (B, P), left-padded, into the cache; logits (B, V) of the token after each. mask (B, P), None
    where there is no padding."""
    positions = None if mask is None else (mask.long().cumsum(1) - 1).clamp(min=0)
    span = torch.arange(tokens.shape[1], device=tokens.device)
    hidden = model.trunk(tokens, positions, attention_allowed(mask, None), cache, span)
    return model.head(hidden[:, -1])  # only the last position needs the vocabulary


def decode_step(model: Transformer, token: Tensor, position: Tensor, key_mask: Tensor | None, cache: KVCache,
                span: Tensor) -> Tensor:
    """One token per row (B,) at position (B,) -> logits (B, V).

    span: arange(keys so far, this one included); key_mask (B, keys) bool hides the prompts' padding, None where there
    is none.
    """
    allowed = None if key_mask is None else key_mask[:, None, None, :]
    return model.head(model.trunk(token[:, None], position[:, None], allowed, cache, span)[:, 0])


@dataclasses.dataclass
class Generation:
    """tokens (B, R) int64, mask (B, R) bool: True up to and including the end token, logprobs (B, R) float32.
    After the end: id 0, mask False, log-probability 0."""

    tokens: Tensor
    mask: Tensor
    logprobs: Tensor


@torch.no_grad()
def generate(model: Transformer, tokens: Tensor, mask: Tensor, max_new_tokens: int, *, temperature: float = 1.0,
             top_k: int = 0, top_p: float = 1.0, repetition_penalty: float = 1.0, end_id: int | None = None,
             seed: int | Sequence[int] = 0, rows: Sequence[int] | None = None, batch_size: int | None = None,
             dtype: str | None = None, suppress: Sequence[int] = (),
             on_token: Callable[[Tensor, Tensor], None] | None = None) -> Generation:
    """Continue each prompt by up to max_new_tokens tokens.

    tokens (B, P) int64 and mask (B, P) bool: left-padded prompts. temperature 0 is greedy. logprobs belong to the
    distribution drawn from (greedy: the unfiltered one). rows (B,): global row numbers, by default 0…B−1; reply b uses
    the uniform numbers of (seed, rows[b]) only. batch_size: at most so many prompts at a time. dtype "bfloat16" decodes
    under autocast. suppress: ids never to be written. on_token(rows, tokens) is called after each step with the indices
    of the rows still being written. Raises UserError where prompt and reply exceed the model's max_len.
    """
    B, P = tokens.shape
    R, device = max_new_tokens, tokens.device
    if P + R > model.config.max_len:
        raise UserError(f"a prompt of {P} tokens and a reply of up to {R} exceed the model's {model.config.max_len} "
                        f"(max_len): shorten the prompt or ask for fewer tokens")
    if not bool(mask.any(1).all()):
        raise UserError("an empty prompt: give at least one token to go on from")
    if model.training and model.config.dropout:
        raise ValueError("generate: dropout is on; call model.eval() first")
    rows = range(B) if rows is None else rows
    if batch_size is not None and B > batch_size:
        parts = [generate(model, tokens[i:i + batch_size], mask[i:i + batch_size], R, temperature=temperature,
                          top_k=top_k, top_p=top_p, repetition_penalty=repetition_penalty, end_id=end_id, seed=seed,
                          rows=rows[i:i + batch_size], dtype=dtype, suppress=suppress)
                 for i in range(0, B, batch_size)]
        return Generation(*(torch.cat([getattr(p, f.name) for p in parts]) for f in dataclasses.fields(Generation)))
    first = int(mask.any(0).int().argmax())  # columns that are padding in every row
    tokens, mask, P = tokens[:, first:], mask[:, first:], P - first

    u = uniform_numbers(seed, rows, R).to(device) if temperature > 0 else None
    out = Generation(torch.zeros(B, R, dtype=torch.int64, device=device),
                     torch.zeros(B, R, dtype=torch.bool, device=device),
                     torch.zeros(B, R, device=device))
    half = dtype == "bfloat16"
    cache = KVCache(model.config, B, P + R, device, torch.bfloat16 if half else model.embedding.weight.dtype)
    key_mask = None if bool(mask.all()) else torch.cat((mask, mask.new_ones(B, R)), 1)
    position, span = mask.sum(1), torch.arange(P + R, device=device)
    alive, running = torch.arange(B, device=device), torch.ones(B, dtype=torch.bool, device=device)
    seen = None
    if repetition_penalty != 1:
        seen = torch.zeros(B, model.config.vocab_size, dtype=torch.bool, device=device)
        seen.scatter_(1, torch.where(mask, tokens, tokens[:, -1:]), True)
    look_every = 1 if device.type == "cpu" else 8  # asking a GPU whether rows have ended makes it wait

    with precision(dtype or "float32", device.type):
        logits = prefill(model, tokens, None if key_mask is None else mask, cache)
        for t in range(R):
            logits = logits.float()
            if suppress:
                logits[:, list(suppress)] = -torch.inf
            if seen is not None:
                logits = penalise_repetition(logits, seen, repetition_penalty)
            if temperature > 0:
                logprobs = log_softmax(filter_logits(logits / temperature, top_k, top_p))
                token = draw(logprobs, u[alive, t])
            else:
                logprobs, token = log_softmax(logits), logits.argmax(-1)
            logprob = logprobs.gather(1, token[:, None])[:, 0]
            out.tokens[alive, t] = torch.where(running, token, 0)
            out.mask[alive, t] = running
            out.logprobs[alive, t] = torch.where(running, logprob, 0)
            if on_token is not None:
                on_token(alive[running], token[running])
            if end_id is not None:
                running = running & (token != end_id)
                if t % look_every == look_every - 1:
                    n = int(running.sum())
                    if n == 0:
                        break
                    if n <= 0.9 * len(running):  # copying the cache costs about one step's reading of it
                        cache.keep(running)
                        alive, token, position = alive[running], token[running], position[running]
                        key_mask = None if key_mask is None else key_mask[running]
                        seen = None if seen is None else seen[running]
                        running = running[running]
            if t + 1 == R:
                break
            if seen is not None:
                seen.scatter_(1, token[:, None], True)
            keys = P + t + 1
            logits = decode_step(model, token, position, None if key_mask is None else key_mask[:, :keys], cache,
                                 span[:keys])
            position = position + 1
    return out


# ---- from texts to texts ---------------------------------------------------------------------------------------------

def reply_texts(tokenizer: Tokenizer, tokens: Tensor, mask: Tensor) -> list[str]:
    """Replies (B, R) with their mask as texts, without the end token."""
    return [tokenizer.decode([i for i in row[keep].tolist() if i != tokenizer.eom_id])
            for row, keep in zip(tokens, mask, strict=True)]


def reply_to(model: Transformer, tokenizer: Tokenizer, prompts: Sequence[list[int]], max_new_tokens: int,
             **settings) -> Generation:
    """`generate` for prompts given as lists of ids; settings are those of `generate`."""
    tokens, mask = pad_left(prompts, tokenizer.pad_id)
    device = model.embedding.weight.device
    return generate(model, tokens.to(device), mask.to(device), max_new_tokens, end_id=tokenizer.eom_id, **settings)


def reward_scores(reward_model: RewardModel, prompts: Sequence[list[int]], replies: Generation) -> np.ndarray:
    """Raw score (B,) of each reply, read from the very token ids that were sampled."""
    rows = [(p + r[m].tolist(), [False] * len(p) + [True] * int(m.sum()))
            for p, r, m in zip(prompts, replies.tokens, replies.mask, strict=True)]
    return reward_model.score_rows(rows)


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
    dtype: str = option("float32", "precision of matrix products", choices=("auto", "float32", "bfloat16"))
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
        return prompt_ids(self.tokenizer, prompt, self.template, self.bare)

    def replies(self, prompts: list[list[int]], rows=None, on_token=None) -> Generation:
        o, t = self.o, self.tokenizer
        return reply_to(self.model, t, prompts, o.max_new_tokens, temperature=o.temperature, top_k=o.top_k,
                        top_p=o.top_p, repetition_penalty=o.repetition_penalty, seed=o.seed, rows=rows,
                        batch_size=None if on_token else 64, dtype=self.dtype,
                        suppress=[i for i in t.special_ids if i != t.eom_id], on_token=on_token)

    def texts(self, prompts: list[list[int]]) -> tuple[list[str], Generation]:
        """One reply to each prompt, as text and as it was generated."""
        replies = self.replies(prompts)
        return reply_texts(self.tokenizer, replies.tokens, replies.mask), replies

    def stream(self, prompt: list[int], rows=None) -> str:
        """Print a reply while it is written; what was written until Ctrl-C is kept."""
        decoder, written = codecs.getincrementaldecoder("utf-8")("replace"), []

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
        raise UserError(f"{speaker.o.checkpoint}: a pretrained model has not learned to talk; use --prompt, or an sft "
                        f"checkpoint")
    messages: list[dict[str, str]] = []
    turn = 0
    while True:
        try:
            line = input("You: ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if not line:
            continue
        messages.append({"role": "user", "content": line if messages else apply_template(speaker.template, line)})
        room = speaker.model.config.max_len - speaker.o.max_new_tokens
        while len(ids := speaker.tokenizer.render_chat(messages, reply=True)[0]) > room and len(messages) > 2:
            messages = messages[2:]
        print("MOSS: ", end="")
        messages.append({"role": "assistant", "content": speaker.stream(ids, rows=[turn])})
        turn += 1


def best_of(speaker: Speaker, prompt: str, n: int) -> None:
    """Draw n replies, print them from worst to best by the reward model."""
    where = speaker.o.reward_from or str(pathlib.Path(speaker.o.checkpoint).parent / "reward")
    reward_model, tokenizer, _ = load_checkpoint(where, speaker.device, RewardModel)
    tokenizer.require_same(speaker.tokenizer, f"{where} and {speaker.o.checkpoint}")
    ids = [speaker.ids(prompt)] * n
    texts, replies = speaker.texts(ids)
    scores = reward_scores(reward_model, ids, replies)
    for i in scores.argsort().tolist():
        print(f"{scores[i]:+.2f}  {texts[i]}")


def compare(folders: list[str], prompts: list, o: SampleOptions) -> None:
    """The same prompts and random numbers through two checkpoints."""
    if len(folders) != 2:
        raise UserError(f"--compare needs two run folders, got {len(folders)}: --compare out/reviews/sft "
                        f"out/reviews/ppo")
    speakers = [Speaker(f, o) for f in folders]
    texts = [s.texts([s.ids(p) for p in prompts])[0] for s in speakers]
    for prompt, *replies in zip(prompts, *texts, strict=True):
        print(f"\n» {prompt}")
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
        chat(speaker)
    elif o.file:
        prompts = [r["prompt"] for r in load_records(o.file, "ppo")]
        texts, replies = speaker.texts([speaker.ids(p) for p in prompts])
        for prompt, text, mask in zip(prompts, texts, replies.mask, strict=True):
            print(json.dumps({"prompt": prompt, "response": text, "tokens": int(mask.sum())}, ensure_ascii=False))
    elif o.prompt and o.best_of > 1:
        best_of(speaker, o.prompt, o.best_of)
    elif o.prompt:
        print(o.prompt, end="", flush=True)
        speaker.stream(speaker.ids(o.prompt))
    else:
        raise UserError("nothing to do: give --prompt TEXT, --chat, --file FILE or --compare DIR DIR")


if __name__ == "__main__":
    sys.exit(run_main(main, sys.argv[1:]))
