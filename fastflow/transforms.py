"""Whether a transform of PyTorch is active, of which layers and ops must know."""

import torch
from torch.autograd import forward_ad


def in_transform() -> bool:
    """Whether a transform of torch.func or forward-mode AD is active, which both see PyTorch's own ops only."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
