r"""Samples at several temperatures, one row per temperature, all from the same noise.

From a clean clone, after `make setup` (some minutes on 2 cores):

    .venv/bin/python -m fastflow train --model mnist-multiscale --data mnist --minutes 20 \
        --lr 2e-3 --clip 1 --out runs/multiscale
    .venv/bin/python docs/examples/temperature.py runs/multiscale --out temperature.png

Any run folder of `fastflow train` and any weights that fastflow.models.load_published supports work too.
"""

import argparse

import fastflow
from fastflow.trainer import picture
from fastflow.trainer.evaluate import sample


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint")
    parser.add_argument("--out", default="docs/pictures/temperature.png")
    parser.add_argument("--n", type=int, default=12)
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0, 0.3, 0.5, 0.7, 0.85, 1, 1.15])
    options = parser.parse_args(argv)
    model = fastflow.load(options.checkpoint)
    rows = {f"T = {t:g}": sample(model, options.n, temperature=t) for t in options.temperatures}
    picture.save_rows(options.out, rows, model.n_bits)


if __name__ == "__main__":
    main()
