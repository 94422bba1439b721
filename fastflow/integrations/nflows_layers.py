"""Faster layers of nflows, for its package and its forks, whose classes have the same names and attributes."""

import functools
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastflow.integrations import piecewise_layers
from fastflow.integrations.accelerate import Accelerated, Chain, Theirs, not_invertible
from fastflow.integrations.coupling_layers import is_plain, pays_for_small_ops
from fastflow.integrations.kept import value_of
from fastflow.integrations.masked_layers import AffineAutoregressive, RationalQuadraticAutoregressive
from fastflow.integrations.residual_layers import ResidualNet
from fastflow.integrations.spline_layers import RationalQuadraticCDF, RationalQuadraticCoupling
from fastflow.nn.lu_linear import matrices_of
from fastflow.ops import actnorm, conv1x1, lu_weight, positions, triangular_solve
from fastflow.reversible import has_hooks, run_reversible


@functools.lru_cache(maxsize=64)
def _places(layers: int, features: int, device: torch.device) -> Tensor:
    """For each entry of matrices ``[K, D, D]``, its index in the lower entries, the diagonals, then the upper entries.

    Those of the K layers follow one another.
    """
    with torch.inference_mode(False):
        lower, upper = (
            torch.tril_indices(features, features, -1),
            torch.triu_indices(features, features, 1),
        )
        places = torch.empty(features, features, dtype=torch.int64)
        count = lower.shape[1]
        places[lower[0], lower[1]] = torch.arange(count)
        places.diagonal().copy_(count + torch.arange(features))
        places[upper[0], upper[1]] = count + features + torch.arange(count)
        return (places.flatten() + features**2 * torch.arange(layers)[:, None]).flatten().to(device)


def _factors(layers: Sequence[Theirs]) -> Tensor:
    """L below the diagonals, raw diagonals of U, and U above them, of layers of one size, ``[K, D, D]``."""
    entries = torch.cat(
        [p for m in layers for p in (m.lower_entries, m.unconstrained_upper_diag, m.upper_entries)]
    )
    count, d = len(layers), layers[0].features
    return entries.index_select(0, _places(count, d, entries.device)).view(count, d, d)


def _matrices(layers: Sequence[Theirs]) -> tuple[Tensor, ...]:
    """L U, L without its diagonal, U and log|det| of layers of one size, each ``[K, ...]``."""
    return matrices_of(_factors(layers), layers[0].eps, None)


def _inverses(layers: Sequence[Theirs]) -> tuple[Tensor, Tensor]:
    """The inverses of L U, and log|det L U|, of layers of one size."""
    factors = _factors(layers)
    log_diagonal = torch.log(F.softplus(factors.diagonal(dim1=1, dim2=2)) + layers[0].eps)
    rows, signs = _without_permutation(log_diagonal.shape, log_diagonal.dtype, log_diagonal.device)
    _, inverses, log_det = lu_weight(rows, factors, factors, log_diagonal, signs)
    return inverses, log_det


@functools.lru_cache(maxsize=64)
def _without_permutation(
    shape: torch.Size, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Order of rows and signs of matrices whose diagonals are positive."""
    with torch.inference_mode(False):
        rows = torch.arange(shape[1], device=device).expand(shape)
        return rows, torch.ones(shape, dtype=dtype, device=device)


class LU(Accelerated):
    """``LULinear``: one product with L U, which a composite computes for all of its layers at once."""

    def forward(
        self, inputs: Tensor, context: Tensor | None = None, *matrices: Tensor
    ) -> tuple[Tensor, Tensor]:
        if _is_half(self) or _is_cached(self):
            return super().forward(inputs, context)
        weight, _, _, log_det = matrices or (m[0] for m in _matrices([self]))
        return F.linear(inputs, weight, self.bias), log_det.expand(inputs.shape[0])

    def inverse(
        self, inputs: Tensor, context: Tensor | None = None, *matrices: Tensor
    ) -> tuple[Tensor, Tensor]:
        if _is_half(self) or _is_cached(self):
            return super().inverse(inputs, context)
        if len(matrices) == len(("inverse", "shift", "log_det")):
            inverse, shift, log_det = matrices
            return torch.addmm(shift, inputs, inverse.mT), log_det.expand(inputs.shape[0])
        _, lower, upper, log_det = [m[None] for m in matrices] or _matrices([self])
        columns = (inputs - self.bias).mT[None]
        columns = triangular_solve(lower, columns, upper=False, unit_diagonal=True)
        columns = triangular_solve(upper, columns, upper=True)
        return columns[0].mT, -log_det.expand(inputs.shape[0])


def _is_half(layer: Theirs) -> bool:
    """Whether the matrices would have another dtype than the layer."""
    return layer.bias.dtype not in (torch.float32, torch.float64)


def _is_cached(layer: Theirs) -> bool:
    """Whether the library keeps the matrices of a layer, which are then the fastest."""
    return not layer.training and getattr(layer, "using_cache", False)


def _shared(layers: Sequence[Theirs], inverse: bool) -> dict[int, tuple[Tensor, ...]]:
    """Matrices of the LU layers among ``layers``, by position, computed for those of one size at once."""
    kinds: dict[tuple, list[int]] = {}
    for i, layer in enumerate(layers):
        if isinstance(layer, LU) and not (_is_half(layer) or _is_cached(layer) or has_hooks(layer)):
            key = layer.features, layer.eps, layer.bias.dtype, layer.bias.device
            kinds.setdefault(key, []).append(i)
    found = {}
    for places in kinds.values():
        if len(places) < 2:
            continue
        group = [layers[i] for i in places]
        if inverse:
            inverses, log_det = _inverses(group)
            bias = torch.stack([layer.bias for layer in group])
            matrices = inverses, -(inverses @ bias[..., None]).squeeze(-1), -log_det
        else:
            matrices = _matrices(group)
        found |= dict(zip(places, zip(*(m.unbind() for m in matrices), strict=True), strict=True))
    return found


class Composite(Accelerated):
    """``CompositeTransform``: the matrices of all LU layers are computed at once."""

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        layers = list(self._transforms)
        shared, log_det = _shared(layers, inverse=False), None
        for i, layer in enumerate(layers):
            inputs, step = layer(inputs, context, *shared.get(i, ()))
            log_det = step if log_det is None else log_det + step
        return inputs, inputs.new_zeros(inputs.shape[0]) if log_det is None else log_det

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        layers = list(self._transforms)
        shared, log_det = _shared(layers, inverse=True), None
        for i, layer in reversed(list(enumerate(layers))):
            inputs, step = layer.inverse(inputs, context, *shared.get(i, ()))
            log_det = step if log_det is None else log_det + step
        return inputs, inputs.new_zeros(inputs.shape[0]) if log_det is None else log_det


class ReversibleComposite(Chain, Composite):
    """``CompositeTransform`` that recomputes its activations; the layers of chains within it are its layers."""

    @classmethod
    def obstacle(cls, module: Theirs) -> str | None:
        base = next(c for c in type(module).__mro__ if c.__name__ == "Transform")
        layers = [m for m in module.modules() if isinstance(m, base)]
        return not_invertible(layers, base.__module__.rpartition(".transforms")[0], INVERTIBLE)

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        layers = list(_flattened(self))
        if not layers or (context is not None and not isinstance(context, Tensor)):
            return super().forward(inputs, context)
        if any(map(_is_cached, layers)):  # would be kept without the graph that a gradient needs
            return super().forward(inputs, context)

        def matrices(layers: Sequence[nn.Module]) -> list[tuple[Tensor | None, ...]]:
            shared = _shared(layers, inverse=False)
            return [shared.get(i, ()) for i in range(len(layers))]

        return run_reversible(layers, inputs, context, shared_args=matrices)


def _flattened(chain: Theirs) -> Iterator[nn.Module]:
    for layer in chain._transforms:
        if isinstance(layer, Composite) and not has_hooks(layer):
            yield from _flattened(layer)
        else:
            yield layer


class ResidualBlock(Accelerated):
    """``ResidualBlock`` of vectors: the gate of the context without a copy of both halves."""

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> Tensor:
        if context is None:
            return super().forward(inputs, context)
        temps = inputs
        if self.use_batch_norm:
            temps = self.batch_norm_layers[0](temps)
        temps = self.linear_layers[0](self.activation(temps))
        if self.use_batch_norm:
            temps = self.batch_norm_layers[1](temps)
        temps = self.linear_layers[1](self.dropout(self.activation(temps)))
        return torch.addcmul(inputs, temps, torch.sigmoid(self.context_layer(context)))


class Coupling(Accelerated):
    """A coupling without an op of its own: features are selected by their indices, which autograd also adds by."""

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if inputs.dim() not in (2, 4) or inputs.shape[1] != self.features:
            return super().forward(inputs, context)  # raises
        identity = inputs.index_select(1, self.identity_features)
        params = self.transform_net(identity, context)
        transformed = inputs.index_select(1, self.transform_features)
        transformed, log_det = self._coupling_transform_forward(transformed, params)
        outputs = inputs.index_copy(1, self.transform_features, transformed)
        if self.unconditional_transform is None:
            return outputs, log_det
        identity, log_det_identity = self.unconditional_transform(identity, context)
        return outputs.index_copy(1, self.identity_features, identity), log_det + log_det_identity

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if inputs.dim() not in (2, 4) or inputs.shape[1] != self.features:
            return super().inverse(inputs, context)
        identity, log_det_identity = inputs.index_select(1, self.identity_features), None
        transformed = inputs.index_select(1, self.transform_features)
        if self.unconditional_transform is not None:
            identity, log_det_identity = self.unconditional_transform.inverse(identity, context)
            inputs = inputs.index_copy(1, self.identity_features, identity)
        params = self.transform_net(identity, context)
        transformed, log_det = self._coupling_transform_inverse(transformed, params)
        outputs = inputs.index_copy(1, self.transform_features, transformed)
        return outputs, log_det if log_det_identity is None else log_det + log_det_identity


class AffineCoupling(Coupling):
    """``AffineCouplingTransform``."""

    def _coupling_transform_forward(self, inputs: Tensor, transform_params: Tensor) -> tuple[Tensor, Tensor]:
        scale, shift = self._scale_and_shift(transform_params)
        return torch.addcmul(shift, inputs, scale), scale.log().flatten(1).sum(1)


class AdditiveCoupling(Coupling):
    """``AdditiveCouplingTransform``: no scale is computed."""

    def _coupling_transform_forward(self, inputs: Tensor, transform_params: Tensor) -> tuple[Tensor, Tensor]:
        return inputs + transform_params, transform_params.new_zeros(inputs.shape[0])

    def _coupling_transform_inverse(self, inputs: Tensor, transform_params: Tensor) -> tuple[Tensor, Tensor]:
        return inputs - transform_params, transform_params.new_zeros(inputs.shape[0])


class LinearCoupling(piecewise_layers.LinearCoupling, Coupling):
    """``PiecewiseLinearCouplingTransform``."""


class QuadraticCoupling(piecewise_layers.QuadraticCoupling, Coupling):
    """``PiecewiseQuadraticCouplingTransform``."""


class OneByOneConvolution(Accelerated):
    """``OneByOneConvolution``: one convolution, whose weight has the permutation."""

    BYPASSED = ("permutation",)

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if not self._takes(inputs):
            return super().forward(inputs, context)
        weight, _, _, log_det = (m[0] for m in _matrices([self]))
        weight = weight.index_select(1, self._places())
        return conv1x1(inputs, weight, self.bias), (positions(inputs) * log_det).expand(inputs.shape[0])

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if not self._takes(inputs):
            return super().inverse(inputs, context)
        inverses, log_det = _inverses([self])
        weight = inverses[0].index_select(0, self._places())
        log_det = (-positions(inputs) * log_det[0]).expand(inputs.shape[0])
        return conv1x1(inputs, weight, -(weight @ self.bias)), log_det

    def _places(self) -> Tensor:
        return torch.argsort(self.permutation._permutation)

    def _takes(self, inputs: Tensor) -> bool:
        fits = inputs.ndim == 4 and inputs.shape[1] == self.features
        return fits and is_plain(inputs, self.bias) and not _is_cached(self)


class BatchNorm(Accelerated):
    """``BatchNorm``: one scale of a feature, and one logarithm of it."""

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if inputs.dim() != 2:
            return super().forward(inputs, context)  # raises
        mean, var = self.running_mean, self.running_var
        if self.training:
            var, mean = torch.var_mean(inputs, 0)
            for kept, new in ((self.running_mean, mean), (self.running_var, var)):
                kept.mul_(1 - self.momentum).add_(new.detach(), alpha=self.momentum)
        scale = self.weight * torch.rsqrt(var + self.eps)
        return torch.addcmul(self.bias, inputs - mean, scale), scale.log().sum().expand(inputs.shape[0])

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if inputs.dim() != 2 or self.training:
            return super().inverse(inputs, context)  # raises
        scale = torch.sqrt(self.running_var + self.eps) / self.weight
        outputs = torch.addcmul(self.running_mean, inputs - self.bias, scale)
        return outputs, scale.log().sum().expand(inputs.shape[0])


class ActNorm(Accelerated):
    """``ActNorm``: one op on a GPU, where its flag is read once, not in each training step."""

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        pending = self.training and not value_of(self, "initialized", bool)
        if pending or not self._takes(inputs):
            return super().forward(inputs, context)
        return actnorm(inputs, -self.log_scale, -self.shift, inverse=True)

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if not self._takes(inputs):
            return super().inverse(inputs, context)
        return actnorm(inputs, -self.log_scale, -self.shift)

    def _takes(self, inputs: Tensor) -> bool:
        if inputs.ndim not in (2, 4) or inputs.shape[1] != self.log_scale.numel():
            return False
        return pays_for_small_ops(inputs) and is_plain(inputs, self.log_scale)


def classes(transforms: ModuleType, resnet: ModuleType) -> dict[type, type[Accelerated]]:
    """Faster layers by the classes of a package, of its modules ``transforms`` and ``nn.nets.resnet``."""
    return {
        transforms.PiecewiseRationalQuadraticCouplingTransform: RationalQuadraticCoupling,
        transforms.PiecewiseRationalQuadraticCDF: RationalQuadraticCDF,
        transforms.MaskedAffineAutoregressiveTransform: AffineAutoregressive,
        transforms.MaskedPiecewiseRationalQuadraticAutoregressiveTransform: RationalQuadraticAutoregressive,
        transforms.AffineCouplingTransform: AffineCoupling,
        transforms.AdditiveCouplingTransform: AdditiveCoupling,
        transforms.PiecewiseLinearCouplingTransform: LinearCoupling,
        transforms.PiecewiseQuadraticCouplingTransform: QuadraticCoupling,
        transforms.PiecewiseLinearCDF: piecewise_layers.LinearCDF,
        transforms.PiecewiseQuadraticCDF: piecewise_layers.QuadraticCDF,
        transforms.MaskedPiecewiseQuadraticAutoregressiveTransform: piecewise_layers.QuadraticAutoregressive,
        transforms.OneByOneConvolution: OneByOneConvolution,
        transforms.ActNorm: ActNorm,
        transforms.BatchNorm: BatchNorm,
        transforms.LULinear: LU,
        transforms.CompositeTransform: Composite,
        resnet.ResidualBlock: ResidualBlock,
        resnet.ResidualNet: ResidualNet,
    }


# of these, the time is that of the modules inside, or of one operator
NOTHING_TO_GAIN = {
    "AffineTransform",
    "IdentityTransform",
    "InverseTransform",
    "MultiscaleCompositeTransform",
    "Permutation",
    "PointwiseAffineTransform",
    "RandomPermutation",
    "ReversePermutation",
    "SqueezeTransform",
}


# layers whose inverse is a formula, also in training: no search, no statistics of a batch, no saturation
INVERTIBLE = frozenset(
    {
        "ActNorm",
        "AdditiveCouplingTransform",
        "AffineCouplingTransform",
        "AffineTransform",
        "CompositeTransform",
        "HouseholderSequence",
        "IdentityTransform",
        "InverseTransform",
        "LULinear",
        "MaskedAffineAutoregressiveTransform",
        "MaskedPiecewiseRationalQuadraticAutoregressiveTransform",
        "NaiveLinear",
        "OneByOneConvolution",
        "Permutation",
        "PiecewiseLinearCouplingTransform",
        "PiecewiseQuadraticCDF",
        "PiecewiseQuadraticCouplingTransform",
        "PiecewiseRationalQuadraticCDF",
        "PiecewiseRationalQuadraticCouplingTransform",
        "PiecewiseLinearCDF",
        "PointwiseAffineTransform",
        "QRLinear",
        "RandomPermutation",
        "ReversePermutation",
        "SVDLinear",
        "SqueezeTransform",
    }
)


def is_layer(package: str) -> Callable[[type], bool]:
    """Whether a class is a layer of the package that could be faster; networks of masked layers are none."""
    return lambda c: (
        c.__module__.startswith(f"{package}.transforms")
        and c.__module__ != f"{package}.transforms.made"
        and c.__name__ not in NOTHING_TO_GAIN
    )
