"""Writes docs/benchmarks.md, its plots, docs/dingo.md and README's numbers from the rows in results/. Measures nothing.

    python -m benchmarks.tools.report

The newest row of a case on a device counts. A ratio is the time over plain PyTorch's of the same case and
run: above 1 is slower.
"""

import argparse
import csv
import re
import statistics
from pathlib import Path

from benchmarks.models import drop_in
from benchmarks.models.training_speed import COMPILED, IS_DEFAULT, batch_of, model_of
from benchmarks.tools import harness, highlights, page

# columns that identify the case of a row, by file
OPS = ("case", "shape", "dtype", "layout", "mode", "provider")
KEYS = {
    "drop_in": ("flow", "library", "mode", "provider"),
    "glow": ("size", "coupling", "mode", "provider"),
    "training_speed": ("size", "way"),
    "loader": ("source", "workers", "batch"),
    "memory": ("side", "batch", "hidden", "k", "way"),
    "memory_time": ("side", "batch", "hidden", "k", "way"),
    "memory_batch": ("side", "hidden", "k", "way", "limit_mib"),
    "modules": OPS,
    "step_profile": ("size", "by", "name"),
}
GLOW_MODES = {
    "forward+backward": "forward + backward, ms",
    "log_prob": "log_prob, ms",
    "sample": "a batch of samples, ms",
}
DINGO = "dingo-size NSF"
FOOTNOTE = "torch {torch}, commit {commit}, {date}"


def read(results: Path) -> dict[str, dict[str, list[dict]]]:
    """The newest row of each case, by device and then by file."""
    found: dict[str, dict[str, dict]] = {}
    for path in sorted(results.glob("*.csv")):
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        key = KEYS.get(path.stem) or (OPS if rows and {*OPS, "ratio"} <= rows[0].keys() else None)
        for row in rows if key else ():
            of_device = found.setdefault(row["device"], {}).setdefault(path.stem, {})
            case = tuple(row[column] for column in key)
            of_device.pop(case, None)
            of_device[case] = row
    return {
        device: {name: list(rows.values()) for name, rows in files.items()} for device, files in found.items()
    }


def ops_of(files: dict[str, list[dict]]) -> dict[tuple[str, str], list[dict]]:
    """The rows of ops by (file, mode)."""
    groups: dict[tuple[str, str], list[dict]] = {}
    for name, rows in files.items():
        for row in rows if name not in KEYS else ():
            groups.setdefault((name, row["mode"]), []).append(row)
    return groups


def ratios(rows: list[dict], provider: str) -> list[float]:
    return [float(row["ratio"]) for row in rows if row["provider"] == provider]


def compiled(rows: list[dict]) -> list[float]:
    """The smallest ratio of the providers from torch.compile, for each case."""
    best: dict[tuple, float] = {}
    for row in rows:
        if row["provider"].startswith("compile"):
            case = tuple(row[column] for column in OPS[:-1])
            best[case] = min(best.get(case, float("inf")), float(row["ratio"]))
    return list(best.values())


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})" if values else ""


def share_of_copy(rows: list[dict]) -> str:
    """The best share of the bandwidth of a copy of a gigabyte."""
    shares = [
        float(r["gb_s"]) / float(r["copy_gb_s"]) for r in rows if r["provider"] == "fastflow" and r["gb_s"]
    ]
    return f"{max(shares):.0%}" if shares else ""


def share_of_same_size_copy(rows: list[dict], copy: str, column: str) -> str:
    """The time of a copy of the same size over FastFlow's: median over the cases, least and most."""
    shares = [
        float(r[copy]) / float(r[column])
        for r in rows
        if r["provider"] == "fastflow" and r.get(copy) and r.get(column)
    ]
    return f"{statistics.median(shares):.0%} ({min(shares):.0%} to {max(shares):.0%})" if shares else ""


def captured(rows: list[dict]) -> str:
    """FastFlow's time over plain PyTorch's, both captured in CUDA graphs."""
    found: dict[tuple, dict[str, float]] = {}
    for row in rows:
        if row.get("captured_us"):
            case = tuple(row[column] for column in OPS[:-1])
            found.setdefault(case, {})[row["provider"]] = float(row["captured_us"])
    both = [us for us in found.values() if {"fastflow", "eager"} <= us.keys()]
    return spread([us["fastflow"] / us["eager"] for us in both])


def about(rows: list[dict]) -> str:
    return "; ".join(sorted({FOOTNOTE.format(**row) for row in rows}))


def launches(rows: list[dict]) -> str:
    """Launches of FastFlow and of plain PyTorch, the median over the cases."""
    of = {
        provider: [int(r["launches"]) for r in rows if r["provider"] == provider and r.get("launches")]
        for provider in ("fastflow", "eager")
    }
    return " / ".join(f"{statistics.median(counts):g}" for counts in of.values()) if all(of.values()) else ""


OP_COLUMNS = {
    "cases": lambda rows: str(len(ratios(rows, "fastflow"))),
    "FastFlow": lambda rows: spread(ratios(rows, "fastflow")),
    "slower in": lambda rows: (
        f"{sum(ratio > 1 for ratio in ratios(rows, 'fastflow'))} of {len(ratios(rows, 'fastflow'))}"
    ),
    "torch.compile": lambda rows: spread(compiled(rows)),
    "FastFlow, captured": captured,
    "launches, FastFlow / plain": launches,
    "best share of the copy": share_of_copy,
    "share of a copy of the same size": lambda rows: share_of_same_size_copy(
        rows, "same_size_copy_us", "p50_us"
    ),
    "that share, captured": lambda rows: share_of_same_size_copy(
        rows, "same_size_copy_captured_us", "captured_us"
    ),
    "measured": about,
}
# columns that only newer rows have, or only those of a GPU
OPTIONAL = ("FastFlow, captured", "share of a copy of the same size", "that share, captured")


def ops_table(files: dict[str, list[dict]]) -> str:
    groups = {key: rows for key, rows in ops_of(files).items() if ratios(rows, "fastflow")}
    if not groups:
        return ""
    columns = {head: [cell(rows) for rows in groups.values()] for head, cell in OP_COLUMNS.items()}
    columns = {head: cells for head, cells in columns.items() if head not in OPTIONAL or any(cells)}
    lines = zip(*zip(*groups, strict=True), *columns.values(), strict=True)
    return page.table(["op", "mode", *columns], [list(line) for line in lines])


def losses(files: dict[str, list[dict]]) -> str:
    """The cases in which an op of FastFlow takes longer than plain PyTorch."""
    lines = []
    for (name, mode), rows in ops_of(files).items():
        eager = {
            tuple(r[c] for c in OPS[:-1]): r
            for r in rows
            if float(r["ratio"]) == 1 and r["provider"] != "fastflow"
        }
        for row in rows:
            if row["provider"] == "fastflow" and float(row["ratio"]) > 1:
                base = eager.get(tuple(row[c] for c in OPS[:-1]))
                case = f"{row['case']} {row['shape']} {row['dtype']} {row['layout']}"
                lines.append([name, mode, case, row["p50_us"], base["p50_us"] if base else "", row["ratio"]])
    return page.table(["op", "mode", "case", "FastFlow, us", "plain, us", "ratio"], lines) if lines else ""


def glow_table(rows: list[dict]) -> str:
    lines: dict[tuple, dict[str, str]] = {}
    for row in rows:
        key = row["size"], row["coupling"], row["provider"]
        lines.setdefault(key, {})[row["mode"]] = f"{float(row['p50_ms']):.1f} ({float(row['ratio']):.2f})"
    body = [[*key, *(found.get(mode, "") for mode in GLOW_MODES)] for key, found in lines.items()]
    return page.table(["Glow", "coupling", "provider", *GLOW_MODES.values()], body)


def training_table(rows: list[dict]) -> str:
    rows = sorted(rows, key=batch_of)
    columns = {"Glow": [r["size"] for r in rows], "step": [r["way"] for r in rows]}
    columns["images/s"] = [f"{float(r['images_s_p50']):.0f}" for r in rows]
    columns["over plain's"] = [f"{float(r['over_plain']):.2f}" for r in rows]
    shares = [r.get("share_of_matmul") for r in rows]  # older rows have none
    if any(shares):
        columns["share of a matrix product's FLOP/s"] = [
            f"{float(share):.0%}" if share else "" for share in shares
        ]
    peaks = [r["peak_mib"] for r in rows]
    if {*peaks} != {"nan"}:  # measured by a GPU's allocator
        columns["peak, MiB"] = peaks
    return page.table([*columns], [list(line) for line in zip(*columns.values(), strict=True)])


def memory_table(rows: list[dict]) -> str:
    ways = list(dict.fromkeys(row["way"] for row in rows))
    peaks: dict[tuple, dict[str, str]] = {}
    for row in rows:
        peaks.setdefault((row["side"], row["batch"], row["hidden"], row["k"]), {})[row["way"]] = (
            f"{float(row['peak_mib']):.0f}"
        )
    body = [
        [f"{s}x{s}", b, h, k, *(found.get(way, "") for way in ways)] for (s, b, h, k), found in peaks.items()
    ]
    return page.table(["images", "batch", "hidden", "K", *(f"{way}, MiB" for way in ways)], body)


def memory_time_table(rows: list[dict]) -> str:
    body = [
        [f"{r['side']}x{r['side']}", *(r[c] for c in ("batch", "hidden", "k", "way", "p50_s", "ratio"))]
        for r in rows
    ]
    return page.table(["images", "batch", "hidden", "K", "way", "forward + backward, s", "over stored"], body)


def memory_batch_table(rows: list[dict]) -> str:
    body = [
        [
            f"{r['side']}x{r['side']}",
            *(r[c] for c in ("hidden", "k", "way", "limit_mib", "largest_batch", "peak_mib")),
        ]
        for r in rows
    ]
    return page.table(
        ["images", "hidden", "K", "way", "limit, MiB", "largest batch", "peak at it, MiB"], body
    )


def loader_table(rows: list[dict]) -> str:
    return page.table(
        ["source", "workers", "batch", "images/s"],
        [[r["source"], r["workers"], r["batch"], r["images_s"]] for r in rows],
    )


def modules_table(rows: list[dict]) -> str:
    """One line per layer and direction, with each provider's time over plain PyTorch's."""
    others = [name for name in dict.fromkeys(row["provider"] for row in rows) if name != "eager"]
    lines: dict[tuple, dict[str, dict]] = {}
    for row in rows:
        lines.setdefault((row["case"], row["shape"], row["mode"]), {})[row["provider"]] = row
    body = [
        [
            *case,
            found["eager"]["p50_us"],
            *(f"{float(found[name]['ratio']):.2f}" if name in found else "" for name in others),
        ]
        for case, found in lines.items()
    ]
    return page.table(["layer", "x", "mode", "plain, us", *(f"{name}" for name in others)], body)


def profile_table(rows: list[dict]) -> str:
    """The first ten rows by time and by bytes of the newest run."""
    newest = [
        r
        for r in rows
        if (r["commit"], r["date"], r["size"]) == tuple(rows[-1][c] for c in ("commit", "date", "size"))
    ]
    timed, moved = ([r for r in newest if r["by"] == by][:10] for by in ("time", "bytes"))
    lines = [[f"`{r['name'][:60]}`", r["calls"], r["us"], f"{float(r['share']):.0%}"] for r in timed]
    by_time = page.table([f"one step, {rows[-1]['size']}, by time", "calls", "us", "share"], lines)
    lines = [[f"`{r['name']}`", r["calls"], r["mib"], f"{float(r['share']):.0%}", r["gb_s"]] for r in moved]
    return by_time + "\n\n" + page.table(["by bytes", "calls", "MiB", "share", "GB/s"], lines)


TABLES = {
    "glow": ("Glow compared with plain PyTorch and published libraries", glow_table),
    "training_speed": ("The trainer's step", training_table),
    "memory": ("Peak memory of forward and backward, without weights and gradients", memory_table),
    "memory_batch": ("The largest batch that fits", memory_batch_table),
    "memory_time": ("Time of forward and backward, stored and recomputed activations", memory_time_table),
    "loader": ("The loader", loader_table),
    "step_profile": ("Time and bytes of a training step, by operator", profile_table),
    "modules": ("Single layers, time over plain PyTorch's", modules_table),
}


def slug(device: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", device.lower()).strip("_")


def section(device: str, files: dict[str, list[dict]], pictures: dict[str, str]) -> str:
    parts = [f"## {device}"]
    if "benchmarks" in pictures:
        title = "FastFlow's time over plain PyTorch's, for each op and for a whole Glow"
        parts.append(f"![{title}]({pictures['benchmarks']})")
    for name, (title, table) in TABLES.items():
        if name in files:
            parts += [
                f"### {title}",
                table(files[name]),
                f"({about(files[name])}; rows in `results/{name}.csv`)",
            ]
        if name in pictures:
            parts.append(f"![Images/s of a training step against batch]({pictures[name]})")
    if table := ops_table(files):
        parts += ["### Ops", "Time over plain PyTorch's: median over the cases (minimum to maximum).", table]
    if table := losses(files):
        parts += [
            "<details><summary>All cases in which an op takes longer than plain PyTorch</summary>\n\n"
            f"{table}\n\n</details>"
        ]
    return "\n\n".join(parts)


def plot(device: str, files: dict[str, list[dict]], path: Path) -> bool:
    """Draws a mark per case for FastFlow and torch.compile, and bars for Glow. False if there are no rows."""
    from matplotlib.figure import Figure

    groups = {key: rows for key, rows in ops_of(files).items() if ratios(rows, "fastflow")}
    glow = [r for r in files.get("glow", ()) if r["size"] == files["glow"][-1]["size"]]
    couplings = list(dict.fromkeys(r["coupling"] for r in glow))
    names = sorted(
        dict.fromkeys((r["mode"], r["provider"]) for r in glow),
        key=lambda name: list(GLOW_MODES).index(name[0]),
    )
    if not groups and not glow:
        return False
    figure = Figure(figsize=(11, 1.6 + 0.28 * max(len(groups), len(names))), layout="constrained")
    left, right = figure.subplots(1, 2)
    for y, rows in enumerate(groups.values()):
        for values, offset, style in (
            (ratios(rows, "fastflow"), -0.13, "C3o"),
            (compiled(rows), 0.13, "C0x"),
        ):
            left.plot(values, [y + offset] * len(values), style, markersize=4, alpha=0.6, linestyle="none")
    left.plot([], [], "C3o", label="FastFlow")
    left.plot([], [], "C0x", label="torch.compile of plain")
    left.set_yticks(range(len(groups)), [f"{name}, {mode}" for name, mode in groups], fontsize=8)
    left.set_xscale("log")
    left.xaxis.set_major_formatter("{x:g}")
    left.margins(y=0.08)
    left.set_title("ops, one mark per case", fontsize=10)
    left.legend(fontsize=8, frameon=False)
    for i, coupling in enumerate(couplings):
        rows, thick = [r for r in glow if r["coupling"] == coupling], 0.8 / len(couplings)
        y = [names.index((r["mode"], r["provider"])) + (i + 0.5) * thick - 0.4 for r in rows]
        colors = ["C3" if "fastflow" in r["provider"] else "0.6" for r in rows]
        right.barh(
            y, [float(r["ratio"]) for r in rows], thick, color=colors, alpha=1 - 0.5 * i, label=coupling
        )
    if len(couplings) > 1:
        right.margins(y=0.08)
        right.legend(fontsize=8, frameon=False, loc="upper left")
    right.set_yticks(range(len(names)), [f"{provider}, {mode}" for mode, provider in names], fontsize=8)
    right.set_title("Glow " + (glow[0]["size"] if glow else ""), fontsize=10)
    for axes in (left, right):
        axes.axvline(1, color="black", linewidth=0.8)
        axes.invert_yaxis()
        axes.set_xlabel("time over plain PyTorch's")
        axes.grid(alpha=0.3, axis="x", which="both")
    figure.suptitle(device, fontsize=11)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=100)
    return True


def plot_batches(device: str, files: dict[str, list[dict]], path: Path) -> bool:
    """Draws images/s of the newest model's training step against batch. False if no way has two batches."""
    import matplotlib
    from matplotlib.figure import Figure

    rows = files.get("training_speed", [])
    lines: dict[str, list[tuple[int, float]]] = {}
    for row in sorted(rows, key=batch_of):
        if model_of(row) == model_of(rows[-1]):
            lines.setdefault(row["way"], []).append((batch_of(row), float(row["images_s_p50"])))
    lines = {way: points for way, points in lines.items() if len(points) > 1}
    if not lines:
        return False
    colors = {"plain": "0.5", COMPILED: "C0"} | {way: "C3" for way in lines if way.endswith(IS_DEFAULT)}
    others = [way for way in lines if way not in colors]
    colors |= {way: matplotlib.colormaps["viridis"](i / len(others)) for i, way in enumerate(others)}
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    axes = figure.subplots()
    for way, points in lines.items():
        axes.plot(*zip(*points, strict=True), "o-", color=colors[way], markersize=4, label=way)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_ylim(bottom=0)
    axes.set_xticks(sorted({batch for points in lines.values() for batch, _ in points}))
    axes.set_xlabel("batch")
    axes.set_ylabel("images/s")
    axes.set_title(f"a training step of Glow {model_of(rows[-1])}, {device}", fontsize=10)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=100)
    return True


PLOTS = {"benchmarks": plot, "training_speed": plot_batches}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=harness.RESULTS, help="folder of the rows")
    parser.add_argument(
        "--docs", type=Path, default=harness.ROOT / "docs", help="folder of the pages and pictures/"
    )
    parser.add_argument("--readme", type=Path, default=harness.ROOT / "README.md")
    options = parser.parse_args(argv)
    sections, rows = [], read(options.results)
    for device, files in rows.items():
        pictures = {name: f"pictures/{name}_{slug(device)}.png" for name in PLOTS}
        drawn = {
            name: path for name, path in pictures.items() if PLOTS[name](device, files, options.docs / path)
        }
        sections.append(section(device, files, drawn))
    page.write(options.docs / "benchmarks.md", {"sections": "\n\n".join(sections)})
    measured = [
        highlights.text(device, files) for device, files in rows.items() if files.keys() & {"glow", "memory"}
    ]
    faster = [
        highlights.accelerated(device, files["drop_in"])
        for device, files in rows.items()
        if "drop_in" in files
    ]
    of_dingo = [
        drop_in.table(found)
        for files in rows.values()
        if (found := [row for row in files.get("drop_in", []) if row["flow"] == DINGO])
    ]
    page.write(options.docs / "dingo.md", {"dingo": "\n\n".join(of_dingo)})
    page.write(options.readme, {"measured": "\n\n".join(measured), "accelerated": "\n\n".join(faster)})
    print(f"{options.docs / 'benchmarks.md'}: {len(sections)} device{'s' * (len(sections) != 1)}")


if __name__ == "__main__":
    main()
