"""Batch normalization as a flow."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastflow import check, ops
from fastflow.nn.flow import Flow, check_channels
from fastflow.ops import positions
from fastflow.reversible import Gradients


class BatchNorm(Flow):
    r"""Batch normalization, :math:`y = (x - \mu) / \sqrt{v + \epsilon}` per channel (RealNVP, arXiv:1605.08803, section 3.7, appendix E).

    In training mode :math:`\mu` and v move towards the batch's mean and variance first, by :math:`(1 - \rho) / (1 - \rho^t)` in the t-th
    batch, so that the first one sets them; the gradient is that of the batch's part. With :math:`\rho = 0` they are the batch's own. In
    eval mode, and in the inverse of both modes, they stay: the inverse takes back the last forward pass.

    Args:
        num_features: C.
        momentum: :math:`\rho`, from 0 to below 1.
        eps: :math:`\epsilon`.

    Shape: x, y ``[N, C, ...]``; log_det ``[N]``, nats, :math:`-\tfrac12 P \sum_c \log(v_c + \epsilon)` with P the positions of a sample:
    the statistics count as constants in it. Raises ValueError when C differs from ``num_features``, for another momentum, and in training
    mode for an empty batch. In a reversible chain backward has to come before the next forward pass, which would move the statistics:
    the chain says so. Each rank of a distributed run has the statistics of its own batches.
    """

    def __init__(self, num_features: int, momentum: float = 0.9, eps: float = 1e-5) -> None:
        super().__init__()
        if not 0 <= momentum < 1:
            raise check.error("momentum", momentum, "a number from 0 to below 1")
        self.num_features, self.momentum, self.eps = num_features, momentum, eps
        self.register_buffer("mean", torch.zeros(num_features))
        self.register_buffer("var", torch.ones(num_features))
        self.register_buffer("batches", torch.tensor(0))

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        check_channels(x, self.num_features)
        check.floating("x", x)
        if not self.training:
            return ops.actnorm(x, *self._terms(self.mean, self.var))
        check.beside("mean", self.mean, "x", x)
        if not x.numel():
            raise check.error("x", check.shape_of(x), "a batch that is not empty, in training mode")
        batch_var, batch_mean = torch.var_mean(x.to(self.mean.dtype), _all_but_channels(x), correction=0)
        with torch.no_grad():
            self.batches.add_(1)
            share = self._share()
            self.mean.lerp_(batch_mean, share)
            self.var.lerp_(batch_var, share)
            new_mean, new_var, share = (
                self._kept(share) if torch.compiler.is_compiling() else (self.mean, self.var, share)
            )
        # the values are the buffers', the gradient is that of the batch's part of them
        mean = new_mean + share * (batch_mean - batch_mean.detach())
        var = new_var + share * (batch_var - batch_var.detach())
        return ops.actnorm(x, *self._terms(mean, var))

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        check_channels(z, self.num_features)
        return ops.actnorm(z, *self._terms(self.mean, self.var), inverse=True)

    def inverse_backward(
        self, z: Tensor, dz: Tensor, dlog_det: Tensor, wanted: Sequence[Tensor], context: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Gradients]:
        x, dx, dlog_scale, dbias = ops.actnorm_inverse_backward(
            z, *self._terms(self.mean, self.var), dz, dlog_det
        )
        if self.training:
            each = self._share() / (x.shape[0] * positions(x))
            slope = (
                -each * dlog_scale / (self.var + self.eps)
            )  # of v in x: 2 (x - mean) / count, and v counts half in the log scale
            columns = [-1, *[1] * (x.ndim - 2)]
            centred = x - x.mean(_all_but_channels(x), keepdim=True)
            dx = (dx - (each * dbias).view(columns) + slope.view(columns) * centred).to(dx.dtype)
        return x, dx, {}

    def _share(self) -> Tensor:
        return ((1 - self.momentum) / (1 - self.momentum ** self.batches.double())).to(self.mean.dtype)

    def _kept(self, share: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The new statistics and the share by way of an op, here the identity, whose output torch.compile keeps for backward: what it
        computes there again starts from buffers that have moved by then, and gave the share of the next batch (torch 2.14)."""
        values = torch.cat([self.mean, self.var, share.view(1)])
        zeros = torch.zeros_like(values)
        return (
            ops.actnorm(values.view(1, -1), zeros, zeros)[0]
            .view(-1)
            .split([self.num_features, self.num_features, 1])
        )

    def _terms(self, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
        return -0.5 * torch.log(var + self.eps), -mean

    def extra_repr(self) -> str:
        return f"{self.num_features}, momentum={self.momentum}"


def _all_but_channels(x: Tensor) -> list[int]:
    return [d for d in range(x.ndim) if d != 1]
