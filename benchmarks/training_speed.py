"""Images a second of the trainer's whole step, with what makes it fast turned on in turn, and of the loader that feeds it.

    python -m benchmarks.training_speed

The step is that of ``fastflow train``: batch in, forward, backward, clipping, Adam. ``plain`` is benchmarks/plain_glow.py, ActNorm and
all else unfolded, with torch's optimizer and clipping, eager and compiled; then FastFlow's with stored activations, which folds ActNorm
into the convolutions and makes a level's LU weights at once, and then, each on top of the last: channels_last, bfloat16 networks (each also
without, where it is not faster), compiled networks, the step captured in a CUDA graph, reversible backprop. The loss of the first steps is
compared with plain PyTorch's before anything is timed. The loader's rows are batches as the trainer draws them, on the step's device.

Rows go to results/training_speed.csv, and the tables of docs/training.md are written anew.
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from benchmarks import harness, page, plain_glow
from fastflow import data, ops
from fastflow.models import Glow
from fastflow.ranks import Ranks
from fastflow.step import Step

# name: (side, levels, steps, hidden, batch)
SIZES = {"L=3 K=8 hidden 128 batch 16": (32, 3, 8, 128, 16)}
ON_A_GPU = {"L=3 K=32 hidden 512 batch 64": (32, 3, 32, 512, 64), "L=3 K=32 hidden 512 batch 512": (32, 3, 32, 512, 512)}
QUICK = {"L=2 K=2 hidden 8 batch 4": (8, 2, 2, 8, 4)}
IN_TURN = ("channels_last", "bf16", "compile", "graph", "reversible")
LEARNING_RATE, CLIP = 1e-4, 100.0


def build(shape: tuple, device: str, reversible: bool = False) -> Glow:
    side, levels, steps, hidden, batch = shape
    torch.manual_seed(0)
    model = Glow((3, side, side), levels=levels, steps=steps, hidden=hidden, reversible=reversible).to(device)
    model.initialize(batches(shape, 1, device)[0], seed=0)
    return model.train()


def batches(shape: tuple, count: int, device: str) -> list[torch.Tensor]:
    side, *_, batch = shape
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 256, (batch, 3, side, side), generator=generator, dtype=torch.uint8).to(device) for _ in range(count)]


def plain(shape: tuple, device: str, compiled: bool):
    """``step(x, seed)`` of plain PyTorch, which gives bits/dim."""
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
    model = build(shape, device, "reversible" in on)
    if "channels_last" in on:
        model.to(memory_format=torch.channels_last)
    if "compile" in on:
        model.compile_networks()
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE, fused=True)
    step = Step(model, optimizer, Ranks(), batch_size=shape[-1], clip=CLIP, bf16="bf16" in on, capture="graph" in on)
    if "channels_last" not in on:
        step.x = step.x.contiguous()
    return lambda x, seed: step(x, None, seed, LEARNING_RATE)[0]


def ways(device: str, compiled: bool) -> dict[str, set[str] | None]:
    """``{name: what is on}``; None: plain PyTorch."""
    found: dict[str, set[str] | None] = {"plain": None}
    found["fastflow, stored activations"] = on = set()
    for name in IN_TURN:
        if (name == "graph" and device == "cpu") or (name == "compile" and not compiled):
            continue
        on = on | {name}
        found[f"+ {name}"] = on
    if device == "cpu":  # where bfloat16 may be the slower one
        found["channels_last, reversible: the trainer's default here"] = {"channels_last", "reversible"}
    if compiled:  # last, since compiling a deep one may outlast the time that there is
        found["torch.compile of plain"] = None
    return found


def images_per_second(step, shape: tuple, options: argparse.Namespace) -> tuple[list[float], float, list[float]]:
    """Images/s at p20, p50 and p80 of the times, MiB at the peak where a GPU tells it, and the losses of the first steps."""
    drawn = batches(shape, 4, options.device)
    losses = [step(drawn[i % 4], i) for i in range(6)]  # compiles, and captures after three
    if options.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    taken, end = [], time.perf_counter() + options.seconds
    while time.perf_counter() < end or len(taken) < 3:
        before = time.perf_counter()
        step(drawn[len(taken) % 4], len(taken))  # ends with a look at the loss, so that all of it is in the time
        taken.append(time.perf_counter() - before)
    peak = torch.cuda.max_memory_allocated() / 2**20 if options.device == "cuda" else float("nan")
    return [shape[-1] / t for t in np.quantile(taken, harness.QUANTILES)], peak, losses


def measure(size: str, shape: tuple, options: argparse.Namespace) -> list[dict]:
    about, rows, wrong, expected = harness.metadata(options.device), [], [], None
    for name, on in (bar := tqdm(ways(options.device, compiled=options.compiled).items(), desc=size)):
        bar.set_postfix_str(name)
        torch.compiler.reset()
        step = plain(shape, options.device, "compile" in name) if on is None else ours(shape, options.device, on)
        (p20, p50, p80), peak, losses = images_per_second(step, shape, options)
        del step
        expected = expected or losses
        # six steps of training apart by rounding; bfloat16 networks round to 8 bits
        error, tolerance = max(abs(a - b) / b for a, b in zip(losses, expected, strict=True)), 1e-2 if on and "bf16" in on else 1e-4
        if not error <= tolerance:
            wrong.append(f"{size}, {name}: losses {losses}, plain PyTorch's {expected}; no row is written")
            continue
        row = {"size": size, "way": name, "images_s_p20": f"{p20:.1f}", "images_s_p50": f"{p50:.1f}", "images_s_p80": f"{p80:.1f}"}
        row |= {"over_plain": f"{p50 / float(rows[0]['images_s_p50']) if rows else 1:.3f}", "peak_mib": f"{peak:.0f}"}
        rows.append(row | {"error": f"{error:.1e}", "tolerance": f"{tolerance:.0e}"} | about)
        harness.append(options.results / "training_speed.csv", rows[-1:])
    if wrong:
        raise ValueError("\n".join(wrong))
    return rows


# the loader -------------------------------------------------------------------------------------------------------------------


def sources(options: argparse.Namespace) -> dict[str, tuple[data.Batches, int]]:
    """``{name: (batches, workers)}``: of images in memory, crops of photographs, and a folder of JPEGs of 256x256."""
    from PIL import Image

    count, batch = (64, 8) if options.quick else (50_000, 128)
    images = np.random.default_rng(0).integers(0, 256, (count, 3, 32, 32), dtype=np.uint8)
    in_memory = data.Images("as many as CIFAR-10", images, images[:8], flip=True)
    if options.device == "cuda":
        in_memory.to("cuda")
    folder = Path(tempfile.mkdtemp(prefix="loader"))
    smooth = np.linspace(0, 255, 256, dtype=np.uint8)
    for i in range(16 if options.quick else 512):
        Image.fromarray(np.stack([np.roll(np.add.outer(smooth // 2, smooth // 2), 7 * i + c) for c in range(3)], axis=2)).save(
            folder / f"{i}.jpg"
        )
    jpegs = data.Folder(folder, 32)
    found = {"50,000 images in memory": (in_memory, 0), "photographs": (data.Photos(), 0), "a folder of JPEGs, 256x256": (jpegs, 0)}
    found["a folder of JPEGs, 256x256, 2 workers"] = (jpegs, 2)
    return {name: (data.Batches(source, batch, seed=0), workers) for name, (source, workers) in found.items()}


def measure_loader(options: argparse.Namespace) -> list[dict]:
    about, rows = harness.metadata(options.device), []
    for name, (drawn, workers) in tqdm(sources(options).items(), desc="loader"):
        stream, taken = drawn.stream(0, 10**6, workers), []
        for _ in range(4):  # workers start, and have drawn ahead
            next(stream)
        end = time.perf_counter() + options.seconds
        while time.perf_counter() < end or len(taken) < 3:
            before = time.perf_counter()
            x, _ = next(stream)
            x.to(options.device)
            if options.device == "cuda":
                torch.cuda.synchronize()
            taken.append(time.perf_counter() - before)
        # the mean: workers hand over what they drew ahead in no time, and then make one wait
        speed = drawn.size * len(taken) / sum(taken)
        rows.append({"source": name, "workers": workers, "batch": drawn.size, "images_s": f"{speed:.0f}"} | about)
    harness.append(options.results / "loader.csv", rows)
    return rows


# the page ---------------------------------------------------------------------------------------------------------------------


def tables(rows: list[dict], loaded: list[dict]) -> dict[str, str]:
    about = f"{rows[0]['device']}, torch {rows[0]['torch']}, commit {rows[0]['commit']}"
    lines = [[r["size"], r["way"], r["images_s_p50"], r["over_plain"]] for r in rows]
    speed = f"{page.table(['Glow', 'step', 'images/s', 'over plain'], lines)}\n\n(p50, {about})"
    lines = [[r["source"], f"{int(r['images_s']):,}"] for r in loaded]
    return {"speed": speed, "loader": f"{page.table(['source', 'images/s'], lines)}\n\n({about})"}


def main(argv: list[str] | None = None) -> list[dict]:
    def add(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--docs", type=Path, default=harness.ROOT / "docs", help="folder of training.md")
        parser.set_defaults(seconds=20.0)

    options = harness.arguments(__doc__, argv, add)
    sizes = QUICK if options.quick else ON_A_GPU if options.device == "cuda" else SIZES
    loaded = measure_loader(options)
    rows = [row for size, shape in sizes.items() for row in measure(size, shape, options)]
    found = tables(rows, loaded)
    page.write(options.docs / "training.md", "training_speed", found)
    print(*found.values(), sep="\n\n")
    return rows


if __name__ == "__main__":
    main()
