"""Helpers of the references: accumulation dtype, memory layout, broadcasting over channels and samples."""

import math

import torch
from torch import Tensor

from fastflow.transforms import in_transform


def acc_dtype(dtype: torch.dtype) -> torch.dtype:
    """Accumulation dtype: float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def dense_like(y: Tensor, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Returns ``y`` with the dtype and strides of ``torch.empty_like(x)``.

    With it, all implementations of an op and its fake return the same strides.
    """
    y = y.to(dtype or x.dtype)
    if (
        in_transform()
    ):  # vmap's tensors have other strides, and a tensor that it does not batch cannot be written
        return y
    if y.stride() == x.stride() or y.stride() == torch.empty_like(x, device="meta").stride():
        return y
    return torch.empty_like(x, dtype=y.dtype).copy_(y)


def channel_view(v: Tensor, x: Tensor) -> Tensor:
    """Views ``v`` of shape ``[C]`` as ``[1, C, 1, ...]``, broadcastable to ``x``."""
    return v.view(1, -1, *[1] * (x.ndim - 2))


def sample_view(v: Tensor, x: Tensor) -> Tensor:
    """Views ``v`` of shape ``[N]`` as ``[N, 1, ...]``, broadcastable to ``x``."""
    return v.view(-1, *[1] * (x.ndim - 1))


def all_but_channels(x: Tensor) -> list[int]:
    """Every dimension of ``x`` except 1, the channels."""
    return [d for d in range(x.ndim) if d != 1]


def channel_sum(v: Tensor) -> Tensor:
    """Sum over every dimension except 1, the channels."""
    return v.sum(all_but_channels(v))


def positions(x: Tensor) -> int:
    """Number of positions per sample: ``H * W`` for an image, 1 for a vector."""
    return math.prod(x.shape[2:])


def memory_format(x: Tensor) -> torch.memory_format:
    """Memory format of a squeezed or unsqueezed ``x``: channels_last if channels of ``x`` are contiguous.

    In a transform it is contiguous, because vmap supports no other.
    """
    if in_transform():
        return torch.contiguous_format
    side_by_side = x.ndim == 4 and x.shape[1] > 1 and x.stride(1) == 1 and not x.is_contiguous()
    return torch.channels_last if side_by_side else torch.contiguous_format
