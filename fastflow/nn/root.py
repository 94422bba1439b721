"""Roots of increasing functions of one variable, differentiable in what the functions depend on."""

from collections.abc import Callable

import torch
from torch import Tensor

from fastflow.transforms import in_transform

# each at least halves the last step or the bracket, so it is enough for the digits of the dtype
STEPS = {torch.float64: 72, torch.float32: 40}


def root(
    function: Callable[..., tuple[Tensor, Tensor]],
    target: Tensor,
    low: Tensor,
    high: Tensor,
    *parameters: Tensor,
) -> Tensor:
    """x with ``function(x, *parameters)[0] = target``, between ``low`` and ``high``, for each element.

    ``function`` returns values and slopes; it is increasing, and acts on each element. Newton's method in a bracket: the
    bracket is halved where a step would leave it or is more than half of the last one. Elements that have converged
    keep their x. First and second derivatives by target and parameters are those of the root.
    """
    fixed = [p.detach() for p in parameters]
    x = _bracketed(lambda x: function(x, *fixed), target.detach(), low.detach(), high.detach())
    for _ in range(2):  # of Newton's steps from the root; each adds an order of the derivatives
        value, slope = function(x, *parameters)
        residual = target - value
        # its value is rounding, and is left out
        x = x + (residual - residual.detach()) / slope
    return x


def _bracketed(
    function: Callable[[Tensor], tuple[Tensor, Tensor]], target: Tensor, low: Tensor, high: Tensor
) -> Tensor:
    with torch.no_grad():
        x, last = low + (high - low) / 2, high - low
        done = torch.zeros_like(x, dtype=torch.bool)
        epsilon = torch.finfo(x.dtype).eps
        # values of the CPU can be read at once; a graph or a transform takes all steps
        reads = x.device.type == "cpu" and not (in_transform() or torch.compiler.is_compiling())
        for _ in range(1 if x.is_meta else STEPS[x.dtype]):
            value, slope = function(x)
            residual = target - value
            low, high = torch.where(residual < 0, low, x), torch.where(residual < 0, x, high)
            step = residual / slope
            inside = (x + step >= low) & (x + step <= high)
            small = (step.abs() <= epsilon * x.abs()) | (residual.abs() <= epsilon * target.abs())
            newton = inside & ((2 * step.abs() <= last.abs()) | small)
            to = torch.where(newton, x + step, torch.where(small, x, low + (high - low) / 2))
            last = torch.where(newton, step, high - low)
            x, done = torch.where(done, x, to), done | small
            if reads and bool(done.all()):
                break
        return x
