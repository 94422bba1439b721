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
from fastflow.integrations.check import Check

__all__ = ["accelerate", "revert"]

_CLASSES = faster_classes(globals(), _layers.classes(_transforms, _resnet))

_CHAINS = faster_classes(
    globals(), {_transforms.CompositeTransform: _layers.ReversibleComposite}, prefix="Reversible"
)


def accelerate(model: nn.Module, *, reversible: bool = False, check: Check | None = None) -> Report:
    """Make the layers of nflows within ``model`` faster, in place.

    Parameters, buffers and hooks stay the same objects, so optimizers go on, and state dicts load before and after.
    Layers, options and subclasses that are not covered stay as they are, and the report names them. A pickled model
    refers to FastFlow; :func:`revert` gives each module its own class again.

    Args:
        model: a flow, or a module that holds flows.
        reversible: chains of layers store only their output for backward, and recompute activations by inverses,
            where each layer has an exact one. The report names the chains that store theirs, and why.
        check: a function of the model that returns a tensor, such as ``lambda m: m.log_prob(x, context)``. It is called
            with a copy of the model before and after.

    Raises ValueError if ``model`` is not a module, RuntimeError if ``check`` returns other values after, beyond
    rounding. Then nothing is replaced.
    """
    return _accelerate(model, _CLASSES, _layers.is_layer("nflows"), _CHAINS if reversible else {}, check)
