"""Times rational-quadratic splines, their inverse and inverse + backward, and the formula in plain PyTorch.

    python -m benchmarks.ops.spline

Rows go to results/spline.csv; the shape is that of x, N x C, and every channel is transformed, with 8 bins and linear
tails. The case is the convention and the direction. Gradients are by x and the raw parameters. nflows and zuko
are further providers of their conventions, if they are installed.
"""

import argparse
import functools
from collections.abc import Callable

import torch

from benchmarks.tools import harness
from fastflow import ops, reference
from fastflow.ops.spec import bytes_per_element
from fastflow.ops.spline import parameters_per_element

BINS, BOUND = 8, 3.0
CONVENTIONS = ("fastflow", "nflows", "zuko")
SIZES = ((4096, 64), (512, 8))


def form(convention: str) -> tuple:
    return BINS, BOUND, "linear", convention, 1.0, 1e-3, 1e-3


def eager(x, params, *, convention, inverse):
    return reference.spline(x, params, None, 0, *form(convention), inverse)


def eager_inverse_backward(y, params, dy, dlog_det, *, convention):
    return reference.spline_inverse_backward(y, params, None, 0, dy, dlog_det, *form(convention))


def inverse_backward(y, params, dy, dlog_det, *, convention):
    return ops.spline_inverse_backward(y, params, None, dy, dlog_det, bins=BINS, convention=convention)


def split(x, params):
    """Raw widths, heights and slopes of each element."""
    return params.view(*x.shape, -1).split((BINS, BINS, BINS - 1), -1)


def library(convention: str) -> dict[str, Callable]:
    """The published spline of a convention, by name, if it is installed."""
    if convention == "nflows":
        try:
            from nflows.transforms.splines import unconstrained_rational_quadratic_spline
        except ImportError:
            return {}

        def nflows(x, params, *, inverse):
            y, log_slope = unconstrained_rational_quadratic_spline(
                x, *split(x, params), inverse=inverse, tails="linear", tail_bound=BOUND
            )
            return y, log_slope.sum(1)

        return {"nflows": nflows}
    if convention == "zuko":
        try:
            from zuko.transforms import MonotonicRQSTransform
        except ImportError:
            return {}

        def zuko(x, params, *, inverse):
            spline = MonotonicRQSTransform(*split(x, params), bound=BOUND)
            y, log_slope = (spline.inv if inverse else spline).call_and_ladj(x)
            return y, log_slope.sum(1)

        return {"zuko": zuko}
    return {}


def of_size(n: int, c: int, convention: str) -> list[harness.Case]:
    def inputs():
        # in the middle of a bin: at a knot, rounding decides the bin and with it the gradient of its parameters
        middles = torch.randint(BINS, (n, c)) + 0.3 + 0.4 * torch.rand(n, c)
        x = middles * (2 * BOUND / BINS) - BOUND
        return x, 0.05 * torch.randn(n, c * parameters_per_element(BINS, "linear", convention))

    about = {"shape": f"{n}x{c}", "dtype": torch.float32}
    moved = bytes_per_element("spline", "fastflow linear") * n * c
    cases = []
    for inverse in (False, True):
        providers = {
            "eager": functools.partial(eager, convention=convention, inverse=inverse),
            "fastflow": functools.partial(ops.spline, bins=BINS, convention=convention, inverse=inverse),
        }
        providers |= {name: functools.partial(f, inverse=inverse) for name, f in library(convention).items()}
        cases.append(
            harness.Case(
                name=f"{convention}, inverse" if inverse else convention,
                inputs=inputs,
                providers=providers,
                gradients_of=(0, 1),
                bytes_moved=moved,
                **about,
            )
        )
    providers = {"eager": eager_inverse_backward, "fastflow": inverse_backward}
    cases.append(
        harness.Case(
            name=f"{convention}, inverse_backward",
            inputs=lambda: (*inputs(), torch.randn(n, c), torch.randn(n)),
            providers={name: functools.partial(f, convention=convention) for name, f in providers.items()},
            bytes_moved=bytes_per_element("spline_inverse_backward", "fastflow linear") * n * c,
            compiled=False,
            **about,
        )
    )
    return cases


def cases(options: argparse.Namespace) -> list[harness.Case]:
    sizes, conventions = (SIZES[1:], CONVENTIONS[:2]) if options.quick else (SIZES, CONVENTIONS)
    return [case for size in sizes for convention in conventions for case in of_size(*size, convention)]


def main(argv: list[str] | None = None) -> list[dict]:
    return harness.main("spline", __doc__, cases, argv)


if __name__ == "__main__":
    main()
