"""fastflow::triangular_solve: the op above whichever body is there; the compiled one is tested in test_build.py too."""

from itertools import product

import pytest
import torch
from cases import STATIC, leaf
from torch.autograd import gradcheck

import fastflow
from fastflow import ops

OP = torch.ops.fastflow.triangular_solve.default
BACKWARD = torch.ops.fastflow.triangular_solve_backward.default
variants = pytest.mark.parametrize("upper, unit_diagonal, transpose", list(product([False, True], repeat=3)))
backends = pytest.mark.parametrize("backend", ["auto", "reference"])


def inputs(k, n, m, dtype=torch.float64):
    return (torch.randn(k, n, n) / max(n, 1) + 2 * torch.eye(n)).to(dtype), torch.randn(k, n, m).to(dtype)


def matrix(A, upper, unit_diagonal, transpose):
    """The dense matrix that is meant."""
    T = A.triu() if upper else A.tril()
    if unit_diagonal:
        T = T - torch.diag_embed(T.diagonal(dim1=1, dim2=2)) + torch.eye(A.shape[1], dtype=A.dtype)
    return T.mT if transpose else T


@backends
@variants
@pytest.mark.parametrize("k, n, m", [(1, 1, 1), (2, 3, 5), (4, 12, 12), (1, 33, 2), (0, 3, 2), (2, 3, 0)])
def test_solves(k, n, m, upper, unit_diagonal, transpose, backend):
    A, B = inputs(k, n, m)
    with fastflow.backend(backend):
        X = ops.triangular_solve(A, B, upper=upper, unit_diagonal=unit_diagonal, transpose=transpose)
    torch.testing.assert_close(matrix(A, upper, unit_diagonal, transpose) @ X, B, rtol=1e-11, atol=1e-11)
    assert X.shape == B.shape


@backends
@variants
def test_gradients(upper, unit_diagonal, transpose, backend):
    with fastflow.backend(backend):
        assert gradcheck(OP, (*(leaf(v) for v in inputs(2, 3, 2)), upper, unit_diagonal, transpose))


@variants
def test_backward_is_that_of_linalg(upper, unit_diagonal, transpose):
    A, B = (leaf(v) for v in inputs(2, 5, 3))
    X = torch.linalg.solve(matrix(A, upper, unit_diagonal, transpose), B)
    dX = torch.randn_like(X)
    expected = torch.autograd.grad(X, (A, B), dX)
    torch.testing.assert_close(BACKWARD(A.detach(), X.detach(), dX, upper, unit_diagonal, transpose), expected, rtol=1e-11, atol=1e-11)


@variants
def test_opcheck(upper, unit_diagonal, transpose):
    variant = (upper, unit_diagonal, transpose)
    A, B = inputs(2, 3, 2)
    if not transpose:
        torch.library.opcheck(OP, (leaf(A), leaf(B), *variant))
    for a, b in [
        (A.mT, B),
        (A, torch.randn(2, 2, 3, dtype=B.dtype).mT),
        (A[:1].expand(2, 3, 3), B[:1].expand(2, 3, 2)),
        (A, torch.cat([B, B], 2)[..., 1:3]),
    ]:
        torch.library.opcheck(OP, (leaf(a), leaf(b), *variant), test_utils=STATIC)
        torch.library.opcheck(BACKWARD, (a, b, b, *variant), test_utils=STATIC)
        torch.testing.assert_close(OP(a, b, *variant), OP(a.contiguous(), b.contiguous(), *variant), rtol=1e-13, atol=1e-13)


def test_same_bits_twice():
    A, B = (leaf(v) for v in inputs(8, 48, 48, torch.float32))

    def run():
        X = ops.triangular_solve(A, B, upper=True)
        return X, *torch.autograd.grad(X.square().sum(), (A, B))

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))
