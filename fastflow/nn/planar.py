"""Planar flow layer."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastflow import validation
from fastflow.nn.flow import Flow
from fastflow.nn.lu_linear import without_autocast
from fastflow.nn.per_sample import context_weight, described, of_samples
from fastflow.nn.root import root

ACTIVATIONS = ("tanh", "leaky_relu")


class Planar(Flow):
    r"""Planar flow, :math:`y = x + \hat u\, h(w^\top x + b)`: it stretches or compresses along one direction.

    Source: arXiv:1505.05770, eq. 10, with the constraint of its appendix A.1:
    :math:`\hat u = u + (\operatorname{softplus}(w^\top u) - 1 - w^\top u)\, w / |w|^2`. So
    :math:`w^\top \hat u > -1`, and the layer is invertible for all parameters, since :math:`0 < h' \le 1`.

    The inverse needs :math:`t = w^\top x + b`, the root of the increasing function
    :math:`t + w^\top \hat u\, h(t) = w^\top y + b`. With ``"tanh"`` it is found by Newton's method in a bracket, for each
    sample to the rounding of its precision. With ``"leaky_relu"``, whose slope is 0.2 for negative numbers, it is a
    formula. The forward direction is the fast one. ``Inverse(Planar(D))`` has it from latents to data, as
    the paper and normflows have.

    The layer starts with uniform u and w, as in normflows: up to :math:`\sqrt 2` and :math:`\sqrt{2 / D}`.

    Args:
        features: number of features D.
        activation: h, ``"tanh"`` or ``"leaky_relu"``.
        context_features: number C of features of the context; None: no context. Otherwise every sample has its own
            u, w and b: the learned ones plus a linear map of its context, which starts at zero.

    Shape: x, y ``[N, D]``; context ``[N, C]`` or None; log_det ``[N]``, nats,
    :math:`\log(1 + h'(t)\, w^\top \hat u)`.
    Raises ValueError for x or a context of another shape, another precision or another device, for another activation,
    and for ``features`` and ``context_features`` that are no positive integers.

    Example:
        >>> import torch
        >>> from fastflow import nn as fnn
        >>> flow = fnn.Sequential(*(fnn.Planar(2) for _ in range(4)))
        >>> z, log_det = flow(torch.randn(8, 2))
        >>> x, _ = flow.inverse(z)
    """

    def __init__(self, features: int, activation: str = "tanh", context_features: int | None = None) -> None:
        super().__init__()
        validation.positive_int("features", features)
        validation.one_of("activation", activation, ACTIVATIONS)
        self.features, self.activation = features, activation
        self.u = nn.Parameter(torch.empty(features).uniform_(-1, 1) * math.sqrt(2))
        self.w = nn.Parameter(torch.empty(features).uniform_(-1, 1) * math.sqrt(2 / features))
        self.b = nn.Parameter(torch.zeros(()))
        self.context_weight = context_weight(context_features, self.u, self.w, self.b)

    def _parameters_of(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """u-hat, w, b, and 1 + w u-hat, which is positive; at least float32."""
        u, w, b = of_samples(x, context, self.context_weight, self.u, self.w, self.b)
        inner = (w * u).sum(-1, keepdim=True)
        one_plus = F.softplus(inner, threshold=40)
        squared = (w * w).sum(-1, keepdim=True).clamp_min(torch.finfo(w.dtype).tiny)
        return u + (one_plus - 1 - inner) * w / squared, w, b, one_plus.squeeze(-1)

    def _check(self, argument: str, x: Tensor) -> None:
        check_vectors(argument, x, self.features, self.u)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self._check("x", x)
        with without_autocast(x.device):
            u, w, b, one_plus = self._parameters_of(x, context)
            t = (x.to(w.dtype) * w).sum(1) + b
            value, slope, rest = activated(t, self.activation)
            y = x.to(w.dtype) + value[:, None] * u
            return y.to(x.dtype), (rest + slope * one_plus).log()

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self._check("z", z)
        with without_autocast(z.device):
            u, w, b, one_plus = self._parameters_of(z, context)
            target = (z.to(w.dtype) * w).sum(1) + b
            if self.activation == "leaky_relu":
                _, slope, rest = activated(target, "leaky_relu")
                t = target / (rest + slope * one_plus)
            else:
                reach = (one_plus - 1).abs().expand_as(target)
                t = root(_stretched, target, target - reach, target + reach, one_plus.expand_as(target))
            value, slope, rest = activated(t, self.activation)
            x = z.to(w.dtype) - value[:, None] * u
            return x.to(z.dtype), -(rest + slope * one_plus).log()

    def extra_repr(self) -> str:
        return f"{self.features}, activation={self.activation!r}{described(self.context_weight)}"


def check_vectors(argument: str, x: Tensor, features: int, parameter: Tensor) -> None:
    """Raise ValueError unless x is ``[N, features]``, on the device and in the precision of ``parameter``."""
    if x.ndim != 2 or x.shape[1] != features:
        expected = f"[N, {features}], vectors with the layer's number of features"
        raise validation.argument_error(argument, validation.shape_of(x), expected)
    validation.same_device_and_precision(argument, x, "the layer's parameters", parameter)


def activated(t: Tensor, activation: str) -> tuple[Tensor, Tensor, Tensor]:
    """h(t), its slope, and 1 minus its slope, each without cancellation."""
    if activation == "leaky_relu":
        slope = torch.where(t < 0, 0.2, torch.ones_like(t))
        return t * slope, slope, 1 - slope
    value = torch.tanh(t)
    return value, 4 * torch.sigmoid(2 * t) * torch.sigmoid(-2 * t), value * value


def _stretched(t: Tensor, one_plus: Tensor) -> tuple[Tensor, Tensor]:
    value, slope, rest = activated(t, "tanh")
    return t + (one_plus - 1) * value, rest + slope * one_plus
