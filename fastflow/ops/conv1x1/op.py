"""fastflow::conv1x1, its backward, and its inverse + backward."""

import torch
from torch import Tensor

from fastflow import validation
from fastflow.ops.conv1x1 import reference
from fastflow.ops.layout import acc_dtype
from fastflow.ops.registry import register

# channels: a GPU thread keeps the channels of a pixel in registers; torch.matmul computes wider products
MAX_COMPILED = 64


def _check(
    argument: str,
    x: Tensor,
    weight: Tensor,
    weight_inverse: Tensor | None = None,
    bias: Tensor | None = None,
    dy: Tensor | None = None,
) -> None:
    validation.floating_point(argument, x)
    c = x.shape[1]
    for name, v in (("weight", weight), ("weight_inverse", weight_inverse)):
        if v is not None:
            validation.same_device_and_precision(name, v, argument, x)
            validation.same_shape(name, v, (c, c), f"{argument} has {c} channels")
    if bias is not None:
        validation.same_device_and_precision("bias", bias, argument, x)
        validation.channels("bias", bias, c, f"one for each channel of {argument}")
    if dy is not None:
        validation.same_device_and_precision("dy", dy, argument, x)
        validation.gradients(argument, x, dy)


def _eligible(x: Tensor, *_: object) -> bool:
    double_on_gpu = x.dtype == torch.float64 and x.device.type != "cpu"
    return 0 < x.shape[1] <= MAX_COMPILED and not double_on_gpu


# The compiled ops take weights in the accumulation dtype; gradients have the dtype of the weights.
def _forward(op, x, weight, bias):
    acc = acc_dtype(x.dtype)
    return op(x, weight.to(acc), None if bias is None else bias.to(acc))


def _backward(op, x, weight, dy):
    dx, dweight, dbias = op(x, weight.to(acc_dtype(x.dtype)), dy.to(x.dtype))
    return dx, dweight.to(weight.dtype), dbias.to(weight.dtype)


def _inverse_backward(op, y, weight, weight_inverse, bias, dy):
    acc = acc_dtype(y.dtype)
    bias = None if bias is None else bias.to(acc)
    x, dx, dweight, dbias = op(y, weight.to(acc), weight_inverse.to(acc), bias, dy.to(y.dtype))
    return x, dx, dweight.to(weight.dtype), dbias.to(weight.dtype)


kernels = {"compiled": ("cpu", "cuda"), "eligible": _eligible}
register(reference.conv1x1_backward, **kernels, call=_backward)
register(reference.conv1x1_inverse_backward, **kernels, check=_check, call=_inverse_backward)
register(
    reference.conv1x1,
    **kernels,
    check=_check,
    call=_forward,
    outputs="y",
    backward=reference.conv1x1_backward,
    gradients="x weight bias",
    batched="x",
)


def conv1x1(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    r"""Invertible 1x1 convolution :math:`y = W x + b` at every position.

    Source: Glow, arXiv:1807.03039, section 3.2. Its log-det is :math:`P \log|\det W|` with P positions;
    :func:`fastflow.ops.lu_weight` returns :math:`\log|\det W|` with the weight. The inverse is the same op
    with the weight :math:`W^{-1}` and the bias :math:`-W^{-1} b`.

    Shape: x, y ``[N, C, ...]``; weight ``[C, C]``; bias ``[C]``.

    Raises ValueError for other shapes, dtypes or devices.
    """
    return torch.ops.fastflow.conv1x1.default(x, weight, bias)


def conv1x1_inverse_backward(
    y: Tensor, weight: Tensor, weight_inverse: Tensor, bias: Tensor | None, dy: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Input and gradients of :func:`conv1x1` from its output y: ``(x, dx, dweight, dbias)``.

    Reversible backprop uses it. Arguments, shapes and errors are as in :func:`conv1x1`; weight_inverse
    has the shape of weight, dy the shape of y.
    """
    x, dx, dweight, dbias = torch.ops.fastflow.conv1x1_inverse_backward.default(
        y, weight, weight_inverse, bias, dy
    )
    return x, dx, dweight, None if bias is None else dbias
