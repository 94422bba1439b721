"""The context of a coupling network, as further channels of its input."""

import torch
from torch import Tensor

from fastflow import ops, validation


def check_features(argument: str, value: int, context_features: int | None) -> None:
    """Raise ValueError unless the number of input features is positive, or 0 with a context."""
    validation.positive_int("context_features", context_features, optional=True)
    if context_features is None or value != 0:
        validation.positive_int(argument, value)


def with_context(x: Tensor, context: Tensor | None, context_features: int | None) -> Tensor:
    """x and, after it along the channels, the context.

    A vector is repeated at every position of an image x. An image twice, four, ... times as large as x is
    squeezed (order ``"channel"``) to the size of x, which multiplies its channels by 4, 16, ...

    Shape: x ``[N, C, ...]``; context ``[N, context_features]``, or of an image with that many channels after it
    is squeezed. Raises ValueError for another context.
    """
    context = checked_context(x, context, context_features)
    return x if context is None else torch.cat([x, context], dim=1)


def checked_context(x: Tensor, context: Tensor | None, context_features: int | None) -> Tensor | None:
    """The context as it is concatenated to x, see :func:`with_context`; None without ``context_features``."""
    if context_features is None:
        if context is None:
            return None
        got = f"a tensor of {validation.shape_of(context)}"
        raise validation.argument_error("context", got, "None: the network has no context_features")
    n, _, *sides = x.shape
    expected = f"[{n}, {context_features}]"
    if sides:
        expected += (
            f", or an image that is [{', '.join(map(str, (n, context_features, *sides)))}] after squeezes"
        )
    if context is None:
        raise validation.argument_error("context", "None", expected)
    given = context
    if sides and context.ndim == 2:
        context = context.view(*context.shape, *[1] * len(sides)).expand(*context.shape, *sides)
    while len(sides) == 2 and context.ndim == 4 and _is_twice(context.shape[2:], sides):
        context = ops.squeeze2d(context)
    if tuple(context.shape) != (n, context_features, *sides):
        raise validation.argument_error("context", validation.shape_of(given), expected)
    if not context.is_floating_point():
        raise validation.argument_error("context", f"dtype {context.dtype}", "floating point")
    return context


def _is_twice(size: torch.Size, sides: list[int]) -> bool:
    """Whether halves of an image's size are at least as large as x, so that it can be squeezed."""
    return all(a % 2 == 0 and a >= 2 * b > 0 for a, b in zip(size, sides, strict=True))


def tiled(context: Tensor, n: int) -> Tensor:
    """The rows of a context, repeated as a whole so that there are ``n``: sample i has row i mod N."""
    if context.shape[0] == n:
        return context
    repeats = n // max(context.shape[0], 1)
    return context.expand(repeats, *context.shape).flatten(0, 1)
