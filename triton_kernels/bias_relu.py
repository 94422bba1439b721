"""Bias and ReLU in one pass, also in place, and both gradients in one pass.

Bound, bytes per element of x in float32: forward 8, backward 12 (y, dy, dx).
"""

import triton
import triton.language as tl
from torch import Tensor

from fastflow.triton_kernels.tiles import (
    accumulator,
    allocate_output,
    finalize,
    launch,
    offset,
    sum_slots,
    tile_indices,
    tiles,
    unvectorized_size,
    with_position_stride,
)


@triton.jit(do_not_specialize=["blocks"])
def bias_relu_kernel(
    x, bias, y, K, P, blocks, stride_bias, x_n, x_k, x_p, y_n, y_k, y_p,
    ACC: tl.constexpr, CONTIGUOUS_DIMS: tl.constexpr,
    VEC_K: tl.constexpr, VEC_P: tl.constexpr, TILE_K: tl.constexpr, TILE_P: tl.constexpr,
    VECTORS: tl.constexpr,
):  # fmt: skip
    # x, y: [N, K, P], y may be x;  bias: [K]
    DIM_X: tl.constexpr = CONTIGUOUS_DIMS[0]
    DIM_Y: tl.constexpr = CONTIGUOUS_DIMS[1]
    K, P = K * VEC_K, unvectorized_size(P, VEC_P)
    n = (tl.program_id(0) // blocks).to(tl.int64)
    k, p = tile_indices(tl.program_id(0) % blocks, K, TILE_K, TILE_P)
    mask = (k < K) & (p < P)
    b_x = tl.load(x + offset(n, k, p, x_n, x_k, x_p, DIM_X, VEC_K, VEC_P), mask=mask, other=0.0).to(ACC)
    b_y = b_x + tl.load(bias + k * stride_bias, mask=k < K, other=0.0).to(ACC)
    b_y = tl.where(b_y < 0, 0.0, b_y)  # keeps NaN
    tl.store(y + offset(n, k, p, y_n, y_k, y_p, DIM_Y, VEC_K, VEC_P), b_y.to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["position_blocks"])
def bias_relu_backward_kernel(
    y, dy, dx, slots, position_blocks, K, P, tiles_per_program,
    y_n, y_k, y_p, dy_n, dy_k, dy_p, dx_n, dx_k, dx_p,
    ACC: tl.constexpr, CONTIGUOUS_DIMS: tl.constexpr,
    VEC_K: tl.constexpr, VEC_P: tl.constexpr, TILE_K: tl.constexpr, TILE_P: tl.constexpr,
    VECTORS: tl.constexpr,
):  # fmt: skip
    # y, dy, dx: [N, K, P];  slots: [programs / k_blocks, 1, K], of dbias
    DIM_Y: tl.constexpr = CONTIGUOUS_DIMS[0]
    DIM_DY: tl.constexpr = CONTIGUOUS_DIMS[1]
    DIM_DX: tl.constexpr = CONTIGUOUS_DIMS[2]
    K, P = K * VEC_K, unvectorized_size(P, VEC_P)
    k_blocks, p_blocks = tl.cdiv(K, TILE_K), tl.cdiv(P, TILE_P)
    slot, k_block = tl.program_id(0) // k_blocks, tl.program_id(0) % k_blocks
    b_dbias = tl.zeros([TILE_K, TILE_P], ACC)
    first = slot.to(tl.int64) * tiles_per_program
    for position_block in range(first, tl.minimum(first + tiles_per_program, position_blocks)):
        n = position_block // p_blocks
        k_y, p = tile_indices((position_block % p_blocks) * k_blocks + k_block, K, TILE_K, TILE_P)
        mask = (k_y < K) & (p < P)
        b_y = tl.load(y + offset(n, k_y, p, y_n, y_k, y_p, DIM_Y, VEC_K, VEC_P), mask=mask, other=0.0)
        b_dy = tl.load(dy + offset(n, k_y, p, dy_n, dy_k, dy_p, DIM_DY, VEC_K, VEC_P), mask=mask, other=0.0)
        b_dx = tl.where(b_y.to(ACC) <= 0, 0.0, b_dy.to(ACC))
        b_dbias += b_dx
        tl.store(
            dx + offset(n, k_y, p, dx_n, dx_k, dx_p, DIM_DX, VEC_K, VEC_P),
            b_dx.to(dx.dtype.element_ty),
            mask=mask,
        )
    k = k_block * TILE_K + tl.arange(0, TILE_K)
    tl.store(slots + slot.to(tl.int64) * K + k, tl.sum(b_dbias, 1), mask=k < K)


def _forward(x: Tensor, bias: Tensor, out: Tensor) -> None:
    _, triton_acc = accumulator(x.dtype)
    t = tiles(x.shape[1], x, out)
    launch(
        bias_relu_kernel, t.samples * t.blocks, x, bias, out, *t.sizes, t.blocks, bias.stride(0), *t.strides,
        warps=t.warps, ACC=triton_acc, **t.constants,
    )  # fmt: skip


def bias_relu(x: Tensor, bias: Tensor) -> Tensor:
    y, out = allocate_output(x)
    _forward(with_position_stride(x), bias, out)
    return finalize(y, out)


def bias_relu_(x: Tensor, bias: Tensor) -> None:
    out = with_position_stride(x)
    _forward(out, bias, out)
    finalize(x, out)


def bias_relu_backward(y: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    acc, triton_acc = accumulator(y.dtype)
    dx, dx_out = allocate_output(dy)
    y, dy = with_position_stride(y), with_position_stride(dy)
    t = tiles(y.shape[1], y, dy, dx_out)
    count, tiles_per_program = t.reduction_grid()
    slots = y.new_empty((count, 1, y.shape[1]), dtype=acc)
    launch(
        bias_relu_backward_kernel, count * t.k_blocks, y, dy, dx_out, slots, t.position_blocks, *t.sizes,
        tiles_per_program, *t.strides, warps=t.warps, ACC=triton_acc, **t.constants,
    )  # fmt: skip
    dbias = y.new_empty(y.shape[1], dtype=acc)
    sum_slots(slots, dbias)
    return finalize(dx, dx_out), dbias
