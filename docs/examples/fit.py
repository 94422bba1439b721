"""From samples to a density: fastflow.fit on two moons, the fitted density and the log-density after each epoch.

From a clean clone, after `make setup` (a minute on 2 cores):

    .venv/bin/python docs/examples/fit.py --out fit.png
"""

import argparse

import torch
from matplotlib.figure import Figure
from sklearn.datasets import make_moons

import fastflow
from fastflow import explore
from fastflow.models import VectorGlow

LIMITS = (-1.75, 2.75), (-1.25, 1.75)


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", default="docs/pictures/fit.png")
    parser.add_argument("--samples", type=int, default=5000)
    parser.add_argument("--epochs", type=int, default=200)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)  # matrices as small as these take longer on two
    torch.manual_seed(0)
    x = make_moons(options.samples, noise=0.05, random_state=0)[0]

    model = VectorGlow(prior="mixture", reversible=False)
    history = fastflow.fit(model, x, lr=3e-3, max_epochs=options.epochs)
    print(history)

    density, integral = explore.density(model, LIMITS, 300)
    print(f"integral of the density: {integral:.4f}")
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.imshow(density, origin="lower", extent=(*LIMITS[0], *LIMITS[1]), cmap="magma")
    left.plot(*x[:300].T, ".", color="white", markersize=1)
    left.set_title("density and some of the samples")
    right.plot(history.train, label="training batches")
    right.plot(history.validation, label="held-out samples")
    right.axvline(history.best_epoch, color="0.7", linestyle=":", label="weights that are kept")
    right.set(xlabel="epoch", ylabel="log-density, nats", ylim=(-2, None))
    right.legend()
    figure.savefig(options.out, dpi=110)


if __name__ == "__main__":
    main()
