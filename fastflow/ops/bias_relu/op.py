"""fastflow::bias_relu, with an optional scale, the same in place, and their backward."""

import torch
from torch import Tensor

from fastflow import validation
from fastflow.ops.bias_relu import reference
from fastflow.ops.registry import register
from fastflow.transforms import in_transform


def _check(argument: str, x: Tensor, bias: Tensor, log_scale: Tensor | None) -> None:
    validation.floating_point(argument, x)
    for name, v in (("bias", bias), ("log_scale", log_scale)):
        if v is not None:
            validation.same_device_and_precision(name, v, argument, x)
            validation.channels(name, v, x.shape[1], f"one for each channel of {argument}")


def _check_in_place(argument: str, x: Tensor, bias: Tensor, log_scale: Tensor | None) -> None:
    _check(argument, x, bias, log_scale)
    validation.writable(argument, x)


kernels = {"triton": True, "compiled": ("cpu",)}
differentiable = {
    "outputs": "y",
    "backward": reference.bias_relu_backward,
    "gradients": "x bias log_scale",
}
register(reference.bias_relu_backward, **kernels)
register(reference.bias_relu, **kernels, **differentiable, check=_check, batched="x")
register(reference.bias_relu_, **kernels, **differentiable, check=_check_in_place, writes="x")


def bias_relu(
    x: Tensor,
    bias: Tensor,
    log_scale: Tensor | None = None,
    *,
    relu: bool = True,
    inplace: bool = False,
) -> Tensor:
    r"""Bias, scale and ReLU per channel in one pass, :math:`y = \max(e^{s} (x + b), 0)`.

    Without a scale it is :math:`\max(x + b, 0)`, the end of a convolution; with one it is ActNorm (Glow,
    arXiv:1807.03039, section 3.1) and ReLU.

    The backward pass reads y, not x, and computes all gradients in one pass: that of s is the sum of
    :math:`y\, \partial y`. It needs no value of x, so
    ``inplace=True`` is safe for the output of a convolution, whose own backward does not need it either.
    NaN gives NaN, as in :func:`torch.relu`.

    Args:
        x: input, of any memory layout.
        bias: :math:`b`; with half-precision x it may be float32. The sum is computed in float32 (float64 for
            float64 x) and rounded once.
        log_scale: :math:`s`, with the dtypes of ``bias``; None: no scale.
        relu: False leaves out the maximum, :math:`y = e^{s} (x + b)`.
        inplace: write y over x and return x.

    Shape: x, y ``[N, C, ...]``; bias, log_scale ``[C]``.

    Raises ValueError for other shapes, dtypes or devices; with ``inplace=True`` also for an expanded x and
    for a leaf that requires a gradient.
    """
    if inplace and in_transform():
        return x.copy_(torch.ops.fastflow.bias_relu.default(x, bias, log_scale, relu))
    if inplace:
        torch.ops.fastflow.bias_relu_.default(x, bias, log_scale, relu)
        return x
    return torch.ops.fastflow.bias_relu.default(x, bias, log_scale, relu)
