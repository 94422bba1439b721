"""A model as a torch.distributions.Distribution."""

import functools
import math
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.distributions import Distribution, constraints

from fastflow import validation

if TYPE_CHECKING:
    from fastflow.models.model import Model


class FlowDistribution(Distribution):
    """Distribution of a model's continuous samples, one per row of the context; made by :meth:`Model.distribution`.

    The distribution reads the model's parameters at every call, and each call computes the embedding of the
    context once. If Pyro is imported, the distribution has Pyro's methods as well, so that ``pyro.sample``
    accepts it.

    Args:
        model: a model of continuous samples.
        context: context of the model, or None.
        validate_args: check values, as in torch.distributions; this synchronizes with a GPU.

    Shape: ``event_shape`` is the shape of one sample; ``batch_shape`` is ``[N]``, the number of rows of the context,
    or ``[]`` without context. Samples ``[*sample_shape, *batch_shape, *event_shape]``; log_prob
    ``[*sample_shape, *batch_shape]``, nats.
    Raises ValueError for a model of uint8 samples, and for a context that the model rejects; ``rsample`` raises it
    for a prior without ``has_rsample``.
    """

    # a class attribute, as every distribution of torch has it
    arg_constraints: dict[str, constraints.Constraint] = {}  # pyright: ignore[reportIncompatibleMethodOverride]

    def __init__(
        self, model: "Model", context: Tensor | None = None, validate_args: bool | None = None
    ) -> None:
        model._check_continuous("distribution")
        model._check_context(context, 1 if context is None else len(context))
        self.model, self.context = model, context
        batch_shape = torch.Size() if context is None else context.shape[:1]
        super().__init__(batch_shape, torch.Size(model.shape), validate_args)

    @property
    def has_rsample(self) -> bool:
        """Whether :meth:`rsample` works: the prior's samples are differentiable in its parameters."""
        return self.model.prior.has_rsample

    @property
    def support(self) -> constraints.Constraint:
        """Real vectors or images."""
        return constraints.independent(constraints.real, len(self.event_shape))

    def expand(self, batch_shape: Sequence[int], _instance: None = None) -> "FlowDistribution":
        """The same distribution with a larger ``batch_shape``; the context is not copied."""
        size = torch.Size(batch_shape)
        try:
            fits = torch.broadcast_shapes(self.batch_shape, size) == size
        except RuntimeError:
            fits = False
        if not fits:
            expected = f"a shape that {list(self.batch_shape)} expands to"
            raise validation.argument_error("batch_shape", list(size), expected)
        expanded = type(self)(self.model, self.context, self._validate_args)
        expanded._batch_shape = size
        return expanded

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Samples without a graph."""
        with torch.inference_mode():
            x = self._draw(sample_shape)
        return x.clone()

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Samples that are differentiable in the model's parameters and in the context."""
        self.model._check_reparameterized("rsample")
        return self._draw(sample_shape)

    def _draw(self, sample_shape: Sequence[int]) -> Tensor:
        shape = self._extended_shape(torch.Size(sample_shape))
        n = math.prod(shape[: len(shape) - len(self.event_shape)])
        return self.model._draw(n, self.context, 1.0, None)[0].view(shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density of values, in nats."""
        if self._validate_args and value.numel():  # torch's check fails for an empty tensor
            self._validate_sample(value)
        shape = torch.broadcast_shapes(value.shape, self.batch_shape + self.event_shape)
        leading = shape[: len(shape) - len(self.event_shape)]
        x = value.expand(shape).reshape(math.prod(leading), *self.event_shape)
        self.model._check_samples(x)
        y, log_det = self.model.dequantize(x)
        return self.model._log_prob_dequantized(y, log_det, self.context).view(leading)


def distribution_class() -> type[FlowDistribution]:
    """:class:`FlowDistribution`, with the methods of Pyro's distributions if Pyro is imported."""
    pyro = sys.modules.get("pyro.distributions.torch_distribution")
    return FlowDistribution if pyro is None else _with_mixin(pyro.TorchDistributionMixin)


@functools.cache
def _with_mixin(mixin: type) -> type[FlowDistribution]:
    class PyroFlowDistribution(FlowDistribution, mixin):
        pass

    return PyroFlowDistribution
