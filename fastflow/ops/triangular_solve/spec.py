"""Cases of the triangular solve: ``[N, C, C]`` matrices, as many right-hand sides as x has positions."""

import math
from collections.abc import Iterator
from itertools import product

import torch

from fastflow.ops.layout import acc_dtype
from fastflow.ops.spec import Case, Make


def cases(make: Make, shape: tuple[int, ...]) -> Iterator[Case]:
    k, n, *size = shape
    dtype, m = acc_dtype(make.dtype), math.prod(size)
    A = torch.randn(k, n, n, dtype=dtype) / n + 2 * torch.eye(n, dtype=dtype)
    B, dX = (torch.randn(k, n, m, dtype=dtype) for _ in range(2))
    for upper, transpose in product((False, True), repeat=2):
        variant = f"{'upper' if upper else 'lower'}{' transposed' if transpose else ''}"
        yield Case("triangular_solve", variant, (A, B, upper, False, transpose))
    yield Case("triangular_solve", "unit diagonal", (A, B, True, True, False))
    yield Case("triangular_solve_backward", "", (A, B, dX, True, False, False))
