"""Measures, with intervals: is the reward model right, is the policy better, or has it only found a
loophole?

    python evaluate.py out/reviews/sft out/reviews/ppo        the report's tables for any checkpoints

From small to large: what a set of replies looks like; a policy on held-out prompts; the reward
model on held-out labels; the report. The n-gram classifier of data/judge.py serves twice: fitted on
one half of the labels it is the reward model's baseline, on the other half the independent judge.
PPO and the reward model are never trained against the judge; its opinions reach metrics and reports
only.
"""
import runtime  # noqa: F401 (before torch: it sets how threads wait)
import dataclasses
import json
import math
import os
import pathlib
import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from data.batches import drop_long_prompts, make_rows, pad_left, prompt_ids, reward_rows, scatter_tokens
from data.judge import NgramClassifier, ngram_classifier, plain_text
from data.prepare import open_data
from data.prepared import Prepared
from data.records import prompt_text
from data.tokenizer import Tokenizer
from model import Transformer, checkpoint_path, load_checkpoint, token_logprobs
from reward import RewardModel
from runtime.device import pick_device, precision
from runtime.machine import replace_text
from runtime.options import Options, UserError, option, parse, run_main
from runtime.statistics import (accuracy, auc, calibration_error, interval, paired_auc_difference,
                                positive_share, win_rate)
from sample import reply_ids, reply_texts, reply_to


# ---- what replies look like ----------------------------------------------------------------------

def distinct_n(rows: Sequence[Sequence[int]], n: int = 2, budget: int | None = None) -> float:
    """Distinct n-grams over all n-grams, of the first `budget` ones (Li 2016). More text repeats
    more, so two systems are compared over equal numbers.

    >>> distinct_n([[1, 2, 1, 2], [1, 2]], 2)
    0.5
    """
    grams = [tuple(row[i:i + n]) for row in rows for i in range(len(row) - n + 1)][:budget]
    return len(set(grams)) / max(1, len(grams))


def reply_statistics(rows: Sequence[Sequence[int]], ended: Sequence[bool],
                     short: int = 8) -> dict[str, float]:
    """Mean length in tokens, share with end token, share that occur more than once, share under 8
    tokens."""
    if not len(rows):
        raise UserError("nothing to measure: there are no replies")
    rows = [tuple(row) for row in rows]
    count = Counter(rows)
    return {"length": float(np.mean([len(row) for row in rows])), "end_rate": float(np.mean(ended)),
            "identical": float(np.mean([count[row] > 1 for row in rows])),
            "short": float(np.mean([len(row) < short for row in rows]))}


def text_plot(values: Sequence[float], title: str, width: int = 60, height: int = 6) -> str:
    """A curve in characters, for terminals."""
    values = np.asarray(values, float)
    if not len(values):
        return f"{title}: no values"
    columns = np.interp(np.linspace(0, len(values) - 1, min(width, max(2, len(values)))),
                        np.arange(len(values)), values)
    low, high = float(columns.min()), float(columns.max())
    level = np.round((columns - low) / ((high - low) or 1) * (height - 1)).astype(int)
    lines = ["".join("•" if at == row else " " for at in level) for row in reversed(range(height))]
    axis = {0: f"{high:8.3g}", height - 1: f"{low:8.3g}"}
    return "\n".join([title, *(f"{axis.get(i, ''):8} |{line}" for i, line in enumerate(lines))])


def table(rows: Sequence[dict], columns: dict[str, str]) -> str:
    """A Markdown table: columns maps a key to its title; numbers to three digits, what is missing
    is a dash."""
    def cell(x: Any) -> str:
        if not isinstance(x, float):
            return "–" if x is None else str(x)
        return f"{x:.3f}" if abs(x) < 10 else f"{x:.1f}"

    lines = [list(columns.values()), ["---"] * len(columns),
             *([cell(r.get(k)) for k in columns] for r in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


# ---- a policy on held-out prompts ----------------------------------------------------------------

@dataclasses.dataclass(frozen=True)
class ReplySettings:
    """How replies are drawn and scored when policies are compared."""

    reply_len: int = 64
    temperature: float = 1.0
    seed: int = 12345  # the same random numbers for every policy
    dtype: str = "float32"
    rows_at_once: int = 128


@torch.no_grad()
def reply_logprobs(model: Transformer, ids: Sequence[list[int]], replies: Any,
                   settings: ReplySettings) -> torch.Tensor:
    """log π(token) (B, R) float32 of each reply token under the model; 0 beyond a reply's end."""
    device, size, parts = model.embedding.weight.device, settings.rows_at_once, []
    for i in range(0, len(ids), size):
        mask = replies.mask[i:i + size]
        prompt, prompt_mask = (t.to(device) for t in pad_left(ids[i:i + size], 0))
        rows = make_rows(torch.cat((prompt, replies.tokens[i:i + size]), 1),
                         torch.cat((prompt_mask, mask), 1),
                         torch.cat((torch.zeros_like(prompt_mask), mask), 1))
        with precision(settings.dtype, device.type):
            hidden = model.hidden(rows.tokens, where=rows.before)
            parts.append(scatter_tokens(token_logprobs(model, hidden, rows.targets,
                                                       settings.temperature)[0], mask))
    return torch.cat(parts)


def measure_policy(policy: Transformer, reference: Transformer, tokenizer: Tokenizer,
                   prompts: Sequence,
                   template: str, *, reward_model: Any = None, judge: NgramClassifier | None = None,
                   settings: ReplySettings = ReplySettings()) -> tuple[dict[str, float], list[dict],
                                                                       list[list[int]]]:
    """Let the policy reply once to each prompt, and measure the replies.

    reward_model: any scorer. Returns (metrics, one record per reply, the replies' ids). KL in nats
    per reply, estimated on the sampled tokens (k1); ref_perplexity is the reference's, per token.
    """
    if not prompts:
        raise UserError("nothing to evaluate: the list of held-out prompts is empty")
    ids = [prompt_ids(tokenizer, prompt, template) for prompt in prompts]
    replies = reply_to(policy, tokenizer, ids, settings.reply_len, temperature=settings.temperature,
                       seed=settings.seed, batch_size=settings.rows_at_once)
    logprobs, ref_logprobs = (reply_logprobs(model, ids, replies, settings)
                              for model in (policy, reference))
    kl, rows = (logprobs - ref_logprobs).sum(1), reply_ids(replies)
    scores = None
    if reward_model is not None:
        with torch.no_grad(), precision(settings.dtype, policy.embedding.weight.device.type):
            scores = reward_model.scores(ids, rows)
    metrics = {"kl": float(kl.mean()),
               "ref_perplexity": math.exp(-float(ref_logprobs.sum()) / int(replies.mask.sum()))}
    records = [{"prompt": prompt, "reply": text, "tokens": len(row),
                "ended": row[-1:] == [tokenizer.eom_id],
                "kl": round(float(nats), 2)}
               for prompt, text, row, nats in zip(prompts, reply_texts(tokenizer, replies), rows,
                                                  kl, strict=True)]
    described, records = describe(records, rows, judge, scores)
    return {**metrics, **described}, records, rows


def describe(records: list[dict], rows: list[list[int]], judge: NgramClassifier | None,
             scores: torch.Tensor | None = None) -> tuple[dict[str, float], list[dict]]:
    """(length, ends, diversity and what judge and reward model say; the records with these
    opinions)."""
    metrics = reply_statistics(rows, [record["ended"] for record in records])
    metrics["distinct2"] = distinct_n(rows, 2, budget=1000)
    opinions: list[dict[str, float]] = [{} for _ in records]
    if judge is not None:
        probs, judged = judged_by(judge, [r["prompt"] for r in records],
                                  [r["reply"] for r in records])
        metrics |= judged
        opinions = [{"judge": round(float(p), 6)} for p in probs]
    if scores is not None:
        metrics["raw_score"] = float(scores.mean())
        opinions = [o | {"raw_score": round(float(score), 3)} for o,
                    score in zip(opinions, scores, strict=True)]
    return metrics, [record | opinion for record, opinion in zip(records, opinions, strict=True)]


def judged_by(judge: NgramClassifier, prompts: Sequence, texts: Sequence[str]) -> tuple[np.ndarray,
                                                                                        dict[str,
                                                                                             float]]:
    """(P(liked) of each prompt with its reply, their mean and the share above one half)."""
    probs = np.asarray(judge.probs([plain_text({"prompt": prompt, "response": text})
                                    for prompt, text in zip(prompts, texts, strict=True)]))
    return probs, {"judge": float(probs.mean()), "judged_positive": positive_share(probs)}


class HeldOutPrompts:
    """The same held-out prompts and random numbers each time a policy is measured while it trains.
    """

    NAMES = ("raw_score", "judge", "judged_positive", "kl", "length", "end_rate", "distinct2",
             "ref_perplexity")

    def __init__(self, data: Prepared, tokenizer: Tokenizer, prompts: Sequence,
                 reference: Transformer, reward_model: Any, settings: ReplySettings):
        self.tokenizer, self.template, self.prompts = tokenizer, data.template, prompts
        self.reference, self.reward_model, self.settings = reference, reward_model, settings
        self.judge = ngram_classifier(data, "judge") if data.has("judge") else None

    def measure(self, policy: Transformer) -> tuple[dict[str, float], list[dict]]:
        """(metrics whose names begin with eval_, one record per reply)."""
        metrics, records, _ = measure_policy(
            policy, self.reference, self.tokenizer, self.prompts, self.template,
            reward_model=self.reward_model, judge=self.judge, settings=self.settings)
        return {f"eval_{name}": metrics[name] for name in self.NAMES if name in metrics}, records

    def opinion(self, prompts: Sequence, texts: Sequence[str]) -> dict[str, float]:
        """What the independent judge says of other replies; {} without a judge."""
        return judged_by(self.judge, prompts, texts)[1] if self.judge is not None else {}


# ---- the tables ----------------------------------------------------------------------------------

COLUMNS = {"name": "", "replies": "replies", "judged": "judged positive", "raw_score": "raw score",
           "kl_interval": "KL, nats/reply", "distinct2": "distinct-2", "length": "length, tokens",
           "end_rate": "ends",
           "identical": "identical", "short": "under 8 tokens",
           "ref_perplexity": "reference perplexity"}
REWARD_COLUMNS = {"name": "", "auc": "AUC", "accuracy": "accuracy",
                  "calibration": "calibration error",
                  "half": "AUC on first halves"}


def people_wrote(data: Prepared, tokenizer: Tokenizer, reply_len: int,
                 split: str = "test") -> list[tuple[str, list[dict], list[list[int]]]]:
    """Liked and disliked texts by people as (name, records, rows): those that fit the reply length
    and whose openings are among the policies' held-out ones."""
    lines, openings = [], {record["prompt"] for record in data.records("ppo", split)}
    for name, label in (("real liked reviews", 1), ("real disliked reviews", 0)):
        records = [r for r in data.records("reward", split) if r.get("label") == label
                   and r["prompt"] in openings]
        rows = [[*tokenizer.encode(r["response"]), tokenizer.eom_id] for r in records]
        fits = [(r, row) for r, row in zip(records, rows, strict=True) if len(row) <= reply_len]
        if fits:
            lines.append((name, [{"prompt": r["prompt"], "reply": r["response"], "ended": True}
                                 for r, _ in fits], [row for _, row in fits]))
    return lines


def policy_table(policies: dict[str, Transformer], reference: Transformer, tokenizer: Tokenizer,
                 data: Prepared, *,
                 reward_model: RewardModel | None, n_prompts: int = 500, split: str = "test",
                 settings: ReplySettings = ReplySettings()) -> tuple[list[dict],
                                                                     dict[str, list[dict]]]:
    """(the table's rows, every policy's replies): the same held-out openings and random numbers for
    each policy, and distinct-2 over the same number of bigrams."""
    limits = [m.config.max_len for m in (*policies.values(), reference, reward_model)
              if m is not None]
    held_out = drop_long_prompts(data.records("ppo", split), tokenizer, data.template,
                                 min(limits) - settings.reply_len)
    prompts = [r["prompt"] for r in held_out][:n_prompts]
    judge = ngram_classifier(data, "judge") if data.has("judge") else None
    lines, replies, tokens = [], {}, []
    for name, policy in policies.items():
        metrics, records, rows = measure_policy(policy, reference, tokenizer, prompts,
                                                data.template,
                                                reward_model=reward_model, judge=judge,
                                                settings=settings)
        metrics["kl_interval"] = interval(lambda kl: float(kl.mean()), [r["kl"] for r in records])
        lines.append({"name": name, "replies": len(records), **metrics})
        replies[name] = records
        tokens.append(rows)
    opinions = list(replies.values())
    if judge is not None:
        for name, records, rows in people_wrote(data, tokenizer, settings.reply_len, split):
            metrics, records = describe(records, rows, judge)
            lines.append({"name": name, "replies": len(records), **metrics})
            opinions.append(records)
            tokens.append(rows)
        for line, records in zip(lines, opinions, strict=True):
            line["judged"] = interval(positive_share, [r["judge"] for r in records])
    budget = min(sum(max(0, len(row) - 1) for row in rows) for rows in tokens)
    for line, rows in zip(lines, tokens, strict=True):
        line["distinct2"], line["bigrams"] = distinct_n(rows, 2, budget), budget
    return lines, replies


def load_reward_model(path: str | os.PathLike, device: str,
                      tokenizer: Tokenizer) -> tuple[RewardModel, int]:
    """(model, the longest row it was trained on); UserError unless it reads the tokenizer's ids."""
    model, own_tokenizer, state = load_checkpoint(path, device, RewardModel)
    tokenizer.require_same(own_tokenizer, f"the policy and {path}")
    return model, min(state["options"]["max_len"], model.config.max_len)


def score_reward_model(model: RewardModel, data: Prepared, split: str, tokenizer: Tokenizer,
                       max_len: int) -> dict[str, list]:
    """Labels, and the raw scores of reward model and n-gram baseline, for whole texts and replies'
    first halves.

    Of first halves both read the same text, half of the reply's tokens. Of a whole text the model
    reads max_len tokens at most, the baseline everything.
    """
    records, baseline = data.records("reward", split), ngram_classifier(data, "reward")
    records = drop_long_prompts(records, tokenizer, data.template, max_len - 8)
    full, half = (reward_rows(records, tokenizer, data.template, max_len, half=half)
                  for half in (False, True))
    half_replies = [tokenizer.decode(i for i, of_reply in zip(*row, strict=True) if of_reply)
                    for row in half]
    half_texts = [plain_text(r | {"response": text}) for r,
                  text in zip(records, half_replies, strict=True)]
    return {"labels": [r["label"] for r in records],
            "scores": model.score_rows(full).tolist(), "half_scores": model.score_rows(half).tolist(),
            "baseline": baseline.logits([plain_text(r) for r in records]).tolist(),
            "half_baseline": baseline.logits(half_texts).tolist()}


def reward_table(scores: dict[str, list]) -> list[dict]:
    """The reward model and the n-gram baseline on the same texts, each figure with its 95 %
    interval."""
    labels, rows = scores["labels"], []
    for name, key, half in (("reward model", "scores", "half_scores"),
                            ("n-gram regression, same labels", "baseline", "half_baseline")):
        probs = 1 / (1 + np.exp(-np.array(scores[key])))
        rows.append({"name": name, "auc": interval(auc, scores[key], labels),
                     "accuracy": interval(accuracy, probs, labels),
                     "calibration": interval(calibration_error, probs, labels, basic=True),
                     "half": interval(auc, scores[half], labels)})
    value, low, high = paired_auc_difference([scores["scores"]], scores["baseline"], labels)
    return [*rows, {"name": "difference (paired)", "auc": f"{value:+.3f} [{low:+.3f}, {high:+.3f}]"}]


# ---- the report ----------------------------------------------------------------------------------

def write_report(data: Prepared, root: pathlib.Path, *, seed: int, settings: ReplySettings,
                 n_prompts: int = 500, device: str = "cpu", seconds: float = 0.0) -> None:
    """Measure the run in `root` on test openings; write report.json and report.md, and print the
    latter."""
    report, scores = build_report(data, root, seed, settings, n_prompts, device)
    # also after a resume
    report["seconds"]["all"] = round(max(seconds, sum(report["seconds"].values())), 1)
    text = render_report(report, root.name, settings)
    if scores is not None:
        replace_text(root / "reward_test_scores.json", json.dumps(scores))
    replace_text(root / "report.json", json.dumps(report, indent=1, ensure_ascii=False))
    replace_text(root / "report.md", text + "\n")
    print("\n" + text)
    lines = [json.loads(line) for line in (root / "ppo" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    for key, title in (("score", "reward per reply, by update"),
                       ("kl", "KL in nats per reply, by update")):
        print("\n" + text_plot([line[key] for line in lines if key in line], title))
    print(f"\nwritten: {root / 'report.md'}; curves: python -m tools.plot {root}; try it: python "
          f"sample.py --from {root / 'ppo'} --prompt …")


def build_report(data: Prepared, root: pathlib.Path, seed: int, settings: ReplySettings,
                 n_prompts: int, device: str) -> tuple[dict[str, Any], dict[str, list] | None]:
    """(the report, the reward model's test scores or None): the policy before and after PPO, the
    reward model on test labels, ten pairs of replies drawn by the seed, and the seconds of each
    stage."""
    policy, tokenizer, _ = load_checkpoint(root / "ppo", device)
    options = json.loads((root / "ppo" / "config.json").read_text(encoding="utf-8"))["options"]
    reference, _, _ = load_checkpoint(options["init_from"] or root / "sft", device)
    reward_model, max_len = load_reward_model(options["reward_from"] or root / "reward", device,
                                              tokenizer)
    policies, replies = policy_table({"SFT": reference, "PPO": policy}, reference, tokenizer, data,
                                     reward_model=reward_model, n_prompts=n_prompts,
                                     settings=settings)
    report: dict[str, Any] = {"seconds": {}, "policies": policies, "seed": seed}
    scores = None
    if data.has_labels("reward"):
        scores = score_reward_model(reward_model, data, "test", tokenizer, max_len)
        report["reward"], report["reward_texts"] = reward_table(scores), len(scores["labels"])
    if data.has("judge"):
        records = data.records("reward", "test")
        probs = ngram_classifier(data, "judge").probs([plain_text(r) for r in records])
        labels = [r["label"] for r in records]
        report["judge"] = {"auc": interval(auc, probs, labels),
                           "accuracy": interval(accuracy, probs, labels)}
    before, after = replies["SFT"], replies["PPO"]
    if "judge" in after[0]:
        report["win_rate"] = win_rate([r["judge"] for r in after], [r["judge"] for r in before])
    drawn = np.random.default_rng([seed, 77]).permutation(len(before))[:10]
    report["pairs"] = [dict(prompt=prompt_text(before[i]["prompt"]), before=before[i],
                            after=after[i]) for i in drawn]
    for stage in ("pretrain", "sft", "reward", "ppo"):
        if (path := root / stage / "config.json").exists():
            report["seconds"][stage] = json.loads(path.read_text(encoding="utf-8"))["seconds"]
    return report, scores


def render_report(report: dict[str, Any], name: str, settings: ReplySettings) -> str:
    """The report as Markdown."""
    rows = report["policies"]
    parts = [f"# {name}, seed {report['seed']}",
             f"One reply of up to {settings.reply_len} tokens to each of {rows[0]['replies']} "
             f"held-out openings, at temperature {settings.temperature:g}, beside what people "
             f"wrote; distinct-2 over {rows[0]['bigrams']} bigrams each.", table(rows, COLUMNS)]
    if "reward" in report:
        parts += [f"## Reward model on {report['reward_texts']} test texts",
                  table(report["reward"], REWARD_COLUMNS)]
    if "judge" in report:
        parts += [f"The judge itself, on these texts: AUC {report['judge']['auc']}, accuracy "
                  f"{report['judge']['accuracy']}."]
    if "win_rate" in report:
        value, low, high = report["win_rate"]
        parts += [f"The judge prefers the reply after PPO on {value:.1%} of the openings "
                  f"[{low:.1%}, {high:.1%}]."]
    parts += ["## Before and after", *(f"**{p['prompt']}**\n- SFT: {p['before']['reply']}\n- PPO: "
                                       f"{p['after']['reply']}"
                                       for p in report["pairs"])]
    parts += ["## Seconds", ", ".join(f"{stage} {s:.0f}" for stage, s in report["seconds"].items())]
    return "\n\n".join(parts)


def print_validation_table(model: RewardModel, data: Prepared, tokenizer: Tokenizer,
                           max_len: int) -> None:
    """The reward model beside its baseline on validation; the test texts are scored once, by the
    report."""
    print(table(reward_table(score_reward_model(model, data, "val", tokenizer, max_len)),
                REWARD_COLUMNS), flush=True)


# ---- command line --------------------------------------------------------------------------------

@dataclasses.dataclass
class EvaluateOptions(Options):
    """`python evaluate.py DIR…`"""

    # What to measure.
    reference: str = option("", "checkpoint that KL and perplexity refer to; empty: the folder sft "
                                "beside the first")
    reward_from: str = option("", "reward model; empty: the folder reward beside the first, if "
                                  "there is one")
    data: str = option("", "data set of the openings; empty: the checkpoint's")
    source: str = option("", "folder or archive with the data set's raw files; empty: download "
                             "them")
    split: str = option("val", "split of the openings; look at test once, at the end",
                        choices=("val", "test"))
    prompts: int = option(500, "number of openings", low=1)
    # How to draw.
    reply_len: int = option(0, "longest reply in tokens; 0: as in the PPO run among the folders, "
                               "else 64", low=0)
    temperature: float = option(0.0, "sampling temperature; 0: as in the PPO run among the "
                                     "folders, else 1", low=0)
    seed: int = option(12345, "seed of the random numbers", low=0)
    # The machine.
    device: str = option("auto", "device to compute on", choices=("auto", "cpu", "cuda", "mps"))
    traceback: bool = option(False, "show where in the code an error arose")


def main(argv: list[str]) -> None:
    n = next((i for i, word in enumerate(argv) if word.startswith("-")), len(argv))
    folders, o = [pathlib.Path(f) for f in argv[:n]], parse(EvaluateOptions, argv[n:],
                                                            "evaluate.py DIR…")
    if not folders:
        raise UserError("which checkpoints? python evaluate.py out/reviews/sft out/reviews/ppo")
    device = pick_device(o.device)
    beside = checkpoint_path(folders[0]).parent.parent
    # Load the policies, the reference, and the reward model beside them.
    names = [*folders, o.reference or beside / "sft"]
    *loaded, (reference, tokenizer, state) = (load_checkpoint(folder, device) for folder in names)
    for name, (_, other, _) in zip(folders, loaded, strict=True):
        tokenizer.require_same(other, f"{names[-1]} and {name}")
    where = pathlib.Path(o.reward_from or beside / "reward")
    has_reward = o.reward_from or checkpoint_path(where).exists()
    reward_model, max_len = load_reward_model(where, device, tokenizer) if has_reward else (None, 0)
    # Open the data set that they were trained on, with their own prompt template.
    trained = state["options"]
    data = open_data(o.data or trained["data"], source=o.source or trained["source"] or None,
                     vocab_size=trained["vocab_size"], limit=trained["limit"])
    data = dataclasses.replace(data, meta=data.meta | {"template": state["template"]})
    # Measure as the PPO run among the folders sampled.
    ppo = {k: v for _, _, s in loaded if s["stage"] == "ppo" for k, v in s["options"].items()}
    settings = ReplySettings(reply_len=o.reply_len or ppo.get("reply_len", 64), seed=o.seed,
                             temperature=o.temperature or ppo.get("temperature", 1.0))
    policies = {str(folder): model for folder, (model, _, _) in zip(folders, loaded, strict=True)}
    lines, _ = policy_table(policies, reference, tokenizer, data, reward_model=reward_model,
                            n_prompts=o.prompts, split=o.split, settings=settings)
    print(table(lines, COLUMNS))
    if reward_model is not None and data.has_labels("reward"):
        scores = score_reward_model(reward_model, data, o.split, tokenizer, max_len)
        print("\n" + table(reward_table(scores), REWARD_COLUMNS))


if __name__ == "__main__":
    sys.exit(run_main(main, sys.argv[1:]))
