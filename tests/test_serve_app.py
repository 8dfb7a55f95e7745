"""The page's addresses: what is answered is saved, what comes twice is stored once, nothing tells who wrote a
reply before the answer; and a server that is killed at any moment has lost nothing that it confirmed."""
import contextlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
import types
import zipfile

import pytest

pytest.importorskip("starlette", reason="the server needs starlette")
pytest.importorskip("uvicorn", reason="the server needs uvicorn")
httpx = pytest.importorskip("httpx", reason="these tests need httpx")

from starlette.testclient import TestClient  # noqa: E402

import serve.log  # noqa: E402
import serve.training  # noqa: E402
from data.answers import GONE, fates  # noqa: E402
from runtime.options import UserError  # noqa: E402
from serve.__main__ import ServeOptions, main  # noqa: E402
from serve.app import Server, create_app, listening  # noqa: E402
from serve.fields import without_paths  # noqa: E402
from serve.log import FeedbackLog, read_events  # noqa: E402
from serve.models import Models  # noqa: E402
from serve.pairs import Card, Fixed, Pairs, digest  # noqa: E402
from serve.rounds import page_command  # noqa: E402
from serve.safety import Rules  # noqa: E402
from serve.training import Running, Training, loop_command  # noqa: E402
from tests.conftest import ROOT  # noqa: E402

NAMES, HASHES = ("run/sft", "run/ppo"), ("a" * 12, "b" * 12)
PAGE = "<!doctype html><meta name='mosslet-token' content='{{token}}'><script nonce='{{nonce}}'></script>"


def cards(n: int) -> list[Card]:
    return [Card(digest("card", i), f"question {i}", (f"one {i}", f"two {i}"), NAMES, HASHES,
                 {"temperature": 1.0, "seed": 0, "rows": [2 * i, 2 * i + 1]}) for i in range(n)]


@contextlib.contextmanager
def desk(folder, n: int = 40, mode: str = "compare", **more):
    """A server over n cards, in this process: (server, client), whose posts carry what the page sends."""
    (page := folder / "page.html").write_text(PAGE)
    with FeedbackLog(folder / "feedback.jsonl") as log, Pairs(Fixed(cards(n)), log) as pairs:
        server = Server(log, pairs, {}, mode=mode, page=page, rules=Rules(rate=1e6, burst=10**6), **more)
        with TestClient(create_app(server), base_url="http://127.0.0.1:8000", headers={
                "Origin": "http://127.0.0.1:8000", "X-Mosslet-Token": server.rules.page_token}) as client:
            yield server, client


def ask(client, address: str, status: int = 200, **body) -> dict:
    answer = client.post(f"/api/{address}", json={"annotator": "me"} | body)
    assert answer.status_code == status, answer.text
    return answer.json()


def card_for(client, annotator: str = "me") -> dict:
    for _ in range(50):
        found = ask(client, "next", annotator=annotator)
        if "waiting" not in found:
            return found["card"]
    raise AssertionError("no card was made")


def new_id() -> str:
    return os.urandom(8).hex()


def press(client, card: dict, choice="left", status: int = 200, **more) -> dict:
    body = {"card": card["id"], "choice": choice, "seconds": 1.5, "id": new_id()}
    return ask(client, "answer", status, **body | more)


# ---- answers -------------------------------------------------------------------------------------

def test_an_answer_is_on_the_disk_before_it_is_called_saved(tmp_path):
    with desk(tmp_path) as (server, client):
        for n in range(1, 6):
            card = card_for(client)
            said = press(client, card, "right", strength=2, comment="clear")
            stored = read_events(tmp_path / "feedback.jsonl")[-1]
            assert said["saved"] == n == said["strip"]["saved"]
            assert (stored["chosen"], stored["rejected"]) == (card["right"], card["left"])
            assert (stored["strength"], stored["comment"], stored["seconds"]) == (2, "clear", 1.5)
            assert said["names"] == {side: NAMES[card[side].startswith("two")] for side in ("left", "right")}


def test_no_question_tells_who_wrote_it_or_that_it_comes_again(tmp_path):
    with desk(tmp_path, 60) as (server, client):
        fields = set()
        for _ in range(60):
            answer = client.post("/api/next", json={"annotator": "me"}).json()
            if "card" in answer:
                text = json.dumps(answer)
                assert not any(word in text for word in (*NAMES, *HASHES, "again", "sampling", "order"))
                fields.add(tuple(sorted(answer["card"])))
                press(client, answer["card"])
        again = sum("again" in event for event in server.log.events)
        assert again and fields == {("id", "left", "right", "shown", "turns")}


def test_an_answer_to_sides_that_this_person_did_not_see_is_refused(tmp_path):
    with desk(tmp_path) as (server, client):
        card = card_for(client)
        body = {"annotator": "me", "card": card["id"], "choice": "left", "id": new_id()}
        refused = client.post("/api/answer", json=body | {"left": card["right"]})
        assert refused.status_code == 409 and "other way round" in refused.json()["error"]
        assert server.log.events == []
        assert client.post("/api/answer", json=body | {"left": card["left"]}).json()["saved"] == 1


def test_the_same_request_twice_is_stored_once(tmp_path):
    with desk(tmp_path) as (server, client):
        card, id = card_for(client), new_id()
        first = press(client, card, id=id, edited={"side": "left", "text": "better"})
        assert press(client, card, id=id, edited={"side": "left", "text": "better"}) == first
        assert [event["kind"] for event in server.log.events] == ["pair", "edit"]
        other = card_for(client)
        press(client, other, id=id, status=409)
        assert len(server.log.events) == 2


def test_answer_undo_edit_export_import(tmp_path):
    with desk(tmp_path) as (server, client):
        first = card_for(client)
        press(client, first, "tie", comment="alike", edited={"side": "right", "text": "mended"})
        undone = ask(client, "undo", id=new_id())
        assert undone["card"] == first | {"shown": 1} and undone["saved"] == 0
        assert undone["answer"] == {"choice": "tie", "strength": None, "comment": "alike",
                                    "edited": {"side": "right", "text": "mended"}}
        assert card_for(client) == first
        assert ask(client, "undo", id=new_id())["card"] is None
        press(client, first, "left", edited={"side": "right", "text": "mended"})
        for choice in ("right", "tie", "both_bad", "skip", *["left"] * 8):
            press(client, card_for(client), choice)
        rows = client.get("/api/records", params={"kind": "edit"}).json()
        assert (rows["total"], rows["rows"][0]["response"], rows["rows"][0]["state"]) == (2, "mended", "")
        assert client.get("/api/records", params={"q": "ALIKE", "who": "me"}).json()["total"] == 1
        packed = client.get("/api/export", params={"to": "trl"})
        with zipfile.ZipFile(io.BytesIO(packed.content)) as archive:
            reward = archive.read("reward.jsonl").decode().splitlines()
        pairs = serve.log.training_records(server.log.events)["pairs"]
        assert len(reward) == sum(not pair.get("tie") for pair in pairs) > 9  # TRL knows no ties
        [(reason, n)] = json.loads(packed.headers["X-Left-Out"]).items()
        assert reason.startswith("ties are left out") and n == sum(pair.get("tie", False) for pair in pairs) == 2
        log = (tmp_path / "feedback.jsonl").read_bytes()
    (other := tmp_path / "other").mkdir()
    with desk(other) as (server, client):
        assert client.post("/api/import", content=log + b"no JSON\n{}\n").json() == {
            "added": log.count(b"\n"), "left_out": 2}
        assert client.post("/api/import", content=log).json() == {"added": 0, "left_out": 0}
        lines = b'{"prompt": "a", "chosen": "b", "rejected": "c"}\n'
        assert client.post("/api/import?annotator=you", content=lines).json()["added"] == 1
        assert server.log.events[-1]["annotator"] == "you"


def test_a_log_that_cannot_be_written_confirms_nothing_and_the_card_stays(tmp_path, monkeypatch):
    with desk(tmp_path) as (server, client):
        card, id = card_for(client), new_id()

        def full(handle, line):
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as broken:
            broken.setattr(serve.log.os, "write", full)
            error = press(client, card, status=507, id=id)["error"]
        assert "No space left" in error and str(tmp_path) not in error
        assert card_for(client) == card and not read_events(tmp_path / "feedback.jsonl")
        assert press(client, card, id=id)["saved"] == 1


def test_two_annotators_and_a_restart(tmp_path):
    with desk(tmp_path) as (server, client):
        for name, n in (("ann", 7), ("bob", 4)):
            for _ in range(n):
                press(client, card_for(client, name), annotator=name)
        found = press(client, card_for(client, "ann"), annotator="ann")
        assert found["strip"]["others"]["bob"]["n"] == 4
        left = {name: card_for(client, name) for name in ("ann", "bob")}
    with desk(tmp_path) as (server, client):
        assert {name: card_for(client, name) for name in ("ann", "bob")} == left
        with pytest.raises(UserError, match="another server"):
            FeedbackLog(tmp_path / "feedback.jsonl")


@pytest.mark.parametrize("mode, choice, field", [("rate", 4, "score"), ("label", 0, "label")])
def test_single_replies(tmp_path, mode, choice, field):
    (tmp_path / "page.html").write_text(PAGE)
    single = [Card(digest(i), "q", (f"reply {i}",), ("sft",), ("c",)) for i in range(3)]
    with FeedbackLog(tmp_path / "log.jsonl") as log, Pairs(Fixed(single), log) as pairs:
        server = Server(log, pairs, mode=mode, page=tmp_path / "page.html")
        card = server.next({"annotator": "me"})["card"]
        server.answer({"annotator": "me", "card": card["id"], "choice": choice, "id": new_id()})
        assert (log.events[0][field], log.events[0]["response"]) == (choice, card["reply"])
        for wrong in (True, 9, "left", 1.0, None):
            with pytest.raises(ValueError):
                server.answer({"annotator": "me", "card": card["id"], "choice": wrong})


def test_the_end_is_said(tmp_path):
    with desk(tmp_path, 2) as (server, client):
        for _ in range(2):
            press(client, card_for(client))
        assert ask(client, "next") == {"done": True}


# ---- chat ----------------------------------------------------------------------------------------

def test_a_thumb_may_change_after_a_restart(tmp_path):
    """The model of a chat is not loaded then, but its template is needed to find what was said before."""
    talk = [{"role": role, "content": text} for role, text in (
        ("user", "x"), ("assistant", "Ho"), ("user", "y"), ("assistant", "Hm"))]

    class Later(dict):
        """Engines of which none is loaded until it is asked for."""
        get = lambda self, name, default=None: default  # noqa: E731

    for label in (1, 0):
        with desk(tmp_path) as (server, client):
            server.engines = Later({"run/ppo": types.SimpleNamespace(template="Q: {prompt}", hash="c" * 12)})
            ask(client, "thumb", messages=talk, label=label, model="run/ppo", id=new_id())
            server.engines = {}
            [event] = server.log.standing()
            assert (event["label"], event["prompt"][0]["content"], event["hashes"]) == (label, "Q: x", ["c" * 12])


def test_an_answer_of_another_mode_is_not_taken_back(tmp_path):
    with desk(tmp_path) as (server, client):
        ask(client, "answer", card=card_for(client)["id"], choice="left", id=new_id())
    with desk(tmp_path, mode="rate") as (server, client):
        assert "another --mode" in ask(client, "undo", 409, id=new_id())["error"]
        assert [event["kind"] for event in server.log.events] == ["pair"]


def test_a_thumb_is_what_was_pressed_last_and_keeps_its_edit(tmp_path):
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    with desk(tmp_path) as (server, client):
        def thumb(label, **more):
            ask(client, "thumb", **{"messages": talk, "label": label, "model": "run/sft", "id": new_id()} | more)
            return [event for event in server.log.standing()]

        assert [(event["label"], event["prompt"], event["response"]) for event in thumb(1)] == [(1, "Hi", "Ho")]
        assert len(thumb(1)) == 1
        held = thumb(0, edited="Hello")
        assert [(event["kind"], event.get("label", event["response"])) for event in held] == [
            ("label", 0), ("edit", "Hello")]
        assert [(event["kind"], event.get("label", event["response"])) for event in thumb(1)] == [
            ("label", 1), ("edit", "Hello")]
        assert [event["response"] for event in thumb(1, edited="Hello!") if event["kind"] == "edit"] == ["Hello!"]
        assert [event["response"] for event in thumb(1, edited="Hello") if event["kind"] == "edit"] == ["Hello"]
        assert thumb(None) == []
        id = new_id()
        assert len(thumb(1, id=id)) == len(thumb(1, id=id)) == 1
        assert card_for(client) and ask(client, "undo", id=new_id())["card"] is None  # of the other tab
        more = [{"role": "system", "content": "Be kind"}, *talk, *talk]
        assert thumb(0, messages=more)[-1]["prompt"] == more[:-1]
        assert {event["kind"] for event in server.log.events} == {"label", "edit", "undo"}


def test_checkpoints_are_loaded_when_they_are_asked_and_idle_ones_make_room(tmp_path):
    closed = []

    class Fake:
        def __init__(self, path):
            self.path, self.waiting, self.name = path, [], "run/sft"
            self.batch = types.SimpleNamespace(running=[])

        def close(self):
            closed.append(self.path)

    out, rounds = tmp_path / "out", tmp_path / "feedback.training"
    for folder in (out / "run/sft", out / "run/ppo", out / "run/reward", out / "run/loop/round-1/ppo",
                   out / "other/best", rounds / "run/loop/round-1/ppo"):
        folder.mkdir(parents=True)
        (folder / "checkpoint.pt").touch()
    models = Models([Fake("first")], [out, rounds], Fake)
    assert list(models) == ["run/sft", "other/best", "run/ppo", "run/loop/round-1", "feedback/round-1"]
    assert models["run/sft"].path == "first" and models.get("run/ppo") is None
    busy = models["run/ppo"]
    busy.waiting.append("somebody")
    for name in list(models)[1:] * 2:
        assert models[name] is models.get(name)
    assert models["run/ppo"] is busy and len(models.loaded) == 3 and len(closed) > 0
    with pytest.raises(KeyError):
        models["run/reward"]
    models.close()
    assert "first" in closed


# ---- training ------------------------------------------------------------------------------------

FAKE = """
import json, pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[1]) / "reviews/loop/round-1"
signal.signal(signal.SIGINT, lambda *_: (print("saved", flush=True), sys.exit(130)))
print("round 1: in", folder, flush=True)
for stage, line in (("reward", {"step": 3, "val_accuracy": 0.7}), ("ppo", {"step": 1, "raw_score": 0.5, "kl": 0.1})):
    (folder / stage).mkdir(parents=True)
    (folder / stage / "metrics.jsonl").write_text(json.dumps(line) + "\\n" + json.dumps(line | {"step": 4}) + "\\n{")
print("\\x1b[1m10 %\\r20 %\\r", flush=True)
if "fail" in sys.argv:
    sys.exit("error: " + str(folder) + "/x.pt: no room")
while not (folder.parent / "go").exists():
    time.sleep(0.02)
(folder / "report.json").write_text(json.dumps({"before_after": [{"prompt": "p", "before": "b", "after": "a",
    "score_before": float("nan"), "score_after": 1.0}], "changed": {"accuracy_before": None, "accuracy_after": 0.7}}))
"""


def until(condition, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


def fake(tmp_path, *more: str) -> Training:
    """A training whose command is FAKE."""
    return Training(tmp_path / "feedback.jsonl", "", tmp_path / "training",
                    lambda log, start, out, preset, updates: [sys.executable, "-c", FAKE, out, *more])


def test_training_is_watched_while_it_runs(tmp_path):
    training = fake(tmp_path)
    with desk(tmp_path, training=training) as (server, client):
        assert client.get("/api/train").json()["running"] is False
        assert ask(client, "train", preset="smoke", updates=3) == {"started": True}
        assert "already" in ask(client, "train", 409)["error"]
        until(lambda: "KL to SFT, nats" in (client.get("/api/train").json()["curves"]))
        with pytest.raises(Running):  # not by another server either, should this one be killed
            fake(tmp_path).start()
        assert fake(tmp_path).running()
        status = client.get("/api/train").json()
        assert status["running"] and status["stage"] == "ppo" and status["lines"][-1] in ("20 %", "round 1: in round-1")
        assert status["curves"]["reward score"] == [[1, 0.5], [4, 0.5]]
        (tmp_path / "training/reviews/loop/go").touch()
        until(lambda: not training.running())
        status = client.get("/api/train").json()
        assert (status["stage"], status["changed"]["accuracy_after"]) == ("finished", 0.7)
        assert status["policy"] is None  # this report says nothing of it
        assert status["before_after"][0]["score_before"] is None and "error" not in status
        for wrong in ({"preset": "huge"}, {"updates": 0}, {"updates": True}, {"updates": "3"}):
            ask(client, "train", 400, **wrong)


def test_training_is_stopped_and_its_errors_are_told(tmp_path):
    training = fake(tmp_path)
    training.start()
    until(lambda: training.status()["curves"])
    assert fake(tmp_path).stop()  # a server that was started anew
    until(lambda: not training.running())
    assert training.status()["lines"][-1] == "saved" and not training.stop()
    (tmp_path / "b").mkdir()
    broken = fake(tmp_path / "b", "fail")
    with desk(tmp_path, training=broken) as (server, client):
        broken.start()
        until(lambda: not broken.running())
        assert client.get("/api/train").json()["error"] == "error: x.pt: no room"


def test_closing_ends_the_training(tmp_path):
    training = fake(tmp_path)
    training.start()
    until(lambda: training.status()["curves"])
    training.close()
    assert not training.running() and training.process.returncode == 130


def test_the_command_is_one_that_the_loop_reads(world, tmp_path):
    from serve.loop import options_of
    words = loop_command(str(tmp_path / "feedback.jsonl"), str(world.root / "reward"), str(tmp_path / "t"), "smoke", 3)
    loop, _, ppo = options_of(words[3:])
    assert words[1:3] == ["train.py", "loop"] and loop.init_from == str((world.root / "sft").resolve())
    assert (loop.rounds, loop.out, ppo.updates) == (1, str(tmp_path / "t"), 3)


def test_without_a_size_the_round_has_that_of_the_checkpoint(world, tmp_path):
    from serve.loop import options_of
    shutil.copytree(world.root / "sft", tmp_path / "sft")
    for known, preset in (({"preset": "smoke"}, "smoke"), ({}, "demo")):  # older code wrote none
        record = {"finished": True, "parents": {}, "options": {}} | known
        (tmp_path / "sft" / "config.json").write_text(json.dumps(record))
        found = options_of(loop_command("log.jsonl", str(tmp_path / "sft"), str(tmp_path / "t"))[3:])
        assert [o.preset for o in found] == [preset] * 3


# ---- the command ---------------------------------------------------------------------------------

@pytest.mark.parametrize("words, told", [
    ("", "nothing to ask about"), ("--pairs x --host 0.0.0.0", "--token"), ("--pairs x --token short", "16"),
    ("--pairs x --temperature .5", "no effect"), ("--from x --mode rate --compare_with y", "no effect"),
    ("--pairs x --terminal --port 9000", "no effect"), ("export", "which log"), ("--pairs x --rows 3", "no effect")])
def test_what_does_not_go_together_is_refused(words, told):
    with pytest.raises(UserError, match=told):
        main(words.split())


def test_uncertain_pairs_are_picked_in_the_template_of_the_checkpoint(world, monkeypatch):
    """A reward model of the loop does not know it: the answers that it learned are messages, in it already."""
    from serve import __main__ as command
    given = []
    monkeypatch.setattr(command, "reward_scorer", lambda *words: given.append(words) or (lambda *_: None, "hash"))
    monkeypatch.setattr(command, "prompts_of", lambda *_: ["a prompt"])
    o = ServeOptions(checkpoint=str(world.root / "sft"), pick="uncertain", reward_from="somewhere")
    command.source_of(o, [types.SimpleNamespace(name="", hash="", sampling={})], {"template": "Go on: {prompt}"})
    assert given == [("somewhere", "auto", "Go on: {prompt}")]


def test_a_taken_port_is_one_line(tmp_path):
    with contextlib.closing(listening("127.0.0.1", 0)) as place:
        with pytest.raises(UserError, match="give another --port"):
            main(["--pairs", "x", "--to", str(tmp_path / "f.jsonl"), "--port", str(place.getsockname()[1])])
    assert not (tmp_path / "f.jsonl").exists()


def test_the_page_of_a_loop_that_is_killed_stops_and_leaves_log_and_port(tmp_path):
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "q", "chosen": "a", "rejected": "b"}\n')
    with contextlib.closing(listening("127.0.0.1", 0)) as place:
        port = place.getsockname()[1]
    command = page_command(types.SimpleNamespace(pairs=tmp_path / "pairs.jsonl", answers=tmp_path / "log.jsonl"), port,
                           terminal=False)
    # The loop's part: it starts the page with a pipe, waits until it answers, and dies at once.
    loop = ("import os, subprocess, sys; p = subprocess.Popen(sys.argv[1:], stdin=subprocess.PIPE, "
            "stdout=subprocess.PIPE, text=True); print(p.stdout.readline(), flush=True); os._exit(9)")
    done = subprocess.run([sys.executable, "-c", loop, *command], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 9 and "open http://" in done.stdout, done.stderr

    def free() -> bool:
        with contextlib.suppress(UserError), contextlib.closing(listening("127.0.0.1", port)), FeedbackLog(
                tmp_path / "log.jsonl"):
            return True
        return False

    until(free, 20)


def test_errors_hold_no_absolute_path():
    assert without_paths("/a/b/c.pt: gone; see ../x/y and http://127.0.0.1:8000/a/b") == (
        "c.pt: gone; see ../x/y and http://127.0.0.1:8000/a/b")
    assert without_paths(r"C:\Users\me\out\a.pt: gone") == "a.pt: gone"
    assert ServeOptions().to == "feedback.jsonl"


# ---- killed --------------------------------------------------------------------------------------

class Clerk(threading.Thread):
    """A browser that answers as fast as it can, and repeats what was not confirmed."""

    def __init__(self, port: int, name: str, token):
        super().__init__(daemon=True)
        self.address, self.person, self.token = f"http://127.0.0.1:{port}", name, token
        self.confirmed: list[str] = []
        self.stop = threading.Event()

    def run(self) -> None:
        with httpx.Client(timeout=5) as client:
            body: dict = {}
            while not self.stop.is_set():
                try:
                    headers = {"Origin": self.address, "X-Mosslet-Token": self.token(client, self.address)}
                    if not body:
                        found = client.post(f"{self.address}/api/next", json={"annotator": self.person},
                                            headers=headers).raise_for_status().json()
                        body = {"annotator": self.person, "card": found["card"]["id"], "choice": "left", "seconds": 1,
                                "id": new_id()} if "card" in found else {}
                    if body:
                        client.post(f"{self.address}/api/answer", json=body, headers=headers).raise_for_status()
                        self.confirmed.append(body["id"])
                        body = {}
                except (httpx.HTTPError, IndexError):
                    time.sleep(0.05)


def page_token(client, address: str) -> str:
    """What the page would send; a server that was started anew has another one."""
    return client.get(address + "/").text.split('name="mosslet-token" content="')[1].split('"')[0]


def killed(folder, moments: int, seed: int = 0) -> tuple[int, list[str]]:
    """Kill a server `moments` times while two clients answer; (how many answers were confirmed, what is wrong)."""
    rng, log = random.Random(seed), folder / "feedback.jsonl"
    (folder / "pairs.jsonl").write_text("".join(json.dumps(
        {"prompt": f"q {i}", "chosen": f"a {i}", "rejected": f"b {i}"}) + "\n" for i in range(5000)))
    with contextlib.closing(listening("127.0.0.1", 0)) as place:
        port = place.getsockname()[1]
    command = [sys.executable, "-m", "serve", "--pairs", str(folder / "pairs.jsonl"), "--to", str(log), "--port",
               str(port)]
    clerks = [Clerk(port, name, page_token) for name in ("ann", "bob")]
    for i in range(moments + 1):
        before = sum(len(clerk.confirmed) for clerk in clerks)
        server = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        try:
            assert "open http://" in server.stdout.readline()
            for clerk in clerks if i == 0 else ():
                clerk.start()
            until(lambda n=before: sum(len(clerk.confirmed) for clerk in clerks) > n + 2, 60)
            time.sleep(rng.random() * 0.3)
        finally:
            for clerk in clerks if i == moments else ():
                clerk.stop.set()
            server.send_signal(signal.SIGKILL if i < moments else signal.SIGINT)
            server.wait(60)
            server.stdout.close()
    for clerk in clerks:
        clerk.join(20)
    problems = ["the last server's exit code is not 0"] * (server.returncode != 0)
    events = read_events(log)
    written = [json.loads(line)["id"] for line in log.read_text().splitlines()]
    problems += [f"doubled: {id}" for id in set(written) if written.count(id) > 1]
    known = fates(events)
    for clerk in clerks:
        held = [event for event in events if event["annotator"] == clerk.person and known.get(event["id"]) not in GONE]
        answered = [event["card"] for event in held]
        problems += [f"lost: {id}" for id in clerk.confirmed if id not in {event["id"] for event in held}]
        problems += [f"card twice: {card}" for card in set(answered) if answered.count(card) > 1]
        problems += ["answers that nobody gave"] * (len(held) > len(clerk.confirmed) + 1)
    return sum(len(clerk.confirmed) for clerk in clerks), problems


@pytest.mark.skipif(os.name != "posix", reason="kill -9")
def test_nothing_confirmed_is_lost_or_doubled_when_the_server_is_killed(tmp_path):
    confirmed, problems = killed(tmp_path, 3)
    assert confirmed > 10 and problems == []
