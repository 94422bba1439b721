"""A density from any flow and any prior."""

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from fastflow import validation
from fastflow.models.levels import latent_shape
from fastflow.models.model import Model, check_float_context
from fastflow.nn import DistributionPrior, Flow, IdentityDequantize, Prior
from fastflow.nn.networks.context import tiled


class FlowModel(Model):
    r"""Density of continuous samples, :math:`\log p(x \mid c) = \log p_z(f(x; c)) + \log|\det \partial f / \partial x|`.

    Args:
        flow: flow :math:`f` from samples to latents. It receives the context, or its embedding.
        prior: prior of the latents, a :class:`~fastflow.nn.Prior` or any continuous distribution of
            torch.distributions (see :class:`~fastflow.nn.DistributionPrior`). It receives the context itself.
        shape: shape of one sample; None: the shape of one latent, right for flows that keep the shape.
        embedding: network that maps the context to the flow's context; None: the context itself. A call
            computes it once per row of the context, for all samples of that row.
        standardize: standardize samples before the flow, see :meth:`Model.standardize_by`. ``fastflow.fit`` with
            ``standardize=True`` adds it.

    One row of the context is for all samples, or there is one row per sample. With a tuple for ``n``,
    :meth:`sample` and the methods like it draw ``n`` samples for every row. The leading dimensions are then
    ``[*n, N]``, as in torch.distributions.

    Shape: x floating point ``[N, *shape]`` in the model's dtype; context ``[N, ...]`` or ``[1, ...]``, in the
    model's dtype or int64, or None; log_prob ``[N]``, nats.
    Raises ValueError for any other argument, and for a prior of another shape than the flow's latents, if the flow
    runs without a context.

    Example:
        >>> import torch
        >>> from fastflow import nn as fnn
        >>> from fastflow.models import FlowModel
        >>> flow = fnn.Sequential(fnn.ActNorm(4), fnn.InvertibleConv1x1(4), fnn.AffineCoupling(fnn.MLP(2, 4)))
        >>> model = FlowModel(flow, torch.distributions.StudentT(5.0, torch.zeros(4)))
        >>> (-model.log_prob(torch.randn(256, 4)).mean()).backward()
        >>> x, log_prob = model.rsample_and_log_prob(100)
    """

    def __init__(
        self,
        flow: Flow,
        prior: Prior | Distribution,
        *,
        shape: tuple[int, ...] | None = None,
        embedding: nn.Module | None = None,
        standardize: bool = False,
    ) -> None:
        if not isinstance(flow, Flow):
            raise validation.argument_error("flow", type(flow).__name__, "a Flow")
        if not isinstance(prior, (Prior, Distribution)):
            expected = "a fastflow.nn.Prior or a torch.distributions.Distribution"
            raise validation.argument_error("prior", type(prior).__name__, expected)
        if shape is not None:
            validation.sample_shape("shape", shape)
        if embedding is not None and not isinstance(embedding, nn.Module):
            raise validation.argument_error(
                "embedding", type(embedding).__name__, "a torch.nn.Module or None"
            )
        if isinstance(prior, Distribution):
            prior = DistributionPrior(prior)
        dequantize, shape = IdentityDequantize(), tuple(shape or prior.shape)
        try:
            found = latent_shape(flow, shape, dequantize.like)
        except ValueError as error:
            expected = f"a shape that the flow takes ({error})"
            raise validation.argument_error(
                "prior, shape", f"shapes {list(prior.shape)}, {list(shape)}", expected
            ) from error
        if found not in (None, prior.shape):
            got, expected = f"shape {list(prior.shape)}", f"{list(found)}, the shape of the flow's latents"
            raise validation.argument_error("prior", got, expected)
        classes = getattr(prior, "classes", None)
        super().__init__(
            shape,
            dequantize,
            [flow],
            [],
            prior,
            classes,
            None,
            standardize=standardize,
        )
        self.embedding = embedding

    @property
    def flow(self) -> Flow:
        """The flow from samples to latents."""
        return self.flows[0]

    def sample(  # pyright: ignore[reportIncompatibleMethodOverride] # the context is second, see the docstring
        self,
        n: int | tuple[int, ...],
        context: Tensor | None = None,
        *,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
        latents: tuple[Tensor | None, ...] | None = None,
    ) -> Tensor:
        """:meth:`Model.sample`, with the context second."""
        return super().sample(n, temperature, context, generator, latents)

    def _contexts(self, context: Tensor | None, n: int) -> tuple[Tensor | None, Tensor | None]:
        if context is None:
            return None, None
        embedded = context if self.embedding is None else self.embedding(context)
        if embedded.ndim == 0 or embedded.shape[0] != context.shape[0]:
            got, expected = validation.shape_of(embedded), f"[{context.shape[0]}, ...], one row per context"
            raise validation.argument_error("embedding", got, expected)
        return tiled(embedded, n), tiled(context, n)

    def _check_context(self, context: Tensor | None, n: int) -> None:
        if context is not None:
            like = self.dequantize.like
            expected = f"a tensor [{n}, ...] or [1, ...], {like.dtype} or of integers"
            check_float_context(context, n, like, expected)
