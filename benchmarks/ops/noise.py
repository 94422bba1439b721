"""Times noise that is a function of (seed, sample, element): the generator in plain PyTorch, and FastFlow's.

    python -m benchmarks.ops.noise

Rows go to results/noise.csv; the shape is N x C x H x W. torch.rand and torch.randn draw other numbers and
are not compared.
"""

import argparse

import torch

from benchmarks.tools import harness
from fastflow import ops, reference
from fastflow.ops.spec import bytes_per_element


def of_size(*size: int) -> list[harness.Case]:
    about = {
        "shape": "x".join(map(str, size)),
        "dtype": torch.float32,
    }

    def case(name, eager, ours, moved):
        providers = {
            "eager": lambda seed: eager(list(size), seed, 0, torch.float32),
            "fastflow": lambda seed: ours(size, seed=seed),
        }
        return harness.Case(
            name,
            inputs=lambda: (torch.randint(2**62, ()),),
            providers=providers,
            bytes_moved=moved * torch.Size(size).numel(),
            **about,
        )

    return [
        case("uniform", reference.uniform_noise, ops.uniform_noise, bytes_per_element("uniform_noise")),
        case(
            "normal",
            reference.normal_noise,
            ops.gaussian_sample,
            bytes_per_element("gaussian_sample", "standard"),
        ),
    ]


def cases(options: argparse.Namespace) -> list[harness.Case]:
    larger = 64 if options.device == "cpu" else 4096
    sizes = [(2, 3, 4, 4)] if options.quick else [(64, 3, 32, 32), (64, 48, 4, 4), (larger, 12, 32, 32)]
    return [case for size in sizes for case in of_size(*size)]


def main(argv: list[str] | None = None) -> list[dict]:
    return harness.main("noise", __doc__, cases, argv)


if __name__ == "__main__":
    main()
