"""Fits a model to samples in memory: early stopping on held-out samples, and the best weights kept."""

import copy
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from fastflow import validation as checks
from fastflow.models.model import Model
from fastflow.progress_bar import ProgressBar

CLIP = 5.0  # largest norm of a gradient
MAX_EPOCHS = 2**31 - 1


@dataclass
class FitHistory:
    """Result of :func:`fit`: mean log-densities per sample in nats, after each epoch."""

    train: list[float] = field(default_factory=list)
    """Mean over the batches of each epoch, while weights move."""
    validation: list[float] = field(default_factory=list)
    """Mean over the held-out samples after each epoch."""
    best_epoch: int = -1
    """Index of the epoch whose weights the model has now; -1 for those it had before."""
    seconds: float = 0.0

    @property
    def best(self) -> float:
        """The held-out log-density of the weights that were kept."""
        return math.nan if self.best_epoch < 0 else self.validation[self.best_epoch]

    def __str__(self) -> str:
        return (
            f"{len(self.validation)} epochs, {self.seconds:.1f} s; best epoch {self.best_epoch + 1}: "
            f"held-out log-density {self.best:.4f} nats"
        )


def fit(
    model: Model,
    x: Tensor | np.ndarray,
    context: Tensor | np.ndarray | None = None,
    *,
    validation: float = 0.1,
    batch_size: int = 512,
    lr: float = 1e-3,
    patience: int = 20,
    max_epochs: int | None = None,
    device: torch.device | str | None = None,
    seed: int = 0,
    progress: bool = True,
    standardize: bool = False,
    schedule: str = "constant",
    gamma: float = 0.99,
) -> FitHistory:
    """Fits ``model`` to samples by maximum likelihood, until held-out samples no longer become likelier.

    Adam with gradients clipped to norm 5. Each epoch passes over the shuffled training samples once and then
    measures the mean log-density of the held-out samples. After ``patience`` epochs without a new best, or
    after ``max_epochs``, training stops. The model then has its best weights and is in eval mode, also after
    an interruption by Ctrl-C. The same seed on the same machine gives the same model; the state of torch's
    default generators is left as it was.

    Args:
        model: model of continuous samples or of uint8 images; it moves to ``device``.
        x: samples ``[N, *model.shape]``. Floating point converts to the model's dtype.
        context: context of the samples ``[N, ...]``, or None.
        validation: share of the samples that is held out, at least one.
        batch_size: samples per step.
        lr: learning rate.
        patience: epochs without a new best after which training stops.
        max_epochs: largest number of epochs; None: no limit.
        device: device of model and batches; None: the model's.
        seed: seed of the split, the batches, the noise of dequantization and dropout.
        progress: show a progress bar after two seconds, on a terminal or in a notebook, if tqdm is installed.
        standardize: standardize x, and a context of vectors if the model's flows take it, by the mean and the
            deviation of each feature over the training samples. It becomes a part of the model
            (:meth:`~fastflow.models.Model.standardize_by`), of which samples and log-densities stay those
            of x as given.
        schedule: learning rate after each epoch: ``"constant"``, ``"exponential"`` (multiplied by ``gamma``) or
            ``"cosine"`` (decays to 0 at ``max_epochs``, which must be given).
        gamma: factor of the exponential schedule.

    Raises ValueError for other arguments, and NonFiniteError with the first layer whose output is not finite
    if a loss or a gradient is not finite; the model then has its best weights.

    Example:
        >>> import torch, fastflow
        >>> from fastflow.models import VectorGlow
        >>> x = torch.randn(500, 2) * torch.tensor([1.0, 3.0])
        >>> model = VectorGlow(features=2, steps=2, hidden=8)
        >>> history = fastflow.fit(model, x, max_epochs=3, progress=False)
        >>> len(history.validation)
        3
    """
    _check(model, validation, batch_size, lr, patience, max_epochs)
    checks.boolean("standardize", standardize)
    _check_schedule(schedule, gamma, max_epochs)
    device = torch.device(device) if device is not None else model.dequantize.like.device
    model.to(device)
    samples = _tensors(model, x, context, device)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(samples[0]), generator=generator)
    held_out = max(1, round(validation * len(order)))
    if held_out == len(order):
        raise checks.argument_error("x", f"{len(order)} samples", "at least 2, one to train and one held out")
    held_out, train = order[:held_out], order[held_out:]
    if standardize:
        model.standardize_by(*_rows(samples, train))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=lr)
    scheduler = _scheduler(optimizer, schedule, gamma, max_epochs)
    history, best, started = FitHistory(), _state(model), time.monotonic()
    try:
        with _seeded(seed, device), ProgressBar(max_epochs, "epoch", progress) as bar:
            while len(history.validation) < (max_epochs or MAX_EPOCHS):
                shuffled = train[torch.randperm(len(train), generator=generator)]
                history.train.append(
                    _epoch(model, optimizer, samples, shuffled, batch_size, len(history.train), bar)
                )
                scheduler.step()
                history.validation.append(_log_prob(model, samples, held_out, batch_size))
                epoch, found = len(history.validation) - 1, history.validation[-1]
                if math.isfinite(found) and not found <= history.best:
                    history.best_epoch, best = epoch, _state(model)
                bar.step(f"train {history.train[-1]:.4f}, held out {found:.4f}")
                if epoch - history.best_epoch >= patience:
                    break
    except KeyboardInterrupt:
        pass  # the best weights so far are the result
    finally:
        model.load_state_dict(best)
        model.eval()
        history.seconds = time.monotonic() - started
    return history


def _check(
    model: Model, validation: float, batch_size: int, lr: float, patience: int, max_epochs: int | None
) -> None:
    if not isinstance(model, Model):
        raise checks.argument_error("model", type(model).__name__, "a model of fastflow.models")
    if not 0 < validation < 1:
        raise checks.argument_error("validation", validation, "a share between 0 and 1")
    checks.positive_int("batch_size", batch_size)
    checks.positive_int("patience", patience)
    checks.positive_int("max_epochs", max_epochs, optional=True)
    if not 0 < lr < math.inf:
        raise checks.argument_error("lr", lr, "a positive number")


def _check_schedule(schedule: str, gamma: float, max_epochs: int | None) -> None:
    checks.one_of("schedule", schedule, ("constant", "exponential", "cosine"))
    if not 0 < gamma <= 1:
        raise checks.argument_error("gamma", gamma, "a factor above 0 and at most 1")
    if schedule == "cosine" and max_epochs is None:
        raise checks.argument_error("max_epochs", None, "a number with schedule 'cosine'")


def _scheduler(
    optimizer: torch.optim.Optimizer, schedule: str, gamma: float, max_epochs: int | None
) -> torch.optim.lr_scheduler.LRScheduler:
    """The scheduler of the learning rate, which takes a step after each epoch."""
    if schedule == "cosine" and max_epochs is not None:
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max_epochs)
    return torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma if schedule == "exponential" else 1.0)


def _tensors(
    model: Model, x: Tensor | np.ndarray, context: Tensor | np.ndarray | None, device: torch.device
) -> tuple[Tensor, Tensor | None]:
    like = model.dequantize.like

    def tensor(name: str, values: Tensor | np.ndarray) -> Tensor:
        values = torch.as_tensor(values)
        if values.is_floating_point():
            values = values.to(like.dtype)
            if not values.isfinite().all():
                raise checks.argument_error(name, "inf or NaN", "finite numbers")
        return values.to(device)

    samples = tensor("x", x)
    contexts = None if context is None else tensor("context", context)
    if tuple(samples.shape[1:]) != model.shape:
        expected = f"[N, {', '.join(map(str, model.shape))}]"
        raise checks.argument_error("x", checks.shape_of(samples), expected)
    if contexts is not None and len(contexts) != len(samples):
        expected = f"{len(samples)} rows, one for each sample"
        raise checks.argument_error("context", f"{len(contexts)} rows", expected)
    return samples, contexts


def _epoch(
    model: Model,
    optimizer: torch.optim.Optimizer,
    samples: tuple[Tensor, Tensor | None],
    order: Tensor,
    batch_size: int,
    epoch: int,
    bar: ProgressBar,
) -> float:
    """Mean log-density over the batches of one pass."""
    model.train()
    total, batches = 0.0, order.split(batch_size)
    for step, index in enumerate(batches):
        x, context = _rows(samples, index)
        seed = {"seed": epoch * len(order) + step} if x.dtype == torch.uint8 else {}
        optimizer.zero_grad(set_to_none=True)
        try:
            log_prob = model.log_prob(x, context, **seed).mean()
        except checks.SingularError as error:
            raise _not_finite(epoch, step, str(error)) from None
        (-log_prob).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        value = log_prob.item()
        if not (math.isfinite(value) and norm.isfinite()):
            raise _not_finite(epoch, step, _first_layer(model, x, context))
        optimizer.step()
        total += value * len(index)
        bar.note(f"epoch {epoch + 1}, batch {step + 1} of {len(batches)}, train {value:.4f}")
    return total / len(order)


def _not_finite(epoch: int, step: int, place: str) -> Exception:
    from fastflow.trainer.nonfinite import NonFiniteError

    return NonFiniteError(
        f"epoch {epoch + 1}, batch {step + 1}: a loss, gradient or weight is not usable; {place}"
    )


def _first_layer(model: Model, x: Tensor, context: Tensor | None) -> str:
    from fastflow.trainer.nonfinite import diagnose

    return diagnose(model, x, context, seed=0)


@torch.no_grad()
def _log_prob(model: Model, samples: tuple[Tensor, Tensor | None], order: Tensor, batch_size: int) -> float:
    model.eval()
    total = 0.0
    for i, index in enumerate(order.split(batch_size)):
        x, context = _rows(samples, index)
        seed = {"seed": i} if x.dtype == torch.uint8 else {}
        total += model.log_prob(x, context, **seed).sum().item()
    return total / len(order)


def _rows(samples: tuple[Tensor, Tensor | None], index: Tensor) -> tuple[Tensor, Tensor | None]:
    x, context = samples
    index = index.to(x.device)
    return x[index], None if context is None else context[index]


def _state(model: Model) -> dict[str, Tensor]:
    return copy.deepcopy(model.state_dict())


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed torch's default generators within the block, and restore them after it."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
