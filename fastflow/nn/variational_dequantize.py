"""Variational dequantization."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastflow import check, ops
from fastflow.nn.dequantize import LogitDequantize
from fastflow.nn.flow import Flow
from fastflow.ops.noise import random_seed


class VariationalDequantize(LogitDequantize):
    r"""Dequantization by noise that a flow makes from the image (Flow++, arXiv:1902.00275, section 3.1; the UvA tutorial's form).

    Uniform :math:`\epsilon` becomes :math:`u = \sigma(f(\operatorname{logit}(\alpha / 2 + (1 - \alpha) \epsilon); x))`, and
    :math:`y = \operatorname{logit}(\alpha / 2 + (1 - \alpha) (x + u) / 2^n)`. The log-det holds :math:`-\log q(u | x)`, so that its
    expectation bounds the log-probability of x.

    Args:
        flow: f, whose context is the image, scaled to [-1, 1], ``[N, C, H, W]`` as x.
        n_bits, alpha: as :class:`LogitDequantize`'s, of the preset ``"tutorial"``.

    Noise that is given is :math:`\epsilon`. The inverse is that of any dequantization, the floor, and its log_det that of y to x + u:
    without :math:`\log q`, so that the two directions' do not add up to 0.
    Shape: x uint8 ``[N, C, H, W]``, y like x; log_det ``[N]``, nats.
    """

    def __init__(self, flow: Flow, n_bits: int = 8, alpha: float = 1e-5) -> None:
        super().__init__(n_bits, alpha, preset="tutorial")
        self.flow = flow

    def noise(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        r"""u from :math:`\epsilon`, and log|det du/dε| ``[N]``."""
        image = 2 * x.to(noise.dtype) / (2**self.n_bits - 1) - 1
        p = noise * self.scale + self.shift
        v = torch.logit(p)
        log_det = -(p.log() + (-p).log1p()).flatten(1).sum(1) + math.log(self.scale) * math.prod(p.shape[1:])
        v, log_det_flow = self.flow(v, image)
        log_det = log_det + log_det_flow - (F.softplus(v) + F.softplus(-v)).flatten(1).sum(1)
        return torch.sigmoid(v), log_det

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        noise: Tensor | None = None,
        seed: int | Tensor | None = None,
        offset: int = 0,
    ) -> tuple[Tensor, Tensor]:
        if noise is None:
            seed = random_seed(x.device) if seed is None else seed
            noise = ops.uniform_noise(tuple(x.shape), seed, offset, self.like.dtype, x.device)
        elif seed is not None:
            raise check.error("noise, seed", "both", "one of them")
        check.floating("noise", noise)
        check.same_shape("noise", noise, x.shape, "like x")
        u, log_det_noise = self.noise(x, noise)
        y, log_det = super().forward(x, noise=u)
        return y, log_det + log_det_noise

    def centre(self, x: Tensor) -> Tensor:
        noise = torch.full((), 0.5, dtype=self.like.dtype, device=x.device).expand(x.shape)
        return super().forward(x, noise=noise)[0]

    def extra_repr(self) -> str:
        return f"n_bits={self.n_bits}, alpha={self.alpha}"
