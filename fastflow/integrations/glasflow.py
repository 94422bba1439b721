"""Faster layers for a flow of glasflow, whose layers are those of nflows in its package ``glasflow.nflows``.

import fastflow.integrations.glasflow as ff

report = ff.accelerate(flow)
"""

from glasflow.nflows import transforms as _transforms
from glasflow.nflows.nn.nets import resnet as _resnet
from torch import nn

from fastflow.integrations import nflows_layers as _layers
from fastflow.integrations.accelerate import Report, faster_classes, revert
from fastflow.integrations.accelerate import accelerate as _accelerate
from fastflow.integrations.check import Check

__all__ = ["accelerate", "revert"]

_CLASSES = faster_classes(globals(), _layers.classes(_transforms, _resnet))

_CHAINS = faster_classes(
    globals(), {_transforms.CompositeTransform: _layers.ReversibleComposite}, prefix="Reversible"
)


def accelerate(model: nn.Module, *, reversible: bool = False, check: Check | None = None) -> Report:
    """Make the layers of glasflow within ``model`` faster, in place; see :mod:`fastflow.integrations.nflows`."""
    return _accelerate(
        model, _CLASSES, _layers.is_layer("glasflow.nflows"), _CHAINS if reversible else {}, check
    )
