"""What the faster layers of several libraries share."""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastflow.nn.networks.masked_network import _computed_once, _Kept

# not in the modules, whose attributes are those of the library
_KEPT: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def value_of(module: nn.Module, name: str, compute: Callable, *args: object) -> Any:
    """``compute(tensor, *args)`` of a buffer or parameter of a module, computed again when the tensor changes."""
    tensor = getattr(module, name)
    kept = _KEPT.setdefault(module, {}).setdefault((name, compute), _Kept()).kept([tensor])
    if kept is None:
        return compute(tensor, *args)
    return _computed_once(kept, "value", lambda: compute(tensor, *args))


def is_plain(*tensors: Tensor) -> bool:
    """Whether all are float32 or all are float64, without autocast."""
    first = tensors[0]
    if first.dtype not in (torch.float32, torch.float64) or any(t.dtype != first.dtype for t in tensors):
        return False
    kind = first.device.type
    return not (torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind))


def pays_for_small_ops(z: Tensor) -> bool:
    """Whether fewer launches gain time; on a CPU a few operators take no more time than the call of an op."""
    return z.device.type != "cpu"
