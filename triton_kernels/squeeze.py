"""Squeeze and unsqueeze in one pass. Bound: 8 bytes per float32 element, read once and written once.

Elements are copied as integers of their size.
"""

import math
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastflow.triton_kernels.tiles import block_size, launch

INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# Bytes of each of a block's four pixels in one tile: 16 for each of 128 threads, the widest store. A thread
# then has four stores and as many loads in flight (16 elements of float32, 2048 in a tile; more of smaller
# types).
PIXEL_BYTES = 2048
WARPS = 4


@triton.jit
def squeezed_channel(c, di, dj, C, ORDER: tl.constexpr):
    """The squeezed channel of pixel (di, dj) of channel c."""
    if ORDER == "channel":
        return 4 * c + (2 * di + dj)
    elif ORDER == "space":
        return (2 * di + dj) * C + c
    else:  # 00, 11, 01, 10
        return (3 * di + 2 * dj - 4 * di * dj) * C + c


@triton.jit(do_not_specialize=["rows"])
def squeeze_planar_kernel(
    image, squeezed, rows, C, H, W, image_n, image_c, image_h, image_w, squeezed_n, squeezed_c, squeezed_h,
    squeezed_w,
    ORDER: tl.constexpr, INVERSE: tl.constexpr, WIDE: tl.constexpr,
    VEC_W: tl.constexpr, VEC_IMAGE: tl.constexpr, VEC_SQUEEZED: tl.constexpr, TILE_R: tl.constexpr,
    TILE_W: tl.constexpr,
):  # fmt: skip
    # image: [N, C, 2H, 2W];  squeezed: [N, 4C, H, W];  a tile is rows (n, c, i) by pairs of columns
    W = W * VEC_W
    w_blocks = tl.cdiv(W, TILE_W)
    first = tl.program_id(0) // w_blocks
    if WIDE:
        first = first.to(tl.int64)
    row = (first * TILE_R + tl.arange(0, TILE_R))[:, None]
    i = (row % H).to(tl.int64)
    c = (row // H % C).to(tl.int64)
    n = (row // H // C).to(tl.int64)
    j = (tl.program_id(0) % w_blocks).to(tl.int64) * TILE_W
    j_squeezed = (j + tl.arange(0, TILE_W))[None, :]
    j_image = (j * 2 + tl.arange(0, 2 * TILE_W))[None, :]
    in_rows = row < rows
    mask_squeezed = in_rows & (j_squeezed < W)
    mask_image = in_rows & (j_image < W * 2)
    upper = image + ((n * image_n + c * image_c + 2 * i * image_h) * VEC_IMAGE + j_image * image_w)
    lower = image + ((n * image_n + c * image_c + (2 * i + 1) * image_h) * VEC_IMAGE + j_image * image_w)
    at = n * squeezed_n + i * squeezed_h
    at_00 = squeezed + (
        (at + squeezed_channel(c, 0, 0, C, ORDER) * squeezed_c) * VEC_SQUEEZED + j_squeezed * squeezed_w
    )
    at_01 = squeezed + (
        (at + squeezed_channel(c, 0, 1, C, ORDER) * squeezed_c) * VEC_SQUEEZED + j_squeezed * squeezed_w
    )
    at_10 = squeezed + (
        (at + squeezed_channel(c, 1, 0, C, ORDER) * squeezed_c) * VEC_SQUEEZED + j_squeezed * squeezed_w
    )
    at_11 = squeezed + (
        (at + squeezed_channel(c, 1, 1, C, ORDER) * squeezed_c) * VEC_SQUEEZED + j_squeezed * squeezed_w
    )
    if INVERSE:
        b_00 = tl.load(at_00, mask=mask_squeezed)
        b_01 = tl.load(at_01, mask=mask_squeezed)
        b_10 = tl.load(at_10, mask=mask_squeezed)
        b_11 = tl.load(at_11, mask=mask_squeezed)
        tl.store(upper, tl.reshape(tl.join(b_00, b_01), [TILE_R, 2 * TILE_W]), mask=mask_image)
        tl.store(lower, tl.reshape(tl.join(b_10, b_11), [TILE_R, 2 * TILE_W]), mask=mask_image)
    else:
        b_upper = tl.load(upper, mask=mask_image)
        b_lower = tl.load(lower, mask=mask_image)
        b_00, b_01 = tl.split(tl.reshape(b_upper, [TILE_R, TILE_W, 2]))
        b_10, b_11 = tl.split(tl.reshape(b_lower, [TILE_R, TILE_W, 2]))
        tl.store(at_00, b_00, mask=mask_squeezed)
        tl.store(at_01, b_01, mask=mask_squeezed)
        tl.store(at_10, b_10, mask=mask_squeezed)
        tl.store(at_11, b_11, mask=mask_squeezed)


@triton.jit(do_not_specialize=["rows"])
def squeeze_channels_last_kernel(
    image, squeezed, rows, C, H, W, image_n, image_h, image_w, squeezed_n, squeezed_h, squeezed_w,
    ORDER: tl.constexpr, INVERSE: tl.constexpr, WIDE: tl.constexpr,
    VEC_C: tl.constexpr, VEC_IMAGE: tl.constexpr, VEC_SQUEEZED: tl.constexpr, TILE_R: tl.constexpr,
    TILE_C: tl.constexpr,
):  # fmt: skip
    # image: [N, 2H, 2W, C];  squeezed: [N, H, W, 4C];  a tile is blocks of pixels (n, i, j) by channels
    C = C * VEC_C
    c_blocks = tl.cdiv(C, TILE_C)
    first = tl.program_id(0) // c_blocks
    if WIDE:
        first = first.to(tl.int64)
    row = (first * TILE_R + tl.arange(0, TILE_R))[:, None]
    j = (row % W).to(tl.int64)
    i = (row // W % H).to(tl.int64)
    n = (row // W // H).to(tl.int64)
    c_first = (tl.program_id(0) % c_blocks).to(tl.int64) * TILE_C
    c = (c_first + tl.arange(0, TILE_C))[None, :]
    mask = (row < rows) & (c < C)
    base = n * image_n + 2 * i * image_h + 2 * j * image_w
    image_00 = image + (base * VEC_IMAGE + c)
    image_01 = image + ((base + image_w) * VEC_IMAGE + c)
    image_10 = image + ((base + image_h) * VEC_IMAGE + c)
    image_11 = image + ((base + image_h + image_w) * VEC_IMAGE + c)
    base = (n * squeezed_n + i * squeezed_h + j * squeezed_w) * VEC_SQUEEZED
    if ORDER == "channel":
        # the four pixels of a channel are contiguous
        c_4 = (4 * c_first + tl.arange(0, 4 * TILE_C))[None, :]
        at = squeezed + (base + c_4)
        mask_4 = (row < rows) & (c_4 < 4 * C)
        if INVERSE:
            pairs_0, pairs_1 = tl.split(tl.reshape(tl.load(at, mask=mask_4), [TILE_R, TILE_C, 2, 2]))
            b_00, b_10 = tl.split(pairs_0)
            b_01, b_11 = tl.split(pairs_1)
        else:
            b_00, b_01 = tl.load(image_00, mask=mask), tl.load(image_01, mask=mask)
            b_10, b_11 = tl.load(image_10, mask=mask), tl.load(image_11, mask=mask)
            block = tl.join(tl.join(b_00, b_10), tl.join(b_01, b_11))
            tl.store(at, tl.reshape(block, [TILE_R, 4 * TILE_C]), mask=mask_4)
    else:
        at_00 = squeezed + (base + squeezed_channel(c, 0, 0, C, ORDER))
        at_01 = squeezed + (base + squeezed_channel(c, 0, 1, C, ORDER))
        at_10 = squeezed + (base + squeezed_channel(c, 1, 0, C, ORDER))
        at_11 = squeezed + (base + squeezed_channel(c, 1, 1, C, ORDER))
        if INVERSE:
            b_00, b_01 = tl.load(at_00, mask=mask), tl.load(at_01, mask=mask)
            b_10, b_11 = tl.load(at_10, mask=mask), tl.load(at_11, mask=mask)
        else:
            b_00, b_01 = tl.load(image_00, mask=mask), tl.load(image_01, mask=mask)
            b_10, b_11 = tl.load(image_10, mask=mask), tl.load(image_11, mask=mask)
            tl.store(at_00, b_00, mask=mask)
            tl.store(at_01, b_01, mask=mask)
            tl.store(at_10, b_10, mask=mask)
            tl.store(at_11, b_11, mask=mask)
    if INVERSE:
        tl.store(image_00, b_00, mask=mask)
        tl.store(image_01, b_01, mask=mask)
        tl.store(image_10, b_10, mask=mask)
        tl.store(image_11, b_11, mask=mask)


def vector_strides(
    shape: tuple[int, ...], stride: tuple[int, ...], inner: int
) -> tuple[int, tuple[int, ...]]:
    """Vector length, and strides: of dimension ``inner`` in elements, of the others in vectors.

    Vectors have one element unless ``inner`` has stride 1. Strides of dimensions of size 1 are 0.
    """
    stride = tuple(
        0 if size == 1 and d != inner else step
        for d, (size, step) in enumerate(zip(shape, stride, strict=True))
    )
    outer = [step for d, step in enumerate(stride) if d != inner]
    vec = math.gcd(16, *outer) if stride[inner] == 1 else 1
    return vec, tuple(step if d == inner else step // vec for d, step in enumerate(stride))


@lru_cache(maxsize=4096)
def _plan(
    itemsize: int,
    n: int,
    c: int,
    h: int,
    w: int,
    image: tuple[int, ...],
    squeezed: tuple[int, ...],
    channels_last: bool,
):
    """(kernel, programs, sizes and strides, constants) for squeezed images [n, 4c, h, w]."""
    inner, across, rows = (1, c, n * h * w) if channels_last else (3, w, n * c * h)
    vec = math.gcd(16, across)
    vec_image, image = vector_strides((n, c, 2 * h, 2 * w), image, inner)
    vec_squeezed, squeezed = vector_strides((n, 4 * c, h, w), squeezed, inner)
    elements = PIXEL_BYTES // itemsize
    tile = block_size(across, elements)
    tile_r = elements // tile
    programs = -(-rows // tile_r) * -(-across // tile)
    constants = {
        "WIDE": rows + tile_r > 2**31,
        "VEC_IMAGE": vec_image,
        "VEC_SQUEEZED": vec_squeezed,
        "TILE_R": tile_r,
    }
    if channels_last:  # channels have stride 1
        sizes = (rows, c // vec, h, w, image[0], *image[2:], squeezed[0], *squeezed[2:])
        return squeeze_channels_last_kernel, programs, sizes, {"VEC_C": vec, "TILE_C": tile, **constants}
    return (
        squeeze_planar_kernel,
        programs,
        (rows, c, h, w // vec, *image, *squeezed),
        {"VEC_W": vec, "TILE_W": tile, **constants},
    )


def squeezed_like(x: Tensor, inverse: bool, dtype: torch.dtype) -> Tensor:
    """Memory for ``x`` squeezed or unsqueezed: channels_last if the channels of ``x`` are contiguous."""
    n, c, h, w = x.shape
    channels_contiguous = c > 1 and x.stride(1) == 1 and not x.is_contiguous()
    layout = torch.channels_last if channels_contiguous else torch.contiguous_format
    shape = (n, c // 4, 2 * h, 2 * w) if inverse else (n, 4 * c, h // 2, w // 2)
    return torch.empty(shape, dtype=dtype, device=x.device, memory_format=layout)


def squeeze(x: Tensor, order: str, inverse: bool) -> Tensor:
    y = squeezed_like(x, inverse, x.dtype)
    image, squeezed = (y, x) if inverse else (x, y)
    n, c, h, w = image.shape
    channels_last = not y.is_contiguous()
    integer = INTEGERS[x.element_size()]
    kernel, programs, sizes, constants = _plan(
        x.element_size(), n, c, h // 2, w // 2, image.stride(), squeezed.stride(), channels_last
    )  # fmt: skip
    launch(
        kernel,
        programs,
        image.view(integer),
        squeezed.view(integer),
        *sizes,
        warps=WARPS,
        ORDER=order,
        INVERSE=inverse,
        **constants,
    )
    return y
