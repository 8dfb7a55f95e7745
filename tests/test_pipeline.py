"""The commands of the README with --preset smoke: every stage, resume after a kill, and what goes
wrong.

Most run in this process, by the same `main` that the command calls. Five real processes show what
only a process can: the first command of the README, kill -9, SIGTERM, a reader that leaves early,
and a module's --help.
"""
import contextlib
import importlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import types

import pytest
import torch

from data.prepare import open_data
from ppo import PPOOptions
from runtime.options import run_main
from runtime.run import Run
from tests.conftest import ROOT, equal, signals_restored

STAGES = ("pretrain", "sft", "reward", "ppo", "judge")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CI": "true"}


def process(*words, **more):
    """Run one command as a user does; its finished process."""
    return subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, env=ENVIRONMENT,
                          capture_output=True, text=True, timeout=300, **more)


def mosslet(*words, input=""):
    """Run one command in this process: returncode, stdout and stderr, as `process` has them."""
    module, *rest = map(str, words[1:] if words[0] == "-m" else words)
    out, err = io.StringIO(), io.StringIO()
    typed = io.TextIOWrapper(io.BytesIO(input.encode()), encoding="utf-8")
    with (signals_restored(), pytest.MonkeyPatch.context() as m, contextlib.redirect_stdout(out),
          contextlib.redirect_stderr(err)):
        m.setattr(sys, "argv", [module, *rest])
        m.setattr(sys, "stdin", typed)
        code = run_main(importlib.import_module(module.removesuffix(".py")).main, rest)
    return types.SimpleNamespace(returncode=code, stdout=out.getvalue(), stderr=err.getvalue())


def refused(done, *messages):
    """The command ended with exit code 2 and one line that holds these words."""
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: ")
    for message in messages:
        assert message in last


def train_words(*words, source, out):
    return "train.py", *words, "--preset", "smoke", "--source", source, "--out", out


def train(*words, source, out):
    return mosslet(*train_words(*words, source=source, out=out))


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def read_json(path):
    return json.loads(path.read_text(encoding="utf-8"))


def checkpoint(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)


@pytest.fixture(scope="session")
def root(reviews_source, tmp_path_factory):
    """A finished smoke run of all stages."""
    out = tmp_path_factory.mktemp("out")
    done = process(*train_words(source=reviews_source, out=out))
    assert done.returncode == 0, done.stderr
    root = out / "reviews"
    (root / "printed.txt").write_text(done.stdout, encoding="utf-8")
    return root


# ---- the whole road ------------------------------------------------------------------------------

@pytest.mark.parametrize("stage", STAGES)
def test_one_command_leaves_every_stage_finished(root, stage):
    assert {"checkpoint.pt", "config.json", "metrics.jsonl",
            "samples.jsonl"} <= {file.name for file in (root / stage).iterdir()}
    config = read_json(root / stage / "config.json")
    assert config["finished"]
    assert config["seconds"] > 0
    assert config["versions"]["torch"] == torch.__version__
    steps = [line["step"] for line in lines(root / stage / "metrics.jsonl")]
    assert steps == sorted(set(steps))


def test_one_command_writes_the_report(root, reviews_source):
    report = read_json(root / "report.json")
    assert [row["name"] for row in report["policies"]] == [
        "SFT", "PPO", "SFT, best of 16", "people, liked", "people, disliked"]
    assert report["split"] == "val"
    assert len(report["pairs"]) == 10
    assert {*STAGES} <= {*report["seconds"]}
    assert (root / "report.md").read_text(encoding="utf-8").startswith("# reviews, seed 0")
    data = open_data("reviews", source=str(reviews_source), vocab_size=800, limit=800)
    held_out = {record["prompt"] for record in data.records("ppo", "val")}
    assert {pair["prompt"] for pair in report["pairs"]} <= held_out
    assert "KL in nats per reply" in (root / "printed.txt").read_text(encoding="utf-8")


def test_the_policy_moved(root):
    sft, ppo = (checkpoint(root / stage)["model"] for stage in ("sft", "ppo"))
    assert any(not torch.equal(sft[name], ppo[name]) for name in sft)


def test_every_stage_names_the_weights_that_it_started_from(root):
    weights = {stage: checkpoint(root / stage)["state"]["hash"] for stage in STAGES}
    parents = {stage: read_json(root / stage / "config.json")["parents"] for stage in STAGES}
    assert parents["sft"]["init"] == weights["pretrain"]
    assert parents["reward"]["init"] == weights["sft"]
    assert parents["ppo"]["init"] == weights["sft"]
    assert parents["ppo"]["reward"] == weights["reward"]
    assert parents["judge"]["init"] == weights["pretrain"]


def test_ppo_optimises_the_reward_model_that_was_trained(root, reviews_source):
    """A rival's shipped command optimised a random head. The scores that PPO logged are the trained
    checkpoint's."""
    from evaluate import ReplySettings, measure_policy
    from model import load_checkpoint
    from reward import RewardModel
    trained, tokenizer, state = load_checkpoint(root / "reward", cls=RewardModel)
    policy, _, ppo = load_checkpoint(root / "ppo")
    o = ppo["options"]
    prompts = [r["prompt"] for r in open_data("reviews", source=str(reviews_source),
                                              vocab_size=o["vocab_size"],
                                              limit=o["limit"]).records("ppo",
                                                                        "val")][:o["eval_prompts"]]
    last = [r for r in lines(root / "ppo" / "samples.jsonl") if r["step"] == o["updates"]]
    for model, same in ((trained, True), (RewardModel(trained.config), False)):
        _, again, _ = measure_policy(policy, policy, tokenizer, prompts, state["template"],
                                     reward_model=model, settings=ReplySettings(o["reply_len"]))
        assert [r["reply"] for r in again] == [r["reply"] for r in last]
        close = [abs(a["raw_score"] - b["raw_score"]) < 2e-3
                 for a, b in zip(again, last, strict=True)]
        assert close == [same] * len(last)


def test_what_is_scored_is_what_was_sampled_in_every_update(root):
    updates = [line for line in lines(root / "ppo" / "metrics.jsonl") if line["step"] > 0]
    assert updates[0]["kl"] == 0
    assert "ratio_start" in updates[-1]
    for line in updates:
        assert line["sampler_gap"] < 1e-4
        assert line.get("ratio_start", 0) < 1e-4


def test_every_update_logs_what_the_documentation_lists(root):
    last = lines(root / "ppo" / "metrics.jsonl")[-1]
    names = ("score judge kl kl_per_token entropy length end_rate ref_perplexity approx_kl "
             "clip_frac value_clip_frac explained_variance value_loss policy_grad_norm "
             "critic_grad_norm kl_coef generate_tokens_per_s train_tokens_per_s seconds_generate "
             "seconds_score seconds_train eval_judge eval_kl eval_raw_score").split()
    assert set(names) - set(last) == set()


def test_running_again_skips_what_is_done(root, reviews_source):
    written = lambda: {stage: (root / stage / "checkpoint.pt").stat().st_mtime_ns  # noqa: E731
                       for stage in STAGES}
    before = written()
    assert train(source=reviews_source, out=root.parent).returncode == 0
    assert written() == before


def test_a_stage_without_a_preset_has_that_of_its_parent(root, reviews_source, tmp_path):
    done = mosslet("train.py", "reward", "--source", reviews_source, "--init_from", root / "sft", "--out", tmp_path,
                   "--epochs", "0.1")
    assert done.returncode == 0 and f"--preset smoke, as {root / 'sft'} has" in done.stdout
    assert json.loads((tmp_path / "reviews" / "reward" / "config.json").read_text())["preset"] == "smoke"


def test_other_options_in_the_same_place_are_refused_with_the_difference(root, reviews_source):
    refused(train("--ppo.kl_coef=.3", source=reviews_source, out=root.parent),
            f"kl_coef was {PPOOptions.kl_coef}, is 0.3", "--fresh", "--out")


def test_a_stage_that_is_there_is_refused_with_the_command_that_resumes_it(root, reviews_source):
    refused(train("sft", source=reviews_source, out=root.parent), "train.py sft ", "--resume`")


# ---- killed, interrupted, resumed ----------------------------------------------------------------


def copy_parents(root, out, stage):
    """Links to the stages before this one."""
    (out / "reviews").mkdir(parents=True)
    for s in STAGES[:STAGES.index(stage)]:
        (out / "reviews" / s).symlink_to(root / s)


MORE_STATE = ("--critic_warmup=0", "--reward_norm=running", "--kl_control=adaptive",
              "--kl_horizon=50", "--critic=shared")


def timeless(path):
    """Logged lines without what depends on the machine's speed."""
    return [{name: value for name, value in line.items()
             if "second" not in name and "per_s" not in name} for line in lines(path)]


class Killed(BaseException):
    """What a power cut is to a process."""


def run_until_killed(words, folder):
    """Run a stage in this process until it has saved its first checkpoint."""
    save = Run.save

    def save_and_die(run, step, **state):
        save(run, step, **state)
        raise Killed

    with pytest.MonkeyPatch.context() as m:
        m.setattr(Run, "save", save_and_die)
        with pytest.raises(Killed):
            mosslet(*words)


def kill_when_saved(words, folder):
    """Run a stage in a process of its own, and kill -9 it as soon as there is a checkpoint."""
    running = start_and_wait_for(words, folder)
    running.kill()
    running.communicate()


def start_and_wait_for(words, folder):
    """A stage in a process of its own, which has saved a checkpoint or ended."""
    running = subprocess.Popen([sys.executable, *map(str, words)], cwd=ROOT, env=ENVIRONMENT,
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while (not (folder / "checkpoint.pt").exists() and time.monotonic() < deadline
           and running.poll() is None):
        time.sleep(0.001)
    return running


@pytest.mark.parametrize("stage,options,kill", [
    ("pretrain", (), kill_when_saved), ("sft", (), run_until_killed),
    ("reward", (), run_until_killed), ("ppo", ("--critic_warmup=0",), run_until_killed),
    ("ppo", MORE_STATE, run_until_killed)], ids=["pretrain", "sft", "reward", "ppo", "ppo-more"])
def test_killed_and_resumed_equals_uninterrupted(root, reviews_source, tmp_path, stage, options,
                                                 kill):
    # The policy moves from the first update on, and there is more to forget: a run of its own.
    if options:
        out = tmp_path / "uninterrupted"
        copy_parents(root, out, stage)
        assert train(stage, *options, source=reviews_source, out=out).returncode == 0
        root = out / "reviews"
        coefficients = {line["kl_coef"] for line in lines(root / stage / "metrics.jsonl")
                        if "kl_coef" in line}
        assert len(coefficients) > (2 if options == MORE_STATE else 0)
    copy_parents(root, tmp_path, stage)
    folder = tmp_path / "reviews" / stage
    words = train_words(stage, *options, source=reviews_source, out=tmp_path)
    kill(words, folder)
    killed_at = checkpoint(folder)["state"]["step"]
    last = lines(root / stage / "metrics.jsonl")[-1]["step"]
    assert 0 < killed_at < last, "the kill came too late to prove anything"
    # what was written after the checkpoint, down to half a line
    for name in ("metrics.jsonl", "samples.jsonl"):
        with open(folder / name, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": killed_at + 1, "loss": 9.9}) + '\n{"step": 1')
    if stage == "sft":  # what comes next does not build on half a model without being told to
        refused(train("reward", source=reviews_source, out=tmp_path), "not finished",
                "sft --resume")
    done = mosslet(*words, "--resume")
    assert done.returncode == 0, done.stderr
    uninterrupted, resumed = checkpoint(root / stage), checkpoint(folder)
    for payload in (uninterrupted, resumed):  # the only thing that may differ
        assert payload["state"].pop("seconds") > 0
    assert equal(uninterrupted, resumed)
    assert timeless(root / stage / "metrics.jsonl") == timeless(folder / "metrics.jsonl")
    assert lines(root / stage / "samples.jsonl") == lines(folder / "samples.jsonl")


def test_sigterm_finishes_the_step_saves_and_names_the_command(reviews_source, tmp_path):
    words = train_words("pretrain", source=reviews_source, out=tmp_path)
    folder = tmp_path / "reviews" / "pretrain"
    running = start_and_wait_for(words, folder)
    running.terminate()
    printed = running.communicate(timeout=60)[1]
    assert running.returncode == 128 + signal.SIGTERM
    assert "Traceback" not in printed
    step = checkpoint(folder)["state"]["step"]
    assert f"pretrain: saved after step {step}; go on with `{sys.executable} train.py pretrain" in printed
    assert printed.rstrip().endswith("--resume`")
    assert not read_json(folder / "config.json")["finished"]


def test_ctrl_c_is_pytests_again_after_a_command_in_this_process():
    before = signal.getsignal(signal.SIGINT)
    mosslet("train.py", "ppo", "--kl_coeff=1")
    assert signal.getsignal(signal.SIGINT) is before


def test_a_reader_that_leaves_early_ends_the_command_quietly():
    running = subprocess.Popen([sys.executable, "-u", "train.py", "--help"], cwd=ROOT,
                               env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               text=True)
    running.stdout.close()  # as `| head` does, here before the first line
    printed = running.communicate(timeout=60)[1]
    assert running.returncode == 128 + 13  # SIGPIPE's number, as a shell has it
    assert printed == ""


def test_a_module_runs_as_a_command_and_explains_itself():
    done = process("-m", "data.prepare", "--help")
    assert done.returncode == 0, done.stderr
    assert "--vocab_size" in done.stdout
    assert done.stderr == ""


# ---- what is done with the checkpoints -----------------------------------------------------------

def sample(*words, **more):
    """What sample.py prints."""
    done = mosslet("sample.py", *words, **more)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_reply_follows_from_the_seed(root):
    reply, again, other = (sample("--from", root / "ppo", "--prompt", "这本书", "--seed", seed)
                           for seed in (1, 1, 2))
    assert reply.startswith("这本书")
    assert again == reply
    assert other != reply


def test_a_pretrained_model_goes_on_from_a_text(root):
    assert sample("--from", root / "pretrain", "--prompt", "房间").startswith("房间")


def test_a_file_of_prompts_is_answered_in_order(root, tmp_path):
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "酒店"}\n{"prompt": "电脑"}\n', encoding="utf-8")
    printed = sample("--from", root / "sft", "--file", file).splitlines()
    assert [json.loads(line)["prompt"] for line in printed] == ["酒店", "电脑"]


def test_the_best_of_several_replies_stands_last(root):
    printed = sample("--from", root / "sft", "--prompt", "房间", "--best_of", "4").splitlines()
    scores = [float(line.split()[0]) for line in printed if line[:1] in "+-"]
    assert len(scores) == 4
    assert scores == sorted(scores)


def test_two_checkpoints_are_compared_on_the_same_openings(root):
    assert sample("--compare", root / "sft", root / "ppo").count("»") == 8


def test_a_conversation_answers_each_line(root):
    printed = sample("--from", root / "ppo", "--chat", input="房间\n早餐\n")
    assert printed.count("Model: ") == 2


def test_checkpoints_are_measured(root, reviews_source):
    done = mosslet("evaluate.py", root / "sft", root / "ppo", "--prompts", "12", "--source",
                   reviews_source)
    assert done.returncode == 0, done.stderr
    assert "judged positive" in done.stdout


def test_seeds_are_averaged(root):
    done = mosslet("-m", "tools.seeds", root, root)  # twice the same run: its mean is itself
    report = read_json(root / "report.json")
    kl = next(row["kl"] for row in report["policies"] if row["name"] == "PPO")
    assert done.returncode == 0, done.stderr
    assert f"{kl:.3f} [{kl:.3f}, {kl:.3f}]" in done.stdout
    assert "texts of val (paired" in done.stdout


def test_curves_are_drawn(root, tmp_path):
    done = mosslet("-m", "tools.plot", root, "--out", tmp_path / "p.png")
    assert done.returncode == 0, done.stderr
    if (tmp_path / "p.png").exists():  # matplotlib is an extra
        assert (tmp_path / "p.png").read_bytes()[:4] == b"\x89PNG"
    else:
        assert "matplotlib" in done.stdout


# ---- what goes wrong -----------------------------------------------------------------------------

@pytest.mark.parametrize("words,message", [
    (["train.py", "--preset", "smokey"], "smoke, demo, base"),
    (["train.py", "ppo", "--kl_coeff=1"], "did you mean --kl_coef"),
    (["train.py", "rewards"], "did you mean reward"),
    (["train.py", "--data", "review"], "did you mean reviews"),
    (["train.py", "ppo", "--top_p=.9"], "unknown option --top_p"),
    (["train.py", "pretrain", "--init_from=x"], "no effect"),
    (["train.py", "ppo", "--kl_control=fixed", "--kl_target=3"], "no effect with --kl_control fixed"),
    (["train.py", "ppo", "--temperature=nan"], "--temperature: 'nan' is not a finite number"),
    (["train.py", "ppo", "--kl_control=adaptive", "--kl_coef=0"], "would never move"),
    (["train.py", "ppo", "--updates=2"], "the policy would never learn"),
    (["train.py", "ppo", "--critic_warmup=0", "--critic_epochs=2"], "no effect with --critic_warmup 0"),
    (["train.py", "ppo", "--report_prompts=9"], "no effect on ppo alone"),
    (["train.py", "ppo", "--minibatches=0"], "out of range"),
    (["train.py", "ppo", "--compile=no"], "not one of auto"),
    (["train.py", "pretrain", "--data=shakespeare", "--mixture=news=.5"],
     "no effect on shakespeare"),
    (["train.py", "pretrain", "--data=shakespeare", "--vocab_size=500"],
     "no effect on shakespeare"),
    (["-m", "data.prepare", "shakespeare", "--limit=9"], "no effect on shakespeare"),
    (["sample.py", "--prompt=x", "--temperature=0", "--top_k=5"], "no effect with --temperature 0"),
    (["train.py", "pretrain", "--preset=smoke", "--mixture=news=.9,dialogue=.2"], "more than 1"),
    (["train.py", "pretrain", "--fresh", "--resume"], "contradict each other"),
    (["sample.py", "--from=nowhere", "--prompt=x"], "nowhere/checkpoint.pt: no checkpoint there"),
    (["sample.py", "--chat", "--best_of=4"], "no effect with --chat"),
    (["sample.py", "--chat", "--prompt=x"], "no effect with --chat"),
    (["sample.py", "--from=x", "--compare=a,b"], "with --compare, which names two"),
    (["sample.py", "--prompt=x", "--reward_from=y"], "no effect without --best_of"),
    (["train.py", "sft", "--optimizer=adamw", "--adam_lr=.1"], "no effect with --optimizer adamw"),
    (["train.py", "sft", "--preset", "smoke"], "train.py pretrain"),
    (["train.py", "--source", "/nonexistent"], "no such file"),
    (["sample.py", "--from", "/nonexistent", "--prompt", "x"], "no checkpoint"),
    (["sample.py"], "no checkpoint|nothing to do"), (["evaluate.py"], "which checkpoints"),
    (["-m", "tools.plot", "/nonexistent"], "nothing to draw"),
    (["-m", "tools.seeds", "/nonexistent"], "makes it when"),
    (["train.py", "--device=cuda"], "no such device")])
def test_what_a_user_can_mend_is_one_clear_line(words, message, reviews_source, tmp_path):
    if "--device=cuda" in words and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    if words[0] == "train.py" and "--source" not in words:
        source = reviews_source
        if "--data=shakespeare" in words:
            source = tmp_path / "text.txt"
            source.write_text("To be, or not to be: that is the question.\n" * 50, encoding="utf-8")
        words = [*words, "--source", str(source)]
    if words[0] == "train.py" and "--out" not in words:
        words = [*words, "--out", str(tmp_path)]
    done = mosslet(*words)
    refused(done)
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert re.search(message, done.stderr), done.stderr


def test_a_policy_is_no_reward_model(root, reviews_source, tmp_path):
    copy_parents(root, tmp_path, "ppo")
    refused(train("ppo", "--reward_from", root / "sft", source=reviews_source, out=tmp_path),
            "holds a Transformer, but a RewardModel is needed")


def test_policy_and_reward_model_must_share_a_tokenizer(root, reviews_source, tmp_path):
    copy_parents(root, tmp_path, "ppo")
    payload = checkpoint(root / "reward")
    payload["tokenizer"]["ranks"][300:302] = payload["tokenizer"]["ranks"][300:302][::-1]
    torch.save(payload, tmp_path / "other.pt")
    refused(train("ppo", "--reward_from", tmp_path / "other.pt", source=reviews_source,
                  out=tmp_path), "different tokenizers")


def test_a_row_longer_than_the_parent_allows_is_refused(root, reviews_source, tmp_path):
    copy_parents(root, tmp_path, "sft")
    refused(train("sft", "--max_len=500", source=reviews_source, out=tmp_path),
            "made for rows of at most 128 tokens")


def test_prompts_that_leave_no_room_for_a_reply_are_refused(root, reviews_source, tmp_path):
    copy_parents(root, tmp_path, "ppo")
    refused(train("ppo", "--reply_len=127", source=reviews_source, out=tmp_path), "--reply_len")


def test_a_loss_that_explodes_stops_and_names_the_step(root, reviews_source, tmp_path):
    copy_parents(root, tmp_path, "sft")
    refused(train("sft", "--optimizer=adamw", "--lr=1e30", "--warmup=0", "--clip=1e30",
                  source=reviews_source, out=tmp_path), "at step", "lower --lr")


def test_a_users_own_dialogues_and_pairs_train_on_a_pretrained_model(root, tmp_path):
    (tmp_path / "mine").mkdir()

    def write(name: str, records: list[dict]) -> None:
        text = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records)
        (tmp_path / "mine" / name).write_text(text, encoding="utf-8")

    # some prompts leave no room for a reply: they are left out
    prompts = [f"问题{i}" + "长" * 150 * (i % 3 == 0) for i in range(120)]
    write("sft.jsonl", [{"prompt": p, "response": f"回答{i}很好"} for i, p in enumerate(prompts)])
    write("reward.jsonl", [{"prompt": f"问题{i}", "chosen": "很好很好", "rejected": f"不好{i}"}
                           for i in range(120)])
    common = ["--preset", "smoke", "--data", tmp_path / "mine", "--out", tmp_path / "out"]
    done = mosslet("train.py", *common, "--init_from", root / "pretrain")
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "out" / "mine"
    assert any("val_accuracy" in line for line in lines(folder / "reward" / "metrics.jsonl"))
    assert (folder / "report.md").exists()
    assert any("val_accuracy" in line for line in lines(folder / "judge" / "metrics.jsonl"))  # of a share of the pairs
    options = read_json(folder / "ppo" / "config.json")["options"]
    assert options["reward_norm"] == "fixed"  # a preference's score is no log-odds
    learned = read_json(folder / "reward" / "config.json")["options"]["max_len"]
    assert options["prompt_len"] == min(128 - options["reply_len"], learned - 8)
    refused(mosslet("train.py", "ppo", *common, "--fresh", "--reward_norm=sigmoid"), "log-odds")


# ---- interrupted while no step is under way ------------------------------------------------------

def contents(folder):
    """What a folder holds, but for the lock."""
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*")
            if path.is_file() and path.name != ".lock"}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM,
                                    getattr(signal, "SIGHUP", signal.SIGTERM)])
@pytest.mark.parametrize("moment", ["data.prepare.prepare", "evaluate.HeldOutPrompts.measure",
                                    "ppo.PPOTrainer.measure_start"])
def test_before_the_first_step_a_signal_stops_at_once_and_changes_nothing(
        root, reviews_source, tmp_path, monkeypatch, number, moment):
    shutil.copytree(root, tmp_path / "reviews")
    before = contents(tmp_path)
    monkeypatch.setattr(moment, lambda *_, **__: signal.raise_signal(number))
    done = train("ppo", "--fresh", source=reviews_source, out=tmp_path)
    assert done.returncode == 128 + number
    assert "stopped at once" in done.stderr
    assert contents(tmp_path) == before


def test_a_reply_that_would_command_the_terminal_is_escaped_there(root, monkeypatch, capsys):
    class Screen(io.StringIO):
        def isatty(self):
            return True

    evil = "\x1b]0;x\x07\r\x9b2J"
    monkeypatch.setattr("sample.reply_texts", lambda tokenizer, replies: [evil] * len(replies.tokens))
    monkeypatch.setattr("data.tokenizer.Tokenizer.token_bytes", lambda *_: evil.encode())
    ways = [["--prompt", "x"], ["--prompt", "x", "--best_of", "2"], ["--chat"]]
    for words in ways:
        screen = Screen()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"x\n"), encoding="utf-8"))
        monkeypatch.setattr(sys, "stdout", screen)
        assert run_main(importlib.import_module("sample").main, ["--from", str(root / "ppo"), *words]) == 0
        assert not set(screen.getvalue()) & set(evil[:1] + "\x07\r\x9b")
        assert "\\u001b" in screen.getvalue()


# ---- the fourth step -----------------------------------------------------------------------------

def test_the_fourth_step_and_both_in_turn_are_compared(root, reviews_source, tmp_path):
    shutil.copytree(root, tmp_path / "reviews")
    run = tmp_path / "reviews"
    done = train("best", source=reviews_source, out=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "mean score" in done.stdout
    after_ppo = ("--init_from", run / "ppo", "--reward_from", run / "reward")
    done = train("best", *after_ppo, source=reviews_source, out=tmp_path / "both")
    assert done.returncode == 0, done.stderr
    both = tmp_path / "both" / "reviews" / "best"
    words = "--prompts", 20, "--source", reviews_source, "--json", "-"
    done = mosslet("evaluate.py", run / "sft", run / "best", run / "ppo", both, *words)
    assert done.returncode == 0, done.stderr
    rows = {row["name"]: row for row in json.loads(done.stdout)["policies"]}
    names = [str(run / "sft"), str(run / "best"), str(run / "ppo"), str(both)]
    assert [*rows][:4] == names
    assert abs(rows[names[0]]["kl"]) < 1e-4 < rows[names[1]]["kl"]  # against sft
    # alone: reference and reward model are where it has them from
    for folder in (run / "best", both):
        done = mosslet("evaluate.py", folder, *words)
        assert done.returncode == 0, done.stderr
        assert "raw_score" in json.loads(done.stdout)["policies"][0]
    refused(train("best", "--fresh", "--reward_from", run / "judge", source=reviews_source, out=tmp_path),
            "this is the judge")
    refused(train("--best.n=2", source=reviews_source, out=tmp_path), "unknown option --best.n")


def test_the_report_of_a_run_is_also_a_page_with_curves(root):
    page = (root / "report.html").read_text(encoding="utf-8")
    assert page.count("<svg") >= 10
    assert "![curves](report.svg)" in (root / "report.md").read_text(encoding="utf-8")
    assert (root / "report.svg").stat().st_size > 5000
