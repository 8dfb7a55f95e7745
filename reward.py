"""The reward model: people's judgements, turned into a number that a policy can be trained on.

    python train.py reward

A reward model is the language model's trunk with one output, a scalar. Three kinds of human
feedback, three losses: which of two replies is better (`pairwise_loss`, Bradley–Terry), how good
one is (`regression_loss`), liked or not (`label_loss`). `ScoreScale` makes of a score what PPO pays
for it. The chapter ends in the stage itself, `train_reward`.

Letters for shapes: B rows, T positions, D width, N selected tokens.
"""
import dataclasses
import copy
import math
import sys
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.batches import (drop_equal_pairs, drop_long_prompts, pack_rows, reward_batch,
                          reward_rows)
from data.prepare import open_stage
from data.prepared import Prepared
from model import (ModelConfig, Transformer, cross_entropy_sum, limit_length, load_parent, open_run)
from runtime.device import precision
from runtime.draws import batch_indices, key, torch_seed
from runtime.fit import fit
from runtime.machine import require_finite
from runtime.options import MaximumLikelihoodOptions, UserError, option
from runtime.run import Run
from runtime.statistics import RunningMoments, accuracy, auc, correlation, share_above


# ---- the model -----------------------------------------------------------------------------------

@dataclasses.dataclass
class RewardConfig(ModelConfig):
    """A Transformer's shape, and how its hidden states become one score."""

    # mean of the head over the reply's tokens, or `last`: the head at the last real token
    pool: str = "mean"


class RewardModel(nn.Module):
    """Trunk and scalar head. Its raw scores have no fixed scale; PPO measures theirs when it
    starts."""

    config_class = RewardConfig

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config if isinstance(config, RewardConfig) else RewardConfig(**dataclasses.asdict(config))
        if self.config.pool not in ("last", "mean"):
            raise UserError(f"unknown pooling {self.config.pool!r}: use last or mean")
        self.backbone = Transformer(self.config)
        self.score_head = nn.Linear(config.d_model, 1)
        self.rows_at_once = 64  # read together by `scores`: memory and speed, nothing else
        self.initialise_head()
        # Older checkpoints also hold a mean and a spread of scores, which nothing reads any more.
        self.register_load_state_dict_pre_hook(
            lambda _, state, prefix, *rest: [state.pop(prefix + name, None)
                                             for name in ("mean", "std")])

    @torch.no_grad()
    def initialise_head(self, seed: int = 0) -> None:
        """N(0, 1/sqrt(D + 1)), bias 0 (N+ implementation details)."""
        width = self.config.d_model
        noise = torch.randn(1, width, generator=torch.Generator().manual_seed(seed))
        self.score_head.weight.copy_(noise / math.sqrt(width + 1))
        self.score_head.bias.zero_()

    def matrix_parameters(self) -> list[tuple[nn.Parameter, tuple[int, ...]]]:
        """The trunk's matrices, which Muon trains, with the rows of those stacked in each."""
        return self.backbone.matrix_parameters()

    def head_values(self, hidden: Tensor) -> Tensor:
        """(…, D) -> (…): the scalar head, in float32 whatever the trunk's precision."""
        with torch.autocast(hidden.device.type, enabled=False):
            return self.score_head(hidden.float()).squeeze(-1)

    def pooled(self, mask: Tensor, reply_mask: Tensor | None = None) -> Tensor:
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
        """Values per token (B, T) -> one score per row (B,). Padding on either side changes
        nothing."""
        chosen = self.pooled(mask, reply_mask)
        return torch.where(chosen, values, 0).sum(1) / chosen.sum(1)

    def forward(self, tokens: Tensor, mask: Tensor, reply_mask: Tensor | None = None) -> Tensor:
        """Raw score of each row: tokens, mask and reply_mask (B, T) -> (B,) float32."""
        chosen = self.pooled(mask, reply_mask)
        right_padded = bool((mask[:, :-1] | ~mask[:, 1:]).all())  # then causality hides the padding
        values = self.head_values(self.backbone.hidden(tokens, None if right_padded else mask,
                                                       where=chosen.flatten().nonzero()[:, 0]))
        return values.new_zeros(mask.shape).masked_scatter(chosen, values).sum(1) / chosen.sum(1)

    def scores(self, prompts: Sequence[list[int]], replies: Sequence[list[int]]) -> Tensor:
        """Raw score (B,) float32 of each reply, prompts and replies as lists of the very ids
        sampled."""
        return self.score_rows([(prompt + reply, [False] * len(prompt) + [True] * len(reply))
                                for prompt, reply in zip(prompts, replies, strict=True)])

    @torch.no_grad()
    def score_rows(self, rows: Sequence[tuple[list[int], list[bool]]]) -> Tensor:
        """Raw score (n,) float32 of each (ids, reply flags), in batches of similar length."""
        order = np.argsort([len(ids) for ids, _ in rows], kind="stable")
        device = self.score_head.weight.device
        scores = torch.zeros(len(rows), device=device)
        for i in range(0, len(rows), self.rows_at_once):
            index = order[i:i + self.rows_at_once]
            tokens, real, reply = reward_batch([rows[j] for j in index], device)
            scores[torch.from_numpy(index).to(device)] = self(tokens, real, reply).float()
        return require_finite(scores, "scores of the reward model")


class Scorer(Protocol):
    """Whatever gives replies their scores: a `RewardModel`, or a function of yours in a class."""

    def scores(self, prompts: Sequence[list[int]], replies: Sequence[list[int]]) -> Tensor:
        """One score (B,) for each reply, from prompts and replies as lists of token ids."""


class PythonReward:
    """A Python function as a scorer: function(prompts, replies), both lists of texts -> a number
    each.

    >>> class Letters:  # stands in for a tokenizer; -1 is its end token
    ...     eom_id, decode = -1, staticmethod(lambda ids: "".join(map(chr, ids)))
    ...     reply_text = staticmethod(lambda ids: "".join(chr(i) for i in ids if i >= 0))
    >>> short = PythonReward(lambda prompts, replies: [-len(reply) for reply in replies], Letters)
    >>> short.scores([[72, 105]], [[104, 101, -1]])
    tensor([-2.])
    """

    def __init__(self, function: Any, tokenizer: Any, device: str = "cpu"):
        self.function, self.tokenizer, self.device = function, tokenizer, device

    def scores(self, prompts: Sequence[list[int]], replies: Sequence[list[int]]) -> Tensor:
        """Score (B,) float32 of each reply; control tokens are no part of its text."""
        prompts = [self.tokenizer.decode([i for i in ids if i != self.tokenizer.eom_id])
                   for ids in prompts]
        replies = [self.tokenizer.reply_text(ids) for ids in replies]
        scores = torch.tensor(self.function(prompts, replies), dtype=torch.float32)
        if not scores.isfinite().all():
            raise UserError(f"the reward function gives scores that are not finite numbers: "
                            f"{scores.tolist()[:4]} …; mend it")
        return scores.to(self.device)


def longest_row(model: RewardModel, state: dict[str, Any]) -> int:
    """The longest row, in tokens, that this model was trained on."""
    return min(state.get("options", {}).get("max_len", math.inf), model.config.max_len)


def critic_from(reward_model: RewardModel, mean: float = 0.0, std: float = 1.0) -> RewardModel:
    """A trainable copy whose head gives (raw − mean) / std: w/σ and (b − μ)/σ.

    PPO's critic starts from it, with a mean and a spread at which its values are those that the
    starting policy's replies are paid.
    """
    critic = copy.deepcopy(reward_model).requires_grad_(True)
    with torch.no_grad():
        critic.score_head.weight.div_(std)
        critic.score_head.bias.sub_(mean).div_(std)
    return critic


# ---- what a policy is paid -------------------------------------------------------------------------

def chosen_reward_norm(asked: str, feedback: str) -> str:
    """`auto` resolved by the feedback that the reward model learned from; UserError if they do not
    fit."""
    if asked == "auto":
        return "logsigmoid" if feedback == "label" else "fixed"
    if "sigmoid" in asked and feedback != "label":
        raise UserError(f"--reward_norm {asked} reads raw scores as log-odds, but this reward "
                        f"model learned from feedback for {feedback}: use fixed or running")
    return asked


class ScoreScale:
    """From raw scores to what PPO is paid.

    `mean` and `std` are those of raw scores on replies of the starting policy; `moments` follow the
    scores paid so far, for --reward_norm running.
    """

    def __init__(self, mean: float = 0.0, std: float = 1.0,
                 moments: dict[str, float] | None = None):
        self.mean, self.std, self.moments = mean, std, RunningMoments(**(moments or {}))

    @classmethod
    def of(cls, raw: Tensor, whose: str = "the reward model") -> "ScoreScale":
        """The scale of these raw scores (n,); UserError if they are all the same."""
        std = float(raw.float().std(correction=0))
        if not std > 1e-6:  # NaN, too
            raise UserError(f"{whose} gives every reply the same score (spread {std:.1e} over "
                            f"{len(raw)} replies): it has learned nothing to optimise; train it "
                            "longer or check its labels")
        return cls(float(raw.float().mean()), std)

    def paid(self, raw: Tensor, ended: Tensor, o: Any) -> Tensor:
        """Raw scores (B,) -> scores (B,): normalised, clipped, and then less the penalty for a
        reply without end token (`ended` (B,) False), so that the penalty always counts. o: PPO's
        options, with reward_norm resolved.

        `moments` are updated before use, and only their spread is used (MOSS). Paid log P(liked),
        with γ = 1 and apart from penalties, the best policy is proportional to π_ref ·
        P(liked)^(1/β), β the price of KL: Bayes' rule at β = 1, and more demanding the smaller β
        is.
        """
        if o.reward_norm == "sigmoid":
            scores = 2 * torch.sigmoid(raw) - 1
        elif o.reward_norm == "logsigmoid":
            scores = F.logsigmoid(raw)
        else:
            scores = (raw - self.mean) / self.std
            if o.reward_norm == "running":
                self.moments.update(scores)
                scores = scores / self.moments.std
        return scores.clamp(-(o.reward_clip or math.inf), o.reward_clip or math.inf) - o.end_penalty * (~ended).float()

    def state(self) -> dict[str, Any]:
        return {"mean": self.mean, "std": self.std, "moments": self.moments.state()}


# ---- losses: scores here are raw -----------------------------------------------------------------

def pairwise_loss(chosen: Tensor, rejected: Tensor, margin: Tensor | float | None = None,
                  label_smoothing: float = 0.0) -> Tensor:
    """Bradley–Terry: P(chosen beats rejected) = σ(Δ), Δ = r_chosen − r_rejected; the mean of −log
    σ(Δ − margin).

    logsigmoid, not log(σ + ε): the latter's gradient dies on the pairs that are most wrong. With
    label_smoothing p, a share p of the pairs is taken to be labelled the wrong way round
    (MOSS-RLHF, part II).

    >>> round(float(pairwise_loss(torch.tensor([1.0]), torch.tensor([1.0]))), 6)  # no preference: ln 2
    0.693147
    """
    delta = chosen - rejected - (0.0 if margin is None else margin)
    return -((1 - label_smoothing) * F.logsigmoid(delta) + label_smoothing * F.logsigmoid(-delta)).mean()


def regression_loss(scores: Tensor, ratings: Tensor) -> Tensor:
    """Mean squared distance between scores (B,) and people's ratings (B,)."""
    return F.mse_loss(scores, ratings.to(scores.dtype))


def label_loss(scores: Tensor, labels: Tensor) -> Tensor:
    """Liked (1) or not (0): P(liked) = σ(score); mean binary cross-entropy of scores (B,) and
    labels (B,)."""
    return F.binary_cross_entropy_with_logits(scores, labels.to(scores.dtype))


def feedback_kind(record: dict) -> str:
    """Which of the three losses a record is for."""
    return "pairwise" if "chosen" in record else "regression" if "score" in record else "label"


def require_varied(split: str, records: Sequence[dict]) -> None:
    """UserError if the labels or scores of a split's records are all the same."""
    name = "label" if feedback_kind(records[0]) == "label" else "score"
    if len({r.get(name) for r in records}) == 1 and name in records[0]:
        where, verb, file = {"train": ("to learn from", "learned", "reward.jsonl"),
                             "val": ("set aside for validation", "measured", "reward_val.jsonl"),
                             "test": ("set aside for test", "measured", "reward_test.jsonl")}[split]
        raise UserError(f"reward: all {name}s {where} are the same ({records[0][name]}), so that "
                        f"nothing can be {verb}: bring more records, or a file {file} in which "
                        "they differ")


def feedback_loss(kind: str, scores: Tensor, records: list[dict],
                  label_smoothing: float = 0.0) -> Tensor:
    """Mean loss of these records; scores: raw, of pairs all chosen replies before all rejected
    ones."""
    if kind == "pairwise":
        chosen, rejected = scores.chunk(2)
        margin = torch.tensor([r.get("margin", 0.0) for r in records], device=scores.device)
        return pairwise_loss(chosen, rejected, margin, label_smoothing)
    if kind == "label":
        return label_loss(scores, torch.tensor([r["label"] for r in records], device=scores.device))
    return regression_loss(scores, torch.tensor([r["score"] for r in records],
                                                device=scores.device))


@dataclasses.dataclass
class RewardOptions(MaximumLikelihoodOptions):
    """`python train.py reward`"""

    PRESETS: ClassVar = {  # what differs from the defaults, which are the preset `demo`
        "smoke": dict(epochs=1.0, batch=16, max_len=64, eval_every=10),
        "base": dict(epochs=1.0, max_len=512, lr=0.003, adam_lr=1e-4),
    }

    # The model.
    pool: str = option("mean", "the score is the head's mean over the reply, or its output at the "
                               "last token",
                       choices=("mean", "last"),
                       source="last is N+ and InstructGPT; AUC on reviews' validation, three "
                              "seeds: mean .925 on whole texts, .896 on first halves; last .929 "
                              "and .887")
    dropout: float = option(0.1, "dropout while training; no other stage has any", low=0, high=0.9)
    # The loss.
    loss: str = option("auto", "auto: by the records' fields",
                       choices=("auto", "label", "pairwise", "regression"))
    lm_coef: float = option(0.1, "weight of the language-model loss on the same text, per token",
                            source="MOSS-RLHF part I, on the chosen reply: keeps the trunk a "
                                   "language model", low=0)
    label_smoothing: float = option(0.0, "share of labels assumed to be wrong (pairwise)",
                                    source="MOSS-RLHF part II", low=0, high=0.5)
    # The records.
    epochs: float = option(2.0, "passes over the training records", low=0.01,
                           high=1e6)
    batch: int = option(32, "records per step", low=1, high=1_000_000)
    max_len: int = option(128, "longest row in tokens; longer texts are truncated and then have no "
                               "end token", low=16, high=1_000_000)
    prefix_share: float = option(0.3, "share of texts truncated at a random place, without end "
                                      "token, as unfinished replies are", low=0, high=1)
    # The learning rate and its schedule.
    lr: float = option(0.01, "learning rate of block matrices (muon) or of everything (adamw)",
                       low=0)
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


# ---- the stage -----------------------------------------------------------------------------------

class RewardTask:
    """Batches, loss and measures of `train_reward`, as runtime/fit.py asks for them."""

    def __init__(self, run: Run, data: Prepared):
        self.run, self.o = run, run.o
        self.render = dict(tokenizer=run.tokenizer, template=data.template, max_len=run.o.max_len)
        self.records, self.val = (
            drop_long_prompts(data.records(*name), run.tokenizer, data.template, run.o.max_len - 8)
            for name in ((run.stage, "train"), ("reward", "val")))
        self.kind = self.checked_kind()
        self.best_by = ({"pairwise": "val_accuracy", "regression": "val_correlation",
                         "label": "val_auc"}[self.kind], 1)
        self.extra: dict[str, Any] = {"feedback": self.kind,
                                      "warnings": run.state.get("warnings", [])}
        if self.kind == "pairwise":
            self.records, self.val = (self.differing(split, pairs) for split, pairs
                                      in (("training", self.records), ("validation", self.val)))
        if self.kind == "regression":
            self.standardise_ratings()
        self.n_steps = math.ceil(run.o.epochs * len(self.records) / run.o.batch)

    def checked_kind(self) -> str:
        """Which loss the records are for; UserError if the options or the records do not fit it."""
        kind = feedback_kind(self.records[0])
        if self.o.loss not in ("auto", kind):
            raise UserError(f"--loss {self.o.loss} does not fit these records, which are for "
                            f"{kind}: use --loss auto")
        if kind == "pairwise":
            return kind
        self.o.refuse("label_smoothing", why=f"on records for {kind}: it is for pairs")
        require_varied("train", self.records)
        require_varied("val", self.val)
        return kind

    def differing(self, split: str, pairs: list[dict]) -> list[dict]:
        """The pairs whose replies differ within max_len; the others would teach nothing. Prints how
        many are left out and which option keeps them; UserError if all are."""
        kept, needed = drop_equal_pairs(pairs, **self.render)
        if len(kept) < len(pairs):
            where = "" if needed <= self.run.model.config.max_len else "in pretraining and here "
            text = (f"{self.run.stage}: {len(pairs) - len(kept)} of {len(pairs)} {split} pairs left out: "
                    f"chosen and rejected are equal in their first {self.o.max_len} tokens; "
                    f"--max_len {needed} {where}would keep all")
            if not kept:
                raise UserError(text)
            print(text, flush=True)
        return kept

    def standardise_ratings(self) -> None:
        """Ratings of any scale become numbers of mean 0 and spread 1 over the training records: what
        the head and its learning rate are made for. The checkpoint keeps mean and spread."""
        ratings = np.array([r["score"] for r in self.records], float)
        size = float(np.ptp(ratings))  # divided out first: squares of 1e-200 are 0
        mean, spread = float((ratings / size).mean()), float((ratings / size).std())
        self.extra["ratings"] = {"mean": mean * size, "spread": spread * size}
        self.records, self.val = ([r | {"score": (r["score"] / size - mean) / spread}
                                   for r in records] for records in (self.records, self.val))

    def losses(self, step: int) -> Iterator[tuple[Tensor, int]]:
        """The loss of one batch: that of the feedback, and a share of the language model's on the
        same text."""
        o, run, model = self.o, self.run, self.run.model
        batch = [self.records[i] for i in batch_indices(len(self.records), o.batch, step, o.seed,
                                                        run.stage)]
        # Rows of replies; of pairs all chosen ones before all rejected ones, cut alike by equal
        # random numbers.
        rows = []
        for field in ("chosen", "rejected") if self.kind == "pairwise" else ("response",):
            rng = np.random.default_rng(key(o.seed, run.stage, "prefix", step))
            rows += reward_rows(batch, **self.render, field=field, prefix_share=o.prefix_share,
                                rng=rng)
        tokens, learned, docs, where = (x.to(run.device) for x in pack_rows(rows, o.max_len))
        _, real, reply = reward_batch(rows, run.device)
        with precision(run.dtype, run.device):
            hidden = model.backbone.hidden(tokens, docs=docs)
            scores = model.pool(model.head_values(hidden).flatten()[where], real, reply)
            loss = feedback_loss(self.kind, scores, batch, o.label_smoothing)
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
        self.extra["warnings"] = self.chance_warnings(records, measured)
        return measured

    def raw_scores(self, records: list[dict], field: str) -> np.ndarray:
        """Raw score (n,) of each record's reply in `field`."""
        rows = reward_rows(records, **self.render, field=field)
        with precision(self.run.dtype, self.run.device):
            return self.run.model.score_rows(rows).cpu().double().numpy()

    def agreement(self, records: list[dict], scores: dict[str, np.ndarray]) -> dict[str, float]:
        """Accuracy on pairs; correlation with ratings; AUC and accuracy on labels."""
        if self.kind == "pairwise":
            return {"val_accuracy": share_above(scores["chosen"], scores["rejected"])}
        raw = scores["response"]
        if self.kind == "regression":
            return {"val_correlation": correlation(raw, [r["score"] for r in records])}
        labels = np.array([r["label"] for r in records])
        right = {"val_accuracy": accuracy(1 / (1 + np.exp(-raw)), labels)}
        return right if labels.min() == labels.max() else {"val_auc": auc(raw, labels), **right}

    def chance_warnings(self, records: list[dict], measured: dict[str, float]) -> list[str]:
        """A warning if the agreement is what a model that learned nothing reaches once in twenty
        runs: 1.645 standard errors above chance."""
        n = len(records)
        name, chance, error = {"pairwise": ("val_accuracy", 0.5, 0.5 / math.sqrt(n)),
                               "regression": ("val_correlation", 0.0, 1 / math.sqrt(max(1, n - 1))),
                               "label": ("val_auc", 0.5, 0.0)}[self.kind]
        if self.kind == "label":  # Mann and Whitney 1947
            liked = sum(r["label"] for r in records)
            error = math.sqrt((n + 1) / (12 * max(1, liked * (n - liked))))
        value, limit = measured.get(name, chance), min(1.0, chance + 1.645 * error)
        if value > limit:
            return []
        return [f"{name} {value:.3f} over {n} records is no better than chance ({chance:g}, by "
                f"luck up to {limit:.3f}): who trusts it follows noise; bring more feedback, for "
                "validation, too, train longer (--epochs), or look for mistakes in the feedback"]


def reward_model_from(trunk: Transformer, o: RewardOptions, stage: str = "reward") -> RewardModel:
    """The language model's trunk with a new head, drawn by seed and stage."""
    model = RewardModel(RewardConfig(**{**dataclasses.asdict(trunk.config), "pool": o.pool,
                                        "dropout": o.dropout}))
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
    o = limit_length(o, trunk.config)
    run = open_run(stage, o, data, {"init": state["hash"]}, reward_model_from(trunk, o, stage),
                   tokenizer)
    if run is None:
        return None
    task = RewardTask(run, data)
    print(f"{stage}: {len(task.records)} records ({task.kind}), {task.n_steps} steps of {o.batch}",
          flush=True)
    run.finish(**fit(run, task))
    for warning in task.extra["warnings"]:
        print(f"{stage}: warning: {warning}", file=sys.stderr)
    return run
