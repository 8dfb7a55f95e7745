"""`python -m data.prepare export`: other tools' forms hold what our records say, read back by our own
loader and, where it is installed, by TRL itself."""
import json
import re

import pytest

from data.dataset import DataWriter
from data.export import export
from data.own import find_files
from data.prepare import main, open_data, prepare
from data.prepared import Prepared
from data.records import as_messages, load_records
from runtime.options import UserError

TEMPLATE = "写：{prompt}"
ODD = ["plain", "北京的天气", "<eom> and <|Human|>: forged", "  two spaces first", "line\u2028separator\u2029\x85",
       "\n\nHuman: hi\n\nAssistant:", "{prompt}", "", "a\tb\r\n\"c\"", "👩‍👩‍👧 é", "\ufeffmark"]
SYSTEM = [{"role": "system", "content": "Be brief."}]
TALK = [{"role": "user", "content": "你好"}, {"role": "assistant", "content": " 好"}]
PROMPTS = [*ODD, SYSTEM + TALK[:1], [*SYSTEM, *TALK, {"role": "user", "content": "and then?"}]]
REPLIES = dict(zip(map(str, PROMPTS), [*ODD[1:], *ODD], strict=False))
DIALOGUES = [{"prompt": p, "response": REPLIES[str(p)]} for p in PROMPTS] + [{"messages": SYSTEM + TALK}]
FEEDBACK = {
    "labels": [r | {"label": i % 2} for i, r in enumerate(DIALOGUES[:-1])],
    "pairs": [{"prompt": r["prompt"], "chosen": r["response"], "rejected": r["response"] + "!"}
              for r in DIALOGUES[:-1]],
    "margins": [{"prompt": p, "chosen": "a", "rejected": "b"} | ({"margin": 2} if i % 2 else {})
                for i, p in enumerate(PROMPTS)],
    "parts": [{"prompt": "q", "chosen": "a", "rejected": "b", "part": "relevance"},
              {"prompt": "q", "chosen": "a", "rejected": " a"}],
    "labels of parts": [{"prompt": "q", "response": "a", "label": 1, "part": "<eom>"}]}
STAGES = {"sft": DIALOGUES, "ppo": [{"prompt": p} for p in PROMPTS]}
TOOLS = ("trl", "kto", "llama-factory")


def prepared(folder, template=TEMPLATE, **stages):
    """A prepared data set with these records in each split, as other data sets are."""
    folder.mkdir()
    out = DataWriter(folder, None)
    for stage, records in stages.items():
        for split in ("train",) if stage == "judge" else ("train", "val", "test"):
            out.records(stage, split, records)
    return Prepared(folder, {"data": "some/mine.v2.jsonl", "template": template}, None)


def in_messages(record, stage):
    """A record with its prompt as messages."""
    if stage == "sft":
        return {"messages": as_messages(record, TEMPLATE)}
    return record | {"prompt": as_messages({"response": "", **record}, TEMPLATE)[:-1]}


def unpaired(records):
    """Pairs as labels."""
    return [{"prompt": r["prompt"], "response": r[name], "label": label}
            | ({"part": r["part"]} if "part" in r else {})
            for r in records for name, label in (("chosen", 1), ("rejected", 0))]


def without_margins(records):
    return [{name: x for name, x in r.items() if name != "margin"} for r in records]


def lines(path):
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]


@pytest.mark.parametrize("to", TOOLS)
@pytest.mark.parametrize("kind", FEEDBACK)
def test_our_own_loader_reads_back_what_was_exported(tmp_path, to, kind):
    feedback = FEEDBACK[kind]
    stages = STAGES | {"reward": feedback, "judge": feedback}
    export(prepared(tmp_path / "in", **stages), to, tmp_path / "out")
    files = find_files(tmp_path / "out")
    assert {(stage, split) for stage, split in files} == {
        *((stage, split) for stage in ("sft", "ppo", "reward") for split in ("train", "val", "test")),
        ("judge", "train")}
    for (stage, _), path in files.items():
        of_stage = stages[stage]
        if stage in ("reward", "judge"):
            of_stage = unpaired(of_stage) if to == "kto" and "chosen" in of_stage[0] else of_stage
            of_stage = without_margins(of_stage) if to != "trl" else [
                r | {"margin": r.get("margin", 0)} if kind == "margins" else r for r in of_stage]
        read = load_records(path, "reward" if stage == "judge" else stage)
        assert read == [in_messages(record, stage) for record in of_stage]


@pytest.mark.parametrize("kind", FEEDBACK)
def test_for_trl_there_are_plain_texts_too_and_what_has_several_turns_is_counted(tmp_path, capsys, kind):
    """A prompt that is a text stands in its template; one of messages must be a single question."""
    asked = [{"role": "user", "content": "who?"}]
    more = {"sft": [{"messages": [*asked, {"role": "assistant", "content": "me"}]}], "ppo": [{"prompt": asked}]}
    stages = {stage: [*records, *more[stage]] for stage, records in STAGES.items()} | {"reward": FEEDBACK[kind]}
    export(prepared(tmp_path / "in", **stages), "trl-standard", tmp_path / "out")

    def plain(record, stage):
        messages = in_messages(record, stage)["messages" if stage == "sft" else "prompt"]
        if len(messages) > 1 + (stage == "sft"):
            return None
        text = {"prompt": messages[0]["content"]}
        if stage == "sft":
            return text | {"completion": messages[1]["content"]}
        record = record | text
        if "label" in record:
            record = record | {"completion": record.pop("response"), "label": bool(record["label"])}
        return record

    lost = 0
    for stage, records in stages.items():
        expected = [plain(record, stage) for record in records]
        lost += 3 * expected.count(None)
        if kind == "margins" and stage == "reward":
            expected = [r and r | {"margin": r.get("margin", 0)} for r in expected]
        path = tmp_path / "out" / f"{stage}.jsonl"
        assert lines(path) == [r for r in expected if r]
        assert len(load_records(path, stage)) == len(lines(path))
    assert lost >= 15  # three of the dialogues and two of the prompts, in each split
    assert f"{lost} records of several turns, or with a system message, are left out" in capsys.readouterr().out


@pytest.mark.parametrize("to,fields", [
    ("trl", {"sft": {"messages"}, "ppo": {"prompt"}, "reward": {"prompt", "chosen", "rejected"}}),
    ("trl-standard", {"sft": {"prompt", "completion"}, "ppo": {"prompt"}, "reward": {"prompt", "chosen", "rejected"}}),
    ("kto", {"sft": {"messages"}, "ppo": {"prompt"}, "reward": {"prompt", "completion", "label"}}),
    ("llama-factory", {"sft": {"conversations"}, "ppo": {"conversations"},
                       "reward": {"conversations", "chosen", "rejected"}})])
def test_the_fields_are_those_of_the_tool(tmp_path, to, fields):
    export(prepared(tmp_path / "in", **STAGES, reward=FEEDBACK["pairs"]), to, tmp_path / "out")
    for stage, names in fields.items():
        assert {frozenset(r) for r in lines(tmp_path / "out" / f"{stage}.jsonl")} == {frozenset(names)}


def test_labels_are_true_or_false_for_tools_that_test_their_type(tmp_path):
    for to, name in (("trl", "label"), ("trl-standard", "label"), ("kto", "label"), ("llama-factory", "kto_tag")):
        export(prepared(tmp_path / f"in-{to}", reward=FEEDBACK["labels"]), to, tmp_path / to)
        assert {type(r[name]) for r in lines(tmp_path / to / "reward.jsonl")} == {bool}


def test_margins_are_in_each_pair_or_in_none_as_trl_needs_them(tmp_path):
    export(prepared(tmp_path / "in", reward=FEEDBACK["margins"]), "trl", tmp_path / "out")
    assert {type(r["margin"]) for r in lines(tmp_path / "out" / "reward.jsonl")} == {float}


def test_what_has_no_counterpart_is_left_out_and_counted(tmp_path, capsys):
    ties = [*FEEDBACK["pairs"], *[FEEDBACK["pairs"][0] | {"tie": True}] * 2]
    for to in TOOLS:
        export(prepared(tmp_path / f"ties-{to}", reward=ties), to, tmp_path / f"t-{to}")
        assert "6 ties are left out" in capsys.readouterr().out
        n = len(FEEDBACK["pairs"]) * (2 if to == "kto" else 1)
        assert len(lines(tmp_path / f"t-{to}" / "reward.jsonl")) == n
        scores = prepared(tmp_path / f"scores-{to}", sft=DIALOGUES,
                          reward=[{"prompt": "q", "response": "a", "score": 2}] * 5)
        export(scores, to, tmp_path / f"s-{to}")
        assert "15 ratings are left out" in capsys.readouterr().out
        assert not (tmp_path / f"s-{to}" / "reward.jsonl").exists()
    export(prepared(tmp_path / "margins", reward=FEEDBACK["margins"]), "kto", tmp_path / "m")
    assert "18 margins are left out" in capsys.readouterr().out


def test_ratings_alone_give_nothing_and_that_is_an_error(tmp_path):
    data = prepared(tmp_path / "in", reward=[{"prompt": "q", "response": "a", "score": 2}])
    with pytest.raises(UserError, match="holds no record that trl has a form for"):
        export(data, "trl", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["ppo_test.jsonl", "dataset_info.json"])
def test_nothing_is_overwritten(tmp_path, name):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("mine")
    with pytest.raises(UserError, match=f"{name} is there already"):
        export(prepared(tmp_path / "in", **STAGES), "llama-factory", tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").iterdir()] == [name]
    assert (tmp_path / "out" / name).read_text() == "mine"


def test_llama_factory_finds_each_file_with_its_columns(tmp_path):
    for kind, more in (("pairs", {"chosen", "rejected"}), ("labels", {"kto_tag"})):
        out = tmp_path / kind
        export(prepared(tmp_path / f"in-{kind}", **STAGES, reward=FEEDBACK[kind]), "llama-factory", out)
        info = json.loads((out / "dataset_info.json").read_text(encoding="utf-8"))
        assert {x["file_name"] for x in info.values()} == {p.name for p in out.glob("*.jsonl")}
        for entry in info.values():
            assert set(entry["columns"].values()) == set(lines(out / entry["file_name"])[0])
        assert set(info["mine_reward"]["columns"]) == {"messages"} | more
        assert info["mine_reward"].get("ranking", False) == (kind == "pairs")
        # Its converter skips dialogues whose length is odd; before a pair, those whose length is even.
        for name, entry in info.items():
            for record in lines(out / entry["file_name"]):
                turns = [m["from"] for m in record["conversations"] if m["from"] != "system"]
                assert turns == (["human", "gpt"] * len(turns))[:len(turns)]
                assert len(turns) % 2 == entry.get("ranking", False), name


# ---- the command ---------------------------------------------------------------------------------

@pytest.fixture
def labels(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text("".join(json.dumps({"question": f"q{i}", "response": "a" * (1 + i % 5), "label": i % 2}) + "\n"
                            for i in range(60)))
    return path


def test_a_file_and_its_prepared_folder_are_exported_alike(labels, tmp_path, monkeypatch):
    monkeypatch.setattr("data.prepare.CACHE", tmp_path / "cache")
    main(["export", str(labels), "--fields=prompt=question", "--to=trl", "--out", str(tmp_path / "a")])
    folder = prepare(str(labels), fields="prompt=question", cache=tmp_path / "cache")
    main(["export", str(folder), "--to=trl", "--out", str(tmp_path / "b")])
    assert (tmp_path / "a" / "reward_val.jsonl").exists()
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_a_data_set_is_exported_by_its_name(reviews_source, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("data.prepare.CACHE", tmp_path / "cache")
    words = ["--source", str(reviews_source), "--vocab_size=400"]
    main(["export", "reviews", *words, "--to=kto", "--out", str(tmp_path / "a")])
    data = open_data("reviews", source=str(reviews_source), vocab_size=400, cache=tmp_path / "cache")
    assert load_records(tmp_path / "a" / "judge.jsonl", "reward") == [
        {"prompt": [{"role": "user", "content": data.template.replace("{prompt}", r["prompt"])}],
         "response": r["response"], "label": r["label"]} for r in data.records("judge", "train")]
    assert "texts to pretrain on are not written" in capsys.readouterr().out


@pytest.mark.parametrize("words,message", [
    ([], "usage: python -m data.prepare export"), (["d.jsonl", "--to=trl"], "usage"),
    (["--out=x"], "usage"), (["d.jsonl", "--to=axolotl", "--out=x"], "is not one of"),
    (["none", "--to=trl", "--out=x"], "unknown data set"),
    (["FOLDER", "--to=trl", "--out=x", "--fields=prompt=q"], "--fields has no effect on a prepared folder"),
    (["FOLDER", "--to=trl", "--out=d.jsonl"], "is a file, and a folder is needed")])
def test_what_cannot_be_exported_is_said(labels, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    folder = str(prepare(str(labels), fields="prompt=question", cache=tmp_path / "cache"))
    with pytest.raises(UserError, match=re.escape(message)):
        main(["export", *(folder if word == "FOLDER" else word for word in words)])


# ---- read by TRL -----------------------------------------------------------------------------------

def test_trl_reads_what_is_exported_for_it(tmp_path):
    """TRL's own functions take the files for what they are, and unpair pairs as we do."""
    datasets = pytest.importorskip("datasets", reason="reading by TRL needs `pip install trl`")
    trl = pytest.importorskip("trl.data_utils", reason="reading by TRL needs `pip install trl`")
    for kind, to in (("pairs", "trl"), ("margins", "trl"), ("labels", "trl"), ("pairs", "kto"),
                     ("pairs", "trl-standard"), ("labels", "trl-standard")):
        out = tmp_path / f"{kind}-{to}"
        export(prepared(tmp_path / f"in-{kind}-{to}", **STAGES, reward=FEEDBACK[kind]), to, out)
        for path in out.iterdir():
            read = datasets.load_dataset("json", data_files=str(path), split="train", cache_dir=str(tmp_path / "hub"))
            assert read.to_list() == lines(path)
            for record in read:
                assert trl.is_conversational(record) == (to != "trl-standard")
                assert trl.maybe_extract_prompt(record) == record  # the prompt is told already
    by_trl = trl.unpair_preference_dataset(datasets.Dataset.from_list(lines(tmp_path / "pairs-trl" / "reward.jsonl")))
    by_us = lines(tmp_path / "pairs-kto" / "reward.jsonl")
    assert sorted(map(str, by_trl.to_list())) == sorted(map(str, by_us))


@pytest.mark.parametrize("to", ["trl", "trl-standard"])
def test_trls_reward_trainer_trains_on_pairs_with_margins(tmp_path, monkeypatch, to):
    pytest.importorskip("trl", reason="training by TRL needs `pip install trl`")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import datasets
    import tokenizers
    import transformers
    import trl

    export(prepared(tmp_path / "in", reward=FEEDBACK["margins"]), to, tmp_path / "out")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    words = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate(["<end>", *alphabet])}, []))
    words.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", pad_token="<end>")
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}<end>{% endfor %}"
    model = transformers.LlamaForSequenceClassification(transformers.LlamaConfig(
        vocab_size=257, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_labels=1, pad_token_id=0))
    read = datasets.load_dataset("json", data_files=str(tmp_path / "out" / "reward.jsonl"), split="train",
                                 cache_dir=str(tmp_path / "hub"))
    trainer = trl.RewardTrainer(model, train_dataset=read, processing_class=tokenizer, args=trl.RewardConfig(
        output_dir=str(tmp_path / "run"), max_steps=1, report_to=[], use_cpu=True, save_strategy="no", bf16=False))
    several_turns = 2 * (to == "trl-standard")  # which a plain text does not hold
    assert len(trainer.train_dataset) == len(PROMPTS) - several_turns
    assert trainer.train().training_loss > .8  # margins of 2 in half of the pairs; without any it is log 2
