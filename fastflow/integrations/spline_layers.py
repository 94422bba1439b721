"""Faster rational-quadratic splines of nflows, its forks and normflows, which have copies of the same classes."""

import functools

import torch
from torch import Tensor

from fastflow.integrations.accelerate import Accelerated, Theirs
from fastflow.ops import spline
from fastflow.ops.masked_inverse import Spline

PER_FEATURE = ("linear", "circular")


def spline_refusal(module: Theirs) -> str | None:
    """Why the splines of a layer are left alone; None if the op has them."""
    tails, bound = module.tails, module.tail_bound
    if isinstance(tails, list | tuple):
        if not tails or any(t not in PER_FEATURE for t in tails):
            return f"tails={tails!r}"
    elif tails not in (None, *PER_FEATURE):
        return f"tails={tails!r}"
    if isinstance(bound, Tensor) and bound.ndim != 1:
        return f"tail_bound with {bound.ndim} dimensions"
    if module.min_bin_width != module.min_bin_height:
        return "min_bin_width and min_bin_height differ"
    return None


def outside(module: Theirs, inputs: Tensor) -> bool:
    """Whether the library raises: without tails, for inputs outside [0, 1], which synchronizes."""
    return module.tails is None and inputs.numel() > 0 and bool(inputs.min() < 0 or inputs.max() > 1)


def per_feature(module: Theirs) -> bool:
    """Whether features have tails or bounds of their own, which the library has for vectors only."""
    return isinstance(module.tails, list | tuple) or isinstance(module.tail_bound, Tensor)


def splines(
    module: Theirs,
    inputs: Tensor,
    params: Tensor,
    bins: int,
    order: Tensor | None = None,
    factor: float = 1.0,
    inverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """The splines of a layer by the op; ``order``: the transformed features, then the others, or None."""
    form = spline_form(module, bins, factor)
    if not per_feature(module):
        return spline(inputs, params, order, **form._asdict(), inverse=inverse)
    bound, scale = module.tail_bound, None
    each = 3 * bins + {"linear": -1, "circular": 0, None: 1}.get(_tails(module), 1)
    count = params.shape[1] // each
    if isinstance(bound, Tensor):
        scale = bound.to(inputs)
        if order is not None:
            scale = inputs.new_ones(inputs.shape[1]).index_copy(0, order[:count], scale)
        inputs = inputs / scale
    if isinstance(module.tails, str):
        outputs, log_det = spline(inputs, params, order, **form._asdict(), inverse=inverse)
    else:
        outputs, log_det = _mixed(tuple(module.tails), inputs, params, order, form, inverse)
        # the library returns 0 here
        limit = outputs.new_full(inputs.shape[1:], form.bound)
        if order is not None:
            limit = limit.index_fill(0, order[count:], float("inf"))
        outputs = outputs.masked_fill(inputs.abs() > limit, 0)
    return outputs if scale is None else outputs * scale, log_det


def spline_form(module: Theirs, bins: int, factor: float) -> Spline:
    """The splines of a layer, without per-feature tails; per-feature bounds are 1, for inputs divided by them."""
    bound = module.tail_bound
    return Spline(
        bins,
        1.0 if isinstance(bound, Tensor) else float(bound),
        _tails(module) or "none",
        "nflows",
        factor,
        min_bin=module.min_bin_width,
        min_slope=module.min_derivative,
    )


def _tails(module: Theirs) -> str | None:
    return module.tails if isinstance(module.tails, str | None) else None


def _mixed(
    tails: tuple[str, ...],
    inputs: Tensor,
    params: Tensor,
    order: Tensor | None,
    form: Spline,
    inverse: bool,
) -> tuple[Tensor, Tensor]:
    """One op for the features of each kind of tails."""
    steps = []
    for kind in PER_FEATURE:
        if kind in tails:
            columns, places = _of_kind(tails, kind, form.bins, inputs.shape[1], inputs.device)
            own_order = places if order is None else order.index_select(0, places)
            own_params = params.index_select(1, columns)
            own_form = form._replace(tails=kind)._asdict()
            inputs, step = spline(inputs, own_params, own_order, **own_form, inverse=inverse)
            steps.append(step)
    return inputs, sum(steps[1:], steps[0])


@functools.lru_cache(maxsize=64)
def _of_kind(
    tails: tuple[str, ...], kind: str, bins: int, channels: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Columns of the parameters that the features of one kind have, and an order with these features first."""
    with torch.inference_mode(False):
        raw = torch.arange(len(tails) * (3 * bins + 1)).view(len(tails), -1)
        own = [i for i, t in enumerate(tails) if t == kind]
        others = [i for i in range(channels) if i not in own]
        # the slopes of the ends are constants, or the last one is the first one
        kept = list(range(2 * bins)) + list(range(2 * bins + (kind == "linear"), 3 * bins))
        columns = raw[own][:, kept].flatten()
        return columns.to(device), torch.tensor(own + others).to(device)


class RationalQuadraticCoupling(Accelerated):
    """Coupling with splines: the splines, the copy and the log-det are one op."""

    @classmethod
    def refusal(cls, module: Theirs) -> str | None:
        return spline_refusal(module)

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if self._refused(inputs):
            return super().forward(inputs, context)  # raises
        identity = inputs.index_select(1, self.identity_features)
        params = self.transform_net(identity, context)
        outputs, log_det = self._splines(inputs, params, inverse=False)
        if self.unconditional_transform is None:
            return outputs, log_det
        identity, log_det_identity = self.unconditional_transform(identity, context)
        return outputs.index_copy(1, self.identity_features, identity), log_det + log_det_identity

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if self._refused(inputs):
            return super().inverse(inputs, context)
        identity, log_det_identity = inputs.index_select(1, self.identity_features), None
        if self.unconditional_transform is not None:
            identity, log_det_identity = self.unconditional_transform.inverse(identity, context)
            inputs = inputs.index_copy(1, self.identity_features, identity)
        outputs, log_det = self._splines(inputs, self.transform_net(identity, context), inverse=True)
        return outputs, log_det if log_det_identity is None else log_det + log_det_identity

    def _refused(self, inputs: Tensor) -> bool:
        if inputs.dim() not in (2, 4) or inputs.shape[1] != self.features:
            return True
        if inputs.dim() == 4 and per_feature(self):
            return True
        return self.tails is None and outside(self, inputs.index_select(1, self.transform_features))

    def _splines(self, inputs: Tensor, params: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        net, order = self.transform_net, torch.cat([self.transform_features, self.identity_features])
        width = getattr(net, "hidden_features", getattr(net, "hidden_channels", 1))
        return splines(self, inputs, params, self.num_bins, order, width**-0.5, inverse)


class RationalQuadraticCDF(Accelerated):
    """Splines that all samples share, of which the op makes a table once."""

    @classmethod
    def refusal(cls, module: Theirs) -> str | None:
        if per_feature(module) and module.unnormalized_widths.ndim != 2:
            return "tails or bounds of each feature of images"
        return spline_refusal(module)

    def _spline(self, inputs: Tensor, inverse: bool = False) -> tuple[Tensor, Tensor]:
        if outside(self, inputs):
            return super()._spline(inputs, inverse)  # raises
        raw = self.unnormalized_widths, self.unnormalized_heights, self.unnormalized_derivatives
        params = torch.cat(raw, -1)  # [features, *positions, P]
        params = params.movedim(-1, 1).flatten(0, 1)[None].contiguous()
        return splines(self, inputs, params, self.unnormalized_widths.shape[-1], inverse=inverse)
