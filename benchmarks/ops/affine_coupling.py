"""Times the affine coupling and its inverse + backward, and the formula in plain PyTorch.

    python -m benchmarks.ops.affine_coupling

Rows go to results/affine_coupling.csv; the shape is N x C x H x W of x, the case is the scale function, the
mask is halves. Gradients are by x, the network's output and the factor. Sizes: Glow's levels on 32x32
images (C = 12, 24, 48 with 16, 8, 4 pixels per side), and larger images.
"""

import argparse
import functools

import torch
from torch.nn.functional import logsigmoid

from benchmarks.ops.conv1x1 import LAYOUTS
from benchmarks.tools import harness
from fastflow import ops, reference
from fastflow.ops.spec import bytes_per_element

SCALES = ("soft_clamp", "sigmoid", "exp")


def coupling(x, h, factor=None, *, scale):
    """An affine coupling in plain PyTorch, scale first."""
    x_a, x_b = x.chunk(2, dim=1)
    shift, raw = h.chunk(2, dim=1)
    if scale == "soft_clamp":
        f = factor.view(1, -1, 1, 1)
        log_s = f * torch.tanh(raw / f)
    else:
        log_s = raw if scale == "exp" else logsigmoid(raw + 2)
    return torch.cat([x_a, x_b * torch.exp(log_s) + shift], dim=1), log_s.sum((1, 2, 3))


def inverse_backward(op, y, h, dy, dlog_det, factor=None):
    found = op(y, h, factor, dy, dlog_det)
    return found if factor is not None else found[:3]


def eager_inverse_backward(*args, scale):
    return reference.affine_coupling_inverse_backward(
        *args, "halves", False, scale, "scale_first", "shift_scale"
    )


def of_size(n: int, c: int, side: int, layout: str, scale: str) -> list[harness.Case]:
    def image():
        return torch.randn(n, c, side, side).contiguous(memory_format=LAYOUTS[layout])

    def factor():
        return (torch.rand(c // 2) + 0.5,) if scale == "soft_clamp" else ()

    elements = n * c * side * side
    about = {"shape": f"{n}x{c}x{side}x{side}", "dtype": torch.float32, "layout": layout}
    eager = functools.partial(coupling, scale=scale)
    providers = {"eager": eager, "fastflow": functools.partial(ops.affine_coupling, scale=scale)}
    return [
        harness.Case(
            name=scale,
            inputs=lambda: (image(), image(), *factor()),
            providers=providers,
            gradients_of=(0, 1, 2) if factor() else (0, 1),
            bytes_moved=bytes_per_element("affine_coupling", "halves exp") * elements,
            **about,
        ),
        harness.Case(
            name=f"{scale}, inverse_backward",
            inputs=lambda: (image(), image(), image(), torch.randn(n), *factor()),
            providers={
                name: functools.partial(inverse_backward, functools.partial(op, scale=scale))
                for name, op in (
                    ("eager", eager_inverse_backward),
                    ("fastflow", ops.affine_coupling_inverse_backward),
                )
            },
            bytes_moved=bytes_per_element("affine_coupling_inverse_backward", "halves exp") * elements,
            **about,
        ),
    ]


def cases(options: argparse.Namespace) -> list[harness.Case]:
    levels = [(n, c, side) for n in (16, 64) for c, side in ((12, 16), (24, 8), (48, 4))]
    # 200 MB per tensor on a GPU, so that the launch is negligible
    larger = [(64 if options.device == "cpu" else 49152 // c, c, 32) for c in (12, 24, 48)]
    sizes = [(2, 4, 3)] if options.quick else [*levels, *larger]
    return [
        case
        for scale in SCALES  # the default first: a run may be cut
        for size in sizes
        for layout in LAYOUTS
        for case in of_size(*size, layout, scale)
    ]


def main(argv: list[str] | None = None) -> list[dict]:
    return harness.main("affine_coupling", __doc__, cases, argv)


if __name__ == "__main__":
    main()
