"""Dialogues as other tools write them: messages of either naming, transcripts, histories."""
import re
from typing import Any

Messages = list[dict[str, str]]
# Why a record of another tool teaches nothing.
EQUAL, NO_ANSWER = "equal replies", "no answer at the end"
NO_TURNS, DIFFER = "roles that do not alternate", "dialogues that differ before their last answer"
# A turn of a transcript begins a paragraph, in any case: "\n\nHuman: "; elsewhere the words are text.
TURN = re.compile(r"(?:\A\s*|\n[ \t]*\n\s*)(Human|Assistant):[ \t]?", re.IGNORECASE)
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant",
         "system": "system"}


class Useless(ValueError):
    """A record is well formed and teaches nothing, such as two equal replies. It is left out, and
    counted by its reason. detail: what is said instead where it is refused."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(detail or reason)
        self.reason = reason


def are_turns(value: Any) -> bool:
    """Is the value a list of messages, at least one, of either naming?"""
    return isinstance(value, list) and bool(value) and all(
        isinstance(x, dict) and ({"role", "content"} <= set(x) or {"from", "value"} <= set(x)) for x in value)


def turns(value: list) -> Messages:
    """Messages with role and content, from those of either naming; ValueError for what is no text."""
    found = []
    for message in value:
        role, content = (message.get("role", message.get("from")),
                         message.get("content", message.get("value")))
        if any(message.get(name) for name in ("tool_calls", "function_call")) or role not in ROLES:
            raise ValueError(f'the role "{role}" is none of {", ".join(ROLES)}, or calls a tool: leave '
                             "such dialogues out")
        if isinstance(content, list):  # OpenAI's parts
            if any(part.get("type") != "text" for part in content):
                raise ValueError("a message holds more than text: leave such dialogues out")
            content = "".join(part["text"] for part in content)
        if not isinstance(content, str):
            raise ValueError("a message's content must be a text")
        found.append({"role": ROLES[role], "content": content})
    return found


def transcript(text: Any) -> Messages:
    """An HH transcript, `\\n\\nHuman: …\\n\\nAssistant: …`, as messages; [] if it is none. What stands
    before the first turn is a system message. A turn may be empty; no two are joined."""
    if not isinstance(text, str):
        return []
    before, *parts = TURN.split(text.replace("\r\n", "\n"))
    speakers = [speaker.lower() for speaker in parts[::2]]
    if "human" not in speakers:
        return []
    found = [{"role": "system", "content": before.strip()}] * bool(before.strip())
    found += [{"role": "user" if speaker == "human" else "assistant", "content": content.strip()}
              for speaker, content in zip(speakers, parts[1::2], strict=True)]
    return found


def waiting_for(text: Any) -> Messages:
    """The messages of a prompt that is a transcript, without the assistant's turn to be written."""
    found = transcript(text)
    return found[:-1] if found[-1:] == [{"role": "assistant", "content": ""}] else found


def reply(value: Any) -> str:
    """The text of a reply: a text, a message, or a list of one message, which is the assistant's. A
    text's first space is the one between prompt and completion, which our own form does not hold."""
    if isinstance(value, str):
        return value.removeprefix(" ")
    last = turns(value if isinstance(value, list) else [value])
    if [m["role"] for m in last] != ["assistant"]:
        raise ValueError("a reply must be one message, the assistant's")
    return last[0]["content"]


def prompt(record: dict, text: Any) -> str | Messages:
    """A prompt from its text or messages, with the record's "system" and "history" before it."""
    dialogue = turns(text) if isinstance(text, list) else waiting_for(text)
    before = [{"role": "system", "content": record["system"]}] if record.get("system") else []
    for question, answer in record.get("history") or []:
        before += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    if before:
        return [*before, *(dialogue or [{"role": "user", "content": text}])]
    return dialogue or text


def alpaca(record: dict) -> str | Messages:
    """Alpaca's prompt: its instruction and, below, its input."""
    return prompt(record, "\n".join(filter(None, (record["instruction"], record.get("input")))))


def last_turn(dialogue: Messages) -> tuple[Messages, str]:
    """(the turns before the last, the assistant's last words)."""
    if len(dialogue) < 2 or dialogue[-1]["role"] != "assistant":
        raise Useless(NO_ANSWER, "the dialogue must end with the assistant's reply to somebody")
    return dialogue[:-1], dialogue[-1]["content"]


def unanswered(record: dict, dialogue: list) -> str | Messages:
    """The prompt of a dialogue: without the assistant's last words, which may be empty."""
    found = prompt(record, dialogue)
    return found[:-1] if found[-1]["role"] == "assistant" else found
