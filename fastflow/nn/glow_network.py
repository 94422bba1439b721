"""Glow's coupling network."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fastflow import ops
from fastflow.nn.actnorm import ActNorm
from fastflow.reversible import has_hooks

LOGS_FACTOR = 3.0  # of the last convolution's log scale: it learns faster for it


def _scaled(weight: Tensor, log_scale: Tensor, bias: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    """:func:`fastflow.ops.scaled_weight` where its kernel runs; on the CPU three small operations take less time than an op's way through
    Python does, and a compiler fuses them with what is around."""
    if weight.is_cuda and not torch.compiler.is_compiling():
        return ops.scaled_weight(weight, log_scale, bias, factor)
    scale = (factor * log_scale).exp()
    return weight * scale.view(-1, 1, 1, 1), bias * scale


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
        weight, bias = _scaled(self.conv.weight, self.actnorm.log_scale, self.actnorm.bias, 1.0)
        return F.conv2d(x, weight, bias, padding=self.conv.padding)


class ZeroConv2d(nn.Module):
    r"""A 3x3 convolution that starts at zero, times :math:`e^{3 l}` with l learned per channel (Glow's published code)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(out_channels, in_channels, 3, 3))
        self.bias = nn.Parameter(torch.zeros(out_channels))
        self.logs = nn.Parameter(torch.zeros(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = _scaled(self.weight, self.logs, self.bias, LOGS_FACTOR)
        return F.conv2d(x, weight, bias, padding=1)

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
        if not self._runs_as_one():
            return super().forward(x)
        first, _, second, _, last = self
        parameters = (
            *(first.conv.weight, first.actnorm.log_scale, first.actnorm.bias),
            *(second.conv.weight, second.actnorm.log_scale, second.actnorm.bias),
            *(last.weight, last.logs, last.bias),
        )
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) and x.dtype != torch.float64 else x.dtype
        return _Network.apply(x, dtype, *parameters) if torch.is_grad_enabled() else _forward(x, dtype, *parameters)[0]

    def _runs_as_one(self) -> bool:
        """Whether the network is the one of above as it stands: not one that is compiled, which fuses by itself, nor one that has been
        changed or is listened to, nor one yet to be initialised."""
        kinds = (ActNormConv2d, nn.ReLU, ActNormConv2d, nn.ReLU, ZeroConv2d)
        if torch.compiler.is_compiling() or tuple(map(type, self)) != kinds or any(has_hooks(m) or "forward" in vars(m) for m in self):
            return False
        norms = (self[0].actnorm, self[2].actnorm)
        return not self.training or all(norm._initialized for norm in norms)


_FACTORS = (1.0, 1.0, LOGS_FACTOR)


def _forward(x: Tensor, dtype: torch.dtype, *parameters: Tensor) -> tuple[Tensor, ...]:
    """The network's output, and what its derivative needs: the input and the scaled weight of each layer."""
    a, inputs, weights = x.to(dtype), [], []
    for i, factor in enumerate(_FACTORS):
        weight, bias = _scaled(*parameters[3 * i : 3 * i + 3], factor)
        weights.append(weight.to(dtype))
        inputs.append(a)
        a = F.conv2d(a, weights[-1], bias.to(dtype), padding=weight.shape[2] // 2)
        if i < len(_FACTORS) - 1:
            a.relu_()
    return a, *inputs, *weights


class _Network(torch.autograd.Function):
    """The network as one node of the graph: autograd would have some thirty, most of them for scaling weights, and a new tensor for
    the gradient behind each ReLU."""

    @staticmethod
    def forward(ctx, x: Tensor, dtype: torch.dtype, *parameters: Tensor) -> Tensor:
        y, *kept = _forward(x, dtype, *parameters)
        ctx.save_for_backward(*kept, *parameters)
        ctx.dtype_of_x = x.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        n = len(_FACTORS)
        inputs, weights, parameters = ctx.saved_tensors[:n], ctx.saved_tensors[n : 2 * n], ctx.saved_tensors[2 * n :]
        gradients: list[Tensor | None] = []
        for i in reversed(range(n)):
            layer, wanted = parameters[3 * i : 3 * i + 3], any(ctx.needs_input_grad[2 + 3 * i : 5 + 3 * i])
            pad = layer[0].shape[2] // 2
            dx, dweight, dbias = torch.ops.aten.convolution_backward(
                *(dy, inputs[i], weights[i], [len(layer[2])], [1, 1], [pad, pad], [1, 1], False, [0, 0], 1),
                [i > 0 or ctx.needs_input_grad[0], wanted, wanted],
            )
            found = (None,) * 3
            if wanted:
                dweight, dbias = dweight.to(layer[0].dtype), dbias.to(layer[2].dtype)
                found = torch.ops.fastflow.scaled_weight_backward.default(*layer, _FACTORS[i], dweight, dbias)
            gradients = [*found, *gradients]
            if i:
                dy = torch.ops.aten.threshold_backward.grad_input(dx, inputs[i], 0, grad_input=dx)
        return None if dx is None else dx.to(ctx.dtype_of_x), None, *gradients
