"""Several runs as one table: the reward model against its baseline, on validation and on test."""
import json

import numpy as np
import pytest

from runtime.options import UserError
from runtime.statistics import auc, paired_difference
from tools.seeds import main, reward_rows


@pytest.fixture
def runs(tmp_path):
    """Two runs' folders with scores of 400 texts of both splits."""
    rng, folders = np.random.default_rng(0), [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
        policies = [{"name": "SFT", "kl": 0.0, "distinct2": .8, "length": 25.0}]
        (folder / "report.json").write_text(json.dumps({"policies": policies}), encoding="utf-8")
    for split in ("val", "test"):
        labels = rng.integers(0, 2, 400)
        noisy = lambda spread, y=labels: (y + rng.normal(0, spread, 400)).tolist()  # noqa: E731
        shared = {"labels": labels.tolist(), "form": "1 to 2 words", "baseline": noisy(1),
                  "half_baseline": noisy(2)}
        for folder, spread in zip(folders, (.5, .9), strict=True):
            scores = shared | {"scores": noisy(spread), "half_scores": noisy(2)}
            (folder / f"reward_{split}_scores.json").write_text(json.dumps(scores), encoding="utf-8")
    return folders


def test_both_splits_are_printed_where_they_were_measured(runs, capsys):
    main([*map(str, runs)])
    both = capsys.readouterr().out
    assert all(f"400 texts of {split} (paired" in both for split in ("val", "test"))
    for folder in runs:
        (folder / "reward_test_scores.json").unlink()
    main([*map(str, runs)])
    assert "texts of test" not in capsys.readouterr().out


@pytest.mark.parametrize("split", ["val", "test"])
def test_the_difference_is_over_runs_and_texts(runs, split):
    scores = [json.loads((folder / f"reward_{split}_scores.json").read_text()) for folder in runs]
    value, low, high = paired_difference(auc, [s["scores"] for s in scores], scores[0]["baseline"],
                                             scores[0]["labels"])
    rows, sentence, _ = reward_rows(runs, split)
    assert f"{value:+.4f} [{low:+.4f}, {high:+.4f}]" in sentence
    assert "1 to 2 words" in rows[-1]["name"]


def test_runs_on_other_texts_are_refused(runs):
    path = runs[1] / "reward_val_scores.json"
    scores = json.loads(path.read_text())
    path.write_text(json.dumps(scores | {"labels": [1 - y for y in scores["labels"]]}))
    with pytest.raises(UserError, match="different texts"):
        reward_rows(runs, "val")


def test_win_rates_of_all_runs_stand_side_by_side(runs, capsys):
    for folder, rate in zip(runs, (.7, .8), strict=True):
        report = json.loads((folder / "report.json").read_text())
        wins = [{"judge": "n-grams", "policy": "PPO", "over": "SFT", "win_rate": [rate, 0, 1],
                 "alike_win_rate": [.5, 0, 1] if rate == .7 else []}]
        (folder / "report.json").write_text(json.dumps(report | {"win_rates": wins}))
    main([*map(str, runs)])
    line = next(x for x in capsys.readouterr().out.splitlines() if "n-grams: PPO to SFT" in x)
    assert [cell.strip() for cell in line.split("|")[2:-1]] == ["0.700", "0.800", "0.750"]


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff"])
def test_a_damaged_report_is_refused(runs, content):
    (runs[0] / "report.json").write_bytes(content)
    with pytest.raises(UserError, match="report.json: damaged"):
        main([*map(str, runs)])
