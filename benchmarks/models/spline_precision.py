"""Measures the round trip of rational-quadratic splines in float32, forward and inverse.

    python -m benchmarks.models.spline_precision

Conventions of nflows and zuko, 8 bins, linear tails, an interval of [-3, 3], x and raw parameters normal, the latter
times a scale. Each way runs in batches of 1,000 elements. Rows go to results/spline_precision.csv, and the table of
docs/precision.md is rewritten. Libraries that are not installed are left out.
"""

import argparse
import functools
from collections.abc import Callable

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.ops import spline
from benchmarks.tools import harness, page
from fastflow import ops
from fastflow.ops.spline import parameters_per_element

SCALES = (1, 3, 6, 10)  # of the raw parameters
BATCH, BATCHES = 1000, 100


def errors(way: Callable, x: Tensor, params: Tensor) -> tuple[Tensor, int]:
    """The errors of x after the forward and the inverse direction, and the number of batches that were refused."""
    found, refused = [], 0
    for b_x, b_params in zip(x.split(BATCH), params.split(BATCH), strict=True):
        try:
            back, _ = way(way(b_x, b_params, inverse=False)[0], b_params, inverse=True)
        except AssertionError:  # nflows asserts that no discriminant is negative
            refused += 1
            continue
        found.append((back - b_x).abs())
    return torch.cat(found).double(), refused


def measured(device: str, quick: bool) -> list[dict]:
    about, rows, batches = harness.metadata(device), [], 1 if quick else BATCHES
    for convention in spline.CONVENTIONS[1:]:
        ways = spline.library(convention) | {
            "fastflow": functools.partial(ops.spline, bins=spline.BINS, convention=convention)
        }
        each = parameters_per_element(spline.BINS, "linear", convention)
        for scale in tqdm(SCALES, desc=convention):
            torch.manual_seed(0)
            x = 2 * torch.randn(batches * BATCH, 1, device=device)
            params = scale * torch.randn(len(x), each, device=device)
            for way, function in ways.items():
                error, refused = errors(function, x, params)
                valid = error[~error.isnan()]
                row = {"name": "spline_precision", "convention": convention, "scale": scale, "way": way}
                row |= {"median": f"{valid.median():.1e}", "p99": f"{valid.quantile(0.99):.1e}"}
                row |= {"nan": int(error.isnan().sum()), "refused": refused, "batches": batches}
                rows.append(row | about)
    return rows


def table(rows: list[dict]) -> str:
    head = ["convention", "scale", "computed by", "median", "99 of 100", "NaN elements", "refused batches"]
    columns = ("convention", "scale", "way", "median", "p99", "nan", "refused")
    last = "\n\n({batches} batches of {n} elements on {device}, torch {torch}, commit {commit})"
    return page.table(head, [[str(row[c]) for c in columns] for row in rows]) + last.format(
        n=f"{BATCH:,}", **rows[0]
    )


def main(argv: list[str] | None = None) -> None:
    def add(parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--docs", type=harness.Path, default=harness.ROOT / "docs", help="folder of precision.md"
        )

    options = harness.arguments(__doc__, argv, add)
    rows = measured(options.device, options.quick)
    harness.append(options.results / "spline_precision.csv", rows)
    page.write(options.docs / "precision.md", {"splines": table(rows)})


if __name__ == "__main__":
    main()
