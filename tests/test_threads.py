"""How threads wait is set before torch is loaded, whichever command loads it."""
import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT

SCRIPTS = [path.relative_to(ROOT) for folder in (".", "data", "tools") for path in
           sorted((ROOT / folder).glob("*.py")) if '__name__ == "__main__"' in path.read_text("utf-8")]
MODULES = [".".join(path.with_suffix("").parts) for path in SCRIPTS]


def spins_when_torch_is_loaded(module: str, **variables: str) -> str:
    """The library's variable at the moment at which the command imports torch; "never" if it does
    not."""
    code = """
import os, sys

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print(os.environ.get("GOMP_SPINCOUNT", "unset"))
            sys.stdout.flush()
            os._exit(0)

sys.meta_path.insert(0, Finder())
""" + f"import {module}\nprint('never')"
    environment = {name: value for name, value in os.environ.items()
                   if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    return subprocess.run([sys.executable, "-c", code], env=environment | variables, cwd=ROOT,
                          check=True, capture_output=True, text=True).stdout.strip()


@pytest.mark.parametrize("module", MODULES)
def test_a_command_sets_it_before_it_loads_torch(module):
    assert spins_when_torch_is_loaded(module) in ("never", "1000")


def test_most_commands_load_torch():
    assert spins_when_torch_is_loaded("train") == "1000"


@pytest.mark.parametrize("variables,expected", [({"GOMP_SPINCOUNT": "7"}, "7"),
                                                ({"OMP_WAIT_POLICY": "active"}, "unset")])
def test_the_users_own_choice_is_left_alone(variables, expected):
    assert spins_when_torch_is_loaded("train", **variables) == expected
