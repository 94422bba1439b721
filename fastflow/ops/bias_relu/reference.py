"""Bias and ReLU in plain PyTorch."""

import torch
from torch import Tensor

from fastflow.ops.layout import acc_dtype, channel_sum, channel_view, dense_like


def bias_relu(x: Tensor, bias: Tensor) -> Tensor:
    acc = acc_dtype(x.dtype)
    return dense_like(torch.relu(x.to(acc) + channel_view(bias.to(acc), x)), x)


def bias_relu_(x: Tensor, bias: Tensor) -> None:
    x.copy_(bias_relu(x, bias))


def bias_relu_backward(y: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients ``(dx, dbias)`` from the output; dbias has the accumulation dtype, which autograd casts."""
    dx = torch.where(y <= 0, 0, dy)  # like torch.relu, passes the gradient where y is NaN
    return dense_like(dx, dy), channel_sum(dx.to(acc_dtype(y.dtype)))
