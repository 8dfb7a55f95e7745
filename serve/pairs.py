"""The next questions for each annotator, prepared in the background.

    pairs = Pairs(Sampled(prompts, [model]), log)      or Pairs(Fixed(read_pairs("pairs.jsonl")), log)
    card = pairs.next("me")                            None: not ready yet, or pairs.done("me")
    log.append(card.record("me", "left"))

Which card is next follows from the log, so after a restart everybody goes on where they stopped. All
annotators get the same cards, each in an order of sides of their own. About one card in REPEAT comes
again, with its sides swapped, GAP cards later or more: it tells how far a person agrees with
themselves. serve/sources.py makes what is asked about.
"""
import contextlib
import dataclasses
import functools
import hashlib
import json
import pathlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from runtime.options import UserError
from serve.log import FeedbackLog

REPEAT = 20  # one card in so many is asked twice
GAP, SPREAD = 5, 10  # cards between the two at least, and how many more there may be
DROPPED_IN_A_ROW = 60  # cards without two different replies, after which that is an error
PER_REPLY = ("rows", "scores")  # in a card's sampling settings
ALONE = {"rate": ("rating", "score", (1, 2, 3, 4, 5)), "label": ("label", "label", (0, 1))}  # what one reply may get
SIDES = {"left": 0, "right": 1}


def digest(*parts: Any) -> str:
    """16 hex digits that follow from these values: an id, or a draw."""
    return hashlib.sha256(json.dumps(parts, ensure_ascii=False, sort_keys=True).encode()).hexdigest()[:16]


# ---- one question ----------------------------------------------------------------------------------

@dataclasses.dataclass(frozen=True)
class Card:
    """A question: two replies to a prompt, of which one is better, or one to be rated or labelled."""

    id: str
    prompt: str | list[dict[str, str]]
    replies: tuple[str, ...]
    names: tuple[str, ...] = ("", "")  # whose they are, shown after the answer
    hashes: tuple[str, ...] = ("", "")  # of these checkpoints
    sampling: dict[str, Any] = dataclasses.field(default_factory=dict)
    order: tuple[int, ...] = (0, 1)  # which of the replies is left, and which right
    again: str = ""  # the card whose repetition with swapped sides this is

    @property
    def turns(self) -> list[list[str]]:
        """The prompt as [speaker, text] of each turn."""
        if isinstance(self.prompt, str):
            return [["user", self.prompt]]
        return [[message["role"], message["content"]] for message in self.prompt]

    @property
    def shown(self) -> list[str]:
        """The replies as they stand, left and right."""
        return [self.replies[i] for i in self.order]

    def record(self, annotator: str, choice: str | int | float, mode: str = "compare", **more: Any) -> dict:
        """The event of an answer, for FeedbackLog.append. choice: left, right, tie, both_bad or skip; with
        mode "rate" a score, with mode "label" 0 or 1. more: id, strength, comment, seconds; None is left
        out. ValueError for another choice."""
        event = {"annotator": annotator, "kind": "skip", "card": self.id, "again": self.again or None, **more}
        if choice == "skip":
            return event
        def by_side(values: Sequence) -> list:
            return [values[i] for i in self.order]

        whose = {"from": by_side(self.names), "hashes": by_side(self.hashes),
                 "sampling": sides_exchanged(self.sampling, by_side) or None}
        event |= {"prompt": self.prompt, **(whose if any(self.names) else {})}
        if mode != "compare":
            kind, field, allowed = ALONE[mode]
            if choice not in allowed:
                raise ValueError(f'"choice" must be one of {", ".join(map(str, allowed))}, or skip')
            return event | {"kind": kind, "response": self.shown[0], field: choice}
        if choice not in ("left", "right", "tie", "both_bad"):
            raise ValueError('"choice" must be left, right, tie, both_bad or skip')
        better = SIDES.get(choice, 0)
        left, right = self.shown
        return event | {"kind": "pair", "choice": choice, "chosen": self.shown[better],
                        "rejected": self.shown[1 - better], "left": left, "right": right, "order": list(self.order),
                        "tie": True if choice not in SIDES else None,
                        "both_bad": True if choice == "both_bad" else None}

    def edit(self, annotator: str, answer: str, side: str, text: str) -> dict:
        """The event of an edited reply, which belongs to an answer, given by its id. Its own id follows from
        that one's, so that an edit sent twice is stored once."""
        return {"id": digest("edit", answer), "annotator": annotator, "kind": "edit", "of": answer,
                "prompt": self.prompt, "response": text, "original": self.shown[SIDES.get(side, 0)]}


def sides_exchanged(sampling: dict[str, Any], exchange: Callable) -> dict[str, Any]:
    """Sampling settings with what each reply has of its own in another order."""
    return {name: exchange(value) if name in PER_REPLY else value for name, value in sampling.items()}


def card_of(event: dict) -> Card | None:
    """The card that a comparison in the log was about, in the order in which it stood; None if the event
    does not say."""
    if event["kind"] != "pair" or not {"left", "right", "order", "card"} <= set(event):
        return None
    order = event["order"]

    def by_reply(both: Sequence[str]) -> tuple[str, ...]:
        return tuple(both[order.index(i)] for i in (0, 1))

    return Card(event["card"], event["prompt"], by_reply([event["left"], event["right"]]),
                by_reply(event.get("from", ["", ""])), by_reply(event.get("hashes", ["", ""])),
                sides_exchanged(event.get("sampling", {}), lambda both: list(by_reply(both))), tuple(order),
                event.get("again", ""))


@functools.lru_cache(maxsize=100_000)
def repetition_draw(seed: int, card: str, annotator: str) -> int:
    """Whether a card comes again to this annotator, and how much later."""
    return int(digest("repeat", seed, card, annotator), 16)


@dataclasses.dataclass(frozen=True)
class Progress:
    """How far an annotator is, by a log of so many events."""

    length: int
    answered: set[str]  # cards, the skipped ones too
    due: Card | None  # the repetition that comes next


class Source(Protocol):
    """What cards are made from. They are numbered from 0; `n` of them, or None without end. A card's id
    follows from its number, before it is made."""

    n: int | None

    def id(self, number: int) -> str: ...

    def make(self, numbers: Sequence[int]) -> list[Card | None]:
        """The cards of these numbers; None for one that cannot be asked, such as two equal replies."""


class Fixed:
    """Cards that are there already, each id once."""

    def __init__(self, cards: Sequence[Card]):
        self.cards = list({card.id: card for card in cards}.values())
        self.n = len(self.cards)

    def id(self, number: int) -> str:
        return self.cards[number].id

    def make(self, numbers: Sequence[int]) -> list[Card | None]:
        return [self.cards[number] for number in numbers]


# ---- the next question -----------------------------------------------------------------------------

class Pairs:
    """The cards of all annotators. Every method may be called by any thread; one thread of its own makes
    cards, until `close`."""

    def __init__(self, source: Source, log: FeedbackLog, *, seed: int = 0, ahead: int = 8,
                 kept: pathlib.Path | None = None):
        """ahead: how many cards are ready for whoever asks. kept: a file for the cards made, so that one
        that is on somebody's screen is the same after a restart, whatever rounding does to replies."""
        self.source, self.log, self.seed, self.ahead, self.kept = source, log, seed, ahead, kept
        self.changed = threading.Condition()
        self.cards: dict[str, Card | None] = dict(read_kept(kept)) if kept else {}
        self.ids: list[str] = []
        self.progress: dict[str, Progress] = {}
        self.asking = {next((event["annotator"] for event in reversed(log.standing())), "")}
        self.error: Exception | None = None
        self.closed, self.dropped = False, 0
        self.thread = threading.Thread(target=self._prepare, name="pairs", daemon=True)
        self.thread.start()

    def __enter__(self) -> "Pairs":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the thread; it finishes the batch that it is writing."""
        with self.changed:
            self.closed = True
            self.changed.notify_all()
        self.thread.join()

    def next(self, annotator: str, wait: float = 0.0) -> Card | None:
        """The annotator's next card, the same one until it is answered; None while it is being made, for
        which `wait` seconds are waited, or if there is none (`done`). UserError if none can be made."""
        with self.changed:
            self.asking.add(annotator)
            self.changed.notify_all()
            self.changed.wait_for(lambda: self.error or self.closed or self._next(annotator) or self._done(annotator),
                                  wait)
            if self.error:
                error, self.error = self.error, None  # the next call tries again
                raise error if isinstance(error, UserError) else UserError(f"no replies to ask about: {error}"
                                                                           ) from error
            return self._next(annotator)

    def done(self, annotator: str) -> bool:
        """Has the annotator answered all there is?"""
        with self.changed:
            return self._done(annotator)

    def find(self, id: str, annotator: str, wait: float = 0.0) -> Card | None:
        """The card with this id as this annotator sees it, answered or not; None if it is none, or is not
        made within `wait` seconds."""
        with self.changed:
            self.asking.add(annotator)
            self.changed.notify_all()
            self.changed.wait_for(lambda: self.closed or self.error or self._find(id, annotator), wait)
            return self._find(id, annotator)

    def _find(self, id: str, annotator: str) -> Card | None:
        if self.cards.get(id):
            return self._for(self.cards[id], annotator)
        events = [event for event in self.log.standing() if event["kind"] == "pair" and "card" in event]
        for event in events:
            if event["annotator"] == annotator and id == digest("again", event["card"], annotator):
                return self._repetition(event)
        return next((self._for(card, annotator) for event in events
                     if event["card"] == id and (card := card_of(event))), None)

    def _next(self, annotator: str) -> Card | None:
        progress = self._progress(annotator)
        if progress.due is not None:
            return progress.due
        for id in map(self._id, self._open(progress.answered)):
            if id not in self.cards:
                return None
            if (card := self.cards[id]) is not None:
                return self._for(card, annotator)
        return None

    def _done(self, annotator: str) -> bool:
        progress = self._progress(annotator)
        return self.source.n is not None and progress.due is None and all(
            self._dropped(self._id(number)) for number in self._open(progress.answered))

    def _dropped(self, id: str) -> bool:
        """Was the card made, and cannot be asked?"""
        return id in self.cards and self.cards[id] is None

    # ---- what is asked ---------------------------------------------------------------------------

    def _id(self, number: int) -> str:
        while len(self.ids) <= number:
            self.ids.append(self.source.id(len(self.ids)))
        return self.ids[number]

    def _progress(self, annotator: str) -> "Progress":
        """What follows from the log as it is; reckoned once for each event."""
        length, known = len(self.log.found), self.progress.get(annotator)
        if known is None or known.length != length:
            mine = [event for event in self.log.standing() if event["annotator"] == annotator and "card" in event]
            known = Progress(length, {event["card"] for event in mine}, self._due(mine, annotator))
            self.progress[annotator] = known
        return known

    def _open(self, answered: set[str]) -> Iterator[int]:
        """The numbers of the cards that are not answered, without those that cannot be asked, to the end."""
        number = 0
        while self.source.n is None or number < self.source.n:
            if self._id(number) not in answered:
                yield number
            number += 1

    def _for(self, card: Card, annotator: str) -> Card:
        """The card with its sides as this annotator sees them."""
        if len(card.replies) < 2:
            return dataclasses.replace(card, order=(0,))
        swapped = int(digest("order", self.seed, card.id, annotator), 16) % 2
        return dataclasses.replace(card, order=(1, 0) if swapped else (0, 1))

    def _due(self, mine: list[dict], annotator: str) -> Card | None:
        """The first repetition whose time has come. mine: the annotator's answers and skips of cards."""
        repeated = {event["again"] for event in mine if "again" in event}
        cards = [event for event in mine if "again" not in event]
        for i, event in enumerate(cards):
            draw = repetition_draw(self.seed, event["card"], annotator)
            if (draw % REPEAT == 0 and event["card"] not in repeated
                    and len(cards) - i > GAP + draw // REPEAT % SPREAD and card_of(event)):
                return self._repetition(event)
        return None

    def _repetition(self, event: dict) -> Card | None:
        card = card_of(event)
        return card and dataclasses.replace(card, id=digest("again", card.id, event["annotator"]), again=card.id,
                                            order=card.order[::-1])

    # ---- the thread --------------------------------------------------------------------------------

    def _wanted(self) -> list[int]:
        """The numbers of the cards to make next: `ahead` open ones of whoever asks, up to as many in all."""
        wanted: dict[int, None] = {}
        for annotator in self.asking:
            ready = 0
            for number in self._open(self._progress(annotator).answered):
                if ready >= self.ahead:
                    break
                if self._id(number) not in self.cards:
                    wanted[number] = None
                ready += not self._dropped(self._id(number))
        return sorted(wanted)[:self.ahead]

    def _prepare(self) -> None:
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.closed or not self.error and self._wanted())
                if self.closed:
                    return
                numbers = self._wanted()
            try:
                cards = dict(zip((self._id(number) for number in numbers), self.source.make(numbers), strict=True))
                self._keep(cards)
                error = self._too_many_dropped(cards)
            except Exception as failure:  # whatever it is, the annotator is told, and may try again
                cards, error = {}, failure
            with self.changed:
                self.cards |= cards
                self.error = error
                self.changed.notify_all()

    def _too_many_dropped(self, cards: dict[str, Card | None]) -> UserError | None:
        self.dropped = 0 if any(cards.values()) else self.dropped + len(cards)
        return None if self.dropped < DROPPED_IN_A_ROW else UserError(
            f"{self.dropped} prompts in a row got no two different replies that fit: raise the temperature, allow "
            "longer replies, or give other prompts or checkpoints")

    def _keep(self, cards: dict[str, Card | None]) -> None:
        if self.kept is None:
            return
        lines = [json.dumps({"id": id, "card": card and dataclasses.asdict(card)}, ensure_ascii=False) + "\n"
                 for id, card in cards.items()]
        with open(self.kept, "a", encoding="utf-8") as file:
            file.write("\n" * (file.tell() > 0) + "".join(lines))  # a kill may have left half a line


def read_kept(path: pathlib.Path) -> Iterator[tuple[str, Card | None]]:
    """(id, card) of the cards that were made before; lines that are none are passed over, and made anew."""
    with contextlib.suppress(FileNotFoundError), open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            with contextlib.suppress(ValueError, TypeError, KeyError):
                entry = json.loads(line)
                card = entry["card"] and Card(**{name: tuple(x) if isinstance(x, list) and name != "prompt" else x
                                                 for name, x in entry["card"].items()})
                yield entry["id"], card
