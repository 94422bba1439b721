"""The bounded scale function of couplings, and the factors that a trained model learned, layer by layer.

From a clean clone, after `make train`:

    .venv/bin/python docs/examples/scaling_factors.py runs/photos-1 --out scaling_factors.png

With "soft_clamp", the log scale of a coupling is f tanh(h / f) for the network's output h. The factor f is
learned, and starts at 1. "tanh" is f tanh(h).
"""

import argparse

import torch
from matplotlib.figure import Figure

import fastflow
from fastflow.nn import AffineCoupling


def has_factors(module):
    return isinstance(module, AffineCoupling) and module.log_factor is not None


def log_scale(raw, factor):
    """Log scale of a coupling of two features whose network returns a shift of 0 and ``raw``."""
    coupling = AffineCoupling(lambda x: torch.cat([torch.zeros_like(raw), raw], dim=1))
    coupling.log_factor.data.fill_(factor).log_()
    return coupling(torch.zeros(len(raw), 2))[1].detach()


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint")
    parser.add_argument("--out", default="docs/pictures/scaling_factors.png")
    options = parser.parse_args(argv)
    model = fastflow.load(options.checkpoint)
    learned = [m.log_factor.detach().exp() for m in model.modules() if has_factors(m)]
    if not learned:
        parser.error(f"{options.checkpoint}: no coupling has learned factors (soft_clamp or tanh)")

    figure = Figure(figsize=(9, 3), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 2))
    raw = torch.linspace(-5, 5, 201)[:, None]
    for factor in (0.5, 1.0, 2.0):
        left.plot(raw, log_scale(raw, factor), label=f"f = {factor}")
    left.set(title='"soft_clamp"', xlabel="output of the network", ylabel="log scale")
    left.legend(fontsize=8)
    for i, factors in enumerate(learned):
        right.plot([i] * len(factors), factors, ".", color="C0", markersize=3)
        print(f"coupling {i}: {factors.min():.3f} to {factors.max():.3f}, {len(factors)} factors")
    right.plot([f.mean() for f in learned], color="C1", label="mean")
    right.axhline(1, color="0.7", linestyle=":", label="start")
    right.set(title="learned factors, from the data to the latents", xlabel="coupling", ylabel="f")
    right.legend(fontsize=8)
    figure.savefig(options.out, dpi=110)


if __name__ == "__main__":
    main()
