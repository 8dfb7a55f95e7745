"""Every stage on a device that is not the CPU, where there is none: a stand-in that complains where a GPU would.

Its tensors say that they are on `cuda`; behind each stands one on the CPU, which does the work. An operation between
the two kinds fails as it does on a GPU, and so does reading one as a NumPy array. Not shown by this: the GPU's own
kernels, torch.compile and autocast there; those are for test_cuda.py.
"""
import json

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import train
from model import ModelConfig, Transformer
from runtime.options import UserError
from sample import Decoder, generate

MOVES = ("copy_", "_to_copy")
INDEXED = ("index", "index_put", "index_put_", "_index_put_impl_")  # a GPU's tensor takes indices of either kind


class There(torch.Tensor):
    """A tensor of the stand-in device. To PyTorch it is one of `meta`, the device that has no memory."""

    @staticmethod
    def __new__(cls, inner):
        there = torch.Tensor._make_wrapper_subclass(cls, inner.shape, strides=inner.stride(), dtype=inner.dtype,
                                                    storage_offset=inner.storage_offset(), device="meta")
        there.inner = inner
        return there

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function == torch.Tensor.device.__get__:
            return torch.device("cuda", 0)
        if function is torch.Tensor.numpy:
            raise TypeError("can't convert a tensor of cuda to numpy")
        if function in (torch.Tensor.cpu, torch.Tensor.tolist):
            here = args[0].to("cpu")
            return here if function is torch.Tensor.cpu else here.tolist()
        if function in (torch.Tensor.__getitem__, torch.Tensor.__setitem__):  # a list would be put on `meta`, and lost
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            args = (args[0], tuple(torch.tensor(i) if isinstance(i, list) else i for i in index), *args[2:])
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return computed(function, args, kwargs or {})


def computed(function, args, kwargs):
    """Do on the CPU what was asked for, if a GPU would do it, and say that the result is where it would be."""
    name = function.overloadpacket.__name__
    there, here = [], []
    for x in tree_leaves((args, kwargs)):
        if isinstance(x, torch.Tensor):
            (there if isinstance(x, There) else here).append(x)
    if there and any(x.dim() for x in here) and name not in MOVES:  # a CPU's tensor without dimensions is a number
        of_values = [args[0], *args[2:3]] if name in INDEXED else []
        if not of_values or not all(isinstance(x, There) for x in of_values if x.dim()):
            raise RuntimeError(f"{name}: expected all tensors to be on the same device")
    known = {id(x.inner): x for x in there}
    args, kwargs = tree_map(lambda x: x.inner if isinstance(x, There) else x, (args, dict(kwargs)))
    is_there = bool(there)
    if kwargs.get("device") is not None:
        is_there, kwargs["device"] = torch.device(kwargs["device"]).type == "meta", torch.device("cpu")
    out = function(*args, **kwargs)
    if not is_there or name == "_local_scalar_dense":
        return out
    return tree_map(lambda x: known.get(id(x), There(x)) if isinstance(x, torch.Tensor) else x, out)


class Factories(TorchDispatchMode):
    """Tensors made without any other."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return computed(function, args, kwargs or {})


class Named(TorchFunctionMode):
    """Where `cuda` is asked for, ask for the stand-in."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        def other(x):
            return torch.device("meta") if isinstance(x, str | torch.device) and str(x).startswith("cuda") else x

        kwargs = {k: other(x) if k == "device" else x for k, x in (kwargs or {}).items()}
        args = [*map(other, args)] if function is not torch.device else args
        if function is torch.tensor and "device" in kwargs:  # would have no data
            device = kwargs.pop("device")
            return function(*args, **kwargs).to(device)
        if args and isinstance(args[0], There):
            return There.__torch_function__(function, types, args, kwargs)
        return function(*args, **kwargs)


@pytest.fixture
def stand_in(monkeypatch):
    save = torch.save
    monkeypatch.setattr(torch, "save", lambda x, file: save(tree_map(
        lambda t: t.inner.clone() if isinstance(t, There) else t, x), file))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with Factories(), Named():
        yield


def test_the_stand_in_complains_where_a_gpu_would(stand_in):
    here, there = torch.ones(3), torch.arange(3.0, device="cuda")
    assert there.device.type == "cuda" and here.device.type == "cpu"
    assert there[torch.tensor([2])].tolist() == [2.0] and (there * torch.tensor(2)).cpu().tolist() == [0.0, 2.0, 4.0]
    there[[2, 0]] = -1.0
    assert there.tolist() == [-1.0, 1.0, -1.0]
    for mixed in (lambda: here + there, lambda: here[there.long()], lambda: there.gather(0, torch.tensor([1])),
                  lambda: torch.cat((here, there)), lambda: here.add_(there),
                  lambda: there.index_put((here.long(),), here)):
        with pytest.raises(RuntimeError):
            mixed()
    with pytest.raises(TypeError):
        there.numpy()


PPO = [[], ["--critic=shared", "--kl_control=adaptive", "--entropy_coef=.01", "--max_approx_kl=.01",
            "--reward_norm=running", "--recompute=true"]]


@pytest.mark.parametrize("stage,words", [("pretrain", []), ("sft", []), ("reward", []), *(("ppo", w) for w in PPO)])
def test_a_stage_computes_the_same_on_another_device(command, stand_in, tmp_path, stage, words):
    found = {}
    for device in ("cpu", "cuda"):
        run = train.STAGE_FUNCTIONS[stage](command(stage, *words, f"--device={device}", f"--out={tmp_path / device}"))
        lines = map(json.loads, (run.folder / "metrics.jsonl").read_text().splitlines())
        found[device] = [{k: v for k, v in line.items() if "seconds" not in k and not k.endswith("_per_s")}
                         for line in lines]
    for here, there in zip(found["cpu"], found["cuda"], strict=True):
        assert there == pytest.approx(here, rel=.02, abs=.02)  # norms and products may be rounded in another way


def test_replies_are_the_same_on_another_device(stand_in):
    model = Transformer(ModelConfig(vocab_size=60, n_layer=1, n_head=2, n_kv_head=1, d_model=16, d_ff=16, max_len=48))
    tokens = torch.randint(1, 60, (5, 7))
    mask = torch.arange(7) >= torch.tensor([0, 3, 1, 6, 0])[:, None]
    settings = dict(seed=3, end_id=7, batch_size=2, top_k=9, top_p=.9, repetition_penalty=1.2, suppress=[4])
    here = generate(model, tokens, mask, 20, **settings)
    model, tokens, mask = model.to("cuda"), tokens.to("cuda"), mask.to("cuda")
    there = generate(model, tokens, mask, 20, **settings)
    assert there.tokens.device.type == "cuda" and torch.equal(there.tokens.cpu(), here.tokens)
    with pytest.raises(UserError, match="int8"):
        Decoder(model, "int8")
