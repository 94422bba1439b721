"""Profiles a training step: kernels by time, with torch's profiler, and operators by bytes moved.

    python -m benchmarks.tools.step_profile

The step is the trainer's, of a Glow, neither compiled nor captured; on a GPU it runs in bfloat16. Two
tables are printed:

- Kernels (on a CPU operators), the longest first: calls and time per step, and share of the total.
- The operators below autograd, FastFlow's included, by bytes. Each call reads every tensor argument once
  and writes every tensor that it creates or changes once. Views and allocations move nothing; an in-place
  form is counted with its operator. This is a lower bound: some kernels read a tensor again or use scratch
  memory. GB/s are these bytes over the time of the operator and all that it calls. Caches serve a part of
  them, so GB/s can exceed the memory's bandwidth.

The rows of both go to results/step_profile.csv. ``--trace FILE`` also writes a trace for chrome://tracing
and Perfetto.
"""

import argparse
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.models.training_speed import batches, build, sizes, title
from benchmarks.tools import harness, page
from benchmarks.tools.traffic import Traffic, without_underscore
from fastflow.trainer.ranks import Ranks
from fastflow.trainer.step import Step

STEPS = 3


def trainers_step(shape: tuple, device: str, reversible: bool) -> Callable[[int], object]:
    """``step(i)`` of the trainer, after three steps of warm-up."""
    model = build(shape, device, reversible).to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.0, fused=True)
    step = Step(model, optimizer, Ranks(), batch_size=shape[-1], bf16=device == "cuda")
    given = batches(shape, 1, device)[0]
    for i in range(3):
        step(given, None, i, 1e-4)
    return lambda i: step(given, None, i, 1e-4)


def run(step: Callable[[int], object], device: str) -> profile:
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device == "cuda" else [])
    with profile(activities=activities) as profiled:
        for i in range(STEPS):
            step(i)
    return profiled


def by_time(profiled: profile, device: str) -> list[dict]:
    """Name, calls and microseconds per step, and share of the total time."""
    if device == "cuda":
        kernels = [
            e
            for e in profiled.key_averages()
            if e.device_type == DeviceType.CUDA and not e.is_user_annotation
        ]
        # kernels only: operators contain the time of their kernels again
        events = [(e.key, e.count, e.self_device_time_total) for e in kernels]
    else:
        events = [(e.key, e.count, e.self_cpu_time_total) for e in profiled.key_averages()]
    total = sum(us for *_, us in events)
    rows = [
        {"name": name, "calls": count / STEPS, "us": us / STEPS, "share": us / total}
        for name, count, us in events
    ]
    return sorted(rows, key=lambda row: -row["us"])


def by_bytes(traffic: Traffic, profiled: profile, device: str) -> list[dict]:
    """Name, calls and MiB per step, share of all bytes, GB/s; None if the profiler recorded other calls."""

    def called_by_another(event) -> bool:
        while (event := event.cpu_parent) is not None:
            if without_underscore(event.name) in traffic.calls:
                return True
        return False

    seen, us = Counter(), Counter()
    for event in profiled.events():
        name = without_underscore(event.name)
        if name in traffic.calls and not called_by_another(event):
            seen[name] += 1
            us[name] += event.device_time_total if device == "cuda" else event.cpu_time_total
    rows = []
    for name, moved in traffic.bytes.most_common():
        speed = (
            STEPS * moved / us[name] / 1e3 if us[name] and seen[name] == STEPS * traffic.calls[name] else None
        )
        row = {
            "name": name,
            "calls": traffic.calls[name],
            "mib": moved / 2**20,
            "share": moved / traffic.bytes.total(),
        }
        rows.append(row | {"gb_s": speed})
    return rows


def row_of(size: str, row: dict) -> dict[str, str]:
    """Columns of a row: microseconds in the table by time, MiB and GB/s in the table by bytes."""
    kept = {
        "size": size,
        "by": "time" if "us" in row else "bytes",
        "name": row["name"],
        "calls": f"{row['calls']:.3g}",
    }
    kept |= {"share": f"{row['share']:.4f}", "us": f"{row['us']:.1f}" if "us" in row else ""}
    return kept | {
        "mib": f"{row['mib']:.3f}" if "mib" in row else "",
        "gb_s": f"{row['gb_s']:.3g}" if row.get("gb_s") else "",
    }


def main(argv: list[str] | None = None) -> tuple[list[dict], list[dict]]:
    def add(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--top", type=int, default=20, help="rows per table")
        parser.add_argument("--reversible", action=argparse.BooleanOptionalAction, default=True)
        parser.add_argument("--trace", type=Path, help="file for the trace")

    options = harness.arguments(__doc__, argv, add)
    model, (batch, *_), _ = sizes(options)
    step = trainers_step((*model, batch), options.device, options.reversible)
    profiled = run(step, options.device)
    if options.trace:
        profiled.export_chrome_trace(str(options.trace))
    with Traffic() as traffic:
        step(0)
    timed, moved = by_time(profiled, options.device), by_bytes(traffic, profiled, options.device)
    about, size = harness.metadata(options.device), title((*model, batch))
    harness.append(
        options.results / "step_profile.csv",
        [row_of(size, row) | about for row in timed[: options.top] + moved[: options.top]],
    )
    head = f"one step, {size}"
    lines = [
        [r["name"][:90], f"{r['calls']:.0f}", f"{r['us']:.0f}", f"{r['share']:.1%}"]
        for r in timed[: options.top]
    ]
    print(page.table([head, "calls", "us", "share"], lines), end="\n\n")
    lines = [
        [
            r["name"],
            f"{r['calls']}",
            f"{r['mib']:.2f}",
            f"{r['share']:.1%}",
            f"{r['gb_s']:.3g}" if r["gb_s"] else "",
        ]
        for r in moved[: options.top]
    ]
    print(page.table([head, "calls", "MiB", "share", "GB/s"], lines))
    ms, mib = (sum(r[column] for r in rows) for rows, column in ((timed, "us"), (moved, "mib")))
    print(
        f"\n{ms / 1e3:.1f} ms and {mib:.1f} MiB per step in total; "
        "{device}, torch {torch}, commit {commit}".format(**about)
    )
    return timed, moved


if __name__ == "__main__":
    main()
