"""The references of all ops under one name: what a device without a kernel runs, and the oracle of the tests.

An op's reference is ``fastflow/ops/NAME/reference.py``; this module passes on what those define, with the helpers of
:mod:`fastflow.ops.layout`. Functions bear their op's name and take its arguments in the schema's order; formulas and
vector-Jacobian products are derived in docs/maths.md. Everything computes in the accumulation dtype and returns the
dtype and the dense layout of its input. Arguments are checked by the ops, not here.
"""

import importlib

from fastflow.ops import layout
from fastflow.ops.registry import folders

_modules = [layout, *(importlib.import_module(f"fastflow.ops.{folder}.reference") for folder in folders())]
_found = {
    name: value
    for module in _modules
    for name, value in vars(module).items()
    if not name.startswith("_")
    and (isinstance(value, int | float | tuple) or getattr(value, "__module__", None) == module.__name__)
}
globals().update(_found)
__all__ = sorted(_found)
