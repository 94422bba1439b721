"""Weights and biases of convolutions times the scales of their outputs, for several networks at once."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from fastflow.transforms import in_transform

Layers = Sequence[Sequence[Tensor]]  # of each layer the tensors of all networks


def folded(
    weights: Layers, biases: Layers, log_scales: Layers, times: Sequence[int], dtype: torch.dtype
) -> list[tuple[Tensor, ...]]:
    r"""Weights and biases with :math:`e^{n s}` folded in: a convolution then computes :math:`e^{n s} (w * x + b)`.

    The number of kernels does not depend on the number of networks, also in backward.

    Args:
        times: n of each layer.
        dtype: dtype of the folded weights; biases keep theirs.

    Shape: w ``[D, C, H, W]``, b and s ``[D]``; the networks have the same shapes. Returns of each layer the weights,
    then of each layer the biases. The weights are in channels_last, which Triton's kernel reads; on a CPU they
    keep their memory format.
    """
    if in_transform():
        return _folded_one_by_one(weights, biases, log_scales, times, dtype)
    tensors = [tensor for kind in (weights, biases, log_scales) for layer in kind for tensor in layer]
    found, networks = _Folded.apply(dtype, tuple(times), *tensors), len(weights[0])
    return [found[i : i + networks] for i in range(0, len(found), networks)]


def _folded_one_by_one(
    weights: Layers, biases: Layers, log_scales: Layers, times: Sequence[int], dtype: torch.dtype
) -> list[tuple[Tensor, ...]]:
    """:func:`folded` in operations that every transform of PyTorch can differentiate and batch."""
    factors = [[(n * s).exp() for s in layer] for n, layer in zip(times, log_scales, strict=True)]
    both = list(zip(weights, biases, factors, strict=True))
    of_weights = [
        tuple((w * _each_output(f)).to(dtype) for w, f in zip(ws, fs, strict=True)) for ws, _, fs in both
    ]
    return of_weights + [tuple(b * f for b, f in zip(bs, fs, strict=True)) for _, bs, fs in both]


class _Context(FunctionCtx):
    times: tuple[int, ...]
    sizes: list[int]
    saved_tensors: tuple[Tensor, ...]


class _Folded(torch.autograd.Function):
    """Takes all weights, then all biases, then all log scales; in each of these, layer by layer."""

    @staticmethod
    def forward(
        ctx: _Context, dtype: torch.dtype, times: tuple[int, ...], *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        third, networks = len(tensors) // 3, len(tensors) // 3 // len(times)
        weights, biases, log_scales = tensors[:third], tensors[third : 2 * third], tensors[2 * third :]
        ctx.times, ctx.sizes = times, [b.numel() * networks for b in biases[::networks]]
        factor = _multiplied(torch.cat(log_scales), ctx).exp_()
        ctx.save_for_backward(factor, *weights, *biases, *log_scales)
        of_layers = []
        for weight, scale in zip(_stacked(weights, networks), factor.split(ctx.sizes), strict=True):
            if weight.is_cpu:
                result = torch.empty_like(weight, dtype=dtype)
            else:
                outputs, inputs, *sides = weight.shape[1:]
                rows = weight.new_empty((networks, outputs, *sides, inputs), dtype=dtype)
                result = rows.permute(0, 1, 4, 2, 3)
            # the product is rounded once, to its dtype
            of_layers.append(torch.mul(weight, _per_output(scale, networks), out=result))
        of_biases = torch.cat(biases).mul_(factor).split([b.numel() for b in biases])
        return *(w for layer in of_layers for w in layer.unbind()), *of_biases

    @staticmethod
    def backward(ctx: _Context, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        factor, *saved = ctx.saved_tensors
        third, networks = len(saved) // 3, len(saved) // 3 // len(ctx.times)
        weights, biases, log_scales = saved[:third], saved[third : 2 * third], saved[2 * third :]
        if torch.is_grad_enabled():  # create_graph=True
            times = [n for n in ctx.times for _ in range(networks)]
            each = zip(times, weights, biases, log_scales, gradients[:third], gradients[third:], strict=True)
            of_kinds = zip(*(_gradients_of_one(*one) for one in each), strict=True)
            return None, None, *(gradient for kind in of_kinds for gradient in kind)
        dbias = torch.cat(gradients[third:]).mul_(factor)
        dlog_scale = torch.cat(biases).mul_(dbias)
        of_layers = []
        for weight, gradient, scale, into in zip(
            _stacked(weights, networks),
            _stacked(gradients[:third], networks),
            factor.split(ctx.sizes),
            dlog_scale.split(ctx.sizes),
            strict=True,
        ):
            # in the memory format of the weights, so that their gradients need no copy
            dweight = torch.mul(gradient, _per_output(scale, networks), out=torch.empty_like(weight))
            into.add_(weight.mul_(dweight).sum((2, 3, 4)).flatten())
            of_layers.append(dweight)
        sizes = [b.numel() for b in biases]
        dweights = (w for layer in of_layers for w in layer.unbind())
        return None, None, *dweights, *dbias.split(sizes), *_multiplied(dlog_scale, ctx).split(sizes)


def _multiplied(of_layers: Tensor, ctx: _Context) -> Tensor:
    """Multiplies the part of each layer by its n, in place."""
    for part, times in zip(of_layers.split(ctx.sizes), ctx.times, strict=True):
        if times != 1:
            part.mul_(times)
    return of_layers


def _stacked(tensors: Sequence[Tensor], networks: int) -> list[Tensor]:
    """Of each layer the stack of its tensors, in the memory format of the first one.

    ``torch.stack`` would not keep channels_last, and a GPU would copy tensors of four dimensions one by one.
    """
    stacks = []
    for first in tensors[::networks]:
        strides = (first.numel(), *torch.empty_like(first).stride())
        stacks.append(first.new_empty_strided((networks, *first.shape), strides))
    into = [one for stack in stacks for one in stack.unbind()]
    torch._foreach_copy_(into, list(tensors))  # pyright: ignore[reportPrivateImportUsage] # no public name does it
    return stacks


def _each_output(scale: Tensor) -> Tensor:
    return scale.view(-1, 1, 1, 1)


def _gradients_of_one(
    n: int, weight: Tensor, bias: Tensor, log_scale: Tensor, dweight: Tensor, dbias: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a layer's weight, bias and log scale from those of what :func:`folded` makes of them."""
    factor = (n * log_scale).exp()
    dweight, dbias = dweight.to(weight.dtype) * _each_output(factor), dbias * factor
    return dweight, dbias, n * ((dweight * weight).sum((1, 2, 3)) + dbias * bias)


def _per_output(scale: Tensor, networks: int) -> Tensor:
    return scale.view(networks, -1, 1, 1, 1)
