"""Curves: what is drawn is what was logged."""
import builtins
import json

import numpy as np
import pytest

from data.curves import read_metrics, series
from runtime.options import UserError
from tools.plot import main


@pytest.fixture
def runs(tmp_path):
    for seed in (0, 1):
        (tmp_path / f"r{seed}" / "ppo").mkdir(parents=True)
        lines = [{"step": s, "score": s + seed, "kl": 2.0 * s,
                  **({"eval_kl": 1.0} if s % 2 else {})}
                 for s in range(1, 6 - seed)]
        (tmp_path / f"r{seed}" / "ppo" / "metrics.jsonl").write_text("\n".join(map(json.dumps,
                                                                                   lines)))
    return [tmp_path / "r0", tmp_path / "r1"]


def test_runs_are_compared_at_the_steps_they_share(runs):
    found = [read_metrics(r) for r in runs]
    steps, values = series(found, "ppo", "score")
    assert steps.tolist() == [1, 2, 3, 4] and np.array_equal(values, [[1, 2, 3, 4], [2, 3, 4, 5]])
    assert series(found, "ppo", "eval_kl")[0].tolist() == [1, 3]
    assert len(series(found, "sft", "loss")[0]) == 0


def test_a_line_ends_at_a_line_feed_only(runs):
    with open(runs[0] / "ppo/metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('\n{"step": 6, "note": "a\u2028b", "score": 9}\n{"step": 7, "sc')
    assert series([read_metrics(runs[0])], "ppo", "score")[0].tolist() == [1, 2, 3, 4, 5, 6]


def test_a_page_is_drawn(runs, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    main([*map(str, runs), "--out", str(tmp_path / "p.png")])
    assert (tmp_path / "p.png").stat().st_size > 10_000


def test_without_matplotlib_there_are_plots_of_text(runs, monkeypatch, capsys):
    real = builtins.__import__

    def without(name, *rest, **more):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    main([str(runs[0])])
    said = capsys.readouterr().out
    assert "KL in nats per reply" in said and "•" in said and "pip install matplotlib" in said


def test_nothing_to_draw_is_said(tmp_path):
    with pytest.raises(UserError, match="nothing to draw"):
        main([str(tmp_path)])
    with pytest.raises(UserError, match="no folder given"):
        main([])
