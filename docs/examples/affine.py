"""The smallest flow: an affine map from N(0, 1) to N(mu, sigma), learned from zero, with the true values.

From a clean clone, after `make setup` (some seconds):

    .venv/bin/python docs/examples/affine.py --out affine.png
"""

import argparse

import torch
from matplotlib.figure import Figure
from torch.distributions import Independent, Normal

from fastflow import nn as fnn
from fastflow.models import FlowModel

MEAN, SCALE = torch.tensor([3.0, -1.5]), torch.tensor([0.5, 2.0])


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", default="docs/pictures/affine.png")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--samples", type=int, default=5000)
    options = parser.parse_args(argv)
    torch.manual_seed(0)
    x = MEAN + SCALE * torch.randn(options.samples, 2)

    model = FlowModel(fnn.Affine(2), Independent(Normal(torch.zeros(2), torch.ones(2)), 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.03)
    means, scales = [], []
    for _ in range(options.steps):
        means.append(model.flow.shift.detach().clone())
        scales.append(model.flow.log_scale.detach().exp())
        loss = -model.log_prob(x[torch.randint(len(x), (256,))]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    print("             learned   samples      true")
    found = {"mu": (means[-1], x.mean(0), MEAN), "sigma": (scales[-1], x.std(0), SCALE)}
    for name, (learned, of_samples, true) in found.items():
        for i in range(2):
            print(f"{name + f'[{i}]':10}{learned[i]:10.3f}{of_samples[i]:10.3f}{true[i]:10.3f}")

    figure = Figure(figsize=(9, 3), layout="constrained")
    axes = figure.subplots(1, 3)
    for axis, title, curves, true in (
        (axes[0], "mu", means, MEAN),
        (axes[1], "sigma", scales, SCALE),
    ):
        for i, curve in enumerate(torch.stack(curves).T):
            axis.plot(curve, color=f"C{i}", label=f"{title}[{i}], learned")
            axis.axhline(true[i], color=f"C{i}", linestyle=":", label=f"{title}[{i}], true")
        axis.set(xlabel="step", title=title)
        axis.legend(fontsize=7)
    values = torch.linspace(-9, 6, 400)
    axes[2].hist(x.numpy(), bins=60, density=True, histtype="step", label=["x[0]", "x[1]"])
    for i in range(2):
        density = Normal(means[-1][i], scales[-1][i]).log_prob(values).exp()
        axes[2].plot(values, density, color=f"C{i}", linewidth=1)
    axes[2].set(title="samples and learned densities", xlabel="x")
    axes[2].legend(fontsize=7)
    figure.savefig(options.out, dpi=100)


if __name__ == "__main__":
    main()
