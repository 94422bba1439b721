"""Cases of the mixtures' ops."""

from collections.abc import Iterator

import torch

from fastflow.ops.mixture_cdf.reference import mixture_cdf_parameters
from fastflow.ops.spec import Case, Make

# components; whether only half of the channels are transformed, in any order or neighbors
VARIANTS = ((4, False), (3, True), (1, "neighbors"))


def cases(make: Make, shape: tuple[int, ...]) -> Iterator[Case]:
    n, c, *size = shape
    for components, half in VARIANTS:
        transformed = c // 2 if half else c
        x, params = make(*shape), 0.5 * make(n, transformed * mixture_cdf_parameters(components), *size)
        order = torch.arange(c).flip(0) if half is True else None
        first = 0 if order is not None else c - transformed  # of neighbors, the second half is transformed
        given = x, params, order, first, make(*shape), make.per_sample(n)
        name = f"{components}{' half' if half else ''}"
        for inverse in (False, True):
            direction = f"{name} inverse" if inverse else name
            args = *given[:4], components, inverse
            yield Case("mixture_cdf", direction, args, ill_conditioned=True)
            yield Case("mixture_cdf_backward", direction, (*given, components, inverse), ill_conditioned=True)
        yield Case("mixture_cdf_inverse_backward", name, (*given, components), ill_conditioned=True)
