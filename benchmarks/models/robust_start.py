"""Measures whether Glow trains from its first step on: Adam without a warm-up, by depth and learning rate.

    python -m benchmarks.models.robust_start --data-dir data

Each model has two levels of K steps and 64 hidden channels. It trains for 100 steps of plain Adam on batches of
16 central 16x16 crops, once with ``output_start=1`` and once with the default. A row has the bits/dim of the
first step, the worst over it, and the mean of the last ten steps; infinity if a step is not finite, or above
1e15. Nothing is clipped. Rows go to results/robust_start.csv, and the tables of docs/training.md are rewritten.
Cases that have a row already are not measured again, nor is the default where it is 1.
"""

import argparse
import csv
import math
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.tools import harness, page
from fastflow.models import Glow
from fastflow.models.glow import GlowConfig
from fastflow.trainer import data

STEPS, RATES = (4, 8, 16, 32), (1e-4, 3e-4, 1e-3, 3e-3)
SETS = ("cifar10", "photos", "mnist")
SIDE, BATCH, HIDDEN, LEVELS, COUNT, SEED = 16, 16, 64, 2, 100, 1
CASE = ("data", "steps_per_level", "rate", "output_start")
TOO_LARGE = 1e15


def crops(batches: data.Batches, step: int) -> Tensor:
    x = batches[step][0]
    top = (x.shape[-1] - SIDE) // 2
    return x[..., top : top + SIDE, top : top + SIDE].contiguous()


def losses(batches: data.Batches, k: int, rate: float, output_start: float | None, count: int) -> list[float]:
    """Bits/dim of the steps, until one is not finite."""
    torch.manual_seed(SEED)
    channels = crops(batches, 0).shape[1]
    options = {"hidden": HIDDEN, "reversible": False, "output_start": output_start}
    model = Glow((channels, SIDE, SIDE), levels=LEVELS, steps=k, **options)
    optimizer = torch.optim.Adam(model.parameters(), lr=rate, fused=True)
    found = []
    for step in range(count):
        loss = model(crops(batches, step), seed=step).mean()
        found.append(loss.item() if loss.isfinite() and loss < TOO_LARGE else math.inf)
        if found[-1] == math.inf:
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return found


def default_start(k: int) -> float:
    return GlowConfig(steps=k, hidden=HIDDEN).start_of_outputs()


def row_of(found: list[float]) -> dict[str, str]:
    last = found[-10:]
    end = sum(last) / len(last)
    return {"first": f"{found[0]:.4f}", "worst": f"{max(found) / found[0]:.4g}", "end": f"{end:.4f}"}


def read(path: Path) -> list[dict]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def measure(options: argparse.Namespace) -> list[dict]:
    path, about = options.results / "robust_start.csv", harness.metadata("cpu")
    sets, count = (("photos",), 3) if options.quick else (SETS, COUNT)
    steps, rates = ((1,), (1e-3,)) if options.quick else (STEPS, RATES)
    sources = {name: data.Batches(data.load(name, options.data_dir), BATCH, seed=0) for name in sets}
    rows = read(path)
    done = {tuple(row[name] for name in CASE) for row in rows}
    cases = [(name, k, rate, start) for k in steps for rate in rates for name in sets for start in ("1", "")]
    for name, k, rate, start in (bar := tqdm(cases)):
        case = dict(zip(CASE, (name, str(k), f"{rate:g}", start or "default"), strict=True))
        bar.set_postfix_str(" ".join(case.values()))
        if tuple(case.values()) in done or (not start and default_start(k) == 1):
            continue
        found = losses(sources[name], k, rate, float(start) if start else None, count)
        rows.append(case | row_of(found) | {"steps": str(count)} | about)
        harness.append(path, rows[-1:])
    return rows


def shown(value: str) -> str:
    number = float(value)
    return "∞" if number == math.inf else f"{number:.2f}" if number < 100 else f"{number:.1e}"


def table(rows: list[dict]) -> str:
    """Worst over first step and end of both starts: a line per model and rate, two columns per set of images."""
    found: dict[tuple, dict[tuple, dict]] = {}
    for row in rows:
        key = int(row["steps_per_level"]), float(row["rate"])
        found.setdefault(key, {})[row["data"], row["output_start"]] = row
    sets = [name for name in SETS if any(row["data"] == name for row in rows)]

    def cell(row: dict, name: str, column: str) -> str:
        pair = [row.get((name, start)) for start in ("1", "default")]
        return " → ".join(shown(each[column]) for each in pair if each is not None)

    head = ["K", "rate", *(f"{name}, {column}" for name in sets for column in ("worst / first", "end"))]
    lines = [
        [str(k), f"{rate:g}", *(cell(row, name, column) for name in sets for column in ("worst", "end"))]
        for (k, rate), row in sorted(found.items())
    ]
    commits = ", ".join(dict.fromkeys(row["commit"] for row in rows))
    about = f"{rows[0]['device']}, torch {rows[0]['torch']}, commits {commits}"
    return f"{page.table(head, lines)}\n\n({about})"


def main(argv: list[str] | None = None) -> list[dict]:
    def add(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--docs", type=Path, default=harness.ROOT / "docs")
        parser.add_argument("--data-dir", default="data", help="folder of torchvision's cifar10 and mnist")

    options = harness.arguments(__doc__, argv, add)
    rows = measure(options)
    page.write(options.docs / "training.md", {"robust_start": table(rows)})
    return rows


if __name__ == "__main__":
    main()
