"""Measures images/s of the trainer's step, options turned on in turn and against batch, and of the loader.

    python -m benchmarks.models.training_speed            # --loader: the loader only, which takes a minute

The step is the one of ``fastflow train``: batch in, forward, backward, clipping, Adam. ``plain`` is plain
PyTorch (benchmarks/models/plain_glow.py) with torch's optimizer and clipping, eager and compiled. FastFlow
starts with stored activations; it folds ActNorm into the convolutions and makes the LU weights of a level
at once. Then options are turned on, each in addition to the previous ones: channels_last, bfloat16
networks, compiled networks, the step captured in a CUDA graph, reversible backprop, each coupling network as
one op instead of compiled networks (on a GPU). Plain PyTorch and the trainer's default are measured at other
batches too.

A way whose losses in the first steps differ from plain PyTorch's has no row, nor has one that is out of
memory or cannot be captured. Without plain PyTorch no way of that shape has a row. The most important ways
come first, because a run may be cut. The loader's rows are batches as the trainer draws them, on the step's
device.

``model_gflop_image`` counts plain PyTorch's forward and backward, a multiply-add as two; work that a way
saves or repeats does not change it. ``tflop_s`` is that times the median images/s. ``matmul_tflop_s`` is
the rate of a large matrix product of the way's precision in the same run (bfloat16 with bfloat16 networks,
else float32, with TF32 if convolutions use it). ``share_of_matmul`` is their ratio.

Rows go to results/training_speed.csv and results/loader.csv. The tables of docs/training.md are rewritten.
"""

import argparse
import functools
import gc
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from benchmarks.models import plain_glow
from benchmarks.tools import harness, page
from fastflow import ops
from fastflow.models import Glow
from fastflow.trainer import activations, data
from fastflow.trainer.captured import CaptureError
from fastflow.trainer.ranks import Ranks
from fastflow.trainer.step import Step

# (side, levels, steps, hidden); batches of the curve; batches at which options are turned on
SIZES = (32, 3, 8, 128), (16, 4, 64), (16,)
ON_A_GPU = (32, 3, 32, 512), (512, 128, 32), (512, 64)
QUICK = (8, 2, 2, 8), (4, 2, 8), (4,)
IN_TURN = ("channels_last", "bf16", "compile", "graph", "reversible", "fused")
ON_GPUS = ("graph", "fused")
DEFAULT = {"cpu": ("channels_last",), "cuda": ("channels_last", "bf16", "graph")}
COMPILED, IS_DEFAULT = "torch.compile of plain", "the trainer's default here"
LEARNING_RATE, CLIP = 1e-4, 100.0


def sizes(options: argparse.Namespace) -> tuple[tuple, tuple, tuple]:
    return QUICK if options.quick else ON_A_GPU if options.device == "cuda" else SIZES


def title(shape: tuple) -> str:
    _, levels, steps, hidden, batch = shape
    return f"L={levels} K={steps} hidden {hidden} batch {batch}"


def model_of(row: dict) -> str:
    return row["size"].split(" batch ")[0]


def batch_of(row: dict) -> int:
    return int(row["size"].split(" batch ")[1])


def build(shape: tuple, device: str, reversible: bool = False, network: str = "auto") -> Glow:
    side, levels, steps, hidden, _ = shape
    torch.manual_seed(0)
    model = Glow(
        (3, side, side), levels=levels, steps=steps, hidden=hidden, reversible=reversible, network=network
    ).to(device)
    model.initialize(batches(shape, 1, device)[0], seed=0)
    return model.train()


def batches(shape: tuple, count: int, device: str) -> list[torch.Tensor]:
    side, *_, batch = shape
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randint(0, 256, (batch, 3, side, side), generator=generator, dtype=torch.uint8).to(device)
        for _ in range(count)
    ]


def plain(shape: tuple, device: str, compiled: bool):
    """``step(x, seed)`` of plain PyTorch; returns bits/dim."""
    model = plain_glow.PlainGlow(build(shape, device)).train()
    forward = torch.compile(model, dynamic=False) if compiled else model
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE, fused=True)

    def step(x, seed):
        optimizer.zero_grad()
        loss = forward(x, ops.uniform_noise(tuple(x.shape), seed, device=x.device)).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        return loss.item()

    return step


def ours(shape: tuple, device: str, on: set[str]):
    model = build(shape, device, "reversible" in on, "fused" if "fused" in on else "auto")
    if "channels_last" in on:
        model.to(memory_format=torch.channels_last)
    if "compile" in on:
        model.compile_networks()
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE, fused=True)
    step = Step(
        model, optimizer, Ranks(), batch_size=shape[-1], clip=CLIP, bf16="bf16" in on, capture="graph" in on
    )
    if "channels_last" not in on:
        step.x = step.x.contiguous()
    return lambda x, seed: step(x, None, seed, LEARNING_RATE)[0]


@functools.cache
def default(shape: tuple, device: str) -> tuple[str, ...]:
    """Options that are on by default in the trainer: reversible backprop if activations do not fit in memory."""
    side, levels, steps, hidden, batch = shape
    on = DEFAULT[device]
    make = functools.partial(Glow, (3, side, side), levels, steps, hidden, reversible=False)
    fit = activations.fit(make, batch, torch.device(device), bf16="bf16" in on)
    return on if fit else (*on, "reversible")


def ways(shape: tuple, device: str, compiled: bool) -> dict[str, set[str] | None]:
    """Options that are on, by name of the way; None: plain PyTorch."""
    on = default(shape, device)
    found: dict[str, set[str] | None] = {"plain": None, f"{', '.join(on)}: {IS_DEFAULT}": set(on)}
    found["fastflow, stored activations"] = on = set()
    for name in IN_TURN:
        if (name in ON_GPUS and device == "cpu") or (name == "compile" and not compiled):
            continue
        on = on | {name}
        if name == "fused":  # a compiled network is not
            on = on - {"compile"}
        found[f"+ {name}"] = on
    return found | ({COMPILED: None} if compiled else {})


def plan(options: argparse.Namespace) -> list[tuple[tuple, str, set[str] | None]]:
    """Shapes, ways and options, the most important first; torch.compile of plain PyTorch last, as slow."""
    model, curve, in_turn = sizes(options)
    every = {
        batch: ways((*model, batch), options.device, options.compiled)
        for batch in dict.fromkeys((*curve, *in_turn))
    }
    order = [(batch, name) for batch in curve for name in list(every[batch])[:2]]
    order += [(batch, name) for batch in in_turn for name in every[batch] if name != COMPILED]
    order += [(batch, COMPILED) for batch, names in every.items() if COMPILED in names]
    return [((*model, batch), name, every[batch][name]) for batch, name in dict.fromkeys(order)]


@functools.cache
def model_flops(shape: tuple) -> int:
    """FLOPs of plain PyTorch's forward and backward on a batch, a multiply-add as two. Uses shapes only."""
    side, levels, steps, hidden, batch = shape
    model = plain_glow.PlainGlow(Glow((3, side, side), levels=levels, steps=steps, hidden=hidden)).to("meta")
    x = torch.empty(batch, 3, side, side, device="meta")
    with FlopCounterMode(display=False) as counter:
        model(x, x).sum().backward()
    return counter.get_total_flops()


def matmul_tflop_s(dtype: torch.dtype, options: argparse.Namespace) -> float:
    """TFLOP/s of a large matrix product at its median time; in TF32 if float32 convolutions use it."""
    n = 128 if options.quick else 8192 if options.device == "cuda" else 2048
    a, b = (torch.randn(n, n, device=options.device).to(dtype) for _ in range(2))
    before, torch.backends.cuda.matmul.allow_tf32 = (
        torch.backends.cuda.matmul.allow_tf32,
        torch.backends.cudnn.allow_tf32,
    )
    a @ b  # the first call takes longer
    taken = harness.turn(lambda: a @ b, min(options.seconds, 1.0), options.device)
    torch.backends.cuda.matmul.allow_tf32 = before
    return 2 * n**3 / np.median(taken) / 1e6


def images_per_second(
    step, shape: tuple, options: argparse.Namespace
) -> tuple[list[float], float, list[float]]:
    """Images/s at p20, p50 and p80 of the times, peak MiB on a GPU (else NaN), losses of the first steps."""
    drawn = batches(shape, 4, options.device)
    losses = [step(drawn[i % 4], i) for i in range(6)]  # compiles, and captures after three
    if options.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    taken, end = [], time.perf_counter() + options.seconds
    while time.perf_counter() < end or len(taken) < 3:
        before = time.perf_counter()
        step(drawn[len(taken) % 4], len(taken))  # reads the loss at its end, so all of it is in the time
        taken.append(time.perf_counter() - before)
    peak = torch.cuda.max_memory_allocated() / 2**20 if options.device == "cuda" else float("nan")
    return [shape[-1] / t for t in np.quantile(taken, harness.QUANTILES)], peak, losses


def attempt(shape: tuple, name: str, on: set[str] | None, options: argparse.Namespace) -> tuple | str:
    """``images_per_second`` of a way, or why it cannot be measured."""
    torch.compiler.reset()
    gc.collect()  # frees the memory of the previous way
    torch.cuda.empty_cache()
    try:
        step = (
            plain(shape, options.device, name == COMPILED) if on is None else ours(shape, options.device, on)
        )
        return images_per_second(step, shape, options)
    except torch.OutOfMemoryError:
        return "out of memory"
    except CaptureError as error:
        return str(error)


def measure(options: argparse.Namespace) -> list[dict]:
    """Measures all ways and writes each row at once. Raises ValueError at the end if a way is not equal."""
    about, rows, wrong, plains = harness.metadata(options.device), [], [], {}
    reached = {dtype: matmul_tflop_s(dtype, options) for dtype in (torch.float32, torch.bfloat16)}
    for shape, name, on in (bar := tqdm(plan(options))):
        where = f"{title(shape)}, {name}"
        bar.set_postfix_str(where)
        if name != "plain" and shape not in plains:
            tqdm.write(f"{where}: no losses of plain PyTorch to compare with; no row is written")
            continue
        found = attempt(shape, name, on, options)
        if isinstance(found, str):
            tqdm.write(f"{where}: {found}; no row is written")
            continue
        (p20, p50, p80), peak, losses = found
        plain_p50, expected = plains.setdefault(shape, (p50, losses))
        # six training steps differ by rounding; bfloat16 networks round to 8 bits
        dtype, tolerance = (torch.bfloat16, 1e-2) if on and "bf16" in on else (torch.float32, 1e-4)
        error = max(abs(a - b) / b for a, b in zip(losses, expected, strict=True))
        if not error <= tolerance:
            wrong.append(f"{where}: losses {losses}, plain PyTorch's {expected}; no row is written")
            continue
        gflop_image = model_flops(shape) / shape[-1] / 1e9
        tflop_s = gflop_image * p50 / 1e3
        row = {"size": title(shape), "way": name}
        row |= {"images_s_p20": f"{p20:.1f}", "images_s_p50": f"{p50:.1f}", "images_s_p80": f"{p80:.1f}"}
        row |= {
            "over_plain": f"{p50 / plain_p50:.3f}",
            "model_gflop_image": f"{gflop_image:.4g}",
            "tflop_s": f"{tflop_s:.3g}",
        }
        row |= {
            "matmul_tflop_s": f"{reached[dtype]:.3g}",
            "share_of_matmul": f"{tflop_s / reached[dtype]:.4f}",
        }
        rows.append(
            row
            | {"peak_mib": f"{peak:.0f}", "error": f"{error:.1e}", "tolerance": f"{tolerance:.0e}"}
            | about
        )
        harness.append(options.results / "training_speed.csv", rows[-1:])
    if wrong:
        raise ValueError("\n".join(wrong))
    return rows


# the loader ---------------------------------------------------------------------------


def sources(options: argparse.Namespace) -> dict[str, tuple[data.Batches, int]]:
    """Batches and workers by name: images in memory, crops of photographs, a folder of 256x256 JPEGs."""
    from PIL import Image

    count, batch = (64, 8) if options.quick else (50_000, 128)
    images = np.random.default_rng(0).integers(0, 256, (count, 3, 32, 32), dtype=np.uint8)
    in_memory = data.Images("as many as CIFAR-10", images, images[:8], horizontal_flip=True)
    if options.device == "cuda":
        in_memory.to("cuda")
    folder = Path(tempfile.mkdtemp(prefix="loader"))
    smooth = np.linspace(0, 255, 256, dtype=np.uint8)
    for i in range(16 if options.quick else 512):
        Image.fromarray(
            np.stack([np.roll(np.add.outer(smooth // 2, smooth // 2), 7 * i + c) for c in range(3)], axis=2)
        ).save(folder / f"{i}.jpg")
    jpegs = data.Folder(folder, 32)
    found = {
        "50,000 images in memory": (in_memory, 0),
        "photographs": (data.Photos(), 0),
        "a folder of JPEGs, 256x256": (jpegs, 0),
    }
    found["a folder of JPEGs, 256x256, 2 workers"] = (jpegs, 2)
    return {name: (data.Batches(source, batch, seed=0), workers) for name, (source, workers) in found.items()}


def drawn_per_second(drawn: data.Batches, workers: int, options: argparse.Namespace) -> float:
    """Images/s of a stream of batches on the step's device."""
    taken = []
    with drawn.stream(0, 10**6, workers) as stream:
        for _ in range(4):  # workers start and draw ahead
            next(stream)
        end = time.perf_counter() + options.seconds
        while time.perf_counter() < end or len(taken) < 3:
            before = time.perf_counter()
            x, _ = next(stream)
            x.to(options.device)
            if options.device == "cuda":
                torch.cuda.synchronize()
            taken.append(time.perf_counter() - before)
    # the mean: workers deliver batches that they drew ahead at once, and the next one after a wait
    return drawn.size * len(taken) / sum(taken)


def measure_loader(options: argparse.Namespace) -> list[dict]:
    about, rows = harness.metadata(options.device), []
    for name, (drawn, workers) in tqdm(sources(options).items(), desc="loader"):
        speed = f"{drawn_per_second(drawn, workers, options):.0f}"
        rows.append({"source": name, "workers": workers, "batch": drawn.size, "images_s": speed} | about)
    harness.append(options.results / "loader.csv", rows)
    return rows


# the page -----------------------------------------------------------------------------


def about(row: dict) -> str:
    return f"{row['device']}, torch {row['torch']}, commit {row['commit']}"


def tables(rows: list[dict], loaded: list[dict]) -> dict[str, str]:
    """The text between each pair of markers on the page; without rows of steps, of the loader only."""
    lines = [[r["source"], f"{int(r['images_s']):,}"] for r in loaded]
    found = {"loader": f"{page.table(['source', 'images/s'], lines)}\n\n({about(loaded[0])})"}
    if not rows:
        return found
    columns = ("size", "way", "images_s_p50", "over_plain", "tflop_s")
    lines = [
        [*(r[c] for c in columns), f"{float(r['share_of_matmul']):.0%}"] for r in sorted(rows, key=batch_of)
    ]
    speed = page.table(
        ["Glow", "step", "images/s", "over plain", "TFLOP/s", "share of a matrix product's"], lines
    )
    speed += "\n\n(p50; FLOPs are plain PyTorch's; the matrix product is large, of the same precision and in"
    return {"speed": f"{speed} the same run; {about(rows[0])})"} | found


def main(argv: list[str] | None = None) -> list[dict]:
    def add(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--docs", type=Path, default=harness.ROOT / "docs", help="folder of training.md")
        parser.add_argument("--loader", action="store_true", help="the loader only, a minute")
        parser.set_defaults(seconds=10.0)

    options = harness.arguments(__doc__, argv, add)
    loaded = measure_loader(options)
    rows = [] if options.loader else measure(options)
    found = tables(rows, loaded)
    page.write(options.docs / "training.md", found)
    print(*found.values(), sep="\n\n")
    return rows


if __name__ == "__main__":
    main()
