"""A flow in one dimension: how it changes a density, its samples, and a deeper flow that does so step by step.

From a clean clone, after `make setup` (a minute on 2 cores):

    .venv/bin/python docs/examples/one_dimension.py --out one_dimension.png

The upper row fits z = Phi^-1(sum_k w_k Phi((x - mu_k) / sigma_k)), a monotone function of x, to samples (figure 16.1 of
Prince's book). The middle row shows how this function changes the density (figure 16.2). The lower row shows two
moons after each few steps of a flow of vectors, on their way to a Gaussian (figure 16.4).
"""

import argparse
import math

import torch
from matplotlib.figure import Figure
from sklearn.datasets import make_moons
from torch import nn
from torch.distributions import Normal

import fastflow
import fastflow.nn as fnn
from fastflow.models import FlowModel, VectorGlow


class MixtureToNormal(fnn.Flow):
    """z = Phi^-1(F(x)) with the distribution function F of a mixture of Gaussians; its inverse by bisection."""

    def __init__(self, components=4):
        super().__init__()
        self.logit = nn.Parameter(torch.zeros(components))
        self.mean = nn.Parameter(torch.linspace(-2, 2, components))
        self.log_scale = nn.Parameter(torch.zeros(components))

    def forward(self, x, context=None):
        parts, weights = Normal(self.mean, self.log_scale.exp()), self.logit.softmax(0)
        below = (weights * parts.cdf(x)).sum(1, keepdim=True).clamp(1e-6, 1 - 1e-6)
        z = math.sqrt(2) * torch.erfinv(2 * below - 1)
        log_density = torch.logsumexp(weights.log() + parts.log_prob(x), dim=1)
        return z, log_density - Normal(0, 1).log_prob(z).sum(1)

    def inverse(self, z, context=None):
        low, high = torch.full_like(z, -20), torch.full_like(z, 20)
        for _ in range(60):
            middle = (low + high) / 2
            above = self.forward(middle)[0] > z
            low, high = torch.where(above, low, middle), torch.where(above, middle, high)
        x = (low + high) / 2
        return x, -self.forward(x)[1]


def fitted(samples, epochs):
    """Samples of two Gaussians, and the flow that is fitted to them."""
    x = torch.cat([torch.randn(samples // 2) * 0.4 - 1.5, torch.randn(samples - samples // 2) * 0.7 + 1])
    model = FlowModel(MixtureToNormal(), fnn.GaussianPrior((1,)))
    print(fastflow.fit(model, x[:, None], lr=1e-2, max_epochs=epochs))
    return x, model


def curves(model):
    """A grid of x, its z, the densities of both, and the slope dx/dz."""
    grid = torch.linspace(-4, 4, 400)[:, None]
    z, log_slope = model.flow(grid)
    z, grid = z.squeeze(1), grid.squeeze(1)
    return grid, z, Normal(0, 1).log_prob(z).exp(), model.log_prob(grid[:, None]).exp(), (-log_slope).exp()


@torch.no_grad()
def density_panels(figure, x, model):
    grid, z, base, density, _ = curves(model)
    first, function, last = figure.subplots(1, 3)
    first.plot(z, base, color="C0")
    first.set(title="base density", xlabel="z", xlim=(-4, 4), ylim=(0, 0.45))
    function.plot(z, grid, color="C2")
    function.set(title="x as a function of z", xlabel="z", ylabel="x", xlim=(-4, 4), ylim=(-4, 4))
    last.hist(model.sample(20_000)[:, 0], bins=100, density=True, color="0.85", label="samples of the model")
    last.plot(grid, density, color="C1", label="density of the model")
    last.hist(x, bins=100, density=True, histtype="step", color="black", linewidth=0.6, label="data")
    last.set(title="density of x", xlabel="x", xlim=(-4, 4))
    last.legend(fontsize=7)
    arrow = {"arrowstyle": "-|>", "linewidth": 1.5}
    for drawn, color in ((-1.0, "tab:brown"), (0.6, "tab:green")):  # two draws and their samples
        sample = model.flow.inverse(torch.tensor([[drawn]]))[0].item()
        first.annotate("", (drawn, 0), (drawn, 0.09), arrowprops=arrow | {"color": color})
        function.plot([drawn, drawn, -4], [-4, sample, sample], color=color, linestyle=":")
        last.annotate("", (sample, 0), (sample, 0.12), arrowprops=arrow | {"color": color})


@torch.no_grad()
def change_panels(figure, model):
    """The base density below, the function above it, and the density of x at its left; equal masses are shaded."""
    grid, z, base, density, slope = curves(model)
    change, ratio = figure.subfigures(1, 2, width_ratios=(3, 2))
    panels = change.subplot_mosaic(
        [["x", "function"], [".", "z"]], width_ratios=(1, 2), height_ratios=(2, 1), empty_sentinel="."
    )
    panels["function"].sharex(panels["z"])
    panels["function"].sharey(panels["x"])
    panels["function"].plot(z, grid, color="C2")
    panels["z"].plot(z, base, color="C0")
    panels["x"].plot(density, grid, color="C1")
    panels["function"].set(xlim=(-3, 3), ylim=(-3.5, 3.5), title="x as a function of z")
    panels["z"].set(xlabel="z", ylim=(0.45, 0))
    panels["x"].set(ylabel="x", xlim=(0.6, 0))
    edges = torch.linspace(-2.5, 2.5, 11)
    ends = model.flow.inverse(edges[:, None])[0].squeeze(1)
    for edge, end in zip(edges.tolist(), ends.tolist(), strict=True):
        panels["function"].plot([edge, edge, -3], [-3.5, end, end], color="0.8", linewidth=0.7)
        panels["z"].axvline(edge, color="0.8", linewidth=0.7)
        panels["x"].axhline(end, color="0.8", linewidth=0.7)
    for i, color in ((2, "C0"), (5, "C3")):  # one interval that is compressed, and one that is stretched
        of_z, of_x = (torch.linspace(*v[i : i + 2].tolist(), 200) for v in (edges, ends))
        base_in, density_in = Normal(0, 1).log_prob(of_z).exp(), model.log_prob(of_x[:, None]).exp()
        panels["z"].fill_between(of_z, base_in, color=color, alpha=0.5)
        panels["x"].fill_betweenx(of_x, density_in, color=color, alpha=0.5)
        masses = torch.trapezoid(base_in, of_z).item(), torch.trapezoid(density_in, of_x).item()
        print(
            f"z from {edges[i]:.1f} to {edges[i + 1]:.1f}, x from {ends[i]:.2f} to {ends[i + 1]:.2f}: "
            f"probability {masses[0]:.4f} and {masses[1]:.4f}"
        )
    axes = ratio.subplots()
    axes.plot(z, base, color="C0", label="base density at z")
    axes.plot(z, density, color="C1", label="density at x(z)")
    axes.plot(z, slope, color="C2", label="slope dx/dz")
    axes.plot(z, slope * density, color="black", linestyle=":", label="slope times density at x(z)")
    axes.axhline(1, color="0.8", linewidth=0.7)
    axes.set(xlabel="z", xlim=(-3, 3), ylim=(0, 1.8), title="density over slope")
    axes.legend(fontsize=7, loc="upper left")


def step_panels(figure, samples, epochs):
    x, which = make_moons(samples, noise=0.05, random_state=0)
    model = VectorGlow(steps=8, hidden=64, reversible=False)
    print(fastflow.fit(model, x, lr=3e-3, max_epochs=epochs))
    y, layers = torch.from_numpy(x).float(), list(model.flows[0].flows)
    panels, every = figure.subplots(1, 5), len(layers) // 4
    with torch.no_grad():
        for i, axes in enumerate(panels):
            axes.scatter(*y.T, s=1, c=which, cmap="coolwarm")
            axes.set(title="data" if i == 0 else f"after {2 * i} of 8 steps", xticks=[], yticks=[])
            axes.set(xlim=(-3.2, 3.2), ylim=(-3.2, 3.2), aspect="equal")
            for layer in layers[i * every : (i + 1) * every]:
                y, _ = layer(y)


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", default="docs/pictures/one_dimension.png")
    parser.add_argument("--samples", type=int, default=4000)
    parser.add_argument("--epochs", type=int, default=100)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)  # matrices as small as these take longer on two
    torch.manual_seed(0)
    figure = Figure(figsize=(9, 8.6), layout="constrained")
    above, middle, below = figure.subfigures(3, 1, height_ratios=(6, 8, 4))
    x, model = fitted(options.samples, options.epochs)
    density_panels(above, x, model)
    change_panels(middle, model)
    step_panels(below, options.samples, options.epochs)
    figure.savefig(options.out, dpi=110)


if __name__ == "__main__":
    main()
