"""Network of continuous flows: a field that depends on time."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastflow import validation
from fastflow.nn.networks.context import checked_context


class ConcatSquash(nn.Module):
    r"""Multilayer perceptron whose layers are gated and shifted by time: the field of a continuous flow.

    Source: FFJORD, arXiv:1810.01367, its ``concatsquash`` layers. A layer is
    :math:`(W x + b) \odot \sigma(W_g s + b_g) + W_s s`, with s the time and the context.

    Args:
        features: number of features D.
        hidden: numbers of units of the hidden layers.
        context_features: number of features of the context; None: no context.
        activation: elementwise function of a tensor. It should be smooth, as the log-det differentiates it.

    Shape: t a scalar; x ``[N, D]``; context ``[N, context_features]`` or None; output ``[N, D]``.
    Raises ValueError unless sizes are positive integers, for another activation, and for another context.

    Example:
        >>> import torch
        >>> from fastflow import nn as fnn
        >>> dx = fnn.ConcatSquash(2, hidden=(16,))(torch.tensor(0.5), torch.randn(8, 2))
    """

    def __init__(
        self,
        features: int,
        hidden: Sequence[int] = (64, 64),
        context_features: int | None = None,
        activation: Callable[[Tensor], Tensor] = F.tanh,
    ) -> None:
        super().__init__()
        validation.positive_int("features", features)
        validation.sample_shape("hidden", hidden, "one or more positive integers")
        validation.positive_int("context_features", context_features, optional=True)
        if not callable(activation) or isinstance(activation, type):
            raise validation.argument_error("activation", repr(activation), "a function of a tensor")
        self.context_features, self.activation = context_features, activation
        sizes, side = (features, *hidden, features), 1 + (context_features or 0)
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(sizes, sizes[1:], strict=False))
        self.gates = nn.ModuleList(nn.Linear(side, b) for b in sizes[1:])
        self.shifts = nn.ModuleList(nn.Linear(side, b, bias=False) for b in sizes[1:])

    def forward(self, t: Tensor, x: Tensor, context: Tensor | None = None) -> Tensor:
        context = checked_context(x, context, self.context_features)
        side = t.to(x.dtype).reshape(1, 1)
        if context is not None:
            side = torch.cat([side.expand(len(x), 1), context], 1)
        for i, (layer, gate, shift) in enumerate(zip(self.layers, self.gates, self.shifts, strict=True)):
            x = layer(self.activation(x) if i else x) * torch.sigmoid(gate(side)) + shift(side)
        return x
