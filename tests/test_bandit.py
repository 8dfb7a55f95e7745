"""PPO reaches the optimum where it is known: with replies that can be enumerated, the best policy at
a price β of KL is π* = π_ref · exp(r / β) / Z (Ziegler 2019, eq. 2)."""
import copy

import pytest
import torch

from model import ModelConfig, Transformer
from ppo import ActorCritic, Networks, ScoreScale, collect_rollout, update
from reward import RewardConfig, RewardModel, critic_from
from tests.ppo_world import optimizer_of, options

V, END, BETA = 8, 7, 1.0
SHAPE = dict(vocab_size=V, n_layer=1, n_head=2, n_kv_head=2, d_model=16, d_ff=32, max_len=8)
PROMPT = [END]  # no reply goes on after it, so no two contexts look alike
REPLIES = [(END,), *((a, b) for a in range(END) for b in range(V))]  # at most two tokens


def log_probs(policy: Transformer) -> torch.Tensor:
    """log π of every reply, (57,)."""
    contexts = torch.tensor([[*PROMPT, a] for a in range(END)])
    with torch.no_grad():
        first = policy(torch.tensor([PROMPT]))[0, -1].log_softmax(-1)
        second = policy(contexts)[:, -1].log_softmax(-1)
    return torch.cat((first[END:], (first[:END, None] + second).flatten()))


class Table:
    """A scorer that knows each reply's reward."""

    def __init__(self, rewards: torch.Tensor):
        self.rewards = dict(zip(REPLIES, rewards.tolist(), strict=True))

    def scores(self, prompts, replies) -> torch.Tensor:
        return torch.tensor([self.rewards[tuple(reply)] for reply in replies])


@pytest.mark.parametrize("critic", ["separate", "shared"])
@pytest.mark.parametrize("kl_in", ["reward", "loss"])
def test_ppo_reaches_the_optimum_of_an_enumerated_bandit(critic, kl_in, updates=60, rate=1e-2):
    rewards = torch.randn(len(REPLIES), generator=torch.Generator().manual_seed(0))
    policy = Transformer(ModelConfig(**SHAPE))
    with torch.no_grad():
        for p in policy.parameters():
            p.mul_(3 if p.dim() == 2 else 1)  # far from uniform
    reference, critics = copy.deepcopy(policy), critic_from(RewardModel(RewardConfig(**SHAPE)))
    best = (log_probs(reference) + rewards / BETA).log_softmax(0)

    def distance(policy: Transformer) -> float:
        logp = log_probs(policy)
        return float((logp.exp() * (logp - best)).sum())

    actor_critic = ActorCritic(policy, critics if critic == "separate" else None)
    networks, optimizer = Networks(actor_critic, reference, END), optimizer_of(actor_critic, rate)
    o = options(batch=512, micro_batch=512, rollout_rows=512, reply_len=2, end_penalty=0.0,
                reward_norm="fixed", kl_in=kl_in)
    assert distance(reference) > .3
    for step in range(updates):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1, 2 * (1 - step / updates))
        rollout = collect_rollout(networks, [PROMPT] * o.batch, o, step=step, scorer=Table(rewards),
                                  scale=ScoreScale(), kl_coef=BETA)
        update(actor_critic, optimizer, rollout, o, step)
    assert distance(policy) < .01
