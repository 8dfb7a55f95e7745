"""The reward model: people's judgements, turned into a number that a policy can be trained on.

A reward model is the language model's trunk with one output: a scalar. Three kinds of human feedback, three losses:
which of two replies is better (`pairwise_loss`, Bradley–Terry), how good one is (`regression_loss`), liked or not
(`label_loss`). Train one with `python train.py reward`; the loop stands in train.py, the arithmetic here.
"""
import copy
import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.batches import judged_batch
from model import ModelConfig, Transformer
from runtime.device import precision
from runtime.options import Learning, UserError, option


@dataclasses.dataclass
class RewardConfig(ModelConfig):
    """A Transformer's shape, and how its hidden states become one score."""

    pool: str = "mean"  # mean of the head over the reply's tokens, or `last`: the head at the last real token


class RewardModel(nn.Module):
    """Trunk and scalar head; `mean` and `std` are those of raw scores on the SFT policy's replies."""

    config_class = RewardConfig

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config if isinstance(config, RewardConfig) else RewardConfig(**dataclasses.asdict(config))
        if self.config.pool not in ("last", "mean"):
            raise UserError(f"unknown pooling {self.config.pool!r}: use last or mean")
        self.backbone = Transformer(self.config)
        self.score_head = nn.Linear(config.d_model, 1)
        self.initialise_head()
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("std", torch.ones(()))

    @torch.no_grad()
    def initialise_head(self, seed: int = 0) -> None:
        """N(0, 1/sqrt(D + 1)), bias 0 (N+ implementation details)."""
        width = self.config.d_model
        noise = torch.randn(1, width, generator=torch.Generator().manual_seed(seed))
        self.score_head.weight.copy_(noise / math.sqrt(width + 1))
        self.score_head.bias.zero_()

    def head_values(self, hidden: Tensor) -> Tensor:
        """(…, D) -> (…): the scalar head, in float32 whatever the trunk's precision."""
        with torch.autocast(hidden.device.type, enabled=False):
            return self.score_head(hidden.float()).squeeze(-1)

    def values(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """The head at every token: (B, T) -> (B, T). What the critic starts from."""
        return self.head_values(self.backbone.hidden(tokens, mask))

    def pooled(self, mask: Tensor, reply_mask: Tensor | None = None) -> Tensor:
        """Which tokens (B, T) a row's score is the mean of: of its real ones (mask) those of the reply, or the last."""
        mask = mask if reply_mask is None else mask & reply_mask
        if not bool(mask.any(1).all()):
            raise ValueError("a row without any token to score")
        if self.config.pool == "mean":
            return mask
        column = torch.arange(mask.shape[1], device=mask.device)
        return column == torch.where(mask, column, -1).amax(1, keepdim=True)

    def pool(self, values: Tensor, mask: Tensor, reply_mask: Tensor | None = None) -> Tensor:
        """Per-token values (B, T) -> one score per row (B,). mask: real tokens; reply_mask: the part that `mean`
        averages, default all real tokens. Pads change nothing, on whichever side they stand."""
        chosen = self.pooled(mask, reply_mask)
        return torch.where(chosen, values, 0).sum(1) / chosen.sum(1)

    def forward(self, tokens: Tensor, mask: Tensor, reply_mask: Tensor | None = None) -> Tensor:
        """Raw score of each row: tokens, mask and reply_mask (B, T) -> (B,) float32. Train and measure on these."""
        chosen = self.pooled(mask, reply_mask)
        to_the_right = bool((mask[:, :-1] | ~mask[:, 1:]).all())  # such padding is hidden by causality
        values = self.head_values(self.backbone.hidden(tokens, None if to_the_right else mask,
                                                       where=chosen.flatten().nonzero()[:, 0]))
        return values.new_zeros(mask.shape).masked_scatter(chosen, values).sum(1) / chosen.sum(1)

    def normalise(self, raw: Tensor) -> Tensor:
        return (raw - self.mean) / self.std

    def score(self, tokens: Tensor, mask: Tensor, reply_mask: Tensor | None = None) -> Tensor:
        """(raw − mean) / std: 0 is an average reply of the SFT policy, 1 is one spread better."""
        return self.normalise(self(tokens, mask, reply_mask))

    def score_replies(self, prompts: Sequence[list[int]], tokens: Tensor, mask: Tensor,
                      dtype: str = "float32") -> np.ndarray:
        """Raw score (B,) of each reply, tokens and mask (B, R), read from the very ids that were sampled."""
        replies = [t[m].tolist() for t, m in zip(tokens, mask, strict=True)]
        return self.score_rows([(p + r, [False] * len(p) + [True] * len(r))
                                for p, r in zip(prompts, replies, strict=True)], dtype)

    @torch.no_grad()
    def score_rows(self, rows: Sequence[tuple[list[int], list[bool]]], dtype: str = "float32",
                   batch: int = 64) -> np.ndarray:
        """Raw score (n,) of each (ids, reply flags), in batches of similar length."""
        order, scores = np.argsort([len(ids) for ids, _ in rows], kind="stable"), np.zeros(len(rows))
        device = self.score_head.weight.device
        for i in range(0, len(rows), batch):
            index = order[i:i + batch]
            with precision(dtype, device.type):
                tokens, real, reply = judged_batch([rows[j] for j in index], device)
                scores[index] = self(tokens, real, reply).float().cpu().numpy()
        return scores

    @torch.no_grad()
    def set_normalisation(self, raw: Tensor) -> None:
        """Take mean and spread from raw scores (≥ 512 of them) of replies that the SFT policy wrote."""
        std = raw.float().std(correction=0)
        if not torch.isfinite(std) or std <= 1e-6:
            raise UserError(f"the reward model gives every reply the same score (spread {float(std):.1e} over "
                            f"{len(raw)} replies): it has learned nothing to optimise; train it longer or check its "
                            f"labels")
        self.mean.copy_(raw.float().mean())
        self.std.copy_(std)


def critic_from(reward_model: RewardModel) -> RewardModel:
    """A copy of the reward model with its constants folded into the head, w/σ and (b − μ)/σ, so that its first values
    are on the scale of normalised scores; its own constants become 0 and 1, so that they are not applied twice. That is
    exact under --reward_norm fixed; log σ(raw) and 2σ(raw) − 1 bend that scale, which the critic learns in its warm-up.
    """
    critic = copy.deepcopy(reward_model).requires_grad_(True)
    with torch.no_grad():
        critic.score_head.weight.div_(critic.std)
        critic.score_head.bias.sub_(critic.mean).div_(critic.std)
        critic.mean.zero_()
        critic.std.fill_(1)
    return critic


# ---- losses: scores here are raw -------------------------------------------------------------------------------------

def pairwise_loss(chosen: Tensor, rejected: Tensor, margin: Tensor | float | None = None,
                  label_smoothing: float = 0.0) -> Tensor:
    """Bradley–Terry: P(chosen beats rejected) = σ(Δ), Δ = r_chosen − r_rejected; the mean of −log σ(Δ − margin).

    logsigmoid, not log(σ + ε): the latter's gradient dies on the pairs that are most wrong. With label_smoothing p, a
    share p of the pairs is taken to be labelled the wrong way round (MOSS-RLHF, part II).

    >>> round(float(pairwise_loss(torch.tensor([1.0]), torch.tensor([1.0]))), 6)  # no preference: ln 2
    0.693147
    """
    delta = chosen - rejected - (0.0 if margin is None else margin)
    return -((1 - label_smoothing) * F.logsigmoid(delta) + label_smoothing * F.logsigmoid(-delta)).mean()


def regression_loss(scores: Tensor, ratings: Tensor) -> Tensor:
    """Mean squared distance between scores (B,) and people's ratings (B,)."""
    return F.mse_loss(scores, ratings.to(scores.dtype))


def label_loss(scores: Tensor, labels: Tensor) -> Tensor:
    """Liked (1) or not (0): P(liked) = σ(score); mean binary cross-entropy of scores (B,) and labels (B,)."""
    return F.binary_cross_entropy_with_logits(scores, labels.to(scores.dtype))


def feedback_kind(record: dict) -> str:
    """Which of the three losses a record is for."""
    return "pairwise" if "chosen" in record else "regression" if "score" in record else "label"


def feedback_loss(kind: str, scores: Tensor, records: list[dict], label_smoothing: float = 0.0) -> Tensor:
    """Mean loss of these records; scores: raw, of pairs all chosen replies before all rejected ones."""
    if kind == "pairwise":
        chosen, rejected = scores.chunk(2)
        margin = torch.tensor([r.get("margin", 0.0) for r in records], device=scores.device)
        return pairwise_loss(chosen, rejected, margin, label_smoothing)
    if kind == "label":
        return label_loss(scores, torch.tensor([r["label"] for r in records], device=scores.device))
    return regression_loss(scores, torch.tensor([r["score"] for r in records], device=scores.device))


@dataclasses.dataclass
class RewardOptions(Learning):
    """`python train.py reward`"""

    pool: str = option("mean", "read the score as mean over the reply or at its last token", choices=("mean", "last"),
                       source="last is N+ and InstructGPT; AUC on reviews' validation, three seeds: mean .925 on whole "
                              "texts, .896 on first halves; last .929 and .887")
    loss: str = option("auto", "auto: by the records' fields", choices=("auto", "label", "pairwise", "regression"))
    epochs: float = option(2.0, "passes over the training records", smoke=1.0, base=1.0, low=0.01)
    batch: int = option(32, "records per step", smoke=16, low=1)
    max_len: int = option(128, "longest row in tokens; longer texts are cut, and then carry no end token", smoke=64,
                          base=512, low=16)
    lr: float = option(0.01, "learning rate of block matrices (Muon), or of all (AdamW)", base=0.003, low=0)
    adam_lr: float = option(0.003, "learning rate of embeddings, norms and head, by AdamW", base=1e-4, low=0)
    warmup: float = option(0.1, "share of the steps over which the learning rate rises", low=0, high=1)
    decay: float = option(0.9, "share of the steps, the last ones, over which it falls to 0", low=0, high=1)
    dropout: float = option(0.1, "the only place where dropout is on", low=0, high=0.9)
    lm_coef: float = option(0.1, "weight of the language-model loss on the same text, per token",
                            source="MOSS-RLHF part I, on the chosen reply: keeps the trunk a language model", low=0)
    prefix_share: float = option(0.3, "share of texts cut somewhere, without end token: unfinished replies",
                                 low=0, high=1)
    label_smoothing: float = option(0.0, "share of labels taken to be wrong (pairwise)", source="MOSS-RLHF part II",
                                    low=0, high=0.5)
    eval_every: int = option(100, "steps between measurements on validation", smoke=10, low=1)
    norm_replies: int = option(512, "replies of the SFT policy that give the score its mean and spread", smoke=64,
                               low=2)
    reply_len: int = option(64, "longest of those replies, as in PPO", smoke=16, base=128, low=1)
    temperature: float = option(1.0, "their sampling temperature, as in PPO", low=0.01)
