"""What people are asked about: replies sampled from checkpoints, or pairs from a file.

    Sampled(prompts_of(state), [Model.of_session(session, "sft")])     two replies of one checkpoint
    Sampled(prompts, [sft, ppo], pick="uncertain", score=scorer)       one of each, where a reward model doubts
    Fixed(read_pairs("pairs.jsonl"))                                    any form of data/forms.py

A record of more than two replies is asked about as neighbours, in the order of their ranks or of the
file: n replies are n - 1 questions, each reply stands in two of them at most, and all are connected.
"""
import collections
import dataclasses
import pathlib
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from convert.importing import as_checkpoint
from data.answers import is_event, log_fates, standing_record
from data.batches import prompt_ids
from data.dialogues import Useless
from data.forms import parse_fields
from data.prepare import SETTINGS, open_data
from data.records import LEFT_OUT, SHOWN, checked, load_records, records_in, report_bad
from model import load_checkpoint
from reward import RewardModel, longest_row
from runtime.device import pick_device
from runtime.options import UserError
from runtime.rows import read_rows
from sample import ChatSession, Decoder, Sampling, reply_texts, reply_to
from serve.pairs import Card, card_of, digest

Prompt = str | list[dict[str, str]]
CANDIDATES = 4  # pairs of which --pick uncertain asks about one
TRIES = 3  # for a pair of different replies
LISTS = ("replies", "responses")  # fields with the texts to compare, in records that no tool has


# ---- checkpoints -----------------------------------------------------------------------------------

@dataclasses.dataclass(frozen=True)
class Model:
    """A checkpoint that writes replies.

    ids(prompt) -> its token ids; UserError if they leave no room for a reply. write(ids, seed, rows) ->
    texts, reply i from the uniform numbers of (seed, rows[i]).
    """

    name: str
    hash: str
    ids: Callable[[Prompt], list[int]]
    write: Callable[[list[list[int]], int, list[int]], list[str]]
    sampling: dict[str, Any]

    @classmethod
    def of_session(cls, session: ChatSession, name: str) -> "Model":
        """From a checkpoint that sample.py loaded, with that command's options."""
        o, tokenizer = session.o, session.tokenizer
        sampling = Sampling(o.temperature, o.top_k, o.top_p, o.repetition_penalty, control_tokens(tokenizer))
        decoder, lock = Decoder(session.model, session.dtype), threading.Lock()

        def write(ids: list[list[int]], seed: int, rows: list[int]) -> list[str]:
            with lock:  # one thread at a time may use a decoder
                return reply_texts(tokenizer, reply_to(
                    session.model, tokenizer, ids, o.max_new_tokens, seed=seed, rows=rows, sampling=sampling,
                    decoder=decoder, batch_size=64))

        return cls(name, session.state.get("hash") or "", session.ids, write, described(sampling, o.max_new_tokens))

    @classmethod
    def of_engine(cls, engine: Any, sampling: Sampling, max_tokens: int) -> "Model":
        """From an Engine (serve/engine.py), whose rows chats have, too: while they are full it waits."""
        from serve.engine import Busy  # here: the terminal needs no engine
        sampling = dataclasses.replace(sampling, suppress=control_tokens(engine.tokenizer))

        def ids(prompt: Prompt) -> list[int]:
            found = prompt_ids(engine.tokenizer, prompt, engine.template, engine.bare)
            if len(found) + max_tokens > engine.max_len:
                raise UserError(f"a prompt of {len(found)} tokens and a reply of up to {max_tokens} exceed the "
                                f"model's {engine.max_len}: shorten the prompt, or allow shorter replies")
            return found

        def submit(one: list[int], seed: int, row: int) -> Any:
            while True:
                try:
                    return engine.submit(one, max_tokens=max_tokens, sampling=sampling, seed=seed, row=row)
                except Busy:
                    time.sleep(0.1)

        def write(ids: list[list[int]], seed: int, rows: list[int]) -> list[str]:
            return [reply.result()[0] for reply in [submit(one, seed, row) for one, row in zip(ids, rows, strict=True)]]

        return cls(engine.name, engine.hash or "", ids, write, described(sampling, max_tokens))


def control_tokens(tokenizer: Any) -> tuple[int, ...]:
    """The special tokens that no reply has: all but those that end it."""
    return tuple(i for i in tokenizer.special_ids if i not in tokenizer.end_ids)


def described(sampling: Sampling, max_tokens: int) -> dict[str, Any]:
    """How replies are drawn, for the record."""
    return {name: value for name, value in dataclasses.asdict(sampling).items() if name != "suppress"} | {
        "max_tokens": max_tokens}


def data_of(state: dict[str, Any], path: str = "the checkpoint") -> Any:
    """The prepared data set that a checkpoint was trained on; UserError if it does not say which."""
    known = state.get("options", {})
    if not known.get("data"):
        raise UserError(f"{path} does not say on which data it was trained: give prompts as --prompts FILE")
    options = {name: known[name] for name in SETTINGS if name in known}
    return open_data(known["data"], source=known.get("source") or None, **options)


def prompts_of(state: dict[str, Any], split: str = "train", file: str = "",
               path: str = "the checkpoint") -> list[Prompt]:
    """The prompts to ask about, each once: those of a file, or of the checkpoint's own data. UserError
    without any."""
    records = load_records(file, "ppo") if file else data_of(state, path).records("ppo", split)
    return [record["prompt"] for record in {digest(record["prompt"]): record for record in records}.values()]


def reward_scorer(path: str, device: str = "auto",
                  template: str = "") -> tuple[Callable[[Sequence[Prompt], Sequence[str]], Any], str]:
    """(score(prompts, texts) -> (n,), the reward model's hash). A text that is longer than the model's rows
    is read up to there. template: around prompts that are texts, where the checkpoint does not know it: the
    answers that a loop learns from are messages, in which the template is already."""
    model, tokenizer, state = load_checkpoint(as_checkpoint(path), pick_device(device), RewardModel)
    template, limit = template or state.get("template", "{prompt}"), longest_row(model, state)

    def score(prompts: Sequence[Prompt], texts: Sequence[str]) -> np.ndarray:
        ids = [prompt_ids(tokenizer, prompt, template)[-(limit - 8):] for prompt in prompts]
        replies = [tokenizer.reply_ids(text)[:limit - len(one)] for one, text in zip(ids, texts, strict=True)]
        return model.scores(ids, replies).cpu().numpy()

    return score, state["hash"] or ""


class Sampled:
    """Cards from checkpoints, without end. Card `number` is about prompts at fixed places of a shuffled list,
    and its replies follow from (seed, number) alone."""

    n = None

    def __init__(self, prompts: Sequence[Prompt], models: Sequence[Model], *, seed: int = 0, single: bool = False,
                 score: Callable[[Sequence[Prompt], Sequence[str]], Any] | None = None, scorer: str = ""):
        """models: one, or two to compare. single: one reply a card. score: with it, a card is, of CANDIDATES
        pairs, the one whose scores differ least; scorer: names that reward model. UserError if there is
        nothing to compare."""
        if not prompts:
            raise UserError("no prompts to ask about: give a file as --prompts")
        if len(models) == 1 and not single and models[0].sampling.get("temperature") == 0:
            raise UserError("--temperature 0 writes the same reply twice: raise it, or give a second checkpoint")
        if score is not None and single:
            raise UserError("--pick uncertain is for pairs: leave it out with --mode rate and label")
        self.prompts, self.models, self.seed, self.single, self.score = prompts, list(models), seed, single, score
        self.sides = 1 if single else 2
        self.candidates = CANDIDATES if score else 1
        self.orders: dict[int, np.ndarray] = {}  # of each pass over the prompts
        self.what = [[model.name, model.hash, model.sampling] for model in models] + [seed, single, scorer]

    def id(self, number: int) -> str:
        return digest(self.what, number, [self.prompt(place) for place in self.places(number)])

    def places(self, number: int) -> range:
        """The places in the shuffled prompts that a card chooses from."""
        return range(number * self.candidates, (number + 1) * self.candidates)

    def prompt(self, place: int) -> Prompt:
        """The prompt at this place; behind the last one they come in another order."""
        epoch, i = divmod(place, len(self.prompts))
        if epoch not in self.orders:
            self.orders[epoch] = np.random.default_rng([self.seed, 7, epoch]).permutation(len(self.prompts))
        return self.prompts[self.orders[epoch][i]]

    def make(self, numbers: Sequence[int]) -> list[Card | None]:
        places = [place for number in numbers for place in self.places(number)]
        replies: dict[int, tuple[str, ...]] = {}
        rows: dict[int, list[int]] = {}
        for attempt in range(TRIES):
            missing = [place for place in places if place not in replies]
            rows |= {place: [(place * TRIES + attempt) * 2 + side for side in range(self.sides)] for place in missing}
            replies |= {place: texts for place, texts in self.written(missing, rows).items()
                        if self.single or texts[0].strip() != texts[1].strip()}
        return [self.chosen(number, replies, rows) for number in numbers]

    def written(self, places: Sequence[int], rows: dict[int, list[int]]) -> dict[int, tuple[str, ...]]:
        """The replies at each place whose prompt leaves room for some. rows: those of each place's replies."""
        found: dict[int, list[str]] = collections.defaultdict(list)
        for side in range(self.sides):
            model = self.models[side % len(self.models)]
            ids = {}
            for place in places:
                try:
                    ids[place] = model.ids(self.prompt(place))
                except UserError:  # too long for this model: the card is left out
                    continue
            texts = model.write([*ids.values()], self.seed, [rows[place][side] for place in ids]) if ids else ()
            for place, text in zip(ids, texts, strict=True):
                found[place].append(text)
        return {place: tuple(texts) for place, texts in found.items() if len(texts) == self.sides}

    def chosen(self, number: int, replies: dict[int, tuple[str, ...]], rows: dict[int, list[int]]) -> Card | None:
        """The card of this number; None if no pair of it has different replies."""
        places = [place for place in self.places(number) if place in replies]
        if not places:
            return None
        best, sampling = 0, {"seed": self.seed}
        if self.score is not None:
            scores = np.asarray(self.score([self.prompt(place) for place in places for _ in range(2)],
                                           [text for place in places for text in replies[place]])).reshape(-1, 2)
            best = int(np.abs(scores[:, 0] - scores[:, 1]).argmin())
            sampling |= {"pick": "uncertain", "scores": [round(float(x), 4) for x in scores[best]]}
        place, whose = places[best], [self.models[side % len(self.models)] for side in range(self.sides)]
        return Card(self.id(number), self.prompt(place), replies[place], tuple(model.name for model in whose),
                    tuple(model.hash for model in whose), whose[0].sampling | sampling | {"rows": rows[place]})


# ---- files -----------------------------------------------------------------------------------------

def read_pairs(path: str | pathlib.Path, single: bool = False, fields: str = "") -> list[Card]:
    """The cards of a file, in its order, each once. single: one card a reply. fields: what --fields says.
    UserError names the lines that have no form, and says if there is nothing to ask."""
    bad: list[str] = []
    forms: collections.Counter[str] = collections.Counter()
    found: dict[str, Card] = {}
    known, names = log_fates(path), parse_fields(fields)
    for row in read_rows(path, progress=True):
        try:
            cards = cards_in(standing_record(row.value(), "reward", known), single, names)
        except Useless as useless:
            forms[LEFT_OUT + useless.reason] += 1
        except ValueError as error:
            bad.append(f"{row.place}: {error}" if len(bad) < SHOWN else "")
        else:
            forms["records"] += 1
            found |= {card.id: card for card in cards}
    report_bad(path, "reward", bad, len(found), False, forms)
    return list(found.values())


def cards_in(value: Any, single: bool, fields: dict[str, str] | None = None) -> list[Card]:
    """The cards of one record; ValueError says what is wrong with it, and Useless that it has no two
    replies."""
    asked, texts = replies_in(value, fields)
    names = [f"reply {i}" for i in range(1, len(texts) + 1)]
    if isinstance(value, dict) and "chosen" in value and not value.get("tie"):
        names = ["chosen", "rejected"]
    if single:
        return [Card(digest("file", asked, text), asked, (text,), (name,), ("",)) for name, text in
                zip(names, texts, strict=True)]
    if len(texts) < 2:
        raise Useless("one reply, and none to compare it with")
    cards = [Card(digest("file", asked, *pair), asked, pair, tuple(names[i:i + 2]))
             for i, pair in enumerate(zip(texts, texts[1:], strict=False))]
    if len(texts) == 2 and (made := made_by(value)):
        return [dataclasses.replace(cards[0], **made)]
    if is_event(value) and (card := card_of(value)):  # another person's: agreement is measured over equal ids
        return [dataclasses.replace(card, order=(0, 1))]
    return cards


def made_by(value: Any) -> dict[str, Any]:
    """Whose the two replies of a loop's question are, as fields of a Card; {} of another record."""
    known = {name: value.get(name) for name in ("names", "hashes", "sampling")} if isinstance(value, dict) else {}
    pair = [known.get(name) for name in ("names", "hashes")]
    if not isinstance(known.get("sampling"), dict) or not all(
            isinstance(x, list) and len(x) == 2 and all(isinstance(text, str) for text in x) for x in pair):
        return {}
    return {"names": tuple(pair[0]), "hashes": tuple(pair[1]), "sampling": known["sampling"]}


def replies_in(value: Any, fields: dict[str, str] | None) -> tuple[Prompt, list[str]]:
    """(the prompt, its different replies) of a record in any form, or of {"prompt", "replies": [texts]}."""
    if isinstance(value, dict) and "prompt" in value and (name := next((x for x in LISTS if x in value), "")):
        if not isinstance(value[name], list) or not all(isinstance(text, str) for text in value[name]):
            raise ValueError(f'"{name}" must be a list of texts')
        asked = checked({"prompt": value["prompt"]}, "ppo")["prompt"]
        return asked, list(dict.fromkeys(value[name]))
    records = records_in(value, "reward", fields)[1]
    # Ranked replies come as every two of them, the best first: so their texts come in their order.
    fields_of = ("chosen", "rejected") if "chosen" in records[0] else ("response",)
    return records[0]["prompt"], list(dict.fromkeys(record[name] for record in records for name in fields_of))
