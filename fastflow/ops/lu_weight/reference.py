"""Weights of LU-parameterized 1x1 convolutions in plain PyTorch."""

import torch
from torch import Tensor

from fastflow.ops.triangular_solve.reference import Solve, triangular_solve


def _lu_factors(lower: Tensor, upper: Tensor, log_s: Tensor, sign_s: Tensor) -> tuple[Tensor, Tensor]:
    unit = torch.eye(lower.shape[-1], dtype=lower.dtype, device=lower.device)
    return lower.tril(-1) + unit, upper.triu(1) + torch.diag_embed(sign_s * torch.exp(log_s))


def lu_weight(
    perm: Tensor, lower: Tensor, upper: Tensor, log_s: Tensor, sign_s: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return lu_weight_by(triangular_solve, perm, lower, upper, log_s, sign_s)


def lu_weight_by(
    solve: Solve, perm: Tensor, lower: Tensor, upper: Tensor, log_s: Tensor, sign_s: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes :func:`lu_weight` with the triangular solver ``solve``."""
    L, U = _lu_factors(lower, upper, log_s, sign_s)
    unit = torch.eye(lower.shape[-1], dtype=lower.dtype, device=lower.device).expand_as(L)
    inverse = solve(U, solve(L, unit, False, True, False), True, False, False)
    rows = perm.unsqueeze(-1).expand_as(L)
    return (L @ U).gather(1, rows), inverse.gather(2, rows.mT).contiguous(), log_s.sum(-1)


def lu_weight_backward(
    perm: Tensor, lower: Tensor, upper: Tensor, log_s: Tensor, sign_s: Tensor, weight_inverse: Tensor,
    dweight: Tensor, dweight_inverse: Tensor, dlog_det: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients ``(dlower, dupper, dlog_s)``."""
    L, U = _lu_factors(lower, upper, log_s, sign_s)
    dweight = dweight - weight_inverse.mT @ dweight_inverse @ weight_inverse.mT
    dA = torch.zeros_like(dweight).scatter(1, perm.unsqueeze(-1).expand_as(dweight), dweight)  # W = A[perm]
    dU = L.mT @ dA
    dlog_s = dU.diagonal(dim1=-2, dim2=-1) * sign_s * torch.exp(log_s) + dlog_det.unsqueeze(-1)
    return (dA @ U.mT).tril(-1), dU.triu(1), dlog_s
