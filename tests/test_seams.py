"""Change one idea: a loss, an estimator, a reward, a data set. Each
is a few lines and touches no file of the project."""
import pytest
import torch

import train
from data.tokenizer import train_bpe
from data.dataset import DataSet, DataWriter
from data.sets import DATA_SETS, register
from model import load_checkpoint, open_run
from ppo import PPOTrainer
from reward import PythonReward, RewardModel


@pytest.fixture
def trainer_of(command, world):
    def made(*words, **seams) -> PPOTrainer:
        o = command("ppo", "--reward_norm=fixed", "--critic_warmup=0", "--policy_lr=.003",
                    "--fresh", *words)
        policy, tokenizer, _ = load_checkpoint(world.root / "sft")
        reward_model, _, _ = load_checkpoint(world.root / "reward", cls=RewardModel)
        run = open_run("ppo", o, world.data, {}, policy, tokenizer)
        return PPOTrainer(run, policy, reward_model, world.data, **seams)
    return made


def test_a_loss_of_ones_own(trainer_of):
    def reinforce(batch, new, o):
        """Plain policy gradient, −A log π, and an unclipped value loss."""
        policy_loss = batch.mean(-batch.advantages * new.logprobs)
        value_loss = batch.mean((new.values - batch.returns) ** 2)
        return policy_loss + value_loss, {"policy_loss": (policy_loss, batch.policy_tokens),
                                          "mse": (value_loss, batch.n_tokens)}

    trainer = trainer_of("--epochs=1", "--minibatches=1", loss=reinforce)
    before = trainer.run.model.embedding.weight.detach().clone()
    logged = [trainer.update(step) for step in range(3)]
    assert logged[-1]["mse"] < logged[0]["mse"]
    assert "value_loss" not in logged[0]
    assert logged[0]["ratio_start"] < 1e-5
    assert not torch.equal(trainer.run.model.embedding.weight, before)


def test_rloo_as_an_estimator(trainer_of):
    def rloo(scored, o):
        """Each reply's reward minus the mean of the others that answer the same prompt (Ahmadian
        2024)."""
        k, total = o.samples_per_prompt, scored.rewards.sum(1)
        mean = torch.zeros(len(total)).index_add(0, scored.group, total)[scored.group] / k
        advantages = ((total - mean) * k / (k - 1))[:, None] * scored.response_mask
        return advantages, scored.rewards.flip(1).cumsum(1).flip(1)

    collected, seen = {}, lambda scored, o: collected.update(scored=scored) or rloo(scored, o)
    trainer = trainer_of("--samples_per_prompt=4", estimator=seen)
    assert trainer.update(0)["reply_tokens"] > 0
    total = collected["scored"].rewards.sum(1)
    advantages, _ = rloo(collected["scored"], trainer.o)
    assert collected["scored"].group.tolist() == [0] * 4 + [1] * 4
    assert float(advantages[0, 0]) == pytest.approx(float(total[0] - total[1:4].mean()), abs=1e-5)
    assert float(advantages[4:, 0].sum()) == pytest.approx(0, abs=1e-5)


def test_a_reward_in_python(trainer_of, world):
    def praise(prompts, replies):
        return [float(sum(reply.count(word) for word in "很不好满意推荐")) for reply in replies]

    trainer = trainer_of("--batch=32", "--rollout_rows=32", "--kl_coef=0", "--end_penalty=0",
                         "--policy_lr=.01", "--updates=12", "--eval_prompts=32",
                         scorer=PythonReward(praise, world.data.tokenizer))
    before = trainer.measure(0)["eval_raw_score"]
    for step in range(12):
        trainer.update(step)
    assert trainer.measure(12)["eval_raw_score"] > 1.5 * before


@pytest.fixture
def toy_set():
    name = "toy"
    yield name
    DATA_SETS.pop(name, None)


def test_a_data_set_of_ones_own(toy_set, tmp_path, monkeypatch):
    def build(folder, files, vocab_size):
        tokenizer = train_bpe(["one two three four"] * 9, vocab_size)
        out = DataWriter(folder, tokenizer)
        for split in ("train", "val", "test"):
            texts = [f"{split} one two three {i}" for i in range(60)]
            out.documents(split, [("text", [tokenizer.eot_id, *tokenizer.encode(t)])
                                  for t in texts], sum(map(len, texts)))
            out.records("sft", split, [{"prompt": f"one {i}", "response": f"two {i}"}
                                       for i in range(60)])
            out.records("ppo", split, [{"prompt": f"one {i}"} for i in range(60)])
        return out

    register(DataSet(toy_set, source=None, build=build, template="Count on: {prompt}",
                     options=("vocab_size",)))
    monkeypatch.setattr("data.prepare.CACHE", tmp_path / "cache")
    words = [f"--data={toy_set}", "--preset=smoke", "--vocab_size=270", "--tokens=2000",
             f"--out={tmp_path}"]
    assert train.main(["pretrain", *words]) == 0
    assert train.main(["sft", *words[:3], words[4]]) == 0
    assert (tmp_path / toy_set / "sft" / "checkpoint.pt").exists()
