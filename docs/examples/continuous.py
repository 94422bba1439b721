"""A continuous flow of two rings: its density, and samples on the way from the latents to the data.

From a clean clone, after `make setup` (about three minutes of one core):

    .venv/bin/python docs/examples/continuous.py --out continuous.png
"""

import argparse

import torch
from matplotlib.figure import Figure
from tqdm import tqdm

from fastflow import explore
from fastflow.models import ContinuousFlow

LIMITS = (-3, 3), (-3, 3)
TIMES = (0.0, 0.25, 0.5, 0.75, 1.0)


def rings(n):
    radius = torch.where(torch.rand(n) < 0.4, 1.0, 2.0) + 0.08 * torch.randn(n)
    angle = 2 * torch.pi * torch.rand(n)
    return torch.stack([radius * angle.cos(), radius * angle.sin()], 1)


def fit(model, x, steps, batch):
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in (bar := tqdm(range(steps), desc="fit")):
        rows = x[torch.randint(0, len(x), (batch,))]
        loss = model.regularized_loss(rows, kinetic=1e-4, jacobian=1e-4)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        schedule.step()
        bar.set_postfix_str(f"{loss.item():.3f} nats, {model.evaluations()} evaluations")


@torch.no_grad()
def on_the_way(model, z):
    """Samples at each of TIMES, shares of the way from the latents to the data."""
    (block,) = model.flows[0]
    return block.path(z, [block.time * (1 - t) for t in TIMES])


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", default="docs/pictures/continuous.png")
    parser.add_argument("--samples", type=int, default=20_000)
    parser.add_argument("--steps", type=int, default=700)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--size", type=int, default=200, help="cells of the grid along each dimension")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)  # matrices as small as these take longer on two
    torch.manual_seed(0)
    x = rings(options.samples)
    model = ContinuousFlow(features=2, hidden=64, layers=3, atol=1e-3, rtol=1e-3)
    fit(model, x, options.steps, options.batch)
    density, integral = explore.density(model, LIMITS, options.size)
    print(f"density of the flow: integral {integral:.4f}; a solve has {model.evaluations()} evaluations")
    figure = Figure(figsize=(9.8, 2.3), layout="constrained")
    panels = figure.subplots(1, 2 + len(TIMES))
    (left, right), (low, high) = LIMITS
    panels[0].scatter(*x[:3000].T, s=0.6, linewidths=0, color="tab:blue")
    panels[0].set_title("data", fontsize=9)
    extent = (left, right, low, high)
    panels[1].imshow(density, extent=extent, origin="lower", cmap="magma", interpolation="bilinear")
    panels[1].set_title("density", fontsize=9)
    for axes, points, t in zip(panels[2:], on_the_way(model, torch.randn(3000, 2)), TIMES, strict=True):
        axes.scatter(*points.T, s=0.6, linewidths=0, color="tab:orange")
        axes.set_title({0.0: "latents", 1.0: "samples"}.get(t, f"{100 * t:.0f}% of the way"), fontsize=9)
    for axes in panels:
        axes.set(xlim=(left, right), ylim=(low, high), aspect="equal", xticks=[], yticks=[])
    figure.savefig(options.out, dpi=110)


if __name__ == "__main__":
    main()
