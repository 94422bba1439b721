"""Compiles each Triton kernel; reports registers, spills, shared memory, widths of accesses. Needs no GPU.

    python -m benchmarks.tools.triton_code

Records the launches of a Glow for CIFAR-10 (training, encoding, decoding, sampling) and of ops that it does
not call, compiles each distinct one for sm_80, sm_90 and sm_100, and writes docs/triton_code.md.
"""

import argparse
import concurrent.futures
import importlib
import math
import multiprocessing
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

import fastflow
from fastflow import ops
from fastflow.models import Glow
from fastflow.nn import AffineCoupling
from fastflow.ops.mixture_cdf import mixture_cdf_parameters
from fastflow.ops.spline import parameters_per_element

PAGE = Path(__file__).parents[2] / "docs" / "triton_code.md"
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
CAPABILITIES = (80, 90, 100)
SHARED = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}  # bytes that a thread block may take
# of a multiprocessor; each thread block takes 1 KiB of shared memory for the system
REGISTERS, WARPS, THREAD_BLOCKS, RESERVED = 65536, 64, 32, 1 << 10
TENSOR_MEMORY = 512  # columns of a multiprocessor of sm_100, in which tcgen05 accumulates
PRODUCTS = {80: "mma.sync", 90: "wgmma", 100: "tcgen05"}  # tensor core instructions of each generation
PRODUCT_ROWS = 64  # of a matrix that wgmma and tcgen05 need
BATCH = 64  # as in training, since Triton specializes kernels for divisible sizes; nothing is computed
IMAGE = (3, 32, 32)
MANY = 512  # images, for kernels that share few among more programs
HIDDEN = 512  # channels of a coupling network
VECTORS, BINS = (4096, 16), (8, 16)  # of splines
COMPONENTS = (4, 8)  # of mixtures
PIXELS = 2**15  # of a batch, at most, for kernels of which more pixels give no other launch

# recording ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Spec:
    """The inputs of a kernel's compilation, as Triton's launcher derives them, and its row in the table."""

    module: str
    kernel: str
    signature: tuple
    constexprs: tuple
    attrs: tuple
    options: tuple
    images: bool  # whether an argument is a batch of images
    dtype: str
    layout: str
    shape: str

    def variant(self) -> tuple[str, ...]:
        """Constants to show: not sizes of tiles and images, vector lengths, dtypes or floats."""
        shown = []
        for name, value in self._constants().items():
            if (
                name.startswith(("TILE", "VEC_"))
                or name in ("IN", "OUT", "HEIGHT", "WIDTH", "LOG_DETS")
                or value is None
                or isinstance(value, (tuple, float, triton.language.dtype))
            ):
                continue
            if isinstance(value, bool):
                shown += [name.lower()] * value
            else:
                shown.append(f"{name.lower()} {value}")
        return tuple(shown)

    def tile(self) -> str:
        return times(v for k, v in self._constants().items() if k.startswith("TILE"))

    def warps(self) -> int:
        return dict(self.options)["num_warps"]

    def row(self) -> tuple[str, ...]:
        return self.kernel, *self.variant(), self.dtype, self.layout, self.shape

    def function(self) -> JITFunction:
        return getattr(importlib.import_module(self.module), self.kernel)

    def _constants(self) -> dict:
        # an int of value 1 is compiled in as well, but is not declared constexpr
        declared = self.function().params
        return {declared[i].name: value for (i, *_), value in self.constexprs if declared[i].is_constexpr}


def times(sizes: Iterable) -> str:
    return " × ".join(map(str, sizes)) or "–"


def _layout(t: Tensor) -> str:
    return "channels_last" if t.stride(1) == 1 and t.shape[1] > 1 else "contiguous"


def _dtype(t: Tensor) -> str:
    return str(t.dtype).removeprefix("torch.")


def spec_of(kernel: JITFunction, args: tuple, kwargs: dict) -> Spec:
    """The spec that Triton would compile for these arguments, from Triton's own binder."""
    backend = make_backend(GPUTarget("cuda", CAPABILITIES[0], 32))
    bound, specialization, options = create_function_from_signature(kernel.signature, kernel.params, backend)(
        *args, **kwargs
    )
    _, signature, constexprs, attrs = kernel._pack_args(backend, kwargs, bound, specialization, options)
    tensors = {name: t for name, t in bound.items() if isinstance(t, Tensor)}
    images = {name: t for name, t in tensors.items() if t.ndim == 4}
    described = images or tensors
    first = next(iter(described.values()))
    expanded = [f", {name} expanded" for name, t in described.items() if 0 in t.stride()]
    layouts = {_layout(t) for t in described.values() if t.ndim > 2 and 0 not in t.stride()}
    return Spec(
        module=kernel.module,
        kernel=kernel.__name__,
        signature=tuple(signature.items()),
        constexprs=tuple(constexprs.items()),
        attrs=tuple((path, tuple(map(tuple, v))) for path, v in attrs.items()),
        options=tuple(sorted(options.items())),
        images=bool(images),
        dtype=", ".join(
            [
                _dtype(first),
                *(f"{name} {_dtype(t)}" for name, t in described.items() if t.dtype != first.dtype),
            ]
        ),
        layout=(layouts.pop() if len(layouts) == 1 else "mixed" if layouts else "–") + "".join(expanded),
        shape=times(first.shape[1:]),
    )


@dataclass(frozen=True)
class Launch:
    """What a launch of a kernel processes."""

    programs: int
    tiles_per_program: int
    moved: int  # bytes of its batches of images, each once
    elements: int  # of the first image


def launch_of(kernel: JITFunction, grid: tuple[int, ...], args: tuple) -> Launch:
    images = {t.data_ptr(): t for t in args if isinstance(t, Tensor) and t.ndim == 4}
    return Launch(
        programs=math.prod(grid),
        tiles_per_program=dict(zip(kernel.arg_names, args, strict=False)).get("tiles_per_program", 1),
        moved=sum(t.numel() * t.element_size() for t in images.values()),
        elements=next(iter(images.values())).numel() if images else 0,
    )


@contextmanager
def recording() -> Iterator[dict[Spec, Launch]]:
    """Collects the specs of a block's launches. No kernel runs; outputs hold uninitialized memory."""
    from fastflow.triton_kernels import tiles

    if tiles.INTERPRETED:
        raise RuntimeError(
            "TRITON_INTERPRET=1: Triton interprets kernels in this process and compiles none; unset it"
        )
    specs: dict[Spec, Launch] = {}
    run = JITFunction.run

    def record(kernel, *args, grid, warmup, **kwargs):
        specs[spec_of(kernel, args, kwargs)] = launch_of(kernel, grid, args)

    JITFunction.run, tiles.INTERPRETED = record, True  # otherwise CPU tensors are refused
    try:
        with fastflow.backend("triton"):
            yield specs
    finally:
        JITFunction.run, tiles.INTERPRETED = run, False


def _train(model: Glow, images: Tensor) -> list[tuple[AffineCoupling, Tensor]]:
    """Runs a training step; returns each coupling with its input."""
    given = []

    def keep(coupling, args, output):
        given.append((coupling, args[0].detach()))

    hooks = [m.register_forward_hook(keep) for m in model.modules() if isinstance(m, AffineCoupling)]
    model(images).mean().backward()
    for hook in hooks:
        hook.remove()
    return given


@torch.no_grad()
def _from_output(coupling: AffineCoupling, y: Tensor) -> None:
    """Launches the kernels of backprop without stored activations."""
    h = coupling.net(coupling.network_input(y))
    variant = {
        name: getattr(coupling, name)
        for name in ("mask", "swap_halves", "scale", "affine_order", "params_layout")
    }
    dlog_det = y.new_empty(y.shape[0])
    ops.affine_coupling_inverse_backward(y, h, coupling.factor(y), torch.empty_like(y), dlog_det, **variant)
    channel = y.new_empty(y.shape[1])
    ops.actnorm_inverse_backward(y, channel, channel, torch.empty_like(y), dlog_det)


def _actnorm(x: Tensor) -> None:
    """Launches ActNorm as a separate layer, and its initialization; Glow folds it into the convolution."""
    x = x.clone().requires_grad_()
    ops.actnorm_statistics(x)
    channel = x.new_empty(x.shape[1]).requires_grad_()
    y, log_det = ops.actnorm(x, channel, channel)
    torch.autograd.backward([y, log_det], [torch.empty_like(y), torch.empty_like(log_det)])
    with torch.no_grad():
        ops.actnorm(x, channel, channel, inverse=True)


def _bias_relu(x: Tensor, dtype: torch.dtype) -> None:
    """Launches bias, scale and ReLU of a network's hidden activations; the parameters are float32."""
    hidden = torch.empty(len(x), HIDDEN, *x.shape[2:], dtype=dtype).contiguous(memory_format=_format(x))
    bias = torch.empty(HIDDEN).requires_grad_()
    for options in ({}, {"log_scale": bias}, {"log_scale": bias, "relu": False}):
        ops.bias_relu(hidden, bias, **options).backward(torch.empty_like(hidden))
        ops.bias_relu(hidden.detach(), bias, **options, inplace=True)  # hidden itself stays out of its graph


def _glow_network(x: Tensor, dtype: torch.dtype) -> None:
    """Launches the coupling network on the half of x that a coupling passes on, for few and for many images."""

    def weight(*size: int) -> Tensor:
        return torch.empty(size, dtype=dtype).contiguous(memory_format=torch.channels_last)

    n, c = x.shape[:2]
    w1, w2, w3 = weight(HIDDEN, c // 2, 3, 3), weight(HIDDEN, HIDDEN, 1, 1), weight(c, HIDDEN, 3, 3)
    b1, b2, b3 = torch.empty(HIDDEN), torch.empty(HIDDEN), torch.empty(c)
    for images in (n, MANY):
        half = (
            torch.empty(images, *x.shape[1:], dtype=dtype).contiguous(memory_format=_format(x)).chunk(2, 1)[0]
        )
        for tf32 in (True, False)[: 2 if dtype == torch.float32 else 1]:
            y = ops.glow_network(half, w1, b1, w2, b2, w3, b3, tf32=tf32)
            if ops.positions(y) * images <= PIXELS:
                torch.ops.fastflow.glow_network_backward(half, w1, b1, w2, b2, w3, b3, tf32, y)


def _variational(images: Tensor) -> None:
    """Launches dequantization with noise from a model, which has a gradient (arXiv:1902.00275)."""
    noise = (
        ops.uniform_noise(tuple(images.shape), seed=0)
        .contiguous(memory_format=_format(images))
        .requires_grad_()
    )
    y, log_det = ops.dequantize(images, noise=noise, scale=0.9, shift=0.05, logit=True)
    torch.autograd.backward([y, log_det], [torch.empty_like(y), torch.empty_like(log_det)])


def _spline(x: Tensor, bins: int, first_channel: int = 0, channel_order: Tensor | None = None) -> None:
    """Launches splines of half of the channels: forward, inverse, gradients, gradients from the output."""
    each = parameters_per_element(bins, "linear", "fastflow")
    h = torch.empty(len(x), x.shape[1] // 2 * each, *x.shape[2:])
    h = h.contiguous(memory_format=_format(x)) if x.ndim == 4 else h
    form = {"bins": bins, "first_channel": first_channel}
    y, log_det = ops.spline(x.requires_grad_(), h.requires_grad_(), channel_order, **form)
    torch.autograd.backward([y, log_det], [torch.empty_like(y), torch.empty_like(log_det)])
    with torch.no_grad():
        ops.spline(x, h, channel_order, **form, inverse=True)
        ops.spline_inverse_backward(x, h, channel_order, torch.empty_like(x), log_det, **form)


def _mixture(x: Tensor, components: int, channel_order: Tensor | None = None) -> None:
    """Launches mixtures of half of the channels, as :func:`_spline`."""
    h = torch.empty(len(x), x.shape[1] // 2 * mixture_cdf_parameters(components), *x.shape[2:])
    h = h.contiguous(memory_format=_format(x)) if x.ndim == 4 else h
    form = {"components": components}
    y, log_det = ops.mixture_cdf(x.requires_grad_(), h.requires_grad_(), channel_order, **form)
    torch.autograd.backward([y, log_det], [torch.empty_like(y), torch.empty_like(log_det)])
    with torch.no_grad():
        ops.mixture_cdf(x, h, channel_order, **form, inverse=True)
        ops.mixture_cdf_inverse_backward(x, h, channel_order, torch.empty_like(x), log_det, **form)


def _format(x: Tensor) -> torch.memory_format:
    return (
        torch.channels_last if x.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
    )


def _pixels(shape: str) -> int:
    return math.prod(int(size) for size in shape.split(" × ")[1:])


def recorded() -> list[Spec]:
    """The distinct launches of a Glow L=3 K=1 and of single ops: both layouts, bfloat16 networks."""
    specs: dict[Spec, Launch] = {}
    for memory_format, network in (
        (torch.contiguous_format, torch.float32),
        (torch.channels_last, torch.float32),
        (torch.channels_last, torch.bfloat16),
    ):
        images = torch.randint(256, (BATCH, *IMAGE), dtype=torch.uint8).contiguous(
            memory_format=memory_format
        )
        model = Glow(IMAGE, levels=3, steps=1, hidden=8, reversible=False).to(memory_format=memory_format)
        with fastflow.backend("reference"):
            model.initialize(images)
        autocast = nullcontext() if network == torch.float32 else torch.autocast("cpu", dtype=network)
        with recording() as launched, autocast:
            for coupling, x in _train(model, images):
                _from_output(coupling, x)
                _bias_relu(x, network)
                if memory_format == torch.channels_last:
                    _glow_network(x, network)
                if network == torch.float32:
                    _actnorm(x)
            latents = model.encode(images)
            model.decode(tuple(z.nan_to_num_() for z in latents))  # uninitialized memory may hold NaN
            model.sample(BATCH)
            if network == torch.float32:
                _variational(images)
                _spline(torch.empty(BATCH, 12, 16, 16).contiguous(memory_format=memory_format), BINS[0], 6)
                _mixture(
                    torch.empty(BATCH, 12, 16, 16).contiguous(memory_format=memory_format), COMPONENTS[0]
                )
        specs |= launched
    with recording() as launched:
        for bins in BINS:
            _spline(torch.empty(VECTORS), bins, channel_order=torch.arange(VECTORS[1]))
        for components in COMPONENTS:
            _mixture(torch.empty(VECTORS), components, torch.arange(VECTORS[1]))
    specs |= launched
    layouts = ("contiguous", "channels_last", "mixed", "–")
    return sorted(
        specs,
        key=lambda s: (
            s.module,
            s.kernel,
            s.dtype,
            layouts.index(s.layout.split(",")[0]),
            s.variant(),
            -_pixels(s.shape),
        ),
    )


# compiling ----------------------------------------------------------------------------

# from PTX: nvdisasm takes as long as compiling; ptxas keeps the widths of PTX, and spills are on the stack
PTX_ACCESS = re.compile(r"\b(ld|st)\.global[.\w:]*?(?:\.v(\d))?\.[busf](\d+)\b")
PTX_PRODUCT = re.compile(r"\b(mma\.sync|wgmma|tcgen05)(?=\.mma|\.aligned)")
TTIR_PRODUCT = re.compile(r"tt\.dot .*-> tensor<(\d+)x")
TTIR_ACCESS = re.compile(r"tt\.(load|store) .*: tensor<((?:\d+x)+)!tt\.ptr<[fi]32")


@dataclass(frozen=True)
class Resources:
    registers: int
    stack: int
    shared: int
    loads: Counter  # number of instructions by bytes per thread
    stores: Counter
    loaded: int  # bytes per thread of the blocks of 4-byte elements that a program reads, if 16 or more
    stored: int
    products: Counter  # number of tensor core instructions by kind
    tensor_memory: int  # columns per program, on sm_100
    product_rows: int  # of the smallest matrix product, 0 if there is none

    def occupancy(self, capability: int, warps: int) -> int:
        """Percent of a multiprocessor's warps that run at once."""
        return 100 * self.blocks(capability, warps) * warps // WARPS

    def blocks(self, capability: int, warps: int) -> int:
        """Thread blocks that a multiprocessor runs at once, by registers, shared and tensor memory."""
        warp_registers = -(-32 * self.registers // 256) * 256
        shared = SHARED[capability] + RESERVED
        return min(
            REGISTERS // (warp_registers * warps),
            shared // (self.shared + RESERVED),
            WARPS // warps,
            THREAD_BLOCKS,
            TENSOR_MEMORY // max(self.tensor_memory, 1),
        )


def _compile(spec: Spec, capability: int) -> CompiledKernel:
    source = ASTSource(
        spec.function(),
        signature=dict(spec.signature),
        constexprs=dict(spec.constexprs),
        attrs={path: [list(v) for v in values] for path, values in spec.attrs},
    )
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=dict(spec.options))


def cuobjdump(option: str, kernel: CompiledKernel) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [TOOLS / "cuobjdump", option, file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def machine_code(spec: Spec, capability: int) -> str:
    return cuobjdump("--dump-sass", _compile(spec, capability))


def compiled(spec: Spec, capability: int) -> Resources:
    kernel = _compile(spec, capability)
    usage = cuobjdump("--dump-resource-usage", kernel)
    widths = {"ld": Counter(), "st": Counter()}
    for kind, vector, bits in PTX_ACCESS.findall(kernel.asm["ptx"]):
        widths[kind][int(vector or 1) * int(bits) // 8] += 1
    blocks = Counter()
    for kind, shape in TTIR_ACCESS.findall(kernel.asm["ttir"]):
        each = 4 * math.prod(int(size) for size in shape.split("x") if size) // (32 * spec.warps())
        blocks[kind] += each if each >= 16 else 0
    return Resources(
        registers=int(re.search(r"REG:(\d+)", usage)[1]),
        stack=int(re.search(r"STACK:(\d+)", usage)[1]),
        shared=kernel.metadata.shared,  # without the 1 KiB that the system reserves from sm_90 on
        loads=widths["ld"],
        stores=widths["st"],
        loaded=blocks["load"],
        stored=blocks["store"],
        tensor_memory=kernel.metadata.tmem_size,
        products=Counter(PTX_PRODUCT.findall(kernel.asm["ptx"])),
        product_rows=min(map(int, TTIR_PRODUCT.findall(kernel.asm["ttir"])), default=0),
    )


def defects(spec: Spec, found: Resources, capability: int) -> list[str]:
    """Spills, too much shared memory, matrix products without the generation's tensor core instructions.

    Also accesses of less than 16 bytes per thread to contiguous images of 4-byte elements.
    """
    faults = []
    if found.shared > SHARED[capability]:
        faults.append(f"takes {found.shared} of {SHARED[capability]} bytes of shared memory")
    products = PRODUCTS[capability] if found.product_rows >= PRODUCT_ROWS else PRODUCTS[80]
    if found.product_rows and not found.products[products]:
        faults.append(f"multiplies matrices without {products}")
    if found.stack:
        faults.append(f"spills registers into {found.stack} bytes of stack")
    if spec.images and spec.layout == "contiguous":
        for verb, accesses, expected in (
            ("loads", found.loads, found.loaded),
            ("stores", found.stores, found.stored),
        ):
            wide = sum(width * n for width, n in accesses.items() if width >= 16)
            if wide < expected:
                faults.append(f"{verb} {wide} of {expected} bytes per thread 16 or more at a time")
    return faults


# the page -----------------------------------------------------------------------------

COLUMNS = (
    "variant",
    "dtype",
    "layout",
    "shape",
    "warps",
    "tile",
    "registers",
    "spills",
    "shared",
    "occupancy",
    "products",
    "load",
    "store",
)
RECORDED = 6  # columns that are known before compilation
INTRODUCTION = f"""# Machine code of the Triton kernels

This page lists every kernel of `triton_kernels/` as Triton {{triton}} compiles it for sm_80, sm_90 and
sm_100. The launches are recorded from a Glow for CIFAR-10 (L=3, batch {BATCH}: training, encoding, decoding,
sampling; gradients from stored activations and from the output) and from single ops at the shapes of its
levels.
`python -m benchmarks.tools.triton_code` writes the page and needs no GPU. It describes compiled code; nothing
here has been timed.

| column | meaning |
| --- | --- |
| variant | constants that the rows of a kernel do not share; the shared ones are listed above its table |
| dtype | dtype of the first image; other dtypes follow ("h bfloat16": coupling network under autocast) |
| layout | memory layout; "mixed" if the tensors have both |
| shape | shape of one sample of the first image, or of the first vectors |
| registers | registers per thread; a multiprocessor has 65,536 |
| spills | bytes of stack per thread, for registers that did not fit |
| shared | bytes of shared memory per program |
| occupancy | predicted: percent of a multiprocessor's 64 warps, by registers, shared memory and (sm_100) tensor memory |
| products | tensor core instructions in the code: `mma.sync` on sm_80, `wgmma` on sm_90, `tcgen05` on sm_100 |
| load, store | bytes of the widest load and store of a thread |

Three values are for sm_80 / sm_90 / sm_100; a single value applies to all three. Settings that are not listed
are the same in every row.
"""


def described(specs: list[Spec]) -> dict[str, tuple[str, list[tuple[str, ...]]]]:
    """For each kernel the constants that all its rows share, and the columns known before compilation."""
    kernels = {}
    for kernel in sorted({spec.kernel for spec in specs}):
        those = [spec for spec in specs if spec.kernel == kernel]
        shared = set.intersection(*(set(spec.variant()) for spec in those))
        rows = [
            (
                ", ".join(v for v in spec.variant() if v not in shared) or "–",
                spec.dtype,
                spec.layout,
                spec.shape,
                str(spec.warps()),
                spec.tile(),
            )
            for spec in those
        ]
        kernels[kernel] = ", ".join(v for v in those[0].variant() if v in shared), rows
    return kernels


def _three(values: Iterable) -> str:
    values = [str(v) for v in values]
    return values[0] if len(set(values)) == 1 else " / ".join(values)


def _products(found: Resources) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in sorted(found.products.items())) or "–"


def _measured(spec: Spec, found: list[Resources]) -> tuple[str, ...]:
    each = list(zip(CAPABILITIES, found, strict=True))
    return (
        " / ".join(str(f.registers) for f in found),
        _three(f.stack for f in found),
        _three(f.shared for f in found),
        _three(f.occupancy(capability, spec.warps()) for capability, f in each),
        _three(_products(f) for f in found),
        *(_three(max(getattr(f, kind), default="–") for f in found) for kind in ("loads", "stores")),
    )


def _table(rows: list[tuple[str, ...]]) -> str:
    """A table in which rows that differ only in their shapes are merged."""
    at = COLUMNS.index("shape")
    merged: dict[tuple, list[str]] = {}
    for row in rows:
        shapes = merged.setdefault((*row[:at], *row[at + 1 :]), [])
        if row[at] not in shapes:
            shapes.append(row[at])
    lines = [COLUMNS, ["---"] * len(COLUMNS)]
    lines += [(*key[:at], ", ".join(shapes), *key[at:]) for key, shapes in merged.items()]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def page(specs: list[Spec], found: dict[Spec, list[Resources]]) -> str:
    text = INTRODUCTION.format(triton=triton.__version__)
    for kernel, (shared, rows) in described(specs).items():
        those = [spec for spec in specs if spec.kernel == kernel]
        text += f"\n## {kernel}\n\n" + f"All: {shared}.\n\n" * bool(shared)
        text += _table([(*row, *_measured(spec, found[spec])) for row, spec in zip(rows, those, strict=True)])
    return text


def listed(text: str) -> dict[str, tuple[str, set[tuple[str, ...]]]]:
    """The part of a page that is known before compilation, in the form of :func:`described`."""
    at, kernels = COLUMNS.index("shape"), {}
    for section in text.split("\n## ")[1:]:
        kernel, _, body = section.partition("\n")
        shared = re.search(r"^All: (.*)\.$", body, re.MULTILINE)
        lines = [
            [cell.strip() for cell in line.strip("|").split("|")]
            for line in body.splitlines()
            if line.startswith("|")
        ][2:]
        rows = {
            (*line[:at], shape, *line[at + 1 : RECORDED]) for line in lines for shape in line[at].split(", ")
        }
        kernels[kernel] = shared[1] if shared else "", rows
    return kernels


def compile_all(
    specs: list[Spec], processes: int, done: Callable[[], object] = lambda: None
) -> dict[Spec, list[Resources]]:
    """Resources of each spec on each architecture."""
    jobs = [(spec, capability) for spec in specs for capability in CAPABILITIES]
    with concurrent.futures.ProcessPoolExecutor(
        processes, mp_context=multiprocessing.get_context("spawn")
    ) as pool:
        futures = [pool.submit(compiled, *job) for job in jobs]
        for future in concurrent.futures.as_completed(futures):
            future.result()
            done()
    found = iter(futures)
    return {spec: [next(found).result() for _ in CAPABILITIES] for spec in specs}


def main() -> None:
    from tqdm import tqdm

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--out", type=Path, default=PAGE)
    options = parser.parse_args()

    specs = recorded()
    with tqdm(total=len(specs) * len(CAPABILITIES), desc="compiling") as bar:
        found = compile_all(specs, options.processes, bar.update)
    options.out.write_text(page(specs, found))
    for spec, each in found.items():
        for capability, resources in zip(CAPABILITIES, each, strict=True):
            for fault in defects(spec, resources, capability):
                print(f"sm_{capability}", *spec.row(), fault, sep=", ")


if __name__ == "__main__":
    main()
