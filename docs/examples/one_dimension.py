"""A flow in one dimension: how it changes a density, its samples, and a deeper flow that does so step by step.

From a clean clone, after `make setup` (a minute on 2 cores):

    .venv/bin/python docs/examples/one_dimension.py --out one_dimension.png

The upper row fits z = Phi^-1(sum_k w_k Phi((x - mu_k) / sigma_k)), a monotone function of x, to samples. The
lower row shows two moons after each few steps of a flow of vectors, on their way to a Gaussian.
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


def density_panels(figure, samples, epochs):
    x = torch.cat([torch.randn(samples // 2) * 0.4 - 1.5, torch.randn(samples - samples // 2) * 0.7 + 1])[
        :, None
    ]
    model = FlowModel(MixtureToNormal(), fnn.GaussianPrior((1,)))
    print(fastflow.fit(model, x, lr=1e-2, max_epochs=epochs))
    grid = torch.linspace(-4, 4, 400)[:, None]
    with torch.no_grad():
        z, _ = model.flow(grid)
        density, base = model.log_prob(grid).exp(), Normal(0, 1).log_prob(grid).exp()
        drawn = model.sample(20_000)
        first, function, last = figure.subplots(1, 3)
        first.plot(grid, base, color="C0")
        first.set(title="base density", xlabel="z")
        function.plot(z, grid, color="C2")
        for edge in torch.linspace(-2.5, 2.5, 11):  # intervals of z and of x with the same probability
            at = model.flow.inverse(edge.view(1, 1))[0].item()
            function.plot([edge, edge, -4], [-4, at, at], color="0.8", linewidth=0.7)
        function.set(title="x as a function of z", xlabel="z", ylabel="x", xlim=(-4, 4), ylim=(-4, 4))
    last.hist(drawn[:, 0], bins=100, density=True, color="0.85", label="samples of the model")
    last.plot(grid, density, color="C1", label="density of the model")
    last.hist(x[:, 0], bins=100, density=True, histtype="step", color="black", linewidth=0.6, label="data")
    last.set(title="density of x", xlabel="x", xlim=(-4, 4))
    last.legend(fontsize=7)


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
    figure = Figure(figsize=(9, 5), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(3, 2))
    density_panels(above, options.samples, options.epochs)
    step_panels(below, options.samples, options.epochs)
    figure.savefig(options.out, dpi=110)


if __name__ == "__main__":
    main()
