"""fastflow::conv1x1 on every body: PyTorch, the CPU's, and the CUDA kernels run on the CPU and on a device."""

import math

import pytest
import torch
from torch.autograd import gradcheck

from fastflow import ops, reference
from tests.support.cases import (
    CUDA,
    EXTENSION,
    LAYOUTS,
    STATIC,
    TRACED,
    assert_as_reference,
    compared_extension,
    lay_out,
    leaves,
    name,
    pairwise,
)

pytestmark = [
    pytest.mark.usefixtures("each_backend"),
    pytest.mark.bodies(*EXTENSION),
]

OP = torch.ops.fastflow.conv1x1.default
BACKWARD = torch.ops.fastflow.conv1x1_backward.default
INVERSE_BACKWARD = torch.ops.fastflow.conv1x1_inverse_backward.default
SHAPES = [(3, 4), (2, 3, 4, 2), (1, 1, 1, 1), (2, 3, 5), (2, 3, 2, 2, 2), (0, 3, 2, 2), (0, 3)]
any_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
with_bias = pytest.mark.parametrize("bias", [False, True], ids=["no_bias", "bias"])


def inputs(shape, bias, dtype=torch.float64):
    c = shape[1]
    x, weight = torch.randn(shape), torch.randn(c, c) / c**0.5 + torch.eye(c)
    return x.to(dtype), weight.to(dtype), torch.randn(c).to(dtype) if bias else None


@with_bias
@any_shape
def test_is_a_matrix_at_each_position(shape, bias):
    x, weight, b = inputs(shape, bias)
    expected = torch.einsum("ij,nj...->ni...", weight, x) + (
        0 if b is None else b.view(1, -1, *[1] * (x.ndim - 2))
    )
    torch.testing.assert_close(ops.conv1x1(x, weight, b), expected, rtol=1e-12, atol=1e-12)


@with_bias
@any_shape
def test_gradients(shape, bias):
    args = leaves(*inputs(shape, bias))
    assert gradcheck(OP, args)
    given = [a for a in args if a is not None]
    y = reference.conv1x1(*args)
    dy = torch.randn_like(y)
    expected = torch.autograd.grad(y, given, dy)
    x, weight, b = (None if a is None else a.detach() for a in args)
    torch.testing.assert_close(BACKWARD(x, weight, dy)[: len(given)], expected, rtol=1e-12, atol=1e-12)
    back, *gradients = ops.conv1x1_inverse_backward(y.detach(), weight, torch.linalg.inv(weight), b, dy)
    torch.testing.assert_close(back, x, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(tuple(gradients[: len(given)]), expected, rtol=1e-10, atol=1e-10)
    assert bias or gradients[2] is None


# Every width of the kernels from both sides, and the first that a library computes; batches and positions that fill a tile, are less
# than one, are no multiple of it, and that a vector of pixels does not divide.
CASES = pairwise(
    channels=[1, 3, 4, 12, 13, 16, 24, 32, 33, 48, 63, 64, 65],
    spatial=[(), (7,), (4, 4), (16, 16), (9, 7), (2, 3, 4)],
    batch=[1, 5, 40],
    layout=LAYOUTS,
    dtype=[torch.float64, torch.float32, torch.bfloat16, torch.float16],
    bias=[False, True],
    other_layout=["contiguous", "channels_last", "sliced"],
)
cases = pytest.mark.parametrize("case", CASES, ids=name)


def given(case):
    """x, weight, its inverse, bias and dy; weights in the dtype that is computed in, as the modules hold them; dW of order 1."""
    shape = (case["batch"], case["channels"], *case["spatial"])
    x, weight, bias = inputs(shape, case["bias"])
    dy = torch.randn(shape) / (case["batch"] * math.prod(case["spatial"])) ** 0.5
    x, dy = lay_out(x.to(case["dtype"]), case["layout"]), lay_out(dy.to(case["dtype"]), case["other_layout"])
    acc = ops.acc_dtype(case["dtype"])
    weight = torch.linalg.qr(weight).Q
    return x, weight.to(acc), weight.mT.to(acc), None if bias is None else bias.to(acc), dy


@compared_extension
@cases
def test_every_body_is_the_reference(case):
    x, weight, inverse, bias, dy = given(case)
    assert_as_reference(OP, x, weight, bias)
    assert_as_reference(BACKWARD, x, weight, dy)
    assert_as_reference(INVERSE_BACKWARD, x, weight, inverse, bias, dy)


@pytest.mark.bodies("compiled", CUDA)  # the reference is the fake; a body changes only strides
@with_bias
@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 4, 2), (2, 3, 5)], ids=str)
def test_opcheck(shape, bias):
    traced = (bias, len(shape)) in ((True, 4), (False, 2))
    tests = (*STATIC, *TRACED) if traced else STATIC
    torch.library.opcheck(OP, leaves(*inputs(shape, bias)), test_utils=tests)


@with_bias
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, bias, each_backend):
    x, weight, b = inputs((2, 4, 3, 2), bias)
    x, weight = lay_out(x, layout), weight.mT if layout == "transposed" else weight
    if each_backend != "reference":  # which is the fake
        dy, inverse = lay_out(torch.randn(x.shape, dtype=x.dtype), layout), torch.linalg.inv(weight)
        torch.library.opcheck(OP, leaves(x, weight, b), test_utils=STATIC)
        torch.library.opcheck(BACKWARD, (x, weight, dy), test_utils=STATIC)
        torch.library.opcheck(INVERSE_BACKWARD, (x, weight, inverse, b, dy), test_utils=STATIC)
    y = ops.conv1x1(x, weight, b)
    torch.testing.assert_close(y, ops.conv1x1(x.contiguous(), weight.contiguous(), b), rtol=1e-13, atol=1e-13)
    assert y.stride() == torch.empty_like(x).stride()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("channels", [48, 96])
def test_half_precision_accumulates_in_float32(channels, dtype):
    """So the only error is that of the last rounding."""
    x, weight, b = inputs((2, channels, 4, 4), True, dtype)
    exact = ops.conv1x1(x.double(), weight.double(), b.double())
    found = ops.conv1x1(x, weight, b)
    assert found.dtype == dtype
    assert ((found.double() - exact).abs() <= 0.51 * torch.finfo(dtype).eps * exact.abs() + 1e-5).all()
    mixed = ops.conv1x1(x.float(), weight, b)
    torch.testing.assert_close(mixed.double(), exact, rtol=1e-5, atol=1e-5)
    gradients = BACKWARD(x, weight, found)
    assert [g.dtype for g in gradients] == [dtype] * 3


@pytest.mark.parametrize("channels", [48, 96])
def test_autocast_does_not_round(channels, each_backend):
    """The op says what it computes in: under autocast, too, whichever body runs."""
    x, weight, b = inputs((2, channels, 4, 4), True, torch.float32)
    expected = ops.conv1x1(x, weight, b), *BACKWARD(x, weight, x)
    with torch.autocast("cuda" if each_backend == "cuda" else "cpu", dtype=torch.bfloat16):
        found = ops.conv1x1(x, weight, b), *BACKWARD(x, weight, x)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.bodies("reference", "compiled", CUDA)  # kernels in the interpreter: assert_as_reference
@pytest.mark.parametrize("shape", [(16, 12, 16, 16), (64, 48, 4, 4)], ids=str)
def test_same_bits_twice(shape):
    args = leaves(*inputs(shape, True, torch.float32))

    def run():
        y = ops.conv1x1(*args)
        return (
            y,
            *torch.autograd.grad((y * y).sum(), args),
            *ops.conv1x1_inverse_backward(y, args[1], args[1], args[2], y),
        )

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


@pytest.mark.bodies("compiled", CUDA)  # the graph has the op, whichever body runs it
def test_compile():
    x, weight, bias = leaves(*inputs((2, 4, 4, 4), True, torch.float32))
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda *args: ops.conv1x1(*args).square().sum(), fullgraph=True, backend="aot_eager"
    )
    found = torch.autograd.grad(compiled(x, weight, bias), (x, weight, bias))
    expected = torch.autograd.grad(ops.conv1x1(x, weight, bias).square().sum(), (x, weight, bias))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    torch._dynamo.reset()
