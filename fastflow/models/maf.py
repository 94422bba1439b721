"""Masked and inverse autoregressive flows of vectors."""

from dataclasses import dataclass
from typing import Any, Literal

from torch.distributions import Distribution

from fastflow import validation
from fastflow.models.image_flow import prior_of
from fastflow.models.model import Model
from fastflow.models.options import ModelConfig, takes_fields_of
from fastflow.nn import (
    BatchNorm,
    Flow,
    IdentityDequantize,
    Inverse,
    MaskedAutoregressive,
    MaskedNetwork,
    Permute,
    Prior,
    Sequential,
)


@dataclass(frozen=True)
class IAFConfig(ModelConfig):
    """Options of :class:`IAF`, which documents them."""

    features: int = 2
    context_features: int | None = None
    steps: int = 5
    hidden: int = 512
    layers: int = 2
    residual: bool = False
    activation: Literal["relu", "tanh", "silu", "elu"] = "relu"
    dropout: float = 0.0
    order: Literal["reverse", "random"] = "reverse"
    scale: Literal["soft_clamp", "tanh", "soft_clip", "sigmoid", "softplus", "exp"] = "soft_clamp"
    prior: Literal["gaussian"] | Prior | Distribution = "gaussian"
    reversible: bool = False
    standardize: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        validation.number("dropout", self.dropout, "a number from 0 to below 1", lambda v: 0 <= v < 1)
        if self.reversible and self.dropout:
            expected = "0 for a reversible flow, which runs its networks twice"
            raise validation.argument_error("dropout", self.dropout, expected)


@dataclass(frozen=True)
class MAFConfig(IAFConfig):
    """Options of :class:`MAF`, which documents them."""

    scale: Literal["soft_clamp", "tanh", "soft_clip", "sigmoid", "softplus", "exp"] = "soft_clip"
    batch_norm: bool = False


def _flow(config: IAFConfig, *, inverse: bool, batch_norm: bool) -> Sequential:
    """Autoregressive layers with permutations between them."""
    layers: list[Flow] = []
    for step in range(config.steps):
        if step and batch_norm:
            layers.append(BatchNorm(config.features))
        if step and config.features > 1:
            layers.append(Permute(config.features, config.order))
        net = MaskedNetwork(
            config.features,
            MaskedAutoregressive.params_per_feature("affine", scale=config.scale),
            (config.hidden,) * (config.layers + config.residual),
            residual=config.residual,
            context_features=config.context_features,
            activation=config.activation,
            dropout=config.dropout,
        )
        layer = MaskedAutoregressive(net, "affine", scale=config.scale)
        layers.append(Inverse(layer) if inverse else layer)
    return Sequential(*layers, reversible=config.reversible)


def _arguments(config: IAFConfig, flow: Sequential) -> dict[str, Any]:
    """Arguments of :class:`Model` for one flow of vectors."""
    shape = (config.features,)
    prior = prior_of(config.prior if isinstance(config.prior, (Prior, Distribution)) else None, shape)
    return {
        "shape": shape,
        "dequantize": IdentityDequantize(),
        "flows": [flow],
        "splits": [],
        "prior": prior,
        "classes": None,
        "config": config.arguments(),
        "context_shape": None if config.context_features is None else (config.context_features,),
        "standardize": config.standardize,
    }


class MAF(Model):
    r"""Masked autoregressive flow (Papamakarios, Pavlakou and Murray, arXiv:1705.07057) of vectors.

    A step is an affine :class:`~fastflow.nn.MaskedAutoregressive` layer; between two steps the features are permuted.
    ``log_prob`` is the exact log-density. Densities take one pass of each network, and so do samples, up to a factor:
    the inverse of a layer computes each unit of its network once.

    Args:
        features: number of dimensions D. With one dimension, the layers depend on the context only.
        context_features: number of features of the context, added to the first layer of every network; None: no
            context.
        steps: number of autoregressive layers.
        hidden: number of units of each hidden layer.
        layers: number of hidden layers per network, or of residual blocks.
        residual: networks with residual blocks, see :class:`~fastflow.nn.MaskedNetwork`.
        activation: activation of the networks.
        dropout: probability of dropout in the networks.
        order: order of the features in the next step: reversed, or a random permutation.
        scale: scale function of the layers, see :class:`~fastflow.nn.MaskedAutoregressive`. With ``"sigmoid"`` and
            ``"softplus"``, the flow does not start as the identity. The default grows slowly to its bounds
            :math:`e^{\pm 5}`: ``"soft_clamp"`` has had densities far too low where the training set has no samples.
        prior: ``"gaussian"``, or a :class:`~fastflow.nn.Prior` or a continuous distribution of torch.distributions of
            shape ``[D]``.
        reversible: recompute activations in backward instead of storing them.
        standardize: standardize samples before the first step, see :meth:`Model.standardize_by`. ``fastflow.fit``
            with ``standardize=True`` adds it.
        batch_norm: batch normalization between the steps, see :class:`~fastflow.nn.BatchNorm`. In training mode, a
            density then depends on the other samples of its batch.

    Shape: x ``[N, D]``, context ``[N, context_features]``, or ``[1, context_features]`` for all samples,
    floating point in the model's dtype.
    Raises ValueError for any other argument.

    Example:
        >>> import torch
        >>> from fastflow.models import MAF
        >>> model = MAF(features=3, context_features=2, steps=2, hidden=32)
        >>> context = torch.randn(64, 2)
        >>> (-model.log_prob(torch.randn(64, 3), context).mean()).backward()
        >>> points = model.eval().sample(64, context=context)
    """

    @takes_fields_of(MAFConfig)
    def __init__(self, config: MAFConfig) -> None:
        flow = _flow(config, inverse=False, batch_norm=config.batch_norm)
        super().__init__(**_arguments(config, flow))


class IAF(Model):
    """Inverse autoregressive flow (Kingma et al., arXiv:1606.04934) of vectors.

    The layers of :class:`MAF` with their directions swapped: a sample and its own density take one pass of each
    network, and the density of a given point takes the one-pass inverse. ``log_prob`` is the exact log-density.

    Args:
        features: number of dimensions D. With one dimension, the layers depend on the context only.
        context_features: number of features of the context, added to the first layer of every network; None: no
            context.
        steps: number of autoregressive layers.
        hidden: number of units of each hidden layer.
        layers: number of hidden layers per network, or of residual blocks.
        residual: networks with residual blocks, see :class:`~fastflow.nn.MaskedNetwork`.
        activation: activation of the networks.
        dropout: probability of dropout in the networks.
        order: order of the features in the next step: reversed, or a random permutation.
        scale: scale function of the layers, see :class:`~fastflow.nn.MaskedAutoregressive`. With ``"sigmoid"`` and
            ``"softplus"``, the flow does not start as the identity.
        prior: ``"gaussian"``, or a :class:`~fastflow.nn.Prior` or a continuous distribution of torch.distributions of
            shape ``[D]``.
        reversible: recompute activations in backward instead of storing them.
        standardize: standardize samples before the first step, see :meth:`Model.standardize_by`. ``fastflow.fit``
            with ``standardize=True`` adds it.

    Shape: x ``[N, D]``, context ``[N, context_features]``, or ``[1, context_features]`` for all samples,
    floating point in the model's dtype.
    Raises ValueError for any other argument.

    Example:
        >>> import torch
        >>> from fastflow.models import IAF
        >>> model = IAF(features=3, steps=2, hidden=32)
        >>> x, log_prob = model.rsample_and_log_prob(64)
        >>> (log_prob + 0.5 * x.square().sum(1)).mean().backward()
    """

    @takes_fields_of(IAFConfig)
    def __init__(self, config: IAFConfig) -> None:
        super().__init__(**_arguments(config, _flow(config, inverse=True, batch_norm=False)))
