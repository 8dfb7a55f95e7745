"""The questions: which card is next follows from the log, whoever asks, whenever the server starts."""
import json
import threading
import time
import types

import numpy as np
import pytest

from runtime.options import UserError
from sample import ChatSession, SampleOptions, Sampling
from serve import sources
from serve.log import FeedbackLog
from serve.pairs import GAP, Card, Fixed, Pairs, card_of
from serve.sources import CANDIDATES, Model, Sampled, prompts_of, read_pairs, reward_scorer
from serve.strip import strip

PROMPTS = [f"prompt {i}" for i in range(40)]


def model(name="sft", text=lambda prompt, seed, row: f"{prompt} {seed} {row}", **more):
    """A checkpoint whose replies follow from prompt, seed and row."""
    def write(ids, seed, rows):
        return [text("".join(map(chr, one)), seed, row) for one, row in zip(ids, rows, strict=True)]

    return Model(name, f"hash of {name}", lambda prompt: list(map(ord, prompt)), more.get("write", write),
                 {"temperature": 1.0, "top_p": 1.0})


@pytest.fixture
def log(tmp_path):
    with FeedbackLog(tmp_path / "feedback.jsonl") as log:
        yield log


@pytest.fixture
def opened(log):
    """opened(source, …) is a Pairs that is closed at the end."""
    made = []

    def open_pairs(source=None, **more):
        made.append(Pairs(source or Sampled(PROMPTS, [model()]), log, **more))
        return made[-1]

    yield open_pairs
    for pairs in made:
        pairs.close()


def answer(pairs, log, n, annotator="me", choice="left"):
    """The next n cards, answered."""
    cards = []
    for _ in range(n):
        cards.append(pairs.next(annotator, wait=10))
        log.append(cards[-1].record(annotator, choice))
    return cards


# ---- one after another -----------------------------------------------------------------------------

def test_a_card_stays_until_it_is_answered_and_after_a_restart(opened, log):
    pairs = opened()
    first = pairs.next("me", wait=10)
    assert pairs.next("me") == first == pairs.find(first.id, "me")
    pairs.close()
    again = opened()
    assert again.next("me", wait=10) == first
    log.append(first.record("me", "left"))
    assert again.next("me", wait=10).id != first.id


def test_a_server_that_is_started_anew_goes_on_as_one_that_ran_on(opened, log, tmp_path):
    through = answer(opened(), log, 30)
    with FeedbackLog(tmp_path / "other.jsonl") as other:
        parts = []
        for n in (1, 12, 17):
            with Pairs(Sampled(PROMPTS, [model()]), other) as pairs:
                parts += answer(pairs, other, n)
    assert parts == through


def test_all_annotators_get_the_same_cards_with_sides_of_their_own(opened, log):
    pairs = opened()
    names = [f"person {i}" for i in range(9)]
    cards = {name: [card for card in answer(pairs, log, 16, name) if not card.again] for name in names}
    length = min(map(len, cards.values()))
    assert len({tuple(card.id for card in cards[name][:length]) for name in names}) == 1
    assert len({tuple(card.order for card in cards[name][:length]) for name in names}) == 9
    left = np.mean([card.order == (0, 1) for name in names for card in cards[name]])
    assert abs(left - .5) < 4 * .5 / 140 ** .5


def test_skipped_cards_do_not_come_again_and_undone_ones_do(opened, log):
    pairs = opened()
    skipped, = answer(pairs, log, 1, choice="skip")
    taken, = answer(pairs, log, 1)
    assert log.undo("me")["card"] == taken.id
    assert pairs.next("me", wait=10) == taken
    assert log.undo("me")["card"] == skipped.id
    assert pairs.next("me", wait=10) == skipped


def test_about_one_card_in_twenty_comes_again_swapped_and_later(opened, log):
    pairs = opened()
    cards = answer(pairs, log, 260)
    repeated = [card for card in cards if card.again]
    assert 3 <= len(repeated) <= 26  # 12 on average
    places = {card.id: i for i, card in enumerate(cards)}
    for card in repeated:
        first = cards[places[card.again]]
        assert card.replies == first.replies and card.prompt == first.prompt
        assert card.order == first.order[::-1]
        assert places[card.id] - places[first.id] > GAP
    assert len({card.again for card in repeated}) == len(repeated)
    assert len(places) == len(cards)
    assert strip(log.events, "me")["self"]["kappa"] == pytest.approx(-1)  # left was chosen each time
    assert all(pairs.find(card.id, "me") == card for card in cards)
    stored = [event for event in log.events if "again" in event]
    assert [card_of(event) for event in stored] == repeated


def test_the_record_of_an_answer_says_what_was_seen(opened, log):
    pairs = opened(Sampled(PROMPTS, [model("sft"), model("ppo")], seed=3))
    for choice in ("left", "right", "tie", "both_bad"):
        card = pairs.next("me", wait=10)
        event = log.append(card.record("me", choice, strength=2, comment="so", seconds=1.5))
        left, right = (card.replies[i] for i in card.order)
        assert (event["left"], event["right"], event["order"]) == (left, right, list(card.order))
        assert event["from"] == [("sft", "ppo")[i] for i in card.order]
        assert event["hashes"] == [f"hash of {name}" for name in event["from"]]
        assert event["sampling"]["seed"] == 3
        assert [text.split()[-1] for text in (left, right)] == [str(row) for row in event["sampling"]["rows"]]
        assert event["chosen"] == (right if choice == "right" else left)
        assert event.get("tie", False) == (choice in ("tie", "both_bad"))
        assert event.get("both_bad", False) == (choice == "both_bad")
        assert card_of(event) == card
    with pytest.raises(ValueError, match="choice"):
        card.record("me", "up")


def test_an_edit_belongs_to_its_answer(opened, log):
    card = opened().next("me", wait=10)
    stored = log.append(card.record("me", "right"))
    edits = [log.append(card.edit("me", stored["id"], "right", "better")) for _ in range(2)]
    assert edits[0] == edits[1]
    assert edits[0]["original"] == card.shown[1] == stored["right"]
    assert edits[0]["of"] == stored["id"]


# ---- replies ---------------------------------------------------------------------------------------

def test_two_equal_replies_are_never_shown(opened, log):
    def text(prompt, seed, row):
        different = int(prompt.split()[1]) % 3 and row // 2 % 3 == 1  # in the second try, or never
        return f"reply {row}" if different else "same" + " " * (row % 2)

    cards = answer(opened(Sampled(PROMPTS, [model(text=text)])), log, 20)
    assert all(card.replies[0].strip() != card.replies[1].strip() for card in cards)
    assert all(int(card.prompt.split()[1]) % 3 for card in cards)


def test_where_all_replies_are_equal_that_is_said(opened):
    with pytest.raises(UserError, match="no two different replies"):
        opened(Sampled(PROMPTS, [model(text=lambda *_: "same")])).next("me", wait=10)
    greedy = model()
    greedy.sampling["temperature"] = 0
    with pytest.raises(UserError, match="same reply twice"):
        Sampled(PROMPTS, [greedy])
    Sampled(PROMPTS, [greedy, model()])
    with pytest.raises(UserError, match="no prompts"):
        Sampled([], [model()])


def test_prompts_that_leave_no_room_are_left_out(opened, log):
    def ids(prompt):
        if int(prompt.split()[1]) % 2:
            raise UserError("too long")
        return list(map(ord, prompt))

    short = model("short")
    source = Sampled(PROMPTS, [model(), types.SimpleNamespace(**{**vars(short), "ids": ids})])
    assert all(int(card.prompt.split()[1]) % 2 == 0 for card in answer(opened(source), log, 15))


def test_uncertain_shows_of_several_pairs_the_one_whose_scores_differ_least(opened, log):
    def score(prompts, texts):
        asked.append((prompts, texts))
        return [hash((prompt, text)) % 1000 / 100 for prompt, text in zip(prompts, texts, strict=True)]

    asked = []
    source = Sampled(PROMPTS, [model()], score=score, scorer="rm")
    cards = [card for card in answer(opened(source), log, 25) if not card.again]
    for card in cards:
        prompts, texts = next(x for x in asked if card.replies[0] in x[1])
        scores = np.reshape(score(prompts, texts), (-1, 2))
        assert len(scores) == CANDIDATES
        assert len(set(prompts)) == CANDIDATES
        gap = abs(np.subtract(*score([card.prompt] * 2, card.replies)))
        assert gap == pytest.approx(np.abs(scores[:, 0] - scores[:, 1]).min())
    with pytest.raises(UserError, match="uncertain"):
        Sampled(PROMPTS, [model()], score=score, single=True)


def test_prompts_come_in_passes_each_in_another_order():
    source = Sampled(PROMPTS, [model()], seed=1)
    passes = [[source.prompt(i + 40 * k) for i in range(40)] for k in range(3)]
    assert all(sorted(one) == sorted(PROMPTS) for one in passes)
    assert len({tuple(one) for one in passes}) == 3
    other = Sampled(PROMPTS, [model()], seed=2)
    assert not {source.id(i) for i in range(50)} & {other.id(i) for i in range(50)}
    assert not {source.id(i) for i in range(50)} & {Sampled(PROMPTS, [model("ppo")], seed=1).id(i) for i in range(50)}


def test_a_single_reply_is_rated_or_labelled(opened, log):
    pairs = opened(Sampled(PROMPTS, [model()], single=True))
    card = pairs.next("me", wait=10)
    event = log.append(card.record("me", 4, "rate"))
    assert (event["kind"], event["score"], event["response"], event["from"]) == ("rating", 4, card.shown[0], ["sft"])
    for mode, choice in (("rate", 6), ("rate", "left"), ("label", 2), ("label", None), ("label", [])):
        with pytest.raises(ValueError, match="choice"):
            card.record("me", choice, mode)
    second = pairs.next("me", wait=10)
    assert log.append(second.record("me", 0, "label"))["label"] == 0
    assert len({card.id, second.id, pairs.next("me", wait=10).id}) == 3


# ---- the thread --------------------------------------------------------------------------------------

def test_nobody_waits_for_a_slow_model_and_close_stops_it(log):
    writing, finish = threading.Event(), threading.Event()

    def write(ids, seed, rows):
        writing.set()
        finish.wait(10)
        return [str(row) for row in rows]

    pairs = Pairs(Sampled(PROMPTS, [model(write=write)]), log)
    assert writing.wait(10)
    since = time.monotonic()
    assert pairs.next("me") is None
    assert not pairs.done("me")
    assert time.monotonic() - since < 1
    threading.Timer(.05, finish.set).start()
    pairs.close()
    assert not pairs.thread.is_alive()
    pairs.close()


def test_cards_are_prepared_ahead_but_no_more_than_that(opened, log):
    made = []
    pairs = opened(Sampled(PROMPTS, [model(text=lambda *x: made.append(x) or str(x))]), ahead=5)
    answer(pairs, log, 3)
    pairs.next("me", wait=10)
    for _ in range(100):
        time.sleep(.05)
        if len(made) == 2 * (3 + 5):
            break
    time.sleep(.1)  # in which no more are made
    assert len(made) == 2 * (3 + 5)


def test_a_fault_of_the_model_is_told_and_then_tried_again(opened):
    faults = [RuntimeError("out of memory")]

    def write(ids, seed, rows):
        if faults:
            raise faults.pop()
        return [str(row) for row in rows]

    pairs = opened(Sampled(PROMPTS, [model(write=write)]))
    with pytest.raises(UserError, match="out of memory"):
        pairs.next("me", wait=10)
    assert pairs.next("me", wait=10)


def test_a_card_on_the_screen_is_the_same_after_a_kill_though_the_model_rounds_otherwise(opened, log, tmp_path):
    kept = tmp_path / "cards.jsonl"
    pairs = opened(kept=kept)
    first = pairs.next("me", wait=10)
    pairs.close()
    kept.write_text(kept.read_text()[:-30])  # the last card was torn
    n = len(kept.read_text().splitlines())
    pairs = opened(Sampled(PROMPTS, [model(text=lambda *x: f"rounded otherwise {x}")]), kept=kept)
    assert pairs.next("me", wait=10) == first == pairs.find(first.id, "me")
    cards = answer(pairs, log, 12)
    pairs.close()
    assert [card.replies[0].startswith("rounded") for card in cards[:n]] == [False] * (n - 1) + [True]
    lines = [json.loads(line) for line in kept.read_text().splitlines()[n:] if line]
    assert {line["id"] for line in lines} >= {card.id for card in cards[n:] if not card.again}


def test_a_card_that_is_none_is_not_found(opened):
    assert opened().find("0123456789abcdef", "me") is None


# ---- files -------------------------------------------------------------------------------------------

def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_any_form_of_pairs_can_be_asked_about(opened, log, tmp_path):
    cards = read_pairs(write(tmp_path / "p.jsonl", [
        {"prompt": "a", "chosen": "1", "rejected": "2"},
        {"prompt": "a", "chosen": "1", "rejected": "2"},
        {"prompt": "b", "chosen": "1", "rejected": "2", "tie": True},
        {"instruction": "c", "output_1": "1", "output_2": "2", "preference": 2},
        {"chosen": "\n\nHuman: d\n\nAssistant: 1", "rejected": "\n\nHuman: d\n\nAssistant: 2"},
        {"prompt": "e", "replies": ["1", "2"]}, {"prompt": "f", "response": "alone", "label": 1}]))
    assert [(card.turns, card.replies) for card in cards] == [
        ([["user", "a"]], ("1", "2")), ([["user", "b"]], ("1", "2")), ([["user", "c"]], ("2", "1")),
        ([["user", "d"]], ("1", "2")), ([["user", "e"]], ("1", "2"))]
    assert [card.names for card in cards][::4] == [("chosen", "rejected"), ("reply 1", "reply 2")]
    pairs = opened(Fixed(cards))
    assert [card.id for card in answer(pairs, log, 5)] == [card.id for card in cards]
    assert pairs.next("me") is None and pairs.done("me")
    assert not pairs.done("you")


def test_more_than_two_replies_are_asked_about_as_neighbours(tmp_path):
    ranked = {"prompt": "q", "answers": [{"rank": r, "answer": f"rank {r}"} for r in (3, 1, 4, 2)]}
    cards = read_pairs(write(tmp_path / "p.jsonl", [ranked, {"prompt": "q", "responses": ["x", "y", "x", "z"]}]))
    assert [card.replies for card in cards] == [("rank 1", "rank 2"), ("rank 2", "rank 3"), ("rank 3", "rank 4"),
                                                ("x", "y"), ("y", "z")]


def test_another_persons_log_asks_about_the_same_cards(opened, log, tmp_path):
    mine = answer(opened(), log, 30)
    log.undo("me")
    cards = read_pairs(log.path)
    assert [card.id for card in cards] == [card.id for card in mine[:-1] if not card.again]
    with FeedbackLog(tmp_path / "hers.jsonl") as hers, Pairs(Fixed(cards), hers) as pairs:
        answer(pairs, hers, 10, "ann", "right")
        merged = strip([*log.events, *hers.events], "me")["others"]["ann"]
    assert merged["n"] >= 8


def test_a_file_can_be_rated_reply_by_reply(tmp_path):
    path = write(tmp_path / "p.jsonl", [{"prompt": "a", "chosen": "1", "rejected": "2"},
                                        {"prompt": "b", "response": "3", "score": 1}])
    assert [card.replies for card in read_pairs(path, single=True)] == [("1",), ("2",), ("3",)]


def test_what_has_no_pairs_is_refused_by_line(tmp_path):
    with pytest.raises(UserError, match="line 2: .*fields found"):
        read_pairs(write(tmp_path / "p.jsonl", [{"prompt": "e", "replies": ["1", "2"]}, {"x": 1}]))
    with pytest.raises(UserError, match="must be a list of texts"):
        read_pairs(write(tmp_path / "p.jsonl", [{"prompt": "e", "replies": [1, 2]}]))
    with pytest.raises(UserError, match="none to compare it with"):
        read_pairs(write(tmp_path / "p.jsonl", [{"prompt": "e", "response": "1", "label": 1}]))


# ---- checkpoints -------------------------------------------------------------------------------------

def test_a_checkpoint_is_asked_about_with_its_own_data_and_reward_model(world, opened, log, monkeypatch):
    session = ChatSession(str(world.root / "sft"), SampleOptions(max_new_tokens=8))
    monkeypatch.setattr(sources, "open_data", lambda *_, **__: world.data)
    state = {"options": {"data": "reviews", "vocab_size": 500}}
    prompts = prompts_of(state)
    assert prompts == list(dict.fromkeys(r["prompt"] for r in world.data.records("ppo", "train")))
    score, name = reward_scorer(str(world.root / "reward"))
    writer = Model.of_session(session, "sft")
    source = Sampled(prompts, [writer], seed=5, score=score, scorer=name)
    cards = answer(opened(source, ahead=4), log, 4)
    for card in cards:
        rows = card.sampling["rows"]
        alone = [writer.write([writer.ids(card.prompt)], 5, [row])[0] for row in rows]
        assert tuple(alone) == card.replies
        first, second = card.sampling["scores"]
        assert score([card.prompt] * 2, card.replies) == pytest.approx([first, second], abs=1e-3)
    assert cards[0].hashes == (session.state["hash"],) * 2
    with pytest.raises(UserError, match="--prompts"):
        prompts_of({})


def test_prompts_can_be_brought(tmp_path):
    path = write(tmp_path / "prompts.jsonl", [{"prompt": "a"}, {"prompt": "a"}, {"prompt": "b"}])
    assert prompts_of({}, file=str(path)) == ["a", "b"]


def test_an_engine_writes_too_and_is_waited_for_while_it_is_full(monkeypatch):
    class Busy(Exception):
        pass

    monkeypatch.setitem(__import__("sys").modules, "serve.engine", types.SimpleNamespace(Busy=Busy))
    monkeypatch.setattr(sources.time, "sleep", lambda _: full.clear())
    full, seen = ["full"], []

    class Engine:
        name, hash, template, bare, max_len = "sft", "h", "{prompt}", True, 20
        tokenizer = types.SimpleNamespace(special_ids=[1, 2, 3], end_ids=[2], eot_id=0,
                                          encode=lambda text: list(map(ord, text)))

        def submit(self, ids, *, max_tokens, sampling, seed, row):
            if full:
                raise Busy
            seen.append((ids, max_tokens, sampling, seed, row))
            return types.SimpleNamespace(result=lambda: (f"text {row}", [], "stop"))

    writer = Model.of_engine(Engine(), Sampling(temperature=.7), 8)
    assert writer.write([[5], [6]], 3, [10, 11]) == ["text 10", "text 11"]
    assert seen[1] == ([6], 8, Sampling(temperature=.7, suppress=(1, 3)), 3, 11)
    assert writer.ids("abc") == [0, 97, 98, 99]
    with pytest.raises(UserError, match="exceed"):
        writer.ids("a" * 13)
    assert writer.sampling == {"temperature": .7, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0,
                               "max_tokens": 8}


def test_turns_are_speakers_and_texts():
    messages = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "Hi"}]
    assert Card("x", messages, ("a", "b")).turns == [["system", "be kind"], ["user", "Hi"]]
