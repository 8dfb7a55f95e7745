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
import hashlib
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import evaluate
from data.batches import held_out_prompts
from data.parents import preset_of
from data.prepare import open_for, recounted, suited
from model import checkpoint_path, load_checkpoint
from ppo import PPOOptions, train_ppo
from reward import RewardOptions, train_reward
from runtime.commands import prepare_machine
from runtime.device import dtype_of, pick_device
from runtime.draws import torch_seed
from runtime.machine import Interrupt, Interrupted, release_memory, resume_command
from runtime.options import UserError, as_dict
from runtime.run import record_of, run_folder
from runtime.storage import replace_text
from runtime.tables import to_json
from runtime.terminal import for_terminal, memory_advice
from sample import ChatSession, SampleOptions
from serve.annotators import FunctionAnnotator, JudgeAnnotator, Simulated, function_named
from serve.log import read_events
from serve.loop_options import OF_ANSWERS, LoopOptions, options_of, require_sft
from serve.loop_report import Setting, measure_round, notes, render, show_rounds, summary_of, what_changed
from serve.pairs import digest
from serve.rounds import (Round, answer_by_person, answer_from_file, answer_ids, answer_simulated, ask, new_answers,
                          rounds_in, write_round_data)
from serve.sources import Model, Sampled, reward_scorer


def flat(options: dict[str, Any]) -> dict[str, Any]:
    """{"reward.epochs": 2, …} of {"reward": {"epochs": 2, …}, …}."""
    return {f"{stage}.{name}": x for stage, of_stage in options.items() for name, x in of_stage.items()}


class Loop:
    """The rounds of one folder."""

    def __init__(self, o: LoopOptions, reward: RewardOptions, ppo: PPOOptions):
        self.o, self.reward, self.ppo = o, reward, ppo
        self.data = open_for(o, o.data)
        self.root, self.folder = run_folder(o, ""), run_folder(o, "loop")
        self.sft = pathlib.Path(o.init_from or self.root / "sft")
        require_sft(o, self.sft)
        self.annotator = None if o.answers or o.annotator == "person" else self.find_annotator()
        policy, self.tokenizer, state = load_checkpoint(self.sft)
        self.hash, limits = state["hash"], [policy.config.max_len]
        self.sampling = recounted(suited(ppo, "ppo", self.data), "ppo", self.data, self.tokenizer)  # as PPO's
        device = pick_device(o.device)
        dtype = dtype_of({"dtype": ppo.dtype} if ppo.dtype != "auto" else {}, device)
        settings = evaluate.ReplySettings(self.sampling.reply_len, self.sampling.temperature, dtype=dtype)
        self.setting = Setting(self.data, device, dtype, settings, ppo.report_prompts, self.beside("judge"))
        if checkpoint_path(self.setting.judge).exists():
            limits.append(record_of(self.setting.judge).get("options", {}).get("max_len", limits[0]))
        self.require_room(min(limits))

    def require_room(self, limit: int) -> None:
        """UserError, before any work, unless the policies can be compared: SFT and judge read so many tokens."""
        try:
            held_out_prompts(self.data, "val", self.tokenizer, limit - self.sampling.reply_len, 1)
        except UserError as error:
            preset = preset_of(self.sft)
            raise UserError(f"{error}; here it is --ppo.reply_len, now {self.sampling.reply_len}" + (
                f", or --preset {preset}, as {self.sft} has" if preset and preset != self.o.preset else "")) from error

    def beside(self, stage: str) -> pathlib.Path:
        """The folder of a stage of the run that SFT is of."""
        return checkpoint_path(self.sft).parent.parent / stage

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
        identity = json.loads(to_json({**self.o.identity(), "sft": self.hash, **(
            {} if self.o.answers else flat(self.stage_options()))}))
        if file := getattr(self.annotator, "path", None):
            identity[f"file {file.name}"] = hashlib.sha256(file.read_bytes()).hexdigest()[:12]
        if path.exists():
            before = read_json(path)["options"]
            if differing := [f"{name} was {before.get(name)!r}, is {identity.get(name)!r}"
                             for name in sorted({*before, *identity}) if before.get(name) != identity.get(name)]:
                raise UserError(f"{self.folder}: the loop there differs ({'; '.join(differing[:4])}): give another "
                                f"--out, with --init_from {self.sft}, or remove this folder")
        self.write_summary(identity)

    def write_summary(self, identity: dict[str, Any] | None = None) -> list[dict[str, Any]]:
        """loop.json over the finished rounds, which are returned."""
        path = self.folder / "loop.json"
        identity = identity or read_json(path)["options"]
        rows = [summary_of(read_json(round.path("report.json")))
                for round in rounds_in(self.folder) if round.finished]
        self.folder.mkdir(parents=True, exist_ok=True)
        replace_text(path, to_json({"options": identity, "rounds": rows}))
        return rows

    def wanted(self) -> list[Round]:
        """The rounds that this call has to finish."""
        known = rounds_in(self.folder)
        if not self.o.answers:
            return [Round(number, self.folder / f"round-{number}") for number in range(1, self.o.rounds + 1)]
        # The last round is the one that is meant if it has these very answers and options; else a new one begins.
        number = known[-1].number if known else 1
        if known and known[-1].events() and (
                answer_ids(known[-1].events()) != answer_ids(read_events(self.o.answers))
                or read_json(known[-1].path("options.json")) not in (None, self.stage_options())):
            number += 1
        return [Round(number, self.folder / f"round-{number}")]

    def stage_options(self) -> dict[str, Any]:
        """What the two stages are told, as JSON has it."""
        return json.loads(to_json({name: {x: value for x, value in as_dict(o).items() if x not in o.not_compared()}
                                   for name, o in (("reward", self.reward), ("ppo", self.ppo))}))

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
            replace_text(round.path("options.json"), to_json(self.stage_options()))
        else:
            self.gather(round, before[-1] if before else None)
        counts = self.learn(round, before)
        self.improve(round)
        self.tell(round, before, counts)

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
        if self.o.pick == "uncertain" and not before:
            print("round 1: asked at random: --pick uncertain goes by the reward model of the round before", flush=True)
        elif self.o.pick == "uncertain":
            score, scorer = reward_scorer(str(before.path("reward")), self.o.device, self.data.template)
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
            try:
                counts = write_round_data([r.events() for r in (*before, round)], folder, self.data.template,
                                          self.o.held_out, cumulative=not self.o.answers)
            except UserError as error:
                if self.o.answers or self.annotator:
                    raise
                raise UserError(f"{error}: take some back by `python -m serve --pairs {round.pairs} --to "
                                f"{round.answers}`, and answer them anew") from error
            replace_text(path, to_json(counts))
        o = self.reward.replace(data=str(folder), init_from=str(self.sft), resume=True, **OF_ANSWERS)
        o.explicit, o.place = o.explicit - {*OF_ANSWERS}, str(round.folder)
        with memory_advice("lower --reward.batch or --reward.max_len"):
            train_reward(o)
        between_stages()
        return read_json(path)

    def improve(self, round: Round) -> None:
        """PPO from SFT, paid by the round's reward model."""
        o = self.ppo.replace(init_from=str(self.sft), reward_from=str(round.path("reward")), resume=True)
        o.place = str(round.folder)
        with memory_advice("lower --ppo.micro_batch, --ppo.rollout_rows or --ppo.reply_len"):
            train_ppo(o)
        between_stages()

    def tell(self, round: Round, earlier: Sequence[Round], counts: dict[str, int]) -> None:
        """Measure the round, and write its report."""
        before = earlier[-1] if earlier else None
        policies = {"SFT": self.sft, **({f"round {before.number}": before.path("ppo")} if before else {}),
                    f"round {round.number}": round.path("ppo")}
        old_reward = before.path("reward") if before else self.beside("reward")
        report = {"data": self.data.meta["data"], "seed": self.o.seed, "round": round.number,
                  "answers": {"round": len(new_answers(round, earlier)), **counts},
                  **measure_round(self.setting, policies, round.path("reward"),
                                  None if isinstance(self.annotator, JudgeAnnotator) else self.annotator)}
        report["changed"] = what_changed(self.setting, round.path("data") / "reward_val.jsonl", round.path("reward"),
                                         old_reward if checkpoint_path(old_reward).exists() else None, self.tokenizer)
        names = sorted({event["annotator"] for event in round.events()})
        report["notes"] = notes(names, self.annotator.said if self.annotator else "", report["judges"])
        replace_text(round.path("report.md"), render(report) + "\n")
        replace_text(round.path("report.json"), to_json(report))
        self.write_summary()
        print(for_terminal("\n" + render(report | {"before_after": report["before_after"][:3]}) + "\n"), flush=True)
        between_stages()


def read_json(path: pathlib.Path) -> Any:
    """A JSON file of ours; None if it is not there."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def between_stages() -> None:
    """A signal that came too late for the last stage stops the loop here; from now on it stops at once."""
    release_memory()
    Interrupt.stepping = False
    if Interrupt.number:
        raise Interrupted(Interrupt.number)


# ---- command line ------------------------------------------------------------------------------------

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
