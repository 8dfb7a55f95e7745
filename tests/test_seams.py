"""Change one idea: a loss, an estimator, a reward, a data set. Each is a few lines and touches no
file of the project."""
import pytest
import torch

import train
from data.dataset import DataSet, DataWriter
from data.sets import DATA_SETS, register
from data.tokenizer import train_bpe
from model import weights_hash
from ppo import train_ppo
from reward import PythonReward
from runtime.machine import Interrupted
from runtime.options import UserError
from runtime.run import Run
from tests.ppo_world import make_trainer


@pytest.fixture
def trainer_of(command, world):
    """trainer_of(*words, **seams): a trainer whose policy learns from its first update on."""
    def made(*words, **seams):
        o = command("ppo", "--reward_norm=fixed", "--critic_warmup=0", "--policy_lr=.01",
                    "--batch=32", "--rollout_rows=32", "--updates=12", "--kl_coef=0",
                    "--end_penalty=0", "--eval_prompts=32", "--fresh", *words)
        return make_trainer(o, world, **seams)
    return made


def praise(prompts, replies):
    """A reward in Python: how many characters of praise a reply has."""
    return [float(sum(reply.count(word) for word in "很不好满意推荐")) for reply in replies]


def gain(trainer) -> float:
    """How many times as high held-out replies score after twelve updates as before."""
    before = trainer.measure(0)["eval_raw_score"]
    for step in range(12):
        trainer.update(step)
    return trainer.measure(12)["eval_raw_score"] / before


def test_a_loss_of_ones_own(trainer_of, world):
    def reinforce(batch, new, o):
        """Plain policy gradient, −A log π, and an unclipped value loss."""
        policy_loss = batch.mean(-batch.advantages * new.logprobs)
        value_loss = batch.mean((new.values - batch.returns) ** 2)
        return policy_loss + value_loss, {"policy_loss": (policy_loss, batch.policy_tokens),
                                          "mse": (value_loss, batch.n_tokens)}

    trainer = trainer_of("--epochs=1", "--minibatches=1", "--policy_lr=.03", loss=reinforce,
                         scorer=PythonReward(praise, world.data.tokenizer))
    assert gain(trainer) > 1.5
    logged = trainer.update(12)
    assert "mse" in logged
    assert "value_loss" not in logged
    assert logged["ratio_start"] < 1e-4


def rloo(scored, o):
    """Each reply's reward minus the mean of the others that answer the same prompt (Ahmadian
    2024)."""
    k, total = o.samples_per_prompt, scored.rewards.sum(1)
    mean = torch.zeros(len(total)).index_add(0, scored.group, total)[scored.group] / k
    advantages = ((total - mean) * k / (k - 1))[:, None] * scored.response_mask
    return advantages, scored.rewards.flip(1).cumsum(1).flip(1)


def test_rloo_as_an_estimator(trainer_of):
    seen = []
    trainer = trainer_of("--batch=8", "--samples_per_prompt=4", "--kl_coef=.1",
                         estimator=lambda scored, o: seen.append(scored) or rloo(scored, o))
    trainer.update(0)
    scored, total = seen[0], seen[0].rewards.sum(1)
    advantages, _ = rloo(scored, trainer.o)
    assert scored.group.tolist() == [0] * 4 + [1] * 4
    assert float(advantages[0, 0]) == pytest.approx(float(total[0] - total[1:4].mean()), abs=1e-5)
    assert float(advantages[7, 0]) == pytest.approx(float(total[7] - total[4:7].mean()), abs=1e-5)
    for group in (advantages[:4, 0], advantages[4:, 0]):  # every reply has a first token
        assert float(group.sum()) == pytest.approx(0, abs=1e-5)


def test_rloo_learns(trainer_of, world):
    trainer = trainer_of("--samples_per_prompt=4", estimator=rloo,
                         scorer=PythonReward(praise, world.data.tokenizer))
    assert gain(trainer) > 1.5


def test_a_reward_in_python(trainer_of, world):
    assert gain(trainer_of(scorer=PythonReward(praise, world.data.tokenizer))) > 1.5


def test_the_stage_runs_with_a_changed_idea_and_resumes(command, world, monkeypatch):
    def run(*words):
        o = command("ppo", "--updates=3", "--samples_per_prompt=4", *words)
        return train_ppo(o, estimator=rloo, scorer=PythonReward(praise, world.data.tokenizer))

    def interrupt(self, step, save):
        if step == 2:
            raise Interrupted(15)

    uninterrupted = run()
    expected = weights_hash(uninterrupted.model)
    assert uninterrupted.o.reward_norm == "fixed"  # though the reward model learned from labels
    with monkeypatch.context() as m:
        m.setattr(Run, "stop_if_asked", interrupt)
        with pytest.raises(Interrupted):
            run("--fresh")
    assert weights_hash(run("--resume").model) == expected


def test_log_odds_are_not_read_from_a_reward_in_python(command, world):
    with pytest.raises(UserError, match="reads raw scores as log-odds"):
        train_ppo(command("ppo", "--reward_norm=sigmoid"),
                  scorer=PythonReward(praise, world.data.tokenizer))


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
