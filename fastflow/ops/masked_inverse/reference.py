"""Inverse of a masked autoregressive transformation in one pass, and the solve of its gradient, in plain PyTorch.

Layer 0 of a network is the features in their order, layers 1 to L are hidden, layer L + 1 is the parameters.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from fastflow.ops.spline.reference import Form, _elementwise, _pullback

# Bits of a layer: the activation before its product; the product times the gates; the activation after that; the sum
# with the layer before the previous one.
BEFORE, GATE, AFTER, SKIP = 1, 2, 4, 8

SCALES = ("exp", "sigmoid", "softplus", "soft_clamp", "tanh", "soft_clip")


class Affine(NamedTuple):
    r"""Affine transformer :math:`z = s x + t` of a masked autoregressive transformation.

    Args:
        scale: scale function s of the raw scale h. ``"exp"``: :math:`e^h`; ``"sigmoid"``: :math:`\sigma(h + 2) + o`;
            ``"softplus"``: :math:`\log(1 + e^h) + o`; ``"soft_clamp"``: :math:`e^{f \tanh(h / f)}`; ``"tanh"``:
            :math:`e^{f \tanh h}`; ``"soft_clip"``: :math:`e^{h / (1 + |h / f|)}`.
        affine_order: ``"scale_first"``: :math:`s x + t`; ``"shift_first"``: :math:`s (x + t)`.
        params_layout: the two parameters of a feature: ``"scale_shift"`` or ``"shift_scale"``.
        factor: f.
        offset: o, at least 0.

    nflows has ``Affine("softplus", offset=1e-3)``, normflows ``Affine("sigmoid", offset=1e-3)``, and zuko
    ``Affine("soft_clip", params_layout="shift_scale", factor=-math.log(1e-3))``.
    """

    scale: str = "exp"
    affine_order: str = "scale_first"
    params_layout: str = "scale_shift"
    factor: float = 1.0
    offset: float = 0.0

    @property
    def parameters(self) -> int:
        """Number of parameters of a feature."""
        return 2

    def forward(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """z and log dz/dx of each element, for parameters ``[..., 2]``."""
        shift, raw = self._split(params)
        s, log_s = self._scale(raw)
        return x * s + shift if self.affine_order == "scale_first" else (x + shift) * s, log_s

    def inverse(self, z: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """x and log dx/dz."""
        shift, raw = self._split(params)
        s, log_s = self._scale(raw)
        return (z - shift) / s if self.affine_order == "scale_first" else z / s - shift, -log_s

    def outside(self, z: Tensor) -> Tensor | None:
        """None: x depends on each z."""
        return None

    def pullback(self, x: Tensor, params: Tensor, g: Tensor, dlog_slope: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients ``(dx, dparams)`` of :meth:`forward` for those of its results."""
        shift, raw = self._split(params)
        s, _ = self._scale(raw)
        dx = g * s
        scale_first = self.affine_order == "scale_first"
        draw = (dx * (x if scale_first else x + shift) + dlog_slope) * self._log_scale_slope(raw)
        dshift = g if scale_first else dx
        pair = [draw, dshift] if self.params_layout == "scale_shift" else [dshift, draw]
        return dx, torch.stack(torch.broadcast_tensors(*pair), -1)

    def _split(self, params: Tensor) -> tuple[Tensor, Tensor]:
        first, second = params.unbind(-1)
        return (second, first) if self.params_layout == "scale_shift" else (first, second)

    def _scale(self, raw: Tensor) -> tuple[Tensor, Tensor]:
        f, o = self.factor, self.offset
        if self.scale == "softplus" or (self.scale == "sigmoid" and o > 0):
            s = (F.softplus(raw) if self.scale == "softplus" else torch.sigmoid(raw + 2)) + o
            return s, torch.log(s)
        if self.scale == "exp":
            log_s = raw
        elif self.scale == "sigmoid":
            log_s = F.logsigmoid(raw + 2)
        elif self.scale == "soft_clamp":
            log_s = f * torch.tanh(raw / f)
        elif self.scale == "tanh":
            log_s = f * torch.tanh(raw)
        else:
            log_s = raw / (1 + (raw / f).abs())
        return torch.exp(log_s), log_s

    def _log_scale_slope(self, raw: Tensor) -> Tensor:
        """Derivative of log s."""
        f, o = self.factor, self.offset
        if self.scale == "exp":
            return torch.ones_like(raw)
        if self.scale == "sigmoid":
            below = torch.sigmoid(-(raw + 2))
            return below if o == 0 else below * torch.sigmoid(raw + 2) / (torch.sigmoid(raw + 2) + o)
        if self.scale == "softplus":
            return torch.sigmoid(raw) / (F.softplus(raw) + o)
        if self.scale == "soft_clip":
            return 1 / (1 + (raw / f).abs()).square()
        th = torch.tanh(raw / f) if self.scale == "soft_clamp" else torch.tanh(raw)
        return (1 - th * th) * (1 if self.scale == "soft_clamp" else f)


class Spline(NamedTuple):
    r"""Rational-quadratic spline of a masked autoregressive transformation; see :func:`fastflow.ops.spline`.

    With the tails ``"half_turn"``, features are angles in :math:`[-b, b]`, b the bound. They are shifted by half of the
    circle, to :math:`x + b` for :math:`x < 0` and to :math:`x - b` for others, and then transformed by a spline with the
    tails ``"linear"`` (zuko's NCSF). With ``"zero"``, the 3 K + 1 parameters of a spline on :math:`[-b, b]` include the
    slopes at both ends, and both directions are 0 outside, with a log-slope of 0 (normflows, for a list of tails).
    """

    bins: int = 8
    bound: float = 3.0
    tails: str = "linear"
    convention: str = "fastflow"
    factor: float = 1.0
    min_bin: float = 1e-3
    min_slope: float = 1e-3

    @property
    def parameters(self) -> int:
        """Number of parameters of a feature."""
        return self._form.per_element

    @property
    def _form(self) -> Form:
        return Form(*(self._replace(tails="linear") if self.tails == "half_turn" else self))

    def _turned(self, x: Tensor) -> Tensor:
        return torch.where(x < 0, x + self.bound, x - self.bound) if self.tails == "half_turn" else x

    def forward(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """z and log dz/dx of each element, for parameters ``[..., P]``."""
        return self._inside(x, *_elementwise(self._turned(x), params, self._form, False))

    def inverse(self, z: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """x and log dx/dz."""
        x, log_slope = _elementwise(z, params, self._form, True)
        return self._inside(z, self._turned(x), log_slope)

    def pullback(self, x: Tensor, params: Tensor, g: Tensor, dlog_slope: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients ``(dx, dparams)`` of :meth:`forward` for those of its results; x is not outside."""
        _, dx, dparams = _pullback(self._turned(x), params, g, dlog_slope, self._form, "x")
        return dx, dparams

    def outside(self, z: Tensor) -> Tensor | None:
        """Which elements are outside of their interval, so that x is 0; None if x depends on each z."""
        return z.abs() > self.bound if self.tails == "zero" else None

    def _inside(self, v: Tensor, result: Tensor, log_slope: Tensor) -> tuple[Tensor, Tensor]:
        outside = self.outside(v)
        if outside is None:
            return result, log_slope
        return result.masked_fill(outside, 0), log_slope.masked_fill(outside, 0)


def transformer_of(
    scale: str, affine_order: str, params_layout: str, offset: float, bins: int, bound: float, tails: str,
    convention: str, factor: float, min_bin: float, min_slope: float,
) -> Affine | Spline:  # fmt: skip
    """The transformer of an op's arguments: affine if ``bins`` is 0."""
    if bins:
        return Spline(bins, bound, tails, convention, factor, min_bin, min_slope)
    return Affine(scale, affine_order, params_layout, factor, offset)


def activated(v: Tensor, activation: str) -> Tensor:
    """The activation of hidden units."""
    if activation == "relu":
        return F.relu(v)
    if activation == "tanh":
        return torch.tanh(v)
    return F.silu(v) if activation == "silu" else F.elu(v)


def activation_slope(v: Tensor, activation: str) -> Tensor:
    """Derivative of the activation."""
    if activation == "relu":
        return (v > 0).to(v.dtype)
    if activation == "tanh":
        return 1 - torch.tanh(v).square()
    if activation == "silu":
        s = torch.sigmoid(v)
        return s * (1 + v * (1 - s))
    return torch.where(v > 0, 1.0, torch.exp(v.clamp_max(0)))


def sizes_of(features: int, widths: list[int], parameters: int) -> list[int]:
    """Numbers of units of layers 0 to L + 1."""
    return [features, *widths, features * parameters]


def gated(layers: list[int], widths: list[int]) -> int:
    """Number of gates of a sample."""
    return sum(size for flags, size in zip(layers, widths, strict=False) if flags & GATE)


def matrices_of(weights: Tensor, sizes: list[int]) -> list[Tensor]:
    """The weights of layers 1 to L + 1, ``[units, units of the layer before]``."""
    shapes = list(zip(sizes[1:], sizes[:-1], strict=True))
    parts = weights.split([rows * columns for rows, columns in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def waved(x: Tensor, waves: Tensor) -> Tensor:
    """What the network reads of features: a wave and a multiple, ``[4, ...]``."""
    frequency, of_sin, of_cos, multiple = waves
    return of_sin * torch.sin(frequency * x) + of_cos * torch.cos(frequency * x) + multiple * x


def _wave_slope(x: Tensor, waves: Tensor) -> Tensor:
    frequency, of_sin, of_cos, multiple = waves
    return frequency * (of_sin * torch.cos(frequency * x) - of_cos * torch.sin(frequency * x)) + multiple


def _wave_gradient(x: Tensor, waves: Tensor, d: Tensor) -> Tensor:
    """Gradient of the waves, of that of :func:`waved`."""
    frequency, of_sin, of_cos, _ = waves
    sin, cos = torch.sin(frequency * x), torch.cos(frequency * x)
    return torch.stack([(d * v).sum(0) for v in (x * (of_sin * cos - of_cos * sin), sin, cos, x)])


def _without_values(ends: Tensor) -> bool:
    """Whether a fake calls the reference."""
    return isinstance(ends, FakeTensor) or ends.is_meta


def _known(ends: Tensor, features: int) -> list[list[int]]:
    """``[l][k]``: units of layer l, 0 to L, that are computed before x of feature k of the order; ``[l][-1]`` is 0."""
    return [[*values, 0] for values in ([*range(features)], *ends.tolist())]


def masked_inverse(
    z: Tensor, weights: Tensor, added: Tensor, gates: Tensor | None, ends: Tensor, order: Tensor, widths: list[int],
    layers: list[int], activation: str, scale: str, affine_order: str, params_layout: str, offset: float, bins: int,
    bound: float, tails: str, convention: str, factor: float, min_bin: float, min_slope: float, waves: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    n, features = z.shape
    if _without_values(ends):
        return z.new_empty(n, features), z.new_empty(n)
    transformer = transformer_of(
        scale, affine_order, params_layout, offset, bins, bound, tails, convention, factor, min_bin, min_slope
    )
    each, last = transformer.parameters, len(widths)
    sizes = sizes_of(features, widths, each)
    matrices, parts = matrices_of(weights, sizes), added.split(sizes[1:], -1)
    of_gates = [size if flags & GATE else 0 for flags, size in zip(layers, widths, strict=False)]
    gate_parts: Sequence[Tensor] = () if gates is None else gates.split(of_gates, -1)
    known = _known(ends, features)
    z_in_order = z.index_select(1, order)
    units = [z_in_order[:, :0]] * (last + 1)  # of the layers, computed so far
    read = list(units)  # by the next layer
    found, log_slopes = [], []

    def product(layer: int, first: int, end: int) -> Tensor:
        inputs = read[layer - 1]
        w = matrices[layer - 1][first:end, : inputs.shape[1]]
        return inputs @ w.mT + parts[layer - 1][..., first:end]

    def extended(v: Tensor, more: Tensor) -> Tensor:
        return torch.cat([v, more], 1) if v.shape[1] else more

    for k in range(features):
        for layer in range(1, last + 1):
            first, end = known[layer][k - 1], known[layer][k]
            if first == end:
                continue
            flags = layers[layer - 1]
            u = product(layer, first, end)
            if flags & GATE:
                u = u * gate_parts[layer - 1][..., first:end]
            if flags & AFTER:
                u = activated(u, activation)
            if flags & SKIP:
                u = u + units[layer - 2][:, first:end]
            units[layer] = extended(units[layer], u)
            read[layer] = extended(read[layer], activated(u, activation) if layers[layer] & BEFORE else u)
        params = product(last + 1, k * each, (k + 1) * each)
        x, log_slope = transformer.inverse(z_in_order[:, k], params)
        read[0] = extended(read[0], (x if waves is None else waved(x, waves[:, k])).unsqueeze(1))
        found.append(x)
        log_slopes.append(log_slope)
    x = torch.stack(found, 1)
    return x.index_select(1, order.argsort()).contiguous(), torch.stack(log_slopes, 1).sum(1)


def masked_inverses(
    z: Tensor, context: Tensor | None, parameters: Tensor, places: Tensor, ends: Tensor, order: Tensor,
    widths: list[int], layers: list[int], activation: str, scale: str, affine_order: str, params_layout: str,
    offset: float, bins: int, bound: float, tails: str, convention: str, factor: float, min_bin: float,
    min_slope: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if _without_values(ends):
        return z.new_empty(z.shape), z.new_empty(z.shape[0])
    form = (
        scale, affine_order, params_layout, offset, bins, bound, tails, convention, factor, min_bin, min_slope,
    )  # fmt: skip
    sizes = sizes_of(z.shape[1], widths, transformer_of(*form).parameters)
    of_context = 0 if context is None else context.shape[1]
    rows = [a * b for a, b in zip(sizes[1:], sizes[:-1], strict=True)]
    found = torch.where(
        places < 0, 0.0, parameters.index_select(0, places.clamp_min(0).flatten()).view(places.shape)
    )
    log_det = z.new_zeros(z.shape[0])
    for own, own_ends, own_order in zip(found, ends, order, strict=True):
        weights, first, added = own.split([sum(rows), sizes[1] * of_context, sum(sizes[1:])])
        if context is not None:
            first = F.pad(first.view(sizes[1], of_context), (0, 0, 0, len(added) - sizes[1]))
            added = F.linear(context, first, added)
        z, more = torch.ops.fastflow.masked_inverse.default(
            z, weights, added, None, own_ends, own_order, widths, layers, activation, *form, None
        )
        log_det = log_det + more
    return z, log_det


def masked_solve(
    v: Tensor, slope: Tensor, jac: Tensor, dparams: Tensor | None, inner: Tensor | None, outer: Tensor | None,
    weights: Tensor, ends: Tensor, widths: list[int], layers: list[int], of_features: Tensor | None,
) -> Tensor:  # fmt: skip
    n, features = v.shape
    if _without_values(ends):
        return v.new_empty(n, features)
    each, last = jac.shape[2], len(widths)
    sizes = sizes_of(features, widths, each)
    matrices = matrices_of(weights, sizes)
    known = _known(ends, features)
    sizes[1:-1] = [values[-2] for values in known[1:]]  # units that have a degree
    ones = v.new_ones(()).expand(n, sum(widths))
    inner_parts, outer_parts = ((ones if t is None else t).split(widths, -1) for t in (inner, outer))
    # gradients that are known: of the products of layers 1 to L + 1, and of the units of the layers
    found = [v[:, :0]] * (last + 2)
    units = list(found)
    u = [v[:, :0]] * features

    def extended(more: Tensor, v: Tensor) -> Tensor:
        return torch.cat([more, v], 1) if v.shape[1] else more

    def pulled(layer: int, first: int, end: int) -> Tensor:
        """Gradient of what layer + 1 reads of units ``first`` to ``end``."""
        d, rows = found[layer + 1], sizes[layer + 1]
        return d @ matrices[layer][rows - d.shape[1] : rows, first:end]

    for k in reversed(range(features)):
        d = pulled(0, k, k + 1)
        d = d if of_features is None else d * of_features[:, k : k + 1]
        u[k] = (v[:, k : k + 1] - d) / slope[:, k : k + 1]
        d = jac[:, k] * u[k]
        found[last + 1] = extended(d if dparams is None else d - dparams[:, k], found[last + 1])
        for layer in range(last, 0, -1):
            first, end = known[layer][k - 1], known[layer][k]
            if first == end:
                continue
            d = pulled(layer, first, end) * outer_parts[layer - 1][:, first:end]
            if layer + 2 <= last and layers[layer + 1] & SKIP:
                after = units[layer + 2]
                past = sizes[layer + 2] - after.shape[1]  # the first of its units that are known
                d = d + after[:, first - past : end - past]
            units[layer] = extended(d, units[layer])
            found[layer] = extended(d * inner_parts[layer - 1][:, first:end], found[layer])
    return torch.cat(u, 1)


def masks_of(ends: Tensor, sizes: list[int], each: int) -> list[Tensor]:
    """Which weights of layers 1 to L + 1 are not masked."""
    features = torch.arange(sizes[0], device=ends.device)
    degrees = [features + 1]
    for row, size in zip(ends, sizes[1:-1], strict=True):
        degrees.append((torch.arange(size, device=ends.device)[:, None] >= row).sum(1))
    degrees.append(features.repeat_interleave(each))
    return [above[:, None] >= below for above, below in zip(degrees[1:], degrees[:-1], strict=True)]


def masked_inverse_backward(
    z: Tensor, x: Tensor, weights: Tensor, added: Tensor, gates: Tensor | None, ends: Tensor, order: Tensor,
    widths: list[int], layers: list[int], activation: str, scale: str, affine_order: str, params_layout: str,
    offset: float, bins: int, bound: float, tails: str, convention: str, factor: float, min_bin: float,
    min_slope: float, waves: Tensor | None, dx: Tensor, dlog_det: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients ``(dz, dweights, dadded, dgates, dwaves)``: a pass at x, a solve, and a pass back."""
    transformer = transformer_of(
        scale, affine_order, params_layout, offset, bins, bound, tails, convention, factor, min_bin, min_slope
    )
    each, last = transformer.parameters, len(widths)
    sizes = sizes_of(x.shape[1], widths, each)
    masks = masks_of(ends, sizes, each)
    matrices = [torch.where(mask, w, 0.0) for w, mask in zip(matrices_of(weights, sizes), masks, strict=True)]
    parts = added.split(sizes[1:], -1)
    of_gates = [size if flags & GATE else 0 for flags, size in zip(layers, widths, strict=False)]
    gate_parts: Sequence[Tensor] = () if gates is None else gates.split(of_gates, -1)
    x_in_order = x.index_select(1, order)

    units, read = (
        [x_in_order],
        [x_in_order if waves is None else waved(x_in_order, waves.unsqueeze(1))],
    )  # of layers 0 to L
    products, inner, outer = [], [], []  # of layers 1 to L
    for i, flags in enumerate(layers[:-1]):
        u = read[-1] @ matrices[i].mT + parts[i]
        products.append(u)
        slope = torch.ones_like(u)
        if flags & GATE:
            u, slope = u * gate_parts[i], slope * gate_parts[i]
        if flags & AFTER:
            u, slope = activated(u, activation), slope * activation_slope(u, activation)
        inner.append(slope)
        if flags & SKIP:
            u = u + units[i - 1]
        units.append(u)
        before = layers[i + 1] & BEFORE
        outer.append(activation_slope(u, activation) if before else torch.ones_like(u))
        read.append(activated(u, activation) if before else u)
    params = (read[-1] @ matrices[-1].mT + parts[-1]).unflatten(1, (-1, each))

    zero, one = torch.zeros_like(x_in_order), torch.ones_like(x_in_order)
    slope, jac = transformer.pullback(x_in_order, params, one, zero)
    by_x, dparams = transformer.pullback(x_in_order, params, zero, -dlog_det.unsqueeze(1) * one)
    outside = transformer.outside(z.index_select(1, order))
    if outside is not None:  # x does not depend on z there
        slope = slope.masked_fill(outside, float("inf"))
        jac, dparams = (v.masked_fill(outside.unsqueeze(-1), 0) for v in (jac, dparams))
    v = dx.index_select(1, order) + by_x
    joined = [torch.cat(parts, 1) if parts else None for parts in (inner, outer)]
    of_features = None if waves is None else _wave_slope(x_in_order, waves.unsqueeze(1))
    u = torch.ops.fastflow.masked_solve.default(
        v, slope, jac, dparams, *joined, weights, ends, widths, layers, of_features
    )
    dz = u.index_select(1, order.argsort()).contiguous()

    d = (dparams - jac * u.unsqueeze(-1)).flatten(1)
    dunits: list[Tensor | int] = [0] * (last + 1)
    dadded, dweights, dgates = [d], [torch.where(masks[-1], d.mT @ read[-1], 0.0)], []
    for i in range(last - 1, -1, -1):
        flags = layers[i]
        d = d @ matrices[i + 1] * outer[i] + dunits[i + 1]
        if flags & SKIP:
            dunits[i - 1] = d
        if flags & GATE:
            g = d
            if flags & AFTER:
                g = g * activation_slope(products[i] * gate_parts[i], activation)
            dgates.insert(0, g * products[i])
        d = d * inner[i]
        dadded.insert(0, d)
        dweights.insert(0, torch.where(masks[i], d.mT @ read[i], 0.0))
    dwaves = None if waves is None else _wave_gradient(x_in_order, waves.unsqueeze(1), d @ matrices[0])
    dadded = torch.cat(dadded, 1)
    return (
        dz,
        torch.cat([w.flatten() for w in dweights]),
        dadded.sum(0) if added.ndim == 1 else dadded,
        None if gates is None else torch.cat(dgates, 1),
        dwaves,
    )
