"""What a trained model is worth and looks like: bits/dim of a test set, sample grids, the closing table."""

import math

import torch
from torch import Tensor

from fastflow.seeds import Stream, derive
from fastflow.trainer import picture
from fastflow.trainer.progress import read_metrics
from fastflow.trainer.ranks import Ranks
from fastflow.trainer.step import autocast


@torch.no_grad()
def evaluate(
    model, images, labels=None, *, samples=1, seed=0, batch_size=250, bf16=False, each=False, ranks=None
) -> Tensor:
    r"""Bits/dim of each image, :math:`-\log_2 \frac{1}{K} \sum_k p_k(x) / D` over K draws of the dequantization noise.

    More samples tighten the bound (arXiv:1509.00519, equation 8).  The noise depends on (seed, k, image) alone.

    images: uint8 ``[N, C, H, W]``; labels: int64 ``[N]`` or None; ``ranks`` share the batches.  Gives float64 ``[N]``
    on the CPU, the same on every rank; with ``each`` the bounds of 1, 2, ... K samples, ``[K, N]``.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    ranks = ranks or Ranks()
    log_prob = torch.zeros(samples, len(images), dtype=torch.float64)
    for k in range(samples):
        for start in range(0, len(images), batch_size):
            if start // batch_size % ranks.count != ranks.index:
                continue
            part = slice(start, start + batch_size)
            context = None if labels is None else labels[part].to(device)
            with autocast(device, bf16):
                nats = model.log_prob(
                    images[part].to(device), context, seed=derive(seed, Stream.TEST_NOISE, k), offset=start
                )
            log_prob[k, part] = nats.double().cpu()
    with ranks.losing():
        ranks.add(log_prob, patiently=True)  # exact: all but one are zero
    model.train(was_training)
    dimensions = images[0].numel() * math.log(2)
    bounds = (
        torch.logcumsumexp(log_prob, 0) - torch.arange(1, samples + 1, dtype=torch.float64).log()[:, None]
    )
    return -(bounds if each else bounds[-1]) / dimensions


@torch.no_grad()
def sample(model, n, temperature=1.0, seed=0, labels=None):
    """``n`` images, uint8 ``[n, C, H, W]`` on the CPU; of a model of classes, all classes in turn unless ``labels``."""
    device = next(model.parameters()).device
    if labels is None and model.classes is not None:
        labels = torch.arange(n) % model.classes
    was_training = model.training
    model.eval()
    generator = torch.Generator(device).manual_seed(seed)
    context = None if labels is None else labels.to(device)
    images = model.sample(n, temperature=temperature, context=context, generator=generator).cpu()
    model.train(was_training)
    return images


def pictures(run, config, model, metrics, board, step, codecs=None):
    images = sample(model, config.samples, config.temperature, derive(config.seed, Stream.SAMPLES))
    picture.save_grid(run / "samples.png", images, config.n_bits)
    if board:
        board.add_image("samples", picture.grid(images, config.n_bits), step, dataformats="HWC")
    rows = [(r["step"], r["train_bits_per_dim"], r["test_bits_per_dim"]) for r in read_metrics(metrics)]
    if rows:
        picture.save_curve(run / "curve.png", rows, codecs)


def report(result):
    """The closing table, from what result.json holds."""
    bits, one, k = (
        result["test_bits_per_dim"],
        result["test_bits_per_dim_1_sample"],
        result["importance_samples"],
    )
    samples = f"{k} importance samples, {one:.3f} with one" if k > 1 else "one sample of the noise"
    width = max(5, len(result["model"]))
    lines = [
        f"bits/dim on {result['test_images']} test images",
        f"  {result['model']:{width}s} {bits:.3f}  ({samples})",
    ]
    notes = {"PNG": "optimize=True", "WebP": "lossless, quality 100, method 6"}
    for name, value in result["codecs_bits_per_dim"].items():
        first = ", the first 1000 images" if result["test_images"] > 1000 else ""
        lines.append(f"  {name:{width}s} {value:.3f}  ({notes[name]}, each image alone{first})")
    return "\n".join(lines)
