"""The three MNIST flows of the UvA tutorial on image flows."""

from dataclasses import asdict, dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastflow.models.model import Model
from fastflow.models.options import ModelConfig, takes_fields_of
from fastflow.nn import (
    AffineCoupling,
    Flow,
    GatedNetwork,
    GaussianPrior,
    LogitDequantize,
    Sequential,
    Split,
    Squeeze,
    VariationalDequantize,
)

Variant = Literal["simple", "vardeq", "multiscale"]
VARIANTS = get_args(Variant)
_SHAPE = (1, 28, 28)


@dataclass(frozen=True)
class MNISTFlowConfig(ModelConfig):
    """Options of :class:`MNISTFlow`, documented by :func:`mnist_flow`."""

    variant: Variant = "multiscale"
    reversible: bool = True
    pre_activation: bool = False


class MNISTFlow(Model):
    """One of the three MNIST flows of P. Lippe's tutorial (UvA Deep Learning, tutorial 11).

    Args:
        variant: ``"simple"``, ``"vardeq"`` or ``"multiscale"``, see :func:`mnist_flow`.
        reversible: recompute activations in backward instead of storing them.
        pre_activation: concatenated ELU before both convolutions of a gated block, as published since 2022.

    Shape: x uint8 ``[N, 1, 28, 28]``.
    Raises ValueError for another variant and for flags that are not bools.
    """

    @takes_fields_of(MNISTFlowConfig)
    def __init__(self, config: MNISTFlowConfig) -> None:
        def chain(*layers: Flow) -> Sequential:
            return Sequential(*layers, reversible=config.reversible)

        def network(*channels: int) -> GatedNetwork:
            return GatedNetwork(*channels, pre_activation=config.pre_activation)

        def checkerboard(hidden: int, i: int, seen: int = 1) -> AffineCoupling:
            net = network(seen, 2, hidden)
            return AffineCoupling(net, mask="checkerboard", swap_halves=i % 2 == 1, **_FORM)

        def halves(channels: int, hidden: int, i: int) -> _ChannelCoupling:
            return _ChannelCoupling(network(channels, 2 * channels, hidden), channels, i % 2 == 1)

        if config.variant == "simple":
            dequantize = LogitDequantize(alpha=1e-5, preset="tutorial")
        else:
            dequantize = VariationalDequantize(chain(*(checkerboard(16, i, seen=2) for i in range(4))))
        if config.variant != "multiscale":
            flow = chain(*(checkerboard(32, i) for i in range(8)))
            super().__init__(_SHAPE, dequantize, [flow], [], GaussianPrior(_SHAPE), None, asdict(config))
            return
        images = [checkerboard(32, i) for i in range(2)]
        first = chain(*images, Squeeze(), *(halves(4, 48, i) for i in range(2)))
        second = chain(Squeeze(), *(halves(8, 64, i) for i in range(4)))
        split, prior = Split(4, prior="standard"), GaussianPrior((8, 7, 7))
        super().__init__(_SHAPE, dequantize, [first, second], [split], prior, None, asdict(config))


def mnist_flow(
    variant: Variant = "multiscale", reversible: bool = True, pre_activation: bool = False
) -> MNISTFlow:
    r"""Build a flow for MNIST from P. Lippe's tutorial (UvA Deep Learning, tutorial 11).

    Couplings are :math:`(x + t) e^{f \tanh(h / f)}` with learned f. :func:`fastflow.models.load_published`
    loads published weights. Published results of 2020: 1.107, 1.066 and 1.026 bits/dim with 335,128, 379,556
    and 1,062,090 parameters. With ``pre_activation``, the three have 556,312, 628,388 and 1,711,818
    parameters; the published result of ``"simple"`` is 1.078 bits/dim.

    Args:
        variant: ``"simple"``: logit dequantization (alpha 1e-5) and eight checkerboard couplings.
            ``"vardeq"``: variational dequantization with four checkerboard couplings, then the same eight
            couplings. ``"multiscale"``: the same dequantization, two checkerboard couplings at 28x28, two
            channel couplings at 14x14, a split of half the channels, and four channel couplings at 7x7.
        reversible: recompute activations in backward instead of storing them.
        pre_activation: apply concatenated ELU before both convolutions of each gated block, as in the weights
            published since June 2022; False: before the second one only, as in the weights of October 2020.

    Shape: x uint8 ``[N, 1, 28, 28]``.
    Raises ValueError for another variant and for flags that are not bools.

    Example:
        >>> import torch
        >>> from fastflow.models import mnist_flow
        >>> model = mnist_flow("simple")
        >>> model(torch.randint(0, 256, (4, 1, 28, 28), dtype=torch.uint8)).mean().backward()
    """
    return MNISTFlow(variant, reversible, pre_activation)


_FORM = {"scale": "soft_clamp", "affine_order": "shift_first", "params_layout": "scale_shift"}


class _ChannelCoupling(AffineCoupling):
    """Coupling of halves with the tutorial's parameters, which cover all channels."""

    def __init__(self, net: nn.Module, channels: int, swap_halves: bool) -> None:
        super().__init__(
            _Masked(net, channels, swap_halves),
            swap_halves=swap_halves,
            num_scale_factors=channels,
            **_FORM,
        )

    def factor(self, x: Tensor) -> Tensor:
        """Factors of the transformed half."""
        return self.log_factor.exp().chunk(2)[0 if self.swap_halves else 1]


class _Masked(nn.Module):
    """Apply a network over all channels to one half: pad its input with zeros, select its outputs."""

    def __init__(self, net: nn.Module, channels: int, swap_halves: bool) -> None:
        super().__init__()
        self.net, self.swap_halves = net, swap_halves
        half = channels // 2
        self.padding = (0, 0, 0, 0, half, 0) if swap_halves else (0, 0, 0, 0, 0, half)
        self.transformed = 0 if swap_halves else 1

    def forward(self, x: Tensor) -> Tensor:
        scale_or_shift = self.net(F.pad(x, self.padding)).chunk(4, dim=1)
        return torch.cat([scale_or_shift[self.transformed], scale_or_shift[2 + self.transformed]], dim=1)
