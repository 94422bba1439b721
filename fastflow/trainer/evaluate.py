"""Evaluation of a trained model: bits/dim of a test set, sample grids, the table of results."""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastflow.models.model import Model, in_mode
from fastflow.seeds import Stream, derive
from fastflow.trainer import picture
from fastflow.trainer.board import Board
from fastflow.trainer.captured import Captured, record_on
from fastflow.trainer.config import RunConfig
from fastflow.trainer.data import Source
from fastflow.trainer.kinds import ImageKind, kind_of
from fastflow.trainer.progress import read_metrics
from fastflow.trainer.ranks import Ranks
from fastflow.trainer.step import autocast


def captured_log_prob(model: Model, **options: Any) -> Captured:
    """The log-density of dequantized samples, captured on a GPU; ``options`` of :class:`Captured`.

    Dequantization is not part of it: its noise depends on the index of the batch's first sample.
    """
    options.setdefault("record", record_on(next(model.parameters()).device))
    return Captured(model._log_prob_dequantized, model, **options)


def captured_sample(model: Model, **options: Any) -> Captured:
    """``model.sample``, captured on a GPU; ``options`` of :class:`Captured`."""
    options.setdefault("record", record_on(next(model.parameters()).device))
    return Captured(model.sample, model, **options)


@torch.no_grad()
def evaluate(
    model: Model,
    images: Tensor,
    labels: Tensor | None = None,
    *,
    samples: int = 1,
    seed: int = 0,
    batch_size: int = 250,
    bf16: bool = False,
    each: bool = False,
    ranks: Ranks | None = None,
    log_prob: Captured | None = None,
) -> Tensor:
    r"""Bits/dim of each sample, :math:`-\log_2 \frac{1}{K} \sum_k p_k(x) / D`.

    The sum is over K draws of the dequantization noise. More samples tighten the bound (arXiv:1509.00519,
    equation 8). The noise depends only on (seed, k, image). Continuous samples have none: K is 1 for them.

    Args:
        model: a model of images or vectors.
        images: uint8 ``[N, C, H, W]``, or floating point ``[N, D]``.
        labels: int64 ``[N]``, a context ``[N, C]``, or None.
        samples: number of importance samples K.
        seed: seed of the noise.
        batch_size: images per batch.
        bf16: run the networks in bfloat16.
        each: give the bounds of 1, 2, ... K samples.
        ranks: processes that share the batches.
        log_prob: :func:`captured_log_prob` of the model, to reuse its CUDA graphs.

    Shape: float64 ``[N]`` on the CPU, with ``each`` ``[K, N]``; the same on every rank.
    """
    device = next(model.parameters()).device
    ranks = ranks or Ranks()
    samples = 1 if model.n_bits is None else samples
    log_prob = log_prob or captured_log_prob(model)
    found = torch.zeros(samples, len(images), dtype=torch.float64)
    with in_mode(model, training=False):
        for k in range(samples):
            for start in range(0, len(images), batch_size):
                if start // batch_size % ranks.world_size != ranks.rank:
                    continue
                part = slice(start, start + batch_size)
                context = None if labels is None else labels[part].to(device)
                with autocast(device, bf16):
                    noise = derive(seed, Stream.TEST_NOISE, k)
                    y, log_det = model._dequantize(images[part].to(device), context, noise, start)
                    nats = log_prob(y, log_det, context)
                found[k, part] = nats.double().cpu()
    with ranks.translate_collective_errors():
        ranks.all_reduce_sum(found, long_timeout=True)  # exact: one summand of each entry is not zero
    dimensions = images[0].numel() * math.log(2)
    counts = torch.arange(1, samples + 1, dtype=torch.float64)
    bounds = torch.logcumsumexp(found, 0) - counts.log()[:, None]
    return -(bounds if each else bounds[-1]) / dimensions


@torch.no_grad()
def sample(
    model: Model,
    n: int,
    temperature: float = 1.0,
    seed: int = 0,
    labels: Tensor | None = None,
    draw: Captured | None = None,
) -> Tensor:
    """``n`` samples ``[n, *shape]`` on the CPU; without ``labels`` of all classes in turn.

    ``labels``: classes or contexts, used in turn. ``draw``: :func:`captured_sample` of the model, to reuse its
    CUDA graphs.
    """
    device = next(model.parameters()).device
    if labels is None and model.classes is not None:
        labels = torch.arange(model.classes)
    generator = torch.Generator(device).manual_seed(seed)
    context = None if labels is None else labels[torch.arange(n) % len(labels)].to(device)
    with in_mode(model, training=False):
        return (draw or captured_sample(model))(n, temperature, context, generator).cpu()


def save_pictures(
    folder: Path,
    config: RunConfig,
    model: Model,
    source: Source,
    *,
    board: Board,
    step: int,
    evaluated: str = "test",
    codecs: dict[str, float] | None = None,
    draw: Captured | None = None,
) -> None:
    """Write samples.png, and curve.png from metrics.csv; also show a grid of samples on the board.

    ``evaluated``: the set of the evaluations, test or validation.
    """
    kind, seed = kind_of(model.shape), derive(config.seed, Stream.SAMPLES)
    contexts = None if model.context_shape is None else source.test_labels
    samples = sample(model, config.samples, config.temperature, seed, contexts, draw)
    grid = kind.save_samples(folder / "samples.png", samples, source, config)
    if grid is not None:
        board.picture("samples", grid, step)
    unit = kind.unit(model.shape)
    metrics = read_metrics(folder / "metrics.csv")
    rows = [
        (row["step"], row[f"train_{unit.key}"], row[f"{evaluated}_{unit.key}"])
        for row in metrics
        if row.get("back_to_step") is None  # not the losses that a rollback undid
    ]
    if rows:
        picture.save_curve(folder / "curve.png", rows, codecs, evaluated, unit.name)


def report(result: dict) -> str:
    """The table of results of images, from the contents of result.json."""
    return ImageKind().report(result)
