"""Faster masked autoregressive layers of nflows, its forks and normflows, whose networks (MADE) are alike."""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from functools import cache
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastflow.integrations.accelerate import Accelerated, Theirs
from fastflow.integrations.coupling_layers import is_plain
from fastflow.integrations.kept import found_in, kept_of
from fastflow.integrations.spline_layers import outside, spline_form, spline_refusal, splines
from fastflow.nn.networks.activation import activation_name
from fastflow.ops import masked_inverse
from fastflow.ops.masked_inverse import AFTER, BEFORE, GATE, SKIP, Affine, Spline
from fastflow.reversible import is_changed


class Conditioner(NamedTuple):
    """The parts of a MADE in the order of its passes."""

    linears: list[Theirs]
    widths: list[int]
    """Number of units of each hidden layer."""
    flags: list[int]
    """Flags of the layers as masked_inverse takes them; the last is the output's."""
    contexts: dict[int, nn.Linear]
    """Maps of the context, by the layer of which they are a term or, in a gated layer, the gate."""
    activation: str

    def sorted(self) -> "SortedNetwork":
        """With sorted units; kept while the degrees and the masks stay."""
        degrees, dtype = [layer.degrees for layer in self.linears], self.linears[0].weight.dtype
        kept = kept_of(self.linears[0], "sorted")
        return kept.get([*degrees, *(layer.mask for layer in self.linears)], dtype, self._sorted)

    def _sorted(self) -> "SortedNetwork":
        *degrees, last = (layer.degrees for layer in self.linears)
        each = self.linears[-1].out_features // self.linears[0].in_features
        dtype = self.linears[0].weight.dtype
        return SortedNetwork.of(self.linears, degrees, torch.argsort(last[::each]), dtype)


class MaskedAutoregressive(Accelerated):
    """Masked autoregressive layer: the inverse takes one pass of the network, not one for each feature."""

    GATED = False
    """Whether a context multiplies the outputs of blocks, as in normflows."""

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        form, net = self._form(), self.autoregressive_net
        parts = found_in(net, _conditioner_of, _package_of(type(self)), self.GATED, context is not None)
        if form is None or parts is None or not is_plain(inputs, parts.linears[0].weight):
            return super().inverse(inputs, context)
        if outside_or_not_vectors(self, inputs):
            return super().inverse(inputs, context)
        structure, scale = parts.sorted(), self._scale()
        weights, biases = self._sorted_parameters(parts, structure)
        added, gates = self._terms(parts, structure, biases, context)
        outputs, log_det = masked_inverse(
            inputs if scale is None else inputs / scale,
            weights,
            added,
            gates,
            self._waves(structure.order, scale),
            ends=structure.ends,
            order=structure.order,
            widths=parts.widths,
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

    def _waves(self, order: Tensor, scale: Tensor | None) -> Tensor | None:
        """What the network reads of features divided by ``scale``, as masked_inverse takes it."""
        if scale is None:
            return None
        zeros = torch.zeros_like(scale)
        return torch.stack([zeros, zeros, zeros, scale]).index_select(1, order)

    def _sorted_parameters(self, parts: Conditioner, structure: "SortedNetwork") -> tuple[Tensor, Tensor]:
        """Weights and biases, sorted."""
        weights, _, biases = structure.parameters(parts.linears)
        return weights, biases

    def _terms(
        self, parts: Conditioner, structure: "SortedNetwork", biases: Tensor, context: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """What is added to the layers, and what multiplies the gated ones."""
        if context is None:
            return biases, None
        added, gates, terms = [], [], biases.split([*parts.widths, parts.linears[-1].out_features])
        for i, (term, flags, rows) in enumerate(zip(terms, parts.flags, structure.rows, strict=True)):
            if i in parts.contexts:
                of_context = parts.contexts[i](context)
                if flags & GATE:
                    gates.append(torch.sigmoid(of_context).index_select(1, rows))
                else:
                    if i == 0 and not self.GATED:
                        of_context = self.autoregressive_net.activation(of_context)
                    term = term + of_context.index_select(1, rows)
            added.append(term.expand(context.shape[0], -1))
        return torch.cat(added, -1), torch.cat(gates, 1) if gates else None


def _conditioner_of(net: Theirs, package: str, gated: bool, with_context: bool) -> Conditioner | None:
    """A network as masked_inverse takes it; None if it does not, or if a hook would not run."""
    if conditioner_obstacle(net, package) is not None:
        return None
    if with_context and not hasattr(net, "context_layer"):
        return None
    if any(is_changed(m) or (isinstance(m, nn.Dropout) and m.training and m.p) for m in net.modules()):
        return None
    blocks, residual = list(net.blocks), _is_residual(net)
    first = BEFORE if residual else AFTER
    # without residual blocks nflows activates the first layer, normflows does not
    linears, flags = [net.initial_layer], [0 if residual or gated else AFTER]
    contexts = {0: net.context_layer} if with_context else {}
    for block in blocks:
        inner = list(block.linear_layers) if residual else [block.linear]
        if with_context and hasattr(block, "context_layer") and residual:
            contexts[len(linears) + gated] = block.context_layer
        linears += inner
        flags += [first, BEFORE | SKIP | (GATE if gated and with_context else 0)]
        flags = flags[: len(linears)]
    return Conditioner(
        [*linears, net.final_layer],
        [layer.out_features for layer in linears],
        [*flags, 0],
        contexts,
        conditioner_activation(net) or "relu",
    )


class SortedNetwork(NamedTuple):
    """A masked network as masked_inverse takes it: units are sorted by the number of features that they depend on."""

    order: Tensor
    """Features in their order."""
    ends: Tensor
    rows: list[Tensor]
    """Order of the units of each layer."""
    places: Tensor
    """For each sorted parameter, its index among all weights and then all biases."""
    masks: Tensor
    """Of the sorted parameters; ones for biases."""
    sizes: list[int]
    """Numbers of weights, of weights of a context, and of biases, in which sorted parameters come."""

    @staticmethod
    def of(
        linears: Sequence[Theirs], degrees: Sequence[Tensor], order: Tensor, dtype: torch.dtype
    ) -> "SortedNetwork":
        """``degrees``: of the units of each hidden layer the number of features; ``dtype``: of the masks."""
        features, device = len(order), order.device
        k = torch.arange(features, device=device)
        each = linears[-1].out_features // features
        rows = [torch.argsort(d, stable=True) for d in degrees]
        rows.append((order[:, None] * each + torch.arange(each, device=device)).flatten())
        # the columns of a context are those behind the features
        context = torch.arange(features, linears[0].in_features, device=device)
        first_weights = [0, *accumulate(layer.weight.numel() for layer in linears)]
        first_units = [0, *accumulate(layer.out_features for layer in linears)]
        parts = [
            *zip(linears, first_weights, rows, [order, *rows], strict=False),
            (linears[0], 0, rows[0], context),
        ]
        *places, of_context = [
            (first + r[:, None] * layer.in_features + columns).flatten() for layer, first, r, columns in parts
        ]
        masks = [layer.mask[r][:, columns].flatten().to(dtype) for layer, _, r, columns in parts]
        units = torch.cat([first + r for first, r in zip(first_units, rows, strict=False)])
        sizes = [sum(map(len, places)), len(of_context), len(units)]
        return SortedNetwork(
            order,
            torch.stack([(d[:, None] <= k).sum(0) for d in degrees]),
            rows,
            torch.cat([*places, of_context, first_weights[-1] + units]),
            torch.cat([*masks, masks[0].new_ones(len(units))]),
            sizes,
        )

    def parameters(self, linears: Sequence[Theirs]) -> Sequence[Tensor]:
        """Masked weights, those of a context, and biases, sorted.

        They are not kept: a write to ``parameter.data`` would not be noticed.
        """
        found = [*(layer.weight.flatten() for layer in linears), *(layer.bias for layer in linears)]
        return (torch.cat(found).index_select(0, self.places) * self.masks).split(self.sizes)


def _is_residual(net: Theirs) -> bool:
    if not len(net.blocks):
        return getattr(net, "use_residual_blocks", True)
    return hasattr(net.blocks[0], "linear_layers")


def conditioner_activation(net: Theirs) -> str | None:
    """Name of the one activation of a MADE; None if masked_inverse does not have it."""
    functions = [m.activation for m in (net, *net.blocks) if hasattr(m, "activation")]
    names = {activation_name(f) for f in functions}
    return names.pop() if len(names) == 1 else None


def conditioner_obstacle(net: Theirs, package: str) -> str | None:
    """Why an inverse takes a pass for each feature, if it is because of the options of its network."""
    parts = (net, net.__class__), *((b, b.__class__) for b in getattr(net, "blocks", ()))
    names = ("MADE", "MaskedResidualBlock", "MaskedFeedforwardBlock")
    if any(c.__name__ not in names or c.__module__.partition(".")[0] != package for _, c in parts):
        return f"its network is of the class {type(net).__name__}"
    if any(getattr(b, "batch_norm_layers", getattr(b, "batch_norm", None)) is not None for b in net.blocks):
        return "batch norm in its network"
    if conditioner_activation(net) is None and (len(net.blocks) or hasattr(net, "activation")):
        return "the activation of its network"
    preprocessing = getattr(net, "preprocessing", None)
    if not isinstance(preprocessing, nn.Identity | None) and not is_periodic(preprocessing):
        return "preprocessing in its network"
    return None


def is_periodic(preprocessing: nn.Module) -> bool:
    """Whether it is normflows' waves of some features, without options that its layers do not set."""
    own = type(preprocessing)
    named = own.__name__ == "PeriodicFeaturesElementwise" and own.__module__ == "normflows.utils.nn"
    return named and not preprocessing.apply_bias and type(preprocessing.activation) is nn.Identity


@cache
def _package_of(layer: type) -> str:
    """Package of the library of a layer's class."""
    return (layer.replaced() if issubclass(layer, Accelerated) else layer).__module__.partition(".")[0]


def outside_or_not_vectors(layer: Theirs, inputs: Tensor) -> bool:
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
    def refusal(cls, module: Theirs) -> str | None:
        scale: Callable | None = getattr(module, "scale_activation", None)  # of glasflow
        if scale is not None and getattr(scale, "__qualname__", "") != cls.OWN_SCALE:
            return "scale_activation"
        return conditioner_obstacle(module.autoregressive_net, _package_of(type(module)))

    def _form(self) -> Affine:
        return self.AFFINE


class RationalQuadraticAutoregressive(MaskedAutoregressive):
    """Autoregressive layer with splines: these are one op in both directions."""

    @classmethod
    def refusal(cls, module: Theirs) -> str | None:
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
        return spline_form(self, self.num_bins, self._factor())

    def _scale(self) -> Tensor | None:
        return self.tail_bound if isinstance(self.tail_bound, Tensor) else None
