"""Whether a transform of PyTorch is active, of which layers and ops must know."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.autograd import forward_ad

_functional = False


def in_transform() -> bool:
    """Whether a transform of torch.func or forward-mode AD is active, which both see PyTorch's own ops only."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0 or _functional


@contextmanager
def functional() -> Iterator[None]:
    """Within the block, references write no tensor, as in a transform."""
    global _functional
    before, _functional = _functional, True
    try:
        yield
    finally:
        _functional = before
