"""Coupling with any invertible function of the transformed part."""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from fastflow import validation
from fastflow.nn.mask import Parts
from fastflow.nn.masked_coupling import MaskedCoupling
from fastflow.reversible import Gradients, vjp
from fastflow.state_from_data import state_from_data


class Transformer(Protocol):
    """An invertible function of x by parameters h; both directions return the output and the log-det."""

    def __call__(self, x: Tensor, h: Tensor, /) -> tuple[Tensor, Tensor]: ...

    def inverse(self, y: Tensor, h: Tensor, /) -> tuple[Tensor, Tensor]: ...


class Coupling(MaskedCoupling):
    r"""Coupling with a function g, :math:`y_a = x_a,\; y_b = g(x_b; h),\; h = \mathrm{net}(x_a)`.

    Source: NICE, arXiv:1410.8516, section 3.2. :class:`AffineCoupling` and :class:`AdditiveCoupling` are the fused
    couplings of affine and additive g.

    Args:
        net: coupling network, called as ``net(x_a)``, or ``net(x_a, context)`` if a context is given.
        transformer: the function g. ``transformer(x_b, h)`` returns ``(y_b, log_det)``, and
            ``transformer.inverse(y_b, h)`` returns ``(x_b, log_det)`` of the inverse. Parameters of a module are
            parameters of the coupling.
        mask, swap_halves, split: as for :class:`AffineCoupling`.

    Shape: x, y ``[N, C, ...]``; log_det ``[N]``, nats. With ``"halves"`` or a mask ``[C]``, k channels pass through;
    :math:`x_b` is ``[N, C - k, ...]``, and h is the output of the network for ``[N, k, ...]``. With
    ``"checkerboard"`` or a mask of a sample's shape, :math:`x_b` is ``[N, E]``, the E transformed elements. The
    input of the network ``[N, C, ...]`` is zero where x is transformed, and its output is ``[N, P C, ...]``: P
    parameters of each channel, the first of all channels before the second. h is then ``[N, P E]``.
    Raises ValueError for other shapes, as :class:`AffineCoupling` does for masks, and for a transformer whose
    output has another shape.

    Example:
        >>> import torch
        >>> from fastflow import nn as fnn
        >>> class Sinh:
        ...     def __call__(self, x, h):
        ...         y = torch.sinh(torch.asinh(x) + h)
        ...         return y, 0.5 * (torch.log1p(y * y) - torch.log1p(x * x)).flatten(1).sum(1)
        ...     def inverse(self, y, h):
        ...         return self(y, -h)
        >>> layer = fnn.Coupling(fnn.MLP(1, 2), Sinh(), split=1)
        >>> y, log_det = layer(torch.randn(8, 3))
    """

    def __init__(
        self,
        net: nn.Module,
        transformer: Transformer,
        *,
        mask: str | Tensor = "halves",
        swap_halves: bool = False,
        split: float | None = None,
    ) -> None:
        super().__init__(net, mask, swap_halves, split)
        if not callable(transformer) or not callable(getattr(transformer, "inverse", None)):
            expected = "a function of (x, h) with a method inverse(y, h)"
            raise validation.argument_error("transformer", repr(transformer), expected)
        self.transformer = transformer

    def _parts(self, x: Tensor) -> Parts:
        validation.floating_point("x", x)
        return super()._parts(x)

    def _parameters_of(self, parts: Parts, x: Tensor, context: Tensor | None) -> Tensor:
        return parts.of_transformed(self._network(parts.network_input(x), context), x)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        parts = self._parts(x)
        h = self._parameters_of(parts, x, context)
        y_b, log_det = _called(self.transformer, parts.taken(x), h)
        return parts.merged(x, y_b), log_det

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        parts = self._parts(z)
        with state_from_data(False):
            h = self._parameters_of(parts, z, context)
            x_b, log_det = _called(self.transformer.inverse, parts.taken(z), h)
        return parts.merged(z, x_b), log_det

    def inverse_backward(
        self, z: Tensor, dz: Tensor, dlog_det: Tensor, wanted: Sequence[Tensor], context: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Gradients]:
        parts = self._parts(z)
        with torch.enable_grad():
            kept = z.detach().requires_grad_()
            h = self._parameters_of(parts, kept, context)
        with torch.no_grad(), state_from_data(False):
            x_b, _ = _called(self.transformer.inverse, parts.taken(z), h.detach())
        with torch.enable_grad():
            x_b = x_b.detach().requires_grad_()
            y_b, log_det = _called(self.transformer, x_b, h)
        gradients = vjp((y_b, log_det), (parts.taken(dz), dlog_det), [kept, x_b, *wanted])
        dx_b, dkept = gradients.pop(x_b, torch.zeros_like(x_b)), gradients.pop(kept, None)
        dx = parts.merged(dz, dx_b)
        return parts.merged(z, x_b.detach()), dx if dkept is None else dx + dkept, gradients

    def extra_repr(self) -> str:
        function = "" if isinstance(self.transformer, nn.Module) else f"{type(self.transformer).__name__}, "
        return function + super().extra_repr()


def _called(
    function: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], x: Tensor, h: Tensor
) -> tuple[Tensor, Tensor]:
    y, log_det = function(x, h)
    validation.same_shape("transformer's output", y, x.shape, "the shape of its input")
    validation.same_shape("transformer's log_det", log_det, x.shape[:1], "one value per sample")
    return y.to(x.dtype), log_det
