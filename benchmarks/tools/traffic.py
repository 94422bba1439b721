"""Counts the operators that run below autograd, FastFlow's included, and the bytes that they move."""

import math
from collections import Counter

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

OVERWRITE = ("aten::copy_", "aten::fill_", "aten::zero_")  # they do not read what they change


def tensors(of) -> list[Tensor]:
    return [v for v in tree_leaves(of) if isinstance(v, Tensor)]


def size(moved: list[Tensor]) -> int:
    """Bytes of the tensors. One that occurs twice counts once; an expanded one counts as before expansion."""
    parts = {
        (v.data_ptr(), v.dtype, *((n, step) for n, step in zip(v.shape, v.stride(), strict=True) if step))
        for v in moved
    }
    return sum(dtype.itemsize * math.prod(n for n, _ in dimensions) for _, dtype, *dimensions in parts)


def without_underscore(name: str) -> str:
    """The name without an in-place operator's underscore.

    Autograd adds gradients in place, but not under a dispatch mode.
    """
    return name.removesuffix("_")


class Traffic(TorchDispatchMode):
    """Counts calls and bytes of operators, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.bytes = Counter(), Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name, moved = func._schema.name, self.moved(func._schema, args, kwargs, result)
        if moved:
            self.calls[without_underscore(name)] += 1
            self.bytes[without_underscore(name)] += moved
        return result

    @staticmethod
    def moved(schema, args, kwargs, result) -> int:
        given = dict(zip((a.name for a in schema.arguments), args, strict=False)) | kwargs
        changed = {
            a.name for a in schema.arguments if a.name in given and a.alias_info and a.alias_info.is_write
        }
        unread = {
            a.name for a in schema.arguments if a.name in changed and (a.is_out or schema.name in OVERWRITE)
        }
        storages = {v.untyped_storage().data_ptr() for v in tensors(given)}
        made = [v for v in tensors(result) if v.untyped_storage().data_ptr() not in storages]
        is_view = tensors(result) and not made and not changed
        if is_view or schema.name.startswith(("aten::empty", "aten::new_empty")):
            return 0
        read = tensors([v for name, v in given.items() if name not in unread])
        return size(read) + size(made + tensors([given[name] for name in changed]))
