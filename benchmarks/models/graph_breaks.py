"""Counts the graph breaks of torch.compile in flows of other libraries, before and after they are accelerated.

    python -m benchmarks.models.graph_breaks

The flows are those of ``benchmarks.models.drop_in`` in its tiny sizes; ``log_prob`` is traced by
``torch._dynamo.explain``. Nothing is timed, so other programs may run.

Rows go to results/graph_breaks.csv. The table of docs/drop_in.md is rewritten.
"""

import argparse
import warnings
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks.models import drop_in
from benchmarks.tools import harness, page


def measure(case: drop_in.Case) -> list[dict]:
    flow = drop_in.build(case, quick=True)
    x, context = drop_in.inputs(case, True, "cpu")
    rows = []
    for provider, m in zip(drop_in.PROVIDERS, (flow, drop_in.accelerated(case, flow)), strict=True):
        torch._dynamo.reset()
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = torch._dynamo.explain(lambda m=m: case.log_prob(m, x, context))()
        row = {"flow": case.name, "library": case.integration, "provider": provider}
        row |= {"graphs": found.graph_count, "graph_breaks": found.graph_break_count}
        rows.append(row | harness.metadata("cpu"))
    return rows


def table(rows: list[dict]) -> str:
    lines = [
        [before["flow"], before["library"], str(before["graph_breaks"]), str(after["graph_breaks"])]
        for before, after in zip(rows[::2], rows[1::2], strict=True)
    ]
    about = "torch {torch}, commit {commit}, {date}".format(**rows[0])
    return f"{page.table(['flow', 'library', 'graph breaks before', 'after'], lines)}\n\n({about})"


def main(argv: list[str] | None = None) -> list[dict]:
    def add(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--docs", type=Path, default=harness.ROOT / "docs", help="folder of drop_in.md")

    options, rows = harness.arguments(__doc__, argv, add), []
    for case in tqdm(drop_in.CASES, desc="graph_breaks"):
        rows += measure(case)
    harness.append(options.results / "graph_breaks.csv", rows)
    text = table(rows)
    page.write(options.docs / "drop_in.md", {"graph_breaks": text})
    print(text)
    return rows


if __name__ == "__main__":
    main()
