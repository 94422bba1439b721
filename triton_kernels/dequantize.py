"""Dequantization, the gradient of its noise, and its inverse, each in one pass, optionally with squeeze.

Bound, bytes per element for uint8 input and float32 output:

    dequantize            5 (x 1, y 4), with given noise 9
    dequantize_backward   13 (x 1, noise 4, dy 4, dnoise 4)
    dequantize_inverse    5 (y 4, x 1)

Compiled for sm_90, an element has about 30 instructions with drawn noise and 19 with given noise. The two
logarithms of a logit add 56, so arithmetic may be its bound.
"""

import math
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastflow.triton_kernels.noise import halves, uniform
from fastflow.triton_kernels.squeeze import squeezed_channel, squeezed_like, vector_strides
from fastflow.triton_kernels.tiles import (
    PROGRAMS,
    TILES_PER_PROGRAM,
    accumulator,
    block_size,
    launch,
    power_of_two,
    sum_parts,
    unvectorized_size,
)

# Philox blocks per tile, one per thread, of 8 elements each: 32 bytes of float32 per thread, which are two
# vectors. Tiles with given noise have the same size.
BLOCKS = 256
CHANNELS = 16  # per tile, channels_last


@triton.jit
def tile_coordinates(
    t, C, H, W, COLUMNS: tl.constexpr,
    MODE: tl.constexpr, LINE: tl.constexpr, WIDE: tl.constexpr, TILE_B: tl.constexpr, TILE_C: tl.constexpr,
):  # fmt: skip
    """(noise block, c, i, j, mask) of tile t of a sample [C, H, W], COLUMNS elements (or pairs) per block.

    MODE is the layout of elements. "flat": a single stride. "rows": a block is in one row. "channels":
    channels are contiguous, and the tile is pixels by channels instead of blocks by 8. "elements": any other
    layout, with a division per element.
    """
    if WIDE:
        t = t.to(tl.int64)
    if MODE == "channels":
        c_blocks = tl.cdiv(C, TILE_C)
        c = ((t % c_blocks) * TILE_C + tl.arange(0, TILE_C))[None, :]
        first = (t // c_blocks) * TILE_B
        block = tl.reshape(c * (H * W // 8) + (first + tl.arange(0, TILE_B))[:, None], [TILE_B * TILE_C])
        p = (first * 8 + tl.arange(0, TILE_B * 8))[:, None]
        i, j = (0 * p, p) if LINE else (p // W, p % W)
        mask = (p < H * W) & (c < C)
    else:
        block = t * TILE_B + tl.arange(0, TILE_B)
        b, k = block[:, None], tl.arange(0, COLUMNS)[None, :]
        if MODE == "flat":
            j = b * COLUMNS + k
            c, i = 0 * b, 0 * b
            mask = j < W
        elif MODE == "rows":
            row = b // (W // 8)
            j = (b % (W // 8)) * COLUMNS + k
            c, i = row // H, row % H
            mask = c < C
        else:
            e = b * COLUMNS + k
            width = W // (8 // COLUMNS)
            row, j = e // width, e % width
            c, i = row // H, row % H
            mask = c < C
    return block, c.to(tl.int64), i.to(tl.int64), j.to(tl.int64), mask


@triton.jit
def element_offset(n, c, i, j, stride_n, stride_c, stride_h, stride_w, MODE: tl.constexpr, VEC: tl.constexpr):
    """Offset of an element. All strides except the innermost are in vectors, for divisibility."""
    if MODE == "channels":
        return (n * stride_n + i * stride_h + j * stride_w) * VEC + c * stride_c
    else:
        return (n * stride_n + c * stride_c + i * stride_h) * VEC + j * stride_w


@triton.jit
def load_continuous(
    y, n, t, c, i, j, mask, C, H, W, y_n, y_c, y_h, y_w,
    SQUEEZE: tl.constexpr, MODE: tl.constexpr, LINE: tl.constexpr, WIDE: tl.constexpr, VEC: tl.constexpr,
    TILE_B: tl.constexpr, TILE_C: tl.constexpr,
):  # fmt: skip
    if SQUEEZE is None:
        return tl.load(y + element_offset(n, c, i, j, y_n, y_c, y_h, y_w, MODE, VEC), mask=mask, other=0.0)
    elif MODE == "channels":
        k = squeezed_channel(c, i % 2, j % 2, C, SQUEEZE)
        return tl.load(
            y + element_offset(n, k, i // 2, j // 2, y_n, y_c, y_h, y_w, MODE, VEC), mask=mask, other=0.0
        )
    else:  # the even elements of a row are contiguous, and so are the odd ones
        _, c, i, j, mask = tile_coordinates(t, C, H, W, 4, MODE, LINE, WIDE, TILE_B, TILE_C)
        k_even, k_odd = squeezed_channel(c, i % 2, 0, C, SQUEEZE), squeezed_channel(c, i % 2, 1, C, SQUEEZE)
        even = tl.load(
            y + element_offset(n, k_even, i // 2, j, y_n, y_c, y_h, y_w, MODE, VEC), mask=mask, other=0.0
        )
        odd = tl.load(
            y + element_offset(n, k_odd, i // 2, j, y_n, y_c, y_h, y_w, MODE, VEC), mask=mask, other=0.0
        )
        return tl.reshape(tl.join(even, odd), [TILE_B, 8])


@triton.jit
def store_continuous(
    y, b_y, n, t, c, i, j, mask, C, H, W, y_n, y_c, y_h, y_w,
    SQUEEZE: tl.constexpr, MODE: tl.constexpr, LINE: tl.constexpr, WIDE: tl.constexpr, VEC: tl.constexpr,
    TILE_B: tl.constexpr, TILE_C: tl.constexpr,
):  # fmt: skip
    b_y = b_y.to(y.dtype.element_ty)
    if SQUEEZE is None:
        tl.store(y + element_offset(n, c, i, j, y_n, y_c, y_h, y_w, MODE, VEC), b_y, mask=mask)
    elif MODE == "channels":
        k = squeezed_channel(c, i % 2, j % 2, C, SQUEEZE)
        tl.store(y + element_offset(n, k, i // 2, j // 2, y_n, y_c, y_h, y_w, MODE, VEC), b_y, mask=mask)
    else:
        _, c, i, j, mask = tile_coordinates(t, C, H, W, 4, MODE, LINE, WIDE, TILE_B, TILE_C)
        k_even, k_odd = squeezed_channel(c, i % 2, 0, C, SQUEEZE), squeezed_channel(c, i % 2, 1, C, SQUEEZE)
        even, odd = tl.split(tl.reshape(b_y, [TILE_B, 4, 2]))
        tl.store(y + element_offset(n, k_even, i // 2, j, y_n, y_c, y_h, y_w, MODE, VEC), even, mask=mask)
        tl.store(y + element_offset(n, k_odd, i // 2, j, y_n, y_c, y_h, y_w, MODE, VEC), odd, mask=mask)


@triton.jit
def dequantized(x, u, BINS: tl.constexpr, SLOPE: tl.constexpr, SHIFT: tl.constexpr, REST: tl.constexpr):
    """p and 1 - p; 1 - p from the distance to the end of the last bin, without cancellation for p near 1."""
    return (x + u) * SLOPE + SHIFT, ((BINS - x) - u) * SLOPE + REST


@triton.jit
def elements(C, H, W, ACC: tl.constexpr):
    return tl.cast(C, ACC) * tl.cast(H, ACC) * tl.cast(W, ACC)


@triton.jit(do_not_specialize=["sample_offset", "split"])
def dequantize_kernel(
    x, noise, seed, y, log_det, sample_offset, C, H, W, split, tiles_per_program,
    x_n, x_c, x_h, x_w, noise_n, noise_c, noise_h, noise_w, y_n, y_c, y_h, y_w,
    BINS: tl.constexpr, SLOPE: tl.constexpr, SHIFT: tl.constexpr, REST: tl.constexpr, LOG_SLOPE: tl.constexpr,
    LOGIT: tl.constexpr, SQUEEZE: tl.constexpr, HAS_NOISE: tl.constexpr, ACC: tl.constexpr,
    MODE: tl.constexpr, LINE: tl.constexpr, WIDE: tl.constexpr, VECS: tl.constexpr, VEC_C: tl.constexpr,
    VEC_W: tl.constexpr,
    TILE_B: tl.constexpr, TILE_C: tl.constexpr,
):  # fmt: skip
    # x, noise: [N, C, H, W];  y: the same, or squeezed;  log_det: [N, split], without a logit [N]
    C, W = C * VEC_C, unvectorized_size(W, VEC_W, WIDE)
    part = tl.program_id(0) % split
    n = (tl.program_id(0) // split).to(tl.int64)
    total = tl.zeros([TILE_B * 8, TILE_C] if MODE == "channels" else [TILE_B, 8], ACC)
    for loop in range(tiles_per_program):
        t = part * tiles_per_program + loop
        block, c, i, j, mask = tile_coordinates(t, C, H, W, 8, MODE, LINE, WIDE, TILE_B, TILE_C)
        b_x = tl.load(
            x + element_offset(n, c, i, j, x_n, x_c, x_h, x_w, MODE, VECS[0]), mask=mask, other=0
        ).to(ACC)
        if HAS_NOISE:
            u = tl.load(
                noise + element_offset(n, c, i, j, noise_n, noise_c, noise_h, noise_w, MODE, VECS[1]),
                mask=mask,
                other=0.0,
            ).to(ACC)
        else:
            half = halves(block, sample_offset + n, tl.load(seed))
            if MODE == "channels":
                half = tl.permute(tl.reshape(half, [TILE_B, TILE_C, 8]), [0, 2, 1])
                half = tl.reshape(half, [TILE_B * 8, TILE_C])
            u = uniform(half, ACC)
        b_y, q = dequantized(b_x, u, BINS, SLOPE, SHIFT, REST)
        if LOGIT:
            log_p, log_q = tl.log(b_y), tl.log(q)
            b_y = log_p - log_q
            total += tl.where(mask, log_p + log_q, 0.0)
        store_continuous(
            y, b_y, n, t, c, i, j, mask, C, H, W, y_n, y_c, y_h, y_w, SQUEEZE, MODE, LINE, WIDE, VECS[2],
            TILE_B, TILE_C
        )  # fmt: skip
    b_log_det = elements(C, H, W, ACC) * LOG_SLOPE
    if LOGIT:
        tl.store(log_det + tl.program_id(0), tl.where(part == 0, b_log_det, 0.0) - tl.sum(total))
    elif part == 0:
        tl.store(log_det + n, b_log_det)


@triton.jit
def dequantize_backward_kernel(
    x, noise, dnoise, dy, dlog_det, C, H, W, split, stride_dlog_det,
    x_n, x_c, x_h, x_w, noise_n, noise_c, noise_h, noise_w, dnoise_n, dnoise_c, dnoise_h, dnoise_w, dy_n,
    dy_c, dy_h, dy_w,
    BINS: tl.constexpr, SLOPE: tl.constexpr, SHIFT: tl.constexpr, REST: tl.constexpr, LOG_SLOPE: tl.constexpr,
    LOGIT: tl.constexpr, SQUEEZE: tl.constexpr, ACC: tl.constexpr,
    MODE: tl.constexpr, LINE: tl.constexpr, WIDE: tl.constexpr, VECS: tl.constexpr, VEC_C: tl.constexpr,
    VEC_W: tl.constexpr,
    TILE_B: tl.constexpr, TILE_C: tl.constexpr,
):  # fmt: skip
    # x, noise, dnoise: [N, C, H, W];  dy: the same, or squeezed;  dlog_det: [N]
    C, W = C * VEC_C, unvectorized_size(W, VEC_W, WIDE)
    t = tl.program_id(0) % split
    n = (tl.program_id(0) // split).to(tl.int64)
    _, c, i, j, mask = tile_coordinates(t, C, H, W, 8, MODE, LINE, WIDE, TILE_B, TILE_C)
    g = load_continuous(
        dy, n, t, c, i, j, mask, C, H, W, dy_n, dy_c, dy_h, dy_w, SQUEEZE, MODE, LINE, WIDE, VECS[3], TILE_B,
        TILE_C
    ).to(ACC)  # fmt: skip
    if LOGIT:
        b_x = tl.load(
            x + element_offset(n, c, i, j, x_n, x_c, x_h, x_w, MODE, VECS[0]), mask=mask, other=0
        ).to(ACC)
        u = tl.load(
            noise + element_offset(n, c, i, j, noise_n, noise_c, noise_h, noise_w, MODE, VECS[1]),
            mask=mask,
            other=0.0,
        ).to(ACC)
        p, q = dequantized(b_x, u, BINS, SLOPE, SHIFT, REST)
        dl = tl.load(dlog_det + n * stride_dlog_det).to(ACC)
        g = (g + dl * (p - q)) / (p * q)
    b_dnoise = (g * SLOPE).to(dnoise.dtype.element_ty)
    tl.store(
        dnoise + element_offset(n, c, i, j, dnoise_n, dnoise_c, dnoise_h, dnoise_w, MODE, VECS[2]),
        b_dnoise,
        mask=mask,
    )


@triton.jit
def dequantize_inverse_kernel(
    x, y, log_det, C, H, W, split, tiles_per_program, x_n, x_c, x_h, x_w, y_n, y_c, y_h, y_w,
    BINS: tl.constexpr, PER_BIN: tl.constexpr, SHIFT: tl.constexpr, LOG_SLOPE: tl.constexpr,
    LOGIT: tl.constexpr, SQUEEZE: tl.constexpr, ACC: tl.constexpr,
    MODE: tl.constexpr, LINE: tl.constexpr, WIDE: tl.constexpr, VECS: tl.constexpr, VEC_C: tl.constexpr,
    VEC_W: tl.constexpr,
    TILE_B: tl.constexpr, TILE_C: tl.constexpr,
):  # fmt: skip
    # x: [N, C, H, W], written;  y: the same, or squeezed;  log_det: [N, split], without a logit [N]
    C, W = C * VEC_C, unvectorized_size(W, VEC_W, WIDE)
    part = tl.program_id(0) % split
    n = (tl.program_id(0) // split).to(tl.int64)
    total = tl.zeros([TILE_B * 8, TILE_C] if MODE == "channels" else [TILE_B, 8], ACC)
    for loop in range(tiles_per_program):
        t = part * tiles_per_program + loop
        _, c, i, j, mask = tile_coordinates(t, C, H, W, 8, MODE, LINE, WIDE, TILE_B, TILE_C)
        p = load_continuous(
            y, n, t, c, i, j, mask, C, H, W, y_n, y_c, y_h, y_w, SQUEEZE, MODE, LINE, WIDE, VECS[1], TILE_B,
            TILE_C
        ).to(ACC)  # fmt: skip
        if LOGIT:
            # log sigmoid(y) + log sigmoid(-y) is below -1.38 everywhere, so log(1 + e) needs no digits of a
            # small e
            e = tl.exp(-tl.abs(p))
            total += tl.where(mask, -tl.abs(p) - 2 * tl.log(1 + e), 0.0)
            p = tl.where(p < 0, e, 1.0) / (1 + e)
        b_x = tl.minimum(tl.maximum(tl.floor((p - SHIFT) * PER_BIN), 0.0), BINS - 1)
        tl.store(
            x + element_offset(n, c, i, j, x_n, x_c, x_h, x_w, MODE, VECS[0]),
            b_x.to(tl.int32).to(tl.uint8),
            mask=mask,
        )
    b_log_det = elements(C, H, W, ACC) * LOG_SLOPE
    if LOGIT:
        tl.store(log_det + tl.program_id(0), tl.sum(total) - tl.where(part == 0, b_log_det, 0.0))
    elif part == 0:
        tl.store(log_det + n, -b_log_det)


class ImageTiles(NamedTuple):
    """Tiles of images [N, C, H, W] for one launch."""

    split: int  # programs per sample
    tiles_per_program: int
    warps: int
    sizes: tuple[int, int, int]  # C in vectors, H, W in vectors
    strides: tuple[
        int, ...
    ]  # of each tensor: sample, channel, row, column; all except the innermost in vectors
    constants: dict


def _merged(
    shape: tuple[int, ...], strides: tuple[tuple[int, ...], ...]
) -> tuple[list[int], list[tuple[int, ...]]]:
    """Sizes and strides of a sample, after merging the dimensions that can be merged in all tensors."""
    sizes, dims = [], []
    for size, *step in zip(shape[1:], *(s[1:] for s in strides), strict=True):
        if size == 1:
            continue
        if sizes and all(outer == size * inner for outer, inner in zip(dims[-1], step, strict=True)):
            sizes[-1], dims[-1] = sizes[-1] * size, tuple(step)
        else:
            sizes.append(size)
            dims.append(tuple(step))
    if not sizes:
        sizes, dims = [1], [(1,) * len(strides)]
    none = (0,) * len(strides)
    if len(sizes) < 3:  # two are channels and positions, one is positions
        sizes, dims = (
            [*sizes[:-1], *[1] * (3 - len(sizes)), sizes[-1]],
            [*dims[:-1], *[none] * (3 - len(sizes)), dims[-1]],
        )
    return sizes, dims


@lru_cache(maxsize=4096)
def _tiles_of_images(
    shape: tuple[int, ...],
    images: tuple[tuple[int, ...], ...],
    squeezed: tuple[int, ...] | None,
    draws: bool,
    reduces: bool,
) -> ImageTiles:
    """Tiles of images of ``shape`` with strides ``images``.

    ``squeezed``: strides of a squeezed tensor, if any. ``draws``: noise is drawn, in the logical order of the
    elements. ``reduces``: the kernel sums over each sample.
    """
    n = shape[0]
    if squeezed is None and not draws:
        # any order of elements is correct: use the order of memory
        order = [0, *sorted(range(1, len(shape)), key=lambda d: -images[-1][d])]
        shape, images = tuple(shape[d] for d in order), tuple(tuple(s[d] for d in order) for s in images)
    if squeezed is None:
        (c, h, w), dims = _merged(shape, images)
        images = tuple((s[0], *(d[k] for d in dims)) for k, s in enumerate(images))
    else:
        c, h, w = shape[1:]
    d = c * h * w
    channels_contiguous = c > 1 and images[0][1] == 1 and h * w > 1
    if channels_contiguous and h * w % 8 == 0:
        mode = "channels"
    else:
        mode = "flat" if c * h == 1 and squeezed is None else "rows" if w % 8 == 0 else "elements"
    inner = 1 if mode == "channels" else 3
    laid = [vector_strides((n, c, h, w), s, inner) for s in images]
    if squeezed is not None:
        laid.append(vector_strides((n, 4 * c, h // 2, w // 2), squeezed, inner))
    tile_c = min(power_of_two(c), CHANNELS) if mode == "channels" else 1
    blocks = h * w // 8 if mode == "channels" else -(-d // 8)
    tile_b = block_size(blocks, BLOCKS // tile_c)
    count = -(-blocks // tile_b) * (-(-c // tile_c) if mode == "channels" else 1)
    tiles_per_program = -(-count // min(-(-count // TILES_PER_PROGRAM), -(-PROGRAMS // n))) if reduces else 1
    vec_c, vec_w = math.gcd(16, c), math.gcd(16, w)
    return ImageTiles(
        split=-(-count // tiles_per_program),
        tiles_per_program=tiles_per_program,
        warps=min(max(tile_b * tile_c // 32, 1), 8),
        sizes=(c // vec_c, h, w // vec_w),
        strides=tuple(step for _, s in laid for step in s),
        constants={
            "MODE": mode, "LINE": h == 1, "WIDE": d > 2**30, "VECS": tuple(vec for vec, _ in laid),
            "VEC_C": vec_c, "VEC_W": vec_w,
            "TILE_B": tile_b, "TILE_C": tile_c,
        },
    )  # fmt: skip


def tiles_of_images(
    image: Tensor,
    *images: Tensor,
    continuous: Tensor,
    squeeze_order: str | None,
    draws: bool = False,
    reduces: bool = False,
) -> ImageTiles:
    """Tiles of ``image`` and ``images`` of its shape, and of ``continuous``, which may be squeezed."""
    strides = (image.stride(), *(v.stride() for v in images))
    if squeeze_order is None:
        return _tiles_of_images(image.shape, (*strides, continuous.stride()), None, draws, reduces)
    return _tiles_of_images(image.shape, strides, continuous.stride(), draws, reduces)


def collapse_to_4d(x: Tensor) -> Tensor:
    """``x`` in at most four dimensions; a copy if the dimensions from the fourth on have no single stride."""
    return x if x.ndim <= 4 else x.flatten(3)


def finalize(result: Tensor, buffer: Tensor) -> Tensor:
    """``result``, with the values that a kernel wrote to ``collapse_to_4d(result)``."""
    return result if buffer.data_ptr() == result.data_ptr() else result.copy_(buffer.view(result.shape))


def _map(n_bits: int, scale: float, shift: float) -> dict:
    """Constants of the map, in float64; a float argument of a kernel would have the precision of float32."""
    bins = 2.0**n_bits
    return {
        "BINS": bins,
        "SLOPE": scale / bins,
        "SHIFT": shift,
        "REST": 1 - scale - shift,
        "LOG_SLOPE": math.log(scale / bins),
    }


def dequantize(
    x: Tensor, noise: Tensor | None, seed: Tensor | None, offset: int,
    n_bits: int, scale: float, shift: float, logit: bool, squeeze_order: str | None, dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    acc, triton_acc = accumulator(dtype)
    y = torch.empty_like(x, dtype=dtype)
    if squeeze_order is not None:
        y = squeezed_like(y, False, dtype)
    x, out = collapse_to_4d(x), collapse_to_4d(y)
    u = x if noise is None else collapse_to_4d(noise)
    t = tiles_of_images(x, u, continuous=out, squeeze_order=squeeze_order, draws=noise is None, reduces=logit)
    log_det = x.new_empty(x.shape[0] * (t.split if logit else 1), dtype=acc)
    launch(
        dequantize_kernel, x.shape[0] * t.split, x, u, x if seed is None else seed, out, log_det, offset,
        *t.sizes, t.split, t.tiles_per_program,
        *t.strides, warps=t.warps, LOGIT=logit, SQUEEZE=squeeze_order, HAS_NOISE=noise is not None,
        ACC=triton_acc,
        **_map(n_bits, scale, shift), **t.constants,
    )  # fmt: skip
    return finalize(y, out), sum_parts(log_det, x.shape[0])


def dequantize_backward(
    x: Tensor, noise: Tensor, dy: Tensor, dlog_det: Tensor,
    n_bits: int, scale: float, shift: float, logit: bool, squeeze_order: str | None,
) -> Tensor:  # fmt: skip
    dnoise = torch.empty_like(noise)
    x, noise, out, dy = collapse_to_4d(x), collapse_to_4d(noise), collapse_to_4d(dnoise), collapse_to_4d(dy)
    t = tiles_of_images(x, noise, out, continuous=dy, squeeze_order=squeeze_order)
    launch(
        dequantize_backward_kernel, x.shape[0] * t.split, x, noise, out, dy, dlog_det, *t.sizes, t.split,
        dlog_det.stride(0), *t.strides,
        warps=t.warps, LOGIT=logit, SQUEEZE=squeeze_order, ACC=accumulator(noise.dtype)[1], **_map(n_bits,
        scale, shift), **t.constants,
    )  # fmt: skip
    return finalize(dnoise, out)


def dequantize_inverse(
    y: Tensor, n_bits: int, scale: float, shift: float, logit: bool, squeeze_order: str | None
) -> tuple[Tensor, Tensor]:
    acc, triton_acc = accumulator(y.dtype)
    x = (
        torch.empty_like(y, dtype=torch.uint8)
        if squeeze_order is None
        else squeezed_like(y, True, torch.uint8)
    )
    out, y = collapse_to_4d(x), collapse_to_4d(y)
    t = tiles_of_images(out, continuous=y, squeeze_order=squeeze_order, reduces=logit)
    log_det = y.new_empty(y.shape[0] * (t.split if logit else 1), dtype=acc)
    constants = _map(n_bits, scale, shift)
    del constants["SLOPE"], constants["REST"]
    launch(
        dequantize_inverse_kernel, y.shape[0] * t.split, out, y, log_det, *t.sizes, t.split,
        t.tiles_per_program, *t.strides,
        warps=t.warps, LOGIT=logit, SQUEEZE=squeeze_order, ACC=triton_acc, PER_BIN=2.0**n_bits / scale,
        **constants, **t.constants,
    )  # fmt: skip
    return finalize(x, out), sum_parts(log_det, y.shape[0])
