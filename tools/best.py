"""The fourth step, `python train.py best`: rejection sampling. A policy replies n times to each prompt,
the reward model chooses, and the policy learns what was chosen as `sft` learns the replies of people."""
import copy
import dataclasses
from typing import ClassVar

import evaluate
from data.batches import held_out_prompts
from data.drawn import best_records, scores_of
from data.parents import limit_length, refuse_judge
from data.prepare import open_stage, recounted, suited
from data.prepared import Prepared
from model import load_parent, open_run
from ppo import PPOOptions
from reward import RewardModel, room_for_prompt
from runtime.fit import fit
from runtime.options import build, option
from runtime.products import use_products
from runtime.run import Run
from runtime.terminal import memory_advice
from train import SFTOptions, SFTTask


@dataclasses.dataclass
class BestOptions(SFTOptions):
    """`python train.py best`"""

    PRESETS: ClassVar = {  # what differs from the defaults, which are the preset `demo`
        "smoke": dict(n=4, prompts=64, reply_len=16),
        "real": dict(temperature=0.7),
        "smollm": dict(init_from="", records=0, prompts=400),
    }

    n: int = option(8, "replies to each prompt; the reward model's favourite is learned", low=2, high=10_000)
    prompts: int = option(2000, "training prompts to reply to, at most; the seed draws them", low=20, high=10**8)
    reply_len: int = option(0, "longest reply in tokens; 0: PPO's default on this data", low=0)
    temperature: float = option(1.0, "of sampling", low=0.001, high=100)


class BestTask(SFTTask):
    """Batches, loss and measures of `best`: those of fine-tuning, on a tenth of the replies that the
    reward model chose as validation, and PPO's measures of held-out prompts."""

    NOTHING = ("too few prompts got a reply that ends, or too few of them within {} tokens with it: raise "
               "--reply_len, --prompts or --max_len")

    def __init__(self, run: Run, data: Prepared, records: list[dict], held_out: evaluate.HeldOutPrompts):
        super().__init__(run, data, [[r for i, r in enumerate(records) if (i % 10 == 0) == val]
                                     for val in (False, True)])
        self.held_out, self.reply_len, self.examples = held_out, run.o.reply_len, list(held_out.prompts[:8])
        self.extra = {"example_prompts": self.examples}

    def measure(self, step: int) -> dict[str, float]:
        """SFT's measures, and scores, KL and variety of replies to held-out prompts."""
        return super().measure(step) | self.held_out.measure(self.run.model)[0]


@memory_advice("lower --batch, --max_len or --reply_len, or add --recompute")
def best(o: BestOptions) -> Run | None:
    """Reply n times to each prompt, keep the reply that the reward model scores highest, and learn
    it as sft learns the replies of dialogues (rejection sampling: MOSS's fourth step)."""
    refuse_judge(o.reward_from)
    data, o = open_stage(o, "sft")
    policy, tokenizer, state = load_parent(o, data, "sft", o.init_from)
    if not o.reply_len:
        of_ppo = suited(build(PPOOptions, {"data": o.data, "preset": o.preset}), "ppo", data)
        o = o.replace(reply_len=recounted(of_ppo, "ppo", data, tokenizer).reply_len)
    scorer, other, of_reward = load_parent(o, data, "reward", o.reward_from, RewardModel)
    tokenizer.require_same(other, "the policy and the reward model")
    o = limit_length(o, policy.config)
    reference = copy.deepcopy(policy)
    run = open_run("best", o, data, {"init": state["hash"], "reward": of_reward["hash"]}, policy, tokenizer)
    if run is None:
        return None
    for network in (reference.requires_grad_(False), scorer.requires_grad_(False)):
        use_products(network.to(run.device), run.compute.products)
    room = min(policy.config.max_len - o.reply_len, room_for_prompt(o.reply_len, scorer, of_reward))
    records = best_records(run, data, room, lambda prompts, first: evaluate.best_of_prompts(
        run, reference, scorer, prompts, first))
    kept = [r for r in records if r["ended"]]
    held_out = evaluate.HeldOutPrompts(
        data, tokenizer, held_out_prompts(data, "val", tokenizer, room, 128), reference, scorer,
        evaluate.ReplySettings(o.reply_len, o.temperature, dtype=run.dtype))
    task = BestTask(run, data, kept, held_out)
    print(f"best: {o.n} replies to each of {scores_of(records, kept)}, {task.left_out} dialogues of over "
          f"{o.max_len} tokens left out; {task.n_steps} steps of {o.batch}", flush=True)
    run.finish(**fit(run, task))
    return run
