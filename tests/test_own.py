"""What users bring is divided so that nothing held out stands in training, in whatever stage or
form."""
import io
import json
import zipfile

import pytest

from data.own import own_data_set
from data.prepare import open_data
from runtime.options import UserError

FORMS = {  # one dialogue as a record of each stage
    "sft": lambda q, a: {"messages": [{"role": "user", "content": q},
                                      {"role": "assistant", "content": a}]},
    "reward": lambda q, a: {"chosen": f"\n\nHuman: {q}\n\nAssistant: {a}",
                            "rejected": f"\n\nHuman: {q}\n\nAssistant: no"},
    "ppo": lambda q, a: {"prompt": q},
    "pretrain": lambda q, a: {"text": f"Question: {q} Answer: {a}"}}
SPLITS = ("train", "val", "test")


def write(folder, **files):
    folder.mkdir(exist_ok=True)
    for name, records in files.items():
        text = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return folder


def zip_of(text):
    """The bytes of a .zip archive."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("sft.jsonl", text)
    return file.getvalue()


@pytest.fixture
def opened(tmp_path):
    """opened(name=records, …): a folder of these files, prepared."""
    def prepared(**files):
        return open_data(str(write(tmp_path / "d", **files)), cache=tmp_path / "c", vocab_size=300)
    return prepared


def question(record):
    prompt = record.get("messages", record.get("prompt"))
    return prompt if isinstance(prompt, str) else prompt[0]["content"]


def questions(data, stage, split):
    return {question(record) for record in data.records(stage, split)}


def texts(data, split):
    documents = data.documents(split)
    return [data.tokenizer.decode(documents.tokens[a + 1:b])
            for a, b in zip(documents.starts, documents.starts[1:], strict=False)]


def test_one_question_is_in_one_split_of_all_stages(opened):
    data = opened(**{stage: [form(f"Question {i}?", f"answer {i} to it") for i in range(60)]
                     for stage, form in FORMS.items() if stage != "pretrain"})
    for split in SPLITS:
        asked = [questions(data, stage, split) for stage in ("sft", "reward", "ppo")]
        assert asked[0] == asked[1] == asked[2]
        assert len(asked[0]) == (54 if split == "train" else 3)


@pytest.mark.parametrize("form", [FORMS["sft"], lambda q, a: {"prompt": q, "response": a}])
def test_replies_to_held_out_prompts_leave_pretraining_counted_and_said(opened, capsys, form):
    pairs = [(f"Question {i}?", f"This is answer {i}.") for i in range(60)]
    data = opened(sft=[form(*pair) for pair in pairs],
                  pretrain=[FORMS["pretrain"](*pair) for pair in pairs] * 2)
    held_out = questions(data, "sft", "val") | questions(data, "sft", "test")
    read = texts(data, "train")
    assert len(held_out) == 6
    assert [text for text in read if any(q in text for q in held_out)] == []
    assert data.meta["counts"]["pretrain_left_out"] > 0
    assert f"{data.meta['counts']['pretrain_left_out']} of 120 records are left out of training" \
        in capsys.readouterr().out


def test_records_with_ids_are_divided_by_their_text(opened):
    data = opened(pretrain=[{"text": f"Text number {i % 60} is here.", "id": i} for i in range(240)])
    assert set(texts(data, "train")).isdisjoint(texts(data, "val") + texts(data, "test"))
    assert len(texts(data, "test")) == 3  # repeats are held out once


@pytest.mark.parametrize("split", ["val", "test"])
def test_a_file_of_held_out_prompts_empties_the_training_of_every_stage(opened, capsys, split):
    kept_out = [FORMS["ppo"](f"Question {i}?", "") for i in range(10)]
    data = opened(**{f"ppo_{split}": kept_out,
                     **{stage: [FORMS[stage](f"Question {i}?", f"answer {i}") for i in range(60)]
                        for stage in ("sft", "reward", "ppo")}})
    asked = {f"Question {i}?" for i in range(10)}
    for stage in ("sft", "reward", "ppo"):
        assert questions(data, stage, "train").isdisjoint(asked)
        assert questions(data, stage, split) == asked  # the others' are drawn from the same
    assert "ppo.jsonl: 10 of 60 records are left out" in capsys.readouterr().out


def test_talks_cut_after_several_turns_are_on_one_side(opened):
    def talk(i, n, end):
        return "".join(f"\n\nHuman: Question {i}, part {t}\n\nAssistant: yes" for t in range(n)) + \
            f"\n\nHuman: Question {i}, part {n}\n\nAssistant: {end}"

    data = opened(reward=[{"chosen": talk(i, n, "good"), "rejected": talk(i, n, "bad")}
                          for i in range(60) for n in range(3)])
    assert questions(data, "reward", "train").isdisjoint(questions(data, "reward", "test"))
    assert len(data.records("reward", "test")) == 9


def test_repeated_held_out_prompts_are_one(opened):
    data = opened(sft=[FORMS["sft"](f"Question {i}?", f"answer {k}") for i in range(60)
                       for k in range(4)])
    assert len(data.records("sft", "test")) == 12
    assert len(data.records("ppo", "test")) == 3
    assert len(data.records("ppo", "train")) == 4 * 54


@pytest.mark.parametrize("start", range(0, 100, 20))
@pytest.mark.parametrize("feedback", ["label", "score", "chosen"])
def test_twenty_records_suffice_for_every_split(opened, start, feedback):
    """Of labels and scores, validation and test have different ones: else nothing is measured."""
    given = {"label": lambda i: {"response": "a", "label": i % 2},
             "score": lambda i: {"response": "a", "score": i % 5},
             "chosen": lambda i: {"chosen": "a", "rejected": "b"}}[feedback]
    data = opened(reward=[{"prompt": f"Question {start + i}", **given(i)} for i in range(20)],
                  ppo=[{"prompt": f"Prompt {start + i}"} for i in range(20)],
                  sft=[FORMS["sft"](f"Talk {start + i}", "a") for i in range(20)])
    for split in SPLITS:
        for stage in ("sft", "reward", "ppo"):
            assert data.records(stage, split)
        if feedback != "chosen":
            assert len({r[feedback] for r in data.records("reward", split)}) > 1
    assert len(data.records("reward", "train")) >= 16


def test_a_system_message_and_later_turns_are_no_part_of_the_key(opened):
    data = opened(ppo=[{"prompt": [{"role": "system", "content": "Be kind."},
                                   {"role": "user", "content": f"Review {i}"},
                                   {"role": "assistant", "content": "ok"},
                                   {"role": "user", "content": "more"}]} for i in range(20)])
    assert [len(data.records("ppo", split)) for split in SPLITS] == [18, 1, 1]


def test_other_feedback_in_a_held_out_file_is_refused_before_anything_is_made(tmp_path):
    pair = {"prompt": "x", "chosen": "a", "rejected": "b"}
    label = {"prompt": "x", "response": "a", "label": 1}
    score = {"prompt": "x", "response": "a", "score": .5}
    for train, held_out in ((pair, label), (label, pair), (label, score), (score, pair)):
        for split in ("val", "test"):
            folder = write(tmp_path / f"d{split}", reward=[train | {"prompt": str(i)} for i in range(60)],
                           **{f"reward_{split}": [held_out]})
            with pytest.raises(UserError, match=f"reward_{split}.jsonl has .* same kind of feedback"):
                open_data(str(folder), cache=tmp_path / "c")


@pytest.mark.parametrize("files,message", [
    ({"sft": [{"prompt": "q", "response": "a"}], "sft_val": [{"prompt": "Q ", "response": "b"}],
      "sft_test": [{"prompt": "p", "response": "b"}]}, "sft.jsonl: nothing is left to train on"),
    ({"sft": [{"prompt": "q", "response": str(i)} for i in range(60)]},
     "sft.jsonl: too few .* first user messages.* bring at least 20"),
    ({"ppo": [{"prompt": str(i)} for i in range(20)],
      "sft_val": [{"prompt": "q", "response": "a"}]}, "sft_val.jsonl: there is no sft.jsonl")])
def test_what_cannot_be_divided_is_refused(opened, files, message):
    with pytest.raises(UserError, match=message):
        opened(**files)


def test_ppo_takes_the_prompts_of_dialogues_where_it_has_no_file(opened):
    data = opened(sft=[FORMS["sft"](f"Question {i}?", "a") for i in range(60)],
                  ppo_val=[FORMS["ppo"]("Question 5?", "")])
    assert questions(data, "ppo", "val") == {"Question 5?"}
    assert "Question 5?" not in questions(data, "ppo", "train") | questions(data, "sft", "train")
    assert questions(data, "ppo", "test") == questions(data, "sft", "test")


def test_a_single_file_has_the_stage_of_its_first_record(tmp_path):
    path = write(tmp_path, mine=[{"prompt": str(i)} for i in range(20)]) / "mine.jsonl"
    assert own_data_set(path).options == ("skip_bad", "fields", "template")
    assert len(open_data(str(path), cache=tmp_path / "c").records("ppo", "train")) == 18


@pytest.mark.parametrize("name,said", [("sft_valid", True), ("rewards", True), ("sft_val", False)])
def test_a_file_whose_name_says_nothing_is_said_once(tmp_path, capsys, name, said):
    records = [{"prompt": str(i), "response": "a"} for i in range(20)]
    folder = write(tmp_path / "d", sft=records, **{name: records[:2]})
    for _ in range(2):
        open_data(str(folder), cache=tmp_path / "c")
    assert capsys.readouterr().err.count(f"not read: {name}.jsonl") == said


@pytest.mark.parametrize("name", ["sft.jsonl", "sft_val.jsonl"])
@pytest.mark.parametrize("content,message", [(None, "a link to nothing"), (zip_of("x"), "a .zip archive")])
def test_a_file_that_cannot_be_read_is_never_as_if_it_were_not_there(tmp_path, name, content, message):
    folder = write(tmp_path / "d", sft=[{"prompt": str(i), "response": "a"} for i in range(20)])
    (folder / name).unlink(missing_ok=True)
    (folder / name).write_bytes(content) if content else (folder / name).symlink_to(tmp_path / "gone")
    with pytest.raises(UserError, match=f"{name}: {message}"):
        open_data(str(folder), cache=tmp_path / "c")


@pytest.mark.parametrize("name", ["x" * 240, "书" * 80])
def test_long_names_are_cut_in_the_cache(tmp_path, name):
    folder = write(tmp_path / name, sft=[{"prompt": str(i), "response": "a"} for i in range(20)])
    assert open_data(str(folder), cache=tmp_path / "c").has("sft")
