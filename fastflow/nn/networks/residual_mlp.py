"""Residual coupling network for vectors, of the neural spline flows."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastflow import validation
from fastflow.nn.networks.activation import activation_name
from fastflow.nn.networks.context import check_features, checked_context, with_context
from fastflow.ops import residual_network
from fastflow.ops.dispatch import runs_compiled_ops
from fastflow.ops.residual_network.op import SAMPLES, pays
from fastflow.reversible import is_changed
from fastflow.transforms import in_transform


class ResidualMLPBlock(nn.Module):
    r"""Pre-activation residual block of two linear layers, gated by the context: :math:`x + t \, \sigma(W c + b)`.

    Without a context it is :math:`x + t`. The second layer starts uniform in :math:`\pm 10^{-3}`, so the block starts
    near the identity.

    Shape: x ``[N, features]``; context ``[N, context_features]`` or None; output ``[N, features]``.
    """

    def __init__(
        self, features: int, context_features: int | None, dropout: float, activation: Callable
    ) -> None:
        super().__init__()
        self.activation = activation
        self.linear_in = nn.Linear(features, features)
        self.dropout = nn.Dropout(dropout)
        self.linear_out = nn.Linear(features, features)
        self.gate = None if context_features is None else nn.Linear(context_features, features)
        nn.init.uniform_(self.linear_out.weight, -1e-3, 1e-3)
        nn.init.uniform_(self.linear_out.bias, -1e-3, 1e-3)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        t = self.linear_in(self.activation(x))
        t = self.linear_out(self.dropout(self.activation(t)))
        return x + t if self.gate is None else torch.addcmul(x, t, torch.sigmoid(self.gate(context)))


class ResidualMLP(nn.Module):
    """Residual coupling network for vectors: pre-activation blocks between two linear layers.

    Source: the networks of neural spline flows, arXiv:1906.04032, without batch normalization. The first layer takes
    the input and the context, and the context gates every block. The last layer is zero-initialized, so a coupling
    starts as the identity. On a CPU the network is one op, ``fastflow.ops.residual_network``, for at least 16 samples,
    float32 or float64, a few hundred thousand weights, and ReLU, tanh, SiLU or ELU, unless units are dropped or a module inside has hooks.

    Args:
        in_features: number of input features; 0 with ``context_features``: the output depends on the context only.
        out_features: number of output features.
        hidden: number of units per hidden layer.
        blocks: number of residual blocks, each of two linear layers.
        context_features: number of features of the context; None: no context.
        dropout: probability of dropout before the second layer of a block, in [0, 1).
        activation: elementwise function of a tensor, e.g. ``torch.nn.functional.elu`` or ``torch.nn.Tanh()``.

    Shape: x ``[N, in_features]``; context ``[N, context_features]`` or None; output ``[N, out_features]``.
    Raises ValueError unless sizes are positive integers, for another dropout or activation, and for another context.

    Example:
        >>> import torch
        >>> from fastflow import nn as fnn
        >>> net = fnn.ResidualMLP(2, 4, hidden=16, context_features=3)
        >>> y, log_det = fnn.AffineCoupling(net)(torch.randn(8, 4), torch.randn(8, 3))
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        hidden: int = 256,
        blocks: int = 2,
        context_features: int | None = None,
        dropout: float = 0.0,
        activation: Callable[[Tensor], Tensor] = F.relu,
    ) -> None:
        super().__init__()
        check_features("in_features", in_features, context_features)
        validation.positive_ints(out_features=out_features, hidden=hidden, blocks=blocks)
        validation.number("dropout", dropout, "a number from 0 to below 1", lambda v: 0 <= v < 1)
        if not callable(activation) or isinstance(activation, type):
            raise validation.argument_error("activation", repr(activation), "a function of a tensor")
        self.context_features = context_features
        self.linear_in = nn.Linear(in_features + (context_features or 0), hidden)
        self.blocks = nn.ModuleList(
            ResidualMLPBlock(hidden, context_features, dropout, activation) for _ in range(blocks)
        )
        self.linear_out = nn.Linear(hidden, out_features)
        nn.init.zeros_(self.linear_out.weight)
        nn.init.zeros_(self.linear_out.bias)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        if (taken := self._taken_by_op(x)) is not None:
            parameters, activation = taken
            context = checked_context(x, context, self.context_features)
            return residual_network(x, context, parameters, blocks=len(self.blocks), activation=activation)[0]
        h = self.linear_in(with_context(x, context, self.context_features))
        for block in self.blocks:
            h = block(h, context)
        return self.linear_out(h)

    def _taken_by_op(self, x: Tensor) -> tuple[list[Tensor], str] | None:
        """Parameters in the order of the op, and the activation; None if PyTorch runs the network."""
        if torch.compiler.is_compiling() or in_transform() or not runs_compiled_ops():
            return None
        if not x.is_cpu or x.ndim != 2 or x.shape[0] < SAMPLES or torch.is_autocast_enabled("cpu"):
            return None
        if not pays(self.linear_in.out_features, len(self.blocks), by_batch=False):
            return None
        if x.dtype not in (torch.float32, torch.float64):
            return None
        layers, names = [self.linear_in], set()
        for block in self.blocks:
            if type(block) is not ResidualMLPBlock or is_changed(block):
                return None
            dropout = block.dropout
            if type(dropout) is not nn.Dropout or dropout.p and dropout.training or is_changed(dropout):
                return None
            layers += [block.linear_in, block.linear_out, *([] if block.gate is None else [block.gate])]
            names.add(activation_name(block.activation))
        layers.append(self.linear_out)
        name = names.pop() if len(names) == 1 else None
        if name is None:
            return None
        if any(type(m) is not nn.Linear or m.bias is None or is_changed(m) for m in layers):
            return None
        weight = self.linear_in.weight
        fits = weight.dtype == x.dtype and weight.shape[1] == x.shape[1] + (self.context_features or 0)
        return ([p for m in layers for p in (m.weight, m.bias)], name) if fits else None
