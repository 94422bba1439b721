"""A flow with methods named encoder and decoder."""

from torch import Tensor, nn

from fastflow import validation
from fastflow.nn.flow import Flow, FlowReport


class EncoderDecoder(nn.Module):
    """A flow as an encoder (data to latent) and a decoder (latent to data), as some exercises name them.

    Both methods return ``(output, log_det)``, where ``log_det`` belongs to that direction.

    Args:
        flow: any :class:`Flow`.

    Shape: as the flow's; log_det ``[N]``, nats.
    Raises ValueError if ``flow`` is not a Flow.

    Example:
        >>> import torch
        >>> from fastflow.nn import ActNorm, EncoderDecoder
        >>> layer = EncoderDecoder(ActNorm(2))
        >>> z, log_det = layer.encoder(torch.randn(8, 2))
    """

    def __init__(self, flow: Flow) -> None:
        super().__init__()
        if not isinstance(flow, Flow):
            raise validation.argument_error("flow", type(flow).__name__, "a Flow")
        self.flow = flow

    def encoder(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``flow(x, context)``."""
        return self.flow(x, context)

    def decoder(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``flow.inverse(z, context)``."""
        return self.flow.inverse(z, context)

    def check(self, x: Tensor, context: Tensor | None = None, **tolerances: float) -> FlowReport:
        """:meth:`Flow.check` of the flow."""
        return self.flow.check(x, context, **tolerances)
