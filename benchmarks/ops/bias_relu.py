"""Times bias and ReLU, separately and in place after a convolution, and plain PyTorch.

    python -m benchmarks.ops.bias_relu

Rows go to results/bias_relu.csv; the shape is N x C x H x W of the output. The case ``bias_relu`` writes a
new tensor; gradients are by x and the bias. The case ``convolution`` is the first layer of a coupling
network: a 3x3 convolution of 12 channels whose output FastFlow overwrites. Plain PyTorch adds the bias in
the convolution, and then applies the ReLU in place.
"""

import argparse

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.ops.conv1x1 import LAYOUTS
from benchmarks.tools import harness
from fastflow import ops
from fastflow.ops.spec import bytes_per_element


def bias_relu(x, bias):
    return F.relu_(x + bias.view(1, -1, 1, 1))


class Eager(nn.Module):
    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x):
        return F.relu_(self.conv(x))


class Fused(Eager):
    def forward(self, x):
        y = F.conv2d(x, self.conv.weight, padding=self.conv.padding)
        return ops.bias_relu(y, self.conv.bias, inplace=True)


def of_size(n: int, c: int, side: int, layout: str) -> list[harness.Case]:
    def image(channels=c):
        return torch.randn(n, channels, side, side).contiguous(memory_format=LAYOUTS[layout])

    conv = nn.Conv2d(12, c, 3, padding=1).double().to(memory_format=LAYOUTS[layout])
    about = {"shape": f"{n}x{c}x{side}x{side}", "dtype": torch.float32, "layout": layout}
    return [
        harness.Case(
            "bias_relu",
            inputs=lambda: (image(), torch.randn(c)),
            providers={"eager": bias_relu, "fastflow": ops.bias_relu},
            gradients_of=(0, 1),
            bytes_moved=bytes_per_element("bias_relu") * n * c * side * side,
            **about,
        ),
        harness.Case(
            "convolution",
            inputs=lambda: (image(12),),
            providers={"eager": Eager(conv), "fastflow": Fused(conv)},
            gradients_of=(0,),
            **about,
        ),
    ]


def cases(options: argparse.Namespace) -> list[harness.Case]:
    larger = (64, 512, 8) if options.device == "cpu" else (512, 512, 16)
    sizes = [(2, 3, 5)] if options.quick else [(16, 128, 16), larger]
    return [case for size in sizes for layout in LAYOUTS for case in of_size(*size, layout)]


def main(argv: list[str] | None = None) -> list[dict]:
    return harness.main("bias_relu", __doc__, cases, argv)


if __name__ == "__main__":
    main()
