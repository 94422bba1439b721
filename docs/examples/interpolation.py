r"""Interpolations between the latents of pairs of test images, along lines and along arcs.

It also prints bits/dim and the length of the normalized latents in the middle of the paths. For a model with
learned splits, normalized latents are compared with raw ones.

From a clean clone, after `make setup` (some minutes on 2 cores):

    .venv/bin/python -m fastflow train --model mnist-multiscale --data mnist --minutes 20 \
        --lr 2e-3 --clip 1 --out runs/multiscale
    .venv/bin/python docs/examples/interpolation.py runs/multiscale --out interpolation.png

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
    parser.add_argument("--out", default="docs/pictures/interpolation.png")
    parser.add_argument("--data", default="mnist")
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument(
        "--images", type=int, nargs="+", help="indices of the test images of the first ends, then of the last"
    )
    parser.add_argument("--steps", type=int, default=10)
    options = parser.parse_args(argv)
    model = fastflow.load(options.checkpoint)
    images = data.load(options.data, options.data_dir, model.shape[1]).test >> (8 - model.n_bits)
    images = images[: 2 * options.pairs] if options.images is None else images[options.images]
    x0, x1 = images.chunk(2)
    learned = any(split.net is not None for split in model.splits)
    paths = {
        f"{method}{'' if normalized else ', raw'}": explore.interpolate(
            model, x0, x1, options.steps, method=method, seed=0, normalized=normalized
        )
        for method in explore.METHODS
        for normalized in ((True, False) if learned else (True,))
    }
    middles = {name: path[:, path.shape[1] // 2] for name, path in paths.items()}
    print(f"{'':14}  bits/dim  length")
    for name, found in {"ends": images, **middles}.items():
        latents = model.encode(found, seed=1, normalized=True)
        length = torch.cat([z.flatten(1) for z in latents], dim=1).square().mean().sqrt()
        with torch.no_grad():
            print(f"{name:14}  {model.bits_per_dim(found, seed=1).mean():8.3f}  {length:6.3f}")
    rows = {f"pair {i + 1}, {method}": path[i] for i in range(len(x0)) for method, path in paths.items()}
    picture.save_rows(options.out, rows, model.n_bits)


if __name__ == "__main__":
    main()
