"""What is said of replies: figures with intervals, what judges think, and the report in words.

Nothing here knows a model. A reply's ids are what was sampled, control tokens included: lengths,
distinct-2 and the reward model read them. Its text (`Tokenizer.reply_text`) has no control tokens:
judges and people read it.
"""
from collections.abc import Sequence
from typing import Any

import numpy as np

from data.prepared import Prepared
from data.records import prompt_text
from data.tokenizer import Tokenizer
from runtime.statistics import (accuracy, auc, distinct_n, interval, mean_interval, positive_share,
                                reply_statistics, win_rate)
from runtime.tables import table


# ---- figures of a set of replies -----------------------------------------------------------------

def by_judge(metric: str, name: str) -> str:
    """The key of a judge's figure: that of the n-grams is the bare name."""
    return metric if name == "n-grams" else f"{metric}_{name}"


def judged_by(judges: dict[str, Any], prompts: Sequence,
              texts: Sequence[str]) -> tuple[dict[str, float], dict[str, Sequence[float]]]:
    """(mean P(liked) by every judge and the share above one half; P(liked) of each prompt with its
    reply)."""
    metrics, probs = {}, {}
    for name, judge in judges.items():
        probs[by_judge("judge", name)] = p = np.asarray(judge.probs(prompts, texts)).tolist()
        metrics |= {by_judge("judge", name): float(np.mean(p)),
                    by_judge("judged_positive", name): positive_share(p)}
    return metrics, probs


def describe(prompts: Sequence, texts: Sequence[str], rows: list[list[int]], tokenizer: Tokenizer,
             judges: dict[str, Any], measured: dict[str, Any]) -> tuple[dict[str, float], list[dict]]:
    """(length, ends, diversity, what judges say, and the means of what was `measured` of each
    reply (names to (B,), None: not measured); one record per reply)."""
    ended = [row[-1:] == [tokenizer.eom_id] for row in rows]
    control = set(tokenizer.special_ids) - {tokenizer.eom_id}
    metrics, probs = judged_by(judges, prompts, texts)
    metrics |= reply_statistics(rows, ended) | {
        "distinct2": distinct_n(rows, 2, budget=1000),
        "control": float(np.mean([not control.isdisjoint(row) for row in rows]))}
    columns = {"prompt": prompts, "reply": texts, "tokens": map(len, rows), "ended": ended, **probs}
    for name, values in measured.items():
        if values is not None:
            metrics[name] = float(values.mean())
            columns[name] = [round(x, 6) for x in values.tolist()]
    return metrics, [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def people_wrote(data: Prepared, tokenizer: Tokenizer, reply_len: int,
                 split: str = "val") -> list[tuple[str, list[dict], list[list[int]]]]:
    """Liked and disliked texts by people as (name, records, rows): those that fit the reply length
    and whose openings are among the policies' held-out ones."""
    lines, openings = [], {prompt_text(record["prompt"]) for record in data.records("ppo", split)}
    for name, label in (("people, liked", 1), ("people, disliked", 0)):
        records = [r for r in data.records("reward", split) if r.get("label") == label
                   and prompt_text(r["prompt"]) in openings]
        rows = [[*tokenizer.encode(r["response"]), tokenizer.eom_id] for r in records]
        fits = [(r, row) for r, row in zip(records, rows, strict=True) if len(row) <= reply_len]
        if fits:
            lines.append((name, [r for r, _ in fits], [row for _, row in fits]))
    return lines


def table_row(name: str, metrics: dict[str, float], records: list[dict],
              samples: int = 1) -> dict[str, Any]:
    """A line of the report: the metrics, and 95 % intervals over the prompts by name."""
    values = {"length": [r["tokens"] for r in records]}
    for key in records[0]:
        if key in ("kl", "raw_score"):
            values[key] = [r[key] for r in records]
        elif key.startswith("judge"):
            values[key.replace("judge", "judged_positive")] = [r[key] > 0.5 for r in records]
    return {"name": name, "replies": len(records), **metrics,
            "intervals": {key: list(mean_interval(x, samples)[1:]) for key, x in values.items()}}


def opinions_on_labels(judges: dict[str, Any], records: list[dict]) -> dict[str, dict[str, str]]:
    """How right every judge is about labelled texts, with intervals."""
    texts = [[r[key] for r in records] for key in ("prompt", "response")]
    probs, labels = {name: j.probs(*texts) for name, j in judges.items()}, [r["label"] for r in records]
    return {name: {"auc": interval(auc, p, labels), "accuracy": interval(accuracy, p, labels)}
            for name, p in probs.items()}


def win_rates(replies: dict[str, list[dict]], policies: Sequence[str], judges: Sequence[str],
              samples: int = 1) -> list[dict[str, Any]]:
    """How often each judge prefers the last policy's replies to those of the others, on the same
    openings.

    samples: replies of a policy to an opening. Best-of-n has one each, and may have fewer openings.
    """
    policy = policies[-1]

    def opinion(name: str, judge: str) -> np.ndarray:
        probs = [r[by_judge("judge", judge)] for r in replies[name]]
        return np.reshape(probs, (-1, samples if name in policies else 1))

    wins = []
    for name in replies:
        for judge in judges if name != policy else ():
            theirs = opinion(name, judge)
            rate = win_rate(opinion(policy, judge)[:len(theirs)], theirs)
            wins.append({"judge": judge, "policy": policy, "over": name, "win_rate": list(rate)})
    return wins


# ---- the report in words -------------------------------------------------------------------------

COLUMNS = {"raw_score": "raw score", "kl": "KL, nats", "distinct2": "distinct-2",
           "length": "length", "end_rate": "ends", "identical": "identical", "short": "under 8",
           "ref_perplexity": "perplexity"}


def report_name(name: str, split: str) -> str:
    """report.json is of validation, report_test.json of the test split."""
    stem, ending = name.split(".")
    return name if split == "val" else f"{stem}_{split}.{ending}"


def show_policies(lines: list[dict], judges: Sequence[str]) -> str:
    """The policies' table in characters; figures with half their interval's width."""
    titles = ["judged positive", *(f"… {name}" for name in judges[1:])]
    columns = {"name": "", "replies": "n", **{by_judge("judged_positive", judge): title for judge, title
                                             in zip(judges, titles, strict=False)}, **COLUMNS}
    rows = [line | {key: (line[key], *ends) for key, ends in line["intervals"].items()}
            | ({"kl": f"≤ {line['kl_bound']:.2f}"} if "kl_bound" in line else {})
            for line in lines]
    return table(rows, columns)


def render_report(report: dict[str, Any], name: str, reward_columns: dict[str, str]) -> str:
    """The report of evaluate.py as Markdown."""
    rows, split = report["policies"], {"val": "validation"}.get(report["split"], report["split"])
    settings = report["settings"]
    several = "One reply" if report["samples"] == 1 else f"{report['samples']} replies"
    parts = [f"# {name}, seed {report['seed']}, {split}",
             f"{several} of up to {settings['reply_len']} tokens to each of {report['openings']} "
             f"openings of the {split} split, at temperature {settings['temperature']:g}, beside "
             f"what people wrote. Judged by {', then by '.join(report['judges']) or 'nobody'}; ± is "
             f"half a 95 % interval over openings; KL per reply; distinct-2 over "
             f"{rows[0]['bigrams']} bigrams each; under 8: share of replies with fewer tokens; "
             "perplexity: the reference's.", show_policies(rows, report["judges"])]
    parts += [f"{row['control']:.1%} of the replies of {row['name']} hold control tokens other than "
              "the end; texts do not show them." for row in rows if row["control"]]
    if "reward" in report:
        parts += ["## Reward model", table(report["reward"], reward_columns),
                  f"The n-gram regression, chosen on validation: {report['baseline']}."]
    parts += [f"The judge {judge} itself, on {split} texts: AUC {own['auc']}, accuracy "
              f"{own['accuracy']}." for judge, own in report.get("judge", {}).items()]
    parts += ["The judge {judge} prefers the reply of {policy} to that of {over} on {0:.1%} of the "
              "openings [{1:.1%}, {2:.1%}].".format(*wins["win_rate"], **wins)
              for wins in report["win_rates"]]
    if report["pairs"]:
        parts += ["## Before and after", *(
            f"**{pair['prompt']}**\n- {report['first']}: {pair['before']['reply']}\n"
            f"- {report['last']}: {pair['after']['reply']}" for pair in report["pairs"])]
    if "seconds" in report:
        parts += ["## Seconds", ", ".join(f"{stage} {s:.0f}"
                                          for stage, s in report["seconds"].items())]
    return "\n\n".join(parts)
