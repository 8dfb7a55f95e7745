"""Measures, with intervals: is the reward model right, is the policy better, or has it only found a
loophole?

    python evaluate.py out/reviews --split test               a finished run on test texts: once
    python evaluate.py out/reviews/sft out/reviews/ppo        any checkpoints, on validation texts

From small to large: a policy on held-out prompts; the reward model on held-out feedback, be it
pairs, ratings or labels; the report. The n-gram regression of data/judge.py serves twice: fitted on
one share of the feedback it is the reward model's baseline, on the other an independent judge;
`train.py judge` trains a second one. PPO and the reward model are never trained against a judge:
no reward and no gradient comes from one. Only with --keep best the n-grams choose among PPO's weights.
"""
import runtime  # noqa: F401 (before torch: it sets how threads wait)
import contextlib
import dataclasses
import math
import os
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from convert.importing import as_checkpoint, with_checkpoints
from data.agreement import feedback_table, most_measured, reward_tables, show_agreement, summary
from data.batches import LEAST_REPLY, held_out_prompts, make_rows, pad_left, prompt_ids, scatter_tokens, similar_lengths
from data.dataset import feedback_of
from data.forms import parse_fields
from data.health import judge_warnings, stage_warnings, warnings_of
from data.html import save_report
from data.judge import ModelJudge, NgramJudge, ngram_regressions, shown_to_people
from data.prepare import SETTINGS, find_data_set, kept_input, open_data
from data.prepared import Prepared
from data.records import load_records
from data.report import (Measures, add_distinct, describe, drawn_pairs, judged_by, missing, opinions_on_feedback,
                         people_wrote, policy_columns, render_report, splits_used, table_row, win_rates)
from data.rewards import part_scores, reward_paid
from data.tokenizer import Tokenizer
from model import Transformer, checkpoint_path, compared_logprobs, load_checkpoint
from reward import RewardModel, RewardOptions, longest_row
from runtime.device import dtype_of, pick_device, precision
from runtime.draws import drawn_evenly, key
from runtime.learning import measured_in, sharing
from runtime.machine import require_finite
from runtime.options import Options, UserError, option, parse, run_main
from runtime.run import Run, read_config, record_of, run_folder
from runtime.same import require_parent
from runtime.storage import replace_text, require_place
from runtime.tables import to_json
from runtime.terminal import for_terminal, lacking, memory_advice
from sample import Generation, reply_ids, reply_texts, reply_to


# ---- a policy on held-out prompts ----------------------------------------------------------------

@dataclasses.dataclass(frozen=True)
class ReplySettings:
    """How replies are drawn and scored when policies are compared."""

    reply_len: int = 64
    temperature: float = 1.0
    seed: int = 12345  # the same random numbers for every policy
    dtype: str = "float32"
    rows_at_once: int = 128


@torch.no_grad()
def reply_logprobs(policy: Transformer, reference: Transformer, ids: Sequence[list[int]],
                   replies: Generation, settings: ReplySettings) -> tuple[torch.Tensor, ...]:
    """(log π, log π_ref, KL) of each reply token, each (B, R) float32; 0 beyond a reply's end.

    The KL is that of the whole distributions before the token. Summed over a reply it has the mean
    of Σ log π/π_ref and, as a rule, less variance: each token's draw is averaged over
    (Rao–Blackwell).
    """
    device = policy.embedding.weight.device
    lengths, compared = replies.mask.sum(1), torch.zeros(3, *replies.mask.shape, device=device)
    lengths = lengths + torch.tensor([len(prompt) for prompt in ids], device=device)
    with sharing(policy, reference):
        for part in similar_lengths(lengths):
            mask = replies.mask[part]
            prompt, prompt_mask = (t.to(device) for t in pad_left([ids[i] for i in part.tolist()], 0))
            rows = make_rows(torch.cat((prompt, replies.tokens[part]), 1), torch.cat((prompt_mask, mask), 1),
                             torch.cat((torch.zeros_like(prompt_mask), mask), 1))
            with precision(settings.dtype, device.type):
                below = policy.below(rows.tokens)
                hidden = [model.hidden(rows.tokens, where=rows.before, below=below) for model in (policy, reference)]
            compared[:, part] = torch.stack([scatter_tokens(x, mask) for x in compared_logprobs(
                (policy, reference), hidden, rows.targets, settings.temperature)])
    return tuple(require_finite(compared, "log-probabilities of the replies"))


def measure_policy(policy: Transformer, reference: Transformer, tokenizer: Tokenizer,
                   prompts: Sequence, template: str, *, reward_model: Any = None,
                   judges: dict[str, Any] | None = None, settings: ReplySettings = ReplySettings()
                   ) -> tuple[dict[str, float], list[dict], list[list[int]]]:
    """Let the policy reply once to each prompt, and measure the replies.

    reward_model: any scorer. judges: by name, each with .probs(prompts, texts). Returns (metrics,
    one record per reply, the replies' ids). KL in nats per reply: `kl` exact at each step of the
    sampled replies, `kl_k1` on the sampled tokens alone; ref_perplexity is the reference's, per
    token.
    """
    if not prompts:
        raise UserError("nothing to evaluate: the list of held-out prompts is empty")
    ids = [prompt_ids(tokenizer, prompt, template) for prompt in prompts]
    replies = reply_to(policy, tokenizer, ids, settings.reply_len, temperature=settings.temperature,
                       seed=settings.seed, batch_size=settings.rows_at_once, dtype=settings.dtype)
    logprobs, ref_logprobs, kl = reply_logprobs(policy, reference, ids, replies, settings)
    rows = reply_ids(replies)
    with torch.no_grad(), precision(settings.dtype, policy.embedding.weight.device.type):
        scores = {} if reward_model is None else {
            "raw_score": reward_model.scores(ids, rows), **part_scores(reward_model, ids, rows)}
    metrics, records = describe(prompts, reply_texts(tokenizer, replies), rows, tokenizer,
                                judges or {}, {"kl": kl.sum(1), **scores,
                                               "kl_k1": (logprobs - ref_logprobs).sum(1)})
    metrics["ref_perplexity"] = math.exp(-float(ref_logprobs.sum()) / int(replies.mask.sum()))
    return metrics, records, rows


OPINION = ("eval_judged_positive", 1)  # what PPO's --keep best goes by, and that higher is better


class HeldOutPrompts:
    """The same held-out prompts and random numbers each time a policy is measured while it trains.
    """

    NAMES = ("raw_score", "judge", "judged_positive", "kl", "length", "end_rate", "distinct2",
             "ref_perplexity")

    def __init__(self, data: Prepared, tokenizer: Tokenizer, prompts: Sequence,
                 reference: Transformer, reward_model: Any, settings: ReplySettings):
        self.tokenizer, self.template, self.prompts = tokenizer, data.template, prompts
        self.reference, self.reward_model, self.settings = reference, reward_model, settings
        self.judges = ngram_judges(data)

    def measure(self, policy: Transformer) -> tuple[dict[str, float], list[dict]]:
        """(metrics whose names begin with eval_, one record per reply)."""
        metrics, records, _ = measure_policy(
            policy, self.reference, self.tokenizer, self.prompts, self.template,
            reward_model=self.reward_model, judges=self.judges, settings=self.settings)
        names = [*self.NAMES, *(name for name in metrics if name.startswith("part_"))]
        return {f"eval_{name}": metrics[name] for name in names if name in metrics}, records

    def opinion(self, prompts: Sequence, texts: Sequence[str]) -> dict[str, float]:
        """What the independent judge says of other replies; {} without a judge."""
        return judged_by(self.judges, prompts, texts)[0]


# ---- the tables ----------------------------------------------------------------------------------

BEST_OF = 16  # what PPO has to beat: of so many replies the one that the reward model chooses


@dataclasses.dataclass(frozen=True)
class Compared:
    """Policies to compare, and by what. All but the judges read the ids of one tokenizer."""

    policies: dict[str, Transformer]  # by name
    reference: Transformer
    tokenizer: Tokenizer
    reward_model: RewardModel | None = None
    max_len: int = 0  # the longest row that the reward model was trained on
    ratings: dict[str, float] | None = None  # mean and spread of the ratings that it learned
    judges: dict[str, Any] = dataclasses.field(default_factory=dict)  # by name
    reference_name: str = "SFT"
    reward: Any = None  # what PPO was paid, if that was not the reward model alone: a scorer
    missing: Sequence[str] = ()  # what could not be loaded, in words
    warnings: Sequence[str] = ()  # of the reward model's stage, and of how the last policy was chosen

    @property
    def scorer(self) -> Any:
        """What raw scores and best-of-n go by, or None."""
        return self.reward or self.reward_model


@torch.no_grad()
def scored_replies(n: int, policy: Transformer, scorer: Any, tokenizer: Tokenizer, ids: Sequence[list[int]],
                   settings: ReplySettings, rows: Sequence[int] | None = None) -> tuple[list[list[int]], torch.Tensor]:
    """(n replies of the policy to each prompt, side by side; their raw scores (prompts, n)). rows: of the
    random numbers, as in `generate`."""
    ids = [x for x in ids for _ in range(n)]
    replies = reply_ids(reply_to(policy, tokenizer, ids, settings.reply_len, temperature=settings.temperature,
                                 seed=settings.seed, batch_size=settings.rows_at_once, dtype=settings.dtype, rows=rows))
    with precision(settings.dtype, policy.embedding.weight.device.type):
        return replies, scorer.scores(ids, replies).view(-1, n).cpu()


def best_of(n: int, compared: Compared, ids: Sequence[list[int]],
            settings: ReplySettings) -> tuple[list[list[int]], torch.Tensor]:
    """(ids, raw score) of the reply, out of n by the reference to each prompt, that the reward
    scores highest."""
    replies, scores = scored_replies(n, compared.reference, compared.scorer, compared.tokenizer, ids, settings)
    return [replies[n * i + j] for i, j in enumerate(scores.argmax(1).tolist())], scores.amax(1)


def best_of_prompts(run: Run, policy: Transformer, scorer: RewardModel, prompts: list,
                    first: int) -> list[dict[str, Any]]:
    """For each prompt, of n replies by the policy the one that the reward model scores highest, with its
    score and the mean of all. One that is cut off never stands before one that ends: it does not show how
    to end. first: the first prompt's number; a reply's random numbers follow from it."""
    o, n, tokenizer = run.o, run.o.n, run.tokenizer
    settings = ReplySettings(o.reply_len, o.temperature, key(o.seed, "best", "reply"), run.dtype)
    replies, scores = scored_replies(
        n, policy, scorer, tokenizer, [prompt_ids(tokenizer, prompt, run.template) for prompt in prompts], settings,
        range(first * n, (first + len(prompts)) * n))
    ended = torch.tensor([reply[-1] in tokenizer.end_ids for reply in replies]).view(-1, n)
    chosen = torch.where(ended | ~ended.any(1, keepdim=True), scores, -torch.inf).argmax(1).tolist()
    return [{"prompt": prompt, "response": tokenizer.reply_text(replies[i * n + j]),
             "score": round(float(scores[i, j]), 4), "mean_score": round(float(scores[i].mean()), 4),
             "ended": bool(ended[i, j])} for i, (prompt, j) in enumerate(zip(prompts, chosen, strict=True))]


def policy_table(compared: Compared, data: Prepared, *, n_prompts: int = 500, samples: int = 1,
                 split: str = "val", settings: ReplySettings = ReplySettings()) -> tuple[
                     list[dict], dict[str, list[dict]]]:
    """(the table's rows, the replies of every policy and of best-of-n): the same held-out openings
    and random numbers for each, and distinct-2 over the same number of bigrams.

    samples: replies of a policy to each opening; they stand side by side, and distinct-2 is of the
    first. The KL of best-of-n has no estimate, but a bound, log n − (n − 1)/n (Beirami 2024).
    """
    c, tokenizer, (openings, most) = compared, compared.tokenizer, most_measured(compared.reference)
    limits = [m.config.max_len for m in (*c.policies.values(), c.reference, c.reward_model)
              if m is not None] + [judge.max_len for judge in c.judges.values() if hasattr(judge, "max_len")]
    limit = min(min(limits) - settings.reply_len, (c.max_len or math.inf) - LEAST_REPLY)
    prompts = held_out_prompts(data, split, tokenizer, limit, n_prompts)
    lines, replies, answers, others = [], {}, [], []  # the last two: ids, for distinct-2
    measures = Measures(data, split)
    for name, policy in c.policies.items():
        metrics, replies[name], rows = measure_policy(
            policy, c.reference, tokenizer, [p for p in prompts for _ in range(samples)],
            data.template, reward_model=c.scorer, judges=c.judges, settings=settings)
        measures.add(metrics, replies[name])
        lines.append(table_row(name, metrics, replies[name], samples))
        answers.append(rows[::samples])
    if c.scorer is not None:
        prompts = prompts[:openings]
        ids = [prompt_ids(tokenizer, prompt, data.template) for prompt in prompts]
        rows, scores = best_of(BEST_OF, c, ids, settings)
        name, texts = f"{c.reference_name}, best of {BEST_OF}", [tokenizer.reply_text(row) for row in rows]
        metrics, replies[name] = describe(prompts, texts, rows, tokenizer, c.judges,
                                           {"raw_score": scores, **part_scores(c.scorer, ids, rows)})
        measures.add(metrics, replies[name])
        metrics["kl_bound"] = math.log(BEST_OF) - (BEST_OF - 1) / BEST_OF
        lines.append(table_row(name, metrics, replies[name]))
        others.append(rows)
    for name, records, rows in people_wrote(data, tokenizer, settings.reply_len, split, limit, most):
        texts = [[r[key] for r in records] for key in ("prompt", "response")]
        metrics, records = describe(*texts, rows, tokenizer, c.judges, {})
        measures.add(metrics, records)
        lines.append(table_row(name, metrics, records))
        others.append(rows)
    add_distinct(lines, answers, others)
    return lines, replies


def load_compared(folders: dict[str, pathlib.Path], device: str, reference: str = "",
                  reward_from: str = "") -> tuple[Compared, dict[str, Any], dict[str, Any]]:
    """(checkpoints by name with reference and reward model, the reference's state, the state of the last
    checkpoint of ppo, else of best, else {}).

    The reference is the one that the PPO checkpoint started from, else the folder sft beside that, or beside
    the first, else what the checkpoint of best started from; the reward model that of the last of PPO and
    best, else the folder reward there. UserError if the reference, or a reward model
    that is not asked for, is another one.
    """
    loaded = {name: load_checkpoint(folder, device) for name, folder in folders.items()}
    states = {folders[name]: s for stage in ("best", "ppo") for name, (_, _, s) in loaded.items()
              if s.get("stage") == stage}
    ppos = {folder: s for folder, s in states.items() if s["stage"] == "ppo"}
    beside = checkpoint_path(next(iter([*ppos, *folders.values()]))).parent.parent
    last = [*states.values()][-1] if states else {}
    started = last.get("options", {})
    from_own = ppos or not checkpoint_path(beside / "sft").exists()
    path = reference or (from_own and started.get("init_from")) or beside / "sft"
    known = {checkpoint_path(folders[name]): x for name, x in loaded.items()}
    model, tokenizer, state = known.get(checkpoint_path(path)) or load_checkpoint(path, device)
    require_parent(ppos, "init", path, state, "reference")
    for name, (_, other, _) in loaded.items():
        tokenizer.require_same(other, f"{path} and {folders[name]}")
    dtype = dtype_of(last, device)
    policies = {name: measured_in(policy, dtype) for name, (policy, _, _) in loaded.items()}
    compared = Compared(policies, measured_in(model, dtype), tokenizer, warnings=stage_warnings("PPO", last),
                        reference_name="SFT" if state.get("stage") == "sft" else "reference")
    path = reward_from or started.get("reward_from") or beside / "reward"
    if reward_from or checkpoint_path(path).exists():
        scorer, longest, reward_state = load_reward_model(path, device, tokenizer, dtype)
        if not reward_from:
            require_parent(states, "reward", path, reward_state, "reward_from")
        compared = dataclasses.replace(compared, reward_model=scorer, max_len=longest,
                                       ratings=reward_state.get("ratings"),
                                       warnings=[*compared.warnings, *stage_warnings("the reward model", reward_state)])
    return compared, state, last


def load_reward_model(path: str | os.PathLike, device: str, tokenizer: Tokenizer,
                      dtype: str = "float32") -> tuple[RewardModel, int, dict[str, Any]]:
    """(model, which scores in this precision, the longest row it was trained on, state); UserError unless
    it reads the tokenizer's ids."""
    model, own_tokenizer, state = load_checkpoint(path, device, RewardModel)
    tokenizer.require_same(own_tokenizer, f"the policy and {path}")
    return measured_in(model, dtype), longest_row(model, state), state


def ngram_judges(data: Prepared) -> dict[str, Any]:
    """The judge of n-grams by its name, where the data have a judge's share of the feedback."""
    if not data.has("judge"):
        return {}
    return {"n-grams": NgramJudge(ngram_regressions(data, "judge"), shown_to_people(data))}


def load_judges(data: Prepared, folder: str | os.PathLike | None = None, device: str = "cpu",
                dtype: str = "float32") -> dict[str, Any]:
    """The judges by name, each with .probs(prompts, texts) -> (n,), from 0 to 1, 0.5 neutral:
    `ngram_judges`, and the transformer of `folder` where it was trained."""
    found = ngram_judges(data)
    if folder is not None and checkpoint_path(folder).exists():
        model, tokenizer, state = load_checkpoint(folder, device, RewardModel)
        template = state.get("template", data.template)
        found["transformer"] = ModelJudge(measured_in(model, dtype), tokenizer, template, longest_row(model, state),
                                          shown_to_people(data), stage_warnings("the judge transformer", state))
    return found


# ---- the report ----------------------------------------------------------------------------------

def run_policies(root: pathlib.Path) -> dict[str, pathlib.Path]:
    """Where the policy before PPO, that of rejection sampling and that after PPO are, in a run's folder."""
    ppo, best = record_of(root / "ppo"), read_config(root / "best") or {}
    started = ppo.get("options", {}).get("init_from")
    alike = best.get("finished") and best["parents"].get("reward") == ppo.get("parents", {}).get("reward")
    return {"SFT": pathlib.Path(started or root / "sft"), **({"best": root / "best"} if alike else {}),
            "PPO": root / "ppo"}


def write_report(data: Prepared, root: pathlib.Path, *, seed: int, settings: ReplySettings,
                 n_prompts: int = 500, device: str = "cpu", seconds: float = 0.0) -> None:
    """Measure the run in `root` on validation; write report.json, report.md, report.html and
    report.svg, and each reward model's scores; print report.md."""
    compared, _, ppo = load_compared(run_policies(root), device)
    reward, lost = reward_paid(ppo, data, "val", compared.reward_model, compared.tokenizer)
    settings = dataclasses.replace(settings, dtype=dtype_of(ppo, device))
    compared = dataclasses.replace(compared, judges=load_judges(data, root / "judge", device, settings.dtype),
                                   reward=reward, missing=lost)
    report, scores = build_report(compared, data, seed=seed, n_prompts=n_prompts, settings=settings)
    save_report(report, scores, root, seconds)


def build_report(compared: Compared, data: Prepared, *, seed: int, n_prompts: int = 500,
                 samples: int = 1, split: str = "val", settings: ReplySettings = ReplySettings()
                 ) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """(the report, the reward model's scores of people's texts by split).

    The policies on held-out openings, reward model and judges on held-out feedback, how often the
    last policy's reply is preferred, and ten pairs of replies drawn by the seed.
    """
    c, scores = compared, {}
    policies, replies = policy_table(c, data, n_prompts=n_prompts, samples=samples, split=split, settings=settings)
    first, last = list(c.policies)[0], list(c.policies)[-1]
    kind = data.feedback(split)
    report: dict[str, Any] = {
        "data": data.meta["data"], "split": split, "seed": seed,
        "settings": dataclasses.asdict(settings), "feedback": kind,
        "records": splits_used(data.meta["counts"]), "first": first, "last": last,
        "openings": len(replies[first]) // samples, "samples": samples, "judges": list(c.judges),
        "policies": policies}
    report["columns"] = policy_columns(report)
    if kind and c.reward_model is not None:
        report["reward"], scores = reward_tables(c.reward_model, data, split, c.tokenizer, c.max_len,
                                                 c.ratings, most_measured(c.reference)[1])
        report["agreement"] = summary(scores[split])
    if records := [r for r in data.records("reward", split) if all(
            judge.reads(r["prompt"]) for judge in c.judges.values())] if kind else []:
        report["judge"] = opinions_on_feedback(c.judges, drawn_evenly(records, most_measured(c.reference)[1]))
    report["win_rates"] = win_rates(replies, list(c.policies), list(c.judges), samples)
    said = [*c.warnings, *(line for judge in c.judges.values() for line in getattr(judge, "warnings", ()))]
    report["warnings"] = [*warnings_of(policies, first, last), *said, *judge_warnings(report.get("judge", {}), said)]
    report["missing"] = [*c.missing, *missing(data, split, judges=list(c.judges), reward_model=c.scorer is not None,
                                              openings=report["openings"], wanted=n_prompts)]
    drawn = np.random.default_rng([seed, 77]).permutation(report["openings"])[:10]
    report["pairs"] = drawn_pairs(replies[first], replies[last], drawn * samples) if first != last else []
    return report, scores


def print_validation_table(folder: str | os.PathLike, data: Prepared, device: str = "cpu") -> None:
    """A finished reward model beside its baselines on validation; the test texts are scored once, by
    the report."""
    model, tokenizer, state = load_checkpoint(folder, device, RewardModel)
    measured_in(model, dtype_of(state, device))
    rows, scores = reward_tables(model, data, "val", tokenizer, longest_row(model, state), state.get("ratings"),
                                 most_measured(model.backbone)[1])
    print(show_agreement(rows, summary(scores["val"])), flush=True)


def measure_on_file(o: RewardOptions, stage: str) -> None:
    """Print how far a finished reward model agrees with a file of feedback, whatever its form, beside
    what length alone and a constant reach."""
    used = {"evaluate", "init_from", "data", "out", "fields", "skip_bad", "template", "device",
            "deterministic", "traceback"}
    o.refuse(*sorted(o.explicit - used), why="with --evaluate, which trains nothing")
    model, tokenizer, state = load_checkpoint(o.init_from or run_folder(o, stage), pick_device(o.device),
                                              RewardModel)
    records = load_records(kept_input(o.evaluate), "reward", o.skip_bad, parse_fields(o.fields), say=True)
    scale = state.get("ratings") if feedback_of(records[0]) == "scores" else None
    rows, scored = feedback_table(
        model, records, tokenizer, o.template or state.get("template", "{prompt}"),
        longest_row(model, state), scale=scale)
    print(show_agreement(rows, summary(scored)))


# ---- command line --------------------------------------------------------------------------------

@dataclasses.dataclass
class EvaluateOptions(Options):
    """`python evaluate.py DIR…`"""

    # What to measure.
    reference: str = option("", "checkpoint that KL, perplexity and best-of-n refer to; empty: the "
                                "one that PPO started from, else the folder sft beside the first")
    reward_from: str = option("", "reward model; empty: the one that PPO or best went by, else the folder "
                                  "reward beside the first, if there is one")
    data: str = option("", "data set of the openings; empty: the checkpoint's")
    source: str = option("", "file, folder, archive or URL of the data set's raw files; empty: download them")
    split: str = option("val", "split of the openings; look at test once, at the end", choices=("val", "test"))
    prompts: int = option(500, "number of openings", low=1)
    samples: int = option(1, "replies to each opening; intervals are over openings", low=1)
    json: str = option("", "file for all figures as JSON; -: print them, and nothing else")
    # How to draw.
    reply_len: int = option(0, "longest reply in tokens; 0: as in the PPO run among the folders, else 64", low=0)
    temperature: float = option(0.0, "of sampling; 0: as in the PPO run among the folders, else 1", low=0, high=100)
    seed: int = option(12345, "seed of the random numbers", low=0)
    # The machine.
    device: str = option("auto", "device to compute on", choices=("auto", "cpu", "cuda", "mps"))
    traceback: bool = option(False, "show where in the code an error arose")


@lacking("skip_bad", "fields", "template")
@memory_advice("lower --prompts or --reply_len")
def main(argv: list[str]) -> None:
    n = next((i for i, word in enumerate(argv) if word.startswith("-")), len(argv))
    o = with_checkpoints(parse(EvaluateOptions, argv[n:], "evaluate.py DIR…"))
    folders = [pathlib.Path(as_checkpoint(folder)) for folder in argv[:n]]
    if not folders:
        raise UserError("which checkpoints? python evaluate.py out/reviews/sft out/reviews/ppo")
    require_place(o.json, "--json")
    with contextlib.redirect_stdout(sys.stderr if o.json == "-" else sys.stdout):
        report = measure(folders, o)
    if o.json == "-":
        print(to_json(report))
    elif o.json:
        replace_text(pathlib.Path(o.json), to_json(report))


def measure(folders: list[pathlib.Path], o: EvaluateOptions) -> dict[str, Any]:
    """Load what the command names, and print its report. The report of a finished run (one folder,
    with ppo in it) is also written there."""
    device, root = pick_device(o.device), folders[0]
    finished = len(folders) == 1 and not checkpoint_path(root).exists() and checkpoint_path(root / "ppo").exists()
    short = [folder.name for folder in folders]
    names = short if len(set(short)) == len(short) else map(str, folders)
    policies = run_policies(root) if finished else dict(zip(names, folders, strict=True))
    compared, trained, ppo = load_compared(policies, device, o.reference, o.reward_from)
    # Open the data set that they were trained on, with their own prompt template.
    known = trained.get("options", {})
    options = {name: known[name] for name in SETTINGS if name in known}
    if not (name := o.data or known.get("data")):
        raise UserError("the checkpoint does not say on which data it was trained: give --data")
    if "source" not in find_data_set(name, known.get("fields", "")).options:
        o.refuse("source", why=f"on {name}, which has no other raw files")
    data = open_data(name, source=o.source or known.get("source") or None, **options)
    template = trained.get("template", data.template)
    data = dataclasses.replace(data, meta=data.meta | {"template": template})
    judge = checkpoint_path(policies[[*policies][-1]]).parent.parent / "judge"
    reward, lost = reward_paid(ppo, data, o.split, compared.reward_model, compared.tokenizer)
    # Measure as the PPO run among the folders sampled and computed.
    sampled, dtype = ppo.get("options", {}), dtype_of(ppo, device)
    compared = dataclasses.replace(compared, judges=load_judges(data, judge, device, dtype), reward=reward,
                                   missing=lost)
    settings = ReplySettings(reply_len=o.reply_len or sampled.get("reply_len", 64), seed=o.seed,
                             temperature=o.temperature or sampled.get("temperature", 1.0), dtype=dtype)
    report, scores = build_report(compared, data, seed=sampled.get("seed", 0), split=o.split,
                                  n_prompts=o.prompts, samples=o.samples, settings=settings)
    if finished:
        save_report(report, scores, root)
    else:
        print(for_terminal(render_report(report, ", ".join(policies))))
    return report


if __name__ == "__main__":
    sys.exit(run_main(main, sys.argv[1:]))
