"""Posteriors by sbi's NPE with its default neural spline flow, as it is and accelerated: their quality and the time.

    pip install sbi==0.27.0 sbibm==1.1.0    # of sbibm, files are read; it is not imported
    python -m benchmarks.models.sbi_posteriors

The tasks are two moons and SLCP of the benchmark of simulation-based inference (arXiv:2101.04653), observation 1, with
10,000 simulations. Both flows start from the same weights and train with the same options until sbi stops them. Quality is
that paper's C2ST: the accuracy of a classifier that tells samples of the posterior from the 10,000 reference samples; 0.5
is best.

Rows go to results/sbi_posteriors.csv. The table of docs/sbi.md is rewritten.
"""

import argparse
import bz2
import contextlib
import importlib.util
import math
import os
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.tools import harness, page

PROVIDERS = ("sbi", "accelerated")
SIMULATIONS = 10_000


def two_moons(theta: Tensor) -> Tensor:
    angle = (torch.rand(len(theta), 1) - 0.5) * math.pi
    radius = 0.1 + 0.01 * torch.randn(len(theta), 1)
    point = torch.cat([angle.cos() * radius + 0.25, angle.sin() * radius], 1)
    moved = torch.stack([-(theta[:, 0] + theta[:, 1]).abs(), theta[:, 1] - theta[:, 0]], 1) / math.sqrt(2)
    return point + moved


def slcp(theta: Tensor) -> Tensor:
    """Four points of a Gaussian whose mean, scales and correlation are the parameters."""
    mean, scale, rho = theta[:, None, :2], theta[:, None, 2:4].square(), theta[:, None, 4:].tanh()
    noise = torch.randn(len(theta), 4, 2)
    second = rho * noise[..., :1] + (1 - rho.square()).sqrt() * noise[..., 1:]
    return (mean + scale * torch.cat([noise[..., :1], second], -1)).flatten(1)


TASKS = {"two moons": ("two_moons", 2, 1.0, two_moons), "SLCP": ("slcp", 5, 3.0, slcp)}


def files(task: str) -> tuple[Tensor, Tensor]:
    """The observation ``[1, ...]`` and the reference samples of its posterior, ``[10000, ...]``."""
    spec = importlib.util.find_spec("sbibm")
    if spec is None:
        raise ImportError("this benchmark reads files of sbibm: pip install --no-deps sbibm==1.1.0")
    folder = (
        Path(spec.submodule_search_locations[0]) / "tasks" / TASKS[task][0] / "files" / "num_observation_1"
    )
    reference = bz2.decompress((folder / "reference_posterior_samples.csv.bz2").read_bytes()).decode()
    return _read((folder / "observation.csv").read_text()), _read(reference)


def _read(text: str) -> Tensor:
    """A table whose first line has names."""
    rows = [[float(v) for v in line.split(",")] for line in text.split()[1:]]
    return torch.tensor(rows, dtype=torch.float32)


def builder(provider: str) -> Callable[[Tensor, Tensor], nn.Module]:
    """What makes sbi's estimator from the first simulations."""
    from sbi.neural_nets import posterior_nn

    import fastflow.integrations.nflows as ff

    build = posterior_nn("nsf")

    def made(theta: Tensor, x: Tensor) -> nn.Module:
        estimator = build(theta, x)
        if provider == "accelerated" and not ff.accelerate(estimator).replaced:
            raise ValueError("nothing was replaced")
        return estimator

    return made


def c2st(a: Tensor, b: Tensor, seed: int) -> float:
    """Accuracy of a classifier of a and b in five-fold cross-validation."""
    from sklearn.model_selection import KFold, cross_val_score
    from sklearn.neural_network import MLPClassifier

    a, b = ((v - b.mean(0)) / b.std(0) for v in (a, b))
    x = torch.cat([a, b]).numpy()
    y = np.concatenate([np.zeros(len(a)), np.ones(len(b))])
    width = 10 * x.shape[1]
    classifier = MLPClassifier((width, width), max_iter=1000, solver="adam", random_state=seed)
    folds = KFold(n_splits=5, shuffle=True, random_state=seed)
    return float(cross_val_score(classifier, x, y, cv=folds, scoring="accuracy").mean())


def measure(task: str, provider: str, seed: int, options: argparse.Namespace) -> dict:
    from sbi.inference import NPE
    from sbi.utils import BoxUniform

    _, dimensions, bound, simulate = TASKS[task]
    observation, reference = files(task)
    prior = BoxUniform(torch.full((dimensions,), -bound), torch.full((dimensions,), bound))
    torch.manual_seed(seed)
    np.random.seed(seed)
    theta = prior.sample((500 if options.quick else SIMULATIONS,))
    x = simulate(theta)
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):  # sbi writes its logs there
        inference = NPE(prior, density_estimator=builder(provider), show_progress_bars=False)
        inference.append_simulations(theta, x)
        start = time.perf_counter()
        inference.train(training_batch_size=200, max_num_epochs=2 if options.quick else 2**31 - 1)
        trained = time.perf_counter()
    posterior = inference.build_posterior()
    count = 200 if options.quick else len(reference)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        samples = posterior.sample((count,), x=observation, show_progress_bars=False)
    sampled = time.perf_counter()
    epochs = inference.summary["epochs_trained"][-1]
    row = {"task": task, "seed": seed, "provider": provider, "simulations": len(theta), "epochs": epochs}
    row |= {"training_s": f"{trained - start:.1f}", "epoch_s": f"{(trained - start) / epochs:.3f}"}
    row |= {"sampling_s": f"{sampled - trained:.2f}", "samples": count}
    row |= {"validation_log_prob": f"{inference.summary['best_validation_loss'][-1] * -1:.3f}"}
    return row | {"c2st": f"{c2st(samples, reference[:count], seed):.3f}"} | harness.metadata("cpu")


def table(rows: list[dict]) -> str:
    columns = (
        "task",
        "seed",
        "provider",
        "epochs",
        "training_s",
        "epoch_s",
        "sampling_s",
        "validation_log_prob",
        "c2st",
    )
    head = [
        "task",
        "seed",
        "",
        "epochs",
        "training, s",
        "an epoch, s",
        "sampling, s",
        "validation, nats",
        "C2ST",
    ]
    about = "{device}, torch {torch}, commit {commit}, {date}".format(**rows[0])
    return f"{page.table(head, [[str(row[c]) for c in columns] for row in rows])}\n\n({about})"


def main(argv: list[str] | None = None) -> list[dict]:
    def add(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--docs", type=Path, default=harness.ROOT / "docs", help="folder of sbi.md")
        parser.add_argument("--seeds", type=int, default=1)

    options, rows = harness.arguments(__doc__, argv, add), []
    if (load := os.getloadavg()[0]) > 0.3:
        print(f"other programs are running ({load:.1f} on average over the last minute): discard these times")
    runs = [(task, seed, name) for task in TASKS for seed in range(options.seeds) for name in PROVIDERS]
    for task, seed, provider in tqdm(runs, desc="sbi_posteriors"):
        rows.append(measure(task, provider, seed, options))
        harness.append(options.results / "sbi_posteriors.csv", rows[-1:])
    found = table(rows)
    page.write(options.docs / "sbi.md", {"sbi_posteriors": found})
    print(found)
    return rows


if __name__ == "__main__":
    main()
