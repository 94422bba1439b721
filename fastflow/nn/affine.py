"""Learned mean and scale of each channel."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastflow import ops, validation
from fastflow.nn.flow import Flow, check_channels
from fastflow.reversible import Gradients, vjp


class Affine(Flow):
    r"""Elementwise affine flow, :math:`z = e^{-s} (x - t)`, its inverse :math:`x = e^{s} z + t`.

    With a standard Gaussian as prior, t is the mean and :math:`e^s` the standard deviation of x. Both are learned
    from 0, the identity; :class:`ActNorm` starts from the first batch instead.

    Args:
        num_features: number of channels C.

    Shape: x, z ``[N, C, ...]``; log_det ``[N]``, nats, :math:`-P \sum_c s_c` with P the number of positions of a
    sample.
    Raises ValueError if C differs from ``num_features``, and for a ``num_features`` that is no positive integer.

    Example:
        >>> import torch
        >>> from fastflow import nn as fnn
        >>> from fastflow.models import FlowModel
        >>> model = FlowModel(fnn.Affine(2), fnn.GaussianPrior((2,)))
        >>> (-model.log_prob(3 + torch.randn(64, 2)).mean()).backward()
    """

    def __init__(self, num_features: int) -> None:
        super().__init__()
        validation.positive_int("num_features", num_features)
        self.num_features = num_features
        self.log_scale = nn.Parameter(torch.zeros(num_features))
        self.shift = nn.Parameter(torch.zeros(num_features))

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        check_channels(x, self.num_features)
        return ops.actnorm(x, -self.log_scale, -self.shift)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        check_channels(z, self.num_features)
        return ops.actnorm(z, -self.log_scale, -self.shift, inverse=True)

    def inverse_backward(
        self, z: Tensor, dz: Tensor, dlog_det: Tensor, wanted: Sequence[Tensor], context: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Gradients]:
        with torch.enable_grad():
            log_scale, bias = -self.log_scale, -self.shift
        x, dx, *gradients = ops.actnorm_inverse_backward(z, log_scale.detach(), bias.detach(), dz, dlog_det)
        return x, dx, vjp((log_scale, bias), gradients, wanted)

    def extra_repr(self) -> str:
        return f"{self.num_features}"
