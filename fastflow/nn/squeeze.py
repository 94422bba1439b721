"""Squeeze of images: blocks of pixels become channels."""

from collections.abc import Sequence

from torch import Tensor

from fastflow import ops, validation
from fastflow.nn.flow import Flow
from fastflow.ops.squeeze import ORDERS
from fastflow.reversible import Gradients, zero_log_det


class Squeeze(Flow):
    """Squeeze, 2x2 blocks of pixels to channels (RealNVP, arXiv:1605.08803, section 3.6); its log-det is 0.

    Args:
        order: order of the new channels, ``"channel"``, ``"space"`` or ``"realnvp"``; see
            :func:`fastflow.ops.squeeze2d`.

    Shape: x ``[N, C, H, W]`` with even H and W; z ``[N, 4C, H/2, W/2]``; log_det ``[N]``, zeros.
    Raises ValueError for other shapes and orders.
    """

    def __init__(self, order: str = "channel") -> None:
        super().__init__()
        validation.one_of("order", order, ORDERS)
        self.order = order

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return ops.squeeze2d(x, self.order), zero_log_det(x)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return ops.unsqueeze2d(z, self.order), zero_log_det(z)

    def inverse_backward(
        self, z: Tensor, dz: Tensor, dlog_det: Tensor, wanted: Sequence[Tensor], context: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Gradients]:
        return self.inverse(z)[0], self.inverse(dz)[0], {}

    def extra_repr(self) -> str:
        return f"order={self.order!r}"
