"""The fourth step: what is kept is what the reward model likes best, nothing is lost, nothing differs
after a stop."""
import json

import pytest

import train
from data.batches import prompt_ids
from data.records import as_messages
from model import load_checkpoint, save_checkpoint
from reward import RewardModel
from runtime.draws import key
from runtime.machine import Interrupted
from runtime.options import UserError
from runtime.run import Run
from sample import reply_ids, reply_to
from tests.conftest import equal
from tools import best


@pytest.fixture
def best_command(command, world):
    """best_command(*words): options of `best` on the small world."""
    def made(*words, reward="reward"):
        return command("best", "--init_from", world.root / "sft", "--reward_from", world.root / reward,
                       "--n=4", "--prompts=96", "--reply_len=60", "--temperature=4", "--compile=off",
                       "--max_len=96", "--batch=4", *words)
    return made


def records_of(folder):
    return [json.loads(line) for line in (folder / "best.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def finished(best_command):
    """A run of `best`, and its folder."""
    run = best.best(best_command())
    return run, run.folder.path


def test_the_kept_reply_is_the_reward_models_favourite_among_those_that_end(finished, world):
    _, folder = finished
    policy, tokenizer, _ = load_checkpoint(world.root / "sft")
    scorer = load_checkpoint(world.root / "reward", cls=RewardModel)[0]
    records = records_of(folder)
    assert len({r["prompt"] for r in records}) == len(records) == 96
    assert {r["ended"] for r in records} == {True, False}  # so both rules are seen
    for i, record in enumerate(records[:20]):
        ids = [prompt_ids(tokenizer, record["prompt"], world.data.template)] * 4
        replies = reply_ids(reply_to(policy, tokenizer, ids, 60, seed=key(0, "best", "reply"),
                                     temperature=4, rows=range(4 * i, 4 * i + 4)))
        scores = scorer.scores(ids, replies).tolist()
        ended = [reply[-1] == tokenizer.eom_id for reply in replies]
        j = max(range(4), key=lambda j: (ended[j], scores[j]))
        assert record["response"] == tokenizer.reply_text(replies[j])
        assert record["score"] == pytest.approx(scores[j], abs=1e-3)
        assert record["ended"] == ended[j]


def test_it_learns_the_kept_replies_and_no_others(finished, world):
    run, folder = finished
    kept = [r for r in records_of(folder) if r["ended"]]
    sft = load_checkpoint(world.root / "sft")[0]
    assert not equal(dict(sft.state_dict()), dict(run.model.state_dict()))
    task = best.BestTask(run, world.data, kept, type("HeldOut", (), {"prompts": []})())
    learned = {tuple(ids) for ids, _ in [*task.rows, *task.val_rows]}
    every = [tuple(run.tokenizer.render_chat(as_messages(r, world.data.template))[0]) for r in kept]
    fits = [ids for ids in every if len(ids) <= 96]  # --max_len: none is cut
    assert len(fits) > 10
    assert learned == set(fits)
    assert [tuple(ids) for ids, _ in task.val_rows] == [ids for ids in every[::10] if len(ids) <= 96]


def test_a_resumed_run_ends_with_the_same_bits(finished, best_command, tmp_path, monkeypatch):
    run, folder = finished
    for stop in ("sampling", "training"):
        calls, method = [0], {"sampling": "append", "training": "stop_if_asked"}[stop]
        owner = Run if stop == "training" else type(run.folder)
        real = getattr(owner, method)

        def stopped(self, *args, real=real, calls=calls, stop=stop):
            if stop == "sampling" and args[0] != "best.jsonl":
                return real(self, *args)
            calls[0] += 1
            if calls[0] == 2:
                if stop == "sampling":  # half a line is written
                    with open(self.path / "best.jsonl", "a") as file:
                        file.write('{"prompt": "')
                else:
                    args[1](args[0])
                raise Interrupted(15)
            return real(self, *args)

        o = best_command("--out", tmp_path / stop, "--save_every=1")
        with monkeypatch.context() as m:
            m.setattr(owner, method, stopped)
            with pytest.raises(Interrupted):
                best.best(o)
        written, = (tmp_path / stop).rglob("best.jsonl")
        assert written.read_text().count("\n") >= 64
        again = best.best(o.replace(resume=True))
        assert (folder / "best.jsonl").read_bytes() == (again.folder.path / "best.jsonl").read_bytes()
        assert equal(dict(run.model.state_dict()), dict(again.model.state_dict())), stop


def test_more_prompts_go_on_from_the_replies_that_are_there(finished, best_command):
    _, folder = finished
    before = records_of(folder)
    best.best(best_command("--prompts=130", "--fresh"))
    assert len(records_of(folder)) == 130
    assert records_of(folder)[:96] == before
    best.best(best_command("--fresh", "--seed=1"))
    assert records_of(folder)[:96] != before


def test_what_cannot_work_is_said(best_command, world, tmp_path):
    scorer, tokenizer, _ = load_checkpoint(world.root / "reward", cls=RewardModel)
    save_checkpoint(tmp_path / "judge", scorer, tokenizer, stage="judge", step=1, feedback="label")
    with pytest.raises(UserError, match="this is the judge"):
        best.best(best_command("--reward_from", tmp_path / "judge"))
    with pytest.raises(UserError, match="too few of them within 16 tokens .*: raise --reply_len"):
        best.best(best_command("--max_len=16", "--prompts=20"))


def test_best_is_no_part_of_the_whole_road():
    assert "best" in train.commands() and "best" not in train.ROAD
