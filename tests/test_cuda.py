"""What must also hold on a GPU; skipped, and said so, where there is none."""
import copy

import pytest
import torch

from model import ModelConfig, Transformer
from ppo import gae, whiten
from runtime import device
from sample import Decoder, generate

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here: not run")
CONFIG = ModelConfig(vocab_size=256, n_layer=2, n_head=4, n_kv_head=2, d_model=64, d_ff=128,
                     max_len=64)


def test_replies_equal_those_of_the_cpu():
    model = Transformer(CONFIG).eval()
    tokens = torch.randint(1, 256, (6, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(tokens).bool()
    expected = generate(model, tokens, mask, 20, seed=1, end_id=7)
    there = copy.deepcopy(model).cuda()
    for compiled in (False, True):
        found = generate(there, tokens.cuda(), mask.cuda(), 20, seed=1, end_id=7, batch_size=4,
                         decoder=Decoder(there, compile=compiled))
        # rounding may turn a draw near a border
        assert (found.tokens.cpu() == expected.tokens).float().mean() > 0.95


def test_a_compiled_trunk_equals_the_eager_one():
    model = Transformer(CONFIG).cuda()
    tokens = torch.randint(1, 256, (4, 30), device="cuda")
    where = torch.arange(5, 90, 3, device="cuda")
    expected = model.hidden(tokens, where=where)
    device.compile_trunks(model)
    assert torch.allclose(model.hidden(tokens, where=where), expected, atol=1e-4)


def test_advantages_equal_those_of_the_cpu():
    g = torch.Generator().manual_seed(0)
    rewards, values, mask = (torch.randn(8, 200, generator=g), torch.randn(8, 200, generator=g),
                             torch.arange(200) < torch.randint(1, 201, (8, 1), generator=g))
    here, there = gae(rewards, values, mask), gae(rewards.cuda(), values.cuda(), mask.cuda())
    for a, b in zip(here, there, strict=True):
        assert torch.allclose(a, b.cpu(), atol=1e-4)
    assert torch.allclose(whiten(here[0], mask), whiten(there[0], mask.cuda()).cpu(), atol=1e-4)
