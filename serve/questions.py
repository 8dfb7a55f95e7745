"""A chat request in OpenAI's shape: what it asks for, checked, and as ids in the checkpoint's format.

Fields that nobody reads are refused: an answer never ignores in silence what a request asks for.
"""
import bisect
import dataclasses
from collections.abc import Sequence
from typing import Any

from data.records import apply_template
from runtime.options import UserError
from sample import Sampling
from serve.engine import Busy, Engine, Failed, Reply

NUMBERS = {  # the kind of a field, and its range, both ends allowed
    "n": (int, 1, 16), "seed": (int, 0, 2**63 - 1), "max_tokens": (int, 1, 10**6),
    "max_completion_tokens": (int, 1, 10**6), "temperature": (float, 0, 100), "top_p": (float, 0.001, 1),
    "top_k": (int, 0, 10**6), "repetition_penalty": (float, 0.01, 100)}
# Without effect on what is written.
IGNORED = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key",
           "parallel_tool_calls", "prediction"}
# What would change what is written, with the values that ask for nothing.
NEUTRAL = {"logprobs": (False,), "top_logprobs": (0,), "presence_penalty": (0,), "frequency_penalty": (0,),
           "logit_bias": ({},), "tools": ([],), "tool_choice": ("none", "auto"), "functions": ([],),
           "function_call": ("none", "auto"), "response_format": ({"type": "text"},), "modalities": (["text"],)}
KNOWN = {"model", "messages", "stop", "stream", "stream_options", *NUMBERS, *IGNORED, *NEUTRAL}
MOST_STOPS, LONGEST_STOP = 16, 256
DEFAULT_TOKENS = 512  # longest reply if the request does not say


class Refused(Exception):
    """An answer with an error, in OpenAI's shape."""

    TYPES = {429: "rate_limit_error", 503: "server_error", 500: "server_error"}

    def __init__(self, message: str, status: int = 400, param: str | None = None, code: str | None = None):
        super().__init__(message)
        # A request may hold lone surrogates, which no answer can.
        message, param = (text and text.encode("utf-8", "backslashreplace").decode() for text in (message, param))
        self.status = status
        self.body = {"error": {"message": message, "type": self.TYPES.get(status, "invalid_request_error"),
                               "param": param, "code": code}}

    @classmethod
    def of(cls, error: Exception) -> "Refused":
        """The answer to an error of the engine's."""
        if isinstance(error, Refused):
            return error
        if isinstance(error, Busy):
            return cls(str(error), 429, code="busy")
        if isinstance(error, Failed):
            return cls(str(error), 503, code="failed")
        return cls(str(error))


# ---- reading a request ---------------------------------------------------------------------------

@dataclasses.dataclass
class Question:
    """A request, checked."""

    model: str
    messages: list[dict[str, str]]
    numbers: dict[str, float]  # those of NUMBERS that were given
    stop: tuple[str, ...]
    stream: bool
    include_usage: bool


def read_question(body: Any) -> Question:
    """Check a request's body; `Refused` says what is wrong and in which field."""
    if not isinstance(body, dict):
        raise Refused("the body must be a JSON object")
    body = {name: value for name, value in body.items() if value is not None}
    for name in sorted(set(body) - KNOWN):
        raise Refused(f"unknown field {name[:60]!r}", param=name[:60], code="unknown_parameter")
    for name, allowed in NEUTRAL.items():
        if name in body and body[name] not in allowed:
            raise Refused(f"{name} is not supported here; leave it out", param=name, code="unsupported_parameter")
    options = body.get("stream_options", {})
    if not isinstance(options, dict):
        raise Refused("stream_options must be an object", param="stream_options")
    flags = {"stream": body.get("stream", False), "include_usage": options.get("include_usage") or False}
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise Refused(f"{name} must be true or false", param=name)
    if not isinstance(body.get("model", ""), str):
        raise Refused("model must be a text", param="model")
    numbers = {name: read_number(name, body[name]) for name in NUMBERS if name in body}
    return Question(body.get("model", ""), read_messages(body.get("messages")), numbers,
                    read_stop(body.get("stop", [])), **flags)


def read_number(name: str, value: Any) -> float:
    """A field of NUMBERS, checked."""
    kind, low, high = NUMBERS[name]
    if kind is int and isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, int | kind) or isinstance(value, bool) or not low <= value <= high:
        raise Refused(f"{name} must be a {'whole ' * (kind is int)}number from {low:g} to {high:g}", param=name)
    return value


def read_stop(value: Any) -> tuple[str, ...]:
    """The stop strings: one text, or a list."""
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or len(stops) > MOST_STOPS or not all(
            isinstance(stop, str) and 1 <= len(stop) <= LONGEST_STOP for stop in stops):
        raise Refused(f"stop must be a text of 1 to {LONGEST_STOP} characters, or a list of up to {MOST_STOPS}",
                      param="stop")
    return tuple(stops)


def read_messages(value: Any) -> list[dict[str, str]]:
    """Messages as ours: a role and one text each. Their order is checked where they are rendered."""
    if not isinstance(value, list) or not value:
        raise Refused("messages must be a list of at least one message", param="messages")
    messages = []
    for i, message in enumerate(value):
        where = f"messages[{i}]"
        if not isinstance(message, dict):
            raise Refused(f"{where} must be an object", param="messages")
        if message.get("tool_calls") or message.get("function_call"):
            raise Refused(f"{where} calls a tool: tools are not supported here", param="messages")
        role, content = message.get("role"), message.get("content")
        if role not in ("system", "developer", "user", "assistant"):
            raise Refused(f"{where}: role must be system, user or assistant", param="messages")
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if not isinstance(parts, list) or not all(isinstance(part, dict) and part.get("type") == "text" and isinstance(
                part.get("text"), str) for part in parts):
            raise Refused(f"{where}: content must be a text, or a list of text parts", param="messages")
        content = "".join(part["text"] for part in parts)
        messages.append({"role": "system" if role == "developer" else role, "content": content})
    return messages


# ---- from messages to ids ------------------------------------------------------------------------

def prompt_of(engine: Engine, question: Question) -> tuple[list[int], int, int]:
    """(ids, longest reply, messages left out). The first user message stands in the checkpoint's
    template. Of a dialogue that leaves too little room for a reply, the oldest turns are left out; a
    single message that is too long is refused.
    """
    if engine.bare:
        raise Refused("this checkpoint was only pretrained, which teaches no talk; ask an sft or ppo checkpoint",
                      param="model")
    system, turns = question.messages[:1], question.messages[1:]
    if system[0]["role"] != "system":
        system, turns = [], question.messages
    if turns:
        turns = [turns[0] | {"content": apply_template(engine.template, turns[0]["content"])}, *turns[1:]]
    asked = question.numbers.get("max_completion_tokens") or question.numbers.get("max_tokens") or DEFAULT_TOKENS
    asked = min(int(asked), engine.MOST_TOKENS)
    # More than half of what the model reads is a limit, no wish to forget the dialogue for.
    longest = engine.max_len - min(asked, engine.max_len // 2)

    def render(dropped: int) -> list[int]:
        return engine.tokenizer.render_chat([*system, *turns[2 * dropped:]], reply=True)[0]

    try:
        ids, dropped = render(0), 0
        if len(ids) > longest:
            dropped = bisect.bisect_left(range((len(turns) - 1) // 2), True, key=lambda k: len(render(k)) <= longest)
            ids = render(dropped)
    except UserError as error:
        raise Refused(str(error), param="messages") from None
    if len(ids) > longest:
        raise Refused(f"the message is too long by {len(ids) - longest} tokens: this model reads {engine.max_len} "
                      f"tokens, {engine.max_len - longest} of them left for the reply; say it shorter, or lower "
                      "max_tokens", param="messages", code="context_length_exceeded")
    return ids, min(asked, engine.max_len - len(ids)), 2 * dropped


def submit_all(engine: Engine, ids: Sequence[int], max_tokens: int, question: Question, seed: int) -> list[Reply]:
    """n replies of the seed's rows 0…n−1: all, or none."""
    given = question.numbers
    own = {f.name: given[f.name] for f in dataclasses.fields(Sampling) if f.name in given}
    sampling, replies = dataclasses.replace(engine.sampling, **own), []
    try:
        for row in range(int(given.get("n", 1))):
            replies.append(engine.submit(ids, max_tokens=max_tokens, sampling=sampling, seed=seed, row=row,
                                         stop=question.stop))
    except Exception:  # raised again: the caller tells it
        for reply in replies:
            reply.cancel()
        raise
    return replies
