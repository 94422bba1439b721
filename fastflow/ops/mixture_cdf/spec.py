"""Cases of the mixtures' ops."""

from collections.abc import Iterator

import torch

from fastflow.ops.mixture_cdf.reference import mixture_cdf_parameters
from fastflow.ops.spec import Case, Make

LIMITS = {
    (op, device): "for at most 64 components"
    for op in ("mixture_cdf", "mixture_cdf_backward", "mixture_cdf_inverse_backward")
    for device in ("cuda", "cpu")
}
# components; whether only half of the channels are transformed, in any order or neighbors
VARIANTS = ((3, False), (2, True), (1, "neighbors"))


def cases(make: Make, shape: tuple[int, ...]) -> Iterator[Case]:
    n, c, *size = shape
    for components, half in VARIANTS:
        transformed, each = c // 2 if half else c, mixture_cdf_parameters(components)
        x, params = make(*shape), 0.5 * make(n, transformed * each, *size)
        order = torch.arange(c).flip(0) if half is True else None
        first = 0 if order is not None else c - transformed  # of neighbors, the second half is transformed
        given = x, params, order, first, make(*shape), make.per_sample(n)
        read = 4 * each * transformed // c  # bytes of the parameters
        name = f"{components}{' half' if half else ''}"
        for inverse in (False, True):
            direction = f"{name} inverse" if inverse else name
            args = *given[:4], components, inverse
            # the parts of a sample's log-det are summed
            yield Case("mixture_cdf", direction, args, 8 + read, operations=("sum",), ill_conditioned=True)
            backward = 8 + 4 * transformed // c + 2 * read
            args = *given, components, inverse
            yield Case("mixture_cdf_backward", direction, args, backward, ill_conditioned=True)
        args = *given, components
        yield Case("mixture_cdf_inverse_backward", name, args, 16 + 2 * read, ill_conditioned=True)
