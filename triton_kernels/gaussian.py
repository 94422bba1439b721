"""Log-density of a diagonal Gaussian, summed over each sample; its gradients; and samples with their noise made on the spot.

Bytes an element of z in float32, which is the bound: log-density 4, with a mean and a log scale for each element 12; backward 8
(z, dz) and 24; sampling 4 and 12. A mean or log scale for each channel costs nothing to read.
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
    launch,
    offset,
    output,
    readable,
    strides,
    sum_parts,
    sum_slots,
    tile_indices,
    tiles,
    whole,
    written,
)


@triton.jit
def load_term(
    v, n, k, p, K, mask, v_n, v_k, v_p,
    TERM: tl.constexpr, ACC: tl.constexpr, SIDE: tl.constexpr, VEC_K: tl.constexpr, VEC_P: tl.constexpr,
):  # fmt: skip
    """Mean or log scale of a tile: for each element, for each channel (its stride is v_k), or 0."""
    if TERM == "full":
        return tl.load(v + offset(n, k, p, v_n, v_k, v_p, SIDE, VEC_K, VEC_P), mask=mask, other=0.0).to(ACC)
    elif TERM == "channel":
        return tl.load(v + k * v_k, mask=k < K, other=0.0).to(ACC)
    else:
        return tl.zeros([1, 1], ACC)


@triton.jit(do_not_specialize=["split"])
def gaussian_log_prob_kernel(
    z, mean, log_scale, log_prob, K, P, split, loops, stride_mean, stride_log_scale,
    z_n, z_k, z_p, mean_n, mean_k, mean_p, log_scale_n, log_scale_k, log_scale_p,
    MEAN: tl.constexpr, LOG_SCALE: tl.constexpr, ACC: tl.constexpr, SIDES: tl.constexpr,
    VEC_K: tl.constexpr, VEC_P: tl.constexpr, TILE_K: tl.constexpr, TILE_P: tl.constexpr, VECTORS: tl.constexpr,
):  # fmt: skip
    # z: [N, K, P];  mean, log_scale: [N, K, P], [K] or none;  log_prob: [N, split]
    SIDE_Z: tl.constexpr = SIDES[0]
    SIDE_MEAN: tl.constexpr = SIDES[1]
    SIDE_LOG_SCALE: tl.constexpr = SIDES[2]
    K, P = K * VEC_K, whole(P, VEC_P)
    part = tl.program_id(0) % split
    n = (tl.program_id(0) // split).to(tl.int64)
    if MEAN == "channel":
        mean_k = stride_mean
    if LOG_SCALE == "channel":
        log_scale_k = stride_log_scale
    total = tl.zeros([TILE_K, TILE_P], ACC)
    for i in range(loops):
        k, p = tile_indices(part * loops + i, K, TILE_K, TILE_P)
        mask = (k < K) & (p < P)
        b_z = tl.load(z + offset(n, k, p, z_n, z_k, z_p, SIDE_Z, VEC_K, VEC_P), mask=mask, other=0.0).to(ACC)
        b_m = load_term(mean, n, k, p, K, mask, mean_n, mean_k, mean_p, MEAN, ACC, SIDE_MEAN, VEC_K, VEC_P)
        b_s = load_term(
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
            SIDE_LOG_SCALE,
            VEC_K,
            VEC_P,
        )
        b_e = b_z - b_m
        if LOG_SCALE != "none":
            b_e = b_e * tl.exp(-b_s)
        total += tl.where(mask, -0.5 * (b_e * b_e + 1.8378770664093453) - b_s, 0.0)  # log 2 pi
    if VECTORS:
        p = part.to(tl.int64) * TILE_P + tl.arange(0, TILE_P)
        tl.store(log_prob + p, tl.sum(total, 0), mask=p < P)
    else:
        tl.store(log_prob + tl.program_id(0), tl.sum(total))


@triton.jit(do_not_specialize=["units"])
def gaussian_log_prob_backward_kernel(
    z, mean, log_scale, dlog_prob, dz, dmean, dlog_scale, slots, units, K, P, loops, stride_mean, stride_log_scale, stride_dlog_prob,
    z_n, z_k, z_p, mean_n, mean_k, mean_p, log_scale_n, log_scale_k, log_scale_p,
    dz_n, dz_k, dz_p, dmean_n, dmean_k, dmean_p, dlog_scale_n, dlog_scale_k, dlog_scale_p,
    MEAN: tl.constexpr, LOG_SCALE: tl.constexpr, ACC: tl.constexpr, SIDES: tl.constexpr,
    VEC_K: tl.constexpr, VEC_P: tl.constexpr, TILE_K: tl.constexpr, TILE_P: tl.constexpr, VECTORS: tl.constexpr,
):  # fmt: skip
    # z, dz: [N, K, P];  mean, log_scale and their gradients: [N, K, P], [K] or none;  slots: [programs / k_blocks, terms of [K], K]
    SIDE_Z: tl.constexpr = SIDES[0]
    SIDE_MEAN: tl.constexpr = SIDES[1]
    SIDE_LOG_SCALE: tl.constexpr = SIDES[2]
    SIDE_DZ: tl.constexpr = SIDES[3]
    SIDE_DMEAN: tl.constexpr = SIDES[4]
    SIDE_DLOG_SCALE: tl.constexpr = SIDES[5]
    K, P = K * VEC_K, whole(P, VEC_P)
    k_blocks, p_blocks = tl.cdiv(K, TILE_K), tl.cdiv(P, TILE_P)
    slot, k_block = tl.program_id(0) // k_blocks, tl.program_id(0) % k_blocks
    if MEAN == "channel":
        mean_k = stride_mean
    if LOG_SCALE == "channel":
        log_scale_k = stride_log_scale
    b_dmean = tl.zeros([TILE_K, TILE_P], ACC)
    b_dlog_scale = tl.zeros([TILE_K, TILE_P], ACC)
    first = slot.to(tl.int64) * loops
    for unit in range(first, tl.minimum(first + loops, units)):
        n = unit // p_blocks
        k, p = tile_indices((unit % p_blocks) * k_blocks + k_block, K, TILE_K, TILE_P)
        mask = (k < K) & (p < P)
        b_z = tl.load(z + offset(n, k, p, z_n, z_k, z_p, SIDE_Z, VEC_K, VEC_P), mask=mask, other=0.0).to(ACC)
        b_m = load_term(mean, n, k, p, K, mask, mean_n, mean_k, mean_p, MEAN, ACC, SIDE_MEAN, VEC_K, VEC_P)
        b_s = load_term(
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
            SIDE_LOG_SCALE,
            VEC_K,
            VEC_P,
        )
        if VECTORS:
            b_g = tl.load(dlog_prob + p * stride_dlog_prob, mask=p < P, other=0.0).to(ACC)
        else:
            b_g = tl.load(dlog_prob + n * stride_dlog_prob).to(ACC)
        b_e = b_z - b_m
        b_ge = b_g * b_e
        if LOG_SCALE != "none":
            b_r = tl.exp(-b_s)
            b_ge = b_ge * b_r * b_r
        tl.store(
            dz + offset(n, k, p, dz_n, dz_k, dz_p, SIDE_DZ, VEC_K, VEC_P),
            (-b_ge).to(dz.dtype.element_ty),
            mask=mask,
        )
        if MEAN == "full":
            at_dmean = dmean + offset(n, k, p, dmean_n, dmean_k, dmean_p, SIDE_DMEAN, VEC_K, VEC_P)
            tl.store(at_dmean, b_ge.to(dmean.dtype.element_ty), mask=mask)
        elif MEAN == "channel":
            b_dmean += tl.where(mask, b_ge, 0.0)
        if LOG_SCALE == "full":
            at_dlog_scale = dlog_scale + offset(
                n, k, p, dlog_scale_n, dlog_scale_k, dlog_scale_p, SIDE_DLOG_SCALE, VEC_K, VEC_P
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
def load_drawn_term(
    v, n, e, k, p, mask, v_n, v_k, v_p, TERM: tl.constexpr, FLAT: tl.constexpr, ACC: tl.constexpr
):
    if TERM == "full":
        at = n * v_n + (e if FLAT else k * v_k + p * v_p)
        return tl.load(v + at, mask=mask, other=0.0).to(ACC)
    else:
        return tl.load(v + k * v_k, mask=mask, other=0.0).to(ACC)


@triton.jit(do_not_specialize=["sample_offset", "programs_each"])
def gaussian_sample_kernel(
    out, mean, log_scale, seed, sample_offset, temperature, temperature_rest, D, P, programs_each,
    mean_n, mean_k, mean_p, log_scale_n, log_scale_k, log_scale_p,
    MEAN: tl.constexpr, LOG_SCALE: tl.constexpr, FLAT_MEAN: tl.constexpr, FLAT_LOG_SCALE: tl.constexpr, ALIGNED: tl.constexpr,
    ACC: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    # out: [N, D];  mean, log_scale: [N, K, P], [K] or none;  ALIGNED: the four numbers of a call of Philox lie in one channel
    n = (tl.program_id(0) // programs_each).to(tl.int64)
    block = (tl.program_id(0) % programs_each).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    e = block[:, None] * 4 + tl.arange(0, 4)[None, :]
    mask = e < D
    k = (block * 4 // P)[:, None] if ALIGNED else e // P
    p = e - k * P
    # a float argument is a float32: what it leaves of the temperature comes as another
    b_z = normal(block, sample_offset + n, tl.load(seed), ACC)
    b_z = b_z * temperature + b_z * temperature_rest
    if LOG_SCALE != "none":
        b_s = load_drawn_term(
            log_scale, n, e, k, p, mask, log_scale_n, log_scale_k, log_scale_p, LOG_SCALE, FLAT_LOG_SCALE, ACC
        )
        b_z = b_z * tl.exp(b_s)
    if MEAN != "none":
        b_z += load_drawn_term(mean, n, e, k, p, mask, mean_n, mean_k, mean_p, MEAN, FLAT_MEAN, ACC)
    tl.store(out + n * D + e, b_z.to(out.dtype.element_ty), mask=mask)


def _kind(v: Tensor | None) -> str:
    return "none" if v is None else "channel" if v.ndim == 1 else "full"


def _terms(
    z: Tensor, mean: Tensor | None, log_scale: Tensor | None
) -> tuple[list[Tensor], list[Tensor], list[int], dict]:
    """(what the kernel reads, what decides the tiles, strides of terms for each channel, constants); z stands in for what is not there."""
    kinds = [_kind(v) for v in (mean, log_scale)]
    read = [
        z if v is None else readable(v) if kind == "full" else v
        for v, kind in zip((mean, log_scale), kinds, strict=True)
    ]
    tiled = [v if kind == "full" else z for v, kind in zip(read, kinds, strict=True)]
    channel = [v.stride(0) if kind == "channel" else 0 for v, kind in zip(read, kinds, strict=True)]
    return read, tiled, channel, {"MEAN": kinds[0], "LOG_SCALE": kinds[1]}


def gaussian_log_prob(z: Tensor, mean: Tensor | None, log_scale: Tensor | None) -> Tensor:
    acc, triton_acc = accumulator(z.dtype)
    z = readable(z)
    read, tiled, channel, kinds = _terms(z, mean, log_scale)
    t = tiles(z.shape[1], z, *tiled)
    log_prob = z.new_empty((z.shape[0] * (1 if t.constants["VECTORS"] else t.split),), dtype=acc)
    launch(
        gaussian_log_prob_kernel, t.samples * t.split, z, *read, log_prob, *t.sizes, t.split, t.loops, *channel, *t.strides,
        warps=t.warps, ACC=triton_acc, **kinds, **t.constants,
    )  # fmt: skip
    return sum_parts(log_prob, z.shape[0])


def gaussian_log_prob_backward(
    z: Tensor, mean: Tensor | None, log_scale: Tensor | None, dlog_prob: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    acc, triton_acc = accumulator(z.dtype)
    dz, dz_out = output(z)
    z = readable(z)
    read, tiled, channel, kinds = _terms(z, mean, log_scale)
    results, outs, summed = (
        [],
        [],
        [],
    )  # gradients in their layout; what the kernel writes; what is summed over programs
    for v in (mean, log_scale):
        result, out = (
            output(v) if _kind(v) == "full" else (z.new_empty(0) if v is None else torch.empty_like(v), z)
        )
        results.append((result, out))
        outs.append(out)
        if _kind(v) == "channel":
            summed.append(result)
    t = tiles(z.shape[1], z, *tiled, dz_out, *outs)
    count, loops = t.shared() if summed else (t.units, 1)
    slots = z.new_empty((count, len(summed), z.shape[1]), dtype=acc) if summed else z
    launch(
        gaussian_log_prob_backward_kernel, count * t.k_blocks, z, *read, dlog_prob, dz_out, *outs, slots, t.units, *t.sizes, loops,
        *channel, dlog_prob.stride(0), *t.strides, warps=t.warps, ACC=triton_acc, **kinds, **t.constants,
    )  # fmt: skip
    if summed:
        sum_slots(slots, *summed)
    return written(dz, dz_out), *(result if out is z else written(result, out) for result, out in results)


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
        v = readable(v) if kinds[-1] == "full" else v
        flat.append(kinds[-1] == "full" and v.is_contiguous())
        steps += [0, 0, 0] if v is None else [0, v.stride(0), 0] if kinds[-1] == "channel" else strides(v)
        read.append(out if v is None else v)
    each = triton.cdiv(triton.cdiv(d, 4), BLOCKS)
    nearest = ctypes.c_float(temperature).value
    launch(
        gaussian_sample_kernel, size[0] * each, out, *read, seed, offset, nearest, temperature - nearest, d, p, each, *steps,
        warps=4, MEAN=kinds[0], LOG_SCALE=kinds[1], FLAT_MEAN=flat[0], FLAT_LOG_SCALE=flat[1], ALIGNED=p % 4 == 0,
        ACC=accumulator(dtype)[1], BLOCKS=BLOCKS,
    )  # fmt: skip
    return out
