"""Counter-based noise (Philox4x32-10) in plain PyTorch."""

import math

import torch
from torch import Tensor

from fastflow.ops.layout import acc_dtype

LOW32 = 0xFFFFFFFF
UNIFORM, NORMAL = 0, 1  # the stream: the second word of the counter


def philox(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], seed: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 (Salmon et al., SC'11): four 32-bit words for four counter words.

    All words are int64 tensors with values in ``[0, 2^32)``.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = seed & LOW32, (seed >> 32) & LOW32
    for _ in range(10):
        # int64 products wrap modulo 2^64, so both 32-bit halves are correct
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (p1 >> 32) & LOW32 ^ c1 ^ k0, p1 & LOW32, (p0 >> 32) & LOW32 ^ c3 ^ k1, p0 & LOW32
        k0, k1 = (k0 + 0x9E3779B9) & LOW32, (k1 + 0xBB67AE85) & LOW32
    return c0, c1, c2, c3


def _words(n: int, blocks: int, seed: Tensor, offset: int, stream: int) -> Tensor:
    """``[n, blocks, 4]`` words; the counter is (block, stream, low and high word of the sample)."""
    sample = offset + torch.arange(n, device=seed.device).view(-1, 1)
    block = torch.arange(blocks, device=seed.device).view(1, -1)
    zero = torch.zeros_like(sample * block)
    words = philox((block + zero, zero + stream, (sample & LOW32) + zero, (sample >> 32) + zero), seed)
    return torch.stack(words, dim=2)


def uniform_noise(size: list[int], seed: Tensor, offset: int, dtype: torch.dtype) -> Tensor:
    """Uniform noise on ``{0, 1, ..., 65535} / 65536``.

    Element e of a sample is half ``e % 2`` of word ``e // 2 % 4`` of block ``e // 8``.
    """
    n, d = size[0], math.prod(size[1:])
    words = _words(n, -(-d // 8), seed, offset, UNIFORM)
    halves = torch.stack([words & 0xFFFF, words >> 16], dim=3).flatten(1)[:, :d]
    return (halves.to(acc_dtype(dtype)) * 2.0**-16).to(dtype).reshape(size)


def normal_noise(size: list[int], seed: Tensor, offset: int, dtype: torch.dtype) -> Tensor:
    """Standard normal noise by the Box-Muller transform.

    Elements ``4b .. 4b + 3`` of a sample are computed from the word pairs (0, 1) and (2, 3) of block b.
    """
    n, d = size[0], math.prod(size[1:])
    words = _words(n, -(-d // 4), seed, offset, NORMAL).unflatten(2, (2, 2)).to(acc_dtype(dtype))
    radius = torch.sqrt(-2 * torch.log((words[..., 0] + 0.5) * 2.0**-32))
    angle = words[..., 1] * (2.0**-32 * 2 * math.pi)
    pair = torch.stack([radius * torch.cos(angle), radius * torch.sin(angle)], dim=3)
    return pair.flatten(1)[:, :d].to(dtype).reshape(size)
