"""Cases of the one-pass inverse: as many features as the shape has channels, as many samples as it has pixels."""

import math
from collections.abc import Iterator

import torch

from fastflow.ops.layout import acc_dtype
from fastflow.ops.masked_inverse.reference import (
    AFTER,
    BEFORE,
    GATE,
    SKIP,
    gated,
    masks_of,
    sizes_of,
    transformer_of,
)
from fastflow.ops.spec import Case, Make

ELIGIBLE = "64 bins, not for FrEIA's convention; else PyTorch"
LIMITS = {
    ("masked_inverse", "cpu"): f"for at most {ELIGIBLE}",
    ("masked_inverse", "cuda"): f"for at most 32 hidden layers and {ELIGIBLE}",
    ("masked_inverses", "cpu"): f"for at most {ELIGIBLE}",
    ("masked_inverses", "cuda"): "and `masked_inverse`, one after the other",
    ("masked_solve", "cuda"): "for at most 32 hidden layers and 255 parameters of a feature; else PyTorch",
}
# name; widths, bits of the layers, activation; whether a context adds to the products; transformer of the op
AFFINE, SPLINE = ("linear", "fastflow"), ("scale_first", "scale_shift", 1e-3)
VARIANTS = (
    (
        "softplus",
        (7, 12),
        (AFTER, AFTER, 0),
        "tanh",
        False,
        ("softplus", *SPLINE, 0, 3.0, *AFFINE, 1.0, 1e-3, 1e-3),
    ),
    (
        "residual sigmoid",
        (9, 9, 9),
        (0, BEFORE, BEFORE | GATE | SKIP, BEFORE),
        "silu",
        True,
        ("sigmoid", "shift_first", "shift_scale", 0.0, 0, 3.0, *AFFINE, 1.0, 1e-3, 1e-3),
    ),
    (
        "spline",
        (11,),
        (AFTER, 0),
        "elu",
        False,
        ("exp", *SPLINE, 5, 1.5, "zero", "nflows", 1.0, 1e-3, 1e-3),
    ),
)


def cases(make: Make, shape: tuple[int, ...]) -> Iterator[Case]:
    n, features = shape[0] * math.prod(shape[2:]), shape[1]
    dtype = acc_dtype(make.dtype)
    for name, widths, layers, activation, context, form in VARIANTS:
        each = transformer_of(*form).parameters
        sizes = sizes_of(features, list(widths), each)
        ends = torch.stack([torch.arange(1, features + 1) * width // features for width in widths])
        masks = masks_of(ends, sizes, each)
        scaled = [mask * torch.randn(mask.shape, dtype=dtype) / mask.shape[1] ** 0.5 for mask in masks]
        scaled[-1] = 0.1 * scaled[-1]
        weights = torch.cat([w.flatten() for w in scaled])
        total, count = sum(sizes[1:]), gated(list(layers), list(widths))
        added = 0.1 * torch.randn((n, total) if context else (total,), dtype=dtype)
        if bins := form[4]:  # as in the spline's cases, most log-slopes do not cancel in the log-det
            heights = added[..., sum(widths) :].unflatten(-1, (features, each))[..., bins : 2 * bins]
            heights[..., bins // 2 - 1 : bins // 2 + 1] += 1
        gates = torch.rand(n, count, dtype=dtype) if count else None
        z = 0.7 * torch.randn(n, features, dtype=dtype)
        order = torch.arange(features).flip(0)
        waves = torch.rand(4, features, dtype=dtype) if bins else None
        yield Case(
            "masked_inverse",
            name,
            (z, weights, added, gates, ends, order, list(widths), list(layers), activation, *form, waves),
            ill_conditioned=True,
        )
        if not count:
            # of two transformations, with a context where products have no other term of the samples
            of_context = 0 if bins else 3
            first = 0.1 * torch.randn(widths[0] * of_context, dtype=dtype)
            own = torch.cat([weights, first, 0.1 * torch.randn(total, dtype=dtype)])
            kept = torch.cat(
                [*(mask.flatten() for mask in masks), torch.ones(len(own) - len(weights)).bool()]
            )
            places = torch.stack([torch.randperm(len(own)) for _ in range(2)])
            parameters = torch.empty(2, len(own), dtype=dtype).scatter_(1, places, own.expand(2, -1))
            places = torch.where(kept, places + torch.tensor([[0], [len(own)]]), -1)
            yield Case(
                "masked_inverses",
                name,
                (
                    z,
                    torch.randn(n, of_context, dtype=dtype) if of_context else None,
                    parameters.flatten(),
                    places,
                    torch.stack([ends, ends]),
                    torch.stack([order, order.flip(0)]),
                    list(widths),
                    list(layers),
                    activation,
                    *form,
                ),
                ill_conditioned=True,
            )
        jac, dparams = (torch.randn(n, features, each, dtype=dtype) for _ in range(2))
        slope = 1 + torch.rand(n, features, dtype=dtype)
        inner, outer = (torch.rand(n, sum(widths), dtype=dtype) for _ in range(2))
        rest = (dparams, inner, outer) if context else (None, inner, None)
        network = weights, ends, list(widths), list(layers), slope.flip(1) if bins else None
        yield Case("masked_solve", name, (z, slope, jac, *rest, *network), ill_conditioned=True)
