r"""The early latents of a multi-scale model: each row keeps the last latent and resamples the others.

From a clean clone, after `make setup` (some minutes on 2 cores):

    .venv/bin/python -m fastflow train --model mnist-multiscale --data mnist --minutes 20 \
        --lr 2e-3 --clip 1 --out runs/multiscale
    .venv/bin/python docs/examples/resampling.py runs/multiscale --out resampling.png

Any run folder of `fastflow train` (with its --data) and any weights that
fastflow.models.load_published supports work too.
"""

import argparse

import torch

import fastflow
from fastflow import explore
from fastflow.trainer import data, picture
from fastflow.trainer.evaluate import sample


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint")
    parser.add_argument("--out", default="docs/pictures/resampling.png")
    parser.add_argument("--data", default="mnist")
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--rows", type=int, default=3)
    parser.add_argument("--n", type=int, default=10)
    options = parser.parse_args(argv)
    model = fastflow.load(options.checkpoint)
    images = data.load(options.data, options.data_dir, model.shape[1]).test[: options.rows] >> (
        8 - model.n_bits
    )
    rows = {}
    for kind, x in (("test image", images), ("sample", sample(model, options.rows, seed=2))):
        others = explore.resample(model, model.encode(x, seed=0), options.n)
        rows |= {f"{kind} {i + 1}": torch.cat([x[i : i + 1], others[i]]) for i in range(len(x))}
    picture.save_rows(options.out, rows, model.n_bits)


if __name__ == "__main__":
    main()
