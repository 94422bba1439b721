"""Plain PyTorch references of all ops: the fallback on devices without a kernel, and the oracle of the tests.

The references are in ``fastflow/ops/NAME/reference.py``. This module exports them and the helpers of
``fastflow.ops.layout``. A reference has the name of its op and the arguments of its schema, in that
order. It computes in the accumulation dtype and returns the dtype and dense layout of its input. The ops
check arguments; the references do not. docs/maths.md derives the formulas and vector-Jacobian products.
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
__all__ = sorted(_found)  # pyright: ignore[reportUnsupportedDunderAll]  # the names are found at run time
