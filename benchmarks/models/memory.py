"""Measures memory and time of a training step of Glow, with activations stored or recomputed in several ways.

    pip install --no-deps memcnn    # optional, to compare with it
    python -m benchmarks.models.memory

Forward and backward of a Glow L=3, whose coupling networks are three convolutions, in these ways:

- ``stored`` keeps every activation;
- ``checkpoint`` wraps each step in torch.utils.checkpoint;
- ``memcnn`` wraps each step in its InvertibleModuleWrapper, which has no log-dets, so its loss has none of
  the steps';
- ``reversible`` is FastFlow's.

Gradients are compared with those of ``stored`` before anything is measured, without log-dets for memcnn.

Memory: the peak without weights and gradients, against depth K, resolution and batch; the slopes are the
memory of one more step per level and of one more image. On a CPU it is the resident memory of a process per
measurement, on a GPU the allocator's count of live bytes in one process. Rows go to results/memory.csv.
Time: the ways take turns in one process. Rows go to results/memory_time.csv.

The largest batch that fits in ``--limit-mib``: each batch is tried in its own process. Its memory is what
the model (weights, gradients, everything) and two steps take, without what the process took after a step of
a tiny model, when PyTorch has loaded its libraries. On a GPU the allocator is given the limit, by default
all memory of the device, and a batch fits if it does not run out of memory. Rows go to
results/memory_batch.csv. The tables of docs/memory.md and its picture are rewritten.
"""

import argparse
import gc
import importlib.util
import json
import math
import os
import re
import resource
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from benchmarks.tools import harness, page
from fastflow.models import Glow

WAYS = ("stored", "checkpoint", "memcnn", "reversible")
MIB = 2**20
ROUNDS = 7
SIZE = ("side", "batch", "hidden", "k")


class Checkpointed(nn.Module):
    def __init__(self, step: nn.Module) -> None:
        super().__init__()
        self.step = step

    def forward(self, x, context=None):
        return checkpoint(self.step, x, use_reentrant=False)


class OutputOnly(nn.Module):
    """A step as memcnn requires it: one tensor in, one tensor out."""

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
        self.step = InvertibleModuleWrapper(OutputOnly(step))

    def forward(self, x, context=None):
        # the wrapper frees its input; the first step's is an image that is used again
        return self.step(x.clone() if x.is_leaf else x), x.new_zeros(x.shape[0])


class Steps(nn.Module):
    """A level whose steps are wrapped and run one after the other."""

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
    """A level with stored activations and a log-det of zero, to compare memcnn's gradients with."""

    def __init__(self, level: nn.Module) -> None:
        super().__init__()
        self.level = level

    def forward(self, x, context=None):
        z, log_det = self.level(x)
        return z, torch.zeros_like(log_det)


def images(options: argparse.Namespace) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(
        0, 256, (options.batch, 3, options.side, options.side), dtype=torch.uint8, generator=generator
    ).to(options.device)


def build(way: str, k: int, options: argparse.Namespace) -> Glow:
    """A Glow initialized on the images, the same for every way; parameters are in the plain model's order."""
    torch.manual_seed(0)
    shape = (3, options.side, options.side)
    model = Glow(
        shape, levels=3, steps=k, hidden=options.hidden, reversible=way == "reversible", network="plain"
    ).to(options.device)
    model.initialize(images(options)[:4], seed=0)
    with torch.no_grad():
        for p in model.parameters():  # networks that end in zeros would hide errors before their end
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
    """The relative error of each way's float64 gradient at K = 2. Raises ValueError if it exceeds 1e-9."""
    x, errors = images(options)[:2], {}

    def gradient(way: str) -> Tensor:
        model = build(way, 2, options).double()
        step(model, x)
        return torch.cat(
            [
                torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten()
                for p in model.parameters()
            ]
        )

    for way in ways():
        truth = gradient("without log-det" if way == "memcnn" else "stored")
        errors[way] = ((gradient(way) - truth).norm() / truth.norm()).item()
        if not errors[way] <= 1e-9:
            raise ValueError(
                f"{way}: its gradient is off by {errors[way]:.1e}, expected 1e-9; no row is written"
            )
    return errors


def ways() -> list[str]:
    return [way for way in WAYS if way != "memcnn" or importlib.util.find_spec("memcnn")]


def peak(way: str, k: int, options: argparse.Namespace) -> tuple[float, float]:
    """Runs two steps in this process.

    Returns peak MiB without weights and gradients, and MiB of the model and its steps.
    """
    tiny = argparse.Namespace(device=options.device, side=8, batch=2, hidden=4)
    step(build(way, 1, tiny), images(tiny))
    if options.device == "cuda":
        gc.collect()
        torch.cuda.reset_peak_memory_stats()
    before = most_held(options.device)
    x, model = images(options), build(way, k, options)
    for _ in range(2):
        step(model, x)
    most = most_held(options.device)
    kept = sum(p.nbytes + (0 if p.grad is None else p.grad.nbytes) for p in model.parameters())
    return (most - kept) / MIB, (most - before) / MIB


def most_held(device: str) -> int:
    """Peak bytes of this process, or of its tensors on a GPU."""
    return torch.cuda.max_memory_allocated() if device == "cuda" else most_resident()


def most_resident() -> int:
    """Peak resident bytes of this process."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage returns the parent process's peak if that was higher
        return 1024 * int(re.search(r"VmHWM:\s*(\d+) kB", status.read_text())[1])
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def peak_or_inf(way: str, k: int, options: argparse.Namespace) -> tuple[float, float]:
    """``peak``, or infinity if a GPU is out of memory. Raises other errors, also a CPU's lack of memory."""

    def refused() -> int:
        return torch.cuda.memory_stats().get("num_ooms", 0)

    before = refused()
    try:
        return peak(way, k, options)
    except RuntimeError as error:
        # the driver and Triton have errors of their own; for cuDNN's, the allocator counts refusals
        if refused() > before or ("CUDA" in str(error) and "out of memory" in str(error)):
            return math.inf, math.inf
        raise


def peak_in_a_process(way: str, k: int, options: argparse.Namespace) -> tuple[float, float]:
    """``peak_or_inf`` in a new process.

    It returns freed tensors to the system at once, so that the peak counts live tensors.
    """
    size = [f"--{name}={getattr(options, name)}" for name in ("device", "side", "batch", "hidden")]
    command = [
        sys.executable,
        "-m",
        "benchmarks.models.memory",
        *size,
        f"--limit-mib={options.limit_mib}",
        "--one",
        way,
        str(k),
    ]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=harness.ROOT, env=environment)
    if done.returncode:
        raise RuntimeError(f"{way}, K={k}, batch {options.batch}: {done.stderr[-2000:]}")
    return tuple(json.loads(done.stdout.splitlines()[-1]))


def largest(fits: Callable[[int], bool], guess: int = 1) -> int:
    """The largest batch found to fit: exact below 32, then to within 1/16; 0 if a batch of 1 does not fit.

    Steps away from the guess, each twice as long as the last, until one batch fits and one does not; then
    bisects. From a guess of 1 the batch doubles. The first step is 1/17 of the guess: a good guess takes two
    tries.
    """
    fitting, failing, batch, stride = 0, None, guess, max(1, guess // 17)
    while failing is None or failing - fitting > max(1, fitting // 16):
        if fits(batch):
            fitting = batch
        else:
            failing = batch
        if failing is None:
            batch, stride = batch + stride, 2 * stride
        elif fitting == 0:
            batch, stride = max(1, batch - stride), 2 * stride
        else:
            batch = (fitting + failing) // 2
    return fitting


def largest_batch(
    way: str, k: int, swept: list[tuple[int, float]], options: argparse.Namespace
) -> tuple[int, float]:
    """The largest batch within ``options.limit_mib``, and its MiB.

    The guess comes from a line through ``swept``, the MiB of other batches.
    """
    took = {0: math.nan}

    def fits(batch: int) -> bool:
        options.batch = batch
        _, took[batch] = peak_in_a_process(way, k, options)
        return took[batch] <= options.limit_mib

    slope, rest = np.polyfit(*zip(*swept, strict=True), 1) if len(swept) > 1 else (0, 0)
    found = largest(fits, max(1, round((options.limit_mib - rest) / slope)) if slope > 0 else 1)
    return found, took[found]


def times(k: int, options: argparse.Namespace) -> dict[str, list[float]]:
    """Percentiles 20, 50 and 80 of the seconds of forward and backward; the ways take turns."""
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
    """MiB that one more step per level, or one more image, adds: the slope of a line through the peaks."""
    return float(np.polyfit(*zip(*points, strict=True), 1)[0])


# the page -----------------------------------------------------------------------------


def against(what: str, rows: list[dict]) -> dict[tuple, dict[str, list[tuple[int, float]]]]:
    """``{size: {way: [(value, peak)]}}`` for the values of ``what``, k or batch; ``size``: the other numbers.

    Sizes with a single value are left out.
    """
    found = {}
    for row in rows:
        size = tuple(int(row[name]) for name in SIZE if name != what)
        found.setdefault(size, {}).setdefault(row["way"], []).append((int(row[what]), float(row["peak_mib"])))
    found = {
        size: {way: points for way, points in ways.items() if len(points) > 1} for size, ways in found.items()
    }
    return {size: ways for size, ways in found.items() if ways}


def tables(rows: list[dict], timed: list[dict], batches: list[dict]) -> dict[str, str]:
    lines = []
    for (side, batch, hidden), found in against("k", rows).items():
        for way, points in found.items():
            at = dict(points)
            ks = sorted(at)
            peaks = f"{at[ks[0]]:,.0f} at K = {ks[0]}, {at[ks[-1]]:,.0f} at K = {ks[-1]}"
            lines.append(
                [f"{side}x{side}, batch {batch}, hidden {hidden}", way, peaks, f"{growth(points):.2f}"]
            )
    about = "{device}, torch {torch}, commit {commit}".format(**rows[0])
    peaks = f"{page.table(['images', 'way', 'peak, MiB', 'MiB per step'], lines)}\n\n({about})"
    lines = [
        [
            f"{r['side']}x{r['side']}, batch {r['batch']}, hidden {r['hidden']}, K = {r['k']}",
            r["way"],
            r["p50_s"],
            r["ratio"],
        ]
        for r in timed
    ]
    times = page.table(["images", "way", "forward + backward", "over stored"], lines)
    times += f"\n\n(p50 in seconds on {about})"
    lines = [
        [
            f"{r['side']}x{r['side']}, hidden {r['hidden']}, K = {r['k']}",
            r["way"],
            f"{r['limit_mib']:,}",
            f"{r['largest_batch']:,}",
        ]
        for r in batches
    ]
    largest = f"{page.table(['images', 'way', 'limit, MiB', 'largest batch'], lines)}\n\n({about})"
    return {"peaks": peaks, "largest": largest, "times": times}


def plot(rows: list[dict], path: Path) -> None:
    """Draws a panel against K for each size, and one against the batch."""
    from matplotlib.figure import Figure

    panels = []
    for (side, batch, hidden), found in against("k", rows).items():
        panels.append(
            (
                f"{side}x{side}, batch {batch}, hidden {hidden}",
                "K, steps per level (three levels)",
                "per step",
                found,
            )
        )
    for (side, hidden, k), found in against("batch", rows).items():
        panels.append((f"{side}x{side}, hidden {hidden}, K = {k}", "batch", "per image", found))
    figure = Figure(figsize=(4.2 * len(panels), 3.8), layout="constrained")
    styles = dict(
        zip(WAYS, (("o-", "#555555"), ("^--", "#1f77b4"), ("s:", "#ff7f0e"), ("o-", "#d62728")), strict=True)
    )
    for (title, label, one, found), ax in zip(
        panels, figure.subplots(1, len(panels), squeeze=False)[0], strict=True
    ):
        for way, points in found.items():
            style, color = styles[way]
            ax.plot(
                *zip(*sorted(points), strict=True),
                style,
                color=color,
                mfc="none",
                label=f"{way}: {growth(points):.2f} MiB {one}",
            )
        ax.set_yscale("log")
        ax.set_title(title, fontsize=10)
        ax.set_xlabel(label)
        ax.grid(alpha=0.3, which="both")
        ax.legend(fontsize=8, frameon=False)
    figure.axes[0].set_ylabel("peak memory without weights and gradients, MiB")
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=100)


def case(k: int, way: str, options: argparse.Namespace) -> dict:
    return {"side": options.side, "batch": options.batch, "hidden": options.hidden, "k": k, "way": way}


def measure_peaks(
    sizes: list[tuple], errors: dict[str, float], options: argparse.Namespace
) -> tuple[list[dict], dict[tuple, list]]:
    """Measures and writes the peaks.

    Returns the rows and ``{(side, hidden, K, way): [(batch, total MiB)]}``.
    """
    about, rows, in_all = harness.metadata(options.device), [], {}
    measured = peak_or_inf if options.device == "cuda" else peak_in_a_process
    for options.side, options.batch, options.hidden, k, way in (
        bar := tqdm([(*size, way) for size in sizes for way in ways()])
    ):
        bar.set_postfix_str(f"{way}, {options.side}x{options.side}, batch {options.batch}, K={k}")
        peak_mib, took = measured(way, k, options)
        if math.isinf(peak_mib):
            continue
        rows.append(
            case(k, way, options)
            | {"peak_mib": f"{peak_mib:.2f}", "gradient_error": f"{errors[way]:.1e}"}
            | about
        )
        harness.append(options.results / "memory.csv", rows[-1:])
        in_all.setdefault((options.side, options.hidden, k, way), []).append((options.batch, took))
    return rows, in_all


def measure_times(sizes: list[tuple], errors: dict[str, float], options: argparse.Namespace) -> list[dict]:
    about, rows = harness.metadata(options.device), []
    for options.side, options.batch, options.hidden, k in sizes:
        found = times(k, options)
        for way, (p20, p50, p80) in found.items():
            seconds = {
                "p20_s": f"{p20:.4f}",
                "p50_s": f"{p50:.4f}",
                "p80_s": f"{p80:.4f}",
                "ratio": f"{p50 / found['stored'][1]:.3f}",
            }
            rows.append(case(k, way, options) | seconds | {"gradient_error": f"{errors[way]:.1e}"} | about)
        harness.append(options.results / "memory_time.csv", rows[-len(found) :])
    return rows


def measure_batches(
    size: tuple, in_all: dict[tuple, list], errors: dict[str, float], options: argparse.Namespace
) -> list[dict]:
    about, rows = harness.metadata(options.device), []
    options.side, options.hidden, k = size
    if options.device == "cuda":  # leaves the memory to the processes of the tries
        gc.collect()
        torch.cuda.empty_cache()
    # the most important first: a run may be cut
    ordered = sorted(ways(), key=lambda way: way not in ("stored", "reversible"))
    for way in (bar := tqdm(ordered[: 2 if options.quick else None], desc="largest batch")):
        bar.set_postfix_str(way)
        batch, took = largest_batch(way, k, in_all.get((*size, way), []), options)
        row = {
            "side": options.side,
            "hidden": options.hidden,
            "k": k,
            "way": way,
            "limit_mib": options.limit_mib,
        }
        row |= {"largest_batch": batch, "peak_mib": f"{took:.2f}", "gradient_error": f"{errors[way]:.1e}"}
        rows.append(row | about)
        harness.append(options.results / "memory_batch.csv", rows[-1:])
    return rows


def main(argv: list[str] | None = None) -> None:
    def add(parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--docs", type=Path, default=harness.ROOT / "docs", help="folder of memory.md and pictures/"
        )
        parser.add_argument(
            "--limit-mib",
            type=int,
            help="for the largest batch; default: 256, on a GPU all of its memory",
        )
        for name, value in (("side", 32), ("batch", 32), ("hidden", 512)):
            parser.add_argument(f"--{name}", type=int, default=value, help=argparse.SUPPRESS)
        parser.add_argument("--one", nargs=2, metavar=("WAY", "K"), help=argparse.SUPPRESS)

    options = harness.arguments(__doc__, argv, add)
    on_a_gpu = options.device == "cuda"
    if options.one:
        if on_a_gpu:
            torch.cuda.set_per_process_memory_fraction(min(1.0, options.limit_mib / device_mib()))
        print(json.dumps(peak_or_inf(options.one[0], int(options.one[1]), options)))
        return
    if options.quick:
        sizes, timed_sizes = [(32, 4, 16, 1), (32, 4, 16, 2)], [(8, 4, 16, 2)]
        side, hidden, k, batches = 32, 16, 2, (4, 64)
        options.limit_mib = 256 if on_a_gpu else 16
    else:
        sizes = [(32, 32, 512, k) for k in (2, 4, 8, 16, 32)] + [
            (side, 4, 64, k) for side in (128, 256) for k in (2, 8)
        ]
        side, hidden, k, batches = (32, 512, 32, (32, 128, 512)) if on_a_gpu else (32, 64, 32, (8, 32, 128))
        timed_sizes = [(32, 32, 64, 8), (32, 32, 512, 4)]
        options.limit_mib = options.limit_mib or (device_mib() if on_a_gpu else 256)
    sizes += [(side, batch, hidden, k) for batch in batches]
    options.side, options.batch, options.hidden = 8, 2, 16
    errors = check(options)
    # the largest batches last: they take longest
    rows, in_all = measure_peaks(list(dict.fromkeys(sizes)), errors, options)
    timed = measure_times(timed_sizes, errors, options)
    write(rows, timed, measure_batches((side, hidden, k), in_all, errors, options), options.docs)


def device_mib() -> int:
    return torch.cuda.mem_get_info()[1] // MIB


def write(rows: list[dict], timed: list[dict], largest: list[dict], docs: Path) -> None:
    found = tables(rows, timed, largest)
    page.write(docs / "memory.md", found)
    plot(rows, docs / "pictures" / "memory.png")
    print(*found.values(), sep="\n\n")


if __name__ == "__main__":
    main()
