"""A dataclass becomes a command line.

Each chapter keeps its options as a dataclass beside its code; a field is written with `option(default, help, …)`, which
also holds the values of the presets and the source of the number. `parse` fills the dataclass from the command line:
default < preset < flag. What nobody reads is an error, never ignored. This file imports nothing of ours, so every other
may.
"""
import dataclasses
import difflib
import math
import sys
import traceback
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")
PRESETS = ("smoke", "base")  # `demo` is the default itself


class UserError(Exception):
    """Something that the user can mend: one line that says what is wrong, where, and how to mend it."""


def option(default: Any, help: str, *, source: str = "", choices: tuple | None = None, low: float | None = None,
           high: float | None = None, smoke: Any = None, base: Any = None, compared: bool = True) -> Any:
    """A dataclass field with what --help says of it, the choices or the range (both ends allowed) that a flag's value
    must come from, and its values under --preset smoke and base where they differ."""
    presets = {name: value for name, value in (("smoke", smoke), ("base", base)) if value is not None}
    return dataclasses.field(default=default, metadata={"help": help, "source": source, "choices": choices,
                                                        "low": low, "high": high, "presets": presets,
                                                        "compared": compared})


def as_dict(options: Any) -> dict[str, Any]:
    """Option names and values."""
    return {f.name: getattr(options, f.name) for f in dataclasses.fields(options)}


BOOLS = {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False, "off": False}


def _convert(field: dataclasses.Field, text: str | None, flag: str) -> Any:
    """The text after a flag as the field's type; None: no value was given."""
    kind, choices = field.type, field.metadata.get("choices")
    kind = kind if isinstance(kind, str) else kind.__name__
    try:
        if kind == "bool":
            value = BOOLS[(text or "true").lower()]
        elif text is None:
            raise UserError(f"{flag}: a value is missing; write {flag}={field.default!r}, for example")
        else:
            value = {"int": int, "float": float, "str": str}[kind](text)
    except (KeyError, ValueError):
        wanted = {"bool": "true or false", "int": "a whole number", "float": "a number"}[kind]
        raise UserError(f"{flag}: {text!r} is not {wanted}") from None
    if kind == "float" and not math.isfinite(value):
        raise UserError(f"{flag}: {text!r} is not a finite number")
    if choices and value not in choices:
        raise UserError(f"{flag}: {text!r} is not one of {', '.join(map(str, choices))}")
    low, high = field.metadata.get("low"), field.metadata.get("high")
    if not ((low is None or value >= low) and (high is None or value <= high)):  # so that nan is refused, too
        wanted = [f"at least {low}"] * (low is not None) + [f"at most {high}"] * (high is not None)
        raise UserError(f"{flag}: {text} is out of range: {' and '.join(wanted)}")
    return value


def _flags(argv: list[str], known: Callable[[str], dataclasses.Field | None]) -> list[tuple[str, str, str | None]]:
    """argv as (name, flag as written, value or None); a bool's value follows `=`, or is the word true or false."""
    found, i = [], 0
    while i < len(argv):
        word = argv[i]
        if not word.startswith("--") or word == "--":
            raise UserError(f"{word!r} is no option: options are written --name=value or --name value; see --help")
        flag, equals, value = word.partition("=")
        name, text = flag[2:].replace("-", "_"), value if equals else None
        field = known(name)
        if text is None and i + 1 < len(argv):  # an unknown name's value, too: it is the name that is wrong
            is_bool = field is not None and field.type in (bool, "bool")
            following = argv[i + 1]
            if following.lower() in BOOLS if is_bool else not following.startswith("--"):
                text, i = following, i + 1
        found.append((name, flag, text))
        i += 1
    return found


def _unknown(flag: str, names: list[str], prog: str) -> UserError:
    near = difflib.get_close_matches(flag[2:].replace("-", "_"), names, 1)
    guess = f"; did you mean --{near[0]}?" if near else ""
    return UserError(f"{prog}: unknown option {flag}{guess} (--help lists all)")


def _build(cls: type[T], given: dict[str, Any]) -> T:
    """Default < preset < flag; remembers which names were given."""
    preset = given.get("preset", "demo")
    values = {f.name: f.metadata["presets"][preset] for f in dataclasses.fields(cls)
              if preset in f.metadata.get("presets", {})}
    options = cls(**{**values, **given})
    options.explicit = frozenset(given)
    if hasattr(options, "check"):
        options.check()
    return options


def _same(a: dataclasses.Field, b: dataclasses.Field | None) -> bool:
    """Is a stage's field the one that all stages share, or has it a default or meaning of its own?"""
    return b is not None and (a.default, a.metadata) == (b.default, b.metadata)


def _help(classes: dict[str, type], prog: str) -> str:
    """One paragraph an option: name, default, presets, meaning, source. Fields that all share are listed once."""
    lines, seen = [f"usage: python {prog} [--name=value …]"], {}
    for prefix, cls in classes.items():
        title = (cls.__doc__ or "").strip().splitlines()
        lines += ["", *title[:1]]
        for f in dataclasses.fields(cls):
            if prefix and _same(f, seen.get(f.name)):
                continue
            if not prefix:
                seen[f.name] = f
            m = f.metadata
            values = ", ".join([f"default {f.default!r}", *(f"{k} {v!r}" for k, v in m.get("presets", {}).items())])
            choices = f" {{{','.join(map(str, m['choices']))}}}" if m.get("choices") else ""
            low, high = m.get("low"), m.get("high")
            values += f", from {low}" * (low is not None) + f" to {high}" * (high is not None)
            source = f" [{m['source']}]" if m.get("source") else ""
            lines.append(f"  --{prefix}{f.name}{choices} ({values})\n        {m.get('help', '')}{source}")
    return "\n".join(lines)


def parse(cls: type[T], argv: list[str], prog: str) -> T:
    """Fill `cls` from argv; `.explicit` of the instance names what was given as a flag. --help prints and exits."""
    if {"--help", "-h"} & set(argv):
        print(_help({"": cls}, prog))
        raise SystemExit(0)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    given = {}
    for name, flag, text in _flags(argv, fields.get):
        if name not in fields:
            raise _unknown(flag, list(fields), prog)
        given[name] = _convert(fields[name], text, flag)
    return _build(cls, given)


def parse_all(common: type, stages: dict[str, type], argv: list[str], prog: str) -> dict[str, Any]:
    """Options of several stages from one line: --seed=1 goes to every stage, --ppo.kl_coef=.1 to `ppo` alone."""
    if {"--help", "-h"} & set(argv):
        print(_help({"": common, **{f"{stage}.": cls for stage, cls in stages.items()}}, prog))
        raise SystemExit(0)
    fields = {f.name: f for f in dataclasses.fields(common)}
    fields |= {f"{stage}.{f.name}": f for stage, cls in stages.items() for f in dataclasses.fields(cls)
               if not _same(f, fields.get(f.name))}
    given: dict[str, dict[str, Any]] = {stage: {} for stage in stages}
    for name, flag, text in _flags(argv, fields.get):
        if name not in fields:
            raise _unknown(flag, list(fields), prog)
        stage, dot, own = name.rpartition(".")
        for target in [stage] if dot else stages:
            given[target][own] = _convert(fields[name], text, flag)
    return {stage: _build(cls, given[stage]) for stage, cls in stages.items()}


def show(options: Any, title: str) -> None:
    """Print the resolved options once; a star marks what differs from the default."""
    default = {f.name: f.default for f in dataclasses.fields(options)}
    words = [f"{'*' if value != default[name] else ''}{name}={value}"
             for name, value in as_dict(options).items() if value != ""]
    print(f"{title}\n  {'  '.join(words)}", flush=True)


def run_main(main: Callable[[list[str]], int | None], argv: list[str]) -> int:
    """Run a command line: a UserError becomes one line and exit code 2; --traceback shows where it arose."""
    try:
        return main(list(argv)) or 0
    except UserError as error:
        if "--traceback" in argv:
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # whoever read our output (head, less) has seen enough
        sys.stdout = None
        return 141
    except OSError as error:  # a full disk, a missing right: the system's own words say what and where
        if "--traceback" in argv:
            traceback.print_exc()
        print(f"error: {error}; free some space, or choose a place that can be written", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130


# ---- what every stage, and every stage of maximum likelihood, understands --------------------------------------------

class Options:
    """Base of the options' dataclasses. `explicit`: the names that were given as flags."""

    explicit: frozenset[str] = frozenset()

    def replace(self: T, **changes: Any) -> T:
        """These options with some values changed, as if they had been so from the start."""
        options = dataclasses.replace(self, **changes)
        options.explicit = self.explicit
        return options

    def not_compared(self) -> set[str]:
        """Names of options that say how a run is started or reported, not what it computes."""
        return {f.name for f in dataclasses.fields(self) if not f.metadata.get("compared", True)}

    def refuse(self, *names: str, why: str) -> None:
        """What has no effect is an error: none of these may have been given as a flag."""
        for name in names:
            if name in self.explicit:
                raise UserError(f"--{name} has no effect {why}")


@dataclasses.dataclass
class Common(Options):
    """Options of all stages."""

    data: str = option("reviews", "data set by name (reviews, shakespeare), or your own .jsonl file or folder")
    source: str = option("", "folder or archive with the data set's raw files, instead of downloading them")
    vocab_size: int = option(4096, "tokens of the vocabulary that is trained on the data, six special ones included",
                             smoke=800, base=50_304, low=262)
    limit: int = option(0, "use only so many distinct texts; 0: all", smoke=800, low=0)
    preset: str = option("demo", "demo: two CPU cores, ten minutes for all; smoke: seconds, for tests; base: one GPU",
                         choices=("smoke", "demo", "base"), compared=False)
    out: str = option("out", "runs are kept in OUT/<data>/<stage>/", compared=False)
    init_from: str = option("", "checkpoint to start from instead of this run's own parent stage; in PPO policy and "
                                "reference")
    reward_from: str = option("", "reward model for PPO instead of this run's own")
    seed: int = option(0, "decides every random draw", low=0)
    device: str = option("auto", "where to compute", choices=("auto", "cpu", "cuda", "mps"))
    dtype: str = option("auto", "precision of matrix products; auto measures", choices=("auto", "float32", "bfloat16"))
    compile: str = option("auto", "torch.compile; auto: where it works and enough work lies ahead to pay for it, as "
                                  "the first steps tell", choices=("auto", "on", "off"))
    recompute: bool = option(False, "gradient checkpointing: keep the inputs of blocks alone, compute the rest again "
                                    "for the gradient: less memory, a third more time", source="Chen 2016")
    save_every: int = option(200, "steps (PPO: updates) between checkpoints", smoke=5, low=1)
    resume: bool = option(False, "go on where the run in this folder stopped", compared=False)
    fresh: bool = option(False, "forget the run in this folder and start anew", compared=False)
    traceback: bool = option(False, "show where in the code an error arose", compared=False)

    def check(self) -> None:
        """Refuse, before anything is done, what does not go together."""
        if self.fresh and self.resume:
            raise UserError("--fresh and --resume contradict each other: give one of them")


@dataclasses.dataclass
class Learning(Common):
    """Options of the three stages that maximise a likelihood."""

    optimizer: str = option("muon", "muon: block matrices by Muon, the rest by AdamW; adamw: all by AdamW",
                            choices=("muon", "adamw"), source="Jordan 2024; Loshchilov 2019")
    muon_steps: int = option(3, "Newton-Schulz iterations of Muon", source="measured: 3 learn as well as 5 here", low=1)
    lr: float = option(0.02, "learning rate of block matrices (Muon), or of all (AdamW)", base=0.01, low=0)
    adam_lr: float = option(0.01, "learning rate of embeddings, norms and heads, by AdamW", base=0.003, low=0)
    weight_decay: float = option(0.0, "decoupled weight decay of block matrices", source="Loshchilov 2019", low=0)
    warmup: float = option(0.03, "share of the steps over which the learning rate rises", low=0, high=1)
    decay: float = option(0.4, "share of the steps, the last ones, over which it falls to 0", low=0, high=1)
    clip: float = option(1.0, "largest gradient norm; 0: any", low=0)
    log_every: int = option(10, "steps between lines of metrics.jsonl", low=1)

    def check(self) -> None:
        super().check()
        if self.optimizer == "adamw":
            self.refuse("adam_lr", "muon_steps", why="with --optimizer adamw, which trains everything at --lr")
