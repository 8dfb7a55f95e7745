"""The trials compare what they should: a difference of one bit is found, the clock's are not."""
import json
import shutil

import pytest
import torch

from runtime.options import UserError
from runtime.storage import load_whole, save_whole
from tools.trials import STAGES, differences, main, same, write_texts


@pytest.fixture
def runs(tmp_path):
    """Two folders of equal runs, as far as the trials look at them."""
    for stage in STAGES:
        folder = tmp_path / "a" / stage
        save_whole(folder / "checkpoint.pt", {
            "model": {"w": torch.arange(4.0)},
            "state": {"seconds": 1.0, "step": 2, "options": {"lr": 0.1, "out": "a"}}})
        (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 2.5, "seconds": 3}\n')
        (folder / "samples.jsonl").write_text('{"step": 1, "text": "x"}\n')
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    return tmp_path / "a", tmp_path / "b"


def test_equal_runs_have_no_differences_whatever_the_clock_says(runs):
    payload = load_whole(runs[1] / "sft" / "checkpoint.pt")
    payload["state"] |= {"seconds": 9.0, "options": {"lr": 0.1, "out": "b"}}
    save_whole(runs[1] / "sft" / "checkpoint.pt", payload)
    (runs[1] / "sft" / "metrics.jsonl").write_text('{"step": 1, "loss": 2.5, "seconds": 4}\n')
    assert differences(*runs) == []


def test_one_bit_of_a_weight_is_a_difference(runs):
    payload = load_whole(runs[1] / "sft" / "checkpoint.pt")
    payload["model"]["w"].view(torch.int32)[2] ^= 1
    save_whole(runs[1] / "sft" / "checkpoint.pt", payload)
    assert differences(*runs) == ["sft/weights"]


@pytest.mark.parametrize("name,text", [("metrics.jsonl", '{"step": 1, "loss": 2.6}\n'),
                                       ("samples.jsonl", ""), ("samples.jsonl", '{"step": 1}\n')])
def test_another_or_a_missing_line_is_a_difference(runs, name, text):
    (runs[1] / "ppo" / name).write_text(text)
    assert differences(*runs) == [f"ppo/{name}"]


def test_zero_and_none_are_not_the_same_nor_are_types():
    assert same([1, {"a": torch.ones(2)}], [1, {"a": torch.ones(2)}])
    for a, b in ((0, None), (1, 1.0), (torch.ones(2), torch.ones(2).double()), ([1], [1, 2])):
        assert not same(a, b)


def test_the_made_up_texts_are_records_of_all_four_kinds(tmp_path):
    write_texts(tmp_path / "texts")
    assert {path.stem for path in (tmp_path / "texts").iterdir()} == {"pretrain", "sft", "reward", "ppo"}
    for path in (tmp_path / "texts").iterdir():
        assert all(json.loads(line) for line in path.read_text().splitlines())


@pytest.mark.parametrize("words", [[], ["revive"], ["kill", "--runs=0"]])
def test_an_unknown_trial_is_refused(words):
    with pytest.raises(UserError):
        main(words)
