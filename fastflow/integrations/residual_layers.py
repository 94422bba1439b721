"""Faster residual networks of nflows and its forks: the whole network is one op."""

from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastflow.integrations.accelerate import Accelerated, Theirs, own_class
from fastflow.integrations.coupling_layers import is_plain
from fastflow.integrations.kept import found_in
from fastflow.nn.networks.activation import activation_name
from fastflow.ops import residual_network
from fastflow.ops.dispatch import runs_compiled_ops
from fastflow.ops.residual_network.op import SAMPLES, pays
from fastflow.reversible import is_changed
from fastflow.transforms import in_transform


class _Network(NamedTuple):
    """A network as the op takes it."""

    parameters: list[Tensor]
    blocks: int
    activation: str
    norms: list[Theirs]
    training: bool
    """Whether the norms take the statistics of the batch."""


class ResidualNet(Accelerated):
    """``ResidualNet`` of vectors: one op on the CPU, in training too, unless units are dropped."""

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> Tensor:
        taken = self._taken(inputs, context)
        if taken is None:
            return super().forward(inputs, context)
        net, inputs = taken
        if not net.norms:
            return residual_network(
                inputs, context, net.parameters, blocks=net.blocks, activation=net.activation
            )[0]
        running = [t for m in net.norms for t in (m.running_mean, m.running_var)]
        outputs, statistics = residual_network(
            inputs,
            context,
            net.parameters,
            blocks=net.blocks,
            activation=net.activation,
            batch_norm=True,
            running=[] if net.training else running,
            eps=net.norms[0].eps,
        )
        if net.training:
            _update(net.norms, running, statistics, inputs.shape[0])
        return outputs

    def _read(self, inputs: Tensor) -> Tensor:
        """What the first layer takes of the inputs."""
        return inputs

    def _taken(self, inputs: Tensor, context: Tensor | None) -> tuple[_Network, Tensor] | None:
        """Network and inputs of the op; None for PyTorch: on a GPU, for few samples, in a transform and a compiled graph."""
        if torch.compiler.is_compiling() or in_transform() or not runs_compiled_ops():
            return None
        tensors = (inputs,) if context is None else (inputs, context)
        if not all(isinstance(t, Tensor) and t.is_cpu and t.ndim == 2 for t in tensors):
            return None
        if inputs.shape[0] < SAMPLES or not is_plain(*tensors):
            return None
        net = found_in(self, _network_of, context is not None)
        if net is None or net.parameters[0].dtype != inputs.dtype:
            return None
        read = self._read(inputs)
        if context is not None and context.shape[0] != read.shape[0]:
            return None
        width = read.shape[1] + (0 if context is None else context.shape[1])
        return (net, read) if width == net.parameters[0].shape[1] else None


def _network_of(net: Theirs, gated: bool) -> _Network | None:
    """A network as the op takes it; None if it does not."""
    block_of = getattr(net.blocks[0], "__class__", None) if len(net.blocks) else None
    modules = [m for m in net.modules() if m is not net]
    if any(is_changed(m) or (isinstance(m, nn.Dropout) and m.training and m.p) for m in modules):
        return None
    linears, norms, activations = [net.initial_layer], [], set()
    for block in net.blocks:
        if type(block) is not block_of or own_class(block).__name__ != "ResidualBlock":
            return None
        if gated != hasattr(block, "context_layer"):
            return None
        activations.add(activation_name(block.activation))
        own = list(block.batch_norm_layers) if block.use_batch_norm else []
        norms += own
        linears += (
            chain.from_iterable(zip(own, block.linear_layers, strict=True)) if own else block.linear_layers
        )
        linears += [block.context_layer] if gated else []
    linears.append(net.final_layer)
    layers = [m for m in linears if m not in norms]
    if any(type(m) is not nn.Linear or m.bias is None for m in layers) or len(activations) != 1:
        return None
    if norms and not _are_covered(norms):
        return None
    parameters = [p for m in linears for p in (m.weight, m.bias)]
    first = parameters[0]
    if any(type(p) is not nn.Parameter or p.dtype != first.dtype or not p.is_cpu for p in parameters):
        return None
    activation, training = activations.pop(), bool(norms) and norms[0].training
    if activation is None or not pays(linears[0].out_features, len(net.blocks), training):
        return None
    return _Network(parameters, len(net.blocks), activation, norms, training)


def _are_covered(norms: Sequence[nn.Module]) -> bool:
    """Whether the op has these batch normalizations, all in the same mode, with running statistics."""
    if any(type(m) is not nn.BatchNorm1d or not m.affine or m.running_mean is None for m in norms):
        return False
    return len({(m.training, m.eps, m.momentum) for m in norms}) == 1 and norms[0].momentum is not None


def _update(norms: Sequence[Theirs], running: list[Tensor], statistics: Tensor, samples: int) -> None:
    """Moves the running statistics as PyTorch does: the variances of a batch of N are divided by N - 1."""
    momentum = norms[0].momentum
    with torch.no_grad():
        means, variances = statistics[::2], statistics[1::2] * (samples / (samples - 1))
        batch = [t for pair in zip(means.unbind(), variances.unbind(), strict=True) for t in pair]
        # torch exports no function that writes to several tensors
        torch._foreach_mul_(running, 1 - momentum)  # pyright: ignore[reportPrivateImportUsage]
        torch._foreach_add_(running, batch, alpha=momentum)  # pyright: ignore[reportPrivateImportUsage]
        counts = [m.num_batches_tracked for m in norms]
        torch._foreach_add_(counts, 1)  # pyright: ignore[reportPrivateImportUsage]
