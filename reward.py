"""The reward model: people's judgements, turned into a number that a policy can be trained on.

    python train.py reward

A reward model is the language model's trunk with one output, a scalar. Three kinds of human
feedback, three losses: which of two replies is better (`pairwise_loss`, Bradley–Terry, and Davidson's
where people also said that neither is), how good one is (`regression_loss`), liked or not
(`label_loss`). A reward of several parts has a head for each, an ensemble several for the same. What
PPO pays for a score, data/rewards.py says (`ScoreScale`). The chapter ends in the stage, `train_reward`.

Letters for shapes: B rows, T positions, D width, N selected tokens. N+ is Huang 2024 (docs/sources.md).
The critic is a copy of this model that estimates, before each token, the reward still to come (ppo.py).
"""
import dataclasses
import math
import sys
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.batches import (IN_A_ROW, LEAST_REPLY, Row, different_pairs, drop_long_prompts, pack_rows, reward_batch,
                          reward_rows, similar_lengths)
from data.feedback import (by_kind, chance_warnings, denoised, feedback_beside, feedback_kind, parts_of,
                           quick_agreement, rating_scale, require_varied, standardised, tie_odds_of)
from data.parents import limit_length
from data.prepare import open_stage, recounted
from data.prepared import Prepared
from data.rewards import PythonReward as PythonReward, ScoreScale as ScoreScale  # for who imports them from here
from model import (ModelConfig, Transformer, cross_entropy_sum, load_checkpoint,
                   load_parent, open_run)
from runtime.device import precision
from runtime.draws import batch_indices, key, torch_seed
from runtime.fit import fit, steps_of
from runtime.learning import learn_part, learning_copy, share_frozen
from runtime.lora import without_adapters
from runtime.machine import require_finite
from runtime.options import Common, MaximumLikelihoodOptions, UserError, option
from runtime.run import Run


# ---- the model -----------------------------------------------------------------------------------

@dataclasses.dataclass
class RewardConfig(ModelConfig):
    """A Transformer's shape, and how its hidden states become one score."""

    # mean of the head over the reply's tokens, or `last`: the head at the last real token
    pool: str = "mean"
    # names of the reward's parts, each with its own heads; (): one part without a name
    parts: tuple = ()
    # heads of each part, and which of their scores is the part's
    members: int = 1
    ensemble: str = "mean"


class RewardModel(nn.Module):
    """Trunk and scalar heads: for each part of the reward `members` of them, side by side.

    A part's score is its members' mean, their lowest score (`min`), or mean − spread (`lower`); the
    reply's score is the mean of the parts'. Raw scores have no fixed scale; PPO measures theirs when
    it starts.
    """

    config_class = RewardConfig

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config if isinstance(config, RewardConfig) else RewardConfig(**dataclasses.asdict(config))
        if self.config.pool not in ("last", "mean"):
            raise UserError(f"unknown pooling {self.config.pool!r}: use last or mean")
        self.backbone = Transformer(self.config)
        self.score_head = nn.Linear(config.d_model, max(1, len(self.config.parts)) * self.config.members)
        self.dtype = "float32"  # of `scores`; around a float32 model a caller's autocast still applies
        self.known: Tensor | None = None  # see runtime.learning.knowing
        self.initialise_head()
        # Older checkpoints also hold a mean and a spread of scores, which nothing reads any more.
        self.register_load_state_dict_pre_hook(
            lambda _, state, prefix, *rest: [state.pop(prefix + name, None)
                                             for name in ("mean", "std")])

    @torch.no_grad()
    def initialise_head(self, seed: int = 0) -> None:
        """N(0, 1/sqrt(D + 1)), bias 0 (N+ implementation details)."""
        width = self.config.d_model
        noise = torch.randn(self.score_head.out_features, width,
                            generator=torch.Generator().manual_seed(seed))
        self.score_head.weight.copy_(noise / math.sqrt(width + 1))
        self.score_head.bias.zero_()

    def matrix_parameters(self) -> list[tuple[nn.Parameter, tuple[int, ...]]]:
        """The trunk's matrices, which Muon trains, with the rows of those stacked in each."""
        return self.backbone.matrix_parameters()

    def heads(self, hidden: Tensor) -> Tensor:
        """(…, D) -> (parts, members, …): every head, in float32 whatever the trunk's precision."""
        with torch.autocast(hidden.device.type, enabled=False):
            return self.score_head(hidden.float()).movedim(-1, 0).unflatten(0, (-1, self.config.members))

    def head_values(self, hidden: Tensor) -> Tensor:
        """(…, D) -> (…): the mean of the heads, of which a critic has one."""
        return self.heads(hidden).mean((0, 1))

    def counted(self, mask: Tensor, reply_mask: Tensor | None = None) -> Tensor:
        """Mask (B, T) of the tokens whose head outputs are averaged: the reply's tokens, or only
        the last.

        mask: real tokens. reply_mask: the reply among them; None: all real tokens.
        """
        mask = mask if reply_mask is None else mask & reply_mask
        if not bool(mask.any(1).all()):
            raise ValueError("a row without any token to score")
        if self.config.pool == "mean":
            return mask
        column = torch.arange(mask.shape[1], device=mask.device)
        return column == torch.where(mask, column, -1).amax(1, keepdim=True)

    def pool(self, values: Tensor, mask: Tensor, reply_mask: Tensor | None = None) -> Tensor:
        """Values per token (…, B, T) -> one score per row (…, B). Padding on either side changes
        nothing."""
        counted = self.counted(mask, reply_mask)
        return torch.where(counted, values, 0).sum(-1) / counted.sum(1)

    def head_scores(self, tokens: Tensor, mask: Tensor, reply_mask: Tensor | None = None,
                    below: Tensor | None = None) -> Tensor:
        """Every head's score of each row: tokens, mask and reply_mask (B, T) -> (parts, members, B)
        float32. below: of rows padded to the right, as `Transformer.hidden` takes it."""
        counted = self.counted(mask, reply_mask)
        right_padded = bool((mask[:, :-1] | ~mask[:, 1:]).all())  # then causality hides the padding
        values = self.heads(self.backbone.hidden(tokens, None if right_padded else mask,
                                                 where=counted.flatten().nonzero()[:, 0], below=below))
        everywhere = values.new_zeros(*values.shape[:2], *mask.shape).masked_scatter(counted, values)
        return everywhere.sum(-1) / counted.sum(1)

    def forward(self, tokens: Tensor, mask: Tensor, reply_mask: Tensor | None = None) -> Tensor:
        """Raw score of each row: tokens, mask and reply_mask (B, T) -> (B,) float32."""
        return self.of_parts(self.head_scores(tokens, mask, reply_mask)).mean(0)

    def of_parts(self, scores: Tensor) -> Tensor:
        """Scores (parts, members, B) of all heads -> (parts, B), the members combined."""
        if self.config.ensemble == "min":
            return scores.amin(1)
        mean = scores.mean(1)
        return mean - scores.std(1, correction=0) if self.config.ensemble == "lower" else mean

    def own_part(self, scores: Tensor, parts: Sequence[str]) -> Tensor:
        """Scores (parts, …, B) -> (…, B): of each column the part with this name, or the mean of all
        parts if the model has none of that name."""
        number = {name: i for i, name in enumerate(self.config.parts)}
        if not number:
            return scores[0]
        scores = torch.cat((scores, scores.mean(0, keepdim=True))).movedim(-1, 1)
        rows = torch.tensor([number.get(part, len(number)) for part in parts], device=scores.device)
        return scores[rows, torch.arange(len(rows), device=scores.device)].movedim(0, -1)

    def scores(self, prompts: Sequence[list[int]], replies: Sequence[list[int]]) -> Tensor:
        """Raw score (B,) float32 of each reply, prompts and replies as lists of the very ids
        sampled."""
        return self.of_parts(self.score_heads(flagged_rows(prompts, replies))).mean(0)

    def mean_scores(self, prompts: Sequence[list[int]], replies: Sequence[list[int]]) -> Tensor:
        """The mean (B,) of all heads, whatever the ensemble: what a critic's one head says of a reply."""
        return self.score_heads(flagged_rows(prompts, replies)).mean((0, 1))

    def part_scores(self, prompts: Sequence[list[int]],
                    replies: Sequence[list[int]]) -> dict[str, Tensor]:
        """Raw score (B,) of each reply by each part of the reward, and, of an ensemble, its members'
        `spread` (B,): how far they disagree, the mean over parts."""
        if not self.config.parts and self.config.members == 1:
            return {}
        scores = self.score_heads(flagged_rows(prompts, replies))
        spread = {"spread": scores.std(1, correction=0).mean(0)}
        return (spread if self.config.members > 1 else {}) | dict(
            zip(self.config.parts, self.of_parts(scores), strict=bool(self.config.parts)))

    def score_rows(self, rows: Sequence[Row], parts: Sequence[str] = ()) -> Tensor:
        """Raw score (n,) float32 of each (ids, reply flags). parts: whose score is wanted of each
        row; the mean of all parts without one."""
        return self.own_part(self.of_parts(self.score_heads(rows)), parts or [""] * len(rows))

    @torch.no_grad()
    def score_heads(self, rows: Sequence[Row]) -> Tensor:
        """Every head's score of each row, (parts, members, n) float32, in batches of similar length."""
        members, weight = self.config.members, self.score_head.weight
        scores = torch.zeros(len(weight) // members, members, len(rows), device=weight.device)
        for at in similar_lengths(torch.tensor([len(ids) for ids, _ in rows], device=weight.device)):
            batch = reward_batch([rows[i] for i in at.tolist()], weight.device)
            below = None if self.known is None else self.known[at, :batch[0].shape[1]]
            with precision(self.dtype, weight.device.type):
                scores[..., at] = self.head_scores(*batch, below).float()
        return require_finite(scores, "scores of the reward model")


def flagged_rows(prompts: Sequence[list[int]], replies: Sequence[list[int]]) -> list[Row]:
    """Prompts and replies as lists of ids -> (ids, reply flags) of each."""
    return [(prompt + reply, [False] * len(prompt) + [True] * len(reply))
            for prompt, reply in zip(prompts, replies, strict=True)]


class Scorer(Protocol):
    """Whatever gives replies their scores: a `RewardModel`, or a function of yours in a class."""

    def scores(self, prompts: Sequence[list[int]], replies: Sequence[list[int]]) -> Tensor:
        """One score (B,) for each reply, from prompts and replies as lists of token ids."""


def longest_row(model: RewardModel, state: dict[str, Any]) -> int:
    """The longest row, in tokens, that this model was trained on."""
    return min(state.get("options", {}).get("max_len", math.inf), model.config.max_len)


def room_for_prompt(reply_len: int, model: RewardModel, state: dict[str, Any]) -> int:
    """The most tokens of a prompt for whose replies, of reply_len tokens, this reward model (with its checkpoint's
    state) gives scores that count: it can read both, and was trained on prompts so long."""
    return min(model.config.max_len - reply_len, longest_row(model, state) - LEAST_REPLY)


def critic_from(reward_model: RewardModel, mean: float = 0.0, std: float = 1.0,
                o: Common | None = None) -> RewardModel:
    """A copy to be trained with one head, the mean of all. Its weight is weight / std and its bias
    (bias − mean) / std, so that it gives (raw − mean) / std. o: says which part learns (None: all); the
    rest are the reward model's very tensors.

    PPO's critic starts from it, with a mean and a spread at which its values are those that the
    starting policy's replies are paid.
    """
    critic = learning_copy(reward_model, o, "ppo")
    critic.config = dataclasses.replace(critic.config, parts=(), members=1, ensemble="mean")
    head = critic.score_head
    head.out_features = 1
    head.weight = nn.Parameter(head.weight.detach().mean(0, keepdim=True) / std)
    head.bias = nn.Parameter((head.bias.detach().mean(0, keepdim=True) - mean) / std)
    return critic


def critic_of_policy(policy: Transformer, value: float, o: Common) -> RewardModel:
    """A critic where there is no reward model: the policy's trunk, what does not learn being its very tensors,
    and a head that says `value` everywhere."""
    critic = RewardModel(RewardConfig(**dataclasses.asdict(policy.config)))
    critic.backbone.load_state_dict(without_adapters(policy.state_dict()))
    learn_part(critic, o, "ppo")
    share_frozen(policy, critic)
    nn.init.zeros_(critic.score_head.weight)
    nn.init.constant_(critic.score_head.bias, value)
    return critic


# ---- losses: scores here are raw -----------------------------------------------------------------

def pairwise_loss(chosen: Tensor, rejected: Tensor, margin: Tensor | float | None = None,
                  label_smoothing: Tensor | float = 0.0, *, ties: Tensor | None = None,
                  tie_odds: float = 0.0, weights: Tensor | None = None) -> Tensor:
    """Bradley–Terry: P(chosen beats rejected) = σ(Δ), Δ = r_chosen − r_rejected; the mean of −log
    σ(Δ − margin).

    logsigmoid, not log(σ + ε): the latter's gradient dies on the pairs that are most wrong. With
    label_smoothing p, a share p of the pairs is taken to be labelled the wrong way round
    (MOSS-RLHF, part II).

    Davidson 1970, with tie_odds ν: won, tied and lost are as likely as e^(Δ/2) : ν : e^(−Δ/2). Where
    `ties` (n,) is True people called the two equally good, and their order means nothing. A tie is
    never smoothed. weights (…, n): of each pair's loss, for scores (…, n).

    >>> round(float(pairwise_loss(torch.tensor([1.0]), torch.tensor([1.0]))), 6)  # no preference: ln 2
    0.693147
    """
    delta = chosen - rejected - (0.0 if margin is None else margin)
    if tie_odds:
        won, tied, lost = davidson_log_probs(delta, tie_odds)
    else:
        won, lost = F.logsigmoid(delta), F.logsigmoid(-delta)
    losses = -((1 - label_smoothing) * won + label_smoothing * lost)
    if tie_odds:
        losses = torch.where(ties, -tied, losses)
    return losses.mean() if weights is None else (losses * weights).mean()


def davidson_log_probs(delta: Tensor, tie_odds: float) -> Tensor:
    """Δ (…) -> log P(won), log P(tied), log P(lost), (3, …)."""
    tied = torch.full_like(delta, math.log(tie_odds))
    return torch.stack((delta / 2, tied, -delta / 2)).log_softmax(0)


def regression_loss(scores: Tensor, ratings: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean squared distance between scores (…, B) and people's ratings (B,), each times its weight."""
    if weights is not None:
        return (weights * (scores - ratings) ** 2).mean()
    return F.mse_loss(scores, ratings.to(scores.dtype).expand_as(scores))


def label_loss(scores: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
    """Liked (1) or not (0): P(liked) = σ(score); mean binary cross-entropy of scores (…, B) and
    labels (B,), each times its weight."""
    return F.binary_cross_entropy_with_logits(scores, labels.to(scores.dtype).expand_as(scores), weights)


def feedback_loss(kind: str, scores: Tensor, records: list[dict], label_smoothing: float = 0.0,
                  tie_odds: float = 0.0, weights: Tensor | None = None) -> Tensor:
    """Mean loss of these records; scores (…, B): raw, of pairs all chosen replies before all rejected
    ones. weights: one for each record, as `pairwise_loss` has them."""
    def column(name: str, default: float = 0.0) -> Tensor:
        return torch.tensor([r.get(name, default) for r in records], device=scores.device)

    if kind == "pairwise":
        return pairwise_loss(*scores.chunk(2, -1), column("margin"), column("smoothing", label_smoothing),
                             ties=column("tie").bool(), tie_odds=tie_odds, weights=weights)
    loss, name = (label_loss, "label") if kind == "label" else (regression_loss, "score")
    return loss(scores, column(name), weights)


def mixed_loss(scores: Tensor, records: list[dict], label_smoothing: float = 0.0, tie_odds: float = 0.0,
               weights: Tensor | None = None) -> Tensor:
    """Mean over records of one kind or several, each by its own kind's `feedback_loss`; pairs stand first.
    scores (…, n + pairs): of each record its only or its chosen reply, then each pair's rejected one."""
    n, loss = len(records), 0.0
    for kind, index in by_kind(records).items():
        replies = index + [n + i for i in index if kind == "pairwise"]
        loss = loss + len(index) / n * feedback_loss(
            kind, scores[..., replies], [records[i] for i in index], label_smoothing, tie_odds,
            None if weights is None else weights[:, index])
    return loss


@dataclasses.dataclass
class RewardOptions(MaximumLikelihoodOptions):
    """`python train.py reward`"""

    TOTAL: ClassVar = "epochs"
    PRESETS: ClassVar = {  # what differs from the defaults, which are the preset `demo`
        "smoke": dict(epochs=1.0, batch=16, max_len=64, eval_every=10),
        "base": dict(epochs=1.0, max_len=512, lr=0.003, adam_lr=1e-4),
        "real": dict(batch=16, dropout=0., lm_coef=0., lr=3e-4), "smollm": dict(records=2800, lr=6e-4, eval_every=1000),
    }

    # The model.
    pool: str = option("mean", "the score is the head's mean over the reply, or its output at the "
                               "last token",
                       choices=("mean", "last"),
                       source="last is N+ and InstructGPT; AUC on reviews' validation, three "
                              "seeds: mean .925 on whole texts, .896 on first halves; last .929 "
                              "and .887")
    dropout: float = option(0.1, "dropout while training; no other stage has any", low=0, high=0.9)
    members: int = option(1, "heads that learn the same from records resampled for each: an ensemble",
                          low=1, high=1000)
    ensemble: str = option("mean", "an ensemble's score: its members' mean, their lowest score, or "
                                   "(lower) mean − spread",
                           choices=("mean", "min", "lower"), source="Coste 2023")
    # The loss.
    loss: str = option("auto", "auto: by the records' fields",
                       choices=("auto", "label", "pairwise", "regression"))
    lm_coef: float = option(0.1, "weight of the language-model loss, per token, on the chosen reply of "
                                 "a pair, the first of a tie, and every reply with a rating or label",
                            source="MOSS-RLHF part I, on the chosen reply: keeps the trunk a "
                                   "language model", low=0)
    label_smoothing: float = option(0.0, "share of labels assumed to be wrong (pairwise)",
                                    source="MOSS-RLHF part II", low=0, high=0.5)
    strength_from: str = option("", "reward model whose Δ says how sure each training pair is "
                                    "(pairwise); the next three go by it")
    flip_share: float = option(0.0, "share of the pairs, the weakest, that are turned round",
                               source="MOSS-RLHF part II", low=0, high=0.5)
    smooth_share: float = option(1.0, "share of the pairs, the weakest, that --label_smoothing is for",
                                 source="MOSS-RLHF part II", low=0, high=1)
    adaptive_margin: bool = option(False, "each pair's strength is its margin", source="MOSS-RLHF part II")
    # The records.
    epochs: float = option(2.0, "passes over the training records", low=0.01,
                           high=1e6)
    batch: int = option(32, "records per step", low=1, high=1_000_000)
    max_len: int = option(128, "longest row in tokens; longer texts are truncated and then have no "
                               "end token", low=16, high=1_000_000)
    prefix_share: float = option(0.3, "share of texts truncated at a random place, without end "
                                      "token, as unfinished replies are", low=0, high=1)
    # The learning rate and its schedule.
    lr: float = option(0.01, "learning rate of block matrices (muon) or of everything (adamw)", low=0)
    adam_lr: float = option(0.003, "AdamW's learning rate for embeddings, norms and the head",
                            low=0)
    warmup: float = option(0.1, "share of the steps over which the learning rate rises", low=0,
                           high=1)
    decay: float = option(0.9, "share of the steps, at the end, over which it falls to 0", low=0,
                          high=1)
    # Measuring.
    eval_every: int = option(100, "steps between measurements on validation", low=1)
    keep: str = option("last", "weights at the end: those with the best validation, or the last ones",
                       choices=("best", "last"))
    evaluate: str = option("", "train nothing: measure the finished reward model, or that of --init_from, "
                               "on this file of feedback", compared=False)

    def check(self) -> None:
        super().check()
        if "evaluate" in self.explicit and not self.evaluate:  # a shell's variable without a value
            raise UserError("--evaluate: no file is named; leave the option out to train")
        if self.members == 1:
            self.refuse("ensemble", why="without --members, of which there must be several")
        by_strength = ("flip_share", "smooth_share", "adaptive_margin")
        if not self.strength_from:
            self.refuse(*by_strength, why="without --strength_from, which names a reward model")
        elif not (self.flip_share or self.smooth_share < 1 or self.adaptive_margin):
            raise UserError("--strength_from has no effect alone: say what strength is for, by "
                            + ", ".join(f"--{name}" for name in by_strength))
        if not self.label_smoothing:
            self.refuse("smooth_share", why="without --label_smoothing, which says how much is smoothed")


# ---- the stage -----------------------------------------------------------------------------------

class RewardTask:
    """Batches, loss and measures of `train_reward`, as runtime/fit.py asks for them."""

    def __init__(self, run: Run, data: Prepared):
        self.run, self.o, self.longest = run, run.o, run.model.config.max_len
        self.render = dict(tokenizer=run.tokenizer, template=data.template, max_len=run.o.max_len)
        # The main kind's records first; what other kinds a folder has is learned, but not measured.
        self.records, self.val, beside = (
            records and drop_long_prompts(records, run.tokenizer, data.template, run.o.max_len - LEAST_REPLY, IN_A_ROW)
            for records in (data.records(run.stage, "train"), data.records("reward", "val"),
                            feedback_beside(data, run.stage)))
        self.kind = self.checked_kind(beside)
        self.best_by = ({"pairwise": "val_accuracy", "regression": "val_correlation",
                         "label": "val_auc"}[self.kind], 1)
        self.extra: dict[str, Any] = {"feedback": self.kind,
                                      "warnings": run.state.get("warnings", [])}
        self.tie_odds = 0.0
        groups = [[records[i] for i in index] for records in (self.records, beside)
                  for index in by_kind(records).values()]
        self.records = [record for of_kind in groups for record in self.learnable(of_kind)]
        if self.kind == "pairwise":
            self.val = different_pairs(self.val, run.stage, "validation", self.longest, **self.render)
            self.extra["tie_odds"] = self.tie_odds
        require_varied("val", self.val)
        if self.kind == "regression":
            self.val = standardised(self.val, self.extra["ratings"])
        # How often each record counts for each member of an ensemble: a bootstrap (Oza 2001).
        rng = np.random.default_rng(key(run.o.seed, run.stage, "bootstrap"))
        self.weights = None if run.o.members == 1 else torch.from_numpy(
            rng.poisson(1, (run.o.members, len(self.records))).astype(np.float32))
        self.n_steps = steps_of(run.o, len(self.records))

    def checked_kind(self, beside: list[dict]) -> str:
        """Which loss the main records are for; UserError if the options or the records do not fit it, nor
        those of the kinds beside it."""
        kind = feedback_kind(self.records[0])
        if self.o.loss not in ("auto", kind):
            raise UserError(f"--loss {self.o.loss} does not fit these records, which are for "
                            f"{kind}: use --loss auto")
        unknown = {r.get("part", "") for r in self.val} - {*self.run.model.config.parts, ""}
        if unknown:
            raise UserError(f"{self.run.stage}: validation has records of the part {min(unknown)!r}, but "
                            "training has none: bring some, or leave these out")
        if "pairwise" not in by_kind([self.records[0], *beside]):
            self.o.refuse("label_smoothing", "strength_from", why=f"on records for {kind}: it is for pairs")
        return kind

    def learnable(self, records: list[dict]) -> list[dict]:
        """The training records of one kind as its loss takes them; UserError if they teach nothing."""
        kind = feedback_kind(records[0])
        if kind == "pairwise":
            records = different_pairs(records, self.run.stage, "training", self.longest, **self.render)
        require_varied("train", records)
        if kind == "pairwise":
            self.tie_odds = tie_odds_of(records)
            return self.denoise(records) if self.o.strength_from else records
        if kind == "label":
            return records
        scale = rating_scale(records)
        if self.kind == kind:  # by which what the model says becomes people's ratings again
            self.extra["ratings"] = scale
        return standardised(records, scale)

    def denoise(self, pairs: list[dict]) -> list[dict]:
        """Let the strength of the training pairs, by another reward model, say which to turn round, to
        smooth, and how large a margin to ask for."""
        o = self.o
        if o.adaptive_margin and any("margin" in pair for pair in pairs):
            raise UserError("--adaptive_margin would replace the margins that these pairs have: leave "
                            "it out, or the margins")
        model, tokenizer, _ = load_checkpoint(o.strength_from, self.run.device, RewardModel)
        tokenizer.require_same(self.run.tokenizer, f"{o.strength_from} and the trunk")
        chosen, rejected = (self.raw_scores(pairs, field, model) for field in ("chosen", "rejected"))
        strength = chosen - rejected
        print(f"{self.run.stage}: strength of {len(strength)} pairs by {o.strength_from}: mean "
              f"{strength.mean():.2f}, below 0 {(strength < 0).mean():.1%}", flush=True)
        return denoised(pairs, strength, o.flip_share, o.smooth_share, o.adaptive_margin)

    def losses(self, step: int) -> Iterator[tuple[Tensor, int]]:
        """The loss of one batch: that of the feedback, and a share of the language model's on the
        same text."""
        o, run, model = self.o, self.run, self.run.model
        index = sorted(batch_indices(len(self.records), o.batch, step, o.seed, run.stage),
                       key=lambda i: "chosen" not in self.records[i])  # pairs first
        batch = [self.records[i] for i in index]
        weights = None if self.weights is None else self.weights[:, index].to(run.device)
        # Rows of replies: each record's only or chosen one before all rejected ones; those of a pair are
        # cut alike by equal random numbers.
        pairs, rows = [r for r in batch if "chosen" in r], []
        replies = [{"response": r.get("chosen"), **r} for r in batch]
        for records, field in ((replies, "response"), (pairs, "rejected")):
            rng = np.random.default_rng(key(o.seed, run.stage, "prefix", step))
            rows += reward_rows(records, **self.render, field=field, prefix_share=o.prefix_share,
                                rng=rng)
        tokens, learned, docs, where = (x.to(run.device) for x in pack_rows(rows, o.max_len))
        _, real, reply = reward_batch(rows, run.device)
        with precision(run.dtype, run.device):
            hidden = model.backbone.hidden(tokens, docs=docs)
            scores = model.pool(model.heads(hidden).flatten(2)[..., where], real, reply)
            parts = [record.get("part", "") for record in (*batch, *pairs)]
            scores = model.own_part(scores, parts)  # (members, rows)
            loss = mixed_loss(scores, batch, o.label_smoothing, self.tie_odds, weights)
            if o.lm_coef:
                # of a pair, only the chosen reply is imitated
                targets = (learned & (docs < len(batch)))[:, 1:]
                nats = cross_entropy_sum(model.backbone, hidden[:, :-1][targets],
                                         tokens[:, 1:][targets])
                loss = loss + o.lm_coef * nats / targets.sum()
        yield loss, int(real.sum())

    def measure(self, step: int, subset: int = 600) -> dict[str, float]:
        """Agreement with people on records of validation drawn from all of it: a file may be
        sorted."""
        index = batch_indices(len(self.val), min(subset, len(self.val)), 0, self.o.seed,
                              self.run.stage)
        records = [self.val[i] for i in index]
        fields = ("chosen", "rejected") if self.kind == "pairwise" else ("response",)
        scores = {field: self.raw_scores(records, field) for field in fields}
        self.run.samples(step, [{**record, **{f"{field}_score": round(float(scores[field][i]), 3)
                                              for field in fields}}
                                for i, record in enumerate(records[:8])])
        measured = self.agreement(records, scores)
        for part in self.run.model.config.parts:
            index = [i for i, record in enumerate(records) if record.get("part") == part]
            own = self.agreement([records[i] for i in index], {k: x[index] for k, x in scores.items()})
            measured |= {f"{name}_{part}": value for name, value in own.items()}
        self.extra["warnings"] = chance_warnings(self.kind, records, measured)
        return measured

    def raw_scores(self, records: list[dict], field: str, model: RewardModel | None = None) -> np.ndarray:
        """Raw score (n,) of each record's reply in `field`, by its own part of the reward. model: the
        run's, if None."""
        rows = reward_rows(records, **self.render, field=field)
        with precision(self.run.dtype, self.run.device):
            scores = (model or self.run.model).score_rows(rows, [r.get("part", "") for r in records])
        return scores.cpu().double().numpy()

    def agreement(self, records: list[dict], scores: dict[str, np.ndarray]) -> dict[str, float]:
        """`quick_agreement`, and the mean log-likelihood of ties."""
        measured = quick_agreement(self.kind, records, scores)
        if self.tie_odds and (ties := np.array([bool(r.get("tie")) for r in records], bool)).any():
            delta = torch.from_numpy((scores["chosen"] - scores["rejected"])[ties])
            measured["val_tie_log_likelihood"] = float(davidson_log_probs(delta, self.tie_odds)[1].mean())
        return measured


def reward_model_from(trunk: Transformer, o: RewardOptions, stage: str = "reward",
                      parts: tuple[str, ...] = ()) -> RewardModel:
    """The language model's trunk with new heads, drawn by seed and stage."""
    own = dict(pool=o.pool, dropout=o.dropout, parts=parts, members=o.members, ensemble=o.ensemble)
    model = RewardModel(RewardConfig(**dataclasses.asdict(trunk.config) | own))
    model.backbone.load_state_dict(trunk.state_dict())
    model.initialise_head(torch_seed(o.seed, stage, "weights"))
    return model


def train_reward(o: RewardOptions, stage: str = "reward", parent: str = "sft") -> Run | None:
    """Human feedback becomes a function: the SFT trunk learns to predict what people liked.

    stage: names the run, the training records and the random streams. parent: the stage whose
    trunk is trained. Validation is that of the feedback, whoever learns.
    Returns the finished run, or None if it was finished before.
    """
    if o.reward_from:
        raise UserError(f"{stage} makes a model of rewards: --reward_from has no effect on it; "
                        "--init_from names the trunk")
    data, o = open_stage(o, stage)
    trunk, tokenizer, state = load_parent(o, data, parent, o.init_from)
    o = limit_length(recounted(o, stage, data, tokenizer), trunk.config)
    parents = {"init": state["hash"]}
    if o.strength_from:
        parents["strength"] = load_checkpoint(o.strength_from, "cpu", RewardModel)[2]["hash"]
    parts = parts_of([*data.records(stage, "train"), *feedback_beside(data, stage)])
    model = reward_model_from(trunk, o, stage, parts)
    del trunk  # copied: one in memory is enough
    run = open_run(stage, o, data, parents, model, tokenizer)
    if run is None:
        return None
    task = RewardTask(run, data)
    print(f"{stage}: {len(task.records)} records ({' + '.join(by_kind(task.records))}), "
          f"{task.n_steps} steps of {o.batch}", flush=True)
    run.finish(**fit(run, task))
    for warning in task.extra["warnings"]:
        print(f"{stage}: warning: {warning}", file=sys.stderr)
    return run
