"""The three MNIST flows of the UvA tutorial on image flows."""

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastflow import validation
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
from fastflow.nn.networks.builder import NetworkBuilder, built

Variant = Literal["simple", "vardeq", "multiscale"]
VARIANTS = get_args(Variant)
_SHAPE = (1, 28, 28)


@dataclass(frozen=True)
class MNISTFlowConfig(ModelConfig):
    """Options of :class:`MNISTFlow`, documented by :func:`mnist_flow`."""

    variant: Variant = "multiscale"
    reversible: bool = True
    pre_activation: bool = False
    depth: int = 8
    width: int = 32
    blocks: int = 3
    alpha: float = 1e-5
    network: NetworkBuilder | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        validation.even_int("width", self.width, ", the dequantization's networks have half of it")
        if self.variant == "multiscale" and self.depth % 4:
            raise validation.argument_error("depth", self.depth, "a multiple of 4 for 'multiscale'")


class MNISTFlow(Model):
    """One of the three MNIST flows of P. Lippe's tutorial (UvA Deep Learning, tutorial 11).

    Args:
        variant: ``"simple"``, ``"vardeq"`` or ``"multiscale"``, see :func:`mnist_flow`.
        reversible: recompute activations in backward instead of storing them.
        pre_activation: concatenated ELU before both convolutions of a gated block, as published since 2022.
        depth: number of couplings of the flow; for ``"multiscale"`` a multiple of 4, of which a quarter are at
            28x28, a quarter at 14x14 and half at 7x7.
        width: number of channels inside the networks at 28x28, even. Networks of the dequantization have half as
            many, at 14x14 one and a half times as many, and at 7x7 twice as many.
        blocks: number of gated blocks of each network.
        alpha: alpha of the logit, between 0 and 1. See :class:`fastflow.nn.LogitDequantize`.
        network: a function of (in_channels, out_channels) that returns the network of one coupling, a module;
            None: the gated network. With a function, ``width``, ``blocks`` and ``pre_activation`` have no effect.

    Shape: x uint8 ``[N, 1, 28, 28]``.
    Raises ValueError for any other argument.
    """

    @takes_fields_of(MNISTFlowConfig)
    def __init__(self, config: MNISTFlowConfig) -> None:
        def chain(*layers: Flow) -> Sequential:
            return Sequential(*layers, reversible=config.reversible)

        def network(seen: int, parameters: int, hidden: int) -> nn.Module:
            if config.network is not None:
                return built(config.network, seen, parameters)
            return GatedNetwork(seen, parameters, hidden, config.blocks, config.pre_activation)

        def checkerboard(hidden: int, i: int, seen: int = 1) -> AffineCoupling:
            net = network(seen, 2, hidden)
            return AffineCoupling(net, mask="checkerboard", swap_halves=i % 2 == 1, **_FORM)

        def halves(channels: int, hidden: int, i: int) -> _ChannelCoupling:
            return _ChannelCoupling(network(channels, 2 * channels, hidden), channels, i % 2 == 1)

        depth, width = config.depth, config.width
        if config.variant == "simple":
            dequantize = LogitDequantize(alpha=config.alpha, preset="tutorial")
        else:
            noise = chain(*(checkerboard(width // 2, i, seen=2) for i in range(4)))
            dequantize = VariationalDequantize(noise, alpha=config.alpha)
        if config.variant != "multiscale":
            flow = chain(*(checkerboard(width, i) for i in range(depth)))
            super().__init__(_SHAPE, dequantize, [flow], [], GaussianPrior(_SHAPE), None, config.arguments())
            return
        images = [checkerboard(width, i) for i in range(depth // 4)]
        first = chain(*images, Squeeze(), *(halves(4, 3 * width // 2, i) for i in range(depth // 4)))
        second = chain(Squeeze(), *(halves(8, 2 * width, i) for i in range(depth // 2)))
        split, prior = Split(4, prior="standard"), GaussianPrior((8, 7, 7))
        super().__init__(_SHAPE, dequantize, [first, second], [split], prior, None, config.arguments())


def mnist_flow(
    variant: Variant = "multiscale", reversible: bool = True, pre_activation: bool = False, **options: Any
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
        options: ``depth``, ``width``, ``blocks``, ``alpha`` and ``network`` of :class:`MNISTFlow`, whose defaults are
            the tutorial's.

    Shape: x uint8 ``[N, 1, 28, 28]``.
    Raises ValueError for any other argument.

    Example:
        >>> import torch
        >>> from fastflow.models import mnist_flow
        >>> model = mnist_flow("simple")
        >>> model(torch.randint(0, 256, (4, 1, 28, 28), dtype=torch.uint8)).mean().backward()
    """
    return MNISTFlow(variant, reversible, pre_activation, **options)


_FORM: dict[str, Any] = {"scale": "soft_clamp", "affine_order": "shift_first", "params_layout": "scale_shift"}


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
        log_factor: Any = self.log_factor
        return log_factor.exp().chunk(2)[0 if self.swap_halves else 1]


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
