"""How fast Mosslet runs here, as a share of what this machine can do.

    python -m tools.bench                     all of the below
    python -m tools.bench limits              memory bandwidth and matrix products by type: the rest is measured by them
    python -m tools.bench decode              writing replies, of equal and of uneven length
    python -m tools.bench gae                 advantages, against a Python loop over the columns
    python -m tools.bench train               the learning part of a PPO update, eagerly and compiled
    python -m tools.bench ppo --peers --peer_python PYTHON       whole PPO updates; with --peers in turns with TRL's
    python -m tools.bench growth              time against context, batch and length; peak memory against what is held

Each figure is a median of --repeats measurements taken in turns with what it is compared to; the last line is JSON. The
peers (transformers' generate, TRL's PPOTrainer) run by the scripts in --peers_folder under another Python.
"""
import contextlib
import copy
import dataclasses
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from model import ModelConfig, Transformer, log_softmax
from ppo import ActorCritic, PPOOptions, RunningMoments, advantages_of, collect_rollout, gae, gae_tables, update
from reward import RewardModel, critic_from
from runtime import decoding, device, products
from runtime.machine import keep_freed_memory, processor
from runtime.options import Options, UserError, option, parse, run_main
from sample import Decoder, generate

SMALL = ModelConfig(vocab_size=4096, n_layer=6, n_head=6, n_kv_head=6, d_model=384, d_ff=1024, max_len=256)  # 12.2 M
BASE = ModelConfig(vocab_size=32_000, n_layer=12, n_head=12, n_kv_head=12, d_model=768, d_ff=2048, max_len=256)  # 110 M
TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PROMPT, NEW = 32, 96
SECTIONS = ("limits", "decode", "gae", "train", "ppo", "growth")


@dataclasses.dataclass
class BenchOptions(Options):
    """`python -m tools.bench [limits|decode|gae|train|ppo|growth|all]`"""

    repeats: int = option(5, "measurements of each figure, in turns", low=1)
    peers: bool = option(False, "measure the peers, too, in turns with ours")
    peer_python: str = option(sys.executable, "Python in whose environment the peers are installed")
    peers_folder: str = option("../shared/peers", "folder of the peers' scripts")
    only: str = option("", "decode: one setting alone, such as small:32")
    profile: bool = option(False, "print where the time of one measurement goes")
    traceback: bool = option(False, "show where in the code an error arose")


# ---- measuring -------------------------------------------------------------------------------------------------------

def seconds(work: Callable, *arguments, **settings) -> float:
    """How long one call takes."""
    start = time.perf_counter()
    work(*arguments, **settings)
    return time.perf_counter() - start


def several(work: Callable[[], object], n: int) -> None:
    for _ in range(n):
        work()


def in_turns(works: dict[str, Callable[[], object]], repeats: int, inner: int = 1) -> dict[str, list[float]]:
    """Seconds of one call of each, measured `repeats` times in turns, after one call that is not counted."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for i in range(-1, repeats):
        for name, work in works.items():
            took = seconds(several, work, inner) / inner
            if i >= 0:
                times[name].append(took)
    return times


def fastest(works: Sequence[Callable[[], object]], repeats: int = 5, inner: int = 3) -> float:
    """The best time that any of these takes: what limits are made of."""
    return min(min(times) for times in in_turns(dict(enumerate(works)), repeats, inner).values())


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Median, and the least and greatest."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}–{max(values):.{digits}f})"


def ratio(above: Sequence[float], below: Sequence[float]) -> str:
    """Median and range of the ratios of measurements taken one after the other."""
    return spread([a / b for a, b in zip(above, below, strict=True)])


def say(title: str, rows: Sequence[Sequence[object]], columns: Sequence[str]) -> None:
    """A table in Markdown."""
    print(f"\n{title}\n\n| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
    for row in rows:
        print("| " + " | ".join(map(str, row)) + " |")
    sys.stdout.flush()


def peer(o: BenchOptions, script: str, *arguments: str) -> dict | None:
    """The JSON line that a peer's script ends with; None where it cannot run, which is said once."""
    path = pathlib.Path(o.peers_folder) / script
    if not o.peers or not path.exists():
        if o.peers:
            print(f"{path}: not there, so this peer is left out (--peers_folder says where to look)")
        return None
    done = subprocess.run([o.peer_python, str(path), *arguments], capture_output=True, text=True)
    if done.returncode:
        print(f"{path}: left out, it ends with: {done.stderr.strip().splitlines()[-1][:150] if done.stderr else ''}")
        return None
    return json.loads(done.stdout.strip().splitlines()[-1])


@contextlib.contextmanager
def profiled(o: BenchOptions):
    """Print where time goes inside, if so asked."""
    if not o.profile:
        yield
        return
    with torch.profiler.profile() as profile:
        yield
    print(profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=20, max_name_column_width=60))


# ---- limits ----------------------------------------------------------------------------------------------------------

def bandwidth() -> float:
    """Bytes read and written a second by copying 256 MB."""
    source = torch.randn(2**26)
    target = torch.empty_like(source)
    return 2 * 4 * 2**26 / fastest([lambda: target.copy_(source)])


def product_forms(rows: int, n_in: int, n_out: int, dtype: torch.dtype) -> list[Callable[[], Tensor]]:
    """x (rows, n_in) @ w (n_out, n_in)ᵀ in the ways that there are here, and both gradients' products likewise."""
    x, w = torch.randn(rows, n_in).to(dtype), torch.randn(n_out, n_in).to(dtype)
    forms = [lambda: F.linear(x, w)]
    if products._onednn is not None:
        forms.append(lambda: products._product(x, w))
    return forms


def limits(o: BenchOptions) -> dict:
    """What the machine can do."""
    found = {"copy_GB_s": round(bandwidth() / 1e9, 1)}
    for rows, n_in, n_out in ((2048, 2048, 2048), (2048, 384, 1024)):
        for name, dtype in TYPES.items():
            best = fastest(product_forms(rows, n_in, n_out, dtype))
            plain = fastest(product_forms(rows, n_in, n_out, dtype)[:1])
            found[f"{name}_{rows}x{n_in}x{n_out}_GFLOP_s"] = round(2e-9 * rows * n_in * n_out / best)
            found[f"{name}_{rows}x{n_in}x{n_out}_F.linear_GFLOP_s"] = round(2e-9 * rows * n_in * n_out / plain)
    say(f"Limits of this machine ({processor()}, {torch.get_num_threads()} threads, torch {torch.__version__})",
        found.items(), ("limit", "value"))
    return found


def step_products(config: ModelConfig) -> list[tuple[int, int]]:
    """(n_in, n_out) of every product of one decoding step."""
    heads = (config.n_head + 2 * config.n_kv_head) * config.head_dim
    layer = [(config.d_model, heads), (config.d_model, config.d_model), (config.d_model, 2 * config.d_ff),
             (config.d_ff, config.d_model)]
    return layer * config.n_layer + [(config.d_model, config.vocab_size)]


def bare_step(config: ModelConfig, batch: int, dtype: torch.dtype) -> Callable[[], float]:
    """A function that loops the bare products of one decoding step, each form that there is, and returns the seconds of
    the fastest form: the limit of a step.

    Between two rounds as many bytes are copied as the step's keys and values have on average, so that the working set,
    and with it what is still in the processor's cache, is the step's own: what the copies take is their part of the
    limit.
    """
    weights = [torch.randn(n_out, n_in).to(dtype) for n_in, n_out in step_products(config)]
    xs = [torch.randn(batch, w.shape[1]).to(dtype) for w in weights]
    forms = [lambda: [F.linear(x, w) for x, w in zip(xs, weights, strict=True)]]
    packed = [decoding._pack(w, batch) for w in weights]
    if None not in packed:
        forms.append(lambda: [multiply(x) for x, multiply in zip(xs, packed, strict=True)])
    if batch == 1 and not device.compiler_fault():
        fused = torch.compile(lambda xs, ws: [(x.float() * w.float()).sum(-1).to(dtype)
                                              for x, w in zip(xs, ws, strict=True)])
        forms.append(lambda: fused(xs, weights))
    numbers = config.n_layer * batch * int(PROMPT + NEW / 2) * config.n_kv_head * config.head_dim
    keys, values = torch.zeros(numbers, dtype=dtype), torch.zeros(numbers, dtype=dtype)

    def once(form: Callable) -> None:
        form()
        keys.copy_(values)  # reads half of the bytes and writes the other half

    for form in forms:
        form()
    return torch.inference_mode()(lambda: min(seconds(several, lambda: once(form), 20) / 20  # noqa: B023
                                              for form in forms))


# ---- decoding --------------------------------------------------------------------------------------------------------

def random_model(config: ModelConfig) -> Transformer:
    model = Transformer(config)
    model.initialise(1)
    return model.eval()


def random_prompts(config: ModelConfig, n: int, length: int = PROMPT) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(1, config.vocab_size, (n, length), generator=torch.Generator().manual_seed(0))
    return tokens, torch.ones_like(tokens).bool()


def sampler_gap(model: Transformer, tokens: Tensor, reply, dtype: str) -> float:
    """Mean |decoder's log-probability − the training forward's|."""
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
        hidden = model.hidden(torch.cat((tokens, reply.tokens), 1))[:, tokens.shape[1] - 1:-1]
    with torch.no_grad():
        scored = log_softmax(model.head(hidden.float())).gather(2, reply.tokens[..., None])[..., 0]
    return float((scored - reply.logprobs).abs().mean())


def decode(o: BenchOptions) -> list[dict]:
    """Replies of equal length: tokens a second, the decoding step against its limit, and transformers' generate."""
    found, compiles = [], not device.compiler_fault()
    for shape, config, batch in (("small", SMALL, 1), ("small", SMALL, 32), ("small", SMALL, 128), ("base", BASE, 1),
                                 ("base", BASE, 32)):
        if o.only and o.only != f"{shape}:{batch}":
            continue
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
            line = peer(o, "hf_generate.py", "--shape", "tiny" if shape == "small" else "124M", "--batch", str(batch),
                        "--dtype", "bf16" if exact == "bfloat16" else "fp32", "--runs", "1")
            theirs += [line["tokens_per_s"]] if line else []
        with profiled(o):
            generate(model, tokens, mask, NEW, decoder=decoders[exact])
        for name in decoders:
            found.append({"shape": shape, "batch": batch, "dtype": name, "tokens_per_s": spread(rates[name], 0),
                          "step_ms": spread([1e3 * t for t in steps[name]]),
                          "limit_ms": spread([1e3 * t for t in limits]) if name == exact else "–",
                          "share": ratio(limits, steps[name]) if name == exact else "–",
                          "sampler_gap": f"{gap[name]:.1e}", "first_call_s": first[name],
                          "transformers": f"{spread(theirs, 0)} {exact}" if theirs else "–",
                          "ratio": ratio(rates[name], theirs) if theirs else "–"})
            print(json.dumps(found[-1]), flush=True)
    say(f"Decoding {PROMPT} + {NEW} tokens ({'compiled' if compiles else 'eager'})",
        [list(row.values()) for row in found], list(found[0]))
    return found


class EndingDecoder(Decoder):
    """Ends each reply with a fixed probability a token, from a stream of its own."""

    END, CHANCE = 0, 4 / NEW

    def step(self, rows: int, temperature: float) -> Callable:
        inner, stream = super().step(rows, temperature), torch.Generator().manual_seed(rows)

        def step(*arguments):
            token, logprob = inner(*arguments)
            return torch.where(torch.rand(len(token), generator=stream) < self.CHANCE, self.END, token), logprob
        return step


def uneven(o: BenchOptions, n: int = 256, rows: int = 32) -> dict:
    """Replies of uneven length: places of ended ones are taken by the next prompts, against all rows kept."""
    compiles = not device.compiler_fault()
    model, (tokens, mask) = random_model(SMALL), random_prompts(SMALL, n)
    bare = {name: bare_step(SMALL, rows, dtype) for name, dtype in TYPES.items()}
    dtype = min(TYPES, key=lambda name: bare[name]())
    refilled, kept = EndingDecoder(model, dtype, compiles), Decoder(model, dtype, compiles)
    replies = generate(model, tokens, mask, NEW, decoder=refilled, end_id=EndingDecoder.END, batch_size=rows)
    times = in_turns({
        "kept": lambda: [generate(model, tokens[i:i + rows], mask[i:i + rows], NEW, decoder=kept)
                         for i in range(0, n, rows)],
        "refilled": lambda: generate(model, tokens, mask, NEW, decoder=refilled, end_id=EndingDecoder.END,
                                     batch_size=rows)}, o.repeats)
    found = {"prompts": n, "rows": rows, "dtype": dtype, "mean_length": round(float(replies.mask.sum()) / n, 1),
             "kept_s": spread(times["kept"]), "refilled_s": spread(times["refilled"]),
             "ratio": ratio(times["kept"], times["refilled"])}
    say("Replies of uneven length: all rows kept to the end, against free rows taken by the next prompts",
        [list(found.values())], list(found))
    return found


# ---- advantages ------------------------------------------------------------------------------------------------------

def gae_by_columns(rewards: Tensor, values: Tensor, gamma: float, lam: float) -> Tensor:
    """The usual form: a Python loop from the last column to the first."""
    advantages, last = torch.empty_like(rewards), torch.zeros_like(rewards[:, 0])
    for t in range(rewards.shape[1] - 1, -1, -1):
        following = values[:, t + 1] if t + 1 < rewards.shape[1] else 0
        last = rewards[:, t] + gamma * following - values[:, t] + gamma * lam * last
        advantages[:, t] = last
    return advantages


def advantages(o: BenchOptions) -> list[dict]:
    """GAE without a loop, eagerly; beside it shaping, GAE, returns and whitening together, compiled."""
    found, gamma, lam = [], 1.0, 0.95
    compiled = torch.compile(advantages_of) if not device.compiler_fault() else None
    for shape in ((64, 512), (256, 1024), (512, 4096)):
        g = torch.Generator().manual_seed(0)
        rewards, values, logprobs, references = (torch.randn(shape, generator=g) for _ in range(4))
        mask, scores = torch.ones(shape, dtype=torch.bool), torch.randn(shape[0], generator=g)
        exact = gae_by_columns(rewards.double(), values.double(), gamma, lam)
        error = float((gae(rewards, values, mask, gamma, lam)[0] - exact).abs().max() / exact.abs().max())
        calls = max(10, 2**22 // rewards.numel())  # of ours, which together take about as long as one of the loop
        works = {"loop": lambda r=rewards, v=values: gae_by_columns(r, v, gamma, lam),
                 "ours": lambda r=rewards, v=values, m=mask, calls=calls: several(lambda: gae(r, v, m, gamma, lam),
                                                                                  calls),
                 "add": lambda r=rewards, v=values, calls=calls: several(lambda: r + v, calls)}
        chain = (scores, logprobs, references, values, mask, 0.05, "k1", gamma, lam, True,
                 gae_tables(gamma * lam, shape[1], "cpu"))
        works["chain"] = lambda chain=chain, calls=calls: several(lambda: advantages_of(*chain), calls)
        first = 0.0
        if compiled:
            first = seconds(compiled, *chain)
            works["compiled"] = lambda chain=chain, calls=calls: several(lambda: compiled(*chain), calls)
        times = in_turns(works, max(o.repeats, 5))
        ms = {name: [1e3 * t / (1 if name == "loop" else calls) for t in ts] for name, ts in times.items()}
        found.append({"shape": f"{shape[0]} x {shape[1]}", "loop_ms": spread(ms["loop"]),
                      "ours_ms": spread(ms["ours"], 3), "ratio": ratio(ms["loop"], ms["ours"]),
                      "error": f"{error:.1e}", "one_add_ms": spread(ms["add"], 3), "chain_ms": spread(ms["chain"], 3),
                      "chain_compiled_ms": spread(ms["compiled"], 3) if compiled else "–",
                      "compilation_s": round(first, 1)})
    say("Advantages (γ 1, λ .95, float32): eager, and the whole chain from scores to whitened advantages",
        [list(row.values()) for row in found], list(found[0]))
    return found


# ---- a PPO update ----------------------------------------------------------------------------------------------------

class Update:
    """Four networks of one shape, and updates of 64 episodes of 64 + 64 tokens."""

    def __init__(self, dtype: str, compiles: bool, critic: str = "separate", episodes: int = 64, prompt: int = 64,
                 reply: int = 64, epochs: int = 4, config: ModelConfig = SMALL):
        self.dtype, self.step, self.prompt = dtype, 0, prompt
        policy = random_model(config)
        self.reference = copy.deepcopy(policy).requires_grad_(False)
        self.reward_model = RewardModel(config).requires_grad_(False)
        self.networks = ActorCritic(policy, critic_from(self.reward_model) if critic == "separate" else None)
        if compiles:
            trunks = [policy, self.reference, self.reward_model.backbone]
            device.compile_trunks(*trunks, *([self.networks.critic.backbone] if critic == "separate" else []))
        self.decoder = Decoder(policy, dtype, compiles)
        groups = [{"params": list(policy.parameters()), "lr": 1e-5},
                  {"params": self.networks.critic_parameters(), "lr": 1e-5}]
        self.optimizer = torch.optim.Adam(groups, eps=1e-8, fused=True)
        self.o = PPOOptions(batch=episodes, rollout_rows=episodes, reply_len=reply, epochs=epochs, minibatches=1,
                            micro_batch=min(16, episodes), reward_norm="fixed")

    def __call__(self) -> dict[str, float]:
        """Seconds of each phase of one update, and the gaps that are watched in a run."""
        rng = np.random.default_rng(self.step)
        prompts = rng.integers(3, self.networks.policy.config.vocab_size, (self.o.batch, self.prompt)).tolist()
        self.decoder.refresh()
        rollout = collect_rollout(self.networks, self.reference, self.reward_model, prompts, self.o, end_id=-2,
                                  step=self.step, kl_coef=0.05, moments=RunningMoments(), dtype=self.dtype,
                                  decoder=self.decoder)
        learned = update(self.networks, self.optimizer, rollout, self.o, self.step, dtype=self.dtype)
        self.step += 1
        self.rollout = rollout
        gap = float((rollout.sampled_logprobs - rollout.logprobs).abs().mean())
        return {**rollout.seconds, "train": learned["seconds_train"], "sampler_gap": gap,
                "total": sum(rollout.seconds.values()) + learned["seconds_train"]}


def bare_update(config: ModelConfig, critic: str, dtype: torch.dtype, o: PPOOptions,
                prompt: int) -> tuple[float, float]:
    """(seconds, GFLOP) of the matrix products of one update's learning, each in its fastest form: for every weight one
    forward and two backward ones, the last layer's and the output's only where replies are; of attention its two
    forward and four backward ones."""
    rows = o.micro_batch * (prompt + o.reply_len)
    chosen = o.micro_batch * o.reply_len
    layer = step_products(config)[:4]
    trunk = [(rows, *p) for p in layer] * (config.n_layer - 1) + [(rows, *layer[0])] + [(chosen, *p) for p in layer[1:]]
    head = [(chosen, config.d_model, config.vocab_size)]
    took, total, flop = {}, 0.0, 0.0
    for m, n_in, n_out in trunk * (2 if critic == "separate" else 1) + head:
        kind = torch.float32 if (n_out == config.vocab_size) else dtype  # the logits are float32 in any case
        if (m, n_in, n_out) not in took:
            x, w, g = (torch.randn(shape).to(kind) for shape in ((m, n_in), (n_out, n_in), (m, n_out)))
            forms = [[lambda x=x, w=w: F.linear(x, w), lambda x=x, w=w: products._product(x, w)],
                     [lambda g=g, w=w: g @ w, lambda g=g, w=w: products._product(g, w.t())],
                     [lambda g=g, x=x: g.t() @ x, lambda g=g, x=x: products._weight_gradient(g, x)]]
            took[m, n_in, n_out] = sum(fastest(f if products._onednn is not None else f[:1]) for f in forms)
        total += took[m, n_in, n_out]
        flop += 6e-9 * m * n_in * n_out
    length, count = prompt + o.reply_len, o.micro_batch * config.n_head
    q, scores = torch.randn(count, length, config.head_dim).to(dtype), torch.randn(count, length, length).to(dtype)
    models = 2 if critic == "separate" else 1
    attention = 3 * (fastest([lambda: q @ q.mT]) + fastest([lambda: scores @ q])) * config.n_layer * models
    flop += 6 * 2e-9 * count * length * length * config.head_dim * config.n_layer * models
    pieces = o.epochs * o.batch // o.micro_batch
    return pieces * (total + attention), pieces * flop


def ppo(o: BenchOptions, learning_only: bool = False) -> list[dict]:
    """Updates in both precisions, eager and compiled, with a critic of its own and with a shared trunk."""
    found, compiles = [], not device.compiler_fault()
    theirs: dict[str, list[float]] = {"": [], "--bf16": []}
    settings = [("separate", dtype, compiled) for dtype in TYPES for compiled in (False, True)[:1 + compiles]]
    if not learning_only:
        settings += [("shared", dtype, compiles) for dtype in TYPES]
    updates, first = {}, {}
    for setting in settings:
        updates[setting] = Update(setting[1], setting[2], setting[0])
        first[setting] = seconds(updates[setting])
    results: dict[tuple, list[dict]] = {setting: [] for setting in settings}
    for _ in range(o.repeats):
        for (critic, dtype, compiled), work in updates.items():
            row = work()
            row["bare"], row["GFLOP"] = bare_update(SMALL, critic, TYPES[dtype], work.o, 64)  # in turns: it drifts, too
            results[critic, dtype, compiled].append(row)
        for flag in theirs if not learning_only else ():
            if line := peer(o, "trl_ppo.py", "1", *flag.split()):
                theirs[flag].append(line["s_per_update"])
    for (critic, dtype, compiled), rows in results.items():
        flop = rows[0]["GFLOP"]
        row = {"critic": critic, "dtype": dtype, "compiled": compiled,
               **{f"{k}_s": spread([r[k] for r in rows]) for k in ("generate", "score", "train", "total")},
               "GFLOP": round(flop), "GFLOP_s": spread([flop / r["train"] for r in rows], 0),
               "bare_s": spread([r["bare"] for r in rows]),
               "share": ratio([r["bare"] for r in rows], [r["train"] for r in rows]),
               "first_s": round(first[critic, dtype, compiled], 1),
               "sampler_gap": f"{rows[-1]['sampler_gap']:.1e}"}
        for flag, label in (("", "TRL_float32"), ("--bf16", "TRL_bf16")):
            if theirs[flag]:
                row[f"{label}_s"] = spread(theirs[flag])
                row[f"times_{label}"] = ratio(theirs[flag], [r["total"] for r in rows][:len(theirs[flag])])
        found.append(row)
    with profiled(o):
        updates[settings[0]]()
    say("PPO updates: 64 episodes of 64 + 64 tokens, 4 epochs, micro-batches of 16, models of 12.2 M parameters",
        [list(row.values()) for row in found], list(found[0]))
    return found


# ---- growth ----------------------------------------------------------------------------------------------------------

def peak_bytes(work: Callable[[], object]) -> tuple[int, int]:
    """(resident memory before, its peak during the work), where Linux tells; else zeros."""
    try:
        pathlib.Path("/proc/self/clear_refs").write_text("5")
        before = int(next(line for line in open("/proc/self/status") if line.startswith("VmRSS")).split()[1])
        work()
        peak = int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
        return 1024 * before, 1024 * peak
    except OSError:
        work()
        return 0, 0


def growth(o: BenchOptions) -> dict:
    """Tables in which nothing may grow faster than it must."""
    dtype = "bfloat16" if fastest(product_forms(2048, 384, 1024, torch.bfloat16)) < fastest(
        product_forms(2048, 384, 1024, torch.float32)) else "float32"
    # Memory first: what is freed is kept, so that later one would see the largest of all that came before.
    work = Update(dtype, False, epochs=1)
    prompts = np.random.default_rng(0).integers(3, 4096, (64, 64)).tolist()
    weights = sum(p.numel() * 4 for m in (work.networks, work.reference, work.reward_model) for p in m.parameters())
    trained = sum(p.numel() * 4 for p in work.networks.parameters())
    half = 2 if dtype == "bfloat16" else 4
    held = {"weights": weights, "KV": 2 * 6 * 64 * 128 * 384 * half, "packed": 12.2e6 * half}
    collect = lambda: collect_rollout(work.networks, work.reference, work.reward_model, prompts, work.o,  # noqa: E731
                                      end_id=-2, step=0, kl_coef=.05, moments=RunningMoments(), dtype=dtype,
                                      decoder=work.decoder)
    memory = []
    before, peak = peak_bytes(lambda: setattr(work, "rollout", collect()))
    memory.append(("rollout", before, peak, held["KV"] + held["packed"]))
    before, peak = peak_bytes(lambda: update(work.networks, work.optimizer, work.rollout, work.o, 0, dtype=dtype))
    activations = 2 * 2048 * (6 * (12 * 384 + 3 * 1024)) * 4 + 1024 * 4096 * 4 * 2
    memory.append(("update", before, peak, 3 * trained + activations))
    say(f"Peak memory in MB (weights of the four networks: {weights / 1e6:.0f}); needed: a rollout's keys, values and "
        "packed weights; an update's gradients, Adam's moments and one micro-batch's activations of policy and critic",
        [(name, *(round(x / 1e6) for x in (b, p, p - b, need))) for name, b, p, need in memory],
        ("phase", "before", "peak", "more", "needed"))
    compiles = not device.compiler_fault()
    config = dataclasses.replace(SMALL, max_len=2176)
    model, rows = random_model(config), []
    decoder = Decoder(model, dtype, compiles)
    for context in (128, 256, 512, 1024, 2048):
        tokens, mask = random_prompts(config, 8, context)
        generate(model, tokens, mask, 64, decoder=decoder)
        with_reply, alone = [], []
        for _ in range(o.repeats):
            with_reply.append(seconds(generate, model, tokens, mask, 64, decoder=decoder))
            alone.append(seconds(generate, model, tokens, mask, 1, decoder=decoder))
        size = torch.finfo(TYPES[dtype]).bits // 8
        rows.append((context, spread([1e3 * (a - b) / 63 for a, b in zip(with_reply, alone, strict=True)]),
                     spread([1e3 * b for b in alone], 0),
                     round(2 * config.n_layer * 8 * context * config.d_model * size / 1e6, 1)))
    say(f"Decoding 8 rows at a context of so many tokens, {dtype}", rows,
        ("context", "ms a step", "ms to read the prompt", "MB of keys and values"))
    times = []
    for episodes, prompt, reply in ((16, 64, 64), (32, 64, 64), (64, 64, 64), (16, 128, 128), (16, 256, 256)):
        work = Update(dtype, False, episodes=episodes, prompt=prompt, reply=reply, epochs=1,
                      config=dataclasses.replace(SMALL, max_len=512))
        work()
        found = [work()["total"] for _ in range(o.repeats)]
        times.append((episodes, prompt + reply, spread(found), spread([1e6 * t / episodes / (prompt + reply)
                                                                       for t in found], 0)))
    say(f"One epoch's update, eager, {dtype}", times, ("episodes", "tokens each", "seconds", "µs a token"))
    return {"decode": rows, "update": times, "memory": memory}


def main(argv: list[str]) -> None:
    section, rest = (argv[0], argv[1:]) if argv and not argv[0].startswith("-") else ("all", argv)
    if section not in (*SECTIONS, "all"):
        raise UserError(f"unknown part {section!r}: use {', '.join(SECTIONS)} or all")
    o = parse(BenchOptions, rest, "-m tools.bench")
    keep_freed_memory()
    products.use_products(products.pick_products("cpu", 384)[0])
    if fault := device.compiler_fault():
        print(f"torch.compile does not work here, so everything runs eagerly: {fault}")
    found = {"processor": processor(), "threads": torch.get_num_threads(), "torch": torch.__version__,
             "products": products.products(), "load": os.getloadavg()[0], "limits": limits(o)}
    parts = {"decode": lambda: {"equal": decode(o), **({} if o.only else {"uneven": uneven(o)})},
             "gae": lambda: advantages(o), "train": lambda: ppo(o, learning_only=True), "ppo": lambda: ppo(o),
             "growth": lambda: growth(o)}
    for name, part in parts.items():
        if section in (name, "all") and not (section == "all" and name == "train"):  # `ppo` holds it
            found[name] = part()
    print(json.dumps(found))


if __name__ == "__main__":
    sys.exit(run_main(main, sys.argv[1:]))
