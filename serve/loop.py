"""Round after round: ask which of two replies is better, learn what is liked, improve the policy, ask again.

    python train.py loop --data reviews --rounds 3 --pairs 400 --annotator judge --error_rate .2
    python train.py loop --data reviews --rounds 2 --pairs 100 --annotator person
    python train.py loop --data reviews --answers feedback.jsonl        learn from answers that are there
    python train.py loop --reward.epochs 3 --ppo.updates 20             the options of the two stages

It starts from the finished `sft` of OUT/<data>. A round samples pairs from the present policy, has them
answered, trains the reward model anew from the SFT trunk on all answers so far (some prompts' answers are held
out, once and for all), and runs PPO. PPO starts from SFT in every round, not from the last round's policy:
the reward model knows all answers by then, and a policy that went on would keep what an earlier reward model,
which knew fewer, was wrong about; and the KL to SFT, its reference, stays one budget and does not add up.

OUT/<data>/loop/round-1/ holds what serve/rounds.py says. The same command goes on where it stopped, at any
moment, and ends as if it had not stopped.

With --annotator judge the answers come from the judge of n-grams, so the policy is trained against that
judge, on purpose; the transformer judge (`python train.py judge`) then is the independent one. Reports say so.
"""
import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import Any, ClassVar

import evaluate
from convert.importing import with_checkpoints
from data.prepare import SETTINGS, kept_input, open_for, suited
from model import checkpoint_path, load_checkpoint
from ppo import PPOOptions, train_ppo
from reward import RewardOptions, train_reward
from runtime.commands import prepare_machine
from runtime.device import dtype_of, pick_device
from runtime.draws import torch_seed
from runtime.machine import Interrupt, Interrupted, release_memory, resume_command
from runtime.options import Common, UserError, as_dict, option, parse, parse_all
from runtime.run import record_of, run_folder
from runtime.storage import replace_text
from runtime.tables import to_json
from runtime.terminal import for_terminal, memory_advice
from sample import ChatSession, SampleOptions
from serve.annotators import FunctionAnnotator, JudgeAnnotator, Simulated, function_named
from serve.log import read_events
from serve.loop_report import Setting, measure_round, notes, render, show_rounds, summary_of, what_changed
from serve.pairs import digest
from serve.rounds import (Round, answer_by_person, answer_from_file, answer_ids, answer_simulated, ask, rounds_in,
                          write_round_data)
from serve.sources import Model, Sampled, reward_scorer


@dataclasses.dataclass
class LoopOptions(Common):
    """`python train.py loop`"""

    PRESETS: ClassVar = {"smoke": dict(pairs=40)}  # what differs from the defaults

    # The rounds.
    rounds: int = option(1, "rounds in all; more of them go on where fewer ended", low=1, high=10_000, compared=False)
    pairs: int = option(400, "questions of a round", low=10, high=10**6)
    pick: str = option("random", "uncertain: of four pairs ask about the one on which the last round's reward model "
                                 "is least sure", choices=("random", "uncertain"))
    held_out: float = option(0.1, "share of the prompts whose answers no reward model learns: it is measured on them",
                             low=0.01, high=0.5)
    # The answers.
    annotator: str = option("person", "person, judge (of n-grams), short, warm, or FILE.py:FUNCTION of (prompt, first, "
                                      "second), above 0 if the first reply is better")
    answers: str = option("", "learn from this log of answers instead; each call with new answers is a new round",
                          compared=False)
    annotator_temperature: float = option(1.0, "the judge's log-odds are divided by this before its choice is drawn; "
                                               "0: always the better", low=0, source="Bradley 1952")
    error_rate: float = option(0.0, "share of a simulated person's answers that is turned round", low=0, high=1)
    tie_share: float = option(0.0, "how often a judge calls equally good replies a tie", low=0, high=0.9,
                              source="Davidson 1970")
    port: int = option(8000, "of the page on which a person answers", low=1, high=65535, compared=False)
    terminal: bool = option(False, "ask a person in the terminal instead", compared=False)

    def check(self) -> None:
        super().check()
        self.refuse("fresh", why="on a loop: give another --out with --init_from, or remove its folder")
        self.refuse("reward_from", why="on a loop, which trains its own reward models")
        simulated = ("annotator_temperature", "error_rate", "tie_share")
        if self.answers:
            self.refuse("annotator", "pairs", "pick", "port", "terminal", *simulated, why="with --answers, which has "
                                                                                         "the answers already")
            if self.rounds > 1:
                raise UserError("--answers is for one round: give more answers, and the same command learns from them")
        elif self.annotator == "person":
            self.refuse(*simulated, why="on a person")
        else:
            self.refuse("port", "terminal", why=f"with --annotator {self.annotator}, who is asked directly")
            if self.annotator != "judge":
                self.refuse("annotator_temperature", "tie_share", why="on a function, whose sign decides")

    def identity(self) -> dict[str, Any]:
        """What makes it the same loop."""
        own = {"data", "seed", "init_from", "held_out"} if self.answers else {"data", "seed", "init_from", *OWN}
        known = {name: x for name, x in as_dict(self).items() if name in own - self.not_compared()}
        return known | ({"annotator": "a log of answers"} if self.answers else {})


OWN = {f.name for f in dataclasses.fields(LoopOptions)} - {f.name for f in dataclasses.fields(Common)}


class Loop:
    """The rounds of one folder."""

    def __init__(self, o: LoopOptions, reward: RewardOptions, ppo: PPOOptions):
        self.o, self.reward, self.ppo = o, reward, ppo
        self.data = open_for(o, o.data)
        self.root, self.folder = run_folder(o, ""), run_folder(o, "loop")
        self.sft = pathlib.Path(o.init_from or self.root / "sft")
        self.require_sft()
        self.sampling = suited(ppo, "ppo", self.data)  # as PPO will have it
        self.annotator = None if o.answers or o.annotator == "person" else self.find_annotator()
        _, self.tokenizer, state = load_checkpoint(self.sft)
        self.hash = state["hash"]
        device = pick_device(o.device)
        dtype = dtype_of({"dtype": ppo.dtype} if ppo.dtype != "auto" else {}, device)
        settings = evaluate.ReplySettings(self.sampling.reply_len, self.sampling.temperature, dtype=dtype)
        self.setting = Setting(self.data, device, dtype, settings, ppo.report_prompts, self.beside("judge"))

    def beside(self, stage: str) -> pathlib.Path:
        """The folder of a stage of the run that SFT is of."""
        return checkpoint_path(self.sft).parent.parent / stage

    def require_sft(self) -> None:
        """UserError, with the commands that make it, unless SFT is there."""
        if checkpoint_path(self.sft).exists():
            return
        if self.o.init_from:
            raise UserError(f"--init_from {self.sft}: there is no checkpoint")
        words = [f"--{name} {getattr(self.o, name)}" for name in ("data", "source", "out", "preset", "seed")
                 if name in self.o.explicit]
        missing = [stage for stage in ("pretrain", "sft") if not checkpoint_path(self.root / stage).exists()]
        commands = " and then ".join(f"`{' '.join(['python train.py', stage, *words])}`" for stage in missing)
        raise UserError(f"{self.sft}: there is no policy to start from: run {commands}, or name one as --init_from")

    def find_annotator(self) -> JudgeAnnotator | FunctionAnnotator:
        """The simulated annotator of the options."""
        if self.o.annotator != "judge":
            return function_named(self.o.annotator)
        judges = evaluate.ngram_judges(self.data)
        if not judges:
            raise UserError(f"--annotator judge: {self.o.data} has no feedback that is kept for a judge: use person, "
                            "short, warm or FILE.py:FUNCTION")
        return JudgeAnnotator(judges["n-grams"], "n-grams")

    def claim(self) -> None:
        """Note whose folder this is; UserError if another loop is there."""
        path = self.folder / "loop.json"
        identity = json.loads(to_json({**self.o.identity(), "sft": self.hash}))
        if path.exists():
            before = json.loads(path.read_text(encoding="utf-8"))["options"]
            if differing := [f"{name} was {before.get(name)!r}, is {identity.get(name)!r}"
                             for name in sorted({*before, *identity}) if before.get(name) != identity.get(name)]:
                raise UserError(f"{self.folder}: the loop there differs ({'; '.join(differing[:4])}): give another "
                                f"--out, with --init_from {self.sft}, or remove this folder")
        self.write_summary(identity)

    def write_summary(self, identity: dict[str, Any] | None = None) -> list[dict[str, Any]]:
        """loop.json over the finished rounds, which are returned."""
        path = self.folder / "loop.json"
        identity = identity or json.loads(path.read_text(encoding="utf-8"))["options"]
        rows = [summary_of(json.loads(round.path("report.json").read_text(encoding="utf-8")))
                for round in rounds_in(self.folder) if round.finished]
        self.folder.mkdir(parents=True, exist_ok=True)
        replace_text(path, to_json({"options": identity, "rounds": rows}))
        return rows

    def wanted(self) -> list[Round]:
        """The rounds that this call has to finish."""
        known = rounds_in(self.folder)
        if not self.o.answers:
            return [Round(number, self.folder / f"round-{number}") for number in range(1, self.o.rounds + 1)]
        # An unfinished round is gone on with if it has these very answers; else a new one begins.
        ids = answer_ids(read_events(self.o.answers))
        if not known or answer_ids(known[-1].events()) not in (ids, set()):
            number = known[-1].number + 1 if known else 1
            known = [Round(number, self.folder / f"round-{number}")]
        return known[-1:]

    def run(self) -> None:
        """Finish the rounds, and print the table over all."""
        self.claim()
        for round in self.wanted():
            if not round.finished:
                self.play(round)
            else:
                print(f"round {round.number}: finished already in {round.folder}", flush=True)
        print("\n" + for_terminal(show_rounds(self.write_summary())), flush=True)

    def play(self, round: Round) -> None:
        """One round, from where it stands."""
        print(f"round {round.number}: in {round.folder}", flush=True)
        before = [earlier for earlier in rounds_in(self.folder) if earlier.number < round.number and earlier.finished]
        if self.o.answers:
            answer_from_file(round, self.o.answers)
        else:
            self.gather(round, before[-1] if before else None)
        counts = self.learn(round, before)
        self.improve(round)
        self.tell(round, before[-1] if before else None, counts)

    # ---- the steps of a round --------------------------------------------------------------------------

    def gather(self, round: Round, before: Round | None) -> None:
        """Sample the questions, and have them answered."""
        if self.annotator is None or not round.answers.exists() or len(round.events()) < self.o.pairs:
            cards = ask(round, self.source(round, before), self.o.pairs)
            if self.annotator is None:
                answer_by_person(round, cards, self.o.port, self.o.terminal)
            else:
                answer_simulated(round, cards, self.simulated())
                print(f"round {round.number}: {self.o.pairs} answers by {self.annotator.name}", flush=True)

    def simulated(self) -> Simulated:
        """The annotator, with the options' temperature and errors."""
        temperature = self.o.annotator_temperature if self.o.annotator == "judge" else 0.0
        return Simulated(self.annotator, self.o.seed, temperature, self.o.error_rate, self.o.tie_share)

    def source(self, round: Round, before: Round | None) -> Sampled:
        """Pairs of replies by the present policy to training prompts."""
        path, name = (before.path("ppo"), f"round-{before.number}/ppo") if before else (self.sft, "sft")
        model = self.writer(path, name)
        prompts = self.prompts("train")
        score, scorer = None, ""
        if self.o.pick == "uncertain" and before:
            score, scorer = reward_scorer(str(before.path("reward")), self.o.device)
        return Sampled(prompts, [model], seed=torch_seed(self.o.seed, "loop", "ask", round.number), score=score,
                       scorer=scorer)

    def writer(self, path: pathlib.Path, name: str) -> Model:
        """A policy that writes as PPO samples, whatever the model's own settings are."""
        o = self.sampling
        sampling = SampleOptions(temperature=o.temperature, max_new_tokens=o.reply_len, device=o.device, dtype=o.dtype)
        sampling.explicit = frozenset(as_dict(sampling))
        return Model.of_session(ChatSession(str(path), sampling), name)

    def prompts(self, split: str) -> list:
        """The data's prompts, each once."""
        records = self.data.records("ppo", split)
        return [record["prompt"] for record in {digest(record["prompt"]): record for record in records}.values()]

    def learn(self, round: Round, before: Sequence[Round]) -> dict[str, int]:
        """The reward model, on all answers so far; how many it learned, and how many are held out."""
        path, folder = round.path("data.json"), round.path("data")
        if not path.exists():  # written last: from now on the round's answers are these
            counts = write_round_data([r.events() for r in (*before, round)], folder, self.data.template,
                                      self.o.held_out, cumulative=not self.o.answers)
            replace_text(path, to_json(counts))
        o = self.reward.replace(data=str(folder), init_from=str(self.sft), resume=True, **OF_ANSWERS)
        o.explicit, o.place = o.explicit - {*OF_ANSWERS}, str(round.folder)
        with memory_advice("lower --reward.batch or --reward.max_len"):
            train_reward(o)
        between_stages()
        return json.loads(path.read_text(encoding="utf-8"))

    def improve(self, round: Round) -> None:
        """PPO from SFT, paid by the round's reward model."""
        o = self.ppo.replace(init_from=str(self.sft), reward_from=str(round.path("reward")), resume=True)
        o.place = str(round.folder)
        with memory_advice("lower --ppo.micro_batch, --ppo.rollout_rows or --ppo.reply_len"):
            train_ppo(o)
        between_stages()

    def tell(self, round: Round, before: Round | None, counts: dict[str, int]) -> None:
        """Measure the round, and write its report."""
        policies = {"SFT": self.sft, **({f"round {before.number}": before.path("ppo")} if before else {}),
                    f"round {round.number}": round.path("ppo")}
        earlier = before.path("reward") if before else self.beside("reward")
        report = {"data": self.data.meta["data"], "seed": self.o.seed, "round": round.number,
                  "answers": {"round": len(answer_ids(round.events())), **counts},
                  **measure_round(self.setting, policies, round.path("reward"))}
        report["changed"] = what_changed(self.setting, round.path("data") / "reward_val.jsonl", round.path("reward"),
                                         earlier if checkpoint_path(earlier).exists() else None, self.tokenizer)
        report["notes"] = notes(self.annotator.said if self.annotator else "People gave the answers",
                                isinstance(self.annotator, JudgeAnnotator), report["judges"])
        replace_text(round.path("report.md"), render(report) + "\n")
        replace_text(round.path("report.json"), to_json(report))
        self.write_summary()
        print(for_terminal("\n" + render(report | {"before_after": report["before_after"][:3]}) + "\n"), flush=True)
        between_stages()


# How the answers' folders are prepared, however the loop's own data was. No judge learns from answers.
OF_ANSWERS: dict[str, Any] = {**SETTINGS, "source": "", "judge_share": 0.0}


def between_stages() -> None:
    """A signal that came too late for the last stage stops the loop here; from now on it stops at once."""
    release_memory()
    Interrupt.stepping = False
    if Interrupt.number:
        raise Interrupted(Interrupt.number)


# ---- command line ------------------------------------------------------------------------------------

def parse_loop(argv: list[str]) -> tuple[LoopOptions, RewardOptions, PPOOptions]:
    """Options of the loop, and of its two stages: --reward.NAME and --ppo.NAME, or for all by their names."""
    if {"--help", "-h"} & set(argv):
        parse(LoopOptions, argv, "train.py loop")

    def whose(word: str) -> str:
        name = word[2:].partition("=")[0].replace("-", "_")
        return f"--loop.{word[2:]}" if word.startswith("--") and name in OWN else word

    stages = {"loop": LoopOptions, "reward": RewardOptions, "ppo": PPOOptions}
    found = parse_all(Common, stages, [whose(word) for word in argv], "train.py loop")
    return found["loop"], found["reward"], found["ppo"]


def inherited(o: LoopOptions) -> dict[str, Any]:
    """How the data was prepared that SFT learned from, where no flag says otherwise: with other settings, such
    as another preset's, prompts that are held out now may have been learned then."""
    path = checkpoint_path(o.init_from or run_folder(o, "sft"))
    known = record_of(path.parent).get("options", {}) if path.exists() else {}
    if not known.get("data") or "data" in o.explicit and o.data != known["data"]:
        return {}
    return {name: known[name] for name in ("data", *OF_ANSWERS) if name in known and name not in o.explicit}


def options_of(argv: list[str]) -> tuple[LoopOptions, RewardOptions, PPOOptions]:
    """`parse_loop`, with the data's settings and the paths of real models as checkpoints."""
    o, reward, ppo = (with_checkpoints(x) for x in parse_loop(argv))
    o = o.replace(data=kept_input(o.data))
    o = o.replace(**inherited(o))
    return o, reward, ppo.replace(**{name: getattr(o, name) for name in ("data", *OF_ANSWERS)})


def main(argv: list[str]) -> int:
    o, reward, ppo = options_of(argv)
    prepare_machine(o)
    try:
        Loop(o, reward, ppo).run()
    except KeyboardInterrupt:
        if not Interrupt.stepping:  # a stage has said it
            print(f"loop: go on with `{resume_command(o.replace(resume=True))}`", flush=True)
        raise
    return 0
