"""Radial flow layer."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastflow import validation
from fastflow.nn.flow import Flow
from fastflow.nn.lu_linear import without_autocast
from fastflow.nn.per_sample import context_weight, described, of_samples
from fastflow.nn.planar import check_vectors


class Radial(Flow):
    r"""Radial flow, :math:`y = x + \frac{\beta}{\alpha + r} (x - c)` with :math:`r = |x - c|`: it expands or contracts around a point.

    Source: arXiv:1505.05770, eq. 14, with the constraint of its appendix A.2: :math:`\alpha = e^a > 0` and
    :math:`\beta = \operatorname{softplus}(\hat\beta) - \alpha > -\alpha`. The layer is invertible for all parameters.

    The distance of y from c is :math:`R = r (r + s) / (\alpha + r)` with :math:`s = \operatorname{softplus}(\hat\beta)`, so
    that r is the positive root of a quadratic (docs/maths.md). Both directions are formulas.
    ``Inverse(Radial(D))`` has the fast direction of the paper and of normflows, from latents to data.

    The layer starts with :math:`\alpha = 1`, a small :math:`\beta` and a Gaussian c.

    Args:
        features: number of features D.
        context_features: number C of features of the context; None: no context. Otherwise every sample has its own
            a, :math:`\hat\beta` and c: the learned ones plus a linear map of its context, which starts at zero.

    Shape: x, y ``[N, D]``; context ``[N, C]`` or None; log_det ``[N]``, nats,
    :math:`(D - 1) \log \frac{r + s}{\alpha + r} + \log \frac{r^2 + 2 \alpha r + \alpha s}{(\alpha + r)^2}`.
    Raises ValueError for x or a context of another shape, another precision or another device, and for ``features`` and
    ``context_features`` that are no positive integers.

    Example:
        >>> import torch
        >>> from fastflow import nn as fnn
        >>> layer = fnn.Radial(2)
        >>> z, log_det = layer(torch.randn(8, 2))
        >>> x, _ = layer.inverse(z)
    """

    def __init__(self, features: int, context_features: int | None = None) -> None:
        super().__init__()
        validation.positive_int("features", features)
        self.features = features
        self.log_alpha = nn.Parameter(torch.zeros(()))
        self.beta = nn.Parameter(math.log(math.e - 1) + torch.empty(()).uniform_(-1, 1) / features)
        self.center = nn.Parameter(torch.randn(features))
        self.context_weight = context_weight(context_features, self.log_alpha, self.beta, self.center)

    def _parameters_of(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """alpha, s = alpha + beta, both positive, and the center; at least float32."""
        given = self.log_alpha, self.beta, self.center
        log_alpha, beta, center = of_samples(x, context, self.context_weight, *given)
        return log_alpha.exp(), F.softplus(beta, threshold=40), center

    def _log_det(self, r: Tensor, alpha: Tensor, s: Tensor) -> Tensor:
        # sums of positive numbers
        around = (self.features - 1) * ((r + s) / (alpha + r)).log()
        return around + ((r * r + 2 * alpha * r + alpha * s) / (alpha + r).square()).log()

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        check_vectors("x", x, self.features, self.center)
        with without_autocast(x.device):
            alpha, s, center = self._parameters_of(x, context)
            offset = x.to(center.dtype) - center
            r = torch.linalg.vector_norm(offset, dim=1)
            y = center + ((r + s) / (alpha + r))[:, None] * offset
            return y.to(x.dtype), self._log_det(r, alpha, s)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        check_vectors("z", z, self.features, self.center)
        with without_autocast(z.device):
            alpha, s, center = self._parameters_of(z, context)
            offset = z.to(center.dtype) - center
            reached = torch.linalg.vector_norm(offset, dim=1)
            half = (reached - s) / 2
            product = alpha * reached
            size = half.abs() + (half * half + product).sqrt()
            # r^2 - 2 half r - product = 0; the form in which no digits cancel
            r = torch.where(half > 0, size, product / size)
            x = center + ((alpha + r) / (r + s))[:, None] * offset
            return x.to(z.dtype), -self._log_det(r, alpha, s)

    def extra_repr(self) -> str:
        return f"{self.features}{described(self.context_weight)}"
