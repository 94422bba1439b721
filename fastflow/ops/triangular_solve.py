"""fastflow::triangular_solve: batched, compiled on the CPU where the extension is there."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastflow import check, reference
from fastflow.ops import extension
from fastflow.ops.library import register, with_compiled


def _fake(A, B, upper, unit_diagonal, transpose):
    return B.new_empty(B.shape)


def _fake_backward(A, X, dX, upper, unit_diagonal, transpose):
    return A.new_empty(A.shape), dX.new_empty(dX.shape)


class TriangularSolveFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, A: Tensor, B: Tensor, *variant) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            X = torch.ops.fastflow.triangular_solve.default(A, B, *variant)
        ctx.save_for_backward(A, X)
        ctx.variant = variant
        return X

    @staticmethod
    @once_differentiable
    def backward(ctx, dX: Tensor):
        return *torch.ops.fastflow.triangular_solve_backward.default(*ctx.saved_tensors, dX, *ctx.variant), None, None, None


def _compiled(A, B, upper, unit_diagonal, transpose):
    return torch.ops.fastflow_C.triangular_solve.default(A, B, upper, unit_diagonal, transpose)


def _has_compiled(A, *_):
    return (extension.cpu and A.device.type == "cpu") or (extension.cuda and A.device.type == "cuda")


register(
    "triangular_solve",
    "(Tensor A, Tensor B, bool upper, bool unit_diagonal, bool transpose) -> Tensor",
    with_compiled(reference.triangular_solve, _compiled, _has_compiled),
    _fake,
    TriangularSolveFunction,
)
register(
    "triangular_solve_backward",
    "(Tensor A, Tensor X, Tensor dX, bool upper, bool unit_diagonal, bool transpose) -> (Tensor, Tensor)",
    reference.triangular_solve_backward,
    _fake_backward,
)


def triangular_solve(A: Tensor, B: Tensor, *, upper: bool, unit_diagonal: bool = False, transpose: bool = False) -> Tensor:
    r"""Solves :math:`A X = B` (:math:`A^T X = B` with ``transpose``) for a stack of triangular matrices.

    Args:
        upper: which triangle of A as stored is read; the other is ignored.
        unit_diagonal: the diagonal is taken to be 1 and is not read.

    Shape: A ``[K, n, n]``; B, X ``[K, n, m]``; float32 or float64; K and m may be 0. Differentiable in A and B.
    Raises ValueError for other shapes, dtypes or devices. Double backward is an error.
    """
    if A.ndim != 3 or A.shape[1] != A.shape[2]:
        raise check.error("A", check.shape_of(A), "a stack of square matrices [K, n, n]")
    if A.dtype not in (torch.float32, torch.float64):
        raise check.error("A", f"dtype {A.dtype}", "float32 or float64")
    if B.ndim != 3 or B.shape[:2] != A.shape[:2]:
        raise check.error("B", check.shape_of(B), f"[{A.shape[0]}, {A.shape[1]}, m]")
    if B.dtype != A.dtype or B.device != A.device:
        raise check.error("B", f"{B.dtype} on {B.device}", f"{A.dtype} on {A.device}, like A")
    return torch.ops.fastflow.triangular_solve.default(A, B, upper, unit_diagonal, transpose)
