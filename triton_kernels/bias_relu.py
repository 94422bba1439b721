"""Bias, scale and ReLU in one pass, also in place, and their gradients in one pass.

Bound, bytes per element of x in float32: forward 8, backward 12 (y, dy, dx).
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


@triton.jit(do_not_specialize=["blocks"])
def bias_relu_kernel(
    x, bias, log_scale, y, K, P, blocks, stride_bias, stride_log_scale, x_n, x_k, x_p, y_n, y_k, y_p,
    SCALED: tl.constexpr, RELU: tl.constexpr, ACC: tl.constexpr, CONTIGUOUS_DIMS: tl.constexpr,
    VEC_K: tl.constexpr, VEC_P: tl.constexpr, TILE_K: tl.constexpr, TILE_P: tl.constexpr,
    VECTORS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    # x, y: [N, K, P], y may be x;  bias, log_scale: [K]
    DIM_X: tl.constexpr = CONTIGUOUS_DIMS[0]
    DIM_Y: tl.constexpr = CONTIGUOUS_DIMS[1]
    K, P = K * VEC_K, unvectorized_size(P, VEC_P, WIDE)
    n = (tl.program_id(0) // blocks).to(tl.int64)
    k, p = tile_indices(tl.program_id(0) % blocks, K, TILE_K, TILE_P, WIDE)
    mask = (k < K) & (p < P)
    b_x = tl.load(address(x, n, k, p, x_n, x_k, x_p, DIM_X, VEC_K, VEC_P), mask=mask, other=0.0).to(ACC)
    b_y = b_x + tl.load(bias + k.to(tl.int64) * stride_bias, mask=k < K, other=0.0).to(ACC)
    if SCALED:
        b_y *= tl.exp(tl.load(log_scale + k.to(tl.int64) * stride_log_scale, mask=k < K, other=0.0).to(ACC))
    if RELU:
        b_y = tl.where(b_y < 0, 0.0, b_y)  # keeps NaN
    tl.store(address(y, n, k, p, y_n, y_k, y_p, DIM_Y, VEC_K, VEC_P), b_y.to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["position_blocks"])
def bias_relu_backward_kernel(
    y, dy, log_scale, dx, slots, position_blocks, K, P, tiles_per_program, stride_log_scale,
    y_n, y_k, y_p, dy_n, dy_k, dy_p, dx_n, dx_k, dx_p,
    SCALED: tl.constexpr, RELU: tl.constexpr, ACC: tl.constexpr, CONTIGUOUS_DIMS: tl.constexpr,
    VEC_K: tl.constexpr, VEC_P: tl.constexpr, TILE_K: tl.constexpr, TILE_P: tl.constexpr,
    VECTORS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    # y, dy, dx: [N, K, P];  slots: [programs / k_blocks, 1 or 2, K], of dbias and, if SCALED, dlog_scale
    DIM_Y: tl.constexpr = CONTIGUOUS_DIMS[0]
    DIM_DY: tl.constexpr = CONTIGUOUS_DIMS[1]
    DIM_DX: tl.constexpr = CONTIGUOUS_DIMS[2]
    K, P = K * VEC_K, unvectorized_size(P, VEC_P, WIDE)
    k_blocks, p_blocks = tl.cdiv(K, TILE_K), tl.cdiv(P, TILE_P)
    slot, k_block = tl.program_id(0) // k_blocks, tl.program_id(0) % k_blocks
    k = k_block * TILE_K + tl.arange(0, TILE_K)
    b_dbias = tl.zeros([TILE_K, TILE_P], ACC)
    b_dlog_scale = tl.zeros([TILE_K, TILE_P], ACC)
    if SCALED:
        b_scale = tl.exp(
            tl.load(log_scale + k.to(tl.int64) * stride_log_scale, mask=k < K, other=0.0).to(ACC)
        )[:, None]
    first = widened(slot, WIDE) * tiles_per_program
    for position_block in range(first, tl.minimum(first + tiles_per_program, position_blocks)):
        n = (position_block // p_blocks).to(tl.int64)
        k_y, p = block_indices(k_block, position_block % p_blocks, TILE_K, TILE_P, WIDE)
        mask = (k_y < K) & (p < P)
        b_y = tl.load(address(y, n, k_y, p, y_n, y_k, y_p, DIM_Y, VEC_K, VEC_P), mask=mask, other=0.0)
        b_dy = tl.load(address(dy, n, k_y, p, dy_n, dy_k, dy_p, DIM_DY, VEC_K, VEC_P), mask=mask, other=0.0)
        b_dx = b_dy.to(ACC)
        if RELU:
            b_dx = tl.where(b_y.to(ACC) <= 0, 0.0, b_dx)
        if SCALED:
            b_dlog_scale += b_dx * b_y.to(ACC)
            b_dx *= b_scale
        b_dbias += b_dx
        tl.store(
            address(dx, n, k_y, p, dx_n, dx_k, dx_p, DIM_DX, VEC_K, VEC_P),
            b_dx.to(dx.dtype.element_ty),
            mask=mask,
        )
    row = slots + slot.to(tl.int64) * ((2 if SCALED else 1) * K)
    tl.store(row + k, tl.sum(b_dbias, 1), mask=k < K)
    if SCALED:
        tl.store(row + K + k, tl.sum(b_dlog_scale, 1), mask=k < K)


def _forward(x: Tensor, bias: Tensor, log_scale: Tensor | None, relu: bool, out: Tensor) -> None:
    _, triton_acc = accumulator(x.dtype)
    t = tiles(x.shape[1], x, out)
    launch(
        bias_relu_kernel, t.samples * t.blocks, x, bias, log_scale, out, *t.sizes, t.blocks, bias.stride(0),
        0 if log_scale is None else log_scale.stride(0), *t.strides,
        warps=t.warps, SCALED=log_scale is not None, RELU=relu, ACC=triton_acc, **t.constants,
    )  # fmt: skip


def bias_relu(x: Tensor, bias: Tensor, log_scale: Tensor | None, relu: bool) -> Tensor:
    y, out = allocate_output(x)
    _forward(with_position_stride(x), bias, log_scale, relu, out)
    return finalize(y, out)


def bias_relu_(x: Tensor, bias: Tensor, log_scale: Tensor | None, relu: bool) -> None:
    out = with_position_stride(x)
    _forward(out, bias, log_scale, relu, out)
    finalize(x, out)


def bias_relu_backward(
    y: Tensor, dy: Tensor, log_scale: Tensor | None, relu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    acc, triton_acc = accumulator(y.dtype)
    dx, dx_out = allocate_output(dy)
    y, dy = with_position_stride(y), with_position_stride(dy)
    t = tiles(y.shape[1], y, dy, dx_out)
    count, tiles_per_program = t.reduction_grid()
    scaled, c = log_scale is not None, y.shape[1]
    slots = y.new_empty((count, 1 + scaled, c), dtype=acc)
    launch(
        bias_relu_backward_kernel, count * t.k_blocks, y, dy, log_scale, dx_out, slots, t.position_blocks,
        *t.sizes, tiles_per_program, log_scale.stride(0) if scaled else 0, *t.strides,
        warps=t.warps, SCALED=scaled, RELU=relu, ACC=triton_acc, **t.constants,
    )  # fmt: skip
    dbias, dlog_scale = (y.new_empty(size, dtype=acc) for size in (c, c * scaled))
    sum_slots(slots, *((dbias, dlog_scale) if scaled else (dbias,)))
    return finalize(dx, dx_out), dbias, dlog_scale
