"""The chat server's addresses: OpenAI's shapes, replies as `sample.py` writes them, errors that say what is
wrong; who goes away or reads slowly costs the others nothing."""
import concurrent.futures
import contextlib
import json
import re
import shutil
import socket
import subprocess
import sys
import threading
import time

import pytest

pytest.importorskip("starlette", reason="the server needs starlette")
uvicorn = pytest.importorskip("uvicorn", reason="the server needs uvicorn")
httpx = pytest.importorskip("httpx", reason="these tests need httpx")

from starlette.applications import Starlette  # noqa: E402

import serve.batch  # noqa: E402
from sample import ChatSession, SampleOptions, reply_ids, reply_texts  # noqa: E402
from serve.api import routes  # noqa: E402
from serve.engine import Engine  # noqa: E402
from tests.conftest import ROOT  # noqa: E402

HELLO = [{"role": "user", "content": "这本书很好"}]


@contextlib.contextmanager
def serving(engines: dict[str, Engine]):
    """The address of a server on a free port, in a thread."""
    place = socket.socket()
    place.bind(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(Starlette(routes=routes(engines)), log_level="error"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [place]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{place.getsockname()[1]}/v1"
    server.should_exit = server.force_exit = True
    thread.join(10)


@pytest.fixture(scope="module")
def engines(world):
    settings = dict(device="cpu", dtype="float32", rows=4, most_waiting=8)
    names = [str(world.root / stage) for stage in ("sft", "pretrain")]
    with Engine(names[0], **settings) as engine, Engine(names[1], **settings) as bare:
        yield {"small/sft": engine, "small/pretrain": bare}


@pytest.fixture(scope="module")
def engine(engines):
    return engines["small/sft"]


@pytest.fixture(scope="module")
def address(engines):
    with serving(engines) as address:
        yield address


@pytest.fixture(scope="module")
def ask(address):
    """ask(**fields) posts a request -> httpx's answer."""
    with httpx.Client(timeout=60) as client:
        yield lambda **fields: client.post(f"{address}/chat/completions", json={"messages": HELLO} | fields)


@pytest.fixture
def slow(monkeypatch):
    """Steps of 20 ms, and ends that are never written."""
    step = serve.batch.decode_step
    monkeypatch.setattr(serve.batch, "decode_step", lambda *a: (time.sleep(0.02), step(*a))[1])


def endless(engine: Engine, monkeypatch) -> None:
    monkeypatch.setattr(engine, "suppress", (*engine.suppress, *engine.tokenizer.end_ids))


def until(condition, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)


def events(answer) -> list[dict]:
    """The data of a streamed answer; the last line is [DONE]."""
    lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def as_sample(world, prompt: str, n: int, **options) -> tuple[list[str], list[int], int]:
    """(texts, tokens of the replies, tokens of the prompt) by sample.py."""
    session = ChatSession(str(world.root / "sft"), SampleOptions(device="cpu", **options))
    ids = session.ids(prompt)
    replies = session.replies([ids] * n)
    return reply_texts(session.tokenizer, replies), [len(r) for r in reply_ids(replies)], len(ids)


# ---- answers -------------------------------------------------------------------------------------

def test_the_models_are_listed(address):
    listed = httpx.get(f"{address}/models").json()
    assert listed["object"] == "list" and [m["id"] for m in listed["data"]] == ["small/sft", "small/pretrain"]
    assert httpx.get(f"{address}/models/small/sft").json() == listed["data"][0]
    assert httpx.get(f"{address}/models/other").status_code == 404


def test_replies_are_those_of_sample_py(world, ask):
    settings = dict(seed=7, temperature=0.8, top_p=0.9)
    texts, tokens, prompt = as_sample(world, HELLO[0]["content"], 3, max_new_tokens=40, **settings)
    body = ask(model="small/sft", n=3, max_tokens=40, **settings).json()
    assert [c["message"] for c in body["choices"]] == [{"role": "assistant", "content": t} for t in texts]
    assert [c["index"] for c in body["choices"]] == [0, 1, 2]
    assert {c["finish_reason"] for c in body["choices"]} <= {"stop", "length"}
    assert body["usage"] == {"prompt_tokens": prompt, "completion_tokens": sum(tokens),
                             "total_tokens": prompt + sum(tokens)}
    assert (body["object"], body["model"], body["seed"], body["dropped_messages"]) == (
        "chat.completion", "small/sft", 7, 0)


def test_a_stream_brings_the_same(address, ask):
    fields = dict(messages=HELLO, model="small/sft", n=2, seed=3, max_completion_tokens=30)
    whole = ask(**fields).json()
    with httpx.stream("POST", f"{address}/chat/completions", timeout=60,
                      json=fields | {"stream": True, "stream_options": {"include_usage": True}}) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        parts = events(answer)
    *chunks, last = parts
    assert last["choices"] == [] and last["usage"] == whole["usage"]
    assert {p["object"] for p in parts} == {"chat.completion.chunk"} and len({p["id"] for p in parts}) == 1
    for i in range(2):
        mine = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == i]
        assert mine[0]["delta"] == {"role": "assistant", "content": ""}
        assert "".join(c["delta"].get("content", "") for c in mine) == whole["choices"][i]["message"]["content"]
        reasons = [c["finish_reason"] for c in mine]
        assert reasons[:-1] == [None] * len(reasons[:-1]) and reasons[-1] == whole["choices"][i]["finish_reason"]


def test_without_a_seed_one_is_drawn_and_told(ask):
    first, second = (ask(max_tokens=20).json() for _ in range(2))
    assert first["seed"] != second["seed"]
    again = ask(max_tokens=20, seed=first["seed"]).json()
    assert again["choices"] == first["choices"]


def test_a_stop_string_is_left_out(ask):
    whole = ask(seed=3, max_tokens=60).json()["choices"][0]["message"]["content"]
    stop = whole[10:12]
    for form in (stop, [stop, "not there at all"]):
        choice = ask(seed=3, max_tokens=60, stop=form).json()["choices"][0]
        assert choice["message"]["content"] == whole[:whole.find(stop)] and choice["finish_reason"] == "stop"


def test_texts_may_come_in_parts_and_a_system_message_first(ask, engine):
    parts = [{"type": "text", "text": "这本"}, {"type": "text", "text": "书很好"}]
    assert ask(messages=[{"role": "user", "content": parts}], seed=1).json()["choices"] == (
        ask(seed=1).json()["choices"])
    system = [{"role": "developer", "content": "x"}, *HELLO]
    ids, _ = engine.tokenizer.render_chat([{"role": "system", "content": "x"}, {
        "role": "user", "content": engine.template.replace("{prompt}", HELLO[0]["content"])}], reply=True)
    assert ask(messages=system).json()["usage"]["prompt_tokens"] == len(ids)


def test_the_oldest_turns_of_a_long_dialogue_are_left_out_and_counted(ask, engine):
    turn = [{"role": "user", "content": "很好很好"}, {"role": "assistant", "content": "不错"}]
    body = ask(messages=[{"role": "system", "content": "x"}, *turn * 20, *HELLO], max_tokens=20, seed=1).json()
    dropped = body["dropped_messages"]
    assert 0 < dropped < 40 and dropped % 2 == 0
    kept = [{"role": "system", "content": "x"}, *(turn * 20)[dropped:], *HELLO]
    ids, _ = engine.tokenizer.render_chat(kept, reply=True)
    assert body["usage"]["prompt_tokens"] == len(ids) <= engine.max_len - 20
    more = [kept[0], *(turn * 20)[dropped - 2:], *HELLO]
    assert len(engine.tokenizer.render_chat(more, reply=True)[0]) > engine.max_len - 20


def test_more_tokens_than_there_is_room_for_are_a_limit(ask, engine):
    body = ask(max_tokens=100_000, seed=1).json()
    assert body["usage"]["total_tokens"] <= engine.max_len


# ---- what is refused -----------------------------------------------------------------------------

@pytest.mark.parametrize("status,param,fields", [
    (404, "model", {"model": "gpt-4"}), (404, "model", {"model": "\ud800"}), (400, "model", {"model": 3}),
    (400, "model", {"model": "small/pretrain"}),
    (400, "messages", {"messages": []}), (400, "messages", {"messages": "x"}), (400, "messages", {"messages": [3]}),
    (400, "messages", {"messages": [{"role": "user"}]}),
    (400, "messages", {"messages": [{"role": "tool", "content": "x"}]}),
    (400, "messages", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}),
    (400, "messages", {"messages": [{"role": "assistant", "content": "x"}]}),
    (400, "messages", {"messages": HELLO * 2}), (400, "messages", {"messages": [{"role": "system", "content": "x"}]}),
    (400, "messages", {"messages": [{"role": "user", "content": "\ud800"}]}),
    (400, "messages", {"messages": [{"role": "user", "content": "很" * 400}]}),
    (400, "temperature", {"temperature": -1}), (400, "temperature", {"temperature": "hot"}),
    (400, "temperature", {"temperature": True}), (400, "top_p", {"top_p": 0}), (400, "top_p", {"top_p": 2}),
    (400, "n", {"n": 0}), (400, "n", {"n": 1000}), (400, "n", {"n": 1.5}), (400, "seed", {"seed": -1}),
    (400, "max_tokens", {"max_tokens": 0}), (400, "stop", {"stop": [""]}), (400, "stop", {"stop": ["x"] * 99}),
    (400, "stop", {"stop": 3}), (400, "stream", {"stream": "yes"}), (400, "stream_options", {"stream_options": 1}),
    (400, "tools", {"tools": [{}]}), (400, "logprobs", {"logprobs": True}), (400, "min_p", {"min_p": 0.1}),
    (400, "\\ud800", {"\ud800": 1})])
def test_a_wrong_request_gets_an_error_that_names_the_field(address, status, param, fields):
    answer = httpx.post(f"{address}/chat/completions", content=json.dumps({"messages": HELLO} | fields))
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (status, param)
    assert set(error) == {"message", "type", "param", "code"} and error["message"]


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b"[" * 10**5, b'{"seed": 1' + b"0" * 5000 + b"}",
                                     b'{"messages": [{"role": "user", "content": "x"}], "temperature": NaN}'])
def test_a_body_that_is_no_request_is_refused(address, content):
    assert httpx.post(f"{address}/chat/completions", content=content).status_code == 400


def test_a_full_queue_says_to_come_back(ask, engine, slow, monkeypatch):
    endless(engine, monkeypatch)
    replies = [engine.submit([5], max_tokens=100) for _ in range(4)]
    until(lambda: all(r.ids for r in replies))
    replies += [engine.submit([5], max_tokens=100) for _ in range(8)]
    answer = ask(n=2)
    assert answer.status_code == 429 and answer.headers["retry-after"] and answer.json()["error"]["code"] == "busy"
    for reply in replies:
        reply.cancel()


def test_n_replies_are_all_taken_or_none(ask, engine, slow, monkeypatch):
    endless(engine, monkeypatch)
    assert ask(n=16).status_code == 429  # 4 rows and 8 places in the queue
    until(lambda: not engine.batch.running and not engine.waiting)


def test_a_failure_is_told_before_and_within_a_stream(address, engine, ask, monkeypatch):
    monkeypatch.setattr(serve.batch, "decode_step", lambda *_: 1 / 0)
    answer = ask(seed=1)
    assert answer.status_code == 503 and "ZeroDivisionError" in answer.json()["error"]["message"]
    with httpx.stream("POST", f"{address}/chat/completions", json={"messages": HELLO, "seed": 1, "stream": True}) as s:
        assert events(s)[-1]["error"]["type"] == "server_error"


# ---- many at once --------------------------------------------------------------------------------

@pytest.mark.parametrize("stream", [False, True])
def test_who_goes_away_frees_the_rows(address, engine, slow, monkeypatch, stream):
    endless(engine, monkeypatch)
    request = {"messages": HELLO, "n": 8, "max_tokens": 80, "stream": stream}
    with httpx.Client(timeout=0.5 if not stream else 30) as client:
        if stream:
            with client.stream("POST", f"{address}/chat/completions", json=request) as answer:
                next(answer.iter_lines())
        else:
            with pytest.raises(httpx.ReadTimeout):
                client.post(f"{address}/chat/completions", json=request)
    started = time.monotonic()
    until(lambda: not engine.batch.running and not engine.waiting)
    assert time.monotonic() - started < 2  # eight replies of 80 tokens on four rows take 3.2 s


def test_the_loop_answers_others_while_many_replies_are_written(address, engine, slow, ask, monkeypatch):
    monkeypatch.setattr(engine, "most_waiting", 100)
    post = lambda seed: ask(seed=seed, max_tokens=6)
    with concurrent.futures.ThreadPoolExecutor(48) as pool:
        answers = [pool.submit(post, seed) for seed in range(48)]  # more than a pool of threads for blocking reads
        until(lambda: len(engine.waiting) > 20)
        started = time.monotonic()
        assert httpx.get(f"{address}/models").status_code == 200
        assert time.monotonic() - started < 1
        texts = [a.result().json()["choices"][0]["message"]["content"] for a in answers]
    assert texts[::16] == [post(seed).json()["choices"][0]["message"]["content"] for seed in range(0, 48, 16)]


def test_who_does_not_read_holds_up_nobody(address, ask):
    host, port = address.removeprefix("http://").removesuffix("/v1").split(":")
    body = json.dumps({"messages": HELLO, "n": 4, "stream": True}).encode()
    with socket.create_connection((host, int(port))) as lazy:
        lazy.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        assert all(ask(seed=i, n=4).status_code == 200 for i in range(3))


# ---- other clients -------------------------------------------------------------------------------

def test_the_openai_package_talks_to_it(address, ask):
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=address, api_key="none", max_retries=0, timeout=60)
    assert [m.id for m in client.models.list()] == ["small/sft", "small/pretrain"]
    assert client.models.retrieve("small/sft").id == "small/sft"
    fields = dict(model="small/sft", messages=HELLO, seed=4, max_tokens=30)
    done = client.chat.completions.create(**fields, n=2, temperature=0.9, top_p=0.95, stop=["\n\n\n"])
    assert len(done.choices) == 2 and done.usage.total_tokens > done.usage.prompt_tokens
    done = client.chat.completions.create(**fields)
    chunks = list(client.chat.completions.create(**fields, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == done.choices[0].message.content
    assert chunks[-1].usage == done.usage
    with pytest.raises(openai.NotFoundError, match="no model"):
        client.chat.completions.create(**fields | {"model": "other"})
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.chat.completions.create(**fields, temperature=-1)
    with pytest.raises(openai.BadRequestError, match="only pretrained"):
        client.chat.completions.create(**fields | {"model": "small/pretrain"})


def examples(page: str, language: str) -> list[str]:
    """The code blocks of docs/feedback.md, or of its Chinese page, in a language; "" for commands."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", ["feedback.md", "feedback.zh.md"])
@pytest.mark.skipif(not shutil.which("curl"), reason="curl is not installed")
def test_every_curl_line_of_the_page_does_what_it_says(engine, page):
    lines = [line for block in examples(page, "") for line in block.splitlines() if line.startswith("curl ")]
    assert len(lines) == 3
    with serving({"reviews/sft": engine}) as address:
        models, whole, streamed = (subprocess.run(
            ["bash", "-c", line.replace("http://127.0.0.1:8000/v1", address)], capture_output=True, text=True,
            timeout=60).stdout for line in lines)
    assert json.loads(models)["data"][0]["id"] == "reviews/sft"
    assert json.loads(whole)["choices"][0]["message"]["content"]
    assert streamed.startswith("data: {") and streamed.endswith("data: [DONE]\n\n")


@pytest.mark.parametrize("page", ["feedback.md", "feedback.zh.md"])
def test_the_python_of_the_page_prints_a_reply(engine, page):
    pytest.importorskip("openai")
    [code] = examples(page, "python")
    with serving({"reviews/sft": engine}) as address:
        done = subprocess.run([sys.executable, "-c", code.replace("http://127.0.0.1:8000/v1", address)],
                              capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout.strip(), done.stderr


@pytest.mark.skipif(not shutil.which("curl"), reason="curl is not installed")
def test_curl_talks_to_it(address):
    done = subprocess.run(["curl", "-sN", f"{address}/chat/completions", "-H", "Content-Type: application/json", "-d",
                           json.dumps({"messages": HELLO, "stream": True})], capture_output=True, text=True)
    assert done.stdout.startswith("data: {") and done.stdout.endswith("data: [DONE]\n\n")
