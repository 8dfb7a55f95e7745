"""PPO: change the policy so that the reward model likes its replies better, without straying far
from the reference.

    python train.py ppo

One update: `collect_rollout` lets the policy reply to prompts, scores every token with policy,
reference and critic, and every reply with the reward model; `token_rewards` spreads the score and
the KL penalty over tokens; `gae` turns rewards and values into advantages; `update` passes over
these replies with `ppo_loss`. The file has the formulas first, then the rollout, then learning; what
a raw score is worth stands in data/rewards.py (`ScoreScale`), and rewards without a model, too.
`PPOTrainer` carries what one update hands to the next, and `train_ppo` is the stage. To change one
idea, pass your own function: `collect_rollout(…, estimator=, scorer=)`, `update(…, loss=)`, or all
three to `PPOTrainer` or `train_ppo`.

Papers, by the names that --help uses: Schulman 2016 (GAE), Schulman 2017 (PPO), Schulman 2020
(estimates of KL), Ziegler 2019 (PPO on language), MOSS (MOSS-RLHF parts I and II), N+ (Huang 2024,
"The N+ implementation details of RLHF with PPO"); TRL is a library. docs/sources.md says where to
find them.

Letters for shapes: B replies, P prompt length, R reply length, T = P + R, M rows of a minibatch, N
real reply tokens. The fields of `Rollout` document all shapes. Column t of every array (B, R)
belongs to reply token t; its log-probability and value are computed from what precedes that token.
Columns where `response_mask` is False are padding and never affect a result.
"""
import dataclasses
import math
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

import evaluate
from data.batches import (Rows, drop_long_prompts, held_out_prompts, make_rows, pad_left, prompt_ids,
                          scatter_tokens, similar_lengths, text_for)
from data.prepare import open_stage, recounted
from data.prepared import Prepared
from data.functions import RewardError
from data.health import ALARMS, VARIETY, as_logged, ratio_start, rollout_metrics, warn_of_gaps
from data.rewards import (Part, RewardSum, ScoreScale, needs_model, part_scores, read_reward, resolved,
                          starting_scale)
from model import Transformer, load_parent, next_token_loss, open_run, token_logprobs
from reward import RewardModel, Scorer, critic_from, critic_of_policy, room_for_prompt
from runtime.control import KLController, actor_critic_rates
from runtime.alarms import Alarms
from runtime.decoding import ends
from runtime.device import compile_trunks, pick_device, precision
from runtime.fit import Best
from runtime.draws import batch_indices, key
from runtime.machine import resume_command, return_freed_memory
from runtime.learning import (Below, halve_frozen, knowing, learned, learning, learning_copy, load_learned,
                              share_frozen, shared_depth, trunk_of)
from runtime.lora import drop_adapters
from runtime.optim import clip_gradients, restore, stop_unless_finite
from runtime.options import Common, UserError, option
from runtime.products import use_products
from runtime.run import Run
from runtime.scan import discounted_sums
from runtime.statistics import Means, masked_mean as masked_mean, masked_variance, whiten
from sample import Decoder, Generation, generate, reply_ids, reply_texts, reply_to


@dataclasses.dataclass
class PPOOptions(Common):
    """`python train.py ppo`"""

    TOTAL: ClassVar = "updates"  # may grow at --resume
    PRESETS: ClassVar = {
        "smoke": dict(updates=6, batch=8, rollout_rows=4, reply_len=16, norm_replies=64, critic_warmup=1,
                      save_every=1, eval_every=2, eval_prompts=8, report_prompts=20),
        "base": dict(dtype="auto", updates=200, batch=256, rollout_rows=128, reply_len=128, micro_batch=32,
                     policy_lr=1e-5, critic_lr=2e-5, eval_every=20, eval_prompts=256),
        "real": dict(dtype="auto", temperature=0.7, kl_coef=0.2, micro_batch=6, policy_lr=1e-4, critic_lr=2e-4),
        "smollm": dict(updates=40, batch=48, reply_len=48, norm_replies=128, kl_horizon=300.0, critic_warmup=1,
                       report_prompts=200),
    }

    # The rollout.
    updates: int = option(40, "rollouts, each followed by --epochs passes", low=1)
    batch: int = option(144, "replies per rollout", low=1, high=1_000_000)
    samples_per_prompt: int = option(1, "replies to each prompt, a group (for RLOO)", low=1)
    reply_len: int = option(64, "longest reply in tokens; a truncated one is terminal: no bootstrap value", low=1)
    prompt_len: int = option(0, "longest prompt in tokens, others are left out; 0: as the reward model learned", low=0)
    temperature: float = option(1.0, "of sampling and of every log-probability alike", low=0.001, high=100,
                                source="N+: else the ratio does not start at 1")
    rollout_rows: int = option(64, "replies written at a time; ended ones make room", low=1)
    rollout_dtype: str = option("auto", "of writing; auto: as --dtype; int8: CPU only",
                                choices=("auto", "float32", "bfloat16", "int8"))
    # Rewards.
    reward: str = option("", "what is paid: parts NAME or NAME:WEIGHT, separated by commas; names: model, "
                             "model.HEAD, length (tokens of a reply), FILE.py:FUNCTION; empty: the model")
    reward_norm: str = option("auto", "fixed: (raw − mean) / spread at the start; running: also over the running "
                                      "spread; of labels: logsigmoid (auto), log P(liked), or sigmoid, 2 P(liked) − 1",
                              choices=("auto", "fixed", "running", "sigmoid", "logsigmoid"), source="MOSS: running")
    norm_replies: int = option(512, "replies that give raw scores their mean and spread", low=2, high=100_000)
    reward_clip: float = option(10.0, "clip scores to ± this; 0 disables", source="MOSS 10", low=0)
    end_penalty: float = option(3.0, "subtract this, after the clip, from a reply without end token",
                                source="validation; TRL: 1", low=0)
    kl_coef: float = option(0.095, "price of one nat away from the reference",
                            source="validation; MOSS 0.05, swept .05 to .2; N+ 0.05", low=0)
    kl_in: str = option("reward", "k1 of each token in its reward, or k2 of each reply in the loss",
                        choices=("reward", "loss"), source="reward in MOSS, N+")
    kl_control: str = option("auto", "adaptive steers the price to --kl_target; auto: fixed for labels and functions",
                             choices=("auto", "fixed", "adaptive"), source="Ziegler 2019")
    kl_target: float = option(4.0, "nats per reply to aim at", source="measured; Ziegler 2019: 6", low=0.01)
    kl_horizon: float = option(1_000.0, "replies in which it drifts by a fifth", source="Ziegler 2019: 10,000", low=1)
    # Advantages and loss.
    advantage: str = option("gae", "gae has a critic; the others compare a reply with those to its prompt, or "
                                   "(reinforce) with all", choices=("gae", "rloo", "grpo", "reinforce"),
                            source="Schulman 2016; Ahmadian 2024; Shao 2024; Williams 1992")
    gamma: float = option(1.0, "discount per token", source="N+, MOSS", low=0, high=1)
    lam: float = option(0.95, "GAE's trade of bias for variance",
                        source="Schulman 2016; N+ and MOSS's code 0.95, its paper 0.9", low=0, high=1)
    whiten: bool = option(True, "advantages to mean 0, spread 1 over the rollout", source="N+")
    clip_range: float = option(0.2, "policy ratio clip", source="Schulman 2017, N+, MOSS", low=0)
    dual_clip: float = option(0.0, "where A < 0 no gradient above this ratio; 0 disables", source="Ye 2020: 3", low=0)
    value_clip: float = option(0.2, "value clip around the rollout's values; 0 disables", source="N+, MOSS", low=0)
    value_coef: float = option(0.1, "weight of the value loss; separate critic: of its clip", low=0, source="N+")
    entropy_coef: float = option(0.0, "entropy bonus", source="MOSS: not recommended")
    ptx_coef: float = option(0.0, "weight of the loss on pretraining text", source="InstructGPT: 27.8", low=0)
    # Optimisation.
    epochs: int = option(1, "passes over a rollout", source="MOSS 1; 4 in N+", low=1)
    minibatches: int = option(4, "optimizer steps per pass", source="1 in N+", low=1)
    micro_batch: int = option(36, "rows per forward and backward; changes memory and speed alone", low=1)
    dtype: str = option("float32", "precision of matrix products; bfloat16 rounds the ratio's log-probabilities",
                        choices=("auto", "float32", "bfloat16"))
    critic: str = option("separate", "separate: a copy of the reward model; shared: a head on the policy",
                         choices=("separate", "shared"), source="separate in MOSS and N+")
    critic_warmup: int = option(2, "first updates that train the critic alone, without value clip",
                                source="MOSS-RLHF part I", low=0)
    critic_epochs: int = option(4, "passes over each of these rollouts", low=1)
    policy_lr: float = option(5e-4, "Adam's rate for the policy; small models need higher ones", low=0,
                              source="measured here; MOSS 5e-7 at 7B, Ziegler's code 1e-5 at 124M")
    critic_lr: float = option(5e-4, "Adam's rate for the critic", source="measured here; MOSS 1.65e-6 at 7B", low=0)
    adam_eps: float = option(1e-8, "Adam's; keep it below gradients, 1e-6 to 1e-5 here", source="N+: 1e-5", low=0)
    warmup: float = option(0.3, "share of updates over which the policy's rate rises", low=0, high=1, source="MOSS .1")
    final_lr: float = option(0.1, "then rates fall to this share of their peak", source="N+: 0", low=0, high=1)
    max_grad_norm: float = option(1.0, "clip each network's gradients to this norm; 0 disables", low=0)
    max_approx_kl: float = option(0.0, "above it the policy skips the rest of an update; 0 disables", low=0,
                                  source="Spinning Up: 0.015")
    # Saving and measuring.
    save_every: int = option(10, "updates between checkpoints", low=1)
    eval_every: int = option(10, "updates between measurements on held-out prompts", low=1)
    eval_prompts: int = option(128, "held-out prompts measured then", low=1)
    keep: str = option("last", "best: end with the policy that held-out opinion found best", choices=("last", "best"))
    report_prompts: int = option(500, "held-out prompts of the report of `all`", low=1, compared=False)

    def __post_init__(self) -> None:
        for name in ("minibatches", "samples_per_prompt"):
            if self.batch % getattr(self, name):
                raise UserError(f"ppo: --batch {self.batch} does not divide into --{name} {getattr(self, name)}")

    def check(self) -> None:
        super().check()
        if self.kl_control == "fixed":
            self.refuse("kl_target", "kl_horizon", why="with --kl_control fixed")
        elif self.kl_coef == 0 and (self.kl_control == "adaptive" or {"kl_target", "kl_horizon"} & self.explicit):
            raise UserError("ppo: adaptive control multiplies --kl_coef: from 0 it would never move")
        if self.rollout_dtype == "int8" and pick_device(self.device) != "cpu":
            raise UserError(f"ppo: --rollout_dtype int8 is for a CPU: on {pick_device(self.device)} use bfloat16")
        if 0 < self.dual_clip <= 1:
            raise UserError(f"ppo: --dual_clip {self.dual_clip:g} must be above 1, or 0 for none")
        if self.advantage != "gae":
            self.refuse("gamma", "lam", "critic", "critic_warmup", "critic_epochs", "critic_lr", "value_clip",
                        "value_coef", why=f"with --advantage {self.advantage}, which has no critic")
            if self.advantage != "reinforce" and self.samples_per_prompt < 2:
                raise UserError(f"ppo: --advantage {self.advantage} needs --samples_per_prompt 2 or more")
            return
        if self.critic_warmup == 0:
            self.refuse("critic_epochs", why="with --critic_warmup 0")
        if self.critic_warmup >= self.updates:
            raise UserError(f"ppo: the first {self.critic_warmup} updates train the critic alone (--critic_warmup), so "
                            f"with --updates {self.updates} the policy would never learn: change one of them")


# ---- rewards -------------------------------------------------------------------------------------

def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, kind: str = "k1") -> Tensor:
    """KL(π‖π_ref) per sampled token, from log-probabilities of the token drawn from π (Schulman
    2020).

    With d = log π − log π_ref: k1 = d (unbiased, can be negative), k2 = d²/2 (biased, low
    variance), k3 = exp(−d) − 1 + d (unbiased and never negative).
    """
    d = logprobs.float() - ref_logprobs.float()
    estimates = {"k1": d, "k2": d * d / 2, "k3": torch.expm1(-d) + d}
    if kind not in estimates:
        raise UserError(f"unknown KL estimator {kind!r}: use k1, k2 or k3")
    return estimates[kind]


def token_rewards(scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor,
                  kl_coef: float | Tensor) -> Tensor:
    """r_t = −kl_coef · k1, plus the reply's score on its last real token. scores (B,), the others
    (B, R) -> (B, R).

    A new tensor, without gradient: the logged KL is never changed in place. Only k1 serves as a
    reward: E[k1 · ∇ log π] is the gradient of the KL. k2 and k3 also change with π on their own,
    which a reward's gradient leaves out; as rewards they collapse the policy.
    """
    rewards = -kl_coef * kl_estimate(logprobs.detach(), ref_logprobs.detach())
    column = torch.arange(mask.shape[1], device=mask.device, dtype=torch.int32)
    last = torch.where(mask, column, -1).amax(1, keepdim=True)  # −1 if the row is empty
    rewards = torch.where(mask, rewards, 0)
    return torch.where(column == last, rewards + scores.detach().float()[:, None], rewards)


# ---- advantages ----------------------------------------------------------------------------------

def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float = 1.0,
        lam: float = 0.95) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation: (advantages, returns), each (B, R) float32, 0 where the
    mask is False.

        δ_t = r_t + γ V_{t+1} − V_t        A_t = δ_t + γλ A_{t+1}        returns_t = A_t + V_t

    (Schulman 2016, eq. 16.) The value after a reply's last token is 0, also after a truncated
    reply: it counts as terminal, without bootstrap. The mask's True entries are contiguous in each
    row.

    >>> r, V = torch.tensor([[-.1, .2, 1.]]), torch.tensor([[.5, .4, .3]])
    >>> [[round(x, 5) for x in t[0].tolist()] for t in gae(r, V, torch.ones(1, 3).bool())]
    [[0.52675, 0.765, 0.7], [1.02675, 1.165, 1.0]]
    """
    rewards, values = (torch.where(mask, x.float(), 0) for x in (rewards, values))
    next_values = nn.functional.pad(values[:, 1:], (0, 1))
    delta = rewards - values + gamma * next_values
    advantages = discounted_sums(delta, gamma * lam)
    return torch.where(mask, advantages, 0), torch.where(mask, advantages + values, 0)


def gae_estimator(scored: "ScoredReplies", o: PPOOptions) -> tuple[Tensor, Tensor]:
    """GAE's advantages and returns, each (B, R); `collect_rollout` whitens the former."""
    return gae(scored.rewards, scored.values, scored.response_mask, o.gamma, o.lam)


def group_estimator(scored: "ScoredReplies", o: PPOOptions) -> tuple[Tensor, Tensor]:
    """Advantages without a critic, equal for all tokens of a reply; and returns, which nothing learns.

    total: a reply's rewards summed, with --kl_in reward the KL in them; k: --samples_per_prompt.
    rloo: total − mean of the k − 1 others of its group. grpo: (total − group's mean) / group's standard
    deviation (divided by k, not k − 1); every token counts alike, whatever its reply's length.
    reinforce: total − mean of all replies.
    """
    k, total = o.samples_per_prompt, scored.rewards.sum(1)
    if o.advantage == "reinforce":
        advantages = total - total.mean()
    else:
        groups = total.view(-1, k)  # a prompt's replies stand side by side
        advantages = groups - groups.mean(1, keepdim=True)
        if o.advantage == "rloo":
            advantages = advantages * k / (k - 1)
        else:
            advantages = advantages / (groups.std(1, correction=0, keepdim=True) + 1e-4)
    mask = scored.response_mask
    return advantages.flatten()[:, None] * mask, torch.where(mask, total[:, None], 0)


# ---- the networks --------------------------------------------------------------------------------

class Prediction(NamedTuple):
    """What policy and critic say of reply tokens: (N,) for each real one, or scattered to (M, R)."""

    logprobs: Tensor  # of the token that was drawn, at the sampling temperature
    entropy: Tensor  # of the policy's distribution there, nats
    values: Tensor  # the critic's, before the token

    def scattered(self, response_mask: Tensor) -> "Prediction":
        """(N,) to (M, R), 0 where the mask is False."""
        return Prediction(*(scatter_tokens(x, response_mask) for x in self))


class ActorCritic(nn.Module):
    """Policy and critic. The critic is a network of its own, or (critic=None) a scalar head on the
    policy's trunk, which says `value` until it learns. dtype: of both networks' matrix products."""

    def __init__(self, policy: Transformer, critic: RewardModel | None = None, dtype: str = "float32",
                 value: float = 0.0):
        super().__init__()
        self.policy, self.critic, self.dtype = policy, critic, dtype
        self.value_head = None
        if critic is None:
            self.value_head = nn.Linear(policy.config.d_model, 1)
            nn.init.zeros_(self.value_head.weight)
            nn.init.constant_(self.value_head.bias, value)
        for module in self.modules():  # PPO runs without dropout, whatever mode is set
            if isinstance(module, nn.Dropout):
                module.p = 0.0

    @property
    def value_module(self) -> nn.Module:
        """What is trained for values alone: the critic, or the head."""
        return self.critic if self.critic is not None else self.value_head

    def with_below(self, rows: Rows) -> Rows:
        """The rows with the hidden states below what learns, for `forward`; computed once where policy and
        critic have those blocks in common."""
        policy = critic = self.policy.below(rows.tokens)
        if self.critic is not None and not shared_depth(self.policy, self.critic.backbone):
            critic = self.critic.backbone.below(rows.tokens)
        return rows._replace(below=Below(policy, critic))

    def forward(self, rows: Rows, temperature: float, train_policy: bool = True,
                train_entropy: bool = False) -> Prediction:
        """Log-probability, entropy and value of each reply token, (N,) float32.

        train_policy=False: no gradient reaches the policy. train_entropy=False detaches the entropy
        (used when --entropy_coef is 0).
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and train_policy):
            hidden = self.policy.hidden(rows.tokens, where=rows.before, below=rows.below.policy)
            logprobs, entropy = token_logprobs(self.policy, hidden, rows.targets, temperature, train_entropy)
        if self.critic is not None:
            hidden = self.critic.backbone.hidden(rows.tokens, where=rows.before, below=rows.below.critic)
            values = self.critic.head_values(hidden)
        else:  # a value is no logit, so not divided by the temperature
            with torch.autocast(hidden.device.type, enabled=False):
                values = self.value_head(hidden.float()).squeeze(-1)
        return Prediction(logprobs, entropy, values)


@dataclasses.dataclass
class Networks:
    """What PPO needs to write and score replies, all on one device."""

    actor_critic: ActorCritic
    reference: Transformer
    end_id: int | Sequence[int]  # the token, or any of the tokens, that ends a reply
    decoder: Decoder | None = None  # the policy ready to write; None: made for each rollout
    reward_model: RewardModel | None = None  # where it shares frozen blocks with the critic, it reads their states


# ---- the rollout ---------------------------------------------------------------------------------

@dataclasses.dataclass(frozen=True)
class Replies:
    """Prompts and what the policy replied to them."""

    tokens: Tensor  # (B, T) int64: left-padded prompt, then reply, as sampled
    mask: Tensor  # (B, T) bool: real tokens
    response_mask: Tensor  # (B, R) bool: reply tokens up to and including the end token
    ended: Tensor  # (B,) bool: the end token was written
    group: Tensor  # (B,) int64: equal numbers answer the same prompt
    sampled_logprobs: Tensor  # (B, R) float32: the decoder's, while it drew the tokens

    @property
    def generation(self) -> Generation:
        """The replies alone."""
        P = self.tokens.shape[1] - self.response_mask.shape[1]
        return Generation(self.tokens[:, P:], self.response_mask, self.sampled_logprobs)

    def rows(self, index: Tensor) -> Rows:
        """These rows as the networks read them."""
        P = self.tokens.shape[1] - self.response_mask.shape[1]
        mask, response = self.mask[index], self.response_mask[index]
        reply = torch.cat((torch.zeros_like(mask[:, :P]), response), 1)
        return make_rows(self.tokens[index], mask, reply)

    def by_length(self, index: Tensor, size: int) -> list[Tensor]:
        """Cut these rows into parts of `size`, sorted by length, so that little padding is
        computed."""
        length = self.mask[index].sum(1)
        return list(index[length.argsort(stable=True)].split(size))


@dataclasses.dataclass(frozen=True)
class ScoredReplies(Replies):
    """Replies with all that an advantage estimator may use."""

    logprobs: Tensor  # (B, R): the policy's, from the training forward
    ref_logprobs: Tensor  # (B, R): the reference's, in the same batches and precision
    entropy: Tensor  # (B, R): of the policy at each token, nats
    values: Tensor  # (B, R): the critic's, before each token
    raw_scores: Tensor  # (B,): the scorer's
    scores: Tensor  # (B,): normalised, clipped, less the penalty for a missing end
    rewards: Tensor  # (B, R)
    kl_coef: float  # the price of KL, in the rewards or in the loss
    # (B,) each: the parts of the reward, by the names of metrics
    parts: dict[str, Tensor] = dataclasses.field(default_factory=dict, kw_only=True)
    # (B, T, D) once, or once for policy and for critic, in the trunk's dtype: what lies below the blocks
    # that learn, for rows whose padding was moved to the right. B · T · D · 4 bytes in float32.
    below: Below = dataclasses.field(default=Below(), kw_only=True)

    def rows(self, index: Tensor) -> Rows:
        """These rows as the networks read them, from the frozen blocks on."""
        rows = super().rows(index)
        return rows._replace(below=self.below.at(index, rows.tokens.shape[1]))

    def kl(self, kind: str) -> Tensor:
        """(B, R): `kl_estimate` of each reply token, 0 for padding."""
        return torch.where(self.response_mask, kl_estimate(self.logprobs, self.ref_logprobs, kind), 0)


@dataclasses.dataclass(frozen=True)
class Rollout(ScoredReplies):
    """All data of one update; the shapes are documented here and in its parents."""

    advantages: Tensor  # (B, R): whitened if so asked
    returns: Tensor  # (B, R): from unwhitened advantages
    spread: float  # the standard deviation that advantages were divided by
    seconds: dict[str, float]  # of writing and of scoring


def sample_replies(networks: Networks, prompts: Sequence[list[int]], o: PPOOptions, step: int) -> Replies:
    """A reply to each prompt, drawn from the whole softmax at PPO's temperature; each prompt stands
    samples_per_prompt times. All draws follow from (seed, stage, step, row).
    """
    device = networks.reference.embedding.weight.device
    prompt, prompt_mask = (x.to(device) for x in pad_left(prompts, 0))
    reply = generate(networks.actor_critic.policy, prompt, prompt_mask, o.reply_len,
                     temperature=o.temperature, end_id=networks.end_id,
                     seed=key(o.seed, "ppo", "reply", step), dtype=networks.actor_critic.dtype,
                     decoder=networks.decoder, batch_size=o.rollout_rows)
    return Replies(tokens=torch.cat((prompt, reply.tokens), 1),
                   mask=torch.cat((prompt_mask, reply.mask), 1),
                   response_mask=reply.mask, ended=(ends(reply.tokens, networks.end_id) & reply.mask).any(1),
                   group=torch.arange(len(prompt), device=device) // o.samples_per_prompt,
                   sampled_logprobs=reply.logprobs)


def score_replies(networks: Networks, replies: Replies, o: PPOOptions) -> tuple[Prediction, Tensor, Below]:
    """(the policy's and the critic's prediction, the reference's log-probabilities, what lies below what
    learns), arrays (B, R) and (B, T, D)."""
    shape, device = replies.response_mask.shape, replies.tokens.device
    prediction = Prediction(*torch.zeros(3, *shape, device=device))
    ref_logprobs, below = torch.zeros(shape, device=device), Below()
    for index in similar_lengths(replies.mask.sum(1)):
        mask = replies.response_mask[index]
        with precision(networks.actor_critic.dtype, device.type):
            rows = networks.actor_critic.with_below(replies.rows(index))
            part = networks.actor_critic(rows, o.temperature).scattered(mask)
            hidden = networks.reference.hidden(rows.tokens, where=rows.before, below=rows.below.policy)
            reference, _ = token_logprobs(networks.reference, hidden, rows.targets, o.temperature)
        ref_logprobs[index] = scatter_tokens(reference, mask)
        below = below.put(index, rows.below, *replies.tokens.shape)
        for all_rows, these in zip(prediction, part, strict=True):
            all_rows[index] = these
    return prediction, ref_logprobs, below


@torch.no_grad()
def collect_rollout(networks: Networks, prompts: Sequence[list[int]], o: PPOOptions, *, step: int,
                    scorer: Scorer, scale: ScoreScale, kl_coef: float,
                    estimator: Callable = gae_estimator) -> Rollout:
    """Reply to prompts (lists of ids) with the policy, score the replies, estimate advantages.

    scorer: gives each reply its raw score. estimator(scored, o) returns (advantages, returns), each
    (B, R), of `ScoredReplies`; --whiten then whitens the advantages. Every network and the scorer
    read the very ids that were sampled.
    """
    start = time.perf_counter()
    repeated = [ids for ids in prompts for _ in range(o.samples_per_prompt)]
    replies = sample_replies(networks, repeated, o, step)
    written = time.perf_counter()
    prediction, ref_logprobs, below = score_replies(networks, replies, o)
    device = replies.tokens.device
    ids = reply_ids(replies.generation)
    with precision(networks.actor_critic.dtype, device.type), knowing(networks.reward_model, below.critic):
        raw_scores = scorer.scores(repeated, ids).to(device)
        parts = part_scores(scorer, repeated, ids)
    scores = scale.paid(raw_scores, replies.ended, o)
    rewards = token_rewards(scores, prediction.logprobs, ref_logprobs, replies.response_mask,
                            kl_coef if o.kl_in == "reward" else 0.0)
    scored = ScoredReplies(**vars(replies), **prediction._asdict(), ref_logprobs=ref_logprobs,
                           raw_scores=raw_scores, scores=scores, rewards=rewards, kl_coef=kl_coef,
                           parts=parts, below=below)
    advantages, returns = estimator(scored, o)
    spread = 1.0
    if o.whiten:
        spread = math.sqrt(float(masked_variance(advantages, scored.response_mask)) + 1e-8)
        advantages = whiten(advantages, scored.response_mask)
    seconds = {"generate": written - start, "score": time.perf_counter() - written}
    return Rollout(**vars(scored), advantages=advantages, returns=returns, spread=spread, seconds=seconds)


# ---- learning ------------------------------------------------------------------------------------

Shares = dict[str, tuple[Tensor, Tensor]]  # metrics: (a part's share of the mean, weight in tokens)


@dataclasses.dataclass(frozen=True)
class Minibatch:
    """Some rows (M) of a rollout, as a loss reads them; arrays (M, R).

    n_tokens: the real reply tokens of the whole optimizer step, which every mean is divided by, so
    that the parts of a minibatch add up to it. kl_coef: the price of KL in units of the advantages,
    which may be whitened. train_policy: False while the critic learns alone.
    """

    mask: Tensor
    old_logprobs: Tensor
    ref_logprobs: Tensor
    old_values: Tensor
    advantages: Tensor
    returns: Tensor
    n_tokens: Tensor
    kl_coef: float = 0.0
    train_policy: bool = True

    @classmethod
    def of(cls, rollout: Rollout, index: Tensor, n_tokens: Tensor, train_policy: bool = True) -> "Minibatch":
        """These rows of a rollout. Padding becomes 0: a NaN in it must not reach a gradient."""
        mask = rollout.response_mask[index]
        arrays = (rollout.logprobs, rollout.ref_logprobs, rollout.values, rollout.advantages, rollout.returns)
        return cls(mask, *(torch.where(mask, x[index], 0) for x in arrays), n_tokens,
                   rollout.kl_coef / rollout.spread, train_policy)

    def real(self, x: Tensor) -> Tensor:
        """x (M, R) with 0 for padding."""
        return torch.where(self.mask, x, 0)

    def mean(self, x: Tensor) -> Tensor:
        """This part's share of the mean of x (M, R) over the optimizer step's tokens."""
        return self.real(x).sum() / self.n_tokens

    def log_ratio(self, new: Prediction) -> Tensor:
        """log π/π_old (M, R) without gradient; 0 for padding."""
        return self.real(new.logprobs.detach()) - self.old_logprobs

    @property
    def policy_tokens(self) -> Tensor:
        """The weight of metrics of the policy: 0 while it does not learn."""
        return self.n_tokens * self.train_policy


def ppo_loss(batch: Minibatch, new: Prediction, o: PPOOptions) -> tuple[Tensor, Shares]:
    """The clipped surrogate (Schulman 2017, eq. 7), the clipped value loss and the entropy bonus.

        ratio = π(token) / π_old(token)
        L = mean( max(−A · ratio, −A · clip(ratio, 1 ± ε)) )
            + c_v · mean( ½ max((V − G)², (V_clipped − G)²) ) − c_e · mean(H)
            + β · Σ over replies of ½ (Σ log π/π_ref)² / tokens        (with --kl_in loss)

    A: advantages, G: returns, V: values, H: entropy, ε: clip_range, c_v: value_coef, c_e:
    entropy_coef, β: the price of KL in units of A. The policy gradient is ∇J = E[Σ A_t ∇ log π(token_t)];
    at ratio 1 the gradient of −A · ratio is −A ∇ log π, its negative. The ratio lets the same replies serve
    for several steps: once a step has moved a token's ratio beyond 1 ± ε in the direction that A asks for, the
    maximum's gradient is 0 and nothing pulls it further. With --dual_clip c the maximum is at most −A · c
    where A < 0 (Ye 2020, eq. 5): a ratio far above 1 has no gradient there either. The last term is k2 of the
    whole reply: its expected gradient E[Σ log π/π_ref · ∇ log π(reply)] is that of the KL.

    new: predictions (M, R) of the networks as they are now. Returns (loss, metrics), each metric as
    (this part's share of the mean, its weight in tokens).
    """
    logprobs, entropy, values = (batch.real(x) for x in new)
    ratio = (logprobs - batch.old_logprobs).exp()
    # Policy loss.
    surrogate = -batch.advantages * ratio
    clipped = -batch.advantages * ratio.clamp(1 - o.clip_range, 1 + o.clip_range)
    worse = torch.maximum(surrogate, clipped)
    if o.dual_clip:
        worse = torch.where(batch.advantages < 0, worse.minimum(-batch.advantages * o.dual_clip), worse)
    policy_loss = batch.mean(worse)
    # Value loss.
    error = error_clipped = (values - batch.returns) ** 2
    if o.value_clip > 0:
        near = batch.old_values + (values - batch.old_values).clamp(-o.value_clip, o.value_clip)
        error_clipped = (near - batch.returns) ** 2
    value_loss = 0.5 * batch.mean(torch.maximum(error, error_clipped))
    # Entropy bonus.
    loss = policy_loss + o.value_coef * value_loss - o.entropy_coef * batch.mean(entropy)
    if o.kl_in == "loss":
        k2 = (logprobs - batch.ref_logprobs).sum(1).square() / 2
        loss = loss + batch.kl_coef * k2.sum() / batch.n_tokens
    return loss, {
        "policy_loss": (policy_loss, batch.policy_tokens),
        "clip_frac": (batch.mean((clipped > surrogate).float()), batch.policy_tokens),
        "value_loss": (value_loss, batch.n_tokens),
        "value_clip_frac": (batch.mean((error_clipped > error).float()), batch.n_tokens)}


def ratio_metrics(batch: Minibatch, new: Prediction) -> Shares:
    """How far the policy has moved from the one that wrote the replies; whatever the loss is."""
    log_ratio = batch.log_ratio(new)
    return {"approx_kl": (batch.mean(torch.expm1(log_ratio) - log_ratio), batch.policy_tokens),
            "abs_log_ratio": (batch.mean(log_ratio.abs()), batch.policy_tokens)}


def predict(actor_critic: ActorCritic, rollout: Rollout, index: Tensor, o: PPOOptions,
            train_policy: bool = True) -> Prediction:
    """Predictions (M, R) of the networks as they are now, for these rows."""
    with precision(actor_critic.dtype, rollout.tokens.device.type):
        flat = actor_critic(rollout.rows(index), o.temperature, train_policy, o.entropy_coef != 0)
    return flat.scattered(rollout.response_mask[index])


def backward(actor_critic: ActorCritic, rollout: Rollout, parts: list[tuple[Tensor, Minibatch]],
             o: PPOOptions, loss: Callable) -> tuple[Shares, list[Tensor]]:
    """Gradients of a minibatch, part by part. Returns (metrics, log π/π_old of each part)."""
    shares, ratios = Shares(), []
    for index, batch in parts:
        new = predict(actor_critic, rollout, index, o, batch.train_policy)
        part_loss, metrics = loss(batch, new, o)
        if batch.train_policy or part_loss.requires_grad:  # else nothing learns: a loss of yours without a value term
            part_loss.backward()
        ratios.append(batch.log_ratio(new))
        metrics = {"loss": (part_loss, batch.n_tokens), **metrics, **ratio_metrics(batch, new)}
        for name, (x, weight) in metrics.items():
            shares[name] = (x.detach() + (shares[name][0] if name in shares else 0), weight)
    return shares, ratios


def update(actor_critic: ActorCritic, optimizer: torch.optim.Optimizer, rollout: Rollout,
           o: PPOOptions, step: int, *, train_policy: bool = True, loss: Callable = ppo_loss,
           text_loss: Callable[[int], Tensor] | None = None) -> dict[str, float]:
    """Passes over a rollout, one optimizer step per minibatch. Returns means over all its tokens.

    loss(batch, new, o) returns (loss, metrics) of a `Minibatch` and a `Prediction`, as `ppo_loss`
    does; new.entropy has a gradient only if --entropy_coef is not 0. Rows are permuted anew each
    epoch, from (seed, stage, step, epoch). train_policy=False (critic warm-up) trains values alone.
    text_loss(k): what the policy's k-th step of the stage also minimises, times --ptx_coef. A
    minibatch above --max_approx_kl ends the policy's part of this update: its gradients stay None,
    so Adam moves neither it nor its momentum. NotFinite if a number of an optimizer step is not
    finite, before that step is taken.
    """
    begin, device, means = time.perf_counter(), rollout.tokens.device, Means()
    start: dict[str, float] = {}  # how far the policy is from the one that wrote, at its first step
    skipped, tokens, policy_active = 0, 0, train_policy
    for epoch in range(o.epochs):
        rng = np.random.default_rng(key(o.seed, "ppo", "minibatch", step, epoch))
        order = torch.from_numpy(rng.permutation(len(rollout.tokens))).to(device)
        for number, minibatch in enumerate(order.chunk(o.minibatches)):
            n_tokens = rollout.response_mask[minibatch].sum()
            parts = [(index, Minibatch.of(rollout, index, n_tokens, policy_active))
                     for index in rollout.by_length(minibatch, o.micro_batch)]
            # Has the policy moved too far already?
            if policy_active and o.max_approx_kl > 0:
                with torch.no_grad():
                    ratios = [batch.log_ratio(predict(actor_critic, rollout, index, o)) for index, batch in parts]
                if float(sum((torch.expm1(x) - x).sum() for x in ratios)) > o.max_approx_kl * n_tokens:
                    policy_active, start = False, start or ratio_start(ratios, n_tokens)
                    parts = [(index, dataclasses.replace(batch, train_policy=False)) for index, batch in parts]
            skipped += train_policy and not policy_active
            # One optimizer step.
            optimizer.zero_grad(set_to_none=True)
            shares, ratios = backward(actor_critic, rollout, parts, o, loss)
            if policy_active and text_loss is not None:
                nats = text_loss((step * o.epochs + epoch) * o.minibatches + number)
                (o.ptx_coef * nats).backward()
                shares["ptx_loss"] = (nats.detach(), n_tokens)
            modules = {"critic": actor_critic.value_module}
            modules |= {"policy": actor_critic.policy} if policy_active else {}
            clipped = clip_gradients(modules, o.max_grad_norm)
            shares |= {name: (norm, torch.ones_like(norm)) for name, norm in clipped.items()}
            numbers = {name: x for name, (x, _) in shares.items() if name.endswith(("loss", "norm"))}
            stop_unless_finite(numbers, f"update {step + 1}, epoch {epoch + 1}", "lower --policy_lr or --critic_lr")
            optimizer.step()
            # Keep what is logged.
            if policy_active:
                start = start or ratio_start(ratios, n_tokens)
            tokens += int(n_tokens)
            for name, (x, weight) in shares.items():
                if name != "loss":
                    means.add(name, x, weight)
    return {**means.result(), **start, "skipped_minibatches": skipped, "trained_tokens": tokens,
            "seconds_train": time.perf_counter() - begin}


# ---- the trainer ---------------------------------------------------------------------------------

class PPOTrainer:
    """What PPO carries from one update to the next: networks, optimizer, score scale, price of KL.

    scorer, estimator and loss are passed on to `collect_rollout` and `update`. With a scorer of
    your own, the reward model only initialises the critic.
    """

    ALARMS = ALARMS

    def __init__(self, run: Run, reference: Transformer, reward_model: RewardModel | None, data: Prepared,
                 *, terms: Sequence[Part] = (), scorer: Scorer | None = None,
                 estimator: Callable | None = None, loss: Callable = ppo_loss):
        self.run, self.o, self.template, self.loss = run, run.o, data.template, loss
        o, state = run.o, run.state
        if o.reward_norm == "auto":
            raise ValueError("PPOTrainer: resolve reward_norm first, by data.rewards.resolved")
        self.estimator = estimator or (gae_estimator if o.advantage == "gae" else group_estimator)
        # What no network learns and all have in common is in memory once, and computed once.
        reference, self.reward_model = drop_adapters(learning_copy(reference, o, "ppo")), reward_model
        self.fixed = [network for network in (reference, reward_model) if network is not None]
        for network in self.fixed:
            share_frozen(run.model, network.requires_grad_(False))
            use_products(network.to(run.device), run.compute.products)
        room = min(o.prompt_len or sys.maxsize, *(x.config.max_len - o.reply_len for x in self.fixed))
        records = drop_long_prompts(data.records("ppo", "train"), run.tokenizer, data.template, room)
        self.prompts = [record["prompt"] for record in records]
        held_out = held_out_prompts(data, "val", run.tokenizer, room, o.eval_prompts)
        self.scorer = scorer or reward_model
        if terms:
            self.scorer = RewardSum(terms, reward_model, run.tokenizer, o, template=data.template,
                                    records=[*records, *data.records("ppo", "val")], scales=state.get("scales"))
        # The options as `ScoreScale.paid` reads them: the sum of --reward has its scale, and keeps it.
        self.paying = o.replace(reward_norm="fixed") if isinstance(self.scorer, RewardSum) else o
        # The scale of scores and the critic's first values; a checkpoint has both.
        self.scale, from_raw, paid, spread = ScoreScale(**state.get("scale", {})), (0.0, 1.0), 0.0, 1.0
        if not state:
            self.scale, from_raw, paid, spread = self.measure_start()
        critic = None
        if o.critic == "separate":
            critic = critic_of_policy(run.model, paid, o) if reward_model is None else critic_from(
                reward_model, *from_raw, o)
        actor_critic = ActorCritic(run.model, critic, run.dtype, paid)
        self.trunks = [run.model, *([critic.backbone] if critic is not None else [])]  # those that learn
        reference.frozen = shared_depth(run.model, reference)
        if reward_model is not None:
            reward_model.backbone.frozen = shared_depth(self.trunks[-1], reward_model.backbone)
        self.networks = Networks(actor_critic.to(run.device), reference, run.tokenizer.end_ids, None, reward_model)
        for trunk in self.trunks:
            halve_frozen(trunk, run.dtype).recompute = o.recompute
        groups = [{"params": learning(run.model), "lr": o.policy_lr},
                  {"params": learning(actor_critic.value_module), "lr": o.critic_lr}]
        self.optimizer = torch.optim.Adam(groups, eps=o.adam_eps, fused=True)
        self.control = KLController.starting(o, spread, state.get("control"))
        if state:
            load_learned(actor_critic.value_module, state["critic"])
            restore([self.optimizer], {"optimizers": [state["optimizer"]]})
        self.decoder_dtype = state.get("decoder_dtype", run.dtype if o.rollout_dtype == "auto" else o.rollout_dtype)
        self.prepare_decoder()
        settings = evaluate.ReplySettings(o.reply_len, o.temperature, dtype=run.dtype, rows_at_once=o.rollout_rows)
        self.alarms = Alarms("ppo", self.ALARMS, state.get("alarms"))
        steps = o.updates * o.epochs * o.minibatches
        self.text = text_for(data, run.tokenizer, steps, run.model.config.max_len, o.seed) if o.ptx_coef else None
        self.held_out = evaluate.HeldOutPrompts(data, run.tokenizer, held_out, reference, self.scorer, settings)
        self.best = Best(*evaluate.OPINION, run, o.updates) if o.keep == "best" else None

    def measure_start(self) -> tuple[ScoreScale, tuple[float, float], float, float]:
        """`starting_scale` on replies that the starting policy writes as PPO will. They are drawn from
        the streams of the reward stage, which measured this in earlier versions."""
        o, run = self.o, self.run
        index = batch_indices(len(self.prompts), o.norm_replies, 0, o.seed, "reward")
        ids = [prompt_ids(run.tokenizer, self.prompts[i], self.template) for i in index]
        replies = reply_ids(reply_to(run.model, run.tokenizer, ids, o.reply_len,
                                     temperature=o.temperature, batch_size=o.rollout_rows, dtype=run.dtype,
                                     seed=key(o.seed, "reward", "reply")))
        ended = torch.tensor([reply[-1] in run.tokenizer.end_ids for reply in replies])
        with torch.no_grad(), precision(run.dtype, run.device):
            return starting_scale(self.scorer, self.reward_model, (ids, replies), ended, self.paying)

    def text_loss(self, k: int) -> Tensor:
        """Mean −log π of the next token over the k-th batch of pretraining text."""
        batch = (x.to(self.run.device) for x in self.text.batch(k))
        with precision(self.run.dtype, self.run.device):
            return next_token_loss(self.run.model, *batch)

    def prepare_decoder(self) -> None:
        """Make the policy ready to write; where compiling pays, compile the networks' trunks, too.
        """
        compiles = self.run.compute.compile == "on"
        if compiles:
            compile_trunks(*map(trunk_of, self.fixed), *self.trunks)
        self.networks.decoder = Decoder(self.run.model, self.decoder_dtype, compile=compiles)

    def update(self, step: int) -> dict[str, float]:
        """One update: reply, score, learn, steer the price of KL. Returns what is logged of it."""
        o, train_policy, rates = self.o, step >= self.o.critic_warmup, actor_critic_rates(self.o, step)
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        # Reply and score.
        self.networks.decoder.refresh()
        index = batch_indices(len(self.prompts), o.batch // o.samples_per_prompt, step, o.seed, "ppo")
        prompts = [self.prompts[i] for i in index]
        ids = [prompt_ids(self.run.tokenizer, prompt, self.template) for prompt in prompts]
        rollout = collect_rollout(self.networks, ids, self.paying, step=step, scorer=self.scorer, scale=self.scale,
                                  kl_coef=self.control.price, estimator=self.estimator)
        # Learn. The critic's first values may be far off: alone, it learns them without clip.
        return_freed_memory()  # learning has other shapes than writing
        if not train_policy:
            o = o.replace(value_clip=0.0, epochs=o.critic_epochs)
        learned = update(self.networks.actor_critic, self.optimizer, rollout, o, step,
                         train_policy=train_policy, loss=self.loss,
                         text_loss=self.text_loss if self.text is not None else None)
        # What evaluate.py says of these replies is logged, and reaches no reward.
        metrics = rollout_metrics(rollout) | learned | self.held_out.opinion(
            [prompts[i] for i in rollout.group.tolist()], reply_texts(self.run.tokenizer, rollout.generation))
        if train_policy:
            self.control.update(metrics["kl"], o.batch)
        metrics = as_logged(metrics, self.o, step)
        self.check_gaps(metrics, step)
        self.alarms.check(step + 1, metrics)
        return metrics | {
            **{f"seconds_{name}": x for name, x in rollout.seconds.items()},
            "lr": rates[0], "critic_lr": rates[1],
            "generate_tokens_per_s": metrics["reply_tokens"] / rollout.seconds["generate"],
            "train_tokens_per_s": metrics["trained_tokens"] / metrics["seconds_train"]}

    def check_gaps(self, metrics: dict[str, float], step: int) -> None:
        """Warn if what is scored is not what was sampled; give up a decoder that is too far off."""
        hopeless = warn_of_gaps(metrics, self.run, self.decoder_dtype, step)
        if hopeless and self.decoder_dtype != "float32":
            tqdm.write("ppo: from now on replies are written in float32", file=sys.stderr)
            self.decoder_dtype = "float32"
            self.prepare_decoder()

    def measure(self, step: int, measured: tuple | None = None) -> dict[str, float]:
        """Figures on the held-out prompts, whose first replies go into samples.jsonl. measured: what
        `held_out.measure` gave before; None: measure now."""
        return_freed_memory()
        metrics, records = measured or self.held_out.measure(self.run.model)
        self.run.samples(step, records[:12])
        self.alarms.check(step, metrics)
        if self.best is not None and metrics["eval_distinct2"] >= VARIETY * self.alarms.first["eval_distinct2"]:
            self.best.see(step, metrics)
        return metrics

    def save(self, step: int) -> None:
        self.run.save(step, critic=learned(self.networks.actor_critic.value_module),
                      optimizer=self.optimizer.state_dict(), scale=self.scale.state(),
                      control=self.control.state(), decoder_dtype=self.decoder_dtype,
                      alarms=self.alarms.state(), example_prompts=self.held_out.prompts[:8],
                      scales=self.scorer.state() if isinstance(self.scorer, RewardSum) else {},
                      **({"best": self.best.state} if self.best else {}))


# ---- the stage -----------------------------------------------------------------------------------

def train_ppo(o: PPOOptions, **seams: Any) -> Run | None:
    """J(π) = E[Σ γᵗ r]: reply, score, find out which tokens were better than expected, make those
    likelier; repeat.

    seams: a scorer, estimator or loss of your own, as `PPOTrainer` takes them; --reward_norm auto is
    fixed for a scorer. Returns the finished run, or None if it was finished before.
    """
    data, o = open_stage(o, "ppo")
    terms = read_reward(o.reward)
    policy, tokenizer, state = load_parent(o, data, "sft", o.init_from)
    o = recounted(o, "ppo", data, tokenizer) if data.meta.get("lengths") else o  # in its vocabulary
    parents = {"init": state["hash"], **{f"file {term.path}": term.digest for term in terms if term.path is not None}}
    reward_model, feedback, room = None, "scores of any kind", policy.config.max_len - o.reply_len
    if not terms or needs_model(o, terms):
        reward_model, reward_tokenizer, reward_state = load_parent(
            o, data, "reward", o.reward_from, RewardModel, merged=not o.lora_rank)  # else adapters go on learning
        tokenizer.require_same(reward_tokenizer, "the policy and the reward model")
        parents["reward"] = reward_state["hash"]
        room = min(room, room_for_prompt(o.reply_len, reward_model, reward_state))
        feedback = feedback if "scorer" in seams else reward_state.get("feedback", "unknown scores")
    run = open_run("ppo", resolved(o, terms, feedback, room), data, parents, policy, tokenizer)
    if run is None:
        return None
    o, trainer, metrics = run.o, PPOTrainer(run, policy, reward_model, data, terms=terms, **seams), {}
    # Measured before training begins, which makes the folder this run's: until then nothing changes.
    start = trainer.held_out.measure(run.model) if run.step == 0 else None
    if start and trainer.best and trainer.best.name not in start[0]:
        raise UserError(f"ppo: --keep best goes by {trainer.best.name}, which these data do not give: leave it out")
    with run.progress(o.updates) as bar:
        if start:
            run.log(0, **trainer.measure(0, start))
        for step in range(run.step, o.updates):
            metrics, done, last = {}, step + 1, step + 1 == o.updates
            try:
                metrics = trainer.update(step)
                if run.compute.starts_compiling(done, o.updates, o.critic_warmup + 3, o.critic_warmup):
                    trainer.prepare_decoder()
                if last or done % o.eval_every == 0:
                    metrics |= trainer.measure(done)
            except RewardError as error:
                if not metrics:  # this update has changed nothing yet, and no earlier one is lost
                    trainer.save(step)
                raise UserError(f"{error}; saved after update {run.saved_step or 0}; then "
                                f"`{resume_command(o)}`") from error
            run.log(done, **metrics, seconds=run.seconds())
            if last and trainer.best:
                metrics |= trainer.best.restore({name: x for name, x in metrics.items() if name[:5] == "eval_"})
            bar.update(**{name: metrics[name] for name in ("score", "kl", "length", "end_rate")})
            if last or done % o.save_every == 0:
                trainer.save(done)
            run.stop_if_asked(done, trainer.save)
    run.finish(**{name: x for name, x in metrics.items() if name.startswith("eval_")})
    return run
