"""Times the ways to compute Glow's coupling network.

    python -m benchmarks.ops.glow_network

Rows go to results/glow_network.csv; the shape is N x C x H x W of the input, half the channels of an image. The
output has twice as many channels. Providers: three convolutions with ReLUs in plain PyTorch; the op; the plain way
of FastFlow's network, convolutions and ``bias_relu``; im2col and col2im around matrix products. Sizes: Glow's
levels on 32x32 images in bfloat16 with 512 hidden channels and batches of 512 and 64; for a batch of 64 also 128
channels, and float32 without TF32. The memory format matters for convolutions, so that these are timed in both. On a
CPU the op itself is three convolutions, so only a small size is timed there.

``benchmarks.tools.fastest_networks`` makes the table that ``network="auto"`` reads from the rows.
"""

import argparse
import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.tools import harness
from fastflow import ops

PLAIN = "fastflow, convolutions"
# Large biases of either sign: no ReLU is so near zero that rounding of half precision decides about its gradient.
BIASES = (6.0, 24.0, 1.0)


def convolutions(x, w1, b1, w2, b2, w3, b3):
    h1 = F.relu_(F.conv2d(x, w1, b1, padding=1))
    return F.conv2d(F.relu_(F.conv2d(h1, w2, b2)), w3, b3, padding=1)


def convolutions_and_bias_relu(x, w1, b1, w2, b2, w3, b3):
    """As ``GlowNetwork`` with ``network="plain"``; log scales of 0 take the time of others."""
    h1 = ops.bias_relu(F.conv2d(x, w1, padding=1), b1, zeros_like(b1), inplace=True)
    h2 = ops.bias_relu(F.conv2d(h1, w2), b2, zeros_like(b2), inplace=True)
    return ops.bias_relu(F.conv2d(h2, w3, padding=1), b3, zeros_like(b3), relu=False, inplace=True)


def zeros_like(b: Tensor) -> Tensor:
    return _zeros(b.shape, b.dtype, b.device)


@functools.cache
def _zeros(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


def im2col(x, w1, b1, w2, b2, w3, b3):
    n, c, height, width = x.shape
    hidden, outputs = w3.shape[1], w3.shape[0]
    neighbours = F.pad(x, (1, 1, 1, 1)).unfold(2, 3, 1).unfold(3, 3, 1)  # [N, C, H, W, 3, 3]
    columns = neighbours.permute(0, 2, 3, 4, 5, 1).reshape(n * height * width, 9 * c)
    h1 = F.relu_(torch.addmm(b1, columns, w1.permute(0, 2, 3, 1).reshape(hidden, 9 * c).t()))
    h2 = F.relu_(torch.addmm(b2, h1, w2.flatten(1).t()))
    columns = h2 @ w3.permute(1, 2, 3, 0).reshape(hidden, 9 * outputs)
    # each pixel adds of its neighbours the columns of the tap at which the neighbour is: one sum over a view
    columns = F.pad(columns.view(n, height, width, 9 * outputs), (0, 0, 1, 1, 1, 1))
    sample, row, column, _ = columns.stride()
    taps = columns.as_strided(
        (n, height, width, 3, 3, outputs),
        (sample, row, column, row + 3 * outputs, column + outputs, 1),
    )
    return (taps.sum((3, 4)) + b3).permute(0, 3, 1, 2)


def of_size(n: int, c: int, side: int, hidden: int, dtype: torch.dtype, layout: str) -> harness.Case:
    sizes = ((hidden, c, 3, 3), (hidden, hidden, 1, 1), (2 * c, hidden, 3, 3))
    memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format

    def inputs():
        x = torch.randn(n, c, side, side).contiguous(memory_format=memory_format)
        parameters = []
        for size, bias in zip(sizes, BIASES, strict=True):
            weight = torch.randn(size) / (size[1] * size[2] * size[3]) ** 0.5
            b = bias * (2 * torch.randint(2, size[:1]) - 1)
            parameters += [weight.contiguous(memory_format=memory_format), b.float()]
        return x, *parameters

    providers: dict[str, Callable] = {"eager": convolutions, PLAIN: convolutions_and_bias_relu}
    if layout == "channels_last":
        providers |= {"fastflow": ops.glow_network, "im2col": im2col}
    parameters = sum(torch.Size(size).numel() + size[0] for size in sizes)
    return harness.Case(
        name=f"hidden {hidden}",
        shape=f"{n}x{c}x{side}x{side}",
        dtype=dtype,
        layout=layout,
        inputs=inputs,
        providers=providers,
        gradients_of=tuple(range(7)),
        bytes_moved=(3 * n * c * side**2 + parameters) * dtype.itemsize,
    )


def cases(options: argparse.Namespace) -> list[harness.Case]:
    layouts = ("channels_last", "contiguous")
    if options.quick or options.device == "cpu":
        return [of_size(2, 3, 5, 8, torch.float32, layout) for layout in layouts]
    sizes = [(torch.bfloat16, 512, 512), (torch.bfloat16, 512, 64), (torch.bfloat16, 128, 64)]
    return [
        of_size(n, c, side, hidden, dtype, layout)
        for dtype, hidden, n in [*sizes, (torch.float32, 512, 64)]
        for c, side in ((6, 16), (12, 8), (24, 4))
        for layout in layouts
    ]


def main(argv: list[str] | None = None) -> list[dict]:
    return harness.main("glow_network", __doc__, cases, argv)


if __name__ == "__main__":
    main()
