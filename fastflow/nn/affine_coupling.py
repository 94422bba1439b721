"""Affine and additive coupling."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastflow import validation
from fastflow.deprecation import renamed_arguments, renamed_property
from fastflow.nn.flow import Flow
from fastflow.ops import checkerboard_transformed
from fastflow.ops.affine_coupling import (
    AFFINE_ORDERS,
    MASKS,
    PARAMS_LAYOUTS,
    SCALES,
    WITH_FACTOR,
    affine_coupling,
    affine_coupling_inverse_backward,
)
from fastflow.reversible import Gradients, vjp
from fastflow.state_from_data import state_from_data

_RENAMED = {"flip": "swap_halves", "order": "affine_order", "h_order": "params_layout"}


class AffineCoupling(Flow):
    r"""Affine coupling, :math:`y_a = x_a,\; y_b = s(h) x_b + t(h),\; h = \mathrm{net}(x_a)`.

    Source: RealNVP, arXiv:1605.08803, eq. 7-8.

    Args:
        net: coupling network, any module. It is called as ``net(x_a)``, or ``net(x_a, context)`` if a context
            is given. With ``mask="halves"`` its input has the shape ``[N, C/2, ...]`` and its output
            ``[N, C, ...]``; of an odd C, ``C // 2`` channels are its input, and the other ``C // 2 + 1`` are
            transformed, so that its output has ``C + 1``. With C = 1 its input is empty, and the coupling
            depends on the context only. With ``"checkerboard"`` its input has the shape ``[N, C, ...]`` and is zero at
            the transformed positions; its output has the shape ``[N, 2C, ...]``.
        mask, swap_halves, affine_order, params_layout: see :func:`fastflow.ops.affine_coupling`.
        scale: scale function s, see :func:`fastflow.ops.affine_coupling`. ``"soft_clamp"`` and ``"tanh"``
            bound :math:`|\log s|` by a learned factor. ``"exp"`` and ``"sigmoid"`` have no lower bound: on
            data unlike the training data, s can be so near zero that the inverse loses digits.
        num_scale_factors: number of learned factors of ``"soft_clamp"`` and ``"tanh"``: 1, or the number of
            transformed channels.

    Shape: x, y ``[N, C, ...]``; log_det ``[N]``, nats.
    Raises ValueError for other shapes, and if the shape of the network's output does not match.
    """

    @renamed_arguments(num_features="num_scale_factors", **_RENAMED)
    def __init__(
        self,
        net: nn.Module,
        *,
        mask: str = "halves",
        swap_halves: bool = False,
        scale: str = "soft_clamp",
        affine_order: str = "scale_first",
        params_layout: str = "shift_scale",
        num_scale_factors: int = 1,
    ) -> None:
        super().__init__()
        if not callable(net):
            raise validation.argument_error("net", repr(net), "a module")
        validation.boolean("swap_halves", swap_halves)
        validation.one_of("mask", mask, MASKS)
        validation.one_of("scale", scale, SCALES)
        validation.one_of("affine_order", affine_order, AFFINE_ORDERS)
        validation.one_of("params_layout", params_layout, PARAMS_LAYOUTS)
        # None is the default of the former name, num_features
        validation.positive_int("num_scale_factors", num_scale_factors, optional=True)
        self.net = net
        self.mask, self.swap_halves, self.scale = mask, swap_halves, scale
        self.affine_order, self.params_layout = affine_order, params_layout
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
        kept = x.shape[1] // 2
        return x[:, x.shape[1] - kept :] if self.swap_halves else x[:, :kept]

    def factor(self, x: Tensor) -> Tensor | None:
        """Factor of the scale function per transformed channel of x; None if the function has none."""
        if self.log_factor is None:
            return None
        transformed = x.shape[1] if self.mask == "checkerboard" else (x.shape[1] + 1) // 2
        factor = self.log_factor.exp()
        return factor.expand(transformed) if factor.shape[0] == 1 else factor

    def _network(self, x: Tensor, context: Tensor | None, shared_args: Sequence[Tensor]) -> Tensor:
        # by keyword: hooks on the network see x and the context only
        further = {"shared_args": shared_args} if shared_args else {}
        return self.net(x, **further) if context is None else self.net(x, context, **further)

    def _factor(self, x: Tensor, shared: Tensor | None) -> Tensor | None:
        return self.factor(x) if shared is None else shared

    def _is_odd(self, x: Tensor) -> bool:
        return self.mask == "halves" and x.shape[1] % 2 == 1

    def _check_odd(self, x: Tensor, h: Tensor) -> None:
        # the op's own check would name the shape of the padded x
        transformed = x.shape[1] // 2 + 1
        size = (x.shape[0], transformed if self.scale == "none" else 2 * transformed, *x.shape[2:])
        why = f"x is {list(x.shape)}, of which {transformed} channels are transformed"
        validation.same_shape("params", h, size, why)

    def _padded(self, x: Tensor) -> Tensor:
        """x with a channel of zeros after the part that passes through, as the op's halves are equal."""
        kept, zeros = x.shape[1] // 2, torch.zeros_like(x[:, :1])
        return torch.cat([x, zeros] if self.swap_halves else [x[:, :kept], zeros, x[:, kept:]], dim=1)

    def _unpadded(self, x: Tensor) -> Tensor:
        """x without that channel."""
        kept = x.shape[1] // 2 - 1
        return x[:, :-1] if self.swap_halves else torch.cat([x[:, :kept], x[:, kept + 1 :]], dim=1)

    def _variant(self) -> dict:
        return {
            "mask": self.mask,
            "swap_halves": self.swap_halves,
            "scale": self.scale,
            "affine_order": self.affine_order,
            "params_layout": self.params_layout,
        }

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        factor: Tensor | None = None,
        *network_args: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """``(y, log_det)``; ``factor`` and further arguments of the network if these are computed already."""
        h = self._network(self.network_input(x), context, network_args)
        factor = self._factor(x, factor)
        if not self._is_odd(x):
            return affine_coupling(x, h, factor, **self._variant())
        self._check_odd(x, h)
        y, log_det = affine_coupling(self._padded(x), h, factor, **self._variant())
        return self._unpadded(y), log_det

    def inverse(
        self,
        z: Tensor,
        context: Tensor | None = None,
        factor: Tensor | None = None,
        *network_args: Tensor,
    ) -> tuple[Tensor, Tensor]:
        with state_from_data(False):
            h = self._network(self.network_input(z), context, network_args)
        factor = self._factor(z, factor)
        if not self._is_odd(z):
            return affine_coupling(z, h, factor, **self._variant(), inverse=True)
        self._check_odd(z, h)
        x, log_det = affine_coupling(self._padded(z), h, factor, **self._variant(), inverse=True)
        return self._unpadded(x), log_det

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
        odd = self._is_odd(z)
        z, dz = (self._padded(z), self._padded(dz)) if odd else (z, dz)
        x, dx, dh, dfactor = affine_coupling_inverse_backward(
            z, h.detach(), None if factor is None else factor.detach(), dz, dlog_det, **self._variant()
        )
        x, dx = (self._unpadded(x), self._unpadded(dx)) if odd else (x, dx)
        gradients = vjp((h, factor), (dh, dfactor), [x_a, *wanted])
        dx_a = gradients.pop(x_a, None)
        if dx_a is not None:
            if self.mask == "halves":
                self.network_input(dx).add_(dx_a)
            else:
                dx.add_(self.network_input(dx_a))
        return x, dx, gradients

    def extra_repr(self) -> str:
        return f"mask={self.mask!r}, swap_halves={self.swap_halves}, scale={self.scale!r}"


class AdditiveCoupling(AffineCoupling):
    r"""Additive coupling, :math:`y_a = x_a,\; y_b = x_b + \mathrm{net}(x_a)` (NICE, arXiv:1410.8516, eq. 4).

    Args:
        net: coupling network as for :class:`AffineCoupling`, with half as many output channels.
        mask, swap_halves: see :func:`fastflow.ops.affine_coupling`.

    Shape: x, y ``[N, C, ...]``; log_det ``[N]``, zeros.
    Raises ValueError for other shapes, and if the shape of the network's output does not match.
    """

    @renamed_arguments(flip="swap_halves")
    def __init__(self, net: nn.Module, *, mask: str = "halves", swap_halves: bool = False) -> None:
        super().__init__(net, mask=mask, swap_halves=swap_halves, scale="none")
