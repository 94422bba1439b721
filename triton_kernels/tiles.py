"""How a batch is cut into tiles: its strides, the shape of a tile, addresses in a kernel, and the one place that launches.

A tensor ``[N, C, ...]`` is seen as ``[N, K, P]``, channels and positions, wherever one stride leads through all positions: contiguous,
channels_last, a ``chunk`` of either, an expanded one. A tile is ``[TILE_K, TILE_P]`` of one sample; whichever of the two lies side by
side in memory is read in vectors. Vectors ``[N, C]`` have one position: there the samples take the positions' place.
"""

import math
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# Elements of a tile: 8 for each of 256 threads, so that a thread reads float32 in two 16-byte vectors, half precision in one, and four
# to six such reads of different tensors are under way at once; float64 takes half as many, for its registers.
TILE = 2048
THREAD = 8
# Programs that a reduction over programs is spread over: several for each multiprocessor of the largest GPU, few enough that summing
# their slots costs nothing. A number of its own, not the device's, so that the same input has the same bits everywhere.
PROGRAMS = 1024
# Tiles that one program takes of a sample before the sample is shared among programs, which costs a second launch for its log-det.
LOOPS = 4


INTERPRETED = triton.knobs.runtime.interpret  # as it was when the kernels below were made


class Strides(NamedTuple):
    sample: int
    channel: int
    position: int


@lru_cache(maxsize=4096)
def _strides(shape: tuple[int, ...], stride: tuple[int, ...]) -> Strides | None:
    positions = [(size, step) for size, step in zip(shape[2:], stride[2:], strict=True) if size > 1]
    for (_, outer), (size, inner) in zip(positions, positions[1:], strict=False):
        if outer != size * inner:
            return None
    return Strides(stride[0], stride[1], positions[-1][1] if positions else 1)


def strides(x: Tensor) -> Strides | None:
    """Strides of ``x`` as ``[N, K, P]``, or None where no single stride leads through the positions."""
    return _strides(x.shape, x.stride())


def readable(x: Tensor) -> Tensor:
    """``x``, or a contiguous copy where it is no ``[N, K, P]``, as a transposed image is not."""
    return x if strides(x) is not None else x.contiguous()


def output(x: Tensor) -> tuple[Tensor, Tensor]:
    """Memory in the layout of ``torch.empty_like(x)``, and memory that a kernel can write: the same, unless it is no ``[N, K, P]``."""
    result = torch.empty_like(x)
    return result, result if strides(result) is not None else torch.empty_like(
        x, memory_format=torch.contiguous_format
    )


def written(result: Tensor, buffer: Tensor) -> Tensor:
    """What a kernel wrote to ``buffer``, in the layout of ``result``."""
    return result if buffer is result else result.copy_(buffer)


class Tiles(NamedTuple):
    """How ``[N, K, P]`` is cut for one launch, and what the kernel is told of it."""

    samples: int  # 1 where the positions are the samples
    units: int  # blocks of positions of all samples: what a kernel that reduces over nothing, or to channels, goes through
    k_blocks: int
    blocks: int  # tiles of a sample
    split: int  # programs for a sample in a sum over it, and the tiles that each takes
    loops: int
    warps: int
    sizes: tuple[int, int]  # K and P, in vectors
    strides: tuple[int, ...]  # of each tensor: sample, channel, position, in vectors
    constants: dict

    def shared(self) -> tuple[int, int]:
        """(slots, loops): programs for each block of channels in a sum over samples and positions, and the units that each takes."""
        loops = -(-self.units // max(PROGRAMS // self.k_blocks, 1))
        return -(-self.units // loops), loops


def power_of_two(size: int) -> int:
    return 1 << max(size - 1, 0).bit_length()


def block_size(size: int, limit: int) -> int:
    """A power of two up to ``limit`` to cut ``size`` into: all at once, or in blocks that leave no more than an eighth idle."""
    if size <= limit:
        return power_of_two(size)
    return next((b for b in (limit, limit // 2) if -size % b * 8 <= size), max(limit // 4, 1))


@lru_cache(maxsize=4096)
def _tiles(n: int, k: int, p: int, itemsize: int, layouts: tuple[Strides, ...]) -> Tiles:
    vectors = p == 1
    if vectors:
        n, p = 1, n
        layouts = tuple(Strides(0, s.channel, s.sample) for s in layouts)
    adjacent = tuple(
        "positions" if s.position == 1 else "channels" if s.channel == 1 else "none" for s in layouts
    )
    along_p = [
        (s.sample, s.channel) for s, side in zip(layouts, adjacent, strict=True) if side == "positions"
    ]
    along_k = [
        (s.sample, s.position) for s, side in zip(layouts, adjacent, strict=True) if side == "channels"
    ]
    vec_p = math.gcd(16, p, *(v for pair in along_p for v in pair)) if along_p else 1
    vec_k = math.gcd(16, k, *(v for pair in along_k for v in pair)) if along_k else 1
    vec = {"positions": vec_p, "channels": vec_k, "none": 1}
    elements = TILE * 4 // max(itemsize, 4)
    if adjacent[0] == "channels":
        tile_k = block_size(k, elements)
        tile_p = block_size(p, elements // tile_k)
    else:
        tile_p = block_size(p, elements)
        tile_k = block_size(k, elements // tile_p)
    k_blocks, p_blocks = -(-k // tile_k), -(-p // tile_p)
    blocks = k_blocks * p_blocks
    if vectors:
        split, loops = p_blocks, k_blocks
    else:
        loops = -(-blocks // min(-(-blocks // LOOPS), -(-PROGRAMS // max(n, 1))))
        split = -(-blocks // loops)
    per_thread = THREAD * 4 // max(itemsize, 4)
    return Tiles(
        samples=n,
        units=n * p_blocks,
        k_blocks=k_blocks,
        blocks=blocks,
        split=split,
        loops=loops,
        warps=min(max(tile_k * tile_p // (32 * per_thread), 1), 8),
        sizes=(k // vec_k, p // vec_p),
        strides=tuple(v // vec[side] for s, side in zip(layouts, adjacent, strict=True) for v in s),
        constants={
            "SIDES": adjacent,
            "VEC_K": vec_k,
            "VEC_P": vec_p,
            "TILE_K": tile_k,
            "TILE_P": tile_p,
            "VECTORS": vectors,
        },
    )


def tiles(k: int, *tensors: Tensor) -> Tiles:
    """Cuts the ``[N, K, P]`` of the first of ``tensors``, with ``k`` channels, for a kernel that reads and writes all of them."""
    x = tensors[0]
    itemsize = max(t.element_size() for t in tensors)
    return _tiles(x.shape[0], k, math.prod(x.shape[2:]), itemsize, tuple(strides(t) for t in tensors))


def accumulator(dtype: torch.dtype) -> tuple[torch.dtype, tl.dtype]:
    return (torch.float64, tl.float64) if dtype == torch.float64 else (torch.float32, tl.float32)


def launch(kernel, programs: int, *args, warps: int, **constants) -> None:
    """Every kernel is launched from here; multiplications and additions fuse, which Triton 3.9 warns about where it is not said."""
    kernel[(programs,)](*args, num_warps=warps, enable_fp_fusion=True, **constants)


@triton.jit
def offset(
    n, k, p, stride_n, stride_k, stride_p, SIDE: tl.constexpr, VEC_K: tl.constexpr, VEC_P: tl.constexpr
):
    """Where element (n, k, p) of a tensor lies. Strides come in units of a vector, so that the compiler sees what they divide by."""
    if SIDE == "positions":
        return n * stride_n * VEC_P + k * stride_k * VEC_P + p
    elif SIDE == "channels":
        return n * stride_n * VEC_K + p * stride_p * VEC_K + k
    else:
        return n * stride_n + k * stride_k + p * stride_p


@triton.jit
def whole(size, VEC: tl.constexpr):
    """A size that came in units of a vector; 64 bits, since the units may fit 32 where the size does not."""
    return tl.cast(size, tl.int64) * VEC


@triton.jit
def tile_indices(block, K, TILE_K: tl.constexpr, TILE_P: tl.constexpr):
    """Channels ``[TILE_K, 1]`` and positions ``[1, TILE_P]`` of a sample's block, in 64 bits."""
    k_blocks = tl.cdiv(K, TILE_K)
    k = (block % k_blocks) * TILE_K + tl.arange(0, TILE_K)
    p = (block // k_blocks).to(tl.int64) * TILE_P + tl.arange(0, TILE_P)
    return k[:, None].to(tl.int64), p[None, :]


# sums over programs ------------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["slot_count"])
def sum_slots_kernel(slots, out_0, out_1, slot_count, count, TILE_S: tl.constexpr, TILE_C: tl.constexpr):
    # slots: [slot_count, outs, count] -> out_0, out_1: [count]; the grid is outs x blocks of count
    blocks = tl.cdiv(count, TILE_C)
    which = tl.program_id(0) // blocks
    outs = tl.num_programs(0) // blocks
    c = (tl.program_id(0) % blocks) * TILE_C + tl.arange(0, TILE_C)
    s = tl.arange(0, TILE_S)
    total = tl.zeros([TILE_S, TILE_C], slots.dtype.element_ty)
    for start in range(0, slot_count, TILE_S):
        row = ((start + s) * outs + which).to(tl.int64) * count
        mask = (start + s < slot_count)[:, None] & (c < count)[None, :]
        total += tl.load(slots + row[:, None] + c[None, :], mask=mask, other=0.0)
    b_out = tl.sum(total, 0)
    if which == 0:
        tl.store(out_0 + c, b_out.to(out_0.dtype.element_ty), mask=c < count)
    else:
        tl.store(out_1 + c, b_out.to(out_1.dtype.element_ty), mask=c < count)


def sum_parts(parts: Tensor, n: int) -> Tensor:
    """Sums the parts of each of ``n`` samples, ``[n * split]``; with one part each there is nothing to launch."""
    return parts if parts.numel() == n else parts.view(n, -1).sum(1)


def sum_slots(slots: Tensor, *outs: Tensor) -> None:
    """Sums ``[slots, outs, count]`` over the slots into one or two outputs, in an order that the shape alone decides."""
    slot_count, _, count = slots.shape
    grid = len(outs) * triton.cdiv(count, 32)
    launch(sum_slots_kernel, grid, slots, outs[0], outs[-1], slot_count, count, warps=4, TILE_S=32, TILE_C=32)
