"""Glow."""

from fastflow import check
from fastflow.models.model import Model
from fastflow.nn import Dequantize, GaussianPrior, GlowLevel, GlowStep, LogitDequantize, Split

COUPLINGS = ("affine", "additive")
SCALES = ("soft_clamp", "tanh", "sigmoid", "exp")
CONV1X1 = ("lu", "plain", "reverse", "shuffle")


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
        learned_prior: learn that prior's mean and scale for each channel without classes too (`learntop` of the paper's code).
        scale: of the affine coupling, see :func:`fastflow.ops.affine_coupling`. ``"sigmoid"`` is the paper's code; the default bounds the
            scale, so that images unlike the training data come back from their latents too.
        logit: dequantize through RealNVP's logit (alpha 0.05) instead of to [-1/2, 1/2).
        reversible: recompute activations in backward instead of keeping them: what is kept does not grow with ``steps``, and a training
            step takes up to a third longer (docs/memory.md). False keeps them, as torch.compile of the whole model wants it.
        checkpoint_every: keep the activation after every so many steps all the same; rounding then adds up over no more steps than these.

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
        learned_prior: bool = False,
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
            "learned_prior": learned_prior,
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
            level_steps = [GlowStep(c, hidden, coupling, conv1x1, scale) for _ in range(steps)]
            flows.append(GlowLevel(level_steps, reversible, checkpoint_every))
            if level < levels - 1:
                splits.append(Split(c))
                c //= 2
        dequantize = LogitDequantize(n_bits) if logit else Dequantize(n_bits)
        prior = GaussianPrior((c, h, w), classes, learned_prior)
        super().__init__(image_shape, dequantize, flows, splits, prior, classes, config)


def _check_config(
    image_shape,
    levels,
    steps,
    hidden,
    coupling,
    conv1x1,
    n_bits,
    classes,
    learned_prior,
    logit,
    scale,
    reversible,
    checkpoint_every,
) -> None:
    check.one_of("coupling", coupling, COUPLINGS)
    check.one_of("conv1x1", conv1x1, CONV1X1)
    check.one_of("scale", scale, SCALES)
    counts = {
        "levels": levels,
        "steps": steps,
        "hidden": hidden,
        "classes": classes,
        "checkpoint_every": checkpoint_every,
    }
    for name, value in counts.items():
        check.count(name, value, optional=name in ("classes", "checkpoint_every"))
    if len(image_shape) != 3 or min(image_shape) < 1:
        raise check.error("image_shape", tuple(image_shape), "(C, H, W)")
    _, h, w = image_shape
    fitting = 0
    while h % 2 ** (fitting + 1) == 0 and w % 2 ** (fitting + 1) == 0:
        fitting += 1
    if levels > fitting:
        multiple = 2**levels
        padded = (-(-h // multiple) * multiple, -(-w // multiple) * multiple)
        fits = (
            f"at most {fitting} level{'s' * (fitting != 1)} for this image"
            if fitting
            else "an even height and width"
        )
        raise check.error(
            "levels",
            f"{levels} for image_shape {tuple(image_shape)}",
            f"{fits}, or images padded to {padded[0]}x{padded[1]}",
        )
