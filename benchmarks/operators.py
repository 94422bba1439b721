"""Which operators run, below autograd, and how many bytes their tensors have."""

from collections import Counter

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ALLOCATIONS = {"aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty", "aten::new_empty_strided"}


class Operators(TorchDispatchMode):
    """Counts ``calls`` and ``bytes`` by an operator's name while it is entered, backward included; views and allocations aside.

    Bytes: each tensor argument read once and each result written once, a tensor that is written in place both. The traffic of a kernel
    that reads twice, or that has scratch memory, is more; that of one that finds its inputs in a cache less.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func._schema.name
        if not func.is_view and name not in ALLOCATIONS:
            self.calls[name] += 1
            self.bytes[name] += sum(v.numel() * v.itemsize for v in tree_leaves((args, kwargs, out)) if isinstance(v, Tensor))
        return out


def operators(call) -> Operators:
    with Operators() as found, torch.autograd.set_multithreading_enabled(False):
        call()
    return found
