"""Glow's coupling network."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastflow.nn.actnorm import ActNorm


class ActNormConv2d(nn.Module):
    r"""A convolution followed by :class:`ActNorm`, computed as one: :math:`e^{s} (w * x + b) = (e^{s} w) * x + e^{s} b`."""

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
    r"""A 3x3 convolution that starts at zero, times :math:`e^{3 l}` with l learned per channel (Glow's published code)."""

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
    """Glow's coupling network: 3x3, ActNorm, ReLU, 1x1, ActNorm, ReLU, zero-initialised 3x3 (as in openai/glow, `f` of model.py).

    Shape: ``[N, in_channels, H, W]`` to ``[N, out_channels, H, W]``.
    """

    def __init__(self, in_channels: int, out_channels: int, hidden: int = 512) -> None:
        relu = nn.ReLU(inplace=True)  # one for both: a module is some 3 KB, of each step
        super().__init__(
            ActNormConv2d(in_channels, hidden, 3),
            relu,
            ActNormConv2d(hidden, hidden, 1),
            relu,
            ZeroConv2d(hidden, out_channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        for (
            layer
        ) in self:  # as nn.Sequential's, which torch 2.11 compiles in three parts since it is torch's own
            x = layer(x)
        return x
