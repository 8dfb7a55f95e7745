"""The n-gram regression of pairs and of ratings: its optimum, its units, and what it may not see. That of
labels is in test_judge.py."""
import numpy as np
import pytest
import torch

from data.ngrams import NgramRegression
from runtime.statistics import correlation, share_above

WORDS = "good bad fine poor nice sad".split()
WORTH = dict(zip(WORDS, (2, -2, 1, -1, 1.5, -1.5), strict=True))


def texts_of(n, seed=0):
    """(n texts of four words, the sum of what these are worth)."""
    drawn = np.random.default_rng(seed).choice(WORDS, (n, 4))
    return [" ".join(row) for row in drawn], np.array([sum(WORTH[w] for w in row) for row in drawn])


def gradient(regression, texts, slopes):
    """Σ slope · x + l2 · w, by the definition of the loss."""
    rows, numbers, values = regression.features(texts)
    slopes = torch.tensor(slopes).float()
    return (torch.zeros(regression.n_features).index_add(0, numbers, slopes[rows] * values)
            + regression.l2 * regression.weight)


@pytest.fixture(scope="module")
def of_ratings():
    texts, worth = texts_of(300)
    return NgramRegression(n_features=2**12, l2=1e-3, unit="words", orders=(1,),
                           kind="scores").fit(texts, 50 + 10 * worth)


@pytest.fixture(scope="module")
def of_pairs():
    """A regression of 300 pairs, with the texts and outcomes that it learned from."""
    texts, worth = texts_of(600, seed=1)
    better = worth[:300] >= worth[300:]
    first = [texts[i] if b else texts[300 + i] for i, b in enumerate(better)]
    second = [texts[300 + i] if b else texts[i] for i, b in enumerate(better)]
    outcomes = np.where(worth[:300] == worth[300:], .5, 1.0)
    made = NgramRegression(n_features=2**12, l2=1e-3, unit="words", orders=(1,), kind="pairs")
    return made.fit(first + second, outcomes), first + second, outcomes


def test_ratings_are_learned_and_predicted_in_their_own_unit(of_ratings):
    texts, worth = texts_of(200, seed=2)
    predicted = of_ratings.scores(texts) * of_ratings.spread + of_ratings.mean
    assert correlation(predicted, worth) > .95
    assert np.abs(predicted - (50 + 10 * worth)).mean() < 10


def test_the_ridges_optimum_has_no_gradient(of_ratings):
    texts, worth = texts_of(300)
    target = (worth - worth.mean()) / worth.std()
    slopes = (of_ratings.scores(texts) - target) / 300
    assert float(gradient(of_ratings, texts, slopes).abs().max()) < 1e-4
    assert abs(slopes.sum()) < 1e-4


@pytest.mark.parametrize("scale,shift", [(1e-3, 0), (1e3, -7)])
def test_ratings_of_any_scale_teach_the_same(of_ratings, scale, shift):
    texts, worth = texts_of(300)
    other = NgramRegression(*of_ratings.settings()).fit(texts, scale * worth + shift)
    assert np.allclose(other.scores(texts), of_ratings.scores(texts), atol=1e-4)


def test_pairs_are_learned(of_pairs):
    texts, worth = texts_of(400, seed=3)
    scores = of_pairs[0].scores(texts)
    better, worse = (np.where(worth[:200] > worth[200:], a, b) for a, b in (
        (scores[:200], scores[200:]), (scores[200:], scores[:200])))
    differ = worth[:200] != worth[200:]
    assert share_above(better[differ], worse[differ]) > .95


def test_the_optimum_of_pairs_has_no_gradient_and_no_bias(of_pairs):
    regression, texts, outcomes = of_pairs
    first, second = np.split(regression.scores(texts), 2)
    error = (1 / (1 + np.exp(second - first)) - outcomes) / 300
    assert float(gradient(regression, texts, [*error, *-error]).abs().max()) < 1e-4
    assert abs(float(regression.bias)) < 1e-9


def test_a_tie_counts_as_half_a_win_of_each_side(of_pairs):
    """Two ties of a pair are the pair once this way round and once that way round."""
    regression, texts, outcomes = of_pairs
    first, second = texts[:300], texts[300:]
    half = NgramRegression(*regression.settings()).fit(first * 2 + second * 2, [.5] * 600)
    both = NgramRegression(*regression.settings()).fit(first + second + second + first, [1.] * 600)
    assert np.allclose(half.scores(texts), both.scores(texts), atol=1e-4)
    assert np.allclose(half.scores(texts), 0, atol=1e-4)


def test_a_saved_one_says_the_same_in_the_same_unit(of_ratings, tmp_path):
    torch.save(of_ratings.state_dict(), tmp_path / "r.pt")
    loaded = NgramRegression.from_state(torch.load(tmp_path / "r.pt", weights_only=True))
    texts, _ = texts_of(20, seed=4)
    assert np.array_equal(loaded.scores(texts), of_ratings.scores(texts))
    assert (loaded.mean, loaded.spread, loaded.kind) == (of_ratings.mean, of_ratings.spread, "scores")
