"""The options of the loop: of its own, of its two stages, and of the data that SFT learned from."""
import dataclasses
import pathlib
from typing import Any, ClassVar

from convert.importing import with_checkpoints
from data.parents import like_parent
from data.prepare import SETTINGS, kept_input
from model import checkpoint_path
from ppo import PPOOptions
from reward import RewardOptions
from runtime.options import Common, UserError, as_dict, option, parse, parse_all
from runtime.run import record_of, run_folder


@dataclasses.dataclass
class LoopOptions(Common):
    """`python train.py loop`; options of its two stages are --reward.NAME and --ppo.NAME"""

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
            if self.terminal:
                self.refuse("port", why="with --terminal, which opens no page")
        else:
            self.refuse("port", "terminal", why=f"with --annotator {self.annotator}, who is asked directly")
            if self.annotator_temperature == 0:
                self.refuse("tie_share", why="at --annotator_temperature 0, where only equals tie")
            if self.annotator != "judge":
                self.refuse("annotator_temperature", "tie_share", why="on a function, whose sign decides")

    def identity(self) -> dict[str, Any]:
        """What makes it the same loop."""
        own = {"data", "seed", "init_from", "held_out"} if self.answers else {"data", "seed", "init_from", *OWN}
        known = {name: x for name, x in as_dict(self).items() if name in own - self.not_compared()}
        return known | ({"annotator": "a log of answers"} if self.answers else {})


OWN = {f.name for f in dataclasses.fields(LoopOptions)} - {f.name for f in dataclasses.fields(Common)}
# How the answers' folders are prepared, however the loop's own data was. No judge learns from answers.
OF_ANSWERS: dict[str, Any] = {**SETTINGS, "source": "", "judge_share": 0.0}


def parse_loop(argv: list[str]) -> tuple[LoopOptions, RewardOptions, PPOOptions]:
    """Options of the loop, and of its two stages: --reward.NAME and --ppo.NAME, or for all by their names."""
    if {"--help", "-h"} & set(argv):
        parse(LoopOptions, argv, "train.py loop")

    def whose(word: str) -> str:
        name = word[2:].partition("=")[0].replace("-", "_")
        return f"--loop.{word[2:]}" if word.startswith("--") and name in OWN else word

    stages = {"loop": LoopOptions, "reward": RewardOptions, "ppo": PPOOptions}
    try:
        found = parse_all(Common, stages, [whose(word) for word in argv], "train.py loop")
    except UserError as error:
        raise UserError(str(error).replace("--loop.", "--")) from error
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
    found = dict(zip(("loop", "reward", "ppo"), map(with_checkpoints, parse_loop(argv)), strict=True))
    o, reward, ppo = like_parent(found, "sft").values()
    if reward.keep == "best":
        raise UserError("--reward.keep best would choose by the answers that are held out to measure it: leave it out")
    o = o.replace(data=kept_input(o.data))
    o = o.replace(**inherited(o))
    return o, reward, ppo.replace(**{name: getattr(o, name) for name in ("data", *OF_ANSWERS)})


def require_sft(o: LoopOptions, sft: pathlib.Path) -> None:
    """UserError, with the commands that make it, unless SFT is there."""
    if checkpoint_path(sft).exists():
        return
    if o.init_from:
        raise UserError(f"--init_from {sft}: there is no checkpoint")
    words = [f"--{name} {getattr(o, name)}" for name in ("data", "source", "out", "preset", "seed")
             if name in o.explicit]
    missing = [stage for stage in ("pretrain", "sft") if not checkpoint_path(run_folder(o, stage)).exists()]
    commands = " and then ".join(f"`{' '.join(['python train.py', stage, *words])}`" for stage in missing)
    raise UserError(f"{sft}: there is no policy to start from: run {commands}, or name one as --init_from")
