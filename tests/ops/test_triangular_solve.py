"""fastflow::triangular_solve on every body: PyTorch, the CPU's, and the CUDA kernel run on the CPU and on a device."""

from itertools import product

import pytest
import torch
from torch.autograd import gradcheck

from fastflow import ops
from tests.support.cases import CUDA, EXTENSION, STATIC, leaf, name, triples
from tests.support.matrices import triangular_inputs

pytestmark = [
    pytest.mark.usefixtures("each_backend"),
    pytest.mark.bodies(*EXTENSION),
]

OP = torch.ops.fastflow.triangular_solve.default
BACKWARD = torch.ops.fastflow.triangular_solve_backward.default
TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-5}
SIZES = [(1, 1, 1), (3, 1, 33), (2, 3, 5), (4, 5, 7), (48, 12, 12), (1, 33, 2), (2, 40, 65), (2, 64, 1)]
SIZES += [(1, 96, 3), (2, 130, 129), (1, 512, 3)]
variants = pytest.mark.parametrize("upper, unit_diagonal, transpose", list(product([False, True], repeat=3)))
dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


def matrix(A, upper, unit_diagonal, transpose):
    """The dense matrix that is meant."""
    T = A.triu() if upper else A.tril()
    if unit_diagonal:
        T = T - torch.diag_embed(T.diagonal(dim1=1, dim2=2)) + torch.eye(A.shape[1], dtype=A.dtype)
    return T.mT if transpose else T


@pytest.mark.parametrize(
    "case",
    triples(
        size=SIZES, dtype=TOLERANCE, upper=[False, True], unit_diagonal=[False, True], transpose=[False, True]
    ),
    ids=lambda c: name(c).replace(" ", ""),
)
def test_solves(case):
    (k, n, m), dtype, upper, unit_diagonal, transpose = case.values()
    A, B = triangular_inputs(k, n, m, dtype)
    # only the named triangle may be read, so the rest is poison
    unread = (
        torch.ones(n, n, dtype=torch.bool).triu(1)
        if not upper
        else torch.ones(n, n, dtype=torch.bool).tril(-1)
    )
    if unit_diagonal:
        unread = unread | torch.eye(n, dtype=torch.bool)
    X = ops.triangular_solve(
        A.masked_fill(unread, torch.nan), B, upper=upper, unit_diagonal=unit_diagonal, transpose=transpose
    )
    expected = torch.linalg.solve(matrix(A.double(), upper, unit_diagonal, transpose), B.double())
    torch.testing.assert_close(X.double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    assert X.dtype == dtype and X.is_contiguous()


@pytest.mark.parametrize("k, n, m", [(0, 3, 2), (2, 3, 0), (2, 0, 3), (0, 0, 0)])
def test_nothing_to_solve(k, n, m):
    A, B = (leaf(v) for v in triangular_inputs(k, n, m))
    X = ops.triangular_solve(A, B, upper=False)
    assert X.shape == (k, n, m)
    dA, dB = torch.autograd.grad(X.sum(), (A, B))
    assert dA.shape == A.shape and dB.shape == B.shape and not dA.any()


@variants
def test_gradients(upper, unit_diagonal, transpose):
    assert gradcheck(OP, (*(leaf(v) for v in triangular_inputs(2, 3, 2)), upper, unit_diagonal, transpose))


@variants
def test_backward_is_that_of_linalg(upper, unit_diagonal, transpose):
    A, B = (leaf(v) for v in triangular_inputs(2, 5, 3))
    X = torch.linalg.solve(matrix(A, upper, unit_diagonal, transpose), B)
    dX = torch.randn_like(X)
    expected = torch.autograd.grad(X, (A, B), dX)
    torch.testing.assert_close(
        BACKWARD(A.detach(), X.detach(), dX, upper, unit_diagonal, transpose),
        expected,
        rtol=1e-11,
        atol=1e-11,
    )


@pytest.mark.bodies("compiled", CUDA)  # the reference is the fake; a body changes only strides
@variants
def test_opcheck(upper, unit_diagonal, transpose):
    variant = (upper, unit_diagonal, transpose)
    A, B = triangular_inputs(2, 3, 2)
    if upper == unit_diagonal != transpose:  # a trace sees the options as constants
        torch.library.opcheck(OP, (leaf(A), leaf(B), *variant))
    for a, b in [
        (A.mT, B),
        (A, torch.randn(2, 2, 3, dtype=B.dtype).mT),
        (A[:1].expand(2, 3, 3), B[:1].expand(2, 3, 2)),
        (A, torch.cat([B, B], 2)[..., 1:3]),
    ]:
        torch.library.opcheck(OP, (leaf(a), leaf(b), *variant), test_utils=STATIC)
        torch.library.opcheck(BACKWARD, (a, b, b, *variant), test_utils=STATIC)


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("n", [5, 40])
def test_any_strides(n, transpose):
    A, B = triangular_inputs(3, n, 9)

    def same(strided, plain):
        found, expected = (
            ops.triangular_solve(a, b, upper=True, transpose=transpose) for a, b in (strided, plain)
        )
        torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)

    same((A.mT, B.mT.contiguous().mT), (A.mT.contiguous(), B))
    wide = torch.cat([B, B], 2)[:, :, 4:13]
    same((A, wide), (A, wide.contiguous()))
    same((A[:1].expand(3, n, n), B), (A[:1].expand(3, n, n).contiguous(), B))


@pytest.mark.parametrize("m", [524_281, 524_289])
def test_many_right_hand_sides(m):
    """On both sides of where cuBLAS fails: a batch of 512 images of 32x32 has 524,288."""
    A, B = triangular_inputs(1, 4, m)
    X = ops.triangular_solve(A, B, upper=False)
    torch.testing.assert_close(A.tril() @ X, B, rtol=1e-11, atol=1e-11)


@dtypes
@pytest.mark.parametrize("upper", [False, True])
@pytest.mark.parametrize("n", [1, 5, 12, 48, 70])
def test_a_column_does_not_depend_on_the_others(n, upper, dtype, each_backend):
    """Its bits do not: neither on how many stand beside it nor on its place."""
    if each_backend == "reference":
        pytest.skip("how the library splits a batch is its own affair")
    A, B = triangular_inputs(3, n, 333, dtype)
    X = ops.triangular_solve(A, B, upper=upper)
    for first, last in [(0, 1), (332, 333), (7, 9), (100, 111), (5, 21), (64, 128), (3, 100), (1, 333)]:
        assert torch.equal(ops.triangular_solve(A, B[:, :, first:last], upper=upper), X[:, :, first:last])
        assert torch.equal(
            ops.triangular_solve(A, B[:, :, first:last].contiguous(), upper=upper), X[:, :, first:last]
        )
    assert torch.equal(ops.triangular_solve(A[1:2], B[1:2], upper=upper), X[1:2])


@pytest.mark.parametrize("n", [12, 48, 192])
def test_sums_start_from_zero(n):
    """Which loses less than summing from the right-hand side on, and no more than twice what LAPACK loses."""
    A = torch.randn(16, n, n).tril(-1) / n**0.5 + torch.eye(n)
    B = torch.randn(16, n, n)
    exact = torch.linalg.solve_triangular(A.double(), B.double(), upper=False)

    def error(X):
        return ((X.double() - exact).norm() / exact.norm()).item()

    assert error(ops.triangular_solve(A, B, upper=False)) <= 2 * error(
        torch.linalg.solve_triangular(A, B, upper=False)
    )


@pytest.mark.parametrize("upper", [False, True])
@pytest.mark.parametrize("value", [0.0, torch.inf, torch.nan], ids=str)
@pytest.mark.parametrize("n", [5, 70])
def test_a_singular_matrix_is_named(n, value, upper):
    A, B = triangular_inputs(4, n, 2)
    A[2, 3, 3] = value
    found = r"diagonal of matrix 2: got (-?0|inf|-?nan|0, inf or nan) at index 3"
    with pytest.raises(ValueError, match=rf"triangular_solve( \(an earlier call\))?: {found}"):
        ops.triangular_solve(A, B, upper=upper)
        ops.raise_singular()  # a GPU's kernels cannot raise at once
    ops.raise_singular()  # an error is raised once
    assert ops.triangular_solve(A, B, upper=upper, unit_diagonal=True).isfinite().all()
    ops.raise_singular()


@dtypes
@pytest.mark.parametrize("m", [1, 3, 64])
def test_divides_where_a_reciprocal_overflows(m, dtype):
    """And where it would underflow."""
    tiny, huge = torch.finfo(dtype).tiny / 8, torch.finfo(dtype).max / 2
    A = torch.diag_embed(torch.tensor([[tiny, 2, huge, -3 * tiny]], dtype=dtype))
    X = torch.tensor([0.5, -3, 0.25, 7], dtype=dtype).view(1, 4, 1).expand(1, 4, m)
    torch.testing.assert_close(ops.triangular_solve(A, A @ X, upper=False), X, rtol=0, atol=0)


def test_the_first_singular_matrix_is_named(each_backend):
    """And the first index, from whichever end the solve starts; a GPU names any singular matrix."""
    A, B = triangular_inputs(6, 7, 130)
    A[3, 5, 5] = -torch.inf
    A[3, 6, 6] = A[4, 0, 0] = 0
    late = each_backend in ("emulated", "cuda")
    for upper, transpose in product([False, True], repeat=2):
        with pytest.raises(ops.SingularError) as error:
            ops.triangular_solve(A, B, upper=upper, transpose=transpose)
            ops.raise_singular()
        found = "diagonal of matrix 3: got -inf at index 5, expected a finite nonzero number"
        assert late or str(error.value) == f"triangular_solve: {found}"
    assert ops.triangular_solve(A, B[..., :0], upper=True).shape == (
        6,
        7,
        0,
    )  # what is not used is not looked at


@pytest.mark.bodies("reference", "compiled", CUDA)  # kernels in the interpreter: assert_as_reference
def test_same_bits_twice():
    A, B = (leaf(v) for v in triangular_inputs(8, 48, 48, torch.float32))

    def run():
        X = ops.triangular_solve(A, B, upper=True)
        return X, *torch.autograd.grad(X.square().sum(), (A, B))

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


@pytest.mark.bodies("compiled", CUDA)  # the graph has the op, whichever body runs it
def test_compile():
    A, B = (leaf(v) for v in triangular_inputs(2, 4, 3))
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda A, B: ops.triangular_solve(A, B, upper=True).square().sum(),
        fullgraph=True,
        backend="aot_eager",
    )
    found = torch.autograd.grad(compiled(A, B), (A, B))
    expected = torch.autograd.grad(ops.triangular_solve(A, B, upper=True).square().sum(), (A, B))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    torch._dynamo.reset()
