"""Variational dequantization."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastflow import ops, validation
from fastflow.nn.dequantize import LogitDequantize
from fastflow.nn.flow import Flow
from fastflow.ops.noise import random_seed


class VariationalDequantize(LogitDequantize):
    r"""Dequantization with noise from a flow conditioned on the image.

    Source: Flow++, arXiv:1902.00275, section 3.1, in the form of the UvA tutorial on image flows.

    Uniform noise :math:`\epsilon` becomes
    :math:`u = \sigma(f(\operatorname{logit}(\alpha / 2 + (1 - \alpha) \epsilon); x))`, and
    :math:`y = \operatorname{logit}(\alpha / 2 + (1 - \alpha) (x + u) / 2^n)`. The log-det includes
    :math:`-\log q(u | x)`, with q the density of u. The model's expected log-density is therefore a lower
    bound of :math:`\log p(x)`.
    The ``noise`` argument of ``forward`` is :math:`\epsilon`.

    The inverse takes the floor, as in every dequantization layer. Its log-det belongs to the map from y to x + u,
    without :math:`\log q`, so the log-dets of the two directions do not sum to 0.

    Args:
        flow: the flow f. Its context is the image scaled to [-1, 1], ``[N, C, H, W]`` like x.
        n_bits, alpha: as in :class:`LogitDequantize` with ``preset="tutorial"``.

    Shape: x uint8 ``[N, C, H, W]``; y like x; log_det ``[N]``, nats.
    Raises ValueError as :class:`LogitDequantize` does, for noise whose shape differs from x, and if both
    noise and a seed are given.
    """

    def __init__(self, flow: Flow, n_bits: int = 8, alpha: float = 1e-5) -> None:
        super().__init__(n_bits, alpha, preset="tutorial")
        if not isinstance(flow, Flow):
            raise validation.argument_error("flow", type(flow).__name__, "a Flow")
        self.flow = flow

    def noise(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        r"""u from :math:`\epsilon`, and :math:`\log|\det \partial u / \partial \epsilon|` ``[N]`` in nats."""
        # half precision would round epsilon to 0 and 1, whose logits are infinite
        p = noise.to(ops.acc_dtype(noise.dtype)) * self.scale + self.shift
        image = 2 * x.to(self.like.dtype) / (2**self.n_bits - 1) - 1
        v = torch.logit(p)
        log_det = -(p.log() + (-p).log1p()).flatten(1).sum(1) + math.log(self.scale) * math.prod(p.shape[1:])
        v, log_det_flow = self.flow(v.to(self.like.dtype), image)
        v = v.to(p.dtype)
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
            dtype = ops.acc_dtype(self.like.dtype)
            noise = ops.uniform_noise(tuple(x.shape), seed, offset, dtype, x.device)
        elif seed is not None:
            raise validation.argument_error("noise, seed", "both", "one of them")
        validation.floating_point("noise", noise)
        validation.same_shape("noise", noise, x.shape, "like x")
        u, log_det_noise = self.noise(x, noise)
        y, log_det = super().forward(x, noise=u)
        return y.to(self.like.dtype), log_det + log_det_noise

    def bin_center(self, x: Tensor) -> Tensor:
        """y at the center of each bin; the flow is not used."""
        noise = torch.full((), 0.5, dtype=self.like.dtype, device=x.device).expand(x.shape)
        return super().forward(x, noise=noise)[0]

    def extra_repr(self) -> str:
        return f"n_bits={self.n_bits}, alpha={self.alpha}"
