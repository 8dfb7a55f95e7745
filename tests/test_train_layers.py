"""--train_layers: only the last blocks learn, and what lies below is in memory and computed once for all
networks that have it in common."""
import copy
import dataclasses

import pytest
import torch

import evaluate
from data import batches
from data.batches import Rows, pad_left, similar_lengths
from model import ModelConfig, Transformer, load_checkpoint, open_run
from ppo import ActorCritic, Networks, PPOTrainer, ScoreScale, collect_rollout, score_replies, update
from reward import RewardConfig, RewardModel, critic_from
from runtime.learning import (Below, equal_depth, halve_frozen, learn_part, learned, learning, learning_copy,
                              load_learned, share_frozen, shared_depth, sharing)
from runtime.optim import make_optimizers
from runtime.options import UserError, parse
from sample import generate
from tests.conftest import equal, loud, noise
from tests.ppo_world import END, prompts
from tests.ppo_world import options as ppo_options
from tests.test_pipeline import (checkpoint, copy_parents, mosslet, refused, root,  # noqa: F401 (a fixture)
                                 run_until_killed, train, train_words)
from train import STAGES, commands

SHAPE = dict(vocab_size=40, n_layer=4, n_head=2, n_kv_head=1, d_model=16, d_ff=32, max_len=48)


def trunk(seed: int = 0, **more) -> Transformer:
    model = Transformer(ModelConfig(**SHAPE | more))
    model.initialise(seed)
    return loud(model).eval()


def reward_model_on(policy: Transformer, changed: int, seed: int = 7, **more) -> RewardModel:
    """A reward model of the policy's weights but for the last `changed` blocks."""
    model = RewardModel(RewardConfig(**dataclasses.asdict(policy.config), **more))
    model.backbone.load_state_dict(policy.state_dict())
    other = trunk(seed)
    for ours, theirs in zip(model.backbone.blocks[4 - changed:], other.blocks[4 - changed:], strict=True):
        ours.load_state_dict(theirs.state_dict())
    return model.eval().requires_grad_(False)


def networks_of(o, changed: int = 2, critic: str = "separate") -> Networks:
    """Networks as the trainer makes them, of which the last o.train_layers blocks learn."""
    policy = trunk()
    learn_part(policy, o, "ppo")
    reference, reward_model = learning_copy(policy, o, "ppo").requires_grad_(False), reward_model_on(policy, changed)
    for network in (reference, reward_model):
        share_frozen(policy, network)
    own = critic_from(reward_model, o=o) if critic == "separate" else None
    reference.frozen = shared_depth(policy, reference)
    reward_model.backbone.frozen = shared_depth(own.backbone if own else policy, reward_model.backbone)
    return Networks(ActorCritic(policy, own), reference, END, reward_model=reward_model)


def adam(networks: Networks, lr: float) -> torch.optim.Optimizer:
    """The trainer's optimizer."""
    modules = (networks.actor_critic.policy, networks.actor_critic.value_module)
    return torch.optim.Adam([{"params": learning(module)} for module in modules], lr=lr)


def rollout_of(networks: Networks, o, step: int = 0):
    return collect_rollout(networks, prompts(o.batch), o, step=step, scorer=networks.reward_model,
                           scale=ScoreScale(), kl_coef=.1)


# ---- what learns ---------------------------------------------------------------------------------

@pytest.mark.parametrize("stage", ["sft", "reward", "judge", "best", "ppo"])
def test_every_stage_but_the_first_has_the_option(stage):
    assert parse(commands()[stage][0], ["--train_layers=2"], "x").train_layers == 2


def test_pretraining_alone_refuses_it_and_all_stages_pass_it_by():
    refused(mosslet("train.py", "pretrain", "--train_layers=2"), "--train_layers has no effect on pretrain")


@pytest.mark.parametrize("tied", [True, False])
def test_the_last_blocks_and_the_norm_learn_and_nothing_else(tied):
    model = RewardModel(RewardConfig(**SHAPE, tied=tied))
    learn_part(model, ppo_options(train_layers=1), "ppo")
    names = learned(model)
    assert {name for name in names if not name.startswith("backbone.blocks.3.")} == {
        "backbone.norm.weight", "score_head.weight", "score_head.bias"}
    assert len(names) == 3 + len(dict(model.backbone.blocks[3].named_parameters()))
    assert model.backbone.frozen == 3


def test_without_the_option_all_learns():
    model = trunk()
    learn_part(model, ppo_options(), "ppo")
    assert len(learning(model)) == len(list(model.parameters()))
    assert model.frozen == 0


def test_more_layers_than_there_are_is_refused():
    with pytest.raises(UserError, match="--train_layers 5: this model has 4 blocks: give at most 4"):
        learn_part(trunk(), ppo_options(train_layers=5), "ppo")


@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_above_are_those_of_the_whole_and_none_are_below(recompute):
    whole, part = trunk(), trunk()
    learn_part(part, ppo_options(train_layers=2), "ppo")
    part.recompute = recompute
    tokens = torch.randint(0, 40, (3, 9))
    for model in (whole, part):
        model(tokens).square().mean().backward()
    for (name, a), b in zip(whole.named_parameters(), part.parameters(), strict=True):
        if b.requires_grad:
            assert torch.allclose(a.grad, b.grad, atol=1e-6), name
        else:
            assert b.grad is None, name


def test_below_has_no_graph_and_hidden_goes_on_from_it():
    model = trunk()
    assert model.below(torch.zeros(1, 3, dtype=torch.long)) is None
    learn_part(model, ppo_options(train_layers=2), "ppo")
    tokens = torch.randint(0, 40, (3, 9))
    below = model.below(tokens)
    assert not below.requires_grad
    where = torch.tensor([2, 5, 20])
    assert torch.equal(model.hidden(tokens, where=where, below=below), model.hidden(tokens, where=where))
    assert not torch.equal(model.hidden(tokens, below=2 * below), model.hidden(tokens))  # it is read


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("layers", [1, 4])
def test_optimizers_hold_what_learns_alone(optimizer, layers):
    model = RewardModel(RewardConfig(**SHAPE))
    o = parse(STAGES["reward"][0], [f"--train_layers={layers}", f"--optimizer={optimizer}"], "x")
    learn_part(model, o, "ppo")
    held = [p for x in make_optimizers(model, o) for group in x.param_groups for p in group["params"]]
    assert {*map(id, held)} == {*map(id, learning(model))}
    assert len(held) == len(learning(model))


def test_what_was_learned_is_told_by_name_and_taken_back():
    o = ppo_options(train_layers=2)
    a, b = trunk(0), trunk(1)
    for model in (a, b):
        learn_part(model, o, "ppo")
    load_learned(b, {name: x.clone() for name, x in learned(a).items()})
    assert equal(learned(a), learned(b))
    assert not torch.equal(a.embedding.weight, b.embedding.weight)
    with pytest.raises(UserError, match="--fresh"):
        load_learned(b, {"norm.weight": torch.ones(16)})


# ---- once in memory ------------------------------------------------------------------------------

def bytes_of(*models) -> int:
    return sum(p.numel() * p.element_size() for p in {id(p): p for m in models for p in m.parameters()}.values())


def test_four_networks_hold_what_they_have_in_common_once():
    nets = networks_of(ppo_options(train_layers=2))
    policy, critic = nets.actor_critic.policy, nets.actor_critic.critic
    frozen = sum(p.numel() for p in policy.parameters() if not p.requires_grad)
    upper = sum(p.numel() for p in learning(policy))
    heads = sum(p.numel() for m in (critic, nets.reward_model) for p in m.score_head.parameters())
    assert bytes_of(policy, nets.reference, critic, nets.reward_model) == 4 * (frozen + 4 * upper + heads)
    assert policy.embedding.weight is critic.backbone.embedding.weight is nets.reference.embedding.weight


def test_a_reward_model_that_learned_more_shares_with_its_critic_alone():
    nets = networks_of(ppo_options(train_layers=1), changed=3)
    policy, critic = nets.actor_critic.policy, nets.actor_critic.critic
    assert shared_depth(policy, critic.backbone) == 0
    assert nets.reward_model.backbone.frozen == nets.reference.frozen == 3
    assert critic.backbone.blocks[2].mlp.down.weight is nets.reward_model.backbone.blocks[2].mlp.down.weight
    assert critic.backbone.blocks[0].mlp.down.weight is policy.blocks[0].mlp.down.weight


def test_learning_reaches_no_network_that_shares():
    o = ppo_options(train_layers=2)
    nets = networks_of(o)
    before = copy.deepcopy((nets.reference.state_dict(), nets.reward_model.state_dict()))
    policy = copy.deepcopy(nets.actor_critic.policy.state_dict())
    update(nets.actor_critic, adam(nets, 1e-2), rollout_of(nets, o), o, 0)
    assert equal(before, (nets.reference.state_dict(), nets.reward_model.state_dict()))
    moved = {name for name, x in nets.actor_critic.policy.state_dict().items() if not torch.equal(x, policy[name])}
    assert moved == {*learned(nets.actor_critic.policy)}


# ---- once computed -------------------------------------------------------------------------------

class Counted:
    """How often each block of some trunks is run."""

    def __init__(self, *trunks: Transformer):
        self.runs: dict[int, int] = {}
        for x in trunks:
            for i, block in enumerate(x.blocks):
                block.register_forward_hook(lambda *_, i=i: self.runs.update({i: self.runs.get(i, 0) + 1}))


def trunks_of(nets: Networks) -> list[Transformer]:
    critic = nets.actor_critic.critic
    return [nets.actor_critic.policy, nets.reference, nets.reward_model.backbone,
            *([critic.backbone] if critic is not None else [])]


@pytest.mark.parametrize("critic", ["separate", "shared"])
@pytest.mark.parametrize("changed", [0, 2, 3])
def test_what_lies_below_once_equals_separate_forwards(changed, critic):
    o = ppo_options(train_layers=2)
    nets = networks_of(o, changed, critic)
    apart = copy.deepcopy(nets)
    for x in trunks_of(apart):
        x.frozen = 0
    a, b = rollout_of(nets, o), rollout_of(apart, o)
    assert b.below.policy is None
    assert torch.equal(a.tokens, b.tokens)
    for name in ("logprobs", "ref_logprobs", "values", "raw_scores", "entropy", "advantages", "returns"):
        assert torch.allclose(getattr(a, name), getattr(b, name), atol=1e-5), name
    assert (a.below.critic is a.below.policy) == (changed <= 2 or critic == "shared")


def test_the_blocks_below_run_once_for_a_rollout_and_never_in_an_update(monkeypatch):
    monkeypatch.setitem(batches.TOKENS_AT_ONCE, "cpu", 40)
    o = ppo_options(train_layers=2)
    nets = networks_of(o)
    rollout = rollout_of(nets, o)
    counted = Counted(*trunks_of(nets))
    with torch.no_grad():
        score_replies(nets, rollout, o)
    parts = len(similar_lengths(rollout.mask.sum(1)))
    assert parts > 1
    assert counted.runs == {0: parts, 1: parts, 2: 3 * parts, 3: 3 * parts}
    counted.runs.clear()
    update(nets.actor_critic, adam(nets, 1e-3), rollout, o, 0)
    assert {*counted.runs} == {2, 3}
    counted.runs.clear()
    rollout_of(nets, o)
    # the reward model goes on from the same states; the rest of the runs read prompts for the decoder
    together, apart = counted.runs[0], copy.deepcopy(nets)  # a copy's hooks count here, too
    for x in trunks_of(apart):
        x.frozen = 0
    again = Counted(*trunks_of(apart))
    rollout_of(apart, o)
    assert again.runs[0] - together == 3 * parts


def test_what_two_policies_have_in_common_is_computed_once_where_they_are_measured():
    policy, reference = trunk(), trunk()
    policy.blocks[2].load_state_dict(trunk(7).blocks[2].state_dict())
    ids, calls = prompts(6), []
    replies = generate(policy, *pad_left(ids, 0), 8, seed=1)
    alone = evaluate.reply_logprobs(policy, reference, ids, replies, evaluate.ReplySettings())
    policy.requires_grad_(False)  # from now on it learns no more
    for block in reference.blocks:
        block.register_forward_hook(lambda *_: calls.append(1))
    with sharing(policy, reference):
        assert (policy.frozen, reference.frozen) == (2, 2)
        together = evaluate.reply_logprobs(policy, reference, ids, replies, evaluate.ReplySettings())
    assert len(calls) == 2  # of the reference's four blocks those above
    assert all(map(torch.equal, alone, together))
    assert (policy.frozen, reference.frozen) == (0, 0)


def test_of_equal_trunks_the_last_block_is_computed_for_each_and_of_others_all():
    assert equal_depth(trunk(), trunk()) == 3
    assert equal_depth(trunk(n_layer=1), trunk(n_layer=1)) == 0
    assert equal_depth(trunk(), trunk(7)) == 0
    other = trunk()
    with torch.no_grad():
        other.embedding.weight[0, 0] += 1
    assert equal_depth(trunk(), other) == 0
    assert equal_depth(trunk(), trunk(norm_eps=1e-3)) == 0
    assert equal_depth(trunk(), halve_frozen(trunk().requires_grad_(False), "bfloat16")) == 0


@pytest.mark.parametrize("changed", [2, 3])
def test_updates_with_and_without_sharing_give_the_same_numbers(changed):
    o = ppo_options(train_layers=2, entropy_coef=.01)
    nets = networks_of(o, changed)
    apart, logged = copy.deepcopy(nets), []
    for x in trunks_of(apart):
        x.frozen = 0
    for n in (nets, apart):
        optimizer = adam(n, 1e-3)
        logged.append([update(n.actor_critic, optimizer, rollout_of(n, o, step), o, step) for step in range(3)])
    for a, b in zip(*logged, strict=True):
        for name in a.keys() - {"seconds_train", "clip_frac", "value_clip_frac"}:  # those count tokens at an edge
            assert a[name] == pytest.approx(b[name], abs=1e-5, rel=1e-5), name


def test_the_states_of_some_rows_are_those_that_were_put_there():
    a, b = noise(2, 5, 3), noise(2, 4, 3, seed=1)
    below = Below().put(torch.tensor([3, 0]), Below(a, a), 4, 6).put(torch.tensor([1, 2]), Below(b, b), 4, 6)
    assert below.critic is below.policy
    assert torch.equal(below.at(torch.tensor([0, 3]), 5).policy, a.flip(0))
    assert torch.equal(below.at(torch.tensor([1]), 4).critic, b[:1])
    assert Below().at(torch.tensor([1]), 4) == Below() == Rows(*[a] * 5).below


# ---- runs ----------------------------------------------------------------------------------------

def smoke_road(parents, source, out, option: str):
    """Smoke runs of sft, reward and ppo with an option; their folder."""
    copy_parents(parents, out, "sft")
    for stage in ("sft", "reward", "ppo"):
        done = train(stage, option, source=source, out=out)
        assert done.returncode == 0, done.stderr
    return out / "reviews"


@pytest.fixture(scope="module")
def part(root, reviews_source, tmp_path_factory):  # noqa: F811
    """Runs of which the last block learns."""
    return smoke_road(root, reviews_source, tmp_path_factory.mktemp("part"), "--train_layers=1")


def test_a_run_moves_the_last_block_alone(part, root):  # noqa: F811
    before = checkpoint(root / "pretrain")["model"]
    for stage in ("sft", "ppo"):
        after = checkpoint(part / stage)["model"]
        moved = {name.split(".")[1] for name in after if not torch.equal(after[name], before[name])}
        assert moved == {"1", "weight"}, stage
    reward = checkpoint(part / "reward")["model"]
    assert torch.equal(reward["backbone.blocks.0.mlp.down.weight"], before["blocks.0.mlp.down.weight"])
    assert not torch.equal(reward["backbone.blocks.1.mlp.down.weight"], before["blocks.1.mlp.down.weight"])


def test_the_checkpoint_of_ppo_holds_of_the_critic_what_learned(part):
    critic = checkpoint(part / "ppo")["state"]["critic"]
    assert {name.split(".")[2] for name in critic if name.startswith("backbone.blocks")} == {"1"}
    assert "score_head.weight" in critic
    assert "backbone.embedding.weight" not in critic


@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_killed_and_resumed_equals_uninterrupted(part, reviews_source, tmp_path, stage):
    copy_parents(part, tmp_path, stage)
    words = train_words(stage, "--train_layers=1", source=reviews_source, out=tmp_path)
    run_until_killed(words, tmp_path / "reviews" / stage)
    assert mosslet(*words, "--resume").returncode == 0
    uninterrupted, resumed = checkpoint(part / stage), checkpoint(tmp_path / "reviews" / stage)
    for payload in (uninterrupted, resumed):
        payload["state"].pop("seconds")
    assert equal(uninterrupted, resumed)


def test_best_and_judge_take_it_too(part, reviews_source):
    for stage in ("judge", "best"):
        done = train(stage, "--train_layers=1", source=reviews_source, out=part.parent)
        assert done.returncode == 0, done.stderr
    assert torch.equal(checkpoint(part / "best")["model"]["embedding.weight"],
                       checkpoint(part / "sft")["model"]["embedding.weight"])


def test_too_many_layers_is_one_line(part, reviews_source):
    refused(train("ppo", "--train_layers=3", "--fresh", source=reviews_source, out=part.parent),
            "--train_layers 3: this model has 2 blocks")


def trainer_of(world, command, with_reward_model: bool) -> PPOTrainer:
    """A trainer of a policy of three blocks, the last of which learns."""
    policy, tokenizer, _ = load_checkpoint(world.root / "sft")
    model, reward_model = Transformer(dataclasses.replace(policy.config, n_layer=3)), None
    if with_reward_model:
        reward_model = RewardModel(RewardConfig(**dataclasses.asdict(model.config))).eval()
        reward_model.backbone.load_state_dict(model.state_dict())
    o = command("ppo", "--fresh", "--train_layers=1").replace(reward_norm="fixed")
    run = open_run("ppo", o, world.data, {}, model, tokenizer)

    class Short:
        def scores(self, prompts, replies):
            return torch.tensor([-float(len(r)) for r in replies])

    return PPOTrainer(run, model, reward_model, world.data, scorer=None if with_reward_model else Short())


def test_a_trainer_shares_with_its_reward_model(world, command):
    trainer = trainer_of(world, command, True)
    trunks = trunks_of(trainer.networks)
    assert [x.frozen for x in trunks] == [2] * 4
    assert len({id(x.blocks[1].mlp.down.weight) for x in trunks}) == 1
    assert len({id(x.blocks[2].mlp.down.weight) for x in trunks}) == 4
    assert trainer.update(0)["kl"] == 0


def test_a_trainer_without_a_reward_model_shares_too(world, command):
    trainer = trainer_of(world, command, False)
    nets, run = trainer.networks, trainer.run
    assert shared_depth(run.model, nets.actor_critic.critic.backbone) == 2
    assert nets.reference.frozen == 2
    assert trainer.update(0)["kl"] == 0


# ---- bfloat16 ------------------------------------------------------------------------------------

def test_frozen_matrices_in_bfloat16_change_no_number_of_autocast():
    model = trunk()
    learn_part(model, ppo_options(train_layers=2), "ppo")
    tokens = torch.arange(27).view(3, 9)
    with torch.autocast("cpu", torch.bfloat16):
        before = model.hidden(tokens)
        halve_frozen(model, "float32")
        assert model.blocks[0].mlp.down.weight.dtype == torch.float32
        halve_frozen(model, "bfloat16")
        assert torch.equal(model.hidden(tokens), before)
    halves = {name for name, p in model.named_parameters() if p.dtype == torch.bfloat16}
    assert {name.split(".")[1] for name in halves} == {"0", "1"}
    assert len(halves) == 8
    assert not halves & {*learned(model)}


def test_networks_share_what_one_of_them_has_rounded():
    o = ppo_options(train_layers=2)
    policy, reward_model = trunk(), reward_model_on(trunk(), 2)
    learn_part(policy, o, "ppo")
    halve_frozen(policy, "bfloat16")
    share_frozen(policy, reward_model)
    assert reward_model.backbone.blocks[1].mlp.down.weight is policy.blocks[1].mlp.down.weight
    assert shared_depth(policy, reward_model.backbone) == 2


def test_a_run_in_bfloat16_keeps_its_frozen_matrices_in_it_and_resumes(root, reviews_source, tmp_path):  # noqa: F811
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for out in (whole, killed):
        copy_parents(root, out, "sft")
    words = ("sft", "--train_layers=1", "--dtype=bfloat16")
    done = train(*words, source=reviews_source, out=whole)
    assert done.returncode == 0, done.stderr
    run_until_killed(train_words(*words, source=reviews_source, out=killed), killed / "reviews" / "sft")
    assert train(*words, "--resume", source=reviews_source, out=killed).returncode == 0
    uninterrupted, resumed = (checkpoint(out / "reviews" / "sft") for out in (whole, killed))
    for payload in (uninterrupted, resumed):
        payload["state"].pop("seconds")
    assert equal(uninterrupted, resumed)
    types = {name: x.dtype for name, x in uninterrupted["model"].items()}
    assert types["blocks.0.mlp.down.weight"] == torch.bfloat16
    assert types["blocks.1.mlp.down.weight"] == types["embedding.weight"] == torch.float32
    assert {x.dtype for x in load_checkpoint(whole / "reviews" / "sft")[0].parameters()} == {torch.float32}
