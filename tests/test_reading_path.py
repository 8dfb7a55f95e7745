"""How much of the code runs before PPO's first optimizer step: what a reader of that path has to
cross.

The aim of the design is 120 functions and 1,300 lines; the bounds here keep the path from growing.
"""
import ast
import collections
import sys

import pytest
import torch

from data.judge import ngram_regressions
from ppo import train_ppo
from tests.conftest import ROOT

# Of code: without docstrings, comments and blank lines. 250 and 1,900 before real models came in, 286
# and 2,200 before prompts were read in parts of similar length. Run alone, this test sees two functions more.
MOST_FUNCTIONS, MOST_LINES = 293, 2235


class FirstStep(Exception):
    """Raised in place of the first optimizer step."""


def definitions(path) -> dict[tuple[int, str], tuple[set[int], set[int]]]:
    """(first line, name) of each function -> (all its lines, those of code)."""
    text = path.read_text(encoding="utf-8")
    tree, lines = ast.parse(text), text.splitlines()
    docstrings = {line for node in ast.walk(tree)
                  if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
                  and isinstance(node.value.value, str)
                  for line in range(node.lineno, node.end_lineno + 1)}
    functions = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            every = set(range(node.lineno, node.end_lineno + 1))
            code = {n for n in every - docstrings if lines[n - 1].strip()
                    and lines[n - 1].strip()[0] != "#"}
            functions[first, node.name] = (every, code)
    return functions


def crossed(work) -> dict[str, tuple[int, int, int]]:
    """(functions, lines, lines of code) of each of our files whose functions run until the first
    step."""
    seen = collections.defaultdict(set)

    def profile(frame, event, _) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(str(ROOT)):
            seen[frame.f_code.co_filename].add((frame.f_code.co_firstlineno, frame.f_code.co_name))

    sys.setprofile(profile)
    try:
        with pytest.raises(FirstStep):
            work()
    finally:
        sys.setprofile(None)
    table = {}
    for name, calls in seen.items():
        path = ROOT / name
        if path.is_relative_to(ROOT / "tests"):
            continue
        functions = definitions(path)
        mine = [functions[call] for call in calls if call in functions]
        every, code = (set().union(*(part[i] for part in mine)) for i in (0, 1))
        table[str(path.relative_to(ROOT))] = (len(mine), len(every), len(code))
    return table


def test_the_path_to_the_first_step_of_ppo(command, world, monkeypatch, capsys):
    def stop(*_, **__):
        raise FirstStep

    ngram_regressions(world.data, "judge")  # fitted once, by whichever test asks first
    monkeypatch.setattr(torch.optim.Adam, "step", stop)
    o = command("ppo", "--critic_warmup=0", "--compile=off")
    table = crossed(lambda: train_ppo(o))
    functions, lines, code = (sum(row[i] for row in table.values()) for i in range(3))
    with capsys.disabled():
        print(f"\nbefore PPO's first optimizer step: {functions} functions in {len(table)} files, "
              f"{lines} lines, {code} of them code")
        for name, row in sorted(table.items()):
            print(f"  {name:24} {row[0]:4} {row[1]:5} {row[2]:5}")
    assert functions <= MOST_FUNCTIONS
    assert code <= MOST_LINES
