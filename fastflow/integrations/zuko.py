"""Faster layers for a flow of zuko, with the same parameters, state dict and numbers.

import fastflow.integrations.zuko as ff

report = ff.accelerate(flow)
print(report)
log_prob = flow(context).log_prob(x)
ff.revert(flow)
"""

from collections.abc import Mapping

from torch import Tensor, nn
from zuko.lazy import LazyTransform as _LazyTransform
from zuko.utils import Partial as _Partial

from fastflow.integrations import zuko_layers as _layers
from fastflow.integrations.accelerate import Report, faster_classes, revert
from fastflow.integrations.accelerate import accelerate as _accelerate
from fastflow.integrations.check import Check
from fastflow.integrations.zuko_layers import MonotonicRQSTransform

__all__ = ["MonotonicRQSTransform", "accelerate", "renamed_state", "revert"]

_CLASSES = faster_classes(globals(), _layers.FASTER)

# of these, the time is that of the transformations inside, or of one operator
_NOTHING_TO_GAIN = {"LazyInverse", "UnconditionalTransform"}


def accelerate(model: nn.Module, *, check: Check | None = None) -> Report:
    """Make the lazy transformations of zuko within ``model`` faster, in place.

    Parameters, buffers and hooks stay the same objects, so optimizers go on, and state dicts load before and after.
    ``model(context)`` is a distribution of zuko as before. Transformations, options and subclasses that are not covered
    stay as they are, and the report names them. A pickled model refers to FastFlow; :func:`revert` gives each module its
    own class again.

    Args:
        model: a flow of zuko, or a module that holds flows.
        check: a function of the model that returns a tensor, such as ``lambda m: m(context).log_prob(x)``. It is called
            with a copy of the model before and after.

    Raises ValueError if ``model`` is not a module, RuntimeError if ``check`` returns other values after, beyond
    rounding. Then nothing is replaced.
    """
    return _accelerate(model, _CLASSES, _is_layer, check=check)


def _is_layer(c: type) -> bool:
    return (
        c.__module__.startswith("zuko.")
        and issubclass(c, _LazyTransform)
        and c.__name__ not in _NOTHING_TO_GAIN
    )


def renamed_state(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of an older release of zuko with the names that ``model``, of this release, has.

    Older releases number the arguments of a base or of an unconditional transformation, such as ``base._0`` and
    ``base._1``. They have names now: ``base.loc`` and ``base.scale``. Other entries stay as they are.
    """
    names = {}
    for prefix, module in model.named_modules():
        if isinstance(module, _Partial):
            dot = f"{prefix}." if prefix else ""
            names |= {f"{dot}_{i}": f"{dot}{key}" for i, key in enumerate(module._keys, module._nargs)}
    return {names.get(name, name): value for name, value in state.items()}
