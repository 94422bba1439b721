"""Activation normalization in one pass: both directions, gradients, inverse with gradient, and statistics.

Bound, bytes per element of x in float32: forward and inverse 8, backward 12 (x, dy, dx), inverse + backward
16 (y, dy, x, dx), statistics 4. The log-det is the same for every sample and is computed from the
parameters.
"""

import triton
import triton.language as tl
from torch import Tensor

from fastflow.triton_kernels.tiles import (
    accumulator,
    address,
    allocate_output,
    block_indices,
    finalize,
    launch,
    sum_slots,
    tile_indices,
    tiles,
    unvectorized_size,
    widened,
    with_position_stride,
)


@triton.jit(do_not_specialize=["blocks", "positions", "samples"])
def actnorm_kernel(
    x, log_scale, bias, y, log_det, K, P, blocks, positions, samples, stride_log_scale, stride_bias,
    x_n, x_k, x_p, y_n, y_k, y_p,
    INVERSE: tl.constexpr, LOG_DETS: tl.constexpr, ACC: tl.constexpr, CONTIGUOUS_DIMS: tl.constexpr,
    VEC_K: tl.constexpr, VEC_P: tl.constexpr, TILE_K: tl.constexpr, TILE_P: tl.constexpr,
    VECTORS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    # x, y: [N, K, P];  log_scale, bias: [K];  log_det: [N]
    DIM_X: tl.constexpr = CONTIGUOUS_DIMS[0]
    DIM_Y: tl.constexpr = CONTIGUOUS_DIMS[1]
    K, P = K * VEC_K, unvectorized_size(P, VEC_P, WIDE)
    block = tl.program_id(0) % blocks
    n = (tl.program_id(0) // blocks).to(tl.int64)
    k, p = tile_indices(block, K, TILE_K, TILE_P, WIDE)
    mask = (k < K) & (p < P)
    b_x = tl.load(address(x, n, k, p, x_n, x_k, x_p, DIM_X, VEC_K, VEC_P), mask=mask, other=0.0).to(ACC)
    b_s = tl.load(log_scale + k.to(tl.int64) * stride_log_scale, mask=k < K, other=0.0).to(ACC)
    b_b = tl.load(bias + k.to(tl.int64) * stride_bias, mask=k < K, other=0.0).to(ACC)
    b_y = b_x * tl.exp(-b_s) - b_b if INVERSE else (b_x + b_b) * tl.exp(b_s)
    tl.store(address(y, n, k, p, y_n, y_k, y_p, DIM_Y, VEC_K, VEC_P), b_y.to(y.dtype.element_ty), mask=mask)
    # the log-det is the same for all samples: each of the first programs writes it for LOG_DETS of them
    first = tl.program_id(0) * LOG_DETS
    if first < samples:
        total = tl.zeros([TILE_K], ACC)
        for start in range(0, K, TILE_K):
            c = start + tl.arange(0, TILE_K)
            total += tl.load(log_scale + c.to(tl.int64) * stride_log_scale, mask=c < K, other=0.0).to(ACC)
        b_log_det = tl.sum(total) * positions
        if INVERSE:
            b_log_det = -b_log_det
        at = first + tl.arange(0, LOG_DETS)
        tl.store(log_det + at, tl.zeros([LOG_DETS], ACC) + b_log_det, mask=at < samples)


@triton.jit(do_not_specialize=["position_blocks"])
def actnorm_backward_kernel(
    x, log_scale, bias, dy, dlog_det, dx, x_out, slots, position_blocks, K, P, tiles_per_program,
    stride_log_scale, stride_bias, stride_dlog_det,
    x_n, x_k, x_p, dy_n, dy_k, dy_p, dx_n, dx_k, dx_p, x_out_n, x_out_k, x_out_p,
    INVERSE: tl.constexpr, FROM_OUTPUT: tl.constexpr, ACC: tl.constexpr, CONTIGUOUS_DIMS: tl.constexpr,
    VEC_K: tl.constexpr, VEC_P: tl.constexpr, TILE_K: tl.constexpr, TILE_P: tl.constexpr,
    VECTORS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    # x, dy, dx, x_out: [N, K, P];  slots: [programs / k_blocks, 2, K], of dlog_scale and dbias
    # FROM_OUTPUT: x is the forward direction's y, and its input is written to x_out
    DIM_X: tl.constexpr = CONTIGUOUS_DIMS[0]
    DIM_DY: tl.constexpr = CONTIGUOUS_DIMS[1]
    DIM_DX: tl.constexpr = CONTIGUOUS_DIMS[2]
    DIM_X_OUT: tl.constexpr = CONTIGUOUS_DIMS[3]
    K, P = K * VEC_K, unvectorized_size(P, VEC_P, WIDE)
    k_blocks, p_blocks = tl.cdiv(K, TILE_K), tl.cdiv(P, TILE_P)
    slot, k_block = tl.program_id(0) // k_blocks, tl.program_id(0) % k_blocks
    k = k_block * TILE_K + tl.arange(0, TILE_K)
    b_s = tl.load(log_scale + k.to(tl.int64) * stride_log_scale, mask=k < K, other=0.0).to(ACC)[:, None]
    b_b = tl.load(bias + k.to(tl.int64) * stride_bias, mask=k < K, other=0.0).to(ACC)[:, None]
    b_dlog_scale = tl.zeros([TILE_K, TILE_P], ACC)
    b_dbias = tl.zeros([TILE_K, TILE_P], ACC)
    first = widened(slot, WIDE) * tiles_per_program
    for position_block in range(first, tl.minimum(first + tiles_per_program, position_blocks)):
        n = (position_block // p_blocks).to(tl.int64)
        k_x, p = block_indices(k_block, position_block % p_blocks, TILE_K, TILE_P, WIDE)
        mask = (k_x < K) & (p < P)
        b_x = tl.load(address(x, n, k_x, p, x_n, x_k, x_p, DIM_X, VEC_K, VEC_P), mask=mask, other=0.0).to(ACC)
        b_dy = tl.load(
            address(dy, n, k_x, p, dy_n, dy_k, dy_p, DIM_DY, VEC_K, VEC_P), mask=mask, other=0.0
        ).to(ACC)
        if VECTORS:
            b_dlog_det = tl.load(dlog_det + p.to(tl.int64) * stride_dlog_det, mask=p < P, other=0.0).to(ACC)
        else:
            b_dlog_det = tl.load(dlog_det + n * stride_dlog_det).to(ACC)
        if INVERSE:
            b_dx = b_dy * tl.exp(-b_s)
            b_dlog_scale -= tl.where(mask, b_dx * b_x + b_dlog_det, 0.0)
            b_dbias -= b_dy
        else:
            b_dx = b_dy * tl.exp(b_s)
            b_shifted = b_x * tl.exp(-b_s) if FROM_OUTPUT else b_x + b_b
            # the log-det has each channel's log scale once per position
            b_dlog_scale += tl.where(mask, b_dx * b_shifted + b_dlog_det, 0.0)
            b_dbias += tl.where(mask, b_dx, 0.0)
        tl.store(
            address(dx, n, k_x, p, dx_n, dx_k, dx_p, DIM_DX, VEC_K, VEC_P),
            b_dx.to(dx.dtype.element_ty),
            mask=mask,
        )
        if FROM_OUTPUT:
            at_x_out = address(x_out, n, k_x, p, x_out_n, x_out_k, x_out_p, DIM_X_OUT, VEC_K, VEC_P)
            tl.store(at_x_out, (b_shifted - b_b).to(x_out.dtype.element_ty), mask=mask)
    row = slots + slot.to(tl.int64) * (2 * K)
    tl.store(row + k, tl.sum(b_dlog_scale, 1), mask=k < K)
    tl.store(row + K + k, tl.sum(b_dbias, 1), mask=k < K)


@triton.jit(do_not_specialize=["position_blocks"])
def actnorm_statistics_kernel(
    x, slots, position_blocks, K, P, tiles_per_program, x_n, x_k, x_p, ACC: tl.constexpr,
    CONTIGUOUS_DIMS: tl.constexpr,
    VEC_K: tl.constexpr, VEC_P: tl.constexpr, TILE_K: tl.constexpr, TILE_P: tl.constexpr,
    VECTORS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    # x: [N, K, P];  slots: [programs / k_blocks, 3, K], of count, mean and sum of squared deviations
    DIM_X: tl.constexpr = CONTIGUOUS_DIMS[0]
    K, P = K * VEC_K, unvectorized_size(P, VEC_P, WIDE)
    k_blocks, p_blocks = tl.cdiv(K, TILE_K), tl.cdiv(P, TILE_P)
    slot, k_block = tl.program_id(0) // k_blocks, tl.program_id(0) % k_blocks
    k = k_block * TILE_K + tl.arange(0, TILE_K)
    count = tl.zeros([TILE_K], ACC)
    mean = tl.zeros([TILE_K], ACC)
    squares = tl.zeros([TILE_K], ACC)
    first = widened(slot, WIDE) * tiles_per_program
    for position_block in range(first, tl.minimum(first + tiles_per_program, position_blocks)):
        k_x, p = block_indices(k_block, position_block % p_blocks, TILE_K, TILE_P, WIDE)
        mask = (k_x < K) & (p < P)
        at_x = address(
            x, (position_block // p_blocks).to(tl.int64), k_x, p, x_n, x_k, x_p, DIM_X, VEC_K, VEC_P
        )
        b_x = tl.load(at_x, mask=mask, other=0.0).to(ACC)
        # mean and squares of a tile, then merged (Chan et al., 1983): E[x^2] - E[x]^2 would cancel
        tile_count = tl.sum(tl.where(p < P, 1.0, 0.0)).to(ACC)
        tile_mean = tl.sum(b_x, 1) / tile_count
        deviation = tl.where(mask, b_x - tile_mean[:, None], 0.0)
        delta = tile_mean - mean
        weight = tile_count / (count + tile_count)
        squares += tl.sum(deviation * deviation, 1) + delta * delta * count * weight
        mean += delta * weight
        count += tile_count
    row = slots + slot.to(tl.int64) * (3 * K)
    tl.store(row + k, count, mask=k < K)
    tl.store(row + K + k, mean, mask=k < K)
    tl.store(row + 2 * K + k, squares, mask=k < K)


@triton.jit(do_not_specialize=["count"])
def merge_statistics_kernel(
    slots, mean, var, count, K, ACC: tl.constexpr, TILE_S: tl.constexpr, TILE_K: tl.constexpr
):
    # slots: [count, 3, K] -> mean, var: [K]
    k = tl.program_id(0) * TILE_K + tl.arange(0, TILE_K)
    s = tl.arange(0, TILE_S)
    positions = tl.zeros([TILE_S, TILE_K], ACC)
    total = tl.zeros([TILE_S, TILE_K], ACC)
    for start in range(0, count, TILE_S):
        at = slots + (start + s).to(tl.int64)[:, None] * (3 * K) + k[None, :]
        mask = (start + s < count)[:, None] & (k < K)[None, :]
        b_positions = tl.load(at, mask=mask, other=0.0)
        positions += b_positions
        total += b_positions * tl.load(at + K, mask=mask, other=0.0)
    n = tl.maximum(tl.sum(positions, 0), 1.0)
    b_mean = tl.sum(total, 0) / n
    squares = tl.zeros([TILE_S, TILE_K], ACC)
    for start in range(0, count, TILE_S):
        at = slots + (start + s).to(tl.int64)[:, None] * (3 * K) + k[None, :]
        mask = (start + s < count)[:, None] & (k < K)[None, :]
        deviation = tl.load(at + K, mask=mask, other=0.0) - b_mean[None, :]
        squares += (
            tl.load(at + 2 * K, mask=mask, other=0.0)
            + tl.load(at, mask=mask, other=0.0) * deviation * deviation
        )
    tl.store(mean + k, b_mean, mask=k < K)
    tl.store(var + k, tl.sum(squares, 0) / n, mask=k < K)


def actnorm(x: Tensor, log_scale: Tensor, bias: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    acc, triton_acc = accumulator(x.dtype)
    y, out = allocate_output(x)
    x = with_position_stride(x)
    t = tiles(x.shape[1], x, out)
    log_det = x.new_empty(x.shape[0], dtype=acc)
    log_dets = t.constants["TILE_P"] if t.constants["VECTORS"] else 64 * t.warps
    launch(
        actnorm_kernel, t.samples * t.blocks, x, log_scale, bias, out, log_det, *t.sizes, t.blocks, x[0,
        0].numel(), x.shape[0],
        log_scale.stride(0), bias.stride(0), *t.strides, warps=t.warps, INVERSE=inverse, LOG_DETS=log_dets,
        ACC=triton_acc, **t.constants,
    )  # fmt: skip
    return finalize(y, out), log_det


def _backward(x, log_scale, bias, dy, dlog_det, inverse, from_output):
    acc, triton_acc = accumulator(x.dtype)
    dx, dx_out = allocate_output(dy)
    x_in, x_out = allocate_output(x) if from_output else (x, x)
    x, dy = with_position_stride(x), with_position_stride(dy)
    t = tiles(x.shape[1], x, dy, dx_out, x_out if from_output else x)
    count, tiles_per_program = t.reduction_grid()
    slots = x.new_empty((count, 2, x.shape[1]), dtype=acc)
    launch(
        actnorm_backward_kernel, count * t.k_blocks, x, log_scale, bias, dy, dlog_det, dx_out, x_out, slots,
        t.position_blocks, *t.sizes, tiles_per_program,
        log_scale.stride(0), bias.stride(0), dlog_det.stride(0), *t.strides,
        warps=t.warps, INVERSE=inverse, FROM_OUTPUT=from_output, ACC=triton_acc, **t.constants,
    )  # fmt: skip
    dlog_scale, dbias = log_scale.new_empty(log_scale.shape), bias.new_empty(bias.shape)
    sum_slots(slots, dlog_scale, dbias)
    return finalize(x_in, x_out), finalize(dx, dx_out), dlog_scale, dbias


def actnorm_backward(
    x: Tensor, log_scale: Tensor, bias: Tensor, dy: Tensor, dlog_det: Tensor, inverse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return _backward(x, log_scale, bias, dy, dlog_det, inverse, False)[1:]


def actnorm_inverse_backward(
    y: Tensor, log_scale: Tensor, bias: Tensor, dy: Tensor, dlog_det: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _backward(y, log_scale, bias, dy, dlog_det, False, True)


def actnorm_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    acc, triton_acc = accumulator(x.dtype)
    x = with_position_stride(x)
    t = tiles(x.shape[1], x)
    count, tiles_per_program = t.reduction_grid()
    slots = x.new_empty((count, 3, x.shape[1]), dtype=acc)
    launch(
        actnorm_statistics_kernel, count * t.k_blocks, x, slots, t.position_blocks, *t.sizes,
        tiles_per_program, *t.strides,
        warps=t.warps, ACC=triton_acc, **t.constants,
    )  # fmt: skip
    mean, var = (x.new_empty(x.shape[1], dtype=acc) for _ in range(2))
    launch(
        merge_statistics_kernel, triton.cdiv(x.shape[1], 32), slots, mean, var, count, x.shape[1],
        warps=4, ACC=triton_acc, TILE_S=32, TILE_K=32,
    )  # fmt: skip
    return mean, var
