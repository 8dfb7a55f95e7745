"""What the page's addresses do, without HTTP: checked requests in, JSON out.

    desk = Desk(log, pairs, engines, training, mode="compare")
    desk.next({"annotator": "me"})                                    {"card": …}
    desk.answer({"annotator": "me", "card": id, "choice": "left", "seconds": 3, "id": "16 hex digits"})

Nothing that `next` says tells which checkpoint wrote what, or that a card is a repetition. serve/app.py
gives these methods their addresses.
"""
import io
import json
import zipfile
from collections.abc import Collection, Iterator, Mapping, MutableMapping
from typing import Any

from data.answers import fates
from data.parents import PRESETS
from data.records import apply_template
from runtime.machine import git_commit
from runtime.options import UserError
from serve.exports import events_of, exported, saved
from serve.fields import (LONGEST_COMMENT, LONGEST_TEXT, Wrong, annotator_of, dialogue_of, edit_of, finite, id_of,
                          number_of, read_json, text_of, without_paths)
from serve.log import ID, FeedbackLog, NotSaved
from serve.pairs import Card, Pairs, digest
from serve.strip import strip
from serve.training import Training

MOST_ROWS = 500  # at once
READY_S = 0.4  # for which a request waits for a card that is being written


class Desk:
    """The log, the questions, the engines and the training behind a page. Its methods may run in any thread."""

    def __init__(self, log: FeedbackLog, pairs: Pairs | None = None, engines: MutableMapping[str, Any] | None = None,
                 training: Training | None = None, *, mode: str = "compare", data: str = "",
                 template: str = "{prompt}"):
        """data: what the page is about, in a word. template: the checkpoint's, for exports."""
        self.log, self.pairs, self.training = log, pairs, training
        self.engines: MutableMapping[str, Any] = {} if engines is None else engines
        self.mode, self.data, self.template = mode, data, template
        self.sides = ("left", "right") if mode == "compare" else ("reply",)
        self.version = git_commit()
        self.annotator = ""  # the name with which a page begins

    def close(self) -> None:
        """Stop what runs, and let another process have the log."""
        if self.training:
            self.training.close()
        if self.pairs:
            self.pairs.close()
        if hasattr(self.engines, "close"):
            self.engines.close()
        self.log.close()

    def state(self, annotator: str = "") -> dict[str, Any]:
        """What the page begins with; figures are the annotator's, or of all."""
        events = self.log.events
        return {"mode": self.mode, "models": list(self.engines), "saved": saved(events, annotator or None),
                "data": self.data, "version": self.version, "annotator": self.annotator,
                "strip": strip(events, annotator) if annotator else None, "compares": self.pairs is not None,
                "trains": self.training is not None}

    # ---- compare

    def next(self, body: dict) -> dict[str, Any]:
        """The annotator's next card, or that it is being made, or that there is none."""
        annotator, pairs = annotator_of(body), self.pairs
        if pairs is None:
            return {"done": True}
        try:
            card = pairs.next(annotator, wait=READY_S)
        except UserError as error:
            raise Wrong(503, without_paths(str(error))) from error
        if card is None:
            return {"done": True} if pairs.done(annotator) else {"waiting": True}
        return {"card": self.shown(card, annotator)}

    def shown(self, card: Card, annotator: str) -> dict[str, Any]:
        """A card as the page may know it: without names, and without a word about repetitions."""
        replies = dict(zip(self.sides, card.shown, strict=True))
        return {"id": card.id, "turns": card.turns, **replies, "shown": saved(self.log.events, annotator) + 1}

    def card(self, id: Any, annotator: str) -> Card:
        if not isinstance(id, str) or not ID.fullmatch(id):
            raise ValueError('"card" must be the id of a question')
        card = self.pairs.find(id, annotator, wait=READY_S) if self.pairs else None
        if card is None:
            raise Wrong(404, "this question is not known here any more: reload the page")
        return card

    def answer(self, body: dict) -> dict[str, Any]:
        """Save an answer, and the edit that comes with it; who wrote the replies is told now."""
        annotator, id, choice = annotator_of(body), id_of(body), body.get("choice")
        if isinstance(choice, bool) or not isinstance(choice, int | str):
            raise ValueError('"choice" is missing, or none of the answers')
        card = self.card(body.get("card"), annotator)
        if body.get("left", card.shown[0]) != card.shown[0]:
            raise Wrong(409, "its sides are the other way round for this annotator: reload the page")
        seconds = number_of(body, "seconds", 0, 1e8)
        side, text = edit_of(body, card)
        record = card.record(annotator, choice, self.mode, id=id, strength=number_of(body, "strength", 0, 3, True),
                             comment=text_of(body, "comment", LONGEST_COMMENT, "") or None,
                             seconds=None if seconds is None else round(seconds, 2))
        stored = self.log.append(record)
        if (stored.get("card"), stored["annotator"]) != (card.id, annotator):
            raise Wrong(409, "another answer has this id already: reload the page")
        if text:
            self.log.append(card.edit(annotator, id, side, text))
        figures = strip(self.log.events, annotator)
        names = [card.names[i] for i in card.order]
        return {"saved": figures["saved"], "names": {"left": names[0], "right": names[-1] if len(names) > 1 else ""},
                "strip": figures}

    def undo(self, body: dict) -> dict[str, Any]:
        """Take back the annotator's last answer; its card comes again with what was said."""
        annotator, id = annotator_of(body), id_of(body)
        last = self.log.last(annotator) if self.log.get(id) is None else None
        card = self.pairs.find(last["card"], annotator, wait=READY_S) if last and self.pairs else None
        if card and len(card.shown) != len(self.sides):
            raise Wrong(409, "the last answer was given in another --mode: take it back there")
        event = self.log.undo(annotator, id)
        if event is None:
            figures = strip(self.log.events, annotator)
            return {"card": None, "answer": None, "saved": figures["saved"], "strip": figures}
        if not last and self.pairs:  # a request that came twice
            card = self.pairs.find(event["card"], annotator, wait=READY_S)
        said = next((event[name] for name in ("choice", "score", "label") if name in event), "skip")
        edit = next((other for other in self.log.events if other.get("of") == event["id"] and other["kind"] == "edit"),
                    None)
        answer = {"choice": said, "strength": event.get("strength"), "comment": event.get("comment", "")}
        if edit and card:
            at = card.shown.index(edit["original"]) if edit["original"] in card.shown else 0
            answer["edited"] = {"side": ("left", "right")[at], "text": edit["response"]}
        figures = strip(self.log.events, annotator)
        return {"card": card and self.shown(card, annotator), "answer": answer, "saved": figures["saved"],
                "strip": figures}

    # ---- chat

    def thumb(self, body: dict) -> dict[str, Any]:
        """Set what the annotator says of a reply in a chat: good, bad, or nothing; with a better text, an edit.
        A label that held before is taken back, so the last one holds."""
        annotator, id, label = annotator_of(body), id_of(body), number_of(body, "label", 0, 1, True)
        model = text_of(body, "model", 300, "")
        turns, response = dialogue_of(body)
        edited = text_of(body, "edited", LONGEST_TEXT, "")
        label = 0 if label is None and edited else label
        about = {"annotator": annotator, "kind": "label", "prompt": self.asked(turns, model), "response": response}
        with self.log.lock:
            if label is None or self.log.get(id) is None:  # a request that comes twice changes nothing
                self.relabel(about, label, id, model)
            held = self.log.get(id) or next(iter(self.labels(about)), None)
            if edited and edited != response and held:
                before = [edit for edit in self.edits({held["id"]}) if edit["response"] != edited]
                for edit in before:  # the last text holds
                    self.take_back(edit)
                self.log.append({"id": digest("edit", id, edited), "annotator": annotator, "kind": "edit",
                                 "of": held["id"], "prompt": about["prompt"], "response": edited, "original": response})
        return {"saved": saved(self.log.events, annotator)}

    def labels(self, about: dict[str, Any]) -> list[dict]:
        """The thumbs that hold of this annotator at this reply."""
        return [event for event in self.log.standing() if "card" not in event
                and {name: event.get(name) for name in about} == about]

    def edits(self, ids: Collection[str]) -> list[dict]:
        """The edits that hold of what has these ids."""
        return [event for event in self.log.standing() if event["kind"] == "edit" and event["of"] in ids]

    def take_back(self, event: dict) -> None:
        """An undo of this very event."""
        self.log.append({"id": digest("taken back", event["id"]), "annotator": event["annotator"], "kind": "undo",
                         "of": event["id"]})

    def engine(self, model: str) -> Any:
        """The engine of a model, loaded if need be: after a restart it is not; None without this model."""
        return self.engines[model] if model in self.engines else None

    def relabel(self, about: dict[str, Any], label: int | None, id: str, model: str) -> None:
        """Take back the thumbs that hold, and set the new one; an edit stays with it."""
        before = self.labels(about)
        if label is not None and [event["label"] for event in before] == [label]:
            return
        edits = self.edits({event["id"] for event in before})
        for event in before:
            self.take_back(event)
        if label is not None:
            engine = self.engine(model)
            self.log.append({"id": id, **about, "label": label, "from": [model] if model else None,
                             "hashes": [engine.hash] if engine else None})
            for edit in edits[-1:]:
                own = {name: x for name, x in edit.items() if name not in ("id", "time")}
                self.log.append({**own, "id": digest("edit", id, edit["response"]), "of": id})

    def asked(self, turns: list[dict[str, str]], model: str) -> Any:
        """What a chat's turns asked, as a record's prompt. One question alone is a text, as in the questions of the
        first tab; a longer talk is messages, with the template that the model saw."""
        first = next((i for i, turn in enumerate(turns) if turn["role"] == "user"), None)
        if len(turns) == 1 and first == 0:
            return turns[0]["content"]
        if first is not None and (engine := self.engine(model)):
            turns[first]["content"] = apply_template(engine.template, turns[first]["content"])
        return turns

    # ---- data

    def records(self, query: Mapping[str, str]) -> dict[str, Any]:
        """The events that fit the query, the newest first, each with whether it holds."""
        def whole(name: str, default: int) -> int:
            given = query.get(name) or str(default)
            if not (given.isascii() and given.isdigit() and len(given) < 10):
                raise ValueError(f"{name} must be a whole number")
            return int(given)

        events, text = self.log.events, query.get("q", "").casefold()
        known = fates(events)
        found = [event for event in reversed(events)
                 if query.get("kind", "") in ("", event["kind"]) and query.get("who", "") in ("", event["annotator"])
                 and (not text or any(text in part.casefold() for part in texts_in(event)))]
        offset = whole("offset", 0)
        rows = found[offset:offset + min(whole("limit", 50), MOST_ROWS)]
        return {"total": len(found), "rows": [event | {"state": known.get(event["id"], "")} for event in rows],
                "who": sorted({event["annotator"] for event in events})}

    def export(self, to: str) -> tuple[str, bytes, dict[str, int]]:
        """(file name, content, what is left out: how often) of the answers in another tool's form: one file, or
        all in a .zip."""
        files, lost = exported(self.log.events, to[:30], self.template)
        contents = {name: "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
                    if isinstance(records, list) else json.dumps(records, ensure_ascii=False, indent=2)
                    for name, records in files.items()}
        if len(contents) == 1:
            return f"feedback-{to}.jsonl", next(iter(contents.values())).encode(), lost
        packed = io.BytesIO()
        with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in contents.items():
                archive.writestr(name, content)
        return f"feedback-{to}.zip", packed.getvalue(), lost

    def take_in(self, content: bytes, annotator: str = "import") -> dict[str, int]:
        """Add the records of a file; lines that have no form are left out and counted."""
        left_out, before = 0, len(self.log.events)
        for line in lines_of(content):
            try:
                for event in events_of(read_json(line) if isinstance(line, bytes) else line, annotator):
                    self.log.append(event)
            except NotSaved:
                raise
            except (ValueError, UserError, TypeError, KeyError, AttributeError):
                left_out += 1
        return {"added": len(self.log.events) - before, "left_out": left_out}

    # ---- train

    def train(self, body: dict) -> dict[str, bool]:
        """Start a round on the answers."""
        preset = text_of(body, "preset", 20, "")
        if preset not in ("", *PRESETS):
            raise ValueError(f'"preset" must be one of {", ".join(PRESETS)}')
        self.trainer().start(preset, number_of(body, "updates", 1, 100_000, True))
        return {"started": True}

    def trainer(self) -> Training:
        if self.training is None:
            raise Wrong(409, "there is no checkpoint to train from: start the server with --from")
        return self.training

    def progress(self) -> dict[str, Any]:
        """How the training goes."""
        if self.training is None:
            return {"running": False, "stage": "", "lines": [], "curves": {}, "before_after": [], "changed": None}
        found = finite(self.training.status())
        found["lines"] = [without_paths(line) for line in found["lines"]]
        return found | ({"error": without_paths(found["error"])} if "error" in found else {})

    def stop(self) -> dict[str, bool]:
        return {"stopped": self.trainer().stop()}


def texts_in(value: Any) -> Iterator[str]:
    """All texts in a JSON value, of names not."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from texts_in(part)


def lines_of(content: bytes) -> Iterator[Any]:
    """The lines of a file, or the elements of its JSON array; ValueError for an array that is none."""
    content = content.removeprefix(b"\xef\xbb\xbf").strip()
    if content.startswith(b"["):
        yield from read_json(content)
    else:
        yield from (line for line in content.split(b"\n") if line.strip())
