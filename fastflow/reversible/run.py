"""Run a chain of flows with reversible backprop."""

from collections.abc import Iterable

import torch
from torch import Tensor

from fastflow.deprecation import renamed_arguments
from fastflow.reversible.segments import SharedArgs, Step, run_segments, run_storing
from fastflow.transforms import in_transform


@renamed_arguments(weights="shared_args", checkpoint_every="activation_checkpoint_every")
def run_reversible(
    steps: Iterable[Step],
    x: Tensor,
    context: Tensor | None = None,
    *,
    shared_args: SharedArgs[Step] | None = None,
    activation_checkpoint_every: int | None = None,
) -> tuple[Tensor, Tensor]:
    """``(z, log_det)`` of a chain of flows, differentiable in x, context and parameters; only z is stored.

    If gradients are disabled, in a transform of torch.func, in forward-mode AD and in ``torch.jit.trace``,
    this is :func:`run_storing`. Backward restores autocast, training mode, RNG state and buffers to their
    forward values; running statistics are not updated twice. With ``create_graph=True``, backward stores the
    activations of each segment, and derivatives of any order are correct. A step that draws random numbers
    must draw the same numbers in its inverse. Tensors that reach a step other than as x, context or a
    parameter receive no gradient.

    Args:
        steps: flows, applied in order.
        shared_args: function for work that the steps share. It takes the steps and returns, for each step,
            the arguments that follow ``context``. It is called once in forward and once in backward, where it is
            differentiated.
        activation_checkpoint_every: number of steps between two stored activations. Rounding errors
            accumulate over at most this many steps.

    Raises ValueError for a step without an inverse or with a log_det that is not ``[N]``, TypeError for a
    context that is not a tensor. Backward raises RuntimeError if a parameter or buffer changed after forward.
    For steps without their own rule, and with ``create_graph=True``, backward on the CPU also raises
    RuntimeError if the inverse is inaccurate; on a GPU this check would synchronize.
    """
    steps = list(steps)
    # torch 2.11 reports both while compiling
    exporting = torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling()
    tracing = torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage] # documented, but not in __all__
    if not torch.is_grad_enabled() or x.is_meta or exporting or in_transform() or tracing:
        return run_storing(steps, x, context, shared_args=shared_args)
    length = activation_checkpoint_every or max(1, len(steps))
    if torch.compiler.is_compiling():
        from fastflow.reversible import untraced

        return untraced.run_segments(steps, x, context, shared_args, length)
    return run_segments(steps, x, context, shared_args, length)
