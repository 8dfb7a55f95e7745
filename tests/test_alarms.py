"""What went wrong is said once, on stderr, and a resumed run remembers that it was said."""
import math

import pytest

from ppo import PPOTrainer
from runtime.alarms import Alarm, Alarms

RULES = [Alarm("score", lambda x, first: x < first / 2, "it halved")]


def lines(capsys) -> list[str]:
    return capsys.readouterr().err.splitlines()


def test_a_warning_is_given_once_with_the_remedy(capsys):
    alarms = Alarms("ppo", RULES)
    for step, value in enumerate([4.0, 3.0, 1.0, 0.5]):
        alarms.check(step, {"score": value})
    assert lines(capsys) == ["ppo: warning: score is 1 at step 2 (first 4): it halved"]


def test_a_resumed_run_compares_with_the_same_first_value_and_says_nothing_twice(capsys):
    alarms = Alarms("ppo", RULES)
    alarms.check(0, {"score": 4.0})
    resumed = Alarms("ppo", RULES, alarms.state())
    resumed.check(1, {"score": 1.0})
    assert len(lines(capsys)) == 1
    Alarms("ppo", RULES, resumed.state()).check(2, {"score": 0.1})
    assert lines(capsys) == []


def test_what_is_missing_or_no_number_is_not_judged(capsys):
    alarms = Alarms("ppo", RULES)
    for metrics in ({}, {"score": math.nan}, {"score": 4.0}, {"score": -math.inf}):
        alarms.check(0, metrics)
    assert alarms.first == {"score": 4.0}
    assert lines(capsys) == []


@pytest.mark.parametrize("name,right,wrong", [
    ("end_rate", .1, 0.0), ("kl", 19.0, 21.0), ("entropy", .2, .05), ("eval_distinct2", .8, .7),
    ("value_loss", 10.0, 12.0)])
def test_ppo_tells_how_training_goes_wrong(capsys, name, right, wrong):
    alarms = Alarms("ppo", PPOTrainer.ALARMS)
    alarms.check(0, {name: {"eval_distinct2": .9}.get(name, 1.0)})
    alarms.check(1, {name: right})
    assert lines(capsys) == []
    alarms.check(2, {name: wrong})
    line, = lines(capsys)
    assert name in line
    assert "--" in line  # the option to turn
