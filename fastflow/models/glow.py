"""Glow."""

import torch
from torch import Tensor, nn

from fastflow import ops
from fastflow.models.model import Model
from fastflow.nn import (
    ActNorm,
    AdditiveCoupling,
    AffineCoupling,
    Dequantize,
    Flow,
    GaussianPrior,
    GlowNetwork,
    InvertibleConv1x1,
    LogitDequantize,
    Permute,
    Split,
    Squeeze,
)
from fastflow.nn.conv1x1 import stacked_weights
from fastflow.ops import check
from fastflow.reference import positions

COUPLINGS = ("affine", "additive")
SCALES = ("soft_clamp", "tanh", "sigmoid", "exp")
CONV1X1 = ("lu", "plain", "reverse", "shuffle")

Linear = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def _mixing(num_features: int, conv1x1: str) -> Flow:
    if conv1x1 in ("lu", "plain"):
        return InvertibleConv1x1(num_features, lu=conv1x1 == "lu")
    return Permute(num_features, order="reverse" if conv1x1 == "reverse" else "random")


class GlowStep(Flow):
    r"""One step of Glow: ActNorm, 1x1 convolution, coupling (arXiv:1807.03039, figure 2a).

    ActNorm is folded into the convolution, :math:`W e^{s} (x + b) = W' x + W' b` with :math:`W' = W \operatorname{diag}(e^{s})`, so that
    both are one pass over x. Shape: ``[N, C, H, W]``, even C; log_det ``[N]``, nats.
    """

    def __init__(
        self, num_features: int, hidden: int = 512, coupling: str = "affine", conv1x1: str = "lu", scale: str = "soft_clamp"
    ) -> None:
        super().__init__()
        half = num_features // 2
        self.actnorm = ActNorm(num_features)
        self.conv1x1 = _mixing(num_features, conv1x1)
        if coupling == "affine":
            self.coupling = AffineCoupling(GlowNetwork(half, num_features, hidden), scale=scale, num_features=half)
        else:
            self.coupling = AdditiveCoupling(GlowNetwork(half, half, hidden))

    def forward(self, x: Tensor, context: Tensor | None = None, linear: Linear | None = None) -> tuple[Tensor, Tensor]:
        """``linear`` are the step's own weights from :func:`folded`, where the level has them already."""
        self.actnorm.initialize_once(x)
        weight, bias, _, _, log_det = linear or folded([self])[0]
        x = ops.conv1x1(x, weight, bias)
        x, coupling_log_det = self.coupling(x, context)
        return x, coupling_log_det + positions(x) * log_det

    def inverse(self, z: Tensor, context: Tensor | None = None, linear: Linear | None = None) -> tuple[Tensor, Tensor]:
        _, _, weight, bias, log_det = linear or folded([self])[0]
        z, coupling_log_det = self.coupling.inverse(z, context)
        return ops.conv1x1(z, weight, bias), coupling_log_det - positions(z) * log_det


def folded(steps: list[GlowStep]) -> list[Linear]:
    """(weight, bias, weight and bias of the inverse, log_det of a position) of each step's ActNorm and convolution together."""
    weight, inverse, log_det = stacked_weights([step.conv1x1 for step in steps])
    log_scale = torch.stack([step.actnorm.log_scale for step in steps])
    bias = torch.stack([step.actnorm.bias for step in steps])
    weight = weight.to(bias.dtype) * log_scale.exp().unsqueeze(1)
    inverse = inverse.to(bias.dtype) * (-log_scale).exp().unsqueeze(2)
    log_det = log_det.to(bias.dtype) + log_scale.sum(1)
    parts = (weight, (weight @ bias.unsqueeze(2)).squeeze(2), inverse, -bias, log_det)
    return list(zip(*(v.unbind() for v in parts), strict=True))


class GlowLevel(Flow):
    """One level of Glow: squeeze, then K steps (arXiv:1807.03039, figure 2b); the weights of all its steps are computed at once.

    Shape: ``[N, C, H, W]`` to ``[N, 4C, H/2, W/2]``; log_det ``[N]``, nats.
    """

    def __init__(self, steps: list[GlowStep]) -> None:
        super().__init__()
        self.squeeze = Squeeze()
        self.steps = nn.ModuleList(steps)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x, log_det = self.squeeze(x)
        # a step that has yet to initialise its ActNorm can only compute its weights once x has reached it
        pending = self.training and not all(step.actnorm._initialized for step in self.steps)
        linear = [None] * len(self.steps) if pending else folded(list(self.steps))
        for step, weights in zip(self.steps, linear, strict=True):
            x, step_log_det = step(x, context, weights)
            log_det = log_det + step_log_det
        return x, log_det

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        log_det = 0.0
        for step, weights in zip(reversed(self.steps), reversed(folded(list(self.steps))), strict=True):
            z, step_log_det = step.inverse(z, context, weights)
            log_det = log_det + step_log_det
        return self.squeeze.inverse(z)[0], log_det


class Glow(Model):
    """Glow (Kingma and Dhariwal, arXiv:1807.03039): L levels of squeeze, K steps and split.

    Args:
        image_shape: ``(C, H, W)``; 2 to the power of ``levels`` must divide H and W.
        levels: L.
        steps: K, of each level.
        hidden: channels inside the coupling networks.
        coupling: ``"affine"`` or ``"additive"``.
        conv1x1: how channels are mixed: by a 1x1 convolution, ``"lu"`` or ``"plain"``, or by a fixed permutation,
            ``"reverse"`` or ``"shuffle"``.
        n_bits: bit depth; images are uint8 with values below ``2 ** n_bits``.
        classes: number of classes; the prior of the last latent is then learned for each.
        scale: of the affine coupling, see :func:`fastflow.ops.affine_coupling`. ``"sigmoid"`` is the paper's code; the default bounds the
            scale, so that images unlike the training data come back from their latents too.
        logit: dequantize through RealNVP's logit (alpha 0.05) instead of to [-1/2, 1/2).
        reversible, checkpoint_every: accepted and without effect as yet: activations are stored.

    Raises ValueError for an argument outside these, naming the levels that fit an image.

    Example:
        >>> model = Glow(image_shape=(3, 32, 32), levels=3, steps=4, hidden=64)
        >>> x = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8)
        >>> model(x).mean().backward()
        >>> images = model.eval().sample(4, temperature=0.7)
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int] = (3, 32, 32),
        levels: int = 3,
        steps: int = 32,
        hidden: int = 512,
        coupling: str = "affine",
        conv1x1: str = "lu",
        n_bits: int = 8,
        classes: int | None = None,
        logit: bool = False,
        scale: str = "soft_clamp",
        reversible: bool = True,
        checkpoint_every: int | None = None,
    ) -> None:
        config = {
            "image_shape": tuple(image_shape),
            "levels": levels,
            "steps": steps,
            "hidden": hidden,
            "coupling": coupling,
            "conv1x1": conv1x1,
            "n_bits": n_bits,
            "classes": classes,
            "logit": logit,
            "scale": scale,
            "reversible": reversible,
            "checkpoint_every": checkpoint_every,
        }
        _check_config(**config)
        c, h, w = image_shape
        flows, splits = [], []
        for level in range(levels):
            c, h, w = 4 * c, h // 2, w // 2
            flows.append(GlowLevel([GlowStep(c, hidden, coupling, conv1x1, scale) for _ in range(steps)]))
            if level < levels - 1:
                splits.append(Split(c))
                c //= 2
        dequantize = LogitDequantize(n_bits) if logit else Dequantize(n_bits)
        super().__init__(image_shape, dequantize, flows, splits, GaussianPrior((c, h, w), classes), classes, config)


def _check_config(
    image_shape, levels, steps, hidden, coupling, conv1x1, n_bits, classes, logit, scale, reversible, checkpoint_every
) -> None:
    check.one_of("coupling", coupling, COUPLINGS)
    check.one_of("conv1x1", conv1x1, CONV1X1)
    check.one_of("scale", scale, SCALES)
    counts = {"levels": levels, "steps": steps, "hidden": hidden, "classes": classes, "checkpoint_every": checkpoint_every}
    for name, value in counts.items():
        optional = name in ("classes", "checkpoint_every")
        if not (value is None and optional) and not (isinstance(value, int) and value >= 1):
            raise check.error(name, repr(value), f"a positive integer{' or None' if optional else ''}")
    if len(image_shape) != 3 or min(image_shape) < 1:
        raise check.error("image_shape", tuple(image_shape), "(C, H, W)")
    _, h, w = image_shape
    fitting = 0
    while h % 2 ** (fitting + 1) == 0 and w % 2 ** (fitting + 1) == 0:
        fitting += 1
    if levels > fitting:
        multiple = 2**levels
        padded = (-(-h // multiple) * multiple, -(-w // multiple) * multiple)
        fits = f"at most {fitting} level{'s' * (fitting != 1)} for this image" if fitting else "an even height and width"
        raise check.error(
            "levels", f"{levels} for image_shape {tuple(image_shape)}", f"{fits}, or images padded to {padded[0]}x{padded[1]}"
        )
