"""fastflow::conv1x1, its backward, and its inverse + backward."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastflow import check
from fastflow.ops.conv1x1 import reference
from fastflow.ops.layout import acc_dtype
from fastflow.ops.registry import register, with_compiled


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


MAX_COMPILED = 64  # channels: a pixel's fit a GPU thread's registers; beyond, the library's product of matrices is the better one


def _applies(x, *_):
    double_on_gpu = x.dtype == torch.float64 and x.device.type != "cpu"
    return 0 < x.shape[1] <= MAX_COMPILED and not double_on_gpu


_conv1x1, _conv1x1_backward, _conv1x1_inverse_backward = (
    with_compiled(f.__name__, f, on=lambda x, *_: x, applies=_applies)
    for f in (reference.conv1x1, reference.conv1x1_backward, reference.conv1x1_inverse_backward)
)


# Weights go in the dtype that sums are computed in, and their gradients come back in their own.
def _forward(x, weight, bias):
    acc = acc_dtype(x.dtype)
    return _conv1x1(x, weight.to(acc), None if bias is None else bias.to(acc))


def _backward(x, weight, dy):
    acc = acc_dtype(x.dtype)
    dx, dweight, dbias = _conv1x1_backward(x, weight.to(acc), dy.to(x.dtype))
    return dx, dweight.to(weight.dtype), dbias.to(weight.dtype)


def _inverse_backward(y, weight, weight_inverse, bias, dy):
    acc = acc_dtype(y.dtype)
    given = y, weight.to(acc), weight_inverse.to(acc), None if bias is None else bias.to(acc), dy.to(y.dtype)
    x, dx, dweight, dbias = _conv1x1_inverse_backward(*given)
    return x, dx, dweight.to(weight.dtype), dbias.to(weight.dtype)


register("conv1x1", "(Tensor x, Tensor weight, Tensor? bias) -> Tensor", _forward, _fake, Conv1x1Function)
register(
    "conv1x1_backward",
    "(Tensor x, Tensor weight, Tensor dy) -> (Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
)
register(
    "conv1x1_inverse_backward",
    "(Tensor y, Tensor weight, Tensor weight_inverse, Tensor? bias, Tensor dy) -> (Tensor, Tensor, Tensor, Tensor)",
    _inverse_backward,
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
    check.beside("dy", dy, "y", y)
    check.same_shape("dy", dy, y.shape, "like y")
    x, dx, dweight, dbias = torch.ops.fastflow.conv1x1_inverse_backward.default(
        y, weight, weight_inverse, bias, dy
    )
    return x, dx, dweight, None if bias is None else dbias
