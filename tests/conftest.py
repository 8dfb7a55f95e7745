"""Shared by all tests: the repository on the path, and a small made-up source of the default data
set's layout."""
import contextlib
import dataclasses
import itertools
import pathlib
import random
import signal
import sys
import types

import pytest
import torch

# Under nohup SIGHUP is ignored, by our commands too; the tests are of a terminal's.
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from data.prepare import open_data  # noqa: E402
from model import ModelConfig, Transformer, save_checkpoint  # noqa: E402
from reward import RewardConfig, RewardModel  # noqa: E402
from runtime.machine import Interrupt  # noqa: E402

torch.set_num_threads(1)  # tensors are small here: more threads only wait for one another

REPEATED = "这本书真的很好看，内容充实，我非常喜欢，推荐大家购买。"
CONTRADICTED = "酒店位置不错，离地铁站很近，就是房间有点小。"
QUOTED = "昨天刚刚收到货，包装完整无缺没有任何破损"  # 20 characters: reviews that share them must stay together


# a model's shape
TINY = dict(vocab_size=70, n_layer=2, n_head=4, n_kv_head=2, d_model=32, d_ff=48, max_len=96)


def loud(model):
    """Matrices times 8: an untrained model's distributions become peaked, so mistakes show."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(8)
    return model


def noise(*shape, seed=0):
    """Standard normal numbers that follow from the seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def logprobs_of(logits, targets):
    """log softmax(logits)[target]: logits (…, V), targets (…) -> (…)."""
    return logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]


def equal(a, b):
    """Are two nests of dicts and lists the same, tensors bit by bit?"""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def made_up_reviews(liked: bool) -> list[str]:
    """Some 400 different reviews, put together from phrases; each opens in its own way."""
    things = ["这本书", "这家酒店", "这台电脑", "房间", "屏幕", "服务员", "早餐", "故事", "键盘", "前台"]
    good, bad = "很好 不错 非常满意 让人喜欢 超出预期".split(), "太差了 很失望 不值这个价 让人生气 质量不行".split()
    good_ends = "，下次还会再来 ，推荐给大家 。值得！ ，性价比高 ，孩子也喜欢 ，物流快 ，五分 ，好评"
    bad_ends = "，不会再来了 ，大家别买 。退货！ ，浪费钱 ，孩子也不喜欢 ，客服不理人 ，一分 ，差评"
    ends = (good_ends if liked else bad_ends).split()
    phrases = itertools.product(things, good if liked else bad, ends)
    return [f"{2 * i + liked}号买家：{t}{a}{e}。" for i, (t, a, e) in enumerate(phrases)]


def write_reviews_source(folder: pathlib.Path) -> None:
    """The three files that `reviews` is made from, with repeats, contradictions and quotations in
    them."""
    (folder / "sentiment").mkdir(parents=True)
    (folder / "tag").mkdir()
    good, bad = made_up_reviews(True), made_up_reviews(False)
    rng = random.Random(0)
    # too long for a reply
    long = ["".join(chr(rng.randrange(0x4E00, 0x4F00)) for _ in range(90)) for _ in range(20)]
    said = ["很热情", "态度好", "有耐心", "回复快", "专业", "细心"]
    quoting = [f"{QUOTED}，{i}号客服{x}" for i, x in enumerate(said)]
    good += [REPEATED, REPEATED + "！！", REPEATED.replace("，", " "), CONTRADICTED, *long, *quoting]
    bad += [CONTRADICTED + "。", "", "  "]
    (folder / "sentiment" / "pos.txt").write_text("\n".join(good) + "\n", encoding="utf-8")
    (folder / "sentiment" / "neg.txt").write_text("\n".join(bad) + "\n", encoding="utf-8")
    names = ["北京", "上海", "广州", "天津", "重庆"]
    news = [f"本报/r {names[i % 5]}/ns １月/t {i % 28 + 1}日/t 讯/Ng 记者/n 从/p [国家/n 统计局/n]nt 获悉/v ，/w "
            f"今年/t 经济/n 增长/v 第{i}/m 次/q 。/w" for i in range(120)]
    (folder / "tag" / "199801.txt").write_text("\n".join(news) + "\n", encoding="utf-8")


@contextlib.contextmanager
def signals_restored():
    """A command takes signals for itself; after this block they are pytest's again."""
    handlers = {number: signal.getsignal(number)
                for number in (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM))}
    try:
        yield
    finally:
        Interrupt.number, Interrupt.stepping = 0, False
        for number, handler in handlers.items():
            signal.signal(number, handler)


@pytest.fixture(autouse=True)
def signals_restored_after_each_test():
    """Fixtures of a wider scope are set up before this one: they need a block of their own."""
    with signals_restored():
        yield


@pytest.fixture(scope="session")
def reviews_source(tmp_path_factory) -> pathlib.Path:
    """A folder with the made-up source."""
    folder = tmp_path_factory.mktemp("source")
    write_reviews_source(folder)
    return folder


@pytest.fixture(scope="session")
def world(reviews_source, tmp_path_factory):
    """A prepared data set, and tiny untrained parents for every stage."""
    data = open_data("reviews", source=str(reviews_source), vocab_size=500,
                     cache=tmp_path_factory.mktemp("cache"))
    root = tmp_path_factory.mktemp("parents")
    lm = Transformer(ModelConfig(vocab_size=500, n_layer=1, n_head=2, n_kv_head=1, d_model=32,
                                 d_ff=32, max_len=128))
    judge = RewardModel(RewardConfig(**dataclasses.asdict(lm.config)))
    loud(lm)
    loud(judge.backbone)
    for stage, net in (("pretrain", lm), ("sft", lm), ("reward", judge)):
        save_checkpoint(root / stage, net, data.tokenizer, stage=stage, step=1, feedback="label",
                        template=data.template)
    return types.SimpleNamespace(data=data, root=root)


@pytest.fixture
def command(world, tmp_path, monkeypatch):
    """command(stage, *words) parses the options of a stage on the small world."""
    import train
    from runtime.options import parse
    monkeypatch.setattr("data.prepare.open_data", lambda *_, **__: world.data)

    def parsed(stage, *words):
        given = {"sft": ["--init_from", world.root / "pretrain"],
                 "reward": ["--init_from", world.root / "sft"],
                 "judge": ["--init_from", world.root / "pretrain"],
                 "ppo": ["--init_from", world.root / "sft", "--reward_from",
                         world.root / "reward"]}.get(stage, [])
        return parse(train.commands()[stage][0], [*map(str, ["--preset=smoke", "--dtype=float32",
                                                         "--out", tmp_path,
                                                             *given, *words])], "x")
    return parsed
