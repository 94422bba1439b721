"""Dequantization and its inverse in plain PyTorch."""

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from fastflow.ops.layout import acc_dtype, dense_like, sample_view
from fastflow.ops.noise.reference import uniform_noise
from fastflow.ops.squeeze.reference import squeeze


def _dequantized(
    x: Tensor, noise: Tensor | None, seed: Tensor | None, offset: int,
    n_bits: int, scale: float, shift: float, logit: bool, dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """``(p, 1 - p)`` with p = scale v + shift, v = (x + u) / 2^n_bits; 1 - p is None without the logit.

    1 - p is computed from 1 - v, so that it is accurate for p near 1.
    """
    acc = acc_dtype(dtype)
    u = uniform_noise(list(x.shape), cast("Tensor", seed), offset, acc) if noise is None else noise.to(acc)
    bins = 2.0**n_bits
    xf = x.to(acc)
    p = torch.add(xf, u) * (scale / bins) + shift
    if not logit:
        return p, None
    q = ((bins - xf) - u) * (scale / bins) + (1 - scale - shift)
    return p, q


def dequantize(
    x: Tensor, noise: Tensor | None, seed: Tensor | None, offset: int,
    n_bits: int, scale: float, shift: float, logit: bool, squeeze_order: str | None, dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    p, q = _dequantized(x, noise, seed, offset, n_bits, scale, shift, logit, dtype)
    log_det = p.new_full((x.shape[0],), math.prod(x.shape[1:]) * math.log(scale / 2.0**n_bits))
    if q is not None:
        log_p, log_q = torch.log(p), torch.log(q)
        log_det = log_det - (log_p + log_q).flatten(1).sum(1)
        p = log_p - log_q
    y = dense_like(p, x, dtype)
    return y if squeeze_order is None else squeeze(y, squeeze_order, False), log_det


def dequantize_backward(
    x: Tensor, noise: Tensor, dy: Tensor, dlog_det: Tensor,
    n_bits: int, scale: float, shift: float, logit: bool, squeeze_order: str | None,
) -> Tensor:  # fmt: skip
    """Gradient of the noise, for variational dequantization (arXiv:1902.00275)."""
    g = (dy if squeeze_order is None else squeeze(dy, squeeze_order, True)).to(acc_dtype(noise.dtype))
    if logit:
        p, q = _dequantized(x, noise, None, 0, n_bits, scale, shift, logit, noise.dtype)
        q = cast("Tensor", q)
        g = (g + sample_view(dlog_det.to(p.dtype), p) * (p - q)) / (p * q)
    return dense_like(g * (scale / 2.0**n_bits), noise)


def dequantize_inverse(
    y: Tensor, n_bits: int, scale: float, shift: float, logit: bool, squeeze_order: str | None
) -> tuple[Tensor, Tensor]:
    y = y if squeeze_order is None else squeeze(y, squeeze_order, True)
    p = y.to(acc_dtype(y.dtype))
    log_det = p.new_full((y.shape[0],), -math.prod(y.shape[1:]) * math.log(scale / 2.0**n_bits))
    if logit:
        log_det = log_det + (F.logsigmoid(p) + F.logsigmoid(-p)).flatten(1).sum(1)
        p = torch.sigmoid(p)
    x = torch.floor((p - shift) * (2.0**n_bits / scale)).clamp(0, 2**n_bits - 1)
    return dense_like(x, y, torch.uint8), log_det


def dequantize_inverse_backward(y: Tensor, dlog_det: Tensor, logit: bool) -> Tensor:
    """Gradient dy of the log-det; pixels are integers and have no gradient."""
    if not logit:
        return torch.zeros_like(y)
    # d/dy (log sigmoid(y) + log sigmoid(-y)) = 1 - 2 sigmoid(y) = -tanh(y / 2)
    return dense_like(-torch.tanh(y.to(acc_dtype(y.dtype)) / 2) * sample_view(dlog_det, y), y)
