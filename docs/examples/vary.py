r"""Test images with one dimension of a normalized latent set to several values, at each level.

From a clean clone, after `make train`:

    .venv/bin/python docs/examples/vary.py runs/photos-1 --data photos --out vary.png

Any run folder of `fastflow train` (with its --data) and any weights that
fastflow.models.load_published supports work too.
"""

import argparse

import torch

import fastflow
from fastflow import explore
from fastflow.trainer import data, picture


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint")
    parser.add_argument("--out", default="docs/pictures/vary.png")
    parser.add_argument("--data", default="photos")
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--image", type=int, default=0, help="index of the test image")
    parser.add_argument("--dimensions", type=int, default=2, help="dimensions per level")
    options = parser.parse_args(argv)
    model = fastflow.load(options.checkpoint)
    images = data.load(options.data, options.data_dir, model.shape[1]).test >> (8 - model.n_bits)
    x = images[options.image : options.image + 1]
    values = torch.linspace(-6, 6, 9)
    rows = {}
    for level, shape in enumerate(model.latent_shapes()):
        for channel in range(options.dimensions):
            dimension = (channel, shape[1] // 2, shape[2] // 2)
            rows[f"level {level + 1}, dimension {dimension}"] = explore.vary(
                model, x, level, dimension, values, seed=0
            )[0]
    picture.save_rows(options.out, rows, model.n_bits)


if __name__ == "__main__":
    main()
