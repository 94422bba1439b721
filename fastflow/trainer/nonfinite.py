"""What is reported when a loss or a gradient is not finite."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastflow.models.model import Model


class NonFiniteError(RuntimeError):
    """A loss or gradient is not finite, or a weight is singular; the message names the step and the place."""


def diagnose(model: Model, x: Tensor, labels: Tensor | None, seed: int, offset: int = 0) -> str:
    """Name the first layer whose output is not finite when ``x`` runs again, and the largest gradient."""
    first = []

    def hook(name: str) -> Callable:
        def look(module: nn.Module, inputs: tuple, output: object) -> None:
            if not first and not all(t.isfinite().all() for t in _tensors(output)):
                first.append(f"the first output that is not finite: {name} ({type(module).__name__})")

        return look

    handles = [m.register_forward_hook(hook(name or "the model")) for name, m in model.named_modules()]
    try:
        with torch.no_grad():
            model(x, labels, seed=seed, offset=offset)
    finally:
        for handle in handles:
            handle.remove()
    norms = {name: p.grad.float().norm().item() for name, p in model.named_parameters() if p.grad is not None}
    name = max(norms, key=lambda n: norms[n] if not math.isnan(norms[n]) else math.inf)
    found = first[0] if first else "every layer output is finite"
    return f"{found}; largest gradient {norms[name]:g}, of {name}"


def _tensors(output: object) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, dict):
        output = list(output.values())
    return [t for part in output for t in _tensors(part)] if isinstance(output, (tuple, list)) else []
