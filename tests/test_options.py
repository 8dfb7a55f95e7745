"""Options: default < preset < flag, and nothing is ignored."""
import dataclasses
import importlib
import math
from typing import ClassVar

import pytest

from runtime.options import (Common, Options, UserError, as_dict, bounds, option, parse, parse_all,
                             presets_of, show)
from tests.conftest import ROOT


@dataclasses.dataclass
class Shared:
    """All stages."""

    preset: str = option("demo", "sizes", choices=("smoke", "demo", "base"))
    seed: int = option(0, "draws")
    resume: bool = option(False, "go on")


@dataclasses.dataclass
class Stage(Shared):
    """One stage."""

    PRESETS: ClassVar = {"smoke": dict(kl_coef=0.5, updates=2), "base": dict(updates=200)}

    kl_coef: float = option(0.05, "price of KL", source="MOSS")
    updates: int = option(36, "updates", low=1)
    lam: float = option(0.95, "trade", low=0, high=1)
    critic: str = option("separate", "whose trunk", choices=("separate", "shared"))
    title: str = option("", "any text")


def test_default_preset_and_flag_take_precedence_in_this_order():
    assert parse(Stage, [], "x").updates == 36
    assert parse(Stage, ["--preset=smoke"], "x").updates == 2
    o = parse(Stage, ["--updates", "7", "--preset", "smoke"], "x")
    assert (o.updates, o.kl_coef) == (7, 0.5)


def test_options_know_which_flags_were_given():
    assert parse(Stage, [], "x").explicit == set()
    o = parse(Stage, ["--updates=36", "--preset", "smoke"], "x")  # one of them at its default
    assert o.explicit == {"updates", "preset"}


@pytest.mark.parametrize("words,name,value", [
    (["--kl_coef=.1"], "kl_coef", 0.1), (["--kl-coef", "1e-4"], "kl_coef", 1e-4),
    (["--kl_coef=-1"], "kl_coef", -1.0), (["--kl_coef", "-1"], "kl_coef", -1.0),
    (["--kl_coef", "-1e-4"], "kl_coef", -1e-4), (["--updates=2_000"], "updates", 2000),
    (["--updates=2", "--updates=3"], "updates", 3),
    (["--resume"], "resume", True), (["--resume", "on"], "resume", True),
    (["--resume=false"], "resume", False), (["--resume", "false"], "resume", False),
    (["--title", "-x"], "title", "-x"), (["--title=--x=y"], "title", "--x=y"),
    (["--title", ""], "title", ""), (["--title="], "title", "")])
def test_ways_to_write_a_flag(words, name, value):
    assert getattr(parse(Stage, words, "x"), name) == value


def test_a_switch_does_not_swallow_what_follows():
    o = parse(Stage, ["--resume", "--seed", "3"], "x")
    assert (o.resume, o.seed) == (True, 3)


@pytest.mark.parametrize("words,message", [
    (["--kl_coeff=1"], "^x: unknown option --kl_coeff; did you mean --kl_coef"),
    (["--kl_coeff", "1"], "unknown option --kl_coeff; did you mean --kl_coef"),
    (["--update=3"], "unknown option --update; did you mean --updates"),  # no abbreviations
    (["--zzz=3"], r"^x: unknown option --zzz \(--help lists all\)$"),
    (["--updates=two"], "--updates: 'two' is not a whole number"),
    (["--updates=1.5"], "--updates: '1.5' is not a whole number"),
    (["--updates=0"], "--updates: 0 is out of range: at least 1$"),
    (["--lam=2"], "--lam: 2 is out of range: at least 0 and at most 1"),
    (["--lam=nan"], "--lam: 'nan' is not a finite number"),
    (["--critic=both"], "--critic: 'both' is not one of separate, shared"),
    (["--updates"], "--updates: a value is missing; write --updates=36"),
    (["--updates", "--resume"], "--updates: a value is missing"),
    (["--title"], "--title: a value is missing; write --title=TEXT"),
    (["updates=3"], "'updates=3' is no option"), (["-u", "3"], "'-u' is no option"),
    (["--"], "'--' is no option"), (["--title", "a", "b"], "'b' is no option"),
    (["--resume=maybe"], "--resume: 'maybe' is not true or false"),
    (["--preset=huge"], "'huge' is not one of smoke, demo, base")])
def test_what_cannot_be_understood_is_an_error(words, message):
    with pytest.raises(UserError, match=message):
        parse(Stage, words, "x")


def parse_both(*words: str) -> tuple[Stage, Stage]:
    """The options of two stages, a and b, from one command line."""
    o = parse_all(Shared, {"a": Stage, "b": Stage}, list(words), "x")
    return o["a"], o["b"]


def test_a_shared_option_reaches_every_stage():
    a, b = parse_both("--seed=3", "--preset", "smoke")
    assert (a.seed, b.seed) == (3, 3)
    assert (a.updates, b.updates) == (2, 2)
    assert a.explicit == b.explicit == {"seed", "preset"}


def test_an_option_with_a_stages_name_reaches_this_stage_alone():
    a, b = parse_both("--a.kl-coef=.2", "--b.updates", "9")
    assert (a.kl_coef, b.kl_coef) == (0.2, 0.05)
    assert (a.updates, b.updates) == (36, 9)
    assert (a.explicit, b.explicit) == ({"kl_coef"}, {"updates"})


@pytest.mark.parametrize("word,message", [
    ("--a.klcoef=1", "unknown option --a.klcoef; did you mean --a.kl_coef"),
    ("--kl_coef=1", "unknown option --kl_coef; did you mean --a.kl_coef|--b.kl_coef"),
    ("--a.seed=1", "unknown option --a.seed"), ("--c.updates=1", "unknown option --c.updates"),
    ("--a.updates=0", "--a.updates: 0 is out of range")])
def test_what_no_stage_understands_is_an_error(word, message):
    with pytest.raises(UserError, match=message):
        parse_both(word)


@dataclasses.dataclass
class Own(Shared):
    """A stage whose seed has a default of its own."""

    seed: int = option(7, "draws")


def test_what_a_stage_redefines_can_be_set_and_is_shown_for_it_alone(capsys):
    o = parse_all(Shared, {"a": Own, "b": Stage}, ["--a.seed=4"], "x")
    assert (o["a"].seed, o["b"].seed) == (4, 0)
    with pytest.raises(UserError, match="unknown option --b.seed"):
        parse_all(Shared, {"a": Own, "b": Stage}, ["--b.seed=4"], "x")
    with pytest.raises(SystemExit):
        parse_all(Shared, {"a": Own, "b": Stage}, ["--help"], "x")
    text = capsys.readouterr().out
    assert "--seed (default 0)" in text
    assert "--a.seed (default 7)" in text
    assert "--b.seed" not in text


def test_help_tells_default_presets_range_meaning_and_source(capsys):
    with pytest.raises(SystemExit) as stop:
        parse(Stage, ["--updates=0", "--help"], "train.py ppo")
    text = capsys.readouterr().out
    assert stop.value.code == 0
    assert text.startswith("usage: python train.py ppo ")
    assert "--kl_coef (default 0.05, smoke 0.5)\n        price of KL [MOSS]" in text
    assert "--updates (default 36, smoke 2, base 200, from 1)\n" in text
    assert "--lam (default 0.95, from 0 to 1)\n" in text
    assert "--critic {separate,shared} (default 'separate')\n" in text


def test_every_stage_of_train_explains_every_option():
    from train import commands
    for cls, _ in commands().values():
        for field in dataclasses.fields(cls):
            assert len(field.metadata["help"]) > 10, field.name
        for preset in ("smoke", "demo", "base"):
            assert parse(cls, [f"--preset={preset}"], "x").preset == preset


def test_only_options_that_differ_from_their_defaults_are_shown(capsys):
    show(parse(Stage, ["--updates=5", "--seed=0"], "x"), "ppo")
    assert capsys.readouterr().out == "ppo: updates=5\n"
    show(parse(Stage, [], "x"), "ppo")
    assert capsys.readouterr().out == "ppo: the defaults\n"


def test_what_a_run_of_all_stages_sets_itself_is_not_shown_as_an_option_that_was_given(capsys):
    """`resume` above all: it says how a run is started, and so is shown only to who gave it."""
    show(parse(Common, ["--seed=3", "--out=here"], "x").replace(resume=True), "sft: options")
    assert capsys.readouterr().out == "sft: options: out=here  seed=3\n"
    show(parse(Common, ["--resume"], "x"), "sft: options")
    assert capsys.readouterr().out == "sft: options: resume=True\n"



def test_all_options_are_in_the_record():
    assert as_dict(Stage(updates=5)) == dict(preset="demo", seed=0, resume=False, kl_coef=0.05,
                                             updates=5, lam=0.95, critic="separate", title="")


def test_a_class_takes_its_parents_presets_and_its_own_win():
    @dataclasses.dataclass
    class Child(Stage):
        PRESETS: ClassVar = {"smoke": dict(updates=3)}

    assert presets_of(Child) == {"smoke": dict(kl_coef=0.5, updates=3), "base": dict(updates=200)}


def test_a_redefined_option_drops_its_parents_preset_values():
    @dataclasses.dataclass
    class Child(Stage):
        PRESETS: ClassVar = {"smoke": dict(lam=0.5)}
        updates: int = option(50, "updates")

    assert presets_of(Child) == {"smoke": dict(kl_coef=0.5, lam=0.5), "base": {}}
    assert parse(Child, ["--preset=base"], "x").updates == 50
    assert parse(Child, ["--preset=smoke"], "x").updates == 50


def test_presets_name_options_and_presets_that_there_are():
    from train import commands
    for cls, _ in commands().values():
        assert set(presets_of(cls)) <= {"smoke", "base", "real", "smollm"}
        for values in presets_of(cls).values():
            assert set(values) <= {field.name for field in dataclasses.fields(cls)}


def test_the_values_of_presets_are_in_their_options_ranges():
    from train import commands
    for cls, _ in commands().values():
        for preset, values in presets_of(cls).items():
            words = [f"--{name}={value}" for name, value in values.items()]
            assert as_dict(parse(cls, words, "x")).items() >= values.items(), preset


@dataclasses.dataclass
class Words(Options):
    """A flag with another name, and one of two words."""

    path: str = option("", "where", flag="from")
    pair: str = option("", "two folders", words=2)
    loud: bool = option(False, "switch")


@pytest.mark.parametrize("words", [["--from", "a", "--pair", "b", "c"], ["--path=a", "--pair=b,c"],
                                   ["--pair", "b", "c", "--from=a"],
                                   ["--pair", "b,c", "--path", "a"]])
def test_a_flag_may_have_another_name_and_several_words(words):
    o = parse(Words, words, "x")
    assert (o.path, o.pair) == ("a", "b,c")
    assert o.explicit == {"path", "pair"}


def test_help_lists_both_names_of_a_flag(capsys):
    with pytest.raises(SystemExit):
        parse(Words, ["-h"], "x")
    assert "  --path, --from (default '')\n" in capsys.readouterr().out


def test_a_flag_of_two_words_takes_no_third():
    with pytest.raises(UserError, match="'d' is no option"):
        parse(Words, ["--pair", "b", "c", "d"], "x")


def test_a_flag_of_two_words_does_not_swallow_the_next_flag():
    o = parse(Words, ["--pair", "b", "--loud"], "x")
    assert (o.pair, o.loud) == ("b", True)


def test_options_replaced_by_code_keep_what_was_given():
    o = parse(Words, ["--from", "a"], "x").replace(pair="b,c")
    assert (o.path, o.pair, o.explicit) == ("a", "b,c", {"path"})


def test_an_option_is_declared_with_known_properties_only():
    with pytest.raises(TypeError, match="smoke"):
        option(1, "help", smoke=2)


# ---- the ends of every range ---------------------------------------------------------------------

def commands() -> set[type]:
    """The options of all commands: every dataclass of options in a module with a command."""
    paths = [*ROOT.glob("*.py"), *ROOT.glob("data/*.py"), *ROOT.glob("tools/*.py")]
    modules = [importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
               for path in paths if path.name != "__init__.py"]
    return {cls for module in modules for cls in vars(module).values()
            if isinstance(cls, type) and dataclasses.is_dataclass(cls) and cls is not Options
            and any("low" in field.metadata for field in dataclasses.fields(cls))}


FIELDS = [pytest.param(cls, field, id=f"{cls.__name__}-{field.name}")
          for cls in sorted(commands(), key=lambda cls: (cls.__name__, cls.__module__))
          for field in dataclasses.fields(cls)]


def refusal(cls: type, name: str, value) -> str:
    """Why --name=value is refused; empty if it is not. (What options refuse together is no matter of
    a range.)"""
    try:
        parse(cls, [f"--{name}={value}"], "x")
    except UserError as error:
        return str(error)
    return ""


def within_and_beyond(field: dataclasses.Field) -> tuple[list, list]:
    """(values that an option takes, among them the ends of its range; values that it refuses)."""
    kind, choices = field.type, field.metadata.get("choices")
    if kind in (int, float):
        low, high = bounds(field)
        no_numbers = ["", " ", "x", "nan", "inf", "-inf", "1e400", "9" * 5000, "0x10"]
        if kind is int:
            return [low, high], [*no_numbers, low - 1, high + 1, 10**30, -10**30, 1.5, "1e3"]
        return [low, high], [*no_numbers, math.nextafter(low, -math.inf),
                             math.nextafter(high, math.inf), 1e39, -1e39]
    if kind is bool:
        return ["true", "no", "1"], ["", "2", "-1", "x"]
    if choices:
        return [*choices], ["", " ", "x", field.default.upper()]
    return ["a b", "好", "."], ["\udcff", *["", " "] * bool(field.default)]


@pytest.mark.parametrize("cls,field", FIELDS)
def test_both_ends_of_every_range_are_allowed_and_nothing_beyond(cls, field):
    within, beyond = within_and_beyond(field)
    for value in within:
        assert not refusal(cls, field.name, value).startswith(f"--{field.name}: ")
    for value in beyond:
        why = refusal(cls, field.name, value)
        assert why.startswith(f"--{field.name}: "), value
        assert "\n" not in why
        assert len(why) < 300


def test_every_default_is_in_its_range():
    for cls in commands():
        for field in dataclasses.fields(cls):
            if type(field.default) in (int, float):
                low, high = bounds(field)
                assert low <= field.default <= high, field.name
