"""fastflow::actnorm, its backward, its inverse + backward, and the statistics of its initialization."""

import torch
from torch import Tensor

from fastflow import validation
from fastflow.ops.actnorm import reference
from fastflow.ops.registry import register


def _check(
    argument: str,
    x: Tensor,
    log_scale: Tensor,
    bias: Tensor,
    dy: Tensor | None = None,
    dlog_det: Tensor | None = None,
) -> None:
    validation.floating_point(argument, x)
    for name, v in (("log_scale", log_scale), ("bias", bias)):
        validation.same_device_and_precision(name, v, argument, x)
        validation.channels(name, v, x.shape[1], f"one for each channel of {argument}")
    validation.gradients(argument, x, dy, dlog_det)


kernels = {"triton": True, "compiled": ("cpu",)}
register(reference.actnorm_backward, **kernels)
register(reference.actnorm_inverse_backward, **kernels, check=_check)
register(reference.actnorm_statistics, **kernels, check=validation.floating_point)
register(
    reference.actnorm,
    **kernels,
    check=_check,
    outputs="y log_det",
    backward=reference.actnorm_backward,
    gradients="x log_scale bias",
    batched="x",
)


def actnorm(x: Tensor, log_scale: Tensor, bias: Tensor, *, inverse: bool = False) -> tuple[Tensor, Tensor]:
    r"""Activation normalization :math:`y = e^{s} (x + b)` per channel, with its log-det.

    Source: Glow, arXiv:1807.03039, section 3.1.

    Args:
        x: input; the output y with ``inverse=True``.
        log_scale, bias: :math:`s` and :math:`b`.
        inverse: compute :math:`x = e^{-s} y - b` and the log-det of that direction.

    Shape: x, y ``[N, C, ...]``; log_scale, bias ``[C]``; log_det ``[N]``, nats, :math:`\pm P \sum_c s_c`
    with P positions per sample (H W for an image, 1 for a vector), float32 (float64 for float64 x).

    Raises ValueError for other shapes, dtypes or devices.
    """
    return torch.ops.fastflow.actnorm.default(x, log_scale, bias, inverse)


def actnorm_inverse_backward(
    y: Tensor, log_scale: Tensor, bias: Tensor, dy: Tensor, dlog_det: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Input and gradients of :func:`actnorm` from its output y: ``(x, dx, dlog_scale, dbias)``.

    Reversible backprop uses it. Arguments, shapes and errors are as in :func:`actnorm`; dy has the shape
    of y, dlog_det ``[N]``.
    """
    return torch.ops.fastflow.actnorm_inverse_backward.default(y, log_scale, bias, dy, dlog_det)


def actnorm_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel over batch and positions.

    ActNorm uses them to initialize its parameters (Glow, arXiv:1807.03039, section 3.1). Not differentiable.

    Shape: x ``[N, C, ...]``; both results ``[C]``, float32 (float64 for float64 x).
    Raises ValueError for other shapes and for integers.
    """
    return torch.ops.fastflow.actnorm_statistics.default(x.detach())
