"""FastFlow: normalizing flows in PyTorch, fast and small."""

__version__ = "0.1.0"

from fastflow import _interrupt

with _interrupt.ends_the_command():
    from fastflow import _moved, models, nn, ops, reference
    from fastflow.checkpoint import CheckpointError, load, save
    from fastflow.fitting import FitHistory, fit
    from fastflow.ops import backend
    from fastflow.system import info

__all__ = [
    "CheckpointError",
    "FitHistory",
    "__version__",
    "backend",
    "fit",
    "info",
    "load",
    "models",
    "nn",
    "ops",
    "reference",
    "save",
]

_moved.install()
