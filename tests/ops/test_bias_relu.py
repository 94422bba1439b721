"""fastflow::bias_relu, in place and not; the generic tests of test_specs.py compare its bodies with the reference."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

from fastflow import nn, ops
from tests.support.cases import (
    CUDA,
    LAYOUTS,
    TRACED,
    TRITON_AND_CPU,
    assert_as_reference,
    by_body,
    every_value,
    lay_out,
    leaf,
    leaves,
    pairwise,
)

pytestmark = [
    pytest.mark.usefixtures("each_backend"),
    pytest.mark.bodies(*TRITON_AND_CPU),
]

OPS = torch.ops.fastflow
SHAPES = [(3, 4), (2, 3, 4, 2), (1, 1, 1, 1), (2, 3, 5), (2, 3, 2, 1, 4), (0, 3, 2, 2), (0, 3)]
CASES = pairwise(
    dtype=["float64", "float32", "bfloat16", "float16"],
    x=LAYOUTS,
    dy=LAYOUTS,
    scaled=[False, True],
    relu=[False, True],
    shape=[(5, 7), (3, 5, 9), (2, 12, 16, 16), (2, 64, 4, 4), (1, 2, 70, 33), (2, 600, 2, 1)],
)
any_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
scaled_or_not = pytest.mark.parametrize("scaled, relu", [(False, True), (True, True), (True, False)])
either_way = pytest.mark.parametrize("inplace", [False, True])


def inputs(shape, dtype=torch.float64, bias_dtype=None):
    return torch.randn(shape).to(dtype), torch.randn(shape[1]).to(bias_dtype or dtype)


def plain(x, bias, log_scale=None, *, relu=True):
    bias, scale = (
        v.view(1, -1, *[1] * (x.ndim - 2)) for v in (bias, (bias if log_scale is None else log_scale).exp())
    )
    y = x + bias if log_scale is None else (x + bias) * scale
    return torch.relu(y) if relu else y


def computed(x, *per_channel, inplace, relu=True):
    """The op on a tensor that an operation computed, so that it may be written."""
    return ops.bias_relu(1 * x, *per_channel, relu=relu, inplace=inplace)


def with_gradients(f, x, *per_channel, dy):
    given = leaves(x, *per_channel)
    y = f(*given)
    return y.detach(), *torch.autograd.grad(y, given, dy)


@scaled_or_not
@either_way
@any_shape
def test_formula_and_gradients(shape, inplace, scaled, relu):
    x, *per_channel = (*inputs(shape), *([0.5 * torch.randn(shape[1]).double()] if scaled else []))
    dy = torch.randn_like(x)
    found = with_gradients(functools.partial(computed, inplace=inplace, relu=relu), x, *per_channel, dy=dy)
    expected = with_gradients(functools.partial(plain, relu=relu), x, *per_channel, dy=dy)
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)


@pytest.mark.bodies("reference", "compiled", CUDA)  # the interpreter takes seconds
@either_way
def test_gradcheck(inplace):
    args = leaves(*inputs((2, 3, 4, 2)), torch.randn(3).double())
    assert gradcheck(functools.partial(computed, inplace=inplace), args)


@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_special_values_are_those_of_relu(dtype, layout):
    """NaN stays, and so does its gradient; an output of 0 or -0 has none, not even an infinite one."""
    values = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 1e-7, -1e-7, 2.0])
    x = lay_out(values.repeat(16).view(2, 4, 4, 4).to(dtype), layout)
    b = torch.tensor([0.0, -0.0, -2.0, torch.inf], dtype=dtype)
    dy = torch.full_like(x, torch.inf)
    y, dx, db = with_gradients(ops.bias_relu, x, b, dy=dy)
    expected, expected_dx, expected_db = with_gradients(plain, x, b, dy=dy)
    same = {"rtol": 0, "atol": 0, "equal_nan": True}
    torch.testing.assert_close((y, dx, db), (expected, expected_dx, expected_db), **same)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_bias_of_half_precision_is_added_in_float32(dtype):
    x, b = inputs((8, 6, 4, 4), dtype, torch.float32)
    y, dx, db = with_gradients(ops.bias_relu, x, b, dy=x)
    assert torch.equal(y, plain(x.float(), b).to(dtype))
    assert torch.equal(dx, torch.where(y > 0, x, 0))
    torch.testing.assert_close(db, dx.float().sum((0, 2, 3)), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != "expanded"])
def test_in_place_writes_what_is_given_and_nothing_else(layout):
    x, b = inputs((3, 6, 4, 5), torch.float32)
    x = lay_out(x, layout)
    expected, around = ops.bias_relu(x, b), (x if x._base is None else x._base).clone()
    strides = x.stride()
    assert ops.bias_relu(x, b, inplace=True) is x
    assert torch.equal(x, expected) and x.stride() == strides
    if layout == "sliced":
        assert torch.equal(x._base.chunk(2, dim=1)[0], around.chunk(2, dim=1)[0])


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_in_place_counts_as_a_change(mode):
    """Autograd compares versions to find tensors that changed after they were saved."""
    x, b = inputs((2, 3))
    version = x._version
    with mode():
        ops.bias_relu(x, b, inplace=True)
    assert x._version > version


def test_in_place_keeps_the_output_only():
    """The gradient needs neither x nor the bias, and the output is the memory of x."""
    kept = []
    x, w, b = leaves(torch.randn(2, 3, 4, 4), torch.randn(5, 3, 1, 1), torch.randn(5))
    convolved = F.conv2d(x, w)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        y = ops.bias_relu(convolved, b, inplace=True)
    assert kept == [y.data_ptr()] and y is convolved


def test_in_place_on_an_output_that_backward_needs_is_an_error():
    x, b = leaves(*inputs((2, 3)))
    h = x.exp()
    ops.bias_relu(h, b, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        h.sum().backward()


def test_in_place_on_a_view():
    x, b = leaves(*inputs((2, 4, 3)))
    b, weights = leaf(b[:2]), torch.randn(2, 4, 3, dtype=x.dtype)
    h = 2 * x
    ops.bias_relu(h[:, 2:], b, inplace=True)
    first, second = (2 * x).chunk(2, dim=1)
    for found, expected in zip(
        torch.autograd.grad((h * weights).sum(), [x, b]),
        torch.autograd.grad((torch.cat([first, plain(second, b)], 1) * weights).sum(), [x, b]),
        strict=True,
    ):
        torch.testing.assert_close(found, expected, rtol=1e-14, atol=0)


@by_body(CASES, compiled=CASES, interpreter=every_value(CASES))
def test_every_body_is_the_reference(case, each_backend):
    dtype, shape = getattr(torch, case["dtype"]), case["shape"]
    twice = each_backend != "interpreter"  # NumPy's bits repeat
    x, b = inputs(shape, dtype)
    x, dy = lay_out(x, case["x"]), lay_out(torch.randn(shape).to(dtype), case["dy"])
    log_scale = 0.5 * torch.randn(2 * shape[1]).to(dtype)[::2] if case["scaled"] else None
    options = log_scale, case["relu"]
    assert_as_reference(OPS.bias_relu.default, x, b, *options, twice=twice)
    if case["x"] != "expanded":
        assert_as_reference(OPS.bias_relu_.default, x, b, *options, twice=twice)
    assert_as_reference(
        OPS.bias_relu_backward.default, x.relu() if case["relu"] else x, dy, *options, twice=twice
    )


@pytest.mark.bodies("compiled", CUDA)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_bias_gradient_of_more_elements_than_one_sum_takes(layout):
    """On the CPU, 200,000 elements are summed in three parts, which are then added."""
    y, dy = (lay_out(torch.randn(64, 12, 16, 16), layout) for _ in range(2))
    assert_as_reference(OPS.bias_relu_backward.default, y.relu(), dy, None, True)


@pytest.mark.bodies("compiled", CUDA)  # the reference is the fake; a body changes only strides
def test_opcheck():
    x, b = inputs((2, 3, 4, 2))
    torch.library.opcheck(OPS.bias_relu_.default, (x, leaf(b), leaf(b), True), test_utils=TRACED)


@pytest.mark.bodies("compiled", CUDA)
@either_way
def test_compiles_with_a_convolution(inplace):
    def network(x, w, b):
        return ops.bias_relu(F.conv2d(x, w), b, inplace=inplace)

    args = leaves(torch.randn(2, 4, 5, 5), torch.randn(6, 4, 1, 1), torch.randn(6))
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
    found, expected = compiled(*args), network(*args)
    torch.testing.assert_close(found, expected)
    dy = torch.randn_like(found)
    torch.testing.assert_close(*(torch.autograd.grad(y, args, dy) for y in (found, expected)))


class Network(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = torch.nn.Conv2d(2, 8, 1, bias=False), torch.nn.Conv2d(8, 4, 1)
        self.bias = torch.nn.Parameter(torch.randn(8))

    def forward(self, x):
        return self.last(ops.bias_relu(self.first(x), self.bias, inplace=True))


@pytest.mark.bodies("compiled", CUDA)
def test_in_place_in_a_network_of_a_reversible_chain():
    """Reversible backprop runs the network twice, and gives the gradients of stored activations."""
    flow = nn.Sequential(*(nn.AffineCoupling(Network()) for _ in range(2))).double()
    x = leaf(torch.randn(3, 4, 2, 2, dtype=torch.float64))

    def gradients(reversible):
        flow.reversible = reversible
        z, log_det = flow(x)
        return torch.autograd.grad(z.square().sum() - log_det.sum(), [x, *flow.parameters()])

    torch.testing.assert_close(gradients(True), gradients(False), rtol=1e-10, atol=1e-10)
