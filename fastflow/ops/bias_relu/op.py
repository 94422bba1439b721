"""fastflow::bias_relu, the same in place, and their backward."""

import torch
from torch import Tensor

from fastflow import validation
from fastflow.ops.bias_relu import reference
from fastflow.ops.registry import register


def _check(argument: str, x: Tensor, bias: Tensor) -> None:
    validation.floating_point(argument, x)
    validation.same_device_and_precision("bias", bias, argument, x)
    validation.channels("bias", bias, x.shape[1], f"one for each channel of {argument}")


def _check_in_place(argument: str, x: Tensor, bias: Tensor) -> None:
    _check(argument, x, bias)
    validation.writable(argument, x)


kernels = {"triton": True, "compiled": ("cpu",)}
differentiable = {
    "outputs": "y",
    "backward": reference.bias_relu_backward,
    "gradients": "x bias",
}
register(reference.bias_relu_backward, **kernels)
register(reference.bias_relu, **kernels, **differentiable, check=_check)
register(reference.bias_relu_, **kernels, **differentiable, check=_check_in_place, writes="x")


def bias_relu(x: Tensor, bias: Tensor, *, inplace: bool = False) -> Tensor:
    r"""Bias per channel and ReLU in one pass, :math:`y = \max(x + b, 0)`.

    The backward pass reads y, not x, and computes both gradients in one pass. It needs no value of x, so
    ``inplace=True`` is safe for the output of a convolution, whose own backward does not need it either.
    NaN gives NaN, as in :func:`torch.relu`.

    Args:
        x: input, of any memory layout.
        bias: :math:`b`; with half-precision x it may be float32. The sum is computed in float32 (float64 for
            float64 x) and rounded once.
        inplace: write y over x and return x.

    Shape: x, y ``[N, C, ...]``; bias ``[C]``.

    Raises ValueError for other shapes, dtypes or devices; with ``inplace=True`` also for an expanded x and
    for a leaf that requires a gradient. Double backward raises an error.
    """
    if inplace:
        torch.ops.fastflow.bias_relu_.default(x, bias)
        return x
    return torch.ops.fastflow.bias_relu.default(x, bias)
