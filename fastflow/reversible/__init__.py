"""Reversible backprop: chains of invertible steps that store only their output for backward."""

from fastflow.reversible.chain import Weights, stored
from fastflow.reversible.log_det import zero_log_det
from fastflow.reversible.rules import has_hooks, has_its_own_rule
from fastflow.reversible.run import reversible
from fastflow.reversible.vjp import Gradients, add, vjp

__all__ = [
    "Gradients",
    "Weights",
    "add",
    "has_hooks",
    "has_its_own_rule",
    "reversible",
    "stored",
    "vjp",
    "zero_log_det",
]
