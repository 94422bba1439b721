"""Neural spline flows of vectors."""

from dataclasses import dataclass
from typing import Any, Literal

from torch.distributions import Distribution

from fastflow import validation
from fastflow.models.image_flow import prior_of
from fastflow.models.model import Model
from fastflow.models.options import ModelConfig, takes_fields_of
from fastflow.nn import (
    ElementwiseSpline,
    Flow,
    GaussianPrior,
    IdentityDequantize,
    LULinear,
    MaskedAutoregressive,
    MaskedNetwork,
    Prior,
    ResidualMLP,
    Sequential,
    SplineCoupling,
)


@dataclass(frozen=True)
class NeuralSplineFlowConfig(ModelConfig):
    """Options of :class:`NeuralSplineFlow`, which documents them."""

    features: int = 2
    context_features: int | None = None
    steps: int = 10
    bins: int = 8
    bound: float = 3.0
    hidden: int = 256
    blocks: int = 2
    dropout: float = 0.0
    prior: Literal["gaussian"] | Prior | Distribution = "gaussian"
    reversible: bool = False
    standardize: bool = False
    autoregressive: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        validation.number("dropout", self.dropout, "a number from 0 to below 1", lambda v: 0 <= v < 1)
        if self.reversible and self.dropout:
            expected = "0 for a reversible flow, which runs its networks twice"
            raise validation.argument_error("dropout", self.dropout, expected)


class NeuralSplineFlow(Model):
    r"""Neural spline flow of vectors, with coupling layers, RQ-NSF (C), or autoregressive ones, RQ-NSF (AR).

    Source: Neural Spline Flows, arXiv:1906.04032, section 5.1. A step is a random permutation, a linear map by
    triangular factors, and a coupling with rational-quadratic splines; splines without a network transform the half
    that the coupling passes through. An autoregressive layer transforms all features instead. A last permutation and
    linear map follow. ``log_prob`` is the exact log-density.

    Splines act on ``[-bound, bound]`` and are the identity outside, so data should be standardized:
    ``fastflow.fit(..., standardize=True)``.

    Args:
        features: number of dimensions D. Couplings pass ``D // 2`` of them through. With one dimension, couplings
            depend on the context only; without a context, the splines have no network.
        context_features: number of features of the context, an input of every network; None: no context.
        steps: number of flow steps.
        bins: number of bins of each spline.
        bound: the splines map ``[-bound, bound]`` to itself.
        hidden: number of units of each hidden layer.
        blocks: number of residual blocks per network, see :class:`~fastflow.nn.ResidualMLP`.
        dropout: probability of dropout in the blocks.
        prior: ``"gaussian"``, or a :class:`~fastflow.nn.Prior` or a continuous distribution of torch.distributions of
            shape ``[D]``.
        reversible: recompute activations in backward instead of storing them.
        standardize: standardize samples before the first step, see :meth:`Model.standardize_by`. ``fastflow.fit``
            with ``standardize=True`` adds it.
        autoregressive: :class:`~fastflow.nn.MaskedAutoregressive` layers in place of couplings, with residual
            :class:`~fastflow.nn.MaskedNetwork`. Samples take one pass of each network, as densities do.

    Shape: x ``[N, D]``, context ``[N, context_features]``, or ``[1, context_features]`` for all samples,
    floating point in the model's dtype.
    Raises ValueError for any other argument.

    Example:
        >>> import torch
        >>> from fastflow.models import NeuralSplineFlow
        >>> model = NeuralSplineFlow(features=3, context_features=2, steps=2, hidden=32)
        >>> context = torch.randn(64, 2)
        >>> (-model.log_prob(torch.randn(64, 3), context).mean()).backward()
        >>> points = model.eval().sample(64, context=context)
    """

    @takes_fields_of(NeuralSplineFlowConfig)
    def __init__(self, config: NeuralSplineFlowConfig) -> None:
        layers: list[Flow] = []
        for _ in range(config.steps):
            layers += [_mixing(config.features), *_splines(config)]
        flow = Sequential(*layers, _mixing(config.features), reversible=config.reversible)
        if isinstance(config.prior, (Prior, Distribution)):
            prior = prior_of(config.prior, (config.features,))
        else:
            prior = GaussianPrior((config.features,))
        context_shape = None if config.context_features is None else (config.context_features,)
        super().__init__(
            (config.features,),
            IdentityDequantize(),
            [flow],
            [],
            prior,
            None,
            config.arguments(),
            context_shape,
            config.standardize,
        )


def _mixing(features: int) -> LULinear:
    return LULinear(features, permutation="random" if features > 1 else None)


def _splines(config: NeuralSplineFlowConfig) -> list[Flow]:
    """The coupling or the autoregressive layer of a step."""
    form: dict[str, Any] = {"bins": config.bins, "bound": config.bound}
    kept = config.features // 2
    if config.autoregressive and (kept or config.context_features is not None):
        net = MaskedNetwork(
            config.features,
            MaskedAutoregressive.params_per_feature("spline", **form),
            (config.hidden,) * (1 + config.blocks),
            residual=True,
            context_features=config.context_features,
            dropout=config.dropout,
        )
        return [MaskedAutoregressive(net, "spline", **form)]
    if not kept and config.context_features is None:
        return [ElementwiseSpline(config.features, **form)]
    outputs = (config.features - kept) * SplineCoupling.params_per_element(config.bins)
    net = ResidualMLP(kept, outputs, config.hidden, config.blocks, config.context_features, config.dropout)
    coupling = SplineCoupling(net, **form, factor=config.hidden**-0.5)
    return [coupling, *([ElementwiseSpline(config.features, channels=kept, **form)] if kept else [])]
