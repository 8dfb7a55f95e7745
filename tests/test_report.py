"""What is said of replies: figures and intervals, and a report that fits a terminal."""
import re

import numpy as np
import pytest

from data.report import (Measures, add_distinct, by_judge, describe, drawn_pairs, judged_by, missing,
                         opinions_on_feedback, people_wrote, policy_columns, render_report,
                         report_name, show_policies, show_wins, splits_used, table_row, win_rates)
from data.dataset import DataSet, tells
from data.health import judge_warnings, stage_warnings, warnings_of
from data.html import page
from data.sets import DATA_SETS, register
from data.tokenizer import train_bpe

TOKENIZER = train_bpe(["好书好看的书"] * 3, 270)


class Data:
    """A data set with this feedback; its prompts are those of PPO."""

    template = "{prompt}"

    def __init__(self, feedback, sft=()):
        self.feedback_records, self.dialogues = feedback, sft

    def has(self, stage):
        return bool(self.records(stage, "train"))

    def records(self, stage, split):
        return {"reward": self.feedback_records, "sft": self.dialogues, "judge": [],
                "ppo": [*self.feedback_records, *self.dialogues]}[stage]

    def feedback(self, split):
        return tells(self.feedback_records)


class Fixed:
    """A judge that says these probabilities."""

    def __init__(self, *probs):
        self.given = probs

    def probs(self, prompts, texts):
        return np.array(self.given)


def described(judges, n=2):
    rows = [[1, 2, TOKENIZER.eom_id], [3, TOKENIZER.pad_id, 4], [5, 6, 7], [8, 9]][:n]
    texts = [TOKENIZER.reply_text(row) for row in rows]
    return describe(["a", "b", "c", "d"][:n], texts, rows, TOKENIZER, judges, {})


def test_every_judge_has_figures_of_its_own():
    judges = {"n-grams": Fixed(.2, .9), "transformer": Fixed(.6, .8)}
    metrics, records = described(judges)
    assert metrics["judged_positive"] == .5
    assert metrics["judged_positive_transformer"] == 1
    assert metrics["judge"] == pytest.approx(.55)
    assert [r["judge_transformer"] for r in records] == [.6, .8]
    assert judged_by({}, ["a"], ["b"]) == ({}, {})
    assert [by_judge("judge", name) for name in judges] == ["judge", "judge_transformer"]


def test_control_tokens_other_than_the_end_are_counted_and_not_shown():
    metrics, records = described({})
    assert metrics["control"] == .5
    assert [r["ended"] for r in records] == [True, False]
    assert records[1]["reply"] == TOKENIZER.decode([3, 4])
    assert records[1]["tokens"] == 3


def test_intervals_are_over_openings():
    _, records = described({"n-grams": Fixed(.2, .9, .2, .9)}, n=4)
    once = table_row("x", {}, records)["intervals"]["judged_positive"]
    pairs = table_row("x", {}, records, samples=2)["intervals"]["judged_positive"]
    assert once[0] < .5 < once[1]
    assert pairs == [.5, .5]  # each opening has one liked reply and one that is not


def test_the_last_policy_is_compared_with_every_other():
    replies = {"A": [.1, .4], "SFT, best of 16": [.4], "C": [.9, .3]}
    replies = {name: [{"judge": p, "tokens": 5} for p in probs] for name, probs in replies.items()}
    wins = win_rates(replies, ["A", "C"], ["n-grams"])
    assert [(w["over"], w["win_rate"][0]) for w in wins] == [("A", .5), ("SFT, best of 16", 1)]
    wins = win_rates(replies, ["A", "C"], ["n-grams"], samples=2)  # two replies to one opening
    assert [(w["over"], w["win_rate"][0]) for w in wins] == [("A", .75), ("SFT, best of 16", .5)]


def test_a_judge_who_merely_likes_short_replies_is_undecided_among_those_of_equal_length():
    lengths = {"SFT": [40] * 30 + 3 * [12, 8, 10, 10], "PPO": [10] * 42}
    replies = {name: [{"judge": 1 / n, "tokens": n} for n in of_policy] for name, of_policy in lengths.items()}
    (wins,) = win_rates(replies, list(replies), ["n-grams"])
    assert wins["win_rate"][0] == pytest.approx(36 / 42)
    assert wins["alike"] == 12  # 12 is a fifth longer at most, 8 a fifth shorter
    assert wins["alike_win_rate"][0] == .5
    text = show_wins(wins)
    assert re.fullmatch(r"The judge n-grams prefers the reply of PPO to that of SFT on 85\.7% of the openings "
                        r"\[.*%\]; among replies of about equal length on 50\.0% of 12 openings \[.*\]: undecided\.",
                        text)
    replies["SFT"] = replies["SFT"][:30]
    replies["PPO"] = replies["PPO"][:30]
    (wins,) = win_rates(replies, list(replies), ["n-grams"])
    assert (wins["alike"], wins["alike_win_rate"]) == (0, [])
    assert show_wins(wins).endswith("; too few replies are of about equal length (0) to compare those alone.")


def test_each_of_several_replies_meets_only_those_of_about_its_length():
    """One opening, two replies of each policy: two of the four pairs are alike, and C wins one of them."""
    replies = {"A": [{"judge": .5, "tokens": 10}, {"judge": .5, "tokens": 50}],
               "C": [{"judge": .9, "tokens": 11}, {"judge": .1, "tokens": 49}]}
    (wins,) = win_rates(replies, ["A", "C"], ["n-grams"], samples=2)
    assert wins["alike"] == 1
    assert wins["alike_win_rate"][0] == .5


def test_a_judge_is_measured_on_labels():
    records = [{"prompt": "a", "response": "b", "label": i % 2} for i in range(20)]
    found = opinions_on_feedback({"n-grams": Fixed(*[.2, .7] * 10)}, records)
    assert found["n-grams"]["auc"].startswith("1.000 [")


def test_people_who_answer_messages_are_found():
    """Prompts may be lists of messages."""
    prompt = [{"role": "user", "content": "书"}]

    assert people_wrote(Data([{"prompt": prompt, "response": "好看", "label": 1}]), TOKENIZER,
                        10)[0][0] == "people, liked"


def test_what_people_preferred_is_found_for_every_kind_of_feedback():
    def found(*records):
        data = Data([{"prompt": "书", **r} for r in records])
        return {name: [r["response"] for r in of_people]
                for name, of_people, _ in people_wrote(data, TOKENIZER, 30)}

    assert found({"response": "a", "label": 1}, {"response": "b", "label": 0}) == {
        "people, liked": ["a"], "people, disliked": ["b"]}
    assert found({"response": "a", "score": 3}, {"response": "b", "score": 1},
                 {"response": "c", "score": 2.5}) == {
        "people, rated high": ["a", "c"], "people, rated low": ["b"]}
    assert found({"chosen": "a", "rejected": "b"}, {"chosen": "a", "rejected": "c"},
                 {"chosen": "d", "rejected": "e", "tie": True}) == {
        "people, preferred": ["a"], "people, not preferred": ["b", "c"]}


def test_without_feedback_people_are_those_of_the_dialogues():
    dialogues = [{"prompt": "书", "response": "好"},
                 {"messages": [{"role": "user", "content": "看"}, {"role": "assistant", "content": "书"}]}]
    data = Data([], dialogues)
    data.records = lambda stage, split: {"sft": dialogues, "reward": []}.get(
        stage, [{"prompt": "书"}, {"prompt": [{"role": "user", "content": "看"}]}])
    data.has = lambda stage: stage != "reward"
    (name, records, _), = people_wrote(data, TOKENIZER, 10)
    assert name == "people"
    assert [r["response"] for r in records] == ["好", "书"]


def test_prompts_over_the_limit_are_no_openings():
    data = Data([{"prompt": prompt, "response": "好", "label": 1} for prompt in ("书", "书" * 40)])
    assert len(people_wrote(data, TOKENIZER, 10)[0][1]) == 2
    assert [r["prompt"] for r in people_wrote(data, TOKENIZER, 10, limit=20)[0][1]] == ["书"]


def test_a_report_of_test_texts_has_a_name_of_its_own():
    assert [report_name("report.json", split) for split in ("val", "test")] \
        == ["report.json", "report_test.json"]


# ---- in words ------------------------------------------------------------------------------------

def line(name, **others):
    figures = {"judged_positive": .916, "judged_positive_transformer": .882, "raw_score": 3.851,
               "kl": 4.365, "distinct2": .736, "length": 19.8, "end_rate": .998, "identical": 0.0,
               "short": .072, "ref_perplexity": 108.2, "control": 0.0} | others
    return {"name": name, "replies": "2000", "bigrams": 5000, **figures,
            "intervals": {key: [figures[key] * .97, figures[key] * 1.03] for key in (
                "judged_positive", "judged_positive_transformer", "raw_score", "kl", "distinct2",
                "length")}}


def test_the_table_with_all_columns_and_intervals_fits_a_terminal():
    lines = [line(name) for name in ("SFT", "PPO", "SFT, best of 16", "people, disliked")]
    shown = show_policies(report(policies=lines)).splitlines()
    assert max(map(len, shown)) <= 160
    assert len({len(row) for row in shown}) == 1  # columns stand below each other
    assert "0.916 ±.027" in shown[2]


def report(**others):
    made = {"split": "val", "feedback": "labels", "seed": 3, "openings": 500, "judges": ["n-grams", "transformer"],
            "samples": 1, "settings": {"reply_len": 64, "temperature": 1.0}, "first": "SFT",
            "last": "PPO", "policies": [line("SFT"), line("PPO", control=.02)], "pairs": [],
            "win_rates": [{"judge": "transformer", "policy": "PPO", "over": "SFT, best of 16",
                           "win_rate": [.6, .5, .7]}], **others}
    return made | {"columns": policy_columns(made)}


def test_the_report_says_split_judges_and_who_is_preferred():
    text = render_report(report(), "reviews")
    assert text.startswith("# reviews, seed 3, validation")
    assert "openings of the validation split" in text
    assert "Judged by n-grams, then by transformer" in text
    assert "PPO to that of SFT, best of 16 on 60.0% of the openings [50.0%, 70.0%]: undecided" in text
    assert "2.0% of the replies of PPO hold control tokens" in text


@pytest.mark.parametrize("low,high,undecided", [(.51, .7, False), (.3, .49, False), (.4, .6, True)])
def test_a_preference_whose_interval_holds_one_half_is_undecided(low, high, undecided):
    wins = {"judge": "j", "policy": "PPO", "over": "SFT", "win_rate": [.5, low, high]}
    made = report(win_rates=[wins])
    assert ("undecided" in render_report(made, "x")) == undecided
    assert ("undecided" in page(made, "x", {})) == undecided


def test_a_report_without_judges_and_labels_is_one_too():
    plain = [{key: x for key, x in row.items() if "judge" not in key} | {"intervals": {}}
             for row in report()["policies"]]
    text = render_report(report(judges=[], policies=plain, win_rates=[]), "mine")
    assert "Judged by nobody" in text


# ---- what a report warns of, and what it misses --------------------------------------------------

def test_a_loss_of_variety_or_of_ends_is_a_warning():
    rows = [{"name": "SFT", "distinct2": .8, "end_rate": 1.0, "length": 20.0},
            {"name": "PPO", "distinct2": .69, "end_rate": .91, "length": 11.0},
            {"name": "worse", "distinct2": .67, "end_rate": .89, "length": 39.0}]
    assert warnings_of(rows, "SFT", "PPO") == []
    variety, ends = warnings_of(rows, "SFT", "worse")
    assert "distinct-2 of worse is 0.670, below 85% of SFT's 0.800" in variety
    assert "ends of worse is 0.890, below 90%" in ends
    assert f"Warning: {variety}." in render_report(report(warnings=[variety]), "x")


@pytest.mark.parametrize("length,times,what", [(4.4, "0.22 times", "too short"), (50.0, "2.5 times", "too long")])
def test_replies_of_quite_another_length_are_a_warning(length, times, what):
    rows = [{"name": name, "distinct2": .8, "end_rate": 1.0, "length": n}
            for name, n in (("SFT", 20.0), ("PPO", length))]
    warning, = warnings_of(rows, "SFT", "PPO")
    assert f"replies of PPO have {length} tokens, {times} SFT's 20.0" in warning and what in warning


@pytest.mark.parametrize("measure,text,chance", [
    ("auc", "0.62 [0.49, 0.74]", True), ("auc", "0.62 [0.51, 0.74]", False),
    ("correlation", "0.47 [-0.06, 0.75]", True), ("correlation", "0.47 [0.01, 0.75]", False)])
def test_a_judge_whose_interval_holds_chance_is_named_once(measure, text, chance):
    opinions = {"n-grams": {measure: text, "accuracy": "0.5 [0.4, 0.6]"}}
    assert len(judge_warnings(opinions, ["the judge transformer: by chance"])) == chance
    assert judge_warnings(opinions, ["the judge n-grams: said before"]) == []


def test_the_report_begins_with_what_the_judges_think():
    wins = [{"judge": judge, "policy": "PPO", "over": "SFT", "win_rate": rate}
            for judge, rate in (("n-grams", [.7, .6, .8]), ("transformer", [.5, .4, .6]), ("third", [.3, .2, .4]))]
    text = render_report(report(win_rates=wins, warnings=["short replies"]), "x")
    assert ("In short, PPO beside SFT: n-grams: better, transformer: undecided, third: worse. Read the warnings "
            "first.") in text
    assert text.index("In short") < text.index("Warning")


def test_every_policy_meets_the_first_and_the_last_one_all_others():
    scores = {"SFT": .1, "best": .5, "PPO": .9, "SFT, best of 2": .7}
    replies = {name: [{"judge": score, "tokens": 10}] for name, score in scores.items()}
    met = [(w["policy"], w["over"], w["win_rate"][0]) for w in win_rates(replies, ["SFT", "best", "PPO"], ["n-grams"])]
    assert met == [("PPO", "SFT", 1), ("PPO", "best", 1), ("PPO", "SFT, best of 2", 1), ("best", "SFT", 1)]


def test_what_a_stage_warned_of_is_said_again_in_the_report():
    warnings = stage_warnings("the reward model", {"warnings": ["val_auc 0.5 is no better than chance"]})
    made = report(warnings=warnings)
    assert "Warning: the reward model: val_auc 0.5 is no better than chance." in render_report(made, "x")
    assert '<p class="warning">Warning: the reward model: val_auc 0.5' in page(made, "x", {})
    assert stage_warnings("the judge", {}) == []


def test_what_is_missing_is_said_with_what_to_bring():
    pairs, labels = [{"chosen": "a", "rejected": "b", "prompt": ""}], [{"label": 1, "prompt": ""}] * 3

    def said(data, judges=("n-grams", "transformer"), reward_model=True, openings=1):
        return " ".join(missing(data, "test", judges=judges, reward_model=reward_model, openings=openings, wanted=500))

    assert said(Data(pairs)) == ""
    assert "bring more records of feedback, or judge.jsonl" in said(Data(pairs), judges=())
    assert "`python train.py judge` trains it" in said(Data(pairs), judges=["n-grams"])
    assert "bring reward.jsonl" in said(Data([]))
    assert "tells nothing apart; bring more, or reward_test.jsonl" in said(Data(labels))
    assert "--reward_from" in said(Data(pairs), reward_model=False)
    assert "1 of 1 openings: longer, with a reply, than a model or judge can read" in said(Data(pairs), openings=0)
    assert "Missing: " in render_report(report(missing=["no judge: bring one"]), "x")


def test_a_prompt_of_messages_is_shown_turn_by_turn():
    prompt = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"},
              {"role": "assistant", "content": "Yes?"}, {"role": "user", "content": "Who?"}]
    before, after = ([{"prompt": prompt, "reply": reply}, {"prompt": "书", "reply": "x"}]
                     for reply in ("one\ntwo", "three"))
    pairs = drawn_pairs(before, after, [0, 1])
    assert pairs[0]["turns"] == [["System", "Be kind."], ["Human", "Hi"], ["Assistant", "Yes?"],
                                 ["Human", "Who?"]]
    shown = render_report(report(pairs=pairs), "x")
    assert "**Human:** Hi\n\n**Assistant:** Yes?\n\n**Human:** Who?\n- SFT: one\n  two\n- PPO: three" in shown
    assert "**书**\n- SFT: x" in shown


def test_the_splits_used_are_counted():
    counts = {"reward_train": 1000, "reward_val": 50, "judge_train": 900, "reward_left_out": 3,
              "pretrain_train[text]": {"documents": 3}}
    assert splits_used(counts) == {"reward": [1000, 50, 0], "judge": [900, 0, 0]}
    assert "reward 1,000 / 50 / 0, judge 900 / 0 / 0" in render_report(report(records=splits_used(counts)), "x")


# ---- columns -------------------------------------------------------------------------------------

def test_the_columns_are_those_of_the_feedback_and_of_the_reward():
    rows = [line("SFT")]
    assert policy_columns(report(policies=rows))["judged_positive"] == "judged positive"
    for kind in ("pairs", "scores"):
        assert policy_columns(report(policies=rows, feedback=kind))["judged_positive"] == "above average"
    rows[0]["intervals"] |= {"part_polite": [.1, .2], "rouge_l": [.3, .4]}
    titles = policy_columns(report(policies=rows))
    assert (titles["part_polite"], titles["rouge_l"]) == ("reward: polite", "rouge_l")


def test_a_few_texts_by_people_do_not_cut_the_policies():
    lines = [{"intervals": {}, "distinct2": .1} for _ in range(4)]
    answers = [[[1, 2, 3, 4, 5]] * 8, [[1, 2, 3, 4, 6]] * 8]
    add_distinct(lines, answers, [[[1, 2, 3]] * 4, [[7, 8]]])
    assert [line.get("bigrams") for line in lines] == [8, 8, 8, None]
    assert "distinct2" not in lines[3]


def test_a_data_sets_own_measures_are_columns_with_intervals(tmp_path):
    def share(folder, prompts, texts, references):
        assert folder == tmp_path
        found = {"shout": [float(len(text)) if text else None for text in texts]}
        return found | ({"known": [1.0] * len(texts)} if references else {})

    data = Data([], [{"prompt": "a", "response": "x"}, {"prompt": "b", "response": "y"}])
    data.meta, data.folder, data.has = {"data": "loud"}, tmp_path, lambda stage: True
    register(DataSet("loud", None, None, measures=share))
    try:
        measures = Measures(data, "val")
        records = [{"prompt": p, "reply": t, "tokens": 1} for p, t in (("a", "hey"), ("b", ""), ("a", "x"))]
        metrics = {}
        assert measures.add(metrics, records) == ["shout", "known"]
        assert metrics["shout"] == 2  # of those that have one
        assert [r["shout"] for r in records] == [3, None, 1]
        assert 1 <= table_row("x", metrics, records)["intervals"]["shout"][0] <= 2
        measures.add(metrics, elsewhere := [{"prompt": "c", "reply": "z", "tokens": 1}])
        assert "known" not in elsewhere[0]  # no reference for this prompt
    finally:
        del DATA_SETS["loud"]


# ---- opinions on feedback ------------------------------------------------------------------------

def test_judges_are_measured_on_pairs_and_ratings():
    class Length:
        def probs(self, prompts, texts):
            return np.array([len(text) / 100 for text in texts])

    pairs = [{"prompt": "", "chosen": "aa" if i % 4 else "a", "rejected": "aa"[i % 4 > 0:]} for i in range(20)]
    assert opinions_on_feedback({"x": Length()}, pairs)["x"]["accuracy"].startswith("0.750 [")
    once = [{"prompt": str(i), "chosen": "aa" if i % 4 else "a", "rejected": "aa"[i % 4 > 0:]} for i in range(80)]
    alone, nine = ([float(x) for x in re.findall(r"[.\d]+", opinions_on_feedback({"x": Length()}, r)["x"]["accuracy"])]
                   for r in (once, once * 9))  # a prompt's pairs are resampled together
    assert nine == pytest.approx(alone, abs=.03)
    assert alone[2] - alone[0] > .06
    ratings = [{"prompt": "", "response": "a" * i, "score": i} for i in range(1, 20)]
    assert opinions_on_feedback({"x": Length()}, ratings)["x"]["correlation"] == "1.000 [1.000, 1.000]"
