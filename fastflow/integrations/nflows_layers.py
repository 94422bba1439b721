"""Faster layers of nflows, for its package and its forks, whose classes have the same names and attributes."""

import functools
from collections.abc import Callable
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastflow.integrations.accelerate import Accelerated
from fastflow.integrations.masked_layers import AffineAutoregressive, RationalQuadraticAutoregressive
from fastflow.integrations.spline_layers import RationalQuadraticCDF, RationalQuadraticCoupling
from fastflow.nn.lu_linear import matrices_of
from fastflow.ops import triangular_solve
from fastflow.reversible import has_hooks


@functools.lru_cache(maxsize=64)
def _places(features: int, device: torch.device) -> Tensor:
    """For each entry of a matrix ``[D, D]``, its index in the lower entries, the diagonal, then the upper entries."""
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
        return places.flatten().to(device)


def _matrices(layers: list[nn.Module]) -> tuple[Tensor, ...]:
    """L U, L without its diagonal, U and log|det| of layers of one size, each ``[K, ...]``."""
    entries = [
        torch.cat([layer.lower_entries, layer.unconstrained_upper_diag, layer.upper_entries])
        for layer in layers
    ]
    d = layers[0].features
    places = _places(d, entries[0].device)
    factors = torch.stack(entries).index_select(1, places).view(len(layers), d, d)
    return matrices_of(factors, layers[0].eps, None)


class LU(Accelerated):
    """``LULinear``: one product with L U, which a composite computes for all of its layers at once."""

    @classmethod
    def refusal(cls, module: nn.Module) -> str | None:
        return "using_cache=True" if module.using_cache else None

    def forward(
        self, inputs: Tensor, context: Tensor | None = None, *matrices: Tensor
    ) -> tuple[Tensor, Tensor]:
        weight, _, _, log_det = matrices or (m[0] for m in _matrices([self]))
        return F.linear(inputs, weight, self.bias), log_det.expand(inputs.shape[0])

    def inverse(
        self, inputs: Tensor, context: Tensor | None = None, *matrices: Tensor
    ) -> tuple[Tensor, Tensor]:
        if len(matrices) == len(("inverse", "shift", "log_det")):
            inverse, shift, log_det = matrices
            return torch.addmm(shift, inputs, inverse.mT), log_det.expand(inputs.shape[0])
        _, lower, upper, log_det = _matrices([self])
        columns = (inputs - self.bias).mT[None]
        columns = triangular_solve(lower, columns, upper=False, unit_diagonal=True)
        columns = triangular_solve(upper, columns, upper=True)
        return columns[0].mT, -log_det.expand(inputs.shape[0])


def _shared(layers: list[nn.Module], inverse: bool) -> dict[int, tuple[Tensor, ...]]:
    """Matrices of the LU layers among ``layers``, by position, computed for those of one size at once."""
    kinds: dict[tuple, list[int]] = {}
    for i, layer in enumerate(layers):
        if isinstance(layer, LU) and not has_hooks(layer):
            key = layer.features, layer.eps, layer.bias.dtype, layer.bias.device
            kinds.setdefault(key, []).append(i)
    found = {}
    for places in kinds.values():
        if len(places) < 2:
            continue
        matrices = _matrices([layers[i] for i in places])
        if inverse:
            _, lower, upper, log_det = matrices
            columns = torch.eye(lower.shape[-1], dtype=lower.dtype, device=lower.device).expand_as(lower)
            columns = triangular_solve(lower, columns, upper=False, unit_diagonal=True)
            weights = triangular_solve(upper, columns, upper=True)
            bias = torch.stack([layers[i].bias for i in places])
            matrices = weights, -(weights @ bias[..., None]).squeeze(-1), -log_det
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


def classes(transforms: ModuleType, resnet: ModuleType) -> dict[type, type[Accelerated]]:
    """Faster layers by the classes of a package, of its modules ``transforms`` and ``nn.nets.resnet``."""
    return {
        transforms.PiecewiseRationalQuadraticCouplingTransform: RationalQuadraticCoupling,
        transforms.PiecewiseRationalQuadraticCDF: RationalQuadraticCDF,
        transforms.MaskedAffineAutoregressiveTransform: AffineAutoregressive,
        transforms.MaskedPiecewiseRationalQuadraticAutoregressiveTransform: RationalQuadraticAutoregressive,
        transforms.LULinear: LU,
        transforms.CompositeTransform: Composite,
        resnet.ResidualBlock: ResidualBlock,
    }


# of these, the time is that of the modules inside, or of one operator
NOTHING_TO_GAIN = {
    "AffineTransform",
    "IdentityTransform",
    "InverseTransform",
    "Permutation",
    "PointwiseAffineTransform",
    "RandomPermutation",
    "ReversePermutation",
    "SqueezeTransform",
}


def is_layer(package: str) -> Callable[[type], bool]:
    """Whether a class is a layer of the package that could be faster."""
    return lambda c: c.__module__.startswith(f"{package}.transforms") and c.__name__ not in NOTHING_TO_GAIN
