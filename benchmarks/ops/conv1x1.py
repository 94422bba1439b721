"""Times the invertible 1x1 convolution and its inverse + backward, and F.conv2d.

    python -m benchmarks.ops.conv1x1

Rows go to results/conv1x1.csv; the shape is N x C x H x W. Gradients are by x, weight and bias. Sizes:
Glow's levels on 32x32 images (C = 12, 24, 48 with 16, 8, 4 pixels per side), and larger images.
"""

import argparse

import torch
import torch.nn.functional as F

from benchmarks.tools import harness
from fastflow import ops, reference
from fastflow.ops.spec import bytes_per_element

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def conv2d(x, weight, bias):
    return F.conv2d(x, weight[:, :, None, None], bias)


def of_size(n: int, c: int, side: int, layout: str) -> list[harness.Case]:
    def image():
        return torch.randn(n, c, side, side).contiguous(memory_format=LAYOUTS[layout])

    def rotation():
        return torch.linalg.qr(torch.randn(c, c)).Q.contiguous()

    def inverse_inputs():
        weight = rotation()
        return image(), weight, weight.mT.contiguous(), torch.randn(c), image()

    elements = n * c * side * side
    about = {"shape": f"{n}x{c}x{side}x{side}", "dtype": torch.float32, "layout": layout}
    return [
        harness.Case(
            name="conv1x1",
            inputs=lambda: (image(), rotation(), torch.randn(c)),
            providers={"eager": conv2d, "fastflow": ops.conv1x1},
            gradients_of=(0, 1, 2),
            bytes_moved=bytes_per_element("conv1x1", "bias") * elements,
            **about,
        ),
        harness.Case(
            name="inverse_backward",
            inputs=inverse_inputs,
            providers={"eager": reference.conv1x1_inverse_backward, "fastflow": ops.conv1x1_inverse_backward},
            bytes_moved=bytes_per_element("conv1x1_inverse_backward") * elements,
            **about,
        ),
    ]


def cases(options: argparse.Namespace) -> list[harness.Case]:
    levels = [(n, c, side) for n in (16, 64) for c, side in ((12, 16), (24, 8), (48, 4))]
    # 200 MB per tensor on a GPU, so that the launch is negligible
    larger = [(64 if options.device == "cpu" else 49152 // c, c, 32) for c in (12, 24, 48)]
    sizes = [(2, 4, 3)] if options.quick else [*levels, *larger]
    return [case for size in sizes for layout in LAYOUTS for case in of_size(*size, layout)]


def main(argv: list[str] | None = None) -> list[dict]:
    return harness.main("conv1x1", __doc__, cases, argv)


if __name__ == "__main__":
    main()
