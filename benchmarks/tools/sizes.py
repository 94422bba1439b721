"""The frame of a benchmark that times models of several sizes: its options, its rows, and the table of its page."""

import argparse
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from tqdm import tqdm

from benchmarks.tools import harness, page
from fastflow.trainer.cli import keep_memory

CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}
Size = TypeVar("Size")


def run(
    name: str,
    description: str,
    argv: list[str] | None,
    sizes: Sequence[Size],
    quick: Sequence[Size],
    measure: Callable[[Size, argparse.Namespace], list[dict]],
    table: Callable[[list[dict]], str],
    docs: str,
    seconds: float,
) -> list[dict]:
    """Measure each size, or each ``quick`` one with ``--quick``: append to NAME.csv, and write the table NAME of a page.

    ``docs``: the file of the page. ``seconds``: the default of ``--seconds``. Returns the rows.
    """

    def add(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--docs", type=Path, default=harness.ROOT / "docs", help=f"folder of {docs}")
        parser.add_argument(
            "--clock", choices=CLOCKS, default="wall", help="processor: on one thread of a CPU"
        )
        parser.set_defaults(seconds=seconds)

    options, rows = harness.arguments(description, argv, add), []
    keep_memory()
    if options.clock == "processor":
        if options.device != "cpu":
            raise ValueError(f"clock: got 'processor' on {options.device}, expected 'wall'")
    elif options.device == "cpu" and (load := os.getloadavg()[0]) > 0.3:
        print(f"other programs are running ({load:.1f} on average over the last minute): discard these times")
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if options.clock == "processor" else threads)
    try:
        for size in tqdm(quick if options.quick else sizes, desc=name):
            found = measure(size, options)
            harness.append(options.results / f"{name}.csv", found)
            rows += found
    finally:
        torch.set_num_threads(threads)
    found = table(rows)
    page.write(options.docs / docs, {name: found})
    print(found)
    return rows
