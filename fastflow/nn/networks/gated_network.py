"""Gated convolutional coupling network of the UvA tutorial on image flows."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastflow import validation


def concat_elu(x: Tensor) -> Tensor:
    r"""Concatenated ELU, :math:`[\operatorname{elu}(x), \operatorname{elu}(-x)]` along the channels.

    Source: PixelCNN++, arXiv:1701.05517. Shape: ``[N, C, ...]`` to ``[N, 2C, ...]``.
    """
    return torch.cat([F.elu(x), F.elu(-x)], dim=1)


class ChannelLayerNorm(nn.LayerNorm):
    """Layer normalization over the channels of each position of an image ``[N, C, H, W]``."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class GatedBlock(nn.Module):
    r"""Gated residual block :math:`x + v \sigma(g)`, then layer normalization; two convolutions give [v, g].

    With ``pre_activation``, concatenated ELU precedes both convolutions, otherwise only the second one.

    Shape: ``[N, channels, H, W]`` to the same.
    """

    def __init__(self, channels: int, pre_activation: bool = False) -> None:
        super().__init__()
        self.pre_activation = pre_activation
        self.conv_in = nn.Conv2d(channels * (2 if pre_activation else 1), channels, 3, padding=1)
        self.conv_out = nn.Conv2d(2 * channels, 2 * channels, 1)
        self.norm = ChannelLayerNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.conv_in(concat_elu(x) if self.pre_activation else x)
        value, gate = self.conv_out(concat_elu(hidden)).chunk(2, dim=1)
        return self.norm(torch.addcmul(x, value, torch.sigmoid(gate)))


class GatedNetwork(nn.Module):
    """Coupling network of gated residual blocks, between a 3x3 convolution and a zero-initialized one.

    Source: the UvA tutorial on image flows, after Flow++ (arXiv:1902.00275, section 3.3).

    Args:
        in_channels: number of channels of x and, if one is given, of the context together.
        out_channels: number of output channels.
        hidden: number of channels inside.
        blocks: number of gated blocks.
        pre_activation: apply concatenated ELU to the input of each block before its first convolution, which
            then has ``2 * hidden`` input channels (pre-activation, arXiv:1603.05027).

    Shape: x ``[N, C, H, W]``; context ``[N, in_channels - C, H, W]`` or None; output
    ``[N, out_channels, H, W]``.
    Raises ValueError unless ``pre_activation`` is a bool and all other arguments are positive integers.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        hidden: int = 32,
        blocks: int = 3,
        pre_activation: bool = False,
    ) -> None:
        super().__init__()
        validation.positive_ints(
            in_channels=in_channels, out_channels=out_channels, hidden=hidden, blocks=blocks
        )
        validation.boolean("pre_activation", pre_activation)
        self.conv_in = nn.Conv2d(in_channels, hidden, 3, padding=1)
        self.blocks = nn.ModuleList(GatedBlock(hidden, pre_activation) for _ in range(blocks))
        self.conv_out = nn.Conv2d(2 * hidden, out_channels, 3, padding=1)
        for p in self.conv_out.parameters():
            nn.init.zeros_(p)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        x = self.conv_in(x if context is None else torch.cat([x, context], dim=1))
        for block in self.blocks:
            x = block(x)
        return self.conv_out(concat_elu(x))
