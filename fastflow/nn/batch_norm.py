"""Batch normalization as a flow layer."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastflow import ops, validation
from fastflow.nn.flow import Flow, check_channels
from fastflow.ops import positions
from fastflow.ops.layout import all_but_channels, channel_view
from fastflow.reversible import Gradients, is_replay
from fastflow.state_from_data import takes_state_from_data


class BatchNorm(Flow):
    r"""Batch normalization with running statistics, :math:`y = (x - \mu) / \sqrt{v + \epsilon}` per channel.

    Source: RealNVP, arXiv:1605.08803, section 3.7 and appendix E.

    In training mode with gradients enabled, the running mean :math:`\mu` and variance v are updated first,
    with weight :math:`(1 - \rho) / (1 - \rho^t)` for batch t (bias-corrected, so that the first batch sets
    them). The updated values normalize the batch; gradients flow only through the current batch's
    contribution. With :math:`\rho = 0`, :math:`\mu` and v are the statistics of the batch. Eval mode,
    ``torch.no_grad``, an empty batch and the inverse do not update them, so the inverse undoes the last
    forward pass. In a distributed run, each rank has the statistics of its own batches.

    Args:
        num_features: number of channels C.
        momentum: weight :math:`\rho` of the former statistics, in ``[0, 1)``.
        eps: :math:`\epsilon`, added to the variance.

    Shape: x, y ``[N, C, ...]``; log_det ``[N]``, nats, :math:`-\tfrac12 P \sum_c \log(v_c + \epsilon)` with P
    the number of positions of a sample; it treats the statistics as constants.
    Raises ValueError if C differs from ``num_features``, for a momentum outside ``[0, 1)`` and for a negative
    eps. In a reversible chain, call backward before the next forward pass, which updates the statistics;
    otherwise backward raises RuntimeError.
    """

    mean: Tensor
    var: Tensor
    batches: Tensor

    def __init__(self, num_features: int, momentum: float = 0.9, eps: float = 1e-5) -> None:
        super().__init__()
        validation.positive_int("num_features", num_features)
        validation.number("momentum", momentum, "a number from 0 to below 1", lambda v: 0 <= v < 1)
        validation.number("eps", eps, "a number of 0 or more", lambda v: 0 <= v < math.inf)
        self.num_features, self.momentum, self.eps = num_features, momentum, eps
        self.register_buffer("mean", torch.zeros(num_features))
        self.register_buffer("var", torch.ones(num_features))
        self.register_buffer("batches", torch.tensor(0))

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        check_channels(x, self.num_features)
        validation.floating_point("x", x)
        if not self._moves(x):
            return ops.actnorm(x, *self._log_scale_and_bias(self.mean, self.var))
        validation.same_device_and_precision("mean", self.mean, "x", x)
        batch_var, batch_mean = torch.var_mean(x.to(self.mean.dtype), all_but_channels(x), correction=0)
        with torch.no_grad():
            if not (again := is_replay()):
                self.batches.add_(1)
            share = self._share()
            if not again:
                self.mean.lerp_(batch_mean, share)
                self.var.lerp_(batch_var, share)
            new_mean, new_var, share = (
                self._kept(share) if torch.compiler.is_compiling() else (self.mean, self.var, share)
            )
        # the values equal the buffers; the gradient flows through the batch's contribution only
        mean = new_mean + share * (batch_mean - batch_mean.detach())
        var = new_var + share * (batch_var - batch_var.detach())
        return ops.actnorm(x, *self._log_scale_and_bias(mean, var))

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        check_channels(z, self.num_features)
        return ops.actnorm(z, *self._log_scale_and_bias(self.mean, self.var), inverse=True)

    def inverse_backward(
        self, z: Tensor, dz: Tensor, dlog_det: Tensor, wanted: Sequence[Tensor], context: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Gradients]:
        x, dx, dlog_scale, dbias = ops.actnorm_inverse_backward(
            z, *self._log_scale_and_bias(self.mean, self.var), dz, dlog_det
        )
        if self._moves(z):
            each = self._share() / (x.shape[0] * positions(x))
            # dv/dx = 2 (x - mean) / count, and the log scale is -log(v + eps) / 2
            slope = -each * dlog_scale / (self.var + self.eps)
            centered = x - x.mean(all_but_channels(x), keepdim=True)
            dx = (dx - channel_view(each * dbias, x) + channel_view(slope, x) * centered).to(dx.dtype)
        return x, dx, {}

    def _moves(self, x: Tensor) -> bool:
        """Whether the batch updates the running statistics."""
        return takes_state_from_data(self.training) and x.numel() > 0

    def _share(self) -> Tensor:
        return ((1 - self.momentum) / (1 - self.momentum ** self.batches.double())).to(self.mean.dtype)

    def _kept(self, share: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Pass the new statistics and the share through an op that is the identity here.

        torch.compile stores the op's output for backward. Without it, torch.compile recomputes the statistics
        in backward from buffers that have already been updated (torch 2.14).
        """
        values = torch.cat([self.mean, self.var, share.view(1)])
        zeros = torch.zeros_like(values)
        values = ops.actnorm(values.view(1, -1), zeros, zeros)[0].view(-1)
        mean, var, share = values.split([self.num_features, self.num_features, 1])
        return mean, var, share

    def _log_scale_and_bias(self, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
        return -0.5 * torch.log(var + self.eps), -mean

    def extra_repr(self) -> str:
        return f"{self.num_features}, momentum={self.momentum}"
