"""The logit of mixtures' CDFs for a part of the channels, with the log-det and gradients; the others are copied.

Bound, bytes per transformed element in float32, for P parameters: forward 8 + 4 P, backward 12 + 8 P, inverse + backward
16 + 8 P. A channel that passes through is 8 bytes, in the inverse + backward 16. The inverse is bound by exponentials: its
loop ends when all elements of a tile have converged.

As in spline.py, the parameters of a tile are read once, and a thread has all components of its element in registers.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastflow.triton_kernels.affine_coupling import tanh
from fastflow.triton_kernels.spline import (
    ELEMENTS,
    GROUP,
    WARPS,
    channel_of,
    columns,
    load_group,
    load_raw,
    pass_through,
    raw_address,
)
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

MAX_LOG_WIDTH = tl.constexpr(7.0)  # of a component, up and down
MAX_STEPS = 100  # of the inverse: each halves at least the last step or the bracket


@triton.jit
def address_of(
    h, n, k, p, stride_n, stride_k, stride_p, Q: tl.constexpr, EACH: tl.constexpr, DIM: tl.constexpr,
    VEC_K: tl.constexpr, VEC_P: tl.constexpr,
):  # fmt: skip
    """Address of parameter Q of each element, ``[TILE_K, TILE_P]``."""
    return address(h, n, k * EACH + Q, p, stride_n, stride_k, stride_p, DIM, VEC_K, VEC_P)


@triton.jit
def load_mixture(
    h, n, k, p, mask, stride_n, stride_k, stride_p, COMPONENTS: tl.constexpr, GROUP: tl.constexpr,
    EACH: tl.constexpr, ACC: tl.constexpr, DIM: tl.constexpr, VEC_K: tl.constexpr, VEC_P: tl.constexpr,
):  # fmt: skip
    """The log-scale, the shift, and the raw parameters of the components as they lie in memory."""
    at_a = address_of(h, n, k, p, stride_n, stride_k, stride_p, 0, EACH, DIM, VEC_K, VEC_P)
    at_b = address_of(h, n, k, p, stride_n, stride_k, stride_p, 1, EACH, DIM, VEC_K, VEC_P)
    a = tanh(tl.load(at_a, mask=mask, other=0.0).to(ACC))
    b = tl.load(at_b, mask=mask, other=0.0).to(ACC)
    logits = load_raw(
        h, n, k, p, mask, stride_n, stride_k, stride_p, COMPONENTS, 2, GROUP, EACH, ACC, DIM, VEC_K, VEC_P
    )
    means = load_raw(
        h, n, k, p, mask, stride_n, stride_k, stride_p, COMPONENTS, 2 + COMPONENTS, GROUP, EACH, ACC, DIM, VEC_K, VEC_P
    )  # fmt: skip
    widths = load_raw(
        h, n, k, p, mask, stride_n, stride_k, stride_p, COMPONENTS, 2 + 2 * COMPONENTS, GROUP, EACH, ACC, DIM, VEC_K,
        VEC_P,
    )  # fmt: skip
    return a, b, logits, means, widths


@triton.jit
def bounded_width(raw):
    """A component's log-scale; NaN stays NaN."""
    at_least = tl.where(raw < -MAX_LOG_WIDTH, -MAX_LOG_WIDTH, raw)
    return tl.where(at_least > MAX_LOG_WIDTH, MAX_LOG_WIDTH, at_least)


@triton.jit
def components_of(logits, means, widths, COMPONENTS: tl.constexpr, GROUP: tl.constexpr):
    """Tuples of tiles: logits less their largest, means, log-scales, rates; the largest logit, the largest rate."""
    logit = columns(logits, GROUP)
    mean = columns(means, GROUP)
    raw_width = columns(widths, GROUP)
    peak = logit[0]
    for i in tl.static_range(1, COMPONENTS):
        peak = tl.maximum(peak, logit[i])
    weight = ()
    width = ()
    rate = ()
    fastest = tl.zeros_like(peak)
    for i in tl.static_range(COMPONENTS):
        weight = weight + (logit[i] - peak,)
        b_width = bounded_width(raw_width[i])
        width = width + (b_width,)
        b_rate = tl.exp(-b_width)
        rate = rate + (b_rate,)
        fastest = tl.maximum(fastest, b_rate)
    return weight, mean, width, rate, peak, fastest


@triton.jit
def below_of(weight, u):
    """Logarithm of a component's part of F, without its factor 1 / (1 + e^-|u|)."""
    return weight + tl.minimum(u, 0.0)


@triton.jit
def above_of(weight, u):
    """Logarithm of a component's part of 1 - F, without its factor 1 / (1 + e^-|u|)."""
    return weight - tl.maximum(u, 0.0)


@triton.jit
def sides_of(u):
    """1 / (1 + e^-|u|), and the logistics of u and of -u, without cancellation."""
    e = tl.exp(-tl.abs(u))
    one = 1 / (1 + e)
    other = e * one
    return one, tl.where(u >= 0, one, other), tl.where(u >= 0, other, one)


@triton.jit
def exponent_of(weight, u, width, left, top, top1):
    """Logarithm of a component's part of the slope, without its factor 1 / (1 + e^-|u|)^2."""
    part = tl.where(left, below_of(weight, u) - top, above_of(weight, u) - top1)
    return part + tl.minimum(tl.where(left, -u, u), 0.0) - width


@triton.jit
def terms(x, weight, mean, rate, COMPONENTS: tl.constexpr):
    """logit F and its slope; the parts that F and 1 - F sum, and the factors that these leave out.

    The slope f / (F (1 - F)) is a sum over the components by the smaller side, F or 1 - F, times 1 + e^-|z|.
    """
    top = below_of(weight[0], (x - mean[0]) * rate[0])
    top1 = above_of(weight[0], (x - mean[0]) * rate[0])
    for i in tl.static_range(1, COMPONENTS):
        u = (x - mean[i]) * rate[i]
        top = tl.maximum(top, below_of(weight[i], u))
        top1 = tl.maximum(top1, above_of(weight[i], u))
    f = tl.zeros_like(x)
    f1 = tl.zeros_like(x)
    slope_f = tl.zeros_like(x)
    slope_f1 = tl.zeros_like(x)
    for i in tl.static_range(COMPONENTS):
        u = (x - mean[i]) * rate[i]
        one, to_left, to_right = sides_of(u)
        below = tl.exp(below_of(weight[i], u) - top) * one
        above = tl.exp(above_of(weight[i], u) - top1) * one
        f += below
        f1 += above
        slope_f += below * to_right * rate[i]
        slope_f1 += above * to_left * rate[i]
    z = (top - top1) + tl.log(f / f1)
    left = z < 0
    both = 1 + tl.exp(-tl.abs(z))
    slope = tl.where(left, slope_f / f, slope_f1 / f1) * both
    return z, slope, f, f1, left, both, top, top1


@triton.jit
def log_slope_of(
    x, weight, mean, width, rate, f, f1, left, both, top, top1, COMPONENTS: tl.constexpr
):  # fmt: skip
    """The logarithm of the slope, which may be below the smallest number; the parts that it sums, and their factor."""
    highest = exponent_of(weight[0], (x - mean[0]) * rate[0], width[0], left, top, top1)
    for i in tl.static_range(1, COMPONENTS):
        u = (x - mean[i]) * rate[i]
        highest = tl.maximum(highest, exponent_of(weight[i], u, width[i], left, top, top1))
    total = tl.zeros_like(x)
    for i in tl.static_range(COMPONENTS):
        u = (x - mean[i]) * rate[i]
        one, to_left, to_right = sides_of(u)
        total += tl.exp(exponent_of(weight[i], u, width[i], left, top, top1) - highest) * one * one
    return highest + tl.log(total / tl.where(left, f, f1) * both), total, highest


@triton.jit
def root(z, weight, mean, width, rate, fastest, mask, COMPONENTS: tl.constexpr, EPSILON: tl.constexpr,
         NEAR: tl.constexpr, STEPS: tl.constexpr):  # fmt: skip
    """x with logit F(x) = z, by Newton's method in a bracket.

    It is halved where a step would leave it or is more than half of the last one. The derivative of the log-slope is at
    most a few times the largest rate, so after a step that is a small part of the width the error is as its square.
    """
    low = mean[0] + z / rate[0]
    high = low
    for i in tl.static_range(1, COMPONENTS):
        end = mean[i] + z / rate[i]
        low = tl.minimum(low, end)
        high = tl.maximum(high, end)
    x = low + (high - low) / 2
    last = high - low
    running = tl.where(mask & (z == z), 1, 0)
    step_count = 0
    while (step_count < STEPS) & (tl.max(tl.max(running, 1), 0) > 0):
        found, slope, f, f1, left, both, top, top1 = terms(x, weight, mean, rate, COMPONENTS)
        above = found > z
        low = tl.where(above, low, x)
        high = tl.where(above, x, high)
        residual = z - found
        step = residual / slope
        size = tl.abs(step)
        small = (size <= tl.maximum(tl.abs(x) * (2 * EPSILON), NEAR / fastest)) | (
            tl.abs(residual) <= (1 + tl.abs(z)) * (2 * EPSILON)
        )
        newton = (x + step >= low) & (x + step <= high) & (small | (2 * size <= tl.abs(last)))
        to = tl.where(newton, x + step, tl.where(small, x, low + (high - low) / 2))
        last = tl.where(newton, step, high - low)
        x = tl.where(running > 0, to, x)
        running = tl.where(small, 0, running)
        step_count += 1
    return tl.where(z == z, x, z)


@triton.jit(do_not_specialize=["split"])
def mixture_cdf_kernel(
    x, h, channel_order, first_channel, y, log_det, K, P, CHANNELS, split, tiles_per_program,
    x_n, x_k, x_p, h_n, h_k, h_p, y_n, y_k, y_p,
    INVERSE: tl.constexpr, HAS_ORDER: tl.constexpr, PASSING: tl.constexpr, COMPONENTS: tl.constexpr,
    GROUP: tl.constexpr, EACH: tl.constexpr, EPSILON: tl.constexpr, NEAR: tl.constexpr, STEPS: tl.constexpr,
    ACC: tl.constexpr, CONTIGUOUS_DIMS: tl.constexpr, VEC_K: tl.constexpr, VEC_P: tl.constexpr,
    TILE_K: tl.constexpr, TILE_P: tl.constexpr, VECTORS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    # x, y: [N, CHANNELS, P];  h: [N, K EACH, P];  channel_order: [CHANNELS];  log_det: [N, split]
    DIM_X: tl.constexpr = CONTIGUOUS_DIMS[0]
    DIM_H: tl.constexpr = CONTIGUOUS_DIMS[1]
    DIM_Y: tl.constexpr = CONTIGUOUS_DIMS[2]
    K, P = K * VEC_K, unvectorized_size(P, VEC_P, WIDE)
    part = tl.program_id(0) % split
    n = (tl.program_id(0) // split).to(tl.int64)
    k_blocks = tl.cdiv(K, TILE_K)
    sums = tl.zeros([TILE_K, TILE_P], ACC)
    for i in range(tiles_per_program):
        block = part * tiles_per_program + i
        k, p = tile_indices(block, K, TILE_K, TILE_P, WIDE)
        mask = (k < K) & (p < P)
        c = channel_of(channel_order, first_channel, k, k < K, HAS_ORDER)
        b_v = tl.load(address(x, n, c, p, x_n, x_k, x_p, DIM_X, VEC_K, VEC_P), mask=mask, other=0.0).to(ACC)
        a, b, logits, means, widths = load_mixture(
            h, n, k, p, mask, h_n, h_k, h_p, COMPONENTS, GROUP, EACH, ACC, DIM_H, VEC_K, VEC_P
        )
        weight, mean, width, rate, peak, fastest = components_of(logits, means, widths, COMPONENTS, GROUP)
        b_x = b_v
        if INVERSE:
            z_given = (b_v - b) * tl.exp(-a)
            b_x = root(z_given, weight, mean, width, rate, fastest, mask, COMPONENTS, EPSILON, NEAR, STEPS)
        z, slope, f, f1, left, both, top, top1 = terms(b_x, weight, mean, rate, COMPONENTS)
        log_slope, total, highest = log_slope_of(
            b_x, weight, mean, width, rate, f, f1, left, both, top, top1, COMPONENTS
        )
        log_slope += a
        b_y = b_x if INVERSE else tl.exp(a) * z + b
        sums += tl.where(mask, -log_slope if INVERSE else log_slope, 0.0)
        tl.store(
            address(y, n, c, p, y_n, y_k, y_p, DIM_Y, VEC_K, VEC_P), b_y.to(y.dtype.element_ty), mask=mask
        )
        if PASSING:
            pass_through(
                x, y, channel_order, first_channel, n, p, block % k_blocks, k_blocks, K, CHANNELS, P, x_n, x_k, x_p,
                y_n, y_k, y_p, HAS_ORDER, TILE_K, DIM_X, DIM_Y, VEC_K, VEC_P,
            )  # fmt: skip
    if VECTORS:
        p = widened(part, WIDE) * TILE_P + tl.arange(0, TILE_P)
        tl.store(log_det + p, tl.sum(sums, 0), mask=p < P)
    else:
        tl.store(log_det + tl.program_id(0), tl.sum(sums))


@triton.jit
def store_group(
    dh, n, k, p, i, mask, dh_n, dh_k, dh_p, b_logit, b_mean, b_width, x, peak, left, top, top1, inverse_f, inverse_f1,
    highest, inverse_total, inverse_weights, by_z, dlog, COMPONENTS: tl.constexpr, GROUP: tl.constexpr,
    EACH: tl.constexpr, DIM_DH: tl.constexpr, VEC_K: tl.constexpr, VEC_P: tl.constexpr,
):  # fmt: skip
    """Writes the gradients of group i of the logits, the means and the log-scales."""
    q = (i * GROUP + tl.arange(0, GROUP))[None, None, :]
    inside = tl.abs(b_width) < MAX_LOG_WIDTH
    b_width = bounded_width(b_width)
    weight, rate = b_logit - peak[:, :, None], tl.exp(-b_width)
    u = (x[:, :, None] - b_mean) * rate
    one, to_left, to_right = sides_of(u)
    below = tl.exp(below_of(weight, u) - top[:, :, None]) * one * inverse_f[:, :, None]
    above = tl.exp(above_of(weight, u) - top1[:, :, None]) * one * inverse_f1[:, :, None]
    exponent = exponent_of(weight, u, b_width, left[:, :, None], top[:, :, None], top1[:, :, None])
    share = tl.exp(exponent - highest[:, :, None]) * one * one * inverse_total[:, :, None]
    g, d = by_z[:, :, None], dlog[:, :, None]
    below_right, above_left = below * to_right, above * to_left
    by_u = g * (below_right + above_left) + d * (share * (to_right - to_left) - below_right + above_left)
    of_all = tl.exp(weight) * inverse_weights[:, :, None]
    by_logit = g * (below - above) + d * (share - below - above + of_all)
    mask = mask[:, :, None] & (q < COMPONENTS)
    at = raw_address(dh, n, k, p, 2 + q, dh_n, dh_k, dh_p, EACH, DIM_DH, VEC_K, VEC_P)
    tl.store(at, by_logit.to(dh.dtype.element_ty), mask=mask)
    at = raw_address(dh, n, k, p, 2 + COMPONENTS + q, dh_n, dh_k, dh_p, EACH, DIM_DH, VEC_K, VEC_P)
    tl.store(at, (-rate * by_u).to(dh.dtype.element_ty), mask=mask)
    at = raw_address(dh, n, k, p, 2 + 2 * COMPONENTS + q, dh_n, dh_k, dh_p, EACH, DIM_DH, VEC_K, VEC_P)
    by_width = tl.where(inside, -u * by_u - d * share, 0.0)
    tl.store(at, by_width.to(dh.dtype.element_ty), mask=mask)


@triton.jit
def mixture_cdf_backward_kernel(
    v, h, channel_order, first_channel, dy, dlog_det, x_out, dv, dh, K, P, CHANNELS, stride_dlog_det,
    v_n, v_k, v_p, h_n, h_k, h_p, dy_n, dy_k, dy_p, dv_n, dv_k, dv_p,
    dh_n, dh_k, dh_p, x_out_n, x_out_k, x_out_p,
    GIVEN: tl.constexpr, HAS_ORDER: tl.constexpr, PASSING: tl.constexpr, COMPONENTS: tl.constexpr,
    GROUP: tl.constexpr, EACH: tl.constexpr, EPSILON: tl.constexpr, NEAR: tl.constexpr, STEPS: tl.constexpr,
    ACC: tl.constexpr, CONTIGUOUS_DIMS: tl.constexpr, VEC_K: tl.constexpr, VEC_P: tl.constexpr,
    TILE_K: tl.constexpr, TILE_P: tl.constexpr, VECTORS: tl.constexpr, WIDE: tl.constexpr,
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
    dlog += tl.zeros_like(b_v)
    a, b, logits, means, widths = load_mixture(
        h, n, k, p, mask, h_n, h_k, h_p, COMPONENTS, GROUP, EACH, ACC, DIM_H, VEC_K, VEC_P
    )
    weight, mean, width, rate, peak, fastest = components_of(logits, means, widths, COMPONENTS, GROUP)
    b_x = b_v
    if GIVEN != "x":
        z_given = (b_v - b) * tl.exp(-a)
        b_x = root(z_given, weight, mean, width, rate, fastest, mask, COMPONENTS, EPSILON, NEAR, STEPS)
    z, slope, f, f1, left, both, top, top1 = terms(b_x, weight, mean, rate, COMPONENTS)
    log_slope, total, highest = log_slope_of(
        b_x, weight, mean, width, rate, f, f1, left, both, top, top1, COMPONENTS
    )
    inverse_f, inverse_f1, inverse_total = 1 / f, 1 / f1, 1 / total
    log_by_x = tl.zeros_like(b_x)
    for i in tl.static_range(COMPONENTS):
        u = (b_x - mean[i]) * rate[i]
        one, to_left, to_right = sides_of(u)
        below = tl.exp(below_of(weight[i], u) - top) * one * inverse_f
        above = tl.exp(above_of(weight[i], u) - top1) * one * inverse_f1
        share = (
            tl.exp(exponent_of(weight[i], u, width[i], left, top, top1) - highest) * one * one * inverse_total
        )
        log_by_x += rate[i] * (share * (to_right - to_left) - below * to_right + above * to_left)
    g = b_dy
    if GIVEN == "inverse":
        dlog = -dlog
        g = -(b_dy + dlog * log_by_x) * tl.exp(-(log_slope + a))
    by_z = g * tl.exp(a)
    b_dv = -g if GIVEN == "inverse" else by_z * slope + dlog * log_by_x
    tl.store(
        address(dv, n, c, p, dv_n, dv_k, dv_p, DIM_DV, VEC_K, VEC_P), b_dv.to(dv.dtype.element_ty), mask=mask
    )
    if GIVEN == "y":
        at_x = address(x_out, n, c, p, x_out_n, x_out_k, x_out_p, DIM_X_OUT, VEC_K, VEC_P)
        tl.store(at_x, b_x.to(x_out.dtype.element_ty), mask=mask)
    at = address_of(dh, n, k, p, dh_n, dh_k, dh_p, 0, EACH, DIM_DH, VEC_K, VEC_P)
    tl.store(at, ((by_z * z + dlog) * (1 - a) * (1 + a)).to(dh.dtype.element_ty), mask=mask)
    at = address_of(dh, n, k, p, dh_n, dh_k, dh_p, 1, EACH, DIM_DH, VEC_K, VEC_P)
    tl.store(at, g.to(dh.dtype.element_ty), mask=mask)
    weights = tl.zeros_like(b_x)
    for i in tl.static_range(COMPONENTS):
        weights += tl.exp(weight[i])
    # The terms are computed again as the parameters lie in memory, see store_sizes in spline.py.
    if len(logits) == 1 and ACC != tl.float64:
        store_group(
            dh, n, k, p, 0, mask, dh_n, dh_k, dh_p, logits[0], means[0], widths[0], b_x, peak, left, top, top1,
            inverse_f, inverse_f1, highest, inverse_total, 1 / weights, by_z, dlog, COMPONENTS, GROUP, EACH, DIM_DH,
            VEC_K, VEC_P,
        )  # fmt: skip
    else:
        for i in range((COMPONENTS + GROUP - 1) // GROUP):
            b_logit = load_group(
                h, n, k, p, i, mask, h_n, h_k, h_p, COMPONENTS, 2, GROUP, EACH, ACC, DIM_H, VEC_K, VEC_P
            )
            b_mean = load_group(
                h, n, k, p, i, mask, h_n, h_k, h_p, COMPONENTS, 2 + COMPONENTS, GROUP, EACH, ACC, DIM_H, VEC_K, VEC_P
            )  # fmt: skip
            b_width = load_group(
                h, n, k, p, i, mask, h_n, h_k, h_p, COMPONENTS, 2 + 2 * COMPONENTS, GROUP, EACH, ACC, DIM_H, VEC_K, VEC_P
            )  # fmt: skip
            store_group(
                dh, n, k, p, i, mask, dh_n, dh_k, dh_p, b_logit, b_mean, b_width, b_x, peak, left, top, top1,
                inverse_f, inverse_f1, highest, inverse_total, 1 / weights, by_z, dlog, COMPONENTS, GROUP, EACH,
                DIM_DH, VEC_K, VEC_P,
            )  # fmt: skip
    if PASSING:
        pass_through(
            dy, dv, channel_order, first_channel, n, p, k_block, k_blocks, K, CHANNELS, P, dy_n, dy_k, dy_p, dv_n,
            dv_k, dv_p, HAS_ORDER, TILE_K, DIM_DY, DIM_DV, VEC_K, VEC_P,
        )  # fmt: skip
        if GIVEN == "y":
            pass_through(
                v, x_out, channel_order, first_channel, n, p, k_block, k_blocks, K, CHANNELS, P, v_n, v_k, v_p,
                x_out_n, x_out_k, x_out_p, HAS_ORDER, TILE_K, DIM_V, DIM_X_OUT, VEC_K, VEC_P,
            )  # fmt: skip


def _form(components: int, acc: torch.dtype) -> dict:
    """The constants of mixtures of so many components."""
    epsilon = torch.finfo(acc).eps
    return {
        "COMPONENTS": components,
        "GROUP": min(power_of_two(components), GROUP),
        "EACH": 3 * components + 2,
        "EPSILON": epsilon,
        "NEAR": epsilon**0.5 / 2,
        "STEPS": MAX_STEPS,
    }


def mixture_cdf(
    x: Tensor,
    params: Tensor,
    channel_order: Tensor | None,
    first_channel: int,
    components: int,
    inverse: bool,
) -> tuple[Tensor, Tensor]:
    acc, triton_acc = accumulator(x.dtype)
    form = _form(components, acc)
    y, out = allocate_output(x)
    x, params = with_position_stride(x), with_position_stride(params)
    k, channels = params.shape[1] // form["EACH"], x.shape[1]
    t = tiles(k, x, params, out, elements=ELEMENTS)
    log_det = x.new_empty((x.shape[0] * (1 if t.constants["VECTORS"] else t.split),), dtype=acc)
    launch(
        mixture_cdf_kernel, t.samples * t.split, x, params, x if channel_order is None else channel_order,
        first_channel, out, log_det, *t.sizes, channels, t.split, t.tiles_per_program, *t.strides, warps=WARPS,
        INVERSE=inverse, HAS_ORDER=channel_order is not None, PASSING=k < channels, ACC=triton_acc, **form,
        **t.constants,
    )  # fmt: skip
    return finalize(y, out), sum_parts(log_det, x.shape[0])


def _backward(
    v: Tensor,
    params: Tensor,
    channel_order: Tensor | None,
    first_channel: int,
    dy: Tensor,
    dlog_det: Tensor,
    components: int,
    given: str,
) -> tuple[Tensor, Tensor, Tensor]:
    acc, triton_acc = accumulator(v.dtype)
    form = _form(components, acc)
    dv, dv_out = allocate_output(dy)
    dparams, dparams_out = allocate_output(params)
    x, x_out = allocate_output(v) if given == "y" else (v, v)
    v, params, dy = with_position_stride(v), with_position_stride(params), with_position_stride(dy)
    tensors = v, params, dy, dv_out, dparams_out, x_out if given == "y" else v
    k, channels = params.shape[1] // form["EACH"], v.shape[1]
    t = tiles(k, *tensors, elements=ELEMENTS)
    launch(
        mixture_cdf_backward_kernel, t.position_blocks * t.k_blocks, v, params,
        v if channel_order is None else channel_order, first_channel, dy, dlog_det, x_out, dv_out, dparams_out,
        *t.sizes, channels, dlog_det.stride(0), *t.strides, warps=WARPS, GIVEN=given,
        HAS_ORDER=channel_order is not None, PASSING=k < channels, ACC=triton_acc, **form, **t.constants,
    )  # fmt: skip
    return finalize(x, x_out), finalize(dv, dv_out), finalize(dparams, dparams_out)


def mixture_cdf_backward(
    x: Tensor,
    params: Tensor,
    channel_order: Tensor | None,
    first_channel: int,
    dy: Tensor,
    dlog_det: Tensor,
    components: int,
    inverse: bool,
) -> tuple[Tensor, Tensor]:
    given = "inverse" if inverse else "x"
    return _backward(x, params, channel_order, first_channel, dy, dlog_det, components, given)[1:]


def mixture_cdf_inverse_backward(
    y: Tensor,
    params: Tensor,
    channel_order: Tensor | None,
    first_channel: int,
    dy: Tensor,
    dlog_det: Tensor,
    components: int,
) -> tuple[Tensor, Tensor, Tensor]:
    return _backward(y, params, channel_order, first_channel, dy, dlog_det, components, "y")
