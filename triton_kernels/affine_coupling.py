"""Affine coupling in one pass over memory: both directions, the gradient of each, and inverse with gradient.

Bound, bytes per element of x in float32:

    forward, inverse      halves 12 (x 4, h 4, y 4), additive 10 (h 2), checkerboard 16 (h 8)
    backward              halves 18 (transformed half of x 2, dy 4, h 4, dx 4, dh 4), checkerboard 28,
                          additive 10 and 12 (no x, no h)
    inverse + backward    halves 24 (y 4, dy 4, h 4, x 4, dx 4, dh 4), additive 20,
                          checkerboard 32, additive 24

Compiled for sm_90, the forward has about 70 instructions per transformed element of soft-clamped halves,
which moves 24 bytes.
"""

import math

import torch
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
    sum_parts,
    sum_slots,
    tile_indices,
    tiles,
    unvectorized_size,
    widened,
    with_position_stride,
)


@triton.jit
def tanh(x):
    """tanh with one division; a Padé approximant near 0, because 1 - e^-2x cancels there."""
    # libdevice has a tanh, but Triton's interpreter cannot call it
    a = tl.abs(x)
    x2 = x * x
    e = tl.exp(-2 * a)
    near = a < 0.5
    upper = tl.where(near, x * (135135 + x2 * (17325 + x2 * (378 + x2))), tl.where(x < 0, e - 1, 1 - e))
    lower = tl.where(near, 135135 + x2 * (62370 + x2 * (3150 + x2 * 28)), 1 + e)
    return upper / lower


@triton.jit
def log_sigmoid(x):
    """-log(1 + e^-x), with log(1 + e) corrected for the rounding of 1 + e."""
    e = tl.exp(-tl.abs(x))
    u = 1 + e
    correction = tl.where(u == 1, 1, u - 1)
    return tl.minimum(x, 0) - tl.where(u == 1, e, tl.log(u) * (e / correction))


@triton.jit
def log_scale_of(raw, f, SCALE: tl.constexpr):
    if SCALE == "exp":
        return raw
    elif SCALE == "sigmoid":
        return log_sigmoid(raw + 2)
    elif SCALE == "soft_clamp":
        return f * tanh(raw / f)
    else:
        return f * tanh(raw)


@triton.jit
def log_scale_vjp(g, raw, f, SCALE: tl.constexpr):
    """Gradients of (raw, f) for an upstream g; the second is g, unused, if there is no factor."""
    if SCALE == "exp":
        return g, g
    elif SCALE == "sigmoid":
        e = tl.exp(-tl.abs(raw + 2))
        return g * (tl.where(raw + 2 > 0, e, 1) / (1 + e)), g
    elif SCALE == "soft_clamp":
        a = raw / f
        th = tanh(a)
        slope = 1 - th * th
        return g * slope, g * (th - a * slope)
    else:
        th = tanh(raw)
        return g * f * (1 - th * th), g * th


@triton.jit
def transformed(k, p, W, H, PARITY: tl.constexpr, FLIP: tl.constexpr):
    """Mask of a checkerboard: even sums of spatial indices (vectors: even channels), odd ones with FLIP."""
    if PARITY == "channel":
        parity = k + 0 * p
    elif PARITY == "single":  # one position: p counts samples
        parity = 0 * k + 0 * p
    elif PARITY == "line":
        parity = p + 0 * k
    elif PARITY == "image":
        parity = p // W + p % W + 0 * k
    else:
        rows = p // W
        parity = rows // H + rows % H + p % W + 0 * k
    return (parity % 2 == 1) if FLIP else (parity % 2 == 0)


@triton.jit
def h_channels(k, K, SCALE: tl.constexpr, H_ORDER: tl.constexpr):
    """Channels of the network's raw output that hold (shift, raw scale) of transformed channel k."""
    if SCALE == "none":
        return k, k
    elif H_ORDER == "shift_scale":
        return k, k + K
    elif H_ORDER == "scale_shift":
        return k + K, k
    else:
        return 2 * k, 2 * k + 1


@triton.jit
def load_h(
    h, factor, k, p, n, K, mask, active, stride_factor, h_n, h_k, h_p,
    SCALE: tl.constexpr, H_ORDER: tl.constexpr, MASK: tl.constexpr, ACC: tl.constexpr,
    CONTIGUOUS_DIM: tl.constexpr, VEC_K: tl.constexpr, VEC_P: tl.constexpr,
):  # fmt: skip
    """(shift, raw scale, factor) of a tile; masked values are 0, because tanh or exp of them may overflow."""
    k_t, k_raw = h_channels(k, K, SCALE, H_ORDER)
    b_t = tl.load(
        address(h, n, k_t, p, h_n, h_k, h_p, CONTIGUOUS_DIM, VEC_K, VEC_P), mask=mask, other=0.0
    ).to(ACC)
    b_raw = b_t
    if SCALE != "none":
        b_raw = tl.load(
            address(h, n, k_raw, p, h_n, h_k, h_p, CONTIGUOUS_DIM, VEC_K, VEC_P), mask=mask, other=0.0
        ).to(ACC)
    if MASK == "checkerboard":
        b_t = tl.where(active, b_t, 0.0)
        b_raw = tl.where(active, b_raw, 0.0)
    b_f = tl.full([1, 1], 1.0, ACC)
    if SCALE == "soft_clamp" or SCALE == "tanh":
        b_f = tl.load(factor + k.to(tl.int64) * stride_factor, mask=k < K, other=1.0).to(ACC)
    return b_t, b_raw, b_f


@triton.jit(do_not_specialize=["split", "W", "H"])
def affine_coupling_kernel(
    x, h, factor, y, log_det, K, P, W, H, split, tiles_per_program, stride_factor,
    x_n, x_k, x_p, h_n, h_k, h_p, y_n, y_k, y_p,
    MASK: tl.constexpr, FLIP: tl.constexpr, SCALE: tl.constexpr, ORDER: tl.constexpr, H_ORDER: tl.constexpr,
    INVERSE: tl.constexpr,
    PARITY: tl.constexpr, ACC: tl.constexpr, CONTIGUOUS_DIMS: tl.constexpr,
    VEC_K: tl.constexpr, VEC_P: tl.constexpr, TILE_K: tl.constexpr, TILE_P: tl.constexpr,
    VECTORS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    # x, y: [N, 2K, P] (checkerboard [N, K, P]);  h: [N, 2K, P] (additive [N, K, P])
    # factor: [K];  log_det: [N, split]
    DIM_X: tl.constexpr = CONTIGUOUS_DIMS[0]
    DIM_H: tl.constexpr = CONTIGUOUS_DIMS[1]
    DIM_Y: tl.constexpr = CONTIGUOUS_DIMS[2]
    K, P = K * VEC_K, unvectorized_size(P, VEC_P, WIDE)
    part = tl.program_id(0) % split
    n = (tl.program_id(0) // split).to(tl.int64)
    total = tl.zeros([TILE_K, TILE_P], ACC)
    for i in range(tiles_per_program):
        k, p = tile_indices(part * tiles_per_program + i, K, TILE_K, TILE_P, WIDE)
        mask = (k < K) & (p < P)
        k_v = k + K if MASK == "halves" and not FLIP else k  # the transformed half
        k_pass = k + K if FLIP else k  # the other half
        active = transformed(k, p, W, H, PARITY, FLIP) if MASK == "checkerboard" else mask
        b_x = tl.load(address(x, n, k_v, p, x_n, x_k, x_p, DIM_X, VEC_K, VEC_P), mask=mask, other=0.0)
        if MASK == "halves":
            b_pass = tl.load(
                address(x, n, k_pass, p, x_n, x_k, x_p, DIM_X, VEC_K, VEC_P), mask=mask, other=0.0
            )
        b_t, b_raw, b_f = load_h(
            h,
            factor,
            k,
            p,
            n,
            K,
            mask,
            active,
            stride_factor,
            h_n,
            h_k,
            h_p,
            SCALE,
            H_ORDER,
            MASK,
            ACC,
            DIM_H,
            VEC_K,
            VEC_P,
        )
        b_v = b_x.to(ACC)
        if SCALE == "none":
            b_y = b_v - b_t if INVERSE else b_v + b_t
        else:
            b_log_s = tl.where(mask & active, log_scale_of(b_raw, b_f, SCALE), 0.0)
            if INVERSE:
                b_log_s = -b_log_s
                b_s = tl.exp(b_log_s)
                b_y = (b_v - b_t) * b_s if ORDER == "scale_first" else b_v * b_s - b_t
            else:
                b_s = tl.exp(b_log_s)
                b_y = b_v * b_s + b_t if ORDER == "scale_first" else (b_v + b_t) * b_s
            total += b_log_s
        tl.store(
            address(y, n, k_v, p, y_n, y_k, y_p, DIM_Y, VEC_K, VEC_P), b_y.to(y.dtype.element_ty), mask=mask
        )
        if MASK == "halves":
            tl.store(address(y, n, k_pass, p, y_n, y_k, y_p, DIM_Y, VEC_K, VEC_P), b_pass, mask=mask)
    if VECTORS:
        p = widened(part, WIDE) * TILE_P + tl.arange(0, TILE_P)
        tl.store(log_det + p, tl.sum(total, 0), mask=p < P)
    else:
        tl.store(log_det + tl.program_id(0), tl.sum(total))


@triton.jit(do_not_specialize=["position_blocks", "W", "H"])
def affine_coupling_backward_kernel(
    x, h, factor, dy, dlog_det, dx, dh, x_out, dfactor, position_blocks, K, P, W, H, tiles_per_program,
    stride_factor, stride_dlog_det,
    x_n, x_k, x_p, h_n, h_k, h_p, dy_n, dy_k, dy_p, dx_n, dx_k, dx_p, dh_n, dh_k, dh_p, x_out_n, x_out_k,
    x_out_p,
    MASK: tl.constexpr, FLIP: tl.constexpr, SCALE: tl.constexpr, ORDER: tl.constexpr, H_ORDER: tl.constexpr,
    INVERSE: tl.constexpr,
    FROM_OUTPUT: tl.constexpr, PARITY: tl.constexpr, ACC: tl.constexpr, CONTIGUOUS_DIMS: tl.constexpr,
    VEC_K: tl.constexpr, VEC_P: tl.constexpr, TILE_K: tl.constexpr, TILE_P: tl.constexpr,
    VECTORS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    # x, dy, x_out, dx: [N, 2K, P] (checkerboard [N, K, P]);  h, dh: [N, 2K, P] (additive [N, K, P])
    # dfactor: [programs / k_blocks, K]
    # FROM_OUTPUT: x is the forward direction's y, and its input is written to x_out
    DIM_X: tl.constexpr = CONTIGUOUS_DIMS[0]
    DIM_H: tl.constexpr = CONTIGUOUS_DIMS[1]
    DIM_DY: tl.constexpr = CONTIGUOUS_DIMS[2]
    DIM_DX: tl.constexpr = CONTIGUOUS_DIMS[3]
    DIM_DH: tl.constexpr = CONTIGUOUS_DIMS[4]
    DIM_X_OUT: tl.constexpr = CONTIGUOUS_DIMS[5]
    K, P = K * VEC_K, unvectorized_size(P, VEC_P, WIDE)
    k_blocks, p_blocks = tl.cdiv(K, TILE_K), tl.cdiv(P, TILE_P)
    slot, k_block = tl.program_id(0) // k_blocks, tl.program_id(0) % k_blocks
    b_dfactor = tl.zeros([TILE_K, TILE_P], ACC)
    first = widened(slot, WIDE) * tiles_per_program
    for position_block in range(first, tl.minimum(first + tiles_per_program, position_blocks)):
        n = (position_block // p_blocks).to(tl.int64)
        k, p = block_indices(k_block, position_block % p_blocks, TILE_K, TILE_P, WIDE)
        mask = (k < K) & (p < P)
        k_v = k + K if MASK == "halves" and not FLIP else k
        k_pass = k + K if FLIP else k
        active = transformed(k, p, W, H, PARITY, FLIP) if MASK == "checkerboard" else mask
        if SCALE != "none" or FROM_OUTPUT:  # the gradient of an additive coupling needs neither x nor h
            b_x = tl.load(address(x, n, k_v, p, x_n, x_k, x_p, DIM_X, VEC_K, VEC_P), mask=mask, other=0.0)
            b_v = b_x.to(ACC)
        b_dy = tl.load(address(dy, n, k_v, p, dy_n, dy_k, dy_p, DIM_DY, VEC_K, VEC_P), mask=mask, other=0.0)
        if MASK == "halves":
            b_dy_pass = tl.load(
                address(dy, n, k_pass, p, dy_n, dy_k, dy_p, DIM_DY, VEC_K, VEC_P), mask=mask, other=0.0
            )
            if FROM_OUTPUT:
                b_x_pass = tl.load(
                    address(x, n, k_pass, p, x_n, x_k, x_p, DIM_X, VEC_K, VEC_P), mask=mask, other=0.0
                )
        if SCALE != "none" or FROM_OUTPUT:
            b_t, b_raw, b_f = load_h(
                h,
                factor,
                k,
                p,
                n,
                K,
                mask,
                active,
                stride_factor,
                h_n,
                h_k,
                h_p,
                SCALE,
                H_ORDER,
                MASK,
                ACC,
                DIM_H,
                VEC_K,
                VEC_P,
            )
        b_g = b_dy.to(ACC)
        k_t, k_raw = h_channels(k, K, SCALE, H_ORDER)
        if SCALE == "none":
            if FROM_OUTPUT:
                b_v = b_v - b_t
            b_dv = b_g
            b_dt = -b_g if INVERSE else b_g
        else:
            if VECTORS:
                b_dl = tl.load(dlog_det + p.to(tl.int64) * stride_dlog_det, mask=p < P, other=0.0).to(ACC)
            else:
                b_dl = tl.load(dlog_det + n * stride_dlog_det).to(ACC)
            b_log_s = log_scale_of(b_raw, b_f, SCALE)
            if MASK == "checkerboard":
                b_log_s = tl.where(active, b_log_s, 0.0)
            if FROM_OUTPUT:
                b_r = tl.exp(-b_log_s)
                b_v = (b_v - b_t) * b_r if ORDER == "scale_first" else b_v * b_r - b_t
            if INVERSE:
                b_dv = b_g * tl.exp(-b_log_s)
                if ORDER == "scale_first":
                    b_dt, b_dlog_s = -b_dv, -b_dv * (b_v - b_t) - b_dl
                else:
                    b_dt, b_dlog_s = -b_g, -b_dv * b_v - b_dl
            else:
                b_dv = b_g * tl.exp(b_log_s)
                if ORDER == "scale_first":
                    b_dt, b_dlog_s = b_g, b_dv * b_v + b_dl
                else:
                    b_dt, b_dlog_s = b_dv, b_dv * (b_v + b_t) + b_dl
            b_dlog_s = tl.where(mask & active, b_dlog_s, 0.0)
            b_draw, b_df = log_scale_vjp(b_dlog_s, b_raw, b_f, SCALE)
            b_dfactor += b_df
            tl.store(
                address(dh, n, k_raw, p, dh_n, dh_k, dh_p, DIM_DH, VEC_K, VEC_P),
                b_draw.to(dh.dtype.element_ty),
                mask=mask,
            )
        if MASK == "checkerboard":
            b_dt = tl.where(active, b_dt, 0.0)
        tl.store(
            address(dh, n, k_t, p, dh_n, dh_k, dh_p, DIM_DH, VEC_K, VEC_P),
            b_dt.to(dh.dtype.element_ty),
            mask=mask,
        )
        tl.store(
            address(dx, n, k_v, p, dx_n, dx_k, dx_p, DIM_DX, VEC_K, VEC_P),
            b_dv.to(dx.dtype.element_ty),
            mask=mask,
        )
        if FROM_OUTPUT:
            at_x_out = address(x_out, n, k_v, p, x_out_n, x_out_k, x_out_p, DIM_X_OUT, VEC_K, VEC_P)
            tl.store(at_x_out, b_v.to(x_out.dtype.element_ty), mask=mask)
        if MASK == "halves":
            tl.store(address(dx, n, k_pass, p, dx_n, dx_k, dx_p, DIM_DX, VEC_K, VEC_P), b_dy_pass, mask=mask)
            if FROM_OUTPUT:
                at_pass = address(x_out, n, k_pass, p, x_out_n, x_out_k, x_out_p, DIM_X_OUT, VEC_K, VEC_P)
                tl.store(at_pass, b_x_pass, mask=mask)
    if SCALE == "soft_clamp" or SCALE == "tanh":
        k = k_block * TILE_K + tl.arange(0, TILE_K)
        tl.store(dfactor + slot.to(tl.int64) * K + k, tl.sum(b_dfactor, 1), mask=k < K)


def _variant(
    x: Tensor, mask: str, swap_halves: bool, scale: str, affine_order: str, params_layout: str
) -> tuple[int, tuple[int, int], dict]:
    """(transformed channels, (W, H), constants) of a coupling."""
    if mask == "checkerboard" and x.ndim > 5:
        raise ValueError(
            f"x: got shape {list(x.shape)}, expected at most three spatial dimensions; "
            "fastflow.backend('reference') supports more"
        )
    k = x.shape[1] if mask == "checkerboard" else x.shape[1] // 2
    width, height = (*x.shape[:1:-1], 1, 1)[:2]
    parity = {2: "channel", 3: "line", 4: "image"}.get(x.ndim, "volume")
    if x.ndim > 2 and math.prod(x.shape[2:]) == 1:
        parity = "single"
    constants = {
        "MASK": mask,
        "FLIP": swap_halves,
        "SCALE": scale,
        "ORDER": affine_order,
        "H_ORDER": params_layout,
        "PARITY": parity,
    }
    return k, (width, height), constants


def _factor(factor: Tensor | None, x: Tensor) -> tuple[Tensor, int]:
    """Pointer and stride of the factor; without a factor the kernel does not read the pointer."""
    return (x, 0) if factor is None else (factor, factor.stride(0))


def affine_coupling(
    x: Tensor,
    h: Tensor,
    factor: Tensor | None,
    mask: str,
    swap_halves: bool,
    scale: str,
    affine_order: str,
    params_layout: str,
    inverse: bool,
) -> tuple[Tensor, Tensor]:
    k, size, variant = _variant(x, mask, swap_halves, scale, affine_order, params_layout)
    acc, triton_acc = accumulator(x.dtype)
    y, out = allocate_output(x)
    x, h = with_position_stride(x), with_position_stride(h)
    t = tiles(k, x, h, out)
    factor, stride_factor = _factor(factor, x)
    log_det = x.new_empty((x.shape[0] * (1 if t.constants["VECTORS"] else t.split),), dtype=acc)
    launch(
        affine_coupling_kernel, t.samples * t.split, x, h, factor, out, log_det, *t.sizes, *size, t.split,
        t.tiles_per_program, stride_factor,
        *t.strides, warps=t.warps, INVERSE=inverse, ACC=triton_acc, **variant, **t.constants,
    )  # fmt: skip
    return finalize(y, out), sum_parts(log_det, x.shape[0])


def _backward(
    x, h, factor, dy, dlog_det, mask, swap_halves, scale, affine_order, params_layout, inverse, from_output
):
    k, size, variant = _variant(x, mask, swap_halves, scale, affine_order, params_layout)
    acc, triton_acc = accumulator(x.dtype)
    dx, dx_out = allocate_output(dy)
    dh, dh_out = allocate_output(h)
    x_in, x_out = allocate_output(x) if from_output else (x, x)
    x, h, dy = with_position_stride(x), with_position_stride(h), with_position_stride(dy)
    t = tiles(k, x, h, dy, dx_out, dh_out, x_out if from_output else x)
    slots, tiles_per_program = t.reduction_grid() if factor is not None else (t.position_blocks, 1)
    dfactor = x.new_empty(0, dtype=acc) if factor is None else torch.empty_like(factor)
    partial = dfactor if factor is None else x.new_empty((slots, 1, k), dtype=acc)
    read_factor, stride_factor = _factor(factor, x)
    launch(
        affine_coupling_backward_kernel, slots * t.k_blocks,
        x, h, read_factor, dy, dlog_det, dx_out, dh_out, x_out, partial,
        t.position_blocks, *t.sizes, *size, tiles_per_program, stride_factor, dlog_det.stride(0), *t.strides,
        warps=t.warps, INVERSE=inverse, FROM_OUTPUT=from_output, ACC=triton_acc, **variant, **t.constants,
    )  # fmt: skip
    if factor is not None:
        sum_slots(partial, dfactor)
    return finalize(x_in, x_out), finalize(dx, dx_out), finalize(dh, dh_out), dfactor


def affine_coupling_backward(
    x: Tensor, h: Tensor, factor: Tensor | None, dy: Tensor, dlog_det: Tensor,
    mask: str, swap_halves: bool, scale: str, affine_order: str, params_layout: str, inverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _backward(
        x, h, factor, dy, dlog_det, mask, swap_halves, scale, affine_order, params_layout, inverse, False
    )[1:]


def affine_coupling_inverse_backward(
    y: Tensor, h: Tensor, factor: Tensor | None, dy: Tensor, dlog_det: Tensor,
    mask: str, swap_halves: bool, scale: str, affine_order: str, params_layout: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return _backward(
        y, h, factor, dy, dlog_det, mask, swap_halves, scale, affine_order, params_layout, False, True
    )
