"""Cases of Glow's coupling network."""

from collections.abc import Iterator

import torch

from fastflow.ops.glow_network.op import MAX_COMPILED
from fastflow.ops.spec import Case, Make

HIDDEN = 32
_LIMIT = (
    "for at most {input} channels ({float32} in float32 without TF32) and {hidden} hidden ones, not float64, "
    "and 163 KB of shared memory per block; else PyTorch"
).format(**MAX_COMPILED)
LIMITS = {
    (op, device): limit
    for op in ("glow_network", "glow_network_backward")
    for device, limit in (("cuda", _LIMIT), ("cpu", "for float32 and float64; else PyTorch"))
}


def cases(make: Make, shape: tuple[int, ...]) -> Iterator[Case]:
    """x has the channels of the shape, y twice as many, as in an affine coupling of halves."""
    x, c = make(*shape), shape[1]
    # x 4, nine columns for each channel of y written and read 144, y 8; the tolerance allows for nine reads of x
    # and for the weights, which each tile of pixels reads
    args = x, *_weights(make, c, HIDDEN), False
    yield Case("glow_network", "", args, 156, launches=2, tolerance=1.55)
    # with as many hidden channels as x has: x and dx 8, dy 8, their neighborhoods written 108, columns read
    # 36, hidden activations and their gradients written 16 and read 8
    args = x, *_weights(make, c, c), False, make(shape[0], 2 * c, *shape[2:])
    # gradients of three weights, columns of dx except in half precision; dw3 is copied to w3's layout
    products = *["mm"] * (3 if make.dtype.itemsize == 2 else 4), "sum", "copy_"
    yield Case("glow_network_backward", "", args, 184, launches=4, operations=products, tolerance=2.1)


def _weights(make: Make, c: int, hidden: int) -> tuple[torch.Tensor, ...]:
    def weight(*size: int) -> torch.Tensor:
        w = torch.randn(size) / (size[1] * size[2] * size[3]) ** 0.5
        return w.to(make.dtype).contiguous(memory_format=torch.channels_last)

    return (
        weight(hidden, c, 3, 3),
        make.per_channel(hidden),
        weight(hidden, hidden, 1, 1),
        make.per_channel(hidden),
        weight(2 * c, hidden, 3, 3),
        make.per_channel(2 * c),
    )
