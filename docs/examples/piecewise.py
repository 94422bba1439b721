"""A piecewise linear function of [0, 1], its inverse, and how it changes a uniform density.

From a clean clone, after `make setup` (seconds):

    .venv/bin/python docs/examples/piecewise.py --out piecewise.png

It follows figure 16.5 of Prince, *Understanding Deep Learning*, with `PiecewiseLinear` on [-B, B], B = 1/2.
"""

import argparse

import torch
from matplotlib.figure import Figure

import fastflow.nn as fnn

SLOPES = torch.tensor([0.6, 1.6, 0.3, 1.9, 0.6])  # their mean is 1


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", default="docs/pictures/piecewise.png")
    parser.add_argument("--samples", type=int, default=100_000)
    options = parser.parse_args(argv)
    torch.manual_seed(0)
    bins = len(SLOPES)
    function = fnn.PiecewiseLinear(bins, bound=0.5, min_slope=1e-6)

    def mapped(h, direction):
        """Of the points h of [0, 1]: their images, and the logarithm of each slope."""
        y, log_det = direction(h[:, None] - 0.5, SLOPES.log().expand(len(h), bins))
        return y[:, 0] + 0.5, log_det

    figure = Figure(figsize=(10, 3.2), layout="constrained")
    slopes, curve, density = figure.subplots(1, 3)
    h = torch.linspace(0, 1, 401)
    slopes.bar(
        ((torch.arange(bins) + 0.5) / bins).numpy(),
        SLOPES.numpy(),
        width=1 / bins,
        color="C2",
        edgecolor="white",
    )
    slopes.axhline(1, color="0.6", linewidth=0.8)
    slopes.set(title="slope of each bin", xlabel="h", ylabel="$\\phi_b$")
    curve.plot(h, mapped(h, function)[0], color="C2", label="f")
    curve.plot(h, mapped(h, function.inverse)[0], color="C1", linestyle="--", label="inverse of f")
    for edge in torch.linspace(0, 1, bins + 1):
        at = mapped(edge.view(1), function)[0].item()
        curve.plot([edge, edge, 0], [0, at, at], color="0.8", linewidth=0.7)
    curve.set(title="function", xlabel="h", ylabel="h'", xlim=(0, 1), ylim=(0, 1), aspect="equal")
    curve.legend(fontsize=8)
    drawn, _ = mapped(torch.rand(options.samples), function)
    back, log_slope = mapped(h, function.inverse)
    density.hist(drawn, bins=60, range=(0, 1), density=True, color="0.85", label="samples")
    density.plot(h, log_slope.exp(), color="C1", label="density by the log-det")
    density.set(title="density of h' for uniform h", xlabel="h'")
    density.legend(fontsize=7, loc="upper right")
    error = (mapped(back, function)[0] - h).abs().max()
    print(f"largest |f(inverse of f) - identity|: {error:.1e}")
    figure.savefig(options.out, dpi=110)


if __name__ == "__main__":
    main()
