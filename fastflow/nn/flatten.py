"""Images as vectors."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastflow import check
from fastflow.nn.flow import Flow
from fastflow.ops import acc_dtype
from fastflow.reversible import Gradients


class Flatten(Flow):
    """A sample's values in a row, ``[N, *shape]`` to ``[N, D]``; its log-det is 0.

    Args:
        shape: of one sample.

    Raises ValueError for x or z of another shape.
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape = tuple(shape)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        check.same_shape("x", x, (x.shape[0], *self.shape), "the layer's shape")
        return x.flatten(1), _zeros(x)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        check.same_shape("z", z, (z.shape[0], math.prod(self.shape)), "the values of the layer's shape")
        return z.reshape(z.shape[0], *self.shape), _zeros(z)

    def inverse_backward(
        self, z: Tensor, dz: Tensor, dlog_det: Tensor, wanted: Sequence[Tensor], context: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Gradients]:
        return self.inverse(z)[0], self.inverse(dz)[0], {}

    def extra_repr(self) -> str:
        return f"{self.shape}"


def _zeros(x: Tensor) -> Tensor:
    return torch.zeros(x.shape[0], dtype=acc_dtype(x.dtype), device=x.device)
