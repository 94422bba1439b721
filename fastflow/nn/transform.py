"""A flow as a torch.distributions transform."""

import math

from torch import Tensor
from torch.distributions import Transform, constraints

from fastflow import validation
from fastflow.nn.flow import Flow
from fastflow.nn.networks.context import tiled


class FlowTransform(Transform):
    r"""The inverse of a flow as a ``torch.distributions.Transform``: from latents z to samples :math:`x = f^{-1}(z)`.

    ``TransformedDistribution(base, FlowTransform(flow))`` has the density of x, and ``FlowTransform(flow).inv`` is
    the flow itself.

    Args:
        flow: a flow that keeps the shape.
        context: context of the flow, ``[N, ...]``, one row per element of the last batch dimension, or
            ``[1, ...]``, one for all; None: no context.
        event_dim: number of dimensions of one sample, 1 for vectors and 3 for images.
        cache_size: 1: keep the last pair and its log-det, so that a density takes one pass; 0: keep nothing.

    Shape: z, x ``[..., *event]``; log_abs_det_jacobian ``[...]``, nats.
    Raises ValueError for any other argument.

    Example:
        >>> import torch
        >>> from torch.distributions import Independent, Normal, TransformedDistribution
        >>> from fastflow import nn as fnn
        >>> base = Independent(Normal(torch.zeros(4), torch.ones(4)), 1)
        >>> x = TransformedDistribution(base, fnn.FlowTransform(fnn.AffineCoupling(fnn.MLP(2, 4)))).sample((8,))
    """

    bijective = True

    def __init__(
        self, flow: Flow, context: Tensor | None = None, *, event_dim: int = 1, cache_size: int = 1
    ) -> None:
        if not isinstance(flow, Flow):
            raise validation.argument_error("flow", type(flow).__name__, "a Flow")
        if context is not None and not (isinstance(context, Tensor) and context.ndim):
            raise validation.argument_error("context", repr(context), "a tensor [N, ...] or None")
        validation.positive_int("event_dim", event_dim)
        if cache_size not in (0, 1):
            raise validation.argument_error("cache_size", repr(cache_size), "0 or 1")
        super().__init__(cache_size)
        self.flow, self.context = flow, context
        self.domain = self.codomain = constraints.independent(constraints.real, event_dim)
        self._kept: tuple[Tensor, Tensor, Tensor] | None = None

    def with_cache(self, cache_size: int = 1) -> "FlowTransform":
        """The same transform with another ``cache_size``."""
        if cache_size == self._cache_size:
            return self
        return FlowTransform(self.flow, self.context, event_dim=self.event_dim, cache_size=cache_size)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, FlowTransform)
            and (other.flow, other.event_dim) == (self.flow, self.event_dim)
            and other.context is self.context
        )

    __hash__ = Transform.__hash__

    def _call(self, x: Tensor) -> Tensor:
        return self._run(x, inverse=True)[0]

    def _inverse(self, y: Tensor) -> Tensor:
        return self._run(y, inverse=False)[0]

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Log-det of the flow's inverse at the latent x, whose sample is y."""
        if self._kept is not None and self._kept[0] is x and self._kept[1] is y:
            return self._kept[2]
        return self._run(x, inverse=True)[1]

    def _run(self, value: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        """The other side of a pair, and the log-det of the flow's inverse."""
        leading, event = value.shape[: -self.event_dim], value.shape[-self.event_dim :]
        n = math.prod(leading)
        context = self.context
        if context is not None:
            if context.shape[0] not in (1, *leading[-1:]):
                expected = f"{leading[-1] if leading else 1} rows or one, as the batch of {list(value.shape)}"
                raise validation.argument_error("context", validation.shape_of(context), expected)
            context = tiled(context, n)
        direction = self.flow.inverse if inverse else self.flow
        other, log_det = direction(value.reshape(n, *event), context)
        other = other.reshape(*leading, *other.shape[1:])
        log_det = (log_det if inverse else -log_det).view(leading)
        if self._cache_size:
            self._kept = (value, other, log_det) if inverse else (other, value, log_det)
        return other, log_det
