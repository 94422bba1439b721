"""Trains with reversible backprop and with stored activations; compares losses, drift and memory.

    python -m benchmarks.models.reversible_soak --data cifar10

Trains a Glow L=3 from the same weights on the same batches and noise, each way in its own process:
reversible, stored, and stored with one thread. One thread sums in another order, so its difference from
stored is the effect of rounding on a run. Rows go to results/reversible_soak.csv, one per 5 steps:

- ``bits_per_dim``: mean of their losses;
- ``drift``: largest difference between a level's input and its reconstruction, over the largest value of
  the input, for test images in float32;
- ``resident_mib``: resident memory of the process.

Writes docs/pictures/reversible_soak.png and prints a summary.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.models import training
from benchmarks.models.reversible_gradients import drift
from benchmarks.tools import harness
from fastflow.models import Glow
from fastflow.trainer import data

WAYS = {"stored": (False, None), "reversible": (True, None), "stored, one thread": (False, 1)}
EVERY = 5  # steps per row


def resident() -> float:
    """Resident MiB of this process; NaN on systems without /proc."""
    statm = Path("/proc/self/statm")
    return (
        int(statm.read_text().split()[1]) * os.sysconf("SC_PAGESIZE") / 2**20
        if statm.exists()
        else float("nan")
    )


def run(way: str, options: argparse.Namespace) -> list[dict]:
    reversible, threads = WAYS[way]
    if threads:
        torch.set_num_threads(threads)
    source = data.load(options.data, options.data_dir)
    torch.manual_seed(0)
    model = Glow(
        source.shape,
        levels=3,
        steps=options.steps_per_level,
        hidden=options.hidden,
        output_start=1.0,
        reversible=reversible,
    )
    rows, losses = [], []
    for step, loss in enumerate(training.train(model, source, options.steps, desc=way), start=1):
        losses.append(loss)
        if step % EVERY == 0:
            row = {
                "step": step,
                "bits_per_dim": f"{sum(losses) / len(losses):.6f}",
                "resident_mib": f"{resident():.1f}",
            }
            if step % (5 * EVERY) == 0 or step == options.steps:
                row |= {"drift": f"{drift(model, source.test[:16], None):.2e}"}
            rows.append(row)
            losses.clear()
    return rows


def run_in_a_process(way: str, options: argparse.Namespace) -> list[dict]:
    given = [
        f"--{name.replace('_', '-')}={getattr(options, name)}"
        for name in ("data", "data_dir", "steps", "steps_per_level", "hidden")
    ]
    command = [sys.executable, "-m", "benchmarks.models.reversible_soak", *given, "--one", way]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=harness.ROOT, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def column(rows: list[dict], way: str, name: str) -> tuple[list[int], list[float]]:
    pairs = [(int(r["step"]), float(r[name])) for r in rows if r["way"] == way and r.get(name)]
    return [step for step, _ in pairs], [value for _, value in pairs]


def differences(rows: list[dict], way: str) -> list[float]:
    """Differences of the losses from those of stored."""
    return [
        a - b
        for a, b in zip(
            column(rows, way, "bits_per_dim")[1], column(rows, "stored", "bits_per_dim")[1], strict=True
        )
    ]


def summary(rows: list[dict]) -> str:
    lines = []
    for way in WAYS:
        bits, memory = column(rows, way, "bits_per_dim")[1], column(rows, way, "resident_mib")[1]
        off = max(map(abs, differences(rows, way)))
        middle = memory[len(memory) // 4]
        lines.append(
            f"{way:<20} {bits[0]:.3f} to {bits[-1]:.3f} bits/dim, at most {off:.4f} from stored; drift up to "
            f"{max(column(rows, way, 'drift')[1]):.1e}; {middle:,.0f} MiB after a quarter of the run, "
            f"{memory[-1]:,.0f} MiB at its end"
        )
    return "\n".join(lines)


def plot(rows: list[dict], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6.4), layout="constrained")
    (losses, apart), (drifts, memory) = figure.subplots(2, 2)
    styles = {
        "stored": ("-", "#555555"),
        "reversible": ("--", "#d62728"),
        "stored, one thread": (":", "#1f77b4"),
    }
    for way, (line, color) in styles.items():
        style = {"color": color, "linestyle": line, "label": way}
        losses.plot(*column(rows, way, "bits_per_dim"), **style)
        memory.plot(*column(rows, way, "resident_mib"), **style)
        drifts.semilogy(*column(rows, way, "drift"), **style)
        if way != "stored":
            apart.plot(column(rows, way, "step")[0], differences(rows, way), **style)
    losses.set_title("training bits/dim, means of 5 steps")
    apart.set_title("difference from stored, bits/dim")
    drifts.set_title("drift: reconstructed inputs, relative difference")
    memory.set_title("resident memory, MiB")
    memory.set_ylim(0, 1.2 * memory.get_ylim()[1])
    for axes in (losses, apart, drifts, memory):
        axes.grid(alpha=0.3)
        axes.set_xlabel("step")
        axes.legend(fontsize=8, frameon=False)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=100)


def main(argv: list[str] | None = None) -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="photos", help="as in fastflow train")
    parser.add_argument(
        "--data-dir", type=lambda p: str(Path(p).resolve()), default=str(harness.ROOT / "data")
    )
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--steps-per-level", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--results", type=Path, default=harness.RESULTS, help="folder of the rows")
    parser.add_argument("--docs", type=Path, default=harness.ROOT / "docs", help="folder of pictures/")
    parser.add_argument("--one", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.one:
        print(json.dumps(run(options.one, options)))
        return []
    size = {"data": options.data, "steps_per_level": options.steps_per_level, "hidden": options.hidden}
    about = harness.metadata("cpu")
    rows = [
        size | {"way": way} | {"drift": ""} | row | about
        for way in WAYS
        for row in run_in_a_process(way, options)
    ]
    harness.append(options.results / "reversible_soak.csv", rows)
    plot(rows, options.docs / "pictures" / "reversible_soak.png")
    print(summary(rows))
    return rows


if __name__ == "__main__":
    main()
