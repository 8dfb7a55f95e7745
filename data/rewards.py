"""Rewards that need no reward model: a Python function, a reply's length, and sums of parts.

    python train.py ppo --reward my.py:polite
    python train.py ppo --reward model:1,length:-.01,my.py:polite:.5

A part is NAME or NAME:WEIGHT, parts are separated by commas. Names: `model`, the reward model;
`model.HEAD`, one head of it; `length`, the tokens of a reply; FILE.py:FUNCTION, a function of yours.
`read_reward` makes parts of such a text, and loads the functions; `RewardSum` scores replies by them.
"""
import hashlib
import math
import pathlib
import types
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from data.batches import prompt_ids
from data.feedback import feedback_kind
from data.functions import PythonReward, load_function
from data.prepared import Prepared
from data.sets import DATA_SETS
from runtime.options import UserError
from runtime.statistics import RunningMoments

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


# ---- parts ---------------------------------------------------------------------------------------

class Part(NamedTuple):
    """One term of a reward."""

    name: str  # in metrics: part_<name>
    weight: float = 1.0
    head: str | None = None  # of the reward model: "" is its whole score; None: no part of it
    function: Callable | None = None
    path: pathlib.Path | None = None  # of the function's file
    digest: str = ""  # a hash of that file; what it imports is not in it


def read_reward(text: str) -> list[Part]:
    """The parts of `--reward`, functions loaded; UserError says which part is wrong, and how to mend
    it.

    >>> [(part.name, part.weight) for part in read_reward("model:2,length:-.01")]
    [('model', 2.0), ('length', -0.01)]
    """
    parts = [read_part(word.strip()) for word in text.split(",")] if text.strip() else []
    names = [part.name for part in parts]
    if twice := {name for name in names if names.count(name) > 1}:
        raise UserError(f"--reward {text}: {', '.join(sorted(twice))} stands twice: give each part once, under "
                        "a name of its own")
    heads = {part.head for part in parts} - {None}
    if "" in heads and len(heads) > 1:
        raise UserError(f"--reward {text}: `model` already holds its heads: name it, or its heads")
    return parts


def read_part(word: str) -> Part:
    """One part. A file's name ends at `.py:`, so that the colon of a drive is no separator."""
    file, is_file, rest = word.rpartition(".py:")
    name, _, weight = rest.partition(":")
    try:
        number = float(weight) if weight else 1.0
    except ValueError:
        number = math.nan
    if not math.isfinite(number) or word.endswith(":"):
        raise UserError(f"--reward: {weight!r} is no weight, in {word!r}: write NAME or NAME:NUMBER")
    if number == 0:
        raise UserError(f"--reward: {word!r} has no effect with the weight 0: leave it out")
    if is_file:
        path = pathlib.Path(file + ".py")
        function = load_function(path, name)
        return Part(name, number, function=function, path=path,
                    digest=hashlib.sha256(path.read_bytes()).hexdigest()[:12])
    if name == "length":
        return Part(name, number)
    if name == "model" or name.startswith("model."):
        return Part(name.removeprefix("model."), number, head=name.removeprefix("model").lstrip("."))
    raise UserError(f"--reward: unknown part {name!r}: use model, model.HEAD, length, or "
                    "FILE.py:FUNCTION, each with :WEIGHT if need be, separated by commas (so a "
                    "file's path must hold none)")


# ---- sums ----------------------------------------------------------------------------------------

class Length:
    """The tokens of each reply, its end token among them."""

    def scores(self, prompts: Sequence[list[int]], replies: Sequence[list[int]]) -> Tensor:
        return torch.tensor([float(len(reply)) for reply in replies])


class RewardSum:
    """Σ weight · part, a scorer: functions and `length` as they are, so that the price of KL has their
    units; parts of the reward model as --reward_norm makes them of raw scores."""

    def __init__(self, terms: Sequence[Part], model: Any, tokenizer: Any, o: Any, *, template: str = "{prompt}",
                 records: Sequence[dict] = (), scales: dict[str, dict] | None = None):
        """model: the reward model, or None. o: PPO's options, with reward_norm resolved. records: of
        prompts, for functions; of equal prompts the first counts. scales: `state()` of a checkpoint;
        without one, `measure` comes before `scores`."""
        self.terms, self.model = terms, model
        # The sum is clipped, not its parts.
        self.o = types.SimpleNamespace(reward_norm=o.reward_norm, reward_clip=0.0, end_penalty=0.0)
        known = {tuple(prompt_ids(tokenizer, r["prompt"], template)): {**r.get("extra", {}), "prompt": r["prompt"]}
                 for r in reversed(records)}
        self.own = {term.name: PythonReward(term.function, tokenizer, records=known, path=term.path)
                    if term.function else Length() for term in terms if term.head is None}
        self.scales = {name: ScoreScale(**scale) for name, scale in (scales or {}).items()}
        self.last: tuple = ((), {})  # the replies that were scored last, and their parts

    def measure(self, prompts: Sequence[list[int]], replies: Sequence[list[int]]) -> None:
        """Take mean and spread of the reward model's parts from these replies of the starting policy."""
        self.scales = {name: ScoreScale.of(raw, f"the reward model ({name})")
                       for name, raw in self.model_scores(prompts, replies).items()}

    def state(self) -> dict[str, dict]:
        """The scales, for a checkpoint."""
        return {name: scale.state() for name, scale in self.scales.items()}

    def model_scores(self, prompts: Sequence[list[int]],
                     replies: Sequence[list[int]]) -> dict[str, Tensor]:
        """Raw score (B,) of each part of the reward model, by its name."""
        terms = [term for term in self.terms if term.head is not None]
        if not any(term.head for term in terms):
            return {term.name: self.model.scores(prompts, replies) for term in terms}
        heads = getattr(self.model, "part_scores", lambda *_: {})(prompts, replies)
        if missing := [term.head for term in terms if term.head not in heads]:
            raise UserError(f"--reward model.{missing[0]}: the reward model has no such head; it has "
                            f"{', '.join(heads) or 'only one: write model'}")
        return {term.name: heads[term.head] for term in terms}

    def part_scores(self, prompts: Sequence[list[int]],
                    replies: Sequence[list[int]]) -> dict[str, Tensor]:
        """Each part (B,) float32, before its weight. A function is not asked twice in turn about the
        same replies."""
        if self.last[0] != (prompts, replies):
            parts = {name: self.scales[name].paid(raw, torch.ones_like(raw, dtype=torch.bool), self.o)
                     for name, raw in self.model_scores(prompts, replies).items()}
            parts |= {name: scorer.scores(prompts, replies) for name, scorer in self.own.items()}
            self.last = ((prompts, replies), {name: x.float().cpu() for name, x in parts.items()})
        return self.last[1]

    def scores(self, prompts: Sequence[list[int]], replies: Sequence[list[int]]) -> Tensor:
        """The sum (B,) float32."""
        parts = self.part_scores(prompts, replies)
        return sum(term.weight * parts[term.name] for term in self.terms)


def part_scores(scorer: Any, prompts: Sequence[list[int]],
                replies: Sequence[list[int]]) -> dict[str, Tensor]:
    """{"part_<name>": (B,)} of a scorer that has parts; {} for one that has none."""
    parts = scorer.part_scores(prompts, replies) if hasattr(scorer, "part_scores") else {}
    return {f"part_{name}": x.float() for name, x in parts.items()}


def reward_paid(ppo: dict[str, Any], data: Prepared, split: str, model: Any,
                tokenizer: Any) -> tuple["RewardSum | None", list[str]]:
    """(what a PPO checkpoint's policy was paid, where that is a sum of parts, what could not be
    loaded). ppo: its state, {} without one. A function that is not there any more costs columns of
    the report, not the report."""
    options = ppo.get("options", {})
    if not options.get("reward"):
        return None, []
    try:
        terms = read_reward(options["reward"])
    except UserError as error:
        return None, [f"no scores by --reward {options['reward']}: {error}"]
    return RewardSum(terms, model, tokenizer, types.SimpleNamespace(**options), template=data.template,
                     records=data.records("ppo", split), scales=ppo.get("scales")), []


def starting_scale(scorer: Any, model: Any, replies: tuple[Sequence[list[int]], Sequence[list[int]]],
                   ended: Tensor, o: Any) -> tuple[ScoreScale, tuple[float, float], float, float]:
    """(the scale of a scorer's scores, (mean, std) for `critic_from`, mean and spread of what is paid),
    on the starting policy's replies.

    scorer: the reward model (`model`, or None without one), a `RewardSum`, which takes its own scales
    here, or one of the user's. replies: prompts and replies as lists of ids. ended (B,): those with an
    end token. o: PPO's options, as `ScoreScale.paid` reads them. With that mean and std the critic starts
    at the mean and the spread of what is paid, penalties included. The critic copies the mean of the
    heads; where an ensemble pays less than that, it is the heads' mean that is brought to what is paid.
    """
    own = scale = ScoreScale.of(raw := model.scores(*replies)) if model is not None else ScoreScale()
    if isinstance(scorer, RewardSum):
        scorer.measure(*replies)
    if scorer is not model:
        raw, bare = scorer.scores(*replies), "sigmoid" in o.reward_norm or isinstance(scorer, RewardSum)
        scale = ScoreScale() if bare else ScoreScale.of(raw, "the scorer")
    paid = ScoreScale(scale.mean, scale.std).paid(raw.cpu(), ended, o)
    mean, spread = float(paid.mean()), float(paid.std(correction=0))
    own = own if model is None or model.config.ensemble == "mean" else ScoreScale.of(model.mean_scores(*replies))
    std = own.std / max(1e-6, spread)
    return scale, (own.mean - mean * std, std), mean, spread


# ---- what options mean for a reward --------------------------------------------------------------

def needs_model(o: Any, terms: Sequence[Part]) -> bool:
    """Whether a part of --reward, or all that is paid, is the reward model's; UserError for options that
    say nothing without it."""
    if not terms or any(term.head is not None for term in terms):
        return True
    o.refuse("reward_from", "reward_norm", why=f"with --reward {o.reward}, which has no part of a reward model")
    return False


def settled(o: Any, terms: Sequence[Part], data: Prepared) -> bool:
    """`needs_model`, in a run of all stages: UserError, before anything is trained, for a --reward_norm that
    does not fit the reward, or the feedback from which the reward model will learn."""
    needed = needs_model(o, terms)
    if needed and "reward_norm" in o.explicit and not o.reward_from and data.has("reward"):
        resolved(o, terms, feedback_kind(data.records("reward", "train")[0]))
    return needed


def resolved(o: Any, terms: Sequence[Part], feedback: str, room: int = 0) -> Any:
    """PPO's options with what `auto` means for this reward, and without a critic where none is used.

    feedback: the kind that the reward model learned from. room: the most tokens of a prompt.
    """
    reward_norm = chosen_reward_norm(o.reward_norm, feedback)
    if terms and reward_norm == "running":
        raise UserError("--reward_norm running is for a reward model alone, not for the parts of --reward: use fixed")
    control = o.kl_control
    if control == "auto":
        several = len(terms) > 1 and any(term.head is not None for term in terms)
        steers = (several or feedback not in ("label", "scores of any kind")) and "kl_coef" not in o.explicit
        control = "adaptive" if steers or {"kl_target", "kl_horizon"} & o.explicit else "fixed"
    # A preset's price and a data set's are fixed ones: where steering starts follows from the scores.
    fixed = [*type(o).PRESETS.values(), *(known.defaults.get("ppo", {}) for known in DATA_SETS.values())]
    if control == "adaptive" and "kl_coef" not in o.explicit and o.kl_coef in [x.get("kl_coef") for x in fixed]:
        o = o.replace(kl_coef=type(o).kl_coef)
    without = {} if o.advantage == "gae" else {"critic": "shared", "critic_warmup": 0, "value_coef": 0.0}
    if o.prompt_len > room > 0:
        raise UserError(f"--prompt_len {o.prompt_len}: beside replies of {o.reply_len} fit {room} tokens: lower it")
    return o.replace(reward_norm=reward_norm, kl_control=control, prompt_len=o.prompt_len or room, **without)
