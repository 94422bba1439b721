"""Faster layers for a network of FrEIA, with the same parameters, state dict and numbers.

import fastflow.integrations.freia as ff

report = ff.accelerate(inn)
print(report)
ff.revert(inn)
"""

from FrEIA import modules as _modules
from torch import nn

from fastflow.integrations import freia_layers as _layers
from fastflow.integrations.accelerate import Report, faster_classes, revert
from fastflow.integrations.accelerate import accelerate as _accelerate

__all__ = ["accelerate", "revert"]

_CLASSES = faster_classes(
    globals(),
    {
        _modules.AllInOneBlock: _layers.AllInOneBlock,
        _modules.ActNorm: _layers.ActNorm,
        _modules.Fixed1x1Conv: _layers.Fixed1x1Conv,
        _modules.IRevNetDownsampling: _layers.IRevNetDownsampling,
    },
)


def accelerate(model: nn.Module) -> Report:
    """Make the layers of FrEIA within ``model`` faster, in place; see :mod:`fastflow.integrations.nflows`."""
    return _accelerate(model, _CLASSES, _layers.is_layer)
