"""Hostile requests against a real server on a free port, most of them as bytes of our own: each is refused, or
changes nothing; afterwards the server still answers, and nothing it said names a file of this machine."""
import contextlib
import json
import re
import socket
import threading
import time

import pytest

uvicorn = pytest.importorskip("uvicorn", reason="the server needs uvicorn")
pytest.importorskip("starlette", reason="the server needs starlette")

from runtime.options import UserError  # noqa: E402
from serve.app import Connection, Server, config_of, create_app, listening  # noqa: E402
from serve.engine import Engine  # noqa: E402
from serve.log import FeedbackLog  # noqa: E402
from serve.pairs import Card, Fixed, Pairs, digest  # noqa: E402
from serve.safety import Rules  # noqa: E402

SCRIPT = "<script>fetch('/api/undo')</script><img src=x onerror=alert(1)>"
BODY = 200_000  # bytes that a request of these tests may have
TOKEN = "correct-horse-battery"
SECONDS = 0.6  # for a body, or for headers, to come
PAGE_TOKEN = "token-of-the-page"
OF_PAGE = (f"X-Mosslet-Token: {PAGE_TOKEN}", "Origin: http://127.0.0.1", "Content-Type: application/json")
ENOUGH = dict(rate=1e6, burst=10**6, port=80)  # so Host headers without a port are right


@contextlib.contextmanager
def running(server: Server, **rules):
    """The port of a server in a thread, under other rules."""
    before, server.rules = server.rules, Rules(**ENOUGH | rules, page_token=PAGE_TOKEN)
    place = listening("127.0.0.1", 0)
    http = uvicorn.Server(config_of(create_app(server)))
    server.rules = before
    thread = threading.Thread(target=http.run, kwargs={"sockets": [place]}, daemon=True)
    thread.start()
    while not http.started:
        time.sleep(0.01)
    yield place.getsockname()[1]
    http.should_exit = http.force_exit = True
    thread.join(10)


@pytest.fixture(scope="module")
def server(world, tmp_path_factory):
    cards = [Card(digest(i), f"prompt {i} {SCRIPT}", (f"left {i} {SCRIPT}", f"right {i}")) for i in range(50)]
    with (FeedbackLog(tmp_path_factory.mktemp("log") / "feedback.jsonl") as log, Pairs(Fixed(cards), log) as pairs,
          Engine(str(world.root / "sft"), device="cpu", dtype="float32", rows=2, most_waiting=4) as engine):
        yield Server(log, pairs, {engine.name: engine})


@pytest.fixture(scope="module")
def port(server):
    with pytest.MonkeyPatch.context() as m:
        m.setattr(Connection, "headers_s", SECONDS)
        with running(server, body=BODY, import_body=2 * BODY, seconds=SECONDS) as port:
            yield port


class Answer:
    """What came back: the status (0 if the connection was closed without a word), headers, body."""

    def __init__(self, raw: bytes):
        self.raw = raw
        head, _, self.body = raw.partition(b"\r\n\r\n")
        lines = head.decode("latin-1").split("\r\n")
        self.status = int(lines[0].split()[1]) if raw else 0
        self.headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines[1:])}
        self.is_whole = len(self.body) >= int(self.headers.get("content-length", 10**9))


def exchange(port: int, *parts: bytes, pause: float = 0.0, quiet: float = 0.0) -> Answer:
    """Send these bytes, and read until the server closes, or its answer is complete and, for `quiet` seconds,
    nothing follows."""
    found = b""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            for part in parts:
                connection.sendall(part)
                time.sleep(pause)
        with contextlib.suppress(TimeoutError, ConnectionResetError):
            while data := connection.recv(65536):
                found += data
                if Answer(found).is_whole:
                    if not quiet:
                        break
                    connection.settimeout(quiet)
    return Answer(found)


def request(line: str, *headers: str, body: bytes = b"", host: str = "127.0.0.1") -> bytes:
    """A request as bytes. headers: "Name: value"."""
    lines = [f"{line} HTTP/1.1", *([f"Host: {host}"] if host else []), *headers]
    if body and not any(name.lower().startswith(("content-length", "transfer-encoding")) for name in headers):
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body


@pytest.fixture
def post(port):
    """post(path, body, *headers): a POST that is in order but for what the test changes."""
    def send(path: str, body: bytes, *headers: str, token: str = PAGE_TOKEN, kind: str = "application/json",
             host: str = "127.0.0.1") -> Answer:
        if not any(header.startswith("Origin:") for header in headers):
            headers = (f"Origin: http://{host}", *headers)
        return exchange(port, request(f"POST {path}", f"X-Mosslet-Token: {token}", f"Content-Type: {kind}",
                                      *headers, body=body, host=host))
    return send


@pytest.fixture(autouse=True)
def unharmed(port, server, capfd):
    """After each test the log is as before, the server answers, and no traceback was printed."""
    before = server.log.events
    yield
    assert server.log.events == before
    assert exchange(port, b"GET /api/state HTTP/1.1\r\nHost: localhost\r\n\r\n").status == 200
    assert "Traceback" not in capfd.readouterr().err


def told_nothing(answer: Answer) -> bool:
    """Does the answer name no file, folder or line of code?"""
    return not re.search(rb"Traceback|File \"|\.py\b|/tmp/|/work/|/home/|/root/|site-packages", answer.raw)


# ---- what is no request ----------------------------------------------------------------------------

CHUNKED = "Transfer-Encoding: chunked"
SMUGGLED = b"0\r\n\r\nGET /api/export?to=trl HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest.mark.parametrize(("raw", "statuses"), [
    (request("POST /api/next", "Content-Length: 5", CHUNKED, body=SMUGGLED), {400}),
    (request("POST /api/next", CHUNKED, "Content-Length: 5", body=SMUGGLED), {400}),
    (request("POST /api/next", "Content-Length: 5", "Content-Length: 6", body=b"123456"), {400}),
    (request("POST /api/next", "Content-Length: 5, 6", body=b"123456"), {400}),
    (request("POST /api/next", "Content-Length: +5", body=b"12345"), {400}),
    (request("POST /api/next", "Content-Length: -1", body=b"12345"), {400}),
    (request("POST /api/next", "Content-Length: 0x5", body=b"12345"), {400}),
    (request("POST /api/next", "Transfer-Encoding: xchunked", body=SMUGGLED), {400, 501}),
    (request("POST /api/next", "Transfer-Encoding: chunked, identity", body=SMUGGLED), {400, 501}),
    (request("POST /api/next", "Transfer-Encoding:\x0bchunked", body=SMUGGLED), {400, 415, 501}),
    (request("POST /api/next", "Transfer-Encoding : chunked", body=SMUGGLED), {400}),
    (request("POST /api/next", "X: 1\r\n Transfer-Encoding: chunked", body=b"{}"), {403, 415}),  # folded into X
    (request("POST /api/next", CHUNKED, body=b"zz\r\n{}\r\n0\r\n\r\n"), {400, 403, 415}),
    (request("POST /api/next", CHUNKED, body=b"ffffffffffffffffffff\r\n{}"), {400, 403, 415}),
    (b"GET / HTTP/1.0\r\n\r\n", {400}),  # no Host
    (b"GET / HTTP/1.1\r\n\r\n", {400}),
    (b"GET /\r\n\r\n", {400}),  # HTTP/0.9
    (b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n", {400}),
    (b"GET / HTTP/1.1\nHost: evil.example\n\n", {400, 403, 421}),  # bare line feeds
    (b"GET / HTTP/1.1\r\nHost: local\0host\r\n\r\n", {400}),
    (b"GET /nowhere HTTP/9.9\r\nHost: localhost\r\n\r\n", {400, 404, 505}),
    (b"PRI * HTTP/2.0\r\n\r\n", {400, 405, 505}),
    (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 64 + b"\r\n\r\n", {400}),  # TLS
    (b"CONNECT evil.example:443 HTTP/1.1\r\nHost: localhost\r\n\r\n", {403, 405}),
    (b"GET http://evil.example/ HTTP/1.1\r\nHost: localhost\r\n\r\n", {400, 404}),
    (b"\xff\xfe\xfd\r\n\r\n", {400}),
], ids=lambda value: None if isinstance(value, set) else repr(value[:70])[2:-1])
def test_what_is_framed_in_two_ways_or_in_none_is_refused(port, raw, statuses):
    answer = exchange(port, raw, quiet=0.1)
    assert answer.status in statuses
    assert answer.raw.count(b"HTTP/1.1 ") == 1  # what was smuggled in the body is no second request
    assert told_nothing(answer)


def test_a_flood_of_headers_is_cut_off(port):
    for flood in (b"X: y\r\n" * 20_000, b"X: " + b"y" * 10**6 + b"\r\n"):
        assert exchange(port, b"GET / HTTP/1.1\r\nHost: localhost\r\n", flood, b"\r\n").status in (0, 400, 431)


def test_a_long_address_is_cut_off(port):
    assert exchange(port, request("GET /" + "a" * 100_000)).status in (0, 400, 414)


# ---- from where ------------------------------------------------------------------------------------

@pytest.mark.parametrize("host", ["evil.example", "localhost.evil.example", "127.0.0.1.nip.io", "127.1", "2130706433",
                                  "0.0.0.0", "[::ffff:127.0.0.1]", "localhost:80:80", "user@localhost", "localhost/",
                                  "xn--lcalhost-9wa", "192.168.0.7"])
def test_only_our_own_names_are_served(port, host):
    for line in ("GET /", "GET /api/export?to=trl", "GET /v1/models"):
        answer = exchange(port, request(line, host=host))
        assert answer.status in (400, 403, 421)
        assert host.encode() not in answer.raw


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:80", "127.0.0.1:80", "[::1]:80", "[::1]",
                                  "localhost:9000", "127.0.0.1:9000"])  # two by a forwarded port
def test_names_of_this_machine_are_served(port, host):
    assert exchange(port, request("GET /api/state", host=host)).status == 200


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://localhost:3000",
                                    "http://127.0.0.1.evil.example", "file://", "", "chrome-extension://abc",
                                    "http://127.0.0.1, http://evil.example"])
def test_a_post_of_another_site_is_refused(post, origin):
    for path, body in (("/api/next", b'{"annotator": "me"}'), ("/v1/chat/completions", b"{}"), ("/api/train", b"{}")):
        assert post(path, body, f"Origin: {origin}").status == 403


def test_a_post_that_the_browser_calls_foreign_is_refused(post, port):
    for site in ("cross-site", "same-site"):
        assert post("/v1/chat/completions", b"{}", f"Sec-Fetch-Site: {site}").status == 403
        assert exchange(port, request("GET /api/records", f"Sec-Fetch-Site: {site}")).status == 403


def test_our_own_page_may_post(post, port):
    own = ["Origin: http://127.0.0.1:80", "Sec-Fetch-Site: same-origin"]
    assert post("/api/next", b'{"annotator": "me"}', *own, host="127.0.0.1:80").status == 200


@pytest.mark.parametrize("token", ["", "x", "{{token}}", "a" * 5000, "\xff"])
def test_a_post_without_the_pages_token_is_refused(post, token):
    for path in ("/api/next", "/api/undo", "/api/answer", "/api/thumb", "/api/import", "/api/train", "/api/train/stop"):
        assert post(path, b'{"annotator": "me"}', token=token).status == 403


def test_answers_allow_no_other_site_to_read_them(port):
    answer = exchange(port, request("GET /api/state", "Origin: http://127.0.0.1"))
    assert answer.status == 200
    assert not [name for name in answer.headers if name.startswith("access-control")]
    assert exchange(port, request("OPTIONS /api/answer", "Access-Control-Request-Method: POST")).status in (403, 405)


# ---- what is asked ---------------------------------------------------------------------------------

@pytest.mark.parametrize("method", ["PUT", "DELETE", "PATCH", "TRACE", "TRACK", "PROPFIND", "GETS"])
def test_other_methods_are_refused(port, method):
    assert exchange(port, request(f"{method} /api/answer")).status in (403, 405)
    own = (f"X-Mosslet-Token: {PAGE_TOKEN}", "Origin: http://127.0.0.1")
    assert exchange(port, request(f"{method} /api/answer", *own)).status == 405


def test_methods_that_belong_to_another_address_are_refused(port, post):
    assert exchange(port, request("GET /api/answer")).status == 405
    assert post("/api/records", b"{}").status == 405


@pytest.mark.parametrize("path", [
    "/../../etc/passwd", "/..%2f..%2fetc%2fpasswd", "/%2e%2e/%2e%2e/etc/passwd", "/..\\..\\etc\\passwd",
    "/..%5c..%5cetc", "//etc/passwd", "/./page.html", "/page.html", "/serve/page.html", "/static/../page.html", "/%00",
    "/api/export/../../x", "/feedback.jsonl", "/%252e%252e/etc/passwd", "/..;/etc/passwd", "/file:///etc/passwd",
    "/.git/config", "/\xe0\x80\xaf..\xe0\x80\xafetc", "/api//state", "/API/STATE", "/v1/models/../../../etc/passwd",
    "/v1/models/%2e%2e"])
def test_no_path_opens_a_file(port, path):
    answer = exchange(port, request(f"GET {path}"))
    assert answer.status in (400, 404)
    assert b"root:" not in answer.raw
    assert told_nothing(answer)
    if not path.startswith("/v1/"):
        assert path.encode("latin-1") not in answer.body


def test_no_query_opens_a_file(port):
    for query in ("to=../../etc/passwd", "to=", "to=trl%00", "to=/etc/passwd"):
        answer = exchange(port, request(f"GET /api/export?{query}"))
        assert answer.status == 400
        assert told_nothing(answer)
    for query in ("offset=-1", "limit=1e9", "offset=%00", "limit=" + "9" * 400, "q=" + "x" * 5000):
        assert exchange(port, request(f"GET /api/records?{query}")).status in (400, 414)


@pytest.mark.parametrize("body", [
    b"", b"{", b"[]", b"null", b'"text"', b"{} {}", b"\xff\xfe{}", b'{"annotator": "a" "b"}', b"[" * 100_000,
    b'{"a":' * 30_000, b'{"annotator": NaN}', b'{"annotator": "me", "x": Infinity}',
    b'{"annotator": "\\ud800"}', b"annotator=me", b"\0" * 100],
    ids=lambda body: repr(body[:24])[2:-1])
def test_malformed_json_is_refused(post, body):
    for path in ("/api/next", "/api/answer", "/api/thumb", "/v1/chat/completions"):
        answer = post(path, body)
        assert answer.status == 400
        assert told_nothing(answer)


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x",
                                  "", "application/jsonp", "text/html, application/json"])
def test_forms_of_other_pages_are_no_json(post, kind):
    assert post("/api/next", b'{"annotator": "me"}', kind=kind).status == 415
    assert post("/v1/chat/completions", b"{}", kind=kind).status == 415


GOOD = {"card": digest(0), "annotator": "me", "choice": "left", "seconds": 1, "id": "0" * 16}


@pytest.mark.parametrize("change", [
    {"choice": "middle"}, {"choice": 1}, {"choice": True}, {"choice": None}, {"choice": ["left"]},
    {"choice": {"a": 1}}, {"card": "x"}, {"card": "0" * 16}, {"card": 10**30}, {"card": "../../etc/passwd"},
    {"id": "A" * 16}, {"id": "0" * 17}, {"id": 5}, {"annotator": ""}, {"annotator": "  "}, {"annotator": "a" * 100},
    {"annotator": "a\nb"}, {"annotator": []}, {"annotator": "a\u202eb"}, {"seconds": "1"}, {"seconds": -1},
    {"seconds": 10**300}, {"seconds": True}, {"strength": 7}, {"strength": 1.5}, {"strength": "2"}, {"comment": 5},
    {"comment": "x" * 300_000}, {"edited": "x"}, {"edited": {"side": "top", "text": "x"}},
    {"edited": {"side": "left", "text": 5}}, {"edited": {"side": "left"}},
], ids=lambda change: json.dumps(change)[:40])
def test_answers_that_mean_nothing_are_refused(post, change):
    answer = post("/api/answer", json.dumps(GOOD | change).encode())
    assert answer.status in (400, 404, 413)
    assert told_nothing(answer)
    assert b"error" in answer.body


@pytest.mark.parametrize("change", [
    {"messages": "x"}, {"messages": []}, {"messages": [{"role": "user", "content": "x"}]}, {"messages": [1, 2]},
    {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": 5}]}, {"label": 2},
    {"label": True}, {"messages": [{"role": "user", "content": "x"}, {"role": "user", "content": "y"}]},
    {"label": "1"}, {"edited": 5},
    {"messages": [{"role": "user", "content": "x"}, {"role": "assistant"}] * 1000}, {"model": 5}, {"id": 7}])
def test_thumbs_that_mean_nothing_are_refused(post, change):
    good = {"annotator": "me", "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}],
            "label": 1, "model": "x", "id": "0" * 16}
    assert post("/api/thumb", json.dumps(good | change).encode()).status == 400


SAID = [{"role": "user", "content": "x"}]


@pytest.mark.parametrize("body", [
    {"temperature": 1e308}, {"messages": [{"role": "user", "content": 5}]}, {"messages": {"a": 1}},
    {"max_tokens": 10**12},
    {"messages": [{"role": "user", "content": "x" * 100_000}]}, {"messages": [{"role": "\ud800", "content": "x"}]},
    {"messages": [{"role": "user", "content": "\ud800"}]}, {"messages": [], "n": 10**9}, {"n": 1000}, {"seed": -1},
    {"model": "../../etc/passwd"}, {"stop": ["a"] * 1000}], ids=lambda body: repr(body)[:60])
def test_chats_that_mean_nothing_are_refused_in_openais_shape(post, body):
    answer = post("/v1/chat/completions", json.dumps({"messages": SAID} | body).encode())
    assert answer.status in (400, 404)
    assert set(json.loads(answer.body)["error"]) == {"message", "type", "param", "code"}
    assert told_nothing(answer)


def test_an_imported_file_of_nonsense_adds_nothing(post):
    lines = b'\n'.join([b"{", b"[" * 5000, b'{"kind": "undo", "id": "0", "annotator": "x"}', b"\xff", b"null",
                        b'"\\ud800"', b'{"prompt": "\\ud800", "chosen": "a", "rejected": "b"}', b'{"prompt": 5}',
                        b"NaN",
                        b'{"id": "0000000000000000", "annotator": "x", "kind": "undo", "of": "1111111111111111"}'])
    answer = post("/api/import?annotator=me", lines, kind="application/x-ndjson")
    assert answer.status == 200
    assert json.loads(answer.body)["added"] == 0
    assert json.loads(answer.body)["left_out"] >= 9
    assert told_nothing(answer)


def test_websockets_and_other_protocols_are_refused(port):
    upgrade = ["Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13",
               "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ=="]
    for path in ("/", "/api/state", "/v1/chat/completions"):  # as if it had not asked
        assert exchange(port, request(f"GET {path}", *upgrade)).status in (200, 400, 405)
    assert exchange(port, request("GET /api/state", "Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c",
                                  "HTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA")).status == 200


# ---- how much ---------------------------------------------------------------------------------------

def test_a_long_request_is_refused_before_it_is_read(port):
    head = request("POST /api/next", *OF_PAGE,
                   f"Content-Length: {10**12}")
    answer = exchange(port, head)
    assert (answer.status, answer.headers["connection"]) == (413, "close")


def test_a_long_chunked_request_is_cut_off(port):
    head = request("POST /api/next", *OF_PAGE, CHUNKED)
    chunk = b"8000\r\n" + b" " * 0x8000 + b"\r\n"
    assert exchange(port, head, *[chunk] * 20).status == 413


def test_a_slow_sender_is_cut_off(port):
    begun = time.monotonic()
    head = request("POST /api/next", *OF_PAGE,
                   "Content-Length: 100")
    assert exchange(port, head, *[b"x"] * 12, pause=0.1).status == 408
    assert exchange(port, b"GET / HTTP/1.1\r\n", *[b"X: y\r\n"] * 12, pause=0.1).status in (0, 408)
    assert exchange(port).status in (0, 408)  # says nothing at all
    assert time.monotonic() - begun < 10


def test_200_idle_connections_lock_nobody_out(port):
    with contextlib.ExitStack() as stack:
        idle = [stack.enter_context(socket.create_connection(("127.0.0.1", port))) for _ in range(200)]
        for connection in idle[::2]:
            with contextlib.suppress(OSError):  # some were closed to make room
                connection.sendall(b"GET / HT")
        assert exchange(port, request("GET /api/state")).status == 200


def test_200_requests_at_once_are_all_answered(port):
    statuses = []
    asked = request("GET /api/state", "Connection: close")
    threads = [threading.Thread(target=lambda: statuses.append(exchange(port, asked).status)) for _ in range(200)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert statuses.count(200) >= 100
    assert set(statuses) <= {200, 0, 429, 503}


def test_who_asks_too_often_has_to_wait(server):
    with running(server, rate=5, burst=10) as port:
        statuses = [exchange(port, request("GET /api/state", "Connection: close")).status for _ in range(30)]
    assert statuses[0] == 200
    assert statuses.count(429) >= 10


def test_of_too_many_connections_the_idle_ones_make_room(port, monkeypatch):
    monkeypatch.setattr("serve.app.MOST_CONNECTIONS", 20)
    with contextlib.ExitStack() as stack:
        for _ in range(60):
            stack.enter_context(socket.create_connection(("127.0.0.1", port)))
        assert exchange(port, request("GET /api/state")).status == 200


# ---- what is answered -------------------------------------------------------------------------------

def test_scripts_in_texts_stay_texts(post, port):
    answer = post("/api/next", b'{"annotator": "reader"}')
    card = json.loads(answer.body)["card"]
    assert SCRIPT in card["turns"][0][1]  # as it is, in JSON
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-content-type-options"] == "nosniff"
    page = exchange(port, request("GET /"))
    assert b"innerHTML" not in page.body
    assert b"insertAdjacentHTML" not in page.body
    assert b"document.write" not in page.body


def test_the_page_runs_its_own_script_alone(port):
    first, second = (exchange(port, request("GET /")) for _ in range(2))
    policies = [dict(part.strip().partition(" ")[::2] for part in x.headers["content-security-policy"].split(";"))
                for x in (first, second)]
    nonce = policies[0]["script-src"].removeprefix("'nonce-").removesuffix("'")
    assert f'<script nonce="{nonce}"'.encode() in first.body
    assert len(nonce) >= 20
    assert policies[0]["script-src"] != policies[1]["script-src"]
    assert policies[0]["default-src"] == "'none'"
    assert policies[0]["frame-ancestors"] == policies[0]["base-uri"] == policies[0]["form-action"] == "'none'"
    assert "unsafe" not in first.headers["content-security-policy"]
    assert not re.search(rb"""(?:src|href)\s*=\s*["']?(?:https?:)?//""", first.body)  # nothing from elsewhere


def test_every_answer_has_the_headers_and_names_no_program(port):
    for line in ("GET /", "GET /api/state", "GET /nowhere", "DELETE /", "GET /v1/models", "HEAD /"):
        answer = exchange(port, request(line, "Connection: close"))
        for name in ("content-security-policy", "x-content-type-options", "referrer-policy", "x-frame-options"):
            assert name in answer.headers, line
        assert "server" not in answer.headers
        assert "no-store" in answer.headers["cache-control"]


def test_a_mistake_of_ours_tells_the_terminal_and_nobody_else(port, server, monkeypatch, capfd):
    def fails(*_: object) -> None:
        raise RuntimeError(f"secret of {__file__}")

    monkeypatch.setattr(Server, "records", fails)
    answer = exchange(port, request("GET /api/records"))
    assert answer.status == 500
    assert b"secret" not in answer.raw
    assert told_nothing(answer)
    assert "secret of" in capfd.readouterr().err


# ---- beyond this machine ------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def guarded(server):
    """The port of a server that others may reach."""
    with running(server, host="0.0.0.0", token=TOKEN) as port:
        yield port


def test_without_a_token_nobody_else_is_let_in():
    for host in ("0.0.0.0", "::", "192.168.0.7", "example.org", ""):
        with pytest.raises(UserError, match="--token"):
            Rules(host=host)
        assert Rules(host=host, token=TOKEN).token == TOKEN
    for host in ("127.0.0.1", "127.0.0.2", "localhost", "::1"):
        assert Rules(host=host).token == ""
    for token in ("short", "with space in it", "ümläut-ümläut"):
        with pytest.raises(UserError, match="--token"):
            Rules(token=token)


@pytest.mark.parametrize("header", ["X: y", "Authorization: Bearer", "Authorization: Bearer wrong-wrong-wrong",
                                    f"Authorization: Basic {TOKEN}", f"Authorization: {TOKEN}", "Cookie: mosslet-0=x",
                                    f"Cookie: mosslet={TOKEN}", f"X-Mosslet-Token: {TOKEN}"])
def test_without_the_token_there_is_no_answer(guarded, header):
    for path in ("/", "/api/state", "/v1/models", "/nowhere", f"/api/state?token={TOKEN}"):
        answer = exchange(guarded, request(f"GET {path}", header, host="192.168.0.7"))
        assert answer.status == 401
        assert b"mosslet-token" not in answer.body


def test_with_the_token_there_is(guarded):
    asked = request("GET /v1/models", f"Authorization: Bearer {TOKEN}", host="192.168.0.7:80")
    assert exchange(guarded, asked).status == 200
    first = exchange(guarded, request(f"GET /?token={TOKEN}"))
    assert first.status == 200
    assert TOKEN.encode() not in first.raw
    cookie = first.headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "samesite=strict" in cookie.lower()
    assert TOKEN not in cookie
    assert exchange(guarded, request("GET /", f"Cookie: other=1; {cookie.split(';')[0]}")).status == 200
    assert exchange(guarded, request("GET /", "Cookie: " + cookie.split(";")[0][:-1] + "x")).status == 401


def test_a_name_that_others_may_point_at_us_is_refused_with_the_token_too(guarded):
    assert exchange(guarded, request("GET /", f"Authorization: Bearer {TOKEN}", host="evil.example")).status == 403


def test_tokens_cannot_be_guessed(server):
    with running(server, token=TOKEN, rate=1, burst=100) as port:
        statuses = [exchange(port, request("GET /", f"Authorization: Bearer {i:020}", "Connection: close")).status
                    for i in range(12)]
    assert statuses[0] == 401
    assert statuses[-1] == 429
