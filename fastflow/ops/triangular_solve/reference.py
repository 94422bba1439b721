"""Batched triangular solve in plain PyTorch."""

from collections.abc import Callable

import torch
from torch import Tensor

# triangular_solve, or another function with its arguments
Solve = Callable[[Tensor, Tensor, bool, bool, bool], Tensor]


def triangular_solve(A: Tensor, B: Tensor, upper: bool, unit_diagonal: bool, transpose: bool) -> Tensor:
    left, upper = (A.mT, not upper) if transpose else (A, upper)
    return torch.linalg.solve_triangular(left, B, upper=upper, unitriangular=unit_diagonal).contiguous()


def triangular_solve_backward(
    A: Tensor, X: Tensor, dX: Tensor, upper: bool, unit_diagonal: bool, transpose: bool
) -> tuple[Tensor, Tensor]:
    """Gradients ``(dA, dB)``."""
    return triangular_solve_backward_by(triangular_solve, A, X, dX, upper, unit_diagonal, transpose)


def triangular_solve_backward_by(
    solve: Solve, A: Tensor, X: Tensor, dX: Tensor, upper: bool, unit_diagonal: bool, transpose: bool
) -> tuple[Tensor, Tensor]:
    dB = solve(A, dX, upper, unit_diagonal, not transpose)
    dA = -(X @ dB.mT if transpose else dB @ X.mT)
    diagonal = 1 if unit_diagonal else 0
    return (dA.triu(diagonal) if upper else dA.tril(-diagonal)), dB
