"""The report as a page: one file, nothing from outside, texts that cannot become markup; the curves are
those that were logged; what exists is listed, damaged or not."""
import html.parser
import json
import re
import xml.etree.ElementTree as ET

import pytest

import train
from data.curves import COLORS, STAGES, Panel, curves_of
from data.html import block_html, page, pair_html, panel_svg, picture, report_panels, ticks, write_page
from runtime.options import run_main

EVIL = '<script>alert("x")</script> & \n\n# no title\n\n| no | table |'


@pytest.fixture
def folder(tmp_path):
    """A run's folder with logs of two stages, one of them cut short."""
    lines = {"ppo": [{"step": s, "score": -2.0 + s, "kl": 0.5 * s, "part_length": -s, "part_model": s,
                      "odd": None, **({"eval_kl": s} if s % 2 else {})} for s in range(1, 6)],
             "sft": [{"step": 10, "loss": 3.0}, {"step": 20, "loss": 2.0, "val_loss": 2.5}]}
    for stage, records in lines.items():
        (tmp_path / "mine" / stage).mkdir(parents=True)
        text = "".join(json.dumps(r) + "\n" for r in records) + '{"step": 9'
        (tmp_path / "mine" / stage / "metrics.jsonl").write_text(text, encoding="utf-8")
    return tmp_path / "mine"


@pytest.fixture
def report():
    reply = {"reply": EVIL}
    row = {"name": "SFT", "replies": 2, "bigrams": 5, "control": 0, "intervals": {"kl": [0, 1]}, "kl": 0.5}
    return {"split": "val", "seed": 0, "samples": 1, "openings": 2, "judges": [], "policies": [row],
            "settings": {"reply_len": 8, "temperature": 1.0}, "win_rates": [], "first": "SFT", "last": "PPO",
            "feedback": "", "columns": {"name": "", "kl": "KL, nats"}, "warnings": ["it <b>fell</b>"],
            "pairs": [{"prompt": "好吗", "turns": [["Human", "好吗"]], "before": reply, "after": {"reply": "好"}}]}


class Reader(html.parser.HTMLParser):
    """Which elements a page has, and whether each one is closed."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.text = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "!doctype"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_the_page_is_whole_and_needs_nothing_else(report, folder):
    text = page(report, "mine", curves_of(folder))
    found = Reader(text)
    assert found.open == []
    names = {tag for tag, _ in found.tags}
    assert not names & {"script", "link", "img", "iframe"}
    assert not re.search(r'(src|href)=|url\(|@import', text)
    assert set(re.findall(r"https?://[^\"' ]+", text)) <= {"http://www.w3.org/2000/svg"}  # a name, not a place
    assert ("html", {"lang": "en"}) in found.tags and ("b", {"lang": "zh"}) in found.tags
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in [a for _, a in found.tags]
    assert "prefers-color-scheme: dark" in text


def test_texts_stay_texts(report, folder):
    found = Reader(page(report, "a<b", curves_of(folder)))
    assert EVIL in found.text
    assert "it <b>fell</b>" in found.text
    assert [tag for tag, _ in found.tags].count("h1") == 1
    assert "<script>" not in pair_html(report["pairs"][0], report)


def test_the_page_says_what_the_markdown_says(report, folder):
    from data.report import render_report
    text = Reader(page(report, "mine", {})).text
    for block in render_report({**report, "pairs": []}, "mine").split("\n\n"):
        for words in re.split(r"[|\n]+|^#+ ", block):
            if set(words) - set("- "):
                assert words.strip() in text


def test_curves_are_those_that_were_logged(folder):
    run = curves_of(folder)
    assert run["sft"]["val_loss"] == {20: 2.5}
    assert "odd" not in run["ppo"]
    panels = {panel.title: curves for panel, curves in report_panels(run)}
    assert list(panels) == ["Score", "KL", "Reward: length", "Reward: model", "Loss on replies"]
    svg = ET.fromstring(panel_svg(Panel("ppo", "KL", "nats", ("kl",)), {"kl": panels["KL"]["kl"]}))
    line, = svg.findall(".//{*}polyline")
    points = [tuple(map(float, point.split(","))) for point in line.get("points").split()]
    steps = [x - points[0][0] for x, _ in points]
    rises = [points[0][1] - y for _, y in points]
    assert len(points) == 5
    assert steps == pytest.approx([i * steps[1] for i in range(5)], abs=.2)  # equal steps, equal rises
    assert rises == pytest.approx([i * rises[-1] / 4 for i in range(5)], abs=.2)
    assert rises[-1] > 50


def test_a_flat_curve_and_a_single_point_are_drawn():
    import numpy as np
    for values in ([[3.0, 3.0]], [[-1.0]], [[1e-9, 2e-9]], [[0.0]]):
        steps = np.arange(len(values[0]))
        ET.fromstring(panel_svg(Panel("sft", "a & <b>", "", ("x",)), {"x": (steps, np.array(values))}))


@pytest.mark.parametrize("low, high", [(-1.3, -.5), (0, 40), (1e-6, 3e-6), (.95, 1), (-200, 3e5)])
def test_ticks_are_round_and_within(low, high):
    found = ticks(low, high)
    assert 2 <= len(found) <= 4
    assert all(low - 1e-12 <= x <= high + 1e-12 for x in found)


def test_the_picture_is_a_picture_and_nothing_logged_is_no_error(folder, report, tmp_path):
    ET.fromstring(picture(curves_of(folder)))
    assert picture({}) == ""
    assert write_page(report, folder) == "\n![curves](report.svg)\n"
    assert write_page({**report, "split": "test"}, folder) == "\n![curves](report_test.svg)\n"
    assert (folder / "report_test.html").exists()
    assert {panel.stage for panel in map(lambda entry: entry[0], report_panels(curves_of(folder)))} <= set(COLORS)
    assert set(STAGES) == set(COLORS)
    assert block_html("## a < b") == "<h2>a &lt; b</h2>"


# ---- train.py --list -----------------------------------------------------------------------------

def listed(capsys, *words):
    assert run_main(train.main, ["--list", *map(str, words)]) == 0
    return capsys.readouterr().out


def test_the_list_names_every_stage_data_set_and_preset(capsys, tmp_path):
    from data.sets import DATA_SETS
    said = listed(capsys, "--out", tmp_path / "nothing")
    for name in (*train.commands(), "loop", *DATA_SETS, "smoke", "demo", "base"):
        assert re.search(rf"^  {name} +\w", said, re.MULTILINE), name  # with a meaning
    assert "none: python train.py begins one, and --out names another" in said


def test_the_list_shows_runs_and_mends_nothing(capsys, tmp_path):
    for stage, config in (("sft", {"finished": True, "parents": {}, "seconds": 12.3,
                                   "options": {"lr": .001, "batch": 32}}),
                          ("ppo", {"finished": False, "parents": {}, "options": {}})):
        folder = tmp_path / "mine" / stage
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "metrics.jsonl").write_text('{"step": 4, "val_loss": 2.5}\n{"step": 7}\n{"st')
    (tmp_path / "mine" / "reward").mkdir()
    (tmp_path / "mine" / "reward" / "checkpoint.pt").write_bytes(b"no checkpoint")
    (tmp_path / "mine" / "notes.txt").write_text("x")
    before = sorted(tmp_path.rglob("*"))
    rows = [line for line in listed(capsys, "--out", tmp_path).splitlines() if line.startswith("| mine")]
    assert [[cell.strip() for cell in row.split("|")][1:3] for row in rows] == [
        ["mine/sft", "finished"], ["mine/reward", rows[1].split("|")[2].strip()], ["mine/ppo", "step 7"]]
    assert "damaged" in rows[1]
    assert "lr=0.001" in rows[0] and "batch" not in rows[0] and "val_loss 2.500" in rows[0]
    assert sorted(tmp_path.rglob("*")) == before


def test_options_of_a_stage_have_no_effect_on_the_list(capsys):
    assert run_main(train.main, ["--list", "--seed=1"]) == 2
    assert "--seed" in capsys.readouterr().err
