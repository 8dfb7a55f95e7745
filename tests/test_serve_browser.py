"""`python -m serve` as a person has it: a process of its own, headless Chromium, a round of real training; and
two browsers that answer while the server is killed.

    python -c "from tests.test_serve_browser import by_hand; by_hand(30)"      30 kills
"""
import contextlib
import dataclasses
import json
import os
import pathlib
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
import types
import zipfile
from collections.abc import Callable

import pytest
import torch

pytest.importorskip("starlette", reason="the server needs starlette")
pytest.importorskip("uvicorn", reason="the server needs uvicorn")
playwright = pytest.importorskip("playwright.sync_api", reason="the page is tried in a browser by playwright")

from data.answers import GONE, fates  # noqa: E402
from model import Transformer, load_checkpoint, save_checkpoint  # noqa: E402
from reward import RewardModel  # noqa: E402
from serve.app import listening  # noqa: E402
from serve.log import read_events  # noqa: E402
from tests.conftest import ROOT, loud  # noqa: E402
from tests.test_serve_page import CHROMIUM, browser, clean, say, until, visit  # noqa: E402, F401

WORDS = {"left": "Left is better", "right": "Right is better", "tie": "Tie", "both_bad": "Both bad"}
KEYS = {"left": "ArrowLeft", "right": "ArrowRight", "tie": "t", "both_bad": "b"}


def free_port() -> int:
    with contextlib.closing(listening("127.0.0.1", 0)) as place:
        return place.getsockname()[1]


def begin(port: int, log: pathlib.Path, *words: str, **environment: str) -> subprocess.Popen:
    """`python -m serve`, once it answers."""
    process = subprocess.Popen([sys.executable, "-m", "serve", *words, "--to", str(log), "--port", str(port)], cwd=ROOT,
                               stdout=subprocess.PIPE, text=True, env={**os.environ, **environment})
    assert "open http://" in process.stdout.readline()
    return process


# ---- a person's afternoon ------------------------------------------------------------------------

@pytest.fixture
def real(world, reviews_source, tmp_path):
    """The real server on a run's folder from which training can begin: sft and reward, which name their data."""
    options = {"data": "reviews", "source": str(reviews_source), "vocab_size": 500, "limit": 0}
    policy, tokenizer, state = load_checkpoint(world.root / "sft")
    torch.manual_seed(0)
    roomy = loud(Transformer(dataclasses.replace(policy.config, max_len=512)))  # for a reply that can be stopped
    judge = load_checkpoint(world.root / "reward", cls=RewardModel)[0]
    known = {name: state[name] for name in ("feedback", "template", "step")} | {"options": options}
    for stage, net in (("sft", roomy), ("reward", judge)):
        save_checkpoint(tmp_path / "out" / "reviews" / stage, net, tokenizer, stage=stage, **known)
    port, log = free_port(), tmp_path / "feedback.jsonl"
    process = begin(port, log, "--from", str(tmp_path / "out" / "reviews" / "sft"), "--max_new_tokens", "24",
                    MOSSLET_CACHE=str(world.data.folder.parent))
    yield types.SimpleNamespace(url=f"http://127.0.0.1:{port}/", log=log, events=lambda: read_events(log))
    process.send_signal(2)
    assert process.wait(30) == 0
    process.stdout.close()


def shown(page) -> tuple[str, str]:
    """The replies on the screen."""
    return tuple(page.locator("#replies .text").all_text_contents())


def press(page, choice: str, by_button: bool) -> tuple[str, tuple[str, str]]:
    """Answer, and return (choice, the replies that were on the screen)."""
    replies = shown(page)
    say(page, **({"click": f"[data-choice={choice}]"} if by_button else {"key": KEYS[choice]}))
    assert page.text_content("#last").startswith(f"You said: {WORDS[choice]}.")
    return choice, replies


def compare(page) -> tuple[list, str]:
    """Twelve answers by key and button; the fifth is undone and answered otherwise, of the ninth the right reply
    is edited, and the page is loaded anew after the tenth. ([(choice, replies)], the edited text)."""
    given = []
    for i in range(12):
        if i == 8:
            page.keyboard.press("Shift+E")
            page.fill("#edit-field", "这样更好。A better one.")
            page.keyboard.press("Escape")
            replies = (page.text_content("#replies [data-side=left] .text"), page.evaluate("card.right"))
            say(page, "ArrowRight")
            given.append(("right", replies))
        else:
            given.append(press(page, ("left", "right", "left", "tie", "both_bad")[i % 5], i % 2 == 1))
        if i == 4:
            say(page, "u")
            assert shown(page) == given.pop()[1]
            given.append(press(page, "left", False))
        if i == 9:
            page.reload()
            page.wait_for_selector("#card", state="visible")
            assert page.text_content("#saved") == "✓ 10 saved"
    return given, "这样更好。A better one."


# STOP is pressed as soon as a reply has begun, as only a quick person can: these models write it in a moment.
STOP_EARLY = """() => { window.stopped = false; new MutationObserver((_, me) => {
    if (!stopper || turns.at(-1).role !== "assistant" || !turns.at(-1).content) return;
    me.disconnect(); window.stopped = true; document.getElementById("stop").click();
}).observe(document.getElementById("turns"), {subtree: true, childList: true, characterData: true}); }"""


def chat(page) -> list[dict]:
    """Three turns with a thumb at the second reply, then one that is stopped; the turns, as the page has them."""
    page.click("#tab-chat")
    for n in (1, 2, 3):
        page.fill("#message", f"问题 {n}")
        page.keyboard.press("Enter")
        until(page, f"turns.length === {2 * n} && !stopper", 20)
    page.locator(".turn.assistant").nth(1).get_by_role("button", name="Good answer").click()
    until(page, "turns[3].label === 1 && saved.textContent.includes('13')")
    for n in range(5, 10):  # until a reply is long enough to be stopped
        page.evaluate(STOP_EARLY)
        page.fill("#message", "说得很长")
        page.keyboard.press("Enter")
        until(page, f"turns.length === {2 * n - 2} && !stopper", 20)
        if page.evaluate("stopped"):
            break
    assert page.evaluate("stopped") and len(page.evaluate("turns.at(-1).content")) < 60
    assert page.is_enabled("#send") and page.is_disabled("#stop") and page.is_hidden("#chat-problem")
    return page.evaluate("turns")


def train(page) -> dict:
    """A round of the size `smoke`, watched to its end; the points of each curve when it was seen first."""
    page.click("#tab-train")
    page.select_option("#preset", "smoke")
    page.fill("#updates", "30")  # the page looks every two seconds, and the preset's own six are done in two
    page.click("#train-start")
    seen: dict[str, int] = {}
    end = time.monotonic() + 120
    while not seen or page.evaluate("training.running"):
        assert time.monotonic() < end, page.text_content("#lines")
        for name, points in page.evaluate("Object.entries(training && training.curves || {})"):
            seen.setdefault(name, len(points))
        page.wait_for_timeout(100)
    assert page.text_content("#stage") == "Last: finished" and page.is_hidden("#train-problem")
    return seen


def table(page) -> list[list[str]]:
    """The cells of all rows of the table, page by page, the newest first."""
    page.click("#tab-data")
    rows: list[list[str]] = []
    while True:
        total = int(page.evaluate("found.total"))
        until(page, f"document.querySelectorAll('#rows tr').length === {min(25, total - len(rows))}")
        rows += page.evaluate("[...document.querySelectorAll('#rows tr')].map(row => [...row.cells].slice(1).map("
                              "cell => [...cell.children].map(p => p.textContent)))")
        if page.is_disabled("#older"):
            return rows
        page.click("#older")
        until(page, f"document.getElementById('total').textContent.startsWith('{len(rows) + 1} ')")


def download(page, tool: str) -> dict[str, list[dict]]:
    """The records of an export, by file."""
    page.click("#tab-data")
    with page.expect_download() as found:
        page.click(f"[data-export={tool}]")
    with zipfile.ZipFile(found.value.path()) as archive:
        return {name: [json.loads(line) for line in archive.read(name).splitlines()] for name in archive.namelist()}


@pytest.mark.skipif(os.name != "posix", reason="the server is stopped by a signal")
def test_a_persons_afternoon(browser, real, tmp_path):  # noqa: F811
    """What was pressed is what log, exported files and table hold, and nothing else; a round has learned from it."""
    page = visit(browser, real)
    given, edit = compare(page)
    turns = chat(page)
    standing = check_log(real.events(), given, edit, turns)
    check_round(page, train(page))
    [learned] = real.log.parent.glob("feedback.training/reviews/loop/round-1/answers.jsonl")
    assert read_events(learned) == real.events()
    check_export(download(page, "trl"), given, edit, turns, [event for event in standing if "again" in event])
    (tmp_path / "more.jsonl").write_text("".join(json.dumps(
        {"prompt": f"imported {i}", "chosen": f"good {i}", "rejected": f"bad {i}"}) + "\n" for i in range(20)) + "{}\n")
    page.set_input_files("#file", tmp_path / "more.jsonl")
    until(page, "imported.textContent.startsWith('20 added, 1 left out.')")
    events = real.events()
    assert [event["prompt"] for event in events[-20:]] == [f"imported {i}" for i in range(20)]
    check_table(table(page), events)
    assert page.text_content("#whose") == "Answers that hold: 33, of which 33 are yours."  # nobody is named in the file
    page.click("#tab-compare")
    page.click("#who")
    page.fill("#name", "Bo")
    page.keyboard.press("Enter")
    until(page, "saved.textContent.includes(' 0 ') && card && !busy")
    second = [press(page, choice, i % 2 == 0) for i, choice in enumerate(("right", "tie", "left"))]
    assert page.text_content("#saved") == "✓ 3 saved"
    mine = [event for event in real.events() if event["annotator"] == "Bo"]
    assert [(event["choice"], (event["left"], event["right"])) for event in mine] == second
    assert [event["card"] for event in mine] == [event["card"] for event in standing if event["kind"] == "pair"][:3]
    page.click("#tab-data")
    until(page, "whose.textContent === 'Answers that hold: 36, of which 3 are yours.'")
    page.fill("#by", "Bo")
    page.keyboard.press("Enter")
    until(page, "total.textContent === '1 to 3 of 3'")
    clean(page)


def check_log(events: list[dict], given: list, edit: str, turns: list[dict]) -> list[dict]:
    """Twelve answers, one that was taken back, its undo, an edit and a thumb; returns what holds."""
    assert [event["kind"] for event in events] == ["pair"] * 5 + ["undo"] + ["pair"] * 5 + ["edit"] + ["pair"] * 3 + [
        "label"]
    known = fates(events)
    standing = [event for event in events if known.get(event["id"]) not in GONE]
    pairs = [event for event in standing if event["kind"] == "pair"]
    assert [(event["choice"], (event["left"], event["right"])) for event in pairs] == given
    for event, (choice, sides) in zip(pairs, given, strict=True):
        assert (event["chosen"], event["rejected"]) == (sides[::-1] if choice == "right" else sides)
        assert event["from"] == ["reviews/sft"] * 2 and event["annotator"] == "Ada"
    [edited], [label] = ([event for event in standing if event["kind"] == kind] for kind in ("edit", "label"))
    assert (edited["response"], edited["original"], edited["of"]) == (edit, given[8][1][1], pairs[8]["id"])
    assert (label["label"], label["response"]) == (1, turns[3]["content"])
    assert [message["content"] for message in label["prompt"]][1:] == [turns[1]["content"], turns[2]["content"]]
    return standing


def check_round(page, first: dict[str, int]) -> None:
    """Its curves moved, and the page shows what the answers changed."""
    curves = page.evaluate("training.curves")
    assert len(curves["reward score"]) == len(curves["KL to SFT, nats"]) == 30
    assert page.locator("#curves svg polyline").count() == len(curves)
    assert any(len(curves[name]) > n for name, n in first.items()), first  # it was seen to grow
    assert re.fullmatch(r"Right about 1 held-out answers?: (\d+ %) before, (\d+ %) after\.",
                        page.locator("#changed p", has_text="held-out answer").text_content())
    assert "prefers its reply on" in page.text_content("#changed")
    assert page.locator("#before-after .replies").count() == 20


def check_export(files: dict[str, list[dict]], given: list, edit: str, turns: list[dict], again: list[dict]) -> None:
    """Each decided pair once, the edit as a pair and as an example, and the thumb as a label with its dialogue."""
    repeated = [(event["left"], event["right"]) for event in again]  # about one card in twenty
    decided = [sides[::-1] if choice == "right" else sides for choice, sides in given
               if choice in ("left", "right") and sides not in repeated]
    pairs = [tuple(record[name][0]["content"] for name in ("chosen", "rejected")) for record in files["reward.jsonl"]]
    assert sorted(pairs) == sorted([*decided, (edit, given[8][1][1])])
    [label] = files["reward_labels.jsonl"]
    assert label["label"] is True and label["completion"][0]["content"] == turns[3]["content"]
    assert [message["content"] for message in label["prompt"]][1:] == [turns[1]["content"], turns[2]["content"]]
    examples = [record["messages"][-1]["content"] for record in files["sft.jsonl"]]
    assert {edit, turns[3]["content"]} <= set(examples) <= {
        edit, turns[3]["content"], *(chosen for chosen, _ in decided)}  # a liked reply is one, too


def check_table(rows: list[list], events: list[dict]) -> None:
    """One row an event, the newest first, with who, what and which replies."""
    names = {"pair": "Pair", "undo": "Undo", "edit": "Edit", "label": "Label"}
    assert [row[0] for row in rows] == [[names[event["kind"]]] for event in reversed(events)]
    for (_, [who], _, texts), event in zip(rows, reversed(events), strict=True):
        assert who == event["annotator"]
        wanted = {"pair": ("chosen", "rejected"), "edit": ("response", "original"), "label": ("response",),
                  "undo": ("of",)}[event["kind"]]
        assert texts[-len(wanted):] == [event[name] for name in wanted]
        assert WORDS.get(event.get("choice"), texts[0]) in texts


# ---- killed --------------------------------------------------------------------------------------

STATE = """() => ({card: card && card.id, busy, saved: state.saved,
    failed: document.getElementById("problem-text").textContent, said: document.getElementById("last").textContent})"""


class Reader:
    """A person at a page: presses keys, "try again" after an error, and loads the page anew if that is refused.

    confirmed: (card, choice) of each answer that the page called saved, and that was not taken back after that.
    """

    def __init__(self, page, rng: random.Random):
        self.page, self.rng = page, rng
        self.confirmed: list[tuple[str, str]] = []
        self.asked: tuple[str, str] | None = None  # (card, choice) that was pressed and is not confirmed
        self.saved, self.undone, self.miscounted, self.retries, self.reloads = 0, 0, 0, 0, 0
        self.rests_until = 0.0

    def look(self) -> None:
        """Read the page, and do the next thing."""
        now = self.page.evaluate(STATE)
        if self.asked and (now["saved"] != self.saved
                           or not now["busy"] and not now["failed"] and now["card"] not in (None, self.asked[0])):
            self.confirm(now["saved"])
        if now["busy"] or time.monotonic() < self.rests_until:
            return
        if now["failed"]:
            self.retries += 1
            self.rests_until = time.monotonic() + 0.2
            self.retry("reload the page" in now["failed"])
        elif self.asked:  # neither saved nor refused: nothing was done
            assert self.asked[1] == "undo" and now["said"] == "There is nothing to undo.", (self.asked, now)
            self.asked = None
        elif now["card"]:
            self.saved, card = now["saved"], now["card"]
            choice = "undo" if self.confirmed and self.rng.random() < 0.1 else self.rng.choice([*KEYS])
            self.asked = card, choice
            self.page.keyboard.press(KEYS.get(choice, "u"))

    def confirm(self, saved: int) -> None:
        """The page says that it is saved, or goes on to another card."""
        card, choice = self.asked
        self.miscounted += saved != self.saved + (-1 if choice == "undo" else 1)
        if choice == "undo":
            self.confirmed.pop()
            self.undone += 1
        else:
            self.confirmed.append((card, choice))
        self.saved, self.asked = saved, None

    def retry(self, refused: bool) -> None:
        """Press "try again"; a page that the server does not know any more is loaded anew."""
        with contextlib.suppress(playwright.Error):  # the server may be gone again
            if not refused:
                return self.page.click("#retry", timeout=1000)
            self.page.reload(timeout=5000)
            self.reloads += 1
            self.asked = None  # nobody was told that it is saved


class Keeper(threading.Thread):
    """Starts the server, and kills it at random moments while answers come; the last one stays."""

    def __init__(self, command: Callable[[], subprocess.Popen], moments: int, readers: list[Reader],
                 rng: random.Random):
        super().__init__(daemon=True)
        self.command, self.moments, self.readers, self.rng = command, moments, readers, rng
        self.process = command()
        self.in_flight = 0  # answers that were not confirmed when the server was killed
        self.error: BaseException | None = None

    def answers(self) -> int:
        return sum(len(reader.confirmed) + 2 * reader.undone for reader in self.readers)

    def run(self) -> None:
        try:
            for _ in range(self.moments):
                self.wait_for_answers(4)
                time.sleep(self.rng.random() * 0.5)
                self.process.kill()
                self.in_flight += sum(reader.asked is not None for reader in self.readers)
                self.process.wait(30)
                self.process.stdout.close()
                time.sleep(self.rng.random())
                self.process = self.command()
            self.wait_for_answers(4)
        except BaseException as error:
            self.error = error

    def wait_for_answers(self, n: int) -> None:
        before, end = self.answers(), time.monotonic() + 60
        while self.answers() < before + n:
            assert time.monotonic() < end, "nobody answers"
            time.sleep(0.01)


def killed_with_browsers(browser, folder: pathlib.Path, moments: int, seed: int = 0) -> dict[str, float]:  # noqa: F811
    """Kill the server at `moments` random moments while two browsers answer, and compare what their pages called
    saved with the log: how many were confirmed, are in the log, are missing, are there twice or with another
    choice, and were never confirmed; what the pages show at the end; how often "try again" was pressed and a page
    loaded anew; how many answers were on their way at a kill."""
    begun, log, port = time.monotonic(), folder / "feedback.jsonl", free_port()
    (folder / "pairs.jsonl").write_text("".join(json.dumps(
        {"prompt": f"q {i}", "chosen": f"good {i}", "rejected": f"bad {i}"}) + "\n" for i in range(5000)))
    server, readers = types.SimpleNamespace(url=f"http://127.0.0.1:{port}/"), []
    keeper = Keeper(lambda: begin(port, log, "--pairs", str(folder / "pairs.jsonl")), moments, readers,
                    random.Random(seed))
    try:
        readers += [Reader(visit(browser, server, name), random.Random(f"{seed} {name}")) for name in ("Ada", "Bo")]
        keeper.start()
        while keeper.is_alive() or any(reader.asked for reader in readers):  # the last ones, too
            for reader in readers:
                reader.look()
            time.sleep(0.005)
    finally:
        keeper.process.kill()
        keeper.process.wait(30)
        keeper.process.stdout.close()
    assert keeper.error is None, keeper.error
    for reader in readers:
        reader.page.context.close()
    return compared(log, readers) | {"in_flight": keeper.in_flight, "seconds": round(time.monotonic() - begun, 1)}


def compared(log: pathlib.Path, readers: list[Reader]) -> dict[str, float]:
    """The figures of `killed_with_browsers`."""
    events, ids = read_events(log), [json.loads(line)["id"] for line in log.read_text().splitlines()]
    known = fates(events)
    counts = dict.fromkeys(("confirmed", "undone", "shown", "in_log", "missing", "doubled", "otherwise", "unconfirmed",
                            "miscounted", "retries", "reloads"), 0)
    counts["doubled"] = len(ids) - len(set(ids))
    for reader, name in zip(readers, ("Ada", "Bo"), strict=True):
        held = [event for event in events if event["annotator"] == name and event["kind"] == "pair"
                and known.get(event["id"]) not in GONE]
        choices = {event["card"]: event["choice"] for event in held}
        cards = {card for card, _ in reader.confirmed}
        counts["confirmed"] += len(reader.confirmed)
        counts["shown"] += reader.saved
        counts["in_log"] += len(held)
        counts["missing"] += len(cards - {*choices})
        counts["doubled"] += len(held) - len(choices) + len(reader.confirmed) - len(cards)
        counts["otherwise"] += sum(choices.get(card, choice) != choice for card, choice in reader.confirmed)
        counts["unconfirmed"] += len({*choices} - cards)
        for field in ("undone", "miscounted", "retries", "reloads"):
            counts[field] += getattr(reader, field)
    return counts


def by_hand(moments: int, seed: int = 0) -> None:
    """Print the figures of so many kills."""
    with tempfile.TemporaryDirectory() as folder, playwright.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        print(killed_with_browsers(chromium, pathlib.Path(folder), moments, seed))


@pytest.mark.skipif(os.name != "posix", reason="kill -9")
def test_what_two_browsers_called_saved_is_there_once_when_the_server_is_killed(browser, tmp_path):  # noqa: F811
    counts = killed_with_browsers(browser, tmp_path, 3)
    assert counts["confirmed"] > 10 and counts["retries"] > 0 == counts["reloads"]
    assert counts["confirmed"] == counts["shown"] == counts["in_log"], counts
    assert not any(counts[name] for name in ("missing", "doubled", "otherwise", "miscounted")), counts
