"""The README tells the truth: its commands can be parsed, its files are there, and both languages
agree."""
import pathlib
import re
import shlex

import pytest

import data.sets
from data.prepare import open_data
from tests.conftest import ROOT

PAGES = [ROOT / "README.md", ROOT / "README.zh.md", *sorted((ROOT / "docs").glob("*.md"))]


def text_of(page: pathlib.Path) -> str:
    return page.read_text(encoding="utf-8")


def commands(page: pathlib.Path) -> list[str]:
    """Our commands in code blocks, each without the explanation that follows two spaces."""
    blocks = re.findall(r"```\n(.*?)```", text_of(page), re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    return [re.split(r"\s{2,}", line)[0] for line in lines
            if re.match(r"python (train|sample|evaluate)\.py|python -m (tools|data)\.", line)]


def table_figures(page: pathlib.Path) -> list[str]:
    """Numbers in the tables of results and speed, in order."""
    rows = [line for line in text_of(page).splitlines() if line.startswith("|")]
    shared = [row for row in rows if not re.match(r"\| *(资源|时间|内存|磁盘)", row)]
    return re.findall(r"\d+\.\d+|\d{3,}", "\n".join(shared))


def test_the_readme_is_short():
    assert len(text_of(ROOT / "README.md").splitlines()) <= 130


def test_both_languages_show_the_same_commands():
    assert commands(ROOT / "README.md") == commands(ROOT / "README.zh.md")


def test_both_languages_show_the_same_figures():
    assert table_figures(ROOT / "README.md") == table_figures(ROOT / "README.zh.md")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", text_of(page))
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_are_named_exist(page):
    named = re.findall(r"`((?:[a-z_]+/)*[a-z_]+\.py)`", text_of(page))
    assert [name for name in named if not (ROOT / name).exists()] == []
    modules = re.findall(r"python -m ((?:tools|data)\.[a-z_]+)", text_of(page))
    assert [m for m in modules if not (ROOT / (m.replace(".", "/") + ".py")).exists()] == []


ALL = sorted({command for page in PAGES for command in commands(page)})


@pytest.mark.parametrize("command", [c for c in ALL if "--help" not in c])
def test_a_command_of_the_pages_is_understood(command):
    import sample
    import train
    from runtime.options import Common, parse, parse_all
    words = [word.replace("OUT", "out") for word in shlex.split(command)[1:]]
    if words[0] == "sample.py":
        parse(sample.SampleOptions, words[1:], "sample.py")
    elif words[0] == "train.py" and len(words) > 1 and words[1] in train.STAGES:
        parse(train.STAGES[words[1]][0], words[2:], "train.py")
    elif words[0] == "train.py":
        parse_all(Common, {name: cls for name, (cls, _) in train.STAGES.items()}, words[1:],
                  "train.py")
    else:
        assert words[0] in ("-m", "evaluate.py")


def test_the_data_set_of_the_pages_is_one(tmp_path, monkeypatch):
    code, = [block for block in re.findall(r"```python\n(.*?)```", text_of(ROOT / "docs/data.md"),
                                           re.DOTALL)
             if "DATA_SET" in block]
    namespace: dict = {}
    exec(code, namespace)
    (tmp_path / "mine.txt").write_text("".join(f"line {i} of many\n" for i in range(200)),
                                       encoding="utf-8")
    monkeypatch.setattr("data.prepare.CACHE", tmp_path / "cache")
    monkeypatch.setitem(data.sets.DATA_SETS, "mine", namespace["DATA_SET"])
    prepared = open_data("mine", source=str(tmp_path / "mine.txt"), vocab_size=270)
    assert len(prepared.documents("train").starts) == 101
    monkeypatch.chdir(tmp_path)
    assert open_data("mine", vocab_size=270).tokenizer.n_vocab == 270
