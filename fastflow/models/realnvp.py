"""RealNVP."""

from fastflow import check
from fastflow.models.model import Model
from fastflow.nn import (
    AffineCoupling,
    BatchNorm,
    GaussianPrior,
    LogitDequantize,
    Permute,
    ResidualNetwork,
    Sequential,
    Split,
    Squeeze,
)


class RealNVP(Model):
    """RealNVP (Dinh, Sohl-Dickstein and Bengio, arXiv:1605.08803, sections 3.6 and 4.1).

    Each scale but the last has three checkerboard couplings, a squeeze, three channel couplings, and hands out half the dimensions under a
    standard Gaussian; the last has four checkerboard couplings. Networks are twice as wide after each squeeze, and every coupling is
    followed by a batch normalization. Pixels are dequantized through the logit (alpha 0.05). CIFAR-10 was modelled with the defaults;
    ImageNet 32x32 with ``scales=4, hidden=32, blocks=4``, and 64x64 images with ``scales=5, hidden=32, blocks=2``.

    Args:
        image_shape: ``(C, H, W)``; 2 to the power of ``scales - 1`` must divide H and W.
        scales: number of scales.
        hidden: channels inside the networks of the first checkerboard couplings.
        blocks: residual blocks of each network.
        n_bits: bit depth; images are uint8 with values below ``2 ** n_bits``.
        classes: number of classes; the prior of the last latent is then learned for each.
        momentum: of the batch normalizations between couplings, see :class:`fastflow.nn.BatchNorm`.
        reversible: recompute activations in backward instead of keeping them. Backward then has to come before the next forward pass
            in training mode, which moves the statistics of the batch normalizations.
        checkpoint_every: keep the activation after every so many layers all the same.

    In training mode the images of a batch meet in its statistics, in ``encode``, ``decode`` and ``sample`` too: call ``eval()`` before
    these. Raises ValueError for an argument outside these.

    Example:
        >>> model = RealNVP(image_shape=(3, 32, 32), hidden=8, blocks=1)
        >>> model(torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8)).mean().backward()
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int] = (3, 32, 32),
        scales: int = 2,
        hidden: int = 64,
        blocks: int = 8,
        n_bits: int = 8,
        classes: int | None = None,
        momentum: float = 0.9,
        reversible: bool = True,
        checkpoint_every: int | None = None,
    ) -> None:
        config = {
            "image_shape": tuple(image_shape),
            "scales": scales,
            "hidden": hidden,
            "blocks": blocks,
            "n_bits": n_bits,
            "classes": classes,
            "momentum": momentum,
            "reversible": reversible,
            "checkpoint_every": checkpoint_every,
        }
        for name, value in {"scales": scales, "hidden": hidden, "blocks": blocks}.items():
            check.count(name, value)
        if len(image_shape) != 3 or min(image_shape) < 1:
            raise check.error("image_shape", tuple(image_shape), "(C, H, W)")
        c, h, w = image_shape
        multiple = 2 ** (scales - 1)
        if h % multiple or w % multiple:
            raise check.error(
                "scales",
                f"{scales} for image_shape {tuple(image_shape)}",
                f"a height and width that {multiple} divides",
            )

        def coupling(channels: int, hidden: int, mask: str, flip: bool) -> list:
            seen, changed = (channels, channels) if mask == "checkerboard" else (channels // 2, channels // 2)
            net = ResidualNetwork(seen, 2 * changed, hidden, blocks)
            return [
                AffineCoupling(
                    net, mask=mask, flip=flip, scale="tanh", h_order="scale_shift", num_features=changed
                ),
                BatchNorm(channels, momentum),
            ]

        flows, splits = [], []
        for scale in range(scales):
            last = scale == scales - 1
            layers = [
                m for i in range(4 if last else 3) for m in coupling(c, hidden, "checkerboard", i % 2 == 1)
            ]
            if not last:
                layers.append(Squeeze("space"))  # halves are the rows of a block, which the checkerboards mix
                c, h, w, hidden = 4 * c, h // 2, w // 2, 2 * hidden
                layers += [m for i in range(3) for m in coupling(c, hidden, "halves", i % 2 == 1)]
                layers.append(Permute(c, _diagonals_first(c)))
                splits.append(Split(c, prior="standard"))
                c //= 2
            flows.append(Sequential(*layers, reversible=reversible, checkpoint_every=checkpoint_every))
        super().__init__(
            image_shape,
            LogitDequantize(n_bits),
            flows,
            splits,
            GaussianPrior((c, h, w), classes),
            classes,
            config,
        )


def _diagonals_first(channels: int) -> list[int]:
    """From the squeeze order "space" to "realnvp": of each block the pixels 00 and 11, which stay, before 01 and 10."""
    size = channels // 4
    return [i for pixel in (0, 3, 1, 2) for i in range(pixel * size, (pixel + 1) * size)]
