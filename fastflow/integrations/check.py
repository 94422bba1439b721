"""Whether an accelerated model computes the same as before, on inputs of its user."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastflow import validation

Check = Callable[[nn.Module], Tensor]
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3}  # over 1 + the largest value; in other dtypes 0.05


def checked(model: nn.Module, check: Check) -> Tensor:
    """What ``check`` returns for a copy of the model, whose buffers it may change."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        found = check(copy.deepcopy(model))
    if not isinstance(found, Tensor):
        raise validation.argument_error(
            "check", f"a function that returns {type(found).__name__}", "a tensor"
        )
    return found.detach()


def assert_close(found: Tensor, wanted: Tensor) -> None:
    """Raise RuntimeError if values differ by more than rounding; values that were not finite may be others."""
    if found.shape != wanted.shape:
        got, expected = map(validation.shape_of, (found, wanted))
        raise RuntimeError(f"check: got {got} of the faster model, expected {expected}; nothing was replaced")
    finite = wanted.isfinite()
    if not finite.any():
        return
    found, wanted = found[finite].to(wanted.dtype), wanted[finite]
    error = ((found - wanted).abs().max() / (1 + wanted.abs().max())).item()
    limit = TOLERANCE.get(wanted.dtype, 0.05)
    if not error <= limit:
        raise RuntimeError(
            f"check: the faster model is off by {error:.1e} of 1 + the largest value, expected at most {limit}; "
            "nothing was replaced"
        )
