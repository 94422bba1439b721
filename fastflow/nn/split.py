"""Split of a multi-scale model: some channels become a latent with its own prior."""

import torch
from torch import Tensor, nn

from fastflow import ops, validation
from fastflow.deprecation import renamed_method
from fastflow.nn.flow import check_channels
from fastflow.nn.mask import check_kept, kept_of
from fastflow.nn.networks.glow_network import ZeroConv2d
from fastflow.nn.priors.gaussian import denormalize, normalize
from fastflow.ops.noise import random_seed


class Split(nn.Module):
    r"""Split off channels, :math:`z = x_b`, with their log-density given the first channels :math:`x_a`.

    Source: RealNVP, arXiv:1605.08803, section 3.6. A layer of multi-scale models. It is not a :class:`Flow`,
    because ``forward`` has three outputs: ``(kept, z, log_prob)``.

    Args:
        num_features: number of channels C; even, unless ``kept`` is given.
        prior: ``"standard"``: :math:`z \sim N(0, 1)`; ``"learned"``:
            :math:`z \sim N(\mu(x_a), e^{2 s(x_a)})`, where a zero-initialized 3x3 convolution computes
            :math:`[\mu, s]` (as in openai/glow), for images only.
        kept: number of channels of :math:`x_a`, or a fraction of them, rounded down; None: half of them.

    Shape: x ``[N, C, H, W]``, with a standard prior any ``[N, C, ...]``; kept ``[N, kept, H, W]``; z
    ``[N, C - kept, H, W]``; log_prob ``[N]``, nats.
    Raises ValueError for another C or prior, and for a ``kept`` that leaves no channels in one part.
    """

    def __init__(self, num_features: int, prior: str = "learned", kept: float | None = None) -> None:
        super().__init__()
        validation.one_of("prior", prior, ("standard", "learned"))
        check_kept("kept", kept)
        if kept is None:
            validation.even_int("num_features", num_features, " of channels")
        validation.positive_int("num_features", num_features)
        self.num_features, self.prior = num_features, prior
        self.kept = num_features // 2 if kept is None else kept_of("kept", kept, num_features)
        split_off = num_features - self.kept
        self.net = ZeroConv2d(self.kept, 2 * split_off) if prior == "learned" else None

    def mean_and_log_scale(self, kept: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Mean and log scale of z given the kept channels, or None for a standard Gaussian."""
        return (None, None) if self.net is None else self.net(kept).chunk(2, dim=1)

    terms = renamed_method("terms", "mean_and_log_scale")

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        check_channels(x, self.num_features)
        # unlike two slices, their gradients are one concatenation, in the layout of x
        kept, z = x.split([self.kept, self.num_features - self.kept], dim=1)
        return kept, z, ops.gaussian_log_prob(z, *self.mean_and_log_scale(kept))

    def inverse(self, kept: Tensor, z: Tensor) -> Tensor:
        """x from its two parts."""
        size = (kept.shape[0], self.num_features - self.kept, *kept.shape[2:])
        validation.same_shape("z", z, size, f"with kept {list(kept.shape)}")
        return torch.cat([kept, z], dim=1)

    def normalize(self, kept: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        r"""Normalized latent :math:`(z - \mu(x_a)) e^{-s(x_a)}`, a standard Gaussian, and its log-det ``[N]``."""
        return normalize(z, *self.mean_and_log_scale(kept))

    def denormalize(self, kept: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """The inverse of :meth:`normalize`."""
        return denormalize(z, *self.mean_and_log_scale(kept))

    def sample(
        self, kept: Tensor, temperature: float = 1.0, generator: torch.Generator | None = None
    ) -> Tensor:
        """Draw z given the kept channels, with noise scaled by ``temperature``, and return x."""
        seed = random_seed(kept.device, generator)
        z = ops.gaussian_sample(
            (kept.shape[0], self.num_features - self.kept, *kept.shape[2:]),
            *self.mean_and_log_scale(kept),
            seed=seed,
            temperature=temperature,
            dtype=kept.dtype,
            device=kept.device,
        )
        return self.inverse(kept, z)

    def extra_repr(self) -> str:
        return f"{self.num_features}, prior={self.prior!r}, kept={self.kept}"
