"""Faster masked autoregressive layers of nflows, its forks and normflows, whose networks (MADE) are alike."""

import weakref
from abc import abstractmethod
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastflow.integrations.accelerate import Accelerated
from fastflow.integrations.coupling_layers import is_plain
from fastflow.integrations.spline_layers import outside, per_feature, spline_form, spline_refusal, splines
from fastflow.nn.networks.masked_network import _computed_once, _Kept
from fastflow.ops import masked_inverse
from fastflow.ops.masked_inverse import AFTER, BEFORE, GATE, SKIP, Affine, Spline
from fastflow.reversible import has_hooks

FUNCTIONS = {
    F.relu: "relu",
    torch.relu: "relu",
    torch.tanh: "tanh",
    F.tanh: "tanh",
    F.silu: "silu",
    F.elu: "elu",
}
MODULES = {nn.ReLU: "relu", nn.Tanh: "tanh", nn.SiLU: "silu", nn.ELU: "elu"}


def _activation(function: object) -> str | None:
    if isinstance(function, nn.Module):
        name = MODULES.get(type(function))
        return None if name == "elu" and function.alpha != 1 else name
    return FUNCTIONS.get(function) if callable(function) else None


class _Conditioner(NamedTuple):
    """The parts of a MADE in the order of its passes."""

    linears: list[nn.Linear]
    flags: list[int]
    """Flags of the layers as masked_inverse takes them; the last is the output's."""
    contexts: dict[int, nn.Linear]
    """Maps of the context, by the layer of which they are a term or, in a gated layer, the gate."""
    activation: str


class MaskedAutoregressive(Accelerated):
    """Masked autoregressive layer: the inverse takes one pass of the network, not one for each feature."""

    GATED = False
    """Whether a context multiplies the outputs of blocks, as in normflows."""

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        parts = self._parts(inputs, context)
        if parts is None or outside_or_not_vectors(self, inputs):
            return super().inverse(inputs, context)
        structure, weights = self._weights(parts)
        added, gates = self._terms(parts, structure, context)
        form, scale = self._form(), self._scale()
        if scale is not None:
            inputs = inputs / scale
            first = weights[: parts.linears[0].weight.numel()].unflatten(0, parts.linears[0].weight.shape)
            first = first * scale.index_select(0, structure.order)
            weights = torch.cat([first.flatten(), weights[first.numel() :]])
        outputs, log_det = masked_inverse(
            inputs,
            weights,
            added,
            gates,
            ends=structure.ends,
            order=structure.order,
            widths=[layer.out_features for layer in parts.linears[:-1]],
            layers=parts.flags,
            activation=parts.activation,
            transformer=form,
        )
        return outputs if scale is None else outputs * scale, log_det

    @abstractmethod
    def _form(self) -> Affine | Spline | None:
        """The transformation of one feature; None if masked_inverse does not have it."""
        raise NotImplementedError(f"{type(self).__name__} has no _form")

    def _scale(self) -> Tensor | None:
        """Factors of the features, if the transformation is that of features divided by them."""
        return None

    def _parts(self, inputs: Tensor, context: Tensor | None) -> _Conditioner | None:
        """The network as masked_inverse takes it; None if it does not, or if a hook would not run."""
        net = self.autoregressive_net
        if conditioner_obstacle(self) is not None or self._form() is None:
            return None
        if context is not None and not hasattr(net, "context_layer"):
            return None
        if self.training and any(isinstance(m, nn.Dropout) and m.training and m.p for m in net.modules()):
            return None
        if not is_plain(inputs, net.initial_layer.weight) or any(map(has_hooks, net.modules())):
            return None
        blocks, residual = list(net.blocks), _is_residual(net)
        first = BEFORE if residual else AFTER
        # without residual blocks nflows activates the first layer, normflows does not
        linears, flags = [net.initial_layer], [0 if residual or self.GATED else AFTER]
        contexts = {} if context is None else {0: net.context_layer}
        for block in blocks:
            inner = list(block.linear_layers) if residual else [block.linear]
            if context is not None and hasattr(block, "context_layer") and residual:
                contexts[len(linears) + self.GATED] = block.context_layer
            linears += inner
            flags += [first, BEFORE | SKIP | (GATE if self.GATED and context is not None else 0)]
            flags = flags[: len(linears)]
        return _Conditioner(
            [*linears, net.final_layer], [*flags, 0], contexts, conditioner_activation(net) or "relu"
        )

    def _weights(self, parts: _Conditioner) -> "tuple[_Structure, Tensor]":
        """What follows from the degrees, kept while these stay, and the masked matrices with units sorted.

        The matrices are not kept: a write to ``parameter.data`` would not be noticed.
        """
        kept = _KEPT.setdefault(self.autoregressive_net, _Kept()).kept([m.degrees for m in parts.linears])
        if kept is None:
            structure = _Structure.of(parts.linears)
        else:
            structure = _computed_once(kept, "structure", lambda: _Structure.of(parts.linears))
        pairs = zip(parts.linears, structure.rows, [structure.order, *structure.rows], strict=False)
        matrices = [
            (layer.weight * layer.mask).index_select(0, rows).index_select(1, columns).flatten()
            for layer, rows, columns in pairs
        ]
        return structure, torch.cat(matrices)

    def _terms(
        self, parts: _Conditioner, structure: "_Structure", context: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """What is added to the layers, and what multiplies the gated ones."""
        added, gates = [], []
        for i, (layer, flags, rows) in enumerate(
            zip(parts.linears, parts.flags, structure.rows, strict=True)
        ):
            term = layer.bias
            if i in parts.contexts:
                of_context = parts.contexts[i](context)
                if flags & GATE:
                    gates.append(torch.sigmoid(of_context).index_select(1, rows))
                elif i == 0 and not self.GATED:
                    term = term + self.autoregressive_net.activation(of_context)
                else:
                    term = term + of_context
            added.append(term.index_select(-1, rows))
        if context is not None:
            added = [t if t.ndim == 2 else t.expand(context.shape[0], -1) for t in added]
        return torch.cat(added, -1), torch.cat(gates, 1) if gates else None


class _Structure(NamedTuple):
    """What follows from the degrees of a network's units."""

    order: Tensor
    """Features in their order."""
    rows: list[Tensor]
    """Order of the rows of each layer, in which their degrees ascend."""
    ends: Tensor

    @staticmethod
    def of(linears: list[nn.Linear]) -> "_Structure":
        hidden, last = [layer.degrees for layer in linears[:-1]], linears[-1]
        features = linears[0].in_features
        each = last.out_features // features
        order = torch.argsort(last.degrees[::each])
        k = torch.arange(features, device=order.device)
        rows = [torch.argsort(d, stable=True) for d in hidden]
        rows.append((order[:, None] * each + torch.arange(each, device=order.device)).flatten())
        return _Structure(order, rows, torch.stack([(d[:, None] <= k).sum(0) for d in hidden]))


# not in the modules, whose attributes are those of the library
_KEPT: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def _is_residual(net: nn.Module) -> bool:
    if not len(net.blocks):
        return getattr(net, "use_residual_blocks", True)
    return hasattr(net.blocks[0], "linear_layers")


def conditioner_activation(net: nn.Module) -> str | None:
    """Name of the one activation of a MADE; None if masked_inverse does not have it."""
    functions = [m.activation for m in (net, *net.blocks) if hasattr(m, "activation")]
    names = {_activation(f) for f in functions}
    return names.pop() if len(names) == 1 else None


def conditioner_obstacle(layer: nn.Module) -> str | None:
    """Why the inverse of a layer takes a pass for each feature, if it is because of its network's options."""
    net, package = layer.autoregressive_net, _library(layer).partition(".")[0]
    parts = (net, net.__class__), *((b, b.__class__) for b in getattr(net, "blocks", ()))
    names = ("MADE", "MaskedResidualBlock", "MaskedFeedforwardBlock")
    if any(c.__name__ not in names or c.__module__.partition(".")[0] != package for _, c in parts):
        return f"its network is of the class {type(net).__name__}"
    if any(getattr(b, "batch_norm_layers", getattr(b, "batch_norm", None)) is not None for b in net.blocks):
        return "batch norm in its network"
    if conditioner_activation(net) is None and (len(net.blocks) or hasattr(net, "activation")):
        return "the activation of its network"
    if not isinstance(getattr(net, "preprocessing", None), nn.Identity | None):
        return "preprocessing in its network"
    return None


def _library(layer: nn.Module) -> str:
    c = type(layer)
    return (c.replaced() if issubclass(c, Accelerated) else c).__module__


def outside_or_not_vectors(layer: nn.Module, inputs: Tensor) -> bool:
    """Whether the library raises or has another shape in mind."""
    features = layer.autoregressive_net.initial_layer.in_features
    if inputs.ndim != 2 or inputs.shape[1] != features:
        return True
    return hasattr(layer, "tails") and outside(layer, inputs)


class AffineAutoregressive(MaskedAutoregressive):
    """Affine autoregressive layer of nflows, its scales a softplus."""

    AFFINE = Affine("softplus", offset=1e-3)
    OWN_SCALE = "MaskedAffineAutoregressiveTransform.__init__.<locals>.<lambda>"

    @classmethod
    def refusal(cls, module: nn.Module) -> str | None:
        scale: Callable | None = getattr(module, "scale_activation", None)  # of glasflow
        if scale is not None and getattr(scale, "__qualname__", "") != cls.OWN_SCALE:
            return "scale_activation"
        return conditioner_obstacle(module)

    def _form(self) -> Affine:
        return self.AFFINE


class RationalQuadraticAutoregressive(MaskedAutoregressive):
    """Autoregressive layer with splines: these are one op in both directions."""

    @classmethod
    def refusal(cls, module: nn.Module) -> str | None:
        return spline_refusal(module)

    def _factor(self) -> float:
        return getattr(self.autoregressive_net, "hidden_features", 1) ** -0.5

    def _elementwise(
        self, inputs: Tensor, autoregressive_params: Tensor, inverse: bool = False
    ) -> tuple[Tensor, Tensor]:
        if inputs.ndim != 2 or outside(self, inputs):
            return super()._elementwise(inputs, autoregressive_params, inverse)
        return splines(
            self, inputs, autoregressive_params, self.num_bins, factor=self._factor(), inverse=inverse
        )

    def _form(self) -> Spline | None:
        if isinstance(self.tails, list | tuple):
            return None
        return Spline(**spline_form(self, self.num_bins), factor=self._factor())

    def _scale(self) -> Tensor | None:
        return self.tail_bound if per_feature(self) else None
