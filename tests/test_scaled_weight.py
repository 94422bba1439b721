"""fastflow::scaled_weight on every body: a convolution with what it gives is a convolution, scaled."""

import pytest
import torch
import torch.nn.functional as F
from cases import KERNELS, LAYOUTS, STATIC, assert_as_reference, lay_out, leaf
from torch.autograd import gradcheck

from fastflow import ops, reference

BODIES = ["reference", "compiled", *KERNELS]
pytestmark = [pytest.mark.usefixtures("each_backend"), pytest.mark.parametrize("each_backend", BODIES, indirect=True)]

OP = torch.ops.fastflow.scaled_weight.default
BACKWARD = torch.ops.fastflow.scaled_weight_backward.default
SHAPES = [(1, 1, 1, 1), (5, 3, 3, 3), (128, 6, 3, 3), (12, 128, 3, 3), (130, 33, 1, 1), (7, 5), (4, 2, 700), (0, 3, 3, 3)]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)


def inputs(shape, dtype=torch.float64, layout="contiguous"):
    weight, log_scale, bias = torch.randn(shape), 0.3 * torch.randn(shape[0]), torch.randn(shape[0])
    return lay_out(weight.to(dtype), layout), log_scale.to(dtype), bias.to(dtype)


@pytest.mark.parametrize("factor", [1.0, 3.0])
@pytest.mark.parametrize("kernel", [1, 3])
def test_a_convolution_with_it_is_a_scaled_one(factor, kernel):
    weight, log_scale, bias = inputs((6, 4, kernel, kernel))
    x = torch.randn(2, 4, 5, 7, dtype=torch.float64)
    expected = (factor * log_scale).exp().view(1, -1, 1, 1) * F.conv2d(x, weight, bias, padding=kernel // 2)
    found = F.conv2d(x, *ops.scaled_weight(weight, log_scale, bias, factor), padding=kernel // 2)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced", "transposed"])
def test_gradients(layout):
    args = [leaf(v) for v in inputs((3, 2, 2, 3), layout=layout)]
    assert gradcheck(lambda *a: OP(*a, 3.0), args)
    upstream = torch.randn(3, 2, 2, 3, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    expected = torch.autograd.grad(reference.scaled_weight(*args, 3.0), args, upstream)
    torch.testing.assert_close(BACKWARD(*(a.detach() for a in args), 3.0, *upstream), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
@shapes
def test_every_body_is_the_reference(shape, layout, dtype):
    args = inputs(shape, dtype, layout)
    dweight, dbias = lay_out(torch.randn(shape).to(dtype), layout), torch.randn(shape[0]).to(dtype)
    for factor in (1.0, 3.0):
        assert_as_reference(OP, *args, factor)
        assert_as_reference(BACKWARD, *args, factor, dweight, dbias)


def test_a_gradient_may_lie_otherwise_and_vectors_may_be_strided():
    weight, log_scale, bias = inputs((6, 4, 3, 3), torch.float32, "channels_last")
    log_scale, bias, dbias = (torch.stack([v, v], dim=1)[:, 1] for v in (log_scale, bias, bias))
    assert_as_reference(OP, weight, log_scale, bias, 1.0)
    assert_as_reference(BACKWARD, weight, log_scale, bias, 1.0, torch.randn(6, 4, 3, 3), dbias)
    assert_as_reference(BACKWARD, weight, log_scale, bias, 1.0, weight, dbias.clone()[:1].expand(6))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_opcheck(layout):
    args = inputs((3, 2, 3, 3), layout=layout)
    torch.library.opcheck(OP, (*map(leaf, args), 3.0))
    torch.library.opcheck(BACKWARD, (*args, 3.0, args[0], args[2]), test_utils=STATIC)


def test_double_backward_is_an_error():
    args = [leaf(v) for v in inputs((2, 2))]
    weight, _ = OP(*args, 1.0)
    (gradient,) = torch.autograd.grad(weight.square().sum(), args[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"weight": torch.zeros(3)}, r"weight: got shape \[3\]"),
        ({"weight": torch.zeros(3, 2, dtype=torch.int32)}, "weight: got dtype torch.int32"),
        ({"log_scale": torch.zeros(2)}, r"log_scale: got shape \[2\], expected \[3\], one for each output channel of weight"),
        ({"bias": torch.zeros(3, 1)}, r"bias: got shape \[3, 1\], expected \[3\], one for each output channel of weight"),
        ({"bias": torch.zeros(3, dtype=torch.float64)}, "bias: got dtype torch.float64, expected torch.float32"),
    ],
)
def test_errors(wrong, message):
    given = {"weight": torch.zeros(3, 2, 1, 1), "log_scale": torch.zeros(3), "bias": torch.zeros(3)} | wrong
    with pytest.raises(ValueError, match=message):
        ops.scaled_weight(**given)
