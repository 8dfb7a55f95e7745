"""The README and docs/ tell the truth: commands parse, named files and options exist, examples
run, and both languages agree."""
import dataclasses
import json
import pathlib
import re
import shlex
import sys

import pytest

import data.sets
import evaluate
import sample
import train
from convert.__main__ import ExportOptions as ConvertExport, ImportOptions
from data.check import CheckOptions
from data.overview import ListOptions
from data.prepare import ExportOptions, PrepareOptions, open_data
from runtime.options import Common, parse, parse_all
from serve.__main__ import ExportOptions as ServeExport, ServeOptions
from serve.loop_options import LoopOptions, parse_loop
from tests.conftest import ROOT
from tools import busy, loop_study, trials, trials_commands
from tools.bench import SECTIONS
from tools.bench_serve import ServeBenchOptions
from tools.measure import BenchOptions
from tools.memory import MemoryOptions
from tools.plot import PlotOptions
from tools.race import RaceOptions
from tools.tiny import SHAPES, TinyOptions

ENGLISH, CHINESE = ROOT / "README.md", ROOT / "README.zh.md"
PAGES = [ENGLISH, CHINESE, *sorted((ROOT / "docs").glob("*.md"))]
STAGES = {name: cls for name, (cls, _) in train.commands().items()}
OTHERS = [ListOptions, sample.SampleOptions, evaluate.EvaluateOptions, PrepareOptions, CheckOptions,
          ExportOptions, BenchOptions, PlotOptions, MemoryOptions, RaceOptions, busy.BusyOptions,
          trials.TrialOptions, trials_commands.TrialOptions, ImportOptions, ConvertExport, TinyOptions,
          LoopOptions, ServeOptions, ServeExport]


def text_of(page: pathlib.Path) -> str:
    return page.read_text(encoding="utf-8")


def blocks(page: pathlib.Path, language: str = "") -> list[str]:
    """The contents of the page's code blocks in this language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text_of(page), re.DOTALL | re.MULTILINE)


def command_lines(page: pathlib.Path) -> list[str]:
    """Lines of code blocks that call Python, without the explanation after two spaces."""
    lines = [line for block in blocks(page) for line in block.splitlines()]
    return [re.split(r"\s{2,}", line)[0] for line in lines if line.startswith("python")]


def commands(page: pathlib.Path) -> list[str]:
    """Our own commands, those in the text included."""
    inline = re.findall(r"`(python [^`]*)`", text_of(page))
    lines = [" ".join(line.split()) for line in [*command_lines(page), *inline]]
    ours = r"python (train|sample|evaluate)\.py|python -m ((tools|data)\.|convert |serve )"
    return [line for line in lines if re.match(ours, line) and "DIR" not in line]


def figures(page: pathlib.Path) -> list[str]:
    """All numbers in the tables that both READMEs have, in order; not those of the resources."""
    rows = [line for line in text_of(page).splitlines() if line.startswith("|")]
    shared = [row for row in rows if not re.match(r"\| *(时间|内存|磁盘)", row)]
    return re.findall(r"\d*\.?\d+", "\n".join(shared))


def understand(command: str) -> None:
    """Parse a command with the options of what it calls; UserError if it is wrong."""
    words = [word.replace("OUT", "out") for word in shlex.split(command)[1:]]
    name = words[1] if words[0] == "-m" else words[0]
    rest = words[2:] if words[0] == "-m" else words[1:]
    n = next((i for i, word in enumerate(rest) if word.startswith("-")), len(rest))
    positional, options = rest[:n], rest[n:]
    if name == "train.py" and "--list" in options:
        parse(ListOptions, options, name)
    elif name == "train.py" and not positional:
        parse_all(Common, train.ROAD, options, name)
    elif name == "train.py" and positional == ["loop"]:
        parse_loop(options)
    elif name == "train.py":
        parse(STAGES[positional[0]], options, name)
    elif name == "tools.bench":
        assert set(positional) <= {*SECTIONS, "all"}
        parse(BenchOptions, options, name)
    elif name == "tools.busy":
        assert all(busy.variables(word) for word in positional)
        parse(busy.BusyOptions, options, name)
    elif name == "data.prepare" and positional[0:1] in (["check"], ["export"]):
        parse({"check": CheckOptions, "export": ExportOptions}[positional[0]], options, name)
    elif name.startswith("tools.trials"):
        assert positional[0] in ("kill", "forge", "commands")
        parse((trials if name == "tools.trials" else trials_commands).TrialOptions, options, name)
    elif name == "convert":
        assert len(positional) == 3
        parse({"import": ImportOptions, "export": ConvertExport}[positional[0]], options, name)
    elif name == "serve" and positional:
        assert positional[0] == "export" and len(positional) == 2
        parse(ServeExport, options, name)
    elif name == "tools.tiny":
        assert positional[0] in SHAPES
        parse(TinyOptions, options, name)
    elif name == "tools.loop_study":
        assert positional[0] in loop_study.STUDIES
        cut = options.index("--") if "--" in options else len(options)
        parse(loop_study.StudyOptions, options[:cut], name)
        parse_loop(options[cut + 1:])
    elif name in ("tools.seeds", "tools.show"):
        assert options[:-1] in ([], ["--from"])
    else:
        parse({"sample.py": sample.SampleOptions, "evaluate.py": evaluate.EvaluateOptions,
               "data.prepare": PrepareOptions, "tools.plot": PlotOptions, "tools.memory": MemoryOptions,
               "tools.race": RaceOptions, "tools.bench_serve": ServeBenchOptions,
               "serve": ServeOptions}[name], options, name)


def flags(cls: type) -> set[str]:
    return {"--" + (f.metadata.get("flag") or f.name) for f in dataclasses.fields(cls)}


# ---- one page, two languages ---------------------------------------------------------------------

def test_the_readme_is_short():
    assert len(text_of(ENGLISH).splitlines()) <= 140


def test_both_languages_have_the_same_command_lines():
    assert command_lines(ENGLISH) == command_lines(CHINESE)


def test_both_languages_have_the_same_figures_in_tables():
    assert figures(ENGLISH) == figures(CHINESE)


def test_both_languages_have_the_same_figures_of_the_warning():
    def warning(page):
        return re.findall(r"\d+\.\d+", text_of(page).split("\n## ")[1].split("|\n")[-1])
    assert warning(ENGLISH) == warning(CHINESE) != []


def test_ci_finds_the_command_of_the_tests():
    assert len(re.findall(r"python -m pytest$", text_of(ENGLISH), re.MULTILINE)) == 1


# ---- what is named exists ------------------------------------------------------------------------

@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#]*)#?([^)]*)\)", text_of(page))
    for link, anchor in links:
        if "://" in link:
            continue
        target = page.parent / link if link else page
        assert target.exists(), link
        if anchor:
            titles = re.findall(r"^#+ (.*)$", text_of(target), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w -]", "", t.lower()).replace(" ", "-") for t in titles]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_are_named_exist(page):
    named = re.findall(r"`((?:[a-z_]+/)*[a-z_]+\.py)`", text_of(page))
    assert [name for name in named if not (ROOT / name).exists()] == []
    modules = re.findall(r"python -m ((?:tools|data)\.[a-z_]+)", text_of(page))
    assert [m for m in modules if not (ROOT / (m.replace(".", "/") + ".py")).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_options_that_are_named_exist(page):
    known = {"--help", "--name"}.union(*map(flags, [*STAGES.values(), *OTHERS]))
    known |= {flag.replace("--", f"--{stage}.") for stage, cls in STAGES.items() for flag in flags(cls)}
    named = set(re.findall(r"`(--[a-z_]+(?:\.[a-z_]+)?)", text_of(page)))
    assert named - known == set()


@pytest.mark.parametrize("cls", [*STAGES.values(), *OTHERS], ids=lambda cls: cls.__name__)
def test_the_page_of_commands_names_every_option(cls):
    assert flags(cls) - set(re.findall(r"`(--[a-z_]+)", text_of(ROOT / "docs/commands.md"))) == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_placeholder_is_left(page):
    assert "@@" not in text_of(page)


# ---- what is shown works -------------------------------------------------------------------------

@pytest.mark.parametrize("command", sorted({c for page in PAGES for c in commands(page)
                                            if "--help" not in c}))
def test_a_command_of_the_pages_is_understood(command):
    understand(command)


def test_the_data_set_of_the_pages_is_one(tmp_path, monkeypatch):
    code, = [block for block in blocks(ROOT / "docs/data.md", "python") if "DATA_SET" in block]
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


def test_the_script_of_the_pages_trains(command, world, tmp_path, monkeypatch):
    script, = blocks(ROOT / "docs/research.md", "python")
    words = ["--preset=smoke", "--updates=2", "--samples_per_prompt=4", f"--out={tmp_path}",
             f"--init_from={world.root / 'sft'}", f"--reward_from={world.root / 'reward'}"]
    monkeypatch.setattr(sys, "argv", ["my_ppo.py", *words])
    exec(script, {"__name__": "__main__"})
    lines = (tmp_path / "reviews" / "ppo" / "metrics.jsonl").read_text().splitlines()
    assert ["score" in json.loads(line) for line in lines] == [False, True, True]  # step 0 measures
    assert (tmp_path / "reviews" / "ppo" / "checkpoint.pt").exists()
