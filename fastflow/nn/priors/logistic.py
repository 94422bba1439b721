"""Logistic prior."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastflow import ops
from fastflow.nn.priors.prior import Prior
from fastflow.ops import acc_dtype
from fastflow.ops.noise import random_seed


class LogisticPrior(Prior):
    r"""Standard logistic distribution, :math:`\log p(z) = -\sum_i [\log(1 + e^{z_i}) + \log(1 + e^{-z_i})]`.

    Source: NICE, arXiv:1410.8516, section 3.4. Its standard deviation is :math:`\pi / \sqrt 3`;
    ``temperature`` scales samples.

    Args:
        shape: shape of one latent.

    Shape: z ``[N, *shape]``; log_prob ``[N]``, nats.
    Raises ValueError for a z of another shape.
    """

    has_rsample = True

    def log_prob(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        self.check_latent(z)
        z = z.to(acc_dtype(z.dtype))
        return -(F.softplus(z) + F.softplus(-z)).flatten(1).sum(1)

    def sample(
        self,
        n: int,
        like: Tensor,
        temperature: float = 1.0,
        context: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        # other devices may not support float64
        exact = torch.float64 if like.device.type in ("cpu", "cuda") else torch.float32
        about = {"dtype": exact, "device": like.device}
        high, low = (
            ops.uniform_noise((n, *self.shape), random_seed(like.device, generator), **about) for _ in "ab"
        )
        # 16 bits from each, so that the tails reach as far as with a float32 uniform
        u = high + (low + 2**-17) * 2**-16
        return (temperature * torch.logit(u)).to(like.dtype)
