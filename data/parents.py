"""What a stage starts from: whose child it is, and which lengths its parents were made for."""
import os
from typing import Any, TypeVar

from runtime.options import Common, UserError, build
from runtime.run import read_config, record_of, run_folder
from runtime.storage import checkpoint_path, load_whole, stored_state

T = TypeVar("T", bound=Common)
PRESETS = Common.__dataclass_fields__["preset"].metadata["choices"]
PARENTS = {"sft": "pretrain", "reward": "sft", "judge": "pretrain", "ppo": "sft", "best": "sft"}


def preset_of(path: str | os.PathLike) -> str:
    """The preset that the model at this path was trained with, `real` for one of others; "" if its run does not
    tell."""
    place = checkpoint_path(path)
    record = read_config(place.parent) or (stored_state(place) if place.exists() else {})
    preset = record.get("preset", "real" if record.get("stage") == "import" else "")
    return preset if preset in PRESETS else ""


def like_parent(options: dict[str, T], parent: str = "") -> dict[str, T]:
    """Options of stages under the preset of the model that they start from, unless a flag names one: the demo's
    rates would ruin a model of others. It is said which.

    parent: the stage that makes this model, where no --init_from names it.
    """
    o = [*options.values()][-1]
    start = o.init_from or parent and run_folder(o, parent)
    preset = preset_of(start) if start and "preset" not in o.explicit else ""
    if preset in ("", o.preset):
        return options
    print(f"--preset {preset}, as {start} has", flush=True)
    return {stage: build(type(known), {**{name: getattr(known, name) for name in known.explicit}, "preset": preset})
            for stage, known in options.items()}


def longest_at(path: str | os.PathLike) -> int | None:
    """The max_len of the checkpoint at this path; None if none is there, or none that can be read: who loads
    it says why."""
    try:
        return int(load_whole(checkpoint_path(path))["config"]["max_len"])
    except (UserError, OSError, LookupError, TypeError, ValueError):
        return None


def require_lengths(options: dict[str, Common], pretrained: int | None = None) -> None:
    """UserError for a --max_len or --reply_len that a flag asks for and the model will not be made for. It
    is called before anything is prepared or trained, and looks at nothing but options and checkpoints.

    options: of each stage that runs. pretrained: the max_len of pretraining, where that is one of them; None:
    not known yet.
    """
    for stage in [stage for stage in PARENTS if stage in options]:
        o, flag = options[stage], f"--{stage}." if len(options) > 1 else "--"
        if not {"max_len", "reply_len"} & o.explicit:
            continue  # before a checkpoint, which may be large, is read
        starts = [o.init_from] if o.init_from or len(options) > 1 else [run_folder(o, PARENTS[stage])]
        limits = [(longest_at(path), f"the parent model {path}, which was made for rows of at most {{}} tokens")
                  if path else (pretrained, "--pretrain.max_len {}, for which the model is made")
                  for path in (*starts, *[o.reward_from] * bool(o.reward_from))]
        for name, prompt in (("max_len", 0), ("reply_len", 1)):  # a prompt has a token at least
            for most, whose in limits[:1 + prompt]:  # the reward model only has to read replies
                if name in o.explicit and most is not None and getattr(o, name) + prompt > most:
                    whose = whose.format(most) + ", the prompt included" * prompt
                    raise UserError(f"{flag}{name} {getattr(o, name)} contradicts {whose}: lower it, or pretrain with "
                                    "a larger --max_len")


def limit_length(o: T, config: Any) -> T:
    """The options with --max_len at most what the model was made for; UserError if a flag asks for
    more."""
    if o.max_len > config.max_len and "max_len" in o.explicit:
        raise UserError(f"--max_len {o.max_len} contradicts the parent model, which was made for "
                        f"rows of at most {config.max_len} tokens: lower it, or pretrain with a "
                        "larger --max_len")
    return o.replace(max_len=min(o.max_len, config.max_len))


def refuse_judge(path: str) -> None:
    """UserError if the reward model at this path is the judge: it would judge its own pupil."""
    try:
        record = record_of(checkpoint_path(path).parent) if path else {}
    except UserError:  # who loads it says what is wrong with it
        return
    if record.get("stage") == "judge":
        raise UserError(f"{path}: this is the judge, which no policy is trained against: name a reward model instead")
