"""Times the providers of a case side by side and appends rows to results/NAME.csv; none is timed before it is found equal.

Every provider's outputs and gradients are compared with those of the first provider, the reference, on the same inputs in float64. Where
one is off, no row of that case is written, the others are measured, and the run ends with a ValueError. In float32 it may be off by 1e-5
of the largest value, or by twice as much as the reference is, which sums over many positions take beyond that. A ratio is the time over
the reference's: above 1 is slower.
"""

import argparse
import csv
import datetime
import itertools
import os
import platform
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import fastflow

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
QUANTILES = (0.2, 0.5, 0.8)
CACHE = 64 << 20  # bytes; a case has so many sets of inputs that they exceed it, where they are not tiny
ROUNDS = 5  # on the CPU the providers take turns so often, and a busy neighbour is everyone's


@dataclass
class Case:
    """What is timed: ``providers`` by name, the reference first, each called with what ``inputs`` draws.

    ``gradients_of`` are the places of the arguments that forward+backward differentiates by; without, there is forward alone.
    ``bytes_moved`` in forward: each tensor once.
    """

    name: str
    shape: str
    dtype: torch.dtype
    inputs: Callable[[], tuple[Tensor, ...]]
    providers: dict[str, Callable]
    layout: str = "contiguous"
    gradients_of: tuple[int, ...] = ()
    bytes_moved: int | None = None

    @property
    def reference(self) -> Callable:
        return next(iter(self.providers.values()))


def arguments(description: str, argv: list[str] | None, add: Callable[[argparse.ArgumentParser], object] = lambda _: None):
    """The options that all benchmarks share, and those that ``add`` adds."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=0.4, help="time for a case and mode, without compiling")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, hardly any repetitions, no torch.compile: to see that it runs")
    parser.add_argument("--compiled", action=argparse.BooleanOptionalAction, default=True, help="with what torch.compile makes")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the rows")
    add(parser)
    options = parser.parse_args(argv)
    options.seconds = 0.01 if options.quick else options.seconds
    options.compiled = options.compiled and not options.quick
    return options


def _git(*args: str) -> str:
    try:
        return subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    except FileNotFoundError:
        return ""


def metadata(device: str) -> dict[str, str]:
    """The columns that every row ends with: where, with which versions, of which commit and when it was measured."""
    if device == "cuda":
        name = torch.cuda.get_device_name()
    else:
        cpuinfo = Path("/proc/cpuinfo")
        lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor())
        name = f"{model or platform.machine()}, {torch.get_num_threads()} threads"
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = ""
    changed = "-dirty" if _git("status", "--porcelain", "fastflow", "csrc", "triton_kernels") else ""
    commit = _git("rev-parse", "--short", "HEAD") + changed
    versions = {"torch": torch.__version__, "triton": triton, "fastflow": fastflow.__version__}
    return {"device": name, **versions, "commit": commit, "date": datetime.date.today().isoformat()}


def append(path: Path, rows: list[dict]) -> None:
    """Adds ``rows`` to a CSV file; a column that is new is empty in the older rows, one that is gone in the newer."""
    old = []
    if path.exists():
        with path.open(newline="") as file:
            old = list(csv.DictReader(file))
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = dict.fromkeys(itertools.chain(*rows, *old))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows([*old, *rows])


def relative_error(found: Tensor, truth: Tensor) -> Tensor:
    """The largest error over the largest value; infinite where the shapes differ."""
    if found.shape != truth.shape:
        return torch.tensor(torch.inf, dtype=torch.float64, device=truth.device)
    return (found.double() - truth).abs().max() / truth.abs().max()


def _outputs(provider: Callable, args: tuple) -> tuple[Tensor, ...]:
    out = provider(*args)
    return out if isinstance(out, tuple) else (out,)


def _compute(provider: Callable, args: tuple, leaves: list[Tensor], upstream: list[Tensor]) -> tuple[Tensor, ...]:
    """The outputs, and the gradients by ``leaves`` where there are some."""
    if not leaves:
        with torch.no_grad():
            return _outputs(provider, args)
    out = _outputs(provider, args)
    varying = [(v, g) for v, g in zip(out, upstream, strict=True) if v.requires_grad]  # not the log-det of a map that has a constant one
    return *out, *torch.autograd.grad([v for v, _ in varying], leaves, [g for _, g in varying])


def _input_set(case: Case, mode: str, device: str) -> tuple:
    """What ``_compute`` takes after the provider."""
    args = tuple(v.to(device) for v in case.inputs())
    leaves = [args[i].requires_grad_() for i in case.gradients_of] if mode == "forward+backward" else []
    with torch.no_grad():
        upstream = [torch.randn_like(v) for v in _outputs(case.reference, args)] if leaves else []
    return args, leaves, upstream


def _errors(case: Case, mode: str, inputs: tuple) -> tuple[dict[str, float], float]:
    """The largest relative error of each provider, and the tolerance. Raises ValueError for an error above it."""
    args, leaves, upstream = inputs
    exact = [v.detach().double() if v.is_floating_point() else v for v in args]
    exact_leaves = [exact[i].requires_grad_() for i in case.gradients_of] if leaves else []
    truth = _compute(case.reference, exact, exact_leaves, [v.double() for v in upstream])
    errors, tolerance = {}, 10 * TOLERANCE[case.dtype]
    for name, provider in case.providers.items():
        found = _compute(provider, *inputs)
        each = torch.stack([relative_error(*pair) for pair in zip(found, truth, strict=True)])
        errors[name] = error = each.max().item()
        if not error <= tolerance:  # nor is NaN
            where = f"{case.name} {case.shape} {str(case.dtype)[6:]} {case.layout} {mode}, output {each.argmax().item()}"
            raise ValueError(f"{where}: {name} is off by {error:.1e} of the largest value, expected {tolerance:.1e}; no row is written")
        if provider is case.reference:
            tolerance = max(TOLERANCE[case.dtype], 2 * error)
    return errors, tolerance


def turn(call: Callable, seconds: float, device: str) -> list[float]:
    """Microseconds of each call within some seconds, of one at least."""
    if device == "cuda":
        from triton.testing import do_bench

        return [1e3 * ms for ms in do_bench(call, rep=1e3 * seconds, return_mode="all")]
    times = []
    now = time.perf_counter()
    end = now + seconds
    while now < end or not times:
        before = time.perf_counter()
        call()
        now = time.perf_counter()
        times.append(1e6 * (now - before))
    return times


def microseconds(calls: dict[str, Callable], seconds: float, device: str) -> dict[str, list[float]]:
    """p20, p50, p80 of each call."""
    rounds = 1 if device == "cuda" else ROUNDS
    times = {name: [] for name in calls}
    for _, (name, call) in itertools.product(range(rounds), calls.items()):
        times[name] += turn(call, seconds / (rounds * len(calls)), device)
    return {name: np.quantile(t, QUANTILES).tolist() for name, t in times.items()}


def _copy_bandwidth() -> float:
    """GB/s, read and written, of a copy of 1 GiB on the GPU."""
    x = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    y = torch.empty_like(x)
    p50 = microseconds({"copy": lambda: y.copy_(x)}, 0.2, "cuda")["copy"][1]
    return 2 * x.nbytes / p50 / 1e3


def run(name: str, cases: list[Case], options: argparse.Namespace) -> list[dict]:
    """Checks and times every case in each mode, appends the rows to ``options.results/NAME.csv`` and prints them."""
    device = options.device
    torch.backends.cudnn.allow_tf32 = False  # its 10 bits are no match for float32
    copy = _copy_bandwidth() if device == "cuda" else None
    about, rows, wrong = metadata(device), [], []
    if device == "cpu" and os.getloadavg()[0] > 0.3:
        print(f"other programs are running here, {os.getloadavg()[0]:.1f} at a time over the last minute: the times are not worth keeping")
    modes = [(case, mode) for case in cases for mode in ("forward", "forward+backward")[: 1 + bool(case.gradients_of)]]
    for case, mode in (bar := tqdm(modes, desc=name)):
        bar.set_postfix_str(f"{case.name} {case.shape} {mode}")
        torch.manual_seed(0)
        torch.compiler.reset()  # or shapes would use up its limit of recompilations
        sets = [_input_set(case, mode, device)]
        size = sum(v.nbytes for v in sets[0][0])
        sets += [_input_set(case, mode, device) for _ in range(min(8, CACHE // size))]
        try:
            errors, tolerance = _errors(case, mode, sets[0])
        except ValueError as error:
            wrong.append(str(error))
            tqdm.write(wrong[-1])
            continue
        cycles = {provider: itertools.cycle(sets) for provider in case.providers}
        calls = {p: lambda f=f, c=cycles[p]: _compute(f, *next(c)) for p, f in case.providers.items()}
        times = microseconds(calls, options.seconds, device)
        reference = next(iter(times.values()))[1]
        found = []
        for provider, (p20, p50, p80) in times.items():
            row = {"name": name, "case": case.name, "shape": case.shape, "dtype": str(case.dtype)[6:], "layout": case.layout}
            row |= {"provider": provider, "mode": mode, "p20_us": f"{p20:.2f}", "p50_us": f"{p50:.2f}", "p80_us": f"{p80:.2f}"}
            row |= {"error": f"{errors[provider]:.1e}", "tolerance": f"{tolerance:.1e}", "ratio": f"{p50 / reference:.3f}"}
            moved = case.bytes_moved if copy and mode == "forward" else None
            row |= {"gb_s": f"{moved / p50 / 1e3:.1f}" if moved else "", "copy_gb_s": f"{copy:.1f}" if copy else ""}
            found.append(row | about)
        append(options.results / f"{name}.csv", found)  # at once: a run that is cut keeps what it has measured
        rows += found
    if rows:
        report(rows)
    if wrong:
        raise ValueError("\n".join(wrong))
    return rows


def report(rows: list[dict]) -> None:
    """Prints p50 in microseconds, a line a case and mode; in parentheses the time over the reference's."""
    table = {}
    for row in rows:
        key = " ".join(row[k] for k in ("case", "shape", "dtype", "layout", "mode"))
        table.setdefault(key, []).append(f"{row['provider']} {row['p50_us']} ({row['ratio']})")
    width = max(map(len, table))
    print(*(f"{key:<{width}}  {'  '.join(cells)}" for key, cells in table.items()), sep="\n")
    ours = [float(row["ratio"]) for row in rows if row["provider"] == "fastflow"]
    if ours:
        slower = sum(ratio > 1 for ratio in ours)
        print(f"fastflow: slower than the reference in {slower} of {len(ours)}, time over its {min(ours):.2f} to {max(ours):.2f}")
    print(f"microseconds, p50, on {rows[0]['device']}; in parentheses the time over that of the first provider: above 1 is slower")
