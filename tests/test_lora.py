"""--lora_rank: adapters learn in place of weights. Merged they are the same model, and PPO's reference is
the model without them."""
import copy
import dataclasses

import pytest
import torch

from model import Transformer, load_checkpoint, open_run, read_checkpoint, save_checkpoint
from ppo import PPOTrainer
from reward import RewardConfig, RewardModel, critic_from
from runtime.decoding import PackedLinear, decoding_copy, refresh
from runtime.learning import learn_part, learned, learning, shared_depth
from runtime.lora import adapted, merge_adapters
from runtime.optim import Muon, make_optimizers
from runtime.options import UserError, parse
from sample import Decoder, generate
from tests.conftest import equal, noise
from tests.ppo_world import END
from tests.ppo_world import options as ppo_options
from tests.test_pipeline import (checkpoint, copy_parents, lines, mosslet, refused, root,  # noqa: F401 (a fixture)
                                 run_until_killed, train, train_words)
from tests.test_train_layers import SHAPE, bytes_of, smoke_road, trunk
from train import STAGES


def with_adapters(seed: int = 0, rank: int = 3, model=None, **changes):
    """A model whose adapters have learned something."""
    model = trunk() if model is None else model
    learn_part(model, ppo_options(lora_rank=rank, seed=seed, **changes), "ppo")
    for layer in adapted(model):
        layer.adapter.up.data.copy_(noise(*layer.adapter.up.shape, seed=seed))
    return model


TOKENS = torch.arange(36).view(3, 12) % 40


# ---- adapters ------------------------------------------------------------------------------------

def test_fresh_adapters_change_nothing():
    model = trunk()
    before = model(TOKENS)
    learn_part(model, ppo_options(lora_rank=4), "ppo")
    assert torch.equal(model(TOKENS), before)


@pytest.mark.parametrize("layers", [0, 2])
def test_adapters_learn_alone_on_all_matrices_of_the_last_blocks(layers):
    model = with_adapters(train_layers=layers)
    names = {name.removesuffix(".down").removesuffix(".up") for name in learned(model)}
    matrices = ("attention.qkv", "attention.out", "mlp.gate_up", "mlp.down")
    assert names == {f"blocks.{i}.{x}.adapter" for i in range(4 - (layers or 4), 4) for x in matrices}
    model(TOKENS).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in learning(model))
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    assert model.frozen == (4 - layers if layers else 0)


def test_heads_learn_too():
    model = RewardModel(RewardConfig(**SHAPE))
    learn_part(model, ppo_options(lora_rank=2), "reward")
    assert {name for name in learned(model) if ".adapter." not in name} == {"score_head.weight", "score_head.bias"}


def test_the_scale_is_alpha_over_rank_and_twice_without_alpha():
    for changes, scale in (({}, 2.0), ({"lora_alpha": 3.0}, 1.0), ({"lora_alpha": 12.0}, 4.0)):
        layer = adapted(with_adapters(**changes))[0]
        x = noise(5, layer.weight.shape[1])
        expected = x @ layer.weight.T + scale * (x @ layer.adapter.down.T) @ layer.adapter.up.T
        assert torch.allclose(layer(x), expected, atol=1e-5)


def test_merged_equals_the_model_with_adapters():
    model = with_adapters()
    merged = copy.deepcopy(model)
    merge_adapters(merged)
    assert merged.state_dict().keys() == trunk().state_dict().keys()
    assert not torch.equal(merged(TOKENS), trunk()(TOKENS))
    logits = model(TOKENS)
    assert (merged(TOKENS) - logits).abs().max() < 1e-5 * max(1, logits.abs().max())


def test_other_seeds_and_stages_begin_with_other_adapters():
    def down(seed: int, stage: str) -> torch.Tensor:
        model = trunk()
        learn_part(model, ppo_options(lora_rank=3, seed=seed), stage)
        return adapted(model)[0].adapter.down

    assert torch.equal(down(0, "sft"), down(0, "sft"))
    assert not torch.equal(down(0, "sft"), down(1, "sft"))
    assert not torch.equal(down(0, "sft"), down(0, "ppo"))


# ---- options and optimizers ----------------------------------------------------------------------

@pytest.mark.parametrize("words,message", [
    (["--lora_alpha=8"], "--lora_alpha has no effect without --lora_rank"),
    (["--lora_rank=2", "--lr=.1"], "--lr has no effect with --lora_rank"),
    (["--lora_rank=2", "--weight_decay=.1"], "--weight_decay has no effect with --lora_rank"),
    (["--lora_rank=2", "--newton_schulz_iterations=2"], "--newton_schulz_iterations has no effect with --lora_rank")])
def test_options_without_effect_are_refused(words, message):
    with pytest.raises(UserError, match=message):
        parse(STAGES["sft"][0], words, "x")


def test_a_rank_above_the_width_is_refused():
    with pytest.raises(UserError, match="--lora_rank 17 is above the model's width, 16"):
        learn_part(trunk(), ppo_options(lora_rank=17), "ppo")


def test_pretraining_alone_refuses_adapters():
    refused(mosslet("train.py", "pretrain", "--lora_rank=2"), "--lora_rank has no effect on pretrain")


def test_pretraining_among_all_stages_keeps_its_own_options():
    from runtime.commands import parse_command
    _, options = parse_command(["--lora_rank=2", "--pretrain.lr=.01"], {name: cls for name, (cls, _) in STAGES.items()},
                               ["pretrain", "sft", "ppo"], "x")
    assert (options["pretrain"].lr, options["ppo"].lora_rank) == (.01, 2)


@pytest.mark.parametrize("optimizer,rate", [("muon", "adam_lr"), ("adamw", "lr")])
def test_adapters_are_adamws(optimizer, rate):
    model = RewardModel(RewardConfig(**SHAPE))
    o = parse(STAGES["reward"][0], ["--lora_rank=2", f"--optimizer={optimizer}"], "x")
    learn_part(model, o, "reward")
    only, = make_optimizers(model, o)
    assert not isinstance(only, Muon)
    assert {group["lr"] for group in only.param_groups} == {getattr(o, rate)}
    assert {id(p) for group in only.param_groups for p in group["params"]} == {*map(id, learning(model))}


# ---- decoding ------------------------------------------------------------------------------------

@pytest.mark.parametrize("rows", [1, 8])
def test_a_decoder_has_the_adapters_in_its_packed_weights_and_follows_them(rows):
    model = with_adapters()
    packed = decoding_copy(model, torch.float32, rows)
    for seed in (0, 5):  # as it was made, then after an update
        for layer in adapted(model):
            layer.adapter.up.data.copy_(noise(*layer.adapter.up.shape, seed=seed))
        if seed:
            refresh(packed)
        assert not adapted(packed)
        layers = [x for x in packed.modules() if isinstance(x, PackedLinear)]
        assert len(layers) == 4 * 4 + 1
        with torch.no_grad():
            assert torch.allclose(packed(TOKENS), model(TOKENS), atol=2e-4)


def test_replies_of_a_model_with_adapters_are_those_of_the_merged_one():
    model = with_adapters()
    merged = copy.deepcopy(model)
    merge_adapters(merged)
    a, b = (generate(m, TOKENS, torch.ones_like(TOKENS).bool(), 10, temperature=1.0, end_id=END, seed=[1],
                     decoder=Decoder(m)) for m in (model, merged))
    assert torch.equal(a.tokens, b.tokens)
    assert torch.allclose(a.logprobs, b.logprobs, atol=1e-4)


# ---- checkpoints ---------------------------------------------------------------------------------

def test_a_checkpoint_keeps_adapters_and_gives_the_merged_model(world, tmp_path):
    sft, tokenizer, _ = load_checkpoint(world.root / "sft")
    model = with_adapters(model=sft)
    save_checkpoint(tmp_path, model, tokenizer, stage="sft", step=1)
    kept, _, state = load_checkpoint(tmp_path, merged=False)
    assert equal(kept.state_dict(), model.state_dict())
    assert float(adapted(kept)[0].adapter.scale) == 2
    merged, _, again = load_checkpoint(tmp_path)
    assert not adapted(merged)
    assert state["hash"] == again["hash"]
    tokens = TOKENS % 500
    assert torch.allclose(merged(tokens), model(tokens), atol=1e-5 * float(model(tokens).abs().max()))


@pytest.mark.parametrize("damage", [
    {"down": (3, 9)}, {"up": (9, 3)}, {"down": (10**6, 0)}, {"down": ()}, {"up": None}])
def test_adapters_of_other_shapes_are_refused(world, tmp_path, damage):
    sft, tokenizer, _ = load_checkpoint(world.root / "sft")
    model = with_adapters(model=sft)
    (name, shape), = damage.items()
    layer = model.blocks[0].mlp.down.adapter
    if shape is None:
        delattr(layer, name)
    else:
        setattr(layer, name, torch.nn.Parameter(torch.zeros(shape)))
    save_checkpoint(tmp_path, model, tokenizer, stage="sft", step=1)
    with pytest.raises(UserError, match="parts do not fit"):
        load_checkpoint(tmp_path)
    with pytest.raises(UserError, match="parts do not fit"):
        read_checkpoint(tmp_path / "checkpoint.pt", Transformer)


# ---- PPO -----------------------------------------------------------------------------------------

def trainer(world, command, tmp_path, *words, adapters_in_reward=True, layers=3):
    """A trainer of a policy of three blocks; its reward model is the same with adapters, or with other
    weights of its own in all blocks."""
    sft, tokenizer, _ = load_checkpoint(world.root / "sft")
    config = dataclasses.replace(sft.config, n_layer=layers)
    policy = Transformer(config)
    reward_model = RewardModel(RewardConfig(**dataclasses.asdict(config)))
    reward_model.backbone.load_state_dict(policy.state_dict())
    if adapters_in_reward:
        with_adapters(model=reward_model)
    else:
        for p in reward_model.backbone.blocks.parameters():
            p.data.add_(.01)
    o = command("ppo", "--fresh", "--lora_rank=2", *words).replace(reward_norm="logsigmoid", out=str(tmp_path))
    run = open_run("ppo", o, world.data, {}, policy, tokenizer)
    return PPOTrainer(run, policy, reward_model.eval(), world.data)


@pytest.mark.parametrize("words", [(), ("--train_layers=1",)])
def test_four_networks_have_one_set_of_weights(world, command, tmp_path, words):
    t = trainer(world, command, tmp_path, *words)
    nets, policy = t.networks, t.run.model
    critic = nets.actor_critic.critic
    extra = sum(bytes_of(*[x.adapter for x in adapted(m)]) for m in (policy, t.reward_model, critic))
    shared = {id(x.adapter): x for x in adapted(t.reward_model)}
    twice = sum(p.numel() * 4 for a in adapted(critic) for b in shared.values()
                for p in a.adapter.parameters() if any(p is q for q in b.adapter.parameters()))
    heads = bytes_of(critic.score_head, t.reward_model.score_head)
    base = sum(p.numel() for name, p in policy.named_parameters() if ".adapter." not in name) * 4
    assert bytes_of(policy, nets.reference, critic, t.reward_model) == base + extra - twice + heads
    assert not adapted(nets.reference)
    assert nets.reference.blocks[2].mlp.down.weight is policy.blocks[2].mlp.down.weight


@pytest.mark.parametrize("adapters_in_reward", [True, False])
def test_the_critic_has_adapters_of_its_own(world, command, tmp_path, adapters_in_reward):
    t = trainer(world, command, tmp_path, adapters_in_reward=adapters_in_reward)
    critic = t.networks.actor_critic.critic
    assert len(adapted(critic)) == 12
    before = copy.deepcopy((t.reward_model.state_dict(), t.networks.reference.state_dict()))
    policy = copy.deepcopy(t.run.model.state_dict())
    first = t.update(0)
    assert first["kl"] == 0
    for step in (1, 2):
        t.update(step)
    assert equal(before, (t.reward_model.state_dict(), t.networks.reference.state_dict()))
    moved = {name for name, x in t.run.model.state_dict().items() if not torch.equal(x, policy[name])}
    assert moved
    assert moved <= {*learned(t.run.model)}


def test_with_the_last_layers_alone_what_lies_below_is_computed_once(world, command, tmp_path):
    t = trainer(world, command, tmp_path, "--train_layers=1", adapters_in_reward=False)
    assert t.run.model.frozen == t.networks.reference.frozen == 2
    assert shared_depth(t.networks.actor_critic.critic.backbone, t.reward_model.backbone) == 2
    assert t.update(0)["kl"] == 0


def test_a_critic_starts_as_its_reward_model():
    reward_model = with_adapters(model=RewardModel(RewardConfig(**SHAPE))).eval()
    critic = critic_from(reward_model, o=ppo_options(lora_rank=5))
    mask = torch.ones_like(TOKENS).bool()
    assert torch.allclose(critic(TOKENS, mask), reward_model(TOKENS, mask), atol=1e-6)
    assert len(adapted(critic)[0].adapter.down) == 3  # they go on learning, with the rank that they have


# ---- runs ----------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def lora(root, reviews_source, tmp_path_factory):  # noqa: F811
    """Runs with adapters."""
    return smoke_road(root, reviews_source, tmp_path_factory.mktemp("lora"), "--lora_rank=2")


def test_runs_learn_adapters_and_keep_the_weights(lora, root):  # noqa: F811
    before, after = checkpoint(root / "pretrain")["model"], checkpoint(lora / "sft")["model"]
    assert all(torch.equal(after[name], before[name]) for name in before)
    losses = [line["val_loss"] for line in lines(lora / "sft" / "metrics.jsonl") if "val_loss" in line]
    assert losses[-1] < losses[0]
    merged = load_checkpoint(lora / "sft")[0].state_dict()  # what the next stage starts from
    policy = checkpoint(lora / "ppo")["model"]
    assert all(torch.equal(policy[name], merged[name]) for name in merged)
    assert any("adapter" in name for name in policy)
    critic = checkpoint(lora / "ppo")["state"]["critic"]
    assert {".adapter." in name or "score_head" in name for name in critic} == {True}


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_killed_and_resumed_equals_uninterrupted(lora, reviews_source, tmp_path, stage):
    copy_parents(lora, tmp_path, stage)
    words = train_words(stage, "--lora_rank=2", source=reviews_source, out=tmp_path)
    run_until_killed(words, tmp_path / "reviews" / stage)
    done = mosslet(*words, "--resume")
    assert done.returncode == 0, done.stderr
    uninterrupted, resumed = checkpoint(lora / stage), checkpoint(tmp_path / "reviews" / stage)
    for payload in (uninterrupted, resumed):
        payload["state"].pop("seconds")
    assert equal(uninterrupted, resumed)


def test_a_finished_run_goes_on(lora, reviews_source, tmp_path):
    copy_parents(lora, tmp_path, "ppo")
    words = ("ppo", "--lora_rank=2", "--updates=2", "--critic_warmup=0")
    assert train(*words, source=reviews_source, out=tmp_path).returncode == 0
    done = train("ppo", "--lora_rank=2", "--updates=3", "--critic_warmup=0", "--resume", source=reviews_source,
                 out=tmp_path)
    assert done.returncode == 0, done.stderr
    assert checkpoint(tmp_path / "reviews" / "ppo")["state"]["step"] == 3


def test_sample_reads_them(lora):
    done = mosslet("sample.py", "--from", lora / "ppo", "--prompt", "这本书", "--max_new_tokens=4")
    assert done.returncode == 0, done.stderr


def test_the_last_block_alone(lora, reviews_source, tmp_path):
    copy_parents(lora, tmp_path, "ppo")
    done = train("ppo", "--lora_rank=2", "--train_layers=1", source=reviews_source, out=tmp_path)
    assert done.returncode == 0, done.stderr
    names = {name for name in checkpoint(tmp_path / "reviews" / "ppo")["model"] if "adapter" in name}
    assert {name.split(".")[1] for name in names} == {"1"}
