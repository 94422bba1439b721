"""A model of vectors with the steps of Glow."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch.distributions import Distribution

from fastflow import validation
from fastflow.models.image_flow import prior_of
from fastflow.models.model import Model
from fastflow.models.options import ModelConfig, takes_fields_of
from fastflow.nn import (
    MLP,
    ActNorm,
    AffineCoupling,
    GaussianMixturePrior,
    GaussianPrior,
    IdentityDequantize,
    InvertibleConv1x1,
    Prior,
    Sequential,
)


@dataclass(frozen=True)
class VectorGlowConfig(ModelConfig):
    """Options of :class:`VectorGlow`, which documents them."""

    features: int = 2
    steps: int = 10
    hidden: int = 64
    layers: int = 2
    prior: Literal["gaussian", "mixture"] | Prior | Distribution = "gaussian"
    components: int = 2
    reversible: bool = True
    context_features: int | None = None
    standardize: bool = False
    scale: Literal["soft_clamp", "tanh", "sigmoid", "exp"] = "soft_clamp"
    alternate: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.features == 1 and self.context_features is None:
            raise validation.argument_error(
                "features", 1, "2 or more, or context_features for couplings to read"
            )


class VectorGlow(Model):
    """Glow steps (arXiv:1807.03039) on vectors: ActNorm, a mixing matrix, and an affine coupling with an MLP.

    The defaults are the two-moons flow of exercises on Glow: ten steps in two dimensions. ``log_prob`` is the
    exact log-density.

    Args:
        features: number of dimensions D. Couplings pass ``D // 2`` of them through and transform the others; a
            single one needs ``context_features``.
        steps: number of flow steps.
        hidden: number of units of each hidden layer.
        layers: number of hidden layers per coupling network.
        prior: ``"gaussian"``, or ``"mixture"``: a learned mixture of Gaussians. The means start in random
            directions (torch's generator) around 0, at a root mean square distance of 2. Or a
            :class:`~fastflow.nn.Prior` or a continuous distribution of torch.distributions of shape ``[D]``.
        components: number of Gaussians in the mixture.
        reversible: recompute activations in backward instead of storing them.
        context_features: number of features of the context, an input of every coupling network; None: no
            context.
        standardize: standardize samples before the first step, see :meth:`Model.standardize_by`. ``fastflow.fit``
            with ``standardize=True`` adds it.
        scale: scale function of the couplings, see :func:`fastflow.ops.affine_coupling`.
        alternate: every other coupling passes the last dimensions through instead of the first.

    Shape: x ``[N, D]``, context ``[N, context_features]``, or ``[1, context_features]`` for all samples,
    floating point in the model's dtype.
    Raises ValueError for any other argument.

    Example:
        >>> import torch
        >>> from fastflow.models import VectorGlow
        >>> model = VectorGlow(features=2)
        >>> (-model.log_prob(torch.randn(256, 2)).mean()).backward()
        >>> points = model.eval().sample(100)
    """

    @takes_fields_of(VectorGlowConfig)
    def __init__(self, config: VectorGlowConfig) -> None:
        features = config.features
        kept = features // 2
        transformed = features - kept
        layers = []
        for step in range(config.steps):
            layers += [ActNorm(features), InvertibleConv1x1(features)]
            net = MLP(kept, 2 * transformed, config.hidden, config.layers, config.context_features)
            form = {"scale": config.scale, "swap_halves": config.alternate and step % 2 == 1}
            layers.append(AffineCoupling(net, num_scale_factors=transformed, **form))
        if isinstance(config.prior, (Prior, Distribution)):
            prior = prior_of(config.prior, (features,))
        elif config.prior == "gaussian":
            prior = GaussianPrior((features,))
        else:
            prior = GaussianMixturePrior((features,), _means(config.components, features))
        flow = Sequential(*layers, reversible=config.reversible)
        context_shape = None if config.context_features is None else (config.context_features,)
        super().__init__(
            (features,),
            IdentityDequantize(),
            [flow],
            [],
            prior,
            None,
            config.arguments(),
            context_shape,
            config.standardize,
        )


def _means(components: int, features: int) -> torch.Tensor:
    """Initial means around 0, where ActNorm centers the data; means on one side lead to a poor optimum."""
    means = torch.randn(components, features)
    means = means - means.mean(0)
    return 2 * means / means.norm(dim=1).square().mean().sqrt().clamp_min(torch.finfo(means.dtype).tiny)
