"""fastflow::squeeze in its three orders, both directions."""

from itertools import product

import pytest
import torch
from cases import LAYOUTS, STATIC, lay_out, leaf
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

from fastflow import ops
from fastflow.ops.squeeze import ORDERS

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


@any_order
@pytest.mark.parametrize("shape", [(2, 3, 4, 6), (1, 1, 2, 2), (2, 2, 2, 4), (0, 3, 4, 4), (3, 5, 8, 2)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_order(shape, order, layout):
    x = lay_out(torch.randn(shape), layout)
    y = ops.squeeze(x, order)
    assert torch.equal(y, by_hand(x, order))
    assert torch.equal(ops.unsqueeze(lay_out(y, layout), order)[:1], x[:1])
    assert torch.equal(ops.unsqueeze(y, order), x)


def test_channel_order_is_pixel_unshuffle():
    x = torch.randn(2, 3, 8, 6)
    assert torch.equal(ops.squeeze(x), torch.pixel_unshuffle(x, 2))
    assert torch.equal(ops.unsqueeze(ops.squeeze(x)), torch.pixel_shuffle(ops.squeeze(x), 2))


@both_directions
@any_order
def test_gradients(order, inverse):
    x = leaf(torch.randn(2, 4, 2, 4, dtype=torch.float64))
    assert gradcheck(OP, (x, order, inverse))
    assert gradgradcheck(OP, (x, order, inverse))


@both_directions
@any_order
def test_opcheck(order, inverse):
    torch.library.opcheck(OP, (leaf(torch.randn(2, 4, 4, 6)), order, inverse))


@both_directions
@any_order
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(2, 8, 4, 2), (1, 4, 2, 2)], ids=str)
def test_opcheck_layouts(order, inverse, layout, shape):
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
    y = ops.squeeze(x, order)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert ops.unsqueeze(y, order).is_contiguous(memory_format=torch.channels_last)
    assert ops.squeeze(x.contiguous(), order).is_contiguous()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float64, torch.int64])
def test_any_dtype(dtype):
    x = torch.arange(2 * 3 * 4 * 4).view(2, 3, 4, 4).to(dtype)
    assert torch.equal(ops.squeeze(x), torch.pixel_unshuffle(x, 2))


@settings(max_examples=30, deadline=None)
@given(n=st.integers(0, 3), c=st.integers(1, 5), h=st.integers(1, 4), w=st.integers(1, 4), order=st.sampled_from(ORDERS))
def test_shapes(n, c, h, w, order):
    x = torch.randn(n, c, 2 * h, 2 * w)
    y = ops.squeeze(x, order)
    assert y.shape == (n, 4 * c, h, w) and torch.equal(ops.unsqueeze(y, order), x)
