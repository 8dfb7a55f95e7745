"""The chat server's two addresses, in OpenAI's shapes, for any client that speaks them.

    curl http://127.0.0.1:8000/v1/models
    curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' \\
        -d '{"model": "reviews/sft", "messages": [{"role": "user", "content": "这本书"}], "seed": 1}'

Beyond OpenAI's fields a request may have `top_k` and `repetition_penalty`. An answer has the `seed` that
its replies follow from, and `dropped_messages`, the number of oldest messages that were left out because the
dialogue is longer than the model reads.
"""
import asyncio
import contextlib
import json
import secrets
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from runtime.options import UserError
from serve.engine import Busy, Engine, Failed, Reply
from serve.questions import Refused, prompt_of, read_question, submit_all

try:
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import JSONResponse, Response, StreamingResponse
    from starlette.routing import Route
    from starlette.types import Receive, Scope, Send
except ImportError as error:
    raise UserError("the server needs starlette and uvicorn: python -m pip install -r requirements-extra.txt"
                    ) from error

# ---- answering -----------------------------------------------------------------------------------

@contextlib.asynccontextmanager
async def cancelled_with(receive: Receive, replies: Sequence[Reply]) -> AsyncIterator[None]:
    """Within this block replies end when the client goes away, and after it in any case."""
    def cancel() -> None:
        for reply in replies:
            reply.cancel()

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        cancel()

    watching = asyncio.create_task(watch())
    try:
        yield
    finally:
        watching.cancel()
        cancel()


class Events(StreamingResponse):
    """Server-sent events of replies, which end with this response, however that ends."""

    def __init__(self, content: AsyncIterator[bytes], replies: Sequence[Reply]):
        super().__init__(content, media_type="text/event-stream",
                         headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self.replies = replies

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with cancelled_with(receive, self.replies):
            await super().__call__(scope, receive, send)


async def changes(replies: Sequence[Reply]) -> AsyncIterator[tuple[int, str, str]]:
    """(index, new text, finish) of replies while they are written; the text or the finish may be empty.
    Raises the error of the first that failed."""
    loop, changed = asyncio.get_running_loop(), asyncio.Event()
    for reply in replies:
        reply.listen(lambda: loop.call_soon_threadsafe(changed.set))
    going_on = list(range(len(replies)))
    while going_on:
        await changed.wait()
        changed.clear()
        for i in list(going_on):
            done = replies[i].done  # asked before the text is taken: what comes in between is not lost
            text = replies[i].take()
            if done:
                going_on.remove(i)
                replies[i].result()
            if text or done:
                yield i, text, replies[i].finish if done else ""


class Answer:
    """The parts of one answer, in OpenAI's shapes."""

    def __init__(self, engine: Engine, model: str, replies: Sequence[Reply], seed: int, dropped: int):
        self.replies = replies
        self.common = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": model,
                       "system_fingerprint": engine.hash[:12], "seed": seed, "dropped_messages": dropped}

    def usage(self) -> dict[str, int]:
        """Tokens: the prompt counts once."""
        prompt, written = self.replies[0].prompt_tokens, sum(len(reply.ids) for reply in self.replies)
        return {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written}

    def whole(self) -> dict[str, Any]:
        """The answer when all replies have ended."""
        results = [reply.result() for reply in self.replies]
        choices = [{"index": i, "message": {"role": "assistant", "content": text}, "logprobs": None,
                    "finish_reason": finish} for i, (text, _, finish) in enumerate(results)]
        return {**self.common, "object": "chat.completion", "choices": choices, "usage": self.usage()}

    def chunk(self, i: int, delta: dict[str, str], finish: str = "") -> dict[str, Any]:
        """A part of reply i."""
        return {**self.common, "object": "chat.completion.chunk", "choices": [
            {"index": i, "delta": delta, "logprobs": None, "finish_reason": finish or None}]}

    async def events(self, include_usage: bool) -> AsyncIterator[bytes]:
        """The answer as server-sent events."""
        def event(data: dict[str, Any]) -> bytes:
            return f"data: {json.dumps(data, ensure_ascii=False)}\n\n".encode()

        more = {"usage": None} if include_usage else {}
        try:
            for i in range(len(self.replies)):
                yield event(self.chunk(i, {"role": "assistant", "content": ""}) | more)
            async for i, text, finish in changes(self.replies):
                if text:
                    yield event(self.chunk(i, {"content": text}) | more)
                if finish:
                    yield event(self.chunk(i, {}, finish) | more)
            if include_usage:
                yield event(self.chunk(0, {}) | {"choices": [], "usage": self.usage()})
        except (Failed, UserError) as error:  # the status was sent long ago
            yield event(Refused.of(error).body)
        yield b"data: [DONE]\n\n"


# ---- the addresses -------------------------------------------------------------------------------

def refusal(error: Exception) -> Response:
    """The answer to a request that was refused."""
    refused = Refused.of(error)
    return JSONResponse(refused.body, refused.status, {"Retry-After": "1"} if refused.status == 429 else None)


def described(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "mosslet"}


def routes(engines: Mapping[str, Engine]) -> list[Route]:
    """The routes under /v1 for these engines, by the names of their models. The mapping may change later."""
    def known(name: str) -> str:
        name = name or next(iter(engines), "")  # a request without a model means the first
        if name not in engines:
            raise Refused(f"there is no model {name[:60]!r}; GET /v1/models lists them", 404, "model",
                          "model_not_found")
        return name

    def engine_of(name: str) -> tuple[str, Engine]:
        """It may have to be loaded, which takes a while."""
        return known(name), engines[known(name)]

    async def models(request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [described(name) for name in list(engines)]})

    async def model(request: Request) -> Response:
        try:
            return JSONResponse(described(known(request.path_params["name"])))
        except Refused as refused:
            return refusal(refused)

    async def chat(request: Request) -> Response:
        try:
            return await answer(request)
        except (Refused, Busy, Failed, UserError) as error:
            return refusal(error)
        except ClientDisconnect:
            return Response(status_code=499)  # nobody reads it

    async def answer(request: Request) -> Response:
        try:
            question = read_question(json.loads(await request.body()))
        except (ValueError, RecursionError):
            raise Refused("the body is not valid JSON") from None
        # In threads: a checkpoint may have to be loaded, a long prompt takes a while to encode, and others wait
        # for this loop.
        name, engine = await asyncio.to_thread(engine_of, question.model)
        ids, max_tokens, dropped = await asyncio.to_thread(prompt_of, engine, question)
        seed = int(question.numbers.get("seed", secrets.randbits(31)))
        replies = submit_all(engine, ids, max_tokens, question, seed)
        parts = Answer(engine, name, replies, seed, dropped)
        if question.stream:
            return Events(parts.events(question.include_usage), replies)
        async with cancelled_with(request.receive, replies):
            async for _ in changes(replies):
                pass
        return JSONResponse(parts.whole())

    return [Route("/v1/models", models), Route("/v1/models/{name:path}", model),
            Route("/v1/chat/completions", chat, methods=["POST"])]
