"""fastflow::triangular_solve, for a stack of matrices."""

import torch
from torch import Tensor

from fastflow import validation
from fastflow.ops import dispatch
from fastflow.ops.registry import register
from fastflow.ops.triangular_solve import reference


def _check(argument: str, A: Tensor, B: Tensor) -> None:
    if A.ndim != 3 or A.shape[1] != A.shape[2]:
        raise validation.argument_error("A", validation.shape_of(A), "a stack of square matrices [K, n, n]")
    if A.dtype not in (torch.float32, torch.float64):
        raise validation.argument_error("A", f"dtype {A.dtype}", "float32 or float64")
    if B.ndim != 3 or B.shape[:2] != A.shape[:2]:
        raise validation.argument_error("B", validation.shape_of(B), f"[{A.shape[0]}, {A.shape[1]}, m]")
    if B.dtype != A.dtype or B.device != A.device:
        raise validation.argument_error("B", f"{B.dtype} on {B.device}", f"{A.dtype} on {A.device}, like A")


def _checking_values(A, B, upper, unit_diagonal, transpose):
    if not unit_diagonal and B.numel():
        validation.diagonal("triangular_solve", A.diagonal(dim1=1, dim2=2))
    return reference.triangular_solve(A, B, upper, unit_diagonal, transpose)


def _backward(A, X, dX, upper, unit_diagonal, transpose):
    return reference.triangular_solve_backward_by(_solve, A, X, dX, upper, unit_diagonal, transpose)


register(reference.triangular_solve_backward, fallback=_backward)
_solve = register(
    reference.triangular_solve,
    check=_check,
    compiled=("cpu", "cuda"),
    fallback=_checking_values,
    outputs="X",
    backward=reference.triangular_solve_backward,
    gradients="A B",
    batched="A B",
)


def triangular_solve(
    A: Tensor, B: Tensor, *, upper: bool, unit_diagonal: bool = False, transpose: bool = False
) -> Tensor:
    r"""Solves :math:`A X = B` (:math:`A^T X = B` with ``transpose``) for a stack of triangular matrices.

    Args:
        A: triangular matrices.
        B: right-hand sides.
        upper: read the upper triangle of A instead of the lower one; the other triangle is ignored.
        unit_diagonal: use a diagonal of ones; the diagonal of A is not read.
        transpose: solve with the transpose of A. ``upper`` still refers to A, not to its transpose.

    Shape: A ``[K, n, n]``; B, X ``[K, n, m]``; float32 or float64; K and m may be 0. Differentiable in A and
    B.

    Raises ValueError for other shapes, dtypes or devices. Raises SingularError, a ValueError with the index
    of the matrix, if a diagonal contains 0, inf or NaN; on a CUDA device a later call raises it, see
    :func:`raise_singular`.
    """
    return torch.ops.fastflow.triangular_solve.default(A, B, upper, unit_diagonal, transpose)


def raise_singular() -> None:
    """Synchronizes the CUDA devices and raises SingularError if a kernel found a singular matrix.

    A matrix is singular if its diagonal contains 0, inf or NaN. A kernel cannot raise: it writes a flag that
    the host reads without synchronizing, and a later call of :func:`triangular_solve` or
    :func:`~fastflow.ops.lu_weight` raises the error. This function raises it now and clears the flag. Until
    then, results for the singular matrix are invalid, usually inf or NaN. Kernels that were queued before
    the error may set the flag again, as does each replay of a captured graph.
    """
    dispatch.raise_singular()
