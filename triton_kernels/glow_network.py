"""Coupling network of Glow, 3x3, 1x1 and 3x3 convolution with ReLUs, without hidden activations in memory.

The first kernel computes three matrix products for a tile of pixels: the 3x3 neighbourhoods of x times w1, the
result times w2, and that times w3 with nine columns per output channel, one per tap. The second kernel adds
the columns of neighbouring pixels (col2im). The sums have a fixed order; there are no atomics.

Bound, per pixel with C channels in, D out and H hidden: 2 H (9 C + H + 9 D) operations, and in half precision
2 C + 2 D + 72 D bytes: x and y once, the columns in float32 once written and once read. A tile of 128 pixels
accumulates 256 hidden channels at a time. For H = 512 it therefore computes the first product twice, and writes
and reads the columns twice. docs/backends.md has the numbers for Glow, and compares a halo of recomputed pixels.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastflow.triton_kernels.tiles import launch, power_of_two

# Programs that fill a large GPU, one per multiprocessor. The number does not depend on the device, so the same
# input gives the same bits on every device of a model.
PROGRAMS = 132
OFFSETS = 2**31  # offsets within a tile's images have 32 bits


@triton.jit
def relu(v):
    return tl.maximum(v, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit(do_not_specialize=["pixels"])
def glow_network_kernel(
    x, w1, b1, w2, b2, w3, columns, pixels, x_n, x_c, x_h, x_w,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, IN: tl.constexpr, HIDDEN: tl.constexpr, OUT: tl.constexpr,
    PRECISION: tl.constexpr, BLOCKS: tl.constexpr, SPLITS: tl.constexpr,
    TILE_P: tl.constexpr, TILE_K: tl.constexpr, TILE_H1: tl.constexpr, TILE_H2: tl.constexpr,
    TILE_C: tl.constexpr,
):  # fmt: skip
    # x: [N, IN, HEIGHT, WIDTH];  w1: [HIDDEN, 9, IN];  w2: [HIDDEN, HIDDEN];  w3: [OUT, 9, HIDDEN]
    # columns: [SPLITS, pixels, 9, OUT], of each tap the summand of the pixel that has this one as its neighbour
    first = (tl.program_id(0) // SPLITS).to(tl.int64) * TILE_P
    split = tl.program_id(0) % SPLITS
    q = tl.arange(0, TILE_P)
    # divisions by constants in 32 bits: each thread has 32 to 64 pixels, and spills with 64-bit divisions
    at = (first % (HEIGHT * WIDTH)).to(tl.int32) + q
    n, i, j = at // (HEIGHT * WIDTH), at % (HEIGHT * WIDTH) // WIDTH, at % WIDTH
    k = tl.arange(0, TILE_K)
    di, dj = k // IN // 3 - 1, k // IN % 3 - 1
    row, column = i[:, None] + di[None, :], j[:, None] + dj[None, :]
    inside = (row >= 0) & (row < HEIGHT) & (column >= 0) & (column < WIDTH)
    inside &= (q < pixels - first)[:, None] & (k < 9 * IN)[None, :]
    offsets = (n * x_n + i * x_h + j * x_w)[:, None] + (di * x_h + dj * x_w + k % IN * x_c)[None, :]
    at_x = x + first // (HEIGHT * WIDTH) * x_n
    b_x = tl.load(at_x + offsets, mask=inside, other=0.0)
    columns += (split * tl.cast(pixels, tl.int64) + first) * (9 * OUT)
    for block in tl.range(BLOCKS // SPLITS, disable_licm=True):
        h2 = (block * SPLITS + split) * TILE_H2 + tl.arange(0, TILE_H2)
        b_h2 = tl.zeros([TILE_P, TILE_H2], tl.float32)
        for start in tl.range(0, HIDDEN, TILE_H1, disable_licm=PRECISION == "tf32x3"):
            h1 = start + tl.arange(0, TILE_H1)
            b_w1 = tl.load(
                w1 + h1[None, :] * (9 * IN) + k[:, None], mask=(h1 < HIDDEN)[None, :] & (k < 9 * IN)[:, None],
                other=0.0,
            )  # fmt: skip
            b_b1 = tl.load(b1 + h1, mask=h1 < HIDDEN, other=0.0).to(tl.float32)
            b_h1 = relu(tl.dot(b_x, b_w1, input_precision=PRECISION) + b_b1[None, :])
            b_w2 = tl.load(
                w2 + h2[None, :] * HIDDEN + h1[:, None], mask=(h2 < HIDDEN)[None, :] & (h1 < HIDDEN)[:, None],
                other=0.0,
            )  # fmt: skip
            b_h2 = tl.dot(b_h1.to(x.dtype.element_ty), b_w2, b_h2, input_precision=PRECISION)
        b_b2 = tl.load(b2 + h2, mask=h2 < HIDDEN, other=0.0).to(tl.float32)
        b_relu = relu(b_h2 + b_b2[None, :]).to(x.dtype.element_ty)
        for start in range(0, 9 * OUT, TILE_C):
            c = start + tl.arange(0, TILE_C)
            b_w3 = tl.load(
                w3 + (c % OUT * 9 + c // OUT)[None, :] * HIDDEN + h2[:, None],
                mask=(c < 9 * OUT)[None, :] & (h2 < HIDDEN)[:, None], other=0.0,
            )  # fmt: skip
            at_columns = columns + q[:, None] * (9 * OUT) + c[None, :]
            mask = (q < pixels - first)[:, None] & (c < 9 * OUT)[None, :]
            b_columns = tl.dot(b_relu, b_w3, input_precision=PRECISION)
            if BLOCKS > SPLITS:
                b_columns += tl.load(at_columns, mask=mask & (block > 0), other=0.0)
            tl.store(at_columns, b_columns, mask=mask)
        if BLOCKS > SPLITS:
            tl.debug_barrier()  # other threads may read the columns that a thread wrote


@triton.jit(do_not_specialize=["pixels", "height", "width"])
def glow_network_columns_kernel(
    columns, b3, y, pixels, height, width, y_n, y_c, y_p,
    OUT: tl.constexpr, SPLITS: tl.constexpr, TILE_P: tl.constexpr, TILE_K: tl.constexpr,
):  # fmt: skip
    # columns: [SPLITS, pixels, 9, OUT];  y: [N, OUT, height * width]
    p = tl.program_id(0).to(tl.int64) * TILE_P + tl.arange(0, TILE_P)
    n, position = p // (height * width), (p % (height * width)).to(tl.int32)
    i, j = position // width, position % width
    k = tl.arange(0, TILE_K)
    b_y = tl.zeros([TILE_P, TILE_K], tl.float32)
    for split in tl.static_range(SPLITS):
        for tap in tl.static_range(9):
            row, column = i + tap // 3 - 1, j + tap % 3 - 1
            inside = (p < pixels) & (row >= 0) & (row < height) & (column >= 0) & (column < width)
            neighbour = p + (tap // 3 - 1) * width + tap % 3 - 1
            at = (neighbour + tl.cast(pixels, tl.int64) * split)[:, None] * (9 * OUT) + (tap * OUT + k)[
                None, :
            ]
            b_y += tl.load(columns + at, mask=inside[:, None] & (k < OUT)[None, :], other=0.0)
    b_y += tl.load(b3 + k, mask=k < OUT, other=0.0).to(tl.float32)[None, :]
    at_y = y + (n * y_n + position * y_p)[:, None] + (k * y_c)[None, :]
    tl.store(at_y, b_y.to(y.dtype.element_ty), mask=(p < pixels)[:, None] & (k < OUT)[None, :])


class Tiles(NamedTuple):
    """Sizes of a launch of ``glow_network_kernel``, powers of two except the last two."""

    pixels: int
    inputs: int  # 9 taps of each channel of x
    hidden_1: int  # channels of the first activation, computed at once
    hidden_2: int  # channels of the second activation, accumulated at once
    outputs: int  # columns, 9 for each channel of y
    blocks: int  # of hidden_2
    splits: int  # programs that share a tile of pixels: 1, or one for each block


@lru_cache(maxsize=256)
def tiles(pixels: int, inputs: int, hidden: int, outputs: int, itemsize: int, three_terms: bool) -> Tiles:
    """Tiles that fit 255 registers a thread and 163 KB of shared memory.

    A thread accumulates at most 128 numbers of the second activation. The neighbourhoods of x take at most
    64 KB and a block of w1 16 KB. With three terms each factor takes twice the registers and is in more of
    them at once. Few pixels are shared among more programs.
    """
    tile_k = max(power_of_two(9 * inputs), 16)
    if three_terms:
        tile_p, tile_h1, tile_h2 = 64 if tile_k <= 128 else 16, 16, 64
    else:
        tile_p = min(2**16 // (tile_k * itemsize), 128)
        tile_h1, tile_h2 = min(2**14 // (tile_k * itemsize), 128 // itemsize), 512 // itemsize
    tile_h1, tile_h2 = (max(min(tile, power_of_two(hidden)), 16) for tile in (tile_h1, tile_h2))
    if 2 * triton.cdiv(pixels, tile_p) <= PROGRAMS:
        tile_p = min(tile_p, 64)
    blocks = triton.cdiv(hidden, tile_h2)
    few = 2 * triton.cdiv(pixels, tile_p) <= PROGRAMS
    return Tiles(tile_p, tile_k, tile_h1, tile_h2, 32, blocks, blocks if few else 1)


def glow_network(
    x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, w3: Tensor, b3: Tensor, tf32: bool
) -> Tensor:
    n, inputs, height, width = x.shape
    hidden, outputs, pixels = w1.shape[0], w3.shape[0], n * height * width
    precision = "tf32" if tf32 or x.element_size() < 4 else "tf32x3"
    t = tiles(pixels, inputs, hidden, outputs, x.element_size(), precision == "tf32x3")
    y, x = allocate(x, outputs), with_small_offsets(x, t.pixels)
    w1, w2, w3, b1, b2, b3 = (
        taps_first(w1),
        w2.contiguous(),
        taps_first(w3),
        *map(Tensor.contiguous, (b1, b2, b3)),
    )
    columns = x.new_empty((t.splits * pixels, 9 * outputs), dtype=torch.float32)
    launch(
        glow_network_kernel, triton.cdiv(pixels, t.pixels) * t.splits, x, w1, b1, w2, b2, w3, columns, pixels,
        *x.stride(), warps=8, num_stages=2,
        HEIGHT=height, WIDTH=width, IN=inputs, HIDDEN=hidden, OUT=outputs,
        PRECISION=precision, BLOCKS=t.blocks, SPLITS=t.splits,
        TILE_P=t.pixels, TILE_K=t.inputs, TILE_H1=t.hidden_1, TILE_H2=t.hidden_2, TILE_C=t.outputs,
    )  # fmt: skip
    tile_k = power_of_two(outputs)
    tile_p = max(2048 // tile_k, 1)
    y_n, y_c, _, y_w = y.stride()
    launch(
        glow_network_columns_kernel, triton.cdiv(pixels, tile_p), columns, b3, y, pixels, height, width, y_n, y_c,
        y_w, warps=8, OUT=outputs, SPLITS=t.splits, TILE_P=tile_p, TILE_K=tile_k,
    )  # fmt: skip
    return y


def taps_first(weight: Tensor) -> Tensor:
    """A 3x3 weight as ``[outputs, 9 * inputs]``: a view of one in channels_last, otherwise a copy."""
    return weight.permute(0, 2, 3, 1).contiguous().flatten(1)


def with_small_offsets(x: Tensor, tile: int) -> Tensor:
    """``x``, or a contiguous copy if offsets within the images of a tile exceed 32 bits."""
    n, _, height, width = x.shape
    images = min(n, tile // (height * width) + 2)
    extent = sum((size - 1) * step for size, step in zip((images, *x.shape[1:]), x.stride(), strict=True))
    return x if extent < OFFSETS else x.contiguous()


def allocate(x: Tensor, channels: int) -> Tensor:
    """Memory for images like ``x``: channels_last if its channels are contiguous."""
    n, c, height, width = x.shape
    channels_contiguous = c > 1 and x.stride(1) == 1 and not x.is_contiguous()
    layout = torch.channels_last if channels_contiguous else torch.contiguous_format
    return torch.empty((n, channels, height, width), dtype=x.dtype, device=x.device, memory_format=layout)
