"""One kind of record serves the other stages: pairs, labels or ratings alone walk the whole road."""
import pytest

from data.own import own_data_set
from data.prepare import open_data, recounted, suited
from data.road import MANY, lengths, mixture, preferred, proposals, quantile
from data.tokenizer import train_bpe
from ppo import PPOOptions
from runtime.options import UserError, parse
from tests.test_own import SPLITS, questions, texts, write
from train import PretrainOptions, SFTOptions

PAIRS = [{"prompt": f"Question {i}?", "chosen": f"good answer {i}", "rejected": f"bad {i}"} for i in range(200)]
LABELS = [{"prompt": f"Question {i}?", "response": f"answer {i}", "label": i % 2} for i in range(200)]
RATINGS = [{"prompt": f"Question {i}?", "response": f"answer {i}", "score": i % 5} for i in range(200)]


@pytest.fixture
def opened(tmp_path):
    """opened(records, …): a file of these records, prepared."""
    def prepared(records, vocab_size=300, **settings):
        path = write(tmp_path / "d", mine=records) / "mine.jsonl"
        return open_data(str(path), cache=tmp_path / "c", vocab_size=vocab_size, **settings)
    return prepared


def replies(data, stage, split="train"):
    return {r["response"] for r in data.records(stage, split)}


@pytest.mark.parametrize("records,liked", [
    (PAIRS, lambda i: f"good answer {i}"), (LABELS, lambda i: f"answer {i}" if i % 2 else None),
    (RATINGS, lambda i: f"answer {i}" if i % 5 > 2 else None)], ids=["pairs", "labels", "ratings"])
def test_feedback_alone_serves_every_stage(opened, records, liked):
    data = opened(records)
    for split in SPLITS:
        asked = {q for stage in ("reward", "judge")[:1 + (split == "train")]
                 for q in questions(data, stage, split)}
        assert questions(data, "ppo", split) == asked
        wanted = {liked(i) for i in range(200) if f"Question {i}?" in asked} - {None}
        assert replies(data, "sft", split) == wanted
        read = {text.partition("<|MOSS|>: ")[2] for text in texts(data, split)}
        pairs = "chosen" in records[0]
        assert read == {f"{r['chosen' if pairs else 'response']}<eom>" for r in records if r["prompt"] in asked}
    assert data.meta["parts"].keys() == {"text", "dialogue"}


def test_dialogues_alone_are_pretrained_on_and_serve_ppo(opened):
    data = opened([{"messages": [{"role": "user", "content": f"Hello {i}"}, {"role": "assistant", "content": "yes"},
                                 {"role": "user", "content": "and"}, {"role": "assistant", "content": f"no {i}"}]}
                   for i in range(60)])
    assert len(texts(data, "train")) == 54
    assert [m["content"] for m in data.records("ppo", "val")[0]["prompt"]][1:] == ["yes", "and"]


def test_what_a_stage_has_of_its_own_stays(tmp_path):
    folder = write(tmp_path / "d", reward=PAIRS, sft=[{"prompt": f"Mine {i}", "response": "yes"} for i in range(60)],
                   ppo=[{"prompt": f"Prompt {i}"} for i in range(60)],
                   pretrain=[{"text": f"A text of number {i}."} for i in range(60)])
    data = open_data(str(folder), cache=tmp_path / "c", vocab_size=300)
    assert replies(data, "sft") == {"yes"}
    assert all(q.startswith("Prompt") for q in questions(data, "ppo", "train"))
    read = texts(data, "train")  # texts, own dialogues, and the preferred replies
    counts = [sum(mark in text for text in read) for mark in ("A text", "Mine", "good answer", "bad")]
    assert counts == [54, 54, 180, 0]


@pytest.mark.parametrize("n,share,judged", [(50, -1.0, 0), (200, -1.0, .2), (MANY + 300, -1.0, .5),
                                            (200, .4, .4), (200, 0.0, 0)])
def test_judges_have_a_share_of_the_feedback(opened, n, share, judged, capsys):
    data = opened([{**PAIRS[0], "prompt": f"Question {i % (n // 2)}?", "chosen": f"good {i}"} for i in range(n)],
                  judge_share=share)
    n_train = len(data.records("reward", "train"))
    n_judge = len(data.records("judge", "train")) if data.has("judge") else 0
    assert n_judge == pytest.approx(judged * (n_train + n_judge), abs=.25 * n_train)
    assert data.has("judge") == (judged > 0)
    if judged:  # all talks that begin alike are on one side
        assert questions(data, "reward", "train").isdisjoint(questions(data, "judge", "train"))
    assert ("judges: there are" in capsys.readouterr().out) == (n == 50)


def test_judges_may_have_a_file_of_their_own(tmp_path):
    other = [{**PAIRS[0], "prompt": f"Question {i}?", "chosen": "x"} for i in range(100, 300)]
    data = open_data(str(write(tmp_path / "d", reward=PAIRS, judge=other)), cache=tmp_path / "c", vocab_size=300)
    assert len(data.records("reward", "train")) == 180
    held_out = {q for split in SPLITS[1:] for q in questions(data, "reward", split)}
    assert questions(data, "judge", "train") == {r["prompt"] for r in other} - held_out
    folder = write(tmp_path / "e", reward=PAIRS, judge=LABELS)
    with pytest.raises(UserError, match="judge.jsonl has labels.*same kind"):
        open_data(str(folder), cache=tmp_path / "c", vocab_size=300)


def test_a_template_stands_around_prompts_that_are_texts(opened, tmp_path):
    data = opened(PAIRS, template="请回答：{prompt}")
    assert data.template == "请回答：{prompt}"
    assert all(text.startswith("<|Human|>: 请回答：Question") for text in texts(data, "train"))
    assert data.folder != opened(PAIRS).folder
    path = tmp_path / "d/mine.jsonl"
    for wrong in ("no place", "{prompt}{prompt}"):
        with pytest.raises(UserError, match="must have {prompt} once"):
            own_data_set(path, template=wrong)
    with pytest.raises(UserError, match="--template has no effect"):
        opened([{**pair, "prompt": [{"role": "user", "content": pair["prompt"]}]} for pair in PAIRS],
               template="Answer: {prompt}")


def test_a_reply_that_lost_to_another_is_not_preferred():
    """So the original of a reply that somebody chose and then edited is no example."""
    pairs = [{"prompt": "p", "chosen": a, "rejected": b} for a, b in (("good", "bad"), ("better", "good"))]
    others = [{"prompt": "q", "chosen": "good", "rejected": "bad"},  # to another prompt
              {"prompt": "p", "chosen": "better", "rejected": "best", "tie": True}]
    assert preferred([*pairs, *others], 0.0) == [{"prompt": "p", "response": "better"},
                                                 {"prompt": "q", "response": "good"}]
    assert len(preferred(pairs, None)) == 2
    turned = [pairs[0], {"prompt": "p", "chosen": "bad", "rejected": "good"}]
    assert [r["response"] for r in preferred(turned, 0.0)] == ["good", "bad"]  # else nothing would be left
    talks = [{"prompt": [{"role": "user", "content": "p"}], "chosen": "b", "rejected": "c"},
             {"prompt": [{"content": "p", "role": "user"}], "chosen": "a", "rejected": "b"}]
    assert [r["response"] for r in preferred(talks, 0.0)] == ["a"]


def test_preferred_replies_are_chosen_liked_or_above_the_mean():
    assert preferred([{"prompt": "a", "response": "x", "score": s} for s in (1, 2, 3)], 2) == [
        {"prompt": "a", "response": "x"}]
    assert [len(preferred(records, 2.0)) for records in (PAIRS * 2, LABELS, RATINGS)] == [200, 100, 80]
    assert [len(preferred(records, None)) for records in (PAIRS * 2, LABELS, RATINGS)] == [200, 200, 200]


@pytest.mark.parametrize("text,dialogue,share", [
    (0, 100_000, None), (100_000, 0, None), (100_000, 100_000, None), (90_000, 10_000, .2), (50_000, 20_000, .3),
    (999_000_000, 1_000_000, .3), (999_000_000, 10_000, .03)])
def test_dialogues_beside_much_text_get_a_share(text, dialogue, share):
    counts = {f"pretrain_train[{name}]": {"tokens": n} for name, n in (("text", text), ("dialogue", dialogue)) if n}
    found = mixture(counts)
    assert (found["dialogue"].share if found else None) == share


def test_lengths_are_those_of_what_the_stages_read():
    tokenizer = train_bpe(["abc"], 262)
    records = {("sft", "train"): [{"prompt": "ab", "response": "abc"}], ("ppo", "train"): [{"prompt": "ab"}],
               ("reward", "train"): [{"prompt": "a", "chosen": "abc", "rejected": "b"}]}
    row = tokenizer.render_chat([{"role": "user", "content": "ab"}, {"role": "assistant", "content": "abc"}])[0]
    assert lengths(records, tokenizer, "{prompt}") == {
        "dialogues": [len(row)], "replies": [4], "prompts": [len(row) - 4], "feedback": [len(row) - 1, len(row) - 3]}
    assert lengths(records, tokenizer, "xx{prompt}")["dialogues"] == [len(row) + 2]


@pytest.mark.parametrize("sizes,share,value", [(range(1, 101), .95, 95), (range(1, 101), .5, 50), ([7], .95, 7),
                                               ([1, 2, 3], .95, 3)])
def test_quantiles_are_lengths_that_occur(sizes, share, value):
    assert quantile(list(sizes), share) == value


def test_proposed_lengths_fit_nearly_all_and_are_bounded():
    sizes = {"dialogues": [*range(1, 200)], "replies": [40] * 99 + [1000], "feedback": [5000]}
    found = proposals(sizes, {"pretrain_train[dialogue]": {"tokens": 40_000}, "sft_train": 100, "reward_train": 9000})
    assert found["sft"]["max_len"] == 192 and found["reward"]["max_len"] == 512 and found["ppo"]["reply_len"] == 48
    assert found["pretrain"] == {"max_len": 512, "tokens": 120_000}
    assert found["sft"]["epochs"] == 4 and found["reward"]["epochs"] == 2


def test_reward_model_and_judge_have_room_for_a_reply_beside_nearly_every_prompt():
    sizes = {"dialogues": [30] * 99, "replies": [40] * 99, "feedback": [30] * 99, "prompts": [*range(1, 101)]}
    found = proposals(sizes, {"sft_train": 99, "reward_train": 99, "judge_train": 99})
    for stage in ("reward", "judge"):
        assert found[stage]["max_len"] >= quantile(sizes["prompts"], .95) + found["ppo"]["reply_len"]
    assert found["sft"]["max_len"] == 32  # its dialogues have replies already


def test_flags_and_presets_win_over_what_suits_the_data(opened, capsys):
    data = opened(PAIRS)
    meant = data.meta["defaults"]
    assert suited(parse(SFTOptions, [], "x"), "sft", data).max_len == meant["sft"]["max_len"] != 128
    assert f"max_len={meant['sft']['max_len']}" in capsys.readouterr().out
    assert suited(parse(SFTOptions, ["--max_len=77"], "x"), "sft", data).max_len == 77
    smoke = suited(parse(PretrainOptions, ["--preset=smoke"], "x"), "pretrain", data)
    assert (smoke.tokens, smoke.max_len) == (20_000, meant["pretrain"]["max_len"])  # else long rows would not fit
    assert suited(parse(PPOOptions, [], "x"), "ppo", data).reply_len == meant["ppo"]["reply_len"]




def test_lengths_are_counted_in_the_vocabulary_that_reads_them(opened, capsys):
    """A parent's, which --init_from names, may cut the texts finer than the data's own."""
    data = opened(PAIRS, vocab_size=500)
    o = suited(parse(SFTOptions, [], "x"), "sft", data)
    finer = train_bpe(["abc"], 262)
    records = {("sft", "train"): data.records("sft", "train")}
    longer = recounted(o, "sft", data, finer).max_len
    assert longer >= quantile(lengths(records, finer, "{prompt}")["dialogues"], .95) > o.max_len
    assert f"sft: max_len={longer} in the parent's vocabulary" in capsys.readouterr().out
    assert recounted(o, "sft", data, data.tokenizer) is o
    asked = suited(parse(SFTOptions, ["--max_len=77"], "x"), "sft", data)
    assert recounted(asked, "sft", data, finer).max_len == 77
    data = opened([{**pair, "chosen": pair["chosen"] * 4} for pair in PAIRS], vocab_size=500)
    ppo = suited(parse(PPOOptions, [], "x"), "ppo", data)
    assert recounted(ppo, "ppo", data, finer).reply_len > 4 * len("good answer 1") > ppo.reply_len
    for words in (["--reply_len=20"], ["--preset=smollm"]):
        assert recounted(asked := suited(parse(PPOOptions, words, "x"), "ppo", data), "ppo", data, finer) is asked
    of_set = parse(SFTOptions, ["--data=hh"], "x").replace(max_len=288)  # what two cores have time for
    assert recounted(of_set, "sft", data, finer) is of_set


def test_texts_too_short_for_opening_words_are_divided_one_by_one(tmp_path):
    short = [{"text": f"good{i}", "score": i % 5} for i in range(60)]
    data = open_data(str(write(tmp_path / "d", mine=short) / "mine.jsonl"), cache=tmp_path / "c", vocab_size=300)
    assert questions(data, "reward", "train") == {""}
    assert [len(data.records("reward", split)) for split in SPLITS] == [56, 2, 2]
