"""Coupling network of RealNVP."""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastflow import validation
from fastflow.nn.networks.context import with_context
from fastflow.state_from_data import takes_state_from_data


class WeightNormConv2d(nn.Conv2d):
    r"""Weight-normalized convolution, :math:`w = g\, v / \lVert v \rVert` with one g per output channel.

    Source: arXiv:1602.07868, eq. 2. v is the parameter ``weight``.
    ``torch.nn.utils.parametrizations.weight_norm`` computes the same, but its modules cannot be pickled.

    Shape: ``[N, in_channels, H, W]`` to ``[N, out_channels, H, W]``; ``kernel_size`` is odd.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, bias: bool = False) -> None:
        super().__init__(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=bias)
        self.g = nn.Parameter(self._norm().detach())

    def _norm(self) -> Tensor:
        return torch.linalg.vector_norm(self.weight, dim=(1, 2, 3), keepdim=True)

    def forward(self, input: Tensor) -> Tensor:
        return F.conv2d(input, self.weight * (self.g / self._norm()), self.bias, padding=self.padding)


class BatchNorm2d(nn.BatchNorm2d):
    """Batch normalization of a network, whose running statistics move only where state may come from data.

    Within ``torch.no_grad`` and in the generating direction, training mode normalizes by the batch as ever. An
    empty batch is normalized by the running statistics.
    """

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or takes_state_from_data(self.training) and input.numel():
            return super().forward(input)
        by_batch = input.numel() > 0
        statistics = (None, None) if by_batch else (self.running_mean, self.running_var)
        return F.batch_norm(input, *statistics, self.weight, self.bias, by_batch, 0.0, self.eps)


class ResidualBlock(nn.Sequential):
    """Residual block: twice batch norm, ReLU and 3x3 convolution, plus the identity."""

    def __init__(self, channels: int) -> None:
        super().__init__(
            BatchNorm2d(channels),
            nn.ReLU(inplace=True),
            WeightNormConv2d(channels, channels, 3),
            BatchNorm2d(channels),
            nn.ReLU(inplace=True),
            WeightNormConv2d(channels, channels, 3, bias=True),
        )

    def forward(self, input: Tensor) -> Tensor:
        y = input
        for layer in self:
            y = layer(y)
        return input + y


class ResidualNetwork(nn.Module):
    """Coupling network of RealNVP: residual blocks with batch norm and weight norm, and skip connections.

    Source: RealNVP, arXiv:1605.08803, sections 3.7 and 4.1. A 3x3 convolution takes the normalized input with
    both signs, ``relu([x, -x])``. Each block's output is added to a sum through a 1x1 convolution. A last 1x1
    convolution, whose scale is initialized to zero, maps the sum to the output.

    Args:
        in_channels: number of input channels.
        out_channels: number of output channels.
        hidden: number of channels inside.
        blocks: number of residual blocks.
        context_features: number of channels of the context, which is concatenated to the normalized input. A
            vector is repeated at every position, an image larger than x is squeezed to its size first. None:
            no context.

    Shape: x ``[N, in_channels, H, W]``; context ``[N, context_features]``, an image, or None; output
    ``[N, out_channels, H, W]``.
    Raises ValueError unless all arguments are positive integers, and for another context.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        hidden: int = 64,
        blocks: int = 8,
        context_features: int | None = None,
    ) -> None:
        super().__init__()
        validation.positive_ints(
            in_channels=in_channels, out_channels=out_channels, hidden=hidden, blocks=blocks
        )
        validation.positive_int("context_features", context_features, optional=True)
        self.context_features = context_features
        self.norm_in = BatchNorm2d(in_channels)
        # the context is not normalized: one that is the same for a whole batch would become 0
        self.conv_in = WeightNormConv2d(2 * (in_channels + (context_features or 0)), hidden, 3, bias=True)
        self.blocks = nn.ModuleList(ResidualBlock(hidden) for _ in range(blocks))
        self.skips = nn.ModuleList(WeightNormConv2d(hidden, hidden, 1, bias=True) for _ in range(blocks + 1))
        self.norm_out = BatchNorm2d(hidden)
        self.conv_out = WeightNormConv2d(hidden, out_channels, 1, bias=True)
        nn.init.zeros_(self.conv_out.g)
        nn.init.zeros_(cast("Tensor", self.conv_out.bias))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        x = with_context(self.norm_in(x), context, self.context_features)
        x = self.conv_in(torch.relu(torch.cat([x, -x], dim=1)))
        total = self.skips[0](x)
        for block, skip in zip(self.blocks, self.skips[1:], strict=True):
            x = block(x)
            total = total + skip(x)
        return self.conv_out(torch.relu(self.norm_out(total)))
