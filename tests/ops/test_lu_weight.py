"""fastflow::lu_weight on every body, against torch.linalg."""

import pytest
import torch
from torch.autograd import gradcheck

import fastflow
from fastflow import ops, reference
from tests.support.cases import CUDA, EXTENSION, STATIC, assert_as_reference, compared_extension, leaf
from tests.support.matrices import lu_inputs

pytestmark = [
    pytest.mark.usefixtures("each_backend"),
    pytest.mark.bodies(*EXTENSION),
]

OP = torch.ops.fastflow.lu_weight.default
BACKWARD = torch.ops.fastflow.lu_weight_backward.default
SIZES = [(1, 1), (3, 2), (2, 5), (4, 12), (0, 3), (1, 48), (2, 33), (2, 64), (2, 65), (1, 130), (1, 512)]
sizes = pytest.mark.parametrize("k, c", SIZES)


def by_hand(perm, lower, upper, log_s, sign_s):
    """W = P L (U + diag s), P with ones at (i, perm[i])."""
    c = perm.shape[1]
    P = torch.nn.functional.one_hot(perm, c).to(lower.dtype)
    return (
        P
        @ (lower.tril(-1) + torch.eye(c, dtype=lower.dtype))
        @ (upper.triu(1) + torch.diag_embed(sign_s * log_s.exp()))
    )


@sizes
def test_is_the_product_its_inverse_and_determinant(k, c):
    args = lu_inputs(k, c)
    weight, inverse, log_det = ops.lu_weight(*args)
    expected = by_hand(*args)
    torch.testing.assert_close(weight, expected, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(inverse, torch.linalg.inv(expected), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(log_det, torch.linalg.slogdet(expected).logabsdet, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("k, c", [(1, 1), (3, 2), (2, 5)])
def test_gradients(k, c):
    perm, lower, upper, log_s, sign_s = lu_inputs(k, c)
    assert gradcheck(lambda *a: OP(perm, *a, sign_s), [leaf(v) for v in (lower, upper, log_s)])


@sizes
def test_backward_is_that_of_linalg(k, c):
    perm, lower, upper, log_s, sign_s = lu_inputs(k, c)
    variables = [leaf(v) for v in (lower, upper, log_s)]
    weight = by_hand(perm, *variables, sign_s)
    outputs = weight, torch.linalg.inv(weight), torch.linalg.slogdet(weight).logabsdet
    upstream = [torch.randn_like(v) for v in outputs]
    expected = torch.autograd.grad(outputs, variables, upstream)
    found = BACKWARD(perm, lower, upper, log_s, sign_s, outputs[1].detach(), *upstream)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
    assert found[0].triu().abs().sum() == 0 and found[1].tril().abs().sum() == 0
    by_reference = torch.autograd.grad(reference.lu_weight(perm, *variables, sign_s), variables, upstream)
    torch.testing.assert_close(by_reference, expected, rtol=1e-11, atol=1e-11)


@compared_extension
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@sizes
def test_every_body_is_the_reference(k, c, dtype):
    args = lu_inputs(k, c, dtype)
    assert_as_reference(OP, *args)
    upstream = (
        torch.randn(k, c, c, dtype=dtype),
        torch.randn(k, c, c, dtype=dtype),
        torch.randn(k, dtype=dtype),
    )
    assert_as_reference(BACKWARD, *args, reference.lu_weight(*args)[1], *upstream)


@pytest.mark.bodies("compiled", CUDA)  # the reference is the fake; a body changes only strides
@pytest.mark.parametrize("k, c", [(1, 1), (2, 5)])
def test_opcheck(k, c):
    perm, lower, upper, log_s, sign_s = lu_inputs(k, c)
    torch.library.opcheck(OP, (perm, leaf(lower), leaf(upper), leaf(log_s), sign_s))


@pytest.mark.bodies("compiled", CUDA)  # the reference is the fake; a body changes only strides
def test_opcheck_layouts():
    perm, lower, upper, log_s, sign_s = lu_inputs(3, 4)
    transposed = (
        perm,
        leaf(lower.mT),
        leaf(upper.mT),
        leaf(torch.stack([log_s, log_s], dim=2)[..., 0]),
        sign_s,
    )
    torch.library.opcheck(OP, transposed, test_utils=STATIC)
    expanded = tuple(v[:1].expand(v.shape) for v in (perm, lower, upper, log_s, sign_s))
    torch.library.opcheck(OP, expanded, test_utils=STATIC)
    for strided in (expanded, transposed):
        plain = tuple(v.contiguous() for v in strided)
        torch.testing.assert_close(ops.lu_weight(*strided), ops.lu_weight(*plain), rtol=1e-13, atol=1e-13)
    upstream = (
        torch.randn(3, 4, 4, dtype=lower.dtype),
        torch.randn(3, 4, 4, dtype=lower.dtype).mT,
        torch.randn(3, dtype=lower.dtype),
    )
    torch.library.opcheck(
        BACKWARD, (perm, lower.mT, upper.mT, log_s, sign_s, lower, *upstream), test_utils=STATIC
    )


def test_float32():
    args = lu_inputs(4, 48)
    exact = ops.lu_weight(*args)
    found = ops.lu_weight(args[0], *(v.float() for v in args[1:]))
    for a, b in zip(found, exact, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("c", [12, 48])
@pytest.mark.parametrize("spread", [2, 6])
def test_ill_conditioned(spread, c):
    """The inverse's error, against float64's of the same numbers, is within ten times that of two triangular solves in float32."""
    perm, lower, upper, _, sign_s = lu_inputs(8, c, torch.float32)
    log_s = torch.linspace(-spread, spread, c).expand(8, c).contiguous()
    args = perm, lower, upper, log_s, sign_s
    exact = reference.lu_weight(perm, *(v.double() for v in args[1:]))[1]
    unit = torch.eye(c).expand(8, c, c)
    L, U = lower.tril(-1) + unit, upper.triu(1) + torch.diag_embed(sign_s * log_s.exp())
    by_linalg = torch.linalg.solve_triangular(
        U, torch.linalg.solve_triangular(L, unit, upper=False, unitriangular=True), upper=True
    ).gather(2, perm.unsqueeze(1).expand(8, c, c))

    def error(inverse):
        return (inverse.double() - exact).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1)

    assert (error(ops.lu_weight(*args)[1]) <= 10 * error(by_linalg)).all()


@pytest.mark.parametrize("c", [5, 48, 80])
@pytest.mark.parametrize("log_s", [-torch.inf, torch.inf, torch.nan, -800.0, 800.0], ids=str)
def test_a_singular_matrix_is_named(log_s, c, each_backend):
    args = lu_inputs(4, c)
    args[3][2, 3] = log_s
    found = r"got (-?0|-?inf|-?nan|0, inf or nan) at index 3"
    with pytest.raises(
        ValueError,
        match=rf"lu_weight( \(an earlier call\))?: diagonal of matrix 2: {found}" if c <= 64 else found,
    ):
        ops.lu_weight(*args)
        ops.raise_singular()  # a GPU's kernels cannot raise at once
    ops.raise_singular()  # an error is raised once


@pytest.mark.bodies("reference", "compiled", CUDA)  # kernels in the interpreter: assert_as_reference
def test_same_bits_twice():
    perm, *rest, sign_s = lu_inputs(4, 12, torch.float32)
    variables = [leaf(v) for v in rest]

    def run():
        return torch.autograd.grad([v.sum() for v in OP(perm, *variables, sign_s)], variables)

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


def test_a_matrix_does_not_depend_on_its_stack():
    args = lu_inputs(5, 24, torch.float32)
    whole = ops.lu_weight(*args)
    alone = ops.lu_weight(*(v[3:4] for v in args))
    with fastflow.backend("reference"):
        expected = ops.lu_weight(*(v[3:4] for v in args))
    torch.testing.assert_close(alone, expected, rtol=1e-5, atol=1e-5)
    assert all(torch.equal(a[3:4], b) for a, b in zip(whole, alone, strict=True))


@pytest.mark.bodies("compiled", CUDA)  # the graph has the op, whichever body runs it
def test_compile():
    perm, *rest, sign_s = lu_inputs(3, 4, torch.float32)
    variables = [leaf(v) for v in rest]
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda *a: sum(v.sum() for v in ops.lu_weight(perm, *a, sign_s)), fullgraph=True, backend="aot_eager"
    )
    found = torch.autograd.grad(compiled(*variables), variables)
    expected = torch.autograd.grad(sum(v.sum() for v in ops.lu_weight(perm, *variables, sign_s)), variables)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    torch._dynamo.reset()
