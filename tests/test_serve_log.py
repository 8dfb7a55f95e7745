"""The log of answers: what is confirmed is in the file exactly once, whatever kills or fills; and what the
answers teach is the same whether the log is read in place or exported."""
import contextlib
import errno
import json
import os
import random
import signal
import threading
import time

import pytest

from data import prepare
from data.answers import fates
from data.export import TOOLS
from data.prepare import open_data
from data.records import checked, load_records
from runtime.options import UserError
from serve.log import FeedbackLog, NotSaved, export_log, read_events, training_records, write_data
from serve.exports import events_of, exported, saved

forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def pair(i=0, **fields):
    return {"annotator": "me", "kind": "pair", "card": f"card {i}", "prompt": f"第 {i} 问？\u2028", "choice": "left",
            "chosen": f"good {i}", "rejected": f"bad {i}", "left": f"good {i}", "right": f"bad {i}", **fields}


def label(i=0, **fields):
    return {"annotator": "me", "kind": "label", "prompt": f"Talk {i}", "response": f"words {i}", "label": i % 2,
            **fields}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "feedback.jsonl"


@pytest.fixture
def log(path):
    with FeedbackLog(path) as log:
        yield log


def lines_of(path):
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]


# ---- appending -----------------------------------------------------------------------------------

def test_an_event_is_in_the_file_before_it_is_returned(log, path):
    stored = [log.append(pair(i)) for i in range(3)]
    assert lines_of(path) == stored == log.events
    assert all(len(event["id"]) == 16 and event["time"].endswith("+00:00") for event in stored)


def test_what_is_read_again_equals_what_was_returned(path):
    with FeedbackLog(path) as log:
        stored = [log.append(pair(0, order=(1, 0), comment=None)), log.append(label(1))]
    with FeedbackLog(path) as log:
        assert log.events == stored == read_events(path)
        assert "comment" not in stored[0]
        assert stored[0]["order"] == [1, 0]


def test_a_request_that_comes_twice_is_stored_once(log, path):
    first = log.append(pair(0, id="0123456789abcdef"))
    assert log.append(pair(5, id="0123456789abcdef")) == first
    assert len(lines_of(path)) == 1


def test_threads_append_whole_lines_each_once(log, path):
    def work(k):
        for i in range(25):
            log.append(pair(i, annotator=f"person {k}", comment="长" * (100 * k)))

    threads = [threading.Thread(target=work, args=(k,)) for k in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert lines_of(path) == log.events
    assert sorted((event["annotator"], event["card"]) for event in log.events) == sorted(
        (f"person {k}", f"card {i}") for k in range(8) for i in range(25))


@pytest.mark.parametrize("record,words", [
    ({"kind": "vote"}, "kind"), (pair(annotator=" "), "annotator"), (pair(id="../x"), "16 digits"),
    (pair(id=["x"]), "needs"), (pair(chosen="bad 0"), "equal"), (pair(choice="up"), "choice"),
    (pair(choice="tie"), "tie"), (pair(choice="both_bad", tie=True), "both_bad"),
    (pair(choice="right"), "another reply"),
    (pair(strength=4), "strength"), (pair(prompt=7), "prompt"), (pair(chosen="\ud800"), "surrogate"),
    (pair(seconds=float("nan")), "JSON"), (label(label=3), "label"), (pair(time="noon"), "isoformat"),
    ({"annotator": "me", "kind": "edit", "prompt": "p", "response": "r", "of": "x"}, "original"),
    ({"annotator": "me", "kind": "undo", "of": "0123456789abcdef"}, "of"),
    ({"annotator": "me", "kind": "skip"}, "card"), (pair(card=["x"]), "needs")])
def test_what_is_no_answer_is_refused_and_leaves_the_file(log, path, record, words):
    log.append(pair())
    before = path.read_bytes()
    with pytest.raises(ValueError, match=words):
        log.append(record)
    assert path.read_bytes() == before
    log.append(pair(1))


# ---- one process at a time -----------------------------------------------------------------------

def test_a_second_log_on_the_file_is_refused_until_the_first_is_closed(path):
    with FeedbackLog(path) as log:
        log.append(pair())
        with pytest.raises(UserError, match="another server"):
            FeedbackLog(path)
        assert len(read_events(path)) == 1  # reading needs no lock
    with FeedbackLog(path) as log:
        assert len(log.events) == 1
    with pytest.raises(NotSaved):
        log.append(pair())


@forks
def test_the_lock_of_a_killed_process_is_gone_with_it(path):
    with child(lambda told: (FeedbackLog(path), told("open"), time.sleep(60))) as (pid, heard):
        heard.readline()
        with pytest.raises(UserError, match="another server"):
            FeedbackLog(path)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        FeedbackLog(path).close()


@contextlib.contextmanager
def child(work):
    """A process that runs work(tell); (its id, a file with what it tells, a line each)."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(read)
            work(lambda line: os.write(write, f"{line}\n".encode()))
        finally:
            os._exit(1)
    os.close(write)
    with os.fdopen(read) as heard:
        yield pid, heard
    with contextlib.suppress(OSError):
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


# ---- kills, full disks, torn lines ---------------------------------------------------------------

@forks
def test_after_kill_9_each_confirmed_answer_is_there_exactly_once(path):
    draw, confirmed = random.Random(0), []

    def answer(tell):
        log = FeedbackLog(path)
        for i in range(100_000):
            tell(log.append(pair(i, comment="长" * random.Random(i).randrange(20_000)))["id"])

    for _ in range(30):
        with child(answer) as (pid, heard):
            confirmed.append(heard.readline().strip())
            time.sleep(draw.random() / 30)
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            confirmed += heard.read().split()
    with FeedbackLog(path) as log:
        stored = [event["id"] for event in log.events]
        confirmed.append(log.append(pair())["id"])
    assert len(confirmed) > 60
    assert sorted(set(stored)) == sorted(stored)
    assert set(confirmed) <= {event["id"] for event in lines_of(path)}
    assert len(stored) <= len(confirmed) + 30  # at most the one that was being written, of each process


def test_a_line_torn_anywhere_is_set_aside_and_the_log_goes_on(path, capsys):
    with FeedbackLog(path) as log:
        first, second = log.append(pair(0, sampling={"top_p": 1})), log.append(pair(1, sampling={"top_p": 1}))
    content = path.read_bytes()
    start = content.index(b"\n") + 1
    for cut in sorted({*range(start, len(content), 9), start + 1, len(content) - 2, len(content) - 1}):
        path.write_bytes(content[:cut])
        beside = path.with_name(path.name + ".torn")
        beside.unlink(missing_ok=True)
        whole = cut == len(content) - 1  # an editor that takes the last line break tears nothing
        assert [e["id"] for e in read_events(path)] == [first["id"]] + [second["id"]] * whole
        with FeedbackLog(path) as log:
            assert log.events == [first, second][:1 + whole]
            third = log.append(pair(2))
        assert lines_of(path) == [first, second][:1 + whole] + [third]
        assert beside.exists() == (start < cut and not whole)
        if beside.exists():
            assert beside.read_bytes() == content[start:cut] + b"\n"
    assert "not written whole" in capsys.readouterr().err


@pytest.mark.parametrize("tail", [b"\0" * 300, b"\0" * 300 + b"ange\n", b'{"id": "01'])
def test_what_a_power_cut_leaves_is_set_aside(path, tail):
    with FeedbackLog(path) as log:
        log.append(pair())
    before = path.read_bytes()
    path.write_bytes(before + tail)
    with FeedbackLog(path) as log:
        assert len(log.events) == 1
    assert path.read_bytes() == before


def test_a_first_line_that_was_torn_is_set_aside(path):
    path.write_bytes(b'{"id": "0123')
    with FeedbackLog(path) as log:
        assert log.events == []
        log.append(pair())
    assert len(lines_of(path)) == 1


@pytest.mark.parametrize("content", [b"my notes", b'{"prompt": "p", "chosen": "a", "rejected": "b"}\n', b'{"x": 1}',
                                     b'{"id": "0123456789abcdef"}\n{"id": "0123456789abcdef"}\n'])
def test_a_file_that_is_no_log_is_refused_and_left_alone(path, content):
    path.write_bytes(content)
    with pytest.raises(UserError, match="no log of answers"):
        FeedbackLog(path)
    assert path.read_bytes() == content


def test_a_bad_line_within_the_log_is_named(log, path):
    log.append(pair())
    path.write_bytes(b"oops\n" + path.read_bytes())
    log.close()
    with pytest.raises(UserError, match="line 1: not JSON.*mend or remove"):
        FeedbackLog(path)


@pytest.mark.parametrize("name,code", [("write", errno.ENOSPC), ("fsync", errno.EIO)])
def test_a_full_disk_leaves_the_file_as_it_was_and_says_so(log, path, monkeypatch, name, code):
    log.append(pair())
    before, real = path.read_bytes(), getattr(os, name)
    calls = []

    def fails(handle, *data):
        calls.append(handle)
        if name == "write" and len(calls) == 1:
            return real(handle, bytes(data[0][:40]))  # the drive took a part of it
        if len(calls) <= 2:
            raise OSError(code, os.strerror(code))
        return real(handle, *data)

    monkeypatch.setattr(os, name, fails)
    with pytest.raises(NotSaved) as raised:
        log.append(pair(1, id="0123456789abcdef"))
    assert isinstance(raised.value, OSError)
    assert isinstance(raised.value, UserError)
    assert os.strerror(code) in raised.value.reason
    assert str(path) not in raised.value.reason
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert len(log.events) == 1
    log.append(pair(1, id="0123456789abcdef"))  # the page tries again
    assert len(lines_of(path)) == 2


@forks
def test_a_file_that_may_grow_no_more_confirms_nothing(path):
    import resource

    def answer(tell):
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        log = FeedbackLog(path)
        log.append(pair())
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 100, resource.RLIM_INFINITY))
        try:
            log.append(pair(1))
        except NotSaved:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            log.append(pair(2))
            tell(path.stat().st_size)

    with child(answer) as (_, heard):
        size = int(heard.readline())
    assert [event["card"] for event in lines_of(path)] == ["card 0", "card 2"]
    assert path.stat().st_size == size


@pytest.mark.parametrize("change", ["append", "replace", "remove"])
def test_nothing_is_confirmed_after_another_program_changed_the_file(log, path, change):
    log.append(pair())
    if change == "append":
        with open(path, "ab") as file:
            file.write(b"mine")
    else:
        path.rename(path.with_suffix(".old"))
        if change == "replace":
            path.write_text("new")
    before = path.read_bytes() if path.exists() else None
    with pytest.raises(NotSaved, match="another program"):
        log.append(pair(1))
    assert (path.read_bytes() if path.exists() else None) == before


# ---- which answers hold --------------------------------------------------------------------------

def test_standing_equals_a_pile_of_answers_for_each_person(log):
    draw, piles = random.Random(1), {"ann": [], "bob": []}
    for i in range(200):
        name = draw.choice(list(piles))
        if draw.random() < .4:
            taken = log.undo(name)
            assert taken == (piles[name].pop() if piles[name] else None)
        else:
            piles[name].append(log.append(pair(i, annotator=name)))
    holds = [event["id"] for event in log.standing()]
    assert sorted(holds) == sorted(event["id"] for pile in piles.values() for event in pile)
    assert saved(log.events, "ann") == len(piles["ann"])
    assert len(log.events) > len(holds)


def test_an_undo_takes_the_edit_back_and_an_undo_that_comes_twice_takes_back_one_answer(log):
    log.append(pair(0))
    answer = log.append(pair(1))
    log.append({"annotator": "me", "kind": "edit", "of": answer["id"], "prompt": "p", "response": "new",
                "original": "old"})
    for _ in range(2):
        assert log.undo("me", "00000000000000aa") == answer
    assert [event["card"] for event in log.standing()] == ["card 0"]
    assert training_records(log.events)["sft"] == []


def test_of_two_answers_to_one_card_the_last_counts_and_no_skip_replaces_an_answer():
    events = [pair(0, id="a"), pair(0, id="b", choice="right", chosen="bad 0", rejected="good 0"),
              {"id": "c", "annotator": "me", "kind": "skip", "card": "card 0"}, pair(0, id="d", annotator="you")]
    assert fates(events) == {"a": "answered anew", "c": "answered anew"}
    assert [record["chosen"] for record in training_records(events)["pairs"]] == ["bad 0", "good 0"]


# ---- what is learned -----------------------------------------------------------------------------

def answers(n=60):
    """The events of a log with every kind of comparison, and what they teach."""
    events = []
    for i in range(n):
        choice = ("left", "right", "tie", "both_bad")[i % 4]
        event = pair(i, id=f"{i:016x}", choice=choice)
        if choice == "right":
            event |= {"chosen": event["right"], "rejected": event["left"]}
        events.append(event | ({"tie": True} if i % 4 > 1 else {}) | ({"both_bad": True} if i % 4 == 3 else {}))
    events.append({"annotator": "me", "kind": "edit", "id": "e" * 16, "of": events[0]["id"],
                   "prompt": "第 0 问？\u2028", "response": "better 0", "original": "good 0"})
    events.append({"annotator": "me", "kind": "skip", "id": "5" * 16, "card": "card 99"})
    events.append(pair(1, id="a" * 16, card="again 1", again="card 1"))
    events.append({"annotator": "me", "kind": "undo", "id": "d" * 16, "of": events[4]["id"]})
    return events


def write_log(path, events):
    path.write_text("".join(json.dumps(event, ensure_ascii=False) + "\n" for event in events), encoding="utf-8")
    return path


def test_training_records_are_in_normal_form():
    found = training_records(answers())
    assert (len(found["pairs"]), len(found["sft"]), found["labels"], found["scores"]) == (60, 1, [], [])
    assert sum("tie" in record for record in found["pairs"]) == 30
    assert found["pairs"][-1] == {"prompt": "第 0 问？\u2028", "chosen": "better 0", "rejected": "good 0"}
    assert found["sft"] == [{"prompt": "第 0 问？\u2028", "response": "better 0"}]
    assert all(checked(record, "reward") == record for record in found["pairs"])


def test_a_prompt_of_messages_makes_an_edit_a_dialogue():
    messages = [{"role": "user", "content": "Hi"}]
    edit = {"annotator": "me", "kind": "edit", "id": "e", "prompt": messages, "response": "a", "original": "b"}
    assert training_records([edit])["sft"] == [{"messages": [*messages, {"role": "assistant", "content": "a"}]}]
    assert training_records([edit | {"original": "a"}])["pairs"] == []


def test_a_log_read_in_place_teaches_what_training_records_says(path, capsys):
    write_log(path, answers())
    assert load_records(path, "reward", say=True) == training_records(read_events(path))["pairs"]
    said = capsys.readouterr().out
    assert "4 of 64 lines left out" in said
    for reason in ("undone (1)", "undo (1)", "skipped (1)", "repeated with sides swapped (1)"):
        assert reason in said


def test_a_log_is_checked_and_prepared_as_own_data(path, tmp_path, capsys):
    write_log(path, [answers()[-2], *answers()])  # it begins with a repetition
    assert prepare.main(["check", str(path)]) == 0
    assert "skipped (1)" in capsys.readouterr().out
    data = open_data(str(path), vocab_size=300, cache=tmp_path / "cache")
    counts = [len(data.records("reward", split)) for split in ("train", "val", "test")]
    assert sum(counts) == 60
    assert min(counts) > 0
    assert any(record["response"] == "better 0" for split in ("train", "val", "test")
               for record in data.records("sft", split))


def test_several_kinds_in_one_log_are_refused_with_the_command_that_divides_them(path):
    write_log(path, [*answers(), *(label(i, id=f"{i:016d}"[::-1]) for i in range(1, 9))])
    with pytest.raises(UserError, match=r"python -m serve export .*feedback.jsonl --out FOLDER"):
        load_records(path, "reward")


def test_a_folder_has_the_most_frequent_kind_and_the_others_beside_it(tmp_path):
    thumbs = [label(i, id=f"{i + 1000:016d}") for i in range(40)]
    stars = [{**label(i, id=f"{i + 2000:016d}"), "kind": "rating", "score": i % 5 + 1} for i in range(30)]
    for star in stars:
        del star["label"]
    folder = tmp_path / "data"
    counts = write_data([*answers(), *thumbs, *stars], folder)
    assert {name: n for name, n in counts.items() if name.startswith("reward")} == {
        "reward": 60, "reward_labels": 40, "reward_scores": 30}
    data = open_data(str(folder), vocab_size=300, cache=tmp_path / "cache")
    assert data.feedback("train") == "pairs"
    assert data.has("reward_labels") and data.has("reward_scores")
    prompts = [record["prompt"] for split in ("train", "val", "test") for record in data.records("ppo", split)]
    assert len(set(prompts)) == 99  # of the undone answer none
    counts = write_data([*thumbs, *answers(8)], folder)  # another main kind: no file of the old one stays
    assert sorted(path.name for path in folder.iterdir()) == sorted(f"{name}.jsonl" for name in counts)
    assert counts["reward"] == 40
    assert open_data(str(folder), vocab_size=300, cache=tmp_path / "cache").feedback("train") == "labels"


def test_a_reply_that_was_edited_is_no_example_though_it_was_chosen_or_liked(tmp_path):
    liked = [label(i, id=f"{i + 1000:016d}") | {"label": 1} for i in range(40)]
    edit = {"annotator": "me", "kind": "edit", "id": "f" * 16, "prompt": liked[0]["prompt"],
            "response": "better", "original": liked[0]["response"]}
    again = edit | {"id": "7" * 16, "response": "best", "original": "better"}
    write_data([*answers(), *liked, edit, again], tmp_path)
    examples = [(r.get("prompt"), r.get("response")) for r in lines_of(tmp_path / "sft.jsonl")]
    assert (liked[0]["prompt"], "best") in examples
    assert (liked[0]["prompt"], "better") not in examples
    assert ("第 0 问？\u2028", "better 0") in examples
    assert (liked[0]["prompt"], liked[0]["response"]) not in examples
    assert ("第 0 问？\u2028", "good 0") not in examples
    assert (liked[1]["prompt"], liked[1]["response"]) in examples


def test_with_several_kinds_and_no_edit_the_liked_replies_are_examples_too(tmp_path):
    write_data([*[pair(i, id=f"{i:016x}") for i in range(60)], *(label(i, id=f"{i + 1000:016d}") for i in range(40))],
               tmp_path)
    examples = [record["response"] for record in lines_of(tmp_path / "sft.jsonl")]
    assert {"good 0", "words 1"} <= {*examples}
    assert "words 0" not in examples  # a thumb down


def test_two_thumbs_beside_many_pairs_do_not_stop_the_training(tmp_path, capsys):
    events = [*answers(200), label(1, id="b" * 16), label(1, id="c" * 16, prompt="Talk 2")]
    counts = write_data(events, tmp_path / "data")
    assert "reward_labels" not in counts
    assert "left out" in capsys.readouterr().out
    open_data(str(tmp_path / "data"), vocab_size=300, cache=tmp_path / "cache")


def test_prompts_stand_in_the_checkpoints_template(tmp_path):
    write_data(answers(), tmp_path, template="Write: {prompt}!", prompts=["more"])
    for name in ("reward", "ppo"):
        first = lines_of(tmp_path / f"{name}.jsonl")[0]
        assert first["prompt"][0]["content"].startswith("Write: 第")
    assert lines_of(tmp_path / "ppo.jsonl")[-1]["prompt"][0]["content"] == "Write: more!"
    first = lines_of(tmp_path / "sft.jsonl")[0]
    assert [m["content"] for m in first["messages"]] == ["Write: 第 0 问？\u2028!", "better 0"]


def test_without_answers_nothing_is_written(tmp_path):
    with pytest.raises(UserError, match="no answers yet"):
        write_data([], tmp_path / "data")
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("to", ["mosslet", *TOOLS])
def test_an_export_is_read_again_and_overwrites_nothing(path, tmp_path, to, capsys):
    write_log(path, answers())
    export_log(path, tmp_path / to, to)
    records = load_records(tmp_path / to / "reward.jsonl", "reward")
    ties = 30 if to == "mosslet" else 0
    assert len(records) == (60 if to == "kto" else 30 + ties)
    assert ("ties are left out" in capsys.readouterr().out) == (ties == 0)
    assert load_records(tmp_path / to / "sft.jsonl", "sft")
    if to == "llama-factory":
        info = json.loads((tmp_path / to / "dataset_info.json").read_text())
        assert info["feedback_reward"]["ranking"] is True
    with pytest.raises(UserError, match="nothing is overwritten"):
        export_log(path, tmp_path / to, to)
    with pytest.raises(UserError, match="none of"):
        exported(answers(), "excel")


@pytest.mark.parametrize("to", ["mosslet", *TOOLS])
def test_an_export_of_several_kinds_can_be_trained_on(path, tmp_path, to):
    write_log(path, [*answers(), *(label(i, id=f"{i + 1000:016d}") for i in range(40))])
    export_log(path, tmp_path / to, to, template="{prompt}?")
    data = open_data(str(tmp_path / to), vocab_size=300, cache=tmp_path / "cache")
    assert data.feedback("train") == ("labels" if to == "kto" else "pairs")
    assert data.has("reward_labels") == (to != "kto")


def test_imports_in_any_form_are_stored_once(log, path):
    lines = [{"instruction": "Hi", "output_1": "a", "output_2": "b", "preference": 2}, answers()[0],
             {"prompt": "Hi", "response": "yes", "label": True}]
    for _ in range(2):
        for line in lines:
            for event in events_of(line, "ann"):
                log.append(event)
    assert [event["kind"] for event in lines_of(path)] == ["pair", "pair", "label"]
    assert training_records(log.events)["pairs"][0] == {"prompt": "Hi", "chosen": "b", "rejected": "a"}
    with pytest.raises(ValueError, match="fields found"):
        events_of({"x": 1}, "ann")
