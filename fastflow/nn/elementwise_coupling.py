"""The base of couplings with functions of elements that one op computes."""

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastflow import validation
from fastflow.nn.flow import Flow
from fastflow.nn.mask import Channels, Checkerboard, Halves, OwnChannels, Parts, own_mask
from fastflow.reversible import Gradients, vjp
from fastflow.state_from_data import state_from_data


class ElementwiseCoupling(Flow):
    """Coupling of which an op transforms each element by parameters of its own, ``[N, T P, ...]``.

    A subclass has the number P of parameters per element, :attr:`each`, and calls the op. Masks of channels are the
    op's. Masks of positions copy the transformed part first.
    """

    def __init__(self, net: nn.Module, mask: str | Tensor, swap_halves: bool, split: float | None) -> None:
        super().__init__()
        if not callable(net):
            raise validation.argument_error("net", repr(net), "a module")
        own = own_mask(mask, swap_halves, split)
        self.net = net
        self.own_mask, self.mask = own, "own" if own is not None else mask
        self.swap_halves, self.split = swap_halves, split

    @property
    @abstractmethod
    def each(self) -> int:
        """Number of parameters of an element."""
        raise NotImplementedError(f"{type(self).__name__} has no each")

    @abstractmethod
    def _transform(
        self, v: Tensor, params: Tensor, channels: dict, inverse: bool = False
    ) -> tuple[Tensor, Tensor]:
        """The op; ``channels`` are its arguments that name the transformed channels."""
        raise NotImplementedError(f"{type(self).__name__} has no _transform")

    @abstractmethod
    def _transform_inverse_backward(
        self, y: Tensor, params: Tensor, dy: Tensor, dlog_det: Tensor, channels: dict
    ) -> tuple[Tensor, Tensor, Tensor]:
        raise NotImplementedError(f"{type(self).__name__} has no _transform_inverse_backward")

    def _parts(self, x: Tensor) -> Parts:
        validation.floating_point("x", x)
        if self.own_mask is not None:
            return self.own_mask
        if self.mask == "checkerboard":
            return Checkerboard(x, self.swap_halves)
        return Halves(self.split, self.swap_halves)

    def _network(
        self, parts: Parts, x: Tensor, context: Tensor | None, shared_args: Sequence[Tensor]
    ) -> Tensor:
        x_a = parts.network_input(x)
        # by keyword: hooks on the network see x and the context only
        further = {"shared_args": shared_args} if shared_args else {}
        return self.net(x_a, **further) if context is None else self.net(x_a, context, **further)

    def _operands(self, parts: Parts, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor, dict]:
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
        v, params, channels = self._operands(parts, x, self._network(parts, x, context, network_args))
        y, log_det = self._transform(v, params, channels)
        return y if isinstance(parts, Channels) else parts.merged(x, y), log_det

    def inverse(
        self, z: Tensor, context: Tensor | None = None, *network_args: Tensor
    ) -> tuple[Tensor, Tensor]:
        parts = self._parts(z)
        with state_from_data(False):
            operands = self._operands(parts, z, self._network(parts, z, context, network_args))
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
            y, params, channels = self._operands(parts, z, self._network(parts, read, context, network_args))
        dy = dz if fused else parts.taken(dz)
        x, dx, dparams = self._transform_inverse_backward(y, params.detach(), dy, dlog_det, channels)
        if not fused:
            x, dx = parts.merged(z, x), parts.merged(dz, dx)
        gradients = vjp((params,), (dparams,), [read, *wanted])
        dread = gradients.pop(read, None)
        return x, dx if dread is None else dx + dread, gradients

    def extra_repr(self) -> str:
        split = "" if self.split is None else f", split={self.split}"
        return f"mask={self.mask!r}{split}, swap_halves={self.swap_halves}"
