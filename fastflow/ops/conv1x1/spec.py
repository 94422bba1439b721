"""Cases of the 1x1 convolution's ops."""

from collections.abc import Iterator

import torch

from fastflow.ops.conv1x1.op import MAX_COMPILED
from fastflow.ops.layout import acc_dtype
from fastflow.ops.spec import Case, Make

LIMITS = {
    (op, device): limit
    for op in ("conv1x1", "conv1x1_backward", "conv1x1_inverse_backward")
    for device, limit in (
        ("cuda", f"for at most {MAX_COMPILED} channels, not float64; else PyTorch"),
        ("cpu", f"for at most {MAX_COMPILED} channels; else PyTorch"),
    )
}


def cases(make: Make, shape: tuple[int, ...]) -> Iterator[Case]:
    c = shape[1]
    x, dy, bias = make(*shape), make(*shape), make.per_channel(c)
    weight = torch.linalg.qr(torch.randn(c, c, dtype=acc_dtype(make.dtype))).Q
    yield Case("conv1x1", "", (x, weight, None), 8)
    yield Case("conv1x1", "bias", (x, weight, bias), 8)
    yield Case("conv1x1_backward", "", (x, weight, dy), 12)
    yield Case("conv1x1_inverse_backward", "", (x, weight, weight.mT, bias, dy), 16)
