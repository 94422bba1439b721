"""Times the log-density of a Gaussian prior, one value per sample, and plain PyTorch.

    python -m benchmarks.ops.gaussian

Rows go to results/gaussian.csv; the shape is N x C x H x W of the latent. Cases: the standard Gaussian, and
one with mean and log scale from a network. Samples are not timed: providers draw them from different
generators, so they cannot be compared.
"""

import argparse
import math

import torch

from benchmarks.ops.conv1x1 import LAYOUTS
from benchmarks.tools import harness
from fastflow import ops
from fastflow.ops.spec import bytes_per_element


def standard(z):
    return -0.5 * (z * z + math.log(2 * math.pi)).sum((1, 2, 3))


def conditional(z, mean, log_scale):
    return -(0.5 * (z - mean) ** 2 * torch.exp(-2 * log_scale) + log_scale + 0.5 * math.log(2 * math.pi)).sum(
        (1, 2, 3)
    )


def of_size(n: int, c: int, side: int, layout: str) -> list[harness.Case]:
    def image():
        return torch.randn(n, c, side, side).contiguous(memory_format=LAYOUTS[layout])

    elements = n * c * side * side
    about = {"shape": f"{n}x{c}x{side}x{side}", "dtype": torch.float32, "layout": layout}
    found = []
    for name, variant, eager, tensors in (
        ("standard", "standard", standard, 1),
        ("conditional", "full", conditional, 3),
    ):
        found.append(
            harness.Case(
                name,
                inputs=lambda tensors=tensors: tuple(0.3 * image() for _ in range(tensors)),
                providers={"eager": eager, "fastflow": ops.gaussian_log_prob},
                gradients_of=tuple(range(tensors)),
                bytes_moved=bytes_per_element("gaussian_log_prob", variant) * elements,
                **about,
            )
        )
    return found


def cases(options: argparse.Namespace) -> list[harness.Case]:
    larger = 64 if options.device == "cpu" else 4096
    sizes = [(2, 3, 5)] if options.quick else [(64, 6, 16), (64, 12, 8), (64, 48, 4), (larger, 12, 32)]
    return [case for size in sizes for layout in LAYOUTS for case in of_size(*size, layout)]


def main(argv: list[str] | None = None) -> list[dict]:
    return harness.main("gaussian", __doc__, cases, argv)


if __name__ == "__main__":
    main()
