"""PPO: change the policy so that the reward model likes its replies better, without straying far from the reference.

One update: `collect_rollout` lets the policy reply to prompts and scores every token with policy, reference, critic and
reward model; `token_rewards` spreads the score and the KL penalty over tokens; `gae` turns rewards and values into
advantages; `update` takes several passes over these replies with `ppo_loss`. The loop around it stands in train.py
(`python train.py ppo`). Papers, by the names that --help uses: Schulman 2016 (GAE), Schulman 2017 (PPO), Schulman 2020
(estimates of KL), Ziegler 2019 (PPO on language), MOSS (MOSS-RLHF parts I and II), N+ (Huang 2024, "The N+
implementation details of RLHF with PPO"); TRL is a library. The README's last section says where to find them.

Letters for shapes: B replies, P prompt length, R reply length, T = P + R, M rows of a minibatch, N real reply tokens.
The home of all shapes is `Rollout`. One convention rules every array (B, R): column t belongs to reply token t; its
log-probability and value are computed from what precedes that token; False in `response_mask` means the column does not
exist, and whatever stands there changes nothing.
"""
import dataclasses
import functools
import math
import time
from collections import defaultdict
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from data.batches import Rows, make_rows, pad_left, spread
from model import Transformer, score_tokens
from reward import RewardModel
from runtime.device import precision
from runtime.draws import key
from runtime.options import Common, UserError, option
from runtime.products import linear
from sample import Decoder, Generation, generate


@dataclasses.dataclass
class PPOOptions(Common):
    """`python train.py ppo`"""

    dtype: str = option("float32",
                        "precision of matrix products; the ratio is a small difference of log-probabilities, "
                        "which bfloat16 rounds", choices=("auto", "float32", "bfloat16"), base="auto")
    updates: int = option(40, "rollouts, each followed by the epochs below", smoke=6, base=200, low=1)
    batch: int = option(96, "replies per rollout", smoke=8, base=256, low=1)
    rollout_rows: int = option(64, "replies written at a time; where one ends, the next prompt takes its place",
                               smoke=4, base=128, low=1)
    rollout_dtype: str = option("auto", "precision of writing replies; auto: as --dtype; int8: 8-bit weights, on a CPU",
                                choices=("auto", "float32", "bfloat16", "int8"))
    reply_len: int = option(64, "longest reply in tokens; one cut there counts as ended: nothing is added for what "
                                "might have followed", smoke=16, base=128, low=1)
    temperature: float = option(1.0, "of sampling and of every log-probability alike",
                                source="N+: else the ratio does not start at 1")
    top_k: int = option(0, "refused: PPO must score the distribution it drew from; for chatting only")
    top_p: float = option(1.0, "refused, as top_k")
    repetition_penalty: float = option(1.0, "refused, as top_k")
    epochs: int = option(2, "passes over a rollout", source="4 in N+; MOSS 1", low=1)
    minibatches: int = option(2, "optimizer steps per pass", source="1 in N+", low=1)
    micro_batch: int = option(24, "rows per forward and backward; changes memory and speed, nothing else", base=32,
                              low=1)
    policy_lr: float = option(5e-4, "Adam's rate for the policy: small models need far more than the papers' 5e-7",
                              source="measured here; MOSS 5e-7 at 7B, Ziegler's code 1e-5 at 124M", base=1e-5, low=0)
    critic_lr: float = option(5e-4, "Adam's rate for the critic", base=2e-5, source="measured here; MOSS 1.65e-6 at 7B",
                              low=0)
    adam_eps: float = option(1e-8, "Adam's epsilon; it must be small beside a gradient's size, which for a separate "
                             "critic is 1e-6 to 1e-5 in the demo", source="N+: 1e-5", low=0)
    warmup: float = option(0.1, "share of the policy's updates over which the rates rise", source="MOSS 0.1",
                           low=0, high=1)
    final_lr: float = option(0.1, "rates fall linearly to this share of themselves", source="N+: to 0", low=0, high=1)
    critic: str = option("separate", "separate: own network, a copy of the reward model; shared: a head on the policy",
                         choices=("separate", "shared"), source="separate in MOSS and N+")
    critic_warmup: int = option(2, "first updates that train the critic alone", smoke=1, source="MOSS-RLHF part I",
                                low=0)
    kl_coef: float = option(0.09, "price of one nat away from the reference",
                            source="validation, three seeds; MOSS 0.05, swept .05 to .2; N+ 0.05", low=0)
    kl_estimator: str = option("k1", "estimate of KL in the reward", choices=("k1", "k2", "k3"),
                               source="Schulman 2020; k1 in MOSS, N+")
    kl_control: str = option("fixed", "adaptive steers the coefficient towards --kl_target",
                             choices=("fixed", "adaptive"), source="Ziegler 2019")
    kl_target: float = option(6.0, "nats per reply that adaptive control aims at", source="Ziegler 2019", low=0.01)
    kl_horizon: float = option(10_000, "replies over which adaptive control acts", source="Ziegler 2019", low=1)
    gamma: float = option(1.0, "discount per token", source="N+, MOSS", low=0, high=1)
    lam: float = option(0.95, "GAE's trade of bias for variance",
                        source="Schulman 2016; N+ and MOSS's code 0.95, its paper 0.9", low=0, high=1)
    whiten: bool = option(True, "advantages to mean 0, spread 1 over the rollout", source="N+")
    clip_range: float = option(0.2, "policy ratio clip", source="Schulman 2017, N+, MOSS", low=0)
    value_clip: float = option(0.2, "value clip around the rollout's values; 0: none", source="N+, MOSS", low=0)
    value_coef: float = option(0.1, "weight of the value loss beside the policy's, where they share a trunk; of a "
                                    "separate critic Adam divides it out again", source="N+", low=0)
    entropy_coef: float = option(0.0, "entropy bonus", source="MOSS: not recommended")
    max_grad_norm: float = option(1.0, "gradient norm at most, for policy and critic each; 0: any", low=0)
    reward_norm: str = option("auto", "fixed: the checkpoint's mean and spread; running: divided by the running spread "
                              "too; for reward models trained on labels, whose raw scores are log-odds, also "
                              "logsigmoid: log P(liked), and sigmoid: 2 P(liked) − 1; auto: logsigmoid for these, "
                              "else fixed", choices=("auto", "fixed", "running", "sigmoid", "logsigmoid"),
                              source="MOSS: running")
    reward_clip: float = option(10.0, "scores are clipped to ± this; those of sigmoid are within ± 1 anyway",
                                source="MOSS 10", low=0)
    end_penalty: float = option(1.0, "subtracted, after the clip, from a reply without end token", source="TRL: 1",
                                low=0)
    max_approx_kl: float = option(0.0, "skip the policy's remaining minibatches of an update above this; 0: never",
                                  source="Spinning Up: 0.015", low=0)
    save_every: int = option(10, "updates between checkpoints", smoke=1, low=1)
    eval_every: int = option(10, "updates between measurements on held-out prompts", smoke=2, base=20, low=1)
    eval_prompts: int = option(128, "held-out prompts measured then", smoke=8, base=256, low=1)
    report_prompts: int = option(500, "held-out test prompts of the report that `all` ends with", smoke=20, low=1)

    def __post_init__(self) -> None:
        if self.top_k != 0 or self.top_p != 1 or self.repetition_penalty != 1:
            raise UserError("ppo: top_k, top_p and repetition_penalty are for chatting (sample.py): a rollout drawn "
                            "from a filtered distribution but scored by the full softmax is not on-policy; use "
                            "--temperature alone")
        if self.temperature <= 0:
            raise UserError(f"ppo: --temperature {self.temperature} must be above 0: greedy replies explore nothing")
        if self.batch % self.minibatches:
            raise UserError(f"ppo: --batch {self.batch} does not divide into --minibatches {self.minibatches}")

    def check(self) -> None:
        super().check()
        if self.kl_control == "fixed":
            self.refuse("kl_target", "kl_horizon", why="with --kl_control fixed")
        elif self.kl_coef == 0:
            raise UserError("ppo: adaptive control multiplies --kl_coef: from 0 it would never move")
        if self.critic_warmup >= self.updates:
            raise UserError(f"ppo: the first {self.critic_warmup} updates train the critic alone (--critic_warmup), so "
                            f"with --updates {self.updates} the policy would never learn: change one of them")


# ---- means over what is real -----------------------------------------------------------------------------------------

def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean over True entries, float32; 0 where there is none. Values under False, NaN included, change nothing.

    >>> x, mask = torch.tensor([[1., 2, 0], [3, 4, 5]]), torch.tensor([[1, 1, 0], [1, 1, 1]]).bool()
    >>> round(float(masked_mean(x, mask)), 4)  # 15 / 5
    3.0
    """
    return torch.where(mask, x.float(), 0).sum() / mask.sum().clamp(min=1)


def whiten(x: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """Spread 1 and, unless shift_mean is False, mean 0 over the mask; 0 elsewhere. The variance is divided by n."""
    mean = masked_mean(x, mask)
    centred = torch.where(mask, x.float() - mean, 0)
    scaled = centred * torch.rsqrt(masked_mean(centred * centred, mask) + 1e-8)
    return scaled if shift_mean else torch.where(mask, scaled + mean, 0)


class RunningMoments:
    """Count, mean and spread over everything seen, one batch at a time (Chan et al.'s parallel variance).

    Starts as one observation's worth of mean 0 and spread 1, so that the first batch cannot divide by nothing.
    """

    def __init__(self, count: float = 1.0, mean: float = 0.0, var: float = 1.0):
        self.count, self.mean, self.var = count, mean, var

    def update(self, x: Tensor) -> None:
        x = x.cpu().double()  # MPS has no float64
        n, mean, var = x.numel(), float(x.mean()), float(x.var(correction=0))
        total, delta = self.count + n, mean - self.mean
        self.var = (self.var * self.count + var * n + delta * delta * self.count * n / total) / total
        self.mean += delta * n / total
        self.count = total

    @property
    def std(self) -> float:
        return self.var ** 0.5

    def state(self) -> dict[str, float]:
        return {"count": self.count, "mean": self.mean, "var": self.var}


# ---- rewards ---------------------------------------------------------------------------------------------------------

def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, kind: str = "k1") -> Tensor:
    """KL(π‖π_ref) per sampled token, from log-probabilities of the token drawn from π (Schulman 2020).

    With d = log π − log π_ref: k1 = d (unbiased, can be negative), k2 = d²/2 (biased, low variance),
    k3 = exp(−d) − 1 + d (unbiased and never negative).
    """
    d = logprobs.float() - ref_logprobs.float()
    estimates = {"k1": d, "k2": d * d / 2, "k3": torch.expm1(-d) + d}
    if kind not in estimates:
        raise UserError(f"unknown KL estimator {kind!r}: use k1, k2 or k3")
    return estimates[kind]


def shape_scores(raw: Tensor, ended: Tensor, o: PPOOptions, reward_model: RewardModel,
                 moments: RunningMoments) -> Tensor:
    """Raw scores (B,) -> what PPO is paid: normalised, clipped, and only then, so that it always counts, fined for a
    missing end token. `moments` are updated before use (MOSS); only their spread is used, no mean taken off.

    Paid log P(liked), γ = 1 and fines apart, the best policy is π_ref · P(liked)^(1/β), made to sum to 1: Bayes' rule
    at β = 1, and the more demanding the smaller β is.
    """
    if o.reward_norm == "sigmoid":
        scores = 2 * torch.sigmoid(raw) - 1
    elif o.reward_norm == "logsigmoid":
        scores = nn.functional.logsigmoid(raw)
    else:
        scores = reward_model.normalise(raw)
        if o.reward_norm == "running":
            moments.update(scores)
            scores = scores / moments.std
    return scores.clamp(-o.reward_clip, o.reward_clip) - o.end_penalty * (~ended).float()


def token_rewards(scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor,
                  kl_coef: float | Tensor, kl_estimator: str = "k1") -> Tensor:
    """r_t = −kl_coef · KL_t, plus the reply's score on its last real token. scores (B,), the others (B, R) -> (B, R).

    A new tensor, without gradient: the logged KL is never changed in place.
    """
    rewards = -kl_coef * kl_estimate(logprobs.detach(), ref_logprobs.detach(), kl_estimator)
    column = torch.arange(mask.shape[1], device=mask.device, dtype=torch.int32)
    last = torch.where(mask, column, -1).amax(1, keepdim=True)  # −1: an empty row, which receives nothing
    rewards = torch.where(mask, rewards, 0)
    return torch.where(column == last, rewards + scores.detach().float()[:, None], rewards)


class KLController:
    """The price of KL, fixed or steered so that a reply's KL comes near a target (Ziegler 2019)."""

    def __init__(self, coef: float, target: float | None = None, horizon: float = 10_000):
        self.coef, self.target, self.horizon = coef, target, horizon

    def update(self, kl_per_reply: float, n_replies: int) -> None:
        """coefficient *= 1 + clip(KL / target − 1, ± 0.2) · replies / horizon

        >>> control = KLController(0.2, target=6)
        >>> control.update(9.0, 256)
        >>> round(control.coef, 6)
        0.201024
        """
        if self.target is not None:
            error = min(max(kl_per_reply / self.target - 1, -0.2), 0.2)
            self.coef *= 1 + error * n_replies / self.horizon


# ---- advantages ------------------------------------------------------------------------------------------------------

GAE_BLOCK = 32  # columns


@functools.lru_cache(maxsize=32)
def gae_tables(c: float, R: int, device: str, size: int = GAE_BLOCK) -> tuple[Tensor, Tensor]:
    """Powers of c = γλ for `gae` of R columns, from float64, where the exponent is not negative; else 0:

    within[t, k] = c^(k − t), across[i, j] = c · (c^size)^(i − j − 1).
    """
    n = -(-R // size)
    k, b = torch.arange(size, dtype=torch.float64), torch.arange(n, dtype=torch.float64)

    def powers(base: float, exponent: Tensor) -> Tensor:
        return torch.where(exponent >= 0, base ** exponent.clamp(min=0), 0).float().to(device)

    return powers(c, k[None, :] - k[:, None]), c * powers(c ** size, b[:, None] - b[None, :] - 1)


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float = 1.0, lam: float = 0.95,
        tables: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation: (advantages, returns), each (B, R) float32, 0 where the mask is False.

        δ_t = r_t + γ V_{t+1} − V_t        A_t = Σ_{k ≥ t} (γλ)^(k−t) δ_k        returns_t = A_t + V_t

    (Schulman 2016, eq. 16.) After a reply's last token V is 0: its end is the end, also where it was cut. The mask's
    True entries are contiguous in each row. Most codes walk from right to left, A_t = δ_t + γλ A_{t+1}; the same sums
    come here without a loop over time, in blocks of 32 columns: what all later blocks add up to enters a block with its
    last δ, and then a matrix product with powers of γλ does the rest.

    >>> r, V = torch.tensor([[-.1, .2, 1.]]), torch.tensor([[.5, .4, .3]])
    >>> [[round(x, 5) for x in t[0].tolist()] for t in gae(r, V, torch.ones(1, 3).bool())]
    [[0.52675, 0.765, 0.7], [1.02675, 1.165, 1.0]]
    """
    B, R = rewards.shape
    size, n = GAE_BLOCK, -(-R // GAE_BLOCK)
    within, across = tables or gae_tables(gamma * lam, R, str(rewards.device))
    # Masking costs as much as all the rest, so where nothing is to be masked, which a CPU sees at once, it is left out.
    whole = not torch.compiler.is_compiling() and mask.device.type == "cpu" and bool(mask.numpy().all())
    rewards, values = (x.float() if whole else torch.where(mask, x.float(), 0) for x in (rewards, values))
    delta = rewards - values
    delta[:, :-1].add_(values[:, 1:], alpha=gamma)
    if R % size:
        delta = nn.functional.pad(delta, (0, n * size - R))
    blocks = delta.reshape(B * n, size)
    if n > 1:
        # Each block's own A at its first column -> γλ times the A that follows each block.
        blocks[:, -1].add_(((blocks @ within[0]).view(B, n) @ across).flatten())
    # F.linear takes less time to begin, which counts where there is little to multiply.
    advantages = (linear if B * R >= 2**16 else nn.functional.linear)(blocks, within).view(B, n * size)[:, :R]
    returns = advantages + values
    return (advantages, returns) if whole else (torch.where(mask, advantages, 0), torch.where(mask, returns, 0))


def advantages_of(scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, values: Tensor, mask: Tensor,
                  kl_coef: float | Tensor, kl_estimator: str, gamma: float, lam: float, whitened: bool,
                  tables: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """(rewards, advantages, returns), each (B, R), of scores (B,): all of the above in a row. Without a loop it is a
    small graph, of which torch.compile makes a few passes over memory in seconds."""
    rewards = token_rewards(scores, logprobs, ref_logprobs, mask, kl_coef, kl_estimator)
    advantages, returns = gae(rewards, values, mask, gamma, lam, tables)
    return rewards, whiten(advantages, mask) if whitened else advantages, returns


@functools.lru_cache(maxsize=1)
def compiled_advantages() -> Callable:
    return torch.compile(advantages_of)


# ---- rows as the networks read them ----------------------------------------------------------------------------------


class ActorCritic(nn.Module):
    """Policy and critic. The critic is a network of its own, or (critic=None) a scalar head on the policy's trunk."""

    def __init__(self, policy: Transformer, critic: RewardModel | None = None):
        super().__init__()
        self.policy, self.critic = policy, critic
        self.value_head = None
        if critic is None:
            self.value_head = nn.Linear(policy.config.d_model, 1)
            nn.init.zeros_(self.value_head.weight)
            nn.init.zeros_(self.value_head.bias)
        for module in self.modules():  # scores, samples and updates of PPO run without dropout, whatever mode is set
            if isinstance(module, nn.Dropout):
                module.p = 0.0

    def critic_parameters(self) -> list[nn.Parameter]:
        """Those trained for values alone."""
        return list((self.critic if self.critic is not None else self.value_head).parameters())

    def forward(self, rows: Rows, temperature: float, train_policy: bool = True,
                train_entropy: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """(logprobs, entropy, values), each (N,) float32. Without train_policy no gradient reaches the policy; without
        train_entropy none from the entropy, whose bonus has no weight then."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and train_policy):
            hidden = self.policy.hidden(rows.tokens, where=rows.before)
            logprobs, entropy = score_tokens(self.policy, hidden, rows.targets, temperature, train_entropy)
        if self.critic is not None:
            values = self.critic.head_values(self.critic.backbone.hidden(rows.tokens, where=rows.before))
        else:
            with torch.autocast(hidden.device.type, enabled=False):  # not divided by the temperature: it is no logit
                values = self.value_head(hidden.float()).squeeze(-1)
        return logprobs, entropy, values


# ---- the buffer ------------------------------------------------------------------------------------------------------

@dataclasses.dataclass
class Rollout:
    """Everything that one update learns from. The shapes' one home."""

    tokens: Tensor  # (B, T) int64: left-padded prompt, then reply, as sampled
    mask: Tensor  # (B, T) bool: real tokens
    response_mask: Tensor  # (B, R) bool: reply tokens up to and including the end token
    ended: Tensor  # (B,) bool: the end token was written
    sampled_logprobs: Tensor  # (B, R) float32: what the decoder said while drawing
    logprobs: Tensor  # (B, R): the policy's, re-scored by the training forward
    ref_logprobs: Tensor  # (B, R): the reference's, in the same batches and precision
    entropy: Tensor  # (B, R): of the policy at each token, nats
    values: Tensor  # (B, R): the critic's, before each token
    raw_scores: Tensor  # (B,): the reward model's
    scores: Tensor  # (B,): normalised, clipped, fined
    rewards: Tensor  # (B, R)
    advantages: Tensor  # (B, R): whitened if so asked
    returns: Tensor  # (B, R): from unwhitened advantages
    kl_coef: float  # used in rewards
    seconds: dict[str, float]  # of generation and scoring

    @classmethod
    def of(cls, prompt: Tensor, prompt_mask: Tensor, reply: Generation, end_id: int, kl_coef: float) -> "Rollout":
        """Prompts (B, P), left-padded, and their replies side by side; what is still to be computed is 0."""
        per_token = ("logprobs", "ref_logprobs", "entropy", "values", "rewards", "advantages", "returns")
        zeros = {name: torch.zeros_like(reply.logprobs) for name in per_token}
        zeros |= {name: torch.zeros_like(reply.logprobs[:, 0]) for name in ("raw_scores", "scores")}
        return cls(tokens=torch.cat((prompt, reply.tokens), 1), mask=torch.cat((prompt_mask, reply.mask), 1),
                   response_mask=reply.mask, ended=(reply.tokens.eq(end_id) & reply.mask).any(1),
                   sampled_logprobs=reply.logprobs, kl_coef=kl_coef, seconds={}, **zeros)

    def rows(self, index: Tensor) -> Rows:
        """These rows as the networks read them."""
        P = self.tokens.shape[1] - self.response_mask.shape[1]
        mask, response = self.mask[index], self.response_mask[index]
        return make_rows(self.tokens[index], mask, torch.cat((torch.zeros_like(mask[:, :P]), response), 1))

    def by_length(self, index: Tensor, size: int) -> list[Tensor]:
        """Cut these rows into pieces of `size`, sorted by length, so that little padding is computed."""
        length = self.mask[index].sum(1)
        return list(index[length.argsort(stable=True)].split(size))


@torch.no_grad()
def collect_rollout(actor_critic: ActorCritic, reference: Transformer, reward_model: RewardModel,
                    prompts: Sequence[Sequence[int]], o: PPOOptions, *, end_id: int, step: int, kl_coef: float,
                    moments: RunningMoments, dtype: str = "float32", decoder: Decoder | None = None) -> Rollout:
    """Reply to prompts (lists of ids) with the policy, and score the replies.

    All draws follow from (seed, stage, step, row). Every network reads the very ids that were sampled.
    """
    device = actor_critic.policy.embedding.weight.device
    prompt, prompt_mask = (t.to(device) for t in pad_left(prompts, 0))
    start = time.perf_counter()
    reply = generate(actor_critic.policy, prompt, prompt_mask, o.reply_len, temperature=o.temperature, end_id=end_id,
                     seed=key(o.seed, "ppo", "reply", step), dtype=dtype, decoder=decoder, batch_size=o.rollout_rows)
    generated = time.perf_counter()
    rollout = Rollout.of(prompt, prompt_mask, reply, end_id, kl_coef)
    for index in rollout.by_length(torch.arange(len(prompts), device=device), o.micro_batch):
        rows, response = rollout.rows(index), reply.mask[index]
        with precision(dtype, device.type):
            flat = dict(zip(("logprobs", "entropy", "values"), actor_critic(rows, o.temperature), strict=True))
            flat["ref_logprobs"], _ = score_tokens(reference, reference.hidden(rows.tokens, where=rows.before),
                                                   rows.targets, o.temperature)
            rollout.raw_scores[index] = reward_model(rows.tokens, rows.real, rows.reply)
        for name, x in flat.items():
            getattr(rollout, name)[index] = spread(x, response)
    rollout.scores = shape_scores(rollout.raw_scores, rollout.ended, o, reward_model, moments)
    chain = compiled_advantages() if decoder is not None and decoder.compile else advantages_of
    rollout.rewards, rollout.advantages, rollout.returns = chain(
        rollout.scores, rollout.logprobs, rollout.ref_logprobs, rollout.values, reply.mask,
        torch.tensor(kl_coef),  # a number would be compiled in, and adaptive control changes it
        o.kl_estimator, o.gamma, o.lam, o.whiten, gae_tables(o.gamma * o.lam, o.reply_len, str(device)))
    rollout.seconds = {"generate": generated - start, "score": time.perf_counter() - generated}
    return rollout


def rollout_metrics(rollout: Rollout) -> dict[str, float]:
    """What the README's glossary defines, over the whole rollout."""
    mask = rollout.response_mask
    kl = torch.where(mask, rollout.logprobs - rollout.ref_logprobs, 0)
    residual, returns = rollout.returns - rollout.values, rollout.returns
    spread_of = lambda x: masked_mean((x - masked_mean(x, mask)) ** 2, mask)  # noqa: E731
    metrics = {
        "score": rollout.scores.mean(), "raw_score": rollout.raw_scores.mean(), "kl": kl.sum(1).mean(),
        "kl_per_token": masked_mean(kl, mask), "entropy": masked_mean(rollout.entropy, mask),
        "length": mask.sum(1).float().mean(), "end_rate": rollout.ended.float().mean(),
        "ref_perplexity": torch.exp(-masked_mean(rollout.ref_logprobs, mask)),
        "sampler_gap": masked_mean((rollout.sampled_logprobs - rollout.logprobs).abs(), mask),
        "explained_variance": 1 - spread_of(residual) / spread_of(returns).clamp(min=1e-8)}
    return {**{name: float(x) for name, x in metrics.items()}, "kl_coef": rollout.kl_coef,
            "reply_tokens": int(mask.sum())}


# ---- learning --------------------------------------------------------------------------------------------------------

def ppo_loss(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, values: Tensor, old_values: Tensor,
             returns: Tensor, entropy: Tensor, mask: Tensor, *, n_tokens: int | Tensor | None = None,
             clip_range: float = 0.2, value_clip: float = 0.2, value_coef: float = 0.1,
             entropy_coef: float = 0.0) -> tuple[Tensor, dict[str, Tensor]]:
    """The clipped surrogate (Schulman 2017, eq. 7), the clipped value loss and the entropy bonus; all arrays (M, R).

        ratio = π(token) / π_old(token)
        L = mean( max(−A · ratio, −A · clip(ratio, 1 ± ε)) )
            + c_v · mean( ½ max((V − G)², (V_clipped − G)²) ) − c_e · mean(H)

    A: advantages, G: returns, V: values, H: entropy, ε: clip_range, c_v: value_coef, c_e: entropy_coef. The policy
    gradient is ∇J = E[Σ A_t ∇ log π(token_t)], and at ratio 1 the gradient of −A · ratio is −A ∇ log π, its negative.
    What the ratio adds: the same replies serve for several steps, and once a step has moved a token's ratio beyond
    1 ± ε in the direction that A asks for, the maximum's gradient is 0 and nothing pulls it further.

    Every mean is a sum over the mask divided by n_tokens: the real reply tokens of the whole optimizer step (default:
    of this mask), so that the parts of a minibatch add up to it exactly. The metrics are such means, too.
    """
    n = mask.sum() if n_tokens is None else n_tokens

    def mean(x: Tensor) -> Tensor:
        return torch.where(mask, x, 0).sum() / n

    def real(x: Tensor) -> Tensor:  # before any arithmetic: a NaN in a pad must not reach a gradient
        return torch.where(mask, x, 0)

    log_ratio = real(logprobs) - real(old_logprobs)
    ratio, advantages = log_ratio.exp(), real(advantages)
    surrogate, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - clip_range, 1 + clip_range)
    policy_loss = mean(torch.maximum(surrogate, clipped))
    values, old_values, returns = real(values), real(old_values), real(returns)
    error = (values - returns) ** 2
    error_clipped = error
    if value_clip > 0:
        error_clipped = (old_values + (values - old_values).clamp(-value_clip, value_clip) - returns) ** 2
    value_loss = 0.5 * mean(torch.maximum(error, error_clipped))
    entropy_mean = mean(real(entropy))
    loss = policy_loss + value_coef * value_loss - entropy_coef * entropy_mean
    with torch.no_grad():
        metrics = {
            "policy_loss": policy_loss, "value_loss": value_loss, "approx_kl": mean(torch.expm1(log_ratio) - log_ratio),
            "clip_frac": mean((clipped > surrogate).float()), "value_clip_frac": mean((error_clipped > error).float()),
            "abs_log_ratio": mean(log_ratio.abs())}
    return loss, {name: x.detach() for name, x in metrics.items()}


def update(actor_critic: ActorCritic, optimizer: torch.optim.Optimizer, rollout: Rollout, o: PPOOptions, step: int, *,
           train_policy: bool = True, dtype: str = "float32") -> dict[str, float]:
    """Several passes over one rollout; each minibatch is one optimizer step. Returns means over all its tokens.

    Rows are permuted anew each epoch, from (seed, stage, step, epoch). train_policy=False (critic warm-up) trains
    values alone. A minibatch above --max_approx_kl ends the policy's part of this update: its gradients stay None, so
    Adam neither moves it nor its momentum. Raises UserError on a loss that is not finite, before any step is taken with
    it.
    """
    start, device, warming_up = time.perf_counter(), rollout.tokens.device, not train_policy
    groups = {"policy": list(actor_critic.policy.parameters()), "critic": actor_critic.critic_parameters()}
    totals: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), device=device))
    tokens = policy_tokens = 0
    norms: dict[str, list[Tensor]] = defaultdict(list)
    ratio_start, skipped = None, 0

    def losses(index: Tensor, n: Tensor, policy: bool):
        rows, mask = rollout.rows(index), rollout.response_mask[index]
        with precision(dtype, device.type):
            flat = actor_critic(rows, o.temperature, policy, o.entropy_coef != 0)
        logprobs, entropy, values = (spread(x, mask) for x in flat)
        return ppo_loss(logprobs, rollout.logprobs[index], rollout.advantages[index], values, rollout.values[index],
                        rollout.returns[index], entropy, mask, n_tokens=n, clip_range=o.clip_range,
                        value_clip=o.value_clip, value_coef=o.value_coef, entropy_coef=o.entropy_coef)

    for epoch in range(o.epochs):
        rng = np.random.default_rng(key(o.seed, "ppo", "minibatch", step, epoch))
        order = torch.from_numpy(rng.permutation(len(rollout.tokens))).to(device)
        for minibatch in order.chunk(o.minibatches):
            n = rollout.response_mask[minibatch].sum()
            pieces = rollout.by_length(minibatch, o.micro_batch)
            if train_policy and o.max_approx_kl > 0:
                with torch.no_grad():
                    now = [losses(piece, n, True)[1] for piece in pieces]
                if sum(x["approx_kl"] for x in now) > o.max_approx_kl:
                    train_policy = False
                    ratio_start = float(sum(x["abs_log_ratio"] for x in now)) if ratio_start is None else ratio_start
            skipped += not (train_policy or warming_up)
            optimizer.zero_grad(set_to_none=True)
            parts: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), device=device))
            for piece in pieces:
                loss, metrics = losses(piece, n, train_policy)
                loss.backward()
                for name, x in metrics.items():
                    parts[name] = parts[name] + x
            found = {f"{name}_grad_norm": nn.utils.clip_grad_norm_(parameters, o.max_grad_norm or math.inf)
                     for name, parameters in groups.items() if name == "critic" or train_policy}
            if not torch.isfinite(parts["policy_loss"] + parts["value_loss"] + sum(found.values())):
                said = {name: float(x) for name, x in (parts | found).items() if name.endswith(("_loss", "_norm"))}
                raise UserError(f"ppo: not finite at update {step + 1}, epoch {epoch + 1}: {said}; the last good "
                                "checkpoint is kept: lower --policy_lr or --critic_lr")
            for name, norm in found.items():
                norms[name].append(norm)
            optimizer.step()
            if ratio_start is None and train_policy:
                ratio_start = float(parts["abs_log_ratio"])
            tokens += int(n)
            policy_tokens += int(n) * train_policy
            for name, x in parts.items():
                if train_policy or name.startswith("value"):
                    totals[name] = totals[name] + x * n
    result = {name: float(x) / max(tokens if name.startswith("value") else policy_tokens, 1)
              for name, x in totals.items()}
    result |= {name: float(torch.stack(x).mean()) for name, x in norms.items()}
    if ratio_start is not None:
        result["ratio_start"] = ratio_start
    return {**result, "skipped_minibatches": skipped, "trained_tokens": tokens,
            "seconds_train": time.perf_counter() - start}
