"""A device that is not there: a stand-in for a GPU that complains where a GPU would.

Its tensors say that they are on `cuda`; behind each stands one on the CPU, which does the work. An
operation between the two kinds fails as it does on a GPU, and so does reading one as a NumPy array.
Not shown by this: the GPU's own kernels, torch.compile and autocast there; those are for
test_cuda.py.
"""
import contextlib

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

MOVES = ("copy_", "_to_copy")
# a GPU's tensor takes indices of either kind
INDEXED = ("index", "index_put", "index_put_", "_index_put_impl_")


class There(torch.Tensor):
    """A tensor of the stand-in device. To PyTorch it is one of `meta`, the device that has no
    memory."""

    @staticmethod
    def __new__(cls, inner):
        there = torch.Tensor._make_wrapper_subclass(cls, inner.shape, strides=inner.stride(),
                                                    dtype=inner.dtype,
                                                    storage_offset=inner.storage_offset(),
                                                    device="meta")
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
        # a list would be put on `meta`, and lost
        if function in (torch.Tensor.__getitem__, torch.Tensor.__setitem__):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            args = (args[0], tuple(torch.tensor(i) if isinstance(i, list) else i for i in index),
                    *args[2:])
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return computed(function, args, kwargs or {})


def computed(function, args, kwargs):
    """Do on the CPU what was asked for, if a GPU would do it, and say that the result is where it
    would be."""
    name = function.overloadpacket.__name__
    there, here = [], []
    for x in tree_leaves((args, kwargs)):
        if isinstance(x, torch.Tensor):
            (there if isinstance(x, There) else here).append(x)
    # a CPU's tensor without dimensions is a number
    if there and any(x.dim() for x in here) and name not in MOVES:
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
            return torch.device("meta") if isinstance(x, str
                                                      | torch.device) and str(x).startswith("cuda") else x

        kwargs = {k: other(x) if k == "device" else x for k, x in (kwargs or {}).items()}
        args = [*map(other, args)] if function is not torch.device else args
        if function is torch.tensor and "device" in kwargs:  # would have no data
            device = kwargs.pop("device")
            return function(*args, **kwargs).to(device)
        if args and isinstance(args[0], There):
            return There.__torch_function__(function, types, args, kwargs)
        return function(*args, **kwargs)


@contextlib.contextmanager
def stand_in_device(monkeypatch):
    """Inside, `cuda` is the stand-in; what is saved is saved from the CPU's tensors."""
    save = torch.save
    monkeypatch.setattr(torch, "save", lambda x, file: save(tree_map(
        lambda t: t.inner.clone() if isinstance(t, There) else t, x), file))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    # From torch 2.14 on an optimizer asks it whether a graph is being captured.
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda *_, **__: None)
    with Factories(), Named():
        yield
