"""Gaussian mixture prior."""

import torch
from torch import Tensor, nn

from fastflow import ops, validation
from fastflow.nn.priors.prior import Prior
from fastflow.ops.noise import random_seed


class GaussianMixturePrior(Prior):
    r"""Mixture of K diagonal Gaussians, :math:`p(z) = \sum_k w_k \prod_c N(z_c; \mu_{kc}, e^{2 s_{kc}})`.

    One component is chosen per latent. Its mean and log scale per channel apply at every position.

    Args:
        shape: shape of one latent, ``(C, ...)``.
        means: initial means :math:`\mu`, ``[K, C]``, which distinguish the components. Scales are initialized
            to 1, and all weights are initially equal.
        learned: learn means, log scales and weights; False keeps the initial values.

    Shape: z ``[N, C, ...]``; log_prob ``[N]``, nats.
    Raises ValueError for means or a z of another shape.
    """

    mean: Tensor
    log_scale: Tensor
    logit: Tensor

    def __init__(self, shape: tuple[int, ...], means: Tensor, learned: bool = True) -> None:
        super().__init__(shape)
        validation.boolean("learned", learned)
        if not isinstance(means, Tensor):
            try:
                means = torch.as_tensor(means)
            except (TypeError, ValueError, RuntimeError) as error:
                raise validation.argument_error("means", repr(means), f"a tensor [K, {shape[0]}]") from error
        means = means.to(torch.get_default_dtype())
        if means.ndim != 2 or means.shape[1] != shape[0] or not means.shape[0]:
            raise validation.argument_error(
                "means", validation.shape_of(means), f"[K, {shape[0]}], one mean per component and channel"
            )
        self.learned = learned
        values = {
            "mean": means.clone(),
            "log_scale": torch.zeros_like(means),
            "logit": means.new_zeros(len(means)),
        }
        for name, value in values.items():
            if learned:
                setattr(self, name, nn.Parameter(value))
            else:
                self.register_buffer(name, value)

    @property
    def has_rsample(self) -> bool:
        """True if all parameters are fixed. The choice of a component has no gradient in learned weights."""
        return not self.learned

    def log_prob(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        self.check_latent(z)
        each = [
            ops.gaussian_log_prob(z, mean, log_scale)
            for mean, log_scale in zip(self.mean, self.log_scale, strict=True)
        ]
        return torch.logsumexp(torch.stack(each, dim=1) + self.logit.log_softmax(0), dim=1)

    def sample(
        self,
        n: int,
        like: Tensor,
        temperature: float = 1.0,
        context: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        seed = random_seed(like.device, generator)
        chosen = torch.rand(
            n, generator=generator, device=like.device if generator is None else generator.device
        ).to(self.logit)
        # clamped, because the rounded weights may sum to less than 1
        k = torch.searchsorted(self.logit.softmax(0).cumsum(0), chosen).clamp(max=len(self.logit) - 1)
        columns = [1] * (len(self.shape) - 1)
        terms = (
            v[k].view(n, self.shape[0], *columns).expand(n, *self.shape) for v in (self.mean, self.log_scale)
        )
        return ops.gaussian_sample(
            (n, *self.shape), *terms, seed=seed, temperature=temperature, dtype=like.dtype, device=like.device
        )

    def extra_repr(self) -> str:
        return f"{self.shape}, components={len(self.logit)}, learned={self.learned}"
