"""What a round of the loop changed: the policy beside SFT and the round before, by the judges, and the reward
model on held-out answers before and after.

The judges are those of evaluate.py. Where one of them gave the answers, the report says so: then it is what
the policy was trained to please, and the other one is the independent judge.
"""
import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

import evaluate
from data.batches import LEAST_REPLY, held_out_prompts, prompt_ids, reward_rows
from data.feedback import feedback_kind, quick_agreement
from data.prepared import Prepared
from data.records import prompt_text
from data.report import add_distinct, policy_columns, show_policies, show_wins, table_row, win_rates
from data.tokenizer import Tokenizer
from model import load_checkpoint
from runtime.device import precision
from runtime.learning import measured_in
from runtime.statistics import auc, bootstrap, correlation, mean_interval
from runtime.tables import table
from serve.annotators import Annotator
from serve.pairs import Card
from serve.strip import wilson

SHOWN = 20  # prompts whose replies before and after a report holds
MOVED = 10  # replies whose score changed most
FEWEST = 5  # records that such scores are standardised over
MEASURES = {"pairwise": "accuracy", "regression": "correlation", "label": "AUC"}  # by the loss of the reward model


@dataclasses.dataclass(frozen=True)
class Setting:
    """What all rounds are measured by."""

    data: Prepared
    device: str
    dtype: str
    settings: evaluate.ReplySettings
    n_prompts: int
    judge: pathlib.Path  # the folder of the transformer judge, whether there is one or not


# ---- the policy --------------------------------------------------------------------------------------

def measure_round(s: Setting, policies: dict[str, pathlib.Path], reward: pathlib.Path,
                  annotator: Annotator | None = None) -> dict[str, Any]:
    """The policies by name, SFT first and the round's last, on the same held-out prompts with the same random
    numbers; the score is that of the round's reward model. annotator: a simulated one that is no judge; it says
    without error how often the last one's reply is better than SFT's."""
    loaded = {name: load_checkpoint(path, s.device) for name, path in policies.items()}
    _, tokenizer, _ = loaded["SFT"]
    networks = {name: measured_in(model, s.dtype) for name, (model, _, _) in loaded.items()}
    scorer, _, _ = evaluate.load_reward_model(reward, s.device, tokenizer, s.dtype)
    judges = evaluate.load_judges(s.data, s.judge, s.device, s.dtype)
    lengths = [x.config.max_len for x in (*networks.values(), scorer)]
    lengths += [judge.max_len for judge in judges.values() if hasattr(judge, "max_len")]
    prompts = held_out_prompts(s.data, "val", tokenizer, min(lengths) - s.settings.reply_len, s.n_prompts)
    lines, replies, rows = [], {}, []
    for name, network in networks.items():
        metrics, replies[name], ids = evaluate.measure_policy(
            network, networks["SFT"], tokenizer, prompts, s.data.template, reward_model=scorer,
            judges=judges, settings=s.settings)
        lines.append(table_row(name, metrics, replies[name]))
        rows.append(ids)
    add_distinct(lines, rows, [])
    before, after = (replies[name] for name in (*replies,)[-2:])
    report = {"policies": lines, "judges": list(judges), "feedback": s.data.feedback("val"), "prompts": len(prompts),
              "win_rates": win_rates(replies, list(networks), list(judges)),
              "before_after": [{"prompt": prompt_text(old["prompt"]), "before": old["reply"], "after": new["reply"],
                                "score_before": old["raw_score"], "score_after": new["raw_score"]}
                               for old, new in list(zip(before, after, strict=True))[:SHOWN]]}
    if annotator is not None:
        cards = [Card("", new["prompt"], (new["reply"], old["reply"]))
                 for new, old in zip(after, replies["SFT"], strict=True)]
        report["annotator_prefers"] = list(mean_interval((np.sign(annotator.deltas(cards)) + 1) / 2))
    return report | {"columns": policy_columns(report)}


# ---- the reward model ----------------------------------------------------------------------------------

def what_changed(s: Setting, held_out: pathlib.Path, after: pathlib.Path, before: pathlib.Path | None,
                 tokenizer: Tokenizer) -> dict[str, Any]:
    """How right the reward models are about held-out answers, a file of records; and the replies in them whose
    score moved most, each model's scores brought to mean 0 and spread 1.

    accuracy_before, accuracy_after: of `how_right`, with its interval as interval_before and interval_after;
    `measure` names it. Without a model before, its figures are None.
    """
    models = {name: path and evaluate.load_reward_model(path, s.device, tokenizer, s.dtype)
              for name, path in (("before", before), ("after", after))}
    room = min(longest for _, longest, _ in filter(None, models.values())) - LEAST_REPLY
    records = [json.loads(line) for line in held_out.read_text(encoding="utf-8").splitlines()]
    records = [record for record in records if len(prompt_ids(tokenizer, record["prompt"])) <= room]
    kind = feedback_kind(records[0]) if records else "pairwise"
    fields = ("chosen", "rejected") if kind == "pairwise" else ("response",)
    scores: dict[str, dict[str, np.ndarray]] = {}
    for name, loaded in models.items() if records else ():
        if loaded:
            network, longest, _ = loaded  # each reads as much of a reply as it was trained to
            with precision(s.dtype, s.device):
                scores[name] = {field: network.score_rows(reward_rows(
                    records, tokenizer, "{prompt}", longest, field=field)).cpu().double().numpy() for field in fields}
    found: dict[str, Any] = {"measure": MEASURES[kind], "n": sum(not record.get("tie") for record in records)}
    for name in models:
        value, ends = how_right(kind, records, scores[name]) if name in scores else (None, None)
        found |= {f"accuracy_{name}": value, f"interval_{name}": ends}
    texts = [(record["prompt"], record[field]) for field in fields for record in records]
    return found | {"moved": moved(texts, *(scores[name] for name in models), s.data.template)
                    if len(scores) == 2 and len(records) >= FEWEST else []}


def how_right(kind: str, records: Sequence[dict],
              scores: dict[str, np.ndarray]) -> tuple[float | None, list[float] | None]:
    """(value, its 95 % interval): the share of decided pairs in the right order, the correlation with ratings, or
    the AUC on labels. (None, None) where these records have no such measure; no interval where they are too few for
    one. scores: of each reply, by its field.

    Only the order counts: the zero of a model that learned from pairs means nothing. Answers to one prompt are
    alike. So a share counts prompts, by Wilson's interval; the others are bootstrapped, by prompt from ten on.
    """
    value = quick_agreement(kind, records, scores).get(f"val_{MEASURES[kind]}".lower())
    if value is None or kind == "regression" and len({record["score"] for record in records}) < 2:
        return None, None
    prompts = [prompt_text(record["prompt"]) for record in records if not record.get("tie")]
    if kind == "pairwise":
        n = len(set(prompts))
        interval = wilson(value * n, n)
        return value, [interval["low"], interval["high"]]
    field, measure = ("label", auc) if kind == "label" else ("score", correlation)
    _, low, high = bootstrap(measure, scores["response"], [record[field] for record in records], groups=prompts)
    return value, [low, high] if low < high else None


def moved(texts: Sequence[tuple], before: dict[str, np.ndarray], after: dict[str, np.ndarray],
          template: str) -> list[dict[str, Any]]:
    """The replies whose standardised score moved most. texts: (prompt, reply), in the order of the scores."""
    def standardised(scores: dict[str, np.ndarray]) -> np.ndarray:
        joined = np.concatenate([*scores.values()])
        return (joined - joined.mean()) / (joined.std() or 1.0)

    start, _, end = template.partition("{prompt}")
    old, new = standardised(before), standardised(after)
    return [{"prompt": prompt_text(texts[i][0]).removeprefix(start).removesuffix(end), "response": texts[i][1],
             "score_before": round(float(old[i]), 3), "score_after": round(float(new[i]), 3)}
            for i in np.argsort(-np.abs(new - old), kind="stable")[:MOVED]]


# ---- in words --------------------------------------------------------------------------------------------

def notes(names: Sequence[str], said: str, judges: Sequence[str]) -> list[str]:
    """Who gave the answers, and which judge is independent of them. names: the annotators in the log. said: of a
    simulated one, its own sentence."""
    others = [name for name in judges if f"judge {name}" not in names]
    more = f" and {len(names) - 5} more" * (len(names) > 5)
    found = [said or f"The answers were given by {', '.join(names[:5])}{more}"]
    if len(others) == len(judges):
        return found
    return [*found, f"The independent judge is {' and '.join(others)}, which gave no answer and is asked in reports "
                    "alone" if others else
            "No other judge is trained, so that nobody independent looks at the policy: `python train.py judge` "
            "trains one"]


def render(report: dict[str, Any]) -> str:
    """A round's report as Markdown."""
    changed, answers = report["changed"], report["answers"]
    parts = [f"# {report['data']}, seed {report['seed']}, round {report['round']}",
             f"{answers['round']} answers in this round; the reward model learned {answers['learned']} of all so far, "
             f"and {answers['held_out']} are held out, by prompt.", *(f"{note}." for note in report["notes"]),
             f"One reply to each of {report['prompts']} held-out prompts; ± is half a 95 % interval.",
             show_policies(report), *said_of_annotator(report), *(show_wins(wins) for wins in report["win_rates"]),
             "## What the answers changed", said_of_reward_model(changed)]
    parts += ["\n".join([f"- {row['prompt']} **{row['response']}**: {row['score_before']:+.2f} → "
                         f"{row['score_after']:+.2f}" for row in changed["moved"]])] * bool(changed["moved"])
    parts += ["## Before and after", *(
        "\n".join([f"**{pair['prompt']}**", f"- before ({pair['score_before']:.2f}): {pair['before']}",
                   f"- after ({pair['score_after']:.2f}): {pair['after']}"]) for pair in report["before_after"][:10])]
    return "\n\n".join(parts)


def said_of_annotator(report: dict[str, Any]) -> list[str]:
    """How often a simulated annotator prefers the policy's replies, in a sentence."""
    return ["Without its errors, who gave the answers prefers the reply of {} to that of SFT on {:.1%} of the prompts "
            "[{:.1%}, {:.1%}].".format(report["policies"][-1]["name"], *report["annotator_prefers"])
            ] if "annotator_prefers" in report else []


def said_of_reward_model(changed: dict[str, Any]) -> str:
    """How right the reward model is, in a sentence."""
    def share(name: str) -> str:
        value, ends = changed[f"accuracy_{name}"], changed[f"interval_{name}"]
        return "–" if value is None else f"{value:.3f}" + ("" if ends is None else " [{:.3f}, {:.3f}]".format(*ends))

    return (f"The reward model's {changed['measure']} on {changed['n']} held-out answers: {share('before')} before "
            f"this round, {share('after')} after it.")


def summary_of(report: dict[str, Any]) -> dict[str, Any]:
    """A round's figures, for loop.json and the table over the rounds."""
    last, changed = report["policies"][-1], report["changed"]
    prefers = {"win_annotator": report["annotator_prefers"]} if "annotator_prefers" in report else {}
    wins = {wins["judge"]: wins["win_rate"] for wins in report["win_rates"]
            if (wins["policy"], wins["over"]) == (last["name"], "SFT")}
    return {"round": report["round"], "answers": report["answers"]["learned"] + report["answers"]["held_out"],
            "accuracy_before": changed["accuracy_before"], "accuracy_after": changed["accuracy_after"],
            **prefers, **{f"win_{name}": rate for name, rate in wins.items()},
            **{key: last[key] for key in ("kl", "length", "distinct2") if key in last},
            **{key: value for key, value in last.items() if key.startswith("judged_positive")}}


def show_rounds(summaries: Sequence[dict[str, Any]]) -> str:
    """The table over the rounds."""
    names = dict.fromkeys(key for row in summaries for key in row)
    titles = {"round": "round", "answers": "answers", "accuracy_before": "reward model before",
              "accuracy_after": "after", **{key: f"beats SFT, {key[4:]}" for key in names if key[:4] == "win_"},
              **{key: key.replace("judged_positive", "judged positive").replace("_", " ") for key in names
                 if key.startswith("judged")}, "kl": "KL, nats", "length": "length", "distinct2": "distinct-2"}
    rows = [{key: tuple(value) if isinstance(value, list) else value for key, value in row.items()}
            for row in summaries]
    return table(rows, titles)
