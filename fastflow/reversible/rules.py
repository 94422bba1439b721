"""Whether a step has its own rule for backprop from its output, the method ``inverse_backward``."""

from collections.abc import Sequence

from torch import nn


def is_flow(m: nn.Module) -> bool:
    """Whether the module is a flow: its class declares ``inverse_backward``, if only as None."""
    return hasattr(type(m), "inverse_backward")


def has_its_own_rule(step: nn.Module, modules: Sequence[nn.Module] | None = None) -> bool:
    """Whether ``inverse_backward`` may be used. False if a flow within the step lacks it or has hooks."""
    flows = [m for m in modules or step.modules() if is_flow(m)]
    return step in flows and all(
        m.inverse_backward is not None and not has_hooks(m) and not vars(m).keys() & {"forward", "inverse"}
        for m in flows
    )


def has_hooks(m: nn.Module) -> bool:
    """Whether the module has hooks on its forward or backward pass."""
    return any((m._forward_hooks, m._forward_pre_hooks, m._backward_hooks, m._backward_pre_hooks))


def is_changed(m: nn.Module) -> bool:
    """Whether the module does more than its class: it has hooks, or a forward function of its own."""
    return has_hooks(m) or "forward" in vars(m)
