"""Quantization and dequantization of a mixture: the data, their values, and the density that a flow then has to fit.

From a clean clone, after `make setup` (seconds):

    .venv/bin/python docs/examples/quantization.py --out quantization.png

Values of 3 bits are dequantized with uniform noise and moved to the real line by a logit. The density of the
result is p(value) |du/dy|, and the layer's log-det is log |dy/du|.
"""

import argparse
import math

import torch
from matplotlib.figure import Figure

import fastflow.nn as fnn

N_BITS = 3
LEVELS = 2**N_BITS


def mixture(n):
    """Draws in (0, 1) from two Gaussians."""
    left = torch.rand(n) < 0.35
    return torch.where(left, 0.25 + 0.08 * torch.randn(n), 0.7 + 0.1 * torch.randn(n)).clamp(0, 1 - 1e-6)


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", default="docs/pictures/quantization.png")
    parser.add_argument("--samples", type=int, default=200_000)
    options = parser.parse_args(argv)
    torch.manual_seed(0)
    x = mixture(options.samples)
    values = (x * LEVELS).to(torch.uint8)
    share = torch.bincount(values.long(), minlength=LEVELS) / len(values)
    layer = fnn.LogitDequantize(N_BITS, alpha=0.01, preset="tutorial")
    y, log_det = layer(values[:, None], seed=0)
    log_density = share[values.long()].log() - log_det
    y, order = y[:, 0].sort()
    density = log_density[order].exp()

    figure = Figure(figsize=(9, 2.8), layout="constrained")
    data, quantized, dequantized = figure.subplots(1, 3)
    data.hist(x, bins=100, density=True, color="0.7")
    data.set_title("data")
    colors = [f"C{v}" for v in range(LEVELS)]
    quantized.bar(range(LEVELS), share, color=colors)
    quantized.set(title=f"values of {N_BITS} bits", xlabel="value", ylabel="probability")
    dequantized.hist(y, bins=200, density=True, color="0.85")
    for v in range(LEVELS):
        mine = values[order] == v
        dequantized.plot(y[mine], density[mine], color=colors[v])
    dequantized.set(title="dequantized, after the logit", xlabel="y", ylabel="density")
    figure.savefig(options.out, dpi=110)
    bits = math.log(2)
    print(f"entropy of the values: {torch.special.entr(share).sum() / bits:.4f} bits")
    print(f"bits/dim of this density, with the log-det: {-(log_density + log_det).mean() / bits:.4f}")


if __name__ == "__main__":
    main()
