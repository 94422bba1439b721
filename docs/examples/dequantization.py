r"""Histograms of the inputs of a flow after dequantization with uniform noise and with learned noise.

From a clean clone, after `make setup` (some minutes on 2 cores):

    .venv/bin/python -m fastflow train --model mnist-simple --data mnist --minutes 20 \
        --lr 2e-3 --clip 1 --out runs/simple
    .venv/bin/python -m fastflow train --model mnist-multiscale --data mnist --minutes 20 \
        --lr 2e-3 --clip 1 --out runs/multiscale
    .venv/bin/python docs/examples/dequantization.py runs/simple runs/multiscale --out dequantization.png

Weights that fastflow.models.load_published supports work too.
"""

import argparse
from pathlib import Path

import fastflow
from fastflow import explore
from fastflow.trainer import data, picture


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoints", nargs="+")
    parser.add_argument("--out", default="docs/pictures/dequantization.png")
    parser.add_argument("--data", default="mnist")
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--images", type=int, default=128)
    options = parser.parse_args(argv)
    panels = {}
    for path in options.checkpoints:
        model = fastflow.load(path)
        x = data.load(options.data, options.data_dir, model.shape[1]).test[: options.images] >> (
            8 - model.n_bits
        )
        panels[f"{type(model.dequantize).__name__}, {Path(path).name}"] = {
            "all pixels": explore.dequantized(model, x)
        }
    picture.save_histograms(options.out, panels, "value after dequantization", bins=256)


if __name__ == "__main__":
    main()
