"""Priors over latents."""

from fastflow.nn.priors.distribution import DistributionPrior
from fastflow.nn.priors.gaussian import GaussianPrior
from fastflow.nn.priors.logistic import LogisticPrior
from fastflow.nn.priors.mixture import GaussianMixturePrior
from fastflow.nn.priors.prior import Prior
from fastflow.nn.priors.uniform import UniformPrior

__all__ = [
    "DistributionPrior",
    "GaussianMixturePrior",
    "GaussianPrior",
    "LogisticPrior",
    "Prior",
    "UniformPrior",
]
