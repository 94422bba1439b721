"""fastflow::scaled_weight: a convolution's weight and bias with the scale of its output channels folded in."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastflow import check, reference
from fastflow.ops.library import register, with_cpu, with_kernel


def _fake(weight, log_scale, bias, factor):
    return torch.empty_like(weight), bias.new_empty(bias.shape)


def _fake_backward(weight, log_scale, bias, factor, dweight, dbias):
    return torch.empty_like(weight), log_scale.new_empty(log_scale.shape), bias.new_empty(bias.shape)


class ScaledWeightFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight: Tensor, log_scale: Tensor, bias: Tensor, factor: float) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(weight, log_scale, bias)
        ctx.factor = factor
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.fastflow.scaled_weight.default(weight, log_scale, bias, factor)

    @staticmethod
    @once_differentiable
    def backward(ctx, dweight: Tensor, dbias: Tensor):
        return *torch.ops.fastflow.scaled_weight_backward.default(*ctx.saved_tensors, ctx.factor, dweight, dbias), None


def _lie_alike(*weights: Tensor) -> bool:
    """Whether each output channel's part lies in one piece, in the same order in all."""
    return all(w.is_contiguous() for w in weights) or (
        weights[0].ndim == 4 and all(w.is_contiguous(memory_format=torch.channels_last) for w in weights)
    )


def _body(plain: Callable) -> Callable:
    """The kernels, for weights of one kind that lie as kernels read them; else PyTorch."""
    compiled = with_kernel(with_cpu(plain), "scaled_weight")

    def body(weight, log_scale, bias, factor, *upstream):
        tensors = (weight, log_scale, bias, *upstream)
        fits = weight.dtype in (torch.float32, torch.float64) and all(t.dtype == weight.dtype for t in tensors)
        fits = fits and weight.numel() and _lie_alike(weight, *upstream[:1])
        return (compiled if fits else plain)(weight, log_scale, bias, factor, *upstream)

    return body


register(
    "scaled_weight",
    "(Tensor weight, Tensor log_scale, Tensor bias, float factor) -> (Tensor, Tensor)",
    _body(reference.scaled_weight),
    _fake,
    ScaledWeightFunction,
)
register(
    "scaled_weight_backward",
    "(Tensor weight, Tensor log_scale, Tensor bias, float factor, Tensor dweight, Tensor dbias) -> (Tensor, Tensor, Tensor)",
    _body(reference.scaled_weight_backward),
    _fake_backward,
)


def scaled_weight(weight: Tensor, log_scale: Tensor, bias: Tensor, factor: float = 1.0) -> tuple[Tensor, Tensor]:
    r"""Weight and bias of a convolution whose output is scaled, :math:`(e^{f l} w, e^{f l} b)`: a convolution with these is
    :math:`e^{f l} (w * x + b)`, ActNorm after :math:`w * x`, in one pass (Glow, arXiv:1807.03039, section 3.1).

    Args:
        factor: f, of the log scale: 1 for ActNorm, 3 for the last layer of Glow's published code.

    Shape: weight ``[O, I, ...]``; log_scale, bias ``[O]``. Raises ValueError for other shapes, dtypes or devices. Double backward is an
    error.
    """
    check.floating("weight", weight)
    for name, v in (("log_scale", log_scale), ("bias", bias)):
        check.beside(name, v, "weight", weight)
        check.channels(name, v, weight.shape[0], "one for each output channel of weight")
    return torch.ops.fastflow.scaled_weight.default(weight, log_scale, bias, factor)
