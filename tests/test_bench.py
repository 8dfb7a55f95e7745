"""The bench counts what it says it counts, measures in turns, and leaves out peers that are not
there."""
import json
import math
import subprocess
import sys

import torch

from model import ModelConfig, Transformer
from ppo import PPOOptions, gae
from sample import generate
from tests.conftest import ROOT
from tools import bench, bench_ppo, measure

SHAPE = ModelConfig(vocab_size=40, n_layer=2, n_head=2, n_kv_head=1, d_model=16, d_ff=24,
                    max_len=64)


def test_the_products_of_a_step_are_all_weights_of_the_model():
    matrices = [p for n, p in Transformer(SHAPE).named_parameters() if p.dim() == 2]
    assert sum(a * b for a, b in measure.step_products(SHAPE)) == sum(p.numel() for p in matrices)
    assert abs(sum(a * b for a, b in measure.step_products(measure.SMALL)) / 1e6 - 12.2) < 0.05
    assert abs(sum(a * b for a, b in measure.step_products(measure.BASE)) / 1e6 - 109.5) < 0.05


def test_the_operations_of_an_update_are_those_of_its_products():
    o = PPOOptions(batch=4, minibatches=1, micro_batch=2, epochs=3, reply_len=5)
    _, gflop = bench_ppo.bare_update(SHAPE, "separate", torch.float32, o, prompt=7)
    qkv, rest = 16 * 32, 16 * 16 + 16 * 48 + 24 * 16
    # two models, two layers; logits of one
    weights = 2 * (2 * 12 * (2 * qkv + rest) + 2 * 5 * rest) + 2 * 5 * 16 * 40
    attention = 2 * 2 * 6 * (2 * 2) * 12 * 12 * 8  # models, layers, products, rows x heads
    assert math.isclose(gflop * 1e9, 3 * 2 * (6 * weights + 2 * attention), rel_tol=1e-9)


def test_measurements_alternate_after_one_that_is_not_counted():
    order = []
    times = measure.in_turns({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 3)
    assert order == ["a", "b"] * 4 and all(len(t) == 3 for t in times.values())
    assert measure.ratio([4.0, 9.0, 2.0], [2.0, 3.0, 2.0]) == "2.00 (1.00–3.00)"


def test_rows_of_uneven_length_end_by_their_own_stream():
    model = Transformer(SHAPE).eval()
    tokens, mask = measure.random_prompts(SHAPE, 40, 3)
    reply = generate(model, tokens, mask, 60, end_id=0, batch_size=8,
                     decoder=bench.EndingDecoder(model))
    assert 10 < float(reply.mask.sum()) / 40 < 40  # the mean of a geometric length of 24, cut at 60
    assert (reply.tokens.eq(0) & reply.mask).any(1).float().mean() > 0.7


def test_the_loop_over_columns_is_the_definition():
    rewards, values = torch.tensor([[-.1, .2, 1.]]), torch.tensor([[.5, .4, .3]])
    advantages = bench.gae_by_columns(rewards, values, torch.ones(1, 3).bool(), 1.0, 0.95)
    assert torch.allclose(advantages, torch.tensor([[0.52675, 0.765, 0.7]]), atol=1e-5)


def test_advantages_are_measured_on_ragged_rows():
    mask = bench.ragged_mask(40, 30)
    assert mask.sum(1).unique().numel() > 10
    assert mask[:, 0].all()
    rewards, values = torch.randn(40, 30), torch.randn(40, 30)
    expected, _ = gae(rewards, values, mask, 1.0, 0.95)
    assert torch.allclose(bench.gae_by_columns(rewards, values, mask, 1.0, 0.95), expected,
                          atol=1e-4)


def test_a_missing_peer_is_said_and_left_out(capsys, tmp_path):
    assert measure.peer(measure.BenchOptions(), "trl_ppo.py") is None and not capsys.readouterr().out
    assert measure.peer(measure.BenchOptions(peers=True, peers_folder=str(tmp_path)),
                        "trl_ppo.py") is None
    assert "not there, so this peer is left out" in capsys.readouterr().out
    (tmp_path / "broken.py").write_text("raise SystemExit('no such package')")
    assert measure.peer(measure.BenchOptions(peers=True, peers_folder=str(tmp_path)),
                        "broken.py") is None
    assert "no such package" in capsys.readouterr().out


def test_the_command_ends_in_one_json_line():
    done = subprocess.run([sys.executable, "-m", "tools.bench", "limits", "--repeats", "1"],
                          cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.strip().splitlines()[-1])["limits"]["copy_GB_s"] > 0
