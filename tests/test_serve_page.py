"""The page in a real browser: what a person presses is what the log holds; it stays text, readable and
reachable. The server here is a small one of this file, on the real log, questions and figures.

    MOSSLET_SHOTS=/tmp/shots python -m pytest tests/test_serve_page.py      keeps the screenshots
"""
import contextlib
import http.server
import io
import json
import os
import pathlib
import re
import socket
import sys
import threading
import time
import types
import zipfile

import pytest

from serve.exports import exported, saved
from serve.log import FeedbackLog, NotSaved
from serve.pairs import Card, Fixed, Pairs
from serve.strip import strip
from serve.training import CURVES
from tests.conftest import ROOT

playwright = pytest.importorskip("playwright.sync_api", reason="the page is tried in a browser by playwright")
CHROMIUM = "/usr/bin/chromium"
PAGE = (ROOT / "serve" / "page.html").read_text(encoding="utf-8")
TABS = ("compare", "chat", "train", "data")
CSP = ("default-src 'none'; script-src 'nonce-n0nce'; style-src 'nonce-n0nce'; connect-src 'self'; base-uri 'none'; "
       "form-action 'none'; frame-ancestors 'none'")
HOSTILE = "<script>window.hit = 1</script><img src=x onerror='window.hit = 2'>{{token}} ${window.hit = 3}"
WORDS = "a film that nobody will forget soon because its people are true".split()


# ---- a small server ------------------------------------------------------------------------------

class Small:
    """What serve/app.py does, without checkpoints: a log, cards, chats that say the same, a round that only
    draws its curve. `failing`: how many answers are not saved. `asked`: bodies of the posts, by path. `token`: what
    posts must carry; a server that was started anew has another."""

    def __init__(self, folder: pathlib.Path, mode: str = "compare", cards: list[Card] | None = None):
        self.mode, self.log = mode, FeedbackLog(folder / "feedback.jsonl")
        self.cards = cards or make_cards(40)
        self.pairs = Pairs(Fixed(self.cards), self.log)
        self.failing, self.waiting, self.slow, self.asked, self.token = 0, 0, 0.0, [], "t0ken"
        self.train = {"running": False, "stage": "", "lines": [], "curves": {}, "before_after": [], "changed": None}
        handler = type("Handler", (Handler,), {"small": self})
        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/"
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()
        self.pairs.close()
        self.log.close()

    def shown(self, card: Card) -> dict:
        names = ("left", "right") if self.mode == "compare" else ("reply",)
        return {"id": card.id, "turns": card.turns, **dict(zip(names, card.shown, strict=len(names) == 2))}

    def api_next(self, body: dict) -> dict:
        if self.waiting:
            self.waiting -= 1
            return {"waiting": True}
        time.sleep(self.slow)
        card = self.pairs.next(body["annotator"], 2)
        return {"card": self.shown(card)} if card else {"done": True}

    def api_answer(self, body: dict) -> dict:
        time.sleep(self.slow)
        if self.failing:
            self.failing -= 1
            raise NotSaved(self.log.path, "no space left on this disk")
        card, who = self.pairs.find(body["card"], body["annotator"], 2), body["annotator"]
        more = {name: body.get(name) for name in ("id", "strength", "comment", "seconds")}
        record = self.log.append(card.record(who, body["choice"], self.mode, **more))
        if body.get("edited"):
            self.log.append(card.edit(who, record["id"], body["edited"]["side"], body["edited"]["text"]))
        names = dict(zip(("left", "right"), [card.names[i] for i in card.order], strict=True))
        return {"names": names, **self.figures(who)}

    def api_undo(self, body: dict) -> dict:
        event, who = self.log.undo(body["annotator"], body.get("id")), body["annotator"]
        if event is None:
            return {"card": None, **self.figures(who)}
        answer = {"choice": event.get("choice", event.get("score", event.get("label", "skip"))),
                  **{name: event.get(name) for name in ("strength", "comment")}}
        return {"card": self.shown(self.pairs.find(event["card"], who, 2)), "answer": answer, **self.figures(who)}

    def api_thumb(self, body: dict) -> dict:
        *prompt, reply = body["messages"]
        self.log.append({"id": body["id"], "annotator": body["annotator"], "kind": "label", "prompt": prompt,
                         "response": reply["content"], "label": body["label"], "from": [body["model"]]})
        return {"saved": saved(self.log.events, body["annotator"])}

    def figures(self, who: str) -> dict:
        return {"saved": saved(self.log.events, who), "strip": strip(self.log.events, who)}

    def records(self, query: dict) -> dict:
        rows = [row for row in reversed(self.log.events) if query.get("kind", row["kind"]) == row["kind"]
                and query.get("q", "") in json.dumps(row, ensure_ascii=False)
                and query.get("who", row["annotator"]) == row["annotator"]]
        at = int(query["offset"])
        return {"total": len(rows), "rows": rows[at:at + int(query["limit"])]}


class Handler(http.server.BaseHTTPRequestHandler):
    """The addresses of a Small."""

    small: Small

    def log_message(self, *_: object) -> None:
        pass

    def send(self, body: bytes, status: int = 200, kind: str = "application/json", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        small, (path, _, query) = self.small, self.path.partition("?")
        found = {name: value for name, value in http.server.urllib.parse.parse_qsl(query) if value}
        if path == "/":
            page = PAGE.replace("{{nonce}}", "n0nce").replace("{{token}}", small.token)
            return self.send(page.encode(), kind="text/html; charset=utf-8", Content_Security_Policy=CSP)
        answer = {"/api/state": lambda: {"mode": small.mode, "models": ["reviews/sft", "reviews/ppo"],
                                         "saved": saved(small.log.events, found.get("annotator"))},
                  "/v1/models": lambda: {"data": [{"id": "reviews/sft"}, {"id": "reviews/ppo"}]},
                  "/api/train": lambda: small.train, "/api/records": lambda: small.records(found)}.get(path)
        self.send(json.dumps(answer() if answer else {"error": "no such address"}).encode(), 200 if answer else 404)

    def do_POST(self) -> None:
        small, path = self.small, self.path.partition("?")[0]
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers["X-Mosslet-Token"] != small.token:
            return self.send(b'{"error": "reload the page"}', 403)
        if path == "/v1/chat/completions":
            return self.stream(json.loads(body))
        body = json.loads(body)
        small.asked.append((path, body))
        try:
            answer, status = getattr(small, path[1:].replace("/", "_"))(body), 200
        except NotSaved as error:
            answer, status = {"error": f"not saved: {error.reason}"}, 507
        self.send(json.dumps(answer).encode(), status)

    def stream(self, body: dict) -> None:
        """Server-sent events that end in the middle of a character."""
        turn = sum(message["role"] == "user" for message in body["messages"])
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        for word in ("Reply ", f"{turn}: ", "café ", "好 ", HOSTILE if "hostile" in str(body) else "end"):
            event = json.dumps({"choices": [{"index": 0, "delta": {"content": word}}]}, ensure_ascii=False).encode()
            for part in (event[:-10], event[-10:]):
                self.wfile.write((b"data: " if part is not event[-10:] and part == event[:-10] else b"") + part)
                self.wfile.flush()
                time.sleep(self.small.slow)
            self.wfile.write(b"\n\n")
        self.wfile.write(b"data: [DONE]\n\n")


def make_cards(n: int) -> list[Card]:
    """Cards whose replies begin alike and end differently."""
    return [Card(f"{i:016x}", f"The film number {i}", (" ".join(WORDS[:5 + i % 7]) + f" ({i}).",
                                                       " ".join(WORDS[:3]) + f" I left early: {i} of 100."),
                 ("reviews/sft", "reviews/ppo"), ("aa", "bb"), {"temperature": 1.0}) for i in range(n)]


# ---- the real server -----------------------------------------------------------------------------

# A round that only writes its curve: the files are those of `train.py loop`.
ROUND = """
import json, pathlib, sys, time
folder = pathlib.Path(sys.argv[1]); (folder / "ppo").mkdir(parents=True)
print("round 1: in", folder, flush=True)
for step in range(1, 1000):
    with open(folder / "ppo" / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": step, "raw_score": step / 10, "kl": step / 100}) + "\\n")
    time.sleep(0.05)
"""


@contextlib.contextmanager
def real_app(folder: pathlib.Path, checkpoint: pathlib.Path):
    """serve/app.py with a tiny checkpoint, on the cards of this file."""
    pytest.importorskip("starlette", reason="the server needs starlette")
    uvicorn = pytest.importorskip("uvicorn", reason="the server needs uvicorn")
    from serve.app import Server, create_app
    from serve.engine import Engine
    from serve.safety import Rules
    from serve.training import Training
    place = socket.create_server(("127.0.0.1", 0))
    port, log = place.getsockname()[1], FeedbackLog(folder / "feedback.jsonl")
    with Engine(str(checkpoint), device="cpu", dtype="float32", rows=2) as engine:
        training = Training(log.path, checkpoint, folder / "training", lambda *words: [
            sys.executable, "-ISc", ROUND, str(folder / "training" / "loop" / "round-1")])
        server = Server(log, Pairs(Fixed(make_cards(40)), log), {engine.name: engine}, training,
                        rules=Rules(port=port))
        running = uvicorn.Server(uvicorn.Config(create_app(server), lifespan="off", log_level="critical"))
        thread = threading.Thread(target=running.run, kwargs={"sockets": [place]}, daemon=True)
        thread.start()
        yield types.SimpleNamespace(url=f"http://127.0.0.1:{port}/", log=log, name=engine.name)
        running.should_exit = running.force_exit = True
        thread.join(10)
        server.close()


# ---- a browser -----------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def browser():
    if not os.path.exists(CHROMIUM):
        pytest.skip(f"no browser: {CHROMIUM} is not there")
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield opened
        opened.close()


@pytest.fixture
def small(tmp_path):
    server = Small(tmp_path)
    yield server
    server.close()


def visit(browser, server, name="Ada", allowed=(), tab="", **context):
    """The page, with a person's name given; any error in its console but those allowed fails."""
    context = browser.new_context(**{"locale": "en-GB", "viewport": {"width": 1100, "height": 800}, **context})
    page = context.new_page()
    page.set_default_timeout(5000)
    page.problems = []
    page.on("console", lambda m: m.type == "error" and not any(x in m.text for x in allowed)
            and page.problems.append(m.text))
    page.on("pageerror", lambda error: page.problems.append(str(error)))
    page.goto(server.url + tab)
    if name:
        page.fill("#name", name)
        page.keyboard.press("Enter")
        page.wait_for_selector("#card", state="visible" if not tab else "attached")
    return page


def until(page, expression: str, seconds: float = 5) -> None:
    """Wait until an expression is true; playwright's own waiting would need `eval`, which the policy forbids."""
    end = time.monotonic() + seconds
    while not page.evaluate(f"() => Boolean({expression})"):
        assert time.monotonic() < end, f"never: {expression}"
        time.sleep(0.01)


def say(page, key: str = "", click: str = "") -> None:
    """Answer by key or by button, and wait for the next card."""
    before = page.text_content("#saved")
    page.keyboard.press(key) if key else page.click(click)
    until(page, f"saved.textContent !== {json.dumps(before)} && !busy")


def clean(page) -> None:
    assert page.problems == []
    page.context.close()


# ---- the whole way -------------------------------------------------------------------------------

def test_the_log_holds_what_a_person_did(browser, world, tmp_path):
    """On the real server: twenty answers by key and button, two undone, one edited, a reload, a chat, a round,
    an export."""
    with real_app(tmp_path, world.root / "sft") as real:
        page = visit(browser, real)
        answer_twenty(page, real.log)
        chat(page, real)
        watch_a_round(page)
        export(page, real.log)
        clean(page)


def answer_twenty(page, log) -> None:
    """Compare; with a reload in between."""
    steps = ["ArrowLeft", "ArrowRight", "t", "b"] * 3
    for key in steps:
        say(page, key)
    assert page.text_content("#saved") == "✓ 12 saved"
    for choice in ("left", "right", "tie", "both_bad"):
        say(page, click=f"[data-choice={choice}]")
    assert "was reviews/" in page.text_content("#last")
    say(page, "u")  # both bad
    assert page.get_attribute("[data-choice=both_bad]", "aria-pressed") == "true"
    say(page, "Backspace")  # the tie
    page.keyboard.press("2")
    page.keyboard.press("c")
    page.keyboard.type("left is 2 kind, but t and s are only letters")
    page.keyboard.press("Escape")
    say(page, "ArrowLeft")
    page.keyboard.press("Shift+E")
    page.fill("#edit-field", "A better film.")
    page.keyboard.press("Escape")
    say(page, "ArrowRight")
    say(page, "u")  # the edit comes back with the answer
    assert page.input_value("#edit-field") == "A better film."
    say(page, "ArrowRight")
    page.click("#tab-data")
    page.reload()
    assert page.get_attribute("#tab-data", "aria-selected") == "true" and page.text_content("#saved") == "✓ 16 saved"
    page.click("#tab-compare")
    page.wait_for_selector("#card", state="visible")
    for key in ("ArrowLeft", "ArrowRight", "t", "b"):
        say(page, key)
    standing = log.standing()
    answers = [event for event in standing if event["kind"] == "pair"]
    assert [event["choice"] for event in answers] == [
        *["left", "right", "tie", "both_bad"] * 3, "left", "right", "left", "right", "left", "right", "tie", "both_bad"]
    assert len({event["card"] for event in answers}) == 20 and len(log.events) == 20 + 2 + 2 + 1 + 3
    [edit] = [event for event in standing if event["kind"] == "edit"]
    assert (edit["response"], edit["of"]) == ("A better film.", answers[15]["id"])
    assert edit["original"] == answers[15]["right"]
    assert answers[14]["strength"] == 2 and answers[14]["comment"] == "left is 2 kind, but t and s are only letters"
    assert all("strength" not in event for event in answers if event is not answers[14])
    assert all(0 < event["seconds"] < 60 and event["annotator"] == "Ada" for event in answers)


def export(page, log) -> None:
    """What is downloaded is what serve/exports.py makes of the log."""
    page.click("#tab-data")
    with page.expect_download() as download:
        page.click("[data-export=trl-standard]")
    content = pathlib.Path(download.value.path()).read_bytes()
    files, _ = exported(log.events, "trl-standard")
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        found = {name: [json.loads(line) for line in archive.read(name).splitlines()] for name in archive.namelist()}
    assert found == files and download.value.suggested_filename == "feedback-trl-standard.zip"


def chat(page, real) -> None:
    """Three turns; a thumb at the second answer stands in the log with the turns before it."""
    page.click("#tab-chat")
    for n in (1, 2, 3):
        page.fill("#message", f"message {n}")
        page.keyboard.press("Enter")
        until(page, f"turns.length === {2 * n} && !stopper", 20)
    replies = page.locator(".turn.assistant > .text").all_text_contents()
    assert len(replies) == 3 and all(replies)
    page.locator(".turn.assistant").nth(1).get_by_role("button", name="Good answer").click()
    until(page, "saved.textContent.includes('21')")
    assert page.locator("[aria-pressed=true][aria-label='Good answer']").count() == 1
    last = real.log.events[-1]
    assert (last["kind"], last["label"], last["response"], last["from"]) == ("label", 1, replies[1], [real.name])
    first, reply, second = (message["content"] for message in last["prompt"])
    assert "message 1" in first and (reply, second) == (replies[0], "message 2")


def watch_a_round(page) -> None:
    """A curve is drawn while it runs, and is longer at the next look; a round can be stopped."""
    page.click("#tab-train")
    page.fill("#updates", "3")
    page.click("#train-start")
    page.wait_for_selector("#curves polyline")
    first = page.get_attribute("#curves polyline", "points")
    until(page, f"document.querySelector('#curves polyline').getAttribute('points').length > {len(first)}")
    page.click("#train-stop")
    until(page, "!training.running")
    assert page.is_enabled("#train-start") and page.is_disabled("#train-stop")


# ---- failures ------------------------------------------------------------------------------------

def test_what_is_not_saved_stays_on_the_screen(browser, small):
    """The card stays with the error, "try again" sends the same id, and meanwhile no button answers."""
    page = visit(browser, small, allowed=("507",))
    small.failing, small.slow = 1, 0.1
    prompt = page.text_content("#prompt")
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowRight")  # busy: not an answer to the card that comes
    assert page.is_disabled("[data-choice=left]")
    page.wait_for_selector("#problem", state="visible")
    assert page.text_content("#problem-text") == "not saved: no space left on this disk"
    assert page.text_content("#saved") == "✓ 0 saved" and page.text_content("#prompt") == prompt
    assert small.log.events == []
    say(page, click="#retry")
    first, second = (body for path, body in small.asked if path == "/api/answer")
    assert first == second and [event["id"] for event in small.log.events] == [first["id"]]
    assert page.is_hidden("#problem") and page.text_content("#prompt") != prompt
    clean(page)


def test_a_server_that_was_started_anew_needs_no_reload(browser, small):
    """Its token is another one: the page fetches it, and what was typed is not lost."""
    page = visit(browser, small, allowed=("403",))
    page.keyboard.press("e")
    page.keyboard.type("Better.")
    page.keyboard.press("Escape")
    small.token = "an0ther"
    say(page, "ArrowLeft")
    small.token = "a-third"
    page.click("#tab-chat")
    page.fill("#message", "Hello")
    page.keyboard.press("Enter")
    until(page, "turns.length === 2 && !stopper")
    page.locator(".turn.assistant button").first.click()
    until(page, "saved.textContent.includes('2')")
    assert [event["kind"] for event in small.log.events] == ["pair", "edit", "label"]
    clean(page)


def test_another_persons_card_is_not_answered(browser, small):
    """Sides are in an order of each person's own: after a change of the name the card goes at once."""
    page, first = visit(browser, small), small.cards[0]
    other = next(name for name in ("Bo", "Cy", "Di", "Ed", "Flo") if small.pairs._for(first, name).shown
                 != small.pairs._for(first, "Ada").shown)
    small.slow = 0.3
    page.click("#who")
    page.fill("#name", other)
    page.keyboard.press("Enter")
    seen = page.evaluate("card && card.left")
    page.keyboard.press("ArrowLeft")
    assert seen in (None, small.pairs._for(first, other).shown[0])
    page.wait_for_selector("#card", state="visible")
    until(page, "!busy")
    if not small.log.events:
        say(page, "ArrowLeft")
    [event] = small.log.events
    assert (event["annotator"], event["chosen"]) == (other, small.pairs._for(first, other).shown[0])
    clean(page)


def test_keys_are_quiet_where_somebody_types_or_means_the_browser(browser, small):
    page = visit(browser, small)
    small.waiting = 1
    for key in ("Control+u", "Alt+ArrowLeft", "Meta+b"):
        page.keyboard.press(key)
    page.keyboard.press("?")
    page.keyboard.press("t")  # the list of keys is open
    page.keyboard.press("Escape")
    page.keyboard.down("t")
    for _ in range(5):
        page.keyboard.down("t")  # held: it repeats
    until(page, "saved.textContent.includes('1') && !busy && card")  # a card was waited for, too
    page.keyboard.up("t")
    page.focus("[data-choice=left]")
    for _ in range(5):
        page.keyboard.down("Enter")
        page.wait_for_timeout(50)
    until(page, "saved.textContent.includes('2') && !busy && card")
    page.keyboard.up("Enter")
    page.click("#tab-chat")
    page.keyboard.press("t")
    page.wait_for_timeout(50)
    assert [path for path, _ in small.asked if path != "/api/next"] == ["/api/answer"] * 2
    clean(page)


def test_what_somebody_types_stays_until_it_is_saved_or_closed(browser, small):
    """A thumb, a new message, another language, a reload, and the own name said again."""
    page = visit(browser, small)
    page.keyboard.press("e")
    page.fill("#edit-field", "My own words.")
    page.click("#who")
    page.keyboard.press("Enter")
    assert page.input_value("#edit-field") == "My own words."
    page.click("#tab-chat")
    for n, text in enumerate(("Hello", "And then?"), 1):
        page.fill("#message", text)
        page.keyboard.press("Enter")
        until(page, f"turns.length === {2 * n} && !stopper")
        if n == 1:
            page.locator(".turn.assistant button").nth(2).click()
            page.fill("#better-1", "A better reply")
    assert page.input_value("#better-1") == "A better reply"
    page.locator(".turn.assistant").nth(1).locator("button").first.click()
    until(page, "saved.textContent.includes('1')")
    page.click("#language")
    page.reload()
    assert page.input_value("#better-1") == "A better reply"
    page.locator(".turn.assistant").nth(0).locator("button.main").click()
    until(page, "saved.textContent.includes('2') && !document.getElementById('better-1')")
    [body] = [body for path, body in small.asked if path == "/api/thumb" and body.get("edited")]
    assert body["edited"] == "A better reply" and body["messages"][-1]["content"].startswith("Reply 1")
    clean(page)


def test_other_modes(browser, tmp_path):
    for mode, keys, field, values in (("rate", "315", "score", [3, 1, 5]), ("label", "gb", "label", [1, 0])):
        (tmp_path / mode).mkdir()
        server = Small(tmp_path / mode, mode)
        page = visit(browser, server)
        for key in keys:
            say(page, key)
        page.keyboard.press("s")
        until(page, "document.getElementById('last').textContent.includes('Skip')")
        page.keyboard.press("u")
        until(page, "document.getElementById('last').textContent.includes('Taken back')")
        assert [event[field] for event in server.log.standing()] == values
        clean(page)
        server.close()


def test_hostile_texts_stay_text(browser, tmp_path):
    """Markup in prompts, replies, names, records and chats is shown, and nothing of it runs."""
    cards = [Card(f"{i:016x}", HOSTILE, (HOSTILE + " one", HOSTILE + " two"), (HOSTILE, HOSTILE + "!"))
             for i in range(3)]
    server = Small(tmp_path, cards=cards)
    page = visit(browser, server, name=HOSTILE[:60])
    assert HOSTILE in page.text_content("#prompt")
    assert page.locator("#replies .text").all_text_contents() == [HOSTILE + end for end in (
        (" one", " two") if cards[0].order == (0, 1) and page.text_content("#replies .text").endswith("one")
        else (" two", " one"))]
    say(page, "ArrowLeft")
    assert HOSTILE in page.text_content("#last")
    server.train |= {"stage": HOSTILE, "lines": [HOSTILE], "curves": {HOSTILE: [[1, 1.0]]},
                     "before_after": [{"prompt": HOSTILE, "before": HOSTILE, "after": HOSTILE}]}
    for tab in TABS[1:]:
        page.click(f"#tab-{tab}")
    page.wait_for_selector("#rows tr")
    page.click("#tab-chat")
    page.fill("#message", "hostile")
    page.click("#send")
    until(page, "turns.length === 2 && !stopper")
    assert page.text_content(".turn.assistant > .text").endswith(HOSTILE)
    assert page.evaluate("window.hit") is None and page.locator("main img, main script").count() == 0
    clean(page)
    server.close()


def test_without_storage_the_page_works(browser, small):
    page = visit(browser, small, name="")
    page.context.add_init_script("for (const s of ['localStorage', 'sessionStorage']) "
                                 "Object.defineProperty(window, s, {get() { throw new Error('off'); }})")
    page.reload()
    page.fill("#name", "Bo")
    page.keyboard.press("Enter")
    page.wait_for_selector("#card", state="visible")
    say(page, "t")
    assert small.log.events[0]["annotator"] == "Bo"
    clean(page)


# ---- for everybody ---------------------------------------------------------------------------------

LOOK = """() => {
  const light = (c) => { const [r, g, b] = c.map((x) => (x /= 255) <= .03928 ? x / 12.92 : ((x + .055) / 1.055) ** 2.4);
    return .2126 * r + .7152 * g + .0722 * b; };
  const rgb = (s) => s.match(/[\\d.]+/g).map(Number);
  const ground = (n) => { for (; n; n = n.parentElement) { const c = rgb(getComputedStyle(n).backgroundColor);
    if (c.length < 4 || c[3]) return c.slice(0, 3); } return [255, 255, 255]; };
  const found = [];
  for (const n of document.querySelectorAll("body *")) {
    const own = [...n.childNodes].some((c) => c.nodeType === 3 && c.data.trim());
    if (!own || !n.checkVisibility({visibilityProperty: true}) || n.closest("script")) continue;
    const style = getComputedStyle(n), svg = n instanceof SVGElement;
    const [a, b] = [light(rgb(svg ? style.fill : style.color)), light(ground(n))].sort((x, y) => y - x);
    const ratio = (a + .05) / (b + .05);
    if (ratio < 4.5) found.push(n.tagName + " " + n.textContent.slice(0, 30) + " " + ratio.toFixed(2));
  }
  const ids = [...document.querySelectorAll("[id]")].map((n) => n.id);
  if (new Set(ids).size < ids.length) found.push("an id twice");
  if (document.documentElement.scrollWidth > innerWidth) found.push("scrolls sideways: "
    + document.documentElement.scrollWidth);
  for (const n of document.querySelectorAll("main *")) if (n.checkVisibility() && n.scrollWidth > n.clientWidth + 1
    && n.clientWidth && !["visible"].includes(getComputedStyle(n).overflowX) && n.tagName !== "INPUT"
    && !n.closest("thead"))
    found.push("cut: " + n.tagName + "#" + n.id);
  return found;
}"""
CONTROLS = "button, input, select, textarea, summary, a[href]"


def unnamed(page) -> list[str]:
    """Controls without an accessible name, by the browser's own accessibility tree."""
    session = page.context.new_cdp_session(page)
    nodes = session.send("Accessibility.getFullAXTree")["nodes"]
    session.detach()
    roles = {"button", "textbox", "searchbox", "combobox", "tab", "tabpanel", "dialog", "group", "log", "spinbutton",
             "image", "tablist", "listbox"}
    return [node["role"]["value"] for node in nodes if not node.get("ignored") and node["role"]["value"] in roles
            and not node.get("name", {}).get("value", "").strip()]


def unreached(page, walk: bool = False) -> list[str]:
    """Visible controls that are on, and to which Tab never comes: by pressing it, or by what the page says."""
    if not walk:
        return page.evaluate(f"[...document.querySelectorAll('{CONTROLS}')].filter(n => n.checkVisibility() && "
                             "n.tabIndex < 0).map(n => n.outerHTML.slice(0, 80))")
    page.evaluate("document.activeElement.blur()")
    page.evaluate(f"window.seen = new Set(); [...document.querySelectorAll('{CONTROLS}')].forEach("
                  "n => n.addEventListener('focus', () => seen.add(n)))")
    for _ in range(page.locator(CONTROLS).count() + 5):
        page.keyboard.press("Tab")
    return page.evaluate(f"[...document.querySelectorAll('{CONTROLS}')].filter(n => n.checkVisibility() && !n.disabled "
                         "&& !seen.has(n)).map(n => n.outerHTML.slice(0, 80))")


def full_world(folder: pathlib.Path) -> Small:
    """A server on which every part of the page has something to show."""
    server = Small(folder, cards=make_cards(60))
    for i, card in enumerate(server.cards[:28]):
        for who in ("Ada", "Bo"):
            seen = server.pairs._for(card, who)
            choice = ["left", "right", "tie", "left", "both_bad", "right", "left"][(i * (3 if who == "Bo" else 1)) % 7]
            record = server.log.append(seen.record(who, choice, strength=i % 3 + 1 if choice in ("left", "right") else
                                                   None, comment="too long" if i % 9 == 0 else None))
            if i % 7 == 0:
                server.log.append(seen.edit(who, record["id"], "left", "An edited reply, shorter."))
    points = [[step, round(0.3 + 0.5 * (1 - 0.97 ** step) + 0.03 * (step * 7919 % 13 - 6) / 6, 4)]
              for step in range(1, 81)]
    server.train |= {
        "stage": "ppo", "lines": [f"update {i}: reward {y:.3f}" for i, y in points[-20:]],
        "curves": {"reward score": points, "KL to SFT, nats": [[x, 0.002 * x + 0.01 * y] for x, y in points],
                   "held out: judged positive": [[x, 0.5 + y / 4] for x, y in points[::10]],
                   "length, tokens": [[x, 40 - 9 * y] for x, y in points]},
        "before_after": [{"prompt": "The film", "before": "was long and I do not know why.", "score_before": -0.41,
                          "after": "was a joy from its first picture to the last.", "score_after": 1.2}] * 3,
        "policy": {"prompts": 500, "kl": 4.01, "length": [31.2, 3.4],
                   "wins": [{"judge": "n-grams", "rate": [0.31, 0.27, 0.35]}]},
        "changed": {"accuracy_before": 0.55, "accuracy_after": 0.72, "n": 12, "moved": [
            {"prompt": "The plot", "response": "is a joy.", "score_before": -0.3, "score_after": 0.9}] * 4}}
    return server


LOOKS = [("en-GB", "light", 1100), ("zh-CN", "dark", 360), ("zh-CN", "dark", 1100), ("en-GB", "light", 360),
         ("en-GB", "dark", 1100)]


ALL_LOOKS = "MOSSLET_SHOTS" in os.environ


def tour(page):
    """Go through the page, and yield the name of what is open: everything has something to show."""
    say(page, "t")
    page.keyboard.press("2")
    yield "compare"
    page.keyboard.press("e")
    page.keyboard.press("Escape")
    page.keyboard.press("c")
    yield "edit"
    page.keyboard.press("Escape")
    page.evaluate("document.activeElement.blur()")
    page.keyboard.press("?")
    yield "help"
    page.keyboard.press("Escape")
    page.click("#who")
    yield "name"
    page.keyboard.press("Escape")
    page.click("#tab-chat")
    for text in ("Tell me of the film.", "And its music?"):
        page.fill("#message", text)
        page.keyboard.press("Enter")
        until(page, "turns.length && !stopper && turns.at(-1).content.endsWith('end')")
    page.locator(".turn.assistant button").nth(0).click()
    page.wait_for_selector(".turn [aria-pressed=true]")
    page.locator(".turn.assistant button").nth(5).click()
    for tab in TABS[1:]:
        page.click(f"#tab-{tab}")
        page.wait_for_selector({"chat": ".turn textarea", "train": "#curves svg", "data": "#rows tr"}[tab])
        yield tab


@pytest.mark.parametrize(("language", "scheme", "width"), LOOKS if ALL_LOOKS else LOOKS[:2])
def test_everybody_can_read_and_reach_everything(browser, tmp_path, language, scheme, width):
    """Names, contrast, Tab and no scrolling sideways, on every tab; and a screenshot of each."""
    shots = pathlib.Path(os.environ.get("MOSSLET_SHOTS", tmp_path / "shots"))
    server = full_world(tmp_path)
    page = visit(browser, server, locale=language, color_scheme=scheme, viewport={"width": width, "height": 740})
    found = {}
    shots.mkdir(parents=True, exist_ok=True)
    for name in tour(page):
        found[name] = [*page.evaluate(LOOK), *(f"no name: {role}" for role in unnamed(page))]
        page.screenshot(path=str(shots / f"{name}-{language[:2]}-{scheme}-{width}.png"),
                        full_page=name not in ("name", "help", "compare"))
        found[name] += unreached(page, walk=name == "edit") if name not in ("compare", "help", "name") else []
    assert found == {name: [] for name in found}
    page.click("#language")
    assert page.text_content("#tab-compare") == ("Compare" if language == "zh-CN" else "比较")
    page.reload()  # the choice is kept
    page.wait_for_selector("#rows tr")
    assert page.text_content("#tab-compare") == ("Compare" if language == "zh-CN" else "比较")
    clean(page)
    server.close()


AXE_LOOKS = [(language, scheme, width) for language in ("en-GB", "zh-CN") for scheme in ("light", "dark")
             for width in (360, 1200)]


@pytest.mark.parametrize(("language", "scheme", "width"), AXE_LOOKS if ALL_LOOKS else [AXE_LOOKS[1], AXE_LOOKS[6]])
def test_axe_finds_nothing(browser, tmp_path, language, scheme, width):
    """An accessibility checker, with its rules for the size of targets, too."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe is in axe-playwright-python")
    server = full_world(tmp_path)
    page = visit(browser, server, locale=language, color_scheme=scheme, viewport={"width": width, "height": 740},
                 bypass_csp=True, allowed=("404",))  # of an icon, which the policy forbids to ask for
    found, options = [], {"resultTypes": ["violations"], "rules": {"target-size": {"enabled": True}}}
    for name in tour(page):
        violations = axe.Axe().run(page, options=options).response["violations"]
        found += [f"{name}: {rule['id']}: {node['html'][:90]}" for rule in violations for node in rule["nodes"]]
    assert found == [], "\n".join(found)
    clean(page)
    server.close()


# ---- the file --------------------------------------------------------------------------------------

def test_the_file_keeps_to_its_rules():
    """Nothing from elsewhere, nothing inline that a strict policy forbids, no HTML made from texts."""
    body = re.sub(r'"http://www\.w3\.org/2000/svg"', "", PAGE)
    assert not re.search(r"https?:|innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|@import|url\(", body)
    markup = body[:body.index("<script nonce")]
    assert not re.search(r"\s(style|on[a-z]+)=", markup)
    assert body.count("<script") == body.count("<style") == body.count('nonce="{{nonce}}"') / 2 == 1


def test_every_word_is_there_in_both_languages():
    words = dict(re.findall(r'(\w+): \[("[^\]]*")\]', re.sub(r",\n\s+", ", ", PAGE)))
    for key, both in words.items():
        english, chinese = re.findall(r'"((?:[^"\\]|\\.)*)"', both)
        assert sorted(re.findall(r"\{\d\}", english)) == sorted(re.findall(r"\{\d\}", chinese)), key
        assert english and chinese
    used = set(re.findall(r'data-(?:t|label|hint)="(\w+)"', PAGE)) | set(re.findall(r'\bt\("(\w+)"', PAGE))
    used -= {key for key in used if key.endswith("_")}
    assert used <= set(words) and len(words) > 100


def test_a_round_is_told_in_sentences_and_what_looks_wrong_in_it(browser, tmp_path):
    full = full_world(tmp_path)
    page = visit(browser, full)
    page.click("#tab-train")
    page.wait_for_selector("#curves svg")
    said = page.text_content("#changed")
    assert "n-grams prefers its reply on 31 % of 500 validation prompts (27 % to 35 %)" in said
    assert "Mean length: 31.2 → 3.4 tokens, 4.01 nats of KL" in said and "Read the replies below" in said
    assert "Right about 12 held-out answers: 55 % before, 72 % after." in said and "Too few to tell" in said
    full.train |= {"policy": full.train["policy"] | {"length": [31.2, 25.0]},
                   "changed": full.train["changed"] | {"measure": "AUC"}}
    page.reload()
    page.click("#tab-train")
    page.wait_for_selector("#curves svg")
    said = page.text_content("#changed")
    assert "Read the replies below" not in said
    assert "scores above a disliked one in 55 % of the cases before, in 72 % after." in said
    clean(page)
    full.close()


def test_what_the_server_says_is_chinese_on_the_chinese_page(browser, small):
    """Every curve and stage, and the errors that the table knows; the table knows no text that is not said."""
    page = visit(browser, small, locale="zh-CN")
    names = [*(name for curves in CURVES.values() for name in curves), "starting", "answers", "reward", "report",
             "finished", "stopped", "not saved: x", "error: 2 answers are too few to learn from"]
    for name, said in zip(names, page.evaluate("(names) => names.map(fromServer)", names), strict=True):
        assert re.search("[\u4e00-\u9fff]", said), name
        assert not re.search("[a-z]{6}", said), said
    source = "".join(path.read_text(encoding="utf-8") for path in (
        *(ROOT / "serve").glob("*.py"), ROOT / "data" / "export.py"))
    source = re.sub(r'"\s+f?"', "", source)  # of texts on several lines
    for pattern in page.evaluate("CHINESE.map(([english]) => english.source.slice(4, -2))"):
        for text in pattern.split("|"):
            assert max(re.split(r"\\d\+|\(.*?\)\??|\.\*", text), key=len).strip() in source, text
    page.click("#language")
    assert page.evaluate("fromServer('reward score')") == "reward score"
    clean(page)
