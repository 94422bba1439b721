"""Learned scale of each channel."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastflow import ops, validation
from fastflow.nn.flow import Flow, check_channels
from fastflow.reversible import Gradients, vjp


class Scale(Flow):
    r"""Diagonal scaling, :math:`y = e^{s} x` with one s per channel (NICE, arXiv:1410.8516, section 3.3).

    s is initialized to 0.

    Args:
        num_features: number of channels C.

    Shape: x, y ``[N, C, ...]``; log_det ``[N]``, nats, :math:`P \sum_c s_c` with P the number of positions of
    a sample.
    Raises ValueError if C differs from ``num_features``, and for a ``num_features`` that is no positive
    integer.
    """

    def __init__(self, num_features: int) -> None:
        super().__init__()
        validation.positive_int("num_features", num_features)
        self.num_features = num_features
        self.log_scale = nn.Parameter(torch.zeros(num_features))

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        check_channels(x, self.num_features)
        return ops.actnorm(x, self.log_scale, torch.zeros_like(self.log_scale))

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        check_channels(z, self.num_features)
        return ops.actnorm(z, self.log_scale, torch.zeros_like(self.log_scale), inverse=True)

    def inverse_backward(
        self, z: Tensor, dz: Tensor, dlog_det: Tensor, wanted: Sequence[Tensor], context: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Gradients]:
        with torch.enable_grad():
            log_scale = self.log_scale.view_as(self.log_scale)
        bias = torch.zeros_like(log_scale)
        x, dx, dlog_scale, _ = ops.actnorm_inverse_backward(
            z, log_scale.detach(), bias.detach(), dz, dlog_det
        )
        return x, dx, vjp([log_scale], [dlog_scale], wanted)

    def extra_repr(self) -> str:
        return f"{self.num_features}"
