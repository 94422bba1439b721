"""Cases of the LU weights' ops: stacks of ``[N, C, C]``."""

from collections.abc import Iterator

import torch

from fastflow.ops.layout import acc_dtype
from fastflow.ops.lu_weight.op import MAX_COMPILED
from fastflow.ops.spec import Case, Make

LIMITS = {
    (op, device): f"for at most {MAX_COMPILED} channels; else PyTorch"
    for op in ("lu_weight", "lu_weight_backward")
    for device in ("cuda", "cpu")
}


def cases(make: Make, shape: tuple[int, ...]) -> Iterator[Case]:
    k, c, dtype = shape[0], shape[1], acc_dtype(make.dtype)
    lower, upper, *upstream = (torch.randn(k, c, c, dtype=dtype) / c for _ in range(4))
    perm = torch.stack([torch.randperm(c) for _ in range(k)])
    log_s, sign_s = 0.3 * torch.randn(k, c, dtype=dtype), torch.randn(k, c, dtype=dtype).sign()
    args = perm, lower, upper, log_s, sign_s
    inverse = torch.linalg.inv(torch.randn(k, c, c, dtype=dtype) / c + torch.eye(c, dtype=dtype))
    yield Case("lu_weight", "", args)
    yield Case("lu_weight_backward", "", (*args, inverse, *upstream, torch.randn(k, dtype=dtype)))
