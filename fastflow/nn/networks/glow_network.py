"""Coupling network of Glow."""

import math
from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from fastflow import ops, validation
from fastflow.nn.actnorm import ActNorm
from fastflow.nn.networks.context import check_features, with_context
from fastflow.nn.networks.fastest import Setting, fastest_way, gpu_name, is_fused_on_cpu
from fastflow.nn.networks.folded_weights import folded
from fastflow.reversible import has_hooks
from fastflow.state_from_data import state_from_data
from fastflow.transforms import in_transform

NETWORKS = ("plain", "fused", "auto")
FUSED_ARGS = 6  # weights and biases of the op; three convolutions have fewer shared arguments


class ActNormConv2d(nn.Module):
    r"""Convolution followed by :class:`ActNorm` and, if asked, ReLU, which take one pass over its output.

    :math:`e^{s} (w * x + b)` (Glow, arXiv:1807.03039, section 3.1). The weight w is initialized from
    :math:`N(0, 0.05^2)`.

    Shape: ``[N, in_channels, H, W]`` to ``[N, out_channels, H, W]``; ``kernel_size`` is odd.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int) -> None:
        super().__init__()
        validation.positive_ints(in_channels=in_channels, out_channels=out_channels, kernel_size=kernel_size)
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False)
        nn.init.normal_(self.conv.weight, std=0.05)
        self.actnorm = ActNorm(out_channels)

    def forward(self, x: Tensor, weight: Tensor | None = None, relu: bool = False) -> Tensor:
        """The output; ``weight`` is the convolution's weight if it is cast already."""
        if self.actnorm._pending:
            self.actnorm.initialize(self.conv(x))
        weight = self.conv.weight if weight is None else weight
        bias, log_scale = self.actnorm.bias, self.actnorm.log_scale
        if relu and not torch.compiler.is_compiling():
            y = F.conv2d(x, weight, padding=self.conv.padding)
            return ops.bias_relu(y, bias, log_scale, inplace=not in_transform())
        # backward does not need this output, so an activation may write over it
        y = _folded_convolution(x, weight, bias, log_scale)
        return y.relu_() if relu else y


class ZeroConv2d(nn.Module):
    r"""Zero-initialized 3x3 convolution times :math:`e^{3 l}`, l learned per output channel (openai/glow).

    Shape: ``[N, in_channels, H, W]`` to ``[N, out_channels, H, W]``.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        validation.positive_ints(in_channels=in_channels, out_channels=out_channels)
        self.weight = nn.Parameter(torch.zeros(out_channels, in_channels, 3, 3))
        self.bias = nn.Parameter(torch.zeros(out_channels))
        self.logs = nn.Parameter(torch.zeros(out_channels))

    def forward(self, x: Tensor, weight: Tensor | None = None, log_scale: Tensor | None = None) -> Tensor:
        """The output; ``weight`` and ``log_scale``, 3 l, if these are computed already."""
        weight = self.weight if weight is None else weight
        log_scale = 3 * self.logs if log_scale is None else log_scale
        if torch.compiler.is_compiling():
            return _folded_convolution(x, weight, self.bias, log_scale)
        y = F.conv2d(x, weight, padding=1)
        return ops.bias_relu(y, self.bias, log_scale, relu=False, inplace=not in_transform())

    def extra_repr(self) -> str:
        return f"{self.weight.shape[1]}, {self.weight.shape[0]}"


def _folded_convolution(x: Tensor, weight: Tensor, bias: Tensor, log_scale: Tensor) -> Tensor:
    """:math:`e^{s} (w * x + b)` as one convolution, in plain PyTorch, which a compiler fuses with its weights."""
    scale = log_scale.exp()
    return F.conv2d(x, weight * scale.view(-1, 1, 1, 1), bias * scale, padding=weight.shape[2] // 2)


LAYERS = [ActNormConv2d, nn.ReLU, ActNormConv2d, nn.ReLU, ZeroConv2d]
Convolutions = tuple[ActNormConv2d, ActNormConv2d, ZeroConv2d]


class GlowNetwork(nn.Sequential):
    """Coupling network of Glow: 3x3, ActNorm, ReLU, 1x1, ActNorm, ReLU, zero-initialized 3x3 convolution.

    Source: openai/glow, function `f` of model.py.

    Args:
        in_channels: number of input channels; 0 with ``context_features``: the output depends on the context only.
        out_channels: number of output channels.
        hidden: number of channels inside.
        network: ``"plain"``: three convolutions; ``"fused"``: one op, :func:`fastflow.ops.glow_network`;
            ``"auto"``: on a GPU, the op where the package's table has it as the fastest way for this GPU, dtype
            and shape; on a CPU, the op in float32 and float64, if the extension has AVX2 or AVX-512 for it;
            otherwise three convolutions. Results differ by rounding. If a layer was exchanged or has hooks, and
            under torch.compile, it is always three convolutions.
        context_features: number of channels of the context, which is concatenated to the input. A vector is
            repeated at every position, an image larger than x is squeezed to its size first. None: no context.

    Shape: x ``[N, in_channels, H, W]``; context ``[N, context_features]``, an image, or None; output
    ``[N, out_channels, H, W]``.
    Raises ValueError for any other argument or context.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        hidden: int = 512,
        network: str = "auto",
        context_features: int | None = None,
    ) -> None:
        check_features("in_channels", in_channels, context_features)
        validation.positive_ints(out_channels=out_channels, hidden=hidden)
        validation.one_of("network", network, NETWORKS)
        relu = nn.ReLU(inplace=True)  # shared: each module takes some 3 KB per step
        super().__init__(
            ActNormConv2d(in_channels + (context_features or 0), hidden, 3),
            relu,
            ActNormConv2d(hidden, hidden, 1),
            relu,
            ZeroConv2d(hidden, out_channels),
        )
        self.network, self.context_features = network, context_features

    @torch.no_grad()
    def scale_outputs(self, factor: float) -> None:
        """Set the learned factor :math:`e^{3 l}` of all outputs; with the last weights at 0, they stay as they are."""
        last = cast("ZeroConv2d", self[-1])
        last.bias.mul_((3 * last.logs).exp() / factor)
        last.logs.fill_(math.log(factor) / 3)

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride] # x, as all coupling networks name it
        self, x: Tensor, context: Tensor | None = None, shared_args: Sequence[Tensor] = ()
    ) -> Tensor:
        """The output; ``shared_args`` is the network's entry of ``network_args_of``, if it is computed."""
        x = with_context(x, context, self.context_features)
        layers = _convolutions(self)
        if layers is None:  # a layer was exchanged, or watches its input
            for layer in self:
                x = layer(x)
            return x
        if not shared_args and self._is_fused(layers, x.device, x.shape[0] * ops.positions(x)):
            if _pending(layers):
                _initialize(layers, x)
            shared_args = _fused_args_of([layers], x.device)[0]
        if len(shared_args) == FUSED_ARGS:
            x = x.to(shared_args[0].dtype) if _autocast_dtype(x.device) else x
            return ops.glow_network(x, *shared_args, tf32=_tf32(x))
        first, second, last = layers
        log_scale = shared_args[0] if shared_args else None
        weights = shared_args[1:] or (None, None, None)
        x = first(x, weight=weights[0], relu=True)
        x = second(x, weight=weights[1], relu=True)
        return last(x, weight=weights[2], log_scale=log_scale)

    def _is_fused(self, layers: Convolutions, device: torch.device, pixels: int) -> bool:
        """Whether the network is one op, for a batch of so many pixels, with and without gradients alike.

        Backward of a reversible chain computes the network with gradients again, and needs forward's bits.
        """
        if self.network == "plain" or torch.compiler.is_compiling():
            return False
        if self.network == "auto" and not self._is_fastest_fused(layers, device, pixels):
            return False
        kernels = [layer.conv.kernel_size for layer in layers[:2]]
        return kernels == [(3, 3), (1, 1)] and not any(map(has_hooks, layers))

    def _is_fastest_fused(self, layers: Convolutions, device: torch.device, pixels: int) -> bool:
        dtype, gpu = _dtype_of_networks(layers, device), gpu_name(device)
        if gpu is None:
            return device.type == "cpu" and is_fused_on_cpu(dtype)
        # not by the weights: a parametrization computes them at each access
        first, *_, last = layers
        channels = first.conv.in_channels, first.actnorm.num_features, last.bias.numel()
        mode = "training" if self.training else "evaluation"
        setting = Setting(gpu, str(dtype).removeprefix("torch."), *channels, mode)
        return fastest_way(setting, pixels) == "fused"


def _convolutions(network: GlowNetwork) -> Convolutions | None:
    """The convolutions; None if a layer was exchanged, or if a ReLU must be called."""
    layers: list[Any] = list(network._modules.values())
    if [type(layer) for layer in layers] != LAYERS or any(map(has_hooks, layers[1:4:2])):
        return None
    first, _, second, _, last = layers
    return first, second, last


def _pending(layers: Convolutions) -> bool:
    """Whether the next batch initializes an ActNorm."""
    return any(layer.actnorm._pending for layer in layers[:2])


@torch.no_grad()
def _initialize(layers: Convolutions, x: Tensor) -> None:
    with state_from_data(True):  # gradients are disabled here; the caller has asked
        for layer in layers[:2]:
            x = layer(x, relu=True)


def _weights(layers: Convolutions) -> tuple[Tensor, Tensor, Tensor]:
    first, second, last = layers
    return first.conv.weight, second.conv.weight, last.weight


def _autocast_dtype(device: torch.device) -> torch.dtype | None:
    """Autocast's dtype on a device if it is enabled."""
    kind = device.type
    autocast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)  # "meta" has none
    return torch.get_autocast_dtype(kind) if autocast else None


def _dtype_of_networks(layers: Convolutions, device: torch.device) -> torch.dtype:
    """The dtype of a network's products: autocast's, which leaves float64 as it is, or its weights'."""
    own = layers[-1].weight.dtype
    return own if own == torch.float64 else _autocast_dtype(device) or own


def _tf32(x: Tensor) -> bool:
    """Whether products of float32 are in TF32, as those of PyTorch's convolutions on this device."""
    return x.dtype == torch.float32 and x.is_cuda and torch.backends.cudnn.allow_tf32


def network_args_of(
    networks: Sequence[nn.Module], device: torch.device, pixels: int
) -> list[tuple[Tensor, ...]]:
    """Arguments of the forward methods of several networks, for all networks at once.

    For each :class:`GlowNetwork` these are 3 l of its last convolution and, under autocast, its three weights
    in autocast's dtype. For one that is fused they are the weights and biases of the op. Other networks, and
    networks of which only some are fused, have none.

    Args:
        pixels: number of pixels of the batch, N H W.
    """
    if torch.compiler.is_compiling():
        return [()] * len(networks)
    layers, fused = [], []
    for network in networks:
        if (
            type(network) is not GlowNetwork
            or network._compiled_call_impl is not None
            or (each := _convolutions(network)) is None
        ):
            return [()] * len(networks)
        layers.append(each)
        fused.append(network._is_fused(each, device, pixels))
    if any(fused):
        at_once = all(fused) and _alike(layers) and not any(map(_pending, layers))
        return _fused_args_of(layers, device) if at_once else [()] * len(networks)
    log_scales = (3 * torch.stack([last.logs for *_, last in layers])).unbind()
    weights = [w for each in layers for w in _weights(each)]
    autocast_dtype = _autocast_dtype(device)
    if autocast_dtype is None or any(w.dtype != torch.float32 for w in weights):
        return [(s,) for s in log_scales]
    if in_transform():
        weights = [w.to(autocast_dtype) for w in weights]
    else:
        weights = _Cast.apply(autocast_dtype, *weights)
    return [(s, *weights[3 * i : 3 * i + 3]) for i, s in enumerate(log_scales)]


def _alike(layers: Sequence[Convolutions]) -> bool:
    """Whether the weights of several networks can be stacked."""
    return len({tuple((w.shape, w.dtype, w.device) for w in _weights(each)) for each in layers}) == 1


def _fused_args_of(layers: Sequence[Convolutions], device: torch.device) -> list[tuple[Tensor, ...]]:
    """w1, b1, w2, b2, w3, b3 of :func:`fastflow.ops.glow_network` for each network."""
    first, second, last = zip(*layers, strict=True)
    weights = zip(*map(_weights, layers), strict=True)
    biases = [[layer.actnorm.bias for layer in kind] for kind in (first, second)]
    log_scales = [[layer.actnorm.log_scale for layer in kind] for kind in (first, second)]
    biases.append([layer.bias for layer in last])
    log_scales.append([layer.logs for layer in last])
    dtype = _dtype_of_networks(layers[0], device)
    w1, w2, w3, b1, b2, b3 = folded(list(weights), biases, log_scales, (1, 1, 3), dtype)
    return list(zip(w1, b1, w2, b2, w3, b3, strict=True))


class _Context(FunctionCtx):
    dtypes: list[torch.dtype]


class _Cast(torch.autograd.Function):
    """Casts tensors to a dtype, all at once, and their gradients back."""

    @staticmethod
    def forward(ctx: _Context, dtype: torch.dtype, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.dtypes = [t.dtype for t in tensors]
        return _cast(tensors, [dtype] * len(tensors))

    @staticmethod
    def backward(ctx: _Context, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph=True
            return None, *(None if g is None else g.to(d) for g, d in zip(gradients, ctx.dtypes, strict=True))
        given = {i: g for i, g in enumerate(gradients) if g is not None}
        cast = dict(zip(given, _cast(given.values(), [ctx.dtypes[i] for i in given]), strict=True))
        return None, *(cast.get(i) for i in range(len(gradients)))


def _cast(tensors: Iterable[Tensor], dtypes: Iterable[torch.dtype]) -> tuple[Tensor, ...]:
    tensors = tuple(tensors)
    found = tuple(torch.empty_like(t, dtype=dtype) for t, dtype in zip(tensors, dtypes, strict=True))
    if found:
        torch._foreach_copy_(found, tensors)  # pyright: ignore[reportPrivateImportUsage] # no public name does it
    return found
