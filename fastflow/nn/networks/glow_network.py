"""Coupling network of Glow."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastflow.nn.actnorm import ActNorm


class ActNormConv2d(nn.Module):
    r"""Convolution followed by :class:`ActNorm`, computed as one convolution.

    :math:`e^{s} (w * x + b) = (e^{s} w) * x + e^{s} b` (Glow, arXiv:1807.03039, section 3.1). The weight w is
    initialized from :math:`N(0, 0.05^2)`.

    Shape: ``[N, in_channels, H, W]`` to ``[N, out_channels, H, W]``; ``kernel_size`` is odd.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False)
        nn.init.normal_(self.conv.weight, std=0.05)
        self.actnorm = ActNorm(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        if self.training and not self.actnorm._initialized:
            self.actnorm.initialize(self.conv(x))
        scale = self.actnorm.log_scale.exp()
        weight = self.conv.weight * scale.view(-1, 1, 1, 1)
        return F.conv2d(x, weight, self.actnorm.bias * scale, padding=self.conv.padding)


class ZeroConv2d(nn.Module):
    r"""Zero-initialized 3x3 convolution times :math:`e^{3 l}`, l learned per output channel (openai/glow).

    Shape: ``[N, in_channels, H, W]`` to ``[N, out_channels, H, W]``.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(out_channels, in_channels, 3, 3))
        self.bias = nn.Parameter(torch.zeros(out_channels))
        self.logs = nn.Parameter(torch.zeros(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        scale = (3 * self.logs).exp()
        return F.conv2d(x, self.weight * scale.view(-1, 1, 1, 1), self.bias * scale, padding=1)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[1]}, {self.weight.shape[0]}"


class GlowNetwork(nn.Sequential):
    """Coupling network of Glow: 3x3, ActNorm, ReLU, 1x1, ActNorm, ReLU, zero-initialized 3x3 convolution.

    Source: openai/glow, function `f` of model.py.

    Args:
        in_channels: number of input channels.
        out_channels: number of output channels.
        hidden: number of channels inside.

    Shape: ``[N, in_channels, H, W]`` to ``[N, out_channels, H, W]``.
    """

    def __init__(self, in_channels: int, out_channels: int, hidden: int = 512) -> None:
        relu = nn.ReLU(inplace=True)  # shared: each module takes some 3 KB per step
        super().__init__(
            ActNormConv2d(in_channels, hidden, 3),
            relu,
            ActNormConv2d(hidden, hidden, 1),
            relu,
            ZeroConv2d(hidden, out_channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        # same as nn.Sequential's own forward, which torch 2.11 compiles in three parts
        for layer in self:
            x = layer(x)
        return x
