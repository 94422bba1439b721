"""Random inputs of ``lu_weight`` and ``triangular_solve``."""

import torch
from torch import Tensor


def lu_inputs(k: int, c: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """perm, lower, upper, log_s and sign_s. Both matrices are full: only their strict triangles may be read."""
    perm = torch.stack([torch.randperm(c) for _ in range(k)]) if k else torch.empty(0, c, dtype=torch.int64)
    lower, upper = torch.randn(k, c, c) / c, torch.randn(k, c, c) / c
    log_s, sign_s = 0.3 * torch.randn(k, c), torch.randn(k, c).sign()
    return perm, *(v.to(dtype) for v in (lower, upper, log_s, sign_s))


def triangular_inputs(k: int, n: int, m: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """A and B of ``k`` systems of ``n`` equations with ``m`` right-hand sides. A is full."""
    A = torch.randn(k, n, n) / max(n, 1) + 2 * torch.eye(n)
    return A.to(dtype), torch.randn(k, n, m).to(dtype)
