"""Three ways to mix channels between couplings, trained equally: reversal, shuffle and 1x1 convolution.

From a clean clone, after `make setup` (some minutes on 2 cores):

    .venv/bin/python docs/examples/permutations.py --out permutations.png
"""

import argparse

import numpy as np
import torch
from matplotlib.figure import Figure

import fastflow
from fastflow.models import Glow
from fastflow.trainer import data


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", default="docs/pictures/permutations.png")
    parser.add_argument("--data", default="photos")
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--side", type=int, default=16, help="pixels of the corner that is used")
    parser.add_argument("--steps", type=int, default=4, help="flow steps per level")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=2)
    options = parser.parse_args(argv)
    source = data.load(options.data, options.data_dir)
    random = np.random.default_rng(0)
    indices = random.integers(source.length, size=options.samples)
    images, _ = source.draw(indices, random.random((options.samples, 3)))
    images = images[:, :, : options.side, : options.side]
    dimensions = images[0].numel() * np.log(2)

    axes = (figure := Figure(figsize=(6, 3.6), layout="constrained")).subplots()
    for i, (conv1x1, name) in enumerate(
        {"reverse": "reversal", "shuffle": "shuffle", "lu": "1x1 convolution"}.items()
    ):
        curves = []
        for seed in range(options.seeds):
            torch.manual_seed(seed)
            model = Glow(tuple(images.shape[1:]), levels=2, steps=options.steps, hidden=32, conv1x1=conv1x1)
            history = fastflow.fit(
                model, images, batch_size=100, lr=1e-3, max_epochs=options.epochs, seed=seed
            )
            curves.append([-v / dimensions for v in history.validation])
            axes.plot(
                range(1, len(curves[-1]) + 1), curves[-1], color=f"C{i}", label=name if seed == 0 else None
            )
        best = ", ".join(f"{min(curve):.3f}" for curve in curves)
        print(f"{name:16} {best} bits/dim of held-out images")
    axes.set(xlabel="epoch", ylabel="bits/dim of held-out images")
    axes.legend()
    figure.savefig(options.out, dpi=110)


if __name__ == "__main__":
    main()
