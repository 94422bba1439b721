"""Residual flows of vectors and of images."""

import math
from dataclasses import dataclass, fields
from typing import Literal

from torch import nn
from torch.distributions import Distribution

from fastflow import validation
from fastflow.models.image_flow import prior_of
from fastflow.models.model import Model
from fastflow.models.options import ModelConfig, takes_fields_of
from fastflow.nn import (
    ActNorm,
    Dequantize,
    Flatten,
    Flow,
    IdentityDequantize,
    LipschitzConvNet,
    LipschitzMLP,
    LogitDequantize,
    Prior,
    Residual,
    Sequential,
    Split,
    Squeeze,
)

# options that vectors do not have
_OF_IMAGES = ("scales", "split", "dense_blocks", "dense_hidden", "n_bits", "alpha")


@dataclass(frozen=True)
class ResidualFlowConfig(ModelConfig):
    """Options of :class:`ResidualFlow`, which documents them."""

    features: int | tuple[int, int, int] = 2
    context_features: int | None = None
    blocks: int = 8
    hidden: int = 64
    layers: int = 2
    lipschitz: float = 0.94
    activation: Literal["lipswish", "elu"] = "lipswish"
    log_det: Literal["auto", "exact", "series", "roulette"] = "auto"
    terms: int = 10
    exact_terms: int = 2
    stop: float = 0.5
    noise: Literal["rademacher", "gaussian"] = "rademacher"
    prior: Literal["gaussian"] | Prior | Distribution = "gaussian"
    scales: int = 3
    split: bool = False
    dense_blocks: int | None = 4
    dense_hidden: int = 128
    n_bits: int | None = 8
    alpha: float | None = 0.05
    reversible: bool = False
    standardize: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.features, int):
            validation.positive_ints(features=self.features)
            for field in fields(self):
                given = getattr(self, field.name)
                if field.name in _OF_IMAGES and given != field.default:
                    expected = f"the default, {field.default}: it is an option of images"
                    raise validation.argument_error(field.name, given, expected)
            return
        expected = "a number of dimensions or (C, H, W)"
        validation.sample_shape("features", self.features, expected)
        if len(self.features) != 3:
            raise validation.argument_error("features", self.features, expected)
        _, h, w = self.features
        multiple = 2 ** (self.scales - 1)
        if h % multiple or w % multiple:
            got = f"{self.scales} for features {self.features}"
            raise validation.argument_error("scales", got, f"a height and width that {multiple} divides")
        if self.context_features is not None:
            raise validation.argument_error("context_features", self.context_features, "None for images")
        if self.standardize and self.n_bits is not None:
            raise validation.argument_error("standardize", True, "False, unless n_bits is None")

    def block(self, net: nn.Module, index: int) -> Residual:
        """One residual layer; eval mode draws other noise in each."""
        how = {name: getattr(self, name) for name in ("log_det", "terms", "exact_terms", "stop", "noise")}
        return Residual(net, seed=index, **how)


class ResidualFlow(Model):
    """Residual flow (Chen, Behrmann, Duvenaud and Jacobsen, arXiv:1906.02735) of vectors or of images.

    A block is a :class:`~fastflow.nn.Residual` whose network is a contraction. An :class:`~fastflow.nn.ActNorm` comes
    before the first block and after each. Every network except the first starts with the activation. The networks of
    images are convolutions (3x3, 1x1, 3x3). A squeeze is between two scales, and dense networks of all dimensions
    follow the last one.

    The paper's models of images have ``blocks=16, hidden=512``, with alpha 0.05 on CIFAR-10 and 1e-6 on MNIST, and were
    trained by Adam with averaged weights. They reached 3.280 bits/dim on CIFAR-10 and 0.970 on MNIST. These figures
    are not reproduced here. The released code draws the number of terms from a Poisson distribution, the paper and this
    model from a geometric one.

    ``log_prob`` is exact up to 4 dimensions by default; otherwise it is an unbiased estimate in training mode, and one
    that repeats itself in eval mode, see :class:`~fastflow.nn.Residual`.

    Args:
        features: number of dimensions D of vectors, or the shape ``(C, H, W)`` of images.
        context_features: number of features of the context of vectors, added in the first layer of every network; None:
            no context.
        blocks: number of residual blocks; of images, per scale.
        hidden: number of units or channels of each hidden layer.
        layers: number of hidden layers of the dense networks.
        lipschitz: bound of the Lipschitz constant of each network, below 1. The default is near the paper's
            :math:`0.98^3`.
        activation: activation of the networks.
        log_det: how log-dets of blocks are computed, see :class:`~fastflow.nn.Residual`.
        terms: number of terms with ``log_det="series"``.
        exact_terms: number of terms that the roulette always has in training mode.
        stop: probability with which the roulette stops after each further term.
        noise: noise of Hutchinson's estimator.
        prior: ``"gaussian"``, or a :class:`~fastflow.nn.Prior` or a continuous distribution of torch.distributions with
            the shape of the last latent.
        scales: number of scales of images; each except the last halves the image side.
        split: half of the channels leave after each scale except the last, as for ImageNet 64x64 in the released code.
        dense_blocks: number of residual blocks with dense networks after the last scale; None: no such blocks.
        dense_hidden: number of units of each hidden layer of these networks.
        n_bits: bits per value of images, which are uint8. None: images are floating point in any range and are not
            dequantized.
        alpha: images are dequantized through the logit, which alpha keeps finite; None: to [-1/2, 1/2).
        reversible: recompute activations in backward instead of storing them. Each block is then inverted by iteration.
        standardize: standardize vectors or floating point images before the first block, see
            :meth:`Model.standardize_by`. ``fastflow.fit`` with ``standardize=True`` adds it.

    Shape: x ``[N, D]`` floating point in the model's dtype, or uint8 ``[N, C, H, W]``, floating point with
    ``n_bits=None``; context ``[N, context_features]``, or ``[1, context_features]`` for all samples.
    Raises ValueError for any other argument, also for options of images with vectors.

    Example:
        >>> import torch
        >>> from fastflow.models import ResidualFlow
        >>> model = ResidualFlow(features=2, blocks=2, hidden=32)
        >>> (-model.log_prob(torch.randn(64, 2)).mean()).backward()
        >>> points = model.eval().sample(64)
        >>> images = ResidualFlow((1, 8, 8), blocks=1, hidden=8, scales=2, dense_blocks=1)
        >>> images(torch.randint(0, 256, (4, 1, 8, 8), dtype=torch.uint8)).mean().backward()
    """

    @takes_fields_of(ResidualFlowConfig)
    def __init__(self, config: ResidualFlowConfig) -> None:
        flows: list[Flow]
        if isinstance(config.features, int):
            shape, dequantize = (config.features,), IdentityDequantize()
            flows, splits, latent = [_of_vectors(config, config.features)], [], shape
        else:
            shape = config.features
            flows, splits, latent = _of_images(config, config.features)
            if config.n_bits is None:
                dequantize = IdentityDequantize()
            elif config.alpha is None:
                dequantize = Dequantize(config.n_bits)
            else:
                dequantize = LogitDequantize(config.n_bits, config.alpha)
        prior = prior_of(config.prior if isinstance(config.prior, (Prior, Distribution)) else None, latent)
        context_shape = None if config.context_features is None else (config.context_features,)
        arguments = config.arguments()
        super().__init__(
            shape, dequantize, flows, splits, prior, None, arguments, context_shape, config.standardize
        )

    def inverse_iterations(self) -> list[int]:
        """The largest number of iterations of each block in the last inverse; 0 before the first one."""
        counts = (m.inverse_iterations for m in self.modules() if isinstance(m, Residual))
        return [0 if each is None or not each.numel() else int(each.max()) for each in counts]


def _of_vectors(config: ResidualFlowConfig, features: int) -> Flow:
    layers: list[Flow] = [ActNorm(features)]
    for i in range(config.blocks):
        net = LipschitzMLP(
            features,
            (config.hidden,) * config.layers,
            config.lipschitz,
            config.activation,
            config.context_features,
            activation_first=i > 0,
        )
        layers += [config.block(net, i), ActNorm(features)]
    return Sequential(*layers, reversible=config.reversible)


def _of_images(
    config: ResidualFlowConfig, shape: tuple[int, int, int]
) -> tuple[list[Flow], list[Split], tuple[int, ...]]:
    """The flows, the splits between them, and the shape of the last latent."""
    c, h, w = shape
    flows: list[Flow] = []
    splits: list[Split] = []
    layers: list[Flow] = [ActNorm(c)]
    index = 0
    for scale in range(config.scales):
        for _ in range(config.blocks):
            net = LipschitzConvNet(
                c, (h, w), config.hidden, config.lipschitz, config.activation, activation_first=index > 0
            )
            layers += [config.block(net, index), ActNorm(c)]
            index += 1
        if scale < config.scales - 1:
            layers.append(Squeeze())
            c, h, w = 4 * c, h // 2, w // 2
            if config.split:
                flows.append(Sequential(*layers, reversible=config.reversible))
                splits.append(Split(c, prior="standard"))
                layers, c = [], c // 2
    latent = (c, h, w)
    if config.dense_blocks is not None:
        size = math.prod(latent)
        layers.append(Flatten(latent))
        for _ in range(config.dense_blocks):
            hidden = (config.dense_hidden,) * config.layers
            net = LipschitzMLP(size, hidden, config.lipschitz, config.activation, activation_first=True)
            layers += [config.block(net, index), ActNorm(size)]
            index += 1
        latent = (size,)
    flows.append(Sequential(*layers, reversible=config.reversible))
    return flows, splits, latent
