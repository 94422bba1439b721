"""Times the inverse of a masked autoregressive transformation, in one pass and in D passes.

    python -m benchmarks.ops.masked_inverse

Two hidden layers with ReLU, their degrees spread evenly. Rows go to results/masked_inverse.csv; the shape is N x D x
hidden, the case is the transformer. Providers: one pass in plain PyTorch; D passes through the network, which
other libraries make, up to D = 64; the op.
"""

import argparse
import functools

import torch
from torch import Tensor

from benchmarks.tools import harness
from fastflow import ops
from fastflow.ops.masked_inverse import AFTER, Affine, Spline
from fastflow.ops.masked_inverse.reference import masked_inverse, masks_of, matrices_of, sizes_of

LAYERS = [AFTER, AFTER, 0]
SIZES = ((1000, 8, 64), (1000, 21, 128), (1000, 64, 512), (256, 784, 1024))
MOST_PASSES = 64
AFFINE = Affine("softplus", offset=1e-3)


def options_of(features: int, hidden: int) -> dict:
    ends = torch.arange(1, features + 1) * hidden // features
    return {
        "ends": ends.expand(2, -1).contiguous(),
        "order": torch.arange(features),
        "widths": [hidden, hidden],
    }


@functools.cache
def on(t: Tensor, device: torch.device) -> Tensor:
    """Copied once, not in the measured time; tensors are told apart by identity."""
    return t.to(device)


def one_pass(z: Tensor, weights: Tensor, added: Tensor, *, ends, order, widths, transformer) -> tuple:
    spline, affine = (transformer, Affine()) if isinstance(transformer, Spline) else (Spline(0), transformer)
    bins, bound, tails, convention, _, min_bin, min_slope = spline
    scale, affine_order, params_layout, _, offset = affine
    form = bins, bound, tails, convention, transformer.factor, min_bin, min_slope
    shared = on(ends, z.device), on(order, z.device), widths, LAYERS, "relu"
    return masked_inverse(
        z, weights, added, None, *shared, scale, affine_order, params_layout, offset, *form, None
    )


def passes(z: Tensor, weights: Tensor, added: Tensor, *, ends, order, widths, transformer) -> tuple:
    sizes = sizes_of(z.shape[1], widths, transformer.parameters)
    matrices, biases = matrices_of(weights, sizes), added.split(sizes[1:])
    x = torch.zeros_like(z)
    for _ in range(z.shape[1]):
        h = x
        for w, b in zip(matrices[:-1], biases[:-1], strict=True):
            h = torch.relu(torch.addmm(b, h, w.mT))
        params = torch.addmm(biases[-1], h, matrices[-1].mT).unflatten(1, (z.shape[1], -1))
        x, log_slope = transformer.inverse(z, params)
    return x, log_slope.sum(1)


def op(z: Tensor, weights: Tensor, added: Tensor, *, ends, order, widths, transformer) -> tuple:
    shared = {"ends": on(ends, z.device), "order": on(order, z.device), "widths": widths}
    return ops.masked_inverse(z, weights, added, layers=LAYERS, transformer=transformer, **shared)


def of_size(n: int, features: int, hidden: int, transformer: Affine | Spline) -> harness.Case:
    options = options_of(features, hidden)
    sizes = sizes_of(features, options["widths"], transformer.parameters)
    masks = masks_of(options["ends"], sizes, transformer.parameters)

    def inputs():
        matrices = [mask * torch.randn(mask.shape) / mask.shape[1] ** 0.5 for mask in masks]
        return (
            torch.randn(n, features),
            torch.cat([w.flatten() for w in matrices]),
            torch.randn(sum(sizes[1:])) / 3,
        )

    providers = {"eager": one_pass, "fastflow": op}
    if features <= MOST_PASSES:
        providers["D passes"] = passes
    return harness.Case(
        name="affine" if isinstance(transformer, Affine) else f"spline of {transformer.bins} bins",
        shape=f"{n}x{features}x{hidden}",
        dtype=torch.float32,
        inputs=inputs,
        providers={k: functools.partial(f, transformer=transformer, **options) for k, f in providers.items()},
        bytes_moved=4 * (sum(mask.numel() for mask in masks) + sum(sizes[1:]) + n * (2 * features + 1)),
        compiled=False,  # torch.compile would unroll the features
    )


def cases(options: argparse.Namespace) -> list[harness.Case]:
    if options.quick:
        return [of_size(5, 3, 8, AFFINE), of_size(5, 3, 8, Spline(4))]
    return [*(of_size(*size, AFFINE) for size in SIZES), of_size(4096, 16, 128, Spline())]


def main(argv: list[str] | None = None) -> list[dict]:
    return harness.main("masked_inverse", __doc__, cases, argv)


if __name__ == "__main__":
    main()
