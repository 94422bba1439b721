"""The RealNVP model."""

from dataclasses import dataclass

from fastflow import validation
from fastflow.deprecation import renamed_arguments
from fastflow.models.model import Model
from fastflow.models.options import (
    FORMER_NAMES,
    ModelConfig,
    check_image_shape,
    context_shape_of,
    takes_fields_of,
)
from fastflow.nn import (
    AffineCoupling,
    BatchNorm,
    Flow,
    GaussianPrior,
    LogitDequantize,
    Permute,
    ResidualNetwork,
    Sequential,
    Split,
    Squeeze,
)
from fastflow.nn.networks.builder import NetworkBuilder, built


@dataclass(frozen=True)
class RealNVPConfig(ModelConfig):
    """Options of :class:`RealNVP`, which documents them."""

    image_shape: tuple[int, int, int] = (3, 32, 32)
    scales: int = 2
    hidden: int = 64
    blocks: int = 8
    n_bits: int = 8
    classes: int | None = None
    momentum: float = 0.9
    reversible: bool = True
    activation_checkpoint_every: int | None = None
    context_features: int | None = None
    context_image: bool = False
    network: NetworkBuilder | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_image_shape(self.image_shape)
        _, h, w = self.image_shape
        multiple = 2 ** (self.scales - 1)
        if h % multiple or w % multiple:
            got = f"{self.scales} for image_shape {self.image_shape}"
            raise validation.argument_error("scales", got, f"a height and width that {multiple} divides")
        self.context_shape()

    def context_shape(self) -> tuple[int, ...] | None:
        """Shape of one context of the flows, or None."""
        return context_shape_of(self.image_shape, self.context_features, self.context_image, self.classes)


class RealNVP(Model):
    """RealNVP (Dinh, Sohl-Dickstein and Bengio, arXiv:1605.08803, sections 3.6 and 4.1).

    Each scale except the last has three checkerboard couplings, a squeeze, three channel couplings, and a
    split of half the dimensions with a standard Gaussian prior. The last scale has four checkerboard
    couplings. Networks are twice as wide after each squeeze, and a batch normalization follows every
    coupling. Pixels are dequantized through the logit (alpha 0.05). The defaults are the paper's
    options for CIFAR-10. For ImageNet 32x32 they are ``scales=4, hidden=32, blocks=4``, for 64x64 images
    ``scales=5, hidden=32, blocks=2``.

    Args:
        image_shape: ``(C, H, W)``; ``2 ** (scales - 1)`` must divide H and W.
        scales: number of scales; each except the last halves the image side.
        hidden: number of channels inside the networks of the first scale's checkerboard couplings.
        blocks: number of residual blocks per network.
        n_bits: bits per value; images are uint8 with values below ``2 ** n_bits``.
        classes: number of classes; the prior of the last latent then has a learned mean and scale per class.
        momentum: momentum of the batch normalizations between couplings, see :class:`fastflow.nn.BatchNorm`.
        reversible: recompute activations in backward instead of storing them. In training mode, call backward
            before the next forward pass, because a forward pass updates the statistics of the batch
            normalizations.
        activation_checkpoint_every: number of layers of a reversible chain between two stored activations.
        context_features: number of channels of the context, an input of every coupling network; None: no
            context. The context is a vector ``[N, context_features]``, repeated at every position.
        context_image: the context is an image ``[N, context_features, H, W]`` instead, squeezed with x.
        network: a function of (in_channels, out_channels) that returns the network of one coupling, a module;
            None: the paper's residual network. With a function, ``hidden`` and ``blocks`` have no effect.

    In training mode, an image's result depends on the other images of its batch, also in ``encode``,
    ``decode`` and ``sample``; call ``eval()`` before these.

    Shape: x uint8 ``[N, C, H, W]``; context int64 ``[N]`` with ``classes``, floating point with
    ``context_features``, otherwise None.
    Raises ValueError for any other argument.

    Example:
        >>> import torch
        >>> from fastflow.models import RealNVP
        >>> model = RealNVP(image_shape=(3, 32, 32), hidden=8, blocks=1)
        >>> model(torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8)).mean().backward()
    """

    @renamed_arguments(**FORMER_NAMES)
    @takes_fields_of(RealNVPConfig)
    def __init__(self, config: RealNVPConfig) -> None:
        (c, h, w), hidden, features = config.image_shape, config.hidden, config.context_features

        def coupling(channels: int, hidden: int, mask: str, flip: bool) -> list[Flow]:
            seen, changed = (channels, channels) if mask == "checkerboard" else (channels // 2, channels // 2)
            if config.network is None:
                net = ResidualNetwork(seen, 2 * changed, hidden, config.blocks, features)
            else:
                net = built(config.network, seen, 2 * changed)
            return [
                AffineCoupling(
                    net,
                    mask=mask,
                    swap_halves=flip,
                    scale="tanh",
                    params_layout="scale_shift",
                    num_scale_factors=changed,
                ),
                BatchNorm(channels, config.momentum),
            ]

        flows, splits = [], []
        for scale in range(config.scales):
            last = scale == config.scales - 1
            layers = [
                m for i in range(4 if last else 3) for m in coupling(c, hidden, "checkerboard", i % 2 == 1)
            ]
            if not last:
                # halves are the rows of 2x2 blocks, which the checkerboards mix
                layers.append(Squeeze("space"))
                c, h, w, hidden = 4 * c, h // 2, w // 2, 2 * hidden
                features = 4 * features if features is not None and config.context_image else features
                layers += [m for i in range(3) for m in coupling(c, hidden, "halves", i % 2 == 1)]
                layers.append(Permute(c, _diagonals_first(c)))
                splits.append(Split(c, prior="standard"))
                c //= 2
            chain = {
                "reversible": config.reversible,
                "activation_checkpoint_every": config.activation_checkpoint_every,
            }
            flows.append(Sequential(*layers, **chain))
        dequantize, prior = LogitDequantize(config.n_bits), GaussianPrior((c, h, w), config.classes)
        super().__init__(
            config.image_shape,
            dequantize,
            flows,
            splits,
            prior,
            config.classes,
            config.arguments(),
            config.context_shape(),
        )


def _diagonals_first(channels: int) -> list[int]:
    """Permutation from squeeze order "space" to "realnvp": pixels 00, 11 of each block before 01, 10."""
    size = channels // 4
    return [i for pixel in (0, 3, 1, 2) for i in range(pixel * size, (pixel + 1) * size)]
