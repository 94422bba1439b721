"""Writes the table of the fastest ways to compute Glow's network, which ``network="auto"`` reads.

    python -m benchmarks.tools.fastest_networks

It reads the rows of GPUs in results/glow_network.csv, which ``benchmarks.ops.glow_network`` measured; of several
rows of the same case the last one counts. A setting is left out if a way was not measured. Times are those in a
CUDA graph, as in the trainer, if all ways could be captured. Forward is the mode "evaluation", forward and backward
"training". The file is replaced.
"""

import argparse
import csv
import json
import re
from pathlib import Path

from benchmarks.ops.glow_network import PLAIN
from benchmarks.tools import harness
from fastflow.nn.networks.fastest import TABLE, Setting, read_table

# by provider and memory format
WAYS = {
    (PLAIN, "contiguous"): "plain",
    (PLAIN, "channels_last"): "plain, channels_last",
    ("fastflow", "channels_last"): "fused",
    ("im2col", "channels_last"): "im2col",
}
MODES = {"forward": "evaluation", "forward+backward": "training"}


def fastest(rows: list[dict[str, str]]) -> list[dict[str, str | int]]:
    """The rows of the table, in order."""
    measured: dict[tuple[Setting, int], dict[str, dict[str, str]]] = {}
    for row in rows:
        way = WAYS.get((row["provider"], row["layout"]))
        if way and not re.search(r", \d+ threads$", row["device"]):  # a CPU
            measured.setdefault(_setting(row), {})[way] = row
    return [
        setting._asdict() | {"pixels": pixels, "fastest": _fastest(of_way)}
        for (setting, pixels), of_way in sorted(measured.items())
        if len(of_way) == len(WAYS)
    ]


def _setting(row: dict[str, str]) -> tuple[Setting, int]:
    n, c, height, width = map(int, row["shape"].split("x"))
    hidden = int(row["case"].removeprefix("hidden "))
    setting = Setting(row["device"], row["dtype"], c, hidden, 2 * c, MODES[row["mode"]])
    return setting, n * height * width


def _fastest(of_way: dict[str, dict[str, str]]) -> str:
    column = "captured_us" if all(row["captured_us"] for row in of_way.values()) else "p50_us"
    return min(of_way, key=lambda way: float(of_way[way][column]))


def write(table: Path, rows: list[dict[str, str | int]]) -> None:
    """Write the table, a row per line, and check that it can be read."""
    lines = ",\n".join(f"    {json.dumps(row)}" for row in rows)
    table.write_text('{\n  "rows": [' + (f"\n{lines}\n  ]" if rows else "]") + "\n}\n", encoding="utf-8")
    read_table.cache_clear()
    read_table(table)


def main(argv: list[str] | None = None) -> None:
    def add(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--table", type=Path, default=TABLE, help="the file that is written")

    options = harness.arguments(__doc__, argv, add)
    path = options.results / "glow_network.csv"
    with path.open(newline="") as file:
        rows = fastest(list(csv.DictReader(file)))
    write(options.table, rows)
    ways = [row["fastest"] for row in rows]
    counts = ", ".join(f"{way}: {ways.count(way)}" for way in WAYS.values())
    print(f"{options.table}: {len(rows)} settings; fastest {counts}")


if __name__ == "__main__":
    main()
