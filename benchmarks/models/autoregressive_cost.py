"""Measures the cost of an autoregressive layer against the number of features: a pass of the network, the one-pass
inverse, and the inverse in D passes.

    python -m benchmarks.models.autoregressive_cost

The layer is affine, with two hidden layers of 256 units, at batch 256. The inverse in D passes is measured up to 64
features. Rows go to results/autoregressive_cost.csv, the picture to docs/pictures/autoregressive_cost.png.
"""

import argparse
import os
from collections.abc import Callable
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

from benchmarks.tools import harness
from fastflow.nn import MaskedAutoregressive, MaskedNetwork
from fastflow.trainer.cli import keep_memory

FEATURES, QUICK = (4, 8, 16, 32, 64, 128, 256, 512, 1024), (2, 4)
BATCH, HIDDEN, MOST_PASSES = 256, 256, 64
NAMES = {"pass": "one pass of the network", "inverse": "one-pass inverse", "passes": "inverse in D passes"}


def calls(features: int, device: str) -> dict[str, Callable[[], tuple[Tensor, Tensor]]]:
    """What is measured, by name, after the two inverses were compared."""
    torch.manual_seed(0)
    flow = MaskedAutoregressive(MaskedNetwork(features, 2, (HIDDEN, HIDDEN))).to(device)
    with torch.no_grad():
        for p in flow.parameters():
            p.add_(torch.randn_like(p), alpha=0.02)
    z = torch.randn(BATCH, features, device=device)
    passes = torch.no_grad()(lambda: flow._in_passes(z, None, None))
    inverse = torch.no_grad()(lambda: flow.inverse(z))
    found = {"pass": torch.no_grad()(lambda: flow(z)), "inverse": inverse}
    if features <= MOST_PASSES:
        torch.testing.assert_close(inverse(), passes(), rtol=1e-4, atol=1e-4)
        found["passes"] = passes
    return found


def measure(features: int, options: argparse.Namespace) -> list[dict]:
    taken = harness.microseconds(calls(features, options.device), options.seconds, options.device)
    rows = []
    for name, (p20, p50, p80) in taken.items():
        row = {"features": features, "batch": BATCH, "hidden": HIDDEN, "provider": name}
        row |= {"p20_ms": f"{p20 / 1e3:.4f}", "p50_ms": f"{p50 / 1e3:.4f}", "p80_ms": f"{p80 / 1e3:.4f}"}
        rows.append(row | harness.metadata(options.device))
    return rows


def picture(rows: list[dict], path: Path) -> None:
    figure = Figure(figsize=(5, 3.4), layout="constrained")
    axes = figure.subplots()
    for name, label in NAMES.items():
        points = [(int(r["features"]), float(r["p50_ms"])) for r in rows if r["provider"] == name]
        axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=label)
    axes.set(xscale="log", yscale="log", xlabel="features D", ylabel="milliseconds")
    axes.set_title(rows[0]["device"], fontsize=9)
    axes.grid(color="0.9")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def main(argv: list[str] | None = None) -> list[dict]:
    def add(parser: argparse.ArgumentParser) -> None:
        default = harness.ROOT / "docs" / "pictures"
        parser.add_argument("--pictures", type=Path, default=default, help="folder of the picture")
        parser.set_defaults(seconds=4.0)

    options, rows = harness.arguments(__doc__, argv, add), []
    keep_memory()
    if options.device == "cpu" and (load := os.getloadavg()[0]) > 0.3:
        print(f"other programs are running ({load:.1f} on average over the last minute): discard these times")
    for features in tqdm(QUICK if options.quick else FEATURES, desc="autoregressive_cost"):
        rows += measure(features, options)
    harness.append(options.results / "autoregressive_cost.csv", rows)
    picture(rows, options.pictures / "autoregressive_cost.png")
    return rows


if __name__ == "__main__":
    main()
