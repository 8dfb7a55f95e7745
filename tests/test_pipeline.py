"""The commands of the README with --preset smoke: every stage, resume after a kill, and what goes
wrong.

Most run in this process, by the same `main` that the command calls; five real processes show what
only a process can.
"""
import contextlib
import importlib
import io
import json
import os
import re
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
from tests.conftest import ROOT, equal

STAGES = ("pretrain", "sft", "reward", "ppo")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CI": "true"}


def process(*words, **more):
    """Run one command as a user does; its finished process."""
    return subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, env=ENVIRONMENT,
                          capture_output=True, text=True, timeout=300, **more)


def mosslet(*words, input=""):
    """Run one command in this process: (returncode, stdout, stderr), as `process` has them."""
    words = [*map(str, words)]
    module, rest = (words[1], words[2:]) if words[0] == "-m" else (words[0].removesuffix(".py"),
                                                                   words[1:])
    streams = sys.argv, sys.stdin
    out, err = io.StringIO(), io.StringIO()
    sys.argv, sys.stdin = [words[0], *rest], io.TextIOWrapper(io.BytesIO(input.encode()),
                                                              encoding="utf-8")
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = run_main(importlib.import_module(module).main, rest)
    finally:
        sys.argv, sys.stdin = streams
    return types.SimpleNamespace(returncode=code, stdout=out.getvalue(), stderr=err.getvalue())


def train_words(*words, source, out):
    return "train.py", *words, "--preset", "smoke", "--source", source, "--out", out


def train(*words, source, out):
    return mosslet(*train_words(*words, source=source, out=out))


def weights(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)["model"]


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="session")
def root(reviews_source, tmp_path_factory):
    """A finished smoke run of all stages."""
    out = tmp_path_factory.mktemp("out")
    done = process(*train_words(source=reviews_source, out=out))
    assert done.returncode == 0, done.stderr
    root = out / "reviews"
    (root / "said.txt").write_text(done.stdout, encoding="utf-8")
    return root


def test_one_command_walks_the_whole_road(root, reviews_source):
    for stage in STAGES:
        assert {"checkpoint.pt", "config.json", "metrics.jsonl",
                "samples.jsonl"} <= {p.name for p in (root / stage).iterdir()}
        config = json.loads((root / stage / "config.json").read_text(encoding="utf-8"))
        assert config["finished"] and config["seconds"] > 0 and config["versions"]["torch"] == torch.__version__
        steps = [line["step"] for line in lines(root / stage / "metrics.jsonl")]
        assert steps == sorted(set(steps))
    report = json.loads((root / "report.json").read_text(encoding="utf-8"))
    assert [r["name"] for r in report["policies"]] == ["SFT", "PPO", "real liked reviews",
                                                       "real disliked reviews"]
    assert len(report["pairs"]) == 10
    assert (root / "report.md").read_text(encoding="utf-8").startswith("# reviews, seed 0")
    data = open_data("reviews", source=str(reviews_source), vocab_size=800, limit=800)
    assert {p["prompt"] for p in report["pairs"]} <= {r["prompt"]
                                                      for r in data.records("ppo", "test")}
    assert "KL in nats per reply" in (root / "said.txt").read_text(encoding="utf-8")


def test_the_policy_moved_and_the_reference_is_the_sft_model(root):
    sft, ppo = weights(root / "sft"), weights(root / "ppo")
    assert any(not torch.equal(sft[k], ppo[k]) for k in sft)
    config = {s: json.loads((root / s / "config.json").read_text(encoding="utf-8")) for s in STAGES}
    states = {s: torch.load(root / s / "checkpoint.pt", weights_only=True)["state"] for s in STAGES}
    assert config["sft"]["parents"]["init"] == states["pretrain"]["hash"]
    parents = config["ppo"]["parents"]
    assert (parents["init"], parents["reward"]) == (states["sft"]["hash"], states["reward"]["hash"])


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
        equal = [abs(a["raw_score"] - b["raw_score"]) < 2e-3 for a,
                 b in zip(again, last, strict=True)]
        assert all(equal) if same else not any(equal)


def test_what_is_scored_is_what_was_sampled_in_every_update(root):
    updates = [line for line in lines(root / "ppo" / "metrics.jsonl") if line["step"] > 0]
    for line in updates:
        assert line["sampler_gap"] < 1e-4 and line.get("ratio_start", 0) < 1e-4
    assert updates[0]["kl"] == 0 and "ratio_start" in updates[-1]
    names = ("score judge kl kl_per_token entropy length end_rate ref_perplexity approx_kl "
             "clip_frac value_clip_frac explained_variance value_loss policy_grad_norm "
             "critic_grad_norm kl_coef generate_tokens_per_s train_tokens_per_s seconds_generate "
             "seconds_score seconds_train eval_judge eval_kl eval_raw_score").split()
    assert not set(names) - set(updates[-1])


def test_running_again_skips_what_is_done(root, reviews_source):
    before = {s: (root / s / "checkpoint.pt").stat().st_mtime_ns for s in STAGES}
    done = train(source=reviews_source, out=root.parent)
    assert done.returncode == 0 and before == {s: (root / s / "checkpoint.pt").stat().st_mtime_ns
                                               for s in STAGES}


def test_other_options_in_the_same_place_are_refused_with_the_difference(root, reviews_source):
    done = train("--ppo.kl_coef=.3", source=reviews_source, out=root.parent)
    assert done.returncode == 2 and f"kl_coef was {PPOOptions.kl_coef}, is 0.3" in done.stderr
    assert "--fresh" in done.stderr and "--out" in done.stderr
    done = train("sft", source=reviews_source, out=root.parent)
    assert done.returncode == 2 and "--resume" in done.stderr


def copy_parents(root, out, stage):
    """Links to the stages before this one."""
    (out / "reviews").mkdir(parents=True)
    for s in STAGES[:STAGES.index(stage)]:
        (out / "reviews" / s).symlink_to(root / s)


MORE_STATE = ("--critic_warmup=0", "--reward_norm=running", "--kl_control=adaptive",
              "--kl_horizon=50", "--critic=shared")


class Killed(BaseException):
    """What a power cut is to a process."""


def run_until_killed(words, folder, monkeypatch):
    """Run a stage in this process until it has saved its first checkpoint."""
    save = Run.save

    def save_and_die(run, step, **state):
        save(run, step, **state)
        raise Killed

    with monkeypatch.context() as m:
        m.setattr(Run, "save", save_and_die)
        with pytest.raises(Killed):
            mosslet(*words)


def kill_when_saved(words, folder):
    """Run a stage in a process of its own, and kill -9 it as soon as there is a checkpoint."""
    running = subprocess.Popen([sys.executable, *map(str, words)], cwd=ROOT, env=ENVIRONMENT,
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while not (folder / "checkpoint.pt").exists() and time.monotonic() < deadline and running.poll() is None:
        time.sleep(0.001)
    running.send_signal(signal.SIGKILL)
    running.wait()


@pytest.mark.parametrize("stage,options,really", [
    ("pretrain", (), True), ("sft", (), False), ("reward", (), False),
    ("ppo", ("--critic_warmup=0",), False),
    ("ppo", MORE_STATE, False)])
def test_killed_and_resumed_equals_uninterrupted(root, reviews_source, tmp_path, monkeypatch, stage,
                                                 options, really):
    # the policy moves from the first update on, and there is more to forget: a run of its own
    if options:
        copy_parents(root, tmp_path / "whole", stage)
        assert train(stage, *options, source=reviews_source, out=tmp_path / "whole").returncode == 0
        root = tmp_path / "whole" / "reviews"
        coefficients = [line["kl_coef"] for line in lines(root / stage / "metrics.jsonl")
                        if "kl_coef" in line]
        assert len(set(coefficients)) > (2 if options == MORE_STATE else 0)
    copy_parents(root, tmp_path, stage)
    folder, words = tmp_path / "reviews" / stage, train_words(stage, *options,
                                                              source=reviews_source, out=tmp_path)
    kill_when_saved(words, folder) if really else run_until_killed(words, folder, monkeypatch)
    killed_at = torch.load(folder / "checkpoint.pt", weights_only=True)["state"]["step"]
    last = lines(root / stage / "metrics.jsonl")[-1]["step"]
    assert 0 < killed_at < last, "the kill came too late to prove anything"
    # what was written after the checkpoint, down to half a line
    for name in ("metrics.jsonl", "samples.jsonl"):
        with open(folder / name, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": killed_at + 1, "loss": 9.9}) + '\n{"step": 1')
    if stage == "sft":  # what comes next does not build on half a model without being told to
        refused = train("reward", source=reviews_source, out=tmp_path)
        assert refused.returncode == 2 and "not finished" in refused.stderr and "sft --resume" in refused.stderr
    done = mosslet(*words, "--resume")
    assert done.returncode == 0, done.stderr
    whole, resumed = (torch.load(f / "checkpoint.pt", weights_only=True)
                      for f in (root / stage, folder))
    for payload in (whole, resumed):  # the only thing that may differ
        assert payload["state"].pop("seconds") > 0
    assert equal(whole, resumed)
    timeless = lambda path: [{k: v for k, v in line.items() if "second" not in k and "per_s" not in k}  # noqa: E731
                             for line in lines(path)]
    assert timeless(root / stage / "metrics.jsonl") == timeless(folder / "metrics.jsonl")
    assert lines(root / stage / "samples.jsonl") == lines(folder / "samples.jsonl")


def test_sigterm_finishes_the_step_saves_and_names_the_command(reviews_source, tmp_path):
    words = train_words("pretrain", source=reviews_source, out=tmp_path)
    running = subprocess.Popen([sys.executable, *map(str, words)], cwd=ROOT, env=ENVIRONMENT,
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "reviews/pretrain/checkpoint.pt").exists() and running.poll() is None:
        time.sleep(0.001)
    running.terminate()
    said = running.communicate(timeout=60)[1]
    assert running.returncode == 143 and "train.py pretrain" in said and "--resume" in said and "Traceback" not in said
    assert torch.load(tmp_path / "reviews/pretrain/checkpoint.pt",
                      weights_only=True)["state"]["step"] > 0


def test_samples_can_be_drawn_in_every_way_the_readme_shows(root, tmp_path):
    done = mosslet("sample.py", "--from", root / "ppo", "--prompt", "这本书")
    assert done.returncode == 0 and done.stdout.startswith("这本书")
    alone = process("sample.py", "--from", root / "ppo", "--prompt", "这本书")
    assert alone.stdout == done.stdout  # the same seed
    assert mosslet("sample.py", "--from", root / "pretrain", "--prompt",
                   "房间").stdout.startswith("房间")
    (tmp_path / "p.jsonl").write_text('{"prompt": "酒店"}\n{"prompt": "电脑"}\n', encoding="utf-8")
    done = mosslet("sample.py", "--from", root / "sft", "--file", tmp_path / "p.jsonl")
    assert [json.loads(line)["prompt"] for line in done.stdout.splitlines()] == ["酒店", "电脑"]
    done = mosslet("sample.py", "--from", root / "sft", "--prompt", "房间", "--best_of", "4")
    scores = [float(line.split()[0]) for line in done.stdout.splitlines() if line[:1] in "+-"]
    assert done.returncode == 0 and len(scores) == 4
    done = mosslet("sample.py", "--compare", root / "sft", root / "ppo")
    assert done.returncode == 0 and done.stdout.count("»") == 8
    done = mosslet("sample.py", "--from", root / "ppo", "--chat", input="房间\n早餐\n")
    assert done.returncode == 0 and done.stdout.count("MOSS: ") == 2


def test_checkpoints_can_be_measured_and_plotted(root, reviews_source, tmp_path):
    done = mosslet("evaluate.py", root / "sft", root / "ppo", "--prompts", "12", "--source",
                   reviews_source)
    assert done.returncode == 0 and "judged positive" in done.stdout, done.stderr
    done = mosslet("-m", "tools.seeds", root, root)  # twice the same run: its mean is itself
    report = json.loads((root / "report.json").read_text(encoding="utf-8"))
    kl = next(r["kl"] for r in report["policies"] if r["name"] == "PPO")
    assert f"{kl:.3f} [{kl:.3f}, {kl:.3f}]" in done.stdout and "(paired)" in done.stdout, done.stderr
    done = mosslet("-m", "tools.plot", root, "--out", tmp_path / "p.png")
    assert done.returncode == 0, done.stderr
    if (tmp_path / "p.png").exists():  # matplotlib is an extra
        assert (tmp_path / "p.png").read_bytes()[:4] == b"\x89PNG"
    else:
        assert "matplotlib" in done.stdout


@pytest.mark.parametrize("words,message", [
    (["train.py", "--preset", "smokey"], "smoke, demo, base"),
    (["train.py", "ppo", "--kl_coeff=1"], "did you mean --kl_coef"),
    (["train.py", "rewards"], "did you mean reward"),
    (["train.py", "--data", "review"], "did you mean reviews"),
    (["train.py", "ppo", "--top_p=.9"], "unknown option --top_p"),
    (["train.py", "pretrain", "--init_from=x"], "no effect"),
    (["train.py", "ppo", "--kl_target=3"], "no effect with --kl_control fixed"),
    (["train.py", "ppo", "--temperature=nan"], "--temperature: 'nan' is not a finite number"),
    (["train.py", "ppo", "--kl_control=adaptive", "--kl_coef=0"], "would never move"),
    (["train.py", "ppo", "--updates=2"], "the policy would never learn"),
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
    assert done.returncode == 2 and done.stderr.startswith("error: "), done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert re.search(message, done.stderr), done.stderr


def test_checkpoints_that_do_not_fit_each_other_are_refused(root, reviews_source, tmp_path):
    copy_parents(root, tmp_path, "ppo")
    done = train("ppo", "--reward_from", root / "sft", source=reviews_source, out=tmp_path)
    assert done.returncode == 2 and "holds a Transformer, but a RewardModel is needed" in done.stderr
    payload = torch.load(root / "reward" / "checkpoint.pt", weights_only=True)
    payload["tokenizer"]["ranks"][300:302] = payload["tokenizer"]["ranks"][300:302][::-1]
    torch.save(payload, tmp_path / "other.pt")
    done = train("ppo", "--reward_from", tmp_path / "other.pt", source=reviews_source, out=tmp_path)
    assert done.returncode == 2 and "different tokenizers" in done.stderr
    copy_parents(root, tmp_path / "new", "sft")
    done = train("sft", "--max_len=500", source=reviews_source, out=tmp_path / "new")
    assert done.returncode == 2 and "made for rows of at most 128 tokens" in done.stderr


def test_a_loss_that_explodes_stops_and_names_the_step(root, reviews_source, tmp_path):
    copy_parents(root, tmp_path, "sft")
    done = train("sft", "--optimizer=adamw", "--lr=1e30", "--warmup=0", "--clip=1e30",
                 source=reviews_source, out=tmp_path)
    assert done.returncode == 2 and "at step" in done.stderr and "lower --lr" in done.stderr
    assert "Traceback" not in done.stderr


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
    measured = [line for line in lines(tmp_path / "out/mine/reward/metrics.jsonl")
                if "val_accuracy" in line]
    assert measured and (tmp_path / "out/mine/report.md").exists()
    ppo = json.loads((tmp_path / "out/mine/ppo/config.json").read_text(encoding="utf-8"))["options"]
    assert ppo["reward_norm"] == "fixed"  # a preference's score is no log-odds
    done = mosslet("train.py", "ppo", *common, "--fresh", "--reward_norm=sigmoid")
    assert done.returncode == 2 and "log-odds" in done.stderr
