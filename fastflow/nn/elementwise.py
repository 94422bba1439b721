"""Elementwise flows without parameters, or with one."""

import math
from abc import abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastflow import validation
from fastflow.nn.flow import Flow
from fastflow.ops import acc_dtype


class _Elementwise(Flow):
    """Base class of functions of one element: ``_map`` and ``_inverse_map`` return values and log slopes."""

    @abstractmethod
    def _map(self, x: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError(f"{type(self).__name__} has no _map")

    @abstractmethod
    def _inverse_map(self, z: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError(f"{type(self).__name__} has no _inverse_map")

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        validation.floating_point("x", x)
        z, log_slope = self._map(x.to(acc_dtype(x.dtype)))
        return z.to(x.dtype), log_slope.flatten(1).sum(1)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        validation.floating_point("z", z)
        x, log_slope = self._inverse_map(z.to(acc_dtype(z.dtype)))
        return x.to(z.dtype), log_slope.flatten(1).sum(1)


class LeakyReLU(_Elementwise):
    r"""Leaky ReLU, :math:`y = x` for :math:`x > 0` and :math:`y = a x` for :math:`x \le 0`.

    Args:
        slope: slope a for :math:`x \le 0`, positive.
        learned: learn :math:`\log a`, one number for all elements, from the logarithm of ``slope``.

    Shape: x, y ``[N, C, ...]``; log_det ``[N]``, nats, :math:`\log a` times the number of elements with :math:`x \le 0`.
    Raises ValueError for a slope that is not positive and finite, and for x that is not floating point.

    Example:
        Problem 16.7 of Prince, *Understanding Deep Learning*, has a slope of 0.1. The inverse has the slope 10 for negative
        numbers. :math:`|\partial y / \partial x|^{-1} = 10^n` with n the number of negative elements.

        >>> import torch
        >>> from fastflow import nn as fnn
        >>> layer = fnn.LeakyReLU(0.1)
        >>> y, log_det = layer(torch.tensor([[-2.0, 3.0, -0.5]]))
        >>> y, (-log_det).exp()
        (tensor([[-0.2000,  3.0000, -0.0500]]), tensor([100.0000]))
        >>> layer.inverse(y)[0]
        tensor([[-2.0000,  3.0000, -0.5000]])
    """

    def __init__(self, slope: float = 0.01, learned: bool = False) -> None:
        super().__init__()
        validation.number("slope", slope, "a positive number", lambda v: 0 < v < math.inf)
        validation.boolean("learned", learned)
        self.slope, self.learned = slope, learned
        if learned:
            self.log_slope = nn.Parameter(torch.tensor(math.log(slope)))

    def _map(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self._scaled(x, 1)

    def _inverse_map(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return self._scaled(z, -1)

    def _scaled(self, x: Tensor, sign: int) -> tuple[Tensor, Tensor]:
        """x up to 0 times the slope, or its reciprocal for a ``sign`` of -1."""
        if not self.learned:
            log_slope = torch.where(x > 0, torch.zeros_like(x), sign * math.log(self.slope))
            return F.leaky_relu(x, self.slope**sign), log_slope
        log_slope = sign * self.log_slope.to(x.dtype)
        return torch.where(x > 0, x, x * log_slope.exp()), torch.where(x > 0, 0.0, log_slope)

    def extra_repr(self) -> str:
        return f"slope={self.slope}, learned={self.learned}"


class Sigmoid(_Elementwise):
    r"""Logistic function, :math:`y = 1 / (1 + e^{-x})`, from all numbers to (0, 1); :class:`Logit` is its inverse.

    :math:`\log y' = -\operatorname{softplus}(x) - \operatorname{softplus}(-x)` is finite for every finite x. y rounds
    to 1 for x above 17 (float32) or 37 (float64). The inverse takes 1 for the largest number below 1, and 0 for the
    smallest normal number: it is finite on [0, 1], and returns at most 16.6 (float32) or 36.7 (float64) and at least
    -87.3 or -708.4. Values outside [0, 1] give NaN. Backward of a reversible chain recomputes x from y, so its gradients
    are inaccurate for large x; docs/memory.md has numbers. ``Sequential(..., reversible=False)`` avoids this.

    Shape: x, y ``[N, C, ...]``; log_det ``[N]``, nats.  Raises ValueError for x that is not floating point.
    """

    def _map(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.sigmoid(x), -_softplus(x) - _softplus(-x)

    def _inverse_map(self, z: Tensor) -> tuple[Tensor, Tensor]:
        z = _below_one(_positive(z))
        return torch.log(z) - torch.log1p(-z), -torch.log(z) - torch.log1p(-z)


class Logit(_Elementwise):
    r"""Logit, :math:`y = \log p - \log (1 - p)` of :math:`p = (1 - \alpha) x + \alpha / 2`, from [0, 1] to all numbers.

    With :math:`\alpha = 0`, the inverse of :class:`Sigmoid`: 0 is taken for the smallest normal number and 1 for the
    largest number below 1, so y is finite on [0, 1]. :math:`\alpha > 0` keeps 0 and 1 away from infinity; samples of
    the inverse are then in :math:`(-\alpha', 1 + \alpha')` with :math:`\alpha' = \alpha / (2 - 2 \alpha)`.
    :class:`LogitDequantize` is the same map of dequantized pixels, with the preset ``"tutorial"``. Values for which p
    is outside [0, 1] give NaN.

    Args:
        alpha: :math:`\alpha`, from 0 to below 1.

    Shape: x, y ``[N, C, ...]``; log_det ``[N]``, nats.
    Raises ValueError for another alpha, and for x that is not floating point.
    """

    def __init__(self, alpha: float = 0.0) -> None:
        super().__init__()
        validation.number("alpha", alpha, "a number from 0 to below 1", lambda v: 0 <= v < 1)
        self.alpha = alpha

    def _map(self, x: Tensor) -> tuple[Tensor, Tensor]:
        p = _below_one(_positive((1 - self.alpha) * x + self.alpha / 2))
        log_p, log_q = torch.log(p), torch.log1p(-p)
        return log_p - log_q, math.log1p(-self.alpha) - log_p - log_q

    def _inverse_map(self, z: Tensor) -> tuple[Tensor, Tensor]:
        x = (torch.sigmoid(z) - self.alpha / 2) / (1 - self.alpha)
        return x, -_softplus(z) - _softplus(-z) - math.log1p(-self.alpha)

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}"


class Tanh(_Elementwise):
    r"""Hyperbolic tangent, from all numbers to (-1, 1).

    :math:`\log y' = 2 (\log 2 - x - \operatorname{softplus}(-2 x))` is finite for every finite x. y rounds to 1 for x
    above 9 (float32) or 19 (float64). The inverse takes 1 and -1 for the nearest number within (-1, 1): it is finite on
    [-1, 1], and returns at most 8.7 (float32) or 18.7 (float64). Values outside give NaN. In reversible chains, the note
    of :class:`Sigmoid` applies.

    Shape: x, y ``[N, C, ...]``; log_det ``[N]``, nats.  Raises ValueError for x that is not floating point.
    """

    def _map(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.tanh(x), 2 * (math.log(2) - x - _softplus(-2 * x))

    def _inverse_map(self, z: Tensor) -> tuple[Tensor, Tensor]:
        z = _within(z, 1)
        return torch.atanh(z), -torch.log1p(-z) - torch.log1p(z)


class Softplus(_Elementwise):
    r"""Softplus, :math:`y = \log(1 + e^x)`, from all numbers to the positive ones.

    :math:`\log y' = -\operatorname{softplus}(-x)`. The inverse :math:`x = y + \log(1 - e^{-y})` does not overflow. It
    takes 0 for the smallest normal number, and returns at least -87.3 (float32) or -708.4 (float64). Negative values
    give NaN.

    Shape: x, y ``[N, C, ...]``; log_det ``[N]``, nats.  Raises ValueError for x that is not floating point.
    """

    def _map(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return _softplus(x), -_softplus(-x)

    def _inverse_map(self, z: Tensor) -> tuple[Tensor, Tensor]:
        z = _positive(z)
        log_slope = -torch.log(-torch.expm1(-z))
        return z - log_slope, log_slope


class Exp(_Elementwise):
    r"""Exponential function, :math:`y = e^x`, from all numbers to the positive ones; :class:`Log` is its inverse.

    y overflows to inf for x above 88.7 (float32) or 709.7 (float64); the log-det is finite. The inverse takes 0 for
    the smallest normal number, and returns at least -87.3 (float32) or -708.4 (float64). Negative values give NaN.

    Shape: x, y ``[N, C, ...]``; log_det ``[N]``, nats, the sum of x.  Raises ValueError for x that is not floating
    point.
    """

    def _map(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.exp(x), x

    def _inverse_map(self, z: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.log(_positive(z))
        return x, -x


class Log(_Elementwise):
    r"""Natural logarithm, from the positive numbers to all numbers; :class:`Exp` is its inverse.

    0 is taken for the smallest normal number, so y is finite for finite x from 0 on. Negative x gives NaN.

    Shape: x, y ``[N, C, ...]``; log_det ``[N]``, nats, minus the sum of y.  Raises ValueError for x that is not
    floating point.
    """

    def _map(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = torch.log(_positive(x))
        return z, -z

    def _inverse_map(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return torch.exp(z), z


class SoftClip(_Elementwise):
    r"""Soft clipping, :math:`y = x / (1 + |x / B|)`, from all numbers to (-B, B).

    y rounds to B for x above :math:`3 \cdot 10^7 B` (float32). The inverse takes B and -B for the nearest numbers
    within, so it is finite on [-B, B]. Values outside give NaN.

    Args:
        bound: the bound B, positive.

    Shape: x, y ``[N, C, ...]``; log_det ``[N]``, nats, :math:`-2 \sum \log(1 + |x / B|)`.
    Raises ValueError for a bound that is not positive and finite, and for x that is not floating point.
    """

    def __init__(self, bound: float = 5.0) -> None:
        super().__init__()
        validation.number("bound", bound, "a positive number", lambda v: 0 < v < math.inf)
        self.bound = bound

    def _map(self, x: Tensor) -> tuple[Tensor, Tensor]:
        ratio = x / self.bound
        return self.bound * (ratio / (1 + ratio.abs())), -2 * torch.log1p(ratio.abs())

    def _inverse_map(self, z: Tensor) -> tuple[Tensor, Tensor]:
        z = _within(z, self.bound)
        distance = self.bound - z.abs()  # exact near the bound
        rest = torch.where(distance > 0, distance, math.nan) / self.bound
        return z / rest, -2 * torch.log(rest)

    def extra_repr(self) -> str:
        return f"bound={self.bound}"


class CircularShift(_Elementwise):
    r"""Shift on a circle, :math:`y = (x + s + B) \bmod 2 B - B`, of angles in [-B, B); its log-det is 0.

    A coupling or a spline on the interval then sees another point of the circle as its end. The layer is a bijection
    of [-B, B), up to rounding, which may give B for -B. x outside gives the y of the same angle within, so the inverse
    returns that angle. In a reversible chain, layers before it then get gradients at another x: wrap angles first, or
    pass ``reversible=False``.

    Args:
        bound: the bound B, positive.
        shift: the shift s; None: B, half a turn.

    Shape: x, y ``[N, C, ...]``; log_det ``[N]``, zeros.
    Raises ValueError for a bound that is not positive and finite, for a shift that is not finite, and for x that is
    not floating point.
    """

    def __init__(self, bound: float = math.pi, shift: float | None = None) -> None:
        super().__init__()
        validation.number("bound", bound, "a positive number", lambda v: 0 < v < math.inf)
        if shift is not None:
            validation.number("shift", shift, "a finite number or None", math.isfinite)
        self.bound, self.shift = bound, bound if shift is None else shift

    def _map(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self._turned(x, self.shift)

    def _inverse_map(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return self._turned(z, -self.shift)

    def _turned(self, x: Tensor, shift: float) -> tuple[Tensor, Tensor]:
        return torch.remainder(x + (shift + self.bound), 2 * self.bound) - self.bound, torch.zeros_like(x)

    def extra_repr(self) -> str:
        return f"bound={self.bound}, shift={self.shift}"


def _softplus(x: Tensor) -> Tensor:
    # torch's threshold of 20 has an error of 2e-9
    return F.softplus(x, threshold=40)


def _positive(z: Tensor) -> Tensor:
    """z with the smallest normal number for what is between it and 0, whose logarithm may be infinite."""
    tiny = torch.finfo(z.dtype).tiny
    return torch.where((z >= 0) & (z < tiny), tiny, z)


def _below_one(z: Tensor) -> Tensor:
    """z with the largest number below 1 for 1."""
    return torch.where(z == 1, 1 - torch.finfo(z.dtype).eps / 2, z)


def _within(z: Tensor, bound: float) -> Tensor:
    """z with the nearest numbers within for ``bound`` and its negative."""
    return torch.where(z.abs() == bound, (1 - torch.finfo(z.dtype).eps / 2) * z.detach(), z)
