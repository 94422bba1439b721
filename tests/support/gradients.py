"""Outputs with the gradients of one loss, and reversible backprop compared with stored activations."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from fastflow.reversible import run_reversible, run_storing


def outputs_and_gradients(
    run: Callable[[], Iterable[Tensor]], variables: list[Tensor], seed: int = 3
) -> tuple[list[Tensor], list[Tensor]]:
    """The outputs of ``run()``, and the gradients with respect to ``variables`` of a random weighted sum."""
    generator = torch.Generator().manual_seed(seed)
    outputs = run()
    loss = sum(
        (v * torch.randn(v.shape, generator=generator, dtype=torch.float64, device="cpu").to(v)).sum()
        for v in outputs
    )
    gradients = torch.autograd.grad(loss, variables, allow_unused=True, materialize_grads=True)
    return [v.detach() for v in outputs], list(gradients)


def assert_as_stored(steps, x: Tensor, context: Tensor | None = None, tolerance: float = 1e-10, **options):
    """Compares ``run_reversible(steps, x, context, **options)`` with ``run_storing(...)``; returns the reversible result."""
    contexts = [] if context is None else [context]
    variables = dict.fromkeys([x, *contexts, *(p for s in steps for p in s.parameters())])
    variables = [v for v in variables if v.requires_grad]
    expected = outputs_and_gradients(lambda: run_storing(steps, x, context), variables)
    found = outputs_and_gradients(lambda: run_reversible(steps, x, context, **options), variables)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found[1], expected[1], rtol=tolerance, atol=tolerance)
    return found
