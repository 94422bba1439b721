"""Rational-quadratic splines in plain PyTorch."""

import math
from functools import partial
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from fastflow.ops import columns


def parameters_per_element(bins: int, tails: str, convention: str) -> int:
    """Number of parameters of one spline: widths, heights, slopes, and the domain of FrEIA's."""
    if convention == "freia":
        return 3 * bins + (1 if tails == "affine" else 0)
    return 3 * bins + {"linear": -1, "circular": 0, "none": 1, "zero": 1}[tails]


class Form(NamedTuple):
    """What a spline is, except for its parameters."""

    bins: int
    bound: float
    tails: str
    convention: str
    factor: float
    min_bin: float
    min_slope: float

    @property
    def per_element(self) -> int:
        return parameters_per_element(self.bins, self.tails, self.convention)

    @property
    def start(self) -> float:
        return 0.0 if self.tails == "none" else -self.bound

    @property
    def length(self) -> float:
        return 1.0 if self.tails == "none" else 2 * self.bound

    @property
    def closed_above(self) -> bool:
        """Whether a knot belongs to the bin below it."""
        return self.convention in ("zuko", "freia")

    @property
    def slope_offset(self) -> float:
        """Added to the raw slopes; with ours, raw slopes of 0 are slopes of 1."""
        if self.convention == "freia":
            return math.log(math.e - 1)
        return math.log(math.expm1(1 - self.min_slope)) if self.convention == "fastflow" else 0.0


class Knots(NamedTuple):
    """Knots of splines, ``[..., bins]``: lower ends and sizes of the bins in x and y; slopes ``[..., bins + 1]``."""

    x: Tensor
    width: Tensor
    y: Tensor
    height: Tensor
    slope: Tensor


class Piece(NamedTuple):
    """The bin of each element: its number, lower ends, sizes, and the slopes at both of its ends."""

    number: Tensor
    x: Tensor
    width: Tensor
    y: Tensor
    height: Tensor
    slope_0: Tensor
    slope_1: Tensor


def _squash(raw: Tensor, log_range: float) -> Tensor:
    """Bounds raw parameters smoothly, by ``log_range`` (zuko)."""
    return raw / (1 + (raw / log_range).abs())


def _shares(raw: Tensor, form: Form) -> Tensor:
    """Share of each bin in the interval before the smallest share is added, ``[..., bins]``."""
    raw = raw * form.factor
    if form.convention == "zuko":
        raw = _squash(raw, math.log(form.min_slope) / 2)
    return torch.softmax(raw, -1)


def _freia_offset(form: Form) -> float:
    """Added to the raw sizes of FrEIA's bins, so that bins of raw size 0 fill the interval."""
    return math.log(math.expm1(form.length / form.bins - form.min_bin))


def _freia_total(raw: Tensor, form: Form) -> Tensor:
    return form.length * F.softplus(raw + form.slope_offset)


def _sizes(raw: Tensor, form: Form) -> Tensor:
    if form.convention == "freia" and form.tails == "affine":
        return form.min_bin + F.softplus(raw[..., : form.bins] + _freia_offset(form))
    smallest = 0.0 if form.convention == "zuko" else form.min_bin
    return form.length * (smallest + (1 - smallest * form.bins) * _shares(raw, form))


def _lower_ends(sizes: Tensor, start: float | Tensor) -> Tensor:
    return start + torch.cat([torch.zeros_like(sizes[..., :1]), sizes[..., :-1].cumsum(-1)], -1)


def knots_of(params: Tensor, form: Form) -> Knots:
    """Knots of the splines with raw parameters ``[..., parameters_per_element]``."""
    k = form.bins
    raw_width, raw_height, rest = params[..., :k], params[..., k : 2 * k], params[..., 2 * k :]
    start_x = start_y = form.start
    if form.convention == "freia" and form.tails == "linear":
        total = _freia_total(rest[..., :1], form)
        width, height = total * torch.softmax(raw_width, -1), total * torch.softmax(raw_height, -1)
        start_x = start_y = -total / 2
        rest = rest[..., 1:]
    else:
        width, height = _sizes(raw_width, form), _sizes(raw_height, form)
    if form.convention == "freia" and form.tails == "affine":
        start_y, start_x = start_y + rest[..., :1], start_x + rest[..., 1:2]
        rest = rest[..., 2:]
    if form.convention == "zuko":
        slope = torch.exp(_squash(rest, math.log(form.min_slope)))
    else:
        smallest = 0.0 if form.convention == "freia" else form.min_slope
        slope = smallest + F.softplus(rest + form.slope_offset)
    if form.tails == "circular":
        slope = torch.cat([slope, slope[..., :1]], -1)
    elif form.tails == "affine":
        end = height.sum(-1, keepdim=True) / width.sum(-1, keepdim=True)
        slope = torch.cat([end, slope, end], -1)
    elif form.tails == "linear":
        slope = F.pad(slope, (1, 1), value=1.0)
    return Knots(_lower_ends(width, start_x), width, _lower_ends(height, start_y), height, slope)


def piece_of(v: Tensor, knots: Knots, form: Form, inverse: bool) -> Piece:
    """The bin of each x, or of each y for the inverse."""
    ends = (knots.y if inverse else knots.x)[..., 1:]
    v = v.unsqueeze(-1)
    index = (v > ends if form.closed_above else v >= ends).sum(-1, keepdim=True)
    at = [t.gather(-1, index).squeeze(-1) for t in knots[:4]]
    slopes = [knots.slope.gather(-1, index + i).squeeze(-1) for i in (0, 1)]
    return Piece(index, *at, *slopes)


def _within_unit(offset: Tensor, at_end: Tensor) -> Tensor:
    """``offset`` clamped to [0, 1], and 1 at the interval's upper end: only rounding differs from that."""
    return torch.where(at_end, 1.0, offset.clamp(0, 1))


def _terms(xi: Tensor, p: Piece) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """s, q, t = xi (1 - xi), the denominator, and the numerators of y and of dy/dx."""
    s = p.height / p.width
    q = p.slope_0 + p.slope_1 - 2 * s
    t = xi * (1 - xi)
    top = p.slope_1 * xi * xi + 2 * s * t + p.slope_0 * (1 - xi) * (1 - xi)
    return s, q, t, s + q * t, s * xi * xi + p.slope_0 * t, top


def _solve(eta: Tensor, p: Piece) -> Tensor:
    """xi of the height ``eta`` above the bin's lower end, a root of a quadratic, without cancellation."""
    s = p.height / p.width
    q = p.slope_0 + p.slope_1 - 2 * s
    a, b = p.height * (s - p.slope_0) + eta * q, p.height * p.slope_0 - eta * q
    root = _root(b * b + 4 * a * s * eta)
    positive = b >= 0
    one = torch.ones_like(b)
    return torch.where(
        positive,
        2 * s * eta / torch.where(positive, b + root, one),
        (root - b) / torch.where(positive, one, 2 * a),
    )


def _root(square: Tensor) -> Tensor:
    """Square root; 0 with a gradient of 0 below the smallest positive number, where rounding leads."""
    smallest = torch.finfo(square.dtype).tiny
    return torch.where(square < smallest, 0.0, torch.sqrt(square.clamp_min(smallest)))


class _Interval(NamedTuple):
    low: Tensor | float
    high: Tensor | float

    def clamp(self, v: Tensor) -> Tensor:
        if isinstance(self.low, Tensor) and isinstance(self.high, Tensor):
            return torch.minimum(torch.maximum(v, self.low), self.high)
        return v.clamp(cast("float", self.low), cast("float", self.high))


def _interval(knots: Knots, form: Form, inverse: bool) -> _Interval:
    if form.convention != "freia":
        return _Interval(form.start, form.start + form.length)
    low, size = (knots.y, knots.height) if inverse else (knots.x, knots.width)
    return _Interval(low[..., 0], low[..., -1] + size[..., -1])


def _inside(v: Tensor, interval: _Interval, form: Form) -> Tensor:
    above = v > interval.low if form.closed_above else v >= interval.low
    return above & (v <= interval.high)


def _or_nan(v: Tensor, kept: Tensor) -> Tensor:
    """``v``, or NaN where an end of the interval is NaN."""
    return torch.where(kept.isnan(), kept, v)


def _elementwise(v: Tensor, params: Tensor, form: Form, inverse: bool) -> tuple[Tensor, Tensor]:
    """Spline of each element, and its log-derivative."""
    knots = knots_of(params, form)
    interval = _interval(knots, form, inverse)
    inside, kept = _inside(v, interval, form), interval.clamp(v)
    p = piece_of(kept, knots, form, inverse)
    offset = _solve(kept - p.y, p) if inverse else (kept - p.x) / p.width
    xi = (
        offset + (_within_unit(offset, kept >= interval.high) - offset).detach()
    )  # with the gradient of offset
    s, _, _, bottom, y, top = _terms(xi, p)
    log_slope = torch.log(top * (s / bottom).square())
    result = p.x + xi * p.width if inverse else p.y + p.height * (y / bottom)
    if form.tails in ("linear", "circular"):  # the identity outside; NaN stays NaN
        v = _or_nan(v, kept)
        log_slope = torch.where(inside, log_slope, torch.where(v.isnan(), v, 0.0))
        return torch.where(inside, result, v), -log_slope if inverse else log_slope
    beyond = v - kept  # a line of the slope at the end
    slope = torch.exp(-log_slope if inverse else log_slope)
    return torch.where(inside, result, result + slope * beyond), -log_slope if inverse else log_slope


def spline(
    x: Tensor, params: Tensor, channel_order: Tensor | None, first_channel: int, bins: int, bound: float,
    tails: str, convention: str, factor: float, min_bin: float, min_slope: float, inverse: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    form = Form(bins, bound, tails, convention, factor, min_bin, min_slope)
    each = partial(_elementwise, form=form, inverse=inverse)
    return columns.applied(each, x, params, channel_order, first_channel, form.per_element)


def _pullback(
    v: Tensor, params: Tensor, g: Tensor, dlog_slope: Tensor, form: Form, given: str
) -> tuple[Tensor, Tensor, Tensor]:
    """``(x, dv, dparams)`` elementwise. ``given`` is what ``v``, ``g`` and ``dlog_slope`` belong to:

    ``"x"``: v is x, g the gradient of y, of the spline. ``"inverse"``: v is y, g the gradient of x, of the inverse.
    ``"y"``: v is y, g the gradient of y, of the spline; dv is the gradient of x.
    """
    by_y = given != "x"
    knots = knots_of(params, form)
    interval = _interval(knots, form, by_y)
    inside, kept = _inside(v, interval, form), interval.clamp(v)
    p = piece_of(kept, knots, form, by_y)
    xi = _within_unit(_solve(kept - p.y, p) if by_y else (kept - p.x) / p.width, kept >= interval.high)
    s, q, t, bottom, y, top = _terms(xi, p)
    ratio = s / bottom
    slope = top * ratio * ratio  # dy/dx
    identity = form.tails in ("linear", "circular")

    # derivatives of the log-slope by xi, s and both slopes
    rest, turn = 1 - xi, 1 - 2 * xi
    log_by_xi = 2 * (p.slope_1 * xi + s * turn - p.slope_0 * rest) / top - 2 * q * turn / bottom
    log_by_s = 2 / s + 2 * t / top - 2 * (1 - 2 * t) / bottom
    log_by_0 = rest * rest / top - 2 * t / bottom
    log_by_1 = xi * xi / top - 2 * t / bottom
    if not identity:  # beyond the ends the slope is that at the end
        log_by_xi = torch.where(inside, log_by_xi, torch.zeros_like(xi))

    x = p.x + xi * p.width
    passed = g
    if given == "inverse":  # the implicit function theorem: the spline's derivatives, with other gradients
        dlog_slope = -dlog_slope
        g = -(g + dlog_slope * log_by_xi / p.width) / slope
    beyond = torch.zeros_like(xi)
    if not identity:
        beyond = (v - kept) / slope if by_y else v - kept
        x = torch.where(inside, x, x + beyond)
    by_xi = g * slope * p.width + dlog_slope * log_by_xi
    dv = -g if given == "inverse" else by_xi / p.width
    by_log = dlog_slope + g * beyond * slope
    by_s = g * p.height * (xi * xi * bottom - y * (1 - 2 * t)) / bottom.square() + by_log * log_by_s
    by_0 = g * p.height * t * (bottom - y) / bottom.square() + by_log * log_by_0
    by_1 = -g * p.height * y * t / bottom.square() + by_log * log_by_1
    by_x = -by_xi / p.width
    of_piece = [by_x, by_x * xi - by_s * s / p.width, g, g * y / bottom + by_s / p.width, by_0, by_1]
    if identity:
        v = _or_nan(v, kept)
        dv = torch.where(inside, dv, torch.where(v.isnan(), v, passed))
        x = torch.where(inside, x, v)
        of_piece = [torch.where(inside, d, torch.zeros_like(d)) for d in of_piece]
    return x, dv, _parameter_gradient(params, knots, p.number, of_piece, form)


def _parameter_gradient(
    params: Tensor, knots: Knots, index: Tensor, of_piece: list[Tensor], form: Form
) -> Tensor:
    """Gradient of the raw parameters, from those of a bin's lower ends, sizes and slopes."""
    k = form.bins
    by_x, by_width, by_y, by_height, by_0, by_1 = (d.unsqueeze(-1) for d in of_piece)
    j = torch.arange(k + 1, device=params.device)
    at, after = index == j, index + 1 == j  # of the slopes
    zero = torch.zeros_like(by_0)
    by_slope = torch.where(at, by_0, zero) + torch.where(after, by_1, zero)
    before, here = j[:k] < index, j[:k] == index
    by_widths = torch.where(before, by_x, zero) + torch.where(here, by_width, zero)
    by_heights = torch.where(before, by_y, zero) + torch.where(here, by_height, zero)
    raw_width, raw_height, rest = params[..., :k], params[..., k : 2 * k], params[..., 2 * k :]
    domain = []
    if form.convention == "freia" and form.tails == "affine":
        by_end = by_slope[..., :1] + by_slope[..., -1:]
        total, end = knots.width.sum(-1, keepdim=True), knots.slope[..., :1]
        by_widths, by_heights = by_widths - by_end * end / total, by_heights + by_end / total
        domain = [by_y, by_x]
        offset = _freia_offset(form)
        draw_width = by_widths * torch.sigmoid(raw_width + offset)
        draw_height = by_heights * torch.sigmoid(raw_height + offset)
    elif form.convention == "freia":
        raw_total = rest[..., :1]
        total = _freia_total(raw_total, form)
        shares = knots.width / total, knots.height / total
        by_total = (by_widths * shares[0] + by_heights * shares[1]).sum(-1, keepdim=True)
        by_total = by_total - (by_x + by_y) / 2
        domain = [by_total * form.length * torch.sigmoid(raw_total + form.slope_offset)]
        draw_width = total * _softmax_vjp(by_widths, shares[0])
        draw_height = total * _softmax_vjp(by_heights, shares[1])
    else:
        draw_width, draw_height = (
            _size_vjp(d, raw, form) for d, raw in ((by_widths, raw_width), (by_heights, raw_height))
        )
    raw_slope = rest[..., len(domain) :]
    if form.tails in ("linear", "affine"):
        by_slope = by_slope[..., 1:-1]
    elif form.tails == "circular":
        by_slope = torch.cat([by_slope[..., :1] + by_slope[..., -1:], by_slope[..., 1:-1]], -1)
    if form.convention == "zuko":
        log_range = math.log(form.min_slope)
        squashed = _squash(raw_slope, log_range)
        draw_slope = by_slope * torch.exp(squashed) / (1 + (raw_slope / log_range).abs()).square()
    else:
        draw_slope = by_slope * torch.sigmoid(raw_slope + form.slope_offset)
    return torch.cat([draw_width, draw_height, *domain, draw_slope], -1)


def _softmax_vjp(d: Tensor, shares: Tensor) -> Tensor:
    return shares * (d - (d * shares).sum(-1, keepdim=True))


def _size_vjp(d: Tensor, raw: Tensor, form: Form) -> Tensor:
    shares = _shares(raw, form)
    smallest = 0.0 if form.convention == "zuko" else form.min_bin
    draw = form.length * (1 - smallest * form.bins) * form.factor * _softmax_vjp(d, shares)
    if form.convention == "zuko":
        draw = draw / (1 + (2 * form.factor / math.log(form.min_slope) * raw).abs()).square()
    return draw


def _pulled_back(
    v: Tensor,
    params: Tensor,
    channel_order: Tensor | None,
    first_channel: int,
    g: Tensor,
    dlog_det: Tensor,
    form: Form,
    given: str,
) -> tuple[Tensor, Tensor, Tensor]:
    each = partial(_pullback, form=form, given=given)
    return columns.pulled_back(each, v, params, channel_order, first_channel, g, dlog_det, form.per_element)


def spline_backward(
    x: Tensor, params: Tensor, channel_order: Tensor | None, first_channel: int, dy: Tensor, dlog_det: Tensor,
    bins: int, bound: float, tails: str, convention: str, factor: float, min_bin: float, min_slope: float, inverse: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients ``(dx, dparams)`` from the input."""
    form = Form(bins, bound, tails, convention, factor, min_bin, min_slope)
    given = "inverse" if inverse else "x"
    _, dx, dparams = _pulled_back(x, params, channel_order, first_channel, dy, dlog_det, form, given)
    return dx, dparams


def spline_inverse_backward(
    y: Tensor, params: Tensor, channel_order: Tensor | None, first_channel: int, dy: Tensor, dlog_det: Tensor,
    bins: int, bound: float, tails: str, convention: str, factor: float, min_bin: float, min_slope: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Input and gradients ``(x, dx, dparams)`` of the forward direction, from its output."""
    form = Form(bins, bound, tails, convention, factor, min_bin, min_slope)
    return _pulled_back(y, params, channel_order, first_channel, dy, dlog_det, form, "y")
