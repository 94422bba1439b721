"""What the faster layers of several libraries share."""

import torch
from torch import Tensor


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
