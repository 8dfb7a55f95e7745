"""The stages and their loop: what each step learns from, what is logged, and how a run goes on."""
import json
import math
import subprocess
import sys
import types

import numpy as np
import pytest
import torch
from tqdm import tqdm

import train
from data.batches import PackedDocuments, dialogue_rows, eval_windows, judged_batch, judged_rows
from data.judge import ngram_classifier
from model import ModelConfig, Transformer, load_checkpoint, token_logprobs, weights_hash
from reward import RewardConfig, RewardModel, label_loss, pairwise_loss
from runtime.draws import key, rows_at
from runtime.machine import Interrupted
from runtime.optim import learning_rate, make_optimizers
from runtime.options import UserError, parse, run_main
from runtime.run import Run, limit_length
from tests.conftest import equal
from tests.test_ppo import SHAPE


class Caught(Exception):
    """What a stage hands to `fit`."""


@pytest.fixture
def first_step(command, monkeypatch):
    def caught(stage, *words):
        def stop(*arguments, **_):
            raise Caught(*arguments)
        monkeypatch.setattr(train, "fit", stop)
        with pytest.raises(Caught) as found:
            train.STAGE_FUNCTIONS[stage](command(stage, "--fresh", *words))
        _, model, _, losses, measure = found.value.args
        with torch.no_grad():  # far from the start, where attention is nearly uniform
            for p in model.parameters():
                if stage == "pretrain" and p.dim() == 2:
                    p.mul_(8)
        return model, losses, measure
    return caught


def test_pretraining_means_over_every_target_and_stays_inside_documents(first_step, monkeypatch):
    plans, ends = [], []
    monkeypatch.setattr(train, "PackedDocuments", lambda *a, **k: plans.append(PackedDocuments(*a, **k)) or plans[-1])
    for words in (["--batch=8"], ["--batch=4", "--accumulate=2"]):
        model, losses, _ = first_step("pretrain", *words)
        total = sum(loss for loss, _ in losses(0))
        total.backward()
        ends.append(torch.cat([total.detach()[None], *(p.grad.flatten() for p in model.parameters())]))
    nats, batch = 0.0, plans[0].batch(0)
    for tokens, targets, docs in zip(*batch, strict=True):
        for d in docs.unique():  # each document alone
            nats -= float(token_logprobs(model(tokens[docs == d][None])[0], targets[docs == d]).sum())
    assert float(ends[0][0]) == pytest.approx(nats / batch[0].numel(), rel=1e-4)
    assert torch.allclose(*ends, atol=1e-5) and model.config.dropout == 0


def test_sft_learns_replies_alone_by_their_tokens(first_step, world):
    model, losses, measure = first_step("sft")
    rows, _ = dialogue_rows(world.data.records("sft", "train"), world.data.tokenizer, world.data.template, 64)
    nats = n = 0
    for i in rows_at(len(rows), 16, 0, 0, "sft"):
        ids, learn = (torch.tensor(x) for x in rows[i])
        nats -= float(token_logprobs(model(ids[None])[0, :-1], ids[1:])[learn[1:]].sum())
        n += int(learn.sum())
    (loss, tokens), = losses(0)
    assert tokens == n and float(loss.detach()) == pytest.approx(nats / n, rel=1e-4) and model.config.dropout == 0


def test_the_reward_loss_is_that_of_rows_alone_plus_the_language_models(first_step, world):
    model, losses, _ = first_step("reward", "--max_len=128")  # so that several rows share a window
    model.eval()
    with torch.no_grad():
        model.score_head.weight.mul_(20)
    records = world.data.records("reward", "train")
    batch = [records[i] for i in rows_at(len(records), 16, 0, 0, "reward")]
    rows = judged_rows(batch, world.data.tokenizer, world.data.template, 128, prefix_share=.3,
                       rng=np.random.default_rng(key(0, "reward", "prefix", 0)))
    tokens, real, reply = judged_batch(rows, "cpu")
    scores = model(tokens, real, reply)
    each = -token_logprobs(model.backbone(tokens, real)[:, :-1], tokens[:, 1:])[reply[:, 1:]]
    expected = label_loss(scores, torch.tensor([r["label"] for r in batch])) + .1 * each.mean()
    (loss, _), = losses(0)
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-4)
    model.train()
    noisy = [float(next(losses(0))[0].detach()) for _ in range(2)]
    assert noisy[0] != noisy[1] and model.config.dropout == .1  # dropout is on here, and only here


def test_pairs_are_cut_alike_and_only_the_chosen_reply_is_imitated(first_step, world, monkeypatch):
    texts = [r["response"] for r in world.data.records("reward", "train")[:40]]
    pairs = [{"prompt": "书", "chosen": a, "rejected": b} for a, b in zip(texts, texts[1:], strict=False)]
    monkeypatch.setattr(type(world.data), "records", lambda *_: pairs)
    model, losses, _ = first_step("reward", "--max_len=128", "--dropout=0", "--label_smoothing=.2")
    with torch.no_grad():
        model.score_head.weight.mul_(20)
    batch = [pairs[i] for i in rows_at(len(pairs), 16, 0, 0, "reward")]
    sides = [judged_rows(batch, world.data.tokenizer, world.data.template, 128, field=field, prefix_share=.3,
                         rng=np.random.default_rng(key(0, "reward", "prefix", 0))) for field in ("chosen", "rejected")]
    finished = [[ids[-1] == world.data.tokenizer.eom_id for ids, _ in side] for side in sides]
    assert finished[0] == finished[1] and 0 < sum(finished[0]) < 16
    chosen, rejected = (judged_batch(side, "cpu") for side in sides)
    tokens, real, reply = chosen
    nats = -token_logprobs(model.backbone(tokens, real)[:, :-1], tokens[:, 1:])[reply[:, 1:]]
    expected = pairwise_loss(model(*chosen), model(*rejected), label_smoothing=.2) + .1 * nats.mean()
    assert float(next(losses(0))[0].detach()) == pytest.approx(float(expected.detach()), rel=1e-4)


@torch.no_grad()
def test_sft_validation_is_a_mean_over_reply_tokens(first_step, world):
    model, _, measure = first_step("sft")
    rows, _ = dialogue_rows(world.data.records("sft", "val"), world.data.tokenizer, world.data.template, 64)
    nats = sum(-float(token_logprobs(model(torch.tensor([ids]))[0, :-1], torch.tensor(ids[1:]))
                      [torch.tensor(learn[1:])].sum()) for ids, learn in rows)
    assert measure(1)["val_loss"] == pytest.approx(nats / sum(sum(learn) for _, learn in rows), rel=1e-4)


@torch.no_grad()
def test_pretraining_validation_counts_real_targets_and_bits(first_step, world):
    model, _, measure = first_step("pretrain")
    val, nats, n = world.data.documents("val"), 0.0, 0
    for batch in eval_windows(val.tokens, val.starts, 64, 32):
        for x, y, docs, real in zip(*batch, strict=True):
            for d in docs[real].unique():
                at = real & (docs == d)
                nats -= float(token_logprobs(model(x[at][None])[0], y[at]).sum())
                n += int(at.sum())
    found, expected = measure(1), (nats / n, nats / math.log(2) / val.n_bytes)
    assert (found["val_loss"], found["val_bpb"]) == pytest.approx(expected, rel=1e-4)


def test_reward_validation_reads_probabilities_and_the_order_of_pairs(world, monkeypatch):
    model = load_checkpoint(world.root / "reward", cls=RewardModel)[0]
    render = dict(tokenizer=world.data.tokenizer, template="{prompt}", max_len=99)
    given = iter([np.array([.2, -.1]), np.array([.2, -.1]), np.array([2., 1, 0]), np.array([1., 0, 3])])
    monkeypatch.setattr(RewardModel, "score_rows", lambda *a, **k: next(given))
    run = types.SimpleNamespace(dtype="float32")
    rated = [{"prompt": "a", "response": "b", "label": y} for y in (1, 0)]
    assert train.reward_measures(model, rated, "label", render, run)["val_accuracy"] == 1  # no score is above one half
    alike = [{**r, "label": 1} for r in rated]
    assert train.reward_measures(model, alike, "label", render, run) == {"val_accuracy": .5}  # nothing to rank
    pairs = [{"prompt": "a", "chosen": "b", "rejected": "c"}] * 3
    assert train.reward_measures(model, pairs, "pairwise", render, run)["val_accuracy"] == pytest.approx(2 / 3)


def test_the_judge_reads_opening_and_reply_of_every_rollout(command, world, monkeypatch, tmp_path):
    seen, real = [], train.collect_rollout
    monkeypatch.setattr(train, "collect_rollout", lambda *a, **k: seen.append((a[3], real(*a, **k))) or seen[-1][1])
    train.train_ppo(command("ppo", "--updates=2"))
    (_, rollout), tokenizer = seen[0], world.data.tokenizer
    asked = world.data.records("ppo", "train")
    openings = [asked[i]["prompt"] for i in rows_at(len(asked), 8, 0, 0, "ppo")]
    P = rollout.tokens.shape[1] - rollout.response_mask.shape[1]
    replies = [tokenizer.decode(i for i in row[mask].tolist() if i != tokenizer.eom_id)
               for row, mask in zip(rollout.tokens[:, P:], rollout.response_mask, strict=True)]
    probs = ngram_classifier(world.data, "judge").probs([a + b for a, b in zip(openings, replies, strict=True)])
    line = [json.loads(x) for x in (tmp_path / "reviews/ppo/metrics.jsonl").read_text().splitlines()][1]
    assert line["judge"] == pytest.approx(float(probs.mean()), abs=1e-4)


def test_the_critic_warms_up_alone_and_held_out_measures_repeat(command, monkeypatch, tmp_path):
    trained, real = [], train.update
    monkeypatch.setattr(train, "update", lambda *a, **k: trained.append(k["train_policy"]) or real(*a, **k))
    train.train_ppo(command("ppo", "--updates=4", "--critic_warmup=2", "--policy_lr=0", "--eval_every=1"))
    assert trained == [False, False, True, True]
    measured = [{k: v for k, v in json.loads(x).items() if k.startswith("eval_")}
                for x in (tmp_path / "reviews/ppo/metrics.jsonl").read_text().splitlines()]
    assert len(measured) == 5 and all(m == measured[0] for m in measured)  # a policy that stands still


def test_labels_that_are_all_the_same_are_refused_before_training(command, world, monkeypatch):
    real = type(world.data).records
    monkeypatch.setattr(type(world.data), "records", lambda self, stage, split: [
        r | {"label": 1} if split == "val" and "label" in r else r for r in real(self, stage, split)])
    with pytest.raises(UserError, match="set aside for validation are the same"):
        train.train_reward(command("reward"))


def test_ppo_steps_by_adam_as_the_options_say(command, monkeypatch):
    made, real = [], torch.optim.Adam
    monkeypatch.setattr(torch.optim, "Adam", lambda *a, **k: made.append(real(*a, **k)) or made[-1])
    train.train_ppo(command("ppo", "--updates=2", "--adam_eps=.003", "--policy_lr=.001", "--critic_lr=.002"))
    policy, critic = made[0].param_groups
    assert (policy["eps"], critic["eps"]) == (.003, .003)
    assert (policy["initial_lr"], critic["initial_lr"]) == (.001, .002)


def test_another_parent_is_another_run(command, world):
    run = Run("sft", command("sft"), {"init": "one"}, world.data, 32)
    run.tokenizer = world.data.tokenizer
    run.progress(0, 2).close()
    run.save(1, small())
    with pytest.raises(UserError, match="init was 'one', is 'two'"):
        Run("sft", command("sft", "--resume"), {"init": "two"}, world.data, 32)


def test_rows_are_capped_at_what_the_parent_was_made_for(command, world):
    o = command("sft")
    o.max_len = 500
    limit_length(o, load_checkpoint(world.root / "pretrain")[0])
    assert o.max_len == 128


def test_no_stage_trains_on_the_judges_half_or_on_test(first_step, world, monkeypatch):
    asked, real = set(), type(world.data).records
    monkeypatch.setattr(type(world.data), "records", lambda self, *a: asked.add(a) or real(self, *a))
    for stage in ("sft", "reward"):
        first_step(stage)
    assert {("reward", "train"), ("sft", "train")} <= asked
    assert not any(stage == "judge" or split == "test" for stage, split in asked)


class Recorder:
    """Stands for a Run."""
    stage, compile = "sft", "off"

    def __init__(self, **options):
        self.o = parse(train.SFTOptions, [f"--{k}={v}" for k, v in options.items()], "x")
        self.state, self.logged, self.saved = {}, [], []
        self.progress = lambda done, n: tqdm(disable=True)
        self.log = lambda step, **m: self.logged.append((step, m))
        self.save = lambda step, model, **_: self.saved.append((step, weights_hash(model)))
        self.seconds, self.stop_if_asked = (lambda: 0.0), (lambda *_: None)
        self.compile_now = lambda *_, **__: False


def small():
    return Transformer(ModelConfig(**SHAPE))


def test_auto_decides_once_by_the_step_before_and_says_so(monkeypatch, capsys):
    monkeypatch.setattr("runtime.device.compiler_fault", lambda device="cpu": "")
    for took, chosen in ((10.0, "on"), (0.5, "off")):
        run = Run.__new__(Run)
        run.stage, run.device, run.compile = "sft", "cpu", "auto"
        run.last_step = 0.0
        assert not run.compile_now(4, 100, decide_at=5) and run.compile == "auto"
        run.last_step -= took
        assert run.compile_now(5, 100, decide_at=5) == (chosen == "on") and run.compile == chosen
        assert f"sft: compile {chosen} (about " in capsys.readouterr().out
        assert not run.compile_now(6, 100, decide_at=6)  # decided is decided


def test_a_loss_that_is_not_finite_names_the_step_and_is_never_stepped_on():
    run, model = Recorder(save_every=1, log_every=1), small()
    losses = lambda step: iter([(model(torch.tensor([[7, 8]])).square().mean() * (math.nan if step == 3 else 1), 2)])
    with pytest.raises(UserError, match="at step 4.*last good checkpoint is kept"):
        train.fit(run, model, 6, losses, lambda step: {})
    assert [s for s, _ in run.saved] == [1, 2, 3] and run.saved[-1][1] == weights_hash(model)


def test_learning_rates_rise_stay_and_fall():
    found = [learning_rate(s, 10, warmup=.2, decay=.5) for s in range(10)]
    assert found == pytest.approx([.5, 1, 1, 1, 1, 1, .8, .6, .4, .2])
    assert learning_rate(9, 10, 0, 1.0, final=.1) == pytest.approx(.1 + .9 * .1)


def test_the_loop_logs_the_rate_it_uses_and_clips_the_gradient():
    run, model, used = Recorder(optimizer="adamw", lr=.1, log_every=1, warmup=.5, decay=.0, clip=.01), small(), []
    real = torch.optim.AdamW.step

    def step(self, *a):
        norm = torch.cat([p.grad.flatten() for g in self.param_groups for p in g["params"]]).norm()
        used.append((self.param_groups[0]["lr"], float(norm)))
        return real(self, *a)
    with pytest.MonkeyPatch.context() as m:
        m.setattr(torch.optim.AdamW, "step", step)
        losses = lambda step: iter([(model(torch.tensor([[7, 8]])).square().mean() * 1e3, 2)])
        train.fit(run, model, 4, losses, lambda step: {})
    assert [lr for lr, _ in used] == pytest.approx([.05, .1, .1, .1]) == [m["lr"] for _, m in run.logged]
    assert all(n == pytest.approx(.01, rel=1e-3) for _, n in used) and run.logged[0][1]["grad_norm"] > .02


def test_muon_trains_the_blocks_matrices_and_adamw_the_rest():
    model = RewardModel(RewardConfig(**SHAPE))
    muon, adamw = make_optimizers(model, parse(train.RewardOptions, [], "x"))
    name = {id(p): n for n, p in model.named_parameters()}
    of = lambda x: {name[id(p)] for g in x.param_groups for p in g["params"]}  # noqa: E731
    matrices = ("qkv.weight", "out.weight", "gate_up.weight", "down.weight")
    assert of(muon) == {n for n in name.values() if ".blocks." in n and n.endswith(matrices)}
    assert of(adamw) == set(name.values()) - of(muon)


def test_lines_past_the_checkpoint_and_half_lines_are_dropped(tmp_path):
    run = Run.__new__(Run)
    run.folder, run.state = tmp_path, {"step": 5}
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n{"step": 5}\n{"step": 6}\n{"step": 5, "lo')
    run._trim("metrics.jsonl")
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 0}\n{"step": 5}\n'


def test_a_resumed_run_keeps_the_precision_that_auto_chose(command, world):
    o = command("sft", "--dtype=auto")
    run = Run("sft", o, {}, world.data, 32)
    run.tokenizer, run.dtype = world.data.tokenizer, "bfloat16"
    run.progress(0, 4).close()
    run.save(3, small())
    again = Run("sft", command("sft", "--dtype=auto", "--resume"), {}, world.data, 32)
    assert (again.dtype, again.state["step"]) == ("bfloat16", 3)


@pytest.mark.parametrize("name", ["sampler_gap", "ratio_start"])
@pytest.mark.parametrize("dtype,limit", [("float32", 1e-4), ("bfloat16", 2e-2)])
def test_a_gap_between_what_is_scored_and_sampled_is_warned_of(command, monkeypatch, capsys, name, dtype, limit):
    where = "rollout_metrics" if name == "sampler_gap" else "update"
    real = getattr(train, where)
    size = iter([limit / 2, 2 * limit])
    monkeypatch.setattr(train, where, lambda *a, **k: real(*a, **k) | {name: next(size)})
    train.train_ppo(command("ppo", "--updates=2", f"--dtype={dtype}"))
    said = capsys.readouterr().err
    assert said.count(f"warning: {name}") == 1 and "at update 2" in said


def test_replies_written_in_int8_are_scored_as_trained_and_given_up_where_too_far_off(command, tmp_path, monkeypatch):
    real, size = train.rollout_metrics, iter([None, 0.06, None])
    monkeypatch.setattr(train, "rollout_metrics", lambda r: real(r) | {
        k: v for k, v in {"sampler_gap": next(size)}.items() if v is not None})
    def stop(self, step, save):
        if step == 2:
            save()
            raise Interrupted(15)
    given = ("--updates=3", "--rollout_dtype=int8", "--dtype=float32")
    with monkeypatch.context() as m:
        m.setattr(Run, "stop_if_asked", stop)
        with pytest.raises(Interrupted):
            train.train_ppo(command("ppo", *given))
    train.train_ppo(command("ppo", *given, "--resume"))  # which knows that int8 was given up
    lines = [json.loads(line) for line in (tmp_path / "reviews/ppo/metrics.jsonl").read_text().splitlines()]
    rounded, given_up, exact = (x for x in lines if "sampler_gap" in x)
    assert 1e-4 < rounded["sampler_gap"] < 5e-2 and exact["sampler_gap"] < 1e-4
    assert given_up["ratio_start"] < 1e-5 and exact["ratio_start"] < 1e-5  # training reads unrounded weights
    state = torch.load(tmp_path / "reviews/ppo/checkpoint.pt", weights_only=True)["state"]
    assert state["decoder_dtype"] == "float32"


def test_ppo_goes_on_after_the_warm_up_as_if_nothing_had_happened(command, world, tmp_path, monkeypatch):
    more = ("--updates=5", "--kl_control=adaptive", "--kl_horizon=50", "--reward_norm=running", "--policy_lr=.01")
    train.train_ppo(command("ppo", *more))
    load = lambda: torch.load(tmp_path / "reviews/ppo/checkpoint.pt", weights_only=True)  # noqa: E731
    whole = load()

    def stop(self, step, save):
        if step == 3:
            raise Interrupted(15)
    with monkeypatch.context() as m:
        m.setattr(Run, "stop_if_asked", stop)
        with pytest.raises(Interrupted):
            train.train_ppo(command("ppo", *more, "--fresh"))
    half = load()
    sft = torch.load(world.root / "sft/checkpoint.pt", weights_only=True)["model"]
    # everything that could be forgotten has moved
    assert half["state"]["step"] == 3 and half["state"]["kl_coef"] != train.PPOOptions.kl_coef
    assert any(not torch.equal(half["model"][k], sft[k]) for k in sft) and half["state"]["moments"]["count"] > 1
    train.train_ppo(command("ppo", *more, "--resume"))
    resumed = load()
    for payload in (whole, resumed):
        payload["state"].pop("seconds")
    assert equal(whole, resumed)


def test_the_shipped_ppo_pays_by_the_trained_reward_model_and_folds_its_constants_once(command, world, monkeypatch):
    first, real = [], train.collect_rollout
    monkeypatch.setattr(train, "collect_rollout", lambda *a, **k: first.append((a, real(*a, **k))) or first[-1][1])
    train.train_ppo(command("ppo", "--updates=2"))
    (actor_critic, reference, judge, *_), rollout = first[0]
    trained = load_checkpoint(world.root / "reward", cls=RewardModel)[0]
    assert weights_hash(judge) == weights_hash(trained) and not judge.training
    assert weights_hash(reference) == load_checkpoint(world.root / "sft")[2]["hash"]  # after two updates, still
    assert (float(actor_critic.critic.mean), float(actor_critic.critic.std)) == (0, 1)


def test_scores_are_normalised_by_replies_of_the_sft_policy(command, world):
    run = train.train_reward(command("reward", "--norm_replies=20"))
    judge, tokenizer, state = load_checkpoint(run.folder, cls=RewardModel)
    sft, data = load_checkpoint(world.root / "sft")[0], world.data
    chosen = [r["prompt"] for r in data.records("ppo", "train")]
    ids = [train.prompt_ids(tokenizer, chosen[i], data.template) for i in rows_at(len(chosen), 20, 0, 0, "reward")]
    replies = train.reply_to(sft, tokenizer, ids, 16, seed=key(0, "reward", "reply"))
    raw = judge.score_replies(ids, replies.tokens, replies.mask)
    assert (float(judge.mean), float(judge.std)) == pytest.approx((raw.mean(), raw.std()), rel=1e-3)
    assert state["norm"] == {"temperature": 1.0, "reply_len": 16} and judge.config.dropout == .1


@pytest.mark.parametrize("stage,words", [("ppo", "--minibatches=0"), ("sft", "--batch=0"), ("sft", "--epochs=0"),
                                         ("sft", "--eval_every=0"), ("sft", "--seed=-1"), ("pretrain", "--n_head=0"),
                                         ("ppo", "--kl_control=adaptive --kl_target=0"),
                                         ("pretrain", "--accumulate=0")])
def test_numbers_out_of_range_are_one_clear_line(command, stage, words, capsys):
    assert run_main(lambda argv: train.STAGE_FUNCTIONS[stage](command(stage, *argv)) and 0, words.split()) == 2


def test_a_damaged_config_is_one_clear_line(command, world, tmp_path):
    (tmp_path / "reviews/sft").mkdir(parents=True)
    (tmp_path / "reviews/sft/checkpoint.pt").touch()
    for damaged in ("", "{}", "[1]"):
        (tmp_path / "reviews/sft/config.json").write_text(damaged)
        with pytest.raises(UserError, match="config.json"):
            Run("sft", command("sft", "--resume"), {}, world.data, 32)


def test_a_run_that_never_began_stands_in_nobodys_way(command):
    with pytest.raises(UserError, match="fits"):
        train.STAGE_FUNCTIONS["sft"](command("sft", "--max_len=16"))
    assert train.STAGE_FUNCTIONS["sft"](command("sft", "--epochs=1")).finished


def test_two_processes_do_not_share_a_folder(command, tmp_path):
    pytest.importorskip("fcntl")
    (tmp_path / "reviews/sft").mkdir(parents=True)
    code = ("import fcntl, sys, time; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print(1, flush=True); "
            "time.sleep(60)")
    other = subprocess.Popen([sys.executable, "-c", code, tmp_path / "reviews/sft/.lock"], stdout=subprocess.PIPE)
    try:
        other.stdout.read(1)
        with pytest.raises(UserError, match="another process"):
            train.STAGE_FUNCTIONS["sft"](command("sft"))
    finally:
        other.kill()
        other.wait()


def test_all_says_before_the_first_stage_what_a_later_one_lacks(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/pretrain.jsonl").write_text("".join(json.dumps({"text": f"text {i}"}) + "\n" for i in range(90)))
    words = ["--preset=smoke", f"--data={tmp_path / 'mine'}", f"--out={tmp_path}", "--vocab_size=270"]
    with pytest.raises(UserError, match="nothing for the stage sft"):
        train.main(words)
    assert not (tmp_path / "mine/pretrain").exists()


def test_prompts_that_leave_no_room_are_told_before_the_reward_model_is_trained(command, monkeypatch):
    monkeypatch.setattr(train, "fit", lambda *a: pytest.fail("trained"))
    with pytest.raises(UserError, match="--reply_len"):
        train.train_reward(command("reward", "--reply_len=127"))


def test_a_kill_between_the_last_save_and_the_end_writes_no_sample_twice(command, tmp_path):
    run = train.train_reward(command("reward", "--norm_replies=20"))
    before = (run.folder / "samples.jsonl").read_text()
    config = json.loads((run.folder / "config.json").read_text())
    (run.folder / "config.json").write_text(json.dumps(config | {"finished": False}))
    train.train_reward(command("reward", "--norm_replies=20", "--resume"))
    assert (run.folder / "samples.jsonl").read_text() == before


def test_fresh_killed_halfway_does_not_look_finished(command):
    words = ("ppo", "--updates=2", "--reward_norm=sigmoid")
    run = train.train_ppo(command(*words))
    (run.folder / "checkpoint.pt").unlink()
    assert not Run("ppo", command(*words, "--resume"), run.parents, run.data, 32).finished


def test_fresh_with_something_wrong_keeps_the_old_run(command, monkeypatch):
    run = train.STAGE_FUNCTIONS["sft"](command("sft", "--epochs=1"))
    before = {path.name: path.read_bytes() for path in run.folder.iterdir()}
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UserError, match="sees no such device"):
        train.STAGE_FUNCTIONS["sft"](command("sft", "--epochs=1", "--fresh", "--device=cuda"))
    with pytest.raises(UserError, match="no dialogue fits"):
        train.STAGE_FUNCTIONS["sft"](command("sft", "--max_len=16", "--fresh"))
    assert {path.name: path.read_bytes() for path in run.folder.iterdir()} == before


def test_the_reward_model_is_measured_on_records_drawn_from_all(command, world, monkeypatch):
    """The file of somebody's own may be sorted, and only some of it is looked at."""
    seen, records = [], world.data.records
    some = records("reward", "val")
    many = [{**some[0], "label": int(i >= 700), "number": i} for i in range(1400)]
    monkeypatch.setattr(world.data, "records", lambda stage, split: many if (stage, split) == ("reward", "val")
                        else records(stage, split))
    monkeypatch.setattr(train, "reward_measures", lambda model, rows, *a: seen.append(rows) or {})

    def caught(run, model, n_steps, losses, measure):
        measure(1)
        raise Caught

    monkeypatch.setattr(train, "fit", caught)
    with pytest.raises(Caught):
        train.train_reward(command("reward"))
    numbers = [r["number"] for r in seen[0]]
    assert len({*numbers}) == 600 and 240 < sum(i >= 700 for i in numbers) < 360
