"""Glow's steps on vectors."""

import torch

from fastflow import check
from fastflow.models.model import Model
from fastflow.nn import (
    MLP,
    ActNorm,
    AffineCoupling,
    Continuous,
    GaussianMixturePrior,
    GaussianPrior,
    InvertibleConv1x1,
    Sequential,
)

PRIORS = ("gaussian", "mixture")


class VectorGlow(Model):
    """Glow's steps (arXiv:1807.03039) on vectors: ActNorm, a mixing matrix, an affine coupling whose network is an MLP.

    The defaults are the two-moons flow of exercises on Glow: ten steps in two dimensions.

    Args:
        features: D, an even number; samples are float vectors ``[N, D]``, in the model's dtype.
        steps: number of steps.
        hidden, layers: width and number of the hidden layers of each coupling network.
        prior: ``"gaussian"``, or ``"mixture"``: a learned mixture of Gaussians, whose means start in random directions (torch's generator)
            around 0, at a distance of 2 on the average.
        components: of the mixture.
        reversible: recompute activations in backward instead of keeping them.

    ``log_prob`` is the density's, exact. Raises ValueError for an argument outside these.

    Example:
        >>> model = VectorGlow(features=2)
        >>> (-model.log_prob(torch.randn(256, 2)).mean()).backward()
        >>> points = model.eval().sample(100)
    """

    def __init__(
        self,
        features: int = 2,
        steps: int = 10,
        hidden: int = 64,
        layers: int = 2,
        prior: str = "gaussian",
        components: int = 2,
        reversible: bool = True,
    ) -> None:
        config = {
            "features": features,
            "steps": steps,
            "hidden": hidden,
            "layers": layers,
            "prior": prior,
            "components": components,
            "reversible": reversible,
        }
        for name, value in {"features": features, "steps": steps, "components": components}.items():
            check.count(name, value)
        if features % 2:
            raise check.error("features", features, "an even number, to split into halves")
        check.one_of("prior", prior, PRIORS)
        half = features // 2
        layers_of_steps = [
            layer
            for _ in range(steps)
            for layer in (
                ActNorm(features),
                InvertibleConv1x1(features),
                AffineCoupling(MLP(half, features, hidden, layers), num_features=half),
            )
        ]
        shape = (features,)
        prior = (
            GaussianPrior(shape)
            if prior == "gaussian"
            else GaussianMixturePrior(shape, _means(components, features))
        )
        super().__init__(
            shape,
            Continuous(),
            [Sequential(*layers_of_steps, reversible=reversible)],
            [],
            prior,
            None,
            config,
        )


def _means(components: int, features: int) -> torch.Tensor:
    """Around 0, where ActNorm puts the data: with means that lie on one side of it training ends in a poor optimum."""
    means = torch.randn(components, features)
    means = means - means.mean(0)
    return 2 * means / means.norm(dim=1).square().mean().sqrt().clamp_min(torch.finfo(means.dtype).tiny)
