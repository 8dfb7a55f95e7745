"""Tables and curves show the numbers that they are given."""
import json
import math

import pytest

from runtime.tables import cell, table, text_plot, to_json


def test_a_table_shows_three_digits_and_a_dash_for_what_is_missing():
    rows = [{"a": 1.23456, "b": "x"}, {"a": None, "b": 12.34}]
    assert table(rows, {"a": "A", "b": "B"}) \
        == ("| A     | B    |\n| ----- | ---- |\n| 1.235 | x    |\n| –     | 12.3 |")


@pytest.mark.parametrize("value,expected", [
    ((.9164, .888, .94), "0.916 ±.026"), ((25.21, 24.3, 26.1), "25.2 ±.9"),
    ((4.4, 3.1, 5.7), "4.400 ±1.300"), ((.5, math.nan, math.nan), "0.500")])
def test_an_interval_is_shown_by_half_its_width(value, expected):
    assert cell(value) == expected


def test_json_has_null_for_what_is_not_finite():
    x = {"a": [math.nan, 1.5, {"b": -math.inf}], "c": (1, "x")}
    assert json.loads(to_json(x)) == {"a": [None, 1.5, {"b": None}], "c": [1, "x"]}


def test_a_rising_curve_rises():
    title, *lines = text_plot([0, 1, 2, 3], "rise").splitlines()
    assert title == "rise"
    assert lines[0].endswith("•")
    assert lines[-1].split("|")[1].startswith("•")


def test_a_curve_without_values_says_so():
    assert "no values" in text_plot([], "empty")
