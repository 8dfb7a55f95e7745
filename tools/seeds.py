"""Several runs as one table: does a result hold over seeds, and is the reward model really better
than its baseline?

    python -m tools.seeds seed0/reviews seed1/reviews seed2/reviews

Reads what `train.py all` left in each folder: report.json (policies on held-out openings) and
reward_val_scores.json (scores of the same texts); of test, where `evaluate.py --split test` was
run, reward_test_scores.json. Prints every run, then mean and range. The reward model's advantage
over the n-gram baseline is that of the mean AUC over the runs, with a bootstrap interval over runs
and texts, which all runs share (paired).
"""
import runtime  # noqa: F401 (before torch: it sets how threads wait)
import json
import pathlib
import sys

import numpy as np

from data.agreement import FEEDBACK, TITLES, columns, main_measure, measured
from data.report import COLUMNS
from runtime.options import UserError, run_main
from runtime.statistics import paired_difference
from runtime.tables import table

RATIOS = ("distinct2", "length")  # to the run's own SFT policy
JUDGED = {"judged_positive": "judged positive", "judged_positive_transformer": "… transformer"}


def read(folder: pathlib.Path, name: str) -> dict:
    """One JSON file of a run; UserError if it is not there."""
    path = folder / name
    if not path.exists():
        how = ("`python evaluate.py RUN --split test` makes it" if "test" in name else
               "the command that trained these runs makes it when all stages are done "
               "(`python train.py --out …`)")
        raise UserError(f"{path}: not there; {how}")
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError):
        raise UserError(f"{path}: damaged; `python evaluate.py {folder}` makes it anew") from None


def mean_and_range(rows: list[dict], name: str) -> dict:
    """Each column's mean with [lowest, highest]."""
    row = {"name": name}
    for key in rows[0]:
        values = [r.get(key) for r in rows]
        if all(isinstance(v, float) for v in values):
            digits = 3 if max(values) < 10 else 1
            low, high = min(values), max(values)
            row[key] = f"{np.mean(values):.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"
    return row


def policy_columns(report: dict) -> dict[str, str]:
    """Key and title of the policies' columns, ratios to SFT beside what they are of. A report of an
    earlier version names no columns."""
    titles = {}
    for key, title in report.get("columns", {"name": "", **JUDGED, **COLUMNS}).items():
        titles |= {key: title, **({f"{key}_ratio": "… / SFT's"} if key in RATIOS else {})}
    titles.pop("replies", None)
    return titles


def policy_rows(reports: list[dict], folders: list[pathlib.Path]) -> list[dict]:
    """SFT, PPO and what people wrote, for the report of each run; ratios are to the run's own SFT
    policy."""
    by_name: dict[str, list[dict]] = {}
    for report, folder in zip(reports, folders, strict=True):
        rows, titles = report["policies"], policy_columns(report)
        sft = next(r for r in rows if r["name"] == "SFT")
        for row in rows:
            row = {k: v for k, v in row.items() if k in titles}
            row |= {f"{k}_ratio": row[k] / sft[k] for k in RATIOS if k in row and sft[k]}
            by_name.setdefault(row["name"], []).append({**row, "name": f"{row['name']}, {folder}"})
    return [row for name, rows in by_name.items()
            for row in [*(rows if "kl" in rows[0] else []),
                        mean_and_range(rows, f"**{name}**, mean [range]")]]


def win_rows(reports: list[dict], folders: list[pathlib.Path]) -> list[dict]:
    """How often each judge prefers the last policy's reply, by whose it is compared with: a column for
    each run, and the mean; and the same among replies of about equal length, where it was measured."""
    rows: dict[str, dict] = {}
    for report, folder in zip(reports, folders, strict=True):
        for win in report.get("win_rates", ()):
            name = f"{win['judge']}: {win['policy']} to {win['over']}"
            for key, suffix in (("win_rate", ""), ("alike_win_rate", ", of about equal length")):
                if win.get(key):
                    rows.setdefault(name + suffix, {"name": name + suffix})[str(folder)] = win[key][0]
    return [row | {"mean": float(np.mean([row[str(folder)] for folder in folders]))}
            for row in rows.values() if len(row) > len(folders)]


def reward_rows(folders: list[pathlib.Path], split: str) -> tuple[list[dict], str, dict[str, str]]:
    """The reward models and the baseline on a split, a sentence on their difference, and the titles
    of the columns."""
    scores = [read(folder, f"reward_{split}_scores.json") for folder in folders]
    scores = [{"kind": "labels", "truth": s.get("labels"), **s} for s in scores]  # "labels": older ones
    kind, truth, baseline = (scores[0].get(key) for key in ("kind", "truth", "baseline"))
    if any(s["truth"] != truth or (s.get("baseline") is None) != (baseline is None)
           or baseline and not np.allclose(s["baseline"], baseline, atol=0.01) for s in scores):
        raise UserError("these runs were measured on different texts: give runs on the same data "
                        "set")
    main, measures = main_measure(kind), measured(scores[0])

    def row(name: str, s: dict, key: str, half: str) -> dict:
        return {"name": name, "half": measures[main](s[half], truth)} | {
            column: measure(s[key], truth) for column, measure in measures.items()}

    rows = [row(f"reward model, {folder}", s, "scores", "half_scores")
            for folder, s in zip(folders, scores, strict=True)]
    rows.append(mean_and_range(rows, "**reward model**, mean [range]"))
    titles = {key: title for key, title in columns(kind).items() if key not in ("texts", "length")}
    if baseline is None:
        return rows, "", titles
    rows.append(row(f"n-gram regression, same {FEEDBACK[kind]} ({scores[0].get('form', 'untuned')})",
                    scores[0], "baseline", "half_baseline"))
    value, low, high = paired_difference(measures[main], [s["scores"] for s in scores], baseline, truth,
                                         groups=scores[0].get("groups"))
    return rows, (f"Mean {TITLES[main]} of {len(folders)} reward models − the baseline's, on {len(truth)} "
                  f"{'pairs' if kind == 'pairs' else 'texts'} of {split} (paired; seeds and texts "
                  f"resampled): {value:+.4f} [{low:+.4f}, {high:+.4f}]"), titles


def main(argv: list[str]) -> None:
    if not argv or argv[0].startswith("-"):
        raise UserError("which runs? python -m tools.seeds seed0/reviews seed1/reviews "
                        "seed2/reviews")
    folders = [pathlib.Path(word) for word in argv]
    for name, split in (("report.json", "validation"), ("report_test.json", "test")):
        if split == "validation" or all((folder / name).exists() for folder in folders):
            reports = [read(folder, name) for folder in folders]
            print(f"{split}\n\n{table(policy_rows(reports, folders), policy_columns(reports[0]))}\n")
            if wins := win_rows(reports, folders):
                print(table(wins, {"name": "share preferred by", **{str(x): str(x) for x in folders}, "mean": "mean"})
                      + "\n")
    for split in ("val", "test"):
        if any((folder / f"reward_{split}_scores.json").exists() for folder in folders):
            rows, difference, titles = reward_rows(folders, split)
            print(f"\n{table(rows, titles)}\n\n{difference}")


if __name__ == "__main__":
    sys.exit(run_main(main, sys.argv[1:]))
