"""Invertible 1x1 convolution in plain PyTorch."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastflow.ops.layout import acc_dtype, channel_view, dense_like, memory_format


def conv1x1(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    acc = acc_dtype(x.dtype)
    w, b = weight.to(acc), None if bias is None else bias.to(acc)
    v = x.to(acc)
    if x.ndim == 2:
        y = F.linear(v, w, b)
    elif x.ndim == 4 and x.is_cuda and memory_format(x) == torch.channels_last:
        # cuDNN uses TF32 by default, whose 10 bits are too few to invert; a matrix product does not use it
        y = F.linear(v.movedim(1, -1), w, b).movedim(-1, 1)
    elif x.ndim == 4 and not x.is_cuda and x.numel():  # conv2d rejects images without pixels
        y = F.conv2d(v, w[:, :, None, None], b)
    else:
        y = torch.matmul(w, v.flatten(2)).unflatten(2, x.shape[2:])
        y = y if b is None else y + channel_view(b, y)
    return dense_like(y, x)


def conv1x1_backward(x: Tensor, weight: Tensor, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients ``(dx, dweight, dbias)``."""
    acc = acc_dtype(x.dtype)
    dx = dense_like(conv1x1(dy.to(acc), weight.to(acc).mT, None), x)
    rows, columns = (v.to(acc).movedim(1, -1).reshape(-1, v.shape[1]) for v in (dy, x))
    dweight = rows.mT @ columns
    return dx, dweight.to(weight.dtype), rows.sum(0).to(weight.dtype)


def conv1x1_inverse_backward(
    y: Tensor, weight: Tensor, weight_inverse: Tensor, bias: Tensor | None, dy: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Input and gradients ``(x, dx, dweight, dbias)`` of the forward direction, from its output."""
    v = y if bias is None else dense_like(y.to(acc_dtype(y.dtype)) - channel_view(bias, y), y)
    x = conv1x1(v, weight_inverse, None)
    return x, *conv1x1_backward(x, weight, dy)
