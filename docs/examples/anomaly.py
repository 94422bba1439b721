r"""Anomaly scores: bits/dim and typicality.

Bits/dim fails for images that are simpler than the data, because they need fewer bits than the data.

From a clean clone, after `make setup` (some minutes on 2 cores):

    .venv/bin/python -m fastflow train --model mnist-multiscale --data mnist --minutes 20 \
        --lr 2e-3 --clip 1 --out runs/multiscale
    .venv/bin/python docs/examples/anomaly.py runs/multiscale --out anomaly.png

Any run folder of `fastflow train` (with its --data) and any weights that
fastflow.models.load_published supports work too.
"""

import argparse

import torch
from tqdm import tqdm

import fastflow
from fastflow import explore
from fastflow.trainer import data, picture
from fastflow.trainer.evaluate import evaluate


def unlike(images):
    """Outliers: images of the same shape that are not from the data set."""
    n, c, h, w = images.shape
    photos = data.load("photos").test[:, :, :h, :w]
    gray = photos.float().mean(1, keepdim=True).byte().expand(-1, c, -1, -1)
    return {
        "rotated": images.rot90(1, (2, 3)),
        "inverted": 255 - images,
        "dimmed to a quarter": images // 4,
        "constant": torch.arange(n).mul(256).div(n).byte().view(n, 1, 1, 1).expand(n, c, h, w),
        "black, one pixel": torch.zeros_like(images)
        .flatten(1)
        .scatter(1, torch.arange(n)[:, None] % (c * h * w), 255)
        .view_as(images),
        "photographs": gray.repeat(1 + n // len(gray), 1, 1, 1)[:n],
        "noise": torch.randint(
            0, 256, images.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
        ),
    }


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint")
    parser.add_argument("--out", default="docs/pictures/anomaly.png")
    parser.add_argument("--data", default="mnist")
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--images", type=int, default=200)
    options = parser.parse_args(argv)
    model = fastflow.load(options.checkpoint)
    source = data.load(options.data, options.data_dir, model.shape[1])
    train, test = data.Batches(source, options.images, seed=0)[0][0], source.test[: options.images]
    groups = {"training": train, "test": test, **unlike(test)}
    scores = {
        name: evaluate(model, x.contiguous() >> (8 - model.n_bits))
        for name, x in tqdm(groups.items(), desc="groups")
    }
    train = scores.pop("training")
    distances = {name: explore.typicality(s, train) for name, s in scores.items()}
    print(f"{'':20s} bits/dim   AUROC of bits/dim   AUROC of typicality")
    for name, s in scores.items():
        areas = [explore.auroc(kind["test"], kind[name]) for kind in (scores, distances)]
        print(f"{name:20s} {s.mean():8.3f}   {areas[0]:17.3f}   {areas[1]:19.3f}")
    picture.save_scores(
        options.out, {"bits/dim": scores, "typicality: distance from the training mean": distances}
    )


if __name__ == "__main__":
    main()
