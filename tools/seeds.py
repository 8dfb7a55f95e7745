"""Several runs as one table: does a result hold over seeds, and is the reward model really better
than its baseline?

    python -m tools.seeds seed0/reviews seed1/reviews seed2/reviews

Reads what `train.py all` left in each folder: report.json (policies on held-out openings) and
reward_val_scores.json (scores of the same texts); of test, where `evaluate.py --split test` was
run, reward_test_scores.json. Prints every run, then mean and range. The reward model's advantage
over the n-gram baseline is that of the mean AUC over the runs, with a bootstrap interval over runs
and texts, which all runs share (paired).
"""
import json
import pathlib
import sys

import numpy as np

from data.report import COLUMNS
from runtime.options import UserError, run_main
from runtime.statistics import accuracy, auc, calibration_error, paired_auc_difference
from runtime.tables import table

RATIOS = ("distinct2", "length")  # to the run's own SFT policy
POLICY = {"name": "", "judged_positive": "judged positive",
          "judged_positive_transformer": "… transformer"}
for key, title in COLUMNS.items():
    POLICY |= {key: title, **({f"{key}_ratio": "… / SFT's"} if key in RATIOS else {})}
REWARD = {"name": "", "auc": "AUC", "accuracy": "accuracy", "calibration": "calibration error",
          "half": "AUC on first halves"}


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


def policy_rows(folders: list[pathlib.Path], report: str) -> list[dict]:
    """SFT, PPO and what people wrote, for each run's `report`; ratios are to the run's own SFT policy."""
    by_name: dict[str, list[dict]] = {}
    for folder in folders:
        rows = read(folder, report)["policies"]
        sft = next(r for r in rows if r["name"] == "SFT")
        for row in rows:
            row = {k: v for k, v in row.items() if k in POLICY}
            row |= {f"{k}_ratio": row[k] / sft[k] for k in RATIOS}
            by_name.setdefault(row["name"], []).append({**row, "name": f"{row['name']}, {folder}"})
    return [row for name, rows in by_name.items()
            for row in [*(rows if "kl" in rows[0] else []),
                        mean_and_range(rows, f"**{name}**, mean [range]")]]


def reward_rows(folders: list[pathlib.Path], split: str) -> tuple[list[dict], str]:
    """The reward models and the baseline on a split, and a sentence on their difference."""
    scores = [read(folder, f"reward_{split}_scores.json") for folder in folders]
    labels, baseline = scores[0]["labels"], scores[0]["baseline"]
    if any(s["labels"] != labels or not np.allclose(s["baseline"], baseline, atol=0.01)
           for s in scores):
        raise UserError("these runs were measured on different texts: give runs on the same data "
                        "set")

    def row(name: str, s: dict, key: str, half: str) -> dict:
        probs = 1 / (1 + np.exp(-np.array(s[key])))
        return {"name": name, "auc": auc(s[key], labels), "accuracy": accuracy(probs, labels),
                "calibration": calibration_error(probs, labels), "half": auc(s[half], labels)}

    rows = [row(f"reward model, {folder}", s, "scores", "half_scores")
            for folder, s in zip(folders, scores, strict=True)]
    value, low, high = paired_auc_difference([s["scores"] for s in scores], baseline, labels)
    rows += [mean_and_range(rows, "**reward model**, mean [range]"),
             row(f"n-gram regression, same labels ({scores[0].get('form', 'untuned')})", scores[0],
                 "baseline", "half_baseline")]
    return rows, (f"Mean AUC of {len(folders)} reward models − the baseline's, on {len(labels)} "
                  f"texts of {split} (paired; seeds and texts resampled): {value:+.4f} "
                  f"[{low:+.4f}, {high:+.4f}]")


def main(argv: list[str]) -> None:
    if not argv or argv[0].startswith("-"):
        raise UserError("which runs? python -m tools.seeds seed0/reviews seed1/reviews "
                        "seed2/reviews")
    folders = [pathlib.Path(word) for word in argv]
    for name, split in (("report.json", "validation"), ("report_test.json", "test")):
        if split == "validation" or all((folder / name).exists() for folder in folders):
            print(f"{split}\n\n{table(policy_rows(folders, name), POLICY)}\n")
    for split in ("val", "test"):  # feedback in pairs or scores has neither
        if any((folder / f"reward_{split}_scores.json").exists() for folder in folders):
            rows, difference = reward_rows(folders, split)
            print(f"\n{table(rows, REWARD)}\n\n{difference}")


if __name__ == "__main__":
    sys.exit(run_main(main, sys.argv[1:]))
