"""Gaussian priors."""

import torch
from torch import Tensor, nn

from fastflow import ops, validation
from fastflow.deprecation import renamed_method
from fastflow.nn.networks.mlp import MLP
from fastflow.nn.priors.prior import Prior
from fastflow.ops import acc_dtype
from fastflow.ops.noise import random_seed


def normalize(z: Tensor, mean: Tensor | None, log_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    r"""Normalized latents :math:`(z - \mu) e^{-s}` and their log-det per sample, :math:`-\sum s`.

    Shape: z ``[N, C, ...]``; mean and log_scale ``[C]``, like z, or None for a standard Gaussian.
    """
    if mean is None or log_scale is None:
        return z, z.new_zeros(z.shape[0], dtype=acc_dtype(z.dtype))
    mean, log_scale = _like(mean, z), _like(log_scale, z)
    return ((z - mean) * (-log_scale).exp()).to(z.dtype), -log_scale.expand_as(z).flatten(1).sum(1)


def denormalize(z: Tensor, mean: Tensor | None, log_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    r"""The inverse of :func:`normalize`: :math:`\mu + e^s z` and :math:`\sum s`."""
    if mean is None or log_scale is None:
        return z, z.new_zeros(z.shape[0], dtype=acc_dtype(z.dtype))
    mean, log_scale = _like(mean, z), _like(log_scale, z)
    return (mean + z * log_scale.exp()).to(z.dtype), log_scale.expand_as(z).flatten(1).sum(1)


def _like(v: Tensor, z: Tensor) -> Tensor:
    """Values per channel ``[C]`` or per element, in a shape and dtype that operate with z."""
    v = v.to(acc_dtype(z.dtype))
    return v.view(-1, *[1] * (z.ndim - 2)) if v.ndim == 1 else v


class GaussianPrior(Prior):
    r"""Diagonal Gaussian, :math:`z_c \sim N(\mu_c, e^{2 s_c})` per channel: standard, learned, or given the context.

    Source: the learned top prior of openai/glow. Learned means and log scales are initialized to 0, the
    standard Gaussian. Given a floating point context c, :math:`(\mu, s) = W c + b`, or a network with one
    hidden layer.

    Args:
        shape: shape of one latent, ``(C, ...)``.
        classes: number of classes K. Each class has its own mean and log scale, and the context is int64
            ``[N]``.
        learned: learn one mean and log scale per channel. With ``classes`` or ``context_features`` they are
            always learned.
        context_features: number of features of the context, on which mean and log scale depend; None: no such
            context. Excludes ``classes``.
        hidden: number of units of the hidden layer of that network; None: the map is affine.

    Shape: z ``[N, C, ...]``; context int64 ``[N]`` with values in ``[0, K)``, or floating point
    ``[N, context_features]``, or None; log_prob ``[N]``, nats.
    Raises ValueError for other arguments, for a z of another shape, and for another context.

    Example:
        >>> import torch
        >>> from fastflow.nn import GaussianPrior
        >>> prior = GaussianPrior((2,), context_features=3)
        >>> log_prob = prior.log_prob(torch.randn(8, 2), torch.randn(8, 3))
    """

    has_rsample = True

    def __init__(
        self,
        shape: tuple[int, ...],
        classes: int | None = None,
        learned: bool = False,
        context_features: int | None = None,
        hidden: int | None = None,
    ) -> None:
        super().__init__(shape)
        validation.positive_int("classes", classes, optional=True)
        validation.boolean("learned", learned)
        validation.positive_int("context_features", context_features, optional=True)
        validation.positive_int("hidden", hidden, optional=True)
        if context_features is None and hidden is not None:
            raise validation.argument_error("hidden", hidden, "None without context_features")
        if context_features is not None and classes is not None:
            raise validation.argument_error("classes", classes, "None with context_features")
        self.classes, self.context_features, self.hidden = classes, context_features, hidden
        self.learned = learned or classes is not None or context_features is not None
        if context_features is not None:
            self.net = _network(context_features, 2 * shape[0], hidden)
        elif self.learned:
            size = (shape[0],) if classes is None else (classes, shape[0])
            self.mean = nn.Parameter(torch.zeros(size))
            self.log_scale = nn.Parameter(torch.zeros(size))

    def mean_and_log_scale(self, n: int, context: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Mean and log scale for :func:`fastflow.ops.gaussian_log_prob`; None for the standard Gaussian."""
        if not self.learned:
            return None, None
        if self.context_features is not None:
            return self._of_context(n, context)
        if self.classes is None:
            return self.mean, self.log_scale
        if context is None or context.dtype != torch.int64 or tuple(context.shape) != (n,):
            got = "None" if context is None else f"{context.dtype} of {validation.shape_of(context)}"
            raise validation.argument_error("context", got, f"int64 classes [{n}] in [0, {self.classes})")
        return self._at_every_position(self.mean[context]), self._at_every_position(self.log_scale[context])

    def _of_context(self, n: int, context: Tensor | None) -> tuple[Tensor, Tensor]:
        dtype = next(self.net.parameters()).dtype
        expected = f"{dtype} of shape [{n}, {self.context_features}]"
        if context is None:
            raise validation.argument_error("context", "None", expected)
        if tuple(context.shape) != (n, self.context_features):
            raise validation.argument_error("context", validation.shape_of(context), expected)
        if context.dtype != dtype:
            raise validation.argument_error("context", f"dtype {context.dtype}", expected)
        mean, log_scale = self.net(context).chunk(2, dim=1)
        return self._at_every_position(mean), self._at_every_position(log_scale)

    def _at_every_position(self, v: Tensor) -> Tensor:
        """``[N, C]`` at every position of a latent."""
        return v.view(*v.shape, *[1] * (len(self.shape) - 1)).expand(-1, *self.shape)

    terms = renamed_method("terms", "mean_and_log_scale")

    def log_prob(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        self.check_latent(z)
        return ops.gaussian_log_prob(z, *self.mean_and_log_scale(z.shape[0], context))

    def normalize(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self.check_latent(z)
        return normalize(z, *self.mean_and_log_scale(z.shape[0], context))

    def denormalize(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self.check_latent(z)
        return denormalize(z, *self.mean_and_log_scale(z.shape[0], context))

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
        given = "" if self.context_features is None else f", context_features={self.context_features}"
        return f"{self.shape}, classes={self.classes}, learned={self.learned}{given}"


def _network(context_features: int, out_features: int, hidden: int | None) -> nn.Module:
    """A map from the context that is 0 at initialization: affine, or with one hidden layer."""
    if hidden is not None:
        return MLP(context_features, out_features, hidden, layers=1)
    net = nn.Linear(context_features, out_features)
    nn.init.zeros_(net.weight)
    nn.init.zeros_(net.bias)
    return net
