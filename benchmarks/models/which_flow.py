"""Held-out log-likelihoods of every family of flows of vectors on toy densities, each after an equal processor time.

    python -m benchmarks.models.which_flow              # 12 minutes of one core; cells that are measured are left out
    python -m benchmarks.models.which_flow --families MAF IAF --again

A cell is a family on a density of ``toy_densities.py``. Its model is trained for ``--seconds`` of processor time on one
thread: batches of 512 from 200,000 samples, standardized; Adam, gradients clipped to norm 5. The learning rate decays to 0
by a cosine of the time that is spent. Processor time leaves out the times of other programs, but not their
use of caches and of a core's second thread.

The test log-likelihood is the mean over 50,000 other samples. Their exact log-density is known, so the difference estimates
the divergence KL(density, model). Milliseconds are the processor time for 1000 points, the median of 5 calls in eval mode.

Rows go to results/which_flow.csv. The tables of docs/which_flow.md are rewritten from the last row of each cell, the picture
docs/pictures/which_flow.png from the model densities, which runs/which_flow keeps. A cell without one is white, and is measured
again by the next run.
"""

import argparse
import csv
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Generator, Tensor, nn
from tqdm import tqdm

from benchmarks.models.toy_densities import TOYS, Toy
from benchmarks.tools import harness, page
from fastflow import explore
from fastflow import nn as fnn
from fastflow.models import IAF, MAF, ContinuousFlow, FlowModel, NeuralSplineFlow, ResidualFlow, VectorGlow
from fastflow.models.model import Model

BATCH, CLIP, POOL, HELD_OUT, TIMED = 512, 5.0, 200_000, 50_000, 1000
SIZE = 160  # cells of the picture's densities along each dimension


def of(*layers: nn.Module) -> Model:
    return FlowModel(fnn.Sequential(*layers, reversible=False), fnn.GaussianPrior((2,)))


def additive() -> Model:
    """NICE: additive couplings whose parts alternate, and a scale.

    Networks with zero outputs have no gradient on densities that are symmetric, so theirs are small random ones.
    """
    couplings = [fnn.AdditiveCoupling(fnn.MLP(1, 1, 64), swap_halves=i % 2 == 1) for i in range(8)]
    for coupling in couplings:
        nn.init.normal_(coupling.net.net[-1].weight, std=0.1)
    return of(*couplings, fnn.Scale(2))


def mixture() -> Model:
    """Couplings of Flow++ in the steps of Glow."""
    layers: list[nn.Module] = []
    for _ in range(6):
        net = fnn.MLP(1, fnn.MixtureCDFCoupling.params_per_element(components=8), 64)
        with torch.no_grad():
            net.net[-1].bias.copy_(fnn.MixtureCDFCoupling.initial_bias(1, components=8))
        layers += [fnn.ActNorm(2), fnn.InvertibleConv1x1(2), fnn.MixtureCDFCoupling(net, components=8)]
    return of(*layers)


def planar() -> Model:
    """32 layers that start as the identity; those of the layer's own start move the data far away."""
    layers = [fnn.Planar(2) for _ in range(32)]
    with torch.no_grad():
        for layer in layers:
            layer.u.copy_(math.log(math.e - 1) * layer.w / layer.w.square().sum())
    return of(*layers)


def sylvester() -> Model:
    """16 layers that start near the identity."""
    layers = [fnn.Sylvester(2) for _ in range(16)]
    with torch.no_grad():
        for layer in layers:
            layer.factors.mul_(0.1)
    return of(*layers)


@dataclass(frozen=True)
class Family:
    build: Callable[[], Model]
    lr: float | None  # None: nothing is left to train after initialization from data


FAMILIES = {
    "Gaussian": Family(lambda: of(fnn.ActNorm(2)), None),
    "linear": Family(lambda: of(fnn.LULinear(2)), 1e-2),
    "additive coupling (NICE)": Family(additive, 5e-3),
    "affine coupling (VectorGlow)": Family(lambda: VectorGlow(steps=8, reversible=False), 5e-3),
    "mixture coupling (Flow++)": Family(mixture, 5e-3),
    "spline coupling (NSF)": Family(lambda: NeuralSplineFlow(steps=4, hidden=64), 5e-3),
    "spline autoregressive (NSF)": Family(
        lambda: NeuralSplineFlow(steps=3, hidden=64, autoregressive=True), 5e-3
    ),
    "MAF": Family(lambda: MAF(steps=8, hidden=64, scale="soft_clamp"), 5e-3),
    "IAF": Family(lambda: IAF(steps=8, hidden=64), 5e-3),
    "planar": Family(planar, 1e-2),
    "radial": Family(lambda: of(*(fnn.Radial(2) for _ in range(32))), 1e-2),
    "Sylvester": Family(sylvester, 1e-2),
    "residual (iResNet)": Family(ResidualFlow, 5e-3),
    "continuous": Family(
        lambda: ContinuousFlow(hidden=64, layers=2, adjoint=False, atol=1e-3, rtol=1e-3), 1e-2
    ),
}


def samples(data: str, n: int, seed: int) -> Tensor:
    return TOYS[data].draw(n, Generator().manual_seed(seed))


def train(model: Model, x: Tensor, seconds: float, lr: float, seed: int) -> int:
    """Trains for ``seconds`` of processor time, one step at least; returns the number of steps."""
    optimizer = torch.optim.Adam(model.parameters(), lr)
    generator, begin, steps = Generator().manual_seed(seed), time.process_time(), 0
    while (spent := time.process_time() - begin) < seconds or not steps:
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 + math.cos(math.pi * min(spent / seconds, 1.0))) / 2
        optimizer.zero_grad(set_to_none=True)
        (-model.log_prob(x[torch.randint(len(x), (BATCH,), generator=generator)]).mean()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        steps += 1
    return steps


def milliseconds(call: Callable[[], object]) -> float:
    found = []
    for _ in range(5):
        before = time.process_time()
        call()
        found.append(time.process_time() - before)
    return 1e3 * statistics.median(found)


def mean_and_error(values: Tensor) -> tuple[str, str]:
    return f"{values.mean().item():.4f}", f"{values.std().item() / len(values) ** 0.5:.4f}"


def measure(data: str, name: str, options: argparse.Namespace) -> dict:
    """Trains a cell; its row. Its density goes to ``options.grids``."""
    family, toy, seed = FAMILIES[name], TOYS[data], options.seed
    torch.manual_seed(seed)
    model = family.build()
    pool = samples(data, options.pool, 2 * seed).float()
    model.standardize_by(pool)
    model.train()
    with torch.no_grad():
        model.log_prob(pool)  # ActNorm starts with the mean and the deviation of all samples
    lr = options.lr or family.lr
    steps = 0 if family.lr is None else train(model, pool, options.seconds, lr, seed)
    model.eval()
    for layer in model.modules():
        if isinstance(layer, fnn.NeuralODE):
            layer.atol = layer.rtol = 1e-5  # of training's 1e-3
    test = samples(data, options.held_out, 2 * seed + 1)
    with torch.no_grad():
        found = torch.cat([model.log_prob(part).double() for part in test.float().split(5000)])
        gap, gap_error = mean_and_error(toy.log_density(test) - found)
        nats, error = mean_and_error(found)
        times = [lambda: model.log_prob(pool[: options.timed]), lambda: model.sample(options.timed)]
        log_prob_ms, sample_ms = (f"{milliseconds(call):.2f}" for call in times)
    density, integral = explore.density(model, toy.limits, options.size)
    options.grids.mkdir(parents=True, exist_ok=True)
    np.save(grid_of(options, data, name), density.float().numpy())
    row = {"data": data, "family": name, "seed": seed, "seconds": options.seconds, "batch": BATCH}
    row |= {"lr": "" if family.lr is None else lr, "steps": steps}
    row["parameters"] = sum(p.numel() for p in model.parameters())
    row |= {"test_nats": nats, "error": error, "kl_nats": gap, "kl_error": gap_error}
    row |= {"integral": f"{integral:.4f}", "log_prob_ms": log_prob_ms, "sample_ms": sample_ms}
    return row | harness.metadata("cpu")


def grid_of(options: argparse.Namespace, data: str, name: str) -> Path:
    return options.grids / f"{data}, {name}, {options.seed}.npy"


def latest(path: Path, options: argparse.Namespace) -> dict[tuple[str, str], dict]:
    """The last row of each cell, of the seed and the seconds of the options."""
    if not path.exists():
        return {}
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    wanted = str(options.seed), str(options.seconds)
    return {(r["data"], r["family"]): r for r in rows if (r["seed"], r["seconds"]) == wanted}


def likelihoods(rows: dict[tuple[str, str], dict]) -> str:
    """A line for each family: test log-likelihoods by density, and how much they are behind it on average."""
    names = [data for data in TOYS if any(d == data for d, _ in rows)]
    truths = {d: float(r["test_nats"]) + float(r["kl_nats"]) for (d, _), r in rows.items()}
    body = [["the density itself", *(f"{truths[d]:.3f}" for d in names), "0"]]
    for name in FAMILIES:
        found = [rows.get((data, name)) for data in names]
        if any(found):
            line = [
                "" if r is None else f"{float(r['test_nats']):.3f} ± {float(r['error']):.3f}" for r in found
            ]
            mean = "" if None in found else f"{statistics.mean(float(r['kl_nats']) for r in found):.3f}"
            body.append([name, *line, mean])
    first = next(iter(rows.values()))
    about = "seed {seed}; {seconds} seconds of processor time; {device}, torch {torch}, {date}".format(
        **first
    )
    commits = ", ".join(dict.fromkeys(r["commit"] for r in rows.values()))
    note = f"(test log-likelihood in nats, with its standard error; {about}, commit {commits})"
    return page.table(["", *names, "mean distance from the density"], body) + f"\n\n{note}"


def costs(rows: dict[tuple[str, str], dict]) -> str:
    """A line for each family: parameters, learning rate, steps and times, over all densities."""
    body = []
    for name in FAMILIES:
        found = [row for (_, family), row in rows.items() if family == name]
        if found:
            steps = sorted(int(row["steps"]) for row in found)
            line = [
                name,
                found[0]["parameters"],
                found[0]["lr"],
                f"{steps[0]} to {steps[-1]}" if steps[-1] else "0",
            ]
            for column in ("log_prob_ms", "sample_ms"):
                line.append(f"{statistics.median(float(row[column]) for row in found):.1f}")
            body.append(line)
    head = ["", "parameters", "learning rate", "training steps", "log_prob of 1000, ms", "1000 samples, ms"]
    return page.table(head, body) + "\n\n(milliseconds of processor time, the median over the densities)"


def exact(toy: Toy, size: int) -> np.ndarray:
    """The density at the centers of the cells of its limits, as ``explore.density`` has a model's."""
    at = [a + (b - a) * (np.arange(size) + 0.5) / size for a, b in toy.limits]
    points = torch.from_numpy(np.stack(np.meshgrid(*at), 2).reshape(-1, 2))
    return toy.log_density(points).exp().view(size, size).numpy()


def picture(options: argparse.Namespace, path: Path) -> None:
    """Densities of all families, in two blocks of columns; the first is the true one."""
    columns, per = [None, *FAMILIES], math.ceil((1 + len(FAMILIES)) / 2)
    figure = Figure(figsize=(1.2 * per, 2.4 * len(TOYS) + 0.9))
    densities = {data: exact(toy, options.size) for data, toy in TOYS.items()}
    for block in range(2):
        sides = {"left": 0, "right": 1, "top": 0.97 - 0.5 * block, "bottom": 0.5 - 0.5 * block}
        grid = figure.add_gridspec(len(TOYS), per, **sides, wspace=0.04, hspace=0.04)
        for i, name in enumerate(columns[block * per : (block + 1) * per]):
            for j, (data, density) in enumerate(densities.items()):
                axes = figure.add_subplot(grid[j, i])
                axes.set_axis_off()
                file = grid_of(options, data, name or "")
                values = density if name is None else np.load(file) if file.exists() else None
                if values is not None:
                    limits = {"vmin": 0, "vmax": density.max()}
                    axes.imshow(values, origin="lower", cmap="magma", aspect="auto", **limits)
                if j == 0:
                    axes.set_title((name or "the density").replace(" (", "\n("), fontsize=7)
    figure.savefig(path, dpi=100)
    with Image.open(path) as drawn:
        small = drawn.convert("RGB").quantize(128, dither=Image.Dither.NONE)  # less than half of the bytes
    small.save(path, optimize=True)


def main(argv: list[str] | None = None) -> list[dict]:
    def add(parser: argparse.ArgumentParser) -> None:
        docs = harness.ROOT / "docs"
        parser.add_argument("--docs", type=Path, default=docs, help="folder of the page")
        parser.add_argument("--pictures", type=Path, default=docs / "pictures", help="folder of the picture")
        parser.add_argument("--grids", type=Path, default=harness.ROOT / "runs" / "which_flow")
        parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
        parser.add_argument(
            "--data", nargs="+", choices=TOYS, default=list(TOYS), help="only these densities"
        )
        parser.add_argument("--seed", type=int, default=0)
        parser.add_argument("--lr", type=float, help="learning rate, in place of each family's")
        parser.add_argument("--again", action="store_true", help="measure cells that have a row too")
        parser.set_defaults(seconds=10.0, pool=POOL, held_out=HELD_OUT, timed=TIMED, size=SIZE)

    options, rows = harness.arguments(__doc__, argv, add), []
    if options.quick:
        options.pool, options.held_out, options.timed, options.size = 200, 50, 10, 20
    file = options.results / "which_flow.csv"
    done = {} if options.again else latest(file, options)
    cells = [(data, name) for data in options.data for name in options.families]
    cells = [cell for cell in cells if cell not in done or not grid_of(options, *cell).exists()]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # matrices as small as these take longer on two
    try:
        for data, name in (bar := tqdm(cells, desc="which_flow")):
            bar.set_postfix_str(f"{name} on {data}")
            row = measure(data, name, options)
            harness.append(file, [row])  # at once: a run that is cut keeps its rows
            rows.append(row)
            tqdm.write(
                f"{name} on {data}: {row['test_nats']} nats, {row['kl_nats']} behind, {row['steps']} steps"
            )
    finally:
        torch.set_num_threads(threads)
    found = latest(file, options)
    page.write(
        options.docs / "which_flow.md", {"which_flow": likelihoods(found), "which_flow_costs": costs(found)}
    )
    picture(options, options.pictures / "which_flow.png")
    return rows


if __name__ == "__main__":
    main()
