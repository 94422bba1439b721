"""The base of couplings: a network and a mask."""

from collections.abc import Sequence

from torch import Tensor, nn

from fastflow import validation
from fastflow.nn.flow import Flow
from fastflow.nn.mask import Checkerboard, Halves, Parts, own_mask


class MaskedCoupling(Flow):
    """Coupling of which a mask chooses the part that passes through, and a network reads it."""

    def __init__(self, net: nn.Module, mask: str | Tensor, swap_halves: bool, split: float | None) -> None:
        super().__init__()
        if not callable(net):
            raise validation.argument_error("net", repr(net), "a module")
        own = own_mask(mask, swap_halves, split)
        self.net = net
        self.own_mask, self.mask = own, "own" if own is not None else mask
        self.swap_halves, self.split = swap_halves, split

    def _parts(self, x: Tensor) -> Parts:
        if self.own_mask is not None:
            return self.own_mask
        if self.mask == "checkerboard":
            return Checkerboard(x, self.swap_halves)
        return Halves(self.split, self.swap_halves)

    def _network(self, x_a: Tensor, context: Tensor | None, shared_args: Sequence[Tensor] = ()) -> Tensor:
        # by keyword: hooks on the network see x and the context only
        further = {"shared_args": shared_args} if shared_args else {}
        return self.net(x_a, **further) if context is None else self.net(x_a, context, **further)

    def extra_repr(self) -> str:
        split = "" if self.split is None else f"split={self.split}, "
        return f"mask={self.mask!r}, {split}swap_halves={self.swap_halves}"
