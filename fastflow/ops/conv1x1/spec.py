"""Cases of the 1x1 convolution's ops."""

from collections.abc import Iterator

import torch

from fastflow.ops.layout import acc_dtype
from fastflow.ops.spec import Case, Make


def cases(make: Make, shape: tuple[int, ...]) -> Iterator[Case]:
    c = shape[1]
    x, dy, bias = make(*shape), make(*shape), make.per_channel(c)
    weight = torch.linalg.qr(torch.randn(c, c, dtype=acc_dtype(make.dtype))).Q
    yield Case("conv1x1", "", (x, weight, None))
    yield Case("conv1x1", "bias", (x, weight, bias))
    yield Case("conv1x1_backward", "", (x, weight, dy))
    yield Case("conv1x1_inverse_backward", "", (x, weight, weight.mT, bias, dy))
