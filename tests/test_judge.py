"""The n-gram regression learns what is there to learn, is the same each time, and the two shares of feedback
have no text in common."""
import itertools
import types

import numpy as np
import pytest
import torch

from data.judge import (FORMS, L2S, ModelJudge, NgramJudge, agreement, fit_best, ngram_regressions,
                        plain_text, shown_to_people, texts_and_target)
from data.ngrams import NgramRegression
from data.batches import reward_rows
from data.prepare import open_data
from runtime.options import run_main
from runtime.statistics import auc
from tests.conftest import made_up_reviews


@pytest.fixture(scope="module")
def reviews():
    """(texts, labels) of 800 made-up reviews, mixed."""
    texts, labels = made_up_reviews(True) + made_up_reviews(False), [1] * 400 + [0] * 400
    order = np.random.default_rng(0).permutation(800)
    return [texts[i] for i in order], [labels[i] for i in order]


@pytest.fixture(scope="module")
def fitted(reviews):
    """A classifier that learned from the first 600."""
    texts, labels = reviews
    return NgramRegression(n_features=2**14).fit(texts[:600], labels[:600])


@pytest.fixture(scope="module")
def data(reviews_source, tmp_path_factory):
    return open_data("reviews", source=str(reviews_source), vocab_size=400,
                     cache=tmp_path_factory.mktemp("cache"))


def test_it_learns(reviews, fitted):
    texts, labels = reviews
    assert auc(fitted.scores(texts[600:]), labels[600:]) > .99


def test_its_probabilities_are_those_of_its_log_odds(reviews, fitted):
    logits = fitted.scores(reviews[0][600:])
    assert np.allclose(fitted.probs(reviews[0][600:]), 1 / (1 + np.exp(-logits)))


def test_a_saved_one_says_the_same(reviews, fitted, tmp_path):
    torch.save(fitted.state_dict(), tmp_path / "c.pt")
    loaded = NgramRegression.from_state(torch.load(tmp_path / "c.pt", weights_only=True))
    assert np.array_equal(loaded.scores(reviews[0][600:]), fitted.scores(reviews[0][600:]))
    assert loaded.settings() == fitted.settings()


def test_its_hash_is_the_same_everywhere():
    def by_definition(gram: str) -> int:
        h = len(gram)
        for c in gram:
            h = (h * 0x9E3779B97F4A7C15 + ord(c)) * 0xBF58476D1CE4E5B9 % 2**64
            h ^= h >> 29
        return h % 2**18

    expected = {"好": 2, "书": 1, "好书": 1, "书好": 1, "好书好": 1}
    assert NgramRegression().ngrams("好书好") == {by_definition(gram): n for gram,
                                               n in expected.items()}


def test_order_matters_to_it_through_longer_grams_only():
    single, double = NgramRegression(orders=(1,)), NgramRegression(orders=(1, 2))
    assert single.ngrams("好不") == single.ngrams("不好")
    assert double.ngrams("好不") != double.ngrams("不好")


def test_a_text_without_ngrams_has_the_log_odds_of_the_bias(fitted):
    assert fitted.scores(["", "好"])[0] == float(fitted.bias)


def test_each_text_has_features_of_length_1(reviews, fitted):
    rows, _, values = fitted.features(reviews[0][:50])
    lengths = torch.zeros(50).index_add_(0, rows, values * values).sqrt()
    assert torch.allclose(lengths, torch.ones(50), atol=1e-5)


def test_noise_teaches_it_nothing_that_generalises(reviews):
    texts, _ = reviews
    labels = np.random.default_rng(5).integers(0, 2, 800)
    classifier = NgramRegression(n_features=2**14).fit(texts[:600], labels[:600])
    assert abs(auc(classifier.scores(texts[600:]), labels[600:]) - .5) < .12


def test_its_optimum_has_no_gradient(reviews):
    texts, labels = reviews[0][:200], reviews[1][:200]
    classifier = NgramRegression(n_features=2**14, l2=1e-3).fit(texts, labels)
    rows, numbers, values = classifier.features(texts)
    error = torch.from_numpy(classifier.probs(texts)).float() - torch.tensor(labels).float()
    gradient = torch.zeros(2**14).index_add(0, numbers, error[rows] * values / 200) + 1e-3 * classifier.weight
    assert float(gradient.abs().max()) < 1e-4
    assert abs(float(error.mean())) < 1e-4


def test_it_is_the_same_whenever_it_is_fitted():
    rng, threads = np.random.default_rng(0), torch.get_num_threads()
    # enough for several threads
    texts = ["".join(map(chr, row)) for row in rng.integers(0x4E00, 0x4E80, (800, 50))]
    labels = rng.integers(0, 2, 800)
    torch.set_num_threads(4)
    try:
        a, b = (NgramRegression().fit(texts, labels) for _ in range(2))
        assert torch.equal(a.weight, b.weight)
        assert torch.equal(a.bias, b.bias)
        assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(threads)


def test_its_words_are_parted_by_spaces_and_signs():
    words = NgramRegression(orders=(1,), unit="words")
    assert words.ngrams("Good, good book!") == words.ngrams("book good , GOOD !")
    assert len(words.ngrams("Good, good book!")) == 4
    assert words.ngrams("Good") != words.ngrams("Go od")


def test_naive_bayes_gives_no_weight_to_what_both_kinds_of_texts_hold_alike():
    classifier = NgramRegression(naive_bayes=True, orders=(1,))
    classifier.fit(["是好", "是好", "是坏", "是坏"], [1, 1, 0, 0])
    shared, telling = (next(iter(classifier.ngrams(c))) for c in "是好")
    assert float(classifier.idf[shared]) == pytest.approx(0, abs=1e-6)
    # (2 + 1) / (4 + 2^18) against (0 + 1) / (4 + 2^18)
    assert float(classifier.idf[telling]) == pytest.approx((np.log(5 / 3) + 1) * np.log(3))


# ---- baseline and judge --------------------------------------------------------------------------

@pytest.mark.parametrize("half", ["reward", "judge"])
def test_each_half_learns_from_its_own_records_and_is_kept(data, half):
    records, test = data.records(half, "train"), [plain_text(r)
                                                  for r in data.records("reward", "test")]
    expected = NgramRegression(*ngram_regressions(data, half)[""].settings()).fit(
        [plain_text(r) for r in records], [r["label"] for r in records]).scores(test)
    assert np.allclose(ngram_regressions(data, half)[""].scores(test), expected, atol=1e-4)
    assert (data.folder / f"ngrams_{half}.pt").exists()
    assert np.allclose(ngram_regressions(data, half)[""].scores(test), expected, atol=1e-4)  # loaded


def test_the_two_halves_share_no_text(data):
    reward, judge = ({plain_text(r) for r in data.records(half, "train")}
                     for half in ("reward", "judge"))
    assert not reward & judge


def as_records(texts, labels):
    return [{"prompt": "", "response": t, "label": int(y)} for t, y in zip(texts, labels, strict=True)]


def reached(form, train, val):
    """AUC on val of a form fitted on train."""
    form.fit(*texts_and_target(train))
    return auc(form.scores([plain_text(r) for r in val]), [r["label"] for r in val])


def words_in_any_order(n, rng):
    """Texts of two words of the letters a to c, liked if a word is repeated: only pairs of words
    tell."""
    words = ["".join(word) for word in itertools.product("abc", repeat=4)]
    liked = rng.integers(0, 2, n)
    firsts = rng.choice(words[:30], n)
    return [f"{w} {w if y else rng.choice(words[30:60])}" for w, y in zip(firsts, liked, strict=True)], liked


def noisy_reviews(n, rng):
    """Half of a made-up review's characters, mixed, with one label in ten turned round."""
    texts, labels = made_up_reviews(True) + made_up_reviews(False), [1] * 400 + [0] * 400
    index = rng.integers(0, 800, n)
    return (["".join(rng.permutation(list(texts[i]))[:len(texts[i]) // 2]) for i in index],
            [labels[i] ^ int(rng.random() < .1) for i in index])


@pytest.mark.parametrize("texts_of", [words_in_any_order, noisy_reviews])
def test_the_baselines_form_is_the_best_on_validation(texts_of):
    rng = np.random.default_rng(1)
    train, val = (as_records(*texts_of(n, rng)) for n in (500, 300))
    best = fit_best(train, val)
    others = [NgramRegression(l2=L2S["labels"][0], orders=orders, unit=unit, naive_bayes=naive_bayes)
              for unit, orders in FORMS for naive_bayes in (False, True)]
    others += [NgramRegression(l2=l2, orders=best.orders, unit=best.unit, naive_bayes=best.naive_bayes)
               for l2 in L2S["labels"]]
    at_best = auc(best.scores([plain_text(r) for r in val]), [r["label"] for r in val])
    assert at_best > max(reached(form, train, val) for form in others) - .003
    assert at_best >= reached(NgramRegression(), train, val) - .003


def test_the_baseline_is_chosen_on_validation_and_the_judge_has_one_form(data, tmp_path, monkeypatch):
    asked, empty = [], types.SimpleNamespace(folder=tmp_path, records=data.records,
                                             has=data.has)
    monkeypatch.setattr("data.judge.fit_best", lambda train, val: asked.append(val)
                        or NgramRegression(l2=.5).fit(["好", "坏"], [1, 0]))
    assert ngram_regressions(empty, "reward")[""].l2 == .5
    assert asked == [data.records("reward", "val")]
    assert ngram_regressions(empty, "judge")[""].settings() == NgramRegression().settings()
    assert len(asked) == 1


def test_a_choice_among_other_forms_is_made_again(data, monkeypatch):
    before = ngram_regressions(data, "reward")[""]
    monkeypatch.setattr("data.judge.L2S", {"labels": (.5, .3)})
    assert ngram_regressions(data, "reward")[""].l2 != before.l2


def test_a_damaged_one_is_fitted_again(data):
    before = ngram_regressions(data, "judge")[""]
    path = data.folder / "ngrams_judge.pt"
    for damaged in (b"", path.read_bytes()[:1000]):
        path.write_bytes(damaged)
        assert torch.equal(ngram_regressions(data, "judge")[""].weight, before.weight)


def test_one_with_other_settings_is_fitted_again(data, reviews, fitted):
    torch.save(fitted.state_dict(), data.folder / "ngrams_judge.pt")
    assert ngram_regressions(data, "judge")[""].settings() == NgramRegression().settings()


@pytest.mark.parametrize("harm", [lambda raw: raw[:len(raw) // 2], lambda raw: b"",
                                  lambda raw: raw[:len(raw) // 2] + bytes(len(raw) // 2),
                                  lambda raw: raw[:len(raw) // 2] + bytes([raw[len(raw) // 2] ^ 64])
                                  + raw[len(raw) // 2 + 1:]])
def test_a_damaged_one_is_fitted_again_and_never_believed(data, harm, capsys):
    path, test = data.folder / "ngrams_judge.pt", ["还可以"]
    expected = ngram_regressions(data, "judge")[""].scores(test)
    path.write_bytes(harm(path.read_bytes()))
    assert ngram_regressions(data, "judge")[""].scores(test) == expected
    assert "ngrams_judge.pt: damaged, fitted again" in capsys.readouterr().out
    assert ngram_regressions(data, "judge")[""].scores(test) == expected
    assert capsys.readouterr().out == ""


def test_prompt_and_response_are_read_as_one_text():
    assert plain_text({"prompt": "这本", "response": "书"}) == "这本书"
    assert plain_text({"prompt": [{"role": "user", "content": "a"}], "response": "b"}) == "ab"


def test_a_full_disk_while_it_is_saved_is_one_clear_line(data, tmp_path, capsys, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("runtime.storage.os.fsync", full)
    broken = types.SimpleNamespace(folder=tmp_path, records=data.records, has=data.has)
    assert run_main(lambda argv: ngram_regressions(broken, "judge") and 0, []) == 2
    assert capsys.readouterr().err.startswith("error: ")


# ---- the judges ----------------------------------------------------------------------------------

def test_the_ngram_judge_reads_prompt_and_reply_as_one_text(reviews, fitted):
    texts = reviews[0][600:620]
    probs = NgramJudge({"": fitted}).probs([t[:3] for t in texts], [t[3:] for t in texts])
    assert np.array_equal(probs, fitted.probs(texts))


def test_the_model_judge_reads_the_rows_that_a_reward_model_learned_from(data):
    seen = []
    model = types.SimpleNamespace(score_rows=lambda rows: seen.extend(rows) or torch.arange(2.) - 1)
    records = data.records("reward", "val")[:2]
    judge = ModelJudge(model, data.tokenizer, data.template, 24)
    probs = judge.probs([r["prompt"] for r in records], [r["response"] for r in records])
    assert seen == reward_rows(records, data.tokenizer, data.template, 24)
    assert probs == pytest.approx([1 / (1 + np.e), .5])


# ---- judges of pairs and of ratings --------------------------------------------------------------

def feedback(kind, n, seed=0):
    """Records of texts of five words, of which "good" is worth 1 and "bad" −1."""
    rng = np.random.default_rng(seed)

    def drawn():
        return [" ".join(row) for row in rng.choice(["good", "bad", "it", "is", "so"], (n, 5))]

    def worth(text):
        return text.count("good") - text.count("bad")

    firsts, seconds = drawn(), drawn()
    if kind == "scores":
        return [{"prompt": "it ", "response": t, "score": 60.0 + 20 * worth(t)} for t in firsts]
    made = [sorted(pair, key=worth, reverse=True) for pair in zip(firsts, seconds, strict=True)]
    return [{"prompt": [{"role": "user", "content": f"{i}"}], "chosen": a, "rejected": b}
            | ({"tie": True} if worth(a) == worth(b) else {}) for i, (a, b) in enumerate(made)]


class Folder:
    """A prepared data set with this feedback, and as much for judges."""

    def __init__(self, path, kind, parts=("",)):
        self.folder, self.stages = path, ("reward", "judge")
        self.kept = {(stage, split): [r | ({"part": part} if part else {}) for part in parts
                                      for r in feedback(kind, n, seed=i)]
                     for i, (stage, split, n) in enumerate((("reward", "train", 300), ("judge", "train", 300),
                                                            ("reward", "val", 100)))}

    def has(self, stage):
        return stage in self.stages

    def records(self, stage, split):
        return self.kept[stage, split]


@pytest.fixture(params=["pairs", "scores"])
def folder(request, tmp_path):
    return Folder(tmp_path, request.param)


def test_a_judge_of_pairs_or_ratings_calls_neutral_what_is_average(folder):
    judge = NgramJudge(ngram_regressions(folder, "judge"), shown_to_people(folder))
    good, bad, even = judge.probs(["it "] * 3, ["good good so", "bad bad so", "good bad so"])
    assert bad < .3 < .7 < good
    assert even == pytest.approx(.5, abs=.1)
    people = [r[f] for r in folder.records("reward", "val") for f in ("chosen", "rejected", "response") if f in r]
    assert .35 < (judge.probs(["it "] * len(people), people) > .5).mean() < .65


def test_pairs_make_the_mean_score_of_what_people_read_neutral():
    class Fixed(NgramRegression):
        def scores(self, texts):
            return np.array([7.0 + len(text) for text in texts], np.float32)

    judge = NgramJudge({"": Fixed(kind="pairs")}, [("", "a"), ("", "abc")])
    assert judge.centre == 9
    assert judge.probs(["x"], ["ab"]) == pytest.approx(.5)
    assert judge.probs(["x"], ["abc"]) == pytest.approx(1 / (1 + np.exp(-1)))


def test_a_judge_of_pairs_reads_replies_alone_and_one_of_ratings_the_prompt_too(folder):
    judge = NgramJudge(ngram_regressions(folder, "judge"))
    a, b = judge.probs(["it ", "good good good "], ["so", "so"])
    assert (a == b) == ("chosen" in folder.records("judge", "train")[0])


def test_a_judge_over_parts_is_the_mean_of_its_parts(tmp_path):
    folder = Folder(tmp_path, "pairs", parts=("length", "truth"))
    regressions = ngram_regressions(folder, "judge")
    assert list(regressions) == ["length", "truth"]
    again = ngram_regressions(folder, "judge")  # loaded
    texts = ["good so", "bad it"]
    expected = np.mean([again[part].scores(texts) for part in regressions], axis=0)
    assert np.allclose(NgramJudge(regressions).scores(["", ""], texts), expected)


def test_the_transformer_judge_is_centred_on_people_too_and_skips_prompts_it_cannot_read(data):
    def lengths(rows):
        assert max(len(ids) for ids, _ in rows) <= 60
        return torch.tensor([float(sum(flags)) for _, flags in rows])

    model = types.SimpleNamespace(score_rows=lengths)
    people = [("短", "好"), ("短", "好书好书"), ("长" * 200, "好")]
    judge = ModelJudge(model, data.tokenizer, "{prompt}", 60, people)
    assert [judge.reads(prompt) for prompt, _ in people] == [True, True, False]
    assert judge.centre == np.mean([judge.scores([p], [t])[0] for p, t in people[:2]])


def test_baselines_of_pairs_and_ratings_are_chosen_on_validation(folder):
    best = ngram_regressions(folder, "reward")[""]
    val = folder.records("reward", "val")
    at_best = agreement(best.kind, best.scores(texts_and_target(val)[0]), texts_and_target(val)[1])
    for unit, orders in FORMS:
        other = NgramRegression(l2=L2S[best.kind][0], unit=unit, orders=orders, kind=best.kind)
        other.fit(*texts_and_target(folder.records("reward", "train")))
        assert at_best >= agreement(best.kind, other.scores(texts_and_target(val)[0]),
                                    texts_and_target(val)[1]) - .005


def test_without_feedback_for_the_reward_a_judge_brought_along_has_the_fixed_form(tmp_path):
    folder = Folder(tmp_path, "scores")
    folder.stages = ("judge",)
    assert ngram_regressions(folder, "judge")[""].l2 == L2S["scores"][0]
    assert shown_to_people(folder) == []
