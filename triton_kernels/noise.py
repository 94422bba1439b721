"""Counter-based noise: Philox4x32-10 (Salmon et al., SC'11), with the same bits as in the reference.

Compiled for sm_90, a uniform number has about 17 instructions; its bound is the write of 4 bytes (float32).
A normal number has about 56, twice as many as a GPU executes in the time of this write, so its bound is
arithmetic.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastflow.triton_kernels.tiles import launch

BLOCKS = 256  # Philox blocks per program: 2048 uniform numbers


@triton.jit
def philox(block, stream: tl.constexpr, sample, seed):
    """Four 32-bit words per ``block`` (int64).

    Counter: block, stream, low and high word of sample. Key: the two words of seed.
    """
    c0 = block.to(tl.uint32)
    c1 = tl.zeros_like(c0) + stream
    c2 = tl.zeros_like(c0) + sample.to(tl.uint32)
    c3 = tl.zeros_like(c0) + (sample >> 32).to(tl.uint32)
    k0 = seed.to(tl.uint32)
    k1 = (seed >> 32).to(tl.uint32)
    for _ in tl.static_range(10):
        p0 = c0.to(tl.uint64) * 0xD2511F53
        p1 = c2.to(tl.uint64) * 0xCD9E8D57
        c0, c1 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0, p1.to(tl.uint32)
        c2, c3 = (p0 >> 32).to(tl.uint32) ^ c3 ^ k1, p0.to(tl.uint32)
        k0 = (k0.to(tl.uint64) + 0x9E3779B9).to(tl.uint32)
        k1 = (k1.to(tl.uint64) + 0xBB67AE85).to(tl.uint32)
    return c0, c1, c2, c3


@triton.jit
def halves(block, sample, seed):
    """[B] blocks -> [B, 8] random numbers of 16 bits: the low, then the high half of each word."""
    w0, w1, w2, w3 = philox(block, 0, sample, seed)
    words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), [block.shape[0], 4])
    return tl.reshape(tl.join(words.to(tl.uint16), (words >> 16).to(tl.uint16)), [block.shape[0], 8])


@triton.jit
def uniform(half, ACC: tl.constexpr):
    """Uniform numbers of ``halves``: multiples of 2^-16."""
    return half.to(tl.int32).to(ACC) * 1.52587890625e-05


@triton.jit
def log_near_one(u):
    """log u, near 1 as a series of 1 - u, which is exact; the hardware's logarithm is inaccurate there."""
    t = 1 - u
    z = t / (2 - t)
    z2 = z * z
    series = -2 * z * (1 + z2 * (1 / 3 + z2 * (1 / 5 + z2 * (1 / 7 + z2 * (1 / 9 + z2 / 11)))))
    return tl.where(t < 0.0625, series, tl.log(tl.where(t < 0.0625, 1.0, u)))


@triton.jit
def cos_sin_of_word(word, ACC: tl.constexpr):
    """Cosine and sine of 2 pi word / 2^32: exact quadrant and remainder, then Taylor series up to pi / 4."""
    w = word.to(tl.int64)
    quadrant = (w + 0x20000000) >> 30
    r = (w - (quadrant << 30)).to(ACC) * 1.4629180792671596e-09
    r2 = r * r
    if ACC == tl.float64:
        s = r2 * (
            -1 / 5040 + r2 * (1 / 362880 + r2 * (-1 / 39916800 + r2 * (1 / 6227020800 - r2 / 1307674368000)))
        )
        c = r2 * (
            -1 / 720
            + r2
            * (
                1 / 40320
                + r2 * (-1 / 3628800 + r2 * (1 / 479001600 + r2 * (-1 / 87178291200 + r2 / 20922789888000)))
            )
        )
    else:
        s = r2 * (-1 / 5040 + r2 / 362880)
        c = r2 * (-1 / 720 + r2 * (1 / 40320 - r2 / 3628800))
    s = r + r * r2 * (-1 / 6 + r2 * (1 / 120 + s))
    c = 1 + r2 * (-1 / 2 + r2 * (1 / 24 + c))
    swapped = quadrant % 2 == 1
    half = quadrant & 2
    cos = tl.where(swapped, -s, c)
    sin = tl.where(swapped, c, s)
    return tl.where(half == 2, -cos, cos), tl.where(half == 2, -sin, sin)


@triton.jit
def normal(block, sample, seed, ACC: tl.constexpr):
    """[B] blocks -> [B, 4] standard normal numbers: Box-Muller of the word pairs (0, 1) and (2, 3)."""
    w0, w1, w2, w3 = philox(block, 1, sample, seed)
    radius = tl.sqrt(-2 * log_near_one((tl.join(w0, w2).to(ACC) + 0.5) * 2.3283064365386963e-10))
    cos, sin = cos_sin_of_word(tl.join(w1, w3), ACC)
    return tl.reshape(tl.join(radius * cos, radius * sin), [block.shape[0], 4])


@triton.jit(do_not_specialize=["sample_offset", "programs_each"])
def uniform_noise_kernel(out, seed, sample_offset, D, programs_each, ACC: tl.constexpr, BLOCKS: tl.constexpr):
    # out: [N, D]
    n = (tl.program_id(0) // programs_each).to(tl.int64)
    block = (tl.program_id(0) % programs_each).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    u = uniform(halves(block, sample_offset + n, tl.load(seed)), ACC)
    e = block[:, None] * 8 + tl.arange(0, 8)[None, :]
    tl.store(out + n * D + e, u.to(out.dtype.element_ty), mask=e < D)


def uniform_noise(size: list[int], seed: Tensor, offset: int, dtype: torch.dtype) -> Tensor:
    out = torch.empty(size, dtype=dtype, device=seed.device)
    if out.numel():
        d = out[0].numel()
        each = triton.cdiv(triton.cdiv(d, 8), BLOCKS)
        acc = tl.float64 if dtype == torch.float64 else tl.float32
        launch(
            uniform_noise_kernel, size[0] * each, out, seed, offset, d, each, warps=4, ACC=acc, BLOCKS=BLOCKS
        )
    return out
