"""Piecewise linear and piecewise quadratic functions for couplings."""

import math
from abc import abstractmethod

import torch
from torch import Tensor, nn

from fastflow import validation
from fastflow.ops import acc_dtype


class _Piecewise(nn.Module):
    """Base class of monotonic functions of [-B, B] onto itself, with the identity outside.

    ``_unit`` maps [0, 1] onto itself and returns values and log slopes; ``raw`` ``[N, P, T, ...]`` has P parameters of
    each of the T channels.
    """

    def __init__(self, bins: int, bound: float, min_slope: float) -> None:
        super().__init__()
        validation.number("bound", bound, "a positive number", lambda v: 0 < v < math.inf)
        validation.number("min_slope", min_slope, "a number between 0 and 1", lambda v: 0 < v < 1)
        self.bins, self.bound, self.min_slope = bins, bound, min_slope

    @property
    @abstractmethod
    def params_per_element(self) -> int:
        """Number P of parameters of one element, by which a network's number of outputs follows."""
        raise NotImplementedError(f"{type(self).__name__} has no params_per_element")

    @abstractmethod
    def _unit(self, u: Tensor, raw: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        raise NotImplementedError(f"{type(self).__name__} has no _unit")

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        return self._mapped(x, h, inverse=False)

    def inverse(self, y: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """``(x, log_det)`` of the inverse."""
        return self._mapped(y, h, inverse=True)

    def _mapped(self, x: Tensor, h: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        n, channels, *rest = x.shape
        shape = n, self.params_per_element * channels, *rest
        validation.same_shape("h", h, shape, f"{self.params_per_element} parameters per element of x")
        wide = x.to(acc_dtype(x.dtype))
        raw = h.to(wide.dtype).view(n, self.params_per_element, *x.shape[1:])
        inside = wide.abs() <= self.bound
        # clamped first: the branch that where drops would have NaN as gradient
        u = (wide.clamp(-self.bound, self.bound) + self.bound) / (2 * self.bound)
        v, log_slope = self._unit(u, raw, inverse)
        y = torch.where(inside, (2 * self.bound) * _held(v) - self.bound, wide)
        return y.to(x.dtype), torch.where(inside, log_slope, 0.0).flatten(1).sum(1)

    def extra_repr(self) -> str:
        return f"bins={self.bins}, bound={self.bound}"


class PiecewiseLinear(_Piecewise):
    r"""Piecewise linear function with K bins of equal width, a transformer of :class:`Coupling`.

    Source: neural importance sampling, arXiv:1808.03856, section 4; Prince, *Understanding Deep Learning*,
    eq. 16.12. With :math:`u = (x + B) / 2B`, the bin :math:`b = \lfloor K u \rfloor` and slopes :math:`\phi_k` whose
    mean is 1, :math:`y = 2 B v - B` with

    .. math:: v = \frac{1}{K} \Big( \sum_{k < b} \phi_k + (K u - b)\, \phi_b \Big), \qquad
              \phi = m + (1 - m)\, K \operatorname{softmax}(h),

    where m is ``min_slope``. Outside [-B, B], :math:`y = x`. With h = 0 the function is the identity.

    The log-det does not depend on x within a bin, so densities have jumps: :class:`PiecewiseQuadratic` has none.

    Args:
        bins: number of bins K, which is also the number of parameters of an element.
        bound: the bound B.
        min_slope: the smallest slope m.

    Shape: x, y ``[N, T, ...]``; h ``[N, K T, ...]``, the first parameter of all channels before the second; log_det
    ``[N]``, nats.
    Raises ValueError for h of another shape, for ``bins`` that are no positive integer, for a bound that is not
    positive, and for a ``min_slope`` outside (0, 1).

    Example:
        >>> import torch
        >>> from fastflow import nn as fnn
        >>> layer = fnn.Coupling(fnn.MLP(2, 2 * 8), fnn.PiecewiseLinear(8))
        >>> y, log_det = layer(torch.randn(16, 4))

        Problem 16.8 of Prince: the Jacobian is diagonal, with the slope of each element's bin. Its determinant is their
        product.

        >>> slopes = torch.tensor([0.5, 1.5, 1.0, 0.25, 1.75])
        >>> f, x = fnn.PiecewiseLinear(5, bound=0.5, min_slope=1e-9), torch.tensor([[-0.25, 0.25]])  # bins 1 and 3
        >>> h = slopes.log().repeat_interleave(2)[None]
        >>> torch.autograd.functional.jacobian(lambda x: f(x, h)[0], x)[0, :, 0]
        tensor([[1.5000, 0.0000],
                [0.0000, 0.2500]])
        >>> f(x, h)[1].exp()
        tensor([0.3750])
    """

    def __init__(self, bins: int = 8, bound: float = 3.0, min_slope: float = 1e-3) -> None:
        validation.positive_int("bins", bins)
        super().__init__(bins, bound, min_slope)

    @property
    def params_per_element(self) -> int:
        return self.bins

    def _unit(self, u: Tensor, raw: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        slopes = self.min_slope + (1 - self.min_slope) * self.bins * raw.softmax(1)
        knots = _left_ends(slopes / self.bins)
        if inverse:
            b = _bin_of(u, knots)
            slope, left = _of_bin(slopes, b), _of_bin(knots, b)
            return (b + self.bins * (u - left) / slope) / self.bins, -slope.log()
        b = (self.bins * u).long().clamp(0, self.bins - 1)
        slope, left = _of_bin(slopes, b), _of_bin(knots, b)
        return left + (self.bins * u - b) * slope / self.bins, slope.log()


class PiecewiseQuadratic(_Piecewise):
    r"""Piecewise quadratic function with K bins and a continuous slope, a transformer of :class:`Coupling`.

    Source: neural importance sampling, arXiv:1808.03856, section 4. In units of [-B, B], the slope is linear in
    each bin. Its values at the ends of the bins, :math:`s_0, \dots, s_K`, and the widths of the bins
    :math:`w_1, \dots, w_K` are

    .. math:: w = m_w + (1 - K m_w) \operatorname{softmax}(h_w), \qquad
              s_0 = s_K = 1, \qquad s_k = m + (1 - m)\, e^{h_k} / c,

    where m is ``min_slope`` and :math:`m_w` is ``min_width``. The number c makes
    :math:`\sum_k w_k (s_{k-1} + s_k) / 2 = 1`. Outside [-B, B], :math:`y = x`; the slope of 1 at the ends continues
    there. With h = 0 the function is the identity.

    Args:
        bins: number of bins K, at least 3: with fewer, the slope could only be 1.
        bound: the bound B.
        min_slope: the smallest slope m.
        min_width: the smallest width :math:`m_w` of a bin, as a share of [-B, B].

    Shape: x, y ``[N, T, ...]``; h ``[N, (2 K - 1) T, ...]``, the first parameter of all channels before the second: K
    of the widths, then K - 1 of the slopes; log_det ``[N]``, nats.
    Raises ValueError for h of another shape, for ``bins`` that are no integer from 3 on, for a bound that is not
    positive, and for a ``min_slope`` outside (0, 1) or a ``min_width`` outside (0, 1 / K).

    Example:
        >>> import torch
        >>> from fastflow import nn as fnn
        >>> layer = fnn.Coupling(fnn.MLP(2, 2 * 15), fnn.PiecewiseQuadratic(8))
        >>> y, log_det = layer(torch.randn(16, 4))
    """

    def __init__(
        self, bins: int = 8, bound: float = 3.0, min_slope: float = 1e-3, min_width: float = 1e-3
    ) -> None:
        validation.number("bins", bins, "an integer from 3 on", lambda v: isinstance(v, int) and v >= 3)
        super().__init__(bins, bound, min_slope)
        expected = f"a number between 0 and 1 / {bins}"
        validation.number("min_width", min_width, expected, lambda v: 0 < v < 1 / bins)
        self.min_width = min_width

    @property
    def params_per_element(self) -> int:
        return 2 * self.bins - 1

    def _unit(self, u: Tensor, raw: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        widths = self.min_width + (1 - self.bins * self.min_width) * raw[:, : self.bins].softmax(1)
        slopes = self._slopes(widths, raw[:, self.bins :].softmax(1))
        knots = _left_ends(widths)
        heights = _left_ends(0.5 * widths * (slopes[:, :-1] + slopes[:, 1:]))
        b = _bin_of(u, heights if inverse else knots)
        width, knot, height = (_of_bin(v, b) for v in (widths, knots, heights))
        first, last = _of_bin(slopes, b), _of_bin(slopes, b + 1)
        if inverse:
            r = (u - height) / width
            # the square of the slope there, which rounding may put below its minimum
            square = (first * first + 2 * (last - first) * r).clamp(min=self.min_slope**2)
            a = _held(2 * r / (first + square.sqrt()))
            return knot + width * a, -torch.log((1 - a) * first + a * last)
        a = _held((u - knot) / width)
        v = height + width * a * (first + 0.5 * a * (last - first))
        return v, torch.log((1 - a) * first + a * last)

    def _slopes(self, widths: Tensor, inner: Tensor) -> Tensor:
        """Slopes ``[N, K + 1, ...]`` at the ends of the bins; ``inner`` ``[N, K - 1, ...]`` has them up to a factor."""
        ends = 0.5 * (widths[:, :1] * inner[:, :1] + widths[:, -1:] * inner[:, -1:])
        middle = 0.5 * (widths[:, 1:-1] * (inner[:, :-1] + inner[:, 1:])).sum(1, keepdim=True)
        c = (ends + middle) / (1 - 0.5 * (widths[:, :1] + widths[:, -1:]))
        one = torch.ones_like(c)
        return torch.cat([one, self.min_slope + (1 - self.min_slope) * inner / c, one], dim=1)


def _left_ends(sizes: Tensor) -> Tensor:
    """Left end of each bin ``[N, K, ...]``, for the sizes of the bins, whose sum is 1."""
    return torch.cat([torch.zeros_like(sizes[:, :1]), sizes[:, :-1].cumsum(1)], dim=1)


def _bin_of(u: Tensor, ends: Tensor) -> Tensor:
    """Index of the bin of u, for the left ends of the bins."""
    return (u[:, None] >= ends[:, 1:]).sum(1)


def _of_bin(values: Tensor, b: Tensor) -> Tensor:
    return values.gather(1, b[:, None])[:, 0]


def _held(v: Tensor) -> Tensor:
    """v within [0, 1], which rounding may leave; gradients as of v."""
    return v + (v.clamp(0, 1) - v).detach()
