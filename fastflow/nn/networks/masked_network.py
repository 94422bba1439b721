"""Masked network of autoregressive flows: the parameters of a feature depend on the features before it."""

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastflow import validation
from fastflow.kept import Kept
from fastflow.nn.networks.activation import ACTIVATIONS
from fastflow.nn.networks.context import checked_context
from fastflow.ops.masked_inverse import AFTER, BEFORE, GATE, SKIP

CONTEXT_MODES = ("add", "glu")
T = TypeVar("T")


class Plan(NamedTuple):
    """A masked network as ``fastflow.ops.masked_inverse`` takes it: the units of each layer sorted by degree."""

    weights: Tensor
    """Matrices of the layers, row-major, one after the other; masked entries are 0."""
    ends: Tensor
    """int64 ``[L, D]``: the number of units of hidden layer l of degree k or less."""
    order: Tensor
    """int64 ``[D]``: feature ``order[k]`` is the k-th."""
    widths: list[int]
    """Number of units of each hidden layer."""
    layers: list[int]
    """Flags of each layer, the last of the output."""


class MaskedNetwork(nn.Module):
    r"""Masked network (MADE): the outputs of feature ``order[k]`` depend on the features ``order[:k]`` only.

    Source: MADE, arXiv:1502.03509, section 4. A hidden unit of degree d depends on the first d features. Connections
    to a unit of a lower degree are masked: they multiply by 0. The degrees of a layer's units ascend and are spread
    evenly from 1 to D - 1. With a context, or with one feature, they start at 0: such units depend on no feature.

    The last layer is zero-initialized, so flows start as the identity.

    Args:
        features: number of features D.
        outputs_per_feature: number P of outputs of each feature.
        hidden: numbers of units of the hidden layers. With ``residual``, the first is the width of the blocks' inputs
            and outputs, and each further one is the width of the layer inside a block.
        residual: pre-activation residual blocks of two layers after the first layer, as in :class:`ResidualMLP`.
        context_features: number of features of the context; None: no context.
        context_mode: ``"add"``: a linear map of the context is added to the first layer, and to the layer inside each
            block. ``"glu"``: it is added to the first layer, and the sigmoid of one multiplies the output of each
            block before it is added, or without blocks each further hidden layer before its activation.
        context_activation: apply the activation to the context's term of the first layer, as nflows does.
        order: order of the features: None: as they are; ``"reverse"``, ``"random"`` (torch's generator), or a
            sequence of each index from 0 to D - 1 once. It is in the state dict unless it is None.
        activation: ``"relu"``, ``"tanh"``, ``"silu"`` or ``"elu"``.
        dropout: probability of dropout after the activation of each hidden layer, with ``residual`` of the layer
            inside each block, in [0, 1).
        degrees: degrees of the units of each hidden layer, with ``residual`` those of the first layer, then for each
            block those inside it and those of its output, which are the first layer's. None: spread evenly.

    Shape: x ``[N, D]``; context ``[N, context_features]`` or None; output ``[N, D P]``, the P outputs of the first
    feature, then those of the second.
    Raises ValueError for any other argument.

    Example:
        >>> import torch
        >>> from fastflow import nn as fnn
        >>> net = fnn.MaskedNetwork(4, 2, hidden=(16, 16))
        >>> h = net(torch.randn(8, 4))
    """

    order: Tensor | None

    def __init__(
        self,
        features: int,
        outputs_per_feature: int,
        hidden: Sequence[int] = (512, 512),
        *,
        residual: bool = False,
        context_features: int | None = None,
        context_mode: str = "add",
        context_activation: bool = False,
        order: str | Sequence[int] | None = None,
        activation: str = "relu",
        dropout: float = 0.0,
        degrees: Sequence[Sequence[int]] | None = None,
    ) -> None:
        super().__init__()
        validation.positive_ints(features=features, outputs_per_feature=outputs_per_feature)
        validation.boolean("residual", residual)
        fewest = 2 if residual else 1
        validation.sample_shape("hidden", hidden, f"{fewest} or more positive integers")
        if len(hidden) < fewest:
            expected = "2 or more positive integers: widths of the blocks and inside each block"
            raise validation.argument_error("hidden", hidden, expected)
        validation.positive_int("context_features", context_features, optional=True)
        validation.one_of("context_mode", context_mode, CONTEXT_MODES)
        validation.boolean("context_activation", context_activation)
        validation.one_of("activation", activation, tuple(ACTIVATIONS))
        validation.number("dropout", dropout, "a number from 0 to below 1", lambda v: 0 <= v < 1)
        self.features, self.outputs_per_feature, self.hidden = features, outputs_per_feature, tuple(hidden)
        self.residual, self.context_features, self.context_mode = residual, context_features, context_mode
        self.context_activation, self.activation, self.dropout = context_activation, activation, dropout
        gated = context_features is not None and context_mode == "glu"
        self.widths, self.flags = _layers(self.hidden, residual, gated)
        sizes = zip((features, *self.widths), (*self.widths, features * outputs_per_feature), strict=True)
        self.layers = cast("Sequence[nn.Linear]", nn.ModuleList(nn.Linear(a, b) for a, b in sizes))
        self.context_layers = nn.ModuleDict()
        if context_features is not None:
            for i, flags in enumerate(self.flags[:-1]):
                if i == 0 or flags & GATE or (context_mode == "add" and residual and not flags & SKIP):
                    self.context_layers[str(i)] = nn.Linear(context_features, self.widths[i])
        self.register_buffer("order", _order(order, features))
        lowest = 0 if context_features is not None or features == 1 else 1
        for i, of_layer in enumerate(_degrees(degrees, self.widths, self.flags, features, lowest)):
            self.register_buffer(f"degrees_{i}", of_layer)
        self._of_degrees, self._of_weights = Kept(), Kept()
        for layer, flags in zip(self.layers, self.flags, strict=True):
            if flags & SKIP:
                nn.init.uniform_(layer.weight, -1e-3, 1e-3)
                nn.init.uniform_(layer.bias, -1e-3, 1e-3)
        nn.init.zeros_(self.layers[-1].weight)
        nn.init.zeros_(self.layers[-1].bias)

    def forward(
        self, x: Tensor, context: Tensor | None = None, factors: Sequence[Tensor | None] | None = None
    ) -> Tensor:
        """The outputs; ``factors`` are those of :meth:`drawn`, or None: new ones."""
        params = self.in_order(self.sorted(x), context, factors)
        if self.order is None:
            return params
        return self.unsorted(params.unflatten(1, (self.features, self.outputs_per_feature))).flatten(1)

    def sorted(self, x: Tensor) -> Tensor:
        """``x`` ``[N, D, ...]`` with its features in the network's order."""
        return x if self.order is None else x.index_select(1, self.order)

    def unsorted(self, x: Tensor) -> Tensor:
        """``x`` ``[N, D, ...]`` with its features as they were before :meth:`sorted`."""
        return x if self.order is None else x.index_select(1, torch.argsort(self.order))

    def drawn(self, x: Tensor) -> list[Tensor | None]:
        """Factors of dropout of the input of each layer for samples like x; of none but in training."""
        if not (self.training and self.dropout):
            return [None] * len(self.layers)
        kept = 1 - self.dropout
        return [
            torch.empty(x.shape[0], layer.in_features, dtype=x.dtype, device=x.device)
            .bernoulli_(kept)
            .div_(kept)
            if self._drops(i)
            else None
            for i, layer in enumerate(self.layers)
        ]

    def _drops(self, i: int) -> bool:
        """Whether dropout is applied to the input of layer i."""
        return bool(self.flags[i] & SKIP) if self.residual else i > 0

    def in_order(
        self, x: Tensor, context: Tensor | None = None, factors: Sequence[Tensor | None] | None = None
    ) -> Tensor:
        """:meth:`forward` of x whose features are in the network's order; those of the output are too."""
        validation.floating_point("x", x)
        validation.same_shape("x", x, (x.shape[0], self.features), "vectors of the network's features")
        context = checked_context(x, context, self.context_features)
        act = ACTIVATIONS[self.activation]
        factors = self.drawn(x) if factors is None else factors
        u, outputs, structure = x, [x], self._structure()
        each = zip(self.layers, self.flags, self._weights(structure), structure.blocks, factors, strict=True)
        for i, (layer, flags, weight, blocks, factor) in enumerate(each):
            u = act(u) if flags & BEFORE else u
            u = _product(u if factor is None else u * factor, weight, layer.bias, blocks)
            if str(i) in self.context_layers:
                term = self.context_layers[str(i)](context)
                if flags & GATE:
                    u = u * torch.sigmoid(term)
                else:
                    u = u + (act(term) if self.context_activation and i == 0 else term)
            u = act(u) if flags & AFTER else u
            u = u + outputs[-2] if flags & SKIP else u
            outputs.append(u)
        return u

    def context_terms(self, context: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """What is added to the layers, and what the gated layers are multiplied by, with units sorted by degree.

        Shape: ``[S]`` or ``[N, S]`` with S the number of units of all layers and of the output; ``[N, G]`` with G the
        number of units of gated layers, or None.
        """
        if context is None:
            return self._unless_fresh("biases", lambda: self._terms(None)[0]), None
        return self._terms(context)

    def _terms(self, context: Tensor | None) -> tuple[Tensor, Tensor | None]:
        act = ACTIVATIONS[self.activation]
        added, gates, orders = [], [], [*self._structure().orders, None]
        for i, (layer, flags, order) in enumerate(zip(self.layers, self.flags, orders, strict=True)):
            term = layer.bias
            if context is not None and str(i) in self.context_layers:
                of_context = self.context_layers[str(i)](context)
                if flags & GATE:
                    gates.append(_taken(torch.sigmoid(of_context), order, 1))
                else:
                    of_context = act(of_context) if self.context_activation and i == 0 else of_context
                    term = of_context + term
            added.append(_taken(term, order, term.ndim - 1))
        if context is not None:
            added = [t if t.ndim == 2 else t.expand(context.shape[0], -1) for t in added]
        return torch.cat(added, -1), torch.cat(gates, 1) if gates else None

    def plan(self) -> Plan:
        """The network with sorted units; kept until a parameter changes, unless autograd needs the weights."""
        structure = self._structure()
        weights = self._unless_fresh("plan", lambda: self._sorted_weights(structure))
        order = structure.features if self.order is None else self.order
        return Plan(weights, structure.ends, order, self.widths, self.flags)

    def one_pass(self, context: Tensor | None = None) -> tuple[Plan, Tensor, Tensor | None]:
        """:meth:`plan` and :meth:`context_terms`, of which what needs no context is kept together."""
        if context is not None:
            return self.plan(), *self._terms(context)
        plan, biases = self._unless_fresh("one pass", lambda: (self.plan(), self.context_terms()[0]))
        if self.order is not None and plan.order is not self.order:
            plan = plan._replace(order=self.order)
        return plan, biases, None

    def _sorted_weights(self, structure: "_Structure") -> Tensor:
        orders = structure.orders
        pairs = zip(self._weights(structure), [*orders, None], [None, *orders], strict=True)
        return torch.cat([_taken(_taken(w, rows, 0), columns, 1).flatten() for w, rows, columns in pairs])

    def _weights(self, structure: "_Structure") -> list[Tensor]:
        """Masked weights of the layers."""
        return self._unless_fresh(
            "weights",
            lambda: [layer.weight * m for layer, m in zip(self.layers, structure.masks, strict=True)],
        )

    def _unless_fresh(self, name: str, compute: Callable[[], T]) -> T:
        """What ``compute`` returns; kept until a parameter changes, unless autograd or a transform needs it anew."""
        parameters = [p for layer in self.layers for p in (layer.weight, layer.bias)]
        if torch.is_grad_enabled() and any(p.requires_grad for p in parameters):
            return compute()
        return self._of_weights.get([*parameters, *self._degrees()], name, compute)

    def _structure(self) -> "_Structure":
        """What follows from the degrees."""
        degrees = self._degrees()
        dtype = self.layers[0].weight.dtype
        sizes = self.features, self.outputs_per_feature
        return self._of_degrees.get(
            degrees, dtype, lambda: _Structure.of(degrees, *sizes, dtype, Kept.may_keep(degrees))
        )

    def _degrees(self) -> list[Tensor]:
        return [getattr(self, f"degrees_{i}") for i in range(len(self.widths))]

    def train(self, mode: bool = True) -> "MaskedNetwork":
        """As of any module. It forgets kept weights: writes to ``parameter.data`` change no version."""
        self._of_weights.forget()
        return super().train(mode)

    def extra_repr(self) -> str:
        parts = [f"{self.features}", f"{self.outputs_per_feature}", f"hidden={self.hidden}"]
        if self.residual:
            parts.append("residual=True")
        if self.context_features is not None:
            parts.append(f"context_features={self.context_features}, context_mode={self.context_mode!r}")
        parts.append(f"activation={self.activation!r}")
        if self.dropout:
            parts.append(f"dropout={self.dropout}")
        return ", ".join(parts)


class _Structure(NamedTuple):
    """What follows from the degrees of a network's units."""

    masks: list[Tensor]
    """Masks of the layers, in the dtype of the weights."""
    orders: list[Tensor | None]
    """Of each hidden layer the order that sorts its units; None if they are sorted."""
    ends: Tensor
    features: Tensor
    """0 to D - 1."""
    blocks: list[list[tuple[int, int, int]] | None]
    """Of each layer blocks of rows, first and end, and the number of columns that are not masked; None: one product."""

    @staticmethod
    def of(
        degrees: list[Tensor], features: int, outputs: int, dtype: torch.dtype, with_values: bool
    ) -> "_Structure":
        """``with_values``: degrees may be read, to find that they are sorted."""
        k = torch.arange(features, device=degrees[0].device)
        # the k-th feature has degree k + 1, and its outputs read degrees of k or less
        columns, rows = [k + 1, *degrees], [*degrees, k.repeat_interleave(outputs)]
        masks = [r[:, None] >= c for r, c in zip(rows, columns, strict=True)]
        ends = torch.stack([(d[:, None] <= k).sum(0) for d in degrees])
        ascend = [with_values and bool((d.diff() >= 0).all()) for d in degrees]
        orders = [
            None if ascends else torch.argsort(d, stable=True)
            for d, ascends in zip(degrees, ascend, strict=True)
        ]
        sorted_layers = [a and b for a, b in zip([True, *ascend], [*ascend, True], strict=True)]
        blocks = [_blocks(mask) if each else None for mask, each in zip(masks, sorted_layers, strict=True)]
        return _Structure([m.to(dtype) for m in masks], orders, ends, k, blocks)


# measured on a CPU: smaller products take no less time in blocks
MIN_WIDTH, MIN_SAMPLES = 256, 64


def _blocks(mask: Tensor) -> list[tuple[int, int, int]] | None:
    """Blocks of the rows of a sorted layer, if products that skip masked columns pay."""
    rows, columns = mask.shape
    if mask.device.type != "cpu" or min(rows, columns) < MIN_WIDTH:
        return None
    count = 4 if min(rows, columns) >= 2 * MIN_WIDTH else 2
    bounds = [rows * i // count for i in range(count + 1)]
    used = mask[[end - 1 for end in bounds[1:]]].sum(1).tolist()
    return list(zip(bounds, bounds[1:], used, strict=False))


def _product(u: Tensor, weight: Tensor, bias: Tensor, blocks: list[tuple[int, int, int]] | None) -> Tensor:
    if blocks is None or u.shape[0] < MIN_SAMPLES:
        return F.linear(u, weight, bias)
    parts = [F.linear(u[:, :end], weight[a:b, :end], bias[a:b]) for a, b, end in blocks]
    return torch.cat(parts, 1)


def _taken(t: Tensor, index: Tensor | None, dim: int) -> Tensor:
    return t if index is None else t.index_select(dim, index)


def _layers(hidden: tuple[int, ...], residual: bool, gated: bool) -> tuple[list[int], list[int]]:
    """Widths of the hidden layers, and the flags of all layers."""
    gate = GATE if gated else 0
    if not residual:
        return list(hidden), [AFTER | (gate if i else 0) for i in range(len(hidden))] + [0]
    width, *inner = hidden
    widths, flags = [width], [0]
    for each in inner:
        widths += [each, width]
        flags += [BEFORE, BEFORE | gate | SKIP]
    return widths, [*flags, 0]


def _order(order: str | Sequence[int] | None, features: int) -> Tensor | None:
    if order is None:
        return None
    if isinstance(order, str):
        validation.one_of("order", order, ("reverse", "random"))
        return torch.randperm(features) if order == "random" else torch.arange(features).flip(0)
    numbers = list(order) if isinstance(order, Sequence | Tensor) else [order]
    numbers = [int(i) if isinstance(i, Tensor) and not i.is_floating_point() else i for i in numbers]
    if not all(isinstance(i, int) for i in numbers) or sorted(numbers) != list(range(features)):
        raise validation.argument_error("order", order, f"each of 0 to {features - 1} once")
    return torch.tensor(numbers)


def spread(count: int, low: int, high: int) -> Tensor:
    """``count`` ascending integers from ``low`` to ``high``, as even as possible."""
    values, i = high - low + 1, torch.arange(count)
    if count >= values:
        return low + i * values // count
    # fewer units than degrees: both ends, so that no unit of another layer is without a use
    return low + (2 * i * (values - 1) + count - 1) // (2 * max(count - 1, 1))


def _degrees(
    given: Sequence[Sequence[int]] | None, widths: list[int], flags: list[int], features: int, lowest: int
) -> list[Tensor]:
    if given is None:
        return [spread(width, lowest, features - 1) for width in widths]
    expected = f"for each of {len(widths)} hidden layers one integer from 0 to {features - 1} per unit"
    if not isinstance(given, Sequence) or isinstance(given, str) or len(given) != len(widths):
        got = (
            f"{len(given)} sequences" if isinstance(given, Sequence) and not isinstance(given, str) else given
        )
        raise validation.argument_error("degrees", got, expected)
    found = []
    for i, (each, width) in enumerate(zip(given, widths, strict=True)):
        of_layer = torch.as_tensor(each)
        if (
            of_layer.shape != (width,)
            or of_layer.is_floating_point()
            or not ((of_layer >= 0) & (of_layer < features)).all()
        ):
            raise validation.argument_error(f"degrees[{i}]", each, expected)
        if flags[i] & SKIP and not torch.equal(of_layer.long(), found[i - 2]):
            raise validation.argument_error(f"degrees[{i}]", each, "the degrees of the block's input")
        found.append(of_layer.long().clone())
    return found
