"""Faster layers for a flow of normflows, with the same parameters, state dict and numbers.

import fastflow.integrations.normflows as ff

report = ff.accelerate(model)
print(report)
ff.revert(model)
"""

from normflows import core as _core
from normflows.flows import mixing as _mixing
from normflows.flows import normalization as _normalization
from normflows.flows.affine import autoregressive as _affine_autoregressive
from normflows.flows.affine import coupling as _affine_coupling
from normflows.flows.affine import glow as _glow
from normflows.flows.neural_spline import autoregressive as _autoregressive
from normflows.flows.neural_spline import coupling as _coupling
from normflows.nets import cnn as _cnn
from normflows.nets import resnet as _resnet
from torch import nn

from fastflow.integrations import normflows_layers as _layers
from fastflow.integrations import spline_layers as _splines
from fastflow.integrations.accelerate import Report, faster_classes, revert
from fastflow.integrations.accelerate import accelerate as _accelerate
from fastflow.integrations.check import Check
from fastflow.integrations.nflows_layers import LU as _LU
from fastflow.integrations.nflows_layers import ResidualBlock as _ResidualBlock

__all__ = ["accelerate", "revert"]

_CLASSES = faster_classes(
    globals(),
    {
        _coupling.PiecewiseRationalQuadraticCoupling: _splines.RationalQuadraticCoupling,
        _coupling.PiecewiseRationalQuadraticCDF: _splines.RationalQuadraticCDF,
        _autoregressive.MaskedPiecewiseRationalQuadraticAutoregressive: (
            _layers.RationalQuadraticAutoregressive
        ),
        _affine_autoregressive.MaskedAffineAutoregressive: _layers.AffineAutoregressive,
        _resnet.ResidualBlock: _ResidualBlock,
        _resnet.ResidualNet: _layers.ResidualNet,
        _mixing._LULinear: _LU,
        _mixing.Invertible1x1Conv: _layers.Invertible1x1Conv,
        _normalization.ActNorm: _layers.ActNorm,
        _affine_coupling.AffineCouplingBlock: _layers.AffineCouplingBlock,
        _glow.GlowBlock: _layers.GlowBlock,
        _cnn.ConvNet2d: _layers.ConvNet2d,
    },
)

_CHAINS = faster_classes(
    globals(),
    {
        _core.NormalizingFlow: _layers.ReversibleFlow,
        _core.ConditionalNormalizingFlow: _layers.ReversibleConditionalFlow,
        _core.MultiscaleFlow: _layers.Multiscale,
    },
    prefix="Reversible",
)


def accelerate(model: nn.Module, *, reversible: bool = False, check: Check | None = None) -> Report:
    """Make the layers of normflows within ``model`` faster, in place; see :mod:`fastflow.integrations.nflows`."""
    return _accelerate(model, _CLASSES, _layers.is_layer, _CHAINS if reversible else {}, check)
