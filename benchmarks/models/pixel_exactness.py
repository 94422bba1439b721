"""Counts pixel values that change in ``decode(encode(x))`` of trained models in float32.

    python -m benchmarks.models.pixel_exactness --data cifar10

Trains a Glow L=3 K=8 per scale function, a RealNVP of two scales with 2 blocks, and a NICE. Counts the
values that differ for test images, for uniform noise, and for noise of the values 0 and 255 only. Appends a
row for each to results/pixel_exactness.csv.
"""

import argparse
from pathlib import Path

import torch

from benchmarks.models import training
from benchmarks.tools import harness
from fastflow.models import NICE, Glow, RealNVP
from fastflow.models.model import Model
from fastflow.trainer import data

# (model, scale function)
MODELS = (
    ("Glow", "soft_clamp"),
    ("Glow", "tanh"),
    ("Glow", "sigmoid"),
    ("RealNVP", "tanh"),
    ("NICE", "none"),
)


def trained(source, name: str, scale: str, steps: int, hidden: int) -> Model:
    torch.manual_seed(0)
    if name == "Glow":
        model = Glow(image_shape=source.shape, levels=3, steps=8, hidden=hidden, scale=scale)
    elif name == "RealNVP":
        model = RealNVP(image_shape=source.shape, hidden=hidden, blocks=2)
    else:
        model = NICE(features=source.shape, hidden=8 * hidden, layers=3)
    for _ in training.train(model, source, steps, desc=f"{name} {scale}"):
        pass
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="photos", help="as in fastflow train")
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--hidden", type=int, default=32)
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--results", type=Path, default=harness.RESULTS, help="folder of the rows")
    options = parser.parse_args()

    source = data.load(options.data, options.data_dir)
    images = source.test[: options.images]
    generator = torch.Generator().manual_seed(0)
    sets = {
        "test images": images,
        "uniform noise": torch.randint(0, 256, images.shape, dtype=torch.uint8, generator=generator),
        "0 and 255": torch.randint(0, 2, images.shape, dtype=torch.uint8, generator=generator) * 255,
    }
    about, rows = harness.metadata("cpu"), []
    for name, scale in MODELS:
        model = trained(source, name, scale, options.steps, options.hidden)
        bits = model(images, seed=0).mean().item()
        for kind, x in sets.items():
            wrong = (model.decode(model.encode(x)) != x).sum().item()
            print(f"{name:<9}{scale:<12}{kind:<16}{wrong:>8} of {x.numel()} values differ")
            rows.append(
                {
                    "data": source.name,
                    "model": name,
                    "scale": scale,
                    "steps": options.steps,
                    "hidden": options.hidden,
                    "test_bits_per_dim": round(bits, 4),
                    "images": kind,
                    "values": x.numel(),
                    "differ": wrong,
                }
                | about
            )
    harness.append(options.results / "pixel_exactness.csv", rows)


if __name__ == "__main__":
    main()
