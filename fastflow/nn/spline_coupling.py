"""Coupling with rational-quadratic splines."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastflow import validation
from fastflow.nn.elementwise_spline import ElementwiseSpline
from fastflow.nn.flow import Flow
from fastflow.nn.mask import Channels, Checkerboard, Halves, OwnChannels, Parts, own_mask
from fastflow.ops.spline import check_form, parameters_per_element, spline, spline_inverse_backward
from fastflow.reversible import Gradients, vjp
from fastflow.state_from_data import state_from_data


class SplineCoupling(Flow):
    r"""Coupling with monotonic rational-quadratic splines, :math:`y_a = x_a,\; y_b = g(x_b; \mathrm{net}(x_a))`.

    Source: Neural Spline Flows, arXiv:1906.04032, section 3.

    Args:
        net: coupling network, any module. It is called as ``net(x_a)``, or ``net(x_a, context)`` if a context
            is given. Its output has ``SplineCoupling.params_per_element(bins, tails, convention)`` channels for each
            channel of its part, see below; zeros are the identity with the default ``convention``.
        mask, swap_halves, split: as for :class:`AffineCoupling`.
        passing: splines of the part that passes through, applied after the network has read it; with ``"halves"`` only.
            They and those of the coupling have one form, and are computed together.
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
        passing: ElementwiseSpline | None = None,
        bins: int = 8,
        bound: float = 3.0,
        tails: str = "linear",
        convention: str = "fastflow",
        factor: float = 1.0,
        min_bin: float = 1e-3,
        min_slope: float = 1e-3,
    ) -> None:
        super().__init__()
        if not callable(net):
            raise validation.argument_error("net", repr(net), "a module")
        check_form(bins, bound, tails, convention, factor, min_bin, min_slope)
        own = own_mask(mask, swap_halves, split)
        self.net = net
        self.own_mask, self.mask = own, "own" if own is not None else mask
        self.swap_halves, self.split = swap_halves, split
        self.bins, self.bound, self.tails, self.convention = bins, bound, tails, convention
        self.factor, self.min_bin, self.min_slope = factor, min_bin, min_slope
        self.passing = passing
        if passing is not None:
            self._check_passing(passing)

    def _check_passing(self, passing: ElementwiseSpline) -> None:
        if not isinstance(passing, ElementwiseSpline):
            raise validation.argument_error("passing", repr(passing), "an ElementwiseSpline or None")
        if self.mask != "halves":
            raise validation.argument_error(
                "passing", "an ElementwiseSpline", 'None, as mask is not "halves"'
            )
        form = {name: value for name, value in self._form().items() if name != "factor"}
        if passing.form != form or passing.channels < passing.shape[0]:
            raise validation.argument_error("passing", repr(passing), f"splines of all channels, with {form}")

    @staticmethod
    def params_per_element(bins: int = 8, tails: str = "linear", convention: str = "fastflow") -> int:
        """Number P of parameters of one spline.

        3 ``bins`` - 1 for linear, 3 ``bins`` for circular, 3 ``bins`` + 1 for no tails; with FrEIA's convention
        3 ``bins`` for linear and 3 ``bins`` + 1 for affine tails.
        """
        return parameters_per_element(bins, tails, convention)

    def _parts(self, x: Tensor) -> Parts:
        validation.floating_point("x", x)
        if self.own_mask is not None:
            return self.own_mask
        if self.mask == "checkerboard":
            return Checkerboard(x, self.swap_halves)
        return Halves(self.split, self.swap_halves)

    def _form(self) -> dict:
        names = "bins", "bound", "tails", "convention", "factor", "min_bin", "min_slope"
        return {name: getattr(self, name) for name in names}

    def _network(self, parts: Parts, x: Tensor, context: Tensor | None) -> Tensor:
        x_a = parts.network_input(x)
        return self.net(x_a) if context is None else self.net(x_a, context)

    def _operands(self, parts: Parts, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor, dict]:
        """x, parameters and channels of the op: all of x for a mask of channels, else its transformed part."""
        each = parameters_per_element(self.bins, self.tails, self.convention)
        count = parts.channels(x)
        why = f"x is {list(x.shape)}, {each} parameters of each of {count} channels"
        validation.same_shape("params", h, (x.shape[0], each * count, *x.shape[2:]), why)
        if self.passing is not None and self.passing.channels != parts.kept(x):
            got = f"splines of {self.passing.channels} channels"
            expected = f"of the {parts.kept(x)} channels of x {list(x.shape)} that pass through"
            raise validation.argument_error("passing", got, expected)
        if isinstance(parts, Halves):
            return x, h, {"first_channel": 0 if self.swap_halves else parts.kept(x)}
        if isinstance(parts, OwnChannels):
            return x, h, {"channel_order": torch.cat([parts.transformed, parts.kept])}
        # [N, C, P, ...] as [N, C ..., P], of which the transformed elements are taken
        h = h.unflatten(1, (-1, each)).movedim(2, -1).flatten(1, -2).index_select(1, parts.transformed)
        return parts.taken(x), h.flatten(1), {}

    def _together(self, x: Tensor, h: Tensor) -> Tensor:
        """Parameters of all channels: those of ``passing`` and those of the network."""
        passing = self.passing.expanded(x, self.factor)
        return torch.cat([h, passing] if self.swap_halves else [passing, h], dim=1)

    def _pass_inverse(self, parts: Halves, z: Tensor) -> tuple[Tensor, Tensor]:
        """z with the part that passes through as the network reads it, and the log-det."""
        first = z.shape[1] - parts.kept(z) if self.swap_halves else 0
        params = self.passing.expanded(z, self.factor)
        return spline(z, params, first_channel=first, **self._form(), inverse=True)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        parts = self._parts(x)
        v, params, channels = self._operands(parts, x, self._network(parts, x, context))
        if self.passing is not None:
            params, channels = self._together(x, params), {}
        y, log_det = spline(v, params, **channels, **self._form())
        return y if isinstance(parts, Channels) else parts.merged(x, y), log_det

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        parts, log_det_passing = self._parts(z), None
        if self.passing is not None:
            z, log_det_passing = self._pass_inverse(parts, z)
        with state_from_data(False):
            v, params, channels = self._operands(parts, z, self._network(parts, z, context))
        x, log_det = spline(v, params, **channels, **self._form(), inverse=True)
        x = x if isinstance(parts, Channels) else parts.merged(z, x)
        return x, log_det if log_det_passing is None else log_det + log_det_passing

    def inverse_backward(
        self, z: Tensor, dz: Tensor, dlog_det: Tensor, wanted: Sequence[Tensor], context: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Gradients]:
        parts = self._parts(z)
        fused = isinstance(parts, Channels)
        with torch.no_grad():
            read = z if self.passing is None else self._pass_inverse(parts, z)[0]
        with torch.enable_grad():
            read = read.detach().requires_grad_()
            y, params, channels = self._operands(parts, z, self._network(parts, read, context))
            if self.passing is not None:
                params, channels = self._together(z, params), {}
        channel_order = channels.pop("channel_order", None)
        dy = dz if fused else parts.taken(dz)
        x, dx, dparams = spline_inverse_backward(
            y, params.detach(), channel_order, dy, dlog_det, **channels, **self._form()
        )
        if not fused:
            x, dx = parts.merged(z, x), parts.merged(dz, dx)
        gradients = vjp((params,), (dparams,), [read, *wanted])
        dread = gradients.pop(read, None)
        return x, dx if dread is None else dx + dread, gradients

    def extra_repr(self) -> str:
        split = "" if self.split is None else f", split={self.split}"
        form = f"bins={self.bins}, bound={self.bound}, tails={self.tails!r}, convention={self.convention!r}"
        return f"mask={self.mask!r}{split}, swap_halves={self.swap_halves}, {form}"
