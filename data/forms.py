"""Records of other tools, read as our own: TRL, OpenRLHF, LLaMA-Factory, axolotl, ms-swift, minimind,
NeMo-RL, MOSS, and the data sets HH, UltraFeedback, Nectar, LMArena and AlpacaFarm.

    form = form_of(record, "reward")      which form its fields are, or ValueError
    form.read(record)                     the records it holds, in the form of data/records.py

A form is declared by the fields that it needs and by what kind of value they have; the first that
fits is taken, so those that need more stand first. Nothing is guessed: what fits none is an error
that names the forms that come near.
"""
import dataclasses
import functools
import itertools
import json
import os
import re
from collections.abc import Callable
from typing import Any

from data.cells import from_cells
from data.dialogues import (DIFFER, EQUAL, NO_ANSWER, Messages, Useless, alpaca, are_turns, last_turn,
                            prompt, reply, transcript, turns, unanswered, waiting_for)
from data.openings import cut_opening
from runtime.options import UserError
from runtime.terminal import remedy
from runtime.rows import Cells

OURS = ("text", "messages", "prompt", "response", "chosen", "rejected", "label", "score", "margin", "scores",
        "tie", "part")
TIES = ("tie", "tie (bothbad)", "both_bad")  # values of "winner"


# ---- parts of records ----------------------------------------------------------------------------

def pair(asked: str | Messages, chosen: str, rejected: str, tie: bool = False) -> list[dict]:
    """One comparison; of a tie, the order of the replies means nothing."""
    if chosen == rejected:
        raise Useless(EQUAL)
    return [{"prompt": asked, "chosen": chosen, "rejected": rejected, **({"tie": True} if tie else {})}]


def pair_of_dialogues(chosen: Messages, rejected: Messages, asked: str | Messages = ()) -> list[dict]:
    """A comparison of two dialogues that differ in their last answer; `asked` stands before both, or
    is repeated by both."""
    shared = sum(1 for _ in itertools.takewhile(
        lambda two: two[0] == two[1], zip(chosen[:-1], rejected[:-1], strict=False)))
    if {chosen[-1]["role"], rejected[-1]["role"]} != {"assistant"}:
        raise Useless(NO_ANSWER)
    if len(chosen) != shared + 1 or len(rejected) != shared + 1:
        raise Useless(DIFFER)
    before = chosen[:shared]
    if not before and not asked:
        raise ValueError("the dialogues share no turn, so there is no prompt")
    if isinstance(asked, list) and before[:len(asked)] != asked:
        before = [*asked, *before]
    return pair(before or asked, chosen[-1]["content"], rejected[-1]["content"])


def pair_of_texts(record: dict) -> list[dict]:
    """Transcripts, or two texts whose common beginning is the prompt (but for a space at its end)."""
    both = [transcript(record[name]) for name in ("chosen", "rejected")]
    if any(both):
        if not all(both):
            raise Useless("only one of the two is a dialogue")
        return pair_of_dialogues(*both)
    start = os.path.commonprefix([record["chosen"], record["rejected"]])
    if not start.strip():
        raise ValueError('"chosen" and "rejected" without "prompt" must be transcripts '
                         '"\\n\\nHuman: …\\n\\nAssistant: …", or begin alike: there is no prompt')
    replies = [reply(record[name][len(start.rstrip(" ")):]) for name in ("chosen", "rejected")]
    return pair(start.rstrip(" "), *replies)


def pairs_by_rank(asked: str | Messages, ranked: list[tuple[float, str]]) -> list[dict]:
    """Every two different replies; rank 1 is best, equal ranks are ties."""
    ordered = sorted(ranked, key=lambda x: x[0])
    found = [pair(asked, better, worse, tie=i == j)[0]
             for (i, better), (j, worse) in itertools.combinations(ordered, 2) if better != worse]
    if not found:
        raise Useless("fewer than two different replies")
    return found


def as_flag(value: Any) -> Any:
    """1 or 0 for true or false, also as a text; any other value as it is."""
    words = {"true": 1, "1": 1, "false": 0, "0": 0}
    return words.get(value.strip().lower(), value) if isinstance(value, str) else (
        int(value) if isinstance(value, bool) else value)


def labelled(asked: str | Messages, answer: str, label: Any) -> list[dict]:
    """One reply, liked or not."""
    return [{"prompt": asked, "response": answer, "label": as_flag(label)}]


def answered(asked: str | Messages, answer: str) -> list[dict]:
    """A dialogue to learn; one with turns of its own becomes messages."""
    if isinstance(asked, str):
        return [{"prompt": asked, "response": answer}]
    return [{"messages": [*asked, {"role": "assistant", "content": answer}]}]


def rated_text(record: dict) -> list[dict]:
    """A text with a label or a rating: its opening words are the prompt, the rest is the reply."""
    if not record["text"]:
        raise ValueError('"text" is empty')
    asked, rest = cut_opening(record["text"])
    return [{"prompt": asked, "response": rest,
             **{name: record[name] for name in ("label", "score", "scores") if name in record}}]


def by_preference(record: dict) -> list[dict]:
    """AlpacaFarm, AlpacaEval: 1 for the first output, 2 for the second, or between them as an annotator
    weighs the two; 1.5 and 0 are a tie."""
    outputs, preference = [record["output_1"], record["output_2"]], record["preference"]
    if preference not in (0, 1.5) and not 1 <= preference <= 2:
        raise Useless("no choice")
    second = preference > 1.5
    return pair(alpaca(record), outputs[second], outputs[not second], tie=preference in (0, 1.5))


def arena(record: dict) -> list[dict]:
    """LMArena: a person's choice between two dialogues, or a tie."""
    if "winner" in record:
        winner, dialogues = record["winner"], [turns(record[f"conversation_{x}"]) for x in "ab"]
    else:  # the earlier data, with lists written as texts
        asked, *answers = (json.loads(record[name]) for name in ("prompt", "response_a", "response_b"))
        dialogues = [[m for q, a in zip(asked, answer, strict=True) for m in (
            {"role": "user", "content": q}, {"role": "assistant", "content": a or ""})]
            for answer in answers]
        names = {"model_a": "winner_model_a", "model_b": "winner_model_b", "tie": "winner_tie"}
        winner = next((x for x, name in names.items() if as_flag(record.get(name)) == 1), "")
    if winner not in ("model_a", "model_b", *TIES):
        raise Useless("no choice")
    (asked, first), (other, second) = map(last_turn, dialogues)
    if asked != other:
        raise Useless(DIFFER)
    replies = (second, first) if winner == "model_b" else (first, second)
    return pair(asked, *replies, tie=winner in TIES)


def moss(record: dict) -> list[dict]:
    """MOSS: turns whose texts carry their markers. A turn that uses tools is refused."""
    dialogue: Messages = []
    if record.get("meta_instruction", "").strip():
        dialogue.append({"role": "system", "content": record["meta_instruction"].strip()})
    for name, turn in sorted(record["chat"].items(), key=lambda x: int(re.sub(r"\D", "", x[0]) or 0)):
        said = {key: re.sub(r"^<\|[^|]*\|>:\s*|\s*<eo[a-z]>\s*$", "", text) for key, text in turn.items()}
        if said.get("Commands", "None") != "None":
            raise ValueError(f'"{name}" uses a tool: leave such dialogues out')
        dialogue += [{"role": "user", "content": said["Human"]},
                     {"role": "assistant", "content": said["MOSS"]}]
    return [{"messages": dialogue}]


# ---- the forms -----------------------------------------------------------------------------------

@dataclasses.dataclass(frozen=True)
class Form:
    """A form of record: its name, its stage, the fields that it needs with the test of each value,
    how it is read, and fields that it must not have because they would be lost. ours: it is our own, in
    which a record that teaches nothing is a bad line."""

    name: str
    stage: str
    fields: dict[str, Callable[[Any], bool]]
    read: Callable[[dict], list[dict]]
    without: tuple[str, ...] = ()
    ours: bool = False

    def fits(self, record: dict) -> bool:
        """Has the record these fields, with such values?"""
        return (all(name in record and test(record[name]) for name, test in self.fields.items())
                and not any(name in record for name in self.without))

    def __str__(self) -> str:
        return f"{self.name} ({', '.join(self.fields)})"


def form(name: str, stage: str, fields: str, read: Callable[[dict], list[dict]],
         without: str = "") -> Form:
    """A Form from words: fields are names, alone (any value) or as name:text or name:turns."""
    tests = {"": lambda _: True, "text": lambda x: isinstance(x, str), "turns": are_turns}
    pairs = [word.partition(":") for word in fields.split()]
    return Form(name, stage, {field: tests[kind] for field, _, kind in pairs}, read, tuple(without.split()),
                ours=read is own or name == "messages")


def own(record: dict) -> list[dict]:
    """Our own form; a prompt that is a transcript becomes messages."""
    dialogue = waiting_for(record.get("prompt"))
    return [record | {"prompt": dialogue}] if dialogue else [record]


FEEDBACK = ("chosen rejected label score kto_tag winner preference rejected_response completions answers "
            "rating helpfulness scores")
FORMS = (
    # Comparisons.
    form("pairs of dialogues", "reward", "prompt:turns chosen:turns rejected:turns",
         lambda r: pair_of_dialogues(turns(r["chosen"]), turns(r["rejected"]), prompt(r, r["prompt"]))),
    form("pairs of dialogues after a prompt", "reward", "prompt:text chosen:turns rejected:turns",
         lambda r: pair_of_dialogues(turns(r["chosen"]), turns(r["rejected"]), prompt(r, r["prompt"]))),
    form("ShareGPT pairs", "reward", "conversations:turns chosen rejected",
         lambda r: pair(prompt(r, r["conversations"]), reply(r["chosen"]), reply(r["rejected"]))),
    form("pairs after messages", "reward", "messages:turns chosen rejected",
         lambda r: pair(prompt(r, r["messages"]), reply(r["chosen"]), reply(r["rejected"]))),
    form("Alpaca pairs", "reward", "instruction:text chosen rejected",
         lambda r: pair(alpaca(r), reply(r["chosen"]), reply(r["rejected"]))),
    form("Argilla pairs", "reward", "instruction:text chosen_response rejected_response",
         lambda r: pair(alpaca(r), reply(r["chosen_response"]), reply(r["rejected_response"]))),
    form("pairs", "reward", "prompt chosen rejected", own),
    form("pairs after a question", "reward", "question:text chosen rejected",
         lambda r: pair(prompt(r, r["question"]), reply(r["chosen"]), reply(r["rejected"]))),
    form("pairs after an input", "reward", "input:text chosen rejected",
         lambda r: pair(prompt(r, r["input"]), reply(r["chosen"]), reply(r["rejected"]))),
    form("pairs of dialogues that share turns", "reward", "chosen:turns rejected:turns",
         lambda r: pair_of_dialogues(turns(r["chosen"]), turns(r["rejected"]))),
    form("Anthropic HH, or pairs that begin alike", "reward", "chosen:text rejected:text", pair_of_texts,
         without="input question instruction conversations messages"),
    form("messages with a rejected response", "reward", "messages:turns rejected_response:text",
         lambda r: pair(*last_turn(prompt(r, r["messages"])), r["rejected_response"])),
    form("Nectar's ranked answers", "reward", "prompt answers",
         lambda r: pairs_by_rank(prompt(r, r["prompt"]), [(a["rank"], a["answer"]) for a in r["answers"]])),
    form("NeMo's ranked completions", "reward", "context:turns completions",
         lambda r: pairs_by_rank(prompt(r, r["context"]),
                                 [(c["rank"], reply(c["completion"])) for c in r["completions"]])),
    form("LMArena", "reward", "conversation_a:turns conversation_b:turns winner", arena),
    form("LMArena 55k", "reward", "prompt:text response_a:text response_b:text winner_model_a", arena),
    form("AlpacaFarm", "reward", "instruction:text output_1:text output_2:text preference", by_preference),
    # Labels and ratings.
    form("prompts with completions and labels", "reward", "prompt completion label",
         lambda r: labelled(prompt(r, r["prompt"]), reply(r["completion"]), r["label"])),
    form("Alpaca with kto_tag", "reward", "instruction:text output:text kto_tag",
         lambda r: labelled(alpaca(r), reply(r["output"]), r["kto_tag"])),
    form("ShareGPT with kto_tag", "reward", "conversations:turns kto_tag",
         lambda r: labelled(*last_turn(prompt(r, r["conversations"])), r["kto_tag"])),
    form("messages with a label", "reward", "messages:turns label",
         lambda r: labelled(*last_turn(prompt(r, r["messages"])), r["label"])),
    form("Alpaca with a label", "reward", "instruction:text completion:text label",
         lambda r: labelled(alpaca(r), reply(r["completion"]), r["label"])),
    form("questions with completions and labels", "reward", "question:text completion:text label",
         lambda r: labelled(prompt(r, r["question"]), reply(r["completion"]), r["label"])),
    form("labels", "reward", "prompt response label", own),
    form("ratings", "reward", "prompt response score", own),
    form("ratings by several people", "reward", "prompt response scores", own),
    form("labelled texts", "reward", "text:text label", rated_text),
    form("rated texts", "reward", "text:text score", rated_text),
    form("texts rated by several people", "reward", "text:text scores", rated_text),
    # Dialogues.
    form("messages", "sft", "messages:turns",
         lambda r: [{"messages": prompt(r, r["messages"])}], without=FEEDBACK + " response"),
    form("messages", "sft", "messages", own, without=FEEDBACK),
    form("ShareGPT", "sft", "conversations:turns",
         lambda r: [{"messages": prompt(r, r["conversations"])}], without=FEEDBACK),
    form("Alpaca", "sft", "instruction:text output:text", lambda r: answered(alpaca(r), r["output"]),
         without=FEEDBACK),
    form("prompts and completions", "sft", "prompt completion",
         lambda r: answered(prompt(r, r["prompt"]), reply(r["completion"])), without=FEEDBACK),
    form("inputs and outputs", "sft", "input output:text",
         lambda r: answered(prompt(r, r["input"]), r["output"]), without=FEEDBACK + " instruction"),
    form("MOSS", "sft", "chat", moss, without=FEEDBACK),
    form("dialogues", "sft", "prompt response", own, without=FEEDBACK),
    # Texts and prompts.
    form("texts", "pretrain", "text", own, without=FEEDBACK),
    form("prompts", "ppo", "prompt", own, without=FEEDBACK + " response completion"),
    form("messages", "ppo", "messages:turns", lambda r: [{"prompt": unanswered(r, r["messages"])}], without=FEEDBACK),
    form("ShareGPT", "ppo", "conversations:turns",
         lambda r: [{"prompt": unanswered(r, r["conversations"])}], without=FEEDBACK),
    form("Alpaca", "ppo", "instruction:text", lambda r: [{"prompt": alpaca(r)}], without=FEEDBACK),
    form("inputs", "ppo", "input", lambda r: [{"prompt": prompt(r, r["input"])}], without=FEEDBACK),
)


def parse_fields(text: str) -> dict[str, str]:
    """--fields as {our name: the file's name}; UserError if it is not OURS=THEIRS,….

    >>> parse_fields("prompt=question,chosen=good")
    {'prompt': 'question', 'chosen': 'good'}
    """
    found: dict[str, str] = {}
    for word in filter(None, text.split(",")):
        ours, _, theirs = (x.strip() for x in word.partition("="))
        if ours not in OURS or not theirs or ours in found:
            raise UserError(f"--fields {text}: {word!r} is not OUR_NAME=YOUR_NAME, each of ours once: "
                            f"ours are {', '.join(OURS)}")
        found[ours] = theirs
    return found


def names_of(record: dict) -> str:
    """A record's field names, for an error."""
    names = [name[:40] for name in record]
    return ", ".join(names[:12]) + " …" * (len(names) > 12) or "none"


def renamed(record: Any, fields: dict[str, str] | None) -> Any:
    """The record with our names for the file's, and of a table the values that its texts stand for;
    ValueError if it has none of the names that are mapped, or a text stands for no value."""
    if not fields or not isinstance(record, dict):
        return from_cells(record) if isinstance(record, Cells) else record
    theirs = {name: ours for ours, name in fields.items()}
    if not set(theirs) & set(record):
        whose = remedy("fields", "--fields names", "the run was trained on")
        raise ValueError(f"fields found: {names_of(record)}; {whose} {', '.join(theirs)}")
    rest = {name: x for name, x in record.items() if name not in theirs and name not in fields}
    found = rest | {theirs[name]: x for name, x in record.items() if name in theirs}
    return from_cells(found) if isinstance(record, Cells) else found


@functools.cache
def forms_for(kind: str) -> tuple[Form, ...]:
    """The forms for a stage; all of them if it is not known."""
    return tuple(form for form in FORMS if kind in ("", form.stage))


def form_of(record: Any, kind: str = "") -> Form:
    """The form of a record for this stage, or for any. ValueError if there is none: it names the
    fields found and the forms that come near."""
    if not isinstance(record, dict):
        several = isinstance(record, list) and any(isinstance(x, dict) for x in record)
        raise ValueError("not a JSON object" + ": write each record of the list on a line of its own"
                         * several)
    stated = forms_for(kind)
    for form in stated:
        if form.fits(record):
            return form
    # In a file that says its stage, other fields are no danger but for a stage of feedback.
    for form in stated if kind in ("pretrain", "ppo", "sft") else ():
        if dataclasses.replace(form, without=()).fits(record):
            return form

    def missing(form: Form) -> int:
        return sum(name not in record for name in form.fields)

    near = sorted((form for form in stated if missing(form) < len(form.fields)),
                  key=lambda form: (missing(form), -len(form.fields)))[:5]
    raise ValueError(f"fields found: {names_of(record)}; forms that come near: "
                     + ("; ".join(map(str, near)) or "none")
                     + remedy("fields", "; --fields OUR_NAME=YOUR_NAME,… maps others", "; rename the fields")
                     + f", ours are {', '.join(OURS)}" * (not near)
                     + "; a file in a folder says its stage by its name, such as ppo.jsonl" * (not kind))
