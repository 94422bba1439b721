"""Base class of priors."""

from abc import abstractmethod

import torch
from torch import Tensor, nn

from fastflow import validation
from fastflow.ops import acc_dtype


class Prior(nn.Module):
    """Base class of priors, the densities of a model's last latent.

    Subclasses implement :meth:`log_prob` and :meth:`sample`. If ``sample`` is differentiable in all their
    parameters, they set ``has_rsample = True``, and models can then draw reparameterized samples.

    Args:
        shape: shape of one latent.

    Shape: z ``[N, *shape]``; context int64 classes ``[N]`` or floating point ``[N, ...]`` for a conditional
    prior, otherwise None.
    Raises ValueError for a z of another shape, or one that is not floating point.
    """

    has_rsample = False

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        validation.sample_shape("shape", shape)
        self.shape = tuple(shape)

    @abstractmethod
    def log_prob(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        """Log-density of z, ``[N]``, nats."""
        raise NotImplementedError(f"{type(self).__name__} has no log_prob")

    @abstractmethod
    def sample(
        self,
        n: int,
        like: Tensor,
        temperature: float = 1.0,
        context: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draw ``n`` latents ``[n, *shape]`` in the dtype and on the device of ``like``.

        Noise is scaled by ``temperature`` and seeded from ``generator``, or from torch's default generator.
        """
        raise NotImplementedError(f"{type(self).__name__} has no sample")

    def normalize(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Normalized latents and the log-det per sample; z itself, unless the prior has a mean and a scale.

        Shape: z ``[N, *shape]``; returns ``[N, *shape]`` and ``[N]``, nats.
        """
        return z, z.new_zeros(z.shape[0], dtype=acc_dtype(z.dtype))

    def denormalize(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The inverse of :meth:`normalize`."""
        return z, z.new_zeros(z.shape[0], dtype=acc_dtype(z.dtype))

    def check_latent(self, z: Tensor) -> None:
        """Raise ValueError unless z is floating point with the shape ``[N, *shape]``."""
        validation.floating_point("z", z)
        validation.same_shape("z", z, (z.shape[0], *self.shape), "the prior's shape")

    def extra_repr(self) -> str:
        return f"{self.shape}"
