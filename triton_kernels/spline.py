"""Rational-quadratic splines of a part of the channels, with the log-det and gradients; the others are copied.

Bound, bytes per transformed element in float32, for P parameters: forward 8 + 4 P, backward 12 + 8 P, inverse + backward
16 + 8 P. A channel that passes through is 8 bytes, in the inverse + backward 16.

The parameters of a tile are read once, as they lie in memory, and then handed to the threads of their elements: a thread
has all bins of its element in registers.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastflow.triton_kernels.affine_coupling import log_sigmoid
from fastflow.triton_kernels.tiles import (
    accumulator,
    address,
    allocate_output,
    block_indices,
    finalize,
    launch,
    power_of_two,
    sum_parts,
    tile_indices,
    tiles,
    unvectorized_size,
    widened,
    with_position_stride,
)

ELEMENTS, WARPS = 128, 4  # of a tile: one element per thread, whose bins stay in registers
GROUP = 8  # parameters of an element that neighboring threads read together


@triton.jit
def channel_of(channel_order, first_channel, k, mask, HAS_ORDER: tl.constexpr):
    """The channel in memory of a transformed one."""
    return tl.load(channel_order + k, mask=mask, other=0) if HAS_ORDER else first_channel + k


@triton.jit
def raw_address(
    h, n, k, p, q, stride_n, stride_k, stride_p, EACH: tl.constexpr, DIM: tl.constexpr, VEC_K: tl.constexpr,
    VEC_P: tl.constexpr,
):  # fmt: skip
    """Address of the raw parameters q of each element, ``[TILE_K, TILE_P, q]``."""
    at = k[:, :, None] * EACH + q
    return address(h, n, at, p[:, :, None], stride_n, stride_k, stride_p, DIM, VEC_K, VEC_P)


@triton.jit
def load_group(
    h, n, k, p, i, mask, stride_n, stride_k, stride_p, COUNT: tl.constexpr, FIRST: tl.constexpr,
    GROUP: tl.constexpr, EACH: tl.constexpr, ACC: tl.constexpr, DIM: tl.constexpr, VEC_K: tl.constexpr,
    VEC_P: tl.constexpr,
):  # fmt: skip
    """Group i of the COUNT raw parameters from the FIRST on, ``[TILE_K, TILE_P, GROUP]``."""
    q = (i * GROUP + tl.arange(0, GROUP))[None, None, :]
    at = raw_address(h, n, k, p, FIRST + q, stride_n, stride_k, stride_p, EACH, DIM, VEC_K, VEC_P)
    return tl.load(at, mask=mask[:, :, None] & (q < COUNT), other=0.0).to(ACC)


@triton.jit
def load_raw(
    h, n, k, p, mask, stride_n, stride_k, stride_p, COUNT: tl.constexpr, FIRST: tl.constexpr, GROUP: tl.constexpr,
    EACH: tl.constexpr, ACC: tl.constexpr, DIM: tl.constexpr, VEC_K: tl.constexpr, VEC_P: tl.constexpr,
):  # fmt: skip
    """COUNT raw parameters from the FIRST on, as a tuple of groups."""
    groups = ()
    for i in tl.static_range((COUNT + GROUP - 1) // GROUP):
        groups = groups + (
            load_group(
                h, n, k, p, i, mask, stride_n, stride_k, stride_p, COUNT, FIRST, GROUP, EACH, ACC, DIM, VEC_K, VEC_P
            ),
        )  # fmt: skip
    return groups


@triton.jit
def columns_of_group(group, GROUP: tl.constexpr):
    """A tile ``[TILE_K, TILE_P, GROUP]`` as a tuple of tiles ``[TILE_K, TILE_P]``.

    Only the first split moves values between threads; then a thread has the whole group of its elements.
    """
    K: tl.constexpr = group.shape[0]
    P: tl.constexpr = group.shape[1]
    parts = (group,)
    for level in tl.static_range(1, 4):
        if (GROUP >> level) > 0:
            even = ()
            odd = ()
            for i in tl.static_range(len(parts)):
                a, b = tl.split(tl.reshape(parts[i], [K, P, GROUP >> level, 2]))
                even = even + (a,)
                odd = odd + (b,)
            parts = even + odd
    found = ()
    for i in tl.static_range(GROUP):
        found = found + (tl.reshape(parts[i], [K, P]),)
    return found


@triton.jit
def columns(groups, GROUP: tl.constexpr):
    """All groups of :func:`load_raw` as a tuple of tiles ``[TILE_K, TILE_P]``."""
    found = ()
    for g in tl.static_range(len(groups)):
        found = found + columns_of_group(groups[g], GROUP)
    return found


@triton.jit
def size_of(raw, ZUKO: tl.constexpr, FACTOR: tl.constexpr, RANGE: tl.constexpr):
    """The logarithm of a bin's size, up to a constant."""
    u = raw * FACTOR
    return u / (1 + tl.abs(u) * (2 * RANGE)) if ZUKO else u


@triton.jit
def exponentials(raw, BINS: tl.constexpr, ZUKO: tl.constexpr, FACTOR: tl.constexpr, RANGE: tl.constexpr):
    """Exponentials of the raw sizes of the bins, a tuple; the largest raw size, and the reciprocal of their sum."""
    e = ()
    for i in tl.static_range(BINS):
        e = e + (size_of(raw[i], ZUKO, FACTOR, RANGE),)
    top = e[0]
    for i in tl.static_range(1, BINS):
        top = tl.maximum(top, e[i])
    found = ()
    total = tl.zeros_like(top)
    for i in tl.static_range(BINS):
        b_e = tl.exp(e[i] - top)
        total += b_e
        found = found + (b_e,)
    return found, top, 1 / total


@triton.jit
def find(
    e, inverse_sum, v, index, KNOWN: tl.constexpr, BINS: tl.constexpr, ZUKO: tl.constexpr, START: tl.constexpr,
    LENGTH: tl.constexpr, SMALLEST: tl.constexpr, SHARE: tl.constexpr,
):  # fmt: skip
    """The bin of v, or with KNOWN of the index: its index, its lower end and its size; the softmax below it and of it."""
    scale = inverse_sum * (LENGTH * SHARE)
    total = tl.zeros_like(inverse_sum)
    below, own = tl.zeros_like(inverse_sum), e[0]
    for i in tl.static_range(1, BINS):
        total += e[i - 1]
        if KNOWN:
            here = index >= i
        else:
            knot = total * scale + (START + LENGTH * SMALLEST * i)
            here = v > knot if ZUKO else v >= knot
            index += tl.where(here, 1, 0)
        below += tl.where(here, e[i - 1], 0.0)
        own = tl.where(here, e[i], own)
    low = below * scale + (index.to(scale.dtype) * (LENGTH * SMALLEST) + START)
    return index, low, own * scale + LENGTH * SMALLEST, below * inverse_sum, own * inverse_sum


@triton.jit
def raw_slopes(raw, index, zero, BINS: tl.constexpr, SLOPES: tl.constexpr, TAILS: tl.constexpr):
    """Raw slopes at both ends of the bin, 0 where they are not parameters."""
    SHIFT: tl.constexpr = 1 if TAILS == "linear" else 0
    r0, r1 = zero, zero
    for j in tl.static_range(SLOPES):
        r0 = tl.where(index == j + SHIFT, raw[j], r0)
        r1 = tl.where(index + 1 == j + SHIFT, raw[j], r1)
    if TAILS == "circular":
        r1 = tl.where(index == BINS - 1, raw[0], r1)
    return r0, r1


@triton.jit
def slope_of(
    r, fixed, ZUKO: tl.constexpr, MIN_SLOPE: tl.constexpr, OFFSET: tl.constexpr, RANGE: tl.constexpr
):
    if ZUKO:
        d = tl.exp(r / (1 + tl.abs(r) * RANGE))
    else:
        d = MIN_SLOPE - log_sigmoid(-(r + OFFSET))  # softplus
    return tl.where(fixed, 1.0, d)


@triton.jit
def slope_vjp(r, fixed, d, g, ZUKO: tl.constexpr, OFFSET: tl.constexpr, RANGE: tl.constexpr):
    """Gradient of a raw slope."""
    if ZUKO:
        c = 1 + tl.abs(r) * RANGE
        by = d / (c * c)
    else:
        u = r + OFFSET
        e = tl.exp(-tl.abs(u))
        by = tl.where(u >= 0, 1.0, e) / (1 + e)
    return tl.where(fixed, 0.0, by * g)


@triton.jit
def solve(eta, height, s, q, d0):
    """The root of the quadratic for the height above the bin's lower end, without cancellation for either sign of b."""
    a = height * (s - d0) + eta * q
    b = height * d0 - eta * q
    root = tl.sqrt(tl.maximum(b * b + 4 * a * s * eta, 0.0))
    positive = b >= 0
    return tl.where(positive, 2 * s * eta, root - b) / tl.where(positive, b + root, 2 * a)


@triton.jit
def clamped(v, low, high):
    """v in [low, high]; NaN stays NaN."""
    v = tl.where(v < low, low, v)
    return tl.where(v > high, high, v)


@triton.jit
def pieces(
    h, n, k, p, mask, v, stride_n, stride_k, stride_p, BY_Y: tl.constexpr,
    BINS: tl.constexpr, SLOPES: tl.constexpr, GROUP: tl.constexpr, EACH: tl.constexpr, TAILS: tl.constexpr,
    ZUKO: tl.constexpr, START: tl.constexpr, LENGTH: tl.constexpr,
    SMALLEST: tl.constexpr, SHARE: tl.constexpr, FACTOR: tl.constexpr, MIN_SLOPE: tl.constexpr,
    OFFSET: tl.constexpr, RANGE: tl.constexpr, ACC: tl.constexpr, DIM: tl.constexpr, VEC_K: tl.constexpr,
    VEC_P: tl.constexpr,
):  # fmt: skip
    """What the formulas need of the bin of each element, and what the gradient of the parameters needs."""
    raw_x = load_raw(
        h, n, k, p, mask, stride_n, stride_k, stride_p, BINS, 0, GROUP, EACH, ACC, DIM, VEC_K, VEC_P
    )
    raw_y = load_raw(
        h, n, k, p, mask, stride_n, stride_k, stride_p, BINS, BINS, GROUP, EACH, ACC, DIM, VEC_K, VEC_P
    )
    raw_d = load_raw(
        h, n, k, p, mask, stride_n, stride_k, stride_p, SLOPES, 2 * BINS, GROUP, EACH, ACC, DIM, VEC_K, VEC_P
    )
    kept = clamped(v, START, START + LENGTH)
    e_x, top_x, inverse_x = exponentials(columns(raw_x, GROUP), BINS, ZUKO, FACTOR, RANGE)
    e_y, top_y, inverse_y = exponentials(columns(raw_y, GROUP), BINS, ZUKO, FACTOR, RANGE)
    index = tl.zeros_like(kept).to(tl.int32)
    if BY_Y:
        index, y_low, height, y_below, y_own = find(
            e_y, inverse_y, kept, index, False, BINS, ZUKO, START, LENGTH, SMALLEST, SHARE
        )
        index, x_low, width, x_below, x_own = find(
            e_x, inverse_x, kept, index, True, BINS, ZUKO, START, LENGTH, SMALLEST, SHARE
        )
    else:
        index, x_low, width, x_below, x_own = find(
            e_x, inverse_x, kept, index, False, BINS, ZUKO, START, LENGTH, SMALLEST, SHARE
        )
        index, y_low, height, y_below, y_own = find(
            e_y, inverse_y, kept, index, True, BINS, ZUKO, START, LENGTH, SMALLEST, SHARE
        )
    r0, r1 = raw_slopes(columns(raw_d, GROUP), index, tl.zeros_like(kept), BINS, SLOPES, TAILS)
    fixed0 = (index == 0) if TAILS == "linear" else (index < 0)
    fixed1 = (index == BINS - 1) if TAILS == "linear" else (index < 0)
    d0 = slope_of(r0, fixed0, ZUKO, MIN_SLOPE, OFFSET, RANGE)
    d1 = slope_of(r1, fixed1, ZUKO, MIN_SLOPE, OFFSET, RANGE)
    s = height / width
    turn = d0 + d1 - 2 * s
    xi = solve(kept - y_low, height, s, turn, d0) if BY_Y else (kept - x_low) / width
    # 1 at the upper end, of which the sum of all bins differs by rounding
    xi = tl.where(kept >= START + LENGTH, 1.0, clamped(xi, 0.0, 1.0))
    above = (v > START) if ZUKO else (v >= START)
    inside = above & (v <= START + LENGTH)
    bins = (raw_x, top_x, inverse_x, x_below, x_own, raw_y, top_y, inverse_y, y_below, y_own)
    slopes = (r0, fixed0, r1, fixed1)
    return kept, inside, index, xi, x_low, width, y_low, height, d0, d1, s, turn, bins, slopes


@triton.jit
def store_group(
    dh, n, k, p, i, mask, dh_n, dh_k, dh_p, b_raw, top, scale, index, by_low, by_size, mean, FIRST: tl.constexpr,
    BINS: tl.constexpr, GROUP: tl.constexpr, EACH: tl.constexpr, ZUKO: tl.constexpr, FACTOR: tl.constexpr,
    RANGE: tl.constexpr, DIM_DH: tl.constexpr, VEC_K: tl.constexpr, VEC_P: tl.constexpr,
):  # fmt: skip
    """Writes the gradients of a group of raw widths or heights, from those of the bin's lower end and size."""
    q = (i * GROUP + tl.arange(0, GROUP))[None, None, :]
    at = index[:, :, None]
    by = tl.where(q < at, by_low[:, :, None], tl.where(q == at, by_size[:, :, None], 0.0))
    share = tl.exp(size_of(b_raw, ZUKO, FACTOR, RANGE) - top[:, :, None]) * scale[:, :, None]
    draw = share * (by - mean[:, :, None])
    if ZUKO:
        c = 1 + tl.abs(b_raw) * (2 * FACTOR * RANGE)
        draw = draw / (c * c)
    at_dh = raw_address(dh, n, k, p, FIRST + q, dh_n, dh_k, dh_p, EACH, DIM_DH, VEC_K, VEC_P)
    tl.store(at_dh, draw.to(dh.dtype.element_ty), mask=mask[:, :, None] & (q < BINS))


@triton.jit
def store_sizes(
    h, dh, n, k, p, mask, h_n, h_k, h_p, dh_n, dh_k, dh_p, raw, top, scale, index, by_low, by_size, mean,
    FIRST: tl.constexpr, BINS: tl.constexpr, GROUP: tl.constexpr, EACH: tl.constexpr, ZUKO: tl.constexpr,
    FACTOR: tl.constexpr, RANGE: tl.constexpr, ACC: tl.constexpr, DIM_H: tl.constexpr, DIM_DH: tl.constexpr,
    VEC_K: tl.constexpr, VEC_P: tl.constexpr,
):  # fmt: skip
    """Writes the gradients of the raw widths or heights.

    The exponentials are computed again from the parameters as they lie in memory: gradients that a thread has of its
    elements would have to move between threads. Of several groups, the parameters are read again, from the cache:
    registers are too few to keep them.
    """
    if len(raw) == 1 and ACC != tl.float64:
        store_group(
            dh, n, k, p, 0, mask, dh_n, dh_k, dh_p, raw[0], top, scale, index, by_low, by_size, mean, FIRST, BINS,
            GROUP, EACH, ZUKO, FACTOR, RANGE, DIM_DH, VEC_K, VEC_P,
        )  # fmt: skip
    else:
        for i in range(tl.cdiv(BINS, GROUP)):
            b_raw = load_group(
                h, n, k, p, i, mask, h_n, h_k, h_p, BINS, FIRST, GROUP, EACH, ACC, DIM_H, VEC_K, VEC_P
            )
            store_group(
                dh, n, k, p, i, mask, dh_n, dh_k, dh_p, b_raw, top, scale, index, by_low, by_size, mean, FIRST, BINS,
                GROUP, EACH, ZUKO, FACTOR, RANGE, DIM_DH, VEC_K, VEC_P,
            )  # fmt: skip


@triton.jit
def pass_through(
    x, y, channel_order, first_channel, n, p, k_block, k_blocks, K, CHANNELS, P, x_n, x_k, x_p, y_n, y_k, y_p,
    HAS_ORDER: tl.constexpr, TILE_K: tl.constexpr, DIM_X: tl.constexpr, DIM_Y: tl.constexpr, VEC_K: tl.constexpr,
    VEC_P: tl.constexpr,
):  # fmt: skip
    """Copies the channels after the K transformed ones, each block of channels its share."""
    for block in range(k_block, tl.cdiv(CHANNELS - K, TILE_K), k_blocks):
        j = (K + block * TILE_K + tl.arange(0, TILE_K))[:, None]
        mask = (j < CHANNELS) & (p < P)
        if HAS_ORDER:
            c = tl.load(channel_order + j, mask=j < CHANNELS, other=0)
        else:
            c = tl.where(j < K + first_channel, j - K, j)
        b_x = tl.load(address(x, n, c, p, x_n, x_k, x_p, DIM_X, VEC_K, VEC_P), mask=mask, other=0.0)
        tl.store(address(y, n, c, p, y_n, y_k, y_p, DIM_Y, VEC_K, VEC_P), b_x, mask=mask)


@triton.jit(do_not_specialize=["split"])
def spline_kernel(
    x, h, channel_order, first_channel, y, log_det, K, P, CHANNELS, split, tiles_per_program,
    x_n, x_k, x_p, h_n, h_k, h_p, y_n, y_k, y_p,
    INVERSE: tl.constexpr, HAS_ORDER: tl.constexpr, PASSING: tl.constexpr, BINS: tl.constexpr, SLOPES: tl.constexpr,
    GROUP: tl.constexpr, EACH: tl.constexpr, TAILS: tl.constexpr,
    ZUKO: tl.constexpr, START: tl.constexpr, LENGTH: tl.constexpr, SMALLEST: tl.constexpr,
    SHARE: tl.constexpr, FACTOR: tl.constexpr, MIN_SLOPE: tl.constexpr, OFFSET: tl.constexpr,
    RANGE: tl.constexpr, ACC: tl.constexpr, CONTIGUOUS_DIMS: tl.constexpr, VEC_K: tl.constexpr,
    VEC_P: tl.constexpr, TILE_K: tl.constexpr, TILE_P: tl.constexpr, VECTORS: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    # x, y: [N, CHANNELS, P];  h: [N, K EACH, P];  channel_order: [CHANNELS];  log_det: [N, split]
    DIM_X: tl.constexpr = CONTIGUOUS_DIMS[0]
    DIM_H: tl.constexpr = CONTIGUOUS_DIMS[1]
    DIM_Y: tl.constexpr = CONTIGUOUS_DIMS[2]
    K, P = K * VEC_K, unvectorized_size(P, VEC_P, WIDE)
    part = tl.program_id(0) % split
    n = (tl.program_id(0) // split).to(tl.int64)
    k_blocks = tl.cdiv(K, TILE_K)
    total = tl.zeros([TILE_K, TILE_P], ACC)
    for i in range(tiles_per_program):
        block = part * tiles_per_program + i
        k, p = tile_indices(block, K, TILE_K, TILE_P, WIDE)
        mask = (k < K) & (p < P)
        c = channel_of(channel_order, first_channel, k, k < K, HAS_ORDER)
        b_v = tl.load(address(x, n, c, p, x_n, x_k, x_p, DIM_X, VEC_K, VEC_P), mask=mask, other=0.0).to(ACC)
        kept, inside, index, xi, x_low, width, y_low, height, d0, d1, s, turn, bins, slopes = pieces(
            h, n, k, p, mask, b_v, h_n, h_k, h_p, INVERSE, BINS, SLOPES, GROUP, EACH, TAILS, ZUKO, START, LENGTH,
            SMALLEST, SHARE, FACTOR, MIN_SLOPE, OFFSET, RANGE,
            ACC, DIM_H, VEC_K, VEC_P,
        )  # fmt: skip
        rest = 1 - xi
        t = xi * rest
        bottom = s + turn * t
        ratio = s / bottom
        slope = (d1 * xi * xi + 2 * s * t + d0 * rest * rest) * ratio * ratio
        log_slope = tl.log(slope)
        if INVERSE:
            b_y = x_low + xi * width
        else:
            b_y = y_low + height * ((s * xi * xi + d0 * t) / bottom)
        if TAILS == "none":
            beyond = (b_v - kept) / slope if INVERSE else (b_v - kept) * slope
            b_y = tl.where(inside, b_y, b_y + beyond)
        else:
            b_y = tl.where(inside, b_y, b_v)
            log_slope = tl.where(inside, log_slope, tl.where(b_v == b_v, 0.0, b_v))  # NaN stays NaN
        total += tl.where(mask, -log_slope if INVERSE else log_slope, 0.0)
        tl.store(
            address(y, n, c, p, y_n, y_k, y_p, DIM_Y, VEC_K, VEC_P), b_y.to(y.dtype.element_ty), mask=mask
        )
        if PASSING:
            pass_through(
                x, y, channel_order, first_channel, n, p, block % k_blocks, k_blocks, K, CHANNELS, P, x_n, x_k, x_p, y_n, y_k,
                y_p, HAS_ORDER, TILE_K, DIM_X, DIM_Y, VEC_K, VEC_P,
            )  # fmt: skip
    if VECTORS:
        p = widened(part, WIDE) * TILE_P + tl.arange(0, TILE_P)
        tl.store(log_det + p, tl.sum(total, 0), mask=p < P)
    else:
        tl.store(log_det + tl.program_id(0), tl.sum(total))


@triton.jit
def spline_backward_kernel(
    v, h, channel_order, first_channel, dy, dlog_det, x_out, dv, dh, K, P, CHANNELS, stride_dlog_det,
    v_n, v_k, v_p, h_n, h_k, h_p, dy_n, dy_k, dy_p, dv_n, dv_k, dv_p,
    dh_n, dh_k, dh_p, x_out_n, x_out_k, x_out_p,
    GIVEN: tl.constexpr, HAS_ORDER: tl.constexpr, PASSING: tl.constexpr, BINS: tl.constexpr, SLOPES: tl.constexpr,
    GROUP: tl.constexpr, EACH: tl.constexpr, TAILS: tl.constexpr,
    ZUKO: tl.constexpr, START: tl.constexpr, LENGTH: tl.constexpr, SMALLEST: tl.constexpr,
    SHARE: tl.constexpr, FACTOR: tl.constexpr, MIN_SLOPE: tl.constexpr, OFFSET: tl.constexpr,
    RANGE: tl.constexpr, ACC: tl.constexpr, CONTIGUOUS_DIMS: tl.constexpr, VEC_K: tl.constexpr,
    VEC_P: tl.constexpr, TILE_K: tl.constexpr, TILE_P: tl.constexpr, VECTORS: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    # v, dy, dv, x_out: [N, CHANNELS, P];  h, dh: [N, K EACH, P]
    # GIVEN: "x": v is x.  "inverse": v is y, dy the gradient of x.  "y": v is y, dv the gradient of x, x_out is x
    DIM_V: tl.constexpr = CONTIGUOUS_DIMS[0]
    DIM_H: tl.constexpr = CONTIGUOUS_DIMS[1]
    DIM_DY: tl.constexpr = CONTIGUOUS_DIMS[2]
    DIM_DV: tl.constexpr = CONTIGUOUS_DIMS[3]
    DIM_DH: tl.constexpr = CONTIGUOUS_DIMS[4]
    DIM_X_OUT: tl.constexpr = CONTIGUOUS_DIMS[5]
    K, P = K * VEC_K, unvectorized_size(P, VEC_P, WIDE)
    k_blocks, p_blocks = tl.cdiv(K, TILE_K), tl.cdiv(P, TILE_P)
    k_block, position_block = tl.program_id(0) % k_blocks, tl.program_id(0) // k_blocks
    n = (position_block // p_blocks).to(tl.int64)
    k, p = block_indices(k_block, position_block % p_blocks, TILE_K, TILE_P, WIDE)
    mask = (k < K) & (p < P)
    c = channel_of(channel_order, first_channel, k, k < K, HAS_ORDER)
    b_v = tl.load(address(v, n, c, p, v_n, v_k, v_p, DIM_V, VEC_K, VEC_P), mask=mask, other=0.0).to(ACC)
    b_dy = tl.load(address(dy, n, c, p, dy_n, dy_k, dy_p, DIM_DY, VEC_K, VEC_P), mask=mask, other=0.0).to(ACC)
    if VECTORS:
        dlog = tl.load(dlog_det + p.to(tl.int64) * stride_dlog_det, mask=p < P, other=0.0).to(ACC)
    else:
        dlog = tl.load(dlog_det + n * stride_dlog_det).to(ACC)
    kept, inside, index, xi, x_low, width, y_low, height, d0, d1, s, turn, bins, slopes = pieces(
        h, n, k, p, mask, b_v, h_n, h_k, h_p, GIVEN != "x", BINS, SLOPES, GROUP, EACH, TAILS, ZUKO, START, LENGTH,
        SMALLEST, SHARE, FACTOR, MIN_SLOPE, OFFSET, RANGE, ACC,
        DIM_H, VEC_K, VEC_P,
    )  # fmt: skip
    raw_x, top_x, inverse_x, x_below, x_own, raw_y, top_y, inverse_y, y_below, y_own = bins
    r0, fixed0, r1, fixed1 = slopes
    rest = 1 - xi
    t = xi * rest
    bottom = s + turn * t
    top = d1 * xi * xi + 2 * s * t + d0 * rest * rest
    ratio = s / bottom
    slope = top * ratio * ratio
    numerator = s * xi * xi + d0 * t
    log_by_xi = 2 * (d1 * xi + s * (rest - xi) - d0 * rest) / top - 2 * turn * (rest - xi) / bottom
    if TAILS == "none":
        log_by_xi = tl.where(inside, log_by_xi, 0.0)
    g = b_dy
    if GIVEN == "inverse":
        dlog = -dlog
        g = -(b_dy + dlog * log_by_xi / width) / slope
    by_xi = g * slope * width + dlog * log_by_xi
    b_dv = -g if GIVEN == "inverse" else by_xi / width
    b_x = x_low + xi * width
    by_log = dlog + tl.zeros_like(g)
    if TAILS == "none":
        beyond = b_v - kept
        if GIVEN != "x":
            beyond = beyond / slope
        b_x = tl.where(inside, b_x, b_x + beyond)
        by_log += g * beyond * slope
    g_bottom = g * height / (bottom * bottom)
    by_s = g_bottom * (xi * xi * bottom - numerator * (1 - 2 * t))
    by_s += by_log * (2 / s + 2 * t / top - 2 * (1 - 2 * t) / bottom)
    by_0 = g_bottom * t * (bottom - numerator) + by_log * (rest * rest / top - 2 * t / bottom)
    by_1 = by_log * (xi * xi / top - 2 * t / bottom) - g_bottom * numerator * t
    by_x = -by_xi / width
    by_width = by_x * xi - by_s * s / width
    by_height = g * numerator / bottom + by_s / width
    if TAILS != "none":
        b_dv = tl.where(inside, b_dv, tl.where(b_v == b_v, b_dy, b_v))
        b_x = tl.where(inside, b_x, b_v)
        g = tl.where(inside, g, 0.0)
        by_0, by_1 = tl.where(inside, by_0, 0.0), tl.where(inside, by_1, 0.0)
        by_x, by_width = tl.where(inside, by_x, 0.0), tl.where(inside, by_width, 0.0)
        by_height = tl.where(inside, by_height, 0.0)
    tl.store(
        address(dv, n, c, p, dv_n, dv_k, dv_p, DIM_DV, VEC_K, VEC_P), b_dv.to(dv.dtype.element_ty), mask=mask
    )
    if GIVEN == "y":
        at_x = address(x_out, n, c, p, x_out_n, x_out_k, x_out_p, DIM_X_OUT, VEC_K, VEC_P)
        tl.store(at_x, b_x.to(x_out.dtype.element_ty), mask=mask)

    SCALE: tl.constexpr = LENGTH * SHARE * FACTOR
    store_sizes(
        h, dh, n, k, p, mask, h_n, h_k, h_p, dh_n, dh_k, dh_p, raw_x, top_x, inverse_x * SCALE, index, by_x, by_width,
        by_x * x_below + by_width * x_own, 0, BINS, GROUP, EACH, ZUKO, FACTOR, RANGE, ACC, DIM_H, DIM_DH,
        VEC_K, VEC_P,
    )  # fmt: skip
    store_sizes(
        h, dh, n, k, p, mask, h_n, h_k, h_p, dh_n, dh_k, dh_p, raw_y, top_y, inverse_y * SCALE, index, g, by_height,
        g * y_below + by_height * y_own, BINS, BINS, GROUP, EACH, ZUKO, FACTOR, RANGE, ACC, DIM_H, DIM_DH,
        VEC_K, VEC_P,
    )  # fmt: skip
    s0 = slope_vjp(r0, fixed0, d0, by_0, ZUKO, OFFSET, RANGE)[:, :, None]
    s1 = slope_vjp(r1, fixed1, d1, by_1, ZUKO, OFFSET, RANGE)[:, :, None]
    at = index[:, :, None]
    for i in tl.static_range((SLOPES + GROUP - 1) // GROUP):
        j = (i * GROUP + tl.arange(0, GROUP))[None, None, :]
        knot = j + (1 if TAILS == "linear" else 0)
        draw = tl.where(knot == at, s0, 0.0) + tl.where(knot == at + 1, s1, 0.0)
        if TAILS == "circular":
            draw += tl.where((j == 0) & (at == BINS - 1), s1, 0.0)
        at_dh = raw_address(dh, n, k, p, 2 * BINS + j, dh_n, dh_k, dh_p, EACH, DIM_DH, VEC_K, VEC_P)
        tl.store(at_dh, draw.to(dh.dtype.element_ty), mask=mask[:, :, None] & (j < SLOPES))
    if PASSING:
        pass_through(
            dy, dv, channel_order, first_channel, n, p, k_block, k_blocks, K, CHANNELS, P, dy_n, dy_k, dy_p, dv_n, dv_k, dv_p,
            HAS_ORDER, TILE_K, DIM_DY, DIM_DV, VEC_K, VEC_P,
        )  # fmt: skip
        if GIVEN == "y":
            pass_through(
                v, x_out, channel_order, first_channel, n, p, k_block, k_blocks, K, CHANNELS, P, v_n, v_k, v_p, x_out_n, x_out_k,
                x_out_p, HAS_ORDER, TILE_K, DIM_V, DIM_X_OUT, VEC_K, VEC_P,
            )  # fmt: skip


def _form(
    bins: int, bound: float, tails: str, convention: str, factor: float, min_bin: float, min_slope: float
) -> dict:
    """The constants of a form of splines; SMALLEST + SHARE * softmax is the share of a bin."""
    slopes = bins + {"linear": -1, "circular": 0, "none": 1}[tails]
    smallest = 0.0 if convention == "zuko" else min_bin
    return {
        "BINS": bins,
        "SLOPES": slopes,
        "GROUP": min(power_of_two(bins), GROUP),
        "EACH": 2 * bins + slopes,
        "TAILS": tails,
        "ZUKO": convention == "zuko",
        "START": 0.0 if tails == "none" else -bound,
        "LENGTH": 1.0 if tails == "none" else 2.0 * bound,
        "SMALLEST": smallest,
        "SHARE": 1.0 - smallest * bins,
        "FACTOR": factor,
        "MIN_SLOPE": min_slope,
        "OFFSET": math.log(math.expm1(1 - min_slope)) if convention == "fastflow" else 0.0,
        "RANGE": -1 / math.log(min_slope),
    }


def spline(
    x: Tensor,
    params: Tensor,
    channel_order: Tensor | None,
    first_channel: int,
    bins: int,
    bound: float,
    tails: str,
    convention: str,
    factor: float,
    min_bin: float,
    min_slope: float,
    inverse: bool,
) -> tuple[Tensor, Tensor]:
    form = _form(bins, bound, tails, convention, factor, min_bin, min_slope)
    acc, triton_acc = accumulator(x.dtype)
    y, out = allocate_output(x)
    x, params = with_position_stride(x), with_position_stride(_per_sample(params, x))
    k, channels = params.shape[1] // form["EACH"], x.shape[1]
    t = tiles(k, x, params, out, elements=ELEMENTS)
    log_det = x.new_empty((x.shape[0] * (1 if t.constants["VECTORS"] else t.split),), dtype=acc)
    launch(
        spline_kernel, t.samples * t.split, x, params, x if channel_order is None else channel_order,
        first_channel, out, log_det, *t.sizes, channels, t.split, t.tiles_per_program, *t.strides, warps=WARPS, INVERSE=inverse,
        HAS_ORDER=channel_order is not None, PASSING=k < channels, ACC=triton_acc, **form, **t.constants,
    )  # fmt: skip
    return finalize(y, out), sum_parts(log_det, x.shape[0])


def _per_sample(params: Tensor, x: Tensor) -> Tensor:
    """Parameters of each sample of x: those of one sample may be given for all."""
    return params if params.shape[0] == x.shape[0] else params.expand(x.shape[0], *params.shape[1:])


def _backward(
    v: Tensor,
    params: Tensor,
    channel_order: Tensor | None,
    first_channel: int,
    dy: Tensor,
    dlog_det: Tensor,
    form: dict,
    given: str,
) -> tuple[Tensor, Tensor, Tensor]:
    acc, triton_acc = accumulator(v.dtype)
    dv, dv_out = allocate_output(dy)
    given_params, params = params, _per_sample(params, v)
    shared = params is not given_params
    dparams, dparams_out = allocate_output(params, acc if shared else None)
    x, x_out = allocate_output(v) if given == "y" else (v, v)
    v, params, dy = with_position_stride(v), with_position_stride(params), with_position_stride(dy)
    tensors = v, params, dy, dv_out, dparams_out, x_out if given == "y" else v
    k, channels = params.shape[1] // form["EACH"], v.shape[1]
    t = tiles(k, *tensors, elements=ELEMENTS)
    launch(
        spline_backward_kernel, t.position_blocks * t.k_blocks, v, params,
        v if channel_order is None else channel_order, first_channel, dy, dlog_det, x_out, dv_out, dparams_out,
        *t.sizes, channels, dlog_det.stride(0), *t.strides, warps=WARPS, GIVEN=given,
        HAS_ORDER=channel_order is not None, PASSING=k < channels, ACC=triton_acc, **form, **t.constants,
    )  # fmt: skip
    dparams = finalize(dparams, dparams_out)
    if shared:
        dparams = torch.empty_like(given_params).copy_(dparams.sum(0, keepdim=True))
    return finalize(x, x_out), finalize(dv, dv_out), dparams


def spline_backward(
    x: Tensor, params: Tensor, channel_order: Tensor | None, first_channel: int, dy: Tensor, dlog_det: Tensor,
    bins: int, bound: float, tails: str, convention: str, factor: float, min_bin: float, min_slope: float, inverse: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    form = _form(bins, bound, tails, convention, factor, min_bin, min_slope)
    return _backward(
        x, params, channel_order, first_channel, dy, dlog_det, form, "inverse" if inverse else "x"
    )[1:]


def spline_inverse_backward(
    y: Tensor, params: Tensor, channel_order: Tensor | None, first_channel: int, dy: Tensor, dlog_det: Tensor,
    bins: int, bound: float, tails: str, convention: str, factor: float, min_bin: float, min_slope: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    form = _form(bins, bound, tails, convention, factor, min_bin, min_slope)
    return _backward(y, params, channel_order, first_channel, dy, dlog_det, form, "y")
