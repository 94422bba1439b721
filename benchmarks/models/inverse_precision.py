r"""Measures the error of inverting a 1x1 convolution with LU weights: one product, or two triangular solves.

    python -m benchmarks.models.inverse_precision

W = P L (U + diag s) of C channels has float32 parameters; its condition number is computed from them in
float64. The kinds of W, each at several settings:

- rotation: as the layer starts, an orthogonal matrix;
- trained: the layers of a Glow L=3 K=8 hidden 32 after that many steps on photographs;
- log_s: strict triangles normal with standard deviation 0.5 / sqrt(C), log s uniform in [-a, a];
- lower: strict triangle of L normal with t / sqrt(C), U as in log_s with a = 0; upper: with L and U
  exchanged;
- unpivoted: a rotation with P = 1 whose first pivot is 10^-k of its column: L and U are ill-conditioned, W
  is not.

Errors are relative, ||x' - x|| / ||x|| in the maximum norm and in the 2-norm; medians over the matrices.
Round trip: x' = W^-1 (W x) for normal x, W x by conv1x1. Inverse: y is normal and exact, x comes from
float64 solves. Rows go to results/inverse_precision.csv, and the times of both ways to
results/inverse_time.csv. The tables of docs/precision.md and its picture are rewritten.
"""

import argparse
import functools
import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.models.pixel_exactness import trained
from benchmarks.tools import harness, page
from fastflow import ops
from fastflow.models import Glow
from fastflow.nn import InvertibleConv1x1
from fastflow.trainer import data

DRAWS, POSITIONS = 8, 256
CHANNELS = (12, 48, 192)
SETTINGS = {
    "rotation": (0,),
    "trained": (200,),
    "log_s": (0, 1, 2, 3, 4, 5, 6),
    "lower": (1, 2, 3, 4),
    "upper": (1, 2, 3, 4),
    "unpivoted": (0, 1, 2, 3),
}
NAMES = ("perm", "lower", "upper", "log_s", "sign_s")
HALVES = ("rotation", "log_s")  # kinds that are measured in other dtypes as well
EXPLICIT, SOLVES = "explicit inverse", "two solves"
LINALG = "linalg.solve_triangular"

# matrices -----------------------------------------------------------------------------


def _of_layers(layers: list[InvertibleConv1x1]) -> tuple[Tensor, ...]:
    return tuple(torch.stack([getattr(layer, name).detach() for layer in layers]) for name in NAMES)


@functools.cache
def _glow(steps: int) -> Glow:
    return trained(data.load("photos", "data"), "soft_clamp", steps, hidden=32)


def _unpivoted(c: int, k: float) -> tuple[Tensor, ...]:
    """A rotation whose first entry is 10^-k of its largest possible value, decomposed without pivoting."""
    Q = torch.linalg.qr(torch.randn(c, c, dtype=torch.float64)).Q
    turn = math.acos(10**-k) - math.atan2(Q[1, 0], Q[0, 0])
    first, second = Q[0].clone(), Q[1].clone()
    Q[0], Q[1] = (
        math.cos(turn) * first - math.sin(turn) * second,
        math.sin(turn) * first + math.cos(turn) * second,
    )
    L, U = torch.eye(c, dtype=Q.dtype), Q
    for i in range(c):
        L[i + 1 :, i] = U[i + 1 :, i] / U[i, i]
        U[i + 1 :] -= L[i + 1 :, i, None] * U[i]
    s = U.diagonal()
    return torch.arange(c), L.tril(-1).float(), U.triu(1).float(), s.abs().log().float(), s.sign().float()


def parameters(kind: str, setting: float, c: int, draws: int) -> tuple[Tensor, ...] | None:
    """perm, lower, upper, log_s, sign_s of a stack of matrices, float32; None if the kind lacks this size."""
    if kind == "rotation":
        return _of_layers([InvertibleConv1x1(c) for _ in range(draws)])
    if kind == "trained":
        if c > 48:
            return None
        return _of_layers(
            [m for m in _glow(setting).modules() if isinstance(m, InvertibleConv1x1) and m.num_features == c]
        )
    if kind == "unpivoted":
        return tuple(map(torch.stack, zip(*(_unpivoted(c, setting) for _ in range(draws)), strict=True)))
    modest = 0.5 / math.sqrt(c)
    sizes = {side: setting / math.sqrt(c) if kind == side else modest for side in ("lower", "upper")}
    perm = torch.stack([torch.randperm(c) for _ in range(draws)])
    log_s = (2 * torch.rand(draws, c) - 1) * (setting if kind == "log_s" else 0)
    return (
        perm,
        *(size * torch.randn(draws, c, c) for size in sizes.values()),
        log_s,
        torch.randn(draws, c).sign(),
    )


def triangles(
    perm: Tensor, lower: Tensor, upper: Tensor, log_s: Tensor, sign_s: Tensor
) -> tuple[Tensor, Tensor]:
    L = lower.tril(-1) + torch.eye(lower.shape[-1], dtype=lower.dtype, device=lower.device)
    return L, upper.triu(1) + torch.diag_embed(sign_s * log_s.exp())


# ways to invert -----------------------------------------------------------------------


def _conv1x1(x: Tensor, weight: Tensor) -> Tensor:
    """Convolves each ``x[k]`` with its own ``weight[k]``."""
    return torch.cat([ops.conv1x1(one, w) for one, w in zip(x.split(1), weight, strict=True)])


def _unpermuted(y: Tensor, perm: Tensor) -> Tensor:
    """P^T y."""
    return y.gather(1, perm.argsort(1).unsqueeze(2).expand_as(y))


def ways(perm: Tensor, *rest: Tensor) -> dict[str, Callable[[Tensor], Tensor]]:
    """Functions that compute x from y, both ``[K, C, positions]``, by way."""
    L, U = triangles(perm, *rest)
    weight, inverse, _ = ops.lu_weight(perm, *rest)

    def two_solves(y: Tensor) -> Tensor:
        return ops.triangular_solve(
            U, ops.triangular_solve(L, _unpermuted(y, perm), upper=False, unit_diagonal=True), upper=True
        )

    def by_linalg(y: Tensor) -> Tensor:
        z = torch.linalg.solve_triangular(L, _unpermuted(y, perm), upper=False, unitriangular=True)
        return torch.linalg.solve_triangular(U, z, upper=True)

    return {
        EXPLICIT: lambda y: _conv1x1(y, inverse),
        SOLVES: two_solves,
        LINALG: by_linalg,
        "linalg.inv(W)": lambda y: torch.linalg.inv(weight) @ y,
        "linalg.solve(W)": lambda y: torch.linalg.solve(weight, y),
    }


# measuring ----------------------------------------------------------------------------


def errors(found: Tensor, truth: Tensor) -> tuple[str, str]:
    """Medians over the stack of the relative error, maximum norm and 2-norm."""
    off, size = (found.double() - truth.double()).flatten(1), truth.double().flatten(1)
    return tuple(f"{(off.norm(p, dim=1) / size.norm(p, dim=1)).median():.2e}" for p in (torch.inf, 2))


def conditions(perm: Tensor, *rest: Tensor) -> dict[str, str]:
    """Medians over the stack of the condition numbers of W, L and U, in float64."""
    L, U = triangles(perm, *(v.double() for v in rest))
    matrices = {"condition": L @ U, "condition_lower": L, "condition_upper": U}
    return {name: f"{torch.linalg.cond(matrix).median():.2e}" for name, matrix in matrices.items()}


def measured(given: tuple[Tensor, ...], dtype: torch.dtype, positions: int) -> list[dict]:
    """One row per way; in dtypes other than float32 for the explicit inverse only.

    Triangular solves have no half precision.
    """
    perm, *rest = given
    exact = [v.double() for v in rest]
    computed = [v.to(ops.acc_dtype(dtype)) for v in rest]
    weight = ops.lu_weight(perm, *computed)[0]
    x, y = torch.randn(2, *perm.shape, positions, dtype=torch.float64).to(dtype)
    image = _conv1x1(x, weight)
    L, U = triangles(perm, *exact)
    truth = torch.linalg.solve_triangular(L, _unpermuted(y.double(), perm), upper=False, unitriangular=True)
    truth = torch.linalg.solve_triangular(U, truth, upper=True)
    rows = []
    for way, inverse in ways(perm, *computed).items():
        if way == EXPLICIT or dtype == torch.float32:
            found = dict(zip(("round_trip_max", "round_trip_2"), errors(inverse(image), x), strict=True))
            found |= dict(zip(("inverse_max", "inverse_2"), errors(inverse(y), truth), strict=True))
            rows.append({"matrices": len(perm), "dtype": str(dtype)[6:], "way": way} | found)
    return rows


@torch.no_grad()
def precision(quick: bool) -> list[dict]:
    rows, about = [], harness.metadata("cpu")
    kinds = (
        {kind: settings[-1:] for kind, settings in SETTINGS.items() if kind != "trained"}
        if quick
        else SETTINGS
    )
    cases = [
        (c, kind, setting)
        for c in ((3,) if quick else CHANNELS)
        for kind, settings in kinds.items()
        for setting in settings
    ]
    for c, kind, setting in (bar := tqdm(cases, desc="inverse_precision")):
        bar.set_postfix_str(f"C={c} {kind} {setting}")
        torch.manual_seed(0)
        with torch.enable_grad():
            given = parameters(kind, setting, c, 2 if quick else DRAWS)
        if given is None:
            continue
        case = {"kind": kind, "setting": setting, "channels": c} | conditions(*given)
        for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16)[
            : 4 if kind in HALVES else 1
        ]:
            rows += [case | row | about for row in measured(given, dtype, 5 if quick else POSITIONS)]
    return rows


def time_cases(quick: bool) -> list[harness.Case]:
    """Both ways on images: with given weights, as in a Glow level, and from parameters, as in a layer."""

    def solve(y, L, U, perm):
        y, shape = y[:, perm.argsort()].flatten(2), y.shape
        z = ops.triangular_solve(L.expand(len(y), *L.shape), y, upper=False, unit_diagonal=True)
        return ops.triangular_solve(U.expand(len(y), *U.shape), z, upper=True).view(shape)

    def explicit_from_parameters(y, *given):
        return ops.conv1x1(y, ops.lu_weight(*given)[1][0])

    def solve_from_parameters(y, perm, *rest):
        L, U = triangles(perm, *rest)
        return solve(y, L[0], U[0], perm[0])

    cases = []
    for n, c, side in (
        [(2, 3, 2)] if quick else [(64, 12, 16), (64, 24, 8), (64, 48, 4), (64, 12, 32), (64, 48, 32)]
    ):

        def image(n=n, c=c, side=side):
            return torch.randn(n, c, side, side)

        @torch.no_grad()
        def at_hand(c=c, image=image):
            perm, *rest = parameters("log_s", 1, c, 1)
            L, U = triangles(perm, *rest)
            return image(), ops.lu_weight(perm, *rest)[1][0], L[0], U[0], perm[0]

        about = {"shape": f"{n}x{c}x{side}x{side}", "dtype": torch.float32, "compiled": False}
        providers = {
            EXPLICIT: lambda y, inverse, *_: ops.conv1x1(y, inverse),
            SOLVES: lambda y, _, *given: solve(y, *given),
        }
        cases.append(harness.Case("weights at hand", inputs=at_hand, providers=providers, **about))
        providers = {EXPLICIT: explicit_from_parameters, SOLVES: solve_from_parameters}
        inputs = lambda c=c, image=image: (image(), *parameters("log_s", 1, c, 1))  # noqa: E731
        cases.append(harness.Case("from the parameters", inputs=inputs, providers=providers, **about))
    return cases


# the page -----------------------------------------------------------------------------


def _settings(rows: list[dict]) -> dict[tuple, dict[str, dict]]:
    """The rows of each setting in one dtype, by way."""
    found = {}
    for row in rows:
        found.setdefault((row["channels"], row["kind"], row["setting"]), {})[row["way"]] = row
    return found


def _shown(rows: list[dict]) -> int:
    """C in the page's tables and in the picture."""
    channels = {row["channels"] for row in rows}
    return 48 if 48 in channels else max(channels)


def _span(values: list[float]) -> str:
    if not values:
        return "–"
    ends = [f"{end(values):.2f}" for end in (min, max)]
    return ends[0] if ends[0] == ends[1] else " to ".join(ends)


def tables(rows: list[dict], times: list[dict]) -> dict[str, str]:
    """The text between each pair of markers on the page."""
    single = _settings([row for row in rows if row["dtype"] == "float32"])
    names = list(next(iter(single.values())))
    shown = _shown(rows)
    lines = []
    for (c, kind, setting), by_way in single.items():
        if c == shown:
            about = by_way[EXPLICIT]
            cells = [f"{by_way[name]['round_trip_2']} / {by_way[name]['inverse_2']}" for name in names]
            lines.append(
                [
                    f"{kind} {setting}",
                    about["condition"],
                    about["condition_lower"],
                    about["condition_upper"],
                    *cells,
                ]
            )
    head = [f"W, C = {shown}", "κ(W)", "κ(L)", "κ(U)", *names]
    result = {"errors": page.table(head, lines)}

    def ratios(settings: list[dict[str, dict]]) -> list[str]:
        over = [(other, error) for other in (SOLVES, LINALG) for error in ("round_trip_2", "inverse_2")]
        return [
            _span([float(by_way[EXPLICIT][error]) / float(by_way[other][error]) for by_way in settings])
            for other, error in over
        ]

    groups = {}
    for (c, kind, _), by_way in single.items():
        groups.setdefault((f"C = {c}", kind), []).append(by_way)
    groups["all with a round-trip error below 1e-2", ""] = [
        w for w in single.values() if float(w[EXPLICIT]["round_trip_2"]) < 1e-2
    ]
    head = [
        f"{error}, explicit / {other}"
        for other in (SOLVES, LINALG)
        for error in ("round trip", "inverse only")
    ]
    lines = [[*group, str(len(settings)), *ratios(settings)] for group, settings in groups.items()]
    result["ratios"] = page.table(["", "W", "settings", *head], lines)

    by_dtype = {}
    for row in rows:
        if row["way"] == EXPLICIT and row["channels"] == shown and row["kind"] in HALVES:
            by_dtype.setdefault((row["kind"], row["setting"]), {})[row["dtype"]] = row
    lines = []
    for (kind, setting), found in by_dtype.items():
        cells = [found[dtype]["round_trip_max"] for dtype in ("float64", "float32", "bfloat16", "float16")]
        lines.append([f"{kind} {setting}", found["float32"]["condition"], *cells])
    result["dtypes"] = page.table(
        [f"W, C = {shown}", "κ(W)", "float64", "float32", "bfloat16", "float16"], lines
    )

    by_case = {}
    for row in times:
        by_case.setdefault((row["case"], row["shape"]), {})[row["provider"]] = row
    lines = [
        [*case, f[EXPLICIT]["p50_us"], f[SOLVES]["p50_us"], f[SOLVES]["ratio"]] for case, f in by_case.items()
    ]
    about = f"p50 in µs on {times[0]['device']}, torch {times[0]['torch']}, commit {times[0]['commit']}"
    result["times"] = (
        f"{page.table(['', 'N x C x H x W', EXPLICIT, SOLVES, 'solves / explicit'], lines)}\n\n({about})"
    )
    return result


def plot(rows: list[dict], path: Path) -> None:
    """Draws errors of each kind against the condition number of W; of L if W is always a rotation."""
    from matplotlib.figure import Figure

    single = [row for row in rows if row["dtype"] == "float32" and row["kind"] not in ("rotation", "trained")]
    kinds = list(dict.fromkeys(row["kind"] for row in single))
    shown = _shown(rows)
    figure = Figure(figsize=(3.6 * len(kinds), 7), layout="constrained")
    axes = figure.subplots(2, len(kinds), sharex="col", sharey=True, squeeze=False)
    styles = ("o-", "s-", "^--", "v--", "x:")
    colors = ("#d62728", "#1f77b4", "#17becf", "#ff7f0e", "#555555")
    for error, title, line in (
        ("round_trip_2", "round trip", axes[0]),
        ("inverse_2", "inverse only", axes[1]),
    ):
        for kind, ax in zip(kinds, line, strict=True):
            across = "condition_lower" if kind == "unpivoted" else "condition"
            of_kind = [row for row in single if row["kind"] == kind and row["channels"] == shown]
            for way, style, color in zip(
                dict.fromkeys(row["way"] for row in single), styles, colors, strict=True
            ):
                points = [(float(row[across]), float(row[error])) for row in of_kind if row["way"] == way]
                ax.loglog(*zip(*points, strict=True), style, color=color, mfc="none", lw=1.2, ms=6, label=way)
            if kind != "unpivoted":
                ends = [1, max(float(row[across]) for row in of_kind)]
                ax.loglog(ends, [2**-24 * k for k in ends], ":", color="#aaaaaa", label="2^-24 κ(W)")
            ax.set_ylim(2e-8, 10)
            ax.grid(alpha=0.3)
            ax.set_title(f"{title}: {kind}", fontsize=10)
            if line is axes[1]:
                ax.set_xlabel("condition number of " + ("L" if kind == "unpivoted" else "W"))
        line[0].set_ylabel(f"relative error, 2-norm, C = {shown}")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=6, frameon=False)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=100)


def main(argv: list[str] | None = None) -> None:
    def add(parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--docs", type=Path, default=harness.ROOT / "docs", help="folder of precision.md and pictures/"
        )

    options = harness.arguments(__doc__, argv, add)
    rows = precision(options.quick)
    times = harness.run("inverse_time", time_cases(options.quick), options)
    harness.append(options.results / "inverse_precision.csv", rows)
    page.write(options.docs / "precision.md", tables(rows, times))
    plot(rows, options.docs / "pictures" / "inverse_precision.png")


if __name__ == "__main__":
    main()
