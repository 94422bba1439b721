"""Log-determinants of layers that preserve volume."""

import torch
from torch import Tensor


def zero_log_det(x: Tensor) -> Tensor:
    """Zeros ``[N]`` for a batch x ``[N, ...]``: float64 for float64 x, float32 for every other dtype."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return torch.zeros(x.shape[0], dtype=dtype, device=x.device)
