"""Analysis of trained models: interpolation, resampling, dequantization, densities, outlier scores, distillation, fits to densities."""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from fastflow import validation
from fastflow.models.model import Model, in_mode
from fastflow.progress_bar import ProgressBar
from fastflow.seeds import Stream, derive

Method = Literal["linear", "spherical"]
METHODS = get_args(Method)


@torch.no_grad()
def interpolate(
    model: Model,
    x0: Tensor,
    x1: Tensor,
    steps: int = 8,
    context: Tensor | None = None,
    method: Method = "linear",
    seed: int | None = None,
    normalized: bool = True,
) -> Tensor:
    r"""Samples on a path from x0 to x1.

    Their latents are :math:`(1 - t) z_0 + t z_1`, t from 0 to 1, with :math:`z_0` and :math:`z_1` the latents
    of x0 and x1.
    ``method="spherical"`` uses :math:`[\sin((1 - t) \Omega) z_0 + \sin(t \Omega) z_1] / \sin \Omega` instead
    (arXiv:1609.04468). Each level has its own angle :math:`\Omega` between :math:`z_0` and :math:`z_1`.
    The linear midpoint of two draws from a Gaussian has about :math:`1 / \sqrt 2` of their norm; the
    spherical midpoint has about their norm.

    The latents are normalized by default, see :meth:`~fastflow.models.Model.encode`. The mean and the
    scale of a learned split then belong to the coarser latents at t; raw latents mix those of both ends.

    Args:
        model: model of the samples.
        x0, x1: first and last sample of each path.
        steps: number of samples per path, including x0 and x1.
        context: classes of the samples for a class-conditional model.
        method: ``"linear"`` or ``"spherical"``.
        seed: seed of the dequantization noise of uint8 samples. With noise, latents are distributed as in
            training, and intermediate samples look more like the data. Single values of x0 and x1 may then
            differ by 1. None: dequantize at bin centers; x0 and x1 are recovered, with the
            exceptions in docs/index.md.
        normalized: mix normalized latents; False: raw latents.

    Shape: x0, x1 ``[N, *shape]``; returns ``[N, steps, *shape]``.
    Raises ValueError for another method, for fewer than 2 steps, and for samples that
    :meth:`~fastflow.models.Model.encode` rejects.
    """
    validation.one_of("method", method, METHODS)
    if steps < 2:
        raise validation.argument_error("steps", steps, "2 or more, including both ends")
    if len(x0) != len(x1):
        raise validation.argument_error("x1", f"{len(x1)} samples", f"{len(x0)}, like x0")
    mix = _arc if method == "spherical" else _line
    with in_mode(model, training=False):
        seeds = (
            (None, None)
            if seed is None
            else (derive(seed, Stream.EXPLORE, 0), derive(seed, Stream.EXPLORE, 1))
        )
        ends = list(
            zip(
                model.encode(x0, context, seed=seeds[0], normalized=normalized),
                model.encode(x1, context, seed=seeds[1], normalized=normalized),
                strict=True,
            )
        )
        path = [
            model.decode(tuple(mix(z0, z1, t) for z0, z1 in ends), context, normalized=normalized)
            for t in torch.linspace(0, 1, steps).tolist()
        ]
    return torch.stack(path, dim=1)


def _line(z0: Tensor, z1: Tensor, t: float) -> Tensor:
    return (1 - t) * z0 + t * z1


def _arc(z0: Tensor, z1: Tensor, t: float) -> Tensor:
    a, b = z0.flatten(1).double(), z1.flatten(1).double()
    cosine = (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))
    angle = cosine.nan_to_num(1.0).clamp(-1, 1).acos()
    straight = angle.sin() < 1e-6  # the arc is a line, or undefined
    sine = torch.where(straight, 1.0, angle.sin())
    first = torch.where(straight, 1 - t, ((1 - t) * angle).sin() / sine)
    second = torch.where(straight, t, (t * angle).sin() / sine)
    first, second = (w.to(z0.dtype).view(-1, *[1] * (z0.ndim - 1)) for w in (first, second))
    return first * z0 + second * z1


@torch.no_grad()
def vary(
    model: Model,
    x: Tensor,
    level: int,
    dimension: int | tuple[int, ...],
    values: Sequence[float] | Tensor,
    context: Tensor | None = None,
    seed: int | None = None,
) -> Tensor:
    """Samples that differ from x in one dimension of one normalized latent.

    A value of 0 is the mean of the dimension, and 1 is one standard deviation from it, for a Gaussian prior.

    Args:
        model: model of the samples.
        x: samples.
        level: index of the latent in the order of ``model.encode``: 0 is the finest, -1 the coarsest.
        dimension: index of the dimension, ``(channel, row, column)``, or one number into the flattened latent.
        values: values of the dimension.
        context: context of the samples.
        seed: seed of the dequantization noise of uint8 samples; None: bin centers.

    Shape: x ``[N, *shape]``; values ``[M]``; returns ``[N, M, *shape]``.
    Raises ValueError for a level or a dimension that the model does not have, and for values that are not a
    vector of finite numbers.
    """
    shapes = model.latent_shapes()
    if isinstance(level, bool) or not isinstance(level, int) or not -len(shapes) <= level < len(shapes):
        raise validation.argument_error("level", level, f"an index of {len(shapes)} latents")
    index = _flat_index(dimension, shapes[level])
    values = torch.as_tensor(values)
    if values.ndim != 1 or not values.isfinite().all():
        got = validation.shape_of(values) if values.ndim != 1 else "inf or NaN"
        raise validation.argument_error("values", got, "finite numbers [M]")
    with in_mode(model, training=False):
        seed = None if seed is None else derive(seed, Stream.EXPLORE, 0)
        latents = list(model.encode(x, context, seed=seed, normalized=True))
        varied = latents[level]
        rows = []
        for value in values.tolist():
            latents[level] = varied.flatten(1).clone()
            latents[level][:, index] = value
            latents[level] = latents[level].view_as(varied)
            rows.append(model.decode(tuple(latents), context, normalized=True))
    return torch.stack(rows, dim=1) if rows else x.new_empty(len(x), 0, *model.shape)


def _flat_index(dimension: int | tuple[int, ...], shape: tuple[int, ...]) -> int:
    """Index into a flattened latent of the given shape."""
    sizes = (math.prod(shape),) if isinstance(dimension, int) else shape
    indices = (dimension,) if isinstance(dimension, int) else tuple(dimension)
    if len(indices) != len(sizes) or not all(
        isinstance(i, int) and -size <= i < size for i, size in zip(indices, sizes, strict=True)
    ):
        raise validation.argument_error(
            "dimension", dimension, f"an index of a latent of shape {list(shape)}"
        )
    flat = 0
    for i, size in zip(indices, sizes, strict=True):
        flat = flat * size + i % size
    return flat


@torch.no_grad()
def resample(
    model: Model,
    latents: tuple[Tensor, ...],
    n: int,
    levels: int | None = None,
    temperature: float = 1.0,
    context: Tensor | None = None,
    seed: int = 0,
) -> Tensor:
    """Draw the finest latents of each sample again, given its coarser latents.

    Args:
        model: a multi-scale model.
        latents: latents of N samples from ``model.encode``, preferably with a ``seed``, which gives latents
            distributed as in training.
        n: number of new samples per sample.
        levels: number of latents to draw, from the finest; None: all except the last latent.
        temperature: factor of the noise of the drawn latents.
        context: classes ``[N]`` of the samples for a class-conditional model.
        seed: seed of the noise.

    Shape: returns ``[N, n, *shape]``.
    Raises ValueError for a model with one latent, for ``levels`` that keep no latent, and for latents that
    :meth:`~fastflow.models.Model.sample` rejects.
    """
    coarse = len(model.latent_shapes()) - 1
    if not coarse:
        raise validation.argument_error(
            "model", "one latent", "a multi-scale model, so that coarse latents are kept"
        )
    levels = coarse if levels is None else levels
    if not 1 <= levels <= coarse:
        raise validation.argument_error("levels", levels, f"1 to {coarse}, so that the last latent is kept")
    validation.positive_int("n", n)
    kept = [None if i < levels else z.repeat_interleave(n, 0) for i, z in enumerate(latents)]
    context = None if context is None else context.repeat_interleave(n, 0)
    generator = torch.Generator(latents[-1].device).manual_seed(seed)
    with in_mode(model, training=False):
        x = model.sample(
            n * len(latents[-1]),
            temperature=temperature,
            context=context,
            generator=generator,
            latents=tuple(kept),
        )
    return x.unflatten(0, (-1, n))


@torch.no_grad()
def dequantized(model: Model, x: Tensor, seed: int = 0, draws: int = 8) -> Tensor:
    """Dequantized x, the input of the model's first flow, for several draws of the noise.

    Args:
        model: a model of uint8 samples.
        x: samples.
        seed: seed of the noise.
        draws: number of draws.

    Shape: x uint8 ``[N, *shape]``; returns ``[draws, N, *shape]`` in the model's dtype, after the logit if
    the model has one.
    Raises ValueError for a model of continuous samples.
    """
    if model.n_bits is None:
        raise validation.argument_error(
            "model", "continuous samples", "a model of uint8 samples, which it dequantizes"
        )
    validation.positive_int("draws", draws)
    with in_mode(model, training=False):
        return torch.stack(
            [model.dequantize(x, seed=derive(seed, Stream.EXPLORE, k))[0] for k in range(draws)]
        )


@torch.no_grad()
def density(
    model: Model,
    limits: tuple[tuple[float, float], tuple[float, float]],
    size: int = 400,
    batch_size: int = 2**16,
    context: Tensor | None = None,
) -> tuple[Tensor, float]:
    """Density of a two-dimensional model on a grid, and its integral over the grid by the midpoint rule.

    The integral is near 1 if the limits contain nearly all of the density, and if cells are smaller than the
    scale on which the density varies.

    Args:
        model: a model of continuous vectors with two dimensions.
        limits: ``(low, high)`` of the first and of the second dimension.
        size: number of cells per dimension.
        batch_size: number of points per call of the model.
        context: one context ``[1, ...]`` of a conditional model.

    Shape: returns float64 ``[size, size]`` on the CPU, densities at the centers of the cells, where row i is
    the i-th value of the second dimension; and the integral.
    Raises ValueError for a model of other samples.
    """
    if model.shape != (2,) or model.n_bits is not None:
        raise validation.argument_error(
            "model", f"samples of shape {list(model.shape)}", "continuous vectors [N, 2]"
        )
    validation.positive_int("size", size)
    like, middle = model.dequantize.like, (torch.arange(size, dtype=torch.float64) + 0.5) / size
    (x, y), cell = (
        (low + (high - low) * middle for low, high in limits),
        math.prod((high - low) / size for low, high in limits),
    )
    points = torch.cartesian_prod(y, x).flip(1).to(like)
    with in_mode(model, training=False):
        values = torch.cat(
            [model.log_prob(part, context).double().exp().cpu() for part in points.split(batch_size)]
        )
    return values.view(size, size), values.sum().item() * cell


def distill(
    teacher: Model,
    student: Model,
    steps: int = 2000,
    *,
    batch_size: int = 512,
    lr: float = 1e-3,
    context: Tensor | None = None,
    seed: int = 0,
    progress: bool = True,
) -> list[float]:
    r"""Trains a student to the density of a teacher, by the reverse KL divergence of samples of the student.

    Source: Parallel WaveNet, arXiv:1711.10433, section 4. Each step estimates
    :math:`\mathrm{KL}(q \| p) = E_{x \sim q} [\log q(x) - \log p(x)]` from a batch of samples of the student q. Adam
    with gradients clipped to norm 5; the learning rate decays to 0 by a cosine. Samples of data are not used.

    A flow with fast samples suits the student, such as :class:`~fastflow.models.IAF`, and one with fast densities the
    teacher, such as :class:`~fastflow.models.MAF`. The reverse KL is large where the student has mass and the teacher has
    none, and hardly grows if the student lacks a mode: compare both directions of :func:`kl_divergence`.

    Args:
        teacher: model p of continuous samples; it stays as it is.
        student: model q of samples of the same shape; it is trained in place, and is in eval mode afterwards.
        steps: number of steps.
        batch_size: samples per step.
        lr: learning rate of the first step.
        context: contexts ``[M, ...]``, one of which is drawn for each sample; None: no context.
        seed: seed of the samples.
        progress: show a progress bar after two seconds, on a terminal or in a notebook, if tqdm is installed.

    Returns the estimate of the divergence of each step, nats.
    Raises ValueError for other arguments, for models of different shapes or of uint8 samples, and if an estimate is not
    finite.
    """
    _check_pair(teacher, student)
    validation.boolean("progress", progress)
    teacher = copy.deepcopy(teacher).eval().requires_grad_(False)

    def target(x: Tensor, given: Tensor | None, step: int) -> Tensor:
        return teacher.log_prob(x, given)

    return _fit_by_samples(student, target, steps, batch_size, lr, context, seed, progress)


@dataclass(frozen=True)
class DensityFit:
    """What :func:`fit_density` found."""

    divergences: list[float]
    r"""Estimate of :math:`E_q [\log q - \log \tilde p]` of each step, nats: the divergence less :math:`\log Z`."""
    log_normalizer: float
    r"""Estimate of :math:`\log Z = \log \int \tilde p(x) dx` by importance sampling."""
    effective_share: float
    """Effective sample size of the importance weights, divided by the number of samples; 1 if the densities are equal."""
    samples: Tensor
    """Samples of the model, ``[n, *shape]``."""
    log_weights: Tensor
    r"""Log-weights :math:`\log \tilde p(x) - \log q(x)` of the samples, less their log-sum, so the weights add to 1."""

    def __str__(self) -> str:
        return (
            f"log Z {self.log_normalizer:.4f}; effective sample size {100 * self.effective_share:.1f}% of "
            f"{len(self.samples):,} samples"
        )


def fit_density(
    model: Model,
    log_density: Callable[[Tensor], Tensor],
    steps: int = 2000,
    *,
    batch_size: int = 512,
    lr: float = 1e-3,
    temperature: float = 1.0,
    n: int = 10_000,
    seed: int = 0,
    progress: bool = True,
) -> DensityFit:
    r"""Trains a model to a density that can be evaluated, up to a factor, but not sampled.

    Source: Understanding Deep Learning, section 16.5.3. Each step lowers the reverse KL divergence
    :math:`\mathrm{KL}(q \| p) = E_{x \sim q} [\log q(x) - \log \tilde p(x)] + \log Z`, estimated from a batch of samples of
    the model q. Adam with gradients clipped to norm 5; the learning rate decays to 0 by a cosine.

    The reverse KL seeks modes: where q has no samples, nothing tells of a mode of p. A ``temperature`` above 1 flattens
    the target at first, and so does a wide start. The effective sample size does not show a mode that q lacks.

    Args:
        model: model q of continuous samples without a context, trained in place; it is in eval mode afterwards.
            :class:`~fastflow.models.IAF` and coupling flows have fast samples.
        log_density: :math:`\log \tilde p`, a differentiable function of samples ``[N, *shape]``; its values are ``[N]``.
        steps: number of steps.
        batch_size: samples per step.
        lr: learning rate of the first step.
        temperature: T of the first step; the target is :math:`\tilde p^{1/T}`, and T falls linearly to 1 in the first half
            of the steps.
        n: number of samples of the report.
        seed: seed of all samples.
        progress: show a progress bar after two seconds, on a terminal or in a notebook, if tqdm is installed.

    Returns a :class:`DensityFit`, whose samples and weights estimate expectations under p.
    Raises ValueError for other arguments, for a ``log_density`` of another shape, and if a divergence is not finite.
    """
    validation.number("temperature", temperature, "a number of at least 1", lambda v: 1 <= v < math.inf)
    validation.number("n", n, "an integer of 2 or more", lambda v: isinstance(v, int) and v >= 2)
    validation.boolean("progress", progress)
    model._check_continuous("model")

    def target(x: Tensor, given: Tensor | None, step: int) -> Tensor:
        value = log_density(x)
        validation.same_shape("log_density", value, (len(x),), "one value per sample")
        return value / max(1.0, temperature + (1 - temperature) * 2 * step / steps)

    divergences = _fit_by_samples(model, target, steps, batch_size, lr, None, seed, progress)
    generator, samples, log_weights = (
        torch.Generator(model.dequantize.like.device).manual_seed(seed + 1),
        [],
        [],
    )
    with torch.no_grad():
        for start in range(0, n, 2**14):
            x, log_q = model.sample_and_log_prob(min(2**14, n - start), generator=generator)
            samples.append(x)
            log_weights.append((target(x, None, steps) - log_q).double())
    log_weights = torch.cat(log_weights)
    total = log_weights.logsumexp(0)
    log_weights = log_weights - total
    share = math.exp(-(2 * log_weights).logsumexp(0).item()) / n
    return DensityFit(divergences, total.item() - math.log(n), share, torch.cat(samples), log_weights)


def _fit_by_samples(
    model: Model,
    log_density: Callable,
    steps: int,
    batch_size: int,
    lr: float,
    context: Tensor | None,
    seed: int,
    progress: bool,
) -> list[float]:
    """Trains ``model`` by the reverse KL divergence to ``log_density(samples, contexts, step)``."""
    validation.positive_ints(steps=steps, batch_size=batch_size)
    validation.number("lr", lr, "a positive number", lambda v: 0 < v < math.inf)
    generator = torch.Generator(model.dequantize.like.device).manual_seed(seed)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    found = []
    model.eval()
    with ProgressBar(steps, "step", progress) as bar:
        for step in range(steps):
            given = None if context is None else context[_indices(context, batch_size, generator)]
            x, log_q = model.rsample_and_log_prob(batch_size, given, generator=generator)
            divergence = (log_q - log_density(x, given, step)).mean()
            optimizer.zero_grad(set_to_none=True)
            divergence.backward()
            found.append(divergence.item())
            if not math.isfinite(found[-1]):
                raise ValueError(f"divergence of step {step + 1}: got {found[-1]}, expected a finite number")
            torch.nn.utils.clip_grad_norm_(parameters, 5.0)
            optimizer.step()
            schedule.step()
            bar.step(f"{found[-1]:.3f} nats")
    return found


@torch.no_grad()
def kl_divergence(
    p: Model,
    q: Model,
    n: int = 10_000,
    *,
    context: Tensor | None = None,
    seed: int = 0,
    batch_size: int = 2**14,
) -> tuple[float, float]:
    r"""Estimate of :math:`\mathrm{KL}(p \| q) = E_{x \sim p} [\log p(x) - \log q(x)]`, and its standard error, nats.

    Args:
        p: model of continuous samples, whose samples are drawn.
        q: model of samples of the same shape.
        n: number of samples.
        context: contexts ``[M, ...]``, one of which is drawn for each sample; None: no context.
        seed: seed of the samples.
        batch_size: samples per call of the models.

    Raises ValueError for other arguments, and for models of different shapes or of uint8 samples.
    """
    _check_pair(p, q)
    validation.number("n", n, "an integer of 2 or more", lambda v: isinstance(v, int) and v >= 2)
    validation.positive_int("batch_size", batch_size)
    generator, terms = torch.Generator(p.dequantize.like.device).manual_seed(seed), []
    with in_mode(p, training=False), in_mode(q, training=False):
        for start in range(0, n, batch_size):
            count = min(batch_size, n - start)
            given = None if context is None else context[_indices(context, count, generator)]
            x, log_p = p.sample_and_log_prob(count, given, generator=generator)
            terms.append((log_p - q.log_prob(x, given)).double())
    values = torch.cat(terms)
    return values.mean().item(), (values.std() / n**0.5).item()


def _check_pair(first: Model, second: Model) -> None:
    for model in (first, second):
        if not isinstance(model, Model) or model.n_bits is not None:
            got = "uint8 samples" if isinstance(model, Model) else type(model).__name__
            raise validation.argument_error("model", got, "a model of continuous samples")
    if first.shape != second.shape:
        got, expected = f"samples of shape {list(second.shape)}", f"{list(first.shape)}, as the other model"
        raise validation.argument_error("model", got, expected)


def _indices(context: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Random rows of the contexts."""
    return torch.randint(len(context), (count,), generator=generator, device=generator.device).to(
        context.device
    )


def typicality(scores: Tensor, train_scores: Tensor) -> Tensor:
    r"""Distance from the typical set, :math:`|s(x) - \bar s|`: bits/dim, and their mean in training.

    Source: the test of Nalisnick et al. (arXiv:1906.02994) for single samples. A sample is an outlier if its
    typicality exceeds a quantile of the typicality of held-out data. A threshold that uses only bits/dim
    misses samples that are simpler than the data, such as constant images: a flow assigns them *higher*
    density (arXiv:1810.09136).

    Args:
        scores: bits/dim of the samples, see ``fastflow evaluate``.
        train_scores: bits/dim of training samples.

    Shape: scores ``[N]``; train_scores ``[M]``; returns ``[N]``, bits/dim.
    """
    return (scores - train_scores.mean()).abs()


def auroc(scores: Tensor, outlier_scores: Tensor) -> float:
    """Area under the ROC curve: probability that an outlier's score exceeds a sample's; ties count half.

    Shape: scores ``[N]``; outlier_scores ``[M]``.
    """
    ordered = scores.sort().values
    below = torch.searchsorted(ordered, outlier_scores.contiguous())
    not_above = torch.searchsorted(ordered, outlier_scores.contiguous(), right=True)
    return ((below + not_above).double().mean() / (2 * len(scores))).item()
