"""Networks with a bounded Lipschitz constant: spectral normalization of linear layers and convolutions."""

import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.nn.grad import conv2d_weight

from fastflow import validation
from fastflow.nn.networks.context import checked_context
from fastflow.transforms import in_transform

# largest slope of x sigmoid(x) is 1.0998
SWISH_SLOPE = 1.1
# the estimate of the norm is a lower bound; it stops at a relative gain of TOLERANCE, which leaves at most
# sqrt(TOLERANCE / 2), see docs/maths.md
MARGIN = 1.01
TOLERANCE = 5e-6
KEPT = 1e-7
VECTORS = 8
# power iterations from one estimate to the next
CHUNK = 4
Pull = Callable[[Tensor], Tensor]


class LipSwish(nn.Module):
    r"""LipSwish, :math:`x \sigma(\beta x) / 1.1` with a learned :math:`\beta > 0`; its slope is at most 1.

    Source: residual flows, arXiv:1906.02735, section 3.2. :math:`\beta = \operatorname{softplus}(b)`, and b starts at
    0.5.

    Shape: x and output have the same shape, any.

    Example:
        >>> import torch
        >>> from fastflow import nn as fnn
        >>> y = fnn.LipSwish()(torch.randn(8, 4))
    """

    def __init__(self) -> None:
        super().__init__()
        self.raw_beta = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        beta = F.softplus(self.raw_beta)
        return F.silu(beta * x) * (1 / (SWISH_SLOPE * beta))

    def with_slope(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The output and its derivative by x, both differentiable."""
        beta = F.softplus(self.raw_beta)
        if in_transform() or torch.compiler.is_compiling():
            return _swish(x, beta)
        return _Swish.apply(x, beta)


def _swish(x: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    r""":math:`x s / 1.1` with :math:`s = \sigma(\beta x)`, and its derivative :math:`s (1 + \beta x (1 - s)) / 1.1`."""
    t = beta * x
    s = torch.sigmoid(t)
    return x * s * (1 / SWISH_SLOPE), torch.addcmul(t, t, s, value=-1).add(1) * s * (1 / SWISH_SLOPE)


class _Context(FunctionCtx):
    saved_tensors: tuple[Tensor, Tensor, Tensor, Tensor]


class _Swish(torch.autograd.Function):
    """:func:`_swish` with the gradient of both outputs in few operations, as each reads and writes all activations."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
        t = beta * x
        # silu_backward is the derivative of silu times its first argument
        slope = torch.ops.aten.silu_backward(t.new_full((), 1 / SWISH_SLOPE).expand_as(t), t)
        y = F.silu(t, inplace=True).div_(SWISH_SLOPE * beta)
        ctx.save_for_backward(x, beta, y, slope)
        return y, slope

    @staticmethod
    def backward(ctx: _Context, *cotangents: Tensor) -> tuple[Tensor, Tensor]:
        dy, dslope = cotangents
        x, beta, y, slope = ctx.saved_tensors
        h = (0.5 * beta) * x
        s = torch.tanh(h)  # 2 sigmoid(beta x) - 1
        one = torch.ones_like(beta)
        # beta and x times it are the derivatives of the slope by x and by beta
        bent = torch.addcmul(one, s, s, value=-1) * torch.addcmul(one, h, s, value=-1)
        bent = bent * dslope
        direct = dy * slope
        by_beta = (_dot(x, direct) - _dot(dy, y)) / beta + _dot(x, bent) * (0.5 / SWISH_SLOPE)
        return torch.addcmul(direct, bent, beta * (0.5 / SWISH_SLOPE)), by_beta


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return torch.dot(a.flatten(), b.flatten())


class _Bounded(nn.Module):
    """A linear map whose norm is bounded by ``bound``; subclasses have the map of a weight and its adjoint.

    Buffers: ``direction`` is the derivative of the norm by the weight, and the norm is its inner product with the weight.
    ``vectors`` are orthonormal ones of the domain, near the first singular vectors, from which the next iterations start.
    Several are kept because two singular values that pass each other during training would leave a single vector
    at the smaller one.
    """

    weight: Tensor
    bias: Tensor
    vectors: Tensor
    direction: Tensor

    def _start(self, bound: float, domain: tuple[int, ...], codomain: tuple[int, ...]) -> None:
        self.bound = bound
        n, m = math.prod(domain), math.prod(codomain)
        self.register_buffer("vectors", _orthonormal(torch.randn(min(VECTORS, n, m), *domain)).contiguous())
        self.register_buffer("direction", torch.zeros_like(self.weight, requires_grad=False))

    @abstractmethod
    def _map(self, weight: Tensor, v: Tensor) -> Tensor:
        """The linear map of vectors v."""
        raise NotImplementedError(f"{type(self).__name__} has no _map")

    @abstractmethod
    def _transposed(self, weight: Tensor) -> Tensor:
        """The weight whose map is the adjoint."""
        raise NotImplementedError(f"{type(self).__name__} has no _transposed")

    @abstractmethod
    def _derivative(self, u: Tensor, v: Tensor) -> Tensor:
        """The derivative of the inner product of u and the map of v, by the weight."""
        raise NotImplementedError(f"{type(self).__name__} has no _derivative")

    @abstractmethod
    def with_weight(self, weight: Tensor, x: Tensor) -> Tensor:
        """The output with a bounded weight."""
        raise NotImplementedError(f"{type(self).__name__} has no with_weight")

    def forward(self, x: Tensor) -> Tensor:
        return self.with_weight(self.bounded_weight(), x)

    @torch.no_grad()
    def update_norm(
        self,
        tolerance: float = TOLERANCE,
        max_iterations: int = 1000,
        keep_vectors: bool = True,
    ) -> None:
        """Improve the estimate of the norm by power iterations, until half of one gains less than ``tolerance`` of it.

        :class:`~fastflow.nn.Residual` calls it before every pass, in eval mode without ``keep_vectors``. The next call then
        starts from the same vectors, so that an evaluation does not change a training. An estimate that improves by
        less than ``tolerance`` stays as it is. With ``keep_vectors``, smaller gains count, as a direction that
        overtakes the first one grows slowly.
        """
        validation.positive_int("max_iterations", max_iterations)
        if self.weight.is_meta:
            return
        dtype = torch.float64 if self.weight.dtype == torch.float64 else torch.float32
        weight, vectors, done = self.weight.detach().to(dtype), self.vectors.to(dtype), 0
        while True:
            try:
                norm, before, u, first, following = self._iterated(weight, vectors)
            except torch.linalg.LinAlgError:  # pyright: ignore[reportPrivateImportUsage] # weights that are not finite
                return
            if not norm > before * (1 + tolerance):
                break
            scaled = weight / before  # so that images neither vanish nor overflow
            for _ in range(min(CHUNK, max_iterations - done) - 1):
                following = self._map(self._transposed(scaled), self._map(scaled, following))
            done += CHUNK
            if done >= max_iterations:
                break
            vectors = _orthonormal(following)
        if norm > self._norm(weight) * (1 + (min(KEPT, tolerance) if keep_vectors else tolerance)):
            self.direction.copy_(self._derivative(u, first))
        if keep_vectors and norm > 0:
            self.vectors.copy_(_orthonormal(following))

    def _iterated(self, weight: Tensor, vectors: Tensor) -> tuple[Tensor, ...]:
        """Half a power iteration from the best direction in the span of the vectors, and a whole one of all of them.

        Returns the norm after and before, the unit vectors u and v with the norm as the inner product of u and the
        map of v, and the vectors, which are not orthonormal any more.
        """
        images = self._map(weight, vectors)
        flat = images.flatten(1)
        squares, rotation = torch.linalg.eigh(flat @ flat.T)
        tiny = torch.finfo(vectors.dtype).tiny
        before = squares[-1].clamp(min=tiny).sqrt()
        best = rotation[:, -1] / before
        following = self._map(self._transposed(weight), images)
        v = best @ following.flatten(1)
        norm = torch.linalg.vector_norm(v)
        v = (v / norm.clamp(min=tiny)).view(vectors.shape[1:])
        return norm, before, (best @ flat).view(images.shape[1:]), v, following

    def _norm(self, weight: Tensor) -> Tensor:
        """The estimate of the norm, which is a lower bound."""
        return (self.direction.to(weight.dtype) * weight).sum()

    def bounded_weight(self) -> Tensor:
        """The weight, divided by its norm over ``bound`` where that exceeds 1."""
        return self.weight / (self._norm(self.weight) * (MARGIN / self.bound)).clamp(min=1)


def _orthonormal(vectors: Tensor) -> Tensor:
    """Orthonormal vectors with the same span."""
    return torch.linalg.qr(vectors.flatten(1).T).Q.T.reshape(vectors.shape)


class LipschitzLinear(_Bounded):
    r"""Linear layer whose Lipschitz constant is at most ``bound``: :math:`W x / \max(1, \|W\|_2 / c) + b`.

    Source: spectral normalization, arXiv:1802.05957, as in arXiv:1811.00995, section 2.1. :math:`\|W\|_2` is found by
    power iteration with eight vectors. They are buffers, and ``update_norm`` iterates from them until half an iteration
    gains less than 5e-6 of the estimate. The estimate is a lower bound, and the layer adds 1% to it.
    :class:`~fastflow.nn.Residual` calls ``update_norm`` before every pass. Elsewhere, call it after the weights have changed.

    Args:
        in_features, out_features: as for ``torch.nn.Linear``.
        bound: the largest Lipschitz constant c.

    Shape: x ``[N, in_features]``; output ``[N, out_features]``.
    Raises ValueError for sizes that are not positive integers, and for a bound that is not positive.

    Example:
        >>> import torch
        >>> from fastflow import nn as fnn
        >>> layer = fnn.LipschitzLinear(4, 8, bound=0.9)
        >>> y = layer(torch.randn(8, 4))
        >>> bool(torch.linalg.matrix_norm(layer.bounded_weight(), 2) <= 0.9)
        True
    """

    def __init__(self, in_features: int, out_features: int, bound: float = 0.97) -> None:
        super().__init__()
        validation.positive_ints(in_features=in_features, out_features=out_features)
        _check_bound(bound)
        start = nn.Linear(in_features, out_features)
        self.weight, self.bias = start.weight, start.bias
        self._start(bound, (in_features,), (out_features,))
        self.update_norm()

    def _map(self, weight: Tensor, v: Tensor) -> Tensor:
        return F.linear(v, weight)

    def _transposed(self, weight: Tensor) -> Tensor:
        return weight.mT

    def _derivative(self, u: Tensor, v: Tensor) -> Tensor:
        return torch.outer(u, v)

    def with_weight(self, weight: Tensor, x: Tensor) -> Tensor:
        return F.linear(x, weight, self.bias)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[1]}, {self.weight.shape[0]}, bound={self.bound}"


class LipschitzConv2d(_Bounded):
    r"""Convolution with zero padding whose Lipschitz constant is at most ``bound``, as a map of images.

    The norm is that of the map of whole images, with the padding, and not that of the kernel as a matrix. Power
    iteration applies the convolution and its adjoint to images of ``size``, as in arXiv:1811.00995, appendix E;
    buffers and ``update_norm`` are those of :class:`LipschitzLinear`. For smaller images the norm is no larger, because zero
    padding makes their map a part of the larger one.

    Args:
        in_channels, out_channels, kernel_size: as for ``torch.nn.Conv2d``; the stride is 1, and the output has the size
            of the input.
        size: height and width of the images, or of the largest ones.
        bound: the largest Lipschitz constant.

    Shape: x ``[N, in_channels, H, W]``, not larger than ``size``; output ``[N, out_channels, H, W]``.
    Raises ValueError for sizes that are not positive integers, for an even kernel_size, for a bound that is not
    positive, and for larger images.

    Example:
        >>> import torch
        >>> from fastflow import nn as fnn
        >>> layer = fnn.LipschitzConv2d(3, 8, 3, size=(16, 16))
        >>> y = layer(torch.randn(8, 3, 16, 16))
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        size: tuple[int, int],
        bound: float = 0.97,
    ) -> None:
        super().__init__()
        validation.positive_ints(in_channels=in_channels, out_channels=out_channels, kernel_size=kernel_size)
        if kernel_size % 2 == 0:
            raise validation.argument_error("kernel_size", kernel_size, "an odd number")
        _check_size(size)
        _check_bound(bound)
        self.size, self.padding = tuple(size), kernel_size // 2
        start = nn.Conv2d(in_channels, out_channels, kernel_size)
        self.weight, self.bias = start.weight, cast("Tensor", start.bias)
        # a 1x1 convolution has the norm of its matrix for any size
        positions = tuple(size) if kernel_size > 1 else (1, 1)
        self._start(bound, (in_channels, *positions), (out_channels, *positions))
        self.update_norm()

    def _map(self, weight: Tensor, v: Tensor) -> Tensor:
        return F.conv2d(v, weight, padding=self.padding)

    def _transposed(self, weight: Tensor) -> Tensor:
        return weight.flip(2, 3).transpose(0, 1)

    def _derivative(self, u: Tensor, v: Tensor) -> Tensor:
        return conv2d_weight(v[None], self.weight.shape, u[None], padding=self.padding)

    def with_weight(self, weight: Tensor, x: Tensor) -> Tensor:
        if x.shape[-2] > self.size[0] or x.shape[-1] > self.size[1]:
            expected = f"images of {self.size[0]}x{self.size[1]} or smaller, the size of the bound"
            raise validation.argument_error("x", validation.shape_of(x), expected)
        return F.conv2d(x, weight, self.bias, padding=self.padding)

    def extra_repr(self) -> str:
        c_out, c_in, k, _ = self.weight.shape
        return f"{c_in}, {c_out}, kernel_size={k}, size={self.size}, bound={self.bound}"


def _check_bound(bound: float) -> None:
    validation.number("bound", bound, "a positive number", lambda v: v > 0)


def _check_lipschitz(bound: float) -> None:
    validation.number("lipschitz", bound, "a number between 0 and 1", lambda v: 0 < v < 1)


def _check_size(size: tuple[int, int]) -> None:
    validation.sample_shape("size", size, "(H, W)")
    if len(size) != 2:
        raise validation.argument_error("size", size, "(H, W)")


def _activation(name: str) -> nn.Module:
    return LipSwish() if name == "lipswish" else nn.ELU()


def _zero(layer: _Bounded) -> None:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)


def _with_slope(activation: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    if isinstance(activation, LipSwish):
        return activation.with_slope(x)
    return F.elu(x), torch.exp(x.clamp(max=0))


def _linearized(layers: Iterable[nn.Module], x: Tensor, shift: Tensor | None = None) -> tuple[Tensor, Pull]:
    """The output of layers and activations, and the products of vectors with its Jacobian.

    Weights and slopes are computed once, so that a product is a matrix product per layer and a multiplication per
    activation. ``shift`` is added to the output of the first layer.
    """
    factors = []
    for layer in layers:
        if isinstance(layer, _Bounded):
            weight = layer.bounded_weight()
            x = layer.with_weight(weight, x)
            x, shift, factor = x if shift is None else x + shift, None, layer._transposed(weight)
        else:
            x, factor = _with_slope(layer, x)
        factors.append((layer, factor))

    def pull(v: Tensor) -> Tensor:
        in_place = not torch.is_grad_enabled() and not in_transform()
        for layer, factor in reversed(factors):
            if isinstance(layer, _Bounded):
                v = layer._map(factor, v)
            else:  # after a layer, whose output nothing else reads
                v = v.mul_(factor) if in_place and v.shape == factor.shape else v * factor
        return v

    return x, pull


def _is_plain(net: nn.Module) -> bool:
    """Whether all modules of a network are those of this file, and none has hooks."""
    known = (*_OURS, LipSwish, nn.ELU, nn.Linear, nn.Sequential, nn.ModuleList)
    return all(
        type(m) in known and not (m._forward_hooks or m._forward_pre_hooks or m._backward_hooks)
        for m in net.modules()
    )


class LipschitzMLP(nn.Module):
    """Network for :class:`~fastflow.nn.Residual` of vectors: linear layers whose Lipschitz constants multiply to a bound.

    Source: arXiv:1811.00995 and arXiv:1906.02735. Of n layers, each is a :class:`LipschitzLinear` with the n-th root of
    the bound. The last layer is zero-initialized, so the flow starts as the identity. The network is a contraction in
    x for every context, of which no Lipschitz constant is bounded.

    Args:
        features: number of features of x and of the output.
        hidden: numbers of units of the hidden layers.
        lipschitz: bound of the network's Lipschitz constant, below 1.
        activation: ``"lipswish"`` or ``"elu"``. The second derivative of both is continuous or bounded, which gradients
            of the log-det need.
        context_features: number of features of the context, which a linear map adds to the first layer; None: no
            context.
        activation_first: the activation also precedes the first layer, as in the paper's networks except the first one.

    Shape: x ``[N, features]``; context ``[N, context_features]`` or None; output ``[N, features]``.
    Raises ValueError for other arguments, and for another context.

    Example:
        >>> import torch
        >>> from fastflow import nn as fnn
        >>> net = fnn.LipschitzMLP(2, hidden=(16, 16), lipschitz=0.9)
        >>> y = net(torch.randn(8, 2))
    """

    def __init__(
        self,
        features: int,
        hidden: Sequence[int] = (128, 128),
        lipschitz: float = 0.97,
        activation: str = "lipswish",
        context_features: int | None = None,
        activation_first: bool = False,
    ) -> None:
        super().__init__()
        validation.positive_ints(features=features)
        validation.sample_shape("hidden", hidden, "a sequence of positive integers")
        _check_lipschitz(lipschitz)
        validation.one_of("activation", activation, ("lipswish", "elu"))
        validation.positive_int("context_features", context_features, optional=True)
        validation.boolean("activation_first", activation_first)
        self.context_features = context_features
        widths = [features, *hidden, features]
        bound = lipschitz ** (1 / (len(widths) - 1))
        layers = nn.ModuleList(LipschitzLinear(a, b, bound) for a, b in zip(widths, widths[1:], strict=False))
        self.layers = cast("Sequence[LipschitzLinear]", layers)
        self.first = _activation(activation) if activation_first else None
        self.activations = nn.ModuleList(_activation(activation) for _ in hidden)
        self.context_layer = None if context_features is None else nn.Linear(context_features, hidden[0])
        _zero(self.layers[-1])

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        context = checked_context(x, context, self.context_features)
        h = self.layers[0](x if self.first is None else self.first(x))
        if context is not None and self.context_layer is not None:
            h = h + self.context_layer(context)
        for activation, layer in zip(self.activations, self.layers[1:], strict=True):
            h = layer(activation(h))
        return h

    def linearized(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Pull] | None:
        """The output, and a function that multiplies vectors ``[..., N, features]`` by its Jacobian; None for other layers."""
        if not _is_plain(self):
            return None
        context = checked_context(x, context, self.context_features)
        shift = None if context is None or self.context_layer is None else self.context_layer(context)
        layers: list[nn.Module] = [self.layers[0]] if self.first is None else [self.first, self.layers[0]]
        for activation, layer in zip(self.activations, self.layers[1:], strict=True):
            layers += [activation, layer]
        return _linearized(layers, x, shift)


class LipschitzConvNet(nn.Module):
    """Network for :class:`~fastflow.nn.Residual` of images: convolutions 3x3, 1x1 and 3x3.

    Source: the networks of residual flows, arXiv:1906.02735, appendix E. Each convolution is a
    :class:`LipschitzConv2d` with the cube root of the bound. The last one is zero-initialized.

    Args:
        channels: number of channels of x and of the output.
        size: height and width of the images.
        hidden: number of hidden channels.
        lipschitz, activation, activation_first: as for :class:`LipschitzMLP`.

    Shape: x ``[N, channels, H, W]``; output the same.
    Raises ValueError for other arguments.

    Example:
        >>> import torch
        >>> from fastflow import nn as fnn
        >>> net = fnn.LipschitzConvNet(3, size=(8, 8), hidden=16)
        >>> y = net(torch.randn(2, 3, 8, 8))
    """

    def __init__(
        self,
        channels: int,
        size: tuple[int, int],
        hidden: int = 128,
        lipschitz: float = 0.97,
        activation: str = "lipswish",
        activation_first: bool = False,
    ) -> None:
        super().__init__()
        validation.positive_ints(channels=channels, hidden=hidden)
        _check_size(size)
        _check_lipschitz(lipschitz)
        validation.one_of("activation", activation, ("lipswish", "elu"))
        validation.boolean("activation_first", activation_first)
        self.first = _activation(activation) if activation_first else None
        bound = lipschitz ** (1 / 3)
        self.net = nn.Sequential(
            LipschitzConv2d(channels, hidden, 3, size, bound),
            _activation(activation),
            LipschitzConv2d(hidden, hidden, 1, size, bound),
            _activation(activation),
            LipschitzConv2d(hidden, channels, 3, size, bound),
        )
        _zero(cast("LipschitzConv2d", self.net[-1]))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x if self.first is None else self.first(x))

    def linearized(self, x: Tensor) -> tuple[Tensor, Pull] | None:
        """The output, and a function that multiplies vectors by its Jacobian; None for other layers."""
        if not _is_plain(self):
            return None
        return _linearized(self.net if self.first is None else (self.first, *self.net), x)


_OURS = (LipschitzMLP, LipschitzConvNet, LipschitzLinear, LipschitzConv2d)
