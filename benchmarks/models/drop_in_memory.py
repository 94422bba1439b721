"""Bytes that flows of other libraries keep for backward: as they are, accelerated, and reversible.

    python -m benchmarks.models.drop_in_memory

The flows are those of benchmarks/models/drop_in.py with chains that recompute their activations. Log-densities and
gradients are compared in float64 first; a flow that differs has no row. Bytes do not depend on the machine's load.

Rows go to results/drop_in_memory.csv. The table of docs/drop_in.md is rewritten.
"""

import argparse
import copy
import importlib
import warnings
from pathlib import Path

from torch import nn
from tqdm import tqdm

from benchmarks.models import drop_in, libraries
from benchmarks.tools import harness, page

NAMES = ("sbi's default NSF", "dingo-size NSF", "8 AllInOneBlocks, images")


def providers(case: drop_in.Case, flow: nn.Module) -> dict[str, nn.Module]:
    """The flow, and copies that are accelerated and reversible."""
    integration = importlib.import_module(f"fastflow.integrations.{case.integration}")
    found = {"before": flow, "accelerated": copy.deepcopy(flow), "reversible": copy.deepcopy(flow)}
    integration.accelerate(found["accelerated"])
    report = integration.accelerate(found["reversible"], reversible=True)
    if not report.recomputing:
        raise ValueError(f"{case.name}: no chain recomputes its activations: {report.storing}")
    return found


def measure(case: drop_in.Case, options: argparse.Namespace) -> list[dict]:
    flow = drop_in.build(case, options.quick).to(options.device)
    x, context = drop_in.inputs(case, options.quick, options.device)
    batch, features, contexts = drop_in.size_of(case, options.quick)
    rows, found = [], providers(case, flow)
    for name, m in found.items():
        error = drop_in.check(case, flow, m, x, context)
        # forward only: in backward a reversible chain keeps what one step saves, and frees it
        kept = drop_in.kept_bytes(lambda m=m: case.log_prob(m, x, context), m, (x, context))
        row = {"flow": case.name, "library": case.integration, "batch": batch, "features": features}
        row |= {"context": contexts, "provider": name, "kept_bytes": kept, "error": f"{error:.1e}"}
        rows.append(row | harness.metadata(options.device))
    return rows


def table(rows: list[dict]) -> str:
    found = {}
    for row in rows:
        found.setdefault((row["flow"], row["library"]), {})[row["provider"]] = row
    lines = []
    for (flow, library), by in found.items():
        first = by["before"]
        size = ", ".join(str(first[k]) for k in ("batch", "features", "context"))
        lines.append([flow, library, size, *(f"{int(r['kept_bytes']) / 1024:,.0f}" for r in by.values())])
    head = ["flow", "library", "batch, D, context", "before, KiB", "accelerated", "reversible"]
    about = "{device}, torch {torch}, commit {commit}, {date}".format(**rows[0])
    return f"{page.table(head, lines)}\n\n({about})"


def main(argv: list[str] | None = None) -> list[dict]:
    def add(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--docs", type=Path, default=harness.ROOT / "docs", help="folder of drop_in.md")

    options, rows = harness.arguments(__doc__, argv, add), []
    warnings.filterwarnings("ignore", libraries.DEPRECATED)
    for case in tqdm([c for c in drop_in.CASES if c.name in NAMES], desc="drop_in_memory"):
        rows += measure(case, options)
    harness.append(options.results / "drop_in_memory.csv", rows)
    text = table(rows)
    page.write(options.docs / "drop_in.md", {"drop_in_memory": text})
    print(text)
    return rows


if __name__ == "__main__":
    main()
