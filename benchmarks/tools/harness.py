"""Times the providers of a case side by side and appends rows to results/NAME.csv; none is timed before it is found equal.

Every provider's outputs and gradients are compared with those of the first provider, the reference, on the same inputs in float64. Where
one is off, no row of that case is written, the others are measured, and the run ends with a ValueError. In float32 it may be off by 1e-5
of the largest value, or by twice as much as the reference is, which sums over many positions take beyond that; modules are compared in
float64 alone, because a ReLU near zero may fall on either side in float32. Nor is there a row where
a published library is faster than the reference: what FastFlow is compared with has to be the best of plain PyTorch. A ratio is the time
over the reference's: above 1 is slower.

``bytes_moved`` over the time is a case's GB/s, to be seen beside those of a copy in the same run; inputs that fit in a cache may exceed it.
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
from benchmarks.tools.traffic import Traffic

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
QUANTILES = (0.2, 0.5, 0.8)
LIBRARIES = ("nflows", "normflows")  # published, none of them faster than the reference
COPIED = {"cuda": 1 << 30, "cpu": 1 << 28}  # bytes, beyond any cache
CACHE = 64 << 20  # bytes; a case has so many sets of inputs that they exceed it, where they are not tiny
ROUNDS = 5  # on the CPU the providers take turns so often, and a busy neighbour is everyone's


@dataclass(eq=False)
class Case:
    """What is timed: ``providers`` by name, the reference first, each called with what ``inputs`` draws.

    ``gradients_of`` are the places of the arguments that forward+backward differentiates by; without, there is forward alone. A provider
    that is a module, in float64 until it is timed, is differentiated by its parameters too; those that it shares with the reference are
    compared. ``bytes_moved`` in forward: each tensor once. ``compiled``: what torch.compile makes of the reference is another provider.
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
    """The options that all benchmarks share, and pytest has too."""
    add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    add_argument("--seconds", type=float, default=0.4, help="time for a case and mode, without compiling")
    add_argument(
        "--quick",
        action="store_true",
        help="tiny sizes, hardly any repetitions, no torch.compile: to see that it runs",
    )
    add_argument(
        "--compiled",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="with what torch.compile makes",
    )


def settle(options: argparse.Namespace) -> None:
    """What --quick says of other options."""
    options.seconds = 0.01 if options.quick else options.seconds
    options.compiled = options.compiled and not options.quick


def arguments(
    description: str,
    argv: list[str] | None,
    add: Callable[[argparse.ArgumentParser], object] = lambda _: None,
):
    """A benchmark's options: those that all share, where rows go, and those that ``add`` adds."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    add_arguments(parser.add_argument)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the rows")
    add(parser)
    options = parser.parse_args(argv)
    settle(options)
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


def parameters(provider: Callable) -> list[nn.Parameter]:
    return list(provider.parameters()) if isinstance(provider, nn.Module) else []


def _compute(
    provider: Callable, args: tuple, leaves: list[Tensor], upstream: list[Tensor]
) -> tuple[tuple[Tensor, ...], ...]:
    """The outputs and, where there are ``leaves``, the gradients by those; apart from them the gradients by the provider's parameters."""
    if not leaves:
        with torch.no_grad():
            return _outputs(provider, args), ()
    out = _outputs(provider, args)
    varying = [
        (v, g) for v, g in zip(out, upstream, strict=True) if v.requires_grad
    ]  # not the log-det of a map that has a constant one
    own = parameters(provider)
    gradients = torch.autograd.grad(
        [v for v, _ in varying], [*leaves, *own], [g for _, g in varying], materialize_grads=bool(own)
    )
    return (*out, *gradients[: len(leaves)]), gradients[len(leaves) :]


def _input_set(case: Case, mode: str, device: str) -> tuple:
    """What ``_compute`` takes after the provider."""
    args = tuple(v.to(device, case.dtype if v.is_floating_point() else None) for v in case.inputs())
    leaves = [args[i].requires_grad_() for i in case.gradients_of] if mode == "forward+backward" else []
    with torch.no_grad():
        upstream = [torch.randn_like(v) for v in _outputs(case.reference, args)] if leaves else []
    return args, leaves, upstream


def _errors(case: Case, mode: str, inputs: tuple) -> tuple[dict[str, float], float]:
    """The largest relative error of each provider, and the tolerance. Raises ValueError for an error above it."""
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
            where = f"{case.name} {case.shape} {str(case.dtype)[6:]} {case.layout} {mode}, output {each.argmax().item()}"
            raise ValueError(
                f"{where}: {name} is off by {error:.1e} of the largest value, expected {tolerance:.1e}; no row is written"
            )
        if provider is case.reference:
            tolerance = max(TOLERANCE[case.dtype], 2 * error)
    return errors, tolerance


@dataclass
class Prepared:
    """A case in one mode, its providers found equal: ``calls`` by provider, each through the sets of inputs in turn."""

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
    """Raises ValueError where a provider is off."""
    torch.manual_seed(0)
    torch.compiler.reset()  # or shapes would use up its limit of recompilations
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
    """On a GPU how many kernels, copies and fills a call starts; on the CPU how many operators it runs that are more than a view or an
    allocation, which torch.compile's code does not tell."""
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


def copy_bandwidth(device: str, seconds: float) -> float:
    """GB/s, read and written, of a copy that no cache holds."""
    x = torch.ones(COPIED[device], dtype=torch.uint8, device=device)
    y = torch.ones_like(x)
    p50 = microseconds({"copy": lambda: y.copy_(x)}, seconds, device)["copy"][1]
    return 2 * x.nbytes / p50 / 1e3


def modes(case: Case) -> tuple[str, ...]:
    return ("forward", "forward+backward") if case.gradients_of else ("forward",)


def row_of(
    case: Case, mode: str, provider: str, prepared: Prepared, p50_us: float, copy_gb_s: float
) -> dict[str, str | int]:
    """What a row says beside the time itself."""
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


def run(name: str, cases: list[Case], options: argparse.Namespace) -> list[dict]:
    """Checks and times every case in each mode, appends the rows to ``options.results/NAME.csv`` and prints them."""
    device = options.device
    torch.backends.cudnn.allow_tf32 = False  # its 10 bits are no match for float32
    if device == "cpu" and os.getloadavg()[0] > 0.3:
        print(
            f"other programs are running here, {os.getloadavg()[0]:.1f} at a time over the last minute: the times are not worth keeping"
        )
    about, copy_gb_s, rows, wrong = metadata(device), copy_bandwidth(device, options.seconds), [], []
    for case, mode in (bar := tqdm([(each, mode) for each in cases for mode in modes(each)], desc=name)):
        bar.set_postfix_str(f"{case.name} {case.shape} {mode}")
        try:
            prepared = prepare(case, mode, options)
            times = microseconds(prepared.calls, options.seconds, device)
            reference, *_ = (p50 for _, p50, _ in times.values())
            for library in times.keys() & set(LIBRARIES) if not options.quick else ():
                if times[library][1] < reference:
                    found = f"the reference takes {reference:.1f} us, {library} {times[library][1]:.1f}: a straw man"
                    raise ValueError(
                        f"{case.name} {case.shape} {case.layout} {mode}: {found}; no row is written"
                    )
        except ValueError as error:
            wrong.append(str(error))
            tqdm.write(wrong[-1])
            continue
        found = []
        for provider, (p20, p50, p80) in times.items():
            row = {"name": name} | row_of(case, mode, provider, prepared, p50, copy_gb_s)
            row |= {
                "p20_us": f"{p20:.2f}",
                "p50_us": f"{p50:.2f}",
                "p80_us": f"{p80:.2f}",
                "ratio": f"{p50 / reference:.3f}",
            }
            found.append(row | about)
        append(
            options.results / f"{name}.csv", found
        )  # at once: a run that is cut keeps what it has measured
        rows += found
    if rows:
        report(rows)
    if wrong:
        raise ValueError("\n".join(wrong))
    return rows


def with_cases() -> dict[str, ModuleType]:
    """The benchmarks of ops and layers that have cases, by name."""
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
    """A benchmark's command line."""
    options = arguments(description, argv, lambda parser: parser.set_defaults(seconds=seconds))
    return run(name, cases(options), options)


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
        print(
            f"fastflow: slower than the reference in {slower} of {len(ours)}, time over its {min(ours):.2f} to {max(ours):.2f}"
        )
    print(
        f"microseconds, p50, on {rows[0]['device']}; in parentheses the time over that of the first provider: above 1 is slower"
    )
