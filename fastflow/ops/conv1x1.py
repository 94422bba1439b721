"""fastflow::conv1x1, its backward, and its inverse + backward."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastflow import check, reference
from fastflow.ops.library import register


def _fake(x, weight, bias):
    return torch.empty_like(x)


def _fake_backward(x, weight, dy):
    return torch.empty_like(x), weight.new_empty(weight.shape), weight.new_empty(x.shape[1])


def _fake_inverse_backward(y, weight, weight_inverse, bias, dy):
    return torch.empty_like(y), *_fake_backward(y, weight, dy)


class Conv1x1Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.with_bias = bias is not None
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.fastflow.conv1x1.default(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        dx, dweight, dbias = torch.ops.fastflow.conv1x1_backward.default(*ctx.saved_tensors, dy)
        return dx, dweight, dbias if ctx.with_bias else None


register("conv1x1", "(Tensor x, Tensor weight, Tensor? bias) -> Tensor", reference.conv1x1, _fake, Conv1x1Function)
register(
    "conv1x1_backward",
    "(Tensor x, Tensor weight, Tensor dy) -> (Tensor, Tensor, Tensor)",
    reference.conv1x1_backward,
    _fake_backward,
)
register(
    "conv1x1_inverse_backward",
    "(Tensor y, Tensor weight, Tensor weight_inverse, Tensor? bias, Tensor dy) -> (Tensor, Tensor, Tensor, Tensor)",
    reference.conv1x1_inverse_backward,
    _fake_inverse_backward,
)


def _check(argument: str, x: Tensor, weights: dict[str, Tensor], bias: Tensor | None) -> None:
    check.floating(argument, x)
    c = x.shape[1]
    for name, weight in weights.items():
        check.beside(name, weight, argument, x)
        check.same_shape(name, weight, (c, c), f"{argument} has {c} channels")
    if bias is not None:
        check.beside("bias", bias, argument, x)
        check.channels("bias", bias, c, f"one for each channel of {argument}")


def conv1x1(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    r"""Invertible 1x1 convolution :math:`y = W x + b` at every position (Glow, arXiv:1807.03039, section 3.2).

    Its log-det, :math:`P \log|\det W|` with P positions, comes with the weight from :func:`fastflow.ops.lu_weight`. The inverse is the
    same op with :math:`W^{-1}` and :math:`-W^{-1} b`.

    Shape: x, y ``[N, C, ...]``; weight ``[C, C]``; bias ``[C]``. Raises ValueError for other shapes, dtypes or devices.
    Double backward is an error.
    """
    _check("x", x, {"weight": weight}, bias)
    return torch.ops.fastflow.conv1x1.default(x, weight, bias)


def conv1x1_inverse_backward(
    y: Tensor, weight: Tensor, weight_inverse: Tensor, bias: Tensor | None, dy: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """``(x, dx, dweight, dbias)`` of :func:`conv1x1` from its output y. Arguments, shapes and errors as there; ``dy`` like y."""
    _check("y", y, {"weight": weight, "weight_inverse": weight_inverse}, bias)
    check.same_shape("dy", dy, y.shape, "like y")
    x, dx, dweight, dbias = torch.ops.fastflow.conv1x1_inverse_backward.default(y, weight, weight_inverse, bias, dy)
    return x, dx, dweight, None if bias is None else dbias
