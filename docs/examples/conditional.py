"""A posterior learned from simulations only, compared with the exact one on a grid.

The parameters are x ~ N(0, I) in two dimensions, and the observation is y = x1² + x2 + noise. A conditional
flow is trained on pairs (x, y), and then gives p(x | y) for any y.

From a clean clone, after `make setup` (a minute of one core):

    .venv/bin/python docs/examples/conditional.py --out conditional.png
"""

import argparse
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch.distributions import Normal
from tqdm import tqdm

from fastflow import explore
from fastflow.models import VectorGlow

LIMITS, NOISE = ((-3.0, 3.0), (-4.0, 4.0)), 0.5


def simulated(n):
    x = torch.randn(n, 2)
    return x, x[:, :1].square() + x[:, 1:] + NOISE * torch.randn(n, 1)


def trained(steps, batch=1024):
    torch.manual_seed(0)
    model = VectorGlow(features=2, steps=6, context_features=1, reversible=False)
    optimizer = torch.optim.Adam(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=steps)
    for _ in tqdm(range(steps)):
        loss = -model.log_prob(*simulated(batch)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def exact(y, size):
    """The posterior p(x | y) on the grid of explore.density, normalized on that grid."""
    middle = (torch.arange(size, dtype=torch.float64) + 0.5) / size
    (x1, x2), cell = (low + (high - low) * middle for low, high in LIMITS), 48 / size**2
    x2, x1 = torch.meshgrid(x2, x1, indexing="ij")
    standard = Normal(torch.zeros((), dtype=torch.float64), 1.0)
    log = standard.log_prob(x1) + standard.log_prob(x2) + standard.log_prob((y - x1.square() - x2) / NOISE)
    return log.exp() / (log.exp().sum() * cell), cell


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", default="docs/pictures/conditional.png")
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--size", type=int, default=300, help="cells of the grid along each dimension")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)  # matrices as small as these take longer on two
    model, observations, size = trained(options.steps), (-1.0, 1.0, 4.0), options.size
    figure = Figure(figsize=(8.4, 11), layout="constrained")
    (left, right), (low, high) = LIMITS
    samples = model.sample((2000,), context=torch.tensor(observations).view(3, 1)).unbind(1)
    for y, points, row in zip(observations, samples, figure.subplots(3, 3), strict=True):
        truth, cell = exact(y, size)
        density, integral = explore.density(model, LIMITS, size, context=torch.tensor([[y]]))
        divergence = (truth * (truth.clamp_min(1e-300) / density.clamp_min(1e-300)).log()).sum().item() * cell
        print(
            f"y = {y:g}: KL(exact, flow) {divergence:.4f} nats, integral of the flow's density {integral:.4f}"
        )
        for axes, values, title in ((row[0], truth, "exact"), (row[1], density, "flow")):
            axes.imshow(
                values,
                extent=(left, right, low, high),
                origin="lower",
                cmap="magma",
                vmin=0,
                vmax=truth.max(),
            )
            axes.set_title(f"{title}, p(x | y = {y:g})", fontsize=10)
        row[2].scatter(*points.T, s=1, linewidths=0, color="tab:blue")
        row[2].set_title(f"samples, y = {y:g}", fontsize=10)
        for axes in row:
            axes.set(xlim=(left, right), ylim=(low, high), aspect="equal")
    Path(options.out).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.out, dpi=100)


if __name__ == "__main__":
    main()
