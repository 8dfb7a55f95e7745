"""The words of a command that has stages: `train.py`, `train.py all --seed=1`, `train.py ppo --kl_coef=.1`."""
import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from runtime.boards import require_tensorboard
from runtime.device import compute_alike, pick_device
from runtime.options import Common, UserError, parse, parse_all


def parse_command(argv: list[str], stages: Mapping[str, type], road: Sequence[str],
                  prog: str) -> tuple[str, dict[str, Any]]:
    """(the stage that is named, options of each stage that it runs by name). Without a stage it is `all`,
    those of the road. stages: the class of each stage's options. UserError for an unknown one, and for
    options as in runtime/options.py."""
    stage, rest = (argv[0], argv[1:]) if argv and not argv[0].startswith("-") else ("all", argv)
    if stage not in (*stages, "all"):
        near = difflib.get_close_matches(stage, [*stages, "all"], 1)
        raise UserError(f"unknown stage {stage!r}{f'; did you mean {near[0]}?' if near else ''}: "
                        f"use all, {', '.join(stages)}")
    if stage == "all":
        return stage, parse_all(Common, {name: stages[name] for name in road}, rest, prog)
    options = parse(stages[stage], rest, f"{prog} {stage}")
    options.refuse(*options.IGNORED, why=f"on {stage}")
    return stage, {stage: options}


def prepare_machine(o: Common) -> None:
    """Fail early on a missing device or package; with --deterministic fix how sums are taken."""
    pick_device(o.device)
    if o.tensorboard:
        require_tensorboard()
    if o.deterministic:
        compute_alike()
