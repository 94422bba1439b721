"""A flow with its directions swapped."""

from torch import Tensor

from fastflow import validation
from fastflow.nn.flow import Flow
from fastflow.state_from_data import state_from_data


class Inverse(Flow):
    r"""A flow with its directions swapped, :math:`z = f^{-1}(x)` and :math:`x = f(z)`.

    Some flows have one fast direction. ``Inverse`` chooses whether densities or samples run in it.

    No pass of it sets state of the flow from data: neither direction initializes an :class:`ActNorm` or moves
    statistics of a :class:`BatchNorm`, in training mode and by :meth:`Flow.initialize` alike. An ActNorm in it starts as
    the identity and is learned from there. To set such state, call ``layer.flow.initialize(z)`` with latents z.

    In a reversible chain, backward inverts the layer by f and runs its inverse again. The activations of the whole
    f are stored meanwhile; ``Sequential(Inverse(f_2), Inverse(f_1))`` stores fewer than
    ``Inverse(Sequential(f_1, f_2))``.

    Args:
        flow: the flow f.

    Shape: as f takes and returns them; log_det ``[N]``, nats, of the direction called.
    Raises ValueError if ``flow`` is not a Flow.

    Example:
        >>> import torch
        >>> from fastflow import nn as fnn
        >>> coupling = fnn.AffineCoupling(fnn.MLP(2, 4))
        >>> x, log_det = fnn.Inverse(coupling)(torch.randn(8, 4))
    """

    def __init__(self, flow: Flow) -> None:
        super().__init__()
        if not isinstance(flow, Flow):
            raise validation.argument_error("flow", type(flow).__name__, "a Flow")
        self.flow = flow

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        with state_from_data(False):
            return self.flow.inverse(x, context)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        with state_from_data(False):
            return self.flow(z, context)
