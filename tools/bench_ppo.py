"""The parts train, ppo and growth of tools/bench.py: speed and peak memory of PPO updates, and how
time grows with size."""
import copy
import dataclasses
import pathlib
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F

from model import ModelConfig
from ppo import ActorCritic, Networks, PPOOptions, Rollout, ScoreScale, collect_rollout, update
from reward import RewardModel, critic_from
from runtime.device import compile_trunks, compiler_fault
from runtime.products import _onednn, _product, _weight_gradient, use_products
from sample import Decoder, generate
from tools.measure import (SMALL, TYPES, BenchOptions, best_products, fastest, median_range, peer,
                           product_forms, random_model, random_prompts, ratio, say, seconds,
                           step_products)

# ---- a PPO update --------------------------------------------------------------------------------

class Update:
    """Four networks of one shape. A call makes one PPO update; by default 64 episodes of 64 + 64
    tokens."""

    def __init__(self, dtype: str, compiles: bool, critic: str = "separate", episodes: int = 64,
                 prompt: int = 64, reply: int = 64, epochs: int = 4, config: ModelConfig = SMALL):
        self.step, self.prompt, policy = 0, prompt, random_model(config)
        reference = copy.deepcopy(policy).requires_grad_(False)
        self.reward_model = RewardModel(config).requires_grad_(False)
        use_products(self.reward_model, best_products())
        self.actor_critic = ActorCritic(policy, critic_from(self.reward_model)
                                        if critic == "separate" else None, dtype)
        if compiles:
            trunks = [policy, reference, self.reward_model.backbone]
            compile_trunks(*trunks, *([self.actor_critic.critic.backbone] if critic == "separate"
                                      else []))
        self.networks = Networks(self.actor_critic, reference, -2, Decoder(policy, dtype, compiles))
        groups = [{"params": list(policy.parameters()), "lr": 1e-5},
                  {"params": list(self.actor_critic.value_module.parameters()), "lr": 1e-5}]
        self.optimizer = torch.optim.Adam(groups, eps=1e-8, fused=True)
        self.o = PPOOptions(batch=episodes, rollout_rows=episodes, reply_len=reply, epochs=epochs,
                            minibatches=1, micro_batch=min(16, episodes), reward_norm="fixed")

    def collect(self) -> Rollout:
        """A rollout on random prompts of this step."""
        rng = np.random.default_rng(self.step)
        prompts = rng.integers(3, self.reward_model.config.vocab_size,
                               (self.o.batch, self.prompt)).tolist()
        return collect_rollout(self.networks, prompts, self.o, step=self.step,
                               scorer=self.reward_model, scale=ScoreScale(), kl_coef=0.05)

    def learn(self, rollout: Rollout) -> dict[str, float]:
        """The metrics of `ppo.update` on this rollout."""
        return update(self.actor_critic, self.optimizer, rollout, self.o, self.step)

    def __call__(self) -> dict[str, float]:
        """Seconds of each phase of one update and their total, and its `sampler_gap`."""
        self.networks.decoder.refresh()
        rollout = self.collect()
        learned = self.learn(rollout)
        self.step += 1
        gap = float((rollout.sampled_logprobs - rollout.logprobs).abs().mean())
        return {**rollout.seconds, "train": learned["seconds_train"], "sampler_gap": gap,
                "total": sum(rollout.seconds.values()) + learned["seconds_train"]}


def bare_update(config: ModelConfig, critic: str, dtype: torch.dtype, o: PPOOptions,
                prompt: int) -> tuple[float, float]:
    """(seconds, GFLOP) of the matrix products of one update's learning, each in its fastest form.

    Every weight has one forward and two backward products; the last layer and the output compute
    reply tokens only. Attention has two forward and four backward products.
    """
    rows = o.micro_batch * (prompt + o.reply_len)
    reply_rows = o.micro_batch * o.reply_len
    layer = step_products(config)[:4]
    trunk = [(rows, *p) for p in layer] * (config.n_layer - 1)
    trunk += [(rows, *layer[0]), *((reply_rows, *p) for p in layer[1:])]
    head = [(reply_rows, config.d_model, config.vocab_size)]
    models = 2 if critic == "separate" else 1
    took, total, flop = {}, 0.0, 0.0
    for m, n_in, n_out in trunk * models + head:
        if (m, n_in, n_out) not in took:
            kind = torch.float32 if n_out == config.vocab_size else dtype  # logits are float32
            x, w, g = (torch.randn(shape).to(kind)
                       for shape in ((m, n_in), (n_out, n_in), (m, n_out)))
            forms = [[lambda x=x, w=w: F.linear(x, w), lambda x=x, w=w: _product(x, w)],
                     [lambda g=g, w=w: g @ w, lambda g=g, w=w: _product(g, w.t())],
                     [lambda g=g, x=x: g.t() @ x, lambda g=g, x=x: _weight_gradient(g, x)]]
            took[m, n_in, n_out] = sum(fastest(f if _onednn is not None else f[:1]) for f in forms)
        total += took[m, n_in, n_out]
        flop += 6e-9 * m * n_in * n_out
    length, count = prompt + o.reply_len, o.micro_batch * config.n_head
    q = torch.randn(count, length, config.head_dim).to(dtype)
    scores = torch.randn(count, length, length).to(dtype)
    layers = config.n_layer * models
    total += 3 * (fastest([lambda: q @ q.mT]) + fastest([lambda: scores @ q])) * layers
    flop += 6 * 2e-9 * count * length * length * config.head_dim * layers
    micro_batches = o.epochs * o.batch // o.micro_batch
    return micro_batches * total, micro_batches * flop


def ppo(o: BenchOptions, learning_only: bool = False) -> list[dict]:
    """Updates in both precisions, eager and compiled, with a critic of its own and with a shared
    trunk."""
    table, compiles = [], not compiler_fault()
    theirs: dict[str, list[float]] = {"": [], "--bf16": []}
    settings = [("separate", dtype, compiled) for dtype in TYPES
                for compiled in (False, True)[:1 + compiles]]
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
            # The limit is measured in turns, too: it drifts.
            row["bare"], row["GFLOP"] = bare_update(SMALL, critic, TYPES[dtype], work.o, 64)
            results[critic, dtype, compiled].append(row)
        for flag in theirs if not learning_only else ():
            if line := peer(o, "trl_ppo.py", "1", *flag.split()):
                theirs[flag].append(line["s_per_update"])
    for (critic, dtype, compiled), rows in results.items():
        flop = rows[0]["GFLOP"]
        row = {"critic": critic, "dtype": dtype, "compiled": compiled,
               **{f"{k}_s": median_range([r[k] for r in rows])
                  for k in ("generate", "score", "train", "total")},
               "GFLOP": round(flop), "GFLOP_s": median_range([flop / r["train"] for r in rows], 0),
               "bare_s": median_range([r["bare"] for r in rows]),
               "share": ratio([r["bare"] for r in rows], [r["train"] for r in rows]),
               "first_s": round(first[critic, dtype, compiled], 1),
               "sampler_gap": f"{rows[-1]['sampler_gap']:.1e}"}
        for flag, label in (("", "TRL_float32"), ("--bf16", "TRL_bf16")):
            if theirs[flag]:
                row[f"{label}_s"] = median_range(theirs[flag])
                row[f"times_{label}"] = ratio(theirs[flag],
                                              [r["total"] for r in rows][:len(theirs[flag])])
        table.append(row)
    say("PPO updates: 64 episodes of 64 + 64 tokens, 4 epochs, micro-batches of 16, models of 12.2 "
        "M parameters", [list(row.values()) for row in table], list(table[0]))
    return table


# ---- growth --------------------------------------------------------------------------------------

def peak_bytes(work: Callable[[], object]) -> tuple[int, int]:
    """(resident memory before, its peak during the work), where Linux tells; else zeros."""
    try:
        pathlib.Path("/proc/self/clear_refs").write_text("5")
        before = int(next(line for line in open("/proc/self/status")
                          if line.startswith("VmRSS")).split()[1])
        work()
        peak = int(next(line for line in open("/proc/self/status")
                        if line.startswith("VmHWM")).split()[1])
        return 1024 * before, 1024 * peak
    except OSError:
        work()
        return 0, 0


def memory_growth(dtype: str) -> list[tuple]:
    """(phase, MB before, at the peak, more, needed) of a rollout and of an update."""
    work = Update(dtype, False, epochs=1)
    networks = (work.actor_critic, work.networks.reference, work.reward_model)
    weights = sum(p.numel() * 4 for network in networks for p in network.parameters())
    trained = sum(p.numel() * 4 for p in work.actor_critic.parameters())
    size = torch.finfo(TYPES[dtype]).bits // 8
    rollouts: list[Rollout] = []
    phases = []
    before, peak = peak_bytes(lambda: rollouts.append(work.collect()))
    phases.append(("rollout", before, peak, 2 * 6 * 64 * 128 * 384 * size + 12.2e6 * size))
    before, peak = peak_bytes(lambda: work.learn(rollouts[0]))
    activations = 2 * 2048 * (6 * (12 * 384 + 3 * 1024)) * 4 + 1024 * 4096 * 4 * 2
    phases.append(("update", before, peak, 3 * trained + activations))
    say(f"Peak memory in MB (weights of the four networks: {weights / 1e6:.0f}); needed: a "
        "rollout's keys, values and packed weights; an update's gradients, Adam's moments and one "
        "micro-batch's activations of policy and critic",
        [(name, *(round(x / 1e6) for x in (b, p, p - b, need))) for name, b, p, need in phases],
        ("phase", "before", "peak", "more", "needed"))
    return phases


def context_growth(o: BenchOptions, dtype: str) -> list[tuple]:
    """(context, ms a step, ms to read the prompt, MB of keys and values) of decoding 8 rows."""
    config = dataclasses.replace(SMALL, max_len=2176)
    model, rows = random_model(config), []
    decoder = Decoder(model, dtype, not compiler_fault())
    for context in (128, 256, 512, 1024, 2048):
        tokens, mask = random_prompts(config, 8, context)
        generate(model, tokens, mask, 64, decoder=decoder)
        with_reply, alone = [], []
        for _ in range(o.repeats):
            with_reply.append(seconds(generate, model, tokens, mask, 64, decoder=decoder))
            alone.append(seconds(generate, model, tokens, mask, 1, decoder=decoder))
        size = torch.finfo(TYPES[dtype]).bits // 8
        steps = [1e3 * (a - b) / 63 for a, b in zip(with_reply, alone, strict=True)]
        rows.append((context, median_range(steps), median_range([1e3 * b for b in alone], 0),
                     round(2 * config.n_layer * 8 * context * config.d_model * size / 1e6, 1)))
    say(f"Decoding 8 rows, by context length in tokens, {dtype}", rows,
        ("context", "ms a step", "ms to read the prompt", "MB of keys and values"))
    return rows


def batch_growth(o: BenchOptions, dtype: str) -> list[tuple]:
    """(episodes, tokens each, seconds, µs a token) of one epoch's update."""
    rows = []
    for episodes, prompt, reply in ((16, 64, 64), (32, 64, 64), (64, 64, 64), (16, 128, 128),
                                    (16, 256, 256)):
        work = Update(dtype, False, episodes=episodes, prompt=prompt, reply=reply, epochs=1,
                      config=dataclasses.replace(SMALL, max_len=512))
        work()
        times = [work()["total"] for _ in range(o.repeats)]
        per_token = [1e6 * t / episodes / (prompt + reply) for t in times]
        rows.append((episodes, prompt + reply, median_range(times), median_range(per_token, 0)))
    say(f"One epoch's update, eager, {dtype}", rows,
        ("episodes", "tokens each", "seconds", "µs a token"))
    return rows


def growth(o: BenchOptions) -> dict:
    """Tables of memory, of decoding by context and of updates by size, in the faster precision."""
    half, full = (fastest(product_forms(2048, 384, 1024, t))
                  for t in (torch.bfloat16, torch.float32))
    dtype = "bfloat16" if half < full else "float32"
    # Memory first: freed memory is kept, so a later peak would be that of an earlier part.
    return {"memory": memory_growth(dtype), "decode": context_growth(o, dtype),
            "update": batch_growth(o, dtype)}
