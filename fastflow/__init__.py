"""FastFlow: normalizing flows in PyTorch, fast and small."""

__version__ = "0.1.0"

from fastflow import _moved, models, nn, ops, reference
from fastflow.checkpoint import CheckpointError, load, save
from fastflow.ops import backend

__all__ = ["CheckpointError", "__version__", "backend", "load", "models", "nn", "ops", "reference", "save"]

_moved.install()
