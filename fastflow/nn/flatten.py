"""Flattening of images to vectors."""

import math
from collections.abc import Sequence

from torch import Tensor

from fastflow import validation
from fastflow.nn.flow import Flow
from fastflow.reversible import Gradients, zero_log_det


class Flatten(Flow):
    """Flatten samples to vectors; its log-det is 0.

    Args:
        shape: shape of one sample.

    Shape: x ``[N, *shape]``; z ``[N, D]`` with D the product of ``shape``; log_det ``[N]``, zeros.
    Raises ValueError for x or z of another shape, and for a ``shape`` without positive integers.
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        validation.sample_shape("shape", shape)
        self.shape = tuple(shape)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        validation.same_shape("x", x, (x.shape[0], *self.shape), "the layer's shape")
        return x.flatten(1), zero_log_det(x)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        validation.same_shape("z", z, (z.shape[0], math.prod(self.shape)), "the values of the layer's shape")
        return z.reshape(z.shape[0], *self.shape), zero_log_det(z)

    def inverse_backward(
        self, z: Tensor, dz: Tensor, dlog_det: Tensor, wanted: Sequence[Tensor], context: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Gradients]:
        return self.inverse(z)[0], self.inverse(dz)[0], {}

    def extra_repr(self) -> str:
        return f"{self.shape}"
