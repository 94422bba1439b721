"""Both directions of the KL divergence: one flow fitted to samples, one to a density that is only evaluated.

From a clean clone, after `make setup` (about a minute of one core):

    .venv/bin/python docs/examples/reverse_kl.py --out reverse_kl.png

The target has two modes, of 60% and 40%. A small flow cannot model it. Fitted to samples, by the forward KL divergence, it
covers both modes. Fitted to the density, by the reverse KL divergence, it may leave out a mode, and the effective sample
size does not tell. A larger flow with a temperature finds both.
"""

import argparse

import torch
from matplotlib.figure import Figure

import fastflow
from fastflow import explore
from fastflow.models import NeuralSplineFlow, VectorGlow

LIMITS = (-6, 6), (-6, 6)
MEANS, DEVIATION, SHARES = torch.tensor([[-2.5, -1.5], [2.5, 1.5]]), 0.7, torch.tensor([0.6, 0.4])


def log_density(x):
    """Of the target; it integrates to 1."""
    square = (x[:, None] - MEANS).square().sum(2) / DEVIATION**2
    normalizer = torch.log(torch.tensor(2 * torch.pi * DEVIATION**2))
    return torch.logsumexp(SHARES.log() - square / 2 - normalizer, 1)


def draw(n):
    modes = torch.multinomial(SHARES, n, replacement=True)
    return MEANS[modes] + DEVIATION * torch.randn(n, 2)


def small():
    """Two steps of affine couplings."""
    return VectorGlow(features=2, steps=2, hidden=8, layers=1)


def share_of_the_first_mode(model, n=10_000):
    with torch.no_grad():
        x = model.sample(n)
    return (x @ (MEANS[0] - MEANS[1]) > 0).double().mean().item()


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", default="docs/pictures/reverse_kl.png")
    parser.add_argument("--samples", type=int, default=20_000)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--size", type=int, default=300, help="cells of the grid along each dimension")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)  # matrices as small as these take longer on two
    torch.manual_seed(0)
    forward, reverse = small(), small()
    x = draw(options.samples)
    forward.initialize(x[:500])
    reverse.initialize(0.5 * torch.randn(500, 2) + MEANS[0])
    print(fastflow.fit(forward, x, max_epochs=options.epochs, patience=options.epochs))
    fits = {"forward KL": forward, "reverse KL": reverse}
    print("reverse KL:", explore.fit_density(reverse, log_density, options.steps))
    torch.manual_seed(1)
    large = NeuralSplineFlow(features=2, steps=4, hidden=64, bound=8.0)
    found = explore.fit_density(large, log_density, options.steps, temperature=10.0)
    fits["reverse KL, larger flow, temperature"] = large
    print("larger flow, temperature 10 to 1:", found)
    figure = Figure(figsize=(9.5, 2.6), layout="constrained")
    panels = figure.subplots(1, 4)
    (left, right), (low, high) = LIMITS
    at = [torch.linspace(a, b, options.size) for a, b in LIMITS]
    grid = torch.cartesian_prod(at[1], at[0]).flip(1)
    target = log_density(grid).exp().view(options.size, options.size)
    densities = {"target": target}
    for name, model in fits.items():
        densities[name], integral = explore.density(model, LIMITS, options.size)
        share = share_of_the_first_mode(model)
        print(
            f"{name}: {100 * share:.1f}% of the samples in the first mode, density integrates to {integral:.3f}"
        )
    extent = (left, right, low, high)
    for axes, (name, values) in zip(panels, densities.items(), strict=True):
        axes.imshow(values, extent=extent, origin="lower", cmap="magma", interpolation="bilinear")
        axes.set_title(name, fontsize=9)
        axes.set(xticks=[], yticks=[])
    figure.savefig(options.out, dpi=110)


if __name__ == "__main__":
    main()
