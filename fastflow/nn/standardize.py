"""Standardization by the statistics of a dataset."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastflow import ops, validation
from fastflow.nn.flow import Flow, check_channels
from fastflow.ops.layout import all_but_channels
from fastflow.reversible import Gradients


class Standardize(Flow):
    r"""Fixed standardization, :math:`y = (x - \mu) / \sigma` per feature; the identity until :meth:`fit`.

    The mean :math:`\mu` and the scale :math:`\sigma` are buffers. Only :meth:`fit`, a state dict or an
    assignment changes them: no forward pass does.

    Args:
        num_features: number of features (channels) C.

    Shape: x, y ``[N, C, ...]``; log_det ``[N]``, nats, :math:`-P \sum_c \log \sigma_c` with P the number of
    positions of a sample (1 for a vector).
    Raises ValueError if C differs from ``num_features``, and for a ``num_features`` that is no positive
    integer.

    Example:
        >>> import torch
        >>> from fastflow.nn import Standardize
        >>> x = torch.tensor([1.0, 1000.0]) * torch.randn(500, 2)
        >>> layer = Standardize(2)
        >>> layer.fit(x)
        >>> y, log_det = layer(x)
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, num_features: int) -> None:
        super().__init__()
        validation.positive_int("num_features", num_features)
        self.num_features = num_features
        self.register_buffer("mean", torch.zeros(num_features))
        self.register_buffer("scale", torch.ones(num_features))

    @torch.no_grad()
    def fit(self, x: Tensor) -> None:
        """Set mean and scale to the mean and the standard deviation of each feature of ``x``.

        They are computed in float64. The deviation is that of the samples, with divisor N P. If
        torch.distributed is initialized, pass the same samples on every rank.

        Raises ValueError for an x that is not floating point ``[N, C, ...]``, is empty or not finite, and for
        features that are constant up to rounding; the message lists them.
        """
        check_channels(x, self.num_features)
        validation.floating_point("x", x)
        if not x.numel():
            raise validation.argument_error("x", validation.shape_of(x), "one or more samples")
        if not x.isfinite().all():
            raise validation.argument_error("x", "inf or NaN", "finite numbers")
        var, mean = torch.var_mean(x.double(), all_but_channels(x), correction=0)
        scale, rounding = var.sqrt(), torch.finfo(x.dtype)
        constant = (scale <= rounding.eps * mean.abs() + rounding.tiny).nonzero().flatten().tolist()
        if constant:
            names = f"feature{'s' if len(constant) > 1 else ''} {', '.join(map(str, constant))}"
            raise validation.argument_error("x", f"constant {names}", "features that vary")
        self.mean.copy_(mean)
        self.scale.copy_(scale)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        check_channels(x, self.num_features)
        return ops.actnorm(x, *self._log_scale_and_bias())

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        check_channels(z, self.num_features)
        return ops.actnorm(z, *self._log_scale_and_bias(), inverse=True)

    def inverse_backward(
        self, z: Tensor, dz: Tensor, dlog_det: Tensor, wanted: Sequence[Tensor], context: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Gradients]:
        x, dx, _, _ = ops.actnorm_inverse_backward(z, *self._log_scale_and_bias(), dz, dlog_det)
        return x, dx, {}

    def _log_scale_and_bias(self) -> tuple[Tensor, Tensor]:
        return -torch.log(self.scale), -self.mean

    def extra_repr(self) -> str:
        return f"{self.num_features}"
