"""Learned splines of the elements of a sample."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastflow import validation
from fastflow.nn.flow import Flow
from fastflow.ops.spline import check_form, parameters_per_element, spline, spline_inverse_backward
from fastflow.reversible import Gradients


class ElementwiseSpline(Flow):
    r"""A monotonic rational-quadratic spline of each element of a sample, the same for all samples.

    Source: Neural Spline Flows, arXiv:1906.04032, section 3. The splines start as the identity with the default
    ``convention``. Before a Gaussian prior, the layer learns marginal densities.

    Args:
        shape: shape of a sample, or its number of features.
        first_channel, channels: only so many channels are transformed, from the first of them on; the others pass
            through. None: all.
        bins, bound, tails, convention, min_bin, min_slope: see :func:`fastflow.ops.spline`.

    Shape: x, y ``[N, *shape]``; log_det ``[N]``, nats.
    Raises ValueError for another shape of x, and for arguments that :func:`fastflow.ops.spline` refuses.

    Example:
        >>> import torch
        >>> from fastflow import nn as fnn
        >>> y, log_det = fnn.ElementwiseSpline(4)(torch.randn(16, 4))
    """

    def __init__(
        self,
        shape: int | tuple[int, ...],
        *,
        first_channel: int = 0,
        channels: int | None = None,
        bins: int = 8,
        bound: float = 3.0,
        tails: str = "linear",
        convention: str = "fastflow",
        min_bin: float = 1e-3,
        min_slope: float = 1e-3,
    ) -> None:
        super().__init__()
        sample = (shape,) if isinstance(shape, int) else shape
        validation.sample_shape("shape", sample, "a number of features, or the shape of a sample")
        check_form(bins, bound, tails, convention, 1.0, min_bin, min_slope)
        self.shape = tuple(sample)
        validation.number(
            "first_channel", first_channel, f"an index of {sample[0]} channels", self._is_channel
        )
        rest = self.shape[0] - first_channel
        if channels is not None:
            expected = f"a number from 1 to {rest}, as first_channel is {first_channel}"
            validation.number("channels", channels, expected, lambda v: isinstance(v, int) and 1 <= v <= rest)
        self.first_channel, self.channels = first_channel, rest if channels is None else channels
        self.form = {
            "bins": bins,
            "bound": bound,
            "tails": tails,
            "convention": convention,
            "min_bin": min_bin,
            "min_slope": min_slope,
        }
        each = parameters_per_element(bins, tails, convention)
        self.params = nn.Parameter(
            torch.zeros(1, self.channels * each, *self.shape[1:])
        )  # of one sample, for all

    def _is_channel(self, value: float) -> bool:
        return isinstance(value, int) and 0 <= value < self.shape[0]

    def _mapped(self, x: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        validation.floating_point("x", x)
        validation.same_shape("x", x, (x.shape[0], *self.shape), "samples of the layer's shape")
        return spline(x, self.params, first_channel=self.first_channel, **self.form, inverse=inverse)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._mapped(x, inverse=False)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._mapped(z, inverse=True)

    def inverse_backward(
        self, z: Tensor, dz: Tensor, dlog_det: Tensor, wanted: Sequence[Tensor], context: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Gradients]:
        form = {"channel_order": None, "first_channel": self.first_channel} | self.form
        x, dx, dparams = spline_inverse_backward(z, self.params.detach(), dy=dz, dlog_det=dlog_det, **form)
        return x, dx, {self.params: dparams} if any(p is self.params for p in wanted) else {}

    def extra_repr(self) -> str:
        part = f", channels {self.first_channel} to {self.first_channel + self.channels - 1}"
        form = ", ".join(f"{k}={self.form[k]!r}" for k in ("bins", "bound", "tails", "convention"))
        return f"{list(self.shape)}{part if self.channels < self.shape[0] else ''}, {form}"
