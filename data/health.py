"""A policy's health, by its figures: those of a rollout, and bounds for PPO's warnings, for --keep best,
and for the report."""
import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from runtime.alarms import Alarm
from runtime.statistics import masked_mean, masked_variance

LENGTHS = (0.5, 2.0)  # shortest and longest replies, as multiples of the start's
VARIETY = 0.85  # the least distinct-2, as a share of the start's, or of SFT's
# Bounds of ratio_start and sampler_gap for four layers and temperature 1; see `gap_scale`.
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2, "int8": 5e-2}
HOPELESS = 5e-2  # a sampler_gap above this: the decoder's precision is given up
ALARMS = (
    Alarm("end_rate", lambda x, _: x == 0, "every reply is truncated: raise --reply_len or --end_penalty"),
    Alarm("eval_end_rate", lambda x, first: x < first - .1, "fewer replies end: raise --end_penalty"),
    Alarm("kl", lambda x, _: x > 20, "far from the reference: raise --kl_coef, or lower --policy_lr"),
    Alarm("kl_of_target", lambda x, _: not .5 < x < 1.5, "--kl_target is not held: change --kl_horizon, --kl_coef"),
    Alarm("entropy", lambda x, _: x < .1, "nothing is explored: raise --kl_coef or --entropy_coef"),
    Alarm("eval_distinct2", lambda x, first: x < VARIETY * first, "replies repeat: raise --kl_coef, lower --updates"),
    Alarm("value_loss", lambda x, first: x > 10 * first + 1, "the critic diverges: lower --critic_lr"))


def rollout_metrics(rollout: Any) -> dict[str, float]:
    """The figures of docs/metrics.md, over the whole of PPO's rollout."""
    mask = rollout.response_mask
    kl, k3 = rollout.kl("k1"), rollout.kl("k3")
    gap = torch.where(mask, rollout.sampled_logprobs - rollout.logprobs, 0).abs()
    error = rollout.values - rollout.returns
    spread = masked_variance(rollout.returns, mask).clamp(min=1e-8)
    metrics = {
        "score": rollout.scores.mean(), "raw_score": rollout.raw_scores.mean(),
        "objective": rollout.scores.mean() - rollout.kl_coef * kl.sum(1).mean(),
        "kl": kl.sum(1).mean(), "kl_k3": k3.sum(1).mean(),
        "kl_per_token": masked_mean(kl, mask), "entropy": masked_mean(rollout.entropy, mask),
        "length": mask.sum(1).float().mean(), "end_rate": rollout.ended.float().mean(),
        "ref_perplexity": torch.exp(-masked_mean(rollout.ref_logprobs, mask)),
        "sampler_gap": masked_mean(gap, mask), "sampler_gap_max": gap.max(),
        "explained_variance": 1 - masked_variance(error, mask) / spread, "value_bias": masked_mean(error, mask)}
    metrics |= {name: x.mean() for name, x in rollout.parts.items()}
    return {**{name: float(x) for name, x in metrics.items()}, "kl_coef": rollout.kl_coef,
            "reply_tokens": int(mask.sum())}


def ratio_start(log_ratios: list[Tensor], n_tokens: Tensor) -> dict[str, float]:
    """Mean and maximum of |log π/π_old| over the parts of a minibatch."""
    sizes = [x.abs() for x in log_ratios]
    return {"ratio_start": float(sum(x.sum() for x in sizes) / n_tokens),
            "ratio_start_max": float(max(x.max() for x in sizes))}


def as_logged(metrics: dict[str, float], o: Any, step: int) -> dict[str, float]:
    """The metrics of an update as PPO logs and watches them. o: its options. step: updates done before."""
    if o.kl_control == "adaptive" and step + 1 > max(.6 * o.updates, 10):  # before, it may still be on its way
        metrics = metrics | {"kl_of_target": metrics["kl"] / o.kl_target}
    if o.advantage == "gae":
        return metrics
    # without a critic, the head that stands for one learns nothing
    return {name: x for name, x in metrics.items() if "value" not in name and "explained" not in name}


def gap_scale(n_layer: int, temperature: float) -> float:
    """How much further apart two ways of computing may be than with four layers and temperature 1: the
    layers' rounding errors add up like steps of a random walk at most, and a low temperature magnifies
    those of logits. Measured in bfloat16 with the first 4, 8, 15 and all 30 layers of SmolLM2-135M: .021,
    .008, .026, .027; with all at temperature .7: .034.

    >>> round(gap_scale(36, 0.5), 3)
    6.0
    """
    return math.sqrt(max(n_layer, 4) / 4) / min(temperature, 1.0)


def warn_of_gaps(metrics: dict[str, float], run: Any, decoder_dtype: str, step: int) -> bool:
    """A line on stderr for each metric that says that what is scored is not what was sampled; whether the
    decoder is too far off to go on with. run: PPO's; decoder_dtype: of writing; step: updates done before."""
    scale = gap_scale(run.model.config.n_layer, run.o.temperature)
    for name, of in (("ratio_start", run.dtype), ("sampler_gap", decoder_dtype)):
        limit = scale * max(TOLERANCE[run.dtype], TOLERANCE[of])
        if metrics.get(name, 0) > limit:
            tqdm.write(f"ppo: warning: {name} is {metrics[name]:.1e}, above {limit:.2g}, at update {step + 1}: what "
                       "is scored is not what was sampled", file=sys.stderr)
    return metrics["sampler_gap"] > scale * HOPELESS


def warnings_of(policies: Sequence[dict], first: str, last: str) -> list[str]:
    """What the last policy lost against the first: variety, the ends of its replies, or their length."""
    before, after = (next(row for row in policies if row["name"] == name) for name in (first, last))
    near = f"a higher price of KL (--kl_coef) or fewer --updates keep it nearer to {first}"
    signs = (("distinct2", "distinct-2", VARIETY, "its replies repeat each other more"),
             ("end_rate", "ends", 0.90, "more of its replies are cut off"))
    lines = [f"{title} of {last} is {after[key]:.3f}, below {share:.0%} of {first}'s {before[key]:.3f}: {what}; {near}"
             for key, title, share, what in signs if after[key] < share * before[key]]
    if not LENGTHS[0] <= (times := after["length"] / before["length"]) <= LENGTHS[1]:
        lines.append(f"replies of {last} have {after['length']:.1f} tokens, {times:.2g} times {first}'s "
                     f"{before['length']:.1f}: a judge may like them for that alone; read some, and if they are too "
                     f"{'short' if times < 1 else 'long'}, {near}")
    return lines


def stage_warnings(whose: str, state: Mapping[str, Any]) -> list[str]:
    """What a stage warned of when it ended, as its checkpoint's state has it, for the report; of PPO also that
    a judge chose its weights."""
    chosen = ["the n-gram judge chose among its weights (--keep best): it is no independent judge of them"]
    judged = state.get("stage") == "ppo" and state.get("options", {}).get("keep") == "best"
    return [f"{whose}: {warning}" for warning in [*state.get("warnings", ()), *(chosen if judged else ())]]


def judge_warnings(opinions: Mapping[str, Mapping[str, str]], said: Sequence[str]) -> list[str]:
    """A warning for each judge whose agreement with people, "value [low, high]" by its measure, may be
    chance, unless a warning that was said names it already."""
    lines = []
    for name, of_judge in opinions.items():
        measure, text = next(iter(of_judge.items()))
        low = float(text.partition("[")[2].partition(",")[0])
        if low <= (0.0 if measure == "correlation" else 0.5) and not any(f"judge {name}:" in line for line in said):
            lines.append(f"the judge {name}: its {measure} with people's feedback, {text}, may be chance: its "
                         "preferences say nothing; bring more feedback")
    return lines
