"""The table of memory: counted on real networks, and what it says of ways to spare some holds."""
import pytest
import torch

from model import ModelConfig, Transformer
from runtime.learning import learn_part
from runtime.options import UserError, parse
from tests.ppo_world import options as ppo_options
from tools import memory
from tools.memory import MemoryOptions, kept_per_token, memory_needed

SHAPE = dict(vocab_size=500, n_layer=6, n_head=4, n_kv_head=2, d_model=64, d_ff=192, max_len=64)


@pytest.mark.parametrize("family", [
    {}, {"qk_norm": False}, {"norm": "layer", "mlp": "gelu", "mlp_bias": True, "parallel": True}])
def test_what_a_block_keeps_is_what_autograd_saves(family):
    def saved(n_layer: int) -> float:
        model, kept = Transformer(ModelConfig(**SHAPE | family | {"n_layer": n_layer})), {}
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}

        def pack(t: torch.Tensor) -> torch.Tensor:
            kept[t.untyped_storage().data_ptr()] = (t.untyped_storage().nbytes(), t)  # held: no address is used again
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            model.hidden(torch.zeros(4, 40, dtype=torch.long))
        return sum(n for address, (n, _) in kept.items() if address not in own) / 160

    said = kept_per_token(ModelConfig(**SHAPE | family), "float32")
    assert (saved(4) - saved(2)) / 2 == pytest.approx(said, rel=.15)


def test_weights_are_those_of_the_networks():
    config = ModelConfig(**SHAPE)
    policy = Transformer(config)
    everything = sum(p.numel() for p in policy.parameters())
    whole, last = (memory_needed(config, n) for n in (0, 2))
    assert whole["weights"] == 4 * (4 * everything + 2 * 65)
    learn_part(policy, ppo_options(train_layers=2), "ppo")
    upper = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    assert last["weights"] == 4 * (everything + 3 * upper + 2 * 65)
    assert last["optimizer"] == 8 * (2 * upper + 65)
    assert last["below"] > 0 == whole["below"]


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_less_that_learns_takes_less(stage, dtype, device):
    o = MemoryOptions(stage=stage, dtype=dtype, device=device)
    whole, last, both = (memory_needed(memory.SHAPES["0.1 B"], *way, o)["total"] for way in ((0, 0), (8, 0), (8, 16)))
    assert whole > last >= both
    assert memory_needed(memory.SHAPES["0.1 B"], 0, 16, o)["total"] < whole
    assert device == "cpu" or last > both  # on a CPU reading checkpoints may take the most


def test_the_averages_are_those_of_the_optimizer():
    config = ModelConfig(**SHAPE)
    everything = memory.count(Transformer(config))
    adamw, muon = (memory_needed(config, o=MemoryOptions(stage="sft", optimizer=x))["optimizer"]
                   for x in ("adamw", "muon"))
    assert adamw == 8 * everything > muon > 4 * everything  # Muon's matrices have one average, the embedding two


def test_recomputing_takes_less():
    plain, spared = (memory_needed(memory.SHAPES["0.1 B"], 0, 0, MemoryOptions(recompute=x, micro_batch=48))["total"]
                     for x in (False, True))
    assert spared < .7 * plain


def test_the_shapes_are_of_the_sizes_that_they_are_named_by():
    for name, config in memory.SHAPES.items():
        with torch.device("meta"):
            billions = memory.count(Transformer(config)) / 1e9
        assert billions == pytest.approx(float(name.split()[0]), rel=.4), name


def test_the_command_prints_a_line_for_each_shape(capsys, world):
    assert memory.main([f"--from={world.root / 'sft'}", "--train_layers=1", "--lora_rank=2"]) == 0
    printed = capsys.readouterr().out
    assert "| weights | all | last 1 | LoRA 2 | both" in " ".join(printed.split())
    with pytest.raises(UserError):
        parse(MemoryOptions, ["--stage=pretrain"], "x")
