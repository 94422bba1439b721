"""Backprop through a chain of invertible steps from its output."""

from fastflow.reversible.chain import (
    Gradients,
    Weights,
    add,
    has_hooks,
    has_its_own_rule,
    reversible,
    stored,
    vjp,
)

__all__ = ["Gradients", "Weights", "add", "has_hooks", "has_its_own_rule", "reversible", "stored", "vjp"]
