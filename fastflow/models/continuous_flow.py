"""Continuous flow of vectors."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor
from torch.distributions import Distribution

from fastflow import validation
from fastflow.models.image_flow import prior_of
from fastflow.models.model import Model
from fastflow.models.options import ModelConfig, takes_fields_of
from fastflow.nn import ConcatSquash, GaussianPrior, IdentityDequantize, NeuralODE, Prior, Sequential


@dataclass(frozen=True)
class ContinuousFlowConfig(ModelConfig):
    """Options of :class:`ContinuousFlow`, which documents them."""

    features: int = 2
    context_features: int | None = None
    blocks: int = 1
    hidden: int = 64
    layers: int = 3
    time: float = 1.0
    trace: Literal["auto", "exact", "hutchinson"] = "auto"
    noise: Literal["rademacher", "gaussian"] = "rademacher"
    adjoint: bool = True
    method: str = "dopri5"
    atol: float = 1e-5
    rtol: float = 1e-5
    step_size: float | None = None
    prior: Literal["gaussian"] | Prior | Distribution = "gaussian"
    standardize: bool = False


class ContinuousFlow(Model):
    r"""Continuous flow of vectors, FFJORD: latents are the solution of a differential equation that starts at the samples.

    Source: FFJORD, arXiv:1810.01367. The field is a :class:`~fastflow.nn.ConcatSquash`. ``log_prob`` is as exact as the
    solver, and with ``trace="hutchinson"`` an unbiased estimate. torchdiffeq solves: ``pip install fastflow-torch[ode]``.

    Args:
        features: number of dimensions D.
        context_features: number of features of the context, an input of the field; None: no context.
        blocks: number of :class:`~fastflow.nn.NeuralODE` layers, one after the other.
        hidden: number of units of each hidden layer.
        layers: number of hidden layers.
        time, trace, noise, adjoint, method, atol, rtol, step_size: see :class:`~fastflow.nn.NeuralODE`.
        prior: ``"gaussian"``, or a :class:`~fastflow.nn.Prior` or a continuous distribution of torch.distributions of
            shape ``[D]``.
        standardize: standardize samples before the first block, see :meth:`Model.standardize_by`. ``fastflow.fit``
            with ``standardize=True`` adds it.

    Shape: x ``[N, D]``, context ``[N, context_features]``, or ``[1, context_features]`` for all samples,
    floating point in the model's dtype.
    Raises ValueError for any other argument, and ImportError if torchdiffeq is not installed.

    Example:
        >>> import torch
        >>> from fastflow.models import ContinuousFlow
        >>> model = ContinuousFlow(features=2, hidden=16, layers=1)
        >>> (-model.log_prob(torch.randn(64, 2)).mean()).backward()
        >>> points = model.sample(64)
    """

    @takes_fields_of(ContinuousFlowConfig)
    def __init__(self, config: ContinuousFlowConfig) -> None:
        options = {
            name: getattr(config, name)
            for name in ("time", "trace", "noise", "adjoint", "method", "atol", "rtol", "step_size")
        }
        hidden = (config.hidden,) * config.layers
        blocks = [
            NeuralODE(ConcatSquash(config.features, hidden, config.context_features), **options)
            for _ in range(config.blocks)
        ]
        if isinstance(config.prior, (Prior, Distribution)):
            prior = prior_of(config.prior, (config.features,))
        else:
            prior = GaussianPrior((config.features,))
        context_shape = None if config.context_features is None else (config.context_features,)
        super().__init__(
            (config.features,),
            IdentityDequantize(),
            [Sequential(*blocks, reversible=False)],
            [],
            prior,
            None,
            config.arguments(),
            context_shape,
            config.standardize,
        )

    def evaluations(self) -> int:
        """Number of evaluations of the fields by the last pass, without those of its gradient."""
        return sum(block.evaluations for block in self._blocks())

    def _blocks(self) -> Iterable[NeuralODE]:
        return cast("Iterable[NeuralODE]", self.flows[0])

    def regularized_loss(
        self, x: Tensor, context: Tensor | None = None, kinetic: float = 0.01, jacobian: float = 0.01
    ) -> Tensor:
        r"""Mean of :math:`-\log p(x)` in nats, plus the penalties of the fields times ``kinetic`` and ``jacobian``.

        Source: How to train your neural ODE, arXiv:2002.02798, whose factors are the defaults. Simple fields need fewer
        evaluations. Both penalties are divided by the number of dimensions.

        Shape: a scalar. Raises ValueError for factors that are negative, and for other samples and contexts.
        """
        for name, value in (("kinetic", kinetic), ("jacobian", jacobian)):
            validation.number(name, value, "a number of at least 0", lambda v: 0 <= v < float("inf"))
        y, log_prob = self._dequantize(x, context, None, 0)
        of_flows, of_prior = self._contexts(context, len(y))
        if self.standardize is not None:
            y, log_det = self.standardize(y)
            log_prob = log_prob + log_det
        penalty = torch.zeros_like(log_prob)
        for block in self._blocks():
            y, log_det, by_speed, by_jacobian = block.with_penalties(y, of_flows)
            log_prob = log_prob + log_det
            penalty = penalty + kinetic * by_speed + jacobian * by_jacobian
        log_prob = log_prob + self.prior.log_prob(y, of_prior)
        return (penalty / self.shape[0] - log_prob).mean()
