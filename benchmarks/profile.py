"""Where the time of a training step goes: its kernels under torch's profiler, the longest first.

    python -m benchmarks.profile

The step is the trainer's, of a Glow; on a GPU in bfloat16. A table of kernels (operators on the CPU), their calls and time a step and their
share, is printed; ``--trace FILE`` also writes what chrome://tracing and Perfetto show.
"""

import argparse
from pathlib import Path

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks import harness, page
from benchmarks.training_speed import batches, build, sizes, title
from fastflow.ranks import Ranks
from fastflow.step import Step

STEPS = 3


def measure(shape: tuple, device: str, reversible: bool, trace: Path | None) -> tuple[list[dict], float]:
    """Rows of name, calls and microseconds a step, and the microseconds of all."""
    model = build(shape, device, reversible).to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.0, fused=True)
    step = Step(model, optimizer, Ranks(), batch_size=shape[-1], bf16=device == "cuda")
    given = batches(shape, 1, device)[0]
    for i in range(3):
        step(given, None, i, 1e-4)
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device == "cuda" else [])
    with profile(activities=activities) as profiled:
        for i in range(STEPS):
            step(given, None, i, 1e-4)
    if trace:
        profiled.export_chrome_trace(str(trace))
    if device == "cuda":
        kernels = [e for e in profiled.key_averages() if e.device_type == DeviceType.CUDA and not e.is_user_annotation]
        events = [(e.key, e.count, e.self_device_time_total) for e in kernels]  # operators have the time of their kernels once more
    else:
        events = [(e.key, e.count, e.self_cpu_time_total) for e in profiled.key_averages()]
    total = sum(us for *_, us in events)
    rows = [{"name": name, "calls": count / STEPS, "us": us / STEPS, "share": us / total} for name, count, us in events]
    return sorted(rows, key=lambda row: -row["us"]), total / STEPS


def main(argv: list[str] | None = None) -> list[dict]:
    def add(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--top", type=int, default=20, help="rows of the table")
        parser.add_argument("--reversible", action=argparse.BooleanOptionalAction, default=True)
        parser.add_argument("--trace", type=Path, help="a file for the trace")

    options = harness.arguments(__doc__, argv, add)
    model, (batch, *_), _ = sizes(options)
    shape = (*model, batch)
    rows, total = measure(shape, options.device, options.reversible, options.trace)
    lines = [[r["name"][:90], f"{r['calls']:.0f}", f"{r['us']:.0f}", f"{r['share']:.1%}"] for r in rows[: options.top]]
    about = harness.metadata(options.device)
    print(page.table([f"of a step, {title(shape)}", "calls", "us", "share"], lines))
    print(f"\n{total / 1e3:.1f} ms a step in all; {about['device']}, torch {about['torch']}, commit {about['commit']}")
    return rows


if __name__ == "__main__":
    main()
