"""What a prior over a model's last latent can do."""

from abc import abstractmethod

import torch
from torch import Tensor, nn

from fastflow import check


class Prior(nn.Module):
    """A density over latents ``[N, *shape]``; ``context`` is int64 classes ``[N]`` where it has classes.

    Raises ValueError for a latent of another shape or dtype than a floating point one.
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape = tuple(shape)

    @abstractmethod
    def log_prob(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        """Log-density ``[N]``, nats."""
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
        """``[n, *shape]`` in the dtype and on the device of ``like``; noise is scaled by ``temperature``, seeded from ``generator`` or
        torch's own."""
        raise NotImplementedError(f"{type(self).__name__} has no sample")

    def check_latent(self, z: Tensor) -> None:
        check.floating("z", z)
        check.same_shape("z", z, (z.shape[0], *self.shape), "the prior's shape")

    def extra_repr(self) -> str:
        return f"{self.shape}"
