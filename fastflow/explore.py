"""What a trained model shows: paths between samples, fine latents drawn anew, what dequantization does, densities, scores of anomaly."""

import math
from contextlib import contextmanager

import torch
from torch import Tensor

from fastflow import check
from fastflow.seeds import Stream, derive

METHODS = ("linear", "spherical")


@contextmanager
def _evaluating(model):
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def interpolate(
    model,
    x0: Tensor,
    x1: Tensor,
    steps: int = 8,
    context: Tensor | None = None,
    method: str = "linear",
    seed: int | None = None,
) -> Tensor:
    r"""Samples on the way from x0 to x1, whose latents, those of every level, are :math:`(1 - t) z_0 + t z_1` for t from 0 to 1.

    ``"spherical"`` (arXiv:1609.04468) takes :math:`[\sin((1 - t) \Omega) z_0 + \sin(t \Omega) z_1] / \sin \Omega` instead,
    :math:`\Omega` the angle between :math:`z_0` and :math:`z_1` of a level. Halfway between two draws of a Gaussian a straight line comes
    nearer to 0 than draws do, by a factor of :math:`\sqrt 2`; the arc does not.

    Without a ``seed`` uint8 samples are dequantized at the bin centre, and both ends come back exactly; with one by noise, which gives
    latents such as the prior draws, and what lies between them looks more like the data; an end may then be off by 1 in single values.

    Shape: x0, x1 ``[N, *shape]``, samples as the model takes them; gives ``[N, steps, *shape]``, the first x0 and the last x1.
    ``context`` is that of both. Raises ValueError for another method, less than 2 steps and what
    :meth:`~fastflow.models.model.Model.encode` refuses.
    """
    check.one_of("method", method, METHODS)
    if steps < 2:
        raise check.error("steps", steps, "2 or more, both ends included")
    if len(x0) != len(x1):
        raise check.error("x1", f"{len(x1)} samples", f"{len(x0)}, as x0")
    mix = _arc if method == "spherical" else _line
    with _evaluating(model):
        seeds = (
            (None, None)
            if seed is None
            else (derive(seed, Stream.EXPLORE, 0), derive(seed, Stream.EXPLORE, 1))
        )
        ends = list(
            zip(
                model.encode(x0, context, seed=seeds[0]),
                model.encode(x1, context, seed=seeds[1]),
                strict=True,
            )
        )
        path = [
            model.decode(tuple(mix(z0, z1, t) for z0, z1 in ends), context)
            for t in torch.linspace(0, 1, steps).tolist()
        ]
    return torch.stack(path, dim=1)


def _line(z0: Tensor, z1: Tensor, t: float) -> Tensor:
    return (1 - t) * z0 + t * z1


def _arc(z0: Tensor, z1: Tensor, t: float) -> Tensor:
    a, b = z0.flatten(1).double(), z1.flatten(1).double()
    cosine = (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))
    angle = cosine.nan_to_num(1.0).clamp(-1, 1).acos()
    straight = angle.sin() < 1e-6  # there the arc is the line, or not defined
    sine = torch.where(straight, 1.0, angle.sin())
    first = torch.where(straight, 1 - t, ((1 - t) * angle).sin() / sine)
    second = torch.where(straight, t, (t * angle).sin() / sine)
    first, second = (w.to(z0.dtype).view(-1, *[1] * (z0.ndim - 1)) for w in (first, second))
    return first * z0 + second * z1


def resample(
    model,
    latents: tuple[Tensor, ...],
    n: int,
    levels: int | None = None,
    temperature: float = 1.0,
    context: Tensor | None = None,
    seed: int = 0,
) -> Tensor:
    """``n`` samples for each one, whose finest ``levels`` latents are drawn anew, given the coarser ones, which stay.

    All but the last are drawn unless ``levels`` says otherwise. What differs between the samples is what the fine latents hold.

    Shape: latents as ``model.encode`` gives them of N samples, best with a ``seed``, so that they are such as the prior draws; gives
    ``[N, n, *shape]``. Raises ValueError for a model of one latent, for ``levels`` that leave none, and for what
    :meth:`~fastflow.models.model.Model.sample` refuses.
    """
    coarse = len(model.latent_shapes()) - 1
    if not coarse:
        raise check.error("model", "one latent", "a multi-scale model, some of whose latents can stay")
    levels = coarse if levels is None else levels
    if not 1 <= levels <= coarse:
        raise check.error("levels", levels, f"1 to {coarse}, so that the last latent stays")
    check.count("n", n)
    kept = [None if i < levels else z.repeat_interleave(n, 0) for i, z in enumerate(latents)]
    context = None if context is None else context.repeat_interleave(n, 0)
    generator = torch.Generator(latents[-1].device).manual_seed(seed)
    with _evaluating(model):
        x = model.sample(n * len(latents[-1]), temperature, context, generator, latents=tuple(kept))
    return x.unflatten(0, (-1, n))


def dequantized(model, x: Tensor, seed: int = 0, draws: int = 8) -> Tensor:
    """What the flow sees of x: the values after the model's dequantization, for several draws of its noise.

    Shape: x uint8 ``[N, *shape]``; gives ``[draws, N, *shape]`` in the model's dtype, after the logit where the model has one.
    Raises ValueError for a model of continuous samples.
    """
    if model.n_bits is None:
        raise check.error("model", "continuous samples", "a model of uint8 samples, which it dequantizes")
    check.count("draws", draws)
    with _evaluating(model):
        return torch.stack(
            [model.dequantize(x, seed=derive(seed, Stream.EXPLORE, k))[0] for k in range(draws)]
        )


def density(
    model, limits: tuple[tuple[float, float], tuple[float, float]], size: int = 400, batch_size: int = 2**16
):
    """A model's density over the plane, and its integral over the limits by the midpoint rule, which is near 1 where both are wide enough.

    Args:
        model: of vectors in two dimensions.
        limits: of the first and of the second dimension.
        size: cells along each; a cell has to be smaller than what the density changes over.

    Gives float64 ``[size, size]`` on the CPU, at the centres of the cells, a row for each value of the second dimension from its lower
    limit up, and a float. Raises ValueError for models of other samples.
    """
    if model.shape != (2,) or model.n_bits is not None:
        raise check.error("model", f"samples of shape {list(model.shape)}", "continuous vectors [N, 2]")
    check.count("size", size)
    like, middle = model.dequantize.like, (torch.arange(size, dtype=torch.float64) + 0.5) / size
    (x, y), cell = (
        (low + (high - low) * middle for low, high in limits),
        math.prod((high - low) / size for low, high in limits),
    )
    points = torch.cartesian_prod(y, x).flip(1).to(like)
    with _evaluating(model):
        values = torch.cat([model.log_prob(part).double().exp().cpu() for part in points.split(batch_size)])
    return values.view(size, size), values.sum().item() * cell


def typicality(scores: Tensor, train_scores: Tensor) -> Tensor:
    r"""How far each sample is from typical: :math:`|s(x) - \bar s|`, of bits/dim and their mean over training samples.

    The test of Nalisnick et al. (arXiv:1906.02994) for single samples: a sample is an outlier where its typicality exceeds a
    quantile of that of held-out data. A high bits/dim alone misses what is simpler than the data, such as constant images, which a flow
    gives *more* density than the data (arXiv:1810.09136).

    Shape: scores ``[N]``, train_scores ``[M]``, bits/dim as :func:`fastflow.trainer.evaluate.evaluate` gives; gives ``[N]``, bits/dim.
    """
    return (scores - train_scores.mean()).abs()


def auroc(scores: Tensor, outlier_scores: Tensor) -> float:
    """The area under the ROC curve: how often an outlier's score ``[M]`` is above a sample's ``[N]``, ties counting half."""
    ordered = scores.sort().values
    below = torch.searchsorted(ordered, outlier_scores.contiguous())
    not_above = torch.searchsorted(ordered, outlier_scores.contiguous(), right=True)
    return ((below + not_above).double().mean() / (2 * len(scores))).item()
