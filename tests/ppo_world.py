"""Small networks, options and rollouts that the tests of PPO share."""
import copy
import types
from typing import NamedTuple

import numpy as np
import torch

from model import ModelConfig, Transformer, load_checkpoint, open_run
from ppo import (ActorCritic, Minibatch, Networks, PPOOptions, PPOTrainer, Prediction, Rollout,
                 ScoreScale, collect_rollout, ppo_loss, ratio_metrics)
from reward import RewardConfig, RewardModel, critic_from
from tests.conftest import loud

SHAPE = dict(vocab_size=40, n_layer=2, n_head=2, n_kv_head=2, d_model=16, d_ff=32, max_len=48)
END = 5


class Nets(NamedTuple):
    actor_critic: ActorCritic
    reference: Transformer
    reward_model: RewardModel


def bools(rows) -> torch.Tensor:
    return torch.tensor(rows).bool()


def options(**changes) -> PPOOptions:
    return PPOOptions(**{"preset": "smoke", "batch": 8, "minibatches": 2, "epochs": 2,
                         "reply_len": 12, "micro_batch": 3, **changes})


def nets_of(seed: int = 0, critic: str = "separate") -> Nets:
    policy = Transformer(ModelConfig(**SHAPE))
    policy.initialise(seed)
    reward_model = RewardModel(RewardConfig(**SHAPE, pool="mean", dropout=.1))
    reward_model.backbone.initialise(seed + 1)
    loud(policy)
    loud(reward_model.backbone)
    reward_model.eval().requires_grad_(False)
    actor_critic = ActorCritic(policy, critic_from(reward_model) if critic == "separate" else None)
    return Nets(actor_critic, copy.deepcopy(policy), reward_model)


def prompts(n: int = 8) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(6, 40, rng.integers(1, 7)).tolist() for _ in range(n)]


def rollout_of(nets: Nets, o: PPOOptions, step: int = 0, dtype: str = "float32", decoder=None,
               **more) -> Rollout:
    nets.actor_critic.dtype = dtype
    networks = Networks(nets.actor_critic, nets.reference, END, decoder)
    settings = {"scorer": nets.reward_model, "scale": ScoreScale(), "kl_coef": .1, **more}
    return collect_rollout(networks, prompts(o.batch // o.samples_per_prompt), o, step=step,
                           **settings)


def optimizer_of(actor_critic: ActorCritic, lr: float = 1e-2) -> torch.optim.Optimizer:
    return torch.optim.Adam([{"params": actor_critic.policy.parameters()},
                             {"params": actor_critic.value_module.parameters()}], lr=lr)


def arrays(B: int = 6, R: int = 9, seed: int = 0) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """What a loss reads, random, and a ragged mask; each (B, R)."""
    g = torch.Generator().manual_seed(seed)
    mask = torch.arange(R) < torch.randint(1, R + 1, (B, 1), generator=g)
    names = ("logprobs", "old_logprobs", "advantages", "values", "old_values", "returns", "entropy",
             "ref_logprobs")
    return {n: torch.randn(B, R, generator=g) * .5 for n in names}, mask


def loss_of(x: dict[str, torch.Tensor], mask: torch.Tensor, n_tokens=None, loss=ppo_loss,
            **changes) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """(loss, means of its metrics) of such arrays."""
    rollout = types.SimpleNamespace(
        response_mask=mask, logprobs=x["old_logprobs"], ref_logprobs=x["ref_logprobs"],
        values=x["old_values"], advantages=x["advantages"], returns=x["returns"], kl_coef=.3,
        spread=1.5)
    n_tokens = mask.sum() if n_tokens is None else n_tokens
    batch = Minibatch.of(rollout, torch.arange(len(mask)), n_tokens)
    new = Prediction(x["logprobs"], x["entropy"], x["values"])
    value, metrics = loss(batch, new, options(**changes))
    metrics = {**metrics, **ratio_metrics(batch, new)}
    return value, {name: mean.detach() for name, (mean, _) in metrics.items()}


def make_trainer(o: PPOOptions, world, reward_model: RewardModel | bool | None = None,
                 **seams) -> PPOTrainer:
    """A trainer of the small world of conftest, nothing trained yet; reward_model: in place of the
    world's; False: none."""
    policy, tokenizer, _ = load_checkpoint(world.root / "sft")
    if reward_model is None:
        reward_model, _, _ = load_checkpoint(world.root / "reward", cls=RewardModel)
    run = open_run("ppo", o, world.data, {}, policy, tokenizer)
    return PPOTrainer(run, policy, reward_model or None, world.data, **seams)
