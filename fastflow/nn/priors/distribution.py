"""Any distribution of torch.distributions as a prior."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution, Transform
from torch.distributions.constraints import Constraint

from fastflow import validation
from fastflow.nn.priors.prior import Prior
from fastflow.ops import acc_dtype
from fastflow.ops.noise import random_seed


class DistributionPrior(Prior):
    """A continuous ``torch.distributions.Distribution`` as a prior; its log-density is summed over batch dimensions.

    The shape of one latent is ``batch_shape + event_shape``: ``Normal(torch.zeros(3), torch.ones(3))`` and
    ``MultivariateNormal(torch.zeros(3), torch.eye(3))`` are densities of vectors ``[3]``. Each call computes
    in the dtype and on the device of the latents. Outside the support, the log-density is -inf. A distribution that
    declares no support is taken as continuous, and its log-density as it is. The distribution's tensors are not in
    the state dict. An optimizer trains them only if it is given them.

    Args:
        distribution: the distribution.

    Shape: z ``[N, *batch_shape, *event_shape]``; log_prob ``[N]``, nats.
    Raises ValueError for any other object, for a distribution of scalars and for a discrete one; ``sample``
    raises ValueError for a temperature other than 1, which most distributions do not define.

    Example:
        >>> import torch
        >>> from fastflow.nn import DistributionPrior
        >>> prior = DistributionPrior(torch.distributions.StudentT(5.0, torch.zeros(3)))
        >>> log_prob = prior.log_prob(torch.randn(8, 3))
    """

    def __init__(self, distribution: Distribution) -> None:
        if not isinstance(distribution, Distribution):
            got = type(distribution).__name__
            raise validation.argument_error("distribution", got, "a torch.distributions.Distribution")
        shape = tuple(distribution.batch_shape + distribution.event_shape)
        described = f"{type(distribution).__name__} of shape {list(shape)}"
        if not shape:
            raise validation.argument_error(
                "distribution", described, "a distribution of vectors or images, such as shape [1]"
            )
        if _is_discrete(distribution):
            raise validation.argument_error("distribution", described, "a continuous distribution")
        super().__init__(shape)
        self.distribution = distribution

    @property
    def has_rsample(self) -> bool:
        """Whether ``sample`` is differentiable in the distribution's parameters."""
        return self.distribution.has_rsample

    def log_prob(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        self.check_latent(z)
        z = z.to(acc_dtype(z.dtype))
        distribution = self._like(z)
        log_prob = distribution.log_prob(z).reshape(z.shape[0], -1).sum(1)
        inside = _inside(distribution, z)
        return log_prob if inside is None else torch.where(inside, log_prob, -torch.inf)

    def sample(
        self,
        n: int,
        like: Tensor,
        temperature: float = 1.0,
        context: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        if temperature != 1:
            raise validation.argument_error(
                "temperature", temperature, f"1, with the prior {type(self.distribution).__name__}"
            )
        distribution = self._like(like.new_empty((), dtype=acc_dtype(like.dtype)))
        draw = distribution.rsample if self.has_rsample else distribution.sample
        if generator is None:
            return draw((n,)).to(like.dtype)
        # distributions draw from torch's default generator only
        with torch.random.fork_rng([like.device.index or 0] if like.device.type == "cuda" else []):
            torch.manual_seed(int(random_seed(torch.device("cpu"), generator)))
            return draw((n,)).to(like.dtype)

    def _like(self, z: Tensor) -> Distribution:
        return _mapped(self.distribution, lambda t: t.to(z) if t.is_floating_point() else t.to(z.device))

    def extra_repr(self) -> str:
        return f"{self.distribution}"


def _support(distribution: Distribution) -> Constraint | None:
    try:
        return distribution.support
    except NotImplementedError:  # a distribution need not describe its support
        return None


def _is_discrete(distribution: Distribution) -> bool:
    """Whether it is known to be discrete: one without a support is taken as continuous."""
    support = _support(distribution)
    return support is not None and support.is_discrete


def _inside(distribution: Distribution, z: Tensor) -> Tensor | None:
    """Whether latents are in the support, ``[N]``; None if the distribution does not describe it."""
    support = _support(distribution)
    return None if support is None else support.check(z).reshape(z.shape[0], -1).all(1)


def _mapped(
    value: Any, change: Callable[[Tensor], Tensor], copies: dict[int, Distribution | Transform] | None = None
) -> Any:
    """A copy of a distribution with ``change`` applied to its tensors, also to those of distributions in it.

    ``copies`` are those made already, by the id of the original: a transform and its inverse refer to each other.
    """
    copies = {} if copies is None else copies
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, (Distribution, Transform)):
        if id(value) not in copies:
            changed = copies[id(value)] = copy.copy(value)
            vars(changed).update((name, _mapped(v, change, copies)) for name, v in vars(value).items())
            if isinstance(changed, Distribution):
                changed._validate_args = False  # outside the support the density is 0, and not an error
        return copies[id(value)]
    if isinstance(value, list):
        return [_mapped(v, change, copies) for v in value]
    return value
