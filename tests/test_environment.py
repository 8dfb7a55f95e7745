"""What torch's libraries read from the environment is set before torch is loaded, whichever command
loads it, and bounds the memory of new shapes."""
import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT

OURS = {"GOMP_SPINCOUNT": "500", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "96",
        "LRU_CACHE_CAPACITY": "96"}
SCRIPTS = [path.relative_to(ROOT) for folder in (".", "data", "tools") for path in
           sorted((ROOT / folder).glob("*.py")) if '__name__ == "__main__"' in path.read_text("utf-8")]
MODULES = [".".join(path.with_suffix("").parts) for path in SCRIPTS]


def run(code: str, **variables: str) -> str:
    """What Python code prints that runs with these variables and without ours."""
    environment = {name: value for name, value in os.environ.items()
                   if name not in OURS and name != "OMP_WAIT_POLICY"}
    return subprocess.run([sys.executable, "-c", code], env=environment | variables, cwd=ROOT,
                          check=True, capture_output=True, text=True).stdout.strip()


def seen_by_torch(module: str, **variables: str) -> list[str] | None:
    """Our variables at the moment at which a command imports torch; None if it does not."""
    found = run(f"""
import os, sys

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print(*(os.environ.get(name, "unset") for name in {list(OURS)}))
            sys.stdout.flush()
            os._exit(0)

sys.meta_path.insert(0, Finder())
import {module}""", **variables)
    return found.split() or None


@pytest.mark.parametrize("module", MODULES)
def test_a_command_sets_it_before_it_loads_torch(module):
    assert seen_by_torch(module) in (None, list(OURS.values()))


def test_most_commands_load_torch():
    assert seen_by_torch("train") is not None


@pytest.mark.parametrize("variables,expected", [
    ({"GOMP_SPINCOUNT": "7"}, ["7", "96", "96"]),
    ({"OMP_WAIT_POLICY": "active"}, ["unset", "96", "96"]),
    ({"LRU_CACHE_CAPACITY": "9"}, ["500", "96", "9"])])
def test_what_the_user_sets_is_left_alone(variables, expected):
    assert seen_by_torch("train", **variables) == expected


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc, and /proc")
def test_products_of_ever_new_shapes_fill_no_memory():
    added = run("""
import runtime
import torch
from runtime import products
torch.set_num_threads(1)

def held():  # MiB
    return int(open("/proc/self/statm").read().split()[1]) * 4096 >> 20

if products._onednn is not None:
    w = torch.randn(64, 64)
    for rows in range(16, 2000):
        products._product(torch.ones(rows, 64), w)
        if rows == 400:  # what is kept is kept by now
            before = held()
    print(held() - before)
else:
    print(0)
""")
    assert int(added) < 150  # 500 if all were kept
