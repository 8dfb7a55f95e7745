"""How fast the chat server writes: tokens/s of all chats together, and the time to a chat's first text,
for one chat and for many at once.

    python -m tools.bench_serve --from out/reviews/sft --chats 16
    python -m tools.bench_serve --from out/reviews/sft --peer      beside transformers' generate

Measured through the engine, and through HTTP by a client in a process of its own. The peer answers
behind the same server, one request after another, as `generate` does. All replies have --tokens tokens
(none may end earlier). Medians of rounds in turns; the last line is JSON.
"""
import runtime  # noqa: F401 (before torch: it sets how threads wait)
import concurrent.futures
import contextlib
import dataclasses
import http.client
import json
import multiprocessing
import pathlib
import queue
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from convert.exporting import export_model
from convert.importing import as_checkpoint
from runtime.options import Options, UserError, option, parse, run_main
from serve.engine import Engine, Reply
from serve.questions import prompt_of, read_question, submit_all
from serve.replies import ReplyText
from tools.measure import median_range, say

TEXTS = ["这本书", "酒店的房间", "What is the capital of France?", "Please tell me a story about the sea."]
Chat = tuple[float, float, float, int]  # seconds at which it was sent, first read and ended; tokens


@dataclasses.dataclass
class ServeBenchOptions(Options):
    """`python -m tools.bench_serve`"""

    checkpoint: str = option("out/reviews/sft", "checkpoint to measure", flag="from")
    chats: int = option(16, "chats at once, beside one", low=2, high=256)
    tokens: int = option(64, "tokens of each reply", low=2, high=2048)
    repeats: int = option(3, "rounds whose medians are printed", low=1)
    device: str = option("auto", "device to compute on", choices=("auto", "cpu", "cuda", "mps"))
    dtype: str = option("auto", "precision", choices=("auto", "float32", "bfloat16", "int8"))
    compile: bool = option(False, "compile the engine's steps")
    peer: bool = option(False, "measure transformers' generate behind the same server, too")
    traceback: bool = option(False, "show where in the code an error arose")


class Peer:
    """transformers' `generate`, in the place of an engine: one request after another."""

    def __init__(self, checkpoint: str, engine: Engine):
        try:
            import transformers
        except ImportError as error:
            raise UserError("--peer needs transformers: python -m pip install transformers") from error
        for name in ("tokenizer", "template", "bare", "max_len", "sampling", "hash", "MOST_TOKENS"):
            setattr(self, name, getattr(engine, name))
        dtype = torch.bfloat16 if engine.decoder.dtype == torch.bfloat16 else torch.float32
        with tempfile.TemporaryDirectory() as place:
            export_model(as_checkpoint(checkpoint), pathlib.Path(place) / "peer")
            self.model = transformers.AutoModelForCausalLM.from_pretrained(f"{place}/peer", dtype=dtype)
        self.model.to(engine.decoder.device).eval()
        self.asked: queue.SimpleQueue[tuple[Reply, Any, int]] = queue.SimpleQueue()
        threading.Thread(target=self._run, daemon=True).start()

    def submit(self, ids: Sequence[int], *, max_tokens: int, **_: Any) -> Reply:
        reply = Reply(len(ids))
        self.asked.put((reply, torch.tensor([ids], device=self.model.device), max_tokens))
        return reply

    def _run(self) -> None:
        while True:
            reply, ids, n = self.asked.get()
            text, read = ReplyText(self.tokenizer), 0

            class Streamer:
                def put(self, tokens: torch.Tensor) -> None:
                    nonlocal read
                    read += 1
                    for token in tokens.flatten().tolist() if read > 1 else ():  # first comes the prompt
                        reply.ids.append(token)  # noqa: B023 (called before the next request)
                        reply.put(text.add(token)[0])  # noqa: B023

                def end(self) -> None:
                    reply.put(text.rest(), "length")  # noqa: B023

            self.model.generate(ids, attention_mask=torch.ones_like(ids), min_new_tokens=n, max_new_tokens=n,
                                do_sample=True, top_k=0, streamer=Streamer())


# ---- asking --------------------------------------------------------------------------------------

def by_engine(engine: Engine, body: dict) -> Chat:
    """One chat through the engine."""
    start, question = time.perf_counter(), read_question(body)
    ids, max_tokens, _ = prompt_of(engine, question)
    [reply] = submit_all(engine, ids, max_tokens, question, body["seed"])
    pieces = iter(reply)
    next(pieces)
    first = time.perf_counter()
    for _ in pieces:
        pass
    return start, first, time.perf_counter(), len(reply.ids)


def by_http(port: int, body: dict) -> Chat:
    """One chat through HTTP, streamed."""
    start, first, tokens = time.perf_counter(), 0.0, 0
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
    for line in connection.getresponse():
        if line.startswith(b"data: {"):
            part = json.loads(line[6:])
            if not first and any(choice["delta"].get("content") for choice in part["choices"]):
                first = time.perf_counter()
            tokens = (part["usage"] or {}).get("completion_tokens", 0)
    return start, first, time.perf_counter(), tokens


def together(chat: Callable[[Any, dict], Chat], to: Any, bodies: list[dict]) -> dict[str, float]:
    """All chats at once -> tokens per second, and seconds to the first text (median, greatest)."""
    with concurrent.futures.ThreadPoolExecutor(len(bodies)) as pool:
        starts, firsts, ends, tokens = zip(*pool.map(lambda body: chat(to, body), bodies), strict=True)
    waited = [first - start for start, first in zip(starts, firsts, strict=True)]
    return {"tokens_s": sum(tokens) / (max(ends) - min(starts)), "tokens": sum(tokens),
            "first_s": statistics.median(waited), "first_max_s": max(waited)}


@contextlib.contextmanager
def serving(engines: dict[str, Any]) -> Iterator[int]:
    """The port of a server in a thread."""
    try:
        import uvicorn
        from starlette.applications import Starlette
    except ImportError as error:
        raise UserError("this needs starlette and uvicorn: python -m pip install starlette uvicorn") from error
    from serve.api import routes

    place = socket.socket()
    place.bind(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(Starlette(routes=routes(engines)), log_level="error"))
    threading.Thread(target=server.run, kwargs={"sockets": [place]}, daemon=True).start()
    while not server.started:
        time.sleep(0.01)
    yield place.getsockname()[1]
    server.should_exit = True


def main(argv: list[str]) -> None:
    o = parse(ServeBenchOptions, argv, "-m tools.bench_serve")
    with Engine(o.checkpoint, rows=o.chats, device=o.device, dtype=o.dtype, compile=o.compile,
                most_waiting=o.chats) as engine:
        engine.suppress += engine.tokenizer.end_ids  # no reply ends early
        engines = {"engine": engine} | ({"peer": Peer(o.checkpoint, engine)} if o.peer else {})
        body = {"max_tokens": o.tokens, "stream": True, "stream_options": {"include_usage": True}}
        bodies = [{**body, "seed": i, "messages": [{"role": "user", "content": f"{TEXTS[i % len(TEXTS)]} {i}"}]}
                  for i in range(o.chats)]
        measured: dict[str, list[dict[str, float]]] = {}
        spawn = multiprocessing.get_context("spawn")
        with serving(engines) as port, concurrent.futures.ProcessPoolExecutor(1, spawn) as client:
            for i in range(-1, o.repeats):
                for n in (1, o.chats):
                    found = {"engine": together(by_engine, engine, bodies[:n])}
                    for name in engines:
                        asked = [b | {"model": name} for b in bodies[:n]]
                        found[f"{name}, HTTP"] = client.submit(together, by_http, port, asked).result()
                    for name, figures in found.items() if i >= 0 else ():  # the first round warms up
                        measured.setdefault(f"{name}, {n} chats" if n > 1 else f"{name}, 1 chat", []).append(figures)
    rows = [[name, *(median_range([m[key] for m in all_rounds], digits) for key, digits in (
        ("tokens_s", 1), ("first_s", 3), ("first_max_s", 3)))] for name, all_rounds in measured.items()]
    say(f"{engine.name}, {engine.decoder.dtype}, {o.tokens} tokens a reply", rows,
        ("through", "tokens/s", "s to first text", "greatest"))
    print(json.dumps(measured))


if __name__ == "__main__":
    sys.exit(run_main(main, sys.argv[1:]))
