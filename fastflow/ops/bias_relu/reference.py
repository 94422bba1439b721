"""Bias, scale and ReLU in plain PyTorch."""

import torch
from torch import Tensor

from fastflow.ops.layout import acc_dtype, channel_sum, channel_view, dense_like


def bias_relu(x: Tensor, bias: Tensor, log_scale: Tensor | None, relu: bool) -> Tensor:
    acc = acc_dtype(x.dtype)
    v = x.to(acc) + channel_view(bias.to(acc), x)
    if log_scale is not None:
        v = v * channel_view(log_scale.to(acc).exp(), x)
    return dense_like(torch.relu(v) if relu else v, x)


def bias_relu_(x: Tensor, bias: Tensor, log_scale: Tensor | None, relu: bool) -> None:
    x.copy_(bias_relu(x, bias, log_scale, relu))


def bias_relu_backward(
    y: Tensor, dy: Tensor, log_scale: Tensor | None, relu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients ``(dx, dbias, dlog_scale)`` from the output; dlog_scale is empty without a log_scale.

    dbias and dlog_scale have the accumulation dtype, which autograd casts.
    """
    acc = acc_dtype(y.dtype)
    # like torch.relu, passes the gradient where y is NaN
    dx = (torch.where(y <= 0, 0, dy) if relu else dy.clone()).to(acc)
    if log_scale is None:
        return dense_like(dx, dy), channel_sum(dx), dx.new_empty(0)
    dlog_scale = channel_sum(dx * y.to(acc))
    dx = dx * channel_view(log_scale.to(acc).exp(), y)
    return dense_like(dx, dy), channel_sum(dx), dlog_scale
