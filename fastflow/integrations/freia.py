"""Faster layers for a network of FrEIA, with the same parameters, state dict and numbers.

import fastflow.integrations.freia as ff

report = ff.accelerate(inn)
print(report)
ff.revert(inn)
"""

from FrEIA import framework as _framework
from FrEIA import modules as _modules
from torch import nn

from fastflow.integrations import freia_layers as _layers
from fastflow.integrations.accelerate import Report, faster_classes, revert
from fastflow.integrations.accelerate import accelerate as _accelerate
from fastflow.integrations.check import Check

__all__ = ["accelerate", "revert"]

_CLASSES = faster_classes(
    globals(),
    {
        _modules.AllInOneBlock: _layers.AllInOneBlock,
        _modules.GLOWCouplingBlock: _layers.GLOWCouplingBlock,
        _modules.RNVPCouplingBlock: _layers.RNVPCouplingBlock,
        _modules.ActNorm: _layers.ActNorm,
        _modules.Fixed1x1Conv: _layers.Fixed1x1Conv,
        _modules.IRevNetDownsampling: _layers.IRevNetDownsampling,
    },
)

_CHAINS = faster_classes(
    globals(),
    {_framework.SequenceINN: _layers.ReversibleSequence, _framework.GraphINN: _layers.Graph},
    prefix="Reversible",
)


def accelerate(model: nn.Module, *, reversible: bool = False, check: Check | None = None) -> Report:
    """Make the layers of FrEIA within ``model`` faster, in place; see :mod:`fastflow.integrations.nflows`."""
    return _accelerate(model, _CLASSES, _layers.is_layer, _CHAINS if reversible else {}, check)
