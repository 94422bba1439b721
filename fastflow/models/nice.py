"""NICE."""

import math

from fastflow import check
from fastflow.models.model import Model
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

PRIORS = ("logistic", "gaussian")


class NICE(Model):
    """NICE (Dinh, Krueger and Bengio, arXiv:1410.8516, section 5.1): additive couplings, then a scale for each dimension.

    The defaults are the paper's for MNIST: four couplings, whose networks have five hidden layers of 1000, on the even and the odd
    dimensions in turn. Pixels are dequantized to [-1/2, 1/2), where the paper has [0, 1]: the first biases take up the difference.

    Args:
        features: D, an even number; or the shape of an image, ``(C, H, W)``, whose values are taken row by row.
        couplings: number of couplings.
        hidden, layers: width and number of the hidden layers of each network.
        prior: ``"logistic"`` or ``"gaussian"``, of each dimension.
        n_bits: bit depth; samples are uint8 ``[N, *features]`` with values below ``2 ** n_bits``.
        reversible: recompute activations in backward instead of keeping them.

    Raises ValueError for an argument outside these.

    Example:
        >>> model = NICE(features=784, hidden=100)
        >>> model(torch.randint(0, 256, (8, 784), dtype=torch.uint8)).mean().backward()
    """

    def __init__(
        self,
        features: int | tuple[int, ...] = 784,
        couplings: int = 4,
        hidden: int = 1000,
        layers: int = 5,
        prior: str = "logistic",
        n_bits: int = 8,
        reversible: bool = True,
    ) -> None:
        shape = (features,) if isinstance(features, int) else tuple(features)
        config = {
            "features": features if isinstance(features, int) else shape,
            "couplings": couplings,
            "hidden": hidden,
            "layers": layers,
            "prior": prior,
            "n_bits": n_bits,
            "reversible": reversible,
        }
        check.one_of("prior", prior, PRIORS)
        check.count("couplings", couplings)
        dimensions = math.prod(shape)
        if not shape or min(shape) < 1 or dimensions % 2:
            raise check.error(
                "features", features, "an even number of dimensions, or the shape of an image that has one"
            )
        half = dimensions // 2
        flow = Sequential(
            *([Flatten(shape)] if len(shape) > 1 else []),
            Permute(dimensions, "interleaved"),
            *(AdditiveCoupling(MLP(half, half, hidden, layers), flip=i % 2 == 1) for i in range(couplings)),
            Scale(dimensions),
            reversible=reversible,
        )
        prior = LogisticPrior((dimensions,)) if prior == "logistic" else GaussianPrior((dimensions,))
        super().__init__(shape, Dequantize(n_bits), [flow], [], prior, None, config)
