"""Predicts the bandwidth of the memory-bound kernels on an H200 from their machine code. Needs no GPU.

    python -m benchmarks.tools.bandwidth

Compiles each kernel for sm_90 at tensors of 200 MB and writes docs/kernels.md.
"""

import argparse
import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from torch import Tensor

from benchmarks.tools import cuda_code, triton_code
from benchmarks.tools.triton_code import Launch, Spec
from fastflow import ops

PAGE = triton_code.PAGE.with_name("kernels.md")
CAPABILITY = 90
# H200 SXM. The rate of a copy, the clock and the latency under load are assumptions.
MULTIPROCESSORS, SCHEDULERS, CLOCK = 132, 4, 1.755e9
COPY, LATENCY = 4.3e12, 1e-6
BYTES = 200e6
SHAPES = ((12, 16, 16), (48, 16, 16))
EXPECTED = {"float32": 85, "bfloat16": 75}  # percent of a copy


@dataclass(frozen=True)
class Code:
    """What the model takes from a kernel's machine code, for one tile."""

    instructions: float
    groups: tuple[int, ...]  # bytes of a thread in flight, for each group of loads
    blocks: int  # of a multiprocessor


@dataclass(frozen=True)
class Prediction:
    instructions: float  # per element of the first tensor
    in_flight: float  # bytes of a multiprocessor
    bound: str  # of the slowest of the three
    share: float  # percent of a copy


ADDRESS = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/")
BACK = re.compile(r"\bBRA(?:\.U)? (?:U?P\w+, )?`?\(?\.?0x([0-9a-f]+)")


def per_tile(body: str, tiles: int) -> tuple[float, str]:
    """Instructions of a tile, and the code with its loads, of a program that processes `tiles` of them.

    Code after the first exit behind a store is of few programs, and is left out. Code around the longest loop is executed once
    per program.
    """
    lines = [line for line in body.splitlines() if cuda_code.INSTRUCTION.match(line) and " NOP " not in line]
    stored = next(i for i, line in enumerate(lines) if re.search(r"\bSTG\b", line))
    last = next(i for i, line in enumerate(lines) if i > stored and re.search(r"\bEXIT\b", line))
    lines = lines[: last + 1]
    at = {int(ADDRESS.match(line)[1], 16): i for i, line in enumerate(lines)}
    loops = [
        (at[int(m[1], 16)], i)
        for i, line in enumerate(lines)
        if (m := BACK.search(line)) and int(m[1], 16) in at
    ]
    first, last = max(loops, key=lambda loop: loop[1] - loop[0], default=(0, 0))
    if tiles == 1 or last <= first:
        return len(lines) / tiles, "\n".join(lines)
    inside = lines[first : last + 1]
    return len(inside) + (len(lines) - len(inside)) / tiles, "\n".join(inside)


def code_of(spec: Spec, launch: Launch) -> Code:
    resources, body = triton_code.compiled(spec, CAPABILITY), triton_code.machine_code(spec, CAPABILITY)
    instructions, code = per_tile(body, launch.tiles_per_program)
    groups = [sum(size * n for size, n in group.items()) for group in cuda_code.in_flight(code)]
    return Code(instructions, tuple(groups), resources.blocks(CAPABILITY, spec.warps()))


def predict(code: Code, warps: int, launch: Launch) -> Prediction:
    """The bandwidth that issue slots, loads in flight and incomplete waves of blocks leave."""
    tiles = launch.programs * launch.tiles_per_program
    copy = launch.moved / tiles / (COPY / MULTIPROCESSORS)  # seconds of a tile on a multiprocessor
    issue = code.instructions * warps / SCHEDULERS / CLOCK
    # parameters of few bytes come from a cache; a group that is large is a round trip to memory
    trips = sum(4 * group >= max(code.groups) for group in code.groups)

    def wave(blocks: int) -> tuple[float, str]:
        """Seconds in which a multiprocessor completes a tile of each of its blocks, and their bound."""
        wait = trips * LATENCY + issue
        return max((blocks * copy, "memory"), (blocks * issue, "instructions"), (wait, "loads in flight"))

    most = min(code.blocks, math.ceil(launch.programs / MULTIPROCESSORS))
    waves, rest = divmod(launch.programs, MULTIPROCESSORS * most)
    slowest, bound = wave(most)
    seconds = waves * slowest + (wave(math.ceil(rest / MULTIPROCESSORS))[0] if rest else 0)
    return Prediction(
        instructions=code.instructions * 32 * warps * tiles / launch.elements,
        in_flight=max(code.groups) * 32 * warps * most,
        bound=bound,
        share=100 * launch.moved / COPY / (seconds * launch.tiles_per_program),
    )


def calls(
    dtype: torch.dtype, shape: tuple[int, ...], memory_format: torch.memory_format
) -> Iterator[Callable]:
    """Calls of ops, whose kernels move tensors of 200 MB. No tensor is written, so they take no memory."""
    n = int(BYTES / math.prod(shape) / dtype.itemsize)

    def batch(dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(n, *shape, dtype=dtype, memory_format=memory_format)

    x, y, z, pixels = batch(), batch(), batch(), batch(torch.uint8)
    channel, sample, factor = torch.empty(shape[0]), torch.empty(n), torch.empty(shape[0] // 2)
    coupling = {"scale": "soft_clamp"}
    yield lambda: ops.affine_coupling(x, y, factor, **coupling)
    yield lambda: ops.affine_coupling_inverse_backward(x, y, factor, z, sample, **coupling)
    yield lambda: ops.actnorm(x, channel, channel)
    yield lambda: ops.actnorm_inverse_backward(x, channel, channel, y, sample)
    yield lambda: ops.bias_relu(x, channel)
    yield lambda: torch.ops.fastflow.bias_relu_backward(x, y, None, True)
    yield lambda: ops.gaussian_log_prob(x, y, z)
    yield lambda: torch.ops.fastflow.gaussian_log_prob_backward(x, y, z, sample)
    yield lambda: ops.squeeze2d(x)
    yield lambda: ops.dequantize(pixels, seed=0, dtype=dtype)


def recorded(
    dtypes: Iterable[torch.dtype] = (torch.float32, torch.bfloat16),
    layouts: Iterable[str] = ("contiguous", "channels_last"),
    shapes: Iterable[tuple[int, ...]] = SHAPES,
) -> dict[tuple[str, ...], tuple[Spec, Launch]]:
    """The launch of each row: kernel, dtype, layout, shape."""
    rows = {}
    for dtype, layout, shape in itertools.product(dtypes, layouts, shapes):
        memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
        for call in calls(dtype, shape, memory_format):
            with triton_code.recording() as launched, torch.no_grad():
                call()
            spec, launch = max(launched.items(), key=lambda item: item[1].moved)
            name = str(dtype).removeprefix("torch.")
            rows[spec.kernel, name, layout, triton_code.times(shape)] = spec, launch
    return rows


# the page -----------------------------------------------------------------------------

INTRODUCTION = f"""# Predicted bandwidth of the kernels

This page predicts, from machine code for sm_90 by Triton {{triton}}, which share of a copy's bandwidth each
memory-bound Triton kernel reaches on an H200 at tensors of {BYTES / 1e6:.0f} MB. `python -m benchmarks.tools.bandwidth`
writes it and needs no GPU. Nothing here has been timed; the last column stays empty until a GPU has measured it.

The model has three bounds on the tiles that a multiprocessor completes per second. The smallest counts.
A *tile* is the part of a tensor that a block processes at once.

- **Memory**: a copy moves {COPY / 1e12:g} TB/s, {COPY / MULTIPROCESSORS / 1e9:.1f} GB/s for each of {MULTIPROCESSORS} multiprocessors.
- **Instructions**: {SCHEDULERS} schedulers issue one instruction of a warp per cycle of {CLOCK / 1e9:g} GHz. Each instruction of the
  loop over tiles counts once per tile, also one that only some threads execute; the code around the loop counts once
  per program. ActNorm's log-det, which few programs compute, is left out.
- **Loads in flight** (Little's law): a block waits {LATENCY * 1e6:g} us for each group of loads that are in flight together,
  and issues its instructions; the blocks of a multiprocessor do so at the same time. Groups of less than a quarter of
  the largest one's bytes are parameters, which a cache holds.

Blocks run in waves of as many as fit; the last one may leave multiprocessors with fewer blocks. The model
leaves out conflicts of banks, partial sectors, the second launch of a reduction and the start of a launch. The
rate of a copy, the latency under load and the clock are assumptions. The CUDA kernels are in
[cuda_code.md](cuda_code.md).

| column | meaning |
| --- | --- |
| instructions | per element of the first tensor, and thread |
| KB in flight | bytes of loads of a multiprocessor, at the peak |
| bound | the bound that counts |
| predicted | percent of a copy's bandwidth |
| measured | percent of a copy's bandwidth |

"""
COLUMNS = (
    "kernel",
    "dtype",
    "layout",
    "shape",
    "instructions",
    "KB in flight",
    "bound",
    "predicted",
    "measured",
)


# Why rows of these kernels miss what is expected.
REASONS = {
    "affine_coupling_kernel": "ptxas saves registers: it uses the first loads of a tile before it issues the last",
    "bias_relu_backward_kernel": "the loads of y and dy are two groups, and 1,018 programs are 1.3 waves",
    "dequantize_kernel": "noise has the order of contiguous images: threads exchange it through shared memory, and a "
    "tile of 16 channels leaves a quarter of the words of 12 channels unused",
}


def missed(rows: dict[tuple[str, ...], tuple[str, ...]]) -> dict[tuple[str, ...], int]:
    """The rows below what is expected of their dtype, with their percent."""
    shares = {row: int(cells[3]) for row, cells in rows.items()}
    return {row: share for row, share in shares.items() if share < EXPECTED[row[1]]}


def spills(spec: Spec) -> list[str]:
    stack = triton_code.compiled(spec, CAPABILITY).stack
    return [f"spills registers into {stack} bytes of stack"] if stack else []


def cells(prediction: Prediction) -> tuple[str, ...]:
    p = prediction
    return f"{p.instructions:.1f}", f"{p.in_flight / 1024:.0f}", p.bound, f"{p.share:.0f}", ""


def listed(text: str) -> dict[tuple[str, ...], tuple[str, ...]]:
    """Cells of the page's rows, by kernel, dtype, layout and shape."""
    rows = [
        tuple(cell.strip() for cell in line.split("|")[1:-1])
        for line in text.splitlines()
        if line[:3] == "| `"
    ]
    return {(row[0].strip("`"), *row[1:4]): row[4:] for row in rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=PAGE)
    options = parser.parse_args()
    text = INTRODUCTION.format(triton=triton.__version__)
    text += f"| {' | '.join(COLUMNS)} |\n|{' --- |' * len(COLUMNS)}\n"
    for row, (spec, launch) in sorted(recorded().items()):
        line = (f"`{row[0]}`", *row[1:], *cells(predict(code_of(spec, launch), spec.warps(), launch)))
        text += f"| {' | '.join(line)} |\n"
        print(*line, *spills(spec), sep=", ", flush=True)
    below = missed(listed(text))
    text += "\n**Below what is expected**: " + ", ".join(
        f"{share}% for {name}" for name, share in EXPECTED.items()
    )
    text += f" are expected, and {len(below)} rows miss them.\n\n"
    for kernel in sorted({row[0] for row in below}):
        numbers = "; ".join(
            f"{', '.join(row[1:])}: {share}%" for row, share in below.items() if row[0] == kernel
        )
        text += f"- `{kernel}` ({numbers}): {REASONS[kernel]}.\n"
    options.out.write_text(text)


if __name__ == "__main__":
    main()
