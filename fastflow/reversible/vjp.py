"""Vector-Jacobian products and sums of gradients."""

from collections.abc import Sequence

import torch
from torch import Tensor

Gradients = dict[Tensor, Tensor]


def vjp(
    outputs: Sequence[Tensor | None],
    cotangents: Sequence[Tensor | None],
    wanted: Sequence[Tensor],
    *,
    create_graph: bool = False,
) -> Gradients:
    """Vector-Jacobian product: gradients of those tensors of ``wanted`` that the outputs depend on."""
    pairs = [(v, g) for v, g in zip(outputs, cotangents, strict=True) if v is not None and v.requires_grad]
    if not pairs or not wanted:
        return {}
    found = torch.autograd.grad(
        [v for v, _ in pairs],
        list(wanted),
        [g for _, g in pairs],
        allow_unused=True,
        create_graph=create_graph,
    )
    return {v: g for v, g in zip(wanted, found, strict=True) if g is not None}


def add(gradients: Gradients, more: Gradients) -> None:
    """Add ``more`` to ``gradients`` in place: steps that share a parameter each contribute a gradient."""
    for v, g in more.items():
        gradients[v] = gradients[v] + g if v in gradients else g
