"""Faster layers for a flow of nflows, with the same parameters, state dict and numbers.

import fastflow.integrations.nflows as ff

report = ff.accelerate(flow)
print(report)
ff.revert(flow)
"""

from nflows import transforms as _transforms
from nflows.nn.nets import resnet as _resnet
from torch import nn

from fastflow.integrations import nflows_layers as _layers
from fastflow.integrations.accelerate import Report, faster_classes, revert
from fastflow.integrations.accelerate import accelerate as _accelerate

__all__ = ["accelerate", "revert"]

_CLASSES = faster_classes(globals(), _layers.classes(_transforms, _resnet))


def accelerate(model: nn.Module) -> Report:
    """Make the layers of nflows within ``model`` faster, in place.

    Parameters, buffers and hooks stay the same objects, so optimizers go on, and state dicts load before and after.
    Layers, options and subclasses that are not covered stay as they are, and the report names them. A pickled model
    refers to FastFlow; :func:`revert` gives each module its own class again.

    Raises ValueError if ``model`` is not a module.
    """
    return _accelerate(model, _CLASSES, _layers.is_layer("nflows"))
