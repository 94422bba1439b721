"""fastflow::actnorm, its backward, its inverse + backward, and the statistics that initialise it."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastflow import check
from fastflow.ops.actnorm import reference
from fastflow.ops.layout import acc_dtype
from fastflow.ops.registry import register, with_cpu, with_kernel


def _fake(x, log_scale, bias, inverse):
    return torch.empty_like(x), x.new_empty(x.shape[0], dtype=acc_dtype(x.dtype))


def _fake_backward(x, log_scale, bias, dy, dlog_det, inverse):
    return torch.empty_like(dy), log_scale.new_empty(log_scale.shape), bias.new_empty(bias.shape)


def _fake_inverse_backward(y, log_scale, bias, dy, dlog_det):
    return (
        torch.empty_like(y),
        torch.empty_like(dy),
        log_scale.new_empty(log_scale.shape),
        bias.new_empty(bias.shape),
    )


def _fake_statistics(x):
    return tuple(x.new_empty(x.shape[1], dtype=acc_dtype(x.dtype)) for _ in range(2))


class ActNormFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, log_scale: Tensor, bias: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, log_scale, bias)
        ctx.inverse = inverse
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.fastflow.actnorm.default(x, log_scale, bias, inverse)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor, dlog_det: Tensor):
        return *torch.ops.fastflow.actnorm_backward.default(
            *ctx.saved_tensors, dy, dlog_det, ctx.inverse
        ), None


register(
    "actnorm",
    "(Tensor x, Tensor log_scale, Tensor bias, bool inverse) -> (Tensor, Tensor)",
    with_kernel(with_cpu(reference.actnorm), "actnorm"),
    _fake,
    ActNormFunction,
)
register(
    "actnorm_backward",
    "(Tensor x, Tensor log_scale, Tensor bias, Tensor dy, Tensor dlog_det, bool inverse) -> (Tensor, Tensor, Tensor)",
    with_kernel(with_cpu(reference.actnorm_backward), "actnorm"),
    _fake_backward,
)
register(
    "actnorm_inverse_backward",
    "(Tensor y, Tensor log_scale, Tensor bias, Tensor dy, Tensor dlog_det) -> (Tensor, Tensor, Tensor, Tensor)",
    with_kernel(with_cpu(reference.actnorm_inverse_backward), "actnorm"),
    _fake_inverse_backward,
)
register(
    "actnorm_statistics",
    "(Tensor x) -> (Tensor, Tensor)",
    with_kernel(with_cpu(reference.actnorm_statistics), "actnorm"),
    _fake_statistics,
)


def _check(argument: str, x: Tensor, log_scale: Tensor, bias: Tensor) -> None:
    check.floating(argument, x)
    for name, v in (("log_scale", log_scale), ("bias", bias)):
        check.beside(name, v, argument, x)
        check.channels(name, v, x.shape[1], f"one for each channel of {argument}")


def actnorm(x: Tensor, log_scale: Tensor, bias: Tensor, *, inverse: bool = False) -> tuple[Tensor, Tensor]:
    r"""Activation normalization :math:`y = e^{s} (x + b)` per channel, with its log-det (Glow, arXiv:1807.03039, section 3.1).

    Args:
        x: input; the output y with ``inverse=True``, which gives :math:`x = e^{-s} y - b`.
        log_scale, bias: :math:`s` and :math:`b`.

    Shape: x, y ``[N, C, ...]``; log_scale, bias ``[C]``; log_det ``[N]``, nats, :math:`\pm P \sum_c s_c` with P the positions of a
    sample (H W of an image, 1 of a vector), float32 (float64 for float64 x).

    Raises ValueError for other shapes, dtypes or devices. Double backward is an error.
    """
    _check("x", x, log_scale, bias)
    return torch.ops.fastflow.actnorm.default(x, log_scale, bias, inverse)


def actnorm_inverse_backward(
    y: Tensor, log_scale: Tensor, bias: Tensor, dy: Tensor, dlog_det: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``(x, dx, dlog_scale, dbias)`` of :func:`actnorm` from its output y. Arguments, shapes and errors as there."""
    _check("y", y, log_scale, bias)
    check.same_shape("dy", dy, y.shape, "like y")
    check.same_shape("dlog_det", dlog_det, y.shape[:1], "one value for each sample")
    return torch.ops.fastflow.actnorm_inverse_backward.default(y, log_scale, bias, dy, dlog_det)


def actnorm_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel over batch and positions, ``[C]`` each, float32 (float64 for float64 x).

    Not differentiable: it serves ActNorm's initialization (Glow, section 3.1). Raises ValueError for x that is no batch ``[N, C, ...]``.
    """
    check.floating("x", x)
    return torch.ops.fastflow.actnorm_statistics.default(x.detach())
