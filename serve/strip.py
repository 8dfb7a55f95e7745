"""What the strip below the question says: progress, rate, side, and agreement with oneself and others.

    strip(log.events, "me")["left"]      {"share": 0.53, "low": 0.47, "high": 0.59, "n": 240}

Agreement is about the replies, not the sides on which they stood: of a card's repetition with swapped
sides, whoever goes by the side says the opposite.
"""
import datetime
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from data.answers import GONE, fates
from serve.exports import saved

HOUR = 3600.0
TIE = "tie"  # "both bad" is one, too: neither reply is better


def strip(events: Iterable[dict], annotator: str) -> dict[str, Any]:
    """The figures of one annotator, from the events of a log:

    saved        answers that hold
    per_hour     answers an hour, by those of the hour before the last one; None for fewer than two
    left         share of decided pairs in which the left reply was chosen, with its 95 % interval
    self         agreement with oneself, over the cards that came again: see `agreement`
    others       {name: agreement} with everybody who answered a card that this annotator did
    """
    events = list(events)
    known = fates(events)
    holds = [event for event in events if known.get(event["id"]) not in GONE]
    mine = [event for event in holds if event["annotator"] == annotator]
    first, again = verdicts(mine)
    others = {}
    for name in sorted({event["annotator"] for event in holds} - {annotator}):
        theirs, _ = verdicts(event for event in holds if event["annotator"] == name)
        if shared := [card for card in first if card in theirs]:
            others[name] = agreement([(first[card], theirs[card]) for card in shared])
    sides = [event["choice"] for event in mine if event.get("choice") in ("left", "right")]
    return {"saved": saved(events, annotator), "per_hour": per_hour(mine),
            "left": wilson(sides.count("left"), len(sides)),
            "self": agreement([(first[card], again[card]) for card in again if card in first]), "others": others}


def verdicts(events: Iterable[dict]) -> tuple[dict[str, int | str], dict[str, int | str]]:
    """({card: what was said of it}, {card: what was said of its repetition}) of one annotator's comparisons:
    the number of the better reply, 0 or 1, or TIE."""
    first, again = {}, {}
    for event in events:
        if event["kind"] != "pair" or not {"card", "choice"} <= set(event):
            continue
        side = {"left": 0, "right": 1}.get(event["choice"])
        said = TIE if side is None else event.get("order", [0, 1])[side]
        if "again" in event:
            again[event["again"]] = said
        else:
            first[event["card"]] = said
    return first, again


def per_hour(events: Sequence[dict]) -> float | None:
    """Answers an hour, by those of the hour that ends with the last one; None for fewer than two."""
    times = sorted(datetime.datetime.fromisoformat(event["time"]).timestamp() for event in events
                   if event["kind"] in ("pair", "rating", "label") and "time" in event and not event.get("imported"))
    recent = [time for time in times if time > times[-1] - HOUR]
    if len(recent) < 2:
        return None
    return round((len(recent) - 1) / max(recent[-1] - recent[0], 1.0) * HOUR, 1)


def wilson(k: int, n: int, z: float = 1.959964) -> dict[str, float | int | None]:
    """A share k/n with its interval (Wilson 1927), which stays between 0 and 1; None where n is 0.

    >>> {name: round(x, 3) for name, x in wilson(8, 10).items()}
    {'share': 0.8, 'low': 0.49, 'high': 0.943, 'n': 10}
    """
    if not n:
        return {"share": None, "low": None, "high": None, "n": 0}
    share, scale = k / n, 1 + z * z / n
    middle = (share + z * z / (2 * n)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return {"share": share, "low": max(0.0, middle - half), "high": min(1.0, middle + half), "n": n}


# ---- agreement -------------------------------------------------------------------------------------

def agreement(pairs: Sequence[tuple]) -> dict[str, float | int | None]:
    """n cards, the share on which both say the same, kappa with ties as a third answer, and
    kappa_without_ties over the cards that both decide (n_without_ties of them). pairs: two verdicts on each
    card.

    Which of a card's replies is called 0 is arbitrary, and with it how often each is said to be better.
    So chance is counted with both namings: a card enters the table twice, as it is and with 0 and 1
    exchanged. Otherwise two persons who agree that one checkpoint is nearly always better would have a
    kappa near 0.
    """
    decided = [both for both in pairs if TIE not in both]
    return {"n": len(pairs), "agree": sum(a == b for a, b in pairs) / len(pairs) if pairs else None,
            "kappa": kappa_of(pairs), "n_without_ties": len(decided), "kappa_without_ties": kappa_of(decided)}


def kappa_of(pairs: Sequence[tuple]) -> float | None:
    """`cohen_kappa` of these pairs of verdicts under both namings of the replies."""
    other = {0: 1, 1: 0}
    return cohen_kappa(Counter([*pairs, *((other.get(a, a), other.get(b, b)) for a, b in pairs)]))


def cohen_kappa(counts: Mapping[tuple, int]) -> float | None:
    """Agreement beyond chance (Cohen 1960): (observed - chance) / (1 - chance); 1 is perfect, 0 what chance
    gives, below 0 less than that. None without any pair, and where chance alone is always right.

    counts: how often one said a and the other b, by (a, b).

    >>> round(cohen_kappa({("yes", "yes"): 20, ("yes", "no"): 5, ("no", "yes"): 10, ("no", "no"): 15}), 6)
    0.4
    """
    n = sum(counts.values())
    if not n:
        return None
    one, other = Counter(), Counter()
    for (a, b), k in counts.items():
        one[a] += k
        other[b] += k
    observed = sum(k for (a, b), k in counts.items() if a == b) / n
    chance = sum(one[x] * other[x] for x in one) / n ** 2
    return None if math.isclose(chance, 1) else (observed - chance) / (1 - chance)
