"""How fast Mosslet runs here, as a share of what this machine can do.

    python -m tools.bench                     all of the below
    python -m tools.bench limits    memory bandwidth and matrix products, which shares refer to
    python -m tools.bench decode    writing replies, of equal and of uneven length
    python -m tools.bench gae       advantages of ragged rows, against a loop over the columns
    python -m tools.bench train     the learning part of a PPO update, eager and compiled
    python -m tools.bench ppo       whole PPO updates
    python -m tools.bench growth    time by context, batch and length; peak memory

    python -m tools.bench ppo --peers --peer_python PYTHON          in turns with TRL's

Each figure is a median of --repeats measurements taken in turns with what it is compared to; the
last line is JSON. The peers (transformers' generate, TRL's PPOTrainer) run by the scripts in
--peers_folder under another Python.
"""
import runtime  # noqa: F401 (before torch: it sets how threads wait)
import functools
import json
import os
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from model import ModelConfig, Transformer, log_softmax
from ppo import gae
from runtime.decoding import packed_product
from runtime.device import compiler_fault
from runtime.machine import keep_freed_memory, processor
from runtime.options import UserError, parse, run_main
from sample import Decoder, generate
from tools.bench_ppo import growth, ppo
from tools.measure import (BASE, SMALL, TYPES, BenchOptions, best_products, in_turns, limits,
                           median_range, peer, random_model, random_prompts, ratio, say, seconds,
                           several, step_products)

PROMPT, NEW = 32, 96
SECTIONS = ("limits", "decode", "gae", "train", "ppo", "growth")

# ---- decoding ------------------------------------------------------------------------------------

def bare_step(config: ModelConfig, batch: int, dtype: torch.dtype) -> Callable[[], float]:
    """A function that runs the bare products of one decoding step in each available form and
    returns the seconds of the fastest: the limit of a step.

    Each round also copies as many bytes as the step's keys and values have on average. So its
    working set, and what of it stays in the processor's cache, is that of a real step; the copy's
    time belongs to the limit.
    """
    weights = [torch.randn(n_out, n_in).to(dtype) for n_in, n_out in step_products(config)]
    xs = [torch.randn(batch, w.shape[1]).to(dtype) for w in weights]
    forms = [lambda: [F.linear(x, w) for x, w in zip(xs, weights, strict=True)]]
    packed = [packed_product(w, batch, "onednn") for w in weights]
    if None not in packed:
        forms.append(lambda: [multiply(x) for x, multiply in zip(xs, packed, strict=True)])
    if batch == 1 and not compiler_fault():
        fused = torch.compile(lambda xs, ws: [(x.float() * w.float()).sum(-1).to(dtype)
                                              for x, w in zip(xs, ws, strict=True)])
        forms.append(lambda: fused(xs, weights))
    numbers = config.n_layer * batch * int(PROMPT + NEW / 2) * config.n_kv_head * config.head_dim
    keys, values = torch.zeros(numbers, dtype=dtype), torch.zeros(numbers, dtype=dtype)

    def once(form: Callable) -> None:
        form()
        keys.copy_(values)  # reads half of the bytes and writes the other half

    for form in forms:  # compile and warm up
        form()

    @torch.inference_mode()
    def fastest_form() -> float:
        return min(seconds(several, functools.partial(once, form), 20) / 20 for form in forms)

    return fastest_form


def sampler_gap(model: Transformer, tokens: Tensor, reply, dtype: str) -> float:
    """Mean |decoder's log-probability − the training forward's|."""
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
        hidden = model.hidden(torch.cat((tokens, reply.tokens), 1))[:, tokens.shape[1] - 1:-1]
    with torch.no_grad():
        scored = log_softmax(model.head(hidden.float())).gather(2, reply.tokens[..., None])[..., 0]
    return float((scored - reply.logprobs).abs().mean())


def decode(o: BenchOptions) -> list[dict]:
    """Replies of equal length: tokens a second, the decoding step against its limit, and
    transformers' generate."""
    table, compiles = [], not compiler_fault()
    for shape, config, batch in (("small", SMALL, 1), ("small", SMALL, 32), ("small", SMALL, 128),
                                 ("base", BASE, 1), ("base", BASE, 32)):
        bare = {name: bare_step(config, batch, dtype) for name, dtype in TYPES.items()}
        exact = min(TYPES, key=lambda name: min(bare[name]() for _ in range(3)))
        model = random_model(config)
        tokens, mask = random_prompts(config, batch)
        decoders = {name: Decoder(model, name, compile=compiles) for name in (exact, "int8")}
        first, gap, limits, theirs = {}, {}, [], []
        rates: dict[str, list[float]] = {name: [] for name in decoders}
        steps: dict[str, list[float]] = {name: [] for name in decoders}
        for name, decoder in decoders.items():
            start = time.perf_counter()
            reply = generate(model, tokens, mask, NEW, decoder=decoder)
            first[name] = round(time.perf_counter() - start, 1)
            gap[name] = sampler_gap(model, tokens, reply, exact)
        for _ in range(o.repeats):
            limits.append(bare[exact]())
            for name, decoder in decoders.items():
                whole = seconds(generate, model, tokens, mask, NEW, decoder=decoder)
                prompt_alone = seconds(generate, model, tokens, mask, 1, decoder=decoder)
                rates[name].append(batch * NEW / whole)
                steps[name].append((whole - prompt_alone) / (NEW - 1))
            line = peer(o, "hf_generate.py", "--shape", "tiny" if shape == "small" else "124M",
                        "--batch", str(batch), "--dtype",
                        "bf16" if exact == "bfloat16" else "fp32", "--runs", "1")
            theirs += [line["tokens_per_s"]] if line else []
        for name in decoders:
            table.append({"shape": shape, "batch": batch, "dtype": name,
                          "tokens_per_s": median_range(rates[name], 0),
                          "step_ms": median_range([1e3 * t for t in steps[name]]),
                          "limit_ms": (median_range([1e3 * t for t in limits])
                                       if name == exact else "–"),
                          "share": ratio(limits, steps[name]) if name == exact else "–",
                          "sampler_gap": f"{gap[name]:.1e}", "first_call_s": first[name],
                          "transformers": f"{median_range(theirs, 0)} {exact}" if theirs else "–",
                          "ratio": ratio(rates[name], theirs) if theirs else "–"})
            print(json.dumps(table[-1]), flush=True)
    say(f"Decoding {PROMPT} + {NEW} tokens ({'compiled' if compiles else 'eager'})",
        [list(row.values()) for row in table], list(table[0]))
    return table


class EndingDecoder(Decoder):
    """Ends each reply with a fixed probability a token, from a stream of its own."""

    END, CHANCE = 0, 4 / NEW

    def step(self, rows: int, temperature: float) -> Callable:
        inner, stream = super().step(rows, temperature), torch.Generator().manual_seed(rows)

        def step(*arguments):
            token, logprob = inner(*arguments)
            return torch.where(torch.rand(len(token), generator=stream) < self.CHANCE, self.END,
                               token), logprob
        return step


def uneven(o: BenchOptions, n: int = 256, rows: int = 32) -> dict:
    """Replies of uneven length: rows of ended replies go to the next prompts, against all rows
    running to the end."""
    compiles = not compiler_fault()
    model, (tokens, mask) = random_model(SMALL), random_prompts(SMALL, n)
    bare = {name: bare_step(SMALL, rows, dtype) for name, dtype in TYPES.items()}
    dtype = min(TYPES, key=lambda name: bare[name]())
    refilled, kept = EndingDecoder(model, dtype, compiles), Decoder(model, dtype, compiles)
    replies = generate(model, tokens, mask, NEW, decoder=refilled, end_id=EndingDecoder.END,
                       batch_size=rows)
    times = in_turns({
        "kept": lambda: [generate(model, tokens[i:i + rows], mask[i:i + rows], NEW, decoder=kept)
                         for i in range(0, n, rows)],
        "refilled": lambda: generate(model, tokens, mask, NEW, decoder=refilled,
                                     end_id=EndingDecoder.END, batch_size=rows)}, o.repeats)
    result = {"prompts": n, "rows": rows, "dtype": dtype,
              "mean_length": round(float(replies.mask.sum()) / n, 1),
              "kept_s": median_range(times["kept"]), "refilled_s": median_range(times["refilled"]),
              "ratio": ratio(times["kept"], times["refilled"])}
    say("Replies of uneven length: all rows kept to the end, against rows refilled with the next "
        "prompts", [list(result.values())], list(result))
    return result


# ---- advantages ----------------------------------------------------------------------------------

def gae_by_columns(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float,
                   lam: float) -> Tensor:
    """Advantages (B, R) by the usual loop from the last column to the first; 0 where the mask is
    False."""
    rewards, values = torch.where(mask, rewards, 0), torch.where(mask, values, 0)
    advantages, later = torch.zeros_like(rewards), torch.zeros_like(rewards[:, 0])
    for t in range(rewards.shape[1] - 1, -1, -1):
        next_values = values[:, t + 1] if t + 1 < rewards.shape[1] else 0
        later = rewards[:, t] + gamma * next_values - values[:, t] + gamma * lam * later
        advantages[:, t] = later
    return torch.where(mask, advantages, 0)


def ragged_mask(rows: int, columns: int) -> Tensor:
    """Replies of 1 to `columns` tokens, as rollouts have them, (rows, columns) bool."""
    lengths = torch.randint(1, columns + 1, (rows, 1), generator=torch.Generator().manual_seed(1))
    return torch.arange(columns) < lengths


def advantages(o: BenchOptions) -> list[dict]:
    """`gae` on ragged rows, eager and compiled, against the loop over columns on the same rows."""
    table, gamma, lam = [], 1.0, 0.95
    compiled = torch.compile(gae) if not compiler_fault() else None
    for shape in ((96, 64), (64, 512), (256, 1024), (512, 4096)):
        g = torch.Generator().manual_seed(0)
        rewards, values = torch.randn(shape, generator=g), torch.randn(shape, generator=g)
        mask = ragged_mask(*shape)
        exact = gae_by_columns(rewards.double(), values.double(), mask, gamma, lam)
        advantage, _ = gae(rewards, values, mask, gamma, lam)
        error = float((advantage - exact).abs().max() / exact.abs().max())
        calls = max(10, 2**22 // rewards.numel())  # of ours, in about the time of one loop
        arguments = (rewards, values, mask, gamma, lam)
        forms = {"ours": gae, **({"compiled": compiled} if compiled else {})}
        works = {"loop": functools.partial(gae_by_columns, *arguments)}
        for name, form in forms.items():
            works[name] = functools.partial(several, functools.partial(form, *arguments), calls)
        times = in_turns(works, max(o.repeats, 5))
        ms = {name: [1e3 * t / (calls if name in forms else 1) for t in times[name]]
              for name in works}
        table.append({"shape": f"{shape[0]} x {shape[1]}",
                      "mean_length": round(float(mask.sum()) / shape[0], 1),
                      "loop_ms": median_range(ms["loop"]),
                      "ours_ms": median_range(ms["ours"], 3),
                      "ratio": ratio(ms["loop"], ms["ours"]),
                      "compiled_ms": median_range(ms["compiled"], 3) if compiled else "–",
                      "error": f"{error:.1e}"})
    say("Advantages and returns of ragged rows, 1 to all columns long (γ 1, λ .95, float32); "
        "error: the largest against the loop in float64, as a share of the largest advantage",
        [list(row.values()) for row in table], list(table[0]))
    return table


# ---- command line --------------------------------------------------------------------------------

def main(argv: list[str]) -> None:
    section, rest = (argv[0], argv[1:]) if argv and not argv[0].startswith("-") else ("all", argv)
    if section not in (*SECTIONS, "all"):
        raise UserError(f"unknown part {section!r}: use {', '.join(SECTIONS)} or all")
    o = parse(BenchOptions, rest, "-m tools.bench")
    keep_freed_memory()
    if fault := compiler_fault():
        print(f"torch.compile does not work here, so everything runs eagerly: {fault}")
    results = {"processor": processor(), "threads": torch.get_num_threads(),
               "torch": torch.__version__, "products": best_products(),
               "load": os.getloadavg()[0], "limits": limits(o)}
    parts = {"decode": lambda: {"equal": decode(o), "uneven": uneven(o)},
             "gae": lambda: advantages(o), "train": lambda: ppo(o, learning_only=True),
             "ppo": lambda: ppo(o), "growth": lambda: growth(o)}
    names = [name for name in parts if name != "train"] if section == "all" else [section]
    for name in names:  # `all` has train in ppo, and limits in any case
        if name in parts:
            results[name] = parts[name]()
    print(json.dumps(results))


if __name__ == "__main__":
    sys.exit(run_main(main, sys.argv[1:]))
