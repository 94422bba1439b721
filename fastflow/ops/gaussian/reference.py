"""Log-density and samples of a diagonal Gaussian in plain PyTorch."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fastflow.ops.layout import acc_dtype, channel_sum, channel_view, dense_like, positions, sample_view
from fastflow.ops.noise.reference import normal_noise

LOG_2PI = math.log(2 * math.pi)


def gaussian_terms(
    z: Tensor, mean: Tensor | None, log_scale: Tensor | None, acc: torch.dtype
) -> tuple[Tensor | None, Tensor | None]:
    """Mean and log scale in the accumulation dtype, broadcastable to ``z``; None for None."""

    def term(v: Tensor | None) -> Tensor | None:
        if v is None:
            return None
        return channel_view(v.to(acc), z) if v.ndim == 1 and z.ndim > 1 else v.to(acc)

    return term(mean), term(log_scale)


def gaussian_log_prob(z: Tensor, mean: Tensor | None, log_scale: Tensor | None) -> Tensor:
    acc = acc_dtype(z.dtype)
    m, s = gaussian_terms(z, mean, log_scale, acc)
    e = z.to(acc) if m is None else z.to(acc) - m
    if s is not None:
        e = e * torch.exp(-s)
    log_prob = -0.5 * ((e * e).flatten(1).sum(1) + LOG_2PI * math.prod(z.shape[1:]))
    if log_scale is None or s is None:
        return log_prob
    return log_prob - (s.sum() * positions(z) if log_scale.ndim == 1 and z.ndim > 1 else s.flatten(1).sum(1))


def gaussian_log_prob_backward(
    z: Tensor, mean: Tensor | None, log_scale: Tensor | None, dlog_prob: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients ``(dz, dmean, dlog_scale)``; empty for an argument that is None."""
    acc = acc_dtype(z.dtype)
    m, s = gaussian_terms(z, mean, log_scale, acc)
    g = sample_view(dlog_prob.to(acc), z)
    e = z.to(acc) if m is None else z.to(acc) - m
    if s is None:
        dz = -g * e
    else:
        inverse_scale = torch.exp(-s)
        e = e * inverse_scale
        dz = -g * e * inverse_scale

    def gradient(v: Tensor | None, dv: Callable[[], Tensor]) -> Tensor:
        if v is None:
            return z.new_empty(0)
        return channel_sum(dv()).to(v.dtype) if v.ndim == 1 and z.ndim > 1 else dense_like(dv(), v)

    return dense_like(dz, z), gradient(mean, lambda: -dz), gradient(log_scale, lambda: g * (e * e - 1))


def gaussian_sample(
    size: list[int],
    mean: Tensor | None,
    log_scale: Tensor | None,
    temperature: float,
    seed: Tensor,
    offset: int,
    dtype: torch.dtype,
) -> Tensor:
    return gaussian_sample_by(normal_noise, size, mean, log_scale, temperature, seed, offset, dtype)


def gaussian_sample_by(
    normal: Callable[..., Tensor],
    size: list[int],
    mean: Tensor | None,
    log_scale: Tensor | None,
    temperature: float,
    seed: Tensor,
    offset: int,
    dtype: torch.dtype,
) -> Tensor:
    """Computes :func:`gaussian_sample` with the noise ``normal``, called as :func:`normal_noise`."""
    acc = acc_dtype(dtype)
    z = normal(size, seed, offset, acc)
    m, s = gaussian_terms(z, mean, log_scale, acc)
    if temperature != 1:
        z = z * temperature
    if s is not None:
        z = z * torch.exp(s)
    if m is not None:
        z = z + m
    return z.to(dtype).contiguous()


def gaussian_sample_backward(
    z: Tensor, mean: Tensor | None, log_scale: Tensor | None, dz: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients ``(dmean, dlog_scale)`` from the sample; None for an argument that is None."""

    def gradient(v: Tensor | None, dv: Tensor) -> Tensor | None:
        if v is None:
            return None
        return channel_sum(dv).to(v.dtype) if v.ndim == 1 and z.ndim > 1 else dv.to(v.dtype)

    m, _ = gaussian_terms(z, mean, None, z.dtype)
    return gradient(mean, dz), gradient(log_scale, dz * (z if m is None else z - m))
