"""The mixture-of-logistics CDF transform in plain PyTorch."""

from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from fastflow.ops import columns

_MAX_LOG_WIDTH = 7.0  # of a component, up and down; Flow++ has the lower bound

# of the inverse: each at least halves the last step or the bracket, so it is enough for the digits of the dtype
STEPS = {torch.float64: 72, torch.float32: 40}


class _Mixture(NamedTuple):
    """Mixtures of K logistics: scale and shift of the result, and for the components ``[..., K]``."""

    log_scale: Tensor  # tanh a
    shift: Tensor  # b
    log_weight: Tensor
    mean: Tensor
    log_width: Tensor  # s, from -7 to 7
    rate: Tensor  # e^-log_width


class _Terms(NamedTuple):
    """Logarithms of each component's share ``[..., K]`` in F, in 1 - F and in the slope of logit F."""

    u: Tensor
    below: Tensor
    above: Tensor
    slope: Tensor
    z: Tensor  # logit F
    log_slope: Tensor  # of z


def mixture_cdf_parameters(components: int) -> int:
    """Number of parameters of one mixture: scale, shift, and three of each component."""
    return 3 * components + 2


def _mixture(params: Tensor) -> _Mixture:
    k = (params.shape[-1] - 2) // 3
    a, b, logit, mean, width = params.split([1, 1, k, k, k], -1)
    log_weight = torch.log_softmax(logit, -1)
    width = width.clamp(-_MAX_LOG_WIDTH, _MAX_LOG_WIDTH)
    return _Mixture(torch.tanh(a.squeeze(-1)), b.squeeze(-1), log_weight, mean, width, torch.exp(-width))


def _terms(x: Tensor, m: _Mixture) -> _Terms:
    """F and 1 - F in logarithms, so that neither tail is 0 or 1 - 1.

    The slope f / (F (1 - F)) is f / F + f / (1 - F): a sum of positive terms, of each component two.
    """
    u = (x.unsqueeze(-1) - m.mean) * m.rate
    left, right = F.logsigmoid(u), F.logsigmoid(-u)
    below, above = m.log_weight + left, m.log_weight + right
    log_f, log_1_f = torch.logsumexp(below, -1), torch.logsumexp(above, -1)
    below, above = below - log_f.unsqueeze(-1), above - log_1_f.unsqueeze(-1)
    both = torch.cat([below + right - m.log_width, above + left - m.log_width], -1)
    log_slope = torch.logsumexp(both, -1)
    k = u.shape[-1]
    slope = torch.logaddexp(both[..., :k], both[..., k:]) - log_slope.unsqueeze(-1)
    return _Terms(u, below, above, slope, log_f - log_1_f, log_slope)


def _bracket(z: Tensor, m: _Mixture) -> tuple[Tensor, Tensor]:
    """logit F is between the least and the greatest of the components' u; the root where these are z."""
    ends = m.mean + z.unsqueeze(-1) * torch.exp(m.log_width)
    return ends.amin(-1), ends.amax(-1)


def _only_shapes(z: Tensor) -> bool:
    """Whether the steps give no values and no graph: then one gives the shapes, and all take seconds."""
    return z.is_meta or (isinstance(z, FakeTensor) and get_proxy_mode() is None)


def _root(z: Tensor, m: _Mixture) -> Tensor:
    """x with logit F(x) = z, without a gradient.

    Newton's method in a bracket; it is halved where a step would leave it or is more than half of the last one. An
    element keeps its x once a step, which it still takes, is as small as the rounding of x or of z.
    """
    low, high = _bracket(z, m)
    x, last = low + (high - low) / 2, high - low
    done = torch.zeros_like(x, dtype=torch.bool)
    epsilon = torch.finfo(z.dtype).eps
    for _ in range(1 if _only_shapes(z) else STEPS[z.dtype]):
        t = _terms(x, m)
        above = t.z > z
        low, high = torch.where(above, low, x), torch.where(above, x, high)
        residual = z - t.z
        step = residual * torch.exp(-t.log_slope)
        inside = (x + step >= low) & (x + step <= high)
        small = (step.abs() <= epsilon * x.abs()) | (residual.abs() <= epsilon * (1 + z.abs()))
        newton = inside & ((2 * step.abs() <= last.abs()) | small)
        to = torch.where(newton, x + step, torch.where(small, x, low + (high - low) / 2))
        last = torch.where(newton, step, high - low)
        x, done = torch.where(done, x, to), done | small
    return x


def _solve(z: Tensor, m: _Mixture) -> Tensor:
    """x with logit F(x) = z; its derivatives are those of two of Newton's steps from x, exact up to the third."""
    fixed = _Mixture(*(v.detach() for v in m))
    x = _root(z.detach(), fixed)
    largest = -torch.log(torch.tensor(torch.finfo(z.dtype).tiny, dtype=z.dtype, device=z.device))
    for _ in range(2):
        t = _terms(x, m)
        residual = z - t.z
        # its value is rounding, and is left out
        x = x + (residual - residual.detach()) * torch.exp(torch.minimum(-t.log_slope, largest))
    return x


def _elementwise(v: Tensor, params: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    """The transform of each element, and its log-derivative."""
    m = _mixture(params)
    if inverse:
        x = _solve((v - m.shift) * torch.exp(-m.log_scale), m)
        return x, -(_terms(x, m).log_slope + m.log_scale)
    t = _terms(v, m)
    return torch.exp(m.log_scale) * t.z + m.shift, t.log_slope + m.log_scale


def mixture_cdf(
    x: Tensor,
    params: Tensor,
    channel_order: Tensor | None,
    first_channel: int,
    components: int,
    inverse: bool,
) -> tuple[Tensor, Tensor]:
    each = mixture_cdf_parameters(components)
    return columns.applied(
        partial(_elementwise, inverse=inverse), x, params, channel_order, first_channel, each
    )


def _pullback(
    v: Tensor, params: Tensor, g: Tensor, dlog: Tensor, given: str
) -> tuple[Tensor, Tensor, Tensor]:
    """``(x, dv, dparams)`` elementwise. ``given`` is what ``v``, ``g`` and ``dlog`` belong to:

    ``"x"``: v is x, g the gradient of y, of the transform. ``"inverse"``: v is y, g the gradient of x, of the inverse.
    ``"y"``: v is y, g the gradient of y, of the transform; dv is the gradient of x.
    """
    m = _mixture(params)
    scale = torch.exp(m.log_scale)
    x = v if given == "x" else _solve((v - m.shift) / scale, m)
    t = _terms(x, m)
    left, right = torch.sigmoid(t.u), torch.sigmoid(-t.u)
    below, above, share = torch.exp(t.below), torch.exp(t.above), torch.exp(t.slope)
    z_by_u = below * right + above * left
    # of the log-slope
    log_by_u = share * (right - left) - below * right + above * left
    log_by_logit = share - below - above + torch.exp(m.log_weight)
    log_by_x = (m.rate * log_by_u).sum(-1)
    if (
        given == "inverse"
    ):  # the implicit function theorem: the derivatives of the transform, with other gradients
        dlog = -dlog
        g = -(g + dlog * log_by_x) * torch.exp(-(t.log_slope + m.log_scale))
    by_z = g * scale
    dv = -g if given == "inverse" else by_z * torch.exp(t.log_slope) + dlog * log_by_x
    d, by = dlog.unsqueeze(-1), by_z.unsqueeze(-1)
    by_u = by * z_by_u + d * log_by_u
    by_logit = by * (below - above) + d * log_by_logit
    of_scale = (by_z * t.z + dlog) * (1 - m.log_scale) * (1 + m.log_scale)
    of_width = torch.where(m.log_width.abs() < _MAX_LOG_WIDTH, -t.u * by_u - d * share, 0)
    first = [of_scale.unsqueeze(-1), g.unsqueeze(-1)]
    return x, dv, torch.cat([*first, by_logit, -m.rate * by_u, of_width], -1)


def mixture_cdf_backward(
    x: Tensor,
    params: Tensor,
    channel_order: Tensor | None,
    first_channel: int,
    dy: Tensor,
    dlog_det: Tensor,
    components: int,
    inverse: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients ``(dx, dparams)`` from the input."""
    each = partial(_pullback, given="inverse" if inverse else "x")
    count = mixture_cdf_parameters(components)
    return columns.pulled_back(each, x, params, channel_order, first_channel, dy, dlog_det, count)[1:]


def mixture_cdf_inverse_backward(
    y: Tensor,
    params: Tensor,
    channel_order: Tensor | None,
    first_channel: int,
    dy: Tensor,
    dlog_det: Tensor,
    components: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Input and gradients ``(x, dx, dparams)`` of the forward direction, from its output."""
    each = partial(_pullback, given="y")
    count = mixture_cdf_parameters(components)
    return columns.pulled_back(each, y, params, channel_order, first_channel, dy, dlog_det, count)
