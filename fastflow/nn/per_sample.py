"""Parameters of a layer for each sample: learned ones, and a linear map of the context added to them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastflow import validation
from fastflow.nn.networks.context import checked_context
from fastflow.ops import acc_dtype


def context_weight(context_features: int | None, *parameters: Tensor) -> nn.Parameter | None:
    """The matrix of the linear map, zeros ``[P, C]`` with P the number of all parameters; None without a context."""
    validation.positive_int("context_features", context_features, optional=True)
    if context_features is None:
        return None
    return nn.Parameter(torch.zeros(sum(p.numel() for p in parameters), context_features))


def of_samples(
    x: Tensor, context: Tensor | None, weight: Tensor | None, *parameters: Tensor
) -> Sequence[Tensor]:
    """The parameters in at least float32, ``[*shape]``; with a weight of the context ``[N, *shape]``.

    Raises ValueError for another context than the weight takes.
    """
    dtype = acc_dtype(x.dtype)
    shared = [p.to(dtype) for p in parameters]
    if weight is None:
        return shared
    given: Any = checked_context(x, context, weight.shape[1])
    validation.same_device_and_precision("context", given, "the layer's parameters", weight)
    added = (given.to(dtype) @ weight.to(dtype).mT).split([p.numel() for p in parameters], dim=1)
    return [p + a.view(-1, *p.shape) for p, a in zip(shared, added, strict=True)]


def described(weight: Tensor | None) -> str:
    """The part of a layer's ``repr``."""
    return "" if weight is None else f", context_features={weight.shape[1]}"
