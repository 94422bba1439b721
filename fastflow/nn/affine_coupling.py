"""Affine and additive coupling."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastflow import validation
from fastflow.deprecation import renamed_arguments, renamed_property
from fastflow.nn.mask import Halves, OwnChannels, Positions
from fastflow.nn.masked_coupling import MaskedCoupling
from fastflow.ops import checkerboard_transformed
from fastflow.ops.affine_coupling import (
    AFFINE_ORDERS,
    PARAMS_LAYOUTS,
    SCALES,
    WITH_FACTOR,
    affine_coupling,
    affine_coupling_inverse_backward,
)
from fastflow.ops.affine_coupling.reference import split_h
from fastflow.reversible import Gradients, vjp
from fastflow.state_from_data import state_from_data

_RENAMED = {"flip": "swap_halves", "order": "affine_order", "h_order": "params_layout"}


class AffineCoupling(MaskedCoupling):
    r"""Affine coupling, :math:`y_a = x_a,\; y_b = s(h) x_b + t(h),\; h = \mathrm{net}(x_a)`.

    Source: RealNVP, arXiv:1605.08803, eq. 7-8.

    Args:
        net: coupling network, any module. It is called as ``net(x_a)``, or ``net(x_a, context)`` if a context
            is given. Its input and its output depend on the mask, see below.
        mask: ``"halves"``, ``"checkerboard"``, or a bool tensor, which is True for the part that passes through, as
            b in RealNVP: ``[C]`` for channels, or the shape of a sample. Its indices are in the state dict.
        swap_halves: swap the part that passes through and the part that is transformed.
        split: with ``"halves"``, the number of channels that pass through, or a fraction of them, rounded down;
            None: ``C // 2``. These are the first channels, with ``swap_halves`` the last.
        affine_order, params_layout: see :func:`fastflow.ops.affine_coupling`.
        scale: scale function s, see :func:`fastflow.ops.affine_coupling`. ``"soft_clamp"`` and ``"tanh"``
            bound :math:`|\log s|` by a learned factor. ``"exp"`` and ``"sigmoid"`` have no lower bound: on
            data unlike the training data, s can be so near zero that the inverse loses digits.
        num_scale_factors: number of learned factors of ``"soft_clamp"`` and ``"tanh"``: 1, or the number of
            transformed channels.

    Shape: x, y ``[N, C, ...]``; log_det ``[N]``, nats. With ``"halves"`` or a mask ``[C]``, the network maps the
    k channels that pass through, ``[N, k, ...]``, to ``[N, 2 (C - k), ...]``. With C = 1 its input is empty, and
    the coupling depends on the context only. With ``"checkerboard"`` or a mask of a sample's shape, its input
    ``[N, C, ...]`` is zero where x is transformed, and its output is ``[N, 2C, ...]``.
    Raises ValueError for other shapes, for a mask without both values, for a ``split`` that leaves no channels
    in one part, and if the shape of the network's output does not match.

    Two equal halves and checkerboards are fused. Other masks copy the transformed part first.
    """

    @renamed_arguments(num_features="num_scale_factors", **_RENAMED)
    def __init__(
        self,
        net: nn.Module,
        *,
        mask: str | Tensor = "halves",
        swap_halves: bool = False,
        split: float | None = None,
        scale: str = "soft_clamp",
        affine_order: str = "scale_first",
        params_layout: str = "shift_scale",
        num_scale_factors: int = 1,
    ) -> None:
        super().__init__(net, mask, swap_halves, split)
        validation.one_of("scale", scale, SCALES)
        validation.one_of("affine_order", affine_order, AFFINE_ORDERS)
        validation.one_of("params_layout", params_layout, PARAMS_LAYOUTS)
        # None is the default of the former name, num_features
        validation.positive_int("num_scale_factors", num_scale_factors, optional=True)
        self.scale, self.affine_order, self.params_layout = scale, affine_order, params_layout
        # the logarithm is the parameter, so that the factor is positive
        factors = torch.zeros(num_scale_factors or 1)
        self.log_factor = nn.Parameter(factors) if scale in WITH_FACTOR else None

    flip = renamed_property("flip", "swap_halves")
    order = renamed_property("order", "affine_order")
    h_order = renamed_property("h_order", "params_layout")

    def network_input(self, x: Tensor) -> Tensor:
        """Input of the network: the part of x that the coupling does not change."""
        validation.floating_point("x", x)
        if self.mask == "checkerboard":
            return x.masked_fill(checkerboard_transformed(x, self.swap_halves), 0)
        return self._parts(x).network_input(x)

    def factor(self, x: Tensor) -> Tensor | None:
        """Factor of the scale function per transformed channel of x; None if the function has none."""
        if self.log_factor is None:
            return None
        factor = self.log_factor.exp()
        if factor.shape[0] > 1:
            return factor
        return factor.expand(x.shape[1] if self.mask == "checkerboard" else self._parts(x).channels(x))

    def _factor(self, x: Tensor, shared: Tensor | None) -> Tensor | None:
        return self.factor(x) if shared is None else shared

    def _is_direct(self, x: Tensor) -> bool:
        """Whether the op takes x as it is: it has the mask, and its halves are equal."""
        if self.mask == "checkerboard":
            return True
        parts = self._parts(x)
        return isinstance(parts, Halves) and 2 * parts.kept(x) == x.shape[1]

    def _taken(self, x: Tensor, h: Tensor, factor: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """x, h and factor of the op for the transformed part of x, after as many channels of zeros."""
        parts = self._parts(x)
        channels, each = parts.channels(x), 1 if self.scale == "none" else 2
        # the op's own check would name the shape of its own x
        size = (x.shape[0], each * channels, *x.shape[2:])
        why = f"x is {list(x.shape)}, {'shift' if each == 1 else 'shift and scale'} of {channels} channels"
        validation.same_shape("params", h, size, why)
        if factor is not None:
            validation.channels("factor", factor, channels, "one for each transformed channel")
            factor = parts.per_element(factor, x)
        if self.params_layout == "interleaved" and isinstance(parts, Positions):
            h = torch.cat(split_h(h, "interleaved"), dim=1)
        return _after_zeros(parts.taken(x)), parts.of_transformed(h, x), factor

    def _merged(self, x: Tensor, taken: Tensor) -> Tensor:
        """x with the second half of ``taken`` as its transformed part."""
        return self._parts(x).merged(x, taken[:, taken.shape[1] // 2 :])

    def _variant(self, direct: bool) -> dict[str, Any]:
        form = {"scale": self.scale, "affine_order": self.affine_order, "params_layout": self.params_layout}
        if direct:
            return {"mask": self.mask, "swap_halves": self.swap_halves} | form
        if isinstance(self.own_mask, Positions) and self.params_layout == "interleaved":
            return form | {"params_layout": "shift_scale"}
        return form

    def _couple(
        self, x: Tensor, h: Tensor, factor: Tensor | None, inverse: bool = False
    ) -> tuple[Tensor, Tensor]:
        if self._is_direct(x):
            return affine_coupling(x, h, factor, **self._variant(True), inverse=inverse)
        y, log_det = affine_coupling(*self._taken(x, h, factor), **self._variant(False), inverse=inverse)
        return self._merged(x, y), log_det

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        factor: Tensor | None = None,
        *network_args: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """``(y, log_det)``; ``factor`` and further arguments of the network if these are computed already."""
        h = self._network(self.network_input(x), context, network_args)
        return self._couple(x, h, self._factor(x, factor))

    def inverse(
        self,
        z: Tensor,
        context: Tensor | None = None,
        factor: Tensor | None = None,
        *network_args: Tensor,
    ) -> tuple[Tensor, Tensor]:
        with state_from_data(False):
            h = self._network(self.network_input(z), context, network_args)
        return self._couple(z, h, self._factor(z, factor), inverse=True)

    def inverse_backward(
        self,
        z: Tensor,
        dz: Tensor,
        dlog_det: Tensor,
        wanted: Sequence[Tensor],
        context: Tensor | None = None,
        factor: Tensor | None = None,
        *network_args: Tensor,
    ) -> tuple[Tensor, Tensor, Gradients]:
        with torch.enable_grad():
            x_a = self.network_input(z).detach().requires_grad_()
            # a view, because hooks on a module's input do not accept a leaf
            h = self._network(x_a.view_as(x_a), context, network_args)
            factor = self._factor(z, factor)
            direct = self._is_direct(z)
            y, h, factor = (z, h, factor) if direct else self._taken(z, h, factor)
        x, dx, dh, dfactor = affine_coupling_inverse_backward(
            y,
            h.detach(),
            None if factor is None else factor.detach(),
            dz if direct else _after_zeros(self._parts(z).taken(dz)),
            dlog_det,
            **self._variant(direct),
        )
        x, dx = (x, dx) if direct else (self._merged(z, x), self._merged(dz, dx))
        gradients = vjp((h, factor), (dh, dfactor), [x_a, *wanted])
        dx_a = gradients.pop(x_a, None)
        if dx_a is not None:
            if self.mask == "halves":
                self.network_input(dx).add_(dx_a)
            elif isinstance(self.own_mask, OwnChannels):
                dx = dx.index_add(1, self.own_mask.kept, dx_a)
            else:
                dx.add_(self.network_input(dx_a))
        return x, dx, gradients

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, scale={self.scale!r}"


def _after_zeros(x: Tensor) -> Tensor:
    """x after as many channels of zeros: the op's halves are equal."""
    return torch.cat([torch.zeros_like(x), x], dim=1)


class AdditiveCoupling(AffineCoupling):
    r"""Additive coupling, :math:`y_a = x_a,\; y_b = x_b + \mathrm{net}(x_a)` (NICE, arXiv:1410.8516, eq. 4).

    Args:
        net: coupling network as for :class:`AffineCoupling`, with half as many output channels.
        mask, swap_halves, split: as for :class:`AffineCoupling`.

    Shape: x, y ``[N, C, ...]``; log_det ``[N]``, zeros.
    Raises ValueError as :class:`AffineCoupling` does.
    """

    @renamed_arguments(flip="swap_halves")
    def __init__(
        self,
        net: nn.Module,
        *,
        mask: str | Tensor = "halves",
        swap_halves: bool = False,
        split: float | None = None,
    ) -> None:
        super().__init__(net, mask=mask, swap_halves=swap_halves, split=split, scale="none")
