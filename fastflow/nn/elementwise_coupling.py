"""The base of couplings with functions of elements that one op computes."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastflow import validation
from fastflow.nn.mask import Channels, Halves, OwnChannels, Parts
from fastflow.nn.masked_coupling import MaskedCoupling
from fastflow.reversible import Gradients, vjp
from fastflow.state_from_data import state_from_data


class ElementwiseCoupling(MaskedCoupling):
    """Coupling of which an op transforms each element by parameters of its own, ``[N, T P, ...]``.

    A subclass has the number P of parameters per element, :attr:`each`, and calls the op. Masks of channels are the
    op's. Masks of positions copy the transformed part first.
    """

    @property
    @abstractmethod
    def each(self) -> int:
        """Number of parameters of an element."""
        raise NotImplementedError(f"{type(self).__name__} has no each")

    @abstractmethod
    def _transform(
        self, v: Tensor, params: Tensor, channels: dict[str, Any], inverse: bool = False
    ) -> tuple[Tensor, Tensor]:
        """The op; ``channels`` are its arguments that name the transformed channels."""
        raise NotImplementedError(f"{type(self).__name__} has no _transform")

    @abstractmethod
    def _transform_inverse_backward(
        self, y: Tensor, params: Tensor, dy: Tensor, dlog_det: Tensor, channels: dict[str, Any]
    ) -> tuple[Tensor, Tensor, Tensor]:
        raise NotImplementedError(f"{type(self).__name__} has no _transform_inverse_backward")

    def _parts(self, x: Tensor) -> Parts:
        validation.floating_point("x", x)
        return super()._parts(x)

    def _operands(self, parts: Parts, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """x, parameters and channels of the op: all of x for a mask of channels, else its transformed part."""
        each = self.each
        count = parts.channels(x)
        why = f"x is {list(x.shape)}, {each} parameters of each of {count} channels"
        validation.same_shape("params", h, (x.shape[0], each * count, *x.shape[2:]), why)
        if isinstance(parts, Halves):
            return x, h, {"first_channel": 0 if self.swap_halves else parts.kept(x)}
        if isinstance(parts, OwnChannels):
            return x, h, {"channel_order": torch.cat([parts.transformed, parts.kept])}
        # [N, C, P, ...] as [N, C ..., P], of which the transformed elements are taken
        h = h.unflatten(1, (-1, each)).movedim(2, -1).flatten(1, -2).index_select(1, parts.transformed)
        return parts.taken(x), h.flatten(1), {}

    def forward(
        self, x: Tensor, context: Tensor | None = None, *network_args: Tensor
    ) -> tuple[Tensor, Tensor]:
        """``(y, log_det)``; ``network_args`` are further arguments of the network if these are computed already."""
        parts = self._parts(x)
        v, params, channels = self._operands(
            parts, x, self._network(parts.network_input(x), context, network_args)
        )
        y, log_det = self._transform(v, params, channels)
        return y if isinstance(parts, Channels) else parts.merged(x, y), log_det

    def inverse(
        self, z: Tensor, context: Tensor | None = None, *network_args: Tensor
    ) -> tuple[Tensor, Tensor]:
        parts = self._parts(z)
        with state_from_data(False):
            operands = self._operands(parts, z, self._network(parts.network_input(z), context, network_args))
        x, log_det = self._transform(*operands, inverse=True)
        return x if isinstance(parts, Channels) else parts.merged(z, x), log_det

    def inverse_backward(
        self,
        z: Tensor,
        dz: Tensor,
        dlog_det: Tensor,
        wanted: Sequence[Tensor],
        context: Tensor | None = None,
        *network_args: Tensor,
    ) -> tuple[Tensor, Tensor, Gradients]:
        parts = self._parts(z)
        fused = isinstance(parts, Channels)
        with torch.enable_grad():
            read = z.detach().requires_grad_()
            h = self._network(parts.network_input(read), context, network_args)
            y, params, channels = self._operands(parts, z, h)
        dy = dz if fused else parts.taken(dz)
        x, dx, dparams = self._transform_inverse_backward(y, params.detach(), dy, dlog_det, channels)
        if not fused:
            x, dx = parts.merged(z, x), parts.merged(dz, dx)
        gradients = vjp((params,), (dparams,), [read, *wanted])
        dread = gradients.pop(read, None)
        return x, dx if dread is None else dx + dread, gradients
