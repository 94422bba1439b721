"""Residual flows of two toy densities, data beside density, and the iterations of their inverse.

From a clean clone, after `make setup` (some minutes of one core):

    .venv/bin/python docs/examples/residual.py --out residual.png

It follows figure 16.11 of Prince, *Understanding Deep Learning*, which shows an iResNet (arXiv:1811.00995).
"""

import argparse

import torch
from matplotlib.figure import Figure
from tqdm import tqdm

from fastflow import explore
from fastflow.models import ResidualFlow

LIMITS = (-4, 4), (-4, 4)


def moons(n):
    angle, lower = torch.pi * torch.rand(n), torch.rand(n) < 0.5
    x = torch.stack([angle.cos(), angle.sin()], 1)
    x = torch.where(lower[:, None], torch.tensor([1.0, 0.5]) - x, x)
    return 2 * (x - torch.tensor([0.5, 0.25])) + 0.15 * torch.randn(n, 2)


def spiral(n):
    """Two arms of a spiral, connected in the middle."""
    turn = 1.5 * torch.pi * torch.rand(n).sqrt()
    x = (
        turn[:, None]
        * torch.stack([turn.cos(), turn.sin()], 1)
        * torch.where(torch.rand(n, 1) < 0.5, 1.0, -1.0)
    )
    return 0.65 * x + 0.12 * torch.randn(n, 2)


def fit(model, x, steps, batch):
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    model.initialize(x[:2000])
    for _ in (bar := tqdm(range(steps), desc="fit")):
        loss = -model.log_prob(x[torch.randint(0, len(x), (batch,))]).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        schedule.step()
        bar.set_postfix_str(f"{loss.item():.3f} nats")
    return model.eval()


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", default="docs/pictures/residual.png")
    parser.add_argument("--samples", type=int, default=20_000)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--blocks", type=int, default=12)
    parser.add_argument("--size", type=int, default=200, help="cells of the grid along each dimension")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)  # matrices as small as these take longer on two
    figure = Figure(figsize=(9.6, 2.6), layout="constrained")
    panels = figure.subplots(1, 4)
    (left, right), (low, high) = LIMITS
    for (data, density_of), toy in zip((panels[:2], panels[2:]), (moons, spiral), strict=True):
        torch.manual_seed(0)
        x = toy(options.samples)
        model = fit(
            ResidualFlow(2, blocks=options.blocks, hidden=64, lipschitz=0.97), x, options.steps, options.batch
        )
        density, integral = explore.density(model, LIMITS, options.size)
        with torch.no_grad():
            held_out = -model.log_prob(toy(5000)).mean()
        model.sample(1000)
        iterations = model.inverse_iterations()
        print(
            f"{toy.__name__}: {held_out:.3f} nats on held-out samples, integral {integral:.4f}; "
            f"the inverse took {min(iterations)} to {max(iterations)} iterations per block"
        )
        data.scatter(*x[:4000].T, s=0.6, linewidths=0, color="tab:blue")
        data.set_title("data", fontsize=9)
        extent = (left, right, low, high)
        density_of.imshow(density, extent=extent, origin="lower", cmap="magma", interpolation="bilinear")
        density_of.set_title("density", fontsize=9)
    for axes in panels:
        axes.set(xlim=(left, right), ylim=(low, high), aspect="equal", xticks=[], yticks=[])
    figure.savefig(options.out, dpi=110)


if __name__ == "__main__":
    main()
