"""The golden run: the numbers of every stage's first steps, fixed, so that moving code provably
changes nothing.

All stages run on the made-up source in float32, eagerly, on one thread. A change that is meant to
change numbers makes the file anew, and its commit says why they changed:

    python -m tests.test_golden
"""
import json
import math
import pathlib
import tempfile

import pytest
import torch

import train
from runtime.machine import processor
from runtime.run import Run
from tests.conftest import signals_restored, write_reviews_source

GOLDEN = pathlib.Path(__file__).with_name("golden.json")
STEPS = 4  # logged lines kept of each stage; step 0 of PPO measures the policy before it learns
CLOCK = ("seconds", "_per_s")  # whatever has this in its name depends on the machine's speed


def golden_run(folder: pathlib.Path) -> dict:
    """Run all stages; {"stages": {stage: logged lines, unrounded}, "policies": the report's table}.
    """
    logged: dict[str, list[dict]] = {}
    log = Run.log

    def keep(run: Run, step: int, **metrics) -> None:
        numbers = {k: v for k, v in metrics.items() if not any(word in k for word in CLOCK)
                   and v == v}
        logged.setdefault(run.stage, []).append({"step": step, **numbers})
        log(run, step, **metrics)

    Run.log = keep
    try:
        with signals_restored():
            train.main(["all", "--preset=smoke", "--dtype=float32", "--compile=off",
                        "--device=cpu", "--fresh", f"--source={folder / 'source'}",
                        f"--out={folder / 'out'}", "--pretrain.log_every=1",
                        "--sft.log_every=1", "--reward.log_every=1"])
    finally:
        Run.log = log
    report = json.loads((folder / "out" / "reviews" / "report.json").read_text(encoding="utf-8"))
    return {"stages": {stage: lines[:STEPS] for stage, lines in logged.items()},
            "policies": report["policies"]}


def machine() -> list[str]:
    """What the last digits depend on."""
    return [torch.__version__, torch.backends.cpu.get_cpu_capability(), processor()]


def same(a, b, tolerance: float) -> bool:
    """Are two nests of JSON the same, numbers within the tolerance, relative above 1 and absolute
    below?"""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k], tolerance) for k in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(same(x, y, tolerance) for x, y in zip(a, b, strict=True))
    if isinstance(a, float) or isinstance(b, float):
        return math.isclose(a, b, rel_tol=tolerance, abs_tol=tolerance)
    return a == b


@pytest.mark.parametrize("stage", ["pretrain", "sft", "reward", "ppo", "report"])
def test_the_numbers_are_those_of_the_golden_run(golden, stage):
    expected, found = golden
    if expected["machine"] != machine() and stage in ("ppo", "report"):
        pytest.skip("replies are drawn from logits whose last digits are those of "
                    f"{expected['machine']}")
    part = (lambda run: run["policies"]) if stage == "report" else lambda run: run["stages"][stage]
    # Muon computes in bfloat16, or in float32: last digits soon become third ones.
    tolerance = 1e-6 if expected["machine"] == machine() else 3e-2
    for a, b in zip(part(expected), part(found), strict=True):
        assert same(a, b, tolerance), f"expected {a}\nfound {b}"


@pytest.fixture(scope="module")
def golden(tmp_path_factory):
    folder = tmp_path_factory.mktemp("golden")
    write_reviews_source(folder / "source")
    return json.loads(GOLDEN.read_text(encoding="utf-8")), golden_run(folder)


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        write_reviews_source(pathlib.Path(name) / "source")
        run = golden_run(pathlib.Path(name))
    GOLDEN.write_text(json.dumps({"machine": machine(), **run}, indent=1,
                                 ensure_ascii=False) + "\n", encoding="utf-8")
