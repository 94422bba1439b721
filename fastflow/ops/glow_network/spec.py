"""Cases of Glow's coupling network."""

from collections.abc import Iterator

import torch

from fastflow.ops.glow_network.op import MAX_COMPILED
from fastflow.ops.spec import Case, Make

HIDDEN = 32
LIMITS = {
    ("glow_network", "cuda"): (
        "for at most {input} channels ({float32} in float32 without TF32) and {hidden} hidden ones, not float64, "
        "and 163 KB of shared memory per block; else PyTorch"
    ).format(**MAX_COMPILED)
}


def cases(make: Make, shape: tuple[int, ...]) -> Iterator[Case]:
    """x has the channels of the shape, y twice as many, as in an affine coupling of halves."""
    c = shape[1]

    def weight(*size: int) -> torch.Tensor:
        w = torch.randn(size) / (size[1] * size[2] * size[3]) ** 0.5
        return w.to(make.dtype).contiguous(memory_format=torch.channels_last)

    weights = (
        weight(HIDDEN, c, 3, 3),
        make.per_channel(HIDDEN),
        weight(HIDDEN, HIDDEN, 1, 1),
        make.per_channel(HIDDEN),
        weight(2 * c, HIDDEN, 3, 3),
        make.per_channel(2 * c),
    )
    # x 4, nine columns for each channel of y written and read 144, y 8; the tolerance allows for nine reads of x
    # and for the weights, which each tile of pixels reads
    yield Case("glow_network", "", (make(*shape), *weights, False), 156, launches=2, tolerance=1.55)
