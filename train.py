"""The road of RLHF, one command a stage; without arguments, all of it.

    python train.py                 all stages on the default data, then a report
    python train.py --preset smoke --out out-smoke      the same in seconds, to see that everything works
    python train.py pretrain        read: predict the next token of plain text
    python train.py sft             obey: predict the reply of dialogues
    python train.py reward          score: predict what people liked
    python train.py ppo             improve: reply so that the reward model likes it
    python train.py judge           check: predict what other people liked, for the report alone
    python train.py best            after that: learn the best of n replies, by the reward model
    python train.py loop            round after round: ask people, learn what they like, improve, ask again
    python train.py --list          stages, data sets, presets, and what exists under out/
    python train.py ppo --help      a stage's options, with default, meaning and source

The first two stages are written out here, `reward` in reward.py and `ppo` in ppo.py; `judge` is
`reward` on the judge's half of the labels; `best` (tools/best.py) is `sft` on replies of its own, and
`loop` (serve/loop.py) calls the other stages round after round. All but `ppo` share the training loop of
runtime/fit.py. A stage reads the checkpoints of its parents and leaves checkpoint.pt, config.json,
metrics.jsonl and samples.jsonl in OUT/<data>/<stage>/. A new stage is a function of its options, added
to STAGES here, to PARENTS in data/parents.py and, for its random draws, in runtime/draws.py.
"""
import runtime  # noqa: F401 (before torch: it sets how threads wait)
import dataclasses
import importlib
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

import evaluate
from convert.importing import with_checkpoints
from data.batches import (dialogue_rows, eval_windows, held_out_prompts, pack_rows, prompt_ids, text_batches,
                          warn_of_passes)
from data.dataset import SPLITS
from data.feedback import require_records
from data.overview import ListOptions, overview
from data.parents import PARENTS, like_parent, limit_length, refuse_judge, require_lengths
from data.prepare import kept_input, known_max_len, open_for, open_stage, recounted
from data.prepared import Prepared
from data.rewards import read_reward, settled
from model import (ModelConfig, Transformer, cross_entropy_sum, load_checkpoint, load_parent, next_token_loss,
                   open_run)
from ppo import PPOOptions, train_ppo
from reward import RewardModel, RewardOptions, train_reward
from runtime.commands import parse_command, prepare_machine
from runtime.device import pick_device, precision
from runtime.draws import batch_indices, torch_seed
from runtime.fit import fit, steps_of
from runtime.machine import Interrupt, Interrupted, keep_freed_memory, release_memory
from runtime.options import Common, MaximumLikelihoodOptions, UserError, as_dict, option, parse, run_main
from runtime.run import Run, read_config, run_folder
from runtime.terminal import memory_advice
from sample import reply_texts, reply_to


# ---- stage 1: pretraining ------------------------------------------------------------------------

@dataclasses.dataclass
class PretrainOptions(MaximumLikelihoodOptions):
    """`python train.py pretrain`"""

    TOTAL: ClassVar = "tokens"
    IGNORED: ClassVar = ("train_layers", "lora_rank", "lora_alpha", "records")  # a new model learns as a whole
    PRESETS: ClassVar = {  # what differs from the defaults, which are the preset `demo`
        "smoke": dict(n_layer=2, n_head=2, n_kv_head=1, d_model=32, d_ff=64, max_len=128,
                      tokens=20_000, window=64, batch=8, eval_every=30),
        "base": dict(n_layer=12, n_head=12, n_kv_head=12, d_model=768, d_ff=2048, max_len=1024,
                     tokens=2_000_000_000, window=1024, batch=32, accumulate=8, eval_every=1000),
    }

    # The model.
    n_layer: int = option(4, "number of blocks", low=1, high=1000)
    n_head: int = option(4, "query heads", low=1, high=1000)
    n_kv_head: int = option(4, "key and value heads, each shared by a group of query heads", low=1, high=1000)
    d_model: int = option(192, "width of the residual stream", low=2, high=100_000)
    d_ff: int = option(512, "width inside the MLP", low=1, high=1_000_000)
    max_len: int = option(256, "longest row that the model supports, in tokens", low=16, high=1_000_000)
    # The training.
    tokens: int = option(2_000_000, "tokens to train on", low=1)
    window: int = option(128, "tokens per row", low=2, high=1_000_000)
    batch: int = option(16, "rows per forward and backward", low=1, high=1_000_000)
    accumulate: int = option(1, "batches per optimizer step", low=1, high=1_000_000)
    mixture: str = option("", "shares of the data set's parts, such as news=.15,dialogue=.3; the "
                              "other parts take what is left; empty: the data set's own")
    eval_every: int = option(250, "steps between full passes over validation", low=1)

    def check(self) -> None:
        super().check()
        if self.preset == "real" and not self.init_from:
            raise UserError("--preset real is for a model of others, which is not pretrained: name it by --init_from")
        self.shape(known_max_len(self) or max(self.max_len, self.window))

    def shape(self, max_len: int, vocab_size: int = 4096) -> ModelConfig:
        """The model's; UserError if it does not divide, or has no room for --window."""
        if self.window > max_len:
            raise UserError(f"pretrain: --window {self.window} contradicts --max_len {max_len}, the longest row that "
                            "the model is made for: lower --window, or raise --max_len")
        sizes = {name: getattr(self, name) for name in ("n_layer", "n_head", "n_kv_head", "d_model", "d_ff")}
        return ModelConfig(vocab_size=vocab_size, max_len=max_len, **sizes)


class PretrainTask:
    """Batches, loss and measures of pretraining, as runtime/fit.py asks for them."""

    def __init__(self, run: Run, data: Prepared):
        o = self.o = run.o
        self.run, self.val = run, data.documents("val")
        self.batches = text_batches(data, o.window, o.batch * o.accumulate, o.tokens, o.seed, o.mixture)
        self.n_steps, self.extra, self.best_by = self.batches.n_steps, {}, ("val_loss", -1)

    def losses(self, step: int) -> Iterator[tuple[Tensor, int]]:
        """Mean −log π(next token | tokens before it, of the same document), in o.accumulate parts.
        """
        batch = (x.to(self.run.device).chunk(self.o.accumulate) for x in self.batches.batch(step))
        for tokens, targets, docs in zip(*batch, strict=True):
            with precision(self.run.dtype, self.run.device):
                loss = next_token_loss(self.run.model, tokens, targets, None if self.batches.single else docs)
            yield loss / self.o.accumulate, targets.numel()

    def measure(self, step: int) -> dict[str, float]:
        """Nats a token and bits a byte of validation text; free texts go into samples.jsonl."""
        nats, n = self.validation_nats()
        self.run.samples(step, [{"text": text} for text in self.free_texts()])
        return {"val_loss": nats / n, "val_bpb": nats / math.log(2) / self.val.n_bytes}

    @torch.no_grad()
    def validation_nats(self) -> tuple[float, int]:
        """(Σ −log π over a fixed full pass, the number of targets)."""
        nats, n, model, device = 0.0, 0, self.run.model, self.run.device
        for arrays in eval_windows(self.val.tokens, self.val.starts, self.o.window, 4 * self.o.batch):
            tokens, targets, docs, real = (x.to(device) for x in arrays)
            with precision(self.run.dtype, device):
                hidden = model.hidden(tokens, docs=None if self.val.single else docs)
                nats += float(cross_entropy_sum(model, hidden[real], targets[real]))
            n += int(real.sum())
        return nats, n

    def free_texts(self, n: int = 4) -> list[str]:
        """What the model writes after the token that begins a document."""
        tokenizer = self.run.tokenizer
        return reply_texts(tokenizer, reply_to(self.run.model, tokenizer, [[tokenizer.eot_id]] * n,
                                               self.o.window // 2, seed=self.o.seed, temperature=0.8))


def new_model(o: PretrainOptions, vocab_size: int) -> Transformer:
    """An untrained model of the options' shape, its weights drawn by the seed."""
    model = Transformer(o.shape(o.max_len, vocab_size))
    model.initialise(torch_seed(o.seed, "pretrain", "weights"))
    return model


@memory_advice("lower --batch (and raise --accumulate as much) or --window, or add --recompute")
def pretrain(o: PretrainOptions) -> Run | None:
    """Maximum likelihood on plain text: θ ← θ + α ∇ Σ log π(next token | tokens before it, of the
    same document)."""
    if o.init_from or o.reward_from:
        raise UserError("pretrain starts from nothing: --init_from and --reward_from have no "
                        "effect on it; use them with sft, reward or ppo")
    data, o = open_stage(o, "pretrain")
    tokenizer = data.require_tokenizer()
    run = open_run("pretrain", o, data, {}, new_model(o, tokenizer.n_vocab), tokenizer)
    if run is None:
        return None
    task = PretrainTask(run, data)
    warn_of_passes(task.batches, o.tokens)
    print(f"pretrain: {run.model.n_parameters() / 1e6:.2f} M parameters, "
          f"{run.model.flops_per_token(o.window) / 1e6:.1f} MFLOP a token, {task.n_steps} steps of "
          f"{o.window * o.batch * o.accumulate} tokens", flush=True)
    run.finish(**fit(run, task))
    return run


# ---- stage 2: supervised fine-tuning -------------------------------------------------------------

@dataclasses.dataclass
class SFTOptions(MaximumLikelihoodOptions):
    """`python train.py sft`"""

    TOTAL: ClassVar = "epochs"
    PRESETS: ClassVar = {  # what differs from the defaults, which are the preset `demo`
        "smoke": dict(batch=16, max_len=64, eval_every=20),
        "base": dict(max_len=512, lr=0.001, adam_lr=3e-5),
        "real": dict(batch=16, lr=3e-4),
        "smollm": dict(init_from="smollm2-135m", records=2000, eval_dialogues=300),
    }

    epochs: float = option(1.0, "passes over the dialogues", low=0.01, high=1e6)
    batch: int = option(32, "dialogues per step", low=1, high=1_000_000)
    max_len: int = option(128, "longest dialogue in tokens; longer ones are dropped, never truncated", low=16,
                          high=1_000_000)
    lr: float = option(0.005, "learning rate of block matrices (muon) or of everything (adamw)", low=0)
    adam_lr: float = option(0.002, "AdamW's learning rate for embeddings and norms", low=0)
    decay: float = option(0.9, "share of the steps, at the end, over which the rate falls to 0", low=0, high=1)
    eval_every: int = option(150, "steps between measurements on validation", low=1)
    eval_dialogues: int = option(3000, "dialogues of validation measured then, at most; the seed draws them", low=1)


class SFTTask:
    """Batches, loss and measures of fine-tuning, as runtime/fit.py asks for them."""

    NOTHING = "no dialogue fits {} tokens: raise --max_len, or pretrain with a larger one"

    def __init__(self, run: Run, data: Prepared, records: Sequence[list[dict]] | None = None):
        """records: those to learn and those of validation; None: the data set's."""
        o = self.o = run.o
        self.run, self.template = run, data.template
        (self.rows, self.left_out), (self.val_rows, _) = (
            dialogue_rows(of_split, run.tokenizer, data.template, o.max_len)
            for of_split in records or [data.records("sft", split) for split in SPLITS[:2]])
        if not self.rows or not self.val_rows:
            raise UserError(f"{run.stage}: {self.NOTHING.format(o.max_len)}")
        if len(self.val_rows) > o.eval_dialogues:
            index = batch_indices(len(self.val_rows), o.eval_dialogues, 0, o.seed, run.stage)
            self.val_rows = [self.val_rows[i] for i in index]
        self.n_steps = steps_of(o, len(self.rows))
        self.reply_len = min(64, o.max_len // 2)
        self.examples = held_out_prompts(data, "val", run.tokenizer, run.model.config.max_len - self.reply_len, 8)
        self.extra, self.best_by = {"example_prompts": self.examples}, ("val_loss", -1)

    def nats(self, rows: list) -> tuple[Tensor, int]:
        """(Σ −log π of the learned tokens, their number); rows are packed side by side."""
        tokens, learned, docs, _ = (x.to(self.run.device) for x in pack_rows(rows, self.o.max_len))
        where = learned[:, 1:].nonzero()  # the state at t predicts token t + 1
        where = where[:, 0] * tokens.shape[1] + where[:, 1]
        with precision(self.run.dtype, self.run.device):
            hidden = self.run.model.hidden(tokens, docs=docs, where=where)
            return cross_entropy_sum(self.run.model, hidden,
                                     tokens.flatten()[where + 1]), int(learned.sum())

    def losses(self, step: int) -> Iterator[tuple[Tensor, int]]:
        """Mean −log π over the batch's learned tokens."""
        index = batch_indices(len(self.rows), self.o.batch, step, self.o.seed, self.run.stage)
        nats, n = self.nats([self.rows[i] for i in index])
        yield nats / n, n

    @torch.no_grad()
    def measure(self, step: int) -> dict[str, float]:
        """Nats a reply token on validation; replies to a few prompts go into samples.jsonl."""
        at_once = 4 * self.o.batch
        parts = [self.nats(self.val_rows[i:i + at_once]) for i in range(0, len(self.val_rows), at_once)]
        ids = [prompt_ids(self.run.tokenizer, prompt, self.template) for prompt in self.examples]
        texts = reply_texts(self.run.tokenizer, reply_to(self.run.model, self.run.tokenizer, ids,
                                                         self.reply_len, seed=self.o.seed, dtype=self.run.dtype))
        self.run.samples(step, [{"prompt": p, "reply": t} for p, t in zip(self.examples, texts, strict=True)])
        return {"val_loss": float(sum(nats for nats, _ in parts)) / sum(n for _, n in parts)}


@memory_advice("lower --batch or --max_len, or add --recompute")
def sft(o: SFTOptions) -> Run | None:
    """Maximum likelihood on replies alone: the same loss, only where the loss mask of the dialogue
    is True."""
    if o.reward_from:
        raise UserError("sft reads no reward model: --reward_from has no effect on it")
    data, o = open_stage(o, "sft")
    model, tokenizer, state = load_parent(o, data, "pretrain", o.init_from)
    o = limit_length(recounted(o, "sft", data, tokenizer), model.config)  # lengths in the parent's vocabulary
    run = open_run("sft", o, data, {"init": state["hash"]}, model, tokenizer)
    if run is None:
        return None
    task = SFTTask(run, data)
    print(f"sft: {len(task.rows)} dialogues ({task.left_out} of over {o.max_len} tokens left out), "
          f"{task.n_steps} steps of {o.batch}", flush=True)
    run.finish(**fit(run, task))
    return run


# ---- stage 3: the reward model -------------------------------------------------------------------

@memory_advice("lower --batch or --max_len, or add --recompute")
def reward(o: RewardOptions) -> Run | None:
    """`train_reward`, and the model's table beside plain baselines, on validation."""
    if o.evaluate:
        return evaluate.measure_on_file(o, "reward")
    refuse_judge(o.strength_from)
    run = train_reward(o)
    data = open_for(o, o.data)
    if run is not None and data.feedback("val"):
        evaluate.print_validation_table(run_folder(run.o, "reward"), data, pick_device(run.o.device))
    return run


# ---- the judge, and PPO, which is never trained against it -----------------------------------------

@dataclasses.dataclass
class JudgeOptions(RewardOptions):
    """`python train.py judge`"""

    PRESETS: ClassVar = {"smollm": dict(init_from="smollm2-135m", records=2400)}

    epochs: float = option(1.0, "passes over the training records", low=0.01, high=1e6,
                           source="one for time; AUC on reviews' validation, seed 0: .919, of two passes .931")


@memory_advice("lower --batch or --max_len, or add --recompute")
def judge(o: JudgeOptions) -> Run | None:
    """A second judge of policies, which reads whole texts where the n-grams read pieces: the
    pretrained trunk (not the policy's) learns the judge's half of the labels."""
    if o.evaluate:
        return evaluate.measure_on_file(o, "judge")
    o.refuse("strength_from", why="on a judge, which owes nothing to a reward model")
    return train_reward(o, stage="judge", parent="pretrain")


@memory_advice("lower --micro_batch, --rollout_rows or --reply_len, or add --recompute")
def ppo(o: PPOOptions) -> Run | None:
    """`train_ppo`, unless its reward model is the judge."""
    refuse_judge(o.reward_from)
    return train_ppo(o)


# ---- all stages ----------------------------------------------------------------------------------

STAGES: dict[str, tuple[type, Callable[[Any], Run | None]]] = {
    "pretrain": (PretrainOptions, pretrain),
    "sft": (SFTOptions, sft),
    "reward": (RewardOptions, reward),
    "ppo": (PPOOptions, ppo),
    "judge": (JudgeOptions, judge),
}
ROAD = {stage: cls for stage, (cls, _) in STAGES.items()}  # what `all` runs


def commands() -> dict[str, tuple[type, Callable[[Any], Run | None]]]:
    """STAGES and `best`, which stands above this chapter and is imported where it is asked for."""
    above = importlib.import_module("tools.best")
    return STAGES | {"best": (above.BestOptions, above.best)}


def run_all(options: dict[str, Common]) -> None:
    """Run what is missing, in order; then compare the policy before and after, and write the
    report."""
    start = time.perf_counter()
    init_from, reward_from = options["sft"].init_from, options["ppo"].reward_from
    brought = {"pretrain": init_from, "reward": reward_from}
    data = open_for(options["ppo"], options["ppo"].data)
    require_lengths(options, known_max_len(options["pretrain"], data))
    terms = read_reward(options["ppo"].reward)
    needed = {"judge": data.has("judge"), "reward": settled(options["ppo"], terms, data)}
    stages = [stage for stage in ROAD if needed.get(stage, True)]
    require_inputs(data, [stage for stage in stages if not brought.get(stage)], reward_from)
    for stage in stages:
        if brought.get(stage):
            print(f"{stage}: skipped, its model is {brought[stage]}")
            continue
        o = options[stage]  # sft and the judge start from the pretrained model, the others from sft
        STAGES[stage][1](o.replace(resume=not o.fresh, init_from=init_from if stage in ("sft", "judge") else "",
                                   reward_from=reward_from if stage == "ppo" else ""))
        release_memory()
    o = options["ppo"]  # the report's replies are drawn as PPO's
    sampled = (read_config(run_folder(o, "ppo")) or {}).get("options", as_dict(o))
    settings = evaluate.ReplySettings(sampled["reply_len"], sampled["temperature"])
    evaluate.write_report(data, run_folder(o, ""), seed=o.seed, settings=settings,
                          n_prompts=o.report_prompts, device=pick_device(o.device), seconds=time.perf_counter() - start)


def require_inputs(data: Prepared, stages: list[str], reward_from: str) -> None:
    """`require_records`, and UserError if the reward model is none."""
    require_records(data, stages)
    if reward_from:  # what the first stage starts from is soon looked at
        load_checkpoint(reward_from, "cpu", RewardModel)
    refuse_judge(reward_from)


def main(argv: list[str]) -> int:
    if "--list" in argv:
        o = parse(ListOptions, argv, "train.py --list")
        print(overview({stage: cls for stage, (cls, _) in commands().items()}, __doc__ or "", o.out))
        return 0
    Interrupt.install()
    keep_freed_memory()
    try:
        if argv[:1] == ["loop"]:  # it stands above this chapter, and is imported where it is asked for
            return importlib.import_module("serve.loop").main(argv[1:])
        stage, options = parse_command(argv, {name: cls for name, (cls, _) in commands().items()}, ROAD, "train.py")
        all_stages = stage == "all"
        data = kept_input([*options.values()][0].data)
        options = {name: with_checkpoints(o.replace(data=data)) for name, o in options.items()}
        options = like_parent(options, PARENTS.get(stage, ""))
        o = options["ppo" if all_stages else stage]
        if all_stages:
            for name in ("reward", "judge"):
                options[name].refuse("evaluate", why="in a run of all stages: give it to this stage alone")
        else:
            o.refuse("report_prompts", why=f"on {stage} alone: it is for the report of `train.py all`")
        require_lengths(options, known_max_len(options["pretrain"]) if all_stages else None)
        prepare_machine(o)
        if all_stages:
            run_all(options)
        else:
            if stage in ("reward", "judge") and not o.evaluate:  # the others look at all their records at once
                require_records(open_for(o, o.data), [stage])
            commands()[stage][1](o)
    except Interrupted as stop:
        return 128 + stop.args[0]
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main, sys.argv[1:]))
