"""PPO reaches the optimum where it is known: with replies that can be enumerated, the best policy at
a price β of KL is π* = π_ref · exp(r / β) / Z (Ziegler 2019, eq. 2)."""
import copy

import pytest
import torch

from data.rewards import RewardSum, read_reward
from model import ModelConfig, Transformer
from ppo import (ActorCritic, Networks, ScoreScale, collect_rollout, gae_estimator, group_estimator,
                 update)
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


class Letters:
    """Stands in for a tokenizer: ids 0 to 6 are letters, 7 is the end."""

    end_ids, decode = (END,), staticmethod(lambda ids: "".join("abcdefg"[i] for i in ids if i != END))
    reply_text = decode


FUNCTIONS = """import re
def count(prompts, replies): return [float(reply.count("c")) for reply in replies]
def pattern(prompts, replies): return [bool(re.fullmatch("[a-d]e?", reply)) for reply in replies]
"""


def test_a_reward_in_python_reaches_its_optimum_alone_and_composed(tmp_path):
    """The exact count of a wanted letter; then with a pattern and a price of length, each in its own
    units: π* = π_ref · exp(r / β) for the sum as it stands."""
    (tmp_path / "my.py").write_text(FUNCTIONS)
    file = tmp_path / "my.py"
    for text in (f"{file}:count:3", f"{file}:count:.7,length:-.8,{file}:pattern:2"):
        scorer = RewardSum(read_reward(text), None, Letters, options(reward_norm="fixed"))
        rewards = scorer.scores([PROMPT] * len(REPLIES), [list(reply) for reply in REPLIES])
        assert float(rewards.std()) > .3
        assert learned(scorer, rewards) < .01


@pytest.mark.parametrize("advantage", ["rloo", "grpo", "reinforce"])
def test_estimators_without_a_critic_find_the_optimum_too(advantage):
    """But for grpo, whose division by each group's spread changes what is best."""
    rewards = torch.randn(len(REPLIES), generator=torch.Generator().manual_seed(0))
    off = learned(Table(rewards), rewards, "shared", advantage=advantage, samples_per_prompt=4, value_coef=0.0,
                  whiten=advantage != "grpo")
    assert off < (.1 if advantage == "grpo" else .01)


@pytest.mark.parametrize(("critic", "kl_in"), [("separate", "reward"), ("shared", "loss")])
def test_ppo_reaches_the_optimum_of_an_enumerated_bandit(critic, kl_in):
    rewards = torch.randn(len(REPLIES), generator=torch.Generator().manual_seed(0))
    assert learned(Table(rewards), rewards, critic, kl_in=kl_in) < .01


def learned(scorer, rewards: torch.Tensor, critic: str = "separate", updates: int = 60, rate: float = 1e-2,
            **changes) -> float:
    """How far, in nats, PPO on this scorer ends from the best policy for these rewards (57,)."""
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
                reward_norm="fixed", **changes)
    assert distance(reference) > .3
    for step in range(updates):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1, 2 * (1 - step / updates))
        rollout = collect_rollout(networks, [PROMPT] * (o.batch // o.samples_per_prompt), o, step=step,
                                  scorer=scorer, scale=ScoreScale(), kl_coef=BETA,
                                  estimator=gae_estimator if o.advantage == "gae" else group_estimator)
        update(actor_critic, optimizer, rollout, o, step)
    return distance(policy)
