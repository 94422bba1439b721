"""ActNorm in plain PyTorch."""

import torch
from torch import Tensor

from fastflow.ops.layout import acc_dtype, all_but_channels, channel_sum, channel_view, dense_like, positions


def actnorm(x: Tensor, log_scale: Tensor, bias: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    acc = acc_dtype(x.dtype)
    s, b = channel_view(log_scale.to(acc), x), channel_view(bias.to(acc), x)
    y = x.to(acc) * torch.exp(-s) - b if inverse else (x.to(acc) + b) * torch.exp(s)
    log_det = positions(x) * log_scale.to(acc).sum()
    return dense_like(y, x), (-log_det if inverse else log_det).repeat(x.shape[0])


def actnorm_backward(
    x: Tensor, log_scale: Tensor, bias: Tensor, dy: Tensor, dlog_det: Tensor, inverse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients ``(dx, dlog_scale, dbias)`` from the input of the given direction."""
    acc = acc_dtype(x.dtype)
    s, b, g = channel_view(log_scale.to(acc), x), channel_view(bias.to(acc), x), dy.to(acc)
    dlog_scale = positions(x) * dlog_det.to(acc).sum()
    if inverse:
        dx = g * torch.exp(-s)
        dbias = -channel_sum(g)
        dlog_scale = -channel_sum(dx * x.to(acc)) - dlog_scale
    else:
        dx = g * torch.exp(s)
        dbias = channel_sum(dx)
        dlog_scale = channel_sum(dx * (x.to(acc) + b)) + dlog_scale
    return dense_like(dx, dy), dlog_scale.to(log_scale.dtype), dbias.to(bias.dtype)


def actnorm_inverse_backward(
    y: Tensor, log_scale: Tensor, bias: Tensor, dy: Tensor, dlog_det: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Input and gradients ``(x, dx, dlog_scale, dbias)`` of the forward direction, from its output."""
    x, _ = actnorm(y, log_scale, bias, True)
    return x, *actnorm_backward(x, log_scale, bias, dy, dlog_det, False)


def actnorm_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel over the batch and the positions."""
    var, mean = torch.var_mean(x.to(acc_dtype(x.dtype)), all_but_channels(x), correction=0)
    return mean, var
