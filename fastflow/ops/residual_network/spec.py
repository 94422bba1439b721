"""Cases of residual networks: as many features as the shape has channels, as many samples as it has pixels."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from fastflow.ops.layout import acc_dtype
from fastflow.ops.residual_network.op import SAMPLES, shapes_of
from fastflow.ops.spec import Case, Make

_LIMIT = f"for at least {SAMPLES} samples; else PyTorch"
LIMITS = {(op, "cpu"): _LIMIT for op in ("residual_network", "residual_network_backward")}
# name; features of the context, hidden units, blocks, activation, statistics
VARIANTS = (
    ("", None, 9, 1, "relu", "none"),
    ("gated", 3, 17, 2, "silu", "none"),
    ("gated, batch norm", 3, 6, 1, "elu", "batch"),
    ("running statistics", None, 5, 1, "tanh", "running"),
)


def cases(make: Make, shape: tuple[int, ...]) -> Iterator[Case]:
    """y has twice as many features as x."""
    n, features = shape[0] * math.prod(shape[2:]), shape[1]
    dtype = acc_dtype(make.dtype)
    for name, contexts, hidden, blocks, activation, statistics in VARIANTS:
        normed = statistics != "none"
        parameters = parameters_of(features, contexts, hidden, 2 * features, blocks, normed, dtype)
        count = 4 * blocks if statistics == "running" else 0
        running = [0.5 + torch.rand(hidden, dtype=dtype) for _ in range(count)]
        x = torch.randn(n, features, dtype=dtype)
        context = None if contexts is None else torch.randn(n, contexts, dtype=dtype)
        options = blocks, activation, normed, 1e-3
        args = x, context, parameters, running
        # ReLU's slope, and batches of few samples, amplify rounding
        yield Case(
            "residual_network", name, (*args, *options, True, contexts is not None), ill_conditioned=True
        )
        empty, dy = x.new_empty(0), torch.randn(n, 2 * features, dtype=dtype)
        # without hidden activations, which are computed again
        backward = *args, empty, empty, *options, contexts is not None, dy
        yield Case("residual_network_backward", name, backward, ill_conditioned=True)


def parameters_of(
    features: int,
    contexts: int | None,
    hidden: int,
    outputs: int,
    blocks: int,
    batch_norm: bool,
    dtype: torch.dtype,
) -> list[Tensor]:
    """Random parameters of a network, in the op's order."""
    shapes = shapes_of(features, contexts, hidden, outputs, blocks, batch_norm)
    return [torch.randn(s, dtype=dtype) / (s[-1] if len(s) == 2 else 4) ** 0.5 for s in shapes]
