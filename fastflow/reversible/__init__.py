"""Reversible backprop: chains of invertible steps that store only their output for backward."""

from fastflow.deprecation import renamed_attributes
from fastflow.reversible.log_det import zero_log_det
from fastflow.reversible.rules import has_hooks, has_its_own_rule, is_changed
from fastflow.reversible.run import run_reversible
from fastflow.reversible.segments import SharedArgs, run_storing
from fastflow.reversible.state import is_replay
from fastflow.reversible.vjp import Gradients, add, vjp

__all__ = [
    "Gradients",
    "SharedArgs",
    "add",
    "has_hooks",
    "has_its_own_rule",
    "is_changed",
    "is_replay",
    "run_reversible",
    "run_storing",
    "vjp",
    "zero_log_det",
]

__getattr__ = renamed_attributes(__name__, reversible=run_reversible, stored=run_storing)
