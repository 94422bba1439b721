"""Uniform prior."""

import math

import torch
from torch import Tensor

from fastflow import ops, validation
from fastflow.nn.priors.prior import Prior
from fastflow.ops import acc_dtype
from fastflow.ops.noise import random_seed


class UniformPrior(Prior):
    r"""Uniform density on a box, :math:`\log p(z) = -D \log(b - a)` for :math:`a \le z_i \le b`, otherwise -inf.

    ``temperature`` scales the distance of samples from the center of the box.

    Args:
        shape: shape of one latent.
        low, high: bounds a and b of every dimension.

    Shape: z ``[N, *shape]``; log_prob ``[N]``, nats.
    Raises ValueError for a z of another shape, and unless ``low < high`` are finite numbers.

    Example:
        >>> import torch
        >>> from fastflow.nn import UniformPrior
        >>> UniformPrior((2,), -1.0, 1.0).log_prob(torch.tensor([[0.5, -1.0], [0.5, 1.5]]))
        tensor([-1.3863,    -inf])
    """

    has_rsample = True

    def __init__(self, shape: tuple[int, ...], low: float = 0.0, high: float = 1.0) -> None:
        super().__init__(shape)
        validation.number("low", low, "a finite number", math.isfinite)
        validation.number("high", high, f"a finite number above low, {low}", lambda v: low < v < math.inf)
        self.low, self.high = float(low), float(high)

    def log_prob(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        self.check_latent(z)
        z = z.to(acc_dtype(z.dtype))
        inside = ((z >= self.low) & (z <= self.high)).flatten(1).all(1)
        log_density = -math.prod(self.shape) * math.log(self.high - self.low)
        return torch.where(inside, z.new_full((), log_density), -torch.inf)

    def sample(
        self,
        n: int,
        like: Tensor,
        temperature: float = 1.0,
        context: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        dtype = acc_dtype(like.dtype)
        u = ops.uniform_noise(
            (n, *self.shape), random_seed(like.device, generator), dtype=dtype, device=like.device
        )
        center, width = (self.low + self.high) / 2, self.high - self.low
        return (center + temperature * width * (u - 0.5)).to(like.dtype)

    def extra_repr(self) -> str:
        return f"{self.shape}, low={self.low}, high={self.high}"
