"""Learned splines of the elements of a sample."""

import torch
from torch import Tensor, nn

from fastflow import validation
from fastflow.nn.flow import Flow
from fastflow.ops.spline import check_form, parameters_per_element, spline


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
        self._scales: tuple[tuple | None, Tensor | None] = None, None
        self.params = nn.Parameter(torch.zeros(self.channels * each, *self.shape[1:]))

    def _is_channel(self, value: float) -> bool:
        return isinstance(value, int) and 0 <= value < self.shape[0]

    def expanded(self, x: Tensor, factor: float = 1.0) -> Tensor:
        """Parameters of the op for samples like x, with this ``factor`` as the op's."""
        params = self.params
        if factor != 1:
            params = params * self._scale(factor)
        return params.expand(x.shape[0], *params.shape)

    def _scale(self, factor: float) -> Tensor:
        """What cancels ``factor`` in the raw widths and heights."""
        key = factor, self.params.dtype, self.params.device
        if self._scales[0] != key:
            each, bins = self.params.shape[0] // self.channels, self.form["bins"]
            with torch.inference_mode(False):  # kept for passes that autograd records
                scale = torch.ones(self.channels, each, dtype=key[1], device=key[2])
                scale[:, : 2 * bins] = 1 / factor
                self._scales = key, scale.view(-1, *[1] * (self.params.ndim - 1))
        return self._scales[1]

    def _mapped(self, x: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        validation.floating_point("x", x)
        validation.same_shape("x", x, (x.shape[0], *self.shape), "samples of the layer's shape")
        return spline(x, self.expanded(x), first_channel=self.first_channel, **self.form, inverse=inverse)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._mapped(x, inverse=False)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._mapped(z, inverse=True)

    def extra_repr(self) -> str:
        part = f", channels {self.first_channel} to {self.first_channel + self.channels - 1}"
        form = ", ".join(f"{k}={self.form[k]!r}" for k in ("bins", "bound", "tails", "convention"))
        return f"{list(self.shape)}{part if self.channels < self.shape[0] else ''}, {form}"
