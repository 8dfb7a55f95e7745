"""Every stage and the sampler compute the same on another device, and mix no devices (see
tests/stand_in.py)."""
import json

import pytest
import torch

import train
from model import ModelConfig, Transformer
from runtime.options import UserError
from sample import Decoder, generate
from tests.conftest import TINY
from tests.stand_in import stand_in_device


@pytest.fixture
def stand_in(monkeypatch):
    with stand_in_device(monkeypatch):
        yield


def test_the_stand_in_complains_where_a_gpu_would(stand_in):
    here, there = torch.ones(3), torch.arange(3.0, device="cuda")
    for mixed in (lambda: here + there, lambda: here[there.long()],
                  lambda: there.gather(0, torch.tensor([1])),
                  lambda: torch.cat((here, there)), lambda: here.add_(there),
                  lambda: there.index_put((here.long(),), here)):
        with pytest.raises(RuntimeError):
            mixed()
    with pytest.raises(TypeError):
        there.numpy()


def test_the_stand_in_computes_where_a_gpu_would(stand_in):
    here, there = torch.ones(3), torch.arange(3.0, device="cuda")
    assert here.device.type == "cpu"
    assert there.device.type == "cuda"
    assert there[torch.tensor([2])].tolist() == [2.0]
    assert (there * torch.tensor(2)).cpu().tolist() == [0.0, 2.0, 4.0]
    there[[2, 0]] = -1.0
    assert there.tolist() == [-1.0, 1.0, -1.0]


PPO = [[], ["--critic=shared", "--kl_control=adaptive", "--entropy_coef=.01", "--max_approx_kl=.01",
            "--reward_norm=running", "--recompute=true"]]


@pytest.mark.parametrize("stage,words", [("pretrain", []), ("sft", []), ("reward", []),
                                         *(("ppo", ["--updates=3", "--norm_replies=16", *w]) for w in PPO)])
def test_a_stage_computes_the_same_on_another_device(command, stand_in, tmp_path, stage, words):
    logged = {}
    for device in ("cpu", "cuda"):
        run = train.STAGES[stage][1](command(stage, *words, f"--device={device}",
                                             f"--out={tmp_path / device}"))
        lines = map(json.loads, (run.folder.path / "metrics.jsonl").read_text().splitlines())
        logged[device] = [{name: x for name, x in line.items()
                           if "seconds" not in name and not name.endswith("_per_s")}
                          for line in lines]
    for here, there in zip(logged["cpu"], logged["cuda"], strict=True):
        # norms and products may be rounded in another way
        assert there == pytest.approx(here, rel=.02, abs=.02)


def test_replies_are_the_same_on_another_device(stand_in):
    model = Transformer(ModelConfig(**TINY))
    tokens = torch.randint(1, TINY["vocab_size"], (5, 7))
    mask = torch.arange(7) >= torch.tensor([0, 3, 1, 6, 0])[:, None]
    settings = dict(seed=3, end_id=7, batch_size=2, top_k=9, top_p=.9, repetition_penalty=1.2,
                    suppress=[4])
    here = generate(model, tokens, mask, 20, **settings)
    model, tokens, mask = model.to("cuda"), tokens.to("cuda"), mask.to("cuda")
    there = generate(model, tokens, mask, 20, **settings)
    assert there.tokens.device.type == "cuda"
    assert torch.equal(there.tokens.cpu(), here.tokens)


def test_int8_is_refused_on_another_device(stand_in):
    with pytest.raises(UserError, match="int8"):
        Decoder(Transformer(ModelConfig(**TINY)).to("cuda"), "int8")
