"""A multi-scale model of one's own levels: ImageFlow on the 8x8 digits of scikit-learn, and samples that share latents.

From a clean clone, after `make setup`:

    .venv/bin/python docs/examples/levels.py --out levels.png
"""

import argparse

import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits

from fastflow import nn as fnn
from fastflow.models import ImageFlow


def steps(channels, k):
    return [fnn.GlowStep(channels, hidden=24) for _ in range(k)]


def digits_model():
    """Three levels: squeezed once, squeezed again, and at the same size; splits keep a half and a quarter."""
    flows = [
        fnn.Sequential(fnn.Squeeze(), *steps(4, 4)),
        fnn.Sequential(fnn.Squeeze(), *steps(8, 4)),
        fnn.Sequential(*steps(2, 2)),
    ]
    splits = [fnn.Split(4, kept=0.5), fnn.Split(8, kept=0.25)]
    return ImageFlow((1, 8, 8), flows, splits, dequantize=fnn.Dequantize(n_bits=5))


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", default="docs/pictures/levels.png")
    parser.add_argument("--steps", type=int, default=600)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    images = torch.from_numpy(load_digits().images).to(torch.uint8).unsqueeze(1)  # values from 0 to 16
    order = torch.randperm(len(images))
    test, train = images[order[:300]], images[order[300:]]

    model = digits_model()
    model.initialize(train[:256])
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for step in range(options.steps):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1.0, (step + 1) / 100) * (1 - step / options.steps)
        loss = model(train[torch.randint(len(train), (32,))]).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    model.eval()
    with torch.no_grad():
        print(f"latents: {model.latent_shapes()}")
        print(f"test images: {model(test).mean():.3f} bits/dim")

    *_, last = model.encode(test[:8], seed=0)
    rows = {
        "test images": test[:8],
        "samples": model.sample(8, temperature=0.8),
        "same last latent": model.sample(8, temperature=0.8, latents=(None, None, last)),
    }
    figure = Figure(figsize=(6.4, 2.7), layout="constrained")
    axes = figure.subplots(len(rows), 8)
    for row, (title, shown) in zip(axes, rows.items(), strict=True):
        row[0].set_ylabel(title, rotation=0, ha="right", va="center")
        for axis, image in zip(row, shown, strict=True):
            axis.imshow(image[0], cmap="gray", vmin=0, vmax=16)
            axis.set(xticks=[], yticks=[])
    figure.savefig(options.out, dpi=100)


if __name__ == "__main__":
    main()
