"""Piecewise linear and quadratic functions: formulas, couplings, tails, accuracy in float32, and errors; FLOWS has more."""

import re

import pytest
import torch

from fastflow.nn import Coupling, PiecewiseLinear, PiecewiseQuadratic
from tests.support.cases import jacobian_log_det
from tests.support.flows import IMAGE, VECTOR, batch, conv, mlp, trained

F64 = torch.float64
FUNCTIONS = {
    "linear": lambda: PiecewiseLinear(5, 2.0),
    "one bin": lambda: PiecewiseLinear(1, 2.0),
    "quadratic": lambda: PiecewiseQuadratic(5, 2.0),
    "three bins": lambda: PiecewiseQuadratic(3, 2.0, min_slope=0.1, min_width=0.2),
}
each = pytest.mark.parametrize("make", FUNCTIONS.values(), ids=FUNCTIONS.keys())


def points(n=200, seed=0):
    """From -3 to 3, and not on the knots."""
    noise = torch.rand(n, 1, generator=torch.Generator().manual_seed(seed), dtype=F64)
    return torch.linspace(-3, 3, n, dtype=F64)[:, None] + 0.01 * noise


def raw_like(function, x, std=2.0):
    generator = torch.Generator().manual_seed(1)
    shape = x.shape[0], function.params_per_element * x.shape[1], *x.shape[2:]
    return std * torch.randn(shape, generator=generator, dtype=F64)


def test_the_formula_of_the_linear_function():
    function, x = PiecewiseLinear(5, 2.0, min_slope=0.1), points()
    h = raw_like(function, x)
    y, log_det = function(x, h)
    for i in range(len(x)):
        slopes = 0.1 + 0.9 * 5 * h[i].softmax(0)
        u = (x[i, 0].item() + 2) / 4
        if not 0 <= u <= 1:
            assert y[i] == x[i] and log_det[i] == 0
            continue
        b = int(5 * u)
        v = (slopes[:b].sum() + (5 * u - b) * slopes[b]) / 5
        torch.testing.assert_close(y[i, 0], 4 * v - 2, rtol=0, atol=1e-13)
        torch.testing.assert_close(log_det[i], slopes[b].log())


def test_the_formula_of_the_quadratic_function():
    """Its slope is linear in a bin, and 1 at both ends; its integral is 1."""
    function, x = PiecewiseQuadratic(5, 2.0, min_slope=0.1, min_width=0.05), points()
    h = raw_like(function, x)
    y, log_det = function(x, h)
    for i in range(len(x)):
        widths = 0.05 + 0.75 * h[i, :5].softmax(0)
        inner = h[i, 5:].exp()
        ends = torch.cat([torch.zeros(1, dtype=F64), widths.cumsum(0)])

        def areas(inner, one, widths=widths):
            heights = torch.cat([one, inner, one])
            return heights, widths * (heights[:-1] + heights[1:]) / 2

        # sum of the areas: linear in 1 / c
        zero, one = torch.zeros(1, dtype=F64), torch.ones(1, dtype=F64)
        c = areas(inner, zero)[1].sum() / (1 - areas(0 * inner, one)[1].sum())
        slopes, parts = areas(0.1 + 0.9 * inner / c, one)
        torch.testing.assert_close(parts.sum(), one[0])
        u = (x[i, 0] + 2) / 4
        if not 0 <= u <= 1:
            assert y[i] == x[i] and log_det[i] == 0
            continue
        b = int((u > ends[1:-1]).sum())
        slope = slopes[b] + (slopes[b + 1] - slopes[b]) * (u - ends[b]) / widths[b]
        v = parts[:b].sum() + (u - ends[b]) * (slopes[b] + slope) / 2
        torch.testing.assert_close(y[i, 0], 4 * v - 2, rtol=0, atol=1e-13)
        torch.testing.assert_close(log_det[i], slope.log(), rtol=1e-11, atol=1e-12)


@each
def test_log_dets_and_inverses(make):
    function, x = make(), points()
    h = raw_like(function, x)
    y, log_det = function(x, h)
    torch.testing.assert_close(
        log_det, jacobian_log_det(lambda v: function(v, h)[0], x), rtol=1e-9, atol=1e-9
    )
    back, log_det_back = function.inverse(y, h)
    torch.testing.assert_close(back, x, rtol=0, atol=1e-11)
    torch.testing.assert_close(log_det_back, -log_det, rtol=0, atol=1e-10)
    torch.testing.assert_close(
        function.inverse(x, h)[1],
        jacobian_log_det(lambda v: function.inverse(v, h)[0], x),
        rtol=1e-9,
        atol=1e-9,
    )
    one = h[:1].expand_as(h)
    assert (function(x, one)[0].diff(dim=0) > 0).all() and (function.inverse(x, one)[0].diff(dim=0) > 0).all()


@each
def test_zero_is_the_identity(make):
    function, x = make(), points()
    for direction in (function, function.inverse):
        y, log_det = direction(x, 0 * raw_like(function, x))
        torch.testing.assert_close((y, log_det), (x, torch.zeros(len(x), dtype=F64)), rtol=0, atol=1e-13)


@each
def test_bounds_and_tails(make):
    """The ends are kept up to rounding; outside, gradients are those of the identity and none is NaN."""
    function = make()
    for dtype in (torch.float32, F64):
        ends = torch.tensor([-2.0, 2.0], dtype=dtype)[:, None].expand(2, 50)
        h = raw_like(function, ends, 4.0).to(dtype)
        eps = 20 * torch.finfo(dtype).eps
        # the inverse has the rounding of the knots over the slope
        for direction, rounding in ((function, eps), (function.inverse, eps / function.min_slope)):
            y, _ = direction(ends, h)
            assert (y.abs() <= 2).all()
            torch.testing.assert_close(y, ends, rtol=0, atol=rounding)
        x = torch.tensor([-2.5, 1e30, 2.0 + 1e-5, -torch.inf, torch.inf], dtype=dtype)[
            :, None
        ].requires_grad_()
        h = raw_like(function, x, 4.0).to(dtype).requires_grad_()
        for direction in (function, function.inverse):
            y, log_det = direction(x, h)
            assert torch.equal(y, x) and not log_det.any()
            dx, dh = torch.autograd.grad(y[:3].sum() + log_det.sum(), [x, h])
            assert dx.flatten().tolist() == [1, 1, 1, 0, 0] and not dh.any()
        nan = torch.full((1, 1), torch.nan, dtype=dtype)
        assert function(nan, h[:1])[0].isnan().all()


def test_the_slope_of_the_quadratic_function_is_continuous():
    function = PiecewiseQuadratic(5, 2.0)
    x = torch.linspace(-3, 3, 60001, dtype=F64)[:, None]
    h = raw_like(function, x[:1]).expand(len(x), -1)
    _, log_det = function(x, h)
    assert log_det.abs().max() > 0.5 and log_det.diff().abs().max() < 0.02
    linear = PiecewiseLinear(5, 2.0)
    _, log_det = linear(x, raw_like(linear, x[:1]).expand(len(x), -1))
    assert log_det.diff().abs().max() > 0.5


@each
@pytest.mark.parametrize("std", [1.0, 10.0])
def test_float32(make, std):
    """As the same formula in float64 up to a few roundings of x and y; an inverse is judged by the y that it belongs to."""
    function, x = make(), points(2000).float()
    h = raw_like(function, x, std).float()

    def assert_rounded(y, x):
        exact, log_slope = function(x.double(), h.double())
        assert ((y.double() - exact)[:, 0].abs() <= 4e-6 * (1 + log_slope.exp())).all()

    y, log_det = function(x, h)
    assert_rounded(y, x)
    back, log_det_back = function.inverse(x, h)
    assert_rounded(x, back)
    assert log_det.isfinite().all() and log_det_back.isfinite().all()


def test_a_slope_that_falls_to_its_minimum():
    """In float32, its square at the end of a steep bin may be rounded to a negative number, of which the root is NaN."""
    function, generator = PiecewiseQuadratic(5, 2.0, min_slope=1e-4), torch.Generator().manual_seed(0)
    h = (10 * torch.randn(8000, 9, generator=generator)).requires_grad_()
    widths = 1e-3 + (1 - 5e-3) * h[:, :5].softmax(1)
    ends = -2 + 4 * widths[:, :3].sum(1, keepdim=True).detach()
    y = function(torch.nextafter(ends, ends - 1), h)[0].detach()
    for below in (0, 1e-6):
        x, log_det = function.inverse(y - below, h)
        (gradient,) = torch.autograd.grad((x - log_det).sum(), h)
        assert x.isfinite().all() and log_det.isfinite().all() and gradient.isfinite().all()


@each
def test_parameters_of_a_channel(make):
    """The first parameter of all channels precedes the second, in vectors and images."""
    function = make()
    for shape in ((3, 4), (3, 4, 2, 2)):
        x = torch.rand(shape, dtype=F64)
        h = raw_like(function, x)
        y, log_det = function(x, h)
        total = 0
        for t in range(4):
            alone = function(x[:, t : t + 1], h[:, t::4])
            torch.testing.assert_close(alone[0], y[:, t : t + 1], rtol=0, atol=1e-14)
            total = total + alone[1]
        torch.testing.assert_close(total, log_det)


MASKS = {
    "halves": (lambda p: conv(2, 2 * p), "halves"),
    "checkerboard": (lambda p: conv(4, 4 * p), "checkerboard"),
    "channels": (lambda p: conv(1, 3 * p), torch.tensor([False, True, False, False])),
}


@each
@pytest.mark.parametrize("mask", MASKS)
def test_couplings_of_images(make, mask):
    net, which = MASKS[mask]
    layer = trained(lambda: Coupling(net(make().params_per_element), make(), mask=which))
    errors = layer.check(batch(IMAGE)).gradient_errors
    assert "x by inverse_backward" in errors


@each
def test_a_coupling_of_vectors(make):
    layer = trained(lambda: Coupling(mlp(2, 2 * make().params_per_element), make()))
    layer.check(2 * batch(VECTOR, 8))
    assert str(make()) in str(layer)


@each
def test_half_precision(make):
    function, x = make(), points().float()
    h = raw_like(function, x).bfloat16()
    expected = function(x, h.float())
    torch.testing.assert_close(function(x, h), expected, rtol=0, atol=0)
    y, log_det = function(x.bfloat16(), h)
    assert y.dtype == torch.bfloat16 and log_det.dtype == torch.float32
    exact = function(x.bfloat16().float(), h.float())
    torch.testing.assert_close((y, log_det), (exact[0].bfloat16(), exact[1]), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PiecewiseLinear(0), "bins: got 0, expected a positive integer"),
        (lambda: PiecewiseQuadratic(2), "bins: got 2, expected an integer from 3 on"),
        (lambda: PiecewiseQuadratic(True), "bins: got True, expected an integer from 3 on"),
        (lambda: PiecewiseLinear(3, 0.0), "bound: got 0.0, expected a positive number"),
        (lambda: PiecewiseLinear(3, min_slope=0), "min_slope: got 0, expected a number between 0 and 1"),
        (lambda: PiecewiseQuadratic(4, min_width=0.25), "min_width: got 0.25, expected a number between 0 and 1 / 4"),
        (
            lambda: PiecewiseLinear(3)(torch.zeros(2, 4), torch.zeros(2, 4)),
            "h: got shape [2, 4], expected [2, 12] (3 parameters per element of x)",
        ),
        (
            lambda: PiecewiseQuadratic(3).inverse(torch.zeros(2, 4, 2), torch.zeros(2, 20, 1)),
            "h: got shape [2, 20, 1], expected [2, 20, 2] (5 parameters per element of x)",
        ),
    ],
)  # fmt: skip
def test_errors(make, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make()
