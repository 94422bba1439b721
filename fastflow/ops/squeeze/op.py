"""fastflow::squeeze in both directions; each direction is the gradient of the other."""

import torch
from torch import Tensor

from fastflow import validation
from fastflow.ops.registry import register
from fastflow.ops.squeeze import reference

ORDERS = ("channel", "space", "realnvp")


def squeezed_shape(x: Tensor, inverse: bool) -> tuple[int, int, int, int]:
    n, c, h, w = x.shape
    return (n, c // 4, 2 * h, 2 * w) if inverse else (n, 4 * c, h // 2, w // 2)


def check_image(x: Tensor) -> None:
    if x.ndim != 4:
        raise validation.argument_error("x", validation.shape_of(x), "images [N, C, H, W]")


def check_even(x: Tensor) -> None:
    check_image(x)
    if x.shape[2] % 2 or x.shape[3] % 2:
        raise validation.argument_error("x", validation.shape_of(x), "an even height and width")


def _check(argument: str, x: Tensor, order: str, inverse: bool) -> None:
    validation.one_of("order", order, ORDERS)
    if not inverse:
        return check_even(x)
    check_image(x)
    if x.shape[1] % 4:
        raise validation.argument_error(
            argument, validation.shape_of(x), "a number of channels divisible by 4"
        )


def _backward(dy: Tensor, order: str, inverse: bool) -> Tensor:
    return torch.ops.fastflow.squeeze.default(dy, order, not inverse)


register(
    reference.squeeze,
    check=_check,
    triton=True,
    compiled=("cpu",),
    eligible=lambda x, *_: x.dtype != torch.complex128,  # no integer of 16 bytes to move
    outputs="y",
    backward=_backward,
    gradients="x",
    batched="x",
)


def squeeze2d(x: Tensor, order: str = "channel") -> Tensor:
    """Squeeze, 2x2 blocks of pixels to channels (RealNVP, arXiv:1605.08803, section 3.6); its log-det is 0.

    Args:
        x: images of any dtype.
        order: order of the new channels, for input channel c and pixel (i, j) of the block. ``"channel"``:
            (c, i, j), like ``torch.pixel_unshuffle`` and openai/glow; ``"space"``: (i, j, c); ``"realnvp"``:
            (k, c) with the pixels k in the order 00, 11, 01, 10, so that halves of the channels are
            diagonals.

    Shape: ``[N, C, H, W]`` with even H and W to ``[N, 4C, H/2, W/2]``; channels_last stays channels_last.
    Raises ValueError for other shapes and orders.
    """
    return torch.ops.fastflow.squeeze.default(x, order, False)


def unsqueeze2d(x: Tensor, order: str = "channel") -> Tensor:
    """Inverse of :func:`squeeze2d`.

    Shape: ``[N, 4C, H, W]`` to ``[N, C, 2H, 2W]``.
    Raises ValueError for other shapes and orders.
    """
    return torch.ops.fastflow.squeeze.default(x, order, True)
