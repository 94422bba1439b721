"""Faster layers of normflows; those that it has from nflows are in ``spline_layers`` and ``masked_layers``."""

from fastflow.integrations import masked_layers
from fastflow.ops.masked_inverse import Affine


class _Gated:
    GATED = True


class AffineAutoregressive(_Gated, masked_layers.AffineAutoregressive):
    """``MaskedAffineAutoregressive``: scales between 0 and 1."""

    AFFINE = Affine("sigmoid", offset=1e-3)


class RationalQuadraticAutoregressive(_Gated, masked_layers.RationalQuadraticAutoregressive):
    """``MaskedPiecewiseRationalQuadraticAutoregressive``; with circular features the inverse takes D passes."""


# the time of these is that of the modules inside, or of one operator
NOTHING_TO_GAIN = {
    "AutoregressiveRationalQuadraticSpline",
    "CircularAutoregressiveRationalQuadraticSpline",
    "CircularCoupledRationalQuadraticSpline",
    "Composite",
    "CoupledRationalQuadraticSpline",
    "Permute",
    "Reverse",
}


def is_layer(c: type) -> bool:
    """Whether a class is a layer of normflows that could be faster."""
    return c.__module__.startswith("normflows.flows") and c.__name__ not in NOTHING_TO_GAIN
