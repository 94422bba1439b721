"""Times mixtures of logistics, their inverse and inverse + backward, and the formula in plain PyTorch.

    python -m benchmarks.ops.mixture_cdf

Rows go to results/mixture_cdf.csv; the shape is that of x, N x C, and every channel is transformed. The case is the number
of components and the direction. Gradients are by x and the raw parameters.
"""

import argparse
import functools

import torch

from benchmarks.tools import harness
from fastflow import ops, reference
from fastflow.ops.mixture_cdf import mixture_cdf_parameters

COMPONENTS = (4, 8)
SIZES = ((4096, 64), (512, 8))


def eager(x, params, *, components, inverse):
    return reference.mixture_cdf(x, params, None, 0, components, inverse)


def eager_inverse_backward(y, params, dy, dlog_det, *, components):
    return reference.mixture_cdf_inverse_backward(y, params, None, 0, dy, dlog_det, components)


def inverse_backward(y, params, dy, dlog_det, *, components):
    return ops.mixture_cdf_inverse_backward(y, params, None, dy, dlog_det, components=components)


def of_size(n: int, c: int, components: int) -> list[harness.Case]:
    each = mixture_cdf_parameters(components)

    def inputs():
        return torch.randn(n, c), 0.5 * torch.randn(n, c * each)

    about = {"shape": f"{n}x{c}", "dtype": torch.float32}
    cases = []
    for inverse in (False, True):
        providers = {
            "eager": functools.partial(eager, components=components, inverse=inverse),
            "fastflow": functools.partial(ops.mixture_cdf, components=components, inverse=inverse),
        }
        cases.append(
            harness.Case(
                name=f"{components} components{', inverse' if inverse else ''}",
                inputs=inputs,
                providers=providers,
                gradients_of=(0, 1),
                bytes_moved=(8 + 4 * each) * n * c,
                compiled=not inverse,  # torch.compile would unroll the steps
                **about,
            )
        )
    providers = {"eager": eager_inverse_backward, "fastflow": inverse_backward}
    cases.append(
        harness.Case(
            name=f"{components} components, inverse_backward",
            inputs=lambda: (*inputs(), torch.randn(n, c), torch.randn(n)),
            providers={name: functools.partial(f, components=components) for name, f in providers.items()},
            bytes_moved=(16 + 8 * each) * n * c,
            compiled=False,
            **about,
        )
    )
    return cases


def cases(options: argparse.Namespace) -> list[harness.Case]:
    sizes, components = (SIZES[1:], COMPONENTS[:1]) if options.quick else (SIZES, COMPONENTS)
    return [case for size in sizes for k in components for case in of_size(*size, k)]


def main(argv: list[str] | None = None) -> list[dict]:
    return harness.main("mixture_cdf", __doc__, cases, argv)


if __name__ == "__main__":
    main()
