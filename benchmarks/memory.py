"""Memory and time of a training step of Glow, by how activations come back in backward.

    pip install --no-deps memcnn    # to compare with; left out where it is not installed
    python -m benchmarks.memory

Forward and backward of a Glow L=3, ways side by side: ``stored`` keeps every activation, ``checkpoint`` is torch.utils.checkpoint around
each step, ``memcnn`` its InvertibleModuleWrapper around each step (it knows no log-det, so its loss has none of the steps'),
``reversible`` is this library's. Gradients are compared with those of ``stored``, without the log-dets where the way has none, before
anything is measured.

Memory: each depth K in a process of its own, its peak resident memory (on a GPU the allocator's) less weights and gradients; what a step
more, one at each level, adds. Rows go to results/memory.csv. Time: of the ways in turn, in one process; rows go to results/memory_time.csv.
The tables of docs/memory.md and its picture are written anew.
"""

import argparse
import importlib.util
import json
import os
import re
import resource
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from benchmarks import harness, page
from fastflow.models import Glow

WAYS = ("stored", "checkpoint", "memcnn", "reversible")
MIB = 2**20
ROUNDS = 7


class Checkpointed(nn.Module):
    def __init__(self, step: nn.Module) -> None:
        super().__init__()
        self.step = step

    def forward(self, x, context=None):
        return checkpoint(self.step, x, use_reentrant=False)


class OutputAlone(nn.Module):
    """A step as memcnn takes it: a tensor in, a tensor out."""

    def __init__(self, step: nn.Module) -> None:
        super().__init__()
        self.step = step

    def forward(self, x):
        return self.step(x)[0]

    def inverse(self, z):
        return self.step.inverse(z)[0]


class Memcnn(nn.Module):
    def __init__(self, step: nn.Module) -> None:
        super().__init__()
        with warnings.catch_warnings(action="ignore", category=FutureWarning):
            from memcnn import InvertibleModuleWrapper
        self.step = InvertibleModuleWrapper(OutputAlone(step))

    def forward(self, x, context=None):
        # the wrapper empties its input, which for the first step is an image that is needed again
        return self.step(x.clone() if x.is_leaf else x), x.new_zeros(x.shape[0])


class Steps(nn.Module):
    """A level whose steps run one by one."""

    def __init__(self, level: nn.Module, wrap: type[nn.Module]) -> None:
        super().__init__()
        self.squeeze = level.squeeze
        self.steps = nn.ModuleList(wrap(step) for step in level.steps)

    def forward(self, x, context=None):
        x, log_det = self.squeeze(x)
        for step in self.steps:
            x, step_log_det = step(x)
            log_det = log_det + step_log_det
        return x, log_det


class WithoutLogDet(nn.Module):
    """What memcnn's gradients are compared with: a level stored, without the log-dets of its steps."""

    def __init__(self, level: nn.Module) -> None:
        super().__init__()
        self.level = level

    def forward(self, x, context=None):
        z, log_det = self.level(x)
        return z, torch.zeros_like(log_det)


def images(options: argparse.Namespace) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (options.batch, 3, options.side, options.side), dtype=torch.uint8, generator=generator).to(options.device)


def build(way: str, k: int, options: argparse.Namespace) -> Glow:
    """A Glow initialised on the images, the same for each way; parameters are those of the plain model, in its order."""
    torch.manual_seed(0)
    shape = (3, options.side, options.side)
    model = Glow(shape, levels=3, steps=k, hidden=options.hidden, reversible=way == "reversible").to(options.device)
    model.initialize(images(options)[:4], seed=0)
    with torch.no_grad():
        for p in model.parameters():  # a network that ends in zeros would hide what goes wrong before
            p.add_(0.01 * torch.randn_like(p))
    wrap = {"checkpoint": Checkpointed, "memcnn": Memcnn}.get(way)
    if wrap is not None:
        model.flows = nn.ModuleList(Steps(level, wrap) for level in model.flows)
    elif way == "without log-det":
        model.flows = nn.ModuleList(WithoutLogDet(level) for level in model.flows)
    return model


def step(model: Glow, x: Tensor) -> None:
    model.zero_grad()
    model(x, seed=1).mean().backward()
    if x.device.type == "cuda":
        torch.cuda.synchronize()


def check(options: argparse.Namespace) -> dict[str, float]:
    """The relative error of each way's gradient, at K = 2 and in float64. Raises ValueError where it is none of rounding's."""
    x, errors = images(options)[:2], {}

    def gradient(way: str) -> Tensor:
        model = build(way, 2, options).double()
        step(model, x)
        return torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in model.parameters()])

    for way in ways():
        truth = gradient("without log-det" if way == "memcnn" else "stored")
        errors[way] = ((gradient(way) - truth).norm() / truth.norm()).item()
        if not errors[way] <= 1e-9:
            raise ValueError(f"{way}: its gradient is off by {errors[way]:.1e}, expected 1e-9; no row is written")
    return errors


def ways() -> list[str]:
    return [way for way in WAYS if way != "memcnn" or importlib.util.find_spec("memcnn")]


def peak(way: str, k: int, options: argparse.Namespace) -> float:
    """In this process: MiB at the peak of two steps, less weights and gradients."""
    x, model = images(options), build(way, k, options)
    if options.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for _ in range(2):
        step(model, x)
    most = torch.cuda.max_memory_allocated() if options.device == "cuda" else most_resident()
    return (most - sum(p.nbytes + (0 if p.grad is None else p.grad.nbytes) for p in model.parameters())) / MIB


def most_resident() -> int:
    """Bytes that this process has held at most."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage tells the peak of the process that started this one where that was higher
        return 1024 * int(re.search(r"VmHWM:\s*(\d+) kB", status.read_text())[1])
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def peak_of_its_own(way: str, k: int, options: argparse.Namespace) -> float:
    """In a process of its own; freed tensors go back to the system at once, so that the peak is that of what is alive."""
    size = [f"--{name}={getattr(options, name)}" for name in ("device", "side", "batch", "hidden")]
    command = [sys.executable, "-m", "benchmarks.memory", *size, "--one", way, str(k)]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=harness.ROOT, env=environment)
    if done.returncode:
        raise RuntimeError(f"{way}, K={k}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def times(k: int, options: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of forward and backward, p20, p50 and p80, the ways in turn."""
    x, models = images(options), {way: build(way, k, options) for way in ways()}
    found = {way: [] for way in models}
    for i in range(1 + (1 if options.quick else ROUNDS)):
        for way, model in models.items():
            before = time.perf_counter()
            step(model, x)
            if i:
                found[way].append(time.perf_counter() - before)
            model.zero_grad()
    return {way: np.quantile(t, harness.QUANTILES).tolist() for way, t in found.items()}


def growth(points: list[tuple[int, float]]) -> float:
    """MiB that a step more at each level adds: the slope of a line through the peaks."""
    return float(np.polyfit(*zip(*points, strict=True), 1)[0])


# the page ---------------------------------------------------------------------------------------------------------------------


def by_size(rows: list[dict]) -> dict[tuple, dict[str, list[tuple[int, float]]]]:
    found = {}
    for row in rows:
        key = int(row["side"]), int(row["batch"]), int(row["hidden"])
        found.setdefault(key, {}).setdefault(row["way"], []).append((int(row["k"]), float(row["peak_mib"])))
    return found


def tables(rows: list[dict], timed: list[dict]) -> dict[str, str]:
    lines = []
    for (side, batch, hidden), found in by_size(rows).items():
        for way, points in found.items():
            at = dict(points)
            ks = sorted(at)
            peaks = f"{at[ks[0]]:,.0f} at K = {ks[0]}, {at[ks[-1]]:,.0f} at K = {ks[-1]}"
            lines.append([f"{side}x{side}, batch {batch}, hidden {hidden}", way, peaks, f"{growth(points):.2f}"])
    about = f"{rows[0]['device']}, torch {rows[0]['torch']}, commit {rows[0]['commit']}"
    peaks = f"{page.table(['images', 'way', 'peak, MiB', 'MiB for a step more'], lines)}\n\n({about})"
    lines = [
        [f"{r['side']}x{r['side']}, batch {r['batch']}, hidden {r['hidden']}, K = {r['k']}", r["way"], r["p50_s"], r["ratio"]]
        for r in timed
    ]
    about = f"p50 in seconds on {timed[0]['device']}, torch {timed[0]['torch']}, commit {timed[0]['commit']}"
    return {"peaks": peaks, "times": f"{page.table(['images', 'way', 'forward + backward', 'over stored'], lines)}\n\n({about})"}


def plot(rows: list[dict], path: Path) -> None:
    from matplotlib.figure import Figure

    sizes = by_size(rows)
    figure = Figure(figsize=(4.2 * len(sizes), 3.8), layout="constrained")
    styles = dict(zip(WAYS, (("o-", "#555555"), ("^--", "#1f77b4"), ("s:", "#ff7f0e"), ("o-", "#d62728")), strict=True))
    for (side, batch, hidden), ax in zip(sizes, figure.subplots(1, len(sizes), squeeze=False)[0], strict=True):
        for way, points in sizes[side, batch, hidden].items():
            style, colour = styles[way]
            ax.plot(*zip(*sorted(points), strict=True), style, color=colour, mfc="none", label=f"{way}: {growth(points):.2f} MiB a step")
        ax.set_yscale("log")
        ax.set_title(f"{side}x{side}, batch {batch}, hidden {hidden}", fontsize=10)
        ax.set_xlabel("K, steps at each of three levels")
        ax.grid(alpha=0.3, which="both")
        ax.legend(fontsize=8, frameon=False)
    figure.axes[0].set_ylabel("peak memory without weights and gradients, MiB")
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=100)


def main(argv: list[str] | None = None) -> None:
    def add(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--docs", type=Path, default=harness.ROOT / "docs", help="folder of memory.md and pictures/")
        for name, value in (("side", 32), ("batch", 32), ("hidden", 512)):
            parser.add_argument(f"--{name}", type=int, default=value, help=argparse.SUPPRESS)
        parser.add_argument("--one", nargs=2, metavar=("WAY", "K"), help=argparse.SUPPRESS)

    options = harness.arguments(__doc__, argv, add)
    if options.one:
        print(json.dumps(peak(options.one[0], int(options.one[1]), options)))
        return
    if options.quick:
        sizes, timed_sizes = [(8, 4, 16, (1, 2))], [(8, 4, 16, 2)]
    else:
        sizes = [(32, 32, 512, (2, 4, 8, 16, 32)), (128, 4, 64, (2, 8)), (256, 4, 64, (2, 8))]
        timed_sizes = [(32, 32, 64, 8), (32, 32, 512, 4)]
    options.side, options.batch, options.hidden = 8, 2, 16
    errors = check(options)
    about = harness.metadata(options.device)

    def row(k: int, way: str) -> dict:
        return {"side": options.side, "batch": options.batch, "hidden": options.hidden, "k": k, "way": way}

    rows, timed = [], []
    for options.side, options.batch, options.hidden, k in timed_sizes:
        found = times(k, options)
        for way, (p20, p50, p80) in found.items():
            seconds = {"p20_s": f"{p20:.4f}", "p50_s": f"{p50:.4f}", "p80_s": f"{p80:.4f}", "ratio": f"{p50 / found['stored'][1]:.3f}"}
            timed.append(row(k, way) | seconds | {"gradient_error": f"{errors[way]:.1e}"} | about)
    harness.append(options.results / "memory_time.csv", timed)
    cases = [(*size, k, way) for *size, ks in sizes for k in ks for way in ways()]
    for options.side, options.batch, options.hidden, k, way in (bar := tqdm(cases)):
        bar.set_postfix_str(f"{way}, {options.side}x{options.side}, K={k}")
        peak_mib = peak_of_its_own(way, k, options)
        rows.append(row(k, way) | {"peak_mib": f"{peak_mib:.2f}", "gradient_error": f"{errors[way]:.1e}"} | about)
        harness.append(options.results / "memory.csv", rows[-1:])
    write(rows, timed, options.docs)


def write(rows: list[dict], timed: list[dict], docs: Path) -> None:
    found = tables(rows, timed)
    page.write(docs / "memory.md", "memory", found)
    plot(rows, docs / "pictures" / "memory.png")
    print(*found.values(), sep="\n\n")


if __name__ == "__main__":
    main()
