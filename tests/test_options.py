"""Options: default < preset < flag, and nothing is ignored."""
import dataclasses
from typing import ClassVar

import pytest

from runtime.options import (Options, UserError, as_dict, option, parse, parse_all, presets_of,
                             run_main, show)


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


def test_default_preset_and_flag_take_precedence_in_this_order():
    assert parse(Stage, [], "x").updates == 36
    assert parse(Stage, ["--preset=smoke"], "x").updates == 2
    o = parse(Stage, ["--updates", "7", "--preset", "smoke"], "x")
    assert (o.updates, o.kl_coef) == (7, 0.5) and o.explicit == {"updates", "preset"}


@pytest.mark.parametrize("words,name,value", [
    (["--kl_coef=.1"], "kl_coef", 0.1), (["--kl-coef", "1e-4"], "kl_coef", 1e-4),
    (["--resume"], "resume", True),
    (["--resume=false"], "resume", False),
    (["--resume", "false"], "resume", False), (["--updates=2_000"], "updates", 2000),
    (["--kl_coef=-1"], "kl_coef", -1.0), (["--kl_coef", "-1"], "kl_coef", -1.0)])
def test_ways_to_write_a_flag(words, name, value):
    assert getattr(parse(Stage, words, "x"), name) == value


def test_a_switch_does_not_swallow_what_follows():
    o = parse(Stage, ["--resume", "--seed", "3"], "x")
    assert (o.resume, o.seed) == (True, 3)


@pytest.mark.parametrize("words,message", [
    (["--kl_coeff=1"], "did you mean --kl_coef"), (["--kl_coeff", "1"], "did you mean --kl_coef"),
    (["--updates=two"], "--updates: 'two' is not a whole number"),
    (["--updates=1.5"], "whole number"), (["--updates=0"],
                                          "--updates: 0 is out of range: at least 1$"),
    (["--lam=2"], "at least 0 and at most 1"), (["--lam=nan"], "not a finite number"),
    (["--critic=both"], "not one of separate, shared"), (["--updates"], "value is missing"),
    (["updates=3"], "no option"), (["--resume=maybe"], "true or false"),
    (["--preset=huge"], "smoke, demo, base")])
def test_what_cannot_be_understood_is_an_error(words, message):
    with pytest.raises(UserError, match=message):
        parse(Stage, words, "x")


def test_several_stages_share_a_command_line():
    o = parse_all(Shared, {"a": Stage, "b": Stage}, ["--seed=3", "--a.kl_coef=.2", "--preset",
                                                     "smoke", "--b.updates",
                                                     "9"], "x")
    assert (o["a"].seed, o["b"].seed, o["a"].kl_coef, o["b"].kl_coef, o["b"].updates,
            o["a"].updates) == (3, 3, 0.2,
                                                                                                          0.5, 9, 2)
    with pytest.raises(UserError, match="a.kl_coef"):
        parse_all(Shared, {"a": Stage}, ["--a.klcoef=1"], "x")
    with pytest.raises(UserError, match="unknown option --kl_coef"):
        parse_all(Shared, {"a": Stage}, ["--kl_coef=1"], "x")


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
    said = capsys.readouterr().out
    assert "--seed (default 0)" in said and "--a.seed (default 7)" in said and "--b.seed" not in said


def test_help_tells_default_presets_meaning_and_source(capsys):
    with pytest.raises(SystemExit) as stop:
        parse(Stage, ["--help"], "train.py ppo")
    text = capsys.readouterr().out
    assert stop.value.code == 0 and "train.py ppo" in text
    assert "--kl_coef (default 0.05, smoke 0.5)\n        price of KL [MOSS]" in text


def test_every_stage_of_train_explains_every_option():
    from train import STAGES
    for cls, _ in STAGES.values():
        for field in dataclasses.fields(cls):
            assert len(field.metadata["help"]) > 10, field.name
        for preset in ("smoke", "demo", "base"):
            assert parse(cls, [f"--preset={preset}"], "x").preset == preset


def test_only_options_that_differ_from_their_defaults_are_shown(capsys):
    show(parse(Stage, ["--updates=5", "--seed=0"], "x"), "ppo")
    assert capsys.readouterr().out == "ppo: updates=5\n"
    show(parse(Stage, [], "x"), "ppo")
    assert capsys.readouterr().out == "ppo: the defaults\n"
    assert as_dict(Stage())["critic"] == "separate"


def test_a_class_takes_its_parents_presets_and_its_own_win():
    @dataclasses.dataclass
    class Child(Stage):
        PRESETS: ClassVar = {"smoke": dict(updates=3)}

    assert presets_of(Child) == {"smoke": dict(kl_coef=0.5, updates=3), "base": dict(updates=200)}


def test_presets_name_options_that_there_are():
    from train import STAGES
    for cls, _ in STAGES.values():
        for values in presets_of(cls).values():
            assert set(values) <= {field.name for field in dataclasses.fields(cls)}


@dataclasses.dataclass
class Words(Options):
    """A flag with another name, and one of two words."""

    path: str = option("", "where", flag="from")
    pair: str = option("", "two folders", words=2)
    loud: bool = option(False, "switch")


@pytest.mark.parametrize("words", [["--from", "a", "--pair", "b", "c"], ["--path=a", "--pair=b,c"],
                                   ["--pair", "b", "c", "--from=a"]])
def test_a_flag_may_have_another_name_and_several_words(words):
    o = parse(Words, words, "x")
    assert (o.path, o.pair) == ("a", "b,c")
    assert o.explicit == {"path", "pair"}


def test_a_flag_of_two_words_does_not_swallow_the_next_flag():
    o = parse(Words, ["--pair", "b", "--loud"], "x")
    assert (o.pair, o.loud) == ("b", True)


def test_options_replaced_by_code_keep_what_was_given():
    o = parse(Words, ["--from", "a"], "x").replace(pair="b,c")
    assert (o.path, o.pair, o.explicit) == ("a", "b,c", {"path"})


def test_an_option_is_declared_with_known_properties_only():
    with pytest.raises(TypeError, match="smoke"):
        option(1, "help", smoke=2)


def test_errors_of_the_user_are_one_line_and_exit_code_2(capsys):
    def main(argv):
        raise UserError("the disk is full: free some space")

    assert run_main(main, []) == 2
    assert capsys.readouterr().err == "error: the disk is full: free some space\n"
    assert run_main(main, ["--traceback"]) == 2 and "Traceback" in capsys.readouterr().err
    assert run_main(lambda argv: None, []) == 0

    def full(argv):
        raise OSError(28, "No space left on device", "out/metrics.jsonl")

    assert run_main(full, []) == 2
    assert "No space left on device: 'out/metrics.jsonl'" in capsys.readouterr().err

    def interrupted(argv):
        raise KeyboardInterrupt

    assert run_main(interrupted, []) == 130

    def bug(argv):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):  # our own errors are not dressed up as the user's
        run_main(bug, [])
