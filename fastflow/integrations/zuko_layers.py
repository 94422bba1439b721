"""Faster lazy transformations of zuko, and the transformations that they build."""

import math
from abc import abstractmethod
from collections.abc import Callable
from functools import cached_property, lru_cache, partial
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Size, Tensor, nn
from torch.distributions import Transform, constraints
from torch.distributions.transforms import _InverseTransform
from torch.distributions.utils import _sum_rightmost
from zuko import flows as _flows
from zuko import nn as _networks
from zuko import transforms as _transforms
from zuko.flows.spline import CircularRQSTransform
from zuko.lazy import LazyComposedTransform as _LazyComposedTransform
from zuko.utils import broadcast, unpack

from fastflow import ops, validation
from fastflow.integrations.accelerate import Accelerated, Theirs
from fastflow.integrations.kept import found_in, kept_of, value_of
from fastflow.integrations.masked_layers import SortedNetwork
from fastflow.kept import Kept
from fastflow.nn.networks.activation import activation_name
from fastflow.ops.masked_inverse import AFTER, SKIP, Affine, Spline
from fastflow.reversible import is_changed

VECTOR = constraints.independent(constraints.real, 1)


class Univariate(NamedTuple):
    """The transformation of one feature."""

    form: Affine | Spline
    circular: bool
    """Whether features are shifted by half of the circle first."""

    @staticmethod
    def of(layer: Theirs) -> "Univariate":
        """That of a layer that was accelerated."""
        found = Univariate.find(layer)
        if found is None:
            raise validation.argument_error("univariate", f"{layer.univariate}", "one that the ops have")
        return found

    @staticmethod
    def find(layer: Theirs) -> "Univariate | None":
        """That of a layer of zuko; None if the ops do not have it."""
        constructor, options = layer.univariate, {}
        if isinstance(constructor, partial):
            if constructor.args:
                return None
            constructor, options = constructor.func, constructor.keywords
        if not all(isinstance(v, int | float) for v in options.values()):
            return None
        if not any(constructor is known for known in _CONSTRUCTORS):
            return None
        return _univariate(constructor, tuple(options.items()), tuple(map(tuple, layer.shapes)))

    def shifted(self, x: Tensor) -> Tensor:
        return torch.remainder(x, 2 * math.pi) - math.pi if self.circular else x


_CONSTRUCTORS = (
    _transforms.MonotonicAffineTransform,
    _transforms.MonotonicRQSTransform,
    CircularRQSTransform,
)


@lru_cache(maxsize=256)  # each call of a transformation asks
def _univariate(constructor: Callable, pairs: tuple, shapes: tuple) -> Univariate | None:
    options, sizes = dict(pairs), [math.prod(shape) for shape in shapes]
    slope = options.get("slope", 1e-3)
    if not 0 < slope < 1:
        return None
    if constructor is _transforms.MonotonicAffineTransform:
        if [len(shape) for shape in shapes] != [0, 0] or options.keys() - {"slope"}:
            return None
        return Univariate(Affine("soft_clip", params_layout="shift_scale", factor=-math.log(slope)), False)
    circular = constructor is CircularRQSTransform
    known = {"slope"} if circular else {"slope", "bound"}
    bins = sizes[0] if sizes else 0
    if bins == 0 or sizes != [bins, bins, bins - 1] or options.keys() - known:
        return None
    bound = math.pi if circular else options.get("bound", 5.0)
    return Univariate(spline_form(bins, bound, slope), circular) if bound > 0 else None


def spline_form(bins: int, bound: float, slope: float) -> Spline:
    return Spline(bins, float(bound), "linear", "zuko", min_bin=0.0, min_slope=slope)


class Inverse(_InverseTransform):
    """Inverse of a transformation whose log-det is computed with it."""

    _inv: Any  # a _WithInverse, which the base declares as a Transform, or None

    def call_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        return self._inv.inverse_and_ladj(y)


class _WithInverse(Transform):
    """A transformation with ``call_and_ladj`` and ``inverse_and_ladj``."""

    @abstractmethod
    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError(f"{type(self).__name__} has no call_and_ladj")

    @abstractmethod
    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """x and the log-det of the inverse."""
        raise NotImplementedError(f"{type(self).__name__} has no inverse_and_ladj")

    @property
    def inv(self) -> Transform:
        return Inverse(self)

    def _call(self, x: Tensor) -> Tensor:
        return self.call_and_ladj(x)[0]

    def _inverse(self, y: Tensor) -> Tensor:
        return self.inverse_and_ladj(y)[0]

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return self.call_and_ladj(x)[1]


class DependentTransform(_WithInverse, _transforms.DependentTransform):
    """Transformation of each feature of vectors, of raw parameters ``[*, D, P]``: one op, which sums the log-det."""

    def __init__(self, layer: Theirs, params: Tensor) -> None:
        Transform.__init__(self)
        self.reinterpreted = 1
        self._layer, self._params = layer, params

    @cached_property
    def base(self) -> Transform:
        return self._layer.univariate(*unpack(self._params, self._layer.shapes))

    # properties, as in zuko, of which torch has the values as attributes
    @property
    def domain(self) -> constraints.Constraint:  # pyright: ignore[reportIncompatibleVariableOverride]
        return super().domain if Univariate.of(self._layer).circular else VECTOR

    @property
    def codomain(self) -> constraints.Constraint:  # pyright: ignore[reportIncompatibleVariableOverride]
        return super().codomain if Univariate.of(self._layer).circular else VECTOR

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        univariate = Univariate.of(self._layer)
        return _computed(univariate.form, univariate.shifted(x), self._params, inverse=False)

    def _inverse(self, y: Tensor) -> Tensor:
        univariate = Univariate.of(self._layer)
        return univariate.shifted(_computed(univariate.form, y, self._params, inverse=True)[0])

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        univariate = Univariate.of(self._layer)
        x, ladj = _computed(univariate.form, y, self._params, inverse=True)
        return univariate.shifted(x), ladj

    def solved(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """x, and the log-det of the inverse as that at x, which differs for y beyond the ends of a circle."""
        if Univariate.of(self._layer).circular:
            x = self._inverse(y)
            return x, -self.call_and_ladj(x)[1]
        return self.inverse_and_ladj(y)

    def forward_shape(self, shape: Size) -> Size:
        return shape

    def inverse_shape(self, shape: Size) -> Size:
        return shape


def _computed(
    form: Affine | Spline, x: Tensor, params: Tensor, inverse: bool, channel_order: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """y and the sum of its log-slopes. With a ``channel_order``, the features of ``params`` come first in it."""
    dtype = torch.promote_types(x.dtype, params.dtype)
    x, params = x.to(dtype), params.to(dtype)
    if isinstance(form, Affine):
        y, log_slope = (form.inverse if inverse else form.forward)(x, params)
        return y, log_slope.expand(y.shape).sum(-1)
    features, shared = x.shape[-1], params.ndim == 2
    batch = torch.broadcast_shapes(x.shape[:-1], params.shape[:-2])
    x = x.expand(*batch, features).reshape(-1, features)
    params = params if shared else params.expand(*batch, *params.shape[-2:])
    rows = 1 if shared else x.shape[0]
    params = params.reshape(rows, params.shape[-2] * params.shape[-1])
    y, log_det = ops.spline(x, params, channel_order, **form._asdict(), inverse=inverse)
    return y.view(*batch, features), log_det.to(dtype).view(batch)


def _with_context(x: Tensor, c: Tensor | None) -> Tensor:
    return x if c is None else torch.cat(broadcast(x, c, ignore=1), -1)


def _raw(layer: Theirs, inputs: Tensor) -> Tensor:
    """Raw parameters ``[*, D, P]``, the output of the layer's network."""
    return layer.hyper(inputs).unflatten(-1, (-1, layer.total))


class Lazy(Accelerated):
    """A lazy transformation whose features are transformed by one op."""

    @classmethod
    def refusal(cls, module: Theirs) -> str | None:
        if Univariate.find(module) is not None:
            return None
        constructor = module.univariate
        while isinstance(constructor, partial):
            constructor = constructor.func
        return f"univariate {getattr(constructor, '__name__', type(constructor).__name__)}"


class ElementWise(Lazy):
    """``ElementWiseTransform``."""

    def forward(self, c: Tensor | None = None) -> Transform:
        if c is not None:
            return DependentTransform(self, _raw(self, c))
        return DependentTransform(
            self, torch.cat([p.flatten(1) if p.ndim > 1 else p[:, None] for p in self.phi], 1)
        )


class GeneralCoupling(Lazy):
    """``GeneralCouplingTransform``: the splines, the copy and the log-det are one op."""

    def meta(self, c: Tensor | None, x: Tensor) -> Transform:
        return DependentTransform(self, _raw(self, _with_context(x, c)))

    def forward(self, c: Tensor | None = None) -> Transform:
        return CouplingTransform(self, c)


class CouplingTransform(_WithInverse, _transforms.CouplingTransform):
    """Coupling of a :class:`GeneralCoupling`."""

    def __init__(self, layer: Theirs, c: Tensor | None) -> None:
        Transform.__init__(self)
        self.meta = partial(layer.meta, c)
        self._layer, self._context = layer, c
        self.idx_a, self.idx_b, self._order = value_of(layer, "mask", _parts_of)

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self._both(x, inverse=False)

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        return self._both(y, inverse=True)

    def _both(self, x: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        x_a = x.index_select(-1, self.idx_a)
        params = _raw(self._layer, _with_context(x_a, self._context))
        univariate = Univariate.of(self._layer)
        if isinstance(univariate.form, Spline) and not univariate.circular:
            return _computed(univariate.form, x, params, inverse, self._order)
        of_features = DependentTransform(self._layer, params)
        x_b = x.index_select(-1, self.idx_b)
        y_b, ladj = (of_features.solved if inverse else of_features.call_and_ladj)(x_b)
        y = x.to(y_b.dtype).expand(*y_b.shape[:-1], -1)
        return y.index_copy(-1, self.idx_b, y_b), ladj


def _parts_of(mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    constant, transformed = mask.nonzero().squeeze(-1), (~mask).nonzero().squeeze(-1)
    return constant, transformed, torch.cat([transformed, constant])


class MaskedAutoregressive(Lazy):
    """``MaskedAutoregressiveTransform``: the inverse takes one pass of the network."""

    def meta(self, c: Tensor | None, x: Tensor) -> Transform:
        return DependentTransform(self, _raw(self, _with_context(x, c)))

    def forward(self, c: Tensor | None = None) -> Transform:
        return AutoregressiveTransform(self, c)


class AutoregressiveTransform(_WithInverse, _transforms.AutoregressiveTransform):
    """Autoregressive transformation of a :class:`MaskedAutoregressive`."""

    meta: Callable[[Tensor], DependentTransform]

    def __init__(self, layer: Theirs, c: Tensor | None) -> None:
        _transforms.AutoregressiveTransform.__init__(self, partial(layer.meta, c), layer.passes)
        self._layer, self._context = layer, c

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.meta(x).call_and_ladj(x)

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        if (at_once := _inverses(self._layer, [self], y)) is not None:
            return at_once
        c, univariate = self._context, Univariate.of(self._layer)
        form = univariate.form
        found = _network_of(self._layer, y, c)
        bound = form.bound if univariate.circular and isinstance(form, Spline) else None
        if found is None or (bound is not None and _is_beyond(y, bound)):
            return self._in_passes(y)
        network, structure = found
        linears = network.linears
        features, batch, first = y.shape[-1], y.shape[:-1], network.widths[0]
        weights, of_context, added = structure.parameters(linears)
        if c is not None:
            # rows of zeros for the other layers: a product takes less time than a copy of their biases for each sample
            of_context = nn.functional.pad(of_context.view(first, -1), (0, 0, 0, added.numel() - first))
            added = nn.functional.linear(c, of_context, added)
            if c.ndim > 1:
                if c.shape[:-1] != batch:
                    batch = torch.broadcast_shapes(batch, c.shape[:-1])
                    added = added.expand(*batch, -1)
                added = added.reshape(-1, added.shape[-1])
        x, log_det = ops.masked_inverse(
            y.expand(*batch, features).reshape(-1, features),
            weights,
            added,
            ends=structure.ends,
            order=structure.order,
            widths=network.widths,
            layers=network.flags,
            activation=network.activation,
            transformer=form._replace(tails="half_turn") if univariate.circular else form,
        )
        return x.view(*batch, features), log_det.view(batch)

    def _in_passes(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """As zuko computes it; the log-det is that of the last pass."""
        x = torch.zeros_like(y)
        for _ in range(self.passes - 1):
            x = self.meta(x)._inverse(y)
        return self.meta(x).solved(y)


class LazyComposed(Accelerated):
    """``LazyComposedTransform``: neighbors that are autoregressive are inverted in one call."""

    def forward(self, c: Tensor | None = None) -> Transform:
        return ComposedTransform(self, *(t(c) for t in self.transforms))


class ComposedTransform(_transforms.ComposedTransform):
    """Composition of a :class:`LazyComposed`, or the inverse of one."""

    def __init__(self, layer: Theirs, *transforms: Any) -> None:  # zuko gives torch's Transform more methods
        # zuko's own asserts that there are transformations, which breaks graphs of torch.compile
        Transform.__init__(self)
        self._layer, self.transforms = layer, transforms
        gained, needed = 0, []
        for t in transforms:
            needed.append(t.domain.event_dim - gained)
            gained += t.codomain.event_dim - t.domain.event_dim
        self.domain_dim = max(needed)
        self.codomain_dim = self.domain_dim + gained

    @property
    def inv(self) -> Transform:
        return ComposedTransform(self._layer, *(t.inv for t in reversed(self.transforms)))

    def _call(self, x: Tensor) -> Tensor:
        for transforms in self._runs():
            if (at_once := self._at_once(transforms, x)) is not None:
                x, _ = at_once
            else:
                for t in transforms:
                    x = t(x)
        return x

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        dims, ladjs = self.domain_dim, []
        for transforms in self._runs():
            if (at_once := self._at_once(transforms, x)) is not None:
                x, ladj = at_once
                ladjs.append(_sum_rightmost(ladj, dims - 1))
                continue
            for t in transforms:
                x, ladj = t.call_and_ladj(x)
                ladjs.append(_sum_rightmost(ladj, dims - t.domain.event_dim))
                dims += t.codomain.event_dim - t.domain.event_dim
        return x, sum(ladjs[1:], ladjs[0])

    def _at_once(self, transforms: list[Any], x: Tensor) -> tuple[Tensor, Tensor] | None:
        """Values and log-det of several inverses in one call; None if they are not."""
        return _inverses(self._layer, [t.inv for t in transforms], x) if len(transforms) > 1 else None

    def _runs(self) -> list[list[Any]]:
        """The transformations; neighbors that are inverses of autoregressive ones come together."""
        runs: list[list[Any]] = []
        for t in self.transforms:
            if runs and _is_inverse(t) and _is_inverse(runs[-1][-1]):
                runs[-1].append(t)
            else:
                runs.append([t])
        return runs


def _is_inverse(t: Transform) -> bool:
    return isinstance(t, Inverse) and isinstance(t.inv, AutoregressiveTransform)


def _inverses(
    owner: nn.Module, transforms: list[AutoregressiveTransform], y: Tensor
) -> tuple[Tensor, Tensor] | None:
    """x and the log-det of the inverses, one after the other, without gradients; None if they are not one call.

    ``owner`` is the module of one transformation, or one in which those of all are.
    """
    first = transforms[0]
    c, layer = first._context, first._layer
    if torch.is_grad_enabled() or not y.is_cpu or torch.compiler.is_compiling():
        return None
    chain = found_in(owner, _chain_of, *(t._layer.hyper for t in transforms))
    if chain is None or not _fits(chain.network, layer, y, c):
        return None
    if chain.univariate.circular and (len(transforms) > 1 or _is_beyond(y, chain.univariate.form.bound)):
        return None
    structure = chain.kept.get(chain.masks, y.shape[-1], partial(_structure_of, chain, y.shape[-1]))
    if structure is None:
        return None
    form, features, batch = chain.univariate.form, y.shape[-1], y.shape[:-1]
    if c is not None:
        batch = batch if c.shape[:-1] == batch else torch.broadcast_shapes(batch, c.shape[:-1])
        c = c.expand(*batch, -1).reshape(-1, c.shape[-1])
    x, log_det = ops.masked_inverses(
        y.expand(*batch, features).reshape(-1, features),
        torch.cat([p.flatten() for p in chain.parameters]),
        c,
        places=structure.places,
        ends=structure.ends,
        order=structure.order,
        widths=chain.network.widths,
        layers=chain.network.flags,
        activation=chain.network.activation,
        transformer=form._replace(tails="half_turn") if chain.univariate.circular else form,
    )
    return x.view(*batch, features), log_det.view(batch)


class _Chain(NamedTuple):
    """Autoregressive transformations whose networks have the same sizes."""

    networks: "list[_Layers]"
    univariate: Univariate
    parameters: list[Tensor]
    masks: list[Tensor]
    kept: Kept

    @property
    def network(self) -> "_Layers":
        return self.networks[0]


def _chain_of(owner: nn.Module, *hypers: Theirs) -> _Chain | None:
    """The transformations in a module that have these networks; None if they differ, or if no op has them."""
    layers = {m.hyper: m for m in owner.modules() if isinstance(m, MaskedAutoregressive)}
    if not all(hyper in layers for hyper in hypers):
        return None
    networks = [n for hyper in hypers if (n := found_in(hyper, _layers_of)) is not None]
    if len(networks) < len(hypers) or len(set(map(_sizes_of, networks))) > 1:
        return None
    univariate, *others = (Univariate.of(layers[hyper]) for hyper in hypers)
    if any(other != univariate for other in others):
        return None
    linears = [n.linears for n in networks]
    parameters = [
        p for of_one in linears for name in ("weight", "bias") for p in map(attrgetter(name), of_one)
    ]
    masks = [each.mask for of_one in linears for each in of_one]
    return _Chain(networks, univariate, parameters, masks, Kept())


def _sizes_of(network: "_Layers") -> tuple:
    sizes = [(each.in_features, each.out_features) for each in network.linears]
    return *sizes, *network.flags, network.activation, network.dtype, network.device


class _Structure(NamedTuple):
    """Of the networks of a chain, as masked_inverses takes it."""

    places: Tensor
    ends: Tensor
    order: Tensor


def _structure_of(chain: _Chain, features: int) -> _Structure | None:
    each_sorted = (_sorted(n.linears, n.flags, features, n.dtype) for n in chain.networks)
    found = [network for network in each_sorted if network is not None]
    if len(found) < len(chain.networks):
        return None
    places = [
        torch.where(each.masks > 0, each.places + i * len(each.places), -1) for i, each in enumerate(found)
    ]
    return _Structure(
        torch.stack(places),
        torch.stack([each.ends for each in found]),
        torch.stack([each.order for each in found]),
    )


def _is_beyond(y: Tensor, bound: float) -> bool:
    """Whether y has a value beyond the ends of the circle, where the log-det is that of the features; synchronizes."""
    return bool((y.abs() > bound).any())


def _sorted(
    linears: list[Theirs], flags: list[int], features: int, dtype: torch.dtype
) -> SortedNetwork | None:
    """None if a masked inverse does not have this network, or if masks may not be read."""
    if not Kept.may_keep([layer.mask for layer in linears]):
        return None
    masks = [linears[0].mask[:, :features], *(layer.mask for layer in linears[1:])]
    order = _order_of(masks, flags, features)
    if order is None:
        return None
    degrees = torch.empty_like(order)
    degrees[order] = torch.arange(1, features + 1, device=order.device)
    found = [degrees]
    for i, (mask, bits) in enumerate(zip(masks[:-1], flags, strict=False)):
        degrees = torch.where(mask, found[-1], 0).amax(1)
        if bits & SKIP and bool((degrees != found[i - 1]).any()):
            return None
        found.append(degrees)
    hidden = found[1:]
    if any(bool((d >= features).any()) for d in hidden):
        return None
    return SortedNetwork.of(linears, hidden, order, dtype)


def _order_of(masks: list[Tensor], flags: list[int], features: int) -> Tensor | None:
    """An order in which the parameters of a feature depend on the features before it only."""
    reached = [torch.eye(features, dtype=torch.bool, device=masks[0].device)]
    for i, (mask, bits) in enumerate(zip(masks, flags, strict=True)):
        reach = (mask.float() @ reached[-1].float()) > 0
        reached.append(reach | reached[i - 1] if bits & SKIP else reach)
    adjacency = reached[-1].view(features, -1, features).any(1)
    depth = torch.zeros(features, dtype=torch.int64, device=adjacency.device)
    for _ in range(features):
        deeper = torch.where(adjacency, depth + 1, 0).amax(1)
        if torch.equal(deeper, depth):
            return torch.argsort(depth, stable=True)
        depth = deeper
    return None


class _Layers(NamedTuple):
    """Layers of a network as masked_inverse takes them."""

    linears: list[Theirs]
    widths: list[int]
    flags: list[int]
    activation: str
    dtype: torch.dtype
    device: torch.device
    """Of all parameters."""


def _network_of(layer: Theirs, y: Tensor, c: Tensor | None) -> tuple[_Layers, SortedNetwork] | None:
    """The network of a layer, and how it is sorted; None if its inverse takes several passes."""
    found = found_in(layer.hyper, _layers_of)
    if found is None or not _fits(found, layer, y, c):
        return None
    linears, flags, dtype, features = found.linears, found.flags, y.dtype, y.shape[-1]
    kept, masks = kept_of(layer.hyper, "sorted"), [each.mask for each in linears]
    name = dtype, features, *flags
    structure = kept.get(masks, name, lambda: _sorted(linears, flags, features, dtype))
    return None if structure is None else (found, structure)


def _fits(found: _Layers, layer: Theirs, y: Tensor, c: Tensor | None) -> bool:
    """Whether masked_inverse takes these tensors with the network of a layer."""
    device, dtype, features = y.device, y.dtype, y.shape[-1]
    if torch.is_autocast_enabled(device.type):
        return False
    if device.type != "cpu" and layer.passes < features:  # there the features take their turns in Python
        return False
    if found.dtype != dtype or found.device != device:
        return False
    if c is not None and (c.dtype != dtype or c.device != device):
        return False
    inputs = features + (0 if c is None else c.shape[-1])
    return found.linears[-1].out_features == features * layer.total and found.linears[0].in_features == inputs


def _layers_of(hyper: nn.Module) -> _Layers | None:
    """The layers of a network; None if a masked inverse does not have them."""
    if type(hyper) is not _networks.MaskedMLP or any(map(is_changed, hyper.modules())):
        return None
    linears, flags, functions = [], [], []
    for module in hyper:
        if type(module) is _networks.MaskedLinear:
            linears.append(module)
            flags.append(0)
        elif type(module) is _networks.Residual:
            first, function, second = module
            linears += [first, second]
            flags += [AFTER, SKIP]
            functions.append(function)
        elif linears and flags[-1] == 0:
            flags[-1] = AFTER
            functions.append(module)
        else:
            return None
    names = {activation_name(f) for f in functions}
    activation = names.pop() if len(names) == 1 else None
    if any(layer.bias is None or type(layer) is not _networks.MaskedLinear for layer in linears):
        return None
    if activation is None or len(linears) < 2:
        return None
    kinds = {(p.dtype, p.device) for layer in linears for p in (layer.weight, layer.bias)}
    dtype, device = kinds.pop()
    if kinds or dtype not in (torch.float32, torch.float64):
        return None
    widths = [layer.out_features for layer in linears[:-1]]
    return _Layers(linears, widths, flags, activation, dtype, device)


class MonotonicRQSTransform(_WithInverse, _transforms.MonotonicRQSTransform):
    """``zuko.transforms.MonotonicRQSTransform`` as one op in each direction; the log-slope is that of each element.

    Args:
        widths, heights, derivatives: raw parameters.
        bound: the spline maps ``[-bound, bound]`` to itself.
        slope: smallest slope.

    Shape: widths, heights ``[*, K]``; derivatives ``[*, K - 1]``.

    Example:
        >>> import torch
        >>> from fastflow.integrations.zuko import MonotonicRQSTransform
        >>> t = MonotonicRQSTransform(torch.randn(5, 8), torch.randn(5, 8), torch.randn(5, 7))
        >>> y, ladj = t.call_and_ladj(torch.randn(3, 5))
        >>> x, ladj = t.inv.call_and_ladj(y)
    """

    def __init__(
        self,
        widths: Tensor,
        heights: Tensor,
        derivatives: Tensor,
        bound: float = 5.0,
        slope: float = 1e-3,
        **kwargs: int,
    ) -> None:
        Transform.__init__(self, **kwargs)
        self._raw, self._form = (widths, heights, derivatives), spline_form(widths.shape[-1], bound, slope)

    @cached_property
    def _theirs(self) -> _transforms.MonotonicRQSTransform:
        return _transforms.MonotonicRQSTransform(*self._raw, self._form.bound, self._form.min_slope)

    @property
    def horizontal(self) -> Tensor:
        return self._theirs.horizontal

    @property
    def vertical(self) -> Tensor:
        return self._theirs.vertical

    @property
    def derivatives(self) -> Tensor:
        return self._theirs.derivatives

    @property
    def bins(self) -> int:
        return self._form.bins

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self._elementwise(x, inverse=False)

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        return self._elementwise(y, inverse=True)

    def _elementwise(self, x: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        params = torch.cat(broadcast(*self._raw, ignore=1), -1)
        shape = torch.broadcast_shapes(x.shape, params.shape[:-1])
        x, params = x.expand(shape), params.expand(*shape, -1)
        y, log_slope = _computed(self._form, x.unsqueeze(-1), params.unsqueeze(-2), inverse)
        return y.squeeze(-1), log_slope


FASTER = {
    _LazyComposedTransform: LazyComposed,
    _flows.ElementWiseTransform: ElementWise,
    _flows.GeneralCouplingTransform: GeneralCoupling,
    _flows.MaskedAutoregressiveTransform: MaskedAutoregressive,
}
