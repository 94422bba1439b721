"""Rational-quadratic splines of a part of the channels, with the log-det and gradients; the others are copied.

Bound, bytes per transformed element in float32, for P parameters: forward 8 + 4 P, backward 12 + 8 P, inverse + backward
16 + 8 P. A channel that passes through is 8 bytes, in the inverse + backward 16.

A tile is ``[TILE_K, TILE_P, BINS_PADDED]``: channels, positions, bins. The parameters are read once, as they lie in memory;
the knots are prefix sums along the bins, and the bin of an element is picked by a sum over one that is not zero.
"""

import math

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

VALUES = 2048  # of a tile with all of its bins
WARPS = 4


@triton.jit
def channel_of(channel_order, k, mask, HAS_ORDER: tl.constexpr):
    """The channel in memory."""
    return tl.load(channel_order + k, mask=mask, other=0) if HAS_ORDER else k


@triton.jit
def load_raw(
    params, n, k, p, q, mask, COUNT: tl.constexpr, FIRST: tl.constexpr, EACH: tl.constexpr, ACC: tl.constexpr,
    stride_n, stride_k, stride_p, DIM: tl.constexpr, VEC_K: tl.constexpr, VEC_P: tl.constexpr,
):  # fmt: skip
    """COUNT raw parameters from the FIRST of each element on, ``[TILE_K, TILE_P, q]``."""
    at = address(
        params, n, k[:, :, None] * EACH + (FIRST + q), p[:, :, None], stride_n, stride_k, stride_p, DIM, VEC_K, VEC_P
    )
    return tl.load(at, mask=mask[:, :, None] & (q < COUNT), other=0.0).to(ACC)


@triton.jit
def store_raw(
    params, n, k, p, q, mask, COUNT: tl.constexpr, FIRST: tl.constexpr, EACH: tl.constexpr, value,
    stride_n, stride_k, stride_p, DIM: tl.constexpr, VEC_K: tl.constexpr, VEC_P: tl.constexpr,
):  # fmt: skip
    at = address(
        params, n, k[:, :, None] * EACH + (FIRST + q), p[:, :, None], stride_n, stride_k, stride_p, DIM, VEC_K, VEC_P
    )
    tl.store(at, value.to(params.dtype.element_ty), mask=mask[:, :, None] & (q < COUNT))


@triton.jit
def exponentials(raw, q, BINS: tl.constexpr, ZUKO: tl.constexpr, FACTOR: tl.constexpr, RANGE: tl.constexpr):
    """Exponentials of the raw sizes of bins, and the reciprocal of their sum."""
    u = raw * FACTOR
    if ZUKO:
        u = u / (1 + tl.abs(u) * (2 * RANGE))
    u = tl.where(q < BINS, u, float("-inf"))
    e = tl.exp(u - tl.max(u, 2)[:, :, None])
    return e, 1 / tl.sum(e, 2)


@triton.jit
def knots(
    e, inverse_sum, q, START: tl.constexpr, LENGTH: tl.constexpr, SMALLEST: tl.constexpr, SHARE: tl.constexpr
):
    """The sum below each bin, and its lower end."""
    below = tl.cumsum(e, 2) - e
    scale = inverse_sum * (LENGTH * SHARE)
    return below, below * scale[:, :, None] + (q.to(e.dtype) * (LENGTH * SMALLEST) + START)


@triton.jit
def bin_of(v, lower, q, BINS: tl.constexpr, ZUKO: tl.constexpr):
    """Index of the bin of v."""
    reached = v[:, :, None] > lower if ZUKO else v[:, :, None] >= lower
    return tl.sum(tl.where((q > 0) & (q < BINS) & reached, 1, 0), 2)


@triton.jit
def pick(values, at):
    """The value of the bin ``at`` is true for."""
    return tl.sum(tl.where(at, values, 0.0), 2)


@triton.jit
def slope_of(r, fixed, ZUKO: tl.constexpr, MIN_SLOPE: tl.constexpr, OFFSET: tl.constexpr, RANGE: tl.constexpr):
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
    params, n, k, p, mask, v, stride_n, stride_k, stride_p, BY_Y: tl.constexpr,
    BINS: tl.constexpr, BINS_PADDED: tl.constexpr, SLOPES: tl.constexpr, SLOPES_PADDED: tl.constexpr,
    EACH: tl.constexpr, TAILS: tl.constexpr, ZUKO: tl.constexpr, START: tl.constexpr, LENGTH: tl.constexpr,
    SMALLEST: tl.constexpr, SHARE: tl.constexpr, FACTOR: tl.constexpr, MIN_SLOPE: tl.constexpr,
    OFFSET: tl.constexpr, RANGE: tl.constexpr, ACC: tl.constexpr, DIM: tl.constexpr, VEC_K: tl.constexpr,
    VEC_P: tl.constexpr,
):  # fmt: skip
    """What the formulas need of the bin of each element, and what the gradient of the parameters needs."""
    q = tl.arange(0, BINS_PADDED)[None, None, :]
    raw_x = load_raw(
        params, n, k, p, q, mask, BINS, 0, EACH, ACC, stride_n, stride_k, stride_p, DIM, VEC_K, VEC_P
    )
    raw_y = load_raw(
        params, n, k, p, q, mask, BINS, BINS, EACH, ACC, stride_n, stride_k, stride_p, DIM, VEC_K, VEC_P
    )
    j = tl.arange(0, SLOPES_PADDED)[None, None, :]
    raw_d = load_raw(
        params, n, k, p, j, mask, SLOPES, 2 * BINS, EACH, ACC, stride_n, stride_k, stride_p, DIM, VEC_K, VEC_P
    )
    e_x, inverse_x = exponentials(raw_x, q, BINS, ZUKO, FACTOR, RANGE)
    e_y, inverse_y = exponentials(raw_y, q, BINS, ZUKO, FACTOR, RANGE)
    below_x, lower_x = knots(e_x, inverse_x, q, START, LENGTH, SMALLEST, SHARE)
    below_y, lower_y = knots(e_y, inverse_y, q, START, LENGTH, SMALLEST, SHARE)
    kept = clamped(v, START, START + LENGTH)
    index = bin_of(kept, lower_y if BY_Y else lower_x, q, BINS, ZUKO)
    at = q == index[:, :, None]
    x_low, y_low = pick(lower_x, at), pick(lower_y, at)
    x_below, y_below = pick(below_x, at) * inverse_x, pick(below_y, at) * inverse_y
    x_own, y_own = pick(e_x, at) * inverse_x, pick(e_y, at) * inverse_y
    width = x_own * (LENGTH * SHARE) + LENGTH * SMALLEST
    height = y_own * (LENGTH * SHARE) + LENGTH * SMALLEST
    # raw slope j is that of knot j, with linear tails of knot j + 1
    knot = j + (1 if TAILS == "linear" else 0)
    first = index[:, :, None]
    r0 = pick(raw_d, knot == first)
    r1 = pick(raw_d, ((knot == first + 1) & (j < SLOPES)))
    if TAILS == "circular":
        r1 += pick(raw_d, (j == 0) & (first == BINS - 1))
    fixed0 = (index == 0) if TAILS == "linear" else (index < 0)
    fixed1 = (index == BINS - 1) if TAILS == "linear" else (index < 0)
    d0 = slope_of(r0, fixed0, ZUKO, MIN_SLOPE, OFFSET, RANGE)
    d1 = slope_of(r1, fixed1, ZUKO, MIN_SLOPE, OFFSET, RANGE)
    s = height / width
    turn = d0 + d1 - 2 * s
    xi = solve(kept - y_low, height, s, turn, d0) if BY_Y else (kept - x_low) / width
    xi = clamped(xi, 0.0, 1.0)
    above = (v > START) if ZUKO else (v >= START)
    inside = above & (v <= START + LENGTH)
    bins = (raw_x, e_x, inverse_x, x_below, x_own, raw_y, e_y, inverse_y, y_below, y_own)
    slopes = (r0, fixed0, r1, fixed1)
    return kept, inside, index, xi, x_low, width, y_low, height, d0, d1, s, turn, bins, slopes


@triton.jit
def pass_through(
    x, y, channel_order, n, p, k_block, k_blocks, K, CHANNELS, P, x_n, x_k, x_p, y_n, y_k, y_p,
    TILE_K: tl.constexpr, DIM_X: tl.constexpr, DIM_Y: tl.constexpr, VEC_K: tl.constexpr, VEC_P: tl.constexpr,
):  # fmt: skip
    """Copies the channels after the K transformed ones, each block of channels its share."""
    for block in range(k_block, tl.cdiv(CHANNELS - K, TILE_K), k_blocks):
        j = (K + block * TILE_K + tl.arange(0, TILE_K))[:, None]
        mask = (j < CHANNELS) & (p < P)
        c = tl.load(channel_order + j, mask=j < CHANNELS, other=0)
        b_x = tl.load(address(x, n, c, p, x_n, x_k, x_p, DIM_X, VEC_K, VEC_P), mask=mask, other=0.0)
        tl.store(address(y, n, c, p, y_n, y_k, y_p, DIM_Y, VEC_K, VEC_P), b_x, mask=mask)


@triton.jit(do_not_specialize=["split"])
def spline_kernel(
    x, params, channel_order, y, log_det, K, P, CHANNELS, split, tiles_per_program,
    x_n, x_k, x_p, params_n, params_k, params_p, y_n, y_k, y_p,
    INVERSE: tl.constexpr, HAS_ORDER: tl.constexpr, BINS: tl.constexpr, BINS_PADDED: tl.constexpr,
    SLOPES: tl.constexpr, SLOPES_PADDED: tl.constexpr, EACH: tl.constexpr, TAILS: tl.constexpr,
    ZUKO: tl.constexpr, START: tl.constexpr, LENGTH: tl.constexpr, SMALLEST: tl.constexpr,
    SHARE: tl.constexpr, FACTOR: tl.constexpr, MIN_SLOPE: tl.constexpr, OFFSET: tl.constexpr,
    RANGE: tl.constexpr, ACC: tl.constexpr, CONTIGUOUS_DIMS: tl.constexpr, VEC_K: tl.constexpr,
    VEC_P: tl.constexpr, TILE_K: tl.constexpr, TILE_P: tl.constexpr, VECTORS: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    # x, y: [N, CHANNELS, P];  params: [N, K EACH, P];  channel_order: [CHANNELS];  log_det: [N, split]
    DIM_X: tl.constexpr = CONTIGUOUS_DIMS[0]
    DIM_PARAMS: tl.constexpr = CONTIGUOUS_DIMS[1]
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
        c = channel_of(channel_order, k, k < K, HAS_ORDER)
        b_v = tl.load(address(x, n, c, p, x_n, x_k, x_p, DIM_X, VEC_K, VEC_P), mask=mask, other=0.0).to(ACC)
        kept, inside, index, xi, x_low, width, y_low, height, d0, d1, s, turn, bins, slopes = pieces(
            params, n, k, p, mask, b_v, params_n, params_k, params_p, INVERSE, BINS, BINS_PADDED, SLOPES,
            SLOPES_PADDED, EACH, TAILS, ZUKO, START, LENGTH, SMALLEST, SHARE, FACTOR, MIN_SLOPE, OFFSET, RANGE,
            ACC, DIM_PARAMS, VEC_K, VEC_P,
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
        if HAS_ORDER:
            pass_through(
                x, y, channel_order, n, p, block % k_blocks, k_blocks, K, CHANNELS, P, x_n, x_k, x_p, y_n, y_k,
                y_p, TILE_K, DIM_X, DIM_Y, VEC_K, VEC_P,
            )  # fmt: skip
    if VECTORS:
        p = widened(part, WIDE) * TILE_P + tl.arange(0, TILE_P)
        tl.store(log_det + p, tl.sum(total, 0), mask=p < P)
    else:
        tl.store(log_det + tl.program_id(0), tl.sum(total))


@triton.jit
def spline_backward_kernel(
    v, params, channel_order, dy, dlog_det, x_out, dv, dparams, K, P, CHANNELS, stride_dlog_det,
    v_n, v_k, v_p, params_n, params_k, params_p, dy_n, dy_k, dy_p, dv_n, dv_k, dv_p,
    dparams_n, dparams_k, dparams_p, x_out_n, x_out_k, x_out_p,
    GIVEN: tl.constexpr, HAS_ORDER: tl.constexpr, BINS: tl.constexpr, BINS_PADDED: tl.constexpr,
    SLOPES: tl.constexpr, SLOPES_PADDED: tl.constexpr, EACH: tl.constexpr, TAILS: tl.constexpr,
    ZUKO: tl.constexpr, START: tl.constexpr, LENGTH: tl.constexpr, SMALLEST: tl.constexpr,
    SHARE: tl.constexpr, FACTOR: tl.constexpr, MIN_SLOPE: tl.constexpr, OFFSET: tl.constexpr,
    RANGE: tl.constexpr, ACC: tl.constexpr, CONTIGUOUS_DIMS: tl.constexpr, VEC_K: tl.constexpr,
    VEC_P: tl.constexpr, TILE_K: tl.constexpr, TILE_P: tl.constexpr, VECTORS: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    # v, dy, dv, x_out: [N, CHANNELS, P];  params, dparams: [N, K EACH, P]
    # GIVEN: "x": v is x.  "inverse": v is y, dy the gradient of x.  "y": v is y, dv the gradient of x, x_out is x
    DIM_V: tl.constexpr = CONTIGUOUS_DIMS[0]
    DIM_PARAMS: tl.constexpr = CONTIGUOUS_DIMS[1]
    DIM_DY: tl.constexpr = CONTIGUOUS_DIMS[2]
    DIM_DV: tl.constexpr = CONTIGUOUS_DIMS[3]
    DIM_DPARAMS: tl.constexpr = CONTIGUOUS_DIMS[4]
    DIM_X_OUT: tl.constexpr = CONTIGUOUS_DIMS[5]
    K, P = K * VEC_K, unvectorized_size(P, VEC_P, WIDE)
    k_blocks, p_blocks = tl.cdiv(K, TILE_K), tl.cdiv(P, TILE_P)
    k_block, position_block = tl.program_id(0) % k_blocks, tl.program_id(0) // k_blocks
    n = (position_block // p_blocks).to(tl.int64)
    k, p = block_indices(k_block, position_block % p_blocks, TILE_K, TILE_P, WIDE)
    mask = (k < K) & (p < P)
    c = channel_of(channel_order, k, k < K, HAS_ORDER)
    b_v = tl.load(address(v, n, c, p, v_n, v_k, v_p, DIM_V, VEC_K, VEC_P), mask=mask, other=0.0).to(ACC)
    b_dy = tl.load(address(dy, n, c, p, dy_n, dy_k, dy_p, DIM_DY, VEC_K, VEC_P), mask=mask, other=0.0).to(ACC)
    if VECTORS:
        dlog = tl.load(dlog_det + p.to(tl.int64) * stride_dlog_det, mask=p < P, other=0.0).to(ACC)
    else:
        dlog = tl.load(dlog_det + n * stride_dlog_det).to(ACC)
    kept, inside, index, xi, x_low, width, y_low, height, d0, d1, s, turn, bins, slopes = pieces(
        params, n, k, p, mask, b_v, params_n, params_k, params_p, GIVEN != "x", BINS, BINS_PADDED, SLOPES,
        SLOPES_PADDED, EACH, TAILS, ZUKO, START, LENGTH, SMALLEST, SHARE, FACTOR, MIN_SLOPE, OFFSET, RANGE, ACC,
        DIM_PARAMS, VEC_K, VEC_P,
    )  # fmt: skip
    raw_x, e_x, inverse_x, x_below, x_own, raw_y, e_y, inverse_y, y_below, y_own = bins
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
    tl.store(address(dv, n, c, p, dv_n, dv_k, dv_p, DIM_DV, VEC_K, VEC_P), b_dv.to(dv.dtype.element_ty), mask=mask)
    if GIVEN == "y":
        at_x = address(x_out, n, c, p, x_out_n, x_out_k, x_out_p, DIM_X_OUT, VEC_K, VEC_P)
        tl.store(at_x, b_x.to(x_out.dtype.element_ty), mask=mask)

    q = tl.arange(0, BINS_PADDED)[None, None, :]
    at = index[:, :, None]
    mean_x, mean_y = by_x * x_below + by_width * x_own, g * y_below + by_height * y_own
    bin_x = tl.where(q < at, by_x[:, :, None], tl.where(q == at, by_width[:, :, None], 0.0))
    bin_y = tl.where(q < at, g[:, :, None], tl.where(q == at, by_height[:, :, None], 0.0))
    scale: tl.constexpr = LENGTH * SHARE * FACTOR
    draw_x = e_x * (inverse_x * scale)[:, :, None] * (bin_x - mean_x[:, :, None])
    draw_y = e_y * (inverse_y * scale)[:, :, None] * (bin_y - mean_y[:, :, None])
    if ZUKO:
        c_x, c_y = 1 + tl.abs(raw_x) * (2 * FACTOR * RANGE), 1 + tl.abs(raw_y) * (2 * FACTOR * RANGE)
        draw_x, draw_y = draw_x / (c_x * c_x), draw_y / (c_y * c_y)
    store_raw(
        dparams, n, k, p, q, mask, BINS, 0, EACH, draw_x, dparams_n, dparams_k, dparams_p, DIM_DPARAMS, VEC_K, VEC_P
    )
    store_raw(
        dparams, n, k, p, q, mask, BINS, BINS, EACH, draw_y, dparams_n, dparams_k, dparams_p, DIM_DPARAMS, VEC_K, VEC_P
    )
    j = tl.arange(0, SLOPES_PADDED)[None, None, :]
    s0 = slope_vjp(r0, fixed0, d0, by_0, ZUKO, OFFSET, RANGE)[:, :, None]
    s1 = slope_vjp(r1, fixed1, d1, by_1, ZUKO, OFFSET, RANGE)[:, :, None]
    knot = j + (1 if TAILS == "linear" else 0)
    draw_d = tl.where(knot == at, s0, 0.0) + tl.where(knot == at + 1, s1, 0.0)
    if TAILS == "circular":
        draw_d += tl.where((j == 0) & (at == BINS - 1), s1, 0.0)
    store_raw(
        dparams, n, k, p, j, mask, SLOPES, 2 * BINS, EACH, draw_d, dparams_n, dparams_k, dparams_p, DIM_DPARAMS,
        VEC_K, VEC_P,
    )  # fmt: skip
    if HAS_ORDER:
        pass_through(
            dy, dv, channel_order, n, p, k_block, k_blocks, K, CHANNELS, P, dy_n, dy_k, dy_p, dv_n, dv_k, dv_p,
            TILE_K, DIM_DY, DIM_DV, VEC_K, VEC_P,
        )  # fmt: skip
        if GIVEN == "y":
            pass_through(
                v, x_out, channel_order, n, p, k_block, k_blocks, K, CHANNELS, P, v_n, v_k, v_p, x_out_n, x_out_k,
                x_out_p, TILE_K, DIM_V, DIM_X_OUT, VEC_K, VEC_P,
            )  # fmt: skip


def _form(
    bins: int, bound: float, tails: str, convention: str, factor: float, min_bin: float, min_slope: float
) -> dict:
    """The constants of a form of splines; SMALLEST + SHARE * softmax is the share of a bin."""
    slopes = bins + {"linear": -1, "circular": 0, "none": 1}[tails]
    smallest = 0.0 if convention == "zuko" else min_bin
    return {
        "BINS": bins,
        "BINS_PADDED": power_of_two(bins),
        "SLOPES": slopes,
        "SLOPES_PADDED": power_of_two(slopes),
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


def _elements(form: dict) -> int:
    """Elements of a tile."""
    return max(VALUES // max(form["BINS_PADDED"], form["SLOPES_PADDED"]), 1)


def spline(
    x: Tensor,
    params: Tensor,
    channel_order: Tensor | None,
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
    x, params = with_position_stride(x), with_position_stride(params)
    t = tiles(params.shape[1] // form["EACH"], x, params, out, elements=_elements(form))
    log_det = x.new_empty((x.shape[0] * (1 if t.constants["VECTORS"] else t.split),), dtype=acc)
    launch(
        spline_kernel, t.samples * t.split, x, params, x if channel_order is None else channel_order, out,
        log_det, *t.sizes, x.shape[1], t.split, t.tiles_per_program, *t.strides, warps=WARPS, INVERSE=inverse,
        HAS_ORDER=channel_order is not None, ACC=triton_acc, **form, **t.constants,
    )  # fmt: skip
    return finalize(y, out), sum_parts(log_det, x.shape[0])


def _backward(
    v: Tensor, params: Tensor, channel_order: Tensor | None, dy: Tensor, dlog_det: Tensor, form: dict, given: str
) -> tuple[Tensor, Tensor, Tensor]:
    triton_acc = accumulator(v.dtype)[1]
    dv, dv_out = allocate_output(dy)
    dparams, dparams_out = allocate_output(params)
    x, x_out = allocate_output(v) if given == "y" else (v, v)
    v, params, dy = with_position_stride(v), with_position_stride(params), with_position_stride(dy)
    tensors = v, params, dy, dv_out, dparams_out, x_out if given == "y" else v
    t = tiles(params.shape[1] // form["EACH"], *tensors, elements=_elements(form))
    launch(
        spline_backward_kernel, t.position_blocks * t.k_blocks, v, params,
        v if channel_order is None else channel_order, dy, dlog_det, x_out, dv_out, dparams_out, *t.sizes,
        v.shape[1], dlog_det.stride(0), *t.strides, warps=WARPS, GIVEN=given,
        HAS_ORDER=channel_order is not None, ACC=triton_acc, **form, **t.constants,
    )  # fmt: skip
    return finalize(x, x_out), finalize(dv, dv_out), finalize(dparams, dparams_out)


def spline_backward(
    x: Tensor, params: Tensor, channel_order: Tensor | None, dy: Tensor, dlog_det: Tensor, bins: int,
    bound: float, tails: str, convention: str, factor: float, min_bin: float, min_slope: float, inverse: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    form = _form(bins, bound, tails, convention, factor, min_bin, min_slope)
    return _backward(x, params, channel_order, dy, dlog_det, form, "inverse" if inverse else "x")[1:]


def spline_inverse_backward(
    y: Tensor, params: Tensor, channel_order: Tensor | None, dy: Tensor, dlog_det: Tensor, bins: int,
    bound: float, tails: str, convention: str, factor: float, min_bin: float, min_slope: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    form = _form(bins, bound, tails, convention, factor, min_bin, min_slope)
    return _backward(y, params, channel_order, dy, dlog_det, form, "y")
