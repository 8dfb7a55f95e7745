"""A round of the loop: its folder, the questions, the answers, and the data that they become.

    ROOT/<data>/loop/round-1/pairs.jsonl       what is asked about: two replies of the present policy
                             answers.jsonl     what was answered, as serve/log.py writes it
                             data/             all answers so far, as `train.py --data` reads them
                             reward/, ppo/     the round's stages
                             report.json, report.md

Every step looks at what is there, and goes on where it ends.
"""
import contextlib
import dataclasses
import json
import pathlib
import subprocess
import sys
from collections.abc import Iterable, Sequence

from data.answers import GONE, fates
from data.dataset import feedback_of, tells
from data.own import groups_of
from data.splits import split_key
from runtime.lines import parse_line, read_lines
from runtime.options import UserError
from runtime.storage import replace_text
from serve.annotators import Simulated
from serve.exports import in_template, training_records, write_data, write_lines
from serve.log import FeedbackLog, append_all, read_events
from serve.pairs import Card, digest
from serve.sources import Sampled

FEEDBACK = ("pairs", "labels", "scores")
AT_ONCE = 64  # cards that are sampled together; a resumed round begins with the next so many
GRACE = 2.0  # seconds for which the page stays after the last answer, so that it can say that it is saved
ROOT = pathlib.Path(__file__).resolve().parent.parent


@dataclasses.dataclass(frozen=True)
class Round:
    """A round's number, from 1, and its files."""

    number: int
    folder: pathlib.Path

    def path(self, name: str) -> pathlib.Path:
        """A file or folder of the round."""
        return self.folder / name

    @property
    def pairs(self) -> pathlib.Path:
        return self.path("pairs.jsonl")

    @property
    def answers(self) -> pathlib.Path:
        return self.path("answers.jsonl")

    @property
    def finished(self) -> bool:
        """The report is written last."""
        return self.path("report.json").exists()

    def events(self) -> list[dict]:
        """The answers so far."""
        return read_events(self.answers) if self.answers.exists() else []


def rounds_in(folder: pathlib.Path) -> list[Round]:
    """The rounds in the loop's folder, in their order."""
    numbers = sorted(int(number) for path in folder.glob("round-*") if (number := path.name[6:]).isdigit())
    return [Round(number, folder / f"round-{number}") for number in numbers]


# ---- questions -------------------------------------------------------------------------------------

def cards_in(path: pathlib.Path) -> list[tuple[int, Card]]:
    """(number, card) of each line of pairs.jsonl; [] without the file."""
    found = []
    for _, line in read_lines(path) if path.exists() else ():
        value = parse_line(line)
        # The id that `python -m serve --pairs` gives it, so that a page and a simulated person may share a round.
        id = digest("file", value["prompt"], *value["replies"])
        found.append((value["number"], Card(id, value["prompt"], tuple(value["replies"]), tuple(value["names"]),
                                            tuple(value["hashes"]), value["sampling"])))
    return found


def ask(round: Round, source: Sampled, n: int) -> list[Card]:
    """The round's n questions: those of pairs.jsonl, and where there are too few, the source's next ones,
    which are written there. UserError if the source has no more. Empty replies are asked about, too: who could
    not say that they are bad would get a policy that writes them."""
    found, tried = cards_in(round.pairs), 0
    number = (found[-1][0] // AT_ONCE + 1) * AT_ONCE if found else 0
    known = {card.id for _, card in found}
    while len(found) < n:
        for at, card in enumerate(source.make(range(number, number + AT_ONCE)), number):
            if card is None or len(found) == n:
                continue
            card = dataclasses.replace(card, id=digest("file", card.prompt, *card.replies))
            found += [(at, card)] * (card.id not in known)
            known.add(card.id)
        number, tried = number + AT_ONCE, tried + AT_ONCE
        if tried > 20 * (n + AT_ONCE):
            raise UserError(f"{tried} prompts gave only {len(found)} of {n} pairs of different replies: ask for "
                            "fewer (--pairs), raise --ppo.temperature, or allow longer replies (--ppo.reply_len)")
        round.folder.mkdir(parents=True, exist_ok=True)
        replace_text(round.pairs, "".join(json.dumps(
            {"number": at, "prompt": card.prompt, "replies": card.replies, "names": card.names, "hashes": card.hashes,
             "sampling": card.sampling}, ensure_ascii=False) + "\n" for at, card in found))
    return [card for _, card in found[:n]]


# ---- answers ---------------------------------------------------------------------------------------

def standing(events: Iterable[dict]) -> list[dict]:
    """The events that hold."""
    events = list(events)
    known = fates(events)
    return [event for event in events if known.get(event["id"]) not in GONE]


def answered(events: Iterable[dict], cards: Sequence[Card]) -> int:
    """How many of the cards are answered or skipped."""
    done = {event.get("card") for event in standing(events)}
    return sum(card.id in done for card in cards)


def answer_simulated(round: Round, cards: Sequence[Card], person: Simulated) -> None:
    """Let a simulated person answer what is not answered yet."""
    with FeedbackLog(round.answers) as log:
        done = {event.get("card") for event in log.events}
        append_all(log, person.events([card for card in cards if card.id not in done], round.number))


def page_command(round: Round, port: int, terminal: bool) -> list[str]:
    """The command that asks a person."""
    where = ["--terminal"] if terminal else ["--port", str(port), "--stop_with_input"]
    return [sys.executable, "-m", "serve", "--pairs", str(round.pairs.resolve()), "--to", str(round.answers.resolve()),
            *where]


def answer_by_person(round: Round, cards: Sequence[Card], port: int, terminal: bool = False) -> None:
    """Start the page, or the questions in the terminal, and wait until all cards are answered or skipped.
    UserError if that ends before."""
    def done() -> int:
        return answered(round.events(), cards)

    if done() >= len(cards):
        return
    print(f"round {round.number}: {done()} of {len(cards)} answers are there; the others are asked for "
          + ("here" if terminal else f"at http://127.0.0.1:{port}/"), flush=True)
    # The page reads no line from its pipe, but ends with it: so it does not outlive a loop that is killed.
    asking = subprocess.Popen(page_command(round, port, terminal), cwd=ROOT,
                              stdin=None if terminal else subprocess.PIPE)
    try:
        while asking.poll() is None and (terminal or done() < len(cards)):
            with contextlib.suppress(subprocess.TimeoutExpired):
                asking.wait(1.0)
        with contextlib.suppress(subprocess.TimeoutExpired):
            asking.wait(GRACE)
        code = asking.poll()
    finally:
        if asking.poll() is None:
            asking.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                asking.wait(10.0)
        if asking.poll() is None:
            asking.kill()
        if asking.stdin:
            asking.stdin.close()
    if (n := done()) < len(cards):
        raise UserError(f"round {round.number}: {n} of {len(cards)} answers are given and saved"
                        + f"; the page ended with exit code {code}, see above" * bool(code)
                        + "; the same command goes on with the next")


def answer_from_file(round: Round, path: str) -> None:
    """Copy the log at `path` into the round, where it stays as it is."""
    if not round.answers.exists():
        round.folder.mkdir(parents=True, exist_ok=True)
        write_lines(round.answers, read_events(path))


def answer_ids(events: Iterable[dict]) -> set[str]:
    """What was answered, by the ids of what holds."""
    return {event["id"] for event in standing(events) if event["kind"] != "skip"}


def new_answers(round: Round, before: Sequence[Round]) -> set[str]:
    """The ids of the round's answers that teach something, but for those that earlier rounds had already."""
    events = round.events()
    return ({event["id"] for event in events} - {*fates(events)}).difference(*(answer_ids(r.events()) for r in before))


# ---- the data of a round ---------------------------------------------------------------------------

def held_out_keys(rounds: Sequence[list[dict]], share: float) -> set[int]:
    """The keys (data/splits.py) of the prompts whose answers are held out: of each round's new prompts those
    with the highest hashes. So a prompt that was held out once is always, and no reward model of an earlier
    round has learned from what a later one is measured on.

    rounds: the answers of each. Of ratings and labels, high and low ones are held out alike; ties are
    never held out for themselves, for they tell no model right from wrong.
    """
    held: set[int] = set()
    seen: set[int] = set()
    for events in rounds:
        found = training_records(standing(events))
        decided = [record for record in main_kind(found) if not record.get("tie")]
        groups: dict[str, set[int]] = {}
        for record, group in zip(decided, groups_of(decided, "reward") if decided else (), strict=True):
            groups.setdefault(group, set()).add(split_key(record, "reward"))
        for keys in groups.values():
            new = sorted(keys - seen)
            n = round(share * len(new))
            # One at least, unless what was held out earlier is still answered.
            held |= set(new[len(new) - max(n, not held & keys):])
        seen |= {split_key(record, "reward") for of_kind in FEEDBACK for record in found[of_kind]}
    return held


def main_kind(found: dict[str, list[dict]]) -> list[dict]:
    """The records of the most frequent kind of feedback, of those of `training_records`."""
    return max((found[kind] for kind in FEEDBACK), key=len)


def write_round_data(rounds: Sequence[list[dict]], folder: pathlib.Path, template: str, share: float,
                     cumulative: bool = True) -> dict[str, int]:
    """Write the answers of all rounds, or of the last one alone where that holds those before, as a folder for
    the reward stage; how many records it has to learn from and held out. UserError if there are too few."""
    held = held_out_keys(rounds, share)
    events = standing([event for of_round in (rounds if cumulative else rounds[-1:]) for event in of_round])
    events = [event for event in events if "prompt" in event]
    sides: dict[bool, list[dict]] = {True: [], False: []}
    for event in events:
        sides[split_key(event, "reward") in held].append(event)
    learned = main_kind(training_records(sides[False]))
    kept = training_records(sides[True])[feedback_of(learned[0])] if learned else []
    if not (tells(learned) and tells(kept)):
        raise UserError(f"{len(events)} answers are too few to learn from some and to hold others out: give answers "
                        "that decide to at least three prompts, and not the same one to all")
    counts = write_data(sides[False], folder, template=template,
                        held_out=[in_template(record, template) for record in kept])
    return {"learned": sum(counts.values()), "held_out": len(kept)}
