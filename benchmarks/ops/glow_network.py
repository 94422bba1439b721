"""Times Glow's coupling network: one op, and three convolutions with ReLUs in plain PyTorch.

    python -m benchmarks.ops.glow_network

Rows go to results/glow_network.csv; the shape is N x C x H x W of the input, half the channels of an image. The
output has twice as many channels. Sizes: Glow's levels on 32x32 images, 512 and 128 hidden channels, batches of
512 and 64, channels_last. Products of float32 are not in TF32. On a CPU the op itself is three convolutions, so
only a small size is timed there.
"""

import argparse

import torch
import torch.nn.functional as F

from benchmarks.tools import harness
from fastflow import ops


def convolutions(x, w1, b1, w2, b2, w3, b3):
    h1 = F.relu_(F.conv2d(x, w1, b1, padding=1))
    return F.conv2d(F.relu_(F.conv2d(h1, w2, b2)), w3, b3, padding=1)


def of_size(n: int, c: int, side: int, hidden: int, dtype: torch.dtype) -> harness.Case:
    sizes = ((hidden, c, 3, 3), (hidden, hidden, 1, 1), (2 * c, hidden, 3, 3))

    def inputs():
        x = torch.randn(n, c, side, side).contiguous(memory_format=torch.channels_last)
        parameters = []
        for size in sizes:
            weight = torch.randn(size) / (size[1] * size[2] * size[3]) ** 0.5
            parameters += [weight.contiguous(memory_format=torch.channels_last), torch.randn(size[0])]
        return x, *parameters

    parameters = sum(torch.Size(size).numel() + size[0] for size in sizes)
    return harness.Case(
        name=f"hidden {hidden}",
        shape=f"{n}x{c}x{side}x{side}",
        dtype=dtype,
        layout="channels_last",
        inputs=inputs,
        providers={"eager": convolutions, "fastflow": ops.glow_network},
        bytes_moved=(3 * n * c * side**2 + parameters) * dtype.itemsize,
    )


def cases(options: argparse.Namespace) -> list[harness.Case]:
    if options.quick or options.device == "cpu":
        return [of_size(2, 3, 5, 8, torch.float32)]
    return [
        of_size(n, c, side, hidden, dtype)
        for dtype in (torch.bfloat16, torch.float32)
        for hidden in (512, 128)
        for n in (512, 64)
        for c, side in ((6, 16), (12, 8), (24, 4))
    ]


def main(argv: list[str] | None = None) -> list[dict]:
    return harness.main("glow_network", __doc__, cases, argv)


if __name__ == "__main__":
    main()
