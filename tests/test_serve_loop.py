"""The loop: what is asked, who answers, what is held out; and that it may be stopped at any moment."""
import json
import sys
import types

import numpy as np
import pytest
import torch

import train
from data.splits import split_key, text_hash
from runtime.options import UserError
from runtime.statistics import auc
from serve import annotators, exports, loop, loop_options, rounds
from serve.annotators import PERSONS, FunctionAnnotator, Simulated, function_named, preferred
from serve.log import FeedbackLog, read_events
from serve.loop_report import how_right, what_changed
from serve.pairs import Card, digest
from serve.rounds import Round, ask, cards_in, held_out_keys, write_round_data
from serve.sources import Sampled, read_pairs, reward_scorer
from serve.training import beside_sft
from tests.conftest import equal

QUICK = ("--preset", "smoke", "--dtype", "float32", "--reward.batch", "8", "--save_every", "1",
         "--ppo.updates", "2", "--ppo.eval_prompts", "4", "--ppo.report_prompts", "8", "--ppo.reply_len", "8",
         "--ppo.norm_replies", "8")


class Killed(BaseException):
    """Stands for a kill."""


def card(i, first="a", second="b"):
    return Card(digest(i), f"prompt {i}", (f"{first} {i}", f"{second} {i}"))


def pair(i, **more):
    """An answer about the i-th prompt."""
    return {"id": f"{i:016x}", "annotator": "me", "kind": "pair", "prompt": f"prompt {i}", "chosen": "yes",
            "rejected": "no", **more}


def read_json(path):
    return json.loads(path.read_text(encoding="utf-8"))


# ---- simulated answers -----------------------------------------------------------------------------

def test_simulated_people_choose_as_bradley_and_terry_say():
    draws = np.random.default_rng(0).random((40_000, 2))
    for delta, temperature in ((0.0, 1.0), (1.0, 1.0), (1.0, 0.5), (-2.0, 4.0)):
        said = preferred(np.full(len(draws), delta), draws, temperature=temperature)
        assert set(said) <= {1, -1}
        assert (said == 1).mean() == pytest.approx(1 / (1 + np.exp(-delta / temperature)), abs=0.01)


def test_a_share_of_the_answers_is_turned_round():
    draws = np.random.default_rng(0).random((20_000, 2))
    said = preferred(np.full(len(draws), 3.0), draws, error_rate=0.2)
    assert (said == -1).mean() == pytest.approx(0.2, abs=0.01)


def test_equally_good_replies_tie_as_often_as_asked():
    draws = np.random.default_rng(0).random((20_000, 2))
    assert (preferred(np.zeros(len(draws)), draws, temperature=1.0, tie_share=0.3) == 0).mean() == pytest.approx(
        0.3, abs=0.01)
    assert (preferred(np.full(len(draws), 4.0), draws, temperature=1.0, tie_share=0.3) == 0).mean() < 0.1


def test_an_answer_follows_from_seed_round_and_card_alone():
    person = Simulated(FunctionAnnotator(PERSONS["short"], "short"), 3, error_rate=0.5)
    cards = [card(i, "a", "much longer") for i in range(30)]
    together = person.events(cards, 2)
    assert [event for c in reversed(cards) for event in person.events([c], 2)][::-1] == together
    assert len({event["id"] for event in together}) == 30
    assert {event["choice"] for event in together} == {"left", "right"}
    for other in (person.events(cards, 3), Simulated(person.annotator, 4, error_rate=0.5).events(cards, 2)):
        assert [event["chosen"] for event in other] != [event["chosen"] for event in together]


def test_what_is_chosen_does_not_depend_on_its_side():
    events = Simulated(FunctionAnnotator(PERSONS["short"], "short"), 0).events(
        [card(i, "kurz", "a very long reply") for i in range(20)], 1)
    assert {event["chosen"].split()[0] for event in events} == {"kurz"}
    assert {event["choice"] for event in events} == {"left", "right"}


@pytest.mark.parametrize("reply", ["房间干净。", "The room was clean."])
def test_the_two_persons_have_opposite_taste(reply):
    long = reply * 2 + ("服务员很热情，我们非常喜欢！谢谢。" if reply[0] == "房" else
                        " The staff were so kind, thank you, we loved it!")
    for prefers_first, person in ((True, "short"), (False, "warm")):
        assert (PERSONS[person]("", reply, long) > 0) == prefers_first
        assert (PERSONS[person]("", long, reply) < 0) == prefers_first


def test_saying_nothing_is_not_short_and_repeating_is_not_warm():
    assert PERSONS["short"]("", "房间干净。", "") > 0
    assert PERSONS["warm"]("", "我很喜欢，谢谢", "喜欢喜欢喜欢喜欢喜欢喜欢喜欢喜欢") > 0


def test_a_function_of_ones_own_answers(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def mine(prompt, first, second):\n    return len(first) - len(second)\n"
                    "def text(prompt, first, second):\n    return 'left'\n"
                    "def fails(prompt, first, second):\n    return 1 / 0\n"
                    "def rewards(prompts, replies):\n    return []\n"
                    "def alone(prompt):\n    return 1\n")
    mine = function_named(f"{file}:mine")
    assert mine.deltas([card(0, "longer", "x"), card(1)]).tolist() == [5.0, 0.0]
    assert [e.get("tie") for e in Simulated(mine, 0).events([card(0, "longer", "x"), card(1)], 1)] == [None, True]
    for name, said in (("text", "no finite number"), ("fails", "line 6: ZeroDivisionError")):
        with pytest.raises(UserError, match=said):
            function_named(f"{file}:{name}").deltas([card(0)])
    for text, said in ((f"{file}:rewards", r"must take \(prompt, first, second\)"),
                       (f"{file}:alone", r"must take \(prompt, first, second\)"),
                       (f"{file}:nobody", "--annotator .*no function 'nobody'"), ("people", "FILE.py:FUNCTION")):
        with pytest.raises(UserError, match=said):
            function_named(text)


# ---- questions ---------------------------------------------------------------------------------------

class Numbered:
    """A source of cards; every third cannot be asked."""

    def __init__(self, stop=10**9):
        self.stop, self.asked = stop, []

    def make(self, numbers):
        self.asked += [*numbers]
        if self.asked[-1] >= self.stop:
            raise Killed
        return [None if i % 3 == 2 else card(i) for i in numbers]


def test_sampling_goes_on_where_the_file_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(rounds, "AT_ONCE", 8)
    whole, stopped = Round(1, tmp_path / "whole"), Round(1, tmp_path / "stopped")
    expected = ask(whole, Numbered(), 20)
    with pytest.raises(Killed):
        ask(stopped, Numbered(stop=20), 20)
    source = Numbered()
    assert ask(stopped, source, 20) == expected
    assert source.asked[0] == 16
    assert stopped.pairs.read_bytes() == whole.pairs.read_bytes()
    assert ask(stopped, source, 20) == expected
    assert len(expected) == len({c.id for c in expected}) == 20


def test_the_page_reads_the_same_cards(tmp_path):
    round = Round(1, tmp_path)
    cards = ask(round, Numbered(), 12)
    assert [c.id for c in read_pairs(round.pairs)] == [c.id for c in cards]
    assert [c for _, c in cards_in(round.pairs)] == cards


def test_a_policy_that_always_says_the_same_is_an_error(tmp_path):
    source = types.SimpleNamespace(make=lambda numbers: [None] * len(numbers))
    with pytest.raises(UserError, match="0 of 12 pairs"):
        ask(Round(1, tmp_path), source, 12)


# ---- what is held out --------------------------------------------------------------------------------

def test_what_was_held_out_once_stays_and_what_was_learned_is_never_held_out():
    first, second = [[pair(i) for i in numbers] for numbers in (range(100), range(50, 250))]
    one, two = held_out_keys([first], 0.1), held_out_keys([first, second], 0.1)
    assert len(one) == 10
    assert len(two) == 25
    assert one <= two
    learned = {split_key(event, "reward") for event in first} - one
    assert not learned & two


def test_ties_alone_are_not_held_out():
    events = [pair(i, **({"tie": True} if i % 2 else {})) for i in range(40)]
    held = held_out_keys([events], 0.2)
    assert held <= {split_key(event, "reward") for event in events[::2]}
    assert len(held) == 4


def test_high_and_low_ratings_are_held_out_alike():
    events = [{"id": f"{i:016x}", "annotator": "me", "kind": "rating", "prompt": f"prompt {i}", "response": "yes",
               "score": 5 if i < 10 else 1} for i in range(50)]
    keys = {split_key(event, "reward"): event["score"] for event in events}
    assert sorted(keys[key] for key in held_out_keys([events], 0.1)) == [1, 1, 1, 1, 5]


def test_a_rounds_data_has_every_answer_on_one_side(tmp_path, monkeypatch):
    monkeypatch.setattr("data.prepare.CACHE", tmp_path / "cache")
    events = [pair(i) for i in range(40)] + [pair(50 + i, prompt=f"prompt {i}", chosen="yes indeed")
                                             for i in range(20)]
    events += [{"id": f"{99:016x}", "annotator": "me", "kind": "undo", "of": events[0]["id"]}]
    counts = write_round_data([events], tmp_path / "data", "Say: {prompt}", 0.1)
    assert sum(counts.values()) == 59
    from data.prepare import open_data
    data = open_data(str(tmp_path / "data"), judge_share=0.0)
    learned, held_out = ({split_key(r, "reward") for r in data.records("reward", split)} for split in ("train", "val"))
    assert not learned & held_out
    assert len(data.records("reward", "train")) == counts["learned"]
    assert len(data.records("reward", "val")) == counts["held_out"]
    assert data.records("reward", "val")[0]["prompt"][0]["content"].startswith("Say: prompt")


def test_too_few_answers_are_an_error(tmp_path):
    for events in ([], [pair(1)], [pair(1, tie=True), pair(2, tie=True)]):
        with pytest.raises(UserError, match="too few"):
            write_round_data([events], tmp_path, "{prompt}", 0.1)


# ---- the whole loop ----------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def run_loop(world, tmp_path_factory):
    """run_loop(out, *words): train.py loop, on the small world; its checkpoints are the parents."""
    import data.prepare
    opened = data.prepare.open_data
    with pytest.MonkeyPatch.context() as m:
        m.setattr("data.prepare.CACHE", tmp_path_factory.mktemp("rounds"))
        m.setattr(rounds, "AT_ONCE", 16)
        m.setattr("data.prepare.open_data",
                  lambda name, **more: world.data if name == "reviews" else opened(name, **more))

        def run(out, *words):
            asked = () if "--answers" in words else ("--pairs", "24")
            return loop.main([*QUICK, *asked, "--init_from", str(world.root / "sft"), "--out", str(out),
                              *map(str, words)])

        yield run


@pytest.fixture(scope="module")
def finished(run_loop, tmp_path_factory):
    """Two rounds, answered by the judge, without interruption."""
    out = tmp_path_factory.mktemp("out")
    assert run_loop(out, "--rounds", 2, "--annotator", "judge", "--error_rate", "0.1") == 0
    return out / "reviews" / "loop"


def test_a_round_leaves_its_answers_stages_and_report(finished, world):
    for number in (1, 2):
        folder = finished / f"round-{number}"
        assert len(read_events(folder / "answers.jsonl")) == 24
        report = read_json(folder / "report.json")
        assert report["answers"]["round"] == 24
        assert report["answers"]["learned"] + report["answers"]["held_out"] == 24 * number
        assert [row["name"] for row in report["policies"]] == ["SFT", *[f"round {i}" for i in range(1, number + 1)]]
        assert {"judge", "policy", "over", "win_rate"} <= set(report["win_rates"][0])
        assert len(report["before_after"]) == 8
        assert set(report["before_after"][0]) == {"prompt", "before", "after", "score_before", "score_after"}
        assert {"accuracy_before", "accuracy_after", "n", "moved"} <= set(report["changed"])
        assert (folder / "report.md").read_text(encoding="utf-8").startswith(f"# reviews, seed 0, round {number}")
        told = beside_sft(report)
        assert told["prompts"] == 8 and [wins["judge"] for wins in told["wins"]] == report["judges"]
        assert told["length"] == [report["policies"][0]["length"], report["policies"][-1]["length"]]
        for stage in ("reward", "ppo"):
            assert read_json(folder / stage / "config.json")["finished"]
    assert [row["answers"] for row in read_json(finished / "loop.json")["rounds"]] == [24, 48]


def test_a_person_is_asked_the_same_cards_as_a_simulated_one(finished):
    """With the checkpoints and the sampling that the records name."""
    path = finished / "round-1" / "pairs.jsonl"
    cards = [card for _, card in cards_in(path)]
    assert read_pairs(str(path)) == cards and all(card.hashes[0] and card.sampling for card in cards)


def test_empty_replies_are_asked_about(tmp_path):
    """Who could not say that they are bad would get a policy that writes them."""
    class Source:
        def make(self, numbers):
            return [Card(str(n), f"p {n}", ("", "a reply")) for n in numbers]

    cards = ask(Round(1, tmp_path / "round-1"), Source(), 20)
    assert len(cards) == 20 and {card.replies for card in cards} == {("", "a reply")}
    assert read_pairs(str(tmp_path / "round-1" / "pairs.jsonl")) == cards
    with FeedbackLog(tmp_path / "log.jsonl") as log:
        for card in cards:
            log.append(card.record("me", "right"))
        counts = write_round_data([log.events], tmp_path / "data", "{prompt}", 0.1)
    assert counts == {"learned": 18, "held_out": 2}


def test_a_round_without_a_held_out_answer_of_its_kind_is_refused(tmp_path):
    """Where holding labels out makes pairs the more frequent kind, nothing that is held out measures them."""
    with FeedbackLog(tmp_path / "log.jsonl") as log:
        for i in range(10):
            log.append(Card(f"c{i}", f"p {i}", ("a", "b")).record("me", "left"))
        for i in range(11):
            log.append({"annotator": "me", "kind": "label", "prompt": f"q {i}", "response": "r", "label": i % 2})
        with pytest.raises(UserError, match="too few to learn from some"):
            write_round_data([log.events], tmp_path / "data", "{prompt}", 0.1)


def test_answers_that_decide_nothing_are_refused_before_the_round_is_fixed(tmp_path):
    cards = [Card(f"c{i}", f"p {i}", ("a", "b")) for i in range(10)]
    for decided in (0, 1):
        with FeedbackLog(tmp_path / f"{decided}.jsonl") as log:
            for i, card in enumerate(cards):
                log.append(card.record("me", "left" if i < decided else "both_bad"))
            with pytest.raises(UserError, match="give answers that decide to at least three prompts"):
                write_round_data([log.events], tmp_path / "data", "{prompt}", 0.1)
    assert not (tmp_path / "data").exists()


def test_held_out_answers_choose_no_weights():
    with pytest.raises(UserError, match="would choose by the answers that are held out"):
        loop.options_of(["--reward.keep", "best"])


def test_when_the_held_out_answer_is_undone_another_one_is_held_out(tmp_path):
    with FeedbackLog(tmp_path / "log.jsonl") as log:
        for i in range(10):
            log.append(Card(f"c{i}", f"p {i}", ("a", "b")).record("me", "left"))
        first = list(log.events)
        held = held_out_keys([first], 0.1)
        [event] = [event for event in first if split_key(event, "reward") in held]
        log.append({"annotator": "me", "kind": "undo", "of": event["id"]})
        for i in range(10, 13):
            log.append(Card(f"c{i}", f"p {i}", ("a", "b")).record("me", "left"))
        counts = write_round_data([first, log.events], tmp_path / "data", "{prompt}", 0.1, cumulative=False)
    assert counts == {"learned": 11, "held_out": 1}


def test_labels_count_beside_pairs_though_a_judge_would_need_their_prompts(tmp_path):
    """No judge learns from a loop's answers, so none takes a prompt away from the reward model."""
    cards = [Card(f"c{i}", f"p {i}", ("a", "b")) for i in range(100)]
    with FeedbackLog(tmp_path / "log.jsonl") as log:
        for card in cards:
            log.append(card.record("me", "left"))
        held = held_out_keys([log.events], 0.1)
        judges = [card.prompt for card in cards if text_hash(f"judge {split_key({'prompt': card.prompt}, 'reward')}")
                  < 0.2 * 2**64 and split_key({"prompt": card.prompt}, "reward") not in held]
        for i, prompt in enumerate(judges[:4]):
            log.append({"annotator": "me", "kind": "label", "prompt": prompt, "response": f"r {i}", "label": i % 2})
        counts = write_round_data([log.events], tmp_path / "data", "{prompt}", 0.1)
    assert counts == {"learned": 94, "held_out": 10}
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == [
        "reward.jsonl", "reward_labels.jsonl", "reward_test.jsonl", "reward_val.jsonl"]


def test_the_loops_reward_model_is_read_in_the_template_that_its_answers_are_in(finished, world):
    """PPO scores prompts in the data's template; so must --pick uncertain and the studies."""
    path = finished / "round-1" / "reward"
    prompt, text = "这本书", "很好看。"
    template = "请接着写：{prompt}"
    asked = [{"role": "user", "content": template.replace("{prompt}", prompt)}]
    plain, _ = reward_scorer(str(path))
    within, _ = reward_scorer(str(path), template=template)
    assert within([prompt], [text]) == pytest.approx(plain([asked], [text]))
    assert within([prompt], [text]) != pytest.approx(plain([prompt], [text]))


def test_what_is_said_of_a_reward_model_does_not_depend_on_the_one_before(world, run_loop, tmp_path):
    """Each reads as many tokens as it was trained on, so one that reads few makes the other read no less."""
    from model import load_checkpoint, save_checkpoint
    from reward import RewardModel
    model, tokenizer, state = load_checkpoint(world.root / "reward", cls=RewardModel)
    state = {name: state[name] for name in ("feedback", "template", "step")}
    for name, longest in (("short", 20), ("long", 60)):
        save_checkpoint(tmp_path / name, model, tokenizer, options={"max_len": longest}, **state)
    words = ["--init_from", str(world.root / "sft"), "--annotator", "judge", *QUICK]
    setting = loop.Loop(*loop.options_of(words)).setting
    rng, held_out = np.random.default_rng(0), tmp_path / "held_out.jsonl"
    texts = ["".join(rng.choice([*"好不书看店早餐房间很喜欢差"], 40)) for _ in range(80)]
    held_out.write_text("".join(json.dumps({"prompt": "书", "chosen": a, "rejected": b}) + "\n"
                                for a, b in zip(texts[::2], texts[1::2], strict=True)))
    said = [what_changed(setting, held_out, tmp_path / "long", before, tokenizer)
            for before in (None, tmp_path / "short", tmp_path / "long")]
    assert {(row["accuracy_after"], row["n"]) for row in said} == {(said[0]["accuracy_after"], 40)}
    assert said[1]["accuracy_before"] != said[1]["accuracy_after"]
    assert said[2]["accuracy_before"] == said[2]["accuracy_after"]
    assert all(row["score_before"] == row["score_after"] for row in said[2]["moved"])


def test_how_right_a_model_is_does_not_depend_on_where_its_zero_is():
    """A model that learned from pairs has no zero; the AUC of its labels, unlike their accuracy, needs none."""
    labels = [{"prompt": f"{i}", "response": "x", "label": i % 2} for i in range(40)]
    scores = np.random.default_rng(0).normal(size=40) + np.arange(40) % 2
    value, ends = how_right("label", labels, {"response": scores})
    assert (value, ends) == how_right("label", labels, {"response": scores + 9})
    assert value == auc(scores, [record["label"] for record in labels])
    assert ends[0] < value < ends[1]
    assert how_right("label", labels[::2], {"response": scores[::2]}) == (None, None)  # nothing to tell apart


def test_records_too_few_for_an_interval_have_none():
    two = [{"prompt": "p", "response": "x", "label": i} for i in (0, 1)]
    assert how_right("label", two, {"response": np.array([0.0, 1.0])}) == (1.0, None)
    alike = [{"prompt": str(i), "response": "x", "score": 3.0} for i in range(5)]
    assert how_right("regression", alike, {"response": np.arange(5.0)}) == (None, None)
    assert how_right("regression", alike[:1], {"response": np.arange(1.0)}) == (None, None)


def test_the_interval_of_a_share_counts_prompts_not_answers():
    def pairs(prompts):
        return [{"prompt": prompt, "chosen": "a", "rejected": "b", "tie": False} for prompt in prompts]

    scores = {"chosen": np.tile([1.0, 1.0, 1.0, -1.0], 10), "rejected": np.zeros(40)}
    value, ends = how_right("pairwise", pairs(map(str, range(40))), scores)
    assert value == 0.75
    assert ends == pytest.approx([0.598, 0.858], abs=1e-3)  # Wilson's, of 30 in 40
    value, ends = how_right("pairwise", pairs([str(i % 10) for i in range(40)]), scores)
    assert value == 0.75
    assert ends == pytest.approx([0.442, 0.919], abs=1e-3)  # of 7.5 in 10
    ratings = [{"prompt": str(i % 12), "response": "x", "score": float(i % 7)} for i in range(48)]
    value, ends = how_right("regression", ratings, {"response": np.arange(48) % 7 + np.arange(48) % 3})
    assert ends[0] < value < ends[1]


def test_replies_that_leave_no_room_for_a_prompt_are_refused_before_a_round_begins(run_loop, tmp_path):
    with pytest.raises(UserError, match="--ppo.reply_len, now 4000"):
        run_loop(tmp_path, "--annotator", "judge", "--ppo.reply_len", 4000)
    assert not (tmp_path / "reviews").exists()


def test_ppo_starts_from_sft_and_the_rounds_ask_about_the_present_policy(finished, world):
    from model import load_checkpoint
    sft = load_checkpoint(world.root / "sft")[2]["hash"]
    first = load_checkpoint(finished / "round-1" / "ppo")[2]["hash"]
    for number, asked in ((1, sft), (2, first)):
        folder = finished / f"round-{number}"
        assert read_json(folder / "ppo" / "config.json")["parents"]["init"] == sft
        assert {h for event in read_events(folder / "answers.jsonl") for h in event["hashes"]} == {asked}


def test_the_report_says_that_a_judge_answered(finished):
    notes = read_json(finished / "round-1" / "report.json")["notes"]
    assert "n-grams gave the answers" in notes[0]
    assert "train.py judge" in notes[1]  # no other one is trained here


def test_held_out_answers_stay_held_out(finished):
    held = [set((finished / f"round-{number}" / "data" / "reward_val.jsonl").read_text(encoding="utf-8").splitlines())
            for number in (1, 2)]
    assert held[0] <= held[1]


def dying(monkeypatch, owner, name, calls):
    """The method is killed at the start of its `calls`-th call."""
    method, left = getattr(owner, name), [calls]

    def killed(*args, **more):
        left[0] -= 1
        if left[0] == 0:
            raise Killed
        return method(*args, **more)

    monkeypatch.setattr(owner, name, killed)


def test_killed_at_any_step_it_ends_as_if_it_had_not_been(finished, run_loop, tmp_path):
    from ppo import PPOTrainer
    from reward import RewardTask
    words = ("--rounds", 2, "--annotator", "judge", "--error_rate", "0.1")
    first = [(Sampled, "make", 2), (FeedbackLog, "append", 7), (exports, "write_lines", 2), (RewardTask, "losses", 3),
             (PPOTrainer, "update", 2), (loop, "measure_round", 1), (loop, "to_json", 3)]
    second = [(FeedbackLog, "append", 20), (PPOTrainer, "save", 2)]
    for owner, name, calls in first + second:
        with pytest.MonkeyPatch.context() as m:
            dying(m, owner, name, calls)
            with pytest.raises(Killed):
                run_loop(tmp_path, *words)
    assert run_loop(tmp_path, *words) == 0
    again = tmp_path / "reviews" / "loop"
    assert read_json(again / "loop.json") == read_json(finished / "loop.json")
    for number in (1, 2):
        one, other = (folder / f"round-{number}" for folder in (finished, again))
        assert (one / "pairs.jsonl").read_bytes() == (other / "pairs.jsonl").read_bytes()
        events = [[{k: v for k, v in event.items() if k != "time"} for event in read_events(x / "answers.jsonl")]
                  for x in (one, other)]
        assert events[0] == events[1]
        for stage in ("reward", "ppo"):
            weights = [torch.load(x / stage / "checkpoint.pt", weights_only=True)["model"] for x in (one, other)]
            assert equal(*weights)


@pytest.mark.parametrize(("words", "said"), [
    (("--error_rate", "0.2"), "error_rate was 0.1, is 0.2"),
    (("--error_rate", "0.1", "--reward.label_smoothing", "0.1"), "reward.label_smoothing was 0.0, is 0.1")])
def test_another_loop_in_the_folder_is_refused(words, said, finished, run_loop):
    with pytest.raises(UserError, match=said):
        run_loop(finished.parent.parent, "--rounds", 2, "--annotator", "judge", *words)


def test_a_loop_whose_function_was_edited_is_another_one(run_loop, tmp_path, monkeypatch):
    file = tmp_path / "taste.py"
    words = ("--annotator", f"{file}:better", "--rounds", 1)
    monkeypatch.setattr(loop.Loop, "play", lambda self, round: None)
    for text in ("def better(prompt, first, second): return len(first) - len(second)\n", "# longer ones\n"):
        with file.open("a") as out:
            out.write(text)
        if text.startswith("def"):
            run_loop(tmp_path, *words)
            run_loop(tmp_path, *words)
        else:
            with pytest.raises(UserError, match=r"the loop there differs \(file taste.py was '\w+', is '\w+'\)"):
                run_loop(tmp_path, *words)


def test_who_answered_is_no_independent_judge():
    from serve.loop_report import notes
    judges = ["n-grams", "transformer"]
    assert notes(["me", "you"], "", judges) == ["The answers were given by me, you"]
    assert notes(["judge n-grams"], "", judges)[1].startswith("The independent judge is transformer,")
    assert notes([*"abcdefg"], "", judges) == ["The answers were given by a, b, c, d, e and 2 more"]


def test_a_person_answers_on_the_page_and_the_loop_goes_on(run_loop, tmp_path, monkeypatch, capfd):
    """The page is a process that appends answers, of which the first stops early."""
    page = "import sys, time; open(sys.argv[1], 'a').write(sys.argv[2]); time.sleep(float(sys.argv[3]))"

    def command(n, seconds):
        def of_round(round, port, terminal):
            cards = [card for _, card in cards_in(round.pairs)][len(round.events()):][:n]
            records = [card.record("me", "left", id=card.id) for card in cards]
            lines = [json.dumps({k: v for k, v in record.items() if v is not None}) + "\n" for record in records]
            return [sys.executable, "-c", page, str(round.answers), "".join(lines), str(seconds)]
        return of_round

    monkeypatch.setattr(rounds, "GRACE", 0.1)
    monkeypatch.setattr(rounds, "page_command", command(9, 0))
    with pytest.raises(UserError, match="9 of 24 answers are given and saved"):
        run_loop(tmp_path)
    monkeypatch.setattr(rounds, "page_command", command(15, 60))
    dying(monkeypatch, loop, "write_round_data", 1)
    with pytest.raises(Killed):  # behind the answers
        run_loop(tmp_path)
    assert len(read_events(tmp_path / "reviews" / "loop" / "round-1" / "answers.jsonl")) == 24
    assert "http://127.0.0.1:8000/" in capfd.readouterr().out


def test_answers_that_are_there_are_learned_and_new_ones_are_a_new_round(run_loop, tmp_path):
    file = tmp_path / "feedback.jsonl"
    folder = tmp_path / "reviews" / "loop"
    with FeedbackLog(file) as log:
        for i in range(12):
            log.append(pair(i, chosen=f"很好看 {i}", rejected=f"不好 {i}"))
        run_loop(tmp_path, "--answers", file)
        run_loop(tmp_path, "--answers", file)  # nothing is new
        assert [r.number for r in rounds.rounds_in(folder)] == [1]
        report = read_json(folder / "round-1" / "report.json")
        assert report["changed"]["accuracy_before"] is not None  # by the run's own reward model
        assert report["answers"] == {"round": 12, "learned": 11, "held_out": 1}
        log.append(pair(20))
        log.append({**pair(20), "id": "f" * 16, "again": log.events[-1]["id"], "card": "x"})  # asked with sides swapped
    run_loop(tmp_path, "--answers", file)
    assert [r.number for r in rounds.rounds_in(folder)] == [1, 2]
    report = read_json(folder / "round-2" / "report.json")
    assert report["answers"] == {"round": 1, "learned": 12, "held_out": 1}  # one is new
    assert [row["name"] for row in report["policies"]] == ["SFT", "round 1", "round 2"]
    assert report["notes"] == ["The answers were given by me"]
    with pytest.MonkeyPatch.context() as m:  # the same answers, learned otherwise
        dying(m, loop, "train_reward", 1)
        with pytest.raises(Killed):
            run_loop(tmp_path, "--answers", file, "--ppo.updates", "3")
    assert [r.number for r in rounds.rounds_in(folder)] == [1, 2, 3]


# ---- the command -------------------------------------------------------------------------------------

@pytest.mark.parametrize(("words", "said"), [
    (["--error_rate", ".2"], "--error_rate has no effect on a person"),
    (["--annotator", "judge", "--annotator_temperature", "0", "--tie_share", ".2"], "where only equals tie"),
    (["--annotator", "short", "--tie_share", ".2"], "--tie_share has no effect on a function"),
    (["--annotator", "judge", "--port", "9000"], "--port has no effect"),
    (["--answers", "x.jsonl", "--annotator", "judge"], "--annotator has no effect with --answers"),
    (["--fresh"], "--fresh has no effect"), (["--reward_from", "x"], "--reward_from has no effect"),
    (["--round", "2"], "unknown option --round"),
    (["--annotator", "judge", "--source", "nowhere"], "python train.py pretrain --source nowhere")])
def test_what_has_no_effect_or_is_missing_is_said(words, said, tmp_path, monkeypatch, world):
    monkeypatch.setattr("data.prepare.open_data", lambda *_, **__: world.data)
    with pytest.raises(UserError, match=said):
        train.main(["loop", "--out", str(tmp_path), *words])


def test_options_of_the_stages_are_given_by_their_names():
    o, reward, ppo = loop_options.parse_loop(["--rounds", "3", "--seed=7", "--reward.epochs=3", "--ppo.updates", "9"])
    assert (o.rounds, o.seed, reward.seed, ppo.seed, reward.epochs, ppo.updates) == (3, 7, 7, 7, 3.0, 9)


def test_the_rules_of_the_persons_are_documented():
    assert all(person.__doc__ and ">>>" in person.__doc__ for person in annotators.PERSONS.values())
