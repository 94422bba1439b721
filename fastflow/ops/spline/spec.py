"""Cases of the splines' ops."""

from collections.abc import Iterator

import torch

from fastflow.ops.spec import Case, Make
from fastflow.ops.spline.op import parameters_per_element

LIMITS = {
    (op, device): "for at most 64 bins, not for FrEIA's convention"
    for op in ("spline", "spline_backward", "spline_inverse_backward")
    for device in ("cuda", "cpu")
}
# convention, tails, bins; whether only half of the channels are transformed, in any order or neighbors, or by splines
# that the samples share
VARIANTS = (
    ("fastflow", "linear", 8, False),
    ("nflows", "circular", 5, True),
    ("zuko", "none", 4, "neighbors"),
    ("nflows", "linear", 10, False),
    ("fastflow", "linear", 4, "shared"),
    ("freia", "affine", 3, False),
)


def cases(make: Make, shape: tuple[int, ...]) -> Iterator[Case]:
    n, c, *size = shape
    for convention, tails, bins, half in VARIANTS:
        each = parameters_per_element(bins, tails, convention)
        transformed = c // 2 if half else c
        # most elements are in bins that are higher than wide, so that their log-slopes do not cancel in the log-det
        shared = half == "shared"
        x, params = make(*shape), 0.1 * make(1 if shared else n, transformed * each, *size)
        x = x / 8 + 0.5 if tails == "none" else x * 0.7
        params.unflatten(1, (transformed, each))[:, :, bins + bins // 2 - 1 : bins + bins // 2 + 1] += 1
        order = torch.arange(c).flip(0) if half is True else None
        form = (bins, 3.0, tails, convention, 0.7, 1e-3, 1e-3)
        # of neighbors, the second half is transformed
        given = (
            x,
            params,
            order,
            0 if order is not None else c - transformed,
            make(*shape),
            make.per_sample(n),
        )
        added = ()
        read = 4 * each * transformed // c  # bytes of the parameters
        in_kernel = convention != "freia"
        # of several groups of bins, the backward reads the parameters again, from the cache
        once = in_kernel and bins <= 8
        summed = ("sum",) if in_kernel else ()  # the parts of a sample's log-det
        name = f"{convention} {tails}{' shared' if shared else ' half' if half else ''}"
        if shared:  # from the cache; the gradients of the samples are added in PyTorch
            once, read, added = False, 0, ("sum",)
        count = 8 + read if in_kernel and not shared else None
        backward = 8 + 4 * transformed // c + 2 * read if once else None
        inverse_backward = 16 + 2 * read if once else None
        for inverse in (False, True):
            direction = f"{name} inverse" if inverse else name
            args = *given[:4], *form, inverse
            yield Case("spline", direction, args, count, operations=summed, ill_conditioned=True)
            yield Case(
                "spline_backward",
                direction,
                (*given, *form, inverse),
                backward,
                operations=added,
                ill_conditioned=True,
            )
        yield Case(
            "spline_inverse_backward",
            name,
            (*given, *form),
            inverse_backward,
            operations=added,
            ill_conditioned=True,
        )
