"""Gaussian priors."""

import torch
from torch import Tensor, nn

from fastflow import ops, validation
from fastflow.deprecation import renamed_method
from fastflow.nn.priors.prior import Prior
from fastflow.ops.noise import random_seed


class GaussianPrior(Prior):
    r"""Diagonal Gaussian, :math:`z_c \sim N(\mu_c, e^{2 s_c})` per channel: standard, learned or per class.

    Source: the learned top prior of openai/glow. Learned means and log scales are initialized to 0, the
    standard Gaussian.

    Args:
        shape: shape of one latent, ``(C, ...)``.
        classes: number of classes K. Each class has its own mean and log scale, and the context is int64
            ``[N]``.
        learned: learn one mean and log scale per channel. With ``classes`` they are always learned.

    Shape: z ``[N, C, ...]``; context int64 ``[N]`` with values in ``[0, K)``, or None; log_prob ``[N]``,
    nats.
    Raises ValueError if ``classes`` is neither None nor a positive integer, for a z of another shape, and
    with ``classes`` for a context that is not int64 ``[N]``.
    """

    has_rsample = True

    def __init__(self, shape: tuple[int, ...], classes: int | None = None, learned: bool = False) -> None:
        super().__init__(shape)
        validation.positive_int("classes", classes, optional=True)
        validation.boolean("learned", learned)
        self.classes, self.learned = classes, learned or classes is not None
        if self.learned:
            size = (shape[0],) if classes is None else (classes, shape[0])
            self.mean = nn.Parameter(torch.zeros(size))
            self.log_scale = nn.Parameter(torch.zeros(size))

    def mean_and_log_scale(self, n: int, context: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Mean and log scale for :func:`fastflow.ops.gaussian_log_prob`; None for the standard Gaussian."""
        if not self.learned:
            return None, None
        if self.classes is None:
            return self.mean, self.log_scale
        if context is None or context.dtype != torch.int64 or tuple(context.shape) != (n,):
            got = "None" if context is None else f"{context.dtype} of {validation.shape_of(context)}"
            raise validation.argument_error("context", got, f"int64 classes [{n}] in [0, {self.classes})")
        columns = [1] * (len(self.shape) - 1)
        return tuple(
            v[context].view(n, self.shape[0], *columns).expand(n, *self.shape)
            for v in (self.mean, self.log_scale)
        )

    terms = renamed_method("terms", "mean_and_log_scale")

    def log_prob(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        self.check_latent(z)
        return ops.gaussian_log_prob(z, *self.mean_and_log_scale(z.shape[0], context))

    def sample(
        self,
        n: int,
        like: Tensor,
        temperature: float = 1.0,
        context: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        seed = random_seed(like.device, generator)
        return ops.gaussian_sample(
            (n, *self.shape),
            *self.mean_and_log_scale(n, context),
            seed=seed,
            temperature=temperature,
            dtype=like.dtype,
            device=like.device,
        )

    def extra_repr(self) -> str:
        return f"{self.shape}, classes={self.classes}, learned={self.learned}"
