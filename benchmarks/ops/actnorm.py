"""Times ActNorm, its inverse, its inverse + backward and its statistics, and the formulas in plain PyTorch.

    python -m benchmarks.ops.actnorm

Rows go to results/actnorm.csv; the shape is N x C x H x W of x. Gradients are by x, the log scale and the
bias. Sizes: Glow's levels on 32x32 images (C = 12, 24, 48 with 16, 8, 4 pixels per side), and larger
images.
"""

import argparse
import functools

import torch

from benchmarks.ops.conv1x1 import LAYOUTS
from benchmarks.tools import harness
from fastflow import ops, reference
from fastflow.ops.spec import bytes_per_element


def actnorm(x, log_scale, bias):
    return log_scale.exp().view(1, -1, 1, 1) * (x + bias.view(1, -1, 1, 1)), (
        x.shape[2] * x.shape[3] * log_scale.sum()
    ).expand(len(x))


def inverse(z, log_scale, bias):
    return z * torch.exp(-log_scale).view(1, -1, 1, 1) - bias.view(1, -1, 1, 1), (
        -z.shape[2] * z.shape[3] * log_scale.sum()
    ).expand(len(z))


def statistics(x):
    var, mean = torch.var_mean(x, (0, 2, 3), correction=0)
    return mean, var


def of_size(n: int, c: int, side: int, layout: str) -> list[harness.Case]:
    def image():
        return torch.randn(n, c, side, side).contiguous(memory_format=LAYOUTS[layout])

    def parameters():
        return 0.1 * torch.randn(c), torch.randn(c)

    elements = n * c * side * side
    about = {"shape": f"{n}x{c}x{side}x{side}", "dtype": torch.float32, "layout": layout}
    inputs = {
        "inputs": lambda: (image(), *parameters()),
        "gradients_of": (0, 1, 2),
        "bytes_moved": bytes_per_element("actnorm", "forward") * elements,
    }
    return [
        harness.Case("actnorm", providers={"eager": actnorm, "fastflow": ops.actnorm}, **inputs, **about),
        harness.Case(
            "inverse",
            providers={"eager": inverse, "fastflow": functools.partial(ops.actnorm, inverse=True)},
            **inputs,
            **about,
        ),
        harness.Case(
            "inverse_backward",
            inputs=lambda: (image(), *parameters(), image(), torch.randn(n)),
            providers={"eager": reference.actnorm_inverse_backward, "fastflow": ops.actnorm_inverse_backward},
            bytes_moved=bytes_per_element("actnorm_inverse_backward") * elements,
            **about,
        ),
        harness.Case(
            "statistics",
            inputs=lambda: (image(),),
            providers={"eager": statistics, "fastflow": ops.actnorm_statistics},
            bytes_moved=bytes_per_element("actnorm_statistics") * elements,
            **about,
        ),
    ]


def cases(options: argparse.Namespace) -> list[harness.Case]:
    larger = 64 if options.device == "cpu" else 4096
    sizes = [(2, 3, 5)] if options.quick else [(64, 12, 16), (64, 24, 8), (64, 48, 4), (larger, 12, 32)]
    return [case for size in sizes for layout in LAYOUTS for case in of_size(*size, layout)]


def main(argv: list[str] | None = None) -> list[dict]:
    return harness.main("actnorm", __doc__, cases, argv)


if __name__ == "__main__":
    main()
