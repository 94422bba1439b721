r"""Interpolations between the latents of pairs of test images, along lines and along arcs.

From a clean clone, after `make setup` (some minutes on 2 cores):

    .venv/bin/python -m fastflow train --model mnist-multiscale --data mnist --minutes 20 \
        --lr 2e-3 --clip 1 --out runs/multiscale
    .venv/bin/python docs/examples/interpolation.py runs/multiscale --out interpolation.png

Any run folder of `fastflow train` (with its --data) and any weights that
fastflow.models.load_published supports work too.
"""

import argparse

import fastflow
from fastflow import explore
from fastflow.trainer import data, picture


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint")
    parser.add_argument("--out", default="docs/pictures/interpolation.png")
    parser.add_argument("--data", default="mnist")
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10)
    options = parser.parse_args(argv)
    model = fastflow.load(options.checkpoint)
    images = data.load(options.data, options.data_dir, model.shape[1]).test >> (8 - model.n_bits)
    x0, x1 = images[: 2 * options.pairs].chunk(2)
    paths = {
        method: explore.interpolate(model, x0, x1, options.steps, method=method, seed=0)
        for method in explore.METHODS
    }
    rows = {
        f"pair {i + 1}, {method}": path[i] for i in range(options.pairs) for method, path in paths.items()
    }
    picture.save_rows(options.out, rows, model.n_bits)


if __name__ == "__main__":
    main()
