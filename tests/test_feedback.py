"""Feedback before it is learned: kinds, parts, ties, doubtful pairs."""
import math

import numpy as np
import pytest

from data.feedback import denoised, parts_of, rating_scale, require_varied, tie_odds_of
from runtime.options import UserError


def pairs(n, **fields):
    return [{"prompt": "", "chosen": f"good {i}", "rejected": f"bad {i}", **fields} for i in range(n)]


def turned(pair):
    return pair | {"chosen": pair["rejected"], "rejected": pair["chosen"]}


@pytest.mark.parametrize("decided,ties,odds", [(4, 0, 0), (3, 1, 2 / 3), (1, 1, 2), (1, 3, 6)])
def test_replies_of_equal_score_tie_as_often_as_the_pairs_do(decided, ties, odds):
    share = ties / (decided + ties)
    assert tie_odds_of(pairs(decided) + pairs(ties, tie=True)) == pytest.approx(odds)
    assert odds / (2 + odds) == pytest.approx(share)


def test_feedback_that_tells_nothing_apart_is_refused():
    require_varied("train", pairs(2, tie=True) + pairs(1))
    require_varied("train", pairs(2))
    with pytest.raises(UserError, match="all pairs to learn from are ties"):
        require_varied("train", pairs(2, tie=True))
    with pytest.raises(UserError, match="all scores to learn from are the same"):
        require_varied("train", [{"score": 2}] * 3)


def test_all_records_name_a_part_or_none_does():
    assert parts_of(pairs(3)) == ()
    assert parts_of(pairs(1, part="b") + pairs(1, part="a") + pairs(1, part="b")) == ("a", "b")
    with pytest.raises(UserError, match="others none"):
        parts_of(pairs(1, part="a") + pairs(1))


@pytest.mark.parametrize("factor,shift", [(1, 0), (1e-200, 0), (1e12, 1e12)])
def test_ratings_have_a_mean_and_a_spread_on_any_scale(factor, shift):
    scale = rating_scale([{"score": factor * x + shift} for x in (1, 2, 3, 4)])
    assert scale["mean"] == pytest.approx(2.5 * factor + shift, rel=1e-9)
    assert scale["spread"] == pytest.approx(math.sqrt(1.25) * factor, rel=1e-3)


# ---- doubtful pairs ------------------------------------------------------------------------------

def test_pairs_that_were_labelled_the_wrong_way_round_are_turned_back():
    """Where strength shows the truth, the flipped share mends exactly the wrong labels."""
    truth, wrong = pairs(20), [3, 7, 11, 19]
    labelled = [turned(pair) if i in wrong else pair for i, pair in enumerate(truth)]
    strength = np.array([-1.0 if i in wrong else 1.0 for i in range(20)]) * np.arange(1, 21)
    assert denoised(labelled, strength, flip_share=0.2) == truth
    assert labelled[3] == turned(truth[3])  # the records that came in stay as they are


def test_only_the_weakest_pairs_are_smoothed():
    smoothed = denoised(pairs(10), np.arange(10.0), smooth_share=0.3)
    assert [pair.get("smoothing") for pair in smoothed] == [None] * 3 + [0.0] * 7


def test_a_pair_that_was_turned_round_is_a_sure_one():
    """Strength −9 becomes 9: no longer among the doubtful, and asked for a distance of 9."""
    strength = np.array([-9.0, 1.0, 2.0, 3.0])
    changed = denoised(pairs(4), strength, flip_share=0.25, smooth_share=0.25, adaptive_margin=True)
    assert changed[0]["chosen"] == "bad 0"
    assert [pair["margin"] for pair in changed] == [9.0, 1.0, 2.0, 3.0]
    assert ["smoothing" in pair for pair in changed] == [True, False, True, True]


def test_ties_stay_as_they_are():
    mixed = pairs(2, tie=True) + pairs(2)
    changed = denoised(mixed, np.array([-9.0, -8.0, -1.0, 1.0]), 0.5, 0.0, True)
    assert changed[:2] == mixed[:2]
    assert changed[2] == turned(mixed[2]) | {"margin": 1.0, "smoothing": 0.0}
