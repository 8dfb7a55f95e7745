"""What is said of replies: figures with intervals, what judges think, and the report in words.

Nothing here knows a model. A reply's ids are what was sampled, control tokens included: lengths,
distinct-2 and the reward model read them. Its text (`Tokenizer.reply_text`) has no control tokens:
judges and people read it.
"""
import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from data.agreement import MEASURES, TITLES, main_measure, show_agreement, truth_of
from data.batches import prompt_ids
from data.dataset import SPLITS, feedback_of
from data.prepared import Prepared
from data.records import as_messages, prompt_text
from data.sets import DATA_SETS
from data.tokenizer import Tokenizer
from runtime.draws import drawn_evenly
from runtime.statistics import (accuracy, auc, cut_alike, distinct_interval, distinct_n, interval,
                                mean_interval, positive_share, reply_statistics, win_rate, win_rate_of_alike)
from runtime.tables import table


FEW = 10  # openings: a win rate of fewer says nothing
NOT_FIGURES = ("prompt", "reply", "tokens", "ended", "kl_k1")  # of a reply's record
SPEAKERS = {"system": "System", "user": "Human", "assistant": "Assistant"}


# ---- figures of a set of replies -----------------------------------------------------------------

def by_judge(metric: str, name: str) -> str:
    """The key of a judge's figure: that of the n-grams is the bare name."""
    return metric if name == "n-grams" else f"{metric}_{name}"


def judged_by(judges: dict[str, Any], prompts: Sequence,
              texts: Sequence[str]) -> tuple[dict[str, float], dict[str, Sequence[float]]]:
    """(every judge's mean and its share above one half; what it says of each prompt with its reply).
    """
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
    ended = [bool(row) and row[-1] in tokenizer.end_ids for row in rows]
    control = set(tokenizer.special_ids) - set(tokenizer.end_ids)
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


def people_wrote(data: Prepared, tokenizer: Tokenizer, reply_len: int, split: str = "val",
                 limit: float = math.inf, most: int = 10**9) -> list[tuple[str, list[dict], list[list[int]]]]:
    """What people wrote and others preferred or did not, as (name, records {"prompt", "response"},
    rows): replies that fit the reply length and whose openings are among the policies' held-out
    ones, each once. limit: tokens of a prompt. most: of each opinion, at most. Of ratings those above
    and below their mean; without feedback all replies.
    """
    lines, openings = [], {prompt_text(record["prompt"]) for record in data.records("ppo", split)}
    for name, replies in by_opinion(data, split).items():
        replies = {(prompt_text(prompt), text): prompt for prompt, text in replies}
        records = [{"prompt": prompt, "response": text} for (opening, text), prompt in replies.items()
                   if opening in openings and len(prompt_ids(tokenizer, prompt, data.template)) <= limit]
        rows = [tokenizer.reply_ids(r["response"]) for r in records]
        fits = drawn_evenly([(r, row) for r, row in zip(records, rows, strict=True) if len(row) <= reply_len], most)
        if fits:
            lines.append((f"people{name}", [r for r, _ in fits], [row for _, row in fits]))
    return lines


def by_opinion(data: Prepared, split: str) -> dict[str, list[tuple[Any, str]]]:
    """(prompt, reply) of a split's feedback by what people thought of them; of dialogues without
    feedback all together."""
    if not data.has("reward"):
        return {"": references(data, split)} if data.has("sft") else {}
    records = data.records("reward", split)
    kind = feedback_of(records[0])
    if kind == "pairs":
        return {name: [(r["prompt"], r[field]) for r in records if not r.get("tie")]
                for name, field in ((", preferred", "chosen"), (", not preferred", "rejected"))}
    names = (", liked", ", disliked") if kind == "labels" else (", rated high", ", rated low")
    field = kind.removesuffix("s")
    middle = 0.5 if kind == "labels" else sum(r[field] for r in records) / len(records)
    return {name: [(r["prompt"], r["response"]) for r in records if (r[field] > middle) == high]
            for name, high in zip(names, (True, False), strict=True)}


def references(data: Prepared, split: str) -> list[tuple[Any, str]]:
    """(prompt, reply) of a split's dialogues."""
    messages = [as_messages(r, "{prompt}") for r in data.records("sft", split)]
    return [(r.get("prompt", m[:-1]), m[-1]["content"])
            for r, m in zip(data.records("sft", split), messages, strict=True)]


class Measures:
    """The figures that a data set has of its own (`DataSet.measures`), of replies to prompts of a
    split."""

    def __init__(self, data: Prepared, split: str):
        known = DATA_SETS.get(data.meta["data"])
        self.function, self.folder = known.measures if known else None, data.folder
        self.references = {prompt_text(prompt): reply for prompt, reply in (
            references(data, split) if self.function and data.has("sft") else ())}

    def add(self, metrics: dict[str, float], records: list[dict]) -> list[str]:
        """Add to each reply's record what is measured of it (None: nothing to measure), and to
        metrics the means; returns the names."""
        if self.function is None:
            return []
        prompts, texts = ([r[key] for r in records] for key in ("prompt", "reply"))
        wanted = [self.references.get(prompt_text(prompt)) for prompt in prompts]
        found = self.function(self.folder, prompts, texts, None if None in wanted else wanted)
        for name, values in found.items():
            known = [float(x) for x in values if x is not None]
            metrics[name] = float(np.mean(known)) if known else math.nan
            for record, value in zip(records, values, strict=True):
                record[name] = value
        return list(found)


def table_row(name: str, metrics: dict[str, float], records: list[dict],
              samples: int = 1) -> dict[str, Any]:
    """A line of the report: the metrics, and 95 % intervals over the prompts by name."""
    values = {"length": [r["tokens"] for r in records]}
    for key in records[0]:
        if key.startswith("judge"):
            values[key.replace("judge", "judged_positive")] = [r[key] > 0.5 for r in records]
        elif key not in NOT_FIGURES:
            values[key] = [r[key] for r in records]
    intervals = {}
    for key, of_replies in values.items():
        by_prompt = np.ma.masked_invalid(np.array(of_replies, float).reshape(-1, samples)).mean(1)
        intervals[key] = list(mean_interval(np.ma.compressed(by_prompt))[1:]) if by_prompt.count() else []
    return {"name": name, "replies": len(records), **metrics,
            "intervals": {key: ends for key, ends in intervals.items() if ends}}


def add_distinct(lines: Sequence[dict], answers: Sequence[list[list[int]]],
                 others: Sequence[list[list[int]]]) -> None:
    """Add distinct-2, with interval, to the table's lines: of the policies' `answers` and of `others`,
    all cut to the same number of bigrams. Of others with less than a quarter of the policies' text
    there is none: it would be cut to theirs, which says little."""
    sizes = [sum(max(0, len(row) - 1) for row in rows) for rows in (*answers, *others)]
    enough = min(sizes[:len(answers)]) / 4
    kept = [n >= enough for n in sizes]
    cut = cut_alike(answers, [rows for rows, keep in zip(others, kept[len(answers):], strict=True) if keep])
    for line in lines:  # `describe` took it of all their text
        line.pop("distinct2", None)
    for line, rows in zip(itertools.compress(lines, kept), cut, strict=True):
        line["distinct2"], *line["intervals"]["distinct2"] = distinct_interval(rows)
        line["bigrams"] = sum(max(0, len(row) - 1) for row in rows)


def opinions_on_feedback(judges: dict[str, Any], records: list[dict]) -> dict[str, dict[str, str]]:
    """How right every judge is about people's feedback of one kind, with intervals over prompts: AUC
    and accuracy on labels, accuracy on pairs, correlation with ratings."""
    kind = feedback_of(records[0])
    fields = ("chosen", "rejected") if kind == "pairs" else ("response",)
    opinions, prompts = {}, [r["prompt"] for r in records]
    groups = [prompt_text(prompt) for prompt in prompts]
    for name, judge in judges.items():
        probs = [np.asarray(judge.probs(prompts, [r[field] for r in records])) for field in fields]
        if kind == "labels":
            truth = truth_of(records)
            opinions[name] = {"auc": interval(auc, probs[0], truth, groups=groups),
                              "accuracy": interval(accuracy, probs[0], truth, groups=groups)}
        else:
            main = main_measure(kind)
            difference = probs[0] - probs[-1] if kind == "pairs" else probs[0]
            opinions[name] = {main: interval(MEASURES[kind][main], difference, truth_of(records), groups=groups)}
    return opinions


def win_rates(replies: dict[str, list[dict]], policies: Sequence[str], judges: Sequence[str],
              samples: int = 1) -> list[dict[str, Any]]:
    """How often each judge prefers the last policy's replies to those of the others, and those of any
    other policy to the first one's, on the same openings; and how often among pairs of about equal
    length, for a judge may like short replies, or long ones.

    samples: replies of a policy to an opening. Best-of-n has one each, and may have fewer openings.
    """
    def column(name: str, key: str) -> np.ndarray:
        return np.reshape([r[key] for r in replies[name]], (-1, samples if name in policies else 1))

    def both(policy: str, name: str, key: str) -> tuple[np.ndarray, np.ndarray]:
        return column(policy, key)[:len(theirs := column(name, key))], theirs

    first, last, wins = policies[0], policies[-1], []
    met = [*((last, name) for name in replies if name != last), *((name, first) for name in policies[1:-1])]
    for policy, name in met:
        for judge in judges:
            opinions = both(policy, name, by_judge("judge", judge))
            n, alike = win_rate_of_alike(*opinions, both(policy, name, "tokens"))
            wins.append({"judge": judge, "policy": policy, "over": name, "win_rate": list(win_rate(*opinions)),
                         "alike": n, "alike_win_rate": list(alike or ())})
    return wins


def missing(data: Prepared, split: str, *, judges: Sequence[str], reward_model: bool, openings: int,
            wanted: int) -> list[str]:
    """What the report could not say, and what to bring for it. openings: those measured. wanted: how many
    were asked for."""
    lines, name = [], {"val": "validation"}.get(split, split)
    there = min(wanted, len({prompt_text(record["prompt"]) for record in data.records("ppo", split)}))
    if openings < there:
        lines.append(f"{there - openings} of {there} openings: longer, with a reply, than a model or judge can read or "
                     "the reward model learned; allow shorter replies (--reply_len), or train with a larger --max_len")
    if not judges:
        lines.append("no judge: none of the feedback was kept for one, so that only the reward model that was "
                     "trained against says what is better: bring more records of feedback, or judge.jsonl")
    elif "transformer" not in judges:
        lines.append("no second judge: `python train.py judge` trains it")
    if not data.has("reward"):
        lines.append("no table of the reward model: there is no feedback by people; bring reward.jsonl")
    elif not data.feedback(split):
        lines.append(f"no table of the reward model: the feedback of {name} tells nothing apart; bring "
                     f"more, or reward_{split}.jsonl")
    if not reward_model:
        lines.append("no raw scores and no best of 16: there is no reward model beside these policies; "
                     "--reward_from names one")
    return lines


def splits_used(counts: dict[str, Any]) -> dict[str, list[int]]:
    """{stage: records of train, val and test} of a prepared data set's counts."""
    stages = dict.fromkeys(name.rsplit("_", 1)[0] for name, n in counts.items()
                           if isinstance(n, int) and name.endswith("_train"))
    return {stage: [counts.get(f"{stage}_{split}", 0) for split in SPLITS] for stage in stages}


def drawn_pairs(before: list[dict], after: list[dict], drawn: Sequence[int]) -> list[dict[str, Any]]:
    """Replies of two policies to the same openings: the prompt as one text and as turns, and both
    records."""
    return [{"prompt": prompt_text(before[i]["prompt"]), "turns": turns_of(before[i]["prompt"]),
             "before": before[i], "after": after[i]} for i in drawn]


def turns_of(prompt: str | list[dict[str, str]]) -> list[list[str]]:
    """[speaker, text] of each message of a prompt; the speaker of a text is ""."""
    if isinstance(prompt, str):
        return [["", prompt]]
    return [[SPEAKERS[m["role"]], m["content"]] for m in prompt]


# ---- the report in words -------------------------------------------------------------------------

COLUMNS = {"raw_score": "raw score", "kl": "KL, nats", "distinct2": "distinct-2", "length": "length",
           "end_rate": "ends", "identical": "identical", "short": "under 8", "ref_perplexity": "perplexity"}


def report_name(name: str, split: str) -> str:
    """report.json is of validation, report_test.json of the test split."""
    stem, ending = name.split(".")
    return name if split == "val" else f"{stem}_{split}.{ending}"


def policy_columns(report: dict[str, Any]) -> dict[str, str]:
    """Key and title of the columns of the policies' table: what judges say, the parts of the reward,
    what the data set measures of its own, and what all have."""
    judges = report["judges"]
    positive = "above average" if report["feedback"] in ("pairs", "scores") else "judged positive"
    titles = [positive, *(f"… {name}" for name in judges[1:])]
    own = dict.fromkeys(key for row in report["policies"] for key in row["intervals"]
                        if key not in COLUMNS and not key.startswith("judged_positive"))
    return {"name": "", "replies": "n",
            **{by_judge("judged_positive", name): title for name, title in zip(judges, titles, strict=False)},
            **{key: key.replace("part_", "reward: ") for key in own}, **COLUMNS}


def show_policies(report: dict[str, Any]) -> str:
    """The policies' table in characters; figures with half their interval's width."""
    rows = [line | {key: (line[key], *ends) for key, ends in line["intervals"].items()}
            | ({"kl": f"≤ {line['kl_bound']:.2f}"} if "kl_bound" in line else {})
            for line in report["policies"]]
    return table(rows, report["columns"])


def render_report(report: dict[str, Any], name: str) -> str:
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
             "perplexity: the reference's.", show_policies(report), *in_short(report)]
    parts += [f"Warning: {warning}." for warning in report.get("warnings", ())]
    parts += [f"{row['control']:.1%} of the replies of {row['name']} hold control tokens other than "
              "the end; texts do not show them." for row in rows if row["control"]]
    parts += [show_wins(wins) for wins in report["win_rates"]]
    parts += [f"The judge {judge} itself, on {split} texts: "
              + ", ".join(f"{TITLES[key]} {value}" for key, value in own.items()) + "."
              for judge, own in report.get("judge", {}).items()]
    parts += [f"Missing: {line}." for line in report.get("missing", ())]
    if "reward" in report:
        parts += ["## Reward model", show_agreement(report["reward"], report["agreement"])]
    if report["pairs"]:
        parts += ["## Before and after", *(show_pair(pair, report) for pair in report["pairs"])]
    if "records" in report:
        parts += ["## Records of training, validation and test", ", ".join(
            f"{stage} {' / '.join(f'{n:,}' for n in counts)}"
            for stage, counts in report["records"].items())]
    if "seconds" in report:
        parts += ["## Seconds", ", ".join(f"{stage} {s:.0f}"
                                          for stage, s in report["seconds"].items())]
    return "\n\n".join(parts)


def verdict(rate: Sequence[float]) -> str:
    """What a win rate with its interval says."""
    return "undecided" if rate[1] <= 0.5 <= rate[2] else "better" if rate[0] > 0.5 else "worse"


def in_short(report: dict[str, Any]) -> list[str]:
    """One line: what each judge thinks of the last policy beside the first; none without a judge."""
    said = [f"{wins['judge']}: {verdict(wins['win_rate'])}" for wins in report["win_rates"]
            if (wins["policy"], wins["over"]) == (report.get("last"), report.get("first"))]
    read = ". Read the warnings first" * bool(report.get("warnings"))
    return [f"In short, {report['last']} beside {report['first']}: {', '.join(said)}{read}."] if said else []


def show_wins(wins: dict[str, Any]) -> str:
    """A judge's preference in words: undecided where the interval holds one half."""
    def share(rate: Sequence[float], of: str) -> str:
        doubt = ": undecided" * (verdict(rate) == "undecided")
        return "{0:.1%} of {of} [{1:.1%}, {2:.1%}]{doubt}".format(*rate, of=of, doubt=doubt)

    text = "The judge {judge} prefers the reply of {policy} to that of {over} on ".format(**wins)
    text += share(wins["win_rate"], "the openings")
    if (n := wins.get("alike", 0)) < FEW:
        return text + f"; too few replies are of about equal length ({n}) to compare those alone."
    return text + "; among replies of about equal length on " + share(
        wins["alike_win_rate"], f"{wins['alike']} openings") + "."


def show_pair(pair: dict[str, Any], report: dict[str, Any]) -> str:
    """A prompt, turn by turn, and the replies of both policies to it."""
    turns = [(f"**{speaker}:** {text}" if speaker else f"**{text}**") for speaker, text in pair["turns"]]
    replies = [f"- {report[which]}: " + pair[when]["reply"].replace("\n", "\n  ")
               for which, when in (("first", "before"), ("last", "after"))]
    return "\n\n".join(turns) + "\n" + "\n".join(replies)
