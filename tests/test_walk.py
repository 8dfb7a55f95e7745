"""The walk of docs/data.md, "Your own feedback": every command of it runs, in its order, on 120
rated texts with a small model; the Chinese page has the same commands."""
import importlib
import itertools
import json
import pathlib
import re
import shlex

import pytest

from tests.conftest import ROOT
from tests.test_readme import text_of

# What the test changes in a command, and why.
SMALL = ["--preset", "smoke"]  # added to those of train.py: a small model, few steps
CHANGED = {"80": "8"}  # --updates: two more than the preset's 6
# What must be there before: the demo's language model, here one of the same texts in its template.
DEMO = "python train.py pretrain --data imdb.csv --out out --template 'Continue this film review: {prompt}'"


def walk(page: str, title: str) -> list[str]:
    """The commands of a section, in order."""
    section = text_of(ROOT / "docs" / page).split(f"\n## {title}\n")[1].split("\n## ")[0]
    blocks = re.findall(r"^```\n(.*?)^```", section, re.DOTALL | re.MULTILINE)
    return [line for block in blocks for line in block.splitlines()]


def rated_texts() -> list[tuple[str, int]]:
    """120 texts with ratings from 1 to 5, which their last words tell."""
    things = "film story hero song scene ending plot actor cast music joke".split()
    said = ["was dreadful from the start", "was rather dull", "was neither good nor bad", "was quite nice to see",
            "was a wonder, and I loved it"]
    texts = [(f"{i}: the {a} and the {b} of it {said[i % 5]}.", i % 5 + 1)
             for i, (a, b) in enumerate(itertools.product(things, things))]
    return texts[:120]


def run(command: str) -> int | None:
    """Run a command of ours in this process, in small; its exit code, None for 0."""
    words = [CHANGED.get(word, word) for word in shlex.split(command)[1:]]
    name, words = (words[1], words[2:]) if words[0] == "-m" else (words[0].removesuffix(".py"), words[1:])
    return importlib.import_module(name).main(words + SMALL * (name == "train"))


def test_both_languages_walk_the_same_way():
    chinese = [line.replace("out/reviews/pretrain", "out/imdb/pretrain").replace(
        "接着写这条评论：{prompt}", "Continue this film review: {prompt}").replace("这部电影", "The film")
        for line in walk("data.zh.md", "用自己的评分数据训练")]
    assert chinese == walk("data.md", "Your own feedback")


def test_the_walk_of_the_pages_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("data.prepare.CACHE", tmp_path / "cache")
    for file, header in (("rated.csv", "text,score"), ("reviews.csv", "内容,评分"), ("imdb.csv", "text,score")):
        rows = [f'"{text}",{score}' for text, score in rated_texts()]
        (tmp_path / file).write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    assert not run(DEMO)
    said = {}
    for number, command in enumerate(walk("data.md", "Your own feedback")):
        capsys.readouterr()
        assert not run(command), command
        said[number] = capsys.readouterr().out
        assert said[number], command
    assert "all is well" in said[0]
    report = json.loads((tmp_path / "out-mine/rated/report.json").read_text())
    assert [row["name"] for row in report["policies"]][:3] == ["SFT", "best", "PPO"]
    assert report["judges"] == ["n-grams", "transformer"]
    assert {win["over"] for win in report["win_rates"]} >= {"SFT", "best"}
    assert (tmp_path / "out-mine/rated/report_test.html").exists()
    assert "pretrain: skipped" in said[3]
    assert unexplained(tmp_path / "out-mine/rated", report) == set()


def unexplained(run_folder: pathlib.Path, report: dict) -> set[str]:
    """The names in a run's metrics.jsonl and report.json that docs/metrics.md does not have."""
    logged = {name for path in run_folder.glob("*/metrics.jsonl") for line in path.read_text().splitlines()
              for name in json.loads(line)}
    logged |= {*report, *(name for row in report["policies"] for name in row if name != "name")}
    known = set(re.findall(r"`([a-z0-9_*]+)`", text_of(ROOT / "docs/metrics.md")))
    alike = [name.replace("*", ".*") for name in known if "*" in name] + [r"judge(d_positive)?_transformer"]
    return {name for name in logged - known if not any(re.fullmatch(x, name) for x in alike)}


@pytest.mark.parametrize("phrase", [
    "all is well", "prefers the reply of", "itself, on", "best of 16", "Before and after", "kept the weights of step",
    "above average", "Missing", "Warning"])
def test_what_the_page_quotes_is_said_by_the_program(phrase):
    code = "".join(text_of(path) for folder in (".", "data", "runtime") for path in (ROOT / folder).glob("*.py"))
    assert phrase in " ".join(text_of(ROOT / "docs/data.md").split())
    assert phrase.replace("best of 16", "best of {BEST_OF}") in code
