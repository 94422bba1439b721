"""Tiles of a batch: strides, tile shapes, addresses in a kernel, sums over programs, and launches.

A tensor ``[N, C, ...]`` is treated as ``[N, K, P]``, channels and positions, if its positions have a single
stride: contiguous, channels_last, a ``chunk`` of either, expanded. A tile is ``[TILE_K, TILE_P]`` of one
sample, and its contiguous dimension is read in vectors. For vectors ``[N, C]``, which have one position, the
samples are the positions of a single sample.
"""

import math
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# Elements of 4 bytes per tile: 8 for each of 256 threads. A thread then reads two 16-byte vectors of each tensor.
# Half precision has twice as many elements per tile and thread. float64 has half as many, because of its registers.
TILE = 2048
SMALLEST = 512  # elements of a tile that is made smaller so that fewer of its channels are idle
ELEMENTS_PER_THREAD = 8
# Programs of a reduction: several per multiprocessor of the largest GPU, few enough that summing their slots
# is cheap. The number does not depend on the device, so the same input gives the same bits on every device.
PROGRAMS = 1024
# Tile of the sum of their slots. A round waits for memory, so a program adds 256 slots in each: at most four
# rounds for PROGRAMS slots. Eight float32 of a slot are one sector of memory, 32 bytes.
SLOTS_AT_ONCE, SLOT_COLUMNS = 256, 8
# Tiles of a sample that one program processes. A sample with more tiles is shared among programs, which needs
# a second launch for its log-det.
TILES_PER_PROGRAM = 4


INTERPRETED = triton.knobs.runtime.interpret  # at the time the kernels below are defined


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
    """Strides of ``x`` as ``[N, K, P]``, or None if its positions have no single stride."""
    return _strides(x.shape, x.stride())


def with_position_stride(x: Tensor) -> Tensor:
    """``x``, or a contiguous copy if its positions have no single stride, as those of a transposed image."""
    return x if strides(x) is not None else x.contiguous()


def allocate_output(x: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """A tensor with the strides of ``torch.empty_like(x, dtype=dtype)``, and the buffer that a kernel writes.

    The buffer is the tensor itself if its positions have a single stride, otherwise contiguous.
    """
    result = torch.empty_like(x, dtype=dtype)
    return result, result if strides(result) is not None else torch.empty_like(
        result, memory_format=torch.contiguous_format
    )


def finalize(result: Tensor, buffer: Tensor) -> Tensor:
    """``result``, with the values that a kernel wrote to ``buffer``."""
    return result if buffer is result else result.copy_(buffer)


class Tiles(NamedTuple):
    """Tiles of ``[N, K, P]`` for one launch, as arguments of the kernel."""

    samples: int  # 1 for vectors, whose samples are the positions
    position_blocks: int  # of all samples; for kernels without a sum per sample
    k_blocks: int
    blocks: int  # tiles per sample
    split: int  # programs per sample, for a sum over it
    tiles_per_program: int
    warps: int
    sizes: tuple[int, int]  # K and P, in vectors
    strides: tuple[int, ...]  # of each tensor: sample, channel, position, in vectors
    constants: dict

    def reduction_grid(self) -> tuple[int, int]:
        """Grid of a sum over samples and positions.

        Returns the number of slots (programs per block of channels), and of position blocks per program.
        """
        tiles_per_program = -(-self.position_blocks // max(PROGRAMS // self.k_blocks, 1))
        return -(-self.position_blocks // tiles_per_program), tiles_per_program


def power_of_two(size: int) -> int:
    return 1 << max(size - 1, 0).bit_length()


def block_size(size: int, limit: int) -> int:
    """A power of two up to ``limit``: one block, or blocks of which at most an eighth is idle."""
    if size <= limit:
        return power_of_two(size)
    return next((b for b in (limit, limit // 2) if -size % b * 8 <= size), max(limit // 4, 1))


@lru_cache(maxsize=4096)
def _tiles(n: int, k: int, p: int, elements: int, per_thread: int, layouts: tuple[Strides, ...]) -> Tiles:
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
    if adjacent[0] == "channels":
        tile_k = block_size(k, elements)
        tile_p = block_size(p, elements // tile_k)
    else:
        tile_p = block_size(p, elements)
        tile_k = block_size(k, elements // tile_p)
        smaller = (tile_k >> i for i in range(tile_k.bit_length()) if (tile_k >> i) * tile_p >= SMALLEST)
        tile_k = next((b for b in smaller if -k % b * 8 <= k), tile_k)
    k_blocks, p_blocks = -(-k // tile_k), -(-p // tile_p)
    blocks = k_blocks * p_blocks
    if vectors:
        split, tiles_per_program = p_blocks, k_blocks
    else:
        tiles_per_program = -(-blocks // min(-(-blocks // TILES_PER_PROGRAM), -(-PROGRAMS // max(n, 1))))
        split = -(-blocks // tiles_per_program)
    # largest offset in a sample, of both halves of the channels, with idle lanes of the last tile
    extent = max(2 * k_blocks * tile_k * s.channel + p_blocks * tile_p * max(s.position, 1) for s in layouts)
    return Tiles(
        samples=n,
        position_blocks=n * p_blocks,
        k_blocks=k_blocks,
        blocks=blocks,
        split=split,
        tiles_per_program=tiles_per_program,
        warps=min(max(tile_k * tile_p // (32 * per_thread), 1), 8),
        sizes=(k // vec_k, p // vec_p),
        strides=tuple(v // vec[side] for s, side in zip(layouts, adjacent, strict=True) for v in s),
        constants={
            "CONTIGUOUS_DIMS": adjacent,
            "VEC_K": vec_k,
            "VEC_P": vec_p,
            "TILE_K": tile_k,
            "TILE_P": tile_p,
            "VECTORS": vectors,
            "WIDE": n * p_blocks >= 2**30 or extent >= 2**31,
        },
    )


def tiles(k: int, *tensors: Tensor, elements: int | None = None) -> Tiles:
    """Tiles of the first tensor, with ``k`` channels, for a kernel that reads and writes all ``tensors``.

    A tile has as many ``elements``, by default as many as fit 8 KB.
    """
    x = tensors[0]
    itemsize = max(t.element_size() for t in tensors)
    return _tiles(
        x.shape[0],
        k,
        math.prod(x.shape[2:]),
        TILE * 4 // itemsize if elements is None else elements,
        ELEMENTS_PER_THREAD * 4 // itemsize,
        tuple(strides(t) for t in tensors),
    )


def accumulator(dtype: torch.dtype) -> tuple[torch.dtype, tl.dtype]:
    return (torch.float64, tl.float64) if dtype == torch.float64 else (torch.float32, tl.float32)


def launch(kernel, programs: int, *args, warps: int, **constants) -> None:
    """Launch a kernel. Fusion of multiplications and additions is explicit: Triton 3.9 warns otherwise."""
    kernel[(programs,)](*args, num_warps=warps, enable_fp_fusion=True, **constants)


@triton.jit
def address(
    x,
    n,
    k,
    p,
    stride_n,
    stride_k,
    stride_p,
    CONTIGUOUS_DIM: tl.constexpr,
    VEC_K: tl.constexpr,
    VEC_P: tl.constexpr,
):
    """Address of element (n, k, p) of x. The offset in a sample has the bits of k and p.

    Strides are in vectors, so that the compiler knows their divisibility.
    """
    if CONTIGUOUS_DIM == "positions":
        return x + n * stride_n * VEC_P + (k * stride_k * VEC_P + p)
    elif CONTIGUOUS_DIM == "channels":
        return x + n * stride_n * VEC_K + (p * stride_p * VEC_K + k)
    else:
        return x + n * stride_n + (k * stride_k + p * stride_p)


@triton.jit
def unvectorized_size(size, VEC: tl.constexpr, WIDE: tl.constexpr):
    """Elements of a size in vectors. If WIDE, in 64 bits: the number of vectors may fit 32 when this does not."""
    return tl.cast(size, tl.int64) * VEC if WIDE else size * VEC


@triton.jit
def widened(i, WIDE: tl.constexpr):
    """``i``, in 64 bits if WIDE."""
    return tl.cast(i, tl.int64) if WIDE else i


@triton.jit
def tile_indices(block, K, TILE_K: tl.constexpr, TILE_P: tl.constexpr, WIDE: tl.constexpr):
    """Channels ``[TILE_K, 1]`` and positions ``[1, TILE_P]`` of a tile of a sample."""
    k_blocks = tl.cdiv(K, TILE_K)
    return block_indices(block % k_blocks, block // k_blocks, TILE_K, TILE_P, WIDE)


@triton.jit
def block_indices(k_block, p_block, TILE_K: tl.constexpr, TILE_P: tl.constexpr, WIDE: tl.constexpr):
    """Channels ``[TILE_K, 1]`` and positions ``[1, TILE_P]`` of a block of each; in 64 bits if WIDE, else 32."""
    k = widened(k_block, WIDE) * TILE_K + tl.arange(0, TILE_K)
    p = widened(p_block, WIDE) * TILE_P + tl.arange(0, TILE_P)
    return k[:, None], p[None, :]


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
    """Sum the parts of each of ``n`` samples, ``[n * split]``; no launch if split is 1."""
    return parts if parts.numel() == n else parts.view(n, -1).sum(1)


def sum_slots(slots: Tensor, *outs: Tensor) -> None:
    """Sum ``[slots, outs, count]`` over the slots to one or two outputs, in an order given by the shape."""
    slot_count, _, count = slots.shape
    grid = len(outs) * triton.cdiv(count, SLOT_COLUMNS)
    launch(
        sum_slots_kernel, grid, slots, outs[0], outs[-1], slot_count, count,
        warps=8, TILE_S=SLOTS_AT_ONCE, TILE_C=SLOT_COLUMNS,
    )  # fmt: skip
