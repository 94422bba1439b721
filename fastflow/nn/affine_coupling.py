"""Affine and additive coupling."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastflow import check, ops
from fastflow.deprecation import renamed_arguments
from fastflow.nn.flow import Flow
from fastflow.ops import checkerboard_transformed
from fastflow.ops.affine_coupling import H_ORDERS, MASKS, ORDERS, SCALES, WITH_FACTOR
from fastflow.reversible import Gradients, vjp


class AffineCoupling(Flow):
    r"""Affine coupling, :math:`y_a = x_a,\; y_b = s(h) x_b + t(h),\; h = \mathrm{net}(x_a)`.

    Source: RealNVP, arXiv:1605.08803, eq. 7-8.

    Args:
        net: coupling network, any module. It is called as ``net(x_a)``, or ``net(x_a, context)`` if a context
            is given. With ``mask="halves"`` it maps ``[N, C/2, ...]`` to ``[N, C, ...]``. With
            ``"checkerboard"`` it maps ``[N, C, ...]``, zero at the transformed positions, to
            ``[N, 2C, ...]``.
        mask, flip, order, h_order: see :func:`fastflow.ops.affine_coupling`.
        scale: scale function s, see :func:`fastflow.ops.affine_coupling`. ``"soft_clamp"`` and ``"tanh"``
            bound s by their factor. ``"exp"`` and ``"sigmoid"`` have no lower bound: on data unlike the
            training data, s can be so near zero that the inverse loses digits.
        num_scale_factors: number of learned factors of ``"soft_clamp"`` and ``"tanh"``: 1, or the number of
            transformed channels.

    Shape: x, y ``[N, C, ...]``, C even for ``mask="halves"``; log_det ``[N]``, nats.
    Raises ValueError for other shapes, and if the shape of the network's output does not match.
    """

    @renamed_arguments(num_features="num_scale_factors")
    def __init__(
        self,
        net: nn.Module,
        *,
        mask: str = "halves",
        flip: bool = False,
        scale: str = "soft_clamp",
        order: str = "scale_first",
        h_order: str = "shift_scale",
        num_scale_factors: int = 1,
    ) -> None:
        super().__init__()
        check.one_of("mask", mask, MASKS)
        check.one_of("scale", scale, SCALES)
        check.one_of("order", order, ORDERS)
        check.one_of("h_order", h_order, H_ORDERS)
        self.net = net
        self.mask, self.flip, self.scale, self.order, self.h_order = mask, flip, scale, order, h_order
        # the logarithm is the parameter, so that the factor is positive
        # None is the default of the former name, num_features
        factors = torch.zeros(num_scale_factors or 1)
        self.log_factor = nn.Parameter(factors) if scale in WITH_FACTOR else None

    def network_input(self, x: Tensor) -> Tensor:
        """Input of the network: the part of x that passes through, which y has as well."""
        check.floating_point("x", x)
        if self.mask == "checkerboard":
            return x.masked_fill(checkerboard_transformed(x, self.flip), 0)
        if x.shape[1] % 2:
            raise check.argument_error(
                "x", check.shape_of(x), "an even number of channels, to split into halves"
            )
        return x.chunk(2, dim=1)[1 if self.flip else 0]

    def factor(self, x: Tensor) -> Tensor | None:
        """Factor of the scale function per transformed channel of x; None if the function has none."""
        if self.log_factor is None:
            return None
        transformed = x.shape[1] if self.mask == "checkerboard" else x.shape[1] // 2
        factor = self.log_factor.exp()
        return factor.expand(transformed) if factor.shape[0] == 1 else factor

    def _network(self, x: Tensor, context: Tensor | None) -> Tensor:
        return self.net(x) if context is None else self.net(x, context)

    def _variant(self) -> dict:
        return {
            "mask": self.mask,
            "flip": self.flip,
            "scale": self.scale,
            "order": self.order,
            "h_order": self.h_order,
        }

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        h = self._network(self.network_input(x), context)
        return ops.affine_coupling(x, h, self.factor(x), **self._variant())

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        h = self._network(self.network_input(z), context)
        return ops.affine_coupling(z, h, self.factor(z), **self._variant(), inverse=True)

    def inverse_backward(
        self, z: Tensor, dz: Tensor, dlog_det: Tensor, wanted: Sequence[Tensor], context: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Gradients]:
        with torch.enable_grad():
            x_a = self.network_input(z).detach().requires_grad_()
            # a view, because hooks on a module's input do not accept a leaf
            h, factor = self._network(x_a.view_as(x_a), context), self.factor(z)
        x, dx, dh, dfactor = ops.affine_coupling_inverse_backward(
            z, h.detach(), None if factor is None else factor.detach(), dz, dlog_det, **self._variant()
        )
        gradients = vjp((h, factor), (dh, dfactor), [x_a, *wanted])
        dx_a = gradients.pop(x_a, None)
        if dx_a is not None:
            if self.mask == "halves":
                self.network_input(dx).add_(dx_a)
            else:
                dx.add_(self.network_input(dx_a))
        return x, dx, gradients

    def extra_repr(self) -> str:
        return f"mask={self.mask!r}, flip={self.flip}, scale={self.scale!r}"


class AdditiveCoupling(AffineCoupling):
    r"""Additive coupling, :math:`y_a = x_a,\; y_b = x_b + \mathrm{net}(x_a)` (NICE, arXiv:1410.8516, eq. 4).

    Args:
        net: coupling network as for :class:`AffineCoupling`, with half as many output channels.
        mask, flip: see :func:`fastflow.ops.affine_coupling`.

    Shape: x, y ``[N, C, ...]``, C even for ``mask="halves"``; log_det ``[N]``, zeros.
    Raises ValueError for other shapes, and if the shape of the network's output does not match.
    """

    def __init__(self, net: nn.Module, *, mask: str = "halves", flip: bool = False) -> None:
        super().__init__(net, mask=mask, flip=flip, scale="none")
