"""Measures have their textbook values, and intervals cover what they should."""
import math

import numpy as np
import pytest

from runtime.options import UserError
from runtime.statistics import (accuracy, auc, bootstrap, calibration_error, correlation, cut_alike,
                                distinct_interval, distinct_n, interval, mean_interval,
                                paired_difference, positive_share, reply_statistics, share_above,
                                win_rate)


def mean(x) -> float:
    return float(np.mean(x))


# ---- scores against labels -----------------------------------------------------------------------

def test_auc_is_the_share_of_pairs_in_the_right_order():
    rng = np.random.default_rng(0)
    scores, labels = rng.integers(0, 8, 60), rng.integers(0, 2, 60)
    pairs = [(a > b) + (a == b) / 2 for a in scores[labels == 1] for b in scores[labels == 0]]
    assert auc(scores, labels) == pytest.approx(np.mean(pairs))


@pytest.mark.parametrize("scores,labels,expected", [([1, 2, 3], [0, 0, 1], 1),
                                                    ([3, 2, 1], [0, 0, 1], 0),
                                                    ([5, 5], [0, 1], .5)])
def test_auc_of_perfect_inverse_and_tied_scores(scores, labels, expected):
    assert auc(scores, labels) == expected


def test_auc_needs_both_labels():
    with pytest.raises(UserError, match="all labels are the same"):
        auc([1, 2], [1, 1])


def test_accuracy_is_the_share_on_the_right_side_of_one_half():
    assert accuracy([.9, .2, .6], [1, 0, 0]) == pytest.approx(2 / 3)


def test_ties_count_one_half():
    assert accuracy([.5, .5, .9], [0, 1, 1]) == pytest.approx(2 / 3)
    assert share_above([0, 0, 0], [0, 0, 0]) == .5
    assert auc([3, 3, 3], [0, 1, 1]) == .5


@pytest.mark.parametrize("scale", [1e-200, 1, 1e200])
def test_a_correlation_has_no_scale(scale):
    a, b = np.array([1, 2, 4, 3]), np.array([1, 3, 5, 2])
    assert correlation(scale * a, b) == pytest.approx(np.corrcoef(a, b)[0, 1])
    assert correlation(b, scale * a) == pytest.approx(np.corrcoef(a, b)[0, 1])


@pytest.mark.parametrize("a,b", [([.1] * 3, [1, 2, 3]), ([1, 2, 3], [.1] * 3), ([1], [1])])
def test_what_never_changes_correlates_with_nothing(a, b):
    assert correlation(a, b) == 0


def test_calibrated_probabilities_have_almost_no_calibration_error():
    rng = np.random.default_rng(1)
    p = rng.random(40_000)
    assert calibration_error(p, rng.random(40_000) < p) < .02


def test_calibration_error_is_the_distance_of_probability_and_share():
    assert calibration_error(np.full(100, .95), np.tile([1, 0], 50)) == pytest.approx(.45)


def test_a_probability_of_one_falls_into_the_last_bin():
    assert calibration_error([1.0, .95], [1, 1]) == pytest.approx(.025)


@pytest.mark.parametrize("measure", [auc, accuracy, calibration_error])
@pytest.mark.parametrize("a,b", [([], []), ([1, 2], [1]), ([], [1])])
def test_empty_and_unequal_sets_are_errors(measure, a, b):
    with pytest.raises(UserError, match="nothing to measure"):
        measure(a, b)


def test_the_positive_share_does_not_count_one_half():
    assert positive_share([.5, .51, .2, .9]) == .5


# ---- intervals -----------------------------------------------------------------------------------

def test_the_bootstrap_covers_a_mean_as_theory_says():
    x = np.random.default_rng(2).normal(3, 2, 400)
    value, low, high = bootstrap(mean, x)
    assert value == pytest.approx(x.mean())
    assert (high - low) / 2 == pytest.approx(1.96 * x.std() / 20, rel=.1)


def test_the_same_seed_gives_the_same_interval():
    x = np.random.default_rng(2).normal(3, 2, 400)
    assert bootstrap(mean, x) == bootstrap(mean, x)
    assert bootstrap(mean, x) != bootstrap(mean, x, seed=1)


def test_resamples_without_a_value_are_skipped():
    _, low, high = bootstrap(auc, [1, 2, 3], [0, 1, 1])  # a third of the resamples has one label
    assert (low, high) == (1, 1)


def test_without_any_resample_the_interval_is_unknown():
    _, low, high = bootstrap(mean, [1, 2], n=0)
    assert math.isnan(low)
    assert math.isnan(high)


def test_a_paired_interval_is_narrower_than_an_unpaired_one():
    rng = np.random.default_rng(3)
    labels = rng.integers(0, 2, 500)
    shared = labels + rng.normal(0, 1, 500)
    a, b = shared + rng.normal(0, .1, 500) + .1 * labels, shared + rng.normal(0, .1, 500)
    value, low, high = paired_difference(auc, [a, a], b, labels, n=300)
    alone = bootstrap(auc, a, labels, n=300)
    assert value == pytest.approx(auc(a, labels) - auc(b, labels))
    assert low < value < high
    assert high - low < .5 * (alone[2] - alone[1])


def test_the_interval_over_several_runs_is_that_of_another_run_on_other_texts():
    rng = np.random.default_rng(3)
    labels = rng.integers(0, 2, 2000)
    good, bad, base = (labels + rng.normal(0, spread, 2000) for spread in (.5, 2, 1))
    value, low, high = paired_difference(auc, [good, bad], base, labels, n=300)
    alone = [auc(s, labels) - auc(base, labels) for s in (good, bad)]
    assert value == pytest.approx(np.mean(alone))
    assert high > alone[0] - .01  # a quarter of the draws is one run twice
    assert low < alone[1] + .01


def test_the_difference_is_that_of_the_mean_auc_over_systems():
    labels, good, bad, base = [0, 1, 0, 1], [0, 1, 0, 1], [1, 0, 1, 0], [0, 1, 1, 0]
    assert paired_difference(auc, [good, bad], base, labels,
                                 n=10)[0] == pytest.approx(.5 - auc(base, labels))


def test_a_calibration_error_has_an_interval_that_covers_it():
    """Resampling raises a small error, so the plain interval mostly misses it; the basic one
    covers."""
    rng, covered = np.random.default_rng(0), {True: 0, False: 0}
    truth = rng.random(400_000)
    drawn = lambda p: (rng.random(len(p)) < .05 + .9 * p).astype(int)
    exact = calibration_error(truth, drawn(truth))
    for _ in range(100):
        probs = rng.random(1600)
        labels = drawn(probs)
        for basic in covered:
            _, low, high = bootstrap(calibration_error, probs, labels, n=200, basic=basic)
            covered[basic] += low <= exact <= high
    assert covered[True] >= 82  # measured over 400: 91 %
    assert covered[False] <= 35  # measured over 400: 20 %


def test_win_rates_count_ties_half():
    assert win_rate([1, 1, 1, 0], [0, 0, 1, 1])[0] == pytest.approx(.625)


def test_intervals_are_written_with_three_digits():
    assert interval(mean, [.5, .5, .5]) == "0.500 [0.500, 0.500]"


def test_several_replies_to_a_prompt_narrow_its_interval_only_as_far_as_they_differ():
    once = np.random.default_rng(0).random(50)
    assert mean_interval(np.repeat(once, 4), 4) == pytest.approx(mean_interval(once))


def test_every_reply_to_a_prompt_meets_every_one_of_the_other_system():
    value, _, _ = win_rate([[1, 3], [0, 0]], [[2], [0]])
    assert value == .5


# ---- what replies look like ----------------------------------------------------------------------

ROWS = [[1, 2, 3], [1, 2], [4]]


@pytest.mark.parametrize("rows,n,budget,expected", [
    (ROWS, 2, None, 2 / 3), (ROWS, 1, None, 4 / 6), (ROWS, 2, 2, 1),
    ([[1, 1, 1, 1]], 2, None, 1 / 3), ([[1]], 2, None, 0)])
def test_distinct_n_counts_over_equal_numbers(rows, n, budget, expected):
    assert distinct_n(rows, n, budget) == expected


def test_statistics_of_replies():
    rows = [[1, 2], [1, 2], [3] * 10, [4] * 10]
    assert reply_statistics(rows, [True, True, False, True]) \
        == {"length": 6, "end_rate": .75, "identical": .5, "short": .5}


def test_no_replies_have_no_statistics():
    with pytest.raises(UserError, match="there are no replies"):
        reply_statistics([], [])


def test_systems_are_cut_to_the_same_bigrams_of_the_same_prompts():
    long, short = [[1, 2, 3, 4], [5, 6, 7]], [[1, 2], [8, 9, 1, 2]]
    people = [[4, 5, 6, 7], [1, 2, 3, 4], [9, 9, 9]]
    assert cut_alike([long, short], [people]) \
        == [[[1, 2], [5, 6, 7]], [[1, 2], [8, 9, 1]], [[4, 5], [1, 2, 3]]]
    assert cut_alike([long, short], [[[1, 2]]]) == [[[1, 2]]] * 3  # too few texts: all have few


def phrases(seed: int) -> list[list[int]]:
    """200 replies with common tokens, and some that begin alike."""
    rng, frequency = np.random.default_rng(seed), 1 / np.arange(1, 301)
    draw = lambda: rng.choice(300, rng.integers(3, 30), p=frequency / frequency.sum())  # noqa: E731
    return [[*[int(rng.integers(9))] * (3 * (rng.random() < .3)), *draw().tolist()]
            for _ in range(200)]


def test_the_interval_of_distinct_2_is_as_wide_as_fresh_replies_scatter():
    spread = 2 * 1.96 * np.std([distinct_n(phrases(seed)) for seed in range(120)])
    widths = [high - low for _, low, high in (distinct_interval(phrases(s)) for s in range(12))]
    assert np.mean(widths) == pytest.approx(spread, rel=.25)


def test_distinct_2_of_a_single_reply_has_no_interval():
    value, low, high = distinct_interval([[1, 2, 1, 2]])
    assert value == 2 / 3
    assert math.isnan(low)
    assert math.isnan(high)
