"""The road of RLHF, one command a stage. Without a word it walks the whole of it.

    python train.py                 all stages on the default data, then a report
    python train.py --preset smoke --out out-smoke      the same in seconds, to see that everything works
    python train.py pretrain        read: predict the next token of plain text
    python train.py sft             obey: predict the reply of dialogues
    python train.py reward          judge: predict what people liked
    python train.py ppo             improve: reply so that the reward model likes it
    python train.py ppo --help      a stage's options, with default, meaning and source

Each stage is one function below. The first three share the loop `fit`; PPO has its own. A stage reads the checkpoint of
its parents and leaves checkpoint.pt, config.json, metrics.jsonl and samples.jsonl in OUT/<data>/<stage>/. Options that
stages share stand in options.py (`Common`, `Learning`); the folder, its log and how a run goes on in run.py (`Run`).
"""
import copy
import dataclasses
import difflib
import math
import sys
import time

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import evaluate
from data.batches import (PackedDocuments, dialogue_rows, eval_windows, fitting, judged_batch,
                          judged_rows, pack_rows, prompt_ids)
from data.judge import ngram_classifier, plain_text
from data.prepare import open_for
from data.prepared import DIALOGUE, NEWS, REVIEW, Prepared
from model import ModelConfig, Transformer, cross_entropy_sum
from ppo import ActorCritic, KLController, PPOOptions, RunningMoments, collect_rollout, rollout_metrics, update
from reward import RewardConfig, RewardModel, RewardOptions, critic_from, feedback_kind, feedback_loss
from runtime.device import compile_trunks, pick_device, precision
from runtime.draws import key, rows_at, torch_seed
from runtime.fit import fit
from runtime.machine import Interrupt, Interrupted, keep_freed_memory
from runtime.optim import learning_rate, set_learning_rate
from runtime.options import Common, Learning, UserError, option, parse, parse_all, run_main
from runtime.run import Run, check_inputs, limit_length, parent, run_folder
from sample import Decoder, reply_texts, reply_to


@dataclasses.dataclass
class PretrainOptions(Learning):
    """`python train.py pretrain`"""

    n_layer: int = option(4, "number of blocks", smoke=2, base=12, low=1)
    n_head: int = option(4, "heads of queries", smoke=2, base=12, low=1)
    n_kv_head: int = option(4, "heads of keys and values, shared by groups of query heads", smoke=1, base=12, low=1)
    d_model: int = option(192, "width of the residual stream", smoke=32, base=768, low=2)
    d_ff: int = option(512, "width inside the MLP", smoke=64, base=2048, low=1)
    max_len: int = option(256, "longest row the model is made for, in tokens", smoke=128, base=1024, low=16)
    tokens: int = option(2_000_000, "tokens to train on", smoke=20_000, base=2_000_000_000, low=1)
    window: int = option(128, "tokens in a row", smoke=64, base=1024, low=2)
    batch: int = option(16, "rows per forward and backward", smoke=8, base=32, low=1)
    accumulate: int = option(1, "batches per optimizer step", base=8, low=1)
    news_share: float = option(0.15, "share of tokens from newspaper text, placed in the first half of training",
                               low=0, high=1)
    dialogue_share: float = option(0.3, "share of tokens from reviews in dialogue form; else SFT learns it badly",
                                   low=0, high=1)
    eval_every: int = option(250, "steps between full passes over validation", smoke=30, base=1000, low=1)

    def check(self) -> None:
        super().check()
        if self.news_share + self.dialogue_share > 1:
            raise UserError(f"pretrain: --news_share {self.news_share} and --dialogue_share {self.dialogue_share} are "
                            "more than 1 together: lower one; what they leave is for plain reviews")


@dataclasses.dataclass
class SFTOptions(Learning):
    """`python train.py sft`"""

    epochs: float = option(1.0, "passes over the dialogues", smoke=1.0, low=0.01)
    batch: int = option(32, "dialogues per step", smoke=16, low=1)
    max_len: int = option(128, "longest dialogue in tokens; longer ones are left out, never cut", smoke=64, base=512,
                          low=16)
    lr: float = option(0.005, "learning rate of block matrices (Muon), or of all (AdamW)", base=0.001, low=0)
    adam_lr: float = option(0.002, "learning rate of embeddings and norms, by AdamW", base=3e-5, low=0)
    decay: float = option(0.9, "share of the steps, the last ones, over which it falls to 0", low=0, high=1)
    eval_every: int = option(150, "steps between measurements on validation", smoke=20, low=1)


def prepared(o: Common) -> Prepared:
    """The data set, made ready where it is not yet."""
    pick_device(o.device)  # one that is not there is better refused before the preparation than after it
    return open_for(o, o.data)


# ---- the loop of maximum likelihood ----------------------------------------------------------------------------------


# ---- stage 1: pretraining --------------------------------------------------------------------------------------------

def pretrain(o: PretrainOptions) -> Run:
    """Maximum likelihood on plain text: θ ← θ + α ∇ Σ log π(next token | tokens before it, of the same document)."""
    if o.init_from or o.reward_from:
        raise UserError("pretrain starts from nothing: --init_from and --reward_from have no effect on it; use them "
                        "with sft, reward or ppo")
    data = prepared(o)
    run = Run("pretrain", o, {"data": data.fingerprint}, data, o.d_model)
    if run.finished:
        return run
    run.tokenizer = data.require_tokenizer()
    config = ModelConfig(vocab_size=run.tokenizer.n_vocab,
                         **{k: getattr(o, k) for k in ("n_layer", "n_head", "n_kv_head", "d_model", "d_ff", "max_len")})
    model = run.model if run.state else Transformer(config)
    if not run.state:
        model.initialise(torch_seed(o.seed, "pretrain", "weights"))
    model.to(run.device)
    train, val = data.documents("train"), data.documents("val")
    shares = {NEWS: o.news_share, REVIEW: 1 - o.news_share - o.dialogue_share, DIALOGUE: o.dialogue_share}
    batches = PackedDocuments(train.tokens, train.starts, train.part, window=o.window, batch=o.batch * o.accumulate,
                              total_tokens=o.tokens, seed=o.seed, shares=shares if train.parts > 1 else None,
                              early={NEWS: 0.5})
    if train.parts < 2:
        o.refuse("news_share", "dialogue_share", why=f"on {o.data}, which is of one kind: it is for reviews")
    if batches.passes > 20:
        print(f"pretrain: warning: {o.tokens} tokens are up to {batches.passes} passes over a part of this data, which "
              "will be learned by heart: bring more text, or lower --tokens", file=sys.stderr)
    print(f"pretrain: {model.n_parameters() / 1e6:.2f} M parameters, {model.flops_per_token(o.window) / 1e6:.1f} MFLOP "
          f"a token, {batches.n_steps} steps of {o.window * o.batch * o.accumulate} tokens", flush=True)

    def losses(step: int):
        for part in zip(*(x.to(run.device).chunk(o.accumulate) for x in batches.batch(step)), strict=True):
            tokens, targets, docs = part
            with precision(run.dtype, run.device):
                hidden = model.hidden(tokens, docs=None if train.single else docs)
                nats = cross_entropy_sum(model, hidden.flatten(0, 1), targets.flatten())
            yield nats / (targets.numel() * o.accumulate), targets.numel()

    def measure(step: int) -> dict[str, float]:
        nats, n = validation_nats(model, val, o.window, 4 * o.batch, run)
        run.samples(step, [{"text": text} for text in free_samples(model, run.tokenizer, o.window // 2, o.seed)])
        return {"val_loss": nats / n, "val_bpb": nats / math.log(2) / val.n_bytes}

    last = fit(run, model, batches.n_steps, losses, measure)
    run.finish(**last)
    return run


@torch.no_grad()
def validation_nats(model: Transformer, split, window: int, batch: int, run: Run) -> tuple[float, int]:
    """Σ −log π over a fixed full pass, and the number of targets."""
    nats, n = 0.0, 0
    for tokens, targets, docs, real in eval_windows(split.tokens, split.starts, window, batch):
        tokens, targets, docs, real = (x.to(run.device) for x in (tokens, targets, docs, real))
        with precision(run.dtype, run.device):
            hidden = model.hidden(tokens, docs=None if split.single else docs)
            nats += float(cross_entropy_sum(model, hidden[real], targets[real]))
        n += int(real.sum())
    return nats, n


def free_samples(model: Transformer, tokenizer, length: int, seed: int, n: int = 4) -> list[str]:
    """What the model writes when it is given only a document's beginning."""
    beginnings = [[tokenizer.eot_id]] * n
    written = reply_to(model, tokenizer, beginnings, length, seed=seed, temperature=0.8)
    return reply_texts(tokenizer, written.tokens, written.mask)


# ---- stage 2: supervised fine-tuning ---------------------------------------------------------------------------------

def sft(o: SFTOptions) -> Run:
    """Maximum likelihood on replies alone: the same loss, only where the loss mask of the dialogue is True."""
    if o.reward_from:
        raise UserError("sft reads no reward model: --reward_from has no effect on it")
    data = prepared(o)
    model, tokenizer, state = parent(o, data, "pretrain", o.init_from)
    limit_length(o, model)
    run = Run("sft", o, {"data": data.fingerprint, "init": state["hash"]}, data, model.config.d_model)
    if run.finished:
        return run
    run.tokenizer = tokenizer
    model = (run.model if run.state else model).to(run.device)
    rows, left_out = dialogue_rows(data.records("sft", "train"), tokenizer, data.template, o.max_len)
    val_rows, _ = dialogue_rows(data.records("sft", "val"), tokenizer, data.template, o.max_len)
    if not rows or not val_rows:
        raise UserError(f"sft: no dialogue fits {o.max_len} tokens: raise --max_len, or pretrain with a larger one")
    n_steps = math.ceil(o.epochs * len(rows) / o.batch)
    print(f"sft: {len(rows)} dialogues ({left_out} of over {o.max_len} tokens left out), {n_steps} steps of {o.batch}",
          flush=True)
    written = min(64, o.max_len // 2)
    prompts = fitting(data.records("ppo", "val"), tokenizer, data.template, model.config.max_len - written)
    examples = [r["prompt"] for r in prompts[:8]]

    def nats(batch) -> tuple[Tensor, int]:
        tokens, flags, docs, _ = (x.to(run.device) for x in pack_rows(batch, o.max_len))
        where = flags[:, 1:].nonzero()  # the state at t predicts token t + 1
        where = where[:, 0] * tokens.shape[1] + where[:, 1]
        with precision(run.dtype, run.device):
            hidden = model.hidden(tokens, docs=docs, where=where)
            return cross_entropy_sum(model, hidden, tokens.flatten()[where + 1]), int(flags.sum())

    def losses(step: int):
        batch = [rows[i] for i in rows_at(len(rows), o.batch, step, o.seed, "sft")]
        loss, n = nats(batch)
        yield loss / n, n

    @torch.no_grad()
    def measure(step: int) -> dict[str, float]:
        parts = [nats(val_rows[i:i + 128]) for i in range(0, len(val_rows), 128)]
        ids = [prompt_ids(tokenizer, p, data.template) for p in examples]
        replies = reply_to(model, tokenizer, ids, written, seed=o.seed)
        texts = reply_texts(tokenizer, replies.tokens, replies.mask)
        run.samples(step, [{"prompt": p, "reply": t} for p, t in zip(examples, texts, strict=True)])
        return {"val_loss": float(sum(x for x, _ in parts)) / sum(n for _, n in parts)}

    last = fit(run, model, n_steps, losses, measure, example_prompts=examples)
    run.finish(**last)
    return run


# ---- stage 3: the reward model ---------------------------------------------------------------------------------------

def train_reward(o: RewardOptions) -> Run:
    """Human feedback becomes a function: the SFT trunk learns to predict what people liked."""
    if o.reward_from:
        raise UserError("reward makes the reward model: --reward_from has no effect on it; --init_from names the trunk")
    data = prepared(o)
    trunk, tokenizer, state = parent(o, data, "sft", o.init_from)
    limit_length(o, trunk)
    run = Run("reward", o, {"data": data.fingerprint, "init": state["hash"]}, data, trunk.config.d_model)
    if run.finished:
        return run
    run.tokenizer = tokenizer
    if run.state:
        model = run.model
    else:
        model = RewardModel(RewardConfig(**{**dataclasses.asdict(trunk.config), "pool": o.pool, "dropout": o.dropout}))
        model.backbone.load_state_dict(trunk.state_dict())
        model.initialise_head(torch_seed(o.seed, "reward", "weights"))
    model.to(run.device)
    policy = trunk.to(run.device)
    render = dict(tokenizer=tokenizer, template=data.template, max_len=o.max_len)
    records, val = (fitting(data.records("reward", split), tokenizer, data.template, render["max_len"] - 8)
                    for split in ("train", "val"))
    prompts = fitting(data.records("ppo" if data.has("ppo") else "reward", "train"), tokenizer, data.template,
                      policy.config.max_len - o.reply_len)
    kind = feedback_kind(records[0]) if o.loss == "auto" else o.loss
    if kind != feedback_kind(records[0]):
        raise UserError(f"--loss {o.loss} does not fit these records, which are for {feedback_kind(records[0])}: "
                        "use --loss auto")
    if kind == "label" and not data.has_labels("reward", "val"):
        raise UserError("reward: all labels set aside for validation are the same, so that nothing can be measured: "
                        "bring more records, or a file reward_val.jsonl with both")
    if kind != "pairwise":
        o.refuse("label_smoothing", why=f"on records for {kind}: it is for pairs")
    n_steps = math.ceil(o.epochs * len(records) / o.batch)
    print(f"reward: {len(records)} records ({kind}), {n_steps} steps of {o.batch}", flush=True)

    def losses(step: int):
        batch = [records[i] for i in rows_at(len(records), o.batch, step, o.seed, "reward")]
        fields = ("chosen", "rejected") if kind == "pairwise" else ("response",)
        sides = [judged_rows(batch, **render, field=field, prefix_share=o.prefix_share,
                             rng=np.random.default_rng(key(o.seed, "reward", "prefix", step))) for field in fields]
        rows = [row for side in sides for row in side]
        tokens, flags, docs, where = (x.to(run.device) for x in pack_rows(rows, render["max_len"]))
        _, real, reply = judged_batch(rows, run.device)
        with precision(run.dtype, run.device):
            hidden = model.backbone.hidden(tokens, docs=docs)
            scores = model.pool(model.head_values(hidden).flatten()[where], real, reply)
            loss = feedback_loss(kind, scores, batch, o.label_smoothing)
            if o.lm_coef:
                worth = (flags & (docs < len(batch)))[:, 1:]  # of a pair, only the chosen reply is worth imitating
                nats = cross_entropy_sum(model.backbone, hidden[:, :-1][worth], tokens[:, 1:][worth])
                loss = loss + o.lm_coef * nats / worth.sum()
        yield loss, int(real.sum())

    def measure(step: int, subset: int = 600) -> dict[str, float]:
        some = rows_at(len(val), min(subset, len(val)), 0, o.seed, "reward")  # not the first: a file may be sorted
        return reward_measures(model, [val[i] for i in some], kind, render, run)

    last = fit(run, model, n_steps, losses, measure)
    if kind == "label":  # on validation; the test texts are scored once, by the report
        found = evaluate.score_reward_model(model, data, "val", tokenizer, render["max_len"])
        print(evaluate.table(evaluate.reward_table(found), evaluate.REWARD_COLUMNS), flush=True)
    chosen = rows_at(len(prompts), o.norm_replies, 0, o.seed, "reward")
    ids = [prompt_ids(tokenizer, prompts[i]["prompt"], data.template) for i in chosen]
    replies = reply_to(policy, tokenizer, ids, o.reply_len, temperature=o.temperature, batch_size=128,
                       seed=key(o.seed, "reward", "reply"))
    raw = torch.from_numpy(model.score_replies(ids, replies.tokens, replies.mask, run.dtype))
    model.set_normalisation(raw)
    texts = reply_texts(tokenizer, replies.tokens, replies.mask)
    run.samples(n_steps + 1, [{"prompt": prompts[i]["prompt"], "reply": texts[k], "raw_score": round(float(raw[k]), 3)}
                              for k, i in enumerate(chosen[:32])])  # a resumed run drops these and writes them again
    run.save(n_steps, model, measured=last, feedback=kind,
             norm={"temperature": o.temperature, "reply_len": o.reply_len})
    run.finish(**last, mean=float(model.mean), std=float(model.std))
    return run


def reward_measures(model: RewardModel, records: list[dict], kind: str, render: dict, run: Run) -> dict[str, float]:
    """On validation: how often the model agrees with people."""
    if kind == "pairwise":
        chosen, rejected = (model.score_rows(judged_rows(records, **render, field=f), run.dtype)
                            for f in ("chosen", "rejected"))
        return {"val_accuracy": float((chosen > rejected).mean())}
    scores = model.score_rows(judged_rows(records, **render), run.dtype)
    if kind == "regression":
        return {"val_correlation": float(np.corrcoef(scores, [r["score"] for r in records])[0, 1])}
    labels = np.array([r["label"] for r in records])
    found = {"val_accuracy": evaluate.accuracy(1 / (1 + np.exp(-scores)), labels)}
    return found if labels.min() == labels.max() else {"val_auc": evaluate.auc(scores, labels), **found}


# ---- stage 4: PPO ----------------------------------------------------------------------------------------------------

def train_ppo(o: PPOOptions) -> Run:
    """J(π) = E[Σ γᵗ r]: reply, score, find out which tokens were better than expected, make those likelier; again."""
    data = prepared(o)
    policy, tokenizer, state = parent(o, data, "sft", o.init_from)
    reward_model, reward_tokenizer, reward_state = parent(o, data, "reward", o.reward_from, RewardModel)
    tokenizer.require_same(reward_tokenizer, "the policy and the reward model")
    if "feedback" not in reward_state:
        raise UserError(f"{o.reward_from}: a reward model without its scores' mean and spread, which are measured when "
                        "its training ends: go on with `python train.py reward --resume`")
    log_odds = reward_state["feedback"] == "label"
    if o.reward_norm == "auto":
        o.reward_norm = "logsigmoid" if log_odds else "fixed"
    elif "sigmoid" in o.reward_norm and not log_odds:
        raise UserError(f"--reward_norm {o.reward_norm} reads raw scores as log-odds, but this reward model learned "
                        f"from feedback for {reward_state['feedback']}: use fixed or running")
    parents = {"data": data.fingerprint, "init": state["hash"], "reward": reward_state["hash"]}
    run = Run("ppo", o, parents, data, policy.config.d_model)
    if run.finished:
        return run
    for name, value in reward_state.get("norm", {}).items():
        if "sigmoid" not in o.reward_norm and getattr(o, name) != value:
            print(f"ppo: warning: the reward model's mean and spread were taken at {name} {value}, not "
                  f"{getattr(o, name)}", file=sys.stderr)
    run.tokenizer = tokenizer
    reference = copy.deepcopy(policy).requires_grad_(False).to(run.device)
    reward_model = reward_model.requires_grad_(False).to(run.device)
    if run.state:
        policy = run.model
    critic = critic_from(reward_model) if o.critic == "separate" else None
    actor_critic = ActorCritic(policy, critic).to(run.device)
    for trained in (policy, *([critic.backbone] if critic else [])):
        trained.recompute = o.recompute
    groups = [{"params": list(policy.parameters()), "lr": o.policy_lr},
              {"params": actor_critic.critic_parameters(), "lr": o.critic_lr}]
    optimizer = torch.optim.Adam(groups, eps=o.adam_eps, fused=True)
    moments = RunningMoments(**run.state.get("moments", {}))
    control = KLController(run.state.get("kl_coef", o.kl_coef), o.kl_target if o.kl_control == "adaptive" else None,
                           o.kl_horizon)
    if run.state:
        (critic or actor_critic.value_head).load_state_dict(run.state["critic"])
        optimizer.load_state_dict(run.state["optimizer"])
    judge = ngram_classifier(data, "judge") if data.has("judge") else None
    room = min(policy.config.max_len, reward_model.config.max_len) - o.reply_len
    prompts, held_out = ([r["prompt"] for r in fitting(data.records("ppo", split), tokenizer, data.template, room)]
                         for split in ("train", "val"))
    held_out = held_out[:o.eval_prompts]
    tolerance = {"float32": 1e-4, "bfloat16": 2e-2, "int8": 5e-2}
    done = run.state.get("step", 0)
    decoder_dtype = run.state.get("decoder_dtype", run.dtype if o.rollout_dtype == "auto" else o.rollout_dtype)

    def made_ready() -> Decoder:
        """The policy ready to write; when compiling pays, the networks' shared trunk is compiled, too."""
        if run.compile == "on":
            compile_trunks(policy, reference, reward_model.backbone, *([critic.backbone] if critic else []))
        return Decoder(policy, decoder_dtype, compile=run.compile == "on")

    decoder = made_ready()

    def save() -> None:
        run.save(step, policy, critic=(critic or actor_critic.value_head).state_dict(),
                 optimizer=optimizer.state_dict(), moments=moments.state(), kl_coef=control.coef,
                 decoder_dtype=decoder_dtype, example_prompts=held_out[:8])

    def measure() -> dict[str, float]:
        """On the same held-out prompts, with the same random numbers, each time."""
        found, replies, _ = evaluate.measure_policy(
            policy, reference, tokenizer, held_out, data.template, reward_model=reward_model, judge=judge,
            reply_len=o.reply_len, temperature=o.temperature, dtype=run.dtype)
        run.samples(step, replies[:12])
        names = ("raw_score", "judge", "judged_positive", "kl", "length", "end_rate", "distinct2", "ref_perplexity")
        return {f"eval_{k}": found[k] for k in names if k in found}

    step, metrics = done, {}
    with run.progress(done, o.updates) as bar:
        if done == 0:
            run.log(0, **measure())
        for step in range(done, o.updates):
            decoder.refresh()
            train_policy, first = step >= o.critic_warmup, o.critic_warmup
            factor = learning_rate(step - first, o.updates - first, o.warmup, 1.0, o.final_lr) if train_policy else 1.0
            set_learning_rate([optimizer], factor)
            chosen = rows_at(len(prompts), o.batch, step, o.seed, "ppo")
            ids = [prompt_ids(tokenizer, prompts[i], data.template) for i in chosen]
            rollout = collect_rollout(actor_critic, reference, reward_model, ids, o, end_id=tokenizer.eom_id, step=step,
                                      kl_coef=control.coef, moments=moments, dtype=run.dtype, decoder=decoder)
            learned = update(actor_critic, optimizer, rollout, o, step, train_policy=train_policy, dtype=run.dtype)
            metrics = rollout_metrics(rollout) | learned
            if train_policy:
                control.update(metrics["kl"], o.batch)
            if judge is not None:
                P = rollout.tokens.shape[1] - rollout.response_mask.shape[1]
                texts = reply_texts(tokenizer, rollout.tokens[:, P:], rollout.response_mask)
                probs = judge.probs([plain_text({"prompt": prompts[i], "response": text})
                                     for i, text in zip(chosen, texts, strict=True)])
                metrics |= {"judge": float(probs.mean()), "judged_positive": float((probs > 0.5).mean())}
            for name, precise in (("ratio_start", run.dtype), ("sampler_gap", decoder_dtype)):
                if metrics.get(name, 0) > (limit := max(tolerance[run.dtype], tolerance[precise])):
                    tqdm.write(f"ppo: warning: {name} is {metrics[name]:.1e}, above {limit:g}, at update "
                               f"{step + 1}: what is scored is not what was sampled", file=sys.stderr)
            if metrics["sampler_gap"] > 5e-2 and decoder_dtype != "float32":
                tqdm.write("ppo: from now on replies are written in float32", file=sys.stderr)
                decoder_dtype = "float32"
                decoder = made_ready()
            step += 1
            if run.compile_now(step, o.updates, decide_at=first + 2):
                decoder = made_ready()
            if step % o.eval_every == 0 or step == o.updates:
                metrics |= measure()
            seconds = {"seconds_generate": rollout.seconds["generate"], "seconds_score": rollout.seconds["score"]}
            run.log(step, **metrics, **seconds, lr=factor * o.policy_lr * train_policy,
                    critic_lr=factor * o.critic_lr, seconds=run.seconds(),
                    generate_tokens_per_s=metrics["reply_tokens"] / seconds["seconds_generate"],
                    train_tokens_per_s=metrics["trained_tokens"] / metrics["seconds_train"])
            bar.update()
            bar.set_postfix({k: f"{metrics[k]:.2f}" for k in ("score", "judged_positive", "kl", "length", "end_rate")
                             if k in metrics})
            if step % o.save_every == 0 or step == o.updates:
                save()
            run.stop_if_asked(step, save)
    run.finish(**{k: v for k, v in metrics.items() if k.startswith("eval_")})
    return run


# ---- all stages ------------------------------------------------------------------------------------------------------

STAGE_OPTIONS = {"pretrain": PretrainOptions, "sft": SFTOptions, "reward": RewardOptions, "ppo": PPOOptions}
STAGE_FUNCTIONS = {"pretrain": pretrain, "sft": sft, "reward": train_reward, "ppo": train_ppo}


def run_all(options: dict[str, Common]) -> None:
    """Run what is missing, in order; then compare the policy before and after, and write report.json and report.md."""
    start = time.perf_counter()
    given, judge = options["sft"].init_from, options["ppo"].reward_from
    brought = {"pretrain": given, "reward": judge}
    check_inputs(prepared(options["ppo"]), [stage for stage in STAGE_FUNCTIONS if not brought.get(stage)], judge)
    for stage, function in STAGE_FUNCTIONS.items():
        o = options[stage]
        o.resume = not o.fresh
        o.init_from = given if stage == "sft" else ""  # what comes after starts from this run's sft
        o.reward_from = judge if stage == "ppo" else ""
        if brought.get(stage):
            print(f"{stage}: skipped, its model is {brought[stage]}")
        else:
            function(o)
    o = options["ppo"]
    evaluate.write_report(prepared(o), run_folder(o, ""), reply_len=o.reply_len, temperature=o.temperature, seed=o.seed,
                          device=pick_device(o.device), n_prompts=o.report_prompts, seconds=time.perf_counter() - start)


def main(argv: list[str]) -> int:
    stage, rest = (argv[0], argv[1:]) if argv and not argv[0].startswith("-") else ("all", argv)
    if stage not in (*STAGE_FUNCTIONS, "all"):
        near = difflib.get_close_matches(stage, [*STAGE_FUNCTIONS, "all"], 1)
        raise UserError(f"unknown stage {stage!r}{f'; did you mean {near[0]}?' if near else ''}: use all, "
                        f"{', '.join(STAGE_FUNCTIONS)}")
    Interrupt.install()
    keep_freed_memory()
    try:
        if stage == "all":
            run_all(parse_all(Common, STAGE_OPTIONS, rest, "train.py"))
        else:
            o = parse(STAGE_OPTIONS[stage], rest, f"train.py {stage}")
            o.refuse("report_prompts", why=f"on {stage} alone: it is for the report of `train.py all`")
            run = STAGE_FUNCTIONS[stage](o)
            if run.finished and run.seconds_before == 0 and not hasattr(run, "tokenizer"):
                print(f"{stage}: finished already in {run.folder}; --fresh trains it anew")
    except Interrupted as stop:
        return 128 + stop.args[0]
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main, sys.argv[1:]))
