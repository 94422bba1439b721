"""Times squeeze and its inverse, and plain PyTorch.

    python -m benchmarks.ops.squeeze

Rows go to results/squeeze.csv; the shape is N x C x H x W of x, the case is the order of the new channels.
``eager`` is torch's pixel_unshuffle for ``channel``, and views with a permutation for the other orders.
"""

import argparse
import functools

import torch
import torch.nn.functional as F

from benchmarks.ops.conv1x1 import LAYOUTS
from benchmarks.tools import harness
from fastflow import ops
from fastflow.ops.spec import bytes_per_element
from fastflow.ops.squeeze import ORDERS


def squeeze(x, *, order):
    if order == "channel":
        return F.pixel_unshuffle(x, 2)
    n, c, h, w = x.shape
    blocks = x.view(n, c, h // 2, 2, w // 2, 2).permute(0, 3, 5, 1, 2, 4).reshape(n, 4, c, h // 2, w // 2)
    if order == "realnvp":
        blocks = blocks[:, [0, 3, 1, 2]]
    return blocks.reshape(n, 4 * c, h // 2, w // 2)


def unsqueeze(z, *, order):
    if order == "channel":
        return F.pixel_shuffle(z, 2)
    n, c, h, w = z.shape
    blocks = z.reshape(n, 4, c // 4, h, w)
    if order == "realnvp":
        blocks = blocks[:, [0, 2, 3, 1]]
    return blocks.view(n, 2, 2, c // 4, h, w).permute(0, 3, 4, 1, 5, 2).reshape(n, c // 4, 2 * h, 2 * w)


def of_size(n: int, c: int, side: int, layout: str, order: str) -> list[harness.Case]:
    def image(c, side):
        return torch.randn(n, c, side, side).contiguous(memory_format=LAYOUTS[layout])

    found = []
    for name, variant, eager, ours, size in (
        ("squeeze", order, squeeze, ops.squeeze2d, (c, side)),
        ("unsqueeze", f"{order} inverse", unsqueeze, ops.unsqueeze2d, (4 * c, side // 2)),
    ):
        found.append(
            harness.Case(
                f"{name}, {order}",
                shape=f"{n}x{size[0]}x{size[1]}x{size[1]}",
                dtype=torch.float32,
                layout=layout,
                inputs=lambda size=size: (image(*size),),
                providers={
                    "eager": functools.partial(eager, order=order),
                    "fastflow": functools.partial(ours, order=order),
                },
                gradients_of=(0,),
                bytes_moved=bytes_per_element("squeeze", variant) * n * c * side * side,
            )
        )
    return found


def cases(options: argparse.Namespace) -> list[harness.Case]:
    larger = 64 if options.device == "cpu" else 1024
    sizes = [(2, 3, 4)] if options.quick else [(64, 3, 32), (64, 6, 16), (larger, 12, 64)]
    return [
        case
        for size in sizes
        for layout in LAYOUTS
        for order in ORDERS
        for case in of_size(*size, layout, order)
    ]


def main(argv: list[str] | None = None) -> list[dict]:
    return harness.main("squeeze", __doc__, cases, argv)


if __name__ == "__main__":
    main()
