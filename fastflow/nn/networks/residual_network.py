"""RealNVP's coupling network."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class WeightNormConv2d(nn.Conv2d):
    r"""A convolution with weight :math:`g\, v / \lVert v \rVert`, g for each output channel (arXiv:1602.07868, eq. 2); v is ``weight``.

    torch's parametrization of a convolution is the same, but cannot be pickled.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, bias: bool = False) -> None:
        super().__init__(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=bias)
        self.g = nn.Parameter(self._norm().detach())

    def _norm(self) -> Tensor:
        return torch.linalg.vector_norm(self.weight, dim=(1, 2, 3), keepdim=True)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight * (self.g / self._norm()), self.bias, padding=self.padding)


class ResidualBlock(nn.Sequential):
    """Batch norm, ReLU, 3x3 convolution, twice, beside the identity."""

    def __init__(self, channels: int) -> None:
        super().__init__(
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
            WeightNormConv2d(channels, channels, 3),
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
            WeightNormConv2d(channels, channels, 3, bias=True),
        )

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for layer in self:
            y = layer(y)
        return x + y


class ResidualNetwork(nn.Module):
    """Residual blocks with batch norm and weight norm (RealNVP, arXiv:1605.08803, sections 3.7 and 4.1), whose outputs are summed.

    The input is normalised and seen with both signs, ``relu([x, -x])``, before a 3x3 convolution; a 1x1 convolution takes what each block
    gives to a sum, and a last one, whose scale starts at zero, gives the result.

    Args:
        in_channels, out_channels: of images ``[N, in_channels, H, W]`` and of the result.
        hidden: channels inside.
        blocks: number of residual blocks.
    """

    def __init__(self, in_channels: int, out_channels: int, hidden: int = 64, blocks: int = 8) -> None:
        super().__init__()
        self.norm_in = nn.BatchNorm2d(in_channels)
        self.conv_in = WeightNormConv2d(2 * in_channels, hidden, 3, bias=True)
        self.blocks = nn.ModuleList(ResidualBlock(hidden) for _ in range(blocks))
        self.skips = nn.ModuleList(WeightNormConv2d(hidden, hidden, 1, bias=True) for _ in range(blocks + 1))
        self.norm_out = nn.BatchNorm2d(hidden)
        self.conv_out = WeightNormConv2d(hidden, out_channels, 1, bias=True)
        nn.init.zeros_(self.conv_out.g)
        nn.init.zeros_(self.conv_out.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm_in(x)
        x = self.conv_in(torch.relu(torch.cat([x, -x], dim=1)))
        total = self.skips[0](x)
        for block, skip in zip(self.blocks, self.skips[1:], strict=True):
            x = block(x)
            total = total + skip(x)
        return self.conv_out(torch.relu(self.norm_out(total)))
