"""Faster linear and quadratic splines of nflows: its own formulas for all elements, not for those that a mask selects."""

import importlib

import torch
from torch import Tensor

from fastflow.integrations.accelerate import Accelerated, Theirs, own_class


def _of_all(layer: Theirs, name: str, inputs: Tensor, inverse: bool, **form: Tensor | float):
    """Splines of the library's function ``name`` inside of the bounds, and the identity outside, with log-slopes."""
    package = own_class(layer).__module__.rpartition(".transforms.")[0]
    function = getattr(importlib.import_module(f"{package}.transforms.splines"), name)
    bound = layer.tail_bound
    inside = (inputs >= -bound) & (inputs <= bound)
    kept = torch.where(inside, inputs, 0.0)
    ends = {"left": -bound, "right": bound, "bottom": -bound, "top": bound}
    outputs, log_slopes = function(inputs=kept, inverse=inverse, **ends, **form)
    return torch.where(inside, outputs, inputs), torch.where(inside, log_slopes, 0.0)


class _WithTails(Accelerated):
    def _masks(self, inputs: Tensor) -> bool:
        """Whether the library selects elements by a mask."""
        return self.tails == "linear" and inputs.numel() > 0


class _WithTailsOnly(_WithTails):
    @classmethod
    def refusal(cls, module: Theirs) -> str | None:
        return None if module.tails == "linear" else f"tails={module.tails!r}"


class _Quadratic(_WithTails):
    def _quadratic(
        self, inputs: Tensor, widths: Tensor, heights: Tensor, inverse: bool
    ) -> tuple[Tensor, Tensor]:
        form = {"unnormalized_widths": widths, "unnormalized_heights": heights}
        form |= {"min_bin_width": self.min_bin_width, "min_bin_height": self.min_bin_height}
        return _of_all(self, "quadratic_spline", inputs, inverse, **form)

    def _masks_in(self, inputs: Tensor, params: Tensor, inverse: bool) -> bool:
        # the inverse of a bin with equal slopes at both ends is 0 / 0, whose gradient would reach elements outside
        differentiates = torch.is_grad_enabled() and (inputs.requires_grad or params.requires_grad)
        return self._masks(inputs) and not (inverse and differentiates)


class LinearCoupling(_WithTails):
    """``PiecewiseLinearCouplingTransform``, its splines."""

    def _piecewise_cdf(
        self, inputs: Tensor, transform_params: Tensor, inverse: bool = False
    ) -> tuple[Tensor, Tensor]:
        if not self._masks(inputs):
            return super()._piecewise_cdf(inputs, transform_params, inverse)
        return _of_all(self, "linear_spline", inputs, inverse, unnormalized_pdf=transform_params)


class QuadraticCoupling(_Quadratic):
    """``PiecewiseQuadraticCouplingTransform``, its splines."""

    def _piecewise_cdf(
        self, inputs: Tensor, transform_params: Tensor, inverse: bool = False
    ) -> tuple[Tensor, Tensor]:
        if not self._masks_in(inputs, transform_params, inverse):
            return super()._piecewise_cdf(inputs, transform_params, inverse)
        params = transform_params * getattr(self.transform_net, "hidden_features", 1) ** -0.5
        widths, heights = params.tensor_split([self.num_bins], -1)
        return self._quadratic(inputs, widths, heights, inverse)


class LinearCDF(_WithTailsOnly):
    """``PiecewiseLinearCDF``."""

    def _spline(self, inputs: Tensor, inverse: bool = False) -> tuple[Tensor, Tensor]:
        if not self._masks(inputs):
            return super()._spline(inputs, inverse)
        params = _shared(self.unnormalized_pdf, inputs)
        outputs, log_slopes = _of_all(self, "linear_spline", inputs, inverse, unnormalized_pdf=params)
        return outputs, log_slopes.flatten(1).sum(1)


class QuadraticCDF(_WithTailsOnly, _Quadratic):
    """``PiecewiseQuadraticCDF``."""

    def _spline(self, inputs: Tensor, inverse: bool = False) -> tuple[Tensor, Tensor]:
        if not self._masks_in(inputs, self.unnormalized_heights, inverse):
            return super()._spline(inputs, inverse)
        widths, heights = (
            _shared(self.unnormalized_widths, inputs),
            _shared(self.unnormalized_heights, inputs),
        )
        outputs, log_slopes = self._quadratic(inputs, widths, heights, inverse)
        return outputs, log_slopes.flatten(1).sum(1)


class QuadraticAutoregressive(_WithTailsOnly, _Quadratic):
    """``MaskedPiecewiseQuadraticAutoregressiveTransform``, its splines; the inverse takes a pass for each feature."""

    def _elementwise(
        self, inputs: Tensor, autoregressive_params: Tensor, inverse: bool = False
    ) -> tuple[Tensor, Tensor]:
        if not self._masks_in(inputs, autoregressive_params, inverse):
            return super()._elementwise(inputs, autoregressive_params, inverse)
        params = autoregressive_params.view(inputs.shape[0], self.features, -1)
        widths, heights = params.tensor_split([self.num_bins], -1)
        widths = widths * getattr(self.autoregressive_net, "hidden_features", 1) ** -0.5
        outputs, log_slopes = self._quadratic(inputs, widths, heights, inverse)
        return outputs, log_slopes.flatten(1).sum(1)


def _shared(params: Tensor, inputs: Tensor) -> Tensor:
    return params[None].expand(inputs.shape[0], *params.shape)
