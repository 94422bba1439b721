"""Coupling with rational-quadratic splines."""

from typing import Any

from torch import Tensor, nn

from fastflow.nn.elementwise_coupling import ElementwiseCoupling
from fastflow.ops.spline import check_form, parameters_per_element, spline, spline_inverse_backward


class SplineCoupling(ElementwiseCoupling):
    r"""Coupling with monotonic rational-quadratic splines, :math:`y_a = x_a,\; y_b = g(x_b; \mathrm{net}(x_a))`.

    Source: Neural Spline Flows, arXiv:1906.04032, section 3.

    Args:
        net: coupling network, any module. It is called as ``net(x_a)``, or ``net(x_a, context)`` if a context
            is given. Its output has ``SplineCoupling.params_per_element(bins, tails, convention)`` channels for each
            channel of its part, see below; zeros are the identity with the default ``convention``.
        mask, swap_halves, split: as for :class:`AffineCoupling`.
        bins, bound, tails, convention, factor, min_bin, min_slope: see :func:`fastflow.ops.spline`. The networks of
            the paper scale widths and heights by a ``factor`` of :math:`1/\sqrt{\text{hidden}}`.

    Shape: x, y ``[N, C, ...]``; log_det ``[N]``, nats. With ``"halves"`` or a mask ``[C]``, the network maps the k
    channels that pass through, ``[N, k, ...]``, to ``[N, (C - k) P, ...]``: the P parameters of the first transformed
    channel, then those of the second. With C = 1 its input is empty, and the coupling depends on the context only.
    With ``"checkerboard"`` or a mask of a sample's shape, its input ``[N, C, ...]`` is zero where x is transformed, and
    its output is ``[N, C P, ...]``.
    Raises ValueError for other shapes and arguments, as :class:`AffineCoupling` and :func:`fastflow.ops.spline` do.

    Masks of channels are fused. Masks of positions copy the transformed part first.

    Example:
        >>> import torch
        >>> from fastflow import nn as fnn
        >>> net = fnn.MLP(2, 2 * fnn.SplineCoupling.params_per_element(bins=8))
        >>> y, log_det = fnn.SplineCoupling(net, bins=8)(torch.randn(16, 4))
    """

    def __init__(
        self,
        net: nn.Module,
        *,
        mask: str | Tensor = "halves",
        swap_halves: bool = False,
        split: float | None = None,
        bins: int = 8,
        bound: float = 3.0,
        tails: str = "linear",
        convention: str = "fastflow",
        factor: float = 1.0,
        min_bin: float = 1e-3,
        min_slope: float = 1e-3,
    ) -> None:
        super().__init__(net, mask, swap_halves, split)
        check_form(bins, bound, tails, convention, factor, min_bin, min_slope)
        self.bins, self.bound, self.tails, self.convention = bins, bound, tails, convention
        self.factor, self.min_bin, self.min_slope = factor, min_bin, min_slope

    @staticmethod
    def params_per_element(bins: int = 8, tails: str = "linear", convention: str = "fastflow") -> int:
        """Number P of parameters of one spline.

        3 ``bins`` - 1 for linear, 3 ``bins`` for circular, 3 ``bins`` + 1 for no tails; with FrEIA's convention
        3 ``bins`` for linear and 3 ``bins`` + 1 for affine tails.
        """
        return parameters_per_element(bins, tails, convention)

    @property
    def each(self) -> int:
        return parameters_per_element(self.bins, self.tails, self.convention)

    def _form(self) -> dict[str, Any]:
        names = "bins", "bound", "tails", "convention", "factor", "min_bin", "min_slope"
        return {name: getattr(self, name) for name in names}

    def _transform(
        self, v: Tensor, params: Tensor, channels: dict[str, Any], inverse: bool = False
    ) -> tuple[Tensor, Tensor]:
        return spline(v, params, **channels, **self._form(), inverse=inverse)

    def _transform_inverse_backward(
        self, y: Tensor, params: Tensor, dy: Tensor, dlog_det: Tensor, channels: dict[str, Any]
    ) -> tuple[Tensor, Tensor, Tensor]:
        given = {"channel_order": None} | channels
        return spline_inverse_backward(y, params, dy=dy, dlog_det=dlog_det, **given, **self._form())

    def extra_repr(self) -> str:
        form = f"bins={self.bins}, bound={self.bound}, tails={self.tails!r}, convention={self.convention!r}"
        return f"{super().extra_repr()}, {form}"
