"""The NICE model."""

import math
from dataclasses import asdict, dataclass
from typing import Literal

from fastflow import validation
from fastflow.models.model import Model
from fastflow.models.options import ModelConfig, takes_fields_of
from fastflow.nn import (
    MLP,
    AdditiveCoupling,
    Dequantize,
    Flatten,
    GaussianPrior,
    LogisticPrior,
    Permute,
    Scale,
    Sequential,
)


@dataclass(frozen=True)
class NICEConfig(ModelConfig):
    """Options of :class:`NICE`, which documents them."""

    features: int | tuple[int, ...] = 784
    couplings: int = 4
    hidden: int = 1000
    layers: int = 5
    prior: Literal["logistic", "gaussian"] = "logistic"
    n_bits: int = 8
    reversible: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        shape = self.shape
        expected = "an even number of dimensions, or the shape of an image that has one"
        validation.sample_shape("features", shape, expected)
        if math.prod(shape) % 2:
            raise validation.argument_error("features", self.features, expected)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one sample."""
        return (self.features,) if isinstance(self.features, int) else self.features


class NICE(Model):
    """NICE (Dinh, Krueger and Bengio, arXiv:1410.8516, section 5.1): additive couplings, then a scale.

    The defaults are the paper's for MNIST: four couplings, which transform the even and the odd dimensions in
    turn, with networks of five hidden layers of 1000 units. Pixels are dequantized to [-1/2, 1/2) instead of
    the paper's [0, 1]; the first biases can absorb the difference.

    Args:
        features: number of dimensions D, even; or the shape of an image ``(C, H, W)``, which is flattened row
            by row.
        couplings: number of couplings.
        hidden: number of units of each hidden layer.
        layers: number of hidden layers per network.
        prior: prior of each dimension, ``"logistic"`` or ``"gaussian"``.
        n_bits: bits per value; samples are uint8 with values below ``2 ** n_bits``.
        reversible: recompute activations in backward instead of storing them.

    Shape: x uint8 ``[N, D]`` or ``[N, C, H, W]``.
    Raises ValueError for any other argument.

    Example:
        >>> import torch
        >>> from fastflow.models import NICE
        >>> model = NICE(features=784, hidden=100)
        >>> model(torch.randint(0, 256, (8, 784), dtype=torch.uint8)).mean().backward()
    """

    @takes_fields_of(NICEConfig)
    def __init__(self, config: NICEConfig) -> None:
        dimensions = math.prod(config.shape)
        half = dimensions // 2
        networks = (MLP(half, half, config.hidden, config.layers) for _ in range(config.couplings))
        flow = Sequential(
            *([Flatten(config.shape)] if len(config.shape) > 1 else []),
            Permute(dimensions, "interleaved"),
            *(AdditiveCoupling(net, swap_halves=i % 2 == 1) for i, net in enumerate(networks)),
            Scale(dimensions),
            reversible=config.reversible,
        )
        prior = LogisticPrior if config.prior == "logistic" else GaussianPrior
        dequantize = Dequantize(config.n_bits)
        super().__init__(config.shape, dequantize, [flow], [], prior((dimensions,)), None, asdict(config))
