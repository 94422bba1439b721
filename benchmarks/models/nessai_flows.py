"""Times nessai's flow models, as they are and accelerated: an epoch of training, and samples with their densities.

    pip install --no-deps nessai==0.15.2 glasflow==0.4.1    # nessai also imports pandas, seaborn and h5py
    python -m benchmarks.models.nessai_flows

The flows are nessai's own with its default sizes (4 couplings or autoregressive layers, batch 1000); training is that of
its ``FlowModel``, of 2000 samples. Both models start from the same weights, and take turns in one process. Their
densities are compared before anything is timed.

Rows go to results/nessai_flows.csv. The table of docs/nessai.md is rewritten.
"""

import argparse
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from benchmarks.tools import harness, page
from fastflow.trainer.cli import keep_memory

FLOWS = ("RealNVP", "NSF", "MAF")
MODES = ("an epoch of 2000 samples", "5000 new samples")
PROVIDERS = ("nessai", "accelerated")
FEATURES = 8
TOLERANCE = 1e-4  # of log-densities in float32, over 1 + the largest value


def builder(name: str, provider: str) -> Callable[..., nn.Module]:
    """What ``flow`` of nessai's ``flow_config`` is."""
    from nessai.flows.utils import get_flow_class

    import fastflow.integrations.glasflow as ff

    def flow(*sizes: int, **options: object) -> nn.Module:
        made = get_flow_class(name)(*sizes, **options)
        if provider == "accelerated" and not ff.accelerate(made).replaced:
            raise ValueError("nothing was replaced")
        return made

    return flow


def model(name: str, provider: str, folder: str):
    from nessai.flowmodel import FlowModel

    torch.manual_seed(0)
    config = {"n_inputs": FEATURES, "flow": builder(name, provider)}
    made = FlowModel(config, output=folder, rng=np.random.default_rng(0))
    made.initialise()
    return made


def measure(name: str, options: argparse.Namespace) -> list[dict]:
    x = np.random.default_rng(1).normal(size=(200 if options.quick else 2000, FEATURES))
    about, rows = harness.metadata("cpu"), []
    with tempfile.TemporaryDirectory() as folder:  # nessai writes weights there
        models = {provider: model(name, provider, folder) for provider in PROVIDERS}
        before, after = (m.log_prob(x) for m in models.values())
        error = np.abs(before - after).max() / (1 + np.abs(before).max())
        if not error <= TOLERANCE:
            raise ValueError(f"{name}: off by {error:.1e}, expected {TOLERANCE:.0e}; no row is written")
        count = 50 if options.quick else 5000
        training = {p: lambda m=m: m.train(x, max_epochs=1, plot=False) for p, m in models.items()}
        samples = {p: lambda m=m: m.sample_and_log_prob(count) for p, m in models.items()}
        for mode, calls in zip(MODES, (training, samples), strict=True):
            taken = harness.microseconds(calls, options.seconds, "cpu")
            for provider, (p20, p50, p80) in taken.items():
                row = {"flow": name, "features": FEATURES, "mode": mode, "provider": provider}
                row |= {"p20_ms": f"{p20 / 1e3:.3f}", "p50_ms": f"{p50 / 1e3:.3f}"}
                row |= {"p80_ms": f"{p80 / 1e3:.3f}", "ratio": f"{p50 / taken['nessai'][1]:.3f}"}
                rows.append(row | {"error": f"{error:.1e}"} | about)
    return rows


def table(rows: list[dict]) -> str:
    found = {}
    for row in rows:
        found.setdefault((row["flow"], row["mode"]), {})[row["provider"]] = row
    lines = []
    for case, by in found.items():
        times = [
            f"{float(r['p50_ms']):.1f} ({float(r['p20_ms']):.1f} to {float(r['p80_ms']):.1f})"
            for r in by.values()
        ]
        lines.append([*case, *times, f"{1 / float(by['accelerated']['ratio']):.1f}"])
    about = "{features} features; {device}, torch {torch}, commit {commit}, {date}".format(**rows[0])
    head = ["flow", "", "nessai, ms", "accelerated, ms", "times faster"]
    return f"{page.table(head, lines)}\n\n(p50, in parentheses p20 to p80; {about})"


def main(argv: list[str] | None = None) -> list[dict]:
    def add(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--docs", type=Path, default=harness.ROOT / "docs", help="folder of nessai.md")
        parser.set_defaults(seconds=15.0)

    options, rows = harness.arguments(__doc__, argv, add), []
    keep_memory()
    if (load := os.getloadavg()[0]) > 0.3:
        print(f"other programs are running ({load:.1f} on average over the last minute): discard these times")
    for name in tqdm(FLOWS, desc="nessai_flows"):
        rows += measure(name, options)
    harness.append(options.results / "nessai_flows.csv", rows)
    text = table(rows)
    page.write(options.docs / "nessai.md", {"nessai_flows": text})
    print(text)
    return rows


if __name__ == "__main__":
    main()
