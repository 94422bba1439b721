"""fastflow::triangular_solve, batched."""

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
)


def triangular_solve(
    A: Tensor, B: Tensor, *, upper: bool, unit_diagonal: bool = False, transpose: bool = False
) -> Tensor:
    r"""Solves :math:`A X = B` (:math:`A^T X = B` with ``transpose``) for a stack of triangular matrices.

    Args:
        upper: which triangle of A as stored is read; the other is ignored.
        unit_diagonal: the diagonal is taken to be 1 and is not read.

    Shape: A ``[K, n, n]``; B, X ``[K, n, m]``; float32 or float64; K and m may be 0. Differentiable in A and B.
    Raises ValueError for other shapes, dtypes or devices, and SingularError, a ValueError that names the matrix of the stack, for a
    diagonal that holds 0, inf or NaN; on a CUDA device that one comes late, see :func:`raise_singular`. Double backward is an error.
    """
    return torch.ops.fastflow.triangular_solve.default(A, B, upper, unit_diagonal, transpose)


def raise_singular() -> None:
    """Waits for the CUDA devices; raises SingularError where a kernel has met a matrix with 0, inf or NaN on its diagonal since last asked.

    Kernels cannot raise: they leave word in memory that the host reads without waiting, and a later call of
    :func:`triangular_solve` or :func:`~fastflow.ops.lu_weight` raises it. This function raises it now. Results of the singular matrix are
    worthless meanwhile, most of them inf or NaN. Kernels that were queued before the error was raised may leave word again, and so does
    a captured graph each time that it is replayed.
    """
    dispatch.raise_singular()
