"""Compares the providers of a case, times them in turn, and appends rows to results/NAME.csv.

Outputs and gradients of every provider are compared with those of the first one, the reference, in float64
on the same inputs. If one differs, the case has no row, the other cases are measured, and the run ends with
a ValueError. The tolerance in float32 is 1e-5 of the largest value, or twice the reference's own error if
that is larger, as it is for sums over many positions. Modules are compared in float64 only, because in
float32 a ReLU near zero may fall on either side.

A case has no row either if a published library is faster than the reference: FastFlow is compared with the
best of plain PyTorch. A ratio is the time over the reference's; above 1 is slower.

GB/s are ``bytes_moved`` over the time. Two copies in the same run show what the memory reaches: one of a
gigabyte, which no cache holds, and one that moves ``bytes_moved`` bytes, which takes as long to start as
the case does. Inputs that fit in a cache may exceed the former. On a GPU each call is timed twice: from
Python, and captured in a CUDA graph, without the host's gaps.
"""

import argparse
import copy
import csv
import dataclasses
import datetime
import importlib
import itertools
import os
import pkgutil
import platform
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

import fastflow
from benchmarks.tools import capture
from benchmarks.tools.traffic import Traffic

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 4e-3}  # bfloat16: one rounding
QUANTILES = (0.2, 0.5, 0.8)
LIBRARIES = ("nflows", "normflows", "zuko")  # published; no row if one is faster than the reference
COPIED = {"cuda": 1 << 30, "cpu": 1 << 28}  # bytes, beyond any cache
CACHE = 64 << 20  # bytes; the sets of inputs of a case exceed it together, unless they are tiny
ROUNDS = 5  # turns of each provider on a CPU, so that a busy neighbour slows all of them
SAME_SIZE_COPY = "copy of the same size"  # a call next to the providers
CAPTURED = {"cuda": capture.captured}  # times of captured calls, by device


@dataclass(eq=False)
class Case:
    """A computation with several implementations.

    Args:
        inputs: draws the arguments.
        providers: implementations by name, the reference first. A module is in float64 until it is timed; it
            is differentiated by its parameters as well, and the gradients of those that it shares with the
            reference are compared.
        gradients_of: places of the arguments that forward+backward differentiates by; empty: forward only.
        bytes_moved: bytes that forward has to read and write, every tensor once.
        compiled: torch.compile of the reference is a further provider.
    """

    name: str
    shape: str
    dtype: torch.dtype
    inputs: Callable[[], tuple[Tensor, ...]]
    providers: dict[str, Callable]
    layout: str = "contiguous"
    gradients_of: tuple[int, ...] = ()
    bytes_moved: int | None = None
    compiled: bool = True

    @property
    def reference(self) -> Callable:
        return next(iter(self.providers.values()))


def add_arguments(add_argument: Callable) -> None:
    """Adds the options that all benchmarks and ``pytest benchmarks`` share."""
    add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    add_argument("--seconds", type=float, default=0.4, help="time per case and mode, without compiling")
    add_argument(
        "--quick",
        action="store_true",
        help="tiny sizes, few repetitions, no torch.compile: a test that it runs",
    )
    add_argument(
        "--compiled",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="with torch.compile of the reference",
    )


def settle(options: argparse.Namespace) -> None:
    """Applies --quick to the other options."""
    options.seconds = 0.01 if options.quick else options.seconds
    options.compiled = options.compiled and not options.quick


def arguments(
    description: str,
    argv: list[str] | None,
    add: Callable[[argparse.ArgumentParser], object] = lambda _: None,
):
    """Parses a benchmark's options: the shared ones, the folder of the rows, and those that ``add`` adds."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    add_arguments(parser.add_argument)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the rows")
    add(parser)
    options = parser.parse_args(argv)
    settle(options)
    return options


def _git(*args: str) -> str:
    """Output of git in the checkout of the FastFlow that was imported, empty without one."""
    checkout = Path(fastflow.__file__).parents[1]
    try:
        return subprocess.run(["git", *args], cwd=checkout, capture_output=True, text=True).stdout.strip()
    except FileNotFoundError:
        return ""


def metadata(device: str) -> dict[str, str]:
    """The last columns of every row: device, versions, commit and date of the measurement."""
    if device == "cuda":
        name = torch.cuda.get_device_name()
    else:
        cpuinfo = Path("/proc/cpuinfo")
        lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
        model = next(
            (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")),
            platform.processor(),
        )
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
    """Adds ``rows`` to a CSV file. A column that older or newer rows lack is empty in them."""
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
    """The largest error over the largest value; infinite if the shapes differ."""
    if found.shape != truth.shape:
        return torch.tensor(torch.inf, dtype=torch.float64, device=truth.device)
    return (found.double() - truth).abs().max() / truth.abs().max()


def _outputs(provider: Callable, args: tuple) -> tuple[Tensor, ...]:
    out = provider(*args)
    return out if isinstance(out, tuple) else (out,)


def parameters(provider: Callable) -> list[nn.Parameter]:
    return list(provider.parameters()) if isinstance(provider, nn.Module) else []


def _compute(
    provider: Callable, args: tuple, leaves: list[Tensor], upstream: list[Tensor]
) -> tuple[tuple[Tensor, ...], ...]:
    """Returns the outputs with gradients by ``leaves``, and gradients by the provider's parameters."""
    if not leaves:
        with torch.no_grad():
            return _outputs(provider, args), ()
    out = _outputs(provider, args)
    # the log-det of some maps is constant
    varying = [(v, g) for v, g in zip(out, upstream, strict=True) if v.requires_grad]
    own = parameters(provider)
    gradients = torch.autograd.grad(
        [v for v, _ in varying], [*leaves, *own], [g for _, g in varying], materialize_grads=bool(own)
    )
    return (*out, *gradients[: len(leaves)]), gradients[len(leaves) :]


def _input_set(case: Case, mode: str, device: str) -> tuple:
    """The arguments of ``_compute`` after the provider."""
    args = tuple(v.to(device, case.dtype if v.is_floating_point() else None) for v in case.inputs())
    leaves = [args[i].requires_grad_() for i in case.gradients_of] if mode == "forward+backward" else []
    with torch.no_grad():
        upstream = [torch.randn_like(v) for v in _outputs(case.reference, args)] if leaves else []
    return args, leaves, upstream


def _errors(case: Case, mode: str, inputs: tuple) -> tuple[dict[str, float], float]:
    """Returns each provider's relative error and the tolerance. Raises ValueError for a larger error."""
    args, leaves, upstream = inputs
    exact = [v.detach().double() if v.is_floating_point() else v for v in args]
    exact_leaves = [exact[i].requires_grad_() for i in case.gradients_of] if leaves else []
    truth, by_parameters = _compute(case.reference, exact, exact_leaves, [v.double() for v in upstream])
    shared = dict(zip(map(id, parameters(case.reference)), by_parameters, strict=False))
    errors, tolerance = {}, 10 * TOLERANCE[case.dtype]
    for name, provider in case.providers.items():
        found, gradients = _compute(provider, *inputs)
        pairs = list(zip(found, truth, strict=True))
        pairs += [
            (g, shared[id(p)])
            for p, g in zip(parameters(provider), gradients, strict=False)
            if id(p) in shared
        ]
        each = torch.stack([relative_error(*pair) for pair in pairs])
        errors[name] = error = each.max().item()
        if not error <= tolerance:  # nor is NaN
            where = f"{case.name} {case.shape} {str(case.dtype)[6:]} {case.layout} {mode}"
            where = f"{where}, output {each.argmax().item()}"
            raise ValueError(
                f"{where}: {name} is off by {error:.1e} of the largest value, expected {tolerance:.1e}; "
                "no row is written"
            )
        if provider is case.reference:
            tolerance = max(TOLERANCE[case.dtype], 2 * error)
    return errors, tolerance


@dataclass
class Prepared:
    """A case in one mode, its providers compared. ``calls``, by provider, take the sets of inputs in turn."""

    calls: dict[str, Callable]
    errors: dict[str, float]
    tolerance: float
    launches: dict[str, int | str]


def with_compiled(case: Case, options: argparse.Namespace) -> Case:
    if not options.compiled or not case.compiled:
        return case
    return dataclasses.replace(
        case, providers=case.providers | {"compile": torch.compile(case.reference, dynamic=False)}
    )


def prepare(case: Case, mode: str, options: argparse.Namespace) -> Prepared:
    """Compares the providers of a case and makes their calls. Raises ValueError if a provider differs."""
    torch.manual_seed(0)
    torch.compiler.reset()  # otherwise the shapes exceed its limit of recompilations
    modules = isinstance(case.reference, nn.Module)
    if modules:
        exact = dataclasses.replace(
            case, dtype=torch.float64, providers={k: p.to(options.device) for k, p in case.providers.items()}
        )
        exact = with_compiled(exact, options)
        errors, tolerance = _errors(exact, mode, _input_set(exact, mode, options.device))
        case = dataclasses.replace(
            case, providers={k: p.to(case.dtype) for k, p in copy.deepcopy(case.providers).items()}
        )
    case = with_compiled(case, options)
    sets = [_input_set(case, mode, options.device)]
    size = sum(v.nbytes for v in sets[0][0])
    sets += [_input_set(case, mode, options.device) for _ in range(min(8, CACHE // size))]
    if not modules:
        errors, tolerance = _errors(case, mode, sets[0])
    cycles = {provider: itertools.cycle(sets) for provider in case.providers}
    calls = {p: lambda f=f, c=cycles[p]: _compute(f, *next(c)) for p, f in case.providers.items()}
    return Prepared(
        calls, errors, tolerance, {name: launches(call, name, options.device) for name, call in calls.items()}
    )


def launches(call: Callable, provider: str, device: str) -> int | str:
    """Counts what a call runs: on a GPU kernels, copies, fills; on a CPU operators but views and allocations.

    Operators are not visible in code from torch.compile: the count is empty.
    """
    if device == "cuda":
        call()  # compiles
        with profile(activities=[ProfilerActivity.CUDA]) as profiled:
            call()
            torch.cuda.synchronize()
        return sum(event.device_type == DeviceType.CUDA for event in profiled.events())
    if provider.startswith("compile"):
        return ""
    with Traffic() as traffic:
        call()
    return traffic.calls.total()


def turn(
    call: Callable, seconds: float, device: str, clock: Callable[[], float] = time.perf_counter
) -> list[float]:
    """Microseconds of every call within ``seconds``, at least one; on a CPU by ``clock``."""
    if device == "cuda":
        from triton.testing import do_bench

        return [1e3 * ms for ms in do_bench(call, rep=1e3 * seconds, return_mode="all")]
    times = []
    now = time.perf_counter()
    end = now + seconds
    while now < end or not times:
        before = clock()
        call()
        times.append(1e6 * (clock() - before))
        now = time.perf_counter()
    return times


def microseconds(
    calls: dict[str, Callable],
    seconds: float,
    device: str,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Percentiles 20, 50 and 80 of each call, in microseconds."""
    rounds = 1 if device == "cuda" else ROUNDS
    times = {name: [] for name in calls}
    for _, (name, call) in itertools.product(range(rounds), calls.items()):
        times[name] += turn(call, seconds / (rounds * len(calls)), device, clock)
    return {name: np.quantile(t, QUANTILES).tolist() for name, t in times.items()}


def copy_bandwidth(device: str, seconds: float) -> float:
    """GB/s, read and written, of a copy that exceeds any cache."""
    x = torch.ones(COPIED[device], dtype=torch.uint8, device=device)
    y = torch.ones_like(x)
    p50 = microseconds({"copy": lambda: y.copy_(x)}, seconds, device)["copy"][1]
    return 2 * x.nbytes / p50 / 1e3


def same_size_copy(moved: int, device: str) -> Callable:
    """A copy that reads and writes ``moved`` bytes in total; takes buffers in turn, as a case its inputs."""
    x = torch.ones(moved // 2, dtype=torch.uint8, device=device)
    pairs = [(x.clone(), torch.ones_like(x)) for _ in range(1 + min(8, CACHE // moved))]
    turns = itertools.cycle(pairs)

    def call() -> None:
        source, target = next(turns)
        target.copy_(source)

    return call


def modes(case: Case) -> tuple[str, ...]:
    return ("forward", "forward+backward") if case.gradients_of else ("forward",)


def row_of(
    case: Case, mode: str, provider: str, prepared: Prepared, p50_us: float, copy_gb_s: float
) -> dict[str, str | int]:
    """The columns of a row other than its times."""
    row = {
        "case": case.name,
        "shape": case.shape,
        "dtype": str(case.dtype)[6:],
        "layout": case.layout,
        "provider": provider,
        "mode": mode,
    }
    row |= {
        "error": f"{prepared.errors[provider]:.1e}",
        "tolerance": f"{prepared.tolerance:.1e}",
        "launches": prepared.launches[provider],
    }
    moved = case.bytes_moved if mode == "forward" else None
    return row | {"gb_s": f"{moved / p50_us / 1e3:.1f}" if moved else "", "copy_gb_s": f"{copy_gb_s:.1f}"}


def two_digits(us: float | None) -> str:
    return "" if us is None else f"{us:.2f}"


def refuse_straw_man(times: dict[str, list[float]], where: str, quick: bool) -> None:
    """Raises ValueError if a published library is faster than the reference, the first of ``times``."""
    reference = next(iter(times.values()))[1]
    for library in times.keys() & set(LIBRARIES) if not quick else ():
        if times[library][1] < reference:
            found = f"the reference takes {reference:.1f} us, {library} {times[library][1]:.1f}: a straw man"
            raise ValueError(f"{where}: {found}; no row is written")


def run(name: str, cases: list[Case], options: argparse.Namespace) -> list[dict]:
    """Compares and times every case in each mode, appends rows to ``options.results/NAME.csv``."""
    device = options.device
    torch.backends.cudnn.allow_tf32 = False  # its 10 bits differ from float32
    if device == "cpu" and (load := os.getloadavg()[0]) > 0.3:
        print(f"other programs are running ({load:.1f} on average over the last minute): discard these times")
    about, copy_gb_s, rows, wrong = metadata(device), copy_bandwidth(device, options.seconds), [], []
    for case, mode in (bar := tqdm([(each, mode) for each in cases for mode in modes(each)], desc=name)):
        bar.set_postfix_str(f"{case.name} {case.shape} {mode}")
        try:
            prepared = prepare(case, mode, options)
            calls = dict(prepared.calls)
            if mode == "forward" and case.bytes_moved:
                calls[SAME_SIZE_COPY] = same_size_copy(case.bytes_moved, device)
            times = microseconds(calls, options.seconds, device)
            copy_us = times.pop(SAME_SIZE_COPY, None)
            refuse_straw_man(times, f"{case.name} {case.shape} {case.layout} {mode}", options.quick)
        except ValueError as error:
            wrong.append(str(error))
            tqdm.write(wrong[-1])
            continue
        graphs, notes = CAPTURED[device](calls, options.seconds) if device in CAPTURED else ({}, {})
        reference = next(iter(times.values()))[1]
        found = []
        for provider, (p20, p50, p80) in times.items():
            row = {"name": name} | row_of(case, mode, provider, prepared, p50, copy_gb_s)
            row |= {"p20_us": p20, "p50_us": p50, "p80_us": p80}
            row["same_size_copy_us"] = copy_us[1] if copy_us else None
            row["captured_us"] = graphs.get(provider)
            row["same_size_copy_captured_us"] = graphs.get(SAME_SIZE_COPY)
            row |= {column: two_digits(value) for column, value in row.items() if column.endswith("_us")}
            row |= {"ratio": f"{p50 / reference:.3f}", "captured_note": notes.get(provider, "")}
            found.append(row | about)
        append(options.results / f"{name}.csv", found)  # at once: a run that is cut keeps its rows
        rows += found
    if rows:
        report(rows)
    if wrong:
        raise ValueError("\n".join(wrong))
    return rows


def with_cases() -> dict[str, ModuleType]:
    """The modules of benchmarks that have cases, by name."""
    modules = {
        found.name: importlib.import_module(f"benchmarks.{folder}.{found.name}")
        for folder in ("ops", "models")
        for found in pkgutil.iter_modules([str(ROOT / "benchmarks" / folder)])
    }
    return {name: module for name, module in modules.items() if hasattr(module, "cases")}


def main(
    name: str,
    description: str,
    cases: Callable[[argparse.Namespace], list[Case]],
    argv: list[str] | None,
    seconds: float = 0.4,
) -> list[dict]:
    """Runs a benchmark from the command line."""
    options = arguments(description, argv, lambda parser: parser.set_defaults(seconds=seconds))
    return run(name, cases(options), options)


def report(rows: list[dict]) -> None:
    """Prints p50 in microseconds and, in parentheses, over the reference's; one line per case and mode."""
    table = {}
    for row in rows:
        key = " ".join(row[k] for k in ("case", "shape", "dtype", "layout", "mode"))
        table.setdefault(key, []).append(f"{row['provider']} {row['p50_us']} ({row['ratio']})")
    width = max(map(len, table))
    print(*(f"{key:<{width}}  {'  '.join(cells)}" for key, cells in table.items()), sep="\n")
    ours = [float(row["ratio"]) for row in rows if row["provider"] == "fastflow"]
    if ours:
        slower = sum(ratio > 1 for ratio in ours)
        print(f"fastflow: slower than the reference in {slower} of {len(ours)} cases;", end=" ")
        print(f"time over the reference's {min(ours):.2f} to {max(ours):.2f}")
    print(f"microseconds, p50, on {rows[0]['device']};", end=" ")
    print("in parentheses the time over the first provider's: above 1 is slower")
