"""The logistic prior."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastflow import ops
from fastflow.nn.priors.prior import Prior
from fastflow.ops import acc_dtype
from fastflow.ops.noise import random_seed


class LogisticPrior(Prior):
    r"""The standard logistic, :math:`\log p(z) = -\sum \log(1 + e^{z}) + \log(1 + e^{-z})` (NICE, arXiv:1410.8516, section 3.4).

    Args:
        shape: of one latent.

    Its standard deviation is :math:`\pi / \sqrt 3`; ``temperature`` scales the sample.
    """

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
        exact = (
            torch.float64 if like.device.type in ("cpu", "cuda") else torch.float32
        )  # others may have no float64
        about = {"dtype": exact, "device": like.device}
        high, low = (
            ops.uniform_noise((n, *self.shape), random_seed(like.device, generator), **about) for _ in "ab"
        )
        u = high + (low + 2**-17) * 2**-16  # 16 bits of each, so that tails reach as far as a float32's would
        return (temperature * torch.logit(u)).to(like.dtype)
