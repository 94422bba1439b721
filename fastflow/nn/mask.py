"""Masks of couplings: which elements of a sample pass through, and which are transformed."""

import math

import torch
from torch import Tensor, nn

from fastflow import validation
from fastflow.ops import checkerboard_transformed
from fastflow.ops.affine_coupling import MASKS


def check_kept(argument: str, value: float | None) -> None:
    """Raise ValueError unless ``value`` is a number of channels, a fraction of them, or None."""
    if value is not None:
        whole = isinstance(value, int)
        expected = "a number of channels, or a fraction of them between 0 and 1"
        validation.number(argument, value, expected, lambda v: v >= 1 if whole else 0 < v < 1)


def kept_of(argument: str, value: float, channels: int) -> int:
    """The number that ``value`` is of so many channels; raises ValueError if one part is empty."""
    kept = value if isinstance(value, int) else math.floor(value * channels)
    if not 1 <= kept < channels:
        got = f"{value!r}, by which {kept} of {channels} channels pass through"
        raise validation.argument_error(argument, got, "at least 1 channel in each part")
    return kept


class Channels:
    """Methods of masks of channels: the transformed part is ``[N, transformed, ...]``."""

    def of_transformed(self, params: Tensor, x: Tensor) -> Tensor:
        """The network's output, for the transformed part only."""
        return params

    def per_element(self, factor: Tensor, x: Tensor) -> Tensor:
        """A factor per transformed channel, for the transformed part."""
        return factor


class Halves(Channels):
    """The first channels pass through, with ``swap_halves`` the last: ``C // 2``, or as ``split`` has it."""

    def __init__(self, split: float | None, swap_halves: bool) -> None:
        self.split, self.swap_halves = split, swap_halves

    def kept(self, x: Tensor) -> int:
        """Number of channels that pass through; raises ValueError if ``split`` leaves one part empty."""
        return x.shape[1] // 2 if self.split is None else kept_of("split", self.split, x.shape[1])

    def network_input(self, x: Tensor) -> Tensor:
        """The part of x that passes through."""
        kept = self.kept(x)
        return x[:, x.shape[1] - kept :] if self.swap_halves else x[:, :kept]

    def taken(self, x: Tensor) -> Tensor:
        """The transformed part of x."""
        kept = self.kept(x)
        return x[:, : x.shape[1] - kept] if self.swap_halves else x[:, kept:]

    def merged(self, x: Tensor, taken: Tensor) -> Tensor:
        """x with ``taken`` as its transformed part."""
        kept = self.network_input(x)
        return torch.cat([taken, kept] if self.swap_halves else [kept, taken], dim=1)

    def channels(self, x: Tensor) -> int:
        """Number of channels that the network's output has parameters of."""
        return x.shape[1] - self.kept(x)


class Positions:
    """Methods of masks of positions: the transformed part is ``[N, number of elements]``.

    The network sees x with zeros in the transformed part, and has parameters of all elements.
    """

    transformed: Tensor  # indices in a flattened sample

    def network_input(self, x: Tensor) -> Tensor:
        return x.flatten(1).index_fill(1, self.transformed, 0).view(x.shape)

    def taken(self, x: Tensor) -> Tensor:
        return x.flatten(1).index_select(1, self.transformed)

    def merged(self, x: Tensor, taken: Tensor) -> Tensor:
        return x.flatten(1).index_copy(1, self.transformed, taken).view(x.shape)

    def channels(self, x: Tensor) -> int:
        return x.shape[1]

    def of_transformed(self, params: Tensor, x: Tensor) -> Tensor:
        each = params.unflatten(1, (-1, x.shape[1])).flatten(2)
        return each.index_select(2, self.transformed).flatten(1)

    def per_element(self, factor: Tensor, x: Tensor) -> Tensor:
        columns = [1] * (x.ndim - 2)
        return factor.view(-1, *columns).expand(x.shape[1:]).flatten().index_select(0, self.transformed)


class Checkerboard(Positions):
    """The positions of a checkerboard in samples like x, see :func:`fastflow.ops.affine_coupling`."""

    def __init__(self, x: Tensor, swap_halves: bool) -> None:
        # one sample, also of an empty batch
        transformed = checkerboard_transformed(x.new_empty((1, *x.shape[1:])), swap_halves).flatten()
        positions = math.prod(x.shape[2:] or x.shape[1:])
        count = positions // 2 if swap_halves else (positions + 1) // 2
        # sorted, because nonzero() waits for a GPU
        order = transformed.int().argsort(descending=True, stable=True)
        self.transformed = order[: count * (transformed.numel() // positions)]


class OwnMask(nn.Module):
    """A mask of one's own: True for elements that pass through. Its indices are in the state dict.

    Raises ValueError for x of another shape.
    """

    kept: Tensor
    transformed: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.shape = tuple(mask.shape)
        self.register_buffer("kept", mask.flatten().nonzero().flatten())
        self.register_buffer("transformed", (~mask).flatten().nonzero().flatten())

    def check(self, x: Tensor) -> None:
        """Raise ValueError unless the mask is a mask of samples like x."""
        sample = tuple(x.shape[1:])
        if self.shape not in (sample, sample[:1]):
            expected = f"{list(sample)}, the shape of a sample, or {list(sample[:1])}, one value per channel"
            raise validation.argument_error("mask", f"shape {list(self.shape)}", expected)

    def extra_repr(self) -> str:
        return f"{self.shape}, {len(self.kept)} pass through"


class OwnChannels(Channels, OwnMask):
    """A mask ``[C]`` of channels."""

    def network_input(self, x: Tensor) -> Tensor:
        self.check(x)
        return x.index_select(1, self.kept)

    def taken(self, x: Tensor) -> Tensor:
        return x.index_select(1, self.transformed)

    def merged(self, x: Tensor, taken: Tensor) -> Tensor:
        return x.index_copy(1, self.transformed, taken)

    def channels(self, x: Tensor) -> int:
        return self.transformed.shape[0]


class OwnPositions(Positions, OwnMask):
    """A mask ``[C, ...]`` of the elements of a sample."""

    def network_input(self, x: Tensor) -> Tensor:
        self.check(x)
        return super().network_input(x)


Parts = Halves | Checkerboard | OwnChannels | OwnPositions


def own_mask(mask: str | Tensor, swap_halves: bool, split: float | None) -> OwnChannels | OwnPositions | None:
    """Check the arguments of a coupling; the module of a mask that is a tensor, None for one of ``MASKS``."""
    validation.boolean("swap_halves", swap_halves)
    check_kept("split", split)
    if split is not None and not (isinstance(mask, str) and mask == "halves"):
        raise validation.argument_error("split", repr(split), "None, as mask is not 'halves'")
    if isinstance(mask, str) and mask in MASKS:
        return None
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = f"a tensor of {mask.dtype}" if isinstance(mask, Tensor) else repr(mask)
        raise validation.argument_error(
            "mask", got, f"one of {', '.join(map(repr, MASKS))}, or a bool tensor"
        )
    if mask.is_meta:
        raise validation.argument_error(
            "mask", "a tensor without values, device meta", "one on another device"
        )
    if mask.ndim == 0 or mask.all() or not mask.any():
        got = f"a tensor of {validation.shape_of(mask)}, of which {int(mask.sum())} are True"
        raise validation.argument_error("mask", got, "[C, ...], with True and with False elements")
    mask = ~mask if swap_halves else mask
    return OwnChannels(mask) if mask.ndim == 1 else OwnPositions(mask)
