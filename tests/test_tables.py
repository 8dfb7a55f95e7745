"""Tables and curves show the numbers that they are given."""
from runtime.tables import table, text_plot


def test_a_table_shows_three_digits_and_a_dash_for_what_is_missing():
    rows = [{"a": 1.23456, "b": "x"}, {"a": None, "b": 12.34}]
    assert table(rows, {"a": "A", "b": "B"}) \
        == "| A | B |\n| --- | --- |\n| 1.235 | x |\n| – | 12.3 |"


def test_a_rising_curve_rises():
    title, *lines = text_plot([0, 1, 2, 3], "rise").splitlines()
    assert title == "rise"
    assert lines[0].endswith("•")
    assert lines[-1].split("|")[1].startswith("•")


def test_a_curve_without_values_says_so():
    assert "no values" in text_plot([], "empty")
