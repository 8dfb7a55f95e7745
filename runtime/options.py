"""A dataclass becomes a command line.

Each chapter keeps its options as a dataclass beside its code. A field is written with
`option(default, help, …)`, which also holds the range and the source of the number; what --preset
smoke and base change stands in the class's PRESETS. `parse` fills the dataclass: default < preset <
flag. Unknown and ineffective options are errors.
"""
import dataclasses
import difflib
import inspect
import itertools
import math
from typing import Any, ClassVar, TypeVar

from runtime.terminal import UserError, require_unicode, run_main as run_main  # run_main: for all who parse

T = TypeVar("T")


# ---- declaring -----------------------------------------------------------------------------------

def option(default: Any, help: str, *, source: str = "", choices: tuple | None = None,
           low: float | None = None, high: float | None = None, **more: Any) -> Any:
    """A dataclass field with what --help says of it and the choices or the range (both ends
    allowed) of its values.

    More, if need be: flag="from", a second name of the flag; words=2, the number of words that the
    value takes, which are joined by commas; compared=False for an option that does not change what
    a run computes.
    """
    if unknown := set(more) - {"flag", "words", "compared"}:
        raise TypeError(f"option: unknown {', '.join(unknown)}")
    return dataclasses.field(default=default, metadata={"help": help, "source": source, "choices": choices,
                                                        "low": low, "high": high, **more})


def as_dict(options: Any) -> dict[str, Any]:
    """Option names and values."""
    return {f.name: getattr(options, f.name) for f in dataclasses.fields(options)}


def presets_of(cls: type) -> dict[str, dict[str, Any]]:
    """{preset: {option: value}} of a class: its own block over those of its parents.

    A class that redefines an option gives it a default of its own, so the parents' preset values
    of that option no longer apply; the class repeats those that it wants. `smollm` has
    those of `real`, too.
    """
    merged: dict[str, dict[str, Any]] = {}
    for base in reversed(cls.__mro__):
        redefined = inspect.get_annotations(base)
        merged = {preset: {name: value for name, value in values.items() if name not in redefined}
                  for preset, values in merged.items()}
        for preset, values in vars(base).get("PRESETS", {}).items():
            merged[preset] = merged.get(preset, {}) | values
    return merged | ({"smollm": merged["real"] | merged.get("smollm", {})} if "real" in merged else {})


class Options:
    """Base of the options' dataclasses. `explicit`: the names that were given as flags. `place`: the folder of
    the run's stages, where that is not OUT/<data>."""

    TOTAL: ClassVar[str] = ""  # the option that says how long a run is
    IGNORED: ClassVar[tuple[str, ...]] = ()  # options of all stages without effect on this one
    explicit: frozenset[str] = frozenset()
    place: str = ""

    def replace(self: T, **changes: Any) -> T:
        """A copy of these options with some values changed."""
        options = dataclasses.replace(self, **changes)
        options.explicit, options.place = self.explicit, self.place
        return options

    def refuse(self, *names: str, why: str) -> None:
        """UserError if one of these was given as a flag: an option without effect is an error."""
        flags = {f.name: f.metadata.get("flag", f.name) for f in dataclasses.fields(self)}
        for name in names:
            if name in self.explicit:
                raise UserError(f"--{flags[name]} has no effect {why}")

    def not_compared(self) -> set[str]:
        """Names of options that say how a run is started or reported, not what it computes."""
        return {f.name for f in dataclasses.fields(self) if not f.metadata.get("compared", True)}


# ---- parsing -------------------------------------------------------------------------------------
# Not argparse: it would need a private attribute to read -1e-4 as a value, cannot take one or two
# words, and was no shorter with the same messages.

# What any number is: counts fit every array index and clock, and float32 holds all that is computed
# with. An option's own low and high are narrower.
BOUNDS = {"int": (-10**15, 10**15), "float": (-3e38, 3e38)}

BOOLS = {"true": True, "1": True, "yes": True, "on": True,
         "false": False, "0": False, "no": False, "off": False}


def _type(field: dataclasses.Field) -> str:
    return field.type if isinstance(field.type, str) else field.type.__name__


def bounds(field: dataclasses.Field) -> tuple[float, float] | None:
    """(lowest, highest) value of a number's option, both allowed; None if it is no number."""
    low, high = BOUNDS.get(_type(field), (None, None))
    if low is None:
        return None
    m = field.metadata
    return (low if m.get("low") is None else m["low"],
            high if m.get("high") is None else m["high"])


def _convert(field: dataclasses.Field, text: str | None, flag: str) -> Any:
    """The text after a flag as the field's type, checked; None: the flag stands alone."""
    kind, m = _type(field), field.metadata
    if text is None and kind != "bool":
        example = "TEXT" if field.default == "" else repr(field.default)
        raise UserError(f"{flag}: a value is missing; write {flag}={example}, for example")
    try:
        if kind == "bool":
            value = BOOLS["true" if text is None else text.lower()]
        else:
            value = {"int": int, "float": float, "str": str}[kind](text)
    except (KeyError, ValueError):
        wanted = {"bool": "true or false", "int": "a whole number", "float": "a number"}[kind]
        raise UserError(f"{flag}: {text[:60]!r} is not {wanted}") from None
    if kind == "str":
        _check_text(field, text, flag)
    if kind == "float" and not math.isfinite(value):
        raise UserError(f"{flag}: {text[:60]!r} is not a finite number")
    if m.get("choices") and value not in m["choices"]:
        raise UserError(f"{flag}: {text[:60]!r} is not one of {', '.join(map(str, m['choices']))}")
    if (ends := bounds(field)) and not ends[0] <= value <= ends[1]:
        limits = [f"{word} {end:g}" if kind == "float" else f"{word} {end}"
                  for word, end, widest in zip(("at least", "at most"), ends, BOUNDS[kind],
                                               strict=True) if end != widest or end * value > 0]
        raise UserError(f"{flag}: {text[:60]} is out of range: {' and '.join(limits)}")
    return value


def _check_text(field: dataclasses.Field, text: str, flag: str) -> None:
    """UserError for a text that is no Unicode, or empty where the default says that it must not
    be."""
    if not text.strip() and field.default and not field.metadata.get("choices"):
        raise UserError(f"{flag}: must not be empty; leave it out for {field.default!r}")
    require_unicode(text, f"{flag}: ")


def _fields(cls: type, prefix: str = "") -> dict[str, dataclasses.Field]:
    """Fields by the names of their flags, each after the prefix."""
    return {prefix + name: f for f in dataclasses.fields(cls)
            for name in (f.name, f.metadata.get("flag")) if name}


def _field_named(name: str, flag: str, fields: dict[str, dataclasses.Field],
                 prog: str) -> dataclasses.Field:
    """The field of a flag; UserError that offers the nearest name if there is none."""
    if name not in fields:
        near = difflib.get_close_matches(name, list(fields), 1)
        guess = f"; did you mean --{near[0]}?" if near else ""
        raise UserError(f"{prog}: unknown option {flag}{guess} (--help lists all)")
    return fields[name]


def _value_words(field: dataclasses.Field, following: list[str]) -> list[str]:
    """Those of the following words that are the field's value: for a switch true, false and the
    like, else whatever is no flag (so a negative number is a value)."""
    def is_value(word: str) -> bool:
        return word.lower() in BOOLS if _type(field) == "bool" else not word.startswith("--")

    return list(itertools.takewhile(is_value, following[:field.metadata.get("words", 1)]))


def _given(argv: list[str], fields: dict[str, dataclasses.Field], prog: str) -> dict[str, Any]:
    """The values that argv gives, by the fields' names (with their prefixes)."""
    values, i = {}, 0
    while i < len(argv):
        flag, equals, text = argv[i].partition("=")
        if not flag.startswith("--") or flag == "--":
            raise UserError(f"{argv[i]!r} is no option: options are written --name=value or "
                            "--name value; see --help")
        i += 1
        name = flag[2:].replace("-", "_")
        field = _field_named(name, flag, fields, prog)
        if not equals:
            words = _value_words(field, argv[i:])
            text = ",".join(words) if words else None
            i += len(words)
        prefix, dot, _ = name.rpartition(".")
        values.pop(prefix + dot + field.name, None)  # the last of two flags counts, and counts last
        values[prefix + dot + field.name] = _convert(field, text, flag)
    return values


def build(cls: type[T], given: dict[str, Any]) -> T:
    """Default < preset < flag; remembers which names were given."""
    options = cls(**{**presets_of(cls).get(given.get("preset", ""), {}), **given})
    options.explicit = frozenset(given)
    if hasattr(options, "check"):
        options.check()
    return options


def _shared(field: dataclasses.Field, common: dict[str, dataclasses.Field]) -> bool:
    """Is a stage's field the one of all stages, rather than one with a default or meaning of its
    own?"""
    other = common.get(field.name)
    return other is not None and (field.default, field.metadata) == (other.default, other.metadata)


def parse(cls: type[T], argv: list[str], prog: str) -> T:
    """Fill `cls` from argv; `.explicit` of the instance names what was given as a flag. --help
    prints and exits."""
    if {"--help", "-h"} & set(argv):
        print(_help({"": cls}, prog))
        raise SystemExit(0)
    return build(cls, _given(argv, _fields(cls), prog))


def parse_all(common: type, stages: dict[str, type], argv: list[str], prog: str) -> dict[str, Any]:
    """Options of several stages from one line: --seed=1 goes to every stage, --ppo.kl_coef=.1 to
    `ppo` alone."""
    if {"--help", "-h"} & set(argv):
        print(_help({"": common, **{f"{stage}.": cls for stage, cls in stages.items()}}, prog))
        raise SystemExit(0)
    fields = _fields(common)
    fields |= {flag: f for stage, cls in stages.items()
               for flag, f in _fields(cls, f"{stage}.").items() if not _shared(f, fields)}
    given: dict[str, dict[str, Any]] = {stage: {} for stage in stages}
    for name, value in _given(argv, fields, prog).items():
        stage, dot, own = name.rpartition(".")
        for target in [stage] if dot else stages:
            given[target][own] = value
    return {stage: build(cls, given[stage]) for stage, cls in stages.items()}


# ---- showing -------------------------------------------------------------------------------------

def _help(classes: dict[str, type], prog: str) -> str:
    """One paragraph an option: name, choices, default, presets, range, meaning, source. Shared
    fields come once."""
    lines, shared = [f"usage: python {prog} [--name=value …]"], {}
    for prefix, cls in classes.items():
        lines += ["", *(cls.__doc__ or "").strip().splitlines()[:1]]
        presets = presets_of(cls)
        for f in dataclasses.fields(cls):
            if prefix and _shared(f, shared):
                continue
            if not prefix:
                shared[f.name] = f
            m = f.metadata
            choices = f" {{{','.join(map(str, m['choices']))}}}" if m.get("choices") else ""
            values = [f"default {f.default!r}", *(f"{preset} {changed[f.name]!r}" for preset,
                                                  changed in presets.items()
                                                  if f.name in changed)]
            limits = " ".join(f"{word} {m[key]}" for word, key in (("from", "low"), ("to", "high"))
                              if m.get(key) is not None)
            values += [limits] if limits else []
            source = f" [{m['source']}]" if m.get("source") else ""
            also = f", --{m['flag']}" if m.get("flag") else ""
            lines += [f"  --{prefix}{f.name}{also}{choices} ({', '.join(values)})",
                      f"        {m.get('help', '')}{source}"]
    return "\n".join(lines)


def show(options: Any, title: str) -> None:
    """Print the options that differ from their defaults; config.json holds all. One that says how a run
    is started, such as resume, is shown only if it was given: a run of all stages sets some itself."""
    words = [f"{f.name}={getattr(options, f.name)}" for f in dataclasses.fields(options)
             if getattr(options, f.name) != f.default
             and (f.name in options.explicit or f.metadata.get("compared", True))]
    print(f"{title}: {'  '.join(words) or 'the defaults'}", flush=True)


# ---- what all stages understand, and those of maximum likelihood ---------------------------------

@dataclasses.dataclass
class Common(Options):
    """Options of all stages."""

    PRESETS: ClassVar = {  # what differs from the defaults, which are the preset `demo`
        "smoke": dict(vocab_size=800, limit=800, save_every=5),
        "base": dict(vocab_size=50_304), "smollm": dict(train_layers=8),
    }

    # The data.
    data: str = option("reviews", "data set by name (docs/data.md), or your own file (.jsonl, .json, "
                                  ".csv, .tsv) or folder; - is standard input")
    source: str = option("", "file, folder, archive or URL of the data set's raw files; empty: download them")
    vocab_size: int = option(4096, "tokens of the vocabulary that is trained on the data, six "
                                   "special ones included", low=262, high=1_000_000)
    limit: int = option(0, "use only this many distinct texts; 0: all", low=0)
    skip_bad: bool = option(False, "leave out bad lines of your own files, and say how many")
    fields: str = option("", "your files' names for ours: prompt=question,chosen=good")
    template: str = option("", "instruction around your prompts, with {prompt} in it")
    judge_share: float = option(-1.0, "share of your feedback kept for judges; -1: half of 2,000 records "
                                      "and more, a fifth of fewer", low=-1, high=0.9)
    # The run.
    preset: str = option("demo", "demo: two CPU cores; smoke: seconds, for tests; base: a GPU; real: a model of "
                                 "others; smollm: SmolLM2-135M on two cores", compared=False,
                         source="not given: that of the model that is gone on from",
                         choices=("smoke", "demo", "base", "real", "smollm"))
    out: str = option("out", "runs are written to OUT/<data>/<stage>/", compared=False)
    init_from: str = option("", "checkpoint to start from; empty: this run's own parent stage; in "
                                "PPO it is both policy and reference")
    reward_from: str = option("", "reward model for PPO; empty: this run's own")
    seed: int = option(0, "every random draw follows from it", low=0)
    save_every: int = option(200, "steps (PPO: updates) between checkpoints", low=1)
    resume: bool = option(False, "resume the run in this folder", compared=False)
    fresh: bool = option(False, "delete the run in this folder and start again", compared=False)
    tensorboard: bool = option(False, "write the numbers of metrics.jsonl as TensorBoard's event files, too",
                               compared=False)
    traceback: bool = option(False, "show where in the code an error arose", compared=False)
    # What learns.
    train_layers: int = option(0, "only the last so many blocks learn, with the final norm and the heads; 0: all",
                               low=0, high=1000)
    lora_rank: int = option(0, "rank of adapters that learn instead, on attention and MLP (of the last --train_layers "
                               "blocks); 0: none", source="Hu 2021; usual: 8 to 64", low=0, high=100_000)
    lora_alpha: float = option(0.0, "what they say counts this / rank times; 0: twice the rank", low=0, high=1e6,
                               source="Hu 2021 holds it fixed while ranks are tried; 2 · rank is usual")
    # The machine.
    device: str = option("auto", "device to compute on", choices=("auto", "cpu", "cuda", "mps"))
    dtype: str = option("auto", "precision of matrix products; auto measures", choices=("auto", "float32", "bfloat16"))
    compile: str = option("auto", "torch.compile; auto: if it works here and the first steps show that the remaining "
                                  "ones are worth it", choices=("auto", "on", "off"))
    deterministic: bool = option(False, "for numbers to publish: float32, two threads, one kind of "
                                        "products, nothing compiled, and sums in a fixed order, so that machines "
                                        "alike give the same digits")
    recompute: bool = option(False, "gradient checkpointing: store only each block's input and recompute the block "
                                    "in backward; less memory, a third more time", source="Chen 2016")

    def check(self) -> None:
        """Refuse, before anything is done, what does not go together."""
        if self.fresh and self.resume:
            raise UserError("--fresh and --resume contradict each other: give one of them")
        for name in ("dtype", "rollout_dtype", "compile") if self.deterministic else ():
            if getattr(self, name, "auto") not in ("auto", "float32", "off"):
                raise UserError(f"--deterministic and --{name} {getattr(self, name)} contradict "
                                "each other: it computes in float32, and compiles nothing")
        if not self.lora_rank:
            self.refuse("lora_alpha", why="without --lora_rank")


@dataclasses.dataclass
class MaximumLikelihoodOptions(Common):
    """Options of the stages that maximise a likelihood: all but ppo."""

    PRESETS: ClassVar = {"base": dict(lr=0.01, adam_lr=0.003), "real": dict(optimizer="adamw")}

    # The optimizer.
    optimizer: str = option("muon", "muon: block matrices by Muon, all else by AdamW; adamw: everything by AdamW",
                            choices=("muon", "adamw"), source="Jordan 2024; Loshchilov 2019")
    newton_schulz_iterations: int = option(3, "iterations that make Muon's step orthogonal",
                                           source="measured: 3 learn as well as 5 here", low=1, high=100)
    weight_decay: float = option(0.0, "decoupled weight decay of block matrices", source="Loshchilov 2019", low=0)
    clip: float = option(1.0, "clip gradients to this norm; 0 disables", low=0)
    # The learning rate and its schedule.
    lr: float = option(0.02, "learning rate of block matrices (muon) or of everything (adamw)", low=0)
    adam_lr: float = option(0.01, "AdamW's learning rate for embeddings, norms and heads", low=0)
    warmup: float = option(0.03, "share of the steps over which the learning rate rises", low=0, high=1)
    decay: float = option(0.4, "share of the steps, at the end, over which the learning rate falls to 0", low=0, high=1)
    # How much is learned, what is kept, and the log.
    records: int = option(0, "records to learn from, repetitions counted, at most; 0: all that --epochs has", low=0)
    keep: str = option("best", "weights at the end: those with the best validation, or the last ones",
                       choices=("best", "last"))
    log_every: int = option(10, "steps between lines of metrics.jsonl", low=1)

    def check(self) -> None:
        super().check()
        if self.optimizer == "adamw":
            self.refuse("adam_lr", "newton_schulz_iterations", why="with --optimizer adamw, all of which goes by --lr")
        elif self.lora_rank and not self.IGNORED:
            self.refuse("lr", "newton_schulz_iterations", why="with --lora_rank, as AdamW trains adapters at --adam_lr")
        if self.lora_rank and not self.IGNORED:
            self.refuse("weight_decay", why="with --lora_rank: block matrices do not learn")
