"""The strip: figures against tables counted by hand, and against annotators of whom the truth is known."""
import datetime
import random

import pytest

from serve.strip import TIE, agreement, cohen_kappa, per_hour, strip, wilson

NOON = datetime.datetime(2026, 11, 27, 12, tzinfo=datetime.timezone.utc)


def event(card, choice, annotator="me", order=(0, 1), minute=0.0, **fields):
    number = event.number = getattr(event, "number", 0) + 1
    return {"id": f"{number:016x}", "annotator": annotator, "kind": "pair", "card": card, "choice": choice,
            "order": list(order), "time": (NOON + datetime.timedelta(minutes=minute)).isoformat(), **fields}


# ---- Cohen's kappa -------------------------------------------------------------------------------

@pytest.mark.parametrize("table,expected", [
    ([[20, 5], [10, 15]], .4),  # observed .7, by chance .5
    ([[45, 15], [25, 15]], (.60 - .54) / (1 - .54)),
    ([[25, 35], [5, 35]], (.60 - .46) / (1 - .46)),
    ([[10, 0], [0, 10]], 1.0),
    ([[0, 10], [10, 0]], -1.0),
    ([[4, 4], [4, 4]], 0.0),
    ([[0, 10], [0, 0]], 0.0),  # each always says the same, and not what the other says
    ([[7, 0], [0, 0]], None),  # chance alone is always right
    ([[0, 0], [0, 0]], None),
    # Three answers: observed 10/20, by chance (8·6 + 7·9 + 5·5) / 400.
    ([[3, 4, 1], [2, 4, 1], [1, 1, 3]], (10 / 20 - 136 / 400) / (1 - 136 / 400))])
def test_kappa_equals_tables_counted_by_hand(table, expected):
    counts = {(i, j): n for i, row in enumerate(table) for j, n in enumerate(row)}
    assert cohen_kappa(counts) == (None if expected is None else pytest.approx(expected))


def test_kappa_is_the_same_whoever_is_called_first():
    counts = {(a, b): random.Random(3 * a + b).randrange(9) for a in range(3) for b in range(3)}
    assert cohen_kappa(counts) == pytest.approx(cohen_kappa({(b, a): n for (a, b), n in counts.items()}))


def test_agreement_does_not_depend_on_which_reply_is_called_first():
    draw = random.Random(0)
    pairs = [(draw.choice((0, 0, 0, 1, TIE)), draw.choice((0, 0, 0, 1, TIE))) for _ in range(200)]
    other = {0: 1, 1: 0, TIE: TIE}
    renamed = [(other[a], other[b]) if draw.random() < .5 else (a, b) for a, b in pairs]
    assert agreement(renamed) == pytest.approx(agreement(pairs))


def test_two_who_agree_that_one_checkpoint_is_nearly_always_better_agree():
    pairs = [(0, 0)] * 90 + [(0, 1)] * 5 + [(1, 0)] * 5
    assert cohen_kappa({(0, 0): 90, (0, 1): 5, (1, 0): 5}) < 0  # for all that they say the same of 90 %
    assert agreement(pairs)["kappa"] == pytest.approx(.8)


def test_ties_count_as_an_answer_or_not_at_all():
    found = agreement([(0, 0)] * 6 + [(0, TIE)] * 2 + [(TIE, TIE)] * 2)
    # With both namings, of 20: 0, 1 and tie are 8, 8 and 4 for one, 6, 6 and 8 for the other.
    assert found["kappa"] == pytest.approx((.8 - .32) / .68)
    assert found["agree"] == pytest.approx(.8)
    assert (found["n"], found["n_without_ties"]) == (10, 6)
    assert found["kappa_without_ties"] == pytest.approx(1)


def test_without_cards_in_common_there_is_no_agreement():
    assert agreement([]) == {"n": 0, "agree": None, "kappa": None, "n_without_ties": 0, "kappa_without_ties": None}
    assert agreement([(TIE, TIE)] * 3)["kappa"] is None


# ---- with oneself ----------------------------------------------------------------------------------

def asked_twice(choose, n=40, seed=0):
    """The events of somebody who answers n cards, and each again with its sides swapped. choose(order, draw)
    is what they say."""
    draw, events = random.Random(seed), []
    for i in range(n):
        order = draw.choice([(0, 1), (1, 0)])
        events.append(event(f"c{i}", choose(order, draw), order=order))
        events.append(event(f"r{i}", choose(order[::-1], draw), order=order[::-1], again=f"c{i}"))
    return events


def test_whoever_goes_by_the_side_disagrees_with_themselves_wholly():
    found = strip(asked_twice(lambda *_: "left"), "me")
    assert found["self"]["kappa"] == found["self"]["kappa_without_ties"] == pytest.approx(-1)
    assert (found["self"]["agree"], found["self"]["n"]) == (0, 40)
    assert found["left"]["share"] == 1
    one_order = [e for e in asked_twice(lambda *_: "right") if e["order"] == ([0, 1] if "again" not in e else [1, 0])]
    assert strip(one_order, "me")["self"]["kappa"] == pytest.approx(-1)


def test_whoever_goes_by_the_reply_agrees_with_themselves_wholly():
    found = strip(asked_twice(lambda order, _: ("left", "right")[order[0]]), "me")
    assert found["self"]["kappa"] == pytest.approx(1)
    assert found["left"]["low"] < .5 < found["left"]["high"]


def test_whoever_throws_a_coin_has_a_kappa_near_0():
    found = strip(asked_twice(lambda _, draw: draw.choice(("left", "right")), 2000), "me")
    assert abs(found["self"]["kappa"]) < .1


def test_both_bad_agrees_with_a_tie():
    found = strip([event("c", "tie"), event("r", "both_bad", again="c"), event("d", "left"),
                   event("s", "right", order=(1, 0), again="d")], "me")
    assert found["self"]["agree"] == 1
    assert found["self"]["kappa"] == pytest.approx(1)


# ---- with others -----------------------------------------------------------------------------------

def test_others_are_compared_on_the_cards_in_common_whatever_their_sides():
    events = [event(f"c{i}", "left", order=(0, 1)) for i in range(8)]
    events += [event(f"c{i}", "right", "ann", order=(1, 0)) for i in range(4, 12)]  # the same replies
    events += [event(f"c{i}", "left", "bob", order=(1, 0)) for i in range(2)]  # the other ones
    events += [event("c99", "left", "eve")]
    found = strip(events, "me")["others"]
    assert found == {"ann": agreement([(0, 0)] * 4), "bob": agreement([(0, 1)] * 2)}
    assert strip(events, "ann")["others"]["me"] == found["ann"]


def test_what_was_undone_or_answered_anew_counts_no_more():
    events = [event("c", "left"), event("c", "right"), event("d", "left"), event("c", "right", "ann")]
    events.append({"id": "f" * 16, "annotator": "me", "kind": "undo", "of": events[2]["id"]})
    found = strip(events, "me")
    assert found["saved"] == 1
    assert (found["left"]["share"], found["left"]["n"]) == (0, 1)
    assert found["others"]["ann"]["agree"] == 1


def test_a_beginners_strip_is_empty():
    assert strip([], "me") == {"saved": 0, "per_hour": None, "left": {"share": None, "low": None, "high": None, "n": 0},
                               "self": agreement([]), "others": {}}


def test_ratings_and_labels_are_counted_and_tell_no_side():
    events = [{"id": f"{i:016x}", "annotator": "me", "kind": kind, "card": f"k{i}", "time": NOON.isoformat()}
              for i, kind in enumerate(("rating", "label", "skip", "edit"))]
    found = strip(events, "me")
    assert (found["saved"], found["left"]["n"]) == (2, 0)


# ---- rate and share --------------------------------------------------------------------------------

def test_the_rate_is_that_of_the_last_hour():
    assert per_hour([event("c", "left")]) is None
    assert per_hour([event(f"c{i}", "left", minute=i / 2) for i in range(11)]) == 120
    slow_then_fast = [event(f"c{i}", "left", minute=m) for i, m in enumerate([0, 10, 20, 200, 201, 202, 203])]
    assert per_hour(slow_then_fast) == 60
    imported = [event(f"i{i}", "left", minute=203) | {"imported": True} for i in range(50)]
    assert per_hour([*slow_then_fast, *imported]) == 60


@pytest.mark.parametrize("k,n,low,high", [(0, 10, 0, .2775), (8, 10, .4902, .9433), (10, 10, .7225, 1),
                                          (53, 100, .4329, .6249)])
def test_wilsons_interval_equals_published_values(k, n, low, high):
    found = wilson(k, n)
    assert (found["low"], found["high"]) == (pytest.approx(low, abs=5e-4), pytest.approx(high, abs=5e-4))


def test_wilsons_interval_covers_the_truth_in_95_of_100_cases():
    draw, covered = random.Random(0), 0
    for _ in range(2000):
        found = wilson(sum(draw.random() < .53 for _ in range(60)), 60)
        covered += found["low"] <= .53 <= found["high"]
    assert .93 < covered / 2000 < .97
