"""Elementwise flows: formulas, accuracy in float32, ends of their domains and beyond; FLOWS has the rest."""

import math
import re

import pytest
import torch
from torch.distributions import transforms

from fastflow import nn as fnn

F32, F64 = torch.float32, torch.float64
EVERYWHERE = torch.cat([torch.logspace(-6, 4, 400, dtype=F64), torch.zeros(1, dtype=F64)])
NUMBERS = torch.cat([EVERYWHERE, -EVERYWHERE])
UNIT = torch.cat([torch.logspace(-30, -0.01, 200, dtype=F64), 1 - torch.logspace(-7, -0.01, 200, dtype=F64)])
POSITIVE = torch.logspace(-30, 1.9, 400, dtype=F64)
# name: (flow, values of its domain, values of its range)
FLOWS = {
    "LeakyReLU": (fnn.LeakyReLU(0.1), NUMBERS, NUMBERS),
    "LeakyReLU, learned": (fnn.LeakyReLU(0.1, learned=True), NUMBERS, NUMBERS),
    "Sigmoid": (fnn.Sigmoid(), NUMBERS, UNIT),
    "Logit": (fnn.Logit(), UNIT, NUMBERS),
    "Logit of a part": (fnn.Logit(0.05), UNIT, NUMBERS),
    "Tanh": (fnn.Tanh(), NUMBERS, torch.cat([UNIT, -UNIT])),
    "Softplus": (fnn.Softplus(), NUMBERS, POSITIVE),
    "Exp": (fnn.Exp(), NUMBERS[NUMBERS.abs() < 85], POSITIVE),
    "Log": (fnn.Log(), POSITIVE, NUMBERS[NUMBERS.abs() < 85]),
    "SoftClip": (fnn.SoftClip(3.0), NUMBERS, torch.cat([3 * UNIT, -3 * UNIT])),
}
each = pytest.mark.parametrize("name", FLOWS)


@each
def test_float64(name):
    """Log-dets against autograd, both ways."""
    flow, domain, image = FLOWS[name]
    flow = flow.double()
    for direction, values in ((flow, domain), (flow.inverse, image)):
        x = values[:, None].clone().requires_grad_()
        y, log_det = direction(x)
        slope = torch.autograd.grad(y.sum(), x)[0][:, 0]
        assert y.isfinite().all() and log_det.isfinite().all() and slope.isfinite().all()
        told = slope > 1e-5  # autograd has 1 - y, which is rounded, in smaller ones
        assert told.sum() > 300
        torch.testing.assert_close(log_det[told], slope[told].log(), rtol=1e-10, atol=1e-10)
    flow.check(values_within(name).view(-1, 2))


def values_within(name):
    """Values of the domain from which the way back is well-conditioned."""
    if "Logit" in name:
        return torch.linspace(0.01, 0.99, 20, dtype=F64)
    return torch.linspace(0.01 if name == "Log" else -4, 5, 20, dtype=F64)


@each
def test_float32(name):
    """Each direction is as the same formula in float64 of the same float32 numbers, up to a few roundings."""
    flow, domain, image = FLOWS[name]
    for direction, values in (("forward", domain), ("inverse", image)):
        x = values[:, None].float()
        if direction == "forward" and "Logit" in name:
            x = x.clamp(max=1 - 2**-24)
        y, log_det = getattr(flow.float(), direction)(x)
        exact, exact_log_det = getattr(flow.double(), direction)(x.double())
        assert y.isfinite().all() and log_det.isfinite().all()
        at_the_end = (x.abs() == 1) | (x.abs() == 3)  # taken for the float32 number before it
        torch.testing.assert_close(
            torch.where(at_the_end, 0.0, y.double()),
            torch.where(at_the_end, 0.0, exact),
            rtol=2e-6,
            atol=1e-37,
        )
        ends = at_the_end.flatten()
        torch.testing.assert_close(log_det.double()[~ends], exact_log_det[~ends], rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("flow", "transform"),
    [
        (fnn.Sigmoid(), transforms.SigmoidTransform()),
        (fnn.Tanh(), transforms.TanhTransform()),
        (fnn.Softplus(), transforms.SoftplusTransform()),
        (fnn.Exp(), transforms.ExpTransform()),
    ],
)
def test_they_are_torch_s_transforms(flow, transform):
    x = torch.linspace(-5, 5, 20, dtype=F64).view(4, 5)
    y, log_det = flow(x)
    torch.testing.assert_close(y, transform(x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(log_det, transform.log_abs_det_jacobian(x, y).sum(1), rtol=1e-9, atol=1e-9)
    inverse = (
        fnn.Logit() if isinstance(flow, fnn.Sigmoid) else fnn.Log() if isinstance(flow, fnn.Exp) else None
    )
    if inverse is not None:
        torch.testing.assert_close(inverse(y), flow.inverse(y), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(inverse.inverse(x), flow(x), rtol=1e-12, atol=1e-12)


def test_log_dets_are_exact():
    """The slopes of sigmoid and tanh are even, so their logarithms are those of |x|, which nothing cancels in."""
    x = NUMBERS[NUMBERS.abs() > 1][:, None]
    size = x[:, 0].abs()
    rest, rest_of_two = torch.log1p(torch.exp(-size)), torch.log1p(torch.exp(-2 * size))
    torch.testing.assert_close(fnn.Sigmoid()(x)[1], -size - 2 * rest, rtol=1e-14, atol=0)
    difference = fnn.Tanh()(x)[1] - 2 * (math.log(2) - size - rest_of_two)
    assert (difference.abs() <= 1e-15 * (1 + size)).all()
    y, log_det = fnn.Softplus()(x)
    torch.testing.assert_close(y[:, 0], x[:, 0].clamp(min=0) + rest, rtol=1e-14, atol=0)
    torch.testing.assert_close(log_det, x[:, 0].clamp(max=0) - rest, rtol=1e-14, atol=0)


def test_formulas():
    x = torch.tensor([[-2.0, 0.0, 3.0], [-1.0, -4.0, -0.0]], dtype=F64)
    y, log_det = fnn.LeakyReLU(0.5)(x)
    assert y.tolist() == [[-1, 0, 3], [-0.5, -2, 0]]
    torch.testing.assert_close(log_det, torch.tensor([2, 3], dtype=F64) * math.log(0.5))
    learned = fnn.LeakyReLU(0.5, learned=True).double()
    torch.testing.assert_close(learned(x), (y, log_det), rtol=1e-7, atol=1e-7)
    assert list(learned.state_dict()) == ["log_slope"] and not fnn.LeakyReLU().state_dict()
    torch.testing.assert_close(fnn.SoftClip(4.0)(x)[0], x / (1 + x.abs() / 4))
    p = 0.9 * torch.tensor([[0.0, 0.5, 1.0]], dtype=F64) + 0.05
    y, log_det = fnn.Logit(0.1)(torch.tensor([[0.0, 0.5, 1.0]], dtype=F64))
    torch.testing.assert_close(y, torch.logit(p))
    torch.testing.assert_close(log_det, (0.9 / (p * (1 - p))).log().sum(1))


def test_logit_is_that_of_dequantized_pixels():
    pixels = torch.arange(256, dtype=torch.uint8).view(4, 64)
    noise = torch.full((4, 64), 0.5)
    expected = fnn.LogitDequantize(alpha=0.1, preset="tutorial")(pixels, noise=noise)
    x, log_det = fnn.Dequantize()(pixels, noise=noise)
    y, more = fnn.Logit(0.1)(x + 0.5)
    torch.testing.assert_close((y, log_det + more), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [F32, F64])
def test_ends(dtype):
    """Saturated values come back finite, with finite gradients; beyond the ends is NaN."""
    big = torch.tensor([[1000.0, -1000.0]], dtype=dtype)
    for flow, ends in ((fnn.Sigmoid(), [1, 0]), (fnn.Tanh(), [1, -1]), (fnn.Inverse(fnn.Logit()), [1, 0])):
        y, log_det = flow(big)
        assert y.tolist() == [ends] and log_det.isfinite().all()
        x, log_det_back = flow.inverse(y)
        assert x.isfinite().all() and log_det_back.isfinite().all()
    finfo = torch.finfo(dtype)
    top = 1 - finfo.eps / 2
    ends = {
        fnn.Sigmoid(): {0: math.log(finfo.tiny), 1: math.log(top) - math.log1p(-top)},
        fnn.Tanh(): {-1: -math.atanh(top), 1: math.atanh(top)},
        fnn.Softplus(): {0: math.log(finfo.tiny)},
        fnn.Exp(): {0: math.log(finfo.tiny)},
        fnn.SoftClip(2.0): {2: 2 * top / (1 - top), -2: -2 * top / (1 - top)},
    }
    for flow, found in ends.items():
        z = torch.tensor([*found], dtype=dtype)[:, None].requires_grad_()
        x, log_det = flow.inverse(z)
        torch.testing.assert_close(x[:, 0].tolist(), [*found.values()], rtol=1e-6, atol=0)
        assert torch.autograd.grad(x.sum() + log_det.sum(), z)[0].isfinite().all()
        for end in found:
            outside = torch.tensor([[end + (0.5 if end > 0 else -0.5)]], dtype=dtype)
            x, log_det = flow.inverse(outside)
            assert x.isnan().all() and log_det.isnan().all(), (flow, end)
    outside = torch.tensor([[-0.5]], dtype=dtype)
    for flow in (fnn.Log(), fnn.Logit()):
        assert all(v.isnan().all() for v in flow(outside))
        assert all(v.isfinite().all() for v in flow(0 * outside))
    assert all(v.isnan().all() for v in fnn.Logit(0.1)(outside + 2))
    y, log_det = fnn.Exp()(big)
    assert y.tolist() == [[math.inf, 0]] and log_det.tolist() == [0]


def test_a_shift_on_the_circle():
    turn = fnn.CircularShift()
    x = torch.tensor([[-math.pi, -1.0, 0.0, 1.0, 3.0]], dtype=F64)
    y, log_det = turn(x)
    expected = torch.tensor([[0, math.pi - 1, -math.pi, 1 - math.pi, 3 - math.pi]], dtype=F64)
    torch.testing.assert_close(y, expected)
    assert log_det.tolist() == [0]
    torch.testing.assert_close(turn.inverse(y)[0], x)
    x = torch.linspace(-2, 1.9, 40, dtype=F64)[None]
    for shift in (0.0, 0.5, -1.5, 2.0, 7.3):
        layer = fnn.CircularShift(2.0, shift)
        y, _ = layer(x)
        assert (y >= -2).all() and (y <= 2).all()
        torch.testing.assert_close(on_circle(y), on_circle(x + shift))
        torch.testing.assert_close(on_circle(layer.inverse(y)[0]), on_circle(x))
        torch.testing.assert_close(on_circle(layer(x + 8)[0]), on_circle(y))  # two more turns


def on_circle(x):
    """The points of angles in [-2, 2)."""
    return torch.polar(torch.ones_like(x), x * math.pi / 2)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(half):
    x = torch.linspace(0.1, 0.9, 12).view(3, 4).to(half)
    for flow, *_ in FLOWS.values():
        for direction in (flow.float(), flow.inverse):
            y, log_det = direction(x.float())
            torch.testing.assert_close(direction(x), (y.to(half), log_det), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: fnn.LeakyReLU(0), "slope: got 0, expected a positive number"),
        (lambda: fnn.LeakyReLU(math.inf), "slope: got inf, expected a positive number"),
        (lambda: fnn.Logit(1.0), "alpha: got 1.0, expected a number from 0 to below 1"),
        (lambda: fnn.SoftClip(0), "bound: got 0, expected a positive number"),
        (lambda: fnn.CircularShift(2, math.inf), "shift: got inf, expected a finite number or None"),
        (lambda: fnn.Tanh()(torch.zeros(3)), "x: got shape [3], expected a batch [N, C, ...]"),
        (lambda: fnn.Exp().inverse(torch.ones(3, 2, dtype=torch.int64)), "z: got dtype torch.int64, expected a floating"),
    ],
)  # fmt: skip
def test_errors(make, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


@pytest.mark.parametrize(
    "layer", [fnn.Sigmoid(), fnn.Tanh(), fnn.SoftClip(1.0)], ids=lambda v: type(v).__name__
)
def test_gradients_before_a_saturated_layer(layer):
    """Stored ones are those of float64, as docs/memory.md has it; recomputed ones are, too, where nothing saturates."""

    def gradients(size, dtype, reversible):
        flow = fnn.Sequential(fnn.Affine(4), layer, reversible=reversible).to(dtype)
        z, log_det = flow(torch.full((2, 4), size, dtype=dtype))
        return torch.autograd.grad(z.square().sum() + log_det.sum(), list(flow.parameters()))

    for size, reversible in ((1.0, True), (1.0, False), (20.0, False)):
        found, exact = gradients(size, F32, reversible), gradients(size, F64, False)
        torch.testing.assert_close([g.double() for g in found], list(exact), rtol=1e-5, atol=1e-6)
