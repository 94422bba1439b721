"""Faster layers of normflows; those that it has from nflows are in ``spline_layers`` and ``masked_layers``."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastflow.integrations import masked_layers, residual_layers
from fastflow.integrations.accelerate import Accelerated, Chain, Theirs, not_invertible, per_sample
from fastflow.integrations.coupling_layers import is_plain, pays_for_small_ops
from fastflow.integrations.kept import kept_of, value_of
from fastflow.integrations.spline_layers import spline_form
from fastflow.nn.networks.fastest import Setting, fastest_way, gpu_name, is_fused_on_cpu
from fastflow.ops import actnorm, affine_coupling, conv1x1, glow_network, lu_weight, positions
from fastflow.ops.masked_inverse import Affine, Spline
from fastflow.reversible import has_hooks, run_reversible


class ResidualNet(residual_layers.ResidualNet):
    """``ResidualNet`` of vectors, also of periodic features, which it takes as waves."""

    def _read(self, inputs: Tensor) -> Tensor:
        return inputs if self.preprocessing is None else self.preprocessing(inputs)


class _Gated:
    GATED = True


class AffineAutoregressive(_Gated, masked_layers.AffineAutoregressive):
    """``MaskedAffineAutoregressive``: scales between 0 and 1."""

    AFFINE = Affine("sigmoid", offset=1e-3)


class RationalQuadraticAutoregressive(_Gated, masked_layers.RationalQuadraticAutoregressive):
    """``MaskedPiecewiseRationalQuadraticAutoregressive``, also with circular features, of which a network reads waves."""

    def _form(self) -> Spline:
        return super()._form() or spline_form(self, self.num_bins, self._factor())._replace(tails="zero")

    def _waves(self, order: Tensor, scale: Tensor | None) -> Tensor | None:
        preprocessing = self.autoregressive_net.preprocessing
        if isinstance(preprocessing, nn.Identity):
            return super()._waves(order, scale)
        factors = preprocessing.weights
        frequency = torch.as_tensor(preprocessing.scale, dtype=factors.dtype).to(factors.device)
        frequency = frequency.expand(len(factors))
        periodic = torch.stack([frequency, *factors.unbind(1), torch.zeros_like(frequency)])
        waves = factors.new_zeros(4, len(order))
        waves[3] = 1
        waves = waves.index_copy(1, preprocessing.ind, periodic)
        if scale is not None:
            ones = torch.ones_like(scale)
            waves = waves * torch.stack([scale, ones, ones, scale])
        return waves.index_select(1, order)

    def _sorted_parameters(
        self, parts: masked_layers.Conditioner, structure: masked_layers.SortedNetwork
    ) -> tuple[Tensor, Tensor]:
        """With a list of tails the network has slopes of both ends, some of which are not used."""
        weights, biases = super()._sorted_parameters(parts, structure)
        if not isinstance(self.tails, list | tuple):
            return weights, biases
        output, order = parts.linears[-1], structure.order
        weights, matrix = weights.split([len(weights) - output.weight.numel(), output.weight.numel()])
        biases, raw = biases.split([len(biases) - output.out_features, output.out_features])
        rows = kept_of(output, "rows").get([order], tuple(self.tails), lambda: self._rows(order))
        slope_of_1 = raw.new_full((1,), math.log(math.expm1(1 - self.min_derivative)))
        matrix = torch.cat([matrix.view_as(output.weight), matrix.new_zeros(1, output.in_features)])
        raw = torch.cat([raw, slope_of_1]).index_select(0, rows)
        return torch.cat([weights, matrix.index_select(0, rows).flatten()]), torch.cat([biases, raw])

    def _rows(self, order: Tensor) -> Tensor:
        """For each parameter its row of the output; the one behind the last is that of a slope of 1."""
        first = 2 * self.num_bins
        rows = torch.arange(len(order) * (3 * self.num_bins + 1), device=order.device).view(len(order), -1)
        circular = torch.tensor([t == "circular" for t in self.tails], device=order.device)
        ends = torch.where(circular.index_select(0, order), rows[:, first], rows.numel()).unsqueeze(1)
        return torch.cat([rows[:, :first], ends, rows[:, first + 1 : -1], ends], 1).flatten()


def _per_sample(z: Tensor, log_det: Tensor) -> tuple[Tensor, Tensor]:
    """The library has one log-det for all samples."""
    return z, per_sample(log_det, z)


class ActNorm(Accelerated):
    """``ActNorm``: one op, with a log-det for each sample; its flag is read once."""

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        if not pays_for_small_ops(z) or not _is_ready(self, z):
            return _per_sample(*super().forward(z))
        return actnorm(z, -self.s.flatten(), -self.t.flatten(), inverse=True)

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        if not pays_for_small_ops(z) or not _is_ready(self, z):
            return _per_sample(*super().inverse(z))
        return actnorm(z, -self.s.flatten(), -self.t.flatten())


def _is_ready(layer: Theirs, z: Tensor) -> bool:
    """Whether a layer with a scale and a shift for each channel is initialized."""
    if (
        z.ndim < 2
        or tuple(layer.s.shape) != (1, z.shape[1], *(1,) * (z.ndim - 2))
        or not is_plain(z, layer.s)
    ):
        return False
    return value_of(layer, "data_dep_init_done", _is_positive)


def _is_positive(t: Tensor) -> bool:
    return bool(t > 0)


def _rows_of(permutation: Tensor) -> Tensor:
    return permutation.argmax(1)


class Invertible1x1Conv(Accelerated):
    """``Invertible1x1Conv``: the inverse of its weight from the triangles, without a general solve in float64."""

    @classmethod
    def refusal(cls, module: Theirs) -> str | None:
        return None if module.use_lu else "use_lu=False"

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        if not _is_image(self, z):
            return _per_sample(*super().forward(z))
        _, weight, log_det = self._weights()
        return conv1x1(z, weight), (-positions(z) * log_det).expand(z.shape[0])

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        if not _is_image(self, z):
            return _per_sample(*super().inverse(z))
        weight, _, log_det = self._weights()
        return conv1x1(z, weight), (positions(z) * log_det).expand(z.shape[0])

    def _weights(self) -> tuple[Tensor, Tensor, Tensor]:
        """The weight, its inverse, and log|det| of a position."""
        rows = value_of(self, "P", _rows_of)
        factors = self.L[None], self.U[None], self.log_S[None], self.sign_S[None]
        weight, inverse, log_det = lu_weight(rows[None], *factors)
        return weight[0], inverse[0], log_det[0]


def _is_image(layer: Theirs, z: Tensor) -> bool:
    return z.ndim == 4 and z.shape[1] == layer.num_channels and is_plain(z, layer.L)


class AffineCouplingBlock(Accelerated):
    """``AffineCouplingBlock`` of halves of the channels: one op after the network."""

    @classmethod
    def refusal(cls, module: Theirs) -> str | None:
        own = "normflows.flows.reshape", "normflows.flows.affine.coupling", "normflows.flows.reshape"
        if [type(m).__name__ for m in module.flows] != ["Split", "AffineCoupling", "Merge"] or any(
            type(m).__module__ != name for m, name in zip(module.flows, own, strict=True)
        ):
            return "its layers are not those of the library"
        split, coupling, merge = module.flows
        if split.mode not in ("channel", "channel_inv") or merge.mode != split.mode:
            return f"split_mode={split.mode!r}"
        if coupling.scale and coupling.scale_map not in ("exp", "sigmoid", "sigmoid_inv"):
            return f"scale_map={coupling.scale_map!r}"
        return None

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return self._coupled(z, inverse=False) or super().forward(z)

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return self._coupled(z, inverse=True) or super().inverse(z)

    def _coupled(self, z: Tensor, inverse: bool) -> tuple[Tensor, Tensor] | None:
        split, coupling, _ = self.flows
        if z.ndim < 2 or z.shape[1] % 2 or not is_plain(z) or any(map(has_hooks, self.flows)):
            return None
        swap = split.mode == "channel_inv"
        params = coupling.param_map(z.chunk(2, 1)[int(swap)])
        form = {"swap_halves": swap, "params_layout": "interleaved"}
        if not coupling.scale:
            return affine_coupling(z, params, scale="none", inverse=inverse, **form)
        if coupling.scale_map != "sigmoid":
            scale = "exp" if coupling.scale_map == "exp" else "sigmoid"
            return affine_coupling(z, params, scale=scale, inverse=inverse, **form)
        # z / s + t is the inverse of s (x - t)
        signs = params.new_ones(2)
        signs[0] = -1
        params = (params.unflatten(1, (-1, 2)) * signs.view(2, *(1,) * (params.ndim - 2))).flatten(1, 2)
        form |= {"scale": "sigmoid", "affine_order": "shift_first"}
        return affine_coupling(z, params, inverse=not inverse, **form)


class GlowBlock(Accelerated):
    """``GlowBlock``: the convolution and the normalization of the channels are one convolution."""

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        if not self._folds(z):
            return super().forward(z)
        coupling, conv, norm = self.flows
        z, log_det = coupling(z)
        _, weight, log_det_conv = conv._weights()
        scale = norm.s.flatten()
        z = conv1x1(z, scale.exp()[:, None] * weight, norm.t.flatten())
        return z, log_det + positions(z) * (scale.sum() - log_det_conv)

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        if not self._folds(z):
            return super().inverse(z)
        coupling, conv, norm = self.flows
        weight, _, log_det_conv = conv._weights()
        scale = norm.s.flatten()
        weight = weight * torch.exp(-scale)
        z = conv1x1(z, weight, -(weight @ norm.t.flatten()))
        pixels = positions(z)
        z, log_det = coupling.inverse(z)
        return z, log_det + pixels * (log_det_conv - scale.sum())

    def _folds(self, z: Tensor) -> bool:
        if len(self.flows) != 3 or not isinstance(self.flows[0], AffineCouplingBlock):
            return False
        _, conv, norm = self.flows
        if not isinstance(conv, Invertible1x1Conv) or not isinstance(norm, ActNorm):
            return False
        return _is_image(conv, z) and _is_ready(norm, z) and not any(map(has_hooks, (conv, norm)))


class ConvNet2d(Accelerated):
    """``ConvNet2d`` of three convolutions: one op, which keeps hidden activations out of memory."""

    @classmethod
    def refusal(cls, module: Theirs) -> str | None:
        layers = list(module.net)
        if [type(m) for m in layers] != [nn.Conv2d, nn.LeakyReLU, nn.Conv2d, nn.LeakyReLU, nn.Conv2d]:
            return "layers other than three convolutions"
        if [m.kernel_size for m in layers[::2]] != [(3, 3), (1, 1), (3, 3)]:
            return "kernel sizes other than 3, 1, 3"
        if any(m.negative_slope != 0 for m in layers[1::2]):
            return "leaky ReLUs"
        return None

    def forward(self, x: Tensor) -> Tensor:
        layers = list(self.net)
        if not _is_fused(layers, x, self.training) or any(map(has_hooks, (self.net, *layers))):
            return super().forward(x)
        args = [t for layer in layers[::2] for t in (layer.weight, layer.bias)]
        return glow_network(x, *args, tf32=x.is_cuda and torch.backends.cudnn.allow_tf32)


def _is_fused(layers: list[Theirs], x: Tensor, training: bool) -> bool:
    """Whether the op is the fastest way for this network and batch."""
    first, last = layers[0], layers[-1]
    if x.ndim != 4 or not is_plain(x, first.weight) or torch.compiler.is_compiling():
        return False
    gpu = gpu_name(x.device)
    if gpu is None:
        return x.device.type == "cpu" and is_fused_on_cpu(x.dtype)
    channels = first.in_channels, first.out_channels, last.out_channels
    mode = "training" if training else "evaluation"
    setting = Setting(gpu, str(x.dtype).removeprefix("torch."), *channels, mode)
    return fastest_way(setting, x.shape[0] * positions(x)) == "fused"


class ReversibleFlow(Chain):
    """``NormalizingFlow`` whose log-densities recompute its activations."""

    @classmethod
    def obstacle(cls, module: Theirs) -> str | None:
        return not_invertible(module.flows, "normflows", INVERTIBLE)

    def inverse_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return run_reversible([_Step(flow, self.TAKES_CONTEXT) for flow in reversed(self.flows)], x, context)

    def log_prob(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        z, log_det = self.inverse_and_log_det(x, context)
        return log_det + self.q0.log_prob(z, *self._given(context))

    def forward_kld(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return -self.log_prob(x, *self._given(context)).mean()

    TAKES_CONTEXT = False

    def _given(self, context: Tensor | None) -> tuple[Tensor | None, ...]:
        return (context,) if self.TAKES_CONTEXT else ()


class ReversibleConditionalFlow(ReversibleFlow):
    """``ConditionalNormalizingFlow`` whose log-densities recompute its activations."""

    TAKES_CONTEXT = True


class _Step(nn.Module):
    """A flow of the library in the direction of log-densities."""

    def __init__(self, flow: Theirs, takes_context: bool) -> None:
        super().__init__()
        self.flow, self.takes_context = flow, takes_context

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._run(self.flow.inverse, x, context)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._run(self.flow, z, context)

    def _run(self, call: Callable, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        y, log_det = call(x, context=context) if self.takes_context else call(x)
        return y, per_sample(log_det, x)


class Multiscale(Chain):
    """``MultiscaleFlow``, which is no chain."""

    @classmethod
    def obstacle(cls, module: Theirs) -> str:
        return "several scales"


# flows of tensors whose inverse is a formula, also in training
INVERTIBLE = frozenset(
    {
        "ActNorm",
        "AffineConstFlow",
        "AffineCouplingBlock",
        "AutoregressiveRationalQuadraticSpline",
        "CCAffineConst",
        "CoupledRationalQuadraticSpline",
        "GlowBlock",
        "Invertible1x1Conv",
        "InvertibleAffine",
        "LULinearPermute",
        "MaskedAffineAutoregressive",
        "MaskedAffineFlow",
        "Permute",
        "Squeeze",
    }
)

# the time of these is that of the modules inside, or of one operator
NOTHING_TO_GAIN = {
    "AffineCoupling",
    "AutoregressiveRationalQuadraticSpline",
    "CircularAutoregressiveRationalQuadraticSpline",
    "CircularCoupledRationalQuadraticSpline",
    "Composite",
    "CoupledRationalQuadraticSpline",
    "LULinearPermute",
    "Merge",
    "Permute",
    "Reverse",
    "Split",
    "Squeeze",
    "_RandomPermutation",
}


def is_layer(c: type) -> bool:
    """Whether a class is a layer of normflows that could be faster."""
    return c.__module__.startswith("normflows.flows") and c.__name__ not in NOTHING_TO_GAIN
