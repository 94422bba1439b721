"""Gaussian priors over a model's last latent."""

import torch
from torch import Tensor, nn

from fastflow import ops
from fastflow.ops.noise import random_seed


class GaussianPrior(nn.Module):
    """A Gaussian over latents ``[N, C, ...]``: standard, or with a mean and log scale for each class and channel.

    Args:
        shape: of one latent, ``(C, ...)``.
        classes: number of classes; the context is then int64 ``[N]``. All classes start as the standard Gaussian.
    """

    def __init__(self, shape: tuple[int, ...], classes: int | None = None) -> None:
        super().__init__()
        self.shape = tuple(shape)
        self.classes = classes
        if classes is not None:
            self.mean = nn.Parameter(torch.zeros(classes, shape[0]))
            self.log_scale = nn.Parameter(torch.zeros(classes, shape[0]))

    def terms(self, n: int, context: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        if self.classes is None:
            return None, None
        columns = [1] * (len(self.shape) - 1)
        return tuple(v[context].view(n, self.shape[0], *columns).expand(n, *self.shape) for v in (self.mean, self.log_scale))

    def log_prob(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        """Log-density ``[N]``, nats."""
        return ops.gaussian_log_prob(z, *self.terms(z.shape[0], context))

    def sample(self, n: int, like: Tensor, temperature: float = 1.0, context: Tensor | None = None, generator=None) -> Tensor:
        """``[N, C, ...]`` in the dtype and on the device of ``like``; seeded from ``generator`` or torch's own."""
        seed = random_seed(like.device, generator)
        return ops.gaussian_sample(
            (n, *self.shape), *self.terms(n, context), seed=seed, temperature=temperature, dtype=like.dtype, device=like.device
        )

    def extra_repr(self) -> str:
        return f"{self.shape}, classes={self.classes}"
