"""Is the run in a folder the one that is asked for? How it may differ, and what is said if it does."""
import pathlib
import sys
from typing import Any

from runtime.machine import resume_command
from runtime.options import Common, UserError


def is_longer(o: Common, before: dict[str, Any]) -> bool:
    """Whether --resume is asked for with a larger total, the option that o.TOTAL names; before: the
    options of the run that is there."""
    old, new = before.get(o.TOTAL), getattr(o, o.TOTAL or "seed")
    return bool(o.TOTAL) and "resume" in o.explicit and isinstance(old, int | float) and new > old


def require_same(o: Common, stage: str, path: pathlib.Path, now: dict[str, Any],
                 record: dict[str, Any]) -> None:
    """UserError, naming the differences, unless the run that is there, described by `record`, is this
    one, to be resumed. now: options that matter, and parents.

    Two differences are said and accepted where --resume stands on the command line: a larger total,
    and, in a run that is not finished, another content of a parent named "file …": it was mended.
    """
    if not o.resume:
        raise UserError(f"{path}: a run is there already: resume it with `{resume_command(o)}`, start "
                        "anew with --fresh, or choose another --out")
    skipped = o.not_compared()
    before = {name: value for name, value in {**record["options"], **record["parents"]}.items()
              if name not in skipped}
    differing = {name: f"{name} was {before.get(name)!r}, is {now.get(name)!r}"
                 for name in sorted({*now, *before}) if now.get(name) != before.get(name)}
    if is_longer(o, record["options"]):
        print(f"{stage}: goes on: {differing.pop(o.TOTAL)}; from here on learning rates are those of a run of "
              "that length", flush=True)
    if "resume" in o.explicit and not record["finished"]:
        for name in [name for name in differing if name.startswith("file ")]:
            print(f"{stage}: warning: {differing.pop(name)}: from here on it is used as it is now", file=sys.stderr)
    if differing:
        shown = [*differing.values()]
        began = record.get("preset", "demo")  # what older runs that name none mostly are
        hint = f"give --preset {began}, as it may have begun, " * (began != o.preset)
        raise UserError(f"{path}: the run there differs ({'; '.join(shown[:4])}{' …' if len(shown) > 4 else ''}): "
                        f"{hint}start anew with --fresh, or choose another --out")


def require_parent(states: dict[Any, dict], kind: str, path: Any, state: dict, flag: str) -> None:
    """UserError if a PPO checkpoint, by folder in `states`, started from other weights than these.
    """
    for folder, ppo in states.items():
        wanted = ppo.get("parents", {}).get(kind, state["hash"])
        if wanted != state["hash"]:
            raise UserError(f"{path} holds the weights {state['hash']}, but {folder} was trained "
                            f"from {wanted}: name their folder with --{flag}, measure PPO runs of "
                            "different parents one by one, or train PPO again")
