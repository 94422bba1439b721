"""fastflow::lu_weight: weights of a stack of LU-parameterized 1x1 convolutions."""

import functools

import torch
from torch import Tensor

from fastflow import validation
from fastflow.ops.lu_weight import reference
from fastflow.ops.registry import register

MAX_COMPILED = 64  # rows: the shared memory of a GPU multiprocessor is too small for four larger matrices


def _check(argument: str, perm: Tensor, lower: Tensor, upper: Tensor, log_s: Tensor, sign_s: Tensor) -> None:
    if lower.ndim != 3 or lower.shape[1] != lower.shape[2]:
        raise validation.argument_error("lower", validation.shape_of(lower), "a stack [K, C, C]")
    if lower.dtype not in (torch.float32, torch.float64):
        raise validation.argument_error("lower", f"dtype {lower.dtype}", "float32 or float64")
    validation.same_shape("upper", upper, lower.shape, "like lower")
    for name, v in (("perm", perm), ("log_s", log_s), ("sign_s", sign_s)):
        validation.same_shape(name, v, lower.shape[:2], f"lower is {list(lower.shape)}")
    if perm.dtype != torch.int64:
        raise validation.argument_error("perm", f"dtype {perm.dtype}", "int64")
    for name, v in (("perm", perm), ("upper", upper), ("log_s", log_s), ("sign_s", sign_s)):
        if v.device != lower.device or (v is not perm and v.dtype != lower.dtype):
            raise validation.argument_error(
                name, f"{v.dtype} on {v.device}", f"{lower.dtype} on {lower.device}, like lower"
            )


def _checking_values(perm, lower, upper, log_s, sign_s):
    validation.diagonal("lu_weight", sign_s * torch.exp(log_s))
    # large matrices run here too, so use the triangular solve of the device
    solve = torch.ops.fastflow.triangular_solve.default
    return reference.lu_weight_by(solve, perm, lower, upper, log_s, sign_s)


@functools.cache
def _fits(size: int, device: torch.device) -> bool:
    return (
        device.type != "cuda"
        or size <= torch.cuda.get_device_properties(device).shared_memory_per_block_optin
    )


def _eligible(perm: Tensor, lower: Tensor, *_: object) -> bool:
    c = lower.shape[-1]
    return c <= MAX_COMPILED and _fits(4 * c * (c | 1) * lower.element_size() + 4096, lower.device)


kernels = {"compiled": ("cpu", "cuda"), "eligible": _eligible}
register(reference.lu_weight_backward, **kernels)
register(
    reference.lu_weight,
    **kernels,
    check=_check,
    fallback=_checking_values,
    outputs="weight weight_inverse log_det",
    backward=reference.lu_weight_backward,
    gradients="lower upper log_s",
    batched="perm lower upper log_s sign_s",
)


def lu_weight(
    perm: Tensor, lower: Tensor, upper: Tensor, log_s: Tensor, sign_s: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Weights of a stack of LU-parameterized 1x1 convolutions: ``(W, W_inverse, log_det)``.

    :math:`W = P L (U + \operatorname{diag}(\pm e^{\log s}))` (Glow, arXiv:1807.03039, eq. 10). Only the
    strict triangles of ``lower`` and ``upper`` are read; L has a unit diagonal. The inverse is computed from
    the triangles, not by a general solve. All three results are differentiable in lower, upper and log_s.

    Args:
        perm: int64; row i of W is row ``perm[i]`` of L (U + diag s).
        lower, upper, log_s: the parameters.
        sign_s: fixed signs, 1 or -1.

    Shape: lower, upper, W, W_inverse ``[K, C, C]``; perm, log_s, sign_s ``[K, C]``; log_det ``[K]``, nats,
    :math:`\sum \log s`, for one position. float32 or float64.

    Raises ValueError for other shapes, dtypes or devices. Raises SingularError, a ValueError with the index
    of the matrix, if :math:`e^{\log s}` is 0, inf or NaN; on a CUDA device a later call raises it, see
    :func:`raise_singular`.
    """
    return torch.ops.fastflow.lu_weight.default(perm, lower, upper, log_s, sign_s)
