"""Times batched triangular solves, and torch.linalg.solve_triangular.

    python -m benchmarks.ops.triangular_solve

A X = B with A [K, n, n] upper triangular and B [K, n, m]. Rows go to results/triangular_solve.csv; the
shape is K x n x m. cuBLAS fails beyond 524,280 right-hand sides, so on CUDA ``eager`` solves them in parts.
"""

import argparse
import functools

import torch

from benchmarks.tools import harness
from fastflow import ops

LARGEST = 1 << 25  # elements of B; K = 32 with n = 512 and m = 16384 would be a GiB


def eager(A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
    if B.is_cuda and B.shape[2] > 524280:  # cuBLAS fails
        return torch.cat(
            [torch.linalg.solve_triangular(A, part, upper=True) for part in B.split(1 << 18, dim=2)], dim=2
        )
    return torch.linalg.solve_triangular(A, B, upper=True)


def of_size(k: int, n: int, m: int, dtype: torch.dtype) -> harness.Case:
    def inputs():
        return (torch.randn(k, n, n) / n + 2 * torch.eye(n)).to(dtype), torch.randn(k, n, m, dtype=dtype)

    return harness.Case(
        name="upper",
        shape=f"{k}x{n}x{m}",
        dtype=dtype,
        inputs=inputs,
        providers={"eager": eager, "fastflow": functools.partial(ops.triangular_solve, upper=True)},
        bytes_moved=dtype.itemsize * k * n * (n + 2 * m),
    )


def sizes(quick: bool) -> list[tuple[int, int, int]]:
    if quick:
        return [(1, 4, 1), (2, 5, 7)]
    glow = [(k, n, m) for k in (1, 32) for n in (4, 12, 24, 48, 64) for m in (1, n, 1024, 16384)]
    large = [(k, n, m) for k in (1, 32) for n in (128, 512) for m in (1, n, 1024)]
    return [(k, n, m) for k, n, m in [*glow, *large, (1, 12, 524289)] if k * n * m <= LARGEST]


def cases(options: argparse.Namespace) -> list[harness.Case]:
    return [
        of_size(*size, dtype) for size in sizes(options.quick) for dtype in (torch.float32, torch.float64)
    ]


def main(argv: list[str] | None = None) -> list[dict]:
    return harness.main("triangular_solve", __doc__, cases, argv)


if __name__ == "__main__":
    main()
