"""Measures, with intervals: is the reward model right, is the policy better, or has it only found a loophole?

    python evaluate.py out/reviews/sft out/reviews/ppo        the report's table for any checkpoints

From small to large: how well scores agree with labels; intervals by bootstrap; what a set of replies looks like; the
report. The plain n-gram classifier of ngrams.py serves twice: on one half of the labels as the reward model's baseline,
on the other half as independent judge. The judge is never trained against: nothing in ppo.py or reward.py knows it.
"""
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

from data.batches import fitting, judged_rows, make_rows, pad_left, prompt_ids, spread
from data.judge import NgramClassifier, ngram_classifier, plain_text
from data.prepare import open_data
from data.prepared import Prepared
from data.records import prompt_text
from data.tokenizer import Tokenizer
from model import Transformer, checkpoint_path, load_checkpoint, score_tokens
from reward import RewardModel
from runtime.device import pick_device, precision
from runtime.machine import replace_text
from runtime.options import UserError, option, parse, run_main
from runtime.statistics import (_not_empty, accuracy, auc, calibration_error, interval,
                                paired_auc_difference, positive_share, win_rate)
from sample import reply_texts, reply_to

# ---- agreement of scores and labels ----------------------------------------------------------------------------------


# ---- what replies look like ------------------------------------------------------------------------------------------

def distinct_n(rows: Sequence[Sequence[int]], n: int = 2, budget: int | None = None) -> float:
    """Distinct n-grams over all n-grams (Li 2016), of the first `budget` ones: the more one counts, the more repeat, so
    two systems are compared over equal numbers.

    >>> distinct_n([[1, 2, 1, 2], [1, 2]], 2)
    0.5
    """
    grams = [tuple(row[i:i + n]) for row in rows for i in range(len(row) - n + 1)][:budget]
    return len(set(grams)) / max(1, len(grams))


def reply_statistics(rows: Sequence[Sequence[int]], ended: Sequence[bool], short: int = 8) -> dict[str, float]:
    """Mean length in tokens, share with end token, share that stands more than once, share under 8 tokens."""
    rows, ended = [tuple(r) for r in rows], _not_empty(ended)[0]
    seen = Counter(rows)
    return {"length": float(np.mean([len(r) for r in rows])), "end_rate": float(ended.mean()),
            "identical": float(np.mean([seen[r] > 1 for r in rows])),
            "short": float(np.mean([len(r) < short for r in rows]))}


def best_of_n_kl(n: int) -> float:
    """Upper bound, in nats, of the KL between best-of-n and the policy it draws from: ln n − (n − 1)/n.

    >>> [round(best_of_n_kl(n), 3) for n in (4, 16, 64, 256)]
    [0.636, 1.835, 3.175, 4.549]
    """
    return math.log(n) - (n - 1) / n


def text_plot(values: Sequence[float], title: str, width: int = 60, height: int = 6) -> str:
    """A curve in characters, for terminals."""
    values = np.asarray(values, float)
    if not len(values):
        return f"{title}: no values"
    columns = np.interp(np.linspace(0, len(values) - 1, min(width, max(2, len(values)))), np.arange(len(values)),
                        values)
    low, high = float(columns.min()), float(columns.max())
    level = np.round((columns - low) / ((high - low) or 1) * (height - 1)).astype(int)
    lines = ["".join("•" if at == row else " " for at in level) for row in reversed(range(height))]
    axis = {0: f"{high:8.3g}", height - 1: f"{low:8.3g}"}
    return "\n".join([title, *(f"{axis.get(i, ''):8} |{line}" for i, line in enumerate(lines))])


def table(rows: Sequence[dict], columns: dict[str, str]) -> str:
    """A Markdown table: columns maps a key to its title; numbers to three digits, what is missing is a dash."""
    def cell(x: Any) -> str:
        if not isinstance(x, float):
            return "–" if x is None else str(x)
        return f"{x:.3f}" if abs(x) < 10 else f"{x:.1f}"

    lines = [list(columns.values()), ["---"] * len(columns), *([cell(r.get(k)) for k in columns] for r in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


# ---- judging policies ------------------------------------------------------------------------------------------------

@torch.no_grad()
def measure_policy(policy: Transformer, reference: Transformer, tokenizer: Tokenizer, prompts: Sequence, template: str,
                   *, reward_model: RewardModel | None = None, judge: NgramClassifier | None = None,
                   reply_len: int = 64, temperature: float = 1.0, seed: int = 12345, dtype: str = "float32",
                   batch_size: int = 128) -> tuple[dict[str, float], list[dict], list[list[int]]]:
    """Let the policy reply once to each prompt, with the same random numbers for every policy, and measure the replies.

    Returns (metrics, one record per reply, the replies' ids). KL in nats per reply, estimated on the sampled tokens
    (k1); ref_perplexity is the reference's, per token.
    """
    if not prompts:
        raise UserError("nothing to evaluate: the list of held-out prompts is empty")
    device = policy.embedding.weight.device
    ids = [prompt_ids(tokenizer, p, template) for p in prompts]
    replies = reply_to(policy, tokenizer, ids, reply_len, temperature=temperature, seed=seed, batch_size=batch_size)
    kl, ref_logprob, scores = [], [], []
    for i in range(0, len(ids), batch_size):
        mask = replies.mask[i:i + batch_size]
        prompt, prompt_mask = (t.to(device) for t in pad_left(ids[i:i + batch_size], 0))
        rows = make_rows(torch.cat((prompt, replies.tokens[i:i + batch_size]), 1), torch.cat((prompt_mask, mask), 1),
                         torch.cat((torch.zeros_like(prompt_mask), mask), 1))
        with precision(dtype, device.type):
            logprobs, ref_logprobs = (spread(score_tokens(m, m.hidden(rows.tokens, where=rows.before), rows.targets,
                                                          temperature)[0], mask)
                                      for m in (policy, reference))
            if reward_model is not None:
                scores.append(reward_model(rows.tokens, rows.real, rows.reply).float())
        kl.append((logprobs - ref_logprobs).sum(1))
        ref_logprob.append(ref_logprobs.sum())
    texts = reply_texts(tokenizer, replies.tokens, replies.mask)
    tokens = [t[m].tolist() for t, m in zip(replies.tokens, replies.mask, strict=True)]
    ended = [bool(row and row[-1] == tokenizer.eom_id) for row in tokens]
    metrics = {"kl": float(torch.cat(kl).mean()),
               "ref_perplexity": math.exp(-float(sum(ref_logprob)) / int(replies.mask.sum()))}
    records = [{"prompt": p, "reply": t, "tokens": len(r), "ended": e, "kl": round(float(k), 2)}
               for p, t, r, e, k in zip(prompts, texts, tokens, ended, torch.cat(kl), strict=True)]
    return {**metrics, **describe(records, tokens, judge, torch.cat(scores) if scores else None)}, records, tokens


def describe(records: list[dict], rows: list[list[int]], judge: NgramClassifier | None,
             scores: torch.Tensor | None = None) -> dict[str, float]:
    """Length, ends, diversity, and what judge and reward model say; their opinions are added to the records."""
    metrics = reply_statistics(rows, [r["ended"] for r in records]) | {"distinct2": distinct_n(rows, 2, budget=1000)}
    if judge is not None:
        probs = np.asarray(judge.probs([plain_text({"prompt": r["prompt"], "response": r["reply"]}) for r in records]))
        metrics |= {"judge": float(probs.mean()), "judged_positive": positive_share(probs)}
    if scores is not None:
        metrics["raw_score"] = float(scores.mean())
    for i, record in enumerate(records):
        record |= {} if judge is None else {"judge": round(float(probs[i]), 6)}
        record |= {} if scores is None else {"raw_score": round(float(scores[i]), 3)}
    return metrics


# ---- the report ------------------------------------------------------------------------------------------------------

COLUMNS = {"name": "", "replies": "replies", "judged": "judged positive", "raw_score": "raw score",
           "kl_interval": "KL, nats/reply", "distinct2": "distinct-2", "length": "length, tokens", "end_rate": "ends",
           "identical": "identical", "short": "under 8 tokens", "ref_perplexity": "reference perplexity"}
REWARD_COLUMNS = {"name": "", "auc": "AUC", "accuracy": "accuracy", "calibration": "calibration error",
                  "half": "AUC on first halves"}


def reference_lines(data: Prepared, tokenizer: Tokenizer, reply_len: int,
                    split: str = "test") -> list[tuple[str, list, list]]:
    """What people wrote: liked and disliked reviews that fit the reply length, and whose openings are among those held
    out for policies, as (name, records, rows)."""
    lines, openings = [], {r["prompt"] for r in data.records("ppo", split)}
    for name, label in (("real liked reviews", 1), ("real disliked reviews", 0)):
        real = [r for r in data.records("reward", split) if r.get("label") == label and r["prompt"] in openings]
        rows = [[*tokenizer.encode(r["response"]), tokenizer.eom_id] for r in real]
        kept = [(r, row) for r, row in zip(real, rows, strict=True) if len(row) <= reply_len]
        if kept:
            lines.append((name, [{"prompt": r["prompt"], "reply": r["response"], "ended": True} for r, _ in kept],
                          [row for _, row in kept]))
    return lines


def policy_table(policies: dict[str, Transformer], reference: Transformer, tokenizer: Tokenizer, data: Prepared, *,
                 reward_model: RewardModel | None, n_prompts: int = 500, reply_len: int = 64, temperature: float = 1.0,
                 split: str = "test", dtype: str = "float32",
                 seed: int = 12345) -> tuple[list[dict], dict[str, list[dict]]]:
    """The rows of the report's table, and every policy's replies: the same held-out openings and random numbers for
    each, and distinct-2 over the same number of bigrams."""
    room = min(m.config.max_len for m in (*policies.values(), reference, reward_model) if m is not None) - reply_len
    prompts = [r["prompt"] for r in fitting(data.records("ppo", split), tokenizer, data.template, room)][:n_prompts]
    judge = ngram_classifier(data, "judge") if data.has("judge") else None
    table_rows, replies, tokens = [], {}, []
    for name, policy in policies.items():
        found, records, rows = measure_policy(policy, reference, tokenizer, prompts, data.template,
                                              reward_model=reward_model, judge=judge, reply_len=reply_len,
                                              temperature=temperature, dtype=dtype, seed=seed)
        found["kl_interval"] = interval(lambda kl: float(kl.mean()), [r["kl"] for r in records])
        table_rows.append({"name": name, "replies": len(records), **found})
        replies[name] = records
        tokens.append(rows)
    if judge is not None:
        real = reference_lines(data, tokenizer, reply_len, split)
        for name, records, rows in real:
            table_rows.append({"name": name, "replies": len(records), **describe(records, rows, judge)})
            tokens.append(rows)
        for line, records in zip(table_rows, [*replies.values(), *(r for _, r, _ in real)], strict=True):
            line["judged"] = interval(positive_share, [r["judge"] for r in records])
    budget = min(sum(max(0, len(row) - 1) for row in rows) for rows in tokens)
    for line, rows in zip(table_rows, tokens, strict=True):
        line["distinct2"], line["bigrams"] = distinct_n(rows, 2, budget), budget
    return table_rows, replies


def load_reward_model(path: str | os.PathLike, device: str, tokenizer: Tokenizer) -> tuple[RewardModel, int]:
    """The model, and the longest row it was trained on; it must read the tokenizer's ids."""
    model, own_tokenizer, state = load_checkpoint(path, device, RewardModel)
    tokenizer.require_same(own_tokenizer, f"the policy and {path}")
    return model, min(state["options"]["max_len"], model.config.max_len)


def score_reward_model(model: RewardModel, data: Prepared, split: str, tokenizer: Tokenizer,
                       max_len: int) -> dict[str, list]:
    """Labels, and the raw scores of reward model and n-gram baseline, for whole texts and replies' first halves.

    Of first halves both read the same text, half of the reply's tokens. Of a whole text the model reads max_len tokens
    at most, the baseline everything.
    """
    records, baseline = data.records("reward", split), ngram_classifier(data, "reward")
    records = fitting(records, tokenizer, data.template, max_len - 8)
    whole, half = (judged_rows(records, tokenizer, data.template, max_len, half=half) for half in (False, True))
    half_replies = [tokenizer.decode(i for i, of_reply in zip(*row, strict=True) if of_reply) for row in half]
    half_texts = [plain_text(r | {"response": text}) for r, text in zip(records, half_replies, strict=True)]
    return {"labels": [r["label"] for r in records],
            "scores": model.score_rows(whole).tolist(), "half_scores": model.score_rows(half).tolist(),
            "baseline": baseline.logits([plain_text(r) for r in records]).tolist(),
            "half_baseline": baseline.logits(half_texts).tolist()}


def reward_table(scores: dict[str, list]) -> list[dict]:
    """The reward model and the n-gram baseline on the same texts, each figure with its 95 % interval."""
    y, rows = scores["labels"], []
    for name, key, half in (("reward model", "scores", "half_scores"),
                            ("n-gram regression, same labels", "baseline", "half_baseline")):
        probs = 1 / (1 + np.exp(-np.array(scores[key])))
        rows.append({"name": name, "auc": interval(auc, scores[key], y), "accuracy": interval(accuracy, probs, y),
                     "calibration": interval(calibration_error, probs, y, basic=True),
                     "half": interval(auc, scores[half], y)})
    value, low, high = paired_auc_difference([scores["scores"]], scores["baseline"], y)
    rows.append({"name": "difference (paired)", "auc": f"{value:+.3f} [{low:+.3f}, {high:+.3f}]"})
    return rows


def write_report(data: Prepared, root: pathlib.Path, *, reply_len: int, temperature: float, seed: int,
                 dtype: str = "float32", device: str = "cpu", n_prompts: int = 500, seconds: float = 0.0) -> None:
    """report.json and report.md: what each stage measured, the policy before and after on held-out openings, and ten
    pairs of replies drawn by the seed, not by hand."""
    policy, tokenizer, _ = load_checkpoint(root / "ppo", device)
    options = json.loads((root / "ppo" / "config.json").read_text(encoding="utf-8"))["options"]
    reference, _, _ = load_checkpoint(options["init_from"] or root / "sft", device)
    reward_model, reward_max_len = load_reward_model(options["reward_from"] or root / "reward", device, tokenizer)
    rows, replies = policy_table({"SFT": reference, "PPO": policy}, reference, tokenizer, data,
                                 reward_model=reward_model, n_prompts=n_prompts, reply_len=reply_len,
                                 temperature=temperature, dtype=dtype)
    report: dict[str, Any] = {"seconds": {}, "policies": rows, "seed": seed}
    parts = [f"# {root.name}, seed {seed}",
             f"One reply of up to {reply_len} tokens to each of {rows[0]['replies']} held-out openings, at temperature "
             f"{temperature:g}, beside what people wrote; distinct-2 over {rows[0]['bigrams']} bigrams each.",
             table(rows, COLUMNS)]
    if data.has_labels("reward"):
        scores = score_reward_model(reward_model, data, "test", tokenizer, reward_max_len)
        (root / "reward_test_scores.json").write_text(json.dumps(scores), encoding="utf-8")
        report["reward"] = reward_table(scores)
        parts += [f"## Reward model on {len(scores['labels'])} test texts", table(report["reward"], REWARD_COLUMNS)]
    if data.has("judge"):
        judge, records = ngram_classifier(data, "judge"), data.records("reward", "test")
        probs, labels = judge.probs([plain_text(r) for r in records]), [r["label"] for r in records]
        parts += [f"The judge itself, on these texts: AUC {interval(auc, probs, labels)}, accuracy "
                  f"{interval(accuracy, probs, labels)}."]
    before, after = replies["SFT"], replies["PPO"]
    if "judge" in after[0]:
        value, low, high = report["win_rate"] = win_rate([r["judge"] for r in after], [r["judge"] for r in before])
        parts += [f"The judge prefers the reply after PPO on {value:.1%} of the openings [{low:.1%}, {high:.1%}]."]
    drawn = np.random.default_rng([seed, 77]).permutation(len(before))[:10]
    report["pairs"] = [dict(prompt=prompt_text(before[i]["prompt"]), before=before[i], after=after[i]) for i in drawn]
    parts += ["## Before and after", *(f"**{p['prompt']}**\n- SFT: {p['before']['reply']}\n- PPO: {p['after']['reply']}"
                                       for p in report["pairs"])]
    for stage in ("pretrain", "sft", "reward", "ppo"):
        if (path := root / stage / "config.json").exists():
            report["seconds"][stage] = json.loads(path.read_text(encoding="utf-8"))["seconds"]
    report["seconds"]["all"] = round(max(seconds, sum(report["seconds"].values())), 1)  # also after a resume
    parts += ["## Seconds", ", ".join(f"{k} {v:.0f}" for k, v in report["seconds"].items())]
    for name, text in (("report.json", json.dumps(report, indent=1, ensure_ascii=False)),
                       ("report.md", "\n\n".join(parts) + "\n")):
        replace_text(root / name, text)
    print("\n" + "\n\n".join(parts))
    lines = [json.loads(line) for line in (root / "ppo" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    for key, title in (("score", "reward per reply, by update"), ("kl", "KL in nats per reply, by update")):
        print("\n" + text_plot([line[key] for line in lines if key in line], title))
    print(f"\nwritten: {root / 'report.md'}; curves: python -m tools.plot {root}; try it: python sample.py --from "
          f"{root / 'ppo'} --prompt …")


# ---- command line ----------------------------------------------------------------------------------------------------

@dataclasses.dataclass
class EvaluateOptions:
    """`python evaluate.py DIR…`"""

    reference: str = option("", "checkpoint that KL and perplexity refer to; empty: the folder sft beside the first")
    reward_from: str = option("", "reward model; empty: the folder reward beside the first, where there is one")
    data: str = option("", "data set of the openings; empty: the checkpoint's")
    source: str = option("", "raw files of the data set, instead of downloading them")
    split: str = option("val", "which openings; look at test once, at the end", choices=("val", "test"))
    prompts: int = option(500, "openings", low=1)
    reply_len: int = option(0, "longest reply; 0: as in the PPO run among the folders, else 64", low=0)
    temperature: float = option(0.0, "sampling temperature; 0: as in the PPO run among the folders, else 1", low=0)
    seed: int = option(12345, "random numbers of the replies", low=0)
    device: str = option("auto", "where to compute", choices=("auto", "cpu", "cuda", "mps"))
    traceback: bool = option(False, "show where in the code an error arose")


def main(argv: list[str]) -> None:
    n = next((i for i, word in enumerate(argv) if word.startswith("-")), len(argv))
    folders, o = [pathlib.Path(f) for f in argv[:n]], parse(EvaluateOptions, argv[n:], "evaluate.py DIR…")
    if not folders:
        raise UserError("which checkpoints? python evaluate.py out/reviews/sft out/reviews/ppo")
    device = pick_device(o.device)
    beside = checkpoint_path(folders[0]).parent.parent
    names = [*folders, o.reference or beside / "sft"]
    *loaded, (reference, tokenizer, state) = (load_checkpoint(f, device) for f in names)
    for name, (_, other, _) in zip(folders, loaded, strict=True):
        tokenizer.require_same(other, f"{names[-1]} and {name}")
    where = pathlib.Path(o.reward_from or beside / "reward")
    has_reward = o.reward_from or checkpoint_path(where).exists()
    reward_model, max_len = load_reward_model(where, device, tokenizer) if has_reward else (None, 0)
    options = state["options"]
    run = {"reply_len": 64, "temperature": 1.0} | {k: v for _, _, s in loaded if s["stage"] == "ppo"
                                                   for k, v in s["options"].items()}
    data = open_data(o.data or options["data"], source=o.source or options["source"] or None,
                     vocab_size=options["vocab_size"], limit=options["limit"])
    data.meta["template"] = state["template"]  # the one that these checkpoints were trained with
    policies = {str(f): model for f, (model, _, _) in zip(folders, loaded, strict=True)}
    print(table(policy_table(policies, reference, tokenizer, data, reward_model=reward_model, n_prompts=o.prompts,
                             reply_len=o.reply_len or run["reply_len"], split=o.split, seed=o.seed,
                             temperature=o.temperature or run["temperature"])[0], COLUMNS))
    if reward_model is not None and data.has_labels("reward"):
        found = score_reward_model(reward_model, data, o.split, tokenizer, max_len)
        print("\n" + table(reward_table(found), REWARD_COLUMNS))


if __name__ == "__main__":
    sys.exit(run_main(main, sys.argv[1:]))
