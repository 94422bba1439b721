"""Coupling network of Glow, 3x3, 1x1 and 3x3 convolution with ReLUs, without hidden activations in memory.

The first kernel computes three matrix products for a tile of pixels: the 3x3 neighborhoods of x times w1, the
result times w2, and that times w3 with nine columns per output channel, one per tap. The second kernel adds
the columns of neighboring pixels (col2im). The sums have a fixed order; there are no atomics.

Bound, per pixel with C channels in, D out and H hidden: 2 H (9 C + H + 9 D) operations, and in half precision
2 C + 2 D + 72 D bytes: x and y once, the columns in float32 once written and once read. A tile of 128 pixels
accumulates 256 hidden channels at a time. For H = 512 it therefore computes the first product twice, and writes
and reads the columns twice. docs/backends.md has the numbers for Glow, and compares a halo of recomputed pixels.

Backward is the same network read from its end, with masks instead of ReLUs. One kernel computes the hidden
activations h1 and h2 again. Another one multiplies the mirrored neighborhoods of dy by w3, masks the result
by h2, multiplies it by w2, masks it by h1, and multiplies it by w1, which gives the columns of dx. Both write
their hidden results. Matrix products of these and of the neighborhoods are the gradients of the weights.

Bound, per pixel: 2 H (27 C + 3 H + 18 D) operations, of which the weights' gradients take a third. In half
precision h1 and h2 and their gradients are written once, h1 and h2 read twice, the gradients once: 20 H
bytes, and the neighborhoods and columns 108 C + 36 D. A tile of 64 pixels accumulates all 512 hidden
channels, so that nothing is computed twice.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastflow.triton_kernels.tiles import (
    allocate_output,
    finalize,
    launch,
    power_of_two,
    strides,
    sum_slots,
)

# Programs that fill a large GPU, one per multiprocessor. The number does not depend on the device, so the same
# input gives the same bits on every device of a model.
PROGRAMS = 132
OFFSETS = 2**31  # offsets within a tile's images have 32 bits


@triton.jit
def relu(v):
    return tl.maximum(v, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def neighborhoods(
    x, first, pixels, x_n, x_c, x_h, x_w,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, IN: tl.constexpr, MIRRORED: tl.constexpr,
    TILE_P: tl.constexpr, TILE_K: tl.constexpr,
):  # fmt: skip
    """The 3x3 neighborhoods of a tile's pixels, [TILE_P, 9 * IN]; mirrored: of the pixels that they neighbor."""
    q, k = tl.arange(0, TILE_P), tl.arange(0, TILE_K)
    # divisions by constants in 32 bits: each thread has 32 to 64 pixels, and spills with 64-bit divisions
    at = (first % (HEIGHT * WIDTH)).to(tl.int32) + q
    n, i, j = at // (HEIGHT * WIDTH), at % (HEIGHT * WIDTH) // WIDTH, at % WIDTH
    tap, c = (8 - k // IN) if MIRRORED else k // IN, k % IN
    di, dj = tap // 3 - 1, tap % 3 - 1
    row, column = i[:, None] + di[None, :], j[:, None] + dj[None, :]
    inside = (row >= 0) & (row < HEIGHT) & (column >= 0) & (column < WIDTH)
    inside &= (q < pixels - first)[:, None] & (k < 9 * IN)[None, :]
    offsets = (n * x_n + i * x_h + j * x_w)[:, None] + (di * x_h + dj * x_w + c * x_c)[None, :]
    return tl.load(x + first // (HEIGHT * WIDTH) * x_n + offsets, mask=inside, other=0.0)


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
    q, k = tl.arange(0, TILE_P), tl.arange(0, TILE_K)
    b_x = neighborhoods(x, first, pixels, x_n, x_c, x_h, x_w, HEIGHT, WIDTH, IN, False, TILE_P, TILE_K)
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


@triton.jit(do_not_specialize=["pixels"])
def glow_network_hidden_kernel(
    x, w1, b1, w2, b2, x_neighborhoods, h1, h2, pixels, x_n, x_c, x_h, x_w,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, IN: tl.constexpr, HIDDEN: tl.constexpr,
    PRECISION: tl.constexpr, SPLITS: tl.constexpr,
    TILE_P: tl.constexpr, TILE_K: tl.constexpr, TILE_H1: tl.constexpr, TILE_H2: tl.constexpr,
):  # fmt: skip
    # x: [N, IN, HEIGHT, WIDTH];  w1: [HIDDEN, 9, IN];  w2: [HIDDEN, HIDDEN]
    # x_neighborhoods: [pixels, 9, IN];  h1, h2: [pixels, HIDDEN]
    first = (tl.program_id(0) // SPLITS).to(tl.int64) * TILE_P
    split = tl.program_id(0) % SPLITS
    q, k, c2 = tl.arange(0, TILE_P), tl.arange(0, TILE_K), split * TILE_H2 + tl.arange(0, TILE_H2)
    q_valid = (q < pixels - first)[:, None]
    k_valid, c2_valid = k < 9 * IN, c2 < HIDDEN
    b_x = neighborhoods(x, first, pixels, x_n, x_c, x_h, x_w, HEIGHT, WIDTH, IN, False, TILE_P, TILE_K)
    at_x = x_neighborhoods + first * (9 * IN) + (q[:, None] * (9 * IN) + k[None, :])
    tl.store(at_x, b_x, mask=q_valid & k_valid[None, :] & (split == 0))
    h1, h2, row = h1 + first * HIDDEN, h2 + first * HIDDEN, q[:, None] * HIDDEN
    b_h2 = tl.zeros([TILE_P, TILE_H2], tl.float32)
    for start in tl.range(0, HIDDEN, TILE_H1, disable_licm=True):
        c1 = start + tl.arange(0, TILE_H1)
        c1_valid = c1 < HIDDEN
        at_w1 = w1 + c1[None, :] * (9 * IN) + k[:, None]
        b_w1 = tl.load(at_w1, mask=k_valid[:, None] & c1_valid[None, :], other=0.0)
        b_b1 = tl.load(b1 + c1, mask=c1_valid, other=0.0).to(tl.float32)
        b_h1 = relu(tl.dot(b_x, b_w1, input_precision=PRECISION) + b_b1[None, :]).to(h1.dtype.element_ty)
        tl.store(h1 + (row + c1[None, :]), b_h1, mask=q_valid & c1_valid[None, :] & (split == 0))
        at_w2 = w2 + c2[None, :] * HIDDEN + c1[:, None]
        b_w2 = tl.load(at_w2, mask=c1_valid[:, None] & c2_valid[None, :], other=0.0)
        b_h2 = tl.dot(b_h1, b_w2, b_h2, input_precision=PRECISION)
    b_b2 = tl.load(b2 + c2, mask=c2_valid, other=0.0).to(tl.float32)
    b_h2 = relu(b_h2 + b_b2[None, :]).to(h2.dtype.element_ty)
    tl.store(h2 + (row + c2[None, :]), b_h2, mask=q_valid & c2_valid[None, :])


@triton.jit(do_not_specialize=["pixels"])
def glow_network_gradients_kernel(
    dy, w3, w2, w1, h1, h2, dy_neighborhoods, g1, g2, slots, columns, pixels, dy_n, dy_c, dy_h, dy_w,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, IN: tl.constexpr, HIDDEN: tl.constexpr, OUT: tl.constexpr,
    PRECISION: tl.constexpr, SPLITS: tl.constexpr,
    TILE_P: tl.constexpr, TILE_K: tl.constexpr, TILE_H2: tl.constexpr, TILE_H1: tl.constexpr,
    TILE_C: tl.constexpr,
):  # fmt: skip
    # dy: [N, OUT, HEIGHT, WIDTH];  w3: [OUT, 9, HIDDEN];  w2: [HIDDEN, HIDDEN];  w1: [HIDDEN, 9, IN]
    # dy_neighborhoods: [pixels, 9, OUT];  h1, h2, gradients before the ReLUs g1, g2: [pixels, HIDDEN]
    # slots: [tiles of pixels, 2, HIDDEN], sums of g1 and g2;  columns: [SPLITS, pixels, 9, IN]
    tile, split = (tl.program_id(0) // SPLITS).to(tl.int64), tl.program_id(0) % SPLITS
    first = tile * TILE_P
    q, k, c1 = tl.arange(0, TILE_P), tl.arange(0, TILE_K), split * TILE_H1 + tl.arange(0, TILE_H1)
    q_valid = (q < pixels - first)[:, None]
    k_valid, c1_valid = k < 9 * OUT, c1 < HIDDEN
    b_dy = neighborhoods(dy, first, pixels, dy_n, dy_c, dy_h, dy_w, HEIGHT, WIDTH, OUT, True, TILE_P, TILE_K)
    at_dy = dy_neighborhoods + first * (9 * OUT) + (q[:, None] * (9 * OUT) + k[None, :])
    tl.store(at_dy, b_dy, mask=q_valid & k_valid[None, :] & (split == 0))
    h1, h2, g1, g2 = h1 + first * HIDDEN, h2 + first * HIDDEN, g1 + first * HIDDEN, g2 + first * HIDDEN
    row = q[:, None] * HIDDEN
    slot = slots + tile * (2 * HIDDEN)
    b_g1 = tl.zeros([TILE_P, TILE_H1], tl.float32)
    for start in tl.range(0, HIDDEN, TILE_H2, disable_licm=True):
        c2 = start + tl.arange(0, TILE_H2)
        c2_valid = c2 < HIDDEN
        at_w3 = w3 + (k % OUT * 9 + k // OUT)[:, None] * HIDDEN + c2[None, :]
        b_w3 = tl.load(at_w3, mask=k_valid[:, None] & c2_valid[None, :], other=0.0)
        b_h2 = tl.load(h2 + (row + c2[None, :]), mask=q_valid & c2_valid[None, :], other=0.0)
        b_g2 = tl.where(b_h2 <= 0, 0.0, tl.dot(b_dy, b_w3, input_precision=PRECISION)).to(g2.dtype.element_ty)
        tl.store(g2 + (row + c2[None, :]), b_g2, mask=q_valid & c2_valid[None, :] & (split == 0))
        tl.store(slot + HIDDEN + c2, tl.sum(b_g2.to(tl.float32), 0), mask=c2_valid & (split == 0))
        at_w2 = w2 + c2[:, None] * HIDDEN + c1[None, :]
        b_w2 = tl.load(at_w2, mask=c2_valid[:, None] & c1_valid[None, :], other=0.0)
        b_g1 = tl.dot(b_g2, b_w2, b_g1, input_precision=PRECISION)
    b_h1 = tl.load(h1 + (row + c1[None, :]), mask=q_valid & c1_valid[None, :], other=0.0)
    b_g1 = tl.where(b_h1 <= 0, 0.0, b_g1.to(g1.dtype.element_ty))
    tl.store(g1 + (row + c1[None, :]), b_g1, mask=q_valid & c1_valid[None, :])
    tl.store(slot + c1, tl.sum(b_g1.to(tl.float32), 0), mask=c1_valid)
    if columns is not None:
        columns += (split * tl.cast(pixels, tl.int64) + first) * (9 * IN)
        for start in range(0, 9 * IN, TILE_C):
            c = start + tl.arange(0, TILE_C)
            at_w1 = w1 + c1[:, None] * (9 * IN) + c[None, :]
            b_w1 = tl.load(at_w1, mask=c1_valid[:, None] & (c < 9 * IN)[None, :], other=0.0)
            b_columns = tl.dot(b_g1, b_w1, input_precision=PRECISION)
            at_columns = columns + (q[:, None] * (9 * IN) + c[None, :])
            tl.store(at_columns, b_columns, mask=q_valid & (c < 9 * IN)[None, :])


@triton.jit(do_not_specialize=["pixels", "height", "width"])
def glow_network_columns_kernel(
    columns, b3, y, pixels, height, width, y_n, y_c, y_p,
    OUT: tl.constexpr, MIRRORED: tl.constexpr, SPLITS: tl.constexpr, TILE_P: tl.constexpr, TILE_K: tl.constexpr,
):  # fmt: skip
    # columns: [SPLITS, pixels, 9, OUT];  y: [N, OUT, height * width]
    p = tl.program_id(0).to(tl.int64) * TILE_P + tl.arange(0, TILE_P)
    n, position = p // (height * width), (p % (height * width)).to(tl.int32)
    i, j = position // width, position % width
    k = tl.arange(0, TILE_K)
    b_y = tl.zeros([TILE_P, TILE_K], tl.float32)
    for split in tl.static_range(SPLITS):
        for tap in tl.static_range(9):
            at = 8 - tap if MIRRORED else tap
            row, column = i + at // 3 - 1, j + at % 3 - 1
            inside = (p < pixels) & (row >= 0) & (row < height) & (column >= 0) & (column < width)
            neighbor = p + (at // 3 - 1) * width + at % 3 - 1 + tl.cast(pixels, tl.int64) * split
            offsets = neighbor[:, None] * (9 * OUT) + (tap * OUT + k)[None, :]
            b_y += tl.load(columns + offsets, mask=inside[:, None] & (k < OUT)[None, :], other=0.0)
    if b3 is not None:
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


class GradientTiles(NamedTuple):
    """Sizes of a launch of ``glow_network_hidden_kernel`` or ``glow_network_gradients_kernel``."""

    pixels: int
    inputs: int  # 9 taps of each channel of x, or of dy
    chunk: int  # channels of the first result, computed at once
    block: int  # channels of the second result, accumulated at once
    splits: int  # programs that share a tile of pixels, one for each block


@lru_cache(maxsize=256)
def gradient_tiles(
    pixels: int, inputs: int, hidden: int, itemsize: int, three_terms: bool, vectors: bool
) -> GradientTiles:
    """Tiles of 64 pixels and up to 512 hidden channels, 256 in float32.

    A thread accumulates at most 128 numbers, 64 in float32 and for many channels that are not read in
    vectors. A block of w1 or w3 takes at most 16 KB, of w2 32 KB, and the neighborhoods at most 64 KB. With
    three terms a tile has 16 pixels. Few pixels are shared among programs of a quarter of the hidden channels.
    """
    tile_k, hidden_2 = max(power_of_two(9 * inputs), 16), power_of_two(hidden)
    tile_p = 16 if three_terms else min(2**16 // (tile_k * itemsize), 64)
    chunk = min(2**14 // (tile_k * itemsize), 64 // itemsize, hidden_2)
    block = hidden_2 if three_terms else min(hidden_2, 1024 // itemsize)
    if tile_k > 256 and not vectors:
        block = min(block, 256)
    if 2 * triton.cdiv(pixels, tile_p) <= PROGRAMS:
        block = min(block, hidden_2 // 4)
    chunk, block = max(chunk, 16), max(block, 16)
    return GradientTiles(tile_p, tile_k, chunk, block, triton.cdiv(hidden, block))


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
    add_columns(columns, b3, y, t.splits, mirrored=False)
    return y


def glow_network_backward(
    x: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    w3: Tensor,
    b3: Tensor,
    tf32: bool,
    dy: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    dx, db1, db2, h1, g1, g2, h2, x_neighborhoods, dy_neighborhoods = hidden_gradients(
        x, *(taps_first(w1), b1.contiguous(), w2.contiguous(), b2.contiguous(), taps_first(w3)), tf32, dy
    )
    dw1 = torch.mm(g1.t(), x_neighborhoods).view(-1, 3, 3, w1.shape[1]).permute(0, 3, 1, 2)
    dw2 = torch.mm(g2.t(), h1).view(w2.shape)
    dw3 = torch.mm(dy_neighborhoods.t(), h2).view(3, 3, *w3.shape[:2]).permute(2, 3, 0, 1)
    db3 = dy.sum((0, 2, 3), dtype=b3.dtype)
    return dx, laid_out(dw1, w1), db1, laid_out(dw2, w2), db2, laid_out(dw3, w3), db3


def laid_out(gradient: Tensor, weight: Tensor) -> Tensor:
    """``gradient``, or a copy, with the strides of ``torch.empty_like(weight)``."""
    result = torch.empty_like(weight)
    return gradient if gradient.stride() == result.stride() else result.copy_(gradient)


def hidden_gradients(
    x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, w3: Tensor, tf32: bool, dy: Tensor
) -> tuple[Tensor, ...]:
    """Gradients of x, b1 and b2, and the factors of the weights' gradients.

    Weights are contiguous: w1 ``[hidden, 9 inputs]``, w2 ``[hidden, hidden]``, w3 ``[outputs, 9 hidden]``.
    """
    n, inputs, height, width = x.shape
    hidden, outputs, pixels = w1.shape[0], w3.shape[0], n * height * width
    precision = "tf32" if tf32 or x.element_size() < 4 else "tf32x3"
    sizes = {"HEIGHT": height, "WIDTH": width, "IN": inputs, "HIDDEN": hidden, "PRECISION": precision}
    h1, h2, g1, g2 = (x.new_empty((pixels, hidden)) for _ in range(4))
    x_neighborhoods, dy_neighborhoods = (x.new_empty((pixels, 9 * c)) for c in (inputs, outputs))

    t = gradient_tiles(pixels, inputs, hidden, x.element_size(), precision == "tf32x3", in_vectors(x))
    given = with_small_offsets(x, t.pixels)
    launch(
        glow_network_hidden_kernel, triton.cdiv(pixels, t.pixels) * t.splits,
        given, w1, b1, w2, b2, x_neighborhoods, h1, h2, pixels, *given.stride(),
        warps=8, num_stages=2, **sizes, SPLITS=t.splits,
        TILE_P=t.pixels, TILE_K=t.inputs, TILE_H1=t.chunk, TILE_H2=t.block,
    )  # fmt: skip
    t = gradient_tiles(pixels, outputs, hidden, x.element_size(), precision == "tf32x3", in_vectors(dy))
    given = with_small_offsets(dy, t.pixels)
    slots = x.new_empty((triton.cdiv(pixels, t.pixels), 2, hidden), dtype=torch.float32)
    columns = None
    if x.element_size() == 2:
        columns = x.new_empty((t.splits * pixels, 9 * inputs), dtype=torch.float32)
    launch(
        glow_network_gradients_kernel, triton.cdiv(pixels, t.pixels) * t.splits,
        given, w3, w2, w1, h1, h2, dy_neighborhoods, g1, g2, slots, columns, pixels, *given.stride(),
        warps=8, num_stages=2, **sizes, OUT=outputs, SPLITS=t.splits,
        TILE_P=t.pixels, TILE_K=t.inputs, TILE_H2=t.chunk, TILE_H1=t.block, TILE_C=32,
    )  # fmt: skip
    result, dx = allocate_output(x)
    if columns is None:
        add_columns(torch.mm(g1, w1), None, dx, 1, mirrored=True)
    else:
        add_columns(columns, None, dx, t.splits, mirrored=True)
    db1, db2 = torch.empty_like(b1), torch.empty_like(b2)
    sum_slots(slots, db1, db2)
    return finalize(result, dx), db1, db2, h1, g1, g2, h2, x_neighborhoods, dy_neighborhoods


def add_columns(columns: Tensor, bias: Tensor | None, y: Tensor, splits: int, mirrored: bool) -> None:
    """Writes to ``y`` the sums of its neighbors' columns (col2im), or of the opposite neighbors' (mirrored)."""
    n, outputs, height, width = y.shape
    pixels, tile_k = n * height * width, power_of_two(outputs)
    tile_p = max(2048 // tile_k, 1)
    y_n, y_c, y_p = strides(y)
    launch(
        glow_network_columns_kernel, triton.cdiv(pixels, tile_p), columns, bias, y, pixels, height, width,
        y_n, y_c, y_p, warps=8, OUT=outputs, MIRRORED=mirrored, SPLITS=splits, TILE_P=tile_p, TILE_K=tile_k,
    )  # fmt: skip


def taps_first(weight: Tensor) -> Tensor:
    """A 3x3 weight as ``[outputs, 9 * inputs]``: a view of one in channels_last, otherwise a copy."""
    return weight.permute(0, 2, 3, 1).contiguous().flatten(1)


def with_small_offsets(x: Tensor, tile: int) -> Tensor:
    """``x``, or a contiguous copy if offsets within the images of a tile exceed 32 bits."""
    n, _, height, width = x.shape
    images = min(n, tile // (height * width) + 2)
    extent = sum((size - 1) * step for size, step in zip((images, *x.shape[1:]), x.stride(), strict=True))
    return x if extent < OFFSETS else x.contiguous()


def in_vectors(x: Tensor) -> bool:
    """Whether the kernel reads several channels at once."""
    return x.stride(1) == 1 and all(step % 16 == 0 for step in (x.stride(0), *x.stride()[2:]))


def allocate(x: Tensor, channels: int) -> Tensor:
    """Memory for images like ``x``: channels_last if its channels are contiguous."""
    n, c, height, width = x.shape
    channels_contiguous = c > 1 and x.stride(1) == 1 and not x.is_contiguous()
    layout = torch.channels_last if channels_contiguous else torch.contiguous_format
    return torch.empty((n, channels, height, width), dtype=x.dtype, device=x.device, memory_format=layout)
