"""fastflow::squeeze in its three orders, both directions."""

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

import fastflow
from fastflow import ops
from fastflow.ops.squeeze import ORDERS
from tests.support.cases import (
    CUDA,
    LAYOUTS,
    STATIC,
    TRACED,
    TRITON_AND_CPU,
    by_body,
    compared_triton_and_cpu,
    lay_out,
    leaf,
    name,
    pairwise,
)

pytestmark = [
    pytest.mark.usefixtures("each_backend"),
    pytest.mark.bodies(*TRITON_AND_CPU),
]

OP = torch.ops.fastflow.squeeze.default
any_order = pytest.mark.parametrize("order", ORDERS)
both_directions = pytest.mark.parametrize("inverse", [False, True])


def by_hand(x, order):
    n, c, h, w = x.shape
    y = x.new_full((n, 4 * c, h // 2, w // 2), -1)
    for k, i, j in product(range(c), range(2), range(2)):
        channel = {
            "channel": 4 * k + 2 * i + j,
            "space": c * (2 * i + j) + k,
            "realnvp": c * {(0, 0): 0, (1, 1): 1, (0, 1): 2, (1, 0): 3}[i, j] + k,
        }[order]
        y[:, channel] = x[:, k, i::2, j::2]
    return y


AXES = {
    "layout": LAYOUTS,
    "shape": [(2, 3, 4, 6), (1, 1, 2, 2), (2, 2, 2, 4), (0, 3, 4, 4), (3, 5, 8, 2)],
    "order": ORDERS,
}


FULL = [dict(zip(AXES, values, strict=True)) for values in product(*AXES.values())]


@by_body(FULL, reference=FULL, compiled=FULL, interpreter=pairwise(**AXES))
def test_order(each_backend, case):
    layout, order = case["layout"], case["order"]
    x = lay_out(torch.randn(case["shape"]), layout)
    y = ops.squeeze2d(x, order)
    assert torch.equal(y, by_hand(x, order))
    assert torch.equal(ops.unsqueeze2d(lay_out(y, layout), order)[:1], x[:1])
    assert torch.equal(ops.unsqueeze2d(y, order), x)


def test_channel_order_is_pixel_unshuffle():
    x = torch.randn(2, 3, 8, 6)
    assert torch.equal(ops.squeeze2d(x), torch.pixel_unshuffle(x, 2))
    assert torch.equal(ops.unsqueeze2d(ops.squeeze2d(x)), torch.pixel_shuffle(ops.squeeze2d(x), 2))


@both_directions
@any_order
def test_gradients(order, inverse, each_backend):
    x, fast = leaf(torch.randn(1, 4, 2, 4, dtype=torch.float64)), each_backend == "interpreter"
    assert gradcheck(OP, (x, order, inverse), fast_mode=fast)
    assert gradgradcheck(OP, (x, order, inverse), fast_mode=fast)


@pytest.mark.bodies("compiled", CUDA)  # the reference is the fake; a body changes only strides
@both_directions
@any_order
def test_opcheck(order, inverse):
    traced = inverse == (order == "space")  # each order in one direction
    tests = (*STATIC, *TRACED) if traced else STATIC
    torch.library.opcheck(OP, (leaf(torch.randn(2, 4, 4, 6)), order, inverse), test_utils=tests)


@pytest.mark.bodies("compiled", CUDA)  # the reference is the fake; a body changes only strides
@pytest.mark.parametrize(
    "shape, layout, order, inverse",
    [
        tuple(case.values())
        for case in pairwise(
            shape=[(2, 8, 4, 2), (1, 4, 2, 2), (1, 8, 2, 2)],
            layout=LAYOUTS,
            order=ORDERS,
            inverse=[False, True],
        )
    ],
    ids=str,
)
def test_opcheck_layouts(order, inverse, layout, shape):
    """Few: test_as_reference compares strides with the reference, which is the fake."""
    torch.library.opcheck(OP, (leaf(lay_out(torch.randn(shape), layout)), order, inverse), test_utils=STATIC)


@both_directions
@any_order
@pytest.mark.parametrize("channels_last", [False, True])
def test_result_is_new_memory(order, inverse, channels_last):
    """Also where the numbers lie in the same order before and after, as from 2x2 to 1x1 pixels."""
    x = torch.randn((1, 4, 1, 1) if inverse else (1, 3, 2, 2))
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    before = x.clone()
    OP(x, order, inverse).zero_()
    assert torch.equal(x, before)


@any_order
def test_channels_last_stays(order):
    x = torch.randn(2, 4, 4, 4).contiguous(memory_format=torch.channels_last)
    y = ops.squeeze2d(x, order)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert ops.unsqueeze2d(y, order).is_contiguous(memory_format=torch.channels_last)
    assert ops.squeeze2d(x.contiguous(), order).is_contiguous()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float64, torch.int64])
def test_any_dtype(dtype):
    x = torch.arange(2 * 3 * 4 * 4).view(2, 3, 4, 4).to(dtype)
    assert torch.equal(ops.squeeze2d(x), torch.pixel_unshuffle(x, 2))


@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(0, 3),
    c=st.integers(1, 5),
    h=st.integers(1, 4),
    w=st.integers(1, 4),
    order=st.sampled_from(ORDERS),
)
def test_shapes(n, c, h, w, order):
    x = torch.randn(n, c, 2 * h, 2 * w)
    y = ops.squeeze2d(x, order)
    assert y.shape == (n, 4 * c, h, w) and torch.equal(ops.unsqueeze2d(y, order), x)


DTYPES = ("float64", "float32", "bfloat16", "float16", "uint8", "bool", "complex64", "complex128")
SHAPES = [(1, 1, 2, 2), (2, 3, 6, 10), (3, 5, 2, 16), (1, 20, 4, 6), (2, 3, 32, 32), (1, 2, 2, 1030)]
GLOW = [
    (2, 3, 32, 32),
    (2, 6, 16, 16),
    (2, 12, 8, 8),
]  # a level's input, which is half of the channels of the level above


def numbers(shape, dtype):
    return torch.randint(0, 256, shape).to(getattr(torch, dtype))


def assert_as_reference(x, order, inverse):
    found = OP(x, order, inverse)
    with fastflow.backend("reference"):
        expected = OP(x, order, inverse)
    assert (
        torch.equal(found, expected) and found.dtype == expected.dtype and found.stride() == expected.stride()
    )


@compared_triton_and_cpu
@pytest.mark.parametrize(
    "case",
    pairwise(shape=SHAPES, dtype=DTYPES, layout=LAYOUTS, order=ORDERS, inverse=[False, True]),
    ids=name,
)
def test_as_reference(case):
    n, c, h, w = case["shape"]
    shape = (n, 4 * c, h // 2, w // 2) if case["inverse"] else case["shape"]
    assert_as_reference(
        lay_out(numbers(shape, case["dtype"]), case["layout"]), case["order"], case["inverse"]
    )


@compared_triton_and_cpu
@both_directions
@pytest.mark.parametrize(
    "layout", [["contiguous"], ["channels_last"], ["sliced"], ["channels_last", "sliced"]], ids=" ".join
)
@pytest.mark.parametrize("shape", GLOW, ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_glow_as_reference(shape, dtype, layout, inverse):
    n, c, h, w = shape
    x = numbers((n, 4 * c, h // 2, w // 2) if inverse else shape, dtype)
    for step in layout:
        x = lay_out(x, step)
    assert_as_reference(x, "channel", inverse)


@compared_triton_and_cpu
@settings(max_examples=30, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 5), st.integers(1, 40)),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(LAYOUTS),
    order=st.sampled_from(ORDERS),
)
def test_shapes_as_reference(shape, dtype, layout, order):
    n, c, h, w = shape
    assert_as_reference(lay_out(numbers((n, c, 2 * h, 2 * w), dtype), layout), order, False)
    assert_as_reference(lay_out(numbers((n, 4 * c, h, w), dtype), layout), order, True)


@compared_triton_and_cpu
@both_directions
@any_order
def test_memory_of_any_strides(order, inverse):
    """Dimensions out of order, with gaps, from an address that is no multiple of 16 bytes."""
    memory = numbers((40, 3, 50, 30), "float32")
    x = memory[4:36:2, 1:, 3:48:4, 1:29].permute(1, 3, 2, 0)
    assert x.shape == (2, 28, 12, 16)
    assert_as_reference(x, order, inverse)


@pytest.mark.parametrize("channels_last", [False, True])
def test_more_than_32_bits_of_elements(each_backend, channels_last):
    """On a device; the other bodies run small."""
    size = (2**15, 2**14 + 6) if each_backend == "cuda" else (30, 22)
    x = torch.empty((1, 4, *size), dtype=torch.uint8)
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    x.random_()
    y = ops.squeeze2d(x)
    assert each_backend != "cuda" or x.numel() > 2**31
    for k, i, j in product(range(4), range(2), range(2)):
        assert torch.equal(y[:, 4 * k + 2 * i + j], x[:, k, i::2, j::2])
    assert torch.equal(ops.unsqueeze2d(y), x)
