"""Cases of dequantization's ops."""

from collections.abc import Iterator

import torch

from fastflow.ops.spec import Case, Make
from fastflow.ops.squeeze import squeezed_shape

LOGIT, GLOW = (8, 0.9, 0.05, True), (8, 1.0, -0.5, False)  # bits, scale, shift, logit


def cases(make: Make, shape: tuple[int, ...]) -> Iterator[Case]:
    x, noise, seed = make.pixels(*shape), make(*shape).sigmoid(), torch.tensor(1)
    y, squeezed, dlog_det = make(*shape), make(*squeezed_shape(x, False)), make.per_sample(shape[0])
    size = y.element_size()
    for name, bounds in (("logit", LOGIT), ("affine", GLOW)):
        for order in (None, "channel", "realnvp"):
            variant = f"{name}{f' {order}' if order else ''}"
            drawn = None if order == "realnvp" else 1 + size
            yield Case(
                "dequantize", f"{variant} seed", (x, None, seed, 2**40, *bounds, order, make.dtype), drawn
            )
        yield Case(
            "dequantize", f"{name} noise", (x, noise, None, 0, *bounds, None, make.dtype), 1 + 2 * size
        )
        read = 1 + 2 * size if name == "logit" else size  # the affine map's gradient is a constant times dy
        yield Case("dequantize_backward", name, (x, noise, y, dlog_det, *bounds, None), read + size)
        yield Case("dequantize_inverse", name, (y, *bounds, None), 1 + size)
    yield Case("dequantize_backward", "squeezed", (x, noise, squeezed, dlog_det, *LOGIT, "space"))
    yield Case("dequantize_inverse", "squeezed", (y, *LOGIT, "channel"), 1 + size)
