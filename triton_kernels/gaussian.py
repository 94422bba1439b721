"""Log-density of a diagonal Gaussian, summed over each sample, with gradients; and sampling in one launch.

Bound, bytes per element of z in float32: log-density 4, with a mean and a log scale per element 12; backward
8 (z, dz) and 24; sampling 4 and 12. Reads of a mean or log scale per channel are negligible.
"""

import ctypes
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastflow.triton_kernels.noise import BLOCKS, normal
from fastflow.triton_kernels.tiles import (
    accumulator,
    address,
    allocate_output,
    block_indices,
    finalize,
    launch,
    strides,
    sum_parts,
    sum_slots,
    tile_indices,
    tiles,
    unvectorized_size,
    widened,
    with_position_stride,
)


@triton.jit
def load_parameter(
    v, n, k, p, K, mask, v_n, v_k, v_p,
    KIND: tl.constexpr, ACC: tl.constexpr, CONTIGUOUS_DIM: tl.constexpr, VEC_K: tl.constexpr,
    VEC_P: tl.constexpr,
):  # fmt: skip
    """Mean or log scale of a tile: per element, per channel (with stride v_k), or 0."""
    if KIND == "full":
        return tl.load(
            address(v, n, k, p, v_n, v_k, v_p, CONTIGUOUS_DIM, VEC_K, VEC_P), mask=mask, other=0.0
        ).to(ACC)
    elif KIND == "channel":
        return tl.load(v + k.to(tl.int64) * v_k, mask=k < K, other=0.0).to(ACC)
    else:
        return tl.zeros([1, 1], ACC)


@triton.jit(do_not_specialize=["split"])
def gaussian_log_prob_kernel(
    z, mean, log_scale, log_prob, K, P, split, tiles_per_program, stride_mean, stride_log_scale,
    z_n, z_k, z_p, mean_n, mean_k, mean_p, log_scale_n, log_scale_k, log_scale_p,
    MEAN: tl.constexpr, LOG_SCALE: tl.constexpr, ACC: tl.constexpr, CONTIGUOUS_DIMS: tl.constexpr,
    VEC_K: tl.constexpr, VEC_P: tl.constexpr, TILE_K: tl.constexpr, TILE_P: tl.constexpr,
    VECTORS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    # z: [N, K, P];  mean, log_scale: [N, K, P], [K] or none;  log_prob: [N, split]
    DIM_Z: tl.constexpr = CONTIGUOUS_DIMS[0]
    DIM_MEAN: tl.constexpr = CONTIGUOUS_DIMS[1]
    DIM_LOG_SCALE: tl.constexpr = CONTIGUOUS_DIMS[2]
    K, P = K * VEC_K, unvectorized_size(P, VEC_P, WIDE)
    part = tl.program_id(0) % split
    n = (tl.program_id(0) // split).to(tl.int64)
    if MEAN == "channel":
        mean_k = stride_mean
    if LOG_SCALE == "channel":
        log_scale_k = stride_log_scale
    total = tl.zeros([TILE_K, TILE_P], ACC)
    for i in range(tiles_per_program):
        k, p = tile_indices(part * tiles_per_program + i, K, TILE_K, TILE_P, WIDE)
        mask = (k < K) & (p < P)
        b_z = tl.load(address(z, n, k, p, z_n, z_k, z_p, DIM_Z, VEC_K, VEC_P), mask=mask, other=0.0).to(ACC)
        b_m = load_parameter(
            mean, n, k, p, K, mask, mean_n, mean_k, mean_p, MEAN, ACC, DIM_MEAN, VEC_K, VEC_P
        )
        b_s = load_parameter(
            log_scale,
            n,
            k,
            p,
            K,
            mask,
            log_scale_n,
            log_scale_k,
            log_scale_p,
            LOG_SCALE,
            ACC,
            DIM_LOG_SCALE,
            VEC_K,
            VEC_P,
        )
        b_e = b_z - b_m
        if LOG_SCALE != "none":
            b_e = b_e * tl.exp(-b_s)
        total += tl.where(mask, -0.5 * (b_e * b_e + 1.8378770664093453) - b_s, 0.0)  # log 2 pi
    if VECTORS:
        p = widened(part, WIDE) * TILE_P + tl.arange(0, TILE_P)
        tl.store(log_prob + p, tl.sum(total, 0), mask=p < P)
    else:
        tl.store(log_prob + tl.program_id(0), tl.sum(total))


@triton.jit(do_not_specialize=["position_blocks"])
def gaussian_log_prob_backward_kernel(
    z, mean, log_scale, dlog_prob, dz, dmean, dlog_scale, slots, position_blocks, K, P, tiles_per_program,
    stride_mean, stride_log_scale, stride_dlog_prob,
    z_n, z_k, z_p, mean_n, mean_k, mean_p, log_scale_n, log_scale_k, log_scale_p,
    dz_n, dz_k, dz_p, dmean_n, dmean_k, dmean_p, dlog_scale_n, dlog_scale_k, dlog_scale_p,
    MEAN: tl.constexpr, LOG_SCALE: tl.constexpr, ACC: tl.constexpr, CONTIGUOUS_DIMS: tl.constexpr,
    VEC_K: tl.constexpr, VEC_P: tl.constexpr, TILE_K: tl.constexpr, TILE_P: tl.constexpr,
    VECTORS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    # z, dz: [N, K, P];  mean, log_scale and their gradients: [N, K, P], [K] or none
    # slots: [programs / k_blocks, number of parameters of shape [K], K]
    DIM_Z: tl.constexpr = CONTIGUOUS_DIMS[0]
    DIM_MEAN: tl.constexpr = CONTIGUOUS_DIMS[1]
    DIM_LOG_SCALE: tl.constexpr = CONTIGUOUS_DIMS[2]
    DIM_DZ: tl.constexpr = CONTIGUOUS_DIMS[3]
    DIM_DMEAN: tl.constexpr = CONTIGUOUS_DIMS[4]
    DIM_DLOG_SCALE: tl.constexpr = CONTIGUOUS_DIMS[5]
    K, P = K * VEC_K, unvectorized_size(P, VEC_P, WIDE)
    k_blocks, p_blocks = tl.cdiv(K, TILE_K), tl.cdiv(P, TILE_P)
    slot, k_block = tl.program_id(0) // k_blocks, tl.program_id(0) % k_blocks
    if MEAN == "channel":
        mean_k = stride_mean
    if LOG_SCALE == "channel":
        log_scale_k = stride_log_scale
    b_dmean = tl.zeros([TILE_K, TILE_P], ACC)
    b_dlog_scale = tl.zeros([TILE_K, TILE_P], ACC)
    first = widened(slot, WIDE) * tiles_per_program
    for position_block in range(first, tl.minimum(first + tiles_per_program, position_blocks)):
        n = (position_block // p_blocks).to(tl.int64)
        k, p = block_indices(k_block, position_block % p_blocks, TILE_K, TILE_P, WIDE)
        mask = (k < K) & (p < P)
        b_z = tl.load(address(z, n, k, p, z_n, z_k, z_p, DIM_Z, VEC_K, VEC_P), mask=mask, other=0.0).to(ACC)
        b_m = load_parameter(
            mean, n, k, p, K, mask, mean_n, mean_k, mean_p, MEAN, ACC, DIM_MEAN, VEC_K, VEC_P
        )
        b_s = load_parameter(
            log_scale,
            n,
            k,
            p,
            K,
            mask,
            log_scale_n,
            log_scale_k,
            log_scale_p,
            LOG_SCALE,
            ACC,
            DIM_LOG_SCALE,
            VEC_K,
            VEC_P,
        )
        if VECTORS:
            b_g = tl.load(dlog_prob + p.to(tl.int64) * stride_dlog_prob, mask=p < P, other=0.0).to(ACC)
        else:
            b_g = tl.load(dlog_prob + n * stride_dlog_prob).to(ACC)
        b_e = b_z - b_m
        b_ge = b_g * b_e
        if LOG_SCALE != "none":
            b_r = tl.exp(-b_s)
            b_ge = b_ge * b_r * b_r
        tl.store(
            address(dz, n, k, p, dz_n, dz_k, dz_p, DIM_DZ, VEC_K, VEC_P),
            (-b_ge).to(dz.dtype.element_ty),
            mask=mask,
        )
        if MEAN == "full":
            at_dmean = address(dmean, n, k, p, dmean_n, dmean_k, dmean_p, DIM_DMEAN, VEC_K, VEC_P)
            tl.store(at_dmean, b_ge.to(dmean.dtype.element_ty), mask=mask)
        elif MEAN == "channel":
            b_dmean += tl.where(mask, b_ge, 0.0)
        if LOG_SCALE == "full":
            at_dlog_scale = address(
                dlog_scale, n, k, p, dlog_scale_n, dlog_scale_k, dlog_scale_p, DIM_DLOG_SCALE, VEC_K, VEC_P
            )
            tl.store(at_dlog_scale, (b_ge * b_e - b_g).to(dlog_scale.dtype.element_ty), mask=mask)
        elif LOG_SCALE == "channel":
            b_dlog_scale += tl.where(mask, b_ge * b_e - b_g, 0.0)
    k = k_block * TILE_K + tl.arange(0, TILE_K)
    at_slot = slots + slot.to(tl.int64) * K
    if MEAN == "channel" and LOG_SCALE == "channel":
        at_slot += slot.to(tl.int64) * K
    if MEAN == "channel":
        tl.store(at_slot + k, tl.sum(b_dmean, 1), mask=k < K)
        at_slot += K
    if LOG_SCALE == "channel":
        tl.store(at_slot + k, tl.sum(b_dlog_scale, 1), mask=k < K)


@triton.jit
def load_sample_parameter(
    v, n, e, k, p, mask, v_n, v_k, v_p, KIND: tl.constexpr, FLAT: tl.constexpr, ACC: tl.constexpr
):
    if KIND == "full":
        at = n * v_n + (e if FLAT else k * v_k + p * v_p)
        return tl.load(v + at, mask=mask, other=0.0).to(ACC)
    else:
        return tl.load(v + k.to(tl.int64) * v_k, mask=mask, other=0.0).to(ACC)


@triton.jit(do_not_specialize=["sample_offset", "programs_each"])
def gaussian_sample_kernel(
    out, mean, log_scale, seed, sample_offset, temperature, temperature_rest, D, P, programs_each,
    mean_n, mean_k, mean_p, log_scale_n, log_scale_k, log_scale_p,
    MEAN: tl.constexpr, LOG_SCALE: tl.constexpr, FLAT_MEAN: tl.constexpr, FLAT_LOG_SCALE: tl.constexpr,
    ALIGNED: tl.constexpr,
    ACC: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    # out: [N, D];  mean, log_scale: [N, K, P], [K] or none
    # ALIGNED: the four numbers of a Philox block are in one channel
    n = (tl.program_id(0) // programs_each).to(tl.int64)
    block = (tl.program_id(0) % programs_each).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    e = block[:, None] * 4 + tl.arange(0, 4)[None, :]
    mask = e < D
    k = (block * 4 // P)[:, None] if ALIGNED else e // P
    p = e - k * P
    # a float argument has the precision of float32; temperature_rest is the remainder of a float64
    b_z = normal(block, sample_offset + n, tl.load(seed), ACC)
    b_z = b_z * temperature + b_z * temperature_rest
    if LOG_SCALE != "none":
        b_s = load_sample_parameter(
            log_scale, n, e, k, p, mask, log_scale_n, log_scale_k, log_scale_p, LOG_SCALE, FLAT_LOG_SCALE, ACC
        )
        b_z = b_z * tl.exp(b_s)
    if MEAN != "none":
        b_z += load_sample_parameter(mean, n, e, k, p, mask, mean_n, mean_k, mean_p, MEAN, FLAT_MEAN, ACC)
    tl.store(out + n * D + e, b_z.to(out.dtype.element_ty), mask=mask)


def _kind(v: Tensor | None) -> str:
    return "none" if v is None else "channel" if v.ndim == 1 else "full"


def _parameters(
    z: Tensor, mean: Tensor | None, log_scale: Tensor | None
) -> tuple[list[Tensor], list[Tensor], list[int], dict]:
    """Tensors that the kernel reads, tensors that decide the tiles, channel strides, constants.

    z replaces absent parameters.
    """
    kinds = [_kind(v) for v in (mean, log_scale)]
    read = [
        z if v is None else with_position_stride(v) if kind == "full" else v
        for v, kind in zip((mean, log_scale), kinds, strict=True)
    ]
    tiled = [v if kind == "full" else z for v, kind in zip(read, kinds, strict=True)]
    channel = [v.stride(0) if kind == "channel" else 0 for v, kind in zip(read, kinds, strict=True)]
    return read, tiled, channel, {"MEAN": kinds[0], "LOG_SCALE": kinds[1]}


def gaussian_log_prob(z: Tensor, mean: Tensor | None, log_scale: Tensor | None) -> Tensor:
    acc, triton_acc = accumulator(z.dtype)
    z = with_position_stride(z)
    read, tiled, channel, kinds = _parameters(z, mean, log_scale)
    t = tiles(z.shape[1], z, *tiled)
    log_prob = z.new_empty((z.shape[0] * (1 if t.constants["VECTORS"] else t.split),), dtype=acc)
    launch(
        gaussian_log_prob_kernel, t.samples * t.split, z, *read, log_prob, *t.sizes, t.split,
        t.tiles_per_program, *channel, *t.strides,
        warps=t.warps, ACC=triton_acc, **kinds, **t.constants,
    )  # fmt: skip
    return sum_parts(log_prob, z.shape[0])


def gaussian_log_prob_backward(
    z: Tensor, mean: Tensor | None, log_scale: Tensor | None, dlog_prob: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    acc, triton_acc = accumulator(z.dtype)
    dz, dz_out = allocate_output(z)
    z = with_position_stride(z)
    read, tiled, channel, kinds = _parameters(z, mean, log_scale)
    # gradients; buffers that the kernel writes; gradients that are summed over programs
    results, outs, summed = [], [], []
    for v in (mean, log_scale):
        result, out = (
            allocate_output(v)
            if _kind(v) == "full"
            else (z.new_empty(0) if v is None else torch.empty_like(v), z)
        )
        results.append((result, out))
        outs.append(out)
        if _kind(v) == "channel":
            summed.append(result)
    t = tiles(z.shape[1], z, *tiled, dz_out, *outs)
    count, tiles_per_program = t.reduction_grid() if summed else (t.position_blocks, 1)
    slots = z.new_empty((count, len(summed), z.shape[1]), dtype=acc) if summed else z
    launch(
        gaussian_log_prob_backward_kernel, count * t.k_blocks, z, *read, dlog_prob, dz_out, *outs, slots,
        t.position_blocks, *t.sizes, tiles_per_program,
        *channel, dlog_prob.stride(0), *t.strides, warps=t.warps, ACC=triton_acc, **kinds, **t.constants,
    )  # fmt: skip
    if summed:
        sum_slots(slots, *summed)
    return finalize(dz, dz_out), *(result if out is z else finalize(result, out) for result, out in results)


def gaussian_sample(
    size: list[int],
    mean: Tensor | None,
    log_scale: Tensor | None,
    temperature: float,
    seed: Tensor,
    offset: int,
    dtype: torch.dtype,
) -> Tensor:
    out = torch.empty(size, dtype=dtype, device=seed.device)
    if not out.numel():
        return out
    d, p = math.prod(size[1:]), math.prod(size[2:])
    kinds, flat, steps, read = [], [], [], []
    for v in (mean, log_scale):
        kinds.append(_kind(v))
        v = with_position_stride(v) if kinds[-1] == "full" else v
        flat.append(kinds[-1] == "full" and v.is_contiguous())
        steps += [0, 0, 0] if v is None else [0, v.stride(0), 0] if kinds[-1] == "channel" else strides(v)
        read.append(out if v is None else v)
    each = triton.cdiv(triton.cdiv(d, 4), BLOCKS)
    nearest = ctypes.c_float(temperature).value
    launch(
        gaussian_sample_kernel, size[0] * each,
        out, *read, seed, offset, nearest, temperature - nearest, d, p, each, *steps,
        warps=4, MEAN=kinds[0], LOG_SCALE=kinds[1], FLAT_MEAN=flat[0], FLAT_LOG_SCALE=flat[1],
        ALIGNED=p % 4 == 0,
        ACC=accumulator(dtype)[1], BLOCKS=BLOCKS,
    )  # fmt: skip
    return out
