"""fastflow::lu_weight against torch.linalg."""

import pytest
import torch
from cases import STATIC, leaf
from torch.autograd import gradcheck

from fastflow import ops, reference

OP = torch.ops.fastflow.lu_weight.default
BACKWARD = torch.ops.fastflow.lu_weight_backward.default
sizes = pytest.mark.parametrize("k, c", [(1, 1), (3, 2), (2, 5), (4, 12), (0, 3), (1, 48)])


def inputs(k, c, dtype=torch.float64):
    """All of lower and upper is filled: only the strict triangles may be read."""
    perm = torch.stack([torch.randperm(c) for _ in range(k)]) if k else torch.empty(0, c, dtype=torch.int64)
    lower, upper = torch.randn(k, c, c) / c, torch.randn(k, c, c) / c
    return perm, lower.to(dtype), upper.to(dtype), 0.3 * torch.randn(k, c).to(dtype), torch.randn(k, c).sign().to(dtype)


def by_hand(perm, lower, upper, log_s, sign_s):
    """W = P L (U + diag s), P with ones at (i, perm[i])."""
    c = perm.shape[1]
    P = torch.nn.functional.one_hot(perm, c).to(lower.dtype)
    return P @ (lower.tril(-1) + torch.eye(c, dtype=lower.dtype)) @ (upper.triu(1) + torch.diag_embed(sign_s * log_s.exp()))


@sizes
def test_is_the_product_its_inverse_and_determinant(k, c):
    args = inputs(k, c)
    weight, inverse, log_det = ops.lu_weight(*args)
    expected = by_hand(*args)
    torch.testing.assert_close(weight, expected, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(inverse, torch.linalg.inv(expected), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(log_det, torch.linalg.slogdet(expected).logabsdet, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("k, c", [(1, 1), (3, 2), (2, 5)])
def test_gradients(k, c):
    perm, lower, upper, log_s, sign_s = inputs(k, c)
    assert gradcheck(lambda *a: OP(perm, *a, sign_s), [leaf(v) for v in (lower, upper, log_s)])


@sizes
def test_backward_is_that_of_linalg(k, c):
    perm, lower, upper, log_s, sign_s = inputs(k, c)
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


@pytest.mark.parametrize("k, c", [(1, 1), (2, 5)])
def test_opcheck(k, c):
    perm, lower, upper, log_s, sign_s = inputs(k, c)
    torch.library.opcheck(OP, (perm, leaf(lower), leaf(upper), leaf(log_s), sign_s))


def test_opcheck_layouts():
    perm, lower, upper, log_s, sign_s = inputs(3, 4)
    transposed = perm, leaf(lower.mT), leaf(upper.mT), leaf(torch.stack([log_s, log_s], dim=2)[..., 0]), sign_s
    torch.library.opcheck(OP, transposed, test_utils=STATIC)
    expanded = tuple(v[:1].expand(v.shape) for v in (perm, lower, upper, log_s, sign_s))
    torch.library.opcheck(OP, expanded, test_utils=STATIC)
    plain = tuple(v.contiguous() for v in expanded)
    torch.testing.assert_close(ops.lu_weight(*expanded), ops.lu_weight(*plain), rtol=1e-13, atol=1e-13)
    upstream = torch.randn(3, 4, 4, dtype=lower.dtype), torch.randn(3, 4, 4, dtype=lower.dtype).mT, torch.randn(3, dtype=lower.dtype)
    torch.library.opcheck(BACKWARD, (perm, lower.mT, upper.mT, log_s, sign_s, lower, *upstream), test_utils=STATIC)


def test_float32():
    args = inputs(4, 48)
    exact = ops.lu_weight(*args)
    found = ops.lu_weight(args[0], *(v.float() for v in args[1:]))
    for a, b in zip(found, exact, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


def test_same_bits_twice():
    perm, *rest, sign_s = inputs(4, 12, torch.float32)
    variables = [leaf(v) for v in rest]

    def run():
        return torch.autograd.grad([v.sum() for v in OP(perm, *variables, sign_s)], variables)

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))
