"""The Glow model."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import nn

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
    Dequantize,
    GaussianPrior,
    GlowLevel,
    GlowNetwork,
    GlowStep,
    IdentityDequantize,
    LogitDequantize,
    Split,
)
from fastflow.nn.networks.builder import NetworkBuilder
from fastflow.nn.networks.fastest import is_fused_on_cpu

Coupling = Literal["affine", "additive", "spline", "mixture"]
Scale = Literal["soft_clamp", "tanh", "sigmoid", "exp"]
Conv1x1 = Literal["lu", "plain", "reverse", "shuffle"]
Network = Literal["plain", "fused", "auto"]
# An Adam step of rate r changes each output of a coupling network by up to 9 hidden r times the mean hidden
# activation, and the effects of the K steps of a level multiply. With hidden K^2 times the factor on the outputs
# at most this, Adam's first steps were measured without a warm-up (docs/training.md).
STEADY = 2048
COUPLINGS, SCALES, CONV1X1 = get_args(Coupling), get_args(Scale), get_args(Conv1x1)


@dataclass(frozen=True)
class GlowConfig(ModelConfig):
    """Options of :class:`Glow`, which documents them."""

    image_shape: tuple[int, int, int] = (3, 32, 32)
    levels: int = 3
    steps: int = 32
    hidden: int = 512
    coupling: Coupling = "affine"
    conv1x1: Conv1x1 = "lu"
    n_bits: int | None = 8
    classes: int | None = None
    learned_prior: bool = False
    logit: bool = False
    scale: Scale = "soft_clamp"
    reversible: bool = True
    activation_checkpoint_every: int | None = None
    network: Network | NetworkBuilder = "auto"
    context_features: int | None = None
    context_image: bool = False
    standardize: bool = False
    output_start: float | None = None
    bins: int = 4
    bound: float = 3.0
    components: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.output_start is not None:
            expected = "None or a positive number"
            validation.number("output_start", self.output_start, expected, lambda v: 0 < v < math.inf)
        _check_levels(self.image_shape, self.levels)
        if self.logit and self.n_bits is None:
            raise validation.argument_error(
                "logit", True, "False with n_bits=None: floats are not dequantized"
            )
        if self.standardize and self.n_bits is not None:
            raise validation.argument_error("standardize", True, "False, unless n_bits is None")
        self.context_shape()

    def start_of_outputs(self) -> float:
        """Factor on the outputs of the coupling networks at the start, see ``output_start``."""
        if self.output_start is not None:
            return self.output_start
        return min(1.0, STEADY / (self.hidden * self.steps**2))

    def context_shape(self) -> tuple[int, ...] | None:
        """Shape of one context of the flows, or None."""
        return context_shape_of(self.image_shape, self.context_features, self.context_image, self.classes)


class Glow(Model):
    """Glow (Kingma and Dhariwal, arXiv:1807.03039): L levels of squeeze, K steps and split.

    Args:
        image_shape: ``(C, H, W)``; ``2 ** levels`` must divide H and W.
        levels: number of levels L; each halves the image side.
        steps: number of flow steps per level K.
        hidden: number of channels inside the coupling networks.
        coupling: type of coupling, ``"affine"``, ``"additive"``, ``"spline"`` or ``"mixture"``. ``"spline"``: the
            rational-quadratic splines of neural spline flows (arXiv:1906.04032, section 5.3), see
            :class:`~fastflow.nn.SplineCoupling`. ``"mixture"``: the mixtures of logistics of Flow++
            (arXiv:1902.00275, section 3.2), see :class:`~fastflow.nn.MixtureCDFCoupling`.
        conv1x1: channel mixing of a step: a learned 1x1 convolution (``"lu"``: LU-factored, ``"plain"``) or a
            fixed permutation (``"reverse"``, ``"shuffle"``).
        n_bits: bits per value; images are uint8 with values below ``2 ** n_bits``. None: images are floating point
            in any range and are not dequantized.
        classes: number of classes; the prior of the last latent then has a learned mean and scale per class.
        learned_prior: learn the mean and scale of the last latent's prior per channel (`learntop` in the
            paper's code); otherwise they are 0 and 1. Class-conditional models always learn them.
        logit: dequantize through RealNVP's logit (alpha 0.05) instead of to [-1/2, 1/2).
        scale: scale function of the affine coupling, see :func:`fastflow.ops.affine_coupling`. The paper's
            code uses ``"sigmoid"``. ``"soft_clamp"`` and ``"tanh"`` bound the scale, so that more images
            unlike the training data are recovered from their latents (docs/index.md has counts).
        reversible: recompute activations in backward instead of storing them. Memory then does not grow with
            ``steps``, but a training step takes longer (docs/memory.md). Set it to False to compile the whole
            model with torch.compile.
        activation_checkpoint_every: number of steps of a reversible chain between two stored activations.
            Rounding errors accumulate over at most this many steps.
        network: how the coupling networks are computed: ``"plain"``, as three convolutions; ``"fused"``, as one
            op that keeps hidden activations out of memory (:func:`fastflow.ops.glow_network`); ``"auto"``, as the
            op where it is faster, see :class:`fastflow.nn.GlowNetwork`. Or a function of (in_channels, out_channels)
            that returns the network of one coupling, a module; ``hidden`` then has no effect.
        context_features: number of channels of the context, an input of every coupling network; None: no
            context. The context is a vector ``[N, context_features]``, repeated at every position.
        context_image: the context is an image ``[N, context_features, H, W]`` instead, squeezed with x.
        standardize: with ``n_bits=None``, standardize images before the first level, see
            :meth:`Model.standardize_by`. ``fastflow.fit`` with ``standardize=True`` adds it.
        output_start: factor on the outputs of the coupling networks at the start, learned from there. None:
            ``min(1, 2048 / (hidden * steps ** 2))``, so that Adam's first steps do not explode in deep models
            without a warm-up (docs/training.md). 1: as in the paper's code, which warms up. Networks of the
            caller's own are not scaled.
        bins: number of bins of each spline, with ``coupling="spline"``.
        bound: the splines map ``[-bound, bound]`` to itself and are the identity outside. ActNorm starts every
            channel with mean 0 and standard deviation 1, so that the default covers most values.
        components: number of components of each mixture, with ``coupling="mixture"``.

    Of floating point images, :meth:`Model.log_prob` is the exact log-density in nats, and :meth:`Model.bits_per_dim` the same in
    bits per dimension. It depends on the unit of the values and may be negative: it is not comparable with bits/dim
    of uint8 images.

    Shape: x uint8 ``[N, C, H, W]``, or floating point in the model's dtype with ``n_bits=None``; context int64
    ``[N]`` with ``classes``, floating point with ``context_features``, otherwise None.
    Raises ValueError for any other argument; for too many levels, the message names the largest number that
    fits.

    Example:
        >>> import torch
        >>> from fastflow.models import Glow
        >>> model = Glow(image_shape=(3, 32, 32), levels=3, steps=4, hidden=64)
        >>> x = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8)
        >>> model(x).mean().backward()
        >>> images = model.eval().sample(4, temperature=0.7)
    """

    @renamed_arguments(**FORMER_NAMES)
    @takes_fields_of(GlowConfig)
    def __init__(self, config: GlowConfig) -> None:
        c, h, w = config.image_shape
        flows, splits = [], []
        for level in range(config.levels):
            c, h, w = 4 * c, h // 2, w // 2
            features = config.context_features
            if config.context_image:
                features *= 4 ** (level + 1)
            options = config.hidden, config.coupling, config.conv1x1, config.scale, config.network, features
            steps = [
                GlowStep(c, *options, config.bins, config.bound, config.components)
                for _ in range(config.steps)
            ]
            for step in steps:
                if isinstance(step.coupling.net, GlowNetwork):
                    step.coupling.net.scale_outputs(config.start_of_outputs())
            flows.append(GlowLevel(steps, config.reversible, config.activation_checkpoint_every))
            if level < config.levels - 1:
                splits.append(Split(c))
                c //= 2
        if config.n_bits is None:
            dequantize = IdentityDequantize()
        else:
            dequantize = LogitDequantize(config.n_bits) if config.logit else Dequantize(config.n_bits)
        prior = GaussianPrior((c, h, w), config.classes, config.learned_prior)
        super().__init__(
            config.image_shape,
            dequantize,
            flows,
            splits,
            prior,
            config.classes,
            config.arguments(),
            config.context_shape(),
            config.standardize,
        )


def _check_levels(image_shape: tuple[int, ...], levels: int) -> None:
    check_image_shape(image_shape)
    _, h, w = image_shape
    fitting = 0
    while h % 2 ** (fitting + 1) == 0 and w % 2 ** (fitting + 1) == 0:
        fitting += 1
    if levels > fitting:
        fits = (
            f"at most {fitting} level{'s' * (fitting != 1)} for this image"
            if fitting
            else "an even height and width"
        )
        if levels < 30:  # a power of a larger number is no help
            padded = (-(-side // 2**levels) * 2**levels for side in (h, w))
            fits += f", or images padded to {'x'.join(map(str, padded))}"
        raise validation.argument_error(
            "levels",
            f"{levels} for image_shape {image_shape}",
            fits,
        )


def choose_networks_for_cpu(model: nn.Module, dtype: torch.dtype) -> None:
    """Gives each :class:`GlowNetwork` with ``network="auto"`` what that is on a CPU, for products in ``dtype``."""
    for network in model.modules():
        if isinstance(network, GlowNetwork) and network.network == "auto":
            network.network = "fused" if is_fused_on_cpu(dtype) else "plain"
