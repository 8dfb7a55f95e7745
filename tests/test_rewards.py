"""Rewards without a reward model: what --reward may say, what a function in Python is given and may
return, what is said of one that fails, and sums of parts."""
import json
import math
import os
import pathlib
import types

import numpy as np
import pytest
import torch

import train
from data.functions import PythonReward, RewardError, load_function
from data.health import stage_warnings
from data.prepare import suited
from data.records import records_in
from data.rewards import RewardSum, needs_model, part_scores, read_reward, resolved
from data.sets import DATA_SETS
from model import ModelConfig, load_checkpoint, weights_hash
from ppo import KLController, PPOOptions, PPOTrainer, train_ppo
from reward import RewardModel
from runtime.machine import Interrupted
from runtime.options import UserError, parse
from runtime.run import Run
from tests.conftest import equal
from tests.ppo_world import make_trainer


class Letters:
    """Stands in for a tokenizer: ids are characters, −1 is the end."""

    end_ids, decode = (-1,), staticmethod(lambda ids: "".join(map(chr, ids)))
    reply_text = staticmethod(lambda ids: "".join(chr(i) for i in ids if i >= 0))
    render_chat = staticmethod(lambda messages, reply: ([ord(c) for c in messages[0]["content"]], None))


def ids(text: str) -> list[int]:
    return [*map(ord, text), -1]


@pytest.fixture
def file(tmp_path):
    """file(text, name): a Python file, for --reward."""
    def written(text: str, name: str = "my.py") -> pathlib.Path:
        (tmp_path / name).write_text(text, encoding="utf-8")
        return tmp_path / name
    return written


def scorer_of(path: pathlib.Path, name: str = "f", **more) -> PythonReward:
    return PythonReward(load_function(path, name), Letters, path=path, **more)


# ---- what --reward says --------------------------------------------------------------------------

def test_parts_have_names_and_weights(file):
    path = file("def polite(prompts, replies): return [0] * len(replies)")
    parts = read_reward(f"model:2, length:-.01,{path}:polite:.5")
    assert [(p.name, p.weight, p.head) for p in parts] == [("model", 2, ""), ("length", -.01, None),
                                                           ("polite", .5, None)]
    assert read_reward(f"{path}:polite")[0].weight == 1
    assert [(p.name, p.head) for p in read_reward("model.relevance:1,model.accuracy:2")] == [
        ("relevance", "relevance"), ("accuracy", "accuracy")]
    assert read_reward("") == []


def test_a_colon_in_a_path_is_no_separator(tmp_path):
    folder = tmp_path / "C:"
    folder.mkdir()
    (folder / "my.py").write_text("def f(prompts, replies): return [1.0] * len(replies)")
    assert read_reward(f"{folder}/my.py:f:-3")[0].weight == -3


@pytest.mark.parametrize("text,said", [
    ("polite", "unknown part 'polite': use model, model.HEAD, length, or FILE.py:FUNCTION"),
    ("length:much", "'much' is no weight"), ("length:nan", "'nan' is no weight"), ("length:", "'' is no weight"),
    ("length:0", "has no effect with the weight 0"), ("length,length:2", "length stands twice"),
    ("model,model.style", "`model` already holds its heads"), ("length,", "unknown part ''"),
    ("nowhere.py:f", "nowhere.py: no such file"), ("a,b.py:f", "unknown part 'a'.*a file's path must hold none"),
])
def test_what_is_no_reward_is_told(text, said):
    with pytest.raises(UserError, match=said):
        read_reward(text)


@pytest.mark.parametrize("text,said", [
    ("x = 1\ndef f(prompts, replies)\n    return 1", "my.py, line 2: expected ':'"),
    ("x = 1\n1 / 0", "my.py, line 2: ZeroDivisionError: division by zero"),
    ("import sys\n\nsys.exit('no')", "my.py, line 3: SystemExit: no"),
    ("import no_such_module", "line 1: ModuleNotFoundError: No module named 'no_such_module'"),
    ("def g(prompts, replies): return []\nx = 3", "has no function 'f'; it has g"),
    ("f = 3", "has no function 'f'; it has none"),
    ("def f(replies): return []", "f.replies. must take .prompts, replies. or"),
    ("def f(a, b, c, d): return []", "f.a, b, c, d. must take"),
    ("def f(a, b, *, c): return []", "must take"),
    ("\0", "my.py"),
])
def test_a_file_without_such_a_function_is_told(file, text, said):
    with pytest.raises(UserError, match=said):
        read_reward(f"{file(text)}:f")


def test_the_folder_of_a_file_is_importable_and_stays_as_it_was(file):
    file("WORD = 'x'", "beside_my.py")
    path = file("from beside_my import WORD\ndef f(prompts, replies):\n    import beside_two\n"
                "    return [float(r.count(WORD)) + beside_two.ONE for r in replies]")
    file("ONE = 1", "beside_two.py")
    assert scorer_of(path).scores([ids("a")], [ids("xx")]).tolist() == [3.0]
    assert sorted(os.listdir(path.parent)) == ["beside_my.py", "beside_two.py", "my.py"]


def test_a_file_is_a_parent_by_its_content(file):
    path = file("def f(prompts, replies): return [0]")
    parts = read_reward(f"{path}:f,length")
    file("def f(prompts, replies): return [1]")
    after = read_reward(f"{path}:f,length")
    assert [part.path for part in parts] == [path, None]
    assert len({parts[0].digest, after[0].digest, ""}) == 3
    assert parts[1].digest == after[1].digest == ""


# ---- what a function is given, and may return ----------------------------------------------------

def test_a_function_reads_prompts_replies_and_records(file):
    path = file("SEEN = []\ndef f(prompts, replies, records):\n    SEEN.append((prompts, replies, records))\n"
                "    return [len(r['answer']) for r in records]")
    function = load_function(path, "f")
    messages = [{"role": "user", "content": "ab"}]
    records = {(97, 98): {"prompt": messages, "answer": "four"}}
    scorer = PythonReward(function, Letters, records=records, path=path)
    assert scorer.scores([[97, 98]], [ids("yes")]).tolist() == [4.0]
    assert function.__globals__["SEEN"] == [(["ab"], ["yes"], [records[97, 98]])]


@pytest.mark.parametrize("returned", [
    "[1, 2.5]", "(1, 2.5)", "(x for x in [1, 2.5])", "numpy.array([1, 2.5])", "[numpy.float32(1), numpy.float64(2.5)]",
    "torch.tensor([1, 2.5])", "[torch.tensor(1.0), torch.tensor([2.5])]", "[True, 2.5]"])
def test_any_two_numbers_will_do(file, returned):
    path = file(f"import numpy, torch\ndef f(prompts, replies): return {returned}")
    scores = scorer_of(path).scores([[97]] * 2, [ids("a"), ids("b")])
    assert scores.tolist() == [1, 2.5]
    assert scores.dtype == torch.float32


@pytest.mark.parametrize("returned,said", [
    ("[1]", "returned 1 numbers for 2 replies"), ("[]", "returned 0 numbers for 2"),
    ("None", "must return a list of numbers.*returned NoneType"), ("'12'", "returned str"), ("3.0", "returned float"),
    ("{'a': 1, 'b': 2}", "returned dict"), ("[1, None]", "None is no finite number, for the reply 'b'"),
    ("[1, '2']", "'2' is no finite number, for the reply 'b'"), ("[float('nan'), 1]", "nan is no .* reply 'a'"),
    ("[1, float('inf')]", "inf is no finite number"), ("[1, 10**400]", "is no finite number"),
    ("[1, 1e39]", "is no finite number"), ("[[1, 2], [3, 4]]", r"\[1, 2\] is no finite number"),
    ("[1, 1j]", "1j is no finite"), ("numpy.ones((2, 2))", "is no finite number"),
])
def test_what_is_no_number_for_each_reply_is_told(file, returned, said):
    path = file(f"import numpy\ndef f(prompts, replies): return {returned}")
    with pytest.raises(RewardError, match=f"reward function .*my.py:f: .*{said}"):
        scorer_of(path).scores([[97]] * 2, [ids("a"), ids("b")])


@pytest.mark.parametrize("body", ["return [1 / r.count('o') for r in replies]",
                                  "for r in replies:\n        yield 1 / r.count('o')"])
def test_an_exception_names_function_line_and_reply(file, body):
    path = file(f"def f(prompts, replies):\n    {body}")
    line = 1 + len(body.splitlines())
    with pytest.raises(RewardError, match=rf"my.py:f, line {line}: ZeroDivisionError.*on the reply 'bad'"):
        scorer_of(path).scores([[97]] * 3, [ids("good"), ids("bad"), ids("odd")])


def test_an_exception_that_no_single_reply_causes_is_told_of_them_all(file):
    path = file("def f(prompts, replies):\n    assert len(replies) < 2, 'one at a time'\n    return [1]")
    with pytest.raises(RewardError, match="line 2: AssertionError: one at a time, on 2 replies together"):
        scorer_of(path).scores([[97]] * 2, [ids("a"), ids("b")])


def test_ctrl_c_in_a_function_is_no_fault_of_it(file):
    path = file("from runtime.machine import Interrupted\ndef f(prompts, replies): raise Interrupted(2)")
    with pytest.raises(Interrupted):
        scorer_of(path).scores([[97]], [ids("a")])


def test_what_a_function_prints_is_no_output_of_the_command(file, capsys):
    path = file("print('loaded')\ndef f(prompts, replies):\n    print('asked')\n    return [1] * len(replies)")
    scorer_of(path).scores([[97]], [ids("a")])
    assert capsys.readouterr() == ("", "loaded\nasked\n")


def test_a_slow_function_is_said_once(file, monkeypatch, capsys):
    monkeypatch.setattr("data.functions.SLOW", 0.0)
    scorer = scorer_of(file("def f(prompts, replies): return [1] * len(replies)"))
    for _ in range(2):
        scorer.scores([[97]] * 2, [ids("a"), ids("b")])
    assert capsys.readouterr().err.count("s for 2 replies") == 1


# ---- sums ----------------------------------------------------------------------------------------

class Heads:
    """A reward model with two heads."""

    def scores(self, prompts, replies):
        return torch.tensor([float(len(reply)) for reply in replies])

    def part_scores(self, prompts, replies):
        raw = self.scores(prompts, replies)
        return {"long": raw, "short": -2 * raw}


def sum_of(text: str, model=None, norm: str = "fixed", **more) -> RewardSum:
    return RewardSum(read_reward(text), model, Letters, PPOOptions(reward_norm=norm), **more)


def test_functions_and_length_enter_as_they_are_and_parts_of_the_model_normalised(file):
    path = file("CALLS = []\ndef f(prompts, replies):\n    CALLS.append(1)\n"
                "    return [100.0 * r.count('x') for r in replies]")
    reward = sum_of(f"model:2,length:-.5,{path}:f:.01", Heads())
    start = [ids("a"), ids("abc")]  # lengths 2 and 4: mean 3, spread 1
    reward.measure([[97]] * 2, start)
    replies = [ids("xx"), ids("abcde")]  # lengths 3 and 6
    assert reward.scores([[97]] * 2, replies).tolist() == pytest.approx([0 - 1.5 + 2, 6 - 3 + 0])
    parts = reward.part_scores([[97]] * 2, replies)
    assert {name: x.tolist() for name, x in parts.items()} == {"model": [0, 3], "length": [3, 6], "f": [200, 0]}
    assert len(reward.terms[2].function.__globals__["CALLS"]) == 1  # asked once about the same replies
    parts = part_scores(reward, [[97]] * 2, replies)
    assert {name: float(x.mean()) for name, x in parts.items()} == {
        "part_model": 1.5, "part_length": 4.5, "part_f": 100}
    again = sum_of(f"model:2,length:-.5,{path}:f:.01", Heads(), scales=reward.state())
    assert torch.equal(again.scores([[97]] * 2, replies), reward.scores([[97]] * 2, replies))


def test_heads_of_a_reward_model_are_parts(file):
    reward = sum_of("model.long:1,model.short:.5", Heads())
    reward.measure([[97]] * 2, [ids("a"), ids("abc")])
    replies = [ids("abcd")]  # length 5: two spreads above the mean, and two below
    assert reward.part_scores([[97]], replies) == {"long": 2, "short": -2}
    assert reward.scores([[97]], replies).tolist() == [1]
    with pytest.raises(UserError, match="model.wide: the reward model has no such head; it has long, short"):
        sum_of("model.wide", Heads()).measure([[97]], [ids("a")])


def test_log_odds_become_log_probabilities_in_a_sum():
    reward = sum_of("model", Heads(), norm="logsigmoid")
    reward.measure([[97]] * 2, [ids("a"), ids("abc")])
    assert reward.scores([[97]], [ids("a")]).tolist() == pytest.approx([float(np.log(1 / (1 + np.exp(-2))))])


def test_a_scorer_without_parts_has_no_scores_of_them():
    assert part_scores(types.SimpleNamespace(scores=None), [], []) == {}
    assert part_scores(RewardModel(ModelConfig(n_layer=1)), [[1]], [[2]]) == {}


# ---- what `auto` means ---------------------------------------------------------------------------

@pytest.mark.parametrize("reward,feedback,words,control", [
    ("", "label", (), "fixed"), ("", "pairwise", (), "adaptive"), ("", "regression", (), "adaptive"),
    ("", "unknown scores", (), "adaptive"), ("length:-1", "scores of any kind", (), "fixed"),
    ("model,length:-1", "label", (), "adaptive"), ("model", "label", (), "fixed"),
    ("", "pairwise", ("--kl_coef=.2",), "fixed"), ("", "label", ("--kl_target=3",), "adaptive"),
    ("", "pairwise", ("--kl_control=fixed",), "fixed"), ("", "label", ("--kl_control=adaptive",), "adaptive")])
def test_the_control_of_kl_follows_from_reward_and_feedback(command, reward, feedback, words, control):
    o = command("ppo", *words)
    assert resolved(o, read_reward(reward), feedback).kl_control == control


def test_a_reward_without_a_model_refuses_the_models_options(command, tmp_path):
    assert needs_model(command("ppo", "--reward=length"), read_reward("model,length"))
    with pytest.raises(UserError, match="--reward_from has no effect with --reward length"):
        needs_model(command("ppo", "--reward=length"), read_reward("length"))
    with pytest.raises(UserError, match="running is for a reward model alone"):
        resolved(command("ppo", "--reward_norm=running"), read_reward("model,length"), "pairwise")


def test_prompts_are_as_long_as_there_is_room_or_shorter_where_asked(command):
    for words, length in (([], 40), (["--prompt_len=30"], 30)):
        assert resolved(command("ppo", *words), [], "pairwise", 40).prompt_len == length
    with pytest.raises(UserError, match="--prompt_len 41: .* 40 tokens"):
        resolved(command("ppo", "--prompt_len=41"), [], "pairwise", 40)


@pytest.mark.parametrize("words, feedback", [
    (["--preset=smollm"], "pairwise"), (["--preset=smollm", "--kl_control=adaptive"], "label"),
    (["--data=imdb", "--kl_target=4"], "label"), (["--data=imdb", "--reward=model:1,length:-.01"], "label")])
def test_steering_starts_where_the_scores_say_whatever_a_preset_or_a_data_set_pays(words, feedback):
    data = types.SimpleNamespace(meta={"defaults": DATA_SETS["imdb"].defaults if "--data=imdb" in words else {}})
    o = suited(parse(PPOOptions, words, "x"), "ppo", data)
    terms = read_reward(o.reward)
    found = KLController.starting(resolved(o, terms, feedback), 2.0)
    assert found.target == o.kl_target and found.coef == pytest.approx(2 / math.sqrt(2 * o.kl_target))
    asked = suited(parse(PPOOptions, [*words, "--kl_coef=.2", "--kl_control=adaptive"], "x"), "ppo", data)
    asked = resolved(asked, terms, feedback)
    assert KLController.starting(asked, 2.0).coef == 0.2


def test_adaptive_control_starts_where_normal_scores_would_have_the_target(command, capsys):
    o = command("ppo", "--kl_control=adaptive", "--kl_target=8")
    assert KLController.starting(o, 2.0).coef == pytest.approx(2 / 4)
    assert KLController.starting(o, 2.0, {"coef": .3, "kl": 1}).state() == {"coef": .3, "kl": 1}  # a resumed run's
    assert KLController.starting(command("ppo", "--kl_control=adaptive", "--kl_coef=.2"), 2.0).coef == .2
    assert KLController.starting(command("ppo", "--reward=length").replace(kl_control="fixed"), 24.0).coef == .095
    said = capsys.readouterr().err
    assert "253 times --kl_coef 0.095: the policy will go far; try --kl_coef 8.5, for some 4 nats" in said


# ---- the stage -----------------------------------------------------------------------------------

@pytest.fixture
def stage(world, tmp_path, monkeypatch):
    """stage(*words): exit code of `train.py ppo` on the small world, without a reward model there."""
    monkeypatch.setattr("data.prepare.open_data", lambda *_, **__: world.data)

    def run(*words) -> int:
        return train.main(["ppo", "--preset=smoke", "--dtype=float32", f"--out={tmp_path}",
                           f"--init_from={world.root / 'sft'}", *words])
    return run


def lines(tmp_path) -> list[dict]:
    text = (tmp_path / "reviews/ppo/metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


GOOD = "def f(prompts, replies, records):\n    return [float(len(r)) for r in replies]\n"


def test_a_function_alone_needs_no_reward_model(stage, file, tmp_path, monkeypatch):
    real = RewardModel.scores
    monkeypatch.setattr(RewardModel, "scores", lambda *_: pytest.fail("a reward model scored"))
    assert stage(f"--reward={file(GOOD)}:f:.1,length:-.01", "--updates=3") == 0
    monkeypatch.setattr(RewardModel, "scores", real)
    first, last = lines(tmp_path)[1], lines(tmp_path)[-1]
    assert first["raw_score"] == pytest.approx(.1 * first["part_f"] - .01 * first["part_length"], rel=1e-4)
    assert first["part_length"] == first["length"]
    assert {"eval_part_f", "eval_part_length"} <= set(last)
    state = torch.load(tmp_path / "reviews/ppo/checkpoint.pt", weights_only=True)["state"]
    assert set(state["parents"]) == {"data", "init", f"file {tmp_path / 'my.py'}"}


def test_without_a_reward_model_the_critic_starts_as_the_policy_that_says_the_mean(command, world, file):
    o = command("ppo", "--reward_norm=fixed", "--end_penalty=0", "--norm_replies=16")
    trainer = make_trainer(o.replace(reward="length"), world, terms=read_reward("length"), reward_model=False)
    critic = trainer.networks.actor_critic.critic
    assert weights_hash(critic.backbone) == weights_hash(trainer.run.model)
    assert not critic.score_head.weight.any()
    lengths = float(critic.score_head.bias)
    assert 1 <= lengths <= 16
    assert trainer.scale.mean == 0
    assert trainer.scale.std == 1


def test_a_run_with_parts_resumes_as_if_it_was_not_stopped(command, file, monkeypatch, tmp_path):
    words = ("--updates=3", f"--reward=model:1,length:-.01,{file(GOOD)}:f:.5", "--keep=best", "--eval_every=1")

    def interrupt(self, step, save):
        if step == 2:
            save(step)
            raise Interrupted(15)

    expected = weights_hash(train_ppo(command("ppo", *words)).model)
    logged = lines(tmp_path)
    assert {"part_model", "part_length", "part_f"} <= set(logged[-1])
    with monkeypatch.context() as m:
        m.setattr(Run, "stop_if_asked", interrupt)
        with pytest.raises(Interrupted):
            train_ppo(command("ppo", "--fresh", *words))
    assert weights_hash(train_ppo(command("ppo", "--resume", *words)).model) == expected
    assert [line["score"] for line in lines(tmp_path)[1:]] == [line["score"] for line in logged[1:]]


def test_a_function_that_fails_in_the_middle_loses_nothing(stage, file, tmp_path, capsys):
    bad = ("import os\ndef f(prompts, replies):\n    if os.path.exists(%r): raise ValueError('full')\n"
           "    return [1] * len(replies)")
    words = (f"--reward={file(bad % str(tmp_path / 'flag'))}:f", "--updates=4", "--save_every=100", "--eval_every=100")
    real = Run.log

    def log(self, step, **more):
        real(self, step, **more)
        if step == 2:
            (tmp_path / "flag").touch()

    with pytest.MonkeyPatch.context() as m:
        m.setattr(Run, "log", log)
        with pytest.raises(UserError, match="my.py:f, line 3: ValueError: full.*saved after update 2.*--resume"):
            stage(*words)
    file("def f(prompts, replies): return [2] * len(replies)")
    assert stage(*words, "--resume") == 0
    assert "file " in capsys.readouterr().err  # that it changed is said
    assert [line["step"] for line in lines(tmp_path)] == [0, 1, 2, 3, 4]
    assert [round(line["raw_score"]) for line in lines(tmp_path)[1:]] == [1, 1, 2, 2]
    file("def f(prompts, replies): return [3] * len(replies)")
    with pytest.raises(UserError, match="the run there differs .file .*my.py was"):  # a finished one stays as it is
        stage(*words, "--resume")


def test_a_function_that_fails_on_held_out_prompts_loses_what_the_next_process_repeats(
        stage, file, tmp_path, monkeypatch):
    bad = ("import os\ndef f(prompts, replies):\n    if os.path.exists(%r): raise ValueError('full')\n"
           "    return [1] * len(replies)")
    words = (f"--reward={file(bad % str(tmp_path / 'flag'))}:f", "--updates=4", "--save_every=2", "--eval_every=3")
    real = PPOTrainer.measure

    def measure(self, step, *measured):
        if step == 3:
            (tmp_path / "flag").touch()
        return real(self, step, *measured)

    monkeypatch.setattr(PPOTrainer, "measure", measure)
    with pytest.raises(UserError, match="my.py:f, line 3: ValueError: full.*saved after update 2; then .*--resume"):
        stage(*words)
    file("def f(prompts, replies): return [2] * len(replies)")
    assert stage(*words, "--resume") == 0
    assert [round(line["raw_score"]) for line in lines(tmp_path)[1:]] == [1, 1, 2, 2]
    assert "eval_raw_score" in lines(tmp_path)[3]


def test_other_fields_of_prompts_reach_a_function(file):
    assert records_in({"prompt": "2 + 2", "answer": "4", "level": 1}, "ppo")[1] == [
        {"prompt": "2 + 2", "extra": {"answer": "4", "level": 1}}]
    path = file("def f(prompts, replies, records):\n"
                "    return [float(r == x['answer']) for r, x in zip(replies, records)]")
    reward = sum_of(f"{path}:f", records=[{"prompt": "2+2", "extra": {"answer": "4"}},
                                          {"prompt": "2+2", "extra": {"answer": "5"}}, {"prompt": "1+2"}])
    assert reward.scores([ids("2+2")[:-1]] * 2, [ids("4"), ids("5")]).tolist() == [1, 0]  # of equal prompts the first


def test_all_stages_leave_out_the_reward_model_where_nothing_reads_it(world, tmp_path, monkeypatch):
    monkeypatch.setattr("data.prepare.open_data", lambda *_, **__: world.data)
    ran = []
    monkeypatch.setattr(train, "STAGES", {name: (cls, lambda o, name=name: ran.append(name))
                                          for name, (cls, _) in train.STAGES.items()})
    monkeypatch.setattr(train.evaluate, "write_report", lambda *_, **__: None)
    assert train.main(["--preset=smoke", f"--out={tmp_path}", "--ppo.reward=length:-1"]) == 0
    assert ran == ["pretrain", "sft", "ppo", "judge"]


def test_keep_best_ends_with_the_policy_that_held_out_opinion_found_best(command, tmp_path, monkeypatch, capsys):
    opinions = iter([.5, .9, .4, .6])

    def measure(self, policy):
        share = next(opinions)
        return {"eval_judged_positive": share, "eval_distinct2": .9, "eval_kl": share}, []

    monkeypatch.setattr("evaluate.HeldOutPrompts.measure", measure)
    run = train_ppo(command("ppo", "--updates=3", "--eval_every=1", "--keep=best", "--policy_lr=.01"))
    assert "kept the weights of step 1: eval_judged_positive 0.9, at the end 0.6" in capsys.readouterr().out
    kept = weights_hash(run.model)
    said = stage_warnings("PPO", load_checkpoint(run.folder.path)[2])
    assert said == ["PPO: the n-gram judge chose among its weights (--keep best): it is no independent judge of them"]
    opinions = iter([.5, .9, .4, .6])
    last = train_ppo(command("ppo", "--updates=3", "--eval_every=1", "--policy_lr=.01", "--fresh"))
    assert weights_hash(last.model) != kept and not stage_warnings("PPO", load_checkpoint(last.folder.path)[2])


def test_finished_ppo_that_kept_its_best_policy_goes_on_from_its_last(command, tmp_path, monkeypatch):
    """Lengthened equals uninterrupted, weights and optimizer; constant rates, else they are of another length."""
    words = ("--eval_every=1", "--keep=best", "--policy_lr=.01", "--warmup=0", "--final_lr=1")

    def run(opinions, *more):
        opinions = iter(opinions)

        def measure(self, policy):
            return {"eval_judged_positive": next(opinions), "eval_distinct2": .9}, []

        monkeypatch.setattr("evaluate.HeldOutPrompts.measure", measure)
        train_ppo(command("ppo", *words, *more))
        return load_checkpoint(tmp_path / "reviews" / "ppo", resumes=True)

    whole, _, uninterrupted = run([.5, .9, .4, .6, .7], "--updates=4")
    run([.5, .9, .4], "--updates=2", "--fresh")
    model, _, lengthened = run([.6, .7], "--updates=4", "--resume")
    assert uninterrupted["best"]["step"] == 1
    assert weights_hash(model) == weights_hash(whole)
    for name in ("best", "optimizer", "critic"):
        assert equal(lengthened[name], uninterrupted[name]), name


def test_what_repeats_is_not_kept_and_nobodys_opinion_is_an_error(command, monkeypatch):
    opinions = iter([(.5, .9), (.95, .5), (.6, .9)])  # (liked, distinct-2)

    def measure(self, policy):
        liked, distinct = next(opinions)
        return {"eval_judged_positive": liked, "eval_distinct2": distinct}, []

    monkeypatch.setattr("evaluate.HeldOutPrompts.measure", measure)
    monkeypatch.setattr("ppo.PPOTrainer.save", lambda self, step: seen.append(self.best.state["step"]))
    seen: list[int] = []
    train_ppo(command("ppo", "--updates=2", "--eval_every=1", "--keep=best"))
    assert seen == [0, 2]
    monkeypatch.setattr("evaluate.HeldOutPrompts.measure", lambda self, policy: ({"eval_distinct2": .9}, []))
    with pytest.raises(UserError, match="--keep best goes by eval_judged_positive, which these data do not give"):
        train_ppo(command("ppo", "--updates=2", "--keep=best", "--fresh"))


def test_finished_ppo_goes_on(command, tmp_path):
    train_ppo(command("ppo", "--updates=2"))
    assert train_ppo(command("ppo", "--updates=4", "--resume")).step == 2
    assert [line["step"] for line in lines(tmp_path)] == [0, 1, 2, 3, 4]
    assert train_ppo(command("ppo", "--updates=4", "--resume")) is None
